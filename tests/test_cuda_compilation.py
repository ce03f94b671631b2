"""csrc/ compiles for the GPUs it is written for, on any machine with the extra "cuda"; and how the result is kept."""

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fastclstm import functional
from fastclstm.engines import disk_cache
from fastclstm.engines.cuda import ALGORITHMS, compilation, device, devices
from fastclstm.engines.cuda.device import DeviceArray
from fastclstm.engines.cuda.views import View

ROOT = Path(__file__).parents[1]


@pytest.fixture
def nvrtc():
    """NVRTC's version and architectures; the test is skipped without it."""
    try:
        return compilation.nvrtc()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture
def own(monkeypatch, tmp_path):
    """A source folder and a cache folder of the test's own, with one kernel; NVRTC's version is made up."""
    sources, cache = tmp_path / "csrc", tmp_path / "cache"
    sources.mkdir()
    (sources / "twice.cu").write_text(
        '#include "scale.cuh"\nextern "C" __global__ void twice(float* x) { x[threadIdx.x] *= SCALE * FACTOR; }\n'
    )
    (sources / "scale.cuh").write_text("#define SCALE 2\n")
    monkeypatch.setenv(disk_cache.CACHE_VARIABLE, str(cache))
    for name in ("cache_folder", "source_digest"):
        monkeypatch.setattr(compilation, name, getattr(compilation, name).__wrapped__)
    monkeypatch.setattr(compilation, "source_folder", lambda: sources)
    return sources


@pytest.fixture
def compiled(own, monkeypatch):
    """Every compilation asked of NVRTC, which stays out of it."""
    calls = []

    def fake(source, macros, architecture):
        calls.append((source, dict(macros), architecture))
        return f"code {len(calls)}".encode()

    monkeypatch.setattr(compilation, "_compile", fake)
    monkeypatch.setattr(compilation, "nvrtc", lambda: ((13, 0), (75, 80, 86, 89, 90, 100, 120)))
    return calls


# --- NVRTC ---


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_a_source_becomes_machine_code(nvrtc, own, architecture):
    code = compilation.compile_source("twice.cu", {"FACTOR": 3}, architecture)
    assert code.startswith(b"\x7fELF")
    assert b"twice" in code
    assert code == compilation.compile_source("twice.cu", {"FACTOR": 3}, architecture)


def test_macros_and_headers_reach_the_code(nvrtc, own):
    codes = {compilation.compile_source("twice.cu", {"FACTOR": factor}, "sm_80") for factor in (3, 4, "5.5f")}
    (own / "scale.cuh").write_text("#define SCALE 7\n")
    codes.add(compilation.compile_source("twice.cu", {"FACTOR": 3}, "sm_80"))
    assert len(codes) == 4


def test_what_does_not_compile_is_shown_with_the_log(nvrtc, own):
    with pytest.raises(
        RuntimeError, match=r'(?s)^csrc/twice\.cu -DOTHER=1 does not compile for sm_80: .*"FACTOR" is und'
    ):
        compilation.compile_source("twice.cu", {"OTHER": 1}, "sm_80")


@pytest.mark.parametrize(("architecture", "name"), [(75, "sm_75"), (80, "sm_80"), (86, "sm_86"), (90, "sm_90a")])
def test_nvrtc_knows_the_names_that_are_asked_for(nvrtc, own, architecture, name):
    assert compilation.target(architecture) == name
    assert compilation.compile_source("twice.cu", {"FACTOR": 1}, name)


# --- All of csrc ---


@cache
def compiled_once(source, macros, architecture):
    return compilation.compile_source(source, dict(macros), architecture)


class Compiling(device.Device):
    """A device that compiles every kernel that the engine asks it for, and launches nothing."""

    multiprocessors, shared_bytes = 132, 227 << 10

    def __init__(self, architecture):
        self.architecture, self.kernels = architecture, set()

    def empty(self, shape, dtype):
        return self.put(np.empty(shape, dtype))

    zeros = empty

    def put(self, array):
        return DeviceArray(array.ctypes.data, array.shape, array.dtype, array, self)

    def get(self, array):
        return np.zeros(array.shape, array.dtype)

    def kernel(self, source, name, macros):
        code = compiled_once(source, tuple(macros.items()), compilation.target(self.architecture))
        assert name.encode() in code
        self.kernels.add((source, name))
        return name

    def resident_blocks(self, kernel, threads, shared_bytes):
        return 1000

    def launch(self, kernel, grid, block, shared_bytes, *arguments, cooperative=False):
        assert shared_bytes <= self.shared_bytes
        assert len(grid) <= len(block) + 2 <= 5
        assert np.prod(block) <= 1024


def names_of_kernels():
    """(source, name) of every kernel in csrc."""
    return {
        (path.name, name)
        for path in (ROOT / "csrc").glob("*.cu")
        for name in re.findall(r"^KERNEL\(.*\)\n(\w+)\(", path.read_text(), re.MULTILINE)
    }


