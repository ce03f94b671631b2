"""Constraints: where a parameter is brought back to after each step of an optimizer, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Constraint = Callable[[np.ndarray], np.ndarray]


def get(spec: Any) -> Constraint:
    """Return the constraint that `spec` means."""
    raise NotImplementedError
