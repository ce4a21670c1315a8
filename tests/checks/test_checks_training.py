"""The checks of 07_training accept the solutions and say what is wrong with likely mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from notebooks_and_sources import ROOT, read_cells
from torch import Tensor, nn

from minivlm import checks
from minivlm.checks import NotYet

NOTEBOOK = ROOT / "notebooks" / "07_training.ipynb"
EXERCISES = ("make_labels", "packed_mask", "rate_factor", "rate_groups", "backward_in_parts")


def blank(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("your turn")


def labeled(ids: Tensor, types: Tensor) -> Tensor:
    return ids.masked_fill(types == 0, -100)


def packed(combine: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A mask from its four ingredients: key is image, own block, key in the past, key is prompt."""

    def mask(blocks: Tensor, positions: Tensor, types: Tensor) -> Tensor:
        own = blocks[:, :, None] == blocks[:, None, :]
        past = positions[:, None, :] <= positions[:, :, None]
        return combine((blocks == 0)[:, None, :], own, past, (types == 0)[:, None, :])

    return mask


def all_see_padding(blocks: Tensor, positions: Tensor, types: Tensor) -> Tensor:
    right = packed(lambda image, own, past, prompt: image | (own & (past | prompt)))
    return right(blocks, positions, types) | (blocks < 0)[:, None, :]


def image_sees_questions(blocks: Tensor, positions: Tensor, types: Tensor) -> Tensor:
    right = packed(lambda image, own, past, prompt: image | (own & (past | prompt)))
    seen = (blocks == 0)[:, :, None] & (types == 0)[:, None, :] & (blocks >= 0)[:, None, :]
    return right(blocks, positions, types) | seen


def groups(
    tower: float | None, others: float, *, frozen: bool = False, projector: bool = True
) -> Callable[..., Any]:
    """Groups with these factors; None puts the tower with the others."""

    def make(model: nn.Module, rate: float, factor: float) -> list[dict[str, Any]]:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad or frozen]
        named = [(n, p) for n, p in named if projector or "projector" not in n]
        if tower is None:
            return [{"params": [p for _, p in named], "lr": rate}]
        return [
            {"params": [p for n, p in named if "tower" in n], "lr": rate * tower},
            {"params": [p for n, p in named if "tower" not in n], "lr": rate * others},
        ]

    return make


def in_two_groups(model: nn.Module, rate: float, factor: float) -> list[dict[str, Any]]:
    learning = [p for p in model.parameters() if p.requires_grad]
    tower = [p for name, p in model.named_parameters() if "tower" in name]
    return [{"params": tower, "lr": rate * factor}, {"params": learning, "lr": rate}]


def tower_at_the_factor(model: nn.Module, rate: float, factor: float) -> list[dict[str, Any]]:
    return groups(factor / rate, 1.0)(model, rate, factor)


def backward(
    share: Callable[[int, int, int], float], *, only_last: bool = False, returns: float | None = None
) -> Callable[..., float]:
    """Parts scaled by share(tokens of the part, tokens of all, number of parts)."""

    def run(loss_of: Callable[..., Tensor], parts: list[dict[str, Tensor]]) -> float:
        tokens = [int((part["labels"] != -100).sum()) for part in parts]
        total = 0.0
        for number, (part, count) in enumerate(zip(parts, tokens, strict=True)):
            loss = loss_of(part) * share(count, sum(tokens), len(parts))
            if not only_last or number == len(parts) - 1:
                loss.backward()
            total += loss.item()
        return total if returns is None else returns

    return run


