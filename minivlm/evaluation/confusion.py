"""Which short answer is taken for which: a table for each kind of prompt that has few of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from minivlm.evaluation.tables import in_a_cell

MOST_NAMES = 12  # different true answers in a table that one can still read
MOST_LETTERS = 20  # of such an answer
OTHER = "(other)"

Confusion = dict[str, dict[str, int]]  # true answer -> what was answered -> how often


def confusions(kinds: Sequence[str], wanted: Sequence[str], answers: Sequence[str]) -> dict[str, Confusion]:
    """By kind of prompt; kinds with long answers, with many different ones or with one alone are left out.

    Every row has every column. What is no true answer anywhere in the kind is counted as OTHER.
    """
    tables = {}
    for kind in dict.fromkeys(kinds):
        lines = [i for i, one in enumerate(kinds) if one == kind]
        names = sorted({wanted[i] for i in lines})
        if not 2 <= len(names) <= MOST_NAMES or any(len(name) > MOST_LETTERS for name in names):
            continue
        counts = Counter((wanted[i], answers[i] if answers[i] in names else OTHER) for i in lines)
        tables[kind] = {name: {other: counts[name, other] for other in (*names, OTHER)} for name in names}
    return tables


def confusions_as_text(tables: dict[str, Confusion]) -> str:
    """The tables as Markdown, rows for true answers and columns for what was answered."""
    return "\n\n".join(f"{kind}\n\n{_as_text(table)}" for kind, table in tables.items())


def _as_text(table: Confusion) -> str:
    columns = list(next(iter(table.values())))
    if not any(row[OTHER] for row in table.values()):
        columns.remove(OTHER)
    lines = [
        f"| true \\ answered | {' | '.join(map(in_a_cell, columns))} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in table.items():
        lines.append(f"| {in_a_cell(name)} | {' | '.join(str(row[column]) for column in columns)} |")
    return "\n".join(lines)
