"""Recorded calls: what was written down of one call is right for others, whatever comes between."""

import importlib
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from cuda_cases import cast, get, near, put
from cuda_emulator import EmulatedDevice, needs_compiler
from test_cuda_convlstm2d import oracle, problem, run

import fastclstm
from fastclstm import functional
from fastclstm.engines import reference
from fastclstm.engines.cuda import backward, devices, product, recorded

cuda = importlib.import_module("fastclstm.engines.cuda.convlstm2d")

FORMS = [
    {"initial": ""},
    {"initial": "hc", "mask": 0},
    {"initial": "c", "bias": False, "go_backwards": True},
    {"peephole": "elementwise", "return_sequences": False, "mask": -0.5},
    {"peephole": "channel", "cell_clip": 0.5, "padding_mode": "circular"},
]
"""Calls that differ in what is there."""


@pytest.fixture
def plans(monkeypatch):
    """The plans of one test."""
    monkeypatch.setattr(recorded, "_plans", {})
    return recorded._plans


def case(form, seed):
    return problem((2, 3, 5, 4, 3), (3, 3), 4, seed=seed, **form)


@pytest.mark.parametrize("algorithm", ["simt", "float32", "bfloat16"])
def test_a_plan_is_right_for_other_arrays(algorithm, plans, new_device):
    device = new_device()
    for seed in range(3):
        for form in FORMS:
            spec, arrays, cotangents = case(form, seed)
            found = run(device, algorithm, np.float32, spec, arrays, cotangents)
            near(found, oracle(np.float64, spec, arrays, cotangents), 0.05 if algorithm == "bfloat16" else 1e-5)
        if not seed:
            known = list(plans)
    assert set(known) == set(plans)
    assert len(known) == 3 * len(FORMS)  # without and with what is saved, and backward
    assert len(device.graphs) == len(known)


def test_convolutions(plans, new_device):
    device = new_device()
    with devices.using(device):
        for seed in range(4):
            normal = np.random.default_rng(seed).standard_normal
            x, kernel, bias = (normal(shape).astype(np.float32) for shape in ((2, 6, 5, 3), (3, 3, 3, 4), (4,)))
            y, pullback = functional.conv2d_vjp(x, kernel, bias, engine="cuda")
            expected, pull = functional.conv2d_vjp(x, kernel, bias, engine="reference")
            near({"y": y} | pullback(y), {"y": expected} | pull(expected), 1e-5)
    assert len(plans) == 2


