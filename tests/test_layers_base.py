"""What all layers and models share with estimators of scikit-learn: copies, clones, work in other processes."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest

from fastclstm import Conv2D, ConvLSTM2D, Dense, EncoderForecaster, Flatten, Input, Model, Sequential, TimeDistributed


def _graph():
    x = Input((3, 6, 6, 1), name="frames")
    frames = TimeDistributed(Sequential([Conv2D(1, 2, 3, activation=(np.sin, np.cos), seed=0)]))(x)
    return Model(x, Dense(72, 2, seed=2)(Flatten()(ConvLSTM2D(2, 2, 3, return_sequences=False, seed=1)(frames))))


THINGS = {
    "layer": lambda: ConvLSTM2D(1, 2, 3, num_layers=2, seed=0),
    "Sequential": lambda: Sequential([ConvLSTM2D(1, 2, 3, seed=0), Conv2D(2, 1, 1, seed=1)]),
    "Model": _graph,
    "EncoderForecaster": lambda: EncoderForecaster(1, (2, 3), 3, seed=0),
}


@pytest.fixture(params=THINGS)
def thing(request):
    made = THINGS[request.param]()
    made.set_parameters({name: array + 1 for name, array in made.parameters.items()})  # what a training might leave
    return made


x = np.random.default_rng(0).random((2, 3, 6, 6, 1), np.float32)


def called(thing):
    """The function of frames, as it goes to other processes too."""
    return partial(thing, steps=2) if isinstance(thing, EncoderForecaster) else thing


def test_clones_have_the_options_and_parameters_of_their_own(thing):
    base = pytest.importorskip("sklearn.base")
    clone = base.clone(thing)
    assert type(clone) is type(thing)
    assert repr(clone) == repr(thing)
    assert clone.get_params().keys() == thing.options.keys()
    for name, array in clone.parameters.items():  # drawn by the same seeds
        np.testing.assert_array_equal(array + 1, thing.parameters[name])
    clone.set_parameters({name: 2 * array for name, array in clone.parameters.items()})
    assert all(np.abs(array - clone.parameters[name]).max() > 0 for name, array in thing.parameters.items())


def test_copies_compute_the_same(thing):
    expected = called(thing)(x)
    copies = [copy.deepcopy(thing)]
    if not isinstance(thing, Model):  # it has functions of this file, which a pickle names
        copies.append(pickle.loads(pickle.dumps(thing)))
    for one in copies:
        np.testing.assert_array_equal(called(one)(x), expected)


def test_jobs_in_processes_and_in_threads(thing):
    joblib = pytest.importorskip("joblib")
    expected = called(thing)(x)
    for prefer in ("processes", "threads"):
        for got in joblib.Parallel(2, prefer=prefer)(joblib.delayed(called(thing))(x) for _ in range(3)):
            np.testing.assert_array_equal(got, expected)
