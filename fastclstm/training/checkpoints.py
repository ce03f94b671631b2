"""Checkpoints of a training: all that the rest of it depends on, in one safetensors file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fastclstm.io import weights
from fastclstm.layers.base import Layer
from fastclstm.layers.container import walk
from fastclstm.nn import is_number
from fastclstm.nn.described import Described, describe, restore
from fastclstm.training.history import History

if TYPE_CHECKING:
    from fastclstm.training.fitting import Fitting

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
    seconds: float = 0.0
    history: dict[str, list[float]] = field(default_factory=dict)
    best: float | None = None
    waited: int = 0
    stopped: bool = False


def plan(fitting: Fitting) -> dict[str, Any]:
    """Return all that a resumed training must share with the one before, as JSON holds it."""
    return {
        "data": fitting.data.told(),
        "model": describe(fitting.model),
        "parameters": {name: [*a.shape, a.dtype.name] for name, a in fitting.model.parameters.items()},
        "trainable": list(fitting.model.trainable_parameters),
        "generators": sorted(generators(fitting.model)),
        "optimizer": describe(fitting.optimizer),
        "loss": describe(fitting.loss) if isinstance(fitting.loss, Described) else "functions",
        "metrics": list(fitting.metrics),
        "validation": None if fitting.validation is None else fitting.validation.told(),
        "shuffle": fitting.shuffle,
        "seed": fitting.seed,
        "early_stopping": None if fitting.early_stopping is None else describe(fitting.early_stopping),
        "options": fitting.model._fit_options(),
    }


def save(fitting: Fitting) -> None:
    """Write the checkpoint, where there is to be one."""
    if fitting.checkpoint is None:
        return
    fitting.progress.history = dict(fitting.history)
    parts = {
        "model": fitting.model.parameters,
        "optimizer": fitting.optimizer.get_state(),
        "best": fitting.best_parameters,
    }
    rate = fitting.optimizer.learning_rate
    metadata = {
        "class": CHECKPOINT,
        "plan": fitting.plan,
        "progress": dataclasses.asdict(fitting.progress),
        "learning_rate": describe(rate) if isinstance(rate, Described) else rate if is_number(rate) else None,
        "frozen": fitting.model._frozen(),
        "generators": _plain_state(generator_states(fitting.model)),
    }
    arrays = {f"{part}/{name}": array for part, named in parts.items() for name, array in named.items()}
    weights.save(fitting.checkpoint, arrays, metadata)


def resume(fitting: Fitting, path: str | os.PathLike[str]) -> None:
    """Put everything back to where a checkpoint has it; after an error nothing has changed."""
    arrays, metadata = weights.load(path)
    name = os.fspath(path)
    if metadata.get("class") != CHECKPOINT:
        raise ValueError(f"{name} is no checkpoint of a training but holds a {metadata.get('class')}; "
                         f"give another name, or resume=False to replace it")  # fmt: skip
    if difference := _difference(metadata.get("plan"), fitting.plan):
        raise ValueError(f"{name} is of another training: {difference}; give the same model, data and options, "
                         f"or resume=False to start anew")  # fmt: skip
    parts: dict[str, dict[str, np.ndarray]] = {"model": {}, "optimizer": {}, "best": {}}
    model, optimizer = fitting.model, fitting.optimizer
    parameters, state, states = model.parameters, optimizer.get_state(), generator_states(model)
    frozen = model._frozen()
    try:
        for key, array in arrays.items():
            part, _, key = key.partition("/")
            parts[part][key] = array
        progress = Progress(**metadata["progress"])
        if parts["best"]:
            model.set_parameters(parts["best"])
            fitting.best_parameters = model.parameters
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
    fitting.progress, fitting.history = progress, History(progress.history)


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


def generators(model: Layer) -> dict[str, np.random.Generator]:
    """Return the generators that the layers draw from, by the path of layer and attribute."""
    return {f"{path}.{name}".removeprefix("."): value for path, layer in walk(model)
            for name, value in vars(layer).items() if isinstance(value, np.random.Generator)}  # fmt: skip


def generator_states(model: Layer) -> dict[str, Any]:
    """Return the states of `generators`."""
    return {name: rng.bit_generator.state for name, rng in generators(model).items()}


def set_generator_states(model: Layer, states: Mapping[str, Any]) -> None:
    """Put `generators` back to states that `generator_states` returned."""
    for name, rng in generators(model).items():
        rng.bit_generator.state = states[name]


def _freeze(model: Layer, places: Sequence[str]) -> None:
    """Freeze the layers at the places that `Layer._frozen` returned, and no others."""
    for _, layer in walk(model):
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
