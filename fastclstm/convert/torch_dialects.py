"""The dialects of PyTorch's ConvLSTMs, one row each, and how a row turns a cell's weights into ours and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import permutations
from typing import Any

import numpy as np

from fastclstm.nn.normalization import Normalization
from fastclstm.nn.normalization import get as get_normalization
from fastclstm.spec import NORMALIZED_PARTS, PEEPHOLE_GATES

Arrays = dict[str, np.ndarray]
Options = dict[str, Any]
Index = tuple[int, int]
"""A cell's layer and direction."""

GATES = "ifgo"
"""The order of ours."""


@dataclass(frozen=True)
class Dialect:
    """How a module of PyTorch names and arranges its cells' weights: a row of the table of dialects.

    A convolution called "conv" has the weights conv.weight (OIHW) and perhaps conv.bias in every cell. With "{gate}" in
    its name it stands for four, one a gate, with the letters of `gates` in their names: "Wx{gate}" with gates "ifco" is
    Wxi, Wxf, Wxc and Wxo.

    Parameters
    ----------
    cells : str or sequence of str
        Where the cells are: a place, perhaps with {layer} or {direction} in it, to be found after any prefix; "" for a
        module that is a cell itself; or the places of all layers, one by one.
    joint : str, optional
        The convolution of x and h together, its input channels x's, then h's. Either this or `split`.
    split : (str, str), optional
        The convolution of x and that of h, whose results are added.
    gates : str
        The order of the gates' blocks: the letters i, f, g (or c) and o. "": modules with these names have it in
        different orders, and `from_torch` and `to_torch` are to be told.
    biases : str
        Which convolutions of `split` may have a bias: "xh", "x", "h" or "". With `joint` any but "" allows one.
    forget_bias : float
        What the module adds to the forget gate when it runs.
    peephole : (str, str, str), optional
        The weights that i, f and o see of the cell state, of arrays (1, F, H, W), (1, F, 1, 1) or (F, H, W). A name
        ending in ".weight" may be that of a convolution, which may have a bias. A name that stands twice holds its
        gates' blocks one after another.
    peephole_optional : bool
        Modules without them are of the dialect too.
    peephole_axes : 4 or 3
        How many axes `to_torch` writes an array with: (1, F, H, W) or (F, H, W).
    normalization : str or Normalization, optional
        Of the pre-activations, its groups and epsilon included.
    group_size : int, optional
        How many channels the groups of a normalization of kind "group" have, where their number depends on that.
    norms : sequence of str
        The modules that normalize: one of the convolutions' sum, or that of x's and that of h's.
    norms_optional : bool
        Modules without them are of the dialect too.
    activations : sequence of str
        What the module may apply to g, the usual one first.
    output_activation : str, optional
        What it applies to the new cell state; None: the same.
    directions : sequence of str
        What {direction} may be: the cell that goes forward, then the one that goes backward.
    unused : sequence of str
        Further names in a cell, of weights that the module never uses.
    untrained : sequence of (str, float)
        Further names in a cell, and the value that they must hold all over: that with which the module computes what a
        ConvLSTM2D can.
    refused : sequence of str
        Names that only modules have which compute something else.
    refusal : str
        What those compute.
    beside : sequence of str
        Names beside the cells, of what carries no weights of its own; one that ends in "." means all that begin so.
    layout : "OIHW" or "HWIO"
        Of the convolutions' weights; in the latter, Flax's, they are called kernel.
    name : str

    Raises
    ------
    ValueError
        A row that is none: neither joint nor split, other letters than those of the gates, and the like.

    Examples
    --------
    >>> Dialect("cell_list.{layer}", joint="conv", gates="ifog").required
    ('conv.weight',)
    """

    cells: Any
    joint: str | None = None
    split: tuple[str, str] | None = None
    gates: str = GATES
    biases: str = "xh"
    forget_bias: float = 0.0
    peephole: tuple[str, str, str] | None = None
    peephole_optional: bool = False
    peephole_axes: int = 4
    normalization: Any = None
    group_size: int | None = None
    norms: tuple[str, ...] = ()
    norms_optional: bool = False
    activations: tuple[str, ...] = ("tanh",)
    output_activation: str | None = None
    directions: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    untrained: tuple[tuple[str, float], ...] = ()
    refused: tuple[str, ...] = ()
    refusal: str = ""
    beside: tuple[str, ...] = ()
    layout: str = "OIHW"
    name: str = "your own"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        places = (self.cells,) if isinstance(self.cells, str) else self.cells
        if not (isinstance(places, tuple) and places and all(isinstance(place, str) for place in places)):
            raise ValueError(
                f"Dialect: cells must be the place of the cells or a sequence of places, got {self.cells!r}"
            )
        if (self.joint is None) == (self.split is None):
            raise ValueError("Dialect: give either joint='name' of the one convolution or split=('of x', 'of h')")
        if not isinstance(self.gates, str) or (self.gates and sorted(self.gates.replace("c", "g")) != sorted(GATES)):
            raise ValueError(f"Dialect: gates must be an order of the letters i, f, g (or c) and o, got {self.gates!r}")
        if self.split is not None and len(self.split) != 2:
            raise ValueError(f"Dialect: split must be two names, of x's convolution and of h's, got {self.split!r}")
        if self.peephole is not None and len(self.peephole) != 3:
            raise ValueError(f"Dialect: peephole must be three names, for the gates i, f and o, got {self.peephole!r}")
        if self.normalization is not None:
            object.__setattr__(self, "normalization", get_normalization(self.normalization))
        if len(self.norms) != len(self.parts):
            raise ValueError(f"Dialect: norms must name {len(self.parts)} module(s) for normalization="
                             f"{self.normalization!r}, got {self.norms!r}")  # fmt: skip
        if self.peephole_axes not in (3, 4):
            raise ValueError(f"Dialect: peephole_axes must be 3 or 4, got {self.peephole_axes!r}")
        if self.layout not in ("OIHW", "HWIO"):
            raise ValueError(f"Dialect: layout must be 'OIHW' or 'HWIO', got {self.layout!r}")
        if self.group_size is not None and (self.normalization is None or self.normalization.kind != "group"):
            raise ValueError(f"Dialect: group_size={self.group_size!r} goes with normalization='group'")
        if self.group_size is None and self.normalization is not None:
            self._check_mixing(self.normalization)

    def _check_mixing(self, normalization: Normalization) -> None:
        """Raise ValueError where groups of channels have a part of several gates, in another order than ours."""
        if _mixing(normalization) and self.gates != GATES:
            raise ValueError(f"Dialect: groups={normalization.groups} mixes gates, which another order than "
                             f"{GATES!r} would mix otherwise: no ConvLSTM2D computes that")  # fmt: skip

    def normalization_of(self, width: int) -> Normalization | None:
        """Return the normalization of a cell with 4F = `width` pre-activations."""
        if self.group_size is None or self.normalization is None:
            return self.normalization
        normalization = replace(self.normalization, groups=max(1, width // self.group_size))
        self._check_mixing(normalization)
        return normalization

    def reordered(self) -> Iterator[Dialect]:
        """Yield the dialects that differ in the order of the gates alone, where names do not tell it."""
        named = any("{gate}" in convolution for convolution in (self.joint, *(self.split or ())) if convolution)
        mixing = self.group_size is not None or (self.normalization is not None and _mixing(self.normalization))
        for order in permutations(GATES) if not (named or mixing) else ():
            yield replace(self, gates="".join(order))

    def alone(self) -> Dialect:
        """Return the dialect of a module that is one of the cells; a joint convolution by itself tells none."""
        optional = self.peephole_optional and self.split is not None
        return replace(self, cells="", directions=(), beside=(), peephole_optional=optional)

    @property
    def reader(self) -> str:
        """The function that reads the dialect, for messages."""
        return "from_torch" if self.layout == "OIHW" else "from_flax"

    @property
    def writer(self) -> str:
        """The function that writes it."""
        return self.reader.replace("from", "to")

    @property
    def meaning(self) -> tuple[Any, ...]:
        """What decides how a cell's weights are read: of dialects in which that is the same, any will do."""
        return (self.joint, self.split, self.gates, self.biases, self.forget_bias, self.peephole, self.normalization,
                self.group_size, self.norms, self.activations[0], self.output_activation, self.layout)  # fmt: skip

    # Names

    @property
    def required(self) -> tuple[str, ...]:
        """Names that every cell has."""
        weights = [f"{conv}.{self.weight}" for conv in self._convolutions()]
        peepholes = () if self.peephole_optional else self.peephole or ()
        return (*weights, *dict.fromkeys(peepholes), *(() if self.norms_optional else self.norm_names()))

    @property
    def weight(self) -> str:
        """What a convolution's weights are called."""
        return "weight" if self.layout == "OIHW" else "kernel"

    @property
    def optional(self) -> tuple[str, ...]:
        """Names that a cell may have and that matter."""
        norms = self.norm_names() if self.norms_optional else ()
        peepholes = self.peephole or () if self.peephole_optional else ()
        untrained = (name for name, _ in self.untrained)
        return (*self.bias_names(), *peepholes, *norms, *untrained, *self.refused)

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names that a cell may have and that do not matter."""
        return (*self.unused, *self.counters())

    def find(self, name: str, start: str = "") -> tuple[str, Index, str] | None:
        """Return of a name of a cell's weight the prefix, the cell's layer and direction and its name there."""
        if not isinstance(self.cells, str):
            for layer in range(len(self.cells)):
                place = start + self.place(layer, 0)
                if name.startswith(place):
                    return start, (layer, 0), name.removeprefix(place)
            return None
        match = self._pattern.fullmatch(name)
        if match is None:
            return None
        groups = match.groupdict()
        direction = self.directions.index(groups["direction"]) if self.directions else 0
        return groups["prefix"], (int(groups.get("layer", 0)), direction), groups["name"]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        place = re.escape(self.cells).replace(r"\{layer\}", "(?P<layer>[0-9]{1,3})")
        place = place.replace(r"\{direction\}", f"(?P<direction>{'|'.join(map(re.escape, self.directions))})")
        return re.compile(rf"(?P<prefix>(?:.*\.)?){place}\.(?P<name>.+)")

    def place(self, layer: int, direction: int) -> str:
        """Return what stands before the names of a cell."""
        if not isinstance(self.cells, str):
            place = str(self.cells[layer])
        else:
            place = self.cells.replace("{layer}", str(layer))
            place = place.replace("{direction}", (*self.directions, "", "")[direction])
        return f"{place}." if place else ""

    def spelled(self, convolution: str) -> list[str]:
        """Return the names of a convolution, or of the four that it stands for."""
        return [convolution.replace("{gate}", g) for g in self.gates] if "{gate}" in convolution else [convolution]

    def _convolutions(self, parts: str = "xh") -> list[str]:
        named = (self.joint,) if self.split is None else (self.split["xh".index(part)] for part in parts)
        return [name for conv in named if conv is not None for name in self.spelled(conv)]

    def bias_names(self) -> tuple[str, ...]:
        """Return the names of the convolutions' biases, of which a cell has all or none."""
        convolutions = self._convolutions(self.biases) if self.split is not None or self.biases else []
        biases = [f"{conv}.bias" for conv in convolutions]
        return (*biases, *(name.removesuffix("weight") + "bias" for name in dict.fromkeys(self.peephole or ())
                           if name.endswith(".weight")))  # fmt: skip

    @property
    def parts(self) -> tuple[str, ...]:
        """The suffixes of what is normalized, as in `NORMALIZED_PARTS`."""
        return () if self.normalization is None else NORMALIZED_PARTS[self.normalization.separate]

    def norm_parameters(self) -> Iterator[tuple[str, str]]:
        """Yield our name of each of the normalization's parameters and theirs."""
        names = {"gamma": "weight", "beta": "bias"}
        if self.parts and self.normalization.kind == "batch":
            names |= {"moving_mean": "running_mean", "moving_variance": "running_var"}
        for part, norm in zip(self.parts, self.norms, strict=True):
            yield from ((f"{ours}{part}", f"{norm}.{theirs}") for ours, theirs in names.items())

    def norm_names(self) -> tuple[str, ...]:
        """Return their names of the normalization's parameters."""
        return tuple(theirs for _, theirs in self.norm_parameters())

    def counters(self) -> tuple[str, ...]:
        """Return the names of what counts the batches that a batch normalization has seen."""
        batch = self.parts and self.normalization.kind == "batch"
        return tuple(f"{norm}.num_batches_tracked" for norm in self.norms) if batch else ()

    def peepholes(self) -> Iterator[tuple[str, str, int, int]]:
        """Yield for each gate its weight's name, which of its blocks is the gate's, and how many there are."""
        names = self.peephole or ()
        for number, (gate, name) in enumerate(zip(PEEPHOLE_GATES, names, strict=False)):
            yield gate, name, names[:number].count(name), names.count(name)


def _mixing(normalization: Normalization) -> bool:
    """Whether groups of channels are normalized that have a part of several gates."""
    return normalization.kind == "group" and (normalization.groups or 4) % 4 != 0 and normalization.groups != 1


def convolves(name: str, shape: Sequence[int]) -> bool:
    """Whether a peephole's weight of this name and shape is that of a convolution."""
    return name.endswith(".weight") and len(shape) == 4


def _fresh(*names: str) -> tuple[tuple[str, float], ...]:
    """Names of normalizations' parameters, and what they hold before any training."""
    return tuple((f"{name}.{kind}", value) for name in names for kind, value in (("weight", 1.0), ("bias", 0.0)))


_TABLE = (
    Dialect("cell_list.{layer}", joint="conv", gates="ifog", name="ndrplz"),
    Dialect(
        "cell_list.{layer}",
        joint="conv",
        gates="ifog",
        peephole=("conv_c.weight", "conv_c.weight", "conv_cnext.weight"),
        name="kl4805",
    ),
    Dialect(
        "cell_list.{layer}",
        joint="conv",
        gates="ifog",
        peephole=("Wci", "Wcf", "Wco"),
        peephole_axes=3,
        activations=("tanh", "relu"),
        name="aserdega",
    ),
    Dialect(
        "conv_lstm_cells.{direction}.gates.0",
        split=("conv_x", "conv_h"),
        normalization="batch",
        norms=("bn2d",),
        directions=("0", "1"),
        beside=("hidden_state", "cell_state"),
        name="seyongk",
    ),
    Dialect(
        "cell_list.{layer}",
        split=("conv_x.0", "conv_h.0"),
        biases="",
        normalization=Normalization("layer", separate=True, elementwise=True),
        norms=("conv_x.1", "conv_h.1"),
        norms_optional=True,
        unused=("conv_o.0.weight", "conv_o.1.weight", "conv_o.1.bias", "conv_last.weight"),
        name="openstl",
    ),
    Dialect(
        "cell_{direction}",
        split=("input_conv", "rnn_conv"),
        directions=("fw", "bw"),
        untrained=_fresh(*(f"layer_norm_{name}" for name in ("x", "h", "cnext", "ci", "cf", "co"))),
        refused=("layer_norm_ci.weight", "weight_ci.weights", "weight_cf.weights", "weight_co.weights"),
        refusal=(
            "these weights were trained with layer_norm=True or peephole=True, which in KimUyen's module normalizes "
            "the cell state, or lets the peepholes take the place of the gates' pre-activations, o's see the old cell "
            "state, and leaves their weights out of the state_dict"
        ),
        name="kimuyen",
    ),
    Dialect(
        "cell{layer}",
        split=("Wx{gate}", "Wh{gate}"),
        gates="ifco",
        biases="x",
        peephole=("Wci", "Wcf", "Wco"),
        peephole_optional=True,
        beside=("_all_layers.",),
        name="automan000",
    ),
    Dialect(
        "convLSTMcell",
        joint="conv",
        peephole=("W_ci", "W_cf", "W_co"),
        peephole_axes=3,
        activations=("tanh", "relu"),
        name="sladewinter",
    ),
    Dialect(
        "convLSTMcell",
        joint="conv",
        peephole=("W_ci.weight", "W_cf.weight", "W_co.weight"),
        peephole_axes=3,
        activations=("tanh", "relu"),
        name="sladewinter-hadamard",
    ),
    Dialect(
        "ConvLSTMCell",
        joint="conv",
        peephole=("W_ci", "W_cf", "W_co"),
        peephole_optional=True,
        peephole_axes=3,
        activations=("tanh", "relu", "sigmoid"),
        name="tsugumi",
    ),
    Dialect(
        "",
        joint="_conv",
        peephole=("Wci", "Wcf", "Wco"),
        peephole_optional=True,
        name="hzzone",
    ),
    Dialect(
        "",
        joint="conv.0",
        normalization="group",
        group_size=32,
        norms=("conv.1",),
        name="jhhuang96",
    ),
    Dialect(
        "",
        joint="conv.0",
        biases="",
        normalization="batch",
        norms=("conv.1",),
        activations=("linear",),
        output_activation="tanh",
        name="czifan",
    ),
    Dialect("", joint="conv", gates="ifog", name="holmdk"),
    Dialect(
        "",
        joint="conv",
        gates="ifog",
        unused=("threshold", "graded_spikes_factor"),
        untrained=(("reset_mechanism_val", 2.0),),
        refusal="snnTorch's SConv2dLSTM with another reset_mechanism than 'none' resets its hidden state",
        name="snntorch",
    ),
    Dialect("", split=("conv_x", "conv_h"), gates="", name="seagochen"),
)
_SAME = {"stae": "automan000", "satflow": "holmdk"}
"""Published modules that are written like another."""

DIALECTS = {row.name: row for row in _TABLE}
DIALECTS |= {name: replace(DIALECTS[other], name=name) for name, other in _SAME.items()}
"""The published modules whose weights are read and written."""
