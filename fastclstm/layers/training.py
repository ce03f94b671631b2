"""Training: fit, evaluate and predict, which `Sequential` and `EncoderForecaster` share."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.io import weights
from fastclstm.layers import batches
from fastclstm.layers.array_layer import Container, told_of
from fastclstm.layers.base import Layer
from fastclstm.layers.batches import Arrays, Batch, Data, by_name, check_count
from fastclstm.layers.convlstm2d import ConvLSTM2D
from fastclstm.layers.history import EarlyStopping, History
from fastclstm.nn import is_number, losses, metrics, optimizers, schedules
from fastclstm.nn.described import Described, describe, restore

CHECKPOINT = "Training checkpoint"
"""The class that a checkpoint's metadata names."""

Metric = Callable[[Any, Any], Any]
Metrics = Mapping[str, Metric]


class Trainable(Container):
    """A model of one array in and one array out that can be fitted to data."""

    def fit(
        self, x: Any, y: Any = None, *, loss: Any = "mse", optimizer: Any = "adam", epochs: int = 1,
        batch_size: int = 16, sample_weight: Any = None, mask: Any = None, lengths: Any = None,
        validation_split: float = 0.0, validation_data: Any = None, metrics: Any = (), shuffle: bool = True,
        seed: int | None = None, steps_per_epoch: int | None = None, time_limit: float | None = None,
        early_stopping: int | EarlyStopping | None = None, checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None, resume: bool = False,
        callbacks: Callable[[History], Any] | Sequence[Callable[[History], Any]] | None = (), quiet: bool | None = None,
    ) -> History:  # fmt: skip
        """Fit the trainable parameters to data, batch by batch, and return the curves.

        The same seed, data and options give the same parameters, to the bit. After an error or Ctrl-C the parameters
        are those before the step that it came up in.

        Parameters
        ----------
        x : array (N, …), or an iterable, iterator or function of batches
            A batch is ``(x, y)``, ``(x, y, sample_weight)`` or a dict with these names, ``mask`` and ``lengths``. An
            iterable is gone through in every epoch; an iterator is read on from epoch to epoch and needs
            `steps_per_epoch`; a function returns the batches of an epoch, whose number (0, 1, …) it is given where it
            takes one.
        y : array (N, …)
            What the model should return for x. Only where x is an array, as all arrays up to `lengths`.
        loss : str, Loss or pair of functions
            Of `fastclstm.nn.losses`. The model's `penalty` is added to it.
        optimizer : str or Optimizer
            Of `fastclstm.nn.optimizers`. An object keeps its state from one call to the next.
        epochs : int
            How often to go through the data, those of a resumed training included.
        batch_size : int
        sample_weight : array (N,) or (N, T), optional
            Factors of the samples', or the frames', loss.
        mask, lengths : array (N, T) or (N,), optional
            As `Sequential` takes them. They decide what the layers do, not what the loss counts: that is
            ``sample_weight=mask``, though it still divides by the number of all frames.
        validation_split : float
            Share of the samples, the last ones, that are not trained on but are validation data.
        validation_data : tuple (x, y), tuple (x, y, sample_weight), dict of arrays, or batches, optional
            Data to evaluate after each epoch; batches as for x, but no iterator.
        metrics : str, function, or sequence of these
            Of `fastclstm.nn.metrics`, or functions of (prediction, target) that return a number. csi, pod and far count
            over all batches, others are means over them.
        shuffle : bool
            Take the samples in another order in every epoch, drawn from the seed and the epoch alone. Batches are taken
            as they come.
        seed : int, optional
            Of the shuffling; None draws one. Layers have their own.
        steps_per_epoch : int, optional
            Batches in an epoch, where x is batches. None: all.
        time_limit : float, optional
            Seconds after which the epoch is cut short and the training ends, the time before a resume included.
        early_stopping : int or EarlyStopping, optional
            A number is the `patience`.
        checkpoint : path, optional
            A safetensors file that holds all that the rest of the training depends on. It is replaced, as a whole,
            after each epoch; an existing one is overwritten, unless `resume`.
        checkpoint_every : int, optional
            Write it after every so many steps, too.
        resume : bool
            Go on from the checkpoint, where there is one, to the same bits as without the interruption. The model, the
            data and the options must be the same, except for `epochs`, `time_limit`, `callbacks`, `quiet` and
            `checkpoint_every`. Of what callbacks change, the file knows the optimizer's learning_rate and which layers
            are frozen.
        callbacks : function or sequence of functions, optional
            Called with the `History` after each epoch; where one returns True, the training ends, to be resumed or not.
        quiet : bool, optional
            True: no progress bar. None: one on a terminal only.

        Returns
        -------
        History

        Raises
        ------
        ValueError, TypeError
            Data or options that do not fit the model or each other, a checkpoint of another training.
        FloatingPointError
            A loss, a gradient or a new parameter is not finite. The message names the step, and the layer that it began
            in.
        OSError
            The checkpoint cannot be read or written.

        Examples
        --------
        >>> from fastclstm.layers import Dense, Sequential
        >>> from fastclstm.nn.optimizers import SGD
        >>> x = np.linspace(-1, 1, 64)[:, None]
        >>> model = Sequential([Dense(1, 1, seed=0)])
        >>> history = model.fit(x, 3 * x + 1, optimizer=SGD(0.5), epochs=20, seed=0)
        >>> history["loss"][-1] < 1e-6
        True
        """
        given = {"x": x, "y": y, "sample_weight": sample_weight, "mask": mask, "lengths": lengths}
        data = _read(self, "fit", given, batch_size, steps_per_epoch)
        if not (is_number(validation_split) and 0 <= validation_split < 1):
            raise ValueError(f"fit: validation_split must be a number in [0, 1), got {validation_split!r}")
        validation = None
        if validation_data is not None:
            if validation_split:
                raise ValueError("fit: give validation_split or validation_data, not both")
            if isinstance(validation_data, Iterator):
                raise TypeError("fit: validation_data is an iterator, which is empty after an epoch; give a list")
            given = by_name("fit: validation_data", validation_data)
            validation = _read(self, "fit: validation_data", given, batch_size)
        elif validation_split:
            if not isinstance(data, Arrays):
                raise ValueError("fit: validation_split needs arrays; with batches give validation_data")
            data, validation = data.split(validation_split)
        if isinstance(early_stopping, int | np.integer):
            early_stopping = EarlyStopping(early_stopping)
        if not isinstance(early_stopping, EarlyStopping | None):
            raise TypeError(f"fit: early_stopping must be a number of epochs or EarlyStopping, got {early_stopping!r}")
        check_count("epochs", epochs)
        if checkpoint is None and (resume or checkpoint_every is not None):
            raise ValueError("fit: resume and checkpoint_every need a checkpoint; give the path of one")
        if not isinstance(checkpoint, str | os.PathLike | None):
            raise TypeError(f"fit: checkpoint must be the path of a file, got {checkpoint!r}")
        if checkpoint_every is not None:
            check_count("checkpoint_every", checkpoint_every)
        if time_limit is not None and not (is_number(time_limit) and time_limit > 0):
            raise ValueError(f"fit: time_limit must be a number of seconds > 0, got {time_limit!r}")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0):
            raise ValueError(f"fit: seed must be an integer >= 0 or None, got {seed!r}")
        if not self.trainable_parameters:
            raise ValueError("fit: the model has no trainable parameters; set trainable=True on what should learn")
        calls = _listed("callbacks", callbacks)
        if not all(map(callable, calls)):
            raise TypeError(f"fit: callbacks must be functions of the History, got {callbacks!r}")
        training = _Training(
            self, losses.get(loss), optimizers.get(optimizer), _metrics(metrics), data, validation, bool(shuffle),
            None if seed is None else int(seed),
            early_stopping, checkpoint, checkpoint_every,
        )  # fmt: skip
        try:
            return training.run(epochs, time_limit, resume, calls, quiet)
        finally:
            _forget(self)

    def evaluate(
        self, x: Any, y: Any = None, *, loss: Any = "mse", metrics: Any = (), batch_size: int = 16,
        sample_weight: Any = None, mask: Any = None, lengths: Any = None,
    ) -> dict[str, float]:  # fmt: skip
        """Return ``{"loss": …}`` and the metrics: means over the batches, weighted by their sizes, without penalties.

        Nothing is kept for backward. Parameters, also batches instead of arrays, and errors are those of `fit`.

        Examples
        --------
        >>> from fastclstm.layers import Activation, Sequential
        >>> x = np.linspace(0, 1, 5)[:, None]
        >>> Sequential([Activation("linear")]).evaluate(x, x + 1, metrics="mae")
        {'loss': 1.0, 'mae': 1.0}
        """
        given = {"x": x, "y": y, "sample_weight": sample_weight, "mask": mask, "lengths": lengths}
        data = _read(self, "evaluate", given, batch_size)
        return _evaluate(self, losses.get(loss), _metrics(metrics), _drawn(self, data))

    def predict(self, x: Any, batch_size: int = 16, *, mask: Any = None, lengths: Any = None, **options: Any) -> Any:
        """Return the model's output for x (N, …), computed `batch_size` samples at a time, as x's kind of array.

        `options` are further ones of `forward`. Nothing is kept for backward.

        Raises
        ------
        ValueError, TypeError
            As `forward`; an output of more than one array.
        """
        _check_layers(self, "predict")
        as_given, data = dispatch.restorer(x), Arrays("predict", {"x": x, "mask": mask, "lengths": lengths}, batch_size)
        made: Any = None
        done = 0
        for batch in _drawn(self, data):
            y = _one_array(self, self.forward(batch.pop("x"), **batch, **options))
            if made is None:
                made = np.empty((data.count, *y.shape[1:]), y.dtype)
            made[done : done + len(y)] = y
            done += len(y)
        return as_given(made)

    def _check_batch(self, op: str, batch: Batch) -> None:
        """Raise ValueError where the batch is none for this model; what else is wrong, forward says."""

    def _predict_batch(self, batch: Batch, training: bool) -> Any:
        """Return the output for a batch: `forward`, and what it has to know of the target."""
        inputs = {name: batch[name] for name in ("mask", "lengths") if name in batch}
        return self.forward(batch["x"], training=training, **inputs)

    def _fit_options(self) -> dict[str, Any]:
        """Return what a checkpoint should know of `_predict_batch`, as JSON holds it."""
        return {}


