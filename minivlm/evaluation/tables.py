"""A table of numbers, each with what is reached without looking: as text and as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minivlm.evaluation.columns import ALL_COLUMNS
from minivlm.world.renderers import BROWSERS, CHROMIUM


@dataclass(frozen=True)
class Metric:
    """One number of a table, what the baseline reaches there, and over how many cases."""

    value: float
    baseline: float
    cases: int


Table = dict[str, dict[str, Metric]]  # column -> row -> number


def as_json(table: Table, baseline: str = "majority") -> dict[str, Any]:
    """The table as plain numbers, rounded to four decimals.

    Args:
        baseline: what the baseline is called.
    """
    return {
        column: {
            row: {"value": round(metric.value, 4), baseline: round(metric.baseline, 4), "cases": metric.cases}
            for row, metric in metrics.items()
        }
        for column, metrics in table.items()
    }


def as_text(table: Table, baseline: str = "majority") -> str:
    """The table as Markdown. Baseline and cases are those of its first column.

    Args:
        baseline: what the baseline is called.
    """
    shown = {name: metrics for name, metrics in table.items() if metrics}
    first = next(iter(shown.values()), {})
    values = {name: {row: metric.value for row, metric in metrics.items()} for name, metrics in shown.items()}
    text_only = {"text only": values.pop("text_only")} if "text_only" in values else {}
    columns = {
        ALL_COLUMNS[name].title if name in ALL_COLUMNS else name: column for name, column in values.items()
    }
    columns |= {baseline: {row: metric.baseline for row, metric in first.items()}} | text_only
    lines = [f"| | {' | '.join(columns)} | cases |", "|---" * (len(columns) + 2) + "|"]
    for row, metric in first.items():
        decimals = 0 if row.endswith("rank") else 3  # ranks are whole numbers
        cells = [f"{column[row]:.{decimals}f}" for column in columns.values()]
        lines.append(f"| {in_a_cell(row)} | {' | '.join(cells)} | {metric.cases} |")
    if table.get("browser") == {}:
        names = ", ".join(BROWSERS)
        lines += ["", f"The column browser is left out: no {names} was found, and {CHROMIUM} is not set."]
    return "\n".join(lines)


def in_a_cell(text: str) -> str:
    """A text that does not end its cell."""
    return " ".join(text.split()).replace("|", "\\|")
