"""Networks as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastclstm.layers.base import Layer
from fastclstm.layers.symbolic import Known, leaves
from fastclstm.models.graph import Graph, Slot, filled, slots
from fastclstm.spec import Shape


def table(model: Layer, layers: Mapping[str, Layer], shapes: Sequence[Shape] | None, heading: str = "#") -> str:
    """Return a table of a model's layers by name: output shapes, where these are known, and numbers of parameters."""
    rows = [[heading, "layer", "parameters"]]
    rows += [[name, type(layer).__name__, f"{layer.num_parameters:,}"] for name, layer in layers.items()]
    if shapes is not None:
        for row, shape in zip(rows, ("output shape", *shapes), strict=True):
            row.insert(2, str(shape))
    return _drawn(rows, len(rows[0]) - 1, model)


def connections(model: Layer, graph: Graph, inputs: Mapping[str, Slot], shapes: Mapping[Slot, Known]) -> str:
    """Return a table of a graph's calls: output shapes, numbers of parameters, and the names of what each one reads."""
    rows = [["layer", "type", "output shape", "parameters", "connected to"]]
    rows += [[name, "Input", str(shapes[slot]), "0", ""] for name, slot in inputs.items()]
    sources, seen = {slot: name for name, slot in inputs.items()}, set()
    for step in graph.steps:
        count = "shared" if step.name in seen else f"{step.layer.num_parameters:,}"
        read = dict.fromkeys(sources[slot] for slot in leaves((step.x, step.options)) if slot in sources)
        rows.append([step.name, type(step.layer).__name__, str(filled(step.y, shapes)), count, ", ".join(read)])
        sources |= dict.fromkeys(slots(step.y), step.name)
        seen.add(step.name)
    return _drawn(rows, 3, model)


def _drawn(rows: Sequence[Sequence[str]], number: int, model: Layer) -> str:
    """Return rows under their headings, the first, over the sum of all parameters; column `number` has numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    heads, *lines = (
        "  ".join(text.rjust(width) if n == number else text.ljust(width)
                  for n, (text, width) in enumerate(zip(texts, widths, strict=True))).rstrip()
        for texts in rows
    )  # fmt: skip
    trainable = sum(array.size for array in model.trainable_parameters.values())
    megabytes = sum(array.nbytes for array in model.parameters.values()) / 1e6
    total = f"{model.num_parameters:,} parameters, {trainable:,} trainable, {megabytes:.1f} MB"
    return "\n".join([heads, rule, *lines, rule, total])
