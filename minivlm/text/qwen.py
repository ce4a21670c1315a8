"""Qwen-7B (https://arxiv.org/abs/2309.16609): the decoder of Qwen-VL, which reads past the length it learned.

Differences from Llama in `llama.py`: queries, keys and values have biases, and two rules apply to rows longer
than those of training, S = `seq_length` tokens. Neither has weights, and neither is used in training.

- Dynamic NTK: rotary angles turn more slowly, so that far positions look like nearer ones. The base is
  multiplied by a power of alpha = 2^ceil(log2(T / S) + 1) - 1 for a prompt of T tokens: 1 up to S, 3 up to
  2 S, 7 up to 4 S. An answer keeps the alpha of its prompt, as its keys are in the cache, already turned.
- Log-n scaling: over more keys a softmax spreads wider. The query of token i, counted from 1, is multiplied
  by log_S(i) beyond S, which keeps it as sharp as it was.

So one row gives the same numbers all at once and token by token as long as both have the same alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.attention import Attention, additive, attend
from minivlm.cache import KVCache
from minivlm.configs import check_heads, check_types, check_width, expect, known
from minivlm.errors import InputError
from minivlm.layers import LlamaRMSNorm, SwiGLU
from minivlm.rope import apply_rotary


@dataclass(frozen=True)
class QwenConfig:
    """Qwen's decoder (https://arxiv.org/abs/2309.16609). The defaults are those of Qwen-VL: 7B."""

    hidden_size: int = 4096
    intermediate_size: int = 22016  # of gate and value together: the MLP is half as wide
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    vocab_size: int = 151936
    max_position_embeddings: int = 8192
    seq_length: int = 2048  # of training: beyond it, the two rules apply
    layer_norm_epsilon: float = 1e-6
    rotary_emb_base: float = 10000.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        check_width(self.hidden_size, self.num_attention_heads)
        check_heads(self.num_attention_heads, self.num_attention_heads, self.head_dim)
        for name, least in {"head_dim": 4, "seq_length": 2}.items():  # both end up under a fraction line
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}, expected {least} or more")

    @property
    def num_key_value_heads(self) -> int:
        """Every head has keys and values of its own."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QwenConfig:
        """From a whole config.json. Raises InputError: an option that is not supported here."""
        for name, supported in {
            "no_bias": True,
            "rotary_pct": 1.0,
            "scale_attn_weights": True,
            "tie_word_embeddings": False,
        }.items():
            expect(values, "config.json", name, supported)
        config = cls(**known(cls, values))
        expect(values, "config.json", "kv_channels", config.head_dim)
        return config

    def to_dict(self) -> dict[str, Any]:
        """What a config.json says of the decoder."""
        return {
            **asdict(self),
            "kv_channels": self.head_dim,
            "no_bias": True,
            "rotary_pct": 1.0,
            "scale_attn_weights": True,
            "tie_word_embeddings": False,
        }


class QwenCache(KVCache):
    """Also keeps how far each row's angles were stretched for its prompt."""

    of_each_row = ("ntk_alpha",)
    ntk_alpha: Tensor | None = None  # [B]; None: nothing is read yet

    def reset(self) -> None:
        """Forget all tokens and the prompts' lengths."""
        super().reset()
        self.ntk_alpha = None


def ntk_alpha(lengths: Tensor, seq_length: int) -> Tensor:
    """How far to stretch the angles of prompts of these lengths [B], see above: [B]."""
    doublings = torch.log2(lengths / seq_length)
    return (2 ** torch.ceil(doublings + 1) - 1).clamp(min=1)


def stretched_angles(
    position_ids: Tensor, head_dim: int, theta: float, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """`minivlm.rope.rotary_angles`, with a base of its own for each row.

    Args:
        position_ids: [B, T].
        alpha: [B], from `ntk_alpha`.

    Returns:
        cos, sin: [B, 1, T, Dh] in fp32.
    """
    # With this power of alpha, the slowest pair turns 1 / alpha as far, and the fastest as far as ever.
    bases = theta * alpha ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angles = position_ids[:, None, :, None].float() * bases[:, None, None, None] ** -exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def logn_scale(position_ids: Tensor, seq_length: int) -> Tensor:
    """What to multiply the queries at these positions [B, T] by, see above: [B, 1, T, 1]."""
    scale = torch.log(position_ids + 1) / math.log(seq_length)
    return scale.clamp(min=1)[:, None, :, None]


class QwenAttention(Attention):
    """Biases everywhere but at the end, and queries that may grow with their position."""

    def __init__(self, hidden_size: int, num_attention_heads: int) -> None:
        super().__init__(hidden_size, num_attention_heads, bias=True)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rotary: Callable[[Tensor], Tensor] | None = None,
        update_cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        query_scale: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, D], query_scale [B, 1, T, 1] -> [B, T, D]."""
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        if query_scale is not None:
            q = q * query_scale
        if update_cache is not None:
            k, v = update_cache(k, v)
        out = attend(q, k, v, mask, self.scale)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, H, T, Dh] -> [B, T, D]


class QwenBlock(nn.Module):
    """Pre-norm block. The parts have Llama's names."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.self_attn = QwenAttention(config.hidden_size, config.num_attention_heads)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size // 2)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        rotary: Callable[[Tensor], Tensor],
        update_cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        query_scale: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), mask, rotary, update_cache, query_scale)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class QwenDecoder(nn.Module):
    """The embedding table, the stack of blocks, and the head."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(QwenBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T] -> embeddings [B, T, D]."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        cache: QwenCache | None = None,
    ) -> Tensor:
        """Run the blocks and the final norm.

        Args:
            inputs_embeds: [B, T, D].
            position_ids: [B, T].
            mask: boolean [B, 1, T, S], True where a query may look; S = T without a cache.
            cache: stores keys and values; `cache.reserve` must have been called.

        Returns:
            Hidden states [B, T, D]; `logits` turns them into scores.
        """
        alpha = self._ntk_alpha(position_ids, cache)
        cos, sin = stretched_angles(position_ids, self.config.head_dim, self.config.rotary_emb_base, alpha)
        rotary = partial(apply_rotary, cos=cos.to(inputs_embeds.dtype), sin=sin.to(inputs_embeds.dtype))
        query_scale = None
        if self.config.use_logn_attn and not self.training:
            query_scale = logn_scale(position_ids, self.config.seq_length).to(inputs_embeds.dtype)
        bias = additive(mask, inputs_embeds.dtype)
        x = inputs_embeds
        for number, layer in enumerate(self.layers):
            update_cache = partial(cache.write, number) if cache is not None else None
            x = layer(x, bias, rotary, update_cache, query_scale)
        return self.norm(x)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D] -> a score for every token of the vocabulary [..., V]."""
        return self.lm_head(hidden_states)

    def _ntk_alpha(self, position_ids: Tensor, cache: QwenCache | None) -> Tensor:
        """Of each row, [B]. A cache remembers it from the first call, which reads the prompt."""
        if cache is not None and cache.ntk_alpha is not None:
            return cache.ntk_alpha
        alpha = torch.ones(len(position_ids), device=position_ids.device)
        if self.config.use_dynamic_ntk and not self.training:
            alpha = ntk_alpha(position_ids.amax(dim=1) + 1, self.config.seq_length)
        if cache is not None:
            cache.ntk_alpha = alpha
        return alpha
