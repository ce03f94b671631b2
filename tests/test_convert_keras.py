import json
import warnings
import zipfile

import numpy as np
import pytest
from keras_2_files import as_keras_2

from fastclstm.convert.keras import from_keras, load_weights
from fastclstm.layers import BatchNormalization, ConvLSTM2D, Dense, Flatten, TimeDistributed
from fastclstm.models import Sequential

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def seeded(keras):
    pytest.importorskip("h5py")
    keras.utils.set_random_seed(0)


@pytest.fixture(params=["reference", "cpu"])
def engine(request):
    return request.param


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape)


def shuffle(model, seed=0):
    """Give all weights random values; what is a variance stays positive."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        layer.set_weights([
            rng.uniform(0.5, 2, w.shape) if "variance" in v.path else rng.normal(0, 0.4, w.shape)
            for v, w in zip(layer.weights, layer.get_weights(), strict=True)
        ])  # fmt: skip
    return model


def numpy(tensor):
    return tensor.detach().cpu().numpy()


def outputs(model, x, **options):
    return numpy(model(np.asarray(x, model.layers[-1].dtype), **options))


def close(a, b, rtol=1e-9):
    assert np.shape(a) == np.shape(b)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def check(keras, tmp_path, layers, shape, engine="reference", rtol=1e-9, **call):
    """Save a model of `layers`, load it with ours, and compare; the live model too."""
    model = shuffle(keras.Sequential([keras.layers.Input(shape), *layers]))
    model.save(tmp_path / "model.keras")
    ours = from_keras(tmp_path / "model.keras", engine=engine)
    x = normal(2, *shape)
    close(ours(x, **call), outputs(model, x, **call), rtol)
    live = from_keras(model, engine=engine)
    np.testing.assert_array_equal(live(x, **call), ours(x, **call))
    assert live.parameters.keys() == ours.parameters.keys()
    return model, ours


@pytest.fixture
def double(keras):
    """Models in float64."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield keras
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


# ConvLSTM2D and Bidirectional

ACTIVATIONS = ["tanh", "relu", "elu", "selu", "gelu", "silu", "softplus", "softsign", "leaky_relu", "linear", None]
GATES = ["sigmoid", "hard_sigmoid", "softsign"]


def drawn_options(seed):
    rng = np.random.default_rng(seed)
    draw = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    strided = draw(True, False)
    return {
        "filters": draw(1, 3),
        "kernel_size": draw(3, (1, 2), (2, 4), 1),
        "strides": draw(1, 2, (1, 2)) if strided else 1,
        "dilation_rate": 1 if strided else draw(1, 2, (2, 1)),
        "padding": draw("valid", "same"),
        "data_format": draw("channels_last", "channels_first"),
        "activation": draw(*ACTIVATIONS),
        "recurrent_activation": draw(*GATES),
        "use_bias": draw(True, False),
        "unit_forget_bias": draw(True, False),
        "dropout": draw(0.0, 0.5),
        "recurrent_dropout": draw(0.0, 0.5),
        "return_sequences": draw(True, False),
        "go_backwards": draw(True, False),
        "zero_output_for_mask": draw(True, False),
    }


@pytest.mark.keras
@pytest.mark.parametrize("seed", range(16))
def test_convlstm2d(double, tmp_path, seed):
    options = drawn_options(seed)
    shape = (3, 9, 8, 2) if options["data_format"] == "channels_last" else (3, 2, 9, 8)
    model, ours = check(double, tmp_path, [double.layers.ConvLSTM2D(**options)], shape)
    layer = ours[0]
    assert isinstance(layer, ConvLSTM2D)
    assert layer.dtype == "float64"
    for name in ("dropout", "recurrent_dropout", "use_bias", "unit_forget_bias", "return_sequences", "go_backwards"):
        assert getattr(layer, name) == options[name]
    x, mask = normal(4, *shape), np.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]], bool)
    close(ours(x, mask=mask), numpy(model.layers[0](x, mask=mask)))


SIZES = {1: (7,), 2: (6, 5), 3: (3, 6, 5)}


@pytest.mark.keras
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{"strides": 2, "go_backwards": True}, {"padding": "same", "dilation_rate": 2, "return_sequences": True},
     {"data_format": "channels_first", "padding": "same", "use_bias": False, "recurrent_activation": "relu"}],
)  # fmt: skip
def test_convlstm_of_rows_and_volumes(double, tmp_path, rank, options):
    make = getattr(double.layers, f"ConvLSTM{rank}D")
    frame = (2, *SIZES[rank]) if "data_format" in options else (*SIZES[rank], 2)
    size = 1 if rank == 3 and "padding" not in options else 3
    check(double, tmp_path, [make(3, size, **options)], (4, *frame))


@pytest.mark.keras
@pytest.mark.parametrize("rank", [1, 3])
def test_both_directions_of_rows_and_volumes(double, tmp_path, rank):
    inner = getattr(double.layers, f"ConvLSTM{rank}D")(3, 3, padding="same", return_sequences=True)
    model, ours = check(double, tmp_path, [double.layers.Bidirectional(inner)], (4, *SIZES[rank], 2))
    model.save_weights(tmp_path / "model.weights.h5")
    before = ours(normal(2, 4, *SIZES[rank], 2))
    ours.set_parameters({name: np.zeros_like(array) for name, array in ours.parameters.items()})
    load_weights(ours, tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(ours(normal(2, 4, *SIZES[rank], 2)), before)


@pytest.mark.keras
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("merge_mode", ["concat", "sum", "mul", "ave"])
def test_bidirectional(double, tmp_path, merge_mode, seed):
    options = drawn_options(100 + seed) | {"go_backwards": False}
    if merge_mode == "concat":
        options["data_format"] = "channels_last"
    shape = (3, 9, 8, 2) if options["data_format"] == "channels_last" else (3, 2, 9, 8)
    L = double.layers
    model, ours = check(double, tmp_path, [L.Bidirectional(L.ConvLSTM2D(**options), merge_mode)], shape)
    assert ours[0].merge_mode == merge_mode
    x, mask = normal(4, *shape), np.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]], bool)
    close(ours(x, mask=mask), numpy(model.layers[0](x, mask=mask)))


