"""The LSTM over vectors: a ConvLSTM of frames of one pixel."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from fastclstm.layers.recurrent import Recurrent
from fastclstm.layers.recurrent_cell import unit_forget
from fastclstm.nn import initializers
from fastclstm.spec import flag


@dataclass(eq=False, repr=False)
class LSTM(Recurrent):
    """Long short-term memory over vectors: (B, T, in_features) to (B, T, units), or to (B, units).

    All numbers are those of `fastclstm.functional.convlstm2d` for frames of one pixel. As Keras's, whose
    return_sequences is False unless given; PyTorch's weight_ih is ``kernel.T`` and its gates i, f, g, o the same.

    Parameters
    ----------
    in_features, units : int
    activation, recurrent_activation : str or pair of functions (forward, derivative)
        Of g and of the new cell state; of the gates i, f and o. Names of `fastclstm.nn.activations`.
    use_bias : bool
    unit_forget_bias : bool
        Add 1 to the bias of f when it is drawn.
    kernel_initializer, recurrent_initializer, bias_initializer : str or function
        As `fastclstm.nn.initializers.get` takes them.
    kernel_regularizer, recurrent_regularizer, bias_regularizer, kernel_constraint, recurrent_constraint, \
bias_constraint : optional
        As `fastclstm.nn.regularizers.get` and `fastclstm.nn.constraints.get` take them.
    dropout, recurrent_dropout : float
        Share of x, and of the h that the recurrent kernel meets, that is dropped while training, the same at all steps
        and gates.
    return_sequences : bool
        All steps, or the last one alone.
    return_state : bool
        Also return ``[(h, c)]`` of the last step.
    go_backwards : bool
        Read x from its end; outputs are in the order they are computed in.
    stateful : bool
        Start from the states of the last call; see `reset_state`.
    dtype : "float32" or "float64"
        Of parameters and results; inputs are converted to it.
    seed : int or numpy.random.Generator, optional
        The same seed gives the same parameters, and dropout.
    engine : str, optional
        "cpu" (the default), "cuda" or "reference"; may be changed later.

    Attributes
    ----------
    kernel : array (in_features, 4 · units)
        Of the gates i, f, g, o.
    recurrent_kernel : array (units, 4 · units)
    bias : array (4 · units,) or None

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    References
    ----------
    Hochreiter & Schmidhuber, "Long Short-Term Memory", Neural Computation 9 (1997).

    Examples
    --------
    >>> import numpy as np
    >>> LSTM(3, 8, return_sequences=False, seed=0, engine="reference")(np.zeros((2, 5, 3))).shape
    (2, 8)
    """

    _: KW_ONLY
    unit_forget_bias: bool = True

    _operation = "convlstm2d"
    _gates = 4
    _state_names = ("h", "c")

    def __post_init__(self) -> None:
        flag("LSTM", "unit_forget_bias", self.unit_forget_bias)
        super().__post_init__()

    def _drawn_bias(self) -> Any:
        drawn = initializers.get(self.bias_initializer)
        return unit_forget(drawn) if self.unit_forget_bias else drawn

    def _operation_options(self) -> dict[str, Any]:
        return {"activation": self.activation, "recurrent_activation": self.recurrent_activation}
