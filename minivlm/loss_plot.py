"""The log of a training run as a picture: losses above, metrics below."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from minivlm.files import write_aside
from minivlm.training.log import Line

NOT_DRAWN = ("step", "stage", "epoch", "temperature", "bias")


def plot_log(lines: Sequence[Line], path: Path, losses: Sequence[str]) -> None:
    """Draw the columns of a log over the steps into a PNG file. Dotted lines stand between stages.

    Args:
        lines: of the log; without any, nothing is drawn.
        losses: the columns with losses, beside those called so; other numbers, but for learning rates, are
            metrics.

    Raises InputError: the file cannot be written.
    """
    # Half a second, which only the end of a training run should pay. A Figure of its own, and not pyplot's,
    # needs no display and leaves a notebook's figures alone.
    from matplotlib.figure import Figure

    if not lines:
        return
    columns = dict.fromkeys(name for line in lines for name in line)
    names = [name for name in columns if name not in NOT_DRAWN and not name.endswith("_lr")]
    metrics = [name for name in names if name not in losses and not name.endswith("loss")]
    figure = Figure(figsize=(8, 7 if metrics else 4), dpi=120, layout="constrained")
    axes: list[Any] = figure.subplots(2 if metrics else 1, 1, sharex=True, squeeze=False)[:, 0].tolist()
    borders = [b["step"] for a, b in pairwise(lines) if a.get("stage") != b.get("stage")]
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
        axis.legend(fontsize="small", ncols=2)
    axes[0].set_yscale("log")
    axes[-1].set_xlabel("step")
    with write_aside(path) as temporary:
        figure.savefig(temporary, format="png")
