"""Checks for the exercises of 18_deepseek_vl."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minivlm.checks import NotYet, call, expect, expect_faults, expect_tensor, right, same
from minivlm.vision.deepseek_vl import HighResolutionTower, HybridAligner
from minivlm.vision.sam import (
    SamBlock,
    SamVisionConfig,
    cut_into_windows,
    join_windows,
)
from minivlm.vision.sam import relative_scores as relative_scores_of_the_package

FAULTS = ("no positions", "exchanged", "mirrored", "scaled query", "hidden filling")
WINDOW = 6  # of the blocks in the exercise with faults

Look = Callable[[Tensor], Tensor]


class solutions:
    """Reference solutions."""

    @staticmethod
    def on_the_way() -> dict[str, int]:
        """What a picture of 1,024 pixels is cut into."""
        return {
            "windows": 25,
            "windows without filling": 16,
            "keys of a patch": 196,
            "places in all windows": 4900,
            "empty in the last window": 132,
            "image tokens": 576,
        }

    @staticmethod
    def relative_scores(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
        """A vector for each distance of rows and of columns; the products with the query, added up."""
        side = (len(rel_pos_h) + 1) // 2
        places = torch.arange(side)
        distances = places[:, None] - places + side - 1
        q = q.unflatten(2, (side, side))
        by_row = torch.einsum("bhyxd,ykd->bhyxk", q, rel_pos_h[distances])
        by_column = torch.einsum("bhyxd,xkd->bhyxk", q, rel_pos_w[distances])
        return (by_row[..., None] + by_column[..., None, :]).flatten(4).flatten(2, 3)

    @staticmethod
    def diagnose(patient: Look, intact: Look) -> str:
        """A picture of one whole window; the same on its side, upside down, and moved."""

        def close(a: Tensor, b: Tensor) -> bool:
            return torch.allclose(a, b, atol=1e-4)

        x = torch.randn(1, WINDOW, WINDOW, 32)
        good = intact(x)
        if close(patient(x), good):
            return "hidden filling"
        if close(patient(x.transpose(1, 2)).transpose(1, 2), good):
            return "exchanged"
        if close(patient(x.flip(1, 2)).flip(1, 2), good):
            return "mirrored"
        if close(patient(x.roll(1, dims=2)), patient(x).roll(1, dims=2)):
            return "no positions"
        return "scaled query"

    @staticmethod
    def image_tokens(
        low: Tensor, last: Tensor, first: Tensor, tower: HighResolutionTower, aligner: HybridAligner
    ) -> Tensor:
        """Both states through their necks, to the side of the small tower; then side by side, high first."""

        def shrink(x: Tensor) -> Tensor:
            x = F.interpolate(x, (4 * tower.side, 4 * tower.side), mode="bilinear", align_corners=False)
            return tower.downsample2(tower.downsample1(x))

        grid = shrink(tower.sam.neck(last)) + tower.alpha * shrink(tower.early_neck(first))
        high = grid.flatten(2).transpose(1, 2)
        return aligner.proj(F.gelu(torch.cat([aligner.high(high), aligner.low(low)], dim=-1)))


# ---- exercise: numbers on the way --------------------------------------------------------------------------

_LIKELY: Mapping[str, Mapping[int, str]] = {
    "windows": {
        5: "that is a row of windows: there are as many rows",
        16: "those are the whole ones: 64 is no multiple of 14, and what is left over is filled up",
        20: "the area of the grid divided by a window's: windows at the edges are not whole",
        21: "the area of the grid divided by a window's: windows at the edges are not whole",
        73: "you count 14 pixels for a window's side: it has 14 patches",
        64: "that is a row of patches: a window is 14 of them wide",
    },
    "windows without filling": {
        25: "that is all windows: those at the right and lower edge are filled up",
        15: "count again: four in a row hold 56 patches, and there are as many rows",
        20: "those of the last row have filling, too",
        9: "those that do not touch the edge are more: four in a row hold 56 of 64 patches",
        4: "that is a row of them",
        24: "it is not the corner alone: the whole last row and the whole last column are filled up",
    },
    "keys of a patch": {
        14: "that is a row of the window: it is 14 wide and 14 high",
        4096: "that is a layer without windows: here a patch looks at its own window",
        195: "a patch looks at itself, too",
        4900: "those are the places of all windows: a patch looks at its own window",
        576: "a window has nothing to do with the small view: it is 14 x 14",
        64: "no window is smaller: one that holds 8 x 8 patches is filled up, and the filling counts as keys",
    },
    "places in all windows": {
        4096: "those are the patches: all windows are whole, since zeros fill them up",
        3136: "those are the places of the 16 windows without filling",
        804: "those are the empty places alone",
    },
    "empty in the last window": {
        64: "those are its patches, 8 x 8: the others are empty",
        36: "6 rows and 6 columns are missing, not a corner of 6 x 6: count 14 x 14 less what is there",
        6: "that is how many rows are missing",
        84: "those are 6 missing rows: columns are missing, too",
        804: "those are the empty places of all windows: count the last one, in the lower right corner",
    },
    "image tokens": {
        1152: "that is both towers' tokens one after the other: they are joined in width, place by place",
        4096: "those are the patches of the large view: they are made as few as the small tower's",
        4672: "that is both towers' patches: each place of the small tower's grid gets one token",
        2304: "that is 48 x 48, more than the small tower has",
        256: "that is 64 x 64, halved twice: a token is a place of the small tower's grid",
        9216: "that is 96 x 96, more than the small tower has",
        577: "SigLIP has no class token",
        24: "that is a row of them",
    },
}


def _counted() -> dict[str, int]:
    """The same numbers, measured on a grid of ones."""
    config = SamVisionConfig()
    windows = cut_into_windows(torch.ones(1, config.side, config.side, 1), config.window_size)
    return {
        "windows": len(windows),
        "windows without filling": int((windows > 0).flatten(1).all(dim=1).sum()),
        "keys of a patch": windows[0].numel(),
        "places in all windows": windows.numel(),
        "empty in the last window": int((windows[-1] == 0).sum()),
        "image tokens": (384 // 16) ** 2,
    }


def on_the_way(answer: Callable[..., Any]) -> None:
    """Counted on the package's windows."""
    result = call(answer)
    good = _counted()
    expect(
        isinstance(result, Mapping) and result.keys() == good.keys(),
        f"return a dictionary with the keys {', '.join(good)}",
    )
    for name, number in good.items():
        said = result[name]
        expect(isinstance(said, int | float), f"{name}: you give {said!r}, which is no number")
        if said == number:
            continue
        if why := _LIKELY[name].get(said):
            raise NotYet(f"{name}: {said:,} is not it: {why}")
        raise NotYet(f"{name}: you give {said:,}, and that is too {'many' if said > number else 'few'}")
    right("25 whole windows hold 804 places where there is no patch, and the decoder reads 576 tokens.")


