"""The output of CLIP and SigLIP, and the checks that both need."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class ContrastiveOutput:
    """n pictures against m texts.

    logits_per_image [n, m] and its transpose; the embeddings [n, D] and [m, D], normalized to length 1; the
    loss if it was requested.
    """

    logits_per_image: Tensor
    logits_per_text: Tensor
    image_embeds: Tensor
    text_embeds: Tensor
    loss: Tensor | None = None


def check_widths(image_embeds: Tensor, text_embeds: Tensor) -> None:
    """Raise ValueError unless both are matrices with rows of the same width."""
    shapes = list(image_embeds.shape), list(text_embeds.shape)
    if image_embeds.dim() != 2 or text_embeds.dim() != 2 or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"embeddings of pictures {shapes[0]} and texts {shapes[1]} cannot be compared: expected [n, D] "
            "and [m, D] from the two towers of one model"
        )
