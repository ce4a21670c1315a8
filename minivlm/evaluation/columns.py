"""The columns of a table: which scenes a model is measured on, and how they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

import numpy as np
from PIL import Image

from minivlm.world.augmentations import as_jpeg, half_as_large, on_gray, on_tint, turned
from minivlm.world.renderers import draw_with_browser, draw_with_matplotlib
from minivlm.world.scenes import Scene, Split

# Random numbers come from streams: [seed, number of the stream, number of the scene].
EVALUATION_STREAM = 2**31  # the first; training counts steps there, and never comes so far
CHANGES = len(get_args(Split))  # after a stream for each split's scenes, one for what changes them


def draw(scenes: Sequence[Scene], pixels: int) -> list[Image.Image]:
    """The pictures as training shows them."""
    return [scene.draw(pixels) for scene in scenes]


def draw_jpegs(scenes: Sequence[Scene], pixels: int) -> list[Image.Image]:
    """The pictures after strong compression."""
    return [as_jpeg(scene.draw(pixels), quality=50) for scene in scenes]


@dataclass(frozen=True)
class Column:
    """A way to measure: which scenes, changed how before anything is asked, and drawn by whom."""

    title: str
    split: Split = "test"
    change: Callable[[Scene, np.random.Generator], Scene] | None = None
    draw: Callable[[Sequence[Scene], int], list[Image.Image]] = draw

    @property
    def stream(self) -> int:
        """The stream that makes the scenes, the same for all columns of a split."""
        return EVALUATION_STREAM + get_args(Split).index(self.split)

    def changed(self, scene: Scene, seed: int, number: int) -> Scene:
        """The scene as this column shows it.

        Changes have random numbers of their own, so that every column starts from the same scenes.
        """
        if self.change is None:
            return scene
        return self.change(scene, np.random.default_rng([seed, EVALUATION_STREAM + CHANGES, number]))


# All but the second show the same scenes, and ask the same questions about them.
COLUMNS = {
    "held_out": Column("held-out scenes"),
    "unseen_pairs": Column("unseen pairs", split="unseen"),
    "other_grays": Column("other grays", change=partial(on_gray, least=40, below=161)),
    "tinted": Column("tinted grounds", change=on_tint),
    "black": Column("on black", change=partial(on_gray, least=0, below=1)),
    "turned": Column("turned", change=partial(turned, degrees=15)),
    "jpeg": Column("JPEG", draw=draw_jpegs),
    "matplotlib": Column("matplotlib", draw=draw_with_matplotlib),
    "browser": Column("browser", draw=draw_with_browser),
    "text_only": Column("text only"),  # answered without the model
}

# Measured only where it is asked for: a model that reads small pictures cannot know these things.
MORE_COLUMNS = {"small_things": Column("small things", change=half_as_large)}
ALL_COLUMNS = COLUMNS | MORE_COLUMNS