# ---- exercise: what distances add --------------------------------------------------------------------------


class _Calls(TorchFunctionMode):
    """Counts the calls of PyTorch's functions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def relative_scores(answer: Callable[..., Any]) -> None:
    """Two rows, three heads, 4 x 4 places; then another side."""
    for side, width in ((4, 5), (7, 3)):
        generator = torch.Generator().manual_seed(side)
        q = torch.randn(2, 3, side * side, width, generator=generator)
        tables = [torch.randn(2 * side - 1, width, generator=generator) for _ in range(2)]
        with _Calls() as calls:
            result = call(answer, q, *tables)
        good = relative_scores_of_the_package(q, *tables)
        for hint, wrong in _relative_mistakes(q, *tables).items():
            expect(not same(result, wrong) or same(wrong, good), hint)
        if isinstance(result, Tensor) and result.shape == (2, 3, side, side, side, side):
            raise NotYet(
                "the result has an axis for rows and one for columns, twice: flatten those of the query and "
                "those of the key, [B, H, T, T]"
            )
        expect_tensor(result, good)
        expect(
            calls.count < 150,
            f"the numbers are right, but your code calls PyTorch {calls.count} times for {side * side} "
            "places: treat all queries and keys at once, with a table indexed by all distances",
        )
    right("two short tables, indexed by distance; each query asks them what a distance means to it.")


def _relative_mistakes(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> dict[str, Tensor]:
    good = relative_scores_of_the_package
    none = torch.zeros_like(rel_pos_h)
    side = (len(rel_pos_h) + 1) // 2
    places = torch.arange(side)
    distances = places[:, None] - places + side - 1
    rows, columns = (
        distances.repeat_interleave(side, 0).repeat_interleave(side, 1),
        distances.repeat(side, side),
    )
    of_key = torch.einsum("bhkd,qkd->bhqk", q, rel_pos_h[rows] + rel_pos_w[columns])
    without = (rel_pos_h[rows] + rel_pos_w[columns]).sum(dim=-1).expand(*q.shape[:2], -1, -1)
    apart = (places[:, None] - places).abs()
    sizes = (
        rel_pos_h[apart.repeat_interleave(side, 0).repeat_interleave(side, 1)]
        + rel_pos_w[apart.repeat(side, side)]
    )
    result = good(q, rel_pos_h, rel_pos_w)
    product = good(q, rel_pos_h, none) * good(q, none, rel_pos_w)
    turned = q.unflatten(2, (side, side)).transpose(2, 3).flatten(2, 3)
    grid = q.unflatten(2, (side, side))
    by_row, by_column = (table[distances] for table in (rel_pos_h, rel_pos_w))
    of_row = torch.einsum("bhyxd,ykd->bhyxk", grid, by_row)
    of_column = torch.einsum("bhyxd,xkd->bhyxk", grid, by_column)

    def joined(of_row: Tensor, of_column: Tensor) -> Tensor:
        return (of_row[..., None] + of_column[..., None, :]).flatten(4).flatten(2, 3)

    return {
        "only rows are in your result: add what the distance of columns says": good(q, rel_pos_h, none),
        "only columns are in your result: add what the distance of rows says": good(q, none, rel_pos_w),
        "the tables are exchanged, or places are read column by column: the first table is for rows": good(
            q, rel_pos_w, rel_pos_h
        ),
        "your distances have the wrong sign: row 0 is for a key side - 1 below the query": good(
            q, rel_pos_h.flip(0), rel_pos_w.flip(0)
        ),
        "the distances of rows have the wrong sign: query less key": good(q, rel_pos_h.flip(0), rel_pos_w),
        "the distances of columns have the wrong sign: query less key": good(q, rel_pos_h, rel_pos_w.flip(0)),
        "you add without side - 1: PyTorch takes a negative index from the end, without an error": good(
            q, rel_pos_h.roll(side - 1, 0), rel_pos_w.roll(side - 1, 0)
        ),
        "you take the size of the distance: above and below have vectors of their own": torch.einsum(
            "bhqd,qkd->bhqk", q, sizes
        ),
        "the query is scaled: it is not, in these products": result * q.shape[-1] ** -0.5,
        "you multiply with the key's place: it is the query that asks, q at the query's place": of_key,
        "the query is missing: its product with the vectors is added, not the vectors' sum": without,
        "you multiply what rows and columns say: add them": product,
        "queries and keys are exchanged: [.., query, key]": result.mT,
        "the places of q are taken column by column: they stand row by row": good(
            turned, rel_pos_h, rel_pos_w
        ),
        "you take the mean of rows and columns: add them": result / 2,
        "the keys' axes are exchanged where you add: [B, H, y, x, r, c], r before c": joined(
            of_column, of_row
        ),
        "distances of columns start from the query's row y: they start from its column x": joined(
            of_row, torch.einsum("bhyxd,ykd->bhyxk", grid, by_column)
        ),
        "distances of rows start from the query's column x: they start from its row y": joined(
            torch.einsum("bhyxd,xkd->bhyxk", grid, by_row), of_column
        ),
    }


# ---- exercise: five broken blocks --------------------------------------------------------------------------


def small_block(seed: int = 0) -> SamBlock:
    """A block of 32 channels whose windows are 6 x 6, with random weights."""
    config = SamVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        window_size=WINDOW,
        global_attn_indexes=(0,),
    )
    block = SamBlock(config, WINDOW)
    generator = torch.Generator().manual_seed(seed)
    for weight in block.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return block.requires_grad_(False)


class Patient(nn.Module):
    """The attention of a block with windows, broken in one place."""

    def __init__(self, block: SamBlock, fault: str) -> None:
        super().__init__()
        self.block, self.fault = block, fault

    def forward(self, x: Tensor) -> Tensor:
        """As `SamBlock.look_around`, except for the fault: x [B, height, width, D]."""
        attention = self.block.self_attn
        height, width = x.shape[1:3]
        windows = cut_into_windows(x, WINDOW)
        real = cut_into_windows(torch.ones_like(x[..., :1]), WINDOW).flatten(1) > 0
        changed = {
            "no positions": (0 * attention.rel_pos_h, 0 * attention.rel_pos_w),
            "exchanged": (attention.rel_pos_w, attention.rel_pos_h),
            "mirrored": (attention.rel_pos_h.flip(0), attention.rel_pos_w.flip(0)),
        }
        tables = changed.get(self.fault, (attention.rel_pos_h, attention.rel_pos_w))
        rows = windows.flatten(1, 2)
        q, k, v = (
            proj(rows).unflatten(-1, (2, -1)).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        asking = q * attention.scale if self.fault == "scaled query" else q
        scores = q @ k.mT * attention.scale + relative_scores_of_the_package(asking, *tables)
        if self.fault == "hidden filling":
            scores = scores.masked_fill(~real[:, None, None], -1e9)
        out = attention.o_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
        return join_windows(out.view_as(windows), height, width)


def patients(block: SamBlock) -> dict[str, Patient]:
    """The block's attention in five states, each broken in another place."""
    faults = ("mirrored", "hidden filling", "scaled query", "exchanged", "no positions")
    return {letter: Patient(block, fault) for letter, fault in zip("ABCDE", faults, strict=True)}


