"""What all layers share: options, parameters, gradients, and the way to and from files."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from fastclstm import dispatch
from fastclstm.engines import remembered
from fastclstm.io import weights
from fastclstm.io.bounds import shown
from fastclstm.layers import symbolic, torch_weights
from fastclstm.nn import constraints, initializers, regularizers
from fastclstm.nn.constraints import Constraint
from fastclstm.nn.described import Described, anew, class_name, describe, is_tellable, plain, restore
from fastclstm.nn.names import with_article
from fastclstm.nn.regularizers import Regularizer
from fastclstm.spec import Shape, choice, expect_shape

DTYPES = ("float32", "float64")

_promised: ContextVar[list[int] | None] = ContextVar("_promised", default=None)
"""How many parameters may still be made without being drawn; None: they are drawn."""
_MISSING = 100


@contextmanager
def uninitialized(arrays: int = sys.maxsize) -> Iterator[None]:
    """Build layers whose parameters have their shapes but no memory, to be assigned at once.

    There are `arrays` for them. Where some are missing, `set_parameters` names these; far more are not built at all.
    """
    token = _promised.set([arrays + _MISSING])
    try:
        yield
    finally:
        _promised.reset(token)


def expect_parameters(op: str, count: int) -> None:
    """Raise ValueError where `count` more parameters are not to be, before any is built."""
    left = _promised.get()
    if left is not None and count > left[0]:
        raise ValueError(f"{op}: the options ask for far more parameters than there are arrays")


class Parameter:
    """An attribute of a layer that is an array: read-only, and replaced as a whole when assigned to."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, layer: Layer | None, owner: type | None = None) -> Any:
        return self if layer is None else layer._parameters.get(self._name)

    def __set__(self, layer: Layer, value: Any) -> None:
        layer._parameters[self._name] = layer._checked(self._name, value)


_WIDTH, _CHANNELS = ("out_channels", "hidden_channels", "out_features", "units"), ("in_channels", "in_features")
_OF_OTHERS = {
    "filters": _WIDTH, "units": _WIDTH, "hidden_dim": _WIDTH, "hidden_size": _WIDTH,
    "input_shape": _CHANNELS, "batch_input_shape": _CHANNELS, "input_dim": _CHANNELS, "input_size": _CHANNELS,
    "strides": ("stride",), "dilation_rate": ("dilation",), "bias": ("use_bias",),
}  # fmt: skip
"""Names of Keras's and PyTorch's options, with what they may be called here."""


