"""Our layers in Keras 3: `ConvLSTM2D` is a layer of Keras, `accelerate` puts our kernels into the ConvLSTMs of a model.

Keras itself is imported when one of them is first used. What reads Keras's models is `fastclstm.convert.keras`.
"""

from fastclstm.lazy import moved

__getattr__ = moved(
    __name__,
    dict.fromkeys(("from_keras", "load_weights"), "fastclstm.convert.keras"),
    {
        "ConvLSTM2D": "fastclstm.adapters.keras_layers",
        "Report": "fastclstm.adapters.report",
        "accelerate": "fastclstm.adapters.keras_accelerate",
    },
)
