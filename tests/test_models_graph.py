import copy
import gc
import inspect
import json
import pickle
import weakref

import numpy as np
import pytest
from graph_models import Joined, Summed, conv, forecaster, leaf_list, lstm, shared, skip, two_tasks
from layer_checks import check_gradients, check_laws, close, differences, equal, normal

import fastclstm
from fastclstm.layers import (
    Activation,
    BatchNormalization,
    Conv2D,
    ConvLSTM2D,
    ConvLSTM2DCell,
    Dense,
    Dropout,
    Flatten,
    Input,
    Layer,
    MaxPooling2D,
    MaxPooling3D,
    TimeDistributed,
    UpSampling,
)
from fastclstm.models import EncoderForecaster, Model, Sequential
from fastclstm.models.graph import layer_names


def check_differences(model, xs, cotangents, count=5, seed=3):
    """Compare backward with central differences, for any number of inputs and outputs."""
    rng = np.random.default_rng(seed)

    def value(given, parameters=None):
        probe = copy.deepcopy(model)
        if parameters is not None:
            probe.set_parameters(probe.parameters | parameters)
        made = leaf_list(probe(given if len(given) > 1 else given[0], training=True))
        return sum(float(np.sum(y * c)) for y, c in zip(made, cotangents, strict=True) if c is not None)

    trained = copy.deepcopy(model)
    made = trained(xs if len(xs) > 1 else xs[0], training=True)
    dy = dict(zip(made, cotangents, strict=True)) if isinstance(made, dict) else list(cotangents)
    dxs = leaf_list(trained.backward(dy if isinstance(made, dict | list) else dy[0]))
    for index, (x, dx) in enumerate(zip(xs, dxs, strict=True)):
        assert dx.shape == x.shape
        places = rng.choice(x.size, min(count, x.size), replace=False)
        slopes = differences(lambda moved, i=index: value([*xs[:i], moved, *xs[i + 1 :]]), x, places)
        close(dx.flat[places], slopes, 1e-7)
    gradients = trained.get_gradients()
    assert list(gradients) == list(model.trainable_parameters)
    for name, gradient in gradients.items():
        array = model.parameters[name]
        places = rng.choice(array.size, min(count, array.size), replace=False)
        slopes = differences(lambda moved, n=name: value(xs, {n: moved}), array, places)
        np.testing.assert_allclose(gradient.flat[places], slopes, rtol=1e-7, atol=1e-7, err_msg=name)


def test_a_skip_is_what_its_layers_make_by_hand():
    model, x = skip(), normal(2, 3, 5, 5, 2)
    a, b, join, head = copy.deepcopy(model).layers
    hidden = a(x, training=True)
    middle = b(hidden, training=True)
    expected = head(join([hidden, middle, x], training=True), training=True)
    equal(model(x), expected)
    equal(model(x, training=True), expected)
    dy = normal(*expected.shape, seed=5)
    dhidden, dmiddle, dx = join.backward(head.backward(dy))
    close(model.backward(dy), dx + a.backward(dhidden + b.backward(dmiddle)))
    for name, layer in (("conv_lstm2d", a), ("conv2d", b), ("conv2d_1", head)):
        for key, gradient in layer.get_gradients().items():
            close(model.get_gradients()[f"{name}.{key}"], gradient)


def test_gradients_of_a_skip_and_its_laws(tmp_path):
    model, x = skip(), normal(2, 3, 5, 5, 2)
    check_gradients(model, x)
    check_laws(model, x)
    fresh = fastclstm.load(model_file(model, tmp_path))
    equal(fresh(x), model(x))


def model_file(model, folder):
    model.save(folder / "model.safetensors")
    return folder / "model.safetensors"


