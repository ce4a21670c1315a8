"""Draws figures/four_ways_1.png ... 4.png: four ways to join a picture with a language model.

Run: python figures/four_ways.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

TRAINED, FROZEN, IMAGE, WORD = "#ffd166", "#dfe6ee", "#8ecae6", "#f1f1f1"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    """A part of the model: yellow is trained, gray-blue is frozen."""
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0.02,rounding_size=0.1",
            facecolor=color,
            edgecolor="#444444",
        )
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def tokens(axes: Axes, x: float, y: float, count: int, color: str) -> None:
    """A row of small squares: vectors in a sequence."""
    for number in range(count):
        axes.add_patch(
            Rectangle((x + 0.32 * number, y), 0.26, 0.26, facecolor=color, edgecolor="#444444", lw=0.8)
        )


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "-") -> None:
    """From one part to another."""
    axes.annotate(
        "", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": "#555555", "lw": 1.1, "ls": style}
    )


def joint(axes: Axes) -> None:
    """Image tokens among the words."""
    box(axes, 0, 1.2, 1.3, 0.7, "image\nencoder", TRAINED)
    tokens(axes, 2.0, 1.42, 4, IMAGE)
    tokens(axes, 3.35, 1.42, 4, WORD)
    axes.text(2.6, 1.02, "image", ha="center", fontsize=8)
    axes.text(3.95, 1.02, "words", ha="center", fontsize=8)
    box(axes, 5.4, 1.0, 2.0, 1.1, "transformer", TRAINED)
    arrow(axes, (1.35, 1.55), (1.95, 1.55))
    arrow(axes, (4.65, 1.55), (5.35, 1.55))
    arrow(axes, (7.45, 1.55), (8.1, 1.55))
    axes.text(8.2, 1.55, "words", va="center", fontsize=9)


def prefix(axes: Axes) -> None:
    """A trained mapping writes a prefix for a frozen language model."""
    box(axes, 0, 1.2, 1.3, 0.7, "image\nencoder", FROZEN)
    box(axes, 1.75, 1.2, 1.2, 0.7, "mapping", TRAINED)
    tokens(axes, 3.5, 1.42, 3, IMAGE)
    tokens(axes, 4.52, 1.42, 3, WORD)
    axes.text(3.95, 1.02, "prefix", ha="center", fontsize=8)
    axes.text(4.95, 1.02, "words", ha="center", fontsize=8)
    box(axes, 6.0, 1.0, 1.7, 1.1, "language\nmodel", FROZEN)
    arrow(axes, (1.35, 1.55), (1.7, 1.55))
    arrow(axes, (3.0, 1.55), (3.45, 1.55))
    arrow(axes, (5.5, 1.55), (5.95, 1.55))
    arrow(axes, (7.75, 1.55), (8.1, 1.55))
    axes.text(8.2, 1.55, "words", va="center", fontsize=9)


def cross(axes: Axes) -> None:
    """New cross-attention layers between the old ones."""
    box(axes, 0, 2.0, 1.3, 0.7, "image\nencoder", FROZEN)
    tokens(axes, 1.75, 2.22, 4, IMAGE)
    arrow(axes, (1.35, 2.35), (1.7, 2.35))
    tokens(axes, 0.7, 0.62, 5, WORD)
    axes.text(1.45, 0.25, "words", ha="center", fontsize=8)
    for number, (text, color) in enumerate(
        (("cross-\nattention", TRAINED), ("layer", FROZEN), ("cross-\nattention", TRAINED), ("layer", FROZEN))
    ):
        x = 2.9 + 1.28 * number
        box(axes, x, 0.4, 1.05, 0.7, text, color)
        arrow(axes, (x - 0.23 if number else 2.35, 0.75), (x - 0.03, 0.75))
        if color == TRAINED:
            arrow(axes, (3.1, 2.3) if number == 0 else (3.15, 2.35), (x + 0.5, 1.15))
    arrow(axes, (7.83, 0.75), (8.1, 0.75))
    axes.text(8.2, 0.75, "words", va="center", fontsize=9)


def guided(axes: Axes) -> None:
    """A frozen language model proposes, a frozen image-text model scores."""
    tokens(axes, 0, 0.62, 5, WORD)
    axes.text(0.75, 0.25, "words so far", ha="center", fontsize=8)
    box(axes, 2.1, 0.4, 1.6, 0.7, "language\nmodel", FROZEN)
    box(axes, 4.5, 0.4, 1.9, 0.7, "scores of\nnext words", WORD)
    box(axes, 2.1, 1.9, 1.6, 0.7, "image-text\nmodel", FROZEN)
    box(axes, 4.5, 1.9, 1.9, 0.7, "does the word\nfit the picture?", WORD)
    axes.text(0.75, 2.25, "picture", ha="center", va="center", fontsize=9)
    arrow(axes, (1.2, 2.25), (2.05, 2.25))
    arrow(axes, (1.65, 0.75), (2.05, 0.75))
    arrow(axes, (3.75, 0.75), (4.45, 0.75))
    arrow(axes, (3.75, 2.25), (4.45, 2.25))
    arrow(axes, (6.45, 0.75), (7.35, 1.35))
    arrow(axes, (6.45, 2.25), (7.35, 1.65))
    axes.text(7.5, 1.5, "+", va="center", ha="center", fontsize=14)
    arrow(axes, (7.65, 1.5), (8.1, 1.5))
    axes.text(8.2, 1.5, "next word", va="center", fontsize=9)


def main() -> None:
    """One picture per way."""
    for number, (draw, top) in enumerate(
        ((joint, 2.6), (prefix, 2.6), (cross, 3.35), (guided, 3.2)), start=1
    ):
        figure, axes = plt.subplots(figsize=(7.4, top * 0.62), dpi=100)
        draw(axes)
        axes.add_patch(Rectangle((0, top - 0.25), 0.25, 0.18, facecolor=TRAINED, edgecolor="#444444", lw=0.8))
        axes.text(0.35, top - 0.16, "trained", va="center", fontsize=8)
        axes.add_patch(
            Rectangle((1.2, top - 0.25), 0.25, 0.18, facecolor=FROZEN, edgecolor="#444444", lw=0.8)
        )
        axes.text(1.55, top - 0.16, "frozen", va="center", fontsize=8)
        axes.set(xlim=(-0.1, 9.3), ylim=(0.1 if number > 2 else 0.85, top))
        axes.axis("off")
        figure.savefig(
            Path(__file__).parent / f"four_ways_{number}.png", bbox_inches="tight", pad_inches=0.04
        )
        plt.close(figure)


if __name__ == "__main__":
    main()