@pytest.mark.keras
def test_both_directions_apart(double, tmp_path):
    L = double.layers
    model = double.Sequential(
        [L.Input((3, 6, 5, 2)), L.Bidirectional(L.ConvLSTM2D(2, 3, return_sequences=True), merge_mode=None)]
    )
    shuffle(model).save(tmp_path / "m.keras")
    x = normal(2, 3, 6, 5, 2)
    for ours, expected in zip(from_keras(tmp_path / "m.keras")(x), model(x), strict=True):
        close(ours, numpy(expected))


@pytest.mark.keras
def test_float32_on_every_engine(keras, tmp_path, engine):
    L = keras.layers
    layers = [
        L.ConvLSTM2D(4, 3, padding="same", return_sequences=True),
        L.BatchNormalization(),
        L.Bidirectional(L.ConvLSTM2D(3, 3, padding="same", return_sequences=True)),
        L.Conv3D(1, 3, padding="same", activation="sigmoid"),
    ]
    model, ours = check(keras, tmp_path, layers, (5, 9, 8, 1), engine, 1e-5)
    assert {layer.options["dtype"] for layer in ours} == {"float32"}
    assert {layer.options["engine"] for layer in ours if "engine" in layer.options} == {engine}
    x = normal(2, 5, 9, 8, 1)
    ours.save(tmp_path / "ours.safetensors")
    np.testing.assert_array_equal(Sequential.load(tmp_path / "ours.safetensors")(x), ours(x))
    wide = from_keras(model, dtype="float64", engine=engine)
    assert wide(x).dtype == np.float64
    close(wide(x), outputs(model, x), 1e-5)


@pytest.mark.keras
def test_stateful(double):
    L = double.layers
    model = double.Sequential([L.Input(batch_shape=(2, 3, 6, 5, 1)), L.ConvLSTM2D(2, 3, stateful=True)])
    shuffle(model)
    ours, x = from_keras(model), normal(2, 3, 6, 5, 1)
    for _ in range(3):
        close(ours(x), outputs(model, x))
    ours.reset_state()
    model.layers[0].reset_state()
    close(ours(x), outputs(model, x))


@pytest.mark.keras
def test_training_options_are_taken_over(keras):
    L, R, K = keras.layers, keras.regularizers, keras.constraints
    layer = L.ConvLSTM2D(
        2, 3, dropout=0.2, recurrent_dropout=0.3, kernel_regularizer=R.L2(0.5), recurrent_regularizer="l1",
        bias_regularizer=R.L1L2(0.1, 0.2), kernel_constraint=K.MaxNorm(1.5, axis=(0, 1, 2)), bias_constraint="non_neg",
        return_sequences=True,
    )  # fmt: skip
    model = shuffle(keras.Sequential([
        L.Input((2, 6, 5, 1)), layer, L.Bidirectional(L.ConvLSTM2D(2, 3, kernel_regularizer=R.L2(0.25))), L.Flatten(),
        L.BatchNormalization(momentum=0.7, gamma_regularizer="l2"), L.Dense(2, trainable=False),
    ]))  # fmt: skip
    ours = from_keras(model)
    close(ours.penalty, float(sum(model.losses)), 1e-5)
    assert ours[3].momentum == 0.7
    assert [layer.trainable for layer in ours] == [True, True, True, True, False]
    assert (ours[0].dropout, ours[0].recurrent_dropout) == (0.2, 0.3)
    before = ours[0].cells[0].kernel
    ours.apply_constraints()
    close(ours[0].cells[0].kernel, numpy(layer.cell.kernel.constraint(before)), 1e-6)
    assert ours[0].cells[0].bias.min() >= 0


@pytest.mark.keras
def test_batch_normalization_while_training(double):
    L = double.layers
    layers = [L.ConvLSTM2D(2, 3), L.BatchNormalization(momentum=0.8, epsilon=0.01)]
    model = shuffle(double.Sequential([L.Input((3, 6, 5, 1)), *layers]))
    ours, x = from_keras(model), normal(3, 3, 6, 5, 1)
    close(ours(x, training=True), outputs(model, x, training=True), 1e-6)
    close(ours[1].moving_variance, numpy(model.layers[1].moving_variance.value), 1e-6)
    close(ours(x), outputs(model, x), 1e-6)


# Other layers


