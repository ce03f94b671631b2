import numpy as np
import pytest
from layer_checks import check_gradients, check_laws, check_saving, close, equal, normal

from fastclstm.layers import BatchNormalization, LayerNormalization


def drawn(layer, seed=5):
    """The layer with other values in all its parameters; variances stay above zero."""
    rng = np.random.default_rng(seed)
    for name, array in layer.parameters.items():
        values = rng.standard_normal(array.shape)
        setattr(layer, name, np.exp(values) if name == "moving_variance" else values)
    return layer


BATCH = [
    ({}, (4, 3)),
    ({}, (2, 4, 5, 3)),
    ({"data_format": "channels_first"}, (2, 4, 3, 5, 2)),
    ({"axis": 1, "scale": False}, (3, 3, 4)),
    ({"center": False, "epsilon": 1e-5}, (2, 2, 4, 4, 3)),
    ({"center": False, "scale": False}, (5, 3)),
]
LAYERWISE = [
    ({"shape": 3}, (2, 4, 3)),
    ({"shape": (4, 3)}, (2, 4, 3)),
    ({"shape": (2, 4, 3), "epsilon": 1e-5, "center": False}, (2, 2, 4, 3)),
    ({"shape": [3], "scale": False}, (4, 3)),
]


@pytest.mark.parametrize(("options", "shape"), BATCH, ids=str)
@pytest.mark.parametrize("trainable", [True, False])
def test_gradients_and_laws_of_batch_normalization(options, shape, trainable):
    layer = drawn(BatchNormalization(3, **options, dtype="float64"))
    layer.trainable = trainable
    check_gradients(layer, normal(*shape), tolerance=1e-6)
    check_laws(layer, normal(*shape))


@pytest.mark.parametrize(("options", "shape"), LAYERWISE, ids=str)
def test_gradients_and_laws_of_layer_normalization(options, shape):
    check_gradients(drawn(LayerNormalization(**options, dtype="float64")), normal(*shape), tolerance=1e-6)
    check_laws(LayerNormalization(**options, dtype="float64"), normal(*shape))


def test_training_normalizes_and_moves_the_moving_values():
    x = 3 + 2 * normal(4, 6, 5, 2)
    layer = BatchNormalization(2, momentum=0.9, epsilon=1e-9, dtype="float64")
    y = layer(x, training=True)
    close(y.mean((0, 1, 2)), np.zeros(2))
    close(y.var((0, 1, 2)), np.ones(2), 1e-8)
    close(layer.moving_mean, 0.1 * x.mean((0, 1, 2)))
    close(layer.moving_variance, 0.9 + 0.1 * x.var((0, 1, 2)))
    before = layer.parameters
    close(layer(x), (x - layer.moving_mean) / np.sqrt(layer.moving_variance + 1e-9))
    equal(layer.parameters["moving_mean"], before["moving_mean"])


def test_frozen_it_computes_as_without_training():
    layer = drawn(BatchNormalization(3, dtype="float64"))
    before = layer.parameters
    layer.trainable = False
    x = normal(4, 3)
    equal(layer(x, training=True), layer(x))
    for name, array in layer.parameters.items():
        equal(array, before[name])
    assert layer.trainable_parameters == {}


def test_an_empty_batch_leaves_the_moving_values():
    layer = drawn(BatchNormalization(3))
    before = layer.parameters
    layer(np.zeros((0, 4, 3)), training=True)
    equal(layer.moving_variance, before["moving_variance"])
    layer.backward(np.zeros((0, 4, 3)))
    equal(layer.get_gradients()["gamma"], np.zeros(3))


def test_statistics_have_no_gradient_but_are_parameters():
    layer = BatchNormalization(3)
    assert list(layer.parameters) == ["gamma", "beta", "moving_mean", "moving_variance"]
    assert list(layer.trainable_parameters) == ["gamma", "beta"]


@pytest.mark.parametrize("make", [lambda: BatchNormalization(2), lambda: LayerNormalization((64, 64, 2))])
def test_far_from_zero_float32_keeps_its_digits(make):
    x = (1000 + normal(2, 64, 64, 2)).astype(np.float32)
    axes = (0, 1, 2) if isinstance(make(), BatchNormalization) else (1, 2, 3)
    y = make()(x, training=True)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(axes, keepdims=True)) / np.sqrt(wide.var(axes, keepdims=True) + 1e-3)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_many_pixels_in_float32_give_the_gradients_of_float64():
    x, dy = normal(8, 128, 128, 2), 1 + normal(8, 128, 128, 2, seed=2)
    both = []
    for dtype in ("float32", "float64"):
        layer = BatchNormalization(2, dtype=dtype)
        layer(x, training=True)
        both.append([layer.backward(dy), *layer.get_gradients().values()])
    for narrow, wide in zip(*both, strict=True):
        assert narrow.dtype == np.float32
        np.testing.assert_allclose(narrow, wide, rtol=3e-6, atol=1e-7 * dy.size if narrow.ndim == 1 else 1e-5)


