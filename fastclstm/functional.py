"""The operations as functions: validate, choose an engine, return the same kind of array.

Arrays are channels-last. NumPy arrays, nested sequences and any array with DLPack (PyTorch, JAX, CuPy) are accepted;
results come back as the kind of array that ``x`` is. float32 and float64 are computed as they are (mixed: float64),
other real dtypes as float32. Inputs are never modified.

`conv2d`, `convlstm2d` and `max_pool3d` with an x on a GPU are computed there, by the engine "cuda": without copies, on
the caller's stream. The arrays beside x may be there too, C-contiguous and of its dtype, or be NumPy's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.nn import activations
from fastclstm.nn import normalization as normalizations
from fastclstm.spec import (
    DATA_FORMATS,
    NORMALIZED_PARTS,
    Conv3DSpec,
    ConvLSTMSpec,
    ConvSpec,
    PoolSpec,
    choice,
    expect_shape,
    flag,
)

__all__ = [
    "conv2d", "conv2d_vjp", "conv3d", "conv3d_vjp", "convlstm2d", "convlstm2d_step", "convlstm2d_vjp", "max_pool3d",
    "max_pool3d_vjp",
]  # fmt: skip

Gradients = dict[str, Any]
Reader = Callable[[str, Any], Any]

GATHERED_BYTES = 64 << 20
"""Size of the frames that `conv3d` lays side by side before each convolution."""


def conv2d(
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
    """Convolve frames with a kernel (2D cross-correlation, as in every deep-learning framework).

    Parameters
    ----------
    x : array (B, H, W, C)
        Frames, channels-last.
    kernel : array (KH, KW, C, F)
        The filters.
    bias : array (F,), optional
        Added to every pixel.
    strides, dilation : int or (int, int)
        Step of the window and of the taps within it, on height and width; at most one of them above 1.
    padding : "same", "valid", int, (int, int) or ((top, bottom), (left, right))
        "same": ``HO = ceil(H / stride)``, where an odd total puts the extra row after.
    padding_mode : "zeros" or "circular"
        What the padding holds.
    algorithm : "auto", "direct" or "winograd"
        How the cpu engine computes; "direct" forbids the faster transforms, whose rounding differs slightly. Of the
        cuda engine, how precise products are: "float32" ("auto"), "simt" (without tensor cores), "tf32", "bfloat16",
        "float16".
    engine : "cpu", "cuda" or "reference", optional
        Where it is computed; None: where x is.

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
    >>> from fastclstm.functional import conv2d
    >>> conv2d(np.ones((1, 4, 4, 1)), np.ones((3, 3, 1, 1)), padding="valid")[0, :, :, 0]
    array([[9., 9.],
           [9., 9.]])
    """
    module, _, spec, arrays = _conv2d_arguments(
        x, kernel, bias, strides, padding, padding_mode, dilation, algorithm, engine
    )
    return dispatch.restorer(x)(module.conv2d(spec, *arrays, algorithm=algorithm))


def conv2d_vjp(
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
) -> tuple[Any, Callable[[Any], Gradients]]:
    """Compute `conv2d` and the function that pulls gradients back through it.

    Parameters are those of `conv2d`.

    Returns
    -------
    y : array (B, HO, WO, F)
    pullback : callable
        ``pullback(dy)``, with dy the gradient of a scalar with respect to y, returns a dict of gradients with the
        keys "x", "kernel" and, if one was given, "bias".
    """
    module, read, spec, arrays = _conv2d_arguments(
        x, kernel, bias, strides, padding, padding_mode, dilation, algorithm, engine
    )
    restore = dispatch.restorer(x)
    y = module.conv2d(spec, *arrays, algorithm=algorithm)

    def pullback(dy: Any) -> Gradients:
        cotangent = _cotangent("conv2d", "dy", dy, y.shape, y.dtype, read)
        dx, dkernel, dbias = module.conv2d_backward(spec, arrays[0], arrays[1], cotangent)
        gradients = {"x": restore(dx), "kernel": restore(dkernel)}
        if bias is not None:
            gradients["bias"] = restore(dbias)
        return gradients

    return restore(y), pullback


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
    call = _Conv3DCall(x, kernel, bias, strides, padding, padding_mode, dilation, algorithm, engine)
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
) -> tuple[Any, Callable[[Any], Gradients]]:
    """Compute `conv3d` and the function that pulls gradients back through it.

    Parameters are those of `conv3d`.

    Returns
    -------
    y : array (B, TO, HO, WO, F)
    pullback : callable
        ``pullback(dy)``, with dy the gradient of a scalar with respect to y, returns a dict of gradients with the
        keys "x", "kernel" and, if one was given, "bias".
    """
    call = _Conv3DCall(x, kernel, bias, strides, padding, padding_mode, dilation, algorithm, engine)
    restore = dispatch.restorer(x)

    def pullback(dy: Any) -> Gradients:
        dx, dkernel, dbias = call.backward(_cotangent("conv3d", "dy", dy, call.spec.output_shape, call.x.dtype))
        gradients = {"x": restore(dx), "kernel": restore(dkernel)}
        if bias is not None:
            gradients["bias"] = restore(dbias)
        return gradients

    return restore(call.forward()), pullback


def convlstm2d(
    x: Any,
    kernel: Any,
    recurrent_kernel: Any,
    bias: Any = None,
    *,
    initial_state: Any = None,
    strides: Any = 1,
    padding: Any = "same",
    padding_mode: str = "zeros",
    dilation: Any = 1,
    recurrent_dilation: Any = 1,
    activation: Any = "tanh",
    recurrent_activation: Any = "sigmoid",
    output_activation: Any = None,
    peephole: Mapping[str, Any] | None = None,
    cell_clip: float | None = None,
    mask: Any = None,
    go_backwards: bool = False,
    return_sequences: bool = True,
    return_state: bool = False,
    normalization: Any = None,
    normalization_weights: Mapping[str, Any] | None = None,
    dropout_masks: Mapping[str, Any] | None = None,
    algorithm: str = "auto",
    engine: str | None = None,
) -> Any:
    """Run a ConvLSTM over a batch of sequences (Shi et al. 2015, eq. 3; without peepholes unless given).

    With ``*`` the 2D convolution and ∘ the elementwise product, at each step

    ``i, f, o = σ(z_i), σ(z_f), σ(z_o)`` and ``g = tanh(z_g)`` of ``z = kernel * x_t + recurrent_kernel * h + bias``,
    then ``c = f∘c + i∘g`` and ``h = o∘tanh(c)``.

    Parameters
    ----------
    x : array (B, T, H, W, C)
        Sequences of frames, channels-last.
    kernel : array (KH, KW, C, 4F)
        Input kernels of the gates i, f, g, o, in that order on the last axis.
    recurrent_kernel : array (RKH, RKW, F, 4F)
        Kernels on the hidden state; their convolution has stride 1 and "same" padding.
    bias : array (4F,), optional
    initial_state : (h, c), optional
        Arrays (B, HO, WO, F); None, or None for either of them, means zeros.
    strides, padding, padding_mode, dilation
        Of the input convolution, as in `conv2d`.
    recurrent_dilation : int or (int, int)
    activation, recurrent_activation, output_activation : str or (function, derivative)
        On g; on i, f and o; on the new cell state (None: the same as `activation`).
    peephole : mapping, optional
        Weights under "i", "f" (applied to the old cell state) and "o" (applied to the new one): each (HO, WO, F)
        [elementwise, Shi et al. 2015], (F,) [a channel], or (K, K, F, F) [convolution, with optional "bias_i",
        "bias_f", "bias_o" of shape (F,)].
    cell_clip : float, optional
        Limits every cell state to [-cell_clip, cell_clip].
    mask : array of bool (B, T), optional
        Where False, the step is skipped: states are carried on and the previous output is repeated (zeros before the
        first valid step).
    go_backwards : bool
        Process the last frame first; outputs stay in processing order.
    return_sequences, return_state : bool
    normalization : "layer", "group", "batch" or fastclstm.nn.normalization.Normalization, optional
        Of the pre-activations z, before peepholes are added; the object says over what, and whether the convolutions
        of x and of h are normalized each for itself.
    normalization_weights : mapping, needed with `normalization`
        "gamma" and "beta" (4F,), or (HO, WO, 4F) where elementwise; of "batch" also "mean" and "variance" (4F,), the
        statistics to use: without them those of each step's batch are taken. Where the convolutions are normalized
        separately each name has the endings "_x" and "_h".
    dropout_masks : mapping, optional
        Factors under "x" (4, B, H, W, C) and "h" (4, B, HO, WO, F): what each gate's convolution sees of the frames and
        of the hidden state, at every step.
    algorithm, engine
        As in `conv2d`.

    Returns
    -------
    array (B, T, HO, WO, F), or (B, HO, WO, F) without return_sequences
        With return_state a tuple of that, h and c, the last states (B, HO, WO, F).

    Raises
    ------
    ValueError
        Shapes or options that do not fit together.
    TypeError
        Complex, object or ragged arrays; arrays on another device.
    NotImplementedError
        Normalization, dropout masks, convolutional peepholes or activations of your own with an x on a GPU.

    References
    ----------
    Shi et al., "Convolutional LSTM Network: A Machine Learning Approach for Precipitation Nowcasting", NeurIPS 2015.
    """
    call = _ConvLSTMCall(
        x, kernel, recurrent_kernel, bias, initial_state=initial_state, strides=strides, padding=padding,
        padding_mode=padding_mode, dilation=dilation, recurrent_dilation=recurrent_dilation, activation=activation,
        recurrent_activation=recurrent_activation, output_activation=output_activation, peephole=peephole,
        cell_clip=cell_clip, mask=mask, go_backwards=go_backwards, return_sequences=return_sequences,
        normalization=normalization, normalization_weights=normalization_weights, dropout_masks=dropout_masks,
        algorithm=algorithm, engine=engine,
    )  # fmt: skip
    output, h, c, _ = call.forward(save=False)
    return tuple(map(call.restore, (output, h, c))) if return_state else call.restore(output)


def convlstm2d_vjp(
    x: Any, kernel: Any, recurrent_kernel: Any, bias: Any = None, *, return_state: bool = False,
    recompute: bool = False, **options: Any,
) -> tuple[Any, ConvLSTMPullback]:  # fmt: skip
    """Compute `convlstm2d` and the function that pulls gradients back through time.

    Parameters are those of `convlstm2d`, and

    Parameters
    ----------
    recompute : bool
        False: the activated gates and the cell state of every step are kept for the way back, 5·B·HO·WO·F numbers a
        step. True: only states are, and the way back takes the steps forward again, for a third more time: the cpu
        engine keeps h and c every few steps, 2·B·HO·WO·F numbers a piece, and has the gates of one piece at a time.
        Where NumPy computes (engine="reference", and with normalization, dropout, convolutions as peepholes and
        activations that are called or whose derivative needs more than their value) it is 6·B·HO·WO·F numbers a step,
        10 or 14 with normalization, or with True 2. The cuda engine keeps 6·B·HO·WO·F either way.

    Returns
    -------
    outputs : as `convlstm2d` returns them
    pullback : callable
        Takes the gradient of a scalar with respect to the outputs, in their structure (with return_state a tuple of
        three, each may be None), and returns a dict of gradients with the keys "x", "kernel", "recurrent_kernel" and,
        where given, "bias", "initial_state" (a pair), "peephole" and "normalization_weights" (mappings; the latter of
        gammas and betas: given statistics are constants). Its attribute `statistics` lists, step by step in processing
        order, the "mean" and "variance" of "batch" normalization that were taken, and the "count" of values.
    """
    _check_options("convlstm2d_vjp", options)
    flag("convlstm2d_vjp", "recompute", recompute)
    call = _ConvLSTMCall(x, kernel, recurrent_kernel, bias, **options)
    output, h, c, saved = call.forward(save="states" if recompute else True)
    restore = call.restore
    with_state = not {"h", "c"}.isdisjoint(call.arrays)
    pullback = ConvLSTMPullback(call, saved, return_state, bias is not None, with_state)
    outputs = tuple(map(restore, (output, h, c))) if return_state else restore(output)
    return outputs, pullback


def convlstm2d_step(
    x: Any, kernel: Any, recurrent_kernel: Any, bias: Any = None, *, out: Any = None, **options: Any
) -> tuple[Any, Any]:
    """Take one step of a ConvLSTM, for frames that come one at a time.

    Parameters
    ----------
    x : array (B, H, W, C)
        The frame.
    kernel, recurrent_kernel, bias, **options
        As in `convlstm2d`, which also says what ``initial_state=(h, c)``, the states so far, may be.
    out : (h, c), optional
        NumPy arrays (B, HO, WO, F) that receive the new states: writeable, C-contiguous, of the dtype computed in.
        Their memory is their own, but the new c may be the old c itself. Where x and the states are C-contiguous
        arrays of that dtype and the activations have names, the cpu engine then allocates nothing as large as a frame.

    Returns
    -------
    h, c : array (B, HO, WO, F)
        `out` itself where it was given.

    Raises
    ------
    ValueError
        Shapes or options that do not fit together, an `out` that cannot be written as said.
    TypeError
        Complex, object or ragged arrays; arrays on another device; an `out` that is no pair of NumPy arrays.

    Examples
    --------
    >>> import numpy as np
    >>> from fastclstm.functional import convlstm2d_step
    >>> x, kernel, recurrent_kernel = np.ones((1, 4, 4, 1)), np.ones((3, 3, 1, 8)), np.ones((3, 3, 2, 8))
    >>> h, c = convlstm2d_step(x, kernel, recurrent_kernel)
    >>> out = np.empty_like(h), c  # the cell state is replaced where it is
    >>> convlstm2d_step(x, kernel, recurrent_kernel, initial_state=(h, c), out=out)[1] is c
    True
    """
    op = "convlstm2d_step"
    _check_options(op, options, "return_sequences", "return_state")
    _, read = dispatch.choose(op, options.get("engine"), x)
    frames = read("x", x)
    if frames.ndim != 4:
        raise ValueError(f"{op}: x must be (batch, height, width, channels), got {frames.ndim}D {frames.shape}")
    one_step = frames.reshape(frames.shape[0], 1, *frames.shape[1:])
    call = _ConvLSTMCall(one_step, kernel, recurrent_kernel, bias, return_sequences=False, **options)
    if out is not None:
        call.check_out(op, out)
    _, h, c, _ = call.forward(save=False, out=out)
    restore = dispatch.restorer(x)
    return (restore(h), restore(c)) if out is None else (h, c)


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
        In the layout of x. NaN wins its window; of equal values the first in (t, h, w) order does.

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
    call = _PoolCall(x, pool_size, strides, padding, ceil_mode, data_format, engine)
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
    call = _PoolCall(x, pool_size, strides, padding, ceil_mode, data_format, engine)
    y, indices = call.engine.max_pool3d(call.spec, call.x, True)
    shape = call.from_channels_last(y).shape

    def pullback(cotangents: Any) -> Gradients:
        if return_indices:
            _check_structure("max_pool3d", cotangents, "(dy, None)", 2)
        dy = cotangents[0] if return_indices else cotangents
        cotangent = _cotangent("max_pool3d", "dy", np.zeros(shape) if dy is None else dy, shape, y.dtype, call.read)
        dx = call.engine.max_pool3d_backward(call.spec, indices, call.to_channels_last(cotangent))
        return {"x": call.restore(call.from_channels_last(dx))}

    result = call.restore(call.from_channels_last(y))
    return (result, call.restore(call.from_channels_last(indices))) if return_indices else result, pullback


def _conv2d_arguments(
    x: Any, kernel: Any, bias: Any, strides: Any, padding: Any, padding_mode: str, dilation: Any, algorithm: str,
    engine: str | None,
) -> tuple[ModuleType, Reader, ConvSpec, tuple[np.ndarray, np.ndarray, np.ndarray | None]]:  # fmt: skip
    """Validate the arguments of `conv2d`: engine, reader of further arrays, the geometry and native arrays."""
    module, read = dispatch.choose("conv2d", engine, x)
    dispatch.check_algorithm("conv2d", module, algorithm)
    given = {"x": x, "kernel": kernel} | ({} if bias is None else {"bias": bias})
    arrays = {name: read(name, value) for name, value in given.items()}
    spec = ConvSpec.infer(arrays["x"].shape, arrays["kernel"].shape, None if bias is None else arrays["bias"].shape,
                          strides=strides, padding=padding, padding_mode=padding_mode, dilation=dilation)  # fmt: skip
    dtype = dispatch.working_dtype(*arrays.values())
    ready = {name: dispatch.native(array, dtype) for name, array in arrays.items()}
    return module, read, spec, (ready["x"], ready["kernel"], ready.get("bias"))


class _Conv3DCall:
    """One validated call of `conv3d`: its engine, geometry and native arrays."""

    def __init__(
        self, x: Any, kernel: Any, bias: Any, strides: Any, padding: Any, padding_mode: str, dilation: Any,
        algorithm: str, engine: str | None,
    ):  # fmt: skip
        self.engine = dispatch.get_engine(engine)
        dispatch.check_algorithm("conv3d", self.engine, algorithm)
        self.algorithm = algorithm
        given = {"x": x, "kernel": kernel} | ({} if bias is None else {"bias": bias})
        arrays = {name: dispatch.as_numpy("conv3d", name, value) for name, value in given.items()}
        self.spec = Conv3DSpec.infer(
            arrays["x"].shape, arrays["kernel"].shape, None if bias is None else arrays["bias"].shape,
            strides=strides, padding=padding, padding_mode=padding_mode, dilation=dilation,
        )  # fmt: skip
        dtype = dispatch.working_dtype(*arrays.values())
        ready = {name: dispatch.native(array, dtype) for name, array in arrays.items()}
        self.x, self.bias = ready["x"], ready.get("bias")
        self.kernel_shape, frame = ready["kernel"].shape, self.spec.frame
        self.kernel = np.ascontiguousarray(np.moveaxis(ready["kernel"], 0, 2)).reshape(
            frame.KH, frame.KW, frame.C, frame.F
        )

    def forward(self) -> np.ndarray:
        """Return y (B, TO, HO, WO, F)."""
        y = np.empty(self.spec.output_shape, self.x.dtype)
        frames = y.reshape(self.spec.B * self.spec.TO, *y.shape[2:])
        for part in self._chunks():
            gathered = self._gather(part)
            frames[part.start : part.stop] = self.engine.conv2d(
                self.spec.frame.with_batch(len(part)), gathered, self.kernel, self.bias, algorithm=self.algorithm
            )
        return y

    def backward(self, dy: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pull dy back: dx, dkernel, dbias."""
        dx, dkernel = np.zeros_like(self.x), np.zeros_like(self.kernel)
        dbias = np.zeros(self.spec.frame.F, self.x.dtype)
        if dy is not None:
            frames = dy.reshape(self.spec.B * self.spec.TO, *dy.shape[2:])
            for part in self._chunks():
                dgathered, dk, db = self.engine.conv2d_backward(
                    self.spec.frame.with_batch(len(part)), self._gather(part), self.kernel,
                    frames[part.start : part.stop],
                )  # fmt: skip
                dkernel += dk
                dbias += db
                by_tap = dgathered.reshape(*dgathered.shape[:3], self.spec.KT, self.x.shape[-1])
                for row, frame in enumerate(part):
                    b, seen = self.spec.sources(frame)
                    for tap, t in seen:
                        dx[b, t] += by_tap[row, :, :, tap]
        KT, KH, KW, C, F = self.kernel_shape
        dkernel = np.ascontiguousarray(np.moveaxis(dkernel.reshape(KH, KW, KT, C, F), 2, 0))
        return dx, dkernel, dbias

    def _chunks(self) -> Iterator[range]:
        """Yield runs of output frames, counted through B and TO, whose gathered input fits in `GATHERED_BYTES`."""
        frame = self.spec.frame
        count = max(1, GATHERED_BYTES // (frame.H * frame.W * frame.C * self.x.itemsize))
        total = self.spec.B * self.spec.TO
        for start in range(0, total, count):
            yield range(start, min(start + count, total))

    def _gather(self, part: range) -> np.ndarray:
        """Lay the frames that each output frame sees side by side: (len(part), H, W, KT·C)."""
        frame, spec = self.spec.frame, self.spec
        gathered = np.zeros((len(part), frame.H, frame.W, spec.KT, self.x.shape[-1]), self.x.dtype)
        for row, output in enumerate(part):
            b, seen = spec.sources(output)
            for tap, t in seen:
                gathered[row, :, :, tap] = self.x[b, t]
        return gathered.reshape(len(part), frame.H, frame.W, frame.C)


def _check_structure(op: str, cotangents: Any, structure: str, count: int) -> None:
    if not isinstance(cotangents, tuple | list) or len(cotangents) != count:
        raise ValueError(f"{op}: pullback takes the outputs' structure {structure}, got {type(cotangents).__name__}")


def _check_options(op: str, options: Mapping[str, Any], *fixed: str) -> None:
    """Raise TypeError where `options` are not keywords of `convlstm2d`, or among those that `op` fixes."""
    known = set(convlstm2d.__kwdefaults__ or ()).difference(fixed)
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"{op}: unknown option {unknown[0]!r}; the options are {', '.join(sorted(known))}")


