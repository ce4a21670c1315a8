"""Who looks at whom: the attention mask of a prompt and its answer, as text and as a figure.

It is read from the attention maps, not from the code that makes the mask: a token that no head of any layer
looks at, to the last digit, is hidden. Neighbors of the same name that see the same and are seen by the same,
such as the places of a picture, share one row and one column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

VISIBLE, HIDDEN = "■", "·"
MOST_LABELS = 80  # in a figure; with more, names would lie on each other


def visible(maps: Sequence[Tensor]) -> Tensor:
    """Attention maps [B, H, T, S] of all layers -> [T, S] of the first row: True where any head looks."""
    return torch.stack([(layer[0] > 0).any(dim=0) for layer in maps]).any(dim=0)


def share_rows(tokens: Sequence[str], mask: Tensor) -> tuple[list[str], Tensor]:
    """Tokens and their mask [S, S] -> names, one for each run of equals ("<image> x 64"), and their mask."""
    first: list[int] = []  # of each run
    for place, token in enumerate(tokens):
        before = place - 1
        same = place > 0 and token == tokens[before]
        same = (
            same and torch.equal(mask[place], mask[before]) and torch.equal(mask[:, place], mask[:, before])
        )
        if not same:
            first.append(place)
    ends = [*first[1:], len(tokens)]
    names = [
        tokens[place] if end == place + 1 else f"{tokens[place]} x {end - place}"
        for place, end in zip(first, ends, strict=True)
    ]
    return names, mask[first][:, first]


def as_text(names: Sequence[str], mask: Tensor) -> str:
    """One line for each token: its number, its name, and which of the numbered tokens it sees."""
    width, digits = max(map(len, names)), len(str(len(names)))
    head = " ".join(f"{number:>{digits}}" for number in range(1, len(names) + 1))
    lines = [f"{'sees':>{digits + 1 + width}}  {head}"]
    for number, (name, row) in enumerate(zip(names, mask.tolist(), strict=True), start=1):
        marks = " ".join(f"{VISIBLE if seen else HIDDEN:>{digits}}" for seen in row)
        lines.append(f"{number:>{digits}} {name:<{width}}  {marks}")
    return "\n".join(lines)


def draw_mask(names: Sequence[str], mask: Tensor) -> Figure:
    """Queries from top to bottom, keys from left to right; dark where a query looks at a key."""
    side = min(max(2.5, 0.24 * len(names) + 1.2), 16.0)
    figure = Figure(figsize=(side, side), dpi=150, layout="constrained")
    axis = figure.subplots()
    axis.imshow(mask.cpu().numpy(), cmap="Blues", vmin=0, vmax=1.2)
    axis.set(xlabel="is looked at", ylabel="looks")
    if len(names) <= MOST_LABELS:
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
        axis.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
        lines = torch.arange(len(names) + 1).numpy() - 0.5
        axis.set_xticks(lines, minor=True)
        axis.set_yticks(lines, minor=True)
        axis.grid(which="minor", color="white", linewidth=0.8)
    axis.tick_params(which="both", length=0)
    return figure
