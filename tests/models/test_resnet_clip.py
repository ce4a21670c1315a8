"""CLIP with a ResNet gives the logits of OpenAI's own program, from open_clip's folders and into them.

transformers has no such model. `EXPECTED` was printed by clip/model.py of https://github.com/openai/CLIP
(d05afc4), class CLIP(16, 64, (2, 1, 2, 1), 16, None, 10, 99, 32, 4, 2) in evaluation mode, with the tensors,
pictures and texts of open_clip_folders.py. open_clip (89fb801) gives the same to 1e-7, and
reads what is saved here to the last bit.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoders import assert_same_tensors
from helpers import assert_differs, assert_equal, difference
from open_clip_folders import IDS, RESNET, pixels, shapes, tensors, write_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minivlm
from minivlm import InputError, layers
from minivlm.checkpoints.layouts import CLIP_RESNET_LAYOUTS, as_in_file, names_in, to_file, to_ours
from minivlm.models.clip_resnet import ResNetCLIP, ResNetCLIPConfig
from minivlm.text import clip as text_clip
from minivlm.training.contrastive import train_contrastive
from minivlm.training.contrastive_recipe import ContrastiveConfig, build
from minivlm.training.loop import Loop
from minivlm.vision.clip_resnet import AttentionPool, Bottleneck, CLIPResNetConfig

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
PIXELS = pixels(64)
EXPECTED = torch.tensor(
    [
        [0.0155676, 0.1549513, -0.0453910, 0.0330418],
        [0.0575493, 0.1970963, -0.0763852, 0.0860618],
        [0.0948543, 0.2276830, -0.0206107, 0.1226317],
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("resnet"), RESNET)


@pytest.fixture
def ours(folder: Path) -> ResNetCLIP:
    return ResNetCLIP.from_pretrained(folder)


@torch.no_grad()
def logits(model: ResNetCLIP, pictures: Tensor = PIXELS, ids: Tensor = IDS) -> Tensor:
    return model(ids, pictures).logits_per_image


def test_it_gives_openais_logits(ours: ResNetCLIP, folder: Path) -> None:
    assert_equal(logits(ours), EXPECTED)
    model, processor = minivlm.load(folder)
    assert isinstance(model, ResNetCLIP)
    assert_equal(logits(model), EXPECTED)
    assert processor(texts=["w5 w60 w7"])["input_ids"].tolist() == [IDS[0, :5].tolist()]
    assert_equal(model.probabilities(logits(model)), EXPECTED.softmax(dim=1))


def test_pictures_and_texts_count(ours: ResNetCLIP) -> None:
    assert_differs(logits(ours, PIXELS.flip(0)), EXPECTED)
    assert_differs(logits(ours, ids=IDS.where(IDS != 5, 6)), EXPECTED)
    assert_equal(logits(ours, ids=IDS.where(IDS != 0, 3)), EXPECTED)  # whatever comes after the end


def test_loss_and_gradients(ours: ResNetCLIP) -> None:
    loss = ours(IDS[:3], PIXELS, return_loss=True).loss
    right, square = torch.arange(3), EXPECTED[:, :3]
    assert_equal(loss, (F.cross_entropy(square, right) + F.cross_entropy(square.T, right)) / 2)
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in ours.parameters())


# Each feature, broken on purpose


def without_statistics(model: ResNetCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


def training_mode(model: ResNetCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    model.train()


def query_without_position(model: ResNetCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    def pool(self: AttentionPool, x: Tensor) -> Tensor:
        places = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([places.mean(dim=1, keepdim=True), places], dim=1)
        q, k, v = self.attention.q_proj, self.attention.k_proj, self.attention.v_proj
        seen = tokens + self.position_embedding
        heads = [part.unflatten(-1, (8, -1)).transpose(1, 2) for part in (q(tokens), k(seen), v(seen))]
        mean = F.scaled_dot_product_attention(*heads)[:, :, 0].flatten(1)
        return self.attention.o_proj(mean)

    monkeypatch.setattr(AttentionPool, "forward", pool)


def fewer_heads_in_the_pooling(model: ResNetCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = model.vision_model.pool.attention
    attention.head_dim *= 2
    attention.scale = attention.head_dim**-0.5


def no_biases_in_the_pooling(model: ResNetCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, parameter in model.vision_model.pool.attention.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()


def no_third_norm(model: ResNetCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenAI's program begins: a weight of 0 hides a whole branch."""
    for block in model.vision_model.modules():
        if isinstance(block, Bottleneck):
            block.bn3.weight.zero_()


def other_activation(model: ResNetCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layers.ACTIVATIONS, "quick_gelu", F.gelu)


