"""Pooling over all pixels of frames or volumes, or over everything between batch and channels."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np

from fastclstm.layers.array_layer import ArrayLayer, Pullback
from fastclstm.spec import DATA_FORMATS, Shape, choice, flag


@dataclass(eq=False, repr=False)
class GlobalPooling(ArrayLayer):
    """The options of all global poolings."""

    data_format: str = "channels_last"
    _: KW_ONLY
    keep_dims: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(type(self).__name__, "data_format", self.data_format, DATA_FORMATS)
        flag(type(self).__name__, "keep_dims", self.keep_dims)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return the shape of the output for an x of `input_shape`; raise ValueError where that does not fit."""
        axes = self._axes(input_shape)
        if any(input_shape[axis] < 1 for axis in axes):
            raise ValueError(f"{type(self).__name__}: x of shape {tuple(input_shape)} has no pixels")
        return tuple(1 if axis in axes else n for axis, n in enumerate(input_shape)
                     if self.keep_dims or axis not in axes)  # fmt: skip

    def _axes(self, shape: Sequence[int]) -> Shape:
        """Return the axes that are pooled over; raise ValueError where `shape` does not fit."""
        raise NotImplementedError


@dataclass(eq=False, repr=False)
class _Between(GlobalPooling):
    """Pooling over all between batch and channels."""

    _: KW_ONLY
    channel_axis: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        if self.channel_axis is not None:
            try:
                self.channel_axis = operator.index(self.channel_axis)
            except TypeError:
                raise TypeError(f"{op}: channel_axis must be an integer or None, got {self.channel_axis!r}") from None

    def _axes(self, shape: Sequence[int]) -> Shape:
        """Return the axes between batch and channels."""
        rank, first = len(shape), self.data_format == "channels_first"
        given = self.channel_axis
        axis = given if given is not None else -3 if first else -1
        if rank < 3 or (given is None and first and rank not in (4, 5)) or not -rank < axis < rank or axis == 0:
            axes = "(batch, …, channels) with at least one axis between"
            if given is not None:
                axes = f"of at least 3 axes, the first that of the batch and channel_axis={given} another one"
            elif first:
                axes = ("(batch, channels, height, width) or (batch, time, channels, height, width), or, with "
                        "channel_axis=1, (batch, channels, time, height, width)")  # fmt: skip
            raise ValueError(f"{type(self).__name__}: x must be {axes}; got {rank}D {tuple(shape)}")
        return tuple(other for other in range(1, rank) if other != axis % rank)


@dataclass(eq=False, repr=False)
class _OfFrames(GlobalPooling):
    """Pooling over the pixels of frames (B, H, W, C), or of sequences of them, frame by frame."""

    def _axes(self, shape: Sequence[int]) -> Shape:
        if len(shape) not in (4, 5):
            axes = "channels, height, width" if self.data_format == "channels_first" else "height, width, channels"
            raise ValueError(f"{type(self).__name__}: x must be (batch, {axes}) or (batch, time, {axes}), got "
                             f"{len(shape)}D {tuple(shape)}")  # fmt: skip
        last = len(shape) - (self.data_format == "channels_last")
        return (last - 2, last - 1)


@dataclass(eq=False, repr=False)
class _OfVolumes(GlobalPooling):
    """Pooling over the pixels of volumes (B, T, H, W, C)."""

    def _axes(self, shape: Sequence[int]) -> Shape:
        first = self.data_format == "channels_first"
        if len(shape) != 5:
            axes = "channels, time, height, width" if first else "time, height, width, channels"
            raise ValueError(f"{type(self).__name__}: x must be (batch, {axes}), got {len(shape)}D {tuple(shape)}")
        return (2, 3, 4) if first else (1, 2, 3)


@dataclass(eq=False, repr=False)
class _Mean(GlobalPooling):
    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        axes = self._axes(x.shape)
        y = x.mean(axes, keepdims=True, dtype=np.result_type(x, np.float64)).astype(x.dtype)
        count = math.prod(x.shape[axis] for axis in axes)
        return y.reshape(self.output_shape(x.shape)), lambda dy: np.ascontiguousarray(
            np.broadcast_to(dy.reshape(y.shape) / count, x.shape)
        )


