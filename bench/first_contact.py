"""The first half hour on a GPU in one command: python -m bench.first_contact [--part PART ...] [--out FOLDER].

Parts, in their order, each under ten minutes: "smoke" (versions, numbers of every algorithm and tile against float64,
bits again and again), "conformance" (the tests, on the GPU), "sanitizer" (compute-sanitizer's four tools), "bench"
(against PyTorch). A step that fails or hangs is ended, written down, and the next one runs. FOLDER gets PART.log and
PART.json; the exit status is the number of steps that failed. --emulated runs the checks of numbers on the tests'
emulator, to try them without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from fastclstm import functional
from fastclstm.engines import remembered
from fastclstm.engines.cuda import choice, devices, persistent, product, recorded, weight_gradient, wgmma
from fastclstm.engines.cuda.device import Device
from fastclstm.spec import ConvSpec

ROOT = Path(__file__).parents[1]
PART_SECONDS = 570
"""That a part takes at most."""
TOLERANCE = {"simt": 4e-6, "float32": 8e-6, "tf32": 4e-3, "bfloat16": 3e-2, "float16": 4e-3}
"""Largest difference from float64, in units of the largest value."""
TOLERANCE_BACK = {"simt": 1e-5, "float32": 1e-5, "tf32": 4e-3, "bfloat16": 4e-2, "float16": 4e-3}

# Steps, each a process ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A command, the seconds that it may take, and variables of its environment."""

    name: str
    command: list[str]
    seconds: int
    variables: dict[str, str] = field(default_factory=dict)


def parts(out: Path) -> dict[str, list[Step]]:
    """Return the steps of each part."""
    python = [sys.executable]
    check = [*python, "-m", "bench.first_contact", "--check"]
    parallel = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    tests = [*python, "-m", "pytest", "-q", "--engine", "cuda", "--tb=short", "-p", "no:cacheprovider"]
    sanitizer = ["compute-sanitizer", "--print-limit", "20", "--error-exitcode", "9", "--tool"]
    timed = [*python, "-m", "bench.gpu", "--no-compile", "--rounds", "3"]
    once = "--repeat", "1", "--algorithms"
    no_wgmma = {wgmma.VARIABLE: "0"}

    def files(*names: str) -> list[str]:
        return [f"tests/test_{name}.py" for name in names]

    return {
        "smoke": [
            Step("the GPU", ["nvidia-smi"], 20),
            Step("fastclstm info", [*python, "-m", "fastclstm", "info"], 60),
            Step("numbers", [*check, "numbers"], 150),
            Step("all steps in one launch", [*check, "persistent"], 150),
            Step("tiles", [*check, "tiles"], 240),
        ],
        "conformance": [
            Step("written for a GPU", [*tests, *files("cuda_gpu", "cuda_wgmma"), "-k", "gpu or real"], 120),
            Step("every engine's", [*tests, *parallel, *files("engines"), "-k", "cuda"], 200),
            Step("kernels", [*tests, *parallel, *files("cuda_conv2d", "cuda_convlstm2d", "cuda_backward",
                 "cuda_max_pool3d", "cuda_persistent", "cuda_recorded", "cuda_views", "layers_cuda")], 300),
        ],
        "sanitizer": [
            Step("memcheck", [*sanitizer, "memcheck", *check, "numbers"], 170),
            Step("initcheck", [*sanitizer, "initcheck", *check, "numbers"], 110),
            Step("synccheck", [*sanitizer, "synccheck", *check, "tiles", *once, "bfloat16"], 120),
            Step("racecheck", [*sanitizer, "racecheck", *check, "tiles", *once, "float32"], 170),
        ],
        "bench": [
            Step("cases", [*timed, "--cases", "mmnist", "deep", "--training", "--out", str(out / "bench.json")], 300),
            Step("mma.sync alone", [*timed, "--cases", "deep", "--precisions", "float32", "bfloat16", "--out",
                                    str(out / "bench-mma.json")], 90, no_wgmma),
            Step("large", [*timed, "--cases", "large", "shi", "--out", str(out / "bench-large.json")], 180),
        ],
    }  # fmt: skip


