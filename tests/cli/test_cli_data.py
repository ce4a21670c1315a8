"""`minivlm data`: from a file of COCO to a model that is trained on it, and what is refused on the way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from own_pictures import BOX, save_pictures
from PIL import Image

from minivlm.cli import main
from minivlm.cli.data import FORMATS, OWN, TASKS
from minivlm.data.converting import PROMPTS

Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in the folder, and return what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        assert main(["data", *arguments]) == code
        return capsys.readouterr()

    return run


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Ten pictures with a cat each, of which the second has a dog as well."""
    names = [f"{number}.png" for number in range(10)]
    save_pictures(tmp_path / "photos", *names)
    images = [{"id": n, "file_name": name, "width": 100, "height": 50} for n, name in enumerate(names)]
    cats = [{"image_id": n, "category_id": 1, "bbox": [10, 10, 50, 30]} for n in range(10)]
    dog = {"image_id": 1, "category_id": 2, "bbox": [0, 0, 50, 25]}
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "<b>dog"}]
    values = {"images": images, "annotations": [*cats, dog], "categories": categories}
    (tmp_path / "in.json").write_text(json.dumps(values))
    return tmp_path / "in.json"


def change(coco: Path, **more: object) -> None:
    values = json.loads(coco.read_text())
    for key, value in more.items():
        values[key].append(value)
    coco.write_text(json.dumps(values))


