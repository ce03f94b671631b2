"""Each convolution of a step its own algorithm: x's of several steps beforehand, or along with h's."""

import numpy as np
import pytest

import fastclstm
from fastclstm import functional
from fastclstm.engines.cpu import fused_steps, launch, plans, threads
from fastclstm.engines.cpu.plans import DIRECT, Ways
from fastclstm.engines.cpu.tiles import Tile
from fastclstm.functional.convlstm import ConvLSTMCall

GEOMETRIES = {
    "stride": {"strides": 2}, "dilation": {"dilation": 2}, "recurrent dilation": {"recurrent_dilation": 2},
    "5×5 and 3×3": {"k": 5}, "1×1 and 3×3": {"k": 1}, "3×3 and 1×1": {"rk": 1}, "same": {},
    "stride, together": {"strides": (2, 1)}, "5×5 and 3×3, together": {"k": 5},
}  # fmt: skip
F2, F4, F2_5 = Tile(2, 2, 3, 3), Tile(4, 4, 3, 3), Tile(2, 2, 5, 5)
WAYS = {name: Ways(F4, None, before=True) for name in ("stride", "dilation", "1×1 and 3×3")}
WAYS |= {name: Ways(None, F4, before=True) for name in ("recurrent dilation", "3×3 and 1×1")}
WAYS |= {"5×5 and 3×3": Ways(F4, F2_5, before=True), "same": Ways(F2, F4, before=True)}
WAYS |= {name: Ways(F4, F4) for name in GEOMETRIES if "together" in name}
every_geometry = pytest.mark.parametrize("name", GEOMETRIES)


def problem(B=3, T=5, H=13, W=11, C=5, F=6, k=3, rk=3, dtype=np.float32, seed=0, **options):
    """Arguments of `convlstm2d` with everything on that standard cells have."""
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(dtype)

    arguments = {
        "x": draw(B, T, H, W, C), "kernel": draw(k, k, C, 4 * F, scale=0.3 / k), "bias": draw(4 * F),
        "recurrent_kernel": draw(rk, rk, F, 4 * F, scale=0.3 / rk), **options,
    }  # fmt: skip
    state = ConvLSTMCall(**arguments).spec.state_shape
    return arguments | {"initial_state": (draw(*state), draw(*state))}


