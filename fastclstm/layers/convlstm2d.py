"""ConvLSTM2D, stacked layers over whole sequences, and ConvLSTM2DCell, one layer one step at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm import dispatch, functional
from fastclstm.layers.base import Layer, Parameter, layer_dtype
from fastclstm.nn import activations, initializers
from fastclstm.spec import DATA_FORMATS, ConvSpec, Pair, Shape, choice, expect_shape, integers, positive_or_none

State = tuple[np.ndarray | None, np.ndarray | None]

_LAYOUTS = {"channels_last": "height, width, channels", "channels_first": "channels, height, width"}
_GATES = "ifco"
"""The gates' names in `GateWeights`, where g is called c, in their order on the 4F axis."""


@dataclass(eq=False, repr=False)
class _ConvLSTMLayer(Layer):
    """The options that the cell and the stacked layers share."""

    in_channels: int
    out_channels: Any
    kernel_size: Any
    padding: Any = "same"
    stride: Any = 1
    leaky_relu_slope: float | None = None
    _: KW_ONLY
    use_bias: bool = True
    unit_forget_bias: bool = True
    kernel_initializer: Any = "glorot_uniform"
    recurrent_initializer: Any = "orthogonal"
    bias_initializer: Any = "zeros"
    activation: Any = "tanh"
    recurrent_activation: Any = "sigmoid"
    output_activation: Any = None
    dilation: Any = 1
    padding_mode: str = "zeros"
    recurrent_dilation: Any = 1
    cell_clip: float | None = None
    data_format: str = "channels_last"
    dtype: Any = "float32"
    seed: int | np.random.Generator | None = None
    engine: str | None = None
    algorithm: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        (self.in_channels,) = integers(op, "in_channels", self.in_channels, 1, 1)
        self.dtype = layer_dtype(op, self.dtype)
        choice(op, "data_format", self.data_format, DATA_FORMATS)
        slope = self.leaky_relu_slope
        if slope is not None and not (isinstance(slope, int | float) and math.isfinite(slope)):
            raise ValueError(f"{op}: leaky_relu_slope must be a finite number or None, got {slope!r}")

    def _read(self, name: str, value: Any, channel_axis: int) -> np.ndarray:
        """Return `value` as an array of the layer's dtype with the channels last."""
        array = dispatch.as_numpy(type(self).__name__, name, value)
        if self.data_format == "channels_first" and array.ndim > channel_axis:
            array = np.moveaxis(array, channel_axis, -1)
        return dispatch.native(array, np.dtype(self.dtype))

    def _write(self, array: np.ndarray, channel_axis: int) -> np.ndarray:
        """Return a channels-last array in the layer's data format."""
        if self.data_format == "channels_last":
            return array
        return np.ascontiguousarray(np.moveaxis(array, -1, channel_axis))

    def _frame_shape(self, shape: Sequence[int]) -> Shape:
        """Return (H, W, C) of a frame's shape in the layer's data format."""
        return tuple(shape) if self.data_format == "channels_last" else (*shape[1:], shape[0])

    def _check_rank(self, shape: Shape, *leading: str) -> None:
        """Raise ValueError unless `shape` has the `leading` axes, then those of a frame."""
        rank = len(leading) + 3
        if len(shape) != rank:
            axes = f"{', '.join(leading)}, {_LAYOUTS[self.data_format]}"
            channel = ", x[..., np.newaxis] for one channel" if self.data_format == "channels_last" else ""
            hint = f"; add the missing axis: x[np.newaxis] for a batch of one{channel}" if len(shape) < rank else ""
            op = type(self).__name__
            raise ValueError(f"{op}: x must be {rank}D ({axes}), got {len(shape)}D {tuple(shape)}{hint}")


