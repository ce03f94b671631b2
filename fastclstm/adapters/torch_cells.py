"""Cells of others' modules as the operators take them: their tensors arranged as ours, as autograd follows it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, Self

from fastclstm.adapters import torch_ops
from fastclstm.convert.torch_dialects import GATES, Dialect, convolves
from fastclstm.engines import lending
from fastclstm.engines.cpu import memory
from fastclstm.spec import CELL_GATES

import torch  # isort: skip
from torch import Tensor  # isort: skip


class _Place(NamedTuple):
    """Where a block of a cell's values stands among its tensors, and where among ours."""

    tensor: int
    """Which of the tensors."""
    block: tuple[slice, ...]
    ours: str
    own: slice
    """Of a kernel's last axis, where the axes of `block` are turned around and its channels behind its taps; or of the
    bias, all of whose values are one after another."""
    negated: bool


class Arrangement(NamedTuple):
    """Where a cell has its tensors, and how they become ours: names and numbers alone, for torch.compile to follow."""

    operation: str
    """A key of `torch_ops.OPERATORS`."""
    place: str
    """Of the cell in the module, "" for the module itself."""
    x: tuple[str, ...]
    """The convolutions of x, alone or with h beside it, whose outputs are all gates' one after another."""
    h: tuple[str, ...]
    """Those of h, alone or with x beside it."""
    channels: int
    """C."""
    order: tuple[int, ...]
    """Where our gates stand in theirs."""
    biases: tuple[str, ...] = ()
    """The convolutions that have one."""
    both: bool = False
    """Whether the biases of x and of h are apart: of a GRU with reset_after."""
    negated: bool = False
    """Whether the first gate's pre-activation is ours times −1: of a GRU that keeps (1 − z)∘h."""
    forget_bias: float = 0.0
    """What the module adds to the forget gate."""
    peepholes: tuple[tuple[str, str, int, int, bool, bool], ...] = ()
    """The gate, the weight's name, which of its blocks of how many, whether it is a convolution's, with a bias."""
    norms: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Our name of each parameter of a normalization, and theirs, whose values are one after another."""
    epsilon: float | None = None
    """Of a batch normalization, whose statistics are folded into the weights; else None."""
    options: str = torch_ops.encode([])
    """As the operator takes them."""
    hidden_first: bool = False
    """Whether h stands before x where a convolution is of both."""

    @classmethod
    def of(cls, row: Dialect, place: str, cell: Mapping[str, Tensor]) -> Self:
        """Return the arrangement of a cell of a dialect of ConvLSTMs with these tensors."""
        biased = any(name in cell for name in row.bias_names())
        gates = row.gates.replace("c", "g") or GATES  # the first guess, where names do not tell
        joint = () if row.joint is None else tuple(row.spelled(row.joint))
        split = (joint, joint) if row.split is None else tuple(tuple(row.spelled(conv)) for conv in row.split)
        biases = joint or tuple(name for part in row.biases for name in split["xh".index(part)])
        normalized = row.normalization is not None and bool(set(row.norm_names()) & set(cell))
        width = sum(cell[f"{name}.weight"].shape[0] for name in split[0])
        normalization = row.normalization_of(width) if normalized else None
        batch = normalization if normalization is not None and normalization.kind == "batch" else None
        absent = row.peephole_optional and not set(row.peephole or ()) & set(cell)
        peepholes = tuple((gate, name, part, parts, convolved, biased and convolved)
                          for gate, name, part, parts in (() if absent else row.peepholes())
                          for convolved in (convolves(name, cell[name].shape),))  # fmt: skip
        norms = tuple((ours, (theirs,)) for ours, theirs in row.norm_parameters()) if normalized else ()
        further = [name for gate, _, _, _, _, bias in peepholes
                   for name in (f"peephole.{gate}", *([f"peephole.bias_{gate}"] if bias else []))]  # fmt: skip
        further += [] if batch else [f"normalization_weights.{ours}" for ours, _ in norms]
        C = cell[f"{split[0][0]}.weight"].shape[1] - (width // 4 if joint else 0)
        return cls(
            "convlstm2d", place.rstrip("."), split[0], split[1], C,
            tuple(gates.index(gate) for gate in GATES), biases if biased else (), False, False, row.forget_bias,
            peepholes, norms, None if batch is None else batch.epsilon,
            torch_ops.encode(further, None if batch else normalization, activation=row.activations[0],
                             output_activation=row.output_activation),
        )  # fmt: skip

    @property
    def operator(self) -> torch_ops.Operator:
        """What computes it."""
        return torch_ops.OPERATORS[self.operation]

    @property
    def G(self) -> int:
        """The number of gates."""
        return len(CELL_GATES[self.operator.cell])

    def _names(self) -> list[str]:
        """Return the names of all its tensors."""
        names = self._core()
        for _, name, _, _, _, bias in self.peepholes:
            names += [name, *([name.removesuffix("weight") + "bias"] if bias else [])]
        return list(dict.fromkeys(names + [name for _, theirs in self.norms for name in theirs]))

    def _tensor(self, module: Any, name: str) -> Tensor:
        for part in (f"{self.place}.{name}" if self.place else name).split("."):
            module = getattr(module, part)  # a replica's are no Parameters
        return module

    def example(self, module: Any) -> Tensor:
        """Return one of the cell's weights."""
        return self._tensor(module, f"{self.x[0]}.weight")

    def filters(self, module: Any) -> int:
        """Return F."""
        return sum(len(self._tensor(module, f"{name}.weight")) for name in self.x) // self.G

    def products(self, module: Any) -> int:
        """Return how many products its convolutions have for a pixel."""
        names = dict.fromkeys((*self.x, *self.h))
        return sum(self._tensor(module, f"{name}.weight").numel() for name in names)

    def alone(self) -> Self:
        """Return the same of the cell as a module of its own."""
        return self._replace(place="")

    def hadamard(self, module: Any) -> dict[str, Tensor]:
        """Return the weights of c that are no convolutions, channels first, by the gates that see it."""
        return {gate: _block(self._tensor(module, name), part, parts)
                for gate, name, part, parts, convolved, _ in self.peepholes if not convolved}  # fmt: skip

    def by(self, engine: str) -> Self:
        """Return the same, computed by an engine."""
        return self._replace(options=torch_ops.changed(self.options, engine=engine))

    def weights(self, module: Any) -> torch_ops.Weights:
        """Return the weights of the module's cell as the operator takes them."""
        names = self._names() if torch.compiler.is_compiling() else _remembered_names(self)
        tensors = [self._tensor(module, name) for name in names]
        return torch_ops.Weights(module, self, tensors, lambda dtype: self._arranged(module, dtype))

    def _arranged(self, module: Any, dtype: Any) -> dict[str, Tensor]:
        def tensor(name: str) -> Tensor:
            return self._tensor(module, name).to(dtype)

        ours = self._kernels({name: tensor(name) for name in self._core()})
        if self.forget_bias:
            added = torch.zeros(4, self.filters(module), dtype=dtype, device=self.example(module).device)
            added[GATES.index("f")] = self.forget_bias
            ours["bias"] = ours.get("bias", 0) + added.flatten()
        for gate, name, part, parts, convolved, biased in self.peepholes:
            ours[f"peephole.{gate}"] = _peephole(tensor(name), convolved, part, parts)
            if biased:
                ours[f"peephole.bias_{gate}"] = tensor(name.removesuffix("weight") + "bias").chunk(parts)[part]
        norms = {name: self._ordered(torch.cat([tensor(one) for one in theirs]), not name.startswith("moving"))
                 .movedim(0, -1) for name, theirs in self.norms}  # fmt: skip
        return ours | norms if self.epsilon is None else _folded(ours, norms, self.epsilon)

    def _core(self) -> list[str]:
        """Return the names of the tensors that kernels and bias are made of."""
        weights = [f"{name}.weight" for name in dict.fromkeys((*self.x, *self.h))]
        return weights + [f"{name}.bias" for name in self.biases]

    def _kernels(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return our kernels, and the bias if there is one."""
        given = [*tensors.values()]
        theirs = tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
        if all(map(torch_ops.passed_by, given)):
            places, shapes = _remembered_places(self, theirs)
            return dict(zip(shapes, _Arranged.apply(places, shapes, *given), strict=True))
        places, shapes = _places(self, theirs)
        return {name: _joined([place for place in places if place.ours == name], given, shape)
                for name, shape in shapes.items()}  # fmt: skip

    def _ordered(self, tensor: Tensor, signed: bool) -> Tensor:
        """Bring the gates on the first axis into our order and, if `signed`, with our sign."""
        negated = signed and self.negated
        if self.order == tuple(range(self.G)) and not negated:
            return tensor
        blocks = tensor.chunk(self.G)
        ordered = [blocks[index] for index in self.order]
        return torch.cat([-ordered[0], *ordered[1:]] if negated else ordered)


class _Arranged(torch.autograd.Function):
    """Our weights of a cell's, and the gradient of that, each value copied once.

    PyTorch's own operations copy what was cut, turned and joined several times, across memory.
    """

    @staticmethod
    def forward(
        ctx: Any, places: tuple[_Place, ...], shapes: dict[str, tuple[int, ...]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.places, ctx.shapes, ctx.own = places, shapes, [tensor.shape for tensor in tensors]
        theirs = [tensor.detach().numpy() for tensor in tensors]
        made = {name: lending.lend(shape, theirs[0].dtype) for name, shape in shapes.items()}
        if "bias" in made:
            made["bias"].fill(0)
        for place in places:
            block = theirs[place.tensor][place.block]
            if place.ours == "bias":  # x's and h's may be summed
                made["bias"].reshape(-1)[place.own] += -block if place.negated else block
            else:
                ours = made[place.ours][..., place.own]
                memory.copy(block.transpose(2, 3, 1, 0), ours, negated=place.negated)
        return tuple(map(torch.from_numpy, made.values()))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        ours = {name: cotangent.detach().numpy() for name, cotangent in zip(ctx.shapes, cotangents, strict=True)}
        wanted = ctx.needs_input_grad[2:]
        pulled = [lending.lend(shape, ours["kernel"].dtype) if wants else None
                  for shape, wants in zip(ctx.own, wanted, strict=True)]  # fmt: skip
        for place in ctx.places:
            whole = pulled[place.tensor]
            if whole is None:
                continue
            theirs = whole[place.block]
            if place.ours == "bias":
                block = ours["bias"].reshape(-1)[place.own]
                theirs[...] = -block if place.negated else block
            else:
                block = ours[place.ours][..., place.own]
                memory.copy(block, theirs.transpose(2, 3, 1, 0), negated=place.negated)
        return None, None, *(None if array is None else torch.from_numpy(array) for array in pulled)


def _joined(places: list[_Place], tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Do what `_Arranged` does for one of our weights by PyTorch's operations, for compilers to follow."""
    places = sorted(places, key=lambda place: place.own.start)
    given = [tensors[place.tensor][place.block] for place in places]
    blocks = [-block if place.negated else block for place, block in zip(places, given, strict=True)]
    if len(shape) == 4:
        return torch.cat([block.permute(2, 3, 1, 0) for block in blocks], -1)
    ends = [(place.own.start, math.prod(shape) - place.own.stop) for place in places]
    padded = list(map(torch.nn.functional.pad, blocks, ends))
    return sum(padded[1:], padded[0]).reshape(shape)


def _places(
    arrangement: Arrangement, shapes: tuple[tuple[str, tuple[int, ...]], ...]
) -> tuple[tuple[_Place, ...], dict[str, tuple[int, ...]]]:
    """Return where a cell's values go, of tensors with these names and shapes, and the shapes of what is ours."""
    sizes, numbers = dict(shapes), {name: number for number, (name, _) in enumerate(shapes)}
    G, C = arrangement.G, arrangement.channels
    F = sum(sizes[f"{name}.weight"][0] for name in arrangement.x) // G
    taps = {half: sizes[f"{names[0]}.weight"][2:] for half, names in (("x", arrangement.x), ("h", arrangement.h))}
    ours = {"kernel": (*taps["x"], C, G * F), "recurrent_kernel": (*taps["h"], F, G * F)}
    if arrangement.biases:
        ours["bias"] = (2, G * F) if arrangement.both else (G * F,)
    found: list[_Place] = []
    for half, names, alone in (("x", arrangement.x, C), ("h", arrangement.h, F)):
        start = 0
        for name in names:
            rows, channels = sizes[f"{name}.weight"][:2]
            joint = channels != alone
            first = F if arrangement.hidden_first else C
            inputs = slice(first) if (half == "h") == arrangement.hidden_first else slice(first, None)
            inputs = inputs if joint else slice(None)
            for gate, theirs, count in _runs(arrangement.order, start // F, (start + rows) // F, arrangement.negated):
                block = slice(theirs * F - start, (theirs + count) * F - start)
                own = slice(gate * F, (gate + count) * F)
                negated = gate == 0 and arrangement.negated and not arrangement.norms
                kernel = "kernel" if half == "x" else "recurrent_kernel"
                found.append(_Place(numbers[f"{name}.weight"], (block, inputs), kernel, own, negated))
                if name in arrangement.biases and not (half == "h" and name in arrangement.x):
                    behind = G * F if half == "h" and arrangement.both else 0
                    line = slice(own.start + behind, own.stop + behind)
                    found.append(_Place(numbers[f"{name}.bias"], (block,), "bias", line, negated))
            start += rows
    return tuple(found), ours


_remembered_places = lru_cache(256)(_places)
_remembered_names = lru_cache(256)(Arrangement._names)


def _runs(order: tuple[int, ...], first: int, stop: int, first_apart: bool) -> Iterator[tuple[int, int, int]]:
    """Yield where gates that follow one another in our order and in theirs begin in each, and how many they are.

    Of those from `first` to `stop` in theirs; `first_apart`: our first one is alone.
    """
    gate = 0
    while gate < len(order):
        count = 1
        if first <= order[gate] < stop:
            alone = first_apart and gate == 0
            while not alone and gate + count < len(order) and order[gate + count] == order[gate] + count < stop:
                count += 1
            yield gate, order[gate], count
        gate += count


def _block(tensor: Tensor, part: int, parts: int) -> Tensor:
    return tensor.reshape(tensor.shape[-3:]).chunk(parts)[part]


def _peephole(tensor: Tensor, convolved: bool, part: int, parts: int) -> Tensor:
    if convolved:
        return tensor.chunk(parts)[part].permute(2, 3, 1, 0)
    block = _block(tensor, part, parts).movedim(0, -1)
    return block if block.shape[:2] != (1, 1) else block[0, 0]


def _folded(ours: dict[str, Tensor], norms: dict[str, Tensor], epsilon: float) -> dict[str, Tensor]:
    """Return weights that do what batch normalization of the pre-activations with given statistics does to them."""
    scale = norms["gamma"] * torch.rsqrt(norms["moving_variance"] + epsilon)
    shift = norms["beta"] - norms["moving_mean"] * scale
    scaled = {name: tensor * scale for name, tensor in ours.items()}
    return scaled | {"bias": scaled["bias"] + shift if "bias" in scaled else shift}
