"""What every encoder–forecaster keeps, whichever layers it is made of."""

import copy

import numpy as np
import pytest
from layer_checks import check_gradients, check_saving, close, equal, normal

from fastclstm import (
    BatchNormalization,
    Conv2D,
    Conv2DTranspose,
    Conv3D,
    ConvGRU2D,
    ConvLSTM2D,
    Dropout,
    EncoderForecaster,
    LeakyReLU,
    MultiscaleForecaster,
    load,
)
from fastclstm.nn.schedules import ExponentialDecay

DRAWN_FAST = {"kernel_initializer": "zeros", "recurrent_initializer": "zeros"}
FIXED = {"dtype": "float64", "engine": "reference", "bias_initializer": "random_normal"}


def lstm(C, F, seed=0, **options):
    return ConvLSTM2D(C, F, 3, seed=seed, **FIXED | options)


def conv(C, F, seed=0, kind=Conv2D, **options):
    return kind(C, F, 3, seed=seed, **FIXED | options)


def scales(C=0, kind=lstm, **options):
    """Two scales, mirrored; the forecaster's first layer takes C channels."""
    return MultiscaleForecaster(
        [kind(1, 2), conv(2, 2, 1, stride=2), LeakyReLU(0.2), kind(2, 3, 2)],
        [kind(C, 3, 3), conv(3, 2, 4, Conv2DTranspose, stride=2), kind(2, 2, 5)],
        [conv(2, 1, 6, activation="sigmoid")], **options,
    )  # fmt: skip


def gru(C, F, seed=0, **options):
    return ConvGRU2D(C, F, 3, seed=seed, **FIXED | options)


def tied(**options):
    return MultiscaleForecaster([lstm(4, 3), conv(3, 3, 1), lstm(3, 2, 2)], head=[conv(2, 4, 3)], patch_size=2,
                                **options)  # fmt: skip


def own(**options):
    return EncoderForecaster(1, (2, 3), 3, seed=0, **FIXED | options)


FORMS = {
    "nothing": lambda: scales(),
    "zeros": lambda: scales(2, inputs="zeros"),
    "learnt": lambda: scales(2, inputs="learnt"),
    "noise": lambda: scales(1, inputs="noise", seed=3),
    "gated units": lambda: scales(kind=gru),
    "tied": lambda: tied(),
    "channels first": lambda: tied(data_format="channels_first"),
    "frames": lambda: own(),
    "patches": lambda: own(patch_size=(2, 1), recurrent_kernel_size=1),
    "one scale, nothing": lambda: own(inputs="nothing", peephole="channel"),
    "one scale, gated units": lambda: own(cell="ConvGRU2D"),
    "several": lambda: own(strides=(2, 1), inputs="learnt", sampling_channels=(2, 2)),
    "pixels": lambda: own(strides=(1, 2), peephole="elementwise", frame_size=(4, 6)),
}


def frames_for(model, T=3):
    shape = (2, T, 4, 6, 1) if model.data_format == "channels_last" else (2, T, 1, 4, 6)
    return normal(*shape)


