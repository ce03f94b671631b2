"""The command line: what it prints, what it writes, and how it ends."""

import ast
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fastclstm
from fastclstm import (
    Conv2D,
    ConvGRU2D,
    ConvLSTM1D,
    ConvLSTM2D,
    ConvLSTM2DCell,
    ConvLSTM3D,
    Dense,
    Dropout,
    EncoderForecaster,
    Flatten,
    MaxPooling3D,
    Reshape,
    Sequential,
    TimeDistributed,
    dispatch,
)
from fastclstm.commands import COMMANDS, app, main
from fastclstm.engines.cpu import compilation, warmup

ROOT = Path(fastclstm.__file__).parents[1]
HEAVY = {"numpy", "matplotlib", "numba", "safetensors", "sklearn", "tqdm"}


def fastclstm_cli(*args, traceback=False):
    environment = {"FASTCLSTM_TRACEBACK": "1" if traceback else None}
    return CliRunner().invoke(app, [str(arg) for arg in args], env=environment)


def process(*args, **options):
    """Start ``python -m fastclstm`` as a user does."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["PYTHONPATH"] = str(ROOT)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment, **options}
    return subprocess.Popen([sys.executable, "-m", "fastclstm", *map(str, args)], **options)


def assert_user_error(result, *words):
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("fastclstm: error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


class Job:
    """A folder with a saved layer, frames for it, and names for what `run` writes."""

    def __init__(self, folder):
        self.folder = folder
        self.frames, self.weights, self.out = folder / "frames.npy", folder / "weights.safetensors", folder / "out.npy"
        self.save_layer()
        self.x = np.random.default_rng(0).normal(size=(2, 7, 6, 5, 3)).astype(np.float32)
        np.save(self.frames, self.x)

    def save_layer(self, **options):
        options = {"engine": "reference", **options}
        self.layer = ConvLSTM2D(3, (4, 2), 3, num_layers=2, leaky_relu_slope=0.1, seed=0, **options)
        self.layer.save(self.weights)

    def run(self, *options, **settings):
        return fastclstm_cli("run", self.frames, "--weights", self.weights, "--out", self.out, *options, **settings)

    def result(self):
        return np.load(self.out)

    def names(self):
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture(autouse=True)
def threads():
    yield
    fastclstm.set_num_threads(None)


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def test_the_installed_command_is_main():
    """Not `app`, which an end from outside (SIGTERM) would kill before it has cleaned up."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"fastclstm": f"{main.__module__}:{main.__name__}"}


# --- run ---


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("go_backwards", [False, True])
@pytest.mark.parametrize("engine", dispatch.ENGINES)
def test_run_gives_the_bits_of_one_call(job, engine, chunk, go_backwards):
    job.save_layer(engine=engine, go_backwards=go_backwards)
    result = job.run("--chunk", chunk)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{job.out}: (2, 7, 6, 5, 2)\n"
    expected = job.layer(job.x)
    assert job.result().dtype == np.float32
    np.testing.assert_array_equal(job.result(), expected, strict=True)
    assert job.names() == ["frames.npy", "out.npy", "weights.safetensors"]


@pytest.mark.parametrize(
    "options", [{"bidirectional": True}, {"time_major": True, "stateful": True}, {"peephole": "conv", "dropout": 0.5}]
)
def test_run_knows_every_kind_of_layer(job, options):
    job.save_layer(**options)
    assert job.run("--chunk", 3, "--state-out", job.folder / "states.npz").exit_code == 0
    expected = ConvLSTM2D.load(job.weights, time_major=False)(job.x)
    np.testing.assert_array_equal(job.result(), expected, strict=True)


@pytest.mark.parametrize("batched", [True, False])
def test_run_without_return_sequences_writes_the_last_output(job, batched):
    job.save_layer(return_sequences=False)
    np.save(job.frames, job.x if batched else job.x[0])
    assert job.run("--chunk", 3, "--quiet").exit_code == 0
    expected = job.layer(job.x if batched else job.x[:1])
    np.testing.assert_array_equal(job.result(), expected if batched else expected[0], strict=True)


