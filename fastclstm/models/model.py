"""Models: graphs of layers, as Keras's functional API has them.

What was decided, where Keras, Flax and PyTorch differ:

- A graph is made of calls on symbols (`fastclstm.layers.symbolic`), as in Keras; it is then data, which is checked
  before anything is computed, saved without code, drawn as a table and gone through backward. PyTorch's and Flax's way,
  a function that is traced or recorded anew with each call, would need their automatic differentiation.
- The steps run in the order in which the layers were called. Keras sorts by depth, which comes to the same results.
- Inputs and outputs are one, a list or a dict of them, and come back as they were given: in the output, in its
  gradient, in y and in sample_weight. Parameters are named by the layer's own name or Keras's automatic one, counted
  anew in every model: ``conv2d.kernel``, ``conv2d_1.kernel``; so the names do not depend on what was built before.
- A layer called twice is one layer: its parameters are there once, its gradients are summed, its penalties count once.
  Its moving statistics move with each call, as in Keras.
- A model is a layer. In another model it may be called on symbols, and then is one step there, with its parameters
  under its name. Two steps must not share a layer in any other way than by being calls of the same one.
- A layer with states returns them as with arrays, ``output, [(h, c)]``, and takes them as ``initial_state``.
- A mask is an input that is given to a layer, ``lstm(frames, mask=valid)``, or, given when the model is called, goes to
  every ConvLSTM2D that has none, as in `Sequential`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from fastclstm.layers.base import Layer
from fastclstm.layers.container import parts, told_of
from fastclstm.layers.place import place_of
from fastclstm.layers.symbolic import Input, Symbol, fits, is_shape, leaves, mapped_shapes, tried
from fastclstm.models.graph import Slot, filled, free_name, graph_of, paired, slots
from fastclstm.models.network import Network, restored
from fastclstm.models.summary import connections
from fastclstm.spec import Shape
from fastclstm.training.batches import Batch, named_part


@dataclass(eq=False, repr=False)
class Model(Network):
    """A graph of layers, from symbols of inputs to symbols of outputs.

    ``model(x)`` takes arrays and returns them as `inputs` and `outputs` were given: one, a list, or a dict by name.
    Their shapes are checked before anything is computed. An error in a layer carries a note that says which one it was.
    See `Sequential` for GPUs, masks and training, which are the same.

    Parameters
    ----------
    inputs, outputs : Symbol, or list or dict of symbols
        What `fastclstm.layers.Input` or layers called on symbols have returned. Of a list, an input's name is its own,
        an output's that of its layer.
    name : str, optional
        Of the model as a layer of another.

    Attributes
    ----------
    layers : tuple of Layer
        In the order in which they were first called.

    Raises
    ------
    ValueError
        An output that depends on something that is not among the inputs, an input that nothing depends on, names that
        clash, a layer that is also within another one.
    TypeError
        Anything but symbols.

    Examples
    --------
    >>> import numpy as np
    >>> from fastclstm.layers import Conv2D, ConvLSTM2D, Input
    >>> frames = Input((None, 8, 8, 1))
    >>> hidden, states = ConvLSTM2D(1, 4, 3, return_state=True, seed=0, engine="reference")(frames)
    >>> again = ConvLSTM2D(4, 4, 3, seed=1, engine="reference")(hidden, initial_state=states)
    >>> model = Model(frames, Conv2D(4, 1, 1, seed=2, engine="reference")(again))
    >>> model(np.zeros((2, 5, 8, 8, 1))).shape
    (2, 5, 8, 8, 1)
    """

    inputs: Any
    outputs: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        self.inputs, given = self._listed("inputs", self.inputs)
        self.outputs, _ = self._listed("outputs", self.outputs)
        if len({id(symbol) for symbol in given}) < len(given):
            raise ValueError("Model: an input is given twice; give each once")
        self._graph = graph_of("Model", given, self.outputs)
        seen: dict[int, str] = {}
        for name, layer in self._graph.layers.items():
            for part in parts(layer):
                if id(part) in seen:
                    raise ValueError(f"Model: {name} shares a layer with {seen[id(part)]}, within which it is; call "
                                     f"that layer itself twice, or make two")  # fmt: skip
            seen |= {id(part): name for part in parts(layer)}
        self._sublayers = self._graph.layers
        self._name_ends()

    def _listed(self, name: str, given: Any) -> tuple[Any, list[Symbol]]:
        """Return the option as a symbol, or as a list or dict of symbols, and all of these."""
        given = list(given) if isinstance(given, tuple) else given
        symbols = list(given.values()) if isinstance(given, Mapping) else given if isinstance(given, list) else [given]
        for symbol in symbols:
            if not isinstance(symbol, Symbol):
                raise TypeError(f"Model: {name} must be symbols, which Input and layers called on symbols return, one "
                                f"or a flat list or dict of them, got {type(symbol).__name__}")  # fmt: skip
        if not symbols:
            raise ValueError(f"Model: {name} is empty; give at least one symbol")
        return dict(given) if isinstance(given, Mapping) else given, symbols

    def _name_ends(self) -> None:
        """Name the inputs and the outputs."""
        graph, taken = self._graph, set[str]()
        sources = {slot: step.name for step in graph.steps for slot in slots(step.y)}
        if isinstance(self.inputs, Mapping):
            names = list(map(_text, self.inputs))
        else:
            names, own = [], [symbol.name for symbol in leaves(self.inputs)]
            taken = {name for name in own if name is not None}
            if len(taken) < len(own) - own.count(None):
                raise ValueError(f"Model: two inputs have the same name, of {', '.join(map(repr, own))}; give each its "
                                 f"own")  # fmt: skip
            for name in own:
                names.append(free_name("input", taken) if name is None else name)
                taken.add(names[-1])
        self._inputs = dict(zip(names, graph.inputs, strict=True))
        sources |= {slot: name for name, slot in self._inputs.items()}
        if isinstance(self.outputs, Mapping):
            self._outputs = {_text(name): slot for name, slot in graph.outputs.items()}
        else:
            self._outputs, taken = {}, set()
            for slot in [graph.outputs] if isinstance(graph.outputs, Slot) else graph.outputs:
                name = free_name(sources[slot], taken)
                taken.add(name)
                self._outputs[name] = slot
        self._input_names = None if isinstance(self.inputs, Symbol) else tuple(self._inputs)
        self._output_names = None if isinstance(self.outputs, Symbol) else tuple(self._outputs)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k not in ("inputs", "outputs")} | {
            "_input_form": _form(self.inputs), "_output_form": _form(self.outputs),
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        ends = state.pop("_input_form"), state.pop("_output_form")
        super().__setstate__(state)
        graph = self._graph
        given = {slot: Symbol(graph.shapes[slot], name=name) for name, slot in self._inputs.items()}
        symbols = graph.symbols(given)
        self.inputs = _formed(ends[0], [given[slot] for slot in graph.inputs])
        self.outputs = _formed(ends[1], [symbols[slot] for slot in self._outputs.values()])

    @property
    def options(self) -> dict[str, Any]:
        """What the graph is rebuilt from: see `_from_options`."""
        if "_graph" not in self.__dict__:  # the constructor's arguments are being read
            return {} if self.name is None else {"name": self.name}
        graph, layers = self._graph, list(self._graph.layers)
        steps = (
            (layers.index(s.name), _told(s.x), tuple((n, _told(v)) for n, v in s.options.items())) for s in graph.steps
        )
        return ({} if self.name is None else {"name": self.name}) | {
            "inputs": (_form(self.inputs), tuple((n, graph.shapes[slot]) for n, slot in self._inputs.items())),
            "layers": self.layers,
            "calls": tuple(steps),
            "outputs": (_form(self.outputs), tuple(slot.number for slot in self._outputs.values())),
        }

    @classmethod
    def _from_options(cls, options: dict[str, Any]) -> Self:
        form, ends = options["inputs"]
        values: list[Symbol] = [Input(batch_shape=shape, name=name) for name, shape in ends]
        inputs, layers = _formed(form, values), options["layers"]
        for index, x, others in options["calls"]:
            made = layers[index](_read(x, values), **{name: _read(value, values) for name, value in others})
            values = [*values, *leaves(made)]
        form, ends = options["outputs"]
        outputs = _formed(form, [values[number] for number in ends])
        return cls(inputs, outputs, name=options.get("name"))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, each once."""
        return tuple(self._graph.layers.values())

    def __repr__(self) -> str:
        return f"Model({self.inputs!r} -> {self.outputs!r}, {len(self.layers)} layers)"

    def get_layer(self, name: str) -> Layer:
        """Return the layer of that name, as `parameters` and `summary` have it; raise ValueError where none has."""
        return self._sublayers[self._known_name(name)]

    def get_output(self, name: str) -> Any:
        """Return the symbols of what the first call of the layer `name` returns, to build another model from.

        Examples
        --------
        >>> from fastclstm.layers import Dense
        >>> x = Input((3,))
        >>> model = Model(x, Dense(2, 1)(Dense(3, 2, name="middle")(x)))
        >>> Model(model.inputs, model.get_output("middle")).output_shape((5, 3))
        (5, 2)
        """
        self._known_name(name)
        symbols = self._graph.symbols(dict(zip(self._graph.inputs, leaves(self.inputs), strict=True)))
        return next(filled(step.y, symbols) for step in self._graph.steps if step.name == name)

    def _known_name(self, name: str) -> str:
        if name not in self._sublayers:
            raise ValueError(f"Model: there is no layer {name!r}; there are {', '.join(self._sublayers)}")
        return name

    def forward(self, x: Any, mask: Any = None, lengths: Any = None, training: bool = False) -> Any:
        """Return the outputs, one, a list or a dict of arrays, in memory of their own.

        Parameters
        ----------
        x : array, or list or dict of arrays
            As `inputs` was given. A list's order will do for a dict too, and names for a list.
        mask : array of bool (B, T), optional
            Handed to every ConvLSTM2D that was called without one; see `Sequential.forward`.
        lengths : array of int (B,), optional
            Instead of a mask.
        training : bool
            Compute as training does, and keep what `backward` needs.

        Raises
        ------
        ValueError
            Another number of arrays, other names, shapes that do not fit the inputs or the layers.
        TypeError
            Anything but real arrays; one on a GPU, where a layer does not compute there or is of another dtype.
        """
        given = self._by_slot("x", x)
        place = place_of(self, next(iter(given.values())), refuses=False)
        many = len(given) > 1
        arrays = {
            slot: place.read(f"input {name!r}" if many else "x", given[slot]) for name, slot in self._inputs.items()
        }
        self._check_shapes("x", {slot: array.shape for slot, array in arrays.items()})
        first = next(iter(arrays.values()))
        steps = self._steps(place, mask, lengths, first.shape)
        self._all_shapes({slot: array.shape for slot, array in arrays.items()})
        like = {slot: (array.shape, array.dtype) for slot, array in arrays.items()}
        self._pullback = None
        y, calls = self._run(place, arrays, steps, training)
        shapes = dict[Slot, Shape]()
        paired(self._graph.outputs, y, lambda slot, array: shapes.__setitem__(slot, array.shape))

        def pullback(dy: Any) -> Any:
            gradients: dict[Slot, Any] = {}

            def read(slot: Slot, part: Any) -> None:
                if part is not None:
                    array = place.read("dy", part)
                    if array.shape != shapes[slot]:
                        raise ValueError(f"Model: dy has shape {array.shape} but must be {shapes[slot]}, that of the "
                                         f"output {_name_of(self._outputs, slot)!r}")  # fmt: skip
                    gradients[slot] = gradients[slot] + array if slot in gradients else array

            with told_of("dy, which is to be in lists or dicts as the outputs are"):
                paired(self._graph.outputs, dy, read)
            pulled = self._pull(calls, gradients)
            if not self.input_gradient:
                return None
            dx = [place.restore(_or_zeros(pulled.get(slot), *like[slot])) for slot in self._graph.inputs]
            return _formed(_form(self.inputs), dx)

        if training:
            self._pullback = pullback
        return restored(place.restore, y)

    def backward(self, dy: Any) -> Any:
        """Return dx of the last call, which was a training call, as `inputs` was given.

        Parameters
        ----------
        dy : array, or list or dict of arrays
            Gradients of the outputs, as these are; None for one that nothing depends on.

        Raises
        ------
        RuntimeError
            The last call was not a training call.
        ValueError
            dy has not the outputs' form or shapes.
        """
        return self._recorded()(dy)

    def output_shape(self, input_shape: Any) -> Any:
        """Return the shapes of the outputs, in their form, for inputs of `input_shape`: one, a list or dict of shapes.

        Sizes may be None, and are None then in what depends on them.
        """
        return self._call_shapes(input_shape) if _is_known(input_shape) else tried(self._call_shapes, input_shape)

    def summary(self, input_shape: Any = None) -> str:
        """Return a table of the calls: output shapes, numbers of parameters, and what each is connected to.

        Examples
        --------
        >>> from fastclstm.layers import Conv2D
        >>> frames = Input((16, 16, 1), name="frames")
        >>> conv = Conv2D(1, 1, 3)
        >>> print(Model(frames, conv(conv(frames))).summary())
        layer   type    output shape       parameters  connected to
        ------  ------  -----------------  ----------  ------------
        frames  Input   (None, 16, 16, 1)           0
        conv2d  Conv2D  (None, 16, 16, 1)          10  frames
        conv2d  Conv2D  (None, 16, 16, 1)      shared  conv2d
        ------  ------  -----------------  ----------  ------------
        10 parameters, 10 trainable, 0.0 MB
        """
        shapes = self._graph.shapes
        if input_shape is not None:
            numbered = sorted(shapes, key=lambda slot: slot.number)

            def listed(given: Any) -> list[Shape]:
                made = self._all_shapes(self._by_slot("input_shape", given))
                return [made[slot] for slot in numbered]

            shapes = dict(zip(numbered, tried(listed, input_shape), strict=True))
        return connections(self, self._graph, self._inputs, shapes)

    def _call_shapes(self, x: Any, **options: Any) -> Any:
        given = self._by_slot("x", x)
        self._check_shapes("x", given)
        return filled(self._graph.outputs, self._all_shapes(given))

    def _unfit(self) -> str | None:
        return None

    def _several_outputs(self) -> str | None:
        if self._output_names is not None or self._input_names is not None:
            return "build the Model of one symbol, not of a list or dict"
        return None

    def _by_slot(self, what: str, given: Any) -> dict[Slot, Any]:
        """Return what a caller gave for each input by its slot."""
        if self._input_names is None and not isinstance(given, Mapping):
            return {self._graph.inputs[0]: given}
        return {
            self._inputs[name]: value
            for name, value in named_part(f"Model: {what}", given, tuple(self._inputs)).items()
        }

    def _check_shapes(self, what: str, shapes: Mapping[Slot, Shape]) -> None:
        """Raise ValueError unless the inputs have the shapes that the graph was built for, as far as they are known."""
        for name, slot in self._inputs.items():
            if not fits(shapes[slot], self._graph.shapes[slot]):
                told = what if self._input_names is None else f"input {name!r}"
                axis = (
                    "; the first axis is the batch's" if len(shapes[slot]) == len(self._graph.shapes[slot]) - 1 else ""
                )
                raise ValueError(f"Model: {told} has shape {shapes[slot]} but must be {self._graph.shapes[slot]}, as "
                                 f"its Input says{axis}")  # fmt: skip

    def _all_shapes(self, given: Mapping[Slot, Shape]) -> dict[Slot, Shape]:
        """Return the shapes of all that the steps return; raise ValueError where a layer does not fit."""
        shapes = dict(given)

        def keep(slot: Slot, shape: Any) -> None:
            if not is_shape(shape):
                raise ValueError(shape)
            shapes[slot] = shape

        for step in self._graph.steps:
            with told_of(step.told):
                options = {name: filled(value, shapes) for name, value in step.options.items() if name != "training"}
                made = step.layer._call_shapes(filled(step.x, shapes), **options)
                try:
                    paired(step.y, made, keep)
                except ValueError:
                    raise ValueError(f"{type(step.layer).__name__} returns other values than when the graph was built: "
                                     f"give its options back, or build the graph anew") from None  # fmt: skip
        return shapes

    def _check_batch(self, op: str, batch: Batch) -> None:
        given = {s: batch["x" if self._input_names is None else f"x:{n}"].shape for n, s in self._inputs.items()}
        with told_of(op):
            self._check_shapes("x", given)
            self._all_shapes(given)


