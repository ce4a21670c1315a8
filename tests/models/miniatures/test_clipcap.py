"""ClipCap gives the numbers of the authors' own program, and its usual mistakes give others.

`EXPECTED` was printed by train.py of https://github.com/rmokady/CLIP_prefix_caption, class
ClipCaptionModel(4, clip_length=3, prefix_size=24, num_layers=2) over transformers' GPT-2 (32 wide, 2 layers,
4 heads, 120 words), with the tensors of `made_up`, the picture's vectors CLIP, and TOKENS: the first scores
at the first prefix vector, and at the last token.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gpt2 import load_gpt2
from helpers import assert_differs, assert_equal, made_up, noise
from miniatures import TINY_TEXT, TINY_VISION
from torch import Tensor
from transformers import GPT2Config as ReferenceConfig
from transformers import GPT2Model

from minivlm.errors import InputError
from minivlm.models.miniatures.clipcap import ClipCap, ClipCapConfig, MLPMapper

NORMS = r"(ln_|norm)\w*\.weight$"
CLIP = noise(2, 24, start=0.25)
TOKENS = torch.tensor([[5, 17, 3, 99, 42]] * 2)
IMAGE = 119  # a placeholder, which no vector of the table belongs to
EXPECTED = {
    "mlp": (
        [[-0.442573, 0.47016, 0.158694], [-0.121731, 0.261254, 0.505805]],
        [[0.66499, -0.789286, -0.571865, 0.254582], [1.470536, -1.515767, -1.024034, 0.245917]],
    ),
    "transformer": (
        [[1.507986, -0.269446, 0.930436], [0.831699, -1.043296, 1.034905]],
        [[-0.245105, 0.277637, 0.18577, 0.328862], [-0.269464, 0.026854, 0.097175, 0.062178]],
    ),
}


def theirs(name: str, kind: str) -> str:
    """The original's name of a tensor of the mapper."""
    if kind == "mlp":
        return "clip_project.model." + name.replace("fc1", "0").replace("fc2", "2")
    name = name.replace("self_attn.q_proj", "attn.to_queries").replace("self_attn.o_proj", "attn.project")
    name = re.sub(r"(layers\.\d\.)fc", r"\1mlp.fc", name)
    return "clip_project." + name.replace("layers.", "transformer.layers.", 1)


def tiny(kind: str) -> ClipCap:
    config = ClipCapConfig(
        vision=TINY_VISION,
        text=TINY_TEXT,
        mapping_type=kind,
        prefix_length=4,
        clip_length=3,
        num_mapping_layers=2,
        image_token_id=IMAGE,
    )
    return ClipCap(config).eval()


@torch.no_grad()
def filled(kind: str) -> ClipCap:
    """With the tensors that made EXPECTED."""
    model = tiny(kind)
    names = ReferenceConfig(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=120, bos_token_id=0, eos_token_id=1
    )
    gpt2 = {
        name: made_up(f"gpt.transformer.{name}", tensor.shape, NORMS)
        for name, tensor in GPT2Model(names).state_dict().items()
    }
    load_gpt2(model.language_model, gpt2)
    for name, tensor in model.clip_project.named_parameters():
        if re.search("[kv]_proj", name):
            both = theirs(name.replace("k_proj", "to_kv").replace("v_proj", "to_kv"), kind)
            both = both.replace("self_attn.to_kv", "attn.to_keys_values")
            half = slice(0, 32) if "k_proj" in name else slice(32, 64)
            tensor.copy_(made_up(both, torch.Size((64, 32)), NORMS)[half])
        else:
            tensor.copy_(made_up(theirs(name, kind), tensor.shape, NORMS))
    return model


@torch.no_grad()
def scores(model: ClipCap, vectors: Tensor = CLIP) -> tuple[Tensor, Tensor]:
    ids = torch.cat([torch.full((2, 4), IMAGE), TOKENS], dim=1)
    hidden = model.read(ids, torch.ones_like(ids), model.clip_project(vectors))
    logits = model.logits(hidden)
    return logits[:, 0, :3], logits[:, -1, :4]


@pytest.mark.parametrize("kind", EXPECTED)
def test_scores_equal_the_original(kind: str) -> None:
    for ours, expected in zip(scores(filled(kind)), EXPECTED[kind], strict=True):
        assert_equal(ours, torch.tensor(expected))


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_picture_changes_the_scores(kind: str) -> None:
    assert_differs(scores(filled(kind), -CLIP)[1], torch.tensor(EXPECTED[kind][1]), factor=1000)


def gelu(model: ClipCap) -> None:
    for block in model.clip_project.layers:
        block.fc2.register_forward_pre_hook(lambda block, x: (F.gelu(block.before),))
        block.fc1.register_forward_hook(lambda _, x, y, block=block: setattr(block.fc2, "before", y))


def keys_not_normed(model: ClipCap) -> None:
    for block in model.clip_project.layers:
        attention = block.self_attn
        raw: list[Tensor] = []
        block.norm1.register_forward_pre_hook(lambda _, x, raw=raw: raw.append(x[0]))
        for part in (attention.k_proj, attention.v_proj):
            part.register_forward_pre_hook(lambda _, x, raw=raw: (raw[-1],))


def length_one(model: ClipCap) -> None:
    mapper = model.clip_project
    mapper.register_forward_pre_hook(lambda _, x: (F.normalize(x[0], dim=-1),))


def no_constants(model: ClipCap) -> None:
    model.clip_project.prefix_const.data.zero_()


@pytest.mark.parametrize("mistake", [gelu, keys_not_normed, length_one, no_constants])
def test_mistakes_show(mistake: Callable[[ClipCap], None]) -> None:
    model = filled("transformer")
    mistake(model)
    assert_differs(scores(model)[1], torch.tensor(EXPECTED["transformer"][1]), factor=1000)


@torch.no_grad()
def test_relu_in_place_of_tanh_shows() -> None:
    model = filled("mlp")
    mapper = model.clip_project
    assert isinstance(mapper, MLPMapper)
    mapper.forward = lambda x: mapper.fc2(F.relu(mapper.fc1(x))).unflatten(-1, (4, -1))
    assert_differs(scores(model)[1], torch.tensor(EXPECTED["mlp"][1]), factor=1000)


@torch.no_grad()
def test_a_picture_is_the_mean_of_the_towers_tokens() -> None:
    model = filled("mlp")
    pixels = noise(2, 3, 28, 28)
    assert_equal(model.encode_image(pixels), model.clip_project(model.vision_tower(pixels).mean(dim=1)))


def test_an_unknown_mapper_is_refused() -> None:
    with pytest.raises(InputError, match="mapping_type is 'rnn': expected one of mlp, transformer"):
        ClipCapConfig(mapping_type="rnn")
