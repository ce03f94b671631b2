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
