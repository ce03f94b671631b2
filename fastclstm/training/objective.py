"""What a training brings down: the losses of a model's outputs, with their factors; and the metrics beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fastclstm.nn import is_number, losses, metrics
from fastclstm.nn.described import Described, describe
from fastclstm.training.batches import Batch
from fastclstm.training.model import Model

Metric = Callable[[Any, Any], Any]

ONE = ""
"""Stands for the output of a model that has one, which needs no name."""


@dataclass(frozen=True)
class Objective:
    """Losses and metrics by the names of the outputs that they look at."""

    losses: Mapping[str, losses.Loss]
    factors: Mapping[str, float]
    metrics: Mapping[str, tuple[str, Metric]]
    """By the name of the curve: which output, and the function."""
    class_weight: Mapping[int, float] | None = None

    @property
    def several(self) -> bool:
        """Whether the model has a list or dict of outputs."""
        return ONE not in self.losses

    @property
    def curves(self) -> tuple[str, ...]:
        """The names of what is measured."""
        return ("loss", *(f"{name}_loss" for name in self.losses if self._told_alone), *self.metrics)

    @property
    def _told_alone(self) -> bool:
        return len(self.losses) > 1

    def values(self, outputs: Mapping[str, Any], batch: Batch) -> dict[str, float]:
        """Return the sum of the losses and, where there are several, each."""
        return self._summed({name: loss(outputs[name], target(batch, name), weights(batch, name))
                             for name, loss in self.losses.items()})  # fmt: skip

    def values_and_gradients(
        self, outputs: Mapping[str, Any], batch: Batch
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Return what `values` does, and the gradient of the sum to each output that has a loss."""
        measured, gradients = {}, {}
        for name, loss in self.losses.items():
            value, gradient = loss.value_and_gradient(outputs[name], target(batch, name), self.weights(batch, name))
            factor = self.factors[name]
            measured[name], gradients[name] = value, gradient if factor == 1 else gradient * gradient.dtype.type(factor)
        return self._summed(measured), gradients

    def weights(self, batch: Batch, name: str) -> np.ndarray | None:
        """Return the factors of the loss's values: those of the samples times those of the classes."""
        given = weights(batch, name)
        if self.class_weight is None:
            return given
        factors = losses.class_weights(self.losses[name], target(batch, name), self.class_weight)
        if given is None:
            return factors
        axes = max(given.ndim, factors.ndim)
        return np.multiply(*(a.reshape(a.shape + (1,) * (axes - a.ndim)) for a in (given, factors)))

    def told(self) -> dict[str, Any]:
        """Return what a checkpoint knows of it."""
        told = {
            name: describe(loss) if isinstance(loss, Described) else "functions" for name, loss in self.losses.items()
        }
        return {
            "loss": told if self.several else told[ONE],
            "loss_weights": dict(self.factors) if self.several else None,
            "metrics": list(self.metrics),
            "class_weight": self.class_weight and {str(label): float(n) for label, n in self.class_weight.items()},
        }

    def _summed(self, measured: Mapping[str, float]) -> dict[str, float]:
        total = sum(self.factors[name] * value for name, value in measured.items())
        each = {f"{name}_loss": value for name, value in measured.items()} if self._told_alone else {}
        return {"loss": total} | each


def objective(
    model: Model, loss: Any, loss_weights: Any, given: Any, class_weight: Mapping[int, float] | None = None
) -> Objective:
    """Return the objective that the options of `fit` describe."""
    names = model._output_names
    if names is None:
        if loss_weights is not None:
            raise ValueError("loss_weights are for several outputs, and the model has one; leave them out")
        return Objective({ONE: losses.get(loss)}, {ONE: 1.0}, _curves({ONE: given}), class_weight)
    if class_weight is not None and len(names) > 1:
        raise ValueError("class_weight is for a model of one output; give sample_weight, one for each output")
    each = loss if isinstance(loss, Mapping) or _is_list_of_losses(loss) else dict.fromkeys(names, loss)
    named = _named("loss", each, names)
    chosen = {name: losses.get(spec) for name, spec in named.items() if spec is not None}
    if not chosen:
        raise ValueError("loss: no output has one; give at least one")
    factors = dict.fromkeys(chosen, 1.0)
    for name, factor in _named("loss_weights", loss_weights or {}, names).items():
        if factor is None:
            continue
        if name not in chosen or not (is_number(factor) and factor >= 0):
            why = f"{name!r} has no loss" if name not in chosen else f"that of {name!r} is {factor!r}"
            raise ValueError(f"loss_weights must be numbers >= 0 for outputs with a loss, but {why}")
        factors[name] = float(factor)
    lists = isinstance(given, list | tuple) and any(m is None or isinstance(m, list | tuple) for m in given)
    asked = _named("metrics", given, names) if isinstance(given, Mapping) or lists else dict.fromkeys(names, given)
    return Objective(chosen, factors, _curves(asked, len(names) > 1), class_weight)


