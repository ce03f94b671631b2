"""convlstm2d on the cuda engine: one kernel a time step convolves h and x, applies the gates and writes c and h.

backward.py is the way back through time, from what `Saved` holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastclstm.engines import remembered
from fastclstm.engines.cuda import choice, packing, persistent, product, recorded
from fastclstm.engines.cuda.conv2d import Weights
from fastclstm.engines.cuda.device import Device, DeviceArray
from fastclstm.engines.cuda.product import KINDS, int32, offset, on_device, over
from fastclstm.spec import PEEPHOLE_GATES, ConvLSTMSpec

Pair = tuple[DeviceArray | None, DeviceArray | None]


@dataclass(frozen=True)
class Saved:
    """What the way back needs of the forward pass."""

    x: DeviceArray
    """As the products of the way back read it: (B, T, H, W, C), for bfloat16 in 16 bits with padded channels."""
    kernel: DeviceArray
    recurrent_kernel: DeviceArray
    bias: DeviceArray | None
    peephole: dict[str, DeviceArray] | None
    mask: DeviceArray | None
    algorithm: str
    first: Pair
    """The initial h and c, where they were given."""
    length: int
    """Steps of a piece: pieces are taken forward again where what all steps leave is not, or no longer, there."""
    starts: tuple[DeviceArray, DeviceArray]
    """h and c (pieces - 1, B, HO, WO, F) at which pieces begin, but the first."""
    kept: list[Kept] = field(default_factory=list)
    """What all steps leave, until the way back uses it up."""

    @property
    def given_state(self) -> bool:
        """Whether an initial state was given, so that its gradients are of use."""
        return any(state is not None for state in self.first)


@dataclass(frozen=True)
class Kept:
    """What every step leaves."""

    z: DeviceArray
    """Pre-activations (B, T, HO, WO, 4F) in the order of x, as the products of the way back read dz."""
    c: States
    h: States | None
    """Where the way back reads operands of 16 bits. Else it computes h from z and c, to the same digits."""


@dataclass(frozen=True)
class States:
    """States (B, T + 1, HO, WO, F) before and after every step, in the order of x; operands have padded channels."""

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

    save="states" keeps only some states, from which backward takes the steps between them forward again. For bfloat16 x
    may come in 16 bits, as `Saved` holds it.

    Raises
    ------
    NotImplementedError
        The cell has normalization, dropout masks, convolutional peepholes, activations of the caller's own or no
        input.
    """
    codes = _codes(spec, normalization, dropout)
    device, dtype = x.device, kernel.dtype
    kind = product.kind(device, dtype, algorithm)
    bias = None if bias is None else on_device(device, bias)
    peepholes = None if peephole is None else {name: on_device(device, peephole[name]) for name in PEEPHOLE_GATES}
    mask = None if mask is None else _mask(device, mask)
    if save:
        x = product.operands(device, product.backward_kind(kind), x)[0]
    length = piece_length(spec, kind, dtype) if save == "states" else spec.T
    packed = given_kernel = given_recurrent = None
    if not save and spec.B and isinstance(kernel, np.ndarray) and isinstance(recurrent_kernel, np.ndarray):
        packed = _packed_once(device, spec, kind, kernel, recurrent_kernel)
    else:
        given_kernel, given_recurrent = on_device(device, kernel), on_device(device, recurrent_kernel)

    def compute(*arrays: Any) -> tuple[Any, ...]:
        x, mask, kernel, recurrent_kernel, packed, bias, h, c, *weights = arrays
        given = dict(zip(PEEPHOLE_GATES, weights, strict=True)) if weights else None
        call = _Forward(spec, codes, x.device, dtype, kind, mask, given, length, keeps=save is True)
        if call.pixels:
            call.run(x, kernel, recurrent_kernel, packed, bias, h, c)
        return call.results

    arrays = x, mask, given_kernel, given_recurrent, packed, bias, h, c, *(peepholes or {}).values()
    if spec.B:
        key = "convlstm2d", spec, kind, dtype, x.dtype, length, save is True, persistent.allowed()
        results = recorded.call(device, key, arrays, compute)
    else:
        results = compute(*arrays)
    output, h_last, c_last, starts, kept = results
    saved = None
    if save:
        assert given_kernel is not None
        assert given_recurrent is not None
        saved = Saved(x, given_kernel, given_recurrent, bias, peepholes, mask, algorithm, (h, c), length, starts)
        if kept is not None:
            z, kept_c, kept_h = kept
            saved.kept.append(Kept(z, states_of(spec, kept_c), None if kept_h is None else states_of(spec, kept_h)))
    return output, h_last, c_last, saved


