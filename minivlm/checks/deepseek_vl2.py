"""Checks for the exercises of 19_deepseek_vl2."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minivlm.checks import NotYet, call, expect, expect_faults, expect_tensor, right, same
from minivlm.processing.deepseek_vl2_tiles import candidates, choose_candidate
from minivlm.text.moe import Gate, MoEConfig, Routing

FAULTS = ("softmax", "not divided", "scale missing", "bias ignored", "bias in the weights")
PICTURES = {
    "icon": (200, 200),
    "small photo": (400, 300),
    "photo": (800, 600),
    "banner": (1000, 300),
    "screen": (1920, 1080),
    "page": (1240, 1754),
}
SIDE = 384

Grid = tuple[int, int]
Token = str | tuple[int, int, int]
Router = Callable[[Tensor], Routing]


class solutions:
    """Reference solutions."""

    @staticmethod
    def which_grids() -> dict[str, Grid]:
        """Columns and rows of the tiles of each picture."""
        return {
            "icon": (1, 1),
            "small photo": (2, 1),
            "photo": (3, 2),
            "banner": (3, 1),
            "screen": (4, 2),
            "page": (3, 3),
        }

    @staticmethod
    def layout(columns: int, rows: int, n: int) -> list[Token]:
        """The whole, line by line; the separator; the tiles, line by line through those side by side."""
        tokens: list[Token] = []
        for line in range(n):
            tokens += [*((0, line, place) for place in range(n)), "newline"]
        tokens.append("separator")
        for row in range(rows):
            for line in range(n):
                for column in range(columns):
                    tokens += [(1 + row * columns + column, line, place) for place in range(n)]
                tokens.append("newline")
        return tokens

    @staticmethod
    def run_experts(
        tokens: Tensor, chosen: Tensor, weights: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]
    ) -> Tensor:
        """Each expert runs once, on the tokens that chose it."""
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                out[token] += weights[token, place, None] * expert(tokens[token])
        return out

    @staticmethod
    def diagnose(patient: Router, intact: Router) -> str:
        """The sum of all scores, the sum of the weights, and who is chosen."""
        tokens = torch.randn(100, 32)
        found, good = patient(tokens), intact(tokens)
        sums = found.weights.sum(dim=-1)
        if torch.allclose(found.scores.sum(dim=-1), torch.ones(100), atol=1e-3):
            return "softmax"
        if torch.allclose(sums, torch.ones(100), atol=1e-3):
            return "scale missing"
        if not torch.allclose(sums, torch.full((100,), 2.0), atol=1e-3):
            return "not divided"
        if (found.experts.sort().values != good.experts.sort().values).any():
            return "bias ignored"
        return "bias in the weights"

    @staticmethod
    def absorbed(
        q_nope: Tensor,
        q_rope: Tensor,
        latents: Tensor,
        k_rope: Tensor,
        w_k: Tensor,
        w_v: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Queries come to the latents, and the values' matrix is applied to the sum of these."""
        keys, turned = latents[:, None], k_rope[:, None]
        scores = (q_nope @ w_k) @ keys.mT + q_rope @ turned.mT
        scores = scores / (q_nope.shape[-1] + q_rope.shape[-1]) ** 0.5
        weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
        return (weights @ keys) @ w_v.mT


# ---- exercise: which grid ----------------------------------------------------------------------------------


def which_grids(answer: Callable[..., Any]) -> None:
    """Each picture is laid on its grid by the package, and the reader's grid is measured beside it."""
    result = call(answer)
    expect(
        isinstance(result, dict) and result.keys() == PICTURES.keys(),
        f"return a dictionary with the keys {', '.join(PICTURES)}",
    )
    for name, (width, height) in PICTURES.items():
        try:
            columns, rows = (int(number) for number in result[name])
        except (TypeError, ValueError):
            raise NotYet(
                f"{name}: you give {result[name]!r}. Give (columns, rows), two whole numbers"
            ) from None
        found = choose_candidate(width, height, candidates(SIDE))
        best = found[0] // SIDE, found[1] // SIDE
        if (columns, rows) == best:
            continue
        expect(
            columns >= 1 and rows >= 1 and columns * rows <= 9,
            f"{name}: {columns} x {rows} is no candidate. A grid has at least one column and one row, and at "
            "most nine tiles",
        )
        expect(
            (rows, columns) != best,
            f"{name}: you give (rows, columns): a grid is (columns, rows), and the picture is {width} wide "
            f"and {height} high",
        )
        kept, wasted = _kept_and_wasted(width, height, (columns, rows))
        most, fewest = _kept_and_wasted(width, height, best)
        expect(
            kept >= most,
            f"{name}: {columns} x {rows} tiles keep {kept:,} of its {width * height:,} pixels, and a grid "
            f"exists that keeps {most:,}",
        )
        raise NotYet(
            f"{name}: {columns} x {rows} tiles keep as many pixels as any grid, but waste {wasted:,}: "
            f"another that keeps as many wastes {fewest:,}. A picture that is enlarged gains none"
        )
    right("most pixels kept first, fewest wasted second; 16 pixels too many can double the tiles.")


