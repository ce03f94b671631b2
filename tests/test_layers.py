import copy
import inspect
import pickle
import re
import tracemalloc

import numpy as np
import pytest
from layer_checks import close, equal, normal

from fastclstm import dispatch, functional
from fastclstm.layers import ConvLSTM2D, ConvLSTM2DCell, Layer, MaxPooling3D, TimeDistributionCalculator

REFERENCE_KEYS = ["W_xi", "W_hi", "W_xf", "W_hf", "W_xc", "W_hc", "W_xo", "W_ho", "b_i", "b_f", "b_c", "b_o"]


@pytest.fixture(params=["reference", "cpu"])
def engine(request):
    return request.param


@pytest.fixture
def build(engine):
    """ConvLSTM2D(…) in float64 on the engine under test, from a fixed seed, with biases that are not zero."""

    def layer(*args, **kwargs):
        defaults = {"engine": engine, "dtype": "float64", "seed": 0, "bias_initializer": "random_normal"}
        return ConvLSTM2D(*args, **defaults | kwargs)

    return layer


def options_of(layer):
    return {
        k: getattr(layer, k) for k in ("padding_mode", "recurrent_dilation", "cell_clip", "engine", "algorithm")
    } | {
        "strides": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
    }


def run_cell(cell, x, **kwargs):
    return functional.convlstm2d(x, cell.kernel, cell.recurrent_kernel, cell.bias, **options_of(cell) | kwargs)


def leaky(x, slope):
    return np.where(x > 0, x, slope * x)


# Signatures and shapes


SHARED_OPTIONS = {
    "use_bias": True,
    "unit_forget_bias": True,
    "kernel_initializer": "glorot_uniform",
    "recurrent_initializer": "orthogonal",
    "bias_initializer": "zeros",
    "kernel_regularizer": None,
    "recurrent_regularizer": None,
    "bias_regularizer": None,
    "kernel_constraint": None,
    "recurrent_constraint": None,
    "bias_constraint": None,
    "activation": "tanh",
    "recurrent_activation": "sigmoid",
    "output_activation": None,
    "dilation": 1,
    "padding_mode": "zeros",
    "recurrent_kernel_size": None,
    "recurrent_dilation": 1,
    "peephole": None,
    "peephole_size": None,
    "peephole_initializer": "zeros",
    "normalization": None,
    "frame_size": None,
    "cell_clip": None,
    "dropout": 0.0,
    "recurrent_dropout": 0.0,
    "data_format": "channels_last",
    "dtype": "float32",
    "seed": None,
    "engine": None,
    "algorithm": "auto",
}
SEQUENCE_OPTIONS = {
    "return_sequences": True,
    "return_state": False,
    "go_backwards": False,
    "stateful": False,
    "bidirectional": False,
    "merge_mode": "concat",
    "zero_output_for_mask": False,
    "time_major": False,
    "time_dropout": 0.0,
    "recompute": False,
    "activity_regularizer": None,
}
POOLING_OPTIONS = {
    "padding": "valid",
    "ceil_mode": False,
    "data_format": "channels_last",
    "return_indices": False,
    "engine": None,
}


CONVLSTM = "in_channels, out_channels, kernel_size, padding='same', stride=1, leaky_relu_slope=None"


@pytest.mark.parametrize(
    ("function", "positional", "keywords"),
    [
        (ConvLSTM2D, f"{CONVLSTM}, num_layers=1", SHARED_OPTIONS | SEQUENCE_OPTIONS),
        (ConvLSTM2DCell, CONVLSTM, SHARED_OPTIONS),
        (MaxPooling3D, "pool_size=(2, 2, 2), stride=None", POOLING_OPTIONS),
        (TimeDistributionCalculator, "dropout_rate, num_timesteps", {"seed": None}),
        (ConvLSTM2D.forward, "self, x, initial_state=None, mask=None, lengths=None, training=False", {}),
        (ConvLSTM2DCell.forward, "self, x_t, h=None, c=None, training=False", {}),
    ],
)
def test_signatures(function, positional, keywords):
    parameters = [
        p.replace(annotation=inspect.Parameter.empty)
        for p in inspect.signature(function).parameters.values()
        if p.name != "name"  # which every layer has
    ]
    named = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert ", ".join(str(p) for p in parameters if p not in named) == positional
    assert {p.name: p.default for p in named} == keywords


def test_the_seed_example(engine):
    layer = ConvLSTM2D(1, 32, 3, 1, 1, 0.2, 1, engine=engine)
    x = normal(1, 10, 32, 32, 1)
    h = layer.forward(x)
    assert h.shape == (1, 10, 32, 32, 32)
    assert h.dtype == np.float32
    equal(layer(x), h)
    assert MaxPooling3D((2, 2, 2), (2, 2, 2), engine=engine).forward(h).shape == (1, 5, 16, 16, 32)
    first = MaxPooling3D((2, 2, 2), (2, 2, 2), data_format="channels_first", engine=engine)
    assert first.forward(h).shape == (1, 10, 16, 16, 16)


def test_output_shape_is_what_forward_returns(build):
    x = normal(2, 3, 9, 8, 1)
    for options in (
        {},
        {"stride": 2, "num_layers": 2},
        {"padding": "valid", "kernel_size": (2, 3)},
        {"return_sequences": False},
    ):
        layer = build(**{"in_channels": 1, "out_channels": 2, "kernel_size": 3} | options)
        assert layer.output_shape(x.shape) == layer(x).shape
        first = build(
            **{"in_channels": 1, "out_channels": 2, "kernel_size": 3, "data_format": "channels_first"} | options
        )
        channels_first = np.moveaxis(x, -1, 2)
        assert first.output_shape(channels_first.shape) == first(channels_first).shape
    assert layer.output_shape((0, *x.shape[1:])) == layer(x[:0]).shape