def run_part(name: str, steps: list[Step], out: Path, seconds: float = PART_SECONDS) -> int:
    """Run the steps of a part, as long as it has time; return how many failed."""
    end, found = time.monotonic() + seconds, []
    with (out / f"{name}.log").open("w") as log:
        for step in steps:
            limit = min(step.seconds, end - time.monotonic())
            log.write(f"\n=== {step.name}: {' '.join(step.command)}\n")
            log.flush()
            started = time.monotonic()
            status = "no time left" if limit < 1 else _run(step, limit, log)
            found.append({"step": step.name, "status": status, "seconds": round(time.monotonic() - started, 1)})
            print(f"{name}: {step.name}: {status}, {found[-1]['seconds']} s", flush=True)
            (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return sum(one["status"] != "passed" for one in found)


def _run(step: Step, limit: float, log: Any) -> str:
    """Run one step into the log, and end it with all its processes where it takes too long; say how it went."""
    start = log.tell()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | step.variables
    try:
        process = subprocess.Popen(step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True)  # fmt: skip
    except OSError as error:
        return f"not started: {error}"
    try:
        code = process.wait(limit)
        status = "passed" if code == 0 else f"failed with {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        status = f"not done after {limit:.0f} s"
    log.seek(0, os.SEEK_END)
    text = Path(log.name).read_bytes()[start:].decode(errors="replace")
    print("\n".join(text.splitlines()[-40 if status != "passed" else -12 :]), flush=True)
    return status


# Checks of numbers --------------------------------------------------------------------------------------------------


class Checks:
    """Prints what is right and what is not, and counts the latter."""

    def __init__(self, algorithms: list[str], repeat: int):
        self.algorithms, self.repeat, self.failed = algorithms, repeat, 0

    def say(self, right: Any, what: str) -> None:
        """Tell of one thing."""
        self.failed += not right
        print("ok  " if right else "FAIL", what, flush=True)

    def near(self, found: np.ndarray, exact: np.ndarray, most: float, what: str) -> None:
        """Tell whether an array is near another one."""
        error = float(np.abs(found - exact).max() / np.abs(exact).max())
        self.say(error <= most, f"{what}: error {error:.1e}")

    @contextlib.contextmanager
    def each(self, what: str) -> Iterator[None]:
        """Count what is raised inside as a failure."""
        try:
            yield
        except Exception as error:  # the others are of interest, too
            self.say(False, f"{what}: {type(error).__name__}: {str(error)[:400]}")

    # The checks

    def numbers(self, device: Device) -> None:
        """Every operation in every algorithm, there and back."""
        for algorithm in self.algorithms:
            with self.each(f"conv2d {algorithm}"):
                x, kernel = _normal(2, 9, 11, 5), _normal(3, 3, 5, 7)
                exact = functional.conv2d(*_double(x, kernel), engine="reference")
                self.near(functional.conv2d(x, kernel, engine="cuda", algorithm=algorithm), exact,
                          TOLERANCE[algorithm], f"conv2d {algorithm}")  # fmt: skip
            with self.each(f"convlstm2d {algorithm}"):
                self._there_and_back(algorithm, 8, f"convlstm2d {algorithm}")
        with self.each("max_pool3d"):
            x = _normal(2, 4, 6, 8, 4)
            (y, back), (exact, pull) = (functional.max_pool3d_vjp(x, engine=e) for e in ("cuda", "reference"))
            same = np.array_equal(y, exact) and np.array_equal(back(y)["x"], pull(y)["x"])
            self.say(same, "max_pool3d")

    def tiles(self, device: Device) -> None:
        """Every tile of every kind of product, and of a kernel's gradient: numbers, and the same bits each time."""
        for algorithm in self.algorithms:
            kind = product.KINDS[algorithm]
            tilings = product.tilings(kind, 4)
            if device.architecture == product.WARPGROUPS:
                tilings += product.halo_tilings(kind, (1, 1), (product.Window(9, (2, 2)),))
                tilings += product.warpgroup_tilings(kind)
            gradients = weight_gradient.gradient_tilings(product.backward_kind(kind), 4)
            for n, tiling in enumerate(tilings):
                units = "halo" if tiling.frame else "wgmma" if tiling.on_warpgroups else "mma" if kind else "simt"
                what = f"{units} {algorithm} {tiling.rows}x{tiling.columns}"
                for channels in (24, 5, 256):
                    with self.each(f"conv2d {what}, {channels} channels"):
                        self._convolve(device, tiling, algorithm, channels, what)
                with self.each(f"steps {what}"), _chosen(tiling, gradients[n % len(gradients)]):
                    self._there_and_back(algorithm, 20, f"steps {what}")

    def _convolve(self, device: Device, tiling: product.Tiling, algorithm: str, channels: int, what: str) -> None:
        x, kernel = _normal(1, 13, 15, channels), _normal(3, 3, channels, tiling.columns + 20, seed=1)
        spec = ConvSpec.infer(x.shape, kernel.shape)
        tiling = product.of_form(tiling, (spec.HO, spec.WO), [product.window(spec)])
        given = device.put(x), device.put(kernel)
        runs = [device.get(product.convolve(spec, tiling, *given, None)) for _ in range(self.repeat)]
        exact = functional.conv2d(*_double(x, kernel), engine="reference")
        self.near(runs[0], exact, TOLERANCE[algorithm], f"conv2d {what}, depth {9 * channels}")
        self.say(all(np.array_equal(run, runs[0]) for run in runs), f"  the same bits {len(runs)} times")

    def _there_and_back(self, algorithm: str, filters: int, what: str) -> None:
        x, kernel = _normal(2, 3, 11, 14, 8), _normal(3, 3, 8, 4 * filters, seed=2) / 6
        recurrent = _normal(3, 3, filters, 4 * filters, seed=3) / 10
        y, back = functional.convlstm2d_vjp(x, kernel, recurrent, engine="cuda", algorithm=algorithm)
        exact, pull = functional.convlstm2d_vjp(*_double(x, kernel, recurrent), engine="reference")
        dy = _normal(*exact.shape, seed=4)
        self.near(y, exact, TOLERANCE[algorithm], what)
        gradients = back(dy)
        for name, gradient in pull(dy.astype(np.float64)).items():
            self.near(gradients[name], gradient, TOLERANCE_BACK[algorithm], f"  gradient of {name}")

    def persistent(self, device: Device) -> None:
        """All steps in one launch have the bits of a launch a step, each time."""
        os.environ[wgmma.VARIABLE] = "0"  # which would take the place of the single launch
        shapes = ((1, 4, 4, 1, 1), (1, 64, 64, 1, 64), (3, 33, 47, 5, 3), (2, 32, 32, 16, 32), (4, 16, 16, 8, 24))
        for algorithm in self.algorithms:
            for B, H, W, C, F in shapes if self.repeat > 1 else shapes[:1]:
                what = f"all steps, {algorithm} {B}x{H}x{W}, {C}->{F}"
                with self.each(what):
                    x, kernel = _normal(B, 20, H, W, C), _normal(3, 3, C, 4 * F, seed=1) / 3
                    given = x, kernel, _normal(3, 3, F, 4 * F, seed=2) / (3 * np.float32(F**0.5))
                    with persistent.forbidden():
                        expected = functional.convlstm2d(*given, engine="cuda", algorithm=algorithm)
                    with mock.patch.object(persistent, "run", wraps=persistent.run) as single:
                        runs = [
                            functional.convlstm2d(*given, engine="cuda", algorithm=algorithm)
                            for _ in range(5 * self.repeat)
                        ]
                    note = "" if single.called else " (a launch a step was chosen: compare nothing)"
                    same = all(np.array_equal(run, expected) for run in runs)
                    self.say(same, f"{what}, {len(runs)} times{note}")


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _double(*arrays: np.ndarray) -> list[np.ndarray]:
    return [array.astype(np.float64) for array in arrays]


@contextlib.contextmanager
def _chosen(tiling: product.Tiling, of_gradient: product.Tiling) -> Iterator[None]:
    """Let products of the tiling's kind be computed by it inside, others by the smallest."""

    def chosen(kind: int, dtype: np.dtype, *_: Any, **where: Any) -> product.Tiling:
        if kind != tiling.kind:
            return product.tilings(kind, dtype.itemsize)[-1]
        return product.of_form(tiling, where["frame"], where["windows"])

    def forget() -> None:
        recorded._plans.clear()
        remembered._remembered.clear()

    forget()
    of_kernel = mock.patch.object(weight_gradient, "gradient_tiling", return_value=of_gradient)
    try:
        with mock.patch.object(choice, "choose", chosen), of_kernel:
            yield
    finally:
        forget()


def check(options: argparse.Namespace) -> int:
    """Run one of the checks; return how many things were wrong."""
    if options.emulated:
        sys.path.insert(0, str(ROOT / "tests"))
        device: Device = importlib.import_module("cuda_emulator").EmulatedDevice(90, 99)
    elif (missing := devices.missing()) is not None:
        print(f"FAIL {missing}")
        return 1
    else:
        device = devices.current()
    print(device, flush=True)
    checks = Checks(options.algorithms, options.repeat)
    run: Callable[[Device], None] = getattr(checks, options.check)
    with devices.using(device):
        run(device)
    print(f"{options.check}: {checks.failed} failures", flush=True)
    return checks.failed


def main(arguments: list[str] | None = None) -> None:
    """Run parts, or one check."""
    parser = argparse.ArgumentParser(prog="python -m bench.first_contact", description=(__doc__ or "").split(":")[0])
    names = list(parts(Path()))
    parser.add_argument("--part", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "bench" / "results" / "first-contact")
    )
    parser.add_argument("--check", choices=["numbers", "tiles", "persistent"], help="one check, in this process")
    parser.add_argument("--algorithms", nargs="+", choices=product.KINDS, default=list(product.KINDS))
    parser.add_argument("--repeat", type=int, default=10, help="how often bits are compared")
    parser.add_argument("--emulated", action="store_true", help="checks on the tests' emulator")
    options = parser.parse_args(arguments)
    if options.check:
        sys.exit(min(check(options), 99))
    options.out.mkdir(parents=True, exist_ok=True)
    failed = sum(run_part(name, parts(options.out.resolve())[name], options.out) for name in options.part)
    sys.exit(min(failed, 99))


if __name__ == "__main__":
    main()
