"""The recurrent layers beside ConvLSTM2D: one machinery, so each law is asked of all of them."""

import copy
import pickle

import numpy as np
import pytest
from layer_checks import check_gradients, check_saving, close, equal, normal

import fastclstm
from fastclstm import (
    GRU,
    Concatenate,
    Conv2D,
    ConvGRU2D,
    ConvGRU2DCell,
    ConvLSTM1D,
    ConvLSTM2D,
    ConvLSTM3D,
    ConvLSTM3DCell,
    ConvRNN2D,
    ConvRNN2DCell,
    Input,
    Model,
    Sequential,
    TimeDistributed,
)

CLASSES = {ConvGRU2D: (5, 6), ConvRNN2D: (5, 6), ConvLSTM3D: (2, 5, 6), ConvLSTM1D: (7,)}
"""And the frames they are asked with."""
CELLS = {ConvGRU2DCell: ConvGRU2D, ConvRNN2DCell: ConvRNN2D, ConvLSTM3DCell: ConvLSTM3D}
every_class = pytest.mark.parametrize("kind", CLASSES)


def made(kind, filters=3, **options):
    return kind(2, filters, 3, **{"dtype": "float64", "seed": 4, "engine": "reference", **options})


def frames(kind, B=2, T=3, C=2):
    return normal(B, T, *CLASSES[kind], C)


OPTIONS = {
    "plain": {},
    "both ways": {"bidirectional": True, "merge_mode": "mul"},
    "stacked": {"num_layers": 2, "leaky_relu_slope": 0.2, "kernel_size": [3, 1]},
    "last step, backwards": {"return_sequences": False, "go_backwards": True},
    "channels first": {"data_format": "channels_first", "stride": 2, "recurrent_kernel_size": 2},
    "dropout": {"dropout": 0.3, "recurrent_dropout": 0.2},
    "dilated": {"dilation": 2, "recurrent_dilation": 2, "padding_mode": "circular", "use_bias": False},
    "normalized": {"normalization": "group", "filters": 4},
    "regularized": {"kernel_regularizer": "l2", "activity_regularizer": "l1", "zero_output_for_mask": True},
}


@every_class
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(kind, name):
    options = dict(OPTIONS[name])
    if kind is ConvGRU2D and (name in ("normalized", "stacked")):
        options["reset_after"] = False
    filters, size = options.pop("filters", 3), options.pop("kernel_size", 3)
    layer = kind(2, filters, size, dtype="float64", seed=4, engine="reference", **options)
    x = frames(kind)
    x = np.moveaxis(x, -1, 2) if "data_format" in options else x
    if name == "regularized":
        y = layer(x, training=True)
        layer.backward(np.zeros_like(y))
        assert layer.penalty > sum(np.sum(cell.kernel**2) * 0.01 for cell in layer.cells)
        return
    check_gradients(layer, x, count=3)


@every_class
@pytest.mark.parametrize(("engine", "algorithm"), [("reference", "auto"), ("cpu", "winograd")])
def test_without_channels_it_is_as_on_zeros(kind, engine, algorithm):
    """With few filters, where the cpu engine would have a tile in each lane."""
    x, outputs = np.zeros((2, 3, *CLASSES[kind], 1)), []
    for frames in (x[..., :0], x):
        layer = kind(frames.shape[-1], 2, 3, seed=0, engine=engine, algorithm=algorithm)
        layer.set_parameters({n: normal(*p.shape) if p.size else p for n, p in layer.parameters.items()})
        outputs.append(layer(frames, training=True))
        assert layer.backward(np.ones_like(outputs[-1])).shape == frames.shape
        outputs.append(layer(frames))
    for output in outputs[1:]:
        close(output, outputs[0], 1e-5)


@every_class
def test_shapes_are_told_before(kind):
    for options in ({}, {"stride": 2, "return_sequences": False}, {"padding": "valid", "bidirectional": True}):
        layer = made(kind, **options)
        x = frames(kind)
        x = np.repeat(x, 2, 2) if kind is ConvLSTM3D else x  # a window of 3 must fit the depth
        assert layer(x).shape == layer.output_shape(x.shape)
        unknown = (None, None, *x.shape[2:])
        assert layer.output_shape(unknown)[0] is None