def test_alignment_is_part_of_a_form(plans, new_device):
    """Kernels read aligned arrays in pieces of 16 bytes."""
    device = new_device()
    spec, arrays, _ = problem((1, 2, 4, 4, 4), (3, 3), 4)
    x, *others = cast(arrays, np.float32)
    expected = get(None, reference.convlstm2d(spec, x, *others)[:3])
    for _ in range(2):
        for bytes_before in (0, 4, 16, 20):
            there = device.put(np.concatenate([np.zeros(bytes_before // 4, np.float32), x.ravel()]))
            shifted = replace(product.offset(there, bytes_before // 4), shape=x.shape)
            state = put(device, others[3]), put(device, others[4])
            found = cuda.convlstm2d(spec, shifted, *others[:3], *state, *others[5:])
            near(get(device, found[:3]), expected, 1e-5)
    assert len(plans) == 2


def test_results_are_new(plans, new_device):
    device = new_device()
    spec, arrays, _ = case(FORMS[0], 0)
    x, *others = cast(arrays, np.float32)
    first = cuda.convlstm2d(spec, put(device, x), *others)[:3]
    before = get(device, first)
    second = cuda.convlstm2d(spec, put(device, 2 * x), *others)[:3]
    for name, value in get(device, first).items():
        np.testing.assert_array_equal(value, before[name])
    assert len({array.pointer for array in (*first, *second)}) == 6
    assert all(array.device is device for array in first)


class Slow(EmulatedDevice):
    """A device to which launches come late, so that threads get in each other's way."""

    def send(self, graph):
        time.sleep(0.01)
        super().send(graph)


@needs_compiler
def test_threads(plans):
    device = Slow()
    cases = [case(FORMS[1], seed) for seed in range(2)]
    results = [[], []]

    def work(n):
        spec, arrays, _ = cases[n]
        x, kernel, recurrent_kernel, bias, h, c, weights, mask = cast(arrays, np.float32)
        for _ in range(8):
            arguments = put(device, x), kernel, recurrent_kernel, bias, put(device, h), put(device, c), weights, mask
            results[n].append(get(device, cuda.convlstm2d(spec, *arguments)[:3]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(map(len, results)) == [8, 8]
    for (spec, arrays, _), found in zip(cases, results, strict=True):
        expected = get(None, reference.convlstm2d(spec, *arrays)[:3])
        for one in found:
            near(one, expected, 1e-5)
    assert len(plans) == 1


def test_weights_that_change_in_place_are_seen(plans, new_device):
    device = new_device()
    spec, arrays, _ = case(FORMS[4], 0)
    x, *others = cast(arrays, np.float32)
    kernel, recurrent_kernel, bias, h, c, weights, mask = others
    for changed in (kernel, recurrent_kernel, bias, weights["o"], kernel):
        changed[...] *= -0.5
        states = put(device, h), put(device, c)
        found = cuda.convlstm2d(spec, put(device, x), kernel, recurrent_kernel, bias, *states, weights, mask)[:3]
        near(get(device, found), get(None, reference.convlstm2d(spec, x, *others)[:3]), 1e-5)
    assert len(plans) == 1


def test_weights_on_the_device_that_change_in_place_are_seen(plans, new_device):
    device = new_device()
    spec, arrays, cotangents = case(FORMS[0], 0)
    x, *others = cast(arrays, np.float32)
    there = [put(device, array) for array in others[:3]]
    for factor in (1, -0.5):
        for array, weights in zip(there, others[:3], strict=True):
            cuda.copy(device, device.put(factor * weights), array.size, array, array.size, array.size, 1)
        now = [factor * weights for weights in others[:3]]
        *outputs, saved = cuda.convlstm2d(spec, put(device, x), *there, *others[3:], save=True)
        alone = cuda.convlstm2d(spec, put(device, x), *there, *others[3:])[:3]
        gradients = backward.convlstm2d_backward(spec, saved, *(put(device, cast(d, np.float32)) for d in cotangents))
        expected = oracle(np.float64, spec, (arrays[0], *cast(now, np.float64), *arrays[4:]), cotangents)
        near(get(device, {"y": outputs, "d": gradients}), expected, 1e-5)
        near(get(device, {"y": alone}), {name: expected[name] for name in expected if name[0] == "y"}, 1e-5)
    assert len(plans) == 3


def test_weights_of_layers_are_brought_once_and_replaced_ones_seen(plans, new_device):
    device = new_device()
    layer = fastclstm.ConvLSTM2D(2, 3, 3, seed=0, engine="cuda")
    plain = fastclstm.ConvLSTM2D(2, 3, 3, seed=0, engine="reference")
    x = np.random.default_rng(0).standard_normal((1, 2, 5, 4, 2)).astype(np.float32)
    with devices.using(device):
        for n in range(4):
            if n == 2:
                for changed in (layer, plain):
                    changed.set_parameters({name: -array for name, array in changed.parameters.items()})
            device.launches.clear()
            np.testing.assert_allclose(layer(x), plain(x), atol=1e-5)
            assert [name for name, *_ in device.launches].count("pack") == (0 if n % 2 else 2)
    assert len(plans) == 1


def test_packed_weights_serve_sequences_of_every_length(plans, new_device):
    device = new_device()
    layer = fastclstm.ConvLSTM2D(2, 3, 3, seed=0, engine="cuda")
    packs = []
    with devices.using(device):
        for T in (2, 3, 2):
            device.launches.clear()
            layer(np.ones((1, T, 5, 4, 2), np.float32))
            packs.append([name for name, *_ in device.launches].count("pack"))
    assert packs == [2, 0, 0]


def test_nested_results_and_parts_of_arrays(plans, new_device):
    device = new_device()

    def compute(x, nothing):
        y = x.device.zeros((2, 4), np.float32)
        constant = x.device.put(np.arange(4, dtype=np.float32))
        assert x.device.put(np.arange(4, dtype=np.float32)) is constant
        for n, source in enumerate((x, constant)):
            cuda.copy(x.device, source, 4, product.offset(y, 4 * n), 4, 4, 1)
        second = replace(product.offset(y, 4), shape=(2, 2))
        return {"all": y, "parts": (second, nothing, product.offset(x, 1))}, x.device.zeros((3, 5), np.float64)

    for value in (1, 2):
        x = device.put(np.full(4, value, np.float32))
        found, zeros = recorded.call(device, "key", (x, None), compute)
        np.testing.assert_array_equal(device.get(found["all"]), [[value] * 4, [0, 1, 2, 3]])
        second, nothing, rest = found["parts"]
        np.testing.assert_array_equal(device.get(second), [[0, 1], [2, 3]])
        np.testing.assert_array_equal(device.get(rest), [value] * 3)
        assert rest.pointer == x.pointer + 4
        assert nothing is None
        np.testing.assert_array_equal(device.get(zeros), np.zeros((3, 5)))
    assert len(device.graphs) == 1


def test_a_call_within_a_call_is_a_part_of_it(plans, new_device):
    device = new_device()
    spec, arrays, _ = case(FORMS[1], 0)
    x, *others = cast(arrays, np.float32)

    def compute(*given):
        *_, h, c = cuda.convlstm2d(spec, given[0], *given[1:6], None, given[6])[:3]
        return cuda.convlstm2d(spec, given[0], *given[1:4], h, c, None, given[6])[:3]

    expected = reference.convlstm2d(spec, x, *others)[:3]
    expected = reference.convlstm2d(spec, x, *others[:3], *expected[1:], *others[5:])[:3]
    for _ in range(2):
        mask = device.put(others[-1].view(np.uint8))
        given = [put(device, array) for array in (x, *others[:5])]
        near(get(device, recorded.call(device, "key", (*given, mask), compute)), get(None, expected), 1e-5)
    assert len(plans) == len(device.graphs) == 1


@needs_compiler
def test_what_is_let_go_makes_room(plans):
    """Five arrays between x and y: two live at a time, and the first to the end."""
    device = EmulatedDevice()
    sizes = []
    device.scratch = lambda wanted: sizes.append(wanted) or EmulatedDevice.scratch(device, wanted)

    def compute(x):
        first = step(x, 4)
        there = first
        for count in (8, 2, 8, 4):
            there = step(there, count)
        y = step(there, 4)
        cuda.copy(x.device, first, 4, product.offset(y, 3), 0, 1, 1)
        return y

    def step(x, count):
        """The first element of x, twice."""
        y = x.device.zeros((count,), np.float32)
        for at in range(2):
            cuda.copy(x.device, x, 0, product.offset(y, at), 0, 1, 1)
        return y

    for value in (3, 4):
        y = recorded.call(device, "key", (device.put(np.full(4, value, np.float32)),), compute)
        np.testing.assert_array_equal(device.get(y), [value, value, 0, value])
    assert sizes == [[16, 32, 16]] * 2


@pytest.mark.parametrize("count", [15, 16, 31, 32, 63])
def test_as_many_arrays_as_there_may_be(count, plans, new_device):
    device = new_device()

    def compute(*arrays):
        y = arrays[0].device.empty((count,), np.float32)
        for n, x in enumerate(arrays):
            cuda.copy(x.device, x, 0, product.offset(y, n), 0, 1, 1)
        return y

    for first in (0, 100):
        x = np.arange(first, first + count, dtype=np.float32)
        y = recorded.call(device, "key", tuple(device.put(x[n : n + 1]) for n in range(count)), compute)
        np.testing.assert_array_equal(device.get(y), x)


def test_zeros_of_every_size(plans, new_device):
    device = new_device()
    for size in (1, 15, 16, 17, 4095, 4096, 4097):
        x = device.put(np.ones(size, np.uint8))
        zeros = recorded.call(device, size, (x,), lambda x: x.device.zeros(x.shape, x.dtype))
        np.testing.assert_array_equal(device.get(zeros), np.zeros(size))


def test_an_array_that_was_not_given_is_refused(plans, new_device):
    device = new_device()
    other = device.put(np.ones(4, np.float32))

    def compute(x):
        y = x.device.empty((4,), np.float32)
        cuda.copy(x.device, other, 4, y, 4, 4, 1)
        return y

    with pytest.raises(AssertionError, match="an array that the call was not given"):
        recorded.call(device, "key", (other,), compute)
    assert not plans


def test_a_call_that_fails_is_not_remembered(plans, new_device):
    device = new_device()
    spec, arrays, _ = problem((1, 1, 2, 2, 1), (1, 1), 1, initial="")
    x, *others = cast(arrays, np.float32)
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(product, "MOST_PIXELS", 3)
            with pytest.raises(ValueError, match="split the batch"):
                cuda.convlstm2d(spec, put(device, x), *others)
        assert not plans
    cuda.convlstm2d(spec, put(device, x), *others)
    assert len(plans) == 1
