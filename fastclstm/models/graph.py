"""Which layers a network calls on what, in which order: the one form of a chain and of a graph of symbols."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastclstm.layers.base import Layer
from fastclstm.layers.container import told
from fastclstm.layers.symbolic import Known, Node, Symbol, leaves, mapped, mapped_shapes, title


@dataclass(frozen=True)
class Slot:
    """A place for an array on the way through a network."""

    number: int


@dataclass(frozen=True, eq=False)
class Step:
    """A call of a layer: what it reads, in tuples, lists and dicts of slots and constants, and what it fills."""

    name: str
    """Of the layer."""
    layer: Layer
    x: Any
    options: Mapping[str, Any]
    y: Any

    @property
    def told(self) -> str:
        """The layer, for errors."""
        return told(self.name, self.layer)

    @property
    def read(self) -> set[Slot]:
        """The slots read."""
        return slots((self.x, self.options))


class Graph:
    """Steps, each of which reads what the inputs, or steps before, have filled."""

    def __init__(
        self, inputs: Sequence[Slot], steps: Sequence[Step], outputs: Any, shapes: Mapping[Slot, Known] | None = None
    ):
        self.inputs, self.steps, self.outputs = tuple(inputs), tuple(steps), outputs
        self.shapes = dict(shapes or {})
        """As far as they were known when the graph was built; of a chain none."""
        self.read = slots(outputs).union(*(step.read for step in steps))
        """What anybody reads."""
        kept, self.released = slots(outputs), list[set[Slot]]()
        for step in reversed(self.steps):
            self.released.insert(0, step.read - kept)
            kept |= step.read
        calls = Counter(step.name for step in steps)
        self.shared = {name for name, times in calls.items() if times > 1}
        """Names of the layers that are called more than once."""

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers by name, each once."""
        return {step.name: step.layer for step in self.steps}

    def symbols(self, inputs: Mapping[Slot, Symbol]) -> dict[Slot, Symbol]:
        """Return a symbol for every slot, of new nodes: the graph once more, on symbols of its inputs."""
        symbols = dict(inputs)
        for step in self.steps:
            x, options = filled(step.x, symbols), {name: filled(value, symbols) for name, value in step.options.items()}
            node = Node(step.layer, x, options, filled(step.y, self.shapes))
            paired(step.y, node.symbols(), symbols.__setitem__)
        return symbols


def chain(layers: Sequence[Layer]) -> Graph:
    """Return the graph of layers each of which takes what the one before returned, named by their numbers."""
    steps = [Step(str(n), layer, Slot(n), {}, Slot(n + 1)) for n, layer in enumerate(layers)]
    return Graph([Slot(0)], steps, Slot(len(steps)))


def graph_of(op: str, inputs: Sequence[Symbol], outputs: Any) -> Graph:
    """Return the graph that leads from symbols to symbols; the nodes in the order in which they were made.

    Raises
    ------
    ValueError
        An output that depends on something else, an input that no output depends on, two layers of one name.
    """
    numbered = {id(symbol): Slot(n) for n, symbol in enumerate(inputs)}
    nodes: dict[int, Node] = {}
    reached: set[int] = set()
    waiting: list[Symbol] = list(leaves(outputs))
    while waiting:
        symbol = waiting.pop()
        if id(symbol) in numbered:
            reached.add(id(symbol))
        elif symbol.node is None:
            raise ValueError(f"{op}: the graph is disconnected: the outputs depend on {symbol!r}, which is none of the "
                             f"inputs; add it to these")  # fmt: skip
        elif symbol.node.number not in nodes:
            nodes[symbol.node.number] = symbol.node
            waiting += (leaf for leaf in leaves((symbol.node.x, symbol.node.options)) if isinstance(leaf, Symbol))
    for symbol in inputs:
        if id(symbol) not in reached:
            raise ValueError(f"{op}: no output depends on {symbol!r}; leave it out of the inputs, or use it")
    ordered = [nodes[number] for number in sorted(nodes)]
    names = layer_names(op, [node.layer for node in ordered])
    made: dict[int, list[Slot]] = {}  # by the nodes' numbers
    shapes = {numbered[id(symbol)]: symbol.shape for symbol in inputs}

    def slot(symbol: Any) -> Any:
        if not isinstance(symbol, Symbol):
            return symbol
        if id(symbol) in numbered:
            return numbered[id(symbol)]
        assert symbol.node is not None
        return made[symbol.node.number][symbol.path]

    steps: list[Step] = []
    for node in ordered:
        x, options = mapped(slot, node.x), {name: mapped(slot, value) for name, value in node.options.items()}
        mine = made[node.number] = list[Slot]()

        def fill(shape: Known, mine: list[Slot] = mine) -> Slot:
            mine.append(Slot(len(shapes)))
            shapes[mine[-1]] = shape
            return mine[-1]

        steps.append(Step(names[id(node.layer)], node.layer, x, options, mapped_shapes(fill, node.shapes)))
    return Graph(list(numbered.values()), steps, mapped(slot, outputs), shapes)


