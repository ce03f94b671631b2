"""Training: fit, evaluate and predict, which `Sequential` and `EncoderForecaster` share."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.io import weights
from fastclstm.layers import batches
from fastclstm.layers.array_layer import Container
from fastclstm.layers.base import Layer
from fastclstm.layers.batches import Arrays, Batch, Data, by_name, check_count
from fastclstm.layers.convlstm2d import ConvLSTM2D
from fastclstm.layers.history import EarlyStopping, History
from fastclstm.nn import is_number, losses, metrics, optimizers, schedules
from fastclstm.nn.described import Described, describe

CHECKPOINT = "Training checkpoint"
"""The class that a checkpoint's metadata names."""


class Trainable(Container):
    """A model of one array in and one array out that can be fitted to data."""

    def fit(
        self, x: Any, y: Any = None, *, loss: Any = "mse", optimizer: Any = "adam", epochs: int = 1,
        batch_size: int = 16, sample_weight: Any = None, mask: Any = None, lengths: Any = None,
        validation_split: float = 0.0, validation_data: Any = None, metrics: Any = (), shuffle: bool = True,
        seed: int | None = None, steps_per_epoch: int | None = None, time_limit: float | None = None,
        early_stopping: int | EarlyStopping | None = None, checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None, resume: bool = False,
        callbacks: Callable[[History], Any] | Sequence[Callable[[History], Any]] = (), quiet: bool | None = None,
    ) -> History:  # fmt: skip
        """Fit the trainable parameters to data, batch by batch, and return the curves.

        The same seed, data and options give the same parameters, to the bit. After an error or Ctrl-C the parameters
        are those before the step that it came up in.

        Parameters
        ----------
        x : array (N, …), or an iterable, iterator or function of batches
            A batch is ``(x, y)``, ``(x, y, sample_weight)`` or a dict with these names, ``mask`` and ``lengths``. An
            iterable is gone through in every epoch; an iterator is read on from epoch to epoch and needs
            `steps_per_epoch`; a function is given the number of the epoch (0, 1, …) and returns its batches.
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
            As `Sequential` takes them.
        validation_split : float
            Share of the samples, the last ones, that are not trained on but are validation data.
        validation_data : tuple (x, y), tuple (x, y, sample_weight), dict of arrays, or batches, optional
            Data to evaluate after each epoch; batches as for x, but no iterator.
        metrics : str, function, or sequence of these
            Of `fastclstm.nn.metrics`, or functions of (prediction, target) that return a number.
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
            `checkpoint_every`.
        callbacks : function or sequence of functions
            Called with the `History` after each epoch; where one returns True, the training ends.
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
            A loss or a gradient is not finite. The message names the step, and the layer that it began in.
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
        if isinstance(early_stopping, int):
            early_stopping = EarlyStopping(early_stopping)
        if not isinstance(early_stopping, EarlyStopping | None):
            raise TypeError(f"fit: early_stopping must be a number of epochs or EarlyStopping, got {early_stopping!r}")
        check_count("epochs", epochs)
        if checkpoint is None and (resume or checkpoint_every is not None):
            raise ValueError("fit: resume and checkpoint_every need a checkpoint; give the path of one")
        if checkpoint_every is not None:
            check_count("checkpoint_every", checkpoint_every)
        if time_limit is not None and not (is_number(time_limit) and time_limit > 0):
            raise ValueError(f"fit: time_limit must be a number of seconds > 0, got {time_limit!r}")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0):
            raise ValueError(f"fit: seed must be an integer >= 0 or None, got {seed!r}")
        if not self.trainable_parameters:
            raise ValueError("fit: the model has no trainable parameters; set trainable=True on what should learn")
        training = _Training(
            self, losses.get(loss), optimizers.get(optimizer), _metrics(metrics), data, validation, bool(shuffle),
            None if seed is None else int(seed),
            early_stopping, checkpoint, checkpoint_every,
        )  # fmt: skip
        try:
            calls = (callbacks,) if callable(callbacks) else tuple(callbacks)
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
        return _evaluate(self, losses.get(loss), _metrics(metrics), data)

    def predict(self, x: Any, batch_size: int = 16, *, mask: Any = None, lengths: Any = None, **options: Any) -> Any:
        """Return the model's output for x (N, …), computed `batch_size` samples at a time, as x's kind of array.

        `options` are further ones of `forward`. Nothing is kept for backward.

        Raises
        ------
        ValueError, TypeError
            As `forward`; an output of more than one array.
        """
        restore, data = dispatch.restorer(x), Arrays("predict", {"x": x, "mask": mask, "lengths": lengths}, batch_size)
        made: Any = None
        done = 0
        for batch in data.batches():
            y = _one_array(self, self.forward(batch.pop("x"), **batch, **options))
            if made is None:
                made = np.empty((data.count, *y.shape[1:]), y.dtype)
            made[done : done + len(y)] = y
            done += len(y)
        return restore(made)

    def _predict_batch(self, batch: Batch, training: bool) -> Any:
        """Return the output for a batch: `forward`, and what it has to know of the target."""
        inputs = {name: batch[name] for name in ("mask", "lengths") if name in batch}
        return self.forward(batch["x"], training=training, **inputs)

    def _fit_options(self) -> dict[str, Any]:
        """Return what a checkpoint should know of `_predict_batch`, as JSON holds it."""
        return {}


def _read(model: Trainable, op: str, given: Mapping[str, Any], batch_size: int, steps: int | None = None) -> Data:
    """Return the arrays or batches among what was `given`, checked."""
    for path, layer in _walk(model):
        if isinstance(layer, ConvLSTM2D) and (layer.time_major or layer.stateful):
            option = "time_major" if layer.time_major else "stateful"
            raise ValueError(f"{op}: {_told(path, layer)} has {option}=True, but batches are samples that are drawn "
                             f"anew, on the first axis; build it with {option}=False")  # fmt: skip
    return batches.read(op, given, batch_size, steps)


def _metrics(given: Any) -> dict[str, Callable[[Any, Any], Any]]:
    """Return the metrics by the names that their curves have."""
    listed = (given,) if isinstance(given, str) or callable(given) else tuple(given)
    named = {m if isinstance(m, str) else getattr(m, "__name__", type(m).__name__): metrics.get(m) for m in listed}
    if len(named) < len(listed) or (taken := {"loss", "learning_rate", "seconds"} & set(named)):
        wrong = f"{taken.pop()!r} is taken" if len(named) == len(listed) else "two have the same name"
        raise ValueError(f"metrics: {wrong}; the names are {', '.join(named)}")
    return named


class _Means:
    """Means over samples of the numbers that batches give."""

    def __init__(self, sums: Mapping[str, float] | None = None, samples: int = 0):
        self.sums, self.samples = dict(sums or {}), samples

    def add(self, samples: int, values: Mapping[str, float]) -> None:
        """Add what a batch of so many samples gave."""
        self.samples += samples
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + samples * value

    def values(self) -> dict[str, float]:
        """Return the means."""
        return {name: value / max(1, self.samples) for name, value in self.sums.items()}


def _evaluate(
    model: Trainable, loss: losses.Loss, named: Mapping[str, Callable[[Any, Any], Any]], data: Data
) -> dict[str, float]:
    means = _Means()
    for batch in data.batches():
        y = _one_array(model, model._predict_batch(batch, training=False))
        value = loss(y, batch["y"], batch.get("sample_weight"))
        means.add(len(batch["x"]), {"loss": value, **_measured(named, y, batch["y"])})
    return means.values()


def _measured(named: Mapping[str, Callable[[Any, Any], Any]], y: np.ndarray, target: np.ndarray) -> dict[str, float]:
    values = {}
    for name, metric in named.items():
        value = np.asarray(metric(y, target))
        if value.size != 1:
            raise ValueError(f"metrics: {name} must return one number, got an array of shape {value.shape}")
        values[name] = float(value.reshape(()))
    return values


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
    sums: dict[str, float] = field(default_factory=dict)
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
    metrics: dict[str, Callable[[Any, Any], Any]]
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
                # every one is called, whatever those before it returned
                progress.stopped |= any([callback(self.history) is True for callback in callbacks])
                self._save()
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
        means = _Means(progress.sums, progress.samples)
        for batch in self.data.batches(progress.epoch, progress.step, progress.seed if self.shuffle else None):
            means.add(len(batch["x"]), self._step(batch))
            progress.step += 1
            progress.sums, progress.samples = means.sums, means.samples
            progress.seconds = time.perf_counter() - start
            left = {} if time_limit is None else {"left": f"{max(0, limit - progress.seconds):.0f} s"}
            bar.set_postfix(loss=f"{means.values()['loss']:.4g}", **left, refresh=False)
            bar.update()
            if progress.seconds >= limit:
                break
            if self.checkpoint_every is not None and progress.step % self.checkpoint_every == 0:
                self._save()
        row = means.values()
        if self.validation is not None:
            measured = _evaluate(self.model, self.loss, self.metrics, self.validation)
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

    def _step(self, batch: Batch) -> dict[str, float]:
        """Move the parameters by one batch; return its loss and metrics."""
        model, parameters, states = self.model, self.model.parameters, _generator_states(self.model)
        try:
            y = _one_array(model, model._predict_batch(batch, training=True))
            value, dy = self.loss.value_and_gradient(y, batch["y"], batch.get("sample_weight"))
            value += model.penalty
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value}")
            measured = _measured(self.metrics, y, batch["y"])
            model.backward(dy)
            _forget(model)
            learning, gradients = model.trainable_parameters, model.get_gradients()
            if missing := sorted(set(learning) - set(gradients)):
                raise ValueError(f"fit: backward kept no gradient of {', '.join(missing)}; set store_gradients=True "
                                 f"on the layers they are of, or trainable=False")  # fmt: skip
            moved = self.optimizer.step(learning, gradients)
            model.set_parameters(model.parameters | moved)
            model.apply_constraints()
        except BaseException as error:
            model.set_parameters(parameters)
            _set_generator_states(model, states)
            if isinstance(error, FloatingPointError):
                where = f"epoch {self.progress.epoch + 1}, step {self.progress.step + 1}"
                raise FloatingPointError(
                    f"fit: at {where}, {error}; {self._origin(batch)}. The parameters are those before this step; "
                    f"lower the learning rate, give the optimizer a clip_norm, or look at the data"
                ) from error
            raise
        return {"loss": value, **measured}

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
        return f"it began in {found[0]}" if found else "all outputs and gradients are finite, not so their sums"

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
            "model": describe(self.model),
            "parameters": {name: [*a.shape, a.dtype.name] for name, a in self.model.parameters.items()},
            "trainable": list(self.model.trainable_parameters),
            "generators": sorted(_generators(self.model)),
            "optimizer": describe(self.optimizer),
            "loss": describe(self.loss) if isinstance(self.loss, Described) else "functions",
            "metrics": list(self.metrics),
            "data": self.data.told(),
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
            "learning_rate": rate if is_number(rate) else None,  # which may have been assigned to
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
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            model.set_parameters(parameters)
            optimizer.set_state(state)
            _set_generator_states(model, states)
            raise ValueError(f"{name} is damaged: {error}; delete it, or resume=False replaces it") from error
        if metadata["learning_rate"] is not None:
            optimizer.learning_rate = metadata["learning_rate"]
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
