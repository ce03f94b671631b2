"""Checkpoints of a training: all that the rest of it depends on, in one safetensors file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastclstm.io import weights
from fastclstm.nn import is_number
from fastclstm.nn.described import Described, describe, restore
from fastclstm.nn.names import with_article
from fastclstm.nn.optimizers import Optimizer
from fastclstm.training.model import Model

CHECKPOINT = "Training checkpoint"
"""The class that a checkpoint's metadata names."""


@dataclass
class Progress:
    """How far a training is: what a checkpoint holds beside arrays and generators."""

    seed: int
    epoch: int = 0
    step: int = 0
    """Of the epoch."""
    sums: dict[str, Any] = field(default_factory=dict)
    samples: int = 0
    """Of the steps of this epoch so far, as are `sums` and `seconds`."""
    left_out: Any = field(default_factory=dict)
    """How many of the samples weighed nothing, parts of them too, by output; a number in files of before."""
    seconds: float = 0.0
    history: dict[str, list[float]] = field(default_factory=dict)
    best: float | None = None
    waited: int = 0
    stopped: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.left_out, Mapping):
            self.left_out = {"": self.left_out} if self.left_out else {}


@dataclass
class Checkpoint:
    """The file of a training, and what of it goes into the file."""

    path: str | os.PathLike[str] | None
    """None: there is to be no file."""
    model: Model
    optimizer: Optimizer
    plan: dict[str, Any]
    """All that a resumed training must share with the one before, as JSON holds it."""

    def exists(self) -> bool:
        """Whether there is a file to go on from."""
        return self.path is not None and os.path.exists(self.path)

    def save(self, progress: Progress, best: Mapping[str, np.ndarray]) -> None:
        """Write the file, where there is to be one; `best` are the parameters of the best epoch."""
        if self.path is None:
            return
        parts = {"model": self.model.parameters, "optimizer": self.optimizer.get_state(), "best": best}
        rate = self.optimizer.learning_rate
        metadata = {
            "class": CHECKPOINT,
            "plan": self.plan,
            "progress": dataclasses.asdict(progress),
            "learning_rate": describe(rate) if isinstance(rate, Described) else rate if is_number(rate) else None,
            "frozen": self.model._frozen(),
            "generators": _plain_state(generator_states(self.model)),
        }
        arrays = {f"{part}/{name}": array for part, named in parts.items() for name, array in named.items()}
        weights.save(self.path, arrays, metadata)

    def resume(self) -> tuple[Progress, dict[str, np.ndarray]]:
        """Put model and optimizer back to where the file has them, and return what `save` was given.

        After an error nothing has changed.
        """
        name = os.fspath(self.path or "")
        arrays, metadata = weights.load(name)
        if metadata.get("class") != CHECKPOINT:
            held = with_article(str(metadata.get("class")))
            raise ValueError(f"{name} is no checkpoint of a training but holds {held}; give another name, or "
                             f"resume=False to replace it")  # fmt: skip
        if difference := _difference(metadata.get("plan"), self.plan):
            remedy = "give the same model, data and options"
            if "_steps was" in difference:
                remedy = "its schedule was made for other epochs: give that the steps, or the run the epochs, it had"
            raise ValueError(f"{name} is of another training: {difference}; {remedy}, or resume=False to start anew")
        model, optimizer = self.model, self.optimizer
        parameters, state, states = model.parameters, optimizer.get_state(), generator_states(model)
        frozen = model._frozen()
        parts: dict[str, dict[str, np.ndarray]] = {"model": {}, "optimizer": {}, "best": {}}
        try:
            for key, array in arrays.items():
                part, _, key = key.partition("/")
                parts[part][key] = array
            progress, best = Progress(**metadata["progress"]), {}
            if parts["best"]:
                model.set_parameters(parts["best"])
                best = model.parameters
            model.set_parameters(parts["model"])
            optimizer.set_state(parts["optimizer"])
            set_generator_states(model, _bit_state(metadata["generators"]))
            _freeze(model, metadata["frozen"])
            rate = metadata["learning_rate"]
            rate = restore(rate) if isinstance(rate, Mapping) else rate
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            model.set_parameters(parameters)
            optimizer.set_state(state)
            set_generator_states(model, states)
            _freeze(model, frozen)
            raise ValueError(f"{name} is damaged, or the optimizer's options are no longer those it was written with: "
                             f"{error}; give them back, or resume=False replaces it") from error  # fmt: skip
        if rate is not None:  # it may have been assigned to
            optimizer.learning_rate = rate
        return progress, best


def _difference(old: Any, new: Any, path: str = "") -> str:
    """Say where two JSON values differ first, or nothing."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            where = f"{path}.{key}" if path else key
            if found := _difference(old.get(key), new.get(key), where.removesuffix(".options")):
                return found
        return ""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return next(
            filter(None, (_difference(*p, f"{path}[{n}]") for n, p in enumerate(zip(old, new, strict=True)))), ""
        )
    return "" if old == new else f"{path} was {old!r} and is {new!r}"


def generators(model: Model) -> dict[str, np.random.Generator]:
    """Return the generators that the layers draw from, by the path of layer and attribute."""
    return {f"{path}.{name}".removeprefix("."): value for path, layer in model._walk()
            for name, value in vars(layer).items() if isinstance(value, np.random.Generator)}  # fmt: skip


def generator_states(model: Model) -> dict[str, Any]:
    """Return the states of `generators`."""
    return {name: rng.bit_generator.state for name, rng in generators(model).items()}


def set_generator_states(model: Model, states: Mapping[str, Any]) -> None:
    """Put `generators` back to states that `generator_states` returned."""
    for name, rng in generators(model).items():
        rng.bit_generator.state = states[name]


def _freeze(model: Model, places: Sequence[str]) -> None:
    """Freeze the layers at the places that `Layer._frozen` returned, and no others."""
    for _, layer in model._walk():
        layer.trainable = True
    for place in places:
        model._part(place).trainable = False


def _plain_state(state: Any) -> Any:
    """Return a bit generator's state as JSON can hold it."""
    if isinstance(state, Mapping):
        return {key: _plain_state(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return {"dtype": state.dtype.name, "values": state.tolist()}
    return state


def _bit_state(state: Any) -> Any:
    """Undo `_plain_state`."""
    if isinstance(state, Mapping):
        if set(state) == {"dtype", "values"}:
            return np.array(state["values"], state["dtype"])
        return {key: _bit_state(value) for key, value in state.items()}
    return state