def _kept_and_wasted(width: int, height: int, grid: Grid) -> tuple[int, int]:
    columns, rows = grid
    scale = min(SIDE * columns / width, SIDE * rows / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    return kept, SIDE**2 * columns * rows - kept


# ---- exercise: the order of the tokens ---------------------------------------------------------------------


def layout(answer: Callable[..., Any]) -> None:
    """Grids whose columns, rows and sides differ."""
    for columns, rows, n in ((3, 2, 2), (2, 1, 2), (1, 1, 2), (1, 3, 3)):
        result = call(answer, columns, rows, n)
        case = f"for {columns} x {rows} tiles and n = {n}"
        expect(isinstance(result, list), f"return a list, not a {type(result).__name__}")
        for token in result:
            expect(
                isinstance(token, str) or (isinstance(token, Sequence) and len(token) == 3),
                f"{case} you have {token!r}: tokens are tuples (view, line, place), and marks are strings",
            )
        found = [token if isinstance(token, str) else tuple(token) for token in result]
        good = solutions.layout(columns, rows, n)
        if found == good:
            continue
        marks = {token for token in found if isinstance(token, str)}
        expect(
            marks <= {"newline", "separator"},
            f'{case} you use the marks {sorted(marks)}: they are "newline" and "separator"',
        )
        _expect_layout(found, good, columns, rows, n, case)
    right("a line goes through all tiles that lie side by side, as if the picture had never been cut.")


def _expect_layout(found: list[Any], good: list[Token], columns: int, rows: int, n: int, case: str) -> None:
    mistakes = _layouts(columns, rows, n)
    for hint, wrong in mistakes.items():
        expect(found != wrong or wrong == good, f"{case} {hint}")
    expect(
        found.count("separator") == 1,
        f"{case} you have {found.count('separator')} separators: one stands between the whole and the tiles",
    )
    lines = n + rows * n
    expect(
        found.count("newline") == lines,
        f"{case} you have {found.count('newline')} newlines: the whole has {n} lines and the tiles together "
        f"have {rows * n}, so there are {lines}",
    )
    expect(
        len(found) == len(good), f"{case} you have {len(found)} tokens: expected {len(good)}, marks included"
    )
    first = next(place for place, (a, b) in enumerate(zip(found, good, strict=True)) if a != b)
    raise NotYet(f"{case} token {first} is {good[first]!r}, and yours is {found[first]!r}")


def _layouts(columns: int, rows: int, n: int) -> dict[str, list[Token]]:
    """Orders that a reader may write, by what is wrong with them."""
    good = solutions.layout(columns, rows, n)
    start = n * (n + 1)
    whole, tiles = good[:start], good[start + 1 :]

    def lines(number: int, marks: bool = True) -> list[Token]:
        ends: list[Token] = ["newline"] if marks else []
        return [token for line in range(n) for token in (*((number, line, p) for p in range(n)), *ends)]

    numbers = range(1, 1 + columns * rows)
    one_by_one: list[Token] = [token for number in numbers for token in lines(number)]
    without: list[Token] = [token for number in numbers for token in lines(number, False)]
    every: list[Token] = []
    for place, token in enumerate(tiles):
        last = isinstance(token, tuple) and token[2] == n - 1
        every += [token, "newline"] if last and tiles[place + 1] != "newline" else [token]
    down = [
        token
        if isinstance(token, str)
        else (1 + (token[0] - 1) % columns * rows + (token[0] - 1) // columns, *token[1:])
        for token in tiles
    ]
    from_zero = [t if isinstance(t, str) else (t[0] - 1, *t[1:]) for t in tiles]
    from_one = [t if isinstance(t, str) else (t[0], t[1] + 1, t[2] + 1) for t in good]
    turned = [t if isinstance(t, str) else (t[0], t[2], t[1]) for t in good]
    exchanged = solutions.layout(rows, columns, n)
    of_picture = [
        t if isinstance(t, str) else (t[0], t[1] + (t[0] - 1) // columns * n, t[2] + (t[0] - 1) % columns * n)
        for t in tiles
    ]
    return {
        "the tiles are read one after the other: a line goes through all tiles that lie side by side": [
            *whole,
            "separator",
            *one_by_one,
        ],
        "the tiles are read one after the other, and without newlines": [*whole, "separator", *without],
        "there is a newline after each line of each tile: one comes after the line through all of them": [
            *whole,
            "separator",
            *every,
        ],
        "the tiles come first: the whole stands at the beginning": [*tiles, "separator", *whole],
        "the separator is missing between the whole and the tiles": [*whole, *tiles],
        "the separator stands at the end: it belongs between the whole and the tiles": [
            *whole,
            *tiles,
            "separator",
        ],
        "the lines of the whole have no newlines: they have, as those of the tiles": [
            *(token for token in whole if token != "newline"),
            "separator",
            *tiles,
        ],
        "the lines of the tiles have no newlines": [
            *whole,
            "separator",
            *(token for token in tiles if token != "newline"),
        ],
        "the last line has no newline: each line has one": good[:-1],
        "there are no marks at all": [token for token in good if not isinstance(token, str)],
        "tiles are numbered down the columns: they are numbered row by row": [*whole, "separator", *down],
        "the tiles begin with number 0: that is the whole": [*whole, "separator", *from_zero],
        "lines and places count from 1: they count from 0": from_one,
        "line and place are exchanged in your tuples: (view, line, place)": turned,
        "columns and rows are exchanged": exchanged,
        "lines and places of the tiles count through all tiles: they count inside of each view": [
            *whole,
            "separator",
            *of_picture,
        ],
        "the whole is missing": ["separator", *tiles],
        "the tiles are missing": [*whole, "separator"],
    }


# ---- exercise: each expert once ----------------------------------------------------------------------------


class _Counted:
    """An expert that remembers on how many tokens it was called."""

    def __init__(self, number: int, width: int) -> None:
        generator = torch.Generator().manual_seed(number)
        self.weight = torch.randn(width, width, generator=generator)
        self.calls: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.calls.append(len(x) if x.dim() > 1 else 1)
        return (x @ self.weight).tanh()


def _experts_case(seed: int, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor, list[_Counted]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(len(chosen), 5, generator=generator)
    weights = torch.rand(chosen.shape, generator=generator) + 0.2
    return tokens, chosen, weights, [_Counted(number, 5) for number in range(6)]


@torch.no_grad()
def run_experts(answer: Callable[..., Any]) -> None:
    """Two and three choices for a token, one expert without tokens."""
    for seed, rows in enumerate(
        (
            [[0, 3], [3, 1], [5, 0], [1, 5], [3, 5], [0, 1], [1, 3]],
            [[2, 0, 4], [4, 2, 1], [0, 1, 2], [1, 4, 0]],
        )
    ):
        case = _experts_case(seed, torch.tensor(rows))
        tokens, chosen, weights, experts = case
        before = [part.clone() for part in case[:3]]
        result = call(answer, *case)
        expect(
            all(torch.equal(a, b) for a, b in zip(before, case[:3], strict=True)),
            "your function changes what it was given: make a new tensor for the result",
        )
        calls = [expert.calls for expert in experts]
        _, _, _, fresh = _experts_case(seed, chosen)
        good = solutions.run_experts(tokens, chosen, weights, fresh)
        _expect_sum(result, good, tokens, chosen, weights, fresh)
        number = max(range(6), key=lambda expert: len(calls[expert]))
        expect(
            len(calls[number]) <= 1,
            f"expert {number} runs {len(calls[number])} times: collect its tokens and call it once",
        )
        counts = chosen.flatten().bincount(minlength=6).tolist()
        for expert, (ran, has) in enumerate(zip(calls, counts, strict=True)):
            expect(
                sum(ran) <= has or has == 0,
                f"expert {expert} runs on {sum(ran)} tokens and has {has}: tokens that did not choose it "
                "should not pass through it, or nothing is saved",
            )
            expect(
                has > 0 or not ran, f"expert {expert} has no tokens and is called all the same: leave it out"
            )
    right("one call for each expert that has tokens, on its own tokens, added up where they came from.")


def _expect_sum(
    result: Any, good: Tensor, tokens: Tensor, chosen: Tensor, weights: Tensor, experts: Sequence[_Counted]
) -> None:
    outs = torch.stack([expert(tokens) for expert in experts], dim=1)  # [N, E, D]
    picked = outs.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[1]))  # [N, k, D]
    last = torch.zeros_like(tokens)
    for number in range(len(experts)):
        token, place = (chosen == number).nonzero(as_tuple=True)
        last[token] = weights[token, place, None] * outs[token, number]
    by_number = torch.zeros_like(tokens)
    for number in range(len(experts)):
        token, place = (chosen == number).nonzero(as_tuple=True)
        by_number[token] += weights[token, 0, None] * outs[token, number]
    normed = weights / weights.sum(dim=1, keepdim=True)
    mistakes = {
        "the weights are missing: each expert's output counts as much as its weight says": picked.sum(dim=1),
        "you take the mean of a token's experts: add them up, weighted": picked.mean(dim=1),
        "you take the mean of the weighted outputs: add them up": (picked * weights[..., None]).mean(dim=1),
        "the last expert overwrites the others of its tokens: add to their rows, `+=`": last,
        "all choices get the weight of the first one: take weights[token, place]": by_number,
        "only the first choice of each token is in it": picked[:, 0] * weights[:, :1],
        "the weights are divided by their sum: take them as they are given": (picked * normed[..., None]).sum(
            dim=1
        ),
        "the weights are in the reverse order: a weight belongs to the choice at its place": (
            picked * weights.flip(1)[..., None]
        ).sum(dim=1),
        "the tokens themselves are added: that is the block's business, not the experts'": good + tokens,
        "this is the weighted sum of the tokens, without the experts": tokens
        * weights.sum(dim=1, keepdim=True),
        "all experts are added up: a token has only those it chose": outs.sum(dim=1),
    }
    for hint, wrong in mistakes.items():
        expect(not same(result, wrong), hint)
    expect_tensor(result, good)


# ---- exercise: what is wrong with this router --------------------------------------------------------------


def small_router(seed: int = 0) -> Gate:
    """A router as in the largest DeepSeek-VL2, for eight experts, three for a token, with biases."""
    config = MoEConfig(
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        norm_topk_prob=True,
        routed_scaling_factor=2.0,
    )
    gate = Gate(config, 32)
    generator = torch.Generator().manual_seed(seed)
    gate.weight.data = 0.25 * torch.randn(gate.weight.shape, generator=generator)
    gate.e_score_correction_bias = 0.4 * torch.randn(8, generator=generator)
    return gate.requires_grad_(False)


class Patient(nn.Module):
    """A router that is broken in one place."""

    def __init__(self, gate: Gate, fault: str) -> None:
        super().__init__()
        self.gate, self.fault = gate, fault

    def forward(self, x: Tensor) -> Routing:
        """As the gate's, except for the fault."""
        gate, config = self.gate, self.gate.config
        logits = x @ gate.weight.T
        scores = logits.softmax(dim=-1) if self.fault == "softmax" else logits.sigmoid()
        biased = scores + gate.e_score_correction_bias
        experts = (
            (scores if self.fault == "bias ignored" else biased).topk(config.num_experts_per_tok).indices
        )
        weights = (biased if self.fault == "bias in the weights" else scores).gather(-1, experts)
        if self.fault != "not divided":
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.fault != "scale missing":
            weights = weights * config.routed_scaling_factor
        return Routing(experts, weights, scores)


def patients(gate: Gate) -> dict[str, Patient]:
    """The router in five states, each broken in another place."""
    faults = ("bias ignored", "scale missing", "bias in the weights", "softmax", "not divided")
    return {letter: Patient(gate, fault) for letter, fault in zip("ABCDE", faults, strict=True)}


_SIGNS = {
    "softmax": "the scores of all experts would add up to 1",
    "scale missing": "the weights of a token would add up to 1",
    "not divided": "the weights of a token would add up to another number for each token",
    "bias ignored": "the weights would add up to 2, and some tokens would go to other experts",
    "bias in the weights": "the weights would add up to 2, and all tokens would go to the same experts as in "
    "the intact router, with other weights",
}


@torch.no_grad()
def diagnose(answer: Callable[..., Any]) -> None:
    """The five faults in a router with weights and biases of its own."""
    intact = small_router(seed=1)
    said = {fault: call(answer, Patient(intact, fault), intact) for fault in FAULTS}
    otherwise = "that is not so, or another fault shows it as well"
    expect_faults(said, _SIGNS, "router", "routers", otherwise)
    right("sums of scores, sums of weights, and the experts that are chosen tell all five apart.")


# ---- exercise: attention on the latents --------------------------------------------------------------------


class _Shapes(TorchFunctionMode):
    """Remembers the shapes of all tensors that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.seen.add(tuple(result.shape))
        return result


@torch.no_grad()
def absorbed(answer: Callable[..., Any]) -> None:
    """All sizes are different primes, so that shapes tell what was made."""
    batch, heads, queries, keys, rank, width, turned, value = 2, 3, 5, 7, 13, 11, 4, 6
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (batch, heads, queries, width),
        (batch, heads, queries, turned),
        (batch, keys, rank),
        (batch, keys, turned),
        (heads, width, rank),
        (heads, value, rank),
    )
    parts = [0.6 * torch.randn(shape, generator=generator) for shape in shapes]
    places = torch.arange(keys)
    mask = (places <= places[-queries:, None]).expand(batch, 1, -1, -1).clone()
    mask[0, :, :, 0] = False  # padding
    with _Shapes() as shapes_made:
        result = call(answer, *parts, mask)
    q_nope, q_rope, latents, k_rope, w_k, w_v = parts
    good = solutions.absorbed(q_nope, q_rope, latents, k_rope, w_k, w_v, mask)
    _expect_attention(result, good, parts, mask)
    for made in shapes_made.seen:
        for last, what in ((width, "keys"), (value, "values")):
            expect(
                not (len(made) >= 3 and sorted(made[-3:]) == sorted((heads, keys, last))),
                f"the numbers are right, but you make the {what} of every head, a tensor {list(made)}: bring "
                "the queries to the latents instead, and the values' matrix to their weighted sum",
            )
    right("queries come to the latents, and all heads share what the cache keeps.")


def _expect_attention(result: Any, good: Tensor, parts: Sequence[Tensor], mask: Tensor) -> None:
    q_nope, q_rope, latents, k_rope, w_k, w_v = parts
    width, turned, rank = q_nope.shape[-1], q_rope.shape[-1], latents.shape[-1]
    plain = (q_nope @ w_k) @ latents[:, None].mT
    both = plain + q_rope @ k_rope[:, None].mT

    def finish(scores: Tensor, scale: int, allowed: Tensor | None = mask, dim: int = -1) -> Tensor:
        scores = scores / scale**0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -1e9)
        return scores.softmax(dim=dim) @ latents[:, None]

    right_scale = width + turned
    scaled = both / right_scale**0.5
    mistakes = {
        "the turned part is missing: add the product of q_rope and k_rope to the scores": finish(
            plain, right_scale
        ),
        "the turned part is missing, and so is its width in the scale": finish(plain, width),
        "only the turned part is in your scores": finish(both - plain, right_scale),
        "you scale by the width of q_nope alone: the score sums over Dn + Dr numbers": finish(both, width),
        "you scale by the width of the latents: bringing the query to them changes no score, so the scale "
        "stays that of Dn + Dr": finish(both, rank),
        "you scale by R + Dr: the score is the one of Dn + Dr numbers, in whatever form": finish(
            both, rank + turned
        ),
        "the scores are not divided by the square root of Dn + Dr": finish(both, 1),
        "you divide by Dn + Dr: by its square root": finish(both, right_scale**2),
        "the mask is ignored": finish(both, right_scale, None),
        "the mask is the wrong way around: True is where a query may look": finish(both, right_scale, ~mask),
        "the softmax runs over the queries: over the keys, the last axis": finish(both, right_scale, dim=-2),
        "the mask comes after the softmax, so hidden keys still count in its sum: mask the scores": (
            scaled.softmax(dim=-1) * mask
        )
        @ latents[:, None],
        "hidden scores become 0, which still counts: they have to be -inf": scaled.masked_fill(
            ~mask, 0.0
        ).softmax(dim=-1)
        @ latents[:, None],
        "each part is scaled by its own width: add them, and divide the sum by the square root of Dn + Dr": (
            finish(plain / width**0.5 + (both - plain) / turned**0.5, 1)
        ),
    }
    weightless = {hint: wrong @ w_v.mT for hint, wrong in mistakes.items()}
    expect(
        not same(result, finish(both, right_scale)),
        "this is the weighted sum of the latents: each head's values come from it by w_v, transposed",
    )
    for hint, wrong in weightless.items():
        expect(not same(result, wrong), hint)
    expect(
        not isinstance(result, Tensor) or not same(result, good.transpose(1, 2)),
        "the axes of heads and queries are exchanged: return [B, H, T, Dv]",
    )
    expect(
        not isinstance(result, Tensor) or not bool(result.isnan().any()),
        "there are nan in the result: is a row of the mask without any True, or the mask inverted?",
    )
    expect_tensor(result, good)
