import contextlib

import numpy as np
import pytest
from graph_models import FIXED, Joined, conv, forecaster, lstm, skip, two_tasks
from layer_checks import close, equal, normal
from training_models import same

from fastclstm.layers import Dense, Dropout, Input
from fastclstm.models import Model, Sequential
from fastclstm.nn import losses
from fastclstm.nn.optimizers import SGD

X = normal(10, 4, 4, 2)
Y = {"map": normal(10, 4, 4, 1, seed=2), "numbers": normal(10, 2, seed=3)}
LOSSES = {"map": "mse", "numbers": "mae"}


def fit(model, x=X, y=None, **options):
    options = {"batch_size": 4, "seed": 0, "quiet": True, "loss": LOSSES} | options
    return model.fit(x, Y if y is None else y, **options)


def test_a_step_is_that_of_the_weighted_sum():
    model, twin = two_tasks(), two_tasks()
    weights = {"map": 0.3, "numbers": 2.0}
    history = fit(model, batch_size=10, shuffle=False, optimizer=SGD(0.5), loss_weights=weights)
    made = twin(X, training=True)
    (a, da), (b, db) = (losses.get(LOSSES[n]).value_and_gradient(made[n], Y[n]) for n in ("map", "numbers"))
    twin.backward({"map": 0.3 * da, "numbers": 2 * db})
    moved = {name: twin.parameters[name] - 0.5 * gradient for name, gradient in twin.get_gradients().items()}
    assert list(moved) == list(model.parameters)
    for name, array in model.parameters.items():
        close(array, moved[name])
    close(history["map_loss"], [a])
    close(history["numbers_loss"], [b])
    close(history["loss"], [0.3 * a + 2 * b])


def test_curves_are_named_as_in_keras():
    model = two_tasks()
    history = fit(model, epochs=2, metrics={"map": ["mae", "psnr"], "numbers": "mse"}, validation_split=0.3)
    measured = ["loss", "map_loss", "numbers_loss", "map_mae", "map_psnr", "numbers_mse"]
    assert list(history) == [*measured, *(f"val_{name}" for name in measured), "learning_rate", "seconds"]
    assert history["loss"][1] < history["loss"][0]
    last = {name: history[f"val_{name}"][-1] for name in measured}
    held = {name: y[7:] for name, y in Y.items()}
    metrics = [["mae", "psnr"], ["mse"]]
    again = model.evaluate(X[7:], held, loss=LOSSES, metrics=metrics, batch_size=4)
    assert list(again) == measured
    close([again[n] for n in measured], [last[n] for n in measured])
    predicted = model.predict(X[7:], batch_size=2)
    assert list(predicted) == ["map", "numbers"]
    close(np.mean((predicted["map"] - held["map"]) ** 2), again["map_loss"])
    close(np.mean(abs(predicted["numbers"] - held["numbers"])), again["numbers_loss"])
    assert list(model.evaluate(X, Y, loss="mse", metrics="mae")) == [
        "loss", "map_loss", "numbers_loss", "map_mae", "numbers_mae",
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["dict", "list", "batches", "batches of lists", "dict of batches"])
def test_data_in_every_form_gives_the_same_bits(form):
    model, twin = two_tasks(), two_tasks()
    fit(model, shuffle=False)
    y, x = list(Y.values()), X
    cuts = [slice(0, 4), slice(4, 8), slice(8, 10)]
    if form == "dict":
        fit(twin, X, dict(reversed(Y.items())), shuffle=False)
    elif form == "list":
        fit(twin, x, y, shuffle=False, loss=["mse", "mae"], loss_weights=[1, 1])
    else:

        def batch(cut):
            part = {n: a[cut] for n, a in Y.items()}
            if form == "batches of lists":
                return x[cut], list(part.values())
            return (x[cut], part) if form == "batches" else {"x": x[cut], "y": part}

        twin.fit([batch(cut) for cut in cuts], loss=LOSSES, seed=0, quiet=True)
    assert same(model, twin)


def test_several_inputs():
    frames, later = normal(6, 3, 5, 5, 1), normal(6, 2, 5, 5, 2, seed=2)
    y = [normal(6, 2, 5, 5, 1, seed=3), normal(6, 5, 5, 2, seed=4)]
    options = {"loss": "mse", "batch_size": 4, "seed": 1, "quiet": True, "epochs": 2}
    a, b, c = forecaster(), forecaster(), forecaster()
    history = a.fit([frames, later], y, validation_split=0.4, **options)
    assert "val_conv2d_1_loss" in history
    b.fit({"later": later, "frames": frames}, {"conv2d_1": y[1], "conv2d": y[0]}, validation_split=0.4, **options)
    held = (tuple(part[4:] for part in (frames, later)), [part[4:] for part in y])
    c.fit([frames[:4], later[:4]], [part[:4] for part in y], validation_data=held, **options)
    assert same(a, b)
    assert same(a, c)
    made, whole = a.predict([frames, later], batch_size=4), a([frames, later])
    assert isinstance(made, list)
    for part, expected in zip(made, whole, strict=True):
        close(part, expected)