@every_class
def test_backward_direction_reads_the_frames_from_the_end(kind):
    x = frames(kind)
    both = made(kind, bidirectional=True)
    ways = [made(kind, go_backwards=backwards) for backwards in (False, True)]
    for way, cell in zip(ways, both.cells, strict=True):
        way.cells[0].set_parameters(cell.parameters)
    y = np.concatenate([ways[0](x), ways[1](x)[:, ::-1]], -1)
    equal(both(x), y)


@every_class
def test_states_go_on(kind):
    layer = made(kind, return_state=True)
    x = frames(kind, T=5)
    y, states = layer(x)
    first, middle = layer(x[:, :2])
    second, last = layer(x[:, 2:], initial_state=middle)
    close(np.concatenate([first, second], 1), y)
    for a, b in zip(last[0], states[0], strict=True):
        close(a, b)
    one = middle[0] if len(middle[0]) > 1 else middle[0][0]  # a state by itself, or what is in it
    equal(layer(x[:, 2:], initial_state=one)[0], second)
    stateful = made(kind, stateful=True)
    close(np.concatenate([stateful(x[:, :2]), stateful(x[:, 2:])], 1), y)
    assert [len(state) for state in stateful.states] == [len(states[0])]
    stateful.reset_state()
    equal(stateful(x[:, :2]), first)
    with pytest.raises(ValueError, match="call reset_state"):
        stateful(x[:1, :2])


@every_class
def test_gradients_of_states(kind):
    layer = made(kind)
    x, names = frames(kind), len(layer._state_names)
    shape = made(kind, return_state=True)(x)[1][0][0].shape
    states = [normal(*shape, seed=n) for n in range(names)]
    y = layer(x, initial_state=[tuple(states)], training=True)
    cotangent, direction = normal(*y.shape, seed=8), normal(*shape, seed=9)
    layer.backward(cotangent)
    for n, gradient in enumerate(layer.state_gradients[0]):
        ends = [layer(x, initial_state=[tuple(s + sign * 1e-6 * direction * (m == n) for m, s in enumerate(states))])
                for sign in (1, -1)]  # fmt: skip
        close(np.sum(gradient * direction), np.sum(cotangent * (ends[0] - ends[1])) / 2e-6, 1e-7)


@every_class
def test_lengths_mask_the_end(kind):
    x = frames(kind, T=4)
    layer = made(kind, zero_output_for_mask=True, return_state=True)
    y, states = layer(x, lengths=[2, 4])
    whole, _ = layer(x)
    short, ends = layer(x[:1, :2])
    close(y[0, :2], short[0])
    assert not y[0, 2:].any()
    close(y[1], whole[1])
    close(states[0][0][0], ends[0][0][0])


@every_class
def test_time_major_and_single_sequences(kind):
    x = frames(kind)
    y = made(kind)(x)
    close(made(kind, time_major=True)(x.swapaxes(0, 1)).swapaxes(0, 1), y)
    close(made(kind)(x[0]), y[0])


@every_class
def test_engine_cpu(kind):
    """The same to rounding, forward and backward, with all the options that kernels know."""
    x = frames(kind).astype(np.float32)
    for options in ({}, {"bidirectional": True, "num_layers": 2, "recurrent_dropout": 0.2}):
        results = []
        for engine, dtype in (("reference", "float64"), ("cpu", "float32")):
            layer = made(kind, dtype=dtype, engine=engine, **options)
            layer.set_parameters(made(kind, **options).parameters)
            y = layer(x, training=True)
            results.append(
                (y, layer.backward(np.cos(np.arange(y.size)).reshape(y.shape)), *layer.get_gradients().values())
            )
        for one, other in zip(*results, strict=True):
            assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


@every_class
def test_saving(kind, tmp_path):
    layer = made(kind, num_layers=2, bidirectional=True, padding=1 if kind is not ConvLSTM1D else ((1, 1),))
    x = frames(kind)
    check_saving(layer, x, tmp_path / "layer.safetensors")
    equal(fastclstm.load(tmp_path / "layer.safetensors")(x), layer(x))
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        equal(again(x), layer(x))


