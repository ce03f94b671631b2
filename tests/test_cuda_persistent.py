"""All steps of convlstm2d in one launch, its blocks run at once on the processor: the bits of a launch a step."""

import importlib
from contextlib import nullcontext

import numpy as np
import pytest
from cuda_cases import cast, get, put, tiling
from cuda_emulator import EmulatedDevice, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_convlstm2d import oracle, problem, problems

from fastclstm.engines.cuda import packing, persistent, product

cuda = importlib.import_module("fastclstm.engines.cuda.convlstm2d")
pytestmark = needs_compiler


def run(device, algorithm, dtype, case, save=False):
    """Outputs, last states and, with `save`, all that is saved."""
    spec, (x, kernel, recurrent_kernel, bias, h, c, weights, mask), _ = case[0], cast(case[1], dtype), None
    *outputs, saved = cuda.convlstm2d(
        spec, put(device, x), kernel, recurrent_kernel, bias, put(device, h), put(device, c), weights, mask,
        algorithm=algorithm, save=save,
    )  # fmt: skip
    return get(device, outputs + ([saved.h.array, saved.c.array, saved.z] if save else []))


def check(device, algorithm, dtype, case, save, launched=True):
    """Results, which are those of a launch a step."""
    before = len(device.launches)
    found = run(device, algorithm, dtype, case, save)
    names = [name for name, *_ in device.launches[before:]]
    assert names.count("convlstm2d_steps") == int(launched)
    assert ("convlstm2d_step" in names) == (not launched)
    with persistent.forbidden():
        expected = run(device, algorithm, dtype, case, save)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    return found


@pytest.mark.parametrize(
    ("algorithm", "dtype", "number", "examples"),
    [("simt", np.float32, 0, 4), ("simt", np.float32, 1, 10), ("simt", np.float32, 2, 8), ("simt", np.float64, 0, 8),
     ("simt", np.float64, 1, 8), ("float32", np.float32, 0, 3), ("float32", np.float32, 1, 6),
     ("float32", np.float32, 2, 6), ("float32", np.float32, 3, 8), ("tf32", np.float32, 1, 5),
     ("bfloat16", np.float32, 1, 5), ("bfloat16", np.float32, 3, 5), ("float16", np.float32, 3, 5)],
)  # fmt: skip
def test_bits_of_a_launch_a_step(algorithm, dtype, number, examples, monkeypatch):
    """Whatever the geometry, the cell and the number of blocks, of which some take more tiles than others."""
    device = EmulatedDevice()
    monkeypatch.setattr(persistent, "FEWEST_STEPS", 1)
    monkeypatch.setattr(persistent, "MOST_WORK", 1 << 40)
    monkeypatch.setattr(persistent, "MOST_TILES", 1 << 20)

    @settings(max_examples=examples)
    @given(problems(used=number == 1), st.integers(1, 5), st.booleans())
    def same(case, resident, save):
        device.resident = resident
        if case[0].B:
            with tiling(monkeypatch, number):
                check(device, algorithm, dtype, case, save)

    same()
