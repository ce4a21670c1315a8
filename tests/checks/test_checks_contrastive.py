"""The checks of 02_clip_and_siglip accept right answers and name the mistake in wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.checks import NotYet, contrastive
from minivlm.losses import l2_normalize, similarity

NAMES = ("cross_entropy_rows", "log_sigmoid", "row_log_sum_exp", "zero_shot")
Answer = Callable[..., Any]


@pytest.mark.parametrize("name", NAMES)
def test_rejects_something_else_than_a_tensor(name: str) -> None:
    with pytest.raises(NotYet, match="should be a tensor"):
        getattr(contrastive, name)(lambda *_: 1.0)


def _rows(logits: Tensor) -> Tensor:
    return logits.logsumexp(dim=1) - logits.diagonal()


def _exp_first(logits: Tensor) -> Tensor:
    return (logits.exp().sum(dim=1).log() - logits.diagonal()).mean()


def _safe_softmax_then_log(logits: Tensor) -> Tensor:
    return -logits.softmax(dim=1).diagonal().log().mean()


def _naive_softmax(logits: Tensor) -> Tensor:
    return -(logits.exp() / logits.exp().sum(dim=1, keepdim=True)).diagonal().log().mean()


ROWS: list[tuple[Answer, str]] = [
    (lambda logits: _rows(logits.T).mean(), "down the columns"),
    (lambda logits: (_rows(logits).mean() + _rows(logits.T).mean()) / 2, "only the rows"),
    (lambda logits: _rows(logits).sum(), "grows with the batch"),
    (lambda logits: _rows(logits).sum() / logits.numel(), "one per row"),
    (lambda logits: -_rows(logits).mean(), "sign"),
    (lambda logits: -logits.softmax(dim=1).diagonal().mean(), "negative logarithm"),
    (lambda logits: -logits.softmax(dim=1).diagonal().mean().log(), "logarithm of the mean"),
    (lambda logits: logits.logsumexp(dim=1).mean(), "right pair is missing"),
    (_rows, "one loss per row"),
    (_naive_softmax, "NaN"),
    (_exp_first, "infinite for large"),
    (_safe_softmax_then_log, "rounded to 0"),
    (lambda logits: _rows(logits).mean() + 1, "off by"),
]


@pytest.mark.parametrize(("answer", "hint"), ROWS)
def test_cross_entropy_rows_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        contrastive.cross_entropy_rows(answer)


def _second(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs()))


LOG_SIGMOIDS: list[tuple[Answer, str]] = [
    (lambda x: -F.logsigmoid(x), "sign is wrong"),
    (torch.sigmoid, "without the logarithm"),
    (lambda x: F.logsigmoid(-x), "opposite"),
    (lambda x: x.clamp(max=0), "second part"),
    (lambda x: x - _second(x), r"use min\(x, 0\)"),
    (lambda x: x.clamp(max=0) + _second(x), "it is subtracted"),
    (lambda x: x.clamp(max=0) - torch.log1p(torch.exp(x.abs())), "never above 1"),
    (lambda x: x.sigmoid().log(), "not finite at -120"),
    (lambda x: -torch.log(1 + torch.exp(-x)), "not finite at -120"),
    (lambda x: x - torch.log(1 + torch.exp(x)), "not finite at 120"),
    (lambda x: x.clamp(max=0) - torch.log(1 + torch.exp(-x.abs())), "log1p"),
]


@pytest.mark.parametrize(("answer", "hint"), LOG_SIGMOIDS)
def test_log_sigmoid_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        contrastive.log_sigmoid(answer)


def _streamed(blocks: Iterable[Tensor], rescale: bool = True, again: bool = True) -> Tensor:
    largest, total = torch.tensor(-torch.inf), torch.tensor(0.0)
    for block in blocks:
        new = torch.maximum(largest, block.max(dim=1).values)
        if rescale:
            total = total * (largest - new).exp()
        total = total + (block - new[:, None]).exp().sum(dim=1)
        largest = new
    return largest + total.log() if again else total.log()


def _joined(blocks: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(blocks), dim=1)


BLOCKS: list[tuple[Answer, str]] = [
    (lambda blocks: _streamed(blocks, rescale=False), "multiply it by"),
    (lambda blocks: sum(block.logsumexp(dim=1) for block in blocks), "their logarithms do not"),
    (lambda blocks: [block.logsumexp(dim=1) for block in blocks][-1], "last block alone"),
    (lambda blocks: _streamed(blocks, again=False), "add the largest number back"),
    (lambda blocks: _joined(blocks).max(dim=1).values, "largest number of each row, not"),
    (lambda blocks: _joined(blocks).exp().sum(dim=1), "logarithm is missing"),
    (lambda blocks: _joined(blocks).logsumexp(dim=0), "one number per column"),
    (lambda blocks: _streamed(blocks)[:, None], "drop the last axis"),
    (lambda blocks: sum(block.exp().sum(dim=1) for block in blocks).log(), "not finite"),
    (lambda blocks: _joined(blocks).logsumexp(dim=1), "12 blocks at the same time"),
]


@pytest.mark.parametrize(("answer", "hint"), BLOCKS)
def test_row_log_sum_exp_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        contrastive.row_log_sum_exp(answer)


def test_row_log_sum_exp_accepts_sums_of_the_blocks_own_results() -> None:
    """Another right way: the log-sum-exp of the log-sum-exps."""

    def pairwise(blocks: Iterable[Tensor]) -> Tensor:
        result: Tensor | None = None
        for block in blocks:
            part = block.logsumexp(dim=1)
            result = part if result is None else torch.logaddexp(result, part)
        assert result is not None
        return result

    contrastive.row_log_sum_exp(pairwise)


ZERO_SHOTS: list[tuple[Answer, str]] = [
    (lambda images, prompts: similarity(images, prompts.mean(1)).argmax(1), "outvote"),
    (
        lambda images, prompts: (l2_normalize(images) @ l2_normalize(prompts).mean(1).T).argmax(1),
        "again after",
    ),
    (
        lambda images, prompts: (
            similarity(images, prompts.flatten(0, 1)).view(len(images), len(prompts), -1).amax(2).argmax(1)
        ),
        "best single prompt",
    ),
    (lambda images, prompts: (images @ prompts.mean(1).T).argmax(1), "nothing is normalized"),
    (lambda images, prompts: similarity(images, l2_normalize(prompts).mean(1)).argmin(1), "least similar"),
    (
        lambda images, prompts: similarity(images, l2_normalize(prompts).mean(1)),
        "similarities with each class",
    ),
    (lambda images, prompts: similarity(images, l2_normalize(prompts).mean(1)).argmax(0), "best picture"),
    (
        lambda images, prompts: similarity(images, l2_normalize(prompts).mean(1)).amax(1),
        "index of the class",
    ),
    (lambda images, prompts: similarity(images, prompts[:, 0]).argmax(1), "off by"),
]


@pytest.mark.parametrize(("answer", "hint"), ZERO_SHOTS)
def test_zero_shot_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        contrastive.zero_shot(answer)


def test_zero_shot_accepts_unnormalized_pictures() -> None:
    """The length of a picture's vector does not change which class is most similar."""

    def answer(images: Tensor, prompts: Tensor) -> Tensor:
        return (images @ l2_normalize(l2_normalize(prompts).mean(dim=1)).T).argmax(dim=1)

    contrastive.zero_shot(answer)
