"""Every layer that is read of Keras, against Keras: its options, values, gradients' penalties."""

import numpy as np
import pytest
from keras_models import check, close, normal, numpy, outputs, shuffle

from fastclstm.convert.keras import from_keras, load_weights
from fastclstm.layers import ConvLSTM2D
from fastclstm.models import Sequential

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.usefixtures("seeded_keras"),
]


@pytest.fixture(params=["reference", "cpu"])
def engine(request):
    return request.param


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
