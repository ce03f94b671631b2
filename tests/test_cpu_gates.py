"""Gates over lines of pixels × filters: any number of filters, frames of several lines, every kind of cell."""

import numpy as np
import pytest

from fastclstm import functional
from fastclstm.engines.cpu.kernels import gates, gates_backward

H, W = 15, 17
FILTERS = (*range(1, 25), 31, 32, 33, 40)


def problem(F, k, dtype, seed=0, B=2, T=2, C=2):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    arguments = {
        "x": draw(B, T, H, W, C), "kernel": draw(k, k, C, 4 * F) / k, "bias": draw(4 * F),
        "recurrent_kernel": draw(k, k, F, 4 * F) / np.asarray(k * F**0.5, dtype),
        "initial_state": (draw(B, H, W, F), draw(B, H, W, F)),
    }  # fmt: skip
    peephole = {kind: {g: draw(*shape) for g in "ifo"} for kind, shape in (("channel", (F,)), ("pixel", (H, W, F)))}
    return arguments, peephole, (draw(B, T, H, W, F), draw(B, H, W, F), draw(B, H, W, F))


def flat(outputs, gradients):
    h, c = gradients.pop("initial_state")
    peephole = {f"peephole {gate}": g for gate, g in (gradients.pop("peephole", None) or {}).items()}
    return dict(zip(("y", "h", "c"), outputs, strict=True)) | gradients | peephole | {"dh": h, "dc": c}


OPTIONS = {
    "standard": {}, "masked": {"mask": np.array([[1, 0], [0, 1]], bool)}, "clip": {"cell_clip": 0.5},
    "channel": {}, "pixel": {"cell_clip": 0.7}, "softsign": {"activation": "softsign"},
    "any channel": {"output_activation": "softsign"}, "any pixel": {"output_activation": "softsign", "cell_clip": 0.7},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("algorithm", "k"), [("direct", 1), ("winograd", 3)])
def test_any_number_of_filters(algorithm, k, options, dtype):
    """States, kept gates and gradients are the reference's; inference is the forward pass of training to the bit."""
    assert H * W > gates.MOST_PIXELS  # several lines, the last one not full
    assert H * W * 5 > gates_backward.LINE
    given = dict(OPTIONS[options])
    # All filters and few are enough for what differs little.
    for F in FILTERS if options in ("standard", "pixel") and dtype == np.float32 else (1, 3, 7, 16, 20, 33):
        arguments, peephole, cotangents = problem(F, k, dtype)
        if (kind := options.rpartition(" ")[2]) in peephole:
            given["peephole"] = peephole[kind]
        results = []
        for engine in ("cpu", "reference"):
            where = {"engine": engine} | ({"algorithm": algorithm} if engine == "cpu" else {})
            outputs, pullback = functional.convlstm2d_vjp(**arguments, return_state=True, **given, **where)
            results.append(flat(outputs, pullback(cotangents)))
        inference = functional.convlstm2d(**arguments, return_state=True, algorithm=algorithm, engine="cpu", **given)
        for name, value in zip(("y", "h", "c"), inference, strict=True):
            np.testing.assert_array_equal(value, results[0][name], f"{name}, {F} filters")
        tolerance = 2e-5 if dtype == np.float32 else 2e-13
        assert results[0].keys() == results[1].keys()
        for name, exact in results[1].items():
            if exact is None:
                continue
            atol = tolerance * np.abs(exact).max()
            np.testing.assert_allclose(results[0][name], exact, 0, atol, err_msg=f"{name}, {F} filters")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("F", [3, 8, 16, 20])
@pytest.mark.parametrize("options", [{}, {"cell_clip": 3.0}])
def test_a_bad_cell_stays_alone_in_its_line(F, bad, options):
    """NaN and infinity in one cell's state do to it what they do in the reference, and nothing to its neighbours."""
    arguments, _, _ = problem(F, 1, np.float32)
    arguments["recurrent_kernel"][...] = 0
    arguments["initial_state"][1][0, 7, 7, F - 1] = bad
    arguments |= options
    result = functional.convlstm2d(**arguments, return_state=True, engine="cpu", algorithm="direct")
    expected = functional.convlstm2d(**arguments, return_state=True, engine="reference")
    for value, exact in zip(result, expected, strict=True):
        np.testing.assert_allclose(value, exact, 1e-5, 1e-6)
