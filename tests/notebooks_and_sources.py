"""Reading notebooks and the package as syntax trees: shared by the notebook tests."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MARKER = re.compile(r"# (minivlm/[\w/]+\.py)\s*$")


@dataclass(frozen=True)
class Cell:
    """One cell of a notebook."""

    notebook: str
    number: int  # from 0
    id: str
    kind: str
    source: str
    tags: tuple[str, ...]
    raw: dict[str, Any]

    @property
    def outputs(self) -> list[dict[str, Any]]:
        return self.raw.get("outputs", [])

    @property
    def printed(self) -> str:
        """The text of all outputs."""
        texts = [
            output.get("text") or output.get("data", {}).get("text/plain", "") for output in self.outputs
        ]
        return "\n".join("".join(text) for text in texts)

    @property
    def optional(self) -> bool:
        return "optional" in self.tags

    @property
    def prose(self) -> str:
        """What a reader reads of a markdown cell, without hints, code, formulas, and targets of links."""
        if self.kind != "markdown":
            return ""
        text = re.sub(r"<details>.*?</details>|```.*?```|\$\$.*?\$\$", " ", self.source, flags=re.DOTALL)
        text = re.sub(r"`(<\w+>)`", r" \1 ", text)  # a token such as <loc0142> is a word
        return re.sub(r"`[^`\n]*`|\$[^$\n]*\$|(?<=\])\([^)]*\)", " ", text)

    @property
    def marked_file(self) -> str | None:
        """The package file that a marked cell shows."""
        first = self.source.splitlines()[0] if self.source.strip() else ""
        found = MARKER.match(first)
        return found.group(1) if found else None


def read_cells(path: Path) -> list[Cell]:
    """All cells of a notebook."""
    cells = []
    for number, raw in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        tags = tuple(raw.get("metadata", {}).get("tags", []))
        source = "".join(raw["source"])
        cells.append(Cell(path.stem, number, raw["id"], raw["cell_type"], source, tags, raw))
    return cells


def ignored_outputs() -> dict[str, dict[str, str]]:
    """Notebook -> cell id -> reason, from tests/ignored_outputs.toml."""
    return tomllib.loads((ROOT / "tests" / "ignored_outputs.toml").read_text(encoding="utf-8"))


def definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """Top-level functions, classes and constants by name."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


class _WithoutDocstrings(ast.NodeTransformer):
    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            body = node.body
            if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                node.body = body[1:] or [ast.Pass()]
        return node


def normalized(node: ast.AST) -> str:
    """The code of a definition without docstrings, comments and formatting."""
    return ast.unparse(_WithoutDocstrings().visit(ast.parse(ast.unparse(node))))


def members(node: ast.ClassDef) -> dict[str, str]:
    """Methods and class attributes of a class by name, normalized."""
    found = {}
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            found[item.name] = normalized(item)
        elif isinstance(item, ast.Assign | ast.AnnAssign):
            target = item.targets[0] if isinstance(item, ast.Assign) else item.target
            found[ast.unparse(target)] = normalized(item)
    return found
