"""Pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastclstm.spec.options import Pair, Shape, integers
from fastclstm.spec.windows import outputs, window_padding


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """One 3D max pooling ``(B, T, H, W, C) -> (B, TO, HO, WO, C)``."""

    B: int
    T: int
    H: int
    W: int
    C: int
    TO: int
    HO: int
    WO: int
    pool_size: tuple[int, int, int]
    strides: tuple[int, int, int]
    padding: tuple[Pair, Pair, Pair]
    """(before, after) on time, height and width; padded positions never win."""

    @classmethod
    def infer(
        cls,
        x_shape: Shape,
        pool_size: Any = (2, 2, 2),
        strides: Any = None,
        *,
        padding: Any = "valid",
        ceil_mode: bool = False,
        op: str = "max_pool3d",
    ) -> PoolSpec:
        """Check a channels-last shape and the options and return the geometry; raise ValueError or TypeError."""
        if len(x_shape) != 5:
            raise ValueError(
                f"{op}: x must be (batch, time, height, width, channels), got {len(x_shape)}D {tuple(x_shape)}"
            )
        B, T, H, W, C = x_shape
        pool = integers(op, "pool_size", pool_size, 3, 1)
        step = pool if strides is None else integers(op, "strides", strides, 3, 1)
        pads = window_padding(op, padding, (T, H, W), pool, step, maximum=pool)
        TO, HO, WO = outputs(op, (T, H, W), pool, step, pads, ceil=ceil_mode)
        return cls(B, T, H, W, C, TO, HO, WO, (pool[0], pool[1], pool[2]), (step[0], step[1], step[2]),
                   (pads[0], pads[1], pads[2]))  # fmt: skip

    @property
    def output_shape(self) -> Shape:
        """Shape ``(B, TO, HO, WO, C)`` of the result."""
        return self.B, self.TO, self.HO, self.WO, self.C
