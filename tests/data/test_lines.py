"""All of a user's lines are checked before training begins, and a bad one is named by number and mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llava import write_llava
from PIL import Image

from minivlm.data import lines
from minivlm.data.lines import BadLines
from minivlm.data.samples import Sample, length_of, make_inputs, read_samples
from minivlm.errors import InputError
from minivlm.models.load import SHIPPED, load_answering
from minivlm.processing import Processor

BOX = "<loc0256><loc0128><loc0512><loc0640>"
MASK = "".join(f"<seg{number:03}>" for number in range(112, 128))
GOOD = {"image": "a.png", "prefix": "what is it?", "suffix": "a red circle"}


@pytest.fixture(scope="session")
def processor() -> Processor:
    return Processor.from_pretrained(SHIPPED)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With some pictures, good and bad."""
    picture = Image.effect_noise((90, 60), 80).convert("RGB")
    for name in ("a.png", "b.jpg", "c.webp", "d.gif"):
        picture.save(tmp_path / name)
    for name in ("a.png", "b.jpg", "c.webp"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"cut_{name}").write_bytes(content[: len(content) // 2])
    whole = bytearray((tmp_path / "a.png").read_bytes())
    whole[len(whole) // 2] ^= 1
    (tmp_path / "flipped.png").write_bytes(whole)
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "inner").mkdir()
    picture.save(tmp_path / "inner" / "é.png")
    return tmp_path


@pytest.fixture
def read(folder: Path, processor: Processor) -> Callable[..., list[Sample]]:
    """Read a file with these lines: objects, text or bytes."""

    def read(*lines: Any, max_length: int = 512, **options: Any) -> list[Sample]:
        as_bytes = [
            line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else dumped(line)
            for line in lines
        ]
        (folder / "train.jsonl").write_bytes(b"\n".join(as_bytes))
        return read_samples(folder / "train.jsonl", processor, max_length, **options)

    return read


def dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def changed(**changes: Any) -> dict[str, Any]:
    return GOOD | changes


def test_good_lines(read: Callable[..., list[Sample]], folder: Path) -> None:
    samples = read(
        GOOD,
        changed(image="inner/é.png", suffix=f"{BOX} crate ; {BOX}{MASK} crate"),
        changed(image=str(folder / "b.jpg"), prefix="où ?", extra=[1]),
        changed(image="c.webp"),
        changed(image="d.gif", suffix="none"),
    )
    assert [sample.line for sample in samples] == [1, 2, 3, 4, 5]
    assert samples[0] == Sample(1, ("a.png",), (folder / "a.png",), "what is it?", "a red circle")
    assert samples[1].paths == (folder / "inner" / "é.png",)
    assert samples[2].paths == (folder / "b.jpg",)
    assert samples[2].prefix == "où ?"


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"image": "a.png", "prefix": "p", "suffix": "s"}\n',  # a BOM
        b'\r\n\n{"image": "a.png", "prefix": "p", "suffix": "s"}\r\n\r\n   \n\n',
        b'  {"image": "a.png", "prefix": "p", "suffix": "s"}  ',
        '\n{"image": "a.png", "prefix": "p", "suffix": "s\u2028\x85"}'.encode(),  # not line ends in JSON
    ],
)
def test_blank_lines_and_a_bom(content: bytes, read: Callable[..., list[Sample]]) -> None:
    (sample,) = read(content)
    assert (sample.prefix, sample.suffix[0], sample.line) == (
        "p",
        "s",
        1 + content.split(b"{")[0].count(b"\n"),
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"not JSON \(Expecting property name .* at character 2\)"),
        ("image: a.png", "not JSON"),
        (json.dumps(GOOD) + ",", "not JSON .Extra data"),
        ("[" * 100_000, "not JSON .maximum recursion"),
        ("[]", r'not an object but list: write {"image", "prefix", "suffix"}'),
        ('"text"', "not an object but str"),
        (json.dumps(GOOD).encode("utf-16"), "byte 1 is not UTF-8: save the file as UTF-8"),
        ('{"image": "a.png", "prefix": "é", "suffix": "s"}'.encode("latin-1"), "byte 31 is not UTF-8"),
        ({"image": "a.png", "prefix": "p"}, "no \"suffix\" among its keys ('image', 'prefix')"),
        ({"image": "a.png", "prefix": "p", "answer": "s"}, "no \"suffix\" among its keys (.*'answer')"),
        ({}, r'no "image" among its keys \(none\)'),
        (changed(suffix=7), '"suffix" is 7: expected text'),
        (changed(image=None), '"image" is null: expected text'),
        (changed(prefix=["p"]), r'"prefix" is \["p"\]: expected text'),
        (changed(prefix=""), '"prefix" is empty'),
        (changed(suffix=" \n"), '"suffix" is empty: write the answer, or say what'),
        (changed(image=""), '"image" is empty'),
        ('{"image": "a.png", "prefix": "p", "suffix": "a\\ud800"}', "character 1 of the text is not Unicode"),
        (changed(image="missing.png"), "missing.png: no such file: check the path"),
        (changed(image="inner"), "inner is a folder, not a picture"),
        (changed(image="notes.txt"), "notes.txt is not a picture in a known format"),
        (changed(image="empty.png"), "empty.png is empty"),
        (changed(image="cut_a.png"), "cut_a.png is truncated or damaged"),
        (changed(image="cut_b.jpg"), "cut_b.jpg is truncated or damaged"),
        (changed(image="cut_c.webp"), "cut_c.webp is truncated or damaged"),
        (changed(image="flipped.png"), "flipped.png is truncated or damaged"),
        (changed(image="a\0.png"), "no such file"),
        (changed(image="https://example.org/a.png"), "no such file"),
        (changed(suffix="red " * 500), r"have \d+ tokens, over the limit of 512: shorten them"),
        (changed(suffix="<loc256> crate"), "<loc256> is malformed: expected <loc0000> to <loc1023>"),
        (changed(suffix="<loc0256 crate"), "<loc0256 is malformed"),
        (changed(prefix="what is at <loc1024>?"), "<loc1024> does not exist and lies outside the picture"),
        (changed(suffix=BOX.replace("0640", "1024")), "<loc1024> does not exist and lies outside"),
        (changed(suffix=f"{BOX}<seg128>"), "<seg128> does not exist: expected <seg000> to <seg127>"),
        (changed(suffix=BOX[:27] + " crate"), "3 <loc> in a row, in <loc0256>.*: a box has four"),
        (changed(suffix=BOX + BOX + " two"), "8 <loc> in a row"),
        (changed(suffix=f"{BOX} crate ; <loc0001> crate"), "1 <loc> in a row, in <loc0001>"),
        (changed(suffix=BOX.replace("><", "> <")), "1 <loc> in a row, .* without spaces between"),
        (changed(suffix="<loc0512><loc0128><loc0256><loc0640> crate"), "has no area: expected y0 < y1"),
        (changed(suffix="<loc0256><loc0128><loc0512><loc0128> crate"), "has no area"),
        (changed(suffix=f"{BOX}{MASK[:24]} crate"), f"3 <seg> after the box {BOX}: a mask has 16"),
        (changed(suffix=f"{MASK} crate"), "<seg> without a box before it"),
        (changed(suffix=BOX.replace("0256", "-001")), "<loc-001> is malformed: expected <loc0000>"),
        (changed(suffix="<locnan><loc0128><loc0512><loc0640>"), "<locnan> is malformed"),
        (changed(suffix=BOX.replace("loc0256", "loc 0256")), "<loc 0256> is malformed"),
        (changed(suffix=BOX.replace("loc0256", "loc_0256")), "<loc_0256> is malformed"),
        (changed(suffix=BOX.replace("loc0256", "LOC0256")), "<LOC0256> is malformed"),
        (changed(suffix=BOX.replace("loc0256", "Loc0256")), "<Loc0256> is malformed"),
        (changed(suffix=BOX.replace("loc0256", " loc0256 ")), "< loc0256 > is malformed"),
        (changed(suffix=BOX.replace("<loc0256", "loc0256")), "loc0256> is malformed"),
        (changed(suffix=BOX.replace("loc0256", "loc256.5")), "<loc256.5> is malformed"),
        (changed(suffix=BOX.replace("0256", "\u0660\u0662\u0665\u0666")), "is malformed"),
        (changed(suffix="&lt;loc0256&gt;&lt;loc0128&gt; crate"), "&lt;loc0256&gt; is malformed"),
        (changed(suffix="<loc>256</loc> crate"), "<loc> is malformed"),
        (changed(suffix=f"{BOX}<seg-03>{MASK[8:]}"), "<seg-03> is malformed: expected <seg000> to <seg127>"),
        (changed(prefix="segment <Seg003>"), "<Seg003> is malformed"),
        (changed(prefix="<image>what is it?"), '"prefix" contains <image>, which is added where it belongs'),
        (changed(prefix=" <image>\n<bos>what is it?"), '"prefix" contains'),
        (changed(suffix="a red circle<eos>"), '"suffix" contains <eos>, .* where it belongs: remove it'),
        (changed(suffix="a red circle <eos>\n"), '"suffix" contains <eos>'),
        (changed(suffix="<bos>a red circle"), '"suffix" contains <bos>'),
        ('{"image": "a", "suffix": "s", "prefix": "p", "suffix": "t"}', 'the key "suffix" is given twice'),
        ('{"image": "a.png", "prefix": "p", "suffix": "t", "x": {"a": 1, "a": 2}}', 'key "a" is given twice'),
    ],
)  # fmt: skip
def test_bad_lines(line: Any, message: str, read: Callable[..., list[Sample]]) -> None:
    """Refused with its number, or skipped with a warning."""
    message = message.replace("keys (", r"keys \(").replace("')", r"'\)")
    with pytest.raises(BadLines, match=rf"train.jsonl has 1 bad line: line 3: .*{message}") as caught:
        read(GOOD, "", line, GOOD)
    assert str(caught.value).endswith("Fix them, or skip them with --on-bad-line skip")
    warnings: list[BadLines] = []
    samples = read(GOOD, "", line, GOOD, warn=warnings.append)
    assert [sample.line for sample in samples] == [1, 4]
    (warning,) = warnings
    assert warning.reasons == caught.value.reasons
    assert str(warning).endswith("They are skipped")


