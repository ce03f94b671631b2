"""Blocks of pixels as channels, and channels as blocks of pixels."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm.layers.array_layer import FrameLayer, Pullback
from fastclstm.spec import DATA_FORMATS, Shape, choice, integers

MODES = ("DCR", "CRD")


@dataclass(eq=False, repr=False)
class _Blocks(FrameLayer):
    """The options of both directions."""

    block_size: Any = 2
    _: KW_ONLY
    mode: str = "DCR"
    data_format: str = "channels_last"

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        self.block_size = integers(op, "block_size", self.block_size, 2, 1)
        choice(op, "mode", self.mode, MODES)
        choice(op, "data_format", self.data_format, DATA_FORMATS)

    def _to_channels(self, x: np.ndarray) -> np.ndarray:
        """Return frames (N, H, W, C) as (N, H/r, W/s, C·r·s)."""
        (r, s), (N, H, W, C) = self.block_size, x.shape
        blocks = x.reshape(N, H // r, r, W // s, s, C)
        order = (0, 1, 3, 2, 4, 5) if self.mode == "DCR" else (0, 1, 3, 5, 2, 4)
        return np.ascontiguousarray(blocks.transpose(order)).reshape(N, H // r, W // s, C * r * s)

    def _to_pixels(self, x: np.ndarray) -> np.ndarray:
        """Return frames (N, H, W, C·r·s) as (N, H·r, W·s, C): what `_to_channels` takes back."""
        (r, s), (N, H, W, channels) = self.block_size, x.shape
        C = channels // (r * s)
        if self.mode == "DCR":
            blocks = x.reshape(N, H, W, r, s, C).transpose(0, 1, 3, 2, 4, 5)
        else:
            blocks = x.reshape(N, H, W, C, r, s).transpose(0, 1, 4, 2, 5, 3)
        return np.ascontiguousarray(blocks).reshape(N, H * r, W * s, C)


@dataclass(eq=False, repr=False)
class SpaceToDepth(_Blocks):
    """Blocks of r·s pixels as channels: (B, H, W, C) to (B, H/r, W/s, C·r·s), or sequences, frame by frame.

    Parameters
    ----------
    block_size : int or (int, int)
        r and s.
    mode : "DCR" or "CRD"
        What pixel (i, j) of a block and channel c become, as ONNX names it. "DCR": channel ``(i·s + j)·C + c``, as
        TensorFlow's space_to_depth and the patches (reshape_patch) of PredRNN and OpenSTL have it. "CRD": channel
        ``(c·r + i)·s + j``, as PyTorch's PixelUnshuffle. With one channel, as Shi's 4×4 patches of Moving MNIST, both
        are the same.
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, H, W) and (B, T, C, H, W).

    Raises
    ------
    ValueError, TypeError
        Options that are none; a height or width that blocks do not fill.

    Examples
    --------
    >>> import numpy as np
    >>> SpaceToDepth(2)(np.arange(4.0).reshape(1, 2, 2, 1))
    array([[[[0., 1., 2., 3.]]]])
    """

    def _frame_shape(self, frame: Shape) -> Shape:
        (r, s), (H, W, C) = self.block_size, frame
        if H % r or W % s:
            raise ValueError(f"{type(self).__name__}: blocks of {r} × {s} pixels do not fill frames of {H} × {W}; pad "
                             f"these before, such as with ZeroPadding2D")  # fmt: skip
        return H // r, W // s, C * r * s

    def _frames(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        return self._to_channels(x), self._to_pixels


@dataclass(eq=False, repr=False)
class DepthToSpace(_Blocks):
    """Channels as blocks of r·s pixels: (B, H, W, C·r·s) to (B, H·r, W·s, C), or sequences, frame by frame.

    What `SpaceToDepth` of the same options takes back.

    Parameters
    ----------
    block_size, mode, data_format
        As in `SpaceToDepth`; "DCR" is TensorFlow's depth_to_space, "CRD" PyTorch's PixelShuffle.

    Raises
    ------
    ValueError, TypeError
        Options that are none; channels that do not fill blocks.

    References
    ----------
    Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural
    Network", CVPR 2016.

    Examples
    --------
    >>> import numpy as np
    >>> DepthToSpace(2)(np.arange(4.0).reshape(1, 1, 1, 4))[0, :, :, 0]
    array([[0., 1.],
           [2., 3.]])
    """

    def _frame_shape(self, frame: Shape) -> Shape:
        (r, s), (H, W, C) = self.block_size, frame
        if C % (r * s):
            raise ValueError(
                f"{type(self).__name__}: x has {C} channels, which blocks of {r} × {s} pixels do not divide"
            )
        return H * r, W * s, C // (r * s)

    def _frames(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        return self._to_pixels(x), self._to_channels


@dataclass(eq=False, repr=False)
class PixelShuffle(DepthToSpace):
    """`DepthToSpace` in PyTorch's order of channels: the same with ``mode="CRD"``.

    Examples
    --------
    >>> import numpy as np
    >>> PixelShuffle(2)(np.arange(8.0).reshape(1, 1, 1, 8))[0, 0, 0]
    array([0., 4.])
    """

    _: KW_ONLY
    mode: str = "CRD"


@dataclass(eq=False, repr=False)
class PixelUnshuffle(SpaceToDepth):
    """`SpaceToDepth` in PyTorch's order of channels: the same with ``mode="CRD"``.

    Examples
    --------
    >>> import numpy as np
    >>> PixelUnshuffle(2)(np.arange(8.0).reshape(1, 2, 2, 2))
    array([[[[0., 2., 4., 6., 1., 3., 5., 7.]]]])
    """

    _: KW_ONLY
    mode: str = "CRD"
