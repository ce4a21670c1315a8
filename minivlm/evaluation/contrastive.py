"""How well two towers find each other: the table that `minivlm eval` prints for a CLIP or SigLIP folder.

The scenes are those of answers.py, in the same columns, but each caption comes once: two scenes that one
sentence describes could not be told apart by it. In retrieval every picture looks for its caption among all
of them, and the other way round. Zero-shot classification shows one thing alone and asks for its
color and its shape, with sentences for classes (models/zero_shot.py).

The same numbers of retrieval come out of a user's own pairs, where a picture may have several captions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minivlm.data.pairs import Pair
from minivlm.errors import InputError
from minivlm.evaluation.columns import CHANGES, COLUMNS, Column
from minivlm.evaluation.retrieval import (
    RECALL_AT,
    accuracy,
    chance_of_median_rank,
    chance_of_recall,
    median_rank,
    ranks,
    recall,
)
from minivlm.evaluation.tables import Metric, Table
from minivlm.evaluation.waiting import Bar
from minivlm.generate import explain_nonfinite
from minivlm.losses import similarity
from minivlm.models.protocols import Matches
from minivlm.models.zero_shot import class_embeddings
from minivlm.processing import PairProcessor
from minivlm.processing.inputs import Picture
from minivlm.world.renderers import find_browser
from minivlm.world.scenes import COLORS, SHAPES, SIZES, Scene, make_scene

PAIR_COLUMNS = tuple(name for name in COLUMNS if name != "text_only")  # without a picture nothing is found
BATCH = 100  # pictures encoded at once
SINGLE = CHANGES + 1  # from a split's stream to that of its scenes with one thing, after all others

# Every sentence that a class can be part of; the vectors of a class are averaged.
COLOR_TEMPLATES = tuple(f"a {size} {{}} {shape}" for size in SIZES for shape in SHAPES)
SHAPE_TEMPLATES = tuple(f"a {size} {color} {{}}" for size in SIZES for color in COLORS)


def evaluate_pairs(
    model: Matches,
    processor: PairProcessor,
    scenes: int = 2000,
    seed: int = 1,
    progress: bool | None = None,
    columns: Sequence[str] = PAIR_COLUMNS,
) -> Table:
    """The table, or some of its columns: by column the metrics by name.

    Where there is no browser, its column is empty.

    Raises InputError: a column of another name, a browser that fails, or captions too long for the model.
    """
    unknown = [name for name in columns if name not in PAIR_COLUMNS]
    if unknown:
        raise InputError(
            f"there is no column {unknown[0]!r} for two towers: choose from {', '.join(PAIR_COLUMNS)}"
        )
    pixels = processor.image_processor.image_size
    table: Table = {name: {} for name in columns}
    for name in columns:
        if name == "browser" and find_browser() is None:
            continue
        column = COLUMNS[name]
        shown = distinct_scenes(column, scenes, seed)
        images, texts = encode(
            model,
            processor,
            column.draw(shown, pixels),
            [scene.caption() for scene in shown],
            progress,
            column.title,
        )
        table[name] = retrieval_scores(similarity(images, texts))
        alone = single_things(column, scenes, seed)
        table[name] |= zero_shot_scores(model, processor, alone, column.draw(alone, pixels))
    return table


def distinct_scenes(column: Column, scenes: int, seed: int) -> list[Scene]:
    """The first scenes of a column, each with a caption of its own."""
    found: dict[str, Scene] = {}
    number = 0
    while len(found) < scenes:
        scene = make_scene(np.random.default_rng([seed, column.stream, number]), column.split)
        found.setdefault(scene.caption(), column.changed(scene, seed, number))
        number += 1
    return list(found.values())


def single_things(column: Column, scenes: int, seed: int) -> list[Scene]:
    """Scenes of a column's split with one thing each."""
    found = []
    for number in range(scenes):
        rng = np.random.default_rng([seed, column.stream + SINGLE, number])
        while len((scene := make_scene(rng, column.split, easy=True)).things) > 1:
            pass
        found.append(column.changed(scene, seed, number))
    return found


