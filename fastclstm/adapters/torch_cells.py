"""Cells of others' ConvLSTMs as the operator takes them: their tensors arranged as ours, as autograd follows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastclstm.adapters import torch_ops
from fastclstm.convert.torch_dialects import GATES, Dialect, convolves

import torch  # isort: skip
from torch import Tensor  # isort: skip


class Arrangement(NamedTuple):
    """Where a cell has its tensors, and how they become ours: names and numbers alone, for torch.compile to follow."""

    place: str
    """Of the cell in the module, "" for the module itself."""
    joint: tuple[str, ...]
    """The convolution of x and h together, or the four that it is; empty with `split`."""
    split: tuple[tuple[str, ...], ...]
    """The convolution of x and that of h, each perhaps four."""
    biases: tuple[tuple[str, ...], ...]
    order: tuple[int, ...]
    """Where the gates i, f, g, o stand in theirs."""
    forget_bias: float
    """What the module adds to the forget gate."""
    peepholes: tuple[tuple[str, str, int, int, bool, bool], ...]
    """The gate, the weight's name, which of its blocks of how many, whether it is a convolution's, with a bias."""
    norms: tuple[tuple[str, str], ...]
    """Our name of each parameter of a normalization, and theirs."""
    epsilon: float | None
    """Of a batch normalization, whose statistics are folded into the weights; else None."""
    options: str
    """As the operator takes them."""

    @classmethod
    def of(cls, row: Dialect, place: str, cell: Mapping[str, Tensor]) -> Arrangement:
        """Return the arrangement of a cell of a dialect with these tensors."""
        biased = any(name in cell for name in row.bias_names())
        gates = row.gates.replace("c", "g") or GATES  # the first guess, where names do not tell
        joint = () if row.joint is None else tuple(row.spelled(row.joint))
        split = () if row.split is None else tuple(tuple(row.spelled(conv)) for conv in row.split)
        biases = (joint,) if joint else tuple(split["xh".index(part)] for part in row.biases)
        normalized = row.normalization is not None and bool(set(row.norm_names()) & set(cell))
        width = sum(cell[f"{name}.weight"].shape[0] for name in joint or split[0])
        normalization = row.normalization_of(width) if normalized else None
        batch = normalization if normalization is not None and normalization.kind == "batch" else None
        absent = row.peephole_optional and not set(row.peephole or ()) & set(cell)
        peepholes = tuple((gate, name, part, parts, convolved, biased and convolved)
                          for gate, name, part, parts in (() if absent else row.peepholes())
                          for convolved in (convolves(name, cell[name].shape),))  # fmt: skip
        norms = tuple(row.norm_parameters()) if normalized else ()
        further = [name for gate, _, _, _, _, bias in peepholes
                   for name in (f"peephole.{gate}", *([f"peephole.bias_{gate}"] if bias else []))]  # fmt: skip
        further += [] if batch else [f"normalization_weights.{ours}" for ours, _ in norms]
        return cls(
            place.rstrip("."), joint, split, biases if biased else (), tuple(gates.index(gate) for gate in GATES),
            row.forget_bias, peepholes, norms, None if batch is None else batch.epsilon,
            torch_ops.encode(further, None if batch else normalization, activation=row.activations[0],
                             output_activation=row.output_activation),
        )  # fmt: skip

    def _tensor(self, module: Any, name: str) -> Tensor:
        for part in f"{self.place}.{name}".lstrip(".").split("."):
            module = getattr(module, part)  # a replica's are no Parameters
        return module

    def example(self, module: Any) -> Tensor:
        """Return one of the cell's weights."""
        return self._tensor(module, f"{(self.joint or self.split[0])[0]}.weight")

    def weights(self, module: Any, dtype: Any) -> dict[str, Tensor]:
        """Return the weights of the module's cell as the operator takes them, in a dtype."""

        def tensor(name: str) -> Tensor:
            return self._tensor(module, name).to(dtype)

        def gathered(names: tuple[str, ...], kind: str) -> Tensor:
            parts = [tensor(f"{name}.{kind}") for name in names]
            return _ordered(parts[0] if len(parts) == 1 else torch.cat(parts), self.order)

        if self.joint:
            whole = gathered(self.joint, "weight")
            C = whole.shape[1] - whole.shape[0] // 4
            kernels = whole[:, :C], whole[:, C:]
        else:
            kernels = gathered(self.split[0], "weight"), gathered(self.split[1], "weight")
        ours = {name: _hwio(kernel) for name, kernel in zip(("kernel", "recurrent_kernel"), kernels, strict=True)}
        for names in self.biases:
            bias = gathered(names, "bias")
            ours["bias"] = ours["bias"] + bias if "bias" in ours else bias
        if self.forget_bias:
            F = ours["kernel"].shape[-1] // 4
            added = torch.zeros(4, F, dtype=dtype, device=ours["kernel"].device)
            added[GATES.index("f")] = self.forget_bias
            ours["bias"] = ours.get("bias", 0) + added.flatten()
        for gate, name, part, parts, convolved, bias in self.peepholes:
            ours[f"peephole.{gate}"] = _peephole(tensor(name), convolved, part, parts)
            if bias:
                ours[f"peephole.bias_{gate}"] = tensor(name.removesuffix("weight") + "bias").chunk(parts)[part]
        norms = {name: _ordered(tensor(theirs), self.order).movedim(0, -1) for name, theirs in self.norms}
        return ours | norms if self.epsilon is None else _folded(ours, norms, self.epsilon)


def _ordered(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """Bring the gates on the first axis into our order."""
    if order == (0, 1, 2, 3):
        return tensor
    blocks = tensor.chunk(4)
    return torch.cat([blocks[index] for index in order])


def _hwio(weight: Tensor) -> Tensor:
    return weight.permute(2, 3, 1, 0)


def _peephole(tensor: Tensor, convolved: bool, part: int, parts: int) -> Tensor:
    if convolved:
        return _hwio(tensor.chunk(parts)[part])
    block = tensor.reshape(tensor.shape[-3:]).chunk(parts)[part].movedim(0, -1)
    return block if block.shape[:2] != (1, 1) else block[0, 0]


def _folded(ours: dict[str, Tensor], norms: dict[str, Tensor], epsilon: float) -> dict[str, Tensor]:
    """Return weights that do what batch normalization of the pre-activations with given statistics does to them."""
    scale = norms["gamma"] * torch.rsqrt(norms["moving_variance"] + epsilon)
    shift = norms["beta"] - norms["moving_mean"] * scale
    scaled = {name: tensor * scale for name, tensor in ours.items()}
    return scaled | {"bias": scaled["bias"] + shift if "bias" in scaled else shift}
