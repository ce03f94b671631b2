"""Normalization of groups of channels, each sample by itself."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm.layers.array_layer import Pullback
from fastclstm.layers.normalization import Affine, moments, pull_moments
from fastclstm.spec import DATA_FORMATS, Shape, choice, integers


@dataclass(eq=False, repr=False)
class GroupNormalization(Affine):
    """``gamma · (x − mean) / sqrt(variance + epsilon) + beta``, each group of channels of each sample by itself.

    Mean and variance are over the channels of a group and all axes but the batch's: of a sequence (B, T, H, W, C) over
    all steps too, as in Keras; TimeDistributed(GroupNormalization(…)) normalizes frame by frame. PyTorch's GroupNorm
    has epsilon=1e-5.

    Parameters
    ----------
    num_features : int
        C, the size of the channel axis.
    groups : int
        Divisor of C; 1 normalizes all channels together, C (or -1) each by itself.
    axis : int
        Which axis holds the channels.
    epsilon : float
        Above 0.
    center, scale : bool
        Have beta, have gamma: one value a channel.
    data_format : "channels_last" or "channels_first"
        The latter is ``axis=-3``: frames (B, C, H, W) and sequences of them (B, T, C, H, W). For volumes
        (B, C, T, H, W) give ``axis=1``.
    beta_initializer, gamma_initializer, beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint, \
dtype, seed
        As in `BatchNormalization`.

    Attributes
    ----------
    gamma, beta : array (C,) or None

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    References
    ----------
    Wu & He, "Group Normalization", ECCV 2018.

    Examples
    --------
    >>> GroupNormalization(2, groups=1)([[[1.0, 3.0]]]).round(2)
    array([[[-1.,  1.]]], dtype=float32)
    """

    num_features: int
    groups: int = 32
    _: KW_ONLY
    axis: int = -1
    epsilon: float = 1e-3
    center: bool = True
    scale: bool = True
    beta_initializer: Any = "zeros"
    gamma_initializer: Any = "ones"
    beta_regularizer: Any = None
    gamma_regularizer: Any = None
    beta_constraint: Any = None
    gamma_constraint: Any = None
    data_format: str = "channels_last"
    dtype: Any = "float32"
    seed: int | np.random.Generator | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        (self.num_features,) = integers(op, "num_features", self.num_features, 1, 1)
        choice(op, "data_format", self.data_format, DATA_FORMATS)
        try:
            self.axis = operator.index(self.axis)
        except TypeError:
            raise TypeError(f"{op}: axis must be an integer, got {self.axis!r}") from None
        if self.data_format == "channels_first" and self.axis not in (-1, -3):
            raise ValueError(f"{op}: data_format='channels_first' is axis=-3, got axis={self.axis}; give one of them")
        (self.groups,) = integers(op, "groups", self.groups, 1, -1)
        if self.groups == 0 or self.num_features % self._count:
            raise ValueError(f"{op}: groups must divide the {self.num_features} channels or be -1, got {self.groups}")
        self._add_affine((self.num_features,), np.random.default_rng(self.seed))

    @property
    def _count(self) -> int:
        return self.num_features if self.groups == -1 else self.groups

    @property
    def _channel_axis(self) -> int:
        return self.axis if self.data_format == "channels_last" else -3

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return `input_shape`; raise ValueError where that does not fit."""
        axis, shape = self._channel_axis, tuple(input_shape)
        if not (len(shape) >= 2 and -len(shape) < axis < len(shape) and axis) or shape[axis] != self.num_features:
            raise ValueError(
                f"{type(self).__name__}: x must have at least 2 axes and {self.num_features} channels on axis {axis}, "
                f"as num_features and data_format={self.data_format!r} or axis say, got shape {shape}; where the "
                f"channels are on another axis give axis=…, such as axis=1 for (batch, channels, time, height, width)"
            )
        return shape

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        B, C, groups = len(x), self.num_features, self._count
        by_channel = np.moveaxis(x, self._channel_axis, 1)
        size = math.prod(by_channel.shape[2:])

        def grouped(array: np.ndarray) -> np.ndarray:
            """Return an array of x's shape with a row for each group of each sample."""
            by_group = np.moveaxis(array, self._channel_axis, 1)
            return by_group.reshape(B * groups, C // groups * size)

        def by_pixel(rows: np.ndarray) -> np.ndarray:
            return rows.reshape(B, C, size).swapaxes(1, 2).reshape(B * size, C)

        def from_pixels(array: np.ndarray) -> np.ndarray:
            return array.reshape(B, size, C).swapaxes(1, 2)

        def restored(by_sample: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(np.moveaxis(by_sample.reshape(by_channel.shape), 1, self._channel_axis))

        rows = grouped(x)
        mean, variance = moments(rows, 1)
        inverse = 1 / np.sqrt(variance + x.dtype.type(self.epsilon))
        normal = (rows - mean) * inverse
        y, pull = self._affine(by_pixel(normal))

        def pullback(dy: np.ndarray) -> np.ndarray:
            dnormal = from_pixels(pull(by_pixel(grouped(dy)))).reshape(rows.shape)
            return restored(pull_moments(dnormal, normal, inverse, 1))

        return restored(from_pixels(y)), pullback


@dataclass(eq=False, repr=False)
class InstanceNormalization(GroupNormalization):
    """`GroupNormalization` of every channel by itself: ``groups=-1``.

    PyTorch's InstanceNorm2d has epsilon=1e-5 and, unless affine=True, neither gamma nor beta: center=False,
    scale=False.

    Parameters
    ----------
    num_features, axis, epsilon, center, scale, data_format, beta_initializer, gamma_initializer, beta_regularizer, \
gamma_regularizer, beta_constraint, gamma_constraint, dtype, seed
        As in `GroupNormalization`.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    References
    ----------
    Ulyanov, Vedaldi & Lempitsky, "Instance Normalization", arXiv:1607.08022 (2016).

    Examples
    --------
    >>> InstanceNormalization(1)([[[1.0], [3.0]]]).ravel().round(2)
    array([-1.,  1.], dtype=float32)
    """

    groups: int = -1

    def __post_init__(self) -> None:
        if self.groups != -1:
            raise ValueError(f"InstanceNormalization: groups must be -1, each channel by itself, got {self.groups}; "
                             f"use GroupNormalization")  # fmt: skip
        super().__post_init__()
