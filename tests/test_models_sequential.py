import copy
import inspect
import pickle

import numpy as np
import pytest
from layer_checks import check_gradients, check_laws, check_penalties, check_saving, close, equal, normal

from fastclstm.layers import (
    Activation,
    AveragePooling2D,
    BatchNormalization,
    Conv2D,
    Conv3D,
    ConvLSTM2D,
    ConvLSTM2DCell,
    Dense,
    Dropout,
    Flatten,
    GlobalAveragePooling,
    GlobalMaxPooling,
    Layer,
    LayerNormalization,
    LeakyReLU,
    MaxPooling2D,
    MaxPooling3D,
    Softmax,
    TimeDistributed,
    TimeDistributionCalculator,
    UpSampling,
    ZeroPadding2D,
)
from fastclstm.models import EncoderForecaster, Sequential

FIXED = {"dtype": "float64", "seed": 0}
PLAIN = {"engine": "reference"}


def everything():
    """A model of every layer, for (B, 4, 8, 8, 2)."""
    return Sequential([
        ConvLSTM2D(2, 3, 3, **FIXED, **PLAIN),
        BatchNormalization(3, dtype="float64"),
        MaxPooling3D((2, 1, 1), **PLAIN),
        TimeDistributed(Dropout(0.2, seed=1)),
        Conv3D(3, 2, (2, 3, 3), activation="tanh", **FIXED, **PLAIN),
        UpSampling(2, "bilinear"),
        ZeroPadding2D(1),
        LayerNormalization(2, dtype="float64"),
        Sequential([Conv2D(2, 3, 3, stride=2, **FIXED, **PLAIN), LeakyReLU(0.1)]),
        MaxPooling2D(2, **PLAIN),
        AveragePooling2D((2, 1)),
        Activation("tanh"),
        TimeDistributed(GlobalMaxPooling(keep_dims=True)),
        ConvLSTM2D(3, 2, 1, return_sequences=False, **FIXED, **PLAIN),
        GlobalAveragePooling(),
        Flatten(),
        Dropout(0.1, seed=2),
        Dense(2, 4, **FIXED),
        Softmax(),
    ])  # fmt: skip


def test_everything_together(tmp_path):
    model, x = everything(), normal(2, 4, 8, 8, 2)
    assert model(x).shape == model.output_shape(x.shape) == (2, 4)
    check_gradients(model, x, count=3, tolerance=1e-6)
    check_laws(model, x)
    back = check_saving(model, x, tmp_path / "model.safetensors")
    assert all(not array.flags.writeable for array in back.parameters.values())
    equal(pickle.loads(pickle.dumps(model))(x), model(x))


