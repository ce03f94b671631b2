"""All steps of convlstm2d in one launch, its blocks run at once on the processor: the bits of a launch a step."""

import importlib
from contextlib import nullcontext

import numpy as np
import pytest
from cuda_cases import cast, get, near, put, tiling
from cuda_emulator import EmulatedDevice, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_convlstm2d import oracle, problem, problems

from fastclstm.engines.cuda import choice, persistent, product, wgmma

cuda = importlib.import_module("fastclstm.engines.cuda.convlstm2d")


def run(device, algorithm, dtype, case, save=False):
    """Output and last states, and how often each kernel of steps was launched."""
    spec, (x, kernel, recurrent_kernel, bias, h, c, weights, mask) = case[0], cast(case[1], dtype)
    before = len(device.launches)
    *outputs, _ = cuda.convlstm2d(
        spec, put(device, x), kernel, recurrent_kernel, bias, put(device, h), put(device, c), weights, mask,
        algorithm=algorithm, save=save,
    )  # fmt: skip
    names = [name for name, *_ in device.launches[before:]]
    return get(device, outputs), (names.count("convlstm2d_steps"), names.count("convlstm2d_step"))


def check(device, algorithm, dtype, case):
    """Results, which are those of a launch a step to the bit, with and without what backward needs."""
    found, launches = run(device, algorithm, dtype, case)
    assert launches == (1, 0)
    for save, mode in ((False, persistent.forbidden), (True, nullcontext)):
        with mode():
            expected, launches = run(device, algorithm, dtype, case, save)
        assert launches == (0, case[0].T)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    return found


@pytest.mark.parametrize(
    ("algorithm", "dtype", "number", "examples"),
    [("simt", np.float32, 0, 15), ("simt", np.float32, 1, 60), ("simt", np.float32, 2, 30), ("simt", np.float64, 0, 20),
     ("simt", np.float64, 1, 20), ("float32", np.float32, 0, 8), ("float32", np.float32, 1, 25),
     ("float32", np.float32, 2, 20), ("float32", np.float32, 3, 40), ("tf32", np.float32, 1, 15),
     ("bfloat16", np.float32, 1, 15), ("bfloat16", np.float32, 3, 30), ("float16", np.float32, 3, 15)],
)  # fmt: skip
def test_bits_of_a_launch_a_step(algorithm, dtype, number, examples, monkeypatch, new_device):
    """Whatever the geometry, the cell and the number of blocks, of which some take more tiles than others."""
    monkeypatch.setattr(persistent, "FEWEST_STEPS", 1)
    for name in ("MOST_WORK", "MOST_TILES", "MOST_LATE"):
        monkeypatch.setattr(persistent, name, 1 << 40)

    @settings(max_examples=examples)
    @given(problems(used=number == 1), st.integers(1, 5))
    def same(case, resident):
        device = new_device(resident=resident)
        if case[0].B:
            with tiling(monkeypatch, number):
                check(device, algorithm, dtype, case)

    same()


@needs_compiler
@pytest.mark.parametrize("algorithm", ["simt", "float32", "bfloat16"])
@pytest.mark.parametrize("F", [1, 8, 13])
@pytest.mark.parametrize("resident", [99, 6])
def test_every_step_waits_for_all_blocks(algorithm, F, resident, monkeypatch):
    """Pixels see those of other blocks, and filters those of other columns' blocks."""
    for name in ("MOST_TILES", "MOST_LATE"):
        monkeypatch.setattr(persistent, name, 99)
    device = EmulatedDevice(resident=resident)
    for seed, initial in enumerate(("hc", "")):
        case = problem((2, 5, 9, 12, 2), (3, 5), F, initial=initial, seed=seed)
        with tiling(monkeypatch, -1):
            check(device, algorithm, np.float32, case)
        _, grid, _ = next(launch for launch in device.launches if launch[0] == "convlstm2d_steps")
        tiles = product.tilings(product.KINDS[algorithm], 4)[-1].grid(216, 4 * F)
        assert grid == (min(resident, tiles[0] * tiles[1]), 1, 1)


@needs_compiler
def test_one_tile():
    for B in (1, 2, 3):
        device = EmulatedDevice(resident=4)
        check_outputs(device, problem((B, 4, 2, 3, 3), (3, 3), 4, mask=0))
        assert [grid for name, grid, _ in device.launches if name == "convlstm2d_steps"] == [(1, 1, 1)]


def check_outputs(device, case):
    """Check results against the oracle's."""
    expected = {name[2:]: value for name, value in oracle(np.float64, *case).items() if name[0] == "y"}
    found, launches = run(device, "auto", np.float32, case)
    assert launches == (1, 0)
    near(found, expected, 1e-5)


