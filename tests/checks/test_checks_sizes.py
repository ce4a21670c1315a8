"""Which mistakes the checks of 11_real_checkpoints name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from notebooks_and_sources import ROOT, read_cells
from torch import Tensor

from minivlm import checks
from minivlm.checks import NotYet
from minivlm.models.sizes import cache_bytes, weight_bytes

NOTEBOOK = ROOT / "notebooks" / "11_real_checkpoints.ipynb"
EXERCISES = (
    "read_header",
    "compare_shapes",
    "rows_that_fit",
    "shortest_time",
    "quantize_rows",
    "capped_scores",
)
S = checks.sizes.solutions


def header(order: str = "little", skip: int = 8, add: int = 8, metadata: bool = False, whole: bool = False):
    """Reads a header with one mistake."""

    def read(path: Path) -> tuple[dict[str, Any], int]:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), order)  # type: ignore[arg-type]
            file.seek(skip)
            text = file.read() if whole else file.read(length)
        values = json.loads(text)
        if not metadata:
            values.pop("__metadata__", None)
        return values, add + length

    return read


def names(index: int, change: Callable[..., Any]) -> Callable[..., Any]:
    """Compares shapes, with one of the three lists changed."""

    def compare(found: Any, wanted: Any) -> Any:
        lists = list(S.compare_shapes(found, wanted))
        lists[index] = change(lists)
        return tuple(lists)

    return compare


def rows(count: Callable[[int, int, int], Any]) -> Callable[..., Any]:
    """Counts rows from memory, weights and bytes of a row."""
    return lambda c, memory, tokens, d: count(memory, weight_bytes(c, d), cache_bytes(c, tokens, 1, d))


def int8(
    scale_of: Callable[[Tensor], Tensor], rounded: bool = True, dtype: torch.dtype = torch.int8
) -> Callable[[Tensor], Any]:
    """Quantizes with other scales, without rounding, or to another dtype."""

    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = scale_of(weight)
        wide = scale.clamp(min=1e-12)
        units = weight / (wide[:, None] if wide.dim() == 1 and len(wide) == len(weight) else wide)
        return (units.round() if rounded else units).to(dtype), scale

    return quantize


def unguarded(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(dim=1) / 127
    scale[scale == 0] = torch.nan
    return (weight / scale[:, None]).round().nan_to_num().to(torch.int8), scale


def largest(weight: Tensor) -> Tensor:
    return weight.abs().amax(dim=1)


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("read_header", header(order="big"), "little-endian"),
    ("read_header", header(skip=0), "begins at byte 8"),
    ("read_header", header(whole=True), "begins at byte 8"),
    ("read_header", header(metadata=True), "__metadata__, which is not a tensor"),
    ("read_header", header(add=0), "add 8"),
    ("read_header", header(add=16), "you say"),
    ("read_header", lambda path: S.read_header(path)[0], "return two things"),
    ("compare_shapes", lambda f, w: S.compare_shapes(w, f), "swapped"),
    ("compare_shapes", names(2, lambda lists: []), "compare the shapes too"),
    ("compare_shapes", names(0, lambda lists: [*lists[0], "down"]), "only in misshapen"),
    ("compare_shapes", names(2, lambda lists: sorted(lists[2] + lists[0])), "only names that both have"),
    ("compare_shapes", names(0, lambda lists: lists[0][::-1]), "sort each list"),
    ("compare_shapes", names(1, lambda lists: lists[1][1:]), "expected"),
    ("compare_shapes", lambda f, w: sorted(w.keys() - f.keys()), "three lists"),
    ("rows_that_fit", rows(lambda m, w, c: m // c), "weights need memory"),
    ("rows_that_fit", rows(lambda m, w, c: max(0, m // (w + c))), "all rows share them"),
    ("rows_that_fit", rows(lambda m, w, c: -(-(m - w) // c)), "rounded up"),
    ("rows_that_fit", rows(lambda m, w, c: (m - w) // c), "0 rows"),
    ("rows_that_fit", rows(lambda m, w, c: (m - w) / c), "whole number"),
    ("rows_that_fit", lambda c, m, t, d: S.rows_that_fit(c, m, t, torch.bfloat16), "dtype to both"),
    ("rows_that_fit", rows(lambda m, w, c: 7), "10 rows fit"),
    ("shortest_time", lambda o, b, p, w: o / p + b / w, "added"),
    ("shortest_time", lambda o, b, p, w: min(o / p, b / w), "smaller"),
    ("shortest_time", lambda o, b, p, w: max(p / o, w / b), "upside down"),
    ("shortest_time", lambda o, b, p, w: o / p, "smaller"),
    ("shortest_time", lambda o, b, p, w: 2 * max(o / p, b / w), "at least"),
    ("quantize_rows", int8(lambda w: w.abs().max() / 127), "whole matrix"),
    ("quantize_rows", int8(lambda w: w.abs().amax(dim=0) / 127), "columns"),
    ("quantize_rows", int8(lambda w: largest(w) / 128), "divided by 128"),
    ("quantize_rows", int8(lambda w: largest(w) / 255), "divided by 255"),
    ("quantize_rows", int8(lambda w: w.amax(dim=1) / 127), "abs"),
    ("quantize_rows", int8(lambda w: largest(w) / 127, rounded=False), "truncated"),
    ("quantize_rows", int8(lambda w: largest(w) / 127, dtype=torch.int16), "dtype"),
    ("quantize_rows", unguarded, "row of zeros"),
    ("quantize_rows", lambda w: int8(lambda w: largest(w) / 127)(w)[0], "two tensors"),
    ("capped_scores", lambda s, m, c: c * torch.tanh(s.masked_fill(~m, -torch.inf) / c), "masked first"),
    ("capped_scores", lambda s, m, c: c * torch.tanh(s / c), "minus infinity"),
    ("capped_scores", lambda s, m, c: torch.tanh(s / c).masked_fill(~m, -torch.inf), "within"),
    ("capped_scores", lambda s, m, c: (c * torch.tanh(s)).masked_fill(~m, -torch.inf), "divide by the cap"),
    ("capped_scores", lambda s, m, c: s.clamp(-c, c).masked_fill(~m, -torch.inf), "clamp cuts"),
    ("capped_scores", lambda s, m, c: s.masked_fill(~m, -torch.inf), "off by"),
]


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_names_the_likely_mistake(name: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(checks.sizes, name)(answer)


def test_other_ways_to_be_right() -> None:
    lowest = torch.finfo(torch.float32).min
    checks.sizes.capped_scores(lambda s, m, c: (c * torch.tanh(s / c)).masked_fill(~m, lowest))
    checks.sizes.quantize_rows(int8(lambda w: largest(w).clamp(min=1e-9) / 127))


def test_every_exercise_is_in_the_notebook() -> None:
    exercises = [cell for cell in read_cells(NOTEBOOK) if "exercise" in cell.tags]
    assert len(exercises) == len(EXERCISES)
    assert all(any(f"def {name}(" in cell.source for cell in exercises) for name in EXERCISES)
