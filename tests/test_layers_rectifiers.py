import numpy as np
import pytest
from layer_checks import check_against_torch, check_layer, check_penalties, close, equal, keras_values, normal

from fastclstm.layers import Activation, LeakyReLU, PReLU, ReLU

FIXED = {"dtype": "float64", "seed": 0, "alpha_initializer": "random_normal"}
LAYERS = [
    ReLU(),
    ReLU(6.0),
    ReLU(1, 0.1),
    ReLU(2.0, 0.3, 0.5),
    ReLU(threshold=1.0),
    PReLU(3, **FIXED),
    PReLU((1, 1, 3), **FIXED),
    PReLU((4, 2, 3), **FIXED),
    PReLU((4, 1, 1), **FIXED),
    PReLU(1, **FIXED),
]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_gradients_and_laws(layer, tmp_path):
    check_layer(layer, 2 * normal(2, 4, 2, 3), tmp_path / "layer")


def test_special_cases():
    x = 4 * normal(3, 5)
    equal(ReLU()(x), Activation("relu")(x))
    equal(ReLU(6)(x), Activation("relu6")(x))
    equal(ReLU(negative_slope=0.3)(x), LeakyReLU(0.3)(x))
    wild = np.array([-np.inf, np.inf, np.nan, 0.0])
    equal(ReLU()(wild), [0, np.inf, np.nan, 0])
    equal(ReLU(6.0, 0.5)(wild), [-np.inf, 6, np.nan, 0])
    for kind in (ReLU(), Activation("relu")):
        kind(np.zeros(1), training=True)
        equal(kind.backward(np.ones(1)), [0])


@pytest.mark.torch
def test_values_and_gradients_of_torch():
    torch = pytest.importorskip("torch")
    F, x = torch.nn.functional, 4 * normal(2, 3, 4, 5)
    check_against_torch(ReLU(6.0), x, F.relu6)
    check_against_torch(Activation("relu6"), x, F.relu6)
    check_against_torch(Activation("mish"), x, F.mish)
    for layer in (PReLU((3, 1, 1), **FIXED), PReLU(1, **FIXED)):
        check_against_torch(layer, x, F.prelu, ("alpha", lambda alpha: alpha.reshape(-1)))


@pytest.mark.keras
def test_values_of_keras():
    x = 2 * normal(2, 3, 4, 5)
    for options in (
        {},
        {"max_value": 1.0},
        {"negative_slope": 0.1, "threshold": 0.5},
        {"max_value": 2.0, "threshold": 1.0},
    ):
        close(ReLU(**options)(x), keras_values(lambda L, o=options: L.ReLU(**o, dtype="float64"), x))
    for shape, shared in (((3, 4, 5), None), ((1, 1, 5), [1, 2])):
        layer = PReLU(shape, **FIXED)
        theirs = keras_values(lambda L, s=shared: L.PReLU(shared_axes=s, dtype="float64"), x, [layer.alpha])
        close(layer(x), theirs)
    for name in ("relu6", "mish"):
        close(Activation(name)(x), keras_values(lambda L, n=name: L.Activation(n, dtype="float64"), x))


def test_penalties():
    check_penalties(PReLU(2, alpha_regularizer="l2", alpha_constraint="non_neg", **FIXED), normal(3, 2), "alpha")


def test_errors():
    for options, name in (
        ({"max_value": -1}, "max_value"),
        ({"threshold": "a"}, "threshold"),
        ({"negative_slope": -1}, "n"),
    ):
        with pytest.raises(ValueError, match=f"ReLU: {name}.* must be a number >= 0"):
            ReLU(**options)
    with pytest.raises(ValueError, match=r"PReLU: alpha of shape \(3,\) does not broadcast against the last axes of x"):
        PReLU(3)(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="PReLU: shape must be an integer >= 1"):
        PReLU(0)