def test_a_layer_called_twice_is_one():
    model, x = shared(), normal(2, 5, 5, 2)
    assert list(model.parameters) == ["one.kernel", "one.bias"]
    one = copy.deepcopy(model.get_layer("one"))
    a = one(x)
    equal(model(x), one(a) + a + x)
    dy = normal(*model(x, training=True).shape, seed=2)
    dx = model.backward(dy)
    probe, again = copy.deepcopy(one), copy.deepcopy(one)
    probe(x, training=True)
    again(a, training=True)
    pulled = again.backward(dy)
    close(dx, dy + probe.backward(dy + pulled))
    penalty = {"kernel": 2 * 0.01 * one.kernel, "bias": 0}  # which counts once
    for name, counted in penalty.items():
        both = probe.get_gradients()[name] + again.get_gradients()[name]
        close(model.get_gradients()[f"one.{name}"], both - counted)


@pytest.mark.parametrize("model", [skip, forecaster, two_tasks], ids=lambda f: f.__name__)
def test_gradients_of_several_inputs_and_outputs(model):
    model = model()
    xs = [normal(2, *(n or 3 for n in symbol.shape[1:])) for symbol in leaf_list(model.inputs)]
    made = leaf_list(copy.deepcopy(model)(xs if len(xs) > 1 else xs[0]))
    cotangents = [normal(*y.shape, seed=4 + n) for n, y in enumerate(made)]
    check_differences(model, xs, cotangents)
    if len(made) > 1:  # of one output nothing comes
        check_differences(model, xs, [cotangents[0], None])
        check_differences(model, xs, [None, cotangents[1]])


def test_a_decoder_starts_from_the_states_of_an_encoder():
    model, x, later = forecaster(), normal(2, 3, 5, 5, 1), normal(2, 2, 5, 5, 2, seed=2)
    encoder, decoder, head, summary = model.layers
    last, states = encoder(x)
    expected = head(decoder(later, initial_state=states)), summary(last)
    for given in ([x, later], (x, later), {"later": later, "frames": x}):
        for made, y in zip(model(given), expected, strict=True):
            equal(made, y)


@pytest.mark.parametrize("options", [{"recompute": True}, {"bidirectional": True, "merge_mode": "sum"},
                                     {"data_format": "channels_first"}])  # fmt: skip
def test_states_of_other_kinds(options):
    shape = (None, 2, 4, 4) if "data_format" in options else (None, 4, 4, 2)
    frames, later = Input(shape), Input(shape)
    _, states = lstm(2, 3, return_state=True, **options)(frames)
    y, [(h, c), *_] = lstm(2, 3, seed=1, return_state=True, **options)(later, initial_state=states)
    model = Model([frames, later], [y, h, c])
    xs = [normal(2, *(n or 2 for n in s.shape[1:]), seed=i) for i, s in enumerate(model.inputs)]
    check_differences(model, xs, [normal(*y.shape, seed=9) for y in model(xs)])


def test_one_state_as_a_pair_and_two_directions_that_stay_two():
    frames, h, c = Input((3, 4, 4, 2)), Input((4, 4, 3)), Input((4, 4, 3))
    both = lstm(2, 3, bidirectional=True, merge_mode=None)(frames)
    assert isinstance(both, tuple)
    y = lstm(6, 3, seed=1)(Joined()(list(both)), initial_state=(h, c))
    model = Model([frames, h, c], y)
    xs = [normal(2, *s.shape[1:], seed=i) for i, s in enumerate(model.inputs)]
    check_differences(model, xs, [normal(2, 3, 4, 4, 3, seed=9)])
    only_backward = Model(frames, both[1])
    check_differences(only_backward, xs[:1], [normal(2, 3, 4, 4, 3, seed=9)])


def test_indices_have_no_gradient():
    x = Input((4, 4, 4, 1))
    pooled, indices = MaxPooling3D(return_indices=True, engine="reference")(x)
    model, volume = Model(x, [pooled, indices]), normal(2, 4, 4, 4, 1)
    y, where = model(volume, training=True)
    dx = model.backward([np.ones_like(y), None])
    equal(np.sort(volume[dx != 0]), np.sort(y.ravel()))
    assert where.shape == y.shape


