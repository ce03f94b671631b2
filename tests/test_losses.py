import math
import re
import warnings

import numpy as np
import pytest

from fastclstm.nn import losses
from fastclstm.nn.described import describe, restore
from fastclstm.nn.losses import (
    BinaryCrossentropy,
    CategoricalCrossentropy,
    Huber,
    MeanAbsoluteError,
    MeanSquaredError,
    SparseCategoricalCrossentropy,
    SSIMLoss,
    WeightedSum,
)

RNG = np.random.default_rng(0)
FRAMES = RNG.random((2, 3, 12, 13, 2))
CLASSES = RNG.uniform(0.02, 0.98, (4, 3, 5))
LABELS = RNG.integers(0, 5, (4, 3))
ONE_HOT = np.eye(5)[LABELS]

CASES = [
    (MeanSquaredError(), RNG.standard_normal((4, 3, 5)), RNG.standard_normal((4, 3, 5))),
    (MeanAbsoluteError(), RNG.standard_normal((4, 3, 5)), RNG.standard_normal((4, 3, 5))),
    (Huber(0.7), RNG.standard_normal((4, 3, 5)), RNG.standard_normal((4, 3, 5))),
    (BinaryCrossentropy(), CLASSES, RNG.random((4, 3, 5))),
    (BinaryCrossentropy(label_smoothing=0.2), CLASSES, ONE_HOT),
    (BinaryCrossentropy(True, 0.1), 5 * RNG.standard_normal((4, 3, 5)), ONE_HOT),
    (CategoricalCrossentropy(), CLASSES, ONE_HOT),
    (CategoricalCrossentropy(label_smoothing=0.2), CLASSES, ONE_HOT),
    (CategoricalCrossentropy(True, 0.1), 5 * RNG.standard_normal((4, 3, 5)), ONE_HOT),
    (CategoricalCrossentropy(True), RNG.standard_normal((4, 3, 5)), RNG.random((4, 3, 5))),
    (SparseCategoricalCrossentropy(), CLASSES, LABELS),
    (SparseCategoricalCrossentropy(True), 5 * RNG.standard_normal((4, 3, 5)), LABELS),
    (SSIMLoss(), FRAMES, RNG.random(FRAMES.shape)),
    (WeightedSum(("mse", SSIMLoss(window=5)), [0.5, 2]), FRAMES, RNG.random(FRAMES.shape)),
    (SSIMLoss(2.0, 4, 1.0, 0.1, 0.2), FRAMES[:1, :2], FRAMES[:1, :2] + 0.1 * RNG.random((1, 2, 12, 13, 2))),
]
every_case = pytest.mark.parametrize(("loss", "prediction", "target"), CASES, ids=lambda x: str(x)[:40])
KERAS_CASES = [case for case in CASES if not isinstance(case[0], SSIMLoss | WeightedSum)]


@every_case
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient(loss, prediction, target, weighted):
    weights = RNG.random(prediction.shape[:2]) if weighted else None
    value, gradient = loss.value_and_gradient(prediction, target, weights)
    assert value == loss(prediction, target, weights)
    assert gradient.shape == prediction.shape
    np.testing.assert_array_equal(gradient, loss.gradient(prediction, target, weights))
    step = 1e-5
    for _ in range(4):  # along random directions, which see every element at once
        direction = RNG.standard_normal(prediction.shape)
        ahead = loss(prediction + step * direction, target, weights)
        behind = loss(prediction - step * direction, target, weights)
        assert (gradient * direction).sum() == pytest.approx((ahead - behind) / (2 * step), rel=2e-5, abs=1e-8)


