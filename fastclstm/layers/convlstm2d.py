"""ConvLSTM2D: stacked ConvLSTM layers over whole sequences, in one direction or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.base import Parameter, expect_parameters
from fastclstm.layers.convlstm2d_cell import ConvLSTM2DCell
from fastclstm.layers.convlstm_gates import own_generator
from fastclstm.layers.convlstm_options import ConvLSTMLayer
from fastclstm.layers.directions import MERGE_MODES, Directions, Merged, several
from fastclstm.layers.gate_weights import GateWeights
from fastclstm.layers.layout import Layout
from fastclstm.layers.masks import steps_mask
from fastclstm.layers.place import HOST, Place
from fastclstm.layers.stack import Stack
from fastclstm.layers.states import LastStates, State, expect_states, is_pair, read_states
from fastclstm.layers.symbolic import fits, is_shape
from fastclstm.layers.tape import Tape
from fastclstm.nn import regularizers
from fastclstm.spec import Pair, Shape, choice, flag, integers, rate

_DIRECTIONS = ("forward", "backward")
_FLAGS = ("return_sequences", "return_state", "go_backwards", "stateful", "bidirectional", "zero_output_for_mask",
          "time_major", "recompute")  # fmt: skip


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
        "auto", "direct" or "winograd": how the cpu engine convolves x and h, each by itself where that pays: see
        `fastclstm.functional.convlstm2d`; with engine="cuda" those of `conv2d` there. May be changed later.
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
        if isinstance(getattr(ConvLSTM2DCell, name, None), Parameter):
            raise AttributeError(f"ConvLSTM2D: {name} is a parameter of a cell; assign to layer.cells[0].{name}")
        super().__setattr__(name, value)

    def _built(self, filters: Sequence[int], kernel_sizes: Sequence[Pair], recurrent_sizes: Sequence[Pair]) -> Stack:
        rng = np.random.default_rng(self.seed)
        self._time_dropout_rng = own_generator(rng)
        options = {name: value for name, value in self.options.items() if name in ConvLSTM2DCell.__dataclass_fields__}
        options.pop("name", None)
        layers: list[Directions] = []
        C, frame = self.in_channels, self.frame_size
        for F, size, recurrent_size in zip(filters, kernel_sizes, recurrent_sizes, strict=True):
            options |= {"in_channels": C, "out_channels": F, "kernel_size": size, "seed": rng,
                        "recurrent_kernel_size": recurrent_size, "frame_size": frame}  # fmt: skip
            cells = [ConvLSTM2DCell(**options) for _ in range(2 if self.bidirectional else 1)]
            if frame is not None:
                frame = cells[0]._state_shape((1, *frame, C), "ConvLSTM2D")[1:3]
            layers.append(Directions(cells, self.merge_mode))
            C = layers[-1].channels
        return Stack(layers, self.leaky_relu_slope)

    @property
    def cells(self) -> tuple[ConvLSTM2DCell, ...]:
        """The cells, layer by layer; with bidirectional the forward and the backward one of each."""
        return self._stack.cells

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
            batch axis will do: outputs, states and mask then have none either. So a batch of frames (B, H, W, C) whose
            time axis was forgotten is computed as one sequence of B steps: give x[:, np.newaxis].
        initial_state : list of (h, c), optional
            One pair of arrays (B, HO, WO, F) a cell, where None is zeros; for a single cell the pair itself will do.
            h comes first: Flax's carry is (c, h), of the same shapes, and must be turned round.
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
        steps = steps_mask(layout.read_steps("mask", mask, sequence.shape[:2]), lengths, sequence.shape[:2])
        self._pullback = None
        tape = Tape(layout, shapes, initial_state is not None) if training else None
        if tape is not None and self.time_dropout > 0:
            sequence = tape.drop_steps(self.time_dropout, sequence, self._time_dropout_rng)
        for cell in self.cells:
            cell.engine, cell.algorithm = self.engine, self.algorithm
        output, last_states = self._stack.run(
            sequence, states, place.bring(steps), tape, return_sequences=self.return_sequences,
            go_backwards=self.go_backwards, zero_output_for_mask=self.zero_output_for_mask,
            frozen=not self.trainable, recompute=self.recompute,
        )  # fmt: skip
        if self.stateful:
            self._states = [(h.copy(), c.copy()) for h, c in last_states]
        written = [layout.write(part) for part in several(output)]
        if tape is not None:
            self._finish(tape, output, written)
        result = tuple(map(place.restore, written)) if isinstance(output, tuple) else place.restore(written[0])
        if not self.return_state:
            return result
        return result, [tuple(place.restore(layout.write(s)) for s in pair) for pair in last_states]

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
        B, HO, WO, _ = self._state_shapes((B, *frame))[-1]
        whole = layout.shape((B, T, HO, WO, self._stack.channels))
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
            raise ValueError(f"ConvLSTM2D: in a graph x must be ({replace(layout, batched=True).axes(True)}), got "
                             f"{len(x)}D {x}")  # fmt: skip
        frames = layout.read_shape("x", x, sequence=True)
        shapes = [layout.shape(shape) for shape in self._state_shapes((frames[0], *frames[2:]))]
        if initial_state is not None:
            given = [initial_state] if _is_one_state(initial_state) else initial_state
            expect_states(layout.op, "initial_state", given, len(shapes), self._each)
            for pair, shape in zip(given, shapes, strict=True):
                for name, state in zip("hc", pair or (), strict=False):
                    if state is not None and not fits(state, shape):
                        raise ValueError(f"ConvLSTM2D: {name} of initial_state has shape {state} but must be {shape}, "
                                         f"that of the layer's states")  # fmt: skip
        for name, value, axes in (("mask", mask, x[:2]), ("lengths", lengths, frames[:1])):
            if value is not None and not fits(value, axes):
                raise ValueError(f"ConvLSTM2D: {name} has shape {value} but must be {axes}, as x is {x}")
        return (output, [(shape, shape) for shape in shapes]) if self.return_state else output

    def _pull_call(self, dy: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        dx = self.backward(*dy) if self.return_state else self.backward(dy)
        dstates: Any = self.state_gradients
        if dstates is not None and _is_one_state(options["initial_state"]):
            (dstates,) = dstates
        return dx, {"initial_state": dstates}

    def _layout(self, shape: Shape, place: Place = HOST) -> Layout:
        """Return how arrays lie where x has `shape`."""
        channel_axis = 1 if self.data_format == "channels_first" else -1
        batched = len(shape) != 4 or shape[channel_axis] != self.in_channels
        return Layout("ConvLSTM2D", self.dtype, self.data_format, self.time_major, batched, place)

    def _state_shapes(self, frames: Shape) -> list[Shape]:
        """Return the shape (B, HO, WO, F) of each cell's states for frames (B, H, W, C)."""
        return self._stack.state_shapes(frames, "ConvLSTM2D")

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
            return read_states(layout, "initial_state", value, shapes, self._each)
        held = [h.shape for h, _ in self._states]
        if held != shapes:
            raise ValueError(
                f"ConvLSTM2D: the states kept from the last call are {held}, but this x needs {shapes}; "
                f"call reset_state() before another batch, or leave stateful out"
            )
        return [(layout.place.bring(h), layout.place.bring(c)) for h, c in self._states]

    @property
    def _each(self) -> str:
        return "one a layer and direction, forward first" if self.bidirectional else "one a layer"

    def _pull(self, tape: Tape, dy: Any, dstates: Any) -> Any:
        dlast = read_states(tape.layout, "dstates", dstates, tape.shapes, self._each)
        dy = tape.read_cotangent(dy)
        dx, gradients, before = self._stack.backward(tape, dy, dlast, self.input_gradient)
        self.state_gradients = tape.write_states(before)
        named = zip(self._sublayers, gradients, strict=True)
        self._keep_gradients({f"{cell}.{name}": array for cell, arrays in named for name, array in arrays.items()})
        return tape.write_input(dx)


def _is_one_state(value: Any) -> bool:
    """Whether a pair is one state (h, c), and no list of two pairs; of shapes or symbols."""
    return is_pair(value) and not any(is_pair(item) and not is_shape(item) for item in value)


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
