"""Metrics: how good a prediction is, as numbers for people, by name.

All take `valid`, an array of bool whose axes are the first ones of the target: where it is False, neither target nor
prediction is looked at, and nothing is counted. Where nothing is left, a mean is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from fastclstm.nn import look_up
from fastclstm.nn.losses import Loss, MeanAbsoluteError, MeanSquaredError, SSIMLoss, real_array, without
from fastclstm.spec import expect_shape

Metric = Callable[[Any, Any], Any]


def mse(prediction: Any, target: Any, *, valid: Any = None) -> float:
    """Return the mean squared error of two arrays of one shape."""
    return _of_loss(MeanSquaredError(), prediction, target, valid)


def mae(prediction: Any, target: Any, *, valid: Any = None) -> float:
    """Return the mean absolute error of two arrays of one shape."""
    return _of_loss(MeanAbsoluteError(), prediction, target, valid)


def ssim(prediction: Any, target: Any, max_value: float = 1, *, valid: Any = None) -> float:
    """Return the mean structural similarity of frames (…, H, W, C), 1 for equal ones; see `SSIMLoss`.

    Windows that see what is not valid are left out.
    """
    loss = SSIMLoss(max_value)
    if valid is None or min(np.shape(prediction)[-3:-1], default=0) < loss.window:  # which is an error
        return 1 - loss(prediction, target)
    p, t = _pair("ssim", prediction, target)
    seen = _seen("ssim", valid, t.shape)
    p, t = (np.where(seen, array, array.dtype.type(0)) for array in (p, t))
    return 1 - _of_loss(loss, p, t, loss.whole_windows(seen))


def psnr(prediction: Any, target: Any, max_value: float = 1, *, valid: Any = None) -> float:
    """Return the peak signal-to-noise ratio in dB, the mean over all frames (…, H, W, C); Inf where two are equal.

    Examples
    --------
    >>> round(psnr(np.full((2, 4, 4, 1), 0.1), np.zeros((2, 4, 4, 1))), 6)
    20.0
    """
    p, t = _pair("psnr", prediction, target)
    if p.ndim < 3:
        raise ValueError(f"psnr: prediction must be frames (…, H, W, C), got shape {p.shape}")
    seen = _seen("psnr", valid, t.shape)
    counts = np.count_nonzero(seen, (-3, -2, -1))
    errors = np.square(p - t).sum((-3, -2, -1), np.float64, where=seen)[counts > 0] / counts[counts > 0]
    with np.errstate(divide="ignore"):
        return _mean(10 * np.log10(max_value**2 / errors))


def accuracy(prediction: Any, target: Any, threshold: float = 0.5, *, valid: Any = None) -> float:
    """Return the share of right answers; which are right is told by the shapes.

    Parameters
    ----------
    prediction : array (…, C), or (B,)
        Probabilities or logits: of C classes, or with C = 1 of one event; (B,) for a target (B,) is (B, 1), as in the
        binary accuracy of Keras.
    target : array
        With C = 1, (…, 1) or (…): the event happened where above 0.5, and is foretold where the prediction is above
        `threshold` (0 for logits). With C > 1, (…) or (…, 1): the numbers of the classes; or (…, C): one-hot vectors;
        foretold is the class with the largest prediction.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        Shapes that do not fit together.

    Examples
    --------
    >>> accuracy([[0.1, 0.9], [0.8, 0.2]], [1, 1])
    0.5
    """
    p, t = real_array("accuracy", "prediction", prediction), real_array("accuracy", "target", target)
    if t.ndim == p.ndim > 1 and t.shape[-1] == 1:
        t = t[..., 0]
    if p.ndim == 0 or t.shape not in (p.shape, p.shape[:-1]):
        raise ValueError(
            f"accuracy: target has shape {t.shape} but must be that of the prediction {p.shape}, or that without the "
            f"last axis"
        )
    if p.ndim == t.ndim == 1:
        p = p[:, np.newaxis]
    if p.shape[-1] == 1:
        right = (p[..., 0] > threshold) == (t.reshape(p.shape[:-1]) > 0.5)
    else:
        right = p.argmax(-1) == (t.argmax(-1) if t.ndim == p.ndim else t)
    return _mean(right if valid is None else right[_seen("accuracy", valid, right.shape)])


def csi(prediction: Any, target: Any, thresholds: Any = 0.5, *, valid: Any = None) -> Any:
    """Return the critical success index: hits / (hits + misses + false alarms).

    Parameters
    ----------
    prediction, target : array
        Of one shape. An event is a value >= the threshold; where the target is NaN, nothing is counted.
    thresholds : float or sequence of float
        In the units of the data, such as rain rates.

    Returns
    -------
    float or array of float64
        One for each threshold, NaN where it is 0 / 0: without an event, seen or foretold.

    Notes
    -----
    Schaefer, "The critical success index as an indicator of warning skill", Weather Forecast. 5 (1990).

    Examples
    --------
    >>> csi([0.0, 1.0, 5.0, 9.0], [0.0, 2.0, 0.0, 9.0], thresholds=[1, 5, 10])
    array([0.66666667, 0.5       ,        nan])
    """
    return _csi(_contingencies("csi", prediction, target, thresholds, valid=valid))


def pod(prediction: Any, target: Any, thresholds: Any = 0.5, *, valid: Any = None) -> Any:
    """Return the probability of detection, hits / (hits + misses), NaN without an event seen; else as `csi`."""
    return _pod(_contingencies("pod", prediction, target, thresholds, valid=valid))


def far(prediction: Any, target: Any, thresholds: Any = 0.5, *, valid: Any = None) -> Any:
    """Return the false alarm ratio, false alarms / (hits + false alarms), NaN without an event foretold; else as `csi`.

    The less, the better.
    """
    return _far(_contingencies("far", prediction, target, thresholds, valid=valid))


def fss(prediction: Any, target: Any, thresholds: Any = 0.5, scale: int = 9, *, valid: Any = None) -> Any:
    """Return the fractions skill score: how far the shares of events in windows of pixels agree, from 0 to 1.

    A forecast that has the event a few pixels away is not as wrong as one that has none.

    Parameters
    ----------
    prediction, target : array (…, H, W, C)
        Frames of one shape; see `csi` for events. What is missing or not valid is no event in either.
    thresholds : float or sequence of float
    scale : int
        Side of the windows in pixels, around every pixel; outside of the frame there is no event.

    Returns
    -------
    float or array of float64
        Over all frames together: one less the quotient of two sums. NaN where there is no event, seen or foretold.

    Raises
    ------
    ValueError
        No frames, other shapes, a scale that is no number of pixels.

    Notes
    -----
    Roberts & Lean, "Scale-selective verification of rainfall accumulations from high-resolution forecasts of convective
    events", Mon. Weather Rev. 136 (2008), eq. 5 to 7.

    Examples
    --------
    >>> a, b = np.zeros((2, 5, 5, 1))
    >>> a[2, 1], b[2, 2] = 1, 1
    >>> fss(a, b, scale=1), round(fss(a, b, scale=3), 6)
    (0.0, 0.666667)
    """
    return _fss(_fractions("fss", prediction, target, thresholds, scale, valid=valid))


def counted(metric: Metric) -> tuple[Metric, Callable[[Any], Any]] | None:
    """Return what makes a metric of counts, which several batches share, or None for one that is a mean.

    Parameters
    ----------
    metric : function
        Those of counts are `csi`, `pod`, `far` and `fss`, also in a `functools.partial` with their options by name.

    Returns
    -------
    tuple of two functions, or None
        The first returns of (prediction, target) an array to be summed over the batches; the second makes of the sum
        what the metric returns for all batches together.

    Examples
    --------
    >>> counts, quotient = counted(csi)
    >>> quotient(counts([1.0, 0.0], [1.0, 1.0]) + counts([0.0], [0.0]))
    0.5
    """
    known, options = (metric.func, metric.keywords) if isinstance(metric, partial) and not metric.args else (metric, {})
    for function, quotient in ((csi, _csi), (pod, _pod), (far, _far)):
        if known is function:
            return partial(_contingencies, function.__name__, **options), quotient
    return (partial(_fractions, "fss", **options), _fss) if known is fss else None


def knows_valid(metric: Metric) -> bool:
    """Whether a metric is one of this module, which all take `valid`, also in a `functools.partial`."""
    whole = metric.func if isinstance(metric, partial) else metric
    return any(whole is known for known in TABLE.values())


def _of_loss(loss: Loss, prediction: Any, target: Any, valid: Any) -> float:
    """Return the mean of a loss's values where they are valid; its own mean divides by the number of all."""
    if valid is None:
        return loss(prediction, target)
    weights, made = np.asarray(valid, bool), real_array(type(loss).__name__, "prediction", prediction)
    return loss(without(made, weights), target, weights) / weights.mean() if weights.any() else float("nan")


