import os

import numpy as np
import pytest
from layer_checks import close, equal, normal

from fastclstm import functional
from fastclstm.spec import transposed


@pytest.fixture(params=["reference", "cpu"])
def engine(request, directly):
    return request.param


def naive(x, kernel, shape, before, strides, dilation):
    """Each pixel of x adds its channels times the kernel to a window of the output, which is then cropped."""
    size = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(x.shape[1:-1], strides, kernel.shape, dilation,
                                                                  strict=False)]  # fmt: skip
    whole = np.zeros((len(x), *(max(n, b + m) for n, b, m in zip(size, before, shape, strict=True)), kernel.shape[-2]))
    for pixel in np.ndindex(x.shape[1:-1]):
        for tap in np.ndindex(kernel.shape[:-2]):
            place = tuple(i * s + k * d for i, s, k, d in zip(pixel, strides, tap, dilation, strict=True))
            whole[(slice(None), *place)] += x[(slice(None), *pixel)] @ kernel[tap].T
    return whole[(slice(None), *(slice(b, b + m) for b, m in zip(before, shape, strict=True)))]


# kernel, strides, padding, output_padding, dilation; the size of the output for (3, 4), and what is cropped before it
CASES_2D = [
    ((3, 3), 2, "same", None, 1, (6, 8), (0, 0)),
    ((4, 5), 2, "same", None, 1, (6, 8), (1, 1)),
    ((2, 1), 3, "same", None, 1, (9, 12), (0, 0)),
    ((3, 3), 1, "same", None, 1, (3, 4), (1, 1)),
    ((2, 3), 1, "same", None, 2, (3, 4), (1, 2)),
    ((3, 4), 2, "valid", None, 1, (7, 10), (0, 0)),
    ((1, 2), (3, 2), "valid", None, 1, (9, 8), (0, 0)),
    ((3, 2), 2, "valid", 1, 1, (8, 9), (0, 0)),
    ((3, 3), 2, "same", 1, 1, (6, 8), (0, 0)),
    ((5, 4), 3, "same", (2, 0), 1, (9, 9), (1, 2)),
    ((3, 3), 2, 1, 1, 1, (6, 8), (1, 1)),
    ((4, 4), 2, 1, None, 1, (6, 8), (1, 1)),
    ((3, 3), 2, ((0, 1), (2, 0)), (1, 0), 1, (7, 7), (0, 2)),
    ((3, 2), 1, 1, None, (1, 2), (3, 4), (1, 1)),
]


@pytest.mark.parametrize(("size", "strides", "padding", "extra", "dilation", "shape", "before"), CASES_2D)
def test_frames_against_a_sum_over_pixels(engine, size, strides, padding, extra, dilation, shape, before):
    x, kernel, bias = normal(2, 3, 4, 3), normal(*size, 5, 3, seed=2), normal(5, seed=3)
    y = functional.conv2d_transpose(x, kernel, bias, strides=strides, padding=padding, output_padding=extra,
                                    dilation=dilation, engine=engine)  # fmt: skip
    pairs = [(value,) * 2 if isinstance(value, int) else value for value in (strides, dilation)]
    assert y.shape == (2, *shape, 5)
    close(y, naive(x, kernel, shape, before, *pairs) + bias)


@pytest.mark.parametrize(
    ("size", "strides", "padding", "extra", "dilation", "shape", "before"),
    [
        ((3, 3, 3), (1, 2, 2), "same", None, 1, (2, 6, 8), (1, 0, 0)),
        ((2, 3, 4), (2, 1, 2), "valid", None, 1, (4, 5, 10), (0, 0, 0)),
        ((3, 3, 2), 2, (1, 0, 1), (1, 0, 1), 1, (4, 7, 7), (1, 0, 1)),
        ((2, 2, 2), 1, ((0, 1), (1, 0), (0, 0)), None, (2, 1, 1), (3, 3, 5), (0, 1, 0)),
        ((1, 2, 2), (3, 1, 1), "valid", None, 1, (6, 4, 5), (0, 0, 0)),
    ],
)
def test_volumes_against_a_sum_over_pixels(engine, size, strides, padding, extra, dilation, shape, before):
    x, kernel, bias = normal(2, 2, 3, 4, 3), normal(*size, 5, 3, seed=2), normal(5, seed=3)
    y = functional.conv3d_transpose(x, kernel, bias, strides=strides, padding=padding, output_padding=extra,
                                    dilation=dilation, engine=engine)  # fmt: skip
    three = [(value,) * 3 if isinstance(value, int) else value for value in (strides, dilation)]
    assert y.shape == (2, *shape, 5)
    close(y, naive(x, kernel, shape, before, *three) + bias)


