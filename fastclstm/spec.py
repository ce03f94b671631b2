"""Geometry, computed once: every size, every padding amount and every shape error of the package.

Size letters, used everywhere: ``B`` batch, ``T`` time steps, ``H``×``W`` frame, ``C`` input channels, ``F`` filters,
``KH``×``KW`` kernel, ``HO``×``WO`` (and ``TO``) the sizes after a convolution or a pooling.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

Pair = tuple[int, int]
Shape = tuple[int, ...]

GATES = ("i", "f", "g", "o")
"""Order of the gates on the ``4F`` axis of kernels, biases and pre-activations."""

NORMALIZED_PARTS = {False: ("",), True: ("_x", "_h")}
"""Suffixes of the weights of what is normalized: the sum of the convolutions, or the one of x and the one of h."""

PADDING_MODES = ("zeros", "circular")
DATA_FORMATS = ("channels_last", "channels_first")
PEEPHOLE_GATES = ("i", "f", "o")
_PEEPHOLE_KINDS = {1: "channel", 3: "elementwise", 4: "conv"}


LARGEST = 2**31 - 1
"""Of all sizes, strides and paddings: kernels multiply them in 64 bits."""

UNKNOWN = 2**30
"""Height and width for frames that are not known yet: so large that no option is too large for them."""

LARGEST_PADDED, MOST_PADDING = 2**24, 16
"""Values beyond which a padded frame may be only so many times as large as the frame and the kernel themselves."""


def integers(op: str, name: str, value: Any, count: int, minimum: int) -> Shape:
    """Return `value`, an integer or a sequence of `count` integers, as a tuple of `count` integers >= `minimum`."""
    if type(value) is int and minimum <= value <= LARGEST:
        return (value,) * count
    several = f" or {count} of them" if count > 1 else ""
    expected = f"{op}: {name} must be an integer >= {minimum}{several}, got {value!r}"
    items = list(value) if np.iterable(value) else [value] * count
    try:
        result = tuple(operator.index(item) for item in items)
    except TypeError:
        raise TypeError(expected) from None
    fits = len(result) == count and all(minimum <= n <= LARGEST for n in result)
    if not fits or any(isinstance(item, bool | np.bool_) for item in items):
        raise ValueError(expected)
    return result


def choice(op: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def rate(op: str, name: str, value: Any, *, one: bool = False) -> None:
    """Raise ValueError unless `value`, the share that is dropped, is in [0, 1), or with `one` in [0, 1]."""
    if not (_is_real(value) and (0 <= value < 1 or (one and value == 1))):
        interval = "[0, 1]" if one else "[0, 1)"
        raise ValueError(f"{op}: {name} must be a number in {interval}, the share that is dropped; got {value!r}")


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def flag(op: str, name: str, value: Any) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{op}: {name} must be True or False, got {value!r}")


def positive_or_none(op: str, name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a positive real number or None."""
    if value is not None and not (_is_real(value) and value > 0):
        raise ValueError(f"{op}: {name} must be a positive number or None, got {value!r}")


def expect_shape(op: str, name: str, shape: Shape, expected: Shape, why: str) -> None:
    """Raise ValueError unless `shape` is `expected`."""
    if tuple(shape) != tuple(expected):
        raise ValueError(f"{op}: {name} has shape {tuple(shape)} but must be {tuple(expected)} ({why})")


def _axes(count: int, first: str = "time") -> tuple[str, ...]:
    """Return the names of the last two axes of frames, or with `first` of three axes."""
    return (first, "height", "width")[-count:]