@pytest.mark.keras
@pytest.mark.parametrize(
    ("shape", "make"),
    [
        ((7, 6, 3), lambda L: [L.Conv2D(4, (3, 2), strides=(2, 1), padding="same", activation="relu")]),
        ((7, 6, 3), lambda L: [L.Conv2D(2, 3, dilation_rate=2, use_bias=False)]),
        ((3, 7, 6), lambda L: [L.Conv2D(2, 3, data_format="channels_first", padding="same")]),
        ((4, 7, 6, 3), lambda L: [L.Conv3D(2, (2, 3, 3), strides=(1, 2, 2), activation="sigmoid")]),
        ((3, 4, 7, 6), lambda L: [L.Conv3D(2, 3, padding="same", data_format="channels_first")]),
        (
            (4, 7, 6, 3),
            lambda L: [L.TimeDistributed(L.Conv2D(2, 3, activation="tanh")), L.TimeDistributed(L.Flatten())],
        ),
        ((4, 7, 6, 3), lambda L: [L.TimeDistributed(L.MaxPooling2D(3, 2, "same"))]),
        ((4, 7, 6, 3), lambda L: [L.MaxPooling3D((1, 2, 2)), L.UpSampling3D((1, 2, 3)), L.ReLU()]),
        ((4, 7, 6, 3), lambda L: [L.MaxPooling3D(2, 1, "same"), L.Flatten(), L.Dense(3, "softmax")]),
        ((3, 4, 7, 6), lambda L: [L.MaxPooling3D(2, data_format="channels_first")]),
        (
            (7, 6, 3),
            lambda L: [L.MaxPooling2D(2), L.UpSampling2D((2, 1), interpolation="bilinear"), L.LeakyReLU(0.1), L.ELU()],
        ),
        (
            (3, 7, 6),
            lambda L: [L.MaxPooling2D((3, 2), data_format="channels_first"), L.UpSampling2D(3, "channels_first")],
        ),
        ((7, 5, 3), lambda L: [L.AveragePooling2D(3, 2, "same"), L.ZeroPadding2D(((1, 0), (2, 1)))]),
        ((7, 6, 3), lambda L: [L.GlobalAveragePooling2D(), L.Dense(4), L.Softmax()]),
        ((3, 7, 6), lambda L: [L.GlobalAveragePooling2D(data_format="channels_first", keepdims=True)]),
        ((4, 7, 6, 3), lambda L: [L.GlobalAveragePooling3D()]),
        ((4, 7, 6, 3), lambda L: [L.GlobalMaxPooling3D(keepdims=True)]),
        ((4, 7, 6, 3), lambda L: [L.TimeDistributed(L.GlobalMaxPooling2D()), L.GlobalAveragePooling1D()]),
        ((4, 7, 6, 3), lambda L: [L.BatchNormalization(), L.Activation("swish"), L.Dropout(0.4)]),
        ((4, 3, 7, 6), lambda L: [L.BatchNormalization(axis=2, scale=False, epsilon=0.1)]),
        ((4, 7, 6, 3), lambda L: [L.TimeDistributed(L.BatchNormalization(center=False))]),
        ((7, 6, 3), lambda L: [L.LayerNormalization(), L.LayerNormalization(axis=[2, 3], epsilon=0.1, center=False)]),
        ((4, 7, 6, 3), lambda L: [L.LayerNormalization(axis=(-3, -2, -1))]),
        ((4, 5), lambda L: [L.Dense(3, "selu"), L.ReLU(negative_slope=0.2), L.Dropout(0.5, noise_shape=(None, 1, 3))]),
        ((4, 5), lambda L: [L.Activation("hard_sigmoid"), L.Activation("leaky_relu"), L.Activation("relu6")]),
        ((4, 5, 3), lambda L: [L.Conv2DTranspose(4, 4, 2, "same", activation="mish"), L.Cropping2D(((1, 0), (2, 1)))]),
        ((3, 4, 5), lambda L: [L.Conv2DTranspose(2, (2, 3), (2, 3), data_format="channels_first", use_bias=False)]),
        ((3, 4, 5, 2), lambda L: [L.Conv3DTranspose(3, (3, 4, 4), (1, 2, 2), "same"), L.Cropping3D((0, 1, 1))]),
        ((3, 4, 5, 2), lambda L: [L.TimeDistributed(L.Conv2DTranspose(3, 2, 2, "same")), L.ZeroPadding3D((0, 1, 2))]),
        ((7, 6, 3), lambda L: [L.DepthwiseConv2D(3, depth_multiplier=2, padding="same"), L.ReLU(max_value=6)]),
        ((7, 6, 3), lambda L: [L.SeparableConv2D(4, 3, strides=2, depth_multiplier=2), L.PReLU(shared_axes=[1, 2])]),
        ((7, 6, 4), lambda L: [L.Conv2D(6, 3, groups=2), L.GroupNormalization(3), L.PReLU()]),
        ((4, 5, 3, 4), lambda L: [L.Conv3D(2, 3, groups=2, padding="same"), L.GroupNormalization(-1, epsilon=0.1)]),
        ((4, 5, 3), lambda L: [L.GroupNormalization(2, axis=1), L.SpatialDropout2D(0.3), L.GaussianNoise(0.1)]),
        ((4, 6, 5, 2), lambda L: [L.AveragePooling3D(2), L.SpatialDropout3D(0.3), L.GlobalMaxPooling3D()]),
        (
            (2, 4, 6, 4),
            lambda L: [L.UpSampling3D((2, 1, 2), "channels_first"), L.GlobalAveragePooling3D("channels_first")],
        ),
        ((4, 6, 2), lambda L: [L.Reshape((6, -1)), L.Permute((2, 1)), L.Flatten(), L.RepeatVector(3), L.LSTM(4)]),
        (
            (4, 6),
            lambda L: [L.LSTM(3, return_sequences=True, activation="relu"), L.GRU(4, go_backwards=True), L.Dense(2)],
        ),
        (
            (4, 6),
            lambda L: [L.GRU(3, reset_after=False, return_sequences=True, dropout=0.2), L.LSTM(4, use_bias=False)],
        ),
        ((4, 3, 3, 2), lambda L: [L.TimeDistributed(L.Flatten()), L.Rescaling(2.0, 1.0), L.Dense(2)]),
        ((4, 5), lambda L: [L.ReLU(max_value=1.0, threshold=0.5), L.ReLU(max_value=0.75, negative_slope=0.1)]),
    ],
)
def test_layers(double, tmp_path, shape, make):
    check(double, tmp_path, make(double.layers), shape, rtol=1e-6)  # Keras multiplies matrices in float32


