"""The layer of 3D max pooling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from fastclstm import dispatch, functional
from fastclstm.layers.base import Layer
from fastclstm.spec import DATA_FORMATS, PoolSpec, choice, flag, integers


@dataclass(eq=False, repr=False)
class MaxPooling3D(Layer):
    """Maximum over windows of time, height and width.

    ``layer(x)`` takes x (B, T, H, W, C) and returns (B, TO, HO, WO, C), or with data_format="channels_first"
    (B, C, T, H, W) and (B, C, TO, HO, WO), in x's dtype and as x's kind of array. Valid: ``TO = (T - p) // s + 1``;
    same: ``TO = ceil(T / s)``. NaN wins its window; of equal values, or several NaN, the first in (t, h, w) order takes
    the gradient (of several NaN in PyTorch the last).

    Parameters
    ----------
    pool_size : int or (int, int, int)
        The window on time, height and width.
    stride : int or (int, int, int), optional
        None: the window itself. Smaller strides overlap.
    padding : "valid", "same", int, (int, int, int) or three pairs (before, after)
        Padded positions never win.
    ceil_mode : bool
        Keep a last, partial window that starts inside the input.
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, T, H, W), other than layers of frames, whose sequences are (B, T, C, H, W).
    return_indices : bool
        Also return where each maximum stands, as flat int64 indices into the (T, H, W) volume.
    engine : str, optional
        "cpu" (the default), "cuda" or "reference". None: where x is.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> pool = MaxPooling3D((2, 2, 2), (2, 2, 2), engine="reference")
    >>> pool(np.zeros((1, 10, 32, 32, 32), np.float32)).shape
    (1, 5, 16, 16, 32)
    """

    pool_size: Any = (2, 2, 2)
    stride: Any = None
    _: KW_ONLY
    padding: Any = "valid"
    ceil_mode: bool = False
    data_format: str = "channels_last"
    return_indices: bool = False
    engine: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("MaxPooling3D", "data_format", self.data_format, DATA_FORMATS)
        flag("MaxPooling3D", "ceil_mode", self.ceil_mode)
        flag("MaxPooling3D", "return_indices", self.return_indices)
        dispatch.check_engine(self.engine)
        window = integers("MaxPooling3D", "pool_size", self.pool_size, 3, 1)
        self._geometry((1, *window, 1))  # wrong options are errors now, not at the first call

    def forward(self, x: Any, training: bool = False) -> Any:
        """Return the pooled x, or (that, indices) with return_indices; `training` keeps what `backward` needs."""
        _, read = dispatch.choose("MaxPooling3D", self.engine, x)
        self._check_rank(read("x", x).shape)
        options = {
            "padding": self.padding,
            "ceil_mode": self.ceil_mode,
            "data_format": self.data_format,
            "return_indices": self.return_indices,
            "engine": self.engine,
        }
        self._pullback = None
        if not training:
            return functional.max_pool3d(x, self.pool_size, self.stride, **options)
        outputs, self._pullback = functional.max_pool3d_vjp(x, self.pool_size, self.stride, **options)
        return outputs

    def backward(self, dy: Any) -> Any:
        """Return dx, given dy of the pooled output of the last call, which was a training call.

        Raises
        ------
        RuntimeError
            The last call was not a training call.
        ValueError
            dy has not the output's shape.
        """
        return self._recorded()((dy, None) if self.return_indices else dy)["x"]

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the output for an input of `input_shape`."""
        self._check_rank(input_shape)
        if self.data_format == "channels_last":
            return self._geometry(input_shape).output_shape
        B, C, *volume = input_shape
        return B, C, *self._geometry((B, *volume, C)).output_shape[1:4]

    def _call_shapes(self, x: Any, **options: Any) -> Any:
        shape = self.output_shape(x)
        return (shape, shape) if self.return_indices else shape

    def _pull_call(self, dy: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        dy = dy[0] if self.return_indices else dy  # indices have no gradient
        return None if dy is None else self.backward(dy), {}

    def _several_outputs(self) -> str | None:
        return "give it return_indices=False" if self.return_indices else None

    def _knows_gpu(self, training: bool) -> bool:
        return True

    def _geometry(self, shape: tuple[int, ...]) -> PoolSpec:
        return PoolSpec.infer(shape, self.pool_size, self.stride, padding=self.padding, ceil_mode=self.ceil_mode,
                              op="MaxPooling3D")  # fmt: skip

    def _check_rank(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 5:
            volume = "time, height, width"
            layout = f"{volume}, channels" if self.data_format == "channels_last" else f"channels, {volume}"
            raise ValueError(f"MaxPooling3D: x must be (batch, {layout}), got {len(shape)}D {tuple(shape)}; "
                             f"add the missing axis, e.g. x[np.newaxis]")  # fmt: skip
