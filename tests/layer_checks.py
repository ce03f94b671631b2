"""What the tests of layers share: gradients by central differences, and laws that every layer keeps."""

import copy
import os

import numpy as np
import pytest


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape)


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def equal(a, b):
    np.testing.assert_array_equal(a, b)


def loss(layer, x, cotangent, name=None, array=None, **options):
    """Scalar whose gradient a layer's backward returns for `cotangent`, with one parameter replaced."""
    probe = copy.deepcopy(layer)  # the generator of a dropout too: every probe draws the same
    if name is not None:
        probe.set_parameters(probe.parameters | {name: array})
    return float(np.sum(probe(x, training=True, **options) * cotangent))


def differences(function, array, places, step=1e-6):
    """Central differences of function(array) at some flat places."""
    slopes = []
    for place in places:
        moved = np.array(array, np.float64)
        moved.flat[place] += step
        above = function(moved)
        moved.flat[place] -= 2 * step
        slopes.append((above - function(moved)) / (2 * step))
    return np.array(slopes)


def check_gradients(layer, x, count=6, tolerance=1e-7, seed=3, **options):
    """Compare backward with central differences at some elements of x and of every trainable parameter."""
    rng = np.random.default_rng(seed)
    trained = copy.deepcopy(layer)
    y = trained(x, training=True, **options)
    cotangent = rng.standard_normal(y.shape)
    dx = trained.backward(cotangent)
    assert dx.shape == x.shape
    assert dx.dtype == y.dtype == np.float64
    gradients = trained.get_gradients()
    assert list(gradients) == list(layer.trainable_parameters)
    expected = {None: (x, dx)} | {name: (layer.parameters[name], gradients[name]) for name in gradients}
    for name, (array, gradient) in expected.items():
        assert gradient.shape == array.shape, name
        places = rng.choice(array.size, min(count, array.size), replace=False)
        if name is None:
            slopes = differences(lambda moved: loss(layer, moved, cotangent, **options), array, places)
        else:
            slopes = differences(lambda moved, n=name: loss(layer, x, cotangent, n, moved, **options), array, places)
        np.testing.assert_allclose(gradient.flat[places], slopes, rtol=tolerance, atol=tolerance, err_msg=str(name))


def check_laws(layer, x):
    """Shapes as said, inputs unchanged, an empty batch, frames of any strides, and backward only after training."""
    before = x.copy()
    y = layer(x)
    assert y.shape == layer.output_shape(x.shape)
    equal(x, before)
    equal(layer(np.asfortranarray(x)), y)
    assert layer(x[:0]).shape == layer.output_shape((0, *x.shape[1:])) == (0, *y.shape[1:])
    with pytest.raises(RuntimeError, match="training"):
        layer.backward(y)
    y = layer(x[:0], training=True)
    assert layer.backward(y).shape == x[:0].shape
    y = layer(x, training=True)
    dx = layer.backward(np.ones_like(y))
    assert dx.shape == x.shape
    equal(x, before)
    with pytest.raises(ValueError, match="dy"):
        layer.backward(np.ones((*y.shape, 1)))


def check_saving(layer, x, path):
    """A saved layer comes back with the same options, the same bytes and the same output."""
    layer.save(path)
    back = type(layer).load(path)
    assert repr(back) == repr(layer)
    assert list(back.parameters) == list(layer.parameters)
    for name, array in layer.parameters.items():
        assert back.parameters[name].tobytes() == array.tobytes()
        assert back.parameters[name].dtype == array.dtype
    equal(back(x), layer(x))
    return back


def check_penalties(layer, x, place):
    """Gradients are those of the loss with the penalty; the constraint of the parameter at `place` is applied."""
    y = layer(x, training=True)
    layer.backward(np.zeros_like(y))
    for name, gradient in layer.get_gradients().items():

        def penalty(moved, name=name):
            probe = copy.deepcopy(layer)
            probe.set_parameters(probe.parameters | {name: moved})
            return probe.penalty

        array = layer.parameters[name]
        close(gradient.ravel(), differences(penalty, array, range(array.size)), 1e-7)
        assert gradient.any(), name
    layer.set_parameters(layer.parameters | {place: -np.ones_like(layer.parameters[place])})
    layer.apply_constraints()
    equal(layer.parameters[place], np.zeros_like(layer.parameters[place]))


def check_complex_step(layer, x, count=8, seed=5):
    """Compare the pullback with complex steps at some elements of x and of every trainable parameter, to rounding."""
    rng = np.random.default_rng(seed)

    def run(x, **parameters):
        probe = copy.deepcopy(layer)
        probe._parameters |= parameters
        return probe, *probe._apply(x, True)

    probe, y, pull = run(x)
    cotangent = rng.standard_normal(y.shape)
    dx = pull(cotangent)
    expected = {None: (x, dx)} | {name: (layer.parameters[name], g) for name, g in probe.get_gradients().items()}
    assert set(expected) - {None} == set(layer.trainable_parameters)
    for name, (array, gradient) in expected.items():
        for place in rng.choice(array.size, min(count, array.size), replace=False):
            moved = array.astype(complex)
            moved.flat[place] += 1e-30j
            shifted = run(moved)[1] if name is None else run(x.astype(complex), **{name: moved})[1]
            slope = np.sum(shifted.imag * cotangent) / 1e-30
            np.testing.assert_allclose(gradient.flat[place], slope, rtol=1e-11, atol=1e-12, err_msg=str(name))


def check_layer(layer, x, path):
    """All of them, for a layer that computes in NumPy."""
    check_gradients(layer, x)
    check_complex_step(layer, x)
    check_laws(layer, x)
    check_saving(layer, x, path)


def check_against_torch(layer, x, function, *parameters):
    """Compare with ``function(x, *parameters)`` of PyTorch: the values and all gradients.

    Of parameters there are pairs (name here, function that turns its array into PyTorch's).
    """
    torch = pytest.importorskip("torch")
    leaves = [torch.tensor(np.array(a), requires_grad=True)
              for a in (x, *(turn(layer.parameters[name]) for name, turn in parameters))]  # fmt: skip
    theirs = function(*leaves)
    y = layer(x, training=True)
    close(y, theirs.detach().numpy())
    dy = normal(*y.shape, seed=2)
    theirs.backward(torch.tensor(dy))
    close(layer.backward(dy), leaves[0].grad.numpy(), 1e-11)
    for (name, turn), leaf in zip(parameters, leaves[1:], strict=True):
        close(turn(layer.get_gradients()[name]), leaf.grad.numpy(), 1e-11)


IN_FLOAT32 = 1e-6
"""Tolerance of comparisons with operations of Keras that round to float32."""


def keras_values(make, x, weights=(), **call):
    """Return what a layer of Keras, in float64 on PyTorch, makes of x; some of its operations round to float32."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    pytest.importorskip("torch")
    keras = pytest.importorskip("keras")
    layer, several = make(keras.layers), isinstance(x, list)
    layer.build([a.shape for a in x] if several else x.shape)
    layer.set_weights(list(weights))
    arrays = [keras.ops.convert_to_tensor(a, "float64") for a in x] if several else x
    result = layer(arrays, **call)
    return [r.detach().numpy() for r in result] if isinstance(result, list | tuple) else result.detach().numpy()
