"""Backpropagation through time on the cuda engine: one kernel a step, then products over all steps of a piece at once.

A step's kernel pulls dz of the step after back to dh and applies the gates' derivatives. It writes dz over the step's
z, and the h with which the step ends over the c with which the step after began: the gradients of the kernels need no
more. Where peepholes need c once more, h has a place of its own; operands of 16 bits were kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastclstm.engines.cuda import choice, packing, product, recorded
from fastclstm.engines.cuda.conv2d import input_gradient
from fastclstm.engines.cuda.convlstm2d import (
    Kept,
    Pair,
    Saved,
    States,
    cell_arguments,
    convlstm2d,
    copy,
    empty_states,
    states_of,
    step_macros,
    strided,
)  # fmt: skip
from fastclstm.engines.cuda.device import DeviceArray
from fastclstm.engines.cuda.product import int32, offset, over
from fastclstm.engines.cuda.weight_gradient import column_sums, weight_gradient
from fastclstm.spec import PEEPHOLE_GATES, ConvLSTMSpec, Shape


@dataclass
class _Gradients:
    """What has been pulled back so far."""

    dy: DeviceArray | None
    h: DeviceArray | None
    c: DeviceArray | None
    output: DeviceArray | None = None
    """Gradient of the output that masked steps repeat."""
    weights: dict[str, DeviceArray] = field(default_factory=dict)
    """Sums for the weights; those of peepholes (3, HO, WO, F)."""


def convlstm2d_backward(
    spec: ConvLSTMSpec, saved: Saved, dy: DeviceArray | None, dh: DeviceArray | None, dc: DeviceArray | None
) -> dict[str, Any]:
    """Pull gradients of the output, the last h and the last c back through time: see `recurrence.backward`.

    "h" and "c" are None where no initial state was given.
    """
    if not spec.B * spec.HO * spec.WO:
        return _empty_gradients(spec, saved)
    gradients = _Gradients(dy, dh, dc)
    try:
        kept = saved.kept.pop()
    except IndexError:
        dx = _pull_back_pieces(spec, saved, gradients)
    else:
        dx = _pull_back(spec, saved, kept, gradients)
    weights = gradients.weights
    return {
        "x": dx, **{name: weights[name] for name in ("kernel", "recurrent_kernel", "bias")}, "h": gradients.h,
        "c": gradients.c, "peephole": _of_peepholes(spec, weights.get("peephole")), "normalization": None,
    }  # fmt: skip


def _pull_back_pieces(spec: ConvLSTMSpec, saved: Saved, gradients: _Gradients) -> DeviceArray:
    """Take all pieces forward again and back, the last one first; return dx."""
    device, dtype = saved.kernel.device, saved.kernel.dtype
    dx = device.empty(_x_shape(spec), dtype)
    frame = dx.size // (spec.B * spec.T)
    dy = gradients.dy
    for first in reversed(range(0, spec.T, saved.length)):
        part = replace(spec, T=min(saved.length, spec.T - first))
        source = spec.T - first - part.T if spec.go_backwards else first
        if spec.return_sequences and dy is not None:
            gradients.dy = _steps(dy, first, part.T)
        start = saved.first
        if first:
            h, c = (_item(states, first // saved.length - 1) for states in saved.starts)
            start = h, c
        dx_part = _pull_back_again(part, saved, start, source, gradients)
        copy(device, dx_part, part.T * frame, offset(dx, source * frame), spec.T * frame, part.T * frame, spec.B)
        del dx_part
        gradients.dy = None
    return dx


def _pull_back_again(
    spec: ConvLSTMSpec, saved: Saved, start: Pair, source: int, gradients: _Gradients
) -> DeviceArray:  # fmt: skip
    """Take one piece, the steps on the frames of x from `source` on, forward again and back; return its dx."""
    mask = None if saved.mask is None else _steps(saved.mask, source, spec.T)
    again = convlstm2d(
        replace(spec, return_sequences=False), _steps(saved.x, source, spec.T), saved.kernel, saved.recurrent_kernel,
        saved.bias, *start, saved.peephole, mask, algorithm=saved.algorithm, save=True,
    )[-1]  # fmt: skip
    assert again is not None
    return _pull_back(spec, again, again.kept.pop(), gradients)


def _pull_back(spec: ConvLSTMSpec, saved: Saved, kept: Kept, gradients: _Gradients) -> DeviceArray:
    """Take all steps back, which uses up what they have left; return dx."""
    names, peepholes = tuple(gradients.weights), saved.peephole or {}

    def compute(*arrays: Any) -> tuple[Any, ...]:
        x, kernel, recurrent_kernel, mask, first, z, c, h, dy, dh, dc, output, *others = arrays
        sums, weights = others[: len(names)], others[len(names) :]
        peephole = dict(zip(peepholes, weights, strict=True)) or None
        part = replace(saved, x=x, kernel=kernel, recurrent_kernel=recurrent_kernel, peephole=peephole, mask=mask,
                       first=(first, saved.first[1]))  # fmt: skip
        left = Kept(z, states_of(spec, c), None if h is None else states_of(spec, h))
        pulled = _Gradients(dy, dh, dc, output, dict(zip(names, sums, strict=True)))
        dx = _launch(spec, part, left, pulled)
        return dx, pulled.h, pulled.c, pulled.output, pulled.weights

    arrays = (
        saved.x, saved.kernel, saved.recurrent_kernel, saved.mask, saved.first[0], kept.z, kept.c.array,
        None if kept.h is None else kept.h.array, gradients.dy, gradients.h, gradients.c, gradients.output,
        *gradients.weights.values(), *peepholes.values(),
    )  # fmt: skip
    device, dtype = kept.z.device, saved.kernel.dtype
    key = "convlstm2d_backward", spec, saved.algorithm, dtype, saved.given_state, names
    dx, gradients.h, gradients.c, gradients.output, gradients.weights = recorded.call(device, key, arrays, compute)
    return dx


def _launch(spec: ConvLSTMSpec, saved: Saved, kept: Kept, gradients: _Gradients) -> DeviceArray:
    """Launch the steps, and the products over all of them."""
    device, dtype, dz = kept.z.device, saved.kernel.dtype, kept.z
    kind = product.backward_kind(product.kind(device, dtype, saved.algorithm))
    pixels, frame = spec.B * spec.HO * spec.WO, spec.HO * spec.WO * spec.F
    frame_z, last = dz.size // (spec.B * spec.T), spec.T - 1
    h = kept.h or (kept.c if saved.peephole is None else empty_states(device, spec, spec.F, dtype))
    depth = spec.recurrent.KH * spec.recurrent.KW * dz.shape[-1]
    tiling = choice.choose(kind, dtype, device, pixels, spec.F, depth=depth, frame=(spec.HO, spec.WO),
                           windows=[product.window(spec.recurrent)])  # fmt: skip
    frames = product.transposed_frames(device, spec.recurrent, dz, tiling.depth, stride=spec.T * frame_z,
                                       channels=dz.shape[-1], tile=tiling.tile)  # fmt: skip
    weights = product.pack(device, tiling, (saved.recurrent_kernel,), [frames], spec.F, transposed=True)
    shares = choice.shares(tiling, dtype, device, pixels, spec.F, frames.blocks)
    of_step, step_frames, partial = tiling, frames, None
    if shares > 1:  # then a step multiplies nothing, and has the more threads the smaller its tiles are
        of_step, step_frames = product.tilings(kind, dtype.itemsize)[-1], replace(frames, halo=None)
        partial = device.empty((shares, *spec.state_shape), dtype)
    dc_states = [device.empty(spec.state_shape, dtype) for _ in range(min(2, spec.T))]
    carries: Pair = (None, None)
    if saved.mask is not None:
        zeros = device.zeros(spec.state_shape, dtype)
        carries = zeros, gradients.output or device.zeros(spec.state_shape, dtype)
    codes = packing.activation_codes(spec)
    assert codes is not None
    macros = step_macros(dtype, codes)
    rest, none = (step_frames.rest(dz, frames.stride, left_out=left_out) for left_out in (False, True))
    common = int32(tiling.padded(spec.F), pixels, spec.HO, spec.WO, spec.F)
    c_stride, h_stride = np.int64(kept.c.stride), np.int64(h.stride)
    peepholes, cell = cell_arguments(spec, dtype, saved.peephole, codes)
    dy = gradients.dy
    for t in reversed(range(spec.T)):
        source, after = spec.source_step(t), spec.source_step(min(t + 1, last))
        now: tuple[DeviceArray | None, int] = (dy, frame) if t == last else (None, frame)
        if spec.return_sequences and dy is not None:
            now = offset(dy, t * frame), spec.T * frame
        dz_after = offset(dz, after * frame_z)
        dh, dh_shares = (gradients.h, 1) if t == last else (partial, shares)
        if t < last and partial is not None:
            product.launch_conv2d(device, tiling, replace(frames, data=dz_after), weights,
                                  (pixels, spec.HO, spec.WO), spec.F, partial, shares=shares)  # fmt: skip
        product.multiply(
            device, "convlstm2d_step_backward", of_step, macros, pixels, spec.F,
            dz_after, *(rest if t < last and partial is None else none), weights, *common, *strided(now),
            dh, np.int32(dh_shares), gradients.c if t == last else dc_states[(t + 1) % 2], *carries,
            dc_states[t % 2], offset(dz, source * frame_z), kept.c.before(source), c_stride,
            None if t == last or kept.h is not None else h.after(source), h_stride,
            *peepholes, None if saved.mask is None else offset(saved.mask, source), *cell,
        )  # fmt: skip
    if kept.h is None:
        copy(device, saved.first[0], h.frame, h.before(spec.source_step(0)), h.stride, h.frame, spec.B)
        if saved.mask is not None and spec.T > 1:
            _fill_masked(spec, h, saved.mask)
    gradients.h, gradients.c, gradients.output = None, None, carries[1]
    if saved.given_state:
        gradients.c = dc_states[0]
        gradients.h = input_gradient(spec.recurrent, kind, saved.recurrent_kernel,
                                     offset(dz, spec.source_step(0) * frame_z), stride=spec.T * frame_z,
                                     residual=carries[0])  # fmt: skip
    so_far = gradients.weights
    gradients.weights = {
        "kernel": weight_gradient(spec.input, kind, dtype, saved.x, dz, mask=saved.mask, more=so_far.get("kernel")),
        "recurrent_kernel": weight_gradient(
            spec.recurrent, kind, dtype, h.before(0), dz, inner=spec.T, strides=(h.stride, h.frame),
            more=so_far.get("recurrent_kernel"),
        ),
        "bias": column_sums(dz, 4 * spec.F, dtype, kind=kind, more=so_far.get("bias")),
    }  # fmt: skip
    if saved.peephole is not None:
        gradients.weights["peephole"] = _peephole_sums(spec, dtype, kind, kept, so_far.get("peephole"))
    images = spec.input.with_batch(spec.B * spec.T)  # never cut: pieces of the sequence give the bits of the whole
    return input_gradient(images, kind, saved.kernel, dz, cut=False).reshape(*_x_shape(spec))


def _fill_masked(spec: ConvLSTMSpec, h: States, mask: DeviceArray) -> None:
    """Give masked steps the h that they found."""
    device = mask.device
    kernel = device.kernel("elementwise.cu", "fill_masked", product.element_macros(h.array.dtype))
    first, step = spec.source_step(0), -1 if spec.go_backwards else 1
    over(device, kernel, spec.B * h.frame, h.before(first), np.int64(h.stride), np.int64(step * h.frame),
         np.int64(h.frame), *int32(spec.B, spec.T), offset(mask, first), np.int32(step))  # fmt: skip


def _peephole_sums(spec: ConvLSTMSpec, dtype: np.dtype, kind: int, kept: Kept, more: DeviceArray | None) -> DeviceArray:
    """Return the gradients (3, HO, WO, F) of elementwise peepholes, plus `more`."""
    device, dz = kept.z.device, kept.z
    sums = device.empty((3, *spec.state_shape[1:]), dtype)
    kernel = device.kernel("elementwise.cu", "peephole_gradient", product.element_macros(dtype, kind))
    over(device, kernel, kept.c.frame, dz, np.int32(dz.shape[-1]), kept.c.array,
         *int32(spec.B, spec.T, kept.c.first, kept.c.frame, spec.F), more, sums)  # fmt: skip
    return sums


def _of_peepholes(spec: ConvLSTMSpec, sums: DeviceArray | None) -> dict[str, DeviceArray] | None:
    """Return the gradients of elementwise or channel peepholes."""
    if sums is None:
        return None
    each = [_item(sums, n) for n in range(3)]
    if spec.peephole == "channel":
        each = [column_sums(part, spec.F, part.dtype) for part in each]
    return dict(zip(PEEPHOLE_GATES, each, strict=True))


def _item(array: DeviceArray, n: int) -> DeviceArray:
    """Return array[n]."""
    return replace(offset(array, n * (array.size // array.shape[0])), shape=array.shape[1:])


def _steps(array: DeviceArray, first: int, count: int) -> DeviceArray:
    """Return array[:, first : first + count]: a copy, where that is not all."""
    B, T, *shape = array.shape
    if count == T:
        return array
    part = array.device.empty((B, count, *shape), array.dtype)
    frame = array.size // (B * T)
    copy(array.device, offset(array, first * frame), T * frame, part, count * frame, count * frame, B)
    return part


def _x_shape(spec: ConvLSTMSpec) -> Shape:
    return spec.B, spec.T, spec.input.H, spec.input.W, spec.input.C


def _empty_gradients(spec: ConvLSTMSpec, saved: Saved) -> dict[str, Any]:
    """Return the gradients of an empty batch."""
    device, dtype = saved.kernel.device, saved.kernel.dtype

    def zeros(shape: Shape) -> DeviceArray:
        return device.zeros(shape, dtype)

    peepholes = None if saved.peephole is None else {gate: zeros(w.shape) for gate, w in saved.peephole.items()}
    dh, dc = (zeros(spec.state_shape) if saved.given_state else None for _ in range(2))
    return {"x": zeros(_x_shape(spec)), "kernel": zeros(saved.kernel.shape), "h": dh, "c": dc,
            "recurrent_kernel": zeros(saved.recurrent_kernel.shape), "bias": zeros((4 * spec.F,)),
            "peephole": peepholes, "normalization": None}  # fmt: skip
