"""accelerate: models compute what they did, to rounding, and everything else about them is as it was."""

import copy
import pickle
from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import dialects_torch  # noqa: E402

from fastclstm.adapters import torch_accelerate, torch_ops  # noqa: E402
from fastclstm.adapters.torch import Report, accelerate  # noqa: E402
from fastclstm.convert.torch_dialects import Dialect  # noqa: E402
from fastclstm.engines.cpu import memory, threads  # noqa: E402
from fastclstm.engines.cpu.kernels import memory as kernels  # noqa: E402

pytestmark = pytest.mark.torch
leaves = torch.utils._pytree.tree_leaves
structure = torch.utils._pytree.tree_structure
C, FRAME = 3, (6, 5)
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}


def stack(cell, filters, sizes, *options):
    channels = [C, *filters]
    cells = [cell(*pair, size, *options) for *pair, size in zip(channels, filters, sizes, strict=False)]
    return dialects_torch.Stack(cells)


class Published(torch.nn.Module):
    """What ndrplz's module, and KL4805's, returns, and how it is called."""

    def __init__(self, cells, batch_first=False, return_all_layers=False):
        super().__init__()
        self.cell_list = torch.nn.ModuleList(cells)
        self.batch_first, self.return_all_layers = batch_first, return_all_layers

    def forward(self, input_tensor, hidden_state=None):
        if hidden_state is not None:
            raise NotImplementedError("no states")
        x = input_tensor if self.batch_first else input_tensor.transpose(0, 1)
        outputs, states = [], []
        for cell in self.cell_list:
            x, state = dialects_torch.unroll(cell, x)
            outputs.append(x)
            states.append([*state])
        return (outputs, states) if self.return_all_layers else (outputs[-1:], states[-1:])


class Cut(dialects_torch.Seyongk):
    """As published: gradients do not flow through the outputs."""

    def forward(self, x):
        output, states = super().forward(x)
        return output.detach(), states


class CellByCell(torch.nn.Module):
    """As OpenSTL's: the cells are called step by step by a module that has more than them."""

    def __init__(self):
        super().__init__()
        cells = [dialects_torch.OpenSTLCell(C, 4, (3, 3)), dialects_torch.OpenSTLCell(4, 4, (3, 3))]
        self.cell_list = torch.nn.ModuleList(cells)
        self.conv_last = torch.nn.Conv2d(4, C, 1)

    def forward(self, x):
        states = [[x.new_zeros(x.shape[0], 4, *x.shape[3:])] * 2 for _ in self.cell_list]
        for t in range(x.shape[1]):
            y = x[:, t]
            for cell, state in zip(self.cell_list, states, strict=True):
                state[:] = cell(y, *state)
                y = state[0]
        return self.conv_last(y)


def conv(inputs, outputs, size=3, **options):
    return torch.nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class GRUCell(torch.nn.Module):
    """Of nobody's names; `how` says what is one convolution and what is normalized."""

    def __init__(self, inputs, F, how, **options):
        super().__init__()
        self.F, self.how = F, how
        norm = torch.nn.GroupNorm if how == "normalized" else None
        if how == "apart":  # as torch.nn.GRU: r multiplies what becomes of h
            self.ih, self.hh = conv(inputs, 3 * F, **options), conv(F, 3 * F, **options)
        elif how == "each":
            self.a, self.b, self.c = (conv(inputs + F, F, **options) for _ in range(3))
        else:
            self.gate = torch.nn.Sequential(conv(inputs + F, 2 * F, **options), *([norm(4, 2 * F)] if norm else []))
            self.new = torch.nn.Sequential(conv(inputs + F, F, **options), *([norm(2, F)] if norm else []))

    def forward(self, x, h=None):
        h = x.new_zeros(len(x), self.F, *x.shape[2:]) if h is None else h
        if self.how == "apart":
            (r, z, n), (hr, hz, hn) = self.ih(x).chunk(3, 1), self.hh(h).chunk(3, 1)
            r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
            return (1 - z) * (n + r * hn).tanh() + z * h
        if self.how == "each":
            both = torch.cat([x, h], 1)
            r, z = self.c(both).sigmoid(), self.a(both).sigmoid()
            return z * self.b(torch.cat([x, r * h], 1)).tanh() + (1 - z) * h
        r, z = self.gate(torch.cat([x, h], 1)).sigmoid().chunk(2, 1)
        return h + z * (self.new(torch.cat([x, r * h], 1)).tanh() - h)


