"""Whole batches: every tensor against transformers' PaliGemmaProcessor, and every refusal."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minivlm.errors import InputError
from minivlm.processing import ImageProcessor, Processor, Tokenizer, build_tokenizer, load_picture

PHOTO = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
# transformers converts a tensor to an array in a way that NumPy 2 warns about
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

N = 4  # image tokens
TEXTS = ["detect red star ; blue square", "what color is the star?", "caption en", "red", "a red star.", "3"]
PROMPTS = ["detect red star ; <loc0001> é", "caption en", "what color is the star?"]
SUFFIXES = ["<loc0001><loc0002><loc0300><loc0400><seg001> star", "a red star.\nblue", "unknown Ж words"]


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(Tokenizer(build_tokenizer(TEXTS)), ImageProcessor(image_size=28, image_seq_length=N))


@pytest.fixture(scope="module")
def folder(processor: Processor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["PreTrainedTokenizerFast", "GemmaTokenizer"])
def reference(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder as transformers reads it: as written, and as the published folders name their tokenizer.

    GemmaTokenizer keeps the file's vocabulary and merges, but not its pre-tokenizer.
    """
    from transformers import AutoProcessor, PaliGemmaProcessor

    copy = tmp_path_factory.mktemp(request.param)
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": request.param}))
    loaded = AutoProcessor.from_pretrained(copy, local_files_only=True)
    assert isinstance(loaded, PaliGemmaProcessor)
    assert type(loaded.image_processor).__name__ == "SiglipImageProcessorPil"
    return loaded


def same(ours: dict[str, torch.Tensor], theirs: Any, names: list[str]) -> bool:
    return all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in names
    )


INPUTS = ["input_ids", "attention_mask", "token_type_ids", "pixel_values"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("with_suffix", [True, False])
def test_batches_equal_the_reference(
    processor: Processor, reference: Any, rows: int, side: str, with_suffix: bool
) -> None:
    images = [load_picture(PHOTO), picture(1), picture(2, 7, 90)][:rows]
    suffixes = SUFFIXES[:rows] if with_suffix else None
    ours = processor(images, PROMPTS[:rows], suffixes, padding_side=side)
    theirs = reference(
        images=[[image] for image in images],
        text=["<image>" + prompt for prompt in PROMPTS[:rows]],
        suffix=suffixes,
        return_tensors="pt",
        padding=True,
        padding_side=side,
    )
    assert same(ours, theirs, INPUTS)
    assert ("labels" in ours) == with_suffix
    if with_suffix:
        assert torch.equal(ours["labels"], theirs["labels"])
    if rows > 1:  # the comparison notices the side of the padding
        other = processor(
            images, PROMPTS[:rows], suffixes, padding_side="left" if side == "right" else "right"
        )
        assert not torch.equal(other["input_ids"], theirs["input_ids"])


def test_labels_are_the_suffix(processor: Processor) -> None:
    tokenizer = processor.tokenizer
    for side in ("left", "right"):
        batch = processor([picture(0)] * 3, PROMPTS, SUFFIXES, padding_side=side)
        for row, suffix in enumerate(SUFFIXES):
            labels = batch["labels"][row]
            assert labels[labels != -100].tolist() == [*tokenizer.encode(suffix), tokenizer.eos_id]
            assert torch.equal(labels != -100, batch["token_type_ids"][row] == 1)
            assert torch.equal(batch["attention_mask"][row] == 0, batch["input_ids"][row] == tokenizer.pad_id)


def test_the_reference_reads_the_folder_without_new_tokens(processor: Processor, folder: Path) -> None:
    from transformers import AutoProcessor

    loaded = AutoProcessor.from_pretrained(folder, local_files_only=True)
    tokenizer = loaded.tokenizer
    assert len(tokenizer) == processor.tokenizer.vocab_size
    assert loaded.image_token_id == processor.tokenizer.image_id
    assert loaded.image_seq_length == N
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer.padding_side == "left"
    ids = processor.tokenizer.encode_suffix(SUFFIXES[0])
    assert tokenizer.decode(ids, skip_special_tokens=True) == SUFFIXES[0] == processor.tokenizer.decode(ids)


def test_a_folder_saved_by_the_reference_is_read(processor: Processor, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    AutoProcessor.from_pretrained(folder, local_files_only=True).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()  # inside processor_config.json now
    again = Processor.from_pretrained(tmp_path)
    assert again.image_processor == processor.image_processor
    ours, theirs = again(picture(0), PROMPTS[0], SUFFIXES[0]), processor(picture(0), PROMPTS[0], SUFFIXES[0])
    assert same(ours, theirs, [*INPUTS, "labels"])


def test_a_bare_gemma_tokenizer_gets_the_same_ids_as_in_the_reference(tmp_path: Path) -> None:
    """A file without `<image>`, `<loc>` and `<seg>`, whose post-processor puts `<bos>` before each text."""
    from transformers import PaliGemmaProcessor, PreTrainedTokenizerFast
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    state = json.loads(build_tokenizer(TEXTS).to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 4]
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
    )
    assert backend.encode("red").ids[0] == 2
    backend.save(str(tmp_path / "tokenizer.json"))
    ImageProcessor(28, N).save_pretrained(tmp_path)
    processor = Processor.from_pretrained(tmp_path)

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28}, image_seq_length=N)
    theirs = PaliGemmaProcessor(images, tokenizer)(
        images=picture(0), text="<image>red <loc0005>", suffix="a<seg001>", return_tensors="pt"
    )
    ours = processor(picture(0), "red <loc0005>", "a<seg001>")
    assert same(ours, theirs, [*INPUTS, "labels"])
    assert ours["input_ids"].tolist()[0].count(2) == 1
    assert processor.tokenizer.image_id == backend.get_vocab_size()


