"""The cuda engine: csrc/ compiled at run time for the GPU at hand; the functions that every engine has.

They take NumPy arrays, which are put on the device and whose results are got back, or `device.DeviceArray`, whose
results are such arrays too, on the same stream; of `views.View` they are views. The files beside compute on the device
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fastclstm.engines import cell_updates, cells, recurrence
from fastclstm.engines.cuda import backward as _backward
from fastclstm.engines.cuda import conv2d as _conv2d
from fastclstm.engines.cuda import convlstm2d as _convlstm2d
from fastclstm.engines.cuda import max_pool3d as _max_pool3d
from fastclstm.engines.cuda.device import Device, DeviceArray
from fastclstm.engines.cuda.devices import current
from fastclstm.engines.cuda.product import ALGORITHMS
from fastclstm.engines.cuda.views import View, plain
from fastclstm.spec import CellSpec, ConvLSTMSpec, ConvSpec, PoolSpec

__all__ = ["ALGORITHMS", "conv2d", "conv2d_backward", "convlstm2d", "convlstm2d_backward", "max_pool3d",
           "max_pool3d_backward", "recurrent", "recurrent_backward"]  # fmt: skip

Array = np.ndarray | DeviceArray | View
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """What `convlstm2d_backward` needs, and where it is."""

    place: _Place
    state: Any


def conv2d(spec: ConvSpec, x: Array, kernel: Array, bias: Array | None, *, algorithm: str = "auto") -> Any:
    """Cross-correlate x (B, H, W, C) with kernel (KH, KW, C, F): y (B, HO, WO, F)."""
    with _at(x) as place:
        return place.give(_conv2d.conv2d(spec, place.take(x), plain(kernel), plain(bias), algorithm=algorithm))


def conv2d_backward(
    spec: ConvSpec, x: Array, kernel: Array, dy: Array | None, *, algorithm: str = "auto",
    wanted: Collection[str] = ("x", "kernel", "bias"),
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Pull dy (B, HO, WO, F) back through `conv2d`: dx, dkernel, dbias, None for what is not `wanted`."""
    with _at(x) as place:
        arrays = place.take(x), plain(kernel), place.take(dy)
        return place.give(_conv2d.conv2d_backward(spec, *arrays, algorithm=algorithm, wanted=wanted))


