"""conv2d_transpose and conv3d_transpose: convolutions taken the other way, as their input gradients are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.functional.arguments import Gradients, read_cotangent
from fastclstm.functional.volumes import Volumes
from fastclstm.spec import ConvSpec, transposed


def conv2d_transpose(
    x: Any,
    kernel: Any,
    bias: Any = None,
    *,
    strides: Any = 1,
    padding: Any = "same",
    output_padding: Any = None,
    dilation: Any = 1,
    algorithm: str = "auto",
    engine: str | None = None,
) -> Any:
    """Convolve frames with a kernel the other way, to larger ones where the stride is above 1.

    Every pixel of x adds its channels times the kernel to a window of the output: the transpose of `conv2d`, whose
    input gradient it is (Dumoulin & Visin, "A guide to convolution arithmetic for deep learning", 2016, section 4).

    Parameters
    ----------
    x : array (B, H, W, C)
        Frames, channels-last.
    kernel : array (KH, KW, F, C)
        The filters, as Keras has them.
    bias : array (F,), optional
        Added to every pixel.
    strides, dilation : int or (int, int)
        Step of the window and of the taps within it; at most one of them above 1.
    padding : "same", "valid", int, (int, int) or ((top, bottom), (left, right))
        What is cropped from the output. "same": ``HO = H · stride``; "valid", with k the dilated extent of the
        kernel: ``HO = (H − 1) · stride + max(k, stride)``; numbers: ``HO = (H − 1) · stride + k − top − bottom``.
    output_padding : int or (int, int), optional
        Rows and columns more at the bottom and on the right, fewer than the stride. With "same" the output is then, as
        Keras's, ``(H − 1) · stride + k − 2 (k // 2) + output_padding``.
    algorithm, engine
        As in `conv2d`.

    Returns
    -------
    array (B, HO, WO, F)

    Raises
    ------
    ValueError
        Shapes or options that do not fit together.
    TypeError
        Complex, object or ragged arrays; arrays on another device.

    Examples
    --------
    >>> import numpy as np
    >>> from fastclstm.functional import conv2d_transpose
    >>> conv2d_transpose(np.ones((1, 2, 2, 1)), np.ones((3, 3, 1, 1)), strides=2, padding=1)[0, :, :, 0]
    array([[1., 2., 1.],
           [2., 4., 2.],
           [1., 2., 1.]])
    """
    call = TransposedCall(
        "conv2d_transpose", x, kernel, bias, strides, padding, output_padding, dilation, algorithm, engine
    )
    return call.restore(call.forward())


def conv2d_transpose_vjp(x: Any, kernel: Any, bias: Any = None, **options: Any) -> tuple[Any, Callable[..., Gradients]]:
    """Compute `conv2d_transpose` and the function that pulls gradients back through it.

    Parameters are those of `conv2d_transpose`. They are kept, not copied: arrays must not change before pullback is
    called.

    Returns
    -------
    y : array (B, HO, WO, F)
    pullback : callable
        ``pullback(dy)``, with dy the gradient of a scalar with respect to y, returns a dict of gradients with the
        keys "x", "kernel" and, if one was given, "bias".
    """
    call = TransposedCall("conv2d_transpose", x, kernel, bias, **_DEFAULTS | options)
    return call.restore(call.forward()), call.pull_back


def conv3d_transpose(
    x: Any,
    kernel: Any,
    bias: Any = None,
    *,
    strides: Any = 1,
    padding: Any = "same",
    output_padding: Any = None,
    dilation: Any = 1,
    algorithm: str = "auto",
    engine: str | None = None,
) -> Any:
    """Convolve volumes of time, height and width with a kernel the other way: the transpose of `conv3d`.

    Parameters
    ----------
    x : array (B, T, H, W, C)
        Sequences of frames, channels-last.
    kernel : array (KT, KH, KW, F, C)
        The filters, as Keras has them.
    bias : array (F,), optional
        Added to every pixel.
    strides, dilation : int or (int, int, int)
        Step of the window and of the taps within it, on time, height and width; at most one of them above 1.
    padding : "same", "valid", int, three ints or three pairs (before, after)
        What is cropped from the output, as in `conv2d_transpose`, on time too.
    output_padding : int or (int, int, int), optional
        As in `conv2d_transpose`.
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
    >>> from fastclstm.functional import conv3d_transpose
    >>> conv3d_transpose(np.ones((1, 2, 1, 1, 1)), np.ones((3, 1, 1, 1, 1)), strides=(2, 1, 1), padding="valid").ravel()
    array([1., 1., 2., 1., 1.])
    """
    call = TransposedCall(
        "conv3d_transpose", x, kernel, bias, strides, padding, output_padding, dilation, algorithm, engine
    )
    return call.restore(call.forward())


def conv3d_transpose_vjp(x: Any, kernel: Any, bias: Any = None, **options: Any) -> tuple[Any, Callable[..., Gradients]]:
    """Compute `conv3d_transpose` and the function that pulls gradients back through it.

    Parameters are those of `conv3d_transpose`; what is returned is as `conv2d_transpose_vjp` returns it.
    """
    call = TransposedCall("conv3d_transpose", x, kernel, bias, **_DEFAULTS | options)
    return call.restore(call.forward()), call.pull_back


_DEFAULTS: dict[str, Any] = {
    "strides": 1, "padding": "same", "output_padding": None, "dilation": 1, "algorithm": "auto", "engine": None,
}  # fmt: skip


class TransposedCall:
    """One validated call: its engine, the convolution that it transposes and native arrays."""

    def __init__(
        self, op: str, x: Any, kernel: Any, bias: Any, strides: Any, padding: Any, output_padding: Any, dilation: Any,
        algorithm: str, engine: str | None,
    ):  # fmt: skip
        self.op = op
        self.restore = dispatch.restorer(x)
        self.engine, self._read = dispatch.choose(op, engine, x)
        dispatch.check_algorithm(op, self.engine, algorithm)
        given = {"x": x, "kernel": kernel} | ({} if bias is None else {"bias": bias})
        arrays = {name: self._read(name, value) for name, value in given.items()}
        rank = int(op[4])
        if arrays["kernel"].ndim != rank + 2:
            axes = ("KT, " if rank == 3 else "") + "KH, KW, filters, channels"
            raise ValueError(f"{op}: kernel must be ({axes}), got shape {arrays['kernel'].shape}")
        self._spec = transposed(
            op, arrays["x"].shape, arrays["kernel"].shape, None if bias is None else arrays["bias"].shape,
            strides=strides, padding=padding, output_padding=output_padding, dilation=dilation,
        )  # fmt: skip
        dtype = dispatch.working_dtype(*arrays.values())
        ready = {name: dispatch.native(array, dtype) for name, array in arrays.items()}
        self._x, self._bias = dispatch.to_view(ready["x"]), ready.get("bias")
        self._way: Any
        if isinstance(self._spec, ConvSpec):
            self._way = _Frames(self.engine, self._spec, ready["kernel"], algorithm)
        else:
            self._way = Volumes(self.engine, self._spec, ready["kernel"], algorithm, op)
        self._shape: tuple[int, ...] = ()

    def forward(self) -> Any:
        """Return y."""
        y, _, _ = self._way.pull_back(self._x, self._x, wanted=("x",))
        self._shape = y.shape
        if self._bias is None:
            return y
        return y + self._bias if dispatch.on_gpu(y) else np.add(y, self._bias, out=y)

    def pull_back(self, dy: Any, *, input_gradient: bool = True) -> Gradients:
        """Return the gradients that dy, the gradient of y, gives; of x unless `input_gradient` is false."""
        cotangent = read_cotangent(self.op, "dy", dy, self._shape, self._x.dtype, self._read)
        cotangent = np.zeros_like(self._x, shape=self._shape) if cotangent is None else dispatch.to_view(cotangent)
        _, dkernel, _ = self._way.pull_back(cotangent, self._x, wanted=("kernel",))
        gradients = {"x": self.restore(self._way.convolve(cotangent, None))} if input_gradient else {}
        gradients["kernel"] = self.restore(dkernel)
        if self._bias is not None:
            gradients["bias"] = self.restore(self._sum(cotangent))
        return gradients

    def _sum(self, dy: Any) -> Any:
        """Sum dy over all pixels, as the bias of any convolution to its channels would."""
        frames = dy.reshape(int(np.prod(dy.shape[:-3])), *dy.shape[-3:])
        F = dy.shape[-1]
        spec = ConvSpec.infer(frames.shape, (1, 1, F, F))
        return self.engine.conv2d_backward(spec, frames, frames, frames, wanted=("bias",))[2]


class _Frames:
    """The convolution of frames, as `Volumes` is that of volumes."""

    def __init__(self, engine: Any, spec: ConvSpec, kernel: Any, algorithm: str):
        self._engine, self._spec, self._kernel, self._algorithm = engine, spec, kernel, algorithm

    def convolve(self, x: Any, bias: Any) -> Any:
        return self._engine.conv2d(self._spec, x, self._kernel, bias, algorithm=self._algorithm)

    def pull_back(self, x: Any, dy: Any, wanted: Any) -> Any:
        return self._engine.conv2d_backward(self._spec, x, self._kernel, dy, algorithm=self._algorithm, wanted=wanted)
