"""Tiles that keep the halo of their pixels for all taps (csrc/halo.cuh), in the emulator."""

import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import test_cuda_conv2d
import test_cuda_convlstm2d
from cuda_cases import ROUNDING, near
from cuda_emulator import EmulatedDevice, needs_compiler
from cuda_products import (
    check_assembled,
    check_bits,
    check_convolution,
    check_recurrence,
    edited,
    random_case,
    rounded,
)
from hypothesis import given, settings

from fastclstm.engines import reference
from fastclstm.engines.cuda import choice, packing, product, wgmma
from fastclstm.engines.cuda.product import KINDS, Window
from fastclstm.spec import ConvSpec

cuda = importlib.import_module("fastclstm.engines.cuda.conv2d")

THREE = Window(9, (2, 2))
SINGLE = np.dtype(np.float32)


def halo_tiling(algorithm, spec, number=-1):
    return product.halo_tilings(KINDS[algorithm], (spec.HO, spec.WO), (product.window(spec),))[number]


def product_operand(x):
    """x in bfloat16, its channels padded to a multiple of 8."""
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 8)])
    return (rounded("bfloat16", padded).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


# --- Numbers ---


@pytest.mark.parametrize(("algorithm", "number"), [("bfloat16", 0), ("bfloat16", 2), ("tf32", 1), ("float32", 0)])
def test_products_are_those_of_the_rounded_operands(algorithm, number, new_device):
    """Tiles beyond the edges, more than two chunks, few channels in the last; odd kernels, distant padding."""
    device = new_device(90)
    for shape, kernel, F, options in (
        ((2, 19, 21, 56), (3, 3), 20, {}),
        ((1, 9, 17, 138), (3, 3), 140, {}),
        ((1, 20, 18, 5), (2, 4), 20, {"padding": ((7, 6), (5, 4))}),
        ((1, 20, 18, 70), (3, 2), 20, {"padding": ((0, 0), (0, 0)), "dilation": (2, 1)}),
    ):
        spec, x, w = random_case(shape, kernel, F, **options)
        tiling = halo_tiling(algorithm, spec, number)
        y = device.get(product.convolve(spec, tiling, device.put(x), device.put(w), None))
        expected = reference.conv2d(spec, rounded(algorithm, x), rounded(algorithm, w), None)
        assert abs(y - expected).max() < 1e-5 * abs(expected).max()  # sums are cut off


def kept(monkeypatch):
    """Let products keep their halos wherever they can, by the smallest tile; others by mma.sync."""

    def choose(kind, dtype, device, pixels, columns, *, frame=(0, 0), windows=(), **_):
        if kind and all(windows):
            tiling = product.halo_tilings(kind, frame, tuple(windows))[-1]
            if tiling.shared_bytes <= device.shared_bytes:
                return tiling
        return product.tilings(kind, dtype.itemsize)[-1]

    monkeypatch.setattr(choice, "choose", choose)


@pytest.mark.parametrize("algorithm", ["float32", "bfloat16"])
def test_convolutions_and_their_gradients(algorithm, monkeypatch, new_device):
    kept(monkeypatch)
    device = new_device(90)

    @settings(max_examples=10)
    @given(test_cuda_conv2d.problems())
    def check(problem):
        check_convolution(test_cuda_conv2d.run(device, algorithm, *problem), algorithm, problem)

    check()


@pytest.mark.parametrize("algorithm", ["float32", "bfloat16"])
def test_every_option_of_a_step(algorithm, monkeypatch, new_device):
    """Kernels of x and h of different sizes, one channel, masks, peepholes, there and back."""
    kept(monkeypatch)
    device = new_device(90)

    @settings(max_examples=3)
    @given(test_cuda_convlstm2d.problems(used=False))
    def check(case):
        check_recurrence(test_cuda_convlstm2d.run(device, algorithm, np.float32, *case), algorithm, case)

    check()
    case = test_cuda_convlstm2d.problem((1, 2, 9, 18, 1), (3, 3), 40, recurrent=(5, 3), peephole="channel", mask=-0.5)
    found = test_cuda_convlstm2d.run(device, algorithm, np.float32, *case)
    expected = test_cuda_convlstm2d.oracle(np.float64, *case)
    near(found, expected, 6 * ROUNDING[algorithm] if algorithm in ROUNDING else 3e-6)


@pytest.mark.parametrize("algorithm", ["float32", "bfloat16"])
def test_what_is_not_finite_stays_where_a_tap_reads_it(algorithm, new_device):
    """In channels that fill no product, and beside products that read nothing."""
    device = new_device(90)
    spec, x, kernel = random_case((2, 9, 18, 5), (3, 3), 4)
    tiling = halo_tiling(algorithm, spec)
    clean = device.get(product.convolve(spec, tiling, device.put(x), device.put(kernel), None))
    x[1, 4, 15, 1] = np.inf
    y = device.get(product.convolve(spec, tiling, device.put(x), device.put(kernel), None))
    reached = np.zeros(y.shape, bool)
    reached[1, 3:6, 14:17] = True
    np.testing.assert_array_equal(y[~reached], clean[~reached])
    assert not np.isfinite(y[reached]).any()


@pytest.mark.parametrize("algorithm", ["float32", "bfloat16"])
def test_every_run_and_every_tile_have_the_same_bits(algorithm, new_device):
    case = random_case((1, 7, 20, 70), (3, 3), 70)
    check_bits(new_device(90), [halo_tiling(algorithm, case[0], number) for number in (-1, 0)], *case)


def test_shares_are_whole_chunks(monkeypatch, new_device):
    """Four chunks of 64 channels, of 9 blocks each."""
    device = new_device(90)
    kept(monkeypatch)
    spec, _, kernel = random_case((1, 9, 10, 6), (3, 3), 250)
    dy = np.random.default_rng(1).standard_normal((1, 9, 10, 250)).astype(np.float32)
    tiling = halo_tiling("bfloat16", spec)
    counts = [choice.shares(tiling, SINGLE, SimpleNamespace(multiprocessors=132), 90, 6, n) for n in (36, 27, 9, 3)]
    assert counts == [4, 3, 1, 1]
    rounded_dy, rounded_kernel = (rounded("bfloat16", array) for array in (dy, kernel))
    expected = reference.conv2d_backward(spec, np.zeros((1, 9, 10, 6)), rounded_kernel, rounded_dy)[0]
    given = device.put(kernel), device.put(product_operand(dy))
    for count in (1, 2, 4):
        monkeypatch.setattr(choice, "shares", lambda *_, count=count: count)
        dx = cuda.input_gradient(spec, KINDS["bfloat16"], *given)
        assert abs(device.get(dx) - expected).max() < 1e-5 * abs(expected).max()


# --- What a kernel may not do ---


@needs_compiler
@pytest.mark.parametrize(
    ("algorithm", "old", "new", "message"),
    [
        ("bfloat16", "        fence_async_proxy();\n", "", "what no fence.proxy.async has shown it"),
        ("bfloat16", "        __syncthreads();", "", "still being copied|no fence.proxy|still reads"),
        ("bfloat16", "cp_async_wait<AHEAD - 1>", "cp_async_wait<AHEAD>", "what is still being copied"),
        ("bfloat16", "start + STAGES - 1;", "start + STAGES - 2;", "a copy to what a product still reads"),
        ("tf32", "coming.start - block + 1)", "coming.start - block + 2)", "still being copied"),
        ("bfloat16", "coming.number % 2 * halo_bytes", "0", "a copy to what a product still reads"),
    ],
)  # fmt: skip
def test_the_emulator_notices(algorithm, old, new, message, tmp_path):
    device = edited(tmp_path, "halo.cuh", old, new)
    spec, x, kernel = random_case((1, 9, 10, 256), (2, 2), 40)
    with pytest.raises(AssertionError, match=message):
        product.convolve(spec, halo_tiling(algorithm, spec), device.put(x), device.put(kernel), None)


@needs_compiler
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("halo.cuh", "square / 2 * 8 * line", "0"),
        ("halo.cuh", "coming.channel + DEPTH;", "coming.channel;"),
        ("frames.cuh", "at / 64 % 2 * 8", "8 - at / 64 % 2 * 8"),
        ("warpgroup.cuh", "(unsigned)depth >> 4 << 16", "1u << 16"),
    ],
)
def test_wrong_products_are_found_and_flat_tiles_taken(file, old, new, tmp_path, monkeypatch):
    monkeypatch.setenv(wgmma.VARIABLE, "1")
    device = edited(tmp_path, file, old, new)
    with pytest.warns(RuntimeWarning, match="256x64 with a halo, differ on this GPU from those by mma.sync"):
        assert not wgmma.works(device, product.halo_tilings(4, (64, 64), (THREE,))[1])