def no_causal_mask(model: ResNetCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    right = text_clip.masks.causal
    monkeypatch.setattr(text_clip.masks, "causal", lambda q, k: torch.ones_like(right(q, k)))


def keys_before_queries(model: ResNetCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in model.text_model.layers:
        layer.self_attn.q_proj, layer.self_attn.k_proj = layer.self_attn.k_proj, layer.self_attn.q_proj


def values_before_keys(model: ResNetCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in model.text_model.layers:
        layer.self_attn.v_proj, layer.self_attn.k_proj = layer.self_attn.k_proj, layer.self_attn.v_proj


def scale_without_exp(model: ResNetCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    model.logit_scale.copy_(model.logit_scale.abs().log())


@torch.no_grad()
@pytest.mark.parametrize(
    ("damage", "size"),
    [
        (without_statistics, 0.16),
        (training_mode, 0.21),
        (query_without_position, 0.0014),
        (fewer_heads_in_the_pooling, 0.13),
        (no_biases_in_the_pooling, 0.0032),
        (no_third_norm, 0.40),
        (other_activation, 0.0032),
        (no_causal_mask, 0.13),
        (keys_before_queries, 0.16),
        (values_before_keys, 0.29),
        (scale_without_exp, 0.20),
    ],
)
def test_damage_is_noticed(
    ours: ResNetCLIP, monkeypatch: pytest.MonkeyPatch, damage: Any, size: float
) -> None:
    damage(ours, monkeypatch)
    assert difference(logits(ours), EXPECTED) == pytest.approx(size, rel=0.2)


@torch.no_grad()
def test_a_projection_that_stays_transposed(tmp_path: Path) -> None:
    """Where it is a square, no shape tells."""
    square = RESNET | {"embed_dim": 32}
    model = ResNetCLIP.from_pretrained(write_folder(tmp_path, square))
    table = tensors(square)["text_projection"]
    hidden = model.text_model.pool(model.text_model(IDS), IDS)
    assert_equal(model.encode_text(IDS), hidden @ table)
    assert difference(hidden @ table.T, hidden @ table) > 0.5


# In training


@torch.no_grad()
def test_a_picture_does_not_depend_on_its_neighbors(ours: ResNetCLIP) -> None:
    assert_equal(ours.encode_image(PIXELS)[:1], ours.encode_image(PIXELS[:1]))
    ours.train()
    assert_differs(ours.encode_image(PIXELS)[:1], ours.encode_image(PIXELS[:1]))


def test_training_keeps_the_statistics(folder: Path, tmp_path: Path) -> None:
    """Weights of the norms learn. Means and variances stay those of the file, also in bf16, and are saved."""
    Image.linear_gradient("L").save(tmp_path / "a.png")
    Image.radial_gradient("L").save(tmp_path / "b.png")
    lines = [{"image": f"{name}.png", "text": f"w{ord(name)} w3"} for name in "ab"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    numbers: dict[str, Any] = {"steps": 2, "batch_size": 2, "warmup_steps": 1, "lr": 0.01}
    loop = Loop(measure_every=0, workers=0, progress=False)
    for bf16 in (False, True):
        config = ContrastiveConfig("clip", model=str(folder), bf16=bf16, **numbers)
        out = tmp_path / f"run-{bf16}"
        train_contrastive(out, config, tmp_path / "pairs.jsonl", loop=loop)
        before, after = load_file(folder / WEIGHTS), load_file(out / WEIGHTS)
        for name, tensor in after.items():
            same = bool(torch.equal(tensor, before[name]))
            assert same == any(part in name for part in ("running_", "num_batches")), name
        minivlm.load(out)


def test_objectives_that_train_another_model(folder: Path) -> None:
    with pytest.raises(InputError, match="holds a ResNetCLIP, and siglip trains a SigLIP: choose another"):
        build(ContrastiveConfig("siglip", model=str(folder)))
    with pytest.raises(InputError, match="holds a ResNetCLIP, and lit locks the image tower of a PaliGemma"):
        build(ContrastiveConfig("lit", model=str(folder)))


# Folders


def test_what_is_saved_is_the_same_folder(ours: ResNetCLIP, folder: Path, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert len(before) == 189  # as the state_dict of OpenAI's program
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = ResNetCLIP.from_pretrained(tmp_path)
    assert_same_tensors(ours, again)
    assert again.config == ours.config
    written, read = (json.loads((place / CONFIG).read_text()) for place in (tmp_path, folder))
    read["model_cfg"]["text_cfg"]["mlp_ratio"] = 4.0  # not in the file, since it is open_clip's default
    assert written == read


def test_a_folder_with_its_processor(folder: Path, tmp_path: Path) -> None:
    for part in minivlm.load(folder):
        part.save_pretrained(tmp_path)
    model, processor = minivlm.load(tmp_path)
    assert_equal(logits(model), EXPECTED)
    assert processor(texts=["w5 w60 w7"])["input_ids"].tolist() == [IDS[0, :5].tolist()]
    assert processor(images=[Image.new("RGB", (90, 70))])["pixel_values"].shape == (1, 3, 64, 64)


def test_a_model_saved_onto_its_own_folder(tmp_path: Path) -> None:
    """q, k and v are parts of one tensor in the very file that is replaced."""
    model = ResNetCLIP.from_pretrained(write_folder(tmp_path, RESNET))
    model.save_pretrained(tmp_path)
    assert_equal(logits(model), EXPECTED)
    assert_equal(logits(ResNetCLIP.from_pretrained(tmp_path)), EXPECTED)


def test_half_precision(folder: Path) -> None:
    model = ResNetCLIP.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.bfloat16, torch.int64}
    assert difference(logits(model).float(), EXPECTED) < 0.1
    assert ResNetCLIP.from_pretrained(folder, dtype=None).vision_model.bn1.running_var.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual.bn1.running_mean": None}, r"1 missing: visual\.bn1\.running_mean"),
        ({"transformer.resblocks.1.attn.in_proj_bias": None}, r"1 missing: transformer.*in_proj_bias\."),
        ({"text_projection": torch.zeros(16, 32)}, r"text_projection is \[16, 32\], expected \[32, 16\]"),
        (
            {"transformer.resblocks.0.attn.in_proj_weight": torch.zeros(95, 32)},
            r"1 of another shape or type: .*in_proj_weight is \[95, 32\], expected \[96, 32\]",
        ),
        ({"visual.layer1.0.bn1.weight": torch.zeros(16).int()}, r"bn1.weight is torch.int32, expected float"),
        ({"logit_bias": torch.zeros(())}, "1 unexpected: logit_bias"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    named = load_file(folder / WEIGHTS) | changes
    (tmp_path / CONFIG).write_text((folder / CONFIG).read_text())
    save_file({name: tensor for name, tensor in named.items() if tensor is not None}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=message):
        ResNetCLIP.from_pretrained(tmp_path)


def test_a_layout_leads_there_and_back(ours: ResNetCLIP) -> None:
    table = CLIP_RESNET_LAYOUTS["open_clip"]
    fused = "transformer.resblocks.1.attn.in_proj_weight"
    for part in "qkv":
        assert to_file(f"text_model.layers.1.self_attn.{part}_proj.weight", table) == fused
    names = [name for file in tensors(RESNET) for name in names_in(to_ours(file, table) or "")]
    assert sorted(names) == sorted(ours.state_dict())


# Sizes


@pytest.mark.parametrize(
    ("layers", "width", "image_size", "embed_dim", "text_width", "count"),
    [
        ((3, 4, 6, 3), 64, 224, 1024, 512, 102_007_137),
        ((3, 4, 23, 3), 64, 224, 512, 512, 119_688_033),
        ((4, 6, 10, 6), 80, 288, 640, 640, 178_300_601),
        ((6, 8, 18, 8), 96, 384, 768, 768, 290_979_217),
        ((3, 15, 36, 10), 128, 448, 1024, 1024, 623_258_305),
    ],
    ids=["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"],
)
def test_published_sizes(
    layers: tuple[int, ...], width: int, image_size: int, embed_dim: int, text_width: int, count: int
) -> None:
    """Configs and counts are those of open_clip's program. Its docs/model_profile.csv says the millions."""
    model_cfg = {
        "embed_dim": embed_dim,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": image_size,
            "layers": list(layers),
            "width": width,
            "patch_size": None,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": text_width,
            "heads": text_width // 64,
            "layers": 12,
        },
    }
    config = ResNetCLIPConfig.from_open_clip(model_cfg)
    tower = CLIPResNetConfig(layers, width, image_size, embed_dim)
    assert config.vision == tower
    assert tower.hidden_size // tower.num_attention_heads == 64
    assert config.text.intermediate_size == 4 * text_width
    with torch.device("meta"):
        model = ResNetCLIP(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    file = as_in_file(model.state_dict(), CLIP_RESNET_LAYOUTS["open_clip"])
    found = {name: tensor.shape for name, tensor in file.items() if "num_batches" not in name}
    assert found == shapes(model_cfg)


def test_the_defaults_are_rn50() -> None:
    config = ResNetCLIPConfig()
    assert ResNetCLIPConfig.from_open_clip(config.to_dict()["model_cfg"]) == replace(
        config, text=replace(config.text, eos_token_id=2)
    )
