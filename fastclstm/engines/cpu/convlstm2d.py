"""convlstm2d on the cpu engine: one kernel a time step convolves x and h, applies the gates and writes c and h.

What the kernels do not know (a caller's own activations, convolutions of the cell state, what training keeps) takes the
recurrence in NumPy over this engine's convolutions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from fastclstm.engines import recurrence
from fastclstm.engines.cpu import gates, sequence
from fastclstm.engines.cpu.conv2d import conv2d, conv2d_backward, team_size
from fastclstm.engines.cpu.flow import slots
from fastclstm.spec import ConvLSTMSpec

Arrays = dict[str, np.ndarray]


def convlstm2d(
    spec: ConvLSTMSpec,
    x: np.ndarray,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray | None,
    h: np.ndarray | None,
    c: np.ndarray | None,
    peephole: Arrays | None,
    mask: np.ndarray | None,
    *,
    normalization: Arrays | None = None,
    dropout: Arrays | None = None,
    algorithm: str = "auto",
    save: bool = False,
    out: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, recurrence.Saved | None]:
    """Run a ConvLSTM over x (B, T, H, W, C): output, last h, last c and, with `save`, what backward needs.

    `out` are arrays for the last h, whose memory the output of a single step shares, and the last c, which may be `c`.
    """
    m = sequence.choose("convlstm2d", (spec.recurrent, spec.input), algorithm, x.itemsize)
    if save or dropout is not None or not _is_fused(spec):
        convolution = partial(conv2d, algorithm="auto" if m else "direct")
        arguments = x, kernel, recurrent_kernel, bias, h, c, peephole, mask
        return recurrence.forward(
            spec, convolution, *arguments, normalization=normalization, dropout=dropout, save=save, out=out
        )
    dtype, state = x.dtype, spec.state_shape
    h_first = np.zeros(state, dtype) if h is None else h
    c_first = np.zeros(state, dtype) if c is None else c
    h_last, c_last = (np.empty(state, dtype), np.empty(state, dtype)) if out is None else out
    if m and c is not None and np.may_share_memory(c, c_last):
        c = sequence.kept_copy(c)
    # Where no step is skipped the outputs are the hidden states, and are kept only once.
    separate = np.empty(spec.output_shape, dtype) if mask is not None else None
    kept = spec.T if spec.return_sequences and mask is None else min(2, spec.T)
    h_states = h_last[:, np.newaxis] if kept == 1 else np.empty((spec.B, kept, *state[1:]), dtype)
    if c_last.size:
        _run_fused(spec, m, x, (recurrent_kernel, kernel), bias, h_first, c_first, peephole, mask, h_states, c_last,
                   separate, h is None)  # fmt: skip
    if kept > 1:
        h_last[...] = h_states[:, (spec.T - 1) % kept]
    output = separate if separate is not None else h_states if spec.return_sequences else h_last
    if out is None and np.may_share_memory(output, h_last):
        output = output.copy()
    trouble = np.isnan(c_last.min((1, 2, 3))) if m else np.zeros(0, np.bool_)
    if trouble.any():  # a tile spreads a NaN beyond its receptive field; a cell that it reached stays NaN
        again = convlstm2d(
            spec.with_batch(int(trouble.sum())), x[trouble], kernel, recurrent_kernel, bias,
            None if h is None else h[trouble], None if c is None else c[trouble], peephole,
            None if mask is None else mask[trouble], algorithm="direct",
        )  # fmt: skip
        for whole, part in zip((output, h_last, c_last), again, strict=False):
            whole[trouble] = part
    return output, h_last, c_last, None


def convlstm2d_backward(
    spec: ConvLSTMSpec,
    saved: recurrence.Saved,
    dy: np.ndarray | None,
    dh: np.ndarray | None,
    dc: np.ndarray | None,
) -> dict[str, Any]:
    """Pull gradients of the output, the last h and the last c back through time: see `recurrence.backward`."""
    return recurrence.backward(spec, conv2d_backward, saved, dy, dh, dc)


def _is_fused(spec: ConvLSTMSpec) -> bool:
    """Whether the kernels know everything that the cell does."""
    return spec.peephole != "conv" and spec.normalization is None and gates.activation_codes(spec) is not None


def _cell(spec: ConvLSTMSpec, peephole: Arrays | None) -> np.ndarray:
    codes = gates.activation_codes(spec)
    assert codes is not None
    cell = np.zeros(1, gates.CELL)
    record = cell[0]
    record["F"], record["gated"] = spec.F, 1
    record["standard"] = codes == (1, 0, 0) and peephole is None and spec.cell_clip is None
    record["recurrent_activation"], record["activation"], record["output_activation"] = codes
    record["clip"] = np.inf if spec.cell_clip is None else spec.cell_clip
    if peephole is not None:
        for gate in ("i", "f", "o"):
            record[f"peephole_{gate}"] = peephole[gate].ctypes.data
        record["peephole_pixel"] = spec.F if spec.peephole == "elementwise" else 0
    return cell


def _run_fused(
    spec: ConvLSTMSpec, m: int, x: np.ndarray, kernels: tuple[np.ndarray, np.ndarray], bias: np.ndarray | None,
    h_first: np.ndarray, c_first: np.ndarray, peephole: Arrays | None, mask: np.ndarray | None,
    h_states: np.ndarray, c_last: np.ndarray, output: np.ndarray | None, fresh: bool,
) -> None:  # fmt: skip
    cell = _cell(spec, peephole)
    scales = gates.SCALES if cell[0]["standard"] else np.ones(4)
    specs = (spec.recurrent, spec.input)
    team = team_size(spec.flops // spec.T)
    plan, columns = sequence.prepare(specs, kernels, bias, scales, m, team)
    if mask is not None:
        mask = np.ascontiguousarray(mask[:, ::-1] if spec.go_backwards else mask)
    sequence.run(
        plan, columns, cell, spec.B, spec.T, team,
        x=slots(x, spec.go_backwards), h=slots(h_states), h_first=slots(h_first), c=slots(c_last),
        c_first=slots(c_first), y=slots(output), fresh=fresh, mask=mask,
    )  # fmt: skip
