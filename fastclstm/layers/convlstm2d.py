"""ConvLSTM2D: stacked ConvLSTM layers over whole sequences, in one direction or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.activation import leaky
from fastclstm.layers.base import Parameter, expect_parameters
from fastclstm.layers.convlstm2d_cell import ConvLSTM2DCell, ConvLSTMLayer, State, own_generator
from fastclstm.layers.gate_weights import GateWeights
from fastclstm.layers.layout import Layout
from fastclstm.layers.place import HOST, Place
from fastclstm.layers.time_distribution import TimeDistributionCalculator
from fastclstm.nn import regularizers
from fastclstm.spec import Pair, Shape, choice, expect_shape, flag, integers, rate

MERGE_MODES = ("concat", "sum", "mul", "ave", None)
CHUNK_STEPS = 16
"""Time steps that stacked layers work on at once where only the last output is wanted."""

_DIRECTIONS = ("forward", "backward")
_FLAGS = ("return_sequences", "return_state", "go_backwards", "stateful", "bidirectional", "zero_output_for_mask",
          "time_major", "recompute")  # fmt: skip

Merged = Any
"""An array, or with merge_mode=None the pair of the directions' arrays."""

LastStates = list[tuple[np.ndarray, np.ndarray]]


@dataclass(eq=False, repr=False)
class ConvLSTM2D(ConvLSTMLayer):
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
        Of every layer's input convolution; a list (or any sequence of pairs) has one item, int or pair, a layer. So
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
    kernel_initializer, recurrent_initializer, bias_initializer : str, number, object or function
        Of `fastclstm.nn.initializers`; a number is that constant; functions are ``(shape, rng, dtype) -> array``.
    kernel_regularizer, recurrent_regularizer, bias_regularizer : str, object or pair of functions, optional
        Of `fastclstm.nn.regularizers`: `penalty` sums them up, `get_gradients` includes their gradients.
    kernel_constraint, recurrent_constraint, bias_constraint : str, object or function, optional
        Of `fastclstm.nn.constraints`: `apply_constraints` applies them.
    activation, recurrent_activation, output_activation : str or pair of functions (forward, derivative)
        On g; on i, f and o; on the new cell state (None: as `activation`).
    padding_mode : "zeros" or "circular"
        What the padding of all convolutions holds.
    recurrent_kernel_size : int, tuple or list, optional
        Of the hidden state's convolution, in the forms of kernel_size. None: the same as the input's.
    recurrent_dilation : int or (int, int)
        Of the hidden state's convolution.
    peephole : None, "elementwise", "channel" or "conv"
        What the gates see of the cell state: i and f of the old one, o of the new one. "elementwise" (Shi et al. 2015)
        has weights (HO, WO, F) and needs frame_size, "channel" (F,), "conv" convolves with kernels (K, K, F, F) and,
        with use_bias, adds biases (F,).
    peephole_size : int or (int, int), optional
        K of "conv". None: that of the hidden state's convolution.
    peephole_initializer : str, number, object or function
    normalization : None, "layer", "group", "batch" or fastclstm.nn.normalization.Normalization
        Of the pre-activations. "batch" takes the statistics of each step's batch while training, and moves its moving
        mean and variance towards them; otherwise, or where frozen, it uses those.
    frame_size : int or (int, int), optional
        (H, W) of x, for what has a weight for every pixel. Other frames are then refused.
    cell_clip : float, optional
        Limits every cell state to [-cell_clip, cell_clip].
    dropout, recurrent_dropout : float
        Share in [0, 1) of the input's and of the hidden state's values that each gate's convolution does not see while
        training: four masks (B, H, W, C) and four (B, HO, WO, F), drawn once a call, the same for all steps; what is
        kept is scaled by 1 / (1 - rate).
    data_format : "channels_last" or "channels_first"
        The latter: x (B, T, C, H, W), output (B, T, F, HO, WO), states (B, F, HO, WO).
    dtype : "float32" or "float64"
        Of parameters, states and results; inputs are converted to it.
    seed : int or numpy.random.Generator, optional
        The same seed gives the same parameters and the same dropout.
    engine : str, optional
        "cpu" (the default), "cuda" or "reference"; may be changed later. None: where x is.
    algorithm : str
        "auto", "direct" or "winograd": how the cpu engine convolves; with engine="cuda" those of
        `fastclstm.functional.conv2d`. May be changed later.
    return_sequences : bool
        False: only the last step's output (B, HO, WO, F), and only that is kept in memory.
    return_state : bool
        Return ``(output, [(h, c), …])`` with the last states, one pair a layer, or two with bidirectional.
    go_backwards : bool
        Process the last frame first, through all layers; outputs stay in processing order.
    stateful : bool
        Start each call from the states that the call before ended with, sample by sample; see `reset_state`.
    bidirectional : bool
        Two cells a layer: one processes the frames forward, the other backward, whose outputs are flipped back.
    merge_mode : "concat", "sum", "mul", "ave" or None
        How the two directions' outputs become one, on which the next layer works: "concat" has 2F channels, the others
        F; None, for a single layer, returns the pair (forward, backward).
    zero_output_for_mask : bool
        Where a step is masked its output is zero, instead of the output before. The last output too, where the last
        step is masked.
    time_major : bool
        Sequences, masks and outputs have the time axis first: x (T, B, H, W, C), mask (T, B).
    time_dropout : float
        Probability in [0, 1] that a whole frame of x is set to zero while training, for all samples alike and without
        scaling: see `TimeDistributionCalculator`.
    recompute : bool
        A training call keeps only states, and `backward` computes the rest again: a fraction of the memory for about a
        third more time, and the same gradients. See `functional.convlstm2d_vjp`.
    activity_regularizer : str, object or pair of functions, optional
        Penalty on the output of a training call, divided by the size of the batch; a part of `penalty`, whose gradient
        `backward` adds.

    Attributes
    ----------
    cells : tuple of ConvLSTM2DCell
        The layers' parameters: ``cells[l].kernel``, ``.recurrent_kernel``, ``.bias``, ``.weights``; with bidirectional
        those of each layer's forward direction, then of its backward direction.
    state_gradients : list of (dh, dc), optional
        Gradients of initial_state that the last `backward` left; None before, or where no initial state was given. A
        cell for which none was given has none either.
    states : list of (h, c), optional
        Where stateful: what the next call starts from.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    References
    ----------
    Shi et al., "Convolutional LSTM Network", NeurIPS 2015 (eq. 3); the dropout of Gal & Ghahramani, "A Theoretically
    Grounded Application of Dropout in Recurrent Neural Networks", NeurIPS 2016, with a mask for each gate.

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

    CHANGEABLE: ClassVar[frozenset[str]] = ConvLSTMLayer.CHANGEABLE | {*_FLAGS, "time_dropout"} - {"bidirectional"}

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
    recompute: bool = False
    activity_regularizer: Any = None

    def __post_init__(self) -> None:
        op = "ConvLSTM2D"
        (self.num_layers,) = integers(op, "num_layers", self.num_layers, 1, 1)
        expect_parameters(op, self.num_layers)
        filters = integers(op, "out_channels", self.out_channels, self.num_layers, 1)
        self.out_channels = filters[0] if np.ndim(self.out_channels) == 0 else filters
        kernel_sizes = _kernel_sizes("kernel_size", self.kernel_size, self.num_layers)
        self.kernel_size = kernel_sizes if _is_per_layer(self.kernel_size) else kernel_sizes[0]
        recurrent_sizes = kernel_sizes
        if self.recurrent_kernel_size is not None:
            recurrent_sizes = _kernel_sizes("recurrent_kernel_size", self.recurrent_kernel_size, self.num_layers)
            per_layer = _is_per_layer(self.recurrent_kernel_size)
            self.recurrent_kernel_size = recurrent_sizes if per_layer else recurrent_sizes[0]
        super().__post_init__()
        for name in _FLAGS:
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
        self._build_cells(filters, kernel_sizes, recurrent_sizes)
        self.state_gradients: list[tuple[Any, ...]] | None = None
        self._states: LastStates | None = None
        self._made = True

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(ConvLSTM2DCell, name, None), Parameter):
            raise AttributeError(f"ConvLSTM2D: {name} is a parameter of a cell; assign to layer.cells[0].{name}")
        super().__setattr__(name, value)

    def _build_cells(
        self, filters: Sequence[int], kernel_sizes: Sequence[Pair], recurrent_sizes: Sequence[Pair]
    ) -> None:
        rng = np.random.default_rng(self.seed)
        self._time_dropout_rng = own_generator(rng)
        options = {name: value for name, value in self.options.items() if name in ConvLSTM2DCell.__dataclass_fields__}
        self._sublayers = {}
        self._layers: list[tuple[ConvLSTM2DCell, ...]] = []
        C, frame = self.in_channels, self.frame_size
        for index, F in enumerate(filters):
            options |= {"in_channels": C, "out_channels": F, "kernel_size": kernel_sizes[index], "seed": rng,
                        "recurrent_kernel_size": recurrent_sizes[index], "frame_size": frame}  # fmt: skip
            cells = tuple(ConvLSTM2DCell(**options) for _ in range(2 if self.bidirectional else 1))
            for direction, cell in zip(_DIRECTIONS, cells, strict=False):
                self._sublayers[f"layers.{index}" + (f".{direction}" if self.bidirectional else "")] = cell
            self._layers.append(cells)
            if frame is not None:
                frame = cells[0]._state_shape((1, *frame, C))[1:3]
            C = 2 * F if self.bidirectional and self.merge_mode == "concat" else F

    @property
    def cells(self) -> tuple[ConvLSTM2DCell, ...]:
        """The cells, layer by layer; with bidirectional the forward and the backward one of each."""
        return tuple(cell for cells in self._layers for cell in cells)

    @property
    def weights(self) -> GateWeights:
        """The parameters gate by gate: see `GateWeights`.

        Stacked layers have their number before each name, 0.W_xi; directions their name, forward.W_xi, 0.forward.W_xi.
        """
        prefixes = (name.removeprefix("layers.0").removeprefix("layers.").removeprefix(".") if self.num_layers == 1
                    else name.removeprefix("layers.") for name in self._sublayers)  # fmt: skip
        return GateWeights({f"{p}." if p else "": cell for p, cell in zip(prefixes, self.cells, strict=True)})

    @property
    def penalty(self) -> float:
        """Sum of the penalties on the parameters, and on the output of the last training call."""
        return super().penalty + self._activity_penalty

    @property
    def states(self) -> LastStates | None:
        """Where stateful: the states (B, HO, WO, F), or (B, F, HO, WO), that the next call starts from; as NumPy's."""
        layout = Layout("ConvLSTM2D", self.dtype, self.data_format)
        held = self._states
        if held is None:
            return None
        return [(layout.write(dispatch.to_numpy(h.copy())), layout.write(dispatch.to_numpy(c.copy()))) for h, c in held]

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
            Any real dtype; converted to the layer's. With time_major T stands before B. A single sequence without the
            batch axis will do: outputs, states and mask then have none either.
        initial_state : list of (h, c), optional
            One pair of arrays (B, HO, WO, F) a cell, where None is zeros; for a single cell the pair itself will do.
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
        place = self._place(x, training)
        if place.on_gpu and training and self._activity_regularizer is not None:
            raise NotImplementedError("ConvLSTM2D: activity_regularizer is not for an x on a GPU; move x to the CPU")
        array = place.read("x", x, self.dtype)
        layout = self._layout(array.shape, place)
        sequence = layout.read("x", array, sequence=True)
        if sequence.shape[1] == 0:
            raise ValueError(f"ConvLSTM2D: x has no time steps {array.shape}; at least one is needed")
        shapes = self._state_shapes((sequence.shape[0], *sequence.shape[2:]))
        states = self._initial_states(layout, initial_state, shapes)
        steps_mask = _steps_mask(layout.read_steps("mask", mask, sequence.shape[:2]), lengths, sequence.shape[:2])
        steps_mask = place.bring(steps_mask)
        self._pullback = None
        tape = _Tape(layout, shapes, initial_state is not None) if training else None
        if tape is not None and self.time_dropout > 0:
            sequence = tape.drop_steps(self.time_dropout, sequence, self._time_dropout_rng)
        output, last_states = self._run(sequence, states, steps_mask, tape)
        if self.stateful:
            self._states = [(h.copy(), c.copy()) for h, c in last_states]
        written = [layout.write(part) for part in _several(output)]
        if tape is not None:
            self._finish(tape, output, written)
        result = tuple(map(place.restore, written)) if isinstance(output, tuple) else place.restore(written[0])
        if not self.return_state:
            return result
        return result, [tuple(place.restore(layout.write(s)) for s in pair) for pair in last_states]

    def _run(
        self, sequence: np.ndarray, states: list[State], mask: np.ndarray | None, tape: _Tape | None
    ) -> tuple[Merged, LastStates]:
        """Run all layers over x (B, T, H, W, C): the output and the last states."""
        steps = sequence.shape[1]
        in_parts = tape is None and mask is None and not (self.return_sequences or self.bidirectional)
        if not in_parts or self.num_layers == 1 or steps <= CHUNK_STEPS:
            return self._run_part(sequence, states, mask, tape)
        for start in range(0, steps, CHUNK_STEPS):  # the sequences between layers would be as long as x
            stop = min(start + CHUNK_STEPS, steps)
            part = sequence[:, steps - stop : steps - start] if self.go_backwards else sequence[:, start:stop]
            output, last_states = self._run_part(dispatch.contiguous(part), states, mask, tape)
            states = list(last_states)
        return output, last_states

    def _run_part(
        self, sequence: np.ndarray, states: list[State], mask: np.ndarray | None, tape: _Tape | None
    ) -> tuple[Merged, LastStates]:
        last_states: LastStates = []
        output: Merged = sequence
        for index in range(self.num_layers):
            if index > 0 and self.leaky_relu_slope is not None:
                output = _leaky_relu(output, self.leaky_relu_slope, tape)
            if index == 1 and self.go_backwards and mask is not None:
                mask = mask[:, ::-1]  # what layer 0 hands on is in processing order
            outputs = self._run_layer(index, output, states, mask, last_states, tape)
            output = _merge(self.merge_mode, outputs) if self.bidirectional else outputs[0]
            if tape is not None:
                tape.outputs.append(outputs if self.bidirectional and self.merge_mode == "mul" else ())
        return output, last_states

    def _finish(self, tape: _Tape, output: Merged, written: list[np.ndarray]) -> None:
        """Take from a training call what lasts: moving statistics, the penalty on the output, the way back."""
        for cell, pullback in zip(self.cells, tape.pullbacks, strict=True):
            cell._learn(pullback)
        tape.output_shapes = [part.shape for part in _several(output)]
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

    def output_shape(self, input_shape: Shape) -> Any:
        """Return the shape of the output for an x of `input_shape`; with merge_mode=None the pair of shapes."""
        unknown = [axis for axis in (0, 1) if len(input_shape) == 5 and input_shape[axis] is None]
        shape = tuple(1 if axis in unknown else n for axis, n in enumerate(input_shape))
        layout = self._layout(shape)
        B, T, *frame = layout.read_shape("x", shape, sequence=True)
        if T == 0:
            raise ValueError(f"ConvLSTM2D: x has no time steps {input_shape}; at least one is needed")
        B, HO, WO, F = self._state_shapes((B, *frame))[-1]
        F = 2 * F if self.bidirectional and self.merge_mode == "concat" else F
        whole = layout.shape((B, T, HO, WO, F))
        known = tuple(None if axis in unknown else n for axis, n in enumerate(whole))
        if not self.return_sequences:
            time = (0 if self.time_major else 1) if layout.batched else 0
            known = (*known[:time], *known[time + 1 :])
        return (known, known) if self.bidirectional and self.merge_mode is None else known

    def _layout(self, shape: Shape, place: Place = HOST) -> Layout:
        """Return how arrays lie where x has `shape`."""
        channel_axis = 1 if self.data_format == "channels_first" else -1
        batched = len(shape) != 4 or shape[channel_axis] != self.in_channels
        return Layout("ConvLSTM2D", self.dtype, self.data_format, self.time_major, batched, place)

    def _state_shapes(self, frames: Shape) -> list[Shape]:
        """Return the shape (B, HO, WO, F) of each cell's states for frames (B, H, W, C)."""
        shapes: list[Shape] = []
        for index, cells in enumerate(self._layers):
            op = f"ConvLSTM2D layer {index}" if self.num_layers > 1 else "ConvLSTM2D"
            state = cells[0]._state_shape(frames, op)
            shapes += [state] * len(cells)
            frames = *state[:3], self._layers[min(index + 1, self.num_layers - 1)][0].in_channels
        return shapes

    def _several_outputs(self) -> str | None:
        if self.return_state:
            return "give it return_state=False"
        if self.bidirectional and self.merge_mode is None:
            return "give it a merge_mode, such as 'concat'"
        return None

    def _knows_gpu(self, training: bool) -> bool:
        return super()._knows_gpu(training) and not (training and self._activity_regularizer is not None)

    def _initial_states(self, layout: Layout, value: Any, shapes: list[Shape]) -> list[State]:
        if value is not None or not self.stateful or self._states is None:
            return self._read_states(layout, "initial_state", value, shapes)
        held = [h.shape for h, _ in self._states]
        if held != shapes:
            raise ValueError(
                f"ConvLSTM2D: the states kept from the last call are {held}, but this x needs {shapes}; "
                f"call reset_state() before another batch, or leave stateful out"
            )
        return [(layout.place.bring(h), layout.place.bring(c)) for h, c in self._states]

    def _read_states(self, layout: Layout, name: str, value: Any, shapes: list[Shape]) -> list[State]:
        """Return one pair of channels-last states a cell."""
        count = len(shapes)
        if value is None:
            return [(None, None)] * count
        pairs = [value] if count == 1 and _is_pair(value) else value
        fits = isinstance(pairs, list | tuple) and len(pairs) == count
        if not fits or not all(pair is None or _is_pair(pair) for pair in pairs):
            each = "one a layer and direction, forward first" if self.bidirectional else "one a layer"
            came = f"{len(pairs)} items" if isinstance(pairs, list | tuple) else type(pairs).__name__
            pair = "pairs" if count > 1 else "pair"
            raise ValueError(f"ConvLSTM2D: {name} must be a list of {count} {pair} (h, c), {each}; got {came}")
        return [
            ConvLSTM2DCell._read_state(layout, f"ConvLSTM2D: {name} {index}", pair or (None, None), shape)
            for index, (pair, shape) in enumerate(zip(pairs, shapes, strict=True))
        ]

    def _run_layer(
        self, index: int, sequence: np.ndarray, states: list[State], mask: np.ndarray | None, last_states: LastStates,
        tape: _Tape | None,
    ) -> tuple[np.ndarray, ...]:  # fmt: skip
        """Run a layer's cells: their outputs in processing order. Layer 0 gets x, which may be processed backwards."""
        last = index == self.num_layers - 1
        many = self.return_sequences or not last
        turned = self.go_backwards and index == 0
        outputs = []
        for backwards, cell in enumerate(self._layers[index]):
            cell.engine, cell.algorithm = self.engine, self.algorithm
            (output, h, c), pullback = cell._run(
                sequence, states[len(last_states)], mask=mask, go_backwards=bool(backwards) != turned,
                return_sequences=many, training=tape is not None, frozen=not self.trainable, recompute=self.recompute,
            )  # fmt: skip
            last_states.append((h, c))
            if many and backwards:
                output = output[:, ::-1]
            kept = None
            if last and mask is not None and self.zero_output_for_mask:
                processed = mask[:, ::-1] if turned else mask
                kept = processed if many else processed[:, 0 if backwards else -1]
                kept = kept.reshape(*kept.shape, 1, 1, 1)
                output = np.where(kept, output, np.zeros((), output.dtype))
            if tape is not None:
                tape.pullbacks.append(pullback)
                tape.kept.append(kept)
            outputs.append(output)
        return tuple(outputs)

    def _pull(self, tape: _Tape, dy: Any, dstates: Any) -> Any:
        layout = tape.layout
        dlast = self._read_states(layout, "dstates", dstates, tape.shapes)
        merged = self._read_cotangent(tape, dy)
        gradients: dict[str, np.ndarray] = {}
        pulled_states: list[tuple[Any, Any]] = []
        names, number = list(self._sublayers), len(tape.pullbacks)
        dx: Any = None
        for index in reversed(range(self.num_layers)):
            cells, last = self._layers[index], index == self.num_layers - 1
            many = self.return_sequences or not last
            each = _unmerge(self.merge_mode, merged, tape.outputs[index]) if self.bidirectional else (merged,)
            dx = None
            for backwards in reversed(range(len(cells))):
                number -= 1
                d, kept = each[backwards], tape.kept[number]
                if d is not None and kept is not None:
                    d = np.where(kept, d, np.zeros((), d.dtype))
                if d is not None and many and backwards:
                    d = d[:, ::-1]
                pulled = tape.pullbacks[number]((d, *dlast[number]))
                named = cells[backwards]._named_gradients(pulled)
                gradients |= {f"{names[number]}.{name}": array for name, array in named.items()}
                pulled_states.insert(0, pulled.get("initial_state", (None, None)))
                dx = pulled["x"] if dx is None else dx + pulled["x"]
            merged = dx
            if index and self.leaky_relu_slope is not None:
                merged = leaky(tape.positive[index - 1], dx, self.leaky_relu_slope)
        if tape.kept_steps is not None:
            dx = np.where(tape.kept_steps, dx, np.zeros((), dx.dtype))
        restore = layout.place.restore
        self.state_gradients = None
        if tape.with_state:
            self.state_gradients = [
                tuple(None if d is None else restore(layout.write(d)) for d in pair) for pair in pulled_states
            ]
        self._keep_gradients(gradients)
        return restore(layout.write(dx))

    def _read_cotangent(self, tape: _Tape, dy: Any) -> Merged:
        """Return the gradient of the output channels-last, with that of its penalty."""
        shapes, layout = tape.output_shapes, tape.layout
        if len(shapes) == 2 and dy is not None and not _is_pair(dy):
            raise ValueError(
                f"ConvLSTM2D: with merge_mode=None dy must be a pair (forward, backward), got {type(dy).__name__}"
            )
        read = []
        for index, shape in enumerate(shapes):
            part = dy[index] if len(shapes) == 2 and dy is not None else dy
            array = layout.read_like("ConvLSTM2D", "dy", part, shape, "the shape of the output")
            if tape.penalties:
                penalty = layout.read("dy", tape.penalties[index], sequence=len(shape) == 5)
                array = penalty if array is None else array + penalty
            read.append(array)
        return tuple(read) if len(shapes) == 2 else read[0]


