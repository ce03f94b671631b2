"""Our operations as the graphs of other frameworks call them back: NumPy's arrays in, NumPy's arrays out.

A framework whose graph runs outside of Python (JAX, TensorFlow) calls back with plain arrays, and cannot hold what the
way there saves for the way back. That is kept here, under a number which goes through the graph instead. Nobody tells
when a number is lost, so only the last `KEPT` calls are kept; where one is gone, or is used twice, the way back takes
the steps forward again from the inputs, which the graph keeps.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from fastclstm import dispatch, functional
from fastclstm.nn import activations, normalization
from fastclstm.nn.names import unknown_option
from fastclstm.spec import CELL_STATES, CellSpec, ConvLSTMSpec, ConvSpec, PoolSpec, choice, flag

KEPT = 16
"""How many calls' savings wait for their way back."""

Shape = tuple[int, ...]
Arrays = Sequence[np.ndarray]

_saved: dict[int, list[Any]] = {}
_lock = threading.Lock()
_numbers = itertools.count(1)


class Operation(NamedTuple):
    """What is known of an operation."""

    forward: Callable[..., Any]
    vjp: Callable[..., Any]
    shapes: Callable[[Mapping[str, Shape], dict[str, Any]], list[Shape]]
    """Of the outputs, from the shapes of the arrays and the options; raises what does not fit together."""
    own: dict[str, Any]
    """Options that are always these."""
    states: tuple[str, ...] = ()
    """What its initial state is made of."""


@cache
def _options_of(op: str) -> list[str]:
    """Names of the options that a call may have."""
    operation = OPERATIONS[op]
    named = [*inspect.signature(operation.forward).parameters, *inspect.signature(operation.vjp).parameters]
    return sorted(set(named) - {*_NO_OPTIONS, *operation.own})


_NO_OPTIONS = ("x", "kernel", "recurrent_kernel", "bias", "initial_state", "mask", "peephole", "normalization_weights",
               "dropout_masks", "options", "return_indices")  # fmt: skip
"""Arguments of the functions that are arrays, or that a graph cannot have."""


def _recurrent_shapes(op: str, cell: str, shapes: Mapping[str, Shape], options: dict[str, Any]) -> list[Shape]:
    lstm = cell == "lstm"
    known = {name: value for name, value in options.items()
             if name not in (("algorithm", "engine", "recompute") if lstm else ("algorithm", "engine"))}  # fmt: skip
    for name in _ACTIVATIONS[cell]:
        usual = "sigmoid" if name.startswith("recurrent") else "tanh"
        known[name] = activations.get(usual if known.get(name) is None else known[name])
    if known.get("normalization") is not None:
        known["normalization"] = normalization.get(known["normalization"])
    singles: dict[str, Any] = {f"{name}_shape": shape for name, shape in shapes.items() if "." not in name}
    mappings: dict[str, Any] = {}
    for name, shape in shapes.items():
        if "." in name:
            mappings.setdefault(_MAPPING_SHAPES[name.partition(".")[0]], {})[name.partition(".")[2]] = shape
    if lstm:
        spec: Any = ConvLSTMSpec.infer(**singles, **mappings, **known)
    else:
        states = {name: singles.pop(f"{name}_shape") for name in CELL_STATES[cell] if name in shapes}
        spec = CellSpec.infer(cell, **singles, state_shapes=states, op=op, **mappings, **known)
    return [spec.output_shape, *(spec.state_shape for _ in CELL_STATES[cell])]


_ACTIVATIONS = {
    "rnn": ("activation",),
    "gru": ("activation", "recurrent_activation"),
    "lstm": ("activation", "recurrent_activation", "output_activation"),
}
_MAPPING_SHAPES = {
    "peephole": "peephole_shapes",
    "normalization_weights": "normalization_shapes",
    "dropout_masks": "dropout_shapes",
}


def _conv2d_shapes(shapes: Mapping[str, Shape], options: dict[str, Any]) -> list[Shape]:
    known = {name: value for name, value in options.items() if name not in ("algorithm", "engine")}
    spec = ConvSpec.infer(shapes["x"], shapes["kernel"], shapes.get("bias"), **known)
    return [(spec.B, spec.HO, spec.WO, spec.F)]


def _max_pool3d_shapes(shapes: Mapping[str, Shape], options: dict[str, Any]) -> list[Shape]:
    known = {name: value for name, value in options.items() if name not in ("data_format", "engine")}
    order = options.get("data_format", "channels_last")
    choice("max_pool3d", "data_format", order, ("channels_last", "channels_first"))
    x = shapes["x"]
    if order == "channels_first" and len(x) == 5:
        B, TO, HO, WO, C = PoolSpec.infer((x[0], *x[2:], x[1]), **known).output_shape
        return [(B, C, TO, HO, WO)]
    return [PoolSpec.infer(x, **known).output_shape]