# --- pictures and prompts -----------------------------------------------------------------------------------


def test_one_picture_and_one_prompt_as_plain_objects(processor: Processor, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    expected = processor([picture(0)], ["caption en"], ["red"])
    for image in (picture(0), tmp_path / "a.png", str(tmp_path / "a.png"), [str(tmp_path / "a.png")]):
        batch = processor(image, "caption en", "red")
        assert same(batch, expected, [*INPUTS, "labels"])
    assert "labels" not in processor(picture(0), "caption en")


def test_rows_without_a_picture(processor: Processor) -> None:
    image_id, bos_id = processor.tokenizer.image_id, processor.tokenizer.bos_id
    batch = processor([picture(0), None, picture(1)], ["caption en"] * 3)
    assert (batch["input_ids"] == image_id).sum(dim=1).tolist() == [N, 0, N]
    assert (batch["input_ids"] == bos_id).sum(dim=1).tolist() == [1, 1, 1]
    assert torch.equal(batch["pixel_values"], processor.image_processor([picture(0), picture(1)]))
    assert batch["input_ids"][1].tolist() == [0] * N + processor.tokenizer.encode_prefix("caption en", 0)
    for nothing in (None, [None]):
        batch = processor(nothing, "caption en")
        assert "pixel_values" not in batch
        assert batch["input_ids"][0].tolist() == processor.tokenizer.encode_prefix("caption en", 0)
    assert processor(None, ["a", "caption en"])["input_ids"].shape[0] == 2


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1, max_size=3),
    st.data(),
)
def test_any_prompts(processor: Processor, prompts: list[str], data: st.DataObject) -> None:
    typed = st.sampled_from(["<image>", "<bos>", "<eos>", "<pad>", ""])
    prompts = [data.draw(typed) + prompt + data.draw(typed) for prompt in prompts]
    batch = processor([picture(0)] * len(prompts), prompts, prompts)
    tokenizer = processor.tokenizer
    for row, prompt in enumerate(prompts):
        ids = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
        assert ids.count(tokenizer.image_id) == N
        assert ids.count(tokenizer.bos_id) == ids.count(tokenizer.eos_id) == 1
        assert ids.count(tokenizer.pad_id) == 0
        suffix = batch["input_ids"][row : row + 1, batch["token_type_ids"][row] == 1]
        assert processor.decode(suffix) == [prompt.replace("▁", " ")]


