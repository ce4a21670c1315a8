"""Gemma 2 (https://arxiv.org/abs/2408.00118): the decoder of PaliGemma 2.

What differs from Gemma, in `minivlm.text.gemma`:

- attention scores and the final logits are *soft-capped*: cap * tanh(score / cap) stays within +-cap, and
  is close to the score itself as long as that is small;
- every second layer, beginning with the first, looks through a *sliding window*: the last 4096 positions;
- the queries are scaled by query_pre_attn_scalar ** -0.5, which is head_dim ** -0.5 only in some sizes;
- attention and MLP have a norm before and a norm after them. `post_attention_layernorm` is therefore
  another norm than in Gemma, where the same name means the norm before the MLP.

Embeddings, rotary positions, the gated MLP and the (1 + w) norm are those of Gemma.

PaliGemma 2 was trained with these caps except in the last stage, tuning for a single task (section 3 of
https://arxiv.org/abs/2412.03555). Each folder's config.json says what holds for its weights; null is no cap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm import masks
from minivlm.cache import KVCache
from minivlm.configs import Gemma2Config, GemmaConfig
from minivlm.layers import Attention, GatedMLP, RMSNorm, additive, in_pieces, pick
from minivlm.rope import apply_rotary, rotary_angles
from minivlm.text.gemma import GemmaDecoder


def narrow(mask: Tensor, query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """The mask of a layer with a window: who may look at whom, and is near enough. [B, 1, T, S] -> the same

    The window holds for looks into the past. The prefix of a prefix-LM mask stays as it is, however long:
    its tokens see each other in both directions, and all of them. With a prefix of 3, a suffix of 3 and
    window = 2:

        1 1 1 0 0 0
        1 1 1 0 0 0
        1 1 1 0 0 0
        0 0 1 1 0 0
        0 0 0 1 1 0
        0 0 0 0 1 1

    That is how transformers computes PaliGemma 2: it joins "both in the prefix" to the causal sliding mask
    by *or*. The original code, in big_vision, has no window at all. The two agree up to 4096 tokens, and
    differ where the picture has 896 pixels a side: 4096 image tokens, and then the prompt. This file does
    as transformers does.

    Args:
        mask: boolean, causal or prefix-LM, with or without padding.
        query_positions, key_positions: [B, T] and [B, S].
        window: how many positions a token sees, its own included.
    """
    queries, keys = query_positions[:, None, :, None], key_positions[:, None, None, :]
    # Nobody but the prefix looks ahead, and the last token that is seen from before is the prefix's last.
    seen_from_before = (mask & (keys > queries)).any(dim=-2, keepdim=True)  # [B, 1, 1, S]
    prefix_lengths = keys.where(seen_from_before, -1).amax(dim=-1, keepdim=True) + 1  # [B, 1, 1, 1]
    both_in_prefix = (queries < prefix_lengths) & (keys < prefix_lengths)
    near = masks.sliding(query_positions, key_positions, window)[:, None]
    return mask & (near | both_in_prefix)


class Gemma2Attention(Attention):
    """Grouped-query attention with soft-capped scores and a scale of its own."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_logit_softcapping


class Gemma2Block(nn.Module):
    """A block with a norm before and a norm after each part; the sums themselves are never normalized."""

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
        wanted: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D], or [B, 1, D] with one place `wanted` [B] in each row."""
        attended = self.self_attn(self.input_layernorm(x), mask, rotary, update_cache)
        x = x + self.post_attention_layernorm(attended)
        x = x if wanted is None else pick(x, wanted)
        updated = in_pieces(self.mlp, self.pre_feedforward_layernorm(x))
        x = x + self.post_feedforward_layernorm(updated)
        return x


class Gemma2Decoder(nn.Module):
    """The stack of blocks with the embedding table below it and the head above it, as `GemmaDecoder`."""

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
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Run the blocks and the final norm.

        Args:
            inputs_embeds: [B, T, D], already scaled.
            position_ids: [B, T].
            mask: boolean [B, 1, T, S], True where a query may look, causal or prefix-LM, without the
                window; S = T without a cache.
            cache: where keys and values are written and read; `cache.reserve` was called before. It keeps
                all positions in every layer, also those that a window hides.
            wanted: the place of one token in each row, [B], if only its hidden state will be read.

        Returns:
            [B, T, D], or [B, 1, D] of the wanted tokens; `logits` turns them into scores of words.
        """
        cos, sin = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        rotary = partial(apply_rotary, cos=cos.to(inputs_embeds.dtype), sin=sin.to(inputs_embeds.dtype))
        key_positions = position_ids if cache is None else cache.key_positions
        narrowed = narrow(mask, position_ids, key_positions, self.config.sliding_window)
        biases = [additive(narrowed, inputs_embeds.dtype), additive(mask, inputs_embeds.dtype)]
        x = inputs_embeds
        for number, layer in enumerate(self.layers):
            update_cache = partial(cache.write, number) if cache is not None else None
            is_last = number == len(self.layers) - 1
            bias = biases[number % 2]  # window, no window, window, ...
            x = layer(x, bias, rotary, update_cache, wanted if is_last else None)
        return self.norm(x)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D] -> scores of every word of the vocabulary [..., V], within the cap."""
        if self.lm_head is not None:
            logits = self.lm_head(hidden_states)
        else:
            logits = F.linear(hidden_states, self.embed_tokens.weight)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)


def build_decoder(config: GemmaConfig | Gemma2Config) -> GemmaDecoder | Gemma2Decoder:
    """The decoder that a config describes: PaliGemma has Gemma, PaliGemma 2 has Gemma 2."""
    return Gemma2Decoder(config) if isinstance(config, Gemma2Config) else GemmaDecoder(config)
