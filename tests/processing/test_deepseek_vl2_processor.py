"""DeepSeek-VL2's processor gives the ids and pixels of the original program; see tests/deepseek_vl2.py."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from deepseek_vl2 import PATCH, SIDE, backend, processor
from helpers import assert_equal
from PIL import Image, ImageOps
from torch import Tensor

from minivlm.errors import InputError
from minivlm.processing import DeepseekVL2Processor, DeepseekVL2Tokenizer, TiledImageProcessor
from minivlm.processing.deepseek_vl2 import ORIENTATION, same_places
from minivlm.processing.deepseek_vl2_tiles import candidates, choose_candidate, num_tokens, place_in
from minivlm.processing.inputs import Inputs


def noise(seed: int, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


A, B, C = noise(0, 60, 30), noise(1, 20, 45), noise(2, 90, 90)
# Ids, and x for so many image tokens; grids; some pixels.
ORIGINAL = {
    "one": (
        "289 298 25 220 x57 198 261 257 263 30 198 198 299 25",
        [[2, 1]],
        "-0.003921568 -0.003921568 0.2705883 -0.1607843 0.427451 0.7568628 -0.3960784 -0.09803921 0.5686275 "
        "-0.7254902 -0.7098039 -0.490196",
    ),
    "two": (
        "289 298 25 220 x57 198 x61 198 220 261 288 30 198 198 299 25",
        [[2, 1], [1, 2]],
        "-0.003921568 0.3960785 -0.6627451 0.8745098 -0.003921568 0.2 -0.003921568 -0.003921568 0.8666667 "
        "0.309804 -0.427451 0.5058824",
    ),
    "three": (
        "289 298 25 220 x41 198 x41 198 x41 198 261 30 198 198 299 25",
        [[1, 1], [1, 1], [1, 1]],
        "-0.003921568 0.3960785 -0.003921568 -0.5372549 -0.003921568 -0.003921568 -0.003921568 -0.003921568 "
        "0.03529418 0.09803927 0.1137255 0.0196079",
    ),
    "none": ("289 298 25 220 261 257 263 30 198 198 299 25", [], ""),
    "turns": (
        "289 298 25 263 257 220 x61 276 77 67 220 x93 25 220 261 30 198 198 299 25 64 286 290 298 25 220 293 "
        "275 286 294 198 198 299 25 295 264 16 11 220 17 11 220 18 11 220 24 24 24 265 296 290",
        [[1, 2], [2, 2]],
        "-0.003921568 -0.003921568 0.8352941 0.03529418 0.2078432 0.01176476 -0.09803921 -0.01960784 "
        "-0.2549019 -0.2470588 -0.1607843 -0.5843138",
    ),
}
ANSWERS = [64, 286, 290, 295, 264, 16, 11, 220, 17, 11, 220, 18, 11, 220, 24, 24, 24, 265, 296, 290]


def expected_ids(name: str) -> list[int]:
    image_id = processor().tokenizer.image_id
    ids: list[int] = []
    for word in ORIGINAL[name][0].split():
        ids += [image_id] * int(word[1:]) if word.startswith("x") else [int(word)]
    return ids


def check(name: str, batch: Inputs) -> None:
    ids, grids, pixels = ORIGINAL[name]
    assert batch["input_ids"][0].tolist() == expected_ids(name)
    if not grids:
        assert batch.keys() == {"input_ids", "attention_mask"}
        return
    assert batch["images_spatial_crop"].tolist() == grids
    found = batch["pixel_values"]
    assert len(found) == sum(1 + columns * rows for columns, rows in grids)
    assert_equal(
        found.flatten()[:: found.numel() // 12 + 1], torch.tensor([float(value) for value in pixels.split()])
    )
    assert ids


@pytest.mark.parametrize(
    ("name", "pictures", "question"),
    [
        ("one", [A], "what is it?"),
        ("two", [A, B], " what color? "),
        ("three", [A, B, C], "what?"),
        ("none", None, "what is it?"),
    ],
)
def test_a_question(name: str, pictures: list[Image.Image] | None, question: str) -> None:
    check(name, processor()([pictures], [question]))


def test_a_chat_with_tags() -> None:
    chat = [
        ("it is <image> and <image>: what?", " a star "),
        ("<|ref|>the star<|/ref|>", "<|det|>[[1, 2, 3, 999]]<|/det|>"),
    ]
    batch = processor().chat([[B, C]], [chat], tags=True)
    check("turns", batch)
    labels = batch["labels"][0]
    assert labels[labels != -100].tolist() == ANSWERS
    text = processor().tokenizer.decode(ANSWERS)
    assert text.endswith("<|det|>[[1, 2, 3, 999]]<|/det|>")


def test_a_batch() -> None:
    """Rows with more than two pictures are not cut, others in the same batch are."""
    reads = processor()
    batch = reads([[A], [A, B, C], None], ["what is it?", "what?", "what is it?"])
    assert batch["images_spatial_crop"].tolist() == [[2, 1], [1, 1], [1, 1], [1, 1]]
    rows = [
        row[mask.bool()].tolist()
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert rows == [expected_ids(name) for name in ("one", "three", "none")]
    three = reads([[A, B, C]], ["what?"])["pixel_values"]
    assert torch.equal(batch["pixel_values"][3:], three)
    whole = reads.image_processor.read([A])[0][0]
    assert torch.equal(three[0], whole)
    assert torch.equal(three[1], whole)


# Candidates


def test_the_candidates_are_those_of_the_published_files() -> None:
    sizes = candidates(384)
    assert len(sizes) == 23
    assert sizes[5:8] == ((384, 1536), (1536, 384), (768, 768))
    assert sizes[-3:] == ((384, 3456), (3456, 384), (1152, 1152))


def test_the_choice_is_that_of_the_original() -> None:
    """On 6,603 sizes, and on some whose tokens are known."""
    sizes = [(width, height) for width in range(1, 1200, 13) for height in range(1, 1200, 17)]
    chosen = [choose_candidate(*size, candidates(384)) for size in sizes]
    assert zlib.crc32(repr(chosen).encode()) == 1569913812
    for size, grid, tokens in (
        ((1, 1), (1, 1), 421),
        ((400, 300), (2, 1), 617),
        ((1920, 1080), (4, 2), 1807),
        ((1000, 800), (3, 3), 2017),
    ):
        width, height = choose_candidate(*size, candidates(384))
        assert (width // 384, height // 384) == grid
        assert num_tokens(*grid, 14) == tokens


@pytest.mark.parametrize("size", [(60, 30), (20, 45), (90, 90), (3, 28), (28, 3), (33, 100), (57, 56)])
def test_where_a_picture_lies(size: tuple[int, int]) -> None:
    for view in candidates(SIDE, 4):
        left, top, width, height = place_in(*size, view)
        white = ImageOps.pad(Image.new("L", size, 255), view, color=0)
        assert white.getbbox() == (left, top, left + width, top + height)


# Pictures of all kinds


@pytest.mark.parametrize("size", [(1, 1), (1, 28), (28, 1), (2, 50)])
def test_tiny_pictures(size: tuple[int, int]) -> None:
    batch = processor()([noise(0, *size)], ["what?"])
    assert torch.isfinite(batch["pixel_values"]).all()


@pytest.mark.parametrize("size", [(1, 60), (60, 1), (1, 100000), (100000, 2)])
def test_pictures_of_which_nothing_would_be_left(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"{size[0]} x {size[1]} pixels.*crop it to the part that matters"):
        processor()([Image.new("RGB", size)], ["what?"])


def test_other_modes_and_turned_pictures(tmp_path: Path) -> None:
    reads = processor()
    for mode in ("L", "RGBA", "P", "1"):
        assert reads([A.convert(mode)], ["what?"])["images_spatial_crop"].tolist() == [[2, 1]]
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    A.save(tmp_path / "turned.png", exif=exif)
    batch = reads([tmp_path / "turned.png"], ["what?"])
    assert batch["images_spatial_crop"].tolist() == [[1, 2]]
    assert batch["image_sizes"].tolist() == [[30, 60]]
    assert reads.grid_of(tmp_path / "turned.png") == (1, 2)
    row = reads.make_room(reads.encode_row("what?"), [tmp_path / "turned.png"])
    assert row.ids == batch["input_ids"][0].tolist()


# What users type


def test_words_for_places_are_for_users_and_controls_are_not() -> None:
    tokenizer = processor().tokenizer
    for word in ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>"):
        (index,) = tokenizer.encode(word)
        assert tokenizer.decode([index]) == word
    for name in (
        "<image>",
        "<|User|>",
        "<|Assistant|>",
        *(tokenizer.specials[i] for i in tokenizer.special_ids),
    ):
        ids = tokenizer.encode(f"a {name} b")
        assert tokenizer.special_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == f"a {name} b"
    typed = processor()([A], ["what is <image>?"])["input_ids"]
    assert int((typed == tokenizer.image_id).sum()) == 57


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("<|ref|>the star", r"<\|ref\|> has no partner in '<\|ref\|>the star'"),
        ("the star<|/ref|>", r"<\|/ref\|> has no partner"),
        ("<|ref|>a<|/det|>", r"<\|ref\|> has no partner"),
        ("<|det|>[[1, 2, 3]]<|/det|>", r"boxes are '\[\[1, 2, 3\]\]': expected left, top"),
        ("<|det|>[[1, 2, 3, 1000]]<|/det|>", "from 0 to 999"),
        ("  ", "prompt 1 is empty"),
    ],
)
def test_prompts_that_are_refused(question: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        processor()([A], [question])
    if question.strip():
        with pytest.raises(InputError, match=message):
            processor()([A], ["what?"], [question])


def test_pictures_that_do_not_fit_the_chat() -> None:
    reads = processor()
    with pytest.raises(
        InputError, match="hold 1 times <image>, and there are 2 pictures: write <image> once"
    ):
        reads.chat([[A, B]], [[("<image> what?", None)]], tags=True)
    with pytest.raises(InputError, match="hold 2 times <image>, and there are 1 pictures"):
        reads.chat([A], [[("<image> and <image>?", None)]], tags=True)
    with pytest.raises(InputError, match="a row has places for 1 pictures, and 2 are given"):
        reads.make_room(reads.encode_row("what?"), [A, B])
    with pytest.raises(InputError, match="over max_length 50"):
        reads([A], ["what?"], max_length=50)


# To be looked at


def test_from_tokens_to_pictures_and_back() -> None:
    reads = processor()
    inputs = reads([A], ["what?"])
    shown = reads.to_pictures(inputs)
    assert torch.equal(shown, inputs["pixel_values"][:1])
    same = reads.from_pictures(shown, inputs)
    for name in ("pixel_values", "images_spatial_crop", "image_sizes"):
        assert torch.equal(same[name], inputs[name])
    two = reads([[B, C]], ["what?"])
    assert torch.equal(reads.to_pictures(two), two["pixel_values"][[0, 3]])


@pytest.mark.parametrize("picture", [A, B, C, noise(3, 50, 36)], ids=["wide", "high", "square", "bars"])
def test_what_is_hidden_in_one_view_is_hidden_in_all(picture: Image.Image) -> None:
    """A red mark is painted into the view of the whole, and found in the tiles where the picture shows it."""
    reads = processor()
    inputs = reads([picture], ["what?"])
    versions = reads.to_pictures(inputs).repeat(2, 1, 1, 1)
    left, top, width, height = place_in(*picture.size, (SIDE, SIDE))
    down, across = slice(top, top + height // 2), slice(left + width // 2, left + width)
    versions[1, :, down, across] = 7.0
    found = reads.from_pictures(versions, inputs)
    columns, rows = found["images_spatial_crop"][0].tolist()
    views = found["pixel_values"].unflatten(0, (2, -1))
    assert torch.equal(views[0], inputs["pixel_values"])
    canvas = views[1, 1:].unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    marked = (canvas == 7).all(dim=0)
    left, top, width, height = place_in(*picture.size, (columns * SIDE, rows * SIDE))
    expected = torch.zeros_like(marked)
    expected[top : top + height // 2, left + width // 2 : left + width] = True
    wrong = (marked != expected).sum()
    assert wrong <= 4 * (width + height)  # at its edges, a pixel of the whole is a few of the tiles
    assert marked.sum() > 0.8 * expected.sum()


def test_same_places() -> None:
    across, down = same_places(60, 30, (56, 28), (28, 28))
    assert across.tolist() == [place // 2 for place in range(56)]
    assert down.tolist() == [7 + place // 2 for place in range(28)]
    across, down = same_places(30, 60, (28, 28), (28, 56))
    assert across.tolist() == [-1] * 7 + [2 * place + 1 for place in range(14)] + [-1] * 7
    assert isinstance(down, Tensor)


# Folders


def test_files_there_and_back(tmp_path: Path) -> None:
    ours = processor()
    ours.save_pretrained(tmp_path)
    again = DeepseekVL2Processor.from_pretrained(tmp_path)
    assert again.image_processor == ours.image_processor
    assert (again.patch_size, again.downsample_ratio) == (PATCH, 2)
    assert again.tokenizer.backend.to_str() == ours.tokenizer.backend.to_str()
    values = json.loads((tmp_path / "processor_config.json").read_text())
    assert values["candidate_resolutions"][:2] == [[28, 28], [28, 56]]
    assert values["processor_class"] == "DeepseekVLV2Processor"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"normalize": False}, "normalize = False; only True"),
        ({"sft_format": "plain"}, "sft_format = 'plain'"),
        ({"processor_class": "VLChatProcessor"}, "processor_class = 'VLChatProcessor'"),
        ({"patch_size": None}, r"patch_size and downsample_ratio = \[None, 2\]"),
        ({"candidate_resolutions": []}, "candidate_resolutions are missing"),
        ({"candidate_resolutions": [28, 56]}, "expected pairs of numbers"),
        ({"candidate_resolutions": [[28, 56]]}, r"expected one tile, \[28, 28\]"),
        (
            {"candidate_resolutions": [[28, 28], [28, 40]]},
            r"have \[28, 40\]: expected width and height of tiles",
        ),
        ({"image_std": [0, 0, 0]}, "image_std contains 0"),
    ],
)
def test_files_that_are_refused(values: dict[str, object], message: str, tmp_path: Path) -> None:
    processor().save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(InputError, match=message):
        DeepseekVL2Processor.from_pretrained(tmp_path)


def test_a_tokenizer_of_another_system(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected two numbers"):
        DeepseekVL2Processor.from_pretrained(tmp_path)
    other = json.loads(backend().to_str().replace("▁pad▁", "▁nothing▁"))
    processor().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="of DeepSeek-VL2"):
        DeepseekVL2Processor.from_pretrained(tmp_path)
    assert DeepseekVL2Tokenizer(backend()).user_id == 298
    with pytest.raises(InputError, match="there are no pictures"):
        TiledImageProcessor().read([])
