"""accelerate: our kernels in the recurrent convolutions of a user's model of PyTorch."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from fastclstm.adapters import torch_ops  # first: without PyTorch it says what to install
from fastclstm.adapters.report import Report
from fastclstm.adapters.torch_cells import Arrangement
from fastclstm.adapters.torch_forms import Inputs, X, forms_of, found_in, parameters_of
from fastclstm.adapters.torch_layers import dtypes
from fastclstm.adapters.torch_structure import Agreement, agreeing, alike, arrangements, decompositions, unknown
from fastclstm.convert.torch_dialects import DIALECTS, Dialect
from fastclstm.convert.torch_grus import GRU_DIALECTS
from fastclstm.convert.torch_recognition import Recognized, recognize

import torch  # isort: skip
from torch import Tensor  # isort: skip

_FRAME = (7, 6)
_B, _T = 2, 3
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
"""How far outputs and gradients may be from the module's own, as a share of their largest value."""
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
_LAYOUTS = (0, 1, 2), (1, 0, 2), (0, 2, 1)
"""Where a module's x has batch, time and channels; each is its own inverse."""
_RECURRENT = re.compile("lstm|gru|rnn|recurrent", re.IGNORECASE)
"""Names of classes of which it is told why they are left, though their weights have no names that are known."""


class Plan(NamedTuple):
    """How a module's call is answered."""

    dialect: str
    cells: tuple[Arrangement, ...]
    bidirectional: bool
    steps: bool
    """Whether the module is a single cell, called step by step."""
    layout: tuple[int, ...]
    """Of `_LAYOUTS`."""
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
    """What was in the module when it was compared, as of `_parts`; where that has changed it computes itself."""


