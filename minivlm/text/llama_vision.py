"""The decoder of Llama 3.2 Vision (https://arxiv.org/abs/2407.21783, section 7): Llama that looks aside.

    text -> embedding table -> block, block, block -> cross-attention <- picture
                            -> block, block, block, block -> cross-attention <- picture -> ...

Between the blocks of a finished Llama 3.1 stand new ones whose queries are words and whose keys and values
are image tokens. They replace nothing, and enter through gates that start at zero. A text without pictures
skips them, so training them cannot change how Llama reads it. Here and in transformers both kinds are counted
in one list, 3, 8, 13, ... being new; Meta's files have two, and the new ones run before the old 3, 7, 11, ...

What differs from Flamingo's: there is no resampler, so words look at all image tokens; queries and keys have
a norm for each head, and heads share keys in groups; the MLP is SwiGLU. Nothing is rotated, since an image
token has no place in the row.

A word that sees no picture is given neither attention nor MLP, as in Meta's program. transformers (5.23)
keeps only the MLP from it, so words before the first picture look at all that come later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.attention import Attention, additive, attend
from minivlm.cache import KVCache
from minivlm.configs import check_types, expect, known_decoder, part_of
from minivlm.errors import InputError
from minivlm.layers import LlamaRMSNorm, SwiGLU
from minivlm.rope import apply_rotary, rotary_angles
from minivlm.text.llama import LlamaBlock, LlamaConfig
from minivlm.text.llama3_rope import Llama3Scaling, llama3_angles

EXTRA_EMBEDDINGS = 8  # rows of the embedding table for tokens that are only read, such as <|image|>

Looked = tuple[Tensor, Tensor]  # keys and values [B, K, S, Dh] of the image tokens


@dataclass(frozen=True)
class LlamaVisionTextConfig:
    """The defaults are those of transformers: Llama-3.2-11B-Vision, but for `rope_scaling`."""

    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 40  # of both kinds
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    vocab_size: int = 128256  # tokens that can be written; the embedding table has 8 more
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: Llama3Scaling | None = None
    cross_attention_layers: tuple[int, ...] = (3, 8, 13, 18, 23, 28, 33, 38)

    def __post_init__(self) -> None:
        check_types(self)
        cross, layers = self.cross_attention_layers, range(self.num_hidden_layers)
        if list(cross) != sorted({number for number in cross if number in layers}):
            raise InputError(
                f"cross_attention_layers is {list(cross)}: expected numbers of layers in ascending order, "
                f"from 0 to {self.num_hidden_layers - 1}"
            )
        if len(cross) == self.num_hidden_layers:
            raise InputError(f"all {len(cross)} layers are cross_attention_layers: a word has to see others")
        _ = self.llama  # which checks the rest

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.llama.head_dim

    @property
    def llama(self) -> LlamaConfig:
        """The language model without the layers in between. Its own head would be as here."""
        return LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers - len(self.cross_attention_layers),
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            rms_norm_eps=self.rms_norm_eps,
            rope_theta=self.rope_theta,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlamaVisionTextConfig:
        """From the `text_config` part of a config.json.

        Raises InputError: another decoder, another activation, a tied head, or rotary positions that are
        scaled in another way than Llama 3's.
        """
        expect(values, "text_config", "model_type", "mllama_text_model")
        expect(values, "text_config", "hidden_act", "silu")
        if values.get("tie_word_embeddings"):
            expect(values, "text_config", "tie_word_embeddings", False)
        name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
        rope = part_of(values, name)
        scaling = None
        if rope.get("rope_type", rope.get("type")) == "llama3":
            scaling = Llama3Scaling.from_dict(rope)
            rope = {key: rope[key] for key in ("rope_theta",) if key in rope}
        found = known_decoder(cls, {**values, name: rope})
        found["rope_scaling"] = scaling
        if "cross_attention_layers" in found:
            found["cross_attention_layers"] = tuple(found["cross_attention_layers"])
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """The `text_config` part of a config.json."""
        values = asdict(self)
        del values["rope_scaling"]
        rope = {"rope_type": "default"} if self.rope_scaling is None else self.rope_scaling.to_dict()
        return {
            "model_type": "mllama_text_model",
            **values,
            "cross_attention_layers": list(self.cross_attention_layers),
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
        }


class CrossAttention(Attention):
    """Words look at image tokens; queries and keys of each head have a norm."""

    def __init__(self, config: LlamaVisionTextConfig) -> None:
        super().__init__(config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
        self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps)

    def keys_and_values(self, image: Tensor) -> Looked:
        """Image tokens [B, S, D] -> what words compare with and what they take, [B, K, S, Dh] each."""
        return self.k_norm(self._heads(self.k_proj(image))), self._heads(self.v_proj(image))

    def look(self, x: Tensor, image: Looked, mask: Tensor) -> Tensor:
        """Words [B, T, D], and a mask as in `attend` -> [B, T, D]."""
        q = self.q_norm(self._heads(self.q_proj(x)))
        out = attend(q, *image, mask, self.scale)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, H, T, Dh] -> [B, T, D]


class CrossAttentionBlock(nn.Module):
    """Pre-norm block whose two branches enter through gates."""

    def __init__(self, config: LlamaVisionTextConfig) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn = CrossAttention(config)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, image: Looked, mask: Tensor, is_blind: Tensor) -> Tensor:
        """x [B, T, D], a mask as in `attend`, and which words see no picture [B, T, 1] -> [B, T, D]."""
        # A softmax over nothing is the mean of everything: such words saw all the pictures to come.
        looked = self.cross_attn.look(self.input_layernorm(x), image, mask).masked_fill(is_blind, 0.0)
        x = x + self.cross_attn_attn_gate.tanh() * looked
        thought = self.mlp(self.post_attention_layernorm(x)).masked_fill(is_blind, 0.0)
        x = x + self.cross_attn_mlp_gate.tanh() * thought
        return x


class LlamaVisionDecoder(nn.Module):
    """The embedding table, the stack of both kinds of blocks, and the head."""

    def __init__(self, config: LlamaVisionTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size + EXTRA_EMBEDDINGS, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(
            CrossAttentionBlock(config)
            if number in config.cross_attention_layers
            else LlamaBlock(config.llama)
            for number in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T] -> embeddings [B, T, D]."""
        return self.embed_tokens(input_ids)

    def read_image(self, image: Tensor) -> list[Looked]:
        """Image tokens [B, S, D] -> keys and values for each cross-attention, once for a whole answer."""
        blocks = (layer for layer in self.layers if isinstance(layer, CrossAttentionBlock))
        return [block.cross_attn.keys_and_values(image) for block in blocks]

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        cache: KVCache | None = None,
        image: Sequence[Looked] | None = None,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """Run the blocks and the final norm.

        Args:
            inputs_embeds: [B, T, D].
            position_ids: [B, T].
            mask: boolean [B, 1, T, S], True where a query may look; S = T without a cache.
            cache: stores keys and values of the text; `cache.reserve` must have been called.
            image: what `read_image` gave, or None for text alone.
            image_mask: boolean [B, 1, T, S_image], True where a word may look at an image token.

        Returns:
            Hidden states [B, T, D]; `logits` turns them into scores.
        """
        config, dtype = self.config, inputs_embeds.dtype
        if config.rope_scaling is None:
            cos, sin = rotary_angles(position_ids, config.llama.head_dim, config.rope_theta)
        else:
            turning = config.rope_theta, config.rope_scaling
            cos, sin = llama3_angles(position_ids, config.llama.head_dim, *turning)
        rotary = partial(apply_rotary, cos=cos.to(dtype), sin=sin.to(dtype))
        bias = additive(mask, dtype)
        if image is not None:
            assert image_mask is not None
            is_blind = ~image_mask.any(dim=-1)[:, 0, :, None]  # [B, T, 1]
            image_bias, looked = additive(image_mask, dtype), iter(image)

        x, number = inputs_embeds, 0
        for layer in self.layers:
            if not isinstance(layer, CrossAttentionBlock):
                x = layer(x, bias, rotary, partial(cache.write, number) if cache is not None else None)
                number += 1
            elif image is not None:
                x = layer(x, next(looked), image_bias, is_blind)
        return self.norm(x)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D] -> a score for every token that can be written [..., V]."""
        return self.lm_head(hidden_states)