def _form(given: Any) -> Any:
    """Return how inputs or outputs are given, as JSON holds it: None of one, a number of a list, names of a dict."""
    if isinstance(given, Mapping):
        return tuple(given)
    return len(given) if isinstance(given, list) else None


def _formed(form: Any, values: Sequence[Any]) -> Any:
    """Return values as `_form` says."""
    if form is None:
        return values[0]
    return list(values) if isinstance(form, int) else dict(zip(form, values, strict=True))


def _text(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"Model: inputs and outputs are named by texts, got {name!r}")
    return name


def _told(value: Any) -> Any:
    """Return slots and constants, in tuples, lists and dicts, as JSON holds them."""
    if isinstance(value, Slot):
        return ("at", value.number)
    if isinstance(value, tuple | list):
        return (type(value).__name__, *map(_told, value))
    if isinstance(value, Mapping):
        return ("dict", *((key, _told(item)) for key, item in value.items()))
    return ("is", value)


def _read(told: Any, values: Sequence[Symbol]) -> Any:
    """Undo `_told`, with symbols for the slots."""
    kind, *items = told
    if kind in ("at", "is"):
        return values[items[0]] if kind == "at" else items[0]
    if kind == "dict":
        return {key: _read(item, values) for key, item in items}
    return {"tuple": tuple, "list": list}[kind](_read(item, values) for item in items)


def _is_known(shape: Any) -> bool:
    sizes: list[Any] = []
    mapped_shapes(sizes.extend, shape)
    return None not in sizes


def _or_zeros(gradient: Any, shape: Shape, dtype: np.dtype) -> Any:
    if gradient is None:
        return np.zeros(shape, dtype if dtype.kind == "f" else np.float32)
    return gradient


def _name_of(names: Mapping[str, Slot], slot: Slot) -> str:
    return next(name for name, other in names.items() if other == slot)
