"""The parts that all models here are made of, besides attention: norms, MLPs, the pre-norm encoder block.

ViT, CLIP and SigLIP use the same block, except for the activation between the two linear layers of its MLP.
config.json names it as `hidden_act`. The three activations are similar, and a model with the wrong one still
gives sensible answers, but worse ones: always use the one in the file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import Attention


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), CLIP's cheaper GELU; up to 0.02 away from the exact one."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,  # CLIP as OpenAI trained it
    "gelu": F.gelu,  # exact, with the error function: ViT in transformers, CLIP as retrained by others
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),  # SigLIP
}


class MLP(nn.Module):
    """Two linear layers with an activation between them, by default GELU (https://arxiv.org/abs/1606.08415)."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, hidden_act: str = "gelu_pytorch_tanh"
    ) -> None:
        super().__init__()
        self.hidden_act = hidden_act
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x)))


class GatedMLP(nn.Module):
    """GeGLU (https://arxiv.org/abs/2002.05202): one projection, through GELU, gates another."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class SwiGLU(nn.Module):
    """The same with SiLU as the gate (https://arxiv.org/abs/2002.05202), as in Llama and Qwen."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """Root-mean-square norm (https://arxiv.org/abs/1910.07467) in Gemma's convention.

    The stored weight w stands for a factor of (1 + w), so zero weights are the identity. The product is
    rounded to the dtype of x only at the end.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return (_unit_rms(x, self.eps) * (1 + self.weight.float())).to(x.dtype)


class LlamaRMSNorm(nn.Module):
    """The same norm in the convention of Llama and Qwen: a factor of w, applied after rounding."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.weight * _unit_rms(x, self.eps).to(x.dtype)


def _unit_rms(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


class EncoderConfig(Protocol):
    """What a block reads from the config of its tower."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def hidden_act(self) -> str: ...


class EncoderBlock(nn.Module):
    """Pre-norm transformer block with LayerNorm, as in ViT, CLIP and SigLIP.

    There is a norm before each part, and the residual path is never normalized, so a signal can pass from the
    first block to the last unchanged (https://arxiv.org/abs/2002.04745).
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config.hidden_size, config.num_attention_heads, bias=True)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        x = x + self.mlp(self.layer_norm2(x))
        return x