class LSTMCell(torch.nn.Module):
    """A convolution for each gate of each of x and h, in an order of its own; states as a pair."""

    def __init__(self, inputs, F, *_, **options):
        super().__init__()
        self.F, self.o, self.g = F, conv(inputs, F, **options), conv(inputs, F, **options)
        self.i, self.f = conv(inputs, F, **options), conv(inputs, F, **options)
        self.ho, self.hg, self.hi, self.hf = (conv(F, F, bias=False) for _ in range(4))

    def forward(self, x, state=None):
        h, c = state or [x.new_zeros(len(x), self.F, *x.shape[2:])] * 2
        z = [getattr(self, gate)(x) + getattr(self, f"h{gate}")(h) for gate in "ifgo"]
        return dialects_torch.advance(torch.cat(z, 1), c)


class RNNCell(torch.nn.Module):
    def __init__(self, inputs, F, *_, **options):
        super().__init__()
        self.F, self.w = F, conv(inputs + F, F, **options)

    def forward(self, x, h):
        return self.w(torch.cat([x, h], 1)).relu()


class Rolled(torch.nn.Module):
    """Cells one on the other, all of them advanced at each step, from states that may be given."""

    def __init__(self, cells, time=1, returns="sequence"):
        super().__init__()
        self.layers, self.time, self.returns = torch.nn.ModuleList(cells), time, returns

    def forward(self, x, hx=None):
        frames = x.unbind(self.time)
        zeros = [frames[0].new_zeros(len(frames[0]), cell.F, *frames[0].shape[2:]) for cell in self.layers]
        hx = [(z, z) if isinstance(self.layers[0], LSTMCell) else z for z in zeros] if hx is None else list(hx)
        outputs = []
        for y in frames:
            for n, cell in enumerate(self.layers):
                hx[n] = cell(y, hx[n])
                y = hx[n][0] if isinstance(hx[n], tuple) else hx[n]
            outputs.append(y)
        if self.returns == "steps":
            return outputs
        y = torch.stack(outputs, self.time)
        return (y, hx) if self.returns == "both" else y


class Net(torch.nn.Module):
    """Convolutions around cells that it calls step by step."""

    def __init__(self):
        super().__init__()
        self.encode, self.cell, self.decode = conv(C, 5), GRUCell(5, 4, "each"), torch.nn.Conv2d(4, 2, 1)

    def forward(self, x):
        h, outputs = None, []
        for frame in x.unbind(1):
            h = self.cell(self.encode(frame).relu(), h)
            outputs.append(self.decode(h))
        return torch.stack(outputs, 1)


class PairCell(dialects_torch.JointCell):
    """As in many a user's model: the states come as a pair, and by name."""

    def forward(self, input_tensor, cur_state):
        return super().forward(input_tensor, *cur_state)


class ByPair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = PairCell(C, 4, (3, 3), True)

    def forward(self, x):
        state = [x.new_zeros(x.shape[0], 4, *x.shape[3:])] * 2
        for t in range(x.shape[1]):
            state = self.cell(input_tensor=x[:, t], cur_state=state)
        return state


def joint(*sizes):
    return [dialects_torch.JointCell(*pair, (3, 3), True) for pair in pairwise(sizes)]


def peephole(*sizes):
    return [dialects_torch.PeepholeCell(*pair, (3, 5), True) for pair in pairwise(sizes)]


def aserdega(*filters):
    options = {"names": ("Wci", "Wcf", "Wco"), "order": "ifog"}
    return dialects_torch.Stack([dialects_torch.HadamardCell(*pair, (3, 3), shape=(pair[1], *FRAME), **options)
                                 for pair in pairwise([C, *filters])])  # fmt: skip


