"""The checks of 01_patches accept right answers and name the mistake in wrong ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.checks import NotYet, patches

Answer = Callable[..., Any]


COUNTS: list[tuple[Answer, str]] = [
    (lambda h, w, p: h // p, "one row"),
    (lambda h, w, p: math.ceil(h / p) * math.ceil(w / p), "round down"),
    (lambda h, w, p: round(h / p) * round(w / p), "nearest"),
    (lambda h, w, p: h * w // p**2, "areas"),
    (lambda h, w, p: (h / p) * (w / p), "use //"),
    (lambda h, w, p: (h // p) ** 2, "height twice"),
    (lambda h, w, p: (w // p) ** 2, "width twice"),
    (lambda h, w, p: (h // p) * (w // p) + 1, "class token"),
    (lambda h, w, p: float((h // p) * (w // p)), "float"),
    (lambda h, w, p: [h // p, w // p], "list"),
    (lambda h, w, p: 3 * (h // p) * (w // p), "there are 196"),
]


@pytest.mark.parametrize(("answer", "hint"), COUNTS)
def test_patch_count_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        patches.patch_count(answer)


def _no_permute(x: Tensor, rows: int, columns: int) -> Tensor:
    P = math.isqrt(x.shape[2] // 3)
    return x.reshape(-1, 3, rows * P, columns * P)


def _column_by_column(x: Tensor, rows: int, columns: int) -> Tensor:
    P = math.isqrt(x.shape[2] // 3)
    x = x.reshape(-1, columns, rows, 3, P, P).permute(0, 3, 2, 4, 1, 5)
    return x.reshape(-1, 3, rows * P, columns * P)


def _flipped_patches(x: Tensor, rows: int, columns: int) -> Tensor:
    P = math.isqrt(x.shape[2] // 3)
    return (
        x.reshape(-1, rows, columns, 3, P, P).permute(0, 3, 1, 5, 2, 4).reshape(-1, 3, rows * P, columns * P)
    )


def _channel_inside(x: Tensor, rows: int, columns: int) -> Tensor:
    P = math.isqrt(x.shape[2] // 3)
    return (
        x.reshape(-1, rows, columns, P, P, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, rows * P, columns * P)
    )


PICTURES: list[tuple[Answer, str]] = [
    (_no_permute, "permute is missing"),
    (_column_by_column, "rows come"),
    (_flipped_patches, "diagonal"),
    (_channel_inside, "red numbers first"),
    (lambda x, r, c: patches.solutions.unpatchify(x, r, c).permute(0, 2, 3, 1), "channels are last"),
    (lambda x, r, c: patches.solutions.unpatchify(x, r, c).mT, "swapped"),
    (lambda x, r, c: patches.solutions.unpatchify(x, r, c)[0], "shape"),
    (lambda x, r, c: x.reshape(7, 7), "stops with RuntimeError"),
]


@pytest.mark.parametrize(("answer", "hint"), PICTURES)
def test_unpatchify_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        patches.unpatchify(answer)


def _first(x: Tensor, token: Tensor) -> Tensor:
    return torch.cat([token.expand(len(x), -1, -1), x], dim=1)


SEQUENCES: list[tuple[Answer, str]] = [
    (lambda x, t, p: torch.cat([t, x], dim=1) + p, "expand"),
    (lambda x, t, p: torch.cat([t[0], x], dim=1) + p, "expand"),
    (lambda x, t, p: torch.cat([x, t.expand(len(x), -1, -1)], dim=1) + p, "comes first"),
    (lambda x, t, p: torch.cat([x + p[1:], t.expand(len(x), -1, -1) + p[0]], dim=1), "comes first"),
    (lambda x, t, p: _first(x + p[1:], t), "has no position"),
    (lambda x, t, p: _first(x + p[:-1], t), "first N positions"),
    (lambda x, t, p: _first(x + p, t), r"N \+ 1 positions"),
    (lambda x, t, p: _first(x, t), "no positions were added"),
    (lambda x, t, p: x + p[1:], "as many tokens"),
    (lambda x, t, p: _first(x, t) * p, "off by"),
]


@pytest.mark.parametrize(("answer", "hint"), SEQUENCES)
def test_add_class_token_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        patches.add_class_token(answer)


def _resize(table: Tensor, side: int, mode: str = "bilinear", **options: bool) -> Tensor:
    old = math.isqrt(len(table))
    grid = F.interpolate(table.T.reshape(1, -1, old, old), size=(side, side), mode=mode, **options)  # type: ignore[arg-type]
    return grid[0].flatten(1).T


def _without_transpose(table: Tensor, side: int) -> Tensor:
    old = math.isqrt(len(table))
    grid = F.interpolate(table.reshape(1, -1, old, old), size=(side, side), mode="bilinear")
    return grid[0].flatten(1).T


def _exchanged(table: Tensor, side: int) -> Tensor:
    new = _resize(table, side)
    return new.reshape(side, side, -1).transpose(0, 1).reshape(side * side, -1)


TABLES: list[tuple[Answer, str]] = [
    (lambda t, s: F.interpolate(t.T[None], size=s * s, mode="linear")[0].T, "along the sequence"),
    (_without_transpose, "without a transpose"),
    (_exchanged, "swapped"),
    (lambda t, s: _resize(t, s, "nearest"), "nearest"),
    (lambda t, s: _resize(t, s, "bicubic"), "bicubic"),
    (lambda t, s: _resize(t, s, align_corners=True), "align_corners"),
    (lambda t, s: _resize(t, s).T, "bring it back"),
    (lambda t, s: t, "shape"),
]


@pytest.mark.parametrize(("answer", "hint"), TABLES)
def test_resize_positions_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        patches.resize_positions(answer)
