import copy

import numpy as np
import pytest
from layer_checks import (
    IN_FLOAT32,
    check_gradients,
    check_laws,
    check_penalties,
    check_saving,
    close,
    differences,
    equal,
    keras_values,
    normal,
)

from fastclstm.layers import GRU, LSTM, Concatenate, ConvLSTM2D, Input
from fastclstm.models import Model

FIXED = {"dtype": "float64", "seed": 0, "bias_initializer": "random_normal"}
MASK = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], bool)


@pytest.fixture(params=["LSTM reference", "LSTM cpu", "GRU", "GRU before"])
def make(request):
    """Function that makes a layer of each kind, options as given."""
    kind, _, rest = request.param.partition(" ")
    own = {"engine": rest} if kind == "LSTM" else {"reset_after": rest != "before"}
    return lambda *sizes, **options: {"LSTM": LSTM, "GRU": GRU}[kind](*sizes, **own, **FIXED | options)


OPTIONS = [
    {},
    {"return_sequences": False, "activation": "softsign"},
    {"go_backwards": True, "recurrent_activation": "hard_sigmoid"},
    {"use_bias": False},
    {"dropout": 0.4, "recurrent_dropout": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_and_laws(make, options, tmp_path):
    layer, x = make(3, 4, **options), normal(3, 4, 3)
    check_gradients(layer, x)
    check_gradients(layer, x, mask=MASK)
    check_laws(layer, x)
    check_saving(layer, x, tmp_path / "layer")


def states_of(layer, seed=7):
    return tuple(normal(3, layer.units, seed=seed + index) for index in range(len(layer._state_names)))


@pytest.mark.parametrize("options", [{}, {"go_backwards": True, "return_sequences": False}], ids=str)
def test_gradients_of_states(make, options):
    layer, x = make(3, 2, return_state=True, **options), normal(3, 4, 3)
    states, dstates = states_of(layer), states_of(layer, 17)
    y, (last,) = layer(x, initial_state=states, mask=MASK, training=True)
    assert len(last) == len(states)
    dy = normal(*y.shape, seed=2)
    layer.backward(dy, dstates)
    (found,) = layer.state_gradients
    for index, gradient in enumerate(found):

        def loss(moved, index=index):
            moved = (*states[:index], moved, *states[index + 1 :])
            y, (last,) = layer(x, initial_state=[moved], mask=MASK)
            return np.sum(y * dy) + sum(np.sum(a * b) for a, b in zip(last, dstates, strict=True))

        close(gradient.ravel(), differences(loss, states[index], range(states[index].size)), 1e-7)


@pytest.mark.parametrize("form", ["as returned", "tuple", "one, or a list"])
def test_states_in_graphs(make, form):
    """Encoder and decoder, as with arrays; gradients through the states by central differences."""
    encoder, decoder = make(3, 2, return_state=True), make(2, 2, return_state=True, seed=1)
    given = {"as returned": lambda s: s, "tuple": lambda s: s[0],
             "one, or a list": lambda s: s[0][0] if len(s[0]) == 1 else list(s[0])}[form]  # fmt: skip
    x = Input((None, 3))
    y, states = encoder(x)
    z, last = decoder(y, initial_state=given(states))
    model = Model(x, [z, *last[0], Concatenate()([y, z])])
    array = normal(3, 4, 3)
    first, kept = encoder(array)
    second, after = decoder(first, initial_state=kept)
    for a, b in zip(model(array), (second, *after[0], np.concatenate([first, second], -1)), strict=True):
        equal(a, b)
    out = Model(x, Concatenate(axis=1)([z, decoder(y, initial_state=given(states))[0]]))
    check_gradients(out, array)
    only = Model(x, last[0][0])
    check_gradients(only, array)
    with pytest.raises(ValueError, match=r"initial_state has shape \(None, 5\) but must be \(\d+, 2\)"):
        decoder(y, initial_state=[(Input((5,)),) * len(encoder._state_names)])
    with pytest.raises(ValueError, match=r"initial_state must be .*, got 3 items"):
        decoder(y, initial_state=[(Input((2,)),) * 3])


def test_splitting_a_sequence_and_handing_on_the_state_is_the_whole(make):
    layer, x = make(3, 4, return_state=True), normal(3, 6, 3)
    whole, (last,) = layer(x)
    first, states = layer(x[:, :2])
    second, (others,) = layer(x[:, 2:], initial_state=states)
    close(np.concatenate([first, second], 1), whole)
    for a, b in zip(others, last, strict=True):
        close(a, b)
    stateful = make(3, 4, stateful=True)
    close(np.concatenate([stateful(x[:, :2]), stateful(x[:, 2:])], 1), whole)
    close(stateful.states[0][0], last[0])
    stateful.reset_state()
    close(stateful(x), whole)
    with pytest.raises(
        ValueError, match="states kept from the last call are of 3 samples, but x has 2; call reset_state"
    ):
        stateful(x[:2])


def test_masks(make):
    """A masked step repeats the output and carries the state on; before the first valid one there are zeros."""
    layer, x = make(3, 4, return_state=True), normal(3, 4, 3)
    initial = states_of(layer)
    y, (last,) = layer(x, initial_state=initial, mask=MASK)
    plain, (end,) = layer(x[:1], initial_state=tuple(s[:1] for s in initial))
    close(y[:1], plain)
    close(last[0][0], end[0][0])
    short, (end,) = layer(x[1:2, [1, 3]], initial_state=tuple(s[1:2] for s in initial))
    equal(y[1, 0], np.zeros(4))
    close(y[1, [1, 3]], short[0])
    equal(y[1, 2], y[1, 1])
    for a, b in zip(last, end, strict=True):
        close(a[1], b[0])
    equal(y[2], np.zeros((4, 4)))
    for a, b in zip(last, initial, strict=True):
        equal(a[2], b[2])
    lengths, steps = np.array([4, 2, 0]), np.arange(4) < np.array([[4], [2], [0]])
    equal(layer(x, lengths=lengths)[0], layer(x, mask=steps)[0])


def test_dropout_is_the_same_at_all_steps(make):
    layer = make(50, 2, dropout=0.5)
    x = np.ones((2, 3, 50))
    layer(x, training=True)
    dx = layer.backward(np.ones((2, 3, 2)))
    dropped = dx == 0
    assert 0.2 < dropped.mean() < 0.8
    equal(dropped, np.broadcast_to(dropped[:, :1], dropped.shape))
    equal(layer(x), layer(x))


def test_lstm_is_a_convlstm_of_one_pixel():
    layer = LSTM(3, 4, engine="reference", **FIXED)
    frames = ConvLSTM2D(3, 4, 1, engine="reference", **FIXED)
    frames.set_parameters(
        {f"layers.0.{name}": a[np.newaxis, np.newaxis] if a.ndim == 2 else a for name, a in layer.parameters.items()}
    )
    x = normal(2, 5, 3)
    equal(layer(x), frames(x[:, :, np.newaxis, np.newaxis])[:, :, 0, 0])


@pytest.mark.torch
@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_lstm_of_torch(engine):
    torch = pytest.importorskip("torch")
    layer = LSTM(3, 4, return_state=True, engine=engine, **FIXED)
    theirs = torch.nn.LSTM(3, 4, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.weight_ih_l0[:] = torch.tensor(layer.kernel.T.copy())
        theirs.weight_hh_l0[:] = torch.tensor(layer.recurrent_kernel.T.copy())
        theirs.bias_ih_l0[:] = torch.tensor(layer.bias.copy())
        theirs.bias_hh_l0[:] = 0
    shapes = (2, 5, 3), (2, 4), (2, 4)
    leaves = [torch.tensor(normal(*shape, seed=seed), requires_grad=True) for seed, shape in enumerate(shapes)]
    expected, (h, c) = theirs(leaves[0], tuple(state[None] for state in leaves[1:]))
    x, *initial = (leaf.detach().numpy() for leaf in leaves)
    y, [(last_h, last_c)] = layer(x, tuple(initial), training=True)
    for ours, other in ((y, expected), (last_h, h[0]), (last_c, c[0])):
        close(ours, other.detach().numpy())
    dy, dh, dc = (normal(*shape, seed=9) for shape in ((2, 5, 4), (2, 4), (2, 4)))
    torch.autograd.backward([expected, h, c], [torch.tensor(dy), torch.tensor(dh)[None], torch.tensor(dc)[None]])
    close(layer.backward(dy, (dh, dc)), leaves[0].grad.numpy())
    for ours, leaf in zip(layer.state_gradients[0], leaves[1:], strict=True):
        close(ours, leaf.grad.numpy())
    gradients = layer.get_gradients()
    close(gradients["kernel"].T, theirs.weight_ih_l0.grad.numpy())
    close(gradients["recurrent_kernel"].T, theirs.weight_hh_l0.grad.numpy())
    close(gradients["bias"], theirs.bias_ih_l0.grad.numpy())


@pytest.mark.torch
def test_gru_of_torch():
    """PyTorch's gates are r, z, n."""
    torch = pytest.importorskip("torch")
    layer = GRU(3, 4, return_state=True, **FIXED)
    theirs = torch.nn.GRU(3, 4, batch_first=True, dtype=torch.float64)
    order = np.concatenate([np.arange(4, 8), np.arange(4), np.arange(8, 12)])
    with torch.no_grad():
        theirs.weight_ih_l0[:] = torch.tensor(layer.kernel.T[order])
        theirs.weight_hh_l0[:] = torch.tensor(layer.recurrent_kernel.T[order])
        theirs.bias_ih_l0[:] = torch.tensor(layer.bias[0][order])
        theirs.bias_hh_l0[:] = torch.tensor(layer.bias[1][order])
    x, h = torch.tensor(normal(2, 5, 3), requires_grad=True), torch.tensor(normal(2, 4, seed=2), requires_grad=True)
    expected, last = theirs(x, h[None])
    y, [(ours,)] = layer(x.detach().numpy(), h.detach().numpy(), training=True)
    close(y, expected.detach().numpy())
    close(ours, last[0].detach().numpy())
    dy, dh = normal(2, 5, 4, seed=3), normal(2, 4, seed=4)
    torch.autograd.backward([expected, last], [torch.tensor(dy), torch.tensor(dh)[None]])
    close(layer.backward(dy, dh), x.grad.numpy())
    close(layer.state_gradients[0][0], h.grad.numpy())
    gradients = layer.get_gradients()
    close(gradients["kernel"].T[order], theirs.weight_ih_l0.grad.numpy())
    close(gradients["recurrent_kernel"].T[order], theirs.weight_hh_l0.grad.numpy())
    close(gradients["bias"][1][order], theirs.bias_hh_l0.grad.numpy())


@pytest.mark.keras
@pytest.mark.parametrize("options", [
    {}, {"return_sequences": False, "use_bias": False}, {"go_backwards": True, "activation": "relu"},
    {"recurrent_activation": "hard_sigmoid"},
], ids=str)  # fmt: skip
def test_values_of_keras(make, options):
    layer, x = make(3, 4, **options), normal(3, 4, 3)
    theirs = {"return_sequences": True} | options | {"dtype": "float64"}
    if isinstance(layer, GRU):
        theirs["reset_after"] = layer.reset_after
    name, weights = type(layer).__name__, list(layer.parameters.values())
    for mask in (None, MASK):
        expected = keras_values(lambda L: getattr(L, name)(4, **theirs), x, weights, mask=mask)
        close(layer(x, mask=mask), expected, IN_FLOAT32)


def test_float32_and_copies(make):
    layer, x = make(3, 4, dtype="float32", stateful=True), normal(2, 5, 3)
    y = layer(x, training=True)
    assert y.dtype == layer.backward(y).dtype == layer.get_gradients()["kernel"].dtype == np.float32
    other = copy.deepcopy(layer)
    equal(other(x), layer(x))


def test_penalties(make):
    layer = make(1, 1, kernel_regularizer="l2", recurrent_regularizer="l2", bias_regularizer="l1",
                 kernel_constraint="non_neg", bias_initializer="ones")  # fmt: skip
    check_penalties(layer, normal(2, 3, 1), "kernel")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda make: make(0, 4), "in_features must be an integer >= 1"),
        (lambda make: make(3, 4, activation="max"), "activation: unknown activation 'max'"),
        (lambda make: make(3, 4, dropout=1), r"dropout must be a number in \[0, 1\)"),
        (lambda make: make(3, 4, return_state=1), "return_state must be True or False"),
        (
            lambda make: make(3, 4)(np.zeros((2, 5, 4))),
            r"x must be \(batch, time, 3\) since in_features is 3, got shape",
        ),
        (lambda make: make(3, 4)(np.zeros((2, 3))), r"x must be \(batch, time, 3\)"),
        (lambda make: make(3, 4)(np.zeros((2, 0, 3))), "x has no time steps"),
        (lambda make: make(3, 4)(np.zeros((2, 5, 3)), mask=np.ones((2, 4))), r"mask has shape \(2, 4\)"),
        (lambda make: make(3, 4)(np.zeros((2, 5, 3)), mask=np.ones((2, 5)), lengths=[1, 2]), "give mask or lengths"),
        (lambda make: make(3, 4)(np.zeros((2, 5, 3)), initial_state=(1, 2, 3)), "initial_state must be"),
        (lambda make: make(3, 4)(np.zeros((2, 5, 3)), [(np.zeros((2, 5)),) * 2][0][:1] * 3), "initial_state must be"),
    ],
)
def test_errors(make, run, message):
    with pytest.raises(ValueError, match=f"(LSTM|GRU): .*{message}"):
        run(make)