def test_masks_are_inputs_or_go_to_every_layer():
    x, mask = normal(2, 4, 5, 5, 2), np.array([[True, False, True, True], [True, True, False, False]])
    first, second = lstm(2, 2, go_backwards=True), lstm(2, 2, seed=1)
    frames, valid = Input((4, 5, 5, 2)), Input((4,), name="valid")
    expected = second(first(x, mask=mask), mask=mask[:, ::-1])
    model = Model(frames, second(Activation("linear")(first(frames))))
    equal(model(x, mask=mask), expected)
    equal(model(x, lengths=[4, 4]), second(first(x)))
    own = Model([frames, valid], second(first(frames, mask=valid)))
    equal(own([x, mask]), second(first(x, mask=mask)))
    check_gradients(model, x, count=3, mask=mask)
    with pytest.raises(ValueError, match="Model: mask and lengths are for ConvLSTM2D layers and the like, and there"):
        shared()(normal(2, 5, 5, 2), mask=mask)
    with pytest.raises(ValueError, match=r"mask has shape \(None, 3\) but must be \("):
        lstm(2, 2)(frames, mask=Input((3,)))


@pytest.mark.usefixtures("only_young_garbage")
def test_what_nobody_reads_any_more_is_let_go():
    seen, alive = [], []

    class Watched(Layer):
        def forward(self, x, training=False):
            gc.collect()
            alive.append([ref() is not None for ref in seen])
            y = x + 1
            seen.append(weakref.ref(y))
            return y

        def output_shape(self, input_shape):
            return input_shape

    x = Input((3,))
    a = Watched()(x)
    b = Watched()(a)
    c = Watched()(b)
    model = Model(x, Watched()(Summed()([a, c])))  # a lives until the sum has been made
    model(np.zeros((2, 3)))
    assert alive == [[], [True], [True, True], [False, False, False]]
    seen.clear()
    alive.clear()
    chain = Sequential([Watched() for _ in range(4)])
    chain(np.zeros((2, 3)))
    assert alive == [[], [True], [False, True], [False, False, True]]


def test_networks_within_networks():
    x = normal(2, 3, 4, 4, 2)
    symbol = Input((4, 4, 2))
    inner = Model(symbol, Joined()([symbol, conv(2, 1, activation="tanh")(symbol)]), name="inner")
    frames = Input((None, 4, 4, 2))
    y = TimeDistributed(inner)(frames)
    y = Sequential([lstm(3, 2), Activation("tanh")])(y)
    model = Model(frames, y)
    assert list(model.parameters)[:2] == ["time_distributed.layer.conv2d.kernel", "time_distributed.layer.conv2d.bias"]
    made = np.stack([inner(x[:, t]) for t in range(3)], 1)
    close(model(x), np.tanh(model.layers[1][0](made)))
    check_gradients(model, x)
    chain = Sequential([inner, Flatten()])
    equal(chain(x[:, 0]), inner(x[:, 0]).reshape(2, -1))
    check_gradients(chain, x[:, 0])
    twice = Model(symbol, inner_twice(inner, symbol))
    assert list(twice.parameters) == ["inner.conv2d.kernel", "inner.conv2d.bias", "conv2d.kernel", "conv2d.bias"]
    check_gradients(twice, x[:, 0])


def inner_twice(inner, symbol):
    return inner(conv(3, 2, seed=3)(inner(symbol)))


def test_nested_models_of_several():
    pair = two_tasks()
    a, b = Input((4, 4, 2)), Input((4, 4, 2))
    first, second = pair(a), pair(b)
    assert set(first) == {"map", "numbers"}
    model = Model([a, b], [Summed()([first["map"], second["map"]]), first["numbers"]])
    check_differences(model, [normal(2, 4, 4, 2), normal(2, 4, 4, 2, seed=2)],
                             [normal(2, 4, 4, 1, seed=3), normal(2, 2, seed=4)])  # fmt: skip


def test_batch_statistics_move_with_every_call_and_only_in_training():
    x, norm = Input((3,)), BatchNormalization(3, dtype="float64", momentum=0.5)
    model = Model(x, norm(norm(x)))
    data = normal(8, 3) + 5
    model(data)
    equal(norm.moving_mean, np.zeros(3))
    model(data, training=True)
    close(norm.moving_mean, 0.25 * data.mean(0), 1e-6)


