"""Published networks in small, written in PyTorch from their descriptions: what the tests of models rebuild."""

import torch
from torch import nn


def conv(C, F, size, stride=1, bias=True):
    return nn.Conv2d(C, F, size, stride, size // 2, bias=bias)


def framewise(module, x):
    """Apply a module of frames to sequences (B, T, C, H, W)."""
    y = module(x.flatten(0, 1))
    return y.unflatten(0, x.shape[:2])


class LSTM(nn.Module):
    """A convolution over x and h together, GroupNorm of what it makes, gates i, f, g, o: jhhuang96's layer."""

    def __init__(self, C, F, size, groups=None):
        super().__init__()
        self.filters = F
        norm = nn.Identity() if groups is None else nn.GroupNorm(groups, 4 * F)
        self.conv = nn.Sequential(conv(C + F, 4 * F, size), norm)

    def start(self, like, frame):
        return (like.new_zeros(len(like), self.filters, *frame),) * 2

    def step(self, x, state):
        h, c = state
        i, f, g, o = self.conv(torch.cat([x, h], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return h, (h, c)


class GRU(nn.Module):
    """A GRU whose reset gate acts on h before the second convolution; what is new comes with z."""

    def __init__(self, C, F, size, groups=None, activation=torch.tanh):
        super().__init__()
        self.filters, self.activation = F, activation
        norms = [nn.Identity()] * 2 if groups is None else [nn.GroupNorm(2 * groups, 2 * F), nn.GroupNorm(groups, F)]
        self.gates = nn.Sequential(conv(C + F, 2 * F, size), norms[0])
        self.new = nn.Sequential(conv(C + F, F, size), norms[1])

    def start(self, like, frame):
        return (like.new_zeros(len(like), self.filters, *frame),)

    def step(self, x, state):
        (h,) = state
        z, r = self.gates(torch.cat([x, h], 1)).sigmoid().chunk(2, 1)
        h = (1 - z) * h + z * self.activation(self.new(torch.cat([x, r * h], 1)))
        return h, (h,)


class PeepholeLSTM(nn.Module):
    """Shi 2015's layer with a peephole a channel, and perhaps no input: gates i, f, g, o by themselves."""

    def __init__(self, C, F, size):
        super().__init__()
        self.filters = F
        self.x = conv(C, 4 * F, size, bias=False) if C else None
        self.h = conv(F, 4 * F, size)
        self.peepholes = nn.ParameterList(nn.Parameter(torch.randn(F)) for _ in range(3))

    start = LSTM.start

    def step(self, x, state):
        h, c = state
        z = self.h(h) if self.x is None else self.h(h) + self.x(x)
        i, f, g, o = z.chunk(4, 1)
        w_i, w_f, w_o = (w.reshape(-1, 1, 1) for w in self.peepholes)
        c = (f + w_f * c).sigmoid() * c + (i + w_i * c).sigmoid() * g.tanh()
        h = (o + w_o * c).sigmoid() * c.tanh()
        return h, (h, c)


def run(cell, x, state=None):
    """Outputs (B, T, F, H, W) and the last state of a cell over x."""
    state = cell.start(x, x.shape[-2:]) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        h, state = cell.step(x[:, t], state)
        outputs.append(h)
    return torch.stack(outputs, 1), state


class Scales(nn.Module):
    """jhhuang96's encoder and forecaster, of two scales: the deepest cell reads zeros, all others what was enlarged."""

    def __init__(self, cell):
        super().__init__()
        self.down = nn.ModuleList([conv(1, 3, 3), conv(8, 4, 3, 2)])
        self.encoder = nn.ModuleList([cell(3, 8, 3), cell(4, 8, 3)])
        self.forecaster = nn.ModuleList([cell(8, 8, 3), cell(5, 8, 3)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(8, 5, 4, 2, 1), conv(8, 3, 3)])
        self.head = conv(3, 1, 1)

    def forward(self, x, steps):
        slope = nn.functional.leaky_relu
        states = []
        for down, cell in zip(self.down, self.encoder, strict=True):
            x, state = run(cell, slope(framewise(down, x), 0.2))
            states.append(state)
        x = torch.zeros_like(x[:, :1]).expand(-1, steps, -1, -1, -1)
        for up, cell in zip(self.up, self.forecaster, strict=True):
            x, _ = run(cell, x, states.pop())
            x = slope(framewise(up, x), 0.2)
        return framewise(self.head, x)


def patches(x, size):
    """(B, T, C, H, W) with the pixels (i, j) of each block as channels (i · size + j) · C + c."""
    B, T, C, H, W = x.shape
    blocks = x.reshape(B, T, C, H // size, size, W // size, size)
    return blocks.permute(0, 1, 4, 6, 2, 3, 5).reshape(B, T, size * size * C, H // size, W // size)


def unpatched(x, size):
    B, T, C, H, W = x.shape
    blocks = x.reshape(B, T, size, size, C // size**2, H, W)
    return blocks.permute(0, 1, 4, 5, 2, 6, 3).reshape(B, T, C // size**2, H * size, W * size)


class Shi2015(nn.Module):
    """The network for Moving MNIST: patches, three layers, a forecaster without input, a head over all its states."""

    def __init__(self, filters=(4, 3, 2), size=3, patch=2):
        super().__init__()
        self.patch = patch
        channels = (patch**2, *filters)
        self.encoder = nn.ModuleList(PeepholeLSTM(C, F, size) for C, F in zip(channels, filters, strict=False))
        channels = (0, *filters)
        self.forecaster = nn.ModuleList(PeepholeLSTM(C, F, size) for C, F in zip(channels, filters, strict=False))
        self.head = conv(sum(filters), patch**2, 1)

    def forward(self, x, steps):
        x, states = patches(x, self.patch), []
        for cell in self.encoder:
            x, state = run(cell, x)
            states.append(state)
        x, hidden = x.new_zeros(len(x), steps, 0, *x.shape[-2:]), []
        for cell, state in zip(self.forecaster, states, strict=True):
            x, _ = run(cell, x, state)
            hidden.append(x)
        return unpatched(framewise(self.head, torch.cat(hidden, 2)).sigmoid(), self.patch)


class OpenSTL(nn.Module):
    """Cells one on the other, over patches of frames given, then of its own, or of true ones where `forced` says so."""

    def __init__(self, filters=(4, 3), size=3, patch=2):
        super().__init__()
        self.patch = patch
        channels = (patch**2, *filters)
        self.cell_list = nn.ModuleList(LSTM(C, F, size) for C, F in zip(channels, filters, strict=False))
        self.conv_last = conv(filters[-1], patch**2, 1, bias=False)

    def forward(self, x, steps, targets=None, forced=None):
        x = patches(x, self.patch)
        truth = None if targets is None else patches(targets, self.patch)
        states = [cell.start(x, x.shape[-2:]) for cell in self.cell_list]
        made, T = [], x.shape[1]
        for t in range(T + steps - 1):
            y = x[:, t] if t < T else made[-1]
            if t >= T and forced is not None:
                y = torch.where(forced[:, t - T].reshape(-1, 1, 1, 1), truth[:, t - T], y)
            for n, cell in enumerate(self.cell_list):
                y, states[n] = cell.step(y, states[n])
            if t >= T - 1:
                made.append(self.conv_last(y))
        return unpatched(torch.stack(made, 1), self.patch)


class PixelShuffled(nn.Module):
    """DGMR's way up: convolutional GRUs with relu, each twice as large as the one before by PixelShuffle.

    Its input is the same at every step, here learnt; its states come from an encoder.
    """

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.PixelUnshuffle(2), nn.PixelUnshuffle(2)])
        self.encoder = nn.ModuleList([GRU(4, 3, 3, activation=torch.relu), GRU(12, 4, 3, activation=torch.relu)])
        self.value = nn.Parameter(torch.randn(2))
        self.forecaster = nn.ModuleList([GRU(2, 4, 3, activation=torch.relu), GRU(2, 3, 3, activation=torch.relu)])
        self.up = nn.ModuleList(nn.Sequential(conv(F, K, 1), nn.PixelShuffle(2)) for F, K in ((4, 8), (3, 4)))

    def forward(self, x, steps):
        states = []
        for down, cell in zip(self.down, self.encoder, strict=True):
            x, state = run(cell, framewise(down, x))
            states.append(state)
        x = self.value.reshape(1, 1, 2, 1, 1).expand(len(x), steps, 2, *x.shape[-2:])
        for up, cell in zip(self.up, self.forecaster, strict=True):
            x, _ = run(cell, x, states.pop())
            x = framewise(up, x)
        return x


class Autoencoder(nn.Module):
    """Of a film's frames, for what is not as usual: smaller in space, over time, as large again."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([conv(1, 4, 3, 2), conv(4, 3, 3, 2)])
        self.cells = nn.ModuleList([LSTM(3, 4, 3), LSTM(4, 3, 3)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), nn.ConvTranspose2d(4, 1, 3, 2, 1, 1)])

    def forward(self, x):
        for down in self.down:
            x = framewise(down, x).tanh()
        for cell in self.cells:
            x, _ = run(cell, x)
        x = framewise(self.up[0], x).tanh()
        return framewise(self.up[1], x).sigmoid()


class Bidirectional(nn.Module):
    """The last outputs of two cells, one for either direction, side by side."""

    def __init__(self, C, F):
        super().__init__()
        self.cells = nn.ModuleList([LSTM(C, F, 3), LSTM(C, F, 3)])

    def forward(self, x):
        return torch.cat([run(cell, way)[0][:, -1] for cell, way in zip(self.cells, (x, x.flip(1)), strict=True)], 1)


class BCDUNet(nn.Module):
    """A U-Net whose bottleneck and skips are ConvLSTMs in both directions, over two maps that follow one another."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = conv(1, 4, 3), conv(4, 6, 3), conv(6, 6, 3)
        self.bottleneck = Bidirectional(6, 3)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2)
        self.skip = Bidirectional(4, 2)
        self.head = conv(4, 1, 1)

    def forward(self, x):
        a = self.first(x).tanh()
        b = self.second(nn.functional.max_pool2d(a, 2)).tanh()
        c = self.bottleneck(torch.stack([b, self.third(b).tanh()], 1))
        return self.head(self.skip(torch.stack([a, self.up(c)], 1))).sigmoid()
