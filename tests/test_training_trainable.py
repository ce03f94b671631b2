"""The training loop: the numbers of a plain loop, and errors that name what is wrong."""

import contextlib
import copy
import functools
import math
import os

import numpy as np
import pytest
from training_models import FILMS, X, Y, dense, fit, lossy, same

from fastclstm.io import weights
from fastclstm.layers import Activation, BatchNormalization, ConvLSTM2D, Dense, Dropout, Flatten, Layer
from fastclstm.models import EncoderForecaster, Sequential
from fastclstm.nn import losses, metrics
from fastclstm.nn.optimizers import SGD, Adam
from fastclstm.nn.schedules import ExponentialDecay
from fastclstm.training.history import EarlyStopping

# --- the loop ---


def test_fit_is_the_plain_loop():
    options = {"kernel_regularizer": "l2", "bias_constraint": "non_neg"}
    model, twin, optimizer = dense(**options), dense(**options), Adam(0.01, clip_norm=0.1)
    weight = np.linspace(0.5, 2, 10)
    history = fit(model, optimizer=Adam(0.01, clip_norm=0.1), epochs=3, sample_weight=weight, metrics=["mae", biggest])
    rows = []
    for epoch in range(3):
        order, sums = np.random.default_rng([0, epoch]).permutation(10), np.zeros(3)
        for part in (order[:4], order[4:8], order[8:]):
            y = twin(X[part], training=True)
            value, dy = losses.get("mse").value_and_gradient(y, Y[part], weight[part])
            sums += len(part) * np.array([value + twin.penalty, np.abs(y - Y[part]).mean(), y.max()])
            twin.backward(dy)
            twin.set_parameters(twin.parameters | optimizer.step(twin.trainable_parameters, twin.get_gradients()))
            twin.apply_constraints()
        rows.append(sums / 10)
    assert same(model, twin)
    assert not same(model, dense(**options))
    assert (model.parameters["1.bias"] >= 0).all()
    np.testing.assert_allclose(np.transpose([history[n] for n in ("loss", "mae", "biggest")]), rows, rtol=1e-12)
    assert list(history) == ["loss", "mae", "biggest", "learning_rate", "seconds"]
    assert history["learning_rate"] == [0.01] * 3
    assert all(seconds > 0 for seconds in history["seconds"])
    assert model._pullback is None  # nothing of the last batch stays in memory


def biggest(prediction, target):
    return prediction.max()


def test_the_seed_decides_the_order_and_shuffle_is_an_option():
    models = [dense() for _ in range(4)]
    for model, options in zip(models, [{}, {}, {"seed": 1}, {"shuffle": False}], strict=True):
        fit(model, epochs=2, **options)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])
    assert not same(models[0], models[3])
    batches = [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])]
    fit(plain := dense(), batches, None, epochs=2)
    assert same(models[3], plain)


def test_every_kind_of_batches_gives_the_same():
    batches = [(X[:4], Y[:4]), {"x": X[4:8], "y": Y[4:8]}, [X[8:], Y[8:], np.ones(2)]]
    seen = []

    def of_epoch(epoch):
        seen.append(epoch)
        return iter(batches)

    def of_any_epoch():
        yield from batches

    sources = [(batches, {}), (of_epoch, {}), (of_any_epoch, {}), (iter(batches * 2), {"steps_per_epoch": 3})]
    models = [dense() for _ in sources]
    for model, (source, options) in zip(models, sources, strict=True):
        fit(model, source, None, epochs=2, **options)
    assert all(same(models[0], model) for model in models[1:])
    assert seen == [0, 1]
    assert models[0].evaluate(batches) == pytest.approx(models[0].evaluate(X, Y), rel=1e-12)


def test_steps_per_epoch_cuts_and_misses_batches():
    batches = [(X[:4], Y[:4]), (X[4:8], Y[4:8])]
    fit(model := dense(), batches, None, steps_per_epoch=1)
    fit(other := dense(), batches[:1], None)
    assert same(model, other)
    with pytest.raises(ValueError, match=r"batches of epoch 1 ended after 2, not 3"):
        fit(dense(), batches, None, steps_per_epoch=3)


