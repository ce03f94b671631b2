"""Backpropagation through time on the cuda engine: what it keeps, what is taken forward again, gradients in 16 bits."""

import gc
import importlib
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from cuda_cases import ROUNDING, cast, get, put, within
from cuda_emulator import EmulatedDevice, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_convlstm2d import oracle, problem, problems

from fastclstm.engines import reference
from fastclstm.engines.cuda import backward, choice, product, recorded
from fastclstm.engines.cuda.device import DeviceArray

cuda = importlib.import_module("fastclstm.engines.cuda.convlstm2d")

WEIGHTS = ("d kernel ", "d recurrent_kernel ", "d bias ", "d peephole i ", "d peephole f ", "d peephole o ")
"""Gradients that are sums over the steps."""

SINGLE = np.dtype(np.float32)


def run(device, algorithm, case, save, dtype=np.float32):
    """Outputs and gradients, and what the forward pass saved."""
    spec, arrays, cotangents = case
    arguments = put(device, cast(arrays[0], dtype)), *cast(arrays[1:4], dtype)
    states = [put(device, cast(state, dtype)) for state in arrays[4:6]]
    *outputs, saved = cuda.convlstm2d(spec, *arguments, *states, *cast(arrays[6:], dtype), algorithm=algorithm,
                                      save=save)  # fmt: skip
    d = [put(device, cast(cotangent, dtype)) for cotangent in cotangents]
    return get(device, {"y": outputs, "d": backward.convlstm2d_backward(spec, saved, *d)}), saved


# --- Depth in shares ---


@pytest.mark.parametrize(("algorithm", "architecture"), [("simt", 80), ("float32", 80), ("bfloat16", 90)])
@pytest.mark.parametrize("options", [{"mask": 0.0, "peephole": "channel"}, {"strides": 2, "go_backwards": True}])
def test_products_of_the_way_back_may_be_cut_into_shares(algorithm, architecture, options, monkeypatch, new_device):
    """Of their depth: other sums, but the same ones again; each a launch of its own before a step's."""
    device, case = new_device(architecture), problem((2, 3, 5, 4, 3), (3, 3), 5, **options)
    if architecture == 90:
        monkeypatch.setattr(choice, "choose", lambda kind, *_, **__: product.warpgroup_tilings(kind)[-1])
    whole, _ = run(device, algorithm, case, True)
    monkeypatch.setattr(choice, "shares", lambda *arguments: min(3, arguments[-1]))
    recorded._plans.clear()
    cut, again = (run(device, algorithm, case, True)[0] for _ in range(2))
    for name, value in whole.items():
        np.testing.assert_array_equal(again[name], cut[name], err_msg=name)
        scale = ROUNDING.get(algorithm, 1e-6) * 10 * abs(value).max()
        np.testing.assert_allclose(cut[name], value, rtol=0, atol=scale, err_msg=name)


@needs_compiler
def test_a_share_is_a_layer_of_the_grid(monkeypatch):
    device, case = EmulatedDevice(), problem((1, 3, 5, 4, 3), (3, 3), 5)
    monkeypatch.setattr(choice, "shares", lambda *_: 3)
    recorded._plans.clear()
    run(device, "simt", case, True)
    steps = [(name, grid[2]) for name, grid, _ in device.launches if name in ("conv2d", "convlstm2d_step_backward")]
    assert steps == [("convlstm2d_step_backward", 1), *[("conv2d", 3), ("convlstm2d_step_backward", 1)] * 2,
                     ("conv2d", 3), ("conv2d", 1)]  # fmt: skip


# --- Pieces ---


