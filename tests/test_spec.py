import math
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fastclstm.nn import activations
from fastclstm.spec import Conv3DSpec, ConvLSTMSpec, ConvSpec, PoolSpec, rate

ACTIVATIONS = {
    "activation": activations.get("tanh"),
    "recurrent_activation": activations.get("sigmoid"),
    "output_activation": activations.get("tanh"),
}


def conv(x_shape=(2, 5, 6, 3), kernel_shape=(3, 3, 3, 4), bias_shape=None, **options):
    return ConvSpec.infer(x_shape, kernel_shape, bias_shape, **options)


def convlstm(x_shape=(2, 3, 5, 6, 1), kernel_shape=(3, 3, 1, 8), recurrent_shape=(3, 3, 2, 8), **options):
    return ConvLSTMSpec.infer(x_shape, kernel_shape, recurrent_shape, **ACTIVATIONS, **options)


def pool(x_shape=(2, 4, 6, 8, 3), *arguments, **options):
    return PoolSpec.infer(x_shape, *arguments, **options)


def raises(message, error=ValueError):
    """Expect an error that says exactly `message`."""
    return pytest.raises(error, match=f"^{re.escape(message)}$")


# Sizes.


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_same_padding_is_the_smallest_that_gives_ceil_n_over_s_windows(n, k, s, d):
    assume(s == 1 or d == 1)
    spec = conv((1, n, n, 1), (k, k, 1, 1), strides=s, dilation=d)
    (before, after), extent = spec.padding[0], (k - 1) * d + 1
    assert spec.HO == spec.WO == math.ceil(n / s)
    assert before <= after <= before + 1
    last_pixel_read = (spec.HO - 1) * s + extent - 1 - before
    assert last_pixel_read == n - 1 + after or (before == after == 0 and last_pixel_read < n)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
def test_explicit_padding_holds_as_many_windows_as_fit(n, k, s, before, after):
    assume(n + before + after >= k)
    spec = conv((1, n, n, 1), (k, k, 1, 1), strides=s, padding=((before, after), (after, before)))
    assert spec.padding == ((before, after), (after, before))
    assert spec.HO == spec.WO == len(range(0, n + before + after - k + 1, s))


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        ("valid", ((0, 0), (0, 0))),
        ("same", ((1, 1), (1, 2))),
        (2, ((2, 2), (2, 2))),
        ((1, 2), ((1, 1), (2, 2))),
        (((0, 1), (2, 3)), ((0, 1), (2, 3))),
        (np.array([1, 2]), ((1, 1), (2, 2))),
        ([1, (2, 0)], ((1, 1), (2, 0))),
    ],
)
def test_forms_of_padding(padding, expected):
    assert conv(kernel_shape=(3, 4, 3, 4), padding=padding).padding == expected


def test_conv_spec_of_the_readme():
    spec = conv((1, 32, 32, 1), (3, 3, 1, 128), (128,), strides=(2, 1), padding=1)
    assert (spec.B, spec.H, spec.W, spec.C, spec.F, spec.KH, spec.KW, spec.HO, spec.WO) == (
        1, 32, 32, 1, 128, 3, 3, 16, 32,
    )  # fmt: skip
    assert spec.strides == (2, 1)
    assert spec.dilation == (1, 1)
    assert spec.flops == 2 * 16 * 32 * 9 * 128