def _read(model: Trainable, op: str, given: Mapping[str, Any], batch_size: int, steps: int | None = None) -> Data:
    """Return the arrays or batches among what was `given`, checked."""
    _check_layers(model, op)
    data = batches.read(op, given, batch_size, steps)
    if isinstance(data, Arrays):
        next(_drawn(model, data))
    return data


def _drawn(model: Trainable, data: Data, epoch: int = 0, start: int = 0, seed: int | None = None) -> Iterator[Batch]:
    """Yield the batches of an epoch, each kind of them checked."""
    kinds = set()
    for batch in data.batches(epoch, start, seed):
        kind = (*batch, *batch["x"].shape[1:])
        if kind not in kinds:
            model._check_batch(data.op, batch)
            kinds.add(kind)
        yield batch


def _check_layers(model: Trainable, op: str) -> None:
    """Raise ValueError where a layer has the samples on another axis, or goes on from those before."""
    for path, layer in _walk(model):
        if isinstance(layer, ConvLSTM2D) and (layer.time_major or layer.stateful):
            option = "time_major" if layer.time_major else "stateful"
            raise ValueError(f"{op}: {_told(path, layer)} has {option}=True, but batches are samples that are drawn "
                             f"anew, on the first axis; build it with {option}=False")  # fmt: skip


