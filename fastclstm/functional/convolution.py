"""conv2d: frames with a kernel."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.functional.arguments import GRADIENTS, Gradients, Reader, asked_for, read_cotangent
from fastclstm.spec import ConvSpec


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
        How the cpu engine computes, gradients too; "direct" forbids the faster transforms, whose rounding differs
        slightly. They fit kernels of any size, stride and dilation, where "auto" takes the cheaper by an estimate, of
        1×1 kernels direct convolution. A sample that a transform would spoil is computed directly in any case: one that
        holds a NaN or an infinity, or fill values among ordinary ones (its largest magnitude is above 256, and 256
        times as large as that of a sixteenth of its values); on the way back, where x, an initial state or a given
        gradient does. Of the cuda engine, how precise products are: "float32" ("auto"), "simt" (without tensor
        cores), "tf32", "bfloat16", "float16".
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
) -> tuple[Any, Callable[..., Gradients]]:
    """Compute `conv2d` and the function that pulls gradients back through it.

    Parameters are those of `conv2d`. They are kept, not copied: arrays must not change before pullback is called.

    Returns
    -------
    y : array (B, HO, WO, F)
    pullback : callable
        ``pullback(dy)``, with dy the gradient of a scalar with respect to y, returns a dict of gradients with the
        keys "x", "kernel" and, if one was given, "bias". With ``input_gradient=False`` there is none of x.
    """
    module, read, spec, arrays = _conv2d_arguments(
        x, kernel, bias, strides, padding, padding_mode, dilation, algorithm, engine
    )
    restore = dispatch.restorer(x)
    y = module.conv2d(spec, *arrays, algorithm=algorithm)

    def pullback(dy: Any, *, input_gradient: bool = True) -> Gradients:
        cotangent = read_cotangent("conv2d", "dy", dy, y.shape, y.dtype, read)
        wanted = asked_for(input_gradient, bias)
        gradients = module.conv2d_backward(spec, *arrays[:2], cotangent, algorithm=algorithm, wanted=wanted)
        return {name: restore(gradients[GRADIENTS.index(name)]) for name in wanted}

    return restore(y), pullback


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
