"""What a notebook gave when it was run, compared with what is stored in it, as nbval compares.

nbval's own comparison is a method of its test items, so the steps around its functions are repeated here:
text, HTML and SVG are compared, and names and messages of errors; PNG and tracebacks are not.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from nbformat import NotebookNode
from nbval.plugin import coalesce_streams, get_sanitize_patterns, transform_streams_for_comparison
from notebooks_and_sources import ROOT

IGNORED = "nbval-ignore-output"  # tests/ignored_outputs.toml holds the reasons; a test holds it to the tags
NOT_COMPARED = {"metadata", "traceback", "output_type", "execution_count", "image/png"}
PATTERNS = get_sanitize_patterns((ROOT / "tests" / "sanitize.cfg").read_text(encoding="utf-8"))


def differences(stored: NotebookNode, saved: NotebookNode) -> dict[str, list[str]]:
    """Id of each code cell whose outputs are not those that were stored -> what is different."""
    before, after = (
        {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"} for notebook in (stored, saved)
    )
    found = {name: ["only one of the two notebooks has it"] for name in before.keys() ^ after.keys()}
    for name in [name for name in before if name in after]:
        if after[name].execution_count is None:
            found[name] = ["it was not run"]
        elif IGNORED not in before[name].metadata.get("tags", []):
            expected, got = flat(before[name].outputs), flat(after[name].outputs)
            if expected != got:
                found[name] = [
                    f"{key}: {expected.get(key)!r} is stored, {got.get(key)!r} came out"
                    for key in sorted(expected.keys() | got.keys())
                    if expected.get(key) != got.get(key)
                ]
    return found


def flat(outputs: list[NotebookNode]) -> dict[str, list[Any]]:
    """Stream, MIME type or field of an error -> its values in all outputs of a cell, sanitized."""
    values = defaultdict(list)
    for output in transform_streams_for_comparison(coalesce_streams(outputs)):
        for key, value in (output | output.get("data", {})).items():
            if key not in NOT_COMPARED and key != "data":
                values[key].append(_sanitized(value))
    return dict(values)


def _sanitized(value: Any) -> Any:
    if isinstance(value, str):
        for pattern, replacement in PATTERNS:
            value = re.sub(pattern, replacement, value)
    return value
