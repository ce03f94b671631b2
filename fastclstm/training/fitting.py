"""One call of `fit`: its steps and epochs; and the sums of losses and metrics over batches."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from fastclstm.io.progress import progress_bar
from fastclstm.layers.base import without_input_gradient
from fastclstm.layers.container import told_of
from fastclstm.nn import losses, metrics, optimizers, schedules
from fastclstm.nn.described import describe
from fastclstm.training.batches import Arrays, Batch, Data, samples
from fastclstm.training.checkpoints import Checkpoint, Progress, generator_states, generators, set_generator_states
from fastclstm.training.history import EarlyStopping, History
from fastclstm.training.model import Model
from fastclstm.training.objective import Metric, Objective, as_made, outputs_of, target, weights
from fastclstm.training.watching import finite, watched_layers

REMEDIES = {
    "x": "fill the gaps, or let mask= skip frames that are missing; a sample_weight of 0 leaves out what y lacks",
    "y": "leave out what is missing with a sample_weight of 0, for each pixel if need be: (N, T, H, W); mask= is for x",
    "loss": "lower the learning rate, give the optimizer a clip_norm, or look at the data",
}
"""What to do where that holds what is not finite."""


@dataclass
class Fitting:
    """One call of `fit`."""

    model: Model
    objective: Objective
    optimizer: optimizers.Optimizer
    data: Data
    validation: Data | None
    shuffle: bool
    seed: int | None
    early_stopping: EarlyStopping | None
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: int | None

    def __post_init__(self) -> None:
        entropy: Any = np.random.SeedSequence().entropy if self.seed is None else self.seed
        self.progress = Progress(int(entropy))
        self.history = History()
        self.best_parameters: dict[str, np.ndarray] = {}
        stopping = self.early_stopping
        if stopping is not None:
            curves = self.objective.curves
            known = [*curves, *(f"val_{name}" for name in curves if self.validation)]
            default = "val_loss" if self.validation else "loss"
            self.monitor = default if stopping.monitor is None else stopping.monitor
            if self.monitor not in known:
                raise ValueError(f"EarlyStopping: monitor must be one of {', '.join(map(repr, known))}, got "
                                 f"{self.monitor!r}; give fit that metric, or validation data")  # fmt: skip

    def run(
        self, epochs: int, time_limit: float | None, resume: bool, callbacks: Sequence[Callable[[History], Any]],
        quiet: bool | None,
    ) -> History:  # fmt: skip
        """Train until there is a reason to end."""
        if isinstance(self.validation, Arrays):  # not after an epoch, should it not fit
            with told_of("the validation data"):
                unmeasured = replace(self.objective, metrics={})
                evaluate(self.model, unmeasured, islice(drawn(self.model, self.validation), 1))
        plan = json.loads(json.dumps(self._plan()))
        self.file = Checkpoint(self.checkpoint, self.model, self.optimizer, plan)
        if resume and self.file.exists():
            self.progress, self.best_parameters = self.file.resume()
            self.history = History(self.progress.history)
        else:
            self._save()
        progress, steps = self.progress, self.data.steps or 0
        total = steps * epochs if steps and time_limit is None else None
        done = steps * progress.epoch + progress.step
        with progress_bar(total=total, initial=done, unit=" step", quiet=quiet) as bar:
            while progress.epoch < epochs and not progress.stopped:
                bar.set_description_str(f"epoch {progress.epoch + 1}" + (f"/{epochs}" if time_limit is None else ""))
                if self._run_epoch(bar, time_limit):
                    break
                answers = [callback(self.history) for callback in callbacks]
                self._save()
                if any(isinstance(answer, bool | np.bool_) and answer for answer in answers):
                    break
        if self.best_parameters:
            self.model.set_parameters(self.best_parameters)
        return self.history

    def _run_epoch(self, bar: Any, time_limit: float | None) -> bool:
        """Take the steps that are left of an epoch; return whether the time was over before."""
        progress, before = self.progress, self.progress.seconds
        limit = math.inf if time_limit is None else time_limit - sum(self.history.get("seconds", ()))
        if before >= limit:
            return True
        start = time.perf_counter() - before
        sums = Sums(self.objective, progress.sums, progress.samples, progress.left_out)
        seed = progress.seed if self.shuffle else None
        for batch in drawn(self.model, self.data, progress.epoch, progress.step, seed):
            self._step(batch, sums)
            progress.step += 1
            progress.sums, progress.samples, progress.left_out = sums.sums, sums.samples, sums.left_out
            progress.seconds = time.perf_counter() - start
            left = {} if time_limit is None else {"left": f"{max(0, limit - progress.seconds):.0f} s"}
            bar.set_postfix(loss=f"{sums.sums['loss'] / max(1, sums.samples):.4g}", **left, refresh=False)
            bar.update()
            if progress.seconds >= limit:
                break
            if self.checkpoint_every is not None and progress.step % self.checkpoint_every == 0:
                self._save()
        row = sums.values()
        if self.validation is not None:
            measured = evaluate(self.model, self.objective, drawn(self.model, self.validation))
            row |= {f"val_{name}": value for name, value in measured.items()}
        row["learning_rate"] = float(schedules.get(self.optimizer.learning_rate)(self.optimizer.steps - 1))
        row["seconds"] = time.perf_counter() - start
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        progress.epoch += 1
        progress.step, progress.sums, progress.samples = 0, {}, 0
        progress.left_out, progress.seconds = {}, 0.0
        if self.early_stopping is not None:
            self._watch(self.early_stopping, row[self.monitor])
        return False

    def _step(self, batch: Batch, sums: Sums) -> None:
        """Move the parameters by one batch, and add up its loss and metrics."""
        model, parameters, states = self.model, self.model.parameters, generator_states(self.model)
        moments = self.optimizer.steps, self.optimizer.state  # which a step replaces
        try:
            model._begin_step(self.progress.seed, self.progress.epoch, self.progress.step)
            made = model._predict_batch(batch, training=True)
            outputs = outputs_of(model, made)
            values, gradients = self.objective.values_and_gradients(outputs, batch)
            values["loss"] += model.penalty
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(f"the loss is {values['loss']}")
            with without_input_gradient(model):
                model.backward(as_made(model, made, gradients))
            forget(model)
            learning, found = model.trainable_parameters, model.get_gradients()
            if missing := sorted(set(learning) - set(found)):
                raise ValueError(f"fit: backward kept no gradient of {', '.join(missing)}; set store_gradients=True "
                                 f"on the layers they are of, or trainable=False")  # fmt: skip
            moved = self.optimizer.step(learning, found)
            model.set_parameters(model.parameters | moved)
            model.apply_constraints()
            for name, array in model.parameters.items():  # moving statistics too
                if array is not parameters[name] and not finite(array):
                    raise FloatingPointError(f"the new {name} holds NaN or Inf")
            sums.add(values, outputs, batch)
        except BaseException as error:
            model.set_parameters(parameters)
            set_generator_states(model, states)
            self.optimizer.steps, self.optimizer.state = moments
            where = f"epoch {self.progress.epoch + 1}, step {self.progress.step + 1}"
            if isinstance(error, FloatingPointError):
                origin, remedy = self._origin(batch)
                raise FloatingPointError(
                    f"fit: at {where}, {error}; {origin}. The parameters are those before this step; {remedy}"
                ) from error
            error.add_note(f"in {where} of fit")
            raise

    def _origin(self, batch: Batch) -> tuple[str, str]:
        """Say where what is not finite began, and what to do; unless that is the data, a step is computed again."""
        objective, seen = self.objective, dict(batch)
        for output in objective.losses:
            if (weighed := objective.weights(batch, output)) is not None:
                seen["y" if "y" in batch else f"y:{output}"] = losses.without(target(batch, output), weighed)
        for name, array in seen.items():
            if not finite(array):
                kind, _, part = name.partition(":")
                told = f"{kind} {part!r}" if part else kind
                return f"it began in the batch: {told} holds NaN or Inf", REMEDIES.get(kind, "mend the data")
        return self._layer_of_origin(batch), REMEDIES["loss"]

    def _layer_of_origin(self, batch: Batch) -> str:
        """Compute a step again, layer by layer, to say where what is not finite began."""
        model, states = self.model, generator_states(self.model)
        parameters = model.parameters
        try:
            with np.errstate(all="ignore"), watched_layers(model) as found:
                made = model._predict_batch(batch, training=True)
                if not found:
                    values, gradients = self.objective.values_and_gradients(outputs_of(model, made), batch)
                    if not (math.isfinite(values["loss"] + model.penalty) and finite(gradients)):
                        return "it began in the loss or the penalty, as all outputs are finite"
                    model.backward(as_made(model, made, gradients))
        finally:
            model.set_parameters(parameters)
            set_generator_states(model, states)
        return f"it began in {found[0]}" if found else "all outputs and gradients are finite"

    def _plan(self) -> dict[str, Any]:
        """Return all that a resumed training must share with the one before, as JSON holds it."""
        model = self.model
        return {
            "data": self.data.told(),
            "model": model._described(),
            "parameters": {name: [*a.shape, a.dtype.name] for name, a in model.parameters.items()},
            "trainable": list(model.trainable_parameters),
            "generators": sorted(generators(model)),
            "optimizer": describe(self.optimizer),
            **self.objective.told(),
            "validation": None if self.validation is None else self.validation.told(),
            "shuffle": self.shuffle,
            "seed": self.seed,
            "early_stopping": None if self.early_stopping is None else describe(self.early_stopping),
            "options": model._fit_options(),
        }

    def _save(self) -> None:
        self.progress.history = dict(self.history)
        self.file.save(self.progress, self.best_parameters)

    def _watch(self, stopping: EarlyStopping, value: float) -> None:
        progress = self.progress
        if stopping.improves(value, progress.best):
            progress.best, progress.waited = value, 0
            if stopping.restore_best:
                self.best_parameters = self.model.parameters
            return
        progress.waited += 1
        progress.stopped = progress.waited >= stopping.patience


class Sums:
    """What batches give, summed up: numbers times their samples, and the counts of metrics that are quotients.

    What weighs nothing is not among the samples of the metrics of `nn.metrics`; own functions get all of the target.
    """

    def __init__(
        self, objective: Objective, sums: Mapping[str, Any] | None = None, samples: int = 0, left_out: Any = None
    ):
        self.metrics, self.sums, self.samples = objective.metrics, dict(sums or {}), samples
        self.left_out: dict[str, float] = dict(left_out or {})
        """How many samples of each output weighed nothing, parts of them too."""

    def add(self, values: Mapping[str, float], outputs: Mapping[str, np.ndarray], batch: Batch) -> None:
        """Add the losses and the metrics of a batch; nothing where a metric fails."""
        count, left_out = samples(batch), dict(self.left_out)
        valid: dict[str, np.ndarray | None] = {}
        for output in outputs:
            given = weights(batch, output)
            valid[output] = seen = None if given is None or np.all(given) else given != 0
            if seen is not None:
                left_out[output] = left_out.get(output, 0.0) + count * (1 - float(seen.mean()))
        parts = {name: self._part(name, metric, outputs[output], target(batch, output), count, valid[output])
                 for name, (output, metric) in self.metrics.items()}  # fmt: skip
        self.samples, self.left_out = self.samples + count, left_out
        for name, part in ({name: count * value for name, value in values.items()} | parts).items():
            self.sums[name] = np.add(self.sums.get(name, 0.0), part).tolist()

    def values(self) -> dict[str, float]:
        """Return the loss and the metrics of all batches together."""
        return {name: self._value(name, total) for name, total in self.sums.items()}

    def _part(
        self, name: str, metric: Metric, y: np.ndarray, target: np.ndarray, samples: int, valid: np.ndarray | None
    ) -> Any:
        options = {"valid": valid} if valid is not None and metrics.knows_valid(metric) else {}
        counted = metrics.counted(metric)
        if counted is not None:
            part = counted[0](y, target, **options)
            _one_number(name, counted[1](part))
            return part
        if options and not np.any(valid):
            return 0.0
        share = float(np.mean(valid)) if options else 1  # type: ignore[arg-type]
        return samples * share * _one_number(name, metric(y, target, **options))

    def _value(self, name: str, total: Any) -> float:
        output, metric = self.metrics.get(name, ("", None))
        counted = None if metric is None else metrics.counted(metric)
        if counted is not None:
            return float(counted[1](np.asarray(total)))
        left_out = self.left_out.get(output, 0.0)
        if metric is None or not left_out or not metrics.knows_valid(metric):
            return total / max(1, self.samples)
        seen = self.samples - left_out
        return total / seen if seen > 1e-9 * self.samples else math.nan


def _one_number(name: str, value: Any) -> float:
    number = np.asarray(value)
    if number.size != 1 or number.dtype.kind not in "fiub":
        told = f"an array of shape {number.shape}" if number.size != 1 else repr(value)
        raise ValueError(f"metrics: {name} must return one number, got {told}")
    return float(number.reshape(()))


def evaluate(model: Model, objective: Objective, given: Iterable[Batch]) -> dict[str, float]:
    """Return the losses and the metrics of batches."""
    sums = Sums(objective)
    for batch in given:
        outputs = outputs_of(model, model._predict_batch(batch, training=False))
        sums.add(objective.values(outputs, batch), outputs, batch)
    return sums.values()


def drawn(model: Model, data: Data, epoch: int = 0, start: int = 0, seed: int | None = None) -> Iterator[Batch]:
    """Yield the batches of an epoch, each kind of them checked."""
    kinds = set()
    for batch in data.batches(epoch, start, seed):
        kind = tuple((name, array.shape[1:]) for name, array in batch.items() if name.startswith("x")), *batch
        if kind not in kinds:
            model._check_batch(data.op, batch)
            kinds.add(kind)
        yield batch


def forget(model: Model) -> None:
    """Free what the layers keep for backward."""
    for _, layer in model._walk():
        layer._pullback = None
