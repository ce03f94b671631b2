"""Of a layer that nobody asks for the gradient of its input the others are what they are, and that is None.

Here all convolve directly: with tiles the gradient of h may take others together with that of x than alone.
"""

import numpy as np
import pytest

from fastclstm import Conv2D, Conv3D, ConvLSTM2D, EncoderForecaster, Sequential, dispatch, functional
from fastclstm.engines.cpu import input_gradient
from fastclstm.layers import Flatten, TimeDistributed
from fastclstm.layers.base import without_input_gradient

LAYERS = {
    "ConvLSTM2D": lambda: ConvLSTM2D(2, 4, 3, seed=0),
    "two layers": lambda: ConvLSTM2D(2, [4, 3], 3, num_layers=2, seed=0),
    "both directions": lambda: ConvLSTM2D(2, 4, 3, bidirectional=True, seed=0),
    "what NumPy computes": lambda: ConvLSTM2D(2, 4, 3, normalization="layer", dropout=0.1, seed=0),
    "channels first": lambda: ConvLSTM2D(6, 4, 3, data_format="channels_first", seed=0),
    "scaled": lambda: ConvLSTM2D(2, 4, 3, seed=0),
    "Conv2D": lambda: Conv2D(2, 4, 3, seed=0),
    "Conv3D": lambda: Conv3D(2, 4, 3, seed=0),
    "Conv3D, channels first": lambda: Conv3D(5, 4, 3, data_format="channels_first", seed=0),
    "Sequential": lambda: Sequential([Conv2D(2, 3, 3, stride=2, seed=0), ConvLSTM2D(3, 4, 3, seed=1)]),
    "EncoderForecaster": lambda: EncoderForecaster(2, 4, 3, seed=0),
}
pytestmark = pytest.mark.usefixtures("directly")
every_layer = pytest.mark.parametrize("name", LAYERS)


def frames(name):
    return np.random.default_rng(0).standard_normal((2, 5, 6, 7, 2)).astype(np.float32)


def backward(layer, name, asked):
    layer.input_gradient = asked
    if name == "EncoderForecaster":
        y = layer(frames(name), steps=3, training=True)
    else:
        y = layer(frames(name), training=True)
    dx = layer.backward(np.cos(np.arange(y.size, dtype=np.float32)).reshape(y.shape))
    return dx, layer.get_gradients()


@every_layer
def test_the_other_gradients_stay(name):
    results = []
    for asked in (True, False):
        layer = LAYERS[name]()
        if name == "scaled":
            layer.gradient_scale = 0.5
        results.append(backward(layer, name, asked))
    (dx, expected), (nothing, gradients) = results
    assert dx.shape == frames(name).shape
    assert nothing is None
    assert gradients.keys() == expected.keys() != set()
    for key, value in expected.items():
        np.testing.assert_array_equal(gradients[key], value, key)


@pytest.mark.parametrize("engine", dispatch.ENGINES)
@pytest.mark.parametrize("op", ["conv2d", "conv3d", "convlstm2d"])
def test_every_engine_leaves_it_out(engine, op):
    x, draw = frames(""), np.random.default_rng(1).standard_normal
    kernel = draw((3, 3, 2, 8)).astype(np.float32)
    arguments = {"conv2d": (x[:, 0], kernel), "conv3d": (x, np.stack([kernel] * 2)),
                 "convlstm2d": (x, kernel, kernel)}[op]  # fmt: skip
    y, pullback = getattr(functional, f"{op}_vjp")(*arguments, engine=engine)
    expected = pullback(np.ones_like(y))
    y, pullback = getattr(functional, f"{op}_vjp")(*arguments, engine=engine)
    gradients = pullback(np.ones_like(y), input_gradient=False)
    assert expected.keys() - gradients.keys() == {"x"}
    for key, value in gradients.items():
        np.testing.assert_array_equal(value, expected[key], key)


def test_fit_computes_that_of_no_first_layer(monkeypatch):
    model = Sequential([ConvLSTM2D(2, 4, 3, seed=0), ConvLSTM2D(4, 3, 3, seed=1)])
    made, start = [], input_gradient.InputGradient.__init__
    monkeypatch.setattr(input_gradient.InputGradient, "__init__",
                        lambda self, spec, *rest: (made.append(spec.C), start(self, spec, *rest))[1])  # fmt: skip
    x = frames("")
    before = {key: value.copy() for key, value in model.parameters.items()}
    model.fit(x, np.zeros((*x.shape[:-1], 3), np.float32), epochs=1, batch_size=2, quiet=True)
    assert sorted(made) == [4, 4, 4 + 3]  # of the first layer's h; of the second one's x at its first step, and of both
    assert model.input_gradient
    assert all((model.parameters[key] != before[key]).any() for key in before if "kernel" in key)


def test_a_layer_that_knows_nothing_of_it_goes_on_returning_it():
    model = Sequential([TimeDistributed(Flatten())])
    y = model(frames(""), training=True)
    with without_input_gradient(model):
        assert model.backward(np.ones_like(y)).shape == frames("").shape
    assert model.input_gradient
    assert model.layers[0].input_gradient
