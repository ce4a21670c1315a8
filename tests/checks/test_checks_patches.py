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
    (lambda h, w, p: 3 * (h // p) * (w // p), "counted each color"),
    (lambda h, w, p: h // p + w // p, "you added"),
    (lambda h, w, p: h * w, "counted the pixels"),
    (lambda h, w, p: p * p, "pixels of a patch"),
    (lambda h, w, p: 7, "14 rows and 14 columns"),
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


def _permuted(x: Tensor, rows: int, columns: int, axes: tuple[int, ...]) -> Tensor:
    P = math.isqrt(x.shape[2] // 3)
    return x.reshape(-1, rows, columns, 3, P, P).permute(axes).reshape(-1, 3, rows * P, columns * P)


def _viewed(x: Tensor, rows: int, columns: int) -> Tensor:
    P = math.isqrt(x.shape[2] // 3)
    x = x.reshape(-1, rows, columns, 3, P, P).permute(0, 3, 1, 4, 2, 5)
    return x.view(-1, 3, rows * P, columns * P)


PICTURES: list[tuple[Answer, str]] = [
    (_no_permute, "permute is missing"),
    (_column_by_column, "rows come"),
    (_flipped_patches, "diagonal"),
    (_channel_inside, "red numbers first"),
    (lambda x, r, c: patches.solutions.unpatchify(x, r, c).permute(0, 2, 3, 1), "channels are last"),
    (lambda x, r, c: patches.solutions.unpatchify(x, r, c).mT, "swapped"),
    (lambda x, r, c: patches.solutions.unpatchify(x, r, c)[0], "patchify backwards"),
    (lambda x, r, c: x.reshape(7, 7), "have to multiply"),
    (lambda x, r, c: _permuted(x, r, c, (0, 2, 4, 1, 3, 5)), "patchify's own permute"),
    (lambda x, r, c: _permuted(x, r, c, (0, 3, 2, 4, 1, 5)), "rows and columns are exchanged"),
    (lambda x, r, c: _permuted(x, r, c, (0, 3, 1, 2, 4, 5)), "without pairs"),
    (lambda x, r, c: patches.solutions.unpatchify(x, r, c).flip(1), "red, green, blue"),
    (_viewed, "use reshape"),
    (lambda x, r, c: patches.solutions.unpatchify(x, r, c) * 2, "other numbers"),
    (lambda x, r, c: patches.solutions.unpatchify(x, r, c).tolist(), "should be a tensor"),
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
    (lambda x, t, p: _first(x, t) * p, "not multiplied"),
    (lambda x, t, p: _first(x, t) + p[0], "only the first position"),
    (lambda x, t, p: _first(x, t) + p.flip(0), "backwards"),
    (lambda x, t, p: _first(x, t) - p, "joined along the axis of N"),
]


@pytest.mark.parametrize(("answer", "hint"), SEQUENCES)
def test_add_class_token_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        patches.add_class_token(answer)


def _resize(table: Tensor, side: int, mode: str = "bilinear", **options: bool) -> Tensor:
    old = math.isqrt(len(table))
    grid = F.interpolate(table.T.reshape(1, -1, old, old), size=(side, side), mode=mode, **options)
    return grid[0].flatten(1).T


def _picture(table: Tensor, side: int) -> Tensor:
    old = math.isqrt(len(table))
    return F.interpolate(table.T.reshape(1, -1, old, old), size=(side, side), mode="bilinear")[0]


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
    (lambda t, s: t, "make the table a picture"),
    (lambda t, s: _picture(t, s).reshape(s * s, -1), "way back is not"),
    (lambda t, s: _resize(t, s, "area"), "area"),
    (lambda t, s: _resize(t, s, antialias=True), "antialias"),
    (lambda t, s: _picture(t, s), "bring it back"),
    (lambda t, s: F.interpolate(t, size=s, mode="bilinear"), "stops with"),
]


@pytest.mark.parametrize(("answer", "hint"), TABLES)
def test_resize_positions_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        patches.resize_positions(answer)


def _first_number(cut: Any, size: int, patch_size: int, token: int = 0, place: int = 0) -> int:
    return int(cut(torch.arange(3 * size * size).view(1, 3, size, size), patch_size)[0, token, place])


def _where(number: int, size: int) -> tuple[int, int]:
    return number // size % size, number % size


BEGINNINGS: list[tuple[Answer, str]] = [
    (lambda cut, s, p: _where(_first_number(cut, s, p), s)[::-1], "the row comes first"),
    (lambda cut, s, p: divmod(_first_number(cut, s, p), s), "modulo the size"),
    (lambda cut, s, p: _where(_first_number(cut, s, p, place=-1), s), "last pixel"),
    (lambda cut, s, p: _where(_first_number(cut, s, p, token=1), s), "second patch"),
    (
        lambda cut, s, p: (_first_number(cut, s, p) // p % p, _first_number(cut, s, p) % p),
        "width of the pict",
    ),
    (lambda cut, s, p: (0, 0), "do not assume"),
    (lambda cut, s, p: (3, 3), "do not assume"),
    (lambda cut, s, p: (s % p // 2, s % p // 2), "upper left corner, 47 pixels.*do not assume"),
    (lambda cut, s, p: (s % p, s % p), "do not assume"),
    (lambda cut, s, p: _first_number(cut, s, p), "two whole numbers"),
    (lambda cut, s, p: ("top", "left"), "two whole numbers"),
    (lambda cut, s, p: _where(_first_number(patches.their_patchify, s, p), s), "upper left corner, 47"),
]


@pytest.mark.parametrize(("answer", "hint"), BEGINNINGS)
def test_first_pixel_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        patches.first_pixel(answer)


def _predicted(**changes: Any) -> Answer:
    names = dict(zip("abcdef", patches.SHUFFLE, strict=True))
    return lambda: patches.solutions.notices() | {names[key]: value for key, value in changes.items()}


PREDICTED: list[tuple[Answer, str]] = [
    (_predicted(a=True), "the same mean"),
    (_predicted(b=True), "neither of the two means"),
    (_predicted(c=True), "a sum again"),
    (_predicted(d=False), "It need not be attention"),
    (_predicted(e=True), "its output is shuffled"),
    (_predicted(f=False), "its softmax"),
    (_predicted(b=True, c=True, d=False), "patches \\+ positions: False.*linear.*mlp"),
    (lambda: dict.fromkeys(patches.SHUFFLE, False), "mlp.*attention"),
    (lambda: dict.fromkeys(patches.SHUFFLE, True), "patches: False"),
    (_predicted(a="no"), "write True"),
    (_predicted(a=0), "not 0"),
    (lambda: {"patches": False}, "no prediction for 'patches \\+ positions'"),
    (lambda: {"linear": False, "mlp": True, "attention": True}, "the keys are 'patches', .*'mlp\\(patches"),
    (lambda: [False] * 6, "dictionary"),
]


@pytest.mark.parametrize(("answer", "hint"), PREDICTED)
def test_notices_explains_wrong_predictions(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        patches.notices(answer)


def _grid(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return F.conv2d(x, w, b, stride=w.shape[-1])


def _tokens(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return _grid(x, w, b).flatten(2).mT


TOKENS: list[tuple[Answer, str]] = [
    (lambda x, w, b, p: _tokens(x, w, b), "positions are missing"),
    (lambda x, w, b, p: _tokens(x, w) + p, "the bias is missing"),
    (lambda x, w, b, p: _tokens(x, w), "bias and positions"),
    (
        lambda x, w, b, p: patches._patchify(x, 4) @ w.permute(0, 2, 3, 1).flatten(1).T + b + p,
        "different orders",
    ),
    (lambda x, w, b, p: _grid(x, w, b).flatten(2).reshape(2, 6, 5) + p, "moves no number"),
    (lambda x, w, b, p: _grid(x, w, b).mT.flatten(2).mT + p, "run down the columns"),
    (lambda x, w, b, p: _tokens(x, w, b) * p, "multiplied"),
    (lambda x, w, b, p: _tokens(x, w, b) + p[0], "only the first position"),
    (lambda x, w, b, p: _tokens(x, w, b) + p.mean(0), "each token gets its own"),
    (lambda x, w, b, p: _grid(x, w, b).flatten(2), "transpose"),
    (lambda x, w, b, p: _grid(x, w, b), "flatten them to N, then transpose"),
    (lambda x, w, b, p: _grid(x, w, b).permute(0, 2, 3, 1), "flatten them to N"),
    (lambda x, w, b, p: (_tokens(x, w, b) + p)[0], "axis of the batch"),
    (lambda x, w, b, p: patches._patchify(x, 4), "multiply each with the weights"),
    (lambda x, w, b, p: F.conv2d(x, w, b).flatten(2).mT, "what does not fit is dropped"),
    (lambda x, w, b, p: _tokens(x, w, b) - p, "add bias and positions"),
    (lambda x, w, b, p: x.reshape(2, 3, 3, 4, 2, 4), "invalid for input .* leave them out first"),
    (lambda x, w, b, p: x @ w, "your code stops with RuntimeError"),
]


@pytest.mark.parametrize(("answer", "hint"), TOKENS)
def test_picture_to_tokens_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        patches.picture_to_tokens(answer)


def _stacked(x: Tensor, token: Tensor, positions: Tensor) -> Tensor:
    both = torch.empty(len(x), x.shape[1] + 1, x.shape[2])
    both[:, :1], both[:, 1:] = token, x
    both += positions
    return both


RIGHT: list[tuple[str, Answer]] = [
    ("patch_count", lambda h, w, p: ((h - p) // p + 1) * ((w - p) // p + 1)),
    ("unpatchify", lambda x, r, c: F.fold(x.mT, (4 * r, 4 * c), kernel_size=4, stride=4)),
    ("first_pixel", lambda cut, s, p: torch.tensor(_where(_first_number(cut, s, p), s))),
    ("picture_to_tokens", lambda x, w, b, p: _tokens(x, w, b) + p),
    ("picture_to_tokens", lambda x, w, b, p: F.unfold(x, 4, stride=4).mT @ w.flatten(1).T + (b + p)),
    ("add_class_token", _stacked),
    ("resize_positions", lambda t, s: _picture(t, s).permute(1, 2, 0).reshape(s * s, -1)),
]


@pytest.mark.parametrize(("check", "solution"), RIGHT)
def test_other_right_answers_pass(check: str, solution: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(patches, check)(solution)
    getattr(patches, check)(getattr(patches.solutions, check))
    assert capsys.readouterr().out.count("Right: ") == 2


def test_predictions_hold() -> None:
    """What `notices` calls right is what a computation gives."""
    tokens, positions, order = torch.randn(9, 4), torch.randn(9, 4), torch.randperm(9)
    linear, mlp = torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU())
    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": linear,
        "mlp": mlp,
        "attention": lambda x: (x @ x.mT).softmax(-1) @ x,
    }
    for name, truth in patches.solutions.notices().items():
        layer, _, inside = name.rpartition("(")
        means = []
        for shown in (tokens, tokens[order]):
            x = shown + positions if "positions" in inside else shown
            means.append(layers.get(layer, torch.nn.Identity())(x).mean(dim=0))
        assert bool((means[0] - means[1]).abs().max() > 1e-4) == truth, name
