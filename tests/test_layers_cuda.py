"""Layers on a GPU, or on what stands in for one: NumPy's numbers, arrays that stay there, and what is refused."""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
from cuda_cases import Exchanged, Interfaced
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclstm.engines.cuda import devices
from fastclstm.engines.cuda.device import DeviceArray
from fastclstm.engines.cuda.dlpack import CUDA
from fastclstm.layers import (
    Activation,
    Add,
    Average,
    Concatenate,
    Conv2D,
    Conv2DTranspose,
    Conv3D,
    Conv3DTranspose,
    ConvLSTM2D,
    ConvLSTM2DCell,
    Dense,
    Dropout,
    Flatten,
    LeakyReLU,
    Maximum,
    MaxPooling2D,
    MaxPooling3D,
    Multiply,
    Permute,
    Reshape,
    Softmax,
    SpatialDropout2D,
    Subtract,
    TimeDistributed,
    TimeDistributionCalculator,
)
from fastclstm.models import EncoderForecaster, Sequential


@pytest.fixture(scope="module", autouse=True)
def gpu(cuda_device):
    with devices.using(cuda_device):
        yield cuda_device


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def mapped(change, value):
    if isinstance(value, tuple | list):
        return type(value)(mapped(change, item) for item in value)
    return change(value) if isinstance(value, np.ndarray | DeviceArray) else value


def put(value):
    """Nested arrays on the device."""
    return mapped(devices.current().put, value)


def got(value):
    """Nested arrays of the device as NumPy's: all of them are there."""

    def get(array):
        assert isinstance(array, DeviceArray)
        return array.device.get(array)

    return mapped(get, value)


def close(result, expected, tolerance=1e-9):
    if isinstance(expected, dict):
        assert list(result) == list(expected)
        for name, array in expected.items():
            close(result[name], array, tolerance)
    elif isinstance(expected, tuple | list):
        assert type(result) is type(expected)
        for one, other in zip(result, expected, strict=True):
            close(one, other, tolerance)
    elif expected is None:
        assert result is None
    else:
        assert type(result) is np.ndarray
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


def randoms(like, seed=7):
    """Nested arrays of the same shapes and dtypes."""
    rng = np.random.default_rng(seed)
    return mapped(lambda array: rng.standard_normal(array.shape).astype(array.dtype), like)


def engines(layer, name):
    """A copy of a layer whose layers that have the option compute on the engine `name`."""
    twin = copy.deepcopy(layer)

    def change(part):
        if "engine" in part.options:
            part.engine = name
        for inner in part._sublayers.values():
            change(inner)

    change(twin)
    return twin


def run(layer, x, seed=7, **options):
    """Outputs, dx and the parameters' gradients for random cotangents of the output."""
    y = layer(x, training=True, **options)
    there = not isinstance(x, np.ndarray)
    dy = randoms(got(y) if there else y, seed)
    dx = layer.backward(put(dy) if there else dy)
    return (got(y), got(dx)) if there else (y, dx), layer.get_gradients()


def check(layer, x, tolerance=1e-9, inference=True, **options):
    """A layer gives the reference's numbers on arrays of the device and, with engine="cuda", on NumPy's."""
    expected = run(engines(layer, "reference"), x, **options)
    for engine, array in ((None, put(x)), ("cuda", put(x)), ("cuda", x)):
        close(run(engines(layer, engine), array, **options), expected, tolerance)
    if inference:
        y = engines(layer, "reference")(x, **options)
        close(got(engines(layer, None)(put(x), **options)), y, tolerance)
        close(engines(layer, "cuda")(x, **options), y, tolerance)


@contextmanager
def counted(gpu, monkeypatch):
    """Shapes of what is copied to the device and from it inside."""
    copies = {"put": [], "get": []}

    def counting(name):
        original = getattr(gpu, name)

        def counted(array):
            copies[name].append(array.shape)
            return original(array)

        return counted

    with monkeypatch.context() as patch:
        for name in copies:
            patch.setattr(gpu, name, counting(name))
        yield copies


# --- ConvLSTM2D ---