def layer_names(op: str, layers: Iterable[Layer]) -> dict[int, str]:
    """Return a name for each layer, by its id: its own or, in snake case, that of its class, numbered from the second.

    Raises ValueError where two layers have the same name of their own.
    """
    distinct = {id(layer): layer for layer in layers}
    names: dict[int, str] = {}
    owners: dict[str, Layer] = {}
    for key, layer in distinct.items():
        if layer.name is not None:
            if layer.name in owners:
                raise ValueError(f"{op}: {title(layer)} and {title(owners[layer.name])} have the same name; give each "
                                 f"its own")  # fmt: skip
            owners[layer.name] = layer
            names[key] = layer.name
    taken = set(owners)
    for key, layer in distinct.items():
        if key not in names:
            names[key] = free_name(snake_case(type(layer).__name__), taken)
            taken.add(names[key])
    return {key: names[key] for key in distinct}


def snake_case(name: str) -> str:
    """Return a class's name as Keras's functional API has it: conv_lstm2d, conv2d.

    Examples
    --------
    >>> [snake_case(name) for name in ("ConvLSTM2D", "MaxPooling3D", "Conv2DTranspose", "LeakyReLU")]
    ['conv_lstm2d', 'max_pooling3d', 'conv2d_transpose', 'leaky_re_lu']
    """
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def free_name(name: str, taken: set[str]) -> str:
    """Return the name itself, or the first of NAME_1, NAME_2, … that is free."""
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def slots(value: Any) -> set[Slot]:
    """Return the slots in tuples, lists and dicts."""
    return {leaf for leaf in leaves(value) if isinstance(leaf, Slot)}


def filled(value: Any, arrays: Mapping[Slot, Any]) -> Any:
    """Return tuples, lists and dicts with arrays in place of the slots."""
    return mapped(lambda leaf: arrays[leaf] if isinstance(leaf, Slot) else leaf, value)


def paired(structure: Any, value: Any, use: Callable[[Slot, Any], None]) -> None:
    """Call `use` with each slot of a structure and what stands in its place in `value`; None stands for Nones.

    Raises
    ------
    ValueError
        Other tuples, lists or dicts there.
    """
    if isinstance(structure, Slot):
        use(structure, value)
    elif isinstance(structure, Mapping):
        if value is not None and (not isinstance(value, Mapping) or set(value) != set(structure)):
            raise ValueError(f"expected {', '.join(map(repr, structure))} by name, got {_kind(value)}")
        for key, item in structure.items():
            paired(item, None if value is None else value[key], use)
    elif isinstance(structure, tuple | list):
        if value is not None and (not isinstance(value, tuple | list) or len(value) != len(structure)):
            raise ValueError(f"expected a list or tuple of {len(structure)}, got {_kind(value)}")
        for item, part in zip(structure, (None,) * len(structure) if value is None else value, strict=True):
            paired(item, part, use)


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return ", ".join(map(repr, value))
    shape = getattr(value, "shape", None)
    return type(value).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")
