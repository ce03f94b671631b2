"""Next-frame prediction on films: a small network, compared with what needs no training, drawn, and resumable."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from fastclstm import dispatch
from fastclstm.baselines import extrapolation, persistence
from fastclstm.commands import nowcast
from fastclstm.commands.inputs import check_folder, is_array_file, what_is
from fastclstm.commands.networks import KERNEL, forecaster, going_on
from fastclstm.commands.options import SETTINGS, Engine, Theme, Threads, check_theme, set_threads, tell
from fastclstm.datasets import moving_digits
from fastclstm.io import numpy_files
from fastclstm.io.bounds import shown
from fastclstm.io.files import replacing
from fastclstm.io.progress import say
from fastclstm.layers import Conv2D, ConvLSTM2D, TimeDistributed
from fastclstm.models import Sequential
from fastclstm.models.roll_out import roll_out
from fastclstm.nn import metrics
from fastclstm.nn.losses import WeightedSum
from fastclstm.nn.optimizers import Adam
from fastclstm.nn.schedules import CosineDecay
from fastclstm.training.history import History
from fastclstm.training.trainable import Trainable

SIZE, WINDOW = 24, 11
EPOCHS, STEPS, FILTERS = 10, 10, 16
FILMS, VALIDATION_FILMS, TEST_FILMS = 800, 60, 100
LEARNING_RATE, WARMUP_STEPS, CLIP_NORM = 0.005, 20, 1.0
LOSS = WeightedSum(("mse", "ssim"), (1, 0.1))
"""Mean squared error alone makes blurred forecasts."""
CHECKPOINT_STEPS = 50
HELD_SHARE = 0.1
"""Of a user's films: as many for validation, and as many for the test."""


@dataclass(frozen=True)
class Task:
    """What of a film the network is given, what it is to make, and where in that the next frame is."""

    given: slice
    wanted: slice
    next: int

    @property
    def metrics(self) -> tuple[Callable[[np.ndarray, np.ndarray], float], ...]:
        """The figures of the next frame."""
        at = slice(self.next, self.next + 1 or None)

        def next_mse(prediction: np.ndarray, target: np.ndarray) -> float:
            return metrics.mse(prediction[:, at], target[:, at])

        def next_ssim(prediction: np.ndarray, target: np.ndarray) -> float:
            return metrics.ssim(prediction[:, at], target[:, at])

        return next_mse, next_ssim


Scores = dict[str, dict[str, float]]
"""By method, then by figure."""

app = typer.Typer(**SETTINGS)


