"""The checks of 19_deepseek_vl2 accept right answers and name the likely mistake in wrong ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minivlm.checks import NotYet, deepseek_vl2
from minivlm.processing.deepseek_vl2_tiles import arrange_views

good = deepseek_vl2.solutions


def grids(**instead: Any) -> Callable[[], Any]:
    """The right prediction with some replaced; a blank stands as _."""
    return lambda: good.which_grids() | {name.replace("_", " "): grid for name, grid in instead.items()}


def laid(change: Callable[[list[Any], list[Any], int, int, int], Any]) -> Callable[..., Any]:
    """Of the tokens of the whole and of those of the tiles."""

    def answer(columns: int, rows: int, n: int) -> Any:
        tokens = good.layout(columns, rows, n)
        return change(tokens[: n * (n + 1)], tokens[n * (n + 1) + 1 :], columns, rows, n)

    return answer


def tile(number: int, n: int) -> list[Any]:
    return [token for line in range(n) for token in (*((number, line, p) for p in range(n)), "newline")]


def one_by_one(whole: list[Any], tiles: list[Any], columns: int, rows: int, n: int) -> Any:
    return [*whole, "separator", *(t for number in range(1, 1 + columns * rows) for t in tile(number, n))]


def newline_in_each(whole: list[Any], tiles: list[Any], columns: int, rows: int, n: int) -> Any:
    out = []
    for token in tiles:
        if token != "newline":
            out += [token, *(["newline"] if token[2] == n - 1 else [])]
    return [*whole, "separator", *out]


def down_the_columns(whole: list[Any], tiles: list[Any], columns: int, rows: int, n: int) -> Any:
    def number(view: int) -> int:
        row, column = divmod(view - 1, columns)
        return 1 + column * rows + row

    return [*whole, "separator", *(t if t == "newline" else (number(t[0]), *t[1:]) for t in tiles)]


def without(mark: str, tokens: list[Any]) -> list[Any]:
    return [token for token in tokens if token != mark]


def counted_through(columns: int, rows: int, n: int) -> list[Any]:
    """Lines and places of tiles as in the picture."""
    return [
        token
        if isinstance(token, str) or token[0] == 0
        else (
            token[0],
            token[1] + (token[0] - 1) // columns * n,
            token[2] + (token[0] - 1) % columns * n,
        )
        for token in good.layout(columns, rows, n)
    ]


def chosen_of(outs: Tensor, chosen: Tensor) -> Tensor:
    return outs.gather(1, chosen[..., None].expand(-1, -1, outs.shape[-1]))


def summed(change: Callable[[Tensor, Tensor, Tensor, Tensor], Any]) -> Callable[..., Any]:
    """Of the outputs of each token's experts [N, k, D], the weights, all outputs [N, E, D], the tokens."""

    def answer(tokens: Tensor, chosen: Tensor, weights: Tensor, experts: Any) -> Any:
        outs = torch.stack([expert(tokens) for expert in experts], dim=1)
        return change(chosen_of(outs, chosen), weights[..., None], outs, tokens)

    return answer


def overwritten(tokens: Tensor, chosen: Tensor, weights: Tensor, experts: Any) -> Tensor:
    out = torch.zeros_like(tokens)
    for number, expert in enumerate(experts):
        token, place = (chosen == number).nonzero(as_tuple=True)
        if len(token):
            out[token] = weights[token, place, None] * expert(tokens[token])
    return out


def first_weight(tokens: Tensor, chosen: Tensor, weights: Tensor, experts: Any) -> Tensor:
    return good.run_experts(tokens, chosen, weights[:, :1].expand_as(weights), experts)


def token_by_token(tokens: Tensor, chosen: Tensor, weights: Tensor, experts: Any) -> Tensor:
    rows = []
    for token, numbers, counts in zip(tokens, chosen.tolist(), weights, strict=True):
        rows.append(
            sum(w * experts[number](token[None])[0] for number, w in zip(numbers, counts, strict=True))
        )
    return torch.stack(rows)


