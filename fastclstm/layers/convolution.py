"""Convolutions of frames and of volumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np

from fastclstm import dispatch, functional
from fastclstm.functional.grouped import grouped_vjp
from fastclstm.layers.activation import activate, check_activation, gpu_knows
from fastclstm.layers.array_layer import ArrayLayer, FrameLayer, Pullback
from fastclstm.layers.base import Parameter, layer_dtype
from fastclstm.spec import DATA_FORMATS, UNKNOWN, Conv3DSpec, ConvSpec, Shape, choice, flag, integers


@dataclass(eq=False, repr=False)
class Convolution(ArrayLayer):
    """The options of all convolutions of a kernel with all channels."""

    in_channels: int
    out_channels: int
    kernel_size: Any
    padding: Any = "same"
    stride: Any = 1
    _: KW_ONLY
    dilation: Any = 1
    use_bias: bool = True
    activation: Any = "linear"
    kernel_initializer: Any = "glorot_uniform"
    bias_initializer: Any = "zeros"
    kernel_regularizer: Any = None
    bias_regularizer: Any = None
    kernel_constraint: Any = None
    bias_constraint: Any = None
    data_format: str = "channels_last"
    dtype: Any = "float32"
    seed: int | np.random.Generator | None = None
    engine: str | None = None
    algorithm: str = "auto"

    kernel = Parameter()
    bias = Parameter()
    _rank: ClassVar[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        (self.in_channels,) = integers(op, "in_channels", self.in_channels, 1, 1)
        (self.out_channels,) = integers(op, "out_channels", self.out_channels, 1, 1)
        self.kernel_size = integers(op, "kernel_size", self.kernel_size, self._rank, 1)
        integers(op, "dilation", self.dilation, self._rank, 1)
        flag(op, "use_bias", self.use_bias)
        self.dtype = layer_dtype(op, self.dtype)
        choice(op, "data_format", self.data_format, DATA_FORMATS)
        check_activation(op, self.activation)
        dispatch.check_engine(self.engine)
        choice(op, "algorithm", self.algorithm, dispatch.algorithms(self.engine))
        rng = np.random.default_rng(self.seed)
        self._add_parameter("kernel", self._kernel_shape(), self.kernel_initializer, rng, self.dtype,
                            regularizer=self.kernel_regularizer, constraint=self.kernel_constraint)  # fmt: skip
        if self.use_bias:
            self._add_parameter("bias", (self.out_channels,), self.bias_initializer, rng, self.dtype,
                                regularizer=self.bias_regularizer, constraint=self.bias_constraint)  # fmt: skip
        self._geometry((1, *(self._rank * [UNKNOWN]), self.in_channels))  # wrong options are errors now, not later

    def _kernel_shape(self) -> Shape:
        raise NotImplementedError

    def _geometry(self, shape: Shape) -> Any:
        """Return the geometry for a channels-last shape; raise ValueError where that does not fit."""
        raise NotImplementedError

    def _convolution(self, x: Any) -> tuple[Any, Callable[..., Any]]:
        """Return what `functional` makes of a channels-last x, and its pullback."""
        raise NotImplementedError

    def _knows_gpu(self, training: bool) -> bool:
        return gpu_knows(self.activation)

    def _convolve(self, x: np.ndarray) -> tuple[np.ndarray, Pullback]:
        """Return the layer's output for a channels-last x, and its pullback."""
        z, pull_convolution = self._convolution(x)
        y, pull = activate(self.activation, z)

        def pullback(dy: np.ndarray) -> np.ndarray | None:
            gradients = pull_convolution(pull(dy), input_gradient=self.input_gradient)
            self._keep_gradients(gradients)
            return gradients.get("x")

        return y, pullback


