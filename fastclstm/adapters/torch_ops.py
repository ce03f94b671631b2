"""Our recurrences as operators of PyTorch: autograd, torch.compile and torch.export know them; the numbers are ours.

What the way there saves lives as long as a tensor of one byte that it returns, whose address is the key to it. Where
that tensor is lost or copied, as by checkpointing, hooks on saved tensors or another process, the way back takes the
steps forward again from the inputs, which autograd keeps.

Where nothing but autograd looks on, an operator is passed by: the dispatcher in Python takes longer than a small call.
Weights that nothing is learnt of are brought into our arrangement once, and once more when they have changed.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, Self

import numpy as np

from fastclstm import dispatch, functional
from fastclstm.engines.cpu import memory
from fastclstm.engines.remembered import immutable
from fastclstm.nn.normalization import Normalization
from fastclstm.spec import CELL_STATES, CellSpec, ConvLSTMSpec

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError(f"fastclstm.adapters.torch needs PyTorch: pip install 'fastclstm[torch]' ({error})") from error

is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch before 2.7 has none

_saved: dict[int, tuple[Callable[..., Any], weakref.ref[np.ndarray]]] = {}
"""The way back of each forward call whose byte is alive, by the byte's address, and who tells when it is not."""


class Weights(NamedTuple):
    """A cell's weights as an operator takes them, and what they are made of."""

    owner: torch.nn.Module | None
    """Whose they are; None: of nobody who keeps them."""
    key: Any
    """Which of the owner's cells."""
    tensors: list[Tensor]
    make: Callable[[Any], dict[str, Tensor]]
    """Return, in a dtype, "kernel", "recurrent_kernel", perhaps "bias", then the further ones in their order."""

    def arrays(self, dtype: Any) -> dict[str, np.ndarray]:
        """Return them as arrays that are the same, and known by engines, for as long as the tensors' values are."""
        if self.owner is None:
            return {name: _array(tensor) for name, tensor in self.make(dtype).items()}
        made = _arranged.setdefault(self.owner, {})
        found = made.get((self.key, dtype))
        if found is None or not all(map(_Copy.is_of, found[0], self.tensors)):
            with torch.no_grad():
                copies = list(map(_Copy.of, self.tensors))
                arrays = {name: immutable(_array(tensor)) for name, tensor in self.make(dtype).items()}
            found = made[self.key, dtype] = copies, arrays
        return found[1]


class _Copy(NamedTuple):
    """What a tensor's values were: versions of tensors do not tell of what is written to ``data``."""

    dtype: Any
    shape: Any
    values: bytearray

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        return cls(tensor.dtype, tensor.shape, memory.contents(_bits(tensor)))

    def is_of(self, tensor: Tensor) -> bool:
        """Whether a tensor has the same bits."""
        return self.dtype == tensor.dtype and self.shape == tensor.shape and memory.is_in(_bits(tensor), self.values)


def _bits(tensor: Tensor) -> np.ndarray:
    plain = tensor if tensor.itemsize >= 4 else tensor.detach().contiguous().view(torch.uint8)
    array: np.ndarray = plain.numpy(force=True)
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


_arranged: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, tuple[list[_Copy], dict[str, np.ndarray]]]]
_arranged = weakref.WeakKeyDictionary()
"""Of a cell and a dtype the values that were arranged, and the arrays."""