# Numbers


def correlate(x, kernel):
    """(B, H, W, C) with (F, C, k, k), the frame kept by zeros: from the definition."""
    k = kernel.shape[-1]
    H, W = x.shape[1:3]
    before, after = (k - 1) // 2, k // 2
    x = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    return sum(x[:, i : i + H, j : j + W] @ kernel[:, :, i, j].T for i in range(k) for j in range(k))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_weights_mean_the_equations(build, k):
    layer = build(3, 2, k)
    w = {key: np.array(value) for key, value in layer.weights.items()}
    x = normal(2, 3, 5, 4, 3)
    h = c = np.zeros((2, 5, 4, 2))
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    for t, output in enumerate(layer(x).swapaxes(0, 1)):
        z = {
            gate: correlate(x[:, t], w[f"W_x{gate}"]) + correlate(h, w[f"W_h{gate}"]) + w[f"b_{gate}"].ravel()
            for gate in "ifco"
        }
        c = sigmoid(z["f"]) * c + sigmoid(z["i"]) * np.tanh(z["c"])
        h = sigmoid(z["o"]) * np.tanh(c)
        close(output, h)
        assert t < 3


def test_one_layer_is_the_functional_whatever_the_slope(build):
    x = normal(2, 3, 5, 4, 2)
    layer = build(2, 3, 3)
    equal(layer(x), run_cell(layer.cells[0], x))
    for slope in (0.2, 1.0, -3):
        equal(build(2, 3, 3, "same", 1, slope)(x), layer(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("slope", [None, 1.0, 0.2])
def test_stacked_layers_are_their_composition(build, slope, training):
    layer = build(2, [3, 2, 4], [3, (2, 3), 1], leaky_relu_slope=slope, num_layers=3, return_state=True)
    assert [cell.kernel.shape for cell in layer.cells] == [(3, 3, 2, 12), (2, 3, 3, 8), (1, 1, 2, 16)]
    x = normal(2, 3, 5, 4, 2)
    output, states = layer(x, training=training)
    y = x
    for n, (cell, state) in enumerate(zip(layer.cells, states, strict=True)):
        y = y if n == 0 or slope is None else leaky(y, slope)
        y, *last = run_cell(cell, y, return_state=True)
        close(state, last)
    close(output, y)


def test_the_slope_matters_between_layers(build):
    x = normal(1, 2, 5, 4, 1)
    outputs = [build(1, 2, 3, leaky_relu_slope=slope, num_layers=2)(x) for slope in (None, 1.0, 0.2)]
    equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-3


def test_kernel_size_tuple_is_one_size_and_list_is_one_each(build):
    assert [cell.kernel_size for cell in build(1, 1, (3, 5), num_layers=2).cells] == [(3, 5), (3, 5)]
    assert [cell.kernel_size for cell in build(1, 1, [3, 5], num_layers=2).cells] == [(3, 3), (5, 5)]
    assert [cell.kernel_size for cell in build(1, 1, ((3, 5), (1, 1)), num_layers=2).cells] == [(3, 5), (1, 1)]
    assert build(1, 1, np.array([3, 5])).kernel_size == (3, 5)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"stride": (1, 2), "padding": "valid"},
        {"padding": ((1, 0), (2, 1)), "padding_mode": "circular"},
        {"dilation": (2, 1), "recurrent_dilation": 2},
        {"cell_clip": 0.1},
        {"activation": "relu", "recurrent_activation": "hard_sigmoid", "output_activation": "softsign"},
        {"use_bias": False},
    ],
)
def test_options_reach_the_functional(build, options):
    layer = build(2, 2, 3, **options)
    x = normal(1, 3, 8, 9, 2)
    activation = {k: v for k, v in options.items() if k.endswith("activation")}
    expected = run_cell(layer.cells[0], x, **activation)
    equal(layer(x), expected)
    plain = build(2, 2, 3)(x)
    assert plain.shape != expected.shape or np.abs(plain - expected).max() > 1e-3


def test_stride_applies_to_every_layer(build):
    assert build(1, 2, 3, 1, 2, num_layers=2)(normal(1, 2, 16, 12, 1)).shape == (1, 2, 4, 3, 2)


def test_channels_first_is_the_same_transposed(build):
    x, options = normal(2, 3, 6, 5, 2), {"num_layers": 2, "leaky_relu_slope": 0.1, "return_state": True}
    last, first = build(2, 3, 3, **options), build(2, 3, 3, data_format="channels_first", **options)
    state = [(normal(2, 6, 5, 3, seed=4 * n), normal(2, 6, 5, 3, seed=4 * n + 1)) for n in (1, 2)]
    state_first = [[np.moveaxis(s, -1, 1) for s in pair] for pair in state]
    x_first = np.moveaxis(x, -1, 2)
    y, states = last(x, initial_state=state, training=True)
    y_first, states_first = first(x_first, initial_state=state_first, training=True)
    equal(y, np.moveaxis(y_first, 2, -1))
    equal(np.array(states), np.moveaxis(np.array(states_first), 3, -1))
    dy = normal(*y.shape)
    equal(last.backward(dy, state), np.moveaxis(first.backward(np.moveaxis(dy, -1, 2), state_first), 2, -1))
    equal(np.array(last.state_gradients), np.moveaxis(np.array(first.state_gradients), 3, -1))
    for name, gradient in last.get_gradients().items():
        equal(gradient, first.get_gradients()[name])


