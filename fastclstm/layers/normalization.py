"""Normalization between layers: over the batch, or over the last axes of each sample."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm.layers.array_layer import ArrayLayer, Pullback
from fastclstm.layers.base import Parameter, layer_dtype
from fastclstm.nn import is_number
from fastclstm.spec import DATA_FORMATS, Shape, choice, flag, integers


@dataclass(eq=False, repr=False)
class Affine(ArrayLayer):
    """What both have: a normalized x̂ becomes ``gamma · x̂ + beta``."""

    gamma = Parameter()
    beta = Parameter()

    def _add_affine(self, shape: Shape, rng: np.random.Generator) -> None:
        """Check the options that both have, and add gamma and beta of `shape`."""
        op, options = type(self).__name__, self.options
        if not (is_number(options["epsilon"]) and options["epsilon"] > 0):
            raise ValueError(f"{op}: epsilon must be a number > 0, got {options['epsilon']!r}")
        flag(op, "center", options["center"])
        flag(op, "scale", options["scale"])
        self.dtype = layer_dtype(op, options["dtype"])
        for name, wanted in (("gamma", options["scale"]), ("beta", options["center"])):
            if wanted:
                self._add_parameter(name, shape, options[f"{name}_initializer"], rng, self.dtype,
                                    regularizer=options[f"{name}_regularizer"],
                                    constraint=options[f"{name}_constraint"])  # fmt: skip

    def _affine(self, normal: np.ndarray) -> tuple[np.ndarray, Pullback]:
        """Return ``gamma · normal + beta`` for rows (N, features), and a pullback that keeps the gradients."""
        gamma, beta = self.gamma, self.beta
        y = normal.copy() if gamma is None else normal * gamma.reshape(-1)
        if beta is not None:
            y += beta.reshape(-1)

        def pullback(dy: np.ndarray) -> np.ndarray:
            gradients = {}
            if gamma is not None:
                gradients["gamma"] = _sum(dy * normal, 0).reshape(gamma.shape)
            if beta is not None:
                gradients["beta"] = _sum(dy, 0).reshape(beta.shape)
            self._keep_gradients(gradients)
            return dy if gamma is None else dy * gamma.reshape(-1)

        return y, pullback


@dataclass(eq=False, repr=False)
class BatchNormalization(Affine):
    """``gamma · (x − mean) / sqrt(variance + epsilon) + beta``, each channel over all samples, steps and pixels.

    While training, mean and (biased) variance are the batch's, and the moving values come nearer to them:
    ``moving = momentum · moving + (1 − momentum) · batch``. Else, and where `trainable` is False, they are the moving
    values. An empty batch changes nothing. All as in Keras.

    Parameters
    ----------
    num_features : int
        C, the size of the channel axis.
    axis : int
        Which axis holds the channels.
    momentum : float
        Between 0 and 1.
    epsilon : float
        Above 0.
    center, scale : bool
        Have beta, have gamma.
    beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer : str or function
        As `fastclstm.nn.initializers.get` takes them.
    beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint : optional
        As `fastclstm.nn.regularizers.get` and `fastclstm.nn.constraints.get` take them.
    data_format : "channels_last" or "channels_first"
        The latter is ``axis=-3``: frames (B, C, H, W) and sequences of them (B, T, C, H, W). For the volumes
        (B, C, T, H, W) of Conv3D and MaxPooling3D give ``axis=1``.
    dtype : "float32" or "float64"
        Of parameters and results; inputs are converted to it.
    seed : int or numpy.random.Generator, optional
        The same seed gives the same parameters, where an initializer draws them.

    Attributes
    ----------
    gamma, beta : array (C,) or None
    moving_mean, moving_variance : array (C,)
        Without gradients, and in files like all parameters.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    References
    ----------
    Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    ICML 2015.

    Examples
    --------
    >>> import numpy as np
    >>> layer = BatchNormalization(1)
    >>> layer(np.array([[1.0], [3.0]]), training=True).ravel().round(2)
    array([-1.,  1.], dtype=float32)
    >>> layer.moving_mean
    array([0.02], dtype=float32)
    """

    num_features: int
    _: KW_ONLY
    axis: int = -1
    momentum: float = 0.99
    epsilon: float = 1e-3
    center: bool = True
    scale: bool = True
    beta_initializer: Any = "zeros"
    gamma_initializer: Any = "ones"
    moving_mean_initializer: Any = "zeros"
    moving_variance_initializer: Any = "ones"
    beta_regularizer: Any = None
    gamma_regularizer: Any = None
    beta_constraint: Any = None
    gamma_constraint: Any = None
    data_format: str = "channels_last"
    dtype: Any = "float32"
    seed: int | np.random.Generator | None = None

    moving_mean = Parameter()
    moving_variance = Parameter()

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "BatchNormalization"
        (self.num_features,) = integers(op, "num_features", self.num_features, 1, 1)
        choice(op, "data_format", self.data_format, DATA_FORMATS)
        try:
            self.axis = operator.index(self.axis)
        except TypeError:
            raise TypeError(f"{op}: axis must be an integer, got {self.axis!r}") from None
        if self.data_format == "channels_first" and self.axis not in (-1, -3):
            raise ValueError(f"{op}: data_format='channels_first' is axis=-3, got axis={self.axis}; give one of them")
        if not (is_number(self.momentum) and 0 <= self.momentum <= 1):
            raise ValueError(f"{op}: momentum must be a number in [0, 1], got {self.momentum!r}")
        shape = (self.num_features,)
        rng = np.random.default_rng(self.seed)
        self._add_affine(shape, rng)
        self._add_parameter("moving_mean", shape, self.moving_mean_initializer, rng, self.dtype, statistic=True)
        self._add_parameter("moving_variance", shape, self.moving_variance_initializer, rng, self.dtype, statistic=True)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return `input_shape`; raise ValueError where that does not fit."""
        axis, shape = self._channel_axis, tuple(input_shape)
        if not (len(shape) >= 2 and -len(shape) <= axis < len(shape)) or shape[axis] != self.num_features:
            raise ValueError(
                f"BatchNormalization: x must have at least 2 axes and {self.num_features} channels on axis {axis}, as "
                f"num_features and data_format={self.data_format!r} or axis say, got shape {shape}; where the channels "
                f"are on another axis give axis=…, such as axis=1 for (batch, channels, time, height, width)"
            )
        return shape

    @property
    def _channel_axis(self) -> int:
        return self.axis if self.data_format == "channels_last" else -3

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        by_channel = np.moveaxis(x, self._channel_axis, -1)
        rows = by_channel.reshape(x.size // self.num_features, self.num_features)
        of_batch = training and self.trainable and len(rows) > 0
        mean, variance = moments(rows, 0) if of_batch else (self.moving_mean, self.moving_variance)
        if of_batch:
            new, old = 1 - self.momentum, self.momentum
            self.moving_mean = old * self.moving_mean + new * mean
            self.moving_variance = old * self.moving_variance + new * variance
        inverse = 1 / np.sqrt(variance + x.dtype.type(self.epsilon))
        normal = (rows - mean) * inverse
        y, pull = self._affine(normal)

        def restored(array: np.ndarray) -> np.ndarray:
            back = np.moveaxis(array.reshape(by_channel.shape), -1, self._channel_axis)
            return np.ascontiguousarray(back)

        def pullback(dy: np.ndarray) -> np.ndarray:
            dnormal = pull(np.moveaxis(dy, self._channel_axis, -1).reshape(rows.shape))
            return restored(pull_moments(dnormal, normal, inverse, 0) if of_batch else dnormal * inverse)

        return restored(y), pullback


@dataclass(eq=False, repr=False)
class LayerNormalization(Affine):
    """``gamma · (x − mean) / sqrt(variance + epsilon) + beta``, each sample over its last axes.

    Parameters
    ----------
    shape : int or tuple of int
        Sizes of the last axes, those normalized over: ``C`` for the channels of every pixel, ``(H, W, C)`` for whole
        frames.
    epsilon : float
        Above 0.
    center, scale : bool
        Have beta, have gamma: one value for each element of `shape`.
    beta_initializer, gamma_initializer, beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint, \
dtype, seed
        As in `BatchNormalization`.

    Attributes
    ----------
    gamma, beta : array of `shape` or None

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    References
    ----------
    Ba, Kiros & Hinton, "Layer Normalization", arXiv:1607.06450 (2016).

    Examples
    --------
    >>> LayerNormalization(2)([[1.0, 3.0]]).round(2)
    array([[-1.,  1.]], dtype=float32)
    """

    shape: Any
    _: KW_ONLY
    epsilon: float = 1e-3
    center: bool = True
    scale: bool = True
    beta_initializer: Any = "zeros"
    gamma_initializer: Any = "ones"
    beta_regularizer: Any = None
    gamma_regularizer: Any = None
    beta_constraint: Any = None
    gamma_constraint: Any = None
    dtype: Any = "float32"
    seed: int | np.random.Generator | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.shape) if isinstance(self.shape, tuple) else 1
        if count == 0:
            raise ValueError("LayerNormalization: shape must name at least one axis, got ()")
        self.shape = integers("LayerNormalization", "shape", self.shape, count, 1)
        self._add_affine(self.shape, np.random.default_rng(self.seed))

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return `input_shape`; raise ValueError where that does not fit."""
        if tuple(input_shape[-len(self.shape) :]) != self.shape:
            raise ValueError(f"LayerNormalization: x must end in the axes {self.shape}, got shape {tuple(input_shape)}")
        return tuple(input_shape)

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        features = int(np.prod(self.shape))
        rows = x.reshape(x.size // features, features)
        mean, variance = moments(rows, 1)
        inverse = 1 / np.sqrt(variance + x.dtype.type(self.epsilon))
        normal = (rows - mean) * inverse
        y, pull = self._affine(normal)
        return y.reshape(x.shape), lambda dy: pull_moments(pull(dy.reshape(rows.shape)), normal, inverse, 1).reshape(
            x.shape
        )


def moments(rows: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and biased variance over an axis: (features,) over axis 0, (N, 1) over axis 1."""
    mean = _sum(rows, axis) / rows.dtype.type(rows.shape[axis])
    return mean, _sum(np.square(rows - mean), axis) / rows.dtype.type(rows.shape[axis])


def pull_moments(dnormal: np.ndarray, normal: np.ndarray, inverse: np.ndarray, axis: int) -> np.ndarray:
    """Pull dnormal back through ``normal = (x − mean(x)) / sqrt(variance(x) + epsilon)``: section 3 of Ioffe & Szegedy.

    The mean and the variance of x over the axis depend on x too, which takes the part along 1 and along normal away.
    """
    count = normal.dtype.type(normal.shape[axis])
    along_one, along_normal = _sum(dnormal, axis) / count, _sum(dnormal * normal, axis) / count
    return (dnormal - along_one - normal * along_normal) * inverse


def _sum(rows: np.ndarray, axis: int) -> np.ndarray:
    """Sum in float64, as float32 would lose digits over many rows: (features,) over axis 0, (N, 1) over axis 1."""
    precise = np.result_type(rows, np.float64)
    return rows.sum(axis, dtype=precise, keepdims=axis == 1).astype(rows.dtype)