def convlstm2d(
    spec: ConvLSTMSpec,
    x: Array,
    kernel: Array,
    recurrent_kernel: Array,
    bias: Array | None,
    h: Array | None,
    c: Array | None,
    peephole: Arrays | None,
    mask: Array | None,
    *,
    normalization: Arrays | None = None,
    dropout: Arrays | None = None,
    algorithm: str = "auto",
    save: bool | str = False,
    out: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[Any, Any, Any, Saved | recurrence.Saved | None]:
    """Run a ConvLSTM over x (B, T, H, W, C): output, last h, last c and, with `save`, what backward needs.

    What the kernels do not know takes the recurrence in NumPy over this engine's convolutions, where x is NumPy's; an
    x on the GPU is refused (NotImplementedError) rather than brought to the processor and back at every step.
    """
    options: Arrays = {"normalization": normalization, "dropout": dropout, "save": save}
    try:
        with _at(x) as place:
            output, *last, state = _convlstm2d.convlstm2d(
                spec, place.take(x), plain(kernel), plain(recurrent_kernel), plain(bias), place.take(h), place.take(c),
                peephole and {name: plain(weights) for name, weights in peephole.items()}, plain(mask),
                algorithm=algorithm, **options,
            )  # fmt: skip
            output, h_last, c_last = place.give((output, *last))
    except NotImplementedError:
        if not isinstance(x, np.ndarray):
            raise
        arguments: Any = x, kernel, recurrent_kernel, bias, h, c, peephole, mask
        return recurrence.forward(spec, conv2d, *arguments, **options, algorithm=algorithm, out=out)
    if out is not None:
        for array, last_one in zip(out, (h_last, c_last), strict=True):
            np.copyto(array, last_one)
        h_last, c_last = out
    return output, h_last, c_last, Saved(place, state) if save else None


def convlstm2d_backward(
    spec: ConvLSTMSpec, saved: Saved | recurrence.Saved, dy: Any, dh: Any, dc: Any, *,
    input_gradient: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Pull gradients of the output, the last h and the last c back through time: see `recurrence.backward`."""
    if isinstance(saved, recurrence.Saved):
        return recurrence.backward(spec, conv2d_backward, saved, dy, dh, dc, input_gradient=input_gradient)
    with saved.place.entered() as place:
        gradients = place.give(_backward.convlstm2d_backward(spec, saved.state, *map(place.take, (dy, dh, dc))))
    return gradients if input_gradient else gradients | {"x": None}


def recurrent(
    spec: CellSpec,
    x: np.ndarray,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray | None,
    states: tuple[np.ndarray | None, ...],
    mask: np.ndarray | None,
    *,
    normalization: Arrays | None = None,
    dropout: Arrays | None = None,
    algorithm: str = "auto",
    save: bool = False,
    convolution: Callable[..., Any] | None = None,
) -> tuple[np.ndarray, tuple[np.ndarray, ...], cells.Saved | None]:
    """Run a cell over x (B, T, *space, C) of NumPy: the updates in NumPy, between this engine's convolutions."""
    tools = cells.Tools(convolution or partial(cells.Convolution, conv2d, conv2d_backward), cell_updates.Updates)
    inputs = cells.Inputs(x, kernel, recurrent_kernel, bias, states, mask, normalization, dropout, algorithm)
    return cells.forward(spec, tools, inputs, save)


def recurrent_backward(
    spec: CellSpec, saved: cells.Saved, dy: np.ndarray | None, dstates: Sequence[np.ndarray | None], *,
    input_gradient: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Pull gradients of the output and of the last states back through time: see `cells.backward`."""
    return cells.backward(spec, saved, dy, dstates, input_gradient=input_gradient)


def max_pool3d(spec: PoolSpec, x: Array, return_indices: bool) -> tuple[Any, Any]:
    """Take the maximum of each window of x (B, T, H, W, C): y (B, TO, HO, WO, C), and where it stands."""
    with _at(x) as place:
        return place.give(_max_pool3d.max_pool3d(spec, place.take(x), return_indices))


def max_pool3d_backward(spec: PoolSpec, indices: Array, dy: Array) -> Any:
    """Add each element of dy (B, TO, HO, WO, C) to the pixel of dx (B, T, H, W, C) that won its window."""
    with _at(indices) as place:
        return place.give(_max_pool3d.max_pool3d_backward(spec, place.take(indices), place.take(dy)))


@dataclass(frozen=True)
class _Place:
    """Where a call computes, and what its results are: arrays of NumPy or of the device, or views of the latter."""

    device: Device
    kind: type
    stream: int | None

    def entered(self) -> _Entered:
        """Compute there inside; arrays of a stream unknown to us are done with at the end.

        Raises RuntimeError, before anything else, where the stream is being captured.
        """
        return _Entered(self)

    def take(self, array: Array | None) -> DeviceArray | None:
        """Bring an array to the device."""
        return self.device.put(array) if isinstance(array, np.ndarray) else plain(array)

    def give(self, result: Any) -> Any:
        """Bring nested results to where x came from."""
        if self.kind is DeviceArray:
            return result
        if isinstance(result, dict):
            return {name: self.give(value) for name, value in result.items()}
        if isinstance(result, tuple):
            return tuple(map(self.give, result))
        if not isinstance(result, DeviceArray):
            return result
        return View.of(result) if self.kind is View else self.device.get(result)


class _Entered:
    """A place that was entered."""

    __slots__ = ("_place", "_working")

    def __init__(self, place: _Place):
        self._place, self._working = place, place.device.on(place.stream)

    def __enter__(self) -> _Place:
        device = self._place.device
        self._working.__enter__()
        try:
            device.stream_key()
        except BaseException:
            self._working.__exit__(None, None, None)
            raise
        return self._place

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        place = self._place
        try:
            if kind is None and place.kind is not np.ndarray and place.stream is None:
                place.device.finish()
        finally:
            self._working.__exit__(None, None, None)


def _at(x: Array) -> Any:
    """Enter the device of x, for NumPy arrays the current one."""
    if isinstance(x, np.ndarray):
        return _Place(current(), np.ndarray, None).entered()
    return _Place(x.device, type(x), x.stream).entered()
