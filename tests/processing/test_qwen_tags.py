"""Tags for pictures, names and places: both ways as in Qwen's own program, and what is refused.

The lists and texts were compared with `to_list_format` and `from_list_format` of tokenization_qwen.py in the
folder of Qwen-VL-Chat.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivlm.errors import InputError
from minivlm.processing.boxes import Box
from minivlm.processing.qwen_tags import (
    box_to_tag,
    boxes_to_tags,
    check_tags,
    from_list_format,
    tags_to_boxes,
    text_to_corners,
    to_list_format,
)


@pytest.mark.parametrize(
    ("text", "elements"),
    [
        ("", []),
        ("what is it?", [{"text": "what is it?"}]),
        (
            "Picture 1:<img>a/b.png</img>\nWhat is it?",
            [{"text": "Picture 1:"}, {"image": "a/b.png"}, {"text": "\nWhat is it?"}],
        ),
        (
            "find <ref>the cat</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>.",
            [
                {"text": "find "},
                {"ref": "the cat"},
                {"box": "(1,2),(3,4)"},
                {"box": "(5,6),(7,8)"},
                {"text": "."},
            ],
        ),
        (
            "e\u0301<quad>(1,2),(3,4),(5,6),(7,8)</quad>",
            [{"text": "é"}, {"quad": "(1,2),(3,4),(5,6),(7,8)"}],
        ),
        ("<box></box>", [{"box": ""}]),
        (
            "a<ref>b<box>c</box></ref>d</quad>",
            [{"text": "a"}, {"ref": "b<box>c</box>"}, {"text": "d</quad>"}],
        ),
    ],
)
def test_a_text_as_a_list(text: str, elements: list[dict[str, str]]) -> None:
    assert to_list_format(text) == elements


@pytest.mark.parametrize(
    ("elements", "text"),
    [
        ([], ""),
        (
            [{"image": "a.png"}, {"image": "b.png"}, {"text": "compare"}],
            "Picture 1:<img>a.png</img>\nPicture 2:<img>b.png</img>\ncompare",
        ),
        (
            [{"text": "find "}, {"ref": "the cat", "box": [(10, 20, 30.7, 999)]}],
            "find <ref>the cat</ref><box>(10,20),(30,999)</box>",
        ),
        (
            [{"box": [(1, 2, 3, 4), (5, 6, 7, 8)]}],
            "<box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>",
        ),
        # Beyond the program: one box without a list, a name alone, corners, and places as text.
        ([{"box": (1, 2, 3, 4)}], "<box>(1,2),(3,4)</box>"),
        ([{"ref": "it"}, {"box": "(1,2),(3,4)"}], "<ref>it</ref><box>(1,2),(3,4)</box>"),
        ([{"quad": (1, 2, 3, 4, 5, 6, 7, 8)}], "<quad>(1,2),(3,4),(5,6),(7,8)</quad>"),
    ],
)
def test_a_list_as_a_text(elements: list[dict[str, Any]], text: str) -> None:
    assert from_list_format(elements) == text


PLACE = st.integers(0, 999)
PARTS = st.one_of(
    st.builds(lambda text: {"text": text}, st.sampled_from(["a", "see ", "\n", "the (1,2)"])),
    st.builds(lambda name: {"ref": name}, st.sampled_from(["cat", "a red star"])),
    st.builds(lambda n: {"box": f"({n[0]},{n[1]}),({n[2]},{n[3]})"}, st.tuples(*[PLACE] * 4)),
)


@given(st.lists(PARTS))
def test_a_list_comes_back(elements: list[dict[str, str]]) -> None:
    """All but pictures, to which the text adds their numbers; neighboring texts become one."""
    text = from_list_format(elements)
    again = to_list_format(text)
    assert from_list_format(again) == text
    assert [part for part in again if "text" not in part] == [part for part in elements if "text" not in part]


@pytest.mark.parametrize("tag", ["img", "ref", "box", "quad"])
def test_a_tag_that_does_not_close(tag: str) -> None:
    message = rf"<{tag}> does not close in '.*': write </{tag}> after"
    with pytest.raises(InputError, match=message):
        to_list_format(f"<ref>it</ref> and <{tag}>more")
    with pytest.raises(InputError, match=message):
        to_list_format(f"</{tag}> too early <{tag}>")


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ([{"video": "a.mp4"}], r"\{'video': 'a.mp4'\} is no part of a text"),
        ([{}], "is no part of a text"),
        ([{"box": (0, 0, 1000, 5)}], "a box has 1000: expected numbers from 0 to 999"),
        ([{"box": [(0, 0, 5, 5), (-1, 0, 5, 5)]}], "a box has -1: expected"),
        ([{"box": (0, 0, float("nan"), 5)}], "a box has nan: expected"),
        ([{"box": (1, 2, 3)}], "a box has 3 numbers: expected 4"),
        ([{"box": []}], r"a box is \[\]: expected 4 numbers"),
        ([{"box": None}], "a box is None: expected 4 numbers"),
        ([{"box": "(1,2),(3,1000)"}], "a box has 1000"),
        ([{"box": "1,2,3,4"}], "a box holds '1,2,3,4': expected corners"),
        ([{"quad": (1, 2, 3, 4)}], "a quad has 4 numbers: expected 8"),
        ([{"ref": "a</ref><box>"}], "has a tag in it"),
        ([{"image": "a</img>.png"}], "has a tag in it"),
    ],
)
def test_lists_that_are_refused(elements: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_list_format(elements)


@pytest.mark.parametrize("text", ["(1,2),(3,4)", " ( 1 , 2 ) , (3,4) "])
def test_corners_are_read(text: str) -> None:
    assert text_to_corners(text) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "text", ["", "(1,2)", "(1,2),(3,4),(5,6)", "(1.5,2),(3,4)", "(-1,2),(3,4)", "(1,2)(3,4)"]
)
def test_other_corners_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="a box h"):
        text_to_corners(text)


def test_prompts_are_checked_for_tags_but_pictures() -> None:
    """In a prompt, `<img>` is what somebody typed."""
    check_tags("an <img> and <ref>a cat</ref><box>(1,2),(3,4)</box>")
    with pytest.raises(InputError, match="<ref> does not close"):
        check_tags("<ref>a cat")
    with pytest.raises(InputError, match="a box has 1000"):
        check_tags("<box>(1,2),(3,1000)</box>")
    with pytest.raises(InputError, match="a quad has 4 numbers"):
        check_tags("<quad>(1,2),(3,4)</quad>")


# Pixels.


def test_boxes_in_pixels() -> None:
    assert box_to_tag((10, 20, 100, 50), 100, 50) == "<box>(100,400),(999,999)</box>"
    assert box_to_tag((-5, -5, 500, 25), 100, 50) == "<box>(0,0),(999,500)</box>"
    assert box_to_tag((10, 20, 10.01, 20.01), 100, 50) == "<box>(100,400),(101,401)</box>"
    assert box_to_tag((99.99, 49.99, 100, 50), 100, 50) == "<box>(998,998),(999,999)</box>"
    boxes = [Box(10, 20, 30, 40, "a cat"), Box(0, 0, 50, 25)]
    text = boxes_to_tags(boxes, 100, 50)
    assert text == "<ref>a cat</ref><box>(100,400),(300,800)</box><box>(0,0),(500,500)</box>"
    # A box without a name belongs to the one before it.
    assert tags_to_boxes(text, 100, 50) == [boxes[0], Box(0, 0, 50, 25, "a cat")]


@given(*[st.integers(0, 99)] * 4)
def test_a_box_comes_back_to_a_thousandth(x: int, y: int, width: int, height: int) -> None:
    box = Box(x, y, x + width + 1, y + height + 1, "it")
    (found,) = tags_to_boxes(boxes_to_tags([box], 200, 200), 200, 200)
    assert found.name == "it"
    assert all(abs(a - b) <= 0.2 for a, b in zip(found[:4], box[:4], strict=True))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("no boxes", []),
        ("<ref>a</ref><box>(1,2),(3,4)</box> and <ref>b</ref><box>(5,6),(7,8)</box>", ["a", "b"]),
        ("<ref>a</ref> somewhere <box>(1,2),(3,4)</box>", [""]),
        ("<ref>a<ref>b</ref><box>(1,2),(3,4)</box>", ["b"]),
        ("<ref>a</ref><box>(1,2),(3,4)", []),
        ("<ref>a</ref><box>(1,2),(3,1000)</box>", []),
        ("<ref>a</ref><box>(3,2),(1,4)</box>", []),
        ("<ref>a</ref><box>1,2,3,4</box><box>(1,2),(3,4)</box>", ["a"]),
        ("(1,2),(3,4)</box>", []),
        (f"<box>(1,2),(3,{'9' * 5000})</box>", []),
        ("<ref>a</ref> and b</ref><box>(1,2),(3,4)</box>", [""]),
    ],
)
def test_any_answer_is_read(text: str, names: list[str]) -> None:
    assert [box.name for box in tags_to_boxes(text, 100, 100)] == names


@pytest.mark.parametrize(
    "box", [(5, 5, 5, 9), (9, 5, 5, 9), (100, 0, 120, 5), (-9, 0, 0, 5), (0, 0, float("nan"), 1)]
)
def test_boxes_that_are_refused(box: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="has no area in a picture of 100 x 50"):
        box_to_tag(box, 100, 50)


def test_other_bad_input() -> None:
    with pytest.raises(InputError, match="the box has 3 numbers"):
        box_to_tag((0, 0, 1), 10, 10)
    with pytest.raises(InputError, match="has a tag in it"):
        boxes_to_tags([Box(0, 0, 1, 1, "a<box>")], 10, 10)
    with pytest.raises(InputError, match="the picture is 0 x 5"):
        tags_to_boxes("", 0, 5)
