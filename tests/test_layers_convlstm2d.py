"""The options of ConvLSTM2D and its cell, beyond those of a plain stack (tests/test_layers.py)."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclstm import functional
from fastclstm.layers import ConvLSTM2D, ConvLSTM2DCell
from fastclstm.nn import regularizers
from fastclstm.nn.constraints import MaxNorm
from fastclstm.nn.normalization import Normalization

B, T, H, W, C, F = 2, 4, 5, 6, 2, 3


@pytest.fixture(params=["reference", "cpu"])
def engine(request):
    return request.param


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape)


def make(engine="reference", in_channels=C, out_channels=F, kernel_size=3, **options):
    """A float64 layer whose parameters are all drawn."""
    layer = ConvLSTM2D(
        in_channels, out_channels, kernel_size, **{"engine": engine, "dtype": "float64", "seed": 0} | options
    )
    rng = np.random.default_rng(7)
    arrays = {name: 0.4 * rng.standard_normal(a.shape) for name, a in layer.parameters.items()}
    arrays |= {name: 0.5 + array**2 for name, array in arrays.items() if "variance" in name or "gamma" in name}
    layer.set_parameters(arrays)
    return layer


def flat(value):
    if isinstance(value, list | tuple):
        return [array for item in value for array in flat(item)]
    return [value]


def close(a, b, rtol=1e-10):
    for one, other in zip(flat(a), flat(b), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-12)


# Gradients: every option, by central differences along random directions, with random cotangents on every output.

OPTIONS = {
    "bidirectional": {"bidirectional": True},
    "sum": {"bidirectional": True, "merge_mode": "sum", "num_layers": 2, "leaky_relu_slope": 0.3},
    "mul": {"bidirectional": True, "merge_mode": "mul", "num_layers": 2},
    "ave, last": {"bidirectional": True, "merge_mode": "ave", "return_sequences": False},
    "no merge": {"bidirectional": True, "merge_mode": None},
    "no merge, last": {"bidirectional": True, "merge_mode": None, "return_sequences": False},
    "stacked, both ways, backwards": {"bidirectional": True, "num_layers": 2, "go_backwards": True},
    "elementwise": {"peephole": "elementwise", "frame_size": (H, W), "stride": 2, "num_layers": 2},
    "channel": {"peephole": "channel", "bidirectional": True},
    "conv": {"peephole": "conv", "peephole_size": (2, 3), "recurrent_kernel_size": (1, 4)},
    "conv, no biases": {"peephole": "conv", "use_bias": False},
    "layer": {"normalization": "layer"},
    "elementwise layer": {
        "normalization": Normalization("layer", elementwise=True, separate=True),
        "frame_size": (H, W),
    },
    "group": {"normalization": Normalization("group", groups=6), "num_layers": 2},
    "batch": {"normalization": "batch", "bidirectional": True},
    "dropout": {"dropout": 0.4, "recurrent_dropout": 0.3, "num_layers": 2},
    "time_dropout": {"time_dropout": 0.5, "go_backwards": True},
    "time_major": {"time_major": True, "data_format": "channels_first", "bidirectional": True},
    "penalties": {
        "kernel_regularizer": "l2",
        "recurrent_regularizer": "orthogonal",
        "bias_regularizer": "l1",
        "activity_regularizer": "l2",
        "bidirectional": True,
        "num_layers": 2,
    },
    "two penalized outputs": {"activity_regularizer": "l1_l2", "bidirectional": True, "merge_mode": None},
    "zeros under the mask": {"zero_output_for_mask": True, "bidirectional": True, "num_layers": 2},
    "zeros under the mask, last": {"zero_output_for_mask": True, "return_sequences": False},
    "sizes a layer": {
        "num_layers": 2,
        "out_channels": (3, 2),
        "kernel_size": [3, (2, 4)],
        "recurrent_kernel_size": [(3, 1), 2],
        "cell_clip": 0.5,
        "padding_mode": "circular",
    },
}


def x_of(layer):
    shape = [B, T, H, W]
    shape.insert(2 if layer.data_format == "channels_first" else 4, C)
    x = normal(*shape)
    return np.ascontiguousarray(x.swapaxes(0, 1)) if layer.time_major else x


def loss_of(layer, x, state, mask, cotangents):
    """The scalar whose gradient backward pulls, and the layer as that call leaves it."""
    outputs = flat(layer(x, initial_state=state, mask=mask, training=True))
    return sum((y * d).sum() for y, d in zip(outputs, cotangents, strict=True)) + layer.penalty


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(engine, name):
    def fresh():
        return make(engine, return_state=True, **OPTIONS[name])

    def make_call(changes):
        layer = fresh()  # the same seed: the same masks
        layer.set_parameters({n: a + changes.get(n, 0) for n, a in layer.parameters.items()})
        shift = [tuple(s + changes.get((index, k), 0) for k, s in enumerate(pair)) for index, pair in enumerate(states)]
        return loss_of(layer, x + changes.get("x", 0), shift, mask, cotangents)

    layer = fresh()
    x = x_of(layer)
    mask = None
    if "mask" in name:
        mask = np.array([[True, True, False, False], [False, True, False, True]])
    probe = fresh()(x, training=True)
    outputs, states = flat(probe[0]), [tuple(normal(*s.shape, seed=9) for s in pair) for pair in probe[1]]
    cotangents = [normal(*y.shape, seed=n) for n, y in enumerate(outputs + flat(probe[1]))]
    loss_of(layer, x, states, mask, cotangents)
    dstates = cotangents[len(outputs) :]
    pairs = list(zip(dstates[::2], dstates[1::2], strict=True))
    dy = tuple(cotangents[: len(outputs)]) if len(outputs) > 1 else cotangents[0]
    gradients = {"x": layer.backward(dy, pairs)} | layer.get_gradients()
    gradients |= {(index, k): d for index, pair in enumerate(layer.state_gradients) for k, d in enumerate(pair)}
    assert set(layer.get_gradients()) == set(layer.trainable_parameters)
    rng, step = np.random.default_rng(3), 1e-5
    for key, gradient in gradients.items():
        direction = rng.standard_normal(gradient.shape)
        numeric = (make_call({key: step * direction}) - make_call({key: -step * direction})) / (2 * step)
        scale = 1 + np.abs(gradient * direction).sum()
        assert abs((gradient * direction).sum() - numeric) < 2e-8 * scale, key


# Bidirectional


@pytest.mark.parametrize("return_sequences", [True, False])
@pytest.mark.parametrize("merge_mode", ["concat", "sum", "mul", "ave", None])
def test_the_backward_direction_is_a_layer_on_reversed_frames(engine, merge_mode, return_sequences):
    x = normal(B, T, H, W, C)
    mask = np.array([[True, True, True, False], [False, True, False, True]])
    options = {"return_sequences": return_sequences, "return_state": True}
    both = make(engine, bidirectional=True, merge_mode=merge_mode, **options)
    one, other = make(engine, **options), make(engine, go_backwards=True, **options)
    for layer, name in ((one, "forward"), (other, "backward")):
        layer.set_parameters({n: both.parameters[n.replace(".0.", f".0.{name}.")] for n in layer.parameters})
    output, states = both(x, mask=mask)
    (a, (first,)), (b, (second,)) = one(x, mask=mask), other(x, mask=mask)
    if return_sequences:
        b = b[:, ::-1]
    expected = {"concat": lambda: np.concatenate([a, b], -1), "sum": lambda: a + b, "mul": lambda: a * b,
                "ave": lambda: (a + b) / 2, None: lambda: (a, b)}[merge_mode]()  # fmt: skip
    close(output, expected)
    close(states, [first, second])
    shape = both.output_shape(x.shape)
    assert shape == (tuple(y.shape for y in output) if merge_mode is None else output.shape)


def test_directions_have_weights_of_their_own():
    layer = make(bidirectional=True, num_layers=2)
    assert list(layer._sublayers) == ["layers.0.forward", "layers.0.backward", "layers.1.forward", "layers.1.backward"]
    assert layer.cells[2].in_channels == 2 * F
    assert make(bidirectional=True, num_layers=2, merge_mode="sum").cells[2].in_channels == F
    assert layer.weights["1.backward.W_xi"].shape == (F, 2 * F, 3, 3)
    assert make(bidirectional=True).weights["backward.b_o"].shape == (F, 1, 1)


def test_going_backwards_both_ways_is_both_ways_on_reversed_frames(engine):
    x = normal(B, T, H, W, C)
    mask = np.array([[True, True, True, False], [False, True, False, True]])
    there, back = (make(engine, bidirectional=True, num_layers=2, go_backwards=flag) for flag in (False, True))
    close(back(x, mask=mask), there(x[:, ::-1], mask=mask[:, ::-1]))


# State


def test_a_stateful_layer_goes_on_where_it_stopped(engine):
    x = normal(B, 6, H, W, C)
    layer, plain = make(engine, stateful=True, num_layers=2), make(engine, num_layers=2)
    whole = plain(x)
    close(np.concatenate([layer(x[:, :2]), layer(x[:, 2:])], 1), whole)
    close(layer(x[:, :2], initial_state=[(None, None)] * 2), whole[:, :2])  # given states come first
    close(layer(x[:, 2:]), whole[:, 2:])
    layer.reset_state()
    assert layer.states is None
    close(layer(x[:, :1]), whole[:, :1])
    with pytest.raises(ValueError, match=r"the states kept from the last call are .* call reset_state\(\)"):
        layer(x[:1])
    assert make(engine)(x[:1]).shape[0] == 1


def test_kept_states_belong_to_the_layer(engine):
    x = normal(B, 2, H, W, C)
    layer = make(engine, stateful=True, return_state=True)
    _, [(h, c)] = layer(x)
    expected = make(engine)(np.concatenate([x, x], 1))[:, 2:]
    h[...], c[...] = np.nan, np.nan
    assert np.isfinite(layer.states[0][0]).all()
    layer.states[0][0][...] = np.nan
    close(layer(x)[0], expected)


# Layouts


@pytest.mark.parametrize(
    ("time_major", "data_format"), list(itertools.product([False, True], ["channels_last", "channels_first"]))
)
def test_layouts_are_the_same_numbers(engine, time_major, data_format):
    x = normal(B, T, H, W, C)
    mask = np.array([[True, True, False, False], [False, True, False, True]])
    options = {"return_state": True, "bidirectional": True}
    expected, expected_states = make(engine, **options)(x, mask=mask)
    layer = make(engine, time_major=time_major, data_format=data_format, **options)

    def arranged(a):
        sequence = a.ndim == 5
        a = np.moveaxis(a, -1, 2 if sequence else 1) if data_format == "channels_first" else a
        return a.swapaxes(0, 1) if time_major and sequence else a

    y, states = layer(arranged(x), mask=mask.T if time_major else mask)
    close(y, arranged(expected))
    close(states, [tuple(map(arranged, pair)) for pair in expected_states])
    assert layer.output_shape(arranged(x).shape) == y.shape
    lengths = np.array([2, 4])
    close(layer(arranged(x), lengths=lengths)[0], arranged(make(engine, **options)(x, lengths=lengths)[0]))
    one, one_states = layer(arranged(x)[:, 0] if time_major else arranged(x)[0], mask=mask[0])
    close(one, arranged(expected)[:, 0] if time_major else arranged(expected)[0])
    close(one_states, [tuple(arranged(s)[0] for s in pair) for pair in expected_states])
    again, _ = layer(arranged(x)[:, 0] if time_major else arranged(x)[0], one_states, lengths=3)
    assert again.shape == one.shape


def test_one_sequence_without_a_batch_axis_trains_too(engine):
    x, layer = normal(T, H, W, C), make(engine)
    dy = normal(T, H, W, F)
    y = layer(x, training=True)
    dx = layer.backward(dy)
    assert (y.shape, dx.shape) == (dy.shape, x.shape)
    close(dx, make_and_pull(engine, x[np.newaxis], dy[np.newaxis])[0])


def make_and_pull(engine, x, dy):
    layer = make(engine)
    layer(x, training=True)
    return layer.backward(dy)


def test_a_cell_takes_one_frame(engine):
    cell = make(engine).cells[0]
    x = normal(H, W, C)
    h, c = cell(x)
    close((h, c), tuple(s[0] for s in cell(x[np.newaxis])))
    close(cell(x, h, c), tuple(s[0] for s in cell(x[np.newaxis], h[np.newaxis], c[np.newaxis])))
    assert cell.output_shape(x.shape) == (H, W, F)


@pytest.mark.parametrize(
    ("layer", "x", "mask", "message"),
    [
        ({}, (T, H, W, C), (1, T), r"mask has shape \(1, 4\) but must be \(4,\) \(\(time,\)\)"),
        (
            {"time_major": True},
            (T, B, H, W, C),
            (B, T),
            r"mask has shape \(2, 4\) but must be \(4, 2\) \(\(time, batch",
        ),
        ({}, (B, T, H, W, C), (T, B), r"mask has shape \(4, 2\) but must be \(2, 4\) \(\(batch, time"),
    ],
)
def test_wrong_masks(layer, x, mask, message):
    with pytest.raises(ValueError, match=message):
        make(**layer)(np.zeros(x), mask=np.ones(mask))


# Masks


@pytest.mark.parametrize("go_backwards", [False, True])
def test_masked_outputs_may_be_zeros(engine, go_backwards):
    x = normal(B, T, H, W, C)
    mask = np.array([[True, True, False, False], [False, True, False, True]])
    options = {"go_backwards": go_backwards, "return_state": True}
    repeated, states = make(engine, **options)(x, mask=mask)
    zeros, same_states = make(engine, zero_output_for_mask=True, **options)(x, mask=mask)
    processed = mask[:, ::-1] if go_backwards else mask
    assert (zeros[~processed] == 0).all()
    close(zeros[processed], repeated[processed])
    close(states, same_states)
    last, _ = make(engine, zero_output_for_mask=True, return_sequences=False, **options)(x, mask=mask)
    close(last, zeros[:, -1])


# Dropout


def test_each_gate_has_a_mask_of_its_own_for_all_steps(monkeypatch, engine):
    seen = []
    original = functional.convlstm2d_vjp
    monkeypatch.setattr(
        functional, "convlstm2d_vjp", lambda *a, **o: seen.append(o["dropout_masks"]) or original(*a, **o)
    )
    layer = make(engine, 40, F, 3, dropout=0.25, recurrent_dropout=0.5)
    x = normal(B, T, H, W, 40)
    y = layer(x, training=True)
    masks = seen[0]
    assert masks["x"].shape == (4, B, H, W, 40)
    assert masks["h"].shape == (4, B, H, W, F)
    assert set(np.unique(masks["x"])) == {0, 1 / 0.75}
    assert set(np.unique(masks["h"])) == {0, 2}
    assert np.mean(masks["x"] == 0) == pytest.approx(0.25, abs=0.02)
    for one, other in itertools.combinations(masks["x"], 2):
        assert (one != other).any()
    cell = layer.cells[0]
    expected = functional.convlstm2d(x, cell.kernel, cell.recurrent_kernel, cell.bias, dropout_masks=masks,
                                     engine="reference")  # fmt: skip
    close(y, expected)
    layer(x, training=True)
    assert (seen[1]["x"] != masks["x"]).any()  # drawn anew by each call
    close(layer(x), make(engine, 40, F, 3)(x))  # nothing is dropped without training


def test_dropout_comes_from_the_seed():
    x = normal(1, T, H, W, C)
    options = {"dropout": 0.5, "recurrent_dropout": 0.5, "time_dropout": 0.3}
    first, second = (make(**options)(x, training=True) for _ in range(2))
    close(first, second)
    assert (make(**options, seed=1)(x, training=True) != first).any()
    shared = [make(**options, seed=np.random.default_rng(5))(x, training=True) for _ in range(2)]
    close(*shared)
    rng = np.random.Generator(np.random.MT19937(np.random.RandomState(1).randint(9, size=3)))
    assert make(**options, seed=rng)(x, training=True).shape == first.shape


def test_time_dropout_sets_whole_frames_to_zero(engine):
    x = normal(B, 30, H, W, C)
    layer = make(engine, time_dropout=0.5)
    y = layer(x, training=True)
    kept = (layer.backward(np.ones_like(y)) != 0).any((0, 2, 3, 4))
    assert 5 < kept.sum() < 25
    close(y, make(engine)(x * kept.reshape(-1, 1, 1, 1)))
    close(make(engine, time_dropout=1)(x, training=True), make(engine)(0 * x))


# Batch normalization


def test_moving_statistics_follow_the_steps(engine):
    x = normal(B, 2, H, W, C)
    layer = make(engine, normalization=Normalization("batch", momentum=0.8), use_bias=False)
    cell = layer.cells[0]
    mean, variance = cell.moving_mean, cell.moving_variance
    h = np.zeros((B, H, W, F))
    expected_mean, expected_variance = mean, variance
    for t in range(2):
        z = functional.conv2d(x[:, t], cell.kernel) + functional.conv2d(h, cell.recurrent_kernel)
        expected_mean = 0.8 * expected_mean + 0.2 * z.mean((0, 1, 2))
        expected_variance = 0.8 * expected_variance + 0.2 * z.var((0, 1, 2), ddof=1)
        other = make(engine, normalization=Normalization("batch", momentum=0.8), use_bias=False)
        h = other(x[:, : t + 1], training=True)[:, -1]
    layer(x, training=True)
    close(cell.moving_mean, expected_mean)
    close(cell.moving_variance, expected_variance)
    after = cell.moving_mean
    layer(x)
    for freeze in (layer, cell):
        freeze.trainable = False
        inference = layer(x)
        close(layer(x, training=True), inference)
        freeze.trainable = True
    close(cell.moving_mean, after)


def test_moving_statistics_are_no_gradients():
    layer = make(normalization="batch")
    assert {n for n in layer.parameters if "moving" in n} == {"layers.0.moving_mean", "layers.0.moving_variance"}
    assert not any("moving" in n for n in layer.trainable_parameters)


def test_inference_folds_the_statistics_into_the_kernels_once(monkeypatch):
    folded, fold = [], functional.convlstm.ConvLSTMCall._with_normalization
    monkeypatch.setattr(
        functional.convlstm.ConvLSTMCall, "_with_normalization", lambda call: (folded.append(call), fold(call))[1]
    )
    cell = ConvLSTM2DCell(C, F, 3, normalization="batch", seed=0, dtype="float64")
    x, state = normal(B, H, W, C), (normal(B, H, W, F), normal(B, H, W, F))
    before = [cell.step(x, *state)[0] for _ in range(3)]
    assert len(folded) == 1
    np.testing.assert_array_equal(before[0], before[2])
    for name in ("moving_mean", "moving_variance", "gamma", "beta", "kernel", "recurrent_kernel", "bias"):
        setattr(cell, name, 1.25 * getattr(cell, name) + 0.125)
        h, _ = cell.step(x, *state)
        cell.engine = "reference"
        close(h, cell.step(x, *state)[0])
        cell.engine = None
        assert np.abs(h - before[0]).max() > 1e-3
        before[0] = h
    assert len(folded) == 8


# Regularizers, constraints, freezing


def test_penalties_add_up():
    layer = make(kernel_regularizer="l2", bias_regularizer="l1", activity_regularizer="l2", num_layers=2)
    weights = sum(0.01 * (c.kernel**2).sum() + 0.01 * np.abs(c.bias).sum() for c in layer.cells)
    assert layer.penalty == pytest.approx(weights, rel=1e-12)
    y = layer(normal(B, T, H, W, C), training=True)
    assert layer.penalty == pytest.approx(weights + 0.01 * (y**2).sum() / B, rel=1e-12)


def test_constraints_are_applied_when_asked():
    layer = make(
        kernel_constraint="non_neg", recurrent_constraint="max_norm", bias_constraint="unit_norm", num_layers=2
    )
    before = layer.parameters
    layer.apply_constraints()
    for cell in layer.cells:
        assert (cell.kernel >= 0).all()
        assert np.sqrt((cell.recurrent_kernel**2).sum(0)).max() <= 2 + 1e-6
        assert np.sqrt((cell.bias**2).sum()) == pytest.approx(1, rel=1e-6)
    close(layer.cells[0].kernel, np.maximum(before["layers.0.kernel"], 0))


def test_one_layer_of_a_stack_can_be_frozen():
    layer = make(num_layers=2)
    layer.cells[0].trainable = False
    y = layer(normal(B, T, H, W, C), training=True)
    dx = layer.backward(np.ones_like(y))
    assert set(layer.get_gradients()) == {"layers.1.kernel", "layers.1.recurrent_kernel", "layers.1.bias"}
    assert dx.any()


# Files


@pytest.mark.parametrize("name", OPTIONS)
def test_saved_layers_come_back(tmp_path, name):
    layer = make("reference", **OPTIONS[name])
    layer.save(tmp_path / "w")
    other = ConvLSTM2D.load(tmp_path / "w")
    assert repr(other) == repr(layer)
    x = x_of(layer)
    close(other(x), layer(x), rtol=0)
    close(other(x, training=True), layer(x, training=True), rtol=0)  # the same masks too


# Impossible combinations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peephole": "all"}, "peephole must be one of None, 'elementwise', 'channel', 'conv', got 'all'"),
        ({"peephole": "elementwise"}, r"peephole='elementwise' has a weight for every pixel; give frame_size=\(H, W\)"),
        (
            {"normalization": Normalization("layer", elementwise=True)},
            "elementwise normalization has a weight for every",
        ),
        ({"peephole": "channel", "peephole_size": 3}, "peephole_size goes with peephole='conv' only"),
        ({"normalization": "middle"}, "unknown normalization 'middle'"),
        ({"normalization": Normalization("group", groups=5)}, "cannot be normalized in 5 groups of equal size"),
        ({"bidirectional": True, "merge_mode": "max"}, "merge_mode must be one of 'concat', 'sum', 'mul', 'ave', None"),
        ({"bidirectional": True, "merge_mode": None, "num_layers": 2}, "merge_mode=None gives two outputs"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\)"),
        ({"recurrent_dropout": -0.1}, r"recurrent_dropout must be a number in \[0, 1\)"),
        ({"time_dropout": 1.5}, r"time_dropout must be a number in \[0, 1\]"),
        ({"time_dropout": "0.5"}, r"time_dropout must be a number in \[0, 1\]"),
        ({"use_bias": "no"}, "use_bias must be True or False, got 'no'"),
        ({"bidirectional": 1}, "bidirectional must be True or False, got 1"),
        ({"leaky_relu_slope": True}, "leaky_relu_slope must be a finite number or None, got True"),
        ({"cell_clip": True}, "cell_clip must be a positive number or None, got True"),
        ({"output_activation": ""}, "output_activation: unknown activation ''"),
        ({"peephole_initializer": "bogus"}, "unknown initializer 'bogus'"),
        ({"bias_regularizer": "orthogonal"}, "ConvLSTM2D: bias: "),
        ({"bias_constraint": MaxNorm(axis=5)}, "ConvLSTM2D: bias: "),
        ({"recurrent_kernel_size": 0}, "recurrent_kernel_size must be an integer >= 1"),
        ({"recurrent_kernel_size": [3, 3]}, "recurrent_kernel_size .* lists 2 layers but num_layers is 1"),
        ({"frame_size": 0}, "frame_size must be an integer >= 1"),
        ({"engine": "gpu"}, "unknown engine 'gpu'"),
        ({"engine": ["cpu"]}, "unknown engine"),
        ({"algorithm": "fft"}, "algorithm must be one of 'auto', 'direct', 'winograd'"),
        ({"dtype": None}, "dtype must be one of 'float32', 'float64'"),
        ({"stride": 10**30}, "strides must be an integer >= 1"),
        ({"padding": 10**12}, "padding of the height must be an integer >= 0"),
        ({"kernel_regularizer": "l3"}, "unknown regularizer 'l3'"),
        ({"kernel_constraint": "narrow"}, "unknown constraint 'narrow'"),
        ({"activity_regularizer": "l3"}, "unknown regularizer 'l3'"),
        ({"kernel_initializer": "small"}, "unknown initializer 'small'"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        ConvLSTM2D(C, F, 3, **options)


def test_seeds_are_checked():
    with pytest.raises(TypeError, match=r"ConvLSTM2D: seed must be None, an integer >= 0 or a .*Generator, got 'now'"):
        ConvLSTM2D(C, F, 3, seed="now")


def test_options_that_are_fixed_cannot_be_assigned():
    layer = make()
    for name, value in (("activation", "relu"), ("dropout", 0.9), ("bidirectional", True), ("merge_mode", "sum")):
        with pytest.raises(AttributeError, match=f"ConvLSTM2D: {name} is fixed when the layer is made"):
            setattr(layer, name, value)
    with pytest.raises(AttributeError, match=r"kernel is a parameter of a cell; assign to layer\.cells\[0\]\.kernel"):
        layer.kernel = layer.cells[0].kernel
    with pytest.raises(AttributeError, match="ConvLSTM2DCell: activation is fixed"):
        layer.cells[0].activation = "relu"
    layer.return_sequences, layer.engine = False, "reference"
    assert layer(normal(B, T, H, W, C)).shape == (B, H, W, F)


def test_ragged_lists_are_told():
    for wrong in ([[1, 2], [3]], [[[[[1.0]]], 2]]):
        with pytest.raises(TypeError, match="ConvLSTM2D: x is not a rectangular array"):
            make()(wrong)
    layer = make()
    layer(normal(B, T, H, W, C), training=True)
    with pytest.raises(TypeError, match="ConvLSTM2D: dy is not a rectangular array"):
        layer.backward([[1, 2], [3]])


def test_no_time_steps():
    with pytest.raises(ValueError, match="x has no time steps"):
        make(time_dropout=0.5)(np.zeros((B, 0, H, W, C)), training=True)
    with pytest.raises(ValueError, match="x has no time steps"):
        make().output_shape((B, 0, H, W, C))


def test_output_shapes_of_unknown_sizes():
    assert make().output_shape((None, T, H, W, C)) == (None, T, H, W, F)
    assert make(return_sequences=False).output_shape((None, None, H, W, C)) == (None, H, W, F)
    assert make(time_major=True).output_shape((None, B, H, W, C)) == (None, B, H, W, F)
    assert make(time_major=True, return_sequences=False).output_shape((T, None, H, W, C)) == (None, H, W, F)
    assert make(return_sequences=False).output_shape((T, H, W, C)) == (H, W, F)


def test_a_wrong_initial_state_is_told():
    with pytest.raises(ValueError, match=r"a list of 2 pairs \(h, c\), one a layer; got 1 items"):
        make(num_layers=2)(normal(B, T, H, W, C), initial_state=[(None, None)])


# What calls leave behind


@pytest.mark.parametrize("go_backwards", [False, True])
def test_only_the_last_output_of_a_stack_is_kept_in_memory(engine, go_backwards):
    options = {"num_layers": 2, "out_channels": 8, "go_backwards": go_backwards, "leaky_relu_slope": 0.2}
    layer, whole = (make(engine, return_sequences=flag, return_state=True, **options) for flag in (False, True))
    peaks = []
    for steps in (40, 160):
        x = normal(1, steps, 16, 16, C)
        layer(x)
        tracemalloc.start()
        output, states = layer(x)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        expected, expected_states = whole(x)
        np.testing.assert_array_equal(output, expected[:, -1])
        for one, other in zip(flat(states), flat(expected_states), strict=True):
            np.testing.assert_array_equal(one, other)
    assert peaks[1] < 1.1 * peaks[0]


def test_what_the_caller_does_to_the_output_does_not_reach_backward(engine):
    x, dy = normal(B, T, H, W, C), normal(B, T, H, W, F, seed=4)
    results = []
    for spoil in (False, True):
        layer = make(engine, activity_regularizer="l2", bidirectional=True, merge_mode="mul")
        y = layer(x, training=True)
        if spoil:
            y[...] = 0
        results.append([layer.backward(dy), *layer.get_gradients().values()])
    close(*results, rtol=0)


def test_the_penalty_is_on_the_output_as_it_is_returned():
    last = make(activity_regularizer="orthogonal")
    first = make(activity_regularizer="orthogonal", data_format="channels_first")
    y = first(np.moveaxis(normal(B, T, H, W, C), -1, 2), training=True)
    last(normal(B, T, H, W, C), training=True)
    assert first.penalty == pytest.approx(regularizers.get("orthogonal")(y) / B, rel=1e-12)
    assert first.penalty != last.penalty


def test_interrupted_training_leaves_no_statistics_half_moved(monkeypatch):
    layer = make(num_layers=2, normalization="batch")
    before = layer.parameters
    original = ConvLSTM2DCell._run

    def interrupted(self, *args, **options):
        if self is layer.cells[1]:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    monkeypatch.setattr(ConvLSTM2DCell, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layer(normal(B, T, H, W, C), training=True)
    assert all(layer.parameters[name] is array for name, array in before.items())


def test_dropped_frames_are_zeros_whatever_they_held():
    x = np.full((B, T, H, W, C), np.nan)
    y = make(time_dropout=1.0)(x, training=True)
    assert np.isfinite(y).all()


# Training switches


def test_gradients_can_be_scaled_and_left_out(engine):
    x, dy = normal(B, T, H, W, C), normal(B, T, H, W, F)
    plain = make(engine)
    plain(x, training=True)
    dx, gradients = plain.backward(dy), plain.get_gradients()
    plain.gradient_scale = 0.5
    close(plain.backward(dy), dx / 2)
    close(list(plain.get_gradients().values()), list(gradients.values()))
    plain.store_gradients = False
    plain.backward(dy)
    assert plain.get_gradients() == {}
    cell = plain.cells[0]
    cell(x[:, 0], training=True)
    whole = cell.backward(dy[:, 0])
    cell.gradient_scale = 3.0
    scaled = cell.backward(dy[:, 0])
    close(scaled, (3 * whole[0], *whole[1:]))


def test_frozen_layers_stay_as_they_are(tmp_path):
    layer = make(kernel_constraint="unit_norm", kernel_regularizer="l2", num_layers=2)
    layer.cells[0].trainable = False
    kernel, penalty = layer.cells[0].kernel, layer.cells[1].penalty
    layer.apply_constraints()
    assert layer.cells[0].kernel is kernel
    assert layer.penalty == layer.cells[1].penalty != penalty
    layer.save(tmp_path / "w")
    loaded = ConvLSTM2D.load(tmp_path / "w")
    assert [cell.trainable for cell in loaded.cells] == [False, True]
    assert loaded.trainable
    layer.trainable = False
    assert layer.penalty == 0
    layer.save(tmp_path / "w")
    assert not ConvLSTM2D.load(tmp_path / "w").trainable


def test_other_frames_than_the_weights_are_for():
    with pytest.raises(ValueError, match=r"x has frames of 6×6 pixels but frame_size is \(5, 6\)"):
        make(peephole="elementwise", frame_size=(H, W))(np.zeros((1, 1, 6, 6, C)))


def test_gradients_of_two_outputs_come_in_pairs():
    layer = make(bidirectional=True, merge_mode=None)
    layer(normal(B, T, H, W, C), training=True)
    with pytest.raises(ValueError, match="dy must be a pair"):
        layer.backward(np.zeros((B, T, H, W, F)))
    assert layer.backward(None).shape == (B, T, H, W, C)


# Every combination


@st.composite
def configurations(draw):
    flag = st.booleans()
    options = {
        "bidirectional": draw(flag), "merge_mode": draw(st.sampled_from(["concat", "sum", "mul", "ave"])),
        "num_layers": draw(st.integers(1, 2)), "stride": draw(st.sampled_from([1, 1, 2])),
        "padding": draw(st.sampled_from(["same", "valid", ((1, 0), (2, 1))])),
        "kernel_size": draw(st.sampled_from([3, (2, 4), 1])), "go_backwards": draw(flag),
        "recurrent_kernel_size": draw(st.sampled_from([None, 3, (4, 1)])), "time_major": draw(flag),
        "peephole": draw(st.sampled_from([None, "channel", "conv", "elementwise"])),
        "normalization": draw(st.sampled_from([None, "layer", "group", "batch", Normalization("batch", separate=True),
                                               Normalization("layer", separate=True, elementwise=True)])),
        "leaky_relu_slope": draw(st.sampled_from([None, 0.2])), "cell_clip": draw(st.sampled_from([None, 0.7])),
        "data_format": draw(st.sampled_from(["channels_last", "channels_first"])), "use_bias": draw(flag),
        "return_sequences": draw(flag), "zero_output_for_mask": draw(flag), "frame_size": (H, W),
        "activation": draw(st.sampled_from(["tanh", "softsign", "gelu"])),
        "recurrent_activation": draw(st.sampled_from(["sigmoid", "hard_sigmoid"])),
        "dropout": draw(st.sampled_from([0.0, 0.3])), "recurrent_dropout": draw(st.sampled_from([0.0, 0.3])),
        "time_dropout": draw(st.sampled_from([0.0, 0.3])), "padding_mode": draw(st.sampled_from(["zeros", "circular"])),
        "recompute": draw(flag),
    }  # fmt: skip
    if options["num_layers"] == 2 and options["padding"] == "valid":  # the frames would become too small
        options["padding"] = "same"
    return options, draw(flag), draw(flag)


@settings(max_examples=60)
@given(configurations())
def test_engines_agree_whatever_the_options(configuration):
    options, training, masked = configuration
    mask = np.array([[True, True, False, False], [False, True, False, True]]) if masked else None
    results = []
    for engine in ("reference", "cpu"):
        layer = make(engine, return_state=True, **options)
        x = x_of(layer)
        out, states = layer(x, mask=mask if mask is None or not layer.time_major else mask.T, training=training)
        assert out.shape == layer.output_shape(x.shape)
        result = [out, *flat(states)]
        if training:
            result.append(layer.backward(np.cos(out)))
            result += layer.get_gradients().values()
        results.append(result)
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10 * max(1, np.abs(one).max()))


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "num_layers": 2}, {"dropout": 0.3, "normalization": "batch"}]
)
def test_recompute_changes_no_gradient(engine, options):
    x, mask, results = normal(B, 9, H, W, C), np.arange(9) < np.array([[9], [6]]), []
    for recompute in (False, True):
        layer = make(engine, recompute=recompute, **options)
        y = layer(x, mask=mask, training=True)
        dx = layer.backward(np.cos(y))
        results.append([y, dx, *layer.get_gradients().values(), *layer.parameters.values()])
        again = layer.backward(np.cos(y))
        close(again, dx)
    close(*results)
    for wrong in (1, None):
        with pytest.raises(ValueError, match="recompute must be True or False"):
            make(engine, recompute=wrong)


def test_float32_layers_compute_in_float32():
    layer = ConvLSTM2D(C, F, 3, bidirectional=True, merge_mode="ave", dropout=0.1, recurrent_dropout=0.1, seed=0,
                       normalization="batch", peephole="channel", activity_regularizer="l2", leaky_relu_slope=0.1,
                       num_layers=2, kernel_regularizer="l2", time_dropout=0.1)  # fmt: skip
    y = layer(normal(B, T, H, W, C), training=True)
    dx = layer.backward(np.ones(y.shape))
    arrays = [y, dx, *layer.get_gradients().values(), *layer.parameters.values()]
    assert {a.dtype for a in arrays} == {np.dtype(np.float32)}


def test_an_empty_batch(engine):
    layer = ConvLSTM2D(C, F, 3, bidirectional=True, normalization="batch", dropout=0.1, peephole="conv", engine=engine,
                       activity_regularizer="l2", return_state=True)  # fmt: skip
    y, _ = layer(np.zeros((0, T, H, W, C)), training=True)
    assert y.shape == (0, T, H, W, 2 * F)
    assert layer.backward(y).shape == (0, T, H, W, C)
    assert all(np.isfinite(a).all() for a in layer.parameters.values())


def test_a_cell_trains_with_every_option(engine):
    cell = ConvLSTM2DCell(C, F, 3, peephole="conv", normalization="batch", dropout=0.2, recurrent_dropout=0.2, seed=0,
                          kernel_regularizer="l2", engine=engine, dtype="float64")  # fmt: skip
    x, h, c = normal(B, H, W, C), normal(B, H, W, F), normal(B, H, W, F, seed=3)
    cell(x, h, c, training=True)
    dx, dh, dc = cell.backward(h, c)
    assert (dx.shape, dh.shape, dc.shape) == (x.shape, h.shape, c.shape)
    assert set(cell.get_gradients()) == set(cell.trainable_parameters)
