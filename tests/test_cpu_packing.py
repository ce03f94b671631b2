"""Packed weights: every column is where the kernels look for it."""

import numpy as np
import pytest

from fastclstm.engines.cpu import launch, packing, threads, tiles, transforms
from fastclstm.engines.cpu.kernels import simd, winograd
from fastclstm.engines.cpu.tiles import Tile

pytestmark = pytest.mark.vectors


def unpack(columns, P, K, gates, F, paired):
    """Matrices (P, K, gates, F) and bias (gates, F) back from packed ones, read as the kernels read them."""
    lanes = simd.lanes(columns.weights.itemsize)
    matrices = np.full((P, K, gates, F), np.nan)
    bias = np.full((gates, F), np.nan)
    for at, vectors, width, first, count, bias_at in columns.groups:
        for gate in range(gates):
            for n in range(count):
                column = gate * width + n
                assert column < vectors * lanes
                bias[gate, first + n] = columns.bias[bias_at + column]
                for p in range(P):
                    for k in range(K):
                        if paired:
                            pair, lane = divmod(column, 2 * lanes)
                            panel = min(2, vectors - 2 * pair) * lanes  # the last may have one vector
                            place = (p * vectors + 2 * pair) * K * lanes + k * panel + lane
                        else:
                            place = (p * K + k) * vectors * lanes + column
                        matrices[p, k, gate, first + n] = columns.weights[at + place]
    return matrices, bias


def sizes(dtype):
    lanes = simd.lanes(np.dtype(dtype).itemsize)
    return sorted({1, 2, 3, 5, lanes - 1, lanes, lanes + 1, 2 * lanes + 3, 4 * lanes, 4 * lanes + 1} - {0})


def assert_packed(columns, matrices, bias, paired):
    """Each column is where it belongs, and zeros are where none is."""
    P, K, gates, F = matrices.shape
    for result, expected in zip(unpack(columns, P, K, gates, F, paired), (matrices, bias), strict=True):
        np.testing.assert_array_equal(result, expected)
    for packed, given in ((columns.weights, matrices), (columns.bias, bias)):
        assert np.count_nonzero(packed) == np.count_nonzero(given)
    assert columns.groups[:, 4].sum() == F
    assert (columns.groups[:, 1] <= 4).all()
    assert columns.weights.ctypes.data % 64 == 0


@pytest.mark.parametrize("gates", [1, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_trip(dtype, gates):
    for F in sizes(dtype):
        rng = np.random.default_rng(F)
        matrix, bias = (rng.standard_normal((*shape, gates, F)).astype(dtype) for shape in ((5,), ()))
        scales = rng.standard_normal((gates, F))
        columns = packing.pack(matrix, scales, bias)
        assert_packed(columns, (matrix * scales).astype(dtype)[None], bias, False)


@pytest.mark.parametrize(
    ("size", "tile"),
    [((3, 3), Tile(2, 2, 3, 3)), ((5, 5), Tile(4, 4, 5, 5)), ((3, 1), Tile(4, 4, 3, 1)), ((7, 8), Tile(3, 4, 4, 3))],
    ids=str,
)
@pytest.mark.parametrize("gates", [1, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_transformed_kernels(dtype, gates, size, tile, monkeypatch):
    """Of two inputs, piece by piece, as they are or flipped and transposed; whatever the number of workers."""
    monkeypatch.setattr(transforms, "PARALLEL_SCALARS", 1)
    G_y, G_x = (winograd.transforms(m, k).G for m, k in ((tile.m_y, tile.k_y), (tile.m_x, tile.k_x)))
    for F in sizes(dtype):
        rng = np.random.default_rng(F)
        bias, scales = rng.standard_normal((gates, F)).astype(dtype), rng.standard_normal((gates, F))
        plain, other = (
            rng.standard_normal((*size, *shape)).astype(dtype) for shape in ((3, gates * F), (gates * F, 5))
        )
        kernels = [plain, other[::-1, ::-1].swapaxes(2, 3)]
        pieces = []
        for kernel in kernels:
            left = kernel.astype(float)
            for y, x in tiles.pieces(*size, tile):
                window = np.s_[y.first : y.first + tile.k_y, x.first : x.first + tile.k_x]
                pieces.append(left[window].copy())
                left[window] = 0  # each tap counts once
            assert not left.any()
        both = np.concatenate(pieces, 2).reshape(tile.k_y, tile.k_x, -1, gates, F) * scales
        expected = np.einsum("ai,bj,ijcgf->abcgf", G_y, G_x, both).reshape(-1, *both.shape[2:])
        assert expected.shape[1] == transforms.rows(kernels, tile)
        packed = []
        for workers in (1, 3):
            monkeypatch.setattr(threads, "usable_threads", lambda workers=workers: workers)
            columns = packing.lay_out(*expected.shape[:2], gates, F, bias, np.dtype(dtype), paired=True)
            transforms.transform(kernels, scales, tile, columns)
            packed.append(columns)
        np.testing.assert_array_equal(packed[0].weights, packed[1].weights)
        result, _ = unpack(packed[0], *expected.shape, paired=True)
        once, tiny = 0.5001 * np.finfo(dtype).eps, 4 * np.finfo(float).eps * np.abs(expected).max()
        np.testing.assert_allclose(result, expected, rtol=once, atol=tiny)
        assert_packed(packed[0], result, bias, True)


@pytest.mark.parametrize("transposed", [False, True])
def test_large_kernels_are_packed_as_small_ones(monkeypatch, transposed):
    """By a kernel, bit for bit as NumPy does it."""
    rng = np.random.default_rng(0)
    for F in sizes(np.float32):
        gates = 1 if transposed else 4
        kernels = tuple(rng.standard_normal((2, 3, C, gates * F)).astype(np.float32) for C in (3, 20))
        if transposed:
            kernels = tuple(np.ascontiguousarray(kernel.swapaxes(2, 3)) for kernel in kernels)
        bias, scales = rng.standard_normal(gates * F).astype(np.float32), rng.standard_normal((gates, F))
        packed = []
        for small in (1 << 18, 0):
            monkeypatch.setattr(launch, "SMALL_KERNEL", small)
            packed.append(launch.pack(kernels, bias, scales, None, transposed=transposed, remember=False))
        for small, large in zip(packed[0][:3], packed[1][:3], strict=True):
            np.testing.assert_array_equal(small, large)


def test_no_bias_is_zeros():
    columns = packing.pack(np.ones((2, 4, 3)), np.ones((4, 3)), None)
    assert columns.bias.size
    assert not columns.bias.any()


def test_panels_are_rounded_once_and_aligned():
    columns = packing.pack(np.ones((2, 4, 3), np.float32), np.full((4, 3), 1 / 3), None)
    assert columns.weights.dtype == np.float32
    assert columns.weights.max() == np.float32(1 / 3)
