"""Verification of forecasts as the field does it: scores by lead time, of several methods on the same pixels.

The scores are those of `fastclstm.nn.metrics`, which `fit` takes too: `csi`, `pod`, `far` and `fss` at thresholds, and
`mse`, `mae` and `ssim`. Here they are gathered over any number of forecasts, lead time by lead time. A pixel counts
where the observation and all of the forecasts have a value: what a radar does not see, or what is carried in from
outside, counts for no method, or methods would be compared on different pixels.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from fastclstm.io.files import replacing
from fastclstm.nn import is_number, metrics
from fastclstm.nn.losses import SSIMLoss
from fastclstm.spec import integers, refuse_masked

EVENTS = ("CSI", "POD", "FAR", "FSS")
"""Scores that there are one of for each threshold."""
ERRORS = ("MSE", "MAE", "SSIM")
SCORES = (*EVENTS, *ERRORS)


class Verification:
    """Scores by lead time, gathered over forecasts.

    Parameters
    ----------
    thresholds : sequence of float
        Events are values >= these, in the units of the data.
    scale : int
        Side of the windows of FSS in pixels.
    similar : function, optional
        From values to those between 0 and 1 that SSIM compares, such as a `Transform`. None: as they are.

    Raises
    ------
    ValueError
        Thresholds or a scale that are none.

    References
    ----------
    Wilks, "Statistical Methods in the Atmospheric Sciences", 3rd ed. (2011), chapter 8, for POD, FAR and CSI; of FSS
    and SSIM see `nn.metrics.fss` and `nn.losses.SSIMLoss`.

    Examples
    --------
    >>> truth = np.array([[0.0, 2.0], [3.0, 0.0], [3.0, np.nan]]).reshape(1, 3, 1, 2, 1)
    >>> table = Verification([1.0], scale=1)
    >>> table.add(truth, {"persistence": np.broadcast_to(truth[:, :1], truth.shape), "perfect": truth})
    >>> table.scores("perfect", "CSI")[:, 0], table.scores("persistence", "MSE")
    (array([1., 1., 1.]), array([0. , 6.5, 9. ]))
    """

    def __init__(self, thresholds: Sequence[float], scale: int = 9, similar: Callable[[Any], Any] | None = None):
        self.thresholds = tuple(map(float, thresholds))
        if not self.thresholds or not all(map(is_number, self.thresholds)):
            raise ValueError(f"Verification: thresholds must be one or more finite numbers, got {thresholds!r}")
        (self.scale,) = integers("Verification", "scale", scale, 1, 1)
        self.similar = similar
        self.forecasts = 0
        self._sums: dict[tuple[str, str], np.ndarray] = {}
        options: dict[str, Any] = {"thresholds": self.thresholds}
        scores = {"CSI": metrics.csi, "POD": metrics.pod, "FAR": metrics.far, "FSS": metrics.fss}
        given = {name: options | ({"scale": self.scale} if name == "FSS" else {}) for name in scores}
        self._counted: dict[str, Any] = {
            name: metrics.counted(partial(score, **given[name])) for name, score in scores.items()
        }

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods, as they came."""
        return tuple(dict.fromkeys(method for method, _ in self._sums))

    def add(self, truth: Any, forecasts: Mapping[str, Any]) -> None:
        """Count forecasts of several methods.

        Parameters
        ----------
        truth : array (B, steps, H, W, C)
            In the units of the data; NaN is missing.
        forecasts : dict of arrays of the same shape, by method

        Raises
        ------
        ValueError
            Other shapes, no frames; other methods or another number of steps than before.
        """
        for name, array in (("truth", truth), *forecasts.items()):
            refuse_masked("Verification", name, array, "np.nan")
        observed = np.asarray(truth)
        if observed.ndim != 5:
            raise ValueError(f"Verification: truth must be (B, steps, H, W, C), got shape {observed.shape}")
        made = {name: np.asarray(array) for name, array in forecasts.items()}
        for name, array in made.items():
            if array.shape != observed.shape:
                raise ValueError(f"Verification: the forecast {name!r} has shape {array.shape} but must have that of "
                                 f"the truth {observed.shape}")  # fmt: skip
        if self._sums and set(made) != set(self.methods):
            raise ValueError(f"Verification: methods must be those of before ({', '.join(self.methods)}), got "
                             f"{', '.join(made)}")  # fmt: skip
        valid = np.logical_and.reduce([np.isfinite(array) for array in (observed, *made.values())])
        observed = np.where(valid, observed, 0)
        new = {}
        for method, array in made.items():
            filled = np.where(valid, array, 0)
            for score in SCORES:
                leads = [self._part(score, filled[:, n], observed[:, n], valid[:, n]) for n in range(observed.shape[1])]
                new[method, score] = np.array(leads)
        for key, part in new.items():
            before = self._sums.get(key)
            if before is not None and before.shape != part.shape:
                raise ValueError(f"Verification: forecasts had {len(before)} steps before, and now {len(part)}")
        self._sums = {key: part + self._sums.get(key, 0.0) for key, part in new.items()}
        self.forecasts += len(observed)

    def scores(self, method: str, score: str) -> np.ndarray:
        """Return a score by lead time.

        Parameters
        ----------
        method : str
        score : "CSI", "POD", "FAR", "FSS", "MSE", "MAE" or "SSIM"

        Returns
        -------
        array of float64 (steps, thresholds), or (steps,) where there are none
            NaN where nothing could be counted: no event, or frames smaller than the 11 × 11 pixels of SSIM.

        Raises
        ------
        KeyError
            Another method or score.
        """
        sums = self._sums[method, score]
        if score in EVENTS:
            return np.array([self._counted[score][1](lead) for lead in sums])
        with np.errstate(invalid="ignore"):
            return sums[:, 0] / sums[:, 1]

    def table(self, leads: Sequence[str], units: str = "", *, rows: int = 6) -> str:
        """Return the scores as text: a block for each score of events, and one of errors.

        Parameters
        ----------
        leads : sequence of str
            Names of the lead times.
        units : str
            Of the thresholds.
        rows : int
            As many lead times at most are shown, from the first to the last.

        Raises
        ------
        ValueError
            Other leads than forecasts have steps; no forecasts yet.
        """
        self._check(leads)
        shown = sorted({round(n) for n in np.linspace(0, len(leads) - 1, min(rows, len(leads)))})
        levels = [f">= {level:g} {units}".strip() for level in self.thresholds]
        blocks: list[tuple[str, list[str], list[tuple[str, int | None]]]] = [
            (name, levels, [(name, n) for n in range(len(levels))]) for name in EVENTS
        ]
        blocks.append(("", list(ERRORS), [(name, None) for name in ERRORS]))
        widths = [max(6, len(method) + 1) for method in self.methods]
        first, lines = max(10, *map(len, leads)), []
        for title, heads, columns in blocks:
            lines.append(f"{title:<{first}}" + "".join(f"{head:>{sum(widths) + 2}}" for head in heads))
            lines.append(f"{'lead time':<{first}}" + len(heads) * ("  " + _cells(self.methods, widths)))
            for n in shown:
                row = [_cells([_figure(self._at(method, name, level)[n]) for method in self.methods], widths)
                       for name, level in columns]  # fmt: skip
                lines.append(f"{leads[n]:<{first}}" + "".join("  " + cells for cells in row))
            lines.append("")
        return "\n".join(line.rstrip() for line in lines[:-1])

    def save(self, path: str | os.PathLike[str], leads: Sequence[str]) -> None:
        """Write all scores to a ``.csv``, a row for each method, lead time and threshold, whole or not at all.

        Raises
        ------
        OSError
            The file cannot be written.
        ValueError
            As `table`.
        """
        self._check(leads)
        with replacing(path) as new, new.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["method", "lead_time", "threshold", *SCORES])
            for method, (n, lead), (k, level) in product(self.methods, enumerate(leads), enumerate(self.thresholds)):
                events = [self.scores(method, name)[n, k] for name in EVENTS]
                writer.writerow([method, lead, level, *events, *(self.scores(method, name)[n] for name in ERRORS)])

    def _check(self, leads: Sequence[str]) -> None:
        """Raise ValueError unless each step of the forecasts has a name."""
        if not self._sums:
            raise ValueError("Verification: there are no forecasts yet; add some")
        steps = len(next(iter(self._sums.values())))
        if len(leads) != steps:
            raise ValueError(f"Verification: leads must be the names of {steps} lead times, got {len(leads)}")

    def _at(self, method: str, score: str, level: int | None) -> np.ndarray:
        """Return a score by lead time, at the threshold number `level` where it has one for each."""
        scores = self.scores(method, score)
        return scores if level is None else scores[:, level]

    def _part(self, score: str, made: np.ndarray, truth: np.ndarray, valid: np.ndarray) -> Any:
        """Return what of a score can be added up, of frames (B, H, W, C)."""
        if score in EVENTS:
            return self._counted[score][0](made, truth, valid=valid)
        count = int(valid.sum())
        if score == "SSIM":
            if min(made.shape[-3:-1]) < SSIMLoss().window:
                return 0.0, 0.0
            similar = self.similar or (lambda values: values)
            count = int(SSIMLoss().whole_windows(valid).sum())
            value = metrics.ssim(similar(made), similar(truth), valid=valid)
        else:
            value = metrics.mse(made, truth, valid=valid) if score == "MSE" else metrics.mae(made, truth, valid=valid)
        return (value * count, count) if np.isfinite(value) else (0.0, 0.0)


def _cells(texts: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))


def _figure(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}"
