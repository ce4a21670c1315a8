"""From annotated pictures to a file: what is written where, and what is never touched."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from own_pictures import BOX, lines_of, reasons, save_pictures

from minivlm import files
from minivlm.data.annotated import Annotated, BadPicture, Source, Thing, find_inside, numbers
from minivlm.data.converting import PROMPTS, BadPictures, LineForm, convert
from minivlm.data.samples import read_samples
from minivlm.errors import InputError
from minivlm.models.load import SHIPPED
from minivlm.processing import Processor

CAT = Thing("cat", (10, 10, 60, 40))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    save_pictures(tmp_path, "a.png", "b.jpg")
    return Source([Annotated(name, tmp_path / name, (CAT,)) for name in ("a.png", "b.jpg")])


def test_training_reads_what_is_written(source: Source, tmp_path: Path) -> None:
    lines_of(source, tmp_path / "out.jsonl")
    samples = read_samples(tmp_path / "out.jsonl", Processor.from_pretrained(SHIPPED), 512)
    assert [(sample.paths, sample.prefix, sample.suffix) for sample in samples] == [
        ((tmp_path / name,), "detect cat", f"{BOX} cat") for name in ("a.png", "b.jpg")
    ]


def test_a_file_that_exists_is_never_replaced(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(InputError, match=r"out.jsonl exists, and would be overwritten: choose another name"):
        convert(source, LineForm("detect"), out)
    assert out.read_text() == "mine"


def test_a_full_disk_leaves_nothing(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_flush", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="No space left on device"):
        convert(source, LineForm("detect"), tmp_path / "out.jsonl")
    assert sorted(tmp_path.iterdir()) == before


def test_one_that_is_stopped_leaves_nothing(source: Source, tmp_path: Path) -> None:
    def stop(pictures: Any) -> Iterator[Any]:
        yield pictures[0]
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        convert(source, LineForm("detect"), tmp_path / "out.jsonl", stop)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_can_be_moved(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative to the file, wherever the command runs and however it names them."""
    lines, _ = lines_of(source, tmp_path / "new" / "out.jsonl")
    assert [line["image"] for line in lines] == ["../a.png", "../b.jpg"]
    monkeypatch.chdir(tmp_path)
    lines, _ = lines_of(Source([Annotated("a", Path("a.png"), (CAT,))]), Path("out.jsonl"))
    assert lines[0]["image"] == "a.png"


def test_many_bad_ones(tmp_path: Path) -> None:
    """The first ten are named; without a good one nothing is written."""
    entries = [BadPicture(f"{number}.png", "it is bad") for number in range(12)]
    with pytest.raises(BadPictures, match="nothing is written, since 12 of 12 entries are bad") as caught:
        convert(Source(entries), LineForm("detect"), tmp_path / "out.jsonl")
    assert caught.value.reasons[0] == "0.png: it is bad"
    assert caught.value.reasons[10:] == ["and 2 more"]
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(InputError, match="there are no pictures in it"):
        convert(Source([]), LineForm("detect"), tmp_path / "out.jsonl")


def test_the_answer_has_no_text(source: Source, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"everything was left out: 2 pictures without a text.*--task"):
        convert(source, LineForm("caption"), tmp_path / "out.jsonl")


def test_an_empty_picture_and_no_class_at_all(tmp_path: Path) -> None:
    save_pictures(tmp_path, "a.png")
    with pytest.raises(BadPictures, match="no class is known that could be asked for"):
        lines_of(Source([Annotated("a", tmp_path / "a.png")]), tmp_path / "out.jsonl", empty_answer="none")


@pytest.mark.skipif(sys.platform != "linux", reason="names are not bytes elsewhere")
def test_names_that_json_cannot_hold(tmp_path: Path) -> None:
    save_pictures(tmp_path, "a.png")
    bad = Path(os.fsdecode(os.fsencode(tmp_path / "b") + b"\xff.png"))
    bad.write_bytes((tmp_path / "a.png").read_bytes())
    entries = [Annotated("a", tmp_path / "a.png", (CAT,)), Annotated("b", bad, (CAT,))]
    lines, report = lines_of(Source(entries), tmp_path / "out.jsonl")
    assert len(lines) == 1
    assert reasons(report) == {"b": "its name or its text is not UTF-8, as JSON has to be: change it"}


def test_texts_that_utf_8_cannot_hold(tmp_path: Path) -> None:
    save_pictures(tmp_path, "a.png", "b.png")
    texts = {
        "a.png": "half of \ud83d",
        "b.png": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    }
    entries = [Annotated(name, tmp_path / name, texts=((None, text),)) for name, text in texts.items()]
    lines, report = lines_of(Source(entries, task="caption"), tmp_path / "out.jsonl")
    assert [line["suffix"] for line in lines] == ["😀"]
    assert reasons(report).keys() == {"a.png"}


def test_every_task_has_a_prompt() -> None:
    assert all(PROMPTS[task] for task in ("detect", "segment", "caption", "classify"))


def test_paths_inside(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").touch()
    for name in ("sub/a.png", "./sub/a.png", "sub/../sub/a.png", "sub\\a.png", str(tmp_path / "sub/a.png")):
        assert find_inside(tmp_path, name).samefile(tmp_path / "sub" / "a.png")
    for name in ("..", "../a", "sub/../../a", "/", "/a", f"{tmp_path}2/a"):
        with pytest.raises(InputError, match="leads out of"):
            find_inside(tmp_path, name)
    for value in ("", " ", None, 7, ["a"], "a\0"):
        with pytest.raises(InputError, match="expected the name of a file"):
            find_inside(tmp_path, value)


def test_numbers() -> None:
    assert numbers(["1", 2, 3.5], 3, "x") == [1, 2, 3.5]
    for values in ("123", None, 7, [1, 2], [1, 2, True], [1, 2, float("inf")], [1, 2, "x"], [1, 2, None]):
        with pytest.raises(InputError, match=r"x is .*: expected 3 numbers"):
            numbers(values, 3, "x")
