"""What a training leaves behind, and when it should stop."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import dataclass

from fastclstm.io.files import replacing
from fastclstm.nn import Options
from fastclstm.spec import choice


class History(dict[str, list[float]]):
    """The curves of a training: lists with one number an epoch, by name.

    ``"loss"`` and the metrics' names are means over the epoch's samples, taken while the parameters change, dropout and
    all; with the penalties in the loss. ``"val_…"`` are those of the validation data after the epoch, without
    penalties. ``"learning_rate"`` is that of the epoch's last step, ``"seconds"`` its time.

    Examples
    --------
    >>> History(loss=[2.0, 1.0], seconds=[0.5, 0.5]).epochs
    2
    """

    @property
    def epochs(self) -> int:
        """How many there were."""
        return max(map(len, self.values()), default=0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the curves, whole or not at all: to a ``.csv`` with a row an epoch, or to a ``.json`` with a list each.

        Numbers that JSON has not, NaN and Inf, are null there.

        Raises
        ------
        ValueError
            Another suffix.
        OSError
            The file cannot be written.
        """
        suffix = os.path.splitext(os.fspath(path))[1].lower()
        choice("History", "the suffix of path", suffix, (".csv", ".json"))
        with replacing(path) as new, new.open("w", encoding="utf-8", newline="") as file:
            if suffix == ".csv":
                writer = csv.writer(file)
                writer.writerow(["epoch", *self])
                writer.writerows(zip(range(1, self.epochs + 1), *self.values(), strict=True))
            else:
                curves = {name: [v if math.isfinite(v) else None for v in values] for name, values in self.items()}
                json.dump(curves, file, indent=1)


@dataclass(frozen=True)
class EarlyStopping(Options):
    """When to stop a training before its last epoch.

    Parameters
    ----------
    patience : int
        Stop when so many epochs, one after the other, have brought no improvement.
    monitor : str, optional
        The curve that must improve. None: ``"val_loss"``, or without validation data ``"loss"``.
    mode : "min" or "max"
        Whether less or more of it is better.
    min_delta : float
        What counts as improvement is more than this.
    restore_best : bool
        Leave the model with the parameters of its best epoch.

    Raises
    ------
    ValueError
        An option out of range.
    """

    patience: int = 5
    monitor: str | None = None
    mode: str = "min"
    min_delta: float = 0
    restore_best: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integer("patience", 1)
        choice("EarlyStopping", "mode", self.mode, ("min", "max"))
        self._check_number("min_delta", 0)
        choice("EarlyStopping", "restore_best", self.restore_best, (False, True))
        if not isinstance(self.monitor, str | None):
            self._refuse("monitor", "the name of a curve or None")

    def improves(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than the best so far; NaN never is."""
        if best is None:
            return not math.isnan(value)
        return value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta
