"""What is in a file of lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from own_pictures import BOX, save_pictures

from minivlm.data.check import Shown, examine, kind_of_lines, spread
from minivlm.errors import InputError


def test_facts(tmp_path: Path) -> None:
    save_pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    a, b, copy = (tmp_path / name for name in ("a.png", "b.png", "copy.png"))
    whole = "<loc0000><loc0000><loc1023><loc1023> dog"
    facts = examine(
        [
            Shown(1, (a,), "detect cat", f"{BOX} cat ; {whole}", 30),
            Shown(2, (b,), "detect cat", "none", 20),
            Shown(3, (copy, b), "what differs?", "none", 26),
        ]
    )
    assert (facts.lines, facts.pictures) == (3, 3)
    assert facts.tokens == (20, 26, 30)
    assert facts.prompts == [("detect cat", 2), ("what differs?", 1)]
    assert facts.answers == [("none", 2)]
    assert facts.classes["dog"] == (1, (100, 100, 100))
    count, areas = facts.classes["cat"]
    assert count == 1
    assert areas.median == pytest.approx(50 * 60 / 100, abs=0.2)  # percent: half as wide, 0.6 as high
    assert facts.same == [[a, copy]]
    assert facts.alike == []
    assert spread([3, 1]) == (1, 2, 3)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ('{"image": "a", "prefix": "p", "suffix": "s"}', "samples"),
        ('\ufeff\n{\n{"image": "a", "text": "t"}', "pairs"),
        ('{"image": "a", "prefix": "p", "suffix": "s", "text": "t"}', "samples"),
        ("", "samples"),
    ],
)
def test_kinds(content: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text(content, encoding="utf-8")
    assert kind_of_lines(tmp_path / "my.jsonl") == kind
    with pytest.raises(InputError, match="cannot be read"):
        kind_of_lines(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="is a folder without shards"):
        kind_of_lines(tmp_path)
