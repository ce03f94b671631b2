"""The pictures of *How it works*: SVG, drawn here and put into the page, so that it takes the page's colours.

``.. picture:: NAME`` puts in what the function of that name draws; its docstring is what is read aloud.

And pictures in files of which there is one for dark pages too: where Markdown has ``<picture>``, as GitHub wants it,
the page shows the one that suits its own switch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from docutils import nodes
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

Point = tuple[float, float]


class Sheet:
    """A sheet to draw on; lengths are pixels where the page is wide enough."""

    def __init__(self, width: int, height: int, label: str):
        self.width, self.height, self.label = width, height, label
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, kind: str = "box", radius: float = 3) -> None:
        """Draw a rectangle."""
        self.parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'
        )

    def grid(
        self, x: float, y: float, rows: int, columns: int, size: float, kind: str | Callable[[int, int], str]
    ) -> None:
        """Draw cells beside each other, of one kind or of one that depends on row and column."""
        for row in range(rows):
            for column in range(columns):
                what = kind if isinstance(kind, str) else kind(row, column)
                self.box(x + column * size, y + row * size, size - 1.5, size - 1.5, what, 2)

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> None:
        """Write a line."""
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>')

    def lines(self, x: float, y: float, texts: Iterable[str], kind: str = "", anchor: str = "middle") -> None:
        """Write lines below each other."""
        for row, text in enumerate(texts):
            self.text(x, y + 17 * row, text, kind, anchor)

    def arrow(self, *points: Point, kind: str = "arrow") -> None:
        """Draw a line through points that ends in a head."""
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path class="{kind}" d="M{path}" marker-end="url(#head)"/>')

    def labelled(
        self, x: float, y: float, width: float, height: float, texts: Sequence[str], kind: str = "box"
    ) -> None:
        """Draw a box with lines in its middle."""
        self.box(x, y, width, height, kind)
        self.lines(x + width / 2, y + height / 2 + 5 - 8.5 * (len(texts) - 1), texts)

    def __str__(self) -> str:
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>'
        )
        return (
            f'<div class="picture"><svg viewBox="0 0 {self.width} {self.height}" style="max-width:{self.width}px" '
            f'role="img" aria-label="{escape(self.label)}">{head}{"".join(self.parts)}</svg></div>'
        )


def fused_step(sheet: Sheet) -> None:
    """Operation by operation a step writes its pre-activations to memory and reads them; the fused step does not."""
    sheet.text(170, 22, "operation by operation", "title")
    sheet.text(550, 22, "fused", "title")
    sheet.parts.append('<path class="rule" d="M356 8 V356"/>')
    steps = (["convolve x"], ["convolve h, add"], ["split, σ and tanh"], ["c = f∘c + i∘g"], ["h = o∘tanh(c)"])
    memory = ("z: 4F", "z: 4F", "i f g o: 4F", "c: F", "h: F")
    for row, (step, kept) in enumerate(zip(steps, memory, strict=True)):
        y = 48 + 60 * row
        sheet.labelled(16, y, 150, 38, step)
        sheet.labelled(226, y, 112, 38, [kept], "memory")
        sheet.arrow((166, y + 19), (226, y + 19))
        if row < 4:
            sheet.arrow((282, y + 38), (282, y + 49), (91, y + 49), (91, y + 60))
    sheet.text(170, 372, "every arrow is a whole frame through memory", "note")
    sheet.box(390, 48, 212, 278, "cache")
    sheet.text(496, 68, "rows, in the core's caches", "note")
    for row, text in enumerate(
        ("convolve x and h", "add bias, normalize", "σ and tanh of registers", "c = f∘c + i∘g", "h = o∘tanh(c)")
    ):
        sheet.labelled(412, 82 + 48 * row, 168, 34, [text])
        if row < 4:
            sheet.arrow((496, 116 + 48 * row), (496, 130 + 48 * row))
    sheet.labelled(644, 82, 72, 34, ["x, h, c"], "memory")
    sheet.arrow((644, 99), (580, 99))
    sheet.labelled(644, 274, 72, 34, ["h, c"], "memory")
    sheet.arrow((580, 291), (644, 291))
    sheet.text(550, 372, "in once, out once", "note")


def winograd(sheet: Sheet) -> None:
    """Winograd's F(2×2, 3×3): a tile of 4×4 pixels is transformed, multiplied in 16 places, and transformed to 2×2."""
    sheet.grid(14, 74, 4, 4, 27, "box")
    sheet.lines(68, 204, ["4×4 pixels", "of x, or h"], "note")
    sheet.arrow((130, 128), (186, 128))
    sheet.text(158, 118, "Bᵀ d B", "note")
    sheet.grid(194, 74, 4, 4, 27, "accent")
    sheet.lines(248, 204, ["16 numbers", "a channel"], "note")
    sheet.text(319, 134, "∘", "title")
    sheet.grid(336, 74, 4, 4, 27, "weights")
    sheet.lines(390, 204, ["the kernel, G g Gᵀ:", "once for all steps"], "note")
    sheet.grid(336, 12, 3, 3, 15, "weights")
    sheet.text(390, 40, "3×3", "note", "start")
    sheet.arrow((359, 58), (359, 73))
    sheet.arrow((450, 128), (520, 128))
    sheet.text(485, 118, "Σ, Aᵀ m A", "note")
    sheet.grid(530, 101, 2, 2, 27, "result")
    sheet.lines(557, 204, ["2×2 sums,", "in registers"], "note")
    sheet.arrow((590, 128), (634, 128))
    sheet.labelled(640, 108, 76, 38, ["gates"])
    sheet.text(365, 262, "16 multiplications a channel instead of 2·2·9 = 36; F(4×4, 5×5) needs 64 instead of 400", "")