_SIGNS = {
    "no positions": "the result would move along when the places of a whole window are moved",
    "exchanged": "a whole window, laid on its side and the result laid back, would be as in the intact block",
    "mirrored": "a whole window, turned upside down and the result turned back, would be as in the intact "
    "block",
    "scaled query": "none of the other four signs would be there, on one whole window and with the result "
    "turned or moved back",
    "hidden filling": "one whole window would be as in the intact block, since nothing is filled up in it",
}


@torch.no_grad()
def diagnose(answer: Callable[..., Any]) -> None:
    """The five faults in a block with weights of its own."""
    block = small_block(seed=1)
    said = {fault: call(answer, Patient(block, fault), block.look_around) for fault in FAULTS}
    expect_faults(said, _SIGNS, "block", "blocks", "it is not so, or another fault looks alike")
    right("each fault breaks one symmetry, or leaves one: the right turn of the picture finds it.")


# ---- exercise: the tokens of two towers --------------------------------------------------------------------


def _tokens_case(side: int, seed: int) -> tuple[Tensor, Tensor, Tensor, HighResolutionTower, HybridAligner]:
    config = SamVisionConfig(
        hidden_size=12,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        output_channels=5,
        window_size=3,
        global_attn_indexes=(0, 1),
    )
    tower, aligner = HighResolutionTower(config, side), HybridAligner(10, 20, 14)
    generator = torch.Generator().manual_seed(seed)
    for weight in (*tower.parameters(), *aligner.parameters()):
        weight.data = 0.4 * torch.randn(weight.shape, generator=generator)
    tower.alpha.data.fill_(0.7)
    low = torch.randn(2, side * side, 10, generator=generator)
    last, first = (torch.randn(2, 8, 8, 12, generator=generator) for _ in range(2))
    return low, last, first, tower, aligner