def test_convlstm_spec():
    spec = convlstm(recurrent_shape=(2, 5, 2, 8), strides=2, recurrent_dilation=(1, 2), padding_mode="circular",
                    cell_clip=3, go_backwards=True, return_sequences=False)  # fmt: skip
    assert spec.state_shape == spec.output_shape == (2, 3, 3, 2)
    assert spec.input.strides == (2, 2)
    assert spec.recurrent.strides == (1, 1)
    assert spec.recurrent.padding == ((0, 1), (4, 4))
    assert spec.recurrent.padding_mode == "circular"
    assert (spec.cell_clip, type(spec.cell_clip)) == (3.0, float)
    assert [spec.source_step(t) for t in range(3)] == [2, 1, 0]
    assert spec.flops == 3 * (spec.input.flops + spec.recurrent.flops)
    assert convlstm().output_shape == (2, 3, 5, 6, 2)
    assert [convlstm().source_step(t) for t in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("shape", "kind"), [((2,), "channel"), ((5, 6, 2), "elementwise"), ((3, 2, 2, 2), "conv"), (None, None)]
)
def test_kind_of_peephole_follows_from_its_shape(shape, kind):
    spec = convlstm(peephole_shapes=None if shape is None else dict.fromkeys("ifo", shape))
    assert spec.peephole == kind
    if kind == "conv":
        assert spec.peephole_conv.padding == ((1, 1), (0, 1))
    else:
        assert spec.peephole_conv is None


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ((), {}, (2, 2, 3, 4, 3)),
        ((2,), {}, (2, 2, 3, 4, 3)),
        ((3, 2), {}, (2, 1, 2, 3, 3)),
        ((3, 2), {"ceil_mode": True}, (2, 2, 3, 4, 3)),
        (((1, 2, 3),), {}, (2, 4, 3, 2, 3)),
        ((3, 3), {"padding": "same"}, (2, 2, 2, 3, 3)),
        ((3, 2), {"padding": 1}, (2, 2, 3, 4, 3)),
        ((3, 2), {"padding": ((0, 1), 1, (2, 2))}, (2, 2, 3, 5, 3)),
        ((1, 3), {}, (2, 2, 2, 3, 3)),
    ],
)
def test_pooled_sizes(arguments, options, expected):
    assert pool((2, 4, 6, 8, 3), *arguments, **options).output_shape == expected


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 5), st.integers(0, 4), st.integers(0, 4), st.booleans())
def test_every_pooling_window_holds_a_pixel(n, k, s, before, after, ceil_mode):
    assume(max(before, after) < k <= n + before + after)
    spec = pool((1, n, n, n, 1), k, s, padding=((before, after),) * 3, ceil_mode=ceil_mode)
    starts = [index * s - before for index in range(spec.TO)]
    assert all(start < n and start + k > 0 for start in starts)
    whole = [start for start in range(-before, n + after, s) if start + k <= n + after]
    pixels_left = (n + before + after - k) % s  # by the windows that fit
    partial = [start for start in [whole[-1] + s] if ceil_mode and pixels_left and start < n]
    assert starts == whole + partial


def test_max_pooling_same_gives_ceil_n_over_s_windows():
    for n in range(1, 12):
        for k in range(1, 5):
            for s in range(1, 5):
                for ceil_mode in (False, True):
                    spec = pool((1, n, n, n, 1), k, s, padding="same", ceil_mode=ceil_mode)
                    assert spec.output_shape == (1, *[math.ceil(n / s)] * 3, 1)


# Errors of the convolution.


@pytest.mark.parametrize("count", [2, 3, 5])
def test_conv_x_must_be_4d(count):
    with raises(f"conv2d: x must be (batch, height, width, channels), got {count}D {(1,) * count}"):
        conv((1,) * count)


def test_conv_kernel_must_be_4d():
    with raises("conv2d: kernel must be (KH, KW, channels, filters), got shape (3, 3)"):
        conv(kernel_shape=(3, 3))


def test_conv_channels_must_agree():
    with raises("conv2d: x has 3 channels but kernel (3, 3, 1, 128) takes 1"):
        conv(kernel_shape=(3, 3, 1, 128))


@pytest.mark.parametrize("shape", [(0, 3, 3, 4), (3, 0, 3, 4), (3, 3, 3, 0)])
def test_conv_kernel_must_not_be_empty(shape):
    with raises(f"conv2d: kernel {shape} has an empty axis; every axis must be at least 1"):
        conv(kernel_shape=shape)


def test_conv_bias():
    message = "conv2d: bias has shape (3,) but must be (4,) (one value for each of the kernel's 4 filters)"
    with raises(message):
        conv(bias_shape=(3,))


@pytest.mark.parametrize("name", ["strides", "dilation"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1, ValueError), ((1, 2, 3), ValueError), ((), ValueError), (True, ValueError),
     (1.5, TypeError), (None, TypeError), ("2", TypeError), (((1, 2), 3), TypeError)],
)  # fmt: skip
def test_conv_strides_and_dilation_are_positive_integers(name, value, error):
    with raises(f"conv2d: {name} must be an integer >= 1 or 2 of them, got {value!r}", error):
        conv(**{name: value})


def test_conv_strides_and_dilation_exclude_each_other():
    with raises("conv2d: strides (2, 1) and dilation (1, 2) cannot both exceed 1; choose one of them"):
        conv(strides=(2, 1), dilation=(1, 2))


def test_conv_padding_mode():
    with raises("conv2d: padding_mode must be one of 'zeros', 'circular', got 'reflect'"):
        conv(padding_mode="reflect")