def test_a_network_of_all_of_them(tmp_path):
    network = Sequential([
        ConvRNN2D(2, 3, 3, engine="reference", seed=0),
        ConvGRU2D(3, 3, 3, engine="reference", seed=1, bidirectional=True),
        ConvLSTM2D(6, 3, 3, engine="reference", seed=2),
        TimeDistributed(Conv2D(3, 1, 1, engine="reference", seed=3)),
    ])  # fmt: skip
    x = normal(2, 3, 5, 6, 2).astype("f4")
    history = network.fit(x, np.zeros((2, 3, 5, 6, 1), "f4"), epochs=2, batch_size=2)
    assert history["loss"][1] < history["loss"][0]
    network.save(tmp_path / "network.safetensors")
    equal(fastclstm.load(tmp_path / "network.safetensors")(x), network(x))
    assert "ConvGRU2D" in str(network.summary())
    equal(network(x, lengths=[2, 3])[1], network(x)[1])
    volumes = Sequential([made(ConvLSTM3D), ConvLSTM3D(3, 2, 1, engine="reference")])
    assert volumes(frames(ConvLSTM3D)).shape == (2, 3, 2, 5, 6, 2)


@pytest.mark.parametrize("form", ["list of tuples", "list of arrays", "array"])
def test_states_in_a_graph(form):
    """A decoder starts where its encoder ended; the gradients of states reach the encoder."""
    inputs = Input((None, 5, 6, 2))
    encoder = made(ConvGRU2D, return_state=True)
    decoder = ConvGRU2D(3, 3, 3, dtype="float64", seed=7, engine="reference")
    y, states = encoder(inputs)
    given = {"list of tuples": states, "list of arrays": [states[0][0]], "array": states[0][0]}[form]
    model = Model(inputs, Concatenate()([y, decoder(y, initial_state=given)]))
    x = frames(ConvGRU2D)
    first, last = made(ConvGRU2D, return_state=True)(x)
    second = ConvGRU2D(3, 3, 3, dtype="float64", seed=7, engine="reference")(first, initial_state=last)
    equal(model(x), np.concatenate([first, second], -1))
    check_gradients(model, x, count=3)


def test_wrong_states_in_a_graph_are_named():
    inputs = Input((None, 5, 6, 2))
    y, states = made(ConvGRU2D, filters=4, return_state=True)(inputs)
    with pytest.raises(ValueError, match=r"ConvGRU2D: h of initial_state has shape \(None, 5, 6, 4\) but must be"):
        ConvGRU2D(4, 3, 3)(y, initial_state=states)
    with pytest.raises(ValueError, match=r"initial_state must be a list of 2 tuples \(h,\), one a layer; got 1 items"):
        ConvGRU2D(4, 4, 3, num_layers=2)(y, initial_state=states)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_take_the_same_steps(kind):
    layer = made(CELLS[kind])
    cell = kind(2, 3, 3, dtype="float64", seed=0, engine="reference")
    cell.set_parameters(layer.cells[0].parameters)
    x = frames(CELLS[kind])
    state, outputs = (), []
    for t in range(x.shape[1]):
        state = cell(x[:, t], *state)
        state = state if isinstance(state, tuple) else (state,)
        outputs.append(state[0])
    close(np.stack(outputs, 1), layer(x))
    assert cell.output_shape(x[:, 0].shape) == outputs[0].shape
    last = cell(x[:, 0], *state, training=True)
    dh = normal(*outputs[0].shape, seed=2)
    gradients = cell.backward(dh)
    assert [g.shape for g in gradients] == [x[:, 0].shape] + [outputs[0].shape] * len(state)
    moved = 1e-6 * normal(*x[:, 0].shape, seed=3)
    ends = [cell(x[:, 0] + sign * moved, *state) for sign in (1, -1)]
    ends = [end[0] if isinstance(last, tuple) else end for end in ends]
    close(np.sum(gradients[0] * moved), np.sum(dh * (ends[0] - ends[1])) / 2, 1e-9)
    with pytest.raises(ValueError, match="takes one step at a time; use"):
        Sequential([cell])


@pytest.mark.parametrize("reset_after", [True, False])
def test_a_gru_over_vectors_is_one_of_single_pixels(reset_after):
    flat = GRU(4, 5, dtype="float64", seed=1, reset_after=reset_after)
    layer = ConvGRU2D(4, 5, 1, dtype="float64", reset_after=reset_after, engine="reference")
    named = {f"layers.0.{name}": array if name == "bias" else array[None, None]
             for name, array in flat.parameters.items()}  # fmt: skip
    layer.set_parameters(named)
    x = normal(3, 6, 4)
    close(layer(x[:, :, None, None])[:, :, 0, 0], flat(x))


