"""Draws figures/demo.png: the sample pictures, what the model says about them, and where it points.

Everything in it is the shipped model's own: it is asked for a caption, and then to detect each thing that
its caption names. Run: python figures/draw_demo.py
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from minivlm import load
from minivlm.looking import draw_boxes
from minivlm.processing import load_picture, text_to_boxes, to_rgb
from minivlm.world.demo import read_samples

FIGURES = Path(__file__).parent


def main() -> None:
    """Six pictures in two rows."""
    model, processor = load()
    figure, grid = plt.subplots(2, 3, figsize=(9, 7.2), dpi=90, layout="constrained")
    for axes, path in zip(grid.flat, read_samples(FIGURES / "samples"), strict=True):
        picture = to_rgb(load_picture(path))
        caption = processor.decode(model.generate(**processor([picture], ["caption en"])))[0]
        names = dict.fromkeys(" ".join(part.split()[-2:]) for part in caption.split(", "))
        prompts = [f"detect {name}" for name in names]
        answers = processor.decode(model.generate(**processor([picture] * len(prompts), prompts)))
        boxes = [box for answer in answers for box in text_to_boxes(answer, *picture.size)]
        axes.imshow(draw_boxes(picture, boxes))
        axes.set_title("\n".join(textwrap.wrap(caption, 44)), fontsize=9, loc="left")
        axes.axis("off")
    figure.savefig(FIGURES / "demo.png")


if __name__ == "__main__":
    main()
