"""Regularizers: penalties on a parameter or an output, and their gradients, by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastclstm.nn.described import Described


class Regularizer(Described):
    """A penalty: ``regularizer(array)`` is a number, ``regularizer.gradient(array)`` its gradient."""

    def __call__(self, array: np.ndarray) -> float:
        """Return the penalty on `array`."""
        raise NotImplementedError

    def gradient(self, array: np.ndarray) -> np.ndarray:
        """Return the penalty's gradient, of the shape and dtype of `array`."""
        raise NotImplementedError


def get(spec: Any) -> Regularizer:
    """Return the regularizer that `spec` means."""
    raise NotImplementedError
