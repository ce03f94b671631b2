"""The LSTM over vectors: a ConvLSTM of frames of one pixel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm import dispatch, functional
from fastclstm.layers.recurrent import Recurrent, States
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
    engine: str | None = None

    _gates = 4
    _state_names = ("h", "c")

    def __post_init__(self) -> None:
        flag("LSTM", "unit_forget_bias", self.unit_forget_bias)
        dispatch.check_engine(self.engine)
        super().__post_init__()

    def _drawn_bias(self) -> Any:
        drawn = initializers.get(self.bias_initializer)
        return unit_forget(drawn) if self.unit_forget_bias else drawn

    def _run(
        self, x: np.ndarray, states: States, mask: np.ndarray | None, dropout: np.ndarray | None
    ) -> tuple[np.ndarray, States, Callable[[Any, States], tuple[dict[str, Any], States]]]:
        zeros = np.zeros((len(x), self.units), x.dtype)
        initial = tuple(_pixels(zeros if state is None else state) for state in states)
        masks = None if dropout is None else {"h": np.repeat(_pixels(dropout)[np.newaxis], 4, 0)}
        (y, h, c), pull = functional.convlstm2d_vjp(
            _pixels(x), self.kernel[np.newaxis, np.newaxis], self.recurrent_kernel[np.newaxis, np.newaxis], self.bias,
            initial_state=initial, activation=self.activation, recurrent_activation=self.recurrent_activation,
            mask=mask, dropout_masks=masks, return_state=True, engine=self.engine,
        )  # fmt: skip

        def pullback(dy: Any, dstates: States) -> tuple[dict[str, Any], States]:
            cotangents = (None if d is None else _pixels(d) for d in (dy, *dstates))
            gradients = pull(tuple(cotangents))
            before = tuple(_vectors(state) for state in gradients.pop("initial_state"))
            flat = {name: array[0, 0] for name, array in gradients.items() if name.endswith("kernel")}
            return {"x": _vectors(gradients["x"])} | flat | (
                {"bias": gradients["bias"]} if self.use_bias else {}
            ), before

        return _vectors(y), (_vectors(h), _vectors(c)), pullback


def _pixels(array: np.ndarray) -> np.ndarray:
    """Return vectors (…, N) as frames of one pixel (…, 1, 1, N)."""
    return array.reshape(*array.shape[:-1], 1, 1, array.shape[-1])


def _vectors(array: np.ndarray) -> np.ndarray:
    """Return frames of one pixel (…, 1, 1, N) as vectors (…, N)."""
    return array.reshape(*array.shape[:-3], array.shape[-1])
