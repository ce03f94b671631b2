"""The gated recurrent unit over vectors."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from fastclstm.layers.recurrent import Recurrent
from fastclstm.spec import Shape, flag


@dataclass(eq=False, repr=False)
class GRU(Recurrent):
    """Gated recurrent unit over vectors: (B, T, in_features) to (B, T, units), or to (B, units).

    All numbers are those of `fastclstm.functional.convgru2d` for frames of one pixel. As Keras's, whose
    return_sequences is False unless given. PyTorch's has the gates r, z, n and reset_after: its weight_ih, blocks of
    rows exchanged, is ``kernel.T``.

    Parameters
    ----------
    in_features, units : int
    activation, recurrent_activation : str or pair of functions (forward, derivative)
        Of the new memory n; of the gates z and r. Names of `fastclstm.nn.activations`.
    reset_after : bool
        Whether the reset gate multiplies what the recurrent kernel makes of h (as Keras since 2.0, cuDNN and PyTorch
        do), or h itself before (as Cho et al. 2014).
    use_bias, kernel_initializer, recurrent_initializer, bias_initializer, kernel_regularizer, recurrent_regularizer, \
bias_regularizer, kernel_constraint, recurrent_constraint, bias_constraint, dropout, recurrent_dropout, \
return_sequences, go_backwards, stateful, dtype, seed, engine
        As in `LSTM`.
    return_state : bool
        Also return ``[(h,)]`` of the last step.

    Attributes
    ----------
    kernel : array (in_features, 3 · units)
        Of the gates z, r, n.
    recurrent_kernel : array (units, 3 · units)
    bias : array (2, 3 · units), of the input and of the hidden state; without reset_after (3 · units,); or None

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    References
    ----------
    Cho et al., "Learning Phrase Representations using RNN Encoder–Decoder for Statistical Machine Translation",
    EMNLP 2014.

    Examples
    --------
    >>> import numpy as np
    >>> GRU(3, 8, seed=0)(np.zeros((2, 5, 3))).shape
    (2, 5, 8)
    """

    _: KW_ONLY
    reset_after: bool = True

    _operation = "convgru2d"
    _gates = 3
    _state_names = ("h",)

    def __post_init__(self) -> None:
        flag("GRU", "reset_after", self.reset_after)
        super().__post_init__()

    def _bias_shape(self) -> Shape:
        return (2, 3 * self.units) if self.reset_after else (3 * self.units,)

    def _operation_options(self) -> dict[str, Any]:
        return {"activation": self.activation, "recurrent_activation": self.recurrent_activation,
                "reset_after": self.reset_after}  # fmt: skip
