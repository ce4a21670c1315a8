"""Lines are divided by what their pictures show, so that no picture is in two parts."""

from __future__ import annotations

import json
import math
import statistics
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_pictures import save_pictures
from PIL import Image

from minivlm.data.fingerprints import fingerprint, look_alike, perceptual_hash
from minivlm.data.lines import BadLines
from minivlm.data.split import split_lines
from minivlm.errors import InputError
from minivlm.world.scenes import make_scene


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pictures(tmp_path, *(f"{number}.png" for number in range(10)))
    return tmp_path


def write(folder: Path, *images: Any) -> Path:
    path = folder / "my.jsonl"
    lines = [json.dumps({"image": image, "n": n}, ensure_ascii=False) for n, image in enumerate(images)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def numbers_of(folder: Path, part: str) -> list[int]:
    return [json.loads(line)["n"] for line in (folder / f"my-{part}.jsonl").read_text().splitlines()]


def divided(folder: Path, *images: Any, clean: bool = True, **options: Any) -> dict[str, list[int]]:
    shares = options.pop("shares", {"validation": 0.3, "test": 0.2})
    result = split_lines(write(folder, *images), shares, **options)
    found = {name: numbers_of(folder, name) for name in ("train", *shares)}
    assert [part.lines for part in result.parts] == [len(lines) for lines in found.values()]
    for part in result.parts if clean else ():
        part.path.unlink()
    return found


def test_every_line_comes_to_one_part(folder: Path) -> None:
    names = [f"{number}.png" for number in range(10)]
    parts = divided(folder, *names, *names)
    assert {name: len(lines) for name, lines in parts.items()} == {"train": 10, "validation": 6, "test": 4}
    assert sorted(chain(*parts.values())) == list(range(20))
    for lines in parts.values():
        assert {line % 10 for line in lines} == {line for line in lines if line < 10}
    assert divided(folder, *names, *names) == parts
    assert divided(folder, *names, *names, seed=1) != parts


def test_lines_stay_as_they_are(folder: Path) -> None:
    text = '\ufeff{"image": "0.png",   "é": [1]}\r\n\n{"text": "x", "image": "1.png"}\n'
    (folder / "my.jsonl").write_bytes(text.encode())
    split_lines(folder / "my.jsonl", {"validation": 0.5})
    written = [(folder / f"my-{part}.jsonl").read_text("utf-8") for part in ("train", "validation")]
    assert set(written) == {'{"image": "0.png",   "é": [1]}\n', '{"text": "x", "image": "1.png"}\n'}


def test_names_and_order_do_not_matter(folder: Path) -> None:
    names = [f"{number}.png" for number in range(10)]
    parts = divided(folder, *names)
    backwards = divided(folder, *reversed(names))
    assert {9 - n for n in backwards["validation"]} == set(parts["validation"])
    (folder / "copies").mkdir()
    for name in names:  # with other bytes and other names, but the same pixels
        Image.open(folder / name).save(folder / "copies" / f"x{name}", compress_level=0)
    both = divided(folder, *names, *(f"copies/x{name}" for name in names))
    assert both == {part: sorted([*lines, *(n + 10 for n in lines)]) for part, lines in parts.items()}


def test_lines_with_several_pictures_hold_them_together(folder: Path) -> None:
    chain = [[f"{n}.png", f"{n + 1}.png"] for n in (2, 0, 1)]
    for seed in range(4):
        parts = divided(folder, *chain, *(f"{n}.png" for n in range(4, 10)), "0.png", seed=seed)
        assert any({0, 1, 2, 9} <= set(lines) for lines in parts.values())


def test_pictures_that_look_alike_are_reported(folder: Path) -> None:
    scene = make_scene(np.random.default_rng(0)).draw(224)
    scene.save(folder / "big.png")
    scene.resize((160, 160)).save(folder / "small.jpg", quality=70)
    path = write(folder, "big.png", "small.jpg")
    result = split_lines(path, {"validation": 0.5})
    assert result.apart == [(folder / "big.png", folder / "small.jpg")]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_pictures(count: int, folder: Path) -> None:
    (folder / "same.png").write_bytes((folder / "0.png").read_bytes())
    path = write(folder, *["0.png", "1.png"][:count], *["same.png"][: count > 0])
    message = f"there are {count} different pictures, too few for 3 parts" if count else "contains nothing"
    with pytest.raises(InputError, match=message):
        split_lines(path, {"validation": 0.1, "test": 0.1})
    assert not list(folder.glob("my-*"))


@pytest.mark.parametrize(
    "shares", [{"validation": 0.0}, {"validation": 1.0}, {"validation": 0.5, "test": 0.5}]
)
def test_shares_that_leave_nothing(shares: dict[str, float], folder: Path) -> None:
    with pytest.raises(InputError, match="expected shares above 0, and less than 1 in all"):
        split_lines(write(folder, "0.png"), shares)


def test_a_part_that_exists_is_not_replaced(folder: Path) -> None:
    (folder / "my-test.jsonl").write_text("mine")
    with pytest.raises(InputError, match=r"my-test.jsonl exists"):
        split_lines(write(folder, "0.png", "1.png", "2.png"), {"validation": 0.3, "test": 0.3})
    assert [path.name for path in folder.glob("my-*")] == ["my-test.jsonl"]


def test_bad_lines(folder: Path) -> None:
    images = ["0.png", "gone.png", "1.png", 7]
    with pytest.raises(BadLines, match=r"has 2 bad lines: line 2: .*gone.png: no such file"):
        split_lines(write(folder, *images), {"validation": 0.5})
    told: list[BadLines] = []
    parts = divided(folder, *images, shares={"validation": 0.5}, warn=told.append)
    assert sorted(chain(*parts.values())) == [0, 2]
    assert len(told) == 1


def test_fingerprints(tmp_path: Path) -> None:
    """What the eye does not see changes the content, but hardly the look."""
    scenes = [make_scene(np.random.default_rng(number)).draw(128) for number in range(30)]
    for number, scene in enumerate(scenes):
        scene.save(tmp_path / f"{number}.png")
    scenes[3].save(tmp_path / "turned.png", exif=exif_of(3))  # stored upside down
    scenes[3].rotate(180).save(tmp_path / "upright.png")
    scenes[5].save(tmp_path / "copy.jpg", quality=80)
    prints = {path.name: fingerprint(path) for path in tmp_path.iterdir()}
    assert prints["turned.png"] == prints["upright.png"]
    assert prints["turned.png"].content != prints["3.png"].content
    prints = {name: prints[name] for name in sorted(prints)}
    assert look_alike(prints) == [("5.png", "copy.jpg")]
    assert look_alike({}) == []


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_the_perceptual_hash() -> None:
    """Its bits are those of a cosine transform, written down as its definition has it."""
    picture = make_scene(np.random.default_rng(0)).draw(200)
    small = picture.convert("L").resize((32, 32), Image.Resampling.BILINEAR)

    def wave(place: int, number: int) -> float:
        return math.cos((2 * place + 1) * number * math.pi / 64)

    waves = [
        sum(small.getpixel((x, y)) * wave(x, u) * wave(y, v) for y in range(32) for x in range(32))
        for v in range(8)
        for u in range(8)
    ]
    middle = statistics.median(waves[1:])
    assert perceptual_hash(picture) == int("".join("01"[wave > middle] for wave in waves), 2)
    assert perceptual_hash(Image.new("RGB", (9, 9), "gray")) == 1 << 63