def shaken(model):
    """With parameters that all matter."""
    rng = np.random.default_rng(1)
    model.set_parameters({n: a + 0.2 * rng.standard_normal(a.shape) for n, a in model.parameters.items()})
    return model


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    model = shaken(FORMS[form]())
    check_gradients(model, frames_for(model), count=3, tolerance=1e-6, steps=2)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_one_network_however_it_is_called(form, tmp_path):
    model = shaken(FORMS[form]())
    x = frames_for(model, 4)
    frame = x.shape[2:]
    twin = copy.deepcopy(model)
    y = model.forecast(x, 3)
    assert y.shape == model.output_shape(x.shape, 3) == (2, 3, *frame)
    close(twin(x, 3, training=True), y)
    assert "noise" in form or np.array_equal(model.forecast(x, 2), y[:, :2])
    model.save(tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert repr(loaded) == repr(model)
    assert type(loaded) is type(model)
    if "noise" in form:
        return
    equal(loaded.forecast(x, 3), y)
    states = None
    for piece in (x[:, :1], x[:, 1:3]):
        states = model.encode(piece, states)
    close(model.forecast(x[:, 3:], 3, states), y)
    equal(model.forecast(x[0], 3), y[0])
    rows = model.summary((None, *x.shape[1:]), 3).splitlines()
    assert len(rows) == len(model._sublayers) + 4


def test_one_frame_is_enough_where_one_chain_goes_on():
    model = tied()
    x = normal(2, 1, 4, 6, 1)
    close(model(x, 3, training=True), model.forecast(x, 3))
    assert model.backward(model.forecast(x, 3)).shape == x.shape


def test_zeros_are_what_nothing_is():
    nothing, zeros = scales(), scales(2, inputs="zeros")
    shared = {n: a for n, a in nothing.parameters.items() if n != "forecaster.0.layers.0.kernel"}
    zeros.set_parameters(zeros.parameters | shared)
    x = frames_for(nothing)
    close(nothing.forecast(x, 2), zeros.forecast(x, 2))


def test_noise_is_drawn_anew_and_from_the_seed():
    model, again = (scales(1, inputs="noise", seed=3) for _ in range(2))
    x = frames_for(model)
    y = model.forecast(x, 2)
    assert np.abs(model.forecast(x, 2) - y).max() > 1e-4
    equal(again.forecast(x, 2), y)


def test_inputs_that_are_partly_true():
    model = shaken(own())
    x, y = normal(3, 3, 4, 6, 1), normal(3, 4, 4, 6, 1, seed=2)
    none, every = np.zeros((3, 3), bool), np.ones((3, 3), bool)
    close(model(x, targets=y, forced=none, training=True), model(x, 4, training=True))
    close(model(x, targets=y, forced=every, training=True), model(x, targets=y, training=True))
    mixed = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], bool)
    made = model(x, targets=y, forced=mixed, training=True)
    for row in range(3):  # a sample's inputs are its own
        alone = model(x[row : row + 1], targets=y[row : row + 1], forced=mixed[row : row + 1], training=True)
        close(alone[0], made[row])
    close(made[1], model.forecast(x, 4)[1])
    check_gradients(model, x, count=4, tolerance=1e-6, targets=y, forced=mixed)
    with pytest.raises(ValueError, match=r"forced has shape \(3, 4\) but must be \(3, 3\)"):
        model(x, targets=y, forced=np.ones((3, 4)), training=True)


def losses(share, epochs=3, **options):
    x = np.random.default_rng(0).random((6, 5, 4, 4, 1))
    model = EncoderForecaster(1, 2, 3, seed=0, **FIXED)
    history = model.fit(x[:, :2], x[:, 2:], teacher_forcing=share, epochs=epochs, batch_size=3, seed=1, quiet=True,
                        **options)  # fmt: skip
    return history["loss"], model


def test_scheduled_sampling():
    free, forced = losses(False)[0], losses(True)[0]
    equal(losses(0.0)[0], free)
    equal(losses(1.0)[0], forced)
    half = losses(0.5)[0]
    equal(losses(0.5)[0], half)
    assert half[0] not in (free[0], forced[0])
    told = []
    changing = losses(lambda epoch: told.append(epoch) or float(epoch == 0))[0]
    assert sorted(set(told)) == [0, 1, 2]
    assert changing[0] == forced[0]
    assert changing[1] != forced[1]
    equal(losses(ExponentialDecay(1.0, 1, 0.5))[0][:1], forced[:1])
    for share in (1.5, -0.1, "half", None, lambda epoch: 2 - epoch):
        with pytest.raises(ValueError, match="EncoderForecaster: teacher_forcing must be True, False, a number in"):
            losses(share)


def test_a_resumed_training_draws_the_same(tmp_path):
    schedule = ExponentialDecay(0.8, 1, 0.7)
    whole, model = losses(schedule, 4)
    losses(schedule, 2, checkpoint=tmp_path / "c.safetensors")
    resumed, again = losses(schedule, 4, checkpoint=tmp_path / "c.safetensors", resume=True)
    equal(resumed, whole)
    for name, array in model.parameters.items():
        equal(again.parameters[name], array)
    with pytest.raises(ValueError, match="teacher_forcing"):
        losses(0.5, 4, checkpoint=tmp_path / "c.safetensors", resume=True)


