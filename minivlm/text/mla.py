"""Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1).

Keys and values of all heads are made of one short vector for each token, its latent. That is all the cache
keeps, beside the part of the key that says where the token stands, which all heads share:

    token ─┬─> latent c, normed ─┬─> W_k ─> key of each head, what it is about ──┐
           │                     └─> W_v ─> value of each head                   ├─> attention
           ├─> rotated key, one for all heads ───────────────────────────────────┤
           └─> query of each head: what it asks for, and a rotated part ─────────┘

A rotation between W_k and a query would keep the two from being joined, so position has channels of its own.
Then the same scores can be had in two ways:

    expanded   q . (W_k c): keys and values of every head, then attention as ever; cheaper for a prompt
    absorbed   (W_k^T q) . c: queries come to the latents, and W_v is applied to their sum; cheaper for a few
               queries. All heads share one key, the latent and the rotated key, and it is the value, too

The rotated pairs are neighbors, as in the paper of rotary positions, not the halves of rope.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import attend
from minivlm.cache import KVCache
from minivlm.configs import check_types, expect, known
from minivlm.errors import InputError
from minivlm.layers import LlamaRMSNorm
from minivlm.rope import apply_rotary


@dataclass(frozen=True)
class MLAConfig:
    """The defaults are those of DeepSeek's own program."""

    kv_lora_rank: int = 512  # numbers of a latent
    q_lora_rank: int | None = 1536  # queries have a latent, too, which is not cached; None: they have none
    qk_nope_head_dim: int = 128  # of a head's query and key, the part without position
    qk_rope_head_dim: int = 64  # and the rotated part
    v_head_dim: int = 128

    def __post_init__(self) -> None:
        check_types(self)
        if self.qk_rope_head_dim % 2:
            raise InputError(
                f"qk_rope_head_dim is {self.qk_rope_head_dim}, but rotary positions rotate pairs: choose an "
                "even one"
            )
        if self.v_head_dim > self.qk_head_dim:
            raise InputError(
                f"v_head_dim is {self.v_head_dim}; only values up to the width of a query, here "
                f"{self.qk_head_dim}, are supported here"
            )

    @property
    def qk_head_dim(self) -> int:
        """The width of a head's query, and of its key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MLAConfig:
        """From a decoder's part of a config.json. Raises InputError: projections with biases."""
        expect(values, "language_config", "attention_bias", False)
        without = {"q_lora_rank": None} if values.get("q_lora_rank", cls.q_lora_rank) is None else {}
        return cls(**known(cls, values) | without)

    def to_dict(self) -> dict[str, Any]:
        """The other way around."""
        return asdict(self)


class LatentCache(KVCache):
    """Keeps one vector for each token and layer: its latent, and behind it the rotated key.

    The values are its first part, so those of the cache have no width.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(num_layers, batch_size, 1, width, dtype=dtype, device=device)
        self.values = [keys[..., :0] for keys in self.keys]


def bytes_per_token(cache: KVCache) -> int:
    """What a cache of any kind keeps of one token, in all layers."""
    stores = [*cache.keys, *cache.values]
    return sum(store.shape[1] * store.shape[3] * store.element_size() for store in stores)


def rotate_neighbors(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary` for pairs (2i, 2i + 1): x [B, H, T, Dh], angles as of `rotary_angles`.

    The result has the first of all pairs, then the second. Queries and keys are reordered alike, which
    changes no score.
    """
    return apply_rotary(torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1), cos, sin)