@every_case
def test_single_precision(loss, prediction, target):
    value, gradient = loss.value_and_gradient(prediction.astype("float32"), target)
    double, expected = loss.value_and_gradient(prediction, target)
    assert isinstance(value, float)
    assert gradient.dtype == np.float32
    assert value == pytest.approx(double, rel=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@every_case
def test_weights_are_of_the_first_axes(loss, prediction, target):
    weights = np.arange(len(prediction))
    parts = [loss(prediction[b : b + 1], target[b : b + 1]) for b in range(len(prediction))]
    assert loss(prediction, target, weights) == pytest.approx((weights * parts).mean(), rel=1e-12)
    assert loss(prediction, target, weights[:, np.newaxis]) == loss(prediction, target, weights)
    assert loss(prediction, target, np.ones(1)) == loss(prediction, target)
    wrong = np.ones(len(prediction) + 1)
    with pytest.raises(ValueError, match=re.escape(f"sample_weight has shape {wrong.shape} but its axes must be")):
        loss(prediction, target, wrong)
    with pytest.raises(ValueError, match="sample_weight must be finite and not negative"):
        loss(prediction, target, [-1.0])


@every_case
def test_empty_batch(loss, prediction, target):
    value, gradient = loss.value_and_gradient(prediction[:0], target[:0])
    assert value == 0
    assert gradient.shape == prediction[:0].shape


@pytest.mark.keras
@pytest.mark.parametrize(("loss", "prediction", "target"), KERAS_CASES, ids=lambda x: str(x)[:40])
def test_against_keras(keras, loss, prediction, target):
    theirs = getattr(keras.losses, type(loss).__name__)(dtype="float64", **loss.options)
    prediction = prediction.copy()
    prediction[0, 0, 0] = 0  # clipped, where it is a probability
    y, t = (keras.ops.convert_to_tensor(a, dtype="float64") for a in (prediction, target))
    y.requires_grad = True
    expected = theirs(t, y)
    expected.backward()
    value, gradient = loss.value_and_gradient(prediction, target)
    assert value == pytest.approx(expected.item(), rel=1e-6)  # some of its steps are in float32
    np.testing.assert_allclose(gradient, y.grad.numpy(), rtol=1e-5, atol=1e-7)
    weights = RNG.random(prediction.shape[:2])
    expected = theirs(t, y, keras.ops.convert_to_tensor(weights, dtype="float64"))
    assert loss(prediction, target, weights) == pytest.approx(expected.item(), rel=1e-6)


def test_values_by_hand():
    x, y = [1.0, 2.0, 5.0], [1.0, 4.0, 2.0]
    assert MeanSquaredError()(x, y) == pytest.approx(13 / 3)
    assert MeanAbsoluteError()(x, y) == pytest.approx(5 / 3)
    assert Huber(2.5)(x, y) == pytest.approx((2 + 2.5 * 3 - 2.5**2 / 2) / 3)
    assert BinaryCrossentropy()([0.5, 0.25], [1, 0]) == pytest.approx(-(math.log(0.5) + math.log(0.75)) / 2)
    assert CategoricalCrossentropy()([[2.0, 1.0, 1.0]], [[0, 1, 0]]) == pytest.approx(math.log(4))
    assert SparseCategoricalCrossentropy(True)([[0.0, 0.0, 0.0]], [2]) == pytest.approx(math.log(3))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_logits_stay_finite(dtype):
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], dtype)
    for loss, right, wrong in (
        (BinaryCrossentropy(True), [[1, 0], [0, 1]], [[0, 1], [1, 0]]),
        (CategoricalCrossentropy(True), [[1, 0], [0, 1]], [[0, 1], [1, 0]]),
        (SparseCategoricalCrossentropy(True), [0, 1], [1, 0]),
    ):
        assert loss(logits, right) == 0
        value, gradient = loss.value_and_gradient(logits, wrong)
        assert value in (1e4, 2e4)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_probabilities_of_zero_and_one_are_clipped(dtype):
    p, t = np.array([[0.0, 1.0]], dtype), np.array([[1.0, 0.0]])
    for loss in (BinaryCrossentropy(), CategoricalCrossentropy()):
        value, gradient = loss.value_and_gradient(p, t)
        assert value == pytest.approx(-math.log(1e-7), rel=0.02)
        np.testing.assert_array_equal(gradient, 0)


def test_sums_are_taken_in_double():
    x = np.full((1000, 1000), 0.1, "float32")
    assert MeanAbsoluteError()(x, 0 * x) == pytest.approx(float(x[0, 0]), rel=1e-12)


def direct_ssim(x, y, max_value=1.0, window=11, sigma=1.5):
    """The paper's formula, window by window."""
    g = np.exp(-((np.arange(window) - (window - 1) / 2) ** 2) / (2 * sigma**2))
    w = np.outer(g, g) / g.sum() ** 2
    c1, c2 = (0.01 * max_value) ** 2, (0.03 * max_value) ** 2
    result = []
    for i in range(x.shape[0] - window + 1):
        for j in range(x.shape[1] - window + 1):
            a, b = (v[i : i + window, j : j + window] for v in (x, y))
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum()
            cov = (w * (a - ma) * (b - mb)).sum()
            result.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(result)


