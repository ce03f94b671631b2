"""Time convlstm2d and max_pool3d on a GPU against PyTorch, eager and compiled, in interleaved rounds.

Needs a GPU and PyTorch. Every implementation gets the same weights and is checked against PyTorch in float64 before it
is timed. Times are those of CUDA events around many calls, inputs being so many that they do not stay in the L2 cache:
"call" is what a caller waits for, Python and launches included; "graph" is the replay of the same work as a CUDA graph
(of fastclstm: of its time steps, without packing weights). Shares are of the floor, the larger of the operations over
the measured rate of matrix products in that precision and the bytes over the measured bandwidth; beside it stands the
time that a graph of as many empty kernels as there are steps takes. In bfloat16 and float16 PyTorch keeps the cell
state in 16 bits too, fastclstm in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import fastclstm
from bench import cases, cells
from fastclstm import functional
from fastclstm.engines.cuda import devices, recorded

CASES = {
    case.name: case
    for case in (
        *cases.CASES.values(),
        cases.ConvLSTMCase("step", B=8, T=20, H=64, W=64, C=64, F=64, K=3),
        cases.ConvLSTMCase("large", B=16, T=20, H=128, W=128, C=64, F=64, K=3),
        cases.ConvLSTMCase("wide", B=8, T=10, H=64, W=64, C=128, F=256, K=3),
    )
}
LARGEST_ERROR = {"exact": 0.0, "float32": 1e-5, "simt": 1e-5, "tf32": 5e-3, "float16": 5e-3, "bfloat16": 5e-2}
"""‖y - exact‖ / ‖exact‖ that a precision may show before it is timed."""
RATE = {"float32": "float32", "simt": "float32", "tf32": "tf32", "float16": "float16", "bfloat16": "bfloat16"}
"""Whose rate of matrix products is the ceiling. float32 on tensor cores (three tf32 products) may exceed float32's."""
MATRIX, COPIED_BYTES, SHORTEST = 8192, 4 << 30, 0.05
"""Side of the measured matrix product, bytes of the measured copy, seconds that a timed turn lasts at least."""
_PACKAGES = ("numpy", "torch", "triton", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cudnn-cu13")


@dataclass
class Implementation:
    """One way to compute a case: `call` and, where there is one, `graph` take the number of an input."""

    name: str
    precision: str
    call: Callable[[int], Any]
    graph: Callable[[int], Any] | None = None
    keep: list[Any] = field(default_factory=list)
    """What must live as long as the graphs."""
    passes: int = 1
    """How often the operations of the forward pass are done: 3 with the backward pass."""


# What is timed -------------------------------------------------------------------------------------------------------


def ours(inputs: list[Any], weights: dict[str, Any], precision: str) -> Implementation:
    """Return fastclstm in a precision, on PyTorch's tensors and stream."""

    def call(n: int) -> Any:
        return functional.convlstm2d(inputs[n], **weights, algorithm=precision)

    gpu: Any = devices.current()
    keep: list[Any] = []
    replays = []
    for n in range(len(inputs)):
        with _held(gpu, keep):
            call(n)
        replays.append(recorded._plans.popitem()[1])  # the last one made; the next call makes a new one

    def graph(n: int) -> None:
        with gpu.on(_stream()):
            gpu.send(replays[n].graph)

    return Implementation(f"fastclstm {precision}", precision, call, graph, keep)


@contextlib.contextmanager
def _held(gpu: Any, keep: list[Any]) -> Iterator[None]:
    """Keep all memory that is taken inside, so that the graph can be sent again without writing over others'."""
    take = gpu._allocate

    def allocate(size: int) -> Any:
        keep.append(take(size))
        return keep[-1]

    gpu._allocate = allocate
    try:
        yield
    finally:
        del gpu._allocate


def torch_eager(case: cases.ConvLSTMCase, inputs: list[Any], precision: str, split: bool) -> Implementation:
    """Return PyTorch's cuDNN convolutions, channels-last, and the same captured as CUDA graphs."""
    import torch

    module, inputs = _module(case, inputs, precision, split)

    def call(n: int) -> Any:
        with torch.inference_mode(), _flags(precision):
            return module(inputs[n])

    graphs: list[Any] = []
    for n in range(len(inputs)):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call(n)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
            call(n)
        graphs.append(graph)
    name = f"torch {'split ' if split else ''}{precision}"
    return Implementation(name, precision, call, lambda n: graphs[n].replay(), [module, inputs])


def torch_compiled(case: cases.ConvLSTMCase, inputs: list[Any], precision: str) -> Implementation:
    """Return PyTorch compiled with max-autotune, which replays CUDA graphs of its own."""
    import torch

    module, inputs = _module(case, inputs, precision, split=True)
    compiled: Any = torch.compile(module, mode="max-autotune", dynamic=False)

    def call(n: int) -> Any:
        with torch.inference_mode(), _flags(precision):
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(inputs[n])

    return Implementation(f"torch compiled {precision}", precision, call, None, [inputs])


def training(
    case: cases.ConvLSTMCase, inputs: list[Any], weights: dict[str, Any], precisions: list[str]
) -> list[Implementation]:
    """Return forward and backward together: fastclstm and PyTorch's autograd."""
    import torch

    dy = torch.randn(case.B, case.T, case.H, case.W, case.F, device="cuda")
    found = []
    for precision in precisions:

        def vjp(n: int, precision: str = precision) -> Any:
            y, pullback = functional.convlstm2d_vjp(inputs[n], **weights, algorithm=precision)
            return y, pullback(dy)

        module, converted = _module(case, inputs, precision, split=False)
        for parameter in module.parameters():
            parameter.requires_grad_()

        def autograd(n: int, precision: str = precision, module: Any = module, xs: list[Any] = converted) -> Any:
            with _flags(precision):
                x = xs[n].detach().requires_grad_()
                module.zero_grad(set_to_none=True)
                y = module(x)
                y.backward(dy.to(y.dtype))
                return y, x.grad

        found += [
            Implementation(f"fastclstm training {precision}", precision, vjp, passes=3),
            Implementation(f"torch training {precision}", precision, autograd, passes=3),
        ]
    return found


def pooling(case: cases.PoolCase, inputs: list[Any]) -> list[Implementation]:
    """Return max pooling of channels-last arrays: fastclstm, and PyTorch on them and on contiguous ones."""
    import torch

    turned = [x.permute(0, 4, 1, 2, 3) for x in inputs]
    contiguous = [x.contiguous() for x in turned]
    pool = partial(torch.nn.functional.max_pool3d, kernel_size=case.pool_size, stride=case.stride)
    return [
        Implementation("fastclstm", "exact", lambda n: functional.max_pool3d(inputs[n], case.pool_size, case.stride)),
        Implementation("torch channels-last", "exact", lambda n: pool(turned[n]).permute(0, 2, 3, 4, 1)),
        Implementation("torch contiguous", "exact", lambda n: pool(contiguous[n]).permute(0, 2, 3, 4, 1)),
    ]


def _module(case: cases.ConvLSTMCase, inputs: list[Any], precision: str, split: bool) -> tuple[Any, list[Any]]:
    import torch

    dtype = getattr(torch, precision, torch.float32)
    module = cells.torch_module(case, split, channels_last=True).to("cuda", dtype)
    return module, [x.to(dtype) for x in inputs]


@contextlib.contextmanager
def _flags(precision: str) -> Iterator[None]:
    """Let cuDNN and cuBLAS round operands to tf32 only where that is asked for; cuDNN chooses by timing."""
    import torch

    tf32 = precision == "tf32"
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=tf32):
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


