"""Our layers in PyTorch: `ConvLSTM2D` is a module, `accelerate` puts our kernels into the ConvLSTMs of a model.

PyTorch itself is imported when one of them is first used.
"""

from fastclstm.lazy import moved

__getattr__ = moved(
    __name__,
    dict.fromkeys(("from_torch", "to_torch"), "fastclstm.convert.torch"),
    {
        "ConvLSTM2D": "fastclstm.adapters.torch_layers",
        "Report": "fastclstm.adapters.report",
        "accelerate": "fastclstm.adapters.torch_accelerate",
    },
)
