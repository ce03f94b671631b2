"""A network as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastclstm.layers.base import Layer
from fastclstm.spec import Shape


def table(model: Layer, layers: Mapping[str, Layer], shapes: Sequence[Shape] | None, heading: str = "#") -> str:
    """Return a table of a model's layers by name: output shapes, where these are known, and numbers of parameters."""
    rows = [[heading, "layer", "parameters"]]
    rows += [[name, type(layer).__name__, f"{layer.num_parameters:,}"] for name, layer in layers.items()]
    if shapes is not None:
        for row, shape in zip(rows, ("output shape", *shapes), strict=True):
            row.insert(2, str(shape))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    heads, *lines = ("  ".join([*map(str.ljust, texts, widths), count.rjust(widths[-1])]) for *texts, count in rows)
    trainable = sum(array.size for array in model.trainable_parameters.values())
    megabytes = sum(array.nbytes for array in model.parameters.values()) / 1e6
    total = f"{model.num_parameters:,} parameters, {trainable:,} trainable, {megabytes:.1f} MB"
    return "\n".join([heads, rule, *lines, rule, total])
