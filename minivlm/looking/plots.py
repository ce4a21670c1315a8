"""Figures of a model's internals: tensors in, a matplotlib Figure out.

The numbers come from measures.py and inspection.py. The figures do not use pyplot, so they need no display. A
notebook shows them with `display`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

DPI = 150


def to_image(pixel_values: Tensor) -> Tensor:
    """pixel_values [C, height, width] from -1 to 1 -> [height, width, C] from 0 to 1, for display."""
    return (pixel_values.float().cpu() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)


def draw_filters(rows: Mapping[str, Tensor], columns: int = 12) -> Figure:
    """Rows of filters [n, C, P, P], the first of each, each scaled to its own largest value; 0 is gray."""
    figure = Figure(figsize=(6.6, 0.3 + 0.5 * len(rows)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis_row, (name, filters) in zip(axes, rows.items(), strict=True):
        for number, axis in enumerate(axis_row):
            axis.axis("off")
            if number < len(filters):
                axis.imshow(to_image(filters[number] / filters[number].abs().max()).numpy())
        axis_row[0].text(
            -0.2, 0.5, name, transform=axis_row[0].transAxes, ha="right", va="center", fontsize=8
        )
    return figure


def draw_positions(similarities: Mapping[str, Tensor]) -> Figure:
    """One grid of small maps for each similarity matrix [N, N] of positions.

    The map at a position shows its similarity to all positions.
    """
    figure = Figure(figsize=(2.6 * len(similarities) + 0.8, 2.8), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(similarities), squeeze=False)[0].tolist()
    for axis, (name, similarity) in zip(axes, similarities.items(), strict=True):
        side = math.isqrt(len(similarity))
        maps = similarity.float().cpu().view(side, side, side, side)
        gap = max(1, side // 8)
        maps = torch.nn.functional.pad(maps, (0, gap, 0, gap), value=math.nan)  # a gap after each small map
        shown = axis.imshow(
            maps.permute(0, 2, 1, 3).reshape(side * (side + gap), -1).numpy(),
            vmin=-1,
            vmax=1,
            interpolation="nearest",
        )
        axis.set(title=name, xticks=[], yticks=[])
    figure.colorbar(shown, ax=axes, label="cosine similarity", shrink=0.8)
    return figure


def draw_heads(distances: Tensor, entropies: Tensor, even_distance: float, even_entropy: float) -> Figure:
    """Mean attention distance and entropy of every head, [layers, H] each, by layer.

    `even_distance` and `even_entropy` are those of a head with uniform attention.
    """
    figure = Figure(figsize=(6.6, 2.6), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 2).tolist()
    for axis, values, limit, label in (
        (axes[0], distances, even_distance, "mean distance in patches"),
        (axes[1], entropies, even_entropy, "entropy in nats"),
    ):
        for layer, heads in enumerate(values.tolist(), start=1):
            axis.plot([layer] * len(heads), heads, "o", color="tab:blue", alpha=0.7)
        axis.plot(
            range(1, len(values) + 1), values.mean(dim=1).tolist(), color="tab:blue", lw=1, label="mean"
        )
        axis.axhline(limit, color="gray", linestyle=":", label="looking everywhere alike")
        top = max(limit, float(values.max()))
        axis.set(xlabel="layer of the image tower", ylabel=label, ylim=(0, 1.1 * top))
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def grid_of(places: int, pixel_values: Tensor) -> tuple[int, int]:
    """Rows and columns of so many square places in a picture [C, height, width]."""
    height, width = pixel_values.shape[-2:]
    columns = round(math.sqrt(places * width / height))
    return places // columns, columns


def draw_patch_scores(
    pixel_values: Tensor,
    scores: Mapping[str, Tensor],
    marked: Tensor | None = None,
    columns: int = 6,
    label: str | None = None,
) -> Figure:
    """The picture, and beside it a map for each kind of score [N], bright where the score is high.

    Each map has its own scale, from 0 to its largest value; without positive scores, it is dark. With a
    `label`, which names what is counted, all maps share one scale, and a color bar shows it. `marked` [N]
    says which patches to outline in the maps.
    """
    total = len(scores) + 1
    columns = min(columns, total)
    rows = math.ceil(total / columns)
    width = 1.25 * columns + (0.5 if label else 0)
    figure = Figure(figsize=(width, 1.5 * rows), dpi=DPI, layout="constrained")
    axes: list[Any] = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes:
        axis.axis("off")
    axes[0].imshow(to_image(pixel_values).numpy())
    axes[0].set_title("picture", fontsize=8)
    largest = max((float(values.max()) for values in scores.values()), default=0.0)
    for axis, (name, values) in zip(axes[1:], scores.items(), strict=False):
        patch_columns = grid_of(len(values), pixel_values)[1]
        grid = values.float().cpu().view(-1, patch_columns).numpy()
        top = largest if label else float(grid.max())
        shown = axis.imshow(grid, cmap="magma", vmin=min(0.0, top), vmax=top)
        axis.set_title(name, fontsize=8)
        for patch in [] if marked is None else marked.nonzero()[:, 0].tolist():
            _outline(axis, patch, patch_columns, marked)
    if label and scores:
        bar = figure.colorbar(shown, ax=axes, shrink=0.8, pad=0.01)
        bar.set_label(label, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    return figure


def _outline(axis: Any, patch: int, columns: int, marked: Tensor | None) -> None:
    """Draw lines where a marked patch borders an unmarked one."""
    assert marked is not None
    grid = torch.nn.functional.pad(marked.view(-1, columns).cpu(), (1, 1, 1, 1))
    row, column = divmod(patch, columns)
    left, right, top, bottom = column - 0.5, column + 0.5, row - 0.5, row + 0.5
    for down, across, xs, ys in (
        (-1, 0, (left, right), (top, top)),
        (1, 0, (left, right), (bottom, bottom)),
        (0, -1, (left, left), (top, bottom)),
        (0, 1, (right, right), (top, bottom)),
    ):
        if not grid[row + 1 + down, column + 1 + across]:
            axis.plot(xs, ys, color="#35d0ba", linewidth=1.6)


def draw_words(pixel_values: Tensor, words: Sequence[str], cosines: Tensor) -> Figure:
    """The nearest word of each image token, written on its patch, with its cosine [N]."""
    rows, columns = grid_of(len(words), pixel_values)
    longest = max(rows, columns)
    figure = Figure(figsize=(5.6 * columns / longest, 5.6 * rows / longest), dpi=DPI)
    axis = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axis.imshow(to_image(pixel_values).numpy(), extent=(0, columns, rows, 0), alpha=0.45)
    size = min(7.5, 60 / longest)
    for number, word in enumerate(words):
        row, column = divmod(number, columns)
        axis.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor="white", linewidth=0.8))
        shown = word if len(word) <= 9 else word[:8] + "…"
        # A dollar sign would start a formula.
        axis.text(column + 0.5, row + 0.42, shown, ha="center", va="center", fontsize=size, parse_math=False)
        axis.text(
            column + 0.5, row + 0.75, f"{cosines[number]:.2f}", ha="center", va="center", fontsize=0.95 * size
        )
    axis.set(xlim=(0, columns), ylim=(rows, 0))
    axis.axis("off")
    return figure


def draw_table(values: Tensor, rows: Sequence[str], columns: Sequence[str], label: str) -> Figure:
    """Shares from 0 to 1 [rows, columns] as a colored table that also shows the numbers."""
    figure = Figure(
        figsize=(1.3 + 0.55 * len(columns), 0.8 + 0.36 * len(rows)), dpi=DPI, layout="constrained"
    )
    axis = figure.subplots()
    axis.imshow(values.cpu().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in zip(
        ((r, c) for r in range(len(rows)) for c in range(len(columns))),
        values.flatten().tolist(),
        strict=True,
    ):
        color = "white" if value > 0.6 else "black"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(len(columns)), columns, fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_title(label, fontsize=8)
    return figure