def test_the_whole_way(run: Run, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run("convert", "coco", "in.json", "--images", "photos", "--out", "my.jsonl")
    assert out.startswith(
        "my.jsonl: 10 lines about 10 pictures\nobjects:\n        10  cat\n         1  <b>dog\nLook at it:\n"
    )
    assert "minivlm data check my.jsonl --sheet my.html" in out
    assert err == ""
    out, err = run("check", "my.jsonl", "--sheet", "my.html", "--samples", "3")
    assert out.startswith("10 good lines about 10 pictures\ntokens of a line: ")
    assert "\nprompts:\n        10  detect cat ; <b>dog\n" in out
    assert re.search(r"\n        10  cat: 30 % to 30 %, half below 30 %\n", out)
    assert "my.html: 3 lines to look at" in out
    assert err == ""
    out, err = run("split", "my.jsonl", "--validation", "0.2")
    assert out.startswith(
        "my-train.jsonl: 8 lines about 8 different pictures\n"
        "my-validation.jsonl: 2 lines about 2 different pictures\n"
        "Train on it:\n"
    )
    typed = out.splitlines()[-1].split("minivlm ")[1].split()
    typed += ["--out", "tuned", "--steps", "1", "--batch-size", "2", "--workers", "0", "--threads", "1"]
    assert main(typed) == 0
    assert (tmp_path / "tuned" / "model.safetensors").is_file()
    capsys.readouterr()


def test_the_sheet(run: Run, coco: Path, tmp_path: Path) -> None:
    """Pictures with their boxes drawn in, and texts that are no HTML; nothing comes from outside."""
    run("convert", "coco", "in.json", "--images", "photos", "--out", "my.jsonl")
    run("check", "my.jsonl", "--sheet", "one.html", "--samples", "100")
    page = (tmp_path / "one.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 10
    assert page.count('<img src="data:image/jpeg;base64,') == 10
    assert f"{BOX} cat".replace("<", "&lt;").replace(">", "&gt;") in page
    assert "<b>dog" not in page
    assert "http" not in page
    assert "line 1: photos/0.png" in page
    run("check", "my.jsonl", "--sheet", "two.html", "--samples", "2", "--seed", "1")
    assert (tmp_path / "two.html").read_text().count("<figure>") == 2
    assert run("check", "my.jsonl", "--sheet", "two.html", code=2)[1].startswith(
        "minivlm: error: two.html exists"
    )


def test_bad_pictures_are_named_at_the_end(run: Run, coco: Path, tmp_path: Path) -> None:
    change(coco, images={"id": 99, "file_name": "gone.png"})
    change(coco, annotations={"image_id": 0, "category_id": 1, "bbox": [1, 1, 0, 2]})
    arguments = ("convert", "coco", "in.json", "--images", "photos", "--out")
    out, err = run(*arguments, "my.jsonl", code=1)
    assert out.startswith("my.jsonl: 9 lines about 9 pictures")
    assert err.splitlines() == [
        "minivlm: warning: 2 entries are bad and left out:",
        "  0.png: the box of 'cat' has no area: x0, y0, x1, y1 are 1, 1, 1, 3",
        "  gone.png: photos/gone.png: no such file: check the path of the picture",
        "All others are written",
    ]
    out, err = run("convert", "coco", "in.json", "--out", "elsewhere.jsonl", code=2)
    assert out == ""
    assert err.startswith("minivlm: error: nothing is written, since 11 of 11 entries are bad:\n  0.png: ")
    assert err.endswith("and 1 more\nWhere pictures are missing, say where they lie with --images\n")
    assert not (tmp_path / "elsewhere.jsonl").exists()
    assert "my.jsonl exists" in run(*arguments, "my.jsonl", code=2)[1]


def test_what_training_would_refuse(run: Run, coco: Path, tmp_path: Path) -> None:
    run("convert", "coco", "in.json", "--images", "photos", "--out", "my.jsonl")
    with (tmp_path / "my.jsonl").open("a") as file:
        file.write('{"image": "photos/0.png", "prefix": "detect cat", "suffix": "<loc9> cat"}\n')
        file.write('{"image": "photos/0.png", "prefix": "detect cat", "suffix": ""}\n')
    out, err = run("check", "my.jsonl", code=1)
    assert out.startswith("10 good lines")
    assert err.startswith("minivlm: warning: my.jsonl has 2 bad lines:\n  line 11: <loc9> is malformed")
    assert err.endswith("Training would refuse them, or leave them out with --on-bad-line skip\n")
    out, err = run("check", "my.jsonl", "--empty-answer", "none", code=1)
    assert out.startswith("11 good lines")
    assert "answers without boxes:\n         1  none" in out
    assert "every line is bad" in run("check", "my.jsonl", "--max-length", "9", code=2)[1]
    assert "cannot be read" in run("check", "missing.jsonl", code=2)[1]
    assert "has 1 bad line" not in run("split", "my.jsonl")[1]  # whose pictures are there


def test_pictures_that_are_the_same_or_look_alike(run: Run, tmp_path: Path) -> None:
    save_pictures(tmp_path, "set/x/a.png", "set/y/b.png", size=(300, 200))
    with Image.open(tmp_path / "set/x/a.png") as picture:
        picture.save(tmp_path / "set/y/copy.png", compress_level=0)
        picture.resize((200, 133)).save(tmp_path / "set/y/small.jpg", quality=90)
    run("convert", "folders", "set", "--out", "my.jsonl")
    out, _ = run("check", "my.jsonl")
    assert "answers without boxes:\n         3  y\n         1  x\n" in out
    assert "the same picture in several files: 1\n  set/x/a.png  set/y/copy.png\n" in out
    assert "pictures that look alike: 1\n  set/x/a.png  set/y/small.jpg\n" in out
    parts = [run("split", "my.jsonl", "--seed", str(seed), *unlinked(tmp_path))[0] for seed in range(6)]
    assert any("pictures that look alike, but are in different parts: 1" in part for part in parts)


def unlinked(folder: Path) -> tuple[str, ...]:
    """No options; the parts of the last run are gone."""
    for path in folder.glob("my-*"):
        path.unlink()
    return ("--validation", "0.4")


def test_pairs(run: Run, tmp_path: Path) -> None:
    save_pictures(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "in.csv").write_text("image;caption\na.png;a cup\nb.png;\nb.png;tea\nc.png;où ?\n")
    out, err = run("convert", "csv", "in.csv", "--task", "pairs", "--out", "my.jsonl", code=1)
    assert '  line 3: "answer" is "": expected text' in err
    assert (tmp_path / "my.jsonl").read_text("utf-8").splitlines() == [
        '{"image": "a.png", "text": "a cup"}', '{"image": "c.png", "text": "où ?"}',
    ]  # fmt: skip
    out, err = run("check", "my.jsonl")
    assert out.splitlines()[:3] == [
        "2 good lines about 2 pictures",
        "answers without boxes:",
        "         1  a cup",
    ]
    out, _ = run("split", "my.jsonl")
    assert "train-contrastive --data my-train.jsonl --validation my-validation.jsonl" in out
    assert "is about answers, not about pairs" in run("check", "my.jsonl", "--max-length", "9", code=2)[1]


def test_options_of_other_formats_are_refused(run: Run) -> None:
    given = {
        "images": ["x"], "split": ["x"], "names": ["x"], "columns": ["image=x"], "box_format": ["xyxy"],
    }  # fmt: skip
    assert given.keys() == set(OWN)
    for kind, (_, own) in FORMATS.items():
        for name in set(OWN) - set(own):
            option = "--" + name.replace("_", "-")
            _, err = run("convert", kind, "x", "--out", "x.jsonl", option, *given[name], code=2)
            assert err.startswith(f"minivlm: error: {option} is for ")


def test_tasks_are_those_of_the_package() -> None:
    assert tuple(PROMPTS) == TASKS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("convert png x --out y", "invalid choice: 'png'"),
        ("convert coco x", "the following arguments are required: --out"),
        ("convert csv x --out y --columns image", "'image' is not like image=photo"),
        ("convert coco x --out y --imags z", r"unrecognized arguments: --imags z; did you mean --images\?"),
        ("split", "the following arguments are required: FILE.jsonl"),
        ("split x --validation 0", "'0' is not a number above 0"),
        ("shuffle x", "invalid choice: 'shuffle'"),
        ("", "the following arguments are required: COMMAND"),
    ],
)
def test_mistakes_in_typing(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["data", *arguments.split()])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert re.search(message, err)
    assert err.count("\n") == 1


