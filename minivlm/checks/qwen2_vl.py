"""Checks for 16_qwen2_vl: token counts, merger order, broken towers, three positions, what frames tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.checks import call, expect, right
from minivlm.processing.patches import Qwen2VLImageProcessor
from minivlm.rope import apply_rotary
from minivlm.vision.qwen2_vl import (
    Qwen2VLVisionConfig,
    Qwen2VLVisionModel,
    frames_of,
    grid_angles,
    grid_positions,
)

Piece = int | tuple[int, int, int]  # so many words, or the steps, rows and columns of a picture or a video
Triple = tuple[int, int, int]
Tower = Callable[[Tensor, Tensor], Tensor]

FAULTS = ("none", "leak", "frames", "order", "swapped")

# The answers of `expected_tokens`, and why.
REASONS = {
    "224 x 224": "8 x 8 squares of 28 pixels",
    "448 x 224": "twice the area, twice the tokens: nothing is squashed",
    "70 x 42": "70 / 28 is 2.5 and 42 / 28 is 1.5, and Python rounds both halves to the even number 2",
    "28 x 28": "its one token is below min_pixels, which are 4 tokens: it is enlarged",
    "4000 x 2000": "as many as 2000 x 1000 has: both are above max_pixels, and both are shrunk to it",
}
_SHRUNK = "4000 x 2000"


class solutions:
    """The solutions that the notebook continues with."""

    @staticmethod
    def expected_tokens() -> dict[str, float]:
        """Image tokens of pictures of these sizes; of the last, as a multiple of those of 2000 x 1000."""
        return {"224 x 224": 64, "448 x 224": 128, "70 x 42": 4, "28 x 28": 4, _SHRUNK: 1}

    @staticmethod
    def merger_order(rows: int, columns: int, side: int = 2) -> list[int]:
        """The patches of a grid, numbered in reading order, in the order of the row."""
        return [
            (top + down) * columns + left + across
            for top in range(0, rows, side)
            for left in range(0, columns, side)
            for down in range(side)
            for across in range(side)
        ]

    @staticmethod
    def three_positions(pieces: Sequence[Piece]) -> list[Triple]:
        """Time, row and column of each token of a row of words, pictures and videos."""
        found: list[Triple] = []
        start = 0
        for piece in pieces:
            if isinstance(piece, int):
                block = [(n, n, n) for n in range(piece)]
            else:
                steps, rows, columns = piece
                block = [(t, r, c) for t in range(steps) for r in range(rows) for c in range(columns)]
            found += [(start + t, start + r, start + c) for t, r, c in block]
            start = max(max(triple) for triple in found) + 1
        return found

    @staticmethod
    def possible_seconds(times: Sequence[float], there: Sequence[bool]) -> list[int]:
        """The whole seconds at which a thing may have appeared or vanished, from the frames that are seen."""
        change = next(n for n in range(1, len(there)) if there[n] != there[n - 1])
        return list(range(math.floor(times[change - 1]) + 1, math.floor(times[change]) + 1))

    @staticmethod
    def diagnose(patient: Tower, intact: Tower) -> str:
        """Two pictures, a video, a picture one token wide, one that is wider: in this order."""

        def run(tower: Tower, grids: list[list[int]], changed: int = 0) -> Tensor:
            grid_thw = torch.tensor(grids)
            generator = torch.Generator().manual_seed(0)
            pixels = torch.randn(int(grid_thw.prod(dim=1).sum()), 3 * 2 * 14 * 14, generator=generator)
            pixels[len(pixels) - changed :] += 1
            return tower(pixels, grid_thw)

        def close(a: Tensor, b: Tensor) -> bool:
            return torch.allclose(a, b, atol=1e-4 * max(1.0, float(b.abs().max())))

        for fault, grids in (("leak", [[1, 4, 4], [1, 4, 4]]), ("frames", [[2, 4, 4]])):
            if not close(run(patient, grids)[:4], run(patient, grids, changed=16)[:4]):
                return fault
        for fault, grids in (("swapped", [[1, 4, 2]]), ("order", [[1, 4, 4]])):
            if not close(run(patient, grids), run(intact, grids)):
                return fault
        return "none"


def expected_tokens(answer: Callable[..., Any]) -> None:
    """Each prediction against the package's image processor."""
    result = call(answer)
    expect(isinstance(result, dict), f"return the dict of your predictions, not a {type(result).__name__}")
    missing = [size for size in REASONS if size not in result]
    expect(not missing, f"no prediction yet for: {', '.join(missing)}")
    unknown = [size for size in result if size not in REASONS]
    expect(not unknown, f"not asked for: {', '.join(map(str, unknown))}; the keys are {', '.join(REASONS)}")
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in result.values())
    expect(numbers, "a prediction is no number: write 64, not a text or a list")
    count = Qwen2VLImageProcessor().num_tokens
    wrong = []
    for size, reason in REASONS.items():
        width, height = map(int, size.split(" x "))
        found = count(width, height) / (count(2000, 1000) if size == _SHRUNK else 1)
        if result[size] == found:
            continue
        said, hint = result[size], ""
        if size != _SHRUNK and said == 4 * found:
            hint = ". You counted patches: a token is 2 x 2 of them"
        if (size, said) == ("70 x 42", 6):
            hint = ". You rounded halves up"
        wrong.append(f"{size}: you say {said:g}, and it is {found:g}: {reason}{hint}")
    expect(not wrong, "\n".join(wrong))
    right("tokens follow the area, between the two limits.")


