"""Captions of CLIP and SigLIP: ids against transformers given the same tokenizer.json, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from caption_backends import BOS, CORPUS, EOS, clip_backend, siglip_backend
from PIL import Image
from transformers import CLIPTokenizerFast, PreTrainedTokenizerFast
from transformers.models.siglip2.tokenization_siglip2 import Siglip2Tokenizer

from minivlm.errors import InputError
from minivlm.processing import (
    CLIP_CAPTIONS,
    SIGLIP_CAPTIONS,
    CaptionTokenizer,
    CLIPImageProcessor,
    ImageProcessor,
    PairProcessor,
    build_tokenizer,
)

CAPTIONS = ["A photo of a  CAT.", "dogs", "unseen words: Ünï, 3 \u732b!", "the red star and the dog"]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    folder = tmp_path / "clip"
    folder.mkdir()
    clip_backend().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def siglip(tmp_path: Path) -> Path:
    folder = tmp_path / "siglip"
    folder.mkdir()
    siglip_backend().save(str(folder / "tokenizer.json"))
    # The file says it all: SigLIP 1's own class is in test_cleaning.py.
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


# Against the reference


@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, CLIPTokenizerFast])
def test_clip_ids_equal_the_reference(clip: Path, kind: Any) -> None:
    ours = CaptionTokenizer.from_pretrained(clip, CLIP_CAPTIONS)
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    reference = kind(tokenizer_file=str(clip / "tokenizer.json"), **names)
    if kind is CLIPTokenizerFast:  # transformers 5 builds it from vocabulary and merges, not from the file
        model = json.loads((clip / "tokenizer.json").read_text())["model"]
        merges = [tuple(merge) for merge in model["merges"]]
        reference = kind(vocab=model["vocab"], merges=merges)
    expected = reference(CAPTIONS, padding=True, return_tensors="pt")["input_ids"]
    assert torch.equal(ours(CAPTIONS), expected)
    assert expected[0, 0] == ours.before[0]
    assert (expected == ours.eos_id).any(dim=1).all()
    longest = reference("cat " * 200, truncation=True, max_length=77, return_tensors="pt")["input_ids"]
    assert torch.equal(ours("cat " * 200, truncate=True), longest)
    assert longest.shape == (1, 77)
    assert longest[0, -1] == ours.eos_id


def test_siglip_ids_equal_the_reference(siglip: Path) -> None:
    ours = CaptionTokenizer.from_pretrained(siglip, SIGLIP_CAPTIONS)
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(siglip / "tokenizer.json"), eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    settings = {"padding": "max_length", "max_length": 64, "truncation": True, "return_tensors": "pt"}
    texts = [*CAPTIONS, "", "cat " * 200]
    expected = reference(texts, **settings)["input_ids"]
    ids = ours(texts, truncate=True)
    assert torch.equal(ids, expected)
    assert ids.shape == (6, 64)
    assert ids[-1, -1] == ours.eos_id
    assert ours(CAPTIONS[:1]).shape == (1, 64)


def test_names_in_the_config_beat_the_defaults(siglip: Path) -> None:
    """Padding with another token, in the format of old and new files; and SigLIP 2's names."""
    path = siglip / "tokenizer_config.json"
    for pad in ("<pad>", {"__type": "AddedToken", "content": "<pad>"}):
        path.write_text(json.dumps({"pad_token": pad, "bos_token": "<unk>", "model_max_length": 16}))
        tokenizer = CaptionTokenizer.from_pretrained(siglip, SIGLIP_CAPTIONS)
        assert tokenizer("a cat").shape == (1, 16)
        assert tokenizer("a cat")[0, -1] == tokenizer.backend.token_to_id("<pad>") == 0
        assert tokenizer.before == []  # SigLIP has no start token, whatever the file says
    assert CaptionTokenizer.from_pretrained(siglip, SIGLIP_CAPTIONS, max_length=20)("a cat").shape == (1, 20)
    path.write_text(json.dumps({"model_max_length": 10**30}))
    assert CaptionTokenizer.from_pretrained(siglip, SIGLIP_CAPTIONS).form == SIGLIP_CAPTIONS


def test_siglip_2_ids_equal_the_reference(tmp_path: Path) -> None:
    """Gemma's file format, which keeps capitals; transformers' class for SigLIP 2 lowercases."""
    build_tokenizer(CORPUS).save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"}
    config["tokenizer_class"] = "GemmaTokenizer"  # as published
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = CaptionTokenizer.from_pretrained(tmp_path, SIGLIP_CAPTIONS)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    reference = Siglip2Tokenizer(vocab=model["vocab"], merges=merges, padding_side="right")
    texts = ["A photo of a CAT.", "dogs", "THE red Star"]
    for row, ids in zip(
        ours(texts).tolist(), reference(texts, add_special_tokens=False)["input_ids"], strict=True
    ):
        words = [index for index in ids if index not in reference.all_special_ids]
        assert row == [*words, ours.eos_id] + [ours.pad_id] * (63 - len(words))
    capitals = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert capitals.encode(texts[2]).ids != ours.encode(texts[2])


