"""The options that a cell and stacked layers of it share: of any cell, and of each kind what it has besides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.base import Layer, layer_dtype
from fastclstm.layers.place import Place, place_of
from fastclstm.nn import normalization as normalizations
from fastclstm.spec import DATA_FORMATS, choice, flag, integers, rate


@dataclass(eq=False, repr=False)
class CellLayer(Layer):
    """The options of every cell."""

    CHANGEABLE: ClassVar[frozenset[str]] = frozenset({"engine", "algorithm"})
    """Options that may be assigned to later."""

    _rank: ClassVar[int] = 2
    """Number of the axes of a frame or volume, without channels."""
    _state_names: ClassVar[Sequence[str]] = "h"
    _activations: ClassVar[tuple[str, ...]] = ("activation",)
    _refuses_gpu: ClassVar[bool] = True
    """Whether an x on a GPU is refused by the layer, or else by its engine, which says what it does not know."""

    in_channels: int
    out_channels: Any
    kernel_size: Any
    padding: Any = "same"
    stride: Any = 1
    leaky_relu_slope: float | None = None
    _: KW_ONLY
    use_bias: bool = True
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
    dilation: Any = 1
    padding_mode: str = "zeros"
    recurrent_kernel_size: Any = None
    recurrent_dilation: Any = 1
    normalization: Any = None
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
        flag(op, "use_bias", self.use_bias)
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
        if self.normalization is not None:
            self.normalization = normalizations.get(self.normalization)

    def _place(self, x: Any, training: bool) -> Place:
        """Return where a call on x computes."""
        return place_of(self, x, training, refuses=self._refuses_gpu)


@dataclass(eq=False, repr=False)
class GRUOptions(CellLayer):
    """Of the GRU."""

    _activations: ClassVar[tuple[str, ...]] = ("activation", "recurrent_activation")

    _: KW_ONLY
    recurrent_activation: Any = "sigmoid"
    reset_after: bool = True

    def __post_init__(self) -> None:
        flag(type(self).__name__, "reset_after", self.reset_after)
        super().__post_init__()


@dataclass(eq=False, repr=False)
class LSTMOptions(CellLayer):
    """Of the LSTM."""

    _state_names: ClassVar[Sequence[str]] = "hc"
    _activations: ClassVar[tuple[str, ...]] = ("activation", "recurrent_activation", "output_activation")

    _: KW_ONLY
    unit_forget_bias: bool = True
    recurrent_activation: Any = "sigmoid"
    output_activation: Any = None

    def __post_init__(self) -> None:
        flag(type(self).__name__, "unit_forget_bias", self.unit_forget_bias)
        super().__post_init__()
