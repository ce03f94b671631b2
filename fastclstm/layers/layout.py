"""How a caller's sequences and states lie in memory, and the way to (B, T, H, W, C) and (B, H, W, C) and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.place import HOST, Place
from fastclstm.spec import Shape, expect_shape


@dataclass(frozen=True)
class Layout:
    """Which axis of the caller's arrays is which; those of the engines are channels-last, batch first."""

    op: str
    dtype: str
    data_format: str
    time_major: bool = False
    batched: bool = True
    place: Place = HOST
    rank: int = 2
    """Number of axes of a caller's frame without channels; the engines' frames of a single axis have a height of 1."""

    def axes(self, sequence: bool) -> str:
        """Name the axes of a caller's sequence or of a single frame of it."""
        frame = ["depth", "height", "width"][3 - self.rank :]
        frame.insert(0 if self.data_format == "channels_first" else self.rank, "channels")
        leading = [*["batch"] * self.batched, *["time"] * sequence]
        return ", ".join((leading[::-1] if self.time_major else leading) + frame)

    def read(self, name: str, value: Any, *, sequence: bool = False) -> np.ndarray:
        """Return a caller's sequence, frame or state as the engines take it, of the layer's dtype."""
        array = self._engine_axes(name, self.place.read(name, value, self.dtype), sequence)
        return dispatch.native(array, np.dtype(self.dtype))

    def read_shape(self, name: str, shape: Shape, *, sequence: bool = False) -> Shape:
        """Return the shape of what `read` gives for a caller's array of `shape`."""
        self._check_rank(name, shape, sequence)
        return _shape_of(lambda array: self._engine_axes(name, array, sequence), shape)

    def _check_rank(self, name: str, shape: Shape, sequence: bool) -> None:
        rank = self.rank + 1 + self.batched + sequence
        if len(shape) != rank:
            raise ValueError(
                f"{self.op}: {name} must be {rank}D ({self.axes(sequence)}), got {len(shape)}D {shape}"
                + self.hint(rank - len(shape))
            )

    def _engine_axes(self, name: str, array: np.ndarray, sequence: bool) -> np.ndarray:
        self._check_rank(name, array.shape, sequence)
        if not self.batched:
            array = np.expand_dims(array, 1 if self.time_major and sequence else 0)
        if self.time_major and sequence:
            array = array.swapaxes(0, 1)
        if self.data_format == "channels_first":
            array = np.moveaxis(array, 2 if sequence else 1, -1)
        return np.expand_dims(array, -3) if self.rank == 1 else array

    def is_sequence(self, shape: Shape) -> bool:
        """Return whether an engine's array has a time axis."""
        return len(shape) == max(self.rank, 2) + 3

    def write(self, array: np.ndarray) -> np.ndarray:
        """Return an engine's sequence (B, T, H, W, C) or frame (B, H, W, C) as the caller's arrays lie."""
        return dispatch.contiguous(self._arranged(array))

    def shape(self, shape: Shape) -> Shape:
        """Return the shape that `write` gives an array of `shape`."""
        return _shape_of(self._arranged, shape)

    def read_like(self, what: str, name: str, value: Any, shape: Shape, why: str) -> np.ndarray | None:
        """Return a caller's array, or None, as the engines take it, where its shape must be that of an engine's."""
        if value is None:
            return None
        array = self.place.read(name, value, self.dtype)
        expect_shape(what, name, array.shape, self.shape(shape), why)
        return self.read(name, array, sequence=self.is_sequence(shape))

    def read_steps(self, name: str, value: Any, shape: Shape) -> np.ndarray | None:
        """Return a caller's array with one item a step, or None, in the shape (B, T)."""
        if value is None:
            return None
        array = self.place.read(name, value) if dispatch.on_gpu(value) else dispatch.as_numpy(self.op, name, value)
        if self.batched and not self.time_major:
            return array
        theirs, axes = (shape[::-1], "(time, batch)") if self.batched else (shape[1:], "(time,)")
        expect_shape(self.op, name, array.shape, theirs, axes)
        return array.T if self.batched else array.reshape(shape)

    def _arranged(self, array: np.ndarray) -> np.ndarray:
        sequence = self.is_sequence(array.shape)
        if self.rank == 1:
            array = array.squeeze(-3)
        if self.data_format == "channels_first":
            array = np.moveaxis(array, -1, 2 if sequence else 1)
        if self.time_major and sequence:
            array = array.swapaxes(0, 1)
        if not self.batched:
            array = array.squeeze(1 if self.time_major and sequence else 0)
        return array

    def hint(self, missing: int) -> str:
        """Say how to add axes that are missing from a caller's sequence; nothing where none are."""
        if missing < 1:
            return ""
        batch = "x[:, np.newaxis]" if self.time_major else "x[np.newaxis]"
        channel = ", x[..., np.newaxis] for one channel" if self.data_format == "channels_last" else ""
        return f"; add the missing axis: {batch} for a batch of one{channel}"


def _shape_of(arranged: Callable[[np.ndarray], np.ndarray], shape: Shape) -> Shape:
    """Return the shape that an array of `shape` has with its axes arranged otherwise.

    A small array stands for it, as NumPy makes none of 2**63 items and more, be they all the same one.
    """
    tags = tuple(1 if n == 1 else axis + 2 for axis, n in enumerate(shape))
    sizes = {1: 1} | dict(zip(tags, shape, strict=True))
    return tuple(sizes[tag] for tag in arranged(np.broadcast_to(np.zeros(()), tags)).shape)