def _seen(op: str, valid: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return `valid` in the shape of the values that it is of."""
    if valid is None:
        return np.ones(shape, bool)
    seen = np.asarray(valid, bool)
    if seen.ndim > len(shape) and seen.shape[len(shape) :] == (1,) * (seen.ndim - len(shape)):
        seen = seen.reshape(seen.shape[: len(shape)])
    if seen.ndim > len(shape) or any(n not in (1, m) for n, m in zip(seen.shape, shape, strict=False)):
        raise ValueError(f"{op}: valid has shape {seen.shape} but its axes must be the first ones of {shape}, or of "
                         f"length 1")  # fmt: skip
    return np.broadcast_to(seen.reshape(seen.shape + (1,) * (len(shape) - seen.ndim)), shape)


def _pair(op: str, prediction: Any, target: Any) -> tuple[np.ndarray, np.ndarray]:
    p, t = real_array(op, "prediction", prediction), real_array(op, "target", target)
    expect_shape(op, "target", t.shape, p.shape, "that of the prediction; nothing is broadcast")
    return p, t


def _contingencies(op: str, prediction: Any, target: Any, thresholds: Any = 0.5, *, valid: Any = None) -> np.ndarray:
    """Count hits, misses and false alarms: (3, *the thresholds' shape)."""
    p, t = _pair(op, prediction, target)
    levels = np.asarray(thresholds, float)
    seen = _seen(op, valid, t.shape) & ~np.isnan(t)
    counts = np.empty((3, levels.size), np.int64)
    for count, level in zip(counts.T, levels.ravel().tolist(), strict=True):
        foretold, happened = (p >= level) & seen, (t >= level) & seen
        count[0] = np.count_nonzero(foretold & happened)
        count[1] = np.count_nonzero(happened) - count[0]
        count[2] = np.count_nonzero(foretold) - count[0]
    return counts.reshape(3, *levels.shape)


def _fractions(
    op: str, prediction: Any, target: Any, thresholds: Any = 0.5, scale: int = 9, *, valid: Any = None
) -> np.ndarray:
    """Return the sums of squared differences, and of squares, of the shares of events: (2, *the thresholds' shape)."""
    p, t = _pair(op, prediction, target)
    if p.ndim < 3:
        raise ValueError(f"{op}: prediction must be frames (…, H, W, C), got shape {p.shape}")
    if isinstance(scale, bool) or not isinstance(scale, int | np.integer) or scale < 1:
        raise ValueError(f"{op}: scale must be the side of a window in pixels, an integer >= 1, got {scale!r}")
    levels = np.asarray(thresholds, float)
    seen = _seen(op, valid, t.shape) & ~np.isnan(t)
    sums = np.empty((2, levels.size))
    for pair, level in zip(sums.T, levels.ravel().tolist(), strict=True):
        foretold, happened = (_shares((frames >= level) & seen, int(scale)) for frames in (p, t))
        pair[0] = np.square(foretold - happened).sum()
        pair[1] = np.square(foretold).sum() + np.square(happened).sum()
    return sums.reshape(2, *levels.shape)


def _shares(events: np.ndarray, scale: int) -> np.ndarray:
    """Return the share of events (…, H, W, C) in the window around each pixel; outside of a frame there is none."""
    counts = events.astype(np.int64)
    for axis in (-3, -2):
        before = np.zeros_like(counts.take([0], axis))
        sums = np.moveaxis(np.concatenate([before, counts.cumsum(axis)], axis), axis, 0)
        n = len(sums) - 1
        first = np.arange(n) - scale // 2
        counts = np.moveaxis(sums[np.clip(first + scale, 0, n)] - sums[np.clip(first, 0, n)], 0, axis)
    return counts / scale**2


def _fss(sums: Any) -> Any:
    differences, whole = np.asarray(sums)
    return 1 - _quotient(differences, whole)


def _csi(counts: Any) -> Any:
    hits, misses, false_alarms = np.asarray(counts)
    return _quotient(hits, hits + misses + false_alarms)


def _pod(counts: Any) -> Any:
    hits, misses, _ = np.asarray(counts)
    return _quotient(hits, hits + misses)


def _far(counts: Any) -> Any:
    hits, _, false_alarms = np.asarray(counts)
    return _quotient(false_alarms, hits + false_alarms)


def _quotient(part: np.ndarray, whole: np.ndarray) -> Any:
    with np.errstate(invalid="ignore"):
        result = part / whole
    return result if np.ndim(result) else float(result)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


TABLE: dict[str, Metric] = {
    "mse": mse,
    "mae": mae,
    "ssim": ssim,
    "psnr": psnr,
    "accuracy": accuracy,
    "csi": csi,
    "pod": pod,
    "far": far,
    "fss": fss,
}
"""The metrics by name."""


def get(spec: Any) -> Metric:
    """Return the metric that `spec` means: a name or a function of (prediction, target).

    Raises
    ------
    ValueError
        An unknown name.
    TypeError
        Anything else.

    Examples
    --------
    >>> get("mae")([1.0], [3.0])
    2.0
    """
    if isinstance(spec, str):
        return look_up("metric", TABLE, spec)
    if callable(spec):
        return spec
    raise TypeError(f"a metric must be a name ({', '.join(TABLE)}) or a function of (prediction, target), got {spec!r}")
