"""The first layer of CLIP's and SigLIP's text towers: token and position embeddings."""

from __future__ import annotations

from torch import Tensor, nn


class TextEmbeddings(nn.Module):
    """One learned vector per token of the vocabulary, plus one per position."""

    def __init__(self, vocab_size: int, max_position_embeddings: int, hidden_size: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Embedding(max_position_embeddings, hidden_size)
        for table in (self.token_embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T] -> [B, T, D]. Raises ValueError: texts longer than the position table."""
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {list(input_ids.shape)}, expected [B, T]")
        longest = self.position_embedding.num_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(
                f"the texts have {input_ids.shape[1]} tokens, but this tower reads at most {longest}: "
                "shorten them, or let the tokenizer truncate them (truncate=True)"
            )
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]
