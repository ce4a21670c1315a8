"""How good the answers are: exact match for words, intersection over union for boxes.

Every number stands beside its majority baseline, what a model would reach that always gives the most
frequent answer of the task (for boxes, the mean box): .60 on yes-or-no questions can be worse than nothing.
Scenes come from seeds that training never uses, and once more with pairs of color and shape that training
never showed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
from PIL import Image
from tqdm import tqdm

from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Box, Processor, text_to_boxes
from minivlm.scenes import TASKS, WORLD, Example, Scene, Split, make_scene

EVALUATION_STREAM = 2**31  # keeps the seeds of evaluation apart from those of training, which count steps
SPLITS: dict[str, Split] = {"held_out": "test", "unseen_pairs": "unseen"}
QUESTION_TASKS = ("color", "shape", "size", "count", "existence", "relation")
LONGEST_ANSWER = 64  # tokens


@dataclass(frozen=True)
class Metric:
    """One line of the table: the model's value, the majority baseline's, and over how many cases."""

    value: float
    majority: float
    cases: int


@dataclass(frozen=True)
class Question:
    """A picture, what is asked about it, and which scene it shows."""

    scene: Scene
    picture: Image.Image
    example: Example


def make_questions(scenes: int, seed: int, split: Split, pixels: int) -> list[Question]:
    """One prompt of each task about each of `scenes` held-out scenes, the same for the same seed."""
    questions = []
    for number in range(scenes):
        rng = np.random.default_rng([seed, EVALUATION_STREAM + get_args(Split).index(split), number])
        scene = make_scene(rng, split)
        picture = scene.draw(pixels)
        examples = [scene.ask(task, rng) for task in TASKS]
        questions += [Question(scene, picture, example) for example in examples if example is not None]
    return questions


def answer_all(
    model: PaliGemma,
    processor: Processor,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    batch_size: int = 64,
    progress: bool | None = None,
) -> list[str]:
    """Greedy answers to many prompts, in batches of rows of about equal length.

    progress: True shows a bar, False none, None only on a terminal.
    """
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i].split()[0], len(prompts[i])))
    answers = [""] * len(prompts)
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, unit="batch", disable=None if progress is None else not progress):
        rows = order[start : start + batch_size]
        inputs = processor([pictures[i] for i in rows], [prompts[i] for i in rows])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        texts = processor.decode(model.generate(**inputs, max_new_tokens=LONGEST_ANSWER))
        for i, text in zip(rows, texts, strict=True):
            answers[i] = text
    return answers


def evaluate(
    model: PaliGemma,
    processor: Processor,
    scenes: int = 1000,
    seed: int = 1,
    progress: bool | None = None,
) -> dict[str, dict[str, Metric]]:
    """The whole table: for each split ("held_out", "unseen_pairs") the metrics by name."""
    table = {}
    for name, split in SPLITS.items():
        questions = make_questions(scenes, seed, split, processor.image_processor.image_size)
        answers = answer_all(
            model,
            processor,
            [question.picture for question in questions],
            [question.example.prefix for question in questions],
            progress=progress,
        )
        table[name] = score(questions, answers)
    return table


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Metric]:
    """Metrics of answers to questions."""
    metrics = {}
    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    truths: dict[str, list[str]] = {task: [] for task in TASKS}
    for question, answer in zip(questions, answers, strict=True):
        right[question.example.task].append(answer == question.example.suffix)
        truths[question.example.task].append(question.example.suffix)
    for task in QUESTION_TASKS:
        metrics[task] = _accuracy(right[task], truths[task])
    asked = [metrics[task] for task in QUESTION_TASKS]
    cases = sum(metric.cases for metric in asked)
    metrics["all questions"] = Metric(
        value=sum(metric.value * metric.cases for metric in asked) / max(cases, 1),
        majority=sum(metric.majority * metric.cases for metric in asked) / max(cases, 1),
        cases=cases,
    )
    metrics["exact caption"] = _accuracy(right["caption"], truths["caption"])
    return metrics | _score_boxes(questions, answers)


def _accuracy(right: list[bool], truths: list[str]) -> Metric:
    most_frequent = Counter(truths).most_common(1)[0][1] if truths else 0
    cases = max(len(right), 1)
    return Metric(sum(right) / cases, most_frequent / cases, len(right))


def _score_boxes(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Metric]:
    asked = [(q.example, a) for q, a in zip(questions, answers, strict=True) if q.example.task == "detect"]
    wanted = [[thing.box for thing in example.things] for example, _ in asked]
    mean_box = (
        tuple(np.mean([box for boxes in wanted for box in boxes], axis=0)) if any(wanted) else (0, 0, 1, 1)
    )
    ious, guesses = [], []
    for boxes, (_, answer) in zip(wanted, asked, strict=True):
        ious += match_boxes(boxes, text_to_boxes(answer, WORLD, WORLD))
        guesses += match_boxes(boxes, [Box(*mean_box)] * len(boxes))
    absent = [text_to_boxes(answer, WORLD, WORLD) == [] for example, answer in asked if not example.things]
    cases = len(ious)
    return {
        "box mean IoU": Metric(sum(ious) / max(cases, 1), sum(guesses) / max(cases, 1), cases),
        "box recall at 0.5": Metric(
            sum(iou >= 0.5 for iou in ious) / max(cases, 1),
            sum(iou >= 0.5 for iou in guesses) / max(cases, 1),
            cases,
        ),
        # A model that always gives a box is never right here, one that never does always.
        "nothing to detect": Metric(sum(absent) / max(len(absent), 1), 0.0, len(absent)),
    }


def match_boxes(wanted: Sequence[Sequence[float]], found: Sequence[Box]) -> list[float]:
    """IoU of each wanted box with its match: best pairs first, each found box used once, 0 without one."""
    pairs = [(box_iou(box, other), i, j) for i, box in enumerate(wanted) for j, other in enumerate(found)]
    ious: dict[int, float] = {}
    used: set[int] = set()
    for iou, i, j in sorted(pairs, reverse=True):
        if i not in ious and j not in used:
            ious[i] = iou
            used.add(j)
    return [ious.get(i, 0.0) for i in range(len(wanted))]


def box_iou(a: Sequence[float] | Box, b: Sequence[float] | Box) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    ax0, ay0, ax1, ay1 = a[:4]
    bx0, by0, bx1, by1 = b[:4]
    overlap = max(min(ax1, bx1) - max(ax0, bx0), 0) * max(min(ay1, by1) - max(ay0, by0), 0)
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - overlap
    return float(overlap / union) if union > 0 else 0.0


def as_json(table: dict[str, dict[str, Metric]]) -> dict[str, Any]:
    """The table as plain numbers, rounded to four decimals."""
    return {
        split: {
            name: {key: round(number, 4) for key, number in asdict(metric).items()}
            for name, metric in metrics.items()
        }
        for split, metrics in table.items()
    }


def as_text(table: dict[str, dict[str, Metric]]) -> str:
    """The table as Markdown."""
    held_out, unseen = table["held_out"], table["unseen_pairs"]
    lines = ["| | held-out scenes | unseen pairs | majority | cases |", "|---|---|---|---|---|"]
    for name, metric in held_out.items():
        numbers = (metric.value, unseen[name].value, metric.majority)
        lines.append(f"| {name} | {' | '.join(f'{number:.3f}' for number in numbers)} | {metric.cases} |")
    return "\n".join(lines)