def accelerate(model: torch.nn.Module, *, dialects: Sequence[Dialect] = (), return_report: bool = False) -> Any:
    """Let our kernels compute the ConvLSTMs and ConvGRUs in a model, which stays what it is in every other way.

    A module is tried if its weights have the names of a known ConvLSTM, as of `fastclstm.convert.torch.from_torch`, or
    if all of its parameters are convolutions (perhaps normalized) whose numbers of channels are those of cells: of
    ConvLSTMs, ConvGRUs or simple recurrent ones, gates together or apart and in any order. Then a copy of it with
    drawn weights and our kernels are called on drawn inputs, and only where outputs and gradients agree the module's
    class becomes a subclass whose ``forward`` calls the kernels: the parameters are the same objects, the keys of the
    state_dict, the call, the structure of what it returns, attributes and ``isinstance`` are as before. Where a whole
    module is not understood, its cells are tried, which are called step by step. Modules on a GPU are compared on the
    processor, as copies.

    A call that the comparison has not covered goes to the module's own ``forward``: with further arguments; in
    training mode where it has dropout or batch normalization; for gradients where the module's own are others (the
    published "seyongk" cuts them off); on so little that calling ours would take longer than PyTorch (steps of cells
    with some 10⁸ products, ConvGRUs over sequences with 10⁸). Hooks on a swapped module are called, those within it
    not: such a module is left, and so is one that remembers earlier calls. Results are contiguous; under autocast
    they are computed and returned in float32. What decides how a module is called and what it returns, such as its
    attribute batch_first, must be set before. Where parts of a swapped module are replaced, wrapped, parametrized or
    given hooks later, it computes itself (``accelerate`` again compares anew); so it does for `torch.jit.trace` and
    the exporters of ONNX.

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
    accelerate: no ConvLSTM or ConvGRU was found
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
        if module.fastclstm_plan.parts == _parts(module):
            report.swapped[name] = f"{module.fastclstm_plan.dialect}: it was before"
            return
        module.__class__ = type(module).__mro__[2]
        del module.fastclstm_plan
    kind: Any = type(module)
    reason = _unreadable(module)
    if reason:
        report.left[name] = reason
        return
    for candidate in _candidates(module, rows) if reason is None else ():
        plan = _refusal(module) or _plan(module, candidate)
        if isinstance(plan, Plan):
            products = sum(cell.products(module) for cell in plan.cells)
            module.fastclstm_plan = plan._replace(products=products, first=_first_of(plan), parts=_parts(module))
            module.__class__ = accelerated(kind)
            report.swapped[name] = _told(plan)
            report.left.pop(name, None)
            return
        worth = candidate.named or plan in (_REMEMBERS, _OF_LARGE) or _RECURRENT.search(kind.__name__)
        told = report.left.get(name, "")
        if worth and (not told or (_FAILED in told and _FAILED not in plan)):  # any other reason tells more than that
            report.left[name] = f"{candidate.name}: {plan}"
    for key, child in module.named_children():
        _visit(child, f"{name}.{key}".lstrip("."), rows, report)
    told_of = any(f"{key}.".startswith(f"{name}." if name else "") for key in (*report.swapped, *report.left))
    if reason is None and not told_of and _RECURRENT.search(kind.__name__) and (why := unknown(module)):
        report.left[name] = f"left, for {why}"


def _told(plan: Plan) -> str:
    kind = "a cell, step by step" if plan.steps else "over whole sequences"
    if plan.training:
        return f"{plan.dialect}: {kind}"
    return f"{plan.dialect}: {kind}; {'in training mode' if plan.gradients else 'for gradients'} it computes itself"


class Candidate(NamedTuple):
    """A module that has the weights of recurrent convolutions."""

    name: str
    named: bool
    """Whether the names of its weights tell what it is."""
    meanings: list[tuple[Arrangement, ...]]
    """What its cells may be."""
    bidirectional: tuple[bool, ...]
    """Whether its cells are two directions; or both."""
    steps: bool
    """Whether it is a single cell, called step by step."""
    frame: tuple[int, int] | None = None
    """That its weights are for, if they are for one."""


def _candidates(module: torch.nn.Module, rows: list[Dialect]) -> Iterator[Candidate]:
    state, several = module.state_dict(), len(parameters_of(type(module).forward)) > 1
    for found in _recognized(state, [row for row in rows if row.cells != ""]):
        yield _named(found, bool(found.row.directions) and len(found.cells) == 2, False)
    for cells in decompositions(module):
        if meanings := alike([meant for _, meant in cells]):
            both = (False, True) if len(cells) == 2 else (False,)
            yield Candidate(_kind(state, cells[0][1]), False, meanings, both, False)
    if several:
        for found in _recognized(state, [_alone(row) for row in rows if isinstance(row.cells, str)]):
            yield _named(found, False, True)
        if meant := arrangements(module, ""):
            yield Candidate(_kind(state, meant), False, [(one,) for one in meant], (False,), True)


def _recognized(state: Any, rows: list[Dialect]) -> Iterator[Recognized]:
    """Yield the ConvLSTMs of known dialects that a module is."""
    for row in rows:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                found = recognize(state, [row], "")
        except (ValueError, UserWarning):  # not it, or more than it
            continue
        if not found.place and _fits(found):
            yield found


def _named(found: Recognized, bidirectional: bool, steps: bool) -> Candidate:
    """Return the candidate that a known dialect is."""
    rows = [found.row, *found.row.reordered()]
    rows += [] if found.row.output_activation else [replace(row, activations=("relu",)) for row in rows]
    meanings = [tuple(Arrangement.of(row, row.place(*index), found.cells[index]) for index in sorted(found.cells))
                for row in rows]  # fmt: skip
    tensors, first = found.cells[0, 0], meanings[0][0]
    of_pixels = {name for _, name, _, _, convolved, _ in first.peepholes if not convolved}
    of_pixels |= {name for _, theirs in first.norms for name in theirs} | {name for name in tensors if "norm" in name}
    frames = [tuple(tensors[name].shape[-2:]) for name in sorted(of_pixels) if tensors[name].dim() >= 3]
    bound = [frame for frame in frames if frame != (1, 1)]
    return Candidate(found.row.name, True, meanings, (bidirectional,), steps, bound[0] if bound else None)


def _kind(state: Any, meant: list[Arrangement]) -> str:
    """Return what to call a module whose cells are known by their shapes."""
    for row in GRU_DIALECTS.values():
        if all(any(f".{key}".endswith(f".{name}") for key in state) for name in row.required):
            return row.name
    kinds = {"convlstm2d": "a ConvLSTM", "convgru2d": "a ConvGRU", "convrnn2d": "a simple recurrent one"}
    return " or ".join(dict.fromkeys(kinds[one.operation] for one in meant))


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


def _unreadable(module: torch.nn.Module) -> str | None:
    """Say why a module cannot be looked at; "" where that is so of a part of it, None where it can."""
    if isinstance(module, torch.jit.ScriptModule):
        convolved = any(parameter.dim() == 4 for parameter in module.parameters())
        return "left, for it is a program of torch.jit's; accelerate what it was made of" if convolved else ""
    if any(map(torch.nn.parameter.is_lazy, module.parameters(recurse=False))):
        return "left, for its parameters have no shapes yet; call the model once, then accelerate it"
    return "" if any(map(torch.nn.parameter.is_lazy, module.parameters())) else None


_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "num_groups", "eps", "p")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_hooked(module: torch.nn.Module) -> bool:
    return any(map(module.__dict__.get, _HOOKS))


def _parts(module: torch.nn.Module) -> tuple[Any, ...]:
    """Return what must stay as it is in a module beside parameters' values: its parts, and whether they have hooks."""
    found: list[Any] = []
    for name, child in module._modules.items():
        if child is not None:
            found += [name, type(child), child._parameters.get("bias") is None and child.__dict__.get("bias") is None,
                      _is_hooked(child)]  # fmt: skip
            found += map(child.__dict__.get, _GEOMETRY)
            if child._modules:
                found += [_parts(child)]
    return tuple(found)