CONVOLUTION = (
    "in_channels, out_channels, kernel_size, padding='same', stride=1, *, dilation=1, "
    "use_bias=True, activation='linear', kernel_initializer='glorot_uniform', bias_initializer='zeros', "
    "kernel_regularizer=None, bias_regularizer=None, kernel_constraint=None, bias_constraint=None, "
    "data_format='channels_last', dtype='float32', seed=None, engine=None, algorithm='auto', "
    "padding_mode='zeros', groups=1"
)
NORMALIZATION = (
    "beta_initializer='zeros', gamma_initializer='ones', {}beta_regularizer=None, gamma_regularizer=None, "
    "beta_constraint=None, gamma_constraint=None, {}dtype='float32', seed=None"
)
POOLING = "pool_size=(2, 2), stride=None, *, padding='valid', ceil_mode=False, data_format='channels_last'"


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (Conv2D, CONVOLUTION),
        (Conv3D, CONVOLUTION),
        (
            Dense,
            "in_features, out_features, activation='linear', *, use_bias=True, kernel_initializer='glorot_uniform', "
            "bias_initializer='zeros', kernel_regularizer=None, bias_regularizer=None, kernel_constraint=None, "
            "bias_constraint=None, dtype='float32', seed=None",
        ),
        (
            BatchNormalization,
            "num_features, *, axis=-1, momentum=0.99, epsilon=0.001, center=True, scale=True, "
            + NORMALIZATION.format(
                "moving_mean_initializer='zeros', moving_variance_initializer='ones', ", "data_format='channels_last', "
            ),
        ),
        (LayerNormalization, "shape, *, epsilon=0.001, center=True, scale=True, " + NORMALIZATION.format("", "")),
        (Dropout, "rate, *, noise_shape=None, seed=None"),
        (Activation, "activation"),
        (LeakyReLU, "negative_slope=0.3"),
        (MaxPooling2D, POOLING + ", engine=None"),
        (AveragePooling2D, POOLING + ", count_include_pad=False"),
        (GlobalAveragePooling, "data_format='channels_last', *, keep_dims=False, channel_axis=None"),
        (GlobalMaxPooling, "data_format='channels_last', *, keep_dims=False, channel_axis=None"),
        (UpSampling, "size=(2, 2), interpolation='nearest', *, align_corners=False, data_format='channels_last'"),
        (ZeroPadding2D, "padding=1, *, data_format='channels_last'"),
        (TimeDistributed, "layer"),
        (Sequential, "layers"),
        (Sequential.forward, "self, x, mask=None, lengths=None, training=False"),
        (Conv2D.forward, "self, x, training=False"),
    ],
)
def test_signatures(function, signature):
    parameters = [
        p.replace(annotation=inspect.Parameter.empty)
        for p in inspect.signature(function).parameters.values()
        if p.name != "name"  # which every layer has
    ]
    assert str(inspect.Signature(parameters)) == f"({signature})"


def test_it_is_its_layers_one_after_the_other():
    layers = [Conv2D(1, 2, 3, **FIXED, **PLAIN), Flatten(), Dense(32, 3, **FIXED)]
    model, x = Sequential(layers), normal(2, 4, 4, 1)
    equal(model(x), layers[2](layers[1](layers[0](x))))
    assert len(model) == 3
    assert model[1] is layers[1]
    assert list(model) == layers
    assert model.layers == tuple(layers)
    assert list(model.parameters) == ["0.kernel", "0.bias", "2.kernel", "2.bias"]
    assert model.num_parameters == 20 + 99
    y = model(x, training=True)
    model.backward(y)
    close(model.get_gradients()["2.bias"], y.sum(0))


@pytest.mark.parametrize(
    ("layer", "shape", "place"),
    [
        (Dense(3, 2, kernel_regularizer="l2", bias_regularizer="l1", kernel_constraint="non_neg",
               bias_initializer="ones", **FIXED), (2, 3), "kernel"),
        (Conv2D(1, 2, 3, kernel_regularizer="l1", bias_regularizer="l2", bias_constraint="non_neg",
                bias_initializer="ones", **FIXED, **PLAIN), (2, 4, 4, 1), "bias"),
        (Conv3D(1, 2, 2, kernel_regularizer="l1_l2", kernel_constraint="non_neg", use_bias=False, **FIXED, **PLAIN),
         (2, 3, 4, 4, 1), "kernel"),
        (BatchNormalization(3, gamma_regularizer="l2", beta_regularizer="l1", beta_initializer="ones",
                            gamma_constraint="non_neg", dtype="float64"), (4, 3), "gamma"),
        (LayerNormalization(3, gamma_regularizer="l1", center=False, gamma_constraint="non_neg", dtype="float64"),
         (4, 3), "gamma"),
    ],
    ids=repr,
)  # fmt: skip
def test_regularizers_and_constraints(layer, shape, place):
    check_penalties(copy.deepcopy(layer), normal(*shape), place)
    check_penalties(Sequential([layer]), normal(*shape), f"0.{place}")


def test_freezing_freezes_all_within():
    inner = Sequential([BatchNormalization(2, dtype="float64")])
    model = Sequential([inner, TimeDistributed(Dense(2, 2, **FIXED))])
    model[1].trainable = False
    assert list(model.trainable_parameters) == ["0.0.gamma", "0.0.beta"]
    model.trainable = False
    assert not inner.trainable
    assert not inner[0].trainable
    moving = inner[0].moving_mean
    x = normal(3, 4, 2)
    y = model(x, training=True)
    equal(inner[0].moving_mean, moving)
    assert model.backward(y).shape == x.shape
    assert model.get_gradients() == {}
    model.trainable = True
    assert len(model.trainable_parameters) == 4


