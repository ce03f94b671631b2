"""ConvLSTM2DCell: one ConvLSTM layer, one step at a time, and the options that it shares with the stacked layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np

from fastclstm import dispatch, functional
from fastclstm.layers.base import Layer, Parameter, layer_dtype
from fastclstm.layers.gate_weights import GateWeights
from fastclstm.layers.layout import Layout
from fastclstm.layers.place import HOST, Place, place_of
from fastclstm.nn import activations, initializers
from fastclstm.nn import normalization as normalizations
from fastclstm.spec import (
    DATA_FORMATS,
    NORMALIZED_PARTS,
    PEEPHOLE_GATES,
    ConvLSTMSpec,
    ConvSpec,
    Shape,
    choice,
    flag,
    integers,
    rate,
)  # fmt: skip

State = tuple[np.ndarray | None, np.ndarray | None]
Outputs = tuple[np.ndarray, np.ndarray, np.ndarray]

PEEPHOLES = (None, "elementwise", "channel", "conv")


@dataclass(eq=False, repr=False)
class ConvLSTMLayer(Layer):
    """The options that the cell and the stacked layers share."""

    CHANGEABLE: ClassVar[frozenset[str]] = frozenset({"engine", "algorithm"})
    """Options that may be assigned to later."""

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
    kernel_regularizer: Any = None
    recurrent_regularizer: Any = None
    bias_regularizer: Any = None
    kernel_constraint: Any = None
    recurrent_constraint: Any = None
    bias_constraint: Any = None
    activation: Any = "tanh"
    recurrent_activation: Any = "sigmoid"
    output_activation: Any = None
    dilation: Any = 1
    padding_mode: str = "zeros"
    recurrent_kernel_size: Any = None
    recurrent_dilation: Any = 1
    peephole: str | None = None
    peephole_size: Any = None
    peephole_initializer: Any = "zeros"
    normalization: Any = None
    frame_size: Any = None
    cell_clip: float | None = None
    dropout: float = 0.0
    recurrent_dropout: float = 0.0
    data_format: str = "channels_last"
    dtype: Any = "float32"
    seed: int | np.random.Generator | None = None
    engine: str | None = None
    algorithm: str = "auto"

    def __setattr__(self, name: str, value: Any) -> None:
        if "_made" in self.__dict__ and name in type(self).__dataclass_fields__.keys() - self.CHANGEABLE:
            op = type(self).__name__
            raise AttributeError(
                f"{op}: {name} is fixed when the layer is made; make a new one, with {op}(…, {name}=…)"
            )
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        for name in ("use_bias", "unit_forget_bias"):
            flag(op, name, getattr(self, name))
        (self.in_channels,) = integers(op, "in_channels", self.in_channels, 1, 1)
        self.dtype = layer_dtype(op, self.dtype)
        choice(op, "data_format", self.data_format, DATA_FORMATS)
        dispatch.check_engine(self.engine)
        slope = self.leaky_relu_slope
        real = isinstance(slope, int | float) and not isinstance(slope, bool) and math.isfinite(slope)
        if slope is not None and not real:
            raise ValueError(f"{op}: leaky_relu_slope must be a finite number or None, got {slope!r}")
        for name in ("dropout", "recurrent_dropout"):
            rate(op, name, getattr(self, name))
        choice(op, "peephole", self.peephole, PEEPHOLES)
        if self.peephole_size is not None and self.peephole != "conv":
            raise ValueError(f"{op}: peephole_size goes with peephole='conv' only, got peephole={self.peephole!r}")
        if self.normalization is not None:
            self.normalization = normalizations.get(self.normalization)
        if self.frame_size is not None:
            self.frame_size = integers(op, "frame_size", self.frame_size, 2, 1)
        else:
            per_pixel = "peephole='elementwise'" if self.peephole == "elementwise" else "elementwise normalization"
            if self.peephole == "elementwise" or (self.normalization is not None and self.normalization.elementwise):
                raise ValueError(f"{op}: {per_pixel} has a weight for every pixel; give frame_size=(H, W) of x")

    def _place(self, x: Any, training: bool) -> Place:
        """Return where a call on x computes; of an x on a GPU the engine says what it does not know."""
        return place_of(self, x, training, refuses=False)

    def _knows_gpu(self, training: bool) -> bool:
        kind = None if self.normalization is None else self.normalization.kind
        named = (self.activation, self.recurrent_activation, self.output_activation or self.activation)
        return (
            (kind is None or (kind == "batch" and not training))
            and not (training and (self.dropout or self.recurrent_dropout))
            and self.peephole != "conv"
            and all(map(activations.is_named, named))
        )


@dataclass(eq=False, repr=False)
class ConvLSTM2DCell(ConvLSTMLayer):
    """One ConvLSTM layer, one time step at a time: ``h, c = cell(x_t, h, c)``.

    With ``z = kernel * x + recurrent_kernel * h + bias`` split into z_i, z_f, z_g, z_o on its last axis:
    ``i, f, o = σ(z_i), σ(z_f), σ(z_o)``, ``g = tanh(z_g)``, ``c' = f∘c + i∘g``, ``h' = o∘tanh(c')``.

    Parameters
    ----------
    in_channels, out_channels : int
        C and F.
    kernel_size : int or (int, int)
        Of the input's convolution.
    padding, stride
        Of the input's convolution, as in `ConvLSTM2D`; the hidden state's is always "same" with stride 1.
    leaky_relu_slope : float, optional
        Accepted for symmetry with `ConvLSTM2D`, without effect: the LeakyReLU stands between stacked layers only.
    use_bias, unit_forget_bias, kernel_initializer, recurrent_initializer, bias_initializer, kernel_regularizer, \
recurrent_regularizer, bias_regularizer, kernel_constraint, recurrent_constraint, bias_constraint, activation, \
recurrent_activation, output_activation, dilation, padding_mode, recurrent_kernel_size, recurrent_dilation, peephole, \
peephole_size, peephole_initializer, normalization, frame_size, cell_clip, dropout, recurrent_dropout, data_format, \
dtype, seed, engine, algorithm
        As in `ConvLSTM2D`. Dropout masks are drawn anew by each training call.

    Attributes
    ----------
    kernel : array (KH, KW, C, 4F)
    recurrent_kernel : array (RKH, RKW, F, 4F)
    bias : array (4F,) or None
        The parameters, gates in the order i, f, g, o: read-only; assign a new array to change one.
    peephole_i, peephole_f, peephole_o : array (HO, WO, F), (F,) or (K, K, F, F), or None
    peephole_bias_i, peephole_bias_f, peephole_bias_o : array (F,) or None
        Of peephole="conv" with use_bias.
    gamma, beta : array (4F,) or (HO, WO, 4F), or None
        Of the normalization; where the convolutions are normalized separately gamma_x, beta_x and gamma_h, beta_h.
    moving_mean, moving_variance : array (4F,) or None
        Of normalization="batch"; separately with the endings _x and _h too. They have no gradients.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    References
    ----------
    Shi et al., "Convolutional LSTM Network: A Machine Learning Approach for Precipitation Nowcasting", NeurIPS 2015,
    eq. 3, whose peepholes are peephole="elementwise".

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
    peephole_i = Parameter()
    peephole_f = Parameter()
    peephole_o = Parameter()
    peephole_bias_i = Parameter()
    peephole_bias_f = Parameter()
    peephole_bias_o = Parameter()
    gamma, gamma_x, gamma_h = Parameter(), Parameter(), Parameter()
    beta, beta_x, beta_h = Parameter(), Parameter(), Parameter()
    moving_mean, moving_mean_x, moving_mean_h = Parameter(), Parameter(), Parameter()
    moving_variance, moving_variance_x, moving_variance_h = Parameter(), Parameter(), Parameter()

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "ConvLSTM2DCell"
        (self.out_channels,) = integers(op, "out_channels", self.out_channels, 1, 1)
        self.kernel_size = integers(op, "kernel_size", self.kernel_size, 2, 1)
        if self.recurrent_kernel_size is not None:
            self.recurrent_kernel_size = integers(op, "recurrent_kernel_size", self.recurrent_kernel_size, 2, 1)
        if self.peephole_size is not None:
            self.peephole_size = integers(op, "peephole_size", self.peephole_size, 2, 1)
        for name in ("activation", "recurrent_activation", "output_activation"):
            option = getattr(self, name)
            try:
                activations.get(self.activation if name == "output_activation" and option is None else option)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{op}: {name}: {error}") from None
        initializers.get(self.peephole_initializer)
        rng = np.random.default_rng(self.seed)
        self._dropout_rng = own_generator(rng)
        self._add_parameters(rng)
        self._check_options()
        self._made = True

    def _add_parameters(self, rng: np.random.Generator) -> None:
        C, F, dtype = self.in_channels, self.out_channels, self.dtype
        recurrent_size = self.recurrent_kernel_size or self.kernel_size
        self._add_parameter("kernel", (*self.kernel_size, C, 4 * F), self.kernel_initializer, rng, dtype,
                            regularizer=self.kernel_regularizer, constraint=self.kernel_constraint)  # fmt: skip
        self._add_parameter("recurrent_kernel", (*recurrent_size, F, 4 * F), self.recurrent_initializer, rng, dtype,
                            regularizer=self.recurrent_regularizer, constraint=self.recurrent_constraint)  # fmt: skip
        if self.use_bias:
            drawn = initializers.get(self.bias_initializer)
            self._add_parameter("bias", (4 * F,), _unit_forget(drawn) if self.unit_forget_bias else drawn, rng, dtype,
                                regularizer=self.bias_regularizer, constraint=self.bias_constraint)  # fmt: skip
        grid: Shape = ()
        if self.frame_size is not None:
            geometry = self._geometry((1, *self.frame_size, C), type(self).__name__)
            grid = geometry.HO, geometry.WO
        if self.peephole is not None:
            shape = {
                "elementwise": (*grid, F),
                "channel": (F,),
                "conv": (*(self.peephole_size or recurrent_size), F, F),
            }
            for gate in PEEPHOLE_GATES:
                self._add_parameter(f"peephole_{gate}", shape[self.peephole], self.peephole_initializer, rng, dtype)
            if self.peephole == "conv" and self.use_bias:
                for gate in PEEPHOLE_GATES:
                    self._add_parameter(f"peephole_bias_{gate}", (F,), self.bias_initializer, rng, dtype)
        if self.normalization is not None:
            weights = (*grid, 4 * F) if self.normalization.elementwise else (4 * F,)
            for part in NORMALIZED_PARTS[self.normalization.separate]:
                self._add_parameter(f"gamma{part}", weights, "ones", rng, dtype)
                self._add_parameter(f"beta{part}", weights, "zeros", rng, dtype)
                if self.normalization.kind == "batch":
                    self._add_parameter(f"moving_mean{part}", (4 * F,), "zeros", rng, dtype, statistic=True)
                    self._add_parameter(f"moving_variance{part}", (4 * F,), "ones", rng, dtype, statistic=True)

    @property
    def weights(self) -> GateWeights:
        """The parameters gate by gate: see `GateWeights`."""
        return GateWeights({"": self})

    def forward(self, x_t: Any, h: Any = None, c: Any = None, training: bool = False) -> tuple[Any, Any]:
        """Return the next (h, c).

        Parameters
        ----------
        x_t : array (B, H, W, C), or (B, C, H, W) with data_format="channels_first"
            Converted to the layer's dtype. A single frame without the batch axis will do, with states of its kind.
        h, c : array (B, HO, WO, F), or (B, F, HO, WO), optional
            The states so far; None is zeros.
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
        place = self._place(x_t, training)
        layout, x, state = self._read(place, x_t, h, c)
        self._pullback = None
        if training:  # so that the gradients of both are there
            zeros = np.zeros_like(x, shape=self._state_shape(x.shape))
            state = (zeros if state[0] is None else state[0], zeros if state[1] is None else state[1])
        outputs, pullback = self._run(x[:, np.newaxis], state, training=training, return_sequences=False)
        if pullback is not None:
            self._learn(pullback)
            self._pullback = lambda dh, dc: self._pull(pullback, layout, outputs[1].shape, dh, dc)
        return place.restore(layout.write(outputs[1])), place.restore(layout.write(outputs[2]))

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
            Anything but real arrays; an `out` for an x on a GPU.

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
        if dispatch.on_gpu(x_t):
            raise TypeError("ConvLSTM2DCell: out is in the processor's memory, but x is on a GPU; leave it out")
        layout = self._layout(np.shape(x_t))
        if self.data_format == "channels_first" or not layout.batched:
            raise ValueError(
                "ConvLSTM2DCell: out needs data_format='channels_last' and x (B, H, W, C) with its batch axis; "
                "leave it out, or give that"
            )
        _, x, state = self._read(Place("ConvLSTM2DCell", x_t), x_t, h, c)
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

    def _unfit(self) -> str | None:
        return "takes one step at a time; use ConvLSTM2D"

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the shape of h and of c for an x_t of `input_shape`."""
        layout = self._layout(input_shape)
        return layout.shape(self._state_shape(layout.read_shape("x", input_shape)))

    def _layout(self, shape: Shape, place: Place = HOST) -> Layout:
        """Return how arrays lie where x has `shape`."""
        channel_axis = 0 if self.data_format == "channels_first" else -1
        batched = len(shape) != 3 or shape[channel_axis] != self.in_channels
        return Layout(type(self).__name__, self.dtype, self.data_format, batched=batched, place=place)

    def _read(self, place: Place, x_t: Any, h: Any, c: Any) -> tuple[Layout, np.ndarray, State]:
        """Return how the caller's arrays lie, and these as the engines take them."""
        array = place.read("x", x_t, self.dtype)
        layout = self._layout(array.shape, place)
        x = layout.read("x", array)
        shape = self._state_shape(x.shape)
        return layout, x, self._read_state(layout, "ConvLSTM2DCell: initial state", (h, c), shape)

    def _geometry(self, frames: Shape, op: str) -> ConvSpec:
        """Return the geometry of the input convolution of frames (B, H, W, C)."""
        return ConvSpec.infer(frames, self._parameters["kernel"].shape, strides=self.stride, padding=self.padding,
                              padding_mode=self.padding_mode, dilation=self.dilation, op=op)  # fmt: skip

    def _state_shape(self, frames: Shape, op: str = "ConvLSTM2DCell") -> Shape:
        """Return the shape (B, HO, WO, F) of the states for frames (B, H, W, C)."""
        geometry = self._geometry(frames, op)
        if self.frame_size is not None and frames[1:3] != self.frame_size:
            raise ValueError(
                f"{op}: x has frames of {frames[1]}×{frames[2]} pixels but frame_size is {self.frame_size}"
            )
        return geometry.B, geometry.HO, geometry.WO, self.out_channels

    @staticmethod
    def _read_state(layout: Layout, what: str, pair: tuple[Any, Any], shape: Shape) -> State:
        """Check (h, c), each of which may be None, and return them channels-last."""
        why = "the shape of the layer's states"
        h, c = (layout.read_like(what, name, value, shape, why) for name, value in zip("hc", pair, strict=True))
        return h, c

    def _run(
        self, x: np.ndarray, state: State, *, mask: np.ndarray | None = None, go_backwards: bool = False,
        return_sequences: bool = True, training: bool = False, frozen: bool = False, recompute: bool = False,
    ) -> tuple[Outputs, functional.ConvLSTMPullback | None]:  # fmt: skip
        """Run over a channels-last sequence: (output, h, c) and, while training, their pullback.

        Where the layer is `frozen`, batch normalization uses its moving statistics; for `recompute` see
        `functional.convlstm2d_vjp`.
        """
        learning = training and self.trainable and not frozen
        arguments = x, self.kernel, self.recurrent_kernel, self.bias
        options = {
            "initial_state": state,
            "mask": mask,
            "go_backwards": go_backwards,
            "return_sequences": return_sequences,
            **self._options(learning),
        }
        if not training:
            return functional.convlstm2d(*arguments, return_state=True, **options), None
        frames = x.shape[0], *x.shape[2:]
        masks = {"x": self._draw(self.dropout, frames),
                 "h": self._draw(self.recurrent_dropout, self._state_shape(frames))}  # fmt: skip
        options["dropout_masks"] = {name: mask for name, mask in masks.items() if mask is not None} or None
        return functional.convlstm2d_vjp(*arguments, return_state=True, recompute=recompute, **options)

    def _draw(self, rate: float, shape: Shape) -> np.ndarray | None:
        """Draw the inverted dropout mask of each gate: what is kept is scaled up."""
        if rate == 0:
            return None
        kept = self._dropout_rng.random((4, *shape), np.float32) >= rate
        return kept * np.dtype(self.dtype).type(1 / (1 - rate))

    def _learn(self, pullback: functional.ConvLSTMPullback) -> None:
        """Move the moving means and variances towards those that a training call took of its steps, if it took any."""
        for step in pullback.statistics:
            for part in NORMALIZED_PARTS[self.normalization.separate]:
                count, momentum = step[f"count{part}"], self.normalization.momentum
                unbiased = step[f"variance{part}"] * (count / max(count - 1, 1))
                for name, value in (("mean", step[f"mean{part}"]), ("variance", unbiased)):
                    old = self._parameters[f"moving_{name}{part}"]
                    if count:
                        setattr(self, f"moving_{name}{part}", momentum * old + (1 - momentum) * value)

    def _options(self, learning: bool = False) -> dict[str, Any]:
        """Options of `functional.convlstm2d` that are the cell's."""
        have = self._parameters.get
        options = {
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
        if self.peephole is not None:
            weights = {
                f"{kind}{gate}": have(f"peephole_{kind}{gate}") for kind in ("", "bias_") for gate in PEEPHOLE_GATES
            }
            options["peephole"] = {name: weight for name, weight in weights.items() if weight is not None}
        if self.normalization is not None:
            names = {"gamma": "gamma", "beta": "beta"}
            if self.normalization.kind == "batch" and not learning:
                names |= {"mean": "moving_mean", "variance": "moving_variance"}
            parts = NORMALIZED_PARTS[self.normalization.separate]
            options["normalization"] = self.normalization
            options["normalization_weights"] = {
                f"{name}{part}": have(f"{parameter}{part}") for name, parameter in names.items() for part in parts
            }
        return options

    def _named_gradients(self, gradients: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Name the parameters' gradients in what a pullback returned as the parameters are named."""
        peepholes = {f"peephole_{name}": array for name, array in gradients.get("peephole", {}).items()}
        named = {**gradients, **peepholes, **gradients.get("normalization_weights", {})}
        return {name: named[name] for name in self._parameters if name not in self._statistics}

    def _pull(
        self, pullback: Callable[..., Any], layout: Layout, state_shape: Shape, dh: Any, dc: Any
    ) -> tuple[Any, ...]:
        dstate = self._read_state(layout, "ConvLSTM2DCell: gradient of", (dh, dc), state_shape)
        gradients = pullback((None, *dstate))
        self._keep_gradients(self._named_gradients(gradients))
        before = gradients["x"][:, 0], *gradients["initial_state"]
        return tuple(layout.place.restore(layout.write(array)) for array in before)

    def _check_options(self) -> None:
        """Raise now, not at the first call, where an option is wrong for every input."""
        op = "ConvLSTM2D"
        dilation = integers(op, "dilation", self.dilation, 2, 1)
        integers(op, "recurrent_dilation", self.recurrent_dilation, 2, 1)
        frame = self.frame_size or tuple(k * d for k, d in zip(self.kernel_size, dilation, strict=True))
        options = self._options()
        choice(op, "algorithm", options.pop("algorithm"), dispatch.algorithms(self.engine))
        del options["engine"]
        for name, weights in (("peephole", "peephole"), ("normalization", "normalization_weights")):
            arrays = options.pop(weights, None) or {}
            options[f"{name}_shapes"] = {key: array.shape for key, array in arrays.items()} or None
        ConvLSTMSpec.infer((1, 1, *frame, self.in_channels), self._parameters["kernel"].shape,
                           self._parameters["recurrent_kernel"].shape, op=op, **options)  # fmt: skip


def own_generator(rng: np.random.Generator) -> np.random.Generator:
    """Return a generator for later draws, so that these do not depend on how many were made before."""
    try:
        return rng.spawn(1)[0]
    except TypeError:  # a caller's, which cannot be split
        return rng


def _unit_forget(initializer: initializers.Initializer) -> Any:
    """Return the initializer of a bias (4F,) whose forget block is one."""

    def initialize(shape: tuple[int, ...], rng: np.random.Generator, dtype: Any) -> np.ndarray:
        F = shape[0] // 4
        parts = initializer((F,), rng, dtype), np.ones(F, dtype), initializer((2 * F,), rng, dtype)
        return np.concatenate(parts)

    return initialize
