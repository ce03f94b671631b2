"""Small graphs, and layers of several arrays, that the tests of graphs share."""

from dataclasses import dataclass

import numpy as np

from fastclstm.layers import Conv2D, ConvLSTM2D, Dense, Dropout, GlobalAveragePooling, Input, Layer
from fastclstm.models import Model

FIXED = {"dtype": "float64", "engine": "reference"}


@dataclass(eq=False, repr=False)
class Joined(Layer):
    """Arrays side by side on the last axis: a layer of others, by what a graph asks of one."""

    def forward(self, arrays, training=False):
        cuts = np.cumsum([array.shape[-1] for array in arrays])[:-1]
        self._pullback = (lambda dy: np.split(dy, cuts, -1)) if training else None
        return np.concatenate(arrays, -1)

    def backward(self, dy):
        return self._recorded()(dy)

    def output_shape(self, shapes):
        if len({shape[:-1] for shape in shapes}) > 1:
            raise ValueError(f"Joined: all axes but the last must agree, got {shapes}")
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))


@dataclass(eq=False, repr=False)
class Summed(Layer):
    """The sum of arrays of one shape; each gets the very same array as its gradient."""

    def forward(self, arrays, training=False):
        count = len(arrays)
        self._pullback = (lambda dy: [dy] * count) if training else None
        return sum(arrays[1:], arrays[0])

    def backward(self, dy):
        return self._recorded()(dy)

    def output_shape(self, shapes):
        if len(set(shapes)) > 1:
            raise ValueError(f"Summed: all shapes must be the same, got {shapes}")
        return shapes[0]


def lstm(C, F, seed=0, **options):
    return ConvLSTM2D(C, F, 3, seed=seed, **FIXED | options)


def conv(C, F, size=3, seed=0, **options):
    return Conv2D(C, F, size, seed=seed, **FIXED | options)


def skip():
    """A skip around a layer, and one from the input."""
    frames = Input((None, 5, 5, 2), name="frames")
    a = lstm(2, 3)(frames)
    b = conv(3, 2, activation="tanh", seed=1)(a)
    return Model(frames, conv(7, 1, 1, seed=2)(Joined()([a, b, frames])))


def shared():
    """One convolution called twice, on what it made itself too."""
    frames, one = Input((5, 5, 2)), conv(2, 2, activation="tanh", kernel_regularizer="l2", name="one")
    a = one(frames)
    return Model(frames, Summed()([one(a), a, frames]))


def forecaster(**options):
    """An encoder whose states a decoder goes on from, with inputs of its own."""
    frames, later = Input((None, 5, 5, 1), name="frames"), Input((None, 5, 5, 2), name="later")
    last, states = lstm(1, 3, return_state=True, return_sequences=False, num_layers=2, **options)(frames)
    y = lstm(2, 3, seed=1, num_layers=2, **options)(later, initial_state=states)
    return Model([frames, later], [conv(3, 1, 1, seed=2)(y), conv(3, 2, 1, seed=3)(last)])


def two_tasks():
    """A trunk with two heads, by name: a map and two numbers."""
    x = Input((4, 4, 2), name="x")
    trunk = Dropout(0.2, seed=7)(conv(2, 3, activation="tanh", name="trunk")(x))
    numbers = Dense(3, 2, dtype="float64", seed=5)(GlobalAveragePooling()(trunk))
    return Model(x, {"map": conv(3, 1, 1, seed=4)(trunk), "numbers": numbers})


def leaf_list(value):
    """The arrays of one, a list, or a dict of them."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else [value]
