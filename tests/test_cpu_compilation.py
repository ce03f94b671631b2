"""The kernels' cache on disk: right code or none, whatever happens to its files."""

import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numba import types
from numba.core.caching import NullCache

from fastclstm.engines import disk_cache
from fastclstm.engines.cpu import compilation
from fastclstm.engines.cpu.kernels.entry import Kernel, table

ROOT = Path(__file__).parents[1]

COMMON = """
import json
import numpy as np
from numba.core import event
from fastclstm import functional

def pooled(dtype):
    x = np.random.default_rng(0).standard_normal((1, 3, 4, 6, 5)).astype(dtype)
    kernels = lambda: functional.max_pool3d(x, 2, engine="cpu")
    with event.install_recorder("numba:compile") as compiled:
        y = kernels()
    np.testing.assert_array_equal(y, functional.max_pool3d(x, 2, engine="reference"))
    return len(compiled.buffer)
"""


def start(code, cache, root=ROOT, **environment):
    """Start a process of its own that runs code after COMMON with a cache folder."""
    environment = {"FASTCLSTM_CACHE_DIR": str(cache), "FASTCLSTM_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-c", COMMON + textwrap.dedent(code)], cwd=root, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={k: v for k, v in (os.environ | environment).items() if v is not None},
    )  # fmt: skip


def finish(process):
    """What the process printed, as JSON."""
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    return json.loads(out)


def run(code, cache, root=ROOT, **environment):
    return finish(start(code, cache, root, **environment))


def files(cache):
    return sorted(cache.glob("fastclstm/kernels-*/*"))


