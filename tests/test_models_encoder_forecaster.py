import numpy as np
import pytest
from layer_checks import check_gradients, check_saving, close, equal, normal

from fastclstm.layers import ConvLSTM2DCell, Layer
from fastclstm.models import EncoderForecaster

FIXED = {"dtype": "float64", "seed": 0, "bias_initializer": "random_normal"}


@pytest.fixture(params=["reference", "cpu"])
def engine(request):
    return request.param


def cells(model, prefix):
    """One cell a layer, with the parameters whose names begin so."""
    made = []
    for layer in (layer for name, layer in model._sublayers.items() if name.startswith(prefix)):
        kernels = [n for n in layer.parameters if n.rpartition(".")[2] == "kernel"]
        for name in kernels:
            stem = name.rpartition(".")[0]
            kernel = layer.parameters[name]
            cell = ConvLSTM2DCell(kernel.shape[2], kernel.shape[3] // 4, kernel.shape[:2], dtype="float64")
            cell.set_parameters({n: layer.parameters[f"{stem}.{n}"] for n in ("kernel", "recurrent_kernel", "bias")})
            made.append(cell)
    return made


def by_hand(model, frames, steps, targets=None):
    """The network of section 3.2 of the paper, one cell and one step at a time."""
    encoder, forecaster = cells(model, "encoder"), cells(model, "forecaster")
    states = [(None, None)] * len(encoder)
    for t in range(frames.shape[1]):
        x = frames[:, t]
        for index, cell in enumerate(encoder):
            states[index] = cell(x, *states[index])
            x = states[index][0]
    x, made = frames[:, -1], []
    for t in range(steps):
        for index, cell in enumerate(forecaster):
            states[index] = cell(x, *states[index])
            x = states[index][0]
        z = np.concatenate([h for h, _ in states], -1) @ model.head.kernel[0, 0] + model.head.bias
        made.append(1 / (1 + np.exp(-z)))
        x = made[-1] if targets is None else targets[:, t]
    return np.stack(made, 1)


@pytest.mark.parametrize("hidden", [(3,), (3, 2), (2, 3, 1)], ids=str)
def test_it_is_the_network_of_the_paper(hidden, engine):
    model = EncoderForecaster(2, hidden, 3, **FIXED, engine=engine)
    frames, targets = normal(2, 4, 5, 6, 2), normal(2, 3, 5, 6, 2, seed=2)
    expected = by_hand(model, frames, 3)
    close(model.forecast(frames, 3), expected)
    close(model(frames, 3), expected)
    close(model(frames, 3, training=True), expected)
    close(model(frames, targets=targets), expected)
    close(model(frames, targets=targets, training=True), by_hand(model, frames, 3, targets))


OPTIONS = [
    {},
    {"kernel_size": [3, 1]},
    {"head_activation": "linear", "padding_mode": "circular"},
    {"data_format": "channels_first"},
    {"peephole": "elementwise", "frame_size": (4, 5)},
    {"normalization": "layer", "peephole": "conv"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("forced", [False, True])
def test_gradients(options, forced, engine):
    model = EncoderForecaster(**{"in_channels": 1, "hidden_channels": (2, 3), "kernel_size": 3} | options, **FIXED,
                              engine=engine)  # fmt: skip
    shape = (2, 3, 1, 4, 5) if "data_format" in options else (2, 3, 4, 5, 1)
    rng = np.random.default_rng(1)
    model.set_parameters({n: a + 0.2 * rng.standard_normal(a.shape) for n, a in model.parameters.items()})
    model.head.kernel = 3 * model.head.kernel  # so that frames matter when fed back
    if forced:
        check_gradients(model, normal(*shape), targets=normal(*shape, seed=2), count=3, tolerance=1e-6)
    else:
        check_gradients(model, normal(*shape), steps=3, count=3, tolerance=1e-6)


def test_one_step_is_the_same_with_and_without_the_truth(engine):
    model, frames = EncoderForecaster(1, (2, 2), 3, **FIXED, engine=engine), normal(2, 3, 4, 4, 1)
    free = model(frames, 1, training=True)
    dx = model.backward(free)
    gradients = model.get_gradients()
    forced = model(frames, targets=normal(2, 1, 4, 4, 1, seed=3), training=True)
    equal(free, forced)
    close(model.backward(free), dx)
    for name, gradient in model.get_gradients().items():
        close(gradient, gradients[name])


def test_longer_forecasts_begin_as_shorter_ones_and_streams_as_wholes(engine):
    model, frames = EncoderForecaster(1, (3, 2), 3, **FIXED, engine=engine), normal(2, 40, 4, 4, 1)
    whole = model.forecast(frames, 5)
    equal(model.forecast(frames, 2), whole[:, :2])
    states = None
    for start in range(0, 39, 13):
        states = model.encode(frames[:, start : start + 13], states)
    equal(model.forecast(frames[:, 39:], 5, states), whole)
    close(whole, by_hand(model, frames, 5))


def test_every_frame_is_computed_once(monkeypatch):
    model = EncoderForecaster(1, (2, 2), 3, engine="reference", seed=0)
    steps = []
    for layer in (model.encoder, *model.forecaster):
        original = layer.forward

        def counted(x, *args, original=original, **kwargs):
            steps.append(x.shape[1])
            return original(x, *args, **kwargs)

        monkeypatch.setattr(layer, "forward", counted)
    model.forecast(np.zeros((1, 20, 4, 4, 1)), 6)
    assert steps == [16, 4] + [1, 1] * 6


def test_freezing_a_part():
    model, frames = EncoderForecaster(1, (2,), 3, **FIXED, engine="reference"), normal(1, 2, 4, 4, 1)
    model.encoder.trainable = False
    y = model(frames, 2, training=True)
    assert model.backward(y).shape == frames.shape
    assert list(model.get_gradients()) == list(model.trainable_parameters)
    assert not any(name.startswith("encoder") for name in model.get_gradients())
    model.trainable = False
    model(frames, 2, training=True)
    model.backward(y)
    assert model.get_gradients() == {}


def test_an_empty_batch_and_float32(engine):
    model = EncoderForecaster(1, (2, 2), 3, seed=0, engine=engine)
    assert model.forecast(np.zeros((0, 3, 4, 4, 1)), 2).shape == (0, 2, 4, 4, 1)
    y = model(np.zeros((0, 3, 4, 4, 1)), 2, training=True)
    assert model.backward(y).shape == (0, 3, 4, 4, 1)
    frames = normal(2, 3, 4, 4, 1)
    y = model(frames, 2, training=True)
    assert y.dtype == model.backward(y).dtype == np.float32
    assert y.shape == model.output_shape(frames.shape, 2)
    with pytest.raises(RuntimeError, match="training"):
        EncoderForecaster(1, (2,), 3).backward(y)


def test_defaults_are_those_of_the_paper():
    model = EncoderForecaster(1)
    shapes = {name: array.shape for name, array in model.parameters.items() if name.endswith(".kernel")}
    assert model.kernel_size == (5, 5)
    assert model.hidden_channels == (128, 64, 64)
    assert shapes["head.kernel"] == (1, 1, 256, 1)
    assert shapes["encoder.layers.1.kernel"] == (5, 5, 128, 256)
    assert model.head.activation == "sigmoid"
    assert isinstance(model, Layer)


def test_unknown_options_of_its_layers_are_told():
    for options in ({"peephole": "all"}, {"padding_mode": "reflect"}, {"engine": "gpu"}, {"head_activation": "max"}):
        with pytest.raises(ValueError, match=r"must be one of|unknown"):
            EncoderForecaster(1, (2,), 3, **options)


def test_errors():
    with pytest.raises(ValueError, match="EncoderForecaster: in_channels must be"):
        EncoderForecaster(0)
    with pytest.raises(ValueError, match="EncoderForecaster: hidden_channels must name"):
        EncoderForecaster(1, ())
    model = EncoderForecaster(2, (2,), 3)
    for frames, message in (
        (np.zeros((2, 4, 4)), r"frames must be \(batch, time, height, width, channels\), got 3D \(2, 4, 4\); add the"),
        (
            np.zeros((2, 2, 4, 4)),
            r"got 4D .*; add the missing axis: x\[np.newaxis\] .*, x\[\.\.\., np.newaxis\]",
        ),
        (np.zeros((1, 2, 4, 4, 3)), "frames must have 2 channels"),
        (np.zeros((1, 0, 4, 4, 2)), "at least one time step"),
    ):
        for call in (model.encode, lambda x: model.forecast(x, 2), lambda x: model(x, 2), lambda x: model(x, 2, True)):
            with pytest.raises(ValueError, match=f"EncoderForecaster: .*{message}"):
                call(frames)
    frames = np.zeros((1, 2, 4, 4, 2))
    with pytest.raises(ValueError, match="EncoderForecaster: steps must be"):
        model.forecast(frames, 0)
    with pytest.raises(ValueError, match="EncoderForecaster: give steps"):
        model(frames)
    with pytest.raises(ValueError, match=r"EncoderForecaster: targets has shape \(1, 2, 4, 4, 2\) but must be \(1, 3,"):
        model(frames, 3, targets=frames)
    model = EncoderForecaster(2, (2,), 3, engine="reference")
    model(frames, 3, training=True)
    with pytest.raises(ValueError, match="EncoderForecaster: dy has shape"):
        model.backward(frames)


@pytest.mark.torch
def test_arrays_come_back_as_their_kind():
    torch = pytest.importorskip("torch")
    model = EncoderForecaster(1, (2,), 3, engine="reference")
    assert isinstance(model.forecast(torch.zeros(1, 2, 3, 3, 1), 2), torch.Tensor)
    y = model(torch.zeros(1, 2, 3, 3, 1), 2, training=True)
    assert isinstance(model.backward(y), torch.Tensor)


def test_saving(tmp_path):
    model = EncoderForecaster(1, (3, 2), [3, (1, 3)], head_activation="linear", seed=0, engine="reference")
    frames = normal(1, 3, 5, 5, 1)
    model.save(tmp_path / "model.safetensors")
    equal(EncoderForecaster.load(tmp_path / "model.safetensors").forecast(frames, 3), model.forecast(frames, 3))


def test_saving_keeps_every_byte(tmp_path):
    class Forecast(EncoderForecaster):
        """With a number of steps of its own, so that it can be called on frames alone."""

        def forward(self, frames, steps=2, **options):
            return super().forward(frames, steps, **options)

    check_saving(Forecast(1, (3, 2), 3, seed=0, engine="reference"), normal(1, 3, 5, 5, 1), tmp_path / "model")


def test_a_list_of_kernel_sizes_has_one_a_layer(tmp_path):
    model = EncoderForecaster(1, (4, 2), [3, 5], seed=0, engine="reference")
    assert model.kernel_size == ((3, 3), (5, 5))
    shapes = [layer.parameters["layers.0.kernel"].shape[:2] for layer in model.forecaster]
    assert shapes == [(3, 3), (5, 5)]
    assert model.encoder.parameters["layers.1.kernel"].shape[:2] == (5, 5)
    assert EncoderForecaster(1, (4, 2), (3, 5)).kernel_size == (3, 5)
    model.save(tmp_path / "model.safetensors")
    assert EncoderForecaster.load(tmp_path / "model.safetensors").kernel_size == ((3, 3), (5, 5))
    with pytest.raises(ValueError, match=r"EncoderForecaster: kernel_size \[3, 5, 3\] lists 3 layers but .* names 2"):
        EncoderForecaster(1, (4, 2), [3, 5, 3])


def test_forecasts_between_a_training_call_and_backward_do_no_harm():
    model, frames = EncoderForecaster(1, (2, 2), 3, **FIXED, engine="reference"), normal(2, 3, 4, 4, 1)
    y = model(frames, 2, training=True)
    dx, gradients = model.backward(y), model.get_gradients()
    model(frames, 2, training=True)
    model.encode(frames[:1])
    model.forecast(frames[:1], 3)
    equal(model.backward(y), dx)
    for name, gradient in model.get_gradients().items():
        equal(gradient, gradients[name])


@pytest.mark.parametrize("name", ["use_bias", "unit_forget_bias"])
def test_flags_are_true_or_false(name):
    with pytest.raises(ValueError, match=f"EncoderForecaster: {name} must be True or False, got 'no'"):
        EncoderForecaster(1, (2,), 3, **{name: "no"})


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_a_single_sequence_is_a_batch_of_one(data_format):
    model = EncoderForecaster(2, (3, 2), 3, **FIXED, data_format=data_format, engine="reference")
    frames, targets = normal(4, 5, 6, 2), normal(3, 5, 6, 2, seed=2)
    if data_format == "channels_first":
        frames, targets = np.moveaxis(frames, -1, 1), np.moveaxis(targets, -1, 1)
    assert model.output_shape(frames.shape, 3) == targets.shape
    equal(model.forecast(frames, 3), model.forecast(frames[None], 3)[0])
    equal(model(frames, targets=targets), model(frames[None], targets=targets[None])[0])
    states = model.encode(frames[:2])
    for pair, expected in zip(states, model.encode(frames[None, :2]), strict=True):
        for array, whole in zip(pair, expected, strict=True):
            equal(array, whole[0])
    equal(model.forecast(frames[2:], 2, states), model.forecast(frames, 2))
    equal(model(frames, targets=targets, training=True), model(frames[None], targets=targets[None], training=True)[0])
    dx = model.backward(targets[None])
    model(frames, targets=targets, training=True)
    equal(model.backward(targets), dx[0])
    with pytest.raises(ValueError, match=r"targets must be \(time, .*\), got 5D"):
        model(frames, targets=targets[None])
    for call in (lambda: model.predict(frames, steps=2), lambda: model.fit(frames, frames, quiet=True)):
        with pytest.raises(ValueError, match=r"x .* is one sequence, but samples are on the first axis; give x\["):
            call()


def test_gradients_of_a_single_sequence():
    model = EncoderForecaster(1, (2,), 3, **FIXED, engine="reference")
    check_gradients(model, normal(3, 4, 4, 1), steps=2)


def test_summary():
    model = EncoderForecaster(1, (4, 2), 3)
    table = model.summary((None, 5, 8, 8, 1), steps=3).splitlines()
    assert [line.split() for line in table[:1] + table[2:6]] == [
        ["part", "layer", "output", "shape", "parameters"],
        ["encoder", "ConvLSTM2D", "(None,", "8,", "8,", "2)", "1,176"],
        ["forecaster.0", "ConvLSTM2D", "(None,", "3,", "8,", "8,", "4)", "736"],
        ["forecaster.1", "ConvLSTM2D", "(None,", "3,", "8,", "8,", "2)", "440"],
        ["head", "Conv2D", "(None,", "3,", "8,", "8,", "1)", "7"],
    ]
    assert table[-1] == "2,359 parameters, 2,359 trainable, 0.0 MB"
    assert "shape" not in model.summary()
    first = EncoderForecaster(1, (4, 2), 3, data_format="channels_first")
    assert "(2, 3, 4, 8, 8)" in first.summary((2, 5, 1, 8, 8), steps=3)
    with pytest.raises(ValueError, match="EncoderForecaster: frames must have 1 channels"):
        model.summary((2, 5, 8, 8, 3))


def test_what_it_has_no_use_for_is_refused():
    model, frames = EncoderForecaster(1, (2,), 3, seed=0, engine="reference"), np.zeros((2, 3, 5, 5, 1), np.float32)
    for options in ({"lengths": [1, 2]}, {"mask": np.ones((2, 3))}):
        (name,) = options
        for call in (
            lambda options: model.fit(frames, frames, quiet=True, **options),
            lambda options: model.evaluate(frames, frames, **options),
            lambda options: model.predict(frames, steps=2, **options),
        ):
            with pytest.raises(ValueError, match=f"EncoderForecaster takes no {name}"):
                call(options)
    with pytest.raises(ValueError, match=r"EncoderForecaster: y must be \(batch, time, .*\), got 1D \(2,\)"):
        model.fit(frames, np.zeros(2), quiet=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute_changes_nothing(engine, recompute):
    model = EncoderForecaster(1, (3, 2), 3, recompute=recompute, **FIXED, engine=engine)
    plain = EncoderForecaster(1, (3, 2), 3, **FIXED, engine=engine)
    frames = normal(2, 4, 5, 6, 1)
    dy = normal(2, 3, 5, 6, 1)
    for each in (model, plain):
        each(frames, steps=3, training=True)
    close(model.backward(dy), plain.backward(dy), 1e-13)
    assert model.encoder.recompute is recompute
    for name, gradient in plain.get_gradients().items():
        close(model.get_gradients()[name], gradient, 1e-13)
