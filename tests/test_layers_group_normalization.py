import numpy as np
import pytest
from layer_checks import (
    IN_FLOAT32,
    check_against_torch,
    check_layer,
    check_penalties,
    close,
    equal,
    keras_values,
    normal,
)

from fastclstm.layers import GroupNormalization, InstanceNormalization, LayerNormalization

FIXED = {"dtype": "float64", "seed": 0, "gamma_initializer": "random_normal", "beta_initializer": "random_normal"}
LAYERS = [
    (GroupNormalization(4, 2, **FIXED), (2, 3, 5, 4)),
    (GroupNormalization(4, 2, **FIXED), (2, 2, 3, 2, 4)),
    (GroupNormalization(4, 4, scale=False, epsilon=0.1, **FIXED), (2, 5, 4)),
    (GroupNormalization(4, 1, center=False, **FIXED), (3, 4)),
    (GroupNormalization(4, 2, data_format="channels_first", **FIXED), (2, 2, 4, 3, 2)),
    (GroupNormalization(4, 2, axis=1, **FIXED), (2, 4, 2, 3, 2)),
    (InstanceNormalization(3, **FIXED), (2, 3, 4, 3)),
    (InstanceNormalization(3, axis=1, center=False, scale=False, dtype="float64"), (2, 3, 4, 2)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_gradients_and_laws(layer, shape, tmp_path):
    check_layer(layer, normal(*shape), tmp_path / "layer")


def test_every_group_of_every_sample_is_normalized():
    x = 3 + 5 * normal(2, 4, 5, 6)
    y = GroupNormalization(6, 3, epsilon=1e-9, dtype="float64")(x).reshape(2, 4, 5, 3, 2)
    close(y.mean((1, 2, 4)), np.zeros((2, 3)), 1e-9)
    close(y.var((1, 2, 4)), np.ones((2, 3)), 1e-9)
    close(GroupNormalization(6, 1, dtype="float64")(x), LayerNormalization((4, 5, 6), dtype="float64")(x))
    equal(GroupNormalization(6, -1, dtype="float64")(x), InstanceNormalization(6, dtype="float64")(x))
    equal(GroupNormalization(6, -1, dtype="float64")(x), GroupNormalization(6, 6, dtype="float64")(x))


@pytest.mark.torch
def test_values_and_gradients_of_torch():
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    for shape in ((2, 4, 5, 3), (2, 4, 3, 2, 3)):
        layer, x = GroupNormalization(4, 2, axis=1, epsilon=1e-5, **FIXED), normal(*shape)
        both = [("gamma", np.array), ("beta", np.array)]
        check_against_torch(layer, x, lambda x, w, b: F.group_norm(x, 2, w, b), *both)
        layer = InstanceNormalization(4, axis=1, epsilon=1e-5, **FIXED)
        check_against_torch(layer, x, lambda x, w, b: F.instance_norm(x, weight=w, bias=b), *both)


@pytest.mark.keras
@pytest.mark.parametrize(
    ("groups", "shape", "axis"), [(2, (2, 3, 5, 4), -1), (4, (2, 4, 3, 2, 3), 1), (-1, (2, 3, 4), -1)]
)
def test_values_of_keras(groups, shape, axis):
    layer, x = GroupNormalization(4, groups, axis=axis, epsilon=0.01, **FIXED), normal(*shape)
    theirs = keras_values(
        lambda L: L.GroupNormalization(groups, axis, 0.01, dtype="float64"), x, layer.parameters.values()
    )
    close(layer(x), theirs, IN_FLOAT32)


def test_float32_does_not_lose_the_variance_of_large_values():
    x = (1e4 + normal(1, 64, 64, 2)).astype(np.float32)
    y = GroupNormalization(2, 1, epsilon=1e-6)(x)
    assert y.dtype == np.float32
    close(y, GroupNormalization(2, 1, epsilon=1e-6, dtype="float64")(x), 2e-3)


def test_penalties():
    layer = GroupNormalization(2, 1, gamma_regularizer="l2", beta_regularizer="l1", gamma_constraint="non_neg", **FIXED)
    check_penalties(layer, normal(2, 3, 2), "gamma")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupNormalization(4, 3), "GroupNormalization: groups must divide the 4 channels or be -1, got 3"),
        (lambda: GroupNormalization(4, 0), "groups must divide"),
        (lambda: GroupNormalization(4), "groups must divide the 4 channels or be -1, got 32"),
        (lambda: GroupNormalization(4, 2, axis=1, data_format="channels_first"), "is axis=-3, got axis=1"),
        (lambda: GroupNormalization(4, 2, epsilon=0), "epsilon must be a number > 0"),
        (
            lambda: InstanceNormalization(4, 2),
            "InstanceNormalization: groups must be -1, each channel by itself, got 2",
        ),
        (
            lambda: GroupNormalization(4, 2)(np.zeros((1, 3, 3, 2))),
            r"4 channels on axis -1, .* got shape \(1, 3, 3, 2\)",
        ),
        (lambda: GroupNormalization(4, 2, axis=0)(np.zeros((4, 3))), "x must have at least 2 axes"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="axis must be an integer"):
        GroupNormalization(4, 2, axis="last")