@dataclass(eq=False, repr=False)
class _Largest(GlobalPooling):
    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        axes = self._axes(x.shape)
        behind = tuple(range(-len(axes), 0))
        last = np.moveaxis(x, axes, behind)
        flat = last.reshape(*last.shape[: -len(axes)], math.prod(last.shape[-len(axes) :]))
        winner = flat.argmax(-1)[..., np.newaxis]

        def pullback(dy: np.ndarray) -> np.ndarray:
            dflat = np.zeros(flat.shape, dy.dtype)
            np.put_along_axis(dflat, winner, dy.reshape(winner.shape), -1)
            return np.ascontiguousarray(np.moveaxis(dflat.reshape(last.shape), behind, axes))

        return np.take_along_axis(flat, winner, -1).reshape(self.output_shape(x.shape)), pullback


@dataclass(eq=False, repr=False)
class GlobalAveragePooling(_Between, _Mean):
    """Mean over all axes between batch and channels: (B, …, C) to (B, C).

    Parameters
    ----------
    data_format : "channels_last" or "channels_first"
        The latter: frames (B, C, H, W) and sequences of them (B, T, C, H, W).
    keep_dims : bool
        Keep those axes, with size 1.
    channel_axis : int, optional
        Where the channels are, whatever data_format says: 1 for the channels-first volumes (B, C, T, H, W) of Conv3D
        and MaxPooling3D.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> GlobalAveragePooling()(np.arange(8.0).reshape(1, 2, 2, 2))
    array([[3., 4.]])
    """


@dataclass(eq=False, repr=False)
class GlobalMaxPooling(_Between, _Largest):
    """Maximum over all axes between batch and channels: (B, …, C) to (B, C).

    NaN wins; of equal values the first takes the gradient.

    Parameters
    ----------
    data_format, keep_dims, channel_axis
        As in `GlobalAveragePooling`.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> GlobalMaxPooling()(np.arange(8.0).reshape(1, 2, 2, 2))
    array([[6., 7.]])
    """


@dataclass(eq=False, repr=False)
class GlobalAveragePooling2D(_OfFrames, _Mean):
    """Mean over the pixels of frames: (B, H, W, C) to (B, C), or of sequences, frame by frame, to (B, T, C).

    Parameters
    ----------
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, H, W) and (B, T, C, H, W).
    keep_dims : bool
        Keep the axes that are pooled over, with size 1.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> GlobalAveragePooling2D()(np.zeros((2, 5, 4, 4, 3))).shape
    (2, 5, 3)
    """


@dataclass(eq=False, repr=False)
class GlobalAveragePooling3D(_OfVolumes, _Mean):
    """Mean over time, height and width: (B, T, H, W, C) to (B, C).

    Parameters
    ----------
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, T, H, W), other than layers of frames, whose sequences are (B, T, C, H, W).
    keep_dims : bool
        Keep the axes that are pooled over, with size 1.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> GlobalAveragePooling3D()(np.zeros((2, 5, 4, 4, 3))).shape
    (2, 3)
    """


@dataclass(eq=False, repr=False)
class GlobalMaxPooling2D(_OfFrames, _Largest):
    """Maximum over the pixels of frames: (B, H, W, C) to (B, C), or of sequences, frame by frame, to (B, T, C).

    Parameters
    ----------
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, H, W) and (B, T, C, H, W).
    keep_dims : bool
        Keep the axes that are pooled over, with size 1.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> GlobalMaxPooling2D()(np.zeros((2, 5, 4, 4, 3))).shape
    (2, 5, 3)
    """


@dataclass(eq=False, repr=False)
class GlobalMaxPooling3D(_OfVolumes, _Largest):
    """Maximum over time, height and width: (B, T, H, W, C) to (B, C).

    Parameters
    ----------
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, T, H, W), other than layers of frames, whose sequences are (B, T, C, H, W).
    keep_dims : bool
        Keep the axes that are pooled over, with size 1.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> GlobalMaxPooling3D()(np.zeros((2, 5, 4, 4, 3))).shape
    (2, 3)
    """