@torch.no_grad()
def image_tokens(answer: Callable[..., Any]) -> None:
    """Grids of 8 x 8 that become 3 x 3, and 5 x 5."""
    for side, seed in ((3, 0), (5, 1)):
        case = _tokens_case(side, seed)
        result = call(answer, *case)
        good = solutions.image_tokens(*case)
        for hint, wrong in _token_mistakes(*case).items():
            expect(not same(result, wrong), hint)
        _expect_count(result, side)
        expect_tensor(result, good)
    right("two views, one row of tokens: what SAM sees of a place stands beside what SigLIP says of it.")


def _expect_count(result: Any, side: int) -> None:
    if not isinstance(result, Tensor) or result.dim() != 3:
        return
    count = result.shape[1]
    hints = {
        2 * side * side: "the towers' tokens stand one after the other: join them in width, `dim=-1`",
        64 + side * side: "SAM's grid is not made smaller: resize it, then use both convolutions",
        4 * side * side: "one of the convolutions is missing: each halves the grid",
    }
    expect(count == side * side or count not in hints, hints.get(count, ""))


def _token_mistakes(
    low: Tensor, last: Tensor, first: Tensor, tower: HighResolutionTower, aligner: HybridAligner
) -> dict[str, Tensor]:
    side = tower.side
    neck, early, alpha = tower.sam.neck, tower.early_neck, tower.alpha

    def shrink(x: Tensor, mode: str = "bilinear", align: bool | None = False) -> Tensor:
        align = align if mode != "nearest" else None
        x = F.interpolate(x, (4 * side, 4 * side), mode=mode, align_corners=align)
        return tower.downsample2(tower.downsample1(x))

    def late(x: Tensor) -> Tensor:
        x = tower.downsample2(tower.downsample1(x))
        return F.interpolate(x, (side, side), mode="bilinear", align_corners=False)

    def join(
        grid: Tensor,
        gelu: Callable[[Tensor], Tensor] = F.gelu,
        low_first: bool = False,
        transposed: bool = False,
        proj: Callable[[Tensor], Tensor] = aligner.proj,
    ) -> Tensor:
        grid = grid.mT if transposed else grid
        parts = [aligner.high(grid.flatten(2).transpose(1, 2)), aligner.low(low)]
        return proj(gelu(torch.cat(parts[::-1] if low_first else parts, dim=-1)))

    def both(a: Tensor, b: Tensor, **how: Any) -> Tensor:
        return shrink(a, **how) + alpha * shrink(b, **how)

    top, detail = neck(last), early(first)
    grid = both(top, detail)
    reshaped, tokens = grid.reshape(len(grid), side * side, -1), grid.flatten(2).transpose(1, 2)
    return {
        "the small tower stands first: it is the large one, then the small one": join(grid, low_first=True),
        "the necks are exchanged: `tower.sam.neck` is for the last state": join(
            both(early(last), neck(first))
        ),
        "both states go through SAM's neck: the detail branch has its own, `tower.early_neck`": join(
            both(top, neck(first))
        ),
        "both states go through the neck of the detail branch: the last one belongs to SAM's": join(
            both(early(last), detail)
        ),
        "the states are exchanged: `last` goes into SAM's neck": join(both(neck(first), early(last))),
        "alpha is missing: it weighs the detail branch": join(shrink(top) + shrink(detail)),
        "the detail branch is missing: add `first`, through its neck and weighed by alpha": join(shrink(top)),
        "alpha weighs the last state: it belongs to the detail branch": join(
            alpha * shrink(top) + shrink(detail)
        ),
        "alpha weighs both states: it belongs to the detail branch alone": join(alpha * shrink(top + detail)),
        "you resize with align_corners=True: the corners of pixels are meant, not their middles": join(
            both(top, detail, align=True)
        ),
        "you resize to the nearest place: it is bilinear": join(both(top, detail, mode="nearest")),
        "you resize with a bicubic filter: it is bilinear": join(both(top, detail, mode="bicubic")),
        "you resize after the convolutions: before them, to 4 times the side": join(
            late(top) + alpha * late(detail)
        ),
        "the GELU is missing, between the two towers' layers and `proj`": join(grid, gelu=lambda x: x),
        "this is the GELU's approximation by tanh: here it is the exact one": join(
            grid, gelu=lambda x: F.gelu(x, approximate="tanh")
        ),
        "the GELU stands behind `proj`: it stands before it": F.gelu(join(grid, gelu=lambda x: x)),
        "the GELU stands before the layers `high` and `low`: it stands behind them": aligner.proj(
            torch.cat([aligner.high(F.gelu(tokens)), aligner.low(F.gelu(low))], dim=-1)
        ),
        "the GELU is for both halves, and you use it for the large tower's alone": aligner.proj(
            torch.cat([F.gelu(aligner.high(tokens)), aligner.low(low)], dim=-1)
        ),
        "`proj` is missing at the end": join(grid, proj=lambda x: x),
        "the places of SAM's grid are read column by column: row by row, as SigLIP's": join(
            grid, transposed=True
        ),
        "you reshape channels into places: flatten the grid, then `transpose(1, 2)`": aligner.proj(
            F.gelu(torch.cat([aligner.high(reshaped), aligner.low(low)], dim=-1))
        ),
    }
