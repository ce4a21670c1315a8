"""Gemma 2 (https://arxiv.org/abs/2408.00118): the decoder of PaliGemma 2.

Differences from Gemma in `minivlm.text.gemma`:

- attention scores and the final logits are *soft-capped*: cap * tanh(score / cap) stays within +-cap, and
  is close to the score itself while that is small;
- every second layer, starting with the first, has a *sliding window*: it sees only the last 4096 positions;
- queries are scaled by query_pre_attn_scalar ** -0.5, which equals head_dim ** -0.5 only in some sizes;
- attention and MLP have a norm before and a norm after them. So `post_attention_layernorm` is a different
  norm than in Gemma, where the same name means the norm before the MLP.

Embeddings, rotary positions, the gated MLP and the (1 + w) norm are the same as in Gemma.

PaliGemma 2 was trained with these caps except in the last stage, fine-tuning on a single task (section 3 of
https://arxiv.org/abs/2412.03555). Each folder's config.json gives the caps of its weights; null means no cap.
The original code, in big_vision, leaves the cap of the final logits out of the training loss and of the first
token of an answer. This file follows transformers, which always applies it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm import masks
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


@dataclass(frozen=True)
class Gemma2Config:
    """Gemma 2's decoder (https://arxiv.org/abs/2408.00118). The defaults are those of paligemma2-3b."""

    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    vocab_size: int = 257216
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    query_pre_attn_scalar: int = 256  # queries are multiplied by this ** -0.5
    sliding_window: int = 4096  # positions, in every second layer from the first
    attn_logit_softcapping: float | None = 50.0  # None: no cap
    final_logit_softcapping: float | None = 30.0

    def __post_init__(self) -> None:
        check_types(self)
        check_heads(self.num_attention_heads, self.num_key_value_heads, self.head_dim)
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            cap = getattr(self, name)
            if cap is not None and cap <= 0:
                raise InputError(f"{name} is {cap}: expected a number above 0, or null for no cap")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Gemma2Config:
        """From the `text_config` part of a config.json.

        Raises InputError: not Gemma 2's decoder, a different activation, scaled rotary positions, no sliding
        window, or a different pattern of layers with and without one.
        """
        expect(values, "text_config", "model_type", "gemma2")
        known = known_decoder(cls, values)
        for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
            if cap in values:
                known[cap] = values[cap]  # here null is a value: no cap
        if "sliding_window" in values and values["sliding_window"] is None:
            raise InputError("text_config has sliding_window = null; only Gemma 2 with a window is supported")
        config = cls(**known)
        if values.get("layer_types") is not None:
            expect(values, "text_config", "layer_types", config.layer_types)
        return config

    @property
    def layer_types(self) -> list[str]:
        """Which layers have a window: every second one, starting with the first."""
        kinds = ("sliding_attention", "full_attention")
        return [kinds[number % 2] for number in range(self.num_hidden_layers)]

    def to_dict(self) -> dict[str, Any]:
        """The `text_config` part of a config.json."""
        return {
            "model_type": "gemma2",
            **asdict(self),
            "layer_types": self.layer_types,
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }


def narrow(mask: Tensor, query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """The mask of a layer with a sliding window: [B, 1, T, S] -> [B, 1, T, S].

    The window limits how far back a token looks. The prefix of a prefix-LM mask is exempt, however long it
    is: all of its tokens see each other, in both directions. With a prefix of 3, a suffix of 3 and a window
    of 2:

        1 1 1 0 0 0
        1 1 1 0 0 0
        1 1 1 0 0 0
        0 0 1 1 0 0
        0 0 0 1 1 0
        0 0 0 0 1 1

    This is how transformers computes PaliGemma 2: the causal sliding mask *or* "both in the prefix". The
    original code, in big_vision, has no window at all. The two agree up to 4096 tokens and differ for
    pictures of 896 x 896 pixels, whose 4096 image tokens are followed by the prompt. This file follows
    transformers.

    Args:
        mask: boolean, causal or prefix-LM, with or without padding.
        query_positions, key_positions: [B, T] and [B, S].
        window: how many positions a token sees, including its own.
    """
    queries, keys = query_positions[:, None, :, None], key_positions[:, None, None, :]
    # Only the prefix looks ahead, so the last token seen by an earlier one is the last of the prefix.
    seen_from_before = (mask & (keys > queries)).any(dim=-2, keepdim=True)  # [B, 1, 1, S]
    prefix_lengths = keys.where(seen_from_before, -1).amax(dim=-1, keepdim=True) + 1  # [B, 1, 1, 1]
    both_in_prefix = (queries < prefix_lengths) & (keys < prefix_lengths)
    near = masks.sliding(query_positions, key_positions, window)[:, None]
    return mask & (near | both_in_prefix)


class Gemma2Attention(Attention):
    """Grouped-query attention with soft-capped scores and its own scale."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_logit_softcapping


class Gemma2Block(nn.Module):
    """A block with a norm before and after each part; the residual path itself is never normalized."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Gemma2Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        rotary: Callable[[Tensor], Tensor],
        update_cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        attended = self.self_attn(self.input_layernorm(x), mask, rotary, update_cache)
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x


class Gemma2Decoder(nn.Module):
    """The embedding table, the stack of blocks, and the head, as in `GemmaDecoder`."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=config.hidden_size**-0.5)
        self.layers = nn.ModuleList(Gemma2Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T] -> scaled embeddings [B, T, D]."""
        embeds = self.embed_tokens(input_ids)
        # The factor is rounded to the weights' dtype, as in the original: sqrt(3584) is 59.75 in bf16.
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
            mask: boolean [B, 1, T, S], True where a query may look, causal or prefix-LM, without the
                window; S = T without a cache.
            cache: stores keys and values; `cache.reserve` must have been called. It keeps all positions in
                every layer, including those that a window hides.

        Returns:
            Hidden states [B, T, D]; `logits` turns them into scores.
        """
        cos, sin = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        rotary = partial(apply_rotary, cos=cos.to(inputs_embeds.dtype), sin=sin.to(inputs_embeds.dtype))
        key_positions = position_ids if cache is None else cache.key_positions
        narrowed = narrow(mask, position_ids, key_positions, self.config.sliding_window)
        biases = [additive(narrowed, inputs_embeds.dtype), additive(mask, inputs_embeds.dtype)]
        x = inputs_embeds
        for number, layer in enumerate(self.layers):
            update_cache = partial(cache.write, number) if cache is not None else None
            bias = biases[number % 2]  # window, no window, window, ...
            x = layer(x, bias, rotary, update_cache)
        return self.norm(x)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D] -> a soft-capped score for every token of the vocabulary [..., V]."""
        if self.lm_head is not None:
            logits = self.lm_head(hidden_states)
        else:
            logits = F.linear(hidden_states, self.embed_tokens.weight)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)
