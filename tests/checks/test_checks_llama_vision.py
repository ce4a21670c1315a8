"""The checks of notebook 20 name the mistake that was made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.checks import NotYet, llama_vision
from minivlm.models.pictures_in_rows import pictures_in_view
from minivlm.processing.canvases import choose_canvas, size_on_canvas

good = llama_vision.solutions


# Canvases.


def scales_of(width: int, height: int, side: int, most: int) -> dict[tuple[int, int], float]:
    numbers = range(1, most + 1)
    canvases = [(r, c) for r in numbers for c in numbers if r * c <= most]
    return {(r, c): min(c * side / width, r * side / height) for r, c in canvases}


def canvas(choose: Callable[..., Any]) -> Callable[..., Any]:
    """Another choice from the scales, and the right size on it."""

    def answer(width: int, height: int, side: int, most: int) -> Any:
        found = choose(scales_of(width, height, side, most), width, height, most)
        return found, size_on_canvas(width, height, side, found)

    return answer


def size(change: Callable[..., Any]) -> Callable[..., Any]:
    """The right canvas, and another size from what is right, the scale at which it fits, and all numbers."""

    def answer(width: int, height: int, side: int, most: int) -> Any:
        found = choose_canvas(width, height, side, most)
        scale = scales_of(width, height, side, most)[found]
        return found, change(size_on_canvas(width, height, side, found), scale, width, height, side, found)

    return answer


def best(scales: dict[tuple[int, int], float]) -> list[tuple[int, int]]:
    enlarged = [scale for scale in scales.values() if scale >= 1]
    wanted = min(enlarged) if enlarged else max(scales.values())
    return [found for found, scale in scales.items() if scale == wanted]


def nearest_shape(scales: Any, width: int, height: int, most: int) -> Any:
    return min(scales, key=lambda c: abs(math.log(c[1] / c[0]) - math.log(width / height)))


def by_sides(width: int, height: int, side: int, most: int) -> Any:
    """As if every side could have so many tiles."""
    return (min(most, math.ceil(height / side)), min(most, math.ceil(width / side))), (width, height)


def covering(scales: Any, width: int, height: int, most: int) -> Any:
    return max(scales, key=lambda c: max(c[1] / width, c[0] / height))


# Who sees.


def counted(is_image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many pictures were shown, their numbers, and the right mask."""
    return is_image.cumsum(dim=0)[:, None], torch.arange(int(is_image.sum())), good.who_sees(is_image)


def seen(change: Callable[[Tensor, Tensor, Tensor, Tensor], Any]) -> Callable[[Tensor], Any]:
    return lambda is_image: change(is_image, *counted(is_image))


def run_of(is_image: Tensor) -> Tensor:
    return (is_image & ~F.pad(is_image[:-1], (1, 0))).cumsum(dim=0)


def diagnosed(**instead: str) -> Callable[..., str]:
    """The right diagnosis with some answers replaced; a blank stands as _."""

    def answer(patient: Any, intact: Any) -> str:
        found = good.diagnose(patient, intact)
        return instead.get(found.replace(" ", "_"), found)

    return answer


def said(**instead: str) -> Callable[[], dict[str, str]]:
    names = {name.replace(" ", "_").replace(",", ""): name for name in good.what_changes()}
    return lambda: good.what_changes() | {names[name]: value for name, value in instead.items()}


