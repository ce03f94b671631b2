import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastclstm.engines import reference
from fastclstm.nn import activations
from fastclstm.nn.normalization import Normalization
from fastclstm.spec import NORMALIZED_PARTS, ConvLSTMSpec, ConvSpec, PoolSpec

STEP = 1e-30


def arange(shape, divisor=1.0):
    return np.arange(math.prod(shape)).reshape(shape) / divisor


class Problem:
    """A ConvLSTM with random arguments."""

    def __init__(self, seed=0, *, B=2, T=3, H=5, W=4, C=2, F=3, kernel=(3, 3), recurrent=None, peephole=None,
                 peephole_biases=False, mask=None, state=True, bias=True, dtype=np.float64, activation="tanh",
                 recurrent_activation="sigmoid", output_activation="tanh", normalization=None, statistics=False,
                 dropout=(), **options):  # fmt: skip
        rng = np.random.default_rng(seed)
        draw = lambda *shape: (0.6 * rng.standard_normal(shape)).astype(dtype)  # noqa: E731
        named = {"activation": activation, "recurrent_activation": recurrent_activation,
                 "output_activation": output_activation}  # fmt: skip
        options |= {name: activations.get(value) for name, value in named.items()}
        x_shape, kernel_shape = (B, T, H, W, C), (*kernel, C, 4 * F)
        recurrent_shape = (*(recurrent or kernel), F, 4 * F)
        state_shape = ConvLSTMSpec.infer(x_shape, kernel_shape, recurrent_shape, **options).state_shape
        self.arrays = {"x": draw(*x_shape), "kernel": draw(*kernel_shape), "recurrent_kernel": draw(*recurrent_shape)}
        self.arrays["bias"] = draw(4 * F) if bias else None
        self.arrays |= {name: draw(*state_shape) if state else None for name in ("h", "c")}
        self.arrays["peephole"] = None
        if peephole is not None:
            shape = {"channel": (F,), "elementwise": state_shape[1:], "conv": (3, 2, F, F)}[peephole]
            biases = {f"bias_{gate}": draw(F) for gate in "ifo"} if peephole_biases else {}
            self.arrays["peephole"] = {gate: draw(*shape) for gate in "ifo"} | biases
        self.arrays["mask"] = None if mask is None else np.array(mask, bool)
        self.arrays |= {"normalization": None, "dropout": None}
        if normalization is not None:
            names = ["gamma", "beta"] + ["mean", "variance"] * statistics
            shape = (*state_shape[1:3], 4 * F) if normalization.elementwise else (4 * F,)
            parts = NORMALIZED_PARTS[normalization.separate]
            self.arrays["normalization"] = {f"{name}{part}": 1 + draw(*shape) ** 2 for name in names for part in parts}
        if dropout:
            sizes = {"x": (B, H, W, C), "h": state_shape}
            self.arrays["dropout"] = {name: draw(4, *sizes[name]) for name in dropout}
        shapes = {f"{group}_shapes": {name: array.shape for name, array in self.arrays[group].items()}
                  for group in ("peephole", "normalization", "dropout") if self.arrays[group]}  # fmt: skip
        self.spec = ConvLSTMSpec.infer(x_shape, kernel_shape, recurrent_shape, normalization=normalization, **shapes,
                                       **options)  # fmt: skip
        shapes = {"dy": self.spec.output_shape, "dh": self.spec.state_shape, "dc": self.spec.state_shape}
        self.cotangents = {name: draw(*shape) for name, shape in shapes.items()}

    def run(self, save=False, **changes):
        return reference.convlstm2d(self.spec, **(self.arrays | changes), save=save)

    def gradients(self, **changes):
        """Gradients by the engine's backward pass, flat: peephole weights under "peephole i" and so on."""
        saved = self.run(save=True)[3]
        gradients = reference.convlstm2d_backward(self.spec, saved, **(self.cotangents | changes))
        groups = {name: gradients.pop(name) or {} for name in ("peephole", "normalization")}
        learnt = {f"{group} {name}": array for group, named in groups.items() for name, array in named.items()}
        return gradients | {name: array for name, array in learnt.items() if "mean" not in name and "var" not in name}

    def loss(self, arrays):
        """The scalar whose gradient the cotangents are."""
        outputs = reference.convlstm2d(self.spec, **arrays)[:3]
        return sum((y * dy).sum() for y, dy in zip(outputs, self.cotangents.values(), strict=True))

    def derivative_along(self, name, direction):
        """Derivative of the loss as argument `name` moves in `direction`, by a complex step."""
        widen = lambda value: None if value is None else value.astype(complex)  # noqa: E731
        groups = ("peephole", "normalization", "dropout")
        arrays = {key: widen(value) for key, value in self.arrays.items() if key not in ("mask", *groups)}
        for group_ in groups:
            named = self.arrays[group_]
            arrays[group_] = None if named is None else {key: widen(value) for key, value in named.items()}
        arrays["mask"] = self.arrays["mask"]
        group, _, key = name.partition(" ")
        (arrays[group] if key else arrays)[key or group] += 1j * STEP * direction
        return self.loss(arrays).imag / STEP


