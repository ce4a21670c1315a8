"""What the parity tests share: tiny references with weights large enough to show a mistake, and a measure.

Weights of the usual initialization (std 0.02) hide bugs: a model with wrong positions then differs in the
seventh digit. Here every tensor, norms and biases too, is normal with std 0.2 (LayerNorm weights around 1).
"""

import itertools
from pathlib import Path
from typing import Any

import torch
from made_up import made_up as made_up
from made_up import noise as noise
from torch import Tensor, nn
from transformers import (
    PaliGemmaConfig as ReferenceConfig,
)
from transformers import (
    PaliGemmaForConditionalGeneration,
)

from minivlm import GemmaConfig, PaliGemma, PaliGemmaConfig, SiglipVisionConfig

TOLERANCE = 1e-5
IMAGE_ID = 130  # outside the vocabulary of 120, as in PaliGemma 2
IMAGE_TOKENS = 4

TINY = PaliGemmaConfig(
    vision=SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    ),
    text=GemmaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=120,
        max_position_embeddings=64,
    ),
    image_token_id=IMAGE_ID,
)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter normal with std 0.2 around 0, weights of norms around 1; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
                module.weight += 1
    return model.eval()


def reference_paligemma(seed: int = 0, **text: Any) -> PaliGemmaForConditionalGeneration:
    """The transformers model of `TINY`; keyword arguments change its text_config."""
    values = TINY.to_dict()
    values["text_config"] |= text
    values["tie_word_embeddings"] = values["text_config"]["tie_word_embeddings"]
    config = ReferenceConfig(**{key: value for key, value in values.items() if key != "architectures"})
    return randomize(PaliGemmaForConditionalGeneration(config), seed)


def tiny_paligemma(seed: int = 0) -> PaliGemma:
    """Our model of `TINY`, without a reference."""
    return randomize(PaliGemma(TINY), seed)


def reload(reference: PaliGemmaForConditionalGeneration, folder: Path) -> PaliGemma:
    """Our model with the reference's weights, by way of a folder that transformers writes."""
    reference.save_pretrained(folder)
    return PaliGemma.from_pretrained(folder)


def difference(ours: Tensor, reference: Tensor) -> float:
    """Largest difference, as a share of the reference's largest value or of 1."""
    assert ours.shape == reference.shape
    ours, reference = ours.detach(), reference.detach()
    return float((ours - reference).abs().max() / reference.abs().max().clamp(min=1))


def assert_equal(ours: Tensor, reference: Tensor) -> None:
    assert difference(ours, reference) <= TOLERANCE


def assert_differs(ours: Tensor, reference: Tensor, factor: float = 10) -> None:
    """For negative tests: wrong by far more than the tolerance."""
    assert difference(ours, reference) > factor * TOLERANCE


def make_batch(
    prefixes: list[int], suffixes: list[int], pictures: list[bool], side: str = "left", seed: int = 0
) -> dict[str, Tensor]:
    """Random rows of the given numbers of words, with or without a picture, padded on one side.

    Returns input_ids, attention_mask, token_type_ids, labels (all [B, S]), and pixel_values for the rows that
    have a picture, absent when none has.
    """
    generator = torch.Generator().manual_seed(seed)
    names = ("input_ids", "attention_mask", "token_type_ids", "labels")
    rows: list[Tensor] = []
    for prefix, suffix, picture in zip(prefixes, suffixes, pictures, strict=True):
        words = torch.randint(3, 120, (prefix + suffix,), generator=generator)
        image = torch.full((IMAGE_TOKENS if picture else 0,), IMAGE_ID)
        ids = torch.cat([image, words])
        types = torch.zeros_like(ids)
        types[len(ids) - suffix :] = 1
        rows.append(torch.stack([ids, torch.ones_like(ids), types, ids.where(types == 1, -100)]))
    longest = max(row.shape[1] for row in rows)
    batch = {name: torch.zeros(len(rows), longest, dtype=torch.long) for name in names}
    batch["labels"].fill_(-100)
    for (number, row), (column, name) in itertools.product(enumerate(rows), enumerate(names)):
        length = row.shape[1]
        place = slice(longest - length, longest) if side == "left" else slice(length)
        batch[name][number, place] = row[column]
    if any(pictures):
        batch["pixel_values"] = torch.randn(sum(pictures), 3, 28, 28, generator=generator)
    return batch


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values for name, values in batch.items() if name != "labels"}
