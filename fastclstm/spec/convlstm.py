"""A whole ConvLSTM, with all its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastclstm.spec.convolution import ConvSpec
from fastclstm.spec.options import Shape, choice, expect_shape, positive_or_none

GATES = ("i", "f", "g", "o")
"""Order of the gates on the ``4F`` axis of kernels, biases and pre-activations."""

NORMALIZED_PARTS = {False: ("",), True: ("_x", "_h")}
"""Suffixes of the weights of what is normalized: the sum of the convolutions, or the one of x and the one of h."""

PEEPHOLE_GATES = ("i", "f", "o")
_PEEPHOLE_KINDS = {1: "channel", 3: "elementwise", 4: "conv"}


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