# Published and hand-computed values.


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-9), (np.float32, 1e-6)])
class TestGoldenVectors:
    """Keras's published tests. They print 8 digits of float32; float64 is held to its own value, agreed in them all."""

    @staticmethod
    def run(dtype, x, kernel_shape, recurrent_shape, bias, state=None, **options):
        spec = ConvLSTMSpec.infer(
            x.shape, kernel_shape, recurrent_shape, activation=activations.get("tanh"),
            recurrent_activation=activations.get("sigmoid"), output_activation=activations.get("tanh"), **options,
        )  # fmt: skip
        kernel, recurrent = np.full(kernel_shape, 0.01, dtype), np.full(recurrent_shape, 0.02, dtype)
        state = None if state is None else state.astype(dtype)
        bias = np.repeat(bias, spec.F).astype(dtype)
        _, h, c, _ = reference.convlstm2d(spec, x.astype(dtype), kernel, recurrent, bias, state, state, None, None)
        assert h.dtype == c.dtype == dtype
        return h, c

    def test_one_step(self, dtype, rtol):
        h, c = self.run(dtype, arange((2, 1, 5, 5, 3), 10), (3, 3, 3, 16), (3, 3, 4, 16), (0, 1, 0, 0),
                        arange((2, 5, 5, 4), 10))  # fmt: skip
        assert h.sum(dtype=float) == pytest.approx(188.89502, abs=5e-6 if dtype == np.float64 else 188 * rtol)
        assert c.sum(dtype=float) == pytest.approx(2170.444, abs=5e-4 if dtype == np.float64 else 2170 * rtol)
        assert h.sum(dtype=float) == pytest.approx(188.89502487009355, rel=rtol)
        assert c.sum(dtype=float) == pytest.approx(2170.444143531159, rel=rtol)

    def test_three_steps_from_a_state(self, dtype, rtol):
        h, _ = self.run(dtype, arange((2, 3, 5, 5, 3), 100), (3, 3, 3, 16), (3, 3, 4, 16), (0, 1, 0, 0),
                        arange((2, 5, 5, 4), 100))  # fmt: skip
        assert h.sum(dtype=float) == pytest.approx(119.812454, abs=5e-6 if dtype == np.float64 else 120 * rtol)
        assert h.sum(dtype=float) == pytest.approx(119.81245160825134, rel=rtol)

    def test_valid_padding(self, dtype, rtol):
        h, _ = self.run(dtype, arange((2, 3, 4, 4, 5), 100), (3, 3, 5, 8), (3, 3, 2, 8), (0.03, 1, 0.03, 0.03),
                        padding="valid")  # fmt: skip
        np.testing.assert_allclose(h[0, 0, 0], [0.48694518] * 2, rtol=1e-7 if dtype == np.float64 else rtol)
        np.testing.assert_allclose(h[1, 1, 1], [0.8800861] * 2, rtol=1.2e-7 if dtype == np.float64 else rtol)


def frames(values):
    return np.array(values, float)[np.newaxis, :, :, np.newaxis]


def test_conv2d_by_hand():
    x = frames([[1, 2], [3, 4]])
    kernel = arange((3, 3, 1, 1)) + 1
    spec = ConvSpec.infer(x.shape, kernel.shape)
    np.testing.assert_array_equal(
        reference.conv2d(spec, x, kernel, np.array([100.0])), frames([[177, 167], [147, 137]])
    )
    dx, dkernel, dbias = reference.conv2d_backward(spec, x, kernel, frames([[1, 0], [0, 10]]))
    np.testing.assert_array_equal(dx, frames([[5 + 10, 6 + 20], [8 + 40, 9 + 50]]))
    np.testing.assert_array_equal(dkernel[:, :, 0, 0], [[10, 20, 0], [30, 1 + 40, 2], [0, 3, 4]])
    np.testing.assert_array_equal(dbias, [11])


def test_even_kernel_pads_after():
    x = frames([[1, 2], [3, 4]])
    kernel = arange((2, 2, 1, 1)) + 1
    y = reference.conv2d(ConvSpec.infer(x.shape, kernel.shape), x, kernel, None)
    np.testing.assert_array_equal(y, frames([[30, 14], [11, 4]]))


