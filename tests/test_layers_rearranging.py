import numpy as np
import pytest
from layer_checks import check_against_torch, check_layer, close, equal, normal

from fastclstm.layers import DepthToSpace, PixelShuffle, PixelUnshuffle, SpaceToDepth

LAYERS = [
    (SpaceToDepth(), (2, 4, 6, 3)),
    (SpaceToDepth((2, 3)), (1, 2, 4, 6, 2)),
    (SpaceToDepth(2, mode="CRD", data_format="channels_first"), (2, 3, 4, 6)),
    (DepthToSpace(), (2, 2, 3, 8)),
    (DepthToSpace((3, 1), data_format="channels_first"), (2, 2, 6, 4, 3)),
    (PixelShuffle(2), (2, 2, 3, 8)),
    (PixelUnshuffle(2), (2, 2, 4, 2, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_gradients_and_laws(layer, shape, tmp_path):
    x = normal(*shape)
    check_layer(layer, x, tmp_path / "layer")
    y = layer(x, training=True)
    equal(layer.backward(y), x)  # the values are only moved


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_one_takes_the_other_back(mode, data_format):
    x = normal(2, 6, 4, 6) if data_format == "channels_first" else normal(2, 4, 6, 6)
    options = {"block_size": (2, 3), "mode": mode, "data_format": data_format}
    equal(DepthToSpace(**options)(SpaceToDepth(**options)(x)), x)


def test_order_of_channels():
    """Which pixel (i, j) and channel c of a block goes where."""
    r, s, C = 2, 3, 4
    x = normal(1, r, s, C)
    row, crd = SpaceToDepth((r, s))(x)[0, 0, 0], SpaceToDepth((r, s), mode="CRD")(x)[0, 0, 0]
    for i, j, c in np.ndindex(r, s, C):
        assert row[(i * s + j) * C + c] == x[0, i, j, c]
        assert crd[(c * r + i) * s + j] == x[0, i, j, c]
    frames = normal(2, 5, 8, 8, 1)
    equal(SpaceToDepth(4)(frames), SpaceToDepth(4, mode="CRD")(frames))


def test_patches_of_openstl():
    """Each patch of p × p pixels, row by row, its channels innermost."""
    x, p = normal(2, 3, 8, 12, 2), 4
    patches = SpaceToDepth(p)(x)
    assert patches.shape == (2, 3, 2, 3, 32)
    for i, j in np.ndindex(2, 3):
        equal(patches[:, :, i, j], x[:, :, p * i : p * i + p, p * j : p * j + p].reshape(2, 3, -1))


@pytest.mark.torch
def test_values_and_gradients_of_torch():
    torch = pytest.importorskip("torch")
    first = {"data_format": "channels_first"}
    check_against_torch(PixelShuffle(3, **first), normal(2, 18, 2, 4), torch.nn.PixelShuffle(3))
    check_against_torch(PixelUnshuffle(2, **first), normal(2, 3, 6, 4), torch.nn.PixelUnshuffle(2))
    sequence = normal(2, 3, 8, 2, 2)
    close(PixelShuffle(2, **first)(sequence), torch.pixel_shuffle(torch.tensor(sequence), 2).numpy())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpaceToDepth(0), "SpaceToDepth: block_size must be an integer >= 1"),
        (lambda: PixelShuffle(2, mode="RGB"), "PixelShuffle: mode must be one of 'DCR', 'CRD'"),
        (lambda: SpaceToDepth(4)(np.zeros((1, 6, 8, 1))), "blocks of 4 × 4 pixels do not fill frames of 6 × 8; pad"),
        (lambda: DepthToSpace(2)(np.zeros((1, 4, 4, 6))), "DepthToSpace: x has 6 channels, which blocks of 2 × 2"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
