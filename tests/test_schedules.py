import math
import re

import numpy as np
import pytest

from fastclstm.nn import schedules
from fastclstm.nn.described import describe, restore
from fastclstm.nn.schedules import ConstantSchedule, CosineDecay, ExponentialDecay, OneCycle, PiecewiseConstant

OBJECTS = [
    ConstantSchedule(0.1),
    ExponentialDecay(0.1, 7, 0.5, True),
    CosineDecay(0.1, 20, 0.1, 5, 0.01),
    PiecewiseConstant([3, 10], [0.3, 0.2, 0.1]),
    OneCycle(0.1, 30, 0.25, 0.1, 0.01),
]


@pytest.mark.keras
@pytest.mark.parametrize(
    ("ours", "name", "theirs"),
    [
        (ExponentialDecay(0.1, 7, 0.5), "ExponentialDecay", (0.1, 7, 0.5)),
        (ExponentialDecay(0.1, 7, 0.5, True), "ExponentialDecay", (0.1, 7, 0.5, True)),
        (CosineDecay(0.1, 20, 0.1), "CosineDecay", (0.1, 20, 0.1)),
        (CosineDecay(0.1, 20, 0.1, 5, 0.01), "CosineDecay", (0.01, 20, 0.1, "CosineDecay", 0.1, 5)),
        (PiecewiseConstant([3, 10], [0.3, 0.2, 0.1]), "PiecewiseConstantDecay", ([3, 10], [0.3, 0.2, 0.1])),
    ],
)
def test_against_keras(keras, ours, name, theirs):
    schedule = getattr(keras.optimizers.schedules, name)(*theirs)
    assert [ours(step) for step in range(30)] == pytest.approx([float(schedule(step)) for step in range(30)], rel=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("warmup", [0.25, 0.5, 0.33, 1.0])
def test_one_cycle_against_torch(warmup):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=30, pct_start=warmup, div_factor=10, final_div_factor=1000
    )
    rates = []
    for _ in range(30):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        if len(rates) < 30:
            theirs.step()
    ours = OneCycle(0.1, 30, warmup, 0.1, 1e-4)
    assert [ours(step) for step in range(30)] == pytest.approx(rates, rel=1e-12)
    assert ours(30) == ours(1000) == ours(29)


def test_warmup_of_one_cycle_may_be_missing():
    rates = [OneCycle(0.1, 3, 0, 0.04, 0.2)(step) for step in range(4)]
    assert rates == pytest.approx([0.1, 0.06, 0.02, 0.02])
    assert OneCycle(0.1, 2)(0) == 0.1


def test_cosine_ends_and_stays():
    schedule = CosineDecay(0.2, 10, 0.25, 4)
    assert [schedule(step) for step in (0, 2, 4, 14, 99)] == pytest.approx([0, 0.1, 0.2, 0.05, 0.05])


def test_get():
    for given in OBJECTS:
        assert schedules.get(given) is given
        assert restore(describe(given)) == given
    assert schedules.get(np.float32(0.5)) == ConstantSchedule(0.5)
    assert schedules.get(math.sqrt) is math.sqrt
    for wrong in ("fast", None, math.inf):
        with pytest.raises(TypeError, match=f"must be a finite number or a function of the step, got {wrong!r}"):
            schedules.get(wrong)
    with pytest.raises(ValueError, match="ConstantSchedule: learning_rate must be a finite number >= 0, got -1"):
        schedules.get(-1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExponentialDecay(0.1, 0, 0.5), "ExponentialDecay: decay_steps must be an integer >= 1, got 0"),
        (lambda: ExponentialDecay(0.1, 5, 0), "ExponentialDecay: decay_rate must be a finite number > 0, got 0"),
        (lambda: CosineDecay(0.1, 5, 2), "CosineDecay: alpha must be a finite number >= 0 and <= 1, got 2"),
        (lambda: CosineDecay(0.1, 5, warmup_steps=1.5), "CosineDecay: warmup_steps must be an integer >= 0, got 1.5"),
        (lambda: PiecewiseConstant([5, 5], [1, 2, 3]), "PiecewiseConstant: boundaries must be a sequence of growing"),
        (lambda: PiecewiseConstant(5, [1, 2]), "PiecewiseConstant: boundaries must be a sequence of growing integers"),
        (lambda: PiecewiseConstant([5], [1]), "PiecewiseConstant: values must be 2 numbers >= 0, one more than bound"),
        (lambda: PiecewiseConstant([5], [1, -1]), "PiecewiseConstant: values must be 2 numbers >= 0, one more than"),
        (lambda: OneCycle(0.1, 1), "OneCycle: total_steps must be an integer >= 2, got 1"),
        (lambda: OneCycle(0.1, 9, 2), "OneCycle: warmup must be a finite number >= 0 and <= 1, got 2"),
    ],
)
def test_options_that_are_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
