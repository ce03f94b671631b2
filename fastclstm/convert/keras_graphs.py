"""Keras's models: which layers are called on what, from the two forms in which Keras writes that."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastclstm.convert.keras_layers import ROWS, Arrays, Common, Config, Counts, filled, leaf, own_name
from fastclstm.io.bounds import shown
from fastclstm.io.keras_files import inner_layers, layer_name
from fastclstm.layers import (
    Activation,
    Add,
    Concatenate,
    Embedding,
    Flatten,
    Input,
    Layer,
    Maximum,
    Minimum,
    Multiply,
    RepeatVector,
    Rescaling,
    Reshape,
    Subtract,
    TimeDistributed,
)
from fastclstm.layers.conv_recurrent import ConvRecurrent
from fastclstm.layers.global_pooling import GlobalPooling
from fastclstm.layers.merging import Merging
from fastclstm.layers.recurrent import Recurrent
from fastclstm.layers.symbolic import Symbol, leaves, mapped
from fastclstm.models import Model, Sequential
from fastclstm.nn.names import with_article

Tree = Arrays | Mapping[str, Any]
"""The arrays of a layer; of a model by the names of its layers, or in one row: those that are trained first."""


def model_of(spec: Config, arrays: Tree, rank: int | None, common: Common) -> Sequential | Model:
    """Return the model that a config and its arrays describe: of a chain of layers a Sequential one."""
    config, specs = spec["config"], _specs(spec)
    own = _by_layer(specs, arrays, common)
    graph = _Calls(config, specs) if "input_layers" in config else None
    order = list(specs) if graph is None else graph.chain()
    if graph is not None and order is None:
        return _graph(graph, own, common)
    layers: list[Layer] = []
    for name in order or ():
        with _telling(specs[name]):
            rank = _input_rank(specs[name]) or rank
            if specs[name]["class_name"] != "InputLayer":
                layers.append(layer_of(specs[name], own.get(name, ()), rank, common))
                rank = _rank_after(layers[-1], rank)
    return Sequential(layers)


def layer_of(spec: Config, arrays: Tree, rank: int | None, common: Common) -> Layer:
    """Return the layer, or the model, that a config and its arrays describe, for an input of `rank` axes."""
    class_name, config = spec["class_name"], spec["config"]
    if (layer := _custom(spec, common)) is not None:
        layer.name = layer.name or own_name(spec)
        return filled(layer, list(layer.parameters), _row(arrays), config)
    if class_name == "TimeDistributed":
        inner = config["layer"]
        try:
            of_one = layer_of(inner, arrays, _input_rank(inner) or (rank and rank - 1), common)
            return TimeDistributed(of_one, name=own_name(spec))
        except ValueError as error:
            raise ValueError(f"{inner['class_name']} in it: {error}") from error
    if inner_layers(spec) is None:
        return leaf(spec, _row(arrays), rank, common)
    model = model_of(spec, arrays, rank, common)
    model.name = own_name(spec)
    if not config.get("trainable", True):
        model.trainable = False
    return model


def tree_of(spec: Config, arrays: Tree, common: Common) -> Mapping[str, Any]:
    """Return the arrays of a model by the names of its layers; those of models within likewise."""
    specs = _specs(spec)

    def own(spec: Config, arrays: Tree) -> Any:
        inner = _within(spec)
        return arrays if inner_layers(inner) is None else tree_of(inner, arrays, common)

    found = _by_layer(specs, arrays, common)
    return {name: own(spec, found[name]) for name, spec in specs.items() if name in found}


def picked(spec: Config, arrays: Tree, wanted: str, common: Common) -> Layer:
    """Return the one layer of a model that has the name, or the path of names, `wanted`."""
    hits = sorted(_found(spec, lambda: arrays, wanted, common), key=lambda hit: hit[0].count("/"))
    if not hits:
        raise ValueError(f"there is no layer {wanted!r}; there are {shown(_specs(spec), 20)}")
    if len(hits) > 1 and hits[0][0] != wanted:
        raise ValueError(f"there are several layers {wanted!r}; give one of {shown([path for path, _, _ in hits], 20)}")
    _, found, own = hits[0]
    with _telling(found):
        return layer_of(found, own(), _input_rank(found), common)


def _found(
    spec: Config, arrays: Callable[[], Tree], wanted: str, common: Common, path: str = ""
) -> Iterator[tuple[str, Config, Callable[[], Tree]]]:
    """Yield the path of each layer of that name or path, its config, and what returns its arrays."""
    specs = _specs(spec)
    for name, found in specs.items():

        def own(name: str = name) -> Tree:
            return _by_layer(specs, arrays(), common).get(name, ())

        if wanted in (name, path + name):
            yield path + name, found, own
        inner = _within(found)
        if inner_layers(inner) is not None:
            yield from _found(inner, own, wanted, common, f"{path}{name}/")
        elif inner is not found and wanted in (layer_name(inner), f"{path}{name}/{layer_name(inner)}"):
            yield f"{path}{name}/{layer_name(inner)}", inner, own


def _custom(spec: Config, common: Common) -> Layer | None:
    """Return the layer that the caller makes of a class of Keras, or of others; None where there is no such factory."""
    class_name = spec["class_name"]
    names = class_name, class_name.rpartition(">")[2]  # an .h5 file has the package in it
    factory = common.factory(spec.get("registered_name"), spec["config"].get("function"), *names)
    layer = None if factory is None else factory(spec["config"])
    if factory is not None and not isinstance(layer, Layer):
        raise TypeError(f"custom[{class_name!r}] must return a layer of fastclstm, got {type(layer).__name__}")
    return layer


@contextmanager
def _telling(spec: Config) -> Iterator[None]:
    """Name the layer in errors."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError | IndexError) else error
        raise ValueError(f"layer {layer_name(spec) or '?'!r} ({spec['class_name']}): {what}") from error


