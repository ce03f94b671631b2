"""The encoding-forecasting network: frames in, the frames that follow out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np

from fastclstm.layers.base import layer_dtype, without_input_gradient
from fastclstm.layers.convlstm2d import ConvLSTM2D
from fastclstm.layers.convolution import Conv2D
from fastclstm.layers.layout import Layout
from fastclstm.layers.place import HOST, Place, place_of
from fastclstm.models.forecaster import Forecaster, Pull, States
from fastclstm.models.summary import table
from fastclstm.spec import DATA_FORMATS, Shape, choice, expect_shape, flag, integers
from fastclstm.training.batches import Batch
from fastclstm.training.history import History
from fastclstm.training.trainable import Trainable

ENCODED_STEPS = 16
"""Time steps read at once where nothing is kept for backward."""


@dataclass(eq=False, repr=False)
class EncoderForecaster(Trainable):
    """A ConvLSTM stack that reads frames, and one that goes on from its last states and makes the frames that follow.

    The encoder's last (h, c) of every layer are those that the forecaster's layers start from. At each step the hidden
    states of all forecaster layers, side by side, become the next frame by a 1×1 convolution, ``head``. The
    forecaster's first input is the last frame given, then each frame it made itself.

    Parameters
    ----------
    in_channels : int
        C, of frames in and out.
    hidden_channels : int or sequence of int
        F of each layer; encoder and forecaster have the same.
    kernel_size : int, tuple (KH, KW), or list
        As in `ConvLSTM2D`: a list has one item, int or pair, a layer.
    head_activation : str or pair of functions (forward, derivative)
        Of the frames made: "sigmoid" for values in (0, 1), "linear" for any.
    peephole, frame_size, normalization, use_bias, unit_forget_bias, kernel_initializer, recurrent_initializer, \