@pytest.mark.parametrize("padding", [(1, 2, 3), (), ((1, 2),) * 3])
def test_conv_padding_form(padding):
    message = "conv2d: padding must be 'same', 'valid', an integer, 2 integers or 2 pairs (before, after), got "
    with raises(message + repr(padding)):
        conv(padding=padding)


def test_conv_padding_name():
    with raises("conv2d: padding must be one of 'same', 'valid', got 'SAME'"):
        conv(padding="SAME")


@pytest.mark.parametrize(
    ("padding", "axis", "got", "error"),
    [(-1, "height", -1, ValueError), ((0, -1), "width", -1, ValueError),
     ((1, (1, 2, 3)), "width", (1, 2, 3), ValueError), (1.0, "height", 1.0, TypeError),
     (None, "height", None, TypeError)],
)  # fmt: skip
def test_conv_padding_values(padding, axis, got, error):
    with raises(f"conv2d: padding of the {axis} must be an integer >= 0 or 2 of them, got {got!r}", error):
        conv(padding=padding)


@pytest.mark.parametrize(
    ("options", "axis", "window", "size", "pads"),
    [
        ({"padding": "valid", "kernel_shape": (6, 3, 3, 4)}, "height", 6, 5, (0, 0)),
        ({"padding": (0, 1), "kernel_shape": (3, 9, 3, 4)}, "width", 9, 6, (1, 1)),
        ({"padding": "valid", "dilation": (1, 3)}, "width", 7, 6, (0, 0)),
        ({"x_shape": (2, 0, 6, 3)}, "height", 3, 0, (1, 1)),
    ],
)
def test_conv_window_must_fit(options, axis, window, size, pads):
    with raises(f"conv2d: a window of {window} does not fit the {axis} of {size} padded by {pads}; "
                "give larger frames, a smaller window or dilation, or padding='same'"):  # fmt: skip
        conv(**options)


@pytest.mark.parametrize("options", [{"dilation": 5000}, {"dilation": 10**9}, {"padding": 10**9}, {"padding": 3000},
                                     {"padding": 10**6, "strides": 10**6},
                                     {"dilation": 5000, "padding_mode": "circular"}])  # fmt: skip
def test_conv_padding_that_dwarfs_the_frame(options):
    message = (
        r"^conv2d: frames of 8 × 8 pixels would be padded to \d+ × \d+ pixels, .* give larger frames, or less padding"
    )
    with pytest.raises(ValueError, match=message) as caught:
        conv((1, 8, 8, 1), (3, 3, 1, 4), **options)
    assert len(str(caught.value)) < 300


def test_conv_padding_is_told_in_full():
    with raises("conv2d: frames of 8 × 9 pixels would be padded to 10008 × 10009 pixels, 2.0e+08 values each (dilation "
                "(5000, 5000)); give larger frames, or less padding or dilation"):  # fmt: skip
        conv((1, 8, 9, 2), (3, 3, 2, 4), dilation=5000)


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [((8, 8), (3, 3), {"dilation": 1000}), ((8, 8), (3, 3), {"padding": 1000}), ((8, 8), (5000, 5000), {}),
     ((30000, 30000), (3, 3), {"padding": 100}), ((3000, 3000), (3, 3), {"dilation": 3000}),
     ((8, 8), (1, 1), {"dilation": 10**9}), ((1, 8), (1, 3), {"dilation": (1, 10**6)})],
)  # fmt: skip
def test_conv_padding_of_a_reasonable_size(shape, kernel, options):
    spec = conv((1, *shape, 1), (*kernel, 1, 1), **options)
    assert shape == (spec.H, spec.W)


def test_conv3d_padding_of_time():
    """Steps of padding are not computed with, so that a dilation costs nothing; what they make is."""
    assert Conv3DSpec.infer((1, 4, 8, 8, 1), (3, 3, 3, 1, 1), dilation=(10**9, 1, 1)).TO == 4
    with raises("conv3d: the time of 4 padded by (1000000000, 1000000000) would become 2000000002; give less "
                "padding"):  # fmt: skip
        Conv3DSpec.infer((1, 4, 8, 8, 1), (3, 3, 3, 1, 1), padding=(10**9, 1, 1))
    with pytest.raises(ValueError, match=r"^conv3d: frames of 8 × 8 pixels would be padded to 2000000008 × 10 pixels"):
        Conv3DSpec.infer((1, 4, 8, 8, 1), (3, 3, 3, 1, 1), padding=(1, 10**9, 1))


