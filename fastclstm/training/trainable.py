"""Training: fit, evaluate and predict, which `Sequential` and `EncoderForecaster` share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from inspect import CO_VARKEYWORDS
from typing import Any, ParamSpec, TypeVar

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.base import Layer
from fastclstm.layers.container import Container, told, walk
from fastclstm.layers.conv_recurrent import ConvRecurrent
from fastclstm.nn import is_number, optimizers
from fastclstm.nn.described import Description, describe
from fastclstm.nn.names import unknown_option
from fastclstm.training import batches
from fastclstm.training.batches import Arrays, Batch, Data, Ends, by_name, check_count, samples, spread
from fastclstm.training.fitting import Fitting, drawn, evaluate, forget
from fastclstm.training.history import EarlyStopping, History
from fastclstm.training.objective import as_made, listed, objective, outputs_of

P = ParamSpec("P")
R = TypeVar("R")

_OTHERS = {
    "verbose": "there is quiet=True for Keras's verbose=0",
    "learning_rate": "the optimizer has it: optimizer=Adam(learning_rate) of fastclstm.nn.optimizers",
    "lr": "the optimizer has it: optimizer=Adam(learning_rate) of fastclstm.nn.optimizers",
    "criterion": "it is called loss",
    "num_epochs": "it is called epochs",
}
"""Arguments that other libraries' methods have, and what stands for them."""
_SILENT = {"verbose": "nothing is printed; leave it out"}


