"""Small models and data that the tests of training share."""

import numpy as np

from fastclstm.layers import BatchNormalization, Conv2D, ConvLSTM2D, Dense, Dropout, TimeDistributed
from fastclstm.models import Sequential


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape)


X, Y = normal(10, 3), normal(10, 2, seed=2)


def dense(**options):
    return Sequential([Dense(3, 4, "tanh", seed=0, dtype="float64"), Dense(4, 2, seed=1, dtype="float64", **options)])


def lossy(seed=0):
    """A model in which everything draws: dropout of values, of gates and of steps, and batch statistics."""
    lstm = ConvLSTM2D(1, 2, 3, seed=seed, dropout=0.3, recurrent_dropout=0.2, time_dropout=0.2, engine="reference")
    inner = Sequential([TimeDistributed(Dropout(0.3, seed=5)), BatchNormalization(2)])
    return Sequential([lstm, inner, TimeDistributed(Conv2D(2, 1, 3, seed=1, engine="reference"))])


FILMS = normal(6, 4, 5, 5, 1).astype(np.float32)


def same(model, other):
    a, b = model.parameters, other.parameters
    return list(a) == list(b) and all(a[n].tobytes() == b[n].tobytes() for n in a)


def fit(model, x=X, y=Y, **options):
    return model.fit(x, y, **{"batch_size": 4, "seed": 0, "quiet": True} | options)
