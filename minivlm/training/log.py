"""The log of a training run, log.csv: a line every few steps, a column for each number.

A cell is empty where there is nothing to say: the stage does not have this loss, or the metric was not
measured at this step. Any spreadsheet and `pandas.read_csv` open the file.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from minivlm.errors import InputError
from minivlm.files import write_aside

Line = dict[str, Any]  # column -> int, float, str, or None for an empty cell


def write_log(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the whole log, aside and in one move: whoever opens it never sees a partial line.

    Numbers are rounded to six digits. Raises InputError: the file cannot be written.
    """
    columns = list(dict.fromkeys(name for line in lines for name in line))  # in order of appearance
    with write_aside(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_as_cell(line.get(name)) for name in columns] for line in lines)


def read_log(path: str | Path) -> list[Line]:
    """The lines of a log.csv; every line has every column.

    Raises InputError: no such file, or not such a file.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}): expected the log of a training run") from error
    lines = []
    for number, row in enumerate(rows, start=2):
        line = {name: _as_value(cell) for name, cell in zip(header, row, strict=False)}
        texts = [name for name, value in line.items() if isinstance(value, str) and name != "stage"]
        if len(row) != len(header) or texts or not isinstance(line.get("step"), int):
            raise InputError(
                f"{path} is damaged in line {number}: delete the file to go on without it, or fix the line"
            )
        lines.append(line)
    return lines


def is_log(path: Path) -> bool:
    """Whether a file is the log of a run, as far as its first line says."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(5) in (b"step,", b"")


def log_as_json(path: str | Path) -> str:
    """A log.csv as one JSON object: column -> list of its values, null for an empty cell.

    Raises InputError: as `read_log`.
    """
    lines = read_log(path)
    return json.dumps({name: [line[name] for line in lines] for name in (lines[0] if lines else ())})


def _as_cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _as_value(cell: str) -> int | float | str | None:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell or None


NOT_DRAWN = ("step", "stage", "epoch", "temperature", "bias", "best step")


def plot_log(lines: Sequence[Line], path: Path, losses: Sequence[str]) -> None:
    """Draw the columns of a log over the steps into a PNG file, with dotted lines between stages.

    Args:
        lines: of the log; without any, nothing is drawn.
        losses: columns that are losses, besides those whose name ends so. Other numbers are metrics, except
            for learning rates.

    Raises InputError: the file cannot be written.
    """
    # This import takes half a second, which only the end of a training run should pay. A Figure of its own,
    # not pyplot's, needs no display and leaves a notebook's figures alone.
    from matplotlib.figure import Figure

    if not lines:
        return
    columns = dict.fromkeys(name for line in lines for name in line)
    names = [name for name in columns if name not in NOT_DRAWN and not name.endswith("_lr")]
    metrics = [name for name in names if name not in losses and not name.endswith("loss")]
    figure = Figure(figsize=(8, 7 if metrics else 4), dpi=120, layout="constrained")
    axes: list[Any] = figure.subplots(2 if metrics else 1, 1, sharex=True, squeeze=False)[:, 0].tolist()
    borders = [line["step"] for last, line in pairwise(lines) if last.get("stage") != line.get("stage")]
    for axis, drawn, title in zip(
        axes, ([name for name in names if name not in metrics], metrics), ("loss", "metric"), strict=False
    ):
        for name in drawn:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else "")
        for border in borders:
            axis.axvline(border, color="gray", linestyle=":", linewidth=1)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:  # a loss may never have been computed
            axis.legend(fontsize="small", ncols=2)
    axes[0].set_yscale("log")
    axes[-1].set_xlabel("step")
    with write_aside(path) as temporary:
        figure.savefig(temporary, format="png")
