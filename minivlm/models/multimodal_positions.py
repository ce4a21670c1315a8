"""Where each token of a text with pictures and videos stands: three numbers (Qwen2-VL, section 2.1).

    token    look at  <image of 2 x 3 tokens>   this  <video of 2 steps, 1 x 2 tokens>   and
    time        0  1     2  2  2  2  2  2         5       6  6   7  7                     8
    row         0  1     2  2  2  3  3  3         5       6  6   6  6                     8
    column      0  1     2  3  4  2  3  4         5       6  7   6  7                     8

A word comes one after the largest number so far. A picture begins there, too: all of it at one time, its rows
and columns counted on. So a picture of 1,000 tokens moves what follows by as few positions as it has rows or
columns, and a long text reaches less far into positions that the model was not trained on.

`rope_deltas` says by how much the next position is larger than the number of tokens so far; after pictures it
is below 0. A word that is written later needs no more than that: its position is its index plus the delta.

The rule is that of the original program. transformers lets the text after a video begin at the larger one of
its rows and columns, even where its time has gone on for longer: there, two tokens have the same position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minivlm.cache import KVCache
from minivlm.errors import InputError


class MultimodalCache(KVCache):
    """Keys and values, and what is added to the index of a later token for its position."""

    of_each_row = ("rope_deltas",)
    rope_deltas: Tensor  # [B]


class Media(NamedTuple):
    """The pictures of a batch, or its videos, in the order of the rows."""

    placeholder: int  # the id that stands for one of their tokens
    grid_thw: Tensor  # [M, 3], steps, rows and columns of patches
    intervals: Tensor  # [M], positions from one step to the next; not always whole numbers
    features: Tensor  # [N, D], the tokens of all of them


def multimodal_positions(
    input_ids: Tensor, attention_mask: Tensor, media: Sequence[Media], merge_size: int
) -> tuple[Tensor, Tensor]:
    """Time, row and column of each token.

    Args:
        input_ids, attention_mask: [B, S]. Padding on either side is skipped, and has position 0.
        media: the pictures and the videos of all rows.
        merge_size: patches on a side of an image token.

    Returns:
        position_ids [3, B, S], and rope_deltas [B].
    Raises:
        InputError: the placeholders of a row and its pictures do not match.
    """
    waiting: dict[int, Iterator[tuple[list[int], float]]] = {
        kind.placeholder: zip(kind.grid_thw.tolist(), kind.intervals.tolist(), strict=True) for kind in media
    }
    position_ids = torch.zeros(3, *input_ids.shape, dtype=torch.long)
    rope_deltas = []
    for number, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.bool().cpu(), strict=True)):
        tokens = [i for i, is_real in zip(ids, mask.tolist(), strict=True) if is_real]
        positions = torch.cat(list(_blocks(tokens, waiting, merge_size)), dim=1)
        position_ids[:, number, mask] = positions
        rope_deltas.append(int(positions.max()) + 1 - len(tokens))
    left = sum(len(list(of_kind)) for of_kind in waiting.values())
    if left:
        raise InputError(f"{left} pictures or videos have no place in the rows: let the processor build both")
    device = input_ids.device
    return position_ids.to(device), torch.tensor(rope_deltas, device=device)


def _blocks(
    tokens: list[int], waiting: dict[int, Iterator[tuple[list[int], float]]], merge_size: int
) -> Iterator[Tensor]:
    """The positions of a row [3, n], piece by piece: words, a picture, words, ..."""
    place = start = 0  # the next token, and the next free position
    while place < len(tokens):
        placeholder = tokens[place]
        if placeholder not in waiting:
            words = next((i for i in range(place, len(tokens)) if tokens[i] in waiting), len(tokens)) - place
            block = torch.arange(words).expand(3, -1)
        else:
            shown = next(waiting[placeholder], None)
            if shown is None:
                raise InputError(
                    f"token {place + 1} of a row is a placeholder, and no picture is left for it: let the "
                    "processor build both"
                )
            block = _of_grid(*shown, merge_size)
            length = block.shape[1]
            if tokens[place : place + length] != [placeholder] * length:
                raise InputError(
                    f"token {place + 1} of a row is a placeholder, and its picture takes {length} of them in "
                    "a row: let the processor build both"
                )
        block = block + start
        yield block
        place += block.shape[1]
        start = int(block.max()) + 1


def _of_grid(grid: list[int], interval: float, merge_size: int) -> Tensor:
    """Positions of a picture or a video that begins at 0: [3, tokens]."""
    steps, rows, columns = grid[0], grid[1] // merge_size, grid[2] // merge_size
    # Rounded down after the product: steps of 1.5 positions stand at 0, 1, 3, 4.
    times = (torch.arange(steps) * interval).long()
    return torch.cartesian_prod(times, torch.arange(rows), torch.arange(columns)).T