def _cotangent(
    op: str, name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype, read: Reader | None = None
) -> np.ndarray | None:
    if value is None:
        return None
    array = dispatch.as_numpy(op, name, value) if read is None else read(name, value)
    expect_shape(op, name, array.shape, shape, "the shape of the output whose gradient it is")
    return dispatch.native(array, dtype)


class _ConvLSTMCall:
    """One validated call of `convlstm2d`: its engine, geometry and native arrays."""

    def __init__(
        self, x: Any, kernel: Any, recurrent_kernel: Any, bias: Any, *, initial_state: Any = None,
        activation: Any = "tanh", recurrent_activation: Any = "sigmoid", output_activation: Any = None,
        peephole: Mapping[str, Any] | None = None, mask: Any = None, normalization: Any = None,
        normalization_weights: Mapping[str, Any] | None = None, dropout_masks: Mapping[str, Any] | None = None,
        algorithm: str = "auto", engine: str | None = None, **geometry: Any,
    ):  # fmt: skip
        op = "convlstm2d"
        self.engine, self.read = dispatch.choose(op, engine, x)
        dispatch.check_algorithm(op, self.engine, algorithm)
        self.algorithm = algorithm
        self.restore = dispatch.restorer(x)
        h, c = _state_pair(op, initial_state)
        optional = {"bias": bias, "h": h, "c": c}
        given = {"x": x, "kernel": kernel, "recurrent_kernel": recurrent_kernel}
        given |= {name: value for name, value in optional.items() if value is not None}
        arrays = {name: self.read(name, value) for name, value in given.items()}
        peepholes = _mapped(op, "peephole", peephole, self.read)
        normalizers = _mapped(op, "normalization_weights", normalization_weights, self.read)
        dropouts = _mapped(op, "dropout_masks", dropout_masks, self.read)
        mask = None if mask is None else self.read("mask", mask)
        shapes = {name: array.shape for name, array in arrays.items()}
        self.spec = ConvLSTMSpec.infer(
            x_shape=shapes["x"],
            kernel_shape=shapes["kernel"],
            recurrent_kernel_shape=shapes["recurrent_kernel"],
            bias_shape=shapes.get("bias"),
            h_shape=shapes.get("h"),
            c_shape=shapes.get("c"),
            peephole_shapes=_shapes(peepholes),
            normalization_shapes=_shapes(normalizers),
            dropout_shapes=_shapes(dropouts),
            normalization=None if normalization is None else normalizations.get(normalization),
            mask_shape=None if mask is None else mask.shape,
            activation=activations.get(activation),
            recurrent_activation=activations.get(recurrent_activation),
            output_activation=activations.get(activation if output_activation is None else output_activation),
            **geometry,
        )
        mappings = peepholes, normalizers, dropouts
        self.dtype = dispatch.working_dtype(
            *arrays.values(), *(a for named in mappings for a in (named or {}).values())
        )
        self.arrays = {name: dispatch.native(array, self.dtype) for name, array in arrays.items()}
        self.peephole, self.normalization, self.dropout = (
            None if named is None else {key: dispatch.native(array, self.dtype) for key, array in named.items()}
            for named in mappings
        )
        self.mask = mask if mask is None or dispatch.on_gpu(mask) else np.ascontiguousarray(mask != 0)

    def forward(self, save: bool | str, out: Any = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any]:
        """Run the engine: output, last h, last c (in `out`) and, with `save`, what its backward pass needs."""
        get, spec, normalization = self.arrays.get, self.spec, self.normalization
        weights = get("kernel"), get("recurrent_kernel"), get("bias")
        given = normalization is not None and any(name.startswith("mean") for name in normalization)
        if given and not save and not dispatch.on_gpu(get("x")):
            weights = self._with_normalization()
            spec, normalization = replace(spec, normalization=None), None
        return self.engine.convlstm2d(
            spec, get("x"), *weights, get("h"), get("c"), self.peephole, self.mask,
            normalization=normalization, dropout=self.dropout, algorithm=self.algorithm, save=save, out=out,
        )  # fmt: skip

    def _with_normalization(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return kernel, recurrent_kernel and bias that do what normalization with given statistics does to z."""
        weights, epsilon = self.normalization or {}, self.spec.normalization.epsilon
        parts = NORMALIZED_PARTS[self.spec.normalization.separate]
        scales = [weights[f"gamma{part}"] / np.sqrt(weights[f"variance{part}"] + epsilon) for part in parts]
        shifts = [weights[f"beta{part}"] - weights[f"mean{part}"] * s for part, s in zip(parts, scales, strict=True)]
        bias = self.arrays.get("bias", np.zeros(4 * self.spec.F, self.dtype))
        if len(parts) == 1:
            bias = bias * scales[0]
        return self.arrays["kernel"] * scales[0], self.arrays["recurrent_kernel"] * scales[-1], sum(shifts, bias)

    def check_out(self, op: str, out: Any) -> None:
        """Raise TypeError or ValueError unless `out` is a pair of arrays that can receive the last h and c."""
        if dispatch.on_gpu(self.arrays["x"]):
            raise TypeError(f"{op}: out is for arrays in the processor's memory, but x is on a GPU; leave it away")
        if not _is_pair(out) or not all(isinstance(array, np.ndarray) for array in out):
            came = f"({', '.join(type(a).__name__ for a in out)})" if _is_pair(out) else type(out).__name__
            raise TypeError(f"{op}: out must be a pair (h, c) of NumPy arrays, got {came}")
        for name, array in zip("hc", out, strict=True):
            what, shape = f"out {name}", self.spec.state_shape
            expect_shape(op, what, array.shape, shape, "(batch, height, width, filters) of the states")
            if array.dtype != self.dtype:
                raise ValueError(f"{op}: {what} has dtype {array.dtype} but the states are {self.dtype}; "
                                 f"make it with np.empty({shape}, np.{self.dtype})")  # fmt: skip
            if not array.flags.carray:
                flaw = "read-only" if not array.flags.writeable else "not contiguous and aligned"
                raise ValueError(f"{op}: {what} is {flaw}; make it with np.empty({shape}, np.{self.dtype})")
        new_h, new_c = out
        read = self.arrays | {f"peephole {name!r}": array for name, array in (self.peephole or {}).items()}
        for name, old in (read | {"out c": new_c}).items():
            if np.may_share_memory(new_h, old):
                raise ValueError(f"{op}: out h overlaps {name}; give it memory of its own")
        for name, old in read.items():
            if np.may_share_memory(new_c, old) and not (name == "c" and new_c.ctypes.data == old.ctypes.data):
                raise ValueError(
                    f"{op}: out c overlaps {name}; give it memory of its own, or exactly that of the old c"
                )


@dataclass(frozen=True)
class ConvLSTMPullback:
    """The function that pulls gradients of the outputs of `convlstm2d` back to its arguments."""

    call: _ConvLSTMCall
    saved: Any
    return_state: bool
    with_bias: bool
    with_state: bool

    def __call__(self, cotangents: Any) -> Gradients:
        call, spec, restore = self.call, self.call.spec, self.call.restore
        if self.return_state:
            _check_structure("convlstm2d", cotangents, "(dy, dh, dc)", 3)
        doutput, dh, dc = cotangents if self.return_state else (cotangents, None, None)
        gradients = call.engine.convlstm2d_backward(
            spec,
            self.saved,
            _cotangent("convlstm2d", "dy", doutput, spec.output_shape, call.dtype, call.read),
            _cotangent("convlstm2d", "dh", dh, spec.state_shape, call.dtype, call.read),
            _cotangent("convlstm2d", "dc", dc, spec.state_shape, call.dtype, call.read),
        )
        result = {name: restore(gradients[name]) for name in ("x", "kernel", "recurrent_kernel")}
        if self.with_bias:
            result["bias"] = restore(gradients["bias"])
        if self.with_state:
            result["initial_state"] = (restore(gradients["h"]), restore(gradients["c"]))
        if call.peephole is not None:
            result["peephole"] = {name: restore(value) for name, value in gradients["peephole"].items()}
        if call.normalization is not None:
            pulled = gradients["normalization"].items()
            learnt = {name: restore(value) for name, value in pulled if name.startswith(("gamma", "beta"))}
            result["normalization_weights"] = learnt
        return result

    @property
    def statistics(self) -> list[dict[str, Any]]:
        """Of each step the mean, the variance and the count of values of "batch" normalization, by name and part."""
        normalization = self.call.spec.normalization
        if normalization is None or normalization.kind != "batch":
            return []
        parts = NORMALIZED_PARTS[normalization.separate]
        return [
            {key: value for part, n in zip(parts, normalized, strict=True) for key, value in (
                (f"mean{part}", n.mean.ravel()), (f"variance{part}", n.variance.ravel()), (f"count{part}", n.count)
            )}
            for *_, normalized in self.saved.steps
        ]  # fmt: skip


def _mapped(op: str, name: str, value: Any, read: Reader) -> dict[str, np.ndarray] | None:
    """Read a mapping from names to arrays."""
    if not isinstance(value, Mapping | None):
        raise TypeError(f"{op}: {name} must be a mapping from names to arrays, got {type(value).__name__}")
    return None if value is None else {k: read(f"{name} {k!r}", array) for k, array in value.items()}


def _shapes(arrays: Mapping[str, np.ndarray] | None) -> dict[str, tuple[int, ...]] | None:
    return None if arrays is None else {name: array.shape for name, array in arrays.items()}


def _state_pair(op: str, initial_state: Any) -> tuple[Any, Any]:
    if initial_state is None:
        return None, None
    if not _is_pair(initial_state):
        raise ValueError(f"{op}: initial_state must be a pair (h, c), got {type(initial_state).__name__}")
    return initial_state[0], initial_state[1]


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


class _PoolCall:
    """One validated call of `max_pool3d`: its engine, geometry and native channels-last array."""

    def __init__(
        self, x: Any, pool_size: Any, strides: Any, padding: Any, ceil_mode: bool, data_format: str, engine: str | None
    ):
        self.engine, self.read = dispatch.choose("max_pool3d", engine, x)
        self.restore = dispatch.restorer(x)
        choice("max_pool3d", "data_format", data_format, DATA_FORMATS)
        self.channels_first = data_format == "channels_first"
        array = self.read("x", x)
        if self.channels_first and dispatch.on_gpu(array):
            raise ValueError("max_pool3d: data_format='channels_first' is not for arrays on a GPU; bring the channels "
                             "to the end before")  # fmt: skip
        if self.channels_first and array.ndim == 5:
            array = np.moveaxis(array, 1, -1)
        self.spec = PoolSpec.infer(array.shape, pool_size, strides, padding=padding, ceil_mode=ceil_mode)
        self.x = dispatch.native(array, dispatch.working_dtype(array))

    def to_channels_last(self, array: np.ndarray | None) -> np.ndarray | None:
        """Bring an array in the caller's layout to the engine's."""
        return np.ascontiguousarray(np.moveaxis(array, 1, -1)) if self.channels_first and array is not None else array

    def from_channels_last(self, array: np.ndarray) -> np.ndarray:
        """Bring an array in the engine's layout to the caller's."""
        return np.ascontiguousarray(np.moveaxis(array, -1, 1)) if self.channels_first else array