class Arguments(NamedTuple):
    """What an operator and its way back take: tensors that are channels-last, and how they are meant."""

    x: Tensor
    kernel: Tensor
    recurrent_kernel: Tensor
    bias: Tensor | None
    states: tuple[Tensor | None, ...]
    mask: Tensor | None
    dropout_x: Tensor | None
    dropout_h: Tensor | None
    further: Sequence[Tensor]
    options: str
    go_backwards: bool
    return_sequences: bool

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The tensors that there may be gradients of."""
        return self.x, self.kernel, self.recurrent_kernel, self.bias, *self.states, *self.further


def encode(further: Sequence[str], normalization: Normalization | None = None, **options: Any) -> str:
    """Return options of an operation's vjp, as of `functional.convlstm2d_vjp`, as its operator takes them.

    `further` names the weights of its list, as in "peephole.i" and "normalization_weights.gamma".
    """
    if normalization is not None:
        options["normalization"] = {name: getattr(normalization, name) for name in Normalization.__dataclass_fields__}
    return json.dumps({"further": list(further), **options})


def changed(options: str, **others: Any) -> str:
    """Return encoded options with some that are others."""
    return json.dumps(json.loads(options) | others)


@cache
def _decode(options: str) -> tuple[list[tuple[str, str]], dict[str, Any], dict[str, Any]]:
    """Return the names of the further weights, the options of the vjp alone, and those of the operation."""
    known = json.loads(options)
    names = [(name.partition(".")[0], name.partition(".")[2]) for name in known.pop("further")]
    if known.get("normalization") is not None:
        known["normalization"] = Normalization(**known["normalization"])
    return names, {"recompute": True} if known.pop("recompute", False) else {}, known


class Operator:
    """An operation over sequences as an operator of PyTorch, and its way back as another.

    ``forward(*arguments, save)`` returns the output, the last states and, with `save`, the byte that the way back
    depends on; ``backward(saved, dy, *dstates, *arguments, input_gradient)`` pulls gradients back: of x if that is so,
    of both kernels, then of those of bias, states and further weights that there are. `arguments` are those of
    `Arguments`, the states one by one.
    """

    def __init__(self, name: str, cell: str):
        self.name, self.cell, self.states = name, cell, CELL_STATES[cell]
        states = "".join(f"Tensor? {state}, " for state in self.states)
        schema = (
            f"Tensor x, Tensor kernel, Tensor recurrent_kernel, Tensor? bias, {states}Tensor? mask, "
            "Tensor? dropout_x, Tensor? dropout_h, Tensor[] further, str options, bool go_backwards, "
            "bool return_sequences"
        )
        outputs = "".join(f"Tensor {state}, " for state in self.states)
        cotangents = "".join(f"Tensor? d{state}, " for state in self.states)
        define = partial(torch.library.custom_op, mutates_args=())
        self.forward: Any = define(
            f"fastclstm::{name}", self._forward, schema=f"({schema}, bool save) -> (Tensor y, {outputs}Tensor saved)"
        )
        self.backward: Any = define(
            f"fastclstm::{name}_backward",
            self._backward,
            schema=f"(Tensor saved, Tensor? dy, {cotangents}{schema}, bool input_gradient) -> Tensor[]",
        )
        self.forward.register_fake(self._outputs_of)
        self.backward.register_fake(self._gradients_of)
        self.forward.register_autograd(self._pulled, setup_context=self._kept)

    def __call__(self, x: Tensor, weights: Weights, states: Sequence[Tensor | None], options: str, *,
                 mask: Tensor | None = None, dropout: tuple[Tensor | None, Tensor | None] = (None, None),
                 go_backwards: bool = False, return_sequences: bool = True,
                 first: Sequence[int] = ()) -> tuple[Tensor, ...]:  # fmt: skip
        """Run one cell over x (B, T, H, W, C) in x's dtype: the output and the last states, as autograd follows.

        first: which of them are returned with their channels first, in C order; the others are channels-last.
        """
        save = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (x, *states, *weights.tensors)
        )
        passing = passed_by(x)
        more = tuple(states), mask, *dropout
        if passing and not save:
            arrays: dict[str, Any] = dict(weights.arrays(x.dtype))
            own = [arrays.pop(name, None) for name in ("kernel", "recurrent_kernel", "bias")]
            call = Arguments._make((x, *own, *more, [*arrays.values()], options, go_backwards, return_sequences))
            return _tensors(self._computed(call), first)
        tensors = weights.make(x.dtype)
        kernels = [tensors.pop(name, None) for name in ("kernel", "recurrent_kernel", "bias")]
        call = Arguments._make((x, *kernels, *more, [*tensors.values()], options, go_backwards, return_sequences))
        if passing:
            made: tuple[Tensor, ...] = _Eager.apply(self, first, call[9:], *self._flat(call)[: 7 + len(self.states)],
                                                    *call.further)  # fmt: skip
            return made
        *outputs, _ = self.forward(*self._flat(call), save and not is_exporting())
        return tuple([_channels_first(y) if n in first else y for n, y in enumerate(outputs)])

    # Arguments

    def _call(self, flat: Sequence[Any]) -> Arguments:
        """Return the arguments that stand first in a list of them."""
        stop = 4 + len(self.states)
        return Arguments._make((*flat[:4], tuple(flat[4:stop]), *flat[stop : stop + 7]))

    def _flat(self, call: Arguments) -> tuple[Any, ...]:
        return (*call[:4], *call.states, *call[5:])

    def _options(self, call: Arguments) -> dict[str, Any]:
        """Return the options of the operation that a call means."""
        names, _, options = _decode(call.options)
        mappings: dict[str, dict[str, Any]] = {}
        for (mapping, name), tensor in zip(names, call.further, strict=True):
            mappings.setdefault(mapping, {})[name] = _array(tensor)
        masks = {"x": _array(call.dropout_x), "h": _array(call.dropout_h)}
        return options | mappings | {
            "initial_state": tuple(map(_array, call.states)),
            "mask": _array(call.mask),
            "dropout_masks": {name: mask for name, mask in masks.items() if mask is not None} or None,
            "go_backwards": call.go_backwards,
            "return_sequences": call.return_sequences,
            "return_state": True,
        }  # fmt: skip

    # What is computed

    def _forward(self, *flat: Any) -> tuple[Tensor, ...]:
        call = self._call(flat)
        if flat[-1]:
            outputs, pullback = self._vjp(call)
            byte = _keep(pullback)
        else:
            outputs = self._computed(call)
            byte = torch.zeros(1, dtype=torch.uint8)
        return (*map(_tensor, outputs), byte)

    def _computed(self, call: Arguments) -> Any:
        return getattr(functional, self.name)(*map(_array, call[:4]), **self._options(call))

    def _vjp(self, call: Arguments) -> Any:
        own = _decode(call.options)[1]
        return getattr(functional, f"{self.name}_vjp")(*map(_array, call[:4]), **self._options(call), **own)

    def _backward(self, saved: Tensor, *flat: Any) -> list[Tensor]:
        count = 1 + len(self.states)
        cotangents, call, input_gradient = flat[:count], self._call(flat[count:]), flat[-1]
        kept = _saved.get(saved.data_ptr())
        pullback = self._vjp(call)[1] if kept is None else kept[0]
        gradients = pullback(tuple(map(_array, cotangents)), input_gradient=input_gradient)
        pulled = [gradients["x"]] if input_gradient else []
        pulled += [gradients["kernel"], gradients["recurrent_kernel"]]
        pulled += [gradients["bias"]] if call.bias is not None else []
        given = zip(call.states, gradients.get("initial_state", ()), strict=False)
        pulled += [gradient for state, gradient in given if state is not None]
        pulled += [gradients[mapping][name] for mapping, name in _decode(call.options)[0]]
        return list(map(_tensor, pulled))

    # What tracing needs to know

    def _outputs_of(self, *flat: Any) -> tuple[Tensor, ...]:
        call = self._call(flat)
        known = _decode(call.options)[2]
        names = ("strides", "padding", "padding_mode", "dilation", "recurrent_dilation")
        geometry = {name: known[name] for name in names if name in known}
        shapes = call.x.shape, call.kernel.shape, call.recurrent_kernel.shape
        spec = _spec(self, shapes, return_sequences=call.return_sequences, **geometry)
        made = (spec.output_shape, *(spec.state_shape for _ in self.states))
        return (*map(call.x.new_empty, made), torch.empty(1, dtype=torch.uint8, device="cpu"))

    def _gradients_of(self, _: Tensor, *flat: Any) -> list[Tensor]:
        call = self._call(flat[1 + len(self.states) :])
        wanted = call.differentiable[0 if flat[-1] else 1 :]
        return [tensor.new_empty(tensor.shape) for tensor in wanted if tensor is not None]

    # What autograd needs to know

    def _kept(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call = self._call(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[-1], *inputs[: 7 + len(self.states)], *call.further)
        ctx.plain = call[9:]

    def _pulled(self, ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        named, further = self._gradients(self.backward, ctx, cotangents[:-1], ctx.needs_input_grad[0])
        return *named, None, None, None, further, None, None, None, None

    def _gradients(self, backward: Any, ctx: Any, cotangents: Any, input_gradient: bool) -> tuple[Any, list[Tensor]]:
        """Return gradients of x, kernels, bias and states, None where there is none, and of the further weights."""
        saved, *tensors = ctx.saved_tensors
        count = 7 + len(self.states)
        call = self._call((*tensors[:count], tensors[count:], *ctx.plain))
        pulled = iter(backward(saved, *cotangents, *self._flat(call), input_gradient))
        wanted = (call.x if input_gradient else None, *call.differentiable[1 : 4 + len(self.states)])
        return [None if tensor is None else next(pulled) for tensor in wanted], list(pulled)


class _Eager(torch.autograd.Function):
    """What an operator does, for autograd alone."""

    @staticmethod
    def forward(
        ctx: Any, operator: Operator, first: Sequence[int], plain: tuple[Any, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        count = 7 + len(operator.states)
        outputs, pullback = operator._vjp(operator._call((*tensors[:count], tensors[count:], *plain)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(_keep(pullback), *tensors)
        ctx.operator, ctx.first, ctx.plain = operator, first, plain
        return _tensors(outputs, first)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        operator = ctx.operator
        pull = (
            operator.backward if torch.is_grad_enabled() else operator._backward
        )  # which refuses to be differentiated
        turned = [dy.movedim(-3, -1) if n in ctx.first and dy is not None else dy for n, dy in enumerate(cotangents)]
        named, further = operator._gradients(pull, ctx, turned, ctx.needs_input_grad[3])
        return None, None, None, *named, None, None, None, *further


def passed_by(x: Tensor) -> bool:
    """Whether nobody but autograd follows what is done with a tensor: no compiler, no mode, no transformation."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.is_cpu
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


