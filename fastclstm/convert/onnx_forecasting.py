"""Networks that read frames and make those that follow, in ONNX: how many is an input of the graph.

Where a forecaster reads its own frames, it is the body of a Scan over the steps, in which its layers take one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastclstm.convert.onnx_builder import LAST, Builder, Size, Value
from fastclstm.convert.onnx_export import Export
from fastclstm.convert.onnx_layers import convert_network, cut, join
from fastclstm.layers.container import told_of
from fastclstm.models.forecasting import Forecasting
from fastclstm.models.model import Model


def forecasting(e: Export, model: Forecasting, frames: Value, steps: Value) -> Value:
    """Return the `steps` frames (B, steps, H, W, C) that follow."""
    g, stages, reads = e.g, model._stages, model._reading
    if reads == "noise":
        raise NotImplementedError("to_onnx: inputs='noise' are drawn anew by each call, which has no counterpart in "
                                  "ONNX here; make the model with other inputs")  # fmt: skip
    if stages.tied and e.wants_states:
        raise ValueError("to_onnx: without a forecaster of its own the network reads the last frame twice, as the "
                         "encoder's and as the forecaster's, so that a stream cannot go on from the states; leave "
                         "states out")  # fmt: skip
    last = model.data_format == "channels_last"
    x = cut(e, model._cut, g.cast(frames if last else g.move(frames, 2, 4), e.dtype or model.dtype))
    read = g.slice(x, {1: (0, -1, 1)}) if stages.tied else x
    arrays = stages.to_forecaster(_run(e, "encoder", stages.encoder, [read]))
    if reads == "frames":
        first = g.slice(x, {1: (-1, LAST, 1)})
        first = replace(first, shape=(first.shape[0], 1, *first.shape[2:]))
        made = _step_by_step(e, stages.forecaster, first, arrays, steps)
    else:
        like, axes = (arrays[0], (1, 2)) if stages.mirrored else (x, (2, 3))
        sizes: list[Size] = [g.length(x, 0), steps, *(g.length(like, axis) for axis in axes)]
        start = g.full([*sizes, stages.inputs[-1] or 0], x.dtype)
        made, *_ = _run(e, "forecaster", stages.forecaster, [start, *arrays])
    made = join(e, model._join, made)
    return made if last else g.move(made, 4, 2)


def _step_by_step(e: Export, forecaster: Model, last: Value, arrays: Sequence[Value], steps: Value) -> Value:
    """Return the frames made one by one, each read at the next step.

    A Scan needs something to go over: zeros, added to the frames, as OpenVINO counts no steps that nobody reads.
    """

    def body(g: Builder, before: list[Value], items: list[Value]) -> tuple[list[Value], list[Value]]:
        read = g.elementwise("Add", before[0], g.reshape(items[0], [1] * before[0].rank))
        with e.inside(g):
            frame, *after = _run(e, "forecaster", forecaster, [read, *before[1:]])
        return [frame, *after], [g.squeeze(frame, 1)]

    _, (made,) = e.g.scan(body, [last, *arrays], [(e.g.full([steps], last.dtype), False)], [False])
    return e.g.transpose(made, (1, 0, 2, 3, 4))


def _run(e: Export, name: str, graph: Model, values: Sequence[Value]) -> list[Any]:
    """Return what a graph makes of values, whose shapes its inputs stand for."""
    with e.at(name), told_of(name):
        return list(convert_network(e, graph, values if len(values) > 1 else values[0]))
