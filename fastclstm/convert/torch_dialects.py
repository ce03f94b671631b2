"""The dialects of PyTorch's ConvLSTMs, one row each, and how a row turns a cell's weights into ours and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations
from typing import Any

import numpy as np

from fastclstm.layers import ConvLSTM2D
from fastclstm.nn.normalization import Normalization
from fastclstm.nn.normalization import get as get_normalization
from fastclstm.spec import NORMALIZED_PARTS, PEEPHOLE_GATES, ConvSpec

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
        Where the cells are: a place with {layer} or {direction} in it, to be found after any prefix, or the places of
        all layers, one by one.
    joint : str, optional
        The convolution of x and h together, its input channels x's, then h's. Either this or `split`.
    split : (str, str), optional
        The convolution of x and that of h, whose results are added.
    gates : str
        The order of the gates' blocks: the letters i, f, g (or c) and o.
    biases : str
        Which convolutions of `split` may have a bias: "xh", "x", "h" or "".
    peephole : (str, str, str), optional
        The weights that i, f and o see of the cell state: a name ending in ".weight" is that of a convolution, which
        may have a bias; any other is of an array (1, F, H, W), or (1, F, 1, 1). A name that stands twice holds its
        gates' blocks one after another.
    normalization : str or Normalization, optional
        Of the pre-activations, its groups and epsilon included.
    norms : sequence of str
        The modules that normalize: one of the convolutions' sum, or that of x's and that of h's.
    norms_optional : bool
        Modules without them are of the dialect too.
    directions : sequence of str
        What {direction} may be: the cell that goes forward, then the one that goes backward.
    unused : sequence of str
        Further names in a cell, of weights that the module never uses.
    untrained : sequence of str
        Further names in a cell, of normalizations that the module uses only where it computes what no ConvLSTM2D can:
        they must hold ones and zeros.
    refused : sequence of str
        Names that only such modules have.
    refusal : str
        What such modules compute.
    beside : sequence of str
        Names beside the cells, of what carries no weights.
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
    peephole: tuple[str, str, str] | None = None
    normalization: Any = None
    norms: tuple[str, ...] = ()
    norms_optional: bool = False
    directions: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    refusal: str = ""
    beside: tuple[str, ...] = ()
    name: str = "your own"

    def __post_init__(self) -> None:
        for name in ("cells", "split", "peephole", "norms", "directions", "unused", "untrained", "refused", "beside"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        places = (self.cells,) if isinstance(self.cells, str) else self.cells
        if not (isinstance(places, tuple) and places and all(isinstance(place, str) for place in places)):
            raise ValueError(
                f"Dialect: cells must be the place of the cells or a sequence of places, got {self.cells!r}"
            )
        if (self.joint is None) == (self.split is None):
            raise ValueError("Dialect: give either joint='name' of the one convolution or split=('of x', 'of h')")
        if not isinstance(self.gates, str) or sorted(self.gates.replace("c", "g")) != sorted(GATES):
            raise ValueError(f"Dialect: gates must be an order of the letters i, f, g (or c) and o, got {self.gates!r}")
        if self.split is not None and len(self.split) != 2:
            raise ValueError(f"Dialect: split must be two names, of x's convolution and of h's, got {self.split!r}")
        if self.peephole is not None and len(self.peephole) != 3:
            raise ValueError(f"Dialect: peephole must be three names, for the gates i, f and o, got {self.peephole!r}")
        if self.normalization is not None:
            object.__setattr__(self, "normalization", get_normalization(self.normalization))
            expected = len(self._parts)
            if len(self.norms) != expected:
                raise ValueError(
                    f"Dialect: norms must name {expected} module(s) of the normalization, got {self.norms!r}"
                )
            if self._mixing and self.gates != GATES:
                raise ValueError(f"Dialect: groups={self.normalization.groups} mixes gates, which another order than "
                                 f"{GATES!r} would mix otherwise: no ConvLSTM2D computes that")  # fmt: skip

    @property
    def _mixing(self) -> bool:
        """Whether groups of channels are normalized that have a part of several gates."""
        return self.normalization is not None and self.normalization.kind == "group" \
            and (self.normalization.groups or 4) % 4 != 0 and self.normalization.groups != 1  # fmt: skip

    def reordered(self) -> Iterator[Dialect]:
        """Yield the dialects that differ in the order of the gates alone, where names do not tell it."""
        named = any("{gate}" in convolution for convolution in (self.joint, *(self.split or ())) if convolution)
        for order in permutations(GATES) if not (named or self._mixing) else ():
            yield replace(self, gates="".join(order))

    # Names

    @property
    def required(self) -> tuple[str, ...]:
        """Names that every cell has."""
        weights = [f"{conv}.weight" for conv in self._convolutions()]
        return (*weights, *dict.fromkeys(self.peephole or ()), *(() if self.norms_optional else self._norm_names()))

    @property
    def optional(self) -> tuple[str, ...]:
        """Names that a cell may have and that matter."""
        norms = self._norm_names() if self.norms_optional else ()
        return (*self._bias_names(), *norms, *self.untrained, *self.refused)

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names that a cell may have and that do not matter."""
        return (*self.unused, *self._counters())

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
            place = self.cells.format(layer=layer, direction=(*self.directions, "", "")[direction])
        return f"{place}." if place else ""

    def _spelled(self, convolution: str) -> list[str]:
        """Return the names of a convolution, or of the four that it stands for."""
        return [convolution.replace("{gate}", g) for g in self.gates] if "{gate}" in convolution else [convolution]

    def _convolutions(self, parts: str = "xh") -> list[str]:
        named = (self.joint,) if self.split is None else (self.split["xh".index(part)] for part in parts)
        return [name for conv in named if conv is not None for name in self._spelled(conv)]

    def _bias_names(self) -> tuple[str, ...]:
        biases = [f"{conv}.bias" for conv in self._convolutions(self.biases)]
        return (*biases, *(name.removesuffix("weight") + "bias" for name in dict.fromkeys(self.peephole or ())
                           if name.endswith(".weight")))  # fmt: skip

    @property
    def _parts(self) -> tuple[str, ...]:
        return () if self.normalization is None else NORMALIZED_PARTS[self.normalization.separate]

    def _norm_parameters(self) -> Iterator[tuple[str, str]]:
        """Yield our name of each of the normalization's parameters and theirs."""
        names = {"gamma": "weight", "beta": "bias"}
        if self._parts and self.normalization.kind == "batch":
            names |= {"moving_mean": "running_mean", "moving_variance": "running_var"}
        for part, norm in zip(self._parts, self.norms, strict=True):
            yield from ((f"{ours}{part}", f"{norm}.{theirs}") for ours, theirs in names.items())

    def _norm_names(self) -> tuple[str, ...]:
        return tuple(theirs for _, theirs in self._norm_parameters())

    def _counters(self) -> tuple[str, ...]:
        batch = self._parts and self.normalization.kind == "batch"
        return tuple(f"{norm}.num_batches_tracked" for norm in self.norms) if batch else ()

    # One cell's weights

    def read(self, where: str, cell: Arrays) -> tuple[Arrays, Options]:
        """Return a cell's parameters as `ConvLSTM2D` names them, and the options that go with them.

        Raises ValueError where its arrays, whose names stand after `where`, do not fit one another.
        """
        self._check_trained(cell)
        shapes = ", ".join(f"{where}{name} {array.shape}" for name, array in cell.items() if name not in self.ignored)
        try:
            named, options = self._read(cell)
            KH, KW, C, width = named["kernel"].shape
            fits = C > 0 and width % 4 == 0 and named["recurrent_kernel"].shape == (KH, KW, width // 4, width)
        except (IndexError, KeyError) as error:
            raise ValueError(f"from_torch: a weight is missing or has too few axes ({error}): {shapes}") from error
        except ValueError as error:
            raise ValueError(f"from_torch: these shapes do not fit one another ({error}): {shapes}") from error
        if not fits:
            raise ValueError(f"from_torch: these shapes are none of a ConvLSTM: {shapes}")
        if KH % 2 == 0 or KW % 2 == 0:
            raise ValueError(f"from_torch: a {KH}×{KW} kernel padded by half of it does not keep the frame, so PyTorch "
                             f"cannot run this module either; kernels must be odd: {shapes}")  # fmt: skip
        return named, options

    def _read(self, cell: Arrays) -> tuple[Arrays, Options]:
        biased = any(name in cell for name in self._bias_names())
        if self.joint is not None:
            kernel = self._gathered(cell, self.joint, "weight")
            C = kernel.shape[2] - kernel.shape[3] // 4
            parameters = {"kernel": kernel[:, :, :C], "recurrent_kernel": kernel[:, :, C:]}
            biases = [self._gathered(cell, self.joint, "bias")] if biased else []
        else:
            assert self.split is not None
            x, h = self.split
            parameters = {"kernel": self._gathered(cell, x, "weight"),
                          "recurrent_kernel": self._gathered(cell, h, "weight")}  # fmt: skip
            biases = [self._gathered(cell, {"x": x, "h": h}[part], "bias") for part in self.biases if biased]
        if biases:
            parameters["bias"] = sum(biases[1:], biases[0])
        options: Options = {}
        for further, more in (self._read_peephole(cell, biased), self._read_norms(cell)):
            parameters |= further
            options |= more
        return parameters, options

    def write(self, cell: Arrays) -> Arrays:
        """Return the weights of a cell of the dialect's module, given ours by name."""
        named: Arrays = {}
        if self.joint is not None:
            convolutions = {self.joint: np.concatenate([cell["kernel"], cell["recurrent_kernel"]], 2)}
            biases = [self.joint]
        else:
            assert self.split is not None
            convolutions = dict(zip(self.split, (cell["kernel"], cell["recurrent_kernel"]), strict=True))
            biases = [self.split["xh".index(part)] for part in self.biases]
        for conv, kernel in convolutions.items():
            named |= self._scattered(conv, "weight", kernel)
        for number, conv in enumerate(biases if "bias" in cell else ()):
            named |= self._scattered(conv, "bias", np.zeros_like(cell["bias"]) if number else cell["bias"])
        named |= self._written_peephole(cell)
        for ours, theirs in self._norm_parameters():
            if ours in cell:
                named[theirs] = np.moveaxis(self._foreign(cell[ours]), -1, 0)
        return named | {name: np.zeros((), np.int64) for name in self._counters()}

    def _native(self, array: np.ndarray) -> np.ndarray:
        """Bring the gates on the last axis into our order."""
        blocks = dict(zip(self.gates.replace("c", "g"), np.split(array, 4, -1), strict=True))
        return np.concatenate([blocks[gate] for gate in GATES], -1)

    def _foreign(self, array: np.ndarray) -> np.ndarray:
        blocks = dict(zip(GATES, np.split(array, 4, -1), strict=True))
        return np.concatenate([blocks[gate] for gate in self.gates.replace("c", "g")], -1)

    def _gathered(self, cell: Arrays, convolution: str, kind: str) -> np.ndarray:
        """Return a convolution's kernel (KH, KW, inputs, 4F) or bias (4F,) in our order of gates."""
        arrays = [cell[f"{name}.{kind}"] for name in self._spelled(convolution)]
        return self._native(np.concatenate([_hwio(a) if kind == "weight" else a for a in arrays], -1))

    def _scattered(self, convolution: str, kind: str, array: np.ndarray) -> Arrays:
        names = self._spelled(convolution)
        parts = np.split(self._foreign(array), len(names), -1)
        return {f"{n}.{kind}": _oihw(a) if kind == "weight" else a for n, a in zip(names, parts, strict=True)}

    def _read_peephole(self, cell: Arrays, biased: bool) -> tuple[Arrays, Options]:
        parameters: Arrays = {}
        options: Options = {}
        for gate, name, part, parts in self._peepholes():
            array = cell[name]
            if name.endswith(".weight"):
                parameters[f"peephole_{gate}"] = np.split(_hwio(array), parts, -1)[part]
                if biased:
                    bias = cell[name.removesuffix("weight") + "bias"]
                    parameters[f"peephole_bias_{gate}"] = np.split(bias, parts)[part]
                options = {"peephole": "conv"}
                continue
            array = np.split(np.moveaxis(array.reshape(array.shape[-3:]), 0, -1), parts, -1)[part]
            HO, WO, _ = array.shape
            elementwise = (HO, WO) != (1, 1)
            parameters[f"peephole_{gate}"] = array if elementwise else array[0, 0]
            options = {"peephole": "elementwise", "frame_size": (HO, WO)} if elementwise else {"peephole": "channel"}
        return parameters, options

    def _written_peephole(self, cell: Arrays) -> Arrays:
        blocks: dict[str, list[np.ndarray]] = {}
        for gate, name, _, _ in self._peepholes():
            array = cell[f"peephole_{gate}"]
            if not name.endswith(".weight"):
                array = array.reshape((1,) * (4 - array.ndim) + array.shape)
            blocks.setdefault(name, []).append(array)
            if name.endswith(".weight") and "bias" in cell:
                blocks.setdefault(name.removesuffix("weight") + "bias", []).append(cell[f"peephole_bias_{gate}"])
        joined = {name: np.concatenate(arrays, -1) for name, arrays in blocks.items()}
        return {n: a if a.ndim == 1 else _oihw(a) if n.endswith(".weight") else np.moveaxis(a, -1, 1)
                for n, a in joined.items()}  # fmt: skip

    def _peepholes(self) -> Iterator[tuple[str, str, int, int]]:
        """Yield for each gate its weight's name, which of its blocks is the gate's, and how many there are."""
        names = self.peephole or ()
        for number, (gate, name) in enumerate(zip(PEEPHOLE_GATES, names, strict=False)):
            yield gate, name, names[:number].count(name), names.count(name)

    def _read_norms(self, cell: Arrays) -> tuple[Arrays, Options]:
        if self.normalization is None or (self.norms_optional and not set(self._norm_names()) & set(cell)):
            return {}, {}
        named = {ours: self._native(np.moveaxis(cell[theirs], 0, -1)) for ours, theirs in self._norm_parameters()}
        options: Options = {"normalization": self.normalization}
        if self.normalization.elementwise:
            HO, WO, _ = next(iter(named.values())).shape
            options["frame_size"] = (HO, WO)
        return named, options

    def _check_trained(self, cell: Mapping[str, np.ndarray]) -> None:
        """Raise ValueError where a cell's weights are those of a module that computes what no ConvLSTM2D can."""
        trained = [n for n in self.untrained if n in cell and np.any(cell[n] != float(n.endswith("weight")))]
        if wrong := dict.fromkeys(trained + [name for name in self.refused if name in cell]):
            raise ValueError(f"from_torch: {self.refusal}: no ConvLSTM2D can compute that ({', '.join(wrong)})")

    def expect(self, layer: ConvLSTM2D) -> None:
        """Raise ValueError where a layer has options that the dialect's module does not."""
        for name, values in self._allowed(layer).items():
            if getattr(layer, name) not in values:
                raise ValueError(f"to_torch: the dialect {self.name!r} has no {name}={getattr(layer, name)!r}; "
                                 f"it has {' or '.join(map(repr, values))}")  # fmt: skip
        for name, array in layer.parameters.items():
            if array.ndim == 4:
                kernel = layer.parameters[f"{name.rpartition('.')[0]}.kernel"]
                self._expect_convolution(layer, name, array.shape[:2], kernel.shape[:2])

    def _allowed(self, layer: ConvLSTM2D) -> dict[str, tuple[Any, ...]]:
        """Return which values of a layer's options the dialect can hold."""
        allowed: dict[str, tuple[Any, ...]] = {
            "stride": (1, (1, 1)),
            "dilation": (1, (1, 1)),
            "recurrent_dilation": (1, (1, 1)),
            "padding_mode": ("zeros",),
            "cell_clip": (None,),
            "activation": ("tanh",),
            "recurrent_activation": ("sigmoid",),
            "output_activation": (None, "tanh"),
            "go_backwards": (False,),
            "peephole": (None,),
            "bidirectional": (False, True) if self.directions else (False,),
            "normalization": (None, self.normalization) if self.norms_optional else (self.normalization,),
        }
        if self.peephole is not None:
            convolved = self.peephole[0].endswith(".weight")
            allowed["peephole"] = ("conv",) if convolved else ("elementwise", "channel")
        if not self._bias_names():
            allowed["use_bias"] = (False,)
        if self.directions:
            allowed["num_layers"] = (1,)
        if layer.bidirectional:
            allowed["merge_mode"] = ("concat", None)
        if layer.num_layers > 1:
            allowed["leaky_relu_slope"] = (None, 1)
        return allowed

    def _expect_convolution(self, layer: ConvLSTM2D, name: str, given: tuple[int, ...], size: tuple[int, ...]) -> None:
        """Raise ValueError unless a convolution has the kernel's size and keeps the frame."""
        KH, KW = size
        if given != size or KH % 2 == 0 or KW % 2 == 0:
            raise ValueError(f"to_torch: the dialect {self.name!r} has one odd kernel size for all of a cell's "
                             f"convolutions, got {name} of {given}, kernel of {size}")  # fmt: skip
        own, same = (
            ConvSpec.infer((1, KH, KW, 1), (KH, KW, 1, 1), strides=1, padding=padding, padding_mode="zeros", dilation=1)
            for padding in (layer.padding, "same")
        )
        if own.padding != same.padding:
            raise ValueError(f"to_torch: the dialect {self.name!r} keeps the frame (padding='same'), "
                             f"got {layer.padding!r}")  # fmt: skip


def _hwio(weight: np.ndarray) -> np.ndarray:
    return weight.transpose(2, 3, 1, 0)


def _oihw(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose(3, 2, 0, 1)


def _both(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{kind}" for name in names for kind in ("weight", "bias"))


DIALECTS = {
    row.name: row
    for row in (
        Dialect("cell_list.{layer}", joint="conv", gates="ifog", name="ndrplz"),
        Dialect(
            "cell_list.{layer}",
            joint="conv",
            gates="ifog",
            peephole=("conv_c.weight", "conv_c.weight", "conv_cnext.weight"),
            name="kl4805",
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
            untrained=_both(*(f"layer_norm_{name}" for name in ("x", "h", "cnext", "ci", "cf", "co"))),
            refused=("layer_norm_ci.weight",),
            refusal=(
                "these weights were trained with layer_norm=True or peephole=True, which in KimUyen's module "
                "normalizes the cell state, or leaves the peepholes' weights out of the state_dict"
            ),
            name="kimuyen",
        ),
    )
}
"""The published modules whose weights are read and written."""