def _listed(name: str, given: Any) -> tuple[Any, ...]:
    """Return one, several or no functions or names as a tuple."""
    if given is None or isinstance(given, str) or callable(given):
        return () if given is None else (given,)
    try:
        return tuple(given)
    except TypeError as error:
        raise TypeError(f"{name} must be one or a sequence of them, got {given!r}") from error


def _metrics(given: Any) -> Metrics:
    """Return the metrics by the names that their curves have."""
    listed = _listed("metrics", given)
    named = {_name(metric): metrics.get(metric) for metric in listed}
    taken = [name for name in named if name in ("loss", "learning_rate", "seconds") or name.startswith("val_")]
    if len(named) < len(listed) or taken:
        wrong = f"{taken[0]!r} is the name of another curve" if taken else "two have the same name"
        raise ValueError(f"metrics: {wrong}; the names are {', '.join(named)}: set a function's __name__ to another")
    return named


def _name(metric: Any) -> str:
    """Return the name of a metric's curve; a partial function has that of the whole."""
    if isinstance(metric, str):
        return metric
    whole = metric.func if isinstance(metric, partial) else metric
    return getattr(metric, "__name__", getattr(whole, "__name__", type(whole).__name__))


class _Sums:
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


def _evaluate(model: Trainable, loss: losses.Loss, named: Metrics, drawn: Iterable[Batch]) -> dict[str, float]:
    sums = _Sums(named)
    for batch in drawn:
        y = _one_array(model, model._predict_batch(batch, training=False))
        sums.add(loss(y, batch["y"], batch.get("sample_weight")), y, batch["y"], len(batch["x"]))
    return sums.values()


def _one_array(model: Layer, output: Any) -> np.ndarray:
    if not isinstance(output, np.ndarray):
        raise TypeError(f"{type(model).__name__} returns more than one array ({type(output).__name__}), but fit, "
                        f"evaluate and predict are for one; leave out return_state and the like")  # fmt: skip
    return output