@dataclass(eq=False, repr=False)
class Layer(Described):
    """A layer: called on an array, it returns one; called on a symbol, it becomes part of a graph: see `Model`.

    A subclass is a dataclass whose fields are its options, under the names of the constructor's arguments. Its
    parameters are read-only arrays of NumPy, and change by assignment only: that gives engines a sign when packed
    copies of them are out of date. `get_gradients` returns NumPy's too, wherever the layer computes. A training call
    keeps what `backward` needs, the caller's own arrays included: they must not change until then.

    An x on a GPU, by DLPack or __cuda_array_interface__, is computed there, on its owner's stream and without copies:
    by the ConvLSTM, convolution (transposed ones too) and maximum pooling layers, by activations with a name, by
    dropout, Flatten, Reshape, Permute, Concatenate, Add, Subtract, Multiply, Average, TimeDistributed, Sequential and
    EncoderForecaster. It must be C-contiguous and of the layer's dtype; other layers
    refuse it. With engine="cuda" arrays of NumPy are put on the GPU once and results got back once.

    Parameters
    ----------
    name : str, optional
        Under which a `Model` has the layer. None: that of its class, with a number where there are several.

    Attributes
    ----------
    trainable : bool
        False freezes the parameters, those of inner layers too: `backward` still returns the gradient of the input,
        `get_gradients` nothing, and penalties and constraints leave them alone. Saved with the layer.
    gradient_scale : float
        Multiplies the gradient that `backward` hands to what stands before. 1 at first.
    store_gradients : bool
        False: `backward` keeps no gradients of the parameters for `get_gradients`.
    input_gradient : bool
        False: nobody asks for the gradient of the input, as of a network's first layer, and `backward` returns None
        where leaving it out saves work: in the ConvLSTM and convolution layers, and in models that begin with them.
    """

    name: str | None = field(default=None, kw_only=True)

    _elsewhere: ClassVar[Mapping[str, tuple[str, ...]]] = _OF_OTHERS
    _symbolic_options: ClassVar[frozenset[str]] = frozenset()
    """Arguments, beside the first, that may be symbols."""

    def __post_init__(self) -> None:
        for name, value in self.options.items():
            setattr(self, name, plain(value))
        symbolic.checked_name(type(self).__name__, self.name)
        _check_seed(type(self).__name__, self.options.get("seed"))
        self.trainable = True
        self.gradient_scale = 1.0
        self.store_gradients = True
        self.input_gradient = True
        self._parameters: dict[str, np.ndarray] = {}
        self._statistics: set[str] = set()
        self._regularizers: dict[str, Regularizer] = {}
        self._constraints: dict[str, Constraint] = {}
        self._sublayers: dict[str, Layer] = {}
        self._gradients: dict[str, Any] = {}
        self._pullback: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        gradients = {name: dispatch.to_numpy(array) for name, array in self._gradients.items()}
        return self.__dict__ | {"_pullback": None, "_gradients": gradients}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._parameters = {name: remembered.immutable(array) for name, array in self._parameters.items()}

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)
        shown = [(f.name, getattr(self, f.name)) for f in fields if not _same(getattr(self, f.name), f.default)]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown)})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return `forward` of the same arguments; where these are symbols, symbols of what that would return."""
        if symbolic.has_symbols(args, kwargs):
            return symbolic.call(self, args, kwargs)
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer's output."""
        raise NotImplementedError

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Pull the gradient of the last training call's output back to its input, keeping those of the parameters."""
        raise NotImplementedError

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the shape of the output for an input of `input_shape`."""
        raise NotImplementedError

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments, by name; without `name` where there is none."""
        return {key: value for key, value in super().options.items() if key != "name" or value is not None}

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return `options`, under the name by which scikit-learn asks for them."""
        return self.options

    def __sklearn_clone__(self) -> Self:
        """Return what ``sklearn.base.clone`` is to: the layer as its options make it, with parameters drawn anew."""
        return anew(self)

    def _call_shapes(self, x: Any, **options: Any) -> Any:
        """Return the shapes of what a call returns, in tuples and lists as there, for x of known shape or shapes.

        Of `options` that are symbols there are the shapes, in which sizes may be None.
        """
        return self.output_shape(x)

    def _pull_call(self, dy: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the gradients of x and of the `options` of the last training call, by name, for those of its results.

        These are in tuples and lists as the results were, and None for what nothing depends on.
        """
        return self.backward(dy), {}

    def _unfit(self) -> str | None:
        """Return why the layer cannot stand in a network, called on one array to return some; None where it can."""
        return None

    def _several_outputs(self) -> str | None:
        """Return what to change so that the layer returns one array; None where it does."""
        return None

    def _knows_gpu(self, training: bool) -> bool:
        """Return whether the layer, as its options are, computes on a GPU from end to end."""
        return False

    def get_gradients(self) -> dict[str, np.ndarray]:
        """Return the gradients that the last `backward` left, under the names of `trainable_parameters`.

        Those of regularized parameters include the gradient of their penalty.
        """
        self._gradients = {name: dispatch.to_numpy(array) for name, array in self._gradients.items()}
        return self._kept_gradients()

    def _kept_gradients(self) -> dict[str, Any]:
        """Return what `get_gradients` does, wherever it was computed."""
        return {name: self._gradients[name] for name in self.trainable_parameters if name in self._gradients}

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """Name of each parameter and its array, read-only; `set_parameters` changes them."""
        return {name: owner._parameters[key] for name, (owner, key) in self._owners().items()}

    @property
    def trainable_parameters(self) -> dict[str, np.ndarray]:
        """The `parameters` that have gradients: neither frozen nor statistics, such as a moving mean."""
        if not self.trainable:
            return {}
        own = {name: array for name, array in self._parameters.items() if name not in self._statistics}
        return own | {f"{prefix}.{name}": array for prefix, layer in self._sublayers.items()
                      for name, array in layer.trainable_parameters.items()}  # fmt: skip

    @property
    def num_parameters(self) -> int:
        """Number of values in all parameters together."""
        return sum(array.size for array in self.parameters.values())

    @property
    def penalty(self) -> float:
        """Sum of the regularizers' penalties on the parameters that are not frozen, to be added to the loss."""
        if not self.trainable:
            return 0.0
        own = sum(regularizer(self._parameters[name]) for name, regularizer in self._regularizers.items())
        return float(own + sum(layer.penalty for layer in self._sublayers.values()))

    def apply_constraints(self) -> None:
        """Bring the parameters that are not frozen to where their constraints want them, after an optimizer's step."""
        if not self.trainable:
            return
        for name, constraint in self._constraints.items():
            setattr(self, name, constraint(self._parameters[name]))
        for layer in self._sublayers.values():
            layer.apply_constraints()

    def set_parameters(self, arrays: Mapping[str, Any]) -> None:
        """Replace all parameters: `arrays` has the names and shapes of `parameters`. After an error none is changed.

        Raises
        ------
        ValueError
            A missing or unknown name, or another shape.
        TypeError
            Anything but real arrays.
        """
        owners = self._owners()
        missing, unknown = sorted(set(owners) - set(arrays)), sorted(set(arrays) - set(owners))
        if missing or unknown:
            raise ValueError(
                f"{type(self).__name__}: the parameters are {shown(owners)}; "
                f"missing {shown(missing)}, unknown {shown(unknown)}"
            )
        checked = {name: owner._checked(key, arrays[name], name) for name, (owner, key) in owners.items()}
        for name, (owner, key) in owners.items():
            owner._parameters[key] = checked[name]

    def load_torch(
        self, source: Any, prefix: str = "", *, key: str | None = None, flattened: tuple[int, ...] | None = None
    ) -> Self:
        """Take the weights of PyTorch's Conv2d, BatchNorm2d, Linear and the like; return the layer itself.

        The layer's options are to be those of PyTorch's, as weights do not tell them: epsilon above all, which is 1e-5
        there. Nothing in a file is run, and PyTorch is not needed.

        Parameters
        ----------
        source : path, mapping or module
            As in `fastclstm.convert.torch.from_torch`.
        prefix : str
            What stands before the names of the weights, as in "encoder.0." or "encoder.0".
        key : str, optional
            Where in a checkpoint the state_dict is.
        flattened : tuple of int, optional
            Of a Dense after Flatten, the sizes (C, H, W) of the frames, or (T, C, H, W), that PyTorch flattened: there
            channels come first. Leave it out where frames are channels_first in ours too.

        Warns
        -----
        UserWarning
            An epsilon that is not PyTorch's usual one.

        Raises
        ------
        OSError
            The file cannot be read.
        ValueError
            Missing or unknown weights, other shapes, a layer that PyTorch has no counterpart of.
        TypeError
            A source that is none, tensors that are not of real numbers.

        Examples
        --------
        >>> from fastclstm import Dense
        >>> weights = {"head.weight": np.ones((2, 3)), "head.bias": np.zeros(2)}
        >>> Dense(3, 2).load_torch(weights, "head.")([[1.0, 2.0, 3.0]])
        array([[6., 6.]], dtype=float32)
        """
        torch_weights.load(self, source, prefix, key=key, flattened=flattened)
        return self

    def save(self, path: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> None:
        """Write options and parameters to a safetensors file, whole or not at all.

        Options given as functions (activations, initializers) cannot be written; `load` asks for those that matter. A
        seed that is a Generator is not written either.

        Parameters
        ----------
        path : path
        about : mapping, optional
            What else is to be known of it, such as the data that it was trained on: anything that JSON can hold. It is
            found in ``fastclstm.io.weights.load(path)[1]["about"]``.

        Raises
        ------
        OSError
            The file cannot be written.
        """
        told: dict[str, Any] = describe(self) | {"frozen": self._frozen()}
        weights.save(path, self.parameters, told if about is None else told | {"about": dict(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Return the layer that `save` wrote; `options` replace those in the file.

        Raises
        ------
        OSError
            The file is missing or cannot be read.
        ValueError
            A damaged or foreign file, another class of layer, parameters that do not fit the options.
        """
        arrays, metadata = weights.load(path)
        name, own = os.fspath(path), class_name(cls)
        if metadata.get("class") != own:
            held = with_article(str(metadata.get("class")))
            raise ValueError(f"{name} holds {held}, not {with_article(own)}; load it with that class, or with "
                             f"fastclstm.load")  # fmt: skip
        return cls._restored(name, arrays, metadata, options)

    @classmethod
    def _restored(
        cls, name: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Self:
        """Return the layer that the contents of the file `name` describe."""
        try:
            with uninitialized(len(arrays)):
                layer: Self = restore(metadata, **options)
            layer.set_parameters(arrays)
            for place in metadata.get("frozen", ()):
                layer._part(place).trainable = False
        except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{name} does not fit: {error}") from error
        return layer

    def _frozen(self) -> list[str]:
        """Return the places of the layers in here that are frozen; "" is this one."""
        inner = ((name, place) for name, layer in self._sublayers.items() for place in layer._frozen())
        return [""] * (not self.trainable) + [f"{name}/{place}" for name, place in inner]

    def _part(self, place: str) -> Layer:
        """Return the layer at a place that `_frozen` returned."""
        name, _, rest = place.partition("/")
        return self._sublayers[name]._part(rest) if place else self

    def _owners(self) -> dict[str, tuple[Layer, str]]:
        """Full name of each parameter -> the layer that has it and its name there."""
        own = {name: (self, name) for name in self._parameters}
        return own | {f"{prefix}.{name}": owner for prefix, layer in self._sublayers.items()
                      for name, owner in layer._owners().items()}  # fmt: skip

    def _add_parameter(
        self, name: str, shape: Shape, initializer: Any, rng: np.random.Generator, dtype: str, *,
        regularizer: Any = None, constraint: Any = None, statistic: bool = False,
    ) -> None:  # fmt: skip
        """Make the parameter `name`; the options are what `nn`'s `get` takes, a statistic has no gradient."""
        try:
            initializer = initializers.get(initializer)
            if regularizer is not None:
                self._regularizers[name] = regularizers.get(regularizer)
            if constraint is not None:
                self._constraints[name] = constraints.get(constraint)
            if statistic:
                self._statistics.add(name)
            self._parameters[name] = np.broadcast_to(np.zeros((), dtype), shape)  # the shape, without its memory
            expect_parameters(type(self).__name__, 1)
            if (left := _promised.get()) is not None:
                left[0] -= 1
            else:
                self._parameters[name] = self._checked(name, initializer(shape, rng, dtype))
                for function in (self._regularizers.get(name), self._constraints.get(name)):
                    if function is not None:  # one that does not fit fails now
                        function(self._parameters[name])
        except (TypeError, ValueError) as error:
            op = type(self).__name__
            raise error if str(error).startswith(op) else type(error)(f"{op}: {name}: {error}") from error

    def _checked(self, key: str, value: Any, name: str | None = None) -> np.ndarray:
        """Return `value` as a new read-only array that can replace the parameter `key`."""
        op = type(self).__name__
        if key not in self._parameters:
            raise ValueError(f"{op}: this layer has no {key}; its parameters are {', '.join(self._parameters)}")
        old = self._parameters[key]
        array = dispatch.as_numpy(op, name or key, value)
        expect_shape(op, name or key, array.shape, old.shape, "fixed by the layer's options")
        return remembered.immutable(array.astype(old.dtype, copy=False))

    def _keep_gradients(self, gradients: Mapping[str, np.ndarray]) -> None:
        """Keep for `get_gradients` those of `gradients`, by full name, that are of trainable parameters."""
        owners, kept = self._owners(), self.trainable_parameters if self.store_gradients else ()
        self._gradients = {name: penalized(*owners[name], gradients[name]) for name in kept}

    def _collect_gradients(self) -> None:
        """Keep for `get_gradients` what the inner layers' own `backward` left there."""
        gradients = {f"{prefix}.{name}": array for prefix, layer in self._sublayers.items()
                     for name, array in layer._kept_gradients().items()}  # fmt: skip
        kept = self.trainable_parameters if self.store_gradients else ()
        self._gradients = {name: gradients[name] for name in kept if name in gradients}

    def _recorded(self) -> Callable[..., Any]:
        """Return what the last call left for `backward`."""
        pullback = self._pullback
        if pullback is None:
            name = type(self).__name__
            raise RuntimeError(f"{name}: backward needs what a training call keeps; first call layer(x, training=True)")
        if self.gradient_scale == 1:
            return pullback

        def scaled(*gradients: Any) -> Any:
            before = pullback(*gradients)
            if before is None:  # nobody asked
                return None
            if isinstance(before, tuple):  # the gradient of the input, then those of states
                return dispatch.scaled(before[0], self.gradient_scale), *before[1:]
            return symbolic.mapped(lambda dx: dispatch.scaled(dx, self.gradient_scale), before)

        return scaled


@contextmanager
def without_input_gradient(layer: Any) -> Iterator[None]:
    """Tell a layer, or what training takes for a model, that nobody asks for the gradient of its input."""
    asked, layer.input_gradient = getattr(layer, "input_gradient", True), False
    try:
        yield
    finally:
        layer.input_gradient = asked


def penalized(owner: Layer, key: str, gradient: Any) -> Any:
    """Return the gradient of a layer's parameter with that of its penalty."""
    regularizer = owner._regularizers.get(key)
    return gradient if regularizer is None else gradient + regularizer.gradient(owner._parameters[key])


def layer_dtype(op: str, dtype: Any) -> str:
    """Return the name of a layer's dtype; raise ValueError unless it is float32 or float64."""
    try:
        name = "None" if dtype is None else np.dtype(dtype).name  # to NumPy None is float64
    except (TypeError, ValueError, SyntaxError):  # it parses texts
        name = dtype
    choice(op, "dtype", name, DTYPES)
    return name


def _check_seed(op: str, seed: Any) -> None:
    try:
        np.random.default_rng(seed)
    except (TypeError, ValueError):
        expected = "None, an integer >= 0 or a numpy.random.Generator"
        raise TypeError(f"{op}: seed must be {expected}, got {seed!r}") from None


def _same(value: Any, default: Any) -> bool:
    return value is default or (is_tellable(value) and is_tellable(default) and value == default)
