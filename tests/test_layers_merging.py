import copy

import numpy as np
import pytest
from layer_checks import IN_FLOAT32, close, equal, keras_values, normal

from fastclstm.layers import Add, Average, Concatenate, Maximum, Minimum, Multiply, Subtract, TimeDistributed
from fastclstm.models import Sequential

SAME = [(2, 3, 4), (2, 3, 4)]
BROADCAST = [(2, 3, 1), (2, 1, 4), (2, 4)]
CASES = [
    (Concatenate(), [(2, 3, 4), (2, 3, 1), (2, 3, 2)]),
    (Concatenate(1), [(2, 3, 2, 2), (2, 1, 2, 2)]),
    (Concatenate(-3), [(2, 5, 3, 2, 2), (2, 5, 1, 2, 2)]),
    (Concatenate(), [(2, 3)]),
    (Subtract(), SAME),
    (Subtract(), [(2, 3, 1), (2, 4)]),
    *(
        (kind(), shapes)
        for kind in (Add, Multiply, Average, Maximum, Minimum)
        for shapes in (SAME, BROADCAST, SAME[:1])
    ),
]


def arrays_of(shapes):
    return [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize(("layer", "shapes"), CASES, ids=str)
def test_gradients(layer, shapes):
    arrays = arrays_of(shapes)
    y = layer(arrays, training=True)
    assert y.shape == layer.output_shape(shapes)
    dy = normal(*y.shape, seed=9)
    gradients = layer.backward(dy)
    assert isinstance(gradients, list)
    assert [g.shape for g in gradients] == shapes
    for index, array in enumerate(arrays):
        for place in range(array.size):
            moved = [a.copy() for a in arrays]
            moved[index].flat[place] += 1e-6
            above = layer(moved)
            moved[index].flat[place] -= 2e-6
            close(gradients[index].flat[place], np.sum((above - layer(moved)) * dy) / 2e-6, 1e-7)
    for index in range(len(arrays)):  # to rounding, where the function is analytic
        if isinstance(layer, Maximum):
            break
        wide = [a.astype(complex) for a in arrays]
        wide[index].flat[0] += 1e-30j
        close(gradients[index].flat[0], np.sum(layer._merge(wide)[0].imag * dy) / 1e-30)


@pytest.mark.parametrize(("layer", "shapes"), CASES, ids=str)
def test_laws(layer, shapes):
    arrays = arrays_of(shapes)
    before = copy.deepcopy(arrays)
    y = layer(arrays)
    equal(layer([np.asfortranarray(a) for a in arrays]), y)
    equal(layer(tuple(arrays)), y)
    with pytest.raises(RuntimeError, match="training"):
        layer.backward(y)
    y = layer(arrays, training=True)
    for gradient in layer.backward(np.ones_like(y)):
        gradient += 1  # the caller's own
    y += 1
    for a, b in zip(arrays, before, strict=True):
        equal(a, b)
    with pytest.raises(ValueError, match="dy has shape"):
        layer.backward(np.ones((*y.shape, 1)))
    assert layer([a.astype(np.float32) for a in arrays]).dtype == np.float32
    empty = [a[:0] for a in arrays]
    assert layer(empty, training=True).shape == (0, *y.shape[1:])
    assert [g.shape for g in layer.backward(np.zeros((0, *y.shape[1:])))] == [a.shape for a in empty]


@pytest.mark.parametrize(("layer", "shapes"), CASES, ids=str)
def test_the_gradient_of_each_array_is_scaled(layer, shapes):
    arrays, half = arrays_of(shapes), copy.deepcopy(layer)
    half.gradient_scale = 0.5
    y = layer(arrays, training=True)
    half(arrays, training=True)
    for whole, scaled in zip(layer.backward(y), half.backward(y), strict=True):
        close(scaled, whole / 2)


def test_numbers():
    a, b = np.array([[1.0, 4.0, np.nan, 2.0]]), np.array([[3.0, 2.0, 1.0, 2.0]])
    equal(Maximum()([a, b]), [[3, 4, np.nan, 2]])
    equal(Minimum()([b, a]), [[1, 2, np.nan, 2]])
    layer = Maximum()
    layer([a, b], training=True)
    equal(layer.backward(np.ones((1, 4))), [[[0, 1, 1, 1]], [[1, 0, 0, 0]]])
    equal(Multiply()([a[:, :2], b[:, :2], [[2.0, 2.0]]]), [[6, 16]])


@pytest.mark.keras
@pytest.mark.parametrize("name", ["Add", "Multiply", "Average", "Maximum", "Minimum", "Subtract", "Concatenate"])
def test_values_of_keras(name):
    layer = {kind.__name__: kind for kind in (Add, Multiply, Average, Maximum, Minimum, Subtract, Concatenate)}[name]()
    shapes = [(2, 3, 4), (2, 3, 4)] if name in ("Subtract", "Concatenate") else [(2, 3, 4)] * 3
    cases = [shapes] if name == "Concatenate" else [shapes, [(2, 3, 1), (2, 1, 4)], [(2, 4), (2, 3, 1)]]
    for case in cases:
        arrays = arrays_of(case)
        theirs = keras_values(lambda L: getattr(L, name)(dtype="float64"), arrays)
        close(layer(arrays), theirs, IN_FLOAT32)


def test_mixed_dtypes_are_computed_in_the_wider_one():
    y = Add()([np.ones((1, 2), np.float32), np.ones((1, 2))])
    assert y.dtype == np.float64


def test_saving(tmp_path):
    for layer in (Concatenate(-3), Maximum()):
        layer.save(tmp_path / "layer")
        assert repr(type(layer).load(tmp_path / "layer")) == repr(layer)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: Add()(np.ones((2, 3))), ValueError, "Add: takes a list of arrays, got ndarray"),
        (lambda: Add()([]), ValueError, "Add: takes a list of arrays, got 0 items"),
        (lambda: Subtract()(arrays_of([(2,)] * 3)), ValueError, "Subtract: takes a list of 2 arrays, got 3 items"),
        (
            lambda: Add()(arrays_of([(2, 3), (2, 4)])),
            ValueError,
            r"Add: arrays of \(2, 3\) and \(2, 4\) do not go together; every axis must be the same or 1",
        ),
        (
            lambda: Concatenate()(arrays_of([(2, 3, 4), (2, 2, 4)])),
            ValueError,
            r"Concatenate: all axes but -1 must be those of the first array, \(2, 3, 4\), but array 1 is \(2, 2, 4\)",
        ),
        (lambda: Concatenate(2)(arrays_of([(2, 3)])), ValueError, "axis 2 is none of those after the batch"),
        (lambda: Concatenate(-2)(arrays_of([(2, 3)])), ValueError, "axis -2 is none of those after the batch"),
        (lambda: Concatenate(0), ValueError, "axis must not be 0, that of the batch"),
        (lambda: Concatenate("last"), TypeError, "Concatenate: axis must be an integer"),
        (lambda: Add()([[[1], [2, 3]]]), TypeError, "Add: array 0 is not a rectangular array"),
        (
            lambda: Sequential([Add()]),
            ValueError,
            r"layer 0 .*takes a list of arrays.*use it in a graph|layer 0, Add take",
        ),
        (lambda: TimeDistributed(Add()), ValueError, "TimeDistributed: Add takes a list of arrays"),
    ],
)
def test_errors(run, error, message):
    with pytest.raises(error, match=message):
        run()


def test_unknown_sizes_go_through():
    assert Add().output_shape([(None, 3, 1), (None, 3, 4)]) == (None, 3, 4)
    assert Concatenate(1).output_shape([(None, None, 4), (None, 2, 4)]) == (None, None, 4)
