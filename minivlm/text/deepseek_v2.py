"""DeepSeek-V2 (https://arxiv.org/abs/2405.04434) as the decoder of DeepSeek-VL2.

Differences from Llama in `llama.py`: attention is latent (mla.py), and from some layer on, each MLP is a
mixture of experts (moe.py). The first layers stay dense, since a gate finds little to tell tokens apart by in
what are hardly more than embeddings. The smallest model, deepseek-vl2-tiny, has experts, and attention as
Llama's: `use_mla` is false there, and `mla` None here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import Attention, additive
from minivlm.cache import KVCache
from minivlm.configs import check_heads, check_types, check_width, expect, known, part_of
from minivlm.errors import InputError
from minivlm.layers import LlamaRMSNorm, SwiGLU
from minivlm.rope import apply_rotary, rotary_angles
from minivlm.text.mla import LatentAttention, LatentCache, MLAConfig, rotate_neighbors
from minivlm.text.moe import MixtureOfExperts, MoEConfig
from minivlm.text.yarn_rope import YarnScaling, yarn_angles


@dataclass(frozen=True)
class DeepseekV2Config:
    """The defaults are those of DeepSeek's own program, in which no layer has experts."""

    hidden_size: int = 4096
    intermediate_size: int = 11008  # of layers without experts
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int = 32  # of attention as Llama's; latent attention has none
    vocab_size: int = 102400
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    first_k_dense_replace: int = 0  # so many layers have no experts
    tie_word_embeddings: bool = False
    rope_scaling: YarnScaling | None = None
    mla: MLAConfig | None = field(default_factory=MLAConfig)
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.mla is None:
            check_width(self.hidden_size, self.num_attention_heads)
            check_heads(self.num_attention_heads, self.num_key_value_heads, self.head_dim)
            if self.rope_scaling is not None:
                raise InputError(
                    "language_config has use_mla = False and a rope_scaling: positions for a longer context "
                    "are supported here only with latent attention"
                )

    @property
    def head_dim(self) -> int:
        """The width of a head of attention as Llama's."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """How much of a head's query is rotated."""
        return self.head_dim if self.mla is None else self.mla.qk_rope_head_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeepseekV2Config:
        """From the `language_config` part of a config.json.

        Raises InputError: another activation, biases, experts in some layers only, positions that are scaled
        in another way; as `MLAConfig` and `MoEConfig`.
        """
        for name, supported in {
            "model_type": "deepseek_v2",
            "hidden_act": "silu",
            "attention_bias": False,
            "moe_layer_freq": 1,
        }.items():
            expect(values, "language_config", name, supported)
        found = known(cls, {**values, "rope_scaling": None, "mla": None, "moe": None})
        if values.get("num_key_value_heads", 0) is None:
            found["num_key_value_heads"] = found.get("num_attention_heads", cls.num_attention_heads)
        return cls(
            **found,
            rope_scaling=YarnScaling.from_dict(part_of(values, "rope_scaling")),
            mla=MLAConfig.from_dict(values) if values.get("use_mla", True) else None,
            moe=None if values.get("n_routed_experts") is None else MoEConfig.from_dict(values),
        )

    def to_dict(self) -> dict[str, Any]:
        """The `language_config` part of a config.json."""
        values = asdict(self)
        for name in ("rope_scaling", "mla", "moe"):
            del values[name]
        return {
            "model_type": "deepseek_v2",
            "architectures": ["DeepseekV2ForCausalLM"],
            **values,
            "hidden_act": "silu",
            "use_mla": self.mla is not None,
            "rope_scaling": None if self.rope_scaling is None else self.rope_scaling.to_dict(),
            **({} if self.mla is None else self.mla.to_dict()),
            **({} if self.moe is None else self.moe.to_dict()),
        }


class DeepseekV2Block(nn.Module):
    """Pre-norm block. `post_attention_layernorm` is the norm before the MLP; checkpoints call it that."""

    def __init__(self, config: DeepseekV2Config, number: int) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.input_layernorm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.self_attn: nn.Module
        if config.mla is None:
            self.self_attn = Attention(width, heads, config.num_key_value_heads)
        else:
            factor = 1.0 if config.rope_scaling is None else config.rope_scaling.score_factor
            self.self_attn = LatentAttention(config.mla, width, heads, factor)
        self.post_attention_layernorm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.mlp: nn.Module
        if config.moe is None or number < config.first_k_dense_replace:
            self.mlp = SwiGLU(width, config.intermediate_size)
        else:
            self.mlp = MixtureOfExperts(config.moe, width)

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


class DeepseekV2Decoder(nn.Module):
    """The embedding table, the stack of blocks, and the head."""

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(
            DeepseekV2Block(config, number) for number in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T] -> embeddings [B, T, D]."""
        return self.embed_tokens(input_ids)

    def new_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """An empty cache of the kind that this decoder's attention fills."""
        config = self.config
        if config.mla is None:
            heads = config.num_key_value_heads, config.head_dim
            return KVCache(config.num_hidden_layers, batch_size, *heads, dtype=dtype, device=device)
        width = config.mla.kv_lora_rank + config.mla.qk_rope_head_dim
        return LatentCache(config.num_hidden_layers, batch_size, width, dtype=dtype, device=device)

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
            cache: of `new_cache`; `cache.reserve` must have been called.

        Returns:
            Hidden states [B, T, D]; `logits` turns them into scores.
        """
        rotary, bias = self._rotary(position_ids), additive(mask, inputs_embeds.dtype)
        x = inputs_embeds
        for number, layer in enumerate(self.layers):
            update_cache = partial(cache.write, number) if cache is not None else None
            x = layer(x, bias, rotary, update_cache)
        return self.norm(x)

    def _rotary(self, position_ids: Tensor) -> Callable[[Tensor], Tensor]:
        """Rotates queries and keys: pairs of neighbors in latent attention, of halves otherwise."""
        config = self.config
        width, theta = config.rotary_dim, config.rope_theta
        if config.rope_scaling is None:
            cos, sin = rotary_angles(position_ids, width, theta)
        else:
            cos, sin = yarn_angles(position_ids, width, theta, config.rope_scaling)
        return partial(apply_rotary if config.mla is None else rotate_neighbors, cos=cos, sin=sin)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D] -> a score for every token of the vocabulary [..., V]."""
        if self.lm_head is not None:
            return self.lm_head(hidden_states)
        return F.linear(hidden_states, self.embed_tokens.weight)