@pytest.mark.parametrize("rank", [2, 3])
def test_gradients_are_those_of_a_bilinear_function(engine, rank):
    """Y is linear in x and in the kernel: <y, dy> = <x, dx> = <kernel, dkernel>, and dbias sums dy."""
    x, kernel, bias = normal(2, *(3, 4, 2)[:rank], 3), normal(*(3, 2, 3)[:rank], 5, 3, seed=2), np.zeros(5)
    function = functional.conv2d_transpose_vjp if rank == 2 else functional.conv3d_transpose_vjp
    for options in ({"strides": 2}, {"padding": 1}, {"strides": 3, "padding": "valid", "output_padding": 2}):
        y, pullback = function(x, kernel, bias, engine=engine, **options)
        dy = normal(*y.shape, seed=4)
        gradients = pullback(dy)
        assert list(gradients) == ["x", "kernel", "bias"]
        close(np.sum(y * dy), np.sum(x * gradients["x"]))
        close(np.sum(y * dy), np.sum(kernel * gradients["kernel"]))
        close(gradients["bias"], dy.sum(tuple(range(rank + 1))))
        assert not any(gradient.any() for gradient in pullback(None).values())
        assert {name: a.shape for name, a in pullback(None).items()} == {n: a.shape for n, a in gradients.items()}


def test_it_is_the_input_gradient_of_the_convolution(engine):
    x, kernel = normal(2, 8, 6, 3), normal(4, 3, 3, 5, seed=2)
    for options in ({}, {"strides": 2}, {"padding": ((1, 2), (0, 1))}, {"dilation": (2, 1), "padding": "valid"}):
        y, pullback = functional.conv2d_vjp(x, kernel, engine=engine, **options)
        dy = normal(*y.shape, seed=3)
        close(functional.conv2d_transpose(dy, kernel, engine=engine, **options), pullback(dy)["x"])


def test_an_empty_batch(engine):
    y, pullback = functional.conv2d_transpose_vjp(np.zeros((0, 3, 4, 2)), np.ones((3, 3, 5, 2)), strides=2,
                                                  engine=engine)  # fmt: skip
    assert y.shape == (0, 6, 8, 5)
    gradients = pullback(y)
    assert gradients["x"].shape == (0, 3, 4, 2)
    equal(gradients["kernel"], np.zeros((3, 3, 5, 2)))


@pytest.mark.torch
@pytest.mark.parametrize("seed", range(24))
def test_values_and_gradients_of_torch(engine, seed):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    rank = 2 + seed % 2
    draw = lambda low, high: tuple(rng.integers(low, high + 1, rank).tolist())  # noqa: E731
    size, strided = draw(1, 4), rng.random() < 0.7
    strides, dilation = (draw(1, 3), (1,) * rank) if strided else ((1,) * rank, draw(1, 2))
    padding = tuple(int(rng.integers(0, (k - 1) * d + 1)) for k, d in zip(size, dilation, strict=True))
    extra = tuple(int(rng.integers(0, s)) for s in strides)
    x, kernel, bias = normal(2, 3, *draw(2, 5)), normal(3, 4, *size, seed=2), normal(4, seed=3)
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, kernel, bias)]
    module = torch.nn.functional.conv_transpose2d if rank == 2 else torch.nn.functional.conv_transpose3d
    try:
        theirs = module(*leaves, stride=strides, padding=padding, output_padding=extra, dilation=dilation)
    except RuntimeError:
        pytest.skip("nothing is left of the frames")
    function = functional.conv2d_transpose_vjp if rank == 2 else functional.conv3d_transpose_vjp
    last = lambda a: np.ascontiguousarray(np.moveaxis(a, 1, -1))  # noqa: E731
    y, pullback = function(last(x), np.moveaxis(kernel, (0, 1), (-1, -2)), bias, strides=strides, padding=padding,
                           output_padding=extra, dilation=dilation, engine=engine)  # fmt: skip
    close(y, last(theirs.detach().numpy()))
    dy = normal(*theirs.shape, seed=4)
    theirs.backward(torch.tensor(dy))
    gradients = pullback(last(dy))
    close(gradients["x"], last(leaves[0].grad.numpy()))
    close(gradients["kernel"], np.moveaxis(leaves[1].grad.numpy(), (0, 1), (-1, -2)))
    close(gradients["bias"], leaves[2].grad.numpy())


