"""convlstm2d on the cuda engine: one kernel a time step convolves h and x, applies the gates and writes c and h.

Backward through time there is one kernel a step too: it pulls dz of the step after back to dh and applies the gates'
derivatives. Gradients of x and of the kernels are then products over all steps at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastclstm.engines import remembered
from fastclstm.engines.cuda import packing, product, recorded
from fastclstm.engines.cuda.conv2d import Weights, input_gradient
from fastclstm.engines.cuda.device import Device, DeviceArray, Shape
from fastclstm.engines.cuda.product import KINDS, int32, offset, on_device, over
from fastclstm.engines.cuda.weight_gradient import column_sums, weight_gradient
from fastclstm.spec import PEEPHOLE_GATES, ConvLSTMSpec


@dataclass(frozen=True)
class Saved:
    """What `convlstm2d_backward` needs of the forward pass."""

    x: DeviceArray
    kernel: DeviceArray
    recurrent_kernel: DeviceArray
    peephole: dict[str, DeviceArray] | None
    mask: DeviceArray | None
    h: States
    c: States
    z: DeviceArray
    """Pre-activations (B, T, HO, WO, 4, F), in the order of x."""
    kind: int
    given_state: bool

    def arrays(self) -> tuple[DeviceArray | None, ...]:
        """Return its arrays, one after the other."""
        return (self.x, self.kernel, self.recurrent_kernel, self.mask, self.h.array, self.c.array, self.z,
                *(self.peephole or {}).values())  # fmt: skip

    def with_arrays(self, arrays: Sequence[Any]) -> Saved:
        """Return the same with other arrays."""
        x, kernel, recurrent_kernel, mask, h, c, z, *weights = arrays
        peephole = None if self.peephole is None else dict(zip(self.peephole, weights, strict=True))
        return Saved(x, kernel, recurrent_kernel, peephole, mask, replace(self.h, array=h), replace(self.c, array=c), z,
                     self.kind, self.given_state)  # fmt: skip


@dataclass(frozen=True)
class States:
    """States (B, T + 1, HO, WO, F) before and after every step, in the order of x."""

    array: DeviceArray
    frame: int
    """Elements of a state of one image."""
    go_backwards: bool

    @property
    def stride(self) -> int:
        """Elements from image to image."""
        return self.array.shape[1] * self.frame

    @property
    def first(self) -> int:
        """Slot from which step 0 of x starts."""
        return int(self.go_backwards)

    def before(self, source: int) -> DeviceArray:
        """Return the state from which the step on frame `source` of x starts."""
        return offset(self.array, (source + self.first) * self.frame)

    def after(self, source: int) -> DeviceArray:
        """Return the state with which it ends."""
        return offset(self.array, (source + 1 - self.first) * self.frame)


def convlstm2d(
    spec: ConvLSTMSpec,
    x: DeviceArray,
    kernel: Weights,
    recurrent_kernel: Weights,
    bias: Weights | None,
    h: DeviceArray | None,
    c: DeviceArray | None,
    peephole: Mapping[str, Weights] | None,
    mask: Weights | None,
    *,
    normalization: Mapping[str, Weights] | None = None,
    dropout: Mapping[str, Weights] | None = None,
    algorithm: str = "auto",
    save: bool | str = False,
) -> tuple[DeviceArray, DeviceArray, DeviceArray, Saved | None]:
    """Run a ConvLSTM over x (B, T, H, W, C): output, last h, last c and, with `save`, what backward needs.

    Raises
    ------
    NotImplementedError
        The cell has normalization, dropout masks, convolutional peepholes or activations of the caller's own.
    """
    codes = _codes(spec, normalization, dropout)
    device, dtype = x.device, x.dtype
    kind = product.kind(device, dtype, algorithm)
    bias = None if bias is None else on_device(device, bias)
    peepholes = None if peephole is None else {name: on_device(device, peephole[name]) for name in PEEPHOLE_GATES}
    mask = None if mask is None else _mask(device, mask)
    packed = None
    if not save and spec.B and isinstance(kernel, np.ndarray) and isinstance(recurrent_kernel, np.ndarray):
        packed = _packed_once(device, spec, kind, kernel, recurrent_kernel)
        given_kernel = given_recurrent = None
    else:
        given_kernel, given_recurrent = on_device(device, kernel), on_device(device, recurrent_kernel)

    def compute(*arrays: Any) -> tuple[Any, ...]:
        x, mask, kernel, recurrent_kernel, packed, bias, h, c, *weights = arrays
        given = dict(zip(PEEPHOLE_GATES, weights, strict=True)) if weights else None
        call = _Forward(spec, codes, x.device, dtype, kind, mask, given, bool(save))
        if call.pixels:
            call.run(x, kernel, recurrent_kernel, packed, bias, h, c)
        return call.results

    arrays = x, mask, given_kernel, given_recurrent, packed, bias, h, c, *(peepholes or {}).values()
    if spec.B:
        results = recorded.call(device, ("convlstm2d", spec, kind, dtype, bool(save)), arrays, compute)
    else:
        results = compute(*arrays)
    output, h_last, c_last, h_states, c_states, z = results
    saved = None
    if save:
        assert given_kernel is not None
        assert given_recurrent is not None
        frame, given_state = spec.HO * spec.WO * spec.F, h is not None or c is not None
        h_states, c_states = (States(array, frame, spec.go_backwards) for array in (h_states, c_states))
        saved = Saved(x, given_kernel, given_recurrent, peepholes, mask, h_states, c_states, z, kind, given_state)
    return output, h_last, c_last, saved


def _packed_once(
    device: Device, spec: ConvLSTMSpec, kind: int, kernel: np.ndarray, recurrent_kernel: np.ndarray
) -> DeviceArray:
    """Return NumPy's kernels as `_packed` does, on the device for as long as they stay what they are."""

    def make() -> DeviceArray:
        return _packed(spec, kind, device.put(kernel), device.put(recurrent_kernel))

    packed: DeviceArray = remembered.remember(
        (kernel, recurrent_kernel), (device, device.stream_key(), spec, kind), make
    )
    return packed


