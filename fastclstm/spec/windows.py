"""Windows over axes: what they are padded by, how many there are, and what a padded frame may cost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastclstm.spec.options import Pair, Shape, choice, integers

UNKNOWN = 2**30
"""Height and width for frames that are not known yet: so large that no option is too large for them."""

LARGEST_PADDED, MOST_PADDING = 2**24, 16
"""Values beyond which a padded frame may be only so many times as large as the frame and the kernel themselves."""


def axis_names(count: int, first: str = "time") -> tuple[str, ...]:
    """Return the names of the last two axes of frames, or with `first` of three axes."""
    return (first, "height", "width")[-count:]


def window_padding(
    op: str, padding: Any, size: Shape, window: Shape, strides: Shape, *, maximum: Shape | None = None,
    first: str = "time",
) -> tuple[Pair, ...]:  # fmt: skip
    """Return the padding (before, after) of each axis; `window` is the dilated extent of the kernel.

    first: what errors call the first of three axes.
    """
    count = len(size)
    axes = axis_names(count, first)
    if isinstance(padding, str):
        choice(op, "padding", padding, ("same", "valid"))
        if padding == "valid":
            return ((0, 0),) * count
        pads = []
        for n, k, s in zip(size, window, strides, strict=True):
            total = max((-(-n // s) - 1) * s + k - n, 0)
            pads.append((total // 2, total - total // 2))
        return tuple(pads)
    items = list(padding) if np.iterable(padding) else [padding] * count
    if len(items) == count:
        pairs = tuple(integers(op, f"padding of the {axis}", item, 2, 0)
                      for axis, item in zip(axes, items, strict=True))  # fmt: skip
        for axis, (before, after), limit in zip(axes, pairs, maximum or (None,) * count, strict=True):
            if limit is not None and max(before, after) >= limit:
                raise ValueError(
                    f"{op}: padding ({before}, {after}) of the {axis} must be smaller than the window ({limit}), "
                    f"or a window would hold nothing but padding"
                )
        return tuple((before, after) for before, after in pairs)
    raise ValueError(
        f"{op}: padding must be 'same', 'valid', an integer, {count} integers or {count} pairs (before, after), "
        f"got {padding!r}"
    )


def outputs(
    op: str, size: Shape, window: Shape, strides: Shape, pads: tuple[Pair, ...], *, ceil: bool = False,
    first: str = "time",
) -> Shape:  # fmt: skip
    """Return the output size of each axis, or raise ValueError where a window does not fit the padded input."""
    result = []
    for axis, n, k, s, (before, after) in zip(axis_names(len(size), first), size, window, strides, pads, strict=True):
        room = n + before + after - k
        count = room // s + 1
        if ceil and room % s and count * s < n + before:  # the last, partial window starts inside the input
            count += 1
        if n < 1 or count < 1:
            raise ValueError(
                f"{op}: a window of {k} does not fit the {axis} of {n} padded by ({before}, {after}); "
                f"give larger frames, a smaller window or dilation, or padding='same'"
            )
        result.append(count)
    return tuple(result)


def check_padded(op: str, size: Shape, kernel: Shape, dilation: Shape, pads: tuple[Pair, ...], values: int) -> None:
    """Raise ValueError where a padded frame of `values` a pixel takes far more memory than what it is made of."""
    if not all(isinstance(n, int) for n in size):  # PyTorch traces, for sizes that it does not bind
        return
    padded = tuple(n + before + after for n, (before, after) in zip(size, pads, strict=True))
    count = math.prod(padded) * values
    if count > LARGEST_PADDED and count > MOST_PADDING * values * (math.prod(size) + math.prod(kernel)):
        frame, larger = (" × ".join(map(str, sizes)) for sizes in (size, padded))
        raise ValueError(
            f"{op}: frames of {frame} pixels would be padded to {larger} pixels, {count:.1e} values each (dilation "
            f"{dilation}); give larger frames, or less padding or dilation"
        )