def _refusal(module: torch.nn.Module) -> str | None:
    """Say why a module is not even tried."""
    if "forward" in module.__dict__:
        return "left, for its forward is not that of its class"
    for name, child in module.named_modules():
        if name and _is_hooked(child):
            return f"left, for {name} in it has hooks, which would not be called"
    return None


# What is compared


_LEFT = "left, for what it returns is not what {} with these weights returns, in a structure that is known"
_FAILED = "left, for a call with a drawn input failed"
_LARGE = 100.0
_OF_LARGE = "left, for it is something else where states or frames are large: as if it clipped them"
_REMEMBERS = "left, for it returns something else when it is called again"


def _plan(module: torch.nn.Module, candidate: Candidate) -> Plan | str:
    """Return how to answer the calls of a module, or why it is left."""
    told: Plan | str = ""
    failed: list[Any] = []
    for dtype in _TOLERANCES:
        try:
            with torch.random.fork_rng(devices=[]):
                twin = copy.deepcopy(module).eval().to("cpu", dtype)
                comparison = _Comparison(twin, candidate, dtype)
                if isinstance(told, Plan) and len(comparison.failed(told, failed)) == len(failed):
                    return told
                plan = comparison.plan()
                if not isinstance(plan, Plan):
                    told = told if isinstance(told, Plan) else plan
                    failed = [()] if comparison.mixed else []
                elif not isinstance(told, Plan) or len(told.forms) < len(plan.forms):
                    told, failed = plan, comparison.failed(plan, comparison.forms(plan.cells))
                if not failed:  # else it may be that it makes tensors of float32 for itself
                    return told
        except Exception as error:  # whatever a user's module raises for an input that it does not expect
            lines = str(error).strip().splitlines() or [""]
            told = told or f"{_FAILED}: {type(error).__name__}: {lines[0][:120]}"
    return told