MODELS = {
    "ndrplz": (lambda: Published(joint(C, 4)), "ndrplz", "sequences"),
    "ndrplz, all layers": (lambda: Published(joint(C, 4, 2), True, True), "ndrplz", "sequences"),
    "kl4805": (lambda: Published(peephole(C, 4, 2), False, True), "kl4805", "sequences"),
    "openstl": (lambda: stack(dialects_torch.OpenSTLCell, [4], [(5, 5)]), "openstl", "sequences"),
    "openstl, normalized": (lambda: stack(dialects_torch.OpenSTLCell, [4, 2], [(3, 3)] * 2, FRAME), "openstl", "seq"),
    "openstl, cell by cell": (CellByCell, "openstl", "step by step"),
    "seyongk": (lambda: dialects_torch.Seyongk(C, 4, (3, 3)), "seyongk", "training mode it computes itself"),
    "seyongk, one way": (lambda: dialects_torch.Seyongk(C, 4, (3, 3), False, False), "seyongk", "itself"),
    "kimuyen": (lambda: dialects_torch.KimUyen(C, 4, (3, 3), FRAME), "kimuyen", "sequences"),
    "kimuyen, one way": (lambda: dialects_torch.KimUyen(C, 4, (3, 5), FRAME, False, False), "kimuyen", "sequences"),
    "aserdega": (lambda: aserdega(4, 4), "aserdega", "sequences"),
    "automan000": (
        lambda: dialects_torch.Numbered([dialects_torch.GatesCell(C, 4, (3, 3), FRAME)]),
        "automan000",
        "seq",
    ),
    "stae": (
        lambda: dialects_torch.Numbered([dialects_torch.GatesCell(C, 4, (3, 3))], listed=True),
        "automan000",
        "seq",
    ),
    "a user's cell": (ByPair, "a ConvLSTM", "sequences"),
    "grus, time first": (lambda: Rolled([GRUCell(C, 4, "gates"), GRUCell(4, 3, "gates")], 0), "a ConvGRU", "sequences"),
    "gru of three convolutions": (lambda: Rolled([GRUCell(C, 4, "each", bias=False)], 1, "steps"), "a ConvGRU", "seq"),
    "gru, x and h apart": (lambda: Rolled([GRUCell(C, C, "apart")], 2, "both"), "a ConvGRU", "sequences"),
    "gru, normalized": (lambda: Rolled([GRUCell(C, 8, "normalized")]), "a ConvGRU", "sequences"),
    "gru in a net": (Net, "a ConvGRU", "step by step"),
    "lstms of eight convolutions": (lambda: Rolled([LSTMCell(C, 4), LSTMCell(4, 2)], 1, "both"), "a ConvLSTM", "seq"),
    "rnn": (lambda: Rolled([RNNCell(C, 4)]), "a", "sequences"),
}


@pytest.fixture(params=MODELS)
def named(request):
    torch.manual_seed(0)
    make, dialect, told = MODELS[request.param]
    return make(), dialect, told


def pulled(model, x, *further):
    """Outputs, and gradients of x and all parameters, of a sum in which every value has a weight of its own."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(True)
    outputs = leaves(model(x, *further))
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()
    return [*outputs, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def drawn(model, dtype=torch.float32):
    x = torch.randn(3, 4, C, *FRAME, dtype=dtype)
    return x.transpose(1, 2) if getattr(model, "time", 1) == 2 else x


def deviation(a, b):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def furthest(some, others):
    return max(deviation(a, b) for a, b in zip(some, others, strict=True))


@pytest.fixture(autouse=True)
def however_small(request, monkeypatch):
    if "small" not in request.node.name:
        monkeypatch.setattr(torch_accelerate, "SMALL", {})


@pytest.fixture
def calls(monkeypatch):
    """How often the operator was called."""
    count = []
    call = torch_ops.Operator.__call__
    monkeypatch.setattr(torch_ops.Operator, "__call__", lambda *args, **o: count.append(1) or call(*args, **o))
    return count


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_the_models_own(named, dtype, training, calls):
    model, dialect, told = named
    model = model.to(dtype).train(training)
    expected = copy.deepcopy(model)
    model, report = accelerate(model, return_report=True)
    assert model.training == training
    assert report.swapped
    assert all(s.startswith(dialect) and told in s for s in report.swapped.values()), report
    x = drawn(model, dtype)
    del calls[:]
    assert furthest(pulled(model, x), pulled(expected, x)) < BOUNDS[dtype]
    assert bool(calls) == (not training or "itself" not in told)
    assert structure(model(x)) == structure(expected(x))
    assert [y.is_contiguous() for y in leaves(model(x))] == [y.is_contiguous() for y in leaves(expected(x))]


@pytest.mark.parametrize("named", ["ndrplz", "openstl", "gru of three convolutions"], indirect=True)
def test_weights_are_arranged_in_squares(named, monkeypatch):
    """By the kernel that copies large ones, as by NumPy; of a GRU a gate's are negated."""
    monkeypatch.setattr(memory, "SMALL_BYTES", -1)
    launched, run = [], threads.run
    monkeypatch.setattr(threads, "run", lambda *arguments: (launched.append(arguments[0]), run(*arguments)))
    model, *_ = named
    expected, x = copy.deepcopy(model), drawn(model)
    accelerate(model)
    del launched[:]
    assert furthest(pulled(model, x), pulled(expected, x)) < BOUNDS[torch.float32]
    assert launched.count(kernels.transpose) >= 4


def test_everything_else_is_as_it_was(named):
    model, *_ = named
    keys, parameters, kind = [*model.state_dict()], [*map(id, model.parameters())], type(model)
    values = [tensor.clone() for tensor in model.state_dict().values()]
    random = torch.get_rng_state()
    assert accelerate(model) is model
    assert torch.equal(torch.get_rng_state(), random)
    assert [*model.state_dict()] == keys
    assert [*map(id, model.parameters())] == parameters
    assert isinstance(model, kind)
    assert all(map(torch.equal, values, model.state_dict().values()))