MASK = np.array([[1, 0, 1, 1, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
OPTIONS = [{}, {"mask": MASK}, {"go_backwards": True}, {"mask": MASK, "go_backwards": True}, {"cell_clip": 0.5},
           {"return_sequences": False}, {"initial_state": None},
           {"peephole": {gate: np.full(6, 0.3, np.float32) for gate in "ifo"}}]  # fmt: skip
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "standard")


def run(arguments, **options):
    """Output and last states."""
    return functional.convlstm2d(**(arguments | options), return_state=True)


def assert_same(results, expected):
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, value)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that have run."""
    names, start = [], threads.run
    monkeypatch.setattr(threads, "run", lambda kernel, *rest: (names.append(kernel.name), start(kernel, *rest))[1])
    return names


@pytest.fixture
def forced(monkeypatch):
    """Have each geometry computed in the ways that stand beside it."""
    return lambda name: monkeypatch.setattr(plans, "choose_ways", lambda *_: WAYS[name])


# What is chosen.


def choose(algorithm="auto", B=1, H=64, C=16, F=64, **options):
    spec = ConvLSTMCall(**problem(B=B, T=1, H=H, W=H, C=C, F=F, **options)).spec
    return plans.choose_ways(spec.recurrent, spec.input, algorithm, 4)


@every_geometry
def test_auto_gives_each_convolution_what_fits_it(name):
    chosen = choose(**GEOMETRIES[name])
    assert chosen.before == ("dilation" in name or name[:3] == "3×3")  # 5×5 and 3×3 take as long either way
    assert bool(chosen.h) == (name != "3×3 and 1×1")
    assert chosen.x
    if not chosen.before:
        assert chosen == Ways(F4, F4)


def test_auto_convolves_much_of_small_frames_beforehand_and_few_channels_never():
    assert choose(H=8, C=128, F=256).before
    for C in (1, 4):
        for H in (8, 16, 64):
            assert not choose(H=H, C=C).before
    assert not choose(H=16, C=1, F=16, strides=2).before  # another kernel would cost more than it brings


def test_winograd_takes_what_fits_whatever_the_batch():
    assert choose("winograd", strides=2) == choose("auto", strides=2)
    both = choose("winograd", dilation=3, recurrent_dilation=2)
    assert both.before
    assert both.h
    assert both.x
    assert choose("winograd", B=16, H=8, C=64, F=64) == choose("winograd", B=1, H=8, C=64, F=64)


def test_direct_is_direct():
    assert choose("direct", strides=2) == DIRECT
    assert not DIRECT.transform
    assert Ways(None, F2, before=True).transform


# What is computed.


@every_option
@every_geometry
def test_numbers_are_those_of_the_reference(name, options, forced, launched):
    forced(name)
    arguments = problem(**GEOMETRIES[name]) | options
    expected = functional.convlstm2d(**arguments, return_state=True, engine="reference")
    launched.clear()
    results = run(arguments)
    finishes = {kernel.partition(".")[2] for kernel in launched}
    assert ("update" if not {"cell_clip", "peephole"} & options.keys() else "update_peeping") in finishes
    assert ("store" in finishes) == WAYS[name].before
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, value, rtol=0, atol=2e-5)


@every_geometry
def test_double_precision(name, forced):
    forced(name)
    arguments = problem(dtype=np.float64, **GEOMETRIES[name])
    expected = functional.convlstm2d(**arguments, engine="reference")
    np.testing.assert_allclose(functional.convlstm2d(**arguments), expected, rtol=0, atol=1e-13)


@every_option
@every_geometry
def test_pieces_images_and_threads_change_no_bit(name, options, forced, monkeypatch):
    """Pieces of one step and one image, of two steps, of several images, of a Ctrl-C; one thread and three."""
    forced(name)
    arguments = problem(**GEOMETRIES[name]) | options
    expected = run(arguments)
    spec = ConvLSTMCall(**arguments).spec
    image = spec.HO * spec.WO * 4 * spec.F * 4
    monkeypatch.setattr(launch, "SERIAL_FLOPS", 1)
    try:
        for size in (1, 2 * image, 4 * image, 11 * image):
            for count in (1, 3):
                monkeypatch.setattr(fused_steps, "AHEAD_BYTES", size)
                fastclstm.set_num_threads(count)
                assert_same(run(arguments), expected)
        monkeypatch.setattr(launch, "PIECE_FLOPS", 1)
        monkeypatch.setattr(launch, "PIECE_SECONDS", 0)
        assert_same(run(arguments), expected)
    finally:
        fastclstm.set_num_threads(None)


@pytest.mark.parametrize("steps", [1, 2])
@every_geometry
def test_a_piece_is_as_long_as_its_memory(name, steps, forced, launched, monkeypatch):
    """So is what a Ctrl-C waits for: x and the steps by turns."""
    forced(name)
    arguments = problem(B=1, T=6, **GEOMETRIES[name])
    spec = ConvLSTMCall(**arguments).spec
    monkeypatch.setattr(fused_steps, "AHEAD_BYTES", steps * spec.HO * spec.WO * 4 * spec.F * 4)
    launched.clear()
    run(arguments)
    kinds = "direct.", "winograd.", "planar_direct.", "planar_winograd."
    finishes = [kernel.partition(".")[2] for kernel in launched if kernel.startswith(kinds)]
    assert finishes == (["store", "update"] * (6 // steps) if WAYS[name].before else ["update"])


@every_geometry
def test_steps_of_a_stream_have_the_bits_of_the_whole(name):
    """What "auto" chooses does not depend on the length of the sequence."""
    arguments = problem(F=16, **GEOMETRIES[name])
    whole, h_last, c_last = run(arguments)
    h, c = arguments["initial_state"]
    for t in range(5):
        step = arguments | {"x": arguments["x"][:, t], "initial_state": (h, c)}
        h, c = functional.convlstm2d_step(**step)
        np.testing.assert_array_equal(h, whole[:, t])
    assert_same((h, c), (h_last, c_last))


@pytest.mark.parametrize("name", [name for name, ways in WAYS.items() if name != "recurrent dilation"])
def test_winograd_does_not_depend_on_the_batch(name):
    arguments = problem(algorithm="winograd", **GEOMETRIES[name])
    whole = run(arguments)
    for b in range(3):
        state = tuple(s[b : b + 1] for s in arguments["initial_state"])
        alone = run(arguments | {"x": arguments["x"][b : b + 1], "initial_state": state})
        assert_same(alone, [part[b : b + 1] for part in whole])


@every_geometry
def test_a_hidden_state_of_zeros_is_the_same_given_or_not(name, forced):
    """The first step convolves x alone, so also where nothing is left to convolve in it."""
    forced(name)
    arguments = problem(F=20, **GEOMETRIES[name])
    zeros = np.zeros_like(arguments["initial_state"][0])
    assert_same(run(arguments, initial_state=None), run(arguments, initial_state=(zeros, zeros)))


# What goes wrong stays where it is.


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20])
@every_geometry
def test_a_masked_frame_is_not_seen(name, bad, forced, launched):
    """No bit changes, and no image is computed another time."""
    forced(name)
    arguments = problem(**GEOMETRIES[name], mask=MASK)
    expected, kernels = run(arguments), launched.copy()
    launched.clear()
    seen = np.where(MASK[..., None, None, None], arguments["x"], np.float32(bad))
    assert_same(run(arguments, x=seen), expected)
    ours = ("direct.", "winograd.")
    assert [k for k in launched if k.startswith(ours)] == [k for k in kernels if k.startswith(ours)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e30])
@every_geometry
def test_a_bad_pixel_reaches_what_it_should(name, bad, forced):
    forced(name)
    arguments = problem(H=31, W=29, T=3, **GEOMETRIES[name])
    clean = run(arguments)[0]
    arguments["x"][1, 1, 15, 14, 2] = bad
    output = run(arguments)[0]
    expected = functional.convlstm2d(**arguments, engine="reference")
    np.testing.assert_array_equal(np.isnan(output), np.isnan(expected))
    np.testing.assert_array_equal(output[[0, 2]], clean[[0, 2]])
    np.testing.assert_allclose(output[1], expected[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("dtype", "huge"), [(np.float32, 2.5e38), (np.float64, 1.2e308)])
@every_geometry
def test_huge_weights_times_zeros_are_zeros(name, dtype, huge, forced):
    """They cannot carry the factors of the standard gates."""
    forced(name)
    arguments = problem(B=1, T=3, dtype=dtype, **GEOMETRIES[name])
    arguments["kernel"][0, 0, 0] = huge
    arguments["x"][..., 0] = 0
    expected = functional.convlstm2d(**arguments, engine="reference")
    np.testing.assert_allclose(functional.convlstm2d(**arguments), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["x", "h"])
def test_a_last_output_gate_that_transforms_would_spoil(name):
    """Transformed weights that are infinite leave the cell states as they are, where only the last gate has them."""
    arguments = problem(B=2, T=1, F=8)
    source, kernel = ("x", "kernel") if name == "x" else ("initial_state", "recurrent_kernel")
    arguments["bias"][24:] = 0
    for weights in ("kernel", "recurrent_kernel"):
        arguments[weights][..., 24:] = 0
    arguments[kernel][..., 24:] = 2.5e38
    tiny = np.float32(1e-39)
    if source == "x":
        arguments["x"] *= tiny
    else:
        h, c = arguments["initial_state"]
        arguments["initial_state"] = tiny * h, c
    expected = functional.convlstm2d(**arguments, engine="reference")
    np.testing.assert_allclose(run(arguments, algorithm="winograd")[0], expected, rtol=0, atol=1e-5)


# Training.


@pytest.mark.parametrize("recompute", [False, True])
@every_option
@every_geometry
def test_training_is_inference_to_the_bit_and_gradients_are_right(name, options, recompute, forced):
    forced(name)
    arguments = problem(**GEOMETRIES[name]) | options
    outputs, pullback = functional.convlstm2d_vjp(**arguments, return_state=True, recompute=recompute)
    assert_same(outputs, run(arguments))
    exact, pull_exact = functional.convlstm2d_vjp(**arguments, return_state=True, engine="reference")
    cotangents = tuple(np.random.default_rng(1).standard_normal(part.shape).astype(np.float32) for part in exact)
    gradients, expected = pullback(cotangents), pull_exact(cotangents)
    for key in ("x", "kernel", "recurrent_kernel", "bias"):
        np.testing.assert_allclose(gradients[key], expected[key], rtol=0, atol=2e-5 * np.abs(expected[key]).max())


def test_gradients_of_kernels_take_what_fits_each(launched):
    arguments = problem(H=33, W=31, C=16, F=16, strides=2)
    y, pullback = functional.convlstm2d_vjp(**arguments)
    launched.clear()
    pullback(np.ones_like(y))
    assert {"weight_gradient.add_direct", "weight_gradient.add_winograd"} <= set(launched)


def test_no_memory_is_taken_anew():
    """What x gives lies in memory that the call before left."""
    arguments = problem(strides=2)
    run(arguments)
    before = {address for address, _ in launch._spare}
    run(arguments)
    assert {address for address, _ in launch._spare} == before
