import numpy as np
import pytest
from layer_checks import check_gradients, check_laws, check_saving, close, equal, normal

from fastclstm.layers import Dense, Flatten


@pytest.mark.parametrize("activation", ["linear", "tanh", "softmax", (np.sin, np.cos)], ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 1, 5, 4)], ids=str)
@pytest.mark.parametrize("use_bias", [True, False])
def test_gradients_and_laws(activation, shape, use_bias):
    layer = Dense(4, 3, activation, use_bias=use_bias, bias_initializer="random_normal", dtype="float64", seed=0)
    check_gradients(layer, normal(*shape))
    check_laws(layer, normal(*shape))


def test_numbers():
    layer = Dense(2, 2, seed=0, dtype="float64")
    layer.kernel, layer.bias = [[1.0, 2.0], [3.0, 4.0]], [10.0, 20.0]
    equal(layer([[1.0, 1.0], [0.0, 2.0]]), [[14.0, 26.0], [16.0, 28.0]])
    layer(np.ones((1, 2)), training=True)
    equal(layer.backward(np.array([[1.0, 10.0]])), [[21.0, 43.0]])
    equal(layer.get_gradients()["kernel"], [[1.0, 10.0], [1.0, 10.0]])
    equal(layer.get_gradients()["bias"], [1.0, 10.0])


def test_float32_is_the_default_and_inputs_are_converted():
    layer = Dense(3, 2, seed=0)
    assert layer(np.ones((2, 3), np.int64)).dtype == np.float32
    assert Dense(3, 2, dtype=np.float64)(np.ones((2, 3), np.float16)).dtype == np.float64
    close(Dense(3, 2, seed=0, dtype="float64").kernel, layer.kernel, 1e-7)


@pytest.mark.keras
def test_softmax_classes_of_keras(keras):
    x = normal(5, 7).astype(np.float32)
    theirs = keras.layers.Dense(4, activation="softmax")
    expected = np.asarray(theirs(x).detach())
    layer = Dense(7, 4, "softmax")
    layer.set_parameters(dict(zip(("kernel", "bias"), theirs.get_weights(), strict=True)))
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_frozen_layers_keep_no_gradients_but_hand_them_on():
    layer = Dense(3, 2, dtype="float64", seed=0)
    y = layer(normal(2, 3), training=True)
    free = layer.backward(y)
    layer.trainable = False
    layer(normal(2, 3), training=True)
    equal(layer.backward(y), free)
    assert layer.get_gradients() == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features must be an integer >= 1"),
        ({"out_features": 2.5}, TypeError, "out_features must be an integer"),
        ({"activation": "max"}, ValueError, "unknown activation 'max'"),
        ({"dtype": "float16"}, ValueError, "dtype must be one of"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=f"Dense: {message}"):
        Dense(**{"in_features": 3, "out_features": 2} | options)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"Dense: x must be \(…, 3\) since in_features is 3, got shape \(2, 4\)"):
        Dense(3, 2)(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="Flatten: x must have a batch axis"):
        Flatten()(1.0)


def test_flatten():
    x = normal(2, 3, 4, 5)
    equal(Flatten()(x), x.reshape(2, 60))
    check_gradients(Flatten(), x)
    check_laws(Flatten(), x)
    assert Flatten()(np.zeros((2, 0, 3))).shape == (2, 0)
    assert Flatten()(np.zeros(3)).shape == (3, 1)


def test_saving(tmp_path):
    check_saving(Dense(3, 2, "softmax", dtype="float64", seed=0), normal(2, 3), tmp_path / "dense.safetensors")
    check_saving(Dense(3, 2, use_bias=False), normal(2, 3), tmp_path / "plain.safetensors")


def test_the_softmax_returned_may_be_written_to():
    layer = Dense(3, 4, "softmax", dtype="float64", seed=0)
    x, dy = normal(5, 3), normal(5, 4, seed=2)
    layer(x, training=True)
    expected = layer.backward(dy)
    p = layer(x, training=True)
    p[:, 0] -= 1
    equal(layer.backward(dy), expected)


def test_the_bias_gradient_of_many_rows_keeps_its_digits():
    layer = Dense(1, 3)
    layer(np.zeros((400_000, 1), np.float32), training=True)
    layer.backward(np.full((400_000, 3), 0.1, np.float32))
    bias = layer.get_gradients()["bias"]
    assert bias.dtype == np.float32
    close(bias, [40_000] * 3, 1e-6)


def test_a_flag_is_true_or_false():
    with pytest.raises(ValueError, match="Dense: use_bias must be True or False, got 'no'"):
        Dense(1, 1, use_bias="no")