@pytest.mark.keras
@pytest.mark.parametrize("seed", range(12))
def test_values_of_keras(engine, seed):
    """Where Keras's engines agree: on PyTorch it computes other values where an output_padding is odd."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    rng = np.random.default_rng(seed)
    rank = 2 + seed % 2
    size, stride = int(rng.integers(2, 5)), int(rng.integers(1, 3))
    if stride == 2 and size == 3:
        size = 4
    padding = "valid" if rng.random() < 0.5 else "same"
    if padding == "same" and (size - stride) % 2:
        size += 1
    x, kernel, bias = normal(2, *(4, 3, 2)[:rank], 3), normal(*(size,) * rank, 5, 3, seed=2), normal(5, seed=3)
    layer = (keras.layers.Conv2DTranspose if rank == 2 else keras.layers.Conv3DTranspose)(
        5, size, stride, padding, dtype="float64"
    )
    layer.build(x.shape)
    layer.set_weights([kernel, bias])
    function = functional.conv2d_transpose if rank == 2 else functional.conv3d_transpose
    close(function(x, kernel, bias, strides=stride, padding=padding, engine=engine), layer(x).detach().numpy())


def test_errors():
    x, kernel = np.ones((1, 3, 4, 2)), np.ones((3, 3, 5, 2))
    for arguments, options, message in (
        ((x[0], kernel), {}, r"conv2d_transpose: x must be \(batch, height, width, channels\), got 3D"),
        ((x, kernel[0]), {}, r"conv2d_transpose: kernel must be \(KH, KW, filters, channels\), got shape"),
        ((x, np.ones((3, 3, 2, 5))), {}, r"x has 2 channels but kernel \(3, 3, 2, 5\), \(…, filters, chann"),
        ((x, kernel, np.ones(2)), {}, r"bias has shape \(2,\) but must be \(5,\)"),
        ((x, kernel), {"padding": "full"}, "padding must be one of 'same', 'valid'"),
        ((x, kernel), {"padding": 5}, "leaves nothing of the height: 3 make 5"),
        (
            (x, kernel),
            {"output_padding": 1, "padding": 0},
            r"output_padding 1 of the height must be smaller than the s",
        ),
        ((x, kernel), {"output_padding": -1}, "output_padding must be an integer >= 0"),
        ((x, kernel), {"strides": 2, "dilation": 2}, "cannot both exceed 1"),
        ((x, np.ones((0, 3, 5, 2))), {}, "has an empty axis"),
        ((x[:, :0], kernel), {}, "has no pixels"),
        ((x, kernel), {"algorithm": "fft"}, "algorithm must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            functional.conv2d_transpose(*arguments, **options, engine="reference")
    with pytest.raises(TypeError, match=r"unexpected keyword|conv2d_transpose"):
        functional.conv2d_transpose_vjp(x, kernel, stride=2)
    _, pullback = functional.conv2d_transpose_vjp(x, kernel, engine="reference")
    with pytest.raises(ValueError, match=r"conv2d_transpose: dy has shape \(1, 3, 4, 2\) but must be \(1, 3, 4, 5\)"):
        pullback(x)


def test_geometry_of_the_convolution_that_is_transposed():
    spec = transposed("op", (2, 5, 6, 3), (3, 4, 7, 3), strides=2, padding=1, output_padding=1)
    assert (spec.HO, spec.WO, spec.F) == (5, 6, 3)
    assert (spec.H, spec.W, spec.C) == (10, 13, 7)
    assert spec.padding == ((1, 0), (1, 0))
