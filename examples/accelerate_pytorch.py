"""
A PyTorch model accelerated in place
====================================

Before and after ``accelerate``: the same parameters, the same training loop, the same numbers, less time. Conv2d →
ConvLSTM (the module that most projects have copied) → ConvTranspose2d learns where a drifting blob will be. It needs
``pip install 'fastclstm[torch,viz]'`` and half a minute.
"""

# %%
# A ConvLSTM as models on the web have it, and a network around it. Nothing in it is ours.

import copy
import statistics
import time

import matplotlib.pyplot as plt
import torch
from torch import nn

from fastclstm import viz
from fastclstm.adapters.torch import accelerate

plt.style.use(viz.theme())
STEPS, ROUNDS = 30, 3


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


# %%
# An ordinary training loop.


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


# %%
# One line. It finds the ConvLSTM, compares, swaps, and prints what it did.

torch.manual_seed(0)
generator = torch.Generator().manual_seed(1)
batches = [drifting_blobs(8, generator) for _ in range(STEPS)]
plain = Forecaster()
fast = accelerate(copy.deepcopy(plain))

# %%
# The same outputs, the same losses, step by step.

apart = (infer(plain, batches[0]) - infer(fast, batches[0])).abs().max().item()
losses = [train(model, batches) for model in (plain, fast)]
print(f"outputs differ by at most {apart:.1e} before training")

# %%
# And the times, the two taking turns.


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


batch = batches[0]
trained = [copy.deepcopy(model) for model in (plain, fast)]
rows = [
    ("inference", *seconds([lambda: infer(plain, batch), lambda: infer(fast, batch)])),
    ("training step", *seconds([lambda: train(plain, [batch]), lambda: train(fast, [batch])])),
]
print(f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}\n")
print(f"{'':14} {'PyTorch':>10} {'accelerated':>12} {'factor':>7}")
for name, before, after in rows:
    print(f"{name:14} {before * 1e3:7.1f} ms {after * 1e3:9.1f} ms {before / after:6.1f}×")
print(f"{f'loss, {STEPS} steps':14} {losses[0][-1]:10.5f} {losses[1][-1]:12.5f}")

# %%
# Both learn the same, one of them faster.

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), width_ratios=(3, 2))
left.plot(losses[0], color="C1", linewidth=5, alpha=0.45, label="PyTorch")
left.plot(losses[1], color="C0", label="accelerated")
left.set(title="loss", xlabel="step", ylabel="MSE", yscale="log")
left.legend()
for place, (_, before, after) in enumerate(rows):
    right.barh(place - 0.2, before * 1e3, 0.36, color="C1")
    right.barh(place + 0.2, after * 1e3, 0.36, color="C0")
    right.text(after * 1e3, place + 0.2, f"  {before / after:.1f}× as fast", va="center")
right.set(title="time", xlabel="ms", yticks=range(len(rows)), yticklabels=[name for name, *_ in rows])
right.grid(visible=False, axis="y")
right.invert_yaxis()

# %%
# Six films of their own: the last frame that the models were given, the one that came, and what the two made of it.

films = drifting_blobs(6, generator)
made = [infer(model, films)[:, 0].numpy() for model in trained]
viz.filmstrip(plt.figure(), [
    viz.Row("last seen", films[:, 9, 0].numpy(), limit=1), viz.Row("the next", films[:, 10, 0].numpy(), limit=1),
    viz.Row("PyTorch", made[0], limit=1), viz.Row("accelerated", made[1], limit=1),
    viz.Row("difference", 1e6 * (made[1] - made[0]), "signed", unit="millionths"),
], [f"film {n}" for n in range(1, 7)], width=7)  # fmt: skip
plt.show()
