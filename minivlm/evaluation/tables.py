"""The table as text and as plain numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from minivlm.evaluation.columns import COLUMNS
from minivlm.evaluation.scoring import Metric
from minivlm.world.renderers import BROWSERS, CHROMIUM

Table = dict[str, dict[str, Metric]]  # column -> row -> number


def as_json(table: Table) -> dict[str, Any]:
    """The table as plain numbers, rounded to four decimals."""
    return {
        column: {
            name: {key: round(number, 4) for key, number in asdict(metric).items()}
            for name, metric in metrics.items()
        }
        for column, metrics in table.items()
    }


def as_text(table: Table) -> str:
    """The table as Markdown. Majority and cases are those of its first column."""
    shown = {name: metrics for name, metrics in table.items() if metrics}
    first = next(iter(shown.values()), {})
    values = {name: {row: metric.value for row, metric in metrics.items()} for name, metrics in shown.items()}
    text_only = {"text only": values.pop("text_only")} if "text_only" in values else {}
    columns = {COLUMNS[name].title: column for name, column in values.items()}
    columns |= {"majority": {row: metric.majority for row, metric in first.items()}} | text_only
    lines = [f"| | {' | '.join(columns)} | cases |", "|---" * (len(columns) + 2) + "|"]
    for row, metric in first.items():
        cells = [f"{column[row]:.3f}" for column in columns.values()]
        lines.append(f"| {row} | {' | '.join(cells)} | {metric.cases} |")
    if table.get("browser") == {}:
        names = ", ".join(BROWSERS)
        lines += ["", f"The column browser is left out: no {names} was found, and {CHROMIUM} is not set."]
    return "\n".join(lines)
