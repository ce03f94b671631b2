"""The case table: what the benchmarks time and what tests may share. Data and weights are drawn, never zeros."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from fastclstm import functional
from fastclstm.spec import ConvLSTMSpec, PoolSpec, Shape

Arrays = dict[str, Any]
"""Arguments of an operation, by name."""


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


@dataclass(frozen=True)
class ConvLSTMCase:
    """One ConvLSTM over ``x (B, T, H, W, C)`` with F filters and a K×K kernel, stride 1, "same"."""

    op: ClassVar[str] = "convlstm2d"
    unit: ClassVar[str] = "GFLOP/s"
    dtype: ClassVar[str] = "float32"

    name: str
    B: int
    T: int
    H: int
    W: int
    C: int
    F: int
    K: int

    @property
    def kernel_shape(self) -> Shape:
        """Shape of the kernel."""
        return self.K, self.K, self.C, 4 * self.F

    @property
    def recurrent_kernel_shape(self) -> Shape:
        """Shape of the recurrent kernel."""
        return self.K, self.K, self.F, 4 * self.F

    def arrays(self) -> Arrays:
        """Return x and the weights in float32: x normal, weights uniform in ±1/sqrt(fan_in)."""
        rng = _rng(self.name)
        arrays = {"x": rng.standard_normal((self.B, self.T, self.H, self.W, self.C), np.float32)}
        for name, shape in (("kernel", self.kernel_shape), ("recurrent_kernel", self.recurrent_kernel_shape)):
            fan_in = math.prod(shape[:3])
            arrays[name] = (rng.uniform(-1, 1, shape) / math.sqrt(fan_in)).astype(np.float32)
        return arrays | {"bias": (rng.uniform(-1, 1, 4 * self.F) / math.sqrt(self.F)).astype(np.float32)}

    def oracle(self) -> np.ndarray:
        """Return the hidden sequence (B, T, H, W, F) of the reference engine in float64."""
        arrays = {name: array.astype(np.float64) for name, array in self.arrays().items()}
        return functional.convlstm2d(**arrays, engine="reference")

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `convlstm2d` beside the arrays."""
        return {}

    @property
    def spec(self) -> ConvLSTMSpec:
        """Geometry and options, checked."""
        x = (self.B, self.T, self.H, self.W, self.C)
        return ConvLSTMSpec.infer(x, self.kernel_shape, self.recurrent_kernel_shape, activation="tanh",
                                  recurrent_activation="sigmoid", output_activation="tanh")  # fmt: skip

    @property
    def work(self) -> float:
        """Billions of floating-point operations of the direct algorithm."""
        return self.spec.flops / 1e9

    @property
    def title(self) -> str:
        """Sizes in a few characters."""
        return f"{self.B}×{self.T}×{self.H}², {self.C}→{self.F}, k{self.K}"


@dataclass(frozen=True)
class PoolCase:
    """One 3D max pooling of ``x (B, T, H, W, C)``, "valid"."""

    op: ClassVar[str] = "max_pool3d"
    unit: ClassVar[str] = "GB/s"

    name: str
    B: int
    T: int
    H: int
    W: int
    C: int
    pool_size: int
    stride: int

    def arrays(self) -> Arrays:
        """Return x in float32, normal."""
        return {"x": _rng(self.name).standard_normal((self.B, self.T, self.H, self.W, self.C), np.float32)}

    def oracle(self) -> np.ndarray:
        """Return the pooled array of the reference engine in float64."""
        x = self.arrays()["x"].astype(np.float64)
        return functional.max_pool3d(x, self.pool_size, self.stride, engine="reference")

    @property
    def work(self) -> float:
        """Billions of bytes that must move: x read once, the result written once, in float32."""
        spec = PoolSpec.infer((self.B, self.T, self.H, self.W, self.C), self.pool_size, self.stride)
        return 4 * (self.B * self.T * self.H * self.W * self.C + math.prod(spec.output_shape)) / 1e9

    @property
    def title(self) -> str:
        """Sizes in a few characters."""
        return f"{self.B}×{self.T}×{self.H}²×{self.C}, {self.pool_size}³ stride {self.stride}"


Case = ConvLSTMCase | PoolCase

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        ConvLSTMCase("readme", B=1, T=10, H=32, W=32, C=1, F=32, K=3),
        ConvLSTMCase("mmnist", B=8, T=10, H=64, W=64, C=1, F=64, K=3),
        ConvLSTMCase("keras5", B=2, T=20, H=64, W=64, C=1, F=64, K=5),
        ConvLSTMCase("deep", B=2, T=20, H=64, W=64, C=64, F=64, K=3),
        ConvLSTMCase("shi", B=16, T=10, H=16, W=16, C=16, F=128, K=5),
        ConvLSTMCase("openstl", B=16, T=10, H=16, W=16, C=128, F=128, K=5),
        ConvLSTMCase("radar", B=1, T=12, H=256, W=256, C=1, F=64, K=3),
        PoolCase("pool_readme", B=1, T=10, H=32, W=32, C=32, pool_size=2, stride=2),
        PoolCase("pool_readme_overlap", B=1, T=10, H=32, W=32, C=32, pool_size=3, stride=2),
        PoolCase("pool_video", B=8, T=16, H=112, W=112, C=64, pool_size=2, stride=2),
        PoolCase("pool_video_overlap", B=8, T=16, H=112, W=112, C=64, pool_size=3, stride=2),
    )
}


@lru_cache(maxsize=1)
def oracle(name: str) -> np.ndarray:
    """Return the float64 result of a case, kept until another case is asked for."""
    return CASES[name].oracle()
