"""Convolutions of every channel by itself, alone and with one over all channels behind."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm import dispatch, functional
from fastclstm.functional.grouped import depthwise_vjp
from fastclstm.layers.activation import activate, check_activation
from fastclstm.layers.array_layer import FrameLayer, Pullback
from fastclstm.layers.base import Parameter, layer_dtype
from fastclstm.spec import DATA_FORMATS, UNKNOWN, ConvSpec, Shape, choice, flag, integers


@dataclass(eq=False, repr=False)
class _Depthwise(FrameLayer):
    """What both do first: each channel is convolved with `depth_multiplier` filters of its own."""

    depthwise_kernel = Parameter()
    bias = Parameter()

    def _build(self, rng: np.random.Generator) -> None:
        """Check the options that both have, and draw the kernel."""
        op = type(self).__name__
        options: Any = self
        for name in ("in_channels", "depth_multiplier"):
            setattr(self, name, integers(op, name, self.options[name], 1, 1)[0])
        options.kernel_size = integers(op, "kernel_size", options.kernel_size, 2, 1)
        flag(op, "use_bias", options.use_bias)
        options.dtype = layer_dtype(op, options.dtype)
        choice(op, "data_format", options.data_format, DATA_FORMATS)
        check_activation(op, options.activation)
        self._add("depthwise_kernel", (*options.kernel_size, options.in_channels, options.depth_multiplier), rng)
        self._geometry((UNKNOWN, UNKNOWN, options.in_channels))  # wrong options are errors now, not later

    def _add(self, name: str, shape: Shape, rng: np.random.Generator) -> None:
        """Draw a parameter as the options of its name say."""
        prefix = name.removesuffix("_kernel")
        said = {key: self.options[f"{prefix}_{key}"] for key in ("initializer", "regularizer", "constraint")}
        self._add_parameter(name, shape, said["initializer"], rng, self.options["dtype"],
                            regularizer=said["regularizer"], constraint=said["constraint"])  # fmt: skip

    def _geometry(self, frame: Shape) -> ConvSpec:
        op, options = type(self).__name__, self.options
        kernel = (*options["kernel_size"], options["in_channels"], 1)
        return ConvSpec.infer((1, *frame), kernel, strides=options["stride"], padding=options["padding"],
                              dilation=options["dilation"], op=op)  # fmt: skip

    def _frame_shape(self, frame: Shape) -> Shape:
        spec = self._geometry(frame)
        return spec.HO, spec.WO, self._filters

    @property
    def _filters(self) -> int:
        return self.options["in_channels"] * self.options["depth_multiplier"]

    def _frames(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        y, pull_depthwise = depthwise_vjp(self._geometry(x.shape[1:]), x, self.depthwise_kernel)
        z, pull_rest = self._rest(y)
        y, pull = activate(self.options["activation"], z)

        def pullback(dy: np.ndarray) -> np.ndarray:
            before, gradients = pull_rest(pull(dy))
            dx, dkernel = pull_depthwise(before)
            self._keep_gradients({"depthwise_kernel": dkernel} | gradients)
            return dx

        return y, pullback

    def _rest(self, y: np.ndarray) -> tuple[np.ndarray, Any]:
        """Return the pre-activations, and what takes their gradient to that of y and to those of the parameters."""
        raise NotImplementedError


@dataclass(eq=False, repr=False)
class DepthwiseConv2D(_Depthwise):
    """2D convolution of each channel by itself: (B, H, W, C) to (B, HO, WO, C·M), or sequences, frame by frame.

    In NumPy. Output channel ``c·M + m`` is that of filter m of channel c, as in Keras, and in PyTorch with groups=C.

    Parameters
    ----------
    in_channels : int
        C.
    kernel_size : int or (KH, KW)
    padding : "same", "valid", int, (int, int) or ((top, bottom), (left, right))
    stride, dilation : int or (int, int)
        At most one of them above 1.
    depth_multiplier : int
        M, the filters of a channel.
    use_bias, activation, bias_initializer, bias_regularizer, bias_constraint, data_format, dtype, seed
        As in `Conv2D`.
    depthwise_initializer, depthwise_regularizer, depthwise_constraint
        As those of the kernel in `Conv2D`.

    Attributes
    ----------
    depthwise_kernel : array (KH, KW, C, M)
    bias : array (C·M,) or None

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> DepthwiseConv2D(3, 3, depth_multiplier=2, seed=0)(np.zeros((1, 8, 8, 3))).shape
    (1, 8, 8, 6)
    """

    in_channels: int
    kernel_size: Any
    padding: Any = "same"
    stride: Any = 1
    _: KW_ONLY
    dilation: Any = 1
    depth_multiplier: int = 1
    use_bias: bool = True
    activation: Any = "linear"
    depthwise_initializer: Any = "glorot_uniform"
    bias_initializer: Any = "zeros"
    depthwise_regularizer: Any = None
    bias_regularizer: Any = None
    depthwise_constraint: Any = None
    bias_constraint: Any = None
    data_format: str = "channels_last"
    dtype: Any = "float32"
    seed: int | np.random.Generator | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        rng = np.random.default_rng(self.seed)
        self._build(rng)
        if self.use_bias:
            self._add("bias", (self._filters,), rng)

    def _rest(self, y: np.ndarray) -> tuple[np.ndarray, Any]:
        if self.use_bias:
            y = y + self.bias
        return y, lambda dz: (dz, {"bias": _sum(dz)} if self.use_bias else {})


@dataclass(eq=False, repr=False)
class SeparableConv2D(_Depthwise):
    """A 2D convolution of each channel by itself, then one of 1×1 over all: (B, H, W, C) to (B, HO, WO, F).

    The first in NumPy, as `DepthwiseConv2D` without bias, the second by `fastclstm.functional.conv2d`.

    Parameters
    ----------
    in_channels, out_channels : int
        C and F.
    kernel_size, padding, stride, dilation, depth_multiplier
        As in `DepthwiseConv2D`.
    use_bias, activation, bias_initializer, bias_regularizer, bias_constraint, data_format, dtype, seed, engine, \