@st.composite
def stacks(draw):
    """Options of ConvLSTM2D in float64, of which every one is drawn."""
    num_layers = draw(st.integers(1, 2))
    options = {
        "in_channels": 2, "out_channels": draw(st.integers(2, 3)), "kernel_size": draw(st.integers(1, 3)),
        "padding": draw(st.sampled_from(["same", 1])), "stride": draw(st.sampled_from([1, 2])),
        "leaky_relu_slope": draw(st.sampled_from([None, 0.2])), "num_layers": num_layers,
        "data_format": draw(st.sampled_from(["channels_last", "channels_first"])), "dtype": "float64", "seed": 1,
        "peephole": draw(st.sampled_from([None, "channel", "elementwise"])),
        "cell_clip": draw(st.sampled_from([None, 0.5])), "activation": draw(st.sampled_from(["tanh", "relu"])),
        "peephole_initializer": "random_normal",
        **{name: draw(st.booleans()) for name in ("return_sequences", "return_state", "go_backwards",
           "zero_output_for_mask", "time_major", "recompute", "use_bias", "bidirectional")},
        "merge_mode": draw(st.sampled_from(["concat", "sum", "mul", "ave", None])),
        "time_dropout": draw(st.sampled_from([0.0, 0.4])),
    }  # fmt: skip
    if num_layers == 2 and options["merge_mode"] is None:
        options["merge_mode"] = "ave"
    if options["peephole"] == "elementwise":
        options["frame_size"] = 4, 3
    return options, draw(st.booleans()), draw(st.sampled_from([None, "mask", "lengths"])), draw(st.booleans())


@settings(max_examples=16)
@given(drawn=stacks())
def test_stacks_of_any_options(drawn):
    options, batched, masking, with_state = drawn
    layer = ConvLSTM2D(**options)
    x = normal(2, 3, 4, 3, 2)
    called = {}
    if masking == "mask":
        called["mask"] = np.array([[1, 0, 1], [0, 1, 1]], bool)
    elif masking == "lengths":
        called["lengths"] = np.array([2, 3])
    if options["data_format"] == "channels_first":
        x = np.moveaxis(x, -1, 2)
    if not batched:
        x, called = x[0], {name: value[:1] if name == "lengths" else value[0] for name, value in called.items()}
    elif options["time_major"]:
        x = x.swapaxes(0, 1)
        called |= {"mask": called["mask"].T} if masking == "mask" else {}
    x = np.ascontiguousarray(x)
    reference = engines(layer, "reference")
    states = None
    if with_state:
        shapes = reference._state_shapes((2 if batched else 1, 4, 3, 2))
        states = [tuple(reference._layout(x.shape).write(normal(*shape, seed=n)) for n in (4, 5)) for shape in shapes]

    def outcome(layer, kind, back):
        given = {name: kind(value) if name == "mask" else value for name, value in called.items()}
        if with_state:
            given["initial_state"] = mapped(kind, states)
        y = layer(kind(x), training=True, **given)
        outputs, last = y if options["return_state"] else (y, None)
        dy, dstates = randoms(back(outputs)), None if last is None else randoms(back(last), 8)
        dx = layer.backward(mapped(kind, dy), mapped(kind, dstates))
        state_gradients = layer.state_gradients if with_state else None
        return back(outputs), back(last), back(dx), back(state_gradients), layer.get_gradients()

    expected = outcome(reference, lambda array: array, lambda value: value)
    close(outcome(engines(layer, None), put, got), expected)
    close(outcome(engines(layer, "cuda"), lambda array: array, lambda value: value), expected)


def test_long_sequences_in_parts():
    """Stacked layers of which only the last output is wanted."""
    layer = ConvLSTM2D(1, 2, 3, num_layers=2, return_sequences=False, return_state=True, dtype="float64", seed=0)
    x = normal(1, 35, 3, 3, 1)
    close(got(layer(put(x))), engines(layer, "reference")(x))


def test_states_that_are_kept_stay_there(gpu, monkeypatch):
    layer = ConvLSTM2D(1, 2, 3, stateful=True, dtype="float64", seed=0)
    reference, x = engines(layer, "reference"), normal(2, 4, 3, 3, 1)
    expected = [reference(x[:, :2]), reference(x[:, 2:])]
    first, second = put(x[:, :2].copy()), put(x[:, 2:].copy())
    y = [layer(first)]
    with counted(gpu, monkeypatch) as copies:
        y.append(layer(second))
    assert copies["get"] == []
    assert all(shape not in copies["put"] for shape in (second.shape, (2, 3, 3, 2)))
    close(got(y), expected)
    close(layer.states, reference.states)
    copied = copy.deepcopy(layer)  # and to NumPy arrays, which go on in the processor's memory
    for twin in (copied, layer):
        twin.engine = "reference"
        close(twin(x[:, :1]), engines(reference, "reference")(x[:, :1]))