def test_validation_data_is_not_trained_on():
    model, twin = dense(), dense()
    history = fit(model, epochs=2, validation_split=0.3, metrics="mae")
    other = fit(twin, X[:7], Y[:7], epochs=2, validation_data=(X[7:], Y[7:]), metrics="mae")
    assert same(model, twin)
    for name in ("loss", "val_loss", "val_mae"):
        assert history[name] == other[name]
    measured = model.evaluate(X[7:], Y[7:], metrics="mae")
    assert measured == {"loss": history["val_loss"][-1], "mae": history["val_mae"][-1]}
    in_batches = fit(dense(), X[:7], Y[:7], validation_data=[(X[7:9], Y[7:9]), (X[9:], Y[9:])])
    assert in_batches["val_loss"] == pytest.approx(history["val_loss"][:1], rel=1e-12)


def test_predict_and_evaluate_in_batches():
    model = lossy()
    whole = model(FILMS)
    np.testing.assert_array_equal(model.predict(FILMS, 4), whole)
    assert model.predict(FILMS[:0]).shape == (0, *whole.shape[1:])
    lengths = np.array([1, 2, 3, 4, 4, 2])
    np.testing.assert_array_equal(model.predict(FILMS, 4, lengths=lengths), model(FILMS, lengths=lengths))
    mask = np.arange(4) < lengths[:, None]
    measured = model.evaluate(FILMS, 0 * FILMS, batch_size=4, mask=mask, loss="mae", metrics=("mse",))
    y = model(FILMS, mask=mask).astype(float)
    assert measured == pytest.approx({"loss": np.abs(y).mean(), "mse": np.square(y).mean()}, rel=1e-6)
    with pytest.raises(RuntimeError, match="training"):
        model.backward(whole)


def test_masks_are_trained_with():
    lengths = np.array([1, 2, 3, 4, 4, 2])
    models = [lossy() for _ in range(3)]
    for model, options in zip(
        models, [{"lengths": lengths}, {"mask": np.arange(4) < lengths[:, None]}, {}], strict=True
    ):
        fit(model, FILMS, FILMS, **options)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


@pytest.mark.torch
def test_arrays_of_other_libraries():
    torch = pytest.importorskip("torch")
    model, twin = dense(), dense()
    fit(model, torch.from_numpy(X), torch.from_numpy(Y))
    fit(twin)
    assert same(model, twin)
    assert isinstance(model.predict(torch.from_numpy(X)), torch.Tensor)


def test_frozen_layers_stay():
    model = dense()
    model[0].trainable = False
    fit(model)
    before = dense().parameters
    assert [n for n, a in model.parameters.items() if (a != before[n]).any()] == ["1.kernel", "1.bias"]


def test_the_encoder_forecaster_learns_with_and_without_teacher_forcing():
    for teacher_forcing in (True, False):
        model = EncoderForecaster(1, 2, 3, seed=0, engine="reference")
        twin = copy.deepcopy(model)
        fit(model, FILMS[:, :2], FILMS[:, 2:], batch_size=6, shuffle=False, optimizer=SGD(0.5),
            teacher_forcing=teacher_forcing)  # fmt: skip
        x, y = FILMS[:, :2], FILMS[:, 2:]
        made = twin.forward(x, training=True, **({"targets": y} if teacher_forcing else {"steps": 2}))
        twin.backward(losses.get("mse").gradient(made, y))
        gradients = twin.get_gradients()
        twin.set_parameters({n: a - 0.5 * gradients[n] for n, a in twin.parameters.items()})
        for name, array in twin.parameters.items():
            np.testing.assert_allclose(model.parameters[name], array, rtol=1e-6, atol=1e-7)
        assert model.predict(x, 4, steps=3).shape == (6, 3, 5, 5, 1)
        assert model.evaluate(x, y)["loss"] == pytest.approx(np.square(model.forecast(x, 2) - y).mean(), rel=1e-5)