# Errors of the ConvLSTM.


def test_convlstm_x_must_be_5d():
    start = "convlstm2d: x must be (batch, time, height, width, channels), got "
    hint = "; add the missing axis, e.g. x[np.newaxis] or x[..., np.newaxis]"
    with raises(start + "4D (10, 5, 6, 1)" + hint):
        convlstm((10, 5, 6, 1))
    with raises(start + "3D (10, 5, 6)" + hint):
        convlstm((10, 5, 6))
    with raises(start + "2D (5, 6)"):
        convlstm((5, 6))
    with raises(start + "6D (1, 1, 1, 1, 1, 1)"):
        convlstm((1,) * 6)


def test_convlstm_needs_a_time_step():
    with raises("convlstm2d: x has no time steps (2, 0, 5, 6, 1); at least one is needed"):
        convlstm((2, 0, 5, 6, 1))


def test_convlstm_empty_batch_is_fine():
    assert convlstm((0, 3, 5, 6, 1)).output_shape == (0, 3, 5, 6, 2)


def test_convlstm_kernel_is_4d():
    with raises("convlstm2d: kernel must be (KH, KW, channels, filters), got shape (3, 8)"):
        convlstm(kernel_shape=(3, 8))


def test_convlstm_channels_must_agree():
    with raises("convlstm2d: x has 3 channels but kernel (3, 3, 1, 8) takes 1"):
        convlstm((2, 3, 5, 6, 3))


def test_convlstm_kernel_holds_four_gates():
    with raises("convlstm2d: kernel (3, 3, 1, 6) must end in 4 × filters, one block for each gate i, f, g, o; "
                "6 is not divisible by 4"):  # fmt: skip
        convlstm(kernel_shape=(3, 3, 1, 6))


@pytest.mark.parametrize("shape", [(3, 3, 2), (3, 3, 1, 8), (3, 3, 2, 4)])
def test_convlstm_recurrent_kernel(shape):
    with raises(f"convlstm2d: recurrent_kernel has shape {shape} but must be (KH, KW, 2, 8) to go with kernel "
                "(3, 3, 1, 8)"):  # fmt: skip
        convlstm(recurrent_shape=shape)


def test_convlstm_empty_recurrent_kernel():
    with raises("convlstm2d: recurrent convolution: kernel (0, 3, 2, 8) has an empty axis; "
                "every axis must be at least 1"):  # fmt: skip
        convlstm(recurrent_shape=(0, 3, 2, 8))


def test_convlstm_recurrent_dilation():
    with raises("convlstm2d: recurrent convolution: dilation must be an integer >= 1 or 2 of them, got 0"):
        convlstm(recurrent_dilation=0)


def test_convlstm_padding_that_dwarfs_the_state():
    message = (
        r"^convlstm2d: recurrent convolution: frames of 5 × 6 pixels would be padded to .* less padding or dilation$"
    )
    with pytest.raises(ValueError, match=message):
        convlstm(recurrent_dilation=10**8)


def test_convlstm_bias():
    with raises("convlstm2d: bias has shape (2,) but must be (8,) (one value for each of the kernel's 8 filters)"):
        convlstm(bias_shape=(2,))


@pytest.mark.parametrize("name", ["h", "c"])
def test_convlstm_initial_state(name):
    with raises(f"convlstm2d: initial state {name} has shape (2, 5, 6, 1) but must be (2, 5, 6, 2) "
                "((batch, height, width, filters) of the states)"):  # fmt: skip
        convlstm(**{f"{name}_shape": (2, 5, 6, 1)})


def test_convlstm_mask():
    with raises("convlstm2d: mask has shape (3, 2) but must be (2, 3) ((batch, time))"):
        convlstm(mask_shape=(3, 2))


@pytest.mark.parametrize("value", [0, -1.5, float("nan"), "1", (1, 2)])
def test_convlstm_cell_clip(value):
    with raises(f"convlstm2d: cell_clip must be a positive number or None, got {value!r}"):
        convlstm(cell_clip=value)


def test_convlstm_window_must_fit():
    with raises("convlstm2d: a window of 7 does not fit the height of 5 padded by (0, 0); "
                "give larger frames, a smaller window or dilation, or padding='same'"):  # fmt: skip
        convlstm(kernel_shape=(7, 3, 1, 8), padding="valid")


