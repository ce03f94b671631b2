"""Transforms of values, there and back."""

import json

import numpy as np
import pytest

from fastclstm.nn.described import describe, restore
from fastclstm.nn.transforms import Transform

CASES = {
    "log": Transform("log", 0, 80, 0.1),
    "log of tiny rates": Transform("log", 0, 2e-5, 3e-8),
    "linear": Transform("linear", 230, 310),
    "none": Transform(),
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case):
    transform = CASES[case]
    values = np.linspace(transform.low, transform.high, 7)
    made = transform(values)
    np.testing.assert_allclose([made[0], made[-1]], [0, 1], atol=1e-12)
    assert (np.diff(made) > 0).all()
    np.testing.assert_allclose(transform.inverse(made), values, rtol=1e-9, atol=1e-12)
    single = values.astype(np.float32)
    assert transform(single).dtype == transform.inverse(single).dtype == np.float32
    assert np.isnan(transform(np.array([np.nan]))).all()
    assert restore(json.loads(json.dumps(describe(transform)))) == transform


def test_the_logarithm_has_nothing_below_zero():
    transform = CASES["log"]
    assert transform(np.array([-0.05])) == 0
    assert transform.inverse(np.array([-0.3])) == 0
    assert CASES["linear"].inverse(np.array([-0.1])) == pytest.approx(222)


def test_errors():
    for options, words in (
        (("dB",), "kind must be one of 'log', 'linear', 'none', got 'dB'"),
        (("log", -1, 2), "low must be a finite number >= 0"),
        (("linear", 2, 2), "high must be a finite number > 2"),
        (("log", 0, 1, 0), "offset must be a finite number > 0"),
    ):
        with pytest.raises(ValueError, match=words):
            Transform(*options)