@pytest.mark.keras
def test_embedding(double, tmp_path):
    L = double.layers
    model = shuffle(double.Sequential([L.Input((4,)), L.Embedding(7, 3), L.LSTM(2)]))
    model.save(tmp_path / "m.keras")
    numbers = np.random.default_rng(0).integers(0, 7, (5, 4))
    close(from_keras(tmp_path / "m.keras")(numbers), outputs(model, numbers), 1e-6)


@pytest.mark.keras
def test_regularizers_of_new_layers(keras):
    L = keras.layers
    model = shuffle(keras.Sequential([
        L.Input((8, 8, 2)), L.SeparableConv2D(3, 3, depthwise_regularizer="l2", pointwise_regularizer="l1"),
        L.DepthwiseConv2D(3, depthwise_regularizer="l2", depthwise_constraint="non_neg"),
        L.Conv2DTranspose(2, 3, kernel_regularizer="l2"), L.PReLU(alpha_regularizer="l1"),
        L.GroupNormalization(1, gamma_regularizer="l2"), L.Reshape((6, -1)), L.GRU(2, recurrent_regularizer="l2"),
    ]))  # fmt: skip
    ours = from_keras(model)
    close(ours.penalty, float(sum(model.losses)), 1e-5)


@pytest.mark.keras
def test_weights_of_new_layers_load(keras, tmp_path):
    L = keras.layers
    model = shuffle(keras.Sequential([
        L.Input((3, 8, 8, 2)), L.ConvLSTM2D(2, 3, padding="same"), L.Conv2DTranspose(2, 2, 2), L.GroupNormalization(1),
        L.PReLU(shared_axes=[1, 2]), L.Reshape((16, -1)), L.LSTM(3, return_sequences=True), L.GRU(2),
    ]))  # fmt: skip
    ours, x = from_keras(model), normal(2, 3, 8, 8, 2)
    other = from_keras(shuffle(model, 5))
    shuffle(model, 0).save_weights(tmp_path / "m.weights.h5")
    assert np.abs(other(x) - ours(x)).max() > 1e-3
    load_weights(other, tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(other(x), ours(x))


@pytest.mark.keras
def test_functional_chains(double, tmp_path):
    L = double.layers
    x = y = L.Input((3, 6, 5, 2), name="frames")
    for layer in (L.ConvLSTM2D(2, 3, return_sequences=True), L.ReLU(), L.ConvLSTM2D(3, 1), L.Flatten(), L.Dense(2)):
        y = layer(y)
    model = shuffle(double.Model(x, y))
    model.save(tmp_path / "m.keras")
    frames = normal(2, 3, 6, 5, 2)
    for ours in (from_keras(tmp_path / "m.keras"), from_keras(model)):
        assert len(ours) == 5
        close(ours(frames), outputs(model, frames), 1e-6)


@pytest.mark.keras
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda L: L.UnitNormalization(name="m"),
            r"layer 'm' \(UnitNormalization\): not supported; supported are TimeDistributed, ConvLSTM2D",
        ),
        (
            lambda L: L.TimeDistributed(L.TimeDistributed(L.Masking())),
            "Masking in it: is not supported, as masks are not",
        ),
        (lambda L: L.Embedding(5, 2, mask_zero=True), "mask_zero=True is not supported: masks are not handed on"),
        (
            lambda L: L.GroupNormalization(2, center=False, scale=False),
            "center=False with scale=False is not supported",
        ),
        (lambda L: L.ConvLSTM2D(1, 1, data_format="channels_first", activation="glu"), "unknown activation 'glu'"),
        (lambda L: L.ConvLSTM2D(1, 1, activation=lambda x: x), "an activation must be a name"),
        (
            lambda L: L.Bidirectional(L.ConvLSTM2D(1, 1, data_format="channels_first")),
            "joins the directions on the last",
        ),
        (
            lambda L: L.Bidirectional(L.ConvLSTM2D(1, 1, go_backwards=True), backward_layer=L.ConvLSTM2D(1, 1)),
            "go_backwards=True is not supported",
        ),
        (
            lambda L: L.Bidirectional(L.ConvLSTM2D(1, 1), backward_layer=L.ConvLSTM2D(1, 3, go_backwards=True)),
            "both directions must have the same options",
        ),
        (lambda L: L.Conv3D(2, 1, activity_regularizer="l2"), "activity_regularizer=.* is not supported"),
        (lambda L: L.LayerNormalization(axis=1), r"axis=\[1\] is not supported, only the last axes are"),
        (lambda L: L.LayerNormalization(center=False, scale=False), "center=False with scale=False is not supported"),
        (lambda L: L.Flatten(data_format="channels_first"), "use channels_last"),
        (lambda L: L.Softmax(axis=1), "axis=1 is not supported"),
        (lambda L: L.TimeDistributed(L.UnitNormalization()), "not supported"),
    ],
)
def test_what_is_not_supported_is_named(keras, make, message):
    model = keras.Sequential([keras.layers.Input((2, 4, 6, 2)), make(keras.layers)])
    with pytest.raises(ValueError, match=rf"from_keras: layer '.*: .*{message}|from_keras: {message}"):
        from_keras(model)


