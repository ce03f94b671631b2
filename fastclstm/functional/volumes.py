"""conv3d: volumes of time, height and width with a kernel, by way of conv2d."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.functional.arguments import GRADIENTS, Gradients, asked_for, read_cotangent
from fastclstm.spec import Conv3DSpec

GATHERED_BYTES = 64 << 20
"""Size of the frames that are laid side by side before each convolution."""


def conv3d(
    x: Any,
    kernel: Any,
    bias: Any = None,
    *,
    strides: Any = 1,
    padding: Any = "same",
    padding_mode: str = "zeros",
    dilation: Any = 1,
    algorithm: str = "auto",
    engine: str | None = None,
) -> Any:
    """Convolve volumes of time, height and width with a kernel (3D cross-correlation).

    An output frame is one 2D convolution of the KT frames that it sees, laid side by side on the channel axis: so it
    is as fast as `conv2d`, and exactly as accurate.

    Parameters
    ----------
    x : array (B, T, H, W, C)
        Sequences of frames, channels-last.
    kernel : array (KT, KH, KW, C, F)
        The filters.
    bias : array (F,), optional
        Added to every pixel.
    strides, dilation : int or (int, int, int)
        Step of the window and of the taps within it, on time, height and width; at most one of them above 1.
    padding : "same", "valid", int, three ints or three pairs (before, after)
        "same": ``TO = ceil(T / stride)``, where an odd total puts the extra step after; likewise height and width.
    padding_mode : "zeros" or "circular"
        What the padding holds, on all three axes.
    algorithm, engine
        As in `conv2d`.

    Returns
    -------
    array (B, TO, HO, WO, F)

    Raises
    ------
    ValueError
        Shapes or options that do not fit together.
    TypeError
        Complex, object or ragged arrays; arrays on another device.

    Examples
    --------
    >>> import numpy as np
    >>> from fastclstm.functional import conv3d
    >>> conv3d(np.ones((1, 3, 3, 3, 1)), np.ones((3, 3, 3, 1, 1))).ravel()[[0, 13, 26]]
    array([ 8., 27.,  8.])
    """
    call = Conv3DCall(x, kernel, bias, strides, padding, padding_mode, dilation, algorithm, engine)
    return dispatch.restorer(x)(call.forward())


def conv3d_vjp(
    x: Any,
    kernel: Any,
    bias: Any = None,
    *,
    strides: Any = 1,
    padding: Any = "same",
    padding_mode: str = "zeros",
    dilation: Any = 1,
    algorithm: str = "auto",
    engine: str | None = None,
) -> tuple[Any, Callable[..., Gradients]]:
    """Compute `conv3d` and the function that pulls gradients back through it.

    Parameters are those of `conv3d`. They are kept, not copied: arrays must not change before pullback is called.

    Returns
    -------
    y : array (B, TO, HO, WO, F)
    pullback : callable
        ``pullback(dy)``, with dy the gradient of a scalar with respect to y, returns a dict of gradients with the
        keys "x", "kernel" and, if one was given, "bias". With ``input_gradient=False`` there is none of x.
    """
    call = Conv3DCall(x, kernel, bias, strides, padding, padding_mode, dilation, algorithm, engine)
    restore = dispatch.restorer(x)

    def pullback(dy: Any, *, input_gradient: bool = True) -> Gradients:
        cotangent = read_cotangent("conv3d", "dy", dy, call.spec.output_shape, call.x.dtype, call.read)
        wanted = asked_for(input_gradient, bias)
        gradients = call.volumes.pull_back(call.x, cotangent, wanted)
        return {name: restore(gradients[GRADIENTS.index(name)]) for name in wanted}

    return restore(call.forward()), pullback


class Conv3DCall:
    """One validated call of `conv3d`: its engine, geometry and native arrays."""

    def __init__(
        self, x: Any, kernel: Any, bias: Any, strides: Any, padding: Any, padding_mode: str, dilation: Any,
        algorithm: str, engine: str | None,
    ):  # fmt: skip
        module, self.read = dispatch.choose("conv3d", engine, x)
        dispatch.check_algorithm("conv3d", module, algorithm)
        given = {"x": x, "kernel": kernel} | ({} if bias is None else {"bias": bias})
        arrays = {name: self.read(name, value) for name, value in given.items()}
        self.spec = Conv3DSpec.infer(
            arrays["x"].shape, arrays["kernel"].shape, None if bias is None else arrays["bias"].shape,
            strides=strides, padding=padding, padding_mode=padding_mode, dilation=dilation,
        )  # fmt: skip
        dtype = dispatch.working_dtype(*arrays.values())
        ready = {name: dispatch.native(array, dtype) for name, array in arrays.items()}
        self.x, self.bias = dispatch.to_view(ready["x"]), ready.get("bias")
        self.volumes = Volumes(module, self.spec, ready["kernel"], algorithm)

    def forward(self) -> np.ndarray:
        """Return y (B, TO, HO, WO, F)."""
        return self.volumes.convolve(self.x, self.bias)


class Volumes:
    """The convolution of volumes of a geometry with a kernel, on an engine: forward, and its transposes."""

    def __init__(self, engine: ModuleType, spec: Conv3DSpec, kernel: Any, algorithm: str, op: str = "conv3d"):
        """Lay the taps on time of a native kernel (KT, KH, KW, C, F) side by side."""
        self.engine, self.spec, self.algorithm, self._op = engine, spec, algorithm, op
        self._kernel_shape, frame = kernel.shape, spec.frame
        self._kernel = dispatch.contiguous(np.moveaxis(dispatch.to_view(kernel), 0, 2)).reshape(
            frame.KH, frame.KW, frame.C, frame.F
        )

    def convolve(self, x: Any, bias: Any) -> Any:
        """Return y (B, TO, HO, WO, F) of a view of x (B, T, H, W, C)."""
        y = np.empty_like(x, shape=self.spec.output_shape)
        frames = y.reshape(self.spec.B * self.spec.TO, *y.shape[2:])
        for part in self._chunks():
            gathered = self._gather(x, part)
            frames[part.start : part.stop] = self.engine.conv2d(
                self.spec.frame.with_batch(len(part)), gathered, self._kernel, bias, algorithm=self.algorithm
            )
        return y

    def pull_back(
        self, x: Any, dy: Any, wanted: Collection[str] = ("x", "kernel", "bias")
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        """Pull dy, None for zeros, back through `convolve`: dx, dkernel, dbias, None for what is not `wanted`.

        Only dkernel looks at x, which for the others may be any view of the dtype.
        """
        spec, frame = self.spec, self.spec.frame
        shapes = {"x": (spec.B, spec.T, frame.H, frame.W, frame.C // spec.KT), "kernel": self._kernel.shape,
                  "bias": (frame.F,)}  # fmt: skip
        results = {name: np.zeros_like(x, shape=shapes[name]) for name in wanted}
        if dy is not None:
            frames = dispatch.to_view(dy).reshape(spec.B * spec.TO, *dy.shape[2:])
            for part in self._chunks():
                seen = self._gather(x, part) if "kernel" in wanted else x
                dgathered, *others = self.engine.conv2d_backward(
                    frame.with_batch(len(part)), seen, self._kernel, frames[part.start : part.stop],
                    algorithm=self.algorithm, wanted=wanted,
                )  # fmt: skip
                for name, gradient in zip(("kernel", "bias"), others, strict=True):
                    if gradient is not None:
                        results[name] += gradient
                if dgathered is not None:
                    by_tap = dgathered.reshape(*dgathered.shape[:3], spec.KT, frame.C // spec.KT)
                    for rows, tap, b, steps in self._runs(part):
                        results["x"][b, steps] += by_tap[rows, :, :, tap]
        if "kernel" in wanted:
            KT, KH, KW, C, F = self._kernel_shape
            by_time = np.moveaxis(results["kernel"].reshape(KH, KW, KT, C, F), 2, 0)
            results["kernel"] = dispatch.contiguous(by_time)
        return results.get("x"), results.get("kernel"), results.get("bias")

    def _chunks(self) -> Iterator[range]:
        """Yield runs of output frames, counted through B and TO, whose gathered input fits in `GATHERED_BYTES`."""
        frame = self.spec.frame
        size = max(1, frame.H * frame.W * frame.C * self._kernel.dtype.itemsize)  # 0: without channels
        count = max(1, GATHERED_BYTES // size)
        total = self.spec.B * self.spec.TO
        for start in range(0, total, count):
            yield range(start, min(start + count, total))

    def _runs(self, part: range) -> list[tuple[slice, int, int, slice]]:
        """Return which rows see with a tap which steps of which sample.

        They are in an order in which what a step gets from several rows comes in the order of the rows. Where steps go
        around that takes a run for each row.
        """
        circular = self.spec.frame.padding_mode == "circular"
        runs: list[list[int]] = []
        latest: dict[int, list[int]] = {}
        stride = self.spec.stride
        for row, output in enumerate(part):
            b, seen = self.spec.sources(output)
            for tap, t in seen if circular else reversed(seen):
                run = None if circular else latest.get(tap)
                if run is not None and run[2:] == [tap, b, t - (row - run[0]) * stride] and run[1] == row:
                    run[1] = row + 1
                else:
                    latest[tap] = run = [row, row + 1, tap, b, t]
                    runs.append(run)
        return [(slice(row, stop), tap, b, slice(t, t + (stop - row - 1) * stride + 1, stride))
                for row, stop, tap, b, t in runs]  # fmt: skip

    def _gather(self, x: Any, part: range) -> Any:
        """Lay the frames that each output frame sees side by side: (len(part), H, W, KT·C)."""
        frame, spec = self.spec.frame, self.spec
        gathered = np.zeros_like(x, shape=(len(part), frame.H, frame.W, spec.KT, x.shape[-1]))
        for rows, tap, b, steps in self._runs(part):
            gathered[rows, :, :, tap] = x[b, steps]
        return gathered.reshape(len(part), frame.H, frame.W, frame.C)
