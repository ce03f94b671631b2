"""accelerate: our kernels in the ConvLSTMs of a user's model of PyTorch."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from fastclstm.adapters import torch_ops  # first: without PyTorch it says what to install
from fastclstm.adapters.report import Report
from fastclstm.adapters.torch_cells import Arrangement
from fastclstm.adapters.torch_layers import dtypes
from fastclstm.convert.torch_dialects import DIALECTS, Dialect
from fastclstm.convert.torch_recognition import Recognized, recognize

import torch  # isort: skip
from torch import Tensor  # isort: skip

_FRAME = (7, 6)
_B, _T = 2, 3
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
"""How far outputs and gradients may be from the module's own, as a share of their largest value."""


class Plan(NamedTuple):
    """How a module's call is answered."""

    dialect: str
    cells: tuple[Arrangement, ...]
    bidirectional: bool
    steps: bool
    """Whether the module is a single cell, called step by step."""
    batch_first: bool
    apart: bool
    """Of a cell: whether h and c are two arguments."""
    names: tuple[str, ...]
    """The names of the arguments that are answered."""
    recipe: Any
    """What is returned: a pair of a container and its items, or of a view of the outputs and a cell's number."""
    gradients: bool
    """Whether gradients are the module's own; else, where they are asked for, it computes itself."""
    training: bool
    """The same of a module in training mode."""


