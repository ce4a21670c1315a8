"""Lines and pictures in tars are the same examples as in a file, in an order that the seed decides."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_pictures import save_pictures
from PIL import Image

from minivlm.data import shards
from minivlm.data.check import kind_of_lines
from minivlm.data.lines import BadLines
from minivlm.data.overlap import overlap
from minivlm.data.pairs import read_pairs
from minivlm.data.samples import Sample, SampleBatches, read_samples
from minivlm.data.sharding import write_lines, write_shards
from minivlm.data.shards import ShardItems, shards_of, shuffled
from minivlm.data.split import split_lines
from minivlm.errors import InputError
from minivlm.models.load import SHIPPED
from minivlm.processing import Processor

PICTURE = io.BytesIO()
Image.new("RGB", (9, 9), "red").save(PICTURE, "PNG")
LINE = {"prefix": "what is it?", "suffix": "a cup"}


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(SHIPPED)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Eleven lines about ten pictures, of which one is a JPEG and one has no ending."""
    names = [f"photos/{number}.png" for number in range(8)] + ["photos/8.JPG", "photos/nine.png"]
    save_pictures(tmp_path, *names)
    (tmp_path / "photos" / "nine.png").rename(tmp_path / "photos" / "nine")
    images = [*names[:-1], "photos/nine", "photos/3.png"]
    lines = [{"image": image, "prefix": "p", "suffix": f"é {n}", "n": n} for n, image in enumerate(images)]
    (tmp_path / "train.jsonl").write_text(dumped(*lines), encoding="utf-8")
    return tmp_path / "train.jsonl"


def dumped(*lines: Any) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def write_tar(path: Path, *members: tuple[str, object]) -> Path:
    """Objects become JSON."""
    with tarfile.open(path, "w") as tar:
        for name, value in members:
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def contents(samples: Sequence[Sample]) -> Counter[tuple[bytes, str, str]]:
    """What is shown and said, whatever files are called."""
    return Counter((bytes_of(one.paths[0]), one.prefix, one.suffix) for one in samples)


def bytes_of(path: Path) -> bytes:
    from minivlm.processing.images import open_file

    with open_file(path, "picture") as file:
        return file.read()


# There and back


@pytest.mark.parametrize("size", [1, 4, 10, 1000])
def test_the_same_examples(size: int, file: Path, tmp_path: Path, processor: Processor) -> None:
    written = write_shards(file, tmp_path / "shards", size)
    tars = -(-10 // size)
    assert (written.lines, written.pictures, written.tars) == (11, 10, tars)
    names = [f"train-{number:06d}.tar" for number in range(tars)]
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == names
    plain = read_samples(file, processor, 512)
    packed = read_samples(tmp_path / "shards", processor, 512)
    assert isinstance(packed, ShardItems)
    assert contents(packed) == contents(plain)
    assert [one.line for one in packed] == list(range(1, 12))
    assert packed[0].images[0].startswith("train-000000.tar/00000000.")
    assert overlap(packed, plain) == list(packed)
    unpacked = write_lines(tmp_path / "shards", tmp_path / "again.jsonl")
    assert (unpacked.lines, unpacked.pictures, unpacked.tars) == (11, 10, tars)
    assert contents(read_samples(tmp_path / "again.jsonl", processor, 512)) == contents(plain)
    again = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text("utf-8").splitlines()]
    assert sorted(line["n"] for line in again) == list(range(11))  # keys that training does not know stay
    assert all(list(line) == ["image", "prefix", "suffix", "n"] for line in again)


def test_the_form(file: Path, tmp_path: Path) -> None:
    """A picture byte for byte and its lines, under one key; nothing tells whose files they were."""
    with file.open("a") as more:
        more.write(json.dumps({"image": ["photos/0.png", "photos/1.png"], "prefix": "p", "suffix": "s"}))
    write_shards(file, tmp_path / "shards", seed=None)
    with tarfile.open(tmp_path / "shards" / "train-000000.tar") as tar:
        members = tar.getmembers()
        found = {member.name: tar.extractfile(member).read() for member in members}
    assert {(one.uid, one.uname, one.mtime) for one in members} == {(0, "", 0)}
    assert list(found)[:2] == ["00000000.png", "00000000.json"]
    assert list(found)[-3:] == ["00000010.00.png", "00000010.01.png", "00000010.json"]
    assert found["00000008.jpg"] == (tmp_path / "photos" / "8.JPG").read_bytes()
    assert found["00000009.png"] == (tmp_path / "photos" / "nine").read_bytes()
    assert "é 0".encode() in found["00000000.json"]
    assert json.loads(found["00000000.json"]) == {
        "image": "00000000.png",
        "prefix": "p",
        "suffix": "é 0",
        "n": 0,
    }
    assert [line["n"] for line in json.loads(found["00000003.json"])] == [3, 10]
    assert json.loads(found["00000010.json"])["image"] == ["00000010.00.png", "00000010.01.png"]


