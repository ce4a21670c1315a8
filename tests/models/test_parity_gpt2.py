"""GPT-2's decoder equals that of transformers on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from gpt2 import load_gpt2
from helpers import assert_differs, assert_equal, randomize
from miniatures import TINY_TEXT as TINY
from torch import Tensor
from transformers import GPT2Config as ReferenceConfig
from transformers import GPT2LMHeadModel

from minivlm.errors import InputError
from minivlm.models.views import place
from minivlm.text.gpt2 import GPT2Config, GPT2Decoder

IDS = torch.tensor([[5, 17, 3, 99, 42, 7]])


@pytest.fixture(scope="module")
def reference() -> GPT2LMHeadModel:
    config = ReferenceConfig(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=120, bos_token_id=0, eos_token_id=1
    )
    config._attn_implementation = "eager"
    return randomize(GPT2LMHeadModel(config))


@pytest.fixture
def ours(reference: GPT2LMHeadModel) -> GPT2Decoder:
    decoder = GPT2Decoder(TINY)
    load_gpt2(decoder, reference.transformer.state_dict())
    return decoder.eval()


@torch.no_grad()
def logits(decoder: GPT2Decoder, ids: Tensor = IDS) -> Tensor:
    position_ids, mask = place(torch.ones_like(ids), None)
    return decoder.logits(decoder(decoder.embed(ids), position_ids, mask))


@torch.no_grad()
def test_logits_equal_the_reference(ours: GPT2Decoder, reference: GPT2LMHeadModel) -> None:
    assert_equal(logits(ours), reference(IDS).logits)


def no_positions(decoder: GPT2Decoder) -> None:
    decoder.embed_positions.weight.data.zero_()


def exact_gelu(decoder: GPT2Decoder) -> None:
    for layer in decoder.layers:
        layer.mlp.hidden_act = "gelu"


def larger_eps(decoder: GPT2Decoder) -> None:
    decoder.ln_f.eps = 1e-2


def no_last_norm(decoder: GPT2Decoder) -> None:
    decoder.ln_f.forward = partial(F.layer_norm, normalized_shape=(32,))


@pytest.mark.parametrize("mistake", [no_positions, exact_gelu, larger_eps, no_last_norm])
@torch.no_grad()
def test_mistakes_show(
    mistake: Callable[[GPT2Decoder], None], ours: GPT2Decoder, reference: GPT2LMHeadModel
) -> None:
    mistake(ours)
    assert_differs(logits(ours), reference(IDS).logits, factor=3)


def test_the_file_of_the_config_says_the_same() -> None:
    assert GPT2Config.from_dict(TINY.to_dict()) == TINY


def test_a_width_that_heads_cannot_share_is_refused() -> None:
    with pytest.raises(InputError, match="hidden_size 30 is not divisible by 4 heads"):
        GPT2Config(hidden_size=30, num_attention_heads=4)
