"""python -m fastclstm train: the films, what the network is compared with, what is written, and errors."""

import csv
import importlib.util
import json
import os
import pickle
import signal
import sys
import time

import numpy as np
import pytest
from test_commands import assert_user_error, fastclstm_cli, process

from fastclstm.commands import train
from fastclstm.io import weights
from fastclstm.models import Sequential, load
from fastclstm.nn import metrics

WRITTEN = ["checkpoint.safetensors", "curves.png", "forecast.gif", "history.csv", "history.json", "scores.json",
           "weights.safetensors"]  # fmt: skip


def gliding(films=10, steps=5, size=12, channels=None, seed=0):
    """Blots on a torus, each with a velocity of its own, with values from -3 to 5."""
    rng = np.random.default_rng(seed)
    first = np.zeros((films, size, size, channels or 1), np.float32)
    first[:, 3:7, 3:7] = rng.random((films, 4, 4, channels or 1))
    moves = rng.integers(-2, 3, (films, 2))
    x = np.stack([[np.roll(f, t * m, (0, 1)) for t in range(steps)] for f, m in zip(first, moves, strict=True)])
    return (8 * x - 3) if channels else (8 * x - 3)[..., 0]


@pytest.fixture
def job(tmp_path):
    np.save(tmp_path / "films.npy", gliding())
    return tmp_path


def run(job, *options, data="films.npy", **settings):
    small = {"--epochs": 2, "--steps-in": 3, "--steps-out": 2, "--filters": 2, "--batch": 3, "--engine": "reference"}
    small |= dict(zip(options[::2], options[1::2], strict=False)) if len(options) % 2 == 0 else {}
    given = [word for option, value in small.items() if value is not None for word in (option, value)]
    extra = options if len(options) % 2 else ()
    return fastclstm_cli("train", "--data", job / data, "--out", job / "out", *given, *extra, **settings)


def curves(job):
    with (job / "out" / "history.csv").open() as file:
        return [{name: v for name, v in row.items() if name != "seconds"} for row in csv.DictReader(file)]


# --- what is written ---