bias_initializer, activation, recurrent_activation, output_activation, padding_mode, recompute, algorithm
        Of all ConvLSTM layers, as in `ConvLSTM2D`.
    data_format : "channels_last" or "channels_first"
        The latter: frames (B, T, C, H, W). Either way a single sequence without the batch axis will do; what is made,
        targets and states then have none either. So a batch of frames whose time axis was forgotten is one sequence.
    dtype : "float32" or "float64"
        Of parameters and results; inputs are converted to it.
    seed : int or numpy.random.Generator, optional
        The same seed gives the same parameters.
    engine : str, optional
        "cpu" (the default), "cuda" or "reference". None: where x is.

    Attributes
    ----------
    encoder : ConvLSTM2D
    forecaster : tuple of ConvLSTM2D
        One a layer.
    head : Conv2D

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    References
    ----------
    Shi et al., "Convolutional LSTM Network: A Machine Learning Approach for Precipitation Nowcasting", NeurIPS 2015,
    section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> model = EncoderForecaster(1, (4, 2), 3, seed=0, engine="reference")
    >>> model.forecast(np.zeros((2, 5, 8, 8, 1)), steps=3).shape
    (2, 3, 8, 8, 1)
    """

    in_channels: int
    hidden_channels: Any = (128, 64, 64)
    kernel_size: Any = 5
    _: KW_ONLY
    head_activation: Any = "sigmoid"
    peephole: str | None = None
    frame_size: Any = None
    normalization: Any = None
    use_bias: bool = True
    unit_forget_bias: bool = True
    kernel_initializer: Any = "glorot_uniform"
    recurrent_initializer: Any = "orthogonal"
    bias_initializer: Any = "zeros"
    activation: Any = "tanh"
    recurrent_activation: Any = "sigmoid"
    output_activation: Any = None
    padding_mode: str = "zeros"
    recompute: bool = False
    data_format: str = "channels_last"
    dtype: Any = "float32"
    seed: int | np.random.Generator | None = None
    engine: str | None = None
    algorithm: str = "auto"

    def __post_init__(self) -> None:
        kernel_size = self.kernel_size  # before lists become tuples: a list has one size a layer
        super().__post_init__()
        op = "EncoderForecaster"
        (self.in_channels,) = integers(op, "in_channels", self.in_channels, 1, 1)
        count = len(self.hidden_channels) if isinstance(self.hidden_channels, tuple) else 1
        if count == 0:
            raise ValueError(f"{op}: hidden_channels must name the filters of at least one layer, got ()")
        self.hidden_channels = integers(op, "hidden_channels", self.hidden_channels, count, 1)
        if isinstance(kernel_size, list) and len(kernel_size) != count:
            raise ValueError(
                f"{op}: kernel_size {kernel_size!r} lists {len(kernel_size)} layers but hidden_channels "
                f"{self.hidden_channels} names {count}; a tuple (height, width) of integers serves every layer"
            )
        flag(op, "use_bias", self.use_bias)
        flag(op, "unit_forget_bias", self.unit_forget_bias)
        self.dtype = layer_dtype(op, self.dtype)
        choice(op, "data_format", self.data_format, DATA_FORMATS)
        rng = np.random.default_rng(self.seed)
        own = {"name", "in_channels", "hidden_channels", "kernel_size", "head_activation", "data_format"}
        options = {name: value for name, value in self.options.items() if name not in own and value is not None}
        options |= {"seed": rng, "return_state": True}
        self.encoder = ConvLSTM2D(self.in_channels, self.hidden_channels, kernel_size, num_layers=count,
                                  return_sequences=False, **options)  # fmt: skip
        self.kernel_size = self.encoder.kernel_size
        sizes = self.kernel_size if isinstance(self.kernel_size[0], tuple) else (self.kernel_size,) * count
        inputs = (self.in_channels, *self.hidden_channels)
        self.forecaster = tuple(
            ConvLSTM2D(C, F, size, **options) for C, F, size in zip(inputs, self.hidden_channels, sizes, strict=False)
        )
        self.head = Conv2D(sum(self.hidden_channels), self.in_channels, 1, activation=self.head_activation,
                           kernel_initializer=self.kernel_initializer, dtype=self.dtype, seed=rng, engine=self.engine,
                           algorithm=self.algorithm)  # fmt: skip
        self._forecaster = Forecaster(self.forecaster, self.head)
        self._sublayers = {"encoder": self.encoder, **self._forecaster.named}
        self._teacher_forcing = False

    def forecast(self, frames: Any, steps: int, states: States | None = None) -> Any:
        """Return the `steps` frames that follow, each computed once from the states before it.

        Parameters
        ----------
        frames : array (B, T, H, W, C), or (B, T, C, H, W) with data_format="channels_first"
        steps : int
        states : list of (h, c), optional
            What `encode` returned for the frames before these.

        Returns
        -------
        array (B, steps, H, W, C), or (B, steps, C, H, W)
            As the kind of array that `frames` is.

        Raises
        ------
        ValueError
            Shapes that do not fit the model.
        TypeError
            Anything but real arrays; one on a GPU, where a layer does not compute there or is of another dtype.
        """
        layout, x = self._read_frames(frames, training=False)
        (steps,) = integers("EncoderForecaster", "steps", steps, 1, 1)
        states, made = self._encode(x, _batched(layout, states)), np.empty_like(x, shape=(len(x), steps, *x.shape[2:]))
        frame = x[:, -1:]
        for step in range(steps):
            frame, states, _ = self._forecaster.run(frame, states, training=False)
            made[:, step] = frame[:, 0]
        return layout.place.restore(layout.write(made))

    def encode(self, frames: Any, states: States | None = None) -> States:
        """Return the encoder's states (h, c) after `frames`, channels-last, one pair a layer.

        So a stream of frames is read as it comes: hand the states on with each next piece of it.

        Parameters
        ----------
        frames : array (B, T, H, W, C), or (B, T, C, H, W) with data_format="channels_first"
        states : list of (h, c), optional
            Those after the frames before.

        Raises
        ------
        ValueError
            Shapes that do not fit the model.
        TypeError
            Anything but real arrays; one on a GPU, where a layer does not compute there or is of another dtype.

        Examples
        --------
        >>> import numpy as np
        >>> model = EncoderForecaster(1, (4, 2), 3, seed=0, engine="reference")
        >>> frames = np.random.default_rng(0).random((1, 5, 8, 8, 1))
        >>> states = model.encode(frames[:, :3])
        >>> np.array_equal(model.forecast(frames[:, 3:], 2, states), model.forecast(frames, 2))
        True
        """
        layout, x = self._read_frames(frames, training=False)
        encoded, place = self._encode(x, _batched(layout, states)), layout.place
        if not layout.batched:
            encoded = [(h[0], c[0]) for h, c in encoded]
        return [(place.restore(h), place.restore(c)) for h, c in encoded] if place.on_gpu else encoded

    def forward(self, frames: Any, steps: int | None = None, training: bool = False, targets: Any = None) -> Any:
        """Return the frames that follow; while training, keep what `backward` needs.

        Parameters
        ----------
        frames : array (B, T, H, W, C), or (B, T, C, H, W) with data_format="channels_first"
        steps : int, optional
            None: as many as `targets` has.
        training : bool
        targets : array (B, steps, H, W, C), or (B, steps, C, H, W), optional
            The true frames. While training they are the forecaster's inputs (teacher forcing), else not used.

        Returns
        -------
        array (B, steps, H, W, C), or (B, steps, C, H, W)

        Raises
        ------
        ValueError
            Shapes that do not fit the model; neither steps nor targets.
        TypeError
            Anything but real arrays; one on a GPU, where a layer does not compute there or is of another dtype.
        """
        op, (layout, x) = "EncoderForecaster", self._read_frames(frames, training)
        truth = None if targets is None else self._read(layout, "targets", targets)
        if steps is None:
            if truth is None:
                raise ValueError(f"{op}: give steps, the number of frames to make, or targets")
            steps = truth.shape[1]
        (steps,) = integers(op, "steps", steps, 1, 1)
        if truth is not None:
            expect_shape(op, "targets", truth.shape, (len(x), steps, *x.shape[2:]), "channels-last, as the frames made")
        self._pullback = None
        if not training:
            return self.forecast(frames, steps)
        _, states = self.encoder(x, training=True)
        encoded = self.encoder._pullback
        made, pulls = [], []
        inputs = x[:, -1:] if truth is None else np.concatenate([x[:, -1:], truth[:, :-1]], 1)
        for _ in range(steps if truth is None else 1):
            inputs, states, pull = self._forecaster.run(inputs, states, training=True)
            made.append(inputs)
            pulls.append(pull)
        y, place = layout.write(np.concatenate(made, 1)), layout.place

        def pullback(dy: Any) -> Any:
            cotangent = place.read("dy", dy, self.dtype)
            expect_shape(op, "dy", cotangent.shape, y.shape, "the shape of the output")
            dx = self._pull(layout.read("dy", cotangent, sequence=True), pulls, encoded)
            return None if dx is None else place.restore(layout.write(dx))

        self._pullback = pullback
        return place.restore(y)

    def backward(self, dy: Any) -> Any:
        """Return the gradient of the last call's frames, given dy of the frames it made.

        It flows back through the whole roll-out, also from each input to the frame that it was. `targets` get none.
        `encode` and `forecast` in between do no harm.

        Raises
        ------
        RuntimeError
            The last call was not a training call.
        ValueError
            dy has not the output's shape.
        """
        return self._recorded()(dy)

    def fit(self, x: Any, y: Any = None, *, teacher_forcing: bool = False, **options: Any) -> History:
        """Fit the parameters to frames x and the frames y that follow: see `Sequential.fit`, for all `options` too.

        Parameters
        ----------
        x, y : array (N, T, H, W, C) and (N, steps, H, W, C), or batches of these
        teacher_forcing : bool
            While training, the forecaster's inputs are the true frames, which is faster and learns the next frame; else
            each is the frame that it made itself, as in `forecast`.
        """
        self._teacher_forcing = bool(teacher_forcing)
        return super().fit(x, y, **options)

    def _unfit(self) -> str | None:
        if type(self).forward is not EncoderForecaster.forward:
            return None
        return ("must be told how many frames to make; call it by itself, or give a subclass of it a forward(frames, "
                "training=False) and an output_shape that know the number")  # fmt: skip

    def output_shape(self, input_shape: Sequence[int], steps: int = 1) -> Shape:
        """Return the shape of `steps` frames made from frames of `input_shape`."""
        shape = tuple(input_shape)
        time = int(self._checked_layout(shape, "frames").batched)
        return (*shape[:time], steps, *shape[time + 1 :])

    def summary(self, input_shape: Sequence[int] | None = None, steps: int = 1) -> str:
        """Return a table of the layers: output shapes, if the frames' is given, and numbers of parameters.

        The batch of `input_shape` may be None. The encoder's is that of its last layer's last hidden state.

        Examples
        --------
        >>> print(EncoderForecaster(1, (4, 2), 3).summary((None, 5, 8, 8, 1), steps=3))
        part          layer       output shape        parameters
        ------------  ----------  ------------------  ----------
        encoder       ConvLSTM2D  (None, 8, 8, 2)          1,176
        forecaster.0  ConvLSTM2D  (None, 3, 8, 8, 4)         736
        forecaster.1  ConvLSTM2D  (None, 3, 8, 8, 2)         440
        head          Conv2D      (None, 3, 8, 8, 1)           7
        ------------  ----------  ------------------  ----------
        2,359 parameters, 2,359 trainable, 0.0 MB
        """
        if input_shape is None:
            return table(self, self._sublayers, None, "part")
        shape = tuple(input_shape)
        known = (1, *shape[1:]) if shape and shape[0] is None else shape
        layout = self._checked_layout(known, "frames")
        B, _, *frame, C = layout.read_shape("frames", known, sequence=True)
        made = [(B, *frame, self.hidden_channels[-1])]
        made += [(B, steps, *frame, F) for F in (*self.hidden_channels, C)]
        shapes = [layout.shape(each) for each in made]
        return table(self, self._sublayers, [(*shape[:1], *each[1:]) if layout.batched else each for each in shapes],
                     "part")  # fmt: skip

    def _check_batch(self, op: str, batch: Batch) -> None:
        if extra := [name for name in ("mask", "lengths") if name in batch]:
            raise ValueError(f"{op}: EncoderForecaster takes no {' and no '.join(extra)}; sample_weight weighs frames")
        shape = batch["x"].shape
        if not self._layout(shape).batched:
            raise ValueError(f"{op}: x {shape} is one sequence, but samples are on the first axis; give x[np.newaxis]")
        if "y" in batch:
            self._checked_layout(batch["y"].shape, "y", batched=True)

    def _predict_batch(self, batch: Batch, training: bool) -> Any:
        if training and self._teacher_forcing:
            return self.forward(batch["x"], training=True, targets=batch["y"])
        return self.forward(batch["x"], steps=batch["y"].shape[1], training=training)

    def _fit_options(self) -> dict[str, Any]:
        return {"teacher_forcing": self._teacher_forcing}

    def _encode(self, x: np.ndarray, states: States | None) -> States:
        """Return the encoder's states after channels-last frames x."""
        for start in range(0, x.shape[1], ENCODED_STEPS):
            _, states = self.encoder(x[:, start : start + ENCODED_STEPS], initial_state=states)
        return states or []

    def _pull(self, dy: np.ndarray, pulls: list[Pull], encoded: Callable[..., Any] | None) -> np.ndarray | None:
        """Pull dy (B, steps, H, W, C) back to the frames that the encoder read."""
        dinput, dstates, gradients = self._forecaster.backward(dy, pulls)
        self.encoder._pullback = encoded  # of this call, which `encode` may have followed
        with nullcontext() if self.input_gradient else without_input_gradient(self.encoder):
            dx = self.encoder.backward(None, dstates)
        if dx is not None:
            dx[:, -1] += dinput[:, 0]
        encoder = {f"encoder.{name}": gradient for name, gradient in self.encoder._kept_gradients().items()}
        self._keep_gradients(encoder | gradients)
        return dx

    def _read_frames(self, frames: Any, training: bool) -> tuple[Layout, np.ndarray]:
        """Return how a call's arrays lie, and its frames as a channels-last array of the model's dtype.

        It computes where the frames are; of those on a GPU the layers within say what they do not know.
        """
        place = place_of(self, frames, training, refuses=False)
        array = place.read("frames", frames, self.dtype)
        layout = self._layout(array.shape, place)
        return layout, self._read(layout, "frames", array)

    def _read(self, layout: Layout, name: str, value: Any) -> np.ndarray:
        """Return frames as a channels-last array of the model's dtype."""
        array = layout.place.read(name, value, self.dtype)
        self._checked_layout(array.shape, name, layout.batched)
        return layout.read(name, array, sequence=True)

    def _layout(self, shape: Shape, place: Place = HOST) -> Layout:
        """Return how arrays lie where the frames have `shape`."""
        channel_axis = 1 if self.data_format == "channels_first" else -1
        batched = len(shape) != 4 or shape[channel_axis] != self.in_channels
        return Layout("EncoderForecaster", self.dtype, self.data_format, batched=batched, place=place)

    def _checked_layout(self, shape: Shape, name: str, batched: bool | None = None) -> Layout:
        """Return how frames of `shape` lie; raise ValueError unless the model takes them."""
        op, layout = "EncoderForecaster", self._layout(shape)
        if batched is not None:
            layout = replace(layout, batched=batched)
        rank = 4 + layout.batched
        if len(shape) != rank:
            raise ValueError(f"{op}: {name} must be ({layout.axes(True)}), got {len(shape)}D {shape}"
                             + layout.hint(rank - len(shape)))  # fmt: skip
        channels, steps = shape[-1 if self.data_format == "channels_last" else -3], shape[int(layout.batched)]
        if channels != self.in_channels or steps < 1:
            raise ValueError(
                f"{op}: {name} must have {self.in_channels} channels, as in_channels says, and at least one time step, "
                f"got shape {shape}"
            )
        return layout


def _batched(layout: Layout, states: States | None) -> States | None:
    """Return a caller's states with a batch axis."""
    if states is None or layout.batched:
        return states
    return [tuple(None if array is None else array[None] for array in pair) for pair in states]  # type: ignore[misc]
