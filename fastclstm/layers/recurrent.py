"""What recurrent layers over sequences of vectors (B, T, N) share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.base import Layer, Parameter, layer_dtype
from fastclstm.layers.masks import steps_mask
from fastclstm.layers.place import place_of
from fastclstm.layers.recurrent_cell import own_generator
from fastclstm.layers.symbolic import fits, is_shape
from fastclstm.nn import activations
from fastclstm.spec import Shape, expect_shape, flag, integers, rate

States = tuple[Any, ...]


@dataclass(eq=False, repr=False)
class Recurrent(Layer):
    """A recurrent layer over vectors; a subclass has `_gates`, `_state_names`, `_bias_shape` and `_run`."""

    in_features: int
    units: int
    activation: Any = "tanh"
    recurrent_activation: Any = "sigmoid"
    _: KW_ONLY
    use_bias: bool = True
    kernel_initializer: Any = "glorot_uniform"
    recurrent_initializer: Any = "orthogonal"
    bias_initializer: Any = "zeros"
    kernel_regularizer: Any = None
    recurrent_regularizer: Any = None
    bias_regularizer: Any = None
    kernel_constraint: Any = None
    recurrent_constraint: Any = None
    bias_constraint: Any = None
    dropout: float = 0.0
    recurrent_dropout: float = 0.0
    return_sequences: bool = True
    return_state: bool = False
    go_backwards: bool = False
    stateful: bool = False
    dtype: Any = "float32"
    seed: int | np.random.Generator | None = None

    _symbolic_options: ClassVar[frozenset[str]] = frozenset({"initial_state", "mask", "lengths"})

    kernel = Parameter()
    recurrent_kernel = Parameter()
    bias = Parameter()
    _gates: ClassVar[int]
    _state_names: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        (self.in_features,) = integers(op, "in_features", self.in_features, 1, 1)
        (self.units,) = integers(op, "units", self.units, 1, 1)
        for name in ("use_bias", "return_sequences", "return_state", "go_backwards", "stateful"):
            flag(op, name, getattr(self, name))
        for name in ("dropout", "recurrent_dropout"):
            rate(op, name, getattr(self, name))
        for name in ("activation", "recurrent_activation"):
            try:
                activations.get(getattr(self, name))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{op}: {name}: {error}") from None
        self.dtype = layer_dtype(op, self.dtype)
        rng = np.random.default_rng(self.seed)
        self._dropout_rng = own_generator(rng)
        width = self._gates * self.units
        for name, prefix, shape, initializer in (
            ("kernel", "kernel", (self.in_features, width), self.kernel_initializer),
            ("recurrent_kernel", "recurrent", (self.units, width), self.recurrent_initializer),
            ("bias", "bias", self._bias_shape(), self._drawn_bias()),
        ):
            if name != "bias" or self.use_bias:
                self._add_parameter(name, shape, initializer, rng, self.dtype,
                                    regularizer=self.options[f"{prefix}_regularizer"],
                                    constraint=self.options[f"{prefix}_constraint"])  # fmt: skip
        self.state_gradients: list[States] | None = None
        self._states: States | None = None

    def _bias_shape(self) -> Shape:
        return (self._gates * self.units,)

    def _drawn_bias(self) -> Any:
        return self.bias_initializer

    @property
    def states(self) -> list[States] | None:
        """Where stateful: the states that the next call starts from."""
        return None if self._states is None else [tuple(array.copy() for array in self._states)]

    def reset_state(self) -> None:
        """Forget the states: the next call starts from zeros."""
        self._states = None

    def forward(
        self, x: Any, initial_state: Any = None, mask: Any = None, lengths: Any = None, training: bool = False
    ) -> Any:
        """Return the hidden sequence (B, T, units), or the last step's alone, with return_state (that, [states]).

        Parameters
        ----------
        x : array (B, T, in_features)
            Any real dtype; converted to the layer's.
        initial_state : list of one tuple of arrays (B, units), optional
            As with return_state they are returned; the tuple itself will do. None is zeros.
        mask : array of bool (B, T), optional
            Where False, the step is skipped: states are carried on and the previous output is repeated (zeros before
            the first valid step).
        lengths : array of int (B,), optional
            Instead of a mask: the number of valid steps at the start of each sequence, 0 to T.
        training : bool
            Keep what `backward` needs, and apply dropout.

        Raises
        ------
        ValueError
            Shapes that do not fit the layer; both mask and lengths.
        TypeError
            Anything but real arrays; arrays on a GPU.
        """
        op = type(self).__name__
        place = place_of(self, x, training)
        array = place.read("x", x)
        shape = self.output_shape(array.shape)
        B, T, _ = array.shape
        sequence = dispatch.native(array, np.dtype(self.dtype))
        given = None if mask is None else dispatch.as_numpy(op, "mask", mask)
        steps = steps_mask(given, lengths, (B, T), op)
        states = self._initial(initial_state, B)
        if self.go_backwards:
            sequence = np.ascontiguousarray(sequence[:, ::-1])
            steps = None if steps is None else steps[:, ::-1]
        kept = self._draw(self.dropout if training else 0, (B, 1, self.in_features))
        met = self._draw(self.recurrent_dropout if training else 0, (B, self.units))
        self._pullback = None
        output, last, pull = self._run(sequence if kept is None else sequence * kept, states, steps, met)
        if self.stateful:
            self._states = tuple(array.copy() for array in last)

        def pullback(dy: Any, dstates: Any = None) -> Any:
            cotangent = None
            if dy is not None:
                read = place.read("dy", dy)
                expect_shape(op, "dy", read.shape, shape, "the shape of the output")
                cotangent = dispatch.native(read, np.dtype(self.dtype))
                if not self.return_sequences:
                    whole = np.zeros(output.shape, output.dtype)
                    whole[:, -1] = cotangent
                    cotangent = whole
            gradients, before = pull(cotangent, self._tuple("dstates", dstates, B))
            self.state_gradients = None if initial_state is None else [tuple(map(place.restore, before))]
            dx = gradients.pop("x")
            self._keep_gradients(gradients)
            dx = dx if kept is None else dx * kept
            return place.restore(np.ascontiguousarray(dx[:, ::-1]) if self.go_backwards else dx)

        if training:
            self._pullback = pullback
        y = place.restore(output if self.return_sequences else np.ascontiguousarray(output[:, -1]))
        return (y, [tuple(map(place.restore, last))]) if self.return_state else y

    def backward(self, dy: Any, dstates: Any = None) -> Any:
        """Return dx of the last call, which was a training call.

        Parameters
        ----------
        dy : array of the output's shape, or None for zeros
        dstates : optional
            Gradients of the last states, in initial_state's form. Those of the initial states, where some were given,
            are `state_gradients` then.

        Raises
        ------
        RuntimeError
            The last call was not a training call.
        ValueError
            A gradient has not the shape of what it belongs to.
        """
        return self._recorded()(dy, dstates)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return the shape of the output for an x of `input_shape`; raise ValueError where that does not fit."""
        op, shape = type(self).__name__, tuple(input_shape)
        if len(shape) != 3 or shape[2] != self.in_features:
            raise ValueError(f"{op}: x must be (batch, time, {self.in_features}) since in_features is "
                             f"{self.in_features}, got shape {shape}; Reshape or TimeDistributed(Flatten()) makes "
                             f"frames to vectors")  # fmt: skip
        if shape[1] == 0:
            raise ValueError(f"{op}: x has no time steps {shape}; at least one is needed")
        return (*shape[:2], self.units) if self.return_sequences else (shape[0], self.units)

    def _call_shapes(
        self, x: Any, *, initial_state: Any = None, mask: Any = None, lengths: Any = None, **options: Any
    ) -> Any:
        op, output = type(self).__name__, self.output_shape(x)
        state = (x[0], self.units)
        for name, given, expected in (
            *(("initial_state", s, state) for s in self._in_order(initial_state, is_shape)),
            ("mask", mask, x[:2]),
            ("lengths", lengths, x[:1]),
        ):
            if given is not None and not fits(given, expected):
                raise ValueError(f"{op}: {name} has shape {given} but must be {expected}, as x is {x}")
        return (output, [(state,) * len(self._state_names)]) if self.return_state else output

    def _pull_call(self, dy: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        dx = self.backward(*dy) if self.return_state else self.backward(dy)
        given, gradients = options.get("initial_state"), self.state_gradients
        if gradients is None or not isinstance(given, list | tuple):
            return dx, {"initial_state": None if gradients is None else gradients[0][0]}
        within = len(given) == 1 and isinstance(given[0], list | tuple)
        return dx, {"initial_state": gradients if within else gradients[0]}

    def _several_outputs(self) -> str | None:
        return "give it return_state=False" if self.return_state else None

    def _run(
        self, x: np.ndarray, states: States, mask: np.ndarray | None, dropout: np.ndarray | None
    ) -> tuple[np.ndarray, States, Callable[[Any, States], tuple[dict[str, Any], States]]]:
        """Return the sequence, the last states, and a pullback of (dy, dstates) to the gradients and dstates before."""
        raise NotImplementedError

    def _draw(self, rate: float, shape: Shape) -> np.ndarray | None:
        """Draw an inverted dropout mask, the same for all steps and gates; None where nothing is dropped."""
        if not rate:
            return None
        kept = self._dropout_rng.random(shape, np.float32) >= rate
        return (kept / (1 - rate)).astype(self.dtype)

    def _initial(self, value: Any, B: int) -> States:
        held = self._states
        if value is not None or not self.stateful or held is None:
            return self._tuple("initial_state", value, B)
        if len(held[0]) != B:
            raise ValueError(
                f"{type(self).__name__}: the states kept from the last call are of {len(held[0])} samples, but x has "
                f"{B}; call reset_state() before another batch, or leave stateful out"
            )
        return held

    def _tuple(self, name: str, value: Any, B: int) -> States:
        """Return states, or their gradients, that a caller gives, as arrays of the layer's dtype or None."""
        op, names = type(self).__name__, self._state_names
        value = self._in_order(value, lambda item: not isinstance(item, list | tuple), name)
        read = []
        for state, array in zip(names, value, strict=True):
            if array is not None:
                array = dispatch.as_numpy(op, f"{name} {state}", array)
                expect_shape(op, f"{name} {state}", array.shape, (B, self.units), "(batch, units)")
                array = dispatch.native(array, np.dtype(self.dtype))
            read.append(array)
        return tuple(read)

    def _in_order(self, value: Any, is_one: Callable[[Any], bool], name: str = "initial_state") -> Sequence[Any]:
        """Return states in the order of their names, given as a list of one tuple, as a tuple, or by itself."""
        names = self._state_names
        if value is None:
            return (None,) * len(names)
        if isinstance(value, list | tuple) and len(value) == 1 and not is_one(value) and not is_one(value[0]):
            value = value[0]
        if len(names) == 1 and is_one(value):
            value = (value,)
        if not isinstance(value, list | tuple) or is_one(value) or len(value) != len(names):
            came = f"{len(value)} items" if isinstance(value, list | tuple) else type(value).__name__
            raise ValueError(f"{type(self).__name__}: {name} must be ({', '.join(names)}), each (batch, units) or "
                             f"None, got {came}")  # fmt: skip
        return value
