"""One call of `fit`: its steps and epochs; and the sums of losses and metrics over batches."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from fastclstm.io.progress import progress_bar
from fastclstm.layers.base import Layer
from fastclstm.layers.container import told_of, walk
from fastclstm.nn import losses, metrics, optimizers, schedules
from fastclstm.training import checkpoints
from fastclstm.training.batches import Arrays, Batch, Data
from fastclstm.training.checkpoints import Progress, generator_states, set_generator_states
from fastclstm.training.history import EarlyStopping, History
from fastclstm.training.watching import finite, watched_layers

if TYPE_CHECKING:
    from fastclstm.training.trainable import Trainable

Metric = Callable[[Any, Any], Any]
Metrics = Mapping[str, Metric]


@dataclass
class Fitting:
    """One call of `fit`."""

    model: Trainable
    loss: losses.Loss
    optimizer: optimizers.Optimizer
    metrics: Metrics
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
            known = [*self._curves(), *(f"val_{name}" for name in self._curves() if self.validation)]
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
                evaluate(self.model, self.loss, {}, islice(drawn(self.model, self.validation), 1))
        self.plan = json.loads(json.dumps(checkpoints.plan(self)))
        if resume and self.checkpoint is not None and os.path.exists(self.checkpoint):
            checkpoints.resume(self, self.checkpoint)
        else:
            checkpoints.save(self)
        progress, steps = self.progress, self.data.steps or 0
        total = steps * epochs if steps and time_limit is None else None
        done = steps * progress.epoch + progress.step
        with progress_bar(total=total, initial=done, unit=" step", quiet=quiet) as bar:
            while progress.epoch < epochs and not progress.stopped:
                bar.set_description_str(f"epoch {progress.epoch + 1}" + (f"/{epochs}" if time_limit is None else ""))
                if self._run_epoch(bar, time_limit):
                    break
                answers = [callback(self.history) for callback in callbacks]
                checkpoints.save(self)
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
        sums = Sums(self.metrics, progress.sums, progress.samples)
        seed = progress.seed if self.shuffle else None
        for batch in drawn(self.model, self.data, progress.epoch, progress.step, seed):
            self._step(batch, sums)
            progress.step += 1
            progress.sums, progress.samples = sums.sums, sums.samples
            progress.seconds = time.perf_counter() - start
            left = {} if time_limit is None else {"left": f"{max(0, limit - progress.seconds):.0f} s"}
            bar.set_postfix(loss=f"{sums.sums['loss'] / max(1, sums.samples):.4g}", **left, refresh=False)
            bar.update()
            if progress.seconds >= limit:
                break
            if self.checkpoint_every is not None and progress.step % self.checkpoint_every == 0:
                checkpoints.save(self)
        row = sums.values()
        if self.validation is not None:
            measured = evaluate(self.model, self.loss, self.metrics, drawn(self.model, self.validation))
            row |= {f"val_{name}": value for name, value in measured.items()}
        row["learning_rate"] = float(schedules.get(self.optimizer.learning_rate)(self.optimizer.steps - 1))
        row["seconds"] = time.perf_counter() - start
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        progress.epoch += 1
        progress.step, progress.sums, progress.samples, progress.seconds = 0, {}, 0, 0.0
        if self.early_stopping is not None:
            self._watch(self.early_stopping, row[self.monitor])
        return False

    def _step(self, batch: Batch, sums: Sums) -> None:
        """Move the parameters by one batch, and add up its loss and metrics."""
        model, parameters, states = self.model, self.model.parameters, generator_states(self.model)
        moments = self.optimizer.steps, self.optimizer.state  # which a step replaces
        try:
            y = one_array(model, model._predict_batch(batch, training=True))
            value, dy = self.loss.value_and_gradient(y, batch["y"], batch.get("sample_weight"))
            value += model.penalty
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value}")
            model.backward(dy)
            forget(model)
            learning, gradients = model.trainable_parameters, model.get_gradients()
            if missing := sorted(set(learning) - set(gradients)):
                raise ValueError(f"fit: backward kept no gradient of {', '.join(missing)}; set store_gradients=True "
                                 f"on the layers they are of, or trainable=False")  # fmt: skip
            moved = self.optimizer.step(learning, gradients)
            model.set_parameters(model.parameters | moved)
            model.apply_constraints()
            for name, array in model.parameters.items():  # moving statistics too
                if array is not parameters[name] and not finite(array):
                    raise FloatingPointError(f"the new {name} holds NaN or Inf")
            sums.add(value, y, batch["y"], len(batch["x"]))
        except BaseException as error:
            model.set_parameters(parameters)
            set_generator_states(model, states)
            self.optimizer.steps, self.optimizer.state = moments
            where = f"epoch {self.progress.epoch + 1}, step {self.progress.step + 1}"
            if isinstance(error, FloatingPointError):
                raise FloatingPointError(
                    f"fit: at {where}, {error}; {self._origin(batch)}. The parameters are those before this step; "
                    f"lower the learning rate, give the optimizer a clip_norm, or look at the data"
                ) from error
            error.add_note(f"in {where} of fit")
            raise

    def _origin(self, batch: Batch) -> str:
        """Compute a step again, layer by layer, to say where what is not finite began."""
        for name, array in batch.items():
            if not finite(array):
                return f"it began in the batch: {name} holds NaN or Inf"
        model, states = self.model, generator_states(self.model)
        parameters = model.parameters
        try:
            with np.errstate(all="ignore"), watched_layers(model) as found:
                y = model._predict_batch(batch, training=True)
                if not found:
                    value, dy = self.loss.value_and_gradient(y, batch["y"], batch.get("sample_weight"))
                    if not (math.isfinite(value + model.penalty) and finite(dy)):
                        return "it began in the loss or the penalty, as all outputs are finite"
                    model.backward(dy)
        finally:
            model.set_parameters(parameters)
            set_generator_states(model, states)
        return f"it began in {found[0]}" if found else "all outputs and gradients are finite"

    def _watch(self, stopping: EarlyStopping, value: float) -> None:
        progress = self.progress
        if stopping.improves(value, progress.best):
            progress.best, progress.waited = value, 0
            if stopping.restore_best:
                self.best_parameters = self.model.parameters
            return
        progress.waited += 1
        progress.stopped = progress.waited >= stopping.patience

    def _curves(self) -> tuple[str, ...]:
        return ("loss", *self.metrics)


class Sums:
    """What batches give, summed up: numbers times their samples, and the counts of metrics that are quotients."""

    def __init__(self, metrics: Metrics, sums: Mapping[str, Any] | None = None, samples: int = 0):
        self.metrics, self.sums, self.samples = metrics, dict(sums or {}), samples

    def add(self, loss: float, y: np.ndarray, target: np.ndarray, samples: int) -> None:
        """Add the loss and the metrics of a batch of so many samples; nothing where a metric fails."""
        parts = {name: self._part(name, metric, y, target, samples) for name, metric in self.metrics.items()}
        self.samples += samples
        for name, part in ({"loss": samples * loss} | parts).items():
            self.sums[name] = np.add(self.sums.get(name, 0.0), part).tolist()

    def values(self) -> dict[str, float]:
        """Return the loss and the metrics of all batches together."""
        return {name: self._value(name, total) for name, total in self.sums.items()}

    def _part(self, name: str, metric: Metric, y: np.ndarray, target: np.ndarray, samples: int) -> Any:
        counted = metrics.counted(metric)
        if counted is not None:
            part = counted[0](y, target)
            _one_number(name, counted[1](part))
            return part
        return samples * _one_number(name, metric(y, target))

    def _value(self, name: str, total: Any) -> float:
        counted = metrics.counted(self.metrics[name]) if name in self.metrics else None
        return total / max(1, self.samples) if counted is None else float(counted[1](np.asarray(total)))


def _one_number(name: str, value: Any) -> float:
    number = np.asarray(value)
    if number.size != 1 or number.dtype.kind not in "fiub":
        told = f"an array of shape {number.shape}" if number.size != 1 else repr(value)
        raise ValueError(f"metrics: {name} must return one number, got {told}")
    return float(number.reshape(()))


def evaluate(model: Trainable, loss: losses.Loss, named: Metrics, given: Iterable[Batch]) -> dict[str, float]:
    """Return the loss and the metrics of batches."""
    sums = Sums(named)
    for batch in given:
        y = one_array(model, model._predict_batch(batch, training=False))
        sums.add(loss(y, batch["y"], batch.get("sample_weight")), y, batch["y"], len(batch["x"]))
    return sums.values()


def drawn(model: Trainable, data: Data, epoch: int = 0, start: int = 0, seed: int | None = None) -> Iterator[Batch]:
    """Yield the batches of an epoch, each kind of them checked."""
    kinds = set()
    for batch in data.batches(epoch, start, seed):
        kind = (*batch, *batch["x"].shape[1:])
        if kind not in kinds:
            model._check_batch(data.op, batch)
            kinds.add(kind)
        yield batch


def one_array(model: Layer, output: Any) -> np.ndarray:
    """Return a model's output; raise TypeError where it is more than one array."""
    if not isinstance(output, np.ndarray):
        raise TypeError(f"{type(model).__name__} returns more than one array ({type(output).__name__}), but fit, "
                        f"evaluate and predict are for one; leave out return_state and the like")  # fmt: skip
    return output


def forget(model: Layer) -> None:
    """Free what the layers keep for backward."""
    for _, layer in walk(model):
        layer._pullback = None
