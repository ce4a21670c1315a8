"""SigLIP's sigmoid loss in memory that grows with n, not with n * n.

`losses.siglip_loss` keeps several [n, n] matrices until the backward pass: 32,768 pairs need 24 GiB. But the
loss is a sum over pairs, and the derivative of each term is known as soon as its logit is. So texts are
processed in chunks: each [n, chunk] block of logits is added to the loss and to the gradients right away, and
then freed. The backward pass only scales the gradients. Loss, gradients and the number of matrix products are
those of the plain form. A softmax would need two passes, because it needs complete rows first.
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
    """Like `losses.siglip_loss`, but differentiable only once.

    Args:
        image_embeds, text_embeds: [n, D]; picture i matches text i.
        logit_scale: log of the inverse temperature.
        logit_bias: added to every logit.
        negative_only: no pair matches. For a block of texts [m, D] that belong to other pictures.
        chunk: texts per block [n, chunk].

    Raises ValueError: pictures and texts do not pair up, or `chunk` is not positive.
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
    """The loss of vectors of length 1, [n, D] and [m, D]. `forward` computes the gradients, too."""

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
        # Many small numbers are added to a large one: bfloat16 would lose most of them.
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
        if torch.is_grad_enabled():  # requested with create_graph=True
            raise RuntimeError("the chunked loss is differentiable once: use losses.siglip_loss")
        return *(grad * x for x in ctx.saved_tensors), None, None, None


def _add_chunk(
    inputs: tuple[Tensor, ...], chunk: slice, negative_only: bool, sums: list[Tensor] | None
) -> Tensor:
    """The loss of all pictures with one chunk of texts, summed. Also adds to the sums of gradients, if given.

    A separate function, so that its [n, chunk] matrices are freed before the next ones are allocated.
    """
    images, texts, factor, bias = inputs
    texts = texts[chunk]
    cosines = images @ texts.T  # [n, chunk]
    logits = factor * cosines + bias  # negated below where a pair matches
    matching = logits[chunk].diagonal()  # picture i with text i
    if not negative_only:
        matching.neg_()
    loss = -F.logsigmoid(-logits).sum()
    if sums is None:
        return loss
    slope = logits.sigmoid_()  # derivative of the loss with respect to the logits
    if not negative_only:
        matching.neg_()
    image_grad, text_grad, factor_grad, bias_grad = sums
    image_grad += slope @ texts
    text_grad[chunk] += slope.T @ images
    factor_grad += (slope * cosines).sum()
    bias_grad += slope.sum()
    return loss