def test_moving_statistics_become_weights():
    layer = ConvLSTM2D(2, 3, 3, normalization="batch", num_layers=2, dtype="float64", seed=0, engine="reference")
    layer(normal(4, 3, 5, 5, 2), training=True)
    x = normal(2, 3, 5, 5, 2, seed=1)
    expected = layer(x)
    close(got(engines(layer, None)(put(x))), expected)
    close(engines(layer, "cuda")(x), expected)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"normalization": "layer"}, "normalization"), ({"dropout": 0.5}, "dropout_masks"),
     ({"recurrent_dropout": 0.5}, "dropout_masks"), ({"peephole": "conv"}, "convolutional peepholes"),
     ({"normalization": "batch"}, "normalization"), ({"activation": (np.sin, np.cos)}, "activations of your own"),
     ({"activity_regularizer": "l2"}, "activity_regularizer")],
)  # fmt: skip
def test_what_the_kernels_do_not_know(options, named):
    """Refused with an x on a GPU; of NumPy's the engine computes what it can."""
    x = normal(2, 2, 4, 3, 1)
    layer = ConvLSTM2D(1, 2, 3, dtype="float64", seed=0, **options)
    with pytest.raises(NotImplementedError, match=named):
        engines(layer, None)(put(x), training=True)
    close(run(engines(layer, "cuda"), x), run(engines(layer, "reference"), x))


# --- The cell ---


@pytest.mark.parametrize("options", [{}, {"stride": 2, "peephole": "channel"}, {"data_format": "channels_first"}])
@pytest.mark.parametrize("batched", [True, False])
def test_cell(options, batched):
    cell = ConvLSTM2DCell(2, 3, 3, dtype="float64", seed=0, peephole_initializer="random_normal", **options)
    x = normal(2, 2, 4, 4) if options.get("data_format") else normal(2, 4, 4, 2)
    x = x if batched else x[0].copy()
    reference = engines(cell, "reference")
    state = randoms(reference(x))

    def outcome(cell, kind, back):
        h, c = cell(kind(x), *map(kind, state), training=True)
        gradients = cell.backward(*map(kind, randoms((back(h), back(c)))))
        step = cell.step(kind(x), kind(state[0]))
        return back((h, c)), back(gradients), cell.get_gradients(), back(cell(kind(x))), back(step)

    expected = outcome(reference, lambda array: array, lambda value: value)
    close(outcome(engines(cell, None), put, got), expected)
    close(outcome(engines(cell, "cuda"), lambda array: array, lambda value: value), expected)


def test_steps_into_memory_of_the_caller():
    cell = ConvLSTM2DCell(1, 2, 3, seed=0, engine="cuda")
    x, out = normal(1, 4, 4, 1), (np.empty((1, 4, 4, 2), "f4"), np.empty((1, 4, 4, 2), "f4"))
    assert cell.step(x, out=out)[0] is out[0]
    close(out, engines(cell, "reference")(x), 1e-5)
    with pytest.raises(TypeError, match=r"^ConvLSTM2DCell: out is in the processor's memory, but x is on a GPU; leave"):
        cell.step(put(x.astype("f4")), out=out)


# --- Layers of frames, and of anything ---


