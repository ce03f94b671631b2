"""Our ConvLSTM2D in Keras beside Keras's own, on whichever backend KERAS_BACKEND names (torch by default)."""

import copy
import importlib
import json
import os
import pickle
import warnings
import zipfile

import numpy as np
import pytest

import fastclstm
from fastclstm import dispatch

B, T, H, W, C, F = 2, 3, 6, 5, 2, 3
CLOSE = {"float32": 2e-5, "float64": 1e-12}


@pytest.fixture(scope="module")
def keras():
    """Keras on any backend that our layer knows."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    module = pytest.importorskip("keras")
    pytest.importorskip(module.backend.backend())
    return module


@pytest.fixture(scope="module")
def ours(keras):
    return importlib.import_module("fastclstm.adapters.keras").ConvLSTM2D


@pytest.fixture(scope="module")
def accelerating(keras):
    return importlib.import_module("fastclstm.adapters.keras_accelerate")


@pytest.fixture(autouse=True)
def few_kernels(request, monkeypatch):
    """Most tests compute with NumPy: what is compared is the way to the kernels and back, and they take compiling."""
    if "cpu" not in request.node.name:
        monkeypatch.setattr(dispatch, "DEFAULT_ENGINE", "reference")


@pytest.fixture(autouse=True)
def told_of_falling_back():
    """No test falls back to Keras's loop unless it says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Keras computes this ConvLSTM2D itself")
        yield


def frames(options, seed=0):
    x = np.random.default_rng(seed).standard_normal((B, T, H, W, C))
    x = np.moveaxis(x, -1, 2) if options.get("data_format") == "channels_first" else x
    return np.ascontiguousarray(x, "float64" if options.get("dtype") == "float64" else "float32")


def twins(keras, ours, **options):
    """Keras's layer and ours with the same drawn weights."""
    options = {"kernel_size": 3, "seed": 5, "recurrent_initializer": "zeros"} | options
    pair = [cls(F, **options) for cls in (keras.layers.ConvLSTM2D, ours)]
    for layer in pair:
        layer.build(frames(options).shape)
    generator = np.random.default_rng(1)
    weights = [generator.standard_normal(w.shape) / 2 for w in pair[0].get_weights()]
    for layer in pair:
        layer.set_weights(weights)
    return pair


def arrays(keras, outputs):
    outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
    return [keras.ops.convert_to_numpy(output) for output in outputs]


def assert_close(found, expected, dtype="float32"):
    assert [a.shape for a in found] == [a.shape for a in expected]
    assert [a.dtype for a in found] == [a.dtype for a in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=CLOSE[dtype] * max(1, np.abs(b).max(initial=0)))


OPTIONS = {
    "cpu": {"padding": "same", "return_sequences": True, "return_state": True, "dropout": 0.5},
    "plain": {},
    "same": {"padding": "same", "return_sequences": True},
    "an even kernel": {"kernel_size": (2, 3), "padding": "same", "use_bias": False},
    "strides": {"padding": "same", "strides": (2, 1), "return_sequences": True, "return_state": True},
    "valid strides": {"strides": 2, "return_state": True},
    "dilation": {"padding": "same", "dilation_rate": (1, 2), "return_sequences": True},
    "channels first": {"data_format": "channels_first", "return_sequences": True, "return_state": True},
    "channels first, dropout": {"data_format": "channels_first", "dropout": 0.4, "recurrent_dropout": 0.3},
    "go backwards": {"go_backwards": True, "return_sequences": True, "return_state": True},
    "dropout": {"dropout": 0.5, "recurrent_dropout": 0.25, "return_sequences": True},
    "all is dropped": {"dropout": 1.0},
    "unrolled": {"unroll": True, "return_sequences": True},
    "activations": {"activation": "relu", "recurrent_activation": "hard_sigmoid", "return_state": True},
    "softsign and swish": {"activation": "softsign", "recurrent_activation": "swish"},
    "float64": {"dtype": "float64", "return_sequences": True, "return_state": True, "padding": "same"},
}


