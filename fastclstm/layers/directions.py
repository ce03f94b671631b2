"""One layer of a stack: a cell, or two that go through the sequence in both directions and whose outputs are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.recurrent_cell import RecurrentCell
from fastclstm.layers.states import LastStates, State

MERGE_MODES = ("concat", "sum", "mul", "ave", None)

Merged = Any
"""An array, or with the merge mode None the pair of the directions' arrays."""


@dataclass
class Passage:
    """What a training run of `Directions` keeps for its way back; lists have one item a direction."""

    sequences: bool
    """Whether the outputs have a time axis."""
    pullbacks: list[Any] = field(default_factory=list)
    kept: list[np.ndarray | None] = field(default_factory=list)
    """Where the output was not set to zero."""
    outputs: list[np.ndarray] = field(default_factory=list)
    """Of the merge mode "mul" alone, whose gradient needs them."""


class Directions:
    """The cells of a layer: the first goes forward, the second, if there is one, backward; and how they are merged."""

    def __init__(self, cells: Sequence[RecurrentCell], merge_mode: str | None):
        self.cells, self.merge_mode = tuple(cells), merge_mode
        self.channels: int = cells[0].out_channels * (len(cells) if merge_mode == "concat" else 1)
        """How many the merged output has."""

    def run(
        self, sequence: np.ndarray, states: Sequence[State], mask: np.ndarray | None, *, return_sequences: bool,
        go_backwards: bool, zero_output_for_mask: bool, **options: Any,
    ) -> tuple[Merged, LastStates, Passage]:  # fmt: skip
        """Return the merged output in processing order, the last states, and what a training run keeps.

        With `go_backwards` it is the first cell that processes the last frame first. `options` are those of the cells.
        """
        outputs, last_states, passage = [], [], Passage(return_sequences)
        for backwards, (cell, state) in enumerate(zip(self.cells, states, strict=True)):
            (output, *last), pullback = cell._run(
                sequence, state, mask=mask, go_backwards=bool(backwards) != go_backwards,
                return_sequences=return_sequences, **options,
            )  # fmt: skip
            if return_sequences and backwards:
                output = output[:, ::-1]
            kept = None
            if mask is not None and zero_output_for_mask:
                processed = mask[:, ::-1] if go_backwards else mask
                kept = processed if return_sequences else processed[:, 0 if backwards else -1]
                kept = kept.reshape(*kept.shape, *(1,) * (output.ndim - kept.ndim))
                output = np.where(kept, output, np.zeros((), output.dtype))
            outputs.append(output)
            last_states.append(tuple(last))
            passage.pullbacks.append(pullback)
            passage.kept.append(kept)
        if self.merge_mode == "mul":
            passage.outputs = outputs
        return self.merge(outputs), last_states, passage

    def backward(
        self, passage: Passage, dy: Merged, dlast: Sequence[State], *, input_gradient: bool
    ) -> tuple[Any, list[dict[str, Any]], list[State]]:
        """Return dx and, of each cell, the gradients of its parameters by name and those of its initial states.

        dx is None where nobody asks for it.
        """
        dx: Any = None
        gradients: list[dict[str, Any]] = []
        dstates: list[State] = []
        each = self.unmerge(dy, passage.outputs)
        for backwards in reversed(range(len(self.cells))):
            d, kept = each[backwards], passage.kept[backwards]
            if d is not None and kept is not None:
                d = np.where(kept, d, np.zeros((), d.dtype))
            if d is not None and passage.sequences and backwards:
                d = d[:, ::-1]
            pulled = passage.pullbacks[backwards]((d, *dlast[backwards]), input_gradient=input_gradient)
            if input_gradient:
                dx = pulled["x"] if dx is None else dx + pulled["x"]
            gradients.insert(0, self.cells[backwards]._named_gradients(pulled))
            dstates.insert(0, pulled.get("initial_state", (None,) * len(dlast[backwards])))
        return dx, gradients, dstates

    def merge(self, outputs: Sequence[np.ndarray]) -> Merged:
        """Make one output of those of the directions."""
        if len(self.cells) == 1:
            return outputs[0]
        forward, backward = outputs
        if self.merge_mode is None:
            return forward, dispatch.contiguous(backward)
        if self.merge_mode == "concat":
            return np.concatenate(outputs, axis=-1)
        if self.merge_mode == "mul":
            return forward * backward
        return (forward + backward) / forward.dtype.type(2 if self.merge_mode == "ave" else 1)

    def unmerge(self, dy: Merged, outputs: Sequence[np.ndarray]) -> Sequence[np.ndarray | None]:
        """Pull dy back through `merge`; `outputs` are the directions' where the mode is "mul"."""
        if dy is None or len(self.cells) == 1:
            return [dy] * len(self.cells)
        if self.merge_mode is None:
            return dy
        if self.merge_mode == "concat":
            return np.split(dy, 2, axis=-1)
        if self.merge_mode == "mul":
            return dy * outputs[1], dy * outputs[0]
        half = dy / dy.dtype.type(2 if self.merge_mode == "ave" else 1)
        return half, half


def several(output: Merged) -> tuple[np.ndarray, ...]:
    """Return the arrays of a merged output."""
    return output if isinstance(output, tuple) else (output,)
