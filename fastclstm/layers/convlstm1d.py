"""ConvLSTM1D: ConvLSTM layers over sequences of rows, which are frames of height 1 to a ConvLSTM2D."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastclstm.layers.convlstm2d import ConvLSTM2D
from fastclstm.spec import Shape, integers

_SIZES = ("kernel_size", "recurrent_kernel_size", "stride", "dilation", "recurrent_dilation", "peephole_size",
          "frame_size")  # fmt: skip


@dataclass(eq=False, repr=False)
class ConvLSTM1D(ConvLSTM2D):
    """ConvLSTM layers, one on the other, over sequences of rows, as Keras's ConvLSTM1D.

    ``layer(x)`` takes x (B, T, W, C) and returns the last layer's hidden sequence (B, T, WO, F). It is a `ConvLSTM2D`
    of frames of height 1, by the same kernels, and has all of its options.

    Parameters
    ----------
    kernel_size, recurrent_kernel_size : int, tuple (K,), or list
        A list has one item a layer.
    padding : "same", "valid", int, or ((left, right),)
    stride, dilation, recurrent_dilation, peephole_size, frame_size : int or (int,)
        The last is W.
    data_format : "channels_last" or "channels_first"
        The latter: x (B, T, C, W), output (B, T, F, WO), states (B, F, WO).
    **options
        All others as in `ConvLSTM2D`.

    Attributes
    ----------
    cells : tuple of ConvLSTM2DCell
        The layers' parameters, as of frames of height 1: kernel (1, K, C, 4F).

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> layer = ConvLSTM1D(2, 8, 5, seed=0, engine="reference")
    >>> layer(np.zeros((4, 10, 30, 2))).shape
    (4, 10, 30, 8)
    """

    _rank: ClassVar[int] = 1

    def _cell_options(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        told = dict(options)
        for name in _SIZES:
            if told.get(name) is not None:
                told[name] = (1, *integers(type(self).__name__, name, told[name], 1, 1))
        told["padding"] = _padding_of_frames(type(self).__name__, told["padding"])
        return told


def _padding_of_frames(op: str, padding: Any) -> Any:
    """Return the padding of frames of height 1."""
    if isinstance(padding, str):
        return padding
    items = padding if isinstance(padding, list | tuple) else [padding]
    if len(items) != 1:
        raise ValueError(f"{op}: padding must be 'same', 'valid', an integer or ((left, right),), got {padding!r}")
    pair: Shape = integers(op, "padding of the width", items[0], 2, 0)
    return (0, 0), pair
