"""Flamingo's resampler gives the numbers of OpenFlamingo, and, with ReLU, those of Idefics in transformers.

`EXPECTED` was printed by src/helpers.py of https://github.com/mlfoundations/open_flamingo (655f693), class
PerceiverResampler(dim=24, depth=2, dim_head=8, heads=2, num_latents=3), without embeddings and with those of
max_num_frames=3, max_num_media=4, with the tensors of `made_up` and PATCHES: the first three numbers of the
first latent of both videos, and the last two of their last.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import assert_differs, assert_equal, made_up, noise, randomize
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from minivlm.errors import InputError
from minivlm.vision.resampler import PerceiverAttention, PerceiverResampler

NORMS = r"(norm\w*|\d\.1\.0)\.weight$"
PATCHES = noise(2, 2, 5, 24, start=0.75)  # of two videos of two frames
TIMES = torch.arange(2)
EMBEDDINGS = {"max_num_media": 4, "max_num_frames": 3}
EXPECTED = {
    "none": (
        [[0.471665, 1.614395, 0.485339], [-1.565605, 1.282768, -0.081244]],
        [[0.004696, 0.426927], [-0.316686, 0.647639]],
    ),
    "times": (
        [[-0.749107, 1.889285, 0.675558], [0.320148, 0.396325, -0.509006]],
        [[0.801112, 0.958103], [0.026296, -0.092568]],
    ),
}
tiny = partial(PerceiverResampler, hidden_size=24, depth=2, num_heads=2, head_dim=8, num_latents=3)


def theirs(name: str) -> str:
    """Our name of a tensor in OpenFlamingo's words."""
    name = re.sub(r"(layers\.\d)\.attn", r"\1.0", name)
    return "perceiver." + re.sub(r"(layers\.\d)\.ff", r"\1.1", name)


@torch.no_grad()
def filled(kind: str) -> PerceiverResampler:
    """With the tensors that made EXPECTED."""
    model = tiny(**(EMBEDDINGS if kind == "times" else {}))
    for name, tensor in model.named_parameters():
        tensor.copy_(made_up(theirs(name), tensor.shape, NORMS))
    return model.eval()


def parts(latents: Tensor) -> Tensor:
    return torch.cat([latents[:, 0, :3], latents[:, -1, -2:]], dim=1)


def expected(kind: str) -> Tensor:
    return torch.cat([torch.tensor(part) for part in EXPECTED[kind]], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("kind", EXPECTED)
def test_it_gives_openflamingos_numbers(kind: str) -> None:
    assert_equal(parts(filled(kind)(PATCHES, TIMES)), expected(kind))


@torch.no_grad()
@pytest.mark.parametrize("kind", EXPECTED)
def test_the_picture_counts(kind: str) -> None:
    assert_differs(parts(filled(kind)(-PATCHES, TIMES)), expected(kind), factor=10_000)


@torch.no_grad()
def test_a_single_picture_is_the_first_of_its_row() -> None:
    model = filled("times")
    assert_equal(model(PATCHES), model(PATCHES, torch.zeros(2, dtype=torch.long)))


def idefics() -> IdeficsPerceiverResampler:
    config = IdeficsConfig(
        vision_config={"embed_dim": 24}, perceiver_config={"qk_layer_norms_perceiver": False}
    )
    return randomize(
        IdeficsPerceiverResampler(config, embed_dim=24, depth=2, n_heads=2, head_dim=8, n_latents=3)
    )


IDEFICS = {
    "blocks.": "layers.",
    ".0.context_layer_norm": ".attn.norm_media",
    ".0.latents_layer_norm": ".attn.norm_latents",
    ".0.q_proj": ".attn.to_q",
    ".0.output_proj": ".attn.to_out",
    ".1.ln": ".ff.0",
    ".1.fc": ".ff.1",
    ".1.c_proj": ".ff.3",
}


@torch.no_grad()
def test_with_relu_it_is_that_of_idefics() -> None:
    reference, ours = idefics(), tiny()
    state: dict[str, Tensor] = {}
    for name, tensor in reference.state_dict().items():
        for old, new in IDEFICS.items():
            name = name.replace(old, new)
        state[re.sub("^layer_norm", "norm", name)] = tensor
    for number in range(2):  # keys and values are one matrix here
        pair = [state.pop(f"layers.{number}.0.{part}_proj.weight") for part in "kv"]
        state[f"layers.{number}.attn.to_kv.weight"] = torch.cat(pair)
    ours.load_state_dict(state)
    patches = PATCHES.flatten(1, 2)
    assert_differs(ours(PATCHES), reference(patches), factor=1000)
    relu(ours)
    assert_equal(ours(PATCHES), reference(patches))


# Mistakes.


def relu(model: PerceiverResampler) -> None:
    for layer in model.layers:
        layer.ff[2] = nn.ReLU()


def keys_without_latents(model: PerceiverResampler) -> None:
    for layer in model.layers:
        attention: PerceiverAttention = layer.attn

        def forward(x: Tensor, latents: Tensor, attention: Any = attention) -> Tensor:
            return attention.look(attention.norm_latents(latents), attention.norm_media(x))

        attention.forward = forward


def latents_lost(model: PerceiverResampler) -> None:
    """As SigLIP's probe, which is no part of the result."""
    first = model.layers[0]
    first.forward = lambda x, latents: (lambda y: y + first.ff(y))(first.attn(x, latents))


def one_norm(model: PerceiverResampler) -> None:
    for layer in model.layers:
        layer.attn.norm_media = layer.attn.norm_latents


def no_last_norm(model: PerceiverResampler) -> None:
    model.norm = nn.Identity()


@torch.no_grad()
@pytest.mark.parametrize(
    ("mistake", "least"),
    [(relu, 0.1), (keys_without_latents, 0.2), (latents_lost, 0.2), (one_norm, 0.1), (no_last_norm, 0.2)],
)
def test_mistakes_show(mistake: Callable[[PerceiverResampler], None], least: float) -> None:
    model = filled("none")
    mistake(model)
    assert_differs(parts(model(PATCHES)), expected("none"), factor=least / 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("table", ["frame_embs", "media_time_embs"])
def test_embeddings_count(table: str) -> None:
    model = filled("times")
    getattr(model, table).zero_()
    assert_differs(parts(model(PATCHES, TIMES)), expected("times"), factor=1000)


@torch.no_grad()
def test_frames_and_pictures_without_an_embedding_are_refused() -> None:
    model = filled("times")
    with pytest.raises(InputError, match=r"4 frames in a video.*embeddings for 3 \(max_num_frames\)"):
        model(noise(1, 4, 5, 24))
    with pytest.raises(InputError, match=r"5 pictures in a row of text.*for 4 \(max_num_media\)"):
        model(PATCHES, torch.tensor([1, 4]))
