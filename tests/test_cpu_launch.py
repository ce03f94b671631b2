"""The choice of algorithm, and what a call does with its plan."""

from contextlib import nullcontext

import numpy as np
import pytest

from fastclstm import functional
from fastclstm.engines.cpu import launch
from fastclstm.engines.cpu.kernels import schedule
from fastclstm.spec import ConvSpec


def choose(algorithm, B=1, H=64, W=64, C=64, F=256, K=3, **options):
    return launch.choose("conv2d", (ConvSpec.infer((B, H, W, C), (K, K, C, F), **options),), algorithm, 4)


def test_direct_is_always_to_be_had():
    assert choose("direct") == 0


@pytest.mark.parametrize(
    "options", [{"strides": 2}, {"dilation": 2}, {"K": 4}, {"K": 1}, {"H": 1, "W": 1}], ids=lambda options: str(options)
)
def test_auto_is_direct_where_tiles_do_not_fit_or_do_not_pay(options):
    assert choose("auto", **options) == 0


@pytest.mark.parametrize("K", [3, 5])
def test_auto_takes_large_tiles_on_large_frames_and_small_ones_on_small(K):
    assert choose("auto", K=K) == 4
    assert choose("auto", H=4, W=4, K=K) == 2


def test_auto_weighs_the_batch_but_winograd_does_not():
    assert choose("auto", B=1, H=4, W=4) == 2
    assert choose("auto", B=16, H=4, W=4) == 4
    assert choose("winograd", B=16, H=4, W=4) == choose("winograd", B=1, H=4, W=4)


@pytest.mark.parametrize("options", [{"strides": 2}, {"dilation": (1, 2)}, {"K": 7}])
def test_winograd_in_vain_is_an_error(options):
    with pytest.raises(ValueError, match=r"conv2d: algorithm='winograd' needs square kernels of 3 or 5.*use 'auto'"):
        choose("winograd", **options)


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_a_hidden_state_of_zeros_is_the_same_given_or_not(algorithm):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 3, 9, 10, 17), np.float32), rng.standard_normal((3, 3, 17, 80), np.float32)
    recurrent_kernel, zeros = rng.standard_normal((3, 3, 20, 80), np.float32), np.zeros((2, 9, 10, 20), np.float32)
    result, given = (
        functional.convlstm2d(x, kernel, recurrent_kernel, initial_state=state, algorithm=algorithm)
        for state in (None, (zeros, zeros))
    )
    np.testing.assert_array_equal(result, given)


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_one_image_keeps_every_worker_busy(algorithm, monkeypatch):
    flows = []
    plan = launch.plan

    def watched(*arguments):
        return plan(*arguments)._replace(kernels=(None, lambda *given: flows.append(given[1].copy())))

    monkeypatch.setattr(launch.threads, "usable_threads", lambda: 2)
    monkeypatch.setattr(launch.threads, "team", lambda count: nullcontext())  # the machine may have one processor
    monkeypatch.setattr(launch, "plan", watched)
    functional.conv2d(np.ones((1, 64, 64, 8), np.float32), np.ones((3, 3, 8, 64), np.float32), algorithm=algorithm)
    (record,) = flows[0].view(np.recarray)
    shares = [schedule.share.py_func(record, worker) for worker in range(2)]
    assert all(last > first for first, last in shares)