def test_sample_weights_are_each_outputs_own():
    model, twin = two_tasks(), two_tasks()
    weights = {"map": normal(10, seed=5) ** 2, "numbers": np.r_[0.0, np.ones(9)]}
    gaps = {"map": Y["map"], "numbers": np.where(np.arange(10)[:, None] == 0, np.nan, Y["numbers"])}
    history = fit(model, y=gaps, sample_weight=weights, metrics="mae", batch_size=10, shuffle=False)
    made = {n: y for n, y in zip(Y, two_tasks()(X, training=True).values(), strict=True)}
    parts = [losses.get(LOSSES[n])(made[n], Y[n], weights[n]) for n in Y]
    close([history["map_loss"][0], history["numbers_loss"][0]], parts, 1e-9)
    close(history["numbers_mae"], np.mean(abs(made["numbers"] - Y["numbers"])[1:]), 1e-9)
    fit(twin, y=gaps, sample_weight=list(weights.values()), metrics="mae", batch_size=10, shuffle=False)
    assert same(model, twin)
    one, all_of_them = two_tasks(), two_tasks()
    fit(one, sample_weight=weights["map"])
    fit(all_of_them, sample_weight=dict.fromkeys(Y, weights["map"]))
    assert same(one, all_of_them)


def test_an_output_without_a_loss_needs_no_target():
    model, twin = two_tasks(), two_tasks()
    history = fit(model, y={"map": Y["map"]}, loss={"map": "mse"})
    assert list(history) == ["loss", "learning_rate", "seconds"]
    fit(twin, y=[Y["map"], None], loss=["mse", None])
    assert same(model, twin)
    for name in ("dense.kernel", "dense.bias"):
        equal(model.parameters[name], two_tasks().parameters[name])  # nothing moved it
    assert not np.array_equal(model.parameters["trunk.kernel"], two_tasks().parameters["trunk.kernel"])


@pytest.mark.parametrize("every", [1, 2])
def test_a_training_goes_on_to_the_same_bits(every, tmp_path):
    weights = {"map": np.r_[0.0, np.ones(9)], "numbers": np.ones(10)}
    options = {"sample_weight": weights, "metrics": "mae", "validation_split": 0.2, "loss_weights": {"map": 0.5},
               "early_stopping": 5, "epochs": 4}  # fmt: skip
    whole, broken, fresh = two_tasks(), two_tasks(), two_tasks()
    count = []

    def interrupt(prediction, target):
        count.append(0)
        if len(count) == 7:
            raise KeyboardInterrupt
        return 0.0

    interrupt.__name__ = steady.__name__  # the curve's
    options["metrics"] = ["mae", steady]
    expected = fit(whole, **options)
    file = {"checkpoint": tmp_path / "c", "checkpoint_every": every}
    with contextlib.suppress(KeyboardInterrupt):
        fit(broken, **options | {"metrics": ["mae", interrupt]}, **file)
    assert not same(broken, whole)
    history = fit(fresh, **options, **file, resume=True)
    assert same(fresh, whole)
    for name in set(history) - {"seconds"}:
        equal(history[name], expected[name])
    with pytest.raises(ValueError, match=r"is of another training: loss_weights.map was 0.5 and is 1.0"):
        fit(two_tasks(), **options | {"loss_weights": None}, **file, resume=True)
    other = two_tasks()
    other = Model(other.inputs, other.outputs | {"more": other.outputs["map"]})
    with pytest.raises(ValueError, match=r"is of another training: model\.outputs"):
        fit(other, **options | {"loss": LOSSES}, **file, resume=True)


def steady(prediction, target):
    return 0.0


def test_a_model_of_one_output_trains_as_a_sequential_does():
    layers = [conv(2, 3, activation="tanh"), Dropout(0.3, seed=4), Dense(3, 1, dtype="float64", seed=2)]
    x = Input((None, None, 2))
    y = x
    for layer in layers:
        y = layer(y)
    graph = Model(x, y)
    options = {"loss": "mae", "epochs": 2, "metrics": "mse", "validation_split": 0.2}
    a = fit(graph, y=Y["map"], **options)
    chain = Sequential([conv(2, 3, activation="tanh"), Dropout(0.3, seed=4), Dense(3, 1, dtype="float64", seed=2)])
    b = fit(chain, y=Y["map"], **options)
    assert list(a) == list(b) == ["loss", "mse", "val_loss", "val_mse", "learning_rate", "seconds"]
    for mine, other in zip(graph.parameters.values(), chain.parameters.values(), strict=True):
        assert mine.tobytes() == other.tobytes()
    equal(graph.predict(X), chain.predict(X))
    listed = Model([graph.inputs], [graph.outputs])
    assert list(listed.evaluate([X], [Y["map"]], loss="mae")) == ["loss"]
    equal(listed.predict([X])[0], chain.predict(X))


