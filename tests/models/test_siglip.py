"""SigLIP equals SiglipModel of transformers: pooling head, text tower, logits, loss, folders, refusals.

The image tower below the pooling head is compared in test_parity_siglip.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import PIXELS, TEXT, VISION, assert_all_equal, assert_same_tensors, saved
from helpers import assert_differs, assert_equal
from torch import Tensor, nn
from transformers import SiglipConfig as ReferenceConfig
from transformers import SiglipModel

from minivlm import InputError, SigLIP, SiglipConfig, SiglipVisionConfig, attention
from minivlm.layers import quick_gelu
from minivlm.text.siglip import SiglipTextConfig
from minivlm.vision.pooling import AttentionPoolingHead

# Every text has the full length of 10: words, eos (1), padding with eos.
IDS = torch.tensor(
    [
        [5, 60, 7, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [11, 12, 13, 14, 15, 16, 17, 18, 19, 1],
        [30, 31, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
)
TEXT_24 = TEXT | {"projection_size": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("siglip")


@pytest.fixture(scope="module")
def reference(folder: Path) -> SiglipModel:
    return saved(SiglipModel(ReferenceConfig(vision_config=VISION, text_config=TEXT_24)), folder)


@pytest.fixture(scope="module")
def expected(reference: SiglipModel) -> Any:
    with torch.no_grad():
        return reference(input_ids=IDS, pixel_values=PIXELS, output_hidden_states=True)


@pytest.fixture
def ours(folder: Path, reference: SiglipModel) -> SigLIP:
    return SigLIP.from_pretrained(folder)


@torch.no_grad()
def test_the_image_side(ours: SigLIP, expected: Any):
    output = expected.vision_model_output
    assert_all_equal(ours.vision_model.hidden_states(PIXELS), output.hidden_states, 4)
    assert_equal(ours.vision_model(PIXELS), output.last_hidden_state)
    assert_equal(ours.encode_image(PIXELS), output.pooler_output)


@torch.no_grad()
def test_the_text_side(ours: SigLIP, expected: Any):
    output = expected.text_model_output
    assert_all_equal(ours.text_model.hidden_states(IDS), output.hidden_states, 3)
    assert_equal(ours.text_model(IDS), output.last_hidden_state)
    assert_equal(ours.encode_text(IDS), output.pooler_output)


@torch.no_grad()
def test_logits_and_embeddings(ours: SigLIP, expected: Any):
    output = ours(IDS, PIXELS)
    assert_equal(output.logits_per_image, expected.logits_per_image)
    assert_equal(output.logits_per_text, expected.logits_per_text)
    assert_equal(output.image_embeds, expected.image_embeds)
    assert_equal(output.text_embeds, expected.text_embeds)
    assert output.logits_per_image.shape == (3, 4)
    assert output.loss is None
    assert_equal(ours.probabilities(output.logits_per_image), expected.logits_per_image.sigmoid())


def test_loss_and_gradients(ours: SigLIP, reference: SiglipModel):
    loss = ours(IDS[:3], PIXELS, return_loss=True).loss
    theirs = reference(input_ids=IDS[:3], pixel_values=PIXELS, return_loss=True).loss
    assert_equal(loss, theirs)
    loss.backward()
    reference.zero_grad()
    theirs.backward()
    assert_equal(ours.logit_bias.grad, reference.logit_bias.grad)
    assert_equal(ours.logit_scale.grad, reference.logit_scale.grad)
    assert_equal(ours.head.probe.grad, reference.vision_model.head.probe.grad)
    assert_equal(
        ours.head.attention.in_proj_weight.grad, reference.vision_model.head.attention.in_proj_weight.grad
    )
    assert ours.head.probe.grad.abs().max() > 1e-4


@torch.no_grad()
def test_the_maps_of_the_probe_can_be_recorded(ours: SigLIP, expected: Any):
    """One more map than the tower has layers: a single row, the probe's, over the patches."""
    with attention.record_attention() as maps:
        ours.encode_image(PIXELS)
    assert [list(m.shape) for m in maps] == [[3, 4, 4, 4]] * 3 + [[3, 4, 1, 4]]
    head = AttentionPoolingHead(24, 40, 4)
    module = nn.MultiheadAttention(24, 4, batch_first=True)
    module.load_state_dict(head.attention.state_dict())
    tokens = torch.randn(2, 5, 24)
    with attention.record_attention() as maps:
        head(tokens)
    _, theirs = module(head.probe.expand(2, -1, -1), tokens, tokens, average_attn_weights=False)
    assert_equal(maps[0], theirs)


# Each feature, broken on purpose


