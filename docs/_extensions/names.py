"""What stands between single backticks in docstrings: a link where it names something public, else just code.

Docstrings write parameters and classes alike as `name`. One that begins with ``fastclstm.`` must name something, by any
path on which it is public.
"""

from __future__ import annotations

import importlib
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.util.docutils import SphinxRole
from sphinx.util.nodes import make_refnode

HOMES = ("fastclstm", "fastclstm.functional")


class Name(SphinxRole):
    """The role of text between single backticks."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return code that becomes a link when the whole site is known."""
        code = nodes.literal(self.rawtext, self.text, classes=["xref", "py", "py-obj"])
        if not self.text.replace(".", "").isidentifier():
            return [nodes.literal(self.rawtext, self.text)], []
        context = {key: self.env.ref_context.get(key) for key in ("py:module", "py:class")}
        node = addnodes.pending_xref(
            self.rawtext, code, refdomain="", reftype="name", reftarget=self.text, refexplicit=False, refwarn=True,
            refdoc=self.env.current_document.docname, **context,
        )  # fmt: skip
        return [node], []


def resolve(app: Any, env: Any, node: addnodes.pending_xref, content: nodes.Node) -> nodes.Node | None:
    """Return the link, or the code alone; None for what is an error."""
    target, domain = node["reftarget"], env.domains.python_domain
    if node.get("reftype") == "name":
        module, cls = node.get("py:module"), node.get("py:class")
        scopes = [f"{module}.{cls}", module, *HOMES] if cls else [module, *HOMES]
        paths = [target] if target.startswith("fastclstm.") else [f"{scope}.{target}" for scope in scopes if scope]
    elif node.get("refdomain") == "py":
        paths = [target]
    else:
        return None
    for path in paths:
        for name in dict.fromkeys((path, documented(path, domain.objects))):
            entry = domain.objects.get(name)
            if entry and (entry.objtype != "module" or "." in target):
                return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, [content], name)
    if target.startswith("fastclstm.") or node.get("refdomain") == "py":
        return None
    return nodes.literal("", target)


def documented(path: str, objects: Any) -> str:
    """Return the path by which what `path` names is in the reference."""
    thing = named(path)
    if thing is not None:
        tail = path.rpartition(".")[2]
        for candidate in (f"{home}.{tail}" for home in (*HOMES, getattr(thing, "__module__", ""))):
            if candidate in objects and named(candidate) is thing:
                return candidate
        owner, _, attribute = path.rpartition(".")
        if named(owner) is not None and (home := documented(owner, objects)) != owner:
            return f"{home}.{attribute}"
    return path


def named(path: str) -> Any:
    """Return what a dotted path names, or None."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:count]))
            for part in parts[count:]:
                thing = getattr(thing, part)
        except (ImportError, AttributeError, ValueError):
            continue
        return thing
    return None


def setup(app: Any) -> dict[str, bool]:
    """Register the role and what resolves it."""
    app.add_role("name", Name())
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