def unresolved(text):
    """Pointers of kernels that a source does not resolve, but for those of frames (csrc/frames.cuh)."""
    text = re.sub(r"\\\n", " ", text)
    for name, value in re.findall(r"^#define (\w+) (.*)$", text, re.MULTILINE):
        text = re.sub(rf"\({name}\)", f"({value})", text)
    resolved = {name for names in re.findall(r"\bresolve\(([\w\s,]*)\);", text) for name in re.split(r"\W+", names)}
    for name, parameters in re.findall(r"^KERNEL\(.*\)\n(\w+)\(([^{]*)\)\s*\{", text, re.MULTILINE):
        if name != "write_table":
            yield from (f"{name}: {p}" for p in re.findall(r"\*\s*(\w+)", parameters) if p not in resolved)


def test_kernels_resolve_their_pointers():
    for path in (ROOT / "csrc").glob("*.cu"):
        assert list(unresolved(path.read_text())) == [], path.name


def test_a_pointer_that_is_not_resolved_is_noticed():
    source = (
        "#define P const real *x, int n, \\\n real *y\nKERNEL(9)\ntwice(P)\n{\n    resolve(x);\n    y[0] = x[0];\n}\n"
    )
    assert list(unresolved(source)) == ["twice: y"]


def use_everything():
    """Run every operation in every way that is a kernel of its own; the numbers mean nothing."""
    rng = np.random.default_rng(0)
    for dtype, algorithms in ((np.float32, ALGORITHMS), (np.float64, ("auto",))):
        for algorithm in algorithms:
            for F, activation in ((2, "tanh"), (16, "relu"), (64, "tanh")):
                x, kernel, recurrent_kernel = (
                    rng.standard_normal(shape).astype(dtype)
                    for shape in ((4, 2, 64, 64, 3), (3, 3, 3, 4 * F), (3, 3, F, 4 * F))
                )
                cell = {"activation": activation, "peephole": {gate: np.ones((64, 64, F), dtype) for gate in "ifo"},
                        "mask": np.ones((4, 2)), "engine": "cuda", "algorithm": algorithm}  # fmt: skip
                functional.convlstm2d(x, kernel, recurrent_kernel, **cell)
                y, pullback = functional.convlstm2d_vjp(x, kernel, recurrent_kernel, recompute=F == 2, **cell)
                pullback(y)
                y, pullback = functional.conv2d_vjp(x[:, 0], kernel, engine="cuda", algorithm=algorithm)
                pullback(y)
        y, pullback = functional.max_pool3d_vjp(x, engine="cuda")
        pullback(y)
        deep = np.ones((1, 2, 2, 64), dtype), np.ones((5, 5, 64, 64), dtype)  # so deep that it is cut into shares
        y, pullback = functional.conv2d_vjp(*deep, engine="cuda")
        pullback(y)
        few = (1, 2, 8, 8, 64), (3, 3, 64, 256), (3, 3, 64, 256)  # pixels, so that a step is cut, too
        functional.convlstm2d(*(np.ones(shape, dtype) for shape in few), engine="cuda")
        view = View.of(devices.current().put(x))
        np.where(view != 0, view[:, ::-1], view.activate_backward("tanh", view.activate("relu")))
    for dtype in (np.int64, np.bool_):
        View.of(devices.current().put(x.astype(dtype)))[::-1].copy()


@pytest.mark.parametrize("architecture", [80, 90])
def test_every_kernel_compiles(nvrtc, architecture, monkeypatch, tmp_path):
    """Barely optimised, which takes a tenth of the time; the assembler sees every instruction all the same."""
    monkeypatch.setitem(compilation.OPTIONS, "ofast_compile", "max")
    monkeypatch.setattr(compilation, "cache_folder", lambda: None)
    compiling = Compiling(architecture)
    with devices.using(compiling):
        use_everything()
    assert compiling.kernels == names_of_kernels()


def test_an_old_card_needs_no_tensor_cores(nvrtc):
    """As optimised as it will run."""
    compiling = Compiling(75)
    with devices.using(compiling):
        functional.convlstm2d(*(np.ones(shape, np.float32) for shape in ((1, 2, 4, 4, 1), *[(3, 3, 1, 4)] * 2)),
                              engine="cuda")  # fmt: skip
        functional.conv2d(np.ones((1, 4, 4, 1), np.float32), np.ones((3, 3, 1, 1), np.float32), engine="cuda")
    assert ("persistent.cu", "convlstm2d_steps") in compiling.kernels


# --- Names of architectures ---


@pytest.mark.parametrize(
    ("architecture", "name"), [(75, "sm_75"), (80, "sm_80"), (87, "sm_86"), (90, "sm_90a"), (100, "sm_100")]
)
def test_target(compiled, architecture, name):
    assert compilation.target(architecture) == name