def test_a_checkpoint_knows_of_teacher_forcing(tmp_path):
    def fitted(teacher_forcing):
        model = EncoderForecaster(1, 2, 3, seed=0, engine="reference")
        return fit(model, FILMS[:, :2], FILMS[:, 2:], teacher_forcing=teacher_forcing, checkpoint=tmp_path / "c",
                   resume=True)  # fmt: skip

    assert fitted(True) == fitted(True)
    with pytest.raises(ValueError, match=r"options\.teacher_forcing was True and is False"):
        fitted(False)


def test_the_learning_rate_of_each_epoch():
    history = fit(dense(), optimizer=SGD(ExponentialDecay(0.1, 1, 0.5)), epochs=2)
    assert history["learning_rate"] == [0.1 / 4, 0.1 / 32]


def test_callbacks_see_the_history_and_may_end_it():
    seen = []

    def watch(history):
        seen.append(history.epochs)
        return history.epochs == 2

    assert fit(dense(), epochs=5, callbacks=watch).epochs == 2
    assert seen == [1, 2]
    assert fit(dense(), epochs=2, callbacks=[seen.append, lambda history: 1]).epochs == 2


def test_a_time_limit_cuts_the_epoch_short(monkeypatch):
    now, steps = iter(range(100)), []
    monkeypatch.setattr("fastclstm.training.fitting.time.perf_counter", lambda: next(now))
    history = fit(dense(), epochs=9, time_limit=6, metrics=lambda p, t: steps.append(len(p)) or 0.0)
    assert steps == [4, 4, 2, 4, 4]  # a tick a step, and two to end an epoch and begin the next
    assert history.epochs == 2
    assert history["seconds"] == [4, 3]


