"""Each notebook opens with its new words, the glossary holds them all, and none is used before.

A word of a later notebook may stand in an earlier one in italics, which says that it is explained there.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from notebooks_and_sources import NOTEBOOKS, ROOT, read_cells

GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
ROW = re.compile(
    r"^\| (?P<word>[^|]+) \| (?P<sentence>[^|]+) \| \[(?P<where>[^]]+)\]\((?P<link>[^)]+)\) \|$", re.M
)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def words_of(path: Path) -> dict[str, str]:
    """The words that a notebook opens with, each with its sentence."""
    _, _, block = read_cells(path)[0].source.partition("**Words for today**")
    return dict(re.findall(r"^- \*\*(.+?)\*\*: (.+)$", block, re.MULTILINE))


ALL = {word: path for path in NOTEBOOKS for word in words_of(path)}


@each_notebook
def test_five_to_eight_words(path: Path) -> None:
    words = words_of(path)
    assert 5 <= len(words) <= 8
    for word, sentence in words.items():
        assert re.fullmatch(r"[a-z0-9`$(].*[.]", sentence), f"{word}: a sentence that goes on after the colon"
        assert ALL[word] == path, f"{word} is listed by {ALL[word].name} as well"


def test_the_glossary_has_every_word() -> None:
    rows = {row["word"]: row for row in ROW.finditer(GLOSSARY)}
    assert list(rows) == sorted(rows, key=str.lower)
    for path in NOTEBOOKS:
        for word, sentence in words_of(path).items():
            assert rows[word]["sentence"] == sentence, word
            assert rows[word]["link"] == f"../notebooks/{path.name}", word
    for word, row in rows.items():
        assert (ROOT / "docs" / row["link"]).exists(), word


@pytest.mark.parametrize("word", ALL)
def test_no_word_is_used_before(word: str) -> None:
    plain = re.escape(word.partition(" (")[0].replace("*", "").replace("`", ""))
    pattern = re.compile(rf"(?<![\w-])(\*?){plain}(?:s|es)?(\*?)(?![\w-])", re.IGNORECASE)
    for path in NOTEBOOKS[: NOTEBOOKS.index(ALL[word])]:
        for cell in read_cells(path):
            if found := pattern.search(cell.prose):
                assert all(found.groups()), f"{path.name}, cell {cell.id}: {word} comes before its notebook"
                return
