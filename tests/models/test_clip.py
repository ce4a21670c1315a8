"""CLIP equals CLIPModel of transformers: both towers, logits, loss, folders in both directions, refusals."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import PIXELS, TEXT, VISION, assert_all_equal, assert_same_tensors, saved
from helpers import assert_differs, assert_equal, difference
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig as ReferenceConfig
from transformers import CLIPModel

from minivlm import CLIP, CLIPConfig, InputError, layers
from minivlm.text import clip
from minivlm.text.clip import CLIPTextConfig
from minivlm.vision.clip import CLIPVisionConfig

# bos, words, eos, padding; the last row is padded with eos.
IDS = torch.tensor(
    [
        [97, 5, 60, 7, 98, 0, 0, 0],
        [97, 98, 0, 0, 0, 0, 0, 0],
        [97, 11, 12, 13, 14, 15, 16, 98],
        [97, 30, 31, 98, 98, 98, 98, 98],
    ]
)


def reference_config(**text: Any) -> ReferenceConfig:
    return ReferenceConfig(vision_config=VISION, text_config=TEXT | text, projection_dim=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clip")


@pytest.fixture(scope="module")
def reference(folder: Path) -> CLIPModel:
    return saved(CLIPModel(reference_config()), folder)


@pytest.fixture(scope="module")
def expected(reference: CLIPModel) -> Any:
    with torch.no_grad():
        return reference(
            input_ids=IDS, pixel_values=PIXELS, attention_mask=(IDS != 0).long(), output_hidden_states=True
        )


@pytest.fixture
def ours(folder: Path, reference: CLIPModel) -> CLIP:
    return CLIP.from_pretrained(folder)


@torch.no_grad()
def test_every_hidden_state_of_the_image_tower(ours: CLIP, expected: Any):
    output = expected.vision_model_output
    tower = ours.vision_model
    assert_all_equal(tower.hidden_states(PIXELS), output.hidden_states, 4)
    assert_equal(tower(PIXELS), output.last_hidden_state)
    # transformers overwrites pooler_output with the projected vector, so pool its last hidden state
    assert_equal(ours.encode_image(PIXELS), ours.visual_projection(tower.pool(output.last_hidden_state)))


@torch.no_grad()
def test_every_hidden_state_of_the_text_tower(ours: CLIP, expected: Any):
    """The reference gets a mask on the padding. Ours needs none: what it reads comes before the padding."""
    output = expected.text_model_output
    real = (IDS != 0)[..., None]
    states = list(ours.text_model.hidden_states(IDS))
    assert len(states) == len(output.hidden_states) == 3
    for state, other in zip(states, output.hidden_states, strict=True):
        assert_equal(state * real, other * real)
    assert_equal(ours.text_model(IDS) * real, output.last_hidden_state * real)
    assert ours.text_model.ends(IDS).tolist() == [4, 1, 7, 3]


@torch.no_grad()
def test_logits_and_embeddings(ours: CLIP, expected: Any):
    output = ours(IDS, PIXELS)
    assert_equal(output.logits_per_image, expected.logits_per_image)
    assert_equal(output.logits_per_text, expected.logits_per_text)
    assert_equal(output.image_embeds, expected.image_embeds)
    assert_equal(output.text_embeds, expected.text_embeds)
    assert output.logits_per_image.shape == (3, 4)
    assert output.loss is None
    assert_equal(ours.probabilities(output.logits_per_image), expected.logits_per_image.softmax(dim=1))


def test_loss_and_gradients(ours: CLIP, reference: CLIPModel):
    loss = ours(IDS[:3], PIXELS, return_loss=True).loss
    theirs = reference(input_ids=IDS[:3], pixel_values=PIXELS, return_loss=True).loss
    assert_equal(loss, theirs)
    loss.backward()
    reference.zero_grad()
    theirs.backward()
    assert_equal(ours.logit_scale.grad, reference.logit_scale.grad)
    for get in (
        lambda model: model.vision_model.embeddings.class_embedding,
        lambda model: model.text_model.embeddings.token_embedding.weight,
    ):
        assert get(ours).grad.abs().max() > 1e-4
        assert_equal(get(ours).grad, get(reference).grad)


@torch.no_grad()
@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
def test_other_activations(tmp_path: Path, act: str):
    """Models retrained by others use the exact GELU."""
    config = ReferenceConfig(
        vision_config=VISION | {"hidden_act": act}, text_config=TEXT | {"hidden_act": act}, projection_dim=8
    )
    reference = saved(CLIPModel(config), tmp_path)
    expected = reference(input_ids=IDS, pixel_values=PIXELS).logits_per_image
    assert_equal(CLIP.from_pretrained(tmp_path)(IDS, PIXELS).logits_per_image, expected)


@torch.no_grad()
def test_the_end_is_the_highest_id_where_the_config_says_2(tmp_path: Path):
    """As in OpenAI's files. The id 2 itself is then an ordinary token."""
    ids = IDS.clone()
    ids[0, 1] = 2
    reference = saved(CLIPModel(reference_config(eos_token_id=2)), tmp_path)
    expected = reference(input_ids=ids, pixel_values=PIXELS).text_embeds
    ours = CLIP.from_pretrained(tmp_path)
    assert_equal(ours(ids, PIXELS).text_embeds, expected)
    wrong = copy.deepcopy(ours)
    wrong.text_model.config = replace(ours.config.text, eos_token_id=98)
    assert_equal(wrong(ids, PIXELS).text_embeds, expected)  # both find the same end
    wrong.text_model.config = replace(ours.config.text, eos_token_id=97)
    assert_differs(wrong(ids, PIXELS).text_embeds, expected)