def test_progress_goes_to_the_terminal_when_asked(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fit(dense(), epochs=2, quiet=False)
    shown = capsys.readouterr().err
    assert "epoch 2/2: 100%" in shown
    assert "6/6" in shown
    assert "loss=" in shown
    monkeypatch.undo()
    fit(dense(), epochs=2, quiet=None)
    assert capsys.readouterr().err == ""


# --- history and early stopping ---


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_metrics_that_count_do_so_over_all_batches(batch_size, tmp_path):
    x = np.zeros((16, 3))
    x[[0, 5, 6]] = 1
    y = x.copy()
    y[[6, 7]] = [[0], [1]]  # 2 hits of 3, a miss and a false alarm
    model, score = Sequential([Activation("linear")]), functools.partial(metrics.csi, thresholds=0.5)
    score.__name__ = "half"
    scores = model.evaluate(x, y, metrics=["csi", "pod", score], batch_size=batch_size)
    assert (scores["csi"], scores["pod"], scores["half"]) == (0.5, 2 / 3, 0.5)
    score = functools.partial(metrics.csi, thresholds=[0.1, 0.5])
    with pytest.raises(ValueError, match=r"csi must return one number, got an array of shape \(2,\)"):
        model.evaluate(x, y, metrics=score)

    def run(path, epochs, every=None, stop=False):
        model = Sequential([Dense(3, 3, seed=0, dtype="float64")])
        calls = []

        def interrupt(prediction, target):
            calls.append(1)
            if stop and len(calls) == 2 * len(x) // batch_size - 1:
                raise KeyboardInterrupt
            return 0.0

        return model.fit(x, y, epochs=epochs, metrics=["csi", interrupt], batch_size=batch_size, seed=0, quiet=True,
                         checkpoint=path, checkpoint_every=every, resume=True)  # fmt: skip

    whole = run(tmp_path / "a", 2)
    with contextlib.suppress(KeyboardInterrupt):
        run(tmp_path / "b", 2, 1, stop=True)
    np.testing.assert_array_equal(run(tmp_path / "b", 2)["csi"], whole["csi"])


@pytest.mark.parametrize("restore_best", [True, False])
def test_early_stopping(restore_best):
    model, kept = dense(), []
    stopping = EarlyStopping(2, monitor="val_score", mode="max", min_delta=0.5, restore_best=restore_best)
    scores = iter([0, 1, 0, 0, 0, 3, 0, 3.5, 0, math.nan, 0, 9])  # of an epoch's training and of its validation

    def score(prediction, target):
        return next(scores)

    history = fit(model, X[:4], Y[:4], epochs=9, validation_data=(X[4:8], Y[4:8]), metrics=score,
                  early_stopping=stopping, callbacks=lambda history: kept.append(copy.deepcopy(model)))  # fmt: skip
    assert history.epochs == 5
    assert same(model, kept[2 if restore_best else 4])


def test_early_stopping_by_number_watches_the_validation():
    assert fit(dense(), optimizer=SGD(0.0), epochs=9, validation_split=0.2, early_stopping=3).epochs == 4
    assert fit(dense(), optimizer=SGD(0.0), epochs=9, shuffle=False, early_stopping=1).epochs == 2


# --- what goes wrong ---


def test_a_single_sequence_is_no_batch(tmp_path):
    film, model = FILMS[0], Sequential([ConvLSTM2D(1, 1, 3, seed=0, engine="reference")])
    for call in (
        lambda: model.predict(film),
        lambda: model.evaluate(film, film),
        lambda: fit(model, film, film, checkpoint=tmp_path / "c"),
        lambda: fit(model, [(film, film)], None),
        lambda: fit(model, FILMS, FILMS, validation_data=(film, film)),
    ):
        with pytest.raises(ValueError, match=r"x .* is one sequence, but samples are on the first axis; give x\["):
            call()
    assert not (tmp_path / "c").exists()
    for option in ("time_major", "stateful"):
        other = Sequential([ConvLSTM2D(1, 1, 3, engine="reference", **{option: True})])
        with pytest.raises(ValueError, match=f"predict: layer 0, ConvLSTM2D has {option}=True"):
            other.predict(FILMS)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_parameters_that_are_not_finite_are_not_kept(tmp_path):
    model = dense()
    with pytest.raises(FloatingPointError, match=r"epoch 1, step 1, the new \d\.\w+ holds NaN or Inf") as caught:
        fit(model, X * 1e3, Y * 1e3, optimizer=SGD(1e308), checkpoint=tmp_path / "c", checkpoint_every=1)
    assert "before this step" in str(caught.value)
    assert same(model, dense())
    assert np.isfinite(weights.load(tmp_path / "c")[0]["model/0.kernel"]).all()


def test_validation_data_that_does_not_fit_is_told_before_the_first_step():
    model = dense()
    with pytest.raises(ValueError, match="target has shape") as caught:
        fit(model, validation_data=(X, Y[:, :1]))
    assert "in the validation data" in caught.value.__notes__
    assert same(model, dense())


def test_an_error_says_in_which_step_it_came_up():
    with pytest.raises(ValueError, match="target has shape") as caught:
        fit(dense(), [(X, Y), (X, Y[:, :1])], None)
    assert "in epoch 1, step 2 of fit" in caught.value.__notes__


def test_an_error_leaves_the_optimizer_before_its_step():
    factor = [1.0]
    model, optimizer = dense(kernel_constraint=lambda array: array / factor[0]), Adam()
    fit(model, X[:4], Y[:4], optimizer=optimizer)
    before = optimizer.get_state()
    factor[0] = "nothing"
    with pytest.raises(TypeError):
        fit(model, optimizer=optimizer)
    after = optimizer.get_state()
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], before[name]) for name in after)


def test_the_caller_s_arrays_cannot_be_written_to():
    def writing(prediction, target):
        target *= 0
        return 0.0

    target = Y.copy()
    with pytest.raises(ValueError, match="read-only"):
        fit(dense(), y=target, shuffle=False, metrics=writing)
    np.testing.assert_array_equal(target, Y)


