"""What the layers share that turn one array into one array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.base import Layer
from fastclstm.layers.place import place_of
from fastclstm.spec import Shape, expect_shape

Pullback = Callable[[np.ndarray], Any]
"""Takes dy, the gradient of a layer's output, and returns dx."""

_SPATIAL = {2: "height, width", 3: "time, height, width"}


@dataclass(eq=False, repr=False)
class ArrayLayer(Layer):
    """A layer of one array in and one array out; a subclass has `output_shape` and `_apply`."""

    def forward(self, x: Any, training: bool = False) -> Any:
        """Return the layer's output, of `output_shape` of x's shape, as x's kind of array.

        Where the layer changes no value (Flatten, dropout without training, "linear") that may be x itself or a view.

        Parameters
        ----------
        x : array
            Any real dtype. Computed in the layer's `dtype`, where it has one; else in float64 where x is, in float32
            where not.
        training : bool
            Compute as training does, and keep what `backward` needs: x too, uncopied, which is not to change until
            then.

        Raises
        ------
        ValueError
            A shape that does not fit the layer.
        TypeError
            Anything but real arrays; one on a GPU, where the layer does not compute there or is of another dtype.
        """
        op, dtype = type(self).__name__, getattr(self, "dtype", None)
        place = place_of(self, x, training)
        array = place.read("x", x, dtype)
        shape = self.output_shape(array.shape)
        computed = np.dtype(dtype or dispatch.working_dtype(array))
        self._pullback = None
        y, pull = self._apply(dispatch.native(array, computed), training)

        def pullback(dy: Any) -> Any:
            cotangent = place.read("dy", dy, computed)
            expect_shape(op, "dy", cotangent.shape, shape, "the shape of the output")
            return place.restore(pull(dispatch.native(cotangent, computed)))

        if training:
            self._pullback = pullback
        return place.restore(y)

    def backward(self, dy: Any) -> Any:
        """Return dx of the last call, which was a training call, given dy of its output's shape.

        Raises
        ------
        RuntimeError
            The last call was not a training call.
        ValueError
            dy has not the output's shape.
        """
        return self._recorded()(dy)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return the shape of the output for an x of `input_shape`; raise ValueError where that does not fit."""
        raise NotImplementedError

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        """Return the output for a C-contiguous x of the dtype computed in, and its pullback."""
        raise NotImplementedError


@dataclass(eq=False, repr=False)
class FrameLayer(ArrayLayer):
    """An `ArrayLayer` on frames (B, H, W, C) or, frame by frame, on sequences (B, T, H, W, C).

    A subclass has the option `data_format`, `_frame_shape`, from (H, W, C) to that of the output, and `_frames`.
    """

    _rank: ClassVar[int] = 2

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return the shape of the output for an x of `input_shape`; raise ValueError where that does not fit."""
        first = self._data_format == "channels_first"
        self._check_rank(input_shape)
        leading, item = input_shape[: -self._rank - 1], input_shape[-self._rank - 1 :]
        *sizes, F = self._frame_shape((*item[1:], item[0]) if first else tuple(item))
        return (*leading, F, *sizes) if first else (*leading, *sizes, F)

    def _check_rank(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless `shape` has as many axes as the layer takes."""
        if len(shape) not in ((4, 5) if self._rank == 2 else (5,)):
            sizes = _SPATIAL[self._rank]
            axes = f"channels, {sizes}" if self._data_format == "channels_first" else f"{sizes}, channels"
            sequences = f" or (batch, time, {axes})" if self._rank == 2 else ""
            raise ValueError(
                f"{type(self).__name__}: x must be (batch, {axes}){sequences}, got {len(shape)}D {tuple(shape)}"
            )

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        leading = x.shape[: -self._rank - 1]
        y, pull = self._frames(self._fold(x), training)

        def unfold(frames: np.ndarray) -> np.ndarray:
            array = frames.reshape(*leading, *frames.shape[1:])
            if self._data_format == "channels_first":
                array = np.moveaxis(array, -1, -self._rank - 1)
            return dispatch.contiguous(array)

        def pullback(dy: np.ndarray) -> np.ndarray | None:
            dx = pull(self._fold(dy))
            return None if dx is None else unfold(dx)

        return unfold(y), pullback

    def _fold(self, array: np.ndarray) -> np.ndarray:
        """Return an array in the layer's data format as channels-last frames (N, H, W, C)."""
        if self._data_format == "channels_first":
            array = dispatch.contiguous(np.moveaxis(array, -self._rank - 1, -1))
        count = int(np.prod(array.shape[: -self._rank - 1]))
        return array.reshape(count, *array.shape[-self._rank - 1 :])

    @property
    def _data_format(self) -> str:
        return self.options["data_format"]

    def _frame_shape(self, frame: Shape) -> Shape:
        """Return (HO, WO, F) for frames (H, W, C)."""
        raise NotImplementedError

    def _frames(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        """Return the output for frames (N, H, W, C), and its pullback."""
        raise NotImplementedError


@dataclass(eq=False, repr=False)
class VolumeLayer(FrameLayer):
    """The same on volumes (B, T, H, W, C), or channels-first (B, C, T, H, W): its frames are (T, H, W, C)."""

    _rank = 3