@pytest.mark.parametrize(
    ("algorithm", "dtype", "examples"),
    [("simt", np.float32, 25), ("simt", np.float64, 10), ("float32", np.float32, 8), ("bfloat16", np.float32, 12),
     ("float16", np.float32, 6)],
)  # fmt: skip
def test_pieces_give_the_same(algorithm, dtype, examples, monkeypatch, new_device):
    """All bits, but of sums over the steps, which have another order."""
    device = new_device()

    @settings(max_examples=examples)
    @given(problems(), st.integers(1, 3), st.integers(1, 7), st.integers(0, 9))
    def check(case, length, T, seed):
        spec, (x, *others, mask), (dy, *d) = case
        rng = np.random.default_rng(seed)
        spec = replace(spec, T=T)
        x, dy = rng.standard_normal((spec.B, T, *x.shape[2:])), rng.standard_normal(spec.output_shape)
        mask = None if mask is None else rng.random((spec.B, T)) > 0.5
        case = spec, (x, *others, mask), (dy, *d)
        whole, saved = run(device, algorithm, case, True, dtype)
        monkeypatch.setattr(cuda, "piece_length", lambda *_: length)
        pieces, saved_states = run(device, algorithm, case, "states", dtype)
        assert saved.starts[0].shape[0] == 0
        assert saved_states.starts[0].shape[0] == -(-T // length) - 1
        assert whole.keys() == pieces.keys()
        for name, value in whole.items():
            if name in WEIGHTS:
                bound = 16 * np.finfo(dtype).eps * max(1, np.abs(value).max(initial=0))
                np.testing.assert_allclose(pieces[name], value, rtol=0, atol=bound, err_msg=name)
            else:
                np.testing.assert_array_equal(pieces[name], value, err_msg=name)

    check()


@pytest.mark.parametrize("algorithm", ["simt", "bfloat16"])
@pytest.mark.parametrize("go_backwards", [False, True])
@pytest.mark.parametrize("return_sequences", [False, True])
def test_a_second_time_gives_the_same_bits(algorithm, go_backwards, return_sequences, new_device):
    """What was kept has been used up: all steps are taken forward again."""
    device = new_device()
    case = problem((2, 3, 5, 4, 3), (3, 3), 5, peephole="channel", mask=0, go_backwards=go_backwards,
                   return_sequences=return_sequences)  # fmt: skip
    first, saved = run(device, algorithm, case, True)
    assert not saved.kept
    cotangents = [put(device, cast(d, np.float32)) for d in case[2]]
    again = get(device, {"d": backward.convlstm2d_backward(case[0], saved, *cotangents)})
    for name, value in again.items():
        np.testing.assert_array_equal(first[name], value, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("algorithm", ["simt", "float32"])
def test_many_pieces_against_the_oracle(algorithm, dtype, new_device):
    device = new_device()
    for options in ({"mask": 0.3}, {"peephole": "elementwise", "go_backwards": True}, {"initial": ""}):
        case = problem((2, 11, 4, 5, 3), (3, 2), 4, **options)
        assert cuda.piece_length(case[0], 0, np.dtype(dtype)) < 11 / 3
        found, _ = run(device, algorithm, case, "states", dtype)
        within(found, oracle(np.float64, *case), oracle(np.float32, *case), dtype, roundings=32)


def test_cotangents_may_be_missing_of_pieces(new_device):
    device = new_device()
    for sequences in (False, True):
        case = problem((1, 5, 3, 4, 2), (3, 3), 3, mask=0, return_sequences=sequences)
        spec, arrays, cotangents = case
        for which in range(8):
            some = [cotangent if which >> n & 1 else None for n, cotangent in enumerate(cotangents)]
            found, _ = run(device, "simt", (spec, arrays, some), "states")
            expected, plain = (oracle(dtype, spec, arrays, some) for dtype in (np.float64, np.float32))
            within(found, expected, plain, np.float32, roundings=32)


@pytest.mark.parametrize("T", [1, 2, 3, 10, 25, 100, 1000])
@pytest.mark.parametrize("kind", [0, 1, 4, 5])
def test_length_of_pieces(T, kind):
    spec, *_ = problem((1, 1, 8, 8, 4), (3, 3), 16)
    length = cuda.piece_length(replace(spec, T=T), kind, SINGLE)
    assert 1 <= length <= T
    assert length <= max(1, T**0.5)
    assert length >= T**0.5 / 3


# --- Memory ---


class Counting(EmulatedDevice):
    """Counts the bytes that are allocated, and the most there were."""

    def __init__(self):
        super().__init__()
        self.bytes = self.most = 0

    def empty(self, shape, dtype):
        array = super().empty(shape, dtype)
        self.bytes += array.nbytes
        self.most = max(self.most, self.bytes)
        weakref.finalize(array.owner, self._less, array.nbytes)
        return array

    def _less(self, count):
        self.bytes -= count


B, T, SIZE, C, F = 2, 24, 16, 3, 8
STATE = B * SIZE * SIZE * F * 4
"""Bytes of h."""


def memory(algorithm, save, **options):
    """States that the forward pass leaves, and the most that there are on the way back, besides its arguments."""
    device = Counting()
    spec, arrays, cotangents = problem((B, T, SIZE, SIZE, C), (1, 1), F, initial="", **options)
    forward = partial(cuda.convlstm2d, spec, *put_all(device, cast(arrays, np.float32)), algorithm=algorithm)
    forward(save=save)  # what a plan keeps is not counted
    cotangents = [put(device, cast(d, np.float32)) for d in cotangents]
    gc.collect()
    before = device.bytes
    saved = forward(save=save)[-1]
    kept = device.bytes - before
    device.most = 0
    backward.convlstm2d_backward(spec, saved, *cotangents)
    return kept / STATE, (device.most - before) / STATE


def put_all(device, arrays):
    """Arrays on the device, peepholes and masks too."""
    return [device.put(a.view(np.uint8)) if isinstance(a, np.ndarray) and a.dtype == bool else put(device, a)
            for a in arrays]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(
    ("algorithm", "options", "kept"),
    [("simt", {}, 5 * T + 1), ("float32", {}, 5 * T + 1), ("float16", {}, 5 * T + 1),
     ("simt", {"peephole": "elementwise", "mask": 0}, 5 * T + 1),
     ("bfloat16", {}, 2 * T + T + 1 + (T + 1) / 2 + T * 8 / F / 2)],
)  # fmt: skip
def test_what_is_kept(algorithm, options, kept):
    """z and c; for bfloat16 z in 2 bytes, h and x with 8 channels too."""
    found, most = memory(algorithm, True, **options)
    assert found == kept
    h = T + 1 if options else 0
    rest = 2 + T * C / F + 2 * ("mask" in options)  # two states dc, dx, and two states that masked steps hand on
    assert kept + h < most < kept + h + rest + 3


@needs_compiler
@pytest.mark.parametrize(
    ("algorithm", "options"), [("simt", {}), ("float32", {}), ("simt", {"mask": 0}), ("bfloat16", {})]
)
def test_what_is_kept_for_pieces(algorithm, options):
    """States where pieces begin."""
    spec, *_ = problem((B, T, SIZE, SIZE, C), (1, 1), F)
    kind = product.KINDS[algorithm]
    length = cuda.piece_length(spec, kind, SINGLE)
    pieces = -(-T // length)
    x = T * 8 / F / 2 if algorithm == "bfloat16" else 0
    kept, most = memory(algorithm, "states", **options)
    assert kept == x + 2 * (pieces - 1)
    whole = memory(algorithm, True, **options)[1]
    step = {"simt": 5, "float32": 5, "bfloat16": 4}[algorithm] + 1 + 2 * C / F  # z, c, h; dy; x and dx
    assert most - kept < T * C / F + length * step + 12  # dx and states beside it
    assert most < 0.6 * whole


# --- 16 bits ---


def bfloat16(x):
    """x rounded to bfloat16, in float64."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def model(spec, x, kernel, recurrent_kernel, bias, h, c, dy, dh, dc):
    """Gradients of the usual cell in float64, but with the operands of all products, and z, rounded to bfloat16."""
    x, h = bfloat16(x), bfloat16(h)
    kernels = bfloat16(kernel), bfloat16(recurrent_kernel)

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    zs, cs, hs = [], [c], [h]
    for t in range(spec.T):
        z = sum(reference.conv2d(*job, None) for job in ((spec.input, x[:, t], kernels[0]),
                                                         (spec.recurrent, h, kernels[1]))) + bias  # fmt: skip
        i, f, g, o = np.split(z, 4, -1)
        cs.append(sigmoid(f) * cs[-1] + sigmoid(i) * np.tanh(g))
        h = bfloat16(sigmoid(o) * np.tanh(cs[-1]))
        zs.append(bfloat16(z))
        hs.append(h)
    dx, weights = np.empty_like(x), [0, 0, 0]
    for t in reversed(range(spec.T)):
        i, f, g, o = np.split(zs[t], 4, -1)
        i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        c_t = f * cs[t] + i * g
        dh_t = dy[:, t] + dh
        dc = dc + dh_t * o * (1 - np.tanh(c_t) ** 2)
        dz = bfloat16(np.concatenate([dc * g * i * (1 - i), dc * cs[t] * f * (1 - f), dc * i * (1 - g * g),
                                      dh_t * np.tanh(c_t) * o * (1 - o)], -1))  # fmt: skip
        dc = dc * f
        dh, *of_h = reference.conv2d_backward(spec.recurrent, hs[t], kernels[1], dz)
        dx[:, t], *of_x = reference.conv2d_backward(spec.input, x[:, t], kernels[0], dz)
        weights = [so_far + now for so_far, now in zip(weights, (of_x[0], *of_h), strict=True)]
    return {"x": dx, "kernel": weights[0], "recurrent_kernel": weights[1], "bias": weights[2], "h": dh, "c": dc}


@pytest.mark.parametrize(("F", "C"), [(8, 4), (5, 1)])
def test_bfloat16_rounds_what_it_should_and_nothing_else(F, C, new_device):
    device = new_device()
    case = problem((2, 4, 6, 5, C), (3, 3), F, seed=4)
    spec, (x, kernel, recurrent_kernel, bias, h, c, *_), cotangents = case
    found, _ = run(device, "bfloat16", case, True)
    expected = model(spec, x, kernel, recurrent_kernel, bias, h, c, *cotangents)
    exact = oracle(np.float64, *case)
    for name, value in expected.items():
        largest, key = np.abs(value).max(), f"d {name} "
        error, rounding = np.abs(found[key] - value).max(), np.abs(exact[key] - value).max()
        assert ROUNDING["bfloat16"] / 8 < rounding / largest < 2 * ROUNDING["bfloat16"], name
        assert error < rounding / 8, (name, error, rounding)  # a value near a tie goes the other way


def test_float16_gradients_outlive_its_range(new_device):
    """Gradients of 1e-6, of which float16 would keep no digits, have as many as any."""
    device = new_device()
    spec, arrays, cotangents = problem((1, 3, 5, 4, 3), (3, 3), 4)
    small = tuple(1e-6 * d for d in cotangents)
    found, _ = run(device, "float16", (spec, arrays, small), True)
    for name, value in oracle(np.float64, spec, arrays, small).items():
        if name.startswith("d"):
            assert np.abs(found[name] - value).max() < 4 * ROUNDING["tf32"] * np.abs(value).max(), name


def test_bfloat16_saves_operands(new_device):
    device = new_device()
    spec, arrays, _ = problem((2, 3, 5, 4, 3), (3, 3), 5)
    for algorithm, dtype, channels in (("bfloat16", np.uint16, (8, 24)), ("float16", np.float32, (3, 20))):
        x, *others = (value if isinstance(value, dict) else put(device, value) for value in cast(arrays, np.float32))
        saved = cuda.convlstm2d(spec, x, *others, algorithm=algorithm, save=True)[-1]
        for array, count in zip((saved.x, saved.kept[0].z), channels, strict=True):
            assert isinstance(array, DeviceArray)
            assert array.dtype == dtype
            assert array.shape[-1] == count
