"""accelerate: models compute what they did, to rounding, and everything else about them is as it was."""

import copy
import os
import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import dialects_torch  # noqa: E402

from fastclstm.adapters import torch_accelerate, torch_ops  # noqa: E402
from fastclstm.adapters.torch import Report, accelerate  # noqa: E402
from fastclstm.convert.torch_dialects import Dialect  # noqa: E402

ROOT = Path(torch_ops.__file__).parents[2]
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
    "a user's cell": (ByPair, "ndrplz", "step by step"),
}


@pytest.fixture(params=MODELS)
def named(request):
    torch.manual_seed(0)
    make, dialect, told = MODELS[request.param]
    return make(), dialect, told


def pulled(model, x):
    """Outputs, and gradients of x and all parameters, of a sum in which every value has a weight of its own."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(True)
    outputs = leaves(model(x))
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()
    return [*outputs, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def deviation(a, b):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def furthest(some, others):
    return max(deviation(a, b) for a, b in zip(some, others, strict=True))


@pytest.fixture
def calls(monkeypatch):
    """How often the operator was called."""
    count = []
    run = torch_ops.run
    monkeypatch.setattr(torch_ops, "run", lambda *args, **kwargs: count.append(1) or run(*args, **kwargs))
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
    x = torch.randn(3, 4, C, *FRAME, dtype=dtype)
    del calls[:]
    assert furthest(pulled(model, x), pulled(expected, x)) < BOUNDS[dtype]
    assert bool(calls) == (not training or "itself" not in told)
    assert structure(model(x)) == structure(expected(x))
    assert [y.is_contiguous() for y in leaves(model(x))] == [y.is_contiguous() for y in leaves(expected(x))]


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
    x = torch.randn(3, 4, C, *FRAME)
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
    x = torch.randn(3, 4, C, *FRAME)
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
    x = torch.randn(3, 4, C, *FRAME)
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
            return dialects_torch.advance(self.Wx(x) + self.Wh(h), c)

    model = torch.nn.ModuleDict({"a": Cell()})
    assert accelerate(model, return_report=True)[1].swapped == {}
    own = Dialect("layers.{layer}", split=("Wx", "Wh"), biases="x")
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
    assert "no ConvLSTM of a known dialect was found" in capsys.readouterr().out
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        accelerate({})


@pytest.mark.slow
def test_the_example_runs_and_ends_in_a_table(tmp_path):
    example = ROOT / "examples" / "accelerate_pytorch.py"
    done = subprocess.run([sys.executable, example], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert "convlstm  swapped  ndrplz: over whole sequences" in done.stdout, done.stderr
    loss = next(line for line in done.stdout.splitlines() if line.startswith("loss, "))
    before, after = map(float, loss.split()[-2:])
    assert before == pytest.approx(after, rel=1e-2)


@pytest.mark.extra
def test_the_module_of_conv_lstm_on_pypi():
    conv_lstm = pytest.importorskip("conv_lstm")
    model = conv_lstm.ConvLSTM(C, [4, 2], 3, 2, batch_first=False, return_all_layers=True)
    expected = copy.deepcopy(model)
    _, report = accelerate(model, return_report=True)
    assert report.swapped == {"": "ndrplz: over whole sequences"}
    x = torch.randn(4, 2, C, *FRAME)
    assert furthest(pulled(model, x), pulled(expected, x)) < 1e-5
