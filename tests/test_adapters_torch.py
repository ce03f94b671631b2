"""fastclstm.adapters.torch: the operator, the module ConvLSTM2D, and what PyTorch does with modules."""

import contextlib
import copy
import gc
import io
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import fastclstm
from fastclstm import functional
from fastclstm.nn.normalization import Normalization

torch = pytest.importorskip("torch")

from fastclstm.adapters import torch_ops  # noqa: E402
from fastclstm.adapters.torch import ConvGRU2D, ConvLSTM2D, ConvRNN2D  # noqa: E402

pytestmark = pytest.mark.torch
ROOT = Path(fastclstm.__file__).parents[1]
X = (2, 4, 3, 6, 5)  # B T C H W


def randn(*shape, dtype=torch.float32, grad=False, seed=0):
    values = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return values.requires_grad_(grad)


def deviation(a, b):
    """How far a is from b, as a share of b's largest value."""
    a, b = (np.asarray(v.detach().double() if isinstance(v, torch.Tensor) else v) for v in (a, b))
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


def gradients(module, x, **arguments):
    """Gradients of x and of the parameters of a sum of all outputs, each value with a weight of its own."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_(True)
    leaves = torch.utils._pytree.tree_leaves(module(x, **arguments))
    sum((leaf * randn(*leaf.shape, seed=n)).sum() for n, leaf in enumerate(leaves)).backward()
    return [x.grad, *(p.grad.clone() for p in module.parameters())]


def same(some, others):
    return all(map(torch.equal, some, others)) and len(some) == len(others)


# The operator


def operands(name="convlstm2d", dtype=torch.float64, both=False, **more):
    """An operator, its tensors and further weights."""
    operator = torch_ops.OPERATORS[name]
    B, T, H, W, C, F = 2, 3, 4, 5, 2, 3
    G = {"convlstm2d": 4, "convgru2d": 3, "convrnn2d": 1}[name]
    bias = (2, G * F) if both else (G * F,)
    named = {"kernel": (3, 3, C, G * F), "recurrent_kernel": (3, 3, F, G * F), "bias": bias, **more}
    x, *states = randn(B, T, H, W, C, dtype=dtype), *(randn(B, H, W, F, dtype=dtype, seed=n) for n in (0, 1))
    weights = [randn(*shape, dtype=dtype, seed=n) / 3 for n, shape in enumerate(named.values(), 2)]
    given = (x, *weights[:3], *states[: len(operator.states)])
    return operator, [t.requires_grad_(True) for t in given], [w.requires_grad_(True) for w in weights[3:]]


OPTIONS = {
    "plain": ("convlstm2d", {}, {}),
    "conv": ("convlstm2d", {f"peephole.{n}{g}": (3,) if n else (3, 3, 3, 3) for n in ("", "bias_") for g in "ifo"}, {}),
    "layer": ("convlstm2d", {f"normalization_weights.{name}": (12,) for name in ("gamma", "beta")},
              {"normalization": Normalization("layer")}),
    "channel": ("convlstm2d", {f"peephole.{g}": (3,) for g in "ifo"}, {"activation": "softsign", "recompute": True}),
    "gru": ("convgru2d", {}, {"recurrent_activation": "hard_sigmoid"}),
    "gru, normalized": ("convgru2d", {f"normalization_weights.{name}": (9,) for name in ("gamma", "beta")},
                        {"normalization": Normalization("group", groups=3), "reset_after": False}),
    "rnn": ("convrnn2d", {}, {"activation": "softsign"}),
}  # fmt: skip


def drawn(case):
    """Of a case the operator, its tensors and what stands behind them."""
    name, more, options = OPTIONS[case]
    operator, tensors, further = operands(name, both=case == "gru", **more)
    return operator, tensors, further, torch_ops.encode(list(more), **options)


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_gradients_are_those_of_differences(case, backwards, eager):
    operator, tensors, further, encoded = drawn(case)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    count = 4 + len(operator.states)

    def call(*given):
        if not eager:
            return operator.forward(*given[:count], mask, None, None, given[count:], encoded, backwards, True, True)[
                :-1
            ]
        named = dict(zip(("kernel", "recurrent_kernel", "bias"), given[1:4], strict=True))
        named |= {str(n): tensor for n, tensor in enumerate(given[count:])}
        weights = torch_ops.Weights(torch.nn.Module(), 0, [*named.values()], lambda _: named)
        return operator(given[0], weights, given[4:count], encoded, mask=mask, go_backwards=backwards)

    assert torch.autograd.gradcheck(call, (*tensors, *further), fast_mode=True)


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(case, save):
    operator, tensors, further, encoded = drawn(case)
    torch.library.opcheck(operator.forward, (*tensors, None, None, None, further, encoded, False, save, save))


@pytest.mark.parametrize("case", ["plain", "gru"])
@pytest.mark.parametrize("input_gradient", [False, True])
def test_opcheck_of_the_way_back(case, input_gradient):
    operator, tensors, _, encoded = drawn(case)
    tensors = [tensor.detach() for tensor in tensors]
    dy = randn(2, 3, 4, 5, 3, dtype=torch.float64)
    arguments = (*tensors, None, None, None, [], encoded, False, True, input_gradient)
    saved, none = torch.zeros(1, dtype=torch.uint8), [None] * len(operator.states)
    torch.library.opcheck(operator.backward, (saved, dy, *none, *arguments))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_of_x_that_nobody_asks_for_is_not_computed(compiled, monkeypatch):
    asked = []
    pull = functional.ConvLSTMPullback.__call__

    def spied(self, cotangents, *, input_gradient=True):
        asked.append(input_gradient)
        return pull(self, cotangents, input_gradient=input_gradient)

    monkeypatch.setattr(functional.ConvLSTMPullback, "__call__", spied)
    module = ConvLSTM2D(3, 4, 3)
    torch.compiler.reset()
    call = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    call(randn(*X)).sum().backward()
    x = randn(*X, grad=True)
    call(x).sum().backward()
    assert asked == [False, True]
    assert x.grad is not None


@pytest.mark.parametrize("write", [lambda p: p.data.mul_(2), lambda p: p.detach().numpy().__imul__(2),
                                   lambda p: setattr(p, "data", p.data * 2)])  # fmt: skip
def test_weights_that_change_unseen_are_seen(write):
    module, x = ConvLSTM2D(3, 4, 3), randn(*X)
    with torch.no_grad():
        first = module(x)
        assert torch.equal(module(x), first)
        for parameter in module.parameters():
            write(parameter)
        second = module(x)
    assert torch.equal(second, module(x).detach())  # arranged anew
    assert deviation(second, first) > 1e-3


def test_without_the_dispatcher_it_is_the_same():
    module, x = ConvLSTM2D(3, 4, 3), randn(*X, grad=True)
    passed = gradients(module, x)
    with Seen() as mode:
        dispatched = gradients(module, x)
    assert mode.names == {"fastclstm::convlstm2d", "fastclstm::convlstm2d_backward"}
    assert same(passed, dispatched)


def test_channels_first_in_memory_where_that_is_wanted():
    """Without gradients, with them, and through the dispatcher: the same values and gradients."""
    module, x = ConvLSTM2D(3, 4, 3), randn(2, 3, 5, 6, 3)
    cell = module.cells[0]

    def call(first):
        module.zero_grad()
        results = module._operator(x, cell.weights(), (None, None), module._encoded, first=first)
        if torch.is_grad_enabled():
            sum((y.movedim(-3, -1) if n in first else y).square().sum() for n, y in enumerate(results)).backward()
        return [y.detach() for y in results], [parameter.grad for parameter in module.parameters()]

    wanted, gradients = call(())
    for first in ((0,), (1, 2)):
        for mode in (torch.no_grad(), Seen(), contextlib.nullcontext()):
            with mode:
                results, pulled = call(first)
            for n in first:
                assert results[n].is_contiguous()
            assert all(torch.equal(y, z.movedim(-1, -3) if n in first else z)
                       for n, (y, z) in enumerate(zip(results, wanted, strict=True)))  # fmt: skip
            assert pulled[0] is None or all(map(torch.equal, pulled, gradients))


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Which of our operators are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastclstm":
            self.names.add(func.name())
        return func(*args, **kwargs or {})


def test_what_is_saved_lives_as_long_as_the_graph():
    gc.collect()
    before = len(torch_ops._saved)
    module = ConvLSTM2D(3, 4, 3)
    outputs = [module(randn(*X)) for _ in range(3)]
    assert len(torch_ops._saved) == before + 3
    outputs[0].sum().backward()
    assert len(torch_ops._saved) == before + 2
    del outputs
    assert len(torch_ops._saved) == before
    with torch.no_grad():
        module(randn(*X))
    assert len(torch_ops._saved) == before


def test_the_way_back_may_be_taken_twice():
    module = ConvLSTM2D(3, 4, 3)
    loss = module(randn(*X)).square().sum()
    once = torch.autograd.grad(loss, [*module.parameters()], retain_graph=True)
    assert same(once, torch.autograd.grad(loss, [*module.parameters()]))


@pytest.mark.parametrize("recompute", [False, True])
def test_without_what_was_saved_it_is_computed_again(recompute):
    """As where hooks copy saved tensors: to a disk, to another device."""
    module = ConvLSTM2D(3, 4, 3, recompute=recompute)
    expected = gradients(module, randn(*X))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        assert same(gradients(module, randn(*X)), expected)


def test_second_derivatives_are_refused():
    x = randn(*X, grad=True)
    (dx,) = torch.autograd.grad(ConvLSTM2D(3, 4, 3)(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="convlstm2d_backward"):
        dx.sum().backward()


def test_an_input_changed_before_the_way_back_is_an_error():
    x = randn(*X)
    loss = ConvLSTM2D(3, 4, 3, data_format="channels_last", padding=(0, 1))(x.movedim(2, -1)).sum()
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# The module


LAYERS = [
    {},
    {"num_layers": 2, "out_channels": [4, 5], "leaky_relu_slope": 0.1, "kernel_size": [3, (5, 3)]},
    {"bidirectional": True, "num_layers": 2},
    {"bidirectional": True, "merge_mode": "mul", "go_backwards": True},
    {"bidirectional": True, "merge_mode": "ave", "return_sequences": False, "num_layers": 2},
    {"bidirectional": True, "merge_mode": None},
    {"go_backwards": True, "num_layers": 2, "stride": 2, "zero_output_for_mask": True},
    {"peephole": "elementwise", "frame_size": (6, 5), "peephole_initializer": "glorot_uniform"},
    {"peephole": "conv", "use_bias": False, "peephole_initializer": "glorot_uniform", "recurrent_kernel_size": 5},
    {"normalization": Normalization("layer", separate=True, elementwise=True), "frame_size": (6, 5)},
    {"normalization": "group", "activation": "relu", "cell_clip": 1.0, "padding": "valid", "padding_mode": "zeros"},
    {"dilation": 2, "padding_mode": "circular", "recurrent_activation": "hard_sigmoid", "time_major": True},
    {"data_format": "channels_last", "return_sequences": False},
    {"kind": ConvGRU2D, "num_layers": 2, "leaky_relu_slope": 0.1, "stride": 2, "bidirectional": True},
    {"kind": ConvGRU2D, "reset_after": False, "normalization": "group", "go_backwards": True},
    {"kind": ConvGRU2D, "time_major": True, "use_bias": False, "padding_mode": "circular", "activation": "relu"},
    {"kind": ConvRNN2D, "num_layers": 2, "recurrent_kernel_size": 5, "zero_output_for_mask": True},
]


@pytest.mark.parametrize("options", LAYERS, ids=lambda options: "-".join(map(str, options)) or "plain")
@pytest.mark.parametrize("masked", [False, True])
def test_it_computes_what_our_layer_computes(options, masked):
    options = {"out_channels": 4, "kernel_size": 3, "return_state": True, **options}
    module = options.pop("kind", ConvLSTM2D)(3, seed=3, dtype=torch.float64, **options)
    layer = module.to_layer()
    x = randn(*X, dtype=torch.float64, grad=True)
    given = x.movedim(2, -1) if options.get("data_format") else x
    given = given.transpose(0, 1) if options.get("time_major") else given
    lengths = torch.tensor([4, 2]) if masked else None
    output, states = module(given, lengths=lengths)
    expected, last = layer.forward(given.detach().numpy(), lengths=lengths, training=True)
    outputs, expected = (v if isinstance(v, tuple) else (v,) for v in (output, expected))
    for ours, theirs in zip((*outputs, *sum(states, ())), (*expected, *sum(last, ())), strict=True):
        assert deviation(ours, theirs) < 1e-12
    dys = [randn(*y.shape, dtype=torch.float64, seed=n) for n, y in enumerate(outputs)]
    dlast = [[randn(*s.shape, dtype=torch.float64, seed=9 + n) for n, s in enumerate(pair)] for pair in states]
    leaves = torch.utils._pytree.tree_leaves
    sum((y * dy).sum() for y, dy in zip(leaves((outputs, states)), leaves((dys, dlast)), strict=True)).backward()
    dy = dys[0].numpy() if len(dys) == 1 else tuple(dy.numpy() for dy in dys)
    dx = layer.backward(dy, [tuple(s.numpy() for s in pair) for pair in dlast])
    dx = dx.swapaxes(0, 1) if options.get("time_major") else dx
    assert deviation(x.grad, np.moveaxis(dx, -1, 2) if options.get("data_format") else dx) < 1e-10
    for (name, parameter), (key, gradient) in zip(
        module.named_parameters(), layer.get_gradients().items(), strict=True
    ):
        assert name.rpartition(".")[2] == key.rpartition(".")[2]
        assert deviation(parameter.grad, gradient) < 1e-10


def test_all_layers_and_states_are_what_torchgeo_returns():
    module = ConvLSTM2D(3, 4, 3, num_layers=2, return_all_layers=True, return_state=True)
    outputs, states = module(randn(*X))
    assert [tuple(y.shape) for y in outputs] == [(2, 4, 4, 6, 5)] * 2
    for y, (h, c) in zip(outputs, states, strict=True):
        assert torch.equal(y[:, -1], h)
        assert c.shape == h.shape
    first = ConvLSTM2D(3, 4, 3)
    first.cells[0].load_state_dict(module.cells[0].state_dict())
    assert torch.equal(first(randn(*X)), outputs[0])


@pytest.fixture(params=[ConvLSTM2D, ConvGRU2D])
def kind(request):
    return request.param


def test_the_states_are_taken_and_pulled_back(kind):
    module = kind(3, 4, 3, num_layers=2, return_state=True, dtype=torch.float64)
    x = randn(*X, dtype=torch.float64)
    whole, last = module(x)
    first, states = module(x[:, :2])
    second, after = module(x[:, 2:], states)
    assert deviation(torch.cat([first, second], 1), whole) < 1e-14
    assert deviation(after[1][-1], last[1][-1]) < 1e-14
    expected = torch.autograd.grad(whole.square().sum(), [*module.parameters()])
    split = torch.autograd.grad(first.square().sum() + second.square().sum(), [*module.parameters()])
    assert max(map(deviation, split, expected)) < 1e-12
    with pytest.raises(ValueError, match=r"initial_state must be 2 (pairs|states) \(h, ?c?\)"):
        module(x, states[:1])


def test_a_single_state_in_its_forms():
    module, x = ConvGRU2D(3, 4, 3), randn(*X)
    h = randn(2, 4, 6, 5)
    forms = [module(x, state) for state in (h, (h,), [h], [(h,)])]
    assert all(torch.equal(form, forms[0]) for form in forms)
    assert deviation(forms[0], module(x)) > 1e-3
    lstm = ConvLSTM2D(3, 4, 3)
    assert torch.equal(lstm(x, (h, h)), lstm(x, [[h, h]]))
    assert torch.equal(lstm(x, (h, None)), lstm(x, (h, h * 0)))


@pytest.mark.parametrize(
    ("x", "weights", "result"),
    [("float16", "float32", "float32"), ("bfloat16", "bfloat16", "bfloat16"), ("float32", "float64", "float64"),
     ("int32", "float32", "float32"), ("float16", "float16", "float16")],
)  # fmt: skip
def test_dtypes(x, weights, result):
    module = ConvLSTM2D(3, 4, 3).to(getattr(torch, weights))
    given = (randn(*X) * 3).to(getattr(torch, x))
    y = module(given)
    assert y.dtype == getattr(torch, result)
    exact = copy.deepcopy(module).double()(given.double())
    assert deviation(y, exact) < {"float64": 1e-14, "float32": 1e-6}.get(result, 1e-2)
    y.sum().backward()
    assert all(p.grad.dtype == p.dtype for p in module.parameters())


def test_complex_is_refused():
    with pytest.raises(ValueError, match="the dtype of x and the weights must be one of"):
        ConvLSTM2D(3, 4, 3)(torch.zeros(X, dtype=torch.complex64))


def test_memory_is_shared_where_the_layout_allows():
    x = randn(2, 4, 6, 5, 3)
    assert np.shares_memory(torch_ops._array(x), x.numpy())
    first = x.movedim(-1, 2)  # channels first, as a user has them after a channels_last convolution
    module = ConvLSTM2D(3, 4, 3)
    assert torch.equal(module(first), module(first.contiguous()))
    assert np.shares_memory(torch_ops._array(first.movedim(2, -1)), x.numpy())
    array = np.ones(3)
    assert np.shares_memory(torch_ops._tensor(array).numpy(), array)


def test_strange_layouts_and_empty_batches():
    module = ConvLSTM2D(3, 4, 3)
    x = randn(4, 4, 3, 6, 10)
    assert torch.equal(module(x[::2, ..., ::2]), module(x[::2, ..., ::2].contiguous()))
    assert torch.equal(module(x[:1].expand(2, -1, -1, -1, -1)), module(x[[0, 0]]))
    assert module(x[:0]).shape == (0, 4, 4, 6, 10)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ConvLSTM2D(3, 4, 3, stateful=True), TypeError, "stateful is not for PyTorch; hand the states on"),
        (lambda: ConvLSTM2D(3, 4, 3, kernel_regularizer="l2"), TypeError, "weight_decay"),
        (lambda: ConvLSTM2D(3, 4, 3, normalization="batch"), ValueError, "'batch' is not for PyTorch"),
        (lambda: ConvLSTM2D(3, 4, 3, activation=(abs, abs)), TypeError, "activation must be the name"),
        (lambda: ConvLSTM2D(3, 4, 3, nothing=1), TypeError, "nothing"),
        (lambda: ConvLSTM2D(3, 4, 0), ValueError, "kernel_size"),
        (lambda: ConvLSTM2D(3, 4, 3, return_all_layers=True, return_sequences=False), ValueError, "returns sequences"),
        (lambda: ConvLSTM2D(3, 4, 3)(torch.zeros(4, 3, 6, 5)), ValueError, r"x must have 5 axes, got \(4, 3, 6, 5\)"),
        (lambda: ConvLSTM2D(3, 4, 3)(torch.zeros(1, 4, 6, 5, 3)), ValueError, "6 channels .* but in_channels is 3"),
        (lambda: ConvLSTM2D(3, 4, 3)(torch.zeros(X), mask=torch.ones(2, 4), lengths=torch.ones(2)), ValueError, "both"),
        (lambda: ConvLSTM2D(3, 4, 3)(torch.zeros(X), mask=torch.ones(2, 3)), ValueError, r"mask has shape \(2, 3\)"),
        (lambda: ConvLSTM2D(3, 4, 3, frame_size=4, peephole="elementwise")(torch.zeros(X)), ValueError, "frame_size"),
    ],
)  # fmt: skip
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_it_is_drawn_by_pytorchs_generator():
    torch.manual_seed(5)
    first = ConvLSTM2D(3, 4, 3, dropout=0.5, recurrent_dropout=0.5, stride=2)
    torch.manual_seed(5)
    second = ConvLSTM2D(3, 4, 3, dropout=0.5, recurrent_dropout=0.5, stride=2)
    assert same([*first.parameters()], [*second.parameters()])
    x = randn(*X)
    torch.manual_seed(1)
    dropped = first(x)
    torch.manual_seed(1)
    assert torch.equal(dropped, second(x))
    assert not torch.equal(dropped, first(x))
    assert torch.equal(first.eval()(x), second.eval()(x))


def test_layers_go_both_ways():
    layer = fastclstm.ConvLSTM2D(3, 4, 3, num_layers=2, data_format="channels_first", return_state=True, seed=1)
    module = ConvLSTM2D.from_layer(layer)
    x = randn(*X)
    assert np.array_equal(module(x)[0].detach(), layer(x.numpy())[0])
    back = module.to_layer().parameters
    assert all(np.array_equal(back[name], array) for name, array in layer.parameters.items())
    with pytest.raises(TypeError, match="stateful is not for PyTorch"):
        ConvLSTM2D.from_layer(fastclstm.ConvLSTM2D(3, 4, 3, stateful=True))
    with pytest.raises(TypeError, match=r"layer must be a fastclstm\.ConvGRU2D, got ConvLSTM2D"):
        ConvGRU2D.from_layer(layer)


def test_repr_says_what_is_unusual():
    assert repr(ConvLSTM2D(3, 4, 3, go_backwards=True)).startswith(
        "ConvLSTM2D(\n  in_channels=3, out_channels=4, kernel_size=(3, 3), go_backwards=True\n"
    )


# What PyTorch does with modules


def test_copies_pickles_and_state_dicts(kind):
    module = kind(3, 4, 3, num_layers=2, bidirectional=True)
    x = randn(*X)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    other = kind(3, 4, 3, num_layers=2, bidirectional=True)
    other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    assert [*other.state_dict()][:3] == ["cells.0.kernel", "cells.0.recurrent_kernel", "cells.0.bias"]
    for one in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert torch.equal(one(x), module(x))
        assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in module.parameters()}


@pytest.mark.parametrize(
    ("backend", "options"),
    [("aot_eager", {}), ("aot_eager", {"dropout": 0.3, "recurrent_dropout": 0.3, "stride": 2}),
     pytest.param("inductor", {}, marks=pytest.mark.slow)],  # it needs a compiler of C++
)  # fmt: skip
def test_it_compiles_to_one_graph(kind, backend, options):
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("no compiler of C++")
    fastclstm.ConvLSTM2D(3, 4, 3)(torch.zeros(1, 2, 5, 5, 3))  # tells torch.compile not to trace the package
    torch.compiler.reset()
    model = torch.nn.Sequential(torch.nn.Flatten(0, 1), torch.nn.Conv2d(3, 3, 1), torch.nn.Unflatten(0, X[:2]),
                                kind(3, 4, 3, **options), torch.nn.ReLU())  # fmt: skip
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.manual_seed(0)
    expected = gradients(model, randn(*X))
    torch.manual_seed(0)
    assert max(map(deviation, gradients(compiled, randn(*X)), expected)) < 1e-5
    with torch.no_grad():
        assert deviation(compiled.eval()(randn(*X)), model.eval()(randn(*X))) < 1e-6


def test_it_compiles_and_exports_for_any_size(kind):
    torch.compiler.reset()
    module = kind(3, 4, 3, padding="valid", stride=2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    Dim = torch.export.Dim
    exported = torch.export.export(module, (randn(*X),), dynamic_shapes=({0: Dim("B"), 1: Dim("T")},))
    assert f"fastclstm.{kind.__name__.lower()}.default" in {str(node.target) for node in exported.graph.nodes}
    for shape in (X, (3, 2, 3, 6, 5)):
        assert torch.equal(exported.module()(randn(*shape)), module(randn(*shape)))
        assert torch.equal(compiled(randn(*shape)), module(randn(*shape)))
    assert compiled(randn(1, 2, 3, 9, 8)).shape == (1, 2, 4, 4, 3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(kind, reentrant):
    from torch.utils.checkpoint import checkpoint

    module = kind(3, 4, 3, num_layers=2, dropout=0.2)

    class Checkpointed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    expected = gradients(module, randn(*X))
    torch.manual_seed(0)
    assert same(gradients(Checkpointed(), randn(*X)), expected)


def test_autocast_computes_in_float32(kind):
    model = torch.nn.Sequential(torch.nn.Conv3d(4, 4, 1), kind(3, 4, 3))
    x = randn(*X)
    with torch.autocast("cpu", torch.bfloat16):
        between = model[0](x)
        y = model[1](between)
    assert between.dtype == torch.bfloat16
    assert y.dtype == torch.float32
    assert torch.equal(y, model[1](between.float()))
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_replicas_in_threads_send_their_gradients_to_the_original():
    """What DataParallel does: replicas whose weights are copies that autograd follows, each in a thread."""
    module = ConvLSTM2D(3, 4, 3, num_layers=2)
    expected = gradients(module, randn(*X))
    module.zero_grad()

    def replicate(original):
        replica = original._replicate_for_data_parallel()
        for name, child in original._modules.items():
            replica._modules[name] = replicate(child)
        for name, parameter in original._parameters.items():
            setattr(replica, name, parameter.clone())
        return replica

    outputs = {}
    x = randn(*X, grad=True)
    replicas = [replicate(module) for _ in range(2)]

    def call(n):
        outputs[n] = replicas[n](x[n : n + 1])

    threads = [threading.Thread(target=call, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    y = torch.cat([outputs[0], outputs[1]])
    (y * randn(*y.shape)).sum().backward()
    assert max(map(deviation, [x.grad, *(p.grad for p in module.parameters())], expected)) < 1e-5


DDP = """
import sys, torch
import torch.distributed as dist
from fastclstm.adapters.torch import ConvLSTM2D

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Sequential(ConvLSTM2D(3, 4, 3), ConvLSTM2D(4, 1, 3))
x, y = torch.randn(4, 3, 3, 6, 5), torch.randn(4, 3, 1, 6, 5)

def train(model, x, y):
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return loss.detach()

import copy
alone = copy.deepcopy(model)
whole = train(alone, x, y)
parallel = torch.nn.parallel.DistributedDataParallel(model)
part = slice(rank * 2, rank * 2 + 2)
loss = train(parallel, x[part], y[part])
dist.all_reduce(loss)
assert torch.allclose(loss / 2, whole, rtol=1e-5), (loss / 2, whole)
for a, b in zip(alone.parameters(), model.parameters(), strict=True):
    assert torch.allclose(a, b, atol=1e-6), (a - b).abs().max()
dist.barrier()
dist.destroy_process_group()
print("the same")
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    command = [sys.executable, "-c", DDP]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=ROOT, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(2)]  # fmt: skip
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [out.strip() for out, _ in results] == ["the same"] * 2, results


def test_without_pytorch_it_says_what_to_install():
    code = """
import sys
sys.modules["torch"] = None
from fastclstm.adapters.torch import from_torch
try:
    from fastclstm.adapters.torch import ConvLSTM2D
except ImportError as error:
    assert "pip install 'fastclstm[torch]'" in str(error), error
    print("said")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "said", done.stderr