def lanes(sheet: Sheet) -> None:
    """Where filters are many a vector holds filters of one pixel; where they are few it holds pixels of one filter."""
    sheet.text(180, 22, "many filters: 64", "title")
    sheet.grid(20, 90, 4, 16, 20, lambda row, column: "accent" if row == 1 else "box")
    sheet.lines(180, 192, ["→ filters", "↓ pixels"], "note")
    sheet.text(180, 282, "one vector: 16 filters of a pixel", "note")
    sheet.text(550, 22, "few filters: 2", "title")
    sheet.grid(470, 44, 16, 2, 13, lambda row, column: "accent" if column == 0 else "box")
    sheet.lines(514, 130, ["→ filters", "↓ pixels of many tiles:", "each weight meets all"], "note", "start")
    sheet.text(550, 282, "one vector: 16 pixels of a filter", "note")


def tickets(sheet: Sheet) -> None:
    """Threads claim blocks of steps in order; a block waits for its neighbours of the step before, and for itself."""
    size, left, top, rows, columns = 46, 120, 48, 6, 9
    done = {(row, column): row + 6 * column < 28 for row in range(rows) for column in range(columns)}
    next_row, next_column = 4, 4

    def kind(row: int, column: int) -> str:
        if (row, column) == (next_row, next_column):
            return "result"
        if column == next_column - 1 and abs(row - next_row) <= 1:
            return "accent"
        return "done" if done[row, column] else "box"

    sheet.grid(left, top, rows, columns, size, kind)
    for column in range(columns):
        for row in range(rows):
            sheet.text(left + size * column + 22, top + size * row + 27, str(row + rows * column + 1), "note")
    sheet.text(left + size * columns / 2, 34, "time steps →")
    sheet.lines(60, 160, ["blocks", "of rows", "↓"])
    for row in (-1, 0, 1):
        y = top + size * (next_row + row) + 22
        sheet.arrow((left + size * next_column - 12, y), (left + size * next_column + 6, top + size * next_row + 22))
    legend = (("done", "computed"), ("accent", "what 29 waits for"), ("result", "the next ticket"), ("box", "to come"))
    for row, (what, text) in enumerate(legend):
        sheet.box(left + size * columns + 24, top + 20 + 34 * row, 20, 20, what)
        sheet.text(left + size * columns + 54, top + 35 + 34 * row, text, "", "start")
    sheet.text(
        left + size * columns / 2,
        348,
        "no barrier after a step: a thread without a processor holds up one block",
        "note",
    )


def memory(sheet: Sheet) -> None:
    """Peak memory of a training step, mmnist on two threads: PyTorch 995 MB, fastclstm 522, with recompute 155."""
    rows = (("PyTorch eager", 995, "memory"), ("fastclstm", 522, "accent"), ("recompute=True", 155, "result"))
    for row, (name, megabytes, kind) in enumerate(rows):
        y = 20 + 46 * row
        sheet.text(150, y + 20, name, "", "end")
        sheet.box(162, y, 0.46 * megabytes, 30, kind)
        sheet.text(172 + 0.46 * megabytes, y + 20, f"{megabytes} MB", "note", "start")


PICTURES: dict[str, tuple[Callable[[Sheet], None], int, int]] = {
    "fused_step": (fused_step, 730, 384),
    "winograd": (winograd, 730, 276),
    "lanes": (lanes, 730, 294),
    "tickets": (tickets, 730, 360),
    "memory": (memory, 730, 160),
}


class Picture(SphinxDirective):
    """``.. picture:: NAME``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the drawing as HTML; other builders get its description."""
        draw, width, height = PICTURES[self.arguments[0]]
        label = (draw.__doc__ or "").strip()
        if self.env.app.builder.format != "html":
            return [nodes.paragraph("", label)]
        sheet = Sheet(width, height, label)
        draw(sheet)
        return [nodes.raw("", str(sheet), format="html")]


class Twins(SphinxTransform):
    """Makes of HTML's ``<picture>`` two images, for light pages and for dark ones."""

    default_priority = 10

    def apply(self, **options: Any) -> None:
        """Replace them in a page."""
        for node in list(self.document.findall(nodes.raw)):
            told = re.fullmatch(r"\s*<picture>(.*)</picture>\s*", node.astext(), re.DOTALL)
            if told and node["format"] == "html":
                name = re.search(r'alt="(.*?)"', told[1])
                light, dark = re.search(r'\ssrc="(.*?)"', told[1]), re.search(r'srcset="(.*?)"', told[1])
                node.replace_self([
                    nodes.image(uri=uri[1], alt=name[1] if name else "", classes=[kind])
                    for uri, kind in ((light, "only-light"), (dark, "only-dark")) if uri
                ])  # fmt: skip


def setup(app: Any) -> dict[str, bool]:
    """Register the directive and the transform."""
    app.add_directive("picture", Picture)
    app.add_transform(Twins)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