def test_the_users_own_loop_trains_it(named):
    model, *_ = named
    models = [model, copy.deepcopy(model)]
    accelerate(model)
    x = drawn(model)
    losses = []
    for one in models:
        optimizer = torch.optim.Adam(one.parameters(), 0.02)
        for _ in range(5):
            optimizer.zero_grad()
            loss = sum(y.square().mean() for y in leaves(one(x)))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    # Adam divides by gradients that may be all but zero, and makes a whole step of a rounding there.
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-3)
    assert losses[4] < losses[0]


def test_copies_pickles_and_dtypes(named):
    model, *_ = named
    accelerate(model.eval())
    x = drawn(model)
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(one) is type(model)
        assert all(map(torch.equal, leaves(one(x)), leaves(model(x))))
    wide = copy.deepcopy(model).double()
    assert furthest([y.float() for y in leaves(wide(x.double()))], leaves(model(x))) < 1e-5
    assert {y.dtype for y in leaves(copy.deepcopy(model).bfloat16()(x.bfloat16()))} == {torch.bfloat16}


def test_it_compiles_to_one_graph(named):
    model, *_ = named
    accelerate(model.eval())
    torch.compiler.reset()
    x = drawn(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert furthest(pulled(compiled, x), pulled(model, x)) < 1e-5


def test_gradients_that_the_module_cuts_off_stay_so():
    model = Cut(C, 4, (3, 3)).eval()
    expected = copy.deepcopy(model)
    _, report = accelerate(model, return_report=True)
    assert report.swapped == {"": "seyongk: over whole sequences; for gradients it computes itself"}
    x = torch.randn(2, 4, C, *FRAME)
    assert furthest(pulled(model, x), pulled(expected, x)) == 0
    with torch.no_grad():
        assert furthest(leaves(model(x)), leaves(expected(x))) < 1e-5


def test_further_arguments_are_the_modules_own():
    model = Published(joint(C, 4), batch_first=True)
    accelerate(model)
    x = torch.randn(2, 4, C, *FRAME)
    with pytest.raises(NotImplementedError, match="no states"):
        model(x, hidden_state=[1])
    assert torch.equal(model(input_tensor=x)[0][0], model(x, None)[0][0])


def test_a_gate_order_that_names_do_not_tell_is_found():
    class Other(dialects_torch.JointCell):
        def forward(self, x, h, c):
            return dialects_torch.advance(self.conv(torch.cat([x, h], 1)), c, "gofi")

    model = Published([Other(C, 4, (3, 3), True)])
    expected = copy.deepcopy(model)
    _, report = accelerate(model, return_report=True)
    assert report.swapped
    x = torch.randn(2, 4, C, *FRAME)
    assert furthest(pulled(model, x), pulled(expected, x)) < 1e-5


def test_a_dialect_of_ones_own():
    class Cell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.Wx, self.Wh = torch.nn.Conv2d(C, 16, 3, padding=1), torch.nn.Conv2d(4, 16, 3, padding=1, bias=False)

        def forward(self, x, h, c):
            i, f, g, o = (self.Wx(x) + self.Wh(h)).chunk(4, 1)
            return dialects_torch.advance(torch.cat([i, f + 2, g, o], 1), c)

    model = torch.nn.ModuleDict({"a": Cell()})
    assert accelerate(model, return_report=True)[1].swapped == {}
    own = Dialect("layers.{layer}", split=("Wx", "Wh"), biases="x", forget_bias=2.0)
    assert accelerate(model, dialects=[own], return_report=True)[1].swapped == {"a": "your own: a cell, step by step"}


class Relu(dialects_torch.JointCell):
    def forward(self, x, h, c):
        return tuple(map(torch.relu, super().forward(x, h, c)))


class Dictionary(Published):
    def forward(self, x):
        return {"y": super().forward(x)[0]}


class Shifty(Published):
    def forward(self, x):
        raise RuntimeError("only frames of 64×64\nand more")


def hooked():
    model = Published(joint(C, 4))
    model.cell_list[0].conv.register_forward_hook(lambda *_: None)
    return model


def overridden():
    model = Published(joint(C, 4))
    model.forward = lambda x: x
    return model


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Published([Relu(C, 4, (3, 3), True)]), "not what a ConvLSTM with these weights returns"),
        (lambda: Dictionary(joint(C, 4)), "in a structure that is known"),
        (lambda: Shifty(joint(C, 4)), "RuntimeError: only frames of 64×64"),
        (hooked, "cell_list.0.conv in it has hooks"),
        (overridden, "its forward is not that of its class"),
    ],
)
def test_what_is_not_known_to_agree_is_left(make, told, capsys):
    model = make()
    _, report = accelerate(model, return_report=True)
    assert "" not in report.swapped
    assert told in report.left[""], report
    assert str(report) == capsys.readouterr().out.strip()
    assert not isinstance(model, torch_accelerate.Accelerated)


