"""The frames that follow those of a file, by a network that foretells."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fastclstm.commands import nowcast
from fastclstm.commands.inputs import check_array_target, check_distinct, is_array_file, open_sequences, takes_sequences
from fastclstm.commands.nowcast import Missing, Variable
from fastclstm.commands.options import (
    SETTINGS,
    Engine,
    Quiet,
    Theme,
    Threads,
    Weights,
    check_theme,
    set_threads,
    use_engine,
)
from fastclstm.io.files import replacing
from fastclstm.io.progress import progress_bar
from fastclstm.layers.conv_recurrent import ConvRecurrent
from fastclstm.models import load
from fastclstm.models.roll_out import roll_out
from fastclstm.nn.names import with_article

STEPS = 10

app = typer.Typer(**SETTINGS)


@app.command("forecast")
def command(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT",
            help="NetCDF or Zarr: files, a folder, a pattern. Or .npy: (T, H, W[, C]) or (B, T, H, W, C).",
        ),
    ],
    weights: Weights,
    out: Annotated[Path, typer.Option(metavar="OUT", help="Where the frames go: .nc or .zarr, or .npy.")],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Frames to make.  [default: 10; of NetCDF as many as in training]")
    ] = None,
    variable: Variable = None,
    missing: Missing = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of NetCDF: draw the frames: .png or .gif.", show_default=False)
    ] = None,
    scale: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Values that are 0 and 1 to the network; see train.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    engine: Engine = None,
    threads: Threads = None,
    theme: Theme = "dark",
    quiet: Quiet = False,
) -> None:
    """Make the frames that follow, by a saved network.

    The network is what train wrote, an EncoderForecaster or MultiscaleForecaster, or any other that returns the next
    frame, of all steps or of the last: then a frame made is appended to those before it, and the last T of them give
    the next.

    Of NetCDF and Zarr the last frames go in, and what follows them comes out with units, coordinates and attributes;
    the weights know, from train, variable, transform and step of time.
    """
    set_threads(threads)
    check_theme("forecast", theme)
    if len(sources) > 1 or not is_array_file(sources[0]):
        if scale is not None:
            raise ValueError("forecast: --scale is for .npy; the weights know the scale of NetCDF")
        told = nowcast.forecast(sources, weights, out, steps=steps, variable=variable, missing=missing, engine=engine,
                                plot=plot, theme=theme)  # fmt: skip
        if not quiet:
            print(told)
        return
    if wrong := [name for name, given in (("variable", variable), ("missing", missing), ("plot", plot)) if given]:
        raise ValueError(f"forecast: --{wrong[0]} is for NetCDF and Zarr, but {sources[0]} is an array; leave it out")
    shape = forecast_file(
        sources[0], weights, out, steps=steps or STEPS, scale=scale, batch=batch, engine=engine, quiet=quiet
    )
    if not quiet:
        print(f"{out}: {shape}")


def forecast_file(
    source: Path, weights: Path, target: Path, *, steps: int, scale: tuple[float, float] | None = None,
    batch: int = 8, engine: str | None = None, quiet: bool = True,
) -> tuple[int, ...]:  # fmt: skip
    """Write to a ``.npy`` file the frames that follow those of another, and return their shape.

    Parameters
    ----------
    source : path of an array (T, H, W), (T, H, W, C) or (B, T, H, W, C)
        With channels-first layers C stands before H. Any real dtype.
    weights : path
        What the network's `save` wrote.
    target : path
        Written as (steps, H, W, C), after a batch axis where the input has one.
    steps : int
        Frames to make.
    scale : (low, high), optional
        The values that are 0 and 1 to the network. None: the network takes the values as they are.
    batch : int
        Sequences computed at once.
    engine : str, optional
        Instead of the one the layers were saved with.
    quiet : bool
        Show no progress.

    Raises
    ------
    ValueError, TypeError
        A file that is not what it should be, a network that foretells no frames, an output that is an input too.
    OSError
        A file that cannot be read or written.
    """
    check_distinct("forecast", (source, weights), (target,))
    check_array_target("forecast", target)
    low, high = scale or (0.0, 1.0)
    if not low < high:
        raise ValueError(f"forecast: of --scale LOW HIGH, LOW must be the smaller, got {low:g} {high:g}")
    network = load(weights)
    if isinstance(network, ConvRecurrent):
        network = load(weights, time_major=False, stateful=False, return_state=False)
    use_engine(network, engine)
    if not takes_sequences(network):
        raise ValueError(f"forecast: {weights} holds {with_article(type(network))} without a ConvLSTM2D or its like, "
                         f"which foretells no frames")  # fmt: skip
    x, batched = open_sequences("forecast", source, network)
    made = []
    with replacing(target) as new, progress_bar(total=len(x), unit=" sequence", quiet=quiet) as progress:
        for start in range(0, max(len(x), 1), batch):
            frames = x[start : start + batch]
            if scale is not None:
                frames = np.subtract(frames, low, dtype=np.float64) / (high - low)
            made.append(roll_out(network, frames, steps))
            progress.update(len(frames))
        film = np.concatenate(made)
        if scale is not None:
            film = (film * np.float64(high - low) + low).astype(film.dtype)
        film = film if batched else film[0]
        with new.open("wb") as file:
            np.save(file, film)
    return film.shape
