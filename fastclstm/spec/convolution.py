"""Convolutions over frames and volumes, and what they are the transpose of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastclstm.spec.options import PADDING_MODES, Pair, Shape, choice, expect_shape, integers
from fastclstm.spec.windows import LARGEST_PADDED, axis_names, check_padded, outputs, window_padding


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
        HO, WO = outputs(op, (H, W), window, s, pads)
        check_padded(op, (H, W), (KH, KW), d, pads, C)
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
        TO, _, _ = outputs(op, (T, H, W), window, s, pads, first=first)
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
    names = axis_names(count)
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
