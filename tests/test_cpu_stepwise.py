"""Cells that go step by step through kernels over pre-activations: what conformance's draws leave open."""

import gc
import weakref

import numpy as np
import pytest

import fastclstm
from fastclstm import functional
from fastclstm.engines import recurrence
from fastclstm.engines.cpu import stepwise
from fastclstm.functional.convlstm import ConvLSTMCall
from fastclstm.nn.normalization import Normalization

B, T, H, W, C = 3, 4, 9, 11, 2
MASK = np.array([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]], bool)


def problem(F=5, **sizes):
    rng = np.random.default_rng(0)
    b, t, h, w, c = ({"B": B, "T": T, "H": H, "W": W, "C": C} | sizes).values()
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    arguments = {"x": normal(b, t, h, w, c), "kernel": 0.3 * normal(3, 3, c, 4 * F), "bias": normal(4 * F),
                 "recurrent_kernel": 0.2 * normal(3, 3, F, 4 * F)}  # fmt: skip
    return arguments, normal(b, t, h, w, F)


def options(name, F=5, *, b=B, h=H, w=W, c=C):
    """A cell of each way by name."""
    factors = np.random.default_rng(1).uniform(0, 2, (4, b, h, w, max(c, F))).astype(np.float32)
    if name == "dropout":
        return {"dropout_masks": {"x": factors[..., :c].copy(), "h": factors[..., :F].copy()}}
    if name in ("silu", "gelu", "softplus"):
        return {"activation": name}
    kind, _, how = name.partition(" ")
    normalization = Normalization(kind, separate=how == "separate", elementwise=how == "elementwise")
    parts = ("_x", "_h") if how == "separate" else ("",)
    shape = (h, w, 4 * F) if how == "elementwise" else (4 * F,)
    weights = {f"{n}{part}": np.full(shape, 0.7, np.float32) for n in ("gamma", "beta") for part in parts}
    return {"normalization": normalization, "normalization_weights": weights}


WAYS = ["layer", "layer elementwise", "group separate", "batch", "dropout", "silu", "gelu", "softplus"]


def train(arguments, dy, **rest):
    y, pullback = functional.convlstm2d_vjp(**arguments, **rest)
    gradients = pullback(dy)
    return {"y": y} | {key: value for key, value in gradients.items() if isinstance(value, np.ndarray)} | {
        f"normalization {key}": value for key, value in gradients.get("normalization_weights", {}).items()
    }  # fmt: skip