def test_gates_by_hand():
    """With linear activations and 1×1 kernels i = x, f = 2x, g = 3x, o = 4x: c = f·1 + i·g and h = o·c are integers."""
    linear = {f"{kind}activation": activations.get("linear") for kind in ("", "recurrent_", "output_")}
    x = frames([[1, 2], [3, 4]])[:, np.newaxis]
    kernel, recurrent = np.array([1.0, 2, 3, 4]).reshape(1, 1, 1, 4), np.zeros((1, 1, 1, 4))
    spec = ConvLSTMSpec.infer(x.shape, kernel.shape, recurrent.shape, **linear)
    state = np.ones((1, 2, 2, 1))
    output, h, c, saved = reference.convlstm2d(spec, x, kernel, recurrent, None, state, state, None, None, save=True)
    np.testing.assert_array_equal(c, frames([[5, 16], [33, 56]]))
    np.testing.assert_array_equal(h, frames([[20, 128], [396, 896]]))
    np.testing.assert_array_equal(output[:, 0], h)
    gradients = reference.convlstm2d_backward(spec, saved, np.ones_like(output), None, None)  # of 8x² + 12x³
    np.testing.assert_array_equal(gradients["x"][:, 0], frames([[52, 176], [372, 640]]))
    np.testing.assert_array_equal(gradients["c"], frames([[8, 32], [72, 128]]))  # h = 4x(2x·c + 3x²)


def test_one_pixel_is_the_peephole_lstm_of_scalars():
    p = Problem(H=1, W=1, C=1, F=1, B=1, T=4, kernel=(1, 1), peephole="elementwise")
    a = {name: value for name, value in p.arrays.items() if isinstance(value, np.ndarray)}
    x, kernel, recurrent, bias, h, c = (value.ravel().tolist() for value in a.values())
    wi, wf, wo = (p.arrays["peephole"][gate].item() for gate in "ifo")
    h, c, outputs = h[0], c[0], []
    sigma = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    for x_t in x:
        zi, zf, zg, zo = (kernel[n] * x_t + recurrent[n] * h + bias[n] for n in range(4))
        c_t = sigma(zf + wf * c) * c + sigma(zi + wi * c) * math.tanh(zg)
        h, c = sigma(zo + wo * c_t) * math.tanh(c_t), c_t
        outputs.append(h)
    sequence, h_last, c_last, _ = p.run()
    np.testing.assert_allclose(sequence.ravel(), outputs, rtol=1e-13)
    np.testing.assert_allclose([h_last.item(), c_last.item()], [h, c], rtol=1e-13)


# The convolution, by loops over everything.


def conv2d_by_loops(spec, x, kernel, bias):
    y = np.tile(bias, (spec.B, spec.HO, spec.WO, 1))
    for row, column, kh, kw in np.ndindex(spec.HO, spec.WO, spec.KH, spec.KW):
        r = row * spec.strides[0] + kh * spec.dilation[0] - spec.padding[0][0]
        c = column * spec.strides[1] + kw * spec.dilation[1] - spec.padding[1][0]
        if spec.padding_mode == "circular":
            r, c = r % spec.H, c % spec.W
        if 0 <= r < spec.H and 0 <= c < spec.W:
            y[:, row, column] += x[:, r, c] @ kernel[kh, kw]
    return y


@st.composite
def conv_specs(draw):
    size = st.integers(1, 6)
    H, W, KH, KW = (draw(size) for _ in range(4))
    name = draw(st.sampled_from(["strides", "dilation"]))
    pads = st.integers(0, 7)
    padding = draw(st.sampled_from(["same", "valid"]) | st.tuples(*[st.tuples(pads, pads)] * 2))
    options = {name: (draw(st.integers(1, 3)), draw(st.integers(1, 3))), "padding": padding,
               "padding_mode": draw(st.sampled_from(["zeros", "circular"]))}  # fmt: skip
    shapes = (draw(st.integers(0, 2)), H, W, draw(st.integers(1, 3))), (KH, KW)
    kernel_shape = (*shapes[1], shapes[0][3], draw(st.integers(1, 3)))
    try:
        return ConvSpec.infer(shapes[0], kernel_shape, **options)
    except ValueError:
        assume(False)