@app.command("train")
def command(
    more: Annotated[list[Path] | None, typer.Argument(metavar="FILES", hidden=True)] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILES",
            show_default=False,
            help="NetCDF or Zarr: files, a folder, a pattern. Or films (N, T, H, W[, C]): .npy, or .npz with x, or x "
            "and y.",
        ),
    ] = None,
    variable: nowcast.Variable = None,
    time: nowcast.Time = None,
    space: nowcast.Space = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results.")] = Path("fastclstm-train"),
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the films.  [default: 10; of NetCDF 8]")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Train so long instead.", show_default=False)] = None,
    steps_in: Annotated[
        int | None, typer.Option(min=2, help="Frames that the network is given.  [default: 10; of NetCDF 6]")
    ] = None,
    steps_out: Annotated[
        int | None, typer.Option(min=1, help="Frames to forecast in the end.  [default: 10; of NetCDF 12]")
    ] = None,
    filters: Annotated[int | None, typer.Option(min=1, help="Hidden channels.  [default: 16; of NetCDF 24]")] = None,
    scales: Annotated[
        int | None,
        typer.Option(
            min=1, help="Foretell all frames at once, by an encoder and a forecaster of so many.", show_default=False
        ),
    ] = None,
    patch: Annotated[
        int | None, typer.Option(min=1, help="Side of the patches that it cuts frames into.  [default: 1; of NetCDF 2]")
    ] = None,
    transform: Annotated[
        str, typer.Option(help="Of NetCDF: log (of rain rates), linear, none; auto tells by the units.")
    ] = "auto",
    offset: Annotated[
        float | None, typer.Option(help="Of log(1 + value / offset).  [default: 0.1 mm/h]", show_default=False)
    ] = None,
    missing: nowcast.Missing = None,
    every: Annotated[int, typer.Option(min=1, help="Of NetCDF: steps from one sample to the next.")] = nowcast.EVERY,
    threshold: nowcast.Thresholds = None,
    window: nowcast.Window = 9,
    flow: nowcast.Flow = None,
    batch: Annotated[int, typer.Option(min=1, help="Films a step.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of films, weights and order.")] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Forget the training that DIR holds.")] = False,
    engine: Engine = None,
    threads: Threads = None,
    theme: Theme = "dark",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train a network to foretell the next frame of films.

    With --scales or --patch it foretells all frames that follow.

    Of moving digits, or of your own; and compare it with what needs no training: to repeat the last frame
    (persistence), or to carry it on by optical flow. Interrupted, the same command goes on where it was.

    Of NetCDF or Zarr it foretells all frames at once, is verified on the last tenth of the time, and what it writes
    knows units, transform and step of time: see forecast and verify.
    """
    if epochs is not None and minutes is not None:
        raise typer.BadParameter("give --epochs or --minutes, not both")
    set_threads(threads)
    sources = [*([] if data is None else [data]), *(more or ())]
    if data is None and (more or variable is not None):
        raise typer.BadParameter("give the files by --data FILES")
    if data is not None and (len(sources) > 1 or not is_array_file(data)):
        nowcast.train(sources, out, nowcast.Options(
            variable, missing, time, space, transform, offset, threshold, window, flow,
            epochs or nowcast.EPOCHS, minutes,
            steps_in or nowcast.STEPS_IN, steps_out or nowcast.STEPS_OUT, filters or nowcast.FILTERS,
            scales or nowcast.SCALES, patch or nowcast.PATCH, batch, every, seed, restart, engine, theme,
            quiet,
        ))  # fmt: skip
        return
    if variable is not None:
        raise ValueError(f"train: {data} is an array, without variables; leave --variable out")
    patch = patch or 1
    run(
        data, out, epochs=epochs or EPOCHS, minutes=minutes, steps_in=steps_in or STEPS, steps_out=steps_out or STEPS,
        filters=filters or FILTERS, scales=1 if scales is None and patch > 1 else scales, patch=patch, batch=batch,
        seed=seed, restart=restart, engine=engine, quiet=quiet, theme=theme,
    )  # fmt: skip


@dataclass
class Films:
    """Films (N, T, H, W, C) in [0, 1], of which the first `steps_in` frames are given, and where they come from."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    steps_in: int
    told: str
    scale: tuple[float, float] | None = None
    """The values that are 0 and 1 in them, of a user's."""


