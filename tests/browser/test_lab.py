"""The notebooks in JupyterLab, in a browser: what a reader gets who runs them."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from hover import explore
from lab import (
    Lab,
    LabError,
    cell_with,
    open_notebook,
    read_notebook,
    run_all,
    running_lab,
    type_instead_of,
)
from notebooks_and_sources import NOTEBOOKS, ROOT
from outputs import differences
from playwright.sync_api import Page, expect

from minivlm.classroom.workshop import BLANK

TRAIN_FOR_MINUTES = {"07_training", "10_contrastive_training"}
TAKE_LONG = {
    "03_attention",
    "05_gemma",
    "06_merging",
    "08_boxes_and_masks",
    "11_real_checkpoints",
    "12_fine_tuning",
    "13_four_ways",
    "14_llava",
    "15_qwen_vl",
    "16_qwen2_vl",
    "17_qwen2_5_vl",
    "18_deepseek_vl",
    "19_deepseek_vl2",
    "20_llama_vision",
    "21_scaling_out",
    "22_reasoning",
}
SLOW = TRAIN_FOR_MINUTES | TAKE_LONG  # nbval spends minutes on them already
WITH_HOVER = {"09_looking_inside"}


def notebooks() -> list[Any]:
    """The slow ones first, so that one process is not left alone with them."""
    ordered = sorted(NOTEBOOKS, key=lambda path: path.stem not in SLOW)
    return [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])
        for path in ordered
    ]


@pytest.mark.parametrize("path", notebooks())
def test_run_all_gives_the_stored_outputs(path: Path, lab: Lab, page: Page) -> None:
    saved = run_all(page, lab, f"notebooks/{path.name}")
    assert differences(read_notebook(path), saved) == {}

    pictures = page.locator('.jp-OutputArea div[id^="look-"]')
    assert bool(pictures.count()) == (path.stem in WITH_HOVER)
    for picture in pictures.all():
        explore(page, picture)


# What a student types into the blank of an exercise: first a wrong answer, then the right one.
TYPED = {
    ("00_tour", "sequence_length"): (
        "return (image_size // patch_size) ** 2 + prompt_tokens",
        [
            "image_tokens = (image_size // patch_size) ** 2",
            "return image_tokens + 1 + prompt_tokens + 1  # <bos> before the prompt, a newline after it",
        ],
    ),
    ("04_processor", "box_to_bins"): (
        "return [round(box[i] / (width, height)[i % 2] * 1023) for i in range(4)]",
        [
            "shares = (box[1] / height, box[0] / width, box[3] / height, box[2] / width)",
            "return [min(max(round(share * 1023), 0), 1023) for share in shares]",
        ],
    ),
}


@pytest.mark.parametrize(("name", "exercise"), TYPED, ids=[".".join(one) for one in TYPED])
def test_a_student_solves_an_exercise(name: str, exercise: str, workshop: str, lab: Lab, page: Page) -> None:
    stored = read_notebook(ROOT / "notebooks" / f"{name}.ipynb")
    saved = run_all(page, lab, f"{workshop}/notebooks/{name}.ipynb")
    checks = {cell.id for cell in stored.cells if "check" in cell.metadata.get("tags", [])}
    assert differences(stored, saved).keys() == checks, "with blanks, all but the checks is as in the course"

    cell, check = cell_with(page, f"def {exercise}("), cell_with(page, f".{exercise}({exercise})")
    verdict = check.locator(".jp-OutputArea")
    expect(verdict).to_contain_text("still blank")
    wrong, right = TYPED[name, exercise]
    type_instead_of(page, cell, BLANK, [wrong])
    run_with_its_check(page)
    expect(verdict).not_to_contain_text("still blank")
    expect(verdict).to_contain_text("Not yet: ")
    type_instead_of(page, cell, wrong, right)
    run_with_its_check(page)
    expect(verdict).to_contain_text("Right: ")


def run_with_its_check(page: Page) -> None:
    """Shift+Enter runs a cell and goes on to the next."""
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Shift+Enter")


def test_a_port_in_use_is_no_obstacle(tmp_path: Path, course: Path, page: Page) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with running_lab(course, tmp_path, port=port) as lab:
            assert lab.port != port
            open_notebook(page, lab, "notebooks/00_tour.ipynb")
            expect(page.get_by_role("tab", name="00_tour.ipynb")).to_be_visible()


def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(LabError, match=rf"(?s)exit code 1:.*{missing}"), running_lab(missing, tmp_path):
        pass