def _specs(model: Config) -> dict[str, Config]:
    """Return the configs of a model's layers, by their names."""
    config = model["config"]
    if not isinstance(config, Mapping) or "layers" not in config:
        raise ValueError(f"{with_article(model['class_name'])} tells nothing of its layers; only Sequential and "
                         f"functional models do")  # fmt: skip
    specs = {layer_name(spec): spec for spec in config["layers"]}
    if len(specs) < len(config["layers"]):
        raise ValueError(f"two layers of the {model['class_name']} have the same name; give each its own")
    return specs


def _is_operation(spec: Config) -> bool:
    """Whether `spec` is of a function called on symbols, such as ``a + b``, which Keras counts among the layers."""
    if spec["class_name"] == "TFOpLambda" or str(spec.get("module")).startswith(("keras.src.ops", "keras.ops")):
        return True
    nodes = spec.get("inbound_nodes") or []  # an .h5 file of Keras 3 names no module; layers have more in their config
    of_layer = not {"trainable", "dtype"}.isdisjoint(spec["config"])  # SpatialDropout only the latter
    return "module" not in spec and not of_layer and any(isinstance(node, Mapping) for node in nodes)


def _within(spec: Config) -> Config:
    """Return the config of the layer that one applies to every step, or its own."""
    return spec["config"]["layer"] if spec["class_name"] == "TimeDistributed" else spec


# Ranks


def _input_rank(spec: Config) -> int | None:
    """Return how many axes a layer's input has, as far as its config tells."""
    shapes = ((spec.get("build_config") or {}).get("input_shape"), spec["config"].get("batch_input_shape"),
              spec["config"].get("batch_shape"))  # fmt: skip
    return next((len(shape) for shape in shapes if shape and not isinstance(shape, Mapping)), None)