def quick_gelu_in_the_head(model: SigLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = model.head.mlp
    monkeypatch.setattr(mlp, "forward", lambda x: mlp.fc2(quick_gelu(mlp.fc1(x))))


def residual_from_the_probe(model: SigLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    head, right = model.head, model.head.attention.forward
    monkeypatch.setattr(head.attention, "forward", lambda q, x: right(q, x) + head.probe)


def no_residual(model: SigLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    head, right = model.head, model.head.mlp.forward
    monkeypatch.setattr(
        head,
        "forward",
        lambda x: right(head.layernorm(head.attention(head.probe.expand(len(x), -1, -1), x)))[:, 0],
    )


def queries_and_keys_swapped(model: SigLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = model.head.attention.in_proj_weight.clone().chunk(3)
    model.head.attention.in_proj_weight.copy_(torch.cat([k, q, v]))


def pool_before_the_norm(model: SigLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    model.vision_model.post_layernorm = nn.Identity()


def change_eps(model: SigLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-3


def mask_the_padding(model: SigLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    is_real = torch.ones(IDS.shape, dtype=torch.bool)
    is_real[:, 1:] = (IDS[:, 1:] != 1) | (IDS[:, :-1] != 1)
    for layer in model.text_model.layers:
        right = layer.forward
        monkeypatch.setattr(
            layer, "forward", lambda x, right=right: right(x, is_real[:, None, None, : x.shape[1]])
        )


def read_off_the_first_place(model: SigLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.text_model, "pool", lambda tokens: model.text_model.head(tokens[:, 0]))


def no_bias(model: SigLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    model.logit_bias.zero_()


@torch.no_grad()
@pytest.mark.parametrize(
    "damage",
    [
        quick_gelu_in_the_head,
        residual_from_the_probe,
        no_residual,
        queries_and_keys_swapped,
        pool_before_the_norm,
        change_eps,
        mask_the_padding,
        read_off_the_first_place,
        no_bias,
    ],
)
def test_damage_is_noticed(ours: SigLIP, expected: Any, monkeypatch: pytest.MonkeyPatch, damage: Any):
    damage(ours, monkeypatch)
    assert_differs(ours(IDS, PIXELS).logits_per_image, expected.logits_per_image)


# Folders


@torch.no_grad()
def test_transformers_loads_what_we_save(ours: SigLIP, expected: Any, tmp_path: Path):
    ours.save_pretrained(tmp_path)
    assert_same_tensors(ours, SigLIP.from_pretrained(tmp_path))
    assert SigLIP.from_pretrained(tmp_path).config.to_dict() == ours.config.to_dict()
    theirs, info = SiglipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    again = theirs(input_ids=IDS, pixel_values=PIXELS)
    assert_equal(again.logits_per_image, expected.logits_per_image)


@torch.no_grad()
def test_a_text_tower_of_the_same_width(tmp_path: Path):
    """Without projection_size, the head keeps the width, as in all published folders."""
    config = ReferenceConfig(vision_config=VISION, text_config=TEXT | {"hidden_size": 24})
    reference = saved(SiglipModel(config), tmp_path)
    expected = reference(input_ids=IDS, pixel_values=PIXELS).logits_per_image
    assert_equal(SigLIP.from_pretrained(tmp_path)(IDS, PIXELS).logits_per_image, expected)


# config.json


def test_missing_fields_are_those_of_transformers():
    theirs = ReferenceConfig()
    ours = SiglipConfig.from_dict({"model_type": "siglip"})
    assert ours == SiglipConfig()
    for name, value in vars(ours.vision).items():
        assert getattr(theirs.vision_config, name) == value, name
    for name, value in vars(replace(ours.text, projection_size=ours.text.output_size)).items():
        assert getattr(theirs.text_config, name) == value, name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "siglip2"}, "model_type 'siglip2', but this class is for 'siglip'"),
        ({"vision_config": {"vision_use_head": False}}, "vision_use_head = False; only True"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act = 'gelu'"),
        ({"text_config": {"hidden_act": "quick_gelu"}}, "hidden_act = 'quick_gelu'"),
        ({"text_config": {"model_type": "clip_text_model"}}, "text_config has model_type"),
        ({"text_config": {"hidden_size": 100}}, "is not divisible by 12 heads"),
        ({"text_config": {"projection_size": 512}}, "image tower returns 768 numbers and the text tower 512"),
    ],
)
def test_refused_configs(values: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        SiglipConfig.from_dict({"model_type": "siglip"} | values)


# Bad input


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS[:, :9], "have 9 tokens, expected exactly 10"),
        (torch.ones(1, 11, dtype=torch.long), "have 11 tokens, but this tower reads at most 10"),
        (IDS[0], r"shape \[10\], expected \[B, T\]"),
    ],
)
def test_refused_texts(ours: SigLIP, ids: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        ours.encode_text(ids)


def test_refused_pictures_and_pairs(ours: SigLIP):
    with pytest.raises(ValueError, match=r"\[1, 3, 14, 28\], expected \[B, 3, 28, 28\]"):
        ours.encode_image(torch.zeros(1, 3, 14, 28))
    with pytest.raises(ValueError, match="3 pictures and 4 texts"):
        ours(IDS, PIXELS, return_loss=True)
    with pytest.raises(ValueError, match="cannot be compared"):
        ours.logits(torch.zeros(2, 20), torch.zeros(2, 24))


def test_a_new_model_starts_with_no():
    """Before training, a pair most likely does not match (section 3.2 of the paper)."""
    vision, text = SiglipVisionConfig(**VISION), SiglipTextConfig.from_dict(TEXT_24)
    model = SigLIP(SiglipConfig(vision, text))
    with torch.no_grad():
        assert (model.probabilities(model(IDS, PIXELS).logits_per_image) < 0.51).all()
