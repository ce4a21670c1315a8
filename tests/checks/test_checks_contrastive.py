"""The checks of 02_clip_and_siglip accept right answers and name the mistake in wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.checks import NotYet, contrastive
from minivlm.checks.contrastive import solutions
from minivlm.losses import l2_normalize, similarity

Answer = Callable[..., Any]


@pytest.mark.parametrize("name", ["siglip_of_logits", "zero_shot", "encode_text", "row_log_sum_exp"])
def test_rejects_something_else_than_a_tensor(name: str) -> None:
    with pytest.raises(NotYet, match="should be a tensor"):
        getattr(contrastive, name)(lambda *_: 1.0)


def _signs(x: Tensor) -> Tensor:
    return 2 * torch.eye(len(x)) - 1


def _pairs(x: Tensor) -> Tensor:
    return -F.logsigmoid(_signs(x) * x)


def _rows(x: Tensor) -> Tensor:
    return F.cross_entropy(x, torch.arange(len(x)))


def _off_diagonal(x: Tensor) -> Tensor:
    return _pairs(x)[~torch.eye(len(x)).bool()]


SIGLIPS: list[tuple[Answer, str]] = [
    (lambda x: _pairs(x).mean(), "n times too small"),
    (lambda x: _pairs(x).sum(), "grow with the batch"),
    (lambda x: -_pairs(x).sum() / len(x), "sign is wrong"),
    (lambda x: -F.logsigmoid(x).sum() / len(x), "every pair counts as right"),
    (lambda x: -F.logsigmoid(-x).sum() / len(x), "every pair counts as wrong"),
    (lambda x: -F.logsigmoid(-_signs(x) * x).sum() / len(x), "turned around"),
    (lambda x: -F.logsigmoid(x).diagonal().mean(), "only the right pairs"),
    (lambda x: _off_diagonal(x).sum() / len(x), "only the wrong pairs"),
    (lambda x: -F.logsigmoid(torch.eye(len(x)) * x).sum() / len(x), "label 0"),
    (lambda x: -torch.sigmoid(_signs(x) * x).sum() / len(x), "without logarithm"),
    (_rows, "softmax over each row"),
    (lambda x: _rows(x.T), "softmax over each column"),
    (lambda x: (_rows(x) + _rows(x.T)) / 2, "CLIP's loss"),
    (lambda x: _pairs(x).diagonal().mean() + _off_diagonal(x).mean(), "one mean each"),
    (_pairs, "single pairs"),
    (lambda x: _pairs(x).sum(dim=1), "single pairs"),
    (lambda x: -torch.sigmoid(_signs(x) * x).log().sum() / len(x), "not finite"),
    (lambda x: (1 + (-_signs(x) * x).exp()).log().sum() / len(x), "not finite"),
    (
        lambda x: F.binary_cross_entropy_with_logits(x, torch.eye(len(x)), reduction="sum") / len(x),
        "the library's loss",
    ),
    (lambda x: F.soft_margin_loss(x, _signs(x), reduction="sum") / len(x), "the library's loss"),
    (lambda x: (_pairs(x).sum() / len(x)).detach(), "carries no gradient"),
    (lambda x: torch.tensor(_pairs(x).sum().item() / len(x)), "carries no gradient"),
]


@pytest.mark.parametrize(("answer", "hint"), SIGLIPS)
def test_siglip_of_logits_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        contrastive.siglip_of_logits(answer)


def _by_loops(x: Tensor) -> Tensor:
    total = torch.zeros(())
    for i in range(len(x)):
        for j in range(len(x)):
            total = total - F.logsigmoid(x[i, j] if i == j else -x[i, j])
    return total / len(x)


def _by_hand(x: Tensor) -> Tensor:
    z = torch.full_like(x, -1).fill_diagonal_(1) * x
    return (torch.log1p(torch.exp(-z.abs())) - z.clamp(max=0)).sum(dim=1).mean()


SOUND_SIGLIPS: list[Answer] = [
    _by_loops,
    _by_hand,
    lambda x: F.softplus(-_signs(x) * x).sum() / len(x),
    lambda x: (F.softplus(x).sum() - x.trace()) / len(x),
    lambda x: _pairs(x).double().sum() / len(x),
    lambda x: _pairs(x.mul_(1)).sum(dim=0).mean() if not x.requires_grad else _pairs(x).sum(dim=0).mean(),
]


@pytest.mark.parametrize("sound", SOUND_SIGLIPS)
def test_siglip_of_logits_accepts_other_forms(sound: Answer) -> None:
    contrastive.siglip_of_logits(sound)


def _but(**changed: Any) -> Answer:
    return lambda: {**solutions.predict_changes(), **changed}


PREDICTIONS: list[tuple[Answer, str]] = [
    (_but(level="both"), "multiplies numerator and denominator"),
    (_but(level="neither"), "what its bias does"),
    (_but(level="CLIP"), "CLIP does not notice"),
    (_but(row="SigLIP"), "each column has one raised entry"),
    (_but(row="neither"), "four sigmoids move"),
    (_but(order="both"), "a batch has no order"),
    (_but(order="CLIP"), "every pair still meets"),
    (_but(captions="neither"), "have left the diagonal"),
    (_but(captions="CLIP"), "captions: you say CLIP, it is both"),
    (_but(transposed="CLIP"), "rows become columns"),
    (_but(transposed="both"), "neither can tell"),
    (_but(level="no idea"), "choose one of"),
    (_but(diagonal="both"), "no change called diagonal"),
    (lambda: {"level": "SigLIP"}, "no prediction yet for: row, order"),
    (lambda: ["SigLIP"], "return a dict"),
]


@pytest.mark.parametrize(("answer", "hint"), PREDICTIONS)
def test_predict_changes_explains_each(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        contrastive.predict_changes(answer)


def test_the_predictions_are_true() -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    other = [1, 0, 2, 3]
    row = x.clone()
    row[0] += 5
    changed = {"level": x + 5, "row": row, "order": x[other][:, other], "captions": x[:, other]}
    changed["transposed"] = x.T
    losses = {"CLIP": lambda x: (_rows(x) + _rows(x.T)) / 2, "SigLIP": solutions.siglip_of_logits}
    for key, said in solutions.predict_changes().items():
        moved = [name for name, of in losses.items() if not torch.allclose(of(changed[key]), of(x))]
        assert said == {0: "neither", 1: "".join(moved), 2: "both"}[len(moved)]


def _means(images: Tensor, prompts: Tensor) -> Tensor:
    return similarity(images, l2_normalize(prompts).mean(1))


def _single(images: Tensor, prompts: Tensor) -> Tensor:
    return similarity(images, prompts.flatten(0, 1)).view(len(images), len(prompts), -1)


ZERO_SHOTS: list[tuple[Answer, str]] = [
    (lambda images, prompts: similarity(images, prompts.mean(1)).argmax(1), "outvote"),
    (
        lambda images, prompts: (l2_normalize(images) @ l2_normalize(prompts).mean(1).T).argmax(1),
        "again after",
    ),
    (lambda images, prompts: _single(images, prompts).amax(2).argmax(1), "best single prompt"),
    (lambda images, prompts: similarity(images, prompts[:, 0]).argmax(1), "first prompt"),
    (lambda images, prompts: _single(images, prompts).flatten(1).argmax(1), "best prompt among all"),
    (lambda images, prompts: _single(images, prompts).argmax(1).mode(dim=1).values, "counted votes"),
    (lambda images, prompts: (images @ prompts.mean(1).T).argmax(1), "nothing is normalized"),
    (lambda images, prompts: _means(images, prompts).argmin(1), "least similar"),
    (lambda images, prompts: _means(images, prompts).argmax(1) + 1, "count from 0"),
    (_means, "similarities with each class"),
    (lambda images, prompts: _means(images, prompts).argmax(0), "best picture"),
    (lambda images, prompts: similarity(images, l2_normalize(prompts).mean(0)), "axis 1"),
    (lambda images, prompts: _means(images, prompts).amax(1), "index of the class"),
]


@pytest.mark.parametrize(("answer", "hint"), ZERO_SHOTS)
def test_zero_shot_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        contrastive.zero_shot(answer)


SOUND_ZERO_SHOTS: list[Answer] = [
    # The length of a picture's vector does not change which class is most similar.
    lambda images, prompts: (images @ l2_normalize(l2_normalize(prompts).mean(dim=1)).T).argmax(dim=1),
    lambda images, prompts: similarity(images, l2_normalize(prompts).sum(dim=1)).max(dim=1).indices,
    lambda images, prompts: _means(images, prompts).argmax(1).int(),
]


@pytest.mark.parametrize("sound", SOUND_ZERO_SHOTS)
def test_zero_shot_accepts_other_forms(sound: Answer) -> None:
    contrastive.zero_shot(sound)


def _tower(
    tower: Any,
    ids: Tensor,
    end: int,
    allowed: Callable[[Tensor], Tensor | None] = torch.tril,
    place: Callable[[Tensor, int], Tensor] = lambda ids, end: (ids == end).int().argmax(1),
    blocks: slice = slice(None),
    norm: bool = True,
) -> Tensor:
    mask = allowed(torch.ones(ids.shape[1], ids.shape[1]))
    x = tower.embeddings(ids)
    for layer in tower.layers[blocks]:
        x = layer(x, None if mask is None else mask.bool())
    x = tower.final_layer_norm(x) if norm else x
    return x[torch.arange(len(ids)), place(ids, end)]


def _with(**how: Any) -> Answer:
    return lambda tower, ids, end: _tower(tower, ids, end, **how)


def _all_places(tower: Any, ids: Tensor, end: int) -> Tensor:
    return torch.stack([_tower(tower, ids, end, place=lambda *_, i=i: i) for i in range(ids.shape[1])], 1)


def _first_block_masked(tower: Any, ids: Tensor, end: int) -> Tensor:
    x = tower.embeddings(ids)
    x = tower.layers[0](x, torch.ones(ids.shape[1], ids.shape[1]).tril().bool())
    x = tower.final_layer_norm(tower.layers[1](x))
    return x[torch.arange(len(ids)), (ids == end).int().argmax(1)]


def _not_chained(tower: Any, ids: Tensor, end: int) -> Tensor:
    embedded = tower.embeddings(ids)
    for layer in tower.layers:
        x = layer(embedded, torch.ones(ids.shape[1], ids.shape[1]).tril().bool())
    return tower.final_layer_norm(x)[torch.arange(len(ids)), (ids == end).int().argmax(1)]


def _pick_from_all(tower: Any, ids: Tensor, end: int) -> Tensor:
    return _all_places(tower, ids, end)[:, (ids == end).int().argmax(1)]


TOWERS: list[tuple[Answer, str]] = [
    (_with(place=lambda ids, end: -1), "last place"),
    (_with(place=lambda ids, end: ids.argmax(1)), "highest id"),
    (
        _with(place=lambda ids, end: ids.shape[1] - 1 - (ids == end).flip(1).int().argmax(1)),
        "last end token of a text",
    ),
    (_with(place=lambda ids, end: (ids == end).int().argmax(1) - 1), "one place before"),
    (_with(place=lambda ids, end: 0), "first token, which"),
    (lambda tower, ids, end: _all_places(tower, ids, end).mean(1), "mean over all places"),
    (_with(allowed=lambda ones: None), "every token sees every other"),
    (_with(allowed=torch.triu), "turned around"),
    (_with(allowed=lambda ones: ones.tril(-1)), "keep the diagonal"),
    (_with(norm=False), "last norm is missing"),
    (_with(blocks=slice(0)), "blocks are missing"),
    (_with(blocks=slice(1)), "only the first block"),
    (_not_chained, "the block before it"),
    (_first_block_masked, "first block only"),
    (_all_places, "pick the one at the end token"),
    (_pick_from_all, "every place from every text"),
    (lambda tower, ids, end: _all_places(tower, ids, end)[ids == end], "first one of each text"),
    (lambda tower, ids, end: tower(ids), "not callable"),
]


@pytest.mark.parametrize(("answer", "hint"), TOWERS)
def test_encode_text_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        contrastive.encode_text(answer)


def _other_mask(tower: Any, ids: Tensor, end: int) -> Tensor:
    """A mask with all axes, a mask by comparison, and gather."""
    places = torch.arange(ids.shape[1])
    x = tower.embeddings(ids)
    for layer in tower.layers:
        x = layer(x, (places[None, :] <= places[:, None])[None, None])
    where = torch.stack([(row == end).nonzero()[0, 0] for row in ids])
    return tower.final_layer_norm(x).gather(1, where[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]


def _text_by_text(tower: Any, ids: Tensor, end: int) -> Tensor:
    """Cut after the end token, so that the last place is the right one."""
    cut = [row[: row.tolist().index(end) + 1][None] for row in ids]
    return torch.cat([_tower(tower, row, end, place=lambda *_: -1) for row in cut])


@pytest.mark.parametrize("sound", [_tower, _other_mask, _text_by_text])
def test_encode_text_accepts_other_forms(sound: Answer) -> None:
    contrastive.encode_text(sound)


def test_encode_text_is_the_packages_tower() -> None:
    tower = contrastive._text_tower()
    texts = contrastive._TEXTS
    theirs = tower.pool(tower(texts), texts)
    assert torch.allclose(solutions.encode_text(tower, texts, contrastive._END), theirs, atol=1e-5)


FAULTS: list[tuple[Answer, str]] = [
    (lambda: "words", "wherever they stand"),
    (lambda: "positions", "Swap two words"),
    (lambda: "mask", "in place of the padding"),
    (lambda: " Mask ", "in place of the padding"),
    (lambda: "blocks", "choose one of words, positions"),
    (lambda: "norm", "is no step"),
    (lambda: "projection", "is no step"),
    (lambda: "", "is no step"),
    (lambda: "the end", "is no step"),
    (lambda: 2, "the name of a step"),
    (lambda: ["end"], "the name of a step"),
]


@pytest.mark.parametrize(("answer", "hint"), FAULTS)
def test_find_fault_says_what_one_would_have_seen(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        contrastive.find_fault(answer)


def test_the_broken_tower_does_what_the_hints_say() -> None:
    tower, end = contrastive._text_tower(), 3
    broken = contrastive.broken_text_tower(tower, end)

    def equal(a: list[int], b: list[int]) -> bool:
        return torch.allclose(broken(torch.tensor([a])), broken(torch.tensor([b])), atol=1e-5)

    star = [1, 2, 7, 6, 9, 3, 0]  # the highest id comes last
    assert not equal(star, [1, 2, 7, 5, 9, 3, 0])  # another color in front of the highest id
    assert equal([1, 2, 7, 6, 4, 3, 0], [1, 2, 7, 5, 4, 3, 0])  # another color behind it
    assert not equal(star, [1, 2, 6, 7, 9, 3, 0])  # two words swapped
    assert equal(star, [1, 2, 7, 6, 9, 3, 2])  # `a` in place of the padding


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