LAYERS = {
    "Conv2D": (Conv2D(2, 3, 3, activation="tanh", dtype="float64", seed=0), (2, 5, 4, 2)),
    "Conv2D of sequences": (Conv2D(2, 3, (2, 3), stride=2, dtype="float64", seed=0), (2, 2, 5, 4, 2)),
    "Conv2D channels first": (
        Conv2D(2, 3, 3, activation="relu", data_format="channels_first", dtype="float64", seed=0), (2, 2, 2, 4, 3)
    ),
    "Conv3D": (Conv3D(2, 3, (2, 3, 3), activation="sigmoid", dtype="float64", seed=0), (2, 3, 4, 3, 2)),
    "Conv3D channels first": (
        Conv3D(2, 3, 3, data_format="channels_first", padding_mode="circular", dtype="float64", seed=0), (2, 2, 3, 4, 3)
    ),
    "Conv2D in groups": (Conv2D(4, 6, 3, groups=2, dtype="float64", seed=0), (2, 4, 3, 4)),
    "Conv2DTranspose": (
        Conv2DTranspose(2, 3, 3, stride=2, activation="mish", dtype="float64", seed=0), (2, 2, 3, 4, 2)
    ),
    "Conv2DTranspose channels first": (
        Conv2DTranspose(2, 3, 3, padding=1, activation="relu6", data_format="channels_first", dtype="float64", seed=0),
        (2, 2, 3, 4),
    ),
    "Conv3DTranspose": (
        Conv3DTranspose(2, 3, (2, 3, 3), stride=(1, 2, 2), output_padding=(0, 1, 0), padding=(0, 1, 1), dtype="float64",
                        seed=0), (2, 3, 3, 2, 2)
    ),
    "Reshape": (Reshape((4, -1)), (3, 2, 4)),
    "Permute": (Permute((3, 1, 2)), (2, 3, 4, 5)),
    "SpatialDropout2D": (SpatialDropout2D(0.4, seed=1), (2, 3, 4, 5)),
    "MaxPooling3D": (MaxPooling3D(2, 1), (2, 3, 4, 5, 3)),
    "MaxPooling3D channels first": (MaxPooling3D(2, data_format="channels_first"), (2, 3, 4, 4, 5)),
    "MaxPooling2D": (MaxPooling2D(2), (2, 3, 4, 5, 3)),
    "MaxPooling2D channels first": (MaxPooling2D(2, data_format="channels_first"), (2, 3, 4, 5)),
    "LeakyReLU": (LeakyReLU(0.3), (3, 4, 2)),
    "LeakyReLU of slope 0": (LeakyReLU(0), (3, 4)),
    "Activation": (Activation("gelu"), (3, 4)),
    "Activation linear": (Activation("linear"), (3, 4)),
    "Flatten": (Flatten(), (3, 4, 2)),
    "Dropout": (Dropout(0.4, seed=1), (3, 4)),
    "TimeDistributionCalculator": (TimeDistributionCalculator(0.5, 4, seed=1), (3, 4, 2)),
    "TimeDistributed": (TimeDistributed(Conv2D(2, 3, 3, dtype="float64", seed=0)), (2, 3, 4, 3, 2)),
    "TimeDistributed ConvLSTM2D": (
        TimeDistributed(ConvLSTM2D(1, 2, 3, return_sequences=False, dtype="float64", seed=0)), (2, 2, 2, 4, 3, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    layer, shape = LAYERS[name]
    check(layer, normal(*shape))


@pytest.mark.parametrize("layer", [Concatenate(), Concatenate(1), Add(), Subtract(), Multiply(), Average()], ids=repr)
def test_merging(layer):
    arrays = [normal(2, 3, 4, seed=seed) for seed in range(2)]
    y = layer(arrays, training=True)
    dy = normal(*y.shape, seed=5)
    gradients = layer.backward(dy)
    on_gpu = layer([put(array) for array in arrays], training=True)
    close(got(on_gpu), y)
    close(got(layer.backward(put(dy))), gradients)


def test_merging_what_is_not_computed_there():
    layer = Add()
    y = layer([put(normal(2, 3, 4)), put(normal(2, 3, 1))], training=True)
    with pytest.raises(TypeError, match=r"are on a GPU, where gradients are not summed; give them one shape, or move"):
        layer.backward(put(normal(*y.shape)))
    with pytest.raises(TypeError, match="Maximum: x is on a GPU, where this layer does not compute; move x to the CPU"):
        Maximum()([put(normal(2, 3))] * 2)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_indices_of_maxima(data_format):
    layer, x = MaxPooling3D(2, data_format=data_format, return_indices=True), normal(2, 4, 4, 4, 3)
    expected = engines(layer, "reference")
    y, indices = expected(x, training=True)
    there = layer(put(x), training=True)
    close(got(there), (y, indices))
    close(got(layer.backward(put(y))), expected.backward(y))


def test_an_empty_batch():
    for layer, shape in LAYERS.values():
        check(layer, np.zeros((0, *shape[1:])))
    check(ConvLSTM2D(2, 2, 3, num_layers=2, leaky_relu_slope=0.1, bidirectional=True, dtype="float64", seed=0),
          np.zeros((0, 2, 3, 3, 2)))  # fmt: skip


def test_gradients_that_are_scaled_and_those_of_penalties():
    layer = Conv2D(2, 3, 3, kernel_regularizer="l2", dtype="float64", seed=0)
    layer.gradient_scale = 0.5
    check(layer, normal(2, 4, 4, 2))


# --- Networks ---


def network(head=()):
    return Sequential([
        ConvLSTM2D(1, 3, 3, num_layers=2, leaky_relu_slope=0.2, dtype="float64", seed=0), LeakyReLU(0.1),
        MaxPooling3D((1, 2, 2)), TimeDistributed(Conv2D(3, 2, 3, activation="relu", dtype="float64", seed=1)),
        ConvLSTM2D(2, 2, 3, return_sequences=False, go_backwards=True, dtype="float64", seed=2), Dropout(0.0),
        Flatten(), *head,
    ])  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
def test_network(masked):
    options = {"mask": np.array([[1, 1, 0], [1, 0, 1]], bool)} if masked else {}
    check(network(), normal(2, 3, 4, 4, 1), **options)


def test_a_mask_on_the_device():
    model, x, mask = network(), normal(2, 3, 4, 4, 1), np.array([[1, 1, 0], [1, 0, 1]], bool)
    expected = engines(model, "reference")(x, mask=mask)
    for kind in (bool, np.uint8):
        close(got(model(put(x), mask=put(mask.astype(kind)))), expected)


def test_a_network_that_ends_in_the_processors_memory(gpu):
    """Of NumPy's arrays, what the GPU does not compute is computed where it is."""
    model = network([Dense(8, 3, "softmax", dtype="float64", seed=3)])
    x = normal(2, 3, 4, 4, 1)
    expected = run(engines(model, "reference"), x)
    close(run(engines(model, "cuda"), x), expected)
    before = len(gpu.launches)
    with pytest.raises(TypeError, match=r"^Dense: x is on a GPU, where this layer does not compute; move x to the CPU"):
        engines(model, None)(put(x))
    assert len(gpu.launches) == before  # nothing had been computed


def test_a_network_that_begins_in_the_processors_memory():
    model, x = Sequential([Softmax(), Conv2D(1, 2, 3, dtype="float64", seed=0), LeakyReLU()]), normal(2, 4, 4, 1)
    close(run(engines(model, "cuda"), x), run(engines(model, "reference"), x))


class Clipped(EncoderForecaster):
    """A caller's own class, which goes on with what it gets as with an array of NumPy."""

    def forward(self, frames, training=False):
        return super().forward(np.clip(frames, -1, 1), 2, training)

    def output_shape(self, input_shape):
        return super().output_shape(input_shape, 2)


def test_layers_of_others_get_arrays_of_numpy():
    layers = [ConvLSTM2D(1, 1, 3, dtype="float64", seed=0), Clipped(1, 2, 3, dtype="float64", seed=1), LeakyReLU()]
    model, x = Sequential(layers), normal(2, 3, 4, 4, 1)
    close(run(engines(model, "cuda"), x), run(engines(model, "reference"), x))


def test_engines_that_are_changed_later(gpu, monkeypatch):
    layers = [ConvLSTM2D(1, 2, 3, engine="cuda", seed=0), Conv2D(2, 2, 3, engine="cuda", seed=1)]
    model, x = Sequential(layers), normal(1, 2, 4, 4, 1).astype("f4")
    there = model(x)
    for layer in layers:
        layer.engine = None
    with counted(gpu, monkeypatch) as copies:
        close(model(x), there, 1e-5)
    assert copies == {"put": [], "get": []}
    for layer in layers:
        layer.engine = "cuda"
    with counted(gpu, monkeypatch) as copies:
        close(model(x), there, 0)
    assert copies["get"] == [there.shape]


def test_layers_with_engines_and_dtypes_of_their_own():
    layers = [Conv2D(1, 2, 3, engine="cuda", seed=0), Conv2D(2, 2, 3, engine="cuda", dtype="float64", seed=1),
              Conv2D(2, 1, 3, engine="reference", dtype="float64", seed=2)]  # fmt: skip
    model, x = Sequential(layers), normal(2, 4, 4, 1)
    close(run(model, x), run(engines(model, "reference"), x), 1e-5)


@pytest.mark.parametrize("options", [{}, {"data_format": "channels_first"}, {"peephole": "channel", "recompute": True}])
@pytest.mark.parametrize("forced", [False, True])
def test_encoder_forecaster(options, forced):
    model = EncoderForecaster(1, (2, 3), 3, dtype="float64", seed=0, **options)
    x, targets = normal(2, 3, 4, 3, 1), normal(2, 2, 4, 3, 1, seed=1)
    if "data_format" in options:
        x, targets = (np.ascontiguousarray(np.moveaxis(array, -1, 2)) for array in (x, targets))
    expected = engines(model, "reference")

    def outcome(model, kind, back):
        y = model(kind(x), 2, training=True, targets=kind(targets) if forced else None)
        dx = model.backward(kind(randoms(back(y))))
        states = model.encode(kind(x))
        return back(y), back(dx), model.get_gradients(), back(model.forecast(kind(x), 2, states)), back(states)

    expected = outcome(expected, lambda array: array, lambda value: value)
    close(outcome(engines(model, None), put, got), expected)
    close(outcome(engines(model, "cuda"), lambda array: array, lambda value: value), expected)


def test_a_network_is_fitted():
    model = network([Dense(8, 3, "softmax", dtype="float64", seed=3)])
    x, y = normal(4, 3, 4, 4, 1), np.eye(3)[[0, 2, 1, 1]]
    curves = {}
    for engine in ("reference", "cuda"):
        fitted = engines(model, engine)
        curves[engine] = fitted.fit(x, y, loss="categorical_crossentropy", epochs=2, batch_size=2, seed=0, quiet=True)
        curves[f"{engine} parameters"] = fitted.parameters
    np.testing.assert_allclose(curves["cuda"]["loss"], curves["reference"]["loss"], rtol=1e-9)
    close(curves["cuda parameters"], curves["reference parameters"], 1e-7)


# --- Copies ---


def parameters(layer):
    return {array.shape for array in layer.parameters.values()}


def is_data(shape, layer):
    """Whether what was copied is neither a parameter nor a table: of taps, or of a plan."""
    return shape not in parameters(layer) and len(shape) > 2


@pytest.mark.parametrize("training", [False, True])
def test_arrays_on_the_device_are_not_copied(gpu, monkeypatch, training):
    model = network()
    x = put(normal(2, 3, 4, 4, 1))
    with counted(gpu, monkeypatch) as copies:
        y = model(x, training=training)
    assert [shape for shape in copies["put"] if is_data(shape, model)] == []
    assert copies["get"] == []
    if training:
        dy = put(normal(*y.shape))
        with counted(gpu, monkeypatch) as copies:
            dx = model.backward(dy)
        assert isinstance(dx, DeviceArray)
        assert [shape for shape in copies["put"] if is_data(shape, model)] == []
        assert copies["get"] == []
        with counted(gpu, monkeypatch) as copies:
            gradients = model.get_gradients()
            model.get_gradients()
        assert copies["get"] == [array.shape for array in gradients.values()]
        assert copies["put"] == []


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(network(), (2, 3, 4, 4, 1)), (EncoderForecaster(1, (2, 2), 3, dtype="float64", seed=0), (2, 3, 4, 4, 1)),
     (ConvLSTM2D(2, 3, 3, num_layers=3, leaky_relu_slope=0.1, bidirectional=True, data_format="channels_first",
                 time_major=True, dtype="float64", seed=0), (3, 2, 2, 4, 4))],
)  # fmt: skip
def test_numpy_arrays_are_put_once_and_got_once(gpu, monkeypatch, layer, shape):
    layer, x = engines(layer, "cuda"), normal(*shape)
    more = {"steps": 2} if isinstance(layer, EncoderForecaster) else {}
    with counted(gpu, monkeypatch) as copies:
        y = layer(x, training=True, **more)
    assert [shape for shape in copies["put"] if is_data(shape, layer)] == [x.shape]
    assert copies["get"] == [y.shape]
    with counted(gpu, monkeypatch) as copies:
        dx = layer.backward(np.ones_like(y))
    assert [shape for shape in copies["put"] if is_data(shape, layer)] == [y.shape] * is_data(y.shape, layer)
    assert copies["get"] == [dx.shape]
    gradients = copy.deepcopy(layer).get_gradients()
    close(layer.get_gradients(), gradients)


def test_a_mask_is_put_there_once(gpu, monkeypatch):
    layer = ConvLSTM2D(1, 2, 3, num_layers=3, zero_output_for_mask=True, go_backwards=True, dtype="float64", seed=0)
    x, mask = put(normal(3, 5, 4, 4, 1)), np.ones((3, 5), bool)
    with counted(gpu, monkeypatch) as copies:
        layer(x, mask=mask, training=True)
    assert copies["put"].count(mask.shape) == 1


# --- Arrays of other libraries ---


@pytest.fixture
def emulated(gpu):
    if gpu.dlpack_device[0] == CUDA:
        pytest.skip("arrays of the processor's memory that say they are on a GPU do not go to one")


def exchanged(value):
    return mapped(Exchanged, value)


def taken(value):
    if isinstance(value, tuple | list):
        return type(value)(map(taken, value))
    assert isinstance(value, Exchanged)
    return value.values


@pytest.mark.parametrize("name", ["ConvLSTM2D", *LAYERS])
def test_arrays_of_another_library(emulated, gpu, monkeypatch, name):
    stack = ConvLSTM2D(2, 2, 3, num_layers=2, leaky_relu_slope=0.1, bidirectional=True, dtype="float64", seed=0)
    layer, shape = (stack, (2, 3, 4, 3, 2)) if name == "ConvLSTM2D" else LAYERS[name]
    x = normal(*shape)
    expected, gradients = run(engines(layer, "reference"), x)
    layer, finished = engines(layer, None), []
    monkeypatch.setattr(gpu, "finish", lambda: finished.append(True))
    y = layer(Exchanged(x), training=True)
    assert finished  # as such arrays tell of no stream
    finished.clear()
    dx = layer.backward(Exchanged(randoms(taken(y))))
    assert finished
    close((taken(y), taken(dx)), expected)
    close(layer.get_gradients(), gradients)


@pytest.mark.parametrize("name", ["Conv2D", "ConvLSTM2D"])
def test_other_gpus_and_gaps(emulated, name):
    layer, shape = SIMPLE[name][0](dtype="float64"), SIMPLE[name][1]
    x = normal(*shape)
    with pytest.raises(
        ValueError, match=rf"^{name}: x is a CUDA array .* that is not C-contiguous \(strides .*\); pass a"
    ):
        layer(Exchanged(np.flip(x, 1)))
    dy = np.ones_like(layer(Exchanged(x), training=True).values)
    with pytest.raises(ValueError, match=rf"^{name}: dy is on GPU 1 but x on GPU 0; put both on one GPU$"):
        layer.backward(Exchanged(dy, number=1))
    with pytest.raises(ValueError, match=rf"^{name}: dy is a CUDA array .* that is not C-contiguous"):
        layer.backward(Exchanged(np.flip(dy, 1)))


def test_states_on_another_gpu(emulated):
    layer, x, state = ConvLSTM2D(1, 2, 3, dtype="float64"), normal(1, 2, 3, 3, 1), normal(1, 3, 3, 2)
    with pytest.raises(ValueError, match=r"^ConvLSTM2D: c is on GPU 1 but x on GPU 0; put both on one GPU$"):
        layer(Exchanged(x), initial_state=(Exchanged(state), Exchanged(state, number=1)))
    with pytest.raises(
        TypeError, match=r"^ConvLSTM2D: h lives on DLPack device 2, not in the processor's memory; move"
    ):
        layer(x, initial_state=(Exchanged(state), None))
    with pytest.raises(
        TypeError, match=r"^ConvLSTM2D: h lives on DLPack device 2, not in the processor's memory; move"
    ):
        engines(layer, "cuda")(x, initial_state=(Exchanged(state), None))


@pytest.mark.torch
def test_a_gpu_shares_arrays_of_layers_with_torch(gpu):
    torch = pytest.importorskip("torch")
    if gpu.dlpack_device[0] != CUDA or not torch.cuda.is_available():
        pytest.skip("there is no GPU, or this PyTorch sees none")
    layer = ConvLSTM2D(
        3, 4, 3, num_layers=2, leaky_relu_slope=0.1, bidirectional=True, data_format="channels_first", seed=0
    )
    x = normal(2, 5, 3, 9, 7).astype("f4")
    expected, gradients = run(engines(layer, "reference"), x)
    dy = torch.from_numpy(randoms(expected[0]))
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        for _ in range(5):
            with torch.cuda.stream(stream):
                y = layer(torch.from_numpy(x).cuda(non_blocking=True) * 3 / 3, training=True)
                dx = layer.backward(dy.cuda() * 1)
                doubled = y * 2, dx * 2
            assert y.is_cuda
            torch.cuda.current_stream().wait_stream(stream)
            for result, array in zip(doubled, expected, strict=True):
                np.testing.assert_allclose(result.cpu().numpy() / 2, array, atol=1e-4)
            close(layer.get_gradients(), gradients, 1e-3)


def test_arrays_with_the_interface_alone(emulated):
    layer, x = Conv2D(1, 2, 3, dtype="float64", seed=0), normal(1, 4, 4, 1)
    layer.gradient_scale = 0.5
    close(run(layer, Interfaced(x))[0], run(engines(layer, "reference"), x)[0])


# --- What is refused ---


SIMPLE = {
    "ConvLSTM2D": (lambda **options: ConvLSTM2D(1, 2, 3, **options), (1, 2, 3, 3, 1)),
    "ConvLSTM2DCell": (lambda **options: ConvLSTM2DCell(1, 2, 3, **options), (1, 3, 3, 1)),
    "Conv2D": (lambda **options: Conv2D(1, 2, 3, **options), (1, 3, 3, 1)),
    "Conv3D": (lambda **options: Conv3D(1, 2, 3, **options), (1, 3, 3, 3, 1)),
    "EncoderForecaster": (lambda **options: EncoderForecaster(1, 2, 3, **options), (1, 2, 3, 3, 1)),
    "MaxPooling3D": (lambda **options: MaxPooling3D(**options), (1, 2, 3, 3, 1)),
    "MaxPooling2D": (lambda **options: MaxPooling2D(**options), (1, 2, 3, 1)),
}
each = pytest.mark.parametrize("name", SIMPLE)


@each
@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_another_engine(name, engine):
    make, shape = SIMPLE[name]
    layer, more = make(engine=engine), {"steps": 1} if name == "EncoderForecaster" else {}
    message = rf"^{name}: x is on a GPU, where engine '{engine}' does not compute; pass engine='cuda' \(or none\)"
    with pytest.raises(TypeError, match=message):
        layer(put(normal(*shape).astype("f4")), **more)


@pytest.mark.parametrize("make", [lambda **options: ConvLSTM2D(1, 8, 3, **options),
                                  lambda **options: Conv2D(1, 8, 3, **options)])  # fmt: skip
def test_algorithms_of_the_engine(make):
    layer, x = make(engine="cuda", algorithm="bfloat16", seed=0), normal(1, 2, 6, 6, 1).astype("f4")
    assert layer.algorithm == "bfloat16"
    exact = make(engine="cuda", seed=0)(x)
    assert 1e-4 < np.abs(layer(x) - exact).max() < 0.1
    with pytest.raises(ValueError, match=r"algorithm must be one of 'auto', 'simt', .*, got 'winograd'"):
        make(engine="cuda", algorithm="winograd")


@pytest.mark.parametrize("name", [name for name in SIMPLE if not name.startswith("Max")])
def test_another_dtype(name):
    make, shape = SIMPLE[name]
    layer, more = make(), {"steps": 1} if name == "EncoderForecaster" else {}
    what = "frames" if more else "x"
    message = rf"^{name}: {what} is a CUDA array of float64 but the layer is float32; convert it before, or make"
    with pytest.raises(TypeError, match=message):
        layer(put(normal(*shape)), **more)


@pytest.mark.parametrize("layer", [Dense(3, 2), Softmax(), Activation("softmax"), Activation((np.sin, np.cos)),
                                   Conv2D(1, 3, 1, activation="softmax")])  # fmt: skip
def test_layers_that_do_not_compute_there(layer):
    name = type(layer).__name__
    x = put(normal(1, 2, 2, layer.options.get("in_channels", 3)).astype("f4"))
    message = rf"^{name}: x is on a GPU, where this layer does not compute; move x to the CPU"
    with pytest.raises(TypeError, match=message):
        layer(x)
    with pytest.raises(TypeError, match=message) as caught:
        Sequential([layer])(x)
    assert caught.value.__notes__ == [f"in layer 0, {name}"]


def test_gradients_and_states_of_another_dtype():
    layer, x = ConvLSTM2D(1, 2, 3, seed=0), put(normal(1, 2, 3, 3, 1).astype("f4"))
    state = put(normal(1, 3, 3, 2))
    with pytest.raises(TypeError, match=r"^ConvLSTM2D: h is a CUDA array of float64 but the layer is float32"):
        layer(x, initial_state=(state, None))
    y = layer(x, training=True)
    with pytest.raises(TypeError, match=r"^ConvLSTM2D: dy is a CUDA array of float64 but the layer is float32"):
        layer.backward(put(normal(*y.shape)))


def test_states_of_numpy_beside_an_x_on_the_device():
    layer, x, state = ConvLSTM2D(1, 2, 3, seed=0), normal(1, 2, 3, 3, 1).astype("f4"), (normal(1, 3, 3, 2), None)
    expected = engines(layer, "reference")(x, initial_state=state)
    close(got(layer(put(x), initial_state=state)), expected, 1e-5)


def test_lengths_are_looked_at_by_the_processor():
    layer, x = ConvLSTM2D(1, 2, 3, dtype="float64"), normal(2, 2, 3, 3, 1)
    with pytest.raises(ValueError, match=r"^ConvLSTM2D: lengths must lie between 0 and the 2 steps of x, got"):
        layer(put(x), lengths=[1, 3])


def test_shapes_are_checked_as_ever():
    with pytest.raises(ValueError, match=r"^ConvLSTM2D: x must be 5D \(batch, time, height, width, channels\), got 3D"):
        ConvLSTM2D(1, 2, 3)(put(normal(2, 3, 4).astype("f4")))
    layer, x = ConvLSTM2D(1, 2, 3, dtype="float64"), put(normal(1, 2, 3, 3, 1))
    with pytest.raises(ValueError, match=r"^ConvLSTM2D: initial_state 0: h has shape \(1, 3, 3, 5\) but must be \(1, "):
        layer(x, initial_state=(put(normal(1, 3, 3, 5)), None))
    with pytest.raises(ValueError, match=r"^ConvLSTM2D: mask has shape \(1, 3\) but must be \(1, 2\)"):
        layer(x, mask=put(np.ones((1, 3), bool)))