def run(
    data: Path | None, out: Path, *, epochs: int, minutes: float | None, steps_in: int, steps_out: int, filters: int,
    scales: int | None, patch: int, batch: int, seed: int, restart: bool, engine: str | None, quiet: bool,
    theme: str,
) -> None:  # fmt: skip
    """Train, or go on with a training, and write to the folder `out` what came of it.

    That is ``checkpoint.safetensors``, ``weights.safetensors``, ``history.csv`` and ``.json``, ``scores.json`` and,
    with matplotlib and Pillow, ``curves.png`` and ``forecast.gif``.

    Raises
    ------
    ValueError, TypeError
        Data that are no films, or too few or too small; a checkpoint of another training.
    ImportError
        Without data: scikit-learn is missing.
    OSError
        A file cannot be read or written.
    """
    dispatch.check_engine(engine)
    check_theme("train", theme)
    check_folder("train", out)
    films = _digits(steps_in, steps_out, seed) if data is None else read_films(data, steps_in, steps_out)
    T, C = films.steps_in, films.train.shape[-1]
    model: Trainable
    if scales is None:
        model = network(C, filters, float(films.train.mean()), seed, engine)
        told, task = (
            f"ConvLSTM2D({C}, {filters}, {KERNEL}) and two convolutions",
            Task(slice(0, T), slice(1, T + 1), -1),
        )
    else:
        model = forecaster(films.train.shape[2:], filters, scales, patch, seed, engine)
        told, task = f"EncoderForecaster of {scales} scale(s), {filters} filters", Task(slice(0, T), slice(T, None), 0)
    out.mkdir(parents=True, exist_ok=True)
    tell(films.told)
    missing = [module for module in ("matplotlib", "PIL") if importlib.util.find_spec(module) is None]
    if missing:
        print(f"no pictures: {' and '.join(missing)} is missing; pip install 'fastclstm[viz]'")
    print(f"{told}: {model.num_parameters:,} parameters")
    baselines = compare(films.validation[:, : T + 1], T, {})
    history, seconds = _fit(
        model, films.train, films.validation, task, out / "checkpoint.safetensors", epochs=epochs, minutes=minutes,
        batch=batch, seed=seed, restart=restart, quiet=quiet, baselines=baselines,
    )  # fmt: skip

    model.save(out / "weights.safetensors")
    history.save(out / "history.csv")
    history.save(out / "history.json")
    forecasts = {"ConvLSTM": roll_out(model, films.test[:, :T], films.test.shape[1] - T)}
    scores = compare(films.test, T, forecasts)
    with replacing(out / "scores.json") as new:
        new.write_text(json.dumps(scores, indent=1), encoding="utf-8")
    _print_table(scores, len(films.test), films.test.shape[1] - T)
    _print_verdict(scores, seconds, sum(history["seconds"]))
    if not missing:
        import matplotlib

        from fastclstm import viz

        with matplotlib.rc_context(viz.theme(theme)):
            _draw_curves(out / "curves.png", history, baselines)
            _draw_films(out / "forecast.gif", films.test, T, forecasts["ConvLSTM"])
    tell(f"written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    scale = "" if films.scale is None else " --scale {} {}".format(*films.scale)
    print(f"to go on: fastclstm forecast FRAMES.npy --weights {out / 'weights.safetensors'}{scale} --out OUT.npy")


def network(channels: int, filters: int, brightness: float, seed: int, engine: str | None) -> Sequential:
    """Return a network that makes of each frame, and those before it, the next one; at first of mean `brightness`."""
    brightness = min(max(brightness, 0.01), 0.99)
    options: dict[str, Any] = {"engine": engine}
    lstm = ConvLSTM2D(channels, filters, KERNEL, seed=seed, **options)
    inner = Conv2D(filters, filters, 3, activation="elu", seed=seed + 1, **options)
    head = Conv2D(filters, channels, KERNEL, activation="sigmoid", seed=seed + 2,
                  bias_initializer=math.log(brightness / (1 - brightness)), **options)  # fmt: skip
    return Sequential([lstm, TimeDistributed(inner), TimeDistributed(head)])


def compare(films: np.ndarray, steps_in: int, forecasts: dict[str, np.ndarray]) -> Scores:
    """Return the figures of the forecasts, and of the two that need no training, for films (B, T, H, W, C)."""
    given, truth = films[:, :steps_in], films[:, steps_in:]
    steps = truth.shape[1]
    simple = {
        "last frame": persistence(given, steps),
        "flow": extrapolation(given, steps, outside=0, engine="own"),
    }
    scores = {}
    for name, made in (simple | forecasts).items():
        scores[name] = {
            "next mse": metrics.mse(made[:, :1], truth[:, :1]), "next ssim": metrics.ssim(made[:, :1], truth[:, :1]),
            "all mse": metrics.mse(made, truth), "all ssim": metrics.ssim(made, truth),
        }  # fmt: skip
    return scores


def read_films(path: Path, steps_in: int, steps_out: int) -> Films:
    """Read films (N, T, H, W[, C]) from a .npy, or x, or x and the frames y that follow, from an .npz.

    The last tenth of the films is for the test, the tenth before it for validation. All are scaled to [0, 1] by the
    smallest and the largest value of the others.

    Raises
    ------
    ValueError, TypeError
        The file holds no such films.
    OSError
        It cannot be read.
    """
    x, y = _load(path)
    if y is not None:
        if y.shape[:1] + y.shape[2:] != x.shape[:1] + x.shape[2:]:
            raise ValueError(f"train: in {path}, y {y.shape} must have as many films of as large frames as x {x.shape}")
        steps_in, x = x.shape[1], np.concatenate([x, y], 1)
    elif x.shape[1] > steps_in + steps_out:
        x = x[:, : steps_in + steps_out]
    if steps_in < 2 or x.shape[1] <= steps_in:
        raise ValueError(f"train: {path} has films of {x.shape[1]} frames but must have more than the {steps_in} given "
                         f"to the network, and these must be 2 or more; see --steps-in")  # fmt: skip
    if min(x.shape[2:4]) < WINDOW:
        raise ValueError(
            f"train: {path} has frames of {x.shape[2]}×{x.shape[3]} pixels but SSIM needs {WINDOW}×{WINDOW}"
        )
    held = max(1, round(HELD_SHARE * len(x)))
    if len(x) < 10:
        raise ValueError(f"train: {path} has {len(x)} films; give 10 or more, as two tenths are held out")
    if not np.isfinite(x).all():
        raise ValueError(f"train: {path} holds NaN or Inf; fill them in")
    train = x[: -2 * held]
    low, high = float(train.min()), float(train.max())
    if low == high:
        raise ValueError(f"train: {path} holds the value {low:g} only; there is nothing to learn")
    scaled = np.empty(x.shape, np.float32)
    for film, made in zip(x, scaled, strict=True):
        made[...] = np.subtract(film, low, dtype=np.float64) / (high - low)
    told = (f"{path}: {len(x)} films {x.shape[1:]}, scaled from [{low:g}, {high:g}] to [0, 1]; the last {held} are for "
            f"the test, {held} before them for validation")  # fmt: skip
    return Films(scaled[: -2 * held], scaled[-2 * held : -held], scaled[-held:], steps_in, told, (low, high))


def _load(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Return x and y of a file as (N, T, H, W, C)."""
    try:
        there = numpy_files.names(path)
        wanted = [name for name in ("x", "y") if name in there]
        named = numpy_files.read_npz(path, wanted) if there else {"x": numpy_files.read_npy(path)}
    except ValueError as error:
        raise ValueError(f"train: {path} is no .npy or .npz file of numbers: {what_is(path) or error}") from error
    if "x" not in named:
        raise ValueError(f"train: {path} has no array x; it has {shown(there)}")
    for name, array in named.items():
        if array.dtype.kind not in "fiub":
            raise TypeError(f"train: in {path}, {name} has dtype {array.dtype} but must hold real numbers")
        if array.ndim not in (4, 5):
            raise ValueError(f"train: in {path}, {name} has shape {array.shape} but must be (films, frames, height, "
                             f"width) or, with channels, (films, frames, height, width, channels)")  # fmt: skip
        named[name] = array if array.ndim == 5 else array[..., np.newaxis]
    return named["x"], named.get("y")


def _digits(steps_in: int, steps_out: int, seed: int) -> Films:
    steps = steps_in + steps_out
    train, validation, test = (
        moving_digits(number, steps, SIZE, part=part, seed=3 * seed + n)
        for n, (number, part) in enumerate(((FILMS, "train"), (VALIDATION_FILMS, "train"), (TEST_FILMS, "test")))
    )
    told = (
        f"moving digits: {FILMS} films of {SIZE}×{SIZE} pixels, {VALIDATION_FILMS} for validation, and {TEST_FILMS}, "
        f"of digits that are in none of the others, for the test"
    )
    return Films(train, validation, test, steps_in, told)


def _fit(
    model: Trainable, films: np.ndarray, validation: np.ndarray, task: Task, checkpoint: Path, *, epochs: int,
    minutes: float | None, batch: int, seed: int, restart: bool, quiet: bool, baselines: Scores,
) -> tuple[History, float | None]:  # fmt: skip
    """Train; also return the seconds it took to beat the baselines on the validation films, if it did."""
    rate: Any = LEARNING_RATE / 2
    if minutes is None:
        decay_steps = max(1, epochs * math.ceil(len(films) / batch) - WARMUP_STEPS)
        rate = CosineDecay(LEARNING_RATE, decay_steps, warmup_steps=WARMUP_STEPS)
    with going_on(checkpoint, restart):
        print(_row("", "seconds", "loss", "next mse", "next ssim"))
        for name, scores in baselines.items():
            print(_row(name, "", "", f"{scores['next mse']:.4f}", f"{scores['next ssim']:.3f}"))
        history = model.fit(
            films[:, task.given], films[:, task.wanted], loss=LOSS, optimizer=Adam(rate, clip_norm=CLIP_NORM),
            epochs=epochs if minutes is None else 10**9, time_limit=None if minutes is None else 60 * minutes,
            batch_size=batch, validation_data=(validation[:, task.given], validation[:, task.wanted]),
            metrics=task.metrics, seed=seed, checkpoint=checkpoint, checkpoint_every=CHECKPOINT_STEPS,
            resume=not restart, callbacks=_print_epoch, quiet=quiet,
        )  # fmt: skip
    return history, _seconds_to_beat(history, baselines)


def _seconds_to_beat(history: History, baselines: Scores) -> float | None:
    seconds = 0.0
    for epoch in range(history.epochs):
        seconds += history["seconds"][epoch]
        reached = {"next mse": history["val_next_mse"][epoch], "next ssim": history["val_next_ssim"][epoch]}
        if all(_beats(reached, scores, "next") for scores in baselines.values()):
            return seconds
    return None


def _beats(ours: dict[str, float], theirs: dict[str, float], which: str) -> bool:
    return ours[f"{which} mse"] < theirs[f"{which} mse"] and ours[f"{which} ssim"] > theirs[f"{which} ssim"]


def _print_epoch(history: History) -> None:
    last = {name: values[-1] for name, values in history.items()}
    say(_row(f"epoch {history.epochs}", f"{sum(history['seconds']):.0f}", f"{last['loss']:.4f}",
             f"{last['val_next_mse']:.4f}", f"{last['val_next_ssim']:.3f}"))  # fmt: skip


def _row(first: str, *cells: str) -> str:
    return f"{first:<12}" + "".join(f"{cell:>11}" for cell in cells)


def _print_table(scores: Scores, films: int, steps: int) -> None:
    print(f"\n{films} held-out films{'next frame':>23}{f'mean of {steps} frames':>22}")
    print(_row("", "MSE", "SSIM", "MSE", "SSIM"))
    for name, figures in scores.items():
        print(_row(name, *(f"{value:.4f}" if "mse" in which else f"{value:.3f}" for which, value in figures.items())))


def _print_verdict(scores: Scores, seconds: float | None, total: float) -> None:
    ours = scores["ConvLSTM"]
    simple = [figures for name, figures in scores.items() if name != "ConvLSTM"]
    won = ["does not beat", "beats"][all(_beats(ours, figures, "next") for figures in simple)]
    when = "" if seconds is None else f"; on the validation films it did after {seconds:.0f} s"
    print(f"the next frame {won} both, in MSE and SSIM, after {total:.0f} s of training{when}")


def _draw_curves(path: Path, history: History, baselines: Scores) -> None:
    """Draw loss, MSE and SSIM against the epochs, and the baselines as lines across."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.8))
    epochs = range(1, history.epochs + 1)
    panels: tuple[tuple[str, str, str | None], ...] = (
        ("loss", "loss", None), ("next_mse", "MSE of the next frame", "next mse"),
        ("next_ssim", "SSIM of the next frame", "next ssim"),
    )  # fmt: skip
    for axes, (curve, title, figure_name) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot(epochs, history[f"val_{curve}"], marker=".", label="validation")
        axes.plot(epochs, history[curve], marker=".", label="training")
        for style, (name, scores) in zip((":", "--"), baselines.items() if figure_name else (), strict=False):
            axes.axhline(scores[figure_name or ""], color="C2", linestyle=style, label=name)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if figure_name != "next ssim":
            axes.set_ylim(0, 1.05 * axes.dataLim.y1)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    with replacing(path) as new:
        figure.savefig(new, format="png")


def _draw_films(path: Path, films: np.ndarray, steps_in: int, made: np.ndarray, shown: int = 4) -> None:
    """Animate films (B, T, H, W, C) above what was made of them."""
    from matplotlib.figure import Figure

    from fastclstm import viz

    truth = films[:shown].mean(-1)
    forecast = np.concatenate([truth[:, :steps_in], made[:shown].mean(-1)], 1)
    rows = [viz.Row(label, film[:, 0], limit=1) for label, film in (("truth", truth), ("forecast", forecast))]
    figure = viz.filmstrip(Figure(), rows, [""] * len(truth), width=1.75 + min(1.5 * len(truth), 6))
    time = figure.text(0.02, 0.98, "", va="top")
    images = [axes.images[0] for axes in figure.axes[: 2 * len(truth)]]

    def update(t: int) -> None:
        for image, film in zip(images, (*truth, *forecast), strict=True):
            image.set_data(film[t])
        time.set_text(f"frame {t + 1}: " + ("given" if t < steps_in else "forecast"))

    with replacing(path) as new:
        viz.animate(new, figure, update, truth.shape[1])
