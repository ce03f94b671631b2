"""Weights of others' cells, arranged as ours."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fastclstm.adapters import torch_ops  # noqa: E402
from fastclstm.adapters.torch_cells import Arrangement, _places  # noqa: E402
from fastclstm.engines import lending  # noqa: E402

pytestmark = pytest.mark.torch


def test_large_memory_is_used_again_when_nobody_has_it():

    def some():
        return lending.lend((lending.LENT_BYTES[0] // 4 + 7, 1), np.dtype(np.float32))

    lending._spare.clear()
    first = some()
    tensor = torch.from_numpy(first)
    place, view = tensor.data_ptr(), tensor.detach()[5:].numpy()
    del first, tensor
    second = some()
    assert second.ctypes.data != place
    del view
    assert some().ctypes.data == place


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (3, 0, 1, 2), (0, 1, 2, 3)])
def test_neighbouring_gates_are_copied_together(order):

    cell = Arrangement("convlstm2d", "", ("a", "b"), ("a", "b"), 2, order)
    places, shapes = _places(cell, (("a.weight", (6, 5, 3, 3)), ("b.weight", (6, 5, 3, 3))))  # two gates each, F = 3
    tensors = [torch.arange(270.0).reshape(6, 5, 3, 3) + 270 * n for n in range(2)]
    gates = torch.cat(tensors).chunk(4)
    whole = torch.cat([gates[gate] for gate in order]).permute(2, 3, 1, 0)
    made = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for place in places:
        made[place.ours][..., place.own] = tensors[place.tensor].numpy()[place.block].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(np.concatenate([made["kernel"], made["recurrent_kernel"]], 2), whole)
    assert len(places) == {(0, 1, 3, 2): 6, (3, 0, 1, 2): 6, (0, 1, 2, 3): 4}[order]


@pytest.mark.parametrize("biases", [("x", "h"), ("h",)])
@pytest.mark.parametrize("both", [False, True])
def test_weights_for_a_compiler_are_those_that_are_copied(monkeypatch, biases, both):

    cell = Arrangement("convgru2d", "", ("x",), ("h",), 2, (2, 0, 1), biases, both, negated=True)
    given = {"x.weight": torch.randn(9, 2, 3, 3), "h.weight": torch.randn(9, 3, 1, 1)}
    given |= {f"{name}.bias": torch.randn(9) for name in biases}
    made = []
    for passing in (True, False):
        monkeypatch.setattr(torch_ops, "passed_by", lambda _, passing=passing: passing)
        tensors = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
        ours = cell._kernels(tensors)
        loss = sum(
            (tensor * torch.linspace(0, 1, tensor.numel()).reshape(tensor.shape)).sum() for tensor in ours.values()
        )
        made.append([*ours.values(), *torch.autograd.grad(loss, [*tensors.values()])])
    torch.testing.assert_close(*made)
    assert made[0][2].shape == ((2, 9) if both else (9,))
