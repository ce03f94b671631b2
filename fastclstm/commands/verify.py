"""Scores of a network's forecasts by lead time, beside those of persistence and of optical flow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastclstm.commands import nowcast
from fastclstm.commands.nowcast import Flow, Missing, Thresholds, Variable, Window
from fastclstm.commands.options import SETTINGS, Engine, Quiet, Theme, Threads, Weights, set_threads

app = typer.Typer(**SETTINGS)


@app.command("verify")
def command(
    sources: Annotated[list[Path], typer.Argument(metavar="INPUT", help="NetCDF or Zarr: files, a folder, a pattern.")],
    weights: Weights,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results.")] = Path("fastclstm-verify"),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Lead times.  [default: as many as in training]", show_default=False)
    ] = None,
    variable: Variable = None,
    missing: Missing = None,
    threshold: Thresholds = None,
    window: Window = 9,
    flow: Flow = None,
    batch: Annotated[int, typer.Option(min=1, help="Forecasts at once.")] = 8,
    engine: Engine = None,
    threads: Threads = None,
    theme: Theme = "dark",
    quiet: Quiet = False,
) -> None:
    """Score the forecasts of a saved network against observations.

    CSI, POD, FAR and FSS at thresholds, squared and absolute error and SSIM, by lead time, beside persistence and
    optical flow on the same pixels. A table is printed; scores.csv and, with matplotlib, verification.png go to --out.
    """
    set_threads(threads)
    nowcast.verify(
        sources, weights, out, steps=steps, variable=variable, missing=missing, thresholds=threshold, window=window,
        flow=flow, batch=batch, engine=engine, theme=theme, quiet=quiet,
    )  # fmt: skip