def merger_order(answer: Callable[..., Any]) -> None:
    """A grid that is wider than high, then squares of three patches."""
    found = call(answer, 4, 6)
    expect(
        isinstance(found, Tensor | list | tuple),
        f"return a list of patch numbers, not a {type(found).__name__}",
    )
    result = found.tolist() if isinstance(found, Tensor) else list(found)
    expect(
        not any(isinstance(item, list | tuple) for item in result),
        "return one flat list of numbers: the row has no brackets between its tokens",
    )
    good = solutions.merger_order(4, 6)
    blocks = [good[start : start + 4] for start in range(0, 24, 4)]
    by_column = [blocks[n] for n in (0, 3, 1, 4, 2, 5)]
    known = {
        "this is the reading order, as it was: the four patches of a square have to follow each other": [
            *range(24)
        ],
        "you count from 1: the first patch is number 0": [number + 1 for number in good],
        "the squares are right, and inside of each you go down first: the second patch is the right "
        "neighbor of the first": [block[n] for block in blocks for n in (0, 2, 1, 3)],
        "each square is right, and the squares go down first: after the first one comes the one to its "
        "right": [number for block in by_column for number in block],
        "you took rows for columns: patch number n stands in row n // columns": solutions.merger_order(6, 4),
        "you multiply by rows: the patch in row r and column c has the number r * columns + c": [
            number // 6 * 4 + number % 6 for number in good
        ],
        "this is the way back: for each patch, its place in the row. Asked is, for each place of the row, "
        "its patch": [good.index(number) for number in range(24)],
        "each patch stands four times or not at all: add the row and the column inside of the square": [
            block[0] for block in blocks for _ in range(4)
        ],
        "these are strips of four patches, or column after column: a token is a square of 2 x 2": [
            row * 6 + column for column in range(6) for row in range(4)
        ],
    }
    for hint, wrong in known.items():
        expect(result != wrong, hint)
    expect(
        len(result) == 24, f"a grid of 4 x 6 has 24 patches, and your list has {len(result)}: each comes once"
    )
    expect(
        sorted(result) == [*range(24)],
        "some patches are missing and others come twice: each of 0 to 23 comes once",
    )
    place = next((n for n in range(24) if result[n] != good[n]), 0)
    expect(
        result == good,
        f"place {place} of the row holds patch {result[place]}, expected {good[place]}. The first token of a "
        "grid with 6 columns is 0, 1, 6, 7",
    )
    threes = call(answer, 3, 6, 3)
    threes = threes.tolist() if isinstance(threes, Tensor) else list(threes)
    expect(
        threes == solutions.merger_order(3, 6, 3),
        "right for squares of 2 x 2, but not for side = 3: write `side` where you wrote 2",
    )
    right("patches that become one token are neighbors in the row, so that merging is a change of shape.")


def broken_towers(tower: Qwen2VLVisionModel) -> dict[str, nn.Module]:
    """Five towers with the weights of this one. What is wrong with each is not told."""
    faults = ("order", "none", "frames", "swapped", "leak")
    return {name: _Patient(tower, fault) for name, fault in zip("ABCDE", faults, strict=True)}


class _Patient(nn.Module):
    """The tower's forward, with one of FAULTS."""

    def __init__(self, tower: Qwen2VLVisionModel, fault: str) -> None:
        super().__init__()
        self._tower, self._fault = tower, fault

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Patches [P, C * T * P * P] and grids [M, 3] -> image tokens [N, D]."""
        tower, fault = self._tower, self._fault
        merge_size = tower.config.spatial_merge_size
        x = tower.embeddings(pixel_values)[None]
        positions = grid_positions(grid_thw, 1 if fault == "order" else merge_size)
        if fault == "swapped":
            positions = positions.flip(1)
        cos, sin = grid_angles(positions, tower.config.embed_dim // tower.config.num_heads)
        rotary = partial(apply_rotary, cos=cos, sin=sin)
        segments = frames_of(grid_thw)
        if fault == "frames":
            segments = grid_thw.prod(dim=1).tolist()
        if fault == "leak":
            segments = [len(pixel_values)]
        for layer in tower.layers:
            x = layer(x, segments, rotary)
        tokens: Tensor = tower.merger(x[0])
        return tokens


def strengthen(module: nn.Module, std: float = 0.3, seed: int = 0) -> None:
    """Random weights that make mistakes visible; those of norms are around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            parameter.add_(float("norm" in name and name.endswith("weight")))


