"""How good a model's answers are: the table that `minivlm eval` prints.

Rows are measures: exact match for words, overlap for boxes and masks. Columns are ways to ask: scenes from
seeds that training never uses, scenes with pairs of color and shape that training never showed, and the
first of these once more on other grounds, with turned things, as JPEGs, and drawn by other programs. Beside
them stands what can be reached without looking (baselines.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minivlm.errors import InputError
from minivlm.evaluation.baselines import text_only_answers
from minivlm.evaluation.columns import ALL_COLUMNS, COLUMNS, Column
from minivlm.evaluation.scoring import Question, score
from minivlm.evaluation.tables import Metric, Table
from minivlm.evaluation.waiting import Bar, evenly_spread
from minivlm.generate import explain_nonfinite
from minivlm.models.protocols import Answers
from minivlm.processing import (
    AnswerProcessor,
    BaseTokenizer,
    ImageProcessor,
    Video,
    box_to_tokens,
    text_to_boxes,
    to_device,
)
from minivlm.processing.inputs import Picture
from minivlm.world.questions import TASKS, Example, ask
from minivlm.world.renderers import find_browser
from minivlm.world.scenes import Scene, Split, make_scene

Shown = Picture | Video | Sequence[Picture | Video]  # what a prompt is about

MOST_DRAWN = 448  # pixels of a scene's side, for a model that reads pictures of any size
LONGEST_ANSWER = 96  # tokens; three things to segment take 69


def make_questions(scenes: int, seed: int, split: Split, pixels: int) -> list[Question]:
    """One prompt of each task about each of `scenes` scenes of a split, the same for the same seed."""
    return questions_of(Column("", split), scenes, seed, pixels)


def questions_of(column: Column, scenes: int, seed: int, pixels: int) -> list[Question]:
    """One prompt of each task about each scene, as a column of the table asks.

    What is asked depends on names and places, which no column changes: every column of a split asks the same
    questions. Only boxes and outlines turn with the things.
    """
    shown: list[Scene] = []
    asked: list[list[Example]] = []
    for number in range(scenes):
        rng = np.random.default_rng([seed, column.stream, number])
        scene = column.changed(make_scene(rng, column.split), seed, number)
        shown.append(scene)
        asked.append([example for task in TASKS if (example := ask(scene, task, rng)) is not None])
    pictures = column.draw(shown, pixels)
    return [
        Question(scene, picture, example)
        for scene, picture, examples in zip(shown, pictures, asked, strict=True)
        for example in examples
    ]


def evaluate(
    model: Answers,
    processor: AnswerProcessor,
    scenes: int = 2000,
    seed: int = 1,
    progress: bool | None = None,
    columns: Sequence[str] = tuple(COLUMNS),
) -> Table:
    """The table, or some of its columns: by column the metrics by name.

    Where there is no browser, its column is empty.

    Raises InputError: a column of another name, or a browser that fails.
    """
    unknown = [name for name in columns if name not in ALL_COLUMNS]
    if unknown:
        raise InputError(f"there is no column {unknown[0]!r}: choose from {', '.join(ALL_COLUMNS)}")
    pixels = drawn_side(processor.image_processor)
    missing = ["browser"] if "browser" in columns and find_browser() is None else []
    # All pictures come first: what a browser refuses is refused before minutes are spent on answers.
    asked = {
        name: questions_of(ALL_COLUMNS[name], scenes, seed, pixels) for name in columns if name not in missing
    }
    table: Table = {name: {} for name in columns}
    # Columns take about as long as each other: the first says how long all of them take.
    rounds = len(asked.keys() - {"text_only"})
    for name, questions in asked.items():
        if name == "text_only":
            table[name] = score(questions, text_only_answers([question.example for question in questions]))
        else:
            table[name] = _examine(model, processor, questions, progress, ALL_COLUMNS[name].title, rounds)
            rounds = 0
    return table


def drawn_side(image_processor: ImageProcessor) -> int:
    """How many pixels wide scenes are drawn: as many as a model reads, or MOST_DRAWN where it reads any.

    The largest picture that a published Qwen2-VL reads is 3,584 pixels wide, and has 16,384 tokens.
    """
    side = image_processor.image_size
    return min(side, MOST_DRAWN) if image_processor.fitted == "kept" else side


def _examine(
    model: Answers,
    processor: AnswerProcessor,
    questions: Sequence[Question],
    progress: bool | None,
    label: str,
    rounds: int,
) -> dict[str, Metric]:
    """Metrics of the model's answers; it is also asked how sure it is of the boxes that it detects."""
    pictures = [question.picture for question in questions]
    prompts = [question.example.prefix for question in questions]
    expected = [question.example.suffix for question in questions]
    answers = answer_all(
        model,
        processor,
        pictures,
        prompts,
        progress=progress,
        label=label,
        rounds=rounds,
        expected=expected,
    )
    detect = [i for i, question in enumerate(questions) if question.example.task == "detect"]
    found = box_scores(
        model,
        processor,
        [pictures[i] for i in detect],
        [prompts[i] for i in detect],
        [answers[i] for i in detect],
    )
    sureness: list[list[float]] = [[] for _ in questions]
    for i, scores in zip(detect, found, strict=True):
        sureness[i] = scores
    return score(questions, answers, sureness)


