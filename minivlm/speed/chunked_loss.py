"""The sigmoid loss of SigLIP in memory that grows with n, and not with n * n.

`losses.siglip_loss` holds several [n, n] matrices until the backward pass: 32,768 pairs need 24 GiB. But
the loss is a sum over pairs, and each summand's derivative is known as soon as its logit is. So texts
are taken a few at a time, and with each [n, chunk] block of logits the gradients are added up at once; then
the block is forgotten. The backward pass only multiplies. Value and gradients are those of the plain form,
the number of products too. A softmax would need two passes: its rows have to be complete first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from minivlm.losses import check_pairs, l2_normalize


def chunked_siglip_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    negative_only: bool = False,
    chunk: int = 256,
) -> Tensor:
    """As `losses.siglip_loss`, and differentiable once.

    Args:
        image_embeds, text_embeds: [n, D], row i of both belongs together.
        logit_scale: logarithm of the inverse temperature.
        logit_bias: added to every logit.
        negative_only: no pair belongs together. For a block of texts [m, D] that belong to other pictures.
        chunk: texts in a block, which is [n, chunk].

    Raises ValueError: pictures and texts do not pair, or `chunk` is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: expected the number of texts in a block, 1 or more")
    if not negative_only:
        check_pairs(image_embeds, text_embeds)
    return _ChunkedSigmoid.apply(
        l2_normalize(image_embeds),
        l2_normalize(text_embeds),
        logit_scale.exp(),
        logit_bias,
        negative_only,
        chunk,
        torch.is_grad_enabled(),
    )


class _ChunkedSigmoid(Function):
    """Of vectors of length 1, [n, D] and [m, D]. The gradients are found in `forward`."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        factor: Tensor,
        bias: Tensor,
        negative_only: bool,
        chunk: int,
        with_grad: bool,
    ) -> Tensor:
        inputs = (images, texts, factor, bias)
        # Many small numbers are added to one large: bfloat16 would lose most of them.
        sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in inputs]
        total = sums[2].new_zeros(())
        for start in range(0, len(texts), chunk):
            total += _add_chunk(
                inputs, slice(start, start + chunk), negative_only, sums if with_grad else None
            )
        n = len(images)
        if with_grad:
            sums[0] *= factor
            sums[1] *= factor
            ctx.save_for_backward(*((x / n).to(like.dtype) for x, like in zip(sums, inputs, strict=True)))
        return (total / n).to(images.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # asked for with create_graph=True
            raise RuntimeError("the chunked loss is differentiable once: take losses.siglip_loss")
        return *(grad * x for x in ctx.saved_tensors), None, None, None


def _add_chunk(
    inputs: tuple[Tensor, ...], chunk: slice, negative_only: bool, sums: list[Tensor] | None
) -> Tensor:
    """The loss of all pictures with some texts, as a sum. Adds to the sums of gradients, if there are any.

    A function of its own, so that its matrices [n, chunk] are gone before the next ones are made.
    """
    images, texts, factor, bias = inputs
    texts = texts[chunk]
    cosines = images @ texts.T  # [n, chunk]
    wrong = factor * cosines + bias  # the logit; where a pair is right, minus the logit
    right = wrong[chunk].diagonal()  # picture i meets text i
    if not negative_only:
        right.neg_()
    loss = -F.logsigmoid(-wrong).sum()
    if sums is None:
        return loss
    slope = wrong.sigmoid_()  # derivative of the loss by the logit
    if not negative_only:
        right.neg_()
    of_images, of_texts, of_factor, of_bias = sums
    of_images += slope @ texts
    of_texts[chunk] += slope.T @ images
    of_factor += (slope * cosines).sum()
    of_bias += slope.sum()
    return loss
