"""Training on the cpu engine: what the forward pass keeps, and how the way back is cut."""

import numpy as np
import pytest

from fastclstm import functional
from fastclstm.engines.cpu import backward, convlstm2d_backward, vmath


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
    gradients |= dict(zip(("h", "c"), gradients.pop("initial_state"), strict=True))
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


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_gradients_may_be_asked_for_again(algorithm):
    arguments, cotangents = problem()
    _, pullback = functional.convlstm2d_vjp(**arguments, return_state=True, algorithm=algorithm)
    first = pullback(cotangents)
    pullback(tuple(-2 * cotangent for cotangent in cotangents))
    for name, value in pullback(cotangents).items():
        np.testing.assert_array_equal(value, first[name], name)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "standard")
def test_how_the_way_back_is_cut_does_not_matter(monkeypatch, options):
    """Groups of one, two and three images, one step at a time and several, an odd rest."""
    arguments, cotangents = problem()
    if "return_sequences" in options:
        cotangents = (cotangents[1], *cotangents[1:])
    _, expected = train(arguments, cotangents, **options)
    frame = 10 * 9 * 24 * 4
    for images, steps in ((1, 1), (2, 2), (3, 3), (1, 4)):
        monkeypatch.setattr(backward, "STEP_BYTES", images * frame)
        monkeypatch.setattr(backward, "WAITING_BYTES", steps * images * frame)
        _, gradients = train(arguments, cotangents, **options)
        assert gradients.keys() == expected.keys()
        for name in expected.keys() - {"peephole"}:
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(gradients[name], expected[name], rtol=0, atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "standard")
@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
@pytest.mark.parametrize("given", [True, False])
def test_steps_taken_again_give_the_same_gradients(monkeypatch, options, algorithm, given):
    arguments, cotangents = problem()
    if "return_sequences" in options:
        cotangents = (cotangents[1], *cotangents[1:])
    if not given:
        del arguments["initial_state"]
    frame = 10 * 9 * 24 * 4
    for images, steps in ((2, 2), (3, 1), (3, 5)):
        monkeypatch.setattr(backward, "STEP_BYTES", images * frame)
        monkeypatch.setattr(backward, "WAITING_BYTES", steps * images * frame)
        results = []
        for save in (True, "states"):
            call = functional._ConvLSTMCall(**arguments, **options, algorithm=algorithm)
            *outputs, saved = call.forward(save=save)
            assert (saved.gates is None) == (save == "states" and "mask" not in options)
            gradients = convlstm2d_backward(call.spec, saved, *cotangents)
            results.append(gradients | dict(enumerate(outputs)))
        for name, value in results[0].items():
            if not isinstance(value, dict):
                tolerance = 0 if value is None else 2e-6 * np.abs(value).max()
                assert (value is None) == (results[1][name] is None)
                if value is not None:
                    np.testing.assert_allclose(results[1][name], value, rtol=0, atol=tolerance, err_msg=str(name))


def test_masked_frames_are_not_read():
    arguments, cotangents = problem()
    mask = OPTIONS[1]["mask"]
    _, expected = train(arguments, cotangents, mask=mask)
    arguments["x"] = np.where(mask[..., None, None, None], arguments["x"], np.nan)
    _, gradients = train(arguments, cotangents, mask=mask)
    assert_same(gradients, expected)


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_one_bad_image_spoils_no_other(algorithm):
    arguments, cotangents = problem()
    _, expected = train(arguments, cotangents, algorithm=algorithm)
    arguments["x"] = arguments["x"].copy()
    arguments["x"][1, 2, 4, 4, 0] = np.nan
    outputs, gradients = train(arguments, cotangents, algorithm=algorithm)
    assert np.isfinite(outputs[0][1, :2]).all()
    assert np.isnan(gradients["x"][1]).any()
    for name in ("x", "h", "c"):
        np.testing.assert_array_equal(gradients[name][[0, 2]], expected[name][[0, 2]], name)


def test_what_the_kernels_do_not_know_takes_the_recurrence():
    arguments, cotangents = problem()
    cases = (({}, True), ({"activation": "silu"}, False), ({"activation": (np.sin, np.cos)}, False),
             ({"output_activation": "gelu"}, False), ({"recurrent_activation": "hard_sigmoid"}, True))  # fmt: skip
    for options, known in cases:
        call = functional._ConvLSTMCall(**arguments, **options)
        assert isinstance(call.forward(save=True)[3], backward.Saved) == known
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
    assert isinstance(functional._ConvLSTMCall(x, ones, zeros, None, **options).forward(save=True)[3], backward.Saved)
    for key in ("x", "kernel"):
        scale = np.abs(results[1][key]).max()
        np.testing.assert_allclose(results[0][key], results[1][key], rtol=0, atol=1e-12 * scale, err_msg=key)


def test_no_gradient_of_a_state_that_was_not_given():
    arguments, cotangents = problem()
    del arguments["initial_state"]
    call = functional._ConvLSTMCall(**arguments)
    saved = call.forward(save=True)[3]
    gradients = convlstm2d_backward(call.spec, saved, *cotangents)
    assert gradients["h"] is None
    assert gradients["c"] is None
