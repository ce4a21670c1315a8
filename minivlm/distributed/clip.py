"""The softmax loss of CLIP for a batch spread over W processes (https://arxiv.org/abs/2103.00020).

The softmax divides by sums over whole rows and whole columns, so every process needs the embeddings of all
others, pictures and texts. Two choices remain, named as in open_clip:

- `local_loss`: each process computes only its own rows and columns, two [b, W * b], not one [W * b, W * b];
- `gather_with_grad`: gradients go back through the gathered embeddings to the processes they came from.

The results, compared with L, the loss of the whole batch in one process:

    local_loss  gather_with_grad   loss            gradient of an embedding      its mean over processes
    no          no                 L everywhere    that of L                     1/W of that of L
    no          yes                L everywhere    W times that of L             that of L
    yes         no                 mean: L         the share of its own rows     wrong, by no fixed factor
    yes         yes                mean: L         W times that of L             that of L

In all four cases the gradient of `logit_scale` is right after averaging over processes. So in the first row
the scale learns, relative to the towers, W times as fast as in one process.
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
    """Match each picture to its text among the texts of all processes, and each text to its picture.

    Both options are on by default: the result is exact after DistributedDataParallel has averaged over
    processes, and the matrices are the smaller ones. (open_clip's default is off.) For the other settings,
    see the table above.

    Args:
        image_embeds, text_embeds: [b, D], row i of one matches row i of the other; b is the same in every
            process. b = 1 is fine, but a single pair in total is meaningless: there is nothing to choose
            from, and the loss is 0.
        logit_scale: logarithm of the inverse temperature, the same in every process.
        local_loss: compute only the rows and columns of this process.
        gather_with_grad: send gradients back to the other processes.
        group: the processes that share the batch; None means all of them.

    Without a process group, or with only one process in it, this is the loss of the local batch.

    Raises:
        ValueError: the batches of the processes do not agree in size.
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
    if not gather_with_grad:  # the gathered rows are constants; our own rows must not be
        all_images[own], all_texts[own] = image_embeds, text_embeds
    return losses.clip_loss(all_images, all_texts, logit_scale)