@settings(max_examples=150)
@given(conv_specs(), st.booleans())
def test_conv2d_is_the_sum_over_taps(spec, small_blocks):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((spec.B, spec.H, spec.W, spec.C))
    kernel = rng.standard_normal((spec.KH, spec.KW, spec.C, spec.F))
    bias = rng.standard_normal(spec.F)
    dy = rng.standard_normal((spec.B, spec.HO, spec.WO, spec.F))
    with pytest.MonkeyPatch.context() as patch:
        if small_blocks:  # one output row each
            patch.setattr(reference, "COLUMN_BYTES", 1)
        y = reference.conv2d(spec, x, kernel, bias)
        dx, dkernel, dbias = reference.conv2d_backward(spec, x, kernel, dy)
    expected = conv2d_by_loops(spec, x, kernel, bias)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)
    # y is bilinear in x and kernel, so its derivatives along any directions are convolutions too
    for gradient, direction, change in (
        (dx, rng.standard_normal(x.shape), lambda v: conv2d_by_loops(spec, v, kernel, 0 * bias)),
        (dkernel, rng.standard_normal(kernel.shape), lambda v: conv2d_by_loops(spec, x, v, 0 * bias)),
        (dbias, rng.standard_normal(bias.shape), lambda v: np.broadcast_to(v, dy.shape)),
    ):
        assert gradient.shape == direction.shape
        assert (gradient * direction).sum() == pytest.approx((change(direction) * dy).sum(), rel=1e-11, abs=1e-11)


def test_conv2d_without_a_cotangent_has_zero_gradients():
    spec = ConvSpec.infer((1, 2, 2, 3), (3, 3, 3, 2))
    gradients = reference.conv2d_backward(spec, np.ones((1, 2, 2, 3), "f4"), np.ones((3, 3, 3, 2), "f4"), None)
    assert [g.shape for g in gradients] == [(1, 2, 2, 3), (3, 3, 3, 2), (2,)]
    assert all(g.dtype == np.float32 and not g.any() for g in gradients)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"strides": (2, 1)}, {"dilation": 2}, {"padding": "valid"},
                                     {"padding_mode": "circular"}])  # fmt: skip
def test_bad_pixel_contaminates_its_receptive_field(options, bad):
    spec = ConvSpec.infer((2, 7, 8, 2), (3, 4, 2, 3), **options)
    rng = np.random.default_rng(2)
    x, kernel = rng.standard_normal((2, 7, 8, 2)), rng.standard_normal((3, 4, 2, 3))
    marker = np.zeros_like(x)
    marker[1, 3, 4, 1] = 1
    reached = conv2d_by_loops(spec, marker, np.ones_like(kernel), np.zeros(3)) > 0
    assert 0 < reached.sum() < reached.size / 2
    y = reference.conv2d(spec, np.where(marker, bad, x), kernel, None)
    np.testing.assert_array_equal(~np.isfinite(y), reached)
    np.testing.assert_array_equal(y[~reached], reference.conv2d(spec, x, kernel, None)[~reached])


def test_shift_commutes_with_circular_convolution():
    spec = ConvSpec.infer((1, 5, 6, 2), (4, 3, 2, 3), padding_mode="circular")
    rng = np.random.default_rng(3)
    x, kernel = rng.standard_normal((1, 5, 6, 2)), rng.standard_normal((4, 3, 2, 3))
    shift = lambda a: np.roll(a, (2, -1), (1, 2))  # noqa: E731
    np.testing.assert_allclose(reference.conv2d(spec, shift(x), kernel, None),
                               shift(reference.conv2d(spec, x, kernel, None)), rtol=1e-13)  # fmt: skip


# Gradients of the ConvLSTM.

