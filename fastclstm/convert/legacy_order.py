"""The order of outputs in which the published bidirectional module "seyongk" returns them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.layers import ConvLSTM2D, Layer
from fastclstm.spec import Shape, choice


@dataclass(eq=False, repr=False)
class LegacyOrder(Layer):
    """A bidirectional ConvLSTM2D whose results have the order of the module published as "seyongk".

    ``layer(x)`` takes x (B, T, C, H, W) and returns (B, T, 2F, H, W), of which step t holds the forward outputs of step
    t and the backward outputs of step T - 1 - t: those are not brought back to the order of the input. Where the inner
    layer has return_state=True it returns (that, (h, c)), each (B, F, H, 2W) with both directions side by side.

    Parameters
    ----------
    layer : ConvLSTM2D
        With bidirectional=True, merge_mode=None, return_sequences=True, num_layers=1 and time_major=False.

    Raises
    ------
    ValueError, TypeError
        Another layer.
    """

    layer: ConvLSTM2D

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layer, ConvLSTM2D):
            raise TypeError(f"LegacyOrder: layer must be a ConvLSTM2D, got {type(self.layer).__name__}")
        for name, needed in (
            ("bidirectional", True), ("merge_mode", None), ("return_sequences", True), ("num_layers", 1),
            ("time_major", False),
        ):  # fmt: skip
            choice("LegacyOrder", f"layer.{name}", getattr(self.layer, name), (needed,))
        self._sublayers = {"layer": self.layer}

    def forward(self, x: Any, training: bool = False) -> Any:
        """Return the output, and with the inner layer's return_state the states; see the class."""
        restore = dispatch.restorer(x)
        result = self.layer(dispatch.as_numpy("LegacyOrder", "x", x), training=training)
        (forward, backward), states = result if self.layer.return_state else (result, None)
        self._pullback = self._pull if training else None
        output = restore(np.concatenate([forward, _reversed(backward)], self._channels))
        if states is None:
            return output
        width = -1 if self.layer.data_format == "channels_first" else -2
        return output, tuple(restore(np.concatenate(pair, width)) for pair in zip(*states, strict=True))

    def backward(self, dy: Any) -> Any:
        """Return dx of the last call, which was a training call, given dy of its output's shape.

        Raises
        ------
        RuntimeError
            The last call was not a training call.
        """
        return self._recorded()(dy)

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the shape of the output for an x of `input_shape`."""
        shape = list(self.layer.output_shape(input_shape)[0])
        shape[self._channels] *= 2
        return tuple(shape)

    @property
    def _channels(self) -> int:
        return -3 if self.layer.data_format == "channels_first" else -1

    def _pull(self, dy: Any) -> Any:
        restore = dispatch.restorer(dy)
        forward, backward = np.split(dispatch.as_numpy("LegacyOrder", "dy", dy), 2, self._channels)
        dx = self.layer.backward((forward, _reversed(backward)))
        self._collect_gradients()
        return restore(dx)


def _reversed(sequence: np.ndarray) -> np.ndarray:
    """Reverse the time of a sequence ([B,] T, …, …, …)."""
    return np.flip(sequence, -4)