@pytest.mark.parametrize(
    ("architecture", "remedy"),
    [(70, r"an older one, pip install 'cuda-core\[cu12\]'"), (130, r"a newer one, pip install -U 'cuda-core\[cu13\]'")],
)
def test_a_gpu_that_nvrtc_does_not_know(compiled, architecture, remedy):
    expected = (
        rf"^engine 'cuda': NVRTC 13\.0 compiles for sm_75 to sm_120, not for this GPU's sm_{architecture}; install "
    )
    with pytest.raises(ImportError, match=expected + remedy + ", or pass engine='cpu'$"):
        compilation.target(architecture)


# --- The extra ---


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    message = r"^engine 'cuda' needs cuda-core with NVRTC \(.*\); pip install 'fastclstm\[cuda\]'$"
    with pytest.raises(ImportError, match=message):
        compilation.cuda_core()
    with pytest.raises(ImportError, match=message):
        compilation.nvrtc.__wrapped__()


def test_importing_the_engine_needs_no_extra():
    code = "import sys; sys.modules['cuda'] = None; import fastclstm.engines.cuda, fastclstm.engines.cuda.gpu"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- The cache ---


def files(own):
    return sorted(path for path in own.parent.glob("cache/**/*") if path.is_file())


def test_compiled_once(compiled, own):
    for _ in range(2):
        assert compilation.compile_source("twice.cu", {"FACTOR": 3}, "sm_80") == b"code 1"
    assert compiled == [("twice.cu", {"FACTOR": 3}, "sm_80")]
    assert [path.suffix for path in files(own)] == [".cubin"]
    assert files(own)[0].parent.name == f"cuda-{compilation.source_digest()}"


def test_what_tells_codes_apart(compiled, own):
    for source, macros, architecture in (
        ("twice.cu", {"FACTOR": 3}, "sm_80"), ("twice.cu", {"FACTOR": 4}, "sm_80"), ("o.cu", {"FACTOR": 3}, "sm_80"),
        ("twice.cu", {"FACTOR": 3, "MORE": 1}, "sm_80"), ("twice.cu", {"FACTOR": 3}, "sm_90a"),
    ):  # fmt: skip
        compilation.compile_source(source, macros, architecture)
    assert len(compiled) == len(files(own)) == 5
    compilation.compile_source("twice.cu", {"MORE": 1, "FACTOR": 3}, "sm_80")  # the order of macros says nothing
    assert len(compiled) == 5


def test_edit_of_a_header_is_seen(compiled, own):
    compilation.compile_source("twice.cu", {}, "sm_80")
    (own / "scale.cuh").write_text("#define SCALE 3\n")
    compilation.compile_source("twice.cu", {}, "sm_80")
    assert len(compiled) == 2


def test_another_nvrtc_shares_no_code(compiled, own, monkeypatch):
    before = compilation.cache_folder()
    monkeypatch.setattr(compilation, "nvrtc", lambda: ((13, 1), (75,)))
    assert compilation.cache_folder() != before


def test_a_folder_that_cannot_be_written_is_read(compiled, own, monkeypatch):
    compilation.compile_source("twice.cu", {}, "sm_80")

    def refused(*args, **kwargs):
        raise PermissionError

    monkeypatch.setattr(Path, "write_bytes", refused)
    monkeypatch.setattr(Path, "mkdir", refused)
    assert compilation.compile_source("twice.cu", {}, "sm_80") == b"code 1"
    assert compilation.compile_source("twice.cu", {"NEW": 1}, "sm_80") == b"code 2"
    assert len(files(own)) == 1


def test_without_any_folder(compiled, monkeypatch, own):
    monkeypatch.setattr(compilation, "cache_folder", lambda: None)
    assert compilation.compile_source("twice.cu", {}, "sm_80") == b"code 1"
    assert files(own) == []


# --- Where the sources are ---


def test_sources_of_the_clone():
    assert compilation.source_folder() == ROOT / "csrc"
    names = {path.name for path in compilation._sources()}
    assert names == {path.name for path in (ROOT / "csrc").glob("*.cu*")}
    assert all(re.fullmatch(r"[a-z0-9_]+\.cuh?", name) for name in names)


def test_sources_of_the_installed_package(tmp_path):
    """They lie in the package there, and those beside it are not looked at."""
    site = tmp_path / "site-packages"
    shutil.copytree(ROOT / "fastclstm", site / "fastclstm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "csrc", site / "fastclstm" / "csrc")
    (site / "csrc").mkdir()
    code = "from fastclstm.engines.cuda import compilation; print(compilation.source_folder())"
    result = subprocess.run([sys.executable, "-c", code], cwd=site, capture_output=True, text=True, check=True)
    assert Path(result.stdout.strip()) == site / "fastclstm" / "csrc"
    shutil.rmtree(site / "fastclstm" / "csrc")
    (site / "csrc").rmdir()
    result = subprocess.run([sys.executable, "-c", code], cwd=site, capture_output=True, text=True)
    assert "engine 'cuda' finds no csrc in" in result.stderr
