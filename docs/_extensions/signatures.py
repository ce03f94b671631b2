"""Signatures of classes whose ``__new__`` looks at what ``__init__`` is given: autodoc would show the former's."""

from __future__ import annotations

import inspect
from typing import Any

from sphinx.util.inspect import stringify_signature

from fastclstm.nn.described import Described


def of_constructor(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: str | None, result: str | None
) -> tuple[str, str | None] | None:
    """Return the arguments of the constructor, without their types; None for what has a signature of its own."""
    if what != "class" or not issubclass(thing, Described):
        return None
    return stringify_signature(inspect.signature(thing), show_annotation=False, show_return_annotation=False), result


def setup(app: Any) -> dict[str, bool]:
    """Register it."""
    app.connect("autodoc-process-signature", of_constructor)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
