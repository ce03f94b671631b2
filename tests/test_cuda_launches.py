"""Every launch, by the real cuda.core over a driver that computes nothing: arguments fit the compiled kernels."""

import json
import shutil

import cuda_stub
import pytest
from test_cuda_compilation import names_of_kernels

from fastclstm.engines.cuda import compilation

USE_EVERYTHING = """
import json
import cuda_stub
from fastclstm.engines.cuda import compilation, devices, persistent, wgmma
from test_cuda_compilation import use_everything

compilation.OPTIONS["ofast_compile"] = "max"
wgmma._agrees = lambda *_: True  # of numbers there are none
checked = cuda_stub.Checked()
use_everything()
with persistent.forbidden():
    use_everything()
launches = [[*name, count] for name, count in checked.launches.items()]
print(json.dumps({"launches": launches, "wrong": checked.wrong, "faults": checked.faults, "macros": checked.macros}))
"""

ONE_WRONG = """
import json
import numpy as np
import cuda_stub
from fastclstm.engines.cuda import devices, product

checked, device = cuda_stub.Checked(), devices.current()
array = device.zeros((512,), np.float32)
kernel = device.kernel("elementwise.cu", "copy", product.element_macros(array.dtype))
right = array, np.int64(1), array, np.int64(1), np.int64(1), np.int32(1)
for arguments in (right, right[:-1], (*right[:-1], np.int64(1))):
    device.launch(kernel, (1,), (256,), 0, *arguments)
before = len(checked.wrong), [*checked.faults]
device._opted[kernel] = 1 << 20
told = "nothing"
try:
    device.launch(kernel, (1,), (256,), 64 << 10, *right)
except RuntimeError as error:
    told = str(error)
print(json.dumps([*before, told, checked.faults]))
"""

REFUSED = """
import warnings
import numpy as np
import cuda_stub
from fastclstm import functional
from fastclstm.engines.cuda import compilation

compilation.OPTIONS["ofast_compile"] = "max"
checked = cuda_stub.Checked()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x, kernel = np.ones((8, 64, 64, 16), np.float32), np.ones((3, 3, 16, 256), np.float32)
    functional.conv2d(x, kernel, engine="cuda", algorithm="bfloat16")
print([str(warning.message) for warning in caught])
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Folder with the driver."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to build the driver with")
    try:
        compilation.nvrtc()
    except ImportError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("driver")
    cuda_stub.build(folder)
    return folder


def test_every_launch_fits_its_kernel(driver):
    found = json.loads(cuda_stub.run(driver, USE_EVERYTHING))
    assert found["wrong"] == []
    assert found["faults"] == []
    assert {(source, name) for source, name, _ in found["launches"]} == names_of_kernels()
    assert sum(count for *_, count in found["launches"]) > 500
    assert min(found["macros"][name] for name in ("WARPGROUPS", "HALO", "WARPS_M")) > 10


def test_a_launch_that_does_not_fit_is_noticed(driver):
    wrong, faults, told, later = json.loads(cuda_stub.run(driver, ONE_WRONG))
    assert (wrong, faults) == (2, [])
    assert "the launch of a kernel failed" in told
    assert later == ["copy: more shared memory than was asked for"]


def test_wgmma_that_cannot_be_launched_is_not_used(driver):
    """cuda.core says so by an exception of its own."""
    told = cuda_stub.run(driver, REFUSED, STUB_MOST_SHARED=str(99 << 10))
    for size in ("128x256", "256x128 with a halo"):
        assert f"by wgmma, {size}, fail on this GPU (" in told
    assert "that is used instead" in told
