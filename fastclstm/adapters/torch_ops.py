"""convlstm2d as an operator of PyTorch: autograd, torch.compile and torch.export know it; the numbers are ours.

What the way there saves lives as long as a tensor of one byte that it returns, whose address is the key to it. Where
that tensor is lost or copied, as by checkpointing, hooks on saved tensors or another process, the way back takes the
steps forward again from the inputs, which autograd keeps.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastclstm import functional
from fastclstm.functional import ConvLSTMPullback
from fastclstm.nn.normalization import Normalization
from fastclstm.spec import ConvLSTMSpec

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError(f"fastclstm.adapters.torch needs PyTorch: pip install 'fastclstm[torch]' ({error})") from error

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch before 2.7 has none

_saved: dict[int, ConvLSTMPullback] = {}
"""The way back of each forward call whose byte is alive, by the byte's address."""


class Arguments(NamedTuple):
    """What the operator and its way back take: tensors that are channels-last, and how they are meant."""

    x: Tensor
    kernel: Tensor
    recurrent_kernel: Tensor
    bias: Tensor | None
    h: Tensor | None
    c: Tensor | None
    mask: Tensor | None
    dropout_x: Tensor | None
    dropout_h: Tensor | None
    further: Sequence[Tensor]
    options: str
    go_backwards: bool
    return_sequences: bool


_SCHEMA = (
    "Tensor x, Tensor kernel, Tensor recurrent_kernel, Tensor? bias, Tensor? h, Tensor? c, Tensor? mask, "
    "Tensor? dropout_x, Tensor? dropout_h, Tensor[] further, str options, bool go_backwards, bool return_sequences"
)


def encode(further: Sequence[str], normalization: Normalization | None = None, **options: Any) -> str:
    """Return options of `functional.convlstm2d_vjp` as the operator takes them.

    `further` names the weights of its list, as in "peephole.i" and "normalization_weights.gamma".
    """
    if normalization is not None:
        options["normalization"] = {name: getattr(normalization, name) for name in Normalization.__dataclass_fields__}
    return json.dumps({"further": list(further), **options})


@cache
def _decode(options: str) -> tuple[list[tuple[str, str]], bool, dict[str, Any]]:
    """Return the names of the further weights, whether to recompute, and the options of `functional.convlstm2d`."""
    known = json.loads(options)
    names = [(name.partition(".")[0], name.partition(".")[2]) for name in known.pop("further")]
    if known.get("normalization") is not None:
        known["normalization"] = Normalization(**known["normalization"])
    return names, known.pop("recompute", False), known


def run(x: Tensor, weights: Mapping[str, Tensor], state: Any, options: str, *, mask: Tensor | None = None,
        dropout: tuple[Tensor | None, Tensor | None] = (None, None), go_backwards: bool = False,
        return_sequences: bool = True) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run one cell over x (B, T, H, W, C): the output, the last h and the last c, as autograd follows them.

    `weights` are of x's dtype: "kernel", "recurrent_kernel", perhaps "bias", then the further ones in their order.
    """
    further = [tensor for name, tensor in weights.items() if name not in ("kernel", "recurrent_kernel", "bias")]
    h, c = state
    differentiable = (x, h, c, *weights.values())
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable)
    y, h, c, _ = convlstm2d(
        x, weights["kernel"], weights["recurrent_kernel"], weights.get("bias"), h, c, mask, *dropout, further, options,
        go_backwards, return_sequences, save and not _is_exporting(),
    )  # fmt: skip
    return y, h, c


@torch.library.custom_op(
    "fastclstm::convlstm2d",
    mutates_args=(),
    schema=f"({_SCHEMA}, bool save) -> (Tensor y, Tensor h, Tensor c, Tensor saved)",
)
def convlstm2d(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the output, the last states and, with `save`, the byte that the way back depends on."""
    *given, save = arguments
    call = Arguments(*given)
    if save:
        outputs, pullback = _forward(call)
        byte = _keep(pullback)
    else:
        outputs = functional.convlstm2d(*_positional(call), **_options(call))
        byte = torch.zeros(1, dtype=torch.uint8)
    y, h, c = map(_tensor, outputs)
    return y, h, c, byte


