"""One ConvLSTM of the landscape: its sizes and options, its arrays, what it costs, and what it is called."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bench import training
from bench.cases import Arrays
from fastclstm.nn import activations
from fastclstm.nn import normalization as normalizations
from fastclstm.spec import ConvLSTMSpec, Pair


@dataclass(frozen=True)
class Configuration:
    """One ConvLSTM over ``x (B, T, H, W, C)`` with F filters: its sizes, options, dtype, and whether it is trained."""

    op: ClassVar[str] = "convlstm2d"
    unit: ClassVar[str] = "GFLOP/s"

    family: str
    B: int
    T: int
    H: int
    W: int
    C: int
    F: int
    kernel: Pair = (3, 3)
    recurrent_kernel: Pair | None = None
    """None: as the kernel."""
    strides: Pair = (1, 1)
    dilation: Pair = (1, 1)
    recurrent_dilation: Pair | None = None
    """None: as the dilation."""
    padding: str = "same"
    padding_mode: str = "zeros"
    activation: str = "tanh"
    recurrent_activation: str = "sigmoid"
    peephole: str | None = None
    cell_clip: float | None = None
    normalization: str | None = None
    dropout: float = 0.0
    """Share that is dropped of x and of h, for each gate."""
    bias: bool = True
    mask: bool = False
    go_backwards: bool = False
    dtype: str = "float32"
    training: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `convlstm2d` beside the arrays."""
        names = ("strides", "padding", "padding_mode", "dilation", "activation", "recurrent_activation", "cell_clip",
                 "normalization", "go_backwards")  # fmt: skip
        own = self.dilation if self.recurrent_dilation is None else self.recurrent_dilation
        return {name: getattr(self, name) for name in names} | {"recurrent_dilation": own}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of x and the kernels."""
        return {
            "x": (self.B, self.T, self.H, self.W, self.C),
            "kernel": (*self.kernel, self.C, 4 * self.F),
            "recurrent_kernel": (*(self.recurrent_kernel or self.kernel), self.F, 4 * self.F),
        }

    @property
    def spec(self) -> ConvLSTMSpec:
        """Geometry and options, checked, but for the arrays that options bring with them."""
        options = self.options
        activation, recurrent = (activations.get(options.pop(f"{kind}activation")) for kind in ("", "recurrent_"))
        how = options.pop("normalization")
        if how is not None:
            names = ("gamma", "beta", *(("mean", "variance") if how == "batch" else ()))
            options["normalization"] = normalizations.get(how)
            options["normalization_shapes"] = dict.fromkeys(names, (4 * self.F,))
        shapes = self.shapes
        return ConvLSTMSpec.infer(
            shapes["x"], shapes["kernel"], shapes["recurrent_kernel"], activation=activation,
            recurrent_activation=recurrent, output_activation=activation, **options,
        )  # fmt: skip

    def arrays(self) -> Arrays:
        """Return x, normal, and the weights, uniform in ±1/sqrt(fan_in), drawn by the configuration's name."""
        rng = np.random.default_rng(zlib.crc32(repr(self).encode()))
        spec, shapes = self.spec, self.shapes

        def uniform(shape: tuple[int, ...], most: float, middle: float = 0.0) -> np.ndarray:
            return rng.uniform(middle - most, middle + most, shape).astype(self.dtype)

        arrays: Arrays = {"x": rng.standard_normal(shapes["x"], np.float32).astype(self.dtype)}
        for name in ("kernel", "recurrent_kernel"):
            arrays[name] = uniform(shapes[name], 1 / math.sqrt(math.prod(shapes[name][:3])))
        if self.bias:
            arrays["bias"] = uniform((4 * self.F,), 1 / math.sqrt(self.F))
        if self.peephole:
            shape = {"channel": (self.F,), "elementwise": spec.state_shape[1:]}[self.peephole]
            arrays["peephole"] = {gate: uniform(shape, 0.5) for gate in "ifo"}
        if self.normalization:
            weights = {"gamma": uniform((4 * self.F,), 0.5, 1.0), "beta": uniform((4 * self.F,), 0.5)}
            if self.normalization == "batch":
                weights |= {"mean": uniform((4 * self.F,), 0.5), "variance": uniform((4 * self.F,), 0.5, 1.0)}
            arrays["normalization_weights"] = weights
        if self.dropout:
            shapes_of = {"x": (4, self.B, self.H, self.W, self.C), "h": (4, *spec.state_shape)}
            arrays["dropout_masks"] = {
                name: ((rng.random(shape) >= self.dropout) / (1 - self.dropout)).astype(self.dtype)
                for name, shape in shapes_of.items()
            }
        if self.mask:
            arrays["mask"] = rng.random((self.B, self.T)) < 0.8
        return arrays

    @property
    def updates(self) -> int:
        """Cells whose gates are computed."""
        return self.T * math.prod(self.spec.state_shape)

    @property
    def work(self) -> float:
        """Billions of operations of direct convolution; training is three times as much."""
        return self.spec.flops * (training.PASSES if self.training else 1) / 1e9

    @property
    def gigabytes(self) -> float:
        """Billions of bytes that must move: x and the weights read once, the result written once."""
        values = self.updates + sum(map(math.prod, self.shapes.values()))
        return values * np.dtype(self.dtype).itemsize / 1e9

    @property
    def title(self) -> str:
        """All that is not usual, in a few characters."""
        frame = f"{self.H}²" if self.H == self.W else f"{self.H}×{self.W}"
        told = [f"{self.B}×{self.T}×{frame}", f"{self.C}→{self.F}", f"k{_pair(self.kernel)}"]
        for name, short in (("recurrent_kernel", "recurrent k"), ("recurrent_dilation", "recurrent dilation ")):
            if getattr(self, name) is not None:
                told.append(f"{short}{_pair(getattr(self, name))}")
        for name in ("strides", "dilation"):
            if max(getattr(self, name)) > 1:
                told.append(f"{name.removesuffix('s')} {_pair(getattr(self, name))}")
        told += [getattr(self, n) for n, usual in _USUAL.items() if getattr(self, n) not in (usual, None)]
        if self.peephole:
            told.append(f"{self.peephole} peephole")
        if self.normalization:
            told.append(f"{self.normalization} norm")
        if self.cell_clip is not None:
            told.append(f"clip {self.cell_clip:g}")
        if self.dropout:
            told.append(f"dropout {self.dropout:g}")
        told += [name.replace("_", " ") for name in ("mask", "go_backwards", "training") if getattr(self, name)]
        return ", ".join([*told, *([] if self.bias else ["no bias"])])


_USUAL = {"padding": "same", "padding_mode": "zeros", "activation": "tanh", "recurrent_activation": "sigmoid",
          "dtype": "float32"}  # fmt: skip


def _pair(pair: Pair) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}×{pair[1]}"
