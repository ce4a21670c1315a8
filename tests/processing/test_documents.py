"""Pages as HTML and back, with boxes in pixels of what the model sees."""

from __future__ import annotations

import pytest

from minivlm.errors import InputError
from minivlm.processing.documents import Element, read_html, write_html
from minivlm.processing.patches import Qwen2VLImageProcessor

PAGE = (300, 400)
SEEN = Qwen2VLImageProcessor().size_of(*PAGE)  # 308 x 392: wider and lower
PICTURE = (30.0, 200.0, 150.0, 280.0)
ELEMENTS = [
    Element("h2", (30, 20, 150, 40), ("Stars & <circles>",)),
    Element(
        "p",
        (30, 60, 270, 100),
        (
            "a ",
            Element("b", None, ("red",)),
            " star",
        ),
    ),
    Element(
        "ol",
        (30, 110, 270, 180),
        (Element("li", (30, 110, 270, 140), ("first",)), Element("li", (30, 150, 270, 180), ("second",))),
    ),
    Element("div", PICTURE, (Element("img", PICTURE),), "image"),
    Element("div", (30, 290, 150, 310), ("what it shows",), "image caption"),
    Element(
        "div",
        (160, 200, 290, 310),
        (Element("table", None, (Element("tr", None, (Element("td", None, ("3",)),)),)),),
        "table",
    ),
]


def test_the_form():
    html = write_html(ELEMENTS[:1] + ELEMENTS[3:4], PAGE, SEEN)
    assert html.splitlines() == [
        "```html",
        "<html><body>",
        '<h2 data-bbox="31 20 154 39">Stars &amp; &lt;circles&gt;</h2>',
        '<div class="image" data-bbox="31 196 154 274"><img data-bbox="31 196 154 274"/></div>',
        "</body></html>",
        "```",
    ]


def without_boxes(element: Element) -> Element:
    inside = tuple(part if isinstance(part, str) else without_boxes(part) for part in element.content)
    return Element(element.tag, None, inside, element.kind)


def test_there_and_back():
    found = read_html(write_html(ELEMENTS, PAGE, SEEN), PAGE, SEEN)
    assert list(map(without_boxes, found)) == list(map(without_boxes, ELEMENTS))
    before = [part.box for element in ELEMENTS for part in element.parts()]
    after = [part.box for element in found for part in element.parts()]
    assert len(before) == 13
    for one, other in zip(before, after, strict=True):
        # Whole pixels of what the model sees: half of one at most is lost.
        assert one == other or max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 0.5 * 400 / 392


def test_boxes_of_the_page_are_other_ones():
    """Read without scaling, a box on a large page is far off."""
    page, seen = (2000, 3000), Qwen2VLImageProcessor().size_of(2000, 3000)
    html = write_html([Element("p", (1000, 2000, 1500, 2100), ("words",))], page, seen)
    right, wrong = (read_html(html, page, size)[0].box for size in (seen, page))
    assert right == pytest.approx((1000, 2000, 1500, 2100), abs=1.5)
    assert wrong is not None
    assert abs(wrong[1] - 2000) > 1000


@pytest.mark.parametrize(
    ("answer", "texts", "boxes"),
    [
        ('<p data-bbox="0 0 30 30">no fence</p>', ["no fence"], 1),
        ('```html\n<html><body>\n<p data-bbox="0 0 30 30">cut o', ["cut o"], 1),
        ('<ol data-bbox="0 0 9 9"><li>one<li data-bbox="1 1 2 2">two</ol><p>three', ["onetwo", "three"], 2),
        ("<p>one</div>two</p></p><p>three</p>", ["onetwo", "three"], 0),
        ('<p data-bbox="30 0 30 30">no area</p>', ["no area"], 0),
        ('<p data-bbox="1 2 3">three numbers</p>', ["three numbers"], 0),
        ('<p data-bbox="[0, 0, 30, 30]">as a list</p>', ["as a list"], 1),
        ("just words", ["just words"], 0),
        ("", [], 0),
    ],
)
def test_answers_with_mistakes(answer: str, texts: list[str], boxes: int):
    found = read_html(answer, PAGE, SEEN)
    assert [element.text for element in found] == texts
    assert sum(part.box is not None for element in found for part in element.parts()) == boxes


def test_a_box_beyond_the_page_ends_there():
    assert read_html('<p data-bbox="-5 10 9999 20">x</p>', PAGE, PAGE)[0].box == (0, 10, 300, 20)


@pytest.mark.parametrize(
    ("element", "message"),
    [
        (Element("p", (0, 0, 301, 10)), "not inside of a page of 300 x 400"),
        (Element("p", (10, 0, 10, 10)), "not inside of a page"),
        (Element("p onclick"), "no name of a tag"),
        (Element("div", None, (), 'image"'), "no name of a tag or a class"),
    ],
)
def test_elements_that_are_refused(element: Element, message: str):
    with pytest.raises(InputError, match=message):
        write_html([element], PAGE, SEEN)


def test_sizes_that_are_refused():
    with pytest.raises(InputError, match="expected width and height above 0"):
        read_html("", PAGE, (0, 10))
