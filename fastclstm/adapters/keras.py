"""Where Keras's weights were read: see `fastclstm.convert.keras`."""

from fastclstm.lazy import moved

__getattr__ = moved(__name__, dict.fromkeys(("from_keras", "load_weights"), "fastclstm.convert.keras"))