@pytest.mark.parametrize("num_layers", [1, 2])
def test_state_carries_a_split_sequence(build, num_layers):
    layer = build(2, 3, 3, num_layers=num_layers, leaky_relu_slope=0.3, return_state=True)
    x = normal(2, 5, 6, 5, 2)
    whole, last = layer(x)
    head, state = layer(x[:, :2])
    tail, end = layer(x[:, 2:], initial_state=state)
    close(whole, np.concatenate([head, tail], 1))
    close(np.array(last), np.array(end))
    if num_layers == 1:
        equal(layer(x[:, 2:], initial_state=state[0])[0], tail)
        equal(layer(x[:, 2:], initial_state=list(state[0]))[0], tail)


def test_a_state_may_be_none(build):
    layer = build(2, 3, 3, num_layers=2)
    x, h = normal(1, 2, 4, 4, 2), normal(1, 4, 4, 3)
    zeros = np.zeros_like(h)
    equal(layer(x, initial_state=[None, (h, None)]), layer(x, initial_state=[(zeros, zeros), (h, zeros)]))


def test_return_sequences_false_is_the_last_step(build):
    x = normal(2, 3, 4, 4, 1)
    whole = build(1, 2, 3, num_layers=2)(x)
    equal(build(1, 2, 3, num_layers=2, return_sequences=False)(x), whole[:, -1])


def test_go_backwards_is_the_reversed_sequence(build):
    x, mask = normal(2, 4, 5, 4, 2), np.array([[1, 1, 0, 1], [1, 0, 0, 0]], bool)
    forwards = build(2, 3, 3, num_layers=2, leaky_relu_slope=0.5)
    backwards = build(2, 3, 3, num_layers=2, leaky_relu_slope=0.5, go_backwards=True)
    close(backwards(x), forwards(x[:, ::-1]))
    close(backwards(x, mask=mask), forwards(x[:, ::-1], mask=mask[:, ::-1]))


def test_mask_and_lengths(build):
    layer = build(2, 3, 3, num_layers=2)
    x = normal(3, 4, 5, 4, 2)
    lengths = [4, 2, 0]
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    y = layer(x, lengths=lengths)
    equal(y, layer(x, mask=mask))
    equal(y[0], layer(x)[0])
    close(y[1, :2], layer(x[1:2, :2])[0])
    equal(y[1, 2:], y[1, [1, 1]])
    assert (y[2] == 0).all()


def test_the_cell_steps_through_the_layer(build, engine):
    layer = build(2, 3, 3, stride=2)
    cell = ConvLSTM2DCell(2, 3, 3, "same", 2, 0.2, engine=engine, dtype="float64")
    cell.set_parameters(layer.cells[0].parameters)
    x = normal(2, 4, 6, 6, 2)
    h, c = cell.forward(x[:, 0], None, None)
    equal(h, layer.cells[0].forward(x[:, 0])[0])
    states = [h]
    for t in range(1, 4):
        h, c = cell.step(x[:, t], h, c)
        states.append(h)
    close(np.stack(states, 1), layer(x))
    assert cell.output_shape((2, 6, 6, 2)) == h.shape == c.shape == (2, 3, 3, 3)


# One step at a time, into given arrays


def pair(*shape, dtype=np.float64):
    return np.full(shape, np.nan, dtype), np.full(shape, np.nan, dtype)


@pytest.mark.parametrize("algorithm", ["auto", "direct"])
@pytest.mark.parametrize(("dtype", "kernel_size"), [("float32", 3), ("float64", 3), ("float32", (2, 4))])
def test_steps_have_the_bits_of_one_call(engine, dtype, algorithm, kernel_size):
    layer = ConvLSTM2D(
        2, 5, kernel_size, return_state=True, seed=0, engine=engine, dtype=dtype, algorithm=algorithm, cell_clip=0.3
    )
    x = normal(2, 5, 9, 8, 2).astype(dtype)
    whole, [last] = layer(x)
    cell = layer.cells[0]
    fresh, swapped, in_place = (None, None), (None, None), (None, None)
    spare, spare_h = pair(2, 9, 8, 5, dtype=dtype), np.empty((2, 9, 8, 5), dtype)
    for t in range(5):
        fresh = cell.step(x[:, t], *fresh)
        swapped, spare = cell.step(x[:, t], *swapped, out=spare), swapped if t else pair(2, 9, 8, 5, dtype=dtype)
        out = (spare_h, np.empty_like(spare_h) if t == 0 else in_place[1])
        result, spare_h = cell.step(x[:, t], *in_place, out=out), np.empty_like(spare_h) if t == 0 else in_place[0]
        assert all(returned is given for returned, given in zip(result, out, strict=True))
        in_place = result
        for h, _ in (fresh, swapped, in_place):
            equal(h, whole[:, t])
    for state in (fresh, swapped, in_place):
        equal(state, last)


def test_step_converts_what_it_reads(engine):
    cell = ConvLSTM2DCell(2, 3, 3, engine=engine, seed=0)
    x, h, c = normal(2, 6, 5, 4)[..., ::2], normal(2, 3, 6, 5).transpose(0, 2, 3, 1), np.ones((2, 6, 5, 3), int)
    out = pair(2, 6, 5, 3, dtype=np.float32)
    equal(cell.step(x, h, c, out=out), cell.forward(x, h, c))
    equal(cell.step(x, None, c, out=out), cell.forward(x, None, c))
    equal(cell.step(x, h, out=list(out)), cell.forward(x, h))


def test_a_nan_spreads_alike_where_the_cell_state_is_replaced(engine):
    cell = ConvLSTM2DCell(1, 4, 3, engine=engine, algorithm="winograd" if engine == "cpu" else "direct", seed=0)
    x, h, c = (normal(2, 12, 12, n).astype(np.float32) for n in (1, 4, 4))
    x[1, 5, 6] = np.nan
    expected = cell.step(x, h, c)
    assert np.isnan(expected[0]).any((0, 3)).sum() == 9
    equal(cell.step(x, h, c, out=(np.empty_like(h), c)), expected)


