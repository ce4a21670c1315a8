"""Llama (https://arxiv.org/abs/2302.13971): a causal decoder from embeddings to next-token logits.

Differences from Gemma in `gemma.py`: RMSNorm multiplies by w instead of (1 + w), the gate of the MLP goes
through SiLU, embeddings are not scaled, the head has weights of its own unless the config ties it, and a head
is always hidden_size / heads wide. Vicuna, which LLaVA was built on, is a Llama tuned to converse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import Attention, additive
from minivlm.cache import KVCache
from minivlm.configs import check_heads, check_types, check_width, expect, known_decoder
from minivlm.errors import InputError
from minivlm.layers import LlamaRMSNorm, SwiGLU
from minivlm.rope import apply_rotary, rotary_angles


@dataclass(frozen=True)
class LlamaConfig:
    """Llama's decoder (https://arxiv.org/abs/2302.13971). The defaults are those of transformers: 7B."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_width(self.hidden_size, self.num_attention_heads)
        check_heads(self.num_attention_heads, self.num_key_value_heads, self.head_dim)

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlamaConfig:
        """From the `text_config` part of a config.json.

        Raises InputError: not Llama's decoder, another activation, biases, heads of another width, or scaled
        rotary positions.
        """
        for name, supported in {
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }.items():
            expect(values, "text_config", name, supported)
        found = known_decoder(cls, values)
        # A file without this number means as many keys as queries.
        found.setdefault("num_key_value_heads", found.get("num_attention_heads", cls.num_attention_heads))
        config = cls(**found)
        if values.get("head_dim") not in (None, config.head_dim):
            raise InputError(
                f"text_config has head_dim = {values['head_dim']!r}; only hidden_size / num_attention_heads, "
                f"here {config.head_dim}, is supported"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The `text_config` part of a config.json."""
        return {
            "model_type": "llama",
            **asdict(self),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }


class LlamaBlock(nn.Module):
    """Pre-norm block. `post_attention_layernorm` is the norm before the MLP; checkpoints call it that."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

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


class LlamaDecoder(nn.Module):
    """The embedding table, the stack of blocks, and the head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T] -> embeddings [B, T, D]."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        cache: KVCache | None = None,
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
        cos, sin = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        rotary = partial(apply_rotary, cos=cos.to(inputs_embeds.dtype), sin=sin.to(inputs_embeds.dtype))
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
