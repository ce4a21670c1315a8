"""The scripts of docs/live: each is part of a page, and TypeScript's checker finds no fault in them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from notebooks_and_sources import ROOT

sys.path.insert(0, str(ROOT / "docs"))
from live.check_types import check, find_tsc, pages, scripts

LIVE = ROOT / "docs" / "live"
MISTAKES = [
    # a file, what is there, what should not be, and what the checker says
    ("decoder.js", 'this.weight("norm.weight"), ', "", "decoder.js("),  # an argument
    ("words.js", '"prompt", HTMLInputElement', '"prompt"', "words.js(9,"),  # an element
    ("looking.js", "picture } = answered()", "picture } = page.result", "looking.js("),  # maybe null
    ("mask.html", '<script src="masks.js"></script>\n', "", "Cannot find name 'prefix_lm'"),
]


def test_every_script_is_part_of_a_page() -> None:
    used = {script for page in pages(LIVE) for script in scripts(page)}
    assert used == set(LIVE.glob("*.js"))


@pytest.fixture
def tsc() -> str:
    found = find_tsc()
    if found is None:
        pytest.skip("there is no node with tsc")
    return found


def test_types(tsc: str) -> None:
    assert check(LIVE, tsc) == []


def test_mistakes_are_found(tsc: str, tmp_path: Path) -> None:
    folder = shutil.copytree(LIVE, tmp_path / "live")
    for name, right, wrong, _ in MISTAKES:
        text = (folder / name).read_text(encoding="utf-8")
        assert right in text
        (folder / name).write_text(text.replace(right, wrong), encoding="utf-8")
    faults = check(folder, tsc)
    for name, _, _, said in MISTAKES:
        assert any(said in fault for fault in faults), name