@pytest.mark.parametrize("algorithm", ["auto", "direct", "winograd"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_step_into_given_arrays_allocates_no_frame(algorithm, in_place):
    cell = ConvLSTM2DCell(4, 32, 3, engine="cpu", algorithm=algorithm, seed=0)
    x = normal(1, 128, 128, 4).astype(np.float32)
    state, spare = cell.step(x), pair(1, 128, 128, 32, dtype=np.float32)
    peaks = []
    tracemalloc.start()
    try:
        for _ in range(3):
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            out = (spare[0], state[1]) if in_place else spare
            spare, state = state, cell.step(x, *state, out=out)
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    assert max(peaks[1:]) < 1 << 16  # the states have 2 MiB


def test_step_refuses_what_it_cannot_write_to(engine):
    cell = ConvLSTM2DCell(3, 3, 3, engine=engine, seed=0)
    x, h, c = (normal(2, 4, 4, 3).astype(np.float32) for _ in range(3))
    new_h, new_c = pair(2, 4, 4, 3, dtype=np.float32)
    before = h.copy(), c.copy()
    locked = np.empty_like(h)
    locked.setflags(write=False)
    memory = np.empty(200, np.float32)
    cases = [
        (new_h, TypeError, "out must be a pair (h, c) of NumPy arrays, got ndarray"),
        ((new_h,), TypeError, "got tuple"),
        ((new_h, new_c.tolist()), TypeError, "got (ndarray, list)"),
        ((new_h[:1], new_c), ValueError, "out h has shape (1, 4, 4, 3) but must be (2, 4, 4, 3)"),
        ((new_h, new_c.astype(float)), ValueError, "out c has dtype float64 but the states are float32; make it with "
                                                   "np.empty((2, 4, 4, 3), np.float32)"),
        ((new_h.astype(">f4"), new_c), ValueError, "out h has dtype >f4 but the states are float32"),
        ((new_h, np.asfortranarray(new_c)), ValueError, "out c is not contiguous and aligned"),
        ((locked, new_c), ValueError, "out h is read-only"),
        ((x, new_c), ValueError, "out h overlaps x;"),
        ((h, new_c), ValueError, "out h overlaps h;"),
        ((c, new_c), ValueError, "out h overlaps c;"),
        ((c, c), ValueError, "out h overlaps c;"),
        ((new_h, new_h), ValueError, "out h overlaps out c;"),
        ((memory[:96].reshape(h.shape), memory[4:100].reshape(h.shape)), ValueError, "out h overlaps out c;"),
        ((new_h, h), ValueError, "out c overlaps h;"),
        ((new_h, x), ValueError, "out c overlaps x;"),
    ]  # fmt: skip
    for out, error, message in cases:
        with pytest.raises(error, match=re.escape(message)):
            cell.step(x, h, c, out=out)
    shifted, old = memory[4:100].reshape(h.shape), memory[:96].reshape(h.shape)
    with pytest.raises(ValueError, match="out c overlaps c; give it memory of its own, or exactly that of the old c"):
        cell.step(x, h, old, out=(new_h, shifted))
    equal((h, c), before)
    assert np.isnan(new_h).all()
    assert np.isnan(new_c).all()
    with pytest.raises(ValueError, match="out needs data_format='channels_last'"):
        ConvLSTM2DCell(3, 3, 3, data_format="channels_first").step(x, out=(new_h, new_c))
    with pytest.raises(ValueError, match="ConvLSTM2DCell: x must be 4D"):
        cell.step(x[0, 0], out=(new_h, new_c))
    with pytest.raises(ValueError, match=r"out needs .* with its batch axis"):
        cell.step(x[0], out=(new_h[0], new_c[0]))
    with pytest.raises(ValueError, match="initial state: h has shape"):
        cell.step(x, h[:1], c, out=(new_h, new_c))
    cell.step(x, h, c[:], out=(new_h, c))  # the same memory is the same array


def test_a_step_is_not_a_training_call(engine):
    cell = ConvLSTM2DCell(1, 2, 3, engine=engine, seed=0)
    x = normal(1, 4, 4, 1)
    cell.forward(x, training=True)
    cell.step(x, out=pair(1, 4, 4, 2, dtype=np.float32))
    with pytest.raises(RuntimeError, match="training"):
        cell.backward()


# Parameters


def test_initial_parameters(engine):
    layer = ConvLSTM2D(2, 3, 3, num_layers=2, kernel_initializer="ones", engine=engine)
    names = [f"layers.{n}.{name}" for n in (0, 1) for name in ("kernel", "recurrent_kernel", "bias")]
    assert list(layer.parameters) == names
    assert layer.num_parameters == sum(9 * C * 12 + 9 * 3 * 12 + 12 for C in (2, 3))
    for cell in layer.cells:
        assert (cell.kernel == 1).all()
        matrix = cell.recurrent_kernel.reshape(-1, 12).astype("float64")
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(12), atol=1e-6)
        equal(cell.bias, np.repeat([0, 1, 0, 0], 3))
        assert all(array.dtype == np.float32 for array in cell.parameters.values())
    assert (ConvLSTM2D(1, 2, 1, bias_initializer="ones", unit_forget_bias=False).cells[0].bias == 1).all()
    without = ConvLSTM2DCell(1, 2, 1, use_bias=False)
    assert without.bias is None
    assert list(without.parameters) == ["kernel", "recurrent_kernel"]
    assert list(without.weights) == ["W_xi", "W_xf", "W_xc", "W_xo", "W_hi", "W_hf", "W_hc", "W_ho"]
    with pytest.raises(ValueError, match="this layer has no bias; its parameters are kernel, recurrent_kernel"):
        without.bias = np.zeros(8)


def test_seeds():
    def parameters(seed):
        return np.concatenate([a.ravel() for a in ConvLSTM2D(2, 3, 3, num_layers=2, seed=seed).parameters.values()])

    equal(parameters(7), parameters(7))
    equal(parameters(7), parameters(np.random.default_rng(7)))
    assert (parameters(7) != parameters(8)).any()
    assert (parameters(None) != parameters(None)).any()
    first, second = ConvLSTM2D(3, 3, 3, num_layers=2, seed=0).cells
    assert (first.kernel != second.kernel).any()


def test_parameters_are_replaced_not_written_to(build):
    cell = build(1, 2, 3).cells[0]
    before = cell.kernel
    assert cell.kernel is before
    with pytest.raises(ValueError, match="read-only"):
        cell.kernel[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        cell.weights["W_xi"][0] = 1
    own = np.asfortranarray(np.ones(before.shape, np.float32))
    cell.kernel = own
    own[:] = 5
    assert cell.kernel is not before
    assert (cell.kernel == 1).all()
    assert cell.kernel.dtype == np.float64
    assert cell.kernel.flags.c_contiguous
    assert not cell.kernel.flags.writeable
    with pytest.raises(ValueError, match=r"kernel has shape \(1, 3, 1, 8\) but must be \(3, 3, 1, 8\)"):
        cell.kernel = own[:1]
    with pytest.raises(TypeError, match="kernel has dtype complex128"):
        cell.kernel = own.astype(complex)
    assert (cell.kernel == 1).all()


def test_engines_get_the_parameters_themselves(build, engine, monkeypatch):
    layer, seen = build(1, 2, 3), []
    module = dispatch.get_engine(engine)
    forward = module.convlstm2d

    def spy(spec, x, *arrays, **options):
        seen.append(arrays[:3])
        return forward(spec, x, *arrays, **options)

    monkeypatch.setattr(module, "convlstm2d", spy)
    for training in (False, True):
        layer(normal(1, 2, 4, 4, 1), training=training)
    assert len(seen) == 2
    for arrays in seen:  # what an engine packs it may keep for as long as it sees the same, read-only object
        assert all(array is own for array, own in zip(arrays, layer.parameters.values(), strict=True))


def test_copies_and_pickles_are_independent(build):
    layer, x = build(1, 2, 3, num_layers=2), normal(1, 2, 4, 4, 1)
    layer(x, training=True)
    y = build(1, 2, 3, num_layers=2)(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer)
        equal(other(x), y)
        assert not any(array.flags.writeable for array in other.parameters.values())
        other.weights["0.b_i"] = np.ones((2, 1, 1))
        assert (other(x) != y).any()
    equal(layer(x), y)


def test_weights_mapping(build):
    layer = build(3, 2, (2, 5))
    cell = layer.cells[0]
    weights = layer.weights
    assert sorted(weights) == sorted(REFERENCE_KEYS)
    assert len(weights) == 12
    for n, gate in enumerate("ifco"):
        block = slice(2 * n, 2 * n + 2)
        for f, c, i, j in np.ndindex(2, 3, 2, 5):
            assert weights[f"W_x{gate}"][f, c, i, j] == cell.kernel[i, j, c, block][f]
        assert weights[f"W_h{gate}"].shape == (2, 2, 2, 5)
        equal(weights[f"b_{gate}"], cell.bias[block].reshape(2, 1, 1))
    other = build(3, 2, (2, 5), seed=9)
    for key in weights:
        old = {k: np.array(v) for k, v in other.weights.items()}
        other.weights[key] = weights[key]
        equal(other.weights[key], weights[key])
        assert all((other.weights[k] == old[k]).all() for k in weights if k != key)
    x = normal(1, 2, 6, 6, 3)
    equal(other(x), layer(x))
    other.weights["b_o"] = np.full((2, 1, 1), -50)
    assert np.abs(other(x)).max() < 1e-15
    other.weights.update(weights)
    equal(other(x), layer(x))


def test_weights_of_stacked_layers(build):
    layer = build(1, [2, 3], 3, num_layers=2)
    assert sorted(layer.weights) == sorted(f"{n}.{key}" for n in (0, 1) for key in REFERENCE_KEYS)
    layer.weights["1.W_xf"] = np.full((3, 2, 3, 3), 7)
    assert (layer.cells[1].weights["W_xf"] == 7).all()
    assert (layer.cells[1].kernel == 7).sum() == 54
    assert "'0.W_hi': (2, 2, 3, 3)" in repr(layer.weights)


def test_weights_errors(build):
    weights = build(3, 2, 3).weights
    with pytest.raises(KeyError, match="no weight 'W_xg'; the keys are W_xi, W_xf, W_xc"):
        weights["W_xg"]
    with pytest.raises(KeyError, match="no weight 'W_xg'"):
        weights["W_xg"] = 0
    with pytest.raises(ValueError, match=r"W_xi has shape \(3, 3, 3, 2\) but must be \(2, 3, 3, 3\)"):
        weights["W_xi"] = np.zeros((3, 3, 3, 2))
    with pytest.raises(ValueError, match=r"b_i has shape \(2,\) but must be \(2, 1, 1\)"):
        weights["b_i"] = np.zeros(2)
    with pytest.raises(TypeError, match="b_i has dtype object"):
        weights["b_i"] = np.full((2, 1, 1), None)
    with pytest.raises(TypeError, match="cannot be deleted"):
        del weights["b_i"]


def test_set_parameters_is_all_or_nothing(build):
    layer = build(1, 2, 3, num_layers=2)
    before = layer.parameters
    new = {name: array + 1 for name, array in before.items()}
    with pytest.raises(ValueError, match=r"missing layers\.1\.bias, unknown bias"):
        layer.set_parameters({name.replace("layers.1.bias", "bias"): array for name, array in new.items()})
    with pytest.raises(ValueError, match=r"layers\.1\.bias has shape \(3,\) but must be \(8,\)"):
        layer.set_parameters(new | {"layers.1.bias": np.zeros(3)})
    assert all(layer.parameters[name] is array for name, array in before.items())
    layer.set_parameters(new)
    for name, array in new.items():
        equal(layer.parameters[name], array)


# Gradients


def test_one_layer_backward_is_the_functional_pullback(build):
    layer = build(2, 3, 3, stride=2, return_state=True)
    cell, x = layer.cells[0], normal(2, 3, 6, 5, 2)
    state = normal(2, 3, 3, 3, seed=2), normal(2, 3, 3, 3, seed=3)
    (y, h, c), pullback = functional.convlstm2d_vjp(
        x, cell.kernel, cell.recurrent_kernel, cell.bias, initial_state=state, return_state=True, **options_of(layer)
    )
    got, [(got_h, got_c)] = layer(x, initial_state=state, training=True)
    equal(got, y)
    equal((got_h, got_c), (h, c))
    dy, dh, dc = normal(*y.shape, seed=4), normal(*h.shape, seed=5), normal(*c.shape, seed=6)
    expected = pullback((dy, dh, dc))
    equal(layer.backward(dy, [(dh, dc)]), expected["x"])
    assert layer.get_gradients().keys() == layer.parameters.keys()
    for name, gradient in layer.get_gradients().items():
        equal(gradient, expected[name.removeprefix("layers.0.")])
    equal(layer.state_gradients, [expected["initial_state"]])
    equal(layer.backward(dy), pullback((dy, None, None))["x"])
    equal(layer.backward(None, (dh, None)), pullback((None, dh, None))["x"])


@pytest.mark.parametrize("return_sequences", [True, False])
def test_stacked_backward_against_differences(build, return_sequences):
    layer = build(
        1, [2, 3], 3, leaky_relu_slope=0.3, num_layers=2, return_state=True, return_sequences=return_sequences,
        go_backwards=True,
    )  # fmt: skip
    x = normal(2, 3, 4, 5, 1)
    mask = np.array([[1, 1, 1], [1, 0, 1]])
    state = [tuple(normal(2, 4, 5, F, seed=F + n) for n in (0, 9)) for F in (2, 3)]
    outputs, states = layer(x, initial_state=state, mask=mask, training=True)
    dy = normal(*outputs.shape, seed=5)
    dstates = [tuple(normal(*s.shape, seed=6 + n) for n, s in enumerate(pair)) for pair in states]

    def loss(x, state):
        y, ends = layer(x, initial_state=state, mask=mask)
        pairs = zip(ends, dstates, strict=True)
        return (y * dy).sum() + sum((a * b).sum() for end, d in pairs for a, b in zip(end, d, strict=True))

    dx = layer.backward(dy, dstates)
    gradients, state_gradients = layer.get_gradients(), layer.state_gradients
    epsilon = 1e-6

    def slope(change):
        return (change(epsilon) - change(-epsilon)) / (2 * epsilon)

    direction = normal(*x.shape, seed=20)
    assert slope(lambda e: loss(x + e * direction, state)) == pytest.approx((dx * direction).sum(), rel=1e-7)
    for n in (0, 1):
        for m in (0, 1):
            direction = normal(*state[n][m].shape, seed=21)

            def moved(e, n=n, m=m, direction=direction):
                new = [list(pair) for pair in state]
                new[n][m] = new[n][m] + e * direction
                return loss(x, new)

            assert slope(moved) == pytest.approx((state_gradients[n][m] * direction).sum(), rel=1e-7)
    start = layer.parameters
    for name, gradient in gradients.items():
        direction = normal(*gradient.shape, seed=22)

        def moved(e, name=name, direction=direction):
            layer.set_parameters(start | {name: start[name] + e * direction})
            return loss(x, state)

        assert slope(moved) == pytest.approx((gradient * direction).sum(), rel=1e-7)


def test_cell_backward_is_one_step_of_the_functional(engine):
    cell = ConvLSTM2DCell(2, 3, 3, engine=engine, dtype="float64", data_format="channels_first", seed=0)
    x, h, c = normal(2, 2, 5, 4), normal(2, 3, 5, 4, seed=2), normal(2, 3, 5, 4, seed=3)
    last = lambda a: np.moveaxis(a, 1, -1)  # noqa: E731
    (_, h1, c1), pullback = functional.convlstm2d_vjp(
        last(x)[:, None], cell.kernel, cell.recurrent_kernel, cell.bias, initial_state=(last(h), last(c)),
        return_state=True, engine=engine,
    )  # fmt: skip
    got_h, got_c = cell(x, h, c, training=True)
    equal(last(got_h), h1)
    equal(last(got_c), c1)
    dh, dc = normal(*h.shape, seed=4), normal(*c.shape, seed=5)
    expected = pullback((None, last(dh), last(dc)))
    dx, dh0, dc0 = cell.backward(dh, dc)
    equal(last(dx), expected["x"][:, 0])
    equal(last(dh0), expected["initial_state"][0])
    equal(last(dc0), expected["initial_state"][1])
    for name, gradient in cell.get_gradients().items():
        equal(gradient, expected[name])
    cell(x, training=True)
    assert [a.shape for a in cell.backward(dh)] == [x.shape, h.shape, c.shape]


def test_backward_needs_a_training_call(build, engine):
    x = normal(1, 2, 4, 4, 1)
    layer = build(1, 2, 3)
    assert layer.get_gradients() == {}
    pool = MaxPooling3D(2, engine=engine)
    for thing, value in ((layer, x), (pool, x), (TimeDistributionCalculator(0.5, 2), x)):
        name = type(thing).__name__
        with pytest.raises(RuntimeError, match=f"{name}: backward needs .* first call layer"):
            thing.backward(value)
        y = thing(value, training=True)
        thing.backward(y)
        thing(value)
        with pytest.raises(RuntimeError, match=f"{name}: backward needs"):
            thing.backward(y)
    with pytest.raises(RuntimeError, match="ConvLSTM2DCell: backward needs"):
        layer.cells[0].backward(y)


def test_frozen_layers_pass_gradients_on_and_keep_none(build):
    layer = build(1, 2, 3)
    x = normal(1, 2, 4, 4, 1)
    y = layer(x, training=True)
    dx = layer.backward(y)
    assert layer.get_gradients().keys() == layer.parameters.keys()
    layer.trainable = False
    equal(layer.backward(y), dx)
    assert layer.get_gradients() == {}


def test_dy_is_checked(build):
    layer = build(1, 2, 3, data_format="channels_first", num_layers=2)
    y = layer(normal(1, 2, 1, 4, 5), training=True)
    with pytest.raises(ValueError, match=r"dy has shape \(1, 2, 4, 5, 2\) but must be \(1, 2, 2, 4, 5\)"):
        layer.backward(np.moveaxis(y, 2, -1))
    with pytest.raises(ValueError, match="dstates must be a list of 2 pairs"):
        layer.backward(y, [(None, None)])


# Inputs


def test_x_is_converted_to_the_layers_dtype_and_left_alone(engine):
    x = normal(1, 2, 5, 4, 1)
    for dtype in ("float32", "float64", np.float64):
        layer = ConvLSTM2D(1, 2, 3, dtype=dtype, engine=engine, seed=0)
        for given in (x, x.astype("float32"), x.astype(">f8"), np.round(x).astype(int), x.astype("float16")):
            kept = given.copy()
            given.setflags(write=False)
            y = layer(given)
            assert y.dtype == np.dtype(dtype)
            equal(y, layer(given.astype(dtype)))
            equal(given, kept)
    equal(layer(x[:, :, ::-1, ::2]), layer(x[:, :, ::-1, ::2].copy()))
    equal(layer(x.tolist()), layer(x))


def test_torch_in_torch_out(build, engine):
    torch = pytest.importorskip("torch")
    x = normal(1, 2, 5, 4, 1)
    layer = build(1, 2, 3, num_layers=2, return_state=True)
    expected, states = layer(x, training=True)
    y, [*pairs] = layer(torch.from_numpy(x), initial_state=None, mask=torch.ones(1, 2, dtype=torch.bool), training=True)
    assert y.dtype is torch.float64
    assert all(isinstance(s, torch.Tensor) for pair in pairs for s in pair)
    equal(y.numpy(), expected)
    dx = layer.backward(y, pairs)
    assert isinstance(dx, torch.Tensor)
    equal(dx.numpy(), layer.backward(expected, states))
    assert all(isinstance(g, np.ndarray) for g in layer.get_gradients().values())
    assert isinstance(layer(torch.from_numpy(x), initial_state=pairs)[0], torch.Tensor)
    layer.weights["0.b_i"] = torch.full((2, 1, 1), 3.0)
    assert (layer.cells[0].bias[:2] == 3).all()
    h, c = layer.cells[0](torch.from_numpy(x[:, 0]))
    assert isinstance(h, torch.Tensor)
    assert isinstance(c, torch.Tensor)
    assert isinstance(MaxPooling3D((1, 2, 2), engine=engine)(y), torch.Tensor)
    dropped = TimeDistributionCalculator(0.5, 2).apply_dropout(y)
    assert isinstance(dropped, torch.Tensor)
    assert dropped.dtype is torch.float64


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 8, 8, 2), r"x must be 5D \(batch, time, height, width, channels\), got 4D \(4, 8, 8, 2\); add the missing "
                       r"axis: x\[np.newaxis\] for a batch of one, x\[..., np.newaxis\] for one channel"),
        ((2, 3, 4, 8, 8, 3), r"x must be 5D .* got 6D \(2, 3, 4, 8, 8, 3\)$"),
        ((1, 4, 8, 8, 2), r"ConvLSTM2D: x has 2 channels but kernel \(3, 3, 3, 8\) takes 3"),
        ((1, 4, 2, 8, 3), "a window of 3 does not fit the height of 2"),
        ((1, 0, 8, 8, 3), "x has no time steps"),
    ],
)  # fmt: skip
def test_wrong_x(build, shape, message):
    with pytest.raises(ValueError, match=message):
        build(3, 2, 3, "valid")(np.zeros(shape))