@pytest.mark.keras
def test_layers_of_others_are_not_taken_for_keras_s(keras):
    @keras.saving.register_keras_serializable("mine")
    class ReLU(keras.layers.ReLU):
        pass

    with pytest.raises(ValueError, match=r"\(ReLU\): not supported"):
        from_keras(keras.Sequential([keras.layers.Input((3,)), ReLU()]))


@pytest.mark.keras
def test_unbuilt_models(keras):
    with pytest.raises(ValueError, match="has no weights; build the model"):
        from_keras(keras.Sequential([keras.layers.ConvLSTM2D(2, 3)]))


def test_wrong_sources():
    with pytest.raises(TypeError, match="source must be a path or a Keras model, got int"):
        from_keras(3)
    with pytest.raises(FileNotFoundError):
        from_keras("nothing.keras")


# Keras 2


@pytest.mark.keras
def test_old_format(double, tmp_path):
    L = double.layers
    layers = [L.ConvLSTM2D(2, 3, return_sequences=True), L.Bidirectional(L.ConvLSTM2D(2, 3)), L.LeakyReLU(0.1)]
    model = shuffle(double.Sequential([L.Input((3, 6, 5, 2)), *layers]))
    model.save(tmp_path / "m.h5")
    x = normal(2, 3, 6, 5, 2)
    close(from_keras(tmp_path / "m.h5")(x), outputs(model, x))


class OldModel:
    """A live model as Keras 2 describes it."""

    __module__ = "tf_keras.engine.sequential"

    def __init__(self, layers, arrays):
        self.config, self.arrays = layers, arrays

    def get_config(self):
        return {"name": "sequential", "layers": self.config}

    @property
    def layers(self):
        return [
            type("Layer", (), {"name": name, "get_weights": lambda self, a=a: a})() for name, a in self.arrays.items()
        ]


@pytest.mark.parametrize(("version", "expected"), [("2.15.0", "hard_sigmoid_keras2"), ("3.1.0", "hard_sigmoid")])
def test_keras_2_has_another_hard_sigmoid(monkeypatch, version, expected):
    import sys
    import types

    monkeypatch.setitem(sys.modules, "tf_keras", types.SimpleNamespace(__version__=version))
    lstm = {
        "name": "lstm", "trainable": True, "batch_input_shape": (None, None, 8, 8, 1), "dtype": "float32",
        "return_sequences": True, "return_state": False, "go_backwards": False, "stateful": False, "unroll": False,
        "time_major": False, "filters": 2, "kernel_size": (3, 3), "strides": (1, 1), "padding": "same",
        "data_format": "channels_last", "dilation_rate": (1, 1), "activation": "tanh",
        "recurrent_activation": "hard_sigmoid", "use_bias": True, "unit_forget_bias": True, "dropout": 0.0,
        "recurrent_dropout": 0.0, "kernel_regularizer": None,
    }  # fmt: skip
    norm = {"name": "bn", "axis": [4], "momentum": 0.9, "epsilon": 0.01, "center": True, "scale": True}
    relu = {"name": "leaky", "alpha": 0.25}
    arrays = {"lstm": [normal(3, 3, 1, 8), normal(3, 3, 2, 8), normal(8)], "bn": [normal(2) for _ in range(3)] + [
        np.ones(2)], "leaky": []}  # fmt: skip
    specs = [("ConvLSTM2D", lstm), ("BatchNormalization", norm), ("LeakyReLU", relu)]
    model = OldModel([{"class_name": name, "config": config} for name, config in specs], arrays)
    ours = from_keras(model, engine="reference")
    assert [layer.options.get("recurrent_activation") for layer in ours] == [expected, None, None]
    assert ours[2].negative_slope == 0.25
    own = ConvLSTM2D(1, 2, 3, recurrent_activation=expected, engine="reference")
    own.set_parameters(dict(zip(own.parameters, arrays["lstm"], strict=True)))
    x = normal(1, 3, 8, 8, 1)
    np.testing.assert_array_equal(ours[0](x), own(x))
    assert ours(x).shape == (1, 3, 8, 8, 2)


def write_old(path, h5py, specs, arrays, version="2.15.0"):
    """Write a model as the .h5 of Keras 2."""
    with h5py.File(path, "w") as file:
        config = {"class_name": "Sequential", "config": {"name": "sequential", "layers": specs}}
        file.attrs["keras_version"], file.attrs["model_config"] = version, json.dumps(config)
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [name.encode() for name in arrays]
        for name, values in arrays.items():
            own = group.create_group(name)
            own.attrs["weight_names"] = np.array([f"{name}/w{n}:0".encode() for n in range(len(values))], "S40")
            for n, value in enumerate(values):
                own[f"{name}/w{n}:0"] = value


def old_norm(name, axis):
    return {"class_name": "LayerNormalization", "config": {"name": name, "trainable": True, "dtype": "float32",
            "axis": axis, "epsilon": 0.01, "center": True, "scale": True}}  # fmt: skip


def old_lstm(**options):
    config = {
        "name": "lstm", "trainable": True, "dtype": "float32", "return_sequences": True, "return_state": False,
        "go_backwards": False, "stateful": False, "filters": 2, "kernel_size": [3, 3], "strides": [1, 1],
        "padding": "same", "data_format": "channels_last", "dilation_rate": [1, 1], "activation": "tanh",
        "recurrent_activation": "hard_sigmoid", "use_bias": True, "unit_forget_bias": True, "dropout": 0.0,
        "recurrent_dropout": 0.0,
    }  # fmt: skip
    return {"class_name": "ConvLSTM2D", "config": config | options}