def _packed(spec: ConvLSTMSpec, kind: int, kernel: DeviceArray, recurrent_kernel: DeviceArray) -> DeviceArray:
    """Return the kernels as the products of a step read them, that of h first."""
    device = kernel.device
    tiling = _tiling(spec, kind, device, kernel.dtype)
    parts = [
        product.frames(device, conv, weights, tiling.depth, channels=product.operand_channels(tiling, conv.C))
        for conv, weights in ((spec.recurrent, recurrent_kernel), (spec.input, kernel))
    ]
    return product.pack(device, tiling, (recurrent_kernel, kernel), parts, 4 * spec.F, gates=True)


def _tiling(spec: ConvLSTMSpec, kind: int, device: Device, dtype: np.dtype) -> product.Tiling:
    return product.choose(kind, dtype, device.multiprocessors, spec.B * spec.HO * spec.WO, 4 * spec.F)


class _Forward:
    """The memory of one forward pass, and its launches."""

    def __init__(
        self, spec: ConvLSTMSpec, codes: tuple[int, int, int], device: Device, dtype: np.dtype, kind: int,
        mask: DeviceArray | None, peepholes: dict[str, DeviceArray] | None, save: bool,
    ):  # fmt: skip
        self.spec, self.codes, self.device, self.dtype, self.kind = spec, codes, device, dtype, kind
        self.mask, self.peepholes = mask, peepholes
        self.frame = spec.HO * spec.WO * spec.F
        self.pixels = spec.B * spec.HO * spec.WO
        self.output = device.empty(spec.output_shape, dtype)
        self.h_last, self.c_last = (device.empty(spec.state_shape, dtype) for _ in range(2))
        self.h_states = self.c_states = self.z = None
        if save:
            slots = spec.B, spec.T + 1, *spec.state_shape[1:]
            self.h_states, self.c_states = (
                States(device.empty(slots, dtype), self.frame, spec.go_backwards) for _ in range(2)
            )
            self.z = device.empty((spec.B, spec.T, spec.HO, spec.WO, 4, spec.F), dtype)

    def run(
        self, x: DeviceArray, kernel: DeviceArray, recurrent_kernel: DeviceArray, packed: DeviceArray | None,
        bias: DeviceArray | None, h: DeviceArray | None, c: DeviceArray | None,
    ) -> None:  # fmt: skip
        """Launch all steps; the kernels are not looked at where they are packed already."""
        spec, device = self.spec, self.device
        tiling = _tiling(spec, self.kind, device, self.dtype)
        frame_x, channels = spec.input.H * spec.input.W, spec.input.C
        data, channels = product.operands(device, tiling, x)
        x_frames = product.frames(device, spec.input, data, tiling.depth, stride=spec.T * frame_x * channels,
                                  channels=channels)  # fmt: skip
        short = tiling.kind >= KINDS["bfloat16"]
        h_channels = product.operand_channels(tiling, spec.F)
        anything = device.empty((1,), tiling.operand) if short else x
        h_frames = product.frames(device, spec.recurrent, anything, tiling.depth, channels=h_channels)
        weights = _packed(spec, self.kind, kernel, recurrent_kernel) if packed is None else packed
        short_states = None
        if short:
            shape = *spec.state_shape[:3], h_channels
            first = device.zeros(shape, np.uint16) if h is None else product.operands(device, tiling, h)[0]
            short_states = [first, device.zeros(shape, np.uint16)]
        between = None
        if self.h_states is None:
            kinds = 2 if self.mask is not None or not spec.return_sequences else 1
            between = [device.empty((kinds, *spec.state_shape), self.dtype) for _ in range(min(2, spec.T - 1))]
        macros = step_macros(self.dtype, self.codes)
        x_rest = x_frames.arguments()[1:]
        h_rests: dict[Any, tuple[Any, ...]] = {}
        common = (*int32(tiling.padded(4 * spec.F), self.pixels, spec.HO, spec.WO, spec.F), bias)
        z_stride, h_width = np.int64(spec.T * 4 * self.frame), np.int32(h_channels)
        peepholes, cell = cell_arguments(spec, self.dtype, self.peepholes, self.codes)
        weights_x = offset(weights, h_frames.blocks * tiling.depth * tiling.padded(4 * spec.F))
        for states, initial in ((self.h_states, h), (self.c_states, c)):
            if states is not None:
                slot = states.before(spec.source_step(0))
                copy(device, initial, self.frame, slot, states.stride, self.frame, spec.B)
        for t in range(spec.T):
            source = spec.source_step(t)
            h_old, h_new = self._h(t, h, between)
            c_old, c_new = self._c(t, c, between)
            y_old, y_new, y_stride = self._y(t)
            read, stride, left_out = h_old[0] or anything, h_old[1], h_old[0] is None
            written = None
            if short_states is not None:
                read, stride = short_states[t % 2], spec.HO * spec.WO * h_channels
                written = short_states[1 - t % 2]
            key = stride, read.pointer % 16, left_out
            if key not in h_rests:
                h_rests[key] = h_frames.rest(read, stride, left_out=left_out)
            product.multiply(
                device, "convlstm2d_step", tiling, macros, self.pixels, 4 * spec.F,
                read, *h_rests[key], offset(data, source * frame_x * channels), *x_rest,
                weights_x if left_out else weights, *common,
                *_strided(h_old), *_strided(h_new), *_strided(c_old), *_strided(c_new),
                y_old, y_new, np.int64(y_stride),
                None if self.z is None else offset(self.z, source * 4 * self.frame), z_stride, written, h_width,
                *peepholes, None if self.mask is None else offset(self.mask, source), *cell,
            )  # fmt: skip
        for states, last in ((self.h_states, self.h_last), (self.c_states, self.c_last)):
            if states is not None:
                slot = states.after(spec.source_step(spec.T - 1))
                copy(device, slot, states.stride, last, self.frame, self.frame, spec.B)

    @property
    def results(self) -> tuple[DeviceArray | None, ...]:
        """The output, the last h and c, and the states and pre-activations that backward needs."""
        states = (None if states is None else states.array for states in (self.h_states, self.c_states))
        return self.output, self.h_last, self.c_last, *states, self.z

    def _h(
        self, t: int, h: DeviceArray | None, between: list[DeviceArray] | None
    ) -> tuple[tuple[DeviceArray | None, int], tuple[DeviceArray, int]]:
        """Return h before and after a step, each with its stride from image to image."""
        spec, frame = self.spec, self.frame
        if self.h_states is not None:
            source = spec.source_step(t)
            old = None if t == 0 and h is None else self.h_states.before(source)
            return (old, self.h_states.stride), (self.h_states.after(source), self.h_states.stride)

        def after(step: int) -> tuple[DeviceArray | None, int]:
            if step < 0:
                return h, frame
            if step == spec.T - 1:
                return self.h_last, frame
            if between is None or between[0].shape[0] == 1:
                return offset(self.output, step * frame), spec.T * frame
            return offset(between[step % 2], spec.B * frame), frame

        new, stride = after(t)
        assert new is not None
        return after(t - 1), (new, stride)

    def _c(
        self, t: int, c: DeviceArray | None, between: list[DeviceArray] | None
    ) -> tuple[tuple[DeviceArray | None, int], tuple[DeviceArray, int]]:
        """Return c before and after a step, each with its stride."""
        if self.c_states is not None:
            source, stride = self.spec.source_step(t), self.c_states.stride
            return (self.c_states.before(source), stride), (self.c_states.after(source), stride)
        assert between is not None
        new = self.c_last if t == self.spec.T - 1 else between[t % 2]
        return (between[(t - 1) % 2] if t else c, self.frame), (new, self.frame)

    def _y(self, t: int) -> tuple[DeviceArray | None, DeviceArray | None, int]:
        """Return the output of the step before and of this one where it is not h that is kept there, and its stride."""
        spec, frame = self.spec, self.frame
        if not spec.return_sequences:
            wanted = self.mask is not None or t == spec.T - 1
            return self.output if t else None, self.output if wanted else None, frame
        if self.mask is None and self.h_states is None and t < spec.T - 1:  # h itself
            return None, None, 0
        return offset(self.output, (t - 1) * frame) if t else None, offset(self.output, t * frame), spec.T * frame


