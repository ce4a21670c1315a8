"""Which mistakes the checks of 11_real_checkpoints name."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from notebooks_and_sources import ROOT, read_cells
from torch import Tensor

from minivlm import checks
from minivlm.checks import NotYet

NOTEBOOK = ROOT / "notebooks" / "11_real_checkpoints.ipynb"
EXERCISES = (
    "read_header",
    "compare_shapes",
    "find_exchange",
    "predict_ceilings",
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


def tried(
    choose: Callable[[dict[tuple[str, str], float]], Any], back: bool = True, shapes: bool = True
) -> Callable[..., Any]:
    """Tries every exchange, or only says so, and chooses from the losses."""

    def find(tensors: Any, exchange: Any, loss_of: Any) -> Any:
        kinds = sorted({name.split(".")[-2] for name in tensors if name.endswith("_proj.weight")})
        losses = {}
        for pair in itertools.combinations(kinds, 2):
            trial = exchange(tensors, *pair)
            if not shapes or {n: t.shape for n, t in trial.items()} == {
                n: t.shape for n, t in tensors.items()
            }:
                losses[pair] = loss_of(trial if back else tensors)
        return choose(losses)

    return find


def least(losses: dict[tuple[str, str], float]) -> tuple[str, str]:
    return min(losses, key=lambda pair: losses[pair])


def no_names(tensors: Any, exchange: Any, loss_of: Any) -> Any:
    trial = exchange(tensors, "q_proj", "up_proj")
    return all(trial[name].shape == tensors[name].shape for name in tensors)


CEILINGS = S.predict_ceilings()


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


def whole_file(path: Path) -> tuple[dict[str, Any], int]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    values = json.loads(raw[8 : 8 + length])
    values.pop("__metadata__", None)
    return values, 8 + length


def always_there(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        values = json.loads(file.read(length))
    values.pop("__metadata__")
    return values, 8 + length


def first_left_out(path: Path) -> tuple[dict[str, Any], int]:
    values, start = header(metadata=True)(path)
    return dict(list(values.items())[1:]), start


def zero_scale(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(dim=1) / 127
    return (weight / scale.clamp(min=1e-12)[:, None]).round().to(torch.int8), scale


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
    ("read_header", whole_file, "as much as the whole file"),
    ("read_header", always_there, "which is optional"),
    ("read_header", first_left_out, "without __metadata__ gives another header"),
    ("read_header", lambda path: (list(S.read_header(path)[0]), 8), "a dict"),
    ("compare_shapes", lambda f, w: S.compare_shapes(w, f), "swapped"),
    ("compare_shapes", names(2, lambda lists: []), "compare the shapes too"),
    ("compare_shapes", names(0, lambda lists: [*lists[0], "down"]), "only in misshapen"),
    ("compare_shapes", names(2, lambda lists: sorted(lists[2] + lists[0])), "only names that both have"),
    ("compare_shapes", names(0, lambda lists: lists[0][::-1]), "sort each list"),
    ("compare_shapes", names(0, lambda lists: set(lists[0])), "should be a list"),
    ("compare_shapes", names(1, lambda lists: lists[1][1:]), "expected"),
    ("compare_shapes", lambda f, w: sorted(w.keys() - f.keys()), "three lists"),
    ("compare_shapes", lambda f, w: ([], [], []), "compare the shapes too"),
    ("compare_shapes", names(1, lambda lists: [*lists[1], *lists[0]]), "expected"),
    ("compare_shapes", names(2, lambda lists: [*lists[2], *lists[1]]), "both"),
    ("find_exchange", lambda t, e, loss: {"gate_proj", "up_proj"}, "never asked"),
    ("find_exchange", lambda t, e, loss: (loss(t), {"k_proj", "v_proj"})[1], "you say"),
    ("find_exchange", tried(lambda x: set(max(x, key=lambda pair: x[pair]))), "take the lowest"),
    ("find_exchange", tried(lambda x: set(next(iter(x)))), "take the lowest"),
    ("find_exchange", tried(least, back=False), "Exchange every pair"),
    ("find_exchange", tried(least, shapes=False), "changes names or shapes"),
    ("find_exchange", no_names, "changes names or shapes"),
    ("find_exchange", tried(lambda x: "k_proj and v_proj"), "both names"),
    ("find_exchange", tried(lambda x: least(x)[0]), "both names"),
    ("find_exchange", tried(lambda x: min(x.values())), "return the two kinds"),
    ("find_exchange", tried(lambda x: x), "return the two kinds"),
    ("find_exchange", tried(lambda x: {f"layers.0.mlp.{kind}.weight" for kind in least(x)}), "of tensors"),
    ("find_exchange", tried(lambda x: {"q_proj", "k_proj"}), "no model loads them"),
    *(
        (
            "predict_ceilings",
            lambda name=name: (
                CEILINGS | {name: {"bytes": "operations", "operations": "bytes"}[CEILINGS[name]]}
            ),
            f"{re.escape(name)} waits for {CEILINGS[name]}",
        )
        for name in CEILINGS
    ),
    ("predict_ceilings", lambda: dict.fromkeys(CEILINGS, "bytes"), "5 of 8 as predicted"),
    ("predict_ceilings", lambda: dict.fromkeys(CEILINGS, "memory"), "a prediction is"),
    ("predict_ceilings", lambda: list(CEILINGS.values()), "expected a dictionary"),
    ("predict_ceilings", lambda: {}, "no prediction"),
    ("quantize_rows", int8(lambda w: w.abs().max() / 127), "whole matrix"),
    ("quantize_rows", int8(lambda w: w.abs().amax(dim=0) / 127), "columns"),
    ("quantize_rows", int8(lambda w: largest(w) / 128), "divided by 128"),
    ("quantize_rows", int8(lambda w: largest(w) / 255), "divided by 255"),
    ("quantize_rows", int8(lambda w: w.amax(dim=1) / 127), "abs"),
    ("quantize_rows", int8(lambda w: largest(w) / 127, rounded=False), "truncated"),
    ("quantize_rows", int8(lambda w: largest(w) / 127, dtype=torch.int16), "dtype"),
    ("quantize_rows", unguarded, "row of zeros"),
    ("quantize_rows", zero_scale, "keeps the scale 0"),
    ("quantize_rows", lambda w: int8(lambda w: largest(w) / 127)(w)[0], "two tensors"),
    ("capped_scores", lambda s, m, c: c * torch.tanh(s.masked_fill(~m, -torch.inf) / c), "masked first"),
    ("capped_scores", lambda s, m, c: c * torch.tanh(s / c), "minus infinity"),
    ("capped_scores", lambda s, m, c: torch.tanh(s / c).masked_fill(~m, -torch.inf), "within"),
    ("capped_scores", lambda s, m, c: (c * torch.tanh(s)).masked_fill(~m, -torch.inf), "divide by the cap"),
    ("capped_scores", lambda s, m, c: s.clamp(-c, c).masked_fill(~m, -torch.inf), "clamp cuts"),
    ("capped_scores", lambda s, m, c: s.masked_fill(~m, -torch.inf), "nothing is capped"),
    ("capped_scores", lambda s, m, c: (c * torch.tanh(s / c)).masked_fill(m, -torch.inf), "minus infinity"),
    ("capped_scores", lambda s, m, c: c * torch.tanh(s / c) * m, "minus infinity"),
    ("capped_scores", lambda s, m, c: (s / (1 + s.abs() / c)).masked_fill(~m, -torch.inf), "becomes"),
    ("capped_scores", lambda s, m, c: (c * torch.sigmoid(s / c)).masked_fill(~m, -torch.inf), "becomes"),
    ("capped_scores", lambda s, m, c: (50 * torch.tanh(s / 50)).masked_fill(~m, -torch.inf), "becomes"),
    ("capped_scores", lambda s, m, c: (c * torch.tanh(s / c))[m], "shape"),
]


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_names_the_likely_mistake(name: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(checks.sizes, name)(answer)


def test_other_ways_to_be_right() -> None:
    lowest = torch.finfo(torch.float32).min
    checks.sizes.capped_scores(lambda s, m, c: (c * torch.tanh(s / c)).masked_fill(~m, lowest))
    checks.sizes.quantize_rows(int8(lambda w: largest(w).clamp(min=1e-9) / 127))
    checks.sizes.find_exchange(tried(least))
    checks.sizes.predict_ceilings(lambda: {name: word.upper() for name, word in CEILINGS.items()})


def test_every_exercise_is_in_the_notebook() -> None:
    exercises = [cell for cell in read_cells(NOTEBOOK) if "exercise" in cell.tags]
    assert len(exercises) == len(EXERCISES)
    assert all(any(f"def {name}(" in cell.source for cell in exercises) for name in EXERCISES)
