"""Pictures with captions for two towers: drawn ones without end, or those of a file.

A batch is a function of (seed, step) alone, as in batches.py. What is special to these objectives: the wrong
 pairs come from the batch itself, so two equal captions in it would each be a right answer that counts
as wrong. Drawn batches therefore have no caption twice, which makes pictures of one thing a little rarer
than they are elsewhere. A batch of a file has no line twice; lines with equal captions are the user's choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from minivlm.data.pairs import Pair
from minivlm.errors import InputError
from minivlm.processing import PairProcessor, load_picture, to_rgb
from minivlm.world.augmentations import PLAIN_SHARE, as_photographed, varied
from minivlm.world.scenes import make_scene

Inputs = dict[str, Tensor]  # pixel_values [n, C, H, W] and input_ids [n, T]; row i of both belongs together


class DrawnPairs(Dataset[list[Inputs]]):
    """Item number n: the batch of step n, once for each processor."""

    def __init__(
        self, processors: Sequence[PairProcessor], *, seed: int, steps: int, batch_size: int
    ) -> None:
        self.processors = processors
        self.seed, self.steps, self.batch_size = seed, steps, batch_size
        self.pixels = max(processor.image_processor.image_size for processor in processors)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[Inputs]:
        pictures, captions = self.draw(step)
        return [processor(pictures, captions) for processor in self.processors]

    def draw(self, step: int) -> tuple[list[Image.Image], list[str]]:
        """Pictures of different captions, half of them with other looks."""
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


class FilePairs(Dataset[list[Inputs] | InputError]):
    """Item number n: the batch of step n, once for each processor.

    All lines in random order, then all of them in another one, and so on. What is left over at the end of
    such a round, being less than a batch, waits for another round.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        processors: Sequence[PairProcessor],
        *,
        seed: int,
        steps: int,
        batch_size: int,
    ) -> None:
        self.pairs, self.processors = pairs, processors
        self.seed, self.steps, self.batch_size = seed, steps, batch_size
        if len(pairs) < batch_size:
            raise InputError(
                f"batch_size is {batch_size}, and there are {len(pairs)} pairs: a pair would be in a batch "
                "twice and count as wrong, choose a smaller batch"
            )

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[Inputs] | InputError:
        chosen = self.choose(step)
        try:
            pictures = [open_picture(pair) for pair in chosen]
        except InputError as error:  # handed over: raised in a worker process it would come with a traceback
            return error
        return [processor(pictures, [pair.text for pair in chosen]) for processor in self.processors]

    def choose(self, step: int) -> list[Pair]:
        """The lines of a batch."""
        epoch, place = divmod(step, len(self.pairs) // self.batch_size)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))
        rows = order[place * self.batch_size : (place + 1) * self.batch_size]
        return [self.pairs[row] for row in rows.tolist()]


def open_picture(pair: Pair) -> Image.Image:
    """Raises InputError: it turns out to be damaged, or has gone since it was looked at."""
    try:
        return to_rgb(load_picture(pair.path))
    except InputError as error:
        raise InputError(f"line {pair.line}: {error}") from error