def test_many_bad_lines(read: Callable[..., list[Sample]]) -> None:
    """The first ten, and how many more."""
    with pytest.raises(BadLines) as caught:
        read(*["{"] * 12, GOOD)
    assert caught.value.summary.endswith("train.jsonl has 12 bad lines")
    assert [reason.split(":")[0] for reason in caught.value.reasons[:10]] == [
        f"line {n}" for n in range(1, 11)
    ]
    assert caught.value.reasons[10:] == ["and 2 more"]
    assert "\n" not in str(caught.value)
    with pytest.raises(BadLines) as caught:
        read(*["{"] * 10, GOOD)
    assert len(caught.value.reasons) == 10


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("lines", [(), ("", " "), ("{", "["), (b"\xef\xbb\xbf",)])
def test_nothing_to_train_on(lines: tuple[Any, ...], skip: bool, read: Callable[..., list[Sample]]) -> None:
    message = "2 bad lines" if lines and lines[0] == "{" and not skip else "contains nothing to train on: "
    with pytest.raises(InputError, match=message):
        read(*lines, **({"warn": lambda warning: None} if skip else {}))


def test_a_file_that_cannot_be_read(folder: Path, processor: Processor) -> None:
    message = r"cannot be read \(.*\): expected a file with one JSON object per line"
    with pytest.raises(InputError, match=message):
        read_samples(folder / "missing.jsonl", processor, 512)