class FromLatents(nn.Module):
    """W_k and W_v of all heads. No linear layer: when they are absorbed, latents never pass through."""

    def __init__(self, config: MLAConfig, num_attention_heads: int) -> None:
        super().__init__()
        self.widths = config.qk_nope_head_dim, config.v_head_dim
        rows = num_attention_heads * sum(self.widths)
        self.weight = nn.Parameter(torch.empty(rows, config.kv_lora_rank))
        nn.init.normal_(self.weight, std=config.kv_lora_rank**-0.5)

    def by_head(self) -> tuple[Tensor, Tensor]:
        """W_k [H, Dn, R] and W_v [H, Dv, R]."""
        w_k, w_v = self.weight.unflatten(0, (-1, sum(self.widths))).split(self.widths, dim=1)
        return w_k, w_v

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents [B, S, R] -> keys [B, H, S, Dn] and values [B, H, S, Dv]."""
        both = F.linear(latents, self.weight).unflatten(-1, (-1, sum(self.widths))).transpose(1, 2)
        keys, values = both.split(self.widths, dim=-1)
        return keys, values


class LatentAttention(nn.Module):
    """Called as `minivlm.attention.Attention`.

    In shapes, R is the width of a latent, Dn that of a query without position, Dr that of its rotated part,
    Dv that of a value.

    Args:
        score_factor: of a longer context, see yarn_rope.py.
    """

    def __init__(
        self, config: MLAConfig, hidden_size: int, num_attention_heads: int, score_factor: float = 1.0
    ) -> None:
        super().__init__()
        self.config = config
        self.scale = config.qk_head_dim**-0.5 * score_factor
        queries = num_attention_heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, config.q_lora_rank, bias=False)
            self.q_a_layernorm = LlamaRMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, queries, bias=False)
        # One matrix for the latent and for the key that is rotated.
        kept = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, kept, bias=False)
        self.kv_a_layernorm = LlamaRMSNorm(config.kv_lora_rank)  # its eps is 1e-6 whatever config.json says
        self.kv_b_proj = FromLatents(config, num_attention_heads)
        self.o_proj = nn.Linear(num_attention_heads * config.v_head_dim, hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        rotary: Callable[[Tensor], Tensor],
        update_cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]; the cache is a `LatentCache`."""
        q, kept = self.queries(x, rotary), self.to_keep(x, rotary)
        if update_cache is not None:
            kept, _ = update_cache(kept, kept[..., :0])
        out = (self.expanded if self.expanding_is_cheaper(q, kept) else self.absorbed)(q, kept, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, H, T, Dv] -> [B, T, D]

    def queries(self, x: Tensor, rotary: Callable[[Tensor], Tensor]) -> Tensor:
        """x [B, T, D] -> [B, H, T, Dn + Dr]."""
        if self.config.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (-1, self.config.qk_head_dim)).transpose(1, 2)
        q_nope, q_rope = q.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], dim=-1)
        return torch.cat([q_nope, rotary(q_rope)], dim=-1)

    def to_keep(self, x: Tensor, rotary: Callable[[Tensor], Tensor]) -> Tensor:
        """What later queries need of each token: x [B, T, D] -> latent and rotated key [B, 1, T, R + Dr]."""
        latent, k_rope = self._parts(self.kv_a_proj_with_mqa(x)[:, None])
        return torch.cat([self.kv_a_layernorm(latent), rotary(k_rope)], dim=-1)

    def expanded(self, q: Tensor, kept: Tensor, mask: Tensor | None) -> Tensor:
        """Keys and values of every head: [B, H, T, Dn + Dr], [B, 1, S, R + Dr] -> [B, H, T, Dv]."""
        latent, k_rope = self._parts(kept)
        k_nope, v = self.kv_b_proj(latent[:, 0])
        k = torch.cat([k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)], dim=-1)
        width = v.shape[-1]
        v = F.pad(v, (0, k.shape[-1] - width))  # fused attention wants keys and values of one width
        return attend(q, k, v, mask, self.scale)[..., :width]

    def absorbed(self, q: Tensor, kept: Tensor, mask: Tensor | None) -> Tensor:
        """The same with a single key for all heads, which is its value as well."""
        w_k, w_v = self.kv_b_proj.by_head()
        q_nope, q_rope = q.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], dim=-1)
        q = torch.cat([q_nope @ w_k, q_rope], dim=-1)  # [B, H, T, R + Dr]
        latent, _ = self._parts(attend(q, kept, kept, mask, self.scale))
        return latent @ w_v.mT

    def expanding_is_cheaper(self, q: Tensor, kept: Tensor) -> bool:
        """Whether the first form multiplies less, for T queries and S keys: for prompts, not for words."""
        config, queries, keys = self.config, q.shape[2], kept.shape[2]
        matrices = config.kv_lora_rank * (
            config.qk_nope_head_dim + config.v_head_dim
        )  # W_k and W_v of a head
        expanded = keys * matrices + queries * keys * (config.qk_head_dim + config.v_head_dim)
        absorbed = queries * matrices + queries * keys * 2 * kept.shape[-1]
        return expanded < absorbed

    def _parts(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """[..., R + Dr] -> [..., R] and [..., Dr]."""
        latent, rotated = kept.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1)
        return latent, rotated