def test_ssim_is_the_papers_formula():
    x, y = RNG.random((2, 2, 14, 17, 3))
    expected = np.mean([direct_ssim(x[b, ..., c], y[b, ..., c]) for b in range(2) for c in range(3)])
    assert SSIMLoss()(x, y) == pytest.approx(1 - expected, rel=1e-12)
    assert SSIMLoss(255)(255 * x, 255 * y) == pytest.approx(1 - expected, rel=1e-12)
    assert SSIMLoss()(x, x) == 0
    expected = direct_ssim(x[0, ..., 0], y[0, ..., 0], window=6, sigma=0.8)
    assert SSIMLoss(window=6, sigma=0.8)(x[0, ..., :1], y[0, ..., :1]) == pytest.approx(1 - expected, rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "prediction", "target", "message"),
    [
        (
            MeanSquaredError(),
            (2, 3),
            (2, 1),
            "target has shape (2, 1) but must be (2, 3) (that of the prediction; noth",
        ),
        (CategoricalCrossentropy(), (2, 3), (2,), "target has shape (2,) but must be (2, 3)"),
        (
            CategoricalCrossentropy(),
            (2, 1),
            (2, 1),
            "prediction must have two or more classes on its last axis, got sh",
        ),
        (SparseCategoricalCrossentropy(), (2, 3), (2, 2), "target has shape (2, 2) but must be (2,) (that of the pre"),
        (SparseCategoricalCrossentropy(), (), (), "prediction must have two or more classes on its last axis, got sh"),
        (SSIMLoss(), (2, 12, 10, 1), (2, 12, 10, 1), "prediction must be (…, H, W, C) with frames of at least 11×11"),
        (SSIMLoss(), (12, 12), (12, 12), "prediction must be (…, H, W, C) with frames of at least 11×11"),
    ],
)
def test_shapes_that_do_not_fit(loss, prediction, target, message):
    with pytest.raises(ValueError, match=re.escape(f"{type(loss).__name__}: {message}")):
        loss(np.ones(prediction), np.zeros(target))


@pytest.mark.parametrize(
    ("loss", "target", "message"),
    [
        (BinaryCrossentropy(), [[0, 2]], "target must lie between 0 and 1, got values from 0 to 2; scale it"),
        (CategoricalCrossentropy(), [[-1, 1]], "target must lie between 0 and 1, got values from -1 to 1; scale it"),
        (BinaryCrossentropy(), [[math.nan, 2]], "target must lie between 0 and 1, got values from 2 to 2; scale it"),
        (BinaryCrossentropy(), [[0, math.inf]], "target must lie between 0 and 1, got values from 0 to inf"),
        (SparseCategoricalCrossentropy(), [2], "target must hold the classes 0 to 1, got 2"),
        (SparseCategoricalCrossentropy(), [-1], "target must hold the classes 0 to 1, got -1"),
        (SparseCategoricalCrossentropy(), [0.5], "target must hold the classes 0 to 1, got 0.5"),
        (SparseCategoricalCrossentropy(), [math.inf], "target must hold the classes 0 to 1, got inf"),
        (SparseCategoricalCrossentropy(), [-math.inf], "target must hold the classes 0 to 1, got -inf"),
    ],
)
def test_labels_out_of_range(loss, target, message):
    with pytest.raises(ValueError, match=re.escape(f"{type(loss).__name__}: {message}")):
        loss([[0.5, 0.5]], target)


@every_case
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_in_the_target_is_nan_in_the_loss(loss, prediction, target, dtype):
    target = target.astype(float)
    target.flat[1] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, gradient = loss.value_and_gradient(prediction.astype(dtype), target)
    assert math.isnan(value)
    assert gradient.dtype == dtype
    spoiled = np.isnan(gradient)
    assert spoiled.any()
    assert not spoiled[1:].any()


@every_case
def test_what_weighs_nothing_is_not_looked_at(loss, prediction, target):
    weights = np.ones(prediction.shape[:2])
    weights[1:, 0] = 0
    spoiled = target.astype(float)
    spoiled[1:, 0] = math.nan
    value, gradient = loss.value_and_gradient(prediction, spoiled, weights)
    expected = loss.value_and_gradient(prediction, target, weights)
    assert value == loss(prediction, spoiled, weights) == expected[0]
    np.testing.assert_array_equal(gradient, expected[1])
    spoiled[1:, 0] = -9999
    assert loss(prediction, spoiled, weights) == expected[0]


def test_what_weighs_nothing_pixel_by_pixel():
    weights = (RNG.random((2, 3, 4, 5)) < 0.5).astype(float)
    p, t = RNG.random((2, 2, 3, 4, 5, 2))
    holes = np.where(weights[..., None] == 0, math.nan, t)
    assert MeanSquaredError()(p, holes, weights) == MeanSquaredError()(p, t, weights)
    assert math.isnan(MeanSquaredError()(p, holes))


def test_labels_of_classes_may_have_an_axis_of_one():
    for p, t in ((CLASSES, LABELS), (CLASSES[0], LABELS[0])):
        loss = SparseCategoricalCrossentropy()
        assert loss(p, t[..., None]) == loss(p, t)
        np.testing.assert_array_equal(loss.gradient(p, t[..., None]), loss.gradient(p, t))
        weights = RNG.random(t.shape)
        assert loss(p, t[..., None], weights) == loss(p, t, weights)


