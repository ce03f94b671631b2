"""accelerated modules: models compute what they did, to rounding, and everything else about them is as it was."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from recurrent_modules import (  # noqa: E402
    FRAME,
    MODELS,
    ByPair,
    C,
    GRUCell,
    Kind,
    Published,
    deviation,
    drawn,
    furthest,
    joint,
    leaves,
    pulled,
)  # fmt: skip

from fastclstm.adapters.torch import accelerate  # noqa: E402
from fastclstm.engines.cpu import memory, threads  # noqa: E402
from fastclstm.engines.cpu.kernels import memory as kernels  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("any_size")]
structure = torch.utils._pytree.tree_structure
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(params=MODELS)
def named(request):
    torch.manual_seed(0)
    make, dialect, told = MODELS[request.param]
    return make(), dialect, told


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


def test_attributes_that_are_changed_after_the_swap_count(calls):
    model, x = accelerate(Published(joint(C, 4))), torch.randn(3, 2, C, *FRAME)
    del calls[:]
    with torch.no_grad():
        assert model(x)[0][0].shape == (2, 3, 4, *FRAME)
        model.batch_first = True
        assert model(x)[0][0].shape == (3, 2, 4, *FRAME)
        model.batch_first, model.cell_list[0].filters = False, 5
        with pytest.raises(RuntimeError, match="got 8 channels"):
            model(x)
    assert len(calls) == 1


def test_replicas_compute_with_their_own_weights():
    model = accelerate(ByPair())
    replica = model._replicate_for_data_parallel()
    replica._modules["cell"] = cell = model.cell._replicate_for_data_parallel()
    cell._modules["conv"] = conv = model.cell.conv._replicate_for_data_parallel()
    for name, parameter in model.cell.conv.named_parameters():
        setattr(conv, name, parameter * 0)
    assert replica(torch.randn(2, 3, C, *FRAME))[0].abs().max().item() == 0


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