@torch.library.custom_op(
    "fastclstm::convlstm2d_backward",
    mutates_args=(),
    schema=f"(Tensor saved, Tensor? dy, Tensor? dh, Tensor? dc, {_SCHEMA}) -> Tensor[]",
)
def convlstm2d_backward(saved: Tensor, dy: Tensor | None, dh: Tensor | None, dc: Tensor | None, *arguments: Any) -> Any:
    """Pull gradients back: of x, both kernels, then of those of bias, h, c and the further weights that there are."""
    call = Arguments(*arguments)
    pullback = _saved.get(saved.data_ptr())
    if pullback is None:
        _, pullback = _forward(call)
    gradients = pullback((_array(dy), _array(dh), _array(dc)))
    pulled = [gradients["x"], gradients["kernel"], gradients["recurrent_kernel"]]
    pulled += [gradients["bias"]] if call.bias is not None else []
    given = zip((call.h, call.c), gradients.get("initial_state", ()), strict=False)
    pulled += [gradient for state, gradient in given if state is not None]
    pulled += [gradients[mapping][name] for mapping, name in _decode(call.options)[0]]
    return list(map(_tensor, pulled))


def _forward(call: Arguments) -> tuple[Any, ConvLSTMPullback]:
    _, recompute, _ = _decode(call.options)
    return functional.convlstm2d_vjp(*_positional(call), recompute=recompute, **_options(call))


def _positional(call: Arguments) -> tuple[Any, ...]:
    return _array(call.x), _array(call.kernel), _array(call.recurrent_kernel), _array(call.bias)


def _options(call: Arguments) -> dict[str, Any]:
    """Return the options of `functional.convlstm2d` that a call means."""
    names, _, options = _decode(call.options)
    mappings: dict[str, dict[str, Any]] = {}
    for (mapping, name), tensor in zip(names, call.further, strict=True):
        mappings.setdefault(mapping, {})[name] = _array(tensor)
    masks = {"x": _array(call.dropout_x), "h": _array(call.dropout_h)}
    return options | mappings | {
        "initial_state": (_array(call.h), _array(call.c)),
        "mask": _array(call.mask),
        "dropout_masks": {name: mask for name, mask in masks.items() if mask is not None} or None,
        "go_backwards": call.go_backwards,
        "return_sequences": call.return_sequences,
        "return_state": True,
    }  # fmt: skip


def _keep(pullback: ConvLSTMPullback) -> Tensor:
    """Return a byte as long as whose memory is alive `pullback` is found under its address."""
    memory = np.zeros(1, np.uint8)
    byte = torch.from_numpy(memory)
    address = byte.data_ptr()
    _saved[address] = pullback
    weakref.finalize(memory, _saved.pop, address, None).atexit = False
    return byte


def _array(tensor: Tensor | None) -> Any:
    """Return a tensor as NumPy's array of the same memory, in C order; one on a GPU as a tensor without a graph."""
    if tensor is None:
        return None
    plain = tensor.detach().contiguous()
    return plain.numpy() if plain.device.type == "cpu" else plain


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


# What tracing needs to know


@convlstm2d.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Arguments(*arguments[:-1])
    known = _decode(call.options)[2]
    names = ("strides", "padding", "padding_mode", "dilation", "recurrent_dilation")
    spec = ConvLSTMSpec.infer(
        call.x.shape, call.kernel.shape, call.recurrent_kernel.shape, return_sequences=call.return_sequences,
        activation=None, recurrent_activation=None, output_activation=None,
        **{name: known[name] for name in names if name in known},
    )  # fmt: skip
    y, h, c = (call.x.new_empty(shape) for shape in (spec.output_shape, spec.state_shape, spec.state_shape))
    return y, h, c, torch.empty(1, dtype=torch.uint8, device="cpu")


@convlstm2d_backward.register_fake
def _(saved: Tensor, dy: Tensor | None, dh: Tensor | None, dc: Tensor | None, *arguments: Any) -> list[Tensor]:
    call = Arguments(*arguments)
    given = (call.x, call.kernel, call.recurrent_kernel, call.bias, call.h, call.c, *call.further)
    return [tensor.new_empty(tensor.shape) for tensor in given if tensor is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = Arguments(*inputs[:-1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[-1], *call[:9], *call.further)
    ctx.plain = call[10:]


def _backward(ctx: Any, dy: Tensor | None, dh: Tensor | None, dc: Tensor | None, _: Any) -> tuple[Any, ...]:
    saved, *tensors = ctx.saved_tensors
    call = Arguments(*tensors[:9], tensors[9:], *ctx.plain)  # type: ignore[call-arg]
    pulled = iter(convlstm2d_backward(saved, dy, dh, dc, *call))
    named = [None if tensor is None else next(pulled) for tensor in call[:6]]
    return *named, None, None, None, list(pulled), None, None, None, None


convlstm2d.register_autograd(_backward, setup_context=_setup_context)
