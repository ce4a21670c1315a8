"""The tables of bench/reasoning.py, from the numbers of its runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

Results = Mapping[str, Mapping[str, dict[str, Any]]]  # unit -> seed -> what was found
OLD = ("questions", "captions", "boxes")  # skills from before
PARTS = {  # title, and the question of its runs
    "larger": ("Rewards: is A larger than B?", "larger"),
    "nearer": ("Nothing to reward: which is nearer to A, B or C? (one of the two at random: .500)", "nearer"),
    "thinking": ("Thinking: is A larger than B? With boxes as evidence", "larger"),
}


def as_text(results: Results, runs_of: Mapping[str, Iterable[str]]) -> str:
    """All that is there so far. runs_of: the names of each part's runs."""
    lines: list[str] = []
    for part, (title, task) in PARTS.items():
        lines += [f"## {title}", "", *_runs(results, task, runs_of[part])]
    lines += _faithfulness(results) + _shipped(results) + _bias(results)
    seeds = max((len(runs) for runs in results.values()), default=0)
    fewest = min((len(runs) for runs in results.values()), default=0)
    counted = f"{seeds}" if seeds == fewest else f"{fewest} to {seeds}"
    return "\n".join([*lines, f"Seeds: {counted}. In brackets: the least and the most."])


def cell(values: Sequence[float]) -> str:
    """The mean, and in brackets the least and the most."""
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, and an empty line behind it."""
    body = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *body, ""]


def _runs(results: Results, task: str, names: Iterable[str]) -> list[str]:
    """How right each run is, what it cost, and what it forgot."""
    rows, lines = [], []
    for one in list(results.get("shipped", {}).values())[:1]:
        right = one["right"][task]
        rows.append(["the shipped model", f"{right['value']:.3f}", "", "", *_old([one]), ""])
        lines = [f"Always the most frequent answer: {right['baseline']:.3f}.", ""]
    for name in names:
        runs = list(results.get(name, {}).values())
        if runs:
            steps, seconds = (f"{mean(run[key] for run in runs):.0f}" for key in ("steps", "seconds"))
            stopped = f"{sum(run['stopped'] is not None for run in runs)} of {len(runs)}"
            right = cell([run["right"]["value"] for run in runs])
            rows.append([name, right, steps, seconds, *_old(runs), stopped])
    heads = ["run", "right", "steps", "CPU s", "old questions", "old captions", "old IoU", "stopped"]
    return lines + table(heads, rows)


def _old(runs: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{mean(run['old'][key] for run in runs):.3f}" for key in OLD]


def _faithfulness(results: Results) -> list[str]:
    """Rows are tests, columns are runs that think."""
    thinking = {
        name: [run["faithfulness"] for run in runs.values()]
        for name, runs in results.items()
        if runs and all("faithfulness" in run for run in runs.values())
    }
    if not thinking:
        return []
    rows = [
        [
            row,
            *(cell([run[row]["value"] for run in runs]) for runs in thinking.values()),
            f"{first['baseline']:.3f}",
        ]
        for row, first in next(iter(thinking.values()))[0].items()
    ]
    return ["## Faithfulness of the evidence", "", *table(["", *thinking, "chance"], rows)]


def _shipped(results: Results) -> list[str]:
    """Whether the shipped model looks."""
    runs = list(results.get("shipped", {}).values())
    if not runs:
        return []
    lines: list[str] = []
    for task, first in runs[0]["neglect"].items():
        rows = [
            [row, cell([run["neglect"][task][row]["value"] for run in runs]), f"{one['baseline']:.3f}"]
            for row, one in first.items()
        ]
        heads = ["", "value", "chance"]
        lines += [f"## The shipped model and the picture: {task}", "", *table(heads, rows)]
    numbers = list(runs[0]["hallucination"]["random"])
    rows = [
        [way, *(cell([run["hallucination"][way][number]["value"] for run in runs]) for number in numbers)]
        for way in runs[0]["hallucination"]
    ]
    title = "## Hallucination, asked as POPE does (all five of a coin: .500)"
    return [*lines, title, "", *table(["missing names", *numbers], rows)]


def _bias(results: Results) -> list[str]:
    """What a bias does, and what repairs it."""
    biased, without = (list(results.get(name, {}).values()) for name in ("biased", "without bias"))
    if not biased or not without:
        return []
    saturations = list(biased[0])
    rows = [[f"biased, {way}", *_stars(biased, way)] for way in biased[0][saturations[0]]]
    rows.append(["trained without bias", *_stars(without, "plain")])
    heads = ["the color of the star", *(f"saturation {s} (says cyan)" for s in saturations)]
    return ["## Trained with a bias: stars are cyan", "", *table(heads, rows)]


def _stars(runs: Sequence[dict[str, Any]], way: str) -> list[str]:
    return [
        f"{mean(run[s][way]['right'] for run in runs):.3f} "
        f"({mean(run[s][way]['says cyan'] for run in runs):.3f})"
        for s in runs[0]
    ]