def test_arrays_that_are_no_numbers():
    with pytest.raises(TypeError, match="MeanSquaredError: target must be an array of real numbers, got dtype complex"):
        MeanSquaredError()([1.0], [1j])
    with pytest.raises(TypeError, match="prediction must be an array of real numbers, got dtype <U1"):
        MeanSquaredError()(["a"], [1.0])


def test_any_real_dtype_and_byte_order():
    x, y = np.arange(3), np.array([1, 1, 0])
    assert MeanSquaredError().gradient(x, y).dtype == np.float32
    assert MeanSquaredError().gradient(x.astype("float16"), y).dtype == np.float32
    assert MeanSquaredError()(x.astype(">f8"), y.astype(bool)) == MeanSquaredError()(x, y) == pytest.approx(5 / 3)


def test_get():
    for given, _, _ in CASES:
        assert losses.get(given) is given
        assert restore(describe(given)) == given
    for name, loss in losses.TABLE.items():
        assert losses.get(name) is loss
    with pytest.raises(ValueError, match="unknown loss 'l2'; known are mse, mean_squared_error, mae"):
        losses.get("l2")
    with pytest.raises(TypeError, match="or a pair of functions"):
        losses.get(3)
    with pytest.raises(TypeError, match=r"has no gradient to train with: give \(loss, gradient\)"):
        losses.get(np.vdot)


def test_a_weighted_sum_is_one():
    loss, p, t = WeightedSum(["mae", "huber"], [0.25, 3.0]), CLASSES, ONE_HOT
    mae, huber = losses.get("mae"), losses.get("huber")
    assert loss(p, t) == pytest.approx(0.25 * mae(p, t) + 3 * huber(p, t), rel=1e-14)
    np.testing.assert_allclose(loss.gradient(p, t), 0.25 * mae.gradient(p, t) + 3 * huber.gradient(p, t), rtol=1e-14)
    assert loss.gradient(p.astype(np.float32), t).dtype == np.float32
    with pytest.raises(ValueError, match="unknown loss 'l2'"):
        WeightedSum(("mse", "l2"), (1, 1))


def test_own_functions():
    own = losses.get((lambda p, t: np.mean((p - t) ** 4), lambda p, t: 4 * (p - t) ** 3 / p.size))
    value, gradient = own.value_and_gradient(np.array([1.0, 2.0], "float32"), np.zeros(2))
    assert value == own(np.array([1.0, 2.0]), np.zeros(2)) == 8.5
    assert gradient.dtype == np.float32
    np.testing.assert_array_equal(gradient, [2, 16])
    with pytest.raises(ValueError, match="sample_weight goes with the losses of"):
        own(np.ones(2), np.ones(2), np.ones(2))
    many = losses.get((lambda p, t: (p - t) ** 2, lambda p, t: p - t))
    with pytest.raises(
        ValueError, match=re.escape("the loss must return one number, got an array of shape (2,); take its mean")
    ):
        many(np.ones(2), np.ones(2))
    one = losses.get((lambda p, t: np.full((1, 1), 3.0), lambda p, t: p))
    assert one(np.ones(2), np.ones(2)) == 3
    wrong = losses.get((lambda p, t: 0.0, lambda p, t: 0.0))
    with pytest.raises(ValueError, match=re.escape("loss: gradient has shape () but must be (2,)")):
        wrong.gradient(np.ones(2), np.ones(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Huber(0), "Huber: delta must be a finite number > 0, got 0"),
        (lambda: BinaryCrossentropy("yes"), "BinaryCrossentropy: from_logits must be one of False, True, got 'yes'"),
        (lambda: CategoricalCrossentropy(label_smoothing=2), "CategoricalCrossentropy: label_smoothing must be a fini"),
        (lambda: SSIMLoss(window=1.5), "SSIMLoss: window must be an integer >= 1, got 1.5"),
        (lambda: WeightedSum((), ()), "WeightedSum: losses must be several losses"),
        (lambda: WeightedSum("mse", (1,)), "WeightedSum: losses must be several losses"),
        (lambda: WeightedSum(("mse", "mae"), (1,)), r"WeightedSum: weights must be 2 finite numbers >= 0, one a loss"),
        (lambda: WeightedSum(("mse", "mae"), (1, -1)), r"WeightedSum: weights must be 2 finite numbers >= 0"),
        (lambda: SSIMLoss(0), "SSIMLoss: max_value must be a finite number > 0, got 0"),
    ],
)
def test_options_that_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
