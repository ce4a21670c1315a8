"""Folders of open_clip: a ViT from there is a CLIP as from transformers; what is not CLIP's is refused.

`EXPECTED` was printed by clip/model.py of https://github.com/openai/CLIP (d05afc4), class
CLIP(24, 28, 2, 128, 14, 10, 99, 32, 4, 2), and `EXPECTED_GELU` by open_clip (89fb801), class CLIP of the
config `GELU`, with the tensors, pictures and texts of open_clip_folders.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_differs, assert_equal, difference
from open_clip_folders import IDS, PREPROCESS, RESNET, VIT, pixels, write_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel

import minivlm
from minivlm import CLIP, InputError
from minivlm.checkpoints.hub import describe, find_folder
from minivlm.cli import main
from minivlm.models.clip_resnet import ResNetCLIP
from minivlm.models.load import kind_of, load_answering, load_matching
from minivlm.models.zero_shot import class_embeddings, classify
from minivlm.processing.crops import CLIPImageProcessor

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
PIXELS = pixels(28)
GELU = VIT | {
    "quick_gelu": False,
    "vision_cfg": VIT["vision_cfg"] | {"width": 48, "head_width": 16, "mlp_ratio": 2.5},
}
EXPECTED = torch.tensor(
    [
        [0.0028672, -0.0795751, -0.1753187, 0.0092635],
        [0.0116765, -0.0614452, -0.1630566, -0.0237959],
        [-0.0423408, -0.1142494, -0.1282241, -0.0470808],
    ]
)
EXPECTED_GELU = torch.tensor(
    [
        [-0.1140350, 0.1122650, -0.1178896, -0.1695790],
        [-0.1756711, 0.0461356, -0.1221873, -0.1671720],
        [-0.0834180, 0.1450854, -0.1118593, -0.1406187],
    ]
)


@torch.no_grad()
def logits(model: CLIP | CLIPModel, pictures: Tensor = PIXELS) -> Tensor:
    return model(input_ids=IDS, pixel_values=pictures).logits_per_image


# A ViT


@pytest.mark.parametrize(
    ("config", "expected"), [(VIT, EXPECTED), (GELU, EXPECTED_GELU)], ids=["quick", "gelu"]
)
def test_a_vit_becomes_a_clip_of_transformers(
    tmp_path: Path, config: dict[str, Any], expected: Tensor
) -> None:
    model, processor = minivlm.load(write_folder(tmp_path / "theirs", config))
    assert isinstance(model, CLIP)
    assert_equal(logits(model), expected)
    assert_differs(logits(model, PIXELS.flip(0)), expected)
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    reference, info = CLIPModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_equal(logits(reference), expected)
    again, _ = minivlm.load(tmp_path / "ours")
    assert again.config == model.config
    assert_equal(logits(again), expected)


def test_the_activation_is_that_of_the_config(tmp_path: Path) -> None:
    wrong, _ = minivlm.load(write_folder(tmp_path, VIT | {"quick_gelu": None}))
    assert wrong.config.vision.hidden_act == wrong.config.text.hidden_act == "gelu"
    assert difference(logits(wrong), EXPECTED) == pytest.approx(0.004, rel=0.5)


def test_weights_stay_parts_of_the_file(tmp_path: Path) -> None:
    """q, k and v are rows of one mapped tensor; only a transposed matrix is copied."""
    model, _ = minivlm.load(write_folder(tmp_path, VIT))
    attention = model.vision_model.layers[0].self_attn
    first, second, third = (attention.get_submodule(f"{name}_proj").weight for name in "qkv")
    assert first.untyped_storage().data_ptr() == third.untyped_storage().data_ptr()
    assert second.data_ptr() - first.data_ptr() == first.nbytes
    assert all(parameter.is_contiguous() for parameter in model.parameters())


# Which folder it is


def test_a_config_of_transformers_comes_first(tmp_path: Path) -> None:
    """As in laion's repos, which have both. timm's config.json, of its tower alone, has no model_type."""
    write_folder(tmp_path, VIT)
    timm = {"architecture": "vit_base_patch32_clip_224", "num_classes": 24, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(timm))
    save_file({"trunk.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert describe(tmp_path)["model_type"] == "open_clip"
    assert kind_of(tmp_path) == "matches"
    model, processor = load_matching(tmp_path)
    assert_equal(logits(model), EXPECTED)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert describe(tmp_path)["model_type"] == "clip"
    (tmp_path / WEIGHTS).unlink()
    assert_equal(logits(minivlm.load(tmp_path)[0]), EXPECTED)


@pytest.mark.parametrize("config", [VIT, RESNET])
def test_it_writes_no_answers_and_has_no_decoder(tmp_path: Path, config: dict[str, Any]) -> None:
    write_folder(tmp_path, config)
    with pytest.raises(InputError, match=r"type 'open_clip', and only paligemma, .*can write answers"):
        load_answering(tmp_path)
    with pytest.raises(InputError, match="open_clip, which has no decoder to quantize"):
        minivlm.load(tmp_path, quantize="int8")


def test_pickles_beside_it_or_instead(tmp_path: Path) -> None:
    write_folder(tmp_path, RESNET)
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"pickle")
    minivlm.load(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(
        InputError, match=r"its weights in open_clip_pytorch_model.bin: a pickle can run code"
    ):
        minivlm.load(tmp_path)
    (tmp_path / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"has no open_clip_model.safetensors: download the weights as well"):
        minivlm.load(tmp_path)


@pytest.mark.parametrize(
    ("archive", "repo"),
    [
        ("RN50x4.pt", "timm/resnet50x4_clip.openai"),
        ("ViT-L-14-336px.pt", "openai/clip-vit-large-patch14-336"),
    ],
)
def test_openais_archives(tmp_path: Path, archive: str, repo: str) -> None:
    message = f"{archive}, an archive of TorchScript: .* The same weights are in {repo} on the Hub"
    (tmp_path / archive).write_bytes(b"PK")
    for place in (tmp_path, tmp_path / archive):
        with pytest.raises(InputError, match=message):
            minivlm.load(place)
    (tmp_path / "other.pt").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"its weights in other.pt: a pickle can run code"):
        find_folder(tmp_path / "other.pt")


# Configs


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("model_cfg", {"custom_text": True}, "model_cfg has custom_text = True, which is not supported"),
        ("model_cfg", {"multimodal_cfg": {"width": 512}}, "model_cfg has multimodal_cfg = "),
        ("model_cfg", {"init_logit_bias": -10}, "model_cfg has init_logit_bias = -10"),
        ("model_cfg", {"embed_dim": "24"}, "model_cfg has embed_dim = '24', expected a number"),
        ("model_cfg", {"embed_dim": None}, "projection_dim is 0, expected 1 to"),
        ("model_cfg", {"text_cfg": [1]}, r"text_cfg in config.json is \[1\], expected an object"),
        (
            "vision_cfg",
            {"timm_model_name": "convnext_base"},
            "vision_cfg has timm_model_name = 'convnext_base'",
        ),
        ("vision_cfg", {"pool_type": "avg"}, "vision_cfg has pool_type = 'avg'"),
        ("vision_cfg", {"no_ln_pre": True}, "vision_cfg has no_ln_pre = True"),
        ("vision_cfg", {"width": 1.5}, "vision_cfg has width = 1.5, expected a number"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "text_cfg has hf_model_name = 'roberta-base'"),
        ("text_cfg", {"no_causal_mask": True}, "text_cfg has no_causal_mask = True"),
        ("text_cfg", {"vocab_size": 98}, "tokenizer.json has the id 98 but the model knows only 98 tokens"),
        ("preprocess_cfg", {"mean": [0.5, 0.5, 0.5]}, r"preprocess_cfg has mean = \[0.5, 0.5, 0.5\]; only"),
        ("preprocess_cfg", {"interpolation": "bilinear"}, "has interpolation = 'bilinear'; only 'bicubic'"),
        ("preprocess_cfg", {"resize_mode": "squash"}, "has resize_mode = 'squash'; only 'shortest'"),
        ("preprocess_cfg", {"size": 56}, "has size = 56; only 28"),
    ],
    ids=str,
)
def test_what_is_refused(tmp_path: Path, part: str, changes: dict[str, Any], message: str) -> None:
    write_folder(tmp_path, VIT)
    values = json.loads((tmp_path / CONFIG).read_text())
    (values if part in values else values["model_cfg"])[part] |= changes
    (tmp_path / CONFIG).write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        minivlm.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [2, 1, 2]}, "expected four stages"),
        ({"layers": [2, 1, 2, "1"]}, "layers is"),
        ({"image_size": 65}, "a multiple of 32 pixels"),
        ({"head_width": 32}, "vision_cfg has head_width = 32"),
    ],
    ids=str,
)
def test_refused_resnets(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_folder(tmp_path, RESNET)
    values = json.loads((tmp_path / CONFIG).read_text())
    values["model_cfg"]["vision_cfg"] |= changes
    (tmp_path / CONFIG).write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        minivlm.load(tmp_path)


def test_options_that_are_off_or_mean_nothing_here(tmp_path: Path) -> None:
    """Spelled out in newer configs: what CLIP does anyway, and what only training does."""
    vision = {"patch_dropout": 0.5, "ls_init_value": None, "pool_type": "tok", "qk_norm": False}
    text = {"hf_tokenizer_name": "openai/clip-vit-large-patch14", "pool_type": "argmax", "embed_cls": False}
    config = VIT | {"vision_cfg": VIT["vision_cfg"] | vision, "text_cfg": VIT["text_cfg"] | text}
    folder = tmp_path / "folder"
    write_folder(folder, config)
    assert_equal(logits(minivlm.load(folder)[0]), EXPECTED)


def test_how_pictures_are_prepared(tmp_path: Path) -> None:
    _, processor = minivlm.load(write_folder(tmp_path, VIT, mean=None))
    assert processor.image_processor == CLIPImageProcessor(image_size=28)
    assert processor.image_processor.to_open_clip() == PREPROCESS


# Commands


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("resnet"), RESNET)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.linear_gradient("L").save(tmp_path / "gradient.png")
    return tmp_path / "gradient.png"


def test_a_resnet_is_looked_at(
    resnet: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it has: the attention of its pooling. What hides a place is as large as the place."""
    out = tmp_path / "look"
    assert main(["look", str(picture), "--prompt", "w5 w7", "--model", str(resnet), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"attention.png", "importance.png"}
    printed = capsys.readouterr().out
    assert "this tower is convolutional" in printed
    assert "attention " in printed
    assert "occlusion " in printed
    assert "rollout" not in printed


def test_pairs_and_classes_of_a_resnet(
    resnet: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.radial_gradient("L").save(tmp_path / "radial.png")
    lines = [{"image": picture.name, "text": "w1 w2"}, {"image": "radial.png", "text": "w3"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["eval", "--model", str(resnet), "--data", str(tmp_path / "pairs.jsonl")]) == 0
    assert "image to text recall@1" in capsys.readouterr().out
    model, processor = load_matching(resnet)
    assert isinstance(model, ResNetCLIP)
    classes = class_embeddings(model, processor.tokenizer, ["w1", "w2"], ["w5 {}"])
    chances = classify(model, processor(images=[str(picture)])["pixel_values"], classes)
    assert float(chances.sum()) == pytest.approx(1)
    assert main(["ask", str(picture), "--prompt", "w5", "--model", str(resnet)]) == 2
    assert "only paligemma, llava" in capsys.readouterr().err


def test_tensors_of_a_vit_in_a_folder_of_a_resnet(resnet: Path, tmp_path: Path) -> None:
    write_folder(tmp_path, VIT)
    save_file(load_file(resnet / WEIGHTS), tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"closest of the layouts open_clip: open_clip\): \d+ missing"):
        minivlm.load(tmp_path)