def at(formula: Callable[[int, int, int], Any]) -> Callable[..., Any]:
    return formula


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("make_labels", lambda i, t: i.masked_fill_(t == 0, -100), "writes into the input_ids"),
    ("make_labels", lambda i, t: i.masked_fill(t == 1, -100), "other way around"),
    ("make_labels", lambda i, t: i * t, "a word of the vocabulary"),
    ("make_labels", lambda i, t: i.clone(), "the prompt has labels: the model is not asked"),
    (
        "make_labels",
        lambda i, t: i.masked_fill(i == 7, -100),
        "the prompt has labels: the model is not asked",
    ),
    ("make_labels", lambda i, t: labeled(i, t).roll(-1, dims=1), "shifted by one"),
    ("make_labels", lambda i, t: labeled(i, t).masked_fill(i == 1, -100), "never learns to stop"),
    ("make_labels", lambda i, t: labeled(i, t).float(), "torch.long"),
    ("make_labels", lambda i, t: labeled(i, t)[:, 1:], "shape"),
    ("packed_mask", packed(lambda image, own, past, prompt: own & (past | prompt)), "sees the picture"),
    ("packed_mask", packed(lambda image, own, past, prompt: image | own), "both directions"),
    ("packed_mask", packed(lambda image, own, past, prompt: image | (own & past)), "only their past"),
    ("packed_mask", packed(lambda i, o, past, prompt: (i | (o & (past | prompt))).mT), "swapped"),
    ("packed_mask", packed(lambda image, own, past, prompt: image | past), "another question"),
    ("packed_mask", all_see_padding, "see padding"),
    ("packed_mask", image_sees_questions, "the picture sees a question"),
    ("packed_mask", packed(lambda i, o, past, prompt: (i | (o & (past | prompt))).int()), "dtype"),
    ("packed_mask", packed(lambda i, o, past, prompt: (i | (o & (past | prompt)))[0]), "shape"),
    ("rate_factor", at(lambda s, n, w: min(1, s / w) * (1 - s / n)), "first step has rate 0"),
    ("rate_factor", at(lambda s, n, w: (s + 1) / w * (1 - s / n)), "min"),
    ("rate_factor", at(lambda s, n, w: min(1, (s + 1) / w) * (1 - (s + 1) / n)), "last step has rate 0"),
    ("rate_factor", at(lambda s, n, w: min(1, (s + 1) / w)), "multiply by 1 - step / steps"),
    ("rate_factor", at(lambda s, n, w: (s + 1) / w if s < w else 1 - s / n), "the product"),
    ("rate_factor", at(lambda s, n, w: torch.tensor(1.0)), "expected a number"),
    ("rate_groups", groups(1.0, 1.0), "not lowered"),
    ("rate_groups", groups(None, 1.0), "not lowered"),
    ("rate_groups", groups(0.3, 0.3), "learns as fast"),
    ("rate_groups", groups(0.3, 1.0, frozen=True), "requires_grad is False"),
    ("rate_groups", groups(0.3, 1.0, projector=False), "the projector is in no group"),
    ("rate_groups", in_two_groups, "in two groups"),
    ("rate_groups", tower_at_the_factor, "the factor itself"),
    ("rate_groups", lambda m, r, f: [{"params": ["vision_tower.block.weight"], "lr": r}], "not their names"),
    ("rate_groups", lambda m, r, f: list(m.parameters()), "list of dicts"),
    ("backward_in_parts", backward(lambda count, all_, n: 1.0), "a larger step"),
    ("backward_in_parts", backward(lambda count, all_, n: 1 / n), "counts for a third"),
    ("backward_in_parts", backward(lambda count, all_, n: count), "never divided"),
    ("backward_in_parts", backward(lambda count, all_, n: count / all_, only_last=True), "only the last"),
    ("backward_in_parts", backward(lambda count, all_, n: count / all_, returns=1.0), "gradient is right"),
    ("backward_in_parts", lambda loss_of, parts: 1.0, "no gradient has arrived"),
]


@pytest.mark.parametrize("name", EXERCISES)
def test_says_that_an_exercise_is_blank(name: str) -> None:
    with pytest.raises(NotYet, match=r"still blank: replace the line that raises with your own$"):
        getattr(checks.training, name)(blank)


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_names_the_likely_mistake(name: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(checks.training, name)(answer)


def test_other_ways_to_be_right() -> None:
    checks.training.make_labels(lambda ids, types: torch.where(types == 1, ids, -100))
    checks.training.packed_mask(
        lambda blocks, positions, types: (
            packed(lambda image, own, past, prompt: image | (own & (past | prompt)))(blocks, positions, types)
            & (blocks >= 0)[:, None, :]
        )
    )

    def one_group_each(model: nn.Module, rate: float, factor: float) -> list[dict[str, Any]]:
        return [
            {"params": [p], "lr": rate * (factor if n.startswith("vision_tower.") else 1.0)}
            for n, p in model.named_parameters()
            if p.requires_grad
        ]

    checks.training.rate_groups(one_group_each)


def test_every_exercise_is_in_the_notebook() -> None:
    exercises = [cell for cell in read_cells(NOTEBOOK) if "exercise" in cell.tags]
    assert len(exercises) == len(EXERCISES)
