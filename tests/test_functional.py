import inspect
import re
import tracemalloc

import numpy as np
import pytest

from fastclstm import functional
from fastclstm.functional import (
    conv2d,
    conv2d_vjp,
    convlstm2d,
    convlstm2d_step,
    convlstm2d_vjp,
    max_pool3d,
    max_pool3d_vjp,
)
from fastclstm.nn.normalization import Normalization

B, T, H, W, C, F = 2, 3, 5, 4, 2, 3


@pytest.fixture(autouse=True)
def reference_by_default(monkeypatch):
    """What is tested here stands above the engines."""
    monkeypatch.setattr("fastclstm.dispatch.DEFAULT_ENGINE", "reference")


def draw(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def convlstm_arguments(dtype=np.float32):
    return {"x": draw(B, T, H, W, C, dtype=dtype), "kernel": draw(3, 3, C, 4 * F, dtype=dtype),
            "recurrent_kernel": draw(3, 3, F, 4 * F, dtype=dtype)}  # fmt: skip


def raises(message, error=ValueError):
    return pytest.raises(error, match=f"^{re.escape(message)}")


SIGNATURES = {  # of SEMANTICS, section 8, and normalization and dropout
    "conv2d": "x, kernel, bias=None, *, strides=1, padding='same', padding_mode='zeros', dilation=1, algorithm='auto', "
              "engine=None",
    "convlstm2d": "x, kernel, recurrent_kernel, bias=None, *, initial_state=None, strides=1, padding='same', "
                  "padding_mode='zeros', dilation=1, recurrent_dilation=1, activation='tanh', "
                  "recurrent_activation='sigmoid', output_activation=None, peephole=None, cell_clip=None, mask=None, "
                  "go_backwards=False, return_sequences=True, return_state=False, normalization=None, "
                  "normalization_weights=None, dropout_masks=None, algorithm='auto', engine=None",
    "max_pool3d": "x, pool_size=(2, 2, 2), strides=None, *, padding='valid', ceil_mode=False, "
                  "data_format='channels_last', return_indices=False, engine=None",
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(functional, name)).parameters.values()
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    assert str(inspect.Signature(plain)) == f"({SIGNATURES[name]})"


# What comes out.


def test_kinds_of_result_of_convlstm2d():
    arguments = convlstm_arguments()
    sequence = convlstm2d(**arguments)
    last = convlstm2d(**arguments, return_sequences=False)
    assert sequence.shape == (B, T, H, W, F)
    np.testing.assert_array_equal(last, sequence[:, -1])
    for option, expected in ((True, sequence), (False, last)):
        output, h, c = convlstm2d(**arguments, return_sequences=option, return_state=True)
        np.testing.assert_array_equal(output, expected)
        np.testing.assert_array_equal(h, last)
        assert c.shape == (B, H, W, F)
        assert (c != h).all()


def test_output_activation_is_the_activation_unless_given():
    arguments = convlstm_arguments() | {"activation": "softsign"}
    np.testing.assert_array_equal(convlstm2d(**arguments), convlstm2d(**arguments, output_activation="softsign"))
    assert (convlstm2d(**arguments) != convlstm2d(**arguments, output_activation="tanh")).any()


def test_half_a_state_is_filled_with_zeros():
    arguments, h = convlstm_arguments(), draw(B, H, W, F, seed=1)
    half = convlstm2d(**arguments, initial_state=(h, None))
    np.testing.assert_array_equal(half, convlstm2d(**arguments, initial_state=[h, np.zeros_like(h)]))
    assert (half != convlstm2d(**arguments)).any()


def test_steps_are_the_sequence():
    arguments = convlstm_arguments()
    options = {
        "cell_clip": 0.5,
        "padding": "valid",
        "peephole": {gate: draw(F, seed=n) for n, gate in enumerate("ifo")},
    }
    mask = np.array([[1, 0, 1], [0, 1, 1]])
    _, *expected = convlstm2d(**arguments, **options, mask=mask, return_state=True)
    frames, states, out = arguments.pop("x").swapaxes(0, 1), None, None
    for x, valid in zip(frames, mask.T, strict=True):
        states = convlstm2d_step(x, **arguments, **options, mask=valid[:, None], initial_state=states, out=out)
        assert out is None or states[1] is out[1]
        out = np.empty_like(states[0]), states[1]
    for state, value in zip(states, expected, strict=True):
        np.testing.assert_array_equal(state, value)


def test_what_a_step_does_not_take():
    weights = {name: value for name, value in convlstm_arguments().items() if name != "x"}
    x, new_h, new_c = draw(B, H, W, C), np.empty((B, H, W, F), np.float32), np.empty((B, H, W, F), np.float32)
    with raises("convlstm2d_step: x must be (batch, height, width, channels), got 5D"):
        convlstm2d_step(x[:, None], **weights)
    with pytest.raises(TypeError, match="return_state"):
        convlstm2d_step(x, **weights, return_state=True)
    with raises("convlstm2d_step: out h has dtype float32 but the states are float64; make it with np.empty"):
        convlstm2d_step(x.astype(float), **weights, out=(new_h, new_c))
    for name in ("peephole 'o'", "kernel"):
        peephole = {gate: draw(H, W, F) for gate in "ifo"}
        memory = np.empty(max(peephole["o"].size, weights["kernel"].size, new_h.size), np.float32)
        own = weights | {"peephole": peephole}
        if name == "kernel":
            own["kernel"] = memory[: weights["kernel"].size].reshape(weights["kernel"].shape)
        else:
            peephole["o"] = memory[: peephole["o"].size].reshape(H, W, F)
        written = memory[: new_h.size].reshape(new_h.shape)
        with raises(f"convlstm2d_step: out h overlaps {name}; give it memory of its own"):
            convlstm2d_step(x, **own, out=(written, new_c))
        with raises(f"convlstm2d_step: out c overlaps {name}; give it memory of its own"):
            convlstm2d_step(x, **own, out=(new_h, written))


@pytest.mark.parametrize("dtype", [bool, np.int8, np.float32])
def test_mask_of_any_dtype(dtype):
    mask = np.array([[1, 0, 1], [0, 1, 1]])
    arguments = convlstm_arguments()
    masked = convlstm2d(**arguments, mask=mask.astype(dtype))
    np.testing.assert_array_equal(masked, convlstm2d(**arguments, mask=mask.tolist()))
    np.testing.assert_array_equal(masked[0, 1], masked[0, 0])
    np.testing.assert_array_equal(masked[1, 0], 0)


@pytest.mark.parametrize("channels_first", [False, True])
def test_kinds_of_result_of_max_pool3d(channels_first):
    x = draw(B, 4, 6, 5, C)
    pixels = x.reshape(B, -1, C)
    if channels_first:
        x = np.moveaxis(x, -1, 1)
    options = {"data_format": "channels_first" if channels_first else "channels_last"}
    y, indices = max_pool3d(x, return_indices=True, **options)
    np.testing.assert_array_equal(max_pool3d(x, **options), y)
    assert y.flags.c_contiguous
    assert y.shape == ((B, C, 2, 3, 2) if channels_first else (B, 2, 3, 2, C))
    assert (y.dtype, indices.dtype) == (np.float32, np.int64)
    axis = 1 if channels_first else -1
    flat = np.moveaxis(indices, axis, -1).reshape(B, -1, C)
    np.testing.assert_array_equal(np.take_along_axis(pixels, flat, 1), np.moveaxis(y, axis, -1).reshape(B, -1, C))


def test_shapes_of_the_reference_classes():
    """Example 2 of SEMANTICS, section 3."""
    x = np.zeros((1, 10, 32, 32, 32), np.float32)
    assert max_pool3d(x, (2, 2, 2), (2, 2, 2)).shape == (1, 5, 16, 16, 32)
    assert max_pool3d(x, (2, 2, 2), (2, 2, 2), data_format="channels_first").shape == (1, 10, 16, 16, 16)


# Gradients.


def test_pullback_of_conv2d():
    x, kernel, bias = draw(B, H, W, C), draw(3, 3, C, F), draw(F)
    y, pullback = conv2d_vjp(x, kernel, bias, strides=2)
    np.testing.assert_array_equal(y, conv2d(x, kernel, bias, strides=2))
    dy = draw(*y.shape, seed=1)
    gradients = pullback(dy)
    assert {name: g.shape for name, g in gradients.items()} == {"x": x.shape, "kernel": kernel.shape, "bias": (F,)}
    np.testing.assert_allclose(gradients["bias"], dy.sum((0, 1, 2)), rtol=1e-5)
    for name, value in (("x", x), ("kernel", kernel)):  # y - bias is linear in each
        assert (gradients[name] * value).sum() == pytest.approx(((y - bias) * dy).sum(), rel=1e-4)
    assert set(conv2d_vjp(x, kernel)[1](None)) == {"x", "kernel"}
    assert not conv2d_vjp(x, kernel)[1](None)["x"].any()


def test_pullback_of_convlstm2d_has_the_arguments_given():
    arguments = convlstm_arguments()
    output, pullback = convlstm2d_vjp(**arguments)
    np.testing.assert_array_equal(output, convlstm2d(**arguments))
    assert set(pullback(np.ones_like(output))) == {"x", "kernel", "recurrent_kernel"}

    state = draw(B, H, W, F), None
    peephole = {gate: draw(F) for gate in "ifo"}
    outputs, pullback = convlstm2d_vjp(**arguments, bias=draw(4 * F), initial_state=state, peephole=peephole,
                                       return_state=True, return_sequences=False)  # fmt: skip
    assert len(outputs) == 3
    gradients = pullback((None, None, np.ones((B, H, W, F))))
    assert set(gradients) == {"x", "kernel", "recurrent_kernel", "bias", "initial_state", "peephole"}
    assert [g.shape for g in gradients["initial_state"]] == [(B, H, W, F)] * 2
    assert {name: g.shape for name, g in gradients["peephole"].items()} == dict.fromkeys("ifo", (F,))


def test_pullback_may_be_called_again():
    arguments = convlstm_arguments()
    output, pullback = convlstm2d_vjp(**arguments)
    first = pullback(np.ones_like(output))
    pullback(np.zeros_like(output))
    np.testing.assert_array_equal(pullback(np.ones_like(output))["x"], first["x"])


RECOMPUTED = {
    "plain": {}, "named": {"activation": "silu"}, "called": {"activation": (np.sin, np.cos)}, 
    "clip": {"cell_clip": 0.3},
    "mask": {"mask": [[1, 0, 1], [0, 0, 1]]}, "elementwise": {"peephole": {gate: draw(H, W, F) for gate in "ifo"}},
    "conv": {"peephole": {gate: draw(3, 3, F, F) for gate in "ifo"} | {"bias_i": draw(F)}},
    "layer": {"normalization": "layer", "normalization_weights": {"gamma": draw(4 * F), "beta": draw(4 * F)}},
    "batch": {"normalization": Normalization("batch", separate=True),
              "normalization_weights": {name: draw(4 * F) for name in ("gamma_x", "beta_x", "gamma_h", "beta_h")}},
    "dropout": {"dropout_masks": {"x": draw(4, B, H, W, C) > 0, "h": draw(4, B, H, W, F) > 0}},
}  # fmt: skip


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recompute_gives_the_same_from_less(name):
    """NumPy gives the same bits; what is saved shrinks, as `tracemalloc` sees it."""
    results, sizes = [], []
    for recompute in (False, True):
        tracemalloc.start()
        outputs, pullback = convlstm2d_vjp(**convlstm_arguments(), **RECOMPUTED[name], recompute=recompute)
        sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        results.append((outputs, pullback(draw(B, T, H, W, F)), pullback.statistics))
    (outputs, gradients, statistics), (expected, expected_gradients, expected_statistics) = results
    np.testing.assert_array_equal(outputs, expected)
    np.testing.assert_equal(gradients, expected_gradients)
    np.testing.assert_equal(statistics, expected_statistics)
    assert sizes[1] < sizes[0] - 0.9 * B * T * H * W * 4 * F * 4


def test_recompute_is_yes_or_no():
    with raises("convlstm2d_vjp: recompute must be True or False, got 'states'"):
        convlstm2d_vjp(**convlstm_arguments(), recompute="states")


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_of_several_nan_in_a_window_the_first_is_the_index(engine):
    x = np.arange(8.0).reshape(1, 2, 2, 2, 1)
    x.ravel()[[3, 5]] = np.nan
    y, index = functional.max_pool3d(x, return_indices=True, engine=engine)
    assert np.isnan(y.item())
    assert index.item() == 3


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("return_indices", [False, True])
def test_pullback_of_max_pool3d(return_indices, channels_first):
    x = draw(2, 4, 6, 5, 3)
    options = {"data_format": "channels_first" if channels_first else "channels_last", "pool_size": 2}
    result, pullback = max_pool3d_vjp(x, return_indices=return_indices, **options)
    y = result[0] if return_indices else result
    np.testing.assert_array_equal(y, max_pool3d(x, **options))
    dy = draw(*y.shape, seed=1)
    dx = pullback((dy, None) if return_indices else dy)["x"]
    assert dx.shape == x.shape
    np.testing.assert_array_equal(np.sort(dx[dx != 0]), np.sort(dy.ravel()))
    assert (dx * x).sum() == pytest.approx((dy * y).sum(), rel=1e-4)
    assert not pullback((None, None) if return_indices else None)["x"].any()


# Errors.


def test_shape_errors_name_the_operation():
    arguments = convlstm_arguments()
    with raises(f"convlstm2d: x must be (batch, time, height, width, channels), got 4D {(T, H, W, C)}"):
        convlstm2d(**arguments | {"x": arguments["x"][0]})
    with raises(f"convlstm2d: x has 1 channels but kernel (3, 3, {C}, 12) takes {C}"):
        convlstm2d(**arguments | {"x": arguments["x"][..., :1]})
    with raises("conv2d: x must be (batch, height, width, channels), got 5D"):
        conv2d(arguments["x"], arguments["kernel"])
    with raises("max_pool3d: x must be (batch, time, height, width, channels), got 4D"):
        max_pool3d(arguments["x"][0])
    with raises("max_pool3d: x must be (batch, time, height, width, channels), got 4D"):
        max_pool3d(arguments["x"][0], data_format="channels_first")


@pytest.mark.parametrize("name", ["x", "kernel", "recurrent_kernel", "bias", "mask"])
@pytest.mark.parametrize(
    ("value", "message"),
    [(np.ones(2, complex), "has dtype complex128"), (np.array([None]), "has dtype object"),
     ([[1], [1, 2]], "is not a rectangular array"), (np.ma.ones(2), "is a masked array")],
)  # fmt: skip
def test_array_errors_name_the_argument(name, value, message):
    with raises(f"convlstm2d: {name} {message}", TypeError):
        convlstm2d(**convlstm_arguments() | {name: value})


@pytest.mark.parametrize("name", ["x", "kernel", "recurrent_kernel"])
def test_nothing_is_no_array(name):
    with raises(f"convlstm2d: {name} has dtype object", TypeError):
        convlstm2d(**convlstm_arguments() | {name: None})


def test_peephole_is_a_mapping():
    with raises("convlstm2d: peephole must be a mapping from names to arrays, got ndarray", TypeError):
        convlstm2d(**convlstm_arguments(), peephole=draw(F))


def test_array_errors_of_states_and_peepholes():
    with raises("convlstm2d: c has dtype complex64", TypeError):
        convlstm2d(**convlstm_arguments(), initial_state=(None, draw(B, H, W, F).astype("c8")))
    with raises("convlstm2d: peephole 'f' has dtype object", TypeError):
        convlstm2d(**convlstm_arguments(), peephole=dict.fromkeys("io", draw(F)) | {"f": None})


@pytest.mark.parametrize("state", [draw(B, H, W, F), (draw(B, H, W, F),), "hc", {"h": 1, "c": 2}])
def test_initial_state_is_a_pair(state):
    with raises(f"convlstm2d: initial_state must be a pair (h, c), got {type(state).__name__}"):
        convlstm2d(**convlstm_arguments(), initial_state=state)


def test_choices():
    arguments = convlstm_arguments()
    for call in (lambda **where: convlstm2d(**arguments, **where),
                 lambda **where: conv2d(arguments["x"][0], arguments["kernel"], **where)):  # fmt: skip
        with pytest.raises(
            ValueError, match=r"2d: algorithm must be one of 'auto', 'direct' on engine 'reference', got"
        ):
            call(algorithm="fft")
        with raises("unknown engine 'tpu'"):
            call(engine="tpu")
    with raises("unknown engine 'tpu'"):
        max_pool3d(arguments["x"], engine="tpu")
    with raises("max_pool3d: data_format must be one of 'channels_last', 'channels_first', got 'NCDHW'"):
        max_pool3d(arguments["x"], data_format="NCDHW")
    with raises("unknown activation 'swoosh'"):
        convlstm2d(**arguments, activation="swoosh")


@pytest.mark.parametrize("channels_first", [False, True])
def test_cotangents_have_the_shape_of_the_output(channels_first):
    arguments = convlstm_arguments()
    with raises("conv2d: dy has shape (1,) but must be (3, 5, 4, 12) (the shape of the output whose gradient it is)"):
        conv2d_vjp(arguments["x"][0], arguments["kernel"])[1](np.ones(1))
    _, pullback = convlstm2d_vjp(**arguments, return_state=True)
    for position, name, shape in ((0, "dy", (B, T, H, W, F)), (1, "dh", (B, H, W, F)), (2, "dc", (B, H, W, F))):
        cotangents = [None] * 3
        cotangents[position] = np.ones((1, *shape[1:]))
        with raises(f"convlstm2d: {name} has shape {(1, *shape[1:])} but must be {shape}"):
            pullback(tuple(cotangents))
    options = {"data_format": "channels_first" if channels_first else "channels_last"}
    y, pullback = max_pool3d_vjp(draw(2, 4, 6, 8, 10), **options)
    with raises(f"max_pool3d: dy has shape (2, 2) but must be {y.shape}"):
        pullback(np.ones((2, 2)))


def test_cotangents_have_the_structure_of_the_outputs():
    _, pullback = convlstm2d_vjp(**convlstm_arguments(), return_state=True)
    for cotangents in (None, np.ones((B, T, H, W, F)), (None, None)):
        with raises(f"convlstm2d: pullback takes the outputs' structure (dy, dh, dc), got {type(cotangents).__name__}"):
            pullback(cotangents)
    y, pullback = max_pool3d_vjp(draw(2, 4, 6, 8, 10), return_indices=True)
    with raises("max_pool3d: pullback takes the outputs' structure (dy, None), got ndarray"):
        pullback(y[0])


def test_unknown_options():
    arguments = convlstm_arguments()
    with raises(
        "convlstm2d_vjp: unknown option 'stride'; did you mean 'strides'? The options are activation, algorithm, ",
        TypeError,
    ):
        convlstm2d_vjp(**arguments, stride=2)
    with raises("convlstm2d_step: unknown option 'return_state'; the options are ", TypeError):
        convlstm2d_step(**arguments | {"x": arguments["x"][:, 0]}, return_state=True)


def test_cotangents_are_real():
    with raises("convlstm2d: dy has dtype complex128", TypeError):
        convlstm2d_vjp(**convlstm_arguments())[1](np.ones((B, T, H, W, F), complex))


# Dtypes.


@pytest.mark.parametrize(
    ("x", "weights", "expected"),
    [("f4", "f4", "f4"), ("f8", "f8", "f8"), ("f4", "f8", "f8"), ("f8", "f4", "f8"), ("i4", "f4", "f4"),
     ("f2", "f2", "f4"), ("u1", "f8", "f8"), ("?", "i8", "f4")],
)  # fmt: skip
def test_dtypes(x, weights, expected):
    arguments = convlstm_arguments(np.dtype(weights)) | {"x": draw(B, T, H, W, C).astype(x)}
    output, pullback = convlstm2d_vjp(**arguments)
    assert output.dtype == expected
    gradients = pullback(np.ones(output.shape, "f8"))  # the cotangent's dtype decides nothing
    assert {gradient.dtype for gradient in gradients.values()} == {np.dtype(expected)}
    y, pullback = conv2d_vjp(arguments["x"][0], arguments["kernel"])
    assert y.dtype == pullback(np.ones(y.shape))["x"].dtype == expected
    y, pullback = max_pool3d_vjp(arguments["x"])
    assert y.dtype == pullback(np.ones(y.shape))["x"].dtype == ("f8" if x == "f8" else "f4")


def test_a_wide_state_widens_the_result_and_a_mask_does_not():
    arguments = convlstm_arguments()
    assert convlstm2d(**arguments, mask=np.ones((B, T))).dtype == np.float32
    assert convlstm2d(**arguments, initial_state=(None, np.zeros((B, H, W, F)))).dtype == np.float64


def test_nested_sequences():
    y = max_pool3d([[[[[1.0], [2.0]], [[3.0], [4.0]]], [[[5.0], [6.0]], [[7.0], [8.0]]]]])
    np.testing.assert_array_equal(y, np.full((1, 1, 1, 1, 1), 8.0))


# PyTorch in, PyTorch out.


@pytest.mark.torch
class TestTorch:
    def test_results_are_tensors(self):
        torch = pytest.importorskip("torch")
        arguments = convlstm_arguments()
        expected, pull_expected = convlstm2d_vjp(**arguments, return_state=True, initial_state=(draw(B, H, W, F), None))
        tensors = {name: torch.from_numpy(value) for name, value in arguments.items()}
        outputs, pullback = convlstm2d_vjp(**tensors, return_state=True, initial_state=(draw(B, H, W, F), None))
        for output, array in zip(outputs, expected, strict=True):
            assert isinstance(output, torch.Tensor)
            np.testing.assert_array_equal(output.numpy(), array)
        gradients = pullback((torch.ones(B, T, H, W, F), None, None))
        for name, array in pull_expected((np.ones((B, T, H, W, F)), None, None)).items():
            for gradient, value in zip(*((g,) if name != "initial_state" else g for g in (gradients[name], array)),
                                       strict=True):  # fmt: skip
                assert isinstance(gradient, torch.Tensor)
                np.testing.assert_array_equal(gradient.numpy(), value)

    def test_pooling_of_a_permuted_tensor(self):
        torch = pytest.importorskip("torch")
        x = draw(2, 4, 6, 5, 3)
        tensor = torch.from_numpy(x).permute(0, 4, 1, 2, 3)
        (y, indices), pullback = max_pool3d_vjp(tensor, return_indices=True, data_format="channels_first")
        assert indices.dtype == torch.int64
        np.testing.assert_array_equal(y.numpy(), np.moveaxis(max_pool3d(x), -1, 1))
        assert pullback((torch.ones_like(y), None))["x"].shape == tensor.shape

    def test_tensors_that_cannot_be_read(self):
        torch = pytest.importorskip("torch")
        with pytest.raises(
            TypeError, match=r"^conv2d: x requires grad, but .* torch.autograd.Function; for inference alone"
        ):
            conv2d(torch.ones(1, 3, 3, 1, requires_grad=True), np.ones((3, 3, 1, 1)))
        with raises("conv2d: kernel has dtype complex64", TypeError):
            conv2d(torch.ones(1, 3, 3, 1), torch.ones(3, 3, 1, 1, dtype=torch.complex64))

    def test_a_step_of_tensors(self):
        torch = pytest.importorskip("torch")
        arguments = convlstm_arguments()
        x = arguments.pop("x")[:, 0]
        expected = convlstm2d_step(x, **arguments)
        for state, value in zip(convlstm2d_step(torch.from_numpy(x), **arguments), expected, strict=True):
            assert isinstance(state, torch.Tensor)
            np.testing.assert_array_equal(state.numpy(), value)
        with raises("convlstm2d_step: out must be a pair (h, c) of NumPy arrays, got (Tensor, ndarray)", TypeError):
            convlstm2d_step(x, **arguments, out=(torch.from_numpy(expected[0]), expected[1]))

    def test_x_decides_the_kind_of_result(self):
        torch = pytest.importorskip("torch")
        assert isinstance(conv2d(np.ones((1, 3, 3, 1)), torch.ones(3, 3, 1, 1)), np.ndarray)


# Normalization and dropout.


def normalized_arguments(kind, *, elementwise=False, separate=False, statistics=False):
    options = Normalization(kind, separate=separate, elementwise=elementwise)
    shape = (H, W, 4 * F) if elementwise else (4 * F,)
    names = ["gamma", "beta"] + ["mean", "variance"] * statistics
    weights = {f"{name}{part}": np.abs(draw(*shape, dtype=np.float64, seed=n)) + 0.5
               for n, name in enumerate(names) for part in (("_x", "_h") if separate else ("",))}  # fmt: skip
    return convlstm_arguments(np.float64) | {"normalization": options, "normalization_weights": weights}


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", ["layer", "group", "batch"])
def test_normalized_preactivations_have_mean_zero_and_variance_one(kind, separate):
    arguments = normalized_arguments(kind, separate=separate)
    kernels = arguments["kernel"], arguments["recurrent_kernel"]
    h = draw(B, H, W, F, dtype=np.float64, seed=5)
    parts = [functional.conv2d(x, k) for x, k in zip((arguments["x"][:, 0], h), kernels, strict=True)]
    z = 0
    for part, name in zip(parts if separate else [sum(parts)], ("_x", "_h") if separate else ("",), strict=True):
        groups = part.reshape(B, H, W, {"layer": 1, "group": 4, "batch": 4 * F}[kind], -1)
        axes = (0, 1, 2, 4) if kind == "batch" else (1, 2, 4)
        standard = (groups - groups.mean(axes, keepdims=True)) / np.sqrt(groups.var(axes, keepdims=True) + 1e-5)
        weights = arguments["normalization_weights"]
        z = z + weights[f"gamma{name}"] * standard.reshape(part.shape) + weights[f"beta{name}"]
    i, _, g, o = np.split(z, 4, -1)
    c = np.tanh(g) / (1 + np.exp(-i))
    arguments["x"] = arguments["x"][:, :1]
    result = functional.convlstm2d(**arguments, initial_state=(h, None), return_sequences=False)
    np.testing.assert_allclose(result, np.tanh(c) / (1 + np.exp(-o)), rtol=1e-12)


@pytest.mark.parametrize("separate", [False, True])
def test_given_statistics_are_used_and_fold_into_the_weights(separate):
    arguments = normalized_arguments("batch", separate=separate, statistics=True)
    folded = functional.convlstm2d(**arguments)
    y, pullback = functional.convlstm2d_vjp(**arguments)
    np.testing.assert_allclose(folded, y, rtol=1e-12)
    assert set(pullback(np.ones_like(y))["normalization_weights"]) == {
        name for name in arguments["normalization_weights"] if name.startswith(("gamma", "beta"))
    }


def test_statistics_of_each_step_are_told():
    arguments = normalized_arguments("batch")
    mask = np.array([[True, True, False], [True, False, False]])[:, :T]
    _, pullback = functional.convlstm2d_vjp(**arguments, mask=mask)
    assert [step["count"] for step in pullback.statistics] == [mask[:, t].sum() * H * W for t in range(T)]
    z = functional.conv2d(arguments["x"][:, 0], arguments["kernel"])
    np.testing.assert_allclose(pullback.statistics[0]["mean"], z.mean((0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(pullback.statistics[0]["variance"], z.var((0, 1, 2)), rtol=1e-10)


def test_dropout_masks_scale_what_each_gate_sees():
    arguments = convlstm_arguments(np.float64)
    masks = {"x": np.ones((4, B, H, W, C)), "h": np.ones((4, B, H, W, F))}
    plain = functional.convlstm2d(**arguments)
    np.testing.assert_allclose(functional.convlstm2d(**arguments, dropout_masks=masks), plain, rtol=1e-12)
    masks["x"][2], masks["h"][2] = 0, 0  # nothing reaches g
    closed = functional.convlstm2d(**arguments, dropout_masks=masks)
    np.testing.assert_array_equal(closed, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "middle"}, "unknown normalization 'middle'; known are layer, group, batch"),
        ({"normalization": None}, "convlstm2d: normalization_weights need a normalization"),
        ({"normalization_weights": {}}, "convlstm2d: normalization_weights must map beta, gamma to arrays; missing"),
        ({"normalization_weights": {"gamma": np.ones(3), "beta": np.ones(3)}},
         "convlstm2d: normalization weight 'gamma' has shape (3,) but must be"),
        ({"normalization": Normalization("group", groups=7)}, "convlstm2d: the"),
        ({"normalization": "batch", "normalization_weights": {n: np.ones(4 * F) for n in ("gamma", "beta", "mean")}},
         "convlstm2d: normalization_weights must map beta, gamma, mean, variance to arrays; missing ['variance']"),
        ({"dropout_masks": {"y": np.ones(1)}}, "convlstm2d: a key of dropout_masks must be one of 'x', 'h', got 'y'"),
        ({"dropout_masks": {"x": np.ones((4, 1))}}, "convlstm2d: dropout mask 'x' has shape (4, 1) but must be"),
    ],
)  # fmt: skip
def test_wrong_normalization_and_dropout(changes, message):
    with raises(message):
        functional.convlstm2d(**normalized_arguments("layer") | changes)


def test_weights_that_are_no_mapping():
    with raises("convlstm2d: dropout_masks must be a mapping from names to arrays, got list", TypeError):
        functional.convlstm2d(**convlstm_arguments(), dropout_masks=[])


@pytest.mark.parametrize(("plain", "wrong"), [
    ({"strides": 1}, {"strides": True}), ({"dilation": (1, 1)}, {"dilation": (1, True)}), ({}, {"cell_clip": -1.0}),
])  # fmt: skip
def test_what_is_known_of_a_form_lets_no_other_options_pass(plain, wrong):
    """Options that compare equal to those of a call before, as True does to 1, are checked all the same."""
    arguments = np.ones((1, 2, 4, 4, 1)), np.ones((3, 3, 1, 8)), np.ones((3, 3, 2, 8))
    first = functional.convlstm2d(*arguments, **plain, engine="reference")
    np.testing.assert_array_equal(first, functional.convlstm2d(*arguments, **plain, engine="reference"))
    with pytest.raises(ValueError, match=next(iter(wrong))):
        functional.convlstm2d(*arguments, **wrong, engine="reference")