def test_the_seed_decides_the_tars(file: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", None)):
        write_shards(file, tmp_path / name, 4, seed)
    a, b, c, d = ([path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in "abcd")
    assert a == b
    assert len({a[0], c[0], d[0]}) == 3


def test_tars_of_others(tmp_path: Path, processor: Processor) -> None:
    """As the package webdataset writes them: without names of pictures, with other files, in folders."""
    picture = PICTURE.getvalue()
    tar = write_tar(
        tmp_path / "x.tar",
        ("README", b"text"),
        ("./.hidden.json", b"{"),
        ("x/a.JPG", picture),
        ("x/a.cls", b"3"),
        ("x/a.json", LINE | {"image": "elsewhere/1.jpg"}),
        ("b.json", b"\xef\xbb\xbf" + json.dumps([LINE, LINE | {"suffix": "b"}]).encode()),
        ("b.seg.png", picture),
        ("notes.txt", b"no sample"),
    )
    found = read_samples(tar, processor, 512)
    assert [one.images for one in found] == [("x.tar/x/a.JPG",), ("x.tar/b.seg.png",), ("x.tar/b.seg.png",)]
    assert [one.suffix for one in found] == ["a cup", "a cup", "b"]
    assert found[0].paths == (tar / "x" / "a.JPG",)
    write_lines(tar, tmp_path / "out.jsonl")
    assert (tmp_path / "out-pictures" / "x" / "x" / "a.JPG").read_bytes() == picture


def test_pairs(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "x.tar", ("a.png", PICTURE.getvalue()), ("a.json", [{"text": "one"}, {"text": "two"}])
    )
    assert [pair.text for pair in read_pairs(tmp_path, [])] == ["one", "two"]
    assert kind_of_lines(tmp_path) == "pairs"


# The order


def test_an_epoch_shows_every_line_once() -> None:
    for counts in ([7], [3, 0, 5], [100] * 20, [1] * 50, [0, 0]):
        for buffer in (1, 3, 1000):
            order = shuffled(counts, np.random.default_rng(0), buffer)
            assert sorted(order.tolist()) == list(range(sum(counts)))


def test_what_is_shown_lies_close_together() -> None:
    """A line leaves the buffer after its like, and neither a tar nor the buffer stays in its order."""
    order = shuffled([100] * 20, np.random.default_rng(0), buffer=50)
    tars = order // 100
    first = [int(np.flatnonzero(tars == tar)[0]) for tar in range(20)]
    assert sorted(range(20), key=lambda tar: first[tar]) != list(range(20))
    assert all(len(set(tars[start : start + 20].tolist())) <= 5 for start in range(0, 2000, 20))
    assert np.abs(np.diff(order)).min() >= 1
    assert (np.diff(order) == 1).mean() < 0.1
    one_by_one = shuffled([100] * 20, np.random.default_rng(0), buffer=1)
    assert (np.diff(one_by_one) == 1).mean() > 0.98  # a buffer of one mixes tars alone


def test_the_order_is_that_of_a_buffer() -> None:
    """Written down as its definition has it, with a list."""
    rng = np.random.default_rng(3)
    stream = [n for tar in rng.permutation(4).tolist() for n in range(5 * tar, 5 * tar + 5)]
    places = rng.integers(6, size=20).tolist()
    held, left = stream[:6], []
    for number, place in zip(stream[6:], places[6:], strict=True):
        left.append(held[place])
        held[place] = number
    left += rng.permutation(held).tolist()
    assert shuffled([5] * 4, np.random.default_rng(3), 6).tolist() == left


def test_the_order_depends_on_seed_and_epoch_alone(
    file: Path, tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BUFFER", 3)
    write_shards(file, tmp_path / "shards", 4)
    packed = read_samples(tmp_path / "shards", processor, 512)
    assert isinstance(packed, ShardItems)

    def rows(seed: int, wanted: range) -> list[int]:
        batches = SampleBatches(
            packed, processor, seed=seed, rows=33, batch_size=2, accumulate=1, order=packed.order
        )
        return [batches.sample(row).line for row in wanted]

    whole = rows(0, range(33))
    assert [sorted(whole[start : start + 11]) for start in (0, 11, 22)] == [list(range(1, 12))] * 3
    assert len({tuple(whole[start : start + 11]) for start in (0, 11, 22)}) == 3
    assert rows(0, range(16, 33)) == whole[16:]  # in the middle of an epoch
    assert rows(0, range(1, 33, 2)) == whole[1::2]  # as one of two processes
    assert rows(1, range(33)) != whole


def test_no_line_stays_in_memory(
    file: Path, tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred times as many lines take four numbers each, and travel to another process like this."""
    write_shards(file, tmp_path / "shards")
    packed = read_samples(tmp_path / "shards", processor, 512)
    assert isinstance(packed, ShardItems)
    before = len(pickle.dumps(packed))
    packed.spots = packed.spots * 100
    assert len(pickle.dumps(packed)) - before < 99 * 11 * 4 * 8 + 100
    assert len(packed) == 1100
    assert pickle.loads(pickle.dumps(packed))[1099] == packed[10] == packed[-1]
    assert packed[9:11] == [packed[9], packed[10]]
    with pytest.raises(IndexError):
        packed[1100]


def test_the_digest_changes_with_every_byte(file: Path, tmp_path: Path, processor: Processor) -> None:
    write_shards(file, tmp_path / "shards", 4)
    read = partial(read_samples, processor=processor, max_length=512)
    digest = read(tmp_path / "shards").digest()
    (tmp_path / "shards").rename(tmp_path / "moved")
    assert read(tmp_path / "moved").digest() == digest
    assert read(tmp_path / "moved" / "train-{000000..000001}.tar").digest() != digest
    tar = tmp_path / "moved" / "train-000002.tar"
    content = bytearray(tar.read_bytes())
    content[content.index("é".encode()) + 3] ^= 1
    tar.write_bytes(content)
    assert read(tmp_path / "moved").digest() != digest


def test_a_tar_that_changes_in_the_middle(tmp_path: Path, processor: Processor) -> None:
    picture = PICTURE.getvalue()
    tar = write_tar(tmp_path / "x.tar", ("a.png", picture), ("a.json", [LINE] * 3))
    packed = read_samples(tar, processor, 512)
    write_tar(tar, ("a.png", picture), ("a.json", [LINE]), ("b.png", picture * 3), ("b.json", LINE))
    assert packed[0].suffix == "a cup"
    with pytest.raises(InputError, match=r"x\.tar has changed since it was checked"):
        packed[2]


# Which tars


def test_patterns(tmp_path: Path) -> None:
    for number in (7, 8, 9, 10, 11):
        (tmp_path / f"t-{number:04d}.tar").touch()
    found = shards_of(tmp_path / "t-{0008..0010}.tar")
    assert [tar.name for tar in found] == ["t-0008.tar", "t-0009.tar", "t-0010.tar"]
    assert len(shards_of(tmp_path)) == 5
    assert shards_of(tmp_path / "t-0007.tar") == [tmp_path / "t-0007.tar"]
    with pytest.raises(InputError, match=r"2 of 4 are missing, the first is t-0012\.tar"):
        shards_of(tmp_path / "t-{0010..0013}.tar")
    for wrong in ("{3..1}", "{0..99999999999}"):
        with pytest.raises(InputError, match="expected a range such as"):
            shards_of(tmp_path / f"t-{wrong}.tar")


def test_an_empty_folder(tmp_path: Path, processor: Processor) -> None:
    (tmp_path / "1.jpg").touch()
    (tmp_path / "._x.tar").touch()
    with pytest.raises(InputError, match="is a folder without shards"):
        read_samples(tmp_path, processor, 512)
    with pytest.raises(InputError, match=r"missing\.tar cannot be read"):
        read_samples(tmp_path / "missing.tar", processor, 512)
    (tmp_path / "x.tgz").write_bytes(b"\x1f\x8b" + b"x" * 600)
    with pytest.raises(InputError, match="is compressed"):
        read_samples(tmp_path / "x.tgz", processor, 512)


# What is bad in them


def refused(tmp_path: Path, processor: Processor, *members: tuple[str, object]) -> str:
    with pytest.raises(InputError) as caught:
        read_samples(write_tar(tmp_path / "x.tar", *members), processor, 512)
    return str(caught.value)


def test_bad_samples_are_named(tmp_path: Path, processor: Processor) -> None:
    picture = PICTURE.getvalue()
    good = ("g.png", picture), ("g.json", LINE)
    for members, message in (
        ([("a.png", picture)], r"x.tar/a.png: there is no a.json beside it"),
        ([("a.json", LINE)], r"x.tar/a.json: there is no picture with its key"),
        ([("a.png", picture), ("a.json", [])], "x.tar/a.json: its list of lines is empty"),
        ([("a.png", picture), ("a.json", [LINE, 7])], "x.tar/a.json, line 2: not an object but int"),
        ([("a.png", picture), ("a.json", b"{")], "x.tar/a.json: not JSON"),
        ([("a.png", picture), ("a.json", b'{"a": 1, "a": 2}')], '"a" is given twice'),
        ([("a.png", picture), ("a.json", {"prefix": "p"})], 'x.tar/a.json: no "suffix" among its keys'),
        ([("a.png", picture[:45]), ("a.json", LINE)], "x.tar/a.png is truncated or damaged"),
        ([("a.png", b"text"), ("a.json", LINE)], "x.tar/a.png is not a picture"),
        ([("a.png", b""), ("a.json", LINE)], "x.tar/a.png is empty"),
        ([("a.0.png", picture), ("a.1.png", picture), ("a.json", LINE)], "got 2 pictures for one prompt"),
        ([("a.png", picture), ("a.json", LINE | {"suffix": "<loc9> a"})], "<loc9> is malformed"),
    ):
        assert "1 bad line: " in (said := refused(tmp_path, processor, *good, *members))
        assert message in said
        bad: list[BadLines] = []
        kept = read_samples(tmp_path / "x.tar", processor, 512, bad.append)
        assert len(bad) == 1
        first = 2 if "line 2" in message else 1
        assert [one.paths[0].name for one in kept] == ["g.png", "a.png"][:first]


def test_bad_tars_are_refused(tmp_path: Path, processor: Processor) -> None:
    picture = PICTURE.getvalue()
    a, b = (("a.png", picture), ("a.json", LINE)), (("b.png", picture), ("b.json", LINE))
    assert "has the key a twice" in refused(tmp_path, processor, *a, *b, ("a.jpg", picture))
    assert "has the key a twice" in refused(tmp_path, processor, a[0], b[0], a[1], b[1])
    assert "has a.json twice" in refused(tmp_path, processor, *a, ("a.json", LINE))
    assert "would lie outside of it" in refused(tmp_path, processor, *a, ("../b.png", picture))
    assert "contains nothing to train on" in refused(tmp_path, processor)
    write_tar(tmp_path / "x.tar", *a, *b)
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:2500])
    with pytest.raises(InputError, match=r"x\.tar is truncated"):
        read_samples(tmp_path, processor, 512)


def test_what_is_not_packed(file: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="there exists"):
        write_shards(file, tmp_path / "there")
    with file.open("a") as more:
        more.write('{"image": "gone.png"}\n{"image": "photos/0.png", "x": "\\ud800"}\n')
    with pytest.raises(BadLines, match=r"line 12: .*gone\.png: no such file.*; line 13: .*surrogate"):
        write_shards(file, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    told: list[BadLines] = []
    assert write_shards(file, tmp_path / "shards", warn=told.append).lines == 11
    assert len(told) == 1
    with pytest.raises(InputError, match="is shards already"):
        write_shards(tmp_path / "shards", tmp_path / "more")
    with pytest.raises(InputError, match="is shards: divide the file of lines"):
        split_lines(tmp_path / "shards", {"validation": 0.5})
    with pytest.raises(InputError, match="is no shards"):
        write_lines(file, tmp_path / "out.jsonl")


def test_nothing_half_is_left(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(tmp_path.iterdir())

    def stopped(items: Sequence[Any]) -> Any:
        yield items[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(file, tmp_path / "shards", 4, watch=stopped)
    assert sorted(tmp_path.iterdir()) == before
    write_shards(file, tmp_path / "shards", 4)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        write_lines(tmp_path / "shards", tmp_path / "out.jsonl", watch=stopped)
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "out-pictures").mkdir()
    with pytest.raises(InputError, match="out-pictures exists"):
        write_lines(tmp_path / "shards", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
