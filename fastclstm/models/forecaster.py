"""The forecaster of an encoding-forecasting network: from states to the frames that follow, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from fastclstm.layers.container import add_gradients
from fastclstm.layers.convlstm2d import ConvLSTM2D
from fastclstm.layers.convolution import Conv2D

States = list[tuple[Any, Any]]
"""One pair (h, c) a layer."""

Gradients = dict[str, Any]

Pull = Callable[[np.ndarray, "States | None", Gradients], tuple[np.ndarray, States]]
"""Takes dy of some steps, the gradients of the states after them, and the sum of the parameters' gradients so far, to
which it adds; returns the gradients of the steps' input and of the states before them."""


class Forecaster:
    """ConvLSTM layers, one on the other, whose hidden states, side by side, become frames by the head."""

    def __init__(self, layers: Sequence[ConvLSTM2D], head: Conv2D):
        self.layers, self.head = tuple(layers), head
        self.named = {f"forecaster.{index}": layer for index, layer in enumerate(layers)} | {"head": head}

    def run(self, x: np.ndarray, states: States, training: bool) -> tuple[np.ndarray, States, Pull]:
        """Run over inputs x (B, T, H, W, C): the frames made, the states after them, and their pullback."""
        hidden, after, recorded = [], [], []
        for layer, state in zip(self.layers, states, strict=True):
            x, (state,) = layer(x, initial_state=[state], training=training)
            hidden.append(x)
            after.append(state)
            recorded.append(layer._pullback)
        y = self.head(np.concatenate(hidden, -1), training=training)
        recorded.append(self.head._pullback)

        def pull(dy: np.ndarray, dstates: States | None, gradients: Gradients) -> tuple[np.ndarray, States]:
            for layer, pullback in zip(self.named.values(), recorded, strict=True):
                layer._pullback = pullback  # of this call, of the many that a roll-out makes
            return self._pull(dy, dstates, gradients)

        return y, after, pull

    def backward(self, dy: np.ndarray, pulls: Sequence[Pull]) -> tuple[np.ndarray, States, Gradients]:
        """Pull dy (B, steps, H, W, C) back through a roll-out, in which each input was the frame made before.

        Or through all steps at once, where there is one pullback. Returns the gradients of the first input, of the
        states before it, and of the parameters by name.
        """
        gradients: Gradients = {}
        dstates: States | None = None
        dinput: np.ndarray | None = None
        for step in reversed(range(len(pulls))):
            part = dy if len(pulls) == 1 else dy[:, step : step + 1]
            dinput, dstates = pulls[step](part if dinput is None else part + dinput, dstates, gradients)
        assert dinput is not None  # there is at least one step
        assert dstates is not None
        return dinput, dstates, gradients

    def _pull(self, dy: np.ndarray, dstates: States | None, gradients: Gradients) -> tuple[np.ndarray, States]:
        filters = [layer.out_channels for layer in self.layers]
        dhidden = np.split(self.head.backward(dy), list(accumulate(filters))[:-1], -1)
        before: States = []
        dx = np.zeros_like(dhidden[-1])
        for index in reversed(range(len(self.layers))):
            layer = self.layers[index]
            dx = layer.backward(dhidden[index] + dx, None if dstates is None else [dstates[index]])
            before.insert(0, (layer.state_gradients or [])[0])
        for prefix, part in self.named.items():
            add_gradients(gradients, prefix, part)
        return dx, before
