"""Modules of a user's own whose calls our kernels answer: how, of what they are made, and what they return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from fastclstm.adapters import torch_ops
from fastclstm.adapters.torch_cells import Arrangement
from fastclstm.adapters.torch_forms import found_in
from fastclstm.adapters.torch_layers import dtypes

import torch  # isort: skip
from torch import Tensor  # isort: skip

SMALL = {
    ("convlstm2d", True): 80e6,
    ("convgru2d", True): 350e6,
    ("convgru2d", False): 100e6,
    ("convrnn2d", True): 350e6,
    ("convrnn2d", False): 100e6,
}
"""Of operations, as cells that are called step by step or over sequences: how many products a call has for each of
PyTorch's threads where our kernels have caught up with what calling them takes (measured on two threads, Zen 4). Calls
of fewer are the module's own."""
LAYOUTS = (0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (0, 2, 1, 3, 4), (0, 1, 4, 2, 3)
"""Where a module's x has batch, time, channels, height and width."""


class Plan(NamedTuple):
    """How a module's call is answered."""

    dialect: str
    cells: tuple[Arrangement, ...]
    bidirectional: bool
    steps: bool
    """Whether the module is a single cell, called step by step."""
    layout: tuple[int, ...]
    """Of `LAYOUTS`."""
    forms: tuple[Any, ...]
    """The arguments that it may have: tuples of `X`, of states' numbers, or of tuples of such."""
    names: tuple[str, ...]
    """The names of the arguments that are answered."""
    recipe: Any = None
    """What is returned: a pair of a container and its items, or of a view of the outputs and a cell's number."""
    gradients: bool = False
    """Whether gradients are the module's own; else, where they are asked for, it computes itself."""
    training: bool = False
    """The same of a module in training mode."""
    products: int = 0
    """That a call has for each pixel of each frame."""
    first: tuple[tuple[int, ...], ...] = ()
    """Of each cell which of its output and its states are wanted with their channels first, and in no other way."""
    parts: tuple[Any, ...] = ()
    """What was in the module when it was compared, as of `parts_of`; where that has changed it computes itself."""
    settings: tuple[tuple[tuple[tuple[str, ...], str], Any], ...] = ()
    """The same of what `settings_of` told and calls do not change."""


_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "num_groups", "eps", "p")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


_SETTINGS = bool, int, float, str, type(None)
OF_EVERY_MODULE = frozenset(torch.nn.Module().__dict__)
"""Names of the attributes that every module has, whatever it computes."""


def is_hooked(module: torch.nn.Module) -> bool:
    """Whether something is called with a module's forward or backward."""
    return any(map(module.__dict__.get, _HOOKS))


def parts_of(module: torch.nn.Module) -> tuple[Any, ...]:
    """Return what must stay as it is in a module beside parameters' values: its parts, and whether they have hooks."""
    found: list[Any] = []
    for name, child in module._modules.items():
        if child is not None:
            found += [name, type(child), child._parameters.get("bias") is None and child.__dict__.get("bias") is None,
                      is_hooked(child)]  # fmt: skip
            found += map(child.__dict__.get, _GEOMETRY)
            if child._modules:
                found += [parts_of(child)]
    return tuple(found)


def settings_of(module: torch.nn.Module) -> dict[tuple[tuple[str, ...], str], Any]:
    """Return the values of plain attributes of a module and of those within it, by places and names."""
    found: dict[tuple[tuple[str, ...], str], Any] = {}
    for place, part in module.named_modules():
        kinds = [kind for kind in type(part).__mro__ if kind is not Accelerated and not _is_of_torch(kind)]
        for own in (*map(vars, reversed(kinds)), vars(part)) if kinds else ():
            for name, value in own.items():
                if isinstance(value, _SETTINGS) and name not in OF_EVERY_MODULE and not name.startswith("__"):
                    found[tuple(place.split(".")) if place else (), name] = value
    return found