LSTM_ARRAYS = [normal(3, 3, 1, 8), normal(3, 3, 2, 8), normal(8)]


@pytest.mark.parametrize("carried", ["on the first layer", "on an input layer"])
def test_layer_normalization_of_keras_2(tmp_path, carried):
    """Its axes are counted from the first, so that the number of axes is needed; only the first layer tells it."""
    import h5py

    shape = {"batch_input_shape": [None, 4, 6, 5, 1]}
    entry = {"class_name": "InputLayer", "config": {"name": "input", "dtype": "float32"} | shape}
    specs = [
        old_norm("n1", [4]), old_lstm(), old_norm("n2", [3, 4]),
        {"class_name": "TimeDistributed", "config": {"name": "td", "layer": old_norm("n3", [3])}},
        old_lstm(name="last", return_sequences=False), old_norm("n4", [1, 2, 3]),
        {"class_name": "GlobalAveragePooling2D", "config": {"name": "gap", "data_format": "channels_last"}},
        old_norm("n5", [1]),
    ]  # fmt: skip
    specs[0]["config"] |= shape if carried == "on the first layer" else {}
    specs = specs if carried == "on the first layer" else [entry, *specs]
    sizes = {"n1": (1,), "n2": (5, 2), "td": (2,), "n4": (6, 5, 2), "n5": (2,)}
    arrays = {spec["config"]["name"]: [] for spec in specs}
    arrays |= {name: [normal(*s), normal(*s, seed=2)] for name, s in sizes.items()}
    arrays |= {"lstm": LSTM_ARRAYS, "last": [normal(3, 3, 2, 8), *LSTM_ARRAYS[1:]]}
    write_old(tmp_path / "old.h5", h5py, specs, arrays)
    ours = from_keras(tmp_path / "old.h5", engine="reference")
    names = [spec["config"]["name"] for spec in specs if spec["class_name"] != "InputLayer"]
    found = {name: layer.parameters for name, layer in zip(names, ours, strict=True)}
    for name, size in sizes.items():
        assert [a.shape for a in found[name].values()] == [size, size]
        np.testing.assert_array_equal(next(iter(found[name].values())), arrays[name][0].astype("f4"))
    assert ours(normal(2, 4, 6, 5, 1)).shape == (2, 2)
    bad = [specs[-1] | {"config": specs[-1]["config"] | {"axis": [0]}}]
    write_old(tmp_path / "bad.h5", h5py, [*specs[:-1], *bad], arrays)
    with pytest.raises(ValueError, match=r"layer 'n5' .*axis=\[0\] is not supported, only the last axes are"):
        from_keras(tmp_path / "bad.h5")


@pytest.mark.parametrize(("version", "doubled"), [("2.12.0", True), ("2.13.1", True), ("2.14.0", False)])
def test_models_of_the_first_keras_format(tmp_path, version, doubled):
    """Files of TF 2.12 to 2.14, rebuilt by hand: their group of layers, and numbers of layers that are left out."""
    import h5py

    def wrap(name, config):
        return {"module": "keras.layers", "class_name": name, "config": config, "registered_name": None}

    flatten = wrap("Flatten", {"name": "f", "data_format": "channels_last"})
    dense = wrap("Dense", {"name": "dense", "units": 3, "activation": "relu", "use_bias": True})
    specs = [
        wrap("InputLayer", {"name": "in", "batch_input_shape": [None, 4, 6, 5, 1]}),
        old_lstm(name="a"), wrap("Dropout", {"name": "drop", "rate": 0.5}), old_lstm(name="b"),
        wrap("TimeDistributed", {"name": "flat", "layer": flatten}),
        wrap("TimeDistributed", {"name": "td", "layer": dense}), old_norm("norm", [2]),
    ]  # fmt: skip
    second = [normal(3, 3, 2, 8), *LSTM_ARRAYS[1:]]
    weights = {"a": LSTM_ARRAYS, "b": second, "td": [normal(60, 3), normal(3)], "norm": [normal(3), normal(3, seed=2)]}
    stems = {"ConvLSTM2D": ("conv_lstm2d", "cell/vars"), "TimeDistributed": ("time_distributed", "layer/vars"),
             "LayerNormalization": ("layer_normalization", "vars"), "Dropout": ("dropout", ""),
             "InputLayer": ("input_layer", "")}  # fmt: skip
    layers = []
    for spec in specs:
        stem, place = stems[spec["class_name"]]
        own = weights.get(spec["config"]["name"], [])
        layers.append((stem, {f"{place}/{n}": array for n, array in enumerate(own)}))
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        as_keras_2(file, layers, doubled)
    config = {"module": "keras", "class_name": "Sequential", "config": {"name": "sequential", "layers": specs}}
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": version}))
        archive.writestr("config.json", json.dumps(config))
        archive.write(tmp_path / "m.weights.h5", "model.weights.h5")
    ours = from_keras(tmp_path / "m.keras", engine="reference")
    assert [layer.options.get("recurrent_activation") for layer in ours][:3:2] == 2 * ["hard_sigmoid_keras2"]
    expected = [array.astype("f4") for name in ("a", "b", "td", "norm") for array in weights[name]]
    for array, value in zip(ours.parameters.values(), expected, strict=True):
        np.testing.assert_array_equal(array, value)
    other = from_keras(tmp_path / "m.keras", engine="reference")
    other.set_parameters({name: np.zeros_like(array) for name, array in other.parameters.items()})
    load_weights(other, tmp_path / "m.weights.h5")
    x = normal(2, 4, 6, 5, 1)
    np.testing.assert_array_equal(other(x), ours(x))


