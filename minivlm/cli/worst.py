"""The page of `minivlm eval --worst`: pictures with the worst answers, and what would have been right."""

from __future__ import annotations

from pathlib import Path

from minivlm.cli.pictures import draw_answers
from minivlm.evaluation.own import OwnAnswers, score_of, surprise
from minivlm.files import write_aside
from minivlm.looking.sheet import Entry, sheet_page
from minivlm.models.protocols import Answers
from minivlm.processing import AnswerProcessor, load_picture, text_to_boxes, to_rgb

MOST = 20


def write_worst(
    page: Path, model: Answers, processor: AnswerProcessor, given: OwnAnswers, about: str, most: int = MOST
) -> int:
    """Write the page, and return how many lines are on it: none whose answer is right.

    Of answers that are equally bad, those come first whose true answer the model expects the least.

    Raises InputError: the page cannot be written; a picture is gone.
    """
    scores = [score_of(one.suffix, answer) for one, answer in zip(given.samples, given.answers, strict=True)]
    wrong = [number for number, score in enumerate(scores) if score < 1]
    losses = dict(zip(wrong, surprise(model, processor, [given.samples[i] for i in wrong]), strict=True))
    worst = sorted(wrong, key=lambda number: (scores[number], -losses[number]))[:most]
    entries = [_entry(given, number, scores[number]) for number in worst]
    title = f"The worst {len(worst)} of {len(given.samples)} answers to {about}"
    with write_aside(page) as temporary:
        temporary.write_text(sheet_page(entries, title), encoding="utf-8", errors="backslashreplace")
    return len(worst)


def _entry(given: OwnAnswers, number: int, score: float) -> Entry:
    """One line: with boxes, its picture twice, as it should be and as it was answered."""
    sample, answer = given.samples[number], given.answers[number]
    pictures = [to_rgb(load_picture(path)) for path in sample.paths]
    boxed = any(text_to_boxes(text, 1, 1) for text in (sample.suffix, answer))
    if boxed and len(pictures) == 1:  # boxes do not say which of several pictures they are in
        pictures = [draw_answers(pictures[0], [text]) for text in (sample.suffix, answer)]
    names = ", ".join(map(str, sample.paths))
    said = f"true: {sample.suffix} | answered: {answer}"
    return Entry(pictures, f"line {sample.line}, score {score:.2f}: {names}", sample.prefix, said)
