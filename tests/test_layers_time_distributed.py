import numpy as np
import pytest
from layer_checks import check_gradients, check_laws, check_saving, close, equal, normal

from fastclstm.layers import BatchNormalization, Conv2D, Dense, Dropout, Flatten, MaxPooling2D, TimeDistributed


@pytest.mark.parametrize(
    "inner",
    [
        Conv2D(2, 3, 3, dtype="float64", seed=0, engine="reference"),
        MaxPooling2D(engine="reference"),
        Dense(2, 3, "softmax", dtype="float64", seed=0),
        BatchNormalization(2, dtype="float64"),
        Dropout(0.3, seed=0),
        Flatten(),
    ],
    ids=repr,
)
def test_gradients_and_laws(inner):
    x = normal(2, 3, 4, 4, 2)
    check_gradients(TimeDistributed(inner), x)
    check_laws(TimeDistributed(inner), x)


def test_every_step_gets_the_layer():
    inner = Conv2D(2, 3, 3, "valid", dtype="float64", seed=0, engine="reference")
    x = normal(2, 3, 5, 5, 2)
    y = TimeDistributed(inner)(x)
    for t in range(3):
        close(y[:, t], inner(x[:, t]))


def test_dropout_is_drawn_for_every_frame():
    y = TimeDistributed(Dropout(0.5, noise_shape=(None, 1, 1, 1), seed=0))(np.ones((8, 8, 2, 2, 1)), training=True)
    dropped = y[:, :, 0, 0, 0] == 0
    equal(y, np.broadcast_to(y[:, :, :1, :1], y.shape))
    assert dropped.any()
    assert not dropped.all(1).any()
    assert not dropped.all(0).any()


def test_parameters_gradients_and_freezing():
    layer = TimeDistributed(Dense(2, 3, dtype="float64", seed=0))
    assert list(layer.parameters) == ["layer.kernel", "layer.bias"]
    y = layer(normal(2, 3, 2), training=True)
    layer.backward(y)
    close(layer.get_gradients()["layer.bias"], y.sum((0, 1)))
    layer.trainable = False
    assert not layer.layer.trainable
    layer(normal(2, 3, 2), training=True)
    layer.backward(y)
    assert layer.get_gradients() == {}


def test_errors_say_which_layer():
    with pytest.raises(TypeError, match="TimeDistributed: layer must be a layer, got int"):
        TimeDistributed(3)
    with pytest.raises(ValueError, match=r"TimeDistributed: x must be \(batch, time, …\), got 1D"):
        TimeDistributed(Flatten())(np.ones(3))
    with pytest.raises(ValueError, match="Dense: x must be") as caught:
        TimeDistributed(Dense(2, 3))(np.ones((2, 3, 4)))
    assert caught.value.__notes__ == ["in TimeDistributed(Dense)"]


def test_saving(tmp_path):
    layer = TimeDistributed(Dense(2, 3, "tanh", seed=0))
    assert repr(layer) == "TimeDistributed(layer=Dense(in_features=2, out_features=3, activation='tanh', seed=0))"
    check_saving(layer, normal(2, 3, 2), tmp_path / "layer.safetensors")
