"""What a training call of stacked recurrent layers keeps for its way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastclstm.layers.directions import Merged, Passage
from fastclstm.layers.layout import Layout
from fastclstm.layers.states import State, is_pair
from fastclstm.layers.time_distribution import TimeDistributionCalculator
from fastclstm.spec import Shape


class Tape:
    """What a training call keeps for its backward pass, and the way of its gradients from and to the caller."""

    def __init__(self, layout: Layout, shapes: list[Shape], with_state: bool):
        self.layout, self.shapes, self.with_state = layout, shapes, with_state
        self.passages: list[Passage] = []
        self.positive: list[np.ndarray] = []
        """Where what each layer but the last handed on was above zero, if there is a LeakyReLU between them."""
        self.kept_steps: np.ndarray | None = None
        self.output_shapes: list[Shape] = []
        self.penalties: list[np.ndarray] = []
        """Gradients of the penalty on each output."""

    @property
    def pullbacks(self) -> list[Any]:
        """Those of all cells."""
        return [pullback for passage in self.passages for pullback in passage.pullbacks]

    def drop_steps(self, rate: float, sequence: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw which frames are kept, and return the sequence with zeros in place of the others."""
        drawn = TimeDistributionCalculator(rate, sequence.shape[1], seed=rng).calculate_time_distribution()
        self.kept_steps = self.layout.place.bring(drawn.reshape(-1, *(1,) * (sequence.ndim - 2)) != 0)
        return np.where(self.kept_steps, sequence, np.zeros((), sequence.dtype))

    def read_cotangent(self, dy: Any) -> Merged:
        """Return the gradient of the output channels-last, with that of its penalty."""
        shapes, layout = self.output_shapes, self.layout
        if len(shapes) == 2 and dy is not None and not is_pair(dy):
            raise ValueError(
                f"{layout.op}: with merge_mode=None dy must be a pair (forward, backward), got {type(dy).__name__}"
            )
        read = []
        for index, shape in enumerate(shapes):
            part = dy[index] if len(shapes) == 2 and dy is not None else dy
            array = layout.read_like(layout.op, "dy", part, shape, "the shape of the output")
            if self.penalties:
                penalty = layout.read("dy", self.penalties[index], sequence=layout.is_sequence(shape))
                array = penalty if array is None else array + penalty
            read.append(array)
        return tuple(read) if len(shapes) == 2 else read[0]

    def write_input(self, dx: np.ndarray | None) -> Any:
        """Return the gradient of x as the caller's; None stays None."""
        if dx is None:
            return None
        if self.kept_steps is not None:
            dx = np.where(self.kept_steps, dx, np.zeros((), dx.dtype))
        return self._restored(dx)

    def write_states(self, dstates: Sequence[State]) -> list[tuple[Any, ...]] | None:
        """Return the gradients of the initial states, where some were given, as the caller's."""
        if not self.with_state:
            return None
        return [tuple(None if d is None else self._restored(d) for d in state) for state in dstates]

    def _restored(self, array: np.ndarray) -> Any:
        return self.layout.place.restore(self.layout.write(array))