_HOW = {
    ("leak", "none"): "Put two pictures into one row, change the second, and look at the tokens of the first",
    ("leak", "frames"): "A fault between two frames of a video may be one between two pictures, too: ask "
    "about two pictures first",
    ("frames", "none"): "Change the second step of one video, and look at the tokens of the first step",
    ("frames", "leak"): "Two pictures do not see each other here: only the steps of one video do",
    ("order", "none"): "Compare with the intact tower on a picture that is more than one token wide: where "
    "it is one token wide, reading order and merger order are the same",
    ("order", "swapped"): "On a picture one token wide, a grid of [1, 4, 2], this tower equals the intact "
    "one. With rows and columns exchanged it would not",
    ("swapped", "none"): "Compare with the intact tower on one picture",
    ("swapped", "order"): "This tower is wrong on a picture one token wide, too, a grid of [1, 4, 2], where "
    "merger order and reading order are the same",
}


def diagnose(answer: Callable[..., Any]) -> None:
    """Every fault on a tower of other weights than the notebook's, and in another order."""
    tower = Qwen2VLVisionModel(Qwen2VLVisionConfig(depth=2, embed_dim=32, hidden_size=32, num_heads=2))
    strengthen(tower.eval().requires_grad_(False), seed=1)
    found = {fault: call(answer, _Patient(tower, fault), tower) for fault in reversed(FAULTS)}
    for said in found.values():
        expect(said in FAULTS, f"you return {said!r}: return one of {', '.join(map(repr, FAULTS))}")
    expect(
        len(set(found.values())) > 1,
        f"every tower gets the diagnosis {found['none']!r}: let the measurements decide",
    )
    expect(found["none"] == "none", f"the healthy tower gets the diagnosis {found['none']!r}")
    for fault, said in found.items():
        measure = _HOW.get(
            (fault, said), "Ask in the order of the hints, and stop at the first that is wrong"
        )
        expect(said == fault, f"the tower with {fault!r} gets the diagnosis {said!r}. {measure}")
    right("each fault shows on pictures of one kind, and one square picture alone cannot tell them apart.")


_PIECES: tuple[tuple[Piece, ...], ...] = (
    (2, (1, 2, 3), 1, (1, 4, 1), 2),  # pictures
    (1, (5, 2, 3), 2),  # a video that lasts longer than it is high or wide
    ((1, 2, 2), (1, 3, 2), 1),  # nothing in front, and two pictures next to each other
)


def _with_mistake(pieces: Sequence[Piece], mistake: str) -> list[Triple]:
    """`three_positions` with one likely mistake."""
    found: list[Triple] = []
    start = 0
    for piece in pieces:
        if isinstance(piece, int):
            block = [(n, n, n) for n in range(piece)]
            if mistake == "only time":
                block = [(n, 0, 0) for n in range(piece)]
            found += [(start + t, *((r, c) if mistake == "only time" else (start + r, start + c)))
                      for t, r, c in block]  # fmt: skip
        else:
            steps, rows, columns = piece
            block = [(t, r, c) for t in range(steps) for r in range(rows) for c in range(columns)]
            if mistake == "swapped":
                block = [(t, c, r) for t, r, c in block]
            if mistake == "columns first":
                block = [(t, r, c) for t in range(steps) for c in range(columns) for r in range(rows)]
            if mistake == "counted":
                block = [(n, n, n) for n in range(len(block))]
            if mistake == "time counts":
                block = [(n, r, c) for n, (_, r, c) in enumerate(block)]
            moved = (start, 0, 0) if mistake == "not moved" else (start,) * 3
            found += [(moved[0] + t, moved[1] + r, moved[2] + c) for t, r, c in block]
        if not found:
            continue
        start = max(max(triple) for triple in found) + 1
        if mistake == "no step":
            start -= 1
        if mistake == "number":
            start = len(found)
        if mistake == "time only":
            start = found[-1][0] + 1
        if mistake == "last token":
            start = max(found[-1]) + 1
        if mistake == "rows and columns" and not isinstance(piece, int):
            start = found[-1][0] - (piece[0] - 1) + max(piece[1:])
    return found


