"""Drawn pictures with captions for two towers, as many as training asks for.

A batch is a function of (seed, step) alone, as in batches.py. Contrastive training takes its wrong pairs from
the batch itself, so two equal captions in it would each be a right answer that counts as wrong. Batches
therefore have no caption twice, which makes pictures of one thing a little rarer than elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from minivlm.distributed.agreement import part_of
from minivlm.processing import PairProcessor
from minivlm.world.augmentations import PLAIN_SHARE, as_photographed, varied
from minivlm.world.scenes import make_scene

Inputs = dict[str, Tensor]  # pixel_values [n, C, H, W] and input_ids [n, T]; row i of both belongs together


class DrawnPairs(Dataset[list[Inputs]]):
    """Item number n: the batch of step n, once for each processor."""

    def __init__(
        self, processors: Sequence[PairProcessor], *, seed: int, steps: int, batch_size: int
    ) -> None:
        self.among = (0, 1)  # rank of this process, and how many share each batch
        self.processors = processors
        self.seed, self.steps, self.batch_size = seed, steps, batch_size
        self.pixels = max(processor.image_processor.image_size for processor in processors)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[Inputs]:
        pictures, captions = self.draw(step)
        mine = part_of(range(self.batch_size), *self.among)
        pictures, captions = pictures[mine.start : mine.stop], captions[mine.start : mine.stop]
        return [processor(pictures, captions) for processor in self.processors]

    def draw(self, step: int) -> tuple[list[Image.Image], list[str]]:
        """Pictures with different captions, about half of them augmented."""
        rng = np.random.default_rng([self.seed, step])
        pictures: dict[str, Image.Image] = {}
        while len(pictures) < self.batch_size:
            scene = make_scene(rng, "train")
            if scene.caption() in pictures:
                continue
            plain = rng.random() < PLAIN_SHARE
            scene = scene if plain else varied(scene, rng)
            picture = scene.draw(self.pixels) if plain else as_photographed(scene, self.pixels, rng)
            pictures[scene.caption()] = picture
        return list(pictures.values()), list(pictures)
