"""A recurrent cell of convolutions, one layer of a stack: its parameters, its run over a sequence, a single step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fastclstm import dispatch, functional
from fastclstm.layers.base import Parameter
from fastclstm.layers.cell_options import CellLayer, LSTMOptions
from fastclstm.layers.layout import Layout
from fastclstm.layers.place import HOST, Place
from fastclstm.layers.states import State, read_state
from fastclstm.nn import activations, initializers
from fastclstm.spec import CELL_GATES, UNKNOWN, CellSpec, Shape, choice, integers, of_rank

Outputs = tuple[np.ndarray, ...]
"""Of a run the output, and the last states."""


@dataclass(eq=False, repr=False)
class RecurrentCell(CellLayer):
    """What is of the options: a cell is called step by step, `Directions` runs it over sequences.

    A subclass has `_operation`, the name of one of `fastclstm.functional`, and `_cell`, that of its cell in `CellSpec`.
    """

    _operation: ClassVar[str]
    _cell: ClassVar[str]

    kernel = Parameter()
    recurrent_kernel = Parameter()
    bias = Parameter()
    gamma, beta = Parameter(), Parameter()

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        (self.out_channels,) = integers(op, "out_channels", self.out_channels, 1, 1)
        self.kernel_size = integers(op, "kernel_size", self.kernel_size, self._rank, 1)
        if self.recurrent_kernel_size is not None:
            self.recurrent_kernel_size = integers(
                op, "recurrent_kernel_size", self.recurrent_kernel_size, self._rank, 1
            )
        for name in self._activations:
            option = getattr(self, name)
            try:
                activations.get(self.activation if name == "output_activation" and option is None else option)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{op}: {name}: {error}") from None
        rng = np.random.default_rng(self.seed)
        self._dropout_rng = own_generator(rng)
        self._add_parameters(rng)
        self._check_options()
        self._made = True

    @property
    def _gates(self) -> int:
        return len(CELL_GATES[self._cell])

    def _add_parameters(self, rng: np.random.Generator) -> None:
        C, F, dtype, width = self.in_channels, self.out_channels, self.dtype, self._gates * self.out_channels
        recurrent_size = self.recurrent_kernel_size or self.kernel_size
        self._add_parameter("kernel", (*self.kernel_size, C, width), self.kernel_initializer, rng, dtype,
                            regularizer=self.kernel_regularizer, constraint=self.kernel_constraint)  # fmt: skip
        self._add_parameter("recurrent_kernel", (*recurrent_size, F, width), self.recurrent_initializer, rng, dtype,
                            regularizer=self.recurrent_regularizer, constraint=self.recurrent_constraint)  # fmt: skip
        if self.use_bias:
            self._add_parameter("bias", self._bias_shape(), self._drawn_bias(), rng, dtype,
                                regularizer=self.bias_regularizer, constraint=self.bias_constraint)  # fmt: skip
        self._add_further(rng)

    def _bias_shape(self) -> Shape:
        return (self._gates * self.out_channels,)

    def _drawn_bias(self) -> Any:
        """Return the initializer of the bias."""
        return self.bias_initializer

    def _add_further(self, rng: np.random.Generator) -> None:
        """Make the parameters beside kernels and biases."""
        if self.normalization is not None:
            for name, value in (("gamma", "ones"), ("beta", "zeros")):
                self._add_parameter(name, (self._gates * self.out_channels,), value, rng, self.dtype)

    def _geometry(self, frames: Shape, op: str) -> Any:
        """Return the geometry of the input convolution of frames (B, *space, C)."""
        return of_rank(self._rank)(
            frames, self._parameters["kernel"].shape, strides=self.stride, padding=self.padding,
            padding_mode=self.padding_mode, dilation=self.dilation, no_input=True, op=op,
        )  # fmt: skip

    def _state_shape(self, frames: Shape, op: str | None = None) -> Shape:
        """Return the shape (B, *grid, F) of the states for frames (B, *space, C)."""
        geometry = self._geometry(frames, op or type(self).__name__)
        shape: Shape = (*geometry.output_shape[:-1], self.out_channels)
        return shape

    def _run(
        self, x: np.ndarray, state: State, *, mask: np.ndarray | None = None, go_backwards: bool = False,
        return_sequences: bool = True, training: bool = False, frozen: bool = False, **options: Any,
    ) -> tuple[Outputs, Any]:  # fmt: skip
        """Run over a channels-last sequence: the output, the last states and, while training, their pullback.

        Where the layer is `frozen`, batch normalization uses its moving statistics; `options` are those of the
        operation's vjp alone.
        """
        learning = training and self.trainable and not frozen
        arguments = x, self.kernel, self.recurrent_kernel, self.bias
        given = {
            "initial_state": state,
            "mask": mask,
            "go_backwards": go_backwards,
            "return_sequences": return_sequences,
            "return_state": True,
            **self._options(learning),
        }
        if not training:
            outputs: Outputs = getattr(functional, self._operation)(*arguments, **given)
            return outputs, None
        frames = x.shape[0], *x.shape[2:]
        masks = {"x": self._draw(self.dropout, frames),
                 "h": self._draw(self.recurrent_dropout, self._state_shape(frames))}  # fmt: skip
        given["dropout_masks"] = {name: mask for name, mask in masks.items() if mask is not None} or None
        result: tuple[Outputs, Any] = getattr(functional, f"{self._operation}_vjp")(*arguments, **given, **options)
        return result

    def _draw(self, rate: float, shape: Shape) -> np.ndarray | None:
        """Draw the inverted dropout mask of each gate: what is kept is scaled up."""
        if rate == 0:
            return None
        kept = self._dropout_rng.random((self._gates, *shape), np.float32) >= rate
        return kept * np.dtype(self.dtype).type(1 / (1 - rate))

    def _learn(self, pullback: Any) -> None:
        """Take from a training call what lasts, if anything."""

    def _options(self, learning: bool = False) -> dict[str, Any]:
        """Options of the operation that are the cell's."""
        have = self._parameters.get
        options = {name: getattr(self, name) for name in self._activations} | {
            "strides": self.stride,
            "padding": self.padding,
            "padding_mode": self.padding_mode,
            "dilation": self.dilation,
            "recurrent_dilation": self.recurrent_dilation,
            "algorithm": self.algorithm,
            "engine": self.engine,
        }
        if self.normalization is not None:
            options["normalization"] = self.normalization
            options["normalization_weights"] = {name: have(name) for name in ("gamma", "beta")}
        return options

    def _named_gradients(self, gradients: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Name the parameters' gradients in what a pullback returned as the parameters are named."""
        named = {**gradients, **gradients.get("normalization_weights", {})}
        return {name: named[name] for name in self._parameters if name not in self._statistics}

    def _check_options(self) -> None:
        """Raise now, not at the first call, where an option is wrong for every input."""
        op = type(self).__name__.removesuffix("Cell")
        options = self._options()
        choice(op, "algorithm", options.pop("algorithm"), dispatch.algorithms(self.engine))
        del options["engine"]
        arrays = options.pop("normalization_weights", None) or {}
        frames = (1, 1, *(UNKNOWN,) * self._rank, self.in_channels)
        CellSpec.infer(
            self._cell, frames, self._parameters["kernel"].shape, self._parameters["recurrent_kernel"].shape,
            rank=self._rank, normalization_shapes={key: array.shape for key, array in arrays.items()}, op=op, **options,
        )  # fmt: skip

    # One step

    def _step(self, x_t: Any, states: State, training: bool) -> tuple[Any, ...]:
        """Return the states after a frame of the caller's, given his, each of which may be None."""
        place = self._place(x_t, training)
        layout, x, state = self._read(place, x_t, states)
        self._pullback = None
        if training:  # so that the gradients of all are there
            zeros = np.zeros_like(x, shape=self._state_shape(x.shape))
            state = tuple(zeros if array is None else array for array in state)
        outputs, pullback = self._run(x[:, np.newaxis], state, training=training, return_sequences=False)
        if pullback is not None:
            self._learn(pullback)
            self._pullback = lambda *d: self._pull(pullback, layout, outputs[1].shape, d)
        return tuple(place.restore(layout.write(array)) for array in outputs[1:])

    def _unfit(self) -> str | None:
        return f"takes one step at a time; use {type(self).__name__.removesuffix('Cell')}"

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the shape of the states for an x_t of `input_shape`."""
        layout = self._layout(input_shape)
        return layout.shape(self._state_shape(layout.read_shape("x", input_shape)))

    def _layout(self, shape: Shape, place: Place = HOST) -> Layout:
        """Return how arrays lie where x has `shape`."""
        channel_axis = 0 if self.data_format == "channels_first" else -1
        batched = len(shape) != self._rank + 1 or shape[channel_axis] != self.in_channels
        return Layout(type(self).__name__, self.dtype, self.data_format, batched=batched, place=place, rank=self._rank)

    def _read(self, place: Place, x_t: Any, states: State) -> tuple[Layout, np.ndarray, State]:
        """Return how the caller's arrays lie, and these as the engines take them."""
        array = place.read("x", x_t, self.dtype)
        layout = self._layout(array.shape, place)
        x = layout.read("x", array)
        shape = self._state_shape(x.shape)
        return layout, x, read_state(layout, f"{layout.op}: initial state", states, shape)

    def _pull(
        self, pullback: Callable[..., Any], layout: Layout, state_shape: Shape, d: State
    ) -> tuple[Any, ...]:  # fmt: skip
        dstate = read_state(layout, f"{layout.op}: gradient of", d, state_shape)
        gradients = pullback((None, *dstate))
        self._keep_gradients(self._named_gradients(gradients))
        before = gradients["x"][:, 0], *gradients["initial_state"]
        return tuple(layout.place.restore(layout.write(array)) for array in before)


@dataclass(eq=False, repr=False)
class StepOfH(RecurrentCell):
    """A cell that carries h alone: ``h = cell(x_t, h)``."""

    def forward(self, x_t: Any, h: Any = None, training: bool = False) -> Any:
        """Return the next h.

        Parameters
        ----------
        x_t : array (B, H, W, C), or (B, C, H, W) with data_format="channels_first"
            Converted to the layer's dtype. A single frame without the batch axis will do, with a state of its kind.
        h : array (B, HO, WO, F), or (B, F, HO, WO), optional
            The state so far; None is zeros.
        training : bool
            Keep what `backward` needs, and apply dropout.

        Raises
        ------
        ValueError
            Shapes that do not fit the layer.
        TypeError
            Anything but real arrays; arrays on a GPU.
        """
        (h,) = self._step(x_t, (h,), training)
        return h

    def backward(self, dh: Any = None) -> tuple[Any, Any]:
        """Return (dx_t, dh) of the last call's inputs, given the gradient `dh` of its h.

        Raises
        ------
        RuntimeError
            The last call was not a training call.
        ValueError
            The gradient has not the state's shape.
        """
        dx, dh = self._recorded()(dh)
        return dx, dh


@dataclass(eq=False, repr=False)
class LSTMCell(RecurrentCell, LSTMOptions):
    """A cell that carries h and c: ``h, c = cell(x_t, h, c)``."""

    _cell = "lstm"

    def _drawn_bias(self) -> Any:
        drawn = initializers.get(self.bias_initializer)
        return unit_forget(drawn) if self.unit_forget_bias else drawn

    def forward(self, x_t: Any, h: Any = None, c: Any = None, training: bool = False) -> tuple[Any, Any]:
        """Return the next (h, c).

        Parameters
        ----------
        x_t : array (B, H, W, C), or (B, C, H, W) with data_format="channels_first"
            Converted to the layer's dtype; of a ConvLSTM3D with a depth before H. A single frame without the batch axis
            will do, with states of its kind.
        h, c : array (B, HO, WO, F), or (B, F, HO, WO), optional
            The states so far; None is zeros. Flax's carry is (c, h), the other way round.
        training : bool
            Keep what `backward` needs, and apply dropout.

        Raises
        ------
        ValueError
            Shapes that do not fit the layer.
        TypeError
            Anything but real arrays; arrays on a GPU that are not of the layer's dtype or not on that of x.
        NotImplementedError
            An x on a GPU, and an option that the engine "cuda" does not know.
        """
        h, c = self._step(x_t, (h, c), training)
        return h, c

    def backward(self, dh: Any = None, dc: Any = None) -> tuple[Any, Any, Any]:
        """Return (dx_t, dh, dc) of the last call's inputs, given the gradients `dh` of its h and `dc` of its c.

        Raises
        ------
        RuntimeError
            The last call was not a training call.
        ValueError
            A gradient has not its state's shape.
        """
        dx, dh, dc = self._recorded()(dh, dc)
        return dx, dh, dc


def own_generator(rng: np.random.Generator) -> np.random.Generator:
    """Return a generator for later draws, so that these do not depend on how many were made before."""
    try:
        return rng.spawn(1)[0]
    except TypeError:  # a caller's, which cannot be split
        return rng


def unit_forget(initializer: initializers.Initializer) -> Any:
    """Return the initializer of a bias (4F,) whose forget block is one."""

    def initialize(shape: tuple[int, ...], rng: np.random.Generator, dtype: Any) -> np.ndarray:
        F = shape[0] // 4
        parts = initializer((F,), rng, dtype), np.ones(F, dtype), initializer((2 * F,), rng, dtype)
        return np.concatenate(parts)

    return initialize
