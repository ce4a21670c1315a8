"""LLaVA and its Llama equal those of transformers, and what others got wrong is shown to differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import VISION
from helpers import assert_differs, assert_equal, randomize
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig as ReferenceVisionConfig
from transformers import LlamaConfig as ReferenceLlamaConfig
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration
from transformers import LlavaConfig as ReferenceConfig

from minivlm import masks
from minivlm.checkpoints.layouts import LLAVA_LAYOUTS, to_file
from minivlm.errors import InputError
from minivlm.layers import GatedMLP, SwiGLU
from minivlm.models.llava import Llava, LlavaConfig
from minivlm.text.llama import LlamaConfig, LlamaDecoder
from minivlm.vision.clip import CLIPVisionConfig

IMAGE_ID, VOCABULARY = 100, 120
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
# Two rows with a picture of four patches at different places, and one without.
IDS = torch.tensor(
    [
        [1, 5, 100, 100, 100, 100, 7, 8, 9, 10],
        [1, 100, 100, 100, 100, 6, 7, 8, 9, 11],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
    ]
)
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))


def rename(name: str) -> str | None:
    """A run-time name of transformers in our words."""
    name = name.removeprefix("model.")
    for old, new in (("vision_tower.encoder.", "vision_tower."), ("self_attn.out_proj", "self_attn.o_proj")):
        name = name.replace(old, new)
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return None if name.endswith("position_ids") else name


def pair(**changes: Any) -> tuple[Llava, LlavaForConditionalGeneration]:
    """Ours and the reference, with the same weights."""
    config = ReferenceConfig(
        vision_config=ReferenceVisionConfig(**VISION),
        text_config=ReferenceLlamaConfig(**TEXT, pad_token_id=0),
        image_token_index=IMAGE_ID,
        **changes,
    )
    reference = randomize(LlavaForConditionalGeneration(config))
    ours = Llava(LlavaConfig.from_dict(config.to_dict())).eval()
    state = {rename(name): tensor for name, tensor in reference.state_dict().items()}
    ours.load_state_dict({name: tensor for name, tensor in state.items() if name is not None})
    return ours, reference


def theirs(reference: LlavaForConditionalGeneration, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    logits: Tensor = reference(input_ids=ids, pixel_values=PIXELS, attention_mask=mask).logits
    return logits


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_llama(kv_heads: int, tied: bool):
    values = TEXT | {"num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    reference = randomize(LlamaForCausalLM(ReferenceLlamaConfig(**values)))
    decoder = LlamaDecoder(LlamaConfig.from_dict(reference.config.to_dict())).eval()
    state = {name.removeprefix("model."): tensor for name, tensor in reference.state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    decoder.load_state_dict(state)
    ids = IDS[2:]
    places = torch.arange(ids.shape[1])[None]
    hidden = decoder(decoder.embed(ids), places, masks.causal(places, places)[:, None])
    assert_equal(decoder.logits(hidden), reference(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, -1, 1, 3])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_image_features(layer: int, strategy: str):
    ours, reference = pair(vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    features = reference.get_image_features(PIXELS).pooler_output
    assert_equal(ours.encode_image(PIXELS), torch.stack(list(features)))
    assert ours.encode_image(PIXELS).shape[1] == ours.config.num_image_tokens == 4 + (strategy == "full")


@torch.no_grad()
def test_logits_and_the_picture_counts():
    ours, reference = pair()
    assert_equal(ours(IDS, PIXELS).logits, theirs(reference))
    changed = ours(IDS, PIXELS.flip(-1)).logits
    assert_differs(changed[:2, -1], ours(IDS, PIXELS).logits[:2, -1])
    assert_equal(changed[2], ours(IDS, PIXELS).logits[2])  # the row without a picture


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str):
    """Beside a reference that is padded alike, and beside each row alone."""
    ours, reference = pair()
    pad = torch.zeros(3, 3, dtype=torch.long)
    ids = torch.cat([pad, IDS] if side == "left" else [IDS, pad], dim=1)
    mask = (ids != 0).long()
    real = mask.bool()
    logits = ours(ids, PIXELS, mask).logits
    assert_equal(logits[real], theirs(reference, ids, mask)[real])
    assert_equal(logits[real].view(3, 10, -1), ours(IDS, PIXELS).logits)


@torch.no_grad()
def test_full_cached_and_padded_agree():
    ours, _ = pair()
    full = ours(IDS, PIXELS).logits
    hidden, cache = ours.prefill(IDS[:, :7], torch.ones(3, 7, dtype=torch.long), PIXELS)
    assert_equal(ours.logits(hidden), full[:, 6])
    for place in range(7, 10):
        hidden = ours.decode(IDS[:, place], torch.ones(3, dtype=torch.bool), cache)
        assert_equal(ours.logits(hidden), full[:, place])


@torch.no_grad()
def test_generation():
    ours, reference = pair()
    alone = reference.generate(
        input_ids=IDS,
        pixel_values=PIXELS,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    ours.config = replace(ours.config, eos_token_id=VOCABULARY + 1)
    written = ours.generate(IDS, 6, pixel_values=PIXELS, attention_mask=torch.ones_like(IDS))
    assert torch.equal(written, alone[:, IDS.shape[1] :])


def test_the_loss():
    ours, reference = pair()
    labels = IDS.masked_fill(IDS == IMAGE_ID, -100)
    labels[:, :6] = -100
    expected = reference(input_ids=IDS, pixel_values=PIXELS, labels=labels).loss
    assert_equal(ours(IDS, PIXELS, labels=labels).loss, expected)


# Folders.


@torch.no_grad()
@pytest.mark.parametrize("layout", sorted(LLAVA_LAYOUTS))
def test_folders_of_every_layout(layout: str, tmp_path: Path):
    _, reference = pair()
    reference.save_pretrained(tmp_path)
    state = {name: tensor for name, tensor in reference.state_dict().items() if rename(name)}
    named = {to_file(str(rename(name)), LLAVA_LAYOUTS[layout]): tensor for name, tensor in state.items()}
    save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal(Llava.from_pretrained(tmp_path)(IDS, PIXELS).logits, theirs(reference))


@torch.no_grad()
def test_what_transformers_saves_and_what_we_save(tmp_path: Path):
    ours, reference = pair()
    reference.save_pretrained(tmp_path / "theirs")
    again = Llava.from_pretrained(tmp_path / "theirs")
    assert_equal(again(IDS, PIXELS).logits, theirs(reference))
    assert again.config.vision_feature_layer == -2
    again.save_pretrained(tmp_path / "ours")
    loaded, seen = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(seen[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal(theirs(loaded.eval()), ours(IDS, PIXELS).logits)


# Mistakes that reimplementations have made.


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -3])
def test_another_layer_differs(layer: int):
    ours, reference = pair()
    ours.config = replace(ours.config, vision_feature_layer=layer)
    assert_differs(ours(IDS, PIXELS).logits, theirs(reference))


@torch.no_grad()
def test_the_last_norm_differs():
    ours, reference = pair()
    right = ours.vision_tower.hidden_states
    ours.vision_tower.hidden_states = lambda pixels: map(ours.vision_tower.post_layernorm, right(pixels))
    assert_differs(ours(IDS, PIXELS).logits, theirs(reference))


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_another_activation_of_the_tower_differs(activation: str):
    ours, reference = pair()
    for layer in ours.vision_tower.layers:
        layer.mlp.hidden_act = activation
    assert_differs(ours(IDS, PIXELS).logits, theirs(reference))


@torch.no_grad()
def test_a_prefix_that_sees_the_question_differs(monkeypatch: pytest.MonkeyPatch):
    ours, reference = pair()
    prefix = masks.prefix_lm(torch.arange(10)[None], torch.arange(10)[None], torch.tensor([7]))
    monkeypatch.setattr(masks, "causal", lambda queries, keys: prefix)
    assert_differs(ours(IDS, PIXELS).logits, theirs(reference))


@torch.no_grad()
def test_gemmas_gate_differs(monkeypatch: pytest.MonkeyPatch):
    ours, reference = pair()
    monkeypatch.setattr(SwiGLU, "forward", GatedMLP.forward)
    assert_differs(ours(IDS, PIXELS).logits, theirs(reference))


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\]"),
        ({"vision_feature_layer": -5}, r"has -4 to 3"),
        ({"vision_feature_select_strategy": "cls"}, "strategy is 'cls'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act = 'relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias = False"),
        ({"model_type": "llava_next"}, "model_type 'llava_next'"),
        ({"text_config": {"hidden_act": "gelu"}}, "hidden_act = 'gelu'"),
        ({"text_config": {"head_dim": 16}}, "head_dim = 16"),
        ({"text_config": {"attention_bias": True}}, "attention_bias = True"),
        ({"text_config": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}}, "'llama3'"),
        ({"text_config": {"model_type": "mistral"}}, "'mistral'"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(changes: dict[str, Any], message: str):
    values = LlavaConfig(CLIPVisionConfig(**VISION), LlamaConfig(**TEXT), image_token_id=IMAGE_ID).to_dict()
    text = values["text_config"] | changes.pop("text_config", {})
    with pytest.raises(InputError, match=message):
        LlavaConfig.from_dict({**values, "text_config": text, **changes})


def test_a_wrong_number_of_placeholders():
    ours, _ = pair()
    with pytest.raises(ValueError, match="hold 6 image placeholders and the pictures give 8"):
        ours(IDS.index_fill(1, torch.tensor([2]), 9), PIXELS)
