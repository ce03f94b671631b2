"""Encoder–forecasters of any layers, at any number of scales."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm.layers.base import Layer
from fastclstm.layers.recurrent_cell import own_generator
from fastclstm.models.forecasting import Forecasting
from fastclstm.models.stages import INPUTS, Stages, start_layers
from fastclstm.nn.names import with_article
from fastclstm.spec import DATA_FORMATS, choice, flag, integers


@dataclass(eq=False, repr=False)
class MultiscaleForecaster(Forecasting):
    """A chain of layers that reads frames, and one that goes on from its states and makes the frames that follow.

    The last states of the encoder's recurrent layers (ConvLSTM2D, or any other that has `return_state` and takes
    `initial_state`) are those that the forecaster's start from. All other layers work on each frame by itself: such as
    convolutions that make frames smaller, and transposed ones that make them larger. `EncoderForecaster` builds the
    usual ones.

    Parameters
    ----------
    encoder : list of Layer
        For frames, or patches of them, channels-last. What stands behind the last recurrent layer is nothing, as only
        states are handed on.
    forecaster : list of Layer, optional
        None: there is one chain, which reads all frames but the last one, and goes on from that: its own output is its
        next input, as in PredRNN's and OpenSTL's ConvLSTM.
    head : list of Layer
        What makes frames of the forecaster's output, one by one.
    mirrored : bool
        The forecaster's recurrent cells are those of the encoder in reverse order, so that it begins at the smallest
        scale. False: in the same order.
    reads : "last" or "all"
        What the head gets: the forecaster's output, or the hidden states of all its recurrent layers, side by side, as
        in Shi et al. 2015.
    inputs : "nothing", "zeros", "learnt", "noise" or "frames"
        What the forecaster's first layer reads: "nothing" goes with in_channels=0; "zeros", "noise" (of the standard
        normal distribution, drawn anew with each call) and "learnt" (a number a channel, the parameter
        ``inputs.value``) have as many channels as it takes, in frames as large as the encoder's last hidden state, or
        not mirrored as its frames. "frames": those given, then those made, which must be of one shape.
    in_channels : int, optional
        Of frames. None: told by the encoder's first layer.
    patch_size : int or (int, int)
        Frames are cut into patches of so many pixels, whose pixels are channels (`SpaceToDepth`), and put together
        again.
    data_format : "channels_last" or "channels_first"
        Of frames; layers are channels-last.
    frame_size : int or (int, int), optional
        (H, W) of the frames, where layers have a weight for every pixel.
    seed : int or numpy.random.Generator, optional
        Of noise.

    Raises
    ------
    ValueError, TypeError
        Layers that do not fit together or cannot stand here.

    Notes
    -----
    The layers become the network's own: recurrent ones get return_state=True and the return_sequences that it needs.
    Batch normalization takes the statistics of all steps together, where these are computed together.

    References
    ----------
    Shi et al., "Deep Learning for Precipitation Nowcasting: A Benchmark and A New Model", NeurIPS 2017; Sutskever et
    al., "Sequence to Sequence Learning with Neural Networks", NeurIPS 2014.

    Examples
    --------
    >>> from fastclstm import Conv2D, Conv2DTranspose, ConvLSTM2D
    >>> own = {"seed": 0, "engine": "reference"}
    >>> model = MultiscaleForecaster(
    ...     [ConvLSTM2D(1, 4, 3, **own), Conv2D(4, 4, 3, stride=2, **own), ConvLSTM2D(4, 8, 3, **own)],
    ...     [ConvLSTM2D(0, 8, 3, **own), Conv2DTranspose(8, 4, 4, stride=2, **own), ConvLSTM2D(4, 4, 3, **own)],
    ...     [Conv2D(4, 1, 1, **own)],
    ... )
    >>> model.forecast(np.zeros((2, 5, 8, 8, 1)), steps=3).shape
    (2, 3, 8, 8, 1)
    """

    _op = "MultiscaleForecaster"
    _comes_back = False

    encoder: Any
    forecaster: Any = None
    head: Any = ()
    _: KW_ONLY
    mirrored: bool = True
    reads: str = "last"
    inputs: str | None = None
    in_channels: Any = None
    patch_size: Any = 1
    data_format: str = "channels_last"
    frame_size: Any = None
    seed: int | np.random.Generator | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        op = self._op
        flag(op, "mirrored", self.mirrored)
        choice(op, "data_format", self.data_format, DATA_FORMATS)
        choice(op, "inputs", self.inputs, (None, *INPUTS))
        patch = integers(op, "patch_size", self.patch_size, 2, 1)
        chains = {name: self._listed(name) for name in ("encoder", "forecaster", "head")}
        encoder, forecaster, head = chains.values()
        if encoder is None or head is None:
            raise TypeError(f"{op}: encoder and head must be lists of layers, got None")
        reading = self.inputs or ("frames" if forecaster is None else "nothing")
        layers = [layer for chain in chains.values() for layer in chain or ()]
        if twice := [layer for n, layer in enumerate(layers) if layer in layers[:n]]:
            raise ValueError(f"{op}: {with_article(type(twice[0]))} stands there twice; leave forecaster out, "
                             f"where the encoder's layers go on themselves, or make two")  # fmt: skip
        dtypes = {layer.dtype for layer in layers if hasattr(layer, "dtype")}
        if len(dtypes) > 1:
            raise ValueError(f"{op}: layers must have one dtype, got {', '.join(sorted(map(str, dtypes)))}")
        self.dtype = dtypes.pop() if dtypes else "float32"
        pixels = patch[0] * patch[1]
        if self.in_channels is None:
            first = getattr(encoder[0], "in_channels", None) if encoder else None
            if first is None or first % pixels:
                raise ValueError(f"{op}: give in_channels, those of frames; they are told by an encoder's first layer "
                                 f"that has in_channels, a multiple of a patch's {pixels} pixels")  # fmt: skip
            self.in_channels = first // pixels
        (self.in_channels,) = integers(op, "in_channels", self.in_channels, 1, 1)
        channels = self.in_channels * pixels
        size: tuple[Any, ...] = (None, None)
        if self.frame_size is not None:
            self.frame_size = integers(op, "frame_size", self.frame_size, 2, 1)
            size = tuple(n // k for n, k in zip(self.frame_size, patch, strict=True))
        self._noise = own_generator(np.random.default_rng(self.seed)) if reading == "noise" else None
        starts = start_layers(reading, forecaster[0], dtype=self.dtype) if forecaster else {}
        stages = Stages.of(
            op, (1, 1, *size, channels), encoder, None if forecaster is None else [*starts.values(), *forecaster], head,
            mirrored=self.mirrored, reads=self.reads, inputs=reading,
        )  # fmt: skip
        named = {f"{name}.{n}": layer for name, chain in chains.items() for n, layer in enumerate(chain or ())}
        self._assemble(stages, named | starts, patch)

    def _listed(self, name: str) -> list[Layer] | None:
        given = getattr(self, name)
        if given is None or isinstance(given, Layer):
            return None if given is None else [given]
        if not isinstance(given, list | tuple) or not all(isinstance(layer, Layer) for layer in given):
            raise TypeError(f"{self._op}: {name} must be a list of layers, got {given!r}")
        return list(given)
