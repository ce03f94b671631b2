"""The graphs of a network that reads frames with one chain of layers and makes what follows with another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastclstm.layers.activation import Activation, LeakyReLU
from fastclstm.layers.array_layer import FrameLayer, VolumeLayer
from fastclstm.layers.base import Layer
from fastclstm.layers.container import told
from fastclstm.layers.dropout import Dropout
from fastclstm.layers.learnt_input import LearntInput
from fastclstm.layers.merging import Concatenate
from fastclstm.layers.normalization import BatchNormalization
from fastclstm.layers.rectifiers import ReLU
from fastclstm.layers.symbolic import Input, Known, Symbol, leaves
from fastclstm.layers.time_distributed import TimeDistributed
from fastclstm.models.model import Model
from fastclstm.spec import choice

INPUTS = ("frames", "nothing", "zeros", "learnt", "noise")
"""What a forecaster reads."""
READS = ("last", "all")
"""What the head reads: the last layer's output, or the hidden states of all recurrent layers."""

_FORBIDDEN = ("stateful", "time_major", "go_backwards", "bidirectional")
_BY_ITSELF = (Activation, BatchNormalization, Dropout, LeakyReLU, ReLU, TimeDistributed)
"""Layers that may be given whole sequences; batch normalization then has the statistics of all steps together."""


def is_recurrent(layer: Layer) -> bool:
    """Whether a layer carries states from one step to the next, and hands them on."""
    return hasattr(layer, "return_state") and hasattr(layer, "return_sequences")