def _recurrent(op: str, cell: str) -> Operation:
    shapes = partial(_recurrent_shapes, op, cell)
    forward, vjp = getattr(functional, op), getattr(functional, f"{op}_vjp")
    return Operation(forward, vjp, shapes, {"return_state": True}, CELL_STATES[cell])


OPERATIONS = {
    **{op: _recurrent(op, cell) for op, cell in (("convlstm2d", "lstm"), ("convgru2d", "gru"), ("convrnn2d", "rnn"))},
    "conv2d": Operation(functional.conv2d, functional.conv2d_vjp, _conv2d_shapes, {}),
    "max_pool3d": Operation(functional.max_pool3d, functional.max_pool3d_vjp, _max_pool3d_shapes, {}),
}

_BATCH_AXIS = {"dropout_masks": 1}
"""Where in an array the samples are; in the others in front."""
_WITH_SAMPLES = ("x", "h", "c", "mask", "dropout_masks")
_CONSTANT = ("mask", "dropout_masks.", "normalization_weights.mean", "normalization_weights.variance")
"""What there is no gradient of."""


@dataclass(frozen=True)
class HostCall:
    """A call of an operation, all but its arrays; hashable.

    Arrays are told apart by `names`: those of the function's arguments, "h" and "c" of its initial state, and
    "peephole.i" for an item of a mapping. They may have further axes in front, as a callback in a vmap has: those of
    each array are of the same number and broadcast to one another.
    """

    op: str
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, op: str, arrays: Mapping[str, Any], options: Mapping[str, Any]) -> HostCall:
        """Return the call with arrays of these names (of anything that has ``shape``).

        Raises TypeError or ValueError for options that are not the operation's.
        """
        known = _options_of(op)
        if unknown := sorted(set(options).difference(known)):
            raise TypeError(unknown_option(op, unknown[0], known))
        flag(op, "recompute", options.get("recompute", False))
        engine = options.get("engine")
        dispatch.check_engine(engine)
        if options.get("algorithm", "auto") != "auto":
            dispatch.check_algorithm(op, dispatch.get_engine(engine), options["algorithm"])
        frozen = tuple((name, _hashable(value)) for name, value in options.items())
        return cls(op, tuple(arrays), tuple(len(array.shape) for array in arrays.values()), frozen)

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Names of the arrays that there are gradients of."""
        return tuple(name for name in self.names if not name.startswith(_CONSTANT))

    def shapes(self, *shapes: Shape) -> list[Shape]:
        """Return the outputs' shapes; raise ValueError or TypeError where shapes or options do not fit together."""
        return OPERATIONS[self.op].shapes(dict(zip(self.names, shapes, strict=True)), dict(self.options))

    def forward(self, *arrays: Any) -> tuple[np.ndarray, ...]:
        """Compute the outputs."""
        arrays = tuple(map(np.asarray, arrays))
        lead = self._lead(arrays)
        if not lead:
            return self._forward(arrays)
        if any(a.shape[: len(lead)] != (1,) * len(lead) for a, name in zip(arrays, self.names, strict=True)
               if not name.startswith(_WITH_SAMPLES)):  # fmt: skip
            return self._stacked(lead, [self._forward(member) for member in self._members(lead, arrays)])
        merged = [_merged(array, lead, self._batch_axis(name)) if name.startswith(_WITH_SAMPLES)
                  else array.reshape(array.shape[len(lead) :]) for array, name in
                  zip(arrays, self.names, strict=True)]  # fmt: skip
        return tuple(y.reshape(*lead, -1, *y.shape[1:]) if y.size else y.reshape(*lead, y.shape[0] // _size(lead),
                     *y.shape[1:]) for y in self._forward(merged))  # fmt: skip

    def forward_saving(self, *arrays: Any) -> tuple[np.ndarray, ...]:
        """Compute the outputs and, as the last item, the number under which the way back is kept, int32 (2,)."""
        copies = [np.array(array) for array in arrays]  # a callback's memory is lent
        lead = self._lead(copies)
        results = [self._vjp(member) for member in self._members(lead, copies)]
        with _lock:
            number = next(_numbers) % 2**31
            _saved[number] = [pullback for _, pullback in results]
            for old in list(_saved)[:-KEPT]:
                del _saved[old]
        token = np.empty((*lead, 2), np.int32)
        token[..., 0] = number
        token[..., 1] = np.arange(_size(lead)).reshape(lead)
        return (*self._stacked(lead, [outputs for outputs, _ in results]), token)

    def backward(
        self, token: Any, cotangents: Sequence[Any], *arrays: Any, input_gradient: bool = True
    ) -> tuple[np.ndarray, ...]:
        """Pull gradients back: of the `differentiable` arrays in their order, but x if `input_gradient` is false."""
        token, cotangents, arrays = np.asarray(token), list(map(np.asarray, cotangents)), tuple(map(np.asarray, arrays))
        depth = token.ndim - 1
        lead = np.broadcast_shapes(token.shape[:-1], self._lead(arrays), *(dy.shape[:depth] for dy in cotangents))
        tokens = np.broadcast_to(token, (*lead, 2)).reshape(-1, 2)
        with _lock:
            kept = {number: _saved.pop(number, None) for number in set(tokens[:, 0].tolist())}
        given = zip(*(_spread(array, lead, depth) for array in cotangents), strict=True)
        pulled = []
        for (number, index), member, dy in zip(tokens, self._members(lead, arrays), given, strict=True):
            pullbacks = kept[int(number)]
            pullback = self._vjp([np.array(array) for array in member])[1] if pullbacks is None else pullbacks[index]
            pulled.append(self._pulled(pullback, dy, input_gradient))
        return self._stacked(lead, pulled)

    def _pulled(self, pullback: Any, cotangents: Sequence[np.ndarray], input_gradient: bool) -> tuple[np.ndarray, ...]:
        several = bool(OPERATIONS[self.op].own)
        less = {} if input_gradient else {"input_gradient": False}
        gradients = pullback(tuple(cotangents) if several else cotangents[0], **less)
        return tuple(_found(gradients, name) for name in self.differentiable if name != "x" or input_gradient)

    def _forward(self, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        arguments = self._arguments(arrays)
        arguments.pop("recompute", None)
        outputs = OPERATIONS[self.op].forward(**arguments)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def _vjp(self, arrays: Sequence[np.ndarray]) -> tuple[tuple[np.ndarray, ...], Any]:
        outputs, pullback = OPERATIONS[self.op].vjp(**self._arguments(arrays))
        return outputs if isinstance(outputs, tuple) else (outputs,), pullback

    def _arguments(self, arrays: Sequence[np.ndarray]) -> dict[str, Any]:
        arguments: dict[str, Any] = {**dict(self.options), **OPERATIONS[self.op].own}
        for name, array in zip(self.names, arrays, strict=True):
            mapping, _, key = name.rpartition(".")
            if mapping:
                arguments.setdefault(mapping, {})[key] = array
            else:
                arguments[name] = array
        states = [arguments.pop(name, None) for name in OPERATIONS[self.op].states]
        if any(state is not None for state in states):
            arguments["initial_state"] = tuple(states)
        return arguments

    def _batch_axis(self, name: str) -> int:
        return _BATCH_AXIS.get(name.partition(".")[0], 0)

    def _lead(self, arrays: Sequence[np.ndarray]) -> Shape:
        """Return the axes that a vmap has put in front."""
        return np.broadcast_shapes(
            *(array.shape[: array.ndim - rank] for array, rank in zip(arrays, self.ranks, strict=True))
        )

    def _members(self, lead: Shape, arrays: Sequence[np.ndarray]) -> Iterator[Sequence[np.ndarray]]:
        """Yield the arrays of each call that a vmap has put together."""
        yield from zip(*(_spread(array, lead, len(lead)) for array in arrays), strict=True)

    def _stacked(self, lead: Shape, results: Sequence[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
        if not lead:
            return results[0]
        return tuple(np.stack(parts).reshape(*lead, *parts[0].shape) for parts in zip(*results, strict=True))


def _spread(array: np.ndarray, lead: Shape, depth: int) -> list[np.ndarray]:
    """Return an array's parts along the axes in front, which are broadcast to `lead`."""
    spread = np.broadcast_to(array, (*lead, *array.shape[depth:]))
    return [spread[index] for index in np.ndindex(lead)]


def _merged(array: np.ndarray, lead: Shape, axis: int) -> np.ndarray:
    """Join the axes in front with that of the samples."""
    depth = len(lead)
    spread = np.broadcast_to(array, (*lead, *array.shape[depth:]))
    moved = np.moveaxis(spread, range(depth), range(axis, axis + depth))
    return moved.reshape(*moved.shape[:axis], _size(lead) * moved.shape[axis + depth], *moved.shape[axis + depth + 1 :])


def _found(gradients: Mapping[str, Any], name: str) -> np.ndarray:
    if name in ("h", "c"):
        return gradients["initial_state"]["hc".index(name)]
    mapping, _, key = name.rpartition(".")
    return gradients[mapping][key] if mapping else gradients[name]


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _size(lead: Shape) -> int:
    return int(np.prod(lead, dtype=int))
