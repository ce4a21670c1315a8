"""Links between notebooks and reference, and inside the reference.

A cell that begins with `# minivlm/<file>.py` gets a line below it with links to the source of the file and to
the reference of what the cell defines. In docstrings and signatures, names are looked up as Python does in
the module where they stand.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from typing import Any, TypeVar

from docutils import nodes
from sphinx.application import Sphinx

MARKER = re.compile(r"# (minivlm/[\w/]+)\.py\s*$", re.MULTILINE)


def module_of(path: str) -> str:
    """minivlm/text/gemma.py -> minivlm.text.gemma; a folder, and its __init__.py, is the package."""
    return path.removesuffix(".py").removesuffix("/__init__").strip("/").replace("/", ".")


def full_name(module_name: str, name: str) -> str | None:
    """Where the package defines what a module calls `name`; None: not public."""
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        found = _module(name)
    if inspect.ismodule(found):
        return found.__name__ if found.__name__.split(".")[0] == "minivlm" else None
    home, place = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
    if not (isinstance(home, str) and isinstance(place, str) and home.split(".")[0] == "minivlm"):
        return None
    if any(part.startswith(("_", "<")) for part in place.split(".")):
        return None
    return f"{home}.{place}" if getattr(found, "__doc__", None) else None


def _module(name: str) -> Any:
    """What a dotted name like minivlm.masks.causal stands for."""
    if not re.fullmatch(r"[\w.]+", name) or not name.startswith("minivlm."):
        return None
    try:
        return importlib.import_module(name)
    except ImportError:
        parent, _, last = name.rpartition(".")
        return getattr(_module(parent), last, None)


def resolve(app: Sphinx, env: Any, node: Any, content: nodes.Node) -> nodes.Node | None:
    """Names that a module has from another one. The event `missing-reference` of Sphinx."""
    if node.get("refdomain") != "py":
        return None
    module, target = node.get("py:module") or "minivlm", node["reftarget"]
    if isinstance(getattr(_module(module), target.rpartition(".")[2], None), TypeVar):
        return content  # stands for any type, so there is nowhere to lead
    entry = env.domains.python_domain.objects.get(full_name(module, target))
    if entry is None:
        return None
    uri = app.builder.get_relative_uri(node["refdoc"], entry.docname)
    return nodes.reference("", "", content, internal=True, refuri=f"{uri}#{entry.node_id}")


def link_marked_cells(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Below each marked cell: its file, at the place of what is shown, and the reference of each definition.

    The event `doctree-resolved` of Sphinx.
    """
    for cell in list(
        doctree.findall(lambda node: "cell_input" in getattr(node, "attributes", {}).get("classes", []))
    ):
        code = next(cell.findall(nodes.literal_block), None)
        found = MARKER.match(code.astext()) if code is not None else None
        if code is None or found is None:
            continue
        module = module_of(found[1])
        names = [
            node.name
            for node in ast.parse(code.astext()).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        ]
        line = _package_line(app, page, f"{found[1]}.py", module, names)
        cell.parent.insert(cell.parent.index(cell) + 1, line)


def _package_line(app: Sphinx, page: str, file: str, module: str, names: list[str]) -> nodes.paragraph:
    known = app.env.domains.python_domain.objects
    documented = [name for name in dict.fromkeys(names) if f"{module}.{name}" in known]
    source = app.builder.get_relative_uri(page, f"_modules/{module.replace('.', '/')}")
    anchor = f"#{documented[0]}" if documented else ""
    line = nodes.paragraph("", "In the package: ", classes=["package-link"])
    line += nodes.reference("", file, internal=True, refuri=source + anchor)
    for name in documented:
        entry = known[f"{module}.{name}"]
        uri = app.builder.get_relative_uri(page, entry.docname)
        line += nodes.Text(" · ")
        line += nodes.reference(
            "", "", nodes.literal("", name), internal=True, refuri=f"{uri}#{entry.node_id}"
        )
    return line
