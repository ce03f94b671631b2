import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layer_checks import close, differences, equal, normal

from fastclstm import functional
from fastclstm.functional import volumes
from fastclstm.spec import Conv3DSpec


@pytest.fixture(params=["reference", "cpu"])
def engine(request, directly):
    return request.param


def naive(x, kernel, bias, strides, pads, dilation, mode):
    """Cross-correlation of volumes, one tap at a time."""
    padded = np.pad(x, ((0, 0), *pads, (0, 0)), mode="wrap" if mode == "circular" else "constant")
    windows = [(k - 1) * d + 1 for k, d in zip(kernel.shape, dilation, strict=False)]
    TO, HO, WO = ((n - w) // s + 1 for n, w, s in zip(padded.shape[1:4], windows, strides, strict=True))
    y = np.zeros((len(x), TO, HO, WO, kernel.shape[-1])) + bias
    for t, h, w in np.ndindex(kernel.shape[:3]):
        tap = padded[:, t * dilation[0] :: strides[0], h * dilation[1] :: strides[1], w * dilation[2] :: strides[2]]
        y += tap[:, :TO, :HO, :WO] @ kernel[t, h, w]
    return y


CASES = [
    ((3, 3, 3), 1, ((1, 1), (1, 1), (1, 1)), 1, "zeros"),
    ((2, 3, 4), 1, "valid", 1, "zeros"),
    ((1, 1, 1), (2, 1, 3), "valid", 1, "zeros"),
    ((4, 2, 3), (2, 3, 1), ((3, 0), (1, 2), (0, 1)), 1, "zeros"),
    ((3, 2, 3), 1, ((2, 3), (1, 0), (2, 2)), (2, 1, 2), "zeros"),
    ((3, 3, 2), 1, ((1, 1), (1, 1), (0, 1)), 1, "circular"),
    ((3, 3, 3), (3, 1, 2), ((4, 2), (1, 1), (2, 1)), 1, "circular"),
]


@pytest.mark.parametrize(("size", "strides", "padding", "dilation", "mode"), CASES)
def test_against_a_sum_over_taps(engine, size, strides, padding, dilation, mode):
    x, kernel, bias = normal(2, 5, 7, 6, 3), normal(*size, 3, 4, seed=2), normal(4, seed=3)
    y = functional.conv3d(x, kernel, bias, strides=strides, padding=padding, dilation=dilation, padding_mode=mode,
                          engine=engine)  # fmt: skip
    pads = ((0, 0),) * 3 if padding == "valid" else padding
    three = [(value,) * 3 if isinstance(value, int) else value for value in (strides, dilation)]
    close(y, naive(x, kernel, bias, three[0], pads, three[1], mode))


three = st.tuples(*[st.integers(1, 3)] * 3)


@settings(max_examples=60)
@given(shape=st.tuples(*[st.integers(1, 5)] * 3), size=st.tuples(*[st.integers(1, 4)] * 3), strides=three,
       dilation=three, pads=st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 3),
       mode=st.sampled_from(["zeros", "circular"]), engine=st.sampled_from(["reference", "cpu"]),
       channels=st.integers(1, 3), filters=st.integers(1, 5), fortran=st.booleans())  # fmt: skip
def test_any_geometry(shape, size, strides, dilation, pads, mode, engine, channels, filters, fortran):
    """Values, and the law of transposes: y is linear in x, so <y(x), dy> = <x, dx>, and likewise of the kernel."""
    dilation = (1, 1, 1) if max(strides) > 1 else dilation
    assume(all(n + sum(p) > (k - 1) * d for n, p, k, d in zip(shape, pads, size, dilation, strict=True)))
    x, kernel = normal(2, *shape, channels), normal(*size, channels, filters, seed=2)
    x = np.asfortranarray(x) if fortran else x
    options = {"strides": strides, "padding": pads, "dilation": dilation, "padding_mode": mode, "engine": engine}
    y, pullback = functional.conv3d_vjp(x, kernel, **options)
    close(y, naive(x, kernel, 0, strides, pads, dilation, mode))
    dy = normal(*y.shape, seed=3)
    gradients = pullback(dy)
    close(np.sum(x * gradients["x"]), np.sum(y * dy), 1e-10)
    close(np.sum(kernel * gradients["kernel"]), np.sum(y * dy), 1e-10)


@pytest.mark.parametrize(("size", "stride"), list(itertools.product([1, 2, 3, 4], [1, 2, 3])))
def test_same_padding_of_time_is_that_of_height(size, stride):
    """With the axes exchanged, the one-dimensional kernels do the same on both: even totals' rest goes after."""
    x, kernel = normal(2, 7, 7, 3, 2), normal(size, 2, 3, seed=2)
    over_time = functional.conv3d(x, kernel[:, None, None], strides=(stride, 1, 1), engine="reference")
    over_height = functional.conv3d(x.swapaxes(1, 2), kernel[None, :, None], strides=(1, stride, 1), engine="reference")
    close(over_time, over_height.swapaxes(1, 2))
    assert over_time.shape[1] == -(-7 // stride)


@pytest.mark.torch
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, (1, 0, 2), 1), (1, (2, 1, 0), (1, 2, 1))])
def test_values_and_gradients_of_torch(engine, stride, padding, dilation):
    torch = pytest.importorskip("torch")
    x, kernel, bias = normal(2, 6, 7, 8, 3), normal(3, 2, 3, 3, 5, seed=2), normal(5, seed=3)
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, kernel, bias)]
    theirs = torch.nn.functional.conv3d(leaves[0].permute(0, 4, 1, 2, 3), leaves[1].permute(4, 3, 0, 1, 2), leaves[2],
                                        stride=stride, padding=padding, dilation=dilation)  # fmt: skip
    theirs = theirs.permute(0, 2, 3, 4, 1)
    y, pullback = functional.conv3d_vjp(x, kernel, bias, strides=stride, padding=padding, dilation=dilation,
                                        engine=engine)  # fmt: skip
    close(y, theirs.detach().numpy())
    dy = normal(*y.shape, seed=4)
    theirs.backward(torch.tensor(dy))
    gradients = pullback(dy)
    assert list(gradients) == ["x", "kernel", "bias"]
    for gradient, leaf in zip(gradients.values(), leaves, strict=True):
        close(gradient, leaf.grad.numpy(), 1e-11)