class WithoutShapes(torch.nn.Module):
    """A cell whose convolution learns its number of channels from the first call."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.LazyConv2d(16, 3, padding=1)

    def forward(self, x, h, c):
        i, f, o, g = self.conv(torch.cat([x, h], 1)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


def test_what_cannot_be_looked_at_is_left_and_the_rest_swapped():
    model = torch.nn.ModuleDict({"lazy": WithoutShapes(), "made": Published(joint(C, 4))})
    _, report = accelerate(model, return_report=True)
    assert [*report.swapped] == ["made"]
    assert "have no shapes yet" in report.left["lazy.conv"]
    frame, state = torch.randn(2, C, *FRAME), torch.randn(2, 4, *FRAME)
    model["lazy"](frame, state, state)
    assert "lazy" in accelerate(model, return_report=True)[1].swapped


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_programs_of_torch_jit():
    cell = WithoutShapes()
    frame, state = torch.randn(2, C, *FRAME), torch.randn(2, 4, *FRAME)
    before = cell(frame, state, state)
    program = torch.jit.trace(cell, (frame, state, state))
    _, report = accelerate(torch.nn.ModuleDict({"a": program, "b": torch.jit.trace(torch.nn.ReLU(), frame)}),
                           return_report=True)  # fmt: skip
    assert [*report.left] == ["a"]
    assert "accelerate what it was made of" in report.left["a"]
    traced = torch.jit.trace(accelerate(cell), (frame, state, state))  # of the module's own operations
    assert "fastclstm" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(frame, state, state), before)


def doubled(conv):
    conv.register_forward_hook(lambda *call: 2 * call[2])
    return conv


@pytest.mark.parametrize(
    "changed",
    [
        doubled,
        lambda conv: torch.nn.utils.parametrizations.weight_norm(conv),
        lambda conv: torch.nn.Sequential(conv, torch.nn.ReLU()),
        lambda conv: torch.nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False),
        lambda conv: torch.nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=2, dilation=2),
    ],
)
def test_what_is_changed_after_the_swap_is_computed_as_it_is_now(changed):
    cell = accelerate(ByPair())
    cell.cell.conv = changed(cell.cell.conv)
    own, frame = copy.deepcopy(cell), torch.randn(2, 3, C, *FRAME)
    own.__class__ = ByPair
    torch.testing.assert_close(cell(frame), own(frame), rtol=0, atol=0)
    accelerate(cell)  # compares anew: swapped or left, the values are these
    torch.testing.assert_close(cell(frame), own(frame), rtol=1e-4, atol=1e-5)


def test_another_call_tells_nothing_where_the_right_one_has_told_why():
    class Shifted(WithoutShapes):
        def forward(self, x, h, c):
            return super().forward(x, h, c + 1)

    cell = Shifted()
    cell(*(torch.randn(2, n, *FRAME) for n in (C, 4, 4)))
    report = accelerate(cell, return_report=True)[1]
    assert "not what a ConvLSTM with these weights returns" in report.left[""]


def test_what_is_on_a_gpu_is_compared_on_the_processor():
    """NumPy, which our side of a comparison is computed by, takes no tensors of a GPU."""
    moved = []

    class Elsewhere(ByPair):
        def to(self, *where):
            moved.append(where)
            return super().to(*where)

    cell = accelerate(Elsewhere())
    assert isinstance(cell, torch_accelerate.Accelerated)
    assert moved == [("cpu", torch.float64)]


def test_several_in_a_model_and_a_second_time():
    model = torch.nn.ModuleDict({"a": Published(joint(C, 4)), "b": CellByCell(), "c": torch.nn.Conv2d(1, 1, 1)})
    names = ["a", "b.cell_list.0", "b.cell_list.1"]
    assert [*accelerate(model, return_report=True)[1].swapped] == names
    _, again = accelerate(model, return_report=True)
    assert [*again.swapped] == names
    assert again.swapped["a"] == "ndrplz: it was before"
    assert type(model["a"]).__mro__.count(torch_accelerate.Accelerated) == 1


def test_replicas_compute_with_their_own_weights():
    model = accelerate(ByPair())
    replica = model._replicate_for_data_parallel()
    replica._modules["cell"] = cell = model.cell._replicate_for_data_parallel()
    cell._modules["conv"] = conv = model.cell.conv._replicate_for_data_parallel()
    for name, parameter in model.cell.conv.named_parameters():
        setattr(conv, name, parameter * 0)
    assert replica(torch.randn(2, 3, C, *FRAME))[0].abs().max().item() == 0


def test_nothing_found_and_no_model(capsys):
    assert str(accelerate(torch.nn.Linear(1, 1), return_report=True)[1]) == str(Report())
    assert "no ConvLSTM or ConvGRU was found" in capsys.readouterr().out
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        accelerate({})


@pytest.mark.extra
def test_the_module_of_conv_lstm_on_pypi():
    conv_lstm = pytest.importorskip("conv_lstm")
    model = conv_lstm.ConvLSTM(C, [4, 2], 3, 2, batch_first=False, return_all_layers=True)
    expected = copy.deepcopy(model)
    _, report = accelerate(model, return_report=True)
    assert report.swapped == {"": "ndrplz: over whole sequences"}
    x = torch.randn(4, 2, C, *FRAME)
    assert furthest(pulled(model, x), pulled(expected, x)) < 1e-5


@pytest.mark.extra
def test_the_model_of_mlcast_on_pypi(calls):
    """Its decoder's ConvGRUs are called with the encoder's states."""
    convgru = pytest.importorskip("mlcast.models.convgru", exc_type=ImportError)
    model = convgru.ConvGruModel(1, 2)
    expected = copy.deepcopy(model)
    _, report = accelerate(model, return_report=True)
    names = [f"{part}.blocks.{n}.convgru" for part in ("encoder", "decoder") for n in range(2)]
    assert report.swapped == dict.fromkeys(names, "mlcast: over whole sequences")
    x = torch.randn(2, 4, 1, 8, 12)
    del calls[:]
    assert furthest(pulled(model, x, 3), pulled(expected, x, 3)) < 1e-5
    assert len(calls) == 4


# States that are given, and modules that remember


@pytest.mark.parametrize("make", [lambda: Rolled([GRUCell(C, 4, "gates"), GRUCell(4, 2, "gates")], 0, "both"),
                                  lambda: Rolled([LSTMCell(C, 4), LSTMCell(4, 2)], 1, "both"),
                                  lambda: Rolled([GRUCell(C, 4, "each")])])  # fmt: skip
def test_states_that_are_given(make, calls):
    model = make()
    expected = copy.deepcopy(model)
    accelerate(model)
    x, filters = torch.randn(3, 4, C, *FRAME), [cell.F for cell in model.layers]
    B, pairs = x.shape[1 - model.time], isinstance(model.layers[0], LSTMCell)
    states = [torch.randn(2 if pairs else 1, B, F, *FRAME, requires_grad=True) for F in filters]
    given = [tuple(one) if pairs else one[0] for one in states]
    del calls[:]
    found = []
    for one in (model, expected):
        found.append(pulled(one, x, given) + [state.grad for state in states])
        for state in states:
            state.grad = None
    assert furthest(*found) < 1e-5
    assert len(calls) == len(filters)
    with torch.no_grad():
        assert furthest(leaves(model(x, hx=given)), leaves(expected(x, given))) < 1e-5


# Kinds of cells and of calls


class Kind(torch.nn.Module):
    """A ConvLSTM cell whose kind its options tell."""

    def __init__(self, F=4, *, pads=False, normalized=False, hidden_first=False, split=False, bias=0.0, g=torch.tanh,
                 out=torch.tanh):  # fmt: skip
        super().__init__()
        self.F, self.hidden_first, self.bias, self.functions = F, hidden_first, bias, (g, out)
        self.pad = torch.nn.ZeroPad2d(1) if pads else torch.nn.Identity()
        size = {"kernel_size": 3, "padding": 0 if pads else 1}
        if split:
            self.of_x, self.of_h = torch.nn.Conv2d(C, 4 * F, **size), torch.nn.Conv2d(F, 4 * F, **size)
        else:
            self.of_both = torch.nn.Conv2d(C + F, 4 * F, **size)
        self.norm = torch.nn.GroupNorm(4, 4 * F) if normalized else torch.nn.Identity()

    def step(self, x, h, c):
        if hasattr(self, "of_x"):
            z = self.of_x(x) + self.of_h(h)
        else:
            z = self.of_both(self.pad(torch.cat([h, x] if self.hidden_first else [x, h], 1)))
        o, i, g, f = self.norm(z).chunk(4, 1)
        c = (f + self.bias).sigmoid() * c + i.sigmoid() * self.functions[0](g)
        return o.sigmoid() * self.functions[1](c), c

    def forward(self, x, state):
        if state is None:
            state = [torch.zeros(len(x), self.F, *x.shape[2:])] * 2
        return self.step(x, *state)


class CellStateFirst(Kind):
    def forward(self, x, c, h):
        return self.step(x, h, c)[::-1]


class StatesBeforeX(Kind):
    def forward(self, state, x):
        return self.step(x, *state)


class HiddenBeforeX(GRUCell):
    """As in RAFT's update: the recurrent argument is the first."""

    def forward(self, h, x):
        both = torch.cat([h, x], 1)
        z, r = self.a(both).sigmoid(), self.c(both).sigmoid()
        return (1 - z) * h + z * self.b(torch.cat([r * h, x], 1)).tanh()