def _rank_after(layer: Layer, rank: int | None) -> int | None:
    """Return how many axes a layer's output has, for an input of `rank`."""
    if isinstance(layer, Model):
        return len(layer.outputs.shape) if isinstance(layer.outputs, Symbol) else None
    if rank is None:
        return None
    if isinstance(layer, Sequential):
        for part in layer:
            rank = _rank_after(part, rank)
        return rank
    if isinstance(layer, TimeDistributed):
        inner = _rank_after(layer.layer, rank - 1)
        return None if inner is None else inner + 1
    if isinstance(layer, Flatten) or (isinstance(layer, GlobalPooling) and not layer.keep_dims):
        return 2
    if isinstance(layer, Reshape):
        return 1 + len(layer.target_shape)
    if isinstance(layer, Embedding | RepeatVector):
        return rank + 1
    if isinstance(layer, Recurrent):
        return 2 + layer.return_sequences
    return rank - 1 if isinstance(layer, ConvRecurrent) and not layer.return_sequences else rank


# Arrays


def _by_layer(specs: Mapping[str, Config], arrays: Tree, common: Common) -> Mapping[str, Any]:
    """Return the arrays of a model by the names of its layers; those of models within likewise."""
    if isinstance(arrays, Mapping):
        return arrays
    counts: list[Counts] = []
    _tree(specs, False, common, lambda *count: counts.append(count))
    trained, others = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    if trained + others != len(arrays):
        raise ValueError(f"has {len(arrays)} arrays of weights but its layers need {trained + others}")
    first, rest = iter(arrays[:trained]), iter(arrays[trained:])
    return _tree(specs, False, common, lambda n, m: [*(next(first) for _ in range(n)), *(next(rest) for _ in range(m))])


def _tree(
    specs: Mapping[str, Config], frozen: bool, common: Common, visit: Callable[[int, int], Any]
) -> dict[str, Any]:
    """Return by layer, and in models by theirs, what `visit` makes of how many arrays are trained, and are not."""
    made = {}
    for name, spec in specs.items():
        with _telling(spec):
            fixed, inner = frozen or not spec["config"].get("trainable", True), _within(spec)
            if inner_layers(inner) is not None and _custom(spec, common) is None:
                made[name] = _tree(_specs(inner), fixed, common, visit)
            else:
                n, m = _count(spec, common)
                made[name] = visit(0, n + m) if fixed else visit(n, m)
    return made


def _count(spec: Config, common: Common) -> Counts:
    """Return how many arrays of a layer are trained, and how many are statistics."""
    inner = _within(spec)
    if (layer := _custom(spec, common)) is not None or (layer := _custom(inner, common)) is not None:
        trained = len(layer.trainable_parameters)
        return trained, len(layer.parameters) - trained
    row = ROWS.get(inner["class_name"])
    return (0, 0) if row is None else row.counted(inner["config"])


def _row(arrays: Tree) -> Arrays:
    if isinstance(arrays, Mapping):
        return [array for part in arrays.values() for array in _row(part)]
    return arrays


# Calls


@dataclass(frozen=True)
class _Ref:
    """A tensor: which one of those that which call of a layer returns."""

    layer: str
    node: int
    tensor: int


class _Call(NamedTuple):
    layer: str
    node: int
    args: list[Any]
    """Structures of `_Ref` and constants."""
    kwargs: dict[str, Any]

    @property
    def refs(self) -> list[_Ref]:
        return [ref for ref in leaves((self.args, self.kwargs)) if isinstance(ref, _Ref)]


