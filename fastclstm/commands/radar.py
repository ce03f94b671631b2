"""Synthetic radar archives in NetCDF files: see `fastclstm.datasets.synthetic_radar`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastclstm.commands.options import SETTINGS, Quiet
from fastclstm.datasets import synthetic_radar

app = typer.Typer(**SETTINGS)


@app.command("radar")
def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder for a file a day, or one file: .nc or .zarr.")],
    days: Annotated[float, typer.Option(min=0.01, max=36_525, help="Length of the archive.")] = 4,
    size: Annotated[tuple[int, int], typer.Option(metavar="H W", help="Pixels of a frame.")] = (64, 64),
    minutes: Annotated[float, typer.Option(min=0.1, help="Between two frames.")] = 5,
    start: Annotated[str, typer.Option(help="Time of the first frame.")] = "2026-07-01T00:00",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same rain.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Write a synthetic radar archive, to try the others on.

    Cells of rain that drift, grow and decay, in mm h-1, with speckle and a sector that the radar does not see: "rain"
    on (time, y, x), as the CF conventions have it.
    """
    from fastclstm.adapters.xarray_files import check_target, write_frames

    single = out.suffix != ""
    check_target("radar", out if single else out / "day.nc")
    steps = max(1, round(days * 1440 / minutes))
    rain = synthetic_radar(steps, size, minutes=minutes, start=start, seed=seed)
    if single:
        write_frames(out, rain, f"fastclstm radar --seed {seed}")
        parts = {out.name: rain}
    else:
        out.mkdir(parents=True, exist_ok=True)
        parts = {f"rain-{str(day)[:10]}.nc": part for day, part in rain.groupby(rain.time.dt.floor("D"))}
        for name, part in parts.items():
            write_frames(out / name, part, f"fastclstm radar --seed {seed}")
    if not quiet:
        print(f"{out}: {len(parts)} file{'s' * (len(parts) > 1)}, {steps} frames of {size[0]}×{size[1]} pixels")