def is_possible(keras, options):
    if keras.backend.backend() == "jax" and options.get("dtype") == "float64":
        pytest.skip("JAX has no float64 unless it is asked to")
    if keras.backend.backend() == "tensorflow" and options.get("data_format") == "channels_first":
        pytest.skip("Keras on TensorFlow convolves channels_first on GPUs alone")


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_and_gradients_are_those_of_keras(keras, ours, accelerating, name):
    options = OPTIONS[name]
    is_possible(keras, options)
    layer, our = twins(keras, ours, **options)
    x, dtype = frames(options), options.get("dtype", "float32")
    expected, found = (arrays(keras, each(x)) for each in (layer, our))
    assert_close(found, expected, dtype)
    assert [tuple(y.shape) for y in expected] == [tuple(s) for s in shapes_of(our, x.shape)]
    generator = np.random.default_rng(2)
    cotangents = [generator.standard_normal(y.shape).astype(y.dtype) for y in expected]
    shape = expected[-1].shape if not options.get("return_sequences") or options.get("return_state") else None
    shape = shape or (expected[0].shape[0], *expected[0].shape[2:])
    state = [generator.standard_normal(shape).astype(x.dtype) for _ in range(2)]
    pull = accelerating.gradients
    expected, found = (arrays(keras, pull(each, x, state, None, cotangents)) for each in (layer, our))
    assert_close(found, expected, dtype)


def shapes_of(layer, shape):
    shapes = layer.compute_output_shape(shape)
    return shapes if isinstance(shapes[0], tuple) else [shapes]


MASK = np.array([[True, False, True], [True, True, False]])


@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("sequences", [False, True])
def test_masks(keras, ours, zeroed, sequences):
    options = {"return_sequences": sequences, "zero_output_for_mask": zeroed, "go_backwards": sequences}
    layer, our = twins(keras, ours, return_state=True, **options)
    x = frames({})
    if keras.backend.backend() not in ("torch", "tensorflow"):  # Keras's own layer raises there
        y, h, _ = arrays(keras, our(x, mask=MASK))
        alone = arrays(keras, our(x[:1, [0, 2]]))
        np.testing.assert_allclose(h[0], alone[1][0], atol=1e-6)
        assert zeroed == (not (y[0, 1] if sequences else y[1]).any())
        return
    assert_close(arrays(keras, our(x, mask=MASK)), arrays(keras, layer(x, mask=MASK)))


def test_the_mask_of_a_layer_before(keras, ours):
    if keras.backend.backend() not in ("torch", "tensorflow"):
        pytest.skip("Keras's own layer raises there for a mask")
    x = frames({})
    x[0, 1] = 0
    outputs = []
    for layer in twins(keras, ours):
        hide = keras.layers.TimeDistributed(keras.layers.Reshape((H * W * C,)))
        back = keras.layers.TimeDistributed(keras.layers.Reshape((H, W, C)))
        model = keras.Sequential([keras.Input((T, H, W, C)), hide, keras.layers.Masking(), back, layer])
        outputs += arrays(keras, model(x))
    assert_close(outputs[1:], outputs[:1])


def test_states_are_kept_between_calls(keras, ours):
    layer, our = twins(keras, ours, stateful=True, return_state=True)
    x = frames({})
    for _ in range(2):
        assert_close(arrays(keras, our(x)), arrays(keras, layer(x)))
    for each in (layer, our):
        each.reset_state()
    expected, found = (arrays(keras, each(x)) for each in (layer, our))
    assert_close(found, expected)
    with pytest.raises(ValueError, match="batch size"):
        our(x[:1])


@pytest.mark.parametrize("stateful", [False, True], ids=["cpu", "stateful"])
def test_training_is_that_of_keras(keras, ours, stateful):
    losses, weights = [], []
    for layer in twins(keras, ours, dropout=0.3, kernel_regularizer="l2", activity_regularizer="l1",
                       recurrent_constraint="max_norm", stateful=stateful):  # fmt: skip
        inputs = keras.Input(batch_shape=(B, T, H, W, C))
        model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(layer(inputs)))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        x, y = frames({}), np.ones((B, F), "float32")
        losses.append(model.fit(x, y, batch_size=B, epochs=3, shuffle=False, verbose=0).history["loss"])
        weights.append(layer.get_weights())
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert losses[1][0] != losses[1][-1]
    assert_close(weights[1], weights[0])


def test_sizes_that_are_unknown(keras, ours):
    layer = twins(keras, ours, return_sequences=True)[1]
    inputs = keras.Input((None, H, W, C))
    outputs = layer(inputs)
    assert outputs.shape == (None, None, H - 2, W - 2, F)
    model = keras.Model(inputs, outputs)
    x = frames({})
    whole = model.predict(x, verbose=0)
    np.testing.assert_allclose(model.predict(x[:1, :2], verbose=0), whole[:1, :2], atol=1e-6)
    assert layer.name in model.to_json()