def answer_questions(
    model: Answers, processor: AnswerProcessor, questions: Sequence[Question], progress: bool | None = False
) -> list[str]:
    """Greedy answers to questions about scenes, in their order."""
    return answer_all(
        model,
        processor,
        [question.picture for question in questions],
        [question.example.prefix for question in questions],
        progress=progress,
        expected=[question.example.suffix for question in questions],
    )


def answer_all(
    model: Answers,
    processor: AnswerProcessor,
    pictures: Sequence[Shown],
    prompts: Sequence[str],
    batch_size: int = 64,
    progress: bool | None = None,
    label: str | None = None,
    rounds: int = 1,
    expected: Sequence[str] | None = None,
    write: Callable[..., Tensor] | None = None,
) -> list[str]:
    """Greedy answers to many prompts, in batches of rows of about equal length.

    Args:
        progress: True shows a bar, False none, None a bar on a terminal and lines elsewhere.
        label: what the bar is called.
        rounds: as in `Bar`.
        expected: answers of about the same length, where they are known. A batch takes as long as its longest
            answer, so rows are sorted by them; nothing but the time depends on it.
        write: inputs -> new tokens [B, n]; None: up to LONGEST_ANSWER of the model's own.
    """
    write = partial(model.generate, max_new_tokens=LONGEST_ANSWER) if write is None else write
    answer_lengths = [0] * len(prompts) if expected is None else [len(answer) for answer in expected]
    order = sorted(
        range(len(prompts)), key=lambda i: (prompts[i].split()[0], answer_lengths[i], len(prompts[i]))
    )
    answers = [""] * len(prompts)
    starts = [batch * batch_size for batch in evenly_spread(-(-len(order) // batch_size))]
    for start in Bar(starts, label, unit="batch", progress=progress, rounds=rounds):
        rows = order[start : start + batch_size]
        inputs = to_device(processor([pictures[i] for i in rows], [prompts[i] for i in rows]), model.device)
        texts = processor.decode(write(**inputs))
        for i, text in zip(rows, texts, strict=True):
            answers[i] = text
    return answers


@torch.inference_mode()
def box_scores(
    model: Answers,
    processor: AnswerProcessor,
    pictures: Sequence[Shown],
    prompts: Sequence[str],
    answers: Sequence[str],
    batch_size: int = 64,
) -> list[list[float]]:
    """How sure the model is of each box that `text_to_boxes` finds in its answers, from 0 to 1.

    A box is four words, each with a probability; their geometric mean is the box's score. The probabilities
    come from reading picture, prompt and answer once more, all in one forward pass.

    Raises InputError: the model returns NaN or infinity.
    """
    boxes = [text_to_boxes(answer, 1, 1) for answer in answers]
    scores: list[list[float]] = [[] for _ in answers]
    order = sorted((i for i, found in enumerate(boxes) if found), key=lambda i: len(answers[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs = processor(
            [pictures[i] for i in rows], [prompts[i] for i in rows], [answers[i] for i in rows]
        )
        inputs = to_device(inputs, model.device)
        words = inputs["labels"][:, 1:]  # [B, S - 1], each predicted by the logits before it
        log_probs = model(**inputs).logits[:, :-1].float().log_softmax(dim=-1)  # [B, S - 1, V]
        log_probs = log_probs.gather(-1, words.clamp(min=0)[..., None])[..., 0]  # [B, S - 1], of these words
        if not torch.isfinite(log_probs[words >= 0]).all():
            raise InputError(explain_nonfinite(model, inputs))
        for i, ids, of_words in zip(rows, words.tolist(), log_probs, strict=True):
            for place in _places(processor.tokenizer, ids, [box_to_tokens(box, 1, 1) for box in boxes[i]]):
                scores[i].append(float(of_words[place].mean().exp()))
    return scores


def _places(tokenizer: BaseTokenizer, ids: Sequence[int], texts: Sequence[str]) -> Iterator[slice]:
    """Where in the ids of an answer each of these texts stands, from left to right; ids below 0 are others'.

    Where boxes are no words of the vocabulary, a piece may begin with the space before a box. If a piece also
    holds something else, the place of the box is the whole answer.
    """
    start = 0
    for text in texts:
        forms = (tokenizer.encode(text), tokenizer.encode(f" {text}"))
        found = (
            slice(i, i + len(form))
            for form in forms
            for i in range(start, len(ids))
            if ids[i : i + len(form)] == form
        )
        place = next(found, None)
        if place is None:
            yield slice(next(i for i, index in enumerate(ids) if index >= 0), len(ids))
        else:
            yield place
            start = place.stop
