"""Zero-shot classification, and `minivlm.load` on the folders of CLIP, SigLIP and ViT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from caption_backends import clip_backend, siglip_backend
from encoders import TEXT, VISION
from helpers import assert_equal, randomize
from PIL import Image

import minivlm
from minivlm import (
    CLIP,
    CLIPConfig,
    InputError,
    PairProcessor,
    SigLIP,
    SiglipConfig,
    SiglipVisionConfig,
    ViT,
    ViTConfig,
)
from minivlm.models.zero_shot import class_embeddings, classify
from minivlm.processing import (
    CLIP_CAPTIONS,
    SIGLIP_CAPTIONS,
    CaptionTokenizer,
    CLIPImageProcessor,
    ImageProcessor,
    ViTImageProcessor,
)
from minivlm.text.clip import CLIPTextConfig
from minivlm.text.siglip import SiglipTextConfig
from minivlm.vision.clip import CLIPVisionConfig

NAMES = ["cat", "dog", "red star"]
TEMPLATES = ["a photo of a {}.", "a drawing of a {}", "the {}"]


def make_clip(folder: Path) -> CLIP:
    tokenizer = CaptionTokenizer(clip_backend(), replace(CLIP_CAPTIONS, max_length=20))
    PairProcessor(tokenizer, CLIPImageProcessor(image_size=28)).save_pretrained(folder)
    text = TEXT | {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 20}
    text |= {"bos_token_id": tokenizer.before[0], "eos_token_id": tokenizer.eos_id}
    model = CLIP(CLIPConfig(CLIPVisionConfig(**VISION), CLIPTextConfig(**text), projection_dim=20))
    randomize(model).save_pretrained(folder)
    return model


def make_siglip(folder: Path) -> SigLIP:
    tokenizer = CaptionTokenizer(siglip_backend(), replace(SIGLIP_CAPTIONS, max_length=30))
    PairProcessor(tokenizer, ImageProcessor(image_size=28)).save_pretrained(folder)
    text = TEXT | {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 30, "projection_size": 24}
    model = SigLIP(SiglipConfig(SiglipVisionConfig(**VISION), SiglipTextConfig.from_dict(text)))
    randomize(model).save_pretrained(folder)
    return model


MAKERS: dict[str, Any] = {"clip": make_clip, "siglip": make_siglip}


@pytest.fixture(params=MAKERS)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, PairProcessor, Any]:
    """What `load` returns for a folder, and the model that was saved there."""
    made = MAKERS[request.param](tmp_path)
    model, processor = minivlm.load(tmp_path)
    assert isinstance(processor, PairProcessor)
    return model, processor, made


@torch.no_grad()
def test_a_folder_becomes_a_model_that_compares(opened: tuple[Any, PairProcessor, Any]) -> None:
    model, processor, made = opened
    assert type(model) is type(made)
    batch = processor([Image.new("RGB", (50, 40), "red"), Image.linear_gradient("L")], NAMES)
    assert torch.equal(model(**batch).logits_per_image, made(**batch).logits_per_image)
    assert model(**batch).logits_per_image.shape == (2, 3)


@torch.no_grad()
def test_class_vectors_are_means_of_unit_vectors(opened: tuple[Any, PairProcessor, Any]) -> None:
    model, processor, _ = opened
    classes = class_embeddings(model, processor.tokenizer, NAMES, TEMPLATES)
    assert classes.shape[0] == 3
    assert_equal(classes.norm(dim=1), torch.ones(3))
    sentences = ["a photo of a dog.", "a drawing of a dog", "the dog"]
    rows = model.encode_text(processor(texts=sentences)["input_ids"])
    mean = (rows / rows.norm(dim=1, keepdim=True)).mean(dim=0)
    assert_equal(classes[1], mean / mean.norm())
    assert (classes[1] - rows.mean(dim=0) / rows.mean(dim=0).norm()).abs().max() > 1e-4
    pixels = processor([Image.linear_gradient("L"), Image.radial_gradient("L")])["pixel_values"]
    probabilities = classify(model, pixels, classes)
    images = model.encode_image(pixels)
    cosines = (images / images.norm(dim=1, keepdim=True)) @ classes.T
    logits = model.logit_scale.exp() * cosines
    if isinstance(model, CLIP):
        assert_equal(probabilities, logits.softmax(dim=1))
    else:
        assert_equal(probabilities, torch.sigmoid(logits + model.logit_bias))
    assert torch.equal(probabilities.argsort(dim=1), cosines.argsort(dim=1))


def test_braces_in_names_and_templates_are_text(opened: tuple[Any, PairProcessor, Any]) -> None:
    model, processor, _ = opened
    assert class_embeddings(model, processor.tokenizer, ["{0}"], ["{} {x}"]).shape[0] == 1


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], TEMPLATES, "0 class names and 3 templates"),
        (NAMES, [], "3 class names and 0 templates"),
        (NAMES, ["a photo"], r'"a photo" has no place for the class name: write \{\} there'),
        (["cat " * 40], TEMPLATES, "but the model reads"),
        ("cat", TEMPLATES, "the class names are 'cat': expected a list of texts"),
        (NAMES, "a {}", "the templates are 'a {}': expected a list of texts"),
        (["cat", 3], TEMPLATES, r"class names are \['cat', 3\]: expected a list of texts"),
        (["cat", "dog", "cat"], TEMPLATES, "class names 'cat' and 'cat' are the same to the model"),
        (["dog", "a cat", "A Cat"], TEMPLATES, "class names 'a cat' and 'A Cat' are the same to the model"),
    ],
)
def test_refused_classes(
    opened: tuple[Any, PairProcessor, Any], names: list[str], templates: list[str], message: str
) -> None:
    model, processor, _ = opened
    with pytest.raises(InputError, match=message):
        class_embeddings(model, processor.tokenizer, names, templates)


def test_class_vectors_of_another_model(opened: tuple[Any, PairProcessor, Any]) -> None:
    model, processor, _ = opened
    pixels = processor(Image.new("L", (9, 9)))["pixel_values"]
    with pytest.raises(ValueError, match=r"and texts \[3, 7\] cannot be compared"):
        classify(model, pixels, torch.ones(3, 7))


def test_numbers_that_are_not_finite(opened: tuple[Any, PairProcessor, Any]) -> None:
    model, processor, _ = opened
    pixels = processor(Image.linear_gradient("L"))["pixel_values"]
    classes = class_embeddings(model, processor.tokenizer, NAMES)
    with pytest.raises(InputError, match=r"^pixel_values hold NaN or infinity"):
        classify(model, pixels * torch.nan, classes)
    with torch.no_grad():
        model.logit_scale.fill_(torch.nan)
    with pytest.raises(InputError, match="the weights hold NaN or infinity in logit_scale"):
        classify(model, pixels, classes)
    with torch.no_grad():
        model.logit_scale.fill_(1000)
    with pytest.raises(InputError, match="although all weights are: the numbers overflow"):
        classify(model, pixels, classes)
    with pytest.raises(InputError, match="classes hold NaN or infinity"):
        classify(model, pixels, classes * torch.nan)


# Folders


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def make_vit(folder: Path) -> ViT:
    model = randomize(ViT(ViTConfig(**VISION, labels=("a", "b"), pooler=False)))
    assert isinstance(model, ViT)
    model.save_pretrained(folder)
    ViTImageProcessor(image_size=28).save_pretrained(folder)
    return model


def test_a_vit_folder(tmp_path: Path) -> None:
    model = make_vit(tmp_path)
    loaded, processor = minivlm.load(tmp_path)
    pixels = processor([Image.linear_gradient("L")])
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)
    assert loaded.config == model.config
    edit(tmp_path / "preprocessor_config.json", size={"height": 56, "width": 56})
    with pytest.raises(InputError, match=r"side is 28 in config.json and 56 in preprocessor_config"):
        minivlm.load(tmp_path)


def test_files_of_two_checkpoints(tmp_path: Path) -> None:
    make_clip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edit(tmp_path / "config.json", text_config=config["text_config"] | {"eos_token_id": 5})
    with pytest.raises(InputError, match="the id of the end is 5 in config"):
        minivlm.load(tmp_path)
    edit(tmp_path / "config.json", text_config=config["text_config"] | {"vocab_size": 50})
    with pytest.raises(InputError, match=r"tokenizer.json has the id \d+ but the model knows only 50"):
        minivlm.load(tmp_path)
    edit(tmp_path / "config.json", text_config=config["text_config"] | {"eos_token_id": 2})
    model, processor = minivlm.load(tmp_path)  # as in OpenAI's folders: a known mistake
    assert model.config.text.eos_token_id == processor.tokenizer.eos_id


def test_a_word_that_was_added_after_the_end(tmp_path: Path) -> None:
    """With OpenAI's eos_token_id, transformers reads the text's vector at the word, the highest id."""
    config = make_clip(tmp_path).config
    word = config.text.vocab_size  # the first id after those that the model has
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    added = tokenizer["added_tokens"][-1] | {"id": word, "content": "zyx", "special": False}
    edit(tmp_path / "tokenizer.json", added_tokens=[*tokenizer["added_tokens"], added])
    model = CLIP(replace(config, text=replace(config.text, vocab_size=word + 1)))
    randomize(model).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", text_config=model.config.text.to_dict() | {"eos_token_id": 2})
    loaded, processor = minivlm.load(tmp_path)
    ids = processor(texts=["a zyx", "a cat on a mat"])["input_ids"]
    assert (ids == word).any()
    with torch.no_grad():
        assert torch.equal(loaded.encode_text(ids), model.encode_text(ids))


def test_a_siglip_folder_of_another_picture_size(tmp_path: Path) -> None:
    make_siglip(tmp_path)
    edit(tmp_path / "preprocessor_config.json", size={"height": 56, "width": 56})
    with pytest.raises(InputError, match=r"side is 28 in config.json and 56 in preprocessor_config"):
        minivlm.load(tmp_path)


@pytest.mark.parametrize(
    ("make", "command", "message"),
    [
        ("clip", ["ask", "a.png", "--prompt", "caption en"], "type 'clip', and only paligemma, "),
        ("vit", ["eval"], "holds a model that reads no text: choose a folder of paligemma, llava, "),
    ],
)
def test_the_command_line_refuses_models_that_write_nothing(
    make: str,
    command: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from minivlm.cli import main

    {"clip": make_clip, "vit": make_vit}[make](tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
