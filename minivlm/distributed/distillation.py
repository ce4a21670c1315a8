"""Distillation of CLIP for a batch spread over W processes: `minivlm.losses.distillation_loss` of all pairs.

As in clip.py, a softmax needs whole rows and columns, here of the student and of the teacher. Each process
computes its own rows and columns. The teacher's vectors travel one way, since it gets no gradient.
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


def distillation_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    teacher_image_embeds: Tensor,
    teacher_text_embeds: Tensor,
    teacher_logit_scale: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """This process's share: the mean over processes is the loss of the whole batch, as in `clip_loss`.

    Without a process group, or with only one process in it, this is the loss of the local batch.

    Raises: as `minivlm.distributed.clip_loss`.
    """
    place = here(group)
    teacher = (teacher_image_embeds, teacher_text_embeds)
    if place is None:
        return losses.distillation_loss(image_embeds, text_embeds, logit_scale, *teacher, teacher_logit_scale)
    check_agreement(place, image_embeds, text_embeds)
    check_agreement(place, *teacher)
    images, texts = (gather_rows(x, place, with_grad=True) for x in (image_embeds, text_embeds))
    with torch.no_grad():
        teacher_images, teacher_texts = (gather_rows(x, place, with_grad=False) for x in teacher)
        wanted_texts = pair_logits(teacher[0], teacher_texts, teacher_logit_scale).softmax(dim=1)
        wanted_images = pair_logits(teacher[1], teacher_images, teacher_logit_scale).softmax(dim=1)
    per_image = F.cross_entropy(pair_logits(image_embeds, texts, logit_scale), wanted_texts)
    per_text = F.cross_entropy(pair_logits(text_embeds, images, logit_scale), wanted_images)
    return (per_image + per_text) / 2