MASK = [[True, False, True], [False, True, False]]
VARIANTS = {
    "plain": {},
    "no bias, no state": {"bias": False, "state": False},
    "strides": {"strides": (2, 1), "H": 6},
    "dilation": {"dilation": (2, 1), "recurrent_dilation": (1, 2)},
    "circular": {"padding_mode": "circular", "kernel": (4, 3)},
    "valid": {"padding": "valid", "recurrent": (2, 3)},
    "explicit padding": {"padding": ((2, 0), (1, 3))},
    "kernel larger than the frame": {"H": 1, "W": 2, "kernel": (5, 4)},
    "one step, one pixel, one filter": {"H": 1, "W": 1, "T": 1, "C": 1, "F": 1, "kernel": (1, 1)},
    "channel peephole": {"peephole": "channel"},
    "elementwise peephole": {"peephole": "elementwise", "strides": 2},
    "conv peephole": {"peephole": "conv"},
    "conv peephole with biases": {"peephole": "conv", "peephole_biases": True, "padding_mode": "circular"},
    "clip": {"cell_clip": 0.3},
    "clip under peepholes": {"cell_clip": 0.3, "peephole": "elementwise"},
    "mask": {"mask": MASK},
    "mask, everything else": {"mask": MASK, "peephole": "conv", "cell_clip": 0.4, "go_backwards": True},
    "last output only": {"return_sequences": False},
    "last output only, masked": {"return_sequences": False, "mask": MASK},
    "all masked": {"mask": np.zeros((2, 3)), "return_sequences": False},
    "backwards": {"go_backwards": True},
    "backwards, last output only": {"go_backwards": True, "return_sequences": False, "mask": MASK},
    "three activations": {
        "activation": "softsign",
        "recurrent_activation": "hard_sigmoid",
        "output_activation": "gelu",
    },
    "three more": {"activation": "silu", "recurrent_activation": "hard_sigmoid_keras2", "output_activation": "elu"},
    "linear and relu": {"activation": "linear", "recurrent_activation": "sigmoid", "output_activation": "relu"},
    "dropout": {"dropout": ("x", "h"), "strides": 2},
    "dropout of the frames": {"dropout": ("x",), "mask": MASK},
    "dropout of the state": {"dropout": ("h",), "bias": False},
    "layer normalization": {"normalization": Normalization("layer")},
    "layer normalization, each its own": {"normalization": Normalization("layer", separate=True, elementwise=True)},
    "group normalization": {"normalization": Normalization("group", groups=6), "peephole": "conv", "mask": MASK},
    "batch normalization": {"normalization": Normalization("batch"), "state": False},
    "batch normalization, masked": {"normalization": Normalization("batch", separate=True), "mask": MASK},
    "batch normalization, given": {"normalization": Normalization("batch", separate=True), "statistics": True},
    "dropout and normalization": {"normalization": Normalization("batch"), "dropout": ("x", "h"), "cell_clip": 0.4},
    "a caller's own": {"activation": (np.sin, np.cos), "output_activation": (np.arctan, lambda c: 1 / (1 + c * c))},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_a_complex_step(variant):
    p = Problem(**VARIANTS[variant])
    rng = np.random.default_rng(4)
    gradients = p.gradients()
    assert gradients["bias"].shape == (4 * p.spec.F,)
    optional = {name for name in ("bias", "h", "c") if p.arrays[name] is None}  # returned all the same
    for name, gradient in gradients.items():
        if name in optional:
            continue
        for _ in range(3):
            direction = rng.standard_normal(gradient.shape)
            terms = gradient * direction
            assert abs(terms.sum() - p.derivative_along(name, direction)) <= 1e-12 * (1 + np.abs(terms).sum()), name
    if variant == "clip":
        assert 0.2 < (np.abs(p.run()[2]) == 0.3).mean() < 0.8  # the test means something


def test_gradient_of_a_missing_bias_or_state_is_that_of_zeros():
    p = Problem(bias=False, state=False)
    missing = p.gradients()
    p.arrays |= {"bias": np.zeros(12), "h": np.zeros((2, 5, 4, 3)), "c": np.zeros((2, 5, 4, 3))}
    for name, gradient in p.gradients().items():
        np.testing.assert_array_equal(gradient, missing[name])
        assert gradient.any()


@pytest.mark.parametrize("variant", ["plain", "mask", "last output only"])
def test_missing_cotangents_are_zeros(variant):
    p = Problem(**VARIANTS[variant])
    for given_ in itertools.product([True, False], repeat=3):
        names = [name for name, is_given in zip(p.cotangents, given_, strict=True) if not is_given]
        by_none = p.gradients(**dict.fromkeys(names))
        by_zeros = p.gradients(**{name: np.zeros_like(p.cotangents[name]) for name in names})
        for name, gradient in by_none.items():
            np.testing.assert_array_equal(gradient, by_zeros[name])


# Laws of the ConvLSTM.


def test_splitting_a_sequence_and_passing_the_state_on_gives_the_whole():
    p = Problem(T=5, peephole="conv", mask=[[1, 1, 0, 0, 1], [0, 1, 1, 0, 1]], cell_clip=0.5)
    whole, h, c, _ = p.run()
    first, second = Problem(T=2, peephole="conv", cell_clip=0.5), Problem(T=3, peephole="conv", cell_clip=0.5)
    shared = {name: p.arrays[name] for name in ("kernel", "recurrent_kernel", "bias", "peephole")}
    x, mask = p.arrays["x"], p.arrays["mask"]
    start, h1, c1, _ = first.run(**shared, x=x[:, :2], mask=mask[:, :2], h=p.arrays["h"], c=p.arrays["c"])
    end, h2, c2, _ = second.run(**shared, x=x[:, 2:], mask=mask[:, 2:], h=h1, c=c1)
    np.testing.assert_array_equal(start, whole[:, :2])
    np.testing.assert_array_equal(h2, h)
    np.testing.assert_array_equal(c2, c)
    valid = np.array([[0, 0, 1], [1, 1, 1]], bool)  # before its first valid step the second half outputs zeros
    np.testing.assert_array_equal(end[valid], whole[:, 2:][valid])
    np.testing.assert_array_equal(end[~valid], 0)


def test_the_future_never_changes_the_past():
    p = Problem(T=4)
    before = p.run()[0]
    p.arrays["x"][:, 2:] += 1
    after = p.run()[0]
    np.testing.assert_array_equal(after[:, :2], before[:, :2])
    assert (after[:, 2:] != before[:, 2:]).any(axis=(0, 2, 3, 4)).all()


def test_going_backwards_is_reading_the_flipped_sequence():
    mask = np.array(MASK)
    forward, backward = Problem(mask=mask[:, ::-1]), Problem(mask=mask, go_backwards=True)
    expected = forward.run(x=forward.arrays["x"][:, ::-1])[:3]
    for result, value in zip(backward.run()[:3], expected, strict=True):
        np.testing.assert_array_equal(result, value)


def test_last_output_is_the_end_of_the_sequence():
    for mask in (None, MASK):
        last = Problem(mask=mask, return_sequences=False).run()
        whole = Problem(mask=mask).run()
        np.testing.assert_array_equal(last[0], whole[0][:, -1])
        np.testing.assert_array_equal(last[1], whole[1])


def test_a_masked_tail_is_a_shorter_sequence():
    p, shorter = Problem(T=4, mask=[[1, 1, 0, 0]] * 2), Problem(T=2)
    p.arrays["x"][:, 2:] = np.nan  # what is masked is not looked at
    shorter.arrays = p.arrays | {"x": p.arrays["x"][:, :2], "mask": None}
    output, h, c, _ = p.run()
    expected, h_short, c_short, _ = shorter.run()
    np.testing.assert_array_equal(h, h_short)
    np.testing.assert_array_equal(c, c_short)
    np.testing.assert_array_equal(output[:, :2], expected)
    np.testing.assert_array_equal(output[:, 2], expected[:, 1])
    np.testing.assert_array_equal(output[:, 3], expected[:, 1])
    gradients = p.gradients()
    np.testing.assert_array_equal(gradients["x"][:, 2:], 0)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_a_wholly_masked_sequence_keeps_its_state_and_outputs_zeros():
    p = Problem(mask=np.zeros((2, 3)))
    output, h, c, _ = p.run()
    np.testing.assert_array_equal(output, 0)
    np.testing.assert_array_equal(h, p.arrays["h"])
    np.testing.assert_array_equal(c, p.arrays["c"])
    gradients = p.gradients()
    np.testing.assert_array_equal(gradients["h"], p.cotangents["dh"])
    np.testing.assert_array_equal(gradients["c"], p.cotangents["dc"])


def test_a_mask_of_ones_is_none():
    p, masked = Problem(), Problem(mask=np.ones((2, 3)))
    for result, expected in zip(masked.run()[:3], p.run()[:3], strict=True):
        np.testing.assert_array_equal(result, expected)


def test_clipping():
    _, h, c, _ = Problem(cell_clip=0.25).run()
    assert np.abs(c).max() == 0.25
    assert np.abs(h).max() <= np.tanh(0.25)
    wide, free = Problem(cell_clip=1e9).run(), Problem().run()
    np.testing.assert_array_equal(wide[0], free[0])


def test_gradient_stops_at_a_clipped_cell():
    p = Problem(T=1, cell_clip=1e-6)
    gradients = p.gradients()
    np.testing.assert_array_equal(gradients["c"], 0)
    assert gradients["x"].any()  # through the output gate alone


def test_kinds_of_peephole_agree_where_they_mean_the_same():
    channel = Problem(peephole="channel")
    weights = channel.arrays["peephole"]
    same = {
        "elementwise": {gate: np.broadcast_to(w, (5, 4, 3)) for gate, w in weights.items()},
        "conv": {gate: np.zeros((3, 2, 3, 3)) for gate in weights},
    }
    for gate, w in weights.items():
        same["conv"][gate][1, 0] = np.diag(w)  # the centre of a 3 by 2 kernel
    for kind, peephole in same.items():
        result = Problem(peephole=kind).run(**(channel.arrays | {"peephole": peephole}))
        np.testing.assert_allclose(result[0], channel.run()[0], rtol=1e-13)


def test_nan_spreads_with_the_receptive_field_step_by_step():
    p = Problem(H=9, W=9, B=1)
    p.arrays["x"][0, 1, 4, 4, 0] = np.nan
    output = p.run()[0]
    rows, columns = np.ogrid[:9, :9]
    distance = np.maximum(abs(rows - 4), abs(columns - 4))
    for t, reach in ((0, -1), (1, 1), (2, 2)):
        np.testing.assert_array_equal(np.isnan(output[0, t]), np.repeat(distance[..., np.newaxis] <= reach, 3, -1))


def test_circular_convlstm_commutes_with_shifts():
    p = Problem(padding_mode="circular")
    shift = lambda a, axis: np.roll(a, (1, 2), (axis, axis + 1))  # noqa: E731
    a = p.arrays
    shifted = p.run(x=shift(a["x"], 2), h=shift(a["h"], 1), c=shift(a["c"], 1))[0]
    np.testing.assert_allclose(shifted, shift(p.run()[0], 2), rtol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_stays_float32_and_is_close(variant):
    single, double = Problem(**VARIANTS[variant], dtype=np.float32), Problem(**VARIANTS[variant])
    for result, expected in zip(single.run()[:3], double.run()[:3], strict=True):
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, atol=3e-6)
    expected = double.gradients()
    for name, gradient in single.gradients().items():
        assert gradient.dtype == np.float32, name
        np.testing.assert_allclose(gradient, expected[name], atol=1e-5 * (1 + np.abs(expected[name]).max()))


@pytest.mark.parametrize("variant", ["mask, everything else", "circular", "last output only"])
def test_empty_batch(variant):
    p = Problem(**VARIANTS[variant] | ({"mask": np.zeros((0, 3))} if "mask" in VARIANTS[variant] else {}), B=0)
    output, h, c, _ = p.run()
    assert output.shape == p.spec.output_shape
    assert h.shape == c.shape == (0, 5, 4, 3)
    for name, gradient in p.gradients().items():
        assert not gradient.any(), name


def flat(arrays):
    """Every array of nested dicts."""
    for value in arrays.values():
        yield from flat(value) if isinstance(value, dict) else [value]


@pytest.mark.parametrize("variant", ["plain", "mask, everything else", "last output only"])
def test_inputs_are_not_modified(variant):
    p, untouched = Problem(**VARIANTS[variant]), Problem(**VARIANTS[variant])
    p.gradients()
    for used, expected in ((p.arrays, untouched.arrays), (p.cotangents, untouched.cotangents)):
        for array, copy in zip(flat(used), flat(expected), strict=True):
            np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("variant", ["plain", "all masked", "last output only"])
def test_what_the_caller_does_to_results_reaches_nothing_else(variant):
    p = Problem(**VARIANTS[variant])
    expected = p.gradients()
    output, h, c, saved = p.run(save=True)
    for overwritten, others in ((output, (h, c)), (h, (output, c)), (c, (output, h))):
        overwritten[...] = np.nan
        assert not any(np.shares_memory(overwritten, other) for other in (*others, p.arrays["h"], p.arrays["c"]))
    gradients = reference.convlstm2d_backward(p.spec, saved, **p.cotangents)
    for group in ("peephole", "normalization"):
        gradients.pop(group)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, expected[name])


