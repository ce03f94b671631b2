import numpy as np
import pytest
from layer_checks import check_gradients, check_laws, check_saving, close, equal, normal

from fastclstm.layers import Activation, LeakyReLU, Softmax
from fastclstm.nn import activations

LAYERS = [Softmax(), LeakyReLU(0.3), LeakyReLU(0), Activation("softmax"), *map(Activation, activations.TABLE)]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_gradients_and_laws(layer):
    x = normal(2, 3, 5)
    check_gradients(layer, x)
    check_laws(layer, x)


@pytest.mark.parametrize("name", activations.TABLE)
def test_numbers_are_those_of_the_table(name):
    x = normal(4, 3).astype(np.float32)
    y = Activation(name)(x)
    equal(y, activations.get(name).forward(x))
    assert y.dtype == np.float32


def test_a_pair_of_functions():
    layer = Activation((np.sin, np.cos))
    check_gradients(layer, normal(3, 4))
    equal(layer(np.ones(2)), np.sin(np.ones(2)))


def test_softmax_does_not_overflow_and_sums_to_one():
    y = Softmax()(np.array([[1e4, 1e4, -1e4], [0, np.log(3), -np.inf]]))
    close(y, [[0.5, 0.5, 0], [0.25, 0.75, 0]])
    close(Softmax()(normal(2, 3, 4)).sum(-1), np.ones((2, 3)))
    assert Softmax()(np.zeros((2, 0))).shape == (2, 0)


@pytest.mark.torch
def test_softmax_of_torch():
    torch = pytest.importorskip("torch")
    x, dy = normal(3, 4, 5), normal(3, 4, 5, seed=2)
    leaf = torch.tensor(x, requires_grad=True)
    theirs = torch.softmax(leaf, -1)
    theirs.backward(torch.tensor(dy))
    layer = Softmax()
    close(layer(x, training=True), theirs.detach().numpy())
    close(layer.backward(dy), leaf.grad.numpy())
    ours = layer(leaf.detach())
    assert isinstance(ours, torch.Tensor)


def test_leaky_relu_has_its_slope():
    equal(LeakyReLU()(np.array([-10.0, 0.0, 4.0])), [-3.0, 0.0, 4.0])
    equal(LeakyReLU(0.5)(np.array([-10, 4], np.float32)), np.array([-5, 4], np.float32))
    assert np.isnan(LeakyReLU()(np.array([np.nan]))).all()


def test_wrong_options():
    with pytest.raises(ValueError, match=r"Activation: unknown activation 'soft'; known are .*\(or 'softmax'\)"):
        Activation("soft")
    with pytest.raises(TypeError, match="Activation: an activation must be"):
        Activation(3)
    for slope in (-0.1, "a", None, np.inf, True):
        with pytest.raises(ValueError, match="LeakyReLU: negative_slope must be a number >= 0"):
            LeakyReLU(slope)
    with pytest.raises(ValueError, match="Softmax: x must have an axis"):
        Softmax()(1.0)
    with pytest.raises(TypeError, match="Activation: x has dtype complex128"):
        Activation("relu")(np.ones(2, complex))


def test_saving(tmp_path):
    for index, layer in enumerate((LeakyReLU(0.1), Softmax(), Activation("selu"))):
        check_saving(layer, normal(2, 3), tmp_path / f"{index}.safetensors")


@pytest.mark.parametrize(
    "layer", [Softmax(), Activation("softmax"), Activation((lambda z: z, np.cos))], ids=["softmax", "named", "pair"]
)
def test_what_is_returned_may_be_written_to(layer):
    x, dy = normal(3, 4), normal(3, 4, seed=2)
    layer(x, training=True)
    expected = layer.backward(dy)
    y = layer(x.copy(), training=True)
    y[:, 0] -= 1
    equal(layer.backward(dy), expected)


def test_leaky_relu_at_zero_and_without_a_slope():
    layer = LeakyReLU(0.3)
    layer(np.array([0.0, -0.0, 1.0]), training=True)
    equal(layer.backward(np.ones(3)), [0.3, 0.3, 1])
    x = np.array([-np.inf, -1, 0, 2, np.inf, np.nan])
    layer, relu = LeakyReLU(0.0), Activation("relu")
    equal(layer(x, training=True), relu(x, training=True))
    equal(layer.backward(np.ones(6)), relu.backward(np.ones(6)))
