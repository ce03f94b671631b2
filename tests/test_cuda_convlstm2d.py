"""convlstm2d of the cuda engine, its kernels run on the processor, against the oracle in float64."""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_cases import ROUNDING, cast, convolutions, get, near, put, tiling, within
from cuda_emulator import EmulatedDevice, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclstm.engines import reference
from fastclstm.engines.cuda import backward, choice, packing, product
from fastclstm.nn import activations
from fastclstm.nn.normalization import Normalization
from fastclstm.spec import ConvLSTMSpec

cuda = importlib.import_module("fastclstm.engines.cuda.convlstm2d")

NAMES = ("activation", "recurrent_activation", "output_activation")
USUAL = ("tanh", "sigmoid", "tanh")
SMOOTH = ["tanh", "sigmoid", "hard_sigmoid", "elu", "gelu", "silu", "softsign", "softplus", "linear"]


def problem(shape, kernel, F, *, recurrent=None, bias=True, initial="hc", peephole=None, mask=None, used=USUAL, seed=0,
            **options):  # fmt: skip
    """A spec, the arguments after it and cotangents, in float64 that float32 holds."""
    B, T, _, _, C = shape
    normal = np.random.default_rng(seed).standard_normal
    used = dict(zip(NAMES, map(activations.get, used), strict=True))
    shapes = (*kernel, C, 4 * F), (*(recurrent or kernel), F, 4 * F)
    spec = ConvLSTMSpec.infer(shape, *shapes, (4 * F,), **options, **used)
    state = spec.state_shape
    weights = None
    if peephole:
        weights = {gate: 0.3 * normal((F,) if peephole == "channel" else state[1:]) for gate in "ifo"}
        spec = ConvLSTMSpec.infer(shape, *shapes, peephole_shapes={g: w.shape for g, w in weights.items()}, **options,
                                  **used)  # fmt: skip
    valid = None if mask is None else normal((B, T)) > mask
    arrays = (
        normal(shape), *(normal(s) / np.sqrt(np.prod(s[:-1])) for s in shapes), normal(4 * F) if bias else None,
        *(normal(state) if name in initial else None for name in "hc"), weights, valid,
    )  # fmt: skip
    cotangents = tuple(normal(s) for s in (spec.output_shape, state, state))
    return spec, *(cast(cast(value, np.float32), np.float64) for value in (arrays, cotangents))


@st.composite
def problems(draw, used=True):
    (B, H, W, C), kernel, options = draw(convolutions())
    F = draw(st.sampled_from([1, 2, 5, 8, 20]))
    options["recurrent_dilation"] = draw(st.integers(1, 2))
    options["cell_clip"] = draw(st.sampled_from([None, None, 0.5]))
    options["go_backwards"], options["return_sequences"] = draw(st.booleans()), draw(st.booleans())
    return problem(
        (B, draw(st.integers(1, 3)), H, W, C), kernel, F,
        recurrent=draw(st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4))),
        bias=draw(st.booleans()), initial=draw(st.sampled_from(["", "h", "c", "hc"])),
        peephole=draw(st.sampled_from([None, None, "channel", "elementwise"])),
        mask=draw(st.sampled_from([None, -0.5, 0.5, 9])),
        used=draw(st.tuples(*[st.sampled_from(SMOOTH)] * 3)) if used else USUAL,
        seed=draw(st.integers(0, 99)), **options,
    )  # fmt: skip


def oracle(dtype, spec, arrays, cotangents):
    arrays, cotangents = cast(arrays, dtype), cast(cotangents, dtype)
    *outputs, saved = reference.convlstm2d(spec, *arrays, save=True)
    gradients = reference.convlstm2d_backward(spec, saved, *cotangents)
    if arrays[4] is None and arrays[5] is None:
        gradients |= {"h": None, "c": None}
    return get(None, {"y": outputs, "d": gradients})


def run(device, algorithm, dtype, spec, arrays, cotangents):
    """Outputs and gradients; the outputs alone have the same bits."""
    x, kernel, recurrent_kernel, bias, h, c, weights, mask = cast(arrays, dtype)
    arguments = put(device, x), kernel, recurrent_kernel, bias, put(device, h), put(device, c), weights, mask
    *alone, nothing = cuda.convlstm2d(spec, *arguments, algorithm=algorithm)
    assert nothing is None
    *outputs, saved = cuda.convlstm2d(spec, *arguments, algorithm=algorithm, save=True)
    cotangents = [put(device, cast(cotangent, dtype)) for cotangent in cotangents]
    found = get(device, {"y": outputs, "d": backward.convlstm2d_backward(spec, saved, *cotangents)})
    for name, value in get(device, {"y": alone}).items():
        np.testing.assert_array_equal(value, found[name])
    return found