@torch.no_grad()
def encode(
    model: Matches,
    processor: PairProcessor,
    pictures: Sequence[Picture],
    texts: Sequence[str],
    progress: bool | None = False,
    label: str = "",
) -> tuple[Tensor, Tensor]:
    """Pictures (or their paths) and texts -> vectors [n, D] and [m, D] of any length.

    Raises InputError: as the processor; the model returns NaN or infinity.
    """
    starts = [("image", i) for i in range(0, len(pictures), BATCH)]
    starts += [("text", i) for i in range(0, len(texts), BATCH)]
    embeds: dict[str, list[Tensor]] = {"image": [], "text": []}
    for kind, i in Bar(starts, label, unit="batch", leave=False, progress=progress):
        if kind == "image":
            pixel_values = processor(images=pictures[i : i + BATCH])["pixel_values"]
            embeds[kind].append(model.encode_image(pixel_values.to(model.device)).float())
        else:
            input_ids = processor(texts=texts[i : i + BATCH])["input_ids"]
            embeds[kind].append(model.encode_text(input_ids.to(model.device)).float())
    images, captions = torch.cat(embeds["image"]), torch.cat(embeds["text"])
    if not (torch.isfinite(images).all() and torch.isfinite(captions).all()):
        raise InputError(explain_nonfinite(model, {}))
    return images, captions


def retrieval_scores(similarity: Tensor, right: Tensor | None = None) -> dict[str, Metric]:
    """Recall and median rank in both directions, of pictures [n] down and texts [m] across.

    Args:
        right: [n, m] bool, which belong together; None: row i to column i.
    """
    if right is None:
        right = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    scores = {}
    for way, matrix, answers in (
        ("image to text", similarity, right),
        ("text to image", similarity.T, right.T),
    ):
        places = ranks(matrix, answers)
        for k in RECALL_AT:
            chance = chance_of_recall(answers, k)
            scores[f"{way} recall@{k}"] = Metric(recall(places, k), chance, len(places))
        scores[f"{way} median rank"] = Metric(
            float(median_rank(places)), float(chance_of_median_rank(answers)), len(places)
        )
    return scores


def zero_shot_scores(
    model: Matches, processor: PairProcessor, scenes: Sequence[Scene], pictures: Sequence[Image.Image]
) -> dict[str, Metric]:
    """How often the color and the shape of a scene's one thing are named correctly."""
    images, _ = encode(model, processor, pictures, ["a"])
    scores = {}
    for name, names, templates, labels in (
        ("color", list(COLORS), COLOR_TEMPLATES, [scene.things[0].color for scene in scenes]),
        ("shape", list(SHAPES), SHAPE_TEMPLATES, [scene.things[0].shape for scene in scenes]),
    ):
        classes = class_embeddings(model, processor.tokenizer, names, templates)
        wanted = torch.tensor([names.index(label) for label in labels], device=images.device)
        right = accuracy(similarity(images, classes.float()), wanted)
        scores[f"zero-shot {name}"] = Metric(right, 1 / len(names), len(scenes))
    return scores


def evaluate_own_pairs(
    model: Matches, processor: PairProcessor, pairs: Sequence[Pair], progress: bool | None = None
) -> dict[str, Metric]:
    """Retrieval among the pictures and captions of a file.

    A picture that several lines name counts once. So do captions that the model cannot tell apart, such as "a
    cat" and "A cat ": what counts is their ids.

    Raises InputError: a picture turns out to be damaged.
    """
    pictures = list(dict.fromkeys(pair.path for pair in pairs))
    ids = [tuple(processor.tokenizer.encode(pair.text)) for pair in pairs]
    texts = {key: pair.text for key, pair in zip(ids, pairs, strict=True)}  # one for each row of ids
    right = torch.zeros(len(pictures), len(texts), dtype=torch.bool)
    row = {path: number for number, path in enumerate(pictures)}
    column = {key: number for number, key in enumerate(texts)}
    for key, pair in zip(ids, pairs, strict=True):
        right[row[pair.path], column[key]] = True
    images, captions = encode(model, processor, pictures, list(texts.values()), progress, "own pairs")
    return retrieval_scores(similarity(images, captions), right.to(images.device))
