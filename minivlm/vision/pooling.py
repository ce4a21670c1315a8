"""SigLIP's pooling head: one vector per picture by attention ("MAP head", https://arxiv.org/abs/2106.04560).

Instead of a class token that passes through all blocks, one learned query, the probe, looks at the patches
once, after the last block. Note that the residual sum starts after attention, so the probe itself is not
part of the result.

The query, key and value weights form one matrix [3 D, D], as in `nn.MultiheadAttention` and in every SigLIP
file. They are stored that way and split where they are used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import attend
from minivlm.layers import MLP


class ProbeAttention(nn.Module):
    """Multi-head attention from a few queries to many tokens; parameters as in `nn.MultiheadAttention`."""

    def __init__(self, hidden_size: int, num_attention_heads: int) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_attention_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """queries [B, T, D], tokens [B, N, D] -> [B, T, D]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for x, weight, bias in zip((queries, tokens, tokens), weights, biases, strict=True)
        )  # [B, H, T or N, Dh]
        out = attend(q, k, v, mask=None, scale=self.head_dim**-0.5)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # [B, H, T, Dh] -> [B, T, D]


class AttentionPoolingHead(nn.Module):
    """All patches of a picture -> one vector.

    >>> AttentionPoolingHead(768, 3072, 12)(torch.randn(2, 196, 768)).shape
    torch.Size([2, 768])
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_attention_heads: int, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, hidden_size) * hidden_size**-0.5)
        self.attention = ProbeAttention(hidden_size, num_attention_heads)
        self.layernorm = nn.LayerNorm(hidden_size, eps=eps)
        self.mlp = MLP(hidden_size, intermediate_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, D], after the tower's last norm -> [B, D]."""
        x = self.attention(self.probe.expand(len(tokens), -1, -1), tokens)  # [B, 1, D]
        x = x + self.mlp(self.layernorm(x))
        return x[:, 0]