def test_the_longest_line_that_fits(read: Callable[..., list[Sample]], processor: Processor) -> None:
    """Picture, <bos>, prompt, newline, answer, <eos>."""
    tokenizer = processor.tokenizer
    words = len(tokenizer.encode("what is it?\n")) + len(tokenizer.encode("a red circle"))
    length = processor.image_seq_length + words + 2
    assert len(read(GOOD, max_length=length)) == 1
    with pytest.raises(BadLines, match=f"have {length} tokens, over the limit of {length - 1}"):
        read(GOOD, max_length=length - 1)
    inputs = processor([Image.new("RGB", (8, 8))], [GOOD["prefix"]], suffixes=[GOOD["suffix"]])
    assert inputs["input_ids"].shape[1] == length


def test_an_empty_answer_is_what_the_user_says(read: Callable[..., list[Sample]]) -> None:
    """For a picture without the objects that are asked for."""
    (sample, other) = read(changed(suffix=" "), GOOD, empty_answer="none")
    assert (sample.suffix, other.suffix) == ("none", GOOD["suffix"])
    assert read(changed(suffix=""), empty_answer="")[0].suffix == ""
    for empty in ("prefix", "image"):
        with pytest.raises(BadLines, match=f'"{empty}" is empty'):
            read(changed(**{empty: ""}), empty_answer="none")
    with pytest.raises(BadLines, match=r"<loc9> is malformed"):
        read(changed(suffix=""), empty_answer="<loc9>")


