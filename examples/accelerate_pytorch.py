"""A model of PyTorch before and after `accelerate`: the same numbers, the same training loop, less time.

Conv2d → ConvLSTM (the module that most projects have copied) → ConvTranspose2d learns where a drifting blob will be.
Run it with ``python examples/accelerate_pytorch.py``; it needs PyTorch and less than a minute. With matplotlib it also
draws what the two models learned into accelerate_pytorch.png.
"""

import copy
import statistics
import time

import torch
from torch import nn

from fastclstm.adapters.torch import accelerate

STEPS, ROUNDS = 8, 3


class ConvLSTMCell(nn.Module):
    """The cell as models on the web have it."""

    def __init__(self, inputs, hidden):
        super().__init__()
        self.conv = nn.Conv2d(inputs + hidden, 4 * hidden, 3, padding=1)

    def forward(self, x, state):
        """Take one step."""
        h, c = state
        i, f, o, g = self.conv(torch.cat([x, h], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class ConvLSTM(nn.Module):
    """Layers of cells, which return all that they computed."""

    def __init__(self, inputs, hidden, layers):
        super().__init__()
        self.hidden = hidden
        self.cell_list = nn.ModuleList(ConvLSTMCell(hidden if n else inputs, hidden) for n in range(layers))

    def forward(self, x):
        """Take x (B, T, C, H, W); return each layer's outputs and last state."""
        outputs, states = [], []
        for cell in self.cell_list:
            state = [x.new_zeros(len(x), self.hidden, *x.shape[3:])] * 2
            steps = []
            for t in range(x.shape[1]):
                state = cell(x[:, t], state)
                steps.append(state[0])
            x = torch.stack(steps, 1)
            outputs.append(x)
            states.append(state)
        return outputs, states


class Forecaster(nn.Module):
    """From ten frames (B, 10, 1, 32, 32) to the one after them."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.convlstm = ConvLSTM(16, 32, 2)
        self.decoder = nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1)

    def forward(self, x):
        """Return the next frame (B, 1, 32, 32)."""
        frames = self.encoder(x.flatten(0, 1)).relu().unflatten(0, x.shape[:2])
        outputs, _ = self.convlstm(frames)
        return self.decoder(outputs[-1][:, -1])


def drifting_blobs(count, generator):
    """Draw sequences (count, 11, 1, 32, 32) of a blob that drifts."""
    start, speed = (torch.rand(count, 1, 2, generator=generator) for _ in range(2))
    path = 8 + 16 * start + (2 * speed - 1) * torch.arange(11)[:, None]
    grid = torch.stack(torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij"), -1)
    return (-(path[:, :, None, None] - grid).square().sum(-1) / 8).exp()[:, :, None]


def train(model, batches):
    """Run an ordinary training loop; return the losses."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(batch[:, :10]), batch[:, 10])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def infer(model, batch):
    """Predict without gradients."""
    with torch.no_grad():
        return model(batch[:, :10])


def seconds(calls):
    """Return the median time of each call, the calls taking turns."""
    times = [[] for _ in calls]
    for round_number in range(ROUNDS + 1):
        for call, kept in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if round_number:  # the first one warms up
                kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in times]


def draw(models, batch):
    """Draw the last frame seen, the truth and both predictions."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    names = "last frame seen", "next frame", "PyTorch's prediction", "accelerated"
    frames = [batch[0, 9, 0], batch[0, 10, 0], *(infer(model, batch)[0, 0] for model in models)]
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.8))
    for axis, name, frame in zip(axes, names, frames, strict=True):
        axis.imshow(frame, vmin=0, vmax=1)
        axis.set_title(name)
        axis.axis("off")
    figure.savefig("accelerate_pytorch.png", dpi=100, bbox_inches="tight")
    print("drawn: accelerate_pytorch.png")


def main():
    """Compare a model with itself, accelerated."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    batches = [drifting_blobs(8, generator) for _ in range(STEPS)]
    plain = Forecaster()
    fast = accelerate(copy.deepcopy(plain))
    apart = (infer(plain, batches[0]) - infer(fast, batches[0])).abs().max().item()
    losses = [train(model, batches) for model in (plain, fast)]
    rows = [
        ("inference", *seconds([lambda: infer(plain, batches[0]), lambda: infer(fast, batches[0])])),
        ("training step", *seconds([lambda: train(plain, batches[:1]), lambda: train(fast, batches[:1])])),
    ]
    print(f"\noutputs differ by at most {apart:.1e}; {torch.get_num_threads()} threads, PyTorch {torch.__version__}\n")
    print(f"{'':14} {'PyTorch':>10} {'accelerated':>12} {'factor':>7}")
    for name, before, after in rows:
        print(f"{name:14} {before * 1e3:7.1f} ms {after * 1e3:9.1f} ms {before / after:6.1f}×")
    print(f"{f'loss, {STEPS} steps':14} {losses[0][-1]:10.5f} {losses[1][-1]:12.5f}")
    draw((plain, fast), batches[0])


if __name__ == "__main__":
    main()