class Spoil(Layer):
    """Multiplies by a factor on the way there and by another on the way back."""

    def __init__(self, there=1.0, back=1.0):
        self.there, self.back = there, back

    @property
    def options(self):
        return {}

    def __new__(cls, *_):
        layer = super().__new__(cls)
        Layer.__post_init__(layer)
        return layer

    def forward(self, x, training=False):
        return x * self.there

    def backward(self, dy):
        return dy * self.back


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ((np.nan, 1.0), r"the loss is nan; it began in the output of layer 1\.0, Spoil\."),
        ((1e200, 1.0), r"the loss is inf; it began in the loss or the penalty, as all outputs are finite"),
        ((1.0, np.inf), r"Adam: the gradient of 0\.\w+ holds NaN or Inf; .*; it began in the gradients of layer 1\.0"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_is_traced_to_its_layer(factors, words):
    norm = BatchNormalization(3, dtype="float64")
    drop, spoil = Dropout(0.5, seed=0), Spoil()
    model = Sequential([norm, Sequential([spoil, drop]), Dense(3, 2, seed=1, dtype="float64")])
    states = []

    def batches(epoch):
        for step in range(3):
            if (epoch, step) == (1, 2):
                states.append((copy.deepcopy(model), drop._rng.bit_generator.state))
                spoil.there, spoil.back = factors
            yield X, Y

    with pytest.raises(FloatingPointError, match=rf"^fit: at epoch 2, step 3, {words}") as caught:
        fit(model, batches, None, epochs=3)
    assert "The parameters are those before this step; lower the learning rate" in str(caught.value)
    before, state = states[0]
    assert same(model, before)
    assert drop._rng.bit_generator.state == state
    assert "forward" not in vars(spoil)


def test_data_that_is_not_finite_is_named():
    for name, spoiled in (("x", {"x": X + np.nan}), ("y", {"y": Y + np.inf})):
        with pytest.raises(FloatingPointError, match=f"it began in the batch: {name} holds NaN or Inf"):
            fit(model := dense(), **spoiled)
        assert same(model, dense())


def test_what_weighs_nothing_may_be_missing():
    rng = np.random.default_rng(3)
    weights = (rng.random((6, 4, 5, 5)) < 0.6).astype(np.float32)
    weights[:2] = 0  # a whole batch
    gaps = np.where(weights[..., None] == 0, np.nan, FILMS)
    names = ["mse", "mae", "psnr", "csi"]

    def model():
        return Sequential([ConvLSTM2D(1, 1, 3, seed=0, engine="reference")])

    filled, holed = model(), model()
    expected, history = (fit(m, FILMS, y, sample_weight=weights, epochs=2, batch_size=2, metrics=names)
                         for m, y in ((filled, FILMS), (holed, gaps)))  # fmt: skip
    assert same(filled, holed)
    assert {name: expected[name] for name in ("loss", *names)} == {name: history[name] for name in ("loss", *names)}
    measured = holed.evaluate(FILMS, gaps, sample_weight=weights, batch_size=2, metrics=["mse", "mae"])
    errors = (holed.predict(FILMS) - gaps)[weights > 0]
    assert measured["mse"] == pytest.approx(np.square(errors).mean(), rel=1e-6)
    assert measured["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-6)
    assert measured["loss"] == pytest.approx(np.square(errors).sum() / FILMS.size, rel=1e-6)
    nothing = holed.evaluate(FILMS, gaps, sample_weight=0 * weights, metrics=["mse", "csi"])
    assert nothing["loss"] == 0
    assert math.isnan(nothing["mse"])
    assert math.isnan(nothing["csi"])


def test_what_is_left_out_is_in_the_checkpoint(tmp_path):
    weights = np.ones(10)
    weights[[0, 3, 7]] = 0

    def stopping(prediction, target):
        calls.append(len(calls))
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return 0.0

    options = {"sample_weight": weights, "metrics": ["mae", stopping], "shuffle": False}
    calls = [9]
    whole = fit(dense(), **options)
    calls = []
    with contextlib.suppress(KeyboardInterrupt):
        fit(dense(), checkpoint=tmp_path / "c", checkpoint_every=1, **options)
    assert weights_of_progress(tmp_path / "c") == {"": 2}
    assert fit(dense(), checkpoint=tmp_path / "c", resume=True, **options)["mae"] == whole["mae"]


def weights_of_progress(path):
    return weights.load(path)[1]["progress"]["left_out"]


def test_missing_data_is_told_with_what_to_do():
    with pytest.raises(
        FloatingPointError, match=r"y holds NaN or Inf\. .* sample_weight of 0, for each pixel"
    ) as caught:
        fit(dense(), y=Y + np.nan)
    assert "learning rate" not in str(caught.value)
    assert len(str(caught.value)) < 300
    with pytest.raises(
        FloatingPointError, match=r"x holds NaN or Inf\. .*mask= skip frames that are missing"
    ) as caught:
        fit(dense(), x=X + np.nan, sample_weight=np.r_[0, np.ones(9)])
    assert len(str(caught.value)) < 300


def test_a_mask_skips_frames_that_are_missing():
    mask, x = np.ones((6, 4), bool), FILMS.copy()
    mask[1, 2], x[1, 2] = False, np.nan
    models = [Sequential([ConvLSTM2D(1, 1, 3, seed=0, engine="reference")]) for _ in range(2)]
    for model, frames in zip(models, (FILMS, x), strict=True):
        fit(model, frames, FILMS, mask=mask)
    assert same(*models)


def test_class_weight_is_a_sample_weight(tmp_path):
    labels = np.arange(10) % 3
    by_hand = np.array([2.0, 1.0, 0.5])[labels]
    cases = (
        ("sparse_categorical_crossentropy", labels, Dense(3, 3, "softmax", seed=0)),
        ("sparse_categorical_crossentropy", labels[:, None], Dense(3, 3, "softmax", seed=0)),
        ("categorical_crossentropy", np.eye(3)[labels], Dense(3, 3, "softmax", seed=0)),
        ("binary_crossentropy", (labels[:, None] > 1).astype(int), Dense(3, 1, "sigmoid", seed=0)),
    )
    for loss, y, layer in cases:
        binary = loss.startswith("binary")
        classes = {0: 2.0, 2: 0.5} if not binary else {1: 3}
        given = by_hand if not binary else np.where(labels > 1, 3.0, 1.0)
        other = copy.deepcopy(layer)
        weighed = fit(Sequential([layer]), X, y, loss=loss, class_weight=classes, metrics="accuracy")
        expected = fit(Sequential([other]), X, y, loss=loss, sample_weight=given, metrics="accuracy")
        assert same(layer, other)
        assert weighed["loss"] == expected["loss"]
        both = fit(Sequential([layer]), X, y, loss=loss, class_weight=classes, sample_weight=2 * given)
        twice = fit(Sequential([other]), X, y, loss=loss, sample_weight=2 * given**2)
        assert both["loss"] == pytest.approx(twice["loss"])
    options = {"loss": "sparse_categorical_crossentropy", "checkpoint": tmp_path / "c", "resume": True}
    model = Sequential([Dense(3, 3, "softmax", seed=0)])
    fit(model, X, labels, class_weight={1: 2}, **options)
    with pytest.raises(ValueError, match=r"another training: class_weight\.1 was 2\.0 and is 3\.0"):
        fit(model, X, labels, class_weight={1: 3}, **options)


@pytest.mark.keras
def test_class_weight_against_keras(keras):
    layer = Dense(3, 3, "softmax", seed=0)
    theirs = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, "softmax")])
    theirs.set_weights([layer.kernel, layer.bias])
    theirs.compile("sgd", "sparse_categorical_crossentropy")
    labels, classes = (np.arange(10) % 3)[:, None], {0: 2.0, 2: 0.5}
    theirs.fit(X, labels, batch_size=4, shuffle=False, class_weight=classes, verbose=0)
    Sequential([layer]).fit(X, labels, loss="sparse_categorical_crossentropy", optimizer=SGD(0.01), batch_size=4,
                            shuffle=False, class_weight=classes, quiet=True)  # fmt: skip
    np.testing.assert_allclose(layer.kernel, theirs.get_weights()[0], atol=1e-6)


