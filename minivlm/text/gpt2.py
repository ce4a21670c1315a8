"""GPT-2 (https://openai.com/research/better-language-models): a causal decoder with learned positions.

Differences from Llama in `llama.py`: a position is a row of a second table, added once to the embeddings, and
not a rotation in every layer, so nothing can be read past the last row; LayerNorm with biases; one MLP with
the tanh form of GELU instead of a gated one; the head is the embedding table. ClipCap and VisualGPT put
pictures into this decoder.
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
from minivlm.configs import check_types, check_width, known
from minivlm.layers import MLP


@dataclass(frozen=True)
class GPT2Config:
    """GPT-2's decoder. The defaults are GPT-2 small, with 124 million parameters."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    vocab_size: int = 50257
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_types(self)
        check_width(self.hidden_size, self.num_attention_heads)

    @property
    def num_key_value_heads(self) -> int:
        """Every head has keys and values of its own."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPT2Config:
        """From the `text_config` part of a config.json."""
        return cls(**known(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The `text_config` part of a config.json."""
        return {"model_type": "gpt2", **asdict(self)}


class GPT2Block(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config.hidden_size, config.num_attention_heads, bias=True)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        update_cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        x = x + self.attn(self.ln_1(x), mask, update_cache=update_cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT2Decoder(nn.Module):
    """Two tables, the stack of blocks, and the final norm."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        for table in (self.embed_tokens, self.embed_positions):
            nn.init.normal_(table.weight, std=0.02)
        self.layers = nn.ModuleList(GPT2Block(config) for _ in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head: nn.Linear | None = None  # the table scores, too

    def embed(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T] -> embeddings [B, T, D], without positions."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Add the positions, run the blocks and the final norm.

        Args:
            inputs_embeds: [B, T, D].
            position_ids: [B, T].
            mask: boolean [B, 1, T, S], True where a query may look; S = T without a cache.
            cache: stores keys and values; `cache.reserve` must have been called.

        Returns:
            Hidden states [B, T, D]; `logits` turns them into scores.
        """
        bias = additive(mask, inputs_embeds.dtype)
        x = inputs_embeds + self.embed_positions(position_ids)
        for number, layer in enumerate(self.layers):
            x = layer(x, bias, partial(cache.write, number) if cache is not None else None)
        return self.ln_f(x)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D] -> a score for every token of the vocabulary [..., V]."""
        if self.lm_head is not None:
            return self.lm_head(hidden_states)
        return F.linear(hidden_states, self.embed_tokens.weight)