@dataclass(frozen=True)
class Stages:
    """The graphs, and which of the encoder's states the forecaster's start from."""

    encoder: Model
    """From frames to the arrays of the states behind them, cell by cell."""
    going_on: Model
    """The same from [frames, states before them]."""
    forecaster: Model
    """From [inputs, states] to [frames made, states]."""
    cells: tuple[int, ...]
    """How many arrays each cell of the encoder has for its state."""
    handed: tuple[int, ...]
    """The encoder's cells that the forecaster's start from."""
    mirrored: bool
    """Whether that is the last one first, and the forecaster's frames are at first as large as its hidden state."""
    tied: bool
    """Whether the encoder's layers themselves go on: from before the last frame given, which is then read."""
    reading: str
    """What the forecaster reads: one of `INPUTS`."""
    inputs: Known
    """The shape (1, 1, height, width, channels) of what the forecaster reads, as far as it is known."""

    @classmethod
    def of(
        cls, op: str, frames: Known, encoder: Sequence[Layer], forecaster: Sequence[Layer] | None,
        head: Sequence[Layer], *, mirrored: bool, reads: str, inputs: str,
    ) -> Stages:  # fmt: skip
        """Connect the layers, for frames (1, 1, height, width, channels), whose shape stands for that of any sequence.

        Without a forecaster the encoder's own layers go on. Recurrent layers are told to return what is needed here.

        Raises
        ------
        ValueError, TypeError
            Layers that do not fit together or do not belong here.
        """
        choice(op, "reads", reads, READS)
        choice(op, "inputs", inputs, INPUTS)
        tied = forecaster is None
        mirrored = mirrored and not tied
        made_by = list(encoder) if forecaster is None else list(forecaster)
        for name, layers in (("encoder", encoder), ("forecaster", made_by), ("head", head)):
            _check(op, name, layers, recurrent=name != "head")
        if tied and inputs != "frames":
            raise ValueError(f"{op}: without a forecaster the encoder's layers go on, and read frames: inputs must be "
                             f"'frames', got {inputs!r}")  # fmt: skip
        last = max(index for index, layer in enumerate(encoder) if is_recurrent(layer))
        if not tied and last < len(encoder) - 1:
            raise ValueError(f"{op}: the encoder must end with a recurrent layer, as only states are handed on, but "
                             f"{told(str(last + 1), encoder[last + 1])} comes behind")  # fmt: skip
        reading = encoder[: last + 1]
        for layer in (*reading, *made_by):
            if is_recurrent(layer):
                layer.return_state, layer.return_sequences = True, True  # type: ignore[attr-defined]
        reading[-1].return_sequences = tied  # type: ignore[attr-defined]
        x = Input(batch_shape=frames)
        _, _, states = _through(reading, x)
        cells = tuple(len(cell) for cell in states)
        before = [tuple(Input(batch_shape=array.shape) for array in cell) for cell in states]
        later = Input(batch_shape=frames)
        _, _, after = _through(reading, later, before)
        handed = tuple(reversed(range(len(cells)))) if mirrored else tuple(range(len(cells)))
        start = cls._start(op, made_by[0], frames, states, mirrored, inputs)
        given = Input(batch_shape=start)
        starts = [tuple(Input(batch_shape=array.shape) for array in states[cell]) for cell in handed]
        wanted = sum(_cells(layer) for layer in made_by if is_recurrent(layer))
        if wanted != len(cells):
            raise ValueError(f"{op}: the encoder has {len(cells)} recurrent cells, but the forecaster, whose cells go "
                             f"on from their states, {wanted}; give it as many")  # fmt: skip
        y, hidden, made = _through(made_by, given, starts)
        if reads == "all":
            y = hidden[0] if len(hidden) == 1 else Concatenate()(hidden)
        for layer in head:
            y = _framewise(layer)(y)
        return cls(
            Model(x, list(leaves(states))), Model([later, *leaves(before)], list(leaves(after))),
            Model([given, *leaves(starts)], [y, *leaves(made)]), cells, handed, mirrored, tied, inputs, start,
        )  # fmt: skip

    @staticmethod
    def _start(op: str, first: Layer, frames: Known, states: Any, mirrored: bool, inputs: str) -> Known:
        """Return the shape of what the forecaster's first layer is to read."""
        if inputs == "frames":
            return frames
        size = states[-1][0].shape[1:3] if mirrored else frames[2:4]
        channels = getattr(first, "in_channels", None)
        if channels is None:
            raise ValueError(f"{op}: with inputs={inputs!r} the forecaster must begin with a layer that has "
                             f"in_channels, got {type(first).__name__}")  # fmt: skip
        if (channels == 0) != (inputs == "nothing"):
            raise ValueError(f"{op}: inputs={inputs!r}, but the forecaster's first layer takes {channels} channels; "
                             "in_channels=0 and inputs='nothing' go together")  # fmt: skip
        return 1, 1, *size, channels

    def to_forecaster(self, states: Sequence[Any]) -> list[Any]:
        """Return the encoder's arrays, or their gradients, in the forecaster's order."""
        cells = self.by_cell(states)
        return [array for cell in self.handed for array in cells[cell]]

    def to_encoder(self, states: Sequence[Any]) -> list[Any]:
        """Undo `to_forecaster`."""
        places = sorted(range(len(self.handed)), key=lambda place: self.handed[place])
        sizes, parts, at = [self.cells[cell] for cell in self.handed], [], 0
        for size in sizes:
            parts.append(states[at : at + size])
            at += size
        return [array for place in places for array in parts[place]]

    def by_cell(self, arrays: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Return the encoder's arrays as one tuple a cell."""
        parts, at = [], 0
        for size in self.cells:
            parts.append(tuple(arrays[at : at + size]))
            at += size
        return parts


def start_layers(inputs: str, first: Layer, **options: Any) -> dict[str, Layer]:
    """Return what stands before a forecaster's `first` layer, by name: learnt inputs are a layer."""
    return {"inputs": LearntInput(getattr(first, "in_channels", 0), **options)} if inputs == "learnt" else {}


def _check(op: str, name: str, layers: Sequence[Layer], *, recurrent: bool) -> None:
    for index, layer in enumerate(layers):
        if not isinstance(layer, Layer):
            raise TypeError(f"{op}: {name} must be a list of layers, got {type(layer).__name__} at {index}")
        where = f"{name} {told(str(index), layer)}"
        for option in _FORBIDDEN:
            if getattr(layer, option, False) is True:
                raise ValueError(f"{op}: {where} has {option}=True, which cannot go on step by step; leave it out")
        if getattr(layer, "data_format", "channels_last") != "channels_last":
            raise ValueError(f"{op}: {where} is channels_first; make the layers channels_last and give the network "
                             f"data_format='channels_first'")  # fmt: skip
        if is_recurrent(layer) and not recurrent:
            raise ValueError(f"{op}: {where} is recurrent; the head makes frames of what the forecaster returns")
    if recurrent and not any(map(is_recurrent, layers)):
        raise ValueError(f"{op}: {name} must have at least one recurrent layer, such as ConvLSTM2D")


def _framewise(layer: Layer) -> Layer:
    """Return what applies a layer to each frame of a sequence."""
    if isinstance(layer, _BY_ITSELF) or (isinstance(layer, FrameLayer) and not isinstance(layer, VolumeLayer)):
        return layer
    return TimeDistributed(layer)


def _cells(layer: Layer) -> int:
    return getattr(layer, "num_layers", 1)


def _through(
    layers: Sequence[Layer], x: Symbol, states: Sequence[Any] | None = None
) -> tuple[Symbol, list[Symbol], list[tuple[Symbol, ...]]]:
    """Return what a chain makes of x, the hidden sequences of its recurrent layers, and their last states."""
    hidden: list[Symbol] = []
    after: list[tuple[Symbol, ...]] = []
    for layer in layers:
        if is_recurrent(layer):
            count = _cells(layer)
            options = {} if states is None else {"initial_state": list(states[len(after) : len(after) + count])}
            x, own = layer(x, **options)
            hidden.append(x)
            after += [cell if isinstance(cell, tuple) else (cell,) for cell in own]
        else:
            x = _framewise(layer)(x)
    return x, hidden, after
