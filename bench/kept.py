"""What a run has measured, kept in its folder, so that it is not done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULT = "result.json"


def read(folder: Path, config: dict[str, Any], scenes: int) -> dict[str, Any] | None:
    """What a run has measured, if it is done. Raises SystemExit: it had other numbers."""
    if not (folder / RESULT).is_file():
        return None
    found: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    if found["config"] != config or found["scenes"] != scenes:
        raise SystemExit(f"{folder} holds a run with other numbers: choose another folder with --runs")
    return found


def keep(folder: Path, found: dict[str, Any]) -> None:
    """Write down what was measured, with the `config` and `scenes` that it was measured for."""
    (folder / RESULT).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