class _Calls:
    """The calls of a functional model's layers, and its inputs and outputs."""

    def __init__(self, config: Config, specs: Mapping[str, Config]):
        self.specs = specs
        self.inputs, self.outputs = (_ends(config[key]) for key in ("input_layers", "output_layers"))
        self._calls: list[_Call] = []
        for name, spec in specs.items():
            with _telling(spec):
                nodes = spec.get("inbound_nodes") or []
                if spec["class_name"] == "InputLayer":
                    self._calls.append(_Call(name, 0, [], {}))
                self._calls += (_Call(name, n, *_arguments(node)) for n, node in enumerate(nodes))
        self._number()

    def _number(self) -> None:
        """Count the calls of models from 0; Keras 2 counts them from 1, and Keras 3 in a model's outputs alone."""
        modern = any(isinstance(node, Mapping) and "args" in node
                     for spec in self.specs.values() for node in spec.get("inbound_nodes") or [])  # fmt: skip

        def shifted(ref: Any, whose: bool) -> Any:
            if not isinstance(ref, _Ref):
                return ref
            if ref.layer not in self.specs:
                raise ValueError(f"the model refers to a layer {ref.layer!r}, which it has not")
            spec = self.specs[ref.layer]
            count = inner_layers(spec) is not None and whose and not (modern and spec["class_name"] == "Sequential")
            return _Ref(ref.layer, ref.node - count, ref.tensor)

        self.outputs = mapped(lambda ref: shifted(ref, True), self.outputs)
        self._calls = [_Call(*call[:2], *(mapped(lambda ref: shifted(ref, not modern), part) for part in call[2:]))
                       for call in self._calls]  # fmt: skip

    def chain(self) -> list[str] | None:
        """Return the names of the layers, where each takes what one before returns and nothing else; else None."""
        if not _is_first(self.inputs) or not _is_first(self.outputs) or len(self._calls) != len(self.specs):
            return None
        follower = {}
        for call in self._calls:
            spec = self.specs[call.layer]
            if spec["class_name"] == "InputLayer":
                continue
            if _is_operation(spec) or not _is_plain(call) or not _returns_one(spec):
                return None
            follower[call.args[0].layer] = call.layer
        order = [self.inputs.layer]
        while order[-1] in follower and len(order) < len(self.specs):
            order.append(follower[order[-1]])
        fits = len(order) == len(self.specs) > 1 and order[-1] == self.outputs.layer and order[-1] not in follower
        return order if fits else None

    def __iter__(self) -> Iterator[_Call]:
        """Yield each call after those that it depends on, else in the order of the layers."""
        places = {(call.layer, call.node): n for n, call in enumerate(self._calls)}
        missing, readers = [], dict[int, list[int]]()
        for n, call in enumerate(self._calls):
            needed = {(ref.layer, ref.node) for ref in call.refs}
            missing.append(len(needed))
            for key in needed:
                if key not in places:
                    raise ValueError(f"there is no call {key[1]} of {key[0]!r}, which {call.layer!r} refers to")
                readers.setdefault(places[key], []).append(n)
        ready, done = [n for n, count in enumerate(missing) if not count], 0
        while ready:
            n = heapq.heappop(ready)
            done += 1
            yield self._calls[n]
            for reader in readers.get(n, ()):
                missing[reader] -= 1
                if not missing[reader]:
                    heapq.heappush(ready, reader)
        if done < len(self._calls):
            raise ValueError("the layers of the model take each other's outputs in a circle")


def _ends(node: Any) -> Any:
    """Return the inputs or outputs of a model: one tensor, or a list or dict; a list of one is that one."""
    if isinstance(node, Mapping):
        return {key: _ends(item) for key, item in node.items()}
    if _is_history(node):
        return _Ref(*node[:3])
    if not isinstance(node, list | tuple):
        raise ValueError(f"the model's inputs or outputs are damaged: {node!r:.60}")
    return _ends(node[0]) if len(node) == 1 else [_ends(item) for item in node]


def _is_history(node: Any) -> bool:
    """Whether a node is [layer, call, tensor], maybe with more."""
    return (isinstance(node, list | tuple) and len(node) >= 3 and isinstance(node[0], str)
            and isinstance(node[1], int))  # fmt: skip