def test_wrong_x_of_other_layers(build, engine):
    with pytest.raises(ValueError, match=r"5D \(batch, time, channels, height, width\), got 4D .*for a batch of one$"):
        build(3, 2, 3, data_format="channels_first")(np.zeros((4, 8, 8, 3)))
    with pytest.raises(ValueError, match="ConvLSTM2D layer 1: a window of 3 does not fit the height of 2"):
        build(3, 2, 3, "valid", num_layers=2)(np.zeros((1, 2, 4, 9, 3)))
    with pytest.raises(ValueError, match=r"ConvLSTM2DCell: x must be 4D \(batch, height, width, channels\), got 5D"):
        ConvLSTM2DCell(1, 2, 3)(np.zeros((1, 1, 4, 4, 1)))
    with pytest.raises(TypeError, match="x has dtype complex128"):
        build(3, 2, 3)(np.zeros((1, 4, 8, 8, 3), complex))
    with pytest.raises(TypeError, match="x is a masked array"):
        build(3, 2, 3)(np.ma.zeros((1, 4, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"MaxPooling3D: x must be \(batch, channels, time, .* got 4D \(4, 8, 8, 3\)"):
        MaxPooling3D(data_format="channels_first", engine=engine)(np.zeros((4, 8, 8, 3)))


def test_wrong_states_and_masks(build):
    x, h = np.zeros((2, 3, 4, 5, 1)), np.zeros((2, 4, 5, 2))
    one, two = build(1, 2, 3), build(1, 2, 3, num_layers=2)
    for layer, state, message in (
        (one, h, "initial_state must be a list of 1 pair "),
        (one, [(h, h, h)], "initial_state must be a list of 1 pair "),
        (two, (h, h), "initial_state must be a list of 2 pairs"),
        (two, [(h, h)], "initial_state must be a list of 2 pairs"),
        (one, (h, h[:, 1:]), r"initial_state 0: c has shape \(2, 3, 5, 2\) but must be \(2, 4, 5, 2\)"),
        (two, [None, (h[1:], h)], r"initial_state 1: h has shape \(1, 4, 5, 2\) but must be \(2, 4, 5, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, initial_state=state)
    for options, message in (
        ({"mask": np.ones((2, 3)), "lengths": [3, 3]}, "give mask or lengths, not both"),
        ({"mask": np.ones((3, 2))}, r"mask has shape \(3, 2\) but must be \(2, 3\)"),
        ({"lengths": [3]}, r"lengths has shape \(1,\) but must be \(2,\)"),
        ({"lengths": [4, 1]}, r"lengths must lie between 0 and the 3 steps of x, got \[4, 1\]"),
        ({"lengths": [3, -1]}, "lengths must lie between 0 and the 3 steps"),
    ):
        with pytest.raises(ValueError, match=message):
            one(x, **options)
    with pytest.raises(TypeError, match="lengths must be integers, got dtype float64"):
        one(x, lengths=[3.0, 1.0])


def test_empty_batch(build):
    layer = build(1, 2, 3, num_layers=2, leaky_relu_slope=0.1)
    y = layer(np.zeros((0, 3, 4, 4, 1)), lengths=[], training=True)
    assert y.shape == (0, 3, 4, 4, 2)
    assert layer.backward(y).shape == (0, 3, 4, 4, 1)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((-1, 2, 3), {}, ValueError, "in_channels must be an integer >= 0"),
        ((1, 2.5, 3), {}, TypeError, "out_channels must be an integer >= 1"),
        ((1, [2, 3], 3), {}, ValueError, r"out_channels \[2, 3\] names 2 layers, but num_layers is 1"),
        ((1, 2, 0), {}, ValueError, "kernel_size must be an integer >= 1"),
        ((1, 2, (3, 3, 3)), {}, ValueError, "kernel_size must be an integer >= 1 or 2 of them"),
        ((1, 2, [3, 5]), {}, ValueError, r"kernel_size \[3, 5\] lists 2 layers but num_layers is 1; a tuple"),
        ((1, 2, 3, "full"), {}, ValueError, "padding must be one of 'same', 'valid', got 'full'"),
        ((1, 2, 3, "same", 0), {}, ValueError, "strides must be an integer >= 1"),
        ((1, 2, 3, "same", 2), {"dilation": 2}, ValueError, "cannot both exceed 1"),
        ((1, 2, 3, "same", 1, "0.2"), {}, ValueError, "leaky_relu_slope must be a finite number or None"),
        ((1, 2, 3, "same", 1, np.nan), {}, ValueError, "leaky_relu_slope must be a finite number or None"),
        ((1, 2, 3, "same", 1, None, 0), {}, ValueError, "num_layers must be an integer >= 1"),
        ((1, 2, 3), {"dtype": "float16"}, ValueError, "dtype must be one of 'float32', 'float64', got 'float16'"),
        ((1, 2, 3), {"dtype": "double!"}, ValueError, "dtype must be one of"),
        ((1, 2, 3), {"data_format": "NHWC"}, ValueError, "data_format must be one of"),
        ((1, 2, 3), {"activation": "tan"}, ValueError, "unknown activation 'tan'"),
        ((1, 2, 3), {"kernel_initializer": "big"}, ValueError, "unknown initializer 'big'"),
        ((1, 2, 3), {"cell_clip": -1}, ValueError, "cell_clip must be a positive number or None"),
        ((1, 2, 3), {"recurrent_dilation": 0}, ValueError, "recurrent_dilation must be an integer >= 1"),
        ((1, 2, 3), {"kernel_initializer": lambda shape, rng, dtype: np.zeros(3)}, ValueError, "kernel has shape"),
        ((1, 2, 3), {"seed": "x"}, TypeError, None),
    ],
)  # fmt: skip
def test_wrong_options_fail_at_once(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ConvLSTM2D(*arguments, **options)


def test_repr():
    assert repr(ConvLSTM2D(1, [2, 3], (3, 5), num_layers=2, cell_clip=np.float32(2))) == (
        "ConvLSTM2D(in_channels=1, out_channels=(2, 3), kernel_size=(3, 5), cell_clip=2.0, num_layers=2)"
    )
    assert repr(MaxPooling3D()) == "MaxPooling3D()"
    assert repr(MaxPooling3D(2, ceil_mode=True)) == "MaxPooling3D(pool_size=2, ceil_mode=True)"
    assert repr(TimeDistributionCalculator(1, 2)) == "TimeDistributionCalculator(dropout_rate=1.0, num_timesteps=2)"


def test_a_bare_layer_computes_nothing():
    with pytest.raises(NotImplementedError):
        Layer()(1)
    with pytest.raises(NotImplementedError):
        Layer().backward(1)
