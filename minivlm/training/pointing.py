"""Pointing: the word for a thing's color learns to know where the thing lies, with a label of its own.

"Is the red circle above the red star?" To answer, a decoder has to find two things, keep their places, and
compare them. The answer is one word, and says nothing about which of the three failed. A decoder that finds
things by their color is right about most scenes, and thousands of steps later it still finds them so. Here
the states at the words "red" are asked for the places themselves, by a linear layer in the middle of the
decoder, as the tower is asked for what lies on its patches (`PatchHead`). The layer is discarded after
training. Losses inside of a network are an old idea: deeply supervised nets, https://arxiv.org/abs/1409.5185.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PointHead(nn.Module):
    """Says at each place of a row where a thing lies, from the states after each of some blocks."""

    def __init__(self, hidden_size: int, num_hidden_layers: int) -> None:
        super().__init__()
        middle = num_hidden_layers // 2
        self.layers = sorted({max(middle - 1, 0), middle})  # of four blocks, the second and the third
        self.points = nn.ModuleList(nn.Linear(hidden_size, 2) for _ in self.layers)

    def loss(self, states: Sequence[Tensor], points: Tensor, count: Tensor | None = None) -> Tensor:
        """The error of what is said of points [R, T, 2] from states [R, T, D], one for each of `layers`.

        Args:
            points: x and y from -1 to 1; NaN where there is nothing to say.
            count: how many points there are, if those of other rows count as well.
        """
        known = ~points[..., 0].isnan()
        total = torch.zeros((), device=points.device)
        for head, state in zip(self.points, states, strict=True):
            # States of different places differ much in length, and a linear layer would feel that.
            said = head(F.rms_norm(state[known], state.shape[-1:])).float()
            total = total + F.smooth_l1_loss(said, points[known], reduction="sum", beta=0.1)
        return total / (2 * (known.sum() if count is None else count)).clamp(min=1)


@contextmanager
def states_after(blocks: nn.ModuleList, numbers: Sequence[int]) -> Iterator[list[Tensor]]:
    """Collect what some blocks give out, in their order, in what runs inside."""
    states: list[Tensor] = []
    hooks = [
        blocks[number].register_forward_hook(lambda _, given, out: states.append(out)) for number in numbers
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