# Each feature, broken on purpose


def replace_activation(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layers.ACTIVATIONS, "quick_gelu", nn.functional.gelu)


def change_eps(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-3


def skip_the_first_norm(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    model.vision_model.pre_layrnorm = nn.Identity()


def skip_the_last_norm(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    model.vision_model.post_layernorm = nn.Identity()


def mean_of_the_patches(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = model.vision_model
    monkeypatch.setattr(tower, "pool", lambda x: tower.post_layernorm(x[:, 1:].mean(dim=1)))


def class_token_last(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    table = model.vision_model.embeddings.position_embedding.weight
    table.copy_(table.roll(-1, dims=0))


def no_causal_mask(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    right = clip.masks.causal
    monkeypatch.setattr(clip.masks, "causal", lambda q, k: torch.ones_like(right(q, k)))


def read_off_the_last_place(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.text_model, "pool", lambda tokens, ids: tokens[:, -1])


def scale_without_exp(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    model.logit_scale.copy_(torch.log(model.logit_scale.abs()))


@torch.no_grad()
@pytest.mark.parametrize(
    "damage",
    [
        replace_activation,
        change_eps,
        skip_the_first_norm,
        skip_the_last_norm,
        mean_of_the_patches,
        class_token_last,
        no_causal_mask,
        read_off_the_last_place,
        scale_without_exp,
    ],
)
def test_damage_is_noticed(ours: CLIP, expected: Any, monkeypatch: pytest.MonkeyPatch, damage: Any):
    damage(ours, monkeypatch)
    assert_differs(ours(IDS, PIXELS).logits_per_image, expected.logits_per_image)


# Folders


@torch.no_grad()
def test_transformers_loads_what_we_save(ours: CLIP, expected: Any, tmp_path: Path):
    ours.save_pretrained(tmp_path)
    assert_same_tensors(ours, CLIP.from_pretrained(tmp_path))
    assert CLIP.from_pretrained(tmp_path).config == ours.config
    theirs, info = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    again = theirs(input_ids=IDS, pixel_values=PIXELS)
    assert_equal(again.logits_per_image, expected.logits_per_image)


def test_position_ids_in_old_files_are_skipped(ours: CLIP, folder: Path, tmp_path: Path):
    """OpenAI's own folders hold these buffers, as integers."""
    tensors = load_file(folder / "model.safetensors")
    for name, length in (("text_model", 10), ("vision_model", 5)):
        tensors[f"{name}.embeddings.position_ids"] = torch.arange(length)[None]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert_same_tensors(ours, CLIP.from_pretrained(tmp_path))


def test_missing_and_misshapen_tensors_are_named(folder: Path, reference: CLIPModel, tmp_path: Path):
    tensors = load_file(folder / "model.safetensors")
    del tensors["vision_model.pre_layrnorm.weight"]
    tensors["text_projection.weight"] = torch.zeros(21, 32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(InputError) as caught:
        CLIP.from_pretrained(tmp_path)
    assert "1 missing: vision_model.pre_layrnorm.weight" in str(caught.value)
    assert "text_projection.weight is [21, 32], expected [20, 32]" in str(caught.value)


# config.json


def test_missing_fields_are_those_of_transformers():
    theirs = ReferenceConfig()
    ours = CLIPConfig.from_dict({"model_type": "clip"})
    assert ours == CLIPConfig()
    for part, values in (("vision_config", ours.vision), ("text_config", ours.text)):
        for name, value in vars(values).items():
            assert getattr(getattr(theirs, part), name) == value, (part, name)
    assert ours.projection_dim == theirs.projection_dim
    assert ours.logit_scale_init_value == theirs.logit_scale_init_value
    assert float(CLIP(replace(ours, vision=tiny_vision(), text=tiny_text())).logit_scale.detach()) == (
        pytest.approx(math.log(1 / 0.07), abs=1e-4)
    )


def tiny_vision() -> CLIPVisionConfig:
    return CLIPVisionConfig(**VISION)


def tiny_text() -> CLIPTextConfig:
    return CLIPTextConfig(**TEXT)


def test_the_old_parts_beat_the_new_ones():
    values = {
        "model_type": "clip",
        "text_config": {"hidden_size": 32, "eos_token_id": 5},
        "text_config_dict": {"hidden_size": 64},
        "vision_config_dict": None,
    }
    theirs = ReferenceConfig(**{name: copy.deepcopy(value) for name, value in values.items()})
    ours = CLIPConfig.from_dict(values)
    assert (ours.text.hidden_size, ours.text.eos_token_id) == (64, 49407)
    assert theirs.text_config.hidden_size == 64
    assert theirs.text_config.eos_token_id == 49407


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "siglip"}, "model_type 'siglip', but this class is for 'clip'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_config has model_type"),
        ({"text_config": {"hidden_act": "relu"}}, "hidden_act is 'relu': only quick_gelu, gelu"),
        ({"text_config": {"hidden_size": 30}}, "is not divisible by 8 heads"),
        ({"vision_config": {"patch_size": 300}}, "does not fit in image_size 224"),
        ({"vision_config": [1]}, "expected an object"),
    ],
)
def test_refused_configs(values: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        CLIPConfig.from_dict({"model_type": "clip"} | values)


# Bad input


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS.clone().where(IDS != 98, 4), r"row 1 of input_ids has no eos \(id 98\)"),
        (torch.stack([IDS[0], torch.full((8,), 3)]), r"row 2 of input_ids has no eos"),
        (torch.full((1, 11), 98), "have 11 tokens, but this tower reads at most 10"),
        (torch.full((5,), 98), r"shape \[5\], expected \[B, T\]"),
    ],
)
def test_refused_texts(ours: CLIP, ids: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        ours.encode_text(ids)


@torch.no_grad()
def test_rows_do_not_depend_on_each_other_where_the_config_says_2(ours: CLIP):
    """As in transformers, the end of a row is its own highest id, whatever the other rows have."""
    ours.text_model.config = replace(ours.config.text, eos_token_id=2)
    rows = torch.stack([IDS[0], torch.tensor([3, 3, 7, 3, 3, 3, 3, 3])])
    assert ours.text_model.ends(rows).tolist() == [int(IDS[0].argmax()), 2]
    assert_equal(ours.encode_text(rows)[1:], ours.encode_text(rows[1:]))


def test_refused_pictures_and_pairs(ours: CLIP):
    with pytest.raises(ValueError, match=r"\[1, 3, 14, 28\], expected \[B, 3, 28, 28\]"):
        ours.encode_image(torch.zeros(1, 3, 14, 28))
    with pytest.raises(ValueError, match="3 pictures and 4 texts"):
        ours(IDS, PIXELS, return_loss=True)
    with pytest.raises(ValueError, match=r"pictures \[2, 20\] and texts \[2, 24\] cannot be compared"):
        ours.logits(torch.zeros(2, 20), torch.zeros(2, 24))


def test_half_precision(ours: CLIP, folder: Path):
    """Pictures are in fp32, whatever the dtype of the weights."""
    half = CLIP.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = half(IDS, PIXELS).logits_per_image
    assert logits.dtype == torch.bfloat16
    assert difference(logits.float(), ours(IDS, PIXELS).logits_per_image) < 0.1
