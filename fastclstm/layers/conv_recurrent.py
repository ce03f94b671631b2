"""Stacked recurrent layers of any cell over whole sequences, in one direction or both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.base import Parameter, expect_parameters
from fastclstm.layers.cell_options import CellLayer
from fastclstm.layers.directions import MERGE_MODES, Directions, Merged, several
from fastclstm.layers.layout import Layout
from fastclstm.layers.masks import steps_mask
from fastclstm.layers.place import HOST, Place
from fastclstm.layers.recurrent_cell import RecurrentCell, own_generator
from fastclstm.layers.stack import Stack
from fastclstm.layers.states import LastStates, State, each_state, is_state, read_states
from fastclstm.layers.symbolic import fits
from fastclstm.layers.tape import Tape
from fastclstm.nn import regularizers
from fastclstm.spec import Shape, choice, flag, integers, rate

_DIRECTIONS = ("forward", "backward")


@dataclass(eq=False, repr=False)
class ConvRecurrent(CellLayer):
    """Cells, one on the other and in one direction or both, over whole sequences; a subclass has `_cell_class`."""

    FLAGS: ClassVar[tuple[str, ...]] = (
        "return_sequences", "return_state", "go_backwards", "stateful", "zero_output_for_mask", "time_major"
    )  # fmt: skip
    CHANGEABLE: ClassVar[frozenset[str]] = CellLayer.CHANGEABLE | {*FLAGS, "time_dropout"}
    _cell_class: ClassVar[type[RecurrentCell]]
    _symbolic_options: ClassVar[frozenset[str]] = frozenset({"initial_state", "mask", "lengths"})

    num_layers: int = 1
    _: KW_ONLY
    return_sequences: bool = True
    return_state: bool = False
    go_backwards: bool = False
    stateful: bool = False
    bidirectional: bool = False
    merge_mode: str | None = "concat"
    zero_output_for_mask: bool = False
    time_major: bool = False
    time_dropout: float = 0.0
    activity_regularizer: Any = None

    def __post_init__(self) -> None:
        op = type(self).__name__
        (self.num_layers,) = integers(op, "num_layers", self.num_layers, 1, 1)
        expect_parameters(op, self.num_layers)
        if np.ndim(self.out_channels) == 1 and len(self.out_channels) != self.num_layers:
            raise ValueError(f"{op}: out_channels {self.out_channels!r} names {len(self.out_channels)} layers, but "
                             f"num_layers is {self.num_layers}")  # fmt: skip
        filters = integers(op, "out_channels", self.out_channels, self.num_layers, 1)
        self.out_channels = filters[0] if np.ndim(self.out_channels) == 0 else filters
        kernel_sizes = self._sizes("kernel_size")
        self.kernel_size = kernel_sizes if _is_per_layer(self.kernel_size) else kernel_sizes[0]
        recurrent_sizes = kernel_sizes
        if self.recurrent_kernel_size is not None:
            recurrent_sizes = self._sizes("recurrent_kernel_size")
            per_layer = _is_per_layer(self.recurrent_kernel_size)
            self.recurrent_kernel_size = recurrent_sizes if per_layer else recurrent_sizes[0]
        super().__post_init__()
        for name in (*self.FLAGS, "bidirectional"):
            flag(op, name, getattr(self, name))
        choice(op, "merge_mode", self.merge_mode, MERGE_MODES)
        if self.bidirectional and self.merge_mode is None and self.num_layers > 1:
            raise ValueError(
                f"{op}: merge_mode=None gives two outputs, which {self.num_layers} stacked layers cannot hand on; "
                f"choose 'concat', 'sum', 'mul' or 'ave', or stack layers of your own"
            )
        rate(op, "time_dropout", self.time_dropout, one=True)
        given = self.activity_regularizer
        self._activity_regularizer = None if given is None else regularizers.get(given)
        self._activity_penalty = 0.0
        self._stack = self._built(filters, kernel_sizes, recurrent_sizes)
        self._sublayers = {
            f"layers.{index}" + (f".{direction}" if self.bidirectional else ""): cell
            for index, layer in enumerate(self._stack.layers)
            for direction, cell in zip(_DIRECTIONS, layer.cells, strict=False)
        }
        self.state_gradients: list[tuple[Any, ...]] | None = None
        self._states: LastStates | None = None
        self._made = True

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(self._cell_class, name, None), Parameter):
            raise AttributeError(
                f"{type(self).__name__}: {name} is a parameter of a cell; assign to layer.cells[0].{name}"
            )
        super().__setattr__(name, value)

    def _sizes(self, name: str) -> tuple[Shape, ...]:
        """Return the kernel size, as many numbers as a frame has axes, of each layer."""
        op, given = type(self).__name__, getattr(self, name)
        sizes = list(given) if _is_per_layer(given) else [given] * self.num_layers
        if len(sizes) != self.num_layers:
            raise ValueError(
                f"{op}: {name} {given!r} lists {len(sizes)} layers but num_layers is {self.num_layers}; "
                f"a tuple (height, width) of integers serves every layer"
            )
        return tuple(integers(op, name, size, self._rank, 1) for size in sizes)

    def _built(self, filters: Sequence[int], kernel_sizes: Sequence[Shape], recurrent_sizes: Sequence[Shape]) -> Stack:
        rng = np.random.default_rng(self.seed)
        self._time_dropout_rng = own_generator(rng)
        known = self._cell_class.__dataclass_fields__
        options = {name: value for name, value in self.options.items() if name in known}
        options.pop("name", None)
        layers: list[Directions] = []
        C = self.in_channels
        for F, size, recurrent_size in zip(filters, kernel_sizes, recurrent_sizes, strict=True):
            options |= {"in_channels": C, "out_channels": F, "kernel_size": size, "seed": rng,
                        "recurrent_kernel_size": recurrent_size}  # fmt: skip
            told = self._cell_options(options)
            with self._own_errors():
                cells = [self._cell_class(**told) for _ in range(2 if self.bidirectional else 1)]
            if (frame := told.get("frame_size")) is not None:
                grid = cells[0]._state_shape((1, *frame, C), type(self).__name__)[1:-1]
                options["frame_size"] = grid[-self._rank :]
            layers.append(Directions(cells, self.merge_mode))
            C = layers[-1].channels
        return Stack(layers, self.leaky_relu_slope)

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """Have errors name this layer, whose options they are of, and not its cell."""
        op, cell = type(self).__name__, self._cell_class.__name__
        try:
            yield
        except (TypeError, ValueError) as error:
            told = str(error)
            for name in (op, cell, cell.removesuffix("Cell")):
                told = told.removeprefix(f"{name}: ")
            error.args = (f"{op}: {told}",)
            raise

    def _cell_options(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a cell's options of the layer's."""
        return options

    def _run_options(self) -> dict[str, Any]:
        """Return what a run of the cells is told besides."""
        return {}

    @property
    def cells(self) -> tuple[Any, ...]:
        """The cells, layer by layer; with bidirectional the forward and the backward one of each."""
        return self._stack.cells

    @property
    def penalty(self) -> float:
        """Sum of the penalties on the parameters, and on the output of the last training call."""
        return super().penalty + self._activity_penalty

    @property
    def states(self) -> LastStates | None:
        """Where stateful: the states (B, HO, WO, F), or (B, F, HO, WO), that the next call starts from; as NumPy's."""
        layout = Layout(type(self).__name__, self.dtype, self.data_format, rank=self._rank)
        held = self._states
        if held is None:
            return None
        return [tuple(layout.write(dispatch.to_numpy(array.copy())) for array in state) for state in held]

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("_states", "state_gradients"):
            if state[name] is not None:
                state[name] = [tuple(map(dispatch.to_numpy, pair)) for pair in state[name]]
        return state

    def reset_state(self) -> None:
        """Forget the states: the next call starts from zeros."""
        self._states = None

    def forward(
        self, x: Any, initial_state: Any = None, mask: Any = None, lengths: Any = None, training: bool = False
    ) -> Any:
        """Return the hidden sequence, or what return_sequences, merge_mode and return_state make of it.

        Parameters
        ----------
        x : array (B, T, H, W, C), or (B, T, C, H, W) with data_format="channels_first"
            Any real dtype; converted to the layer's. Of a ConvLSTM1D without H, of a ConvLSTM3D with a depth before H.
            With time_major T stands before B. A single sequence without the batch axis will do: outputs, states and
            mask then have none either. So a batch of frames (B, H, W, C) whose time axis was forgotten is computed as
            one sequence of B steps: give x[:, np.newaxis].
        initial_state : list of states, optional
            A state (h, c), or (h,) where cells carry h alone, of arrays (B, HO, WO, F) a cell, where None is zeros; for
            a single cell its state will do, and h itself for (h,). h comes first: Flax's carry is (c, h), of the same
            shapes, and must be turned round.
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
            Shapes that do not fit the layer; both mask and lengths; stateful, and a batch of another size.
        TypeError
            Anything but real arrays; arrays on a GPU that are not of the layer's dtype or not on that of x.
        NotImplementedError
            An x on a GPU, and an option that the engine "cuda" does not know.
        """
        layer, place = type(self).__name__, self._place(x, training)
        if place.on_gpu and training and self._activity_regularizer is not None:
            raise NotImplementedError(f"{layer}: activity_regularizer is not for an x on a GPU; move x to the CPU")
        array = place.read("x", x, self.dtype)
        layout = self._layout(array.shape, place)
        sequence = layout.read("x", array, sequence=True)
        if sequence.shape[1] == 0:
            raise ValueError(f"{layer}: x has no time steps {array.shape}; at least one is needed")
        shapes = self._state_shapes((sequence.shape[0], *sequence.shape[2:]))
        states = self._initial_states(layout, initial_state, shapes)
        steps = steps_mask(layout.read_steps("mask", mask, sequence.shape[:2]), lengths, sequence.shape[:2], layer)
        self._pullback = None
        tape = Tape(layout, shapes, initial_state is not None) if training else None
        if tape is not None and self.time_dropout > 0:
            sequence = tape.drop_steps(self.time_dropout, sequence, self._time_dropout_rng)
        for cell in self.cells:
            cell.engine, cell.algorithm = self.engine, self.algorithm
        output, last_states = self._stack.run(
            sequence, states, place.bring(steps), tape, return_sequences=self.return_sequences,
            go_backwards=self.go_backwards, zero_output_for_mask=self.zero_output_for_mask,
            frozen=not self.trainable, **self._run_options(),
        )  # fmt: skip
        if self.stateful:
            self._states = [tuple(array.copy() for array in state) for state in last_states]
        written = [layout.write(part) for part in several(output)]
        if tape is not None:
            self._finish(tape, output, written)
        result = tuple(map(place.restore, written)) if isinstance(output, tuple) else place.restore(written[0])
        if not self.return_state:
            return result
        return result, [tuple(place.restore(layout.write(array)) for array in state) for state in last_states]

    def _finish(self, tape: Tape, output: Merged, written: list[np.ndarray]) -> None:
        """Take from a training call what lasts: moving statistics, the penalty on the output, the way back."""
        for cell, pullback in zip(self.cells, tape.pullbacks, strict=True):
            cell._learn(pullback)
        tape.output_shapes = [part.shape for part in several(output)]
        self._activity_penalty, count = 0.0, tape.output_shapes[0][0]
        if self._activity_regularizer is not None and count:
            self._activity_penalty = sum(map(self._activity_regularizer, written)) / count
            tape.penalties = [self._activity_regularizer.gradient(part) / part.dtype.type(count) for part in written]
        self._pullback = lambda dy, dstates=None: self._pull(tape, dy, dstates)

    def backward(self, dy: Any, dstates: Any = None) -> Any:
        """Return dx of the last call, in x's shape and as its kind of array.

        Parameters
        ----------
        dy : array of the output's shape, or None for zeros
            With merge_mode=None a pair of these.
        dstates : list of (dh, dc) or (dh,), optional
            Gradients of the last states, in initial_state's form.

        Raises
        ------
        RuntimeError
            The last call was not a training call.
        ValueError
            A gradient has not the shape of what it belongs to.
        """
        return self._recorded()(dy, dstates)

    def output_shape(self, input_shape: Shape) -> Any:
        """Return the shape of the output for an x of `input_shape`; with merge_mode=None the pair of shapes."""
        unknown = [axis for axis in (0, 1) if len(input_shape) == self._rank + 3 and input_shape[axis] is None]
        shape = tuple(1 if axis in unknown else n for axis, n in enumerate(input_shape))
        layout = self._layout(shape)
        B, T, *frame = layout.read_shape("x", shape, sequence=True)
        if T == 0:
            raise ValueError(f"{type(self).__name__}: x has no time steps {input_shape}; at least one is needed")
        B, *grid, _ = self._state_shapes((B, *frame))[-1]
        whole = layout.shape((B, T, *grid, self._stack.channels))
        known = tuple(None if axis in unknown else n for axis, n in enumerate(whole))
        if not self.return_sequences:
            time = (0 if self.time_major else 1) if layout.batched else 0
            known = (*known[:time], *known[time + 1 :])
        return (known, known) if self.bidirectional and self.merge_mode is None else known

    def _call_shapes(
        self, x: Any, *, initial_state: Any = None, mask: Any = None, lengths: Any = None, **options: Any
    ) -> Any:
        output = self.output_shape(x)
        layout = self._layout(x)
        if not layout.batched:
            raise ValueError(f"{layout.op}: in a graph x must be ({replace(layout, batched=True).axes(True)}), got "
                             f"{len(x)}D {x}")  # fmt: skip
        frames = layout.read_shape("x", x, sequence=True)
        shapes = [layout.shape(shape) for shape in self._state_shapes((frames[0], *frames[2:]))]
        if initial_state is not None:
            given = each_state(layout.op, "initial_state", initial_state, self._state_names, len(shapes), self._each)
            for state, shape in zip(given, shapes, strict=True):
                for name, array in zip(self._state_names, state or (), strict=False):
                    if array is not None and not fits(array, shape):
                        raise ValueError(f"{layout.op}: {name} of initial_state has shape {array} but must be {shape}, "
                                         f"that of the layer's states")  # fmt: skip
        for name, value, axes in (("mask", mask, x[:2]), ("lengths", lengths, frames[:1])):
            if value is not None and not fits(value, axes):
                raise ValueError(f"{layout.op}: {name} has shape {value} but must be {axes}, as x is {x}")
        return (output, [(shape,) * len(self._state_names) for shape in shapes]) if self.return_state else output

    def _pull_call(self, dy: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        dx = self.backward(*dy) if self.return_state else self.backward(dy)
        dstates: Any = self.state_gradients
        given = options.get("initial_state")
        if dstates is None or given is None:
            return dx, {"initial_state": None}
        if not isinstance(given, list | tuple):
            return dx, {"initial_state": dstates[0][0]}
        bare = [not isinstance(state, list | tuple) for state in given]
        if is_state(given, self._state_names) and len(self.cells) == 1:
            return dx, {"initial_state": dstates[0]}
        return dx, {"initial_state": [d[0] if alone and len(d) == 1 else d
                                      for d, alone in zip(dstates, bare, strict=True)]}  # fmt: skip

    def _layout(self, shape: Shape, place: Place = HOST) -> Layout:
        """Return how arrays lie where x has `shape`."""
        channel_axis = 1 if self.data_format == "channels_first" else -1
        batched = len(shape) != self._rank + 2 or shape[channel_axis] != self.in_channels
        op = type(self).__name__
        return Layout(op, self.dtype, self.data_format, self.time_major, batched, place, self._rank)

    def _state_shapes(self, frames: Shape) -> list[Shape]:
        """Return the shape (B, *grid, F) of each cell's states for frames (B, *space, C)."""
        return self._stack.state_shapes(frames, type(self).__name__)

    def _several_outputs(self) -> str | None:
        if self.return_state:
            return "give it return_state=False"
        if self.bidirectional and self.merge_mode is None:
            return "give it a merge_mode, such as 'concat'"
        return None

    def _initial_states(self, layout: Layout, value: Any, shapes: list[Shape]) -> list[State]:
        if value is not None or not self.stateful or self._states is None:
            return read_states(layout, "initial_state", value, shapes, self._each, self._state_names)
        held = [state[0].shape for state in self._states]
        if held != shapes:
            raise ValueError(
                f"{layout.op}: the states kept from the last call are {held}, but this x needs {shapes}; "
                f"call reset_state() before another batch, or leave stateful out"
            )
        return [tuple(map(layout.place.bring, state)) for state in self._states]

    @property
    def _each(self) -> str:
        return "one a layer and direction, forward first" if self.bidirectional else "one a layer"

    def _pull(self, tape: Tape, dy: Any, dstates: Any) -> Any:
        dlast = read_states(tape.layout, "dstates", dstates, tape.shapes, self._each, self._state_names)
        dy = tape.read_cotangent(dy)
        dx, gradients, before = self._stack.backward(tape, dy, dlast, self.input_gradient)
        self.state_gradients = tape.write_states(before)
        named = zip(self._sublayers, gradients, strict=True)
        self._keep_gradients({f"{cell}.{name}": array for cell, arrays in named for name, array in arrays.items()})
        return tape.write_input(dx)


def _is_per_layer(kernel_size: Any) -> bool:
    """Tell sizes given layer by layer from one size for all."""
    return isinstance(kernel_size, list) or (isinstance(kernel_size, tuple) and any(map(np.ndim, kernel_size)))