def accelerate(model: torch.nn.Module, *, dialects: Sequence[Dialect] = (), return_report: bool = False) -> Any:
    """Let our kernels compute the ConvLSTMs in a model, which stays what it is in every other way.

    A ConvLSTM is found by the names of its weights, as by `fastclstm.convert.torch.from_torch`. Then a copy of it with
    drawn weights and our kernels are called on a drawn input, and only where outputs and gradients agree the module's
    class becomes a subclass whose ``forward`` calls the kernels: the parameters are the same objects, the keys of the
    state_dict, the call, the structure of what it returns, attributes and ``isinstance`` are as before. Where a whole
    module is not of a known kind, its cells are tried, which are called step by step.

    A call that the comparison has not covered goes to the module's own ``forward``: with further arguments, such as
    initial states; in training mode where it has dropout or batch normalization; for gradients where the module's own
    are others (the published "seyongk" cuts them off). Hooks on a swapped module are called, those within it not: such
    a module is left. Results are contiguous; under autocast they are computed and returned in float32. What decides how
    a module is called and what it returns, such as its attribute batch_first, must be set before.

    Parameters
    ----------
    model : nn.Module
        Changed where it is.
    dialects : sequence of fastclstm.convert.torch.Dialect
        Of your own, beside the known ones.
    return_report : bool
        Return ``(model, report)``. The report is printed in any case.

    Returns
    -------
    nn.Module
        The model itself: ``accelerate(model).train()``.

    Raises
    ------
    TypeError
        A model that is none.

    Examples
    --------
    >>> import torch
    >>> model = accelerate(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3)))
    accelerate: no ConvLSTM of a known dialect was found
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    _visit(model, "", [*DIALECTS.values(), *dialects], report)
    print(report)
    return (model, report) if return_report else model


def _visit(module: torch.nn.Module, name: str, rows: list[Dialect], report: Report) -> None:
    """Swap a module, or else what is in it."""
    if isinstance(module, Accelerated):
        report.swapped[name] = f"{module.fastclstm_plan.dialect}: it was before"
        return
    kind: Any = type(module)
    for candidate in _candidates(module, rows):
        plan = _refusal(module) or _plan(module, candidate)
        if isinstance(plan, Plan):
            module.fastclstm_plan = plan
            module.__class__ = accelerated(kind)
            report.swapped[name] = _told(plan)
            report.left.pop(name, None)
            return
        report.left[name] = f"{candidate.row.name}: {plan}"
    for key, child in module.named_children():
        _visit(child, f"{name}.{key}".lstrip("."), rows, report)


def _told(plan: Plan) -> str:
    kind = "a cell, step by step" if plan.steps else "over whole sequences"
    if plan.training:
        return f"{plan.dialect}: {kind}"
    return f"{plan.dialect}: {kind}; {'in training mode' if plan.gradients else 'for gradients'} it computes itself"


class Candidate(NamedTuple):
    """A module that has the names of a ConvLSTM, or of a cell of one."""

    row: Dialect
    found: Recognized
    steps: bool


def _candidates(module: torch.nn.Module, rows: list[Dialect]) -> Iterator[Candidate]:
    state = module.state_dict()
    for steps in (False, True):
        known = [_alone(row) for row in rows if isinstance(row.cells, str)] if steps \
            else [row for row in rows if row.cells != ""]  # fmt: skip
        for row in known:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", UserWarning)
                    found = recognize(state, [row], "")
            except (ValueError, UserWarning):  # not it, or more than it
                continue
            if not found.place and _fits(found) and not (steps and len(_arguments(type(module).forward)) < 2):
                yield Candidate(row, found, steps)


def _alone(row: Dialect) -> Dialect:
    """Return the dialect of a module that is a cell of a dialect."""
    within = row.cells.rpartition("}")[2].lstrip(".") if "}" in row.cells else ""
    return replace(row, cells=(within,), directions=(), beside=())


def _fits(found: Recognized) -> bool:
    """Whether the weights have the shapes of a ConvLSTM's."""
    for cell in found.cells.values():
        weights = [cell[name] for name in found.row.required if name.endswith(".weight") and "conv" in name]
        joint = weights[0] if found.row.joint is not None and "{gate}" not in found.row.joint else None
        if joint is not None and (joint.dim() != 4 or joint.shape[0] % 4 or joint.shape[1] <= joint.shape[0] // 4):
            return False
    return True


def _refusal(module: torch.nn.Module) -> str | None:
    """Say why a module is not even tried."""
    if "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        return "left, for its forward is not that of its class"
    for name, child in module.named_modules():
        if name and any(hooks for attribute, hooks in vars(child).items() if attribute.endswith("_hooks")
                        and attribute.startswith(("_forward", "_backward"))):  # fmt: skip
            return f"left, for {name} in it has hooks, which would not be called"
    return None


def _arguments(forward: Callable[..., Any]) -> list[str]:
    """Return the names of the positional arguments of a method, without self."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY
    return [name for name, parameter in inspect.signature(forward).parameters.items() if parameter.kind in kinds][1:]


# What is compared


def _plan(module: torch.nn.Module, candidate: Candidate) -> Plan | str:
    """Return how to answer the calls of a module, or why it is left."""
    told = ""
    for dtype in _TOLERANCES:
        try:
            twin = copy.deepcopy(module).eval().to(dtype)
            return _compared(twin, candidate, dtype)
        except Exception as error:  # whatever a user's module raises for an input that it does not expect
            lines = str(error).strip().splitlines() or [""]
            told = f"left, for a call with a drawn input failed: {type(error).__name__}: {lines[0][:120]}"
    return told


def _compared(twin: torch.nn.Module, candidate: Candidate, dtype: Any) -> Plan | str:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        device = next(twin.parameters()).device
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    with torch.no_grad():
        for name, tensor in twin.state_dict().items():
            if tensor.is_floating_point():
                value = draw(*tensor.shape) / 2
                tensor.copy_(value.abs() + 0.5 if "var" in name else value)
    inputs = _inputs(candidate, draw)
    names = tuple(_arguments(type(twin).forward))
    with torch.no_grad():
        expected, apart = _called(twin, inputs, candidate.steps, len(names))
    names = names[: 1 if not candidate.steps else 3 if apart else 2]
    for row in (candidate.row, *candidate.row.reordered()):
        plans = _hypotheses(row, candidate, apart, names)
        for plan in plans:
            with torch.no_grad():
                results = _computed(twin, plan, *inputs)
            recipe = _recipe(expected, results, plan, _TOLERANCES[dtype])
            if recipe is not None:
                plan = plan._replace(recipe=recipe)
                gradients = _agrees(twin, plan, inputs, _TOLERANCES[dtype])
                training = gradients and _agrees(twin.train(), plan, inputs, _TOLERANCES[dtype])
                return plan._replace(gradients=gradients, training=training)
    return "left, for what it returns is not what a ConvLSTM with these weights returns, in a structure that is known"


def _hypotheses(row: Dialect, candidate: Candidate, apart: bool, names: tuple[str, ...]) -> list[Plan]:
    cells = candidate.found.cells
    arranged = tuple(Arrangement.of(row, row.place(*index), cells[index]) for index in sorted(cells))
    two = bool(row.directions) and len(cells) == 2
    return [Plan(row.name, arranged, two, candidate.steps, first, apart, names, None, False, False)
            for first in ((True,) if candidate.steps else (True, False))]  # fmt: skip


def _inputs(candidate: Candidate, draw: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """Draw x, and of a cell h and c."""
    cell = Arrangement.of(candidate.row, "", candidate.found.cells[0, 0])
    kernel, F, frame = _sizes(cell, candidate.found.cells[0, 0])
    x = draw(_B, *(() if candidate.steps else (_T,)), kernel, *frame)
    return (x, draw(_B, F, *frame), draw(_B, F, *frame)) if candidate.steps else (x,)


def _sizes(cell: Arrangement, tensors: Any) -> tuple[int, int, tuple[int, int]]:
    """Return C, F and the frame that a cell's weights are for, or any."""
    first = tensors[f"{(cell.joint or cell.split[0])[0]}.weight"]
    names = len(cell.joint or cell.split[0])
    F = first.shape[0] * names // 4
    bound = [tensors[name] for _, name, _, _, convolved, _ in cell.peepholes if not convolved]
    bound += [tensors[theirs] for _, theirs in cell.norms] + [t for n, t in tensors.items() if "norm" in n]
    frames = [tuple(tensor.shape[-2:]) for tensor in bound if tensor.dim() >= 3 and tensor.shape[-2:] != (1, 1)]
    return first.shape[1] - (F if cell.joint else 0), F, frames[0] if frames else _FRAME


def _called(twin: torch.nn.Module, inputs: tuple[Tensor, ...], steps: bool, count: int) -> tuple[Any, bool]:
    """Call a module on a drawn input: what it returns, and whether h and c are two arguments."""
    if not steps:
        return twin(*inputs), False
    x, h, c = inputs
    if count >= 3:
        try:
            return twin(x, h, c), True
        except Exception:  # then the third argument is something else
            pass
    return twin(x, (h, c)), False


def _agrees(twin: torch.nn.Module, plan: Plan, inputs: tuple[Tensor, ...], tolerance: float) -> bool:
    """Whether outputs and gradients of the input and of all parameters are the module's own."""
    pulled = []
    for ours in (False, True):
        given = [tensor.detach().clone().requires_grad_(True) for tensor in inputs]
        if ours:
            output = _returned(plan.recipe, _computed(twin, plan, *given))
        else:
            output = twin(*given) if plan.apart or not plan.steps else twin(given[0], tuple(given[1:]))
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if leaf is not None]
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf) for leaf in leaves]
        loss = sum((leaf * weight).sum() for leaf, weight in zip(leaves, weights, strict=True))
        if not loss.requires_grad:
            return False
        wanted = [*given, *(p for p in twin.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        pulled.append([*leaves, *(g if g is not None else torch.zeros_like(w) for g, w in
                                  zip(gradients, wanted, strict=True))])  # fmt: skip
    return all(_close(a, b, tolerance) for a, b in zip(*pulled, strict=True))


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    largest = b.detach().abs().max() if b.numel() else 0.0
    return bool((a.detach() - b.detach()).abs().max() <= tolerance * largest + tolerance * 1e-3)


# What is computed, and what is returned


class Results(NamedTuple):
    """Of every cell the output over the sequence, the last h and the last c, channels-last, and how to write them."""

    outputs: list[tuple[Tensor, Tensor, Tensor]]
    dtype: Any
    """Of what is returned."""


def _sequence(results: Results, cell: int) -> Tensor:
    return _first(results.outputs[cell][0], results)


def _both(results: Results, turned: bool) -> Tensor:
    """Both directions' outputs; `turned`: the second one's in the order of the first."""
    forward, backward = (output[0] for output in results.outputs[:2])
    return _first(torch.cat([forward, backward.flip(1) if turned else backward], -1), results)


def _wide(results: Results, which: int) -> Tensor:
    """Both directions' states, side by side on the width."""
    return _first(torch.cat([output[which] for output in results.outputs[:2]], 2), results)


def _first(tensor: Tensor, results: Results) -> Tensor:
    return tensor.movedim(-1, -3).contiguous().to(results.dtype)


VIEWS: dict[str, Callable[[Results, int], Tensor]] = {
    "h": lambda results, cell: _first(results.outputs[cell][1], results),
    "c": lambda results, cell: _first(results.outputs[cell][2], results),
    "sequence": _sequence,
    "sequence, time first": lambda results, cell: _sequence(results, cell).transpose(0, 1),
    "turned": lambda results, cell: _first(results.outputs[cell][0].flip(1), results),
    "last step": lambda results, cell: _sequence(results, cell)[:, -1:],
    "both": lambda results, cell: _both(results, True),
    "both, second not turned": lambda results, cell: _both(results, False),
    "both, last step": lambda results, cell: _both(results, True)[:, -1:],
    "wide h": lambda results, cell: _wide(results, 1),
    "wide c": lambda results, cell: _wide(results, 2),
}
"""What a module may return, of a cell or of both directions."""


def _recipe(value: Any, results: Results, plan: Plan, tolerance: float) -> Any:
    """Return how to make a value, nested in lists and tuples, from our results; None where it is not made of them."""
    if value is None:
        return ("none", 0)
    if type(value) in (list, tuple):
        items = [_recipe(item, results, plan, tolerance) for item in value]
        return None if None in items else (type(value).__name__, tuple(items))
    if not isinstance(value, Tensor):
        return None
    views = [name for name in VIEWS if (not plan.steps or name in "hc")
             and (plan.bidirectional or not name.startswith(("both", "wide")))]  # fmt: skip
    for name in views:
        for cell in range(len(plan.cells)):
            if _close(VIEWS[name](results, cell), value, tolerance):
                return (name, cell)
    return None


def _returned(recipe: Any, results: Results) -> Any:
    kind, of = recipe
    if kind == "none":
        return None
    if kind == "list":
        return [_returned(item, results) for item in of]
    if kind == "tuple":
        return tuple([_returned(item, results) for item in of])
    return VIEWS[kind](results, of)


def _computed(module: torch.nn.Module, plan: Plan, x: Tensor, h: Any = None, c: Any = None) -> Results:
    """Run a module's cells over x (B, T, C, H, W), or (T, B, C, H, W); of a cell alone x (B, C, H, W)."""
    result, inside = dtypes(x, plan.cells[0].example(module))
    weights = plan.cells[0].weights(module, inside)
    if plan.steps:
        frames, h, c = (tensor.to(inside).movedim(1, -1) for tensor in (x, h, c))
        run = torch_ops.run(frames[:, None], weights, (h, c), plan.cells[0].options, return_sequences=False)
        return Results([run], result)
    sequence = (x if plan.batch_first else x.transpose(0, 1)).to(inside).movedim(2, -1)
    outputs = []
    for index, cell in enumerate(plan.cells):
        weights = cell.weights(module, inside) if index else weights
        outputs.append(torch_ops.run(sequence, weights, (None, None), cell.options,
                                     go_backwards=plan.bidirectional and index == 1))  # fmt: skip
        sequence = sequence if plan.bidirectional else outputs[-1][0]
    return Results(outputs, result)


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
        return _returned(plan.recipe, _computed(self, plan, *given))

    def _covered(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return x, and of a cell h and c, or None for a call that is the module's own."""
        named = dict(zip(plan.names, args, strict=False)) | kwargs
        if len(args) > len(plan.names) and any(argument is not None for argument in args[len(plan.names) :]):
            return None
        if any(value is not None for name, value in named.items() if name not in plan.names):
            return None
        given: list[Any] = [named.get(name) for name in plan.names]
        if plan.steps and not plan.apart:
            if not isinstance(given[1], list | tuple) or len(given[1]) != 2:
                return None
            given = [given[0], *given[1]]
        if not all(isinstance(tensor, Tensor) and tensor.dim() == (4 if plan.steps else 5) for tensor in given):
            return None
        if plan.steps and not all(s.shape[0] == given[0].shape[0] for s in given):  # states that are spread
            return None
        if (self.training and not plan.training) or (torch.is_grad_enabled() and not plan.gradients):
            return None
        return given

    def __reduce__(self) -> Any:
        return _unpickled, (type(self).__mro__[2],), self.__dict__


@cache
def accelerated(cls: Any) -> Any:
    """Return the subclass of a module's class whose forward is ours."""
    return type(f"Accelerated{cls.__name__}", (Accelerated, cls), {"__module__": cls.__module__})


def _unpickled(cls: Any) -> Any:
    made = accelerated(cls)
    return made.__new__(made)
