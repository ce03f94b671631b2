"""The conformance suite: every engine computes what the float64 oracle does.

The bound on an error is a multiple of what the plain NumPy run in float32 itself errs on the same case, plus a few
roundings of the largest value; in float64 both shrink by the ratio of the two precisions.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastclstm
from fastclstm import dispatch, functional
from fastclstm.engines.cuda import devices, dlpack
from fastclstm.functional.convlstm import ConvLSTMCall
from fastclstm.nn.normalization import Normalization
from fastclstm.spec import NORMALIZED_PARTS

ALGORITHMS = {name: dispatch.get_engine(name).ALGORITHMS for name in ("reference", "cpu", "cuda")}
CASES = [("reference", np.float32, "auto"), ("cpu", np.float32, "auto")]
CASES += [("cpu", dtype, name) for dtype in (np.float32, np.float64) for name in ALGORITHMS["cpu"]]
CASES += [("cuda", np.float64, "auto")]
CASES += [("cuda", np.float32, name) for name in ("auto", *ALGORITHMS["cuda"]) if name != "float32"]  # that is "auto"

UNBOUNDED = ("elu", "gelu", "silu", "softplus", "linear")
"""Gates that are not between 0 and 1 let errors grow, as normalization does, which divides by what may be small."""

COARSER = {"tf32": 2**13, "float16": 2**13, "bfloat16": 2**16}
"""How many times a product's operands are rounded more than in float32."""
TIMES_NUMPY = {"auto": 4, "direct": 4, "winograd": 40, "simt": 4, "float32": 4} | {n: 4 * c for n, c in COARSER.items()}
"""How many times the error of NumPy's float32 run an algorithm may err."""
ROUNDINGS = {"auto": 16, "direct": 16, "winograd": 160, "simt": 16, "float32": 16} | COARSER
"""How many roundings of the largest value it may err besides."""

every_case = pytest.mark.parametrize(
    ("engine", "dtype", "algorithm"),
    [pytest.param(*case, marks=pytest.mark.vectors if case == ("cpu", np.float32, "direct") else ()) for case in CASES],
    ids=[f"{engine}-{np.dtype(dtype)}-{name}" for engine, dtype, name in CASES],
)
every_engine = pytest.mark.parametrize("engine", ALGORITHMS)
every_algorithm = pytest.mark.parametrize(
    ("engine", "algorithm"), [(engine, name) for engine, names in ALGORITHMS.items() for name in ("auto", *names)]
)


def is_emulated(engine):
    """Whether the processor plays the GPU, slowly."""
    return engine == "cuda" and devices.current().dlpack_device[0] != dlpack.CUDA


