"""Training on the cpu engine: what the forward pass keeps, and how the way back is cut."""

from dataclasses import replace

import numpy as np
import pytest

from fastclstm import functional
from fastclstm.engines import recurrence
from fastclstm.engines.cpu import backward, convlstm2d_backward, launch, stepwise, threads, weight_gradient
from fastclstm.engines.cpu.kernels import vmath
from fastclstm.functional.convlstm import ConvLSTMCall


def problem(B=3, T=5, H=10, W=9, C=2, F=6, k=3, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    arguments = {
        "x": draw(B, T, H, W, C), "kernel": 0.3 * draw(k, k, C, 4 * F), "bias": draw(4 * F),
        "recurrent_kernel": 0.2 * draw(k, k, F, 4 * F), "initial_state": (draw(B, H, W, F), draw(B, H, W, F)),
    }  # fmt: skip
    return arguments, (draw(B, T, H, W, F), draw(B, H, W, F), draw(B, H, W, F))


def train(arguments, cotangents, **options):
    """Outputs and gradients, flat."""
    outputs, pullback = functional.convlstm2d_vjp(**arguments, return_state=True, **options)
    gradients = pullback(cotangents)
    gradients |= dict(zip(("h", "c"), gradients.pop("initial_state", ()), strict=False))
    return outputs, gradients


def assert_same(results, expected):
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(results[name], value, name)


OPTIONS = [{}, {"mask": np.array([[1, 0, 1, 0, 1], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]], bool)}, {"go_backwards": True},
           {"return_sequences": False}, {"cell_clip": 0.5}, {"activation": "softsign"},
           {"peephole": {gate: np.full(6, 0.3, np.float32) for gate in "ifo"}}]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "standard")
@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_training_forward_is_inference_to_the_bit(algorithm, options):
    arguments, _ = problem()
    options = options | {"algorithm": algorithm, "return_state": True}
    alone = functional.convlstm2d(**arguments, **options)
    outputs, _ = functional.convlstm2d_vjp(**arguments, **options)
    for result, expected in zip(outputs, alone, strict=True):
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "standard")
@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_gradients_may_be_asked_for_again(algorithm, options, recompute):
    """The first time uses up what was kept; later ones take the steps forward again, from what the caller gave."""
    arguments, cotangents = problem()
    if "return_sequences" in options:
        cotangents = (cotangents[1], *cotangents[1:])
    outputs, pullback = functional.convlstm2d_vjp(
        **arguments, return_state=True, algorithm=algorithm, recompute=recompute, **options
    )
    first = pullback(cotangents)
    for output in outputs:
        output[...] = np.nan  # the caller's
    second = pullback(tuple(-2 * cotangent for cotangent in cotangents))
    for name in ("x", "kernel", "recurrent_kernel", "bias"):
        np.testing.assert_array_equal(second[name], -2 * first[name], name)


