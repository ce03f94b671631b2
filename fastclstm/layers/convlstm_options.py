"""The options that a ConvLSTM cell and stacked layers of them share."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.base import Layer, layer_dtype
from fastclstm.layers.place import Place, place_of
from fastclstm.nn import activations
from fastclstm.nn import normalization as normalizations
from fastclstm.spec import DATA_FORMATS, choice, flag, integers, rate

PEEPHOLES = (None, "elementwise", "channel", "conv")


@dataclass(eq=False, repr=False)
class ConvLSTMLayer(Layer):
    """The options that the cell and the stacked layers share."""

    CHANGEABLE: ClassVar[frozenset[str]] = frozenset({"engine", "algorithm"})
    """Options that may be assigned to later."""

    in_channels: int
    out_channels: Any
    kernel_size: Any
    padding: Any = "same"
    stride: Any = 1
    leaky_relu_slope: float | None = None
    _: KW_ONLY
    use_bias: bool = True
    unit_forget_bias: bool = True
    kernel_initializer: Any = "glorot_uniform"
    recurrent_initializer: Any = "orthogonal"
    bias_initializer: Any = "zeros"
    kernel_regularizer: Any = None
    recurrent_regularizer: Any = None
    bias_regularizer: Any = None
    kernel_constraint: Any = None
    recurrent_constraint: Any = None
    bias_constraint: Any = None
    activation: Any = "tanh"
    recurrent_activation: Any = "sigmoid"
    output_activation: Any = None
    dilation: Any = 1
    padding_mode: str = "zeros"
    recurrent_kernel_size: Any = None
    recurrent_dilation: Any = 1
    peephole: str | None = None
    peephole_size: Any = None
    peephole_initializer: Any = "zeros"
    normalization: Any = None
    frame_size: Any = None
    cell_clip: float | None = None
    dropout: float = 0.0
    recurrent_dropout: float = 0.0
    data_format: str = "channels_last"
    dtype: Any = "float32"
    seed: int | np.random.Generator | None = None
    engine: str | None = None
    algorithm: str = "auto"

    def __setattr__(self, name: str, value: Any) -> None:
        fixed = name in type(self).__dataclass_fields__ and name not in self.CHANGEABLE
        if fixed and "_made" in self.__dict__:
            op = type(self).__name__
            raise AttributeError(
                f"{op}: {name} is fixed when the layer is made; make a new one, with {op}(…, {name}=…)"
            )
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        for name in ("use_bias", "unit_forget_bias"):
            flag(op, name, getattr(self, name))
        (self.in_channels,) = integers(op, "in_channels", self.in_channels, 1, 0)
        self.dtype = layer_dtype(op, self.dtype)
        choice(op, "data_format", self.data_format, DATA_FORMATS)
        dispatch.check_engine(self.engine)
        slope = self.leaky_relu_slope
        real = isinstance(slope, int | float) and not isinstance(slope, bool) and math.isfinite(slope)
        if slope is not None and not real:
            raise ValueError(f"{op}: leaky_relu_slope must be a finite number or None, got {slope!r}")
        for name in ("dropout", "recurrent_dropout"):
            rate(op, name, getattr(self, name))
        choice(op, "peephole", self.peephole, PEEPHOLES)
        if self.peephole_size is not None and self.peephole != "conv":
            raise ValueError(f"{op}: peephole_size goes with peephole='conv' only, got peephole={self.peephole!r}")
        if self.normalization is not None:
            self.normalization = normalizations.get(self.normalization)
        if self.frame_size is not None:
            self.frame_size = integers(op, "frame_size", self.frame_size, 2, 1)
        else:
            per_pixel = "peephole='elementwise'" if self.peephole == "elementwise" else "elementwise normalization"
            if self.peephole == "elementwise" or (self.normalization is not None and self.normalization.elementwise):
                raise ValueError(f"{op}: {per_pixel} has a weight for every pixel; give frame_size=(H, W) of x")

    def _place(self, x: Any, training: bool) -> Place:
        """Return where a call on x computes; of an x on a GPU the engine says what it does not know."""
        return place_of(self, x, training, refuses=False)

    def _knows_gpu(self, training: bool) -> bool:
        kind = None if self.normalization is None else self.normalization.kind
        named = (self.activation, self.recurrent_activation, self.output_activation or self.activation)
        return (
            (kind is None or (kind == "batch" and not training))
            and not (training and (self.dropout or self.recurrent_dropout))
            and self.peephole != "conv"
            and all(map(activations.is_named, named))
        )