def _spec(operator: Operator, shapes: tuple[Any, ...], **geometry: Any) -> ConvLSTMSpec | CellSpec:
    if operator.cell == "lstm":
        return ConvLSTMSpec.infer(*shapes, activation=None, recurrent_activation=None, output_activation=None,
                                  **geometry)  # fmt: skip
    return CellSpec.infer(operator.cell, *shapes, activation=None, op=operator.name, **geometry)


def _keep(pullback: Callable[..., Any]) -> Tensor:
    """Return a byte as long as whose memory is alive `pullback` is found under its address."""
    memory = np.zeros(1, np.uint8)
    byte = torch.from_numpy(memory)
    address = byte.data_ptr()
    _saved[address] = pullback, weakref.ref(memory, lambda _: _saved.pop(address, None))
    return byte


def _array(tensor: Tensor | np.ndarray | None) -> Any:
    """Return a tensor as NumPy's array of the same memory; one on a GPU as a tensor without a graph, in C order."""
    if tensor is None or isinstance(tensor, np.ndarray):
        return tensor
    return tensor.numpy(force=True) if tensor.is_cpu else tensor.detach().contiguous()


def contiguous(tensor: Tensor) -> Tensor:
    """Return a tensor in C order: by NumPy, as PyTorch's threads would spin beside ours for a while."""
    if tensor.is_contiguous() or not passed_by(tensor):
        return tensor.contiguous()
    copied: Tensor = _Copied.apply(tensor) if tensor.requires_grad else _copied(tensor)
    return copied


def _copied(tensor: Tensor) -> Tensor:
    return torch.from_numpy(dispatch.contiguous(tensor.detach().numpy()))


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        return _copied(tensor)

    @staticmethod
    def backward(_: Any, dy: Tensor) -> Tensor:
        return dy


def _tensors(arrays: Sequence[Any], first: Sequence[int] = ()) -> tuple[Tensor, ...]:
    """Return what an engine has computed as tensors, some with their channels first, in C order."""
    return tuple([_tensor(_channels_first(array) if n in first else array) for n, array in enumerate(arrays)])


def _channels_first(array: Any) -> Any:
    if isinstance(array, np.ndarray):
        return dispatch.contiguous(array.swapaxes(-1, -2).swapaxes(-2, -3))
    return array.movedim(-1, -3).contiguous()


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


OPERATORS = {name: Operator(name, cell) for name, cell in
             {"convlstm2d": "lstm", "convgru2d": "gru", "convrnn2d": "rnn"}.items()}  # fmt: skip