@pytest.mark.parametrize(("size", "strides", "padding", "dilation", "mode"), CASES)
def test_gradients_by_central_differences(engine, size, strides, padding, dilation, mode):
    arrays = normal(2, 4, 5, 4, 2), normal(*size, 2, 3, seed=2), normal(3, seed=3)
    options = {"strides": strides, "padding": padding, "dilation": dilation, "padding_mode": mode, "engine": engine}
    y, pullback = functional.conv3d_vjp(*arrays, **options)
    dy = normal(*y.shape, seed=4)
    gradients = pullback(dy)
    for index, name in enumerate(("x", "kernel", "bias")):

        def loss(moved, index=index):
            return float(np.sum(functional.conv3d(*arrays[:index], moved, *arrays[index + 1 :], **options) * dy))

        places = np.random.default_rng(5).choice(arrays[index].size, min(8, arrays[index].size), replace=False)
        close(gradients[name].flat[places], differences(loss, arrays[index], places), 1e-7)


def test_chunks_do_not_change_a_bit(engine, monkeypatch):
    x, kernel, bias = (a.astype(np.float32) for a in (normal(3, 5, 8, 8, 4), normal(3, 3, 3, 4, 6), normal(6)))
    whole, pullback = functional.conv3d_vjp(x, kernel, bias, engine=engine, algorithm="direct")
    gradients = pullback(whole)
    monkeypatch.setattr(volumes, "GATHERED_BYTES", 2 * 8 * 8 * 12 * 4)
    parts, pullback = functional.conv3d_vjp(x, kernel, bias, engine=engine, algorithm="direct")
    equal(parts, whole)
    assert len(list(volumes.Conv3DCall(x, kernel, bias, 1, "same", "zeros", 1, "auto", engine).volumes._chunks())) == 8
    for name, gradient in pullback(whole).items():
        close(gradient, gradients[name], 1e-3 if name != "x" else 1e-4)
        assert gradient.dtype == np.float32


def test_no_bias_no_cotangent_and_empty_batches(engine):
    x, kernel = normal(2, 3, 4, 4, 2), normal(3, 3, 3, 2, 3)
    y, pullback = functional.conv3d_vjp(x, kernel, engine=engine)
    assert list(pullback(y)) == ["x", "kernel"]
    assert not any(gradient.any() for gradient in pullback(None).values())
    empty, pullback = functional.conv3d_vjp(x[:0], kernel, engine=engine)
    assert empty.shape == (0, 3, 4, 4, 3)
    gradients = pullback(empty)
    assert gradients["x"].shape == (0, 3, 4, 4, 2)
    equal(gradients["kernel"], np.zeros_like(kernel))


def test_what_is_not_finite_stays_in_its_receptive_field(engine):
    x = normal(1, 5, 12, 12, 2).astype(np.float32)
    x[0, 2, 6, 6, 0] = np.nan
    y = functional.conv3d(x, normal(3, 3, 3, 2, 4), engine=engine)
    seen = np.zeros(y.shape, bool)
    seen[:, 1:4, 5:8, 5:8] = True
    equal(np.isnan(y), seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": np.zeros((2, 3, 4, 5))}, r"x must be \(batch, time, height, width, channels\), got 4D"),
        ({"kernel": np.zeros((3, 3, 2, 3))}, r"kernel must be \(KT, KH, KW, channels, filters\)"),
        ({"kernel": np.zeros((3, 3, 3, 1, 3))}, "x has 2 channels but kernel"),
        ({"kernel": np.zeros((3, 0, 3, 2, 3))}, "has an empty axis"),
        ({"bias": np.zeros(2)}, r"bias has shape \(2,\) but must be \(3,\)"),
        ({"strides": 2, "dilation": 2}, "cannot both exceed 1"),
        ({"strides": (1, 2)}, "strides must be an integer >= 1 or 3 of them"),
        ({"padding": "full"}, "padding must be one of 'same', 'valid'"),
        ({"padding": (1, 2)}, "3 pairs"),
        ({"padding": "valid", "x": np.zeros((2, 2, 4, 4, 2))}, "a window of 3 does not fit the time of 2"),
        ({"padding_mode": "reflect"}, "padding_mode must be one of"),
        ({"algorithm": "fft"}, "algorithm must be one of"),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    given = {"x": np.zeros((2, 3, 4, 4, 2)), "kernel": np.zeros((3, 3, 3, 2, 3))} | arguments
    with pytest.raises(ValueError, match=f"conv3d: .*{message}"):
        functional.conv3d(**given)


def test_sources_of_an_output_frame():
    spec = Conv3DSpec.infer((2, 3, 4, 4, 1), (3, 1, 1, 1, 1))
    assert spec.sources(0) == (0, [(1, 0), (2, 1)])
    assert spec.sources(4) == (1, [(0, 0), (1, 1), (2, 2)])
    circular = Conv3DSpec.infer((2, 3, 4, 4, 1), (3, 1, 1, 1, 1), padding_mode="circular")
    assert circular.sources(0) == (0, [(0, 2), (1, 0), (2, 1)])
