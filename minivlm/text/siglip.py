"""SigLIP's text tower (https://arxiv.org/abs/2303.15343): one vector for a whole text.

Differences from CLIP's tower in `clip.py`: attention is bidirectional, and the text's vector is read at the
last position, whatever token is there. The tower was trained on texts padded to full length *without* a mask
on the padding, so it needs the same input now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from minivlm.configs import (
    check_activation,
    check_types,
    check_width,
    expect,
    known,
)
from minivlm.layers import EncoderBlock
from minivlm.text.embeddings import TextEmbeddings


@dataclass(frozen=True)
class SiglipTextConfig:
    """SigLIP's text tower (https://arxiv.org/abs/2303.15343). The defaults are siglip-base-patch16-224.

    `projection_size` is the width of the tower's output; None means hidden_size.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    vocab_size: int = 32000
    max_position_embeddings: int = 64  # tokens; every text is padded to this length
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    projection_size: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_width(self.hidden_size, self.num_attention_heads)
        check_activation(self.hidden_act)

    @property
    def output_size(self) -> int:
        """The width of the tower's output."""
        return self.projection_size or self.hidden_size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SiglipTextConfig:
        """From the `text_config` part of a config.json.

        Raises InputError: not SigLIP's tower, or a different activation.
        """
        expect(values, "text_config", "model_type", "siglip_text_model")
        expect(values, "text_config", "hidden_act", "gelu_pytorch_tanh")
        return cls(**known(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The `text_config` part of a config.json."""
        return {
            "model_type": "siglip_text_model",
            **asdict(self),
            "projection_size": self.output_size,
        }


class SiglipTextModel(nn.Module):
    """SigLIP's text tower, with a linear head that projects to the image tower's width."""

    def __init__(self, config: SiglipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(
            config.vocab_size, config.max_position_embeddings, config.hidden_size
        )
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.output_size)

    def hidden_states(self, input_ids: Tensor) -> Iterator[Tensor]:
        """The embeddings, then each block's output, before the last norm: all [B, T, D].

        Raises ValueError: the texts are not padded to full length.
        """
        x = self._embed(input_ids)
        yield x
        for layer in self.layers:
            x = layer(x)
            yield x

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T], padded on the right to full length -> [B, T, D]."""
        x = self._embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.final_layer_norm(x)

    def _embed(self, input_ids: Tensor) -> Tensor:
        x = self.embeddings(input_ids)
        length = self.config.max_position_embeddings
        if input_ids.shape[1] != length:
            raise ValueError(
                f"the texts have {input_ids.shape[1]} tokens, expected exactly {length}: SigLIP reads a "
                "text's vector at the last position and was trained only on padded texts; pad them with the "
                "processor from the model's folder"
            )
        return x

    def pool(self, tokens: Tensor) -> Tensor:
        """The last position through the head: [B, T, D] -> [B, output_size]."""
        return self.head(tokens[:, -1])
