import numpy as np
import pytest
from layer_checks import check_layer, equal, keras_values, normal

from fastclstm.layers import Permute, RepeatVector, Reshape

LAYERS = [
    (Reshape((4, 3)), (2, 12)),
    (Reshape((-1, 2)), (2, 3, 4)),
    (Reshape(-1), (2, 3, 4)),
    (Reshape(()), (3, 1)),
    (Permute((2, 1)), (2, 3, 4)),
    (Permute((3, 1, 2)), (2, 3, 4, 5)),
    (Permute((4, 1, 3, 2)), (2, 3, 4, 5, 2)),
    (RepeatVector(3), (2, 4)),
    (RepeatVector(2), (2, 3, 4, 1)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_gradients_and_laws(layer, shape, tmp_path):
    check_layer(layer, normal(*shape), tmp_path / "layer")


def test_numbers():
    x = normal(2, 3, 4, 5)
    equal(Permute((3, 1, 2))(x), np.moveaxis(x, -1, 1))
    equal(Reshape((5, -1))(x), x.reshape(2, 5, 12))
    equal(RepeatVector(4)(x)[:, 2], x)


@pytest.mark.keras
def test_values_of_keras():
    x = normal(2, 3, 4, 5)
    for shape in ((12, 5), (-1, 2, 3), (60,)):
        equal(Reshape(shape)(x), keras_values(lambda L, shape=shape: L.Reshape(shape, dtype="float64"), x))
    for dims in ((3, 1, 2), (2, 1, 3), (1, 2, 3)):
        equal(Permute(dims)(x), keras_values(lambda L, dims=dims: L.Permute(dims, dtype="float64"), x))
    equal(RepeatVector(3)(x[:, 0, 0]), keras_values(lambda L: L.RepeatVector(3, dtype="float64"), x[:, 0, 0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reshape((2, -1, -1)), "Reshape: target_shape must hold sizes >= 1 and at most one -1, got"),
        (lambda: Reshape((2, 0)), "Reshape: target_shape must hold"),
        (
            lambda: Reshape((5,))(np.zeros((2, 4))),
            r"the 4 values of a sample of x, \(2, 4\), do not fill target_shape \(5,\)",
        ),
        (lambda: Reshape((3, -1))(np.zeros((2, 4))), "do not fill"),
        (lambda: Permute((1, 3)), r"Permute: dims must be the numbers 1 to 2 in some order, got \(1, 3\)"),
        (lambda: Permute((2, 1))(np.zeros((2, 3, 4, 5))), "Permute: x must have 2 axes behind the batch"),
        (lambda: RepeatVector(0), "RepeatVector: n must be an integer >= 1"),
        (lambda: RepeatVector(2)(np.zeros(3)), "RepeatVector: x must be"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
