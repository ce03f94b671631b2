"""What tests of products by wgmma share: operands, comparison with the oracle, edited copies of csrc, compiled code."""

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_cuda_conv2d
import test_cuda_convlstm2d
from cuda_cases import ROUNDING, near, within
from cuda_emulator import EmulatedDevice

from fastclstm.engines.cuda import compilation, product
from fastclstm.spec import ConvSpec

CSRC = Path(__file__).parents[1] / "csrc"


def rounded(algorithm, x):
    """x as a product reads it, in float64."""
    x = np.asarray(x, np.float32)
    if algorithm == "float16":
        return x.astype(np.float16).astype(np.float64)
    bits = x.view(np.uint32).astype(np.uint64)
    if algorithm == "bfloat16":
        bits = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
    if algorithm == "tf32":
        bits = bits + 0x1000 & 0xFFFFE000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def random_case(shape, kernel, F, seed=0, **options):
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in (shape, (*kernel, shape[-1], F)))
    return ConvSpec.infer(shape, w.shape, **options), x, w


def check_convolution(found, algorithm, problem):
    """Compare what a drawn problem of `test_cuda_conv2d` gave with the oracle's, as the algorithm rounds operands."""
    spec, arrays, dy = problem
    expected, plain = (test_cuda_conv2d.oracle(dtype, *problem) for dtype in (np.float64, np.float32))
    if algorithm == "float32":
        within(found, expected, plain, np.float32)
        return
    largest = test_cuda_conv2d.oracle(np.float64, spec, [abs(a) if a is not None else a for a in arrays], abs(dy))
    gradients = "bfloat16" if algorithm == "bfloat16" else "tf32"
    for name, rounding in (("0 ", ROUNDING[algorithm]), ("1 ", ROUNDING[gradients])):
        assert (abs(found[name] - expected[name]) <= 2.01 * rounding * largest[name] + 1e-6).all(), name


def check_recurrence(found, algorithm, case):
    """Compare what a problem of `test_cuda_convlstm2d` gave with the oracle's, as the algorithm rounds operands."""
    expected = test_cuda_convlstm2d.oracle(np.float64, *case)
    if algorithm == "float32":
        within(found, expected, test_cuda_convlstm2d.oracle(np.float32, *case), np.float32, roundings=32)
        return
    if case[0].cell_clip is not None:  # its gradient jumps
        found, expected = ({n: v for n, v in part.items() if n[0] == "y"} for part in (found, expected))
    near(found, expected, 6 * ROUNDING[algorithm])


def check_bits(device, tilings, spec, x, kernel):
    """Convolve twice by each tiling: all runs have the same bits."""
    first, *others = (
        device.get(product.convolve(spec, tiling, device.put(x), device.put(kernel), None)) for tiling in [*tilings] * 2
    )
    for y in others:
        np.testing.assert_array_equal(y, first)


def edited(folder, file, old, new):
    """A copy of csrc with one place changed, on a device that compiles it."""
    shutil.copytree(CSRC, folder, dirs_exist_ok=True)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))

    class Edited(EmulatedDevice):
        def kernel(self, source, name, macros):
            return super().kernel(folder / source, name, macros)

    return Edited(90)


def check_assembled(tiling):
    """Nothing spills, registers suffice, and the assembler does not put products one after another."""
    try:
        core = compilation.cuda_core()
        compilation.nvrtc()
    except ImportError as error:
        pytest.skip(str(error))
    macros = [(name, str(value)) for name, value in ({"REAL": "float", "STANDARD": 1} | dict(tiling.macros)).items()]
    file, log = compilation.source_folder() / "gemm.cu", io.StringIO()
    options = core.ProgramOptions(name=file.name, arch="sm_90a", define_macro=macros, include_path=str(file.parent),
                                  ptxas_options=["-v"], **compilation.OPTIONS)  # fmt: skip
    code = core.Program(file.read_text(), "c++", options).compile("cubin", logs=log).code
    assert b"convlstm2d_step" in code
    text = log.getvalue()
    assert len(re.findall("Compiling entry function", text)) == 3
    assert "serialized" not in text
    assert set(re.findall(r"(\d+) bytes spill", text)) == {"0"}
    registers = max(map(int, re.findall(r"Used (\d+) registers", text)))
    assert registers * tiling.threads <= 65536
