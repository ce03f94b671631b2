"""The encoding-forecasting network: frames in, the frames that follow out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

import numpy as np

from fastclstm.layers.activation import LeakyReLU
from fastclstm.layers.base import Layer, layer_dtype
from fastclstm.layers.convgru2d import ConvGRU2D
from fastclstm.layers.convlstm2d import ConvLSTM2D
from fastclstm.layers.convolution import Conv2D
from fastclstm.layers.convrnn2d import ConvRNN2D
from fastclstm.layers.recurrent_cell import own_generator
from fastclstm.layers.transposed import Conv2DTranspose
from fastclstm.models.forecasting import Forecasting
from fastclstm.models.stages import INPUTS, Stages, start_layers
from fastclstm.spec import DATA_FORMATS, Pair, choice, flag, integers

CELLS: dict[str, Any] = {"ConvLSTM2D": ConvLSTM2D, "ConvGRU2D": ConvGRU2D, "ConvRNN2D": ConvRNN2D}
"""The recurrent layers that there are, by name."""

SLOPE = 0.2
"""Below zero, of the LeakyReLU behind the convolutions between scales."""

_OWN = frozenset({
    "name", "in_channels", "hidden_channels", "kernel_size", "recurrent_kernel_size", "head_activation", "data_format",
    "patch_size", "strides", "sampling_channels", "inputs", "cell", "frame_size",
})  # fmt: skip
"""Options that are not those of the layers, or not as they are."""

_LATER = frozenset({"recurrent_kernel_size", "patch_size", "inputs", "strides", "sampling_channels", "cell"})


@dataclass(eq=False, repr=False)
class EncoderForecaster(Forecasting):
    """Recurrent layers that read frames, and others that go on from their last states and make the frames that follow.

    At one scale the forecaster has the encoder's layers in the same order; at each step the hidden states of all of
    them, side by side, become the next frame by a 1×1 convolution, ``head`` (Shi et al. 2015). With `strides` there is
    a convolution with LeakyReLU before each of the encoder's layers, and one, transposed where that strides, behind
    each of the forecaster's, which stand in mirrored order; ``head`` makes frames of the last (Shi et al. 2017). For
    other layers and other orders see `MultiscaleForecaster`.

    Parameters
    ----------
    in_channels : int
        C, of frames in and out.
    hidden_channels : int or sequence of int
        F of each layer; encoder and forecaster have the same.
    kernel_size : int, tuple (KH, KW), or list
        As in `ConvLSTM2D`: a list has one item, int or pair, a layer.
    recurrent_kernel_size : int, tuple or list, optional
        Of the hidden states' convolutions, in the forms of kernel_size. None: the same.
    patch_size : int or (int, int)
        Frames are cut into patches of so many pixels, whose pixels are channels (`SpaceToDepth`), and put together
        again: Shi et al. 2015 have 4.
    inputs : "frames", "nothing", "zeros", "learnt" or "noise", optional
        What the forecaster reads. "frames": first the last one given, then each that it made itself. "nothing": its
        first layer has no input convolution (Shi et al. 2015, 2017). "zeros": it has one over as many channels as
        there are hidden ones, whose frames are zero, as in public code. "learnt": the same over a learnt number a
        channel. "noise": over numbers drawn from the standard normal distribution, so that each forecast is another.
        None: "frames" at one scale, "nothing" at several.
    strides : sequence of int, optional
        One a layer: how many times smaller its frames are than those before it. Kernels of the convolutions between
        scales are 3×3 for the strides 1 and 2, else by two larger than the stride; those of the transposed ones by two
        larger. With (1, 2, 2) and hidden_channels (64, 96, 96) that is jhhuang96's network, with (5, 3, 2) Shi's of
        2017. None: one scale.
    sampling_channels : sequence of int, optional
        Filters of those convolutions of the encoder, one a layer. None: as many as the layer before has, and a quarter
        of its own for the first. Behind the forecaster's last layer there are as many as at the first; behind the
        others those of the layer.
    cell : str
        The class of the recurrent layers.
    head_activation : str or pair of functions (forward, derivative)
        Of the frames made: "sigmoid" for values in (0, 1), "linear" for any.
    frame_size : int or (int, int), optional
        (H, W) of the frames, for what has a weight for every pixel. Other frames are then refused.
    peephole, normalization, use_bias, unit_forget_bias, kernel_initializer, recurrent_initializer, \
