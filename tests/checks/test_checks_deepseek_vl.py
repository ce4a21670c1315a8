"""The checks of 18_deepseek_vl accept right answers and name the likely mistake in wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.checks import NotYet, deepseek_vl
from minivlm.vision.deepseek_vl import HighResolutionTower, HybridAligner
from minivlm.vision.sam import SamVisionConfig

good = deepseek_vl.solutions


def numbers(**instead: Any) -> Callable[[], Any]:
    """The right prediction with some replaced; a blank stands as _."""
    return lambda: good.on_the_way() | {name.replace("_", " "): number for name, number in instead.items()}


def asked(change: Callable[[Tensor, Tensor, Tensor], Any]) -> Callable[..., Any]:
    """From the query, and what distances of rows and of columns say to it alone, [B, H, T, T]."""

    def answer(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Any:
        by_row = good.relative_scores(q, rel_pos_h, 0 * rel_pos_w)
        return change(q, by_row, good.relative_scores(q, 0 * rel_pos_h, rel_pos_w))

    return answer


def pair_by_pair(
    index: Callable[[int, int, int], int] = lambda query, key, side: query - key + side - 1,
    ask: Callable[[Tensor, int, int], Tensor] = lambda q, i, j: q[:, :, i],
    down_first: bool = False,
) -> Callable[..., Any]:
    """Written with loops, with a distance and a query of one's own."""

    def answer(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
        side = (len(rel_pos_h) + 1) // 2
        scores = torch.zeros(*q.shape[:2], side**2, side**2)
        for i in range(side**2):
            for j in range(side**2):
                (y, x), (b, a) = divmod(i, side), divmod(j, side)
                if down_first:
                    y, x, b, a = x, y, a, b
                said = rel_pos_h[index(y, b, side)] + rel_pos_w[index(x, a, side)]
                scores[:, :, i, j] = ask(q, i, j) @ said
        return scores

    return answer


def mirrored(rows: bool, columns: bool) -> Callable[..., Any]:
    return lambda q, h, w: good.relative_scores(q, h.flip(0) if rows else h, w.flip(0) if columns else w)


def unflattened(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    side = (len(rel_pos_h) + 1) // 2
    return good.relative_scores(q, rel_pos_h, rel_pos_w).unflatten(3, (side, side)).unflatten(2, (side, side))


def with_letters(
    rows: str = "bhyxd,ykd->bhyxk", columns: str = "bhyxd,xkd->bhyxk", exchanged: bool = False
) -> Callable[..., Any]:
    """As the solution, with other letters in einsum, or with the two parts added the wrong way around."""

    def answer(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
        side = (len(rel_pos_h) + 1) // 2
        distances = torch.arange(side)[:, None] - torch.arange(side) + side - 1
        q = q.unflatten(2, (side, side))
        down, along = (
            torch.einsum(rows, q, rel_pos_h[distances]),
            torch.einsum(columns, q, rel_pos_w[distances]),
        )
        down, along = (along, down) if exchanged else (down, along)
        return (down[..., None] + along[..., None, :]).flatten(4).flatten(2, 3)

    return answer


def vectors_alone(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    return good.relative_scores(torch.ones_like(q), rel_pos_h, rel_pos_w)


def columns_of_queries(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    side = (len(rel_pos_h) + 1) // 2
    q = q.unflatten(2, (side, side)).transpose(2, 3).flatten(2, 3)
    return good.relative_scores(q, rel_pos_h, rel_pos_w)


def measured(instead: dict[str, str]) -> Callable[..., Any]:
    """The right diagnosis, with some names replaced."""

    def answer(patient: Any, intact: Any) -> str:
        name = good.diagnose(patient, intact)
        return instead.get(name, name)

    return answer


def turned(back: bool = True, against_itself: bool = False) -> Callable[..., Any]:
    """The right turns, but what comes out is not turned back, or is compared with the patient itself."""

    def answer(patient: Any, intact: Any) -> str:
        x = torch.randn(1, 6, 6, 32, generator=torch.Generator().manual_seed(0))
        good, theirs = intact(x), patient(x)
        moves: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
            "exchanged": (lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2)),
            "mirrored": (lambda x: x.flip(1, 2), lambda x: x.flip(1, 2)),
            "no positions": (lambda x: x.roll(1, dims=2), lambda x: x.roll(-1, dims=2)),
        }
        if torch.allclose(theirs, good, atol=1e-4):
            return "hidden filling"
        for name, (move, undo) in moves.items():
            out = patient(move(x))
            right = theirs if name == "no positions" or against_itself else good
            if torch.allclose(undo(out) if back else out, right, atol=1e-4):
                return name
        return "scaled query"

    return answer


def by_difference(patient: Any, intact: Any) -> str:
    """Only how far off: not enough."""
    x = torch.randn(1, 6, 6, 32, generator=torch.Generator().manual_seed(0))
    return "hidden filling" if torch.allclose(patient(x), intact(x), atol=1e-4) else "mirrored"


def on_a_ragged_grid(patient: Any, intact: Any) -> str:
    """The right turns on a grid that has to be filled up."""
    x = torch.randn(1, 8, 8, 32, generator=torch.Generator().manual_seed(0))
    if torch.allclose(patient(x.flip(1, 2)).flip(1, 2), intact(x), atol=1e-4):
        return "mirrored"
    return "hidden filling"


def joined(
    *,
    necks: str = "last first",
    mode: str = "bilinear",
    align: bool | None = False,
    sides: int = 4,
    weights: Callable[[Tensor], tuple[Any, Any]] = lambda alpha: (1.0, alpha),
    late: bool = False,
    gelu: Callable[[Tensor], Tensor] = F.gelu,
    finish: Callable[[Tensor], Tensor] = lambda grid: grid.flatten(2).transpose(1, 2),
    order: Callable[[Tensor, Tensor], Tensor] = lambda high, low: torch.cat([high, low], dim=-1),
    proj: bool = True,
) -> Callable[..., Any]:
    """The tokens of both towers with a mistake."""

    def answer(
        low: Tensor, last: Tensor, first: Tensor, tower: HighResolutionTower, aligner: HybridAligner
    ) -> Tensor:
        def shrink(x: Tensor) -> Tensor:
            def halve(x: Tensor) -> Tensor:
                return tower.downsample2(tower.downsample1(x))

            side = tower.side if late else sides * tower.side
            x = halve(x) if late else x
            x = F.interpolate(x, (side, side), mode=mode, align_corners=align)
            return x if late else halve(x)

        neck, early = tower.sam.neck, tower.early_neck
        states = {
            "last first": (neck(last), early(first)),
            "exchanged": (early(last), neck(first)),
            "sam": (neck(last), neck(first)),
            "early": (early(last), early(first)),
            "states": (neck(first), early(last)),
        }[necks]
        of_last, of_first = weights(tower.alpha)
        grid = of_last * shrink(states[0]) + of_first * shrink(states[1])
        x = gelu(order(aligner.high(finish(grid)), aligner.low(low)))
        return aligner.proj(x) if proj else x

    return answer


def gelu_at(place: str) -> Callable[..., Any]:
    """The GELU at the start, behind one of the halves, or at the end."""

    def answer(
        low: Tensor, last: Tensor, first: Tensor, tower: HighResolutionTower, aligner: HybridAligner
    ) -> Tensor:
        x = tower.shrink(tower.sam.neck(last)) + tower.alpha * tower.shrink(tower.early_neck(first))
        high = x.flatten(2).transpose(1, 2)
        if place == "start":
            high, low = F.gelu(high), F.gelu(low)
        high, low = aligner.high(high), aligner.low(low)
        high = F.gelu(high) if place == "high" else high
        x = aligner.proj(torch.cat([high, low], dim=-1))
        return F.gelu(x) if place == "end" else x

    return answer


WRONG: dict[str, list[tuple[str, Callable[..., Any]]]] = {
    "on_the_way": [
        ("windows: 16 is not it: those are the whole ones", numbers(windows=16)),
        ("windows: 21 is not it: the area", numbers(windows=21)),
        ("windows: 5 is not it", numbers(windows=5)),
        ("windows without filling: 25 is not it", numbers(windows_without_filling=25)),
        ("those of the last row have filling", numbers(windows_without_filling=20)),
        ("that is a layer without windows", numbers(keys_of_a_patch=4096)),
        ("a patch looks at itself", numbers(keys_of_a_patch=195)),
        ("those are the patches: all windows are whole", numbers(places_in_all_windows=4096)),
        ("those are its patches, 8 x 8", numbers(empty_in_the_last_window=64)),
        ("not a corner of 6 x 6", numbers(empty_in_the_last_window=36)),
        ("both towers' tokens one after the other", numbers(image_tokens=1152)),
        ("each place of the small tower's grid gets one token", numbers(image_tokens=4672)),
        ("64 x 64, halved twice", numbers(image_tokens=256)),
        ("it is not the corner alone", numbers(windows_without_filling=24)),
        ("those are the places of all windows", numbers(keys_of_a_patch=4900)),
        ("SigLIP has no class token", numbers(image_tokens=577)),
        ("you give 26, and that is too many", numbers(windows=26)),
        ("which is no number", numbers(windows="25")),
        ("return a dictionary with the keys", lambda: {"windows": 25}),
        ("return a dictionary", lambda: [25, 16, 196, 4900, 132, 576]),
    ],
    "relative_scores": [
        ("only rows are in your result", asked(lambda q, rows, columns: rows)),
        ("only columns are in your result", asked(lambda q, rows, columns: columns)),
        ("the tables are exchanged", lambda q, h, w: good.relative_scores(q, w, h)),
        ("your distances have the wrong sign", mirrored(True, True)),
        ("distances of rows have the wrong sign", mirrored(True, False)),
        ("distances of columns have the wrong sign", mirrored(False, True)),
        ("you add without side - 1", pair_by_pair(lambda query, key, side: query - key)),
        ("you take the size of the distance", pair_by_pair(lambda query, key, side: abs(query - key))),
        ("the query is scaled", asked(lambda q, rows, columns: (rows + columns) * q.shape[-1] ** -0.5)),
        ("you multiply with the key's place", pair_by_pair(ask=lambda q, i, j: q[:, :, j])),
        ("the query is missing", vectors_alone),
        ("you multiply what rows and columns say", asked(lambda q, rows, columns: rows * columns)),
        ("queries and keys are exchanged", asked(lambda q, rows, columns: (rows + columns).mT)),
        ("or places are read column by column", pair_by_pair(down_first=True)),
        ("the places of q are taken column by column", columns_of_queries),
        ("the mean of rows and columns", asked(lambda q, rows, columns: (rows + columns) / 2)),
        ("the keys' axes are exchanged where you add", with_letters(exchanged=True)),
        ("columns start from the query's row", with_letters(columns="bhyxd,ykd->bhyxk")),
        ("rows start from the query's column", with_letters(rows="bhyxd,xkd->bhyxk")),
        ("flatten those of the query", unflattened),
        ("your code calls PyTorch", pair_by_pair()),
        ("a `return` missing", lambda q, h, w: None),
    ],
    "diagnose": [
        ("for all five blocks", lambda patient, intact: "mirrored"),
        ("for all five blocks. With this fault, one whole window", lambda p, i: "hidden filling"),
        ("for all five blocks. With this fault, none of", lambda p, i: "scaled query"),
        ("return one of the five names", lambda patient, intact: "windows"),
        ("you answer 'exchanged'. With 'exchanged', a whole window", measured({"mirrored": "exchanged"})),
        ("you answer 'mirrored'. With 'mirrored', a whole window", measured({"exchanged": "mirrored"})),
        ("With 'no positions', the result would move", measured({"scaled query": "no positions"})),
        ("With 'scaled query', none of the other", measured({"no positions": "scaled query"})),
        ("With 'hidden filling', one whole window", measured({"scaled query": "hidden filling"})),
        ("With 'mirrored', a whole window, turned", by_difference),
        ("for all five blocks", on_a_ragged_grid),
        ("with the result turned or moved back", turned(back=False)),
        ("With 'exchanged', a whole window, laid on its side", turned(against_itself=True)),
        ("your code stops", lambda patient, intact: patient(torch.randn(6, 6, 32))),
    ],
    "image_tokens": [
        (
            "the small tower stands first",
            joined(order=lambda high, low: torch.cat([low, high], dim=-1)),
        ),
        ("the necks are exchanged", joined(necks="exchanged")),
        ("both states go through SAM's neck", joined(necks="sam")),
        ("both states go through the neck of the detail branch", joined(necks="early")),
        ("the states are exchanged", joined(necks="states")),
        ("alpha is missing", joined(weights=lambda alpha: (1.0, 1.0))),
        ("the detail branch is missing", joined(weights=lambda alpha: (1.0, 0.0))),
        ("alpha weighs the last state", joined(weights=lambda alpha: (alpha, 1.0))),
        ("alpha weighs both states", joined(weights=lambda alpha: (alpha, alpha))),
        ("align_corners=True", joined(align=True)),
        ("to the nearest place", joined(mode="nearest", align=None)),
        ("bicubic", joined(mode="bicubic")),
        ("you resize after the convolutions", joined(late=True)),
        ("the GELU is missing", joined(gelu=lambda x: x)),
        ("the GELU stands behind `proj`", gelu_at("end")),
        ("the GELU stands before the layers", gelu_at("start")),
        ("the GELU is for both halves", gelu_at("high")),
        ("approximation by tanh", joined(gelu=lambda x: F.gelu(x, approximate="tanh"))),
        ("`proj` is missing", joined(proj=False)),
        ("column by column", joined(finish=lambda grid: grid.mT.flatten(2).transpose(1, 2))),
        ("reshape channels into places", joined(finish=lambda grid: grid.flatten(1).view(2, -1, 20))),
        (
            "one after the other",
            joined(order=lambda high, low: torch.cat([F.pad(high, (0, 7)), F.pad(low, (0, 7))], dim=1)),
        ),
        ("your code stops", joined(sides=2)),
    ],
}


@pytest.mark.parametrize(
    ("name", "hint", "answer"),
    [(name, hint, answer) for name, wrong in WRONG.items() for hint, answer in wrong],
    ids=[f"{name}-{number}" for name, wrong in WRONG.items() for number in range(len(wrong))],
)
def test_names_the_mistake(name: str, hint: str, answer: Callable[..., Any]) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(deepseek_vl, name)(answer)


def test_every_exercise_meets_ten_wrong_answers() -> None:
    assert all(len(wrong) >= 10 for wrong in WRONG.values())


def by_gathering(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    """All distances at once, with a vector for each pair."""
    side = (len(rel_pos_h) + 1) // 2
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    apart = places[:, None] - places + side - 1  # [T, T, 2]
    return torch.einsum("bhid,ijd->bhij", q, rel_pos_h[apart[..., 0]] + rel_pos_w[apart[..., 1]])


def added_first(
    low: Tensor, last: Tensor, first: Tensor, tower: HighResolutionTower, aligner: HybridAligner
) -> Tensor:
    """Behind the necks everything is linear, so the two can be added before they are made smaller."""
    x = tower.sam.neck(last) + tower.alpha * tower.early_neck(first)
    return aligner(low, tower.shrink(x).flatten(2).transpose(1, 2))


def as_the_package(
    low: Tensor, last: Tensor, first: Tensor, tower: HighResolutionTower, aligner: HybridAligner
) -> Tensor:
    x = tower.shrink(tower.sam.neck(last)) + tower.alpha * tower.shrink(tower.early_neck(first))
    return aligner(low, x.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("on_the_way", lambda: {name: float(number) for name, number in good.on_the_way().items()}),
        ("relative_scores", by_gathering),
        ("image_tokens", added_first),
        ("image_tokens", as_the_package),
    ],
)
def test_other_right_answers_pass(name: str, answer: Callable[..., Any]) -> None:
    getattr(deepseek_vl, name)(answer)


@pytest.mark.parametrize("name", WRONG)
def test_the_solutions_pass(name: str) -> None:
    getattr(deepseek_vl, name)(getattr(good, name))


@torch.no_grad()
def test_the_patients_have_the_five_faults() -> None:
    block = deepseek_vl.small_block()
    found = [good.diagnose(patient, block.look_around) for patient in deepseek_vl.patients(block).values()]
    assert sorted(found) == sorted(deepseek_vl.FAULTS)


@torch.no_grad()
def test_a_patient_without_a_fault_is_the_block() -> None:
    """So what is measured on a patient is its fault, and nothing else."""
    block, x = deepseek_vl.small_block(), torch.randn(2, 8, 15, 32)
    torch.testing.assert_close(deepseek_vl.Patient(block, "none")(x), block.look_around(x))


@torch.no_grad()
def test_the_whole_tower_gives_the_tokens_of_the_exercise() -> None:
    """The states that the exercise is given are those that the package takes from its tower."""
    config = SamVisionConfig(
        hidden_size=12,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        output_channels=5,
        window_size=3,
        global_attn_indexes=(0, 2),
    )
    tower, aligner = HighResolutionTower(config, 3), HybridAligner(10, 20, 14)
    tower.alpha.data.fill_(0.7)
    pixels, low = torch.randn(1, 3, 64, 64), torch.randn(1, 9, 10)
    _, first, _, last = tower.sam.hidden_states(pixels)
    torch.testing.assert_close(
        good.image_tokens(low, last, first, tower, aligner), aligner(low, tower(pixels))
    )