_MISTAKES = {
    "counted": "a picture's tokens are numbered one after the other, as words: give each its row and column",
    "number": "the tokens of a picture are right, and what follows begins at the number of tokens so far: it "
    "begins one after the largest number so far",
    "no step": "what follows a piece begins at the largest number so far: it begins one after it",
    "not moved": "rows and columns of a picture begin at 0: count them on from where the picture begins",
    "swapped": "rows and columns are exchanged: a triple is (time, row, column)",
    "columns first": "the tokens of a picture come column after column: they come in reading order",
    "time counts": "time goes on inside of a picture: it is one moment, and all of its tokens have one time",
    "only time": "words have a time alone: for words, all three numbers are equal",
    "time only": "what follows a picture begins one after its time: rows and columns have gone further. Take "
    "the largest of all three",
    "last token": "what follows begins one after the last token's numbers: an earlier token, or one of an "
    "earlier piece, may have the largest",
    "rows and columns": "right for pictures. What follows a video begins one after the largest of all three, "
    "and time may have gone further than rows and columns",
}


def three_positions(answer: Callable[..., Any]) -> None:
    """Pictures between words, a long video, and pictures without words between them."""
    for pieces in _PIECES:
        found = call(answer, list(pieces))
        expect(
            isinstance(found, Tensor | list | tuple),
            f"return a list with a triple (time, row, column) for each token, not a {type(found).__name__}",
        )
        result = found.tolist() if isinstance(found, Tensor) else list(found)
        good = solutions.three_positions(pieces)
        expect(
            len(result) != 3 or len(good) == 3,
            "you return three lists, one for each axis: return one triple for each token",
        )
        expect(
            all(isinstance(triple, list | tuple) and len(triple) == 3 for triple in result),
            "each token gets a triple (time, row, column), words too",
        )
        result = [tuple(triple) for triple in result]
        for mistake, hint in _MISTAKES.items():
            wrong = _with_mistake(pieces, mistake)
            expect(result != wrong or wrong == good, hint)
        expect(
            len(result) == len(good),
            f"{list(pieces)} has {len(good)} tokens, and you return {len(result)} triples: a picture or a "
            "video has steps * rows * columns of them",
        )
        place = next((n for n in range(len(good)) if result[n] != good[n]), 0)
        expect(
            result == good,
            f"for {list(pieces)}, token {place} gets {result[place]}, expected {good[place]}: it begins one "
            "after the largest number so far, and counts on from there",
        )
    right("every piece begins one after the largest number so far, and a picture counts rows and columns.")


def possible_seconds(answer: Callable[..., Any]) -> None:
    """Frames between whole seconds and on them, appearing and vanishing."""
    cases: list[tuple[list[float], list[bool], str]] = [
        ([0.0, 2.625, 5.25, 7.875], [False, False, True, True], ""),
        (
            [0.0, 1.0, 2.0, 3.0],
            [False, False, True, True],
            ". The picture of second n is the first that shows what happens at second n",
        ),
        (
            [0.0, 2.625, 5.25, 7.875],
            [True, True, False, False],
            ". A thing may vanish, too: what counts is the first frame that differs from the one before",
        ),
        ([0.0, 3.5, 7.0], [False, True, True], ""),
    ]
    for times, there, special in cases:
        found = call(answer, list(times), list(there))
        expect(
            isinstance(found, list | tuple | range),
            f"return the list of seconds that are left, not a {type(found).__name__}",
        )
        result, good = list(found), solutions.possible_seconds(times, there)
        if result == good:
            continue
        change = next(n for n in range(1, len(there)) if there[n] != there[n - 1])
        before, after = times[change - 1], times[change]
        shown = f"the frames at {before:g} s and {after:g} s differ"
        expect(
            bool(special) or result not in ([before, after], [change - 1, change], [change]),
            f"{shown}: asked are the whole seconds between them, not the frames",
        )
        expect(
            all(float(second).is_integer() for second in result),
            f"{result}: things happen at whole seconds, so each answer is a whole number",
        )
        late = [second for second in good if second not in result]
        early = [second for second in result if second not in good]
        expect(
            not early or max(early) <= after,
            f"you allow {max(early, default=0)}, and {shown}: by then it had happened",
        )
        expect(
            not early or min(early) > before,
            f"you allow {min(early, default=0)}, and {shown}: in the first of them it had not happened"
            + special,
        )
        expect(
            False,
            f"{shown}, and you leave out {late}: everything after the first of them and up to the second may "
            f"be{special}",
        )
    right("an event lies between two frames, and the gap between frames is what is not known.")
