"""Gradient checkpointing changes no gradient, keeps less, and leaves everything else as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import randomize
from PIL import Image
from torch import Tensor

from minivlm.adapters import LoraConfig, new_adapter
from minivlm.speed.checkpointing import blocks_of, checkpoint_blocks
from minivlm.training.recipe import TrainingConfig, build

CONFIG = TrainingConfig(
    image_size=32, tower_width=24, tower_layers=2, tower_heads=2, text_width=32, text_layers=3, text_heads=2
)  # fmt: skip


@pytest.fixture(scope="module")
def built() -> tuple[Any, dict[str, Tensor]]:
    model, processor = build(CONFIG)
    randomize(model)
    pictures = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    prompts, answers = ["what color?", "detect it"], ["red", "<loc0001><loc0002><loc0900><loc1000> it"]
    return model, processor(pictures, prompts, suffixes=answers, padding_side="right")


def gradients(model: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Those of all weights that learn, and the bytes that were kept for them."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(**inputs).loss
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("adapted", [False, True])
def test_gradients_are_the_same(adapted: bool, built: tuple[Any, dict[str, Tensor]]) -> None:
    plain, inputs = copy.deepcopy(built[0]), built[1]
    if adapted:
        plain.requires_grad_(False)
        adapter = new_adapter(
            plain, LoraConfig(r=2, lora_alpha=4), generator=torch.Generator().manual_seed(0)
        )
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    thrifty = copy.deepcopy(plain)
    names = list(thrifty.state_dict())
    assert checkpoint_blocks(thrifty) == 5 == len(list(blocks_of(plain)))
    assert list(thrifty.state_dict()) == names
    wanted, much = gradients(plain, inputs)
    ours, little = gradients(thrifty, inputs)
    assert ours.keys() == wanted.keys()
    assert len(wanted) > 10
    for name, gradient in wanted.items():
        assert (ours[name] - gradient).abs().max() <= 1e-6 * max(1.0, float(gradient.abs().max())), name
    assert little < 0.7 * much


def test_generation_is_the_same(built: tuple[Any, dict[str, Tensor]]) -> None:
    plain, inputs = built
    asked = {name: inputs[name][:, :-8] for name in ("input_ids", "attention_mask", "token_type_ids")}
    asked = {"input_ids": asked["input_ids"][:1, :20], "pixel_values": inputs["pixel_values"][:1]}
    thrifty = copy.deepcopy(plain)
    checkpoint_blocks(thrifty)
    assert torch.equal(thrifty.generate(**asked, max_new_tokens=5), plain.generate(**asked, max_new_tokens=5))