def _walk(layer: Layer, path: str = "") -> Iterator[tuple[str, Layer]]:
    """Yield a layer and all within it, each with its path."""
    yield path, layer
    for name, inner in layer._sublayers.items():
        yield from _walk(inner, f"{path}.{name}" if path else name)


def _forget(model: Layer) -> None:
    """Free what the layers keep for backward."""
    for _, layer in _walk(model):
        layer._pullback = None


def _told(path: str, layer: Layer) -> str:
    return f"layer {path}, {type(layer).__name__}" if path else type(layer).__name__


def _generators(model: Layer) -> dict[str, np.random.Generator]:
    """Return the generators that the layers draw from, by the path of layer and attribute."""
    return {f"{path}.{name}".removeprefix("."): value for path, layer in _walk(model)
            for name, value in vars(layer).items() if isinstance(value, np.random.Generator)}  # fmt: skip


def _generator_states(model: Layer) -> dict[str, Any]:
    return {name: rng.bit_generator.state for name, rng in _generators(model).items()}


def _set_generator_states(model: Layer, states: Mapping[str, Any]) -> None:
    for name, rng in _generators(model).items():
        rng.bit_generator.state = states[name]


def _freeze(model: Layer, places: Sequence[str]) -> None:
    """Freeze the layers at the places that `Layer._frozen` returned, and no others."""
    for _, layer in _walk(model):
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


@dataclass
class _Progress:
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


