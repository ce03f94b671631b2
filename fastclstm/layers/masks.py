"""Which steps of a sequence count."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.spec import Shape, expect_shape


def steps_mask(mask: Any, lengths: Any, shape: Shape, op: str = "ConvLSTM2D") -> np.ndarray | None:
    """Return the mask (B, T) that mask or lengths describe."""
    if mask is not None and lengths is not None:
        raise ValueError(f"{op}: give mask or lengths, not both")
    if mask is not None:
        expect_shape(op, "mask", mask.shape, shape, "(batch, time)")
        return mask != 0
    if lengths is None:
        return None
    counts = np.atleast_1d(dispatch.as_numpy(op, "lengths", lengths))
    expect_shape(op, "lengths", counts.shape, shape[:1], "(batch,)")
    if counts.dtype.kind not in "iu" and counts.size:
        raise TypeError(f"{op}: lengths must be integers, got dtype {counts.dtype}")
    if counts.size and (counts.min() < 0 or counts.max() > shape[1]):
        raise ValueError(f"{op}: lengths must lie between 0 and the {shape[1]} steps of x, got {counts.tolist()}")
    return np.arange(shape[1]) < counts[:, np.newaxis]
