"""How good a model's answers are about your own pictures: what `minivlm eval --data` prints.

Words are right or wrong, by kind of prompt. Boxes and masks are compared where true answers hold `<loc>` and
`<seg>` words: things of one name with each other. Beside each number stands what a constant reaches that was
chosen with the true answers in hand: the most frequent answer to this kind of prompt; for boxes the mean box
of each name that was ever the answer to this very prompt; for masks this box, filled.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from minivlm.data.samples import Sample, make_inputs
from minivlm.evaluation.answers import Shown, answer_all, box_scores
from minivlm.evaluation.baselines import filled_mask
from minivlm.evaluation.detection import Detection, Overlap, best_overlaps, box_iou
from minivlm.evaluation.kinds import kinds_of
from minivlm.evaluation.repeats import write_until_repeats
from minivlm.evaluation.scoring import MASK_SIDE, box_values, mask_values, mean_of
from minivlm.evaluation.tables import Metric
from minivlm.models.protocols import Answers
from minivlm.processing import (
    AnswerProcessor,
    Box,
    Mask,
    MaskCodebook,
    boxes_to_text,
    mask_iou,
    text_to_boxes,
    text_to_masks,
    to_device,
)
from minivlm.processing.inputs import IGNORE

Named = tuple[Box, Any]  # a thing, and the box that says where it is and what it is called

MORE_TOKENS = 8  # than the longest true answer has; whoever needs them is wrong already


@dataclass(frozen=True)
class OwnAnswers:
    """Lines, what kind of prompt each has, what a model answered, and how sure it was of each box."""

    samples: Sequence[Sample]
    kinds: Sequence[str]
    answers: Sequence[str]
    sureness: Sequence[Sequence[float]]


def answer_own(
    model: Answers,
    processor: AnswerProcessor,
    samples: Sequence[Sample],
    batch_size: int = 16,
    progress: bool | None = None,
) -> OwnAnswers:
    """The model's greedy answers to all lines. Pictures are opened when it is their turn.

    Raises InputError: as the processor and `minivlm.generate.stream`.
    """
    answers = answer_own_words(model, processor, samples, batch_size, progress)
    pictures, prompts = _shown(samples)
    sureness = box_scores(model, processor, pictures, prompts, answers, batch_size)
    return OwnAnswers(samples, kinds_of(prompts), answers, sureness)


def answer_own_words(
    model: Answers,
    processor: AnswerProcessor,
    samples: Sequence[Sample],
    batch_size: int = 16,
    progress: bool | None = None,
) -> list[str]:
    """The answers alone."""
    pictures, prompts = _shown(samples)
    tokenizer, context = processor.tokenizer, model.language_model.config.max_position_embeddings
    prompted = [(processor.encode_row(one.prefix, None, len(one.paths)), one.paths) for one in samples]
    longest = max(len(processor.make_room(row, paths).ids) for row, paths in prompted)
    expected = [sample.suffix for sample in samples]
    most = max(len(tokenizer.encode(answer)) for answer in expected) + MORE_TOKENS
    write = partial(write_until_repeats, model, min(most, context - longest), tokenizer.seg_ids)
    return answer_all(
        model, processor, pictures, prompts, batch_size, progress, "answers", expected=expected, write=write
    )


def _shown(samples: Sequence[Sample]) -> tuple[list[Shown], list[str]]:
    return [list(sample.paths) for sample in samples], [sample.prefix for sample in samples]


# ---- numbers -----------------------------------------------------------------------------------------------


def own_metrics(given: OwnAnswers, codebook: MaskCodebook | None = None) -> dict[str, Metric]:
    """The rows of the table: exact answers in all and by kind, then boxes and masks if there are any.

    Args:
        codebook: of the model; None: the shipped one.
    """
    wanted = [sample.suffix for sample in given.samples]
    frequent = _most_frequent(given.kinds, wanted)
    rows = {"exact, all lines": list(range(len(wanted)))}
    if len(frequent) > 1:
        by_kind = {kind: [i for i, one in enumerate(given.kinds) if one == kind] for kind in frequent}
        rows |= {f"exact, {kind}": lines for kind, lines in by_kind.items()}
    metrics = {}
    for name, lines in rows.items():
        right, cases = mean_of([given.answers[i] == wanted[i] for i in lines])
        constant, _ = mean_of([frequent[given.kinds[i]] == wanted[i] for i in lines])
        metrics[name] = Metric(right, constant, cases)
    return metrics | _box_metrics(given) | _mask_metrics(given, codebook)


def score_of(wanted: str, answer: str) -> float:
    """How good an answer is, from 0 to 1: right or wrong, or for boxes the mean overlap.

    The mean is over the boxes that are wanted, or those that were found if these are more.
    """
    boxes, found = _boxes(wanted), _boxes(answer)
    if answer == wanted or not boxes:
        return float(answer == wanted)
    ious = [iou for one in _by_name(boxes, found, []) for iou in best_overlaps(one)]
    return sum(ious) / max(len(boxes), len(found))


@torch.inference_mode()
def surprise(
    model: Answers, processor: AnswerProcessor, samples: Sequence[Sample], batch_size: int = 8
) -> list[float]:
    """How little the model expects each true answer: its loss, a mean over tokens."""
    losses: list[float] = []
    for start in range(0, len(samples), batch_size):
        inputs = to_device(make_inputs(processor, samples[start : start + batch_size]), model.device)
        words = inputs["labels"][:, 1:]  # [B, S - 1], each predicted by the logits before it
        log_probs = model(**inputs).logits[:, :-1].float().log_softmax(dim=-1)
        log_probs = log_probs.gather(-1, words.clamp(min=0)[..., None])[..., 0]
        written = words != IGNORE
        losses += (-(log_probs * written).sum(dim=1) / written.sum(dim=1)).tolist()
    return losses


def _most_frequent(kinds: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
    """The most frequent true answer to each kind, the most frequent kind first."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, answer in zip(kinds, wanted, strict=True):
        answers[kind][answer] += 1
    return {kind: answers[kind].most_common(1)[0][0] for kind, _ in Counter(kinds).most_common()}


