"""Contrastive losses: a picture's vector should be close to that of its own caption, and to no other.

- CLIP (https://arxiv.org/abs/2103.00020, section 2.3): a softmax over every row and every column of the
  matrix of cosines. Which of the n captions is it?
- SigLIP (https://arxiv.org/abs/2303.15343, section 3.2): a sigmoid for every pair. Do these two belong
  together?
- Distillation: a teacher's rows and columns replace the labels "one caption is right, all others are wrong".

Pure functions of embeddings [n, D]: row i of the pictures belongs to row i of the captions. Embeddings may
have any length; they are normalized here. `logit_scale` is the logarithm of the factor, a tensor of one
element, as checkpoints store it. What several devices exchange belongs around these functions, not in them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def l2_normalize(x: Tensor) -> Tensor:
    """Vectors along the last axis, scaled to length 1. A zero vector stays zero."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def similarity(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """The cosine of every picture with every text. [n, D], [m, D] -> [n, m], pictures down, texts across."""
    return l2_normalize(image_embeds) @ l2_normalize(text_embeds).T


def pair_logits(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
) -> Tensor:
    """exp(logit_scale) * cosine + logit_bias for every picture and text. [n, D], [m, D] -> [n, m]"""
    logits = logit_scale.exp() * similarity(image_embeds, text_embeds)
    return logits if logit_bias is None else logits + logit_bias


def check_pairs(image_embeds: Tensor, text_embeds: Tensor) -> None:
    """Raise ValueError unless there are as many texts as pictures, and at least one."""
    n, m = len(image_embeds), len(text_embeds)
    if n != m or n == 0:
        raise ValueError(f"{n} pictures and {m} texts: expected the same number of both, at least 1")


def clip_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """Match each picture to its text, and each text to its picture: the mean of two cross-entropies.

    Args:
        image_embeds, text_embeds: [n, D], row i of one matches row i of the other.
        logit_scale: logarithm of the inverse temperature.
    """
    check_pairs(image_embeds, text_embeds)
    logits = pair_logits(image_embeds, text_embeds, logit_scale)  # [n, n]
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def siglip_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    negative_only: bool = False,
) -> Tensor:
    """Decide for every pair whether it matches: the sum over all pairs, divided by the number of pictures.

    Args:
        image_embeds, text_embeds: [n, D], row i of one matches row i of the other.
        logit_scale: logarithm of the inverse temperature.
        logit_bias: added to every logit; negative, because most pairs do not match.
        negative_only: no pair matches. For a block of texts [m, D] that belong to other pictures.
    """
    logits = pair_logits(image_embeds, text_embeds, logit_scale, logit_bias)  # [n, n]
    labels = torch.full_like(logits, -1)
    if not negative_only:
        check_pairs(image_embeds, text_embeds)
        labels.fill_diagonal_(1)
    return -F.logsigmoid(labels * logits).sum() / len(logits)


def distillation_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    teacher_image_embeds: Tensor,
    teacher_text_embeds: Tensor,
    teacher_logit_scale: Tensor,
) -> Tensor:
    """Cross-entropy of the student's softmax against the teacher's, over rows and columns: their mean.

    Only the [n, n] matrices are compared, so the embeddings of the two may differ in width. The teacher gets
    no gradient. The smallest possible value is the entropy of the teacher's own rows and columns, not 0.
    """
    check_pairs(image_embeds, text_embeds)
    logits = pair_logits(image_embeds, text_embeds, logit_scale)
    with torch.no_grad():
        teacher = pair_logits(teacher_image_embeds, teacher_text_embeds, teacher_logit_scale)
    per_image = F.cross_entropy(logits, teacher.softmax(dim=1))
    per_text = F.cross_entropy(logits.T, teacher.T.softmax(dim=1))
    return (per_image + per_text) / 2