def convlstm2d_backward(
    spec: ConvLSTMSpec, saved: Saved, dy: DeviceArray | None, dh: DeviceArray | None, dc: DeviceArray | None
) -> dict[str, Any]:
    """Pull gradients of the output, the last h and the last c back through time: see `recurrence.backward`.

    "h" and "c" are None where no initial state was given.
    """
    if not spec.B:
        return _empty_gradients(spec, saved)

    def compute(*arrays: Any) -> dict[str, Any]:
        *others, dy, dh, dc = arrays
        return _gradients(spec, saved.with_arrays(others), dy, dh, dc)

    device, dtype = saved.x.device, saved.x.dtype
    key = "convlstm2d_backward", spec, saved.kind, dtype, saved.given_state
    gradients: dict[str, Any] = recorded.call(device, key, (*saved.arrays(), dy, dh, dc), compute)
    return gradients


def _gradients(
    spec: ConvLSTMSpec, saved: Saved, dy: DeviceArray | None, dh: DeviceArray | None, dc: DeviceArray | None
) -> dict[str, Any]:
    x = saved.x
    device, dtype = x.device, x.dtype
    pixels, frame = spec.B * spec.HO * spec.WO, spec.HO * spec.WO * spec.F
    kind = product.backward_kind(saved.kind)
    codes = packing.activation_codes(spec)
    assert codes is not None
    tiling = product.choose(kind, dtype, device.multiprocessors, pixels, spec.F)
    dz = device.empty((spec.B, spec.T, spec.HO, spec.WO, 4 * spec.F), dtype)
    frames = product.transposed_frames(device, spec.recurrent, dz, tiling.depth, stride=spec.T * 4 * frame)
    weights = product.pack(device, tiling, (saved.recurrent_kernel,), [frames], spec.F, transposed=True)
    dc_states = [device.empty(spec.state_shape, dtype) for _ in range(min(2, spec.T))]
    carries: tuple[DeviceArray | None, ...] = (None, None)
    if saved.mask is not None:
        carries = device.zeros(spec.state_shape, dtype), device.zeros(spec.state_shape, dtype)
    last = spec.T - 1
    macros = step_macros(dtype, codes)
    rest, none = (frames.rest(dz, frames.stride, left_out=left_out) for left_out in (False, True))
    common = int32(tiling.padded(spec.F), pixels, spec.HO, spec.WO, spec.F)
    z_stride, c_stride = np.int64(spec.T * 4 * frame), np.int64(saved.c.stride)
    peepholes, cell = cell_arguments(spec, dtype, saved.peephole, codes)
    for t in reversed(range(spec.T)):
        source = spec.source_step(t)
        after = spec.source_step(min(t + 1, last))
        now: tuple[DeviceArray | None, int] = (dy, frame) if t == last else (None, frame)
        if spec.return_sequences and dy is not None:
            now = offset(dy, t * frame), spec.T * frame
        product.multiply(
            device, "convlstm2d_step_backward", tiling, macros, pixels, spec.F,
            offset(dz, after * 4 * frame), *(none if t == last else rest), weights, *common, *_strided(now),
            dh if t == last else None, dc if t == last else dc_states[(t + 1) % 2], *carries,
            dc_states[t % 2],
            offset(saved.z, source * 4 * frame), z_stride, saved.c.before(source), c_stride,
            offset(dz, source * 4 * frame), z_stride,
            *peepholes, None if saved.mask is None else offset(saved.mask, source), *cell,
        )  # fmt: skip
    dh_first = None
    if saved.given_state:
        step = offset(dz, spec.source_step(0) * 4 * frame)
        dh_first = input_gradient(spec.recurrent, kind, saved.recurrent_kernel, step, stride=spec.T * 4 * frame,
                                  residual=carries[0])  # fmt: skip
    dx = input_gradient(spec.input.with_batch(spec.B * spec.T), kind, saved.kernel, dz)
    slots = offset(saved.h.array, saved.h.first * frame)
    return {
        "x": dx.reshape(*x.shape),
        "kernel": weight_gradient(spec.input, kind, x, dz, mask=saved.mask),
        "recurrent_kernel": weight_gradient(spec.recurrent, kind, slots, dz, inner=spec.T,
                                            strides=(saved.h.stride, frame)),
        "bias": column_sums(dz.reshape(pixels * spec.T, 4 * spec.F)),
        "h": dh_first,
        "c": dc_states[0] if saved.given_state else None,
        "peephole": None if saved.peephole is None else _peephole_gradients(spec, saved, dz),
        "normalization": None,
    }  # fmt: skip


