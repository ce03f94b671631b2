"""
Moving digits
=============

The field's first exercise: handwritten digits glide and bounce, and a ConvLSTM foretells the next frame, and from that
the one after it, and so on. It needs ``pip install 'fastclstm[demo,viz]'`` and some 20 seconds; the digits ship with
scikit-learn. ``python -m fastclstm train`` is this with all its options.
"""

# %%
# Films of digits. Those of the test show digits that no film of the training has.

import matplotlib.pyplot as plt

from fastclstm import Conv2D, ConvLSTM2D, Sequential, TimeDistributed, viz
from fastclstm.datasets import moving_digits
from fastclstm.models.roll_out import roll_out
from fastclstm.nn.losses import WeightedSum
from fastclstm.nn.metrics import mse, ssim
from fastclstm.nn.optimizers import Adam
from fastclstm.nn.schedules import CosineDecay

plt.style.use(viz.theme())
GIVEN, STEPS, SIZE = 7, 5, 24
EPOCHS, BATCH = 5, 8
films = moving_digits(800, GIVEN + STEPS, SIZE, digits=1, part="train", seed=0)
test = moving_digits(50, GIVEN + STEPS, SIZE, digits=1, part="test", seed=1)

# %%
# From each frame, and those before it, to the next one. At first the network says what is likely anywhere, 5 % of ink.
# Mean squared error alone makes blurred forecasts; a share of SSIM keeps them sharp.

network = Sequential([
    ConvLSTM2D(1, 16, 5, seed=0),
    TimeDistributed(Conv2D(16, 16, 3, activation="elu", seed=1)),
    TimeDistributed(Conv2D(16, 1, 5, activation="sigmoid", bias_initializer=-3.0, seed=2)),
])  # fmt: skip
rate = CosineDecay(0.005, EPOCHS * len(films) // BATCH, warmup_steps=20)
history = network.fit(films[:, :-1], films[:, 1:], loss=WeightedSum(("mse", "ssim"), (1, 0.1)),
                      optimizer=Adam(rate, clip_norm=1.0), epochs=EPOCHS, batch_size=BATCH, seed=0,
                      quiet=True)  # fmt: skip
print(f"{network.num_parameters:,} parameters, {sum(history['seconds']):.0f} s of training")
print("loss by epoch:", *(f"{loss:.4f}" for loss in history["loss"]))

# %%
# How good it is, frame by frame, on digits that it has never seen; beside it persistence, which repeats the last frame.

made = roll_out(network, test[:, :GIVEN], STEPS)
persistence = test[:, GIVEN - 1 : GIVEN].repeat(STEPS, axis=1)
print("step    MSE: forecast  persistence    SSIM: forecast  persistence")
for step in range(STEPS):
    one = slice(step, step + 1)
    truth = test[:, GIVEN + step : GIVEN + step + 1]
    scores = [score(film[:, one], truth) for score in (mse, ssim) for film in (made, persistence)]
    print("{:4d} {:16.4f} {:12.4f} {:17.3f} {:12.3f}".format(step + 1, *scores))

# %%
# Two films of the test: what was given, what came, what the network made of it, and where it was wrong.

rows = []
for film, forecast in zip(test[:2, ..., 0], made[..., 0], strict=False):
    rows += [
        viz.Row("given, then truth", film, limit=1),
        viz.Row("forecast", forecast, limit=1, first=GIVEN),
        viz.Row("error", forecast - film[GIVEN:], "signed", limit=1, first=GIVEN),
    ]
viz.filmstrip(plt.figure(), rows)
plt.show()
