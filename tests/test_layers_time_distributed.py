import numpy as np
import pytest
from layer_checks import check_gradients, check_laws, check_saving, close, equal, normal

from fastclstm.layers import (
    Activation,
    BatchNormalization,
    Conv2D,
    ConvLSTM2D,
    ConvLSTM2DCell,
    Dense,
    Dropout,
    Flatten,
    MaxPooling2D,
    MaxPooling3D,
    TimeDistributed,
)
from fastclstm.models import EncoderForecaster, Sequential
from fastclstm.nn import regularizers


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


def test_batch_statistics_are_of_one_step():
    x = normal(3, 4, 2, 2, 2)
    for inner in (BatchNormalization(2, dtype="float64"), Sequential([BatchNormalization(2, dtype="float64")])):
        alone = BatchNormalization(2, dtype="float64")
        y = TimeDistributed(inner)(x, training=True)
        for step in range(4):
            close(y[:, step], alone(x[:, step], training=True))
        close(list(inner.parameters.values())[2], alone.moving_mean)
        close(list(inner.parameters.values())[3], alone.moving_variance)
        inner.trainable = False
        close(TimeDistributed(inner)(x, training=True), TimeDistributed(inner)(x))


def test_gradients_and_penalties_through_batch_statistics():
    def make(**options):
        norm = BatchNormalization(3, dtype="float64", **options)
        return Sequential([Conv2D(2, 3, 3, dtype="float64", seed=0, engine="reference"), norm, Activation("tanh")])

    x = normal(2, 3, 4, 4, 2)
    check_gradients(TimeDistributed(make()), x)
    plain, layer = TimeDistributed(make()), TimeDistributed(make(gamma_regularizer="l2"))
    for each in (plain, layer):
        each.backward(np.ones_like(each(x, training=True)))
    expected = plain.get_gradients()["layer.1.gamma"] + regularizers.get("l2").gradient(layer.layer[1].gamma)
    equal(layer.get_gradients()["layer.1.gamma"], expected)
    equal(layer.get_gradients()["layer.0.kernel"], plain.get_gradients()["layer.0.kernel"])


@pytest.mark.keras
def test_batch_normalization_against_keras(keras):
    x = normal(3, 4, 5, 5, 2).astype(np.float32)
    ours = TimeDistributed(BatchNormalization(2))
    theirs = keras.layers.TimeDistributed(keras.layers.BatchNormalization())
    for _ in range(2):
        expected = theirs(x, training=True)
        close(ours(x, training=True), expected.detach().cpu().numpy(), 1e-5)
    for mine, weight in zip(ours.layer.parameters.values(), theirs.get_weights(), strict=True):
        close(mine, weight, 1e-5)


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


def test_a_convlstm_takes_whole_sequences():
    layer = TimeDistributed(ConvLSTM2D(1, 2, 3, engine="reference"))
    assert layer(np.zeros((2, 3, 4, 5, 5, 1))).shape == (2, 3, 4, 5, 5, 2)
    assert layer.output_shape((None, 3, 4, 5, 5, 1)) == (None, 3, 4, 5, 5, 2)
    for call in (layer, lambda x: layer.output_shape(x.shape)):
        with pytest.raises(
            ValueError, match=r"TimeDistributed: ConvLSTM2D takes whole sequences, so x must be 6D .* 5D"
        ):
            call(np.zeros((2, 3, 5, 5, 1)))
    inner = Sequential([Activation("tanh"), ConvLSTM2D(1, 2, 3, engine="reference")])
    assert TimeDistributed(inner)(np.zeros((2, 3, 4, 5, 5, 1))).shape == (2, 3, 4, 5, 5, 2)
    with pytest.raises(ValueError, match=r"layer 1 \(ConvLSTM2D\) takes \(batch, time, .* but gets 4D \(6, 5, 5, 1\)"):
        TimeDistributed(inner)(np.zeros((2, 3, 5, 5, 1)))


def test_nothing_is_learned_where_the_frames_do_not_fit():
    norm = BatchNormalization(2)
    layer = TimeDistributed(Sequential([norm, Dense(3, 1)]))
    with pytest.raises(ValueError, match="Dense: x must be"):
        layer(np.ones((2, 3, 2)), training=True)
    equal(norm.moving_mean, np.zeros(2))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (ConvLSTM2DCell(1, 1, 3), "ConvLSTM2DCell takes one step at a time; use ConvLSTM2D"),
        (ConvLSTM2D(1, 1, 3, return_state=True), "ConvLSTM2D returns more than one array; give it return_state=False"),
        (MaxPooling3D(return_indices=True), "MaxPooling3D returns more than one array; give it return_indices=False"),
        (EncoderForecaster(1, (1,), 1), "EncoderForecaster must be told how many frames to make; call it by itself"),
        (ConvLSTM2D(1, 1, 3, time_major=True), "give its ConvLSTM2D time_major=False"),
    ],
)
def test_layers_that_do_not_turn_one_array_into_one(layer, message):
    with pytest.raises(ValueError, match=f"TimeDistributed: .*{message}"):
        TimeDistributed(layer)


def test_states_within_are_forgotten():
    layer = TimeDistributed(ConvLSTM2D(1, 2, 3, stateful=True, seed=0, engine="reference"))
    x = normal(2, 3, 4, 5, 5, 1)
    first = layer(x)
    assert not np.array_equal(layer(x), first)
    layer.reset_state()
    equal(layer(x), first)
    model = Sequential([TimeDistributed(Sequential([layer.layer]))])
    model.reset_state()
    equal(model(x), first)