class _Comparison:
    """A copy of a module with drawn weights, beside what our kernels make of them: on the processor, in NumPy."""

    def __init__(self, twin: torch.nn.Module, candidate: Candidate, dtype: Any):
        self.twin, self.candidate, self.dtype = twin, candidate, dtype
        self.tolerance = _TOLERANCES[dtype]
        self.generator = torch.Generator().manual_seed(0)
        self.names = tuple(parameters_of(type(twin).forward))
        self.needed = len(parameters_of(type(twin).forward, needed=True))
        self.answers: dict[Any, tuple[Inputs, Any]] = {}
        with torch.no_grad():
            for name, tensor in twin.state_dict().items():
                if tensor.is_floating_point():
                    value = self.draw(*tensor.shape) / 2
                    tensor.copy_(value.abs() + 0.5 if "var" in name else value)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def plan(self) -> Plan | str:
        """Return how to answer the module's calls, or why not; raise what all of them raise."""
        returned, candidate = False, self.candidate
        first: Exception | None = None
        for cells in self._meanings():
            for bidirectional, form, layout in self._calls(cells):
                plan = Plan(candidate.name, cells, bidirectional, candidate.steps, layout, (form,), self.names)
                value = self._answer(plan)[1]
                if isinstance(value, Exception):
                    first = first or value
                    continue
                returned = True
                plan = self._with_recipe(plan)
                if plan.recipe is not None:
                    return self._checked(plan)
        if not returned and first is not None:
            raise first
        return _LEFT.format("a ConvLSTM" if candidate.named else candidate.name)

    def _meanings(self) -> Iterator[tuple[Arrangement, ...]]:
        """Yield what the cells may be: of ConvLSTMs, if a step of the first cell can be seen, what agrees with it."""
        meanings = self.candidate.meanings
        seen = None if self.candidate.named else self._seen()
        if seen is not None:
            yield from seen
            meanings = [cells for cells in meanings if cells[0].operation != "convlstm2d"]
        yield from meanings

    def _seen(self) -> list[tuple[Arrangement, ...]] | None:
        """Return the ConvLSTMs that agree with a step of the first cell, None where it cannot be called."""
        cells = {one[0]: one for one in self.candidate.meanings if one[0].operation == "convlstm2d"}
        place = next(iter(cells)).place if cells else ""
        own = self.twin.get_submodule(place)
        names, needed = (len(parameters_of(type(own).forward, needed=one)) for one in (False, True))
        found: list[Agreement] = []
        called = False
        for C, F in dict.fromkeys((one.channels, one.filters(self.twin)) for one in cells) if names > 1 else ():
            inputs = Inputs(self.draw(_B, C, *_FRAME), tuple(self.draw(_B, F, *_FRAME) for _ in range(2)))
            cell, values = copy.deepcopy(own), []
            for form in forms_of(1, 2, True)[1:]:
                try:
                    with torch.no_grad():
                        value = cell(*inputs.arguments(form, needed)) if len(form) <= names else None
                except Exception:  # as in _plan
                    continue
                values += [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
            called |= bool(values)
            with torch.no_grad():
                found += agreeing(cell, cells, inputs.x, inputs.states, values, self.tolerance) if values else ()
        if not found and (not called or (not place and not self.candidate.steps)):
            return None
        return [tuple(map(one.of, cells[one.meant])) for one in found]

    @property
    def mixed(self) -> bool:
        """Whether something that the module returned is of another dtype than it, whose tensors it makes."""
        return any(leaf.is_floating_point() and leaf.dtype != self.dtype for _, value in self.answers.values()
                   for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor))  # fmt: skip

    def failed(self, plan: Plan, forms: list[Any]) -> list[Any]:
        """Return in which of the forms the module of a plan cannot be called."""
        return [form for form in forms if isinstance(self._answer(plan._replace(forms=(form,)))[1], Exception)]

    def _calls(self, cells: tuple[Arrangement, ...]) -> Iterator[tuple[bool, Any, tuple[int, ...]]]:
        """Yield how a module of such cells may be called."""
        forms = self.forms(cells)
        if self.candidate.steps:
            yield from ((False, form, _LAYOUTS[0]) for form in forms if form != (X,))
        else:
            yield from ((both, form, layout) for both in self.candidate.bidirectional for form in forms
                        for layout in _LAYOUTS)  # fmt: skip

    def forms(self, cells: tuple[Arrangement, ...]) -> list[Any]:
        """Return the forms of which a call of the module has one, if it is of such cells."""
        forms = forms_of(len(cells), len(cells[0].operator.states), self.candidate.steps)
        return [form for form in forms if len(form) <= len(self.names)]

    def _inputs(self, plan: Plan, B: int = _B, T: int = _T, more: int = 0, scale: float = 1.0) -> Inputs:
        """Draw what a module of a plan is called with, values of about a scale."""
        H, W = self.candidate.frame or tuple(n + more for n in _FRAME)
        C = plan.cells[0].channels
        T += C == T  # so that no other layout fits by chance
        frames = self.draw(B, C, H, W) if plan.steps else self.draw(B, T, C, H, W).permute(*plan.layout, 3, 4)
        states = [self.draw(B, cell.filters(self.twin), H, W) for cell in plan.cells for _ in cell.operator.states]
        return Inputs(scale * frames.contiguous(), tuple(scale * state for state in states))

    def _answer(self, plan: Plan) -> tuple[Inputs, Any]:
        """Return what the module is called with and what it returns, or raises."""
        sizes = tuple((cell.channels, cell.filters(self.twin)) for cell in plan.cells)
        key = plan.layout, plan.forms, sizes, plan.cells[0].operation
        if key not in self.answers:
            inputs = self._inputs(plan)
            self.answers[key] = inputs, self._called(plan, inputs)
        return self.answers[key]

    def _called(self, plan: Plan, inputs: Inputs) -> Any:
        try:
            with torch.no_grad():
                return self.twin(*inputs.arguments(plan.forms[0], self.needed))
        except Exception as error:  # as in _plan
            return error

    def _computed(self, plan: Plan, inputs: Inputs) -> Results:
        """Run the cells in NumPy, so that hardly anything is compiled."""
        plan = plan._replace(cells=tuple(cell.by("reference") for cell in plan.cells))
        return _computed(self.twin, plan, inputs.x, inputs.states if plan.forms[0] != (X,) else ())

    def _with_recipe(self, plan: Plan) -> Plan:
        """Return the plan with what the module returns, if it is what these cells would."""
        inputs, value = self._answer(plan)
        try:
            with torch.no_grad():
                results = self._computed(plan, inputs)
        except (ValueError, TypeError, RuntimeError):  # no call of ours
            return plan
        return plan._replace(recipe=_recipe(value, results, plan, self.tolerance))

    def _checked(self, plan: Plan) -> Plan | str:
        """Return the plan with all the forms in which the module agrees, and whether gradients do."""
        further = [form for form in self.forms(plan.cells) if form != plan.forms[0]]
        kept = []
        for form in (*plan.forms, *further):
            one = plan._replace(forms=(form,))
            inputs, value = self._answer(one)
            if isinstance(value, Exception) or not self._same(one, inputs, value):
                continue
            for others in ({}, {"B": 1, "T": _T + 2, "more": 3}, {"scale": _LARGE}):
                again = self._inputs(one, **others)
                value = self._called(one, again)
                if isinstance(value, Exception) and others:  # other sizes than it is made for
                    continue
                if isinstance(value, Exception) or not self._same(one, again, value):
                    return _OF_LARGE if "scale" in others else _REMEMBERS
            kept.append(one)
        if not kept:
            return _REMEMBERS
        most = max(map(len, (one.forms[0] for one in kept)))
        plan = plan._replace(forms=tuple(one.forms[0] for one in kept), names=self.names[:most])
        gradients = all(map(self._agrees, kept))
        self.twin.train()
        return plan._replace(gradients=gradients, training=gradients and all(map(self._agrees, kept)))

    def _same(self, plan: Plan, inputs: Inputs, value: Any) -> bool:
        """Whether a value is what our kernels return."""
        with torch.no_grad():
            ours = _returned(plan.recipe, self._computed(plan, inputs))
        leaves, structure = torch.utils._pytree.tree_flatten(value)
        others, known = torch.utils._pytree.tree_flatten(ours)
        return structure == known and all(
            a is b if a is None or b is None else _close(a, b, self.tolerance)
            for a, b in zip(others, leaves, strict=True)
        )

    def _agrees(self, plan: Plan) -> bool:
        """Whether outputs and gradients of the inputs and of all parameters are the module's own."""
        drawn, pulled = self._inputs(plan), []
        for ours in (False, True):
            x, *states = (tensor.detach().clone().requires_grad_(True) for tensor in (drawn.x, *drawn.states))
            inputs = Inputs(x, tuple(states))
            if ours:
                output = _returned(plan.recipe, self._computed(plan, inputs))
            else:
                output = self.twin(*inputs.arguments(plan.forms[0], self.needed))
            leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if leaf is not None]
            generator = torch.Generator().manual_seed(1)
            weights = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf) for leaf in leaves]
            loss = sum((leaf * weight).sum() for leaf, weight in zip(leaves, weights, strict=True))
            if not loss.requires_grad:
                return False
            wanted = [x, *states, *(p for p in self.twin.parameters() if p.requires_grad)]
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            pulled.append([*leaves, *(g if g is not None else torch.zeros_like(w) for g, w in
                                      zip(gradients, wanted, strict=True))])  # fmt: skip
        return all(_close(a, b, self.tolerance) for a, b in zip(*pulled, strict=True))


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    largest = b.detach().abs().max() if b.numel() else 0.0
    return bool((a.detach() - b.detach()).abs().max() <= tolerance * largest + tolerance * 1e-3)