class Unrolled(torch.nn.Module):
    """A layer that makes its zeros, and what it returns, of float32, whatever its weights are."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x, states):
        h, c = states or [torch.zeros(len(x), self.cell.F, *x.shape[3:]) for _ in range(2)]
        outputs = torch.zeros(*x.shape[:2], *h.shape[1:])
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
            outputs[:, t] = h
        return outputs, (h, c)


KINDS = {
    "h before x": (lambda: HiddenBeforeX(C, 4, "each"), "hx"),
    "states before x": (lambda: StatesBeforeX(hidden_first=True), "(hc)x"),
    "c before h": (CellStateFirst, "xch"),
    "no states yet": (lambda: Kind(hidden_first=True), "x-"),
    "padded apart": (lambda: Kind(pads=True), "x(hc)"),
    "sum normalized": (lambda: Kind(split=True, normalized=True), "x(hc)"),
    "forget bias": (lambda: Kind(bias=1.0), "x(hc)"),
    "relu of g alone": (lambda: Kind(g=torch.relu), "x(hc)"),
    "elu": (lambda: Kind(g=torch.nn.functional.elu, out=torch.nn.functional.elu, split=True), "x(hc)"),
    "a layer of float32": (lambda: Unrolled(Kind(split=True)), "s-"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_cells_and_of_calls(kind, calls):
    make, called = KINDS[kind]
    torch.manual_seed(1)
    model, frame = make(), torch.randn(2, C, *FRAME)
    expected = copy.deepcopy(model)
    _, report = accelerate(model, return_report=True)
    assert [*report.swapped] == [""], report
    h, c = torch.randn(2, 2, 4, *FRAME)
    given = {"hx": (h, frame), "(hc)x": ((h, c), frame), "xch": (frame, c, h), "x-": (frame, None),
             "x(hc)": (frame, (h, c)), "s-": (torch.randn(2, 3, C, *FRAME), None)}[called]  # fmt: skip
    del calls[:]
    assert furthest(leaves(model(*given)), leaves(expected(*given))) < 1e-5
    assert len(calls) == 1
    x, *others = given
    if isinstance(x, torch.Tensor):
        assert furthest(pulled(model, x, *others), pulled(expected, x, *others)) < 1e-5


class Clipped(Kind):
    def forward(self, x, state):
        h, c = self.step(x, *state)
        return h, c.clamp(-10, 10)


def test_a_cell_that_clips_is_left():
    _, report = accelerate(Clipped(), return_report=True)
    assert "as if it clipped" in report.left[""]


def test_dropout_that_begins_later_is_done(calls):
    cell = Kind()
    cell.pad = torch.nn.Dropout(0.0)
    states, frame = tuple(torch.randn(2, 2, 4, *FRAME)), torch.randn(2, C, *FRAME)
    accelerate(cell)
    del calls[:]
    cell(frame, states)
    assert len(calls) == 1
    cell.pad.p = 0.5
    cell(frame, states)
    assert len(calls) == 1


def test_what_is_exported_is_not_bound_to_small_calls():
    cell, Dim = accelerate(GRUCell(C, 8, "each")), torch.export.Dim
    sizes = {0: Dim("B"), 2: Dim("H")}
    exported = torch.export.export(cell, (torch.randn(2, C, *FRAME), torch.randn(2, 8, *FRAME)),
                                   dynamic_shapes=(sizes, sizes)).module()  # fmt: skip
    given = torch.randn(3, C, 9, FRAME[1]), torch.randn(3, 8, 9, FRAME[1])
    assert deviation(exported(*given), cell(*given)) < 1e-5


@pytest.mark.parametrize("make", [lambda: Kind(F=8), lambda: GRUCell(C, 8, "each")])
def test_small_steps_are_the_modules_own(make, calls, monkeypatch):
    cell = accelerate(make())
    del calls[:]
    for size, count, called in ((8, 1, 0), (320, 1, 1), (320, 64, 0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        with torch.no_grad():
            cell(torch.randn(2, C, size, size), None)
        states = torch.randn(2, 2, 8, size, size)
        with torch.no_grad():
            cell(torch.randn(2, C, size, size), tuple(states) if isinstance(cell, Kind) else states[0])
        assert bool(calls) == called
        del calls[:]


class ConvLSTMWithPeephole(Kind):
    def __init__(self):
        super().__init__()
        self.peephole = torch.nn.Parameter(torch.zeros(4, 1, 1))


class ConvLSTMWithHead(Kind):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Conv2d(4, 1, 1)


class StridedConvLSTM(Kind):
    def __init__(self):
        super().__init__()
        self.of_both.stride = (2, 2)


@pytest.mark.parametrize(("make", "told"), [(ConvLSTMWithPeephole, "peephole is of no Conv2d"),
                                            (ConvLSTMWithHead, "the cell as a module of its own"),
                                            (StridedConvLSTM, "its convolution of_both has strides")])  # fmt: skip
def test_what_is_called_a_convlstm_and_not_even_tried_is_told_why(make, told):
    report = accelerate(torch.nn.Sequential(make()), return_report=True)[1]
    assert told in report.left["0"]


class Remembering(Rolled):
    """The next call starts where the last one ended."""

    states = None

    def forward(self, x):
        y, self.states = super().forward(x, self.states)
        return y


def test_what_remembers_earlier_calls_is_left():
    model = Remembering([GRUCell(C, 4, "gates")], 1, "both")
    _, report = accelerate(model, return_report=True)
    assert "returns something else when it is called again" in report.left[""]
    assert [*report.swapped] == ["layers.0"]


def test_convolutions_that_are_no_cells_are_not_spoken_of():
    model = torch.nn.Sequential(conv(C, 4), torch.nn.ReLU(), conv(4, 4), torch.nn.Sequential(conv(4, 8), conv(8, 8)))
    assert str(accelerate(model, return_report=True)[1]) == "accelerate: no ConvLSTM or ConvGRU was found"


def test_large_memory_is_used_again_when_nobody_has_it():
    from fastclstm.engines import lending

    def some():
        return lending.lend((lending.LENT_BYTES[0] // 4 + 7, 1), np.dtype(np.float32))

    lending._spare.clear()
    first = some()
    tensor = torch.from_numpy(first)
    place, view = tensor.data_ptr(), tensor.detach()[5:].numpy()
    del first, tensor
    second = some()
    assert second.ctypes.data != place
    del view
    assert some().ctypes.data == place


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (3, 0, 1, 2), (0, 1, 2, 3)])
def test_neighbouring_gates_are_copied_together(order):
    from fastclstm.adapters.torch_cells import Arrangement, _places

    cell = Arrangement("convlstm2d", "", ("a", "b"), ("a", "b"), 2, order)
    places, shapes = _places(cell, (("a.weight", (6, 5, 3, 3)), ("b.weight", (6, 5, 3, 3))))  # two gates each, F = 3
    tensors = [torch.arange(270.0).reshape(6, 5, 3, 3) + 270 * n for n in range(2)]
    gates = torch.cat(tensors).chunk(4)
    whole = torch.cat([gates[gate] for gate in order]).permute(2, 3, 1, 0)
    made = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for place in places:
        made[place.ours][..., place.own] = tensors[place.tensor].numpy()[place.block].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(np.concatenate([made["kernel"], made["recurrent_kernel"]], 2), whole)
    assert len(places) == {(0, 1, 3, 2): 6, (3, 0, 1, 2): 6, (0, 1, 2, 3): 4}[order]


@pytest.mark.parametrize("biases", [("x", "h"), ("h",)])
@pytest.mark.parametrize("both", [False, True])
def test_weights_for_a_compiler_are_those_that_are_copied(monkeypatch, biases, both):
    from fastclstm.adapters import torch_ops
    from fastclstm.adapters.torch_cells import Arrangement

    cell = Arrangement("convgru2d", "", ("x",), ("h",), 2, (2, 0, 1), biases, both, negated=True)
    given = {"x.weight": torch.randn(9, 2, 3, 3), "h.weight": torch.randn(9, 3, 1, 1)}
    given |= {f"{name}.bias": torch.randn(9) for name in biases}
    made = []
    for passing in (True, False):
        monkeypatch.setattr(torch_ops, "passed_by", lambda _, passing=passing: passing)
        tensors = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
        ours = cell._kernels(tensors)
        loss = sum(
            (tensor * torch.linspace(0, 1, tensor.numel()).reshape(tensor.shape)).sum() for tensor in ours.values()
        )
        made.append([*ours.values(), *torch.autograd.grad(loss, [*tensors.values()])])
    torch.testing.assert_close(*made)
    assert made[0][2].shape == ((2, 9) if both else (9,))