@dataclass(eq=False, repr=False)
class _Grouped(Convolution):
    """Of those not transposed: what the padding holds, and groups of channels that do not see each other."""

    _: KW_ONLY
    padding_mode: str = "zeros"
    groups: int = 1

    _infer: ClassVar[Callable[..., Any]]
    """`infer` of the geometry's class."""
    _vjp: ClassVar[Callable[..., Any]]

    def __post_init__(self) -> None:
        op = type(self).__name__
        (self.groups,) = integers(op, "groups", self.groups, 1, 1)
        for name in ("in_channels", "out_channels"):
            (count,) = integers(op, name, getattr(self, name), 1, 1)
            if count % self.groups:
                raise ValueError(f"{op}: {name} ({count}) must be a multiple of groups ({self.groups})")
        super().__post_init__()

    def _kernel_shape(self) -> Shape:
        return (*self.kernel_size, self.in_channels // self.groups, self.out_channels)

    def _geometry(self, shape: Shape) -> Any:
        kernel = (*self.kernel_size, self.in_channels, self.out_channels)
        return self._infer(shape, kernel, strides=self.stride, padding=self.padding, padding_mode=self.padding_mode,
                           dilation=self.dilation, op=type(self).__name__)  # fmt: skip

    def _convolution(self, x: Any) -> tuple[Any, Callable[..., Any]]:
        return grouped_vjp(
            self._vjp, x, self.kernel, self.bias, groups=self.groups, strides=self.stride, padding=self.padding,
            padding_mode=self.padding_mode, dilation=self.dilation, algorithm=self.algorithm, engine=self.engine,
        )  # fmt: skip


@dataclass(eq=False, repr=False)
class Conv2D(FrameLayer, _Grouped):
    """2D convolution of frames: (B, H, W, C) to (B, HO, WO, F), or of sequences of them, frame by frame.

    All numbers are those of `fastclstm.functional.conv2d`.

    Parameters
    ----------
    in_channels, out_channels : int
        C and F.
    kernel_size : int or (KH, KW)
    padding : "same", "valid", int, (int, int) or ((top, bottom), (left, right))
        "same" keeps ``ceil(H / stride)``.
    stride, dilation : int or (int, int)
        At most one of them above 1.
    padding_mode : "zeros" or "circular"
        What the padding holds.
    groups : int
        Divisor of C and F: the first F / groups filters see the first C / groups channels alone, and so on.
    use_bias : bool
    activation : str or pair of functions (forward, derivative)
        A name of `fastclstm.nn.activations`, or "softmax", over the channels.
    kernel_initializer, bias_initializer : str or function
        As `fastclstm.nn.initializers.get` takes them.
    kernel_regularizer, bias_regularizer, kernel_constraint, bias_constraint : optional
        As `fastclstm.nn.regularizers.get` and `fastclstm.nn.constraints.get` take them.
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, H, W) and (B, T, C, H, W).
    dtype : "float32" or "float64"
        Of parameters and results; inputs are converted to it.
    seed : int or numpy.random.Generator, optional
        The same seed gives the same parameters.
    engine : str, optional
        "cpu" (the default), "cuda" or "reference"; may be changed later. None: where x is.
    algorithm : str
        "auto", "direct" or "winograd": how the cpu engine convolves; with engine="cuda" those of
        `fastclstm.functional.conv2d`. May be changed later.

    Attributes
    ----------
    kernel : array (KH, KW, C / groups, F)
    bias : array (F,) or None

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> layer = Conv2D(3, 8, 3, activation="relu", seed=0, engine="reference")
    >>> layer(np.zeros((2, 16, 16, 3))).shape, layer(np.zeros((2, 5, 16, 16, 3))).shape
    ((2, 16, 16, 8), (2, 5, 16, 16, 8))
    """

    _rank = 2
    _infer = ConvSpec.infer
    _vjp = staticmethod(functional.conv2d_vjp)

    def _frame_shape(self, frame: Shape) -> Shape:
        geometry = self._geometry((1, *frame))
        return geometry.HO, geometry.WO, self.out_channels

    def _frames(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        return self._convolve(x)


@dataclass(eq=False, repr=False)
class Conv3D(_Grouped):
    """3D convolution over time, height and width: (B, T, H, W, C) to (B, TO, HO, WO, F).

    All numbers are those of `fastclstm.functional.conv3d`.

    Parameters
    ----------
    in_channels, out_channels : int
        C and F.
    kernel_size : int or (KT, KH, KW)
    padding : "same", "valid", int, three ints or three pairs (before, after)
        "same" keeps ``ceil(T / stride)``, likewise of height and width.
    stride, dilation : int or (int, int, int)
        At most one of them above 1.
    data_format : "channels_last" or "channels_first"
        The latter: volumes (B, C, T, H, W) to (B, F, TO, HO, WO), other than layers of frames, whose sequences are
        (B, T, C, H, W).
    padding_mode, groups, use_bias, activation, kernel_initializer, bias_initializer, kernel_regularizer, \
bias_regularizer, kernel_constraint, bias_constraint, dtype, seed, engine, algorithm
        As in `Conv2D`.

    Attributes
    ----------
    kernel : array (KT, KH, KW, C / groups, F)
    bias : array (F,) or None

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> layer = Conv3D(4, 1, 3, activation="sigmoid", seed=0, engine="reference")
    >>> layer(np.zeros((2, 5, 16, 16, 4))).shape
    (2, 5, 16, 16, 1)
    """

    _rank = 3
    _infer = Conv3DSpec.infer
    _vjp = staticmethod(functional.conv3d_vjp)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return the shape of the output for an x of `input_shape`; raise ValueError where that does not fit."""
        if len(input_shape) != 5:
            volume, first = "time, height, width", self.data_format == "channels_first"
            axes = f"channels, {volume}" if first else f"{volume}, channels"
            raise ValueError(f"Conv3D: x must be (batch, {axes}), got {len(input_shape)}D {tuple(input_shape)}")
        if self.data_format == "channels_last":
            return self._geometry(tuple(input_shape)).output_shape
        B, C, *volume_shape = input_shape
        if self.in_channels != C:
            raise ValueError(
                f"Conv3D: x must be (batch, {self.in_channels}, time, height, width), as in_channels and "
                f"data_format='channels_first' say, got {tuple(input_shape)}; of sequences of frames (batch, time, "
                f"channels, height, width) np.swapaxes(x, 1, 2) makes such volumes"
            )
        _, *sizes, F = self._geometry((B, *volume_shape, C)).output_shape
        return B, F, *sizes

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        if self.data_format == "channels_last":
            return self._convolve(x)
        y, pull = self._convolve(np.moveaxis(x, 1, -1))

        def first(array: np.ndarray) -> np.ndarray:
            return dispatch.contiguous(np.moveaxis(array, -1, 1))

        def pullback(dy: np.ndarray) -> np.ndarray | None:
            dx = pull(np.moveaxis(dy, 1, -1))
            return None if dx is None else first(dx)

        return first(y), pullback