def test_initial_states_from_another_layer(keras, ours):
    outputs = []
    for cls in (keras.layers.ConvLSTM2D, ours):
        keras.utils.set_random_seed(3)
        inputs = keras.Input((T, H, W, C))
        _, h, c = cls(F, 3, padding="same", return_state=True, kernel_initializer="ones")(inputs)
        y = cls(F, 3, padding="same")(inputs, initial_state=[h, c])
        model = keras.Model(inputs, y)
        generator = np.random.default_rng(4)
        model.set_weights([generator.standard_normal(w.shape) / 3 for w in model.get_weights()])
        outputs.append(model.predict(frames({}), verbose=0))
    assert_close(outputs[1:], outputs[:1])


# What is Keras's


def strange(x):
    """Stand for an activation of one's own."""
    return x * 0.5


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activation": strange}, "its activation strange is not one of Keras's"),
    ],
)
def test_what_is_left_to_keras_is_told(keras, ours, options, reason):
    layer, our = twins(keras, ours, **options)
    x = frames({})
    with pytest.warns(UserWarning, match=f"Keras computes this ConvLSTM2D itself, for {reason}"):
        found = our(x)
    expected = arrays(keras, keras.ops.cast(layer(x), "float32"))
    np.testing.assert_array_equal(arrays(keras, keras.ops.cast(found, "float32")), expected)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_half_precision_is_float32_inside(keras, ours, accelerating, dtype):
    """Dtypes are Keras's, numbers those of float32 rounded once at the end, gradients too, and nothing is told."""
    options = {"return_sequences": True, "return_state": True, "padding": "same"}
    theirs, ours_half = twins(keras, ours, dtype=dtype, **options)
    _, full = twins(keras, ours, **options)
    full.set_weights([keras.ops.convert_to_numpy(keras.ops.cast(w.value, "float32")) for w in ours_half.weights])
    half = ours_half.compute_dtype
    x = keras.ops.cast(frames({}), half)  # which float32 holds
    states = [keras.ops.cast(np.full((B, H, W, F), value), half) for value in (0.25, -0.5)]
    expected, found = (layer(x, initial_state=states) for layer in (theirs, ours_half))
    assert [y.dtype for y in found] == [y.dtype for y in expected]
    exact = full(keras.ops.cast(x, "float32"), initial_state=[keras.ops.cast(state, "float32") for state in states])
    epsilon = 2.0 ** (-8 if half == "bfloat16" else -11)
    for y, like, true in zip(*(arrays(keras, [keras.ops.cast(y, "float32") for y in of])
                               for of in (found, expected, exact)), strict=True):  # fmt: skip
        assert np.abs(y - true).max() <= 1.01 * epsilon * np.abs(true).max()
        assert np.abs(y - like).max() <= 20 * epsilon * np.abs(true).max()
    if keras.backend.backend() == "numpy":
        return
    cotangents = [np.ones(y.shape, "float32") for y in exact]
    pulled = [accelerating.gradients(layer, x, states, None, cotangents) for layer in (ours_half, full)]
    near, true = (arrays(keras, [keras.ops.cast(g, "float32") for g in of]) for of in pulled)
    for a, b in zip(near, true, strict=True):
        assert np.abs(a - b).max() <= 2 * epsilon * np.abs(b).max()


def test_mixed_precision_is_trained_with_scaled_losses(keras, ours, accelerating):
    """As in float32, to float16's precision; a loss that overflows takes no step and halves the scale."""
    if keras.backend.backend() == "numpy":
        pytest.skip("Keras does not train on NumPy")
    x, y = frames({}), np.full((B, 1), 0.3, "float32")
    trained = []
    for dtype in ("float32", "mixed_float16"):
        keras.utils.set_random_seed(3)
        model = keras.Sequential([
            keras.layers.ConvLSTM2D(F, 3, dtype=dtype, name="recurrent"),
            keras.layers.Flatten(), keras.layers.Dense(1, dtype="float32"),
        ])  # fmt: skip
        optimizer = keras.optimizers.SGD(0.05)
        if dtype != "float32":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**8)
        model.compile(optimizer, "mse")
        model.build((None, T, H, W, C))
        _, report = accelerating.accelerate(model, return_report=True)
        assert list(report.swapped) == ["recurrent"]
        model.fit(x, y, batch_size=B, epochs=3, verbose=0)
        trained.append(model.get_weights())
    for a, b in zip(*trained, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-3)
    before = model.get_weights()
    optimizer.dynamic_scale.assign(2.0**127)
    model.fit(x, y + 1e3, batch_size=B, verbose=0)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(optimizer.dynamic_scale) == 2.0**126


