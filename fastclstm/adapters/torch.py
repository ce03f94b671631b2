"""Where PyTorch's weights were read: see `fastclstm.convert.torch`."""

from fastclstm.lazy import moved

__getattr__ = moved(__name__, dict.fromkeys(("from_torch", "to_torch"), "fastclstm.convert.torch"))