# --- The tables ---


@pytest.mark.parametrize(("channels", "depth", "blocks"), [(130, 64, 9 + 9 + 3), (8, 64, 3), (24, 32, 7), (32, 32, 9)])
def test_the_depth_in_chunks(channels, depth, blocks):
    """Each weight once, a product's channels side by side, and a place in the halo for each."""
    spec = ConvSpec.infer((1, 20, 20, channels), (3, 3, channels, 4))
    plain = packing.taps(spec)
    rows, chunk = packing.by_chunks(plain, channels, depth, 3)
    assert (len(rows), chunk) == (blocks * depth, 9)
    used = rows[rows[:, 3] >= 0]
    assert sorted(map(tuple, used)) == sorted(map(tuple, plain))
    offsets = packing.halo_offsets(rows, depth, (-1, -1), (18, 18)).reshape(-1)
    plane = 325
    for product_rows, offset in zip(rows.reshape(-1, depth // 4, 4), offsets, strict=True):
        row, column, channel, number = product_rows[0]
        if number < 0:
            assert offset == 6 * plane
            assert channels % depth <= depth * 3 // 4  # whose last planes are zeros
            continue
        pixel, piece = offset % plane, offset // plane
        assert divmod(pixel, 18) == (row + 1, column + 1)
        assert piece == channel % depth // (depth // 8)
        assert (product_rows[:, 2] == np.arange(channel, channel + depth // 4))[product_rows[:, 3] >= 0].all()
        assert (product_rows[product_rows[:, 3] >= 0][:, 3] == number).all()


# --- The choice ---


def hopper(shared_bytes=227 << 10):
    return SimpleNamespace(architecture=90, multiprocessors=132, shared_bytes=shared_bytes)


def chosen(device, kind, spec, columns, windows=None):
    windows = [product.window(spec)] if windows is None else windows
    return choice.choose(
        kind, SINGLE, device, spec.B * spec.HO * spec.WO, columns, frame=(spec.HO, spec.WO), windows=windows
    )


def test_tiles_fit_and_cover_the_frame():
    for kind in KINDS.values():
        for reach in (2, 4, 6):
            window = Window((reach + 1) ** 2, (reach, reach))
            for tiling in product.halo_tilings(kind, (33, 50), (THREE, window)):
                assert tiling.shared_bytes <= 227 << 10
                assert tiling.threads == 256
                halo = math.prod(window.halo(tiling.rows))
                weights = 4 * tiling.parts * tiling.columns * 128
                assert tiling.shared_bytes >= 1024 + weights + 2 * 128 * halo
                assert tiling.shared_bytes >= tiling.rows * tiling.columns * 4  # the sums
                assert tiling.grid(3 * 33 * 50, 100) == (3 * -(-33 * 16 // tiling.rows) * 4, -(-100 // tiling.columns))


def test_what_keeps_a_halo(monkeypatch):
    """Large convolutions on Hopper: not of few taps, with strides, around circular frames or too large a window."""
    monkeypatch.setattr(wgmma, "works", lambda *_: True)

    def kept_by(shape=(8, 64, 64, 64), kernel=(3, 3), device=None, kind=4, **options):
        spec = ConvSpec.infer(shape, (*kernel, shape[-1], 256), **options)
        tiling = chosen(device or hopper(), kind, spec, 256)
        return (tiling.rows, tiling.columns) if tiling.frame else None

    assert kept_by() == kept_by(kernel=(5, 5)) == kept_by(kind=1) == (256, 128)
    assert kept_by(kind=3) == (128, 128)
    assert kept_by((2, 64, 64, 64)) == (256, 64)
    assert kept_by((64, 4, 4, 64)) is None  # most of a tile would be beside the frame
    assert kept_by(kernel=(1, 1)) is kept_by(kernel=(1, 3)) is None
    assert kept_by(strides=2) is kept_by(padding_mode="circular") is kept_by(kind=0) is None
    assert kept_by(dilation=9) is None
    assert kept_by(device=SimpleNamespace(architecture=100, multiprocessors=132, shared_bytes=227 << 10)) is None
    spec = ConvSpec.infer((8, 64, 64, 64), (3, 3, 64, 256))
    assert chosen(hopper(), 4, spec, 256, [product.window(spec), None]).frame is None


def test_what_does_not_work_is_not_chosen(monkeypatch):
    monkeypatch.setattr(wgmma, "works", lambda device, tiling: tiling.frame is None)
    spec = ConvSpec.infer((8, 64, 64, 64), (3, 3, 64, 256))
    tiling = chosen(hopper(), 4, spec, 256)
    assert tiling.on_warpgroups
    assert (tiling.rows, tiling.columns, tiling.frame) == (128, 256, None)


def test_clocks():
    """By hand: 256 x 128 products at 2048 a clock; 18 x 18 pixels for 9 taps and 128 columns, of 2 bytes, at 24."""
    tiling = product.halo_tilings(4, (64, 64), (THREE,))[0]
    assert tiling.fetched == 36
    assert choice.clocks(tiling, SINGLE, 132, 4096, 128) == pytest.approx(16 + 0.25 * (36 + 128) * 2 / 24)


@needs_compiler
def test_a_call_keeps_halos_and_checks_them_once(monkeypatch):
    """By the engine's own choice: the form of a tile is compared with mma.sync once, for frames of all sizes."""
    monkeypatch.setenv(wgmma.VARIABLE, "1")
    device = EmulatedDevice(90)
    for size in (14, 16):
        spec, x, kernel = random_case((4, size, size, 8), (3, 3), 64)
        y = cuda.conv2d(spec, device.put(x), device.put(kernel), None, algorithm="bfloat16")
        expected = reference.conv2d(spec, rounded("bfloat16", x), rounded("bfloat16", kernel), None)
        assert abs(device.get(y) - expected).max() < 1e-5 * abs(expected).max()
        assert device.launches[-1] == ("conv2d", (4, 1, 1), (256, 1, 1))
    assert [name for name, *_ in device.launches].count("conv2d") == 2 + 2


@pytest.mark.parametrize("algorithm", ["bfloat16", "tf32", "float32"])
def test_nothing_spills_and_no_product_waits_for_another(algorithm):
    check_assembled(product.halo_tilings(KINDS[algorithm], (64, 64), (THREE,))[0])


@pytest.mark.parametrize("algorithm", ["bfloat16", "float32"])
def test_nothing_spills_in_the_largest_tiles_of_older_units(algorithm):
    check_assembled(product.tilings(KINDS[algorithm], 4)[0])