def refuse_masked(op: str, name: str, value: Any, missing: str = "value") -> None:
    """Raise TypeError for a masked array, whose mask would be lost; missing: what to fill it with."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{op}: {name} is a masked array, whose mask would be lost; pass {name}.filled({missing})")


def window_padding(
    op: str, padding: Any, size: Shape, window: Shape, strides: Shape, *, maximum: Shape | None = None,
    first: str = "time",
) -> tuple[Pair, ...]:  # fmt: skip
    """Return the padding (before, after) of each axis; `window` is the dilated extent of the kernel.

    first: what errors call the first of three axes.
    """
    count = len(size)
    axes = _axes(count, first)
    if isinstance(padding, str):
        choice(op, "padding", padding, ("same", "valid"))
        if padding == "valid":
            return ((0, 0),) * count
        pads = []
        for n, k, s in zip(size, window, strides, strict=True):
            total = max((-(-n // s) - 1) * s + k - n, 0)
            pads.append((total // 2, total - total // 2))
        return tuple(pads)
    items = list(padding) if np.iterable(padding) else [padding] * count
    if len(items) == count:
        pairs = tuple(integers(op, f"padding of the {axis}", item, 2, 0)
                      for axis, item in zip(axes, items, strict=True))  # fmt: skip
        for axis, (before, after), limit in zip(axes, pairs, maximum or (None,) * count, strict=True):
            if limit is not None and max(before, after) >= limit:
                raise ValueError(
                    f"{op}: padding ({before}, {after}) of the {axis} must be smaller than the window ({limit}), "
                    f"or a window would hold nothing but padding"
                )
        return tuple((before, after) for before, after in pairs)
    raise ValueError(
        f"{op}: padding must be 'same', 'valid', an integer, {count} integers or {count} pairs (before, after), "
        f"got {padding!r}"
    )


def _outputs(
    op: str, size: Shape, window: Shape, strides: Shape, pads: tuple[Pair, ...], *, ceil: bool = False,
    first: str = "time",
) -> Shape:  # fmt: skip
    """Return the output size of each axis, or raise ValueError where a window does not fit the padded input."""
    result = []
    for axis, n, k, s, (before, after) in zip(_axes(len(size), first), size, window, strides, pads, strict=True):
        room = n + before + after - k
        count = room // s + 1
        if ceil and room % s and count * s < n + before:  # the last, partial window starts inside the input
            count += 1
        if n < 1 or count < 1:
            raise ValueError(
                f"{op}: a window of {k} does not fit the {axis} of {n} padded by ({before}, {after}); "
                f"give larger frames, a smaller window or dilation, or padding='same'"
            )
        result.append(count)
    return tuple(result)


def _check_padded(op: str, size: Shape, kernel: Shape, dilation: Shape, pads: tuple[Pair, ...], values: int) -> None:
    """Raise ValueError where a padded frame of `values` a pixel takes far more memory than what it is made of."""
    padded = tuple(n + before + after for n, (before, after) in zip(size, pads, strict=True))
    count = math.prod(padded) * values
    if count > LARGEST_PADDED and count > MOST_PADDING * values * (math.prod(size) + math.prod(kernel)):
        frame, larger = (" × ".join(map(str, sizes)) for sizes in (size, padded))
        raise ValueError(
            f"{op}: frames of {frame} pixels would be padded to {larger} pixels, {count:.1e} values each (dilation "
            f"{dilation}); give larger frames, or less padding or dilation"
        )


@dataclass(frozen=True, slots=True)
class ConvSpec:
    """One 2D cross-correlation ``(B, H, W, C) -> (B, HO, WO, F)`` with a kernel ``(KH, KW, C, F)``."""

    B: int
    H: int
    W: int
    C: int
    F: int
    KH: int
    KW: int
    HO: int
    WO: int
    strides: Pair
    dilation: Pair
    padding: tuple[Pair, Pair]
    """((top, bottom), (left, right)) in pixels."""
    padding_mode: str

    @classmethod
    def infer(
        cls,
        x_shape: Shape,
        kernel_shape: Shape,
        bias_shape: Shape | None = None,
        *,
        strides: Any = 1,
        padding: Any = "same",
        padding_mode: str = "zeros",
        dilation: Any = 1,
        no_input: bool = False,
        op: str = "conv2d",
    ) -> ConvSpec:
        """Check shapes and options and return the geometry; raise ValueError or TypeError naming what is wrong.

        With `no_input` there may be no channels, of which nothing comes.
        """
        if len(x_shape) != 4:
            raise ValueError(f"{op}: x must be (batch, height, width, channels), got {len(x_shape)}D {tuple(x_shape)}")
        if len(kernel_shape) != 4:
            raise ValueError(f"{op}: kernel must be (KH, KW, channels, filters), got shape {tuple(kernel_shape)}")
        B, H, W, C = x_shape
        KH, KW, kernel_channels, F = kernel_shape
        if kernel_channels != C:
            raise ValueError(f"{op}: x has {C} channels but kernel {tuple(kernel_shape)} takes {kernel_channels}")
        if min(KH, KW, F, C + no_input) < 1:
            raise ValueError(f"{op}: kernel {tuple(kernel_shape)} has an empty axis; every axis must be at least 1")
        if bias_shape is not None:
            expect_shape(op, "bias", bias_shape, (F,), f"one value for each of the kernel's {F} filters")
        s = integers(op, "strides", strides, 2, 1)
        d = integers(op, "dilation", dilation, 2, 1)
        choice(op, "padding_mode", padding_mode, PADDING_MODES)
        if max(s) > 1 and max(d) > 1:
            raise ValueError(f"{op}: strides {s} and dilation {d} cannot both exceed 1; choose one of them")
        window = ((KH - 1) * d[0] + 1, (KW - 1) * d[1] + 1)
        pads = window_padding(op, padding, (H, W), window, s)
        HO, WO = _outputs(op, (H, W), window, s, pads)
        _check_padded(op, (H, W), (KH, KW), d, pads, C)
        return cls(B, H, W, C, F, KH, KW, HO, WO, (s[0], s[1]), (d[0], d[1]), (pads[0], pads[1]), padding_mode)

    def with_batch(self, count: int) -> ConvSpec:
        """Return the same geometry for `count` images."""
        return self if count == self.B else replace(self, B=count)

    def with_filters(self, count: int) -> ConvSpec:
        """Return the same geometry for `count` filters."""
        return replace(self, F=count)

    @property
    def output_shape(self) -> Shape:
        """Shape ``(B, HO, WO, F)`` of the result."""
        return self.B, self.HO, self.WO, self.F

    @property
    def flops(self) -> int:
        """Floating-point operations of the direct algorithm (a multiply and an add are two)."""
        return 2 * self.B * self.HO * self.WO * self.KH * self.KW * self.C * self.F


@dataclass(frozen=True, slots=True)
class Conv3DSpec:
    """One 3D cross-correlation ``(B, T, H, W, C) -> (B, TO, HO, WO, F)`` with a kernel ``(KT, KH, KW, C, F)``."""

    B: int
    T: int
    KT: int
    TO: int
    stride: int
    dilation: int
    before: int
    """Time steps of padding before the first one."""
    frame: ConvSpec
    """The convolution that makes one output frame of the KT frames it sees, laid side by side on the channel axis:
    ``(1, H, W, KT·C) -> (1, HO, WO, F)``."""

    @classmethod
    def infer(
        cls,
        x_shape: Shape,
        kernel_shape: Shape,
        bias_shape: Shape | None = None,
        *,
        strides: Any = 1,
        padding: Any = "same",
        padding_mode: str = "zeros",
        dilation: Any = 1,
        no_input: bool = False,
        op: str = "conv3d",
        first: str = "time",
    ) -> Conv3DSpec:
        """Check shapes and options and return the geometry; raise ValueError or TypeError naming what is wrong.

        With `no_input` there may be no channels, of which nothing comes. first: what errors call the first axis.
        """
        if len(x_shape) != 5:
            raise ValueError(
                f"{op}: x must be (batch, {first}, height, width, channels), got {len(x_shape)}D {tuple(x_shape)}"
            )
        if len(kernel_shape) != 5:
            raise ValueError(
                f"{op}: kernel must be (K{first[0].upper()}, KH, KW, channels, filters), got shape "
                f"{tuple(kernel_shape)}"
            )
        B, T, H, W, C = x_shape
        KT, KH, KW, kernel_channels, F = kernel_shape
        if kernel_channels != C:
            raise ValueError(f"{op}: x has {C} channels but kernel {tuple(kernel_shape)} takes {kernel_channels}")
        if min(KT, KH, KW, F, C + no_input) < 1:
            raise ValueError(f"{op}: kernel {tuple(kernel_shape)} has an empty axis; every axis must be at least 1")
        s = integers(op, "strides", strides, 3, 1)
        d = integers(op, "dilation", dilation, 3, 1)
        if max(s) > 1 and max(d) > 1:
            raise ValueError(f"{op}: strides {s} and dilation {d} cannot both exceed 1; choose one of them")
        window = ((KT - 1) * d[0] + 1, (KH - 1) * d[1] + 1, (KW - 1) * d[2] + 1)
        pads = window_padding(op, padding, (T, H, W), window, s, first=first)
        TO, _, _ = _outputs(op, (T, H, W), window, s, pads, first=first)
        if TO > T + KT + LARGEST_PADDED:
            raise ValueError(f"{op}: the {first} of {T} padded by {pads[0]} would become {TO}; give less padding")
        frame = ConvSpec.infer((1, H, W, KT * C), (KH, KW, KT * C, F), bias_shape, strides=s[1:], padding=pads[1:],
                               padding_mode=padding_mode, dilation=d[1:], no_input=no_input, op=op)  # fmt: skip
        return cls(B, T, KT, TO, s[0], d[0], pads[0][0], frame)

    def with_batch(self, count: int) -> Conv3DSpec:
        """Return the same geometry for `count` volumes."""
        return self if count == self.B else replace(self, B=count)

    def with_filters(self, count: int) -> Conv3DSpec:
        """Return the same geometry for `count` filters."""
        return replace(self, frame=self.frame.with_filters(count))

    @property
    def output_shape(self) -> Shape:
        """Shape ``(B, TO, HO, WO, F)`` of the result."""
        return self.B, self.TO, self.frame.HO, self.frame.WO, self.frame.F

    def sources(self, frame: int) -> tuple[int, list[tuple[int, int]]]:
        """Return the sample of an output frame, counted through B and TO, and each tap on time with the step it sees.

        Taps on padding zeros are left out.
        """
        b, to = divmod(frame, self.TO)
        steps = ((tap, to * self.stride + tap * self.dilation - self.before) for tap in range(self.KT))
        if self.frame.padding_mode == "circular":
            return b, [(tap, t % self.T) for tap, t in steps]
        return b, [(tap, t) for tap, t in steps if 0 <= t < self.T]


def of_rank(rank: int) -> Callable[..., Any]:
    """Return what infers the geometry of a convolution over frames of 2 axes, or of 3: depth, height and width."""
    return ConvSpec.infer if rank == 2 else partial(Conv3DSpec.infer, first="depth")


def transposed(
    op: str,
    x_shape: Shape,
    kernel_shape: Shape,
    bias_shape: Shape | None = None,
    *,
    strides: Any = 1,
    padding: Any = "valid",
    output_padding: Any = None,
    dilation: Any = 1,
) -> Any:
    """Return the `ConvSpec` or `Conv3DSpec` whose transpose takes x (B, …, C) to (B, …, F) by a kernel (…, F, C).

    Its x is the transpose's output. "valid": ``HO = (H − 1)·s + max(k, s)``, k being the dilated extent of the kernel;
    "same": ``HO = H·s``; amounts (before, after): ``HO = (H − 1)·s + k − before − after``, to which output_padding
    adds. With it "valid" is 0, and "same" takes ``2·(k // 2)`` away, as Keras does. Raise ValueError or TypeError
    naming what is wrong.
    """
    count = len(kernel_shape) - 2
    names = _axes(count)
    if len(x_shape) != count + 2:
        axes = ", ".join(names)
        raise ValueError(f"{op}: x must be (batch, {axes}, channels), got {len(x_shape)}D {tuple(x_shape)}")
    B, *size, C = x_shape
    *kernel, F, kernel_channels = kernel_shape
    if min(kernel_shape) < 1:
        raise ValueError(f"{op}: kernel {tuple(kernel_shape)} has an empty axis; every axis must be at least 1")
    if kernel_channels != C:
        raise ValueError(f"{op}: x has {C} channels but kernel {tuple(kernel_shape)}, (…, filters, channels), takes "
                         f"{kernel_channels}")  # fmt: skip
    if bias_shape is not None:
        expect_shape(op, "bias", bias_shape, (F,), f"one value for each of the kernel's {F} filters")
    if min(size) < 1:
        raise ValueError(f"{op}: x of shape {tuple(x_shape)} has no pixels")
    s = integers(op, "strides", strides, count, 1)
    d = integers(op, "dilation", dilation, count, 1)
    extra = None if output_padding is None else integers(op, "output_padding", output_padding, count, 0)
    window = tuple((k - 1) * step + 1 for k, step in zip(kernel, d, strict=True))
    given = None if isinstance(padding, str) else window_padding(op, padding, tuple(size), window, s)
    if given is None:
        choice(op, "padding", padding, ("same", "valid"))
    whole, pads = [], []
    for axis, (n, k, stride) in enumerate(zip(size, window, s, strict=True)):
        reach = (n - 1) * stride + k
        if given is not None:
            before, after = given[axis][0], given[axis][1] - (extra[axis] if extra else 0)
        else:
            total = k - stride if padding == "same" else min(k - stride, 0)
            if extra is not None:
                total = (2 * (k // 2) if padding == "same" else 0) - extra[axis]
            before = max(total, 0) // 2
            after = total - before
        if reach - before - after < 1:
            raise ValueError(f"{op}: padding {padding!r} leaves nothing of the {names[axis]}: {n} make {reach} before "
                             f"it is cropped; give less padding")  # fmt: skip
        if -after >= stride:
            raise ValueError(f"{op}: output_padding {extra[axis] if extra else 0} of the {names[axis]} must be smaller "
                             f"than the stride ({stride}), or pixels would be made of nothing")  # fmt: skip
        whole.append(reach - before - after)
        pads.append((before, max(after, 0)))
    spec: Any = ConvSpec if count == 2 else Conv3DSpec
    return spec.infer((B, *whole, F), tuple(kernel_shape), strides=s, padding=pads, dilation=d, op=op)


@dataclass(frozen=True, slots=True)
class ConvLSTMSpec:
    """A whole ConvLSTM over ``x (B, T, H, W, C)`` with hidden and cell states ``(B, HO, WO, F)``."""

    T: int
    F: int
    input: ConvSpec
    """The convolution of one time step of x, ``(B, H, W, C) -> (B, HO, WO, 4F)``."""
    recurrent: ConvSpec
    """The convolution of h, ``(B, HO, WO, F) -> (B, HO, WO, 4F)``, stride 1, "same"."""
    activation: Any
    recurrent_activation: Any
    output_activation: Any
    """The three `fastclstm.nn.activations.Activation`: on g; on i, f, o; on the new cell state."""
    peephole: str | None = None
    """None, "elementwise", "channel" or "conv"."""
    peephole_conv: ConvSpec | None = None
    """Geometry ``(B, HO, WO, F) -> (B, HO, WO, F)`` of a "conv" peephole."""
    normalization: Any = None
    """None or the `fastclstm.nn.normalization.Normalization` of the pre-activations."""
    cell_clip: float | None = None
    go_backwards: bool = False
    return_sequences: bool = True

    @classmethod
    def infer(
        cls,
        x_shape: Shape,
        kernel_shape: Shape,
        recurrent_kernel_shape: Shape,
        bias_shape: Shape | None = None,
        *,
        h_shape: Shape | None = None,
        c_shape: Shape | None = None,
        peephole_shapes: Mapping[str, Shape] | None = None,
        mask_shape: Shape | None = None,
        normalization_shapes: Mapping[str, Shape] | None = None,
        dropout_shapes: Mapping[str, Shape] | None = None,
        strides: Any = 1,
        padding: Any = "same",
        padding_mode: str = "zeros",
        dilation: Any = 1,
        recurrent_dilation: Any = 1,
        activation: Any,
        recurrent_activation: Any,
        output_activation: Any,
        normalization: Any = None,
        cell_clip: float | None = None,
        go_backwards: bool = False,
        return_sequences: bool = True,
        op: str = "convlstm2d",
    ) -> ConvLSTMSpec:
        """Check shapes and options and return the geometry; raise ValueError or TypeError naming what is wrong."""
        if len(x_shape) != 5:
            hint = "; add the missing axis, e.g. x[np.newaxis] or x[..., np.newaxis]" if len(x_shape) in (3, 4) else ""
            raise ValueError(
                f"{op}: x must be (batch, time, height, width, channels), got {len(x_shape)}D {tuple(x_shape)}{hint}"
            )
        B, T, H, W, C = x_shape
        if T < 1:
            raise ValueError(f"{op}: x has no time steps {tuple(x_shape)}; at least one is needed")
        conv = ConvSpec.infer((B, H, W, C), kernel_shape, bias_shape, strides=strides, padding=padding,
                              padding_mode=padding_mode, dilation=dilation, no_input=True, op=op)  # fmt: skip
        if conv.F % 4:
            raise ValueError(
                f"{op}: kernel {tuple(kernel_shape)} must end in 4 × filters, one block for each gate i, f, g, o; "
                f"{conv.F} is not divisible by 4"
            )
        F = conv.F // 4
        state = (B, conv.HO, conv.WO, F)
        if len(recurrent_kernel_shape) != 4 or tuple(recurrent_kernel_shape[2:]) != (F, 4 * F):
            raise ValueError(
                f"{op}: recurrent_kernel has shape {tuple(recurrent_kernel_shape)} but must be "
                f"(KH, KW, {F}, {4 * F}) to go with kernel {tuple(kernel_shape)}"
            )
        recurrent = ConvSpec.infer(state, recurrent_kernel_shape, padding="same", padding_mode=padding_mode,
                                   dilation=recurrent_dilation, op=f"{op}: recurrent convolution")  # fmt: skip
        for name, shape in (("h", h_shape), ("c", c_shape)):
            if shape is not None:
                expect_shape(op, f"initial state {name}", shape, state, "(batch, height, width, filters) of the states")
        if mask_shape is not None:
            expect_shape(op, "mask", mask_shape, (B, T), "(batch, time)")
        positive_or_none(op, "cell_clip", cell_clip)
        kind, peephole_conv = cls._peephole(op, peephole_shapes, state, padding_mode)
        cls._check_normalization(op, normalization, normalization_shapes, state)
        for source, shape in (dropout_shapes or {}).items():
            frames = {"x": (B, H, W, C), "h": state}
            choice(op, "a key of dropout_masks", source, tuple(frames))
            expect_shape(op, f"dropout mask {source!r}", shape, (len(GATES), *frames[source]), "one for each gate")
        clip = None if cell_clip is None else float(cell_clip)
        return cls(T, F, conv, recurrent, activation, recurrent_activation, output_activation, kind, peephole_conv,
                   normalization, clip, bool(go_backwards), bool(return_sequences))  # fmt: skip

    @staticmethod
    def _check_normalization(op: str, normalization: Any, shapes: Mapping[str, Shape] | None, state: Shape) -> None:
        if normalization is None:
            if shapes:
                raise ValueError(f"{op}: normalization_weights need a normalization: 'layer', 'group' or 'batch'")
            return
        channels = len(GATES) * state[-1]
        if channels % (groups := normalization.groups or len(GATES)):
            raise ValueError(
                f"{op}: the {channels} channels of the pre-activations (4 × filters) cannot be normalized in "
                f"{groups} groups of equal size; choose a divisor of {channels}"
            )
        given = shapes or {}
        parts = NORMALIZED_PARTS[normalization.separate]
        weights = [f"{name}{part}" for part in parts for name in ("gamma", "beta")]
        statistics = [f"{name}{part}" for part in parts for name in ("mean", "variance")]
        known = {*weights, *(statistics if normalization.kind == "batch" else ())}
        unknown = sorted(set(given) - known)
        missing = [name for name in weights if name not in given]
        if len(set(statistics) & set(given)) not in (0, len(statistics)):
            missing += [name for name in statistics if name not in given]
        if unknown or missing:
            raise ValueError(f"{op}: normalization_weights must map {', '.join(sorted(known))} to arrays; "
                             f"missing {missing}, unknown {unknown}")  # fmt: skip
        for name, shape in given.items():
            expected = (*state[1:3], channels) if normalization.elementwise else (channels,)
            expect_shape(op, f"normalization weight {name!r}", shape, expected, "one value a pre-activation channel"
                         + (" and pixel" if normalization.elementwise else ""))  # fmt: skip

    @staticmethod
    def _peephole(
        op: str, shapes: Mapping[str, Shape] | None, state: Shape, padding_mode: str
    ) -> tuple[str | None, ConvSpec | None]:
        if shapes is None:
            return None, None
        F = state[-1]
        biases = tuple(f"bias_{gate}" for gate in PEEPHOLE_GATES)
        unknown = sorted(set(shapes) - {*PEEPHOLE_GATES, *biases}, key=str)
        missing = [gate for gate in PEEPHOLE_GATES if gate not in shapes]
        if unknown or missing:
            raise ValueError(f"{op}: peephole must map 'i', 'f' and 'o' to weights (and, for convolutions, "
                             f"'bias_i', 'bias_f', 'bias_o'); missing {missing}, unknown {unknown}")  # fmt: skip
        first = tuple(shapes["i"])
        kind = _PEEPHOLE_KINDS.get(len(first))
        if kind is None:
            raise ValueError(f"{op}: peephole weights must be (HO, WO, F), (F,) or (KH, KW, F, F), got {first}")
        expected = {"channel": (F,), "elementwise": state[1:], "conv": (*first[:2], F, F)}[kind]
        for gate in PEEPHOLE_GATES:
            expect_shape(op, f"peephole {gate!r}", shapes[gate], expected, f"{kind} peephole, the same for i, f and o")
        for bias in biases:
            if bias in shapes:
                if kind != "conv":
                    raise ValueError(f"{op}: peephole {bias!r} goes with convolutional peepholes only, not {kind!r}")
                expect_shape(op, f"peephole {bias!r}", shapes[bias], (F,), "one value for each filter")
        if kind != "conv":
            return kind, None
        conv = ConvSpec.infer(state, expected, padding="same", padding_mode=padding_mode, op=f"{op}: peephole")
        return kind, conv

    @property
    def B(self) -> int:
        """Batch size."""
        return self.input.B

    @property
    def HO(self) -> int:
        """Height of the states."""
        return self.input.HO

    @property
    def WO(self) -> int:
        """Width of the states."""
        return self.input.WO

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """Shape ``(B, HO, WO, F)`` of h and of c."""
        return self.B, self.HO, self.WO, self.F

    @property
    def output_shape(self) -> Shape:
        """Shape of the output: ``(B, T, HO, WO, F)``, or the state's where only the last step is returned."""
        return (self.B, self.T, *self.state_shape[1:]) if self.return_sequences else self.state_shape

    def with_batch(self, count: int) -> ConvLSTMSpec:
        """Return the same geometry for `count` sequences."""
        if count == self.B:
            return self
        conv = None if self.peephole_conv is None else self.peephole_conv.with_batch(count)
        return replace(
            self,
            input=self.input.with_batch(count),
            recurrent=self.recurrent.with_batch(count),
            peephole_conv=conv,
        )

    @property
    def flops(self) -> int:
        """Floating-point operations of the convolutions of all time steps by the direct algorithm."""
        return self.T * (self.input.flops + self.recurrent.flops)

    def source_step(self, t: int) -> int:
        """Index on x's time axis of the `t`-th step processed."""
        return self.T - 1 - t if self.go_backwards else t


CELL_GATES = {"rnn": ("n",), "gru": ("z", "r", "n"), "lstm": GATES}
"""The cells of `CellSpec`, and the order of their gates on the last axis of kernels, biases and pre-activations."""

CELL_STATES = {"rnn": ("h",), "gru": ("h",), "lstm": ("h", "c")}
"""What each carries from one step to the next."""


@dataclass(frozen=True, slots=True)
class CellSpec:
    """A recurrence of any cell over frames or volumes x (B, T, *space, C), with G gates and states (B, *grid, F)."""

    cell: str
    """A key of `CELL_GATES`."""
    T: int
    F: int
    input: ConvSpec | Conv3DSpec
    """The convolution of one time step of x, ``(B, *space, C) -> (B, *grid, G·F)``."""
    recurrent: ConvSpec | Conv3DSpec
    """The convolution of h, ``(B, *grid, F) -> (B, *grid, G·F)``, stride 1, "same"."""
    activation: Any
    recurrent_activation: Any
    output_activation: Any
    """The three `fastclstm.nn.activations.Activation`: on n or g; on the other gates; on a new cell state."""
    reset_after: bool = True
    """Of "gru": whether r multiplies the convolution of h, or h before it is convolved."""
    normalization: Any = None
    """None or the `fastclstm.nn.normalization.Normalization`, of kind "group", of the pre-activations."""
    go_backwards: bool = False
    return_sequences: bool = True

    @classmethod
    def infer(
        cls,
        cell: str,
        x_shape: Shape,
        kernel_shape: Shape,
        recurrent_kernel_shape: Shape,
        bias_shape: Shape | None = None,
        *,
        state_shapes: Mapping[str, Shape] | None = None,
        mask_shape: Shape | None = None,
        normalization_shapes: Mapping[str, Shape] | None = None,
        dropout_shapes: Mapping[str, Shape] | None = None,
        rank: int = 2,
        strides: Any = 1,
        padding: Any = "same",
        padding_mode: str = "zeros",
        dilation: Any = 1,
        recurrent_dilation: Any = 1,
        activation: Any,
        recurrent_activation: Any = None,
        output_activation: Any = None,
        reset_after: bool = True,
        normalization: Any = None,
        go_backwards: bool = False,
        return_sequences: bool = True,
        op: str,
    ) -> CellSpec:
        """Check shapes and options and return the geometry; raise ValueError or TypeError naming what is wrong."""
        gates, axes = CELL_GATES[cell], ("depth", "height", "width")[3 - rank :]
        G, letters = len(gates), ", ".join(gates)
        if len(x_shape) != rank + 3:
            missing = rank + 3 - len(x_shape)
            hint = "; add the missing axis, e.g. x[np.newaxis] or x[..., np.newaxis]" if missing in (1, 2) else ""
            raise ValueError(f"{op}: x must be (batch, time, {', '.join(axes)}, channels), got {len(x_shape)}D "
                             f"{tuple(x_shape)}{hint}")  # fmt: skip
        B, T, *space, C = x_shape
        if T < 1:
            raise ValueError(f"{op}: x has no time steps {tuple(x_shape)}; at least one is needed")
        infer = of_rank(rank)
        conv = infer((B, *space, C), kernel_shape, None, strides=strides, padding=padding,
                     padding_mode=padding_mode, dilation=dilation, no_input=True, op=op)  # fmt: skip
        if kernel_shape[-1] % G:
            raise ValueError(f"{op}: kernel {tuple(kernel_shape)} must end in {G} × filters, one block for each gate "
                             f"{letters}; {kernel_shape[-1]} is not divisible by {G}")  # fmt: skip
        F = kernel_shape[-1] // G
        grid = conv.output_shape[1:-1]
        state = (B, *grid, F)
        if len(recurrent_kernel_shape) != rank + 2 or tuple(recurrent_kernel_shape[-2:]) != (F, G * F):
            raise ValueError(f"{op}: recurrent_kernel has shape {tuple(recurrent_kernel_shape)} but must be "
                             f"({', '.join('K' + axis[0].upper() for axis in axes)}, {F}, {G * F}) to go with kernel "
                             f"{tuple(kernel_shape)}")  # fmt: skip
        recurrent = infer(state, recurrent_kernel_shape, padding="same", padding_mode=padding_mode,
                          dilation=recurrent_dilation, op=f"{op}: recurrent convolution")  # fmt: skip
        both = cell == "gru" and reset_after
        if bias_shape is not None:
            why = "of the input and of the hidden state" if both else "one value for each column of the kernel"
            expect_shape(op, "bias", bias_shape, (2, G * F) if both else (G * F,), why)
        for name, shape in (state_shapes or {}).items():
            expect_shape(
                op, f"initial state {name}", shape, state, f"(batch, {', '.join(axes)}, filters) of the states"
            )
        if mask_shape is not None:
            expect_shape(op, "mask", mask_shape, (B, T), "(batch, time)")
        for source, shape in (dropout_shapes or {}).items():
            frames = {"x": (B, *space, C), "h": state}
            choice(op, "a key of dropout_masks", source, tuple(frames))
            expect_shape(op, f"dropout mask {source!r}", shape, (G, *frames[source]), "one for each gate")
        result = cls(cell, T, F, conv, recurrent, activation, recurrent_activation, output_activation,
                     bool(reset_after), normalization, bool(go_backwards), bool(return_sequences))  # fmt: skip
        result._check_normalization(op, normalization_shapes)
        return result

    def _check_normalization(self, op: str, shapes: Mapping[str, Shape] | None) -> None:
        if self.normalization is None:
            if shapes:
                raise ValueError(f"{op}: normalization_weights need a normalization: 'group'")
            return
        width = self.G * self.F
        if self.normalization.kind != "group" or self.normalization.separate:
            raise ValueError(f"{op}: normalization must be 'group', of the convolutions' sum, got "
                             f"{self.normalization!r}")  # fmt: skip
        if self.cell == "gru" and self.reset_after:
            raise ValueError(f"{op}: normalization goes with reset_after=False only: else n is no sum of convolutions")
        groups = self.normalization.groups or self.G
        if width % groups or any(columns * self.F % (width // groups) for columns in self.columns):
            raise ValueError(f"{op}: the {width} channels of the pre-activations ({self.G} × filters) cannot be "
                             f"normalized in {groups} groups of equal size, none of them with a part of gates that are "
                             f"convolved apart; {self.G} or a multiple of it that divides {width} will do")  # fmt: skip
        if set(shapes or {}) != {"gamma", "beta"}:
            raise ValueError(f"{op}: normalization_weights must map gamma, beta to arrays, got {sorted(shapes or {})}")
        for name, shape in (shapes or {}).items():
            expect_shape(op, f"normalization weight {name!r}", shape, (width,), "one value a pre-activation channel")

    @property
    def G(self) -> int:
        """Number of gates."""
        return len(CELL_GATES[self.cell])

    @property
    def columns(self) -> tuple[int, ...]:
        """Of how many gates the convolutions of a hidden state are: with reset_after=False, n's is one of its own."""
        return (2, 1) if self.cell == "gru" and not self.reset_after else (self.G,)

    @property
    def B(self) -> int:
        """Batch size."""
        return self.input.B

    @property
    def state_shape(self) -> Shape:
        """Shape ``(B, *grid, F)`` of each state."""
        return (*self.input.output_shape[:-1], self.F)

    @property
    def output_shape(self) -> Shape:
        """Shape of the output: ``(B, T, *grid, F)``, or the state's where only the last step is returned."""
        return (self.B, self.T, *self.state_shape[1:]) if self.return_sequences else self.state_shape

    def source_step(self, t: int) -> int:
        """Index on x's time axis of the `t`-th step processed."""
        return self.T - 1 - t if self.go_backwards else t


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """One 3D max pooling ``(B, T, H, W, C) -> (B, TO, HO, WO, C)``."""

    B: int
    T: int
    H: int
    W: int
    C: int
    TO: int
    HO: int
    WO: int
    pool_size: tuple[int, int, int]
    strides: tuple[int, int, int]
    padding: tuple[Pair, Pair, Pair]
    """(before, after) on time, height and width; padded positions never win."""

    @classmethod
    def infer(
        cls,
        x_shape: Shape,
        pool_size: Any = (2, 2, 2),
        strides: Any = None,
        *,
        padding: Any = "valid",
        ceil_mode: bool = False,
        op: str = "max_pool3d",
    ) -> PoolSpec:
        """Check a channels-last shape and the options and return the geometry; raise ValueError or TypeError."""
        if len(x_shape) != 5:
            raise ValueError(
                f"{op}: x must be (batch, time, height, width, channels), got {len(x_shape)}D {tuple(x_shape)}"
            )
        B, T, H, W, C = x_shape
        pool = integers(op, "pool_size", pool_size, 3, 1)
        step = pool if strides is None else integers(op, "strides", strides, 3, 1)
        pads = window_padding(op, padding, (T, H, W), pool, step, maximum=pool)
        TO, HO, WO = _outputs(op, (T, H, W), pool, step, pads, ceil=ceil_mode)
        return cls(B, T, H, W, C, TO, HO, WO, (pool[0], pool[1], pool[2]), (step[0], step[1], step[2]),
                   (pads[0], pads[1], pads[2]))  # fmt: skip

    @property
    def output_shape(self) -> Shape:
        """Shape ``(B, TO, HO, WO, C)`` of the result."""
        return self.B, self.TO, self.HO, self.WO, self.C