def _arguments(node: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a call, as Keras 3 writes them, in args and kwargs, or Keras 2, in histories."""
    if isinstance(node, Mapping) and "args" in node:
        args, kwargs = _tensors(node["args"]), _tensors(node.get("kwargs", {}))
    else:
        kwargs = {}
        first = _histories(node, kwargs)
        args = [first[0] if isinstance(first, list) and len(first) == 1 else first]
    dropped = {"training": False, "name": kwargs.get("name")}
    given = {name: value for name, value in kwargs.items() if any(leaf is not None for leaf in leaves(value))}
    return args, {name: value for name, value in given.items() if name not in dropped or value != dropped[name]}


def _tensors(node: Any) -> Any:
    """Read what Keras 3 writes."""
    if isinstance(node, Mapping):
        if node.get("class_name") == "__keras_tensor__":
            return _Ref(*node["config"]["keras_history"])
        return {key: _tensors(item) for key, item in node.items()}
    return [_tensors(item) for item in node] if isinstance(node, list | tuple) else node


def _histories(node: Any, kwargs: dict[str, Any]) -> Any:
    """Read what Keras 2 writes; the other arguments, which stand with the tensors, are added to `kwargs`."""
    if isinstance(node, Mapping):
        return {key: _histories(item, kwargs) for key, item in node.items()}
    if not isinstance(node, list | tuple):
        return node
    if not _is_history(node):
        return [_histories(item, kwargs) for item in node]
    for name, value in (node[3] if len(node) > 3 else {}).items():
        kwargs[name] = _histories(value, {})
    return node[2] if node[0] == "_CONSTANT_VALUE" else _Ref(*node[:3])


def _is_plain(call: _Call) -> bool:
    """Whether a call is of one tensor, the first that a layer's first call returns, and nothing else."""
    return len(call.args) == 1 and not call.kwargs and _is_first(call.args[0])


def _is_first(ref: Any) -> bool:
    """Whether `ref` is of the first tensor that the first call of a layer returns."""
    return isinstance(ref, _Ref) and ref.node == ref.tensor == 0


def _returns_one(spec: Config) -> bool:
    config = _within(spec)["config"]
    inner = config["layer"]["config"] if spec["class_name"] == "Bidirectional" else config
    several = inner.get("return_state") or config.get("merge_mode", "") is None
    return not several and isinstance(_ends(config.get("output_layers", ["", 0, 0])), _Ref)


# Graphs


def _graph(calls: _Calls, arrays: Mapping[str, Any], common: Common) -> Model:
    """Return the model of these calls."""
    made: dict[tuple[str, int], list[Symbol]] = {}
    layers: dict[str, Layer] = {}

    def symbol(ref: Any) -> Any:
        if not isinstance(ref, _Ref):
            return ref
        found = made.get((ref.layer, ref.node))
        if found is None or not 0 <= ref.tensor < len(found):
            what = f"call {ref.node}" if found is None else f"array {ref.tensor} of call {ref.node}"
            raise ValueError(f"there is no {what} of {ref.layer!r}, which the model refers to")
        return found[ref.tensor]

    for call in calls:
        name, spec = call.layer, calls.specs[call.layer]
        with _telling(spec):
            args, kwargs = mapped(symbol, call.args), mapped(symbol, call.kwargs)
            if spec["class_name"] == "InputLayer":
                y = _input(spec)
            elif _is_operation(spec):
                y = _operation(spec, args, kwargs, arrays.get(name, ()), common)
            else:
                first = next((leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Symbol)), None)
                if first is None:
                    raise ValueError("it is called on no layer's output")
                if name not in layers:
                    layers[name] = layer_of(spec, arrays.get(name, ()), len(first.shape), common)
                y = _called(layers[name], args, kwargs)
            made[name, call.node] = list(_flat(y))
    return Model(mapped(symbol, calls.inputs), mapped(symbol, calls.outputs))


def _input(spec: Config) -> Symbol:
    shape = spec["config"].get("batch_shape") or spec["config"]["batch_input_shape"]
    return Input(batch_shape=tuple(shape), name=own_name(spec))


