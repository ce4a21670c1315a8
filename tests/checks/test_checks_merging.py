"""The checks of 06_merging accept the solutions and say what is wrong with likely mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from notebooks_and_sources import ROOT, read_cells
from torch import Tensor

from minivlm import checks
from minivlm.checks import NotYet

NOTEBOOK = ROOT / "notebooks" / "06_merging.ipynb"
EXERCISES = ("three_masks", "merge_with_where", "number_positions", "block_mask", "count_leaks")


def blank(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("your turn")


def merge_counted(numbers_of: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Merges with another way to number the placeholders."""

    def merge(is_image: Tensor, words: Tensor, features: Tensor) -> Tensor:
        return torch.where(is_image[..., None], features.flatten(0, 1)[numbers_of(is_image)], words)

    return merge


def counted(is_image: Tensor) -> Tensor:
    return is_image.flatten().cumsum(0).view_as(is_image)


def swapped(is_image: Tensor, words: Tensor, features: Tensor) -> Tensor:
    return torch.where(is_image[..., None], words, features.flatten(0, 1)[(counted(is_image) - 1).clamp(0)])


def not_flattened(is_image: Tensor, words: Tensor, features: Tensor) -> Tensor:
    return torch.where(is_image[..., None], features[(counted(is_image) - 1).clamp(0)], words)


def block(
    compare: Callable[[Tensor, Tensor], Tensor], sums: bool = True, pads: bool = True
) -> Callable[..., Tensor]:
    """A block mask with another comparison of (key, query), without the running sum, or without padding."""

    def mask(token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        blocks = token_type_ids.cumsum(1) if sums else token_type_ids
        seen = compare(blocks[:, None, :], blocks[:, :, None])
        return seen & attention_mask[:, None, :].bool() if pads else seen

    return mask


def leaks(*, own: bool = False, prefix: bool = False, in_place: bool = False, tolerance: float = 1e-4) -> Any:
    """A leak counter with one mistake."""

    def count(logits_of: Callable[[Tensor], Tensor], ids: Tensor, types: Tensor, other_id: int) -> int:
        changed = ids if in_place else ids.clone()
        before = None if in_place else logits_of(ids)
        changed[0, -1] = other_id
        moved = ((logits_of(ids) if before is None else before) - logits_of(changed)).abs().amax(-1)[0]
        chosen = torch.ones_like(types[0]).bool() if prefix else types[0] == 1
        if not own:
            chosen[-1] = False
        return int((moved[chosen] > tolerance).sum())

    return count


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("three_masks", lambda i, m, p: (i == m, i != m, i == p), "True at the padding"),
    ("three_masks", lambda i, m, p: (i == m, i != p, i == p), "True at the placeholders"),
    ("three_masks", lambda i, m, p: (i == m, (i != m) & (i != p), i != p), "other way around"),
    ("three_masks", lambda i, m, p: ((i == m).int(), (i != m) & (i != p), i == p), "boolean"),
    ("three_masks", lambda i, m, p: i == m, "return three masks"),
    ("three_masks", lambda i, m, p: (i == 7, (i != 7) & (i != 0), i == 0), "use image_id"),
    ("merge_with_where", merge_counted(lambda m: (m.cumsum(1) - 1).clamp(0)), "whole batch"),
    ("merge_with_where", merge_counted(counted), "subtract 1"),
    ("merge_with_where", merge_counted(lambda m: counted(m).clamp(max=5)), "feature number 1"),
    ("merge_with_where", not_flattened, "flatten the features"),
    ("merge_with_where", swapped, "swapped"),
    ("merge_with_where", lambda m, w, f: torch.where(m[..., None], f, w), "number the placeholders first"),
    ("number_positions", lambda m: torch.arange(m.shape[1]).expand_as(m), "count tokens, not columns"),
    ("number_positions", lambda m: m.cumsum(1), "start at 1"),
    ("number_positions", lambda m: m.cumsum(1) - 1, "negative position"),
    ("number_positions", lambda m: m, "expected \\[0, 1, 2"),
    ("number_positions", lambda m: m.cumsum(1)[0], "shape"),
    ("block_mask", block(torch.le, pads=False), "padded keys can be seen"),
    ("block_mask", block(torch.le, sums=False), "leaks the labels"),
    ("block_mask", block(torch.ge), "swapped"),
    ("block_mask", block(torch.lt), "<= instead of <"),
    ("block_mask", lambda t, m: block(torch.le)(t, m).int(), "dtype"),
    ("block_mask", lambda t, m: block(torch.le)(t, m)[0], "shape"),
    ("count_leaks", leaks(own=True), "last position"),
    ("count_leaks", leaks(prefix=True), "counted the prefix"),
    ("count_leaks", leaks(in_place=True), "clone before you write"),
    ("count_leaks", leaks(tolerance=0.0), "tolerance"),
    ("count_leaks", lambda f, i, t, other_id: torch.tensor(3), "whole number"),
    ("count_leaks", lambda f, i, t, other_id: 3, "1 leak"),
]


@pytest.mark.parametrize("name", EXERCISES)
def test_says_that_an_exercise_is_blank(name: str) -> None:
    with pytest.raises(NotYet, match=r"still blank: replace the line that raises with your own$"):
        getattr(checks.merging, name)(blank)


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_names_the_likely_mistake(name: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(checks.merging, name)(answer)


def test_other_ways_to_be_right() -> None:
    checks.merging.number_positions(
        lambda mask: mask.cumsum(1) - mask
    )  # one less than the count, or the count
    checks.merging.block_mask(
        lambda types, mask: (
            block(torch.le)(types, mask) & mask[:, :, None].bool()
        )  # big_vision hides these rows
    )


def test_every_exercise_is_in_the_notebook() -> None:
    exercises = [cell for cell in read_cells(NOTEBOOK) if "exercise" in cell.tags]
    assert len(exercises) == len(EXERCISES)
