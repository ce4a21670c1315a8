"""From scenes to tensors: drawn pictures, and questions about each, packed into rows.

Encoding a picture costs most, so several questions about it in one row make training several times faster.
How a row is packed is in rows.py. Its questions do not see each other, thanks to `question_mask`: for each of
them the row looks as if it stood there alone.

A batch is a function of (seed, step) alone. There is no state to save, any step can be made again, and
worker processes deliver the same batches however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from minivlm import masks
from minivlm.processing import Processor
from minivlm.world.augmentations import PLAIN_SHARE, as_photographed, varied
from minivlm.world.questions import Example, examples
from minivlm.world.rows import encode_example, pack_rows
from minivlm.world.scenes import Scene, make_scene


@dataclass
class Batch:
    """P pictures and R rows of T text tokens; what lies on each of N patches."""

    pixel_values: Tensor  # [P, C, height, width]
    patch_color: Tensor  # [P, N], 0 for the background; likewise shape and size
    patch_shape: Tensor
    patch_size: Tensor
    patch_box: Tensor  # [P, N, 4]
    pictures: Tensor  # [R], which picture a row is about
    input_ids: Tensor  # [R, T], text only
    position_ids: Tensor  # [R, T], each question starts right after the image
    blocks: Tensor  # [R, T], number of the question, or PADDING
    token_type_ids: Tensor  # [R, T], 0 prompt, 1 answer
    labels: Tensor  # [R, T], -100 where there is no loss
    weights: Tensor  # [R, T], of each label

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def part(self, pictures: range) -> Self:
        """Some of the pictures, neighbors, with their rows."""
        rows = (self.pictures >= pictures.start) & (self.pictures < pictures.stop)
        of_picture = {"pixel_values", "patch_color", "patch_shape", "patch_size", "patch_box"}
        chosen = {
            field.name: getattr(self, field.name)[
                slice(pictures.start, pictures.stop) if field.name in of_picture else rows
            ]
            for field in fields(self)
        }
        return replace(self, **chosen | {"pictures": chosen["pictures"] - pictures.start})


def question_mask(batch: Batch, num_image_tokens: int, image_sees_prompt: bool) -> tuple[Tensor, Tensor]:
    """Who sees whom in rows of image + questions.

    Two questions, each of two prompt and one answer token, after two image tokens. With
    `image_sees_prompt` (one question a row) it is the prefix-LM mask of `minivlm.masks`.

        1 1 | 0 0 0 | 0 0 0
        1 1 | 0 0 0 | 0 0 0
        1 1 | 1 1 0 | 0 0 0
        1 1 | 1 1 0 | 0 0 0
        1 1 | 1 1 1 | 0 0 0
        1 1 | 0 0 0 | 1 1 0
        1 1 | 0 0 0 | 1 1 0
        1 1 | 0 0 0 | 1 1 1

    Returns:
        mask [R, 1, S, S] and position_ids [R, S] with S = N + T.
    """
    rows, device = len(batch.input_ids), batch.input_ids.device
    image = torch.arange(num_image_tokens, device=device).expand(rows, -1)
    blocks = torch.cat([torch.zeros_like(image), batch.blocks], dim=1)  # [R, S]
    position_ids = torch.cat([image, num_image_tokens + batch.position_ids], dim=1)
    is_prefix = torch.cat([torch.ones_like(image), 1 - batch.token_type_ids], dim=1).bool()
    is_image = blocks == 0
    mask = masks.block_diagonal(blocks, blocks) & (
        masks.causal(position_ids, position_ids) | is_prefix[:, None, :]
    )
    mask = mask | is_image[:, None, :]
    if image_sees_prompt:
        is_prompt = is_prefix & (blocks > 0)
        mask = mask | (is_image[:, :, None] & is_prompt[:, None, :])
    return mask[:, None], position_ids


class SceneBatches(Dataset[Batch]):
    """Batch number `step` of a run, drawn when it is asked for.

    Args:
        processor: tokenizes, and says how many pixels and patches a picture has.
        seed: of the run.
        steps: how many batches there are.
        pictures: per batch.
        questions: per picture.
        packed: all questions of a picture in one row, or a row for each.
        row_tokens: most tokens of a row. Questions that do not fit are skipped and others tried instead, so
            that little of a batch is padding. None takes the first questions, however long.
        first_step: number of the first batch in the run, when another stage came before.
        relations: questions about relations in a round of all tasks.
        easy_from, easy_to: the share of easy scenes falls from 1 to `easy_least` between these steps.
    """

    def __init__(
        self,
        processor: Processor,
        patch_size: int,
        *,
        seed: int,
        steps: int,
        pictures: int,
        questions: int,
        packed: bool = True,
        row_tokens: int | None = None,
        first_step: int = 0,
        easy_from: int = 0,
        easy_to: int = 0,
        easy_least: float = 0.1,
        relations: int = 2,
    ) -> None:
        self.processor = processor
        self.grid = processor.image_processor.image_size // patch_size
        self.seed, self.steps, self.first_step = seed, steps, first_step
        self.pictures, self.questions, self.packed = pictures, questions, packed
        self.row_tokens = row_tokens
        self.easy_from, self.easy_to, self.easy_least = easy_from, easy_to, easy_least
        self.relations = relations

    def __len__(self) -> int:
        return self.steps

    def easy_share(self, step: int) -> float:
        """Probability that a scene of this step is an easy one."""
        if self.easy_to <= self.easy_from:
            return self.easy_least
        progress = (step - self.easy_from) / (self.easy_to - self.easy_from)
        return 1.0 - (1.0 - self.easy_least) * min(max(progress, 0.0), 1.0)

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, self.first_step + step])
        easy = rng.random(self.pictures) < self.easy_share(step)
        plain = rng.random(self.pictures) < PLAIN_SHARE
        scenes = [self.scene(rng, step, bool(is_easy)) for is_easy in easy]
        scenes = [
            scene if is_plain else varied(scene, rng) for scene, is_plain in zip(scenes, plain, strict=True)
        ]
        chosen = [self._choose(scene, rng, step) for scene in scenes]
        size = self.processor.image_processor.image_size
        pictures = [
            scene.draw(size) if is_plain else as_photographed(scene, size, rng)
            for scene, is_plain in zip(scenes, plain, strict=True)
        ]
        return self._batch(scenes, pictures, chosen)

    def scene(self, rng: np.random.Generator, step: int, easy: bool) -> Scene:
        """A scene of a step, before it is varied."""
        return make_scene(rng, "train", easy=easy)

    def examples(self, scene: Scene, rng: np.random.Generator, step: int) -> Iterator[Example]:
        """Endless questions about a scene of a step."""
        return examples(scene, rng, self.relations)

    def rows(self, chosen: list[list[Example]]) -> list[list[Example]]:
        """The questions of each row, for the questions of each picture."""
        return chosen if self.packed else [[example] for of_scene in chosen for example in of_scene]

    def _choose(self, scene: Scene, rng: np.random.Generator, step: int) -> list[Example]:
        """Questions about a scene that fit into its row, or its rows."""
        endless = self.examples(scene, rng, step)
        if self.row_tokens is None:
            return list(islice(endless, self.questions))
        # A fixed number is drawn, so that the random numbers after this scene do not depend on what fits.
        candidates = list(islice(endless, 2 * self.questions))
        chosen: list[Example] = []
        room = self.row_tokens
        for example in candidates:
            if len(chosen) == self.questions:
                break
            prompt, answer = encode_example(self.processor.tokenizer, example)
            length = len(prompt) + len(answer)
            if length <= room:
                chosen.append(example)
                room -= length if self.packed else 0
        return chosen

    def _batch(self, scenes: list[Scene], pictures: list[Image.Image], chosen: list[list[Example]]) -> Batch:
        """Tensors of scenes, their pictures, and the questions chosen for each."""
        labels = [scene.patch_labels(self.grid) for scene in scenes]
        patches = {
            f"patch_{name}": torch.from_numpy(np.stack([of_scene[name] for of_scene in labels]))
            for name in ("color", "shape", "size", "box")
        }
        picture_of_row = list(range(len(chosen)))
        if not self.packed:
            picture_of_row = [number for number, of_scene in enumerate(chosen) for _ in of_scene]
        return Batch(
            pixel_values=self.processor.image_processor(pictures),
            pictures=torch.tensor(picture_of_row),
            **patches,
            **pack_rows(self.processor.tokenizer, self.rows(chosen)),
        )
