"""Qwen2 (https://arxiv.org/abs/2407.10671) as the decoder of Qwen2-VL (https://arxiv.org/abs/2409.12191).

Differences from Llama in `llama.py`: queries, keys and values have biases, and a token's position is three
numbers: when it is shown, in which row and in which column of the picture. For words, all three are equal.

    pairs of a head, fast to slow    0 ......... 15 16 .................. 39 40 .................. 63
    turned by the position in        time           rows                     columns

So a head of 128 numbers keeps its 64 frequencies and divides them: `mrope_section` is (16, 24, 24). A text
without pictures is read exactly as with one number for each position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import Attention, additive
from minivlm.cache import KVCache
from minivlm.configs import check_heads, check_types, check_width, expect, known_decoder, part_of
from minivlm.errors import InputError
from minivlm.layers import LlamaRMSNorm, SwiGLU
from minivlm.rope import apply_rotary


@dataclass(frozen=True)
class Qwen2Config:
    """Qwen2's decoder in Qwen2-VL. The defaults are those of transformers: 72B."""

    hidden_size: int = 8192
    intermediate_size: int = 29568
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    vocab_size: int = 152064
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)  # pairs of a head for time, rows and columns
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_width(self.hidden_size, self.num_attention_heads)
        check_heads(self.num_attention_heads, self.num_key_value_heads, self.head_dim)
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
            raise InputError(
                f"mrope_section is {list(self.mrope_section)}: expected three numbers whose sum is half of a "
                f"head's width, here {self.head_dim // 2}"
            )

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Qwen2Config:
        """From the `text_config` part of a config.json, or from the whole of a published one.

        Raises InputError: another activation, a sliding window, or scaled rotary positions.
        """
        expect(values, "text_config", "hidden_act", "silu")
        expect(values, "text_config", "use_sliding_window", False)
        name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
        rope = dict(part_of(values, name))
        sections = rope.pop("mrope_section", cls.mrope_section)
        for key in ("type", "rope_type"):  # "mrope" says no more than that there are sections
            if rope.get(key) == "mrope":
                del rope[key]
        found = known_decoder(cls, {**values, name: rope, "mrope_section": tuple(sections)})
        found.setdefault("num_key_value_heads", cls.num_key_value_heads)
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """The `text_config` part of a config.json."""
        values = asdict(self)
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        return {
            **values,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "rope_parameters": {**rope, "mrope_section": list(values.pop("mrope_section"))},
        }


def multimodal_angles(
    position_ids: Tensor, head_dim: int, sections: Sequence[int], theta: float
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, as `minivlm.rope.rotary_angles`, for positions in three axes.

    Args:
        position_ids: [3, B, T], time, rows and columns.
        sections: how many of the Dh / 2 frequencies belong to each axis, from the fastest on.

    Returns:
        cos, sin: [B, 1, T, Dh] in fp32.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angles = position_ids[..., None].float() * theta**-exponents  # [3, B, T, Dh / 2]
    parts = angles.split(list(sections), dim=-1)
    angles = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)[:, None]
    angles = torch.cat([angles, angles], dim=-1)  # [B, 1, T, Dh]
    return angles.cos(), angles.sin()


class Qwen2Attention(Attention):
    """With biases on queries, keys and values, and none on the output."""

    def __init__(self, hidden_size: int, num_attention_heads: int, num_key_value_heads: int) -> None:
        super().__init__(hidden_size, num_attention_heads, num_key_value_heads, bias=True)
        self.o_proj = nn.Linear(num_attention_heads * self.head_dim, hidden_size, bias=False)


class Qwen2Block(nn.Module):
    """Pre-norm block. `post_attention_layernorm` is the norm before the MLP; checkpoints call it that."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        heads = config.num_attention_heads, config.num_key_value_heads
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Qwen2Attention(config.hidden_size, *heads)
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


class Qwen2Decoder(nn.Module):
    """The embedding table, the stack of blocks, and the head."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Qwen2Block(config) for _ in range(config.num_hidden_layers))
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
            position_ids: [3, B, T], time, rows and columns.
            mask: boolean [B, 1, T, S], True where a query may look; S = T without a cache.
            cache: stores keys and values; `cache.reserve` must have been called.

        Returns:
            Hidden states [B, T, D]; `logits` turns them into scores.
        """
        config = self.config
        cos, sin = multimodal_angles(position_ids, config.head_dim, config.mrope_section, config.rope_theta)
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
