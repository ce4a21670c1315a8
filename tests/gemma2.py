"""What the tests of Gemma 2 and PaliGemma 2 share: a tiny config where every feature shows."""

from dataclasses import replace
from typing import Any

import torch
from helpers import TINY, randomize
from transformers import PaliGemmaConfig as ReferenceConfig
from transformers import PaliGemmaForConditionalGeneration

from minivlm import Gemma2Config, PaliGemma

WINDOW = 8

# Caps so low that they bend the scores of random weights, and a scale that is not that of head_dim.
TEXT = Gemma2Config(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=120,
    max_position_embeddings=128,
    query_pre_attn_scalar=5,
    sliding_window=WINDOW,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
)
TINY2 = replace(TINY, text=TEXT)


def reference_paligemma2(seed: int = 0, **text: Any) -> PaliGemmaForConditionalGeneration:
    """The transformers model of `TINY2`; keyword arguments change its text_config.

    Always eager: the other implementations of attention drop the soft cap.
    """
    values = TINY2.to_dict()
    values["text_config"] |= text
    values["tie_word_embeddings"] = values["text_config"]["tie_word_embeddings"]
    config = ReferenceConfig(**{key: value for key, value in values.items() if key != "architectures"})
    model = PaliGemmaForConditionalGeneration._from_config(config, attn_implementation="eager")
    assert model.config.text_config._attn_implementation == "eager"
    return randomize(model, seed)


def tiny_paligemma2(seed: int = 0) -> PaliGemma:
    """Our model of `TINY2`, without a reference."""
    return randomize(PaliGemma(TINY2), seed)


def hidden_states(model: torch.nn.Module, layers: torch.nn.ModuleList, **inputs: Any) -> list[torch.Tensor]:
    """The output of every layer during one forward pass."""
    found: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, output: found.append(output)) for layer in layers]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found