def test_dropout_may_stay_on():
    x = Input((50,))
    model = Model(x, Dropout(0.5, seed=0)(x, training=True))
    assert (model(np.ones((1, 50))) == 0).any()
    off = Model(x, Dropout(0.5, seed=0)(x, training=False))
    y = off(np.ones((1, 50)), training=True)
    assert (y == 0).any()
    assert off.backward(y).shape == (1, 50)


def test_freezing_scaling_and_keeping_no_gradients():
    model, x = skip(), normal(2, 3, 5, 5, 2)
    y = model(x, training=True)
    dx = model.backward(y)
    model.gradient_scale = 0.5
    close(model.backward(y), 0.5 * dx)
    model.get_layer("conv2d").trainable = False
    assert [n for n in model.trainable_parameters if n.startswith("conv2d.")] == []
    model(x, training=True)
    model.backward(y)
    assert list(model.get_gradients()) == list(model.trainable_parameters)
    model.trainable = False
    model(x, training=True)
    model.backward(y)
    assert model.get_gradients() == {}
    model.trainable = True
    model.get_layer("conv2d").store_gradients = False
    model(x, training=True)
    model.backward(y)
    assert "conv2d.kernel" not in model.get_gradients()
    pair = forecaster()
    pair.gradient_scale = 2.0
    xs = [normal(2, 3, 5, 5, 1), normal(2, 2, 5, 5, 2)]
    made = pair(xs, training=True)
    doubled = pair.backward(made)
    pair.gradient_scale = 1.0
    pair(xs, training=True)
    for twice, once in zip(doubled, pair.backward(made), strict=True):
        equal(twice, 2 * once)


def test_calls_in_between_do_no_harm():
    model, x = skip(), normal(2, 3, 5, 5, 2)
    y = model(x, training=True)
    expected = model.backward(y)
    model(x, training=True)
    for layer in model.layers[:2]:
        layer(normal(1, 3, 5, 5, layer.in_channels))
    equal(model.backward(y), expected)


def test_shapes_are_checked_when_the_graph_is_built():
    frames = Input((None, None, None, 3), name="frames")
    assert frames.shape == (None, None, None, None, 3)
    with pytest.raises(ValueError, match="x has 3 channels") as caught:
        lstm(4, 2, name="first")(frames)
    notes = "\n".join(caught.value.__notes__)
    assert "in ConvLSTM2D 'first', called on <Input 'frames' (None, None, None, None, 3)>" in notes
    assert "10080 was tried" in notes
    with pytest.raises(ValueError, match=r"in a graph x must be \(batch, time, height, width, channels\), got 4D"):
        lstm(3, 2)(Input((5, 5, 3)))
    with pytest.raises(ValueError, match=r"h of initial_state has shape \(None, 4, 4, 2\) but must be \("):
        lstm(3, 2)(Input((2, 5, 5, 3)), initial_state=(Input((4, 4, 2)), None))
    with pytest.raises(ValueError, match=r"initial_state must be a list of 1 pair \(h, c\), one a layer; got 2 items"):
        lstm(3, 2)(Input((2, 5, 5, 3)), initial_state=[(None, Input((5, 5, 2))), (None, None)])
    with pytest.raises(ValueError, match="Summed: all shapes must be the same"):
        Summed()([Input((3,)), Input((4,))])


def test_unknown_axes_stay_unknown_and_others_not():
    x = Input((None, None, 2))
    a = conv(2, 4, stride=2)(x)
    b = UpSampling(2)(MaxPooling2D(2, engine="reference")(conv(2, 3)(x)))
    assert a.shape == (None, None, None, 4)
    assert Flatten()(Input((3, 4))).shape == (None, 12)
    assert Flatten()(a).shape == (None, None)
    assert Joined()([b, x]).shape == (None, None, None, 5)
    assert Joined()([Input((6, None, 2)), Input((None, 7, 2))]).shape == (None, 6, 7, 4)  # each tells the other
    assert Input((3,), batch_size=5).shape == Input(batch_shape=(5, 3)).shape == (5, 3)
    model = Model(x, [a, b])
    assert model.output_shape((None, 8, 6, 2)) == [(None, 4, 3, 4), (None, 8, 6, 3)]
    assert model.output_shape((3, 8, 6, 2)) == [(3, 4, 3, 4), (3, 8, 6, 3)]
    assert model.output_shape((None, None, 6, 2)) == [(None, None, 3, 4), (None, None, 6, 3)]


