"""`minivlm data shards | unpack`: pack, check, train, go on and evaluate, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from own_pictures import save_pictures

from minivlm.cli import main

Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in a folder with eight lines, and return what it prints."""
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path, *(f"photos/{number}.png" for number in range(8)))
    lines = [{"image": f"photos/{n}.png", "prefix": "what is it?", "suffix": "ab"[n % 2]} for n in range(8)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        assert main(arguments) == code
        return capsys.readouterr()

    return run


def test_the_whole_way(run: Run, tmp_path: Path) -> None:
    out, err = run("data", "shards", "my.jsonl", "packed", "--size", "3")
    assert out.startswith("packed: 8 lines about 8 pictures, 3 tars\nLook at it:\n")
    assert err == ""
    typed = out.splitlines()[-1].split("minivlm ")[1].split()
    out, _ = run(*typed, "--sheet", "my.html", "--samples", "2")
    assert out.startswith("8 good lines about 8 pictures\n")
    assert re.search(r"line \d: packed/my-00000\d\.tar/0000000\d\.png", (tmp_path / "my.html").read_text())
    train = ("finetune", "--data", "packed/my-{000000..000001}.tar", "--validation", "packed/my-000002.tar")
    train += ("--out", "tuned", "--steps", "2", "--batch-size", "2", "--workers", "0", "--threads", "1")
    out, _ = run(*train)
    ask = out.splitlines()[-1].strip()
    assert re.search(r"ask packed/my-00000\d\.tar/0000000\d\.png --prompt 'what is it\?'", ask)
    picture = re.search(r"packed\S+png", ask)
    assert picture is not None
    out, _ = run("ask", picture[0], "--prompt", "what is it?", "--model", "tuned")
    assert out.strip()
    out, _ = run("eval", "--data", "packed", "--model", "tuned", "--worst", "worst.html")
    assert "| exact, all lines |" in out
    out, _ = run("data", "unpack", "packed", "again.jsonl")
    assert out == "again.jsonl: 8 lines about 8 pictures, from 3 tars\n"
    out, _ = run("data", "check", "again.jsonl")
    assert out.startswith("8 good lines about 8 pictures\n")
    assert (tmp_path / "again-pictures" / "my-000000" / "00000000.png").is_file()


def test_what_is_refused(run: Run, tmp_path: Path) -> None:
    run("data", "shards", "my.jsonl", "packed")
    assert "packed exists" in run("data", "shards", "my.jsonl", "packed", code=2)[1]
    assert "divide the file of lines" in run("data", "split", "packed", code=2)[1]
    (tmp_path / "empty").mkdir()
    assert "folder without shards" in run("data", "check", "empty", code=2)[1]
    with (tmp_path / "my.jsonl").open("a") as file:
        file.write('{"image": "photos/gone.png"}\n')
    assert "line 9: photos/gone.png: no such file" in run("data", "shards", "my.jsonl", "more", code=2)[1]
    out, err = run("data", "shards", "my.jsonl", "more", "--on-bad-line", "skip", "--in-order")
    assert out.startswith("more: 8 lines")
    assert err.startswith("minivlm: warning: my.jsonl has 1 bad line")
