"""How good the answers are: the table that `minivlm eval` prints.

Rows are measures: exact match for words, overlap for boxes and masks. Columns are ways to ask: scenes from
seeds that training never uses, scenes with pairs of color and shape that training never showed, and the
first of these once more on other grounds, with turned things, as JPEGs, and drawn by other programs. Beside
them stands what can be reached without looking (baselines.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, get_args

import numpy as np
from PIL import Image

from minivlm.answering import answer_all, box_scores
from minivlm.errors import InputError
from minivlm.evaluation.baselines import text_only_answers
from minivlm.evaluation.detection import match_boxes
from minivlm.evaluation.scoring import Metric, Question, score
from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Processor
from minivlm.world.augmentations import as_jpeg, on_gray, turned
from minivlm.world.questions import TASKS, Example, ask
from minivlm.world.renderers import BROWSERS, CHROMIUM, draw_with_browser, draw_with_matplotlib, find_browser
from minivlm.world.scenes import Scene, Split, make_scene

__all__ = [
    "COLUMNS",
    "Metric",
    "Question",
    "answer_all",
    "as_json",
    "as_text",
    "evaluate",
    "make_questions",
    "match_boxes",
    "score",
]

EVALUATION_STREAM = 2**31  # keeps the seeds of evaluation apart from those of training, which count steps
CHANGES = len(get_args(Split))  # number of the stream that changes scenes; those before it make them


def draw(scenes: Sequence[Scene], pixels: int) -> list[Image.Image]:
    """The pictures as training shows them."""
    return [scene.draw(pixels) for scene in scenes]


def draw_jpegs(scenes: Sequence[Scene], pixels: int) -> list[Image.Image]:
    """The pictures after strong compression."""
    return [as_jpeg(scene.draw(pixels), quality=50) for scene in scenes]


@dataclass(frozen=True)
class Column:
    """A way to ask: about which scenes, changed how before anything is asked, and drawn by whom."""

    title: str
    split: Split = "test"
    change: Callable[[Scene, np.random.Generator], Scene] | None = None
    draw: Callable[[Sequence[Scene], int], list[Image.Image]] = draw


# All but the second show the same scenes, and ask the same questions about them.
COLUMNS = {
    "held_out": Column("held-out scenes"),
    "unseen_pairs": Column("unseen pairs", split="unseen"),
    "other_grays": Column("other grays", change=partial(on_gray, least=40, below=161)),
    "turned": Column("turned", change=partial(turned, degrees=15)),
    "jpeg": Column("JPEG", draw=draw_jpegs),
    "matplotlib": Column("matplotlib", draw=draw_with_matplotlib),
    "browser": Column("browser", draw=draw_with_browser),
    "text_only": Column("text only"),  # answered without the model
}

Table = dict[str, dict[str, Metric]]  # column -> row -> number


def make_questions(scenes: int, seed: int, split: Split, pixels: int) -> list[Question]:
    """One prompt of each task about each of `scenes` scenes of a split, the same for the same seed."""
    return questions_of(Column("", split), scenes, seed, pixels)


def questions_of(column: Column, scenes: int, seed: int, pixels: int) -> list[Question]:
    """One prompt of each task about each scene, as a column of the table asks.

    Other looks have random numbers of their own, so that every column asks the same questions. What is asked
    depends on names and places, which no column changes; boxes and outlines turn with the things.
    """
    shown: list[Scene] = []
    asked: list[list[Example]] = []
    for number in range(scenes):
        stream = EVALUATION_STREAM + get_args(Split).index(column.split)
        rng = np.random.default_rng([seed, stream, number])
        scene = make_scene(rng, column.split)
        if column.change is not None:
            scene = column.change(scene, np.random.default_rng([seed, EVALUATION_STREAM + CHANGES, number]))
        shown.append(scene)
        asked.append([example for task in TASKS if (example := ask(scene, task, rng)) is not None])
    pictures = column.draw(shown, pixels)
    return [
        Question(scene, picture, example)
        for scene, picture, some in zip(shown, pictures, asked, strict=True)
        for example in some
    ]


def evaluate(
    model: PaliGemma,
    processor: Processor,
    scenes: int = 2000,
    seed: int = 1,
    progress: bool | None = None,
    columns: Sequence[str] = tuple(COLUMNS),
) -> Table:
    """The table, or some of its columns: by column the metrics by name.

    Where there is no browser, its column is empty.

    Raises InputError: a column of another name, or a browser that fails.
    """
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        raise InputError(f"there is no column {unknown[0]!r}: choose from {', '.join(COLUMNS)}")
    pixels = processor.image_processor.image_size
    missing = ["browser"] if "browser" in columns and find_browser() is None else []
    # All pictures come first: what a browser refuses is refused before minutes are spent on answers.
    asked = {
        name: questions_of(COLUMNS[name], scenes, seed, pixels) for name in columns if name not in missing
    }
    table: Table = {name: {} for name in columns}
    for name, questions in asked.items():
        if name == "text_only":
            table[name] = score(questions, text_only_answers([question.example for question in questions]))
        else:
            table[name] = _examine(model, processor, questions, progress, COLUMNS[name].title)
    return table


def _examine(
    model: PaliGemma, processor: Processor, questions: Sequence[Question], progress: bool | None, label: str
) -> dict[str, Metric]:
    """Metrics of the model's answers; it is also asked how sure it is of the boxes that it detects."""
    pictures = [question.picture for question in questions]
    prompts = [question.example.prefix for question in questions]
    expected = [question.example.suffix for question in questions]
    answers = answer_all(
        model, processor, pictures, prompts, progress=progress, label=label, expected=expected
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


# ---- the table as text -------------------------------------------------------------------------------------


def as_json(table: Table) -> dict[str, Any]:
    """The table as plain numbers, rounded to four decimals."""
    return {
        column: {
            name: {key: round(number, 4) for key, number in asdict(metric).items()}
            for name, metric in metrics.items()
        }
        for column, metrics in table.items()
    }


def as_text(table: Table) -> str:
    """The table as Markdown. Majority and cases are those of its first column."""
    shown = {name: metrics for name, metrics in table.items() if metrics}
    first = next(iter(shown.values()), {})
    values = {name: {row: metric.value for row, metric in metrics.items()} for name, metrics in shown.items()}
    text_only = {"text only": values.pop("text_only")} if "text_only" in values else {}
    columns = {COLUMNS[name].title: column for name, column in values.items()}
    columns |= {"majority": {row: metric.majority for row, metric in first.items()}} | text_only
    lines = [f"| | {' | '.join(columns)} | cases |", "|---" * (len(columns) + 2) + "|"]
    for row, metric in first.items():
        cells = [f"{column[row]:.3f}" for column in columns.values()]
        lines.append(f"| {row} | {' | '.join(cells)} | {metric.cases} |")
    if table.get("browser") == {}:
        names = ", ".join(BROWSERS)
        lines += ["", f"The column browser is left out: no {names} was found, and {CHROMIUM} is not set."]
    return "\n".join(lines)