def idle_ones_too(tokens: Tensor, chosen: Tensor, weights: Tensor, experts: Any) -> Tensor:
    out = torch.zeros_like(tokens)
    for number, expert in enumerate(experts):
        token, place = (chosen == number).nonzero(as_tuple=True)
        out[token] += weights[token, place, None] * expert(tokens[token])
    return out


def in_place(tokens: Tensor, chosen: Tensor, weights: Tensor, experts: Any) -> Tensor:
    tokens += good.run_experts(tokens, chosen, weights, experts)
    return tokens


def diagnosed(**instead: str) -> Callable[..., str]:
    """The right diagnosis with some answers replaced; a blank stands as _."""

    def answer(patient: Any, intact: Any) -> str:
        found = good.diagnose(patient, intact)
        return instead.get(found.replace(" ", "_"), found)

    return answer


def attended(
    scale: Callable[[int, int, int], float] = lambda width, turned, rank: math.sqrt(width + turned),
    plain: float = 1.0,
    turned: float = 1.0,
    allowed: Callable[[Tensor], Tensor | None] = lambda mask: mask,
    dim: int = -1,
    finish: Callable[[Tensor, Tensor], Any] = lambda sums, w_v: sums @ w_v.mT,
) -> Callable[..., Any]:
    """The absorbed form with one thing changed."""

    def answer(
        q: Tensor, q_rope: Tensor, latents: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor, mask: Tensor
    ) -> Any:
        keys, positions = latents[:, None], k_rope[:, None]
        scores = plain * (q @ w_k) @ keys.mT + turned * q_rope @ positions.mT
        scores = scores / scale(q.shape[-1], q_rope.shape[-1], latents.shape[-1])
        seen = allowed(mask)
        if seen is not None:
            scores = scores.masked_fill(~seen, -1e9)
        return finish(scores.softmax(dim=dim) @ keys, w_v)

    return answer


def weights_masked(
    q: Tensor, q_rope: Tensor, latents: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor, mask: Tensor
) -> Tensor:
    scores = (q @ w_k @ latents[:, None].mT + q_rope @ k_rope[:, None].mT) / math.sqrt(15)
    return (scores.softmax(dim=-1) * mask) @ latents[:, None] @ w_v.mT


def scores_zeroed(
    q: Tensor, q_rope: Tensor, latents: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor, mask: Tensor
) -> Tensor:
    scores = (q @ w_k @ latents[:, None].mT + q_rope @ k_rope[:, None].mT) / math.sqrt(15)
    return scores.masked_fill(~mask, 0.0).softmax(dim=-1) @ latents[:, None] @ w_v.mT


def expanded(
    q: Tensor, q_rope: Tensor, latents: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor, mask: Tensor
) -> Tensor:
    keys, values = latents[:, None] @ w_k.mT, latents[:, None] @ w_v.mT
    scores = (q @ keys.mT + q_rope @ k_rope[:, None].mT) / math.sqrt(q.shape[-1] + q_rope.shape[-1])
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ values


def values_made(
    q: Tensor, q_rope: Tensor, latents: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor, mask: Tensor
) -> Tensor:
    scores = (q @ w_k @ latents[:, None].mT + q_rope @ k_rope[:, None].mT) / math.sqrt(15)
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ (latents[:, None] @ w_v.mT)