class _Tape:
    """What a training call of `ConvLSTM2D` keeps for its backward pass."""

    def __init__(self, layout: Layout, shapes: list[Shape], with_state: bool):
        self.layout, self.shapes, self.with_state = layout, shapes, with_state
        self.pullbacks: list[Any] = []
        self.positive: list[np.ndarray] = []
        self.outputs: list[tuple[np.ndarray, ...]] = []
        self.kept: list[np.ndarray | None] = []
        self.kept_steps: np.ndarray | None = None
        self.output_shapes: list[Shape] = []
        self.penalties: list[np.ndarray] = []

    def drop_steps(self, rate: float, sequence: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw which frames are kept, and return the sequence with zeros in place of the others."""
        drawn = TimeDistributionCalculator(rate, sequence.shape[1], seed=rng).calculate_time_distribution()
        self.kept_steps = self.layout.place.bring(drawn.reshape(-1, 1, 1, 1) != 0)
        return np.where(self.kept_steps, sequence, np.zeros((), sequence.dtype))


def _leaky_relu(sequence: np.ndarray, slope: float, tape: _Tape | None) -> np.ndarray:
    """Return the LeakyReLU of what one layer hands to the next."""
    positive = sequence > 0
    if tape is not None:
        tape.positive.append(positive)
    return leaky(positive, sequence, slope)


def _merge(mode: str | None, outputs: tuple[np.ndarray, ...]) -> Merged:
    """Make one output of those of the two directions."""
    forward, backward = outputs
    if mode is None:
        return forward, dispatch.contiguous(backward)
    if mode == "concat":
        return np.concatenate(outputs, axis=-1)
    if mode == "mul":
        return forward * backward
    return (forward + backward) / forward.dtype.type(2 if mode == "ave" else 1)


def _unmerge(mode: str | None, dy: Merged, outputs: tuple[np.ndarray, ...]) -> Sequence[np.ndarray | None]:
    """Pull dy back through `_merge`; `outputs` are the directions' where the mode is "mul"."""
    if dy is None:
        return None, None
    if mode is None:
        return dy
    if mode == "concat":
        return np.split(dy, 2, axis=-1)
    if mode == "mul":
        return dy * outputs[1], dy * outputs[0]
    half = dy / dy.dtype.type(2 if mode == "ave" else 1)
    return half, half


def _steps_mask(mask: Any, lengths: Any, shape: Shape) -> np.ndarray | None:
    """Return the mask (B, T) that mask or lengths describe."""
    if mask is not None and lengths is not None:
        raise ValueError("ConvLSTM2D: give mask or lengths, not both")
    if mask is not None:
        expect_shape("ConvLSTM2D", "mask", mask.shape, shape, "(batch, time)")
        return mask != 0
    if lengths is None:
        return None
    counts = np.atleast_1d(dispatch.as_numpy("ConvLSTM2D", "lengths", lengths))
    expect_shape("ConvLSTM2D", "lengths", counts.shape, shape[:1], "(batch,)")
    if counts.dtype.kind not in "iu" and counts.size:
        raise TypeError(f"ConvLSTM2D: lengths must be integers, got dtype {counts.dtype}")
    if counts.size and (counts.min() < 0 or counts.max() > shape[1]):
        raise ValueError(f"ConvLSTM2D: lengths must lie between 0 and the {shape[1]} steps of x, got {counts.tolist()}")
    return np.arange(shape[1]) < counts[:, np.newaxis]


def _several(output: Merged) -> tuple[np.ndarray, ...]:
    return output if isinstance(output, tuple) else (output,)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _is_per_layer(kernel_size: Any) -> bool:
    """Tell sizes given layer by layer from one size for all."""
    return isinstance(kernel_size, list) or (isinstance(kernel_size, tuple) and any(map(np.ndim, kernel_size)))


def _kernel_sizes(name: str, kernel_size: Any, num_layers: int) -> tuple[Pair, ...]:
    """Return (KH, KW) of each layer."""
    sizes = list(kernel_size) if _is_per_layer(kernel_size) else [kernel_size] * num_layers
    if len(sizes) != num_layers:
        raise ValueError(
            f"ConvLSTM2D: {name} {kernel_size!r} lists {len(sizes)} layers but num_layers is {num_layers}; "
            f"a tuple (height, width) of integers serves every layer"
        )
    pairs = (integers("ConvLSTM2D", name, size, 2, 1) for size in sizes)
    return tuple((KH, KW) for KH, KW in pairs)
