"""Products by wgmma, in the emulator: numbers, what a kernel may not do, the choice, the switch and the check."""

import importlib
import re
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import test_cuda_conv2d
import test_cuda_convlstm2d
import test_engines
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
from fastclstm.engines.cuda import choice, devices, product, wgmma
from fastclstm.engines.cuda.product import KINDS
from fastclstm.spec import ConvSpec

cuda = importlib.import_module("fastclstm.engines.cuda.conv2d")

EVERY = [(name, number) for name, kind in KINDS.items() for number in range(len(product.warpgroup_tilings(kind)))]
every_algorithm = pytest.mark.parametrize("algorithm", [name for name, kind in KINDS.items() if kind])
every_tiling = pytest.mark.parametrize(("algorithm", "number"), EVERY)


@pytest.fixture
def forced(monkeypatch):
    """Every product takes tiling `number` of wgmma, or the smallest where there are not so many."""

    @contextmanager
    def force(number):
        def choose(kind, *_, **__):
            candidates = product.warpgroup_tilings(kind)
            return candidates[min(number, len(candidates) - 1)]

        with monkeypatch.context() as patch:
            patch.setattr(choice, "choose", choose)
            yield

    return force


# --- Numbers ---


def error_of_products(gpu, algorithm, number):
    """Against products of the rounded operands, in units of the largest; several blocks of pixels, columns, depth."""
    tiling = product.warpgroup_tilings(KINDS[algorithm])[number]
    spec, x, kernel = random_case((2, 9, 15, 56), (3, 3), tiling.columns + 20)
    y = gpu.get(product.convolve(spec, tiling, gpu.put(x), gpu.put(kernel), None))
    expected = reference.conv2d(spec, rounded(algorithm, x), rounded(algorithm, kernel), None)
    return abs(y - expected).max() / abs(expected).max()


@needs_compiler
@every_tiling
def test_products_are_those_of_the_rounded_operands(algorithm, number):
    emulated = EmulatedDevice(90)
    assert error_of_products(emulated, algorithm, number) < 5e-6  # sums are cut off 63 times
    assert emulated.launches[-1] == ("conv2d", (3, 2, 1), (256, 1, 1))


@every_tiling
def test_a_gpu_has_the_same_products(algorithm, number, real_gpu, new_device):
    if real_gpu is None:
        pytest.skip(devices.missing())
    gpu = new_device(90)
    errors = {error_of_products(gpu, algorithm, number) for _ in range(20)}
    assert len(errors) == 1
    assert errors.pop() < 5e-5


@every_algorithm
def test_convolutions_of_every_geometry(algorithm, forced, new_device):
    """Padding, strides, dilation, circular frames, odd sizes, channels that are no whole pieces; and gradients."""
    device = new_device(90)

    @settings(max_examples=12)
    @given(test_cuda_conv2d.problems())
    def check(problem):
        with forced(-1):
            found = test_cuda_conv2d.run(device, algorithm, *problem)
        check_convolution(found, algorithm, problem)

    check()


@every_algorithm
def test_every_option_of_a_step(algorithm, forced, new_device):
    device = new_device(90)

    @settings(max_examples=8)
    @given(test_cuda_convlstm2d.problems(used=False))
    def check(case):
        with forced(-1):
            found = test_cuda_convlstm2d.run(device, algorithm, np.float32, *case)
        check_recurrence(found, algorithm, case)

    check()


@every_tiling
def test_gates_of_a_filter_meet_and_both_frames_are_read(algorithm, number, forced, new_device):
    """More filters than a tile has quads, h and x in several blocks of depth, one channel of x."""
    device = new_device(90)
    case = test_cuda_convlstm2d.problem((1, 2, 5, 4, 1), (3, 3), 72, peephole="channel", mask=-0.5)
    with forced(number):
        found = test_cuda_convlstm2d.run(device, algorithm, np.float32, *case)
    expected = test_cuda_convlstm2d.oracle(np.float64, *case)
    near(found, expected, 6 * ROUNDING[algorithm] if algorithm in ROUNDING else 3e-6)


def test_long_sums_keep_their_digits(forced, new_device):
    """Tensor cores cut off where others round: the products of a block are added outside of them."""
    device = new_device(90)
    rng = np.random.default_rng(0)
    x, kernel = rng.random((1, 4, 4, 256)).astype("f4"), rng.random((3, 3, 256, 8)).astype("f4")
    spec = ConvSpec.infer(x.shape, kernel.shape)
    expected = reference.conv2d(spec, x.astype("f8"), kernel.astype("f8"), None)
    with forced(1):
        y = device.get(cuda.conv2d(spec, device.put(x), kernel, None, algorithm="float32"))
    assert abs(y - expected).max() < 1e-6 * expected.max()