# What is computed, and what is returned


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
_FIRST = {"sequence": 0, "last step": 0, "h": 1, "c": 2}
"""The views that are one of an operator's results with its channels first."""


def _recipe(value: Any, results: Results, plan: Plan, tolerance: float) -> Any:
    """Return how to make a value, nested in lists and tuples, from our results; None where it is not made of them."""
    if value is None:
        return ("none", 0)
    if type(value) in (list, tuple):
        steps = _viewed(value, results, [f"{type(value).__name__} of steps"], tolerance)
        if steps is not None and not plan.steps:
            return steps
        items = [_recipe(item, results, plan, tolerance) for item in value]
        return None if None in items else (type(value).__name__, tuple(items))
    if not isinstance(value, Tensor):
        return None
    alike = len({output[1].shape for output in results.outputs}) == 1
    views = [name for name in VIEWS if not name.endswith("of steps") and (not plan.steps or name in "hc")
             and (plan.bidirectional or not name.startswith(("both", "wide")))
             and (name[-1] != "c" or len(results.outputs[0]) > 2)
             and (alike or not name.startswith("stacked"))]  # fmt: skip
    return _viewed(value, results, views, tolerance)


def _viewed(value: Any, results: Results, views: list[str], tolerance: float) -> Any:
    """Return which of the views a value is, and of which cell."""
    for name in views:
        for cell in range(len(results.outputs)):
            ours = VIEWS[name](results, cell)
            pairs = [(ours, value)] if isinstance(value, Tensor) else [*zip(ours, value, strict=False)]
            if (isinstance(value, Tensor) or len(ours) == len(value)) and all(
                isinstance(b, Tensor) and _close(a, b, tolerance) for a, b in pairs
            ):
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


def _first_of(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """Return the plan's `first`."""
    found: list[set[int]] = [set() for _ in plan.cells]
    rest = [plan.recipe]
    while rest:
        kind, of = rest.pop()
        if kind in ("list", "tuple"):
            rest += of
        elif kind not in _FIRST and kind != "none":
            return ()
        elif kind != "none" and (_FIRST[kind] or plan.bidirectional or of == len(plan.cells) - 1):
            found[of].add(_FIRST[kind])
    return tuple(map(tuple, found))


def _computed(module: torch.nn.Module, plan: Plan, x: Tensor, states: Sequence[Tensor]) -> Results:
    """Run a module's cells over its x, of a cell alone (B, C, H, W); no states are zeros."""
    weights = [cell.weights(module) for cell in plan.cells]
    result, inside = dtypes("accelerate", x, weights[0].tensors[0])
    b, t, c = plan.layout
    sequence = x.permute(0, 2, 3, 1)[:, None] if plan.steps else x.permute(b, t, 3, 4, c)
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
        return _returned(plan.recipe, _computed(self, plan, *given))

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
        if plan.parts != _parts(self):
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
