"""The gates of one ConvLSTM layer: their parameters, and what they are to the operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm import dispatch, functional
from fastclstm.layers.base import Parameter
from fastclstm.layers.convlstm_options import ConvLSTMLayer
from fastclstm.layers.gate_weights import GateWeights
from fastclstm.layers.recurrent_cell import LSTMCell
from fastclstm.nn import initializers
from fastclstm.spec import NORMALIZED_PARTS, PEEPHOLE_GATES, UNKNOWN, ConvLSTMSpec, Shape, choice, integers


@dataclass(eq=False, repr=False)
class ConvLSTMGates(LSTMCell, ConvLSTMLayer):
    """What makes a ConvLSTM of the options: `ConvLSTM2DCell` is called step by step, `Directions` runs sequences."""

    _operation = "convlstm2d"

    peephole_i = Parameter()
    peephole_f = Parameter()
    peephole_o = Parameter()
    peephole_bias_i = Parameter()
    peephole_bias_f = Parameter()
    peephole_bias_o = Parameter()
    gamma_x, gamma_h = Parameter(), Parameter()
    beta_x, beta_h = Parameter(), Parameter()
    moving_mean, moving_mean_x, moving_mean_h = Parameter(), Parameter(), Parameter()
    moving_variance, moving_variance_x, moving_variance_h = Parameter(), Parameter(), Parameter()

    def __post_init__(self) -> None:
        if self.peephole_size is not None:
            self.peephole_size = integers(type(self).__name__, "peephole_size", self.peephole_size, 2, 1)
        initializers.get(self.peephole_initializer)
        super().__post_init__()

    def _add_further(self, rng: np.random.Generator) -> None:
        C, F, dtype = self.in_channels, self.out_channels, self.dtype
        grid: Shape = ()
        if self.frame_size is not None:
            geometry = self._geometry((1, *self.frame_size, C), type(self).__name__)
            grid = geometry.HO, geometry.WO
        if self.peephole is not None:
            shape = {
                "elementwise": (*grid, F),
                "channel": (F,),
                "conv": (*(self.peephole_size or self.recurrent_kernel_size or self.kernel_size), F, F),
            }
            for gate in PEEPHOLE_GATES:
                self._add_parameter(f"peephole_{gate}", shape[self.peephole], self.peephole_initializer, rng, dtype)
            if self.peephole == "conv" and self.use_bias:
                for gate in PEEPHOLE_GATES:
                    self._add_parameter(f"peephole_bias_{gate}", (F,), self.bias_initializer, rng, dtype)
        if self.normalization is not None:
            weights = (*grid, 4 * F) if self.normalization.elementwise else (4 * F,)
            for part in NORMALIZED_PARTS[self.normalization.separate]:
                self._add_parameter(f"gamma{part}", weights, "ones", rng, dtype)
                self._add_parameter(f"beta{part}", weights, "zeros", rng, dtype)
                if self.normalization.kind == "batch":
                    self._add_parameter(f"moving_mean{part}", (4 * F,), "zeros", rng, dtype, statistic=True)
                    self._add_parameter(f"moving_variance{part}", (4 * F,), "ones", rng, dtype, statistic=True)

    @property
    def weights(self) -> GateWeights:
        """The parameters gate by gate: see `GateWeights`."""
        return GateWeights({"": self})

    def _state_shape(self, frames: Shape, op: str | None = None) -> Shape:
        """Return the shape (B, HO, WO, F) of the states for frames (B, H, W, C)."""
        shape = super()._state_shape(frames, op)
        if self.frame_size is not None and frames[1:3] != self.frame_size:
            raise ValueError(f"{op or type(self).__name__}: x has frames of {frames[1]}×{frames[2]} pixels but "
                             f"frame_size is {self.frame_size}")  # fmt: skip
        return shape

    def _learn(self, pullback: functional.ConvLSTMPullback) -> None:
        """Move the moving means and variances towards those that a training call took of its steps, if it took any."""
        for step in pullback.statistics:
            for part in NORMALIZED_PARTS[self.normalization.separate]:
                count, momentum = step[f"count{part}"], self.normalization.momentum
                unbiased = step[f"variance{part}"] * (count / max(count - 1, 1))
                for name, value in (("mean", step[f"mean{part}"]), ("variance", unbiased)):
                    old = self._parameters[f"moving_{name}{part}"]
                    if count:
                        setattr(self, f"moving_{name}{part}", momentum * old + (1 - momentum) * value)

    def _options(self, learning: bool = False) -> dict[str, Any]:
        """Options of the operation that are the cell's."""
        have = self._parameters.get
        options = super()._options(learning) | {"cell_clip": self.cell_clip}
        if self.peephole is not None:
            weights = {
                f"{kind}{gate}": have(f"peephole_{kind}{gate}") for kind in ("", "bias_") for gate in PEEPHOLE_GATES
            }
            options["peephole"] = {name: weight for name, weight in weights.items() if weight is not None}
        if self.normalization is not None:
            names = {"gamma": "gamma", "beta": "beta"}
            if self.normalization.kind == "batch" and not learning:
                names |= {"mean": "moving_mean", "variance": "moving_variance"}
            parts = NORMALIZED_PARTS[self.normalization.separate]
            options["normalization_weights"] = {
                f"{name}{part}": have(f"{parameter}{part}") for name, parameter in names.items() for part in parts
            }
        return options

    def _named_gradients(self, gradients: Mapping[str, Any]) -> dict[str, np.ndarray]:
        peepholes = {f"peephole_{name}": array for name, array in gradients.get("peephole", {}).items()}
        return super()._named_gradients({**gradients, **peepholes})

    def _check_options(self) -> None:
        """Raise now, not at the first call, where an option is wrong for every input."""
        op = "ConvLSTM2D"
        for name in ("dilation", "recurrent_dilation"):
            integers(op, name, getattr(self, name), 2, 1)
        frame = self.frame_size or (UNKNOWN, UNKNOWN)
        options = self._options()
        choice(op, "algorithm", options.pop("algorithm"), dispatch.algorithms(self.engine))
        del options["engine"]
        for name, weights in (("peephole", "peephole"), ("normalization", "normalization_weights")):
            arrays = options.pop(weights, None) or {}
            options[f"{name}_shapes"] = {key: array.shape for key, array in arrays.items()} or None
        ConvLSTMSpec.infer((1, 1, *frame, self.in_channels), self._parameters["kernel"].shape,
                           self._parameters["recurrent_kernel"].shape, op=op, **options)  # fmt: skip
