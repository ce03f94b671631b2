import math
import re
from functools import partial

import numpy as np
import pytest

from fastclstm.nn import metrics

RNG = np.random.default_rng(0)
CLASSES, LABELS = RNG.random((4, 3, 5)), RNG.integers(0, 5, (4, 3))


def normal(*shape):
    return RNG.standard_normal(shape)


def test_errors():
    x, y = [1.0, 2.0], [1.0, 5.0]
    assert metrics.mse(x, y) == 4.5
    assert metrics.mae(x, y) == 1.5


def direct_ssim(x, y, c1, c2):
    """The paper's formula for one frame, window by window, by means of np.average and np.cov."""
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, np.newaxis] ** 2 + offsets**2) / (2 * 1.5**2))
    values = []
    for i in range(5, x.shape[0] - 5):
        for j in range(5, x.shape[1] - 5):
            a, b = (v[i - 5 : i + 6, j - 5 : j + 6].ravel() for v in (x, y))
            ma, mb = (np.average(v, weights=weights.ravel()) for v in (a, b))
            (va, cov), (_, vb) = np.cov(a, b, aweights=weights.ravel(), ddof=0)
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(values)


def test_ssim_against_the_formula():
    x, y = RNG.random((2, 2, 13, 15, 2))
    y = 0.7 * x + 0.3 * y
    expected = np.mean([direct_ssim(x[b, ..., c], y[b, ..., c], 1e-4, 9e-4) for b in range(2) for c in range(2)])
    assert 0.3 < expected < 0.99
    assert metrics.ssim(x, y) == pytest.approx(expected, rel=1e-12)
    assert metrics.ssim(255 * x, 255 * y, 255) == pytest.approx(expected, rel=1e-12)
    assert metrics.ssim(x, x) == 1


