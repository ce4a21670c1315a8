"""From clips and pictures of many shapes to tensors for a system that reads both, as Qwen2-VL does.

Several questions about a clip stand in one row. What comes before them, the clip too, is there once:

    <user> clip | question 1 <assistant> answer 1 | question 2 <assistant> answer 2 | ...

Each question sees the clip and itself, and stands where it would stand alone. All clips of a batch have one
shape and as many frames, so nothing before the questions is padded. They do not have one frame rate.

Beside the questions, a batch says what lies in the cell of each image token, and where that moves: labels for
a loss on the tokens themselves. A batch is a function of (seed, step) alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from minivlm import masks
from minivlm.processing import Qwen2VLProcessor, Video, video_of
from minivlm.processing.inputs import IGNORE, Inputs
from minivlm.world import clip_questions, questions
from minivlm.world.augmentations import as_photographed, varied
from minivlm.world.clip_making import make_clip
from minivlm.world.clips import MOTIONS, Clip
from minivlm.world.questions import Example
from minivlm.world.rows import PADDING, SHORT, WEIGHTS
from minivlm.world.scenes import COLORS, SHAPES, Scene, cell_depths, make_scene

PICTURE_SIDES = (
    (64, 64),
    (96, 48),
    (48, 96),
    (80, 64),
    (64, 80),
    (48, 48),
    (96, 64),
    (64, 96),
)  # width, height
CLIP_SIDES = ((64, 64), (80, 48), (48, 80))
FRAMES = 4, 6, 8
RATES = 1, 2  # at 4 a second, 8 frames are two seconds, and everything happens at second 1
EASY = 0.1  # share of easy clips and pictures
# Words, and no boxes: in the form of these models a box takes 20 tokens.
CLIP_TASKS = (*clip_questions.QUESTION_TASKS, "caption")
PICTURE_TASKS = (*questions.QUESTION_TASKS, "caption")

# A token of a clip shows two frames: what lies in its cell in the first of them, and what in the next.
CLASSES = {
    "color": 1 + len(COLORS),
    "shape": 1 + len(SHAPES),
    "next_color": 1 + len(COLORS),
    "next_shape": 1 + len(SHAPES),
    "motion": len(MOTIONS),
}


@dataclass
class ClipBatch:
    """B clips or pictures, rows of S tokens, and what lies in each of N cells."""

    pixels: Inputs  # what the processor makes of them, see `Qwen2VLProcessor.pixels`
    input_ids: Tensor  # [B, S]
    blocks: Tensor  # [B, S], number of the question; 0 before them, or PADDING
    offsets: Tensor  # [B, S], how many tokens of its block stand before a token
    labels: Tensor  # [B, S], IGNORE where there is no loss
    weights: Tensor  # [B, S], of each label
    cells: dict[str, Tensor]  # [N] class numbers by the names in CLASSES; IGNORE where nobody knows

    @property
    def start(self) -> int:
        """Where the questions begin."""
        return int((self.blocks[0] == 0).sum())

    def mask(self) -> Tensor:
        """Who sees whom, [B, 1, S, S]: what came before, of the beginning and of the same question."""
        order = torch.arange(self.blocks.shape[1], device=self.blocks.device).expand_as(self.blocks)
        mine = masks.block_diagonal(self.blocks, self.blocks) | (self.blocks == 0)[:, None, :]
        return (mine & masks.causal(order, order))[:, None]


class ClipBatches(Dataset[ClipBatch]):
    """Batch number `step` of a run: clips, and pictures from time to time.

    Args:
        seed: of the run.
        first_step, steps: which batches there are.
        rows: of a batch.
        questions: of a row; 0 for the labels of cells alone.
        pictures: every so many steps there is a batch of pictures; 1 for pictures alone, 0 for clips alone.
        pairs: two neighboring frames of each clip in place of all. A tower sees no more of it at once.
        tasks: what is asked about clips.
        easy_to: the share of easy clips and pictures falls from 1 to EASY until this step.
        sides: what pictures measure, width and height.
    """

    def __init__(
        self,
        processor: Qwen2VLProcessor,
        *,
        seed: int,
        steps: int,
        rows: int,
        questions: int,
        first_step: int = 0,
        pictures: int = 2,
        pairs: bool = False,
        tasks: Sequence[str] = CLIP_TASKS,
        easy_to: int = 0,
        sides: Sequence[tuple[int, int]] = PICTURE_SIDES,
    ) -> None:
        self.processor, self.seed, self.first_step, self.steps = processor, seed, first_step, steps
        self.rows, self.questions, self.pictures, self.sides = rows, questions, pictures, sides
        self.pairs, self.tasks, self.easy_to = pairs, tasks, easy_to

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> ClipBatch:
        rng = np.random.default_rng([self.seed, self.first_step + step])
        if self.pictures and step % self.pictures == self.pictures - 1:
            return self._of_pictures(rng, self.easy_share(step))
        return self._of_clips(rng, self.easy_share(step))

    def easy_share(self, step: int) -> float:
        """Probability that a clip or picture of this step is an easy one."""
        return max(EASY, 1.0 - (1.0 - EASY) * step / self.easy_to) if self.easy_to else EASY

    def _of_clips(self, rng: np.random.Generator, easy: float) -> ClipBatch:
        width, height = CLIP_SIDES[rng.integers(len(CLIP_SIDES))]
        frames = int(rng.choice(FRAMES))
        clips = [training_clip(rng, frames, width, height, easy=easy) for _ in range(self.rows)]
        asked = [
            list(islice(of_tasks(clip_questions.examples(clip, rng), self.tasks), self.questions))
            for clip in clips
        ]
        cells = [clip_cells(clip, *self._grid(width, height)) for clip in clips]
        times = [clip.times for clip in clips]
        if self.pairs:
            chosen = rng.integers(frames // 2, size=self.rows)
            times = [clip.times[2 * pair : 2 * pair + 2] for clip, pair in zip(clips, chosen, strict=True)]
            cells = [
                {name: of_clip.reshape(frames // 2, -1)[pair] for name, of_clip in labels.items()}
                for labels, pair in zip(cells, chosen, strict=True)
            ]
        shown = [
            video_of([clip.at(second).draw(width) for second in seconds], clip.fps)
            for clip, seconds in zip(clips, times, strict=True)
        ]
        return pack(self.processor, shown, asked, cells)

    def _of_pictures(self, rng: np.random.Generator, easy: float) -> ClipBatch:
        width, height = self.sides[int(rng.integers(len(self.sides)))]
        scenes = [
            varied(make_scene(rng, "train", bool(rng.random() < easy), width, height), rng)
            for _ in range(self.rows)
        ]
        asked = [
            list(islice(of_tasks(questions.examples(scene, rng), PICTURE_TASKS), self.questions))
            for scene in scenes
        ]
        cells = [picture_cells(scene, *self._grid(width, height)) for scene in scenes]
        return pack(self.processor, [as_photographed(scene, width, rng) for scene in scenes], asked, cells)

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        pictures = self.processor.image_processor
        width, height = pictures.size_of(width, height)
        return height // pictures.factor, width // pictures.factor


def training_clip(
    rng: np.random.Generator,
    frames: int,
    width: float,
    height: float,
    rates: Sequence[int] = RATES,
    easy: float = EASY,
) -> Clip:
    """A clip of so many frames, at one of these rates, at which it lasts whole seconds, at least two.

    Args:
        easy: probability of an easy clip.
    """
    fps = int(rng.choice([fps for fps in rates if frames % fps == 0 and frames // fps >= 2]))
    is_easy = bool(rng.random() < easy)
    return make_clip(rng, "train", is_easy, seconds=frames // fps, fps=fps, width=width, height=height)


def of_tasks(endless: Iterator[Example], tasks: Sequence[str]) -> Iterator[Example]:
    """Those examples that are of these tasks."""
    return (example for example in endless if example.task in tasks)


def clip_cells(clip: Clip, rows: int, columns: int) -> dict[str, np.ndarray]:
    """What lies in each cell of each step of two frames, [steps * rows * columns], by names in CLASSES."""
    found = [picture_cells(clip.at(second), rows, columns) for second in clip.times]
    frames = {"": found[::2], "next_": found[1::2]}
    cells = {
        f"{which}{name}": np.concatenate([of_frame[name] for of_frame in of_step])
        for which, of_step in frames.items()
        for name in ("color", "shape")
    }
    return {**cells, "motion": clip.motion_labels(rows, columns).ravel()}


def picture_cells(scene: Scene, rows: int, columns: int) -> dict[str, np.ndarray]:
    """The same for a picture, of which nobody can say how it moves."""
    labels = {name: np.zeros(rows * columns, dtype=np.int64) for name in ("color", "shape")}
    deepest = np.zeros(rows * columns)
    for thing in scene.things:
        depths = cell_depths(thing.x, thing.y, thing.radius, rows, columns, scene.width, scene.height)
        mine = np.flatnonzero(depths > deepest)
        deepest[mine] = depths[mine]
        labels["color"][mine] = 1 + list(COLORS).index(thing.color)
        labels["shape"][mine] = 1 + SHAPES.index(thing.shape)
    both = {f"next_{name}": of_cells for name, of_cells in labels.items()}  # a picture is shown twice
    return {**labels, **both, "motion": np.full(rows * columns, IGNORE)}


def pack(
    processor: Qwen2VLProcessor,
    shown: Sequence[Image.Image | Video],
    asked: Sequence[Sequence[Example]],
    cells: Sequence[dict[str, np.ndarray]],
) -> ClipBatch:
    """One batch of clips or pictures of one size, the questions about each, and the labels of cells."""
    rows = [_row(processor, one, examples) for one, examples in zip(shown, asked, strict=True)]
    fill: dict[str, float] = {
        "input_ids": processor.tokenizer.pad_id,
        "blocks": PADDING,
        "offsets": 0,
        "labels": IGNORE,
    }
    fill["weights"] = 0.0
    return ClipBatch(
        pixels=processor.pixels(shown),
        **{name: pad_sequence([torch.tensor(row[name]) for row in rows], True, fill[name]) for name in fill},
        cells={name: torch.from_numpy(np.concatenate([one[name] for one in cells])) for name in CLASSES},
    )


def _row(
    processor: Qwen2VLProcessor, shown: Image.Image | Video, examples: Sequence[Example]
) -> dict[str, list[float]]:
    end, eos = processor.tokenizer.vision_end_id, processor.tokenizer.eos_id
    ids = processor.make_room(processor.encode_row("?"), [shown]).ids
    ids = ids[: ids.index(end) + 1]
    row: dict[str, list[float]] = {
        "input_ids": [*ids],
        "blocks": [0] * len(ids),
        "offsets": [*range(len(ids))],
        "labels": [IGNORE] * len(ids),
        "weights": [0.0] * len(ids),
    }
    for block, example in enumerate(examples, start=1):
        chat = processor.encode_row(example.prefix, example.suffix)
        before = chat.ids.index(end) + 1
        ids, written = chat.ids[before:], chat.written[before:]
        word = WEIGHTS["answer" if example.task in SHORT else "word"]
        row["input_ids"] += ids
        row["blocks"] += [block] * len(ids)
        row["offsets"] += range(len(ids))
        row["labels"] += [
            token if is_answer else IGNORE for token, is_answer in zip(ids, written, strict=True)
        ]
        row["weights"] += [WEIGHTS["eos"] if token == eos else word for token in ids]
    return row