def is_as_compared(module: torch.nn.Module, plan: Plan) -> bool:
    """Whether a module has the parts and settings that it had when its plan was made."""
    for (place, name), value in plan.settings:
        part: Any = module
        for key in place:
            part = part._modules.get(key)
        if getattr(part, name, None) != value:
            return False
    return plan.parts == parts_of(module)


def _is_of_torch(kind: type) -> bool:
    return kind is object or kind.__module__.startswith("torch.")


class Results(NamedTuple):
    """Of every cell the output over the sequence and the last states, channels-last, and how to write them."""

    outputs: list[tuple[Tensor, ...]]
    dtype: Any
    """Of what is returned."""
    first: tuple[tuple[int, ...], ...] = ()
    """Of each cell which of them have their channels first already: see `Plan.first`."""


def _own(results: Results, cell: int, which: int) -> Tensor:
    """Return what a module does of a cell: its output or one of its states."""
    tensor = results.outputs[cell][which]
    turned = bool(results.first) and which in results.first[cell]
    return tensor.to(results.dtype) if turned else _first(tensor, results)


def _sequence(results: Results, cell: int) -> Tensor:
    return _own(results, cell, 0)


def _time_first(results: Results, cell: int) -> Tensor:
    return _first(results.outputs[cell][0].transpose(0, 1), results)


def _time_third(results: Results, cell: int) -> Tensor:
    return torch_ops.contiguous(results.outputs[cell][0].movedim(-1, 1)).to(results.dtype)


def _both(results: Results, turned: bool) -> Tensor:
    """Both directions' outputs; `turned`: the second one's in the order of the first."""
    forward, backward = (output[0] for output in results.outputs[:2])
    return _first(torch.cat([forward, backward.flip(1) if turned else backward], -1), results)


def _wide(results: Results, which: int) -> Tensor:
    """Both directions' states, side by side on the width."""
    return _first(torch.cat([output[which] for output in results.outputs[:2]], 2), results)


def _stacked(results: Results, which: int) -> Tensor:
    """All cells' states, on a new first axis."""
    return torch.stack([_first(output[which], results) for output in results.outputs])


def _first(tensor: Tensor, results: Results) -> Tensor:
    return torch_ops.contiguous(tensor.movedim(-1, -3)).to(results.dtype)


VIEWS: dict[str, Callable[[Results, int], Any]] = {
    "h": lambda results, cell: _own(results, cell, 1),
    "c": lambda results, cell: _own(results, cell, 2),
    "sequence": _sequence,
    "sequence, time first": _time_first,
    "sequence, time third": _time_third,
    "sequence, channels last": lambda results, cell: results.outputs[cell][0].to(results.dtype).contiguous(),
    "frames": lambda results, cell: _sequence(results, cell).flatten(0, 1),
    "turned": lambda results, cell: _first(results.outputs[cell][0].flip(1), results),
    "last step": lambda results, cell: _sequence(results, cell)[:, -1:],
    "both": lambda results, cell: _both(results, True),
    "both, second not turned": lambda results, cell: _both(results, False),
    "both, last step": lambda results, cell: _both(results, True)[:, -1:],
    "wide h": lambda results, cell: _wide(results, 1),
    "wide c": lambda results, cell: _wide(results, 2),
    "stacked h": lambda results, cell: _stacked(results, 1),
    "stacked c": lambda results, cell: _stacked(results, 2),
    "list of steps": lambda results, cell: [*_time_first(results, cell).unbind(0)],
    "tuple of steps": lambda results, cell: _time_first(results, cell).unbind(0),
}
"""What a module may return, of a cell or of both directions."""
_FIRST = {"sequence": 0, "frames": 0, "last step": 0, "h": 1, "c": 2}
"""The views that are one of an operator's results with its channels first."""


def returned(recipe: Any, results: Results) -> Any:
    """Return what a recipe of a plan's makes of results."""
    kind, of = recipe
    if kind == "none":
        return None
    if kind == "list":
        return [returned(item, results) for item in of]
    if kind == "dict":
        return {key: returned(item, results) for key, item in of}
    if kind == "tuple":
        return tuple([returned(item, results) for item in of])
    return VIEWS[kind](results, of)