def test_ssim_against_scikit_image():
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    x, y = RNG.random((2, 20, 22))
    expected = structural_similarity(x, y, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert metrics.ssim(x[..., np.newaxis], y[..., np.newaxis]) == pytest.approx(expected, rel=1e-10)


def test_psnr_is_the_mean_over_frames():
    x, y = RNG.random((2, 2, 3, 4, 5, 2))
    expected = np.mean(
        [-10 * math.log10(((a - b) ** 2).mean()) for a, b in zip([*x[0], *x[1]], [*y[0], *y[1]], strict=True)]
    )
    assert metrics.psnr(x, y) == pytest.approx(expected)
    assert metrics.psnr(x, y, 10) == pytest.approx(expected + 20)
    assert metrics.psnr(x, x) == math.inf
    assert math.isnan(metrics.psnr(x[:0], x[:0]))
    with pytest.raises(ValueError, match=re.escape("psnr: prediction must be frames (…, H, W, C), got shape (4, 4)")):
        metrics.psnr(np.ones((4, 4)), np.ones((4, 4)))


def test_accuracy():
    p = [[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.3, 0.3, 0.4]]
    assert metrics.accuracy(p, [1, 1, 2]) == pytest.approx(2 / 3)
    assert metrics.accuracy(p, np.eye(3)[[1, 1, 2]]) == pytest.approx(2 / 3)
    frames = np.array([[0.2, 0.6], [0.7, 0.9]])[..., np.newaxis]
    assert metrics.accuracy(frames, [[0, 1], [0, 1]]) == 0.75
    assert metrics.accuracy(frames, [[[0], [1]], [[0], [1]]]) == 0.75
    assert metrics.accuracy(frames, [[0, 1], [0, 1]], 0.8) == 0.75
    assert metrics.accuracy(frames - 2, [[1, 1], [1, 1]], 0) == 0
    assert math.isnan(metrics.accuracy(np.ones((0, 3)), np.ones(0)))
    assert metrics.accuracy([0.2, 0.7, 0.9, 0.1], [0, 1, 1, 0]) == 1
    assert metrics.accuracy([0.2, 0.7, 0.9, 0.1], [1, 1, 1, 0], 0.8) == 0.5
    assert metrics.accuracy([0.2, 0.7, 0.1], 1) == 1  # one sample's classes
    assert math.isnan(metrics.accuracy(np.ones(0), np.ones(0)))


@pytest.mark.keras
def test_accuracy_of_one_axis_against_keras(keras):
    p, t = RNG.random(50), RNG.integers(0, 2, 50)
    assert metrics.accuracy(p, t) == pytest.approx(keras.metrics.binary_accuracy(t, p).numpy().mean())


def test_scores_by_hand():
    prediction = [0.0, 1.0, 5.0, 9.0, 5.0]
    target = [0.0, 2.0, 0.0, 9.0, math.nan]
    thresholds = [1, 5, 10]
    np.testing.assert_allclose(metrics.csi(prediction, target, thresholds), [2 / 3, 1 / 2, math.nan])
    np.testing.assert_allclose(metrics.pod(prediction, target, thresholds), [1, 1, math.nan])
    np.testing.assert_allclose(metrics.far(prediction, target, thresholds), [1 / 3, 1 / 2, math.nan])
    assert metrics.far(prediction, target, 5) == 0.5
    assert isinstance(metrics.far(prediction, target, 5), float)
    assert math.isnan(metrics.far(prediction, target, 10))


def test_scores_count_every_pair_once():
    p, t = normal(2, 3, 8, 8, 1), normal(2, 3, 8, 8, 1)
    levels = np.array([[-1.0, 0.0], [0.5, 1.0]])
    csi, pod, far = (f(p, t, levels) for f in (metrics.csi, metrics.pod, metrics.far))
    assert csi.shape == levels.shape
    for index, level in np.ndenumerate(levels):
        pairs = list(zip(p.ravel() >= level, t.ravel() >= level, strict=True))
        hits, misses, false = pairs.count((True, True)), pairs.count((False, True)), pairs.count((True, False))
        assert csi[index] == hits / (hits + misses + false)
        assert pod[index] == hits / (hits + misses)
        assert far[index] == false / (hits + false)


@pytest.mark.parametrize("metric", [metrics.csi, metrics.pod, metrics.far])
@pytest.mark.parametrize("thresholds", [None, 1.0, [0.0, 1.5, 9.0], [[0.5], [-1.0]]])
def test_counts_of_batches_make_the_score_of_all(metric, thresholds):
    p, t = normal(7, 4, 4, 1), normal(7, 4, 4, 1)
    t[0], p[0], t[1, 0] = -9, -9, math.nan  # the first has no event at all
    if thresholds is not None:
        metric = partial(metric, thresholds=thresholds)
    counts, quotient = metrics.counted(metric)
    summed = sum(counts(p[b : b + 2], t[b : b + 2]) for b in range(0, 7, 2)) + counts(p[:1], t[:1])
    assert isinstance(summed, np.ndarray)
    assert summed.dtype.kind == "i"
    expected = metric(p, t)
    assert type(quotient(summed)) is type(expected)
    np.testing.assert_array_equal(quotient(summed), expected)
    np.testing.assert_array_equal(quotient(summed.tolist()), expected)
    with np.errstate(all="raise"):
        assert np.isnan(quotient((0 * summed).tolist())).all()


def test_fractions_of_batches_make_the_score_of_all():
    p, t = normal(7, 6, 5, 1), normal(7, 6, 5, 1)
    t[1, 0] = math.nan
    seen = RNG.random((7, 6, 5)) < 0.8
    sums, quotient = metrics.counted(partial(metrics.fss, thresholds=[0.0, 9.0], scale=3))
    summed = sum(sums(p[b : b + 2], t[b : b + 2], valid=seen[b : b + 2]) for b in range(0, 7, 2))
    score = quotient(summed.tolist())
    assert 0 < score[0] < 1
    assert np.isnan(score[1])
    assert score[0] == pytest.approx(metrics.fss(p, t, 0.0, 3, valid=seen), rel=1e-12)
    filled = np.where(seen[..., None] & ~np.isnan(t), t, -9), np.where(seen[..., None] & ~np.isnan(t), p, -9)
    assert score[0] == pytest.approx(metrics.fss(*filled[::-1], 0.0, 3), rel=1e-12)
    for wrong, words in (((p[0, 0], t[0, 0]), "must be frames"), ((p, t, 0.5, 0), "scale must be the side")):
        with pytest.raises(ValueError, match=words):
            metrics.fss(*wrong)


def test_metrics_that_are_means():
    class Own:
        __hash__ = None

        def __call__(self, prediction, target):
            return 0.0

    for metric in (*(metrics.get(n) for n in ("mse", "ssim", "psnr", "accuracy")), Own(), partial(metrics.mse),
                   partial(metrics.csi, [1.0]), lambda p, t: metrics.csi(p, t)):  # fmt: skip
        assert metrics.counted(metric) is None


def test_what_is_not_valid_is_left_out():
    p, t = RNG.random((2, 4, 3, 12, 13, 2))
    valid = np.ones((4, 3, 12, 13), bool)
    valid[0], valid[1, 1], valid[2, :, 2, 3] = False, False, False
    holes = np.where(valid[..., None], t, math.nan)
    error = np.where(valid[..., None], p - t, 0)
    assert metrics.mse(p, holes, valid=valid) == pytest.approx(np.square(error[valid]).mean())
    assert metrics.mae(p, holes, valid=valid) == pytest.approx(np.abs(error[valid]).mean())
    lost = np.where(valid[..., None], p, math.nan)
    for name in ("mse", "mae", "psnr", "csi"):
        assert metrics.get(name)(lost, holes, valid=valid) == metrics.get(name)(p, holes, valid=valid)
    with pytest.raises(TypeError, match=r"prediction is a masked array, .*filled\(np.nan\)"):
        metrics.mse(np.ma.masked_invalid(lost), t)
    for name in ("csi", "pod", "far"):
        assert metrics.get(name)(p, holes, valid=valid) == metrics.get(name)(p[valid], t[valid])
        assert metrics.get(name)(p, t, valid=valid) == metrics.get(name)(p[valid], t[valid])
    whole = np.array([[False] * 3, [True, False, True], [True] * 3, [False] * 3])
    for name in ("psnr", "ssim", "mse"):
        metric = metrics.get(name)
        assert metric(p, t, valid=whole) == pytest.approx(metric(p[whole], t[whole]))
        assert metric(p, t, valid=np.ones_like(whole)) == pytest.approx(metric(p, t))
        assert math.isnan(metric(p, t, valid=0 * whole))
    right, labels = CLASSES.argmax(-1), LABELS
    kept = np.array([True, False, True, False])
    assert metrics.accuracy(CLASSES, labels, valid=kept) == (right == labels)[kept].mean()
    assert metrics.accuracy(CLASSES[..., :1], labels > 1, valid=kept[:, None, None]) == (
        metrics.accuracy(CLASSES[kept][..., :1], labels[kept] > 1))  # fmt: skip
    with pytest.raises(ValueError, match=r"csi: valid has shape \(3,\) but its axes must be the first ones of"):
        metrics.csi(p, t, valid=np.ones(3))


def test_ssim_leaves_out_windows_that_see_what_is_not_valid():
    p, t = RNG.random((2, 1, 14, 16, 1))
    valid = np.ones((1, 14, 16), bool)
    valid[0, :, 15] = False  # the last column: all windows but the rightmost are left
    holes = np.where(valid[..., None], t, math.nan)
    expected = pytest.approx(metrics.ssim(p[:, :, :15], t[:, :, :15]))
    for made in (p, np.where(valid[..., None], p, math.nan)):
        assert metrics.ssim(made, holes, valid=valid) == expected
    with pytest.raises(ValueError, match="SSIMLoss: prediction must be"):
        metrics.ssim(p[:, :4], t[:, :4], valid=valid[:, :4])


def test_labels_of_classes_may_have_an_axis_of_one():
    assert metrics.accuracy(CLASSES, LABELS[..., None]) == metrics.accuracy(CLASSES, LABELS)


def test_which_metrics_know_what_is_valid():
    assert all(map(metrics.knows_valid, metrics.TABLE.values()))
    assert metrics.knows_valid(partial(metrics.csi, thresholds=[1.0]))
    assert not metrics.knows_valid(np.vdot)


def test_a_value_at_the_threshold_is_an_event_in_either_dtype():
    for dtype in ("float32", "float64"):
        assert metrics.csi(np.array([0.7], dtype), np.array([0.7], dtype), 0.7) == 1


def test_shapes_that_do_not_fit():
    for name in ("mse", "mae", "psnr", "csi", "pod", "far"):
        with pytest.raises(ValueError, match=re.escape("target has shape (2, 4, 4, 1) but must be (1, 4, 4, 1)")):
            metrics.get(name)(np.ones((1, 4, 4, 1)), np.ones((2, 4, 4, 1)))
    with pytest.raises(ValueError, match=re.escape("accuracy: target has shape (3,) but must be that of the predict")):
        metrics.accuracy(np.ones((2, 3)), np.ones(3))
    with pytest.raises(TypeError, match="csi: target must be an array of real numbers"):
        metrics.csi([1.0], [1j])


def test_get():
    for name, function in metrics.TABLE.items():
        assert metrics.get(name) is function is getattr(metrics, name)
    assert metrics.get(np.vdot) is np.vdot
    with pytest.raises(
        ValueError, match="unknown metric 'r2'; known are mse, mae, ssim, psnr, accuracy, csi, pod, far"
    ):
        metrics.get("r2")
    with pytest.raises(TypeError, match=re.escape("or a function of (prediction, target), got 3")):
        metrics.get(3)