def test_rows_are_frames_of_height_one():
    rows = made(ConvLSTM1D, peephole="elementwise", frame_size=7, stride=2, num_layers=2, padding=1)
    layer = ConvLSTM2D(2, 3, (1, 3), ((0, 0), (1, 1)), (1, 2), num_layers=2, dtype="float64", engine="reference",
                       peephole="elementwise", frame_size=(1, 7))  # fmt: skip
    layer.set_parameters(rows.parameters)
    x = frames(ConvLSTM1D)
    equal(rows(x), layer(x[:, :, None])[:, :, 0])


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ConvGRU2D(1, 2, (3, 3, 3)), "ConvGRU2D: kernel_size must be an integer >= 1 or 2 of them"),
        (lambda: ConvGRU2D(1, 2, 3, reset_after=1), "ConvGRU2D: reset_after must be True or False, got 1"),
        (lambda: ConvGRU2D(1, 2, 3, activation="tanhh"), "^ConvGRU2D: activation: unknown activation 'tanhh'"),
        (lambda: ConvLSTM1D(1, 2, 3, kernel_initializer="no"), "^ConvLSTM1D: kernel: unknown initializer 'no'"),
        (lambda: ConvLSTM1D(1, 2, 3, cell_clip=-1), "^ConvLSTM1D: cell_clip must be a positive number"),
        (lambda: ConvLSTM1D(1, 2, 3, padding="some"), "^ConvLSTM1D: padding must be one of 'same', 'valid'"),
        (lambda: ConvGRU2D(1, 2, 3, normalization="group"), "ConvGRU2D: normalization goes with reset_after=False"),
        (lambda: ConvRNN2D(1, 2, 3, stride=2, dilation=2), "ConvRNN2D: strides .* and dilation .* cannot both"),
        (lambda: ConvLSTM3D(1, 2, (3, 3)), "ConvLSTM3D: kernel_size must be an integer >= 1 or 3 of them"),
        (lambda: ConvLSTM3D(1, 2, 3, normalization="layer"), "ConvLSTM3D: normalization must be 'group'"),
        (lambda: ConvLSTM1D(1, 2, (3, 3)), "ConvLSTM1D: kernel_size must be an integer >= 1, got"),
        (lambda: ConvLSTM1D(1, 2, 3, padding=(1, 1)), "ConvLSTM1D: padding must be 'same', 'valid', an integer or"),
        (lambda: ConvGRU2D(1, 2, 3)(np.zeros((2, 3, 8, 8, 2))), "has 2 channels but kernel .* takes 1"),
        (lambda: ConvLSTM3D(1, 2, 3, padding=(-1, 1, 1)), "^ConvLSTM3D: padding of the depth must be an integer >= 0"),
        (lambda: ConvLSTM3D(1, 2, 5, 0)(np.zeros((2, 3, 4, 8, 8, 1))), "a window of 5 does not fit the depth of 4"),
        (lambda: ConvLSTM3D(1, 2, 3)(np.zeros((2, 3, 8, 1))), r"x must be 6D \(batch, time, depth, height, width, ch"),
        (lambda: ConvLSTM1D(1, 2, 3)(np.zeros((2, 3, 8, 8, 1))), r"must be 4D \(batch, time, width, channels\), got"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_options_are_fixed_and_parameters_the_cells():
    layer = made(ConvGRU2D)
    with pytest.raises(AttributeError, match="ConvGRU2D: reset_after is fixed"):
        layer.reset_after = False
    with pytest.raises(AttributeError, match=r"kernel is a parameter of a cell; assign to layer.cells\[0\].kernel"):
        layer.kernel = 0
    layer.return_sequences = False


class OnAGPU:
    """What looks like an array on a GPU."""

    def __dlpack_device__(self):
        return 2, 0


@every_class
def test_arrays_on_a_gpu_are_refused(kind):
    if kind is not ConvLSTM1D:  # which computes there
        with pytest.raises(
            TypeError, match=f"{kind.__name__}: x is on a GPU, where this layer does not compute; move x"
        ):
            kind(2, 3, 3)(OnAGPU())
