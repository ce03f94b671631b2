"""max_pool3d: the maximum over windows of time, height and width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.functional.arguments import Gradients, check_structure, read_cotangent
from fastclstm.spec import DATA_FORMATS, PoolSpec, choice


def max_pool3d(
    x: Any,
    pool_size: Any = (2, 2, 2),
    strides: Any = None,
    *,
    padding: Any = "valid",
    ceil_mode: bool = False,
    data_format: str = "channels_last",
    return_indices: bool = False,
    engine: str | None = None,
) -> Any:
    """Take the maximum over windows of time, height and width.

    Parameters
    ----------
    x : array (B, T, H, W, C), or (B, C, T, H, W) with data_format="channels_first"
    pool_size : int or (int, int, int)
        The window on time, height and width.
    strides : int or (int, int, int), optional
        None: the window itself. Smaller strides overlap.
    padding : "valid", "same", int, (int, int, int) or three pairs (before, after)
        Padded positions never win. "same": ``ceil(n / stride)`` windows.
    ceil_mode : bool
        Keep a last, partial window that starts inside the input.
    data_format : "channels_last" or "channels_first"
    return_indices : bool
        Also return where each maximum stands: the flat index into the (T, H, W) volume of its sample and channel.
    engine : "cpu", "cuda" or "reference", optional

    Returns
    -------
    array (B, TO, HO, WO, C), or a tuple of it and an int64 array of the same shape
        In the layout of x. NaN wins its window; of equal values the first in (t, h, w) order does, and of several NaN
        too (PyTorch's indices are those of the last NaN).

    Raises
    ------
    ValueError
        Shapes or options that do not fit together.
    TypeError
        Complex, object or ragged arrays; arrays on another device.

    Examples
    --------
    >>> import numpy as np
    >>> from fastclstm.functional import max_pool3d
    >>> max_pool3d(np.arange(8.0).reshape(1, 2, 2, 2, 1)).ravel()
    array([7.])
    """
    call = PoolCall(x, pool_size, strides, padding, ceil_mode, data_format, engine)
    y, indices = call.engine.max_pool3d(call.spec, call.x, return_indices)
    y = call.restore(call.from_channels_last(y))
    return (y, call.restore(call.from_channels_last(indices))) if return_indices else y


def max_pool3d_vjp(
    x: Any,
    pool_size: Any = (2, 2, 2),
    strides: Any = None,
    *,
    padding: Any = "valid",
    ceil_mode: bool = False,
    data_format: str = "channels_last",
    return_indices: bool = False,
    engine: str | None = None,
) -> tuple[Any, Callable[[Any], Gradients]]:
    """Compute `max_pool3d` and the function that hands each gradient to the element that won its window.

    Parameters are those of `max_pool3d`.

    Returns
    -------
    outputs : as `max_pool3d` returns them
    pullback : callable
        ``pullback(dy)`` returns ``{"x": dx}``; with return_indices it takes a pair whose second item is ignored.
    """
    call = PoolCall(x, pool_size, strides, padding, ceil_mode, data_format, engine)
    y, indices = call.engine.max_pool3d(call.spec, call.x, True)
    shape = call.from_channels_last(y).shape

    def pullback(cotangents: Any) -> Gradients:
        if return_indices:
            check_structure("max_pool3d", cotangents, "(dy, None)", 2)
        dy = cotangents[0] if return_indices else cotangents
        cotangent = read_cotangent("max_pool3d", "dy", np.zeros(shape) if dy is None else dy, shape, y.dtype, call.read)
        dx = call.engine.max_pool3d_backward(call.spec, indices, call.to_channels_last(cotangent))
        return {"x": call.restore(call.from_channels_last(dx))}

    result = call.restore(call.from_channels_last(y))
    return (result, call.restore(call.from_channels_last(indices))) if return_indices else result, pullback


class PoolCall:
    """One validated call of `max_pool3d`: its engine, geometry and native channels-last array."""

    def __init__(
        self, x: Any, pool_size: Any, strides: Any, padding: Any, ceil_mode: bool, data_format: str, engine: str | None
    ):
        self.engine, self.read = dispatch.choose("max_pool3d", engine, x)
        self.restore = dispatch.restorer(x)
        choice("max_pool3d", "data_format", data_format, DATA_FORMATS)
        self.channels_first = data_format == "channels_first"
        array = self.read("x", x)
        if self.channels_first and array.ndim == 5:
            array = np.moveaxis(dispatch.to_view(array), 1, -1)
        self.spec = PoolSpec.infer(array.shape, pool_size, strides, padding=padding, ceil_mode=ceil_mode)
        self.x = dispatch.native(array, dispatch.working_dtype(array))

    def to_channels_last(self, array: np.ndarray | None) -> np.ndarray | None:
        """Bring an array in the caller's layout to the engine's."""
        if not self.channels_first or array is None:
            return array
        return dispatch.contiguous(np.moveaxis(dispatch.to_view(array), 1, -1))

    def from_channels_last(self, array: np.ndarray) -> np.ndarray:
        """Bring an array in the engine's layout to the caller's."""
        return dispatch.contiguous(np.moveaxis(array, -1, 1)) if self.channels_first else array