def _called(layer: Layer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what our layer returns for the arguments of Keras's."""
    options = dict(kwargs)
    x, *others = args or [options.pop(next(iter(options)))]
    allowed = {"training"}
    if isinstance(layer, ConvRecurrent | Recurrent):
        allowed.add("initial_state")
        options |= zip(("initial_state", "mask", "training"), others, strict=False)
        others = []
        if isinstance(x, list):  # as Keras 2 writes it
            x, *states = x
            options |= {"initial_state": states} if states else {}
        options = {name: value for name, value in options.items() if value is not None}
        if "initial_state" in options:
            states, size = list(leaves(options["initial_state"])), len(layer._state_names)
            options["initial_state"] = [tuple(states[n : n + size]) for n in range(0, len(states), size)]
    if isinstance(x, list) and len(x) == 1 and not isinstance(layer, Merging):
        (x,) = x
    if unknown := [*(name for name in options if name not in allowed), *(repr(o) for o in others if o is not None)]:
        raise ValueError(f"is called with {shown(unknown)}, which is not supported")
    return layer(x, **options)


def _flat(value: Any) -> Iterator[Any]:
    """Yield what is in tuples, lists and dicts in Keras's order: dicts by their sorted keys."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from _flat(value[key])
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


_MERGING: dict[str, Callable[[], Merging]] = {
    "add": Add, "subtract": Subtract, "multiply": Multiply, "maximum": Maximum, "minimum": Minimum,
}  # fmt: skip
_FUNCTIONS = ("relu", "sigmoid", "tanh", "silu", "softplus")


def _operation(spec: Config, args: Sequence[Any], kwargs: Mapping[str, Any], arrays: Tree, common: Common) -> Any:
    """Return what a function of Keras, or of TensorFlow, returns that was called on symbols: ``a + b`` and the like."""
    function = str(spec["config"].get("function") or spec["class_name"])
    name = function.rpartition(".")[2].lower()
    given = [*args, *kwargs.values()]
    symbols = [leaf for leaf in leaves(given) if isinstance(leaf, Symbol)]
    if _custom(spec, common) is not None:
        return layer_of(spec, arrays, None, common)(symbols[0] if len(symbols) == 1 else symbols)
    options: Any = {"name": own_name(spec)}
    if name in ("concatenate", "concat"):
        axis = spec["config"].get("axis", kwargs.get("axis", args[1] if len(args) > 1 else 0))
        return Concatenate(axis, **options)(symbols)
    if name in _FUNCTIONS and len(symbols) == len(given) == 1:
        return Activation(name, **options)(symbols[0])
    if name in _MERGING and len(symbols) == len(given) == 2:
        if len({len(symbol.shape) for symbol in symbols}) > 1:
            raise ValueError(
                f"of {symbols[0].shape} and {symbols[1].shape} is not supported, only of equally many axes"
            )
        return _MERGING[name](**options)(symbols)
    scaled = _scaled(name, given) if len(given) == 2 and len(symbols) == 1 else None
    if scaled is None:
        raise ValueError(f"not supported as it is called; give custom={{{function!r}: factory}}, called with its "
                         f"config for a layer of fastclstm that does the same")  # fmt: skip
    return Rescaling(*scaled, **options)(symbols[0])


def _scaled(name: str, given: Sequence[Any]) -> tuple[Any, Any] | None:
    """Return scale and offset that a function of a symbol and a number comes to, if it does."""
    turned = isinstance(given[1], Symbol)
    number = given[0] if turned else given[1]
    if isinstance(number, bool) or not isinstance(number, int | float | np.number):
        return None
    known = {"add": (1.0, number), "multiply": (number, 0.0), "subtract": (-1.0, number) if turned else (1.0, -number)}
    if name in ("divide", "truediv", "truedivide") and not turned and number:
        return 1 / number, 0.0
    return known.get(name)
