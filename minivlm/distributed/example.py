"""One step of the sigmoid loss in each process that `run` starts, for a notebook that shows the ring.

>>> steps = run(3, siglip_step, images, texts, logit_scale, logit_bias, shift)
>>> [step.owners for step in steps]
[(0, 2, 1), (1, 0, 2), (2, 1, 0)]
"""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from minivlm.distributed.exchanges import Blocks, Exchange, bidirectional
from minivlm.distributed.places import Place
from minivlm.distributed.siglip import siglip_loss


class Step(NamedTuple):
    """What one process sees and computes. W processes, n pairs in total."""

    owners: tuple[int, ...]  # whose texts it saw, in order
    loss: Tensor  # its share: the mean over processes is the loss of all pairs
    images: Tensor  # gradient of its pictures [n / W, D]: W times that of the loss of all pairs
    texts: Tensor  # gradient of its texts [n / W, D], likewise
    logit_scale: Tensor  # its share of this gradient, as with the loss
    logit_bias: Tensor


def siglip_step(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    exchange: Exchange = bidirectional,
) -> Step:
    """Loss and gradients of this process's rows of a batch [n, D], which every process receives in full.

    Raises ValueError: n pairs cannot be divided equally among the processes.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    n = len(image_embeds)
    if n % size:
        raise ValueError(f"{n} pairs for {size} processes: expected a multiple of {size}")
    rows = slice(rank * n // size, (rank + 1) * n // size)
    inputs = (image_embeds[rows], text_embeds[rows], logit_scale, logit_bias)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    owners: list[int] = []

    def watched(texts: Tensor, place: Place) -> Blocks:
        for owner, block in exchange(texts, place):
            owners.append(owner)
            yield owner, block

    loss = siglip_loss(*leaves, exchange=watched)
    loss.backward()
    gradients = (leaf.grad for leaf in leaves)
    return Step(tuple(owners or [rank]), loss.detach(), *(x for x in gradients if x is not None))