WRONG: dict[str, list[tuple[str, Callable[..., Any]]]] = {
    "which_grids": [
        (r"^banner: you give \(rows, columns\)", grids(banner=(1, 3))),
        (r"^screen: you give \(rows, columns\)", grids(screen=(2, 4))),
        ("^icon: .* keep as many .* gains none", grids(icon=(2, 2))),
        ("^small photo: .* keep 1.* exists that keeps 120,000", grids(small_photo=(1, 1))),
        ("^small photo: .* waste", grids(small_photo=(2, 2))),
        ("^photo: 2 x 2 tiles keep .* exists", grids(photo=(2, 2))),
        ("^photo: 3 x 3 .* but waste", grids(photo=(3, 3))),
        ("^banner: 4 x 1 .* but waste", grids(banner=(4, 1))),
        ("^screen: 3 x 2 tiles keep", grids(screen=(3, 2))),
        ("^page: 2 x 3 tiles keep", grids(page=(2, 3))),
        ("^page: 4 x 5 is no candidate", grids(page=(4, 5))),
        ("^icon: 0 x 1 is no candidate", grids(icon=(0, 1))),
        ("two whole numbers", grids(icon=1)),
        ("return a dictionary with the keys", lambda: {"icon": (1, 1)}),
    ],
    "layout": [
        ("read one after the other: a line", laid(one_by_one)),
        (
            "one after the other, and without newlines",
            laid(lambda *a: [*a[0], "separator", *without("newline", one_by_one([], *a[1:])[1:])]),
        ),
        ("newline after each line of each tile", laid(newline_in_each)),
        ("tiles come first", laid(lambda whole, tiles, *_: [*tiles, "separator", *whole])),
        ("separator is missing", laid(lambda whole, tiles, *_: [*whole, *tiles])),
        ("separator stands at the end", laid(lambda whole, tiles, *_: [*whole, *tiles, "separator"])),
        (
            "lines of the whole have no newlines",
            laid(lambda w, t, *_: [*without("newline", w), "separator", *t]),
        ),
        (
            "lines of the tiles have no newlines",
            laid(lambda w, t, *_: [*w, "separator", *without("newline", t)]),
        ),
        ("the last line has no newline", laid(lambda w, t, *_: [*w, "separator", *t[:-1]])),
        ("no marks at all", laid(lambda w, t, *_: [*without("newline", w), *without("newline", t)])),
        ("numbered down the columns", laid(down_the_columns)),
        (
            "begin with number 0",
            laid(
                lambda w, t, *_: [*w, "separator", *(x if x == "newline" else (x[0] - 1, *x[1:]) for x in t)]
            ),
        ),
        (
            "count from 1",
            lambda c, r, n: [
                x if isinstance(x, str) else (x[0], x[1] + 1, x[2] + 1) for x in good.layout(c, r, n)
            ],
        ),
        (
            "line and place are exchanged",
            lambda c, r, n: [x if isinstance(x, str) else (x[0], x[2], x[1]) for x in good.layout(c, r, n)],
        ),
        ("columns and rows are exchanged", lambda c, r, n: good.layout(r, c, n)),
        ("count inside of each view", counted_through),
        ("you have 1: tokens are tuples", lambda c, r, n: [1, 2, 3]),
        ("you have None", laid(lambda w, t, *_: [*w, None, *t])),
        ("the whole is missing", laid(lambda w, t, *_: ["separator", *t])),
        ("the tiles are missing", laid(lambda w, t, *_: [*w, "separator"])),
        ("you use the marks", laid(lambda w, t, *_: [*w, "sep", *t])),
        ("you have 2 separators", laid(lambda w, t, *_: [*w, "separator", "separator", *t])),
        ("you have 7 newlines", laid(lambda w, t, *_: [*w, "newline", "separator", *t])),
        ("you have 36 tokens", laid(lambda w, t, *_: [*w, "separator", *t, (1, 0, 0)])),
        ("token 0 is", laid(lambda w, t, *_: [(0, 1, 1), *w[1:], "separator", *t])),
        ("return a list", lambda c, r, n: torch.zeros(3)),
    ],
    "run_experts": [
        ("the weights are missing", summed(lambda picked, w, outs, x: picked.sum(dim=1))),
        ("the mean of a token's experts", summed(lambda picked, w, outs, x: picked.mean(dim=1))),
        ("the mean of the weighted outputs", summed(lambda picked, w, outs, x: (w * picked).mean(dim=1))),
        ("overwrites the others", overwritten),
        ("the weight of the first one", first_weight),
        ("only the first choice", summed(lambda picked, w, outs, x: w[:, 0] * picked[:, 0])),
        (
            "divided by their sum",
            summed(lambda picked, w, outs, x: (w / w.sum(dim=1, keepdim=True) * picked).sum(dim=1)),
        ),
        ("reverse order", summed(lambda picked, w, outs, x: (w.flip(1) * picked).sum(dim=1))),
        ("tokens themselves are added", summed(lambda picked, w, outs, x: x + (w * picked).sum(dim=1))),
        ("without the experts", summed(lambda picked, w, outs, x: x * w.sum(dim=1))),
        ("all experts are added up", summed(lambda picked, w, outs, x: outs.sum(dim=1))),
        ("tokens that did not choose it", summed(lambda picked, w, outs, x: (w * picked).sum(dim=1))),
        ("times: collect its tokens", token_by_token),
        ("has no tokens and is called", idle_ones_too),
        ("changes what it was given", in_place),
        ("expected", summed(lambda picked, w, outs, x: w * picked)),
        ("should be a tensor", lambda *_: [1.0]),
    ],
    "diagnose": [
        ("for all five", lambda patient, intact: "softmax"),
        ("for all five .* to 1$|for all five .* to 1:", lambda patient, intact: "scale missing"),
        ("one of the five names", lambda patient, intact: "sigmoid"),
        ("returns nothing", lambda patient, intact: None),
        ("With 'softmax', the scores", diagnosed(not_divided="softmax")),
        ("With 'scale missing', .* add up to 1", diagnosed(not_divided="scale missing")),
        ("With 'not divided', .* for each token", diagnosed(scale_missing="not divided")),
        ("With 'bias ignored', .* other experts", diagnosed(bias_in_the_weights="bias ignored")),
        ("With 'bias in the weights', .* same experts", diagnosed(bias_ignored="bias in the weights")),
        ("With 'bias ignored'", diagnosed(softmax="bias ignored")),
        ("With 'not divided'", diagnosed(softmax="not divided")),
        ("With 'bias in the weights'", diagnosed(scale_missing="bias in the weights")),
    ],
    "absorbed": [
        ("the turned part is missing: add", attended(turned=0)),
        ("so is its width in the scale", attended(turned=0, scale=lambda n, r, c: math.sqrt(n))),
        ("only the turned part", attended(plain=0)),
        ("width of q_nope alone", attended(scale=lambda n, r, c: math.sqrt(n))),
        ("width of the latents", attended(scale=lambda n, r, c: math.sqrt(c))),
        (r"scale by R \+ Dr", attended(scale=lambda n, r, c: math.sqrt(c + r))),
        ("not divided by the square root", attended(scale=lambda n, r, c: 1.0)),
        ("by its square root", attended(scale=lambda n, r, c: n + r)),
        ("mask is ignored", attended(allowed=lambda mask: None)),
        ("wrong way around", attended(allowed=lambda mask: ~mask)),
        ("runs over the queries", attended(dim=-2)),
        ("mask comes after the softmax", weights_masked),
        ("hidden scores become 0", scores_zeroed),
        ("each part is scaled by its own width", attended(lambda *_: 1.0, plain=11**-0.5, turned=4**-0.5)),
        ("sum of the latents", attended(finish=lambda sums, w_v: sums)),
        ("axes of heads and queries", attended(finish=lambda sums, w_v: (sums @ w_v.mT).transpose(1, 2))),
        ("you make the keys of every head", expanded),
        ("you make the values of every head", values_made),
        ("there are nan", attended(finish=lambda sums, w_v: sums @ w_v.mT * math.nan)),
        ("your code stops", attended(finish=lambda sums, w_v: sums @ w_v)),
    ],
}