def _packed_once(
    device: Device, spec: ConvLSTMSpec, kind: int, kernel: np.ndarray, recurrent_kernel: np.ndarray
) -> DeviceArray:
    """Return NumPy's kernels as `_packed` does, on the device for as long as they stay what they are."""

    def make() -> DeviceArray:
        return _packed(spec, kind, device.put(kernel), device.put(recurrent_kernel))

    key = device, device.stream_key(), spec.input, spec.recurrent, kind  # sequences of any length
    packed: DeviceArray = remembered.remember((kernel, recurrent_kernel), key, make)
    return packed


def _packed(spec: ConvLSTMSpec, kind: int, kernel: DeviceArray, recurrent_kernel: DeviceArray) -> DeviceArray:
    """Return the kernels as the products of a step read them, that of x first."""
    device = kernel.device
    tiling, _ = _tiling(spec, kind, device, kernel.dtype)
    parts = [
        product.frames(device, conv, weights, tiling.depth, channels=product.operand_channels(kind, conv.C),
                       tile=tiling.tile)
        for conv, weights in ((spec.input, kernel), (spec.recurrent, recurrent_kernel))
    ]  # fmt: skip
    return product.pack(device, tiling, (kernel, recurrent_kernel), parts, 4 * spec.F, gates=True)


def _tiling(spec: ConvLSTMSpec, kind: int, device: Device, dtype: np.dtype) -> tuple[product.Tiling, int]:
    """Return the tiling of a step's product, and into how many shares its depth is best cut."""
    depth = sum(conv.KH * conv.KW * product.operand_channels(kind, conv.C) for conv in (spec.input, spec.recurrent))
    return choice.choose_cut(
        kind, dtype, device, spec.B * spec.HO * spec.WO, 4 * spec.F, depth, frame=(spec.HO, spec.WO),
        windows=[product.window(spec.input), product.window(spec.recurrent)],
    )  # fmt: skip