def test_a_sample_does_not_depend_on_its_batch():
    p, alone = Problem(B=3), Problem(B=1)
    whole = p.run()[0]
    for b in range(3):
        mine = {name: p.arrays[name][b : b + 1] for name in ("x", "h", "c")}
        np.testing.assert_array_equal(alone.run(**(p.arrays | mine))[0], whole[b : b + 1])


# Pooling.


def pool_by_loops(spec, x):
    y, indices = np.empty(spec.output_shape, x.dtype), np.empty(spec.output_shape, np.int64)
    for b, *start, channel in np.ndindex(spec.output_shape):
        best = None
        for offset in np.ndindex(spec.pool_size):
            t, h, w = (
                n * s + k - pad[0] for n, s, k, pad in zip(start, spec.strides, offset, spec.padding, strict=True)
            )
            if 0 <= t < spec.T and 0 <= h < spec.H and 0 <= w < spec.W:
                value = x[b, t, h, w, channel].item()
                if best is None or value > best[0] or (math.isnan(value) and not math.isnan(best[0])):
                    best = value, (t * spec.H + h) * spec.W + w
        y[(b, *start, channel)], indices[(b, *start, channel)] = best
    return y, indices


@st.composite
def pool_specs(draw):
    pool_size = draw(st.tuples(*[st.integers(1, 3)] * 3))
    strides = draw(st.none() | st.tuples(*[st.integers(1, 4)] * 3))
    pads = st.tuples(*[st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)) for k in pool_size])
    padding = draw(st.sampled_from(["valid", "same"]) | pads)
    shape = draw(st.tuples(st.integers(0, 2), *[st.integers(1, 5)] * 3, st.integers(1, 3)))
    try:
        return PoolSpec.infer(shape, pool_size, strides, padding=padding, ceil_mode=draw(st.booleans()))
    except ValueError:
        assume(False)