@pytest.mark.parametrize("form", ["learnt", "tied", "noise", "several"])
def test_training(form, tmp_path):
    x = np.random.default_rng(0).random((4, 5, 4, 6, 1))
    model = FORMS[form]()
    history = model.fit(x[:, :3], x[:, 3:], epochs=4, batch_size=2, seed=0, quiet=True)
    assert history["loss"][-1] < history["loss"][0]
    assert model.predict(x[:, :3], steps=2).shape == (4, 2, 4, 6, 1)
    assert set(model.evaluate(x[:, :3], x[:, 3:])) == {"loss"}


def test_penalties_count_once():
    for model in (tied(), own()):
        plain = model
        layer = next(part for part in plain._sublayers.values() if isinstance(part, Conv2D))
        twin = copy.deepcopy(plain)
        heavy = next(part for part in twin._sublayers.values() if isinstance(part, Conv2D))
        heavy._regularizers = {"kernel": type("Double", (), {"gradient": lambda _, array: 2 * array})()}
        x = frames_for(plain)
        dy = normal(*plain.forecast(x, 3).shape, seed=4)
        gradients = []
        for each in (plain, twin):
            each(x, 3, training=True)
            each.backward(dy)
            gradients.append(each.get_gradients())
        name = next(n for n, part in plain._sublayers.items() if part is layer) + ".kernel"
        close(gradients[1].pop(name), gradients[0].pop(name) + 2 * layer.kernel)
        for other, gradient in gradients[0].items():
            close(gradients[1][other], gradient)


def test_roll_outs_on_the_cpu_are_those_of_the_reference():
    """There weights are packed once, and the kernels' gradients come with the last step alone."""
    models = [EncoderForecaster(1, (3, 2), 3, seed=0, **FIXED | {"engine": e}) for e in ("cpu", "reference")]
    x, y = normal(2, 3, 6, 7, 1), normal(2, 4, 6, 7, 1, seed=2)
    forced = np.array([[1, 0, 0], [0, 1, 0]], bool)
    for call in ({"steps": 4}, {"targets": y, "forced": forced}, {"targets": y}):
        ours, theirs = ((m(x, training=True, **call), m.backward(y), m.get_gradients()) for m in models)
        close(ours[0], theirs[0])
        close(ours[1], theirs[1])
        for name, gradient in theirs[2].items():
            close(ours[2][name], gradient)


def test_frozen_parts_and_gradients_that_nobody_asks_for():
    model = tied()
    x = frames_for(model)
    model(x, 3, training=True)
    dy = normal(2, 3, 4, 6, 1)
    model.backward(dy)
    gradients = model.get_gradients()
    model.input_gradient = False
    model.encoder[1].trainable = False
    model(x, 3, training=True)
    assert model.backward(dy) is None
    left = model.get_gradients()
    assert set(gradients) - set(left) == {"encoder.1.kernel", "encoder.1.bias"}
    for name, gradient in left.items():
        close(gradient, gradients[name])


def test_layers_that_are_no_convolutions_work_frame_by_frame():
    model = MultiscaleForecaster(
        [lstm(1, 2), BatchNormalization(2, dtype="float64"), Dropout(0.5, seed=1), lstm(2, 2, 1)],
        [lstm(0, 2, 2), lstm(2, 2, 3)], [conv(2, 1)],
    )  # fmt: skip
    x = normal(2, 20, 4, 4, 1)
    close(model.forecast(x, 2), model.forecast(x[:, 13:], 2, model.encode(x[:, :13])))
    with pytest.raises(ValueError, match=r"Conv3D: x must be \(batch, time"):
        MultiscaleForecaster([lstm(1, 2)], [lstm(0, 2)], [Conv3D(2, 1, 3, dtype="float64")])


def test_the_number_of_parameters_of_2015():
    options = {"patch_size": 4, "peephole": "channel", **DRAWN_FAST}
    assert EncoderForecaster(1, (128, 64, 64), 5, inputs="nothing", **options).num_parameters == 7_585_296
    assert EncoderForecaster(1, (128, 64, 64), 5, **options).num_parameters == 7_790_096


