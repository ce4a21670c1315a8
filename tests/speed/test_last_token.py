"""The last MLP of a prompt runs only on what is read, and what is read stays the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gemma2 import tiny_paligemma2
from helpers import assert_equal, make_batch, tiny_paligemma, without_labels
from safetensors.torch import load_file

from minivlm.generate import last_token_indices
from minivlm.models.load import SHIPPED, load_answering
from minivlm.models.paligemma import PaliGemma
from minivlm.speed import speed_up
from minivlm.speed.last_token import skip_unread

PREFIXES, SUFFIXES, PICTURES = [3, 5, 2], [3, 1, 2], [True, True, True]
BOTH = pytest.mark.parametrize("build", [tiny_paligemma, tiny_paligemma2])


@torch.no_grad()
@BOTH
def test_the_last_mlp_of_prefill_sees_one_token_a_row(build: Callable[[], PaliGemma]):
    """The hidden states of the others would never be read."""
    model = speed_up(build())
    tokens: list[int] = []
    for layer in model.language_model.layers:
        layer.mlp.gate_proj.register_forward_hook(
            lambda _m, inputs, _o: tokens.append(inputs[0].shape[:-1].numel())
        )
    batch = without_labels(make_batch(PREFIXES, SUFFIXES, PICTURES, "left"))
    everything = batch["input_ids"].numel()
    before = len(model.language_model.layers) - 1
    model.prefill(**batch)
    assert tokens == before * [everything] + [3]
    tokens.clear()
    model(**batch)
    assert tokens == (before + 1) * [everything]


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_read_stays_the_same(build: Callable[[], PaliGemma], side: str):
    """Prefill, then a token that looks at the keys and values of the last block."""
    plain = build()
    fast = speed_up(copy.deepcopy(plain))
    batch = without_labels(make_batch(PREFIXES, SUFFIXES, PICTURES, side))
    (expected, cache), (found, own_cache) = plain.prefill(**batch), fast.prefill(**batch)
    assert_equal(found, expected)
    token, unfinished = torch.tensor([5, 6, 7]), torch.ones(3, dtype=torch.bool)
    assert_equal(fast.decode(token, unfinished, own_cache), plain.decode(token, unfinished, cache))
    assert_equal(fast(**batch).logits, plain(**batch).logits)


def test_last_token_indices():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]])
    assert last_token_indices(mask).tolist() == [3, 1, 3, 0, 3]


def test_a_model_without_prompts_is_unchanged():
    tower = torch.nn.Linear(2, 2)
    assert skip_unread(tower) is tower


def test_a_fast_model_is_saved_as_a_plain_one(tmp_path: Path):
    model, _ = load_answering()
    assert isinstance(model, PaliGemma)
    assert type(model).__name__ == "PaliGemma"
    model.save_pretrained(tmp_path)
    saved, shipped = (load_file(folder / "model.safetensors") for folder in (tmp_path, SHIPPED))
    assert saved.keys() == shipped.keys()
    assert all(torch.equal(saved[name], shipped[name]) for name in saved)