@pytest.mark.parametrize("kind", ["weights of 2.13", "weights of 2.11", "model", "model of Keras 3"])
def test_weights_of_keras_2_warn_of_another_recurrent_activation(tmp_path, kind):
    import h5py

    path = tmp_path / "m.h5"
    if kind == "weights of 2.13":
        with h5py.File(path, "w") as file:
            as_keras_2(file, [("conv_lstm2d", {f"cell/vars/{n}": a for n, a in enumerate(LSTM_ARRAYS)})], True)
    else:
        write_old(path, h5py, [old_lstm()], {"lstm": LSTM_ARRAYS}, "3.1.0" if "3" in kind else "2.11.0")
        if "weights" in kind:
            with h5py.File(path, "a") as file:
                del file.attrs["model_config"]
    right = "hard_sigmoid" if "3" in kind and "model" in kind else "hard_sigmoid_keras2"
    layer = ConvLSTM2D(1, 2, 3, recurrent_activation=right)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(layer, path)
    with pytest.warns(UserWarning, match=rf"m\.h5: .*{right}'.*but the layer has 'sigmoid'") as told:
        load_weights(ConvLSTM2D(1, 2, 3), path)
    assert told[0].filename == __file__


# Custom classes and functions


def soft(x):
    return x / 2


def halves(x):
    return np.full_like(x, 0.5)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("soft", "soft"),
        (
            {"module": "builtins", "class_name": "function", "config": "mine>soft", "registered_name": "function"},
            "soft",
        ),
        ({"class_name": "function", "config": "mine>soft"}, "mine>soft"),
        ({"module": None, "class_name": "Soft", "config": {"slope": 0.5}, "registered_name": "mine>Soft"}, "mine>Soft"),
        ({"value": ["4wEAAA", None, None]}, "<lambda>"),
    ],
)
def test_activations_given_as_objects(tmp_path, spec, name):
    import h5py

    write_old(tmp_path / "m.h5", h5py, [old_lstm(activation=spec)], {"lstm": LSTM_ARRAYS}, "3.1.0")
    with pytest.raises(
        ValueError, match=r"from_keras: layer 'lstm' \(ConvLSTM2D\): .*(activation must be|unknown act)"
    ):
        from_keras(tmp_path / "m.h5")
    seen = []
    ours = from_keras(tmp_path / "m.h5", engine="reference",
                      custom={name: lambda config: seen.append(config) or (soft, halves)})  # fmt: skip
    assert seen == [spec["config"] if isinstance(spec, dict) and name == "mine>Soft" else {}]
    own = ConvLSTM2D(1, 2, 3, activation=(soft, halves), recurrent_activation="hard_sigmoid", engine="reference")
    own.set_parameters(dict(zip(own.parameters, LSTM_ARRAYS, strict=True)))
    x = normal(1, 3, 6, 5, 1)
    np.testing.assert_array_equal(ours(x), own(x))


@pytest.mark.keras
def test_layers_of_keras_as_activations(double, tmp_path):
    L = double.layers
    activations = (L.LeakyReLU(0.3), L.ReLU(), L.LeakyReLU(0.2), L.ReLU(negative_slope=0.1))
    model = shuffle(double.Sequential([L.Input((6, 5, 2)), *(L.Conv2D(2, 1, activation=a) for a in activations)]))
    model.save(tmp_path / "model.keras")
    x = normal(2, 6, 5, 2)
    close(from_keras(tmp_path / "model.keras", engine="reference")(x), outputs(model, x), 1e-6)


@pytest.mark.keras
def test_custom_layers(double, tmp_path):
    @double.saving.register_keras_serializable("mine")
    class Twice(double.layers.Dense):
        def call(self, x):
            return 2 * super().call(x)

    model = shuffle(double.Sequential([double.layers.Input((3,)), Twice(2, name="t")]))
    model.save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match=r"layer 't' \(Twice\): not supported.*custom=\{'Twice': "):
        from_keras(tmp_path / "m.keras")

    def make(config):
        return Dense(3, config["units"], activation=(lambda x: 2 * x, lambda x: 2 + 0 * x), dtype="float64")

    for name in ("mine>Twice", "Twice"):
        ours = from_keras(tmp_path / "m.keras", custom={name: make})
        x = normal(4, 3)
        close(ours(x), outputs(model, x), 1e-6)
    with pytest.raises(ValueError, match=r"custom\['Twice'\] must return a layer of fastclstm, got int"):
        from_keras(tmp_path / "m.keras", custom={"Twice": lambda config: 3})
    with pytest.raises(ValueError, match=r"layer 't' \(Twice\): has 2 arrays of weights but needs 1 \(kernel\)"):
        from_keras(tmp_path / "m.keras", custom={"Twice": lambda config: Dense(3, 2, use_bias=False)})


def test_the_layer_within_is_named(tmp_path):
    import h5py

    inner = {"class_name": "UnitNormalization", "config": {"name": "unit"}}
    spec = {"class_name": "TimeDistributed", "config": {"name": "td", "layer": inner}}
    write_old(tmp_path / "m.h5", h5py, [spec], {"td": []})
    with pytest.raises(
        ValueError, match=r"layer 'td' \(TimeDistributed\): UnitNormalization in it: not supp"
    ) as caught:
        from_keras(tmp_path / "m.h5")
    assert len(str(caught.value)) - len(str(tmp_path)) < 300
    assert str(tmp_path / "m.h5") in str(caught.value)