@settings(max_examples=100)
@given(pool_specs(), st.sampled_from([np.float32, np.float64]), st.integers(0, 99))
def test_max_pool3d_is_the_loop_over_windows(spec, dtype, seed):
    rng = np.random.default_rng(seed)
    values = np.array([-np.inf, -1, 0, 1, np.inf, np.nan], dtype)  # few, so that windows hold ties
    x = rng.choice(values, (spec.B, spec.T, spec.H, spec.W, spec.C), p=[0.5, 0.1, 0.2, 0.1, 0.05, 0.05])
    before = x.copy()
    y, indices = reference.max_pool3d(spec, x, True)
    expected, where = pool_by_loops(spec, x)
    assert (y.dtype, indices.dtype) == (dtype, np.int64)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(indices, where)
    alone, nothing = reference.max_pool3d(spec, x, False)
    assert nothing is None
    assert alone.dtype == dtype
    np.testing.assert_array_equal(alone, expected)
    np.testing.assert_array_equal(x, before)

    dy = rng.integers(-9, 10, spec.output_shape).astype(dtype)
    dx = reference.max_pool3d_backward(spec, indices, dy)
    expected = np.zeros_like(x)
    for position in np.ndindex(spec.output_shape):
        t, h, w = np.unravel_index(where[position], (spec.T, spec.H, spec.W))
        expected[position[0], t, h, w, position[-1]] += dy[position]
    assert dx.dtype == dtype
    np.testing.assert_array_equal(dx, expected)
    assert dx.sum() == dy.sum()


