"""A recurrence of any cell over frames or volumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastclstm.spec.convlstm import GATES
from fastclstm.spec.convolution import Conv3DSpec, ConvSpec, of_rank
from fastclstm.spec.options import Shape, choice, expect_shape

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