WRONG: dict[str, list[tuple[str, Callable[..., Any]]]] = {
    "what_changes": [
        ("^no picture, open gates: .* skips the new layers", said(no_picture_open_gates="different")),
        ("^a picture, closed gates: .* tanh", said(a_picture_closed_gates="different")),
        ("^a picture, MLP gates open: .* needs no picture", said(a_picture_MLP_gates_open="same")),
        (
            "^another picture, MLP gates open: .* attention alone",
            said(another_picture_MLP_gates_open="different"),
        ),
        ("^another picture, all gates open: .* is added", said(another_picture_all_gates_open="same")),
        ("^words before the picture: .* only earlier words", said(words_before_the_picture="different")),
        ("^no picture", lambda: dict.fromkeys(good.what_changes(), "different")),
        ("^a picture, MLP", lambda: dict.fromkeys(good.what_changes(), "same")),
        (
            "no prediction yet for: words before the picture",
            lambda: dict(list(good.what_changes().items())[:5]),
        ),
        ('predict "same" or "different"', said(a_picture_closed_gates="nearly the same")),
        ("return the dict", lambda: list(good.what_changes().values())),
        ("still blank", lambda: (_ for _ in ()).throw(NotImplementedError("your turn"))),
    ],
    "place": [
        ("rows and columns are exchanged", lambda *s: (good.place(*s)[0][::-1], good.place(*s)[1])),
        ("without reducing it", canvas(nearest_shape)),
        ("enlarged least", canvas(lambda scales, *_: max(scales, key=lambda c: (scales[c], -math.prod(c))))),
        ("without reducing it", canvas(lambda scales, *_: (1, 1))),
        ("with fewer tiles", canvas(lambda scales, *_: max(best(scales), key=math.prod))),
        ("with fewer tiles", canvas(lambda scales, *_: best(scales)[-1])),
        ("more than 4 tiles", by_sides),
        ("without reducing it|the smaller of two ratios", canvas(covering)),
        (
            "reduces it least",
            canvas(lambda scales, *_: best(scales)[0] if max(scales.values()) >= 1 else (2, 2)),
        ),
        ("other way around", size(lambda right, *_: right[::-1])),
        ("do not stretch", size(lambda right, scale, w, h, side, c: (c[1] * side, c[0] * side))),
        ("not enlarged, even", size(lambda right, scale, w, h, *_: (int(w * scale), int(h * scale)))),
        ("until it touches", size(lambda r, s, w, h, *_: (int(w * min(s, 1)), int(h * min(s, 1))))),
        (
            "has to be reduced",
            size(lambda r, s, w, h, side, c: [int(x * max(1, min(side / w, side / h))) for x in (w, h)]),
        ),
        (
            "for small pictures only",
            size(lambda r, s, w, h, side, c: [int(x * min(s, side / w, side / h)) for x in (w, h)]),
        ),
        ("the picture lies at", size(lambda right, *_: (right[0], right[1] - 5))),
        ("return two pairs", lambda *s: good.place(*s)[0]),
        ("return two pairs", lambda *s: (3, good.place(*s)[1])),
        ("your code stops", lambda width, height, side, most: width / 0),
    ],
    "states_of": [
        ("cut the row into pieces", lambda x, width: list(x.split(width, dim=-1))),
        (
            "only the others are interleaved",
            lambda x, width: [x[..., s :: x.shape[-1] // width] for s in range(x.shape[-1] // width)],
        ),
        ("come in reverse", lambda x, width: [good.states_of(x, width)[0], *good.states_of(x, width)[:0:-1]]),
        ("the last state comes first", lambda x, width: [*good.states_of(x, width)[1:], x[..., :width]]),
        (
            "one number too late",
            lambda x, width: [
                x[..., :width],
                *(
                    x[..., width:].roll(-1, dims=-1)[..., s :: x.shape[-1] // width - 1]
                    for s in range(x.shape[-1] // width - 1)
                ),
            ],
        ),
        ("you return 5: the last state is one of them", lambda x, width: good.states_of(x, width)[1:]),
        ("you return 2: one for the end", lambda x, width: [x[..., :width], x[..., width:]]),
        (
            "state 1 has shape",
            lambda x, width: [s.flatten() if n else s for n, s in enumerate(good.states_of(x, width))],
        ),
        ("state 0 has shape", lambda x, width: [s[..., None] for s in good.states_of(x, width)]),
        ("return a list of tensors", lambda x, width: dict(enumerate(good.states_of(x, width)))),
        ("state 0 should be a tensor", lambda x, width: [s.tolist() for s in good.states_of(x, width)]),
        (
            "should be its channel 1, but it is channel 0",
            lambda x, width: [s.roll(1, dims=-1) for s in good.states_of(x, width)],
        ),
    ],
    "who_sees": [
        ("sees one picture, as in Flamingo", seen(lambda i, shown, n, right: shown == n + 1)),
        ("all earlier pictures", seen(lambda i, shown, n, right: n < shown)),
        ("of its run that come after it", lambda i: run_of(i)[:, None] == run_of(i)[i]),
        ("own token does not see it", seen(lambda i, s, n, right: F.pad(right[:-1], (0, 0, 1, 0)))),
        ("see nothing, but they should see their own", seen(lambda i, s, n, right: right & ~i[:, None])),
        ("everybody sees every picture", seen(lambda i, s, n, right: torch.ones_like(right))),
        ("are exchanged", seen(lambda i, s, n, right: ~right)),
        ("look ahead", seen(lambda i, shown, n, right: (shown - i[:, None].long()) == n)),
        ("see all pictures: they should see none", seen(lambda i, shown, n, right: right | (shown == 0))),
        ("see the first: they should see none", seen(lambda i, shown, n, r: r | ((shown == 0) & (n == 0)))),
        ("only the first picture of a run", seen(lambda i, s, n, r: r & ~F.pad(i[:-1], (1, 0))[i])),
        ("a line for each word", seen(lambda i, s, n, right: right.T)),
        ("has shape", seen(lambda i, s, n, right: right[:, :1].expand(-1, len(n) + 1))),
        ("return True and False", seen(lambda i, s, n, right: right.float())),
        ("return a tensor", seen(lambda i, s, n, right: right.tolist())),
        ("word 2 does not see picture 0", seen(lambda i, s, n, right: torch.zeros_like(right))),
    ],
    "diagnose": [
        ("for all five", lambda patient, intact: "gates"),
        ("for all five .* no block|before any block", lambda patient, intact: "positions"),
        ("one of the five names", lambda patient, intact: "interleaved"),
        ("returns nothing", lambda patient, intact: None),
        ("With 'blocks', the last state would be right", diagnosed(one_late="blocks")),
        ("With 'blocks', the last state would be right", diagnosed(padding="blocks")),
        ("With 'one late', .* numbers that the intact", diagnosed(blocks="one late")),
        ("With 'one late'", diagnosed(gates="one late")),
        ("With 'positions', .* wrong already", diagnosed(padding="positions")),
        ("With 'padding', .* works in the blocks", diagnosed(positions="padding")),
        ("With 'padding', .* later ones wrong", diagnosed(gates="padding")),
        ("With 'gates', all early states would be right", diagnosed(padding="gates")),
        ("With 'gates'", diagnosed(blocks="gates")),
    ],
}


@pytest.mark.parametrize(
    ("name", "hint", "answer"),
    [(name, hint, answer) for name, wrong in WRONG.items() for hint, answer in wrong],
    ids=[f"{name}-{number}" for name, wrong in WRONG.items() for number in range(len(wrong))],
)
def test_names_the_mistake(name: str, hint: str, answer: Callable[..., Any]) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(llama_vision, name)(answer)


def test_every_exercise_meets_ten_wrong_answers() -> None:
    assert all(len(wrong) >= 10 for wrong in WRONG.values())


def by_hand(is_image: Tensor) -> Tensor:
    """Word by word."""
    mask, number = [], 0
    run: list[int] = []
    total = int(is_image.sum())
    for place, image in enumerate(is_image.tolist()):
        if image:
            run = [*run, number] if place and is_image[place - 1] else [number]
            number += 1
        mask.append([picture in run for picture in range(total)])
    return torch.tensor(mask)


def placed_by_the_package(width: int, height: int, side: int, most: int) -> Any:
    found = choose_canvas(width, height, side, most)
    return list(found), list(size_on_canvas(width, height, side, found))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("what_changes", lambda: good.what_changes() | {"more": "same"}),
        ("place", placed_by_the_package),
        (
            "states_of",
            lambda x, width: (x[..., :width], *x[..., width:].unflatten(-1, (width, -1)).unbind(-1)),
        ),
        (
            "states_of",
            lambda x, width: torch.stack(
                [
                    x[..., :width],
                    *(x[..., width + s :: x.shape[-1] // width - 1] for s in range(x.shape[-1] // width - 1)),
                ]
            ),
        ),
        ("who_sees", by_hand),
        ("who_sees", lambda is_image: pictures_in_view(is_image[None])[0]),
    ],
)
def test_other_right_answers_pass(name: str, answer: Callable[..., Any]) -> None:
    getattr(llama_vision, name)(answer)


def test_places_are_those_of_the_package() -> None:
    generator = torch.Generator().manual_seed(0)
    for width, height in torch.randint(1, 3000, (500, 2), generator=generator).tolist():
        mine, size = good.place(width, height, 560, 4)
        theirs = choose_canvas(width, height, 560, 4)
        assert mine == theirs
        pairs = zip(size, size_on_canvas(width, height, 560, theirs), strict=True)
        assert all(abs(a - b) <= 1 for a, b in pairs)


@torch.no_grad()
def test_the_patients_have_the_five_faults() -> None:
    tower = llama_vision.small_model().vision_tower
    found = [good.diagnose(patient, tower) for patient in llama_vision.patients(tower).values()]
    assert sorted(found) == sorted(llama_vision.FAULTS)


@torch.no_grad()
def test_a_patient_without_a_fault_is_the_tower() -> None:
    """So what is measured on a patient is its fault, and nothing else."""
    tower, ids = llama_vision.small_model().vision_tower, torch.tensor([3, 6, 1])
    tiles = torch.randn(3, 4, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert torch.equal(llama_vision.Patient(tower, "none")(tiles, ids), tower(tiles, ids))