@dataclass(eq=False, repr=False)
class ConvLSTM2DCell(_ConvLSTMLayer):
    """One ConvLSTM layer, one time step at a time: ``h, c = cell(x_t, h, c)``.

    With ``z = kernel * x + recurrent_kernel * h + bias`` split into z_i, z_f, z_g, z_o on its last axis:
    ``i, f, o = σ(z_i), σ(z_f), σ(z_o)``, ``g = tanh(z_g)``, ``c' = f∘c + i∘g``, ``h' = o∘tanh(c')``.

    Parameters
    ----------
    in_channels, out_channels : int
        C and F.
    kernel_size : int or (int, int)
        Of the input's and of the hidden state's convolution.
    padding, stride
        Of the input's convolution, as in `ConvLSTM2D`; the hidden state's is always "same" with stride 1.
    leaky_relu_slope : float, optional
        Accepted for symmetry with `ConvLSTM2D`, without effect: the LeakyReLU stands between stacked layers only.
    use_bias, unit_forget_bias, kernel_initializer, recurrent_initializer, bias_initializer, activation, \
recurrent_activation, output_activation, dilation, padding_mode, recurrent_dilation, cell_clip, data_format, dtype, \
seed, engine, algorithm
        As in `ConvLSTM2D`.

    Attributes
    ----------
    kernel : array (KH, KW, C, 4F)
    recurrent_kernel : array (KH, KW, F, 4F)
    bias : array (4F,) or None
        The parameters, gates in the order i, f, g, o: read-only; assign a new array to change one.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    References
    ----------
    Shi et al., "Convolutional LSTM Network: A Machine Learning Approach for Precipitation Nowcasting", NeurIPS 2015,
    eq. 3, without its peepholes.

    Examples
    --------
    >>> import numpy as np
    >>> cell = ConvLSTM2DCell(1, 4, 3, "same", 1, None, seed=0, engine="reference")
    >>> h, c = cell(np.ones((2, 8, 8, 1)), None, None)
    >>> h.shape, cell.weights["W_hi"].shape
    ((2, 8, 8, 4), (4, 4, 3, 3))
    """

    kernel = Parameter()
    recurrent_kernel = Parameter()
    bias = Parameter()

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "ConvLSTM2DCell"
        (self.out_channels,) = integers(op, "out_channels", self.out_channels, 1, 1)
        KH, KW = self.kernel_size = integers(op, "kernel_size", self.kernel_size, 2, 1)
        rng, C, F = np.random.default_rng(self.seed), self.in_channels, self.out_channels
        self._add_parameter("kernel", (KH, KW, C, 4 * F), initializers.get(self.kernel_initializer), rng, self.dtype)
        self._add_parameter(
            "recurrent_kernel", (KH, KW, F, 4 * F), initializers.get(self.recurrent_initializer), rng, self.dtype
        )
        bias_initializer = initializers.get(self.bias_initializer)
        if self.use_bias:
            initializer = _unit_forget(bias_initializer) if self.unit_forget_bias else bias_initializer
            self._add_parameter("bias", (4 * F,), initializer, rng, self.dtype)
        self._check_options()

    @property
    def weights(self) -> GateWeights:
        """The parameters gate by gate: see `GateWeights`."""
        return GateWeights({"": self})

    def forward(self, x_t: Any, h: Any = None, c: Any = None, training: bool = False) -> tuple[Any, Any]:
        """Return the next (h, c).

        Parameters
        ----------
        x_t : array (B, H, W, C), or (B, C, H, W) with data_format="channels_first"
            Converted to the layer's dtype.
        h, c : array (B, HO, WO, F), or (B, F, HO, WO), optional
            The states so far; None is zeros.
        training : bool
            Keep what `backward` needs.

        Raises
        ------
        ValueError
            Shapes that do not fit the layer.
        TypeError
            Anything but real arrays in the processor's memory.
        """
        restore = dispatch.restorer(x_t)
        x = self._read("x", x_t, 1)
        self._check_rank(np.shape(x_t), "batch")
        geometry = self._geometry(x.shape, "ConvLSTM2DCell")
        state = self._read_state("ConvLSTM2DCell: initial state", (h, c), geometry)
        self._pullback = None
        outputs, pullback = self._run(x[:, np.newaxis], state, training=training, return_sequences=False)
        if pullback is not None:
            self._pullback = lambda dh, dc: self._pull(pullback, geometry, dh, dc, restore)
        return restore(self._write(outputs[1], 1)), restore(self._write(outputs[2], 1))

    def step(self, x_t: Any, h: Any = None, c: Any = None, *, out: Any = None) -> tuple[Any, Any]:
        """Return the next (h, c), as `forward` does, or write them to `out` and return that.

        Parameters
        ----------
        x_t, h, c
            As in `forward`.
        out : (h, c), optional
            NumPy arrays (B, HO, WO, F) of the layer's dtype, writeable and C-contiguous, that receive the new states.
            Their memory is their own, but the new c may be the old c itself. See `functional.convlstm2d_step`.

        Raises
        ------
        ValueError
            Shapes that do not fit the layer; an `out` that cannot be written as said, or with "channels_first".
        TypeError
            Anything but real arrays in the processor's memory.

        Examples
        --------
        >>> import numpy as np
        >>> cell = ConvLSTM2DCell(1, 4, 3, seed=0, engine="reference")
        >>> state = cell.step(np.ones((2, 8, 8, 1)))
        >>> spare = np.empty_like(state[0]), np.empty_like(state[1])
        >>> for frame in np.ones((5, 2, 8, 8, 1), np.float32):
        ...     state, spare = cell.step(frame, *state, out=spare), state
        """
        if out is None:
            return self.forward(x_t, h, c)
        if self.data_format == "channels_first":
            raise ValueError("ConvLSTM2DCell: out needs data_format='channels_last'; leave it out, or use that format")
        self._check_rank(np.shape(x_t), "batch")
        x, *state = (None if a is None else self._read(name, a, 1) for name, a in (("x", x_t), ("h", h), ("c", c)))
        self._pullback = None
        return functional.convlstm2d_step(
            x, self.kernel, self.recurrent_kernel, self.bias, initial_state=state, out=out, **self._options()
        )

    def backward(self, dh: Any = None, dc: Any = None) -> tuple[Any, Any, Any]:
        """Return (dx_t, dh, dc) of the last call's inputs, given the gradients `dh` of its h and `dc` of its c.

        Raises
        ------
        RuntimeError
            The last call was not a training call.
        ValueError
            A gradient has not its state's shape.
        """
        return self._recorded()(dh, dc)

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the shape of h and of c for an x_t of `input_shape`."""
        self._check_rank(input_shape, "batch")
        B, *frame = input_shape
        return self._state_shape(self._geometry((B, *self._frame_shape(frame)), "ConvLSTM2DCell"))

    def _geometry(self, frames: Shape, op: str) -> ConvSpec:
        """Return the geometry of the input convolution of frames (B, H, W, C)."""
        return ConvSpec.infer(frames, self._parameters["kernel"].shape, strides=self.stride, padding=self.padding,
                              padding_mode=self.padding_mode, dilation=self.dilation, op=op)  # fmt: skip

    def _state_shape(self, geometry: ConvSpec) -> Shape:
        """Return the shape of h and of c in the layer's data format."""
        size, F = (geometry.HO, geometry.WO), self.out_channels
        return (geometry.B, *size, F) if self.data_format == "channels_last" else (geometry.B, F, *size)

    def _read_state(self, what: str, pair: tuple[Any, Any], geometry: ConvSpec) -> State:
        """Check (h, c), each of which may be None, and return them channels-last."""
        shape = self._state_shape(geometry)
        for name, value in zip("hc", pair, strict=True):
            if value is not None:
                expect_shape(what, name, np.shape(value), shape, "the shape of the layer's states")
        h, c = (None if value is None else self._read(name, value, 1) for name, value in zip("hc", pair, strict=True))
        return h, c

    def _run(
        self, x: np.ndarray, state: State, *, mask: np.ndarray | None = None, go_backwards: bool = False,
        return_sequences: bool = True, training: bool = False,
    ) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], Callable[..., Any] | None]:  # fmt: skip
        """Run over a channels-last sequence: (output, h, c) and, while training, their pullback."""
        arguments = x, self.kernel, self.recurrent_kernel, self.bias
        options = {
            "initial_state": state,
            "mask": mask,
            "go_backwards": go_backwards,
            "return_sequences": return_sequences,
            **self._options(),
        }
        if training:
            return functional.convlstm2d_vjp(*arguments, return_state=True, **options)
        return functional.convlstm2d(*arguments, return_state=True, **options), None

    def _options(self) -> dict[str, Any]:
        """Options of `functional.convlstm2d` that are the cell's."""
        return {
            "strides": self.stride,
            "padding": self.padding,
            "padding_mode": self.padding_mode,
            "dilation": self.dilation,
            "recurrent_dilation": self.recurrent_dilation,
            "activation": self.activation,
            "recurrent_activation": self.recurrent_activation,
            "output_activation": self.output_activation,
            "cell_clip": self.cell_clip,
            "algorithm": self.algorithm,
            "engine": self.engine,
        }

    def _named_gradients(self, gradients: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Pick the parameters' gradients from what a pullback returned."""
        return {name: gradients[name] for name in self._parameters}

    def _pull(
        self, pullback: Callable[..., Any], geometry: ConvSpec, dh: Any, dc: Any, restore: Callable[..., Any]
    ) -> tuple[Any, ...]:
        dstate = self._read_state("ConvLSTM2DCell: gradient of", (dh, dc), geometry)
        gradients = pullback((None, *dstate))
        self._keep_gradients(self._named_gradients(gradients))
        before = gradients["x"][:, 0], *gradients["initial_state"]
        return tuple(restore(self._write(array, 1)) for array in before)

    def _check_options(self) -> None:
        """Raise now, not at the first call, where an option is wrong for every input."""
        for option in (self.activation, self.recurrent_activation, self.output_activation or "tanh"):
            activations.get(option)
        KH, KW = self.kernel_size
        dilation = integers("ConvLSTM2D", "dilation", self.dilation, 2, 1)
        integers("ConvLSTM2D", "recurrent_dilation", self.recurrent_dilation, 2, 1)
        self._geometry((1, KH * dilation[0], KW * dilation[1], self.in_channels), "ConvLSTM2D")
        positive_or_none("ConvLSTM2D", "cell_clip", self.cell_clip)


@dataclass(eq=False, repr=False)
class ConvLSTM2D(_ConvLSTMLayer):
    """ConvLSTM layers, one on the other, over whole sequences.

    ``layer(x)`` takes x (B, T, H, W, C) and returns the last layer's hidden sequence (B, T, HO, WO, F) in the layer's
    dtype, as x's kind of array. Layer 0 takes `in_channels`, every other one the filters of the layer before. All
    numbers are those of `fastclstm.functional.convlstm2d`.

    Parameters
    ----------
    in_channels : int
        C.
    out_channels : int or sequence of int
        F: of every layer, or one number a layer.
    kernel_size : int, tuple (KH, KW), or list
        Of every layer's two convolutions; a list (or any sequence of pairs) has one item, int or pair, a layer. So
        with two layers ``(3, 5)`` is 3 high and 5 wide twice, ``[3, 5]`` is 3×3, then 5×5.
    padding : "same", "valid", int, (int, int) or ((top, bottom), (left, right))
        Of every input convolution; "same" keeps ``ceil(H / stride)``. The hidden state's is always "same".
    stride, dilation : int or (int, int)
        Of every input convolution; at most one of them above 1. Each stacked layer strides anew.
    leaky_relu_slope : float, optional
        Slope below zero of the LeakyReLU on what one layer hands to the next, never on the last layer's output nor on
        states. None: none.
    num_layers : int
    use_bias : bool
    unit_forget_bias : bool
        The forget gate's part of the bias starts at 1.
    kernel_initializer, recurrent_initializer, bias_initializer : str or function
        Names of `fastclstm.nn.initializers`, or functions ``(shape, rng, dtype) -> array``.
    activation, recurrent_activation, output_activation : str or pair of functions (forward, derivative)
        On g; on i, f and o; on the new cell state (None: as `activation`).
    padding_mode : "zeros" or "circular"
        What the padding of all convolutions holds.
    recurrent_dilation : int or (int, int)
        Of the hidden state's convolution.
    cell_clip : float, optional
        Limits every cell state to [-cell_clip, cell_clip].
    data_format : "channels_last" or "channels_first"
        The latter: x (B, T, C, H, W), output (B, T, F, HO, WO), states (B, F, HO, WO).
    dtype : "float32" or "float64"
        Of parameters, states and results; inputs are converted to it.
    seed : int or numpy.random.Generator, optional
        The same seed gives the same parameters.
    engine : str, optional
        "cpu" (the default) or "reference"; may be changed later.
    algorithm : "auto", "direct" or "winograd"
        How the cpu engine convolves; may be changed later.
    return_sequences : bool
        False: only the last step's output (B, HO, WO, F).
    return_state : bool
        Return ``(output, [(h, c), …])`` with the last states, one pair a layer.
    go_backwards : bool
        Process the last frame first, through all layers; outputs stay in processing order.

    Attributes
    ----------
    cells : tuple of ConvLSTM2DCell
        The layers' parameters: ``cells[l].kernel``, ``.recurrent_kernel``, ``.bias``, ``.weights``.
    state_gradients : list of (dh, dc), optional
        Gradients of initial_state that the last `backward` left; None before, or where no initial state was given.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> layer = ConvLSTM2D(1, 32, 3, 1, 1, 0.2, 1, seed=0, engine="reference")
    >>> layer.forward(np.zeros((1, 10, 32, 32, 1))).shape
    (1, 10, 32, 32, 32)
    >>> layer.weights["W_xi"].shape
    (32, 1, 3, 3)
    >>> layer
    ConvLSTM2D(in_channels=1, out_channels=32, kernel_size=(3, 3), padding=1, leaky_relu_slope=0.2, seed=0, \
engine='reference')
    """

    num_layers: int = 1
    _: KW_ONLY
    return_sequences: bool = True
    return_state: bool = False
    go_backwards: bool = False

    def __post_init__(self) -> None:
        (self.num_layers,) = integers("ConvLSTM2D", "num_layers", self.num_layers, 1, 1)
        filters = integers("ConvLSTM2D", "out_channels", self.out_channels, self.num_layers, 1)
        self.out_channels = filters[0] if np.ndim(self.out_channels) == 0 else filters
        kernel_sizes = _kernel_sizes(self.kernel_size, self.num_layers)
        self.kernel_size = kernel_sizes if _is_per_layer(self.kernel_size) else kernel_sizes[0]
        super().__post_init__()
        rng = np.random.default_rng(self.seed)
        shared = {name: value for name, value in self.options.items() if name in ConvLSTM2DCell.__dataclass_fields__}
        self.cells = tuple(
            ConvLSTM2DCell(**shared | {"in_channels": C, "out_channels": F, "kernel_size": size, "seed": rng})
            for C, F, size in zip((self.in_channels, *filters), filters, kernel_sizes, strict=False)
        )
        self._sublayers = {f"layers.{index}": cell for index, cell in enumerate(self.cells)}
        self.state_gradients: list[tuple[Any, Any]] | None = None

    @property
    def weights(self) -> GateWeights:
        """The parameters gate by gate: see `GateWeights`. Stacked layers have their number before each name: 0.W_xi."""
        return GateWeights({f"{n}." if self.num_layers > 1 else "": cell for n, cell in enumerate(self.cells)})

    def forward(
        self, x: Any, initial_state: Any = None, mask: Any = None, lengths: Any = None, training: bool = False
    ) -> Any:
        """Return the hidden sequence, or what return_sequences and return_state make of it.

        Parameters
        ----------
        x : array (B, T, H, W, C), or (B, T, C, H, W) with data_format="channels_first"
            Any real dtype; converted to the layer's.
        initial_state : list of (h, c), optional
            One pair of arrays (B, HO, WO, F) a layer, where None is zeros; for a single layer the pair itself will do.
        mask : array of bool (B, T), optional
            Where False, the step is skipped: states are carried on and the previous output is repeated (zeros before
            the first valid step).
        lengths : array of int (B,), optional
            Instead of a mask: the number of valid steps at the start of each sequence, 0 to T.
        training : bool
            Keep what `backward` needs.

        Raises
        ------
        ValueError
            Shapes that do not fit the layer; both mask and lengths.
        TypeError
            Anything but real arrays in the processor's memory.
        """
        restore = dispatch.restorer(x)
        sequence = self._read("x", x, 2)
        self._check_rank(np.shape(x), "batch", "time")
        geometries = self._geometries(sequence.shape)
        states = self._states("initial_state", initial_state, geometries)
        steps_mask = _steps_mask(mask, lengths, sequence.shape[:2])
        self._pullback = None
        last_states, pullbacks, slopes = [], [], []
        for index, (cell, state) in enumerate(zip(self.cells, states, strict=True)):
            if index > 0 and self.leaky_relu_slope is not None:
                one, slope = np.array([1, self.leaky_relu_slope], sequence.dtype)
                slopes.append(np.where(sequence > 0, one, slope) if training else None)
                sequence = sequence * slopes[-1] if training else np.where(sequence > 0, sequence, slope * sequence)
            if index == 1 and self.go_backwards and steps_mask is not None:
                steps_mask = steps_mask[:, ::-1]  # what layer 0 hands on is in processing order
            cell.engine, cell.algorithm = self.engine, self.algorithm
            (sequence, h, c), pullback = cell._run(
                sequence,
                state,
                mask=steps_mask,
                go_backwards=self.go_backwards and index == 0,
                return_sequences=self.return_sequences or index < self.num_layers - 1,
                training=training,
            )
            last_states.append((h, c))
            pullbacks.append(pullback)
        output = self._write(sequence, 2 if self.return_sequences else 1)
        if training:
            kept = output.shape, geometries, pullbacks, slopes, initial_state is not None, restore
            self._pullback = lambda dy, dstates: self._pull(dy, dstates, *kept)
        if not self.return_state:
            return restore(output)
        return restore(output), [tuple(restore(self._write(s, 1)) for s in pair) for pair in last_states]

    def backward(self, dy: Any, dstates: Any = None) -> Any:
        """Return dx of the last call, in x's shape and as its kind of array.

        Parameters
        ----------
        dy : array of the output's shape, or None for zeros
        dstates : list of (dh, dc), optional
            Gradients of the last states, in initial_state's form.

        Raises
        ------
        RuntimeError
            The last call was not a training call.
        ValueError
            A gradient has not the shape of what it belongs to.
        """
        return self._recorded()(dy, dstates)

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the shape of the output for an x of `input_shape`."""
        self._check_rank(input_shape, "batch", "time")
        B, T, *frame = input_shape
        state = self.cells[-1]._state_shape(self._geometries((B, T, *self._frame_shape(frame)))[-1])
        return (B, T, *state[1:]) if self.return_sequences else state

    def _geometries(self, shape: Shape) -> list[ConvSpec]:
        """Return the geometry of each layer's input convolution for x (B, T, H, W, C)."""
        B, _, H, W, C = shape
        geometries: list[ConvSpec] = []
        for index, cell in enumerate(self.cells):
            op = f"ConvLSTM2D layer {index}" if self.num_layers > 1 else "ConvLSTM2D"
            geometries.append(cell._geometry((B, H, W, C), op))
            H, W, C = geometries[-1].HO, geometries[-1].WO, cell.out_channels
        return geometries

    def _states(self, name: str, value: Any, geometries: list[ConvSpec]) -> list[State]:
        """Return one pair of channels-last states a layer."""
        count = self.num_layers
        if value is None:
            return [(None, None)] * count
        pairs = [value] if count == 1 and _is_pair(value) else value
        fits = isinstance(pairs, list | tuple) and len(pairs) == count
        if not fits or not all(pair is None or _is_pair(pair) for pair in pairs):
            raise ValueError(
                f"ConvLSTM2D: {name} must be a list of {count} {'pairs' if count > 1 else 'pair'} (h, c), one a layer"
            )
        return [
            cell._read_state(f"ConvLSTM2D: {name} {index}", pair or (None, None), geometry)
            for index, (cell, pair, geometry) in enumerate(zip(self.cells, pairs, geometries, strict=True))
        ]

    def _pull(
        self, dy: Any, dstates: Any, output_shape: Shape, geometries: list[ConvSpec], pullbacks: Sequence[Any],
        slopes: list[Any], initial_state: bool, restore: Callable[..., Any],
    ) -> Any:  # fmt: skip
        dstates = self._states("dstates", dstates, geometries)
        if dy is not None:
            expect_shape("ConvLSTM2D", "dy", np.shape(dy), output_shape, "the shape of the output")
            dy = self._read("dy", dy, 2 if self.return_sequences else 1)
        gradients: dict[str, np.ndarray] = {}
        state_gradients = []
        for index in reversed(range(self.num_layers)):
            pulled = pullbacks[index]((dy, *dstates[index]))
            named = self.cells[index]._named_gradients(pulled)
            gradients = {f"layers.{index}.{name}": array for name, array in named.items()} | gradients
            state_gradients.append(tuple(restore(self._write(array, 1)) for array in pulled["initial_state"]))
            dy = pulled["x"] * slopes[index - 1] if index and slopes else pulled["x"]
        self.state_gradients = state_gradients[::-1] if initial_state else None
        self._keep_gradients(gradients)
        return restore(self._write(dy, 2))


class GateWeights(MutableMapping[str, np.ndarray]):
    """A layer's parameters gate by gate, in the layout (F, C, KH, KW).

    The keys are W_xi W_hi W_xf W_hf W_xc W_hc W_xo W_ho (F, C, KH, KW) for the kernels of x and of h, and b_i b_f b_c
    b_o (F, 1, 1) for the biases, where c is the gate that the equations call g. What is read is a read-only view; what
    is assigned, any real array of that shape, is copied into the layer.

    Raises
    ------
    KeyError
        A name that is not among the keys.
    ValueError, TypeError
        An assigned value of another shape, or not a real array.
    """

    def __init__(self, cells: Mapping[str, ConvLSTM2DCell]):
        self._places = {
            f"{prefix}{kind}{gate}": (cell, parameter, slice(n * cell.out_channels, (n + 1) * cell.out_channels))
            for prefix, cell in cells.items()
            for kind, parameter in (("W_x", "kernel"), ("W_h", "recurrent_kernel"), ("b_", "bias"))
            if parameter in cell.parameters
            for n, gate in enumerate(_GATES)
        }

    def __getitem__(self, key: str) -> np.ndarray:
        cell, parameter, block = self._place(key)
        part = getattr(cell, parameter)[..., block]
        return part.transpose(3, 2, 0, 1) if part.ndim == 4 else part[:, np.newaxis, np.newaxis]

    def __setitem__(self, key: str, value: Any) -> None:
        cell, parameter, block = self._place(key)
        array = dispatch.as_numpy("weights", key, value)
        expect_shape("weights", key, array.shape, self[key].shape, "(filters, channels, height, width) of the layer")
        new = getattr(cell, parameter).copy()
        new[..., block] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array[:, 0, 0]
        setattr(cell, parameter, new)

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"weights: {key} is part of the layer and cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"GateWeights({{{', '.join(f'{key!r}: {array.shape}' for key, array in self.items())}}})"

    def _place(self, key: str) -> tuple[ConvLSTM2DCell, str, slice]:
        if key not in self._places:
            raise KeyError(f"no weight {key!r}; the keys are {', '.join(self._places)}")
        return self._places[key]


def _unit_forget(initializer: initializers.Initializer) -> initializers.Initializer:
    """Return the initializer of a bias (4F,) whose forget block is one."""

    def initialize(shape: Shape, rng: np.random.Generator, dtype: Any) -> np.ndarray:
        F = shape[0] // 4
        parts = initializer((F,), rng, dtype), np.ones(F, dtype), initializer((2 * F,), rng, dtype)
        return np.concatenate(parts)

    return initialize


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _is_per_layer(kernel_size: Any) -> bool:
    """Tell sizes given layer by layer from one size for all."""
    return isinstance(kernel_size, list) or (isinstance(kernel_size, tuple) and any(map(np.ndim, kernel_size)))


def _kernel_sizes(kernel_size: Any, num_layers: int) -> tuple[Pair, ...]:
    """Return (KH, KW) of each layer."""
    sizes = list(kernel_size) if _is_per_layer(kernel_size) else [kernel_size] * num_layers
    if len(sizes) != num_layers:
        raise ValueError(
            f"ConvLSTM2D: kernel_size {kernel_size!r} lists {len(sizes)} layers but num_layers is {num_layers}; "
            f"a tuple (height, width) of integers serves every layer"
        )
    pairs = (integers("ConvLSTM2D", "kernel_size", size, 2, 1) for size in sizes)
    return tuple((KH, KW) for KH, KW in pairs)


def _steps_mask(mask: Any, lengths: Any, shape: Shape) -> np.ndarray | None:
    """Return the mask (B, T) that mask or lengths describe."""
    if mask is not None and lengths is not None:
        raise ValueError("ConvLSTM2D: give mask or lengths, not both")
    if mask is not None:
        array = dispatch.as_numpy("ConvLSTM2D", "mask", mask)
        expect_shape("ConvLSTM2D", "mask", array.shape, shape, "(batch, time)")
        return array != 0
    if lengths is None:
        return None
    counts = dispatch.as_numpy("ConvLSTM2D", "lengths", lengths)
    expect_shape("ConvLSTM2D", "lengths", counts.shape, shape[:1], "(batch,)")
    if counts.dtype.kind not in "iu" and counts.size:
        raise TypeError(f"ConvLSTM2D: lengths must be integers, got dtype {counts.dtype}")
    if counts.size and (counts.min() < 0 or counts.max() > shape[1]):
        raise ValueError(f"ConvLSTM2D: lengths must lie between 0 and the {shape[1]} steps of x, got {counts.tolist()}")
    return np.arange(shape[1]) < counts[:, np.newaxis]
