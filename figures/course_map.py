"""Draws figures/map_00.png ...: the whole model with the part of one notebook lit.

Run: python figures/course_map.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

LIT, DIM = "#ffd166", "#eef0f2"
# name: (x, y, width, height, text)
BOXES = {
    "picture": (0.0, 2.2, 1.3, 0.9, "picture"),
    "image processor": (1.7, 2.2, 1.5, 0.9, "resize,\nnormalize"),
    "patches": (3.6, 2.2, 1.4, 0.9, "patches,\npositions"),
    "blocks": (5.4, 2.2, 1.5, 0.9, "attention\nblocks"),
    "projector": (7.3, 2.2, 1.4, 0.9, "linear\nlayer"),
    "merge": (9.1, 1.1, 1.2, 2.0, "merge,\nmask"),
    "decoder": (10.7, 1.1, 1.6, 2.0, "Gemma\nRoPE, GQA,\ncache"),
    "answer": (12.7, 1.65, 1.2, 0.9, "answer"),
    "prompt": (0.0, 0.6, 1.3, 0.9, "prompt"),
    "tokenizer": (1.7, 0.6, 1.55, 0.9, "tokenizer,\nprompt"),
    "embedding": (3.6, 0.6, 1.4, 0.9, "word\nvectors"),
    "loss": (4.2, 3.6, 4.6, 0.7, "contrastive losses train the tower"),
}
ARROWS = (
    ("picture", "image processor"),
    ("image processor", "patches"),
    ("patches", "blocks"),
    ("blocks", "projector"),
    ("projector", "merge"),
    ("merge", "decoder"),
    ("decoder", "answer"),
    ("prompt", "tokenizer"),
    ("tokenizer", "embedding"),
    ("embedding", "merge"),
)
PARTS = {
    "00": ("A tour", tuple(BOXES)),
    "01": ("Patches", ("patches",)),
    "02": ("CLIP and SigLIP", ("loss",)),
    "03": ("Attention", ("blocks",)),
    "04": ("The processor", ("image processor", "tokenizer")),
    "05": ("Gemma", ("embedding", "decoder")),
    "06": ("Merging", ("projector", "merge", "answer")),
    "07": ("Training", ("patches", "blocks", "projector", "embedding", "decoder", "answer")),
    "08": ("Boxes and masks", ("tokenizer", "answer")),
    "09": ("Looking inside", ("patches", "blocks", "decoder", "answer")),
    "10": ("Contrastive training", ("patches", "blocks", "loss")),
    "11": ("Real checkpoints", ("patches", "blocks", "projector", "embedding", "decoder")),
    "12": ("Fine-tuning", ("projector", "decoder", "answer")),
    "13": ("Four ways", ("projector", "merge", "decoder")),
    "14": ("LLaVA", ("image processor", "tokenizer", "projector", "merge", "answer")),
    "15": ("Qwen-VL", ("projector", "tokenizer", "answer")),
    "16": ("Qwen2-VL", ("image processor", "patches", "blocks", "projector", "merge", "decoder")),
    "17": ("Qwen2.5-VL", ("blocks", "decoder", "answer")),
    "18": ("DeepSeek-VL", ("image processor", "blocks", "projector")),
    "19": ("DeepSeek-VL2", ("image processor", "merge", "decoder")),
    "20": ("Llama 3.2 Vision", ("image processor", "blocks", "projector", "decoder")),
    "21": ("Scaling out", ("patches", "blocks", "projector", "embedding", "decoder", "loss")),
    "22": ("Reasoning", ("decoder", "answer")),
}


def draw(axes: Axes, lit: tuple[str, ...]) -> None:
    """All boxes, the lit ones in color, and the arrows between them."""
    for name, (x, y, width, height, text) in BOXES.items():
        on = name in lit
        axes.add_patch(
            FancyBboxPatch(
                (x, y),
                width,
                height,
                boxstyle="round,pad=0.02,rounding_size=0.12",
                facecolor=LIT if on else DIM,
                edgecolor="#333333" if on else "#b0b5ba",
                linewidth=1.4 if on else 0.8,
            )
        )
        axes.text(
            x + width / 2,
            y + height / 2,
            text,
            ha="center",
            va="center",
            fontsize=8,
            color="#111111" if on else "#7b8087",
        )
    for start, end in ARROWS:
        x0, y0, width, height, _ = BOXES[start]
        x1, y1, _, height1, _ = BOXES[end]
        y = y0 + height / 2
        target = min(max(y, y1 + 0.2), y1 + height1 - 0.2)
        axes.annotate(
            "",
            xy=(x1 - 0.02, target),
            xytext=(x0 + width + 0.02, y),
            arrowprops={"arrowstyle": "-|>", "color": "#8a8f95", "lw": 0.9},
        )


def main() -> None:
    """One picture per notebook."""
    for number, (_, lit) in PARTS.items():
        figure, axes = plt.subplots(figsize=(9.0, 2.9), dpi=100)
        draw(axes, lit)
        axes.set(xlim=(-0.15, 14.05), ylim=(0.35, 4.5))
        axes.axis("off")
        figure.savefig(Path(__file__).parent / f"map_{number}.png", bbox_inches="tight", pad_inches=0.03)
        plt.close(figure)


if __name__ == "__main__":
    main()