def test_options_are_refused_as_by_keras(keras, ours):
    with pytest.raises(ValueError, match="strides > 1"):
        ours(F, 3, strides=2, dilation_rate=2)
    with pytest.raises((TypeError, ValueError), match="implementation"):
        ours(F, 3, implementation=2)


def test_what_cannot_be_called_is_told_by_name(keras, ours):
    layer = ours(F, 3, name="a")
    with pytest.raises(ValueError, match=r"a: sequences have no time steps \(2, 0, 6, 5, 2\); at least one"):
        layer(frames({})[:, :0])
    with pytest.raises(ValueError, match=r"a: initial_state must be \[h, c\], got 1 items"):
        layer(frames({}), initial_state=[np.zeros((B, H - 2, W - 2, F), "float32")])


def test_what_is_traced_for_elsewhere_is_steps_of_keras(keras, ours):
    """So models are exported as ONNX, where no operator of ours is known."""
    torch = pytest.importorskip("torch")
    if keras.backend.backend() != "torch":
        pytest.skip("only PyTorch traces so")
    layer, x = ours(F, 3), torch.from_numpy(frames({}))
    expected = layer(x).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(layer, x, check_trace=False)
    assert "fastclstm" not in str(traced.inlined_graph)
    assert_close(arrays(keras, traced(x)), arrays(keras, expected))


def test_config_and_signature_are_those_of_keras(keras, ours):
    layer, our = twins(keras, ours, name="a", dropout=0.5, go_backwards=True)
    assert our.get_config() == layer.get_config()
    assert keras.saving.serialize_keras_object(our)["module"] == "keras.layers"
    assert type(ours.from_config(layer.get_config())) is ours
    assert [w.path for w in our.weights] == [w.path for w in layer.weights]


# Files


@pytest.fixture
def without_ours(keras, ours):
    """Keras as where fastclstm has not been imported."""
    del keras.saving.get_custom_objects()["ConvLSTM2D"]
    yield
    keras.saving.get_custom_objects()["ConvLSTM2D"] = ours


def stack(keras, cls):
    model = keras.Sequential([
        keras.Input((T, H, W, C)),
        cls(F, 3, padding="same", return_sequences=True, name="first"),
        keras.layers.Bidirectional(cls(F, 3, name="second"), name="both"),
    ])  # fmt: skip
    generator = np.random.default_rng(4)
    model.set_weights([generator.standard_normal(w.shape) / 3 for w in model.get_weights()])
    return model


def layers_in(model):
    first, both = model.layers
    return first, both.forward_layer, both.backward_layer


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_a_file_of_ours_is_one_of_keras(keras, ours, tmp_path, suffix, request):
    model = stack(keras, ours)
    assert {type(layer) for layer in layers_in(model)} == {ours}
    path = tmp_path / f"model.{suffix}"
    model.save(path)
    expected = model.predict(frames({}), verbose=0)
    again = keras.models.load_model(path)
    assert {type(layer) for layer in layers_in(again)} == {ours}
    np.testing.assert_array_equal(again.predict(frames({}), verbose=0), expected)
    np.testing.assert_allclose(fastclstm.from_keras(path).predict(frames({})), expected, atol=1e-5)
    request.getfixturevalue("without_ours")
    plain = keras.models.load_model(path)
    assert {type(layer) for layer in layers_in(plain)} == {keras.layers.ConvLSTM2D}
    np.testing.assert_allclose(plain.predict(frames({}), verbose=0), expected, atol=1e-5)


def test_nothing_in_a_file_tells_of_us(keras, ours, tmp_path):
    stack(keras, ours).save(tmp_path / "ours.keras")
    with zipfile.ZipFile(tmp_path / "ours.keras") as file:
        text = file.read("config.json").decode()
    assert "fastclstm" not in text
    assert json.loads(text)["config"]["layers"][1]["class_name"] == "ConvLSTM2D"


def test_weights_go_both_ways(keras, ours, tmp_path):
    one, other = stack(keras, ours), stack(keras, keras.layers.ConvLSTM2D)
    for k, (source, target) in enumerate(((one, other), (other, one))):
        source.set_weights([w + k + 1 for w in source.get_weights()])
        source.save_weights(tmp_path / f"{k}.weights.h5")
        target.load_weights(tmp_path / f"{k}.weights.h5")
        assert_close(target.get_weights(), source.get_weights())


def test_a_pickle_is_as_a_file(keras, ours, request):
    layer, x = ours(F, 3, name="alone"), frames({})
    expected, told = arrays(keras, layer(x)), pickle.dumps(layer)
    assert b"fastclstm" not in told
    again = pickle.loads(told)
    assert type(again) is ours
    assert_close(arrays(keras, again(x)), expected)
    request.getfixturevalue("without_ours")
    assert type(pickle.loads(told)) is keras.layers.ConvLSTM2D


