"""What a module of PyTorch that a user hands over computes, for comparison: however it wants to be called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from fastclstm.convert.torch_recognition import Recognized

_ORDERS = ((0, 1, 2), (1, 0, 2), (0, 2, 1))
"""Of batch, time and channels, in which modules take sequences and return them; each is its own inverse."""


def called(module: Any, found: Recognized, x: np.ndarray) -> list[np.ndarray]:
    """Return sequences (B, T, F, H, W) that the ConvLSTM found in a module returns for x (B, T, C, H, W) in eval mode.

    Raises
    ------
    ValueError
        x has another rank, or no way to call the module gives a sequence.
    """
    if x.ndim != 5:
        raise ValueError(f"from_torch: check must be (batch, time, channels, height, width), got shape {x.shape}")
    inner = module.get_submodule(found.place.removesuffix("."))
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        sequences, told = outputs(inner, x, filters(found))
    finally:
        for part, mode in modes:
            part.training = mode
    if not sequences:
        raise ValueError(f"from_torch: no call of {type(inner).__name__} with check returns a sequence ({told}); give "
                         f"check=(x, y)")  # fmt: skip
    return sequences


def filters(found: Recognized) -> int:
    """Return F of the last cell."""
    row, last = found.row, found.cells[max(found.cells)]
    convolution = row.joint if row.split is None else row.split[0]
    assert convolution is not None
    return sum(len(last[f"{name}.{row.weight}"]) for name in row.spelled(convolution)) // 4


def outputs(module: Any, x: np.ndarray, F: int, states: int = 2) -> tuple[list[np.ndarray], str]:
    """Return what may be a module's outputs (B, T, F, H, W) for x, however it is called, and what a call raised."""
    import torch

    held = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    if not held:
        return [], f"{type(module).__name__} has no weights"
    weight = held[0]
    tensor = torch.as_tensor(np.ascontiguousarray(x)).to(weight.device, weight.dtype)
    module.eval()
    sequences: list[np.ndarray] = []
    told = ""
    with torch.no_grad():
        for attempt in _attempts(module, tensor, F, states):
            try:
                made = [*attempt()]
            except Exception as error:  # whatever a user's module raises for a call that it does not expect
                told = told or f"{type(error).__name__}: {str(error)[:120]}"
                continue
            sequences += [output.detach().double().cpu().numpy() for output in made
                          if output.dim() == 5 and output.shape[:2] == tensor.shape[:2]]  # fmt: skip
    return sequences, told


def _attempts(module: Any, x: Any, F: int, states: int) -> Iterator[Callable[[], Iterator[Any]]]:
    """Yield the ways to call a module, each of which yields what may be its outputs, in our order of axes."""
    for order in _ORDERS:
        axes = (*order, 3, 4)
        for more in ((), (None,), (None, x.shape[1])):

            def over_sequences(axes: Any = axes, more: Any = more) -> Iterator[Any]:
                for tensor in _tensors(module(x.permute(axes).contiguous(), *more)):
                    if tensor.dim() == 5:
                        yield tensor.permute(axes)

            yield over_sequences
    yield partial(_stepwise, module, x, F, states, lambda frame, given: (frame, *given))
    yield partial(_stepwise, module, x, F, states, lambda frame, given: (frame, tuple(given)))
    yield partial(_stepwise, module, x, F, states, lambda frame, given: (*given, frame))


def _stepwise(module: Any, x: Any, F: int, count: int, arguments: Callable[[Any, Any], Any]) -> Iterator[Any]:
    """Yield the states, over time, of a cell that is called step by step, with the arguments that x and they make."""
    import torch

    states = [x.new_zeros(x.shape[0], F, *x.shape[3:])] * count
    steps = []
    for frame in x.unbind(1):
        result = module(*arguments(frame, states))
        states = [tensor for tensor in _tensors(result) if tensor.dim() == 4][-count:]
        steps.append(states)
    yield from (torch.stack(one, 1) for one in zip(*steps, strict=True))


def _tensors(value: Any) -> Iterator[Any]:
    """Yield the tensors in nested lists and tuples."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "dim"):
        yield value