@pytest.mark.parametrize(
    ("algorithm", "dtype", "number", "used", "examples"),
    [("simt", np.float32, 0, False, 8), ("simt", np.float32, 1, True, 30), ("simt", np.float32, 2, False, 15),
     ("simt", np.float64, 0, True, 15), ("simt", np.float64, 1, False, 10), ("float32", np.float32, 0, False, 5),
     ("float32", np.float32, 1, True, 4), ("float32", np.float32, 2, False, 8),
     ("float32", np.float32, 3, False, 10)],
)  # fmt: skip
def test_convlstm2d(algorithm, dtype, number, used, examples, monkeypatch, new_device):
    device = new_device()

    @settings(max_examples=examples)
    @given(problems(used))
    def check(case):
        with tiling(monkeypatch, number):
            found = run(device, algorithm, dtype, *case)
        within(found, oracle(np.float64, *case), oracle(np.float32, *case), dtype, roundings=32)

    check()


@pytest.mark.parametrize("algorithm", ROUNDING)
def test_reduced_precision(algorithm, monkeypatch, new_device):
    device, rounding = new_device(), ROUNDING[algorithm]

    @settings(max_examples=6)
    @given(problems(used=False))
    def check(case):
        case = replace(case[0], cell_clip=None), *case[1:]  # a clipped cell's gradient jumps
        with tiling(monkeypatch, 1):
            found = run(device, algorithm, np.float32, *case)
        near(found, oracle(np.float64, *case), 6 * rounding)

    check()


def test_algorithms_are_what_they_say(new_device):
    case = problem((2, 3, 6, 5, 4), (3, 3), 8)
    expected = oracle(np.float64, *case)
    for architecture, names in ((80, ("simt", "float32", *ROUNDING)), (70, ("auto",))):
        for algorithm in names:
            found = run(new_device(architecture), algorithm, np.float32, *case)
            error = max(abs(found[name] - value).max() for name, value in expected.items() if name[0] == "y")
            rounding = ROUNDING.get(algorithm, 1e-6)
            assert rounding / 30 < error < 4 * rounding, (algorithm, error)


