"""From scenes to tensors: several questions about one picture, packed into one row.

A row is a picture and its questions one after the other. Encoding the picture costs most, so asking several
questions about it at once makes training several times faster. Questions of one row must not see each
other, which `question_mask` takes care of: for each question the row looks as if it stood there alone.

    image | <bos> question 1 \\n answer 1 <eos> | <bos> question 2 \\n answer 2 <eos> | ...

A batch is a function of (seed, step) alone. There is no state to save, any step can be made again, and
worker processes deliver the same batches whatever their number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from minivlm import masks
from minivlm.processing import Processor, Tokenizer
from minivlm.world.augmentations import PLAIN_SHARE, as_photographed, varied
from minivlm.world.questions import QUESTION_TASKS, Example, examples
from minivlm.world.scenes import Scene, make_scene

PADDING = -1  # block number of padding; 0 is the image, questions count from 1
_PARTS = re.compile("(<loc[0-9]{4}>|<seg[0-9]{3}>)|(?=,)")
WEIGHTS = {"answer": 3.0, "loc": 1.0, "seg": 0.3, "eos": 0.3, "word": 1.0}  # of a token in the loss


@dataclass
class Batch:
    """P pictures and R rows of T text tokens; what lies on each of N patches."""

    pixel_values: Tensor  # [P, C, height, width]
    patch_color: Tensor  # [P, N], 0 for the ground; likewise shape and size
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

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


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
        row_tokens: most tokens of a row; questions that do not fit are left out, others tried instead, so
            that little of a batch is padding. None takes the first questions, whatever their length.
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
        self._locs = frozenset(processor.tokenizer.loc_ids)
        self._segs = frozenset(processor.tokenizer.seg_ids)

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
        scenes = [make_scene(rng, "train", easy=bool(one)) for one in easy]
        scenes = [scene if p else varied(scene, rng) for scene, p in zip(scenes, plain, strict=True)]
        chosen = [self._choose(scene, rng) for scene in scenes]
        size = self.processor.image_processor.image_size
        pictures = [
            scene.draw(size) if p else as_photographed(scene, size, rng)
            for scene, p in zip(scenes, plain, strict=True)
        ]
        return self._batch(scenes, pictures, chosen)

    def _choose(self, scene: Scene, rng: np.random.Generator) -> list[Example]:
        if self.row_tokens is None:
            return list(islice(examples(scene, rng, self.relations), self.questions))
        chosen: list[Example] = []
        room = self.row_tokens
        for example in islice(examples(scene, rng, self.relations), 2 * self.questions):
            if len(chosen) == self.questions:
                continue  # to the end, so that the random numbers after this scene stay the same
            length = sum(len(part) for part in _encode(self.processor.tokenizer, example))
            if length <= room:
                chosen.append(example)
                room -= length if self.packed else 0
        return chosen

    def _batch(self, scenes: list[Scene], pictures: list[Image.Image], chosen: list[list[Example]]) -> Batch:
        labels = [scene.patch_labels(self.grid) for scene in scenes]
        dense = {
            f"patch_{name}": torch.from_numpy(np.stack([one[name] for one in labels]))
            for name in ("color", "shape", "size", "box")
        }
        if self.packed:
            rows = list(chosen)
            picture_of_row = list(range(len(chosen)))
        else:
            rows = [[example] for some in chosen for example in some]
            picture_of_row = [number for number, some in enumerate(chosen) for _ in some]
        return Batch(
            pixel_values=self.processor.image_processor(pictures),
            pictures=torch.tensor(picture_of_row),
            **dense,
            **self._rows(rows),
        )

    def _rows(self, rows: list[list[Example]]) -> dict[str, Tensor]:
        built = [self._row(row) for row in rows]
        length = max((len(row["input_ids"]) for row in built), default=0)
        fill = {"blocks": PADDING, "labels": -100, "weights": 0.0}
        tensors = {}
        for name in ("input_ids", "position_ids", "blocks", "token_type_ids", "labels", "weights"):
            dtype = np.float32 if name == "weights" else np.int64
            table = np.full((len(built), length), fill.get(name, 0), dtype=dtype)
            for number, row in enumerate(built):
                table[number, : len(row[name])] = row[name]
            tensors[name] = torch.from_numpy(table)
        return tensors

    def _row(self, examples: Sequence[Example]) -> dict[str, list[float]]:
        row: dict[str, list[float]] = {
            name: []
            for name in ("input_ids", "position_ids", "blocks", "token_type_ids", "labels", "weights")
        }
        for block, example in enumerate(examples, start=1):
            prompt, answer = _encode(self.processor.tokenizer, example)
            row["input_ids"] += [*prompt, *answer]
            row["position_ids"] += range(len(prompt) + len(answer))
            row["blocks"] += [block] * (len(prompt) + len(answer))
            row["token_type_ids"] += [0] * len(prompt) + [1] * len(answer)
            row["labels"] += [-100] * len(prompt) + answer
            row["weights"] += [0.0] * len(prompt) + [self._weight(token, example.task) for token in answer]
        return row

    def _weight(self, token_id: int, task: str) -> float:
        tokenizer = self.processor.tokenizer
        if token_id == tokenizer.eos_id:
            return WEIGHTS["eos"]
        if token_id in self._locs:
            return WEIGHTS["loc"]
        if token_id in self._segs:
            return WEIGHTS["seg"]
        return WEIGHTS["answer" if task in QUESTION_TASKS else "word"]


def _encode(tokenizer: Tokenizer, example: Example) -> tuple[list[int], list[int]]:
    """Ids of prompt and answer, without the picture's placeholders: its features stand before the text."""
    return _encode_prompt(tokenizer, example.prefix), encode_answer(tokenizer, example.suffix)


# The caches are the module's and not an object's: a worker process that does not fork gets a pickled object.
@lru_cache(maxsize=50_000)
def _encode_prompt(tokenizer: Tokenizer, prefix: str) -> list[int]:
    return tokenizer.encode_prefix(prefix, image_seq_len=0)


@lru_cache(maxsize=50_000)
def encode_answer(tokenizer: Tokenizer, suffix: str) -> list[int]:
    """`encode_suffix` in pieces. Boxes and captions hardly come twice, but what they are made of does."""
    pieces = (piece for piece in _PARTS.split(suffix) if piece)
    return [*(index for piece in pieces for index in _encode_piece(tokenizer, piece)), tokenizer.eos_id]


@lru_cache(maxsize=50_000)
def _encode_piece(tokenizer: Tokenizer, piece: str) -> list[int]:
    return tokenizer.encode(piece)
