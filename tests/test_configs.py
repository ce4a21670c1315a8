"""Values of a config.json that have the wrong type or size: one sentence, for every config."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from minivlm import InputError, PaliGemmaConfig
from minivlm.configs import check_types
from minivlm.models.clip import CLIPConfig
from minivlm.models.siglip import SiglipConfig
from minivlm.text.clip import CLIPTextConfig
from minivlm.text.gemma import GemmaConfig
from minivlm.text.gemma2 import Gemma2Config
from minivlm.text.siglip import SiglipTextConfig
from minivlm.vision.clip import CLIPVisionConfig
from minivlm.vision.siglip import SiglipVisionConfig
from minivlm.vision.vit import ViTConfig

CONFIGS: list[Any] = [
    CLIPConfig(),
    CLIPTextConfig(),
    CLIPVisionConfig(),
    Gemma2Config(),
    GemmaConfig(),
    PaliGemmaConfig(),
    SiglipConfig(),
    SiglipTextConfig(),
    SiglipVisionConfig(),
    ViTConfig(),
]
WRONG: dict[str, list[Any]] = {
    "int": ["4", 4.0, True, [4, 4], None, 0, -1, 10**9],
    "float": ["1e-6", True, [1.0], None, float("nan"), float("inf")],
    "bool": ["no", 0, 1, None],
    "str": [5, ["gelu"], None],
}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_every_field_of_every_config(config: Any) -> None:
    """Without exception: what a field cannot be is refused by the field's name."""
    check_types(config)
    for field in fields(config):
        kind = str(field.type).removesuffix(" | None").removesuffix(" | tuple[int, ...]")
        optional = str(field.type).endswith("None")
        for value in WRONG.get(kind, [5, {}, "a"]):
            if (value is None and optional) or (value == 0 and field.name.endswith("_id")):
                continue
            with pytest.raises(InputError, match=rf"^{field.name} is "):
                replace(config, **{field.name: value})


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (SiglipVisionConfig, {"image_size": [224, 224]}, r"image_size is \[224, 224\], expected int: check"),
        (SiglipVisionConfig, {"image_size": 240_000}, "image_size is 240000, expected 1 to 16384"),
        (CLIPVisionConfig, {"patch_size": [16, 16]}, r"patch_size is \[16, 16\], expected int"),
        (GemmaConfig, {"num_hidden_layers": "4"}, "num_hidden_layers is '4', expected int"),
        (GemmaConfig, {"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000, expected 1 to 1024"),
        (GemmaConfig, {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected bool"),
        (GemmaConfig, {"num_key_value_heads": 0}, "num_key_value_heads is 0, expected 1 to"),
        (Gemma2Config, {"sliding_window": 2.5}, "sliding_window is 2.5, expected int"),
        (
            Gemma2Config,
            {"final_logit_softcapping": 0},
            "final_logit_softcapping is 0: expected a number above",
        ),
        (Gemma2Config, {"rope_parameters": {"rope_theta": "a"}}, "rope_theta is 'a', expected float"),
        (CLIPTextConfig, {"eos_token_id": [119]}, r"eos_token_id is \[119\], expected int"),
    ],
    ids=str,
)
def test_from_a_file(cls: Any, values: dict[str, Any], message: str) -> None:
    model_type = cls().to_dict()["model_type"]
    with pytest.raises(InputError, match=message):
        cls.from_dict({"model_type": model_type, **values})


def test_labels_that_are_none() -> None:
    head: dict[str, Any] = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    for values in (
        {"id2label": ["a"]},
        {"id2label": {"one": "a"}},
        {"num_labels": "4"},
        {"num_labels": 1e99},
    ):
        with pytest.raises(InputError, match=r"id2label|num_labels"):
            ViTConfig.from_dict(head | values)
    assert ViTConfig.from_dict({"model_type": "vit", "architectures": 5}).labels == ()


def test_numbers_without_a_point_are_numbers() -> None:
    assert GemmaConfig(rope_theta=10000).rope_theta == 10000
    assert CLIPConfig(logit_scale_init_value=-1).logit_scale_init_value == -1