def test_scales_of_the_public_networks():
    """jhhuang96's layers for frames of 64², and those of Shi et al. 2017 for 480² but for what is behind the last."""
    model = EncoderForecaster(1, (64, 96, 96), 5, strides=(1, 2, 2), inputs="zeros", **DRAWN_FAST)
    kernels = {n: a.shape for n, a in model.parameters.items() if n.endswith("kernel") and "layers" not in n}
    assert kernels == {
        "encoder.0.kernel": (3, 3, 1, 16), "encoder.3.kernel": (3, 3, 64, 64), "encoder.6.kernel": (3, 3, 96, 96),
        "forecaster.1.kernel": (4, 4, 96, 96), "forecaster.4.kernel": (4, 4, 96, 96),
        "forecaster.7.kernel": (3, 3, 64, 16), "head.kernel": (1, 1, 16, 1),
    }  # fmt: skip
    cells = [a.shape[2:] for n, a in model.parameters.items() if n.endswith("layers.0.kernel")]
    assert cells == [(16, 256), (64, 384), (96, 384), (96, 384), (96, 384), (96, 256)]
    wide = EncoderForecaster(1, (64, 192, 192), 3, strides=(5, 3, 2), sampling_channels=(8, 192, 192),
                             **DRAWN_FAST)  # fmt: skip
    assert [wide.encoder[n].kernel_size for n in (0, 3, 6)] == [(7, 7), (5, 5), (3, 3)]
    assert [wide.forecaster[n].kernel_size for n in (1, 4, 7)] == [(4, 4), (5, 5), (7, 7)]
    assert wide.output_shape((1, 5, 480, 480, 1), 20) == (1, 20, 480, 480, 1)


def test_options_of_before_are_saved_as_before():
    later = {"recurrent_kernel_size", "patch_size", "inputs", "strides", "sampling_channels", "cell"}
    assert not later & set(EncoderForecaster(1, (2,), 3).options)
    assert set(own(patch_size=2, inputs="zeros").options) & later == {"patch_size", "inputs"}


def test_saving_keeps_every_byte(tmp_path):
    class Forecast(MultiscaleForecaster):
        """With a number of steps of its own, so that it can be called on frames alone."""

        def forward(self, frames, steps=2, **options):
            return super().forward(frames, steps, **options)

    model = Forecast([lstm(1, 2)], [lstm(2, 2)], [conv(2, 1)], inputs="learnt")
    check_saving(model, normal(1, 3, 5, 5, 1), tmp_path / "model")


def test_no_input_convolution():
    for engine in ("cpu", "reference"):
        none, zero = (ConvLSTM2D(C, 3, 3, seed=0, **FIXED | {"engine": engine}, num_layers=2) for C in (0, 1))
        kernel = "layers.0.kernel"
        zero.set_parameters(none.parameters | {kernel: np.zeros((3, 3, 1, 12))})
        state = [(normal(2, 4, 5, 3), normal(2, 4, 5, 3, seed=2))] * 2
        dy, results = normal(2, 3, 4, 5, 3, seed=3), []
        for layer, C in ((none, 0), (zero, 1)):
            y = layer(np.zeros((2, 3, 4, 5, C)), initial_state=state, training=True)
            assert layer.backward(dy).shape == (2, 3, 4, 5, C)
            gradients = layer.get_gradients()
            assert gradients.pop(kernel).shape == (3, 3, C, 12)
            results.append([y, *gradients.values(), *(a for pair in layer.state_gradients for a in pair)])
        for ours, theirs in zip(*results, strict=True):
            close(ours, theirs)