def test_any_number_of_unknown_axes_and_channels():
    """Sizes that are tried make arrays of more than 2**63 items, which NumPy knows no shapes of."""
    assert lstm(512, 2)(Input((None, None, None, 512))).shape == (None, None, None, None, 2)
    first = lstm(512, 2, data_format="channels_first", time_major=True)
    assert first(Input((None, 512, None, None))).shape == (None, None, 2, None, None)
    with pytest.raises(ValueError, match=r"x must be 5D \(batch, time, height, width, channels\), got 6D"):
        lstm(1, 2)(Input((None, None, None, None, 1)))


def test_where_two_sizes_meet_is_checked_before_anything_is_computed():
    x = Input((None, None, 2))
    norm = BatchNormalization(2)
    up = UpSampling(2)(MaxPooling2D(2, engine="reference")(norm(x)))
    model = Model(x, Joined(name="meeting")([up, x]))
    assert model(np.zeros((1, 4, 6, 2))).shape == (1, 4, 6, 4)
    with pytest.raises(ValueError, match="Joined: all axes but the last must agree") as caught:
        model(np.ones((1, 5, 6, 2)), training=True)
    assert caught.value.__notes__ == ["in layer meeting, Joined"]
    equal(norm.moving_mean, np.zeros(2))


def test_what_a_call_is_given_is_checked():
    model, one = forecaster(), skip()
    x, later = np.zeros((2, 3, 5, 5, 1)), np.zeros((2, 3, 5, 5, 2))
    for given, message in (
        ([x], r"Model: x must be a list of 2 arrays, or a dict of them by name \('frames', 'later'\), got 1 items"),
        (x, "Model: x must be a list of 2 arrays, .* got ndarray"),
        ({"frames": x}, "Model: x must have 'frames', 'later', got 'frames'"),
        ([x, later[..., :1]], r"Model: input 'later' has shape \(2, 3, 5, 5, 1\) but must be \(None, None, 5, 5, 2\)"),
        ([x[0], later], r"input 'frames' has shape \(3, 5, 5, 1\) but must be .*; the first axis is the batch's"),
    ):
        with pytest.raises(ValueError, match=message):
            model(given)
    with pytest.raises(ValueError, match=r"Model: x has shape \(2, 3, 5, 5, 1\) but must be \(None, None, 5, 5, 2\)"):
        one(x)
    equal(one({"frames": later}), one(later))
    y = model([x, later], training=True)
    for dy, message in (
        (y[0], "expected a list or tuple of 2, got ndarray"),
        ([y[0]], "expected a list or tuple of 2, got list of 1"),
        ([y[1], y[0]], r"Model: dy has shape .* but must be .*, that of the output 'conv2d'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.backward(dy)
    named = two_tasks()
    named(np.zeros((1, 4, 4, 2)), training=True)
    with pytest.raises(ValueError, match="expected 'map', 'numbers' by name, got 'map'"):
        named.backward({"map": None})
    with pytest.raises(RuntimeError, match="training"):
        skip().backward(later)


def test_graphs_that_cannot_be():
    a, b = Input((3,), name="a"), Input((3,), name="b")
    y = Summed()([a, b])
    for call, kind, message in (
        (lambda: Model(a, y), ValueError, "Model: the graph is disconnected: the outputs depend on <Input 'b'"),
        (lambda: Model([a, b], Flatten()(a)), ValueError, "Model: no output depends on <Input 'b' .*; leave it out"),
        (lambda: Model([a, a], Flatten()(a)), ValueError, "Model: an input is given twice"),
        (lambda: Model([], y), ValueError, "Model: inputs is empty"),
        (lambda: Model([a, b], []), ValueError, "Model: outputs is empty"),
        (lambda: Model([a, b], np.zeros(3)), TypeError, "Model: outputs must be symbols.* got ndarray"),
        (lambda: Model([a, b], [[y]]), TypeError, "Model: outputs must be symbols.* got list"),
        (lambda: Model({1: a, "b": b}, y), TypeError, "Model: inputs and outputs are named by texts, got 1"),
        (lambda: Model([a, Input((3,), name="a")], y), ValueError, "two inputs have the same name|disconnected"),
        (lambda: Summed()([a, np.zeros((1, 3))]), TypeError, r"Summed: it is called on symbols and on ndarray of shape "
                                                             r"\(1, 3\) at once; make that an Input too"),
        (lambda: lstm(1, 1)(Input((2, 3, 3, 1)), initial_state=(np.zeros((1, 3, 3, 1)), None)), TypeError,
         "ConvLSTM2D: initial_state is ndarray of shape .*, which a graph does not hold; make it an Input"),
        (lambda: lstm(1, 1)(np.zeros((1, 2, 3, 3, 1)), mask=Input((2,))), TypeError, "on symbols and on ndarray"),
        (lambda: Dense(3, 1)(a, b), TypeError, "Dense: training cannot be a symbol; only the first argument"),
        (lambda: Dense(3, 1)(a, rate=1), TypeError, "Dense: got an unexpected keyword argument 'rate'"),
        (lambda: ConvLSTM2DCell(1, 1, 3)(Input((3, 3, 1))), ValueError, "ConvLSTM2DCell takes one step at a time"),
        (lambda: EncoderForecaster(1, (1,), 3)(Input((2, 3, 3, 1))), ValueError, "must be told how many frames"),
        (lambda: Untold()(a), TypeError, "Untold: a graph needs output_shape, which Untold has not; define it"),
        (lambda: Sequential([lstm(1, 1, return_state=True)])(Input((2, 3, 3, 1))), ValueError,
         "Sequential: in a graph its last layer returns one array; give it return_state=False"),
        (lambda: Input(), ValueError, "Input: give shape"),
        (lambda: Input((3,), batch_shape=(1, 3)), ValueError, "Input: give shape"),
        (lambda: Input((-3,)), ValueError, "Input: shape .* must have sizes >= 0, or None for any, got -3"),
        (lambda: Input(3), TypeError, "Input: shape must be a tuple of sizes"),
        (lambda: Input((3,), name="a.b"), ValueError, "Input: name must be a text without '.' and '/', got 'a.b'"),
        (lambda: Dense(3, 1, name=""), ValueError, "Dense: name must be a text without"),
        (lambda: np.asarray(a), TypeError, "is a symbol, which has no values: only layers are called on it"),
        (lambda: a + b, TypeError, "unsupported operand"),
        (lambda: np.ones(3) * a, TypeError, "operand"),
        (lambda: list(a), TypeError, "is one symbol, not several"),
        (lambda: bool(a), TypeError, "is neither true nor false"),
        (lambda: skip()(a), ValueError, r"Model: x has shape \(\d+, 3\) but must be \(None, None, 5, 5, 2\)"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            call()
    with pytest.raises(AttributeError):
        a.shape = (2,)


class Untold(Layer):
    def forward(self, x, training=False):
        return x


def test_names_that_clash_and_layers_that_are_in_two_places():
    x = Input((3,))
    with pytest.raises(ValueError, match="Model: Dense 'd' and Dense 'd' have the same name; give each its own"):
        Model(x, Dense(3, 3, name="d")(Dense(3, 3, name="d")(x)))
    one = Dense(3, 3)
    inner = Sequential([one])
    with pytest.raises(ValueError, match="Model: dense shares a layer with sequential, within which it is"):
        Model(x, one(inner(x)))
    named = Model(x, Dense(3, 3)(Dense(3, 3, name="dense")(x)))
    assert list(named.parameters) == ["dense.kernel", "dense.bias", "dense_1.kernel", "dense_1.bias"]
    assert list(layer_names("", [Conv2D(1, 1, 1), ConvLSTM2D(1, 1, 1), Conv2D(1, 1, 1)]).values()) == [
        "conv2d", "conv_lstm2d", "conv2d_1",
    ]  # fmt: skip
    assert named.get_layer("dense_1") is named.layers[1]
    with pytest.raises(ValueError, match="Model: there is no layer 'conv'; there are dense, dense_1"):
        named.get_layer("conv")


@pytest.mark.parametrize(("build", "value"), [(forecaster, False), (skip, True)])
def test_a_layer_whose_options_have_changed_is_told(build, value):
    model = build()
    model.layers[0].return_state = value
    xs = [np.zeros((2, *(n or 3 for n in symbol.shape[1:]))) for symbol in leaf_list(model.inputs)]
    with pytest.raises(ValueError, match="give its options back, or build the graph anew") as caught:
        model(xs if len(xs) > 1 else xs[0])
    assert caught.value.__notes__ == ["in layer conv_lstm2d, ConvLSTM2D"]


def test_inputs_may_be_outputs_and_outputs_are_memory_of_their_own():
    x = Input((3, 4))
    flat = Flatten()(x)
    model, data = Model(x, [x, flat, flat]), normal(2, 3, 4)
    made = model(data, training=True)
    for y in made:
        y += 1
    equal(data, normal(2, 3, 4))
    equal(made[1], data.reshape(2, 12) + 1)
    equal(made[2], made[1])
    dx = model.backward([np.ones((2, 3, 4)), np.full((2, 12), 2.0), np.full((2, 12), 3.0)])
    equal(dx, np.full((2, 3, 4), 6.0))


def test_a_model_of_a_part_of_another():
    model, x = skip(), normal(2, 3, 5, 5, 2)
    part = Model(model.inputs, model.get_output("conv2d"))
    equal(part(x), model.layers[1](model.layers[0](x)))
    hidden = model.get_output("conv_lstm2d")
    rest = Model(hidden, Activation("tanh")(hidden))  # a symbol in the middle may be an input
    equal(rest(np.ones((1, 2, 5, 5, 3))), np.tanh(np.ones((1, 2, 5, 5, 3))))


def copies(model, folder):
    """The model as a deep copy, as a pickle, and as a file."""
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fastclstm.load(model_file(model, folder))]


@pytest.mark.parametrize("build", [skip, shared, forecaster, two_tasks], ids=lambda f: f.__name__)
def test_copies_and_files_are_the_same_model(build, tmp_path):
    model = build()
    frozen = model.layers[0]
    frozen.trainable = False
    xs = [normal(2, *(n or 3 for n in s.shape[1:])) for s in leaf_list(model.inputs)]
    given = xs if len(xs) > 1 else xs[0]
    for back in copies(model, tmp_path):
        assert back.summary() == model.summary()
        assert [s.shape for s in leaf_list(back.inputs)] == [s.shape for s in leaf_list(model.inputs)]
        assert list(back.parameters) == list(model.parameters)
        assert list(back.trainable_parameters) == list(model.trainable_parameters)
        assert back._described() == model._described()
        for y, expected in zip(leaf_list(back(given)), leaf_list(model(given)), strict=True):
            assert y.tobytes() == expected.tobytes()
        again = Model(back.inputs, back.outputs)  # symbols that are good for another model
        equal(leaf_list(again(given))[0], leaf_list(model(given))[0])
    check = Model.load(model_file(model, tmp_path))
    assert type(check) is Model


def test_long_graphs_can_be_copied_and_pickled(tmp_path):
    x = y = Input((2,))
    for _ in range(600):
        y = Activation("tanh")(y)
    model = Model(x, y)
    for back in copies(model, tmp_path):
        equal(back(np.ones((1, 2))), model(np.ones((1, 2))))


def test_files_of_layers_that_are_not_known(tmp_path):
    x = Input((3,))
    model = Model(x, Activation((np.tanh, lambda y: 1 - y * y))(x))
    with pytest.raises(ValueError, match="functions as options, which files do not hold; give them"):
        fastclstm.load(model_file(model, tmp_path))
    description = json.loads(json.dumps(skip()._described()))
    for damage in (
        {"calls": []}, {"calls": [[9, ["at", 0], []]]}, {"calls": [[0, ["at", 7], []]]}, {"outputs": [None, [77]]},
        {"inputs": [None, []]}, {"layers": []}, {"inputs": [None, [["frames", [None, "x"]]]]}, {"calls": 3},
        {"calls": [[0, ["odd", 0], []]]},
    ):  # fmt: skip
        wrong = description | {"options": description["options"] | damage}
        with pytest.raises(ValueError, match="a file does not fit"):
            Model._restored("a file", skip().parameters, wrong, {})


def test_files_of_before_load(tmp_path):
    """A Sequential's file is as it was: options, and parameters by number."""
    model = Sequential([conv(2, 3, kernel_initializer="zeros"), Flatten()])
    description = model._described()
    assert description["class"] == "Sequential"
    assert list(description["options"]) == ["layers"]
    assert [layer["class"] for layer in description["options"]["layers"]] == ["Conv2D", "Flatten"]
    assert "name" not in description["options"]["layers"][0]["options"]
    named = Sequential([Flatten(name="flat")], name="chain")
    named.save(tmp_path / "named")
    assert repr(fastclstm.load(tmp_path / "named")) == repr(named)


def test_summary():
    assert skip().summary().splitlines() == [
        "layer        type        output shape           parameters  connected to",
        "-----------  ----------  ---------------------  ----------  ---------------------------",
        "frames       Input       (None, None, 5, 5, 2)           0",
        "conv_lstm2d  ConvLSTM2D  (None, None, 5, 5, 3)         552  frames",
        "conv2d       Conv2D      (None, None, 5, 5, 2)          56  conv_lstm2d",
        "joined       Joined      (None, None, 5, 5, 7)           0  conv_lstm2d, conv2d, frames",
        "conv2d_1     Conv2D      (None, None, 5, 5, 1)           8  joined",
        "-----------  ----------  ---------------------  ----------  ---------------------------",
        "616 parameters, 616 trainable, 0.0 MB",
    ]
    assert "(2, 7, 5, 5, 3)" in skip().summary((2, 7, 5, 5, 2))
    assert "shared  one" in shared().summary()
    assert str(skip()) == (
        "Model(<Input 'frames' (None, None, 5, 5, 2)> -> <output of Conv2D (None, None, 5, 5, 1)>, 4 layers)"
    )
    assert "conv_lstm2d" in forecaster().summary([(2, 3, 5, 5, 1), (2, None, 5, 5, 2)])


def test_signatures():
    def told(function):
        parameters = inspect.signature(function).parameters.values()
        return str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))

    assert told(Input) == "(shape=None, *, batch_size=None, batch_shape=None, name=None)"
    assert told(Model) == "(inputs, outputs, *, name=None)"
    assert told(Model.forward) == "(self, x, mask=None, lengths=None, training=False)"


def test_errors_at_run_time_name_the_layer():
    x = Input((3,))

    class Broken(Layer):
        def forward(self, x, training=False):
            raise ZeroDivisionError("no")

        def output_shape(self, input_shape):
            return input_shape

    with pytest.raises(ZeroDivisionError) as caught:
        Model(x, Broken(name="here")(x))(np.zeros((1, 3)))
    assert caught.value.__notes__ == ["in layer here, Broken"]


def test_integers_and_lists_come_in():
    x = Input((3,))
    model = Model(x, Dense(3, 1, kernel_initializer="ones")(x))
    equal(model([[1, 2, 3]]), [[6.0]])
    pair = Model([x], [Dense(3, 1, kernel_initializer="ones")(x)])
    equal(pair([np.array([[1, 2, 3]])])[0], [[6.0]])


@pytest.mark.torch
def test_tensors_come_back_as_tensors():
    torch = pytest.importorskip("torch")
    model = forecaster()
    x, later = torch.ones(2, 3, 5, 5, 1), torch.ones(2, 2, 5, 5, 2)
    y = model([x, later], training=True)
    assert all(isinstance(part, torch.Tensor) for part in y)
    assert all(isinstance(part, torch.Tensor) for part in model.backward(y))
