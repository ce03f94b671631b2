"""The two networks that ConvLSTM users build most, whole: activity recognition and next-frame prediction."""

import numpy as np
import pytest
from layer_checks import check_gradients, check_laws, check_saving, close, equal, normal

from fastclstm.layers import (
    BatchNormalization,
    Conv3D,
    ConvLSTM2D,
    Dense,
    Dropout,
    Flatten,
    MaxPooling3D,
    TimeDistributed,
)
from fastclstm.models import Sequential


@pytest.fixture(params=["reference", "cpu"])
def engine(request):
    return request.param


def activity_recognition(engine, dtype):
    """Four blocks of ConvLSTM, pooling and dropout, then a class: for (B, T, 18, 18, 3)."""
    fixed = {"engine": engine, "dtype": dtype}
    layers, channels = [], 3
    for index, filters in enumerate((2, 3, 3, 4)):
        layers.append(ConvLSTM2D(channels, filters, 3, "valid" if index == 0 else "same", seed=index, **fixed))
        layers.append(MaxPooling3D((1, 2, 2), padding="same", engine=engine))
        if index < 3:
            layers.append(TimeDistributed(Dropout(0.2, seed=index)))
        channels = filters
    return Sequential([*layers, Flatten(), Dense(3 * 4, 5, "softmax", seed=9, dtype=dtype)])


def next_frames(engine, dtype):
    """Three normalized ConvLSTM layers with smaller and smaller kernels, then a 3D convolution: frames in and out."""
    fixed = {"engine": engine, "dtype": dtype}
    layers, channels = [], 1
    for index, size in enumerate((5, 3, 1)):
        layers.append(ConvLSTM2D(channels, 4, size, activation="relu", seed=index, **fixed))
        layers.append(BatchNormalization(4, dtype=dtype))
        channels = 4
    return Sequential([*layers, Conv3D(4, 1, (3, 3, 3), activation="sigmoid", seed=9, **fixed)])


CASES = [(activity_recognition, (2, 3, 18, 18, 3), (2, 5)), (next_frames, (2, 4, 6, 6, 1), (2, 4, 6, 6, 1))]


@pytest.mark.parametrize(("build", "shape", "expected"), CASES)
def test_forward_backward_and_files(build, shape, expected, engine, tmp_path):
    model, x = build(engine, "float64"), normal(*shape)
    assert model(x).shape == model.output_shape(shape) == expected
    check_gradients(model, x, count=2, tolerance=1e-5)
    check_laws(model, x)
    check_saving(model, x, tmp_path / "model.safetensors")


@pytest.mark.parametrize(("build", "shape", "expected"), CASES)
def test_both_engines_agree(build, shape, expected):
    x = normal(*shape)
    for dtype, tolerance in (("float64", 1e-10), ("float32", 1e-4)):
        models = [build(engine, dtype) for engine in ("reference", "cpu")]
        ours, theirs = (model(x, training=True) for model in models)
        assert ours.dtype == dtype
        close(ours, theirs, tolerance)
        cotangent = normal(*expected, seed=2)
        close(*(model.backward(cotangent) for model in models), tolerance)
        for name, gradient in models[0].get_gradients().items():
            scale = np.abs(gradient).max()
            close(models[1].get_gradients()[name] / scale, gradient / scale, tolerance)


def test_classes_are_probabilities_and_lengths_are_minded(engine):
    model, x = activity_recognition(engine, "float32"), normal(2, 3, 18, 18, 3)
    close(model(x).sum(-1), np.ones(2), 1e-6)
    short = model(x, lengths=np.array([2, 3]))
    x[0, 2] = 99
    equal(model(x, lengths=np.array([2, 3])), short)


def test_training_learns(engine):
    """A few steps down the gradient of the squared error, in float32, make it smaller."""
    model, x = next_frames(engine, "float32"), (normal(2, 5, 6, 6, 1) > 0).astype(np.float32)
    errors = []
    for _ in range(8):
        y = model(x[:, :-1], training=True)
        errors.append(float(np.square(y - x[:, 1:]).mean()))
        model.backward(2 * (y - x[:, 1:]) / y.size)
        gradients = model.get_gradients()
        model.set_parameters({n: a - 0.5 * gradients[n] if n in gradients else a for n, a in model.parameters.items()})
    assert errors[-1] < 0.9 * errors[0]