def test_an_error_in_a_step_leaves_the_parameters_before_it():
    model, metric_calls = lossy(), []

    def failing(prediction, target):
        metric_calls.append(copy.deepcopy(model))
        if len(metric_calls) == 2:
            raise KeyboardInterrupt
        return 0.0

    kept = []
    with pytest.raises(KeyboardInterrupt):
        fit(model, lambda epoch: ((kept.append(copy.deepcopy(model)) or (FILMS, FILMS)) for _ in range(3)), None,
            metrics=failing)  # fmt: skip
    assert same(model, kept[1])
    assert not same(model, kept[0])
    assert not same(model, metric_calls[1])  # whose batch statistics had moved


ERRORS = {
    "no y": ({"y": None}, ValueError, "x is an array, but there is no y"),
    "no data": ({"x": 3, "y": None}, TypeError, "x must be an array, or batches"),
    "samples": ({"y": Y[:9]}, ValueError, r"all arrays must have as many samples.* x \(10, 3\), y \(9, 2\)"),
    "empty": ({"x": X[:0], "y": Y[:0]}, ValueError, "no samples"),
    "complex": ({"x": X * 1j}, TypeError, "real numbers"),
    "target": ({"y": Y[:, :1]}, ValueError, "target has shape"),
    "epochs": ({"epochs": 0}, ValueError, "fit: epochs must be an integer >= 1, got 0"),
    "batch size": ({"batch_size": 1.5}, ValueError, "batch_size must be an integer >= 1, got 1.5"),
    "steps": ({"steps_per_epoch": 2}, ValueError, "steps_per_epoch is for batches"),
    "split": ({"validation_split": 1}, ValueError, r"validation_split must be a number in \[0, 1\), got 1"),
    "little split": ({"validation_split": 0.01}, ValueError, "10 to train on and 0 to validate"),
    "two validations": ({"validation_split": 0.1, "validation_data": (X, Y)}, ValueError, "not both"),
    "validation": ({"validation_data": X}, ValueError, "there is no y"),
    "validation once": ({"validation_data": iter([])}, TypeError, "is an iterator, which is empty after an epoch"),
    "validation names": ({"validation_data": {"x": X, "z": Y}}, ValueError, "has 'z'; it may have x, y"),
    "split of batches": ({"x": [(X, Y)], "y": None, "validation_split": 0.1}, ValueError, "needs arrays"),
    "batch": ({"x": [X], "y": None}, TypeError, r"a batch must be \(x, y\)"),
    "long batch": ({"x": [(X, Y, Y, Y)], "y": None}, ValueError, "got 4 items"),
    "no batches": ({"x": [], "y": None}, ValueError, "ended after 0, not at least 1"),
    "iterator": ({"x": iter([(X, Y)]), "y": None}, ValueError, "needs steps_per_epoch"),
    "mask beside batches": ({"x": [(X, Y)], "y": None, "mask": X}, ValueError, "mask must be part of the batches"),
    "loss": ({"loss": "mess"}, ValueError, "unknown loss 'mess'"),
    "Keras's name of a loss": ({"loss": "MeanSquaredError"}, ValueError, "did you mean 'mean_squared_error'"),
    "Keras's verbose": ({"verbose": 0}, TypeError, "fit has no argument 'verbose'; there is quiet=True"),
    "a slip": ({"epoch": 3}, TypeError, "fit: unknown option 'epoch'; did you mean 'epochs'"),
    "optimizer": ({"optimizer": 3}, TypeError, "an optimizer must be"),
    "metric": ({"metrics": "mess"}, ValueError, "unknown metric"),
    "metrics": ({"metrics": ["mse", "mse"]}, ValueError, "two have the same name"),
    "validation's name": ({"metrics": type("val_loss", (), {"__call__": len})()}, ValueError, "'val_loss' is the name"),
    "number for metrics": ({"metrics": 3}, TypeError, "metrics must be one or a sequence of them, got 3"),
    "metric of nothing": ({"metrics": lambda p, t: None}, ValueError, "must return one number, got None"),
    "callbacks": ({"callbacks": 3}, TypeError, "callbacks must be one or a sequence of them, got 3"),
    "callback": ({"callbacks": [3]}, TypeError, "callbacks must be functions of the History"),
    "checkpoint": ({"checkpoint": 3}, TypeError, "checkpoint must be the path of a file, got 3"),
    "pair": ({"x": (X, Y), "y": None}, TypeError, "x is a tuple of 2 arrays; give them one by one"),
    "array metric": ({"metrics": lambda p, t: p}, ValueError, "must return one number"),
    "seed": ({"seed": -1}, ValueError, "seed must be an integer >= 0 or None, got -1"),
    "patience": ({"early_stopping": 0}, ValueError, "patience must be an integer >= 1"),
    "stopping": ({"early_stopping": "soon"}, TypeError, "a number of epochs or EarlyStopping"),
    "monitor": ({"early_stopping": EarlyStopping(1, "val_loss")}, ValueError, "one of 'loss', got 'val_loss'"),
    "resume": ({"resume": True}, ValueError, "need a checkpoint"),
    "every": ({"checkpoint": "c", "checkpoint_every": 0}, ValueError, "checkpoint_every must be"),
    "classes": ({"class_weight": [1, 2]}, TypeError, "class_weight must be a dict from class numbers to factors, got"),
    "negative class": ({"class_weight": {0: -1}}, ValueError, "must map class numbers to factors >= 0, got 0: -1"),
    "no classes": ({"class_weight": {0: 2}}, ValueError, "class_weight is for the crossentropies, not for MeanSq"),
    "time": ({"time_limit": 0}, ValueError, "time_limit must be a number of seconds > 0, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, tmp_path, monkeypatch):
    options, kind, words = ERRORS[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=words):
        fit(model := dense(), **options)
    assert same(model, dense())
    assert os.listdir(tmp_path) == []


def test_evaluate_and_predict_have_nothing_to_silence():
    for call in (dense().predict, lambda x, **options: dense().evaluate(x, Y, **options)):
        with pytest.raises(TypeError, match="has no argument 'verbose'; nothing is printed"):
            call(X, verbose=0)
    with pytest.raises(TypeError, match="evaluate: unknown option 'metric'; did you mean 'metrics'"):
        dense().evaluate(X, Y, metric="mae")


def test_models_that_cannot_be_fitted():
    with pytest.raises(ValueError, match="no trainable parameters"):
        fit(Sequential([Flatten()]))
    forgetful = dense()
    forgetful.get_gradients = lambda: {"1.bias": np.zeros(2)}
    with pytest.raises(ValueError, match=r"no gradient of 0\.bias, 0\.kernel, 1\.kernel; set store_gradients=True"):
        fit(forgetful)
    for option in ("time_major", "stateful"):
        with pytest.raises(ValueError, match=f"layer 0, ConvLSTM2D has {option}=True"):
            fit(Sequential([ConvLSTM2D(1, 1, 1, **{option: True})]), FILMS, FILMS)
    pair = Sequential([ConvLSTM2D(1, 1, 1, return_state=True, engine="reference")])
    with pytest.raises(TypeError, match="returns more than one array"):
        fit(pair, FILMS, FILMS)
    with pytest.raises(TypeError, match="returns more than one array"):
        pair.predict(FILMS)
    with pytest.raises(ValueError, match="mode must be one of 'min', 'max', got 'up'"):
        EarlyStopping(mode="up")