@pytest.mark.keras
@pytest.mark.parametrize(("axis", "shape"), [(-1, (4, 5, 6, 3)), (1, (4, 3, 5))])
def test_batch_normalization_of_keras(keras, axis, shape):
    theirs = keras.layers.BatchNormalization(axis=axis, momentum=0.8)
    theirs.build(shape)
    layer = drawn(BatchNormalization(3, axis=axis, momentum=0.8))
    theirs.set_weights(list(layer.parameters.values()))
    for seed in range(3):
        x = (1 + 2 * normal(*shape, seed=seed)).astype(np.float32)
        expected = np.asarray(theirs(x, training=True).detach())
        np.testing.assert_allclose(layer(x, training=True), expected, rtol=1e-4, atol=1e-5)
    for ours, other in zip(layer.parameters.values(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer(x), np.asarray(theirs(x).detach()), rtol=1e-4, atol=1e-5)


@pytest.mark.torch
def test_batch_and_layer_normalization_of_torch():
    torch = pytest.importorskip("torch")
    x, dy = normal(3, 4, 5, 6), normal(3, 4, 5, 6, seed=2)
    batch = drawn(BatchNormalization(4, data_format="channels_first", epsilon=1e-5, dtype="float64"))
    over_last = drawn(LayerNormalization((5, 6), epsilon=1e-5, dtype="float64"))
    for layer, function in (
        (batch, lambda leaf, g, b: torch.nn.functional.batch_norm(leaf, None, None, g, b, training=True)),
        (over_last, lambda leaf, g, b: torch.nn.functional.layer_norm(leaf, (5, 6), g, b)),
    ):
        leaves = [torch.tensor(a.copy(), requires_grad=True) for a in (x, layer.gamma, layer.beta)]
        theirs = function(*leaves)
        theirs.backward(torch.tensor(dy))
        close(layer(x, training=True), theirs.detach().numpy())
        close(layer.backward(dy), leaves[0].grad.numpy(), 1e-11)
        close(layer.get_gradients()["gamma"], leaves[1].grad.numpy(), 1e-11)
        close(layer.get_gradients()["beta"], leaves[2].grad.numpy(), 1e-11)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_features": 0}, ValueError, "num_features must be"),
        ({"momentum": 1.5}, ValueError, r"momentum must be a number in \[0, 1\]"),
        ({"epsilon": 0}, ValueError, "epsilon must be a number > 0"),
        ({"epsilon": None}, ValueError, "epsilon must be a number > 0"),
        ({"axis": 1.5}, TypeError, "axis must be an integer"),
        ({"axis": 1, "data_format": "channels_first"}, ValueError, "data_format='channels_first' is axis=-3"),
        ({"data_format": "NCHW"}, ValueError, "data_format must be one of"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=f"BatchNormalization: {message}"):
        BatchNormalization(**{"num_features": 3} | options)


def test_wrong_options_of_layer_normalization():
    for shape in ((), (3, 0)):
        with pytest.raises(ValueError, match="LayerNormalization: shape must"):
            LayerNormalization(shape)


def test_wrong_shapes():
    for x in (np.zeros((2, 4)), np.zeros(3), np.zeros(())):
        with pytest.raises(
            ValueError, match="BatchNormalization: x must have at least 2 axes and 3 channels on axis -1"
        ):
            BatchNormalization(3)(x)
    with pytest.raises(ValueError, match=r"LayerNormalization: x must end in the axes \(4, 3\), got shape \(2, 3\)"):
        LayerNormalization((4, 3))(np.zeros((2, 3)))


def test_saving(tmp_path):
    layer = drawn(BatchNormalization(3, momentum=0.5))
    check_saving(layer, normal(4, 3), tmp_path / "batch.safetensors")
    check_saving(drawn(LayerNormalization((2, 3))), normal(4, 2, 3), tmp_path / "layer.safetensors")


@pytest.mark.parametrize("kind", [BatchNormalization, LayerNormalization])
def test_initializers_draw_from_the_seed(kind):
    options = {"gamma_initializer": "random_normal", "beta_initializer": "random_normal"}
    layers = [kind(5, **options, seed=seed) for seed in (1, 1, 2, None, None)]
    equal(layers[0].gamma, layers[1].gamma)
    assert len({layer.gamma.tobytes() for layer in layers}) == 4
    assert (layers[0].gamma != layers[0].beta).any()


@pytest.mark.parametrize("kind", [BatchNormalization, LayerNormalization])
@pytest.mark.parametrize("name", ["center", "scale"])
def test_flags_are_true_or_false(kind, name):
    with pytest.raises(ValueError, match=f"{kind.__name__}: {name} must be True or False, got 'no'"):
        kind(3, **{name: "no"})


def test_the_error_tells_where_channels_may_be():
    with pytest.raises(ValueError, match=r"on axis -3.*'channels_first'.*axis=1 for \(batch, channels, time, height, "):
        BatchNormalization(3, data_format="channels_first")(np.zeros((2, 3, 4, 5, 6)))
