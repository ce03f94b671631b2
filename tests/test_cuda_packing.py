"""Tables, tilings and packed weights of the cuda engine's products."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_cases import convolutions
from cuda_emulator import EmulatedDevice, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclstm.engines import reference
from fastclstm.engines.cuda import choice, packing, product, weight_gradient, wgmma
from fastclstm.nn import activations
from fastclstm.spec import ConvLSTMSpec, ConvSpec


def gathered(table, frames, grid, step, divide, circular):
    """The matrix (pixels, taps) that a product sees, taken one element after another."""
    matrix = np.zeros((frames.shape[0], *grid, len(table)))
    height, width = frames.shape[1:3]
    for k, (down, right, channel, number) in enumerate(table):
        for i, j in np.ndindex(grid):
            h, w = i * step[0] + down, j * step[1] + right
            if number < 0 or h % divide[0] or w % divide[1]:
                continue
            h, w = h // divide[0], w // divide[1]
            if circular:
                h, w = h % height, w % width
            if 0 <= h < height and 0 <= w < width:
                matrix[:, i, j, k] = frames[:, h, w, channel]
    return matrix


@settings(max_examples=25)
@given(convolutions(), st.integers(1, 3))
def test_taps_make_convolutions_and_their_transposes(case, F):
    (B, H, W, C), (KH, KW), options = case
    spec = ConvSpec.infer((B, min(H, 5), min(W, 5), C), (KH, KW, C, F), **options)
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((B, spec.H, spec.W, C)), rng.standard_normal((KH, KW, C, F))
    dy = rng.standard_normal((B, spec.HO, spec.WO, F))
    circular = spec.padding_mode == "circular"

    table = packing.taps(spec)
    columns = gathered(table, x, (spec.HO, spec.WO), spec.strides, (1, 1), circular)
    weights = kernel.reshape(KH * KW, C, F)[table[:, 3], table[:, 2]]
    np.testing.assert_allclose(columns @ weights, reference.conv2d(spec, x, kernel, None), atol=1e-12)

    table = packing.transposed_taps(spec)
    columns = gathered(table, dy, (spec.H, spec.W), (1, 1), spec.strides, packing.wraps(spec))
    weights = kernel.reshape(KH * KW, C, F).transpose(0, 2, 1)[table[:, 3], table[:, 2]]
    np.testing.assert_allclose(columns @ weights, reference.conv2d_backward(spec, x, kernel, dy)[0], atol=1e-12)


def test_circular_transposes_turn_only_where_they_must():
    frame, kernel = (1, 8, 8, 2), (3, 3, 2, 4)
    same = ConvSpec.infer(frame, kernel, padding_mode="circular")
    assert packing.wraps(same)
    assert len(packing.transposed_taps(same)) == 9 * 4
    more = ConvSpec.infer(frame, kernel, padding_mode="circular", padding=2)
    assert not packing.wraps(more)
    assert len(packing.transposed_taps(more)) == 9 * 9 * 4
    assert not packing.wraps(ConvSpec.infer(frame, kernel))


def test_padded_channels_and_blocks_hold_nothing():
    spec = ConvSpec.infer((1, 4, 4, 3), (2, 2, 3, 1))
    table = packing.taps(spec, 8)
    assert table.shape == (32, 4)
    np.testing.assert_array_equal(table[:8, 3], [0, 0, 0, -1, -1, -1, -1, -1])
    padded = packing.padded_to_blocks(table, 24)
    assert padded.shape == (48, 4)
    assert (padded[32:, 3] == -1).all()
    assert padded.dtype == np.int32


def test_activations_have_the_numbers_of_the_kernels():
    source = Path(__file__).parents[1].joinpath("csrc", "activations.cuh").read_text()
    names = source.partition("enum Activation {")[2].partition("}")[0].replace("\n", " ").split(",")
    assert tuple(name.strip().lower() for name in names) == packing.ACTIVATIONS
    assert set(packing.ACTIVATIONS) == set(activations.TABLE)


def test_codes_of_a_cell():
    def codes(**names):
        used = {"activation": "tanh", "recurrent_activation": "sigmoid", "output_activation": "tanh"} | names
        used = {key: activations.get(value) for key, value in used.items()}
        return packing.activation_codes(ConvLSTMSpec.infer((1, 1, 2, 2, 1), (1, 1, 1, 4), (1, 1, 1, 4), **used))

    assert codes() == packing.STANDARD
    assert codes(recurrent_activation="hard_sigmoid", activation="relu") == (2, 4, 0)
    assert codes(activation=(np.sin, np.cos)) is None
    assert codes(activation=activations.Activation("tanh", np.sin, np.cos)) is None


def test_kinds():
    old, new, single = EmulatedDevice(70), EmulatedDevice(80), np.dtype(np.float32)
    double = np.dtype(np.float64)
    assert [product.kind(device, single, "auto") for device in (old, new)] == [0, 3]
    assert [product.kind(device, single, "float32") for device in (old, new)] == [0, 3]
    assert [product.kind(new, single, name) for name in product.ALGORITHMS] == [0, 3, 1, 4, 5]
    assert {product.kind(new, double, name) for name in ("auto", *product.ALGORITHMS)} == {0}
    with pytest.raises(ValueError, match="'tf32' needs tensor cores of sm_80 or newer, but this GPU is sm_70"):
        product.kind(old, single, "tf32")
    with pytest.raises(ValueError, match=r"algorithm must be 'auto' or one of 'simt', .*, got 'winograd'"):
        product.kind(new, single, "winograd")
    assert [product.backward_kind(kind) for kind in (0, 1, 3, 4, 5)] == [0, 1, 3, 4, 1]


@pytest.mark.parametrize("kind", [0, 1, 3, 4, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tilings_cover_everything_and_fit(kind, dtype):
    dtype = np.dtype(dtype)
    for tiling in product.tilings(kind, dtype.itemsize):
        assert tiling.threads % 32 == 0
        assert tiling.threads <= 256
        assert tiling.shared_bytes <= 99 << 10
        for pixels, columns in ((1, 1), (tiling.rows, tiling.columns), (tiling.rows + 1, 3 * tiling.columns + 4)):
            down, across = tiling.grid(pixels, columns)
            assert (down - 1) * tiling.rows < pixels <= down * tiling.rows
            assert (across - 1) * tiling.columns < columns <= across * tiling.columns == tiling.padded(columns)


def test_large_tiles_only_where_they_fill_the_gpu():
    single, gpu = np.dtype(np.float32), EmulatedDevice()
    gpu.multiprocessors = 132
    assert choice.choose(3, single, gpu, 8 * 64 * 64, 256).rows == 128
    assert choice.choose(3, single, gpu, 4 * 32 * 32, 256).rows == 64
    assert choice.choose(3, single, gpu, 32 * 32, 128).rows == 32
    assert choice.choose(3, single, gpu, 8 * 64 * 64, 4).columns == 32
    assert choice.choose(0, single, gpu, 8 * 64 * 64, 4).columns == 16
    assert choice.choose(0, np.dtype(np.float64), gpu, 8 * 64 * 64, 256).rows == 64


@pytest.mark.parametrize("kind", [1, 3, 4, 5])
@pytest.mark.parametrize(("pixels", "columns"), [(2 * 64 * 64, 64), (16 * 16 * 16, 128)])
def test_a_multiprocessor_may_be_left_over(kind, pixels, columns, monkeypatch):
    """128 blocks for 132 of them: four times as many would take their turns."""
    monkeypatch.setattr(wgmma, "works", lambda *_: True)
    for architecture in (80, 90):
        gpu = SimpleNamespace(architecture=architecture, multiprocessors=132)
        tiling = choice.choose(kind, np.dtype(np.float32), gpu, pixels, columns)
        assert (tiling.rows, tiling.columns) == (64, 64)


def test_clocks():
    """By hand: of 256 blocks two a multiprocessor; 64 x 64 products at 1024 a clock, 128 operands of 2 bytes at 24."""
    single, tiling = np.dtype(np.float32), product.tilings(4, 4)[1]
    assert choice.clocks(tiling, single, 132, 4096, 256) == pytest.approx(2 * (128 * 2 / 24 + 0.25 * 4))
    one_warp = product.tilings(4, 4)[3]
    assert choice.clocks(one_warp, single, 132, 32, 32) == pytest.approx(64 * 2 / 24 + 0.25 * 4 * 1)
    assert choice.clocks(one_warp, single, 1, 8 * 32, 32) == pytest.approx(8 * (64 * 2 / 24 + 0.25 * 1))
    wide = product.warpgroup_tilings(3)[0]  # float32: weights in two parts, three products
    assert choice.clocks(wide, single, 132, 128, 128) == pytest.approx(64 + 0.25 * 48)


def test_depth_is_cut_where_there_are_few_tiles(monkeypatch):
    monkeypatch.setattr(wgmma, "works", lambda *_: True)
    single, gpu = np.dtype(np.float32), SimpleNamespace(architecture=90, multiprocessors=132)

    def chosen(pixels, columns, depth):
        tiling = choice.choose(4, single, gpu, pixels, columns, depth=depth)
        blocks = -(-depth // tiling.depth)
        return tiling.rows, tiling.columns, choice.shares(tiling, single, gpu, pixels, columns, blocks)

    assert chosen(16 * 16 * 16, 128, 25 * 512) == (128, 128, 4)  # 32 tiles
    assert chosen(16 * 128 * 128, 64, 9 * 256) == (128, 64, 1)
    assert chosen(16 * 16 * 16, 128, 64)[2] == 1  # one block
    assert chosen(8, 32, 1 << 20)[2] == choice.MOST_SHARES


def test_a_step_is_cut_where_that_spares_more_than_launches(monkeypatch):
    monkeypatch.setattr(wgmma, "works", lambda *_: True)
    gpu = SimpleNamespace(architecture=90, multiprocessors=132, shared_bytes=227 << 10)

    def shares(size, kind, depth=9 * 128):
        windows = [product.Window(9, (2, 2))] * 2
        tiling, count = choice.choose_cut(kind, np.dtype(np.float32), gpu, size * size, 256, depth, frame=(size, size),
                                          windows=windows)  # fmt: skip
        if count == 1:
            assert tiling == choice.choose(kind, np.dtype(np.float32), gpu, size * size, 256, frame=(size, size),
                                           windows=windows)  # fmt: skip
        return count

    assert shares(16, 3) == 8
    assert shares(16, 4) == shares(64, 3) == shares(16, 3, depth=9 * 8) == 1


def test_shares_of_the_depth():
    """None is empty; adding them takes a launch and what is written and read again."""
    single, tiling = np.dtype(np.float32), product.tilings(4, 4)[1]
    gpu = SimpleNamespace(architecture=80, multiprocessors=132)
    for blocks in range(1, 200):
        count = choice.shares(tiling, single, gpu, 64, 64, blocks)
        assert (count - 1) * -(-blocks // count) < blocks
        assert count == 1 or blocks // count >= choice.FEWEST_BLOCKS - 1
    once = choice.clocks(tiling, single, 132, 4096, 64) * 100 * 32
    assert choice.clocks_of_shares(tiling, single, 132, 4096, 64, 100, 1) == pytest.approx(once)
    twice = choice.clocks(tiling, single, 132, 4096, 64) * 50 * 32 + choice.LAUNCH + 4 * 4096 * 64 * 4 / (132 * 24)
    assert choice.clocks_of_shares(tiling, single, 132, 4096, 64, 100, 2) == pytest.approx(twice)


@pytest.mark.parametrize("pixels", [1, 300, 5000, 655360])
@pytest.mark.parametrize(("depth", "filters"), [(9, 1), (585, 256), (20000, 2048)])
@pytest.mark.parametrize("kind", [0, 1, 3])
def test_shares_of_a_weight_gradient(kind, pixels, depth, filters):
    tiling = weight_gradient.gradient_tiling(kind, 4, depth, filters)
    share, shares = weight_gradient.gradient_shares(tiling, 132, 4, pixels, depth, filters)
    assert (shares - 1) * share < pixels <= shares * share
    assert shares == 1 or shares * depth * filters * 4 <= weight_gradient.PARTIAL_BYTES
    assert shares < 65536


def test_tilings_of_a_weight_gradient():
    assert weight_gradient.gradient_tiling(3, 4, 9 * 64, 256).rows == 128
    assert weight_gradient.gradient_tiling(3, 4, 9, 256).rows == 32
    assert weight_gradient.gradient_tiling(3, 4, 9 * 64, 8).columns == 32
    assert weight_gradient.gradient_tiling(0, 4, 9 * 64, 256).rows == 128
    assert weight_gradient.gradient_tiling(0, 4, 9, 256).rows == 64
    assert weight_gradient.gradient_tiling(0, 4, 9 * 128, 256).rows == 128
    assert weight_gradient.gradient_tiling(0, 8, 9 * 128, 256).rows == 64
    for tiling in (
        weight_gradient.gradient_tilings(3, 4)
        + weight_gradient.gradient_tilings(4, 4)
        + weight_gradient.gradient_tilings(0, 4)
        + weight_gradient.gradient_tilings(0, 8)
    ):
        assert tiling.shared_bytes <= 99 << 10


@pytest.mark.parametrize(("transposed", "gates"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("kind", [0, 3, 4])
def test_packed_weights(kind, transposed, gates, new_device):
    device = new_device()
    spec = ConvSpec.infer((1, 4, 4, 3), (2, 2, 3, 20))
    kernel = np.random.default_rng(0).integers(-50, 50, (2, 2, 3, 20)).astype(np.float32)  # bfloat16 holds them
    tiling = product.tilings(kind, 4)[-1]
    x = device.empty((1,), np.float32)
    make = product.transposed_frames if transposed else product.frames
    frames = make(device, spec, x, tiling.depth)
    count = 3 if transposed else 20
    packed = device.get(product.pack(device, tiling, (device.put(kernel),), [frames], count, gates=gates,
                                     transposed=transposed))  # fmt: skip
    table = device.get(frames.taps)
    values = packed if packed.dtype == np.float32 else (packed.astype(np.uint32) << 16).view(np.float32)
    padded = tiling.padded(count)
    by_column = values.reshape(-1, padded) if kind == 0 else (
        values.reshape(-1, padded, tiling.depth).transpose(0, 2, 1).reshape(-1, padded))  # fmt: skip
    block = 8 if kind else 1
    for p in range(padded):
        q, r = p // (4 * block) * block + p % block, p % (4 * block) // block
        column = (r * count // 4 + q if q < count // 4 else count) if gates else 4 * q + r
        for k, (_, _, channel, number) in enumerate(table):
            expected = 0.0
            if number >= 0 and column < count:
                at = (column, channel) if transposed else (channel, column)
                expected = kernel.reshape(4, 3, 20)[number][at]
            assert by_column[k, p] == expected


def test_sums_of_columns_keep_their_digits(new_device):
    device = new_device()
    rows = np.random.default_rng(0).random((700, 37)).astype(np.float32) + 1000
    sums = device.get(weight_gradient.column_sums(device.put(rows), 37, rows.dtype))
    np.testing.assert_allclose(sums, rows.astype(np.float64).sum(0), rtol=6e-8)


@needs_compiler
def test_a_frame_too_large_for_32_bits_is_refused():
    device = EmulatedDevice()
    spec = ConvSpec.infer((1, 50000, 50000, 1), (1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"counts the elements of a frame in 32 bits, but one of \(50000, 50000, 1\)"):
        product.frames(device, spec, device.empty((1,), np.float32), 16)


def test_too_many_pixels_for_32_bits_are_refused():
    product.check_pixels(2**30)
    with pytest.raises(
        ValueError, match="takes 1073741824 pixels at a time, but there are 1073741825; split the batch"
    ):
        product.check_pixels(2**30 + 1)