def test_copies_are_ours(keras, ours):
    model = stack(keras, ours)
    for other in (copy.deepcopy(model), keras.models.clone_model(model)):
        assert {type(layer) for layer in layers_in(other)} == {ours}


# accelerate


def test_accelerate_swaps_where_the_layers_are(keras, ours, accelerating, tmp_path, capsys):
    stack(keras, keras.layers.ConvLSTM2D).save(tmp_path / "plain.keras")
    model = keras.models.load_model(tmp_path / "plain.keras")
    model.compile("sgd", "mse")
    layers, weights = layers_in(model), model.weights
    expected = model.predict(frames({}), verbose=0)
    same, report = accelerating.accelerate(model, return_report=True)
    assert same is model
    assert report.swapped == dict.fromkeys(("first", "both/forward_second", "both/backward_second"),
                                           "over whole sequences")  # fmt: skip
    assert report.left == {}
    assert capsys.readouterr().out == f"{report}\n"
    assert all(a is b for a, b in zip(layers_in(model), layers, strict=True))
    assert all(a is b for a, b in zip(model.weights, weights, strict=True))
    assert {type(layer) for layer in layers} == {ours}
    assert_close([model.predict(frames({}), verbose=0)], [expected])
    model.fit(frames({}), np.zeros_like(expected), verbose=0)
    assert set(accelerating.accelerate(model, return_report=True)[1].swapped.values()) == {"it was before"}


def test_accelerate_finds_layers_in_any_model(keras, ours, accelerating):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [keras.layers.ConvLSTM2D(F, 3, return_sequences=True, name="one")]
            self.inner = keras.layers.TimeDistributed(
                keras.Sequential([keras.Input((T, H, W, C)), keras.layers.ConvLSTM2D(F, 3, name="two")], name="chain"),
                name="each",
            )

        def call(self, x):
            return self.inner(keras.ops.stack([x, x], 1)), self.parts[0](x)

    model = Own()
    x = frames({})
    expected = arrays(keras, model(x))
    _, report = accelerating.accelerate(model, return_report=True)
    assert set(report.swapped) == {"one", "each/chain/two"}
    assert_close(arrays(keras, model(x)), expected)


def test_accelerate_tells_what_it_leaves(keras, ours, accelerating):
    own = type("Own", (keras.layers.ConvLSTM2D,), {})
    model = keras.Sequential([
        own(F, 3, return_sequences=True, name="own"),
        keras.layers.ConvLSTM2D(F, 3, activation=strange, return_sequences=True, name="strange"),
        keras.layers.ConvLSTM3D(F, 3, name="volumes"),
    ])  # fmt: skip
    _, report = accelerating.accelerate(model, return_report=True)
    assert report.swapped == {}
    assert [report.left[name].split(" ")[0] for name in ("own", "strange", "volumes")] == [
        "Own", "its", "ConvLSTM3D"
    ]  # fmt: skip
    assert str(accelerating.accelerate(keras.layers.Dense(1), return_report=True)[1]) == (
        "accelerate: no ConvLSTM2D was found"
    )


@pytest.mark.parametrize("flaw", ["outputs", "gradients", "an error"])
def test_accelerate_leaves_what_does_not_agree(keras, ours, accelerating, monkeypatch, flaw):
    from fastclstm.adapters import keras_layers

    backend = keras.backend.backend()
    right = keras_layers.BACKENDS[backend]

    def wrong(arrays, options, training):
        if flaw == "an error":
            raise RuntimeError("it is broken")
        y, h, c = right(arrays, options, training)
        if flaw == "outputs" or training:
            return y, h, c * 1.001
        return y, h, c

    monkeypatch.setitem(keras_layers.BACKENDS, backend, wrong)
    model = keras.Sequential([keras.layers.ConvLSTM2D(F, 3, name="one")])
    _, report = accelerating.accelerate(model, return_report=True)
    told = {
        "outputs": "what it returns",
        "gradients": "gradients in training",
        "an error": "RuntimeError: it is broken",
    }
    assert told[flaw] in report.left["one"]
    assert type(model.layers[0]) is keras.layers.ConvLSTM2D


def test_accelerate_refuses_what_is_no_model(keras, accelerating):
    with pytest.raises(TypeError, match=r"must be a model or layer of Keras 3.*got list"):
        accelerating.accelerate([])