def test_shares_that_leave_nothing_to_train_on(run: Run, tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").touch()
    _, err = run("split", "my.jsonl", "--validation", "0.5", "--test", "0.5", code=2)
    assert "--validation and --test are 1 in all: leave some to train on" in err


@pytest.mark.parametrize("name", ["convert", "check", "split"])
def test_help_of_each(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["data", name, "--help"])
    assert exit.value.code == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 110


def test_every_format(run: Run, tmp_path: Path) -> None:
    """The same picture, in the formats that need no other package."""
    save_pictures(tmp_path, "set/images/a.png")
    (tmp_path / "set/labels").mkdir()
    (tmp_path / "set/labels/a.txt").write_text("0 0.35 0.5 0.5 0.6")
    (tmp_path / "names.txt").write_text("cat")
    (tmp_path / "set/a.xml").write_text(
        "<annotation><filename>a.png</filename><object><name>cat</name><bndbox><xmin>11</xmin><ymin>11</ymin>"
        "<xmax>60</xmax><ymax>40</ymax></bndbox></object></annotation>"
    )
    (tmp_path / "in.csv").write_text("image,class,left,top,right,bottom\na.png,cat,10,10,60,40\n")
    wanted = f'{{"image": "set/images/a.png", "prefix": "detect cat", "suffix": "{BOX} cat"}}\n'
    for arguments in (
        ("yolo", "set", "--names", "names.txt"),
        ("voc", "set", "--images", "set/images"),
        ("csv", "in.csv", "--images", "set/images"),
    ):
        run("convert", *arguments, "--out", f"{arguments[0]}.jsonl")
        assert (tmp_path / f"{arguments[0]}.jsonl").read_text() == wanted
