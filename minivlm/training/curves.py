"""What to look at while a model learns from rewards: six curves, each with its own axis.

The loss of GRPO says nothing: advantages have a mean of 0, so it is about 0 from the first step to the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from minivlm.files import write_aside
from minivlm.training.log import Line

SHOWN = {
    "reward": "reward, mean of all answers",
    "accuracy": "right answers",
    "entropy": "entropy of the next token, nats",
    "mixed": "groups with answers of different worth",
    "length": "tokens of an answer",
    "endless": "answers that never end",
}
SHARES = ("accuracy", "mixed", "endless")
FROM_0 = ("entropy", "length")


def plot_curves(lines: Sequence[Line], path: Path) -> None:
    """Draw them over the steps into a PNG file. Raises InputError: the file cannot be written."""
    from matplotlib.figure import Figure  # takes half a second, see `plot_log`

    if not lines:
        return
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes: list[Any] = figure.subplots(2, 3, sharex=True).flatten().tolist()
    borders = [line["step"] for last, line in pairwise(lines) if last.get("stage") != line.get("stage")]
    for axis, (name, title) in zip(axes, SHOWN.items(), strict=True):
        names = [name, "held-out accuracy"] if name == "accuracy" else [name]
        for one in names:
            points = [(line["step"], line[one]) for line in lines if line.get(one) is not None]
            if points:
                style = {"marker": "o", "linestyle": ""} if one != name else {"marker": ""}
                axis.plot(*zip(*points, strict=True), label=one, **style)
        for border in borders:
            axis.axvline(border, color="gray", linestyle=":", linewidth=1)
        axis.set_title(title, fontsize="small")
        axis.grid(alpha=0.3)
        if name in SHARES:
            axis.set_ylim(-0.03, 1.03)
        elif name in FROM_0:
            axis.set_ylim(bottom=0)
        if axis.get_legend_handles_labels()[0] and name == "accuracy":
            axis.legend(fontsize="x-small")
    for axis in axes[3:]:
        axis.set_xlabel("step")
    with write_aside(path) as temporary:
        figure.savefig(temporary, format="png")
