import numpy as np
import pytest
from layer_checks import check_layer, close, equal, keras_values, normal

from fastclstm.layers import Cropping2D, Cropping3D, ZeroPadding2D, ZeroPadding3D

LAYERS = [
    (Cropping2D(), (2, 4, 3, 2)),
    (Cropping2D((0, 1)), (2, 2, 4, 3, 2)),
    (Cropping2D(((1, 2), (0, 1)), data_format="channels_first"), (2, 2, 4, 3)),
    (Cropping3D(), (2, 3, 4, 3, 2)),
    (Cropping3D(((1, 0), (0, 2), (1, 1))), (2, 3, 4, 3, 2)),
    (Cropping3D((0, 1, 1), data_format="channels_first"), (2, 2, 3, 4, 3)),
    (ZeroPadding3D(), (2, 2, 3, 1, 2)),
    (ZeroPadding3D((0, 1, 2)), (2, 2, 3, 1, 2)),
    (ZeroPadding3D(((1, 2), (0, 3), (0, 0)), data_format="channels_first"), (2, 1, 2, 3, 2)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_gradients_and_laws(layer, shape, tmp_path):
    check_layer(layer, normal(*shape), tmp_path / "layer")


def test_one_takes_the_other_back():
    x = normal(2, 3, 4, 5, 2)
    for amounts in (1, (0, 2, 1), ((1, 2), (0, 3), (2, 0))):
        equal(Cropping3D(amounts)(ZeroPadding3D(amounts)(x)), x)
    for amounts in (1, (0, 2), ((1, 2), (0, 3))):
        padded = ZeroPadding2D(amounts)(x)
        equal(Cropping2D(amounts)(padded), x)
        close(padded.sum(), x.sum())


@pytest.mark.keras
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_values_of_keras(data_format):
    options = {"data_format": data_format}
    volumes, frames = normal(2, 6, 7, 5, 6), normal(2, 6, 7, 5)
    for kind, x, cases in (
        (Cropping2D, frames, [1, (2, 1), ((1, 2), (0, 1))]),
        (ZeroPadding2D, frames, [1, (2, 1), ((1, 2), (0, 1))]),
        (Cropping3D, volumes, [1, (2, 1, 0), ((1, 2), (0, 1), (1, 1))]),
        (ZeroPadding3D, volumes, [1, (2, 1, 0), ((1, 2), (0, 1), (1, 1))]),
    ):
        for amounts in cases:
            theirs = keras_values(lambda L, k=kind, a=amounts: getattr(L, k.__name__)(a, dtype="float64", **options), x)
            equal(kind(amounts, **options)(x), theirs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cropping2D((1, 2, 3)), "Cropping2D: cropping must be an int, 2 ints or 2 pairs of ints, got"),
        (lambda: ZeroPadding3D((1, 2)), "ZeroPadding3D: padding must be an int, 3 ints or 3 pairs of ints, got"),
        (lambda: Cropping3D(-1), "Cropping3D: cropping of the time must be"),
        (lambda: Cropping2D(2)(np.zeros((1, 4, 5, 1))), "Cropping2D: cropping 2 leaves nothing of the height of 4"),
        (lambda: Cropping2D(1, data_format="NCHW"), "data_format must be one of"),
        (lambda: ZeroPadding3D()(np.zeros((1, 4, 5, 1))), r"ZeroPadding3D: x must be \(batch, time, .* got 4D"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
