"""Recurrent layers, one on the other, over whole sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.activation import leaky
from fastclstm.layers.directions import Directions, Merged
from fastclstm.layers.states import LastStates, State
from fastclstm.layers.tape import Tape
from fastclstm.spec import Shape

CHUNK_STEPS = 16
"""Time steps that stacked layers work on at once where only the last output is wanted."""


class Stack:
    """Layers of cells, each with a LeakyReLU before the next one if a slope is given."""

    def __init__(self, layers: Sequence[Directions], slope: float | None):
        self.layers, self.slope = tuple(layers), slope
        self.cells = tuple(cell for layer in layers for cell in layer.cells)
        self.channels = self.layers[-1].channels

    def state_shapes(self, frames: Shape, op: str) -> list[Shape]:
        """Return the shape (B, HO, WO, F) of each cell's states for frames (B, H, W, C)."""
        shapes: list[Shape] = []
        for index, layer in enumerate(self.layers):
            state = layer.cells[0]._state_shape(frames, f"{op} layer {index}" if len(self.layers) > 1 else op)
            shapes += [state] * len(layer.cells)
            frames = *state[:-1], layer.channels
        return shapes

    def run(
        self, sequence: np.ndarray, states: Sequence[State], mask: np.ndarray | None, tape: Tape | None, *,
        return_sequences: bool, go_backwards: bool, **options: Any,
    ) -> tuple[Merged, LastStates]:  # fmt: skip
        """Run all layers over x (B, T, H, W, C): the output and the last states; `options` are those of `Directions`.

        With a tape it is a training run.
        """
        options |= {"return_sequences": return_sequences, "go_backwards": go_backwards}
        steps, both_ways = sequence.shape[1], len(self.layers[0].cells) > 1
        whole = tape is not None or mask is not None or return_sequences or both_ways or len(self.layers) == 1
        if whole or steps <= CHUNK_STEPS:
            return self._run(sequence, states, mask, tape, **options)
        for start in range(0, steps, CHUNK_STEPS):  # the sequences between layers would be as long as x
            stop = min(start + CHUNK_STEPS, steps)
            part = sequence[:, steps - stop : steps - start] if go_backwards else sequence[:, start:stop]
            output, last_states = self._run(dispatch.contiguous(part), states, mask, tape, **options)
            states = last_states
        return output, last_states

    def _run(
        self, output: Merged, states: Sequence[State], mask: np.ndarray | None, tape: Tape | None, *,
        return_sequences: bool, go_backwards: bool, zero_output_for_mask: bool, **options: Any,
    ) -> tuple[Merged, LastStates]:  # fmt: skip
        last_states: LastStates = []
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            if index > 0 and self.slope is not None:
                positive = output > 0
                output = leaky(positive, output, self.slope)
                if tape is not None:
                    tape.positive.append(positive)
            if index == 1 and go_backwards and mask is not None:
                mask = mask[:, ::-1]  # what layer 0 hands on is in processing order
            first = len(last_states)
            output, after, passage = layer.run(
                output, states[first : first + len(layer.cells)], mask, go_backwards=go_backwards and index == 0,
                return_sequences=return_sequences or not last, zero_output_for_mask=zero_output_for_mask and last,
                training=tape is not None, **options,
            )  # fmt: skip
            last_states += after
            if tape is not None:
                tape.passages.append(passage)
        return output, last_states

    def backward(
        self, tape: Tape, dy: Merged, dlast: Sequence[State], input_gradient: bool
    ) -> tuple[Any, list[dict[str, Any]], list[State]]:
        """Return dx and, of each cell, the gradients of its parameters by name and those of its initial states.

        dx is None where nobody asks for it.
        """
        gradients: list[dict[str, Any]] = []
        dstates: list[State] = []
        stop = len(dlast)
        for index in reversed(range(len(self.layers))):
            layer = self.layers[index]
            start = stop - len(layer.cells)
            dy, named, before = layer.backward(
                tape.passages[index], dy, dlast[start:stop], input_gradient=index > 0 or input_gradient
            )
            gradients, dstates, stop = named + gradients, before + dstates, start
            if index and self.slope is not None:
                dy = leaky(tape.positive[index - 1], dy, self.slope)
        return dy, gradients, dstates
