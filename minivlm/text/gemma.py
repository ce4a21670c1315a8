"""Gemma (https://arxiv.org/abs/2403.08295): a causal decoder from embeddings to next-token logits.

What differs from Llama: RMSNorm multiplies by (1 + w), the gate of the MLP is GELU instead of SiLU,
embeddings are multiplied by sqrt(hidden_size), the head is the embedding table itself (tied), and
head_dim is free of hidden_size / heads.

The decoder takes embeddings, positions and a mask. Where they come from (text alone, or image and text
merged; prefix-LM or causal; with or without a cache) is the business of the model above it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.cache import KVCache
from minivlm.configs import GemmaConfig
from minivlm.layers import Attention, GatedMLP, RMSNorm, additive, in_pieces, pick
from minivlm.rope import apply_rotary, rotary_angles


class GemmaBlock(nn.Module):
    """Pre-norm block. `post_attention_layernorm` is the norm before the MLP; the name is the checkpoints'."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        rotary: Callable[[Tensor], Tensor],
        update_cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D], or [B, 1, D] with one place `wanted` [B] in each row."""
        x = x + self.self_attn(self.input_layernorm(x), mask, rotary, update_cache)
        x = x if wanted is None else pick(x, wanted)
        x = x + in_pieces(self.mlp, self.post_attention_layernorm(x))
        return x


class GemmaDecoder(nn.Module):
    """The stack of blocks with the embedding table below it and the head above it."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=config.hidden_size**-0.5)
        self.layers = nn.ModuleList(GemmaBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T] -> scaled embeddings [B, T, D]."""
        embeds = self.embed_tokens(input_ids)
        # The factor is rounded to the weights' dtype, as in the original: sqrt(2048) is 45.25 in bf16.
        return embeds * torch.tensor(self.config.hidden_size**0.5, dtype=embeds.dtype)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        cache: KVCache | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Run the blocks and the final norm.

        Args:
            inputs_embeds: [B, T, D], already scaled.
            position_ids: [B, T].
            mask: boolean [B, 1, T, S], True where a query may look; S = T without a cache.
            cache: where keys and values are written and read; `cache.reserve` was called before.
            wanted: the place of one token in each row, [B], if only its hidden state will be read. The MLP
                of the last block, most of the block's work, then runs for these tokens alone.

        Returns:
            [B, T, D], or [B, 1, D] of the wanted tokens; `logits` turns them into scores of words.
        """
        rotary = _rotary(position_ids, self.config, inputs_embeds.dtype)
        bias = additive(mask, inputs_embeds.dtype)
        x = inputs_embeds
        for number, layer in enumerate(self.layers):
            update_cache = partial(cache.write, number) if cache is not None else None
            is_last = number == len(self.layers) - 1
            x = layer(x, bias, rotary, update_cache, wanted if is_last else None)
        return self.norm(x)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D] -> scores of every word of the vocabulary [..., V]."""
        if self.lm_head is not None:
            return self.lm_head(hidden_states)
        return F.linear(hidden_states, self.embed_tokens.weight)


def _rotary(position_ids: Tensor, config: GemmaConfig, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    # Computed once for all layers.
    cos, sin = rotary_angles(position_ids, config.head_dim, config.rope_theta)
    return partial(apply_rotary, cos=cos.to(dtype), sin=sin.to(dtype))