def assert_close(results, expected, tolerance):
    """Outputs, and gradients by name and of peepholes."""
    for result, value in zip(results[0], expected[0], strict=True):
        np.testing.assert_array_equal(result, value)
    flat, flat_expected = ({**run[1], **run[1].get("peephole", {})} for run in (results, expected))
    assert flat.keys() == flat_expected.keys()
    for name in flat.keys() - {"peephole"}:
        atol = tolerance * np.abs(flat_expected[name]).max()
        np.testing.assert_allclose(flat[name], flat_expected[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "standard")
@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
@pytest.mark.parametrize("given", [True, False])
def test_steps_taken_again_give_the_same_gradients(monkeypatch, options, algorithm, given):
    """Groups of one, two and three images, pieces of one step, of several with an odd rest, and of all."""
    arguments, cotangents = problem()
    if "return_sequences" in options:
        cotangents = (cotangents[1], *cotangents[1:])
    if not given:
        arguments["initial_state"] = (None, arguments["initial_state"][1])
    options = options | {"algorithm": algorithm}
    expected = train(arguments, cotangents, **options)
    for images, steps in ((1, 1), (2, 2), (2, 3), (3, 4), (3, 5)):
        monkeypatch.setattr(backward, "STEP_BYTES", images * 10 * 9 * 24 * 4)
        monkeypatch.setattr(backward, "piece_length", lambda *_, steps=steps: steps)
        assert_close(train(arguments, cotangents, **options, recompute=True), expected, 3e-6)


@pytest.mark.parametrize("options", [{}, {"go_backwards": True}, {"peephole": OPTIONS[-1]["peephole"]}],
                         ids=lambda options: " ".join(options) or "standard")  # fmt: skip
@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
@pytest.mark.parametrize("given", [True, False])
def test_gradients_of_h_and_x_together_are_those_apart(monkeypatch, options, algorithm, given):
    """In pieces and at once; where vectors of filters are full, and where pixels share them."""
    options = options | {"algorithm": algorithm}
    for F in (6,) if "peephole" in options else (1, 6, 16):
        arguments, cotangents = problem(F=F)
        if not given:
            arguments["initial_state"] = (None, None)
        ways = []
        for joint in (False, True):
            monkeypatch.setattr(
                backward, "join", lambda h, x, *_, joint=joint: replace(h, C=h.C + x.C) if joint else None
            )
            ways.append(train(arguments, cotangents, **options))
        assert_close(ways[1], ways[0], 3e-6)
        monkeypatch.setattr(backward, "STEP_BYTES", 2 * 10 * 9 * 4 * F * 4)
        assert_close(train(arguments, cotangents, **options, recompute=True), ways[0], 3e-6)


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_the_way_back_is_cut_into_pieces_with_the_same_bits(monkeypatch, algorithm):
    """Between pieces a Ctrl-C is heard: each step of x's gradient, each gathered block of the kernels' is one."""
    monkeypatch.setattr(backward, "join", lambda *_: None)
    arguments, cotangents = problem(B=2, T=7, H=24, W=23, C=9)  # as many channels as are worth a convolution of dz
    _, expected = train(arguments, cotangents, algorithm=algorithm)
    launched, run = [], threads.run

    def counted(kernel, *rest):
        launched.append(kernel.name)
        run(kernel, *rest)

    monkeypatch.setattr(threads, "run", counted)
    monkeypatch.setattr(launch, "PIECE_FLOPS", 1)
    monkeypatch.setattr(launch, "PIECE_SECONDS", 0)
    monkeypatch.setattr(weight_gradient, "SCRATCH_BYTES", 1 << 19)
    weight_gradient._direct_plan.cache_clear()
    _, pieces = train(arguments, cotangents, algorithm=algorithm)
    weight_gradient._direct_plan.cache_clear()
    assert_same(pieces, expected)
    stores, adds = launched.count(f"{algorithm}.store"), launched.count(f"weight_gradient.add_{algorithm}")
    assert stores == 7 + 7
    assert adds > 3


def test_what_is_kept():
    """5 F numbers a step, of which recompute leaves the states at which pieces begin."""
    arguments, _ = problem(B=2, T=9)
    call = ConvLSTMCall(**arguments)
    frames = 10 * 9 * 6 * 4
    (kept,) = call.forward(save=True)[3].kept
    assert (kept.gates.nbytes, kept.c.nbytes) == (2 * 9 * 4 * frames, 2 * 10 * frames)
    saved = call.forward(save="states")[3]
    assert saved.length == 2
    assert not saved.kept
    assert saved.h.nbytes == saved.c.nbytes == 2 * 4 * frames


def test_masked_frames_are_not_read():
    arguments, cotangents = problem()
    mask = OPTIONS[1]["mask"]
    _, expected = train(arguments, cotangents, mask=mask)
    arguments["x"] = np.where(mask[..., None, None, None], arguments["x"], np.nan)
    _, gradients = train(arguments, cotangents, mask=mask)
    assert_same(gradients, expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_one_bad_image_spoils_no_other(algorithm, recompute):
    arguments, cotangents = problem()
    options = {"algorithm": algorithm, "recompute": recompute}
    _, expected = train(arguments, cotangents, **options)
    arguments["x"] = arguments["x"].copy()
    arguments["x"][1, 2, 4, 4, 0] = np.nan
    outputs, gradients = train(arguments, cotangents, **options)
    alone, _ = train(arguments, cotangents, algorithm="direct")
    assert np.isnan(alone[0][1]).sum() == np.isnan(outputs[0][1]).sum()
    assert np.isfinite(outputs[0][1, :2]).all()
    assert np.isnan(gradients["x"][1]).any()
    for name in ("x", "h", "c"):
        np.testing.assert_array_equal(gradients[name][[0, 2]], expected[name][[0, 2]], name)


def test_what_the_fused_kernels_do_not_know_goes_step_by_step():
    arguments, cotangents = problem()
    cases = (
        ({}, backward.Saved),
        ({"activation": "silu"}, stepwise.Saved),
        ({"output_activation": "gelu"}, stepwise.Saved),
        ({"activation": (np.sin, np.cos)}, recurrence.Saved),
        ({"recurrent_activation": "hard_sigmoid"}, backward.Saved),
    )
    for options, kind in cases:
        call = ConvLSTMCall(**arguments, **options)
        assert isinstance(call.forward(save=True)[3], kind)
        _, gradients = train(arguments, cotangents, **options)
        _, expected = train(arguments, cotangents, **options, engine="reference")
        for name, value in expected.items():
            np.testing.assert_allclose(gradients[name], value, rtol=0, atol=1e-4 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("name", [name for name, code in vmath.ACTIVATION_CODES.items()
                                  if code in vmath.DERIVATIVE_CODES])  # fmt: skip
def test_derivatives_follow_from_values(name):
    """Pre-activations from -6 to 6, kinks among them, through a 1×1 cell whose gates see x alone."""
    x = np.linspace(-6, 6, 49).reshape(1, 1, 7, 7, 1) / (6 if name == "exponential" else 1)
    ones, zeros = np.ones((1, 1, 1, 4)), np.zeros((1, 1, 1, 4))
    state = (np.zeros((1, 7, 7, 1)), np.full((1, 7, 7, 1), 0.5))
    options = {"activation": name, "recurrent_activation": name, "output_activation": name, "initial_state": state}
    cotangent = np.random.default_rng(0).standard_normal((1, 1, 7, 7, 1))
    results = []
    for engine in ("cpu", "reference"):
        _, pullback = functional.convlstm2d_vjp(x, ones, zeros, engine=engine, **options)
        results.append(pullback(cotangent))
    assert isinstance(ConvLSTMCall(x, ones, zeros, None, **options).forward(save=True)[3], backward.Saved)
    for key in ("x", "kernel"):
        scale = np.abs(results[1][key]).max()
        np.testing.assert_allclose(results[0][key], results[1][key], rtol=0, atol=1e-12 * scale, err_msg=key)


def test_no_gradient_of_a_state_that_was_not_given():
    arguments, cotangents = problem()
    del arguments["initial_state"]
    call = ConvLSTMCall(**arguments)
    saved = call.forward(save=True)[3]
    gradients = convlstm2d_backward(call.spec, saved, *cotangents)
    assert gradients["h"] is None
    assert gradients["c"] is None
