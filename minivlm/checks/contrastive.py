"""Checks for 02_clip_and_siglip: cross-entropy of rows, log-sigmoid, log-sum-exp by blocks, zero-shot."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from minivlm.checks import call, expect, expect_tensor, right, same
from minivlm.losses import l2_normalize, similarity


class solutions:
    """The exercises' functions as the rest of the notebook uses them."""

    @staticmethod
    def cross_entropy_rows(logits: Tensor) -> Tensor:
        """logits [n, n] -> the mean over the rows of -log softmax(row) at the diagonal."""
        largest = logits.max(dim=1, keepdim=True).values  # [n, 1]
        log_sum = largest[:, 0] + (logits - largest).exp().sum(dim=1).log()  # [n]
        return (log_sum - logits.diagonal()).mean()

    @staticmethod
    def log_sigmoid(x: Tensor) -> Tensor:
        """log(sigmoid(x)) of every number, exact for large and small ones."""
        return x.clamp(max=0) - torch.log1p(torch.exp(-x.abs()))

    @staticmethod
    def row_log_sum_exp(blocks: Iterable[Tensor]) -> Tensor:
        """Blocks [n, b] of columns, each seen once -> log(sum(exp(row))) of the whole rows, [n]."""
        largest, total = torch.tensor(-torch.inf), torch.tensor(0.0)
        for block in blocks:
            new = torch.maximum(largest, block.max(dim=1).values)  # [n]
            total = total * (largest - new).exp() + (block - new[:, None]).exp().sum(dim=1)
            largest = new
        return largest + total.log()

    @staticmethod
    def zero_shot(image_embeds: Tensor, prompt_embeds: Tensor) -> Tensor:
        """image_embeds [n, D], prompt_embeds [classes, prompts, D] -> the class of each picture, [n]."""
        class_embeds = l2_normalize(prompt_embeds).mean(dim=1)  # [classes, D]
        return similarity(image_embeds, class_embeds).argmax(dim=1)


def cross_entropy_rows(answer: Callable[..., Any]) -> None:
    """Logits of ordinary size, where mistakes show, then logits that overflow."""
    logits = _noise(5, 5) * 3
    result = call(answer, logits.clone())
    rows = logits.logsumexp(dim=1) - logits.diagonal()
    columns = logits.logsumexp(dim=0) - logits.diagonal()
    mistakes = {
        "you compared down the columns, which is text -> picture: a row holds all texts of one picture, so "
        "sum over dim=1": columns.mean(),
        "you took the mean of rows and columns, which is the whole CLIP loss: here we want only the rows": (
            rows.mean() + columns.mean()
        )
        / 2,
        "you summed the rows: take their mean, otherwise the loss grows with the batch": rows.sum(),
        "you divided by n * n: the sum has n terms, one per row": rows.sum() / 25,
        "the sign is wrong: the loss is -log(probability), a positive number": -rows.mean(),
        "you took the probability itself: the loss is its negative logarithm": -(-rows).exp().mean(),
        "this is the logarithm of the mean probability: take the logarithm of each row, then the mean": (
            -(-rows).exp().mean().log()
        ),
        "the logit of the right pair is missing: log-sum-exp minus the diagonal": logits.logsumexp(1).mean(),
    }
    for hint, mistake in mistakes.items():
        expect(not same(result, mistake), hint)
    if isinstance(result, Tensor):
        expect(
            tuple(result.shape) != (5,),
            "there is one loss per row, and we want one number: take their mean",
        )
    expect_tensor(result, rows.mean(), "the loss")
    large = torch.tensor([[100.0, 300.0, 0.0], [-400.0, 200.0, 0.0], [0.0, -100.0, 500.0]])
    result = call(answer, large.clone())
    expect(
        not torch.isnan(result).any(),
        "right for small logits, but NaN for a logit of 300: exp overflows to infinity. Subtract each "
        "row's largest logit before exp, and add it back after the logarithm",
    )
    expect(
        not torch.isinf(result).any(),
        "right for small logits, but infinite for large ones: either exp overflows, or a probability is "
        "rounded to 0 before its logarithm is taken. Stay in log space: the loss of a row is "
        "largest + log(sum(exp(row - largest))) - right",
    )
    expect_tensor(result, (large.logsumexp(dim=1) - large.diagonal()).mean(), "the loss of large logits")
    right("the same as F.cross_entropy, and a logit of 500 does no harm.")