# PyTorch as a second opinion.


@pytest.mark.torch
class TestAgainstTorch:
    @pytest.mark.parametrize(("strides", "dilation", "padding"), [((1, 1), (1, 1), (1, 1)), ((2, 3), (1, 1), (0, 2)),
                                                                  ((1, 1), (2, 3), (3, 1))])  # fmt: skip
    def test_conv2d(self, strides, dilation, padding):
        torch = pytest.importorskip("torch")
        rng = np.random.default_rng(5)
        x, kernel, bias = rng.standard_normal((2, 9, 8, 3)), rng.standard_normal((3, 2, 3, 4)), rng.standard_normal(4)
        spec = ConvSpec.infer(x.shape, kernel.shape, strides=strides, dilation=dilation, padding=padding)
        dy = rng.standard_normal((2, spec.HO, spec.WO, 4))
        leaves = [torch.from_numpy(a).requires_grad_() for a in (x, kernel, bias)]
        y = torch.nn.functional.conv2d(leaves[0].permute(0, 3, 1, 2), leaves[1].permute(3, 2, 0, 1), leaves[2],
                                       strides, padding, dilation).permute(0, 2, 3, 1)  # fmt: skip
        y.backward(torch.from_numpy(dy))
        np.testing.assert_allclose(reference.conv2d(spec, x, kernel, bias), y.detach().numpy(), rtol=0, atol=1e-12)
        for gradient, leaf in zip(reference.conv2d_backward(spec, x, kernel, dy), leaves, strict=True):
            np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("ceil_mode", [False, True])
    @pytest.mark.parametrize(
        ("pool_size", "strides", "padding"), [(2, 2, 0), ((3, 2, 3), (2, 1, 3), (1, 1, 0)), (3, 2, 1), (2, 3, 1)]
    )
    def test_max_pool3d(self, pool_size, strides, padding, ceil_mode):
        torch = pytest.importorskip("torch")
        x = np.random.default_rng(6).integers(-3, 4, (2, 5, 8, 7, 3)).astype(np.float32)  # ties
        spec = PoolSpec.infer(x.shape, pool_size, strides, padding=padding, ceil_mode=ceil_mode)
        expected = torch.nn.functional.max_pool3d(torch.from_numpy(np.moveaxis(x, -1, 1).copy()), pool_size, strides,
                                                  padding, ceil_mode=ceil_mode, return_indices=True)  # fmt: skip
        for result, tensor in zip(reference.max_pool3d(spec, x, True), expected, strict=True):
            np.testing.assert_array_equal(np.moveaxis(result, -1, 1), tensor.numpy())
