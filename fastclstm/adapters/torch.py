"""Our layers in PyTorch: ConvLSTM2D, ConvGRU2D and ConvRNN2D are modules; `accelerate` brings our kernels into a model.

PyTorch itself is imported when one of them is first used.
"""

from fastclstm.lazy import moved

__getattr__ = moved(
    __name__,
    dict.fromkeys(("from_torch", "to_torch"), "fastclstm.convert.torch"),
    {
        **dict.fromkeys(("ConvGRU2D", "ConvLSTM2D", "ConvRNN2D"), "fastclstm.adapters.torch_layers"),
        "Report": "fastclstm.adapters.report",
        "accelerate": "fastclstm.adapters.torch_accelerate",
    },
)
