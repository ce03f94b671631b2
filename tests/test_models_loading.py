"""fastclstm.load: a file names the class of what it holds."""

import numpy as np
import pytest

import fastclstm
from fastclstm import LSTM, Conv2D, ConvLSTM2D, Dense, EncoderForecaster, Sequential

SAVED = [
    ConvLSTM2D(1, 2, 3, seed=0),
    Sequential([Conv2D(1, 2, 3, seed=0), Sequential([Conv2D(2, 1, 3, seed=1)])]),
    EncoderForecaster(1, (2,), 3, seed=0),
]


@pytest.mark.parametrize("saved", SAVED, ids=lambda saved: type(saved).__name__)
def test_a_file_tells_its_class(saved, tmp_path):
    saved.save(tmp_path / "w.safetensors")
    loaded = fastclstm.load(tmp_path / "w.safetensors")
    assert type(loaded) is type(saved)
    assert repr(loaded) == repr(saved)
    for name, array in saved.parameters.items():
        np.testing.assert_array_equal(loaded.parameters[name], array)


def test_options_replace_those_in_the_file(tmp_path):
    ConvLSTM2D(1, 2, 3, activation=(np.tanh, lambda z: 1 - np.tanh(z) ** 2)).save(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="had functions as options"):
        fastclstm.load(tmp_path / "w.safetensors")
    loaded = fastclstm.load(tmp_path / "w.safetensors", activation="tanh", return_state=True)
    assert (loaded.activation, loaded.return_state) == ("tanh", True)


def test_what_is_no_network_is_refused_by_name(tmp_path):
    path = tmp_path / "run.safetensors"
    Sequential([Dense(1, 1)]).fit(np.zeros((2, 1)), np.zeros((2, 1)), checkpoint=path)
    with pytest.raises(ValueError, match=r"run\.safetensors is the checkpoint of a training.*resume=True"):
        fastclstm.load(path)
    fastclstm.io.weights.save(path, {}, {"class": "other.Net", "options": {}})
    with pytest.raises(ValueError, match=r"does not fit: unknown class 'other\.Net'; import the module"):
        fastclstm.load(path)
    with pytest.raises(FileNotFoundError):
        fastclstm.load(tmp_path / "none")


def test_a_wrong_class_names_the_way(tmp_path):
    Dense(1, 1).save(tmp_path / "w.safetensors")
    with pytest.raises(
        ValueError, match=r"holds a Dense, not a ConvLSTM2D; load it with that class, or with fastclstm\.load"
    ):
        ConvLSTM2D.load(tmp_path / "w.safetensors")
    EncoderForecaster(1, (1,), 3).save(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="holds an EncoderForecaster, not an LSTM; load it"):
        LSTM.load(tmp_path / "w.safetensors")


def test_what_else_is_to_be_known_is_kept(tmp_path):
    Dense(3, 2, seed=0).save(tmp_path / "w.safetensors", about={"frames": {"units": "mm/h"}})
    assert fastclstm.io.weights.load(tmp_path / "w.safetensors")[1]["about"] == {"frames": {"units": "mm/h"}}
    assert isinstance(fastclstm.load(tmp_path / "w.safetensors"), Dense)
