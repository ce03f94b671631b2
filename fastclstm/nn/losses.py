"""Losses: how far a prediction is from its target, as one number, and the gradient of that, by name, as Keras 3.

``loss(prediction, target)`` is a mean over all values. float64 predictions are computed as they are, others in float32;
means are taken in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fastclstm.nn import Options, activations, is_number, look_up
from fastclstm.spec import choice, expect_shape, refuse_masked

Pullback = Callable[[np.ndarray], np.ndarray]

_TINY = 1e-7
"""Probabilities are kept this far from 0 and 1."""

_sigmoid = activations.get("sigmoid").forward


class Loss:
    """A loss: called on a prediction and its target it returns a number, `gradient` the derivative of that."""

    def __call__(self, prediction: Any, target: Any, sample_weight: Any = None) -> float:
        """Return the loss.

        Parameters
        ----------
        prediction : array (B, …)
        target : array
            Of the same shape (of `SparseCategoricalCrossentropy`: without the last axis). Nothing is broadcast.
        sample_weight : array, optional
            Factors of the values before their mean, which still divides by how many there are. Its axes are the
            first of the values': (B,) weighs samples, (B, T) frames, (B, T, H, W) pixels; an axis of length 1 is
            repeated. Where it is 0 the target is not looked at: it may be NaN there, or a label out of range.

        Raises
        ------
        ValueError
            Shapes that do not fit together, labels out of range (NaN is none: it makes the loss NaN).
        TypeError
            Arrays that are not of real numbers.
        """
        values, _ = self._evaluate(*self._checked(prediction, self._looked_at(target, sample_weight)))
        return _mean(values * self._weights(sample_weight, values))

    def gradient(self, prediction: Any, target: Any, sample_weight: Any = None) -> np.ndarray:
        """Return the gradient of the loss by the prediction, of its shape; parameters are those of the loss."""
        return self.value_and_gradient(prediction, target, sample_weight)[1]

    def value_and_gradient(self, prediction: Any, target: Any, sample_weight: Any = None) -> tuple[float, np.ndarray]:
        """Return the loss and its gradient, whose work they share; parameters are those of the loss."""
        values, pullback = self._evaluate(*self._checked(prediction, self._looked_at(target, sample_weight)))
        weights = self._weights(sample_weight, values)
        scale = (weights / max(1, values.size)).astype(values.dtype)
        return _mean(values * weights), pullback(np.broadcast_to(scale, values.shape))

    def _evaluate(self, prediction: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, Pullback]:
        """Return the values that the loss is the mean of, and what turns their gradient into the prediction's."""
        raise NotImplementedError

    def _checked(self, prediction: Any, target: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return both as arrays of the dtype computed in."""
        op = type(self).__name__
        p, t = real_array(op, "prediction", prediction), real_array(op, "target", target)
        expect_shape(op, "target", t.shape, p.shape, "that of the prediction; nothing is broadcast")
        return p, t.astype(p.dtype, copy=False)

    def _looked_at(self, target: Any, sample_weight: Any) -> Any:
        """Return the target with 0 in place of what weighs nothing."""
        if sample_weight is None:
            return target
        op = type(self).__name__
        return without(real_array(op, "target", target), real_array(op, "sample_weight", sample_weight))

    def _weights(self, sample_weight: Any, values: np.ndarray) -> np.ndarray:
        """Return the weights with as many axes as the values."""
        if sample_weight is None:
            return np.ones((), values.dtype)
        op = type(self).__name__
        weights = real_array(op, "sample_weight", sample_weight)
        leading = values.shape[: weights.ndim]
        if len(leading) < weights.ndim or any(n not in (1, m) for n, m in zip(weights.shape, leading, strict=True)):
            raise ValueError(
                f"{op}: sample_weight has shape {weights.shape} but its axes must be the first ones of {values.shape}, "
                f"or of length 1"
            )
        if not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise ValueError(f"{op}: sample_weight must be finite and not negative")
        return weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim)).astype(values.dtype)


@dataclass(frozen=True)
class MeanSquaredError(Options, Loss):
    """Mean of ``(prediction - target)²``.

    Examples
    --------
    >>> loss = MeanSquaredError()
    >>> loss([1.0, 2.0], [1.0, 4.0])
    2.0
    >>> loss.gradient([1.0, 2.0], [1.0, 4.0])
    array([ 0., -2.])
    """

    def _evaluate(self, prediction: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, Pullback]:
        error = prediction - target
        return error * error, lambda scale: 2 * error * scale


@dataclass(frozen=True)
class MeanAbsoluteError(Options, Loss):
    """Mean of ``|prediction - target|``; where the two are equal its gradient is 0."""

    def _evaluate(self, prediction: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, Pullback]:
        error = prediction - target
        return np.abs(error), lambda scale: np.sign(error) * scale


@dataclass(frozen=True)
class Huber(Options, Loss):
    """Half the squared error up to `delta`, and linear beyond: Huber, Ann. Math. Statist. 35 (1964)."""

    delta: float = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("delta", 0, inclusive=False)

    def _evaluate(self, prediction: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, Pullback]:
        error = prediction - target
        slope = np.clip(error, -self.delta, self.delta)
        return slope * (error - slope / 2), lambda scale: slope * scale


@dataclass(frozen=True)
class BinaryCrossentropy(Options, Loss):
    """Mean of ``-t log p - (1 - t) log(1 - p)`` for targets t between 0 and 1.

    Parameters
    ----------
    from_logits : bool
        Predictions are logits, p = σ(prediction), computed without overflow. Else they are probabilities and clipped
        to [1e-7, 1 - 1e-7], beyond which their gradient is 0.
    label_smoothing : float
        s between 0 and 1: targets become ``(1 - s) t + s / 2``.
    """

    from_logits: bool = False
    label_smoothing: float = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("BinaryCrossentropy", "from_logits", self.from_logits, (False, True))
        self._check_number("label_smoothing", 0, 1)

    def _evaluate(self, prediction: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, Pullback]:
        _check_labels(self, target)
        target = target * (1 - self.label_smoothing) + self.label_smoothing / 2
        if self.from_logits:
            values = np.maximum(prediction, 0) - prediction * target + np.log1p(np.exp(-np.abs(prediction)))
            return values, lambda scale: (_sigmoid(prediction) - target) * scale
        p = np.clip(prediction, _TINY, 1 - _TINY)
        values = -target * np.log(p) - (1 - target) * np.log1p(-p)
        return values, lambda scale: np.where(p == prediction, (p - target) / (p * (1 - p)), 0) * scale


@dataclass(frozen=True)
class CategoricalCrossentropy(Options, Loss):
    """Mean of ``-sum(t log p)`` over the last axis, that of the classes, for targets t such as one-hot vectors.

    Parameters
    ----------
    from_logits : bool
        Predictions are logits, p = softmax(prediction), computed without overflow. Else they are probabilities,
        divided by their sum and clipped to [1e-7, 1 - 1e-7].
    label_smoothing : float
        s between 0 and 1: targets become ``(1 - s) t + s / classes``.
    """

    from_logits: bool = False
    label_smoothing: float = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("CategoricalCrossentropy", "from_logits", self.from_logits, (False, True))
        self._check_number("label_smoothing", 0, 1)

    def _evaluate(self, prediction: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, Pullback]:
        classes = _count_classes(self, prediction)
        _check_labels(self, target)
        target = target * (1 - self.label_smoothing) + self.label_smoothing / classes
        return _crossentropy(prediction, target, self.from_logits)


@dataclass(frozen=True)
class SparseCategoricalCrossentropy(Options, Loss):
    """`CategoricalCrossentropy` for targets that are the classes' numbers, from 0: (B,) for predictions (B, classes).

    Or, as Keras takes them too, (B, 1).

    Examples
    --------
    >>> round(SparseCategoricalCrossentropy()([[0.5, 0.25, 0.25]], [1]), 4)
    1.3863
    """

    from_logits: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("SparseCategoricalCrossentropy", "from_logits", self.from_logits, (False, True))

    def _checked(self, prediction: Any, target: Any) -> tuple[np.ndarray, np.ndarray]:
        op = "SparseCategoricalCrossentropy"
        p, labels = real_array(op, "prediction", prediction), real_array(op, "target", target)
        classes = _count_classes(self, p)
        if labels.shape == (*p.shape[:-1], 1):
            labels = labels[..., 0]
        expect_shape(op, "target", labels.shape, p.shape[:-1], "that of the prediction without the axis of the classes")
        wrong = labels[(labels < 0) | (labels >= classes) | (np.floor(labels) < labels)]
        if wrong.size:
            raise ValueError(f"{op}: target must hold the classes 0 to {classes - 1}, got {wrong[0]:g}")
        labels = labels[..., np.newaxis]
        return p, np.where(labels == np.arange(classes), 1, 0 * labels).astype(p.dtype)  # NaN stays NaN

    def _evaluate(self, prediction: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, Pullback]:
        return _crossentropy(prediction, target, self.from_logits)


@dataclass(frozen=True)
class SSIMLoss(Options, Loss):
    """One minus the mean structural similarity of frames (…, H, W, C), channel by channel.

    Means, variances and covariances are those of Gaussian windows that lie wholly in the frame, so at least `window`
    pixels high and wide; they are computed in float64.

    Parameters
    ----------
    max_value : float
        The range of the data: 1 or 255, say.
    window : int
        Size of the window.
    sigma : float
        Standard deviation of its weights.
    k1, k2 : float
        What keeps the quotients away from 0 / 0, as shares of `max_value`.

    Notes
    -----
    Wang, Bovik, Sheikh & Simoncelli, "Image quality assessment: from error visibility to structural similarity", IEEE
    Trans. Image Process. 13 (2004), eq. 13.

    Examples
    --------
    >>> frames = np.random.default_rng(0).random((2, 16, 16, 1))
    >>> SSIMLoss()(frames, frames)
    0.0
    """

    max_value: float = 1
    window: int = 11
    sigma: float = 1.5
    k1: float = 0.01
    k2: float = 0.03

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_value", "sigma", "k1", "k2"):
            self._check_number(name, 0, inclusive=False)
        self._check_integer("window", 1)

    def whole_windows(self, valid: np.ndarray) -> np.ndarray:
        """Return which windows see valid pixels alone, of an array of bool (…, H, W, C)."""
        windows = np.lib.stride_tricks.sliding_window_view(valid, (self.window, self.window), (-3, -2))
        return np.all(windows, axis=(-2, -1))

    def _evaluate(self, prediction: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, Pullback]:
        if prediction.ndim < 3 or min(prediction.shape[-3:-1]) < self.window:
            raise ValueError(
                f"SSIMLoss: prediction must be (…, H, W, C) with frames of at least {self.window}×{self.window} "
                f"pixels, got shape {prediction.shape}; give a smaller window"
            )
        x, y = (np.moveaxis(frames, -1, -3).astype(np.float64) for frames in (prediction, target))
        rows, columns = (_window_matrix(n, self.window, self.sigma) for n in x.shape[-2:])
        mean_x, mean_y, xx, yy, xy = (rows @ a @ columns.T for a in (x, y, x * x, y * y, x * y))
        c1, c2 = (self.k1 * self.max_value) ** 2, (self.k2 * self.max_value) ** 2
        a1, a2 = 2 * mean_x * mean_y + c1, 2 * (xy - mean_x * mean_y) + c2
        b1, b2 = mean_x**2 + mean_y**2 + c1, (xx - mean_x**2) + (yy - mean_y**2) + c2
        similarity = a1 * a2 / (b1 * b2)

        def pullback(scale: np.ndarray) -> np.ndarray:
            by_similarity = -np.moveaxis(scale, -1, -3)
            by_mean = 2 * mean_y * (a2 - a1) / (b1 * b2) + 2 * mean_x * similarity * (1 / b2 - 1 / b1)
            by_mean, by_xx, by_xy = (
                rows.T @ (by_similarity * slope) @ columns for slope in (by_mean, -similarity / b2, 2 * a1 / (b1 * b2))
            )
            return np.moveaxis(by_mean + 2 * x * by_xx + y * by_xy, -3, -1).astype(prediction.dtype)

        return np.moveaxis(1 - similarity, -3, -1), pullback


@dataclass(frozen=True)
class WeightedSum(Options, Loss):
    """Several losses, each times its weight: mean squared error alone, for one, makes blurred forecasts.

    Parameters
    ----------
    losses : sequence of str or Loss
    weights : sequence of float
        As many, none negative.

    Examples
    --------
    >>> WeightedSum(("mse", "mae"), (1, 0.5))([1.0, 2.0], [1.0, 4.0])
    2.5
    """

    losses: Any
    weights: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.losses, tuple) or not self.losses:
            self._refuse("losses", "several losses, ('mse', 'ssim') say")
        object.__setattr__(self, "losses", tuple(map(get, self.losses)))
        count = len(self.losses)
        if not (isinstance(self.weights, tuple) and len(self.weights) == count and
                all(is_number(weight) and weight >= 0 for weight in self.weights)):  # fmt: skip
            self._refuse("weights", f"{count} finite numbers >= 0, one a loss")

    def __call__(self, prediction: Any, target: Any, sample_weight: Any = None) -> float:
        """Return the loss."""
        values = [loss(prediction, target, sample_weight) for loss in self.losses]
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))

    def value_and_gradient(self, prediction: Any, target: Any, sample_weight: Any = None) -> tuple[float, np.ndarray]:
        """Return the loss and its gradient."""
        parts = [loss.value_and_gradient(prediction, target, sample_weight) for loss in self.losses]
        value = sum(weight * part for weight, (part, _) in zip(self.weights, parts, strict=True))
        return value, sum(weight * gradient for weight, (_, gradient) in zip(self.weights, parts, strict=True))


class _Functions(Loss):
    """A caller's own pair of functions."""

    def __init__(self, value: Callable[..., Any], gradient: Callable[..., Any]):
        self._functions = value, gradient

    def __call__(self, prediction: Any, target: Any, sample_weight: Any = None) -> float:
        if sample_weight is not None:
            raise ValueError("loss: sample_weight goes with the losses of fastclstm.nn.losses, not with own functions")
        value = np.asarray(self._functions[0](prediction, target))
        if value.size != 1:
            raise ValueError(f"the loss must return one number, got an array of shape {value.shape}; take its mean")
        return float(value.reshape(()))

    def value_and_gradient(self, prediction: Any, target: Any, sample_weight: Any = None) -> tuple[float, np.ndarray]:
        value = self(prediction, target, sample_weight)
        p = real_array("loss", "prediction", prediction)
        gradient = np.asarray(self._functions[1](prediction, target), p.dtype)
        expect_shape("loss", "gradient", gradient.shape, p.shape, "that of the prediction")
        return value, gradient


def real_array(op: str, name: str, value: Any) -> np.ndarray:
    """Return `value` as a native array: float64 as it is, other real numbers as float32."""
    refuse_masked(op, name, value, "np.nan")
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{op}: {name} must be an array of real numbers, got dtype {array.dtype}")
    double = array.dtype.kind == "f" and array.dtype.itemsize >= 8
    return array.astype(np.float64 if double else np.float32, copy=False)


def without(target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return `target` with 0 wherever `weights`, whose axes are its first ones, are 0; itself where they are of others.

    Examples
    --------
    >>> without(np.array([[1.0, np.nan], [3.0, 4.0]]), np.array([0, 1]))
    array([[0., 0.],
           [3., 4.]])
    """
    fits = weights.ndim <= target.ndim and all(n in (1, m) for n, m in zip(weights.shape, target.shape, strict=False))
    if not fits or weights.all():
        return target
    kept = weights.reshape(weights.shape + (1,) * (target.ndim - weights.ndim)) != 0
    return np.where(kept, target, target.dtype.type(0))


def class_weights(loss: Loss, target: Any, weights: Mapping[int, float]) -> np.ndarray:
    """Return the factor of each of the loss's values by the class of its target; that of a class not named is 1.

    Raises
    ------
    ValueError
        A loss that is not one of classes.

    Examples
    --------
    >>> class_weights(SparseCategoricalCrossentropy(), [2, 0, 1], {2: 5.0, 1: 0.5})
    array([5. , 1. , 0.5])
    """
    labels = real_array("class_weight", "target", target)
    if isinstance(loss, CategoricalCrossentropy):
        labels = labels.argmax(-1)
    elif isinstance(loss, SparseCategoricalCrossentropy):
        labels = labels[..., 0] if labels.ndim > 1 and labels.shape[-1] == 1 else labels
    elif isinstance(loss, BinaryCrossentropy):
        labels = np.round(labels)
    else:
        raise ValueError(f"class_weight is for the crossentropies, not for {type(loss).__name__}; give sample_weight")
    factors = np.ones(labels.shape)
    for label, factor in weights.items():
        factors[labels == label] = factor
    return factors


def _mean(values: np.ndarray) -> float:
    """Return the mean in float64; of nothing it is 0, as in Keras."""
    return float(values.sum(dtype=np.float64) / max(1, values.size))


def _check_labels(loss: Loss, target: np.ndarray) -> None:
    if ((target < 0) | (target > 1)).any():
        raise ValueError(
            f"{type(loss).__name__}: target must lie between 0 and 1, got values from {np.nanmin(target):g} to "
            f"{np.nanmax(target):g}; scale it"
        )


def _count_classes(loss: Loss, prediction: np.ndarray) -> int:
    if prediction.ndim == 0 or prediction.shape[-1] < 2:
        raise ValueError(
            f"{type(loss).__name__}: prediction must have two or more classes on its last axis, got shape "
            f"{prediction.shape}; for one value a sample take BinaryCrossentropy"
        )
    return prediction.shape[-1]


def _crossentropy(prediction: np.ndarray, target: np.ndarray, from_logits: bool) -> tuple[np.ndarray, Pullback]:
    if from_logits:
        shifted = prediction - prediction.max(-1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        slope = np.exp(log_p) * target.sum(-1, keepdims=True) - target
    else:
        total = prediction.sum(-1, keepdims=True)
        p = prediction / total
        clipped = np.clip(p, _TINY, 1 - _TINY)
        log_p = np.log(clipped)
        by_p = np.where(p == clipped, -target / clipped, 0)
        slope = (by_p - (by_p * p).sum(-1, keepdims=True)) / total
    return -(target * log_p).sum(-1), lambda scale: slope * scale[..., np.newaxis]


@lru_cache(maxsize=16)
def _window_matrix(size: int, window: int, sigma: float) -> np.ndarray:
    """Return the matrix (size - window + 1, size) that takes Gaussian means along an axis; its transpose spreads."""
    weights = np.exp(-0.5 * ((np.arange(window) - (window - 1) / 2) / sigma) ** 2)
    matrix = np.zeros((size - window + 1, size))
    for start, row in enumerate(matrix):
        row[start : start + window] = weights / weights.sum()
    matrix.flags.writeable = False
    return matrix


TABLE: dict[str, Loss] = {
    "mse": MeanSquaredError(),
    "mean_squared_error": MeanSquaredError(),
    "mae": MeanAbsoluteError(),
    "mean_absolute_error": MeanAbsoluteError(),
    "huber": Huber(),
    "binary_crossentropy": BinaryCrossentropy(),
    "categorical_crossentropy": CategoricalCrossentropy(),
    "sparse_categorical_crossentropy": SparseCategoricalCrossentropy(),
    "ssim": SSIMLoss(),
}
"""The losses by name."""


def get(spec: Any) -> Loss:
    """Return the loss that `spec` means: a name, a `Loss`, or a pair of functions of (prediction, target).

    The first of the pair returns the loss, a number, the second its gradient, an array of the prediction's shape.

    Raises
    ------
    ValueError
        An unknown name; when called, a loss of more than one number or a gradient of another shape.
    TypeError
        Anything else.

    Examples
    --------
    >>> get("mae")([1.0, 2.0], [1.0, 4.0])
    1.0
    """
    if isinstance(spec, Loss):
        return spec
    if isinstance(spec, str):
        return look_up("loss", TABLE, spec)
    if isinstance(spec, tuple | list) and len(spec) == 2 and all(map(callable, spec)):
        return _Functions(*spec)
    hint = "; a loss alone has no gradient to train with: give (loss, gradient)" if callable(spec) else ""
    raise TypeError(
        f"a loss must be a name ({', '.join(TABLE)}), a Loss or a pair of functions (loss, gradient), got "
        f"{spec!r}{hint}"
    )
