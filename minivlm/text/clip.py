"""CLIP's text tower (https://arxiv.org/abs/2103.00020): one vector for a whole text.

Differences from SigLIP's tower in `siglip.py`: attention is causal, as in a language model, and the text's
vector is the one at the end-of-text token (eos), the first token that has seen the whole text. Nothing after
the eos is ever read, so padding needs no mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minivlm import masks
from minivlm.configs import (
    check_activation,
    check_types,
    check_width,
    expect,
    known,
    known_alone,
)
from minivlm.layers import EncoderBlock
from minivlm.text.embeddings import TextEmbeddings

# What open_clip takes for sizes that a config does not name. The tokenizer is that of the folder.
OPEN_CLIP_SIZES = {
    "context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0,
    "hf_tokenizer_name": None,
}  # fmt: skip


@dataclass(frozen=True)
class CLIPTextConfig:
    """CLIP's text tower. The defaults are clip-vit-base-patch32.

    OpenAI's files say `eos_token_id` 2 by mistake. With 2, the file does not say which id ends a text, and
    the end is the position of the text's highest id, as in OpenAI's code and in transformers. `minivlm.load`
    takes the id from the tokenizer instead, since a word that was added to it has a higher id than the end.
    """

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    vocab_size: int = 49408
    max_position_embeddings: int = 77  # tokens, including bos and eos
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    pad_token_id: int = 1
    bos_token_id: int = 49406
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        check_types(self)
        check_width(self.hidden_size, self.num_attention_heads)
        check_activation(self.hidden_act)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPTextConfig:
        """From the `text_config` part of a config.json. Raises InputError: not CLIP's tower."""
        expect(values, "text_config", "model_type", "clip_text_model")
        return cls(**known(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The `text_config` part of a config.json."""
        return {"model_type": "clip_text_model", **asdict(self)}

    @classmethod
    def from_open_clip(cls, values: Mapping[str, Any], hidden_act: str) -> CLIPTextConfig:
        """From the `text_cfg` part of an open_clip_config.json, which does not say which id ends a text.

        Raises InputError: the part asks for something else than CLIP's tower.
        """
        fixed = {"pool_type": "argmax", "proj_type": "linear"}
        found = known_alone("text_cfg", values, OPEN_CLIP_SIZES, fixed)
        return cls(
            hidden_size=found["width"],
            intermediate_size=int(found["width"] * found["mlp_ratio"]),
            num_hidden_layers=found["layers"],
            num_attention_heads=found["heads"],
            vocab_size=found["vocab_size"],
            max_position_embeddings=found["context_length"],
            hidden_act=hidden_act,
            eos_token_id=2,
        )

    def to_open_clip(self) -> dict[str, Any]:
        """The `text_cfg` part of an open_clip_config.json, which has the activation elsewhere."""
        return {
            "context_length": self.max_position_embeddings,
            "vocab_size": self.vocab_size,
            "width": self.hidden_size,
            "heads": self.num_attention_heads,
            "layers": self.num_hidden_layers,
            "mlp_ratio": self.intermediate_size / self.hidden_size,
        }


class CLIPTextModel(nn.Module):
    """CLIP's text tower."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(
            config.vocab_size, config.max_position_embeddings, config.hidden_size
        )
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def hidden_states(self, input_ids: Tensor) -> Iterator[Tensor]:
        """The embeddings, then each block's output, before the last norm: all [B, T, D]."""
        x, mask = self.embeddings(input_ids), _causal(input_ids)
        yield x
        for layer in self.layers:
            x = layer(x, mask)
            yield x

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T], padded on the right -> [B, T, D]."""
        x, mask = self.embeddings(input_ids), _causal(input_ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_layer_norm(x)

    def pool(self, tokens: Tensor, input_ids: Tensor) -> Tensor:
        """The vector at the eos of each text: [B, T, D], [B, T] -> [B, D].

        Raises ValueError: a text has no eos.
        """
        ends = self.ends(input_ids)
        return tokens[torch.arange(len(ends), device=ends.device), ends]

    def ends(self, input_ids: Tensor) -> Tensor:
        """The position of the first eos in each text: [B, T] -> [B].

        Raises ValueError: a text has none (unknown with `eos_token_id` 2).
        """
        eos = self.config.eos_token_id
        if eos == 2:  # OpenAI's files, by mistake; their eos is the highest id
            return input_ids.argmax(dim=1)
        is_end = input_ids == eos
        without = (~is_end.any(dim=1)).nonzero().flatten().tolist()
        if without:
            raise ValueError(
                f"row {without[0] + 1} of input_ids has no eos (id {eos}), where CLIP reads its vector: "
                "build the ids with the processor from the model's folder"
            )
        return is_end.int().argmax(dim=1)  # argmax returns the first of equal values


def _causal(input_ids: Tensor) -> Tensor:
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return masks.causal(positions, positions)[:, None]  # [1, 1, T, T]