# What a user types


@pytest.mark.parametrize("text", [f"a cat{EOS}a dog", f"{BOS}a cat", EOS])
def test_a_typed_mark_does_not_end_a_caption(clip: Path, text: str) -> None:
    tokenizer = CaptionTokenizer.from_pretrained(clip, CLIP_CAPTIONS)
    ids = tokenizer(text)[0].tolist()
    assert ids.count(tokenizer.eos_id) == 1
    assert ids.count(tokenizer.before[0]) == 1
    assert ids[-1] == tokenizer.eos_id


def test_a_typed_mark_in_a_unigram_vocabulary(siglip: Path) -> None:
    tokenizer = CaptionTokenizer.from_pretrained(siglip, SIGLIP_CAPTIONS)
    assert tokenizer.eos_id not in tokenizer.encode("a cat </s> a dog</s>")
    assert tokenizer.encode("a cat")


# Refusals


def test_refused_captions(clip: Path) -> None:
    tokenizer = CaptionTokenizer.from_pretrained(clip, CLIP_CAPTIONS, max_length=6)
    assert tokenizer("red " * 4).shape == (1, 6)
    with pytest.raises(InputError, match="caption 2 has 5 tokens, but the model reads at most 4: shorten"):
        tokenizer(["red", "red " * 5])
    with pytest.raises(InputError, match="no captions"):
        tokenizer([])
    with pytest.raises(InputError, match="caption 1 is of type int"):
        tokenizer([3])  # type: ignore[list-item]
    with pytest.raises(InputError, match="not Unicode"):
        tokenizer("\ud800")
    with pytest.raises(InputError, match="no room for a word"):
        CaptionTokenizer.from_pretrained(clip, CLIP_CAPTIONS, max_length=2)


def test_refused_folders(clip: Path, siglip: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        CaptionTokenizer.from_pretrained(tmp_path, CLIP_CAPTIONS)
    with pytest.raises(InputError, match=r"no <\|startoftext\|> and no <\|endoftext\|>: take"):
        CaptionTokenizer.from_pretrained(siglip, CLIP_CAPTIONS)
    (siglip / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        CaptionTokenizer.from_pretrained(siglip, SIGLIP_CAPTIONS)
    (siglip / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match="contains no settings"):
        CaptionTokenizer.from_pretrained(siglip, SIGLIP_CAPTIONS)
    (clip / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer"):
        CaptionTokenizer.from_pretrained(clip, CLIP_CAPTIONS)


# With pictures


@pytest.mark.parametrize("model_type", ["clip", "siglip"])
def test_a_processor_s_folder(model_type: str, clip: Path, siglip: Path, tmp_path: Path) -> None:
    source = clip if model_type == "clip" else siglip
    kind: type[ImageProcessor] = CLIPImageProcessor if model_type == "clip" else ImageProcessor
    kind(image_size=28).save_pretrained(source)
    processor = PairProcessor.from_pretrained(source, model_type)
    image = Image.linear_gradient("L").resize((50, 40))
    image.save(tmp_path / "a.png")
    batch = processor([image, tmp_path / "a.png", str(tmp_path / "a.png")], CAPTIONS)
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])
    assert len(batch["input_ids"]) == 4
    assert list(processor(image)) == ["pixel_values"]
    assert list(processor(texts="a cat")) == ["input_ids"]

    processor.save_pretrained(tmp_path / "again")
    again = PairProcessor.from_pretrained(tmp_path / "again", model_type)(image, CAPTIONS)
    assert torch.equal(again["input_ids"], batch["input_ids"])
    assert torch.equal(again["pixel_values"], batch["pixel_values"][:1])
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")
    settings = {"padding": True if model_type == "clip" else "max_length", "return_tensors": "pt"}
    assert torch.equal(theirs(CAPTIONS, **settings)["input_ids"], batch["input_ids"])

    with pytest.raises(InputError, match="neither pictures nor captions"):
        processor()
    with pytest.raises(InputError, match="there are no pictures"):
        processor([])
    with pytest.raises(InputError, match="picture 1 is of type int: expected a PIL image or a path"):
        processor([3])  # type: ignore[list-item]
    with pytest.raises(InputError, match="no such file"):
        processor("missing.png")
