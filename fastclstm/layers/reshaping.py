"""Other shapes for the same values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.array_layer import ArrayLayer, Pullback
from fastclstm.spec import Shape, integers


@dataclass(eq=False, repr=False)
class Reshape(ArrayLayer):
    """The values of each sample in other axes, in C order: (B, …) to ``(B, *target_shape)``; a view if possible.

    Parameters
    ----------
    target_shape : int or tuple of int
        Without the batch; one of them may be -1, which is what is left.

    Raises
    ------
    ValueError, TypeError
        A shape that is none, or that x's values do not fill.

    Examples
    --------
    >>> import numpy as np
    >>> Reshape((-1, 4, 2))(np.zeros((3, 16))).shape
    (3, 2, 4, 2)
    """

    target_shape: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.target_shape) if isinstance(self.target_shape, tuple) else 1
        self.target_shape = integers("Reshape", "target_shape's sizes", self.target_shape, count, -1) if count else ()
        if self.target_shape.count(-1) > 1 or 0 in self.target_shape:
            raise ValueError(f"Reshape: target_shape must hold sizes >= 1 and at most one -1, got {self.target_shape}")

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return ``(B, *target_shape)`` for an x of `input_shape` (B, …); raise ValueError where that does not fit."""
        if not input_shape:
            raise ValueError("Reshape: x must have a batch axis, got a number")
        values, known = math.prod(input_shape[1:]), math.prod(n for n in self.target_shape if n != -1)
        if values % known if -1 in self.target_shape else values != known:
            raise ValueError(f"Reshape: the {values} values of a sample of x, {tuple(input_shape)}, do not fill "
                             f"target_shape {self.target_shape}")  # fmt: skip
        return (input_shape[0], *(values // known if n == -1 else n for n in self.target_shape))

    def _knows_gpu(self, training: bool) -> bool:
        return True

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        return x.reshape(self.output_shape(x.shape)), lambda dy: dy.reshape(x.shape)


@dataclass(eq=False, repr=False)
class Permute(ArrayLayer):
    """The axes of each sample in another order: Permute((3, 1, 2)) takes frames (B, H, W, C) to (B, C, H, W).

    Parameters
    ----------
    dims : tuple of int
        Numbers of x's axes in the order of the output's, counted from 1, behind the batch, as Keras does.

    Raises
    ------
    ValueError, TypeError
        Anything but 1 to n in some order; an x of another number of axes.

    Examples
    --------
    >>> import numpy as np
    >>> Permute((2, 1))(np.zeros((1, 4, 3))).shape
    (1, 3, 4)
    """

    dims: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.dims) if isinstance(self.dims, tuple) else 1
        self.dims = integers("Permute", "dims", self.dims, max(count, 1), 1)
        if sorted(self.dims) != list(range(1, count + 1)):
            raise ValueError(f"Permute: dims must be the numbers 1 to {count} in some order, got {self.dims}")

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return the shape of the output for an x of `input_shape`; raise ValueError where that does not fit."""
        if len(input_shape) != len(self.dims) + 1:
            raise ValueError(f"Permute: x must have {len(self.dims)} axes behind the batch, as dims {self.dims} says, "
                             f"got shape {tuple(input_shape)}")  # fmt: skip
        return (input_shape[0], *(input_shape[axis] for axis in self.dims))

    def _knows_gpu(self, training: bool) -> bool:
        return True

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        order = (0, *self.dims)
        back = np.argsort(order).tolist()
        return dispatch.contiguous(x.transpose(*order)), lambda dy: dispatch.contiguous(dy.transpose(*back))


@dataclass(eq=False, repr=False)
class RepeatVector(ArrayLayer):
    """Each sample n times, one after the other in time: (B, …) to (B, n, …).

    Keras's takes vectors (B, N) alone; frames (B, H, W, C) become sequences (B, n, H, W, C), as an encoder's last state
    for a decoder.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    ValueError, TypeError
        Anything else.

    Examples
    --------
    >>> RepeatVector(2)([[1.0, 3.0]])
    array([[[1., 3.],
            [1., 3.]]])
    """

    n: int

    def __post_init__(self) -> None:
        super().__post_init__()
        (self.n,) = integers("RepeatVector", "n", self.n, 1, 1)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return (B, n, …) for an x of `input_shape` (B, …)."""
        if len(input_shape) < 2:
            raise ValueError(f"RepeatVector: x must be (batch, …) of at least 2 axes, got shape {tuple(input_shape)}")
        return (input_shape[0], self.n, *input_shape[1:])

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        y = np.repeat(x[:, np.newaxis], self.n, 1)
        precise = np.result_type(x, np.float64)
        return y, lambda dy: dy.sum(1, dtype=precise).astype(x.dtype)