ERRORS = {
    r"encoder must have at least one recurrent layer": lambda: MultiscaleForecaster([conv(1, 2)], [lstm(0, 2)]),
    r"encoder must end with a recurrent layer.*layer 1, Conv2D": (
        lambda: MultiscaleForecaster([lstm(1, 2), conv(2, 2)], [lstm(0, 2)])
    ),
    r"the encoder has 2 recurrent cells, but the forecaster.* 1": (
        lambda: MultiscaleForecaster([lstm(1, 2), lstm(2, 2)], [lstm(0, 2)])
    ),
    r"h of initial_state has shape": lambda: MultiscaleForecaster([lstm(1, 2)], [lstm(0, 3)]),
    r"in_channels=0 and inputs='nothing' go together": (
        lambda: MultiscaleForecaster([lstm(1, 2)], [lstm(0, 2)], inputs="zeros")
    ),
    r"must begin with a layer that has in_channels, got LeakyReLU": (
        lambda: MultiscaleForecaster([lstm(1, 2)], [LeakyReLU(0.1), lstm(0, 2)])
    ),
    r"stands there twice": lambda: (lambda layer: MultiscaleForecaster([layer], [layer]))(lstm(1, 2)),
    r"must have one dtype, got float32, float64": (
        lambda: MultiscaleForecaster([lstm(1, 2)], [lstm(0, 2, dtype="float32")])
    ),
    r"has bidirectional=True": lambda: MultiscaleForecaster([lstm(1, 2, bidirectional=True)], [lstm(0, 2)]),
    r"is channels_first; make the layers channels_last": (
        lambda: MultiscaleForecaster([lstm(1, 2, data_format="channels_first")], [lstm(0, 2)])
    ),
    r"is recurrent; the head": lambda: MultiscaleForecaster([lstm(1, 2)], [lstm(0, 2)], [lstm(2, 1)]),
    r"inputs must be 'frames', got 'zeros'": lambda: MultiscaleForecaster([lstm(1, 2)], inputs="zeros"),
    r"inputs must be one of": lambda: MultiscaleForecaster([lstm(1, 2)], [lstm(0, 2)], inputs="ones"),
    r"give in_channels": lambda: MultiscaleForecaster([LeakyReLU(0.1), lstm(1, 2)], [lstm(0, 2)]),
    r"a multiple of a patch's 4 pixels": lambda: MultiscaleForecaster([lstm(1, 2)], [lstm(0, 2)], patch_size=2),
    r"inputs must be one of .*, got 'frames'": lambda: own(strides=(1, 2), inputs="frames"),
    r"give strides too": lambda: own(sampling_channels=(1, 2)),
    r"ConvGRU2D has no peephole": lambda: own(cell="ConvGRU2D", peephole="channel"),
    r"cell must be one of": lambda: own(cell="LSTM"),
    r"recurrent_kernel_size \[3\] lists 1 layers": lambda: own(recurrent_kernel_size=[3]),
    r"targets are inputs of a forecaster that reads frames": (
        lambda: scales()(normal(1, 2, 4, 6, 1), targets=normal(1, 2, 4, 6, 1), training=True)
    ),
    r"teacher_forcing is for a forecaster that reads frames": (
        lambda: scales().fit(normal(1, 2, 4, 6, 1), normal(1, 2, 4, 6, 1), teacher_forcing=True)
    ),
    r"states must be what encode returned": lambda: scales().forecast(normal(1, 2, 4, 6, 1), 1, [(1, 2)]),
    r"frames of 4 × 7 pixels do not fit: .*; pad them to 4 × 8$": (
        lambda: EncoderForecaster(1, (2, 3), 3, strides=(1, 2)).forecast(normal(1, 2, 4, 7, 1), 1)
    ),
    r"frames of 7 × 9 pixels do not fit: .* pad them to 8 × 12$": (
        lambda: EncoderForecaster(1, 2, 3, strides=2, patch_size=(1, 2)).output_shape((1, 2, 7, 9, 1))
    ),
    r"MultiscaleForecaster: frames of 5 × 4 pixels do not fit: .*; pad them to 6 × 4$": (
        lambda: scales().forecast(normal(1, 2, 5, 4, 1), 1)
    ),
    r"blocks of 2 × 2 pixels do not fill .*; pad them to 6 × 6$": lambda: tied().forecast(normal(1, 2, 5, 6, 1), 1),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()


def test_lists_of_layers_are_asked_for():
    for chains in (("a", [lstm(0, 2)]), (None, None), ([lstm(1, 2), "a"], None)):
        with pytest.raises(TypeError, match=r"MultiscaleForecaster: .*encoder.* must be .*list"):
            MultiscaleForecaster(*chains)
