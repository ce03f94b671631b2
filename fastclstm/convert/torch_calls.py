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
    import torch

    if x.ndim != 5:
        raise ValueError(f"from_torch: check must be (batch, time, channels, height, width), got shape {x.shape}")
    inner = module.get_submodule(found.place.removesuffix("."))
    row, last = found.row, found.cells[max(found.cells)]
    convolution = row.joint if row.split is None else row.split[0]
    assert convolution is not None
    weights = [last[f"{name}.{row.weight}"] for name in row.spelled(convolution)]
    weight, F = weights[0], sum(len(one) for one in weights) // 4
    tensor = torch.as_tensor(np.ascontiguousarray(x)).to(weight.device, weight.dtype)
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    sequences: list[np.ndarray] = []
    told = ""
    try:
        with torch.no_grad():
            for attempt in _attempts(inner, tensor, F):
                try:
                    outputs = [*attempt()]
                except Exception as error:  # whatever a user's module raises for a call that it does not expect
                    told = told or f"{type(error).__name__}: {str(error)[:120]}"
                    continue
                sequences += [output.detach().double().cpu().numpy() for output in outputs
                              if output.dim() == 5 and output.shape[:2] == tensor.shape[:2]]  # fmt: skip
    finally:
        for part, mode in modes:
            part.training = mode
    if not sequences:
        raise ValueError(f"from_torch: no call of {type(inner).__name__} with check returns a sequence ({told}); give "
                         f"check=(x, y)")  # fmt: skip
    return sequences


def _attempts(module: Any, x: Any, F: int) -> Iterator[Callable[[], Iterator[Any]]]:
    """Yield the ways to call a module, each of which yields what may be its outputs, in our order of axes."""
    for order in _ORDERS:
        axes = (*order, 3, 4)
        for more in ((), (None,), (None, x.shape[1])):

            def over_sequences(axes: Any = axes, more: Any = more) -> Iterator[Any]:
                for tensor in _tensors(module(x.permute(axes).contiguous(), *more)):
                    if tensor.dim() == 5:
                        yield tensor.permute(axes)

            yield over_sequences
    yield partial(_stepwise, module, x, F, True)
    yield partial(_stepwise, module, x, F, False)


def _stepwise(module: Any, x: Any, F: int, apart: bool) -> Iterator[Any]:
    """Yield both states, over time, of a cell that is called step by step, its states two arguments or a pair."""
    import torch

    states = [x.new_zeros(x.shape[0], F, *x.shape[3:])] * 2
    steps = []
    for frame in x.unbind(1):
        result = module(frame, *states) if apart else module(frame, tuple(states))
        states = [tensor for tensor in _tensors(result) if tensor.dim() == 4][-2:]
        steps.append(states)
    yield from (torch.stack(one, 1) for one in zip(*steps, strict=True))


def _tensors(value: Any) -> Iterator[Any]:
    """Yield the tensors in nested lists and tuples."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "dim"):
        yield value