@dataclass
class _Training:
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
        self.progress = _Progress(int(entropy))
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
        from tqdm import tqdm

        if isinstance(self.validation, Arrays):  # not after an epoch, should it not fit
            with told_of("the validation data"):
                _evaluate(self.model, self.loss, {}, islice(_drawn(self.model, self.validation), 1))
        self.plan = json.loads(json.dumps(self._plan()))
        if resume and self.checkpoint is not None and os.path.exists(self.checkpoint):
            self._resume(self.checkpoint)
        else:
            self._save()
        progress, steps = self.progress, self.data.steps or 0
        total = steps * epochs if steps and time_limit is None else None
        with tqdm(total=total, initial=steps * progress.epoch + progress.step, unit="step", disable=quiet) as bar:
            while progress.epoch < epochs and not progress.stopped:
                bar.set_description(f"epoch {progress.epoch + 1}" + (f"/{epochs}" if time_limit is None else ""))
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
        sums = _Sums(self.metrics, progress.sums, progress.samples)
        seed = progress.seed if self.shuffle else None
        for batch in _drawn(self.model, self.data, progress.epoch, progress.step, seed):
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
                self._save()
        row = sums.values()
        if self.validation is not None:
            measured = _evaluate(self.model, self.loss, self.metrics, _drawn(self.model, self.validation))
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

    def _step(self, batch: Batch, sums: _Sums) -> None:
        """Move the parameters by one batch, and add up its loss and metrics."""
        model, parameters, states = self.model, self.model.parameters, _generator_states(self.model)
        moments = self.optimizer.steps, self.optimizer.state  # which a step replaces
        try:
            y = _one_array(model, model._predict_batch(batch, training=True))
            value, dy = self.loss.value_and_gradient(y, batch["y"], batch.get("sample_weight"))
            value += model.penalty
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value}")
            model.backward(dy)
            _forget(model)
            learning, gradients = model.trainable_parameters, model.get_gradients()
            if missing := sorted(set(learning) - set(gradients)):
                raise ValueError(f"fit: backward kept no gradient of {', '.join(missing)}; set store_gradients=True "
                                 f"on the layers they are of, or trainable=False")  # fmt: skip
            moved = self.optimizer.step(learning, gradients)
            model.set_parameters(model.parameters | moved)
            model.apply_constraints()
            for name, array in model.parameters.items():  # moving statistics too
                if array is not parameters[name] and not _finite(array):
                    raise FloatingPointError(f"the new {name} holds NaN or Inf")
            sums.add(value, y, batch["y"], len(batch["x"]))
        except BaseException as error:
            model.set_parameters(parameters)
            _set_generator_states(model, states)
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
            if not _finite(array):
                return f"it began in the batch: {name} holds NaN or Inf"
        model, states = self.model, _generator_states(self.model)
        parameters = model.parameters
        try:
            with np.errstate(all="ignore"), _watched(model) as found:
                y = model._predict_batch(batch, training=True)
                if not found:
                    value, dy = self.loss.value_and_gradient(y, batch["y"], batch.get("sample_weight"))
                    if not (math.isfinite(value + model.penalty) and _finite(dy)):
                        return "it began in the loss or the penalty, as all outputs are finite"
                    model.backward(dy)
        finally:
            model.set_parameters(parameters)
            _set_generator_states(model, states)
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

    def _plan(self) -> dict[str, Any]:
        """Return all that a resumed training must share with the one before, as JSON holds it."""
        return {
            "data": self.data.told(),
            "model": describe(self.model),
            "parameters": {name: [*a.shape, a.dtype.name] for name, a in self.model.parameters.items()},
            "trainable": list(self.model.trainable_parameters),
            "generators": sorted(_generators(self.model)),
            "optimizer": describe(self.optimizer),
            "loss": describe(self.loss) if isinstance(self.loss, Described) else "functions",
            "metrics": list(self.metrics),
            "validation": None if self.validation is None else self.validation.told(),
            "shuffle": self.shuffle,
            "seed": self.seed,
            "early_stopping": None if self.early_stopping is None else describe(self.early_stopping),
            "options": self.model._fit_options(),
        }

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        self.progress.history = dict(self.history)
        parts = {"model": self.model.parameters, "optimizer": self.optimizer.get_state(), "best": self.best_parameters}
        rate = self.optimizer.learning_rate
        metadata = {
            "class": CHECKPOINT,
            "plan": self.plan,
            "progress": dataclasses.asdict(self.progress),
            "learning_rate": describe(rate) if isinstance(rate, Described) else rate if is_number(rate) else None,
            "frozen": self.model._frozen(),
            "generators": _plain_state(_generator_states(self.model)),
        }
        arrays = {f"{part}/{name}": array for part, named in parts.items() for name, array in named.items()}
        weights.save(self.checkpoint, arrays, metadata)

    def _resume(self, path: str | os.PathLike[str]) -> None:
        """Put everything back to where a checkpoint has it; after an error nothing has changed."""
        arrays, metadata = weights.load(path)
        name = os.fspath(path)
        if metadata.get("class") != CHECKPOINT:
            raise ValueError(f"{name} is no checkpoint of a training but holds a {metadata.get('class')}; "
                             f"give another name, or resume=False to replace it")  # fmt: skip
        if difference := _difference(metadata.get("plan"), self.plan):
            raise ValueError(f"{name} is of another training: {difference}; give the same model, data and options, "
                             f"or resume=False to start anew")  # fmt: skip
        parts: dict[str, dict[str, np.ndarray]] = {"model": {}, "optimizer": {}, "best": {}}
        model, optimizer = self.model, self.optimizer
        parameters, state, states = model.parameters, optimizer.get_state(), _generator_states(model)
        frozen = model._frozen()
        try:
            for key, array in arrays.items():
                part, _, key = key.partition("/")
                parts[part][key] = array
            progress = _Progress(**metadata["progress"])
            if parts["best"]:
                model.set_parameters(parts["best"])
                self.best_parameters = model.parameters
            model.set_parameters(parts["model"])
            optimizer.set_state(parts["optimizer"])
            _set_generator_states(model, _bit_state(metadata["generators"]))
            _freeze(model, metadata["frozen"])
            rate = metadata["learning_rate"]
            rate = restore(rate) if isinstance(rate, Mapping) else rate
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            model.set_parameters(parameters)
            optimizer.set_state(state)
            _set_generator_states(model, states)
            _freeze(model, frozen)
            raise ValueError(f"{name} is damaged, or the optimizer's options are no longer those it was written with: "
                             f"{error}; give them back, or resume=False replaces it") from error  # fmt: skip
        if rate is not None:  # it may have been assigned to
            optimizer.learning_rate = rate
        self.progress, self.history = progress, History(progress.history)


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


def _finite(*values: Any) -> bool:
    """Whether all arrays in nested tuples, lists and dicts are finite."""
    for value in values:
        if isinstance(value, tuple | list):
            if not _finite(*value):
                return False
        elif isinstance(value, Mapping):
            if not _finite(*value.values()):
                return False
        elif isinstance(value, np.ndarray) and not np.isfinite(value).all():
            return False
    return True


@contextmanager
def _watched(model: Layer) -> Iterator[list[str]]:
    """Give a list that gets the first output or gradient of a layer that is not finite, by name."""
    found: list[str] = []

    def watch(path: str, layer: Layer, method: str, what: str) -> None:
        call = getattr(layer, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            if not found and not _finite(result, layer.get_gradients() if method == "backward" else ()):
                found.append(f"{what} of {_told(path, layer)}")
            return result

        setattr(layer, method, watched)

    layers = list(_walk(model))
    for path, layer in layers:
        watch(path, layer, "forward", "the output")
        watch(path, layer, "backward", "the gradients")
    try:
        yield found
    finally:
        for _, layer in layers:
            del layer.forward, layer.backward  # those of the instance: the class's are seen again