bias_initializer, activation, recurrent_activation, output_activation, padding_mode, recompute, algorithm
        Of all recurrent layers, as in `ConvLSTM2D`; those that the layers of `cell` have.
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
    encoder : ConvLSTM2D, or tuple of layers with `strides`
    forecaster : tuple of layers
        One ConvLSTM2D a layer; with `strides` the convolutions too.
    head : Conv2D

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    References
    ----------
    Shi et al., "Convolutional LSTM Network: A Machine Learning Approach for Precipitation Nowcasting", NeurIPS 2015,
    section 3.2; its network for Moving MNIST, of 7,585,296 parameters, is ``EncoderForecaster(1, (128, 64, 64), 5,
    patch_size=4, inputs="nothing", peephole="channel")``. Shi et al., "Deep Learning for Precipitation Nowcasting: A
    Benchmark and A New Model", NeurIPS 2017, section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> model = EncoderForecaster(1, (4, 2), 3, seed=0, engine="reference")
    >>> model.forecast(np.zeros((2, 5, 8, 8, 1)), steps=3).shape
    (2, 3, 8, 8, 1)
    >>> scales = EncoderForecaster(1, (4, 6, 6), 3, strides=(1, 2, 2), seed=0, engine="reference")
    >>> scales.forecast(np.zeros((2, 5, 8, 8, 1)), steps=3).shape
    (2, 3, 8, 8, 1)
    """

    _op = "EncoderForecaster"
    _comes_back = True

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
    recurrent_kernel_size: Any = None
    patch_size: Any = 1
    inputs: str | None = None
    strides: Any = None
    sampling_channels: Any = None
    cell: str = "ConvLSTM2D"

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("kernel_size", "recurrent_kernel_size")}
        super().__post_init__()  # lists become tuples: a list has one size a layer
        op = self._op
        (self.in_channels,) = integers(op, "in_channels", self.in_channels, 1, 1)
        count = len(self.hidden_channels) if isinstance(self.hidden_channels, tuple) else 1
        if count == 0:
            raise ValueError(f"{op}: hidden_channels must name the filters of at least one layer, got ()")
        self.hidden_channels = integers(op, "hidden_channels", self.hidden_channels, count, 1)
        for name, size in sizes.items():
            if isinstance(size, list) and len(size) != count:
                raise ValueError(
                    f"{op}: {name} {size!r} lists {len(size)} layers but hidden_channels {self.hidden_channels} names "
                    f"{count}; a tuple (height, width) of integers serves every layer"
                )
        flag(op, "use_bias", self.use_bias)
        flag(op, "unit_forget_bias", self.unit_forget_bias)
        self.dtype = layer_dtype(op, self.dtype)
        choice(op, "data_format", self.data_format, DATA_FORMATS)
        choice(op, "cell", self.cell, tuple(CELLS))
        r, s = integers(op, "patch_size", self.patch_size, 2, 1)
        self.patch_size = r if r == s else (r, s)
        if self.strides is not None:
            self.strides = integers(op, "strides", self.strides, count, 1)
        if self.sampling_channels is not None:
            if self.strides is None:
                raise ValueError(f"{op}: sampling_channels are of the convolutions between scales; give strides too")
            self.sampling_channels = integers(op, "sampling_channels", self.sampling_channels, count, 1)
        choice(op, "inputs", self.inputs, (None, *INPUTS))
        reading = self.inputs or ("frames" if self.strides is None else "nothing")
        if self.strides is not None and reading == "frames":
            raise ValueError(f"{op}: at several scales the forecaster begins at the smallest, where no frame is; "
                             f"inputs must be one of {', '.join(map(repr, INPUTS[1:]))}, got 'frames'")  # fmt: skip
        rng = np.random.default_rng(self.seed)
        self._noise = own_generator(rng) if reading == "noise" else None
        pairs: dict[str, list[Pair] | None] = {}
        for name, size in sizes.items():
            pairs[name] = each = None if size is None else self._pairs(name, size, count)
            if each is not None:
                setattr(self, name, tuple(each) if _is_per_layer(size) else each[0])
        build = self._one_scale if self.strides is None else self._several_scales
        build(reading, (r, s), self._layer_options(rng), pairs)

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments, by name; as files of before had them, where the later ones are not given."""
        later = {field.name: field.default for field in fields(self) if field.name in _LATER}
        return {name: value for name, value in super().options.items() if name not in later or value != later[name]}

    def _pairs(self, name: str, size: Any, count: int) -> list[Pair]:
        """Return the kernel size (KH, KW) of each layer."""
        each = list(size) if _is_per_layer(size) else [size] * count
        pairs = (integers(self._op, name, one, 2, 1) for one in each)
        return [(KH, KW) for KH, KW in pairs]

    def _layer_options(self, rng: np.random.Generator) -> dict[str, Any]:
        """Return the options of the recurrent layers; raise ValueError where they lack one that was given."""
        known = {field.name for field in fields(CELLS[self.cell])}
        options = {name: value for name, value in self.options.items() if name not in _OWN and value is not None}
        defaults = {field.name: field.default for field in fields(self)}
        if lost := [name for name in options if name not in known and options[name] != defaults[name]]:
            raise ValueError(f"{self._op}: {self.cell} has no {lost[0]}; leave it out")
        return {name: value for name, value in options.items() if name in known} | {"seed": rng, "return_state": True}

    def _frame(self, reduced: Sequence[int]) -> Pair | None:
        """Return (H, W) of frames that are so many times smaller, where it is known."""
        if self.frame_size is None:
            return None
        H, W = (
            -(-n // k) for n, k in zip(integers(self._op, "frame_size", self.frame_size, 2, 1), reduced, strict=True)
        )
        return H, W

    def _convolution(self, kind: type[Conv2D | Conv2DTranspose], C: int, F: int, size: int, **more: Any) -> Any:
        return kind(C, F, size, kernel_initializer=self.kernel_initializer, dtype=self.dtype, engine=self.engine,
                    algorithm=self.algorithm, **more)  # fmt: skip

    def _one_scale(
        self, reading: str, patch: Pair, options: dict[str, Any], sizes: Mapping[str, Sequence[Pair] | None]
    ) -> None:
        """Build encoder, forecaster and head of frames of one size."""
        frame, channels = self._frame(patch), self.in_channels * patch[0] * patch[1]
        options |= {} if frame is None else {"frame_size": frame}
        lists = {name: [*size] for name, size in sizes.items() if size is not None}
        make, filters = CELLS[self.cell], self.hidden_channels
        self.encoder: Any = make(channels, filters, num_layers=len(filters), return_sequences=False, **lists, **options)
        first = {"frames": channels, "nothing": 0}.get(reading, filters[0])
        layers = zip((first, *filters), filters, *lists.values(), strict=False)
        self.forecaster = tuple(make(C, F, **dict(zip(lists, each, strict=True)), **options) for C, F, *each in layers)
        self.head = self._convolution(Conv2D, sum(filters), channels, 1, activation=self.head_activation,
                                      seed=options["seed"])  # fmt: skip
        starts = start_layers(reading, self.forecaster[0], dtype=self.dtype)
        stages = Stages.of(
            self._op, (1, 1, *(frame or (None, None)), channels), [self.encoder], [*starts.values(), *self.forecaster],
            [self.head], mirrored=False, reads="all", inputs=reading,
        )  # fmt: skip
        named: dict[str, Layer] = {"encoder": self.encoder} | starts
        self._assemble(stages, named | _numbered("forecaster", self.forecaster) | {"head": self.head}, patch)

    def _several_scales(
        self, reading: str, patch: Pair, options: dict[str, Any], sizes: Mapping[str, Sequence[Pair] | None]
    ) -> None:
        """Build encoder, forecaster and head of frames that become smaller, and larger again."""
        make, filters, rng = CELLS[self.cell], self.hidden_channels, options["seed"]
        channels = self.in_channels * patch[0] * patch[1]
        sampled = self.sampling_channels or (max(1, filters[0] // 4), *filters[:-1])
        reduced, frame = patch, self._frame(patch)
        whole = (1, 1, *(frame or (None, None)), channels)
        encoder: list[Layer] = []
        back: list[list[Layer]] = []
        for n, (stride, C, K, F) in enumerate(zip(self.strides, (channels, *filters), sampled, filters, strict=False)):
            size = stride + 1 if stride % 2 == 0 else stride + 2
            down = self._convolution(Conv2D, C, K, size, stride=stride, padding=1, seed=rng)
            reduced = reduced[0] * stride, reduced[1] * stride
            given = options | {name: each[n] for name, each in sizes.items() if each is not None}
            given |= {} if self.frame_size is None else {"frame_size": self._frame(reduced)}
            encoder += [down, LeakyReLU(SLOPE), make(K, F, **given)]
            last = n == len(filters) - 1
            above = {"nothing": 0}.get(reading, F) if last else filters[n + 1]
            kind = Conv2D if stride == 1 else Conv2DTranspose
            up = self._convolution(kind, F, F if n else sampled[0], stride + 2, stride=stride, padding=1, seed=rng)
            back.append([make(above, F, **given), up, LeakyReLU(SLOPE)])
        forecaster = [layer for stage in reversed(back) for layer in stage]
        self.encoder = tuple(encoder)
        self.forecaster = tuple(forecaster)
        self.head = self._convolution(Conv2D, sampled[0], channels, 1, activation=self.head_activation, seed=rng)
        starts = start_layers(reading, forecaster[0], dtype=self.dtype)
        stages = Stages.of(self._op, whole, encoder, [*starts.values(), *forecaster], [self.head], mirrored=True,
                           reads="last", inputs=reading)  # fmt: skip
        named = _numbered("encoder", encoder) | starts
        self._assemble(stages, named | _numbered("forecaster", forecaster) | {"head": self.head}, patch)


def _numbered(name: str, layers: Sequence[Layer]) -> dict[str, Layer]:
    return {f"{name}.{index}": layer for index, layer in enumerate(layers)}


def _is_per_layer(size: Any) -> bool:
    """Tell sizes given layer by layer from one size for all."""
    return isinstance(size, list) or (isinstance(size, tuple) and any(map(np.ndim, size)))