def test_everything_is_written_and_the_table_is_right(job):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    result = run(job)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (job / "out").iterdir()) == WRITTEN
    assert "scaled from [-3, " in result.stdout
    assert "the last 1 are for the test, 1 before them for validation" in result.stdout

    x = gliding()
    low, high = x[:8].min(), x[:8].max()
    test = ((x - low) / (high - low))[-1:, ..., np.newaxis]
    model = Sequential.load(job / "out" / "weights.safetensors")
    first = model(test[:, :3])[:, -1:]
    second = model(np.concatenate([test[:, 1:3], first], 1))[:, -1:]
    made, scores = np.concatenate([first, second], 1), json.loads((job / "out" / "scores.json").read_text())
    expected = {"next mse": metrics.mse(first, test[:, 3:4]), "next ssim": metrics.ssim(first, test[:, 3:4]),
                "all mse": metrics.mse(made, test[:, 3:]), "all ssim": metrics.ssim(made, test[:, 3:])}  # fmt: skip
    assert scores["ConvLSTM"] == pytest.approx(expected, rel=1e-5)
    table = {line[:12].strip(): line[12:].split() for line in result.stdout.splitlines()}
    for name, figures in scores.items():
        shown = [f"{value:.4f}" if "mse" in figure else f"{value:.3f}" for figure, value in figures.items()]
        assert table[name] == shown
    assert "the next frame does not beat both" in result.stdout

    assert [row["epoch"] for row in curves(job)] == ["1", "2"]
    assert set(json.loads((job / "out" / "history.json").read_text())) == set(curves(job)[0]) - {"epoch"} | {"seconds"}
    with image.open(job / "out" / "forecast.gif") as picture:
        assert (picture.format, picture.n_frames) == ("GIF", 5)
    with image.open(job / "out" / "curves.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


def test_a_network_that_has_learned_says_so(job, capsys):
    figures = {"next mse": 0.2, "next ssim": 0.5, "all mse": 1, "all ssim": 0}
    better = figures | {"next mse": 0.1, "next ssim": 0.6}
    train._print_verdict({"last frame": figures, "ConvLSTM": better}, 3.0, 5.0)
    assert capsys.readouterr().out.startswith("the next frame beats both, in MSE and SSIM, after 5 s")
    for name, value in (("next mse", 0.2), ("next ssim", 0.4)):
        train._print_verdict({"last frame": figures, "ConvLSTM": better | {name: value}}, None, 5.0)
        assert "does not beat" in capsys.readouterr().out


def test_time_to_beat_is_that_of_the_first_epoch_which_did():
    history = train.History(seconds=[1.0, 2.0, 4.0], val_next_mse=[0.3, 0.1, 0.1], val_next_ssim=[0.9, 0.4, 0.7])
    baselines = {"a": {"next mse": 0.2, "next ssim": 0.5}, "b": {"next mse": 0.4, "next ssim": 0.6}}
    assert train._seconds_to_beat(history, baselines) == 7.0
    assert train._seconds_to_beat(history, baselines | {"c": {"next mse": 0.1, "next ssim": 0.0}}) is None


def test_the_same_command_goes_on(job):
    assert run(job).exit_code == 0
    whole, path = curves(job), job / "out" / "weights.safetensors"
    before = path.read_bytes()
    again = run(job)
    assert again.exit_code == 0
    assert "going on from" in again.stdout
    assert "epoch 1" not in again.stdout
    assert (curves(job), path.read_bytes()) == (whole, before)
    anew = run(job, "--restart")
    assert "going on" not in anew.stdout
    assert (curves(job), path.read_bytes()) == (whole, before)
    assert_last_line(run(job, "--filters", 3), "of another training", "--restart")


def assert_last_line(result, *words):
    """An error after some lines on what there is to do."""
    assert result.exit_code == 2
    assert result.stderr.startswith("fastclstm: error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


@pytest.mark.slow
def test_killed_and_called_again_it_gives_the_same(job):
    arguments = [
        "train",
        "--data",
        job / "films.npy",
        "--epochs",
        40,
        "--steps-in",
        3,
        "--engine",
        "reference",
        "--out",
    ]
    checkpoint = job / "out" / "checkpoint.safetensors"
    child = process(*arguments, job / "out")
    deadline = time.monotonic() + 60
    while (
        not (checkpoint.exists() and weights.load(checkpoint)[1]["progress"]["epoch"]) and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert 0 < weights.load(checkpoint)[1]["progress"]["epoch"] < 25
    for folder in ("out", "whole"):
        result = fastclstm_cli(*arguments, job / folder)
        assert result.exit_code == 0, result.stderr
    files = [(job / folder / "weights.safetensors").read_bytes() for folder in ("out", "whole")]
    assert files[0] == files[1]


def test_ctrl_c_says_how_to_go_on(job, monkeypatch):
    def interrupt(history):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train, "_print_epoch", interrupt)
        result = run(job)
    assert result.exit_code == 130
    assert result.stdout.endswith(f"interrupted; the same command goes on from {job / 'out' / WRITTEN[0]}\n")
    assert os.listdir(job / "out") == WRITTEN[:1]
    assert run(job).exit_code == 0
    interrupted = (job / "out" / "weights.safetensors").read_bytes()
    assert run(job, "--restart").exit_code == 0
    assert (job / "out" / "weights.safetensors").read_bytes() == interrupted


def test_minutes_are_an_end_too(job):
    result = run(job, "--epochs", None, "--minutes", 0.01)
    assert result.exit_code == 0, result.output
    seconds = json.loads((job / "out" / "history.json").read_text())["seconds"]
    assert len(seconds) >= 1
    assert sum(seconds[:-1]) < 0.6
    assert_user_error(run(job, "--minutes", 1), "--epochs or --minutes")


def test_without_matplotlib_there_are_no_pictures(job, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    result = run(job)
    assert result.exit_code == 0
    assert "no pictures: matplotlib is missing; pip install 'fastclstm[viz]'" in result.stdout
    assert sorted(os.listdir(job / "out")) == [name for name in WRITTEN if name.endswith(("s", "n", "v"))]


@pytest.mark.parametrize("channels", [None, 2])
def test_films_and_the_frames_that_follow_from_an_npz(job, channels):
    x = gliding(12, 6, channels=channels)
    np.savez(job / "films.npz", x=x[:, :4], y=x[:, 4:])
    result = run(job, data="films.npz")
    assert result.exit_code == 0, result.output
    assert f"12 films (6, 12, 12, {channels or 1})" in result.stdout
    model = Sequential.load(job / "out" / "weights.safetensors")
    assert model(np.zeros((1, 4, 12, 12, channels or 1))).shape == (1, 4, 12, 12, channels or 1)
    np.savez(job / "films.npz", x=x)
    assert run(job, data="films.npz").exit_code == 2  # another training: 3 frames given, not 4


def test_on_digits(job, monkeypatch):
    pytest.importorskip("sklearn")
    for name, number in (("FILMS", 6), ("VALIDATION_FILMS", 2), ("TEST_FILMS", 3)):
        monkeypatch.setattr(train, name, number)
    result = fastclstm_cli(
        "train", "--out", job / "out", "--epochs", 1, "--steps-in", 2, "--steps-out", 1, "--filters", 2
    )
    assert result.exit_code == 0, result.output
    assert "6 films of 24×24 pixels, 2 for validation, and 3, of digits that are in none" in result.stdout
    assert "3 held-out films" in result.stdout
    assert_user_error(fastclstm_cli("train", "--out", job / "films.npy"), "films.npy is a file")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert_user_error(fastclstm_cli("train", "--out", job / "out"), "scikit-learn", "pip install 'fastclstm[demo]'")


@pytest.mark.parametrize(("scales", "patch", "strides"), [(2, 1, (1, 2)), (None, 2, None)])
def test_an_encoder_and_a_forecaster(job, scales, patch, strides):
    options = ("--scales", scales, "--patch", patch)
    result = run(job, *options)
    assert result.exit_code == 0, result.output
    assert f"EncoderForecaster of {scales or 1} scale(s), 2 filters" in result.stdout
    model = load(job / "out" / "weights.safetensors")
    assert (model.strides, model.patch_size) == (strides, patch)
    assert set(curves(job)[0]) >= {"loss", "val_next_mse", "val_next_ssim"}
    np.save(job / "films.npy", gliding(channels=1))
    made = fastclstm_cli("forecast", job / "films.npy", "--weights", job / "out" / "weights.safetensors", "--steps", 2,
                         "--out", job / "made.npy")  # fmt: skip
    assert made.exit_code == 0, made.output
    assert np.load(job / "made.npy").shape == (10, 2, 12, 12, 1)


# --- its parts ---


def test_the_baselines_are_persistence_and_optical_flow():
    """On slow motion the latter is the better one."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:24, :24]
    films = np.stack([
        [np.exp(-((y - 12 - 0.3 * t) ** 2 + (x - place + 0.3 * t) ** 2) / 18) for t in range(6)]
        for place in rng.uniform(9, 15, 3)
    ])[..., None]  # fmt: skip
    scores = train.compare(films, 3, {})
    assert list(scores) == ["last frame", "flow"]
    assert scores["flow"]["all mse"] < 0.1 * scores["last frame"]["all mse"]
    assert scores["last frame"]["next mse"] == pytest.approx(np.square(films[:, 3] - films[:, 2]).mean())


SCALED = {
    "far from 0": lambda x: 1e9 + 3.1 + x,
    "whole numbers far from 0": lambda x: np.rint(1e15 + 1e9 * x).astype("int64"),
    "all of an integer": lambda x: np.rint(-32768 + 65535 * x).astype("int16"),
    "huge": lambda x: 1e300 * (1 + x),
    "tiny": lambda x: 1e-320 + 1e-300 * x,
    "single": lambda x: x.astype("float32"),
}


@pytest.mark.parametrize("case", SCALED)
def test_films_are_scaled_in_double(tmp_path, case):
    x = np.random.default_rng(0).random((10, 3, 11, 12))
    x[0, 0, 0, :2] = 0, 1
    np.save(tmp_path / "films.npy", SCALED[case](x))
    films = train.read_films(tmp_path / "films.npy", 2, 1)
    for part, expected in ((films.train, x[:8]), (films.validation, x[8:9]), (films.test, x[9:])):
        assert part.dtype == np.float32
        np.testing.assert_allclose(part[..., 0], expected, rtol=0, atol=3e-5 if case == "all of an integer" else 1e-7)
    assert (films.train.min(), films.train.max()) == (0, 1)


def write(job, array, **more):
    np.savez(job / "films.npz", x=array, **more)


BAD_FILMS = {
    "missing": (lambda job: None, ["films.npz", "No such file"]),
    "folder": (lambda job: (job / "films.npz").mkdir(), ["films.npz", "directory"]),
    "text": (lambda job: (job / "films.npz").write_text("text"), ["films.npz is no .npy or .npz file"]),
    "netCDF": (
        lambda job: (job / "films.npz").write_bytes(b"CDF\x01" + bytes(64)),
        ["it is a netCDF file; save the", "np.save('films.npy', xarray.open_dataset("],
    ),
    "netCDF-4": (
        lambda job: (job / "films.npz").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64)),
        ["it is a netCDF-4 or"],
    ),
    "MP4": (lambda job: (job / "films.npz").write_bytes(b"\0\0\0 ftypisom"), ["it is a film (MP4)"]),
    "pickle": (lambda job: (job / "films.npz").write_bytes(pickle.dumps([1])), ["it is a pickle, which is not read"]),
    "empty": (lambda job: (job / "films.npz").write_bytes(b""), ["films.npz is no .npy or .npz file"]),
    "no x": (lambda job: np.savez(job / "films.npz", z=gliding()), ["has no array x; it has z"]),
    "complex": (lambda job: write(job, gliding() * 1j), ["x has dtype complex64"]),
    "objects": (lambda job: write(job, np.array([{}], object)), ["films.npz is no .npy"]),
    "3D": (lambda job: write(job, gliding()[0]), ["(5, 12, 12)", "(films, frames, height, width)"]),
    "few films": (lambda job: write(job, gliding()[:9]), ["has 9 films; give 10"]),
    "short": (lambda job: write(job, gliding()[:, :3]), ["films of 3 frames", "--steps-in"]),
    "small": (lambda job: write(job, gliding()[:, :, :10]), ["10×12 pixels but SSIM needs 11×11"]),
    "nan": (lambda job: write(job, gliding() * np.nan), ["NaN or Inf"]),
    "constant": (lambda job: write(job, np.zeros_like(gliding())), ["holds the value 0 only"]),
    "y": (lambda job: write(job, gliding(), y=gliding()[:, :, :11]), ["y (10, 5, 11, 12, 1) must have as many"]),
}


@pytest.mark.parametrize("case", BAD_FILMS)
def test_errors_name_what_the_user_can_put_right(job, case):
    spoil, words = BAD_FILMS[case]
    spoil(job)
    assert_user_error(run(job, data="films.npz"), *words)
    assert not (job / "out").exists()


def test_options_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for option, value in (("--epochs", 0), ("--steps-in", 1), ("--minutes", 0), ("--seed", -1)):
        assert_user_error(fastclstm_cli("train", option, value), option)
    assert_user_error(fastclstm_cli("train", "--engine", "gpu"), "unknown engine 'gpu'")
    with pytest.raises(ValueError, match=r"frames of 12×10 pixels cannot be cut into patches of 2 and halved 2 times"):
        train.forecaster((12, 10, 1), 2, 3, 2, 0, None)
    assert os.listdir() == []
