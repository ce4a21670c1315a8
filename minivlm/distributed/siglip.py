"""The sigmoid loss of a batch spread over W processes (https://arxiv.org/abs/2303.15343, section 3.3).

    texts of      A      B      C
    process 0   ╲ own  others others        each process has a row of blocks: pictures stay,
    process 1   others ╲ own  others        texts pass by
    process 2   others others ╲ own

Every pair is scored by itself, so the sum over all pairs can be taken block by block, in any order: no
process ever needs more than one block of texts at a time. A softmax (clip.py) does not allow that.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from minivlm import losses
from minivlm.distributed.exchanges import Exchange, bidirectional
from minivlm.distributed.places import check_agreement, here


class BlockLoss(Protocol):
    """The loss of one block: `siglip_loss` of `minivlm.losses`, or its chunked form in `minivlm.speed`."""

    def __call__(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        negative_only: bool = False,
        /,
    ) -> Tensor: ...


def siglip_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    exchange: Exchange = bidirectional,
    block_loss: BlockLoss = losses.siglip_loss,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """This process's share of the loss: its pictures with all texts, divided by the number of its pictures.

    Let L be the loss of the whole batch [W * b] in one process. For all four exchanges:

    - the mean of the returned values over processes is L;
    - the gradient of an embedding is W times that of L, since it is a sum over processes. Averaged over
      processes, as DistributedDataParallel does with the gradients of the weights, it is the gradient of L;
    - the gradients of `logit_scale` and `logit_bias` are this process's share: their mean is that of L.

    Args:
        image_embeds, text_embeds: [b, D], row i of one matches row i of the other; b is the same in every
            process, at least 1.
        logit_scale, logit_bias: as in `minivlm.losses.siglip_loss`, the same in every process.
        exchange: how texts travel; one of `exchanges.EXCHANGES`, the same in every process.
        block_loss: the loss of one block. Autograd keeps four matrices for each of the W blocks until the
            backward pass, 4 * W * b * b numbers; the chunked form keeps none.
        group: the processes that share the batch; None means all of them.

    Without a process group, or with only one process in it, this is the loss of the local batch.

    Raises:
        ValueError: the batches of the processes do not agree in size.
        ExchangeError: another process stopped, or is behind by more than the group's timeout.
        RuntimeError: several processes were started, but no process group was initialized.
    """
    place = here(group)
    if place is None:
        return block_loss(image_embeds, text_embeds, logit_scale, logit_bias)
    check_agreement(place, image_embeds, text_embeds)
    blocks = [
        block_loss(image_embeds, texts, logit_scale, logit_bias, owner != place.rank)
        for owner, texts in exchange(text_embeds, place)
    ]
    return torch.stack(blocks).sum()
