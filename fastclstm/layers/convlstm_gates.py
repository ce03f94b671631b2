"""The gates of one ConvLSTM layer: their parameters, and the run of them over a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm import dispatch, functional
from fastclstm.layers.base import Parameter
from fastclstm.layers.convlstm_options import ConvLSTMLayer
from fastclstm.layers.gate_weights import GateWeights
from fastclstm.layers.states import State
from fastclstm.nn import activations, initializers
from fastclstm.spec import NORMALIZED_PARTS, PEEPHOLE_GATES, UNKNOWN, ConvLSTMSpec, ConvSpec, Shape, choice, integers

Outputs = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(eq=False, repr=False)
class ConvLSTMGates(ConvLSTMLayer):
    """What makes a ConvLSTM of the options: `ConvLSTM2DCell` is called step by step, `Directions` runs sequences."""

    kernel = Parameter()
    recurrent_kernel = Parameter()
    bias = Parameter()
    peephole_i = Parameter()
    peephole_f = Parameter()
    peephole_o = Parameter()
    peephole_bias_i = Parameter()
    peephole_bias_f = Parameter()
    peephole_bias_o = Parameter()
    gamma, gamma_x, gamma_h = Parameter(), Parameter(), Parameter()
    beta, beta_x, beta_h = Parameter(), Parameter(), Parameter()
    moving_mean, moving_mean_x, moving_mean_h = Parameter(), Parameter(), Parameter()
    moving_variance, moving_variance_x, moving_variance_h = Parameter(), Parameter(), Parameter()

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        (self.out_channels,) = integers(op, "out_channels", self.out_channels, 1, 1)
        self.kernel_size = integers(op, "kernel_size", self.kernel_size, 2, 1)
        if self.recurrent_kernel_size is not None:
            self.recurrent_kernel_size = integers(op, "recurrent_kernel_size", self.recurrent_kernel_size, 2, 1)
        if self.peephole_size is not None:
            self.peephole_size = integers(op, "peephole_size", self.peephole_size, 2, 1)
        for name in ("activation", "recurrent_activation", "output_activation"):
            option = getattr(self, name)
            try:
                activations.get(self.activation if name == "output_activation" and option is None else option)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{op}: {name}: {error}") from None
        initializers.get(self.peephole_initializer)
        rng = np.random.default_rng(self.seed)
        self._dropout_rng = own_generator(rng)
        self._add_parameters(rng)
        self._check_options()
        self._made = True

    def _add_parameters(self, rng: np.random.Generator) -> None:
        C, F, dtype = self.in_channels, self.out_channels, self.dtype
        recurrent_size = self.recurrent_kernel_size or self.kernel_size
        self._add_parameter("kernel", (*self.kernel_size, C, 4 * F), self.kernel_initializer, rng, dtype,
                            regularizer=self.kernel_regularizer, constraint=self.kernel_constraint)  # fmt: skip
        self._add_parameter("recurrent_kernel", (*recurrent_size, F, 4 * F), self.recurrent_initializer, rng, dtype,
                            regularizer=self.recurrent_regularizer, constraint=self.recurrent_constraint)  # fmt: skip
        if self.use_bias:
            drawn = initializers.get(self.bias_initializer)
            self._add_parameter("bias", (4 * F,), unit_forget(drawn) if self.unit_forget_bias else drawn, rng, dtype,
                                regularizer=self.bias_regularizer, constraint=self.bias_constraint)  # fmt: skip
        grid: Shape = ()
        if self.frame_size is not None:
            geometry = self._geometry((1, *self.frame_size, C), type(self).__name__)
            grid = geometry.HO, geometry.WO
        if self.peephole is not None:
            shape = {
                "elementwise": (*grid, F),
                "channel": (F,),
                "conv": (*(self.peephole_size or recurrent_size), F, F),
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

    def _geometry(self, frames: Shape, op: str) -> ConvSpec:
        """Return the geometry of the input convolution of frames (B, H, W, C)."""
        return ConvSpec.infer(frames, self._parameters["kernel"].shape, strides=self.stride, padding=self.padding,
                              padding_mode=self.padding_mode, dilation=self.dilation, no_input=True, op=op)  # fmt: skip

    def _state_shape(self, frames: Shape, op: str = "ConvLSTM2DCell") -> Shape:
        """Return the shape (B, HO, WO, F) of the states for frames (B, H, W, C)."""
        geometry = self._geometry(frames, op)
        if self.frame_size is not None and frames[1:3] != self.frame_size:
            raise ValueError(
                f"{op}: x has frames of {frames[1]}×{frames[2]} pixels but frame_size is {self.frame_size}"
            )
        return geometry.B, geometry.HO, geometry.WO, self.out_channels

    def _run(
        self, x: np.ndarray, state: State, *, mask: np.ndarray | None = None, go_backwards: bool = False,
        return_sequences: bool = True, training: bool = False, frozen: bool = False, recompute: bool = False,
    ) -> tuple[Outputs, functional.ConvLSTMPullback | None]:  # fmt: skip
        """Run over a channels-last sequence: (output, h, c) and, while training, their pullback.

        Where the layer is `frozen`, batch normalization uses its moving statistics; for `recompute` see
        `functional.convlstm2d_vjp`.
        """
        learning = training and self.trainable and not frozen
        arguments = x, self.kernel, self.recurrent_kernel, self.bias
        options = {
            "initial_state": state,
            "mask": mask,
            "go_backwards": go_backwards,
            "return_sequences": return_sequences,
            **self._options(learning),
        }
        if not training:
            return functional.convlstm2d(*arguments, return_state=True, **options), None
        frames = x.shape[0], *x.shape[2:]
        masks = {"x": self._draw(self.dropout, frames),
                 "h": self._draw(self.recurrent_dropout, self._state_shape(frames))}  # fmt: skip
        options["dropout_masks"] = {name: mask for name, mask in masks.items() if mask is not None} or None
        return functional.convlstm2d_vjp(*arguments, return_state=True, recompute=recompute, **options)

    def _draw(self, rate: float, shape: Shape) -> np.ndarray | None:
        """Draw the inverted dropout mask of each gate: what is kept is scaled up."""
        if rate == 0:
            return None
        kept = self._dropout_rng.random((4, *shape), np.float32) >= rate
        return kept * np.dtype(self.dtype).type(1 / (1 - rate))

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
        """Options of `functional.convlstm2d` that are the cell's."""
        have = self._parameters.get
        options = {
            "strides": self.stride,
            "padding": self.padding,
            "padding_mode": self.padding_mode,
            "dilation": self.dilation,
            "recurrent_dilation": self.recurrent_dilation,
            "activation": self.activation,
            "recurrent_activation": self.recurrent_activation,
            "output_activation": self.output_activation,
            "cell_clip": self.cell_clip,
            "algorithm": self.algorithm,
            "engine": self.engine,
        }
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
            options["normalization"] = self.normalization
            options["normalization_weights"] = {
                f"{name}{part}": have(f"{parameter}{part}") for name, parameter in names.items() for part in parts
            }
        return options

    def _named_gradients(self, gradients: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Name the parameters' gradients in what a pullback returned as the parameters are named."""
        peepholes = {f"peephole_{name}": array for name, array in gradients.get("peephole", {}).items()}
        named = {**gradients, **peepholes, **gradients.get("normalization_weights", {})}
        return {name: named[name] for name in self._parameters if name not in self._statistics}

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


def own_generator(rng: np.random.Generator) -> np.random.Generator:
    """Return a generator for later draws, so that these do not depend on how many were made before."""
    try:
        return rng.spawn(1)[0]
    except TypeError:  # a caller's, which cannot be split
        return rng


def unit_forget(initializer: initializers.Initializer) -> Any:
    """Return the initializer of a bias (4F,) whose forget block is one."""

    def initialize(shape: tuple[int, ...], rng: np.random.Generator, dtype: Any) -> np.ndarray:
        F = shape[0] // 4
        parts = initializer((F,), rng, dtype), np.ones(F, dtype), initializer((2 * F,), rng, dtype)
        return np.concatenate(parts)

    return initialize
