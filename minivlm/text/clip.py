"""The text towers of CLIP (https://arxiv.org/abs/2103.00020) and SigLIP (https://arxiv.org/abs/2303.15343).

Both are encoder blocks over words and learned positions, and both make one vector of a whole text. They
differ in where a text can be read off:

- CLIP is causal, like a language model, and its vector is the one at the mark of the end (eos), the first
  token that has seen the whole text. What stands behind it is never read, so padding needs no mask.
- SigLIP looks in both directions and takes the last place, whatever stands there. It was trained on texts
  padded to full length and *without* a mask on the padding, so it has to get them like that again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minivlm import masks
from minivlm.encoder_blocks import ActivatedBlock
from minivlm.encoder_configs import CLIPTextConfig, SiglipTextConfig
from minivlm.layers import EncoderBlock


class TextEmbeddings(nn.Module):
    """One learned vector per word, plus one per position."""

    def __init__(self, vocab_size: int, max_position_embeddings: int, hidden_size: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Embedding(max_position_embeddings, hidden_size)
        for table in (self.token_embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T] -> [B, T, D]. Raises ValueError: texts longer than the table of positions."""
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {list(input_ids.shape)}, expected [B, T]")
        longest = self.position_embedding.num_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(
                f"the texts have {input_ids.shape[1]} tokens, and this tower reads {longest} at most: "
                "shorten them, or let the tokenizer cut them (truncate=True)"
            )
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class CLIPTextModel(nn.Module):
    """CLIP's text tower."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(
            config.vocab_size, config.max_position_embeddings, config.hidden_size
        )
        self.layers = nn.ModuleList(
            ActivatedBlock(
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                config.layer_norm_eps,
                config.hidden_act,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def hidden_states(self, input_ids: Tensor) -> Iterator[Tensor]:
        """The embeddings, then the output of each block, before the last norm: each [B, T, D]."""
        x = self.embeddings(input_ids)
        yield x
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        mask = masks.causal(positions, positions)[:, None]  # [1, 1, T, T]
        for layer in self.layers:
            x = layer(x, mask)
            yield x

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T], padded on the right -> [B, T, D]."""
        for x in self.hidden_states(input_ids):
            last = x
        return self.final_layer_norm(last)

    def pool(self, tokens: Tensor, input_ids: Tensor) -> Tensor:
        """The vector at the end of each text: [B, T, D], [B, T] -> [B, D].

        Raises ValueError: a text has no eos.
        """
        ends = self.ends(input_ids)
        return tokens[torch.arange(len(ends), device=ends.device), ends]

    def ends(self, input_ids: Tensor) -> Tensor:
        """Where the first eos of each text is: [B, T] -> [B]. Raises ValueError: a text has none."""
        eos = self.config.eos_token_id
        if eos == 2:
            # OpenAI's files say 2 by mistake. There the eos is the last word of the vocabulary, so it is
            # where the ids are highest; a row whose highest id is not that of the others lacks it.
            is_end = input_ids == input_ids.max()
            eos = int(input_ids.max())
        else:
            is_end = input_ids == eos
        without = (~is_end.any(dim=1)).nonzero().flatten().tolist()
        if without:
            raise ValueError(
                f"row {without[0] + 1} of input_ids has no eos (id {eos}), where CLIP reads off the text: "
                "let the processor of the same folder build the ids"
            )
        return is_end.int().argmax(dim=1)  # of equal values argmax gives the first


class SiglipTextModel(nn.Module):
    """SigLIP's text tower, with the linear head that leads to the width of the image tower."""

    def __init__(self, config: SiglipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(
            config.vocab_size, config.max_position_embeddings, config.hidden_size
        )
        self.layers = nn.ModuleList(
            EncoderBlock(
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                config.layer_norm_eps,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.output_size)

    def hidden_states(self, input_ids: Tensor) -> Iterator[Tensor]:
        """The embeddings, then the output of each block, before the last norm: each [B, T, D].

        Raises ValueError: the texts are not padded to full length.
        """
        x = self.embeddings(input_ids)
        length = self.config.max_position_embeddings
        if input_ids.shape[1] != length:
            raise ValueError(
                f"the texts have {input_ids.shape[1]} tokens, expected exactly {length}: SigLIP reads a text "
                "off its last place and knows only padded texts; let the processor of the folder pad them"
            )
        yield x
        for layer in self.layers:
            x = layer(x)
            yield x

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T], padded on the right to full length -> [B, T, D]."""
        for x in self.hidden_states(input_ids):
            last = x
        return self.final_layer_norm(last)

    def pool(self, tokens: Tensor) -> Tensor:
        """The last place through the head: [B, T, D] -> [B, output_size]."""
        return self.head(tokens[:, -1])
