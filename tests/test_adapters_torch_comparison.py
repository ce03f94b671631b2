"""What modules are compared with, how they may be called, and what they are not."""

import copy

import pytest

torch = pytest.importorskip("torch")

import dialects_torch  # noqa: E402
from recurrent_modules import FRAME, C, GRUCell, Kind, LSTMCell, Published, Rolled, furthest, joint, leaves, pulled  # noqa: E402

from fastclstm.adapters.torch import accelerate  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("any_size")]


class Cut(dialects_torch.Seyongk):
    """As published: gradients do not flow through the outputs."""

    def forward(self, x):
        output, states = super().forward(x)
        return output.detach(), states


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


def test_many_products_do_not_make_roundings_grow():
    """A long sequence of large sums differed by more than roundings: the cell alone was swapped."""
    _, report = accelerate(Published([dialects_torch.JointCell(16, 128, (5, 5), True)]), return_report=True)
    assert report.swapped == {"": "ndrplz: over whole sequences"}


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


class Peeping(Kind):
    """Its weights of c have no names that are known, and are those of all gates in one if they have no frame."""

    def __init__(self, *frame):
        super().__init__(hidden_first=True)
        if frame:
            self.forgets, self.lets, self.shows = (torch.nn.Parameter(torch.randn(1, 4, *frame)) for _ in range(3))
        else:
            self.all = torch.nn.Parameter(torch.randn(12, 1, 1))

    def step(self, x, h, c):
        of_f, of_i, of_o = self.all.chunk(3) if hasattr(self, "all") else (self.forgets, self.lets, self.shows)
        f, o, i, g = self.of_both(torch.cat([h, x], 1)).chunk(4, 1)
        c = (f + of_f * c).sigmoid() * c + (i + of_i * c).sigmoid() * g.tanh()
        return (o + of_o * c).sigmoid() * c.tanh(), c


class Learning(Kind):
    """It learns the states from which it starts."""

    def __init__(self):
        super().__init__(split=True)
        self.start = torch.nn.Parameter(torch.randn(2, 1, 4, *FRAME))

    def forward(self, x, state=None):
        return self.step(x, *(self.start.expand(2, len(x), 4, *FRAME) if state is None else state))


class Nested(torch.nn.Module):
    """Frames and what it returns have the channels last."""

    def __init__(self):
        super().__init__()
        self.cell = Kind(split=True)

    def forward(self, clip):
        state, outputs = None, []
        for frame in clip.movedim(-1, 2).unbind(1):
            state = self.cell(frame, state)
            outputs.append(state[0])
        y = torch.stack(outputs, 1)
        return {"all": y.movedim(2, -1).contiguous(), "frames": y.flatten(0, 1), "states": [state]}


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
    "peepholes of each pixel": (lambda: Peeping(*FRAME), "x(hc)"),
    "peepholes of each channel": (Peeping, "x(hc)"),
    "learnt states": (Learning, "x(hc)"),
    "channels last": (Nested, "t"),
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
             "x(hc)": (frame, (h, c)), "s-": (torch.randn(2, 3, C, *FRAME), None),
             "t": (torch.randn(2, 3, *FRAME, C),)}[called]  # fmt: skip
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


class Layer(torch.nn.Module):
    """Of a cell over sequences; what it does beside that is told by a name."""

    def __init__(self, beside):
        super().__init__()
        self.cell, self.beside, self.whole, self.cell.shift = Kind(), beside, True, 0.0

    def forward(self, x):
        x = {"fills": lambda: x.nan_to_num(), "scales": lambda: x / 2 if x.min() >= 0 else x,
             "window": lambda: x[:, -10:]}.get(self.beside, lambda: x)()  # fmt: skip
        outputs, state = [], None
        for t, frame in enumerate(x.unbind(1)):
            if self.beside == "cuts" and t == 10:
                state = [part.detach() for part in state]
            if self.beside != "skips" or t == 0 or frame.abs().sum((1, 2, 3)).min() > 0:
                state = self.cell(frame + self.cell.shift, state)
            outputs.append(state[0])
        y = torch.stack(outputs, 1) if self.whole else outputs[-1]
        if self.beside == "keeps":
            self.state = state
        if self.beside == "clips" and y.requires_grad:
            y.register_hook(lambda dy: dy.clamp(-9, 9))
        return y.squeeze(1) if self.beside == "squeezes" else y


class Late(Peeping):
    """A published error: the last gate sees the cell state as it was."""

    def step(self, x, h, c):
        f, o, i, g = self.of_both(torch.cat([h, x], 1)).chunk(4, 1)
        before, (of_f, of_i, of_o) = c, self.all.chunk(3)
        c = (f + of_f * c).sigmoid() * c + (i + of_i * c).sigmoid() * g.tanh()
        return (o + of_o * before).sigmoid() * c.tanh(), c


def test_a_peephole_of_another_cell_state_is_left():
    assert not accelerate(Late(), return_report=True)[1].swapped


@pytest.mark.parametrize(("beside", "told"), [
    ("fills", "where frames have NaN"), ("scales", "where frames are zero or positive"),
    ("skips", "where frames are zero or positive"), ("window", "have other sizes"), ("squeezes", "have other sizes"),
    ("keeps", "keeps what it has computed in its attribute state"),
])  # fmt: skip
def test_what_first_agrees_and_is_something_else_is_left(beside, told):
    _, report = accelerate(Layer(beside), return_report=True)
    assert [*report.swapped] == ["cell"]
    assert told in report.left[""]


@pytest.mark.parametrize("beside", ["cuts", "clips"])
def test_gradients_that_are_cut_later_or_where_they_are_large_stay_so(beside):
    _, report = accelerate(Layer(beside), return_report=True)
    assert report.swapped[""].endswith("for gradients it computes itself")