def test_run_without_a_batch_axis(job):
    np.save(job.frames, job.x[0])
    assert job.run("--chunk", 3).exit_code == 0
    np.testing.assert_array_equal(job.result(), job.layer(job.x[:1])[0], strict=True)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_run_without_a_channel_axis(job, data_format):
    layer = ConvLSTM2D(1, 2, 3, seed=0, engine="reference", data_format=data_format)
    layer.save(job.weights)
    np.save(job.frames, job.x[0, ..., 0])
    assert job.run("--chunk", 3).exit_code == 0
    x = np.expand_dims(job.x[:1, ..., 0], -1 if data_format == "channels_last" else 2)
    np.testing.assert_array_equal(job.result(), layer(x)[0], strict=True)


@pytest.mark.parametrize(
    "layer",
    [ConvLSTM1D(1, 2, 3, engine="reference"), ConvLSTM3D(1, 2, 3, time_major=True, engine="reference"),
     ConvLSTM3D(1, 2, 3, data_format="channels_first", engine="reference"),
     ConvGRU2D(1, 2, 3, num_layers=2, stateful=True, engine="reference")],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_run_of_other_cells_and_frames(job, layer):
    """Of each number of axes that they have, and on from a saved state."""
    layer.save(job.weights)
    layer.time_major = layer.stateful = False
    channels, state = (2 if layer.data_format == "channels_first" else layer._rank + 2), job.folder / "state.npz"
    x = np.float32(np.random.default_rng(0).normal(size=(2, 5, *(3, 4, 5)[: layer._rank])))
    sequences = np.expand_dims(x, channels)
    for given, expected in ((sequences, layer(sequences)), (sequences[0], layer(sequences[:1])[0]),
                            (x[0], layer(sequences[:1])[0])):  # fmt: skip
        np.save(job.frames, given)
        result = job.run("--chunk", 2)
        assert result.exit_code == 0, result.stderr
        np.testing.assert_array_equal(job.result(), expected, strict=True)
    for part in (slice(3), slice(3, None)):
        np.save(job.frames, sequences[:, part])
        options = ("--state-in", state) if part.start else ("--state-out", state)
        assert job.run(*options).exit_code == 0
        np.testing.assert_array_equal(job.result(), layer(sequences)[:, part], strict=True)
    Sequential([layer]).save(job.weights)
    np.save(job.frames, x[0])
    assert job.run("--chunk", 2).exit_code == 0
    np.testing.assert_array_equal(job.result(), layer(sequences[:1])[0], strict=True)


def test_run_of_frames_that_become_rows(job):
    """What the first layer takes counts."""
    network = Sequential([TimeDistributed(Conv2D(1, 2, 3, engine="reference")), TimeDistributed(Reshape((4, 6))),
                          ConvLSTM1D(6, 2, 3, engine="reference")])  # fmt: skip
    network.save(job.weights)
    x = np.float32(np.random.default_rng(0).normal(size=(3, 4, 3, 1)))
    np.save(job.frames, x)
    assert job.run().exit_code == 0
    np.testing.assert_array_equal(job.result(), network(x[np.newaxis])[0], strict=True)


@pytest.mark.parametrize("dtype", ["float64", "uint8", ">f4", "float16"])
def test_run_reads_any_real_dtype_and_order(job, dtype):
    x = np.asfortranarray((job.x * 10).clip(0, 100).astype(dtype))
    np.save(job.frames, x)
    assert job.run("--chunk", 3).exit_code == 0
    np.testing.assert_array_equal(job.result(), job.layer(x), strict=True)


def test_run_writes_the_layers_dtype(job):
    job.save_layer(dtype="float64")
    assert job.run("--chunk", 3).exit_code == 0
    np.testing.assert_array_equal(job.result(), job.layer(job.x), strict=True)


NETWORKS = {
    "Sequential": lambda: Sequential([ConvLSTM2D(3, 4, 3, seed=0), TimeDistributed(Conv2D(4, 2, 3, seed=1))]),
    "last step": lambda: Sequential([ConvLSTM2D(3, 4, 3, return_sequences=False, seed=0), Flatten()]),
    "one layer": lambda: MaxPooling3D((2, 2, 2)),
    "no ConvLSTM": lambda: Sequential([TimeDistributed(Conv2D(3, 2, 3, seed=0)), Dropout(0.5)]),
}


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("network", NETWORKS)
def test_run_serves_every_network(job, network, chunk):
    model = NETWORKS[network]()
    model.save(job.weights)
    x = np.concatenate([job.x, job.x[::-1] + 1, job.x[:1]])
    np.save(job.frames, x)
    result = job.run("--chunk", chunk)
    assert result.exit_code == 0, result.stderr
    expected = model(x)
    assert result.stdout == f"{job.out}: {expected.shape}\n"
    np.testing.assert_allclose(job.result(), expected, rtol=0, atol=1e-6, strict=True)
    assert job.names() == ["frames.npy", "out.npy", "weights.safetensors"]


@pytest.mark.parametrize("network", ["Sequential", "last step"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_run_gives_networks_a_batch_axis(job, network, data_format):
    model = NETWORKS[network]()
    model.save(job.weights)
    np.save(job.frames, job.x[0])
    assert job.run().exit_code == 0
    np.testing.assert_array_equal(job.result(), model(job.x[:1])[0], strict=True)
    model = Sequential([ConvLSTM2D(1, 4, 3, seed=0, data_format=data_format)])
    model.save(job.weights)
    np.save(job.frames, job.x[0, ..., 0])
    assert job.run().exit_code == 0
    x = np.expand_dims(job.x[:1, ..., 0], -1 if data_format == "channels_last" else 2)
    np.testing.assert_array_equal(job.result(), model(x)[0], strict=True)


def test_run_of_samples_that_are_no_sequences(job):
    dense = Dense(3, 2, seed=0)
    dense.save(job.weights)
    np.save(job.frames, job.x[0, 0, 0])
    assert job.run("--chunk", 2, "--engine", "reference").exit_code == 0
    np.testing.assert_allclose(job.result(), dense(job.x[0, 0, 0]), atol=1e-6, strict=True)
    np.save(job.frames, job.x[0, 0, 0, :0])
    assert job.run().exit_code == 0
    assert job.result().shape == (0, 2)


def test_run_lets_every_layer_of_a_network_compute_with_the_engine(job, monkeypatch):
    model = NETWORKS["Sequential"]()
    model.save(job.weights)
    monkeypatch.setattr("fastclstm.engines.cpu.convlstm2d", lambda *args, **options: pytest.fail("the cpu engine"))
    monkeypatch.setattr("fastclstm.engines.cpu.conv2d", lambda *args, **options: pytest.fail("the cpu engine"))
    assert job.run("--engine", "reference").exit_code == 0
    assert_user_error(job.run("--engine", "gpu"), "unknown engine 'gpu'")


def test_run_of_an_empty_batch(job):
    np.save(job.frames, job.x[:0])
    assert job.run().exit_code == 0
    assert job.result().shape == (0, 7, 6, 5, 2)


def test_run_lets_nan_pass(job):
    job.x[0, 2, 3, 3, 1] = np.nan
    np.save(job.frames, job.x)
    assert job.run("--chunk", 2).exit_code == 0
    np.testing.assert_array_equal(job.result(), job.layer(job.x), strict=True)
    assert np.isnan(job.result()[0, 2:]).any()
    assert not np.isnan(job.result()[:, :2]).any()


def test_run_goes_on_from_a_saved_state(job):
    expected = job.layer(job.x)
    state = job.folder / "state.npz"
    np.save(job.frames, job.x[:, :4])
    assert job.run("--state-out", state).exit_code == 0
    np.testing.assert_array_equal(job.result(), expected[:, :4])
    np.save(job.frames, job.x[:, 4:])
    assert job.run("--state-in", state).exit_code == 0
    np.testing.assert_array_equal(job.result(), expected[:, 4:])
    with np.load(state) as arrays:
        assert {name: array.shape for name, array in arrays.items()} == {
            "h0": (2, 6, 5, 4), "c0": (2, 6, 5, 4), "h1": (2, 6, 5, 2), "c1": (2, 6, 5, 2)}  # fmt: skip


def test_run_replaces_an_older_result(job):
    job.out.write_text("older")
    assert job.run().exit_code == 0
    np.testing.assert_array_equal(job.result(), job.layer(job.x))


def test_run_is_silent_when_asked(job):
    result = job.run("--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_run_takes_another_engine_than_the_saved_one(job, monkeypatch):
    monkeypatch.setitem(dispatch.ENGINES, "elsewhere", "fastclstm.no_such_engine")
    assert_user_error(job.run("--engine", "elsewhere"), "engine 'elsewhere' cannot be used")
    assert not job.out.exists()


def test_run_where_there_is_no_gpu(job, monkeypatch):
    def missing():
        raise ImportError("engine 'cuda' finds no NVIDIA driver")

    monkeypatch.setattr("fastclstm.engines.cuda.devices.current", missing)
    assert_user_error(job.run("--engine", "cuda"), "engine 'cuda' finds no NVIDIA driver")
    assert not job.out.exists()


def save_complex(job):
    np.save(job.frames, job.x.astype(np.complex64))


def save_objects(job):
    np.save(job.frames, np.array([{}, None, job.x], dtype=object), allow_pickle=True)


def cut_frames(job):
    job.frames.write_bytes(job.frames.read_bytes()[:-100])


def negative_size(job):
    header = {"descr": "<f4", "fortran_order": False, "shape": (-2, 6, 5)}
    with job.frames.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(100))


def cut_weights(job):
    job.weights.write_bytes(job.weights.read_bytes()[:-100])


def save_two_outputs(job):
    ConvLSTM2D(3, 2, 3, bidirectional=True, merge_mode=None).save(job.weights)


def save_npz(job):
    job.frames = job.folder / "x.npz"
    np.savez(job.frames, x=job.x)


def save_checkpoint(job):
    dense = Sequential([Dense(1, 1)])
    dense.fit(np.zeros((2, 1)), np.zeros((2, 1)), checkpoint=job.weights)


def block_out(job):
    job.out.mkdir()


USER_ERRORS = {
    "missing input": (lambda job: job.frames.unlink(), [], ["frames.npy", "No such file"]),
    "input is a folder": (lambda job: (job.frames.unlink(), job.frames.mkdir()), [], ["frames.npy"]),
    "not a .npy": (lambda job: job.frames.write_text("text"), [], ["frames.npy", "cannot be read as a .npy"]),
    "negative size": (negative_size, [], ["frames.npy", "cannot be read as a .npy"]),
    "empty file": (lambda job: job.frames.write_bytes(b""), [], ["frames.npy", "cannot be read as a .npy"]),
    "cut short": (cut_frames, [], ["frames.npy", "cannot be read as a .npy"]),
    "complex": (save_complex, [], ["complex64", "real numbers"]),
    "objects": (save_objects, [], ["frames.npy", "Python objects"]),
    "2D": (lambda job: np.save(job.frames, job.x[0, 0, ..., 0]), [], ["(6, 5)", "(T, H, W)"]),
    "6D": (lambda job: np.save(job.frames, job.x[None]), [], ["(1, 2, 7, 6, 5, 3)", "(B, T, H, W, C)"]),
    "3D for 3 channels": (lambda job: np.save(job.frames, job.x[0, ..., 0]), [], ["1 channels", "takes 3"]),
    "channels": (lambda job: np.save(job.frames, job.x[..., :2]), [], ["2 channels", "takes 3"]),
    "5D for rows": (lambda job: ConvLSTM1D(3, 4, 3).save(job.weights), [], ["(T, W), (T, W, C) or (B, T, W, C)"]),
    "no steps": (lambda job: np.save(job.frames, job.x[:, :0]), [], ["(2, 0, 6, 5, 3)"]),
    "kernel too large": (lambda job: job.save_layer(padding="valid") or np.save(job.frames, job.x[:, :, :2]), [],
                         ["window of 3 does not fit the height of 2"]),
    "missing weights": (lambda job: job.weights.unlink(), [], ["weights.safetensors", "No such file"]),
    "damaged weights": (cut_weights, [], ["weights.safetensors", "damaged"]),
    "foreign weights": (lambda job: job.weights.write_text("text"), [], ["weights.safetensors", "damaged"]),
    "one step": (lambda job: ConvLSTM2DCell(3, 4, 3).save(job.weights), [], ["holds a ConvLSTM2DCell", "ConvLSTM2D"]),
    "frames that follow": (lambda job: EncoderForecaster(3, (4,), 3).save(job.weights), [], ["use forecast"]),
    "indices": (lambda job: MaxPooling3D(return_indices=True).save(job.weights), [], ["give it return_indices=False"]),
    "a network's states": (lambda job: Sequential([job.layer]).save(job.weights), ["--state-out", "{out}x"],
                           ["holds a Sequential; --state-in"]),
    "a network's axes": (lambda job: Sequential([ConvLSTM2D(3, 4, 3, time_major=True)]).save(job.weights), [],
                         ["time_major"]),
    "a checkpoint": (save_checkpoint, [], ["weights.safetensors is the checkpoint of a training"]),
    "a .npz": (save_npz, [], ["it is a .npz; save the array", "x.npz')[NAME]"]),
    "a netCDF": (lambda job: job.frames.write_bytes(b"CDF\1" + bytes(99)), [], ["it is a netCDF file; save the array"]),
    "two outputs": (save_two_outputs, [], ["weights.safetensors has merge_mode=None"]),
    "out is a folder": (block_out, [], ["out.npy", "not a regular file"]),
    "out in no folder": (lambda job: None, ["--out", "no/such/out.npy"], ["no/such/out.npy", "cannot write here"]),
    "out is no array": (lambda job: None, ["--out", "out.png"], ["run: what comes of an array is written as .npy"]),
    "out is the input": (lambda job: None, ["--out", "{frames}"], ["frames.npy would overwrite"]),
    "out is the weights": (lambda job: None, ["--out", "{weights}"], ["weights.safetensors would overwrite"]),
    "state is the out": (lambda job: None, ["--state-out", "{out}"], ["out.npy would overwrite"]),
    "state out in no folder": (lambda job: None, ["--state-out", "no/such/s.npz"], ["no/such/s.npz"]),
    "missing state": (lambda job: None, ["--state-in", "none.npz"], ["none.npz", "No such file"]),
    "foreign state": (lambda job: None, ["--state-in", "{frames}"], ["frames.npy is not a .npz file of states"]),
    "corrupt state": (lambda job: None, ["--state-in", "{weights}"], ["weights.safetensors is not a .npz"]),
    "unknown engine": (lambda job: None, ["--engine", "gpu"], ["unknown engine 'gpu'", "reference"]),
    "chunk": (lambda job: None, ["--chunk", "0"], ["--chunk", "try --help"]),
    "threads": (lambda job: None, ["--threads", "0"], ["--threads", "try --help"]),
    "unknown option": (lambda job: None, ["--nope"], ["--nope", "try --help"]),
}  # fmt: skip


@pytest.mark.parametrize("case", USER_ERRORS)
def test_run_names_what_the_user_can_put_right(job, case):
    spoil, options, words = USER_ERRORS[case]
    spoil(job)
    before = {path: path.is_file() and path.read_bytes() for path in job.folder.iterdir()}
    result = job.run(*(option.format(frames=job.frames, weights=job.weights, out=job.out) for option in options))
    assert_user_error(result, *words)
    assert {path: path.is_file() and path.read_bytes() for path in job.folder.iterdir()} == before


@pytest.mark.parametrize("names", [["h0"], ["h0", "c0"], ["h1", "c1"], ["h0", "c0", "h1", "c1"]])
def test_run_with_states_that_do_not_fit(job, names):
    state = job.folder / "state.npz"
    np.savez(state, **{name: np.zeros((2, 6, 5, 1)) for name in names})
    assert_user_error(job.run("--state-in", state), "state")
    assert not job.out.exists()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError("900 GiB"), RuntimeError("a bug")], ids=repr)
def test_nothing_partial_stays(job, monkeypatch, failure):
    job.out.write_text("older")
    forward, calls = ConvLSTM2D.forward, []

    def fail_later(self, *args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise failure
        return forward(self, *args, **options)

    monkeypatch.setattr(ConvLSTM2D, "forward", fail_later)
    result = job.run("--chunk", 1, "--state-out", job.folder / "state.npz")
    assert len(calls) == 3
    assert job.out.read_text() == "older"
    assert job.names() == ["frames.npy", "out.npy", "weights.safetensors"]
    if failure is KeyboardInterrupt:
        assert (result.exit_code, result.output) == (130, "")
    elif isinstance(failure, MemoryError):
        assert_user_error(result, "out of memory: 900 GiB")
    else:
        assert result.exception is failure  # bugs keep their traceback


def test_a_traceback_on_request(job):
    job.frames.unlink()
    assert isinstance(job.run(traceback=True).exception, FileNotFoundError)


# --- as a process ---


def test_exit_code_and_streams_of_a_process(job):
    with process("run", "none.npy", "--weights", job.weights, "--out", job.out, cwd=job.folder) as child:
        stdout, stderr = child.communicate(timeout=60)
    assert (child.returncode, stdout) == (2, "")
    assert stderr == "fastclstm: error: none.npy: No such file or directory\n"


def test_a_full_disk_is_an_error_not_a_crash(job):
    resource = pytest.importorskip("resource")
    job.out.write_text("older")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # noqa: E731
    arguments = "run", job.frames, "--weights", job.weights, "--out", job.out, "--chunk", 1
    with process(*arguments, preexec_fn=limit) as child:
        stdout, stderr = child.communicate(timeout=60)
    assert (child.returncode, stdout) == (2, "")
    assert stderr == f"fastclstm: error: {job.out}: File too large\n"
    assert job.out.read_text() == "older"
    assert job.names() == ["frames.npy", "out.npy", "weights.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(job, number, code):
    np.save(job.frames, np.zeros((1, 200_000, 6, 5, 3), np.float16))
    arguments = "run", job.frames, "--weights", job.weights, "--out", job.out, "--chunk", 1
    # Jobs in the background of a script begin with Ctrl-C ignored, and so would theirs.
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with process(*arguments, preexec_fn=listen) as child:
        while not any(name.endswith(".part") for name in job.names()):
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.01)
        child.send_signal(number)
        stdout, stderr = child.communicate(timeout=60)
    assert (child.returncode, stdout, stderr) == (code, "", "")
    assert job.names() == ["frames.npy", "weights.safetensors"]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_sees_a_progress_bar(job, quiet):
    termios = pytest.importorskip("termios")
    terminal, stderr = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    arguments = "run", job.frames, "--weights", job.weights, "--out", job.out, *(["--quiet"] if quiet else [])
    with process(*arguments, stderr=stderr) as child:
        os.close(stderr)
        shown = b""
        try:
            while part := os.read(terminal, 1000):
                shown += part
        except OSError:  # how Linux says that nobody writes to the terminal any more
            pass
        stdout, _ = child.communicate(timeout=60)
    os.close(terminal)
    assert child.returncode == 0
    assert stdout == ("" if quiet else f"{job.out}: (2, 7, 6, 5, 2)\n")
    assert shown == b"" if quiet else b"7/7" in shown


def imported_by_help(*arguments):
    """The help that a fresh process shows, and which of the packages that take their time it has imported for it."""
    code = f"""
import atexit, sys
from fastclstm.commands import main
atexit.register(lambda: print({HEAVY!r} & set(sys.modules)))
sys.argv[1:] = [*{arguments!r}, "--help"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    text, _, found = done.stdout.rstrip().rpartition("\n")
    return text, set() if found == "set()" else ast.literal_eval(found)


def test_the_list_of_commands_imports_none_of_them():
    text, found = imported_by_help()
    assert found == set()
    listed = text.partition("\nCommands:\n")[2].partition("\n\n")[0]
    assert dict(line.split(None, 1) for line in listed.splitlines()) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name):
    text, found = imported_by_help(name)
    assert found <= {"numpy", "tqdm"}
    assert text.startswith(f"Usage: fastclstm {name} [OPTIONS]")
    assert text.split("\n\n")[1].strip() == COMMANDS[name]


# --- the rest ---


def test_version_and_help():
    assert fastclstm_cli("--version").stdout == f"{fastclstm.__version__}\n"
    for arguments in ([], ["--help"], ["-h"]):
        result = fastclstm_cli(*arguments)
        assert result.exit_code == 0
        assert all(f"\n  {command} " in result.stdout for command in ("info", "demo", "run", "bench"))
    assert_user_error(fastclstm_cli("nope"), "nope", "try --help")


@pytest.mark.parametrize("close", ["2>&-", "python: sys.stderr.close()", "python: os.close(2)"])
@pytest.mark.parametrize("command", ["run", "forecast", "train"])
def test_without_stderr_the_work_is_done(job, command, close):
    """Services and windowed programs have none."""
    model = Sequential([ConvLSTM2D(3, 3, 3, seed=0, engine="reference")])
    model.save(job.weights)
    np.save(job.frames, np.random.default_rng(0).random((10, 4, 12, 12, 3)))
    arguments = {
        "run": ["run", job.frames, "--weights", job.weights, "--out", job.out],
        "forecast": ["forecast", job.frames, "--weights", job.weights, "--out", job.out],
        "train": ["train", "--data", job.frames, "--epochs", 1, "--steps-in", 3, "--filters", 1, "--out", job.out],
    }[command]
    script = "python -m fastclstm"
    if close.startswith("python: "):
        statement = close.removeprefix("python: ")
        script = f"python -c 'import os, sys; {statement}; from fastclstm.commands import main; main()'"
    shell = f'{script.replace("python", sys.executable, 1)} "$@" {"2>&-" if close == "2>&-" else ""}'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(["sh", "-c", shell, "sh", *map(str, arguments)], env=environment, capture_output=True)
    assert done.returncode == 0, done.stdout
    assert job.out.exists()
    done = subprocess.run(["sh", "-c", shell, "sh", "run", "none.npy", "--weights", "none", "--out", "none"],
                          env=environment, capture_output=True)  # fmt: skip
    assert (done.returncode, done.stdout) == (2, b"")


def test_info_without_a_place_to_print_to():
    done = subprocess.run(["sh", "-c", f"{sys.executable} -m fastclstm info >&-"], stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_info():
    result = fastclstm_cli("info")
    assert result.exit_code == 0
    facts = dict(line.split(None, 1) for line in result.stdout.splitlines() if not line.startswith("kernel cache"))
    assert facts["fastclstm"].startswith(f"{fastclstm.__version__} in ")
    assert facts["numpy"] == np.__version__
    assert "float32" in facts["vectors"]
    assert "layer" in facts["threads"]
    assert "reference (ready)" in facts["engines"]
    assert facts["cuda"].startswith("no: ") == ("cuda (not here)" in facts["engines"])


def demo(*options):
    pytest.importorskip("sklearn")
    return fastclstm_cli("demo", "--batch", 1, "--steps", 2, "--filters", 3, *options)


@pytest.mark.parametrize("engine", ["reference", "cpu", "both"])
def test_demo(engine):
    result = demo("--engine", engine, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "(1, 2, 64, 64, 1)" in result.stdout
    assert "(1, 2, 64, 64, 3)" in result.stdout
    assert "(1, 1, 32, 32, 3)" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    errors = {words[0]: float(words[-1]) for words in lines if words and words[0] in dispatch.ENGINES}
    assert set(errors) == ({"reference", "cpu"} if engine == "both" else {engine})
    assert all(0 < error < 1e-5 for error in errors.values())
    assert "GFLOP/s of float32 FMA" in result.stdout
    assert "threads: 1\n" in result.stdout


def test_demo_measures_nothing_beside_the_threads_of_matrix_products(monkeypatch):
    """NumPy's spin on after a product: whatever is timed comes before the first one."""
    from fastclstm.commands import demo as module
    from fastclstm.engines.cpu import peak

    net, measure, events = module._net, peak.fma_peak_gflops, []
    monkeypatch.setattr(module, "_net", lambda layer, engine, *rest: events.append(engine) or net(layer, engine, *rest))
    monkeypatch.setattr(peak, "fma_peak_gflops", lambda *rest: events.append("peak") or measure(*rest))
    assert demo().exit_code == 0
    assert list(dict.fromkeys(events)) == ["cpu", "peak", "reference"]
    assert events[-2:] == ["reference", "reference"]


@pytest.mark.parametrize("suffix", ["png", "GIF"])
def test_demo_plot(tmp_path, suffix):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    plot = tmp_path / f"plot.{suffix}"
    result = demo("--engine", "reference", "--steps", 5, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert str(plot) in result.stdout
    with image.open(plot) as picture:
        assert picture.format == suffix.upper()
        assert getattr(picture, "n_frames", 1) == (5 if suffix == "GIF" else 1)
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
    assert list(tmp_path.iterdir()) == [plot]


def test_demo_names_what_is_missing(monkeypatch, tmp_path):
    assert_user_error(demo("--engine", "gpu"), "'gpu'", "'both', 'cpu', 'cuda', 'reference'")
    assert_user_error(demo("--plot", "plot.jpg"), "'.png', '.gif'", "'.jpg'")
    assert_user_error(demo("--plot", "no/such/plot.png"), "no/such/plot.png", "cannot write here")
    assert_user_error(demo("--steps", 1), "--steps")
    assert_user_error(demo("--theme", "blue"), "--theme must be one of 'light', 'dark', got 'blue'")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert_user_error(demo("--plot", tmp_path / "plot.png"), "scikit-learn", "pip install 'fastclstm[demo]'")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert_user_error(demo("--plot", tmp_path / "plot.png"), "matplotlib", "pip install 'fastclstm[viz]'")
    assert list(tmp_path.iterdir()) == []


def test_warmup(monkeypatch):
    """Of direct convolution; that warm-ups leave out nothing, and their processes, test_cpu_warmup tells."""
    monkeypatch.setattr(warmup, "_TILES", (None,))
    for options in (["--forward-only"], []):
        result = fastclstm_cli("warmup", "--dtype", "float32", "--processes", "1", *options)
        assert result.exit_code == 0, result.output
        folder = re.escape(str(compilation.cache_folder()))
        assert re.fullmatch(rf"\d+ kernels in [\d.]+ s, kept in {folder}\n", result.stdout)


def test_warmup_says_what_is_wrong(monkeypatch, tmp_path):
    assert_user_error(fastclstm_cli("warmup", "--dtype", "half"), "'float32', 'float64', 'both', got 'half'")
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(compilation, "cache_folder", lambda: tmp_path)
    assert_user_error(fastclstm_cli("warmup"), str(tmp_path), "FASTCLSTM_CACHE_DIR")
    monkeypatch.setattr(compilation, "cache_folder", lambda: None)
    assert_user_error(fastclstm_cli("warmup"), "any folder", "FASTCLSTM_CACHE_DIR")


def test_bench_hands_its_arguments_on(monkeypatch):
    pytest.importorskip("pytest_benchmark")
    monkeypatch.chdir(ROOT)
    with process("bench", "--collect-only", "-q", "-k", "readme and numpy") as child:
        stdout, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    assert "bench/test_convlstm2d.py::" in stdout


def test_bench_says_where_the_suite_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastclstm, "__file__", str(tmp_path / "fastclstm" / "__init__.py"))
    assert_user_error(fastclstm_cli("bench"), "clone of the source repository")
    (tmp_path / "bench").mkdir()
    (tmp_path / "fastclstm").mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_user_error(fastclstm_cli("bench"), "pytest", "pip install 'fastclstm[bench]'")