def test_layers_frozen_before_stay_frozen():
    dense = Dense(2, 2)
    dense.trainable = False
    model = Sequential([dense, Dense(2, 2)])
    assert not dense.trainable
    assert list(model.trainable_parameters) == ["1.kernel", "1.bias"]


def test_mask_and_lengths_go_to_every_convlstm():
    first, second = (ConvLSTM2D(2, 2, 3, **FIXED, **PLAIN) for _ in range(2))
    model = Sequential([first, Activation("relu"), Sequential([second])])
    x, mask = normal(2, 4, 5, 5, 2), np.array([[True, False, True, True], [True, True, False, False]])
    middle = np.maximum(first(x, mask=mask), 0)
    equal(model(x, mask=mask), second(middle, mask=mask))
    lengths = np.array([2, 3])
    equal(model(x, lengths=lengths), second(np.maximum(first(x, lengths=lengths), 0), lengths=lengths))
    check_gradients(model, x, count=3, mask=mask)
    with pytest.raises(ValueError, match="Sequential: mask and lengths are for ConvLSTM2D layers and the like"):
        Sequential([Flatten()])(x, mask=mask)


@pytest.mark.parametrize("given", ["mask", "lengths"])
def test_after_a_layer_that_goes_backwards_the_mask_does_too(given):
    layers = [ConvLSTM2D(2, 2, 3, go_backwards=b, **FIXED, **PLAIN) for b in (True, True, False)]
    x, lengths = normal(2, 4, 5, 5, 2), np.array([3, 2])
    mask = np.arange(4) < lengths[:, np.newaxis]
    expected = layers[0](x, mask=mask)
    expected = layers[1](expected, mask=mask[:, ::-1])
    expected = layers[2](expected, mask=mask)
    options = {"mask": mask} if given == "mask" else {"lengths": lengths}
    equal(Sequential(layers)(x, **options), expected)
    equal(Sequential([Sequential(layers[:1]), *layers[1:]])(x, **options), expected)


@pytest.mark.parametrize("given", ["mask", "lengths"])
def test_masks_without_a_batch_axis_and_with_time_first(given):
    x, lengths = normal(2, 4, 5, 5, 2), np.array([3, 2])
    mask = np.arange(4) < lengths[:, np.newaxis]
    pairs = {"mask": mask, "lengths": lengths}
    layers = [ConvLSTM2D(2, 2, 3, go_backwards=b, **FIXED, **PLAIN) for b in (True, False)]
    expected = Sequential(layers)(x, mask=mask)
    one = {given: pairs[given][0]}
    equal(Sequential(layers)(x[0], **one), expected[0])
    turned = [ConvLSTM2D(2, 2, 3, go_backwards=b, time_major=True, **FIXED, **PLAIN) for b in (True, False)]
    first = {given: mask.T if given == "mask" else lengths}
    equal(Sequential(turned)(x.swapaxes(0, 1), **first), expected.swapaxes(0, 1))


def test_states_are_forgotten_in_every_layer():
    model = Sequential([Sequential([ConvLSTM2D(2, 2, 3, stateful=True, **FIXED, **PLAIN)]), Activation("tanh")])
    x = normal(2, 4, 5, 5, 2)
    first = model(x)
    assert not np.array_equal(model(x), first)
    model.reset_state()
    equal(model(x), first)


def test_the_last_layer_may_return_its_states():
    model = Sequential([Activation("tanh"), ConvLSTM2D(1, 2, 3, return_state=True, **FIXED, **PLAIN)])
    x = normal(2, 3, 4, 4, 1)
    y, states = model(x, training=True)
    assert y.shape == model.output_shape(x.shape) == (2, 3, 4, 4, 2)
    assert states[0][1].shape == (2, 4, 4, 2)
    assert model.backward(y, states).shape == x.shape