def examples(engine, count, algorithm="auto"):
    """How many examples Hypothesis draws."""
    return settings(max_examples=count // (20 if algorithm in COARSER else 6) if is_emulated(engine) else count)


def flatten(value, name):
    """Every array of nested tuples and dicts under a name of its own."""
    if isinstance(value, dict):
        return {key: array for inner, item in value.items() for key, array in flatten(item, f"{name} {inner}").items()}
    if isinstance(value, tuple):
        return flatten(dict(enumerate(value)), name)
    return {name: value}


def cast(value, dtype):
    """Nested arguments with their floats in `dtype`."""
    if isinstance(value, dict):
        return {name: cast(item, dtype) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(cast(item, dtype) for item in value)
    return value.astype(dtype) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


def run(op, arguments, cotangents, dtype, saving=(), **where):
    """Outputs and gradients of an operation, flat: "y" with what backward needs, "d" by it, "alone" without.

    saving: options that say what backward finds.
    """
    arguments, cotangents = cast(arguments, dtype), cast(cotangents, dtype)
    outputs, pullback = getattr(functional, f"{op}_vjp")(**arguments, **where, **dict(saving))
    alone = getattr(functional, op)(**arguments, **where)
    return flatten(outputs, "y") | flatten(pullback(cotangents), "d") | flatten(alone, "alone")


def agree(op, arguments, cotangents, engine, dtype, algorithm, **saving):
    """Check one case against the oracle."""
    single = cast((arguments, cotangents), np.float32)  # all precisions start from the same numbers
    oracle = run(op, *single, np.float64, engine="reference")
    plain = run(op, *single, np.float32, engine="reference")
    results = run(op, *single, dtype, saving, engine=engine, algorithm=algorithm)
    assert results.keys() == oracle.keys()
    eps = np.finfo(dtype).eps
    algorithm = "winograd" if (engine, algorithm) == ("cpu", "auto") else algorithm  # which "auto" may take
    grows = "normalization" in arguments or arguments.get("recurrent_activation") in UNBOUNDED
    roundings = ROUNDINGS[algorithm] * (8 if grows else 1)
    for name, expected in oracle.items():
        result = results[name]
        assert result.dtype == dtype, name
        assert result.shape == expected.shape, name
        if expected.size == 0:
            continue
        numpy_error = np.abs(plain[name] - expected).max() * (eps / np.finfo(np.float32).eps)
        bound = TIMES_NUMPY[algorithm] * numpy_error + roundings * eps * max(1, np.abs(expected).max())
        np.testing.assert_allclose(result, expected, rtol=0, atol=bound, err_msg=name)


sizes = st.sampled_from([1, 2, 3, 5, 8, 13])
any_kernel = st.tuples(st.integers(1, 5), st.integers(1, 5))
TILED = {np.float32: [(3, 3), (5, 5), (9, 9), (3, 5)], np.float64: [(3, 3)]}
"""Where Winograd may be taken, few sizes of kernels: each has machine code of its own, which takes seconds to compile.
All of its tiles: tests/test_cpu_winograd.py."""


def kernels_for(engine, dtype, algorithm):
    """Sizes of kernels to draw."""
    return any_kernel if engine != "cpu" or algorithm == "direct" else st.sampled_from(TILED[dtype])


@st.composite
def convolutions(draw, kernels, fits):
    """Sizes, kernel and options of a convolution: (B, H, W, C), (KH, KW), options.

    fits: one that Winograd's transforms fit.
    """
    frame = draw(st.integers(0, 3)), draw(sizes), draw(sizes), draw(st.sampled_from([1, 2, 3, 8, 20]))
    kernel = draw(kernels)
    options = {"padding_mode": draw(st.sampled_from(["zeros", "circular"]))}
    if name := draw(st.sampled_from([None, None, "dilation"] if fits else [None, "strides", "dilation"])):
        options[name] = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    window = [(k - 1) * d + 1 for k, d in zip(kernel, options.get("dilation", (1, 1)), strict=True)]
    whole = all(n >= k for n, k in zip(frame[1:3], window, strict=True))
    least = [max(0, k - n) for n, k in zip(frame[1:3], window, strict=True)]  # what "before" needs for a window to fit
    pads = st.tuples(*[st.tuples(st.integers(low, low + 2), st.integers(0, 2)) for low in least])
    options["padding"] = draw(st.sampled_from(["same", "valid"] if whole else ["same"]) | pads)
    return frame, kernel, options


def randoms(seed):
    rng = np.random.default_rng(seed)
    return lambda *shape: rng.standard_normal(shape).astype(np.float32)


@st.composite
def conv2d_cases(draw, kernels, fits):
    (B, H, W, C), kernel, options = draw(convolutions(kernels, fits))
    F = draw(st.sampled_from([1, 2, 4, 7, 16, 20]))
    normal = randoms(draw(st.integers(0, 999)))
    arguments = {"x": normal(B, H, W, C), "kernel": normal(*kernel, C, F), **options}
    if draw(st.booleans()):
        arguments["bias"] = normal(F)
    return arguments, normal(*functional.conv2d(**arguments, engine="reference").shape)


@st.composite
def conv2d_transpose_cases(draw, kernels, fits):
    (B, H, W, C), kernel, options = draw(convolutions(kernels, fits))
    del options["padding_mode"]
    F = draw(st.sampled_from([1, 2, 4, 7, 16, 20]))
    strides = options.get("strides", (1, 1))
    if draw(st.booleans()):
        options["output_padding"] = tuple(draw(st.integers(0, s - 1)) for s in strides)
    window = [(k - 1) * d + 1 for k, d in zip(kernel, options.get("dilation", (1, 1)), strict=True)]
    room = [(n - 1) * s + k - 1 for n, s, k in zip((H, W), strides, window, strict=True)]
    pads = st.tuples(
        *[st.tuples(st.integers(0, min(most // 2, 2)), st.integers(0, min(most // 2, 2))) for most in room]
    )
    even = all(n > 1 or k % 2 for n, k in zip((H, W), window, strict=True))  # Keras's "same" may leave nothing of one
    options["padding"] = draw(st.sampled_from(["same", "valid"] if even else ["valid"]) | pads)
    normal = randoms(draw(st.integers(0, 999)))
    arguments = {"x": normal(B, H, W, C), "kernel": normal(*kernel, F, C), **options}
    if draw(st.booleans()):
        arguments["bias"] = normal(F)
    return arguments, normal(*functional.conv2d_transpose(**arguments, engine="reference").shape)


SMOOTH = ["tanh", "sigmoid", "elu", "gelu", "silu", "softplus", "softsign", "linear"]
ACTIVATIONS = [*SMOOTH, "hard_sigmoid", "hard_sigmoid_keras2"]


@st.composite
def convlstm2d_cases(draw, kernels, fits, coarse=False):
    """A ConvLSTM; where operands are coarse only with functions whose derivative does not jump.

    A value that rounding takes past the jump has another derivative: no bound holds there.
    """
    alike = fits and draw(st.booleans())  # the transforms fit both convolutions, else perhaps only that of h
    (B, H, W, C), kernel, options = draw(convolutions(kernels, alike))
    T, F = draw(st.integers(1, 3)), draw(st.integers(1, 24) | st.sampled_from([31, 32, 33, 40]))
    recurrent = kernel if alike or (not fits and draw(st.booleans())) else draw(kernels)
    normal = randoms(draw(st.integers(0, 999)))
    small = lambda *shape: normal(*shape) / np.float32(np.sqrt(np.prod(shape[:-1])))  # noqa: E731
    x = normal(B, T, H, W, C)
    arguments = {"x": x, "kernel": small(*kernel, C, 4 * F), "recurrent_kernel": small(*recurrent, F, 4 * F), **options}
    state = functional.convlstm2d(**arguments, return_sequences=False, engine="reference").shape
    if draw(st.booleans()):
        arguments["bias"] = normal(4 * F)
    if draw(st.booleans()):
        arguments["initial_state"] = draw(st.sampled_from([(normal(*state), normal(*state)), (None, normal(*state))]))
    if alike:
        arguments["recurrent_dilation"] = options.get("dilation", 1)
    elif draw(st.booleans()):
        arguments["recurrent_dilation"] = draw(st.integers(1, 2))
    kind = draw(st.sampled_from([None, None, "channel", "elementwise", "conv", "conv with biases"]))
    if kind is not None:
        shape = {"channel": (F,), "elementwise": state[1:]}.get(kind, (3, 2, F, F))
        arguments["peephole"] = {gate: 0.3 * normal(*shape) for gate in "ifo"}
        if kind == "conv with biases":
            arguments["peephole"] |= {f"bias_{gate}": normal(F) for gate in "if"}
    if draw(st.booleans()):
        arguments["mask"] = normal(B, T) > draw(st.sampled_from([-0.5, 0.5, 9]))
    if not coarse and draw(st.booleans()):
        arguments["cell_clip"] = draw(st.sampled_from([0.2, 5.0]))
    for name in ("activation", "recurrent_activation", "output_activation"):
        if draw(st.booleans()):
            arguments[name] = draw(st.sampled_from(SMOOTH if coarse else ACTIVATIONS))
    if (normalization := draw(st.sampled_from([None, None, "layer", "group", "batch"]))) is not None:
        elementwise = normalization == "layer" and draw(st.booleans())
        options = Normalization(normalization, separate=draw(st.booleans()), elementwise=elementwise, epsilon=0.1)
        shape = (*state[1:3], 4 * F) if elementwise else (4 * F,)
        names = ["gamma", "beta"] + ["mean", "variance"] * (normalization == "batch" and draw(st.booleans()))
        weights = {
            f"{name}{part}": np.abs(normal(*shape)) for name in names for part in NORMALIZED_PARTS[options.separate]
        }
        arguments |= {"normalization": options, "normalization_weights": weights}
    if dropped := draw(st.sampled_from([(), (), ("x",), ("h",), ("x", "h")])):
        frames = {"x": (B, H, W, C), "h": state}
        arguments["dropout_masks"] = {name: np.abs(normal(4, *frames[name])) for name in dropped}
    for name in ("go_backwards", "return_sequences", "return_state"):
        if draw(st.booleans()):
            arguments[name] = name != "return_sequences"
    outputs = functional.convlstm2d(**arguments, engine="reference")
    if "return_state" in arguments:
        return arguments, tuple(normal(*output.shape) for output in outputs)
    return arguments, normal(*outputs.shape)


@st.composite
def max_pool3d_cases(draw):
    pool_size = draw(st.tuples(*[st.integers(1, 3)] * 3))
    options = {"pool_size": pool_size, "strides": draw(st.none() | st.tuples(*[st.integers(1, 4)] * 3)),
               "ceil_mode": draw(st.booleans()), "return_indices": draw(st.booleans()),
               "data_format": draw(st.sampled_from(["channels_last", "channels_first"]))}  # fmt: skip
    shape = [draw(st.integers(0, 2)), *(k + draw(st.integers(0, 6)) for k in pool_size)]
    shape.insert(1 if options["data_format"] == "channels_first" else 4, draw(st.sampled_from([1, 3, 8, 20])))
    pads = st.tuples(*[st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)) for k in pool_size])
    options["padding"] = draw(st.sampled_from(["valid", "same"]) | pads)
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    values = [-np.inf, -1, 0, 1, np.inf, np.nan]  # few, so that windows hold ties
    return {"x": rng.choice(values, shape, p=[0.5, 0.1, 0.2, 0.1, 0.05, 0.05]), **options}, rng


@every_case
def test_conv2d(engine, dtype, algorithm):
    @examples(engine, 50, algorithm)
    @given(conv2d_cases(kernels_for(engine, dtype, algorithm), algorithm == "winograd"))
    def check(case):
        agree("conv2d", *case, engine, dtype, algorithm)

    check()


@every_case
def test_conv2d_transpose(engine, dtype, algorithm):
    @examples(engine, 50, algorithm)
    @given(conv2d_transpose_cases(kernels_for(engine, dtype, algorithm), algorithm == "winograd"))
    def check(case):
        agree("conv2d_transpose", *case, engine, dtype, algorithm)

    check()


@every_engine
def test_sums_over_many_pixels_keep_their_digits(engine):
    B = 1 if is_emulated(engine) else 8
    x, dy = np.ones((B, 128, 128, 1), np.float32), np.full((B, 128, 128, 3), 0.1, np.float32)
    _, pullback = functional.conv2d_vjp(x, np.ones((1, 1, 1, 3), np.float32), np.zeros(3, np.float32), engine=engine)
    np.testing.assert_allclose(pullback(dy)["bias"], np.float64(np.float32(0.1)) * B * 128 * 128, rtol=1e-6)


@every_case
def test_convlstm2d(engine, dtype, algorithm):
    @examples(engine, 80, algorithm)
    @given(convlstm2d_cases(kernels_for(engine, dtype, algorithm), algorithm == "winograd", algorithm in COARSER),
           st.booleans())  # fmt: skip
    def check(case, recompute):
        agree("convlstm2d", *case, engine, dtype, algorithm, recompute=recompute)

    check()


@st.composite
def cell_cases(draw, kernels, fits):
    (B, H, W, C), kernel, options = draw(convolutions(kernels, fits))
    operation, G, further = draw(st.sampled_from([
        ("convgru2d", 3, {}), ("convgru2d", 3, {"reset_after": False}), ("convrnn2d", 1, {})
    ]))  # fmt: skip
    T, F, normal = draw(st.integers(1, 4)), draw(st.sampled_from([1, 3, 8, 20])), randoms(draw(st.integers(0, 999)))
    recurrent = draw(kernels)
    arguments = {"x": normal(B, T, H, W, C), "kernel": normal(*kernel, C, G * F) / 4, **options, **further,
                 "recurrent_kernel": normal(*recurrent, F, G * F) / 4, "return_state": True}  # fmt: skip
    for name in ("go_backwards", "return_sequences"):
        arguments[name] = draw(st.booleans())
    output, h = getattr(functional, operation)(**arguments, engine="reference")
    if draw(st.booleans()):
        arguments["bias"] = normal(*(() if G == 1 or further else (2,)), G * F)
    if draw(st.booleans()):
        arguments["initial_state"] = (normal(*h.shape),)
    if draw(st.booleans()):
        arguments["mask"] = normal(B, T) > -0.5
    if draw(st.booleans()):
        arguments["activation"] = draw(st.sampled_from(["relu", "softplus", "hard_sigmoid"]))
    if draw(st.sampled_from([False, False, True])):
        arguments["dropout_masks"] = {"h": normal(G, *h.shape)}
    return operation, arguments, (normal(*output.shape), normal(*h.shape))


@every_case
def test_cells(engine, dtype, algorithm):
    @examples(engine, 20, algorithm)
    @given(cell_cases(kernels_for(engine, dtype, algorithm), algorithm == "winograd"))
    def check(case):
        operation, arguments, cotangents = case
        agree(operation, arguments, cotangents, engine, dtype, algorithm)

    check()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@every_engine
def test_max_pool3d(engine, dtype):
    """The very same elements win as in the oracle's float64."""

    @examples(engine, 80)
    @given(max_pool3d_cases())
    def check(case):
        arguments, rng = case
        shape = functional.max_pool3d(**(arguments | {"return_indices": False}), engine="reference").shape
        dy = rng.integers(-9, 10, shape).astype(float)  # sums of integers are exact
        cotangents = (dy, None) if arguments["return_indices"] else dy
        expected = run("max_pool3d", arguments, cotangents, np.float64, engine="reference")
        results = run("max_pool3d", arguments, cotangents, dtype, engine=engine)
        assert results.keys() == expected.keys()
        for name, value in expected.items():
            assert results[name].dtype == (value.dtype if value.dtype.kind == "i" else dtype)
            np.testing.assert_array_equal(results[name], value, name)

    check()


# Kinds of arrays.


def big_problem(B=2, T=3, H=9, W=7, C=3, F=5, seed=0):
    """Arguments and cotangents of convlstm2d with everything on, values that float16 holds."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: (rng.integers(-8, 9, shape) / 16).astype(np.float32)  # noqa: E731
    arguments = {"x": draw(B, T, H, W, C), "kernel": draw(3, 3, C, 4 * F), "recurrent_kernel": draw(3, 3, F, 4 * F),
                 "bias": draw(4 * F), "initial_state": (draw(B, H, W, F), draw(B, H, W, F)),
                 "peephole": {gate: draw(H, W, F) for gate in "ifo"}}  # fmt: skip
    return arguments, (draw(B, T, H, W, F), draw(B, H, W, F), draw(B, H, W, F))


def embedded(a):
    """A slice of a larger array."""
    larger = np.full([n + 2 for n in a.shape], np.nan, a.dtype)
    inner = larger[tuple(slice(1, -1) for _ in a.shape)]
    inner[...] = a
    return inner


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def unaligned(a):
    raw = np.empty(a.nbytes + 1, np.uint8)
    view = raw[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


FORMS = {
    "slice": embedded,
    "every second": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "negative strides": lambda a: np.flip(np.flip(a).copy()),
    "Fortran order": np.asfortranarray,
    "broadcast": lambda a: np.broadcast_to(a, (2, *a.shape))[1],
    "read-only": read_only,
    "big-endian": lambda a: a.astype(">f4"),
    "unaligned": unaligned,
    "float16": lambda a: a.astype(np.float16),
}


def in_form(value, form):
    if isinstance(value, dict):
        return {name: in_form(item, form) for name, item in value.items()}
    return tuple(in_form(item, form) for item in value) if isinstance(value, tuple) else form(value)


@pytest.mark.parametrize("form", FORMS)
@every_engine
def test_form_of_the_arrays_does_not_matter(engine, form):
    arguments, cotangents = big_problem()
    expected = run("convlstm2d", arguments | {"return_state": True}, cotangents, np.float32, engine=engine)
    formed, cotangents = in_form(arguments, FORMS[form]), in_form(cotangents, FORMS[form])
    untouched = {name: np.array(value) for name, value in flatten(formed, "").items()}
    outputs, pullback = functional.convlstm2d_vjp(**formed, return_state=True, engine=engine)
    for name, value in (flatten(outputs, "y") | flatten(pullback(cotangents), "d")).items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, expected[name], name)
    for name, value in flatten(formed, "").items():
        np.testing.assert_array_equal(value, untouched[name], f"{name} was modified")

    of_formed, of_plain = (
        (functional.max_pool3d(x, 2, 1, engine=engine), functional.conv2d(x[:, 0], kernel, engine=engine))
        for x, kernel in ((formed["x"], formed["kernel"]), (arguments["x"], arguments["kernel"]))
    )
    for result, value in zip(of_formed, of_plain, strict=True):
        np.testing.assert_array_equal(result, value)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, bool])
@every_engine
def test_integers_are_computed_as_float32(engine, dtype):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2, (2, 3, 6, 5, 2)).astype(dtype)
    kernel = rng.integers(0, 2, (3, 3, 2, 8)).astype(dtype)
    for result, expected in (
        (functional.conv2d(x[:, 0], kernel, engine=engine),
         functional.conv2d(x[:, 0].astype("f4"), kernel.astype("f4"), engine=engine)),
        (functional.convlstm2d(x, kernel, kernel, engine=engine),
         functional.convlstm2d(x.astype("f4"), kernel.astype("f4"), kernel.astype("f4"), engine=engine)),
        (functional.max_pool3d(x, engine=engine), functional.max_pool3d(x.astype("f4"), engine=engine)),
    ):  # fmt: skip
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, expected)


# What goes wrong stays where it is.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_algorithm
def test_bad_pixel_contaminates_its_receptive_field(engine, algorithm, bad):
    rng = np.random.default_rng(2)
    x, kernel = rng.standard_normal((2, 19, 18, 3)).astype("f4"), rng.standard_normal((3, 3, 3, 8)).astype("f4")
    clean = functional.conv2d(x, kernel, engine=engine, algorithm=algorithm)
    x[1, 7, 9, 1] = bad
    y = functional.conv2d(x, kernel, engine=engine, algorithm=algorithm)
    reached = np.zeros(y.shape, bool)
    reached[1, 6:9, 8:11] = True
    np.testing.assert_array_equal(~np.isfinite(y), reached)
    np.testing.assert_array_equal(y[0], clean[0])  # the other image keeps its bits
    np.testing.assert_allclose(y[~reached], clean[~reached], rtol=1e-5, atol=1e-5)  # this one may change algorithm


@every_algorithm
def test_nan_reaches_the_states_it_should(engine, algorithm):
    arguments, _ = big_problem(B=1, H=15, W=13)
    arguments["x"][0, 1, 7, 6, 0] = np.nan
    output = functional.convlstm2d(**arguments, engine=engine, algorithm=algorithm)
    rows, columns = np.ogrid[:15, :13]
    distance = np.maximum(abs(rows - 7), abs(columns - 6))
    for t, reach in ((0, -1), (1, 1), (2, 2)):
        np.testing.assert_array_equal(np.isnan(output[0, t]), np.repeat(distance[..., np.newaxis] <= reach, 5, -1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@every_engine
def test_saturated_gates_reach_their_limits(engine, dtype):
    """Pre-activations from -2000 to 2000, where exponentials overflow."""
    eps = np.finfo(dtype).eps
    x = np.array([-2000, -100, 0, 100, 2000], dtype).reshape(1, 1, 1, 5, 1)
    kernel, recurrent = np.ones((1, 1, 1, 4), dtype), np.zeros((1, 1, 1, 4), dtype)
    h = functional.convlstm2d(x, kernel, recurrent, engine=engine)
    limit = np.tanh(np.ones((), dtype))  # of h as i, g and o approach 1
    np.testing.assert_allclose(h.ravel(), [0, 0, 0, limit, limit], rtol=4 * eps, atol=2 * eps)


@every_engine
def test_empty_batch(engine):
    arguments, cotangents = big_problem(B=0)
    results = run("convlstm2d", arguments | {"return_state": True}, cotangents, np.float32, engine=engine)
    assert results["y 0"].shape == (0, 3, 9, 7, 5)
    assert results["d x"].shape == (0, 3, 9, 7, 3)
    np.testing.assert_array_equal(results["d kernel"], np.zeros((3, 3, 3, 20)))
    conv = {"x": arguments["x"][:, 0], "kernel": arguments["kernel"]}
    conv = run("conv2d", conv, np.zeros((0, 9, 7, 20)), np.float32, engine=engine)
    assert conv["y"].shape == (0, 9, 7, 20)
    np.testing.assert_array_equal(conv["d kernel"], np.zeros((3, 3, 3, 20)))
    y, indices = functional.max_pool3d(arguments["x"], return_indices=True, engine=engine)
    assert y.shape == indices.shape == (0, 1, 4, 3, 3)


# The same bits.


def every_result(engine, algorithm):
    """Outputs and gradients of all operations, of sizes that make several threads worth it and of small ones.

    "auto" takes what the others do, and chooses without knowing of threads: one size will do.
    """
    largest = {"B": 4, "T": 2, "H": 17, "W": 13, "F": 20}
    others = {"B": 1, "T": 2, "H": 40, "W": 33, "C": 1, "F": 8}, {"B": 5, "H": 3, "W": 2, "F": 1}
    for sizes_ in (largest, *(() if algorithm == "auto" else others)):
        arguments, cotangents = big_problem(**sizes_)
        arguments["return_state"] = True
        yield from run("convlstm2d", arguments, cotangents, np.float32, engine=engine, algorithm=algorithm).items()
        del arguments["peephole"]
        for recompute in (False, True):
            yield from run("convlstm2d", arguments, cotangents, np.float32, {"recompute": recompute}, engine=engine,
                           algorithm=algorithm).items()  # fmt: skip
        x, kernel = arguments["x"][:, 0], arguments["kernel"]
        dy = randoms(3)(*x.shape[:3], kernel.shape[-1])
        yield from run("conv2d", {"x": x, "kernel": kernel}, dy, np.float32, engine=engine, algorithm=algorithm).items()
        options = {"x": arguments["x"], "pool_size": 2, "strides": 1}
        y = functional.max_pool3d(**options, engine=engine)
        yield from run("max_pool3d", options, randoms(4)(*y.shape), np.float32, engine=engine).items()


@pytest.mark.parametrize("algorithm", ["auto", *ALGORITHMS["cpu"]])
def test_bits_do_not_depend_on_the_thread_count(algorithm):
    fastclstm.set_num_threads(None)
    most = fastclstm.get_num_threads()
    if most == 1:
        pytest.skip("one processor: there is no other thread count to compare with")
    try:
        fastclstm.set_num_threads(1)
        expected = list(every_result("cpu", algorithm))
        for count in sorted({2, 3, most}):
            fastclstm.set_num_threads(count)
            for (name, value), (_, alone) in zip(every_result("cpu", algorithm), expected, strict=True):
                np.testing.assert_array_equal(value, alone, f"{name} with {count} threads")
    finally:
        fastclstm.set_num_threads(None)


@pytest.mark.parametrize(("engine", "algorithm"), [(e, a) for e, names in ALGORITHMS.items() for a in names])
def test_bits_do_not_depend_on_the_batch(engine, algorithm):
    arguments, _ = big_problem(B=5, H=10, W=11)
    whole = functional.convlstm2d(**arguments, engine=engine, algorithm=algorithm)
    for batch in (slice(0, 1), slice(1, 3), slice(3, 5)):
        part = arguments | {"x": arguments["x"][batch]}
        part["initial_state"] = tuple(state[batch] for state in arguments["initial_state"])
        np.testing.assert_array_equal(functional.convlstm2d(**part, engine=engine, algorithm=algorithm), whole[batch])
    x, kernel = arguments["x"][:, 0], arguments["kernel"]
    whole = functional.conv2d(x, kernel, engine=engine, algorithm=algorithm)
    np.testing.assert_array_equal(functional.conv2d(x[2:4], kernel, engine=engine, algorithm=algorithm), whole[2:4])


@pytest.mark.parametrize("options", [{}, {"mask": [[1, 0, 1], [0, 0, 0]]}, {"go_backwards": True}])
@pytest.mark.parametrize("return_sequences", [True, False])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("peephole", [True, False])
@every_engine
def test_last_states_go_where_they_are_wanted(engine, T, options, return_sequences, peephole):
    """What `out` receives, also over the initial cell state, are the bits that are returned without it."""
    arguments, _ = big_problem(T=T)
    arguments |= options | {"return_sequences": return_sequences}
    if "mask" in options:
        arguments["mask"] = np.array(options["mask"])[:, :T]
    if not peephole:
        del arguments["peephole"]
    call = ConvLSTMCall(**arguments, engine=engine)
    expected = call.forward(save=False)
    h, c = np.full_like(expected[1], np.nan), call.arrays["c"].copy()
    call.arrays["c"] = c
    results = call.forward(save=False, out=(h, c))
    assert results[1] is h
    assert results[2] is c
    for result, value in zip(results[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(result, value)


@pytest.mark.parametrize("T", [1, 3])
@every_engine
def test_results_share_no_memory(engine, T):
    """Writing over results changes neither each other, nor the inputs, nor a gradient taken later."""
    arguments, cotangents = big_problem(T=T)
    for options in ({}, {"return_sequences": False}):
        dy = (cotangents[1], *cotangents[1:]) if options else cotangents
        _, pullback = functional.convlstm2d_vjp(**arguments, **options, return_state=True, engine=engine)
        expected = flatten(pullback(dy), "d")
        outputs, pullback = functional.convlstm2d_vjp(**arguments, **options, return_state=True, engine=engine)
        kept = {name: value.copy() for name, value in flatten(arguments, "").items()}
        for n, output in enumerate(outputs):
            output[...] = np.nan
            assert not any(np.shares_memory(output, other) for other in outputs[n + 1 :])
        for name, gradient in flatten(pullback(dy), "d").items():
            np.testing.assert_array_equal(gradient, expected[name])
        for name, value in flatten(arguments, "").items():
            np.testing.assert_array_equal(value, kept[name])