def _cut(x: product.Frames, h: product.Frames, shares: int) -> tuple[int, int, int]:
    """Return the blocks of depth of the first share and of each other one, and how many shares there are.

    Where a tile keeps its halo shares are whole chunks; none are cut where those of x and of h cannot be counted alike.
    """
    unit, before = 1, 0
    if x.halo is not None and h.halo is not None:
        unit = h.halo.chunk
        if x.blocks <= x.halo.chunk:
            before = x.blocks
        elif x.halo.chunk != unit or x.blocks % unit:
            shares = 1
    units = -(-(x.blocks + h.blocks - before) // unit)
    share = -(-units // shares)
    return before + share * unit, share * unit, -(-units // share)


def piece_length(spec: ConvLSTMSpec, kind: int, dtype: np.dtype) -> int:
    """Return the steps of a piece for which states where pieces begin and what a piece takes are smallest together."""
    operand = product.operand_type(product.backward_kind(kind), dtype).itemsize
    frame, frame_x = spec.HO * spec.WO * spec.F, spec.input.H * spec.input.W * spec.input.C
    step = frame * (4 * operand + 2 * dtype.itemsize) + frame_x * (operand + dtype.itemsize)  # z, c and dy; x and dx
    if operand != dtype.itemsize or spec.peephole is not None:
        step += frame * operand  # h beside c
    sizes = [2 * (-(-spec.T // n) - 1) * frame * dtype.itemsize + n * step for n in range(1, spec.T + 1)]
    return sizes.index(min(sizes)) + 1


class _Forward:
    """The memory of one forward pass, and its launches."""

    def __init__(
        self, spec: ConvLSTMSpec, codes: tuple[int, int, int], device: Device, dtype: np.dtype, kind: int,
        mask: DeviceArray | None, peepholes: dict[str, DeviceArray] | None, length: int, *, keeps: bool,
    ):  # fmt: skip
        self.spec, self.codes, self.device, self.dtype, self.kind = spec, codes, device, dtype, kind
        self.mask, self.peepholes, self.length = mask, peepholes, length
        self.frame = spec.HO * spec.WO * spec.F
        self.pixels = spec.B * spec.HO * spec.WO
        self.output = device.empty(spec.output_shape, dtype)
        self.h_last, self.c_last = (device.empty(spec.state_shape, dtype) for _ in range(2))
        starts = -(-spec.T // length) - 1, *spec.state_shape
        self.starts = device.empty(starts, dtype), device.empty(starts, dtype)
        self.kept = None
        if keeps:
            kind = product.backward_kind(kind)
            channels = product.operand_channels(kind, 4 * spec.F)
            shape = spec.B, spec.T, spec.HO, spec.WO, channels
            z = product.operand_memory(device, shape, 4 * spec.F, product.operand_type(kind, dtype))
            c, h = empty_states(device, spec, spec.F, dtype), None
            if z.dtype != dtype:
                h = empty_states(device, spec, product.operand_channels(kind, spec.F), z.dtype)
            self.kept = Kept(z, c, h)

    @property
    def results(self) -> tuple[Any, ...]:
        """The output, the last h and c, the states where pieces begin and, if it is kept, what every step leaves."""
        kept = self.kept
        arrays = None if kept is None else (kept.z, kept.c.array, None if kept.h is None else kept.h.array)
        return self.output, self.h_last, self.c_last, self.starts, arrays

    def run(
        self, x: DeviceArray, kernel: DeviceArray, recurrent_kernel: DeviceArray, packed: DeviceArray | None,
        bias: DeviceArray | None, h: DeviceArray | None, c: DeviceArray | None,
    ) -> None:  # fmt: skip
        """Launch all steps; the kernels are not looked at where they are packed already."""
        spec, device = self.spec, self.device
        tiling, shares = _tiling(spec, self.kind, device, self.dtype)
        frame_x = spec.input.H * spec.input.W
        data, channels = product.operands(device, self.kind, x)
        x_frames = product.frames(device, spec.input, data, tiling.depth, stride=spec.T * frame_x * channels,
                                  channels=channels, tile=tiling.tile)  # fmt: skip
        short = tiling.kind >= KINDS["bfloat16"]
        h_channels = product.operand_channels(self.kind, spec.F)
        anything = device.empty((1,), product.operand_type(self.kind, self.dtype)) if short else x
        h_frames = product.frames(device, spec.recurrent, anything, tiling.depth, channels=h_channels,
                                  tile=tiling.tile)  # fmt: skip
        weights = _packed(spec, self.kind, kernel, recurrent_kernel) if packed is None else packed
        macros = step_macros(self.dtype, self.codes)
        peepholes, cell = cell_arguments(spec, self.dtype, self.peepholes, self.codes)
        saves = self.kept is not None or self.length < spec.T
        blocks = 0 if saves or shares > 1 else persistent.blocks(device, tiling, macros, spec, h_frames, x_frames)
        if blocks:
            persistent.run(self, tiling, macros, blocks, h_frames, x_frames, weights, bias, h, c, peepholes, cell)
            return
        short_frame = spec.HO * spec.WO * h_channels
        short_states, first = None, None
        if short:
            first = None if h is None else product.operands(device, self.kind, h)[0]
            if self.kept is None or self.kept.h is None:
                shape = *spec.state_shape[:3], h_channels
                short_states = [first or device.zeros(shape, np.uint16), device.zeros(shape, np.uint16)]
        wanted = self.mask is not None or not spec.return_sequences, self.kept is None
        between_h, between_c = (
            [device.empty(spec.state_shape, self.dtype) for _ in range(min(2, spec.T - 1) if needed else 0)]
            for needed in wanted
        )
        first_share, share, shares = _cut(x_frames, h_frames, shares)
        cut = shares > 1
        partial = device.empty((shares, *spec.state_shape, 4), self.dtype) if cut else None
        of_shares = None
        if cut:
            of_shares = device.kernel("shares.cu", "convlstm2d_step_of_shares", {**macros, **dict(tiling.macros)})
        x_rest = x_frames.arguments()[1:]
        h_rests: dict[Any, tuple[Any, ...]] = {}
        sizes = int32(self.pixels, spec.HO, spec.WO, spec.F)
        padded = np.int32(tiling.padded(4 * spec.F))
        z, z_frame, z_channels = None, 0, 0
        if self.kept is not None:
            z, z_channels = self.kept.z, self.kept.z.shape[-1]
            z_frame = spec.HO * spec.WO * z_channels
            slot = self.kept.c.before(spec.source_step(0))
            copy(device, c, self.frame, slot, self.kept.c.stride, self.frame, spec.B)
            if self.kept.h is not None:
                slot = self.kept.h.before(spec.source_step(0))
                copy(device, first, short_frame, slot, self.kept.h.stride, short_frame, spec.B)
        for t in range(spec.T):
            source = spec.source_step(t)
            h_old, h_new = self._h(t, h, between_h)
            c_old, c_new = self._c(t, c, between_c)
            y_old, y_new, y_stride = self._y(t)
            read, stride, left_out = h_old[0] or anything, h_old[1], h_old[0] is None
            written = None
            if short_states is not None:
                read, written, stride = short_states[t % 2], short_states[1 - t % 2], short_frame
            elif self.kept is not None and self.kept.h is not None:
                states = self.kept.h
                read, written, stride = states.before(source), states.after(source), states.stride
            key = stride, read.pointer % 16, left_out
            if key not in h_rests:
                h_rests[key] = h_frames.rest(read, stride, left_out=left_out)
            operands = (read, *h_rests[key], offset(data, source * frame_x * channels), *x_rest, weights, padded)
            rest = (
                bias, *strided(h_old), *strided(h_new), *strided(c_old), *strided(c_new),
                y_old, y_new, np.int64(y_stride),
                None if z is None else offset(z, source * z_frame), np.int64(spec.T * z_frame),
                np.int32(z_channels), written, np.int64(stride), np.int32(h_channels),
                *peepholes, None if self.mask is None else offset(self.mask, source), *cell,
            )  # fmt: skip
            if cut:
                product.multiply(
                    device, "convlstm2d_products", tiling, macros, self.pixels, 4 * spec.F, *operands, *sizes, partial,
                    *int32(first_share, share), shares=shares, source="shares.cu",
                )  # fmt: skip
                over(device, of_shares, self.pixels * spec.F, partial, np.int32(shares), *sizes, *rest)
            else:
                product.multiply(device, "convlstm2d_step", tiling, macros, self.pixels, 4 * spec.F, *operands, *sizes,
                                 *rest)  # fmt: skip
            if (t + 1) % self.length == 0 and t + 1 < spec.T:
                n = (t + 1) // self.length - 1
                for (state, stride), starts in zip((h_new, c_new), self.starts, strict=True):
                    start = offset(starts, n * spec.B * self.frame)
                    copy(device, state, stride, start, self.frame, self.frame, spec.B)
        if self.kept is not None:
            last = self.kept.c.after(spec.source_step(spec.T - 1))
            copy(device, last, self.kept.c.stride, self.c_last, self.frame, self.frame, spec.B)

    def _h(
        self, t: int, h: DeviceArray | None, between: list[DeviceArray]
    ) -> tuple[tuple[DeviceArray | None, int], tuple[DeviceArray, int]]:
        """Return h before and after a step, each with its stride from image to image."""
        spec, frame = self.spec, self.frame

        def after(step: int) -> tuple[DeviceArray | None, int]:
            if step < 0:
                return h, frame
            if step == spec.T - 1:
                return self.h_last, frame
            if not between:
                return offset(self.output, step * frame), spec.T * frame
            return between[step % 2], frame

        new, stride = after(t)
        assert new is not None
        return after(t - 1), (new, stride)

    def _c(
        self, t: int, c: DeviceArray | None, between: list[DeviceArray]
    ) -> tuple[tuple[DeviceArray | None, int], tuple[DeviceArray, int]]:
        """Return c before and after a step, each with its stride."""
        if self.kept is not None:
            source, states = self.spec.source_step(t), self.kept.c
            return (states.before(source), states.stride), (states.after(source), states.stride)
        new = self.c_last if t == self.spec.T - 1 else between[t % 2]
        return (between[(t - 1) % 2] if t else c, self.frame), (new, self.frame)

    def _y(self, t: int) -> tuple[DeviceArray | None, DeviceArray | None, int]:
        """Return the output of the step before and of this one where it is not h that is kept there, and its stride."""
        spec, frame = self.spec, self.frame
        if not spec.return_sequences:
            wanted = self.mask is not None or t == spec.T - 1
            return self.output if t else None, self.output if wanted else None, frame
        if self.mask is None and t < spec.T - 1:  # h itself
            return None, None, 0
        return offset(self.output, (t - 1) * frame) if t else None, offset(self.output, t * frame), spec.T * frame


def empty_states(device: Device, spec: ConvLSTMSpec, channels: int, dtype: np.dtype) -> States:
    """Return memory for states, or for operands of more channels."""
    shape = spec.B, spec.T + 1, spec.HO, spec.WO, channels
    return states_of(spec, product.operand_memory(device, shape, spec.F, dtype))


def states_of(spec: ConvLSTMSpec, array: DeviceArray) -> States:
    """Return the states that an array (B, T + 1, HO, WO, channels) holds."""
    return States(array, spec.HO * spec.WO * array.shape[-1], spec.go_backwards)


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
    """Copy `count` elements of each image, zeros where there is no source; 16-bit ones, padded to 8, two at a time."""
    if target.dtype == np.uint16:
        source, target = None if source is None else _in_twos(source), _in_twos(target)
        stride, target_stride, count = stride // 2, target_stride // 2, count // 2
    kernel = device.kernel("elementwise.cu", "copy", product.element_macros(target.dtype))
    strides = np.int64(stride), np.int64(target_stride)
    over(device, kernel, count * images, source, strides[0], target, strides[1], np.int64(count), np.int32(images))


def _in_twos(array: DeviceArray) -> DeviceArray:
    return replace(array, shape=(array.size // 2,), dtype=np.dtype(np.float32))


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
        "frames without channels": spec.input.C == 0,
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


def strided(state: tuple[DeviceArray | None, int]) -> tuple[Any, ...]:
    """Return a state and its stride as arguments of a kernel."""
    return state[0], np.int64(state[1])
