"""BERT (https://arxiv.org/abs/1810.04805): reads a text at once, and says which word a masked one was.

Differences from GPT-2 in `gpt2.py`: every token sees every other, so the words after it help as much as those
before it, and nothing is written from left to right. The norms come *after* the parts, on the residual path
itself, and the embeddings are normed, too, so there is no norm at the end. Each token has one of two types:
in a pair of texts, that of the first or of the second. GELU is the exact one. The head has a layer of its own
before the embedding table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import Attention, additive
from minivlm.configs import check_types, check_width, expect, known
from minivlm.layers import MLP


@dataclass(frozen=True)
class BertConfig:
    """BERT's encoder. The defaults are BERT base, with 110 million parameters."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        check_types(self)
        check_width(self.hidden_size, self.num_attention_heads)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BertConfig:
        """From a config.json. Raises InputError: another activation, or a head that is not tied."""
        expect(values, "config.json", "hidden_act", "gelu")
        expect(values, "config.json", "tie_word_embeddings", True)
        return cls(**known(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The encoder's part of a config.json. transformers would add dropout, which is not computed here."""
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return {**asdict(self), "hidden_act": "gelu", **dropout, "tie_word_embeddings": True}


class BertBlock(nn.Module):
    """Post-norm block: what goes on to the next block is normed, the residual path included."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config.hidden_size, config.num_attention_heads, bias=True)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, "gelu")
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        x = self.layer_norm1(x + self.self_attn(x, mask))
        x = self.layer_norm2(x + self.mlp(x))
        return x


class BertEncoder(nn.Module):
    """Three tables and a norm, the stack of blocks, and two heads: masked words, and the whole text."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, width)
        self.embed_types = nn.Embedding(config.type_vocab_size, width)
        for table in (self.embed_tokens, self.embed_positions, self.embed_types):
            nn.init.normal_(table.weight, std=0.02)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(BertBlock(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(width, width)
        self.transform = nn.Linear(width, width)
        self.transform_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def embed(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """Word + position + type, not normed yet: three times [B, T] -> [B, T, D]."""
        return (
            self.embed_tokens(input_ids)
            + self.embed_positions(position_ids)
            + self.embed_types(token_type_ids)
        )

    def forward(self, inputs_embeds: Tensor, mask: Tensor) -> Tensor:
        """Norm the embeddings and run the blocks.

        Args:
            inputs_embeds: [B, S, D].
            mask: boolean, broadcastable to [B, 1, S, S], True where a query may look.

        Returns:
            Hidden states [B, S, D]; `logits` and `pool` read them.
        """
        bias = additive(mask, inputs_embeds.dtype)
        x = self.norm(inputs_embeds)
        for layer in self.layers:
            x = layer(x, bias)
        return x

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D] -> a score for every word that may have been there [..., V]."""
        x = self.transform_norm(F.gelu(self.transform(hidden_states)))
        return F.linear(x, self.embed_tokens.weight, self.bias)

    def pool(self, first: Tensor) -> Tensor:
        """The hidden state of a text's first token [B, D] -> what stands for the whole text [B, D]."""
        return torch.tanh(self.pooler(first))
