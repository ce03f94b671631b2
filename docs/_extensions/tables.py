"""Tables that are read from the code, so that they cannot drift from it: ``registry`` and ``commands``."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import nested_parse_with_titles

import fastclstm

Rows = tuple[list[str], list[list[str]]]
CODE = "``{}``".format


def dialects() -> Rows:
    """Return the ConvLSTMs of PyTorch whose weights are read and written."""
    from fastclstm.convert.torch import DIALECTS

    return ["dialect", "convolutions of a cell", "gates", "peepholes", "normalization", "activation of g"], [
        [
            CODE(f'"{name}"'),
            " + ".join(CODE(f"{row.cells}.{conv}".lstrip(".")) for conv in (row.joint, *(row.split or ())) if conv),
            "by name" if any("{gate}" in conv for conv in (row.joint, *(row.split or ())) if conv)
            else " ".join(row.gates) or "to be told: ``gates=``",
            _peepholes(row),
            _normalization(row),
            " or ".join(row.activations),
        ]
        for name, row in DIALECTS.items()
    ]  # fmt: skip


def _peepholes(row: Any) -> str:
    if not row.peephole:
        return "–"
    return ", ".join(map(CODE, dict.fromkeys(row.peephole))) + (", if stored" if row.peephole_optional else "")


def _normalization(row: Any) -> str:
    if row.normalization is None:
        return "–"
    return row.normalization.kind + (", if stored" if row.norms_optional else "")


def refused() -> Rows:
    """Return what is recognized, and refused."""
    from fastclstm.convert.torch import DIALECTS

    return ["dialect", "why"], [[CODE(f'"{name}"'), row.refusal] for name, row in DIALECTS.items() if row.refusal]


def gru_dialects() -> Rows:
    """Return the ConvGRUs of PyTorch."""
    from fastclstm.convert.torch import GRU_DIALECTS

    def named(row: Any, convolutions: Iterable[str]) -> str:
        return ", ".join(CODE(f"{row.cells}.{conv}".lstrip(".")) for conv in convolutions)

    return ["dialect", "gates", "candidate", "keeps", "reset", "normalization"], [
        [
            CODE(f'"{name}"'),
            named(row, row.gates) + ("" if len(row.gates) == 2 else f" ({' '.join(row.order)})"),
            named(row, row.candidate) + f", {row.activation}",
            f"{row.keeps} of the old state",
            "after the convolution" if row.reset_after else "before it",
            f"group, {row.group_size} channels" if row.norms else "–",
        ]
        for name, row in GRU_DIALECTS.items()
    ]


def keras() -> Rows:
    """Return Keras's layers, with ours."""
    from fastclstm.convert.keras_layers import ROWS

    def ours(name: str) -> str:
        if name in OTHERWISE:
            return OTHERWISE[name]
        like = name if hasattr(fastclstm, name) else name.removesuffix("1D")
        return f":obj:`~fastclstm.{like}`"

    return ["Keras", "here"], [[CODE(name), ours(name)] for name in ROWS]


OTHERWISE = {
    "Bidirectional": "the layer itself, with ``bidirectional=True``",
    "ELU": ":obj:`~fastclstm.Activation`",
}
"""What stands for a layer of Keras that has no namesake here."""


def onnx() -> Rows:
    """Return the layers that `to_onnx` writes, and those that it does not."""
    from fastclstm import layers, models
    from fastclstm.convert.onnx_layers import TABLE

    written = sorted({cls.__name__ for cls in TABLE})
    every = {name for room in (layers, models) for name in room.__all__ if isinstance(getattr(room, name), type)}
    left = sorted(
        name
        for name in every - set(written)
        if not any(issubclass(getattr(layers, name, object), cls) for cls in TABLE)
    )
    return ["written", "not in the table"], [[", ".join(written), ", ".join(left)]]


def nn() -> Rows:
    """Return the names of each part of training."""
    rooms = ("activations", "initializers", "normalization", "regularizers", "constraints", "losses", "metrics",
             "optimizers")  # fmt: skip
    return ["what", "names"], [
        [room, ", ".join(map(CODE, importlib.import_module(f"fastclstm.nn.{room}").TABLE))] for room in rooms
    ]


REGISTRIES = {function.__name__: function for function in (dialects, refused, gru_dialects, keras, onnx, nn)}


class Registry(SphinxDirective):
    """``.. registry:: NAME``: a table of what the code has under that name."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the table, whose cells are reStructuredText."""
        head, rows = REGISTRIES[self.arguments[0]]()
        lines = [".. list-table::", "   :header-rows: 1", "   :class: registry", ""]
        for row in [head, *rows]:
            lines += [f"   {'* ' if index == 0 else '  '}- {cell}" for index, cell in enumerate(row)]
        return parsed(self, lines)


class Commands(SphinxDirective):
    """``.. commands::``: the help of every command, as a terminal of 100 columns shows it."""

    def run(self) -> list[nodes.Node]:
        """Return a heading and a block for each command."""
        from typer.testing import CliRunner

        from fastclstm.commands import COMMANDS, app

        runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})
        lines: list[str] = []
        for name, what in COMMANDS.items():
            told = runner.invoke(app, [name, "--help"], prog_name="python -m fastclstm")
            lines += [name, "-" * len(name), "", what, "", ".. code-block:: text", ""]
            lines += [f"   {line}".rstrip() for line in told.output.strip().splitlines()] + [""]
        return parsed(self, lines)


def parsed(directive: SphinxDirective, lines: Iterable[str]) -> list[nodes.Node]:
    """Return the nodes of reStructuredText, headings included."""
    node = nodes.Element()
    text = StringList(list(lines), source=f"{directive.env.docname}: {directive.name}")
    nested_parse_with_titles(directive.state, text, node)
    return node.children


def setup(app: Any) -> dict[str, bool]:
    """Register the directives."""
    app.add_directive("registry", Registry)
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