def assert_close(results, expected, tolerance=2e-5):
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        atol = tolerance * max(np.abs(value).max(), 1)
        np.testing.assert_allclose(results[name], value, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("name", WAYS)
def test_no_step_is_computed_by_numpy(monkeypatch, name):
    """The recurrence in NumPy is not asked, forward or backward."""
    arguments, dy = problem()
    for function in ("forward", "backward"):
        monkeypatch.setattr(recurrence, function, None)
    saved = ConvLSTMCall(**arguments, **options(name)).forward(save=True)[3]
    assert isinstance(saved, stepwise.Saved)
    train(arguments, dy, **options(name))


@pytest.mark.parametrize("rest", [{}, {"mask": MASK}, {"mask": MASK, "go_backwards": True}], ids=" ".join)
@pytest.mark.parametrize("name", WAYS)
def test_pieces_taken_again_give_the_same_gradients(monkeypatch, name, rest):
    """One step at a time, several with a rest, and all; and of several passes back the second."""
    arguments, dy = problem()
    rest = rest | options(name)
    expected = train(arguments, dy, **rest)
    assert_close(expected, train(arguments, dy, **rest, engine="reference"), 1e-4)
    for steps in (1, 3, T):
        monkeypatch.setattr(stepwise, "PIECE_BYTES", steps * B * H * W * 4 * 5 * 4)
        assert_close(train(arguments, dy, **rest, recompute=True), expected)
    output, pullback = functional.convlstm2d_vjp(**arguments, **rest)
    first = pullback(dy)
    output[...] = np.nan
    second = pullback(-2 * dy)
    for key in ("x", "kernel", "recurrent_kernel"):
        np.testing.assert_array_equal(second[key], -2 * first[key], key)


@pytest.mark.parametrize("name", WAYS)
def test_bits_do_not_depend_on_the_thread_count(name):
    sizes = {"B": 2, "T": 2, "H": 33, "W": 30, "C": 2}
    arguments, dy = problem(F=20, **sizes)
    rest = options(name, 20, b=2, h=33, w=30)
    try:
        fastclstm.set_num_threads(1)
        expected = train(arguments, dy, **rest)
        fastclstm.set_num_threads(2)
        for key, value in train(arguments, dy, **rest).items():
            np.testing.assert_array_equal(value, expected[key], key)
    finally:
        fastclstm.set_num_threads(None)


@pytest.mark.parametrize("name", [name for name in WAYS if name != "batch"])
def test_one_bad_image_spoils_no_other(name):
    arguments, dy = problem()
    clean = train(arguments, dy, **options(name))
    arguments["x"] = arguments["x"].copy()
    arguments["x"][1, 1, 4, 4, 0] = np.nan
    results = train(arguments, dy, **options(name))
    assert np.isnan(results["y"][1, 1:]).any()
    np.testing.assert_array_equal(results["y"][1, 0], train(arguments, dy, **options(name))["y"][1, 0])
    for key in ("y", "x"):
        np.testing.assert_array_equal(results[key][[0, 2]], clean[key][[0, 2]], key)


def test_masked_frames_are_not_read():
    arguments, dy = problem()
    rest = {"mask": MASK} | options("batch")
    expected = train(arguments, dy, **rest)
    arguments["x"] = np.where(MASK[..., None, None, None], arguments["x"], np.nan)
    for key, value in train(arguments, dy, **rest).items():
        np.testing.assert_array_equal(value, expected[key], key)


@pytest.mark.parametrize("F", [5, 20])
def test_means_far_from_zero_keep_their_digits(F):
    """Pre-activations around 1000 with a deviation of 1: what is left is what float32 leaves of them."""
    arguments, _ = problem(F, H=40, W=40)
    arguments["kernel"][...] = 0
    arguments["kernel"][1, 1] = 1
    arguments["recurrent_kernel"][...] = 0
    arguments["x"] = arguments["x"] + np.float32(500)
    rest = options("layer", F)
    y = functional.convlstm2d(**arguments, **rest)
    double = {key: value.astype(np.float64) for key, value in arguments.items()}
    expected = functional.convlstm2d(**double, **rest, engine="reference")
    plain = functional.convlstm2d(**arguments, **rest, engine="reference")
    assert np.abs(y - expected).max() <= 2 * np.abs(plain - expected).max() + 1e-6


def test_what_remains_for_numpy():
    arguments, _ = problem()
    peephole = {gate: np.full((1, 1, 5, 5), 0.1, np.float32) for gate in "ifo"}
    for rest in ({"activation": (np.sin, np.cos)}, {"peephole": peephole}):
        call = ConvLSTMCall(**arguments, **rest)
        assert isinstance(call.forward(save=True)[3], recurrence.Saved)


@pytest.mark.parametrize("name", ["dropout", "silu", "group separate"])
def test_transforms_that_overflow_are_found_out(name):
    """All begins again with direct convolutions of the images that need them, forward and back."""
    arguments, dy = problem(H=16, W=16)
    arguments["recurrent_kernel"][0, 0, 0, -1] = 1e38  # of the last output gate, which it opens or shuts
    rest = options(name, h=16, w=16)
    call = ConvLSTMCall(**arguments, **rest, algorithm="winograd")
    y, *_, saved = call.forward(save=True)
    assert saved.direct.any()
    expected = ConvLSTMCall(**arguments, **rest, algorithm="direct").forward(save=False)[0]
    np.testing.assert_allclose(y, expected, atol=1e-5)
    gradients = [
        functional.convlstm2d_vjp(**arguments, **rest, algorithm=how)[1](dy)["x"] for how in ("winograd", "direct")
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-4 * np.abs(gradients[1]).max())


def test_fill_values_of_unbounded_states_are_found_out():
    """States that grow beyond what transforms bear, in one image of two."""
    arguments, _ = problem(B=2, H=16, W=16)
    arguments["x"][0, :, 3:6, 3:6] *= 200
    call = ConvLSTMCall(**arguments, activation="softplus", algorithm="winograd")
    y, *_, saved = call.forward(save=True)
    np.testing.assert_array_equal(saved.direct, [True, False])
    expected = ConvLSTMCall(**arguments, activation="softplus", algorithm="direct").forward(save=True)[0]
    np.testing.assert_array_equal(y[0], expected[0])


def test_launches_kept_for_the_next_call_take_its_frames_states_and_weights():
    """Calls with the same weights, other arrays, a first state and none; the way there and back; changed weights."""
    arguments, _ = problem()
    rest = options("layer")
    weights = {name: array for name, array in arguments.items() if name != "x"}
    rng = np.random.default_rng(2)
    for n in range(6):
        x = rng.standard_normal(arguments["x"].shape).astype(np.float32)
        state = tuple(rng.standard_normal((2, B, H, W, 5)).astype(np.float32)) if n % 2 else None
        more = rest | {"initial_state": state, "go_backwards": n > 3}
        if n == 3:
            weights["kernel"] += 0.1
            rest["normalization_weights"]["gamma"] += 0.1
        got, expected = (functional.convlstm2d(x, **weights, **more, engine=engine) for engine in ("cpu", "reference"))
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


def test_launches_are_kept_without_the_frames(monkeypatch):
    arguments, _ = problem()
    rest, x, gone, made, make = options("layer"), arguments.pop("x"), [], [], stepwise.Program
    monkeypatch.setattr(stepwise, "Program", lambda steps: (made.append(steps), make(steps))[1])
    for _ in range(3):
        frames = x.copy()
        gone.append(weakref.ref(frames))
        functional.convlstm2d(frames, **arguments, **rest, engine="cpu")
        del frames
    gc.collect()
    assert made == [T]
    assert [ref() for ref in gone] == [None] * 3