@pytest.mark.parametrize("go_backwards", [False, True])
def test_the_engine_reference(go_backwards, new_device):
    device = new_device(resident=99)
    for number, options in enumerate((
        {"mask": 0, "peephole": "elementwise", "return_sequences": False}, {"initial": "", "strides": 2},
        {"dilation": 2, "recurrent_dilation": 3, "cell_clip": 0.5}, {"padding_mode": "circular", "mask": 0.5},
    )):  # fmt: skip
        check_outputs(device, problem((3, 4, 7, 6, 5), (3, 3), 8, go_backwards=go_backwards, seed=number, **options))


def test_masked_frames_are_not_read(new_device):
    device = new_device(resident=99)
    spec, arrays, cotangents = problem((2, 4, 5, 4, 3), (3, 3), 4, mask=0, seed=1)
    bad = np.where(arrays[-1][:, :, None, None, None], arrays[0], np.nan)
    for value in check(device, "auto", np.float32, (spec, (bad, *arrays[1:]), cotangents)).values():
        assert np.isfinite(value).all()


@needs_compiler
def test_the_count_of_arrivals_is_left_at_zero(monkeypatch):
    """So that memory which is kept for the next call needs no care."""
    device, kept = EmulatedDevice(resident=99), []

    def scratch(sizes):
        addresses, owner = EmulatedDevice.scratch(device, sizes)
        kept.extend(array for array in owner if array.size == 4)
        return addresses, owner

    monkeypatch.setattr(device, "scratch", scratch)
    run(device, "auto", np.float32, problem((2, 4, 9, 12, 2), (3, 3), 4))
    assert [device.get(count).view(np.int32).tolist() for count in kept] == [[0]]


# --- When it is chosen ---


def chosen(shape, kernel, F, multiprocessors=132, resident=528, algorithm="auto", architecture=80):
    """Blocks of the launch of all steps."""
    device = EmulatedDevice(architecture, resident)
    device.multiprocessors = multiprocessors
    dtype = np.dtype(np.float32)
    spec = problem((1, *shape[1:]), (kernel, kernel), F)[0].with_batch(shape[0])
    pixels = spec.B * spec.HO * spec.WO
    chosen = choice.choose(product.kind(device, dtype, algorithm), dtype, device, pixels, 4 * F)
    device.kernel = lambda *_: None
    short = chosen.kind >= product.KINDS["bfloat16"]
    data = device.empty((1,), np.uint16 if short else dtype)
    parts = (product.frames(device, conv, data, chosen.depth, channels=-(-conv.C // 8) * 8 if short else None)
             for conv in (spec.recurrent, spec.input))  # fmt: skip
    return persistent.blocks(device, chosen, {}, spec, *parts)


def test_small_steps_are_launched_together():
    assert chosen((1, 10, 32, 32, 1), 3, 32) == 128
    assert chosen((1, 10, 64, 64, 64), 3, 64) == 256
    assert chosen((1, 2, 4, 4, 1), 3, 4) == 1
    assert chosen((8, 10, 64, 64, 64), 3, 64) == 0  # too much work
    assert chosen((1, 1, 32, 32, 1), 3, 32) == 0  # one step
    assert [chosen((1, 2, 4, 4, 1), 3, F) for F in (1, 3, 6, 8)] == [1, 1, 0, 1]  # pieces of h that are not whole
    assert [chosen((1, 2, 4, 4, 1), 3, 6, algorithm=name) for name in ("simt", "tf32", "bfloat16")] == [2, 0, 1]


def test_products_by_wgmma_are_launched_step_by_step(monkeypatch):
    monkeypatch.setattr(wgmma, "works", lambda device, tiling: True)
    assert chosen((1, 10, 64, 64, 64), 3, 64, architecture=90) == 0
    assert chosen((1, 10, 32, 32, 1), 3, 32, architecture=90) == 128


def test_few_tiles_a_block():
    """As many as a block may take, and one more."""
    most = 4 * 32 * 32 // 32
    assert chosen((4, 2, 32, 32, 1), 1, 8, multiprocessors=400, resident=most // persistent.MOST_TILES) == 32
    assert chosen((4, 2, 32, 32, 1), 1, 8, multiprocessors=400, resident=most // persistent.MOST_TILES - 1) == 0


@needs_compiler
def test_devices_without_cooperative_launches():
    assert chosen((1, 10, 32, 32, 1), 3, 32, resident=0) == 0
    assert run(EmulatedDevice(), "auto", np.float32, problem((1, 2, 3, 3, 1), (3, 3), 2))[1] == (0, 2)


def test_forbidden():
    with persistent.forbidden():
        assert chosen((1, 10, 32, 32, 1), 3, 32) == 0
    assert chosen((1, 10, 32, 32, 1), 3, 32) == 128