def test_peephole_keys():
    message = (
        "convlstm2d: peephole must map 'i', 'f' and 'o' to weights "
        "(and, for convolutions, 'bias_i', 'bias_f', 'bias_o'); "
    )
    with raises(message + "missing ['f', 'o'], unknown []"):
        convlstm(peephole_shapes={"i": (2,)})
    with raises(message + "missing [], unknown ['c']"):
        convlstm(peephole_shapes=dict.fromkeys("ifoc", (2,)))


def test_peephole_dimensions():
    with raises("convlstm2d: peephole weights must be (HO, WO, F), (F,) or (KH, KW, F, F), got (6, 2)"):
        convlstm(peephole_shapes=dict.fromkeys("ifo", (6, 2)))


@pytest.mark.parametrize(
    ("shape", "expected", "kind"),
    [((3,), (2,), "channel"), ((5, 5, 2), (5, 6, 2), "elementwise"), ((3, 3, 2, 8), (3, 3, 2, 2), "conv")],
)
def test_peephole_shapes(shape, expected, kind):
    with raises(f"convlstm2d: peephole 'i' has shape {shape} but must be {expected} ({kind} peephole, "
                "the same for i, f and o)"):  # fmt: skip
        convlstm(peephole_shapes=dict.fromkeys("ifo", shape))


def test_peephole_shapes_agree_among_gates():
    with raises("convlstm2d: peephole 'o' has shape (5, 6, 2) but must be (2,) (channel peephole, "
                "the same for i, f and o)"):  # fmt: skip
        convlstm(peephole_shapes={"i": (2,), "f": (2,), "o": (5, 6, 2)})


def test_peephole_biases_go_with_convolutions():
    with raises("convlstm2d: peephole 'bias_f' goes with convolutional peepholes only, not 'channel'"):
        convlstm(peephole_shapes=dict.fromkeys("ifo", (2,)) | {"bias_f": (2,)})
    with raises("convlstm2d: peephole 'bias_f' has shape (3,) but must be (2,) (one value for each filter)"):
        convlstm(peephole_shapes=dict.fromkeys("ifo", (1, 1, 2, 2)) | {"bias_f": (3,)})


# Errors of the pooling.


@pytest.mark.parametrize("count", [4, 6])
def test_pool_x_must_be_5d(count):
    with raises(f"max_pool3d: x must be (batch, time, height, width, channels), got {count}D {(4,) * count}"):
        pool((4,) * count)


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), ((2, 2), ValueError), (2.0, TypeError), ("2", TypeError)]
)
def test_pool_sizes_are_positive_integers(value, error):
    with raises(f"max_pool3d: pool_size must be an integer >= 1 or 3 of them, got {value!r}", error):
        pool(pool_size=value)
    with raises(f"max_pool3d: strides must be an integer >= 1 or 3 of them, got {value!r}", error):
        pool(strides=value)


def test_pool_padding_is_smaller_than_the_window():
    with raises("max_pool3d: padding (0, 2) of the width must be smaller than the window (2), "
                "or a window would hold nothing but padding"):  # fmt: skip
        pool(padding=(1, 1, (0, 2)))


def test_pool_padding_form():
    with raises("max_pool3d: padding must be 'same', 'valid', an integer, 3 integers or 3 pairs (before, after), "
                "got (1, 1)"):  # fmt: skip
        pool(padding=(1, 1))


def test_pool_window_must_fit():
    with raises("max_pool3d: a window of 5 does not fit the time of 4 padded by (0, 0); "
                "give larger frames, a smaller window or dilation, or padding='same'"):  # fmt: skip
        pool(pool_size=5)


def test_rates():
    for value in (0, 0.5, np.float32(0.25)):
        rate("op", "dropout", value)
    rate("op", "dropout", 1, one=True)
    for value in (1, -0.1, float("nan"), "0.5", True, None):
        with pytest.raises(ValueError, match=r"op: dropout must be a number in \[0, 1\), the share .* got"):
            rate("op", "dropout", value)


@pytest.mark.parametrize("options", [{"padding": 400}, {"dilation": 400}])
def test_frames_that_are_not_known_yet_are_not_too_small(options):
    """What is too much for frames of 8 × 8 is not for those of 1024 × 1024: the call tells, not the constructor."""
    from fastclstm.layers import Conv2D, ConvLSTM2D

    for layer in Conv2D(64, 1, 3, **{"padding": "same", **options}), ConvLSTM2D(64, 1, 3, **options):
        with pytest.raises(ValueError, match="frames of 8 × 8 pixels would be padded to"):
            layer(np.zeros((1, 1, 8, 8, 64), np.float32))