@pytest.mark.torch
def test_arrays_come_back_as_their_kind():
    torch = pytest.importorskip("torch")
    model = Sequential([Flatten(), Dense(4, 2)])
    y = model(torch.ones(3, 4), training=True)
    assert isinstance(y, torch.Tensor)
    assert isinstance(model.backward(y), torch.Tensor)
    model = Sequential([ConvLSTM2D(1, 2, 3, return_state=True, **PLAIN)])
    y, [(h, _)] = model(torch.ones(1, 2, 3, 3, 1))
    assert isinstance(y, torch.Tensor)
    assert isinstance(h, torch.Tensor)


def test_a_layer_that_does_not_fit_is_named():
    model = Sequential([Conv2D(1, 2, 3, **PLAIN), Flatten(), Dense(5, 2)])
    for call in (model, lambda x: model.output_shape(x.shape)):
        with pytest.raises(ValueError, match="Dense: x must be") as caught:
            call(np.zeros((1, 2, 2, 1)))
        assert caught.value.__notes__ == ["in layer 2, Dense"]
    nested = Sequential([Sequential([TimeDistributed(Dense(2, 2))])])
    with pytest.raises(ValueError, match="Dense: x must be") as caught:
        nested(np.zeros((1, 2, 3)))
    assert caught.value.__notes__ == [
        "in TimeDistributed(Dense)",
        "in layer 0, TimeDistributed",
        "in layer 0, Sequential",
    ]


def test_what_cannot_stand_in_a_sequential():
    with pytest.raises(TypeError, match="Sequential: layers must be a list of layers, got Flatten"):
        Sequential(Flatten())
    with pytest.raises(ValueError, match="Sequential: layers is empty"):
        Sequential([])
    with pytest.raises(TypeError, match="Sequential: layer 1 must be a layer, got str"):
        Sequential([Flatten(), "relu"])
    with pytest.raises(ValueError, match=r"layer 0, ConvLSTM2D returns more than one array.*return_state=False"):
        Sequential([ConvLSTM2D(1, 1, 3, return_state=True), Flatten()])
    with pytest.raises(
        ValueError, match=r"layer 0, ConvLSTM2D returns more than one array.*merge_mode, such as 'concat'"
    ):
        Sequential([ConvLSTM2D(1, 1, 3, bidirectional=True, merge_mode=None), Flatten()])
    with pytest.raises(ValueError, match=r"layer 0, Sequential returns more than one array.*return_state=False"):
        Sequential([Sequential([ConvLSTM2D(1, 1, 3, return_state=True)]), Flatten()])
    with pytest.raises(ValueError, match=r"layer 1, MaxPooling3D returns more than one array.*return_indices=False"):
        Sequential([Flatten(), MaxPooling3D(return_indices=True), Flatten()])
    with pytest.raises(ValueError, match="layer 0, ConvLSTM2DCell takes one step at a time; use ConvLSTM2D"):
        Sequential([ConvLSTM2DCell(1, 1, 3)])
    shared = Dense(2, 2)
    with pytest.raises(ValueError, match="layer 1, TimeDistributed shares a layer with layer 0, Dense"):
        Sequential([shared, TimeDistributed(shared)])


def test_other_layers_of_arrays_fit_too():
    model = Sequential([TimeDistributionCalculator(0.5, 3, seed=0), Flatten()])
    x = np.ones((2, 3, 4))
    kept = copy.deepcopy(model[0]).calculate_time_distribution()
    y = model(x, training=True)
    equal(y, np.repeat(kept, 4) * np.ones((2, 12)))
    equal(model.backward(np.ones((2, 12))), x * kept[:, np.newaxis])


