"""DeepSeek-VL2's words for places, both ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivlm.errors import InputError
from minivlm.processing import Box
from minivlm.processing.deepseek_vl2_boxes import (
    GROUNDING,
    LAST,
    boxes_to_tags,
    check_tags,
    reference,
    tags_to_boxes,
)

# From the repository's README: a picture of 1000 x 500 is assumed.
GIRAFFE = "<|ref|>The giraffe at the back.<|/ref|><|det|>[[580, 270, 999, 900]]<|/det|>"


def test_an_answer_of_the_published_model() -> None:
    (box,) = tags_to_boxes(GIRAFFE, 999, 999)
    assert box == Box(580, 270, 999, 900, "The giraffe at the back.")
    assert boxes_to_tags([box], 999, 999) == GIRAFFE
    (box,) = tags_to_boxes(GIRAFFE, 1998, 333)
    assert box == pytest.approx((1160, 90, 1998, 300, box.name))


def test_several() -> None:
    boxes = [
        Box(0, 0, 10, 10, "a star"),
        Box(5, 5, 20, 20, "a star"),
        Box(1, 2, 3, 4),
        Box(0, 0, 20, 20, "all"),
    ]
    text = boxes_to_tags(boxes, 20, 20)
    assert text == (
        "<|ref|>a star<|/ref|><|det|>[[0, 0, 500, 500], [250, 250, 999, 999]]<|/det|>"
        "<|det|>[[50, 100, 150, 200]]<|/det|>"
        "<|ref|>all<|/ref|><|det|>[[0, 0, 999, 999]]<|/det|>"
    )
    check_tags(text)
    back = tags_to_boxes(f"Sure: {text}.", 20, 20)
    assert [box.name for box in back] == ["a star", "a star", "", "all"]
    assert back[1] == pytest.approx((5, 5, 20, 20, "a star"), abs=0.02)
    assert boxes_to_tags([], 20, 20) == ""


def test_prompts() -> None:
    assert reference("the cat") == "<|ref|>the cat<|/ref|>"
    check_tags(f"{GROUNDING}describe the picture")
    check_tags(f"where is {reference('the cat')}, and where {reference('the dog')}?")
    check_tags("1 < 2 | 3 > 2")


sides = st.floats(1, 10_000)
shares = st.floats(0, 1)


@given(sides, sides, shares, shares, shares, shares)
def test_every_box_is_read_back(width: float, height: float, a: float, b: float, c: float, d: float) -> None:
    x0, x1, y0, y1 = min(a, b) * width, max(a, b) * width, min(c, d) * height, max(c, d) * height
    if not (x0 < x1 and y0 < y1 and x0 < width and y0 < height):
        return
    (box,) = tags_to_boxes(boxes_to_tags([Box(x0, y0, x1, y1, "it")], width, height), width, height)
    assert box.name == "it"
    for found, meant, side in ((box.x0, x0, width), (box.y1, y1, height)):
        assert abs(found - meant) <= side * 1.51 / LAST  # thinner ones are widened


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no boxes",
        "<|det|>[[1, 2, 3]]<|/det|>",
        "<|det|>[[5, 5, 5, 9]]<|/det|>",  # without area
        "<|det|>[[9, 5, 3, 9]]<|/det|>",
        "<|det|>[[0, 0, 9, 1000]]<|/det|>",
        "<|det|>[1, 2, 3, 4]<|/det|>",
        "<|det|>__import__('os')<|/det|>",
        "<|det|>[[1, 2, 30, 40]]",
        "<|det|>[[" + "9" * 5000 + ", 1, 2, 3]]<|/det|>",
    ],
)
def test_what_a_model_may_write_wrongly(text: str) -> None:
    assert tags_to_boxes(text, 100, 100) == []


def test_a_name_without_boxes_is_no_name_of_others() -> None:
    (box,) = tags_to_boxes("<|ref|>cat<|/ref|> and <|det|>[[0, 0, 999, 999]]<|/det|>", 10, 10)
    assert box.name == ""


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (Box(5, 5, 5, 9), "has no area"),
        (Box(30, 0, 40, 9), "has no area in a picture of 20 x 20"),
        (Box(float("nan"), 0, 4, 9), "has no area"),
        (Box(0, 0, 1, 1, "a<|/ref|>"), "give a name without tags"),
    ],
)
def test_boxes_that_are_refused(box: Box, message: str) -> None:
    with pytest.raises(InputError, match=message):
        boxes_to_tags([box], 20, 20)


def test_names_and_pictures_that_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be found in a picture"):
        reference(" ")
    with pytest.raises(InputError, match="expected a width and a height above 0"):
        tags_to_boxes("", 0, 5)
    with pytest.raises(InputError, match="has no partner"):
        check_tags("<|ref|>a<|ref|>b<|/ref|>")