def outputs_of(model: Model, made: Any) -> dict[str, np.ndarray]:
    """Return a model's outputs by name; raise TypeError where one is more than one array."""
    names = model._output_names
    if names is None:
        return {ONE: one_array(model, made)}
    parts = made if isinstance(made, Mapping) else dict(zip(names, made, strict=True))
    return {name: one_array(model, part) for name, part in parts.items()}


def as_made(model: Model, made: Any, gradients: Mapping[str, np.ndarray]) -> Any:
    """Return gradients by name in the form of a model's outputs, None for those that have none."""
    names = model._output_names
    if names is None:
        return gradients[ONE]
    each = {name: gradients.get(name) for name in names}
    return each if isinstance(made, Mapping) else list(each.values())


def one_array(model: Model, output: Any) -> np.ndarray:
    """Return a model's output; raise TypeError where it is more than one array."""
    if not isinstance(output, np.ndarray):
        raise TypeError(f"{type(model).__name__} returns more than one array ({type(output).__name__}), but fit, "
                        f"evaluate and predict are for one; leave out return_state and the like")  # fmt: skip
    return output


def target(batch: Batch, name: str) -> np.ndarray:
    """Return what an output should be."""
    key = "y" if name == ONE else f"y:{name}"
    if key not in batch:
        raise ValueError(
            f"there is no y for the output {name!r}, which has a loss or a metric; give it, or the loss None"
        )
    return batch[key]


def weights(batch: Batch, name: str) -> np.ndarray | None:
    """Return an output's sample_weight, where there is one."""
    return batch.get("sample_weight" if name == ONE else f"sample_weight:{name}")


def _is_list_of_losses(loss: Any) -> bool:
    """Whether a list is of one loss an output, and no pair of functions."""
    functions = isinstance(loss, list) and all(callable(item) and not isinstance(item, losses.Loss) for item in loss)
    return isinstance(loss, list) and not functions


def _named(option: str, given: Any, names: Sequence[str]) -> Mapping[str, Any]:
    """Return a list with one item an output, or a dict, by the outputs' names."""
    if isinstance(given, Mapping):
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(f"{option} is for {', '.join(map(repr, unknown))}, but the outputs are "
                             f"{', '.join(map(repr, names))}")  # fmt: skip
        return given
    if not isinstance(given, list | tuple) or len(given) != len(names):
        came = f"{len(given)} items" if isinstance(given, list | tuple) else repr(given)
        raise ValueError(f"{option} must be a dict by the names of the outputs ({', '.join(map(repr, names))}) or a "
                         f"list with one for each, got {came}")  # fmt: skip
    return dict(zip(names, given, strict=True))


def _curves(asked: Mapping[str, Any], several: bool = False) -> dict[str, tuple[str, Metric]]:
    """Return the metrics of each output by the names that their curves have."""
    named: dict[str, tuple[str, Metric]] = {}
    for output, given in asked.items():
        for metric in listed("metrics", given):
            name = f"{output}_{_name(metric)}" if several else _name(metric)
            taken = name in ("loss", "learning_rate", "seconds") or name.startswith("val_")
            if taken or name in named or (several and name.endswith("_loss") and name[: -len("_loss")] in asked):
                wrong = f"{name!r} is the name of another curve" if name not in named else "two have the same name"
                raise ValueError(f"metrics: {wrong}; the names are {', '.join(dict.fromkeys([*named, name]))}: set a "
                                 f"function's __name__ to another")  # fmt: skip
            named[name] = output, metrics.get(metric)
    return named


def listed(name: str, given: Any) -> tuple[Any, ...]:
    """Return one, several or no functions or names as a tuple."""
    if given is None or isinstance(given, str) or callable(given):
        return () if given is None else (given,)
    try:
        return tuple(given)
    except TypeError as error:
        raise TypeError(f"{name} must be one or a sequence of them, got {given!r}") from error


def _name(metric: Any) -> str:
    """Return the name of a metric's curve; a partial function has that of the whole."""
    if isinstance(metric, str):
        return metric
    whole = metric.func if isinstance(metric, partial) else metric
    return getattr(metric, "__name__", getattr(whole, "__name__", type(whole).__name__))
