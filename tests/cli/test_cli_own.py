"""`minivlm eval --data` of a model that answers: what is printed, the page of the worst, and refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from minivlm.cli import main
from minivlm.world.scenes import COLORS

SHIPPED = ["eval", "--data"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four lines about two squares, of which one has a wrong answer and one a wrong box."""
    for color in ("red", "blue"):
        picture = Image.new("RGB", (64, 64), (220, 220, 220))
        picture.paste(COLORS[color], (16, 16, 48, 48))
        picture.save(tmp_path / f"{color}.png")
    box = "<loc0000><loc0000><loc0200><loc0200> blue square"
    lines = [
        ("red", "what color is the square?", "red"),
        ("blue", "what color is the square?", "<b>&</b>"),
        ("blue", "detect blue square", box),
        ("red", "detect red square", box.replace("blue", "red")),
    ]
    path = tmp_path / "lines.jsonl"
    rows = [{"image": f"{name}.png", "prefix": prompt, "suffix": answer} for name, prompt, answer in lines]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_table_confusions_and_page(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = data.with_name("worst.html")
    assert main([*SHIPPED, str(data), "--worst", str(page)]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    assert "| | own lines | majority | cases |" in printed
    assert re.search(r"\| exact, what color is the square\? \| 0.500 \| 0.500 \| 2 \|", printed)
    assert re.search(r"\| box mean IoU \| 0.0\d\d \| 1.000 \| 2 \|", printed)
    assert "| true \\ answered | <b>&</b> | red | (other) |" in printed
    assert printed.endswith(f"{page}: 3 to look at\n")
    written = page.read_text(encoding="utf-8")
    assert "The worst 3 of 4 answers" in written
    assert "true: &lt;b&gt;&amp;&lt;/b&gt; | answered: blue" in written
    assert "<b>&</b>" not in written
    assert written.count("<img ") == 1 + 2 + 2  # with boxes, as it should be and as it was answered
    assert not re.search(r'(?:src|href)="(?!data:)', written)
    assert written.index("line 2, score 0.00") < written.index("line 3") or "line 4" in written
    assert main([*SHIPPED, str(data), "--worst", str(page)]) == 2
    assert "worst.html exists, and would be overwritten" in capsys.readouterr().err


def test_as_json(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHIPPED, str(data), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["own lines"]["exact, all lines"] == {"value": 0.25, "majority": 0.75, "cases": 4}
    assert table["confusions"]["what color is the square?"]["<b>&</b>"]["(other)"] == 1


def test_a_single_line_and_none(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.write_text(data.read_text().splitlines()[0] + "\n")
    page = data.with_name("worst.html")
    assert main([*SHIPPED, str(data), "--worst", str(page)]) == 0
    assert "| exact, all lines | 1.000 | 1.000 | 1 |" in capsys.readouterr().out
    assert "The worst 0 of 1 answers" in page.read_text()
    data.write_text("")
    assert main([*SHIPPED, str(data)]) == 2
    assert "it is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--worst", "x.html"], "--worst is about your own lines: add --data FILE.jsonl"),
        (["--codebook", "x.npz"], "--codebook is about your own lines"),
        (["--data", "x.jsonl", "--scenes", "5"], "--scenes is about drawn scenes"),
        (["--data", "missing.jsonl"], "missing.jsonl cannot be read"),
        (["--data", "x.jsonl", "--worst", "x.jsonl"], "x.jsonl is read here|x.jsonl exists"),
    ],
)
def test_what_is_refused(
    arguments: list[str],
    message: str,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(data.parent)
    Path("x.jsonl").write_text(data.read_text())
    assert main(["eval", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
