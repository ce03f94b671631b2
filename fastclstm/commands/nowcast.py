"""What train, forecast and verify do with NetCDF files and Zarr stores: see `fastclstm.adapters.xarray_nowcast`."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fastclstm import __version__, baselines, dispatch
from fastclstm.commands.inputs import check_distinct, check_folder
from fastclstm.commands.networks import forecaster, going_on
from fastclstm.commands.options import check_theme, use_engine
from fastclstm.io.files import replacing
from fastclstm.io.progress import progress_bar, say
from fastclstm.nn.losses import WeightedSum

STEPS_IN, STEPS_OUT, EPOCHS, FILTERS, SCALES, PATCH = 6, 12, 8, 24, 1, 2
EVERY = 3
"""Steps from one window of the training to the next."""
BY_INTENSITY = 5.0
"""How much more a pixel of the heaviest rain weighs than a dry one: most are dry, and blur would pay."""
LOSS = WeightedSum(("mse", "mae"), (1, 2))
"""The squared error alone makes a haze of drizzle where it may rain; the median of that is dry."""
HELD_SHARE = 0.1
LEARNING_RATE, WARMUP_STEPS, CLIP_NORM = 3e-3, 20, 1.0
CHECKPOINT_STEPS = 50

Variable = Annotated[str | None, typer.Option(metavar="NAME", help="Of NetCDF or Zarr: which.", show_default=False)]
Missing = Annotated[
    float | None, typer.Option(metavar="VALUE", help="Stands for what is missing, beside NaN.", show_default=False)
]
Time = Annotated[str | None, typer.Option(metavar="DIM", help="Of NetCDF: dim of time.", show_default=False)]
Space = Annotated[
    tuple[str, str] | None, typer.Option(metavar="ROWS COLUMNS", help="Of NetCDF: dims of space.", show_default=False)
]
Thresholds = Annotated[
    list[float] | None,
    typer.Option("--threshold", metavar="VALUE", help="Of an event; as often as wanted.", show_default=False),
]
Window = Annotated[int, typer.Option(min=1, metavar="PIXELS", help="Side of the windows of FSS.")]
Flow = Annotated[
    str | None, typer.Option(help="Optical flow: own or pysteps (default: where it is).", show_default=False)
]


@dataclass
class Options:
    """Of a training on frames from files."""

    variable: str | None
    missing: float | None
    time: str | None
    space: tuple[str, str] | None
    transform: str
    offset: float | None
    thresholds: Sequence[float] | None
    window: int
    flow: str | None
    epochs: int
    minutes: float | None
    steps_in: int
    steps_out: int
    filters: int
    scales: int
    patch: int
    batch: int
    every: int
    seed: int
    restart: bool
    engine: str | None
    theme: str
    quiet: bool


def train(sources: Sequence[Path], out: Path, options: Options) -> None:
    """Train on frames from files, verify on the last of their time, and write to the folder `out` what came of it.

    That is ``checkpoint.safetensors``, ``weights.safetensors``, ``history.csv`` and ``.json``, ``scores.csv`` and, with
    matplotlib, ``verification.png``.

    Raises
    ------
    ValueError, TypeError
        Files that do not fit together or hold too little; a checkpoint of another training.
    ImportError
        xarray, or what reads the files, is missing.
    OSError
        A file cannot be read or written.
    """
    _need_xarray("train", sources)
    from fastclstm.adapters import xarray_nowcast as nowcasts
    from fastclstm.adapters.xarray import Windows
    from fastclstm.adapters.xarray_axes import Axes
    from fastclstm.adapters.xarray_files import open_frames
    from fastclstm.nn.optimizers import Adam
    from fastclstm.nn.schedules import CosineDecay

    op = "train"
    dispatch.check_engine(options.engine)
    check_theme(op, options.theme)
    _check_flow(options.flow)
    check_folder(op, out)
    frames, _ = open_frames(op, sources, options.variable, missing=options.missing, time=options.time,
                            space=options.space)  # fmt: skip
    axes = Axes.of(op, frames, options.time, options.space)
    T, steps = options.steps_in, options.steps_out
    parts = nowcasts.periods(op, frames, axes, T + steps, HELD_SHARE)
    side = options.patch * 2 ** (options.scales - 1)
    info = nowcasts.describe_frames(
        op, parts["train"], axes, steps_in=T, steps_out=steps, kind=options.transform, offset=options.offset,
        multiple=(side, side), thresholds=options.thresholds or None,
    )  # fmt: skip
    H, W = (-(-frames.sizes[dim] // side) * side for dim in (axes.y, axes.x))
    channels = 1 if axes.channel is None else frames.sizes[axes.channel]
    model = forecaster((H, W, channels), options.filters, options.scales, options.patch, options.seed, options.engine,
                       kernel_size=3, head_activation="linear")  # fmt: skip
    cut = partial(Windows, length=T, steps=steps, time=axes.time, space=(axes.y, axes.x), batch_size=options.batch)
    weighed = partial(cut, missing=info.missing, multiple=info.multiple, weigh=nowcasts.weights_of(info, BY_INTENSITY))
    transformed = {name: part.copy(data=info.transform(part.data)) for name, part in parts.items()}
    training = nowcasts.Changes(weighed(transformed["train"], every=options.every, seed=options.seed))
    validation = nowcasts.Changes(weighed(transformed["validation"], every=options.every))
    cut(parts["test"])  # not after the training, should a gap be in the way
    nowcast = nowcasts.Nowcast(model, info)
    nowcast.check(parts["test"])

    if not _can_draw():
        print("no pictures: matplotlib is missing; pip install 'fastclstm[viz]'")
    out.mkdir(parents=True, exist_ok=True)
    _tell_frames(frames, axes, info, parts)
    print(f"EncoderForecaster of {options.scales} scale(s), {options.filters} filters, patches of {options.patch}: "
          f"{model.num_parameters:,} parameters; {T} frames in, {steps} out")  # fmt: skip
    checkpoint = out / "checkpoint.safetensors"
    rate: Any = LEARNING_RATE / 2
    if options.minutes is None:
        decay = max(1, options.epochs * len(training) - WARMUP_STEPS)
        rate = CosineDecay(LEARNING_RATE, decay, warmup_steps=WARMUP_STEPS)

    def tell(history: Any) -> None:
        last = {name: values[-1] for name, values in history.items()}
        say(f"epoch {history.epochs:<4} {sum(history['seconds']):>7.0f} s   loss {last['loss']:.5f}   of the "
            f"validation {last['val_loss']:.5f}")  # fmt: skip

    with going_on(checkpoint, options.restart):
        history = model.fit(
            training, loss=LOSS, optimizer=Adam(rate, clip_norm=CLIP_NORM),
            epochs=options.epochs if options.minutes is None else 10**9,
            time_limit=None if options.minutes is None else 60 * options.minutes,
            validation_data=validation, seed=options.seed, checkpoint=checkpoint, checkpoint_every=CHECKPOINT_STEPS,
            resume=not options.restart, callbacks=tell, quiet=True if options.quiet else None,
        )  # fmt: skip
    nowcast.save(out / "weights.safetensors")
    history.save(out / "history.csv")
    history.save(out / "history.json")
    _verify(nowcast, parts["test"], out, options.thresholds, options.window, options.flow, options.batch, options.theme,
            options.quiet, None)  # fmt: skip
    print(f"to go on: python -m fastclstm forecast NEWEST.nc --steps {steps} --weights {out / 'weights.safetensors'} "
          f"--out FORECAST.nc")  # fmt: skip


def forecast(
    sources: Sequence[Path], weights: Path, target: Path, *, steps: int | None, variable: str | None,
    missing: float | None, engine: str | None, plot: Path | None, theme: str,
) -> str:  # fmt: skip
    """Write to a file the frames that follow those of files, and return what was written, for people.

    Raises
    ------
    ValueError, TypeError, ImportError, OSError
        As `train`; weights of something else.
    """
    op = "forecast"
    _need_xarray(op, sources)
    from fastclstm.adapters.xarray_files import check_target, open_frames, write_frames
    from fastclstm.adapters.xarray_nowcast import Nowcast

    check_distinct(op, (*sources, weights), (target, plot))
    check_target(op, target)
    _check_plot(op, plot)
    nowcast = Nowcast.load(weights)
    use_engine(nowcast.network, engine)
    info = nowcast.info
    frames, attrs = open_frames(op, sources, variable or info.variable, missing=missing, usual=info.dims)
    made = nowcast.forecast(frames, steps)
    write_frames(target, made, f"fastclstm {__version__}: forecast with {weights.name}", attrs)
    if plot is not None:
        import matplotlib

        from fastclstm import viz
        from fastclstm.commands.nowcast_drawing import draw_forecast

        with matplotlib.rc_context(viz.theme(theme)):
            draw_forecast(plot, nowcast, frames, made)
    sizes = ", ".join(f"{dim} {n}" for dim, n in made.sizes.items())
    return f"{target}: {made.name} ({sizes})" + (f"; {plot}: drawn" if plot is not None else "")


def verify(
    sources: Sequence[Path], weights: Path, out: Path, *, steps: int | None, variable: str | None,
    missing: float | None, thresholds: Sequence[float] | None, window: int, flow: str | None, batch: int,
    engine: str | None, theme: str, quiet: bool,
) -> None:  # fmt: skip
    """Print the scores of forecasts from frames of files, and write them to the folder `out`.

    Raises
    ------
    ValueError, TypeError, ImportError, OSError
        As `forecast`.
    """
    op = "verify"
    _need_xarray(op, sources)
    from fastclstm.adapters.xarray_files import open_frames
    from fastclstm.adapters.xarray_nowcast import Nowcast

    check_theme(op, theme)
    _check_flow(flow)
    check_folder(op, out)
    nowcast = Nowcast.load(weights)
    use_engine(nowcast.network, engine)
    info = nowcast.info
    frames, _ = open_frames(op, sources, variable or info.variable, missing=missing, usual=info.dims)
    nowcast.check(frames)
    _verify(nowcast, frames, out, thresholds, window, flow, batch, theme, quiet, steps)


def _verify(
    nowcast: Any, frames: Any, out: Path, thresholds: Sequence[float] | None, window: int, flow: str | None, batch: int,
    theme: str, quiet: bool, steps: int | None,
) -> None:  # fmt: skip
    """Print the scores by lead time, and write and draw them."""
    started = time.perf_counter()
    with progress_bar(unit=" batch", quiet=quiet or None) as bar:

        def watch(done: int, of: int) -> None:
            bar.total = of
            bar.update()

        table, shown = nowcast.verify(frames, steps=steps, thresholds=thresholds or None, scale=window, flow=flow,
                                      batch_size=batch, watch=watch)  # fmt: skip
    leads = nowcast.leads(frames, len(shown["observed"]))
    units, times = nowcast.info.units, _ends(frames, nowcast.axes(frames))
    kind = {"own": "Lucas–Kanade", "pysteps": "pysteps"}[flow or baselines.ENGINES[baselines.has_pysteps()]]
    print(
        f"\n{table.forecasts} forecasts{times}, in {time.perf_counter() - started:.0f} s; flow: optical flow ({kind}), "
        f"last: persistence;\nFSS of windows of {window} pixels; errors in {units or 'the units of the data'}\n"
    )
    print(table.table(leads, units))
    out.mkdir(parents=True, exist_ok=True)
    table.save(out / "scores.csv", leads)
    if _can_draw():
        import matplotlib

        from fastclstm import viz
        from fastclstm.commands.nowcast_drawing import draw_verification

        with replacing(out / "verification.png") as new, matplotlib.rc_context(viz.theme(theme)):
            draw_verification(new, table, leads, nowcast, frames, shown)
    print(f"\nwritten to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def _tell_frames(frames: Any, axes: Any, info: Any, parts: Any) -> None:
    from fastclstm.adapters.xarray_nowcast import told_step

    H, W = frames.sizes[axes.y], frames.sizes[axes.x]
    step = "" if info.step is None else f", one each {told_step(info.step, frames, axes)}"
    where = "" if getattr(frames.data, "chunks", None) is None else "; read from the files batch by batch"
    print(f"{info.variable} ({info.units or 'no units'}): {frames.sizes[axes.time]} frames of {H}×{W} pixels{step}"
          f"{_ends(frames, axes)}{where}")  # fmt: skip
    counts = {name: part.sizes[axes.time] for name, part in parts.items()}
    t = info.transform
    how = {"log": f"ln(1 + v / {t.offset:g})", "linear": "linear", "none": "none"}[t.kind]
    print(
        f"{counts['train']} to train on, {counts['validation']} after them for validation, the last {counts['test']} "
        f"to verify; transform: {how}" + ("" if t.kind == "none" else f", {t.low:g} to {t.high:g} become 0 to 1")
    )


def _ends(frames: Any, axes: Any) -> str:
    times = frames.coords.get(axes.time)
    return "" if times is None else f", {_told_time(times.values[0])} to {_told_time(times.values[-1])}"


def _told_time(value: Any) -> str:
    return str(value)[:16] if getattr(value, "dtype", None) is not None and value.dtype.kind == "M" else str(value)


def _can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _check_flow(flow: str | None) -> None:
    if flow is not None and flow not in baselines.ENGINES:
        raise ValueError(f"--flow must be one of {', '.join(baselines.ENGINES)}, got {flow!r}")
    if flow == "pysteps" and not baselines.has_pysteps():
        raise ImportError("--flow pysteps: pysteps, or OpenCV, which it needs, is not installed; leave --flow out")


def _check_plot(op: str, plot: Path | None) -> None:
    if plot is None:
        return
    if plot.suffix.lower() not in (".png", ".gif"):
        raise ValueError(f"{op}: the suffix of --plot must be one of '.png', '.gif', got {plot.suffix!r}")
    for module in ("matplotlib", "PIL"):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"{op}: --plot needs {module}, which is not installed; pip install 'fastclstm[viz]'")


def _need_xarray(op: str, sources: Sequence[Path]) -> None:
    for package in ("xarray", "dask"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{op}: {sources[0]} is read by xarray and Dask, but {package} is not installed; pip "
                              f"install 'fastclstm[nowcast]'")  # fmt: skip
