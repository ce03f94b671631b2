"""Data for training: arrays cut into batches, or a caller's own batches."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from fastclstm import dispatch

Batch = dict[str, np.ndarray]
"""Arrays by name: x, y and whichever of the others there are; of several inputs or outputs "x:NAME" and so on."""

Ends = Mapping[str, tuple[str, ...] | None]
"""The names of a model's inputs, under "x", and of its outputs, under "y" and "sample_weight"; None of one array."""

_NAMES = ("x", "y", "sample_weight", "mask", "lengths")


class Arrays:
    """Arrays, one sample beside the other on their first axis."""

    steps: int

    def __init__(self, op: str, arrays: Mapping[str, Any], batch_size: int):
        check_count("batch_size", batch_size, op.partition(":")[0])
        self.arrays = {name: dispatch.as_numpy(op, name, a) for name, a in arrays.items() if a is not None}
        counts = {name: a.shape[0] if a.ndim else None for name, a in self.arrays.items()}
        if None in counts.values() or len(set(counts.values())) > 1:
            told = ", ".join(f"{name} {array.shape}" for name, array in self.arrays.items())
            raise ValueError(f"{op}: all arrays must have as many samples, on their first axis; got {told}")
        self.op, self.batch_size, self.count = op, int(batch_size), samples(self.arrays)
        self.steps = -(-self.count // self.batch_size)

    def split(self, share: float) -> tuple[Arrays, Arrays]:
        """Return the samples but the last `share` of them, and these."""
        held = int(self.count * share)
        if not 0 < held < self.count:
            raise ValueError(f"fit: validation_split={share} of {self.count} samples leaves {self.count - held} to "
                             f"train on and {held} to validate; give more samples, or validation_data")  # fmt: skip
        cut = self.count - held
        parts = (slice(None, cut), slice(cut, None))
        first, last = (Arrays(self.op, {n: a[part] for n, a in self.arrays.items()}, self.batch_size) for part in parts)
        return first, last

    def batches(self, epoch: int = 0, start: int = 0, seed: int | None = None) -> Iterator[Batch]:
        """Yield batches from number `start` on; a seed shuffles. Without samples there is one batch, empty."""
        order = None if seed is None else np.random.default_rng([seed, epoch]).permutation(self.count)
        for step in range(start, max(1, self.steps)):
            part: Any = slice(step * self.batch_size, (step + 1) * self.batch_size)
            if order is not None:
                part = order[part]
            batch = {name: array[part] for name, array in self.arrays.items()}
            for array in batch.values():
                array.flags.writeable = False  # it may be the caller's memory
            yield batch

    def told(self) -> Any:
        """Return what a checkpoint knows of the data: the checksum is of the first and the last sample."""
        return {"batch_size": self.batch_size} | {
            name: {"shape": [*a.shape], "dtype": a.dtype.name, "checksum": zlib.crc32(a[[0, -1]].tobytes())}
            for name, a in self.arrays.items()
        }


class Batches:
    """A caller's own batches."""

    def __init__(self, op: str, source: Any, steps: int | None, ends: Ends):
        if isinstance(source, Iterator) and op == "fit" and steps is None:
            raise ValueError(f"{op}: an iterator of batches needs steps_per_epoch, the number of batches in an epoch")
        if steps is not None:
            check_count("steps_per_epoch", steps)
        self.op, self.source, self._ends = op, source, ends
        self.steps = steps if steps is not None or not hasattr(source, "__len__") else len(source)
        self._limit, self._drawn = None if steps is None else int(steps), 0

    def batches(self, epoch: int = 0, start: int = 0, seed: int | None = None) -> Iterator[Batch]:
        """Yield the batches of an epoch from number `start` on."""
        number = start
        for item in islice(self._from(epoch, start), None if self._limit is None else self._limit - start):
            number += 1
            yield self._batch(item)
        if number < (self._limit or 1):
            raise ValueError(f"{self.op}: the batches of epoch {epoch + 1} ended after {number}, "
                             f"not {self._limit or 'at least 1'}; give more, or another steps_per_epoch")  # fmt: skip

    def told(self) -> Any:
        """Return what a checkpoint knows of the data."""
        return {"steps_per_epoch": self._limit}

    def _from(self, epoch: int, start: int) -> Iterator[Any]:
        if isinstance(self.source, Iterator):
            skipped = epoch * (self._limit or 0) + start - self._drawn  # by a training that was interrupted
            for item in islice(self.source, skipped, None):
                self._drawn += skipped + 1
                skipped = 0
                yield item
            return
        items = self.source
        if callable(items):
            items = items(*(epoch,)[: _takes_one(items)])
        yield from islice(iter(items), start, None)

    def _batch(self, item: Any) -> Batch:
        named = by_name(f"{self.op}: a batch", item)
        if not isinstance(item, tuple | list | Mapping) or not {"x", "y"} <= set(named):
            raise TypeError(f"{self.op}: a batch must be (x, y), (x, y, sample_weight) or a dict of these, "
                            f"got {type(item).__name__}")  # fmt: skip
        return Arrays(self.op, spread(self.op, named, self._ends), 1).arrays


Data = Arrays | Batches


def _takes_one(function: Callable[..., Any]) -> bool:
    """Whether a function can be called with one argument; where that is unknown, it is."""
    try:
        inspect.signature(function).bind(0)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def by_name(op: str, item: Any) -> dict[str, Any]:
    """Return x, y and the like by name; what is no tuple of arrays and no dict is x."""
    if isinstance(item, Mapping):
        if unknown := sorted(set(item) - set(_NAMES)):
            raise ValueError(f"{op} has {', '.join(map(repr, unknown))}; it may have {', '.join(_NAMES)}")
        return dict(item)
    if isinstance(item, tuple) or (isinstance(item, list) and len(item) in (2, 3) and _is_array(item[0])):
        if len(item) not in (2, 3):
            raise ValueError(f"{op} must be (x, y) or (x, y, sample_weight), got {len(item)} items")
        return dict(zip(_NAMES, item, strict=False))
    return {"x": item}


def _is_array(value: Any) -> bool:
    return hasattr(value, "__dlpack__") or hasattr(value, "__array__")


def samples(batch: Batch) -> int:
    """Return how many samples there are."""
    return len(next(iter(batch.values())))


def named_part(op: str, given: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Return what was given for several names, as a list in their order or as a dict, by name in this order.

    Raises
    ------
    ValueError
        Another number of items, other names.
    """
    told = ", ".join(map(repr, names))
    if isinstance(given, Mapping):
        if set(given) != set(names):
            raise ValueError(f"{op} must have {told}, got {', '.join(map(repr, given))}")
        return {name: given[name] for name in names}
    if isinstance(given, list | tuple) and len(given) == len(names):
        return dict(zip(names, given, strict=True))
    if len(names) == 1 and not isinstance(given, list | tuple):
        return {names[0]: given}
    came = f"{len(given)} items" if isinstance(given, list | tuple) else type(given).__name__
    raise ValueError(f"{op} must be a list of {len(names)} arrays, or a dict of them by name ({told}), got {came}")


def spread(op: str, named: Mapping[str, Any], ends: Ends) -> dict[str, Any]:
    """Return arrays by name with those of several inputs or outputs under names of their own.

    Of y and sample_weight some may be missing, and one sample_weight is for all outputs.
    """
    arrays: dict[str, Any] = {}
    for name, value in named.items():
        names = ends.get(name)
        if value is None or (names is None and not (name == "x" and isinstance(value, Mapping))):
            arrays[name] = value
            continue
        if names is None:
            raise TypeError(f"{op}: x is a dict, but the model takes one array; give that")
        if name == "sample_weight" and not isinstance(value, Mapping | list | tuple):
            value = dict.fromkeys(names, value)
        if name != "x" and isinstance(value, Mapping) and set(value) <= set(names):
            value = dict.fromkeys(names) | dict(value)
        arrays |= {f"{name}:{key}": part for key, part in named_part(f"{op}: {name}", value, names).items()}
    return arrays


def read(
    op: str, given: Mapping[str, Any], batch_size: int, steps: int | None = None, ends: Ends | None = None
) -> Data:
    """Return the arrays or batches among what was `given`, checked."""
    ends = ends or {}
    arrays = {name: given.get(name) for name in _NAMES}
    x = arrays["x"]
    if arrays["y"] is None:
        several = isinstance(x, Mapping) or (
            ends.get("x") is not None and isinstance(x, list) and all(map(_is_array, x))
        )
        if _is_array(x) or several:
            x_is = "x is arrays" if several else "x is an array"
            raise ValueError(f"{op}: {x_is}, but there is no y, the outputs that the model should give")
        if isinstance(x, tuple) and len(x) in (2, 3) and all(map(_is_array, x)):
            raise TypeError(f"{op}: x is a tuple of {len(x)} arrays; give them one by one: x, y, sample_weight=…")
        if not (callable(x) or isinstance(x, Iterable)):
            raise TypeError(f"{op}: x must be an array, or batches (x, y), got {type(x).__name__}")
        if extra := [name for name in _NAMES[2:] if arrays[name] is not None]:
            raise ValueError(f"{op}: {' and '.join(extra)} must be part of the batches, where x is batches")
        return Batches(op, x, steps, ends)
    if steps is not None:
        raise ValueError(f"{op}: steps_per_epoch is for batches; arrays are cut by batch_size")
    data = Arrays(op, spread(op, arrays, ends), batch_size)
    if data.count == 0:
        raise ValueError(f"{op}: x of shape {next(iter(data.arrays.values())).shape} has no samples")
    return data


def check_count(name: str, value: Any, op: str = "fit") -> None:
    """Raise ValueError unless `value` is an integer above zero."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{op}: {name} must be an integer >= 1, got {value!r}")