def _stream() -> int:
    import torch

    return int(torch.cuda.current_stream().cuda_stream)


# Timing --------------------------------------------------------------------------------------------------------------


def timed(run: Callable[[int], Any], count: int, calls: int) -> float:
    """Return the seconds of a call: CUDA events around `calls` of them, each on the next of `count` inputs."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for n in range(calls):
        run(n % count)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / calls


def calls_of(run: Callable[[int], Any], count: int) -> int:
    """Return how many calls a turn takes to last long enough; warms up."""
    for _ in range(2):
        seconds = timed(run, count, max(3, count))
    return max(3, min(1000, math.ceil(SHORTEST / max(seconds, 1e-7))))


def inputs_of(case: cases.Case) -> list[Any]:
    """Return so many inputs that they are at least twice the L2 cache, and two at least."""
    import torch

    first = torch.from_numpy(case.arrays()["x"]).cuda()
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [first, *(torch.randn_like(first) for _ in range(copies(first.nbytes, cache) - 1))]


def copies(size: int, cache: int) -> int:
    """Return how many inputs of `size` bytes are twice the cache, from 2 to 32."""
    return max(2, min(32, math.ceil(2 * cache / size)))


def _product(a: Any, b: Any, n: int) -> Any:
    return a @ b


def rates() -> dict[str, float]:
    """Measure matrix products of each precision (TFLOP/s) and a copy (TB/s, bytes read and written)."""
    import torch

    found = {}
    for precision in ("float32", "tf32", "float16", "bfloat16"):
        dtype = getattr(torch, precision, torch.float32)
        a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=dtype) for _ in range(2))
        with _flags(precision):
            product = partial(_product, a, b)
            timed(product, 1, 3)
            found[precision] = 2 * MATRIX**3 / timed(product, 1, 10) / 1e12
    source = torch.randn(COPIED_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    timed(lambda n: target.copy_(source), 1, 2)
    found["copy"] = 2 * COPIED_BYTES / timed(lambda n: target.copy_(source), 1, 5) / 1e12
    return found


def replay_seconds(kernels: int) -> float:
    """Measure the replay of a CUDA graph of so many kernels that do next to nothing, one after the other."""
    import torch

    one = torch.zeros(1, device="cuda")
    one.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(kernels):
            one.add_(1)
    timed(lambda n: graph.replay(), 1, 20)
    return timed(lambda n: graph.replay(), 1, 200)


def floor(case: cases.Case, precision: str, measured: dict[str, float]) -> float:
    """Return the seconds that a case takes at least: its operations or its bytes.

    Those of a ConvLSTM are x read, h and c written and read in each step.
    """
    if isinstance(case, cases.PoolCase):
        return case.work * 1e9 / (measured["copy"] * 1e12)
    pixels = case.B * case.T * case.H * case.W
    moved = pixels * (case.C + 4 * case.F) * 4
    return max(case.work * 1e9 / (measured[RATE[precision]] * 1e12), moved / (measured["copy"] * 1e12))


# The run -------------------------------------------------------------------------------------------------------------


Builders = dict[str, Callable[[], Implementation | list[Implementation]]]


def convlstm_builders(case: cases.ConvLSTMCase, inputs: list[Any], options: argparse.Namespace) -> tuple[Any, Builders]:
    """Return the exact result of the first input, and what builds each implementation of a ConvLSTM."""
    import torch

    weights = {name: torch.from_numpy(array).cuda() for name, array in case.arrays().items() if name != "x"}
    module, doubles = _module(case, inputs[:1], "float64", split=False)
    with torch.inference_mode():
        exact = module(doubles[0])
    builders: Builders = {}
    for precision in options.precisions:
        builders[f"fastclstm {precision}"] = partial(ours, inputs, weights, precision)
        if precision != "simt":
            builders[f"torch {precision}"] = partial(torch_eager, case, inputs, precision, False)
            builders[f"torch split {precision}"] = partial(torch_eager, case, inputs, precision, True)
            if options.compile:
                builders[f"torch compiled {precision}"] = partial(torch_compiled, case, inputs, precision)
    if options.training:
        precisions = [precision for precision in options.precisions if precision != "simt"]
        builders["training"] = partial(training, case, inputs, weights, precisions)
    return exact, builders


def pool_builders(case: cases.PoolCase, inputs: list[Any], options: argparse.Namespace) -> tuple[Any, Builders]:
    """Return the exact result of the first input, and what builds each implementation of a pooling."""
    import torch

    x = inputs[0].double().permute(0, 4, 1, 2, 3)
    exact = torch.nn.functional.max_pool3d(x, case.pool_size, case.stride).permute(0, 2, 3, 4, 1)
    return exact, {"pooling": partial(pooling, case, inputs)}


def bench(case: cases.Case, options: argparse.Namespace, measured: dict[str, float]) -> dict[str, Any]:
    """Build, check and time every implementation of one case."""
    inputs = inputs_of(case)
    builders: Builders
    if isinstance(case, cases.PoolCase):
        exact, builders = pool_builders(case, inputs, options)
    else:
        exact, builders = convlstm_builders(case, inputs, options)
    ready: list[Implementation] = []
    left_out: dict[str, str] = {}
    errors: dict[str, float] = {}
    for label, build in builders.items():
        try:
            built = build()
            for one in built if isinstance(built, list) else [built]:
                result = one.call(0)
                result = result[0] if isinstance(result, tuple) else result
                errors[one.name] = float((result.double() - exact).norm() / exact.norm())
                if errors[one.name] <= LARGEST_ERROR[one.precision]:
                    ready.append(one)
                else:  # also NaN
                    left_out[one.name] = f"error {errors[one.name]:.1e}"
        except Exception as reason:  # what cannot run the case must not stop the others
            left_out[label] = f"{type(reason).__name__}: {reason}"[:500]
    runs = {(one.name, "call"): one.call for one in ready}
    runs |= {(one.name, "graph"): one.graph for one in ready if one.graph is not None}
    calls = {key: calls_of(run, len(inputs)) for key, run in runs.items()}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(options.rounds):
        for key, run in runs.items():
            seconds[key].append(timed(run, len(inputs), calls[key]))
    named = {one.name: one for one in ready}
    results = []
    for (name, how), values in seconds.items():
        one, median = named[name], statistics.median(values)
        least = one.passes * floor(case, one.precision, measured)
        results.append({
            "name": name, "how": how, "precision": one.precision, "seconds": values, "median_seconds": median,
            "tflops": one.passes * case.work / 1e3 / median, "share_of_floor": least / median, "error": errors[name],
        })  # fmt: skip
    steps = 1 if isinstance(case, cases.PoolCase) else case.T
    return {"case": case.name, "title": case.title, "inputs": len(inputs), "results": results, "left_out": left_out,
            "empty_replay_seconds": replay_seconds(steps)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run the cases that the command line asks for, print them and write them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n\n")[0])
    default = ["readme", "mmnist", "deep", "shi", "step", "large", "pool_video"]
    parser.add_argument("--cases", nargs="+", choices=CASES, default=default)
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[], help="sizes of the batch instead of the cases' own"
    )
    parser.add_argument("--precisions", nargs="+", choices=RATE, default=["float32", "tf32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--training", action="store_true", help="also forward and backward together")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="the JSON file (bench/results/DATE-GPU.json)")
    options = parser.parse_args(arguments)
    if (missing := devices.missing()) is not None:
        sys.exit(f"bench.gpu: {missing}")
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench.gpu: this PyTorch sees no GPU; install one that is built for CUDA")
    torch.manual_seed(0)
    measured = rates()
    print("measured:", ", ".join(f"{name} {rate:.1f}" for name, rate in measured.items()), "TFLOP/s, TB/s", flush=True)
    runs = []
    today, name = datetime.date.today().isoformat(), torch.cuda.get_device_name(0)
    out = options.out or Path(__file__).parent / "results" / f"{today}-{name.lower().replace(' ', '-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for case in (
        replace(CASES[name], B=size or CASES[name].B) for name in options.cases for size in options.batches or [0]
    ):
        runs.append(bench(case, options, measured))
        _print(runs[-1])
        report = {"date": today, "device": str(devices.current()), "driver": _driver(), "versions": _versions(),
                  "rates": measured, "rounds": options.rounds, "runs": runs}  # fmt: skip
        out.write_text(json.dumps(report, indent=1) + "\n")  # after each case: a lease may end
        torch.cuda.empty_cache()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0], "fastclstm": fastclstm.__version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.setdefault(name, importlib.metadata.version(name))
    return found


def _print(run: dict[str, Any]) -> None:
    print(f"{run['case']} ({run['title']}), {run['inputs']} inputs in turn; a graph of as many empty kernels: "
          f"{run['empty_replay_seconds'] * 1e6:.1f} µs")  # fmt: skip
    for one in sorted(run["results"], key=lambda one: one["median_seconds"]):
        print(f"  {one['name']:28} {one['how']:6} {one['median_seconds'] * 1e3:9.3f} ms {one['tflops']:7.1f} TFLOP/s "
              f"{one['share_of_floor']:6.1%} of the floor, error {one['error']:.1e}", flush=True)  # fmt: skip
    for name, reason in run["left_out"].items():
        print(f"  {name:28} left out: {reason}", flush=True)


if __name__ == "__main__":
    main()