def _names_others(others: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a method that is given an argument of another library's, or a slip of the pen, say what is meant."""

    def decorated(method: Callable[P, R]) -> Callable[P, R]:
        code = method.__code__
        known = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        takes_any = bool(code.co_flags & CO_VARKEYWORDS)

        @wraps(method)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name in others:
                    raise TypeError(f"{method.__name__} has no argument {name!r}; {others[name]}")
                if name not in known and not takes_any:
                    raise TypeError(unknown_option(method.__name__, name, known))
            return method(*args, **kwargs)

        return checked

    return decorated


class Trainable(Container):
    """A model that can be fitted to data."""

    _input_names: tuple[str, ...] | None = None
    _output_names: tuple[str, ...] | None = None

    @_names_others(_OTHERS)
    def fit(
        self, x: Any, y: Any = None, *, loss: Any = "mse", loss_weights: Any = None, optimizer: Any = "adam",
        epochs: int = 1, batch_size: int = 16, sample_weight: Any = None, mask: Any = None, lengths: Any = None,
        validation_split: float = 0.0, validation_data: Any = None, metrics: Any = (), shuffle: bool = True,
        seed: int | None = None, steps_per_epoch: int | None = None, time_limit: float | None = None,
        early_stopping: int | EarlyStopping | None = None, checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None, resume: bool = False,
        class_weight: Mapping[int, float] | None = None,
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
        sample_weight : array (N,), (N, T) or (N, T, H, W), optional
            Factors of the samples', the frames' or the pixels' loss: its axes are the first ones of the loss's values.
            What weighs 0 is left out: y may be NaN there, and the metrics of `fastclstm.nn.metrics` do not count it.
        mask, lengths : array (N, T) or (N,), optional
            As `Sequential` takes them. They decide what the layers do, not what the loss counts: that is
            ``sample_weight=mask``, though it still divides by the number of all frames. A ConvLSTM2D skips with a mask
            what is missing in x, even where that is NaN.
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
        class_weight : dict, optional
            Factor of each class in the loss, by its number, as in Keras; 1 for classes not named. For the
            crossentropies; it multiplies `sample_weight`, and does not count in the validation.
        callbacks : function or sequence of functions, optional
            Called with the `History` after each epoch; where one returns True, the training ends, to be resumed or not.
        quiet : bool, optional
            True: no progress bar. None: one on a terminal only. False: elsewhere a line every 30 seconds.

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
        >>> from fastclstm.layers import Dense
        >>> from fastclstm.models import Sequential
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
        _check_class_weight(class_weight)
        calls = listed("callbacks", callbacks)
        if not all(map(callable, calls)):
            raise TypeError(f"fit: callbacks must be functions of the History, got {callbacks!r}")
        training = Fitting(
            self, objective(self, loss, loss_weights, metrics, class_weight), optimizers.get(optimizer),
            data, validation, bool(shuffle), None if seed is None else int(seed),
            early_stopping, checkpoint, checkpoint_every,
        )  # fmt: skip
        try:
            return training.run(epochs, time_limit, resume, calls, quiet)
        finally:
            forget(self)

    @_names_others(_SILENT)
    def evaluate(
        self, x: Any, y: Any = None, *, loss: Any = "mse", loss_weights: Any = None, metrics: Any = (),
        batch_size: int = 16, sample_weight: Any = None, mask: Any = None, lengths: Any = None,
    ) -> dict[str, float]:  # fmt: skip
        """Return ``{"loss": …}`` and the metrics: means over the batches, weighted by their sizes, without penalties.

        Nothing is kept for backward. Parameters, also batches instead of arrays, and errors are those of `fit`.

        Examples
        --------
        >>> from fastclstm.layers import Activation
        >>> from fastclstm.models import Sequential
        >>> x = np.linspace(0, 1, 5)[:, None]
        >>> Sequential([Activation("linear")]).evaluate(x, x + 1, metrics="mae")
        {'loss': 1.0, 'mae': 1.0}
        """
        given = {"x": x, "y": y, "sample_weight": sample_weight, "mask": mask, "lengths": lengths}
        data = _read(self, "evaluate", given, batch_size)
        return evaluate(self, objective(self, loss, loss_weights, metrics), drawn(self, data))

    @_names_others(_SILENT)
    def predict(self, x: Any, batch_size: int = 16, *, mask: Any = None, lengths: Any = None, **options: Any) -> Any:
        """Return the model's output for x (N, …), computed `batch_size` samples at a time, as x's kind of array.

        `options` are further ones of `forward`. Nothing is kept for backward.

        Raises
        ------
        ValueError, TypeError
            As `forward`; an output of more than one array.
        """
        _check_layers(self, "predict")
        given = spread("predict", {"x": x, "mask": mask, "lengths": lengths}, self._ends)
        as_given, data = dispatch.restorer(next(iter(given.values()))), Arrays("predict", given, batch_size)
        made: dict[str, np.ndarray] = {}
        done = 0
        for batch in drawn(self, data):
            others = {name: batch[name] for name in ("mask", "lengths") if name in batch}
            y = self.forward(self._x_of(batch), **others, **options)
            for name, part in outputs_of(self, y).items():
                if name not in made:
                    made[name] = np.empty((data.count, *part.shape[1:]), part.dtype)
                made[name][done : done + len(part)] = part
            done += samples(batch)
        return as_made(self, y, {name: as_given(array) for name, array in made.items()})

    def _check_batch(self, op: str, batch: Batch) -> None:
        """Raise ValueError where the batch is none for this model; what else is wrong, forward says."""

    def _begin_step(self, seed: int, epoch: int, step: int) -> None:
        """Hear where a training is, before each step, and what to draw from: a seed of the whole training."""

    def _predict_batch(self, batch: Batch, training: bool) -> Any:
        """Return the output for a batch: `forward`, and what it has to know of the target."""
        inputs = {name: batch[name] for name in ("mask", "lengths") if name in batch}
        return self.forward(self._x_of(batch), training=training, **inputs)

    def _x_of(self, batch: Batch) -> Any:
        """Return the inputs in a batch, as `forward` takes them."""
        return batch["x"] if self._input_names is None else [batch[f"x:{name}"] for name in self._input_names]

    @property
    def _ends(self) -> Ends:
        return {"x": self._input_names, "y": self._output_names, "sample_weight": self._output_names}

    def _fit_options(self) -> dict[str, Any]:
        """Return what a checkpoint should know of `_predict_batch`, as JSON holds it."""
        return {}

    def _described(self) -> Description:
        return describe(self)

    def _walk(self) -> Iterator[tuple[str, Layer]]:
        return walk(self)


def _read(model: Trainable, op: str, given: Mapping[str, Any], batch_size: int, steps: int | None = None) -> Data:
    """Return the arrays or batches among what was `given`, checked."""
    _check_layers(model, op)
    data = batches.read(op, given, batch_size, steps, model._ends)
    if isinstance(data, Arrays):
        next(drawn(model, data))
    return data


def _check_layers(model: Trainable, op: str) -> None:
    """Raise ValueError where a layer has the samples on another axis, or goes on from those before."""
    for path, layer in walk(model):
        if isinstance(layer, ConvRecurrent) and (layer.time_major or layer.stateful):
            option = "time_major" if layer.time_major else "stateful"
            raise ValueError(f"{op}: {told(path, layer)} has {option}=True, but batches are samples that are drawn "
                             f"anew, on the first axis; build it with {option}=False")  # fmt: skip


def _check_class_weight(given: Any) -> None:
    """Raise TypeError or ValueError unless `given` is None or a dict of factors."""
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise TypeError(f"fit: class_weight must be a dict from class numbers to factors, got {type(given).__name__}")
    for label, factor in given.items():
        if not (isinstance(label, int | np.integer) and is_number(factor) and factor >= 0):
            raise ValueError(f"fit: class_weight must map class numbers to factors >= 0, got {label!r}: {factor!r}")