def test_no_weights_are_drawn(tmp_path, monkeypatch):
    """Only to be replaced: the orthogonal ones take seconds."""
    import h5py

    from fastclstm.nn import initializers

    write_old(tmp_path / "m.h5", h5py, [old_lstm()], {"lstm": LSTM_ARRAYS})
    monkeypatch.setattr(initializers.Orthogonal, "__call__", lambda *_: pytest.fail("drawn"))
    np.testing.assert_array_equal(from_keras(tmp_path / "m.h5")[0].cells[0].bias, LSTM_ARRAYS[2].astype("f4"))


@pytest.mark.keras
def test_pure_bfloat16(keras, tmp_path):
    L = keras.layers
    layers = [L.ConvLSTM2D(2, 3, recurrent_initializer="glorot_uniform", dtype="bfloat16"), L.Flatten(), L.Dense(2)]
    model = keras.Sequential([L.Input((3, 6, 5, 2)), *layers])
    expected = [numpy(weight.value.float()) for weight in model.weights]
    for ending in ("keras", "h5"):
        model.save(tmp_path / f"m.{ending}")
        ours = from_keras(tmp_path / f"m.{ending}")
        for array, value in zip(ours.parameters.values(), expected, strict=True):
            np.testing.assert_array_equal(array, value)


@pytest.mark.keras
def test_subclassed_models(keras, tmp_path):
    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = keras.layers.ConvLSTM2D(2, 3), keras.layers.Dense(2)

        def call(self, x):
            return self.head(self.lstm(x))

    model = Mine()
    model(np.zeros((1, 2, 5, 5, 1), "f4"))
    model.save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match=r"m\.keras holds a subclassed model, Mine"):
        from_keras(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    ours = Sequential([ConvLSTM2D(1, 2, 3), Dense(2, 2)])
    with pytest.raises(ValueError, match=r"m\.weights\.h5 holds the weights of .*subclassed model"):
        load_weights(ours, tmp_path / "m.weights.h5")


# Weights alone


@pytest.mark.keras
@pytest.mark.parametrize("ending", ["weights.h5", "keras", "h5"])
def test_weights_into_layers_that_are_there(double, tmp_path, ending):
    L = double.layers
    model = shuffle(double.Sequential([
        L.Input((3, 6, 5, 2)), L.ConvLSTM2D(2, 3, return_sequences=True), L.BatchNormalization(),
        L.Bidirectional(L.ConvLSTM2D(2, 3, return_sequences=True)), L.ReLU(), L.ConvLSTM2D(3, 1),
        L.Flatten(), L.Dense(2), L.Dense(2),
    ]))  # fmt: skip
    path = tmp_path / f"m.{ending}"
    (model.save_weights if ending == "weights.h5" else model.save)(path)
    ours, other = from_keras(model), from_keras(shuffle(model, 1))
    load_weights(other, path)
    for name, array in ours.parameters.items():
        np.testing.assert_array_equal(array, other.parameters[name])


@pytest.mark.keras
def test_weights_into_stacked_layers(double, tmp_path):
    L = double.layers
    layers = [L.ConvLSTM2D(2, 3, padding="same", return_sequences=True) for _ in range(3)]
    model = shuffle(double.Sequential([L.Input((3, 6, 5, 2)), *layers]))
    model.save_weights(tmp_path / "m.weights.h5")
    ours = ConvLSTM2D(2, 2, 3, num_layers=3, dtype="float64")
    load_weights(ours, tmp_path / "m.weights.h5")
    x = normal(2, 3, 6, 5, 2)
    close(ours(x), outputs(model, x))


@pytest.mark.keras
def test_weights_that_do_not_fit(keras, tmp_path):
    L, path = keras.layers, tmp_path / "m.weights.h5"
    model = keras.Sequential([L.Input((3, 6, 5, 2)), L.ConvLSTM2D(2, 3), L.Flatten(), L.Dense(2)])
    model.save_weights(path)
    with pytest.raises(ValueError, match="holds weights alone; build the layers, then"):
        from_keras(path)
    layer = ConvLSTM2D(2, 2, 3, seed=0)
    before = layer.cells[0].kernel
    with pytest.raises(
        ValueError, match="holds the weights of layers/conv_lstm2d, layers/dense, but ConvLSTM2D has ConvL"
    ):
        load_weights(layer, path)
    wrong = Sequential([layer, Flatten(), Dense(24, 3)])
    with pytest.raises(ValueError, match=r"m\.weights\.h5 does not fit: .*2\.kernel has shape \(24, 2\)"):
        load_weights(wrong, path)
    wrong = Sequential([layer, Flatten(), Dense(24, 2, use_bias=False)])
    with pytest.raises(ValueError, match=r"layers/dense in .* has 2 arrays, but Dense needs 1: 2\.kernel"):
        load_weights(wrong, path)
    assert layer.cells[0].kernel is before
    with pytest.raises(ValueError, match=r"Keras's ConvLSTM2D has no layers\.0\.peephole_i"):
        load_weights(ConvLSTM2D(2, 2, 3, peephole="channel"), path)


@pytest.mark.keras
def test_weights_of_distributed_layers(keras, tmp_path):
    """Those without weights, too, count where Keras numbers them."""
    L, path = keras.layers, tmp_path / "m.weights.h5"
    model = shuffle(keras.Sequential([L.Input((3, 4)), L.TimeDistributed(L.Flatten()), L.TimeDistributed(L.Dense(2)),
                                      L.BatchNormalization()]))  # fmt: skip
    model.save_weights(path)
    ours = Sequential([TimeDistributed(Flatten()), TimeDistributed(Dense(4, 2)), BatchNormalization(2)])
    load_weights(ours, path)
    x = normal(2, 3, 4)
    close(ours(x), outputs(model, x), 1e-6)