@pytest.mark.parametrize("name", packing.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_activation(name, dtype, monkeypatch, new_device):
    """In every place, with large and small pre-activations."""
    device = new_device()
    for place in range(3):
        used = [*USUAL]
        used[place] = name
        spec, arrays, cotangents = problem((1, 2, 3, 3, 2), (1, 1), 4, used=used, seed=place)
        arrays = 3 * arrays[0], *arrays[1:]
        with tiling(monkeypatch, {4: 1, 8: 0}[np.dtype(dtype).itemsize]):
            found = run(device, "simt", dtype, spec, arrays, cotangents)
        case = spec, arrays, cotangents
        within(found, oracle(np.float64, *case), oracle(np.float32, *case), dtype, times=8, roundings=64)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_saturated_gates_reach_their_limits(dtype, new_device):
    """Pre-activations from -2000 to 2000, where exponentials overflow."""
    eps = np.finfo(dtype).eps
    spec, arrays, _ = problem((1, 1, 1, 5, 1), (1, 1), 1, bias=False, initial="")
    x = np.array([-2000, -100, 0, 100, 2000]).reshape(1, 1, 1, 5, 1)
    arrays = x.astype(float), np.ones((1, 1, 1, 4)), *arrays[2:]
    device = new_device()
    h, *_ = cuda.convlstm2d(spec, put(device, cast(arrays[0], dtype)), *cast(arrays[1:], dtype))
    limit = np.tanh(np.ones((), dtype))
    np.testing.assert_allclose(device.get(h).ravel(), [0, 0, 0, limit, limit], rtol=4 * eps, atol=2 * eps)


@pytest.mark.parametrize(("algorithm", "error"), [("float32", 1e-6), ("bfloat16", 5e-5), ("float16", 5e-5)])
def test_gates_have_the_digits_that_are_promised(algorithm, error, new_device):
    """Of a step without products: i, g and o by their biases, from the smallest to the largest."""
    F = 40
    z = np.concatenate([sign * np.geomspace(1e-5, 80, F // 2) for sign in (-1, 1)]).astype(np.float32)
    bias = np.stack([z[::-1], z, z, np.roll(z, 7)]).astype(np.float32)
    spec, arrays, _ = problem((1, 1, 1, 1, 1), (1, 1), F, initial="")
    arrays = np.zeros_like(arrays[0]), np.zeros_like(arrays[1]), arrays[2], bias.reshape(-1), *arrays[4:]
    _, h, c, _ = cuda.convlstm2d(spec, put(new_device(), cast(arrays[0], np.float32)), *cast(arrays[1:4], np.float32),
                                 None, None, None, None, algorithm=algorithm)  # fmt: skip
    i, _, g, o = bias.astype(np.float64)
    expected_c = np.tanh(g) / (1 + np.exp(-i))
    expected_h = np.tanh(expected_c) / (1 + np.exp(-o))
    found_h, found_c = (state.device.get(state).reshape(-1) for state in (h, c))
    np.testing.assert_allclose(found_c, expected_c, rtol=2 * error, atol=1e-37)
    np.testing.assert_allclose(found_h, expected_h, rtol=4 * error, atol=1e-37)


@pytest.mark.parametrize("algorithm", ["simt", "float32", "float16"])
def test_masked_frames_are_not_read(algorithm, new_device):
    device = new_device()
    spec, arrays, cotangents = problem((2, 3, 5, 4, 3), (3, 3), 4, mask=0, seed=1)
    mask = arrays[-1]
    assert 0 < mask.sum() < mask.size
    bad = np.where(mask[:, :, None, None, None], arrays[0], np.nan)
    for name, value in run(device, algorithm, np.float32, spec, (bad, *arrays[1:]), cotangents).items():
        assert np.isfinite(value).all(), name


def test_first_step_leaves_the_recurrent_convolution_out(new_device):
    device = new_device()
    spec, arrays, _ = problem((1, 1, 4, 4, 2), (3, 3), 3, initial="c")
    nothing = *arrays[:2], np.full_like(arrays[2], np.nan), *arrays[3:]
    for algorithm in ("simt", "float32", "bfloat16"):
        x, *others = cast(nothing, np.float32)
        others[3:5] = [put(device, state) for state in others[3:5]]
        output, *_ = cuda.convlstm2d(spec, put(device, x), *others, algorithm=algorithm)
        assert np.isfinite(device.get(output)).all()


@needs_compiler
def test_one_launch_a_step_in_one_graph():
    device = EmulatedDevice()
    spec, arrays, cotangents = problem((2, 5, 4, 4, 2), (3, 3), 3, initial="")
    x, *others = cast(arrays, np.float32)
    *_, saved = cuda.convlstm2d(spec, put(device, x), *others)
    assert [name for name, *_ in device.launches].count("convlstm2d_step") == 5
    assert device.graphs == [5]  # besides them the kernels were packed, once
    *_, saved = cuda.convlstm2d(spec, put(device, x), *others, save=True)
    device.launches.clear()
    backward.convlstm2d_backward(spec, saved, *(put(device, cast(d, np.float32)) for d in cotangents))
    assert [name for name, *_ in device.launches].count("convlstm2d_step_backward") == 5
    assert len(device.graphs) == 3


@pytest.mark.parametrize("algorithm", ["simt", "float32", "bfloat16"])
def test_every_run_and_every_batch_have_the_same_bits(algorithm, monkeypatch, new_device):
    device = new_device()
    spec, arrays, cotangents = problem((3, 2, 6, 5, 3), (3, 3), 5, peephole="elementwise", mask=0)
    first = run(device, algorithm, np.float32, spec, arrays, cotangents)
    again = run(device, algorithm, np.float32, spec, arrays, cotangents)
    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value)
    x, kernel, recurrent_kernel, bias, h, c, weights, mask = arrays
    part = x[1:], kernel, recurrent_kernel, bias, h[1:], c[1:], weights, mask[1:]
    part_of = tuple(cotangent[1:] for cotangent in cotangents)
    with tiling(monkeypatch, 2 if algorithm == "simt" else 1):
        found = run(device, algorithm, np.float32, spec.with_batch(2), part, part_of)
    for name in ("y 0 ", "y 1 ", "y 2 ", "d x ", "d h ", "d c "):
        np.testing.assert_array_equal(found[name], first[name][1:])


def test_cotangents_may_be_missing(new_device):
    device = new_device()
    spec, arrays, cotangents = problem((2, 2, 3, 4, 2), (3, 3), 3)
    x, *others = cast(arrays, np.float32)
    others[3:5] = [put(device, state) for state in others[3:5]]
    *_, saved = cuda.convlstm2d(spec, put(device, x), *others, save=True)
    *_, plain = reference.convlstm2d(spec, *arrays, save=True)
    for which in range(8):
        some = [cotangent if which >> n & 1 else None for n, cotangent in enumerate(cotangents)]
        found = get(
            device, backward.convlstm2d_backward(spec, saved, *(put(device, cast(d, np.float32)) for d in some))
        )
        near(found, get(None, reference.convlstm2d_backward(spec, plain, *some)), 1e-5)


def test_empty_batch(new_device):
    device = new_device()
    case = problem((0, 2, 4, 3, 2), (3, 3), 3, peephole="channel")
    found = run(device, "auto", np.float32, *case)
    for name, value in oracle(np.float64, *case).items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].shape == value.shape


def test_what_the_kernels_do_not_know_is_refused(new_device):
    device = new_device()
    spec, arrays, _ = problem((1, 1, 3, 3, 1), (1, 1), 1)
    x, *others = cast(arrays, np.float32)
    shapes = (1, 1, 3, 3, 1), (1, 1, 1, 4), (1, 1, 1, 4)
    usual = dict(zip(NAMES, map(activations.get, USUAL), strict=True))
    conv = ConvLSTMSpec.infer(*shapes, peephole_shapes=dict.fromkeys("ifo", (1, 1, 1, 1)), **usual)
    for refused, options, what in (
        (replace(spec, activation=activations.get((np.sin, np.cos))), {}, "activations of your own"),
        (replace(spec, normalization=Normalization("layer")), {}, "normalization"),
        (spec, {"dropout": {"x": np.ones((4, 1, 3, 3, 1), np.float32)}}, "dropout_masks"),
        (conv, {}, "convolutional peepholes"),
    ):
        with pytest.raises(NotImplementedError, match=f"engine 'cuda' does not know {what}; pass engine='cpu'"):
            cuda.convlstm2d(refused, device.put(x), *others, **options)


@pytest.mark.parametrize(("algorithm", "halo"), [("simt", False), ("float32", True), ("bfloat16", True)])
def test_a_step_in_shares_of_its_depth(algorithm, halo, monkeypatch, new_device):
    """The first step without h; the gates follow when all shares are added."""

    def choose_cut(kind, dtype, device, pixels, columns, depth, *, frame, windows):
        return (product.halo_tilings(kind, frame, tuple(windows)) if halo else product.tilings(kind, 4))[-1], 3

    monkeypatch.setattr(choice, "choose_cut", choose_cut)
    case = problem((2, 2, 5, 7, 3), (3, 3), 72, initial="c", peephole="elementwise", mask=0)
    found, expected = run(new_device(90), algorithm, np.float32, *case), oracle(np.float64, *case)
    if algorithm == "bfloat16":
        near(found, expected, 6 * ROUNDING[algorithm])
    else:
        within(found, expected, oracle(np.float32, *case), np.float32, roundings=32)


def test_shares_of_a_step_are_whole_chunks_of_a_halo():
    def frames(blocks, chunk):
        return SimpleNamespace(blocks=blocks, halo=chunk and SimpleNamespace(chunk=chunk))

    assert cuda._cut(frames(5, None), frames(18, None), 4) == (6, 6, 4)
    assert cuda._cut(frames(3, 9), frames(32, 9), 2) == (3 + 18, 18, 2)  # the last chunk has few channels
    assert cuda._cut(frames(5, 25), frames(32, 9), 4) == (5 + 9, 9, 4)
    assert cuda._cut(frames(18, 9), frames(18, 9), 3) == (18, 18, 2)  # none is empty
    assert cuda._cut(frames(14, 9), frames(18, 9), 3)[2] == cuda._cut(frames(50, 25), frames(18, 9), 3)[2] == 1
