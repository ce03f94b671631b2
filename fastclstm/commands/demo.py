"""The main job on real input: moving digits through ConvLSTM2D and MaxPooling3D, checked, timed and drawn."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer

import fastclstm
from fastclstm.commands.options import SETTINGS, Theme, Threads, check_theme, set_threads
from fastclstm.datasets import moving_digits
from fastclstm.dispatch import ENGINES
from fastclstm.io.files import replacing
from fastclstm.layers import ConvLSTM2D, MaxPooling3D
from fastclstm.spec import choice

SIZE, KERNEL, POOL = 64, 3, (2, 2, 2)
REPEATS = 5
FORMATS = (".png", ".gif")
Net = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From frames to (hidden maps, pooled maps)."""

app = typer.Typer(**SETTINGS)


@app.command("demo")
def command(
    batch: Annotated[int, typer.Option(min=1, help="Films at once.")] = 4,
    steps: Annotated[int, typer.Option(min=2, help="Frames of each film.")] = 10,
    filters: Annotated[int, typer.Option(min=1, help="Hidden channels.")] = 32,
    engine: Annotated[str, typer.Option(help="cpu, cuda, reference or both: cpu and reference.")] = "both",
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Of the films and the weights.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw frames and hidden maps: .png or .gif.", show_default=False)
    ] = None,
    theme: Theme = "dark",
) -> None:
    """Check and time the layers on a film of digits.

    Handwritten digits glide and bounce over frames of 64×64 pixels and run through ConvLSTM2D and MaxPooling3D, on the
    reference engine (plain NumPy) and on the cpu engine, compared with the reference in float64.
    """
    set_threads(threads)
    run(batch, steps, filters, engine, seed, plot, theme)


def run(batch: int, steps: int, filters: int, engine: str, seed: int, plot: Path | None, theme: str) -> None:
    """Print shapes, errors, times and speeds of the chosen engines; draw the maps to `plot`.

    Raises
    ------
    ValueError
        An unknown engine, a plot that is neither .png nor .gif.
    ImportError
        scikit-learn or, for a plot, matplotlib is missing.
    OSError
        The plot cannot be written.
    """
    choice("demo", "engine", engine, ("both", *ENGINES))
    check_theme("demo", theme)
    if plot is not None:
        _check_plot(plot)
    with replacing(plot) if plot is not None else nullcontext() as drawing:
        frames = moving_digits(batch, steps, SIZE, seed=seed)
        layer = ConvLSTM2D(1, filters, KERNEL, seed=seed)
        print(f"digits in motion        {frames.shape}", flush=True)
        hidden, pooled = _compare(layer, frames, ("reference", "cpu") if engine == "both" else (engine,))
        if plot is not None and drawing is not None:
            import matplotlib

            from fastclstm import viz
            from fastclstm.commands.drawing import draw_gif, draw_png

            draw = draw_gif if plot.suffix.lower() == ".gif" else draw_png
            with matplotlib.rc_context(viz.theme(theme)):
                draw(drawing, frames[0, ..., 0], hidden[0], pooled[0], POOL[0])
    if plot is not None:
        print(f"\n{plot}: drawn")


def _check_plot(plot: Path) -> None:
    choice("demo", "the suffix of --plot", plot.suffix.lower(), FORMATS)
    for module in ("matplotlib", "PIL"):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"demo: --plot needs {module}, which is not installed; pip install 'fastclstm[viz]'")


def _net(layer: ConvLSTM2D, engine: str, dtype: str = "float32") -> Net:
    """Return ConvLSTM2D with the layer's parameters, then MaxPooling3D, on an engine."""
    twin = ConvLSTM2D(layer.in_channels, layer.out_channels, layer.kernel_size, engine=engine, dtype=dtype)
    twin.set_parameters(layer.parameters)
    pool = MaxPooling3D(POOL, engine=engine)

    def net(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hidden = twin(frames)
        return hidden, pool(hidden)

    return net


def _compare(layer: ConvLSTM2D, frames: np.ndarray, engines: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Print a line of figures for each engine; return the maps of the reference in float64.

    The reference comes last: the threads of NumPy's matrix products spin on after each of them, for how long depends on
    the library, and would take processors from whatever is timed next.
    """
    from fastclstm.engines.cpu.peak import fma_peak_gflops

    first, outputs, times = {}, {}, {}

    def measure(name: str) -> None:
        net = _net(layer, name)
        outputs[name], first[name] = _timed(net, frames)
        times[name] = [_timed(net, frames)[1] for _ in range(REPEATS)]

    if engines[-1] != "reference":
        measure(engines[-1])
    threads = fastclstm.get_num_threads()
    peak = max(fma_peak_gflops(threads) for _ in range(REPEATS))
    if engines[0] == "reference":
        measure("reference")
    oracle = _net(layer, "reference", "float64")(frames)

    B, T, HO, WO, F = oracle[0].shape
    print(f"ConvLSTM2D(1, {f'{F}, {KERNEL})':<9} {oracle[0].shape}")
    print(f"MaxPooling3D({POOL}) {oracle[1].shape}\n")
    gflop = 2e-9 * B * T * HO * WO * KERNEL**2 * (1 + F) * 4 * F
    baseline = median(times[engines[0]])
    print(f"{'engine':<11}{'first call':>11}{'median of ' + str(REPEATS):>14}{'speed-up':>10}{'GFLOP/s':>10}"
          f"{'of peak':>9}{'max error':>12}")  # fmt: skip
    for name in engines:
        seconds = median(times[name])
        error = max(float(np.abs(y - exact).max()) for y, exact in zip(outputs[name], oracle, strict=True))
        print(f"{name:<11}{first[name] * 1e3:>8.0f} ms{seconds * 1e3:>11.1f} ms{baseline / seconds:>9.1f}×"
              f"{gflop / seconds:>10.1f}{gflop / seconds / peak:>9.1%}{error:>12.1e}")  # fmt: skip
    print(
        f"\nfirst call: with compilation, unless the kernels are in the cache\n"
        f"GFLOP/s:    of the convolutions, {gflop:.3g} GFLOP\n"
        f"peak:       {peak:.0f} GFLOP/s of float32 FMA, the best measured, threads: {threads}\n"
        f"max error:  against the reference in float64"
    )
    return oracle


def _timed(net: Net, frames: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    start = time.perf_counter()
    outputs = net(frames)
    return outputs, time.perf_counter() - start