def log_sigmoid(answer: Callable[..., Any]) -> None:
    """Numbers around zero, far below, far above, and where 1 + exp(-x) rounds to 1."""
    usual = torch.tensor([[-3.0, -1.0, 0.0], [0.5, 2.0, 4.0]])
    result = call(answer, usual.clone())
    truth = usual.sigmoid().log()
    mistakes = {
        "the sign is wrong: the logarithm of a probability is negative": -truth,
        "this is the sigmoid without the logarithm": usual.sigmoid(),
        "this is log(sigmoid(-x)), the log-probability of the opposite": (-usual).sigmoid().log(),
        "this is min(x, 0) alone: the second part, -log(1 + exp(-|x|)), is missing": usual.clamp(max=0),
        "you subtracted log(1 + exp(-|x|)) from x: use min(x, 0), which is 0 where x is positive": (
            usual - torch.log1p((-usual.abs()).exp())
        ),
        "the second part has the wrong sign: it is subtracted": (
            usual.clamp(max=0) + torch.log1p((-usual.abs()).exp())
        ),
        "the exponent of the second part has the wrong sign: exp(-|x|) is never above 1": (
            usual.clamp(max=0) - torch.log1p(usual.abs().exp())
        ),
    }
    for hint, mistake in mistakes.items():
        expect(not same(result, mistake), hint)
    expect_tensor(result, truth, "log(sigmoid(x))")
    far = torch.tensor([-300.0, -120.0, 120.0, 300.0])
    result = call(answer, far.clone())
    expect(
        bool(torch.isfinite(result[:2]).all()),
        "right near zero, but not finite at -120: either exp(120) overflows, or sigmoid is rounded to 0 "
        "before the logarithm. Use exp(-|x|), which lies between 0 and 1",
    )
    expect(
        bool(torch.isfinite(result[2:]).all()),
        "right for negative numbers, but not finite at 120: exp(120) overflows. Use exp(-|x|), which lies "
        "between 0 and 1",
    )
    expect_tensor(result, torch.tensor([-300.0, -120.0, 0.0, 0.0]), "far from zero, log(sigmoid(x))")
    result = call(answer, torch.tensor([20.0]))
    expect(
        abs(float(result) / -2.0611537e-09 - 1) < 0.01,
        f"at x = 20 it should be -2.06e-09, but yours is {float(result):.3g}: 1 + exp(-20) is rounded to 1 "
        "in fp32. torch.log1p(y) is log(1 + y) without that rounding",
    )
    right("the same as F.logsigmoid: finite for every number, and no digit lost at 20.")


