"""Gemma (https://arxiv.org/abs/2403.08295): a causal decoder from embeddings to next-token logits.

Differences from Llama: RMSNorm multiplies by (1 + w), the MLP's gate is GELU instead of SiLU, embeddings are
multiplied by sqrt(hidden_size), the head is the embedding table itself (tied), and head_dim need not be
hidden_size / heads.

The decoder takes embeddings, positions and a mask. How they are made (from text alone or from image and text;
prefix-LM or causal; with or without a cache) is up to the model above it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import Attention, additive
from minivlm.cache import KVCache
from minivlm.configs import (
    check_heads,
    check_types,
    expect,
    known_decoder,
)
from minivlm.errors import InputError
from minivlm.layers import GatedMLP, RMSNorm
from minivlm.rope import apply_rotary, rotary_angles

# What Gemma's files call the tanh form of GELU. Elsewhere, "gelu" is the exact form.
TANH_GELU = ("gelu_pytorch_tanh", "gelu", "gelu_fast", "gelu_new")


@dataclass(frozen=True)
class GemmaConfig:
    """Gemma's decoder (https://arxiv.org/abs/2403.08295). The defaults are those of paligemma-3b."""

    hidden_size: int = 2048
    intermediate_size: int = 16384
    num_hidden_layers: int = 18
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = 256
    vocab_size: int = 257216
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        check_heads(self.num_attention_heads, self.num_key_value_heads, self.head_dim)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GemmaConfig:
        """From the `text_config` part of a config.json.

        `rope_theta` is its own field in older files and part of `rope_parameters` in newer ones.
        Raises InputError: not Gemma's decoder, a different activation, scaled rotary positions, or what only
        Gemma 2 has (a cap on the logits, a sliding window).
        """
        expect(values, "text_config", "model_type", "gemma")
        # transformers 5 reads hidden_act, earlier versions read hidden_activation: both must say the same.
        if values.get("hidden_act") not in (None, *TANH_GELU):
            raise InputError(
                f"text_config has hidden_act = {values['hidden_act']!r}; only the tanh form of GELU is "
                f"supported here ({', '.join(TANH_GELU)})"
            )
        for name in ("final_logit_softcapping", "sliding_window"):
            expect(values, "text_config", name, None)
        return cls(**known_decoder(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The `text_config` part of a config.json."""
        return {
            "model_type": "gemma",
            **asdict(self),
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }


class GemmaBlock(nn.Module):
    """Pre-norm block. `post_attention_layernorm` is the norm before the MLP; checkpoints call it that."""

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
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), mask, rotary, update_cache)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class GemmaDecoder(nn.Module):
    """The embedding table, the stack of blocks, and the head."""

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
    ) -> Tensor:
        """Run the blocks and the final norm.

        Args:
            inputs_embeds: [B, T, D], already scaled.
            position_ids: [B, T].
            mask: boolean [B, 1, T, S], True where a query may look; S = T without a cache.
            cache: stores keys and values; `cache.reserve` must have been called.

        Returns:
            Hidden states [B, T, D]; `logits` turns them into scores.
        """
        rotary = _rotary(position_ids, self.config, inputs_embeds.dtype)
        bias = additive(mask, inputs_embeds.dtype)
        x = inputs_embeds
        for number, layer in enumerate(self.layers):
            update_cache = partial(cache.write, number) if cache is not None else None
            x = layer(x, bias, rotary, update_cache)
        return self.norm(x)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D] -> a score for every token of the vocabulary [..., V]."""
        if self.lm_head is not None:
            return self.lm_head(hidden_states)
        return F.linear(hidden_states, self.embed_tokens.weight)


def _rotary(position_ids: Tensor, config: GemmaConfig, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    # Computed once for all layers.
    cos, sin = rotary_angles(position_ids, config.head_dim, config.rope_theta)
    return partial(apply_rotary, cos=cos.to(dtype), sin=sin.to(dtype))
