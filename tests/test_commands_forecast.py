"""python -m fastclstm forecast: the frames that follow."""

import numpy as np
import pytest
from test_commands import assert_user_error, fastclstm_cli

from fastclstm import Conv2D, ConvLSTM2D, EncoderForecaster, Flatten, MaxPooling3D, Sequential, TimeDistributed
from fastclstm.models.roll_out import roll_out

X = np.random.default_rng(0).random((3, 4, 6, 5, 2))


def next_frames(**options):
    return Sequential([ConvLSTM2D(2, 3, 3, seed=0, **options), TimeDistributed(Conv2D(3, 2, 3, seed=1))])


NETWORKS = {
    "of all steps": next_frames,
    "of the last step": lambda: Sequential([ConvLSTM2D(2, 3, 3, return_sequences=False), Conv2D(3, 2, 3)]),
    "a layer": lambda: ConvLSTM2D(2, 2, 3, seed=0, stateful=True, time_major=True, return_state=True),
    "an encoder": lambda: EncoderForecaster(2, (3,), 3, seed=0),
}


class Job:
    def __init__(self, folder):
        self.folder = folder
        self.frames, self.weights, self.out = folder / "frames.npy", folder / "w.safetensors", folder / "out.npy"
        np.save(self.frames, X)

    def run(self, model, *options):
        model.save(self.weights)
        return fastclstm_cli("forecast", self.frames, "--weights", self.weights, "--out", self.out, *options)


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def expected(model, x, steps):
    """Frame by frame, the last four of the film each time."""
    if isinstance(model, EncoderForecaster):
        return model.forecast(x, steps)
    if isinstance(model, ConvLSTM2D):
        model = Sequential([ConvLSTM2D(2, 2, 3, seed=0)])
    for _ in range(steps):
        y = model(x[:, -4:])
        x = np.concatenate([x, (y[:, -1] if y.ndim == 5 else y)[:, None]], 1)
    return x[:, 4:]


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("network", NETWORKS)
def test_each_frame_is_made_from_those_before(job, network, batch):
    model = NETWORKS[network]()
    result = job.run(model, "--steps", 3, "--batch", batch)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{job.out}: (3, 3, 6, 5, 2)\n"
    np.testing.assert_allclose(np.load(job.out), expected(model, X, 3), rtol=0, atol=1e-6)
    assert sorted(path.name for path in job.folder.iterdir()) == ["frames.npy", "out.npy", "w.safetensors"]


def test_values_are_scaled_on_the_way_in_and_out(job):
    model = next_frames(dtype="float64")
    np.save(job.frames, np.rint(X * 200 - 100).astype(np.int16))
    result = job.run(model, "--steps", 2, "--scale", -100, 100, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    x = (np.rint(X * 200 - 100) + 100) / 200
    np.testing.assert_allclose(np.load(job.out), expected(model, x, 2) * 200 - 100, rtol=0, atol=1e-4)
    assert_user_error(job.run(model, "--scale", 1, 1), "LOW must be the smaller, got 1 1")


def test_a_file_of_one_sequence(job):
    model = next_frames()
    np.save(job.frames, X[0])
    assert job.run(model, "--steps", 2, "--engine", "reference").exit_code == 0
    np.testing.assert_allclose(np.load(job.out), expected(model, X[:1], 2)[0], rtol=0, atol=1e-6)
    np.save(job.frames, X[0, ..., 0])
    grey = Sequential([ConvLSTM2D(1, 1, 3, seed=0, data_format="channels_first")])
    assert job.run(grey, "--steps", 2).exit_code == 0
    assert np.load(job.out).shape == (2, 1, 6, 5)
    encoder = EncoderForecaster(1, (2,), 3, seed=0, data_format="channels_first")
    assert job.run(encoder, "--steps", 2).exit_code == 0
    np.testing.assert_allclose(np.load(job.out), encoder.forecast(X[:1, :, None, ..., 0], 2)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda: MaxPooling3D(), ["holds a MaxPooling3D without a ConvLSTM2D"]),
        (lambda: Sequential([ConvLSTM2D(2, 3, 3)]), ["made (3, 4, 6, 5, 3) of frames (3, 4, 6, 5, 2)", "same size"]),
        (lambda: Sequential([ConvLSTM2D(2, 2, 3, return_sequences=False), Flatten()]), ["made (3, 60)", "same size"]),
        (lambda: ConvLSTM2D(2, 2, 3, bidirectional=True, merge_mode=None), ["made tuple", "same size"]),
        (lambda: Sequential([ConvLSTM2D(1, 1, 3)]), ["2 channels", "takes 1"]),
    ],
)
def test_errors_say_what_foretells(job, network, words):
    assert_user_error(job.run(network()), *words)
    assert not job.out.exists()
    assert_user_error(job.run(next_frames(), "--out", job.frames), "frames.npy would overwrite")
    assert_user_error(job.run(next_frames(), "--out", job.folder / "out.nc"), "written as .npy, but --out is")


def test_a_theme_that_there_is_not_is_refused_for_arrays_too(job):
    told = "forecast: --theme must be one of 'light', 'dark', got 'blue'"
    assert_user_error(job.run(next_frames(), "--theme", "blue"), told)
    assert not job.out.exists()


def test_the_window_is_as_long_as_what_is_given():
    seen = []

    class Net(ConvLSTM2D):
        def forward(self, x, **options):
            seen.append(x.shape[1])
            return super().forward(x, **options)

    roll_out(Net(2, 2, 3), X, 3)
    assert seen == [4, 4, 4]