def test_decode_stops_at_the_first_eos(processor: Processor) -> None:
    tokenizer = processor.tokenizer
    red, star = tokenizer.encode("red"), tokenizer.encode(" star")
    rows = [
        [*red, *star, tokenizer.eos_id, *red],
        [tokenizer.eos_id, *red, *red, *red],
        [*red, *star, *star, *star],
        [tokenizer.pad_id, *red, tokenizer.pad_id, tokenizer.image_id],
    ]
    assert processor.decode(torch.tensor(rows)) == ["red star", "", "red star star star", "red"]
    with pytest.raises(InputError, match=r"shape \[1\]: expected \[B, n\]"):
        processor.decode(torch.tensor([5]))


def test_settings_of_a_folder(processor: Processor, folder: Path, tmp_path: Path) -> None:
    assert Processor.from_pretrained(folder).image_seq_length == N
    assert Processor.from_pretrained(folder, image_seq_length=9).image_seq_length == 9
    processor.tokenizer.save_pretrained(tmp_path)
    ImageProcessor(28).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="set image_seq_length"):
        Processor.from_pretrained(tmp_path)
    assert Processor.from_pretrained(str(tmp_path), image_seq_length=9).image_seq_length == 9


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "prompts", "suffixes", "options", "message"),
    [
        (1, ["a", "b"], None, {}, "got 1 pictures for 2 prompts: give one picture per prompt, the same"),
        (3, ["a"], None, {}, "got 3 pictures for 1 prompts"),
        (0, ["a"], None, {}, "got 0 pictures for 1 prompts"),
        (1, ["a"], ["b", "c"], {}, "got 2 suffixes for 1 prompts: give one suffix per prompt"),
        (1, [""], None, {}, "prompt 1 is empty: ask something, such as 'caption en'"),
        (2, ["a", " \n\t "], None, {}, "prompt 2 is empty"),
        (0, [], None, {}, "no prompts"),
        (1, [None], None, {}, "prompt 1 is of type NoneType: expected a string"),
        (1, ["a"], [3], {}, "suffix 1 is of type int: expected a string"),
        (1, ["a\ud800"], None, {}, "is not Unicode"),
        (1, ["a"], None, {"padding_side": "both"}, "padding_side is 'both': expected 'left' or 'right'"),
        (
            1,
            ["a"],
            ["red"],
            {"max_length": 8},
            "row 1 has 7 tokens before the answer and 2 in it, over max_length 8",
        ),
    ],
)
def test_refused_batches(
    processor: Processor,
    images: int,
    prompts: list[str],
    suffixes: Any,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        processor([picture(i) for i in range(images)], prompts, suffixes, **options)
    assert "\n" not in str(caught.value)


def test_max_length_is_a_limit_only(processor: Processor) -> None:
    batch = processor(picture(0), "a", "red", max_length=9)
    assert batch["input_ids"].shape == (1, 9)
    assert processor(picture(0), "a", "red", max_length=100)["input_ids"].shape == (1, 9)


def test_refused_pictures(processor: Processor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.png: no such file"):
        processor([picture(0), tmp_path / "gone.png"], ["a", "b"])
    with pytest.raises(
        InputError, match="picture 2 is of type ndarray: expected a PIL image, a path or None"
    ):
        processor([picture(0), np.zeros((3, 3, 3))], ["a", "b"])


def test_pictures_of_other_modes_and_orientations(processor: Processor) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = picture(0)
    turned.info["exif"] = exif.tobytes()
    upright = picture(0).rotate(-90, expand=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = processor([turned, upright, picture(0).convert("L")], ["caption en"] * 3)
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