def first_of(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """Return the `first` of a plan with a recipe."""
    found: list[set[int]] = [set() for _ in plan.cells]
    rest = [plan.recipe]
    while rest:
        kind, of = rest.pop()
        if kind in ("list", "tuple"):
            rest += of
        elif kind == "dict":
            rest += [item for _, item in of]
        elif kind not in _FIRST and kind != "none":
            return ()
        elif kind != "none" and (_FIRST[kind] or plan.bidirectional or of == len(plan.cells) - 1):
            found[of].add(_FIRST[kind])
    return tuple(map(tuple, found))


def computed(module: torch.nn.Module, plan: Plan, x: Tensor, states: Sequence[Tensor]) -> Results:
    """Run a module's cells over its x, of a cell alone (B, C, H, W); no states are zeros."""
    weights = [cell.weights(module) for cell in plan.cells]
    result, inside = dtypes("accelerate", x, weights[0].tensors[0])
    b, t, c, h, w = plan.layout
    sequence = x.permute(0, 2, 3, 1)[:, None] if plan.steps else x.permute(b, t, h, w, c)
    sequence, outputs = sequence.to(inside), []
    given = iter([state.to(inside).movedim(1, -1) for state in states])
    for index, cell in enumerate(plan.cells):
        before = [next(given, None) for _ in cell.operator.states]
        outputs.append(cell.operator(sequence, weights[index], before, cell.options,
                                     go_backwards=plan.bidirectional and index == 1, return_sequences=not plan.steps,
                                     first=plan.first[index] if plan.first else ()))  # fmt: skip
        sequence = sequence if plan.bidirectional else outputs[-1][0]
    return Results(outputs, result, plan.first)


def _is_small(plan: Plan, x: Tensor) -> bool:
    """Whether a call is of `SMALL`; what is exported serves all sizes, and would be bound to those of one side."""
    least = SMALL.get((plan.cells[0].operation, plan.steps), 0)
    if not least or not x.is_cpu or torch_ops.is_exporting():
        return False
    threads = 1 if torch.compiler.is_compiling() else torch.get_num_threads()
    return plan.products * x.numel() < least * threads * plan.cells[0].channels


class Accelerated:
    """The first base of a module's new class: ``forward`` by our kernels, where the comparison has covered the call."""

    fastclstm_plan: Plan
    training: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module itself returns."""
        plan = self.fastclstm_plan
        given = self._covered(plan, args, kwargs)
        if given is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return returned(plan.recipe, computed(self, plan, *given))

    def _covered(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return x and the states, or None for a call that is the module's own."""
        named = dict(zip(plan.names, args, strict=False)) | kwargs
        if len(args) > len(plan.names) and any(argument is not None for argument in args[len(plan.names) :]):
            return None
        if any(value is not None for name, value in named.items() if name not in plan.names):
            return None
        given = [named.get(name) for name in plan.names]
        while given and given[-1] is None:
            given.pop()
        axes = 4 if plan.steps else 5
        found = next((one for form in plan.forms if (one := found_in(form, given, axes)) is not None), None)
        if found is None:
            return None
        x, states = found
        if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():  # for where our operators are not known
            return None
        B = x.shape[0] if plan.steps else x.shape[plan.layout[0]]
        if any(state.shape[0] != B for state in states):  # states that are spread
            return None
        if (self.training and not plan.training) or (torch.is_grad_enabled() and not plan.gradients):
            return None
        if _is_small(plan, x):
            return None
        if not is_as_compared(self, plan):
            return None
        return found

    def __reduce__(self) -> Any:
        return _unpickled, (type(self).__mro__[2],), self.__dict__


@cache
def accelerated(cls: Any) -> Any:
    """Return the subclass of a module's class whose forward is ours, with the signature of its own."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return Accelerated.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    members = {"__module__": cls.__module__, "forward": forward}
    return type(f"Accelerated{cls.__name__}", (Accelerated, cls), members)


def _unpickled(cls: Any) -> Any:
    made = accelerated(cls)
    return made.__new__(made)
