"""Cells of modules that nobody has described, by the shapes of their convolutions: all that they may be."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations, product
from typing import Any, NamedTuple

import numpy as np

from fastclstm.adapters import torch_ops
from fastclstm.adapters.torch_cells import Arrangement
from fastclstm.nn import activations
from fastclstm.nn.normalization import Normalization
from fastclstm.spec import CELL_GATES

import torch  # isort: skip
from torch import Tensor  # isort: skip

nn = torch.nn
_MOST = 8
"""Convolutions that a cell may have: one of x and one of h for each of four gates."""
_OPERATIONS = {"lstm": "convlstm2d", "gru": "convgru2d", "rnn": "convrnn2d"}
_ACTIVATIONS = ("tanh", "relu")
_FUNCTIONS = [
    dict(zip(("activation", "output_activation", "recurrent_activation"), names.split(), strict=True))
    for names in (
        "tanh tanh sigmoid", "relu relu sigmoid", "relu tanh sigmoid", "tanh tanh hard_sigmoid", "elu elu sigmoid",
        "sigmoid sigmoid sigmoid", "linear tanh sigmoid", "linear linear sigmoid", "tanh linear sigmoid",
    )
]  # fmt: skip
"""What a ConvLSTM whose step is seen may apply to g, to the new cell state, and to the other gates."""
_FORGET_BIASES = 0.0, 1.0
_PLACES = 2000
"""Of how many values of a step it is seen whether they agree."""


class _Convolution(NamedTuple):
    name: str
    module: Any
    norms: list[tuple[str, Any]]
    """What normalizes its outputs, at most one."""

    @property
    def outputs(self) -> int:
        return int(self.module.out_channels)

    @property
    def inputs(self) -> int:
        return int(self.module.in_channels)

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.module.kernel_size, self.module.dilation, self.module.padding_mode


def decompositions(module: torch.nn.Module) -> Iterator[list[tuple[str, list[Arrangement]]]]:
    """Yield lists of a module's cells that have all its parameters: of each its place and all that it may be.

    First that of the module as one cell, then that of the cells in it.
    """
    if own := arrangements(module, ""):
        yield [("", own)]
    inner = _within(module, "", set())
    if inner:
        yield inner


def _within(module: torch.nn.Module, prefix: str, seen: set[int]) -> list[tuple[str, list[Arrangement]]] | None:
    """Return the cells that are parts of a module; None where there are other parameters."""
    if any(parameter is not None for parameter in module._parameters.values()):
        return None
    found: list[tuple[str, list[Arrangement]]] = []
    for name, child in module.named_children():
        if id(child) in seen or not any(True for _ in child.parameters()):
            continue
        seen.add(id(child))
        place = f"{prefix}.{name}".lstrip(".")
        own = [] if isinstance(child, nn.ModuleList | nn.ModuleDict) else arrangements(child, place)
        inner = [(place, own)] if own else _within(child, place, seen)
        if not inner:
            return None
        found += inner
    return found


def arrangements(module: torch.nn.Module, place: str) -> list[Arrangement]:
    """Return every cell that a module's convolutions may be."""
    convolutions = [] if isinstance(module, nn.Conv2d) else _convolutions(module)
    found: list[Arrangement] = []
    filters = dict.fromkeys(c.outputs // k for c in convolutions for k in range(1, 5) if c.outputs % k == 0)
    for cell, F in product(_OPERATIONS, filters):
        inputs = dict.fromkeys(n for c in convolutions for n in (c.inputs - F, c.inputs) if n > 0)
        peepholes = _peepholes(module, F) if cell == "lstm" else [()]
        for C in inputs:
            for joint, of_x, of_h in _roles(convolutions, len(CELL_GATES[cell]), C, F):
                found += _meant(cell, place, convolutions, (joint, of_x, of_h), C, peepholes)
    return list(dict.fromkeys(found))


def frame_of(module: torch.nn.Module) -> tuple[int, int] | None:
    """Return the size of the frames that a module has parameters for, of its own or in it; or None."""
    return frame_for(parameter for _, parameter in _others(module))


def frame_for(tensors: Iterable[Tensor]) -> tuple[int, int] | None:
    """Return the size of the frames that weights of pixels are for; None where they are for any."""
    sizes = (tensor.shape[-2:] for tensor in tensors if tensor.dim() >= 3)
    return next(((H, W) for H, W in sizes if (H, W) != (1, 1)), None)


def _others(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters that are of no layer of PyTorch's, by their names."""
    return [(f"{name}.{key}".lstrip("."), parameter) for name, part in module.named_modules() if not _is_layer(part)
            for key, parameter in part._parameters.items() if parameter is not None]  # fmt: skip


def _is_layer(part: torch.nn.Module) -> bool:
    return isinstance(part, nn.Conv2d) or type(part).__module__.startswith("torch.")


def _peepholes(module: torch.nn.Module, F: int) -> list[tuple[tuple[str, str, int, int, bool, bool], ...]]:
    """Return which of a module's parameters may be weights of c in the gates i, f and o; none at all first."""
    others = [(name, tensor.shape) for name, tensor in _others(module) if tensor.dim() in (3, 4)]
    found: list[Any] = [()]
    for start, (name, shape) in enumerate(others):
        three = others[start : start + 3]
        if shape[-3] == 3 * F and shape[:-3] in ((), (1,)):
            found += [tuple((gate, name, part, 3, False, False) for gate, part in zip("ifo", parts, strict=True))
                      for parts in permutations(range(3))]  # fmt: skip
        if shape[-3] == F and shape[:-3] in ((), (1,)) and [one for _, one in three] == [shape] * 3:
            found += [tuple((gate, one, 0, 1, False, False) for gate, (one, _) in zip("ifo", turned, strict=True))
                      for turned in permutations(three)]  # fmt: skip
    return found


class Agreement(NamedTuple):
    """What weights do not tell of a ConvLSTM, and a step of it does."""

    meant: Arrangement
    """One of those that were tried, in whatever order."""
    order: tuple[int, ...]
    functions: dict[str, str]
    forget_bias: float

    def of(self, cell: Arrangement) -> Arrangement:
        """Return a cell that is alike."""
        options = torch_ops.changed(cell.options, **self.functions)
        return cell._replace(order=self.order, options=options, forget_bias=self.forget_bias)


def agreeing(cell: torch.nn.Module, meanings: Iterable[Arrangement], x: Tensor, states: Sequence[Tensor],
             values: list[Tensor], tolerance: float) -> Iterator[Agreement]:  # fmt: skip
    """Yield the ConvLSTMs whose next h is among the values that a cell returned for x and the states h and c.

    Orders of gates and activations are tried on the pre-activations that the cell's own convolutions make: hundreds in
    the time in which a few cells are computed.
    """
    h = states[0]
    places = np.random.default_rng(0).integers(states[1].numel(), size=_PLACES)  # all that follows is elementwise
    before = _at(places, states[1])
    bounds = [(_at(places, value), tolerance * float(value.abs().max())) for value in values if value.shape == h.shape]
    kinds = {meant._replace(order=(), options=""): meant for meant in meanings if meant.channels == x.shape[1]}
    for meant in kinds.values():
        gates = [_at(places, gate) for gate in _gates(cell, meant, x, h) or []]
        weights = {gate: _at(places, one.expand_as(h)) for gate, one in meant.alone().hadamard(cell).items()}
        of_i, of_f, of_o = (weights.get(gate) for gate in "ifo")
        for functions, bias in product(_FUNCTIONS, _FORGET_BIASES) if gates else ():
            activation, output, recurrent = (activations.get(name).forward for name in functions.values())
            opened, let = ([recurrent(_seeing(z, one, before)) for z in gates] for one in (None, of_i))
            activated = [activation(z) for z in gates]
            kept = [recurrent(_seeing(z + bias, of_f, before)) * before for z in gates]
            for i, f, g, o in permutations(range(4)):
                c = kept[f] + let[i] * activated[g]
                gate = opened[o] if of_o is None else recurrent(_seeing(gates[o], of_o, c))
                y = gate * output(c)
                if any(np.abs(y - value).max() <= bound for value, bound in bounds):
                    yield Agreement(meant, (i, f, g, o), functions, bias)


def _at(places: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Return some of a tensor's values."""
    array: np.ndarray = tensor.detach().reshape(-1).numpy()[places]
    return array


def _seeing(z: np.ndarray, weight: np.ndarray | None, c: np.ndarray) -> np.ndarray:
    """Return a gate's pre-activation with its peephole."""
    return z if weight is None else z + weight * c


def alike(cells: list[list[Arrangement]]) -> list[tuple[Arrangement, ...]]:
    """Return what several cells may be if all of them are of one kind."""

    def kind(meant: Arrangement) -> Any:
        options = json.loads(meant.options)
        told = options["activation"], options.get("reset_after")
        return meant._replace(place="", channels=0, biases=(), options=""), told

    others = [{kind(meant): meant for meant in reversed(one)} for one in cells[1:]]
    return [(first, *(one[kind(first)] for one in others)) for first in cells[0]
            if all(kind(first) in one for one in others)]  # fmt: skip


def _gates(cell: torch.nn.Module, meant: Arrangement, x: Tensor, h: Tensor) -> list[Tensor] | None:
    """Return the pre-activations of a cell in its own order of gates, None where its convolutions take other sizes."""
    both = torch.cat([h, x] if meant.hidden_first else [x, h], 1)
    norms = [cell.get_submodule(name.rpartition(".")[0]) for _, names in meant.norms[:1] for name in names]
    parts = []
    for names, alone in ((meant.x, x), (meant.h, h)):
        convolutions = [cell.get_submodule(name) for name in names]
        if any(c.in_channels not in (both.shape[1], alone.shape[1]) for c in convolutions):
            return None
        inputs = [alone if c.in_channels == alone.shape[1] else both for c in convolutions]
        parts.append([_convolved(c, one) for c, one in zip(convolutions, inputs, strict=True)])
    if meant.x == meant.h:
        made = [norm(z) for norm, z in zip(norms, parts[0], strict=True)] if norms else parts[0]
        together = torch.cat(made, 1)
    else:
        together = torch.cat(parts[0], 1) + torch.cat(parts[1], 1)
        together = norms[0](together) if norms else together
    return [*together.chunk(4, 1)]


def _convolved(conv: Any, x: Tensor) -> Tensor:
    """Convolve to a frame of the same size, wherever the module pads."""
    across, along = ((k - 1) * d // 2 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    mode = {"zeros": "constant"}.get(conv.padding_mode, conv.padding_mode)
    padded = nn.functional.pad(x, (along, along, across, across), mode)
    return nn.functional.conv2d(padded, conv.weight, conv.bias, dilation=conv.dilation)


def _convolutions(module: torch.nn.Module) -> list[_Convolution]:
    """Return a module's convolutions in their order, none where it has other layers with parameters."""
    found: list[_Convolution] = []
    for name, part in module.named_modules():
        parametrized = "parametrizations" in name.split(".") or not _is_layer(part)
        if isinstance(part, nn.Conv2d):
            if not _keeps_frames(part):
                return []
            found.append(_Convolution(name, part, []))
        elif isinstance(part, nn.GroupNorm | nn.BatchNorm2d):
            last = found[-1] if found else None
            channels = part.num_channels if isinstance(part, nn.GroupNorm) else part.num_features
            if last is None or last.norms or channels != last.outputs or part.weight is None:
                return []
            last.norms.append((name, part))
        elif not parametrized and any(parameter is not None for parameter in part._parameters.values()):
            return []
    return found if len(found) <= _MOST else []


def unknown(module: torch.nn.Module) -> str:
    """Say what a module has that no cell has that is known by its shapes; "" where its cells may be modules in it."""
    if any(child is not module and arrangements(child, "") for child in module.modules()):
        return ""
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d) and not _keeps_frames(part):
            return (f"its convolution {name} has strides, groups or an even kernel, or pads otherwise: one that keeps "
                    "frames' size would be known")  # fmt: skip
        own = [key for key, parameter in part._parameters.items() if parameter is not None]
        if own and _is_layer(part) and not isinstance(part, nn.Conv2d | nn.GroupNorm | nn.BatchNorm2d):
            return (f"{f'{name}.{own[0]}'.lstrip('.')} is of no Conv2d, GroupNorm or BatchNorm2d: such a cell is known "
                    "by names alone, as of dialects=[…]")  # fmt: skip
    if any(isinstance(part, nn.Conv2d) for part in module.modules()):
        return ("its convolutions have not the numbers of channels of one cell's gates; the cell as a module of its "
                "own, called with x and its states, would be known")  # fmt: skip
    return ""


def _keeps_frames(conv: Any) -> bool:
    """Whether a convolution makes frames of the same size, as ours of h does, or would after padding apart from it."""
    reached = tuple((k - 1) * d for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    same = conv.padding == "same" or tuple(2 * p for p in conv.padding) == reached or conv.padding == (0, 0)
    odd = all(n % 2 == 0 for n in reached)
    return conv.groups == 1 and conv.stride == (1, 1) and same and odd and conv.padding_mode in ("zeros", "circular")


def _roles(convolutions: list[_Convolution], G: int, C: int, F: int) -> Iterator[tuple[Any, Any, Any]]:
    """Yield which convolutions are of x and h together, of x, and of h, so that each gate has what it needs."""
    joint = [c for c in convolutions if c.inputs == C + F]
    rest = [c for c in convolutions if c.inputs != C + F]
    if any(c.outputs % F for c in convolutions) or any(c.inputs not in (C, F) for c in rest):
        return
    if C == F:  # shapes do not tell
        half = len(rest) // 2
        halves, turns = (rest[:half], rest[half:]), (rest[::2], rest[1::2])
        splits = [halves, halves[::-1], turns, turns[::-1]] if rest else [([], [])]
    else:
        splits = [([c for c in rest if c.inputs == C], [c for c in rest if c.inputs == F])]
    for of_x, of_h in splits:
        widths = [[c.outputs for c in part] for part in (of_x, of_h)]
        geometries = [{c.geometry for c in (*joint, *part)} for part in (of_x, of_h)]
        if widths[0] == widths[1] and all(len(one) == 1 for one in geometries) \
                and sum(c.outputs for c in joint) + sum(widths[0]) == G * F:  # fmt: skip
            yield joint, of_x, of_h


def _meant(cell: str, place: str, convolutions: list[_Convolution], roles: Any, C: int,
           peepholes: list[Any]) -> Iterator[Arrangement]:  # fmt: skip
    """Yield the cells of a kind that differ in the order of gates, in signs, and in what their weights do not tell."""
    joint, of_x, of_h = roles
    x, h = [*joint, *of_x], [*joint, *of_h]
    G = len(CELL_GATES[cell])
    biases = tuple(c.name for c in (*x, *of_h) if c.module.bias is not None)
    normalization, epsilon = None, None
    norms: tuple[tuple[str, tuple[str, ...]], ...] = ()
    normed = [c for c in convolutions if c.norms]
    if normed:
        width = sum(c.outputs for c in x)
        each, summed = normed == joint and not of_x, not joint and [c.outputs for c in normed] == [width]
        if not (each or summed):
            return
        normalization, epsilon = _normalization([c.norms[0][1] for c in normed], width)
        if normalization is None and epsilon is None:
            return
        names = {"gamma": "weight", "beta": "bias"}
        names |= {} if epsilon is None else {"moving_mean": "running_mean", "moving_variance": "running_var"}
        norms = tuple((ours, tuple(f"{c.norms[0][0]}.{theirs}" for c in normed)) for ours, theirs in names.items())
    further = [f"normalization_weights.{name}" for name, _ in norms] if normalization is not None else []
    geometry = {"dilation": list(x[0].module.dilation), "recurrent_dilation": list(h[0].module.dilation),
                "padding_mode": x[0].module.padding_mode}  # fmt: skip
    resets = {"gru": (True, False) if of_x else (False,)}.get(cell, (None,))
    signs = (True, False) if cell == "gru" else (False,)
    sides = (False, True) if joint else (False,)
    for hidden_first, activation, reset, negated, seen, order in product(
        sides, _ACTIVATIONS, resets, signs, peepholes, permutations(range(G))
    ):
        own = {} if reset is None else {"reset_after": reset}
        named = [f"peephole.{gate}" for gate, *_ in seen] + further
        yield Arrangement(
            _OPERATIONS[cell], place, tuple(c.name for c in x), tuple(c.name for c in h), C, order, biases,
            both=bool(reset), negated=negated, peepholes=seen, norms=norms, epsilon=epsilon,
            options=torch_ops.encode(named, normalization, activation=activation, **geometry, **own),
            hidden_first=hidden_first,
        )  # fmt: skip


def _normalization(norms: list[Any], width: int) -> tuple[Normalization | None, float | None]:
    """Return the one normalization that several are, or a batch normalization's epsilon; None twice for neither."""
    if len({(type(norm), norm.eps) for norm in norms}) > 1:
        return None, None
    if isinstance(norms[0], nn.BatchNorm2d):
        return None, norms[0].eps if norms[0].track_running_stats else None
    sizes = {norm.num_channels // norm.num_groups for norm in norms}
    groups = width // sizes.pop()
    return (None, None) if sizes else (Normalization("group", groups=groups, epsilon=norms[0].eps), None)