def test_summary():
    model = Sequential([Conv2D(1, 100, 3), BatchNormalization(100), Sequential([Flatten(), Dense(1600, 200)])])
    model[0].trainable = False
    assert model.summary((None, 4, 4, 1)).splitlines() == [
        "#  layer               output shape       parameters",
        "-  ------------------  -----------------  ----------",
        "0  Conv2D              (None, 4, 4, 100)       1,000",
        "1  BatchNormalization  (None, 4, 4, 100)         400",
        "2  Sequential          (None, 200)           320,200",
        "-  ------------------  -----------------  ----------",
        "321,600 parameters, 320,400 trainable, 1.3 MB",
    ]
    lstm = Sequential([ConvLSTM2D(1, 2, 3, bidirectional=True), TimeDistributed(Flatten())])
    assert lstm.output_shape((None, 3, 4, 4, 1)) == (None, 3, 64)
    lines = model.summary().splitlines()
    assert lines[0] == "#  layer               parameters"
    assert lines[2] == "0  Conv2D                   1,000"


class Untold(Layer):
    """A layer of others, without an output_shape."""

    def forward(self, x, training=False):
        return x + 1


def last_step(*before, **options):
    """A network that hands the last step of one ConvLSTM2D to another."""
    return Sequential([*before, ConvLSTM2D(1, 8, 3, return_sequences=False, **PLAIN), ConvLSTM2D(8, 4, 3, **PLAIN)])


LOST = r"takes \(batch, time, height, width, channels\) but gets 4D \(2, 5, 5, 8\); give layer 0 return_sequences=True"


def test_a_batch_is_never_read_as_time():
    x = np.zeros((2, 3, 5, 5, 1))
    for call in (
        last_step(),
        Sequential([last_step()]),
        lambda x: last_step().output_shape(x.shape),
        lambda x: last_step().summary(x.shape),
    ):
        with pytest.raises(ValueError, match=rf"Sequential: layer 1 \(ConvLSTM2D\) {LOST}"):
            call(x)
    first, second = last_step()
    for model in (Sequential([first, Sequential([second])]), Sequential([Sequential([first]), second])):
        with pytest.raises(ValueError, match=r"\(ConvLSTM2D\) takes \(batch, time, .* but gets 4D \(2, 5, 5, 8\)"):
            model(x)
    for model in (last_step(Untold()), Sequential([first, Untold(), second])):
        with pytest.raises(ValueError, match=r"layer 2 \(ConvLSTM2D\) takes \(batch, time, .* but gets 4D"):
            model(x)


def test_all_have_the_time_axis_at_the_same_place():
    model = Sequential([ConvLSTM2D(1, 2, 3, time_major=True, **PLAIN), ConvLSTM2D(2, 2, 3, **PLAIN)])
    with pytest.raises(ValueError, match=r"layer 1 \(ConvLSTM2D\) has time_major=False, but one before has .*=True"):
        model(np.zeros((3, 2, 5, 5, 1)))


def test_options_may_change_but_not_make_two_outputs():
    model = Sequential([ConvLSTM2D(1, 2, 3, **PLAIN), Flatten()])
    model[0].return_state = True
    with pytest.raises(ValueError, match=r"layer 0, ConvLSTM2D returns more than one array.*return_state=False"):
        model(np.zeros((3, 2, 5, 5, 1)))


def test_a_single_sequence_stays_one():
    x = np.zeros((3, 5, 5, 1))
    model = Sequential([ConvLSTM2D(1, 2, 3, **PLAIN), ConvLSTM2D(2, 4, 3, **PLAIN)])
    assert model(x).shape == model.output_shape(x.shape) == (3, 5, 5, 4)
    with pytest.raises(ValueError, match=r"layer 1 \(ConvLSTM2D\) takes \(time, height, width, channels\) but gets 3D"):
        last_step()(x)


