"""Recurrent modules as users of PyTorch write them, and how far two of them are apart."""

from itertools import pairwise

import dialects_torch
import torch

leaves = torch.utils._pytree.tree_leaves
C, FRAME = 3, (6, 5)


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