def test_masks_in_training():
    frames = Input((4, 5, 5, 2))
    model = Model(frames, [conv(2, 1, 1)(lstm(2, 2)(frames))])
    x, y, mask = normal(3, 4, 5, 5, 2), normal(3, 4, 5, 5, 1), np.ones((3, 4), bool)
    mask[:, 2:] = False
    with_mask = model.evaluate(x, [y], mask=mask)
    close(with_mask["loss"], np.mean((model(x, mask=mask)[0] - y) ** 2))
    assert with_mask != model.evaluate(x, [y])
    close(model.predict(x, lengths=[2, 2, 2])[0], model(x, mask=mask)[0])


def test_what_is_not_finite_is_found():
    model = two_tasks()
    with pytest.raises(FloatingPointError, match="it began in the batch: y 'numbers' holds NaN or Inf"):
        fit(model, y=Y | {"numbers": Y["numbers"] * np.nan})
    with pytest.raises(FloatingPointError, match="it began in the batch: x holds NaN"):
        fit(model, X * np.nan)
    model.get_layer("trunk").kernel = np.full((3, 3, 2, 3), np.inf)
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="in the output of layer trunk, Conv2D"):
        fit(model)


WRONG = {
    "loss of another": ({"loss": {"mapp": "mse"}}, ValueError, "loss is for 'mapp', but the outputs are 'map', 'num"),
    "losses": ({"loss": ["mse"]}, ValueError, "loss must be a dict by the names of the outputs .* got 1 items"),
    "no loss": ({"loss": [None, None]}, ValueError, "loss: no output has one"),
    "weights": ({"loss_weights": [1]}, ValueError, "loss_weights must be a dict .* or a list with one for each, got 1"),
    "weight": ({"loss_weights": {"map": -1}}, ValueError, "loss_weights must be numbers >= 0 .* that of 'map' is -1"),
    "weight without": ({"loss": {"map": "mse"}, "loss_weights": {"numbers": 1}}, ValueError, "'numbers' has no loss"),
    "y": ({"y": Y["map"]}, ValueError, "fit: y must be a list of 2 arrays, or a dict .* got ndarray"),
    "y missing": ({"y": {"map": Y["map"]}}, ValueError, "there is no y for the output 'numbers', which has a loss"),
    "y unknown": ({"y": Y | {"more": X}}, ValueError, "fit: y must have 'map', 'numbers', got 'map', .* 'more'"),
    "y short": ({"y": Y | {"map": X[:3]}}, ValueError, r"all arrays must have as many samples.*y:map \(3, 4, 4, 2\)"),
    "x": ({"x": X[..., :1]}, ValueError, r"Model: x has shape \(4, 4, 4, 1\) but must be \(None, 4, 4, 2\)"),
    "metric": ({"metrics": {"map": ["mae", "mae"]}}, ValueError, "two have the same name"),
    "metric of another": ({"metrics": {"mapp": "mae"}}, ValueError, "metrics is for 'mapp'"),
    "classes": ({"class_weight": {0: 1}}, ValueError, "class_weight is for a model of one output; give sample_weight"),
    "monitor": ({"early_stopping": None, "callbacks": 3}, TypeError, "callbacks must be one or a sequence"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_told_before_a_step(options, kind, message):
    model = two_tasks()
    with pytest.raises(kind, match=message):
        fit(model, **options)
    assert same(model, two_tasks())


def test_wrong_options_of_others():
    with pytest.raises(ValueError, match="loss_weights are for several outputs, and the model has one"):
        skip().fit(normal(2, 3, 5, 5, 2), normal(2, 3, 5, 5, 1), loss_weights=[1])
    with pytest.raises(TypeError, match="fit: x is a dict, but the model takes one array; give that"):
        Sequential([Dense(3, 1)]).fit({"x": np.ones((2, 3))}, np.ones((2, 1)))
    xs = [normal(2, 3, 5, 5, 1), normal(2, 2, 5, 5, 2)]
    with pytest.raises(ValueError, match="fit: x is arrays, but there is no y"):
        forecaster().fit(xs)
    pair = (lambda p, t: 0.0, lambda p, t: 0 * p)
    assert set(two_tasks().evaluate(X, Y, loss=pair)) == {"loss", "map_loss", "numbers_loss"}
    frames = Input((2, 3), name="a"), Input((2, 3), name="b")
    states = Model(list(frames), Joined()(list(frames)))
    equal(states.predict([np.ones((3, 2, 3)), np.zeros((3, 2, 3))]).sum(), 18)
    assert FIXED["engine"] == "reference"