def _with_boxes(given: OwnAnswers) -> list[int]:
    """The lines whose kind of prompt has boxes in some true answer."""
    boxed = {
        kind
        for kind, sample in zip(given.kinds, given.samples, strict=True)
        if text_to_boxes(sample.suffix, 1, 1)
    }
    return [i for i, kind in enumerate(given.kinds) if kind in boxed]


def _box_metrics(given: OwnAnswers) -> dict[str, Metric]:
    lines = _with_boxes(given)
    if not lines:
        return {}
    constant = _mean_boxes([given.samples[i] for i in lines])
    ours, theirs, nothing, never = [], [], [], []
    for i in lines:
        sample = given.samples[i]
        wanted, found = _boxes(sample.suffix), _boxes(given.answers[i])
        guessed = [(box, box) for box in constant[sample.prefix]]
        ours += _by_name(wanted, found, given.sureness[i])
        theirs += _by_name(wanted, guessed, [])
        if not wanted:
            nothing.append(not found)
            never.append(not guessed)
    majority = box_values(theirs)
    metrics = {
        name: Metric(value, majority[name][0], cases) for name, (value, cases) in box_values(ours).items()
    }
    if nothing:
        metrics["nothing to detect"] = Metric(mean_of(nothing)[0], mean_of(never)[0], len(nothing))
    return metrics


def box_iou_of(samples: Sequence[Sample], answers: Sequence[str]) -> float:
    """The mean IoU of all wanted boxes, as in the table; 0 where none is wanted."""
    pairs = [
        one
        for sample, answer in zip(samples, answers, strict=True)
        for one in _by_name(_boxes(sample.suffix), _boxes(answer), [])
    ]
    return mean_of([iou for one in pairs for iou in best_overlaps(one)])[0]


def _by_name(
    wanted: Sequence[Named], found: Sequence[Named], sureness: Sequence[float], overlap: Overlap = box_iou
) -> list[Detection]:
    """One for each name in a picture. Without sureness, all that was found is equally sure."""
    scores = list(sureness) or [1.0] * len(found)
    return [
        Detection(
            name,
            [thing for box, thing in wanted if box.name == name],
            [thing for box, thing in found if box.name == name],
            [score for (box, _), score in zip(found, scores, strict=True) if box.name == name],
            overlap,
        )
        for name in dict.fromkeys(box.name for box, _ in (*wanted, *found))
    ]


def _boxes(text: str) -> list[Named]:
    """The boxes in an answer, each as the thing that its name stands for."""
    return [(box, box) for box in text_to_boxes(text, 1, 1)]


def _mean_boxes(samples: Sequence[Sample]) -> dict[str, list[Box]]:
    """For each prompt, the mean box of each name that its true answers hold."""
    of_name: dict[str, list[Box]] = defaultdict(list)
    names: dict[str, dict[str, None]] = defaultdict(dict)
    for sample in samples:
        for box in text_to_boxes(sample.suffix, 1, 1):
            of_name[box.name].append(box)
            names[sample.prefix][box.name] = None
    mean = {}
    for name, boxes in of_name.items():
        x0, y0, x1, y1 = np.mean([box[:4] for box in boxes], axis=0).tolist()
        mean[name] = Box(x0, y0, x1, y1, name)
    return {sample.prefix: [mean[name] for name in names[sample.prefix]] for sample in samples}


def _mask_metrics(given: OwnAnswers, codebook: MaskCodebook | None) -> dict[str, Metric]:
    """Masks are compared as the words of the true answer draw them."""

    def masks(text: str) -> list[Mask]:
        return text_to_masks(text, MASK_SIDE, MASK_SIDE, codebook)

    lines = [i for i in _with_boxes(given) if masks(given.samples[i].suffix)]
    if not lines:
        return {}
    constant = _mean_boxes([given.samples[i] for i in lines])
    ours, theirs = [], []
    for i in lines:
        sample, answer = given.samples[i], given.answers[i]
        guessed = " ; ".join(
            boxes_to_text([box._replace(name="")], 1, 1) + f"{filled_mask()} {box.name}"
            for box in constant[sample.prefix]
        )
        wanted, found = masks(sample.suffix), masks(answer)
        ours += _by_name(wanted, found, _sureness_of(found, answer, given.sureness[i]), mask_iou)
        theirs += _by_name(wanted, text_to_masks(guessed, MASK_SIDE, MASK_SIDE), [], mask_iou)
    majority = mask_values(theirs)
    return {
        name: Metric(value, majority[name][0], cases) for name, (value, cases) in mask_values(ours).items()
    }


def _sureness_of(masks: Sequence[Mask], answer: str, of_boxes: Sequence[float]) -> list[float]:
    """How sure the model was of each mask: as sure as of its box. Not every box of an answer has one."""
    boxes = text_to_boxes(answer, MASK_SIDE, MASK_SIDE)
    both = iter(zip(boxes, list(of_boxes) or [1.0] * len(boxes), strict=True))
    return [next(score for box, score in both if box == mask.box) for mask in masks]