def test_lengths_are_those_of_the_sequences_given():
    lengths, x = np.array([4, 2]), normal(2, 4, 5, 5, 2)
    second = ConvLSTM2D(2, 2, 3, **FIXED, **PLAIN)
    model = Sequential([MaxPooling3D((2, 1, 1), **PLAIN), second])
    for options in ({"lengths": lengths}, {"mask": np.arange(4) < lengths[:, np.newaxis]}):
        with pytest.raises(
            ValueError, match=r"Sequential: mask has shape \(2, 4\) but must be \(2, 2\) \(the steps that"
        ):
            model(x, **options)
    model = Sequential([MaxPooling3D((1, 2, 2), **PLAIN), second])
    equal(model(x, lengths=lengths), second(MaxPooling3D((1, 2, 2), **PLAIN)(x), lengths=lengths))
    with pytest.raises(ValueError, match="lengths must lie between 0 and the 4 steps"):
        model(x, lengths=[5, 2])
    with pytest.raises(ValueError, match="Sequential: give mask or lengths, not both"):
        model(x, lengths=lengths, mask=np.ones((2, 4), bool))


@pytest.mark.parametrize(
    ("rest", "options"),
    [
        ([Dense(3, 1)], {}),
        ([Sequential([Dense(3, 1)])], {}),
        ([ConvLSTM2D(2, 2, 3, **PLAIN)], {"mask": np.ones((2, 4), bool)}),
        ([MaxPooling3D((2, 1, 1), **PLAIN), ConvLSTM2D(2, 2, 3, **PLAIN)], {"mask": np.ones((2, 3), bool)}),
    ],
)
def test_a_call_that_fails_has_learned_nothing(rest, options):
    norm = BatchNormalization(2)
    with pytest.raises(ValueError, match="must be"):
        Sequential([norm, *rest])(np.ones((2, 3, 4, 4, 2)), training=True, **options)
    equal(norm.moving_mean, np.zeros(2))


@pytest.mark.parametrize(
    "model",
    [
        Sequential([Flatten()]),
        Sequential([Activation("linear"), Dropout(0.5)]),
        Sequential([Sequential([TimeDistributionCalculator(0.5, 3)])]),
        Sequential([TimeDistributed(Flatten())]),
    ],
    ids=repr,
)
def test_results_are_memory_of_their_own(model):
    x = np.ones((2, 3, 4))
    y = model(x)
    y += 1
    equal(x, np.ones((2, 3, 4)))


def test_a_forecaster_is_refused_unless_it_knows_how_many_frames():
    with pytest.raises(ValueError, match="Sequential: layer 0, EncoderForecaster must be told how many frames to make"):
        Sequential([EncoderForecaster(1, (1,), 1)])

    class Forecast(EncoderForecaster):
        def forward(self, frames, training=False):
            return super().forward(frames, 3, training)

        def output_shape(self, input_shape):
            return super().output_shape(input_shape, 3)

    model = Sequential([Forecast(1, (2,), 3, engine="reference"), Flatten()])
    assert model(np.zeros((2, 2, 4, 4, 1))).shape == model.output_shape((2, 2, 4, 4, 1)) == (2, 48)


def test_summaries_tell_the_batch_wherever_it_is():
    pair = Sequential([Activation("tanh"), ConvLSTM2D(1, 2, 3, bidirectional=True, merge_mode=None)])
    shape = (None, 3, 4, 4, 2)
    assert pair.output_shape((None, 3, 4, 4, 1)) == (shape, shape)
    assert "((None, 3, 4, 4, 2), (None, 3, 4, 4, 2))" in pair.summary((None, 3, 4, 4, 1))
    first = Sequential(
        [ConvLSTM2D(1, 2, 3, time_major=True), ConvLSTM2D(2, 2, 3, time_major=True, return_sequences=False)]
    )
    assert first._shapes((3, None, 4, 4, 1)) == [(3, None, 4, 4, 2), (None, 4, 4, 2)]
    assert "(None, 4, 4, 2)" in first.summary((3, None, 4, 4, 1))
    for model, wrong, axis in (
        (pair, (None, None, 4, 4, 1), 0),
        (pair, (2, None, 4, 4, 1), 0),
        (first, (None, 3, 4, 4, 1), 1),
    ):
        with pytest.raises(ValueError, match=f"Sequential: of input_shape .* only the batch, axis {axis}, may be None"):
            model.summary(wrong)
