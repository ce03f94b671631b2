"""accelerate: what it finds in a model, swaps and tells."""

import copy

import pytest

torch = pytest.importorskip("torch")

import dialects_torch  # noqa: E402
from recurrent_modules import FRAME, ByPair, C, CellByCell, Kind, Published, conv, furthest, joint, pulled  # noqa: E402

from fastclstm.adapters.torch import Report, accelerate  # noqa: E402
from fastclstm.adapters.torch_swapped import Accelerated  # noqa: E402
from fastclstm.convert.torch_dialects import Dialect  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("any_size")]


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


class Dictionary(Published):
    def forward(self, x):
        return {"y": super().forward(x)[0], "steps": len(x)}


class Shifty(Published):
    def forward(self, x):
        raise RuntimeError("only frames of 64×64\nand more")


class Relu(dialects_torch.JointCell):
    def forward(self, x, h, c):
        return tuple(map(torch.relu, super().forward(x, h, c)))


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
    assert not isinstance(model, Accelerated)


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
    assert isinstance(cell, Accelerated)
    assert moved == [("cpu", torch.float64)]


def test_several_in_a_model_and_a_second_time():
    model = torch.nn.ModuleDict({"a": Published(joint(C, 4)), "b": CellByCell(), "c": torch.nn.Conv2d(1, 1, 1)})
    names = ["a", "b.cell_list.0", "b.cell_list.1"]
    assert [*accelerate(model, return_report=True)[1].swapped] == names
    _, again = accelerate(model, return_report=True)
    assert [*again.swapped] == names
    assert again.swapped["a"] == "ndrplz: it was before"
    assert type(model["a"]).__mro__.count(Accelerated) == 1


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


class ConvLSTMWithLinear(Kind):
    def __init__(self):
        super().__init__()
        self.squeeze = torch.nn.Linear(4, 4)


class ConvLSTMWithHead(Kind):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Conv2d(4, 1, 1)


class StridedConvLSTM(Kind):
    def __init__(self):
        super().__init__()
        self.of_both.stride = (2, 2)


@pytest.mark.parametrize(("make", "told"), [(ConvLSTMWithLinear, "squeeze.weight is of no Conv2d"),
                                            (ConvLSTMWithHead, "the cell as a module of its own"),
                                            (StridedConvLSTM, "its convolution of_both has strides")])  # fmt: skip
def test_what_is_called_a_convlstm_and_not_even_tried_is_told_why(make, told):
    report = accelerate(torch.nn.Sequential(make()), return_report=True)[1]
    assert told in report.left["0"]


def test_convolutions_that_are_no_cells_are_not_spoken_of():
    model = torch.nn.Sequential(conv(C, 4), torch.nn.ReLU(), conv(4, 4), torch.nn.Sequential(conv(4, 8), conv(8, 8)))
    assert str(accelerate(model, return_report=True)[1]) == "accelerate: no ConvLSTM or ConvGRU was found"