POOL = 'print(json.dumps(pooled("f4")))'


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache folder that holds what POOL needs."""
    cache = tmp_path_factory.mktemp("cache")
    assert run(POOL, cache) > 0
    assert [path.suffix for path in files(cache)] == [".pickle"]
    return cache


@pytest.fixture
def copied(filled, tmp_path):
    return shutil.copytree(filled, tmp_path / "cache")


def test_warm_process_compiles_nothing(tmp_path):
    """Serial and parallel, both types; the folder of everyday runs saves the first compilation."""
    everything = """
        import fastclstm
        rng = np.random.default_rng(0)
        kernel, recurrent = rng.standard_normal((3, 3, 2, 32)), rng.standard_normal((3, 3, 8, 32))
        x = rng.standard_normal((2, 2, 32, 32, 2))
        with event.install_recorder("numba:compile") as compiled:
            for threads in (1, 2):
                fastclstm.set_num_threads(threads)
                for dtype in ("f4", "f8"):
                    arguments = [a.astype(dtype) for a in (x, kernel, recurrent)]
                    for algorithm in ("direct", "winograd") if dtype == "f4" else ("direct",):
                        functional.convlstm2d(*arguments, engine="cpu", algorithm=algorithm)
                    y, pullback = functional.max_pool3d_vjp(arguments[0], engine="cpu")
                    pullback(y)
        print(json.dumps([repr(event.data) for _, event in compiled.buffer]))
    """
    cache = os.environ.get(disk_cache.CACHE_VARIABLE)
    threads = {"FASTCLSTM_NUM_THREADS": None, "NUMBA_NUM_THREADS": "2"}
    run(everything, cache, **threads) if cache else run(everything, tmp_path, **threads)
    assert run(everything, cache or tmp_path, **threads) == []


def test_second_process_reads_what_the_first_wrote(filled):
    before = {path: path.stat().st_mtime_ns for path in files(filled)}
    assert run(POOL, filled) == 0
    assert {path: path.stat().st_mtime_ns for path in files(filled)} == before


def test_edit_of_any_source_changes_the_digest(monkeypatch, tmp_path):
    originals = compilation._sources()
    assert {"simd.py", "winograd.py", "activations.py", "compilation.py"} <= {path.name for path in originals}
    copies = []
    for number, path in enumerate(originals):  # a name may stand in several folders
        (tmp_path / str(number)).mkdir()
        copies.append(Path(shutil.copy(path, tmp_path / str(number) / path.name)))
    monkeypatch.setattr(compilation, "_sources", lambda: copies)
    digest = compilation.source_digest.__wrapped__
    assert digest() == compilation.source_digest()  # wherever the package is
    seen = {digest()}
    for path in copies:
        text = path.read_text()
        path.write_text(text + "#")
        seen.add(digest())
        path.write_text(text)
    assert len(seen) == 1 + len(copies)


def test_edit_of_an_intrinsic_is_seen(tmp_path):
    """A kernel is compiled again though its own file stays the same."""
    code = """
        print(json.dumps(functional.max_pool3d(np.full((1, 2, 2, 2, 3), 6, "f4"), 2, engine="cpu").max().item()))
    """
    root = tmp_path / "code"
    shutil.copytree(ROOT / "fastclstm", root / "fastclstm", ignore=shutil.ignore_patterns("__pycache__"))
    for _ in range(2):
        assert run(code, tmp_path / "cache", root) == 6
    simd = root / "fastclstm" / "engines" / "cpu" / "kernels" / "simd.py"
    text = simd.read_text()
    edited = text.replace(
        '    return _emit_masked(builder, "load",', '    return builder.fadd(*[_emit_masked(builder, "load",'
    ).replace("mask, constant(vector, 0))", "mask, constant(vector, 0))] * 2)")
    assert edited != text
    simd.write_text(edited)
    assert run(code, tmp_path / "cache", root) == 12
    simd.write_text(text)
    assert run(code, tmp_path / "cache", root) == 6
    assert len(list((tmp_path / "cache").glob("fastclstm/kernels-*"))) == 2


def test_processes_that_start_cold_at_once(tmp_path):
    """Of different signatures and of the same: all right, and all that they wrote is found later."""
    kinds = ["f4", "f8", "f4", "f8"]
    for process in [start(f"print(json.dumps(pooled('{kind}')))", tmp_path) for kind in kinds]:
        assert finish(process) >= 0
    assert len(files(tmp_path)) == 2
    assert run("print(json.dumps([pooled('f4'), pooled('f8')]))", tmp_path) == [0, 0]


def test_code_of_several_processes_works_together(tmp_path):
    """Each begins with another kernel; who finds the code of all computes what the oracle does."""
    drawn = """
        draw = np.random.default_rng(0).standard_normal
        arrays = draw((1, 2, 5, 6, 1)), draw((3, 3, 1, 12)), draw((3, 3, 3, 12))
        sums = []
        for how in ({"engine": "cpu", "algorithm": "direct"}, {"engine": "reference"}):
            y = functional.convlstm2d(*arrays, **how)
            sums.append([float(abs(y).sum())])
        print(json.dumps(sums))
    """
    convolve = """
        x, kernel = np.ones((1, 5, 6, 1)), np.ones((3, 3, 1, 12))
        sums = [[float(functional.conv2d(x, kernel, engine=engine).sum())] for engine in ("cpu", "reference")]
        print(json.dumps(sums))
    """
    for code in (convolve, drawn, drawn):
        ours, oracle = run(code, tmp_path)
        np.testing.assert_allclose(ours, oracle, rtol=1e-12)


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: content[: len(content) // 2], lambda content: bytes(len(content)),
     lambda content: content[:999] + bytes([content[999] ^ 1]) + content[1000:], lambda content: b"not a pickle"],
    ids=["empty", "cut", "zeros", "one bit", "other"],
)  # fmt: skip
def test_damaged_file_is_compiled_again_and_replaced(copied, damage):
    (path,) = files(copied)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert run(POOL, copied) > 0
    assert run(POOL, copied) == 0
    assert files(copied) == [path]


def test_file_that_cannot_be_read_or_replaced_is_left(copied):
    (path,) = files(copied)
    path.unlink()
    path.mkdir()
    (path / "occupied").touch()
    assert run(POOL, copied) > 0
    assert files(copied) == [path]  # and no unfinished file


def test_folder_that_vanishes_is_survived(tmp_path):
    code = f"""
        import shutil, fastclstm.engines.cpu
        shutil.rmtree({str(tmp_path / "cache")!r})
        {POOL}
    """
    assert run(code, tmp_path / "cache") > 0


def test_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").touch()
    assert run(POOL, tmp_path / "file" / "cache") > 0


def test_home_may_be_unset(tmp_path):
    assert run(POOL, tmp_path, HOME=None, FASTCLSTM_CACHE_DIR=None, XDG_CACHE_HOME=str(tmp_path)) > 0
    assert run(POOL, tmp_path, HOME=None, FASTCLSTM_CACHE_DIR=None, XDG_CACHE_HOME=str(tmp_path)) == 0
    assert len(list(tmp_path.glob("fastclstm/kernels-*/*"))) == 1


# What tells one kernel's code from another's.


def test_name_variant_signature_and_processor_are_in_the_path(tmp_path):
    def path(name, variant, sig, *magic):
        cached = compilation._KernelCache(name, variant, tmp_path)
        return cached._path(sig, SimpleNamespace(magic_tuple=lambda: magic))

    given = [
        ("run", "", "a", "x86", "rocketlake", "+avx2"), ("run", "", "a", "x86", "rocketlake", "+avx2,+avx512f"),
        ("run", "", "a", "x86", "haswell", "+avx2"), ("run", "", "b", "x86", "rocketlake", "+avx2"),
        ("run", "(4, 3)", "a", "x86", "rocketlake", "+avx2"), ("share", "", "a", "x86", "rocketlake", "+avx2"),
    ]  # fmt: skip
    assert len({path(*values) for values in given}) == len(given)
    assert path(*given[0]) == path(*given[0])
    assert "rocketlake" in path(*given[0]).name


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="names features of x86")
def test_other_processors_share_no_code(copied):
    plain = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    wide = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}
    for number, environment in enumerate((plain, wide), 2):
        assert run(POOL, copied, **environment) > 0
        assert run(POOL, copied, **environment) == 0
        assert len(files(copied)) == number
    assert run(POOL, copied) == 0


def test_kernels_of_another_processor_are_told_of(copied, monkeypatch):
    """A machine of another kind that shares the folder, or an image that was built on one: it compiles again."""
    (path,) = files(copied)
    path.rename(path.with_name(path.name.replace(compilation.processor(), "other.12345678")))
    process = start(POOL, copied)
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0
    assert json.loads(out) > 0
    assert error.count("were compiled for another type of processor than this one") == 1
    monkeypatch.setattr(compilation, "cache_folder", lambda: path.parent)
    assert compilation.kernels_on_disk() == (1, 1)


def test_code_with_addresses_of_this_process_is_not_kept(tmp_path):
    cached = compilation._KernelCache("run", "", tmp_path)
    cached.save_overload("signature", SimpleNamespace(library=SimpleNamespace(has_dynamic_globals=True)))
    assert list(tmp_path.iterdir()) == []


def test_kernels_align_their_stack():
    """Spilt vectors that cross cache lines cost a third, by the address of the stack that a process happens to have."""

    def entry(job, worker):
        pass

    dispatcher = compilation.kept(entry, "entry", no_cpython_wrapper=True, pipeline_class=compilation.KernelCompiler)
    dispatcher._cache = NullCache()
    dispatcher.compile((types.int64, types.int64))
    (text,) = dispatcher.inspect_llvm().values()
    assert "alignstack=64" in text


def test_python_threads_compile_a_kernel_once(monkeypatch):
    compiled, barrier = [], threading.Barrier(4)

    def compile_slowly(self, variant, arrays):
        compiled.append(variant)
        time.sleep(0.05)
        return 0, None

    monkeypatch.setattr(Kernel, "_compile", compile_slowly)
    kernel, tables = Kernel(lambda job, worker: None, "nothing"), [table(np.zeros(1))]

    def ask():
        barrier.wait()
        return kernel.function((1,), tables)

    with ThreadPoolExecutor(4) as pool:
        results = [job.result() for job in [pool.submit(ask) for _ in range(4)]]
    assert compiled == [(1,)]
    assert results == [(0, None)] * 4


def test_without_a_compiler_the_remedy_is_named():
    code = "import numpy as np, fastclstm; fastclstm.conv2d(np.ones((1, 4, 4, 1)), np.ones((3, 3, 1, 1)), engine='cpu')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT,
                          env=os.environ | {"NUMBA_DISABLE_JIT": "1"})  # fmt: skip
    assert "RuntimeError: fastclstm: NUMBA_DISABLE_JIT=1" in done.stderr, done.stderr


def test_kernels_of_different_processes_keep_their_own_functions(tmp_path):
    """Each is the first that its process compiles, so Numba gives their functions the same numbers."""
    code = """
        from numba import types
        from fastclstm.engines.cpu.compilation import KernelCompiler, inline, kept

        def kernel(addend):
            @inline
            def long(x):  # too long to become a part of what calls it
                for _ in range(x):
                    LINES
                return x

            def entry(x):
                return long(x) + 2 * long(x + 1) + 3 * long(x + 2)

            dispatcher = kept(entry, "sum", str(addend), pipeline_class=KernelCompiler)
            dispatcher.compile((types.int64,))
            return dispatcher(5)

        print(json.dumps([kernel(addend) for addend in ADDENDS]))
    """
    lines = ["x = (x + addend) * 3 % 1009", "x ^= x // 5 + addend"] * 20
    code = code.replace("LINES", ("\n" + 20 * " ").join(lines))
    apart = [run(code.replace("ADDENDS", f"[{addend}]"), tmp_path) for addend in (1, 2)]
    assert apart[0] != apart[1]
    assert run(code.replace("ADDENDS", "[1, 2]"), tmp_path) == apart[0] + apart[1]
