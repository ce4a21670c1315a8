"""The checks of 16_qwen2_vl accept the solutions and say what is wrong with likely mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from minivlm import checks
from minivlm.checks import NotYet
from minivlm.checks.qwen2_vl import FAULTS, Piece, _Patient, strengthen
from minivlm.vision.qwen2_vl import Qwen2VLVisionConfig, Qwen2VLVisionModel

EXERCISES = ("expected_tokens", "merger_order", "diagnose", "three_positions", "possible_seconds")

good = checks.qwen2_vl.solutions
TOKENS = good.expected_tokens()


def blank(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("your turn")


def ordered(*axes: str, one: int = 0) -> Callable[..., list[int]]:
    """Patch numbers in nested loops over the four axes, the first one outermost."""

    def order(rows: int, columns: int, side: int = 2) -> list[int]:
        ranges = {"top": range(0, rows, side), "left": range(0, columns, side),
                  "down": range(side), "across": range(side)}  # fmt: skip
        places: list[dict[str, int]] = [{}]
        for axis in axes:
            places = [{**place, axis: value} for place in places for value in ranges[axis]]
        return [
            (at.get("top", 0) + at.get("down", 0)) * columns + at.get("left", 0) + at.get("across", 0) + one
            for at in places
        ]

    return order


def way_back(rows: int, columns: int, side: int = 2) -> list[int]:
    order = good.merger_order(rows, columns, side)
    return [order.index(number) for number in range(len(order))]


def times_rows(rows: int, columns: int, side: int = 2) -> list[int]:
    return [n // columns * rows + n % columns for n in good.merger_order(rows, columns, side)]


def only_twos(rows: int, columns: int, side: int = 2) -> list[int]:
    return good.merger_order(rows, columns)


def by_column(rows: int, columns: int, side: int = 2) -> list[int]:
    return [row * columns + column for column in range(columns) for row in range(rows)]


def corners(rows: int, columns: int, side: int = 2) -> list[int]:
    """The first patch of each square, four times."""
    return [number for number in ordered("top", "left")(rows, columns, side) for _ in range(4)]


def nested(rows: int, columns: int, side: int = 2) -> list[list[int]]:
    order = good.merger_order(rows, columns, side)
    return [order[start : start + side**2] for start in range(0, len(order), side**2)]


def diagnosed(**instead: str) -> Callable[..., str]:
    """The right diagnosis with some answers replaced."""

    def answer(patient: Any, intact: Any) -> str:
        found = good.diagnose(patient, intact)
        return instead.get(found, found)

    return answer


def on_a_square_alone(patient: Any, intact: Any) -> str:
    grid = torch.tensor([[1, 4, 4]])
    pixels = torch.randn(16, 1176, generator=torch.Generator().manual_seed(0))
    return "none" if torch.allclose(patient(pixels, grid), intact(pixels, grid), atol=1e-4) else "order"


def placed(
    word: Callable[[int, int], tuple[int, int, int]] = lambda start, n: (start + n,) * 3,
    seen: Callable[[int, int, int, int], tuple[int, int, int]] = lambda s, t, r, c: (s + t, s + r, s + c),
    after: Callable[[list[Any], Any], int] = lambda found, piece: max(map(max, found)) + 1,
    columns_first: bool = False,
) -> Callable[[Sequence[Piece]], list[tuple[int, int, int]]]:
    """`three_positions` with one of its parts replaced."""

    def positions(pieces: Sequence[Piece]) -> list[tuple[int, int, int]]:
        found: list[tuple[int, int, int]] = []
        start = 0
        for piece in pieces:
            if isinstance(piece, int):
                found += [word(start, n) for n in range(piece)]
            else:
                places = [
                    (t, r, c) for t in range(piece[0]) for r in range(piece[1]) for c in range(piece[2])
                ]
                if columns_first:
                    places.sort(key=lambda place: (place[0], place[2], place[1]))
                found += [seen(start, *place) for place in places]
            start = after(found, piece)
        return found

    return positions


def counted(pieces: Sequence[Piece]) -> list[tuple[int, int, int]]:
    return [(n, n, n) for n in range(len(good.three_positions(pieces)))]


def time_counts(pieces: Sequence[Piece]) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    start = 0
    for piece in pieces:
        block = good.three_positions([piece])
        if not isinstance(piece, int):
            block = [(n, r, c) for n, (_, r, c) in enumerate(block)]
        found += [(start + t, start + r, start + c) for t, r, c in block]
        start = max(map(max, found)) + 1
    return found


def as_transformers_does(found: list[Any], piece: Any) -> int:
    if isinstance(piece, int):
        return int(max(map(max, found))) + 1
    return int(found[-1][0]) - piece[0] + 1 + max(piece[1:])


def seconds(low: Callable[[float], int], high: Callable[[float], int]) -> Callable[..., list[int]]:
    def possible(times: Sequence[float], there: Sequence[bool]) -> list[int]:
        change = next(n for n in range(1, len(there)) if there[n] != there[n - 1])
        return list(range(low(times[change - 1]), high(times[change])))

    return possible


def above(x: float) -> int:
    return math.floor(x) + 1


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("expected_tokens", lambda: TOKENS | {"224 x 224": 256}, "You counted patches"),
    ("expected_tokens", lambda: TOKENS | {"448 x 224": 512}, "You counted patches"),
    ("expected_tokens", lambda: TOKENS | {"448 x 224": 64}, "nothing is squashed"),
    ("expected_tokens", lambda: TOKENS | {"70 x 42": 6}, "You rounded halves up"),
    ("expected_tokens", lambda: TOKENS | {"70 x 42": 2}, "2.5"),
    ("expected_tokens", lambda: TOKENS | {"28 x 28": 1}, "below min_pixels"),
    ("expected_tokens", lambda: TOKENS | {"4000 x 2000": 4}, "shrunk to it"),
    ("expected_tokens", lambda: TOKENS | {"4000 x 2000": 10153}, "shrunk to it"),
    ("expected_tokens", lambda: dict.fromkeys(TOKENS, 64), "448 x 224: you say 64"),
    ("expected_tokens", lambda: TOKENS | {"28 x 28": "4"}, "is no number"),
    ("expected_tokens", lambda: TOKENS | {"112 x 112": 16}, "not asked for"),
    ("expected_tokens", lambda: {"224 x 224": 64}, "no prediction yet"),
    ("expected_tokens", lambda: [64, 128, 4, 4, 1], "return the dict"),
    ("merger_order", lambda rows, columns, side=2: list(range(rows * columns)), "reading order, as it was"),
    ("merger_order", ordered("top", "left", "down", "across", one=1), "count from 1"),
    ("merger_order", ordered("top", "left", "across", "down"), "inside of each you go down first"),
    ("merger_order", ordered("left", "top", "down", "across"), "the squares go down first"),
    ("merger_order", lambda r, c, side=2: good.merger_order(c, r, side), "rows for columns"),
    ("merger_order", times_rows, "you multiply by rows"),
    ("merger_order", way_back, "the way back"),
    ("merger_order", by_column, "strips"),
    ("merger_order", corners, "four times or not at all"),
    ("merger_order", ordered("top", "left", "down"), "has 12: each comes once|your list has 12"),
    ("merger_order", nested, "one flat list"),
    ("merger_order", only_twos, "not for side = 3"),
    ("merger_order", ordered("left", "top", "across", "down"), "place 1 of the row holds patch 6"),
    ("merger_order", lambda r, c, side=2: [0] * (r * c), "some patches are missing"),
    ("merger_order", lambda r, c, side=2: r * c, "return a list"),
    ("diagnose", lambda patient, intact: "none", "every tower gets the diagnosis 'none'"),
    ("diagnose", lambda patient, intact: "order", "every tower gets the diagnosis 'order'"),
    ("diagnose", lambda patient, intact: "the mask", "return one of"),
    ("diagnose", on_a_square_alone, "one token wide, too"),
    ("diagnose", diagnosed(leak="none"), "Put two pictures into one row"),
    ("diagnose", diagnosed(leak="frames"), "about two pictures first"),
    ("diagnose", diagnosed(frames="none"), "second step"),
    ("diagnose", diagnosed(frames="leak"), "only the steps of one video"),
    ("diagnose", diagnosed(order="none"), "more than one token wide"),
    ("diagnose", diagnosed(order="swapped"), "equals the intact one"),
    ("diagnose", diagnosed(swapped="none"), "on one picture"),
    ("diagnose", diagnosed(swapped="order"), "one token wide, too"),
    ("diagnose", diagnosed(none="order"), "healthy tower"),
    ("three_positions", counted, "numbered one after the other"),
    ("three_positions", placed(after=lambda found, piece: len(found)), "the number of tokens so far"),
    ("three_positions", placed(after=lambda found, piece: max(map(max, found))), "one after it"),
    ("three_positions", placed(seen=lambda s, t, r, c: (s + t, r, c)), "begin at 0: count"),
    ("three_positions", placed(seen=lambda s, t, r, c: (s + t, s + c, s + r)), "exchanged"),
    ("three_positions", placed(columns_first=True), "column after column"),
    ("three_positions", time_counts, "one moment"),
    ("three_positions", placed(word=lambda start, n: (start + n, 0, 0)), "words have a time alone"),
    ("three_positions", placed(after=lambda found, piece: found[-1][0] + 1), "one after its time"),
    ("three_positions", placed(after=as_transformers_does), "right for pictures"),
    ("three_positions", placed(seen=lambda s, t, r, c: (s + t, s + r, s + c + 1)), "token 2 gets"),
    ("three_positions", lambda pieces: list(zip(*good.three_positions(pieces), strict=True)), "three lists"),
    ("three_positions", lambda pieces: [t[0] for t in good.three_positions(pieces)], "gets a triple"),
    ("three_positions", lambda pieces: good.three_positions(pieces)[:-1], "triples: a picture"),
    ("three_positions", lambda pieces: {}, "return a list"),
    ("possible_seconds", seconds(lambda x: math.ceil(x), above), "it had not happened"),
    ("possible_seconds", seconds(math.floor, above), "it had not happened"),
    ("possible_seconds", seconds(above, math.floor), "you leave out"),
    ("possible_seconds", seconds(above, lambda x: math.ceil(x) + 1), "by then it had happened"),
    ("possible_seconds", seconds(above, math.ceil), "you leave out"),
    ("possible_seconds", lambda times, there: [times[there.index(True) - 1], times[there.index(True)]],
     "not the frames"),
    ("possible_seconds", lambda times, there: [there.index(True)], "not the frames"),
    ("possible_seconds", lambda times, there: [there.index(True) - 1, there.index(True)], "not the frames"),
    ("possible_seconds", lambda times, there: good.possible_seconds(times, [False, *there[1:]]), "vanish"),
    ("possible_seconds", lambda times, there: [times[there.index(True)]], "whole number"),
    ("possible_seconds", lambda times, there: [], "you leave out"),
    ("possible_seconds", lambda times, there: 3, "return the list"),
]  # fmt: skip


@pytest.mark.parametrize("name", EXERCISES)
def test_says_that_an_exercise_is_blank(name: str) -> None:
    with pytest.raises(NotYet, match=r"still blank: replace the line that raises with your own$"):
        getattr(checks.qwen2_vl, name)(blank)


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_names_the_likely_mistake(name: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(checks.qwen2_vl, name)(answer)


@pytest.mark.parametrize("name", EXERCISES)
def test_solutions_are_right(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(checks.qwen2_vl, name)(getattr(good, name))
    assert capsys.readouterr().out.startswith("Right: ")


def test_other_ways_to_be_right() -> None:
    def by_reshaping(rows: int, columns: int, side: int = 2) -> Tensor:
        numbers = torch.arange(rows * columns).view(rows // side, side, columns // side, side)
        return numbers.transpose(1, 2).flatten()

    checks.qwen2_vl.merger_order(by_reshaping)
    checks.qwen2_vl.three_positions(lambda pieces: torch.tensor(good.three_positions(pieces)))
    checks.qwen2_vl.possible_seconds(seconds(above, above))
    checks.qwen2_vl.expected_tokens(lambda: {size: float(number) for size, number in TOKENS.items()})


def test_a_patient_without_a_fault_is_the_tower() -> None:
    """And each fault changes something, so that there is one to find."""
    tower = Qwen2VLVisionModel(Qwen2VLVisionConfig(depth=1, embed_dim=32, hidden_size=32, num_heads=2))
    strengthen(tower.eval().requires_grad_(False))
    grids = torch.tensor([[2, 4, 4], [1, 4, 6]])
    pixels = torch.randn(56, 1176, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = tower(pixels, grids)
        for fault in FAULTS:
            gap = (_Patient(tower, fault)(pixels, grids) - right).abs().max() / right.abs().max()
            assert (gap > 0.01) == (fault != "none"), fault


def test_the_notebook_hides_five_faults() -> None:
    tower = Qwen2VLVisionModel(Qwen2VLVisionConfig(depth=1, embed_dim=32, hidden_size=32, num_heads=2))
    strengthen(tower.eval().requires_grad_(False))
    patients = checks.qwen2_vl.broken_towers(tower)
    with torch.no_grad():
        assert sorted(good.diagnose(patient, tower) for patient in patients.values()) == sorted(FAULTS)