@pytest.mark.parametrize(
    ("name", "hint", "answer"),
    [(name, hint, answer) for name, wrong in WRONG.items() for hint, answer in wrong],
    ids=[f"{name}-{number}" for name, wrong in WRONG.items() for number in range(len(wrong))],
)
def test_names_the_mistake(name: str, hint: str, answer: Callable[..., Any]) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(deepseek_vl2, name)(answer)


def test_every_exercise_meets_ten_wrong_answers() -> None:
    assert all(len(wrong) >= 10 for wrong in WRONG.values())


def by_axes(columns: int, rows: int, n: int) -> list[Any]:
    """As the package does it, with numbers for features."""
    views = 1 + columns * rows
    numbers = torch.cartesian_prod(torch.arange(views), torch.arange(n), torch.arange(n)).view(views, n, n, 3)
    marks = {(-1, -1, -1): "newline", (-2, -2, -2): "separator"}
    row = arrange_views(numbers, torch.full((3,), -1), torch.full((3,), -2), (columns, rows)).tolist()
    return [marks.get(tuple(token), tuple(token)) for token in row]


def by_sorting(tokens: Tensor, chosen: Tensor, weights: Tensor, experts: Any) -> Tensor:
    """As the package does it."""
    k, flat = chosen.shape[1], chosen.flatten()
    order = flat.argsort(stable=True)
    pieces = tokens[order // k].split(flat.bincount(minlength=len(experts)).tolist())
    outs = torch.cat([run(piece) for run, piece in zip(experts, pieces, strict=True) if len(piece)])
    return (outs[order.argsort()].unflatten(0, (-1, k)) * weights[..., None]).sum(dim=1)


def by_einsum(
    q: Tensor, q_rope: Tensor, latents: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor, mask: Tensor
) -> Tensor:
    at_latents = torch.einsum("bhtn,hnr->bhtr", q, w_k)
    scores = torch.einsum("bhtr,bsr->bhts", at_latents, latents) + torch.einsum(
        "bhtr,bsr->bhts", q_rope, k_rope
    )
    weights = torch.where(mask, scores / 15**0.5, -math.inf).softmax(dim=-1)
    return torch.einsum("bhtr,hvr->bhtv", torch.einsum("bhts,bsr->bhtr", weights, latents), w_v)


def joined(
    q: Tensor, q_rope: Tensor, latents: Tensor, k_rope: Tensor, w_k: Tensor, w_v: Tensor, mask: Tensor
) -> Tensor:
    """One query and one key, the latent with the turned part behind it."""
    query = torch.cat([q @ w_k, q_rope], dim=-1) / 15**0.5
    kept = torch.cat([latents, k_rope], dim=-1)[:, None]
    weights = (query @ kept.mT).masked_fill(~mask, -math.inf).softmax(dim=-1)
    return (weights @ kept)[..., : latents.shape[-1]] @ w_v.mT


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("layout", by_axes),
        ("run_experts", by_sorting),
        ("absorbed", by_einsum),
        ("absorbed", joined),
        ("which_grids", lambda: {name: list(grid) for name, grid in good.which_grids().items()}),
    ],
)
def test_other_right_answers_pass(name: str, answer: Callable[..., Any]) -> None:
    getattr(deepseek_vl2, name)(answer)


@pytest.mark.parametrize("name", WRONG)
def test_the_solutions_pass(name: str) -> None:
    getattr(deepseek_vl2, name)(getattr(good, name))


@torch.no_grad()
def test_the_patients_have_the_five_faults() -> None:
    router = deepseek_vl2.small_router()
    found = [good.diagnose(patient, router) for patient in deepseek_vl2.patients(router).values()]
    assert sorted(found) == sorted(deepseek_vl2.FAULTS)


@torch.no_grad()
def test_a_patient_without_a_fault_is_the_router() -> None:
    """So what is measured on a patient is its fault, and nothing else."""
    router, tokens = deepseek_vl2.small_router(), torch.randn(50, 32)
    found, right = deepseek_vl2.Patient(router, "none")(tokens), router(tokens)
    assert torch.equal(found.experts, right.experts)
    torch.testing.assert_close(found.weights, right.weights)