def step_macros(dtype: np.dtype, codes: tuple[int, int, int]) -> dict[str, int | str]:
    """Return the macros of the kernels of one step: the usual activations are compiled in."""
    return {"REAL": product.real(dtype), "STANDARD": int(codes == packing.STANDARD)}


def cell_arguments(
    spec: ConvLSTMSpec, dtype: np.dtype, peepholes: Mapping[str, DeviceArray] | None, codes: tuple[int, int, int]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the arguments that tell the kernels of a step what the cell does: those before and after the mask."""
    weights = [None if peepholes is None else peepholes[gate] for gate in PEEPHOLE_GATES]
    stride = spec.F if spec.peephole == "elementwise" else 0
    return (*weights, np.int32(stride)), (np.int32(spec.T), dtype.type(spec.cell_clip or 0), *int32(*codes))


def copy(
    device: Device, source: DeviceArray | None, stride: int, target: DeviceArray, target_stride: int, count: int,
    images: int,
) -> None:  # fmt: skip
    """Copy `count` elements of each image, zeros where there is no source."""
    kernel = device.kernel("elementwise.cu", "copy", product.element_macros(target.dtype))
    strides = np.int64(stride), np.int64(target_stride)
    over(device, kernel, count * images, source, strides[0], target, strides[1], np.int64(count), np.int32(images))


def _codes(
    spec: ConvLSTMSpec, normalization: Mapping[str, Weights] | None, dropout: Mapping[str, Weights] | None
) -> tuple[int, int, int]:
    """Return the activations' codes; raise NotImplementedError for what the kernels do not know."""
    codes = packing.activation_codes(spec)
    unknown = {
        "normalization": spec.normalization is not None or normalization is not None,
        "dropout_masks": dropout is not None,
        "convolutional peepholes": spec.peephole == "conv",
        "activations of your own": codes is None,
    }
    for name, asked in unknown.items():
        if asked:
            raise NotImplementedError(f"convlstm2d: engine 'cuda' does not know {name}; pass engine='cpu'")
    assert codes is not None
    return codes


def _mask(device: Device, mask: Weights) -> DeviceArray:
    """Return a mask (B, T) as bytes on the device."""
    if isinstance(mask, DeviceArray):
        return replace(mask, dtype=np.dtype(np.uint8))
    return device.put(np.ascontiguousarray(mask, np.bool_).view(np.uint8))


def _strided(state: tuple[DeviceArray | None, int]) -> tuple[Any, ...]:
    return state[0], np.int64(state[1])


def _peephole_gradients(spec: ConvLSTMSpec, saved: Saved, dz: DeviceArray) -> dict[str, DeviceArray]:
    """Return the gradients of elementwise or channel peepholes."""
    device, dtype = dz.device, dz.dtype
    frame = saved.c.frame
    gradients = device.empty((3, frame), dtype)
    kernel = device.kernel("elementwise.cu", "peephole_gradient", product.element_macros(dtype))
    over(device, kernel, frame, dz, saved.c.array, *int32(spec.B, spec.T, saved.c.first, frame, spec.F), gradients)
    each = [replace(offset(gradients, n * frame), shape=spec.state_shape[1:]) for n in range(3)]
    if spec.peephole == "channel":
        each = [column_sums(part.reshape(spec.HO * spec.WO, spec.F)) for part in each]
    return dict(zip(PEEPHOLE_GATES, each, strict=True))


def _empty_gradients(spec: ConvLSTMSpec, saved: Saved) -> dict[str, Any]:
    """Return the gradients of an empty batch."""
    device, dtype = saved.x.device, saved.x.dtype

    def zeros(shape: Shape) -> DeviceArray:
        return device.zeros(shape, dtype)

    peepholes = None if saved.peephole is None else {gate: zeros(w.shape) for gate, w in saved.peephole.items()}
    dh, dc = (zeros(spec.state_shape) if saved.given_state else None for _ in range(2))
    return {"x": zeros(saved.x.shape), "kernel": zeros(saved.kernel.shape), "h": dh, "c": dc,
            "recurrent_kernel": zeros(saved.recurrent_kernel.shape), "bias": zeros((4 * spec.F,)),
            "peephole": peepholes, "normalization": None}  # fmt: skip
