"""The softmax loss of CLIP for a batch that is spread over W processes (https://arxiv.org/abs/2103.00020).

A softmax divides by a sum over a whole row, and over a whole column: every process needs the embeddings of
all others, pictures and texts. Two questions remain, open_clip's options of the same names:

- `local_loss`: each process computes its own rows and columns, two [b, W * b] and not [W * b, W * b];
- `gather_with_grad`: gradients go back through the gathered embeddings to where these came from.

What they give, beside L, the loss of the whole batch in one process:

    local_loss  gather_with_grad   loss            gradient of an embedding      its mean over processes
    no          no                 L everywhere    that of L                     1/W of that of L
    no          yes                L everywhere    W times that of L             that of L
    yes         no                 mean: L         the own rows' share only      wrong, by no fixed factor
    yes         yes                mean: L         W times that of L             that of L

The gradient of `logit_scale` is right after a mean over processes in all four. So in the first line the
scale learns W times as fast, beside the towers, as in one process.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minivlm import losses
from minivlm.distributed.exchanges import gather_rows
from minivlm.distributed.places import check_agreement, here
from minivlm.losses import pair_logits


def clip_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    *,
    local_loss: bool = True,
    gather_with_grad: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Find the text of each picture among those of all processes, and the picture of each text.

    Both options are on: exact after the mean over processes that DistributedDataParallel takes, with the
    smaller matrices. (open_clip's default is off.) The table above says what the others do.

    Args:
        image_embeds, text_embeds: [b, D], row i of both belongs together; b is the same everywhere. 1 will
            do; one pair in all is meaningless: there is nothing to choose from, and the loss is 0.
        logit_scale: logarithm of the inverse temperature, the same in every process.
        local_loss: only the rows and columns of this process.
        gather_with_grad: gradients travel back to the other processes.
        group: the processes to share with; None: all of them.

    Without a process group, or with one process in it, this is the loss of its own batch.

    Raises:
        ValueError: the processes do not agree on the sizes of their batches.
        ExchangeError: another process stopped, or is behind by more than the group's timeout.
        RuntimeError: several processes were started, but no process group was initialized.
    """
    place = here(group)
    if place is None:
        return losses.clip_loss(image_embeds, text_embeds, logit_scale)
    check_agreement(place, image_embeds, text_embeds)
    b = len(image_embeds)
    own = slice(place.rank * b, (place.rank + 1) * b)
    all_images = gather_rows(image_embeds, place, gather_with_grad)  # [W * b, D]
    all_texts = gather_rows(text_embeds, place, gather_with_grad)
    if local_loss:
        labels = torch.arange(own.start, own.stop, device=image_embeds.device)
        per_image = F.cross_entropy(pair_logits(image_embeds, all_texts, logit_scale), labels)
        per_text = F.cross_entropy(pair_logits(text_embeds, all_images, logit_scale), labels)
        return (per_image + per_text) / 2
    if not gather_with_grad:  # what was gathered are numbers; the own rows must not be
        all_images[own], all_texts[own] = image_embeds, text_embeds
    return losses.clip_loss(all_images, all_texts, logit_scale)