@pytest.mark.parametrize("algorithm", ["float32", "bfloat16"])
def test_every_run_and_every_tiling_have_the_same_bits(algorithm, new_device):
    case = random_case((1, 7, 20, 24), (3, 3), 70)
    check_bits(new_device(90), product.warpgroup_tilings(KINDS[algorithm]), *case)


@pytest.mark.parametrize("kind", [1, 3])
def test_weights_are_packed_rounded_or_in_two_parts(kind, new_device):
    device, (tiling, *_) = new_device(90), product.warpgroup_tilings(kind)[::-1]
    spec, x, kernel = random_case((1, 4, 4, 3), (2, 2), 20)
    frames = product.frames(device, spec, device.put(x), tiling.depth)
    packed = device.get(product.pack(device, tiling, (device.put(kernel),), [frames], 20))
    parts = packed.reshape(frames.blocks, tiling.parts, 64, tiling.depth).astype(np.float64)
    assert packed.size == tiling.weights(frames.blocks, 20)
    assert not (packed.view(np.uint32) & 0x1FFF).any()  # 19 bits each
    plain = product.tilings(0, 4)[-1]  # one block of depth, columns as they are
    columns = device.get(product.pack(device, plain, (device.put(kernel),), [
        product.frames(device, spec, device.put(x), 16)], 20)).astype(np.float64)  # fmt: skip
    order = [4 * (q // 8 * 8 + q % 8) + r for q in range(16) for r in range(4)]
    places = [q // 8 * 32 + r * 8 + q % 8 for q in range(16) for r in range(4)]
    expected = np.zeros((64, tiling.depth))
    expected[:, : len(columns)] = np.pad(columns, ((0, 0), (0, 64 - columns.shape[1]))).T
    found = np.zeros_like(expected)
    found[order] = parts.sum((0, 1))[places]
    np.testing.assert_allclose(found, expected, rtol=2.0 ** (-11 if kind == 1 else -22), atol=0)


@every_algorithm
@pytest.mark.parametrize("op", ["conv2d", "convlstm2d"])
def test_the_conformance_suite(op, algorithm, forced, monkeypatch, new_device):
    device, used = new_device(90), []
    kernel = device.kernel

    def counted(source, name, macros):
        used.append("WARPGROUPS" in macros)
        return kernel(source, name, macros)

    monkeypatch.setattr(device, "kernel", counted)
    with devices.using(device), forced(-1):
        getattr(test_engines, f"test_{op}")("cuda", np.float32, algorithm)
    assert any(used)


# --- What a kernel may not do ---


@needs_compiler
@pytest.mark.parametrize(
    ("algorithm", "file", "old", "new", "message"),
    [
        ("bfloat16", "wgmma.cuh", "        fence_async_proxy();\n", "", "what no fence.proxy.async has shown it"),
        ("tf32", "wgmma.cuh", "        fence_async_proxy();\n", "", "what no fence.proxy.async has shown it"),
        ("bfloat16", "wgmma.cuh", "        fence_async_proxy();\n        __syncthreads();",
         "        __syncthreads();\n        fence_async_proxy();", "what no fence.proxy.async has shown it"),
        ("bfloat16", "wgmma.cuh", "        __syncthreads();", "", "still being copied|no fence.proxy|still reads"),
        ("bfloat16", "wgmma.cuh", "cp_async_wait<AHEAD - 1>", "cp_async_wait<AHEAD>", "what is still being copied"),
        ("tf32", "wgmma.cuh", "cp_async_wait<AHEAD - 1>", "cp_async_wait<AHEAD>", "ldmatrix reads what is still being"),
        ("bfloat16", "wgmma.cuh", "    wgmma_fence();", "", "wgmma.fence is missing"),
        ("bfloat16", "wgmma.cuh", "wgmma_wait<IN_FLIGHT>", "wgmma_wait<IN_FLIGHT + 1>",
         "a copy to what a product still reads"),
        ("bfloat16", "wgmma.cuh", "#define AHEAD (STAGES - 1 - IN_FLIGHT)", "#define AHEAD (STAGES - 1)",
         "a copy to what a product still reads"),
        ("bfloat16", "wgmma.cuh", "    wgmma_wait<0>();", "", "a product is not waited for"),
        ("bfloat16", "wgmma.cuh", "    __syncwarp();", "    sums[0][0][0] += 1;", "a sum was changed"),
        ("tf32", "wgmma.cuh", "    __syncwarp();", "    operands.high[0][3][1] = 0;",
         "registers of a product were changed"),
        ("bfloat16", "wgmma.cuh", "return shared + (-shared_address(shared) & 1023);", "return shared;",
         "an atom does not start at 1024 bytes"),
        ("bfloat16", "wgmma.cuh", "__shfl_sync(0xffffffff, threadIdx.x / 128, 0)", "threadIdx.x / 64 % 2",
         "issue different products"),
        ("bfloat16", "warpgroup.cuh", "1ull << 62", "2ull << 62", "only the swizzle of 128 bytes"),
        ("bfloat16", "warpgroup.cuh", "1024ull >> 4 << 32", "64ull >> 4 << 32", "at 1024 bytes"),
    ],
)  # fmt: skip
def test_the_emulator_notices(algorithm, file, old, new, message, tmp_path):
    device, tiling = edited(tmp_path, file, old, new), product.warpgroup_tilings(KINDS[algorithm])[-1]
    spec, x, kernel = random_case((1, 9, 15, 64), (3, 3), 40)
    with pytest.raises(AssertionError, match=message):
        product.convolve(spec, tiling, device.put(x), device.put(kernel), None)


# --- The choice ---


def gpu(architecture, multiprocessors=132):
    return SimpleNamespace(architecture=architecture, multiprocessors=multiprocessors)


def chosen(device, kind, pixels, columns):
    tiling = choice.choose(kind, np.dtype(np.float32), device, pixels, columns)
    return tiling.on_warpgroups, tiling.columns


def test_tilings_cover_everything_and_fit():
    for kind in KINDS.values():
        for tiling in product.warpgroup_tilings(kind):
            assert tiling.shared_bytes + 1024 <= 228 << 10  # the driver keeps 1024 of a block for itself
            assert (tiling.rows, tiling.threads) == (128, 256)
            assert tiling.shared_bytes >= 1024 + tiling.rows * tiling.columns * 4  # the sums
            assert tiling.depth * product.operand_type(kind, np.dtype(np.float32)).itemsize == 128
            assert tiling.padded(tiling.columns + 1) == 2 * tiling.columns


def test_wgmma_is_for_large_products_on_hopper(monkeypatch):
    monkeypatch.setattr(wgmma, "works", lambda *_: True)
    hopper = gpu(90)
    for kind in (1, 4, 5):
        assert chosen(hopper, kind, 8 * 64 * 64, 256) == (True, 256)
        assert chosen(hopper, kind, 4 * 64 * 64, 256) == (True, 256)  # 128 blocks
        assert chosen(hopper, kind, 2 * 64 * 64, 256) == (True, 128)
        assert chosen(hopper, kind, 8 * 64 * 64, 64) == (True, 64)
        assert chosen(hopper, kind, 99 * 128, 64) == (True, 64)
        assert chosen(hopper, kind, 2 * 64 * 64, 64) == (False, 64)  # 128 blocks of half the size rather than 64
        assert chosen(hopper, kind, 8 * 64 * 64, 160) == (True, 64)  # 192 columns rather than 256
        assert chosen(hopper, kind, 8 * 64 * 64, 32)[0] is False  # half of it in vain
    assert chosen(hopper, 3, 8 * 64 * 64, 256) == (True, 128)
    assert chosen(hopper, 3, 8 * 64 * 64, 64) == (True, 64)
    assert chosen(hopper, 0, 8 * 64 * 64, 256)[0] is False
    for other in (80, 89, 100, 120):
        assert chosen(gpu(other), 4, 8 * 64 * 64, 256)[0] is False


def test_what_does_not_work_is_not_chosen(monkeypatch):
    monkeypatch.setattr(wgmma, "works", lambda device, tiling: tiling.columns == 64)
    assert chosen(gpu(90), 4, 8 * 64 * 64, 256) == (False, 128)  # mma.sync's, which fetches less
    assert chosen(gpu(90), 4, 8 * 64 * 64, 64) == (True, 64)
    monkeypatch.setattr(wgmma, "works", lambda device, tiling: False)
    assert chosen(gpu(90), 4, 8 * 64 * 64, 256) == (False, 128)


# --- The switch and the check ---


@pytest.fixture
def hopper():
    return EmulatedDevice(90)


@needs_compiler
def test_the_switch(hopper, monkeypatch):
    monkeypatch.setenv(wgmma.VARIABLE, "0")
    assert chosen(hopper, 4, 8 * 64 * 64, 256) == (False, 128)
    assert not hopper.launches  # nor is anything checked
    monkeypatch.setenv(wgmma.VARIABLE, "1")
    assert chosen(hopper, 4, 8 * 64 * 64, 256) == (False, 128)  # that has been decided
    hopper = EmulatedDevice(90)
    monkeypatch.setenv(wgmma.VARIABLE, "no")
    with pytest.raises(ValueError, match="the environment variable FASTCLSTM_CUDA_WGMMA must be 0 or 1, got 'no'"):
        chosen(hopper, 4, 8 * 64 * 64, 256)


@needs_compiler
def test_each_tiling_is_checked_before_its_first_use(hopper, monkeypatch):
    """By what computes, where the device asked only writes down what to do."""
    monkeypatch.setenv(wgmma.VARIABLE, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(hopper, 4, 8 * 64 * 64, 64) == (True, 64)
        assert [name for name, *_ in hopper.launches].count("conv2d") == 2
        assert chosen(hopper, 4, 8 * 64 * 64, 64) == (True, 64)
        assert [name for name, *_ in hopper.launches].count("conv2d") == 2  # once
        writer = SimpleNamespace(architecture=90, multiprocessors=4, itself=hopper)
        assert chosen(writer, 4, 8 * 64 * 64, 128) == (True, 128)
        assert [name for name, *_ in hopper.launches].count("conv2d") == 4


@needs_compiler
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("wgmma.cuh", "(piece ^ row % 8)", "piece"),  # no swizzle
        ("wgmma.cuh", "(m * 512 + k * 2)", "m * 512"),  # the same depth again
        ("wgmma.cuh", "group * (ROW_TILES * 64 * 128)", "0"),  # the same pixels again
        ("wgmma.cuh", "quad = lane % 4 * 2;", "quad = 6 - lane % 4 * 2;"),
        ("wgmma.cuh", "row + m * 64 + i / 2 * 8", "row + m * 64 + i % 2 * 8"),
        ("wgmma.cuh", "int k = 0; k < 4;", "int k = 1; k < 4;"),
        ("wgmma.cuh", "tile.sum[m][j][i] = 0;", "tile.sum[m][j][i] = j || i ? 0 : 1;"),
    ],
)
def test_wrong_products_are_found_and_avoided(file, old, new, tmp_path, monkeypatch):
    monkeypatch.setenv(wgmma.VARIABLE, "1")
    device = edited(tmp_path, file, old, new)
    message = re.escape("kind 4 by wgmma, 128x64, differ on this GPU from those by mma.sync; that is used instead")
    with pytest.warns(RuntimeWarning, match=message):
        assert chosen(device, 4, 8 * 64 * 64, 64)[0] is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(device, 4, 8 * 64 * 64, 64)[0] is False  # told once


@needs_compiler
def test_products_that_fail_are_avoided(hopper, monkeypatch):
    monkeypatch.setenv(wgmma.VARIABLE, "1")
    kernel = hopper.kernel

    def refused(source, name, macros):
        if "WARPGROUPS" in macros:
            raise RuntimeError("csrc/gemm.cu does not compile")
        return kernel(source, name, macros)

    monkeypatch.setattr(hopper, "kernel", refused)
    with pytest.warns(RuntimeWarning, match=r"128x64, fail on this GPU \(csrc/gemm.cu does not compile\), unlike mma"):
        assert chosen(hopper, 4, 8 * 64 * 64, 64)[0] is False


def test_a_call_takes_wgmma_where_it_is_large_enough(monkeypatch, new_device):
    """Through the engine's own choice, and switched off: the sums differ in their order alone."""
    case = test_cuda_convlstm2d.problem((3, 2, 10, 13, 8), (3, 3), 16)
    results = []
    for wanted in "01":
        monkeypatch.setenv(wgmma.VARIABLE, wanted)
        hopper = new_device(90)
        results.append(test_cuda_convlstm2d.run(hopper, "bfloat16", np.float32, *case))
        (grid,) = {grid for name, grid, _ in hopper.launches if name == "convlstm2d_step"}
        assert grid == ((3, 1, 1) if wanted == "1" else (7, 1, 1))  # a tile an image, which keeps its halo
    for name, value in results[0].items():
        np.testing.assert_allclose(results[1][name], value, atol=2e-2 * abs(value).max(), err_msg=name)


# --- As compiled ---


@pytest.mark.parametrize(("algorithm", "number"), [case for case in EVERY if case[0] != "float16"])  # as bfloat16
def test_nothing_spills_and_no_product_waits_for_another(algorithm, number):
    check_assembled(product.warpgroup_tilings(KINDS[algorithm])[number])