algorithm
        As in `Conv2D`.
    depthwise_initializer, pointwise_initializer, depthwise_regularizer, \
pointwise_regularizer, depthwise_constraint, pointwise_constraint
        As those of the kernel in `Conv2D`.

    Attributes
    ----------
    depthwise_kernel : array (KH, KW, C, M)
    pointwise_kernel : array (1, 1, C·M, F)
    bias : array (F,) or None

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    References
    ----------
    Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", CVPR 2017.

    Examples
    --------
    >>> import numpy as np
    >>> SeparableConv2D(3, 8, 3, stride=2, seed=0, engine="reference")(np.zeros((1, 8, 8, 3))).shape
    (1, 4, 4, 8)
    """

    in_channels: int
    out_channels: int
    kernel_size: Any
    padding: Any = "same"
    stride: Any = 1
    _: KW_ONLY
    dilation: Any = 1
    depth_multiplier: int = 1
    use_bias: bool = True
    activation: Any = "linear"
    depthwise_initializer: Any = "glorot_uniform"
    pointwise_initializer: Any = "glorot_uniform"
    bias_initializer: Any = "zeros"
    depthwise_regularizer: Any = None
    pointwise_regularizer: Any = None
    bias_regularizer: Any = None
    depthwise_constraint: Any = None
    pointwise_constraint: Any = None
    bias_constraint: Any = None
    data_format: str = "channels_last"
    dtype: Any = "float32"
    seed: int | np.random.Generator | None = None
    engine: str | None = None
    algorithm: str = "auto"

    pointwise_kernel = Parameter()

    def __post_init__(self) -> None:
        super().__post_init__()
        op, rng = "SeparableConv2D", np.random.default_rng(self.seed)
        (self.out_channels,) = integers(op, "out_channels", self.out_channels, 1, 1)
        dispatch.check_engine(self.engine)
        choice(op, "algorithm", self.algorithm, dispatch.algorithms(self.engine))
        self._build(rng)
        self._add("pointwise_kernel", (1, 1, self.in_channels * self.depth_multiplier, self.out_channels), rng)
        if self.use_bias:
            self._add("bias", (self.out_channels,), rng)

    @property
    def _filters(self) -> int:
        return self.out_channels

    def _rest(self, y: np.ndarray) -> tuple[np.ndarray, Any]:
        z, pull = functional.conv2d_vjp(
            y, self.pointwise_kernel, self.bias, algorithm=self.algorithm, engine=self.engine
        )

        def pullback(dz: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
            gradients = pull(dz)
            before = gradients.pop("x")
            return before, {"pointwise_kernel": gradients.pop("kernel")} | gradients

        return z, pullback


def _sum(dz: np.ndarray) -> np.ndarray:
    """Sum over all but the channels in double precision, rounded once."""
    return dz.sum((0, 1, 2), dtype=np.result_type(dz, np.float64)).astype(dz.dtype)
