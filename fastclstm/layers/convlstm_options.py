"""The options that ConvLSTM2D's cell and stacked layers of it share."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from fastclstm.layers.cell_options import LSTMOptions
from fastclstm.nn import activations
from fastclstm.spec import choice, integers

PEEPHOLES = (None, "elementwise", "channel", "conv")


@dataclass(eq=False, repr=False)
class ConvLSTMLayer(LSTMOptions):
    """The options that the cell and the stacked layers share."""

    _refuses_gpu: ClassVar[bool] = False

    _: KW_ONLY
    peephole: str | None = None
    peephole_size: Any = None
    peephole_initializer: Any = "zeros"
    frame_size: Any = None
    cell_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        choice(op, "peephole", self.peephole, PEEPHOLES)
        if self.peephole_size is not None and self.peephole != "conv":
            raise ValueError(f"{op}: peephole_size goes with peephole='conv' only, got peephole={self.peephole!r}")
        if self.frame_size is not None:
            self.frame_size = integers(op, "frame_size", self.frame_size, self._rank, 1)
        else:
            per_pixel = "peephole='elementwise'" if self.peephole == "elementwise" else "elementwise normalization"
            if self.peephole == "elementwise" or (self.normalization is not None and self.normalization.elementwise):
                raise ValueError(f"{op}: {per_pixel} has a weight for every pixel; give frame_size=(H, W) of x")

    def _knows_gpu(self, training: bool) -> bool:
        kind = None if self.normalization is None else self.normalization.kind
        named = (self.activation, self.recurrent_activation, self.output_activation or self.activation)
        return (
            (kind is None or (kind == "batch" and not training))
            and not (training and (self.dropout or self.recurrent_dropout))
            and self.peephole != "conv"
            and self.in_channels > 0
            and all(map(activations.is_named, named))
        )
