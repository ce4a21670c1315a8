"""Which pictures each word sees, where pictures stand beside the row (Llama 3.2 Vision).

A word sees the picture whose token came last before it, and its token does so already. Pictures that follow
each other directly are seen together, by the words after the last of them:

    row          to  <|image|>  a  b  <|image|>  <|image|>  c  d
    picture 1     .      1      1  1      .          .      .  .
    picture 2     .      .      .  .      1          1      1  1
    picture 3     .      .      .  .      .          1      1  1

Words that are written later see what the last one of the prompt sees, as in transformers. (In Meta's program,
a prompt with several pictures ends their sight, and what is written sees none.)

A picture has the image tokens of its tiles: what a canvas does not have is not kept. So all image
tokens of a row stand one after the other, in the order of its pictures, and rows with fewer end with zeros
that no word sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.cache import KVCache
from minivlm.text.llama_vision import Looked


class CrossAttentionCache(KVCache):
    """Also keeps the pictures, and what the last word of each row sees of them: so do all that follow."""

    of_each_row = ("image", "image_mask")
    image: list[Looked] | None = None  # for each cross-attention, or None without pictures
    image_mask: Tensor | None = None  # [B, 1, 1, S_image]

    def reset(self) -> None:
        """Forget all tokens and pictures."""
        super().reset()
        self.image = self.image_mask = None


def pictures_in_view(is_image: Tensor) -> Tensor:
    """Which pictures of its row each token sees: boolean [B, T], True for `<|image|>` -> [B, T, P]."""
    shown = is_image.cumsum(dim=1)  # [B, T]
    follows = F.pad(is_image[:, :-1], (1, 0))
    group = (is_image & ~follows).cumsum(dim=1)  # which run of pictures came last
    rows, places = is_image.nonzero(as_tuple=True)
    numbers = torch.arange(int(shown.max()), device=is_image.device)  # [P]
    group_of_picture = group.new_zeros(len(group), len(numbers))
    group_of_picture[rows, shown[rows, places] - 1] = group[rows, places]
    return (group[:, :, None] == group_of_picture[:, None]) & (numbers < shown[:, :, None])


def tiles_in_rows(is_image: Tensor, tiles: Tensor, is_real: Tensor) -> tuple[Tensor, Tensor]:
    """Sort tiles into rows, and say who sees them.

    Args:
        is_image: boolean [B, T], True for `<|image|>`: M in all.
        tiles: [M, tiles, n, D], the tokens of each tile of each picture, in the order of the rows.
        is_real: boolean [M, tiles], which of them a picture has.

    Returns:
        Image tokens [B, S, D], and what each word may look at [B, T, S].
    """
    shown = is_image.cumsum(dim=1)
    rows, places = is_image.nonzero(as_tuple=True)  # of pictures
    picture = is_real.nonzero()[:, 0]  # of each tile
    row, number = rows[picture], (shown[rows, places] - 1)[picture]  # and which picture of its row that is
    counts = torch.bincount(row, minlength=len(is_image))  # tiles of each row
    slot = torch.arange(len(row), device=row.device) - (counts.cumsum(dim=0) - counts)[row]

    image = tiles.new_zeros(len(is_image), int(counts.max()), *tiles.shape[2:])
    image[row, slot] = tiles[is_real]
    sees = is_image.new_zeros(*is_image.shape, image.shape[1])  # [B, T, tiles of a row]
    sees[row, :, slot] = pictures_in_view(is_image)[row, :, number]
    return image.flatten(1, 2), sees.repeat_interleave(tiles.shape[2], dim=2)
