"""What the tests of ViT, CLIP and SigLIP share: tiny configs, and two ways to compare with transformers."""

from pathlib import Path
from typing import Any

import torch
from helpers import assert_equal, randomize
from torch import Tensor, nn
from transformers import PreTrainedModel

VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 10,
    "bos_token_id": 97,
    "eos_token_id": 98,
    "pad_token_id": 0,
}
PIXELS = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def saved(reference: PreTrainedModel, folder: Path, seed: int = 0) -> PreTrainedModel:
    """The reference with large random weights, written by transformers into a folder."""
    randomize(reference, seed)
    reference.save_pretrained(folder)
    return reference


def assert_all_equal(ours: Any, expected: tuple[Tensor, ...], count: int) -> None:
    """Every hidden state, of which there are `count`."""
    states = list(ours)
    assert len(states) == len(expected) == count
    for state, reference in zip(states, expected, strict=True):
        assert_equal(state, reference)


def assert_same_tensors(ours: nn.Module, again: nn.Module) -> None:
    """Bit for bit, after a way through a folder."""
    before, after = ours.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