@pytest.mark.parametrize(
    "text", ["the tag <image> here", "a <location> ; <segment>", "x < y", "<local>", "a loc0256", ";"]
)
def test_what_only_looks_special_is_text(text: str, read: Callable[..., list[Sample]]) -> None:
    (sample,) = read(changed(prefix=text, suffix=text))
    assert (sample.prefix, sample.suffix) == (text, text)


def test_good_pictures_are_not_decoded(
    read: Callable[..., list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That would take minutes for thousands of photographs. Each is checked only once."""
    looked_at: list[Path] = []
    is_whole = lines._is_whole
    monkeypatch.setattr(lines, "_is_whole", lambda path: looked_at.append(path) or is_whole(path))
    monkeypatch.setattr(lines, "load_picture", lambda path: pytest.fail("decoded"))
    assert len(read(GOOD, changed(image="b.jpg"), GOOD)) == 3
    assert [path.name for path in looked_at] == ["a.png", "b.jpg"]


def test_several_pictures_with_one_prompt(folder: Path, tmp_path: Path, processor: Processor) -> None:
    """Where the system reads them: LLaVA does, PaliGemma does not."""
    path = folder / "train.jsonl"
    path.write_bytes(dumped(changed(image=["a.png", "inner/é.png"], prefix="what differs?")))
    with pytest.raises(BadLines, match="line 1: got 2 pictures for one prompt: PaliGemma reads one"):
        read_samples(path, processor, 512)
    _, llava = load_answering(write_llava(tmp_path / "llava"))
    (sample,) = read_samples(path, llava, 10_000)
    assert sample.images == ("a.png", "inner/é.png")
    assert sample.paths == (folder / "a.png", folder / "inner" / "é.png")
    inputs = make_inputs(llava, [sample, replace(sample, images=("a.png",), paths=(folder / "a.png",))])
    assert len(inputs["pixel_values"]) == 3
    lengths = inputs["attention_mask"].sum(dim=1)
    assert lengths[0] - lengths[1] >= llava.image_seq_length
    assert length_of(sample, llava) == lengths[0]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([], '"image" is an empty list: expected the path of a picture'),
        (["a.png", 7], '"image" is 7: expected text'),
        (["a.png", " "], '"image" is empty'),
        (["a.png", "gone.png"], "gone.png: no such file|got 2 pictures"),
        ({"path": "a.png"}, '"image" is {"path": "a.png"}: expected text'),
    ],
)
def test_bad_lists_of_pictures(image: Any, message: str, read: Callable[..., list[Sample]]) -> None:
    with pytest.raises(BadLines, match=message):
        read(changed(image=image))
    assert read(changed(image=["a.png"]))[0].images == ("a.png",)
