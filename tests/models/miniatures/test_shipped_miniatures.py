"""The trained miniatures that ship with the package: small, and able to answer.

How well is in the table, bench/results/systems.txt.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import minivlm
from minivlm.evaluation import answer_all, make_questions, score
from minivlm.evaluation.clips import evaluate_clips
from minivlm.models.load import SHIPPED
from minivlm.models.miniatures.magic import match_with
from minivlm.models.qwen2_vl import Qwen2VL
from minivlm.processing import Qwen2VLProcessor
from minivlm.training.moving import SYSTEMS as MOVING

MINIATURES = SHIPPED.parent / "miniatures"
LARGEST = 1_500_000  # bytes of the weights, the image tower left out
NEEDED = {"clipcap", "flamingo", "visualgpt", "magic"}  # notebook 13 opens them
FOLDERS = sorted(path for path in MINIATURES.iterdir() if path.is_dir())


def test_what_notebooks_open_is_there() -> None:
    assert {path.name for path in FOLDERS} >= NEEDED


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_it_is_small_and_without_leftovers_of_training(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert (folder / "model.safetensors").stat().st_size <= LARGEST
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}
    assert not any(path.name == "state.safetensors" for path in files)


@pytest.mark.parametrize(
    "folder", [path for path in FOLDERS if path.name != "magic"], ids=lambda path: path.name
)
def test_it_answers_better_than_without_a_picture(folder: Path) -> None:
    model, processor = minivlm.load(folder)
    questions = make_questions(20, 5, "test", 64)
    questions = [question for question in questions if question.example.task in ("color", "shape")]
    pictures, prompts = [q.picture for q in questions], [q.example.prefix for q in questions]
    answers = answer_all(model, processor, pictures, prompts, progress=False)
    for name in ("color", "shape"):
        found = score(questions, answers)[name]
        assert found.value > found.baseline, name


@pytest.mark.parametrize(
    "folder", [path for path in FOLDERS if path.name in MOVING], ids=lambda path: path.name
)
def test_it_answers_about_clips(folder: Path) -> None:
    """The whole folder is small, and answers are better than the most frequent ones."""
    assert sum(path.stat().st_size for path in folder.iterdir()) <= LARGEST
    model, processor = minivlm.load(folder)
    assert isinstance(model, Qwen2VL)
    assert isinstance(processor, Qwen2VLProcessor)
    table = evaluate_clips(model, processor, 40, seed=6, tasks=("direction", "color"), progress=False)
    for name in ("direction", "color"):
        assert table[name].value > table[name].baseline + 0.1, name


def test_the_towers_of_magic_find_the_caption() -> None:
    towers, processor = minivlm.load(MINIATURES / "magic")
    scenes = {q.scene.caption(): q.picture for q in make_questions(16, 5, "test", 64)}
    captions = list(scenes)
    best = [int(match_with(towers, processor, picture)(captions).argmax()) for picture in scenes.values()]
    assert sum(found == number for number, found in enumerate(best)) > len(scenes) / 2
