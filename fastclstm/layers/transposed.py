"""Transposed convolutions of frames and of volumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm import functional
from fastclstm.layers.array_layer import FrameLayer, Pullback, VolumeLayer
from fastclstm.layers.convolution import Convolution
from fastclstm.spec import Shape, transposed


@dataclass(eq=False, repr=False)
class _Transposed(FrameLayer, Convolution):
    """The options of both."""

    _: KW_ONLY
    output_padding: Any = None

    def _kernel_shape(self) -> Shape:
        return (*self.kernel_size, self.out_channels, self.in_channels)

    def _geometry(self, shape: Shape) -> Any:
        return transposed(type(self).__name__, shape, self._kernel_shape(), strides=self.stride, padding=self.padding,
                          output_padding=self.output_padding, dilation=self.dilation)  # fmt: skip

    def _frame_shape(self, frame: Shape) -> Shape:
        spec = self._geometry((1, *frame))
        return (spec.H, spec.W, spec.C) if self._rank == 2 else (spec.T, spec.frame.H, spec.frame.W, self.out_channels)

    def _convolution(self, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        vjp = functional.conv2d_transpose_vjp if self._rank == 2 else functional.conv3d_transpose_vjp
        return vjp(x, self.kernel, self.bias, strides=self.stride, padding=self.padding,
                   output_padding=self.output_padding, dilation=self.dilation, algorithm=self.algorithm,
                   engine=self.engine)  # fmt: skip

    def _frames(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        return self._convolve(x)


@dataclass(eq=False, repr=False)
class Conv2DTranspose(_Transposed):
    """Transposed 2D convolution: frames (B, H, W, C) to larger ones (B, HO, WO, F), or sequences, frame by frame.

    All numbers are those of `fastclstm.functional.conv2d_transpose`. PyTorch's ConvTranspose2d has ``padding=0``, and a
    weight (C, F, KH, KW): ``kernel = weight.permute(2, 3, 1, 0)``.

    Parameters
    ----------
    in_channels, out_channels : int
        C and F.
    kernel_size : int or (KH, KW)
    padding : "same", "valid", int, (int, int) or ((top, bottom), (left, right))
        What is cropped: "same" makes ``H · stride``, numbers are PyTorch's; see `conv2d_transpose`.
    stride, dilation : int or (int, int)
        At most one of them above 1.
    output_padding : int or (int, int), optional
        Rows and columns more at the bottom and on the right, fewer than the stride.
    use_bias, activation, kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer, \
kernel_constraint, bias_constraint, data_format, dtype, seed, engine, algorithm
        As in `Conv2D`.

    Attributes
    ----------
    kernel : array (KH, KW, F, C)
    bias : array (F,) or None

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> layer = Conv2DTranspose(8, 4, 3, stride=2, seed=0, engine="reference")
    >>> layer(np.zeros((2, 5, 16, 16, 8))).shape
    (2, 5, 32, 32, 4)
    """

    _rank = 2


@dataclass(eq=False, repr=False)
class Conv3DTranspose(VolumeLayer, _Transposed):
    """Transposed 3D convolution over time, height and width: (B, T, H, W, C) to (B, TO, HO, WO, F).

    All numbers are those of `fastclstm.functional.conv3d_transpose`.

    Parameters
    ----------
    in_channels, out_channels : int
        C and F.
    kernel_size : int or (KT, KH, KW)
    padding : "same", "valid", int, three ints or three pairs (before, after)
        What is cropped, as in `Conv2DTranspose`.
    stride, dilation, output_padding : int or (int, int, int)
        As in `Conv2DTranspose`, time first.
    data_format : "channels_last" or "channels_first"
        The latter: volumes (B, C, T, H, W) to (B, F, TO, HO, WO), other than layers of frames, whose sequences are
        (B, T, C, H, W).
    use_bias, activation, kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer, \
kernel_constraint, bias_constraint, dtype, seed, engine, algorithm
        As in `Conv2D`.

    Attributes
    ----------
    kernel : array (KT, KH, KW, F, C)
    bias : array (F,) or None

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> layer = Conv3DTranspose(4, 1, 3, stride=(1, 2, 2), seed=0, engine="reference")
    >>> layer(np.zeros((2, 5, 8, 8, 4))).shape
    (2, 5, 16, 16, 1)
    """

    _rank = 3
