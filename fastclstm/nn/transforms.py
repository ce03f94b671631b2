"""Transforms of values: what a network computes in, between 0 and 1, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm.nn import Options
from fastclstm.spec import choice

KINDS = ("log", "linear", "none")


@dataclass(frozen=True)
class Transform(Options):
    """From the values of data to what a network computes in, and back.

    Parameters
    ----------
    kind : "log", "linear" or "none"
        "log": ``ln(1 + v / offset)``, for what is never negative and often 0, as rain rates: drizzle and downpours then
        differ by as much. It is scaled such that `low` becomes 0 and `high` 1, as are values themselves by "linear".
        "none": values are taken as they are.
    low, high : float
        In the units of the data.
    offset : float
        Of "log", in the units of the data: where its scale goes from linear to logarithmic. About the least that is
        measured: 0.1 mm/h for rain.

    Raises
    ------
    ValueError
        Numbers that do not fit together.

    Examples
    --------
    >>> rates = Transform("log", 0, 100, offset=0.1)
    >>> rates(np.array([0, 0.1, 1, 10, 100])).round(3)
    array([0.   , 0.1  , 0.347, 0.668, 1.   ])
    >>> rates.inverse(rates(np.array([0.3, 30]))).round(6)
    array([ 0.3, 30. ])
    """

    kind: str = "none"
    low: float = 0.0
    high: float = 1.0
    offset: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("Transform", "kind", self.kind, KINDS)
        self._check_number("low", 0 if self.kind == "log" else -np.inf)
        self._check_number("high", self.low, inclusive=False)
        self._check_number("offset", 0, inclusive=False)

    def __call__(self, values: Any) -> Any:
        """Return what a network computes in; NaN stays, and with "log" what is negative is 0.

        Computed in float64 where `values` are not float32. An array of Dask stays lazy.
        """
        if self.kind == "none":
            return values
        low, high = self._ends
        return (self._curve(values) - low) / (high - low)

    def inverse(self, values: Any) -> Any:
        """Return the values of data; with "log" none is negative."""
        if self.kind == "none":
            return values
        low, high = self._ends
        curved = values * (high - low) + low
        return self.offset * np.expm1(np.maximum(curved, 0)) if self.kind == "log" else curved

    @property
    def _ends(self) -> tuple[float, float]:
        return tuple(float(self._curve(np.float64(value))) for value in (self.low, self.high))  # type: ignore[return-value]

    def _curve(self, values: Any) -> Any:
        return np.log1p(np.maximum(values, 0) / self.offset) if self.kind == "log" else values
