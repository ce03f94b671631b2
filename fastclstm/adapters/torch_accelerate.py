"""accelerate: our kernels in the recurrent convolutions of a user's model of PyTorch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastclstm.adapters.report import Report
from fastclstm.adapters.torch_cells import Arrangement
from fastclstm.adapters.torch_comparison import AGREED_AT_FIRST, FAILED, Candidate, plan_of
from fastclstm.adapters.torch_forms import parameters_of
from fastclstm.adapters.torch_structure import alike, arrangements, decompositions, frame_for, frame_of, unknown
from fastclstm.adapters.torch_swapped import (
    Accelerated,
    Plan,
    accelerated,
    first_of,
    is_as_compared,
    is_hooked,
    parts_of,
)
from fastclstm.convert.torch_dialects import DIALECTS, Dialect
from fastclstm.convert.torch_grus import GRU_DIALECTS
from fastclstm.convert.torch_recognition import Recognized, recognize

import torch  # isort: skip

_RECURRENT = re.compile("lstm|gru|rnn|recurrent", re.IGNORECASE)
"""Names of classes of which it is told why they are left, though their weights have no names that are known."""


def accelerate(model: torch.nn.Module, *, dialects: Sequence[Dialect] = (), return_report: bool = False) -> Any:
    """Let our kernels compute the ConvLSTMs and ConvGRUs in a model, which stays what it is in every other way.

    A module is tried if its weights have the names of a known ConvLSTM, as of `fastclstm.convert.torch.from_torch`, or
    if its layers are convolutions (perhaps normalized) whose numbers of channels are those of cells: of ConvLSTMs
    (perhaps with peepholes), ConvGRUs or simple recurrent ones, gates together or apart and in any order. Then a copy
    of it with drawn weights and our kernels are called on drawn inputs, and only where outputs and gradients agree the
    module's class becomes a subclass whose ``forward`` calls the kernels: the parameters are the same objects, the keys
    of the state_dict, the call, the structure of what it returns, attributes and ``isinstance`` are as before. Where a
    whole module is not understood, its cells are tried, which are called step by step. Modules on a GPU are compared on
    the processor, as copies.

    A call that the comparison has not covered goes to the module's own ``forward``: with further arguments; in
    training mode where it has dropout or batch normalization; for gradients where the module's own are others (the
    published "seyongk" cuts them off); on so little that calling ours would take longer than PyTorch (steps of cells
    with some 10⁸ products, ConvGRUs over sequences with 10⁸). Hooks on a swapped module are called, those within it
    not: such a module is left, and so is one that remembers earlier calls, keeps its states in an attribute, masks
    zeros or fills NaN. Results are contiguous; under autocast they are computed and returned in float32. Where parts of
    a swapped module are replaced, wrapped, parametrized or given hooks later, or where numbers, flags or names in its
    attributes change, such as batch_first, it computes itself (``accelerate`` again compares anew); so it does for
    `torch.jit.trace` and the exporters of ONNX.

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
        if is_as_compared(module, module.fastclstm_plan):
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
        plan = _refusal(module) or plan_of(module, candidate)
        if isinstance(plan, Plan):
            products = sum(cell.products(module) for cell in plan.cells)
            module.fastclstm_plan = plan._replace(products=products, first=first_of(plan), parts=parts_of(module))
            module.__class__ = accelerated(kind)
            report.swapped[name] = _told(plan)
            report.left.pop(name, None)
            return
        worth = candidate.named or plan.startswith(AGREED_AT_FIRST) or _RECURRENT.search(kind.__name__)
        told = report.left.get(name, "")
        if worth and (not told or (FAILED in told and FAILED not in plan)):  # any other reason tells more than that
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


def _candidates(module: torch.nn.Module, rows: list[Dialect]) -> Iterator[Candidate]:
    state, several = module.state_dict(), len(parameters_of(type(module).forward)) > 1
    for found in _recognized(state, [row for row in rows if row.cells != ""]):
        yield _named(found, bool(found.row.directions) and len(found.cells) == 2, False)
    for cells in decompositions(module):
        if meanings := alike([meant for _, meant in cells]):
            both = (False, True) if len(cells) == 2 else (False,)
            yield Candidate(_kind(state, cells[0][1]), False, meanings, both, False, frame_of(module))
    if several:
        for found in _recognized(state, [_alone(row) for row in rows if isinstance(row.cells, str)]):
            yield _named(found, False, True)
        if meant := arrangements(module, ""):
            yield Candidate(_kind(state, meant), False, [(one,) for one in meant], (False,), True, frame_of(module))


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
    frame = frame_for(tensors[name] for name in sorted(of_pixels))
    return Candidate(found.row.name, True, meanings, (bidirectional,), steps, frame)


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


def _refusal(module: torch.nn.Module) -> str | None:
    """Say why a module is not even tried."""
    if "forward" in module.__dict__:
        return "left, for its forward is not that of its class"
    for name, child in module.named_modules():
        if name and is_hooked(child):
            return f"left, for {name} in it has hooks, which would not be called"
    return None