def row_log_sum_exp(answer: Callable[..., Any]) -> None:
    """Blocks of unequal width that can be read only once; the largest number comes late."""
    whole = _noise(4, 12) * 4
    whole[:, 9] += 6
    widths = [3, 2, 4, 3]
    blocks = whole.split(widths, dim=1)
    result = call(answer, (block.clone() for block in blocks))
    truth = whole.logsumexp(dim=1)
    largest = whole.max(dim=1).values
    unscaled = torch.zeros(4)
    running = torch.full((4,), -torch.inf)
    for block in blocks:
        running = torch.maximum(running, block.max(dim=1).values)
        unscaled = unscaled + (block - running[:, None]).exp().sum(dim=1)
    mistakes = {
        "when the largest number grows, the sum so far is relative to the old one: multiply it by "
        "exp(old - new) before you add": running + unscaled.log(),
        "you added the log-sum-exp of the blocks: sums of exp add up, their logarithms do not": sum(
            block.logsumexp(dim=1) for block in blocks
        ),
        "this is the log-sum-exp of the last block alone": blocks[-1].logsumexp(dim=1),
        "this is the logarithm of the sum relative to the largest number: add the largest number back": (
            truth - largest
        ),
        "this is the largest number of each row, not the log-sum-exp": largest,
        "this is the sum: its logarithm is missing": truth.exp(),
    }
    for hint, mistake in mistakes.items():
        expect(not same(result, torch.as_tensor(mistake)), hint)
    if isinstance(result, Tensor):
        expect(
            tuple(result.shape) != (12,),
            "there is one number per column: blocks hold columns, so a row continues from block to block",
        )
        expect(
            tuple(result.shape) != (4, 1), "the shape is [n, 1]: drop the last axis, one number per row, [n]"
        )
    expect_tensor(result, truth, "the log-sum-exp")
    large = (whole * 30).split(widths, dim=1)
    result = call(answer, (block.clone() for block in large))
    expect(
        bool(torch.isfinite(result).all()),
        "right for small numbers, but not finite for large ones: keep the largest number of each row so "
        "far, and take exp only of the differences from it",
    )
    expect_tensor(result, (whole * 30).logsumexp(dim=1), "the log-sum-exp of large numbers")
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watched() -> Iterator[Tensor]:
        nonlocal most
        for part in _noise(4, 60).split(5, dim=1):
            block = part.clone()
            alive.append(weakref.ref(block))
            yield block
            del block
            most = max(most, sum(reference() is not None for reference in alive))

    call(answer, watched())
    expect(
        most <= 2,
        f"the result is right, but you kept {most} blocks at the same time: keep two numbers per row, the "
        "largest so far and the sum so far, and let go of each block",
    )
    right("one block at a time, and the result is that of the whole row.")


def zero_shot(answer: Callable[..., Any]) -> None:
    """Prompts of very different lengths, so that each missing normalization changes some class."""
    image_embeds = _noise(64, 6)
    prompt_embeds = _noise(5, 4, 6) * torch.linspace(0.2, 6, 20)[_order(20)].view(5, 4, 1)
    prompt_embeds[0] = prompt_embeds[0, :1] + 0.1 * prompt_embeds[0]  # four prompts that mean the same
    result = call(answer, image_embeds.clone(), prompt_embeds.clone())
    unit = l2_normalize(prompt_embeds)
    cosines = similarity(image_embeds, unit.flatten(0, 1)).view(64, 5, 4)
    mistakes = {
        "the prompts have different lengths, and the long ones outvote the short ones: normalize each prompt "
        "before you take the mean": similarity(image_embeds, prompt_embeds.mean(dim=1)).argmax(dim=1),
        "the mean of several directions is shorter the more they differ, which puts that class at a "
        "disadvantage: normalize again after the mean": (l2_normalize(image_embeds) @ unit.mean(1).T).argmax(
            1
        ),
        "you took the best single prompt: take the mean of the prompts' vectors": cosines.amax(dim=2).argmax(
            1
        ),
        "nothing is normalized: long vectors win": (image_embeds @ prompt_embeds.mean(dim=1).T).argmax(dim=1),
        "this is the least similar class: take argmax": (
            similarity(image_embeds, unit.mean(dim=1)).argmin(dim=1)
        ),
    }
    for hint, mistake in mistakes.items():
        expect(not same(result, mistake), hint)
    if isinstance(result, Tensor):
        expect(
            tuple(result.shape) != (64, 5),
            "these are the similarities with each class: take the argmax over the classes",
        )
        expect(
            tuple(result.shape) != (5,),
            "this is the best picture of each class: we want the best class of each picture, argmax(dim=1)",
        )
        expect(
            not result.dtype.is_floating_point,
            "these are similarities or probabilities: argmax gives the index of the class",
        )
    expect_tensor(result, solutions.zero_shot(image_embeds, prompt_embeds), "the classes")
    right("a classifier made of sentences, with no training picture of its own.")


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(1))
