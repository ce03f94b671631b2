"""PyTorch formulations of the published modules, for tests: names of weights and semantics as in SEMANTICS.md, §5."""

import torch
from torch import nn


def conv(inputs, outputs, kernel_size, bias):
    return nn.Conv2d(inputs, outputs, kernel_size, padding=tuple(k // 2 for k in kernel_size), bias=bias)


def advance(z, c, order="ifgo"):
    """(h, c) from the pre-activations of all gates."""
    gate = dict(zip(order, z.chunk(4, 1), strict=True))
    c = gate["f"].sigmoid() * c + gate["i"].sigmoid() * gate["g"].tanh()
    return gate["o"].sigmoid() * c.tanh(), c


def unroll(cell, x, state=None):
    """Outputs (B, T, F, H, W) and the last (h, c) of a cell over x (B, T, C, H, W)."""
    B, T, _, H, W = x.shape
    h, c = state or (x.new_zeros(B, cell.filters, H, W),) * 2
    outputs = []
    for t in range(T):
        h, c = cell(x[:, t], h, c)
        outputs.append(h)
    return torch.stack(outputs, 1), (h, c)


class Stack(nn.Module):
    def __init__(self, cells):
        super().__init__()
        self.cell_list = nn.ModuleList(cells)

    def forward(self, x):
        states = []
        for cell in self.cell_list:
            x, state = unroll(cell, x)
            states.append(state)
        return x, states


class JointCell(nn.Module):
    def __init__(self, C, F, kernel_size, bias):
        super().__init__()
        self.filters = F
        self.conv = conv(C + F, 4 * F, kernel_size, bias)

    def forward(self, x, h, c):
        return advance(self.conv(torch.cat([x, h], 1)), c, "ifog")


class PeepholeCell(JointCell):
    def __init__(self, C, F, kernel_size, bias):
        super().__init__(C, F, kernel_size, bias)
        self.conv_c = conv(F, 2 * F, kernel_size, bias)
        self.conv_cnext = conv(F, F, kernel_size, bias)

    def forward(self, x, h, c):
        i, f, o, g = self.conv(torch.cat([x, h], 1)).chunk(4, 1)
        p_i, p_f = self.conv_c(c).chunk(2, 1)
        c = (f + p_f).sigmoid() * c + (i + p_i).sigmoid() * g.tanh()
        return (o + self.conv_cnext(c)).sigmoid() * c.tanh(), c


class OpenSTLCell(nn.Module):
    def __init__(self, C, F, kernel_size, frame=None):
        super().__init__()
        self.filters = F

        def branch(inputs, outputs):
            norms = [] if frame is None else [nn.LayerNorm([outputs, *frame])]
            return nn.Sequential(conv(inputs, outputs, kernel_size, False), *norms)

        self.conv_x, self.conv_h = branch(C, 4 * F), branch(F, 4 * F)
        self.conv_o = branch(2 * F, F)  # never used
        self.conv_last = nn.Conv2d(2 * F, F, 1, bias=False)  # never used

    def forward(self, x, h, c):
        return advance(self.conv_x(x) + self.conv_h(h), c)


class BatchNormGate(nn.Module):
    def __init__(self, C, F, kernel_size, bias):
        super().__init__()
        self.conv_x, self.conv_h = conv(C, 4 * F, kernel_size, bias), conv(F, 4 * F, kernel_size, bias)
        self.bn2d = nn.BatchNorm2d(4 * F)

    def forward(self, x, h):
        return self.bn2d(self.conv_x(x) + self.conv_h(h))


class BatchNormCell(nn.Module):
    def __init__(self, C, F, kernel_size, bias):
        super().__init__()
        self.filters = F
        self.gates = nn.ModuleList([BatchNormGate(C, F, kernel_size, bias)])

    def forward(self, x, h, c):
        return advance(self.gates[0](x, h), c)


class Seyongk(nn.Module):
    """Returns what the published module returns, and with `right` what ours does by default."""

    def __init__(self, C, F, kernel_size, bias=True, bidirectional=True):
        super().__init__()
        cells = [BatchNormCell(C, F, kernel_size, bias) for _ in range(1 + bidirectional)]
        self.conv_lstm_cells = nn.ModuleList(cells)
        self.register_buffer("hidden_state", torch.zeros(1, F, 3, 3))
        self.register_buffer("cell_state", torch.zeros(1, F, 3, 3))

    def forward(self, x, right=False):
        output, state = unroll(self.conv_lstm_cells[0], x)
        if len(self.conv_lstm_cells) == 1:
            return output, [state]
        backward, backward_state = unroll(self.conv_lstm_cells[1], x.flip(1))
        if right:
            return torch.cat([output, backward.flip(1)], 2), [state, backward_state]
        sides = (torch.cat(pair, -1) for pair in zip(state, backward_state, strict=True))
        return torch.cat([output, backward], 2), tuple(sides)


class KimUyenCell(nn.Module):
    def __init__(self, C, F, kernel_size, bias, frame):
        super().__init__()
        self.filters = F
        self.input_conv, self.rnn_conv = conv(C, 4 * F, kernel_size, bias), conv(F, 4 * F, kernel_size, bias)
        self.layer_norm_x, self.layer_norm_h = nn.LayerNorm([4 * F, *frame]), nn.LayerNorm([4 * F, *frame])
        self.layer_norm_cnext = nn.LayerNorm([F, *frame])

    def forward(self, x, h, c):
        return advance(self.input_conv(x) + self.rnn_conv(h), c)


class KimUyen(nn.Module):
    def __init__(self, C, F, kernel_size, frame, bias=True, bidirectional=True):
        super().__init__()
        self.cell_fw = KimUyenCell(C, F, kernel_size, bias, frame)
        if bidirectional:
            self.cell_bw = KimUyenCell(C, F, kernel_size, bias, frame)

    def forward(self, x):
        output, state = unroll(self.cell_fw, x)
        if not hasattr(self, "cell_bw"):
            return output, [state]
        backward, backward_state = unroll(self.cell_bw, x.flip(1))
        return torch.cat([output, backward.flip(1)], 2), [state, backward_state]


# Cells that stand alone, or each in a module of its own


class Hadamard(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, c):
        return self.weight * c


class HadamardCell(nn.Module):
    """One convolution of x and h and, with names, peepholes of the shape (F, H, W) or (1, F, H, W)."""

    def __init__(self, C, F, kernel_size, *, conv_name="conv", names=(), shape=(), order="ifgo", modules=False,
                 activation=torch.tanh):  # fmt: skip
        super().__init__()
        self.filters, self.conv_name, self.names, self.order = F, conv_name, names, order
        self.activation = activation
        setattr(self, conv_name, conv(C + F, 4 * F, kernel_size, True))
        for name in names:
            setattr(self, name, Hadamard(*shape) if modules else nn.Parameter(torch.zeros(shape)))

    def seen(self, gate, c):
        """What a gate sees of a cell state."""
        if not self.names:
            return 0
        weight = getattr(self, self.names["ifo".index(gate)])
        return weight(c) if isinstance(weight, Hadamard) else weight * c

    def forward(self, x, h, c):
        z = getattr(self, self.conv_name)(torch.cat([x, h], 1))
        z = dict(zip(self.order, z.chunk(4, 1), strict=True))
        i, f = ((z[gate] + self.seen(gate, c)).sigmoid() for gate in "if")
        c = f * c + i * self.activation(z["g"])
        return (z["o"] + self.seen("o", c)).sigmoid() * self.activation(c), c


class Alone(nn.Module):
    """A module whose one cell has a name, or that is a cell; `forward` unrolls it."""

    def __init__(self, cell, name):
        super().__init__()
        self.name = name
        setattr(self, name, cell)

    def forward(self, x):
        y, state = unroll(getattr(self, self.name), x)
        return y, [state]


class Unrolled:
    """A cell's class that is called with a whole sequence."""

    def forward(self, x):
        y, state = unroll(self.step, x)
        return y, [state]


class HzzoneLayer(Unrolled, HadamardCell):
    def __init__(self, C, F, kernel_size, frame=None):
        names = () if frame is None else ("Wci", "Wcf", "Wco")
        super().__init__(C, F, kernel_size, conv_name="_conv", names=names, shape=(1, F, *(frame or ())))

    @property
    def step(self):
        return Step(self, HadamardCell.forward)


class Step:
    """What `unroll` takes, of a module whose forward is that of sequences."""

    def __init__(self, module, forward):
        self.filters, self.module, self.function = module.filters, module, forward

    def __call__(self, *arguments):
        return self.function(self.module, *arguments)


class NormalizedLayer(Unrolled, nn.Module):
    """One convolution of x and h, its result normalized: jhhuang96 and czifan."""

    def __init__(self, C, F, kernel_size, norm, bias=True, activation=torch.tanh):
        super().__init__()
        self.filters, self.activation = F, activation
        self.conv = nn.Sequential(conv(C + F, 4 * F, kernel_size, bias), norm)

    def one_step(self, x, h, c):
        i, f, g, o = self.conv(torch.cat([x, h], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * self.activation(g)
        return o.sigmoid() * c.tanh(), c

    @property
    def step(self):
        return Step(self, NormalizedLayer.one_step)


def jhhuang96(C, F, kernel_size):
    return NormalizedLayer(C, F, kernel_size, nn.GroupNorm(4 * F // 32, 4 * F))


def czifan(C, F, kernel_size):
    return NormalizedLayer(C, F, kernel_size, nn.BatchNorm2d(4 * F), bias=False, activation=lambda g: g)


class TimeFirst(NormalizedLayer):
    """jhhuang96's layer as it is called: (T, B, …), the states, the number of steps."""

    def forward(self, inputs=None, hidden_state=None, seq_len=10):
        assert len(inputs) == seq_len
        y, state = unroll(self.step, inputs.transpose(0, 1), hidden_state)
        return y.transpose(0, 1), state


class ChannelsBeforeTime(Alone):
    """sladewinter's module as it is called: (B, C, T, H, W)."""

    def forward(self, X):
        return super().forward(X.transpose(1, 2))[0].transpose(1, 2)


class PlainLayer(Unrolled, HadamardCell):
    """A module that is a cell with nothing but its convolution."""

    @property
    def step(self):
        return Step(self, HadamardCell.forward)


class SpikingLayer(PlainLayer):
    """snnTorch's: c and h are called syn and mem; mem is compared with, before spikes are made of it."""

    def __init__(self, C, F, kernel_size):
        super().__init__(C, F, kernel_size, order="ifog")
        self.register_buffer("threshold", torch.tensor(1.0))
        self.register_buffer("graded_spikes_factor", torch.tensor(1.0))
        self.register_buffer("reset_mechanism_val", torch.tensor(2))


class SpikingCell(SpikingLayer):
    """The same as it is called, step by step."""

    def forward(self, x, syn, mem):
        mem, syn = HadamardCell.forward(self, x, mem, syn)
        return (mem > self.threshold).to(mem) * self.graded_spikes_factor, syn, mem


class PairCell(HadamardCell):
    """holmdk's cell as it is called, its states a pair."""

    def forward(self, input_tensor, cur_state):
        return super().forward(input_tensor, *cur_state)


class GatesCell(nn.Module):
    """A convolution a gate, of x with biases and of h without; automan000's."""

    def __init__(self, C, F, kernel_size, frame=None):
        super().__init__()
        self.filters = F
        for gate in "ifco":
            setattr(self, f"Wx{gate}", conv(C, F, kernel_size, True))
            setattr(self, f"Wh{gate}", conv(F, F, kernel_size, False))
        for gate in "ifo":
            weight = None if frame is None else nn.Parameter(torch.zeros(1, F, *frame))
            self.register_parameter(f"Wc{gate}", weight)

    def forward(self, x, h, c):
        z = {g: getattr(self, f"Wx{g}")(x) + getattr(self, f"Wh{g}")(h) for g in "ifco"}
        i, f = ((z[g] + (0 if self.Wci is None else getattr(self, f"Wc{g}") * c)).sigmoid() for g in "if")
        c = f * c + i * z["c"].tanh()
        return (z["o"] + (0 if self.Wco is None else self.Wco * c)).sigmoid() * c.tanh(), c


class Numbered(nn.Module):
    """automan000's stack; `listed` as STAE's, which has every weight under two names."""

    def __init__(self, cells, listed=False):
        super().__init__()
        if listed:
            self._all_layers = nn.ModuleList(cells)
        for number, cell in enumerate(cells):
            setattr(self, f"cell{number}", cell)
        self.count = len(cells)

    def forward(self, x):
        states = []
        for number in range(self.count):
            x, state = unroll(getattr(self, f"cell{number}"), x)
            states.append(state)
        return x, states


class SplitLayer(Unrolled, nn.Module):
    """A convolution of x and one of h, the gates in any order."""

    def __init__(self, C, F, kernel_size, order):
        super().__init__()
        self.filters, self.order = F, order
        self.conv_x, self.conv_h = conv(C, 4 * F, kernel_size, True), conv(F, 4 * F, kernel_size, True)

    def one_step(self, x, h, c):
        return advance(self.conv_x(x) + self.conv_h(h), c, self.order)

    @property
    def step(self):
        return Step(self, SplitLayer.one_step)
