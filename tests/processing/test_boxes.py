"""Boxes to `<loc>` tokens and back."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minivlm.data.samples import _check_boxes
from minivlm.errors import InputError
from minivlm.processing.boxes import Box, box_to_tokens, boxes_to_text, text_to_boxes

sizes = st.integers(1, 5000)


@st.composite
def pictures_and_boxes(draw: st.DrawFn) -> tuple[int, int, tuple[float, float, float, float]]:
    width, height = draw(sizes), draw(sizes)
    x0, x1 = sorted(draw(st.tuples(*[st.floats(-width, 2 * width) | st.floats(0, width)] * 2)))
    y0, y1 = sorted(draw(st.tuples(*[st.floats(-height, 2 * height) | st.floats(0, height)] * 2)))
    return width, height, (x0, y0, x1, y1)


def test_by_hand() -> None:
    # Shares: y0 .25, x0 .5, y1 1, x1 .75; times 1023: 255.75, 511.5, 1023, 767.25.
    assert box_to_tokens((100, 25, 150, 100), 200, 100) == "<loc0256><loc0512><loc1023><loc0767>"
    (box,) = text_to_boxes("<loc0256><loc0512><loc1023><loc0767> cat", 200, 100)
    assert box.name == "cat"
    assert box[:4] == pytest.approx((100.0978, 25.0244, 149.9511, 100), abs=1e-4)


def test_halves_go_to_the_even_bin() -> None:
    # In a picture of 1023 x 1023 pixels, one bin is one pixel.
    assert box_to_tokens((0.5, 1.5, 2.5, 3.5), 1023, 1023) == "<loc0002><loc0000><loc0004><loc0002>"


@pytest.mark.parametrize(
    ("box", "side", "edges"),
    [
        ((500, 500, 503, 503), 8000, (64, 65)),  # thinner than a bin
        ((999.6, 10, 1000, 20), 1000, (1022, 1023)),  # and at the edge
        ((1000 - 1e-9, 10, 1200, 20), 1000, (1022, 1023)),
        ((-9, 10, 1e-9, 20), 1000, (0, 1)),
        ((-1e308, 10, 1e308, 20), 1e-3 + 20, (0, 1023)),  # the share itself would be infinite
    ],
)
def test_a_box_thinner_than_a_bin_is_widened_to_one(
    box: tuple[float, float, float, float], side: float, edges: tuple[int, int]
) -> None:
    text = box_to_tokens(box, side, side)
    assert (text[12:18], text[30:36]) == tuple(f"c{number:04}>" for number in edges)  # x0 and x1
    assert len(text_to_boxes(text, side, side)) == 1


def test_the_whole_picture_and_beyond() -> None:
    whole = "<loc0000><loc0000><loc1023><loc1023>"
    assert box_to_tokens((0, 0, 7, 9), 7, 9) == whole
    assert box_to_tokens((-3, -1e9, 8, 1e9), 7, 9) == whole
    assert text_to_boxes(whole, 7, 9) == [Box(0, 0, 7, 9)]


@settings(deadline=None)
@given(pictures_and_boxes())
def test_there_and_back_moves_an_edge_by_at_most_half_a_bin(
    case: tuple[int, int, tuple[float, float, float, float]],
) -> None:
    width, height, (x0, y0, x1, y1) = case
    if x0 == x1 or y0 == y1 or x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        with pytest.raises(InputError, match=r"has no area|lies outside the picture"):
            box_to_tokens((x0, y0, x1, y1), width, height)
        return
    text = box_to_tokens((x0, y0, x1, y1), width, height)
    # An independent formula: shares in the order y0 x0 y1 x1, NumPy's rounding.
    exact = np.array([y0 / height, x0 / width, y1 / height, x1 / width]).clip(0, 1) * 1023
    bins = np.array([int(number) for number in re.findall(r"\d{4}", text)])
    wide = np.tile(np.round(exact[:2]) < np.round(exact[2:]), 2)  # at least one bin
    assert (bins == np.round(exact))[wide].all()
    assert (abs(bins - exact) <= 1.5)[~wide].all()
    assert (bins[2:] - bins[:2] >= 1).all()
    _check_boxes(text)  # a line of JSONL may hold it
    (back,) = text_to_boxes(text, width, height)
    assert back[:4] == pytest.approx(
        [bins[i] / 1023 * side for i, side in ((1, width), (0, height), (3, width), (2, height))]
    )


@settings(deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 1022)] * 4, st.text("abc äЖ🙂.", max_size=9)), max_size=5),
    sizes,
    sizes,
)
def test_text_there_and_back(raw: list[tuple[int, int, int, int, str]], width: int, height: int) -> None:
    boxes = [
        Box(x * width / 1023, y * height / 1023, 1.0 * width, 1.0 * height, name.strip())
        for x, y, _, _, name in raw
    ]
    text = boxes_to_text(boxes, width, height)
    again = text_to_boxes(text, width, height)
    assert [box.name for box in again] == [box.name for box in boxes]
    for box, back in zip(boxes, again, strict=True):
        assert back[:4] == pytest.approx(box[:4])


def test_form_of_the_text() -> None:
    boxes = [Box(0, 0, 1, 1, "red star"), Box(0, 0, 1, 1, "cat")]
    whole = "<loc0000><loc0000><loc1023><loc1023>"
    assert boxes_to_text(boxes, 1, 1) == f"{whole} red star ; {whole} cat"
    assert boxes_to_text([], 1, 1) == ""
    assert boxes_to_text([Box(0, 0, 1, 1)], 1, 1) == whole


BOX = "<loc0000><loc0000><loc0512><loc1023>"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (f"{BOX} cat ; {BOX} dog", ["cat", "dog"]),
        (f"{BOX} cat;{BOX}dog", ["cat", "dog"]),
        (f"{BOX} cat {BOX} dog", ["cat", "dog"]),  # the separator is missing
        (f"{BOX} cat ;", ["cat"]),
        (f"{BOX} a<b> ; {BOX} dog", ["a<b>", "dog"]),
        (f"{BOX}", [""]),
        (f"there: {BOX} black\ncat", ["black\ncat"]),
        (f"{BOX}<seg000><seg127> cat", ["cat"]),
        (f"{BOX}{'<seg001>' * 16} cat ; {BOX} dog", ["cat", "dog"]),
        ("", []),
        ("no boxes ; here", []),
        ("<loc0000><loc0000><loc0512> cat", []),  # three
        (f"{BOX}<loc0001> cat ; {BOX} dog", ["dog"]),  # five
        (f"{BOX}{BOX} cat", []),  # eight
        ("<loc0000><loc0000><loc0512><loc1024> cat", []),  # no such token
        ("<loc0000><loc0000><loc0512><loc٠٠٠٩> cat", []),  # digits, but not 0 to 9
        ("<loc0000> <loc0000> <loc0512> <loc1023> cat", []),  # not in a row
        ("<loc0512><loc0000><loc0000><loc1023> cat", []),  # y1 < y0
        ("<loc0000><loc0512><loc0512><loc0512> cat", []),  # no width
        (f"{BOX} cat <seg001>", []),  # the shape after the name
        ("<loc00", []),
    ],
)
def test_malformed_parts_are_left_out(text: str, names: list[str]) -> None:
    assert [box.name for box in text_to_boxes(text, 10, 10)] == names


fragments = st.sampled_from(
    ["<loc0000>", "<loc0700>", "<loc1023>", "<loc9999>", "<seg001>", " ; ", "cat", "<", "loc"]
)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.text(), st.lists(st.one_of(fragments, st.text(max_size=3)), max_size=30).map("".join)),
    sizes,
    sizes,
)
@example("<loc0000>" * 1000, 5, 5)
def test_any_text_is_read(text: str, width: int, height: int) -> None:
    for box in text_to_boxes(text, width, height):
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
        assert "<loc0000>" not in box.name


@pytest.mark.parametrize(
    ("box", "size", "message"),
    [
        ((0, 0, 1), (5, 5), "has 3 numbers: expected x0, y0, x1, y1"),
        ((2, 0, 1, 1), (5, 5), "has no area"),
        ((0, 2, 1, 1), (5, 5), "has no area"),
        ((0, 0, 0, 1), (5, 5), "has no area"),
        ((0, 0, math.nan, 1), (5, 5), "not finite"),
        ((0, 0, math.inf, 1), (5, 5), "not finite"),
        ((1100, 100, 1200, 200), (1000, 1000), "lies outside the picture of 1000 x 1000: expected pixels"),
        ((100, -20, 200, 0), (1000, 1000), "lies outside"),
        ((-9, 3, 0, 4), (5, 5), "lies outside"),
        ((3, 5, 4, 9), (5, 5), "lies outside"),
        ((0, 0, 1, 1), (0, 5), "0 x 5: expected"),
        ((0, 0, 1, 1), (5, -1), "5 x -1: expected"),
        ((0, 0, 1, 1), (math.nan, 5), "nan x 5: expected"),
    ],
)
def test_refused_boxes(box: tuple[float, ...], size: tuple[float, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        box_to_tokens(box, *size)


def test_refused_names_and_pictures() -> None:
    for name in ("a;b", "<loc0001>", "a <seg001>"):
        with pytest.raises(InputError, match="remove them"):
            boxes_to_text([Box(0, 0, 1, 1, name)], 5, 5)
    with pytest.raises(InputError, match="expected a width and a height above 0"):
        text_to_boxes("", 0, 5)
