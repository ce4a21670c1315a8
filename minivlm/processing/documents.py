"""Documents as HTML with boxes: how Qwen2.5-VL (https://arxiv.org/abs/2502.13923) writes down a page.

    ```html
    <html><body>
    <h2 data-bbox="56 70 280 98">A title</h2>
    <ol data-bbox="56 112 280 168"><li data-bbox="56 112 280 140">first</li>...</ol>
    <div class="image" data-bbox="56 182 280 406"><img data-bbox="56 182 280 406"/></div>
    </body></html>
    ```

A box is x1 y1 x2 y2 in pixels of the picture as the model sees it, after `smart_resize`, so without that size
an answer says nothing about the page. Here, boxes are in pixels of the page as it is given: the writer scales
them to what the model sees, and the reader scales them back.

The prompt is "QwenVL HTML ". Classes of a `div` are image, image caption, table, formula, chart, music sheet
and chemical formula.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from html.parser import HTMLParser

from minivlm.errors import InputError

PROMPT = "QwenVL HTML "
WITHOUT_END = {"img", "br", "hr"}  # tags that hold nothing
FENCE = re.compile(r"^\s*```(?:html)?\s*|\s*```\s*$")

Size = tuple[int, int]  # width and height in pixels
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the page


@dataclass(frozen=True)
class Element:
    """A part of a page: what it is, where it is, and what is in it."""

    tag: str
    box: Box | None = None
    content: tuple[Element | str, ...] = ()
    kind: str = ""  # its class

    @property
    def text(self) -> str:
        """All words in it."""
        return "".join(part if isinstance(part, str) else part.text for part in self.content)

    def parts(self) -> Iterator[Element]:
        """It and all elements in it, from top to bottom."""
        yield self
        for part in self.content:
            if isinstance(part, Element):
                yield from part.parts()


def write_html(elements: Sequence[Element], page: Size, seen: Size) -> str:
    """The answer of a model that reads a page as these elements.

    >>> write_html([Element("p", (10, 20, 50, 30), ("words",))], (100, 200), (56, 112))
    '```html\\n<html><body>\\n<p data-bbox="6 11 28 17">words</p>\\n</body></html>\\n```'

    Args:
        page: the size of the page, in whose pixels the boxes are.
        seen: the size at which the model reads it: `image_processor.size_of(*page)`.

    Raises InputError: a size that is none, a tag or class with signs in it, or a box outside of the page.
    """
    _check_sizes(page, seen)
    lines = [_written(element, page, seen) for element in elements]
    return "\n".join(["```html", "<html><body>", *lines, "</body></html>", "```"])


def _written(element: Element, page: Size, seen: Size) -> str:
    for name in (element.tag, element.kind.replace(" ", "") or "none"):
        if not re.fullmatch(r"[A-Za-z][\w-]*", name):
            raise InputError(f"{name!r} is no name of a tag or a class: use letters, as in 'p' or 'image'")
    head = element.tag + (f' class="{element.kind}"' if element.kind else "")
    if element.box is not None:
        x1, y1, x2, y2 = element.box
        if not (0 <= x1 < x2 <= page[0] and 0 <= y1 < y2 <= page[1]):
            raise InputError(
                f"the box {element.box} is not inside of a page of {page[0]} x {page[1]} pixels: expected "
                "0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height"
            )
        edges = [round(edge * seen[i % 2] / page[i % 2]) for i, edge in enumerate(element.box)]
        head += f' data-bbox="{" ".join(map(str, edges))}"'
    if element.tag in WITHOUT_END:
        return f"<{head}/>"
    inside = "".join(
        escape(part, quote=False) if isinstance(part, str) else _written(part, page, seen)
        for part in element.content
    )
    return f"<{head}>{inside}</{element.tag}>"


def read_html(answer: str, page: Size, seen: Size) -> list[Element]:
    """The elements of an answer, with boxes in pixels of the page; sizes as in `write_html`.

    A model makes mistakes, and an answer may end in the middle. So tags that do not close end where what
    holds them ends, an element whose box is no box has none, and a box is cut off at the edges of the page.

    Raises InputError: a size that is none.
    """
    _check_sizes(page, seen)
    reader = _Reader(page, seen)
    reader.feed(FENCE.sub("", answer))
    reader.close()
    return reader.finish()


class _Reader(HTMLParser):
    """Keeps the elements that are still open, from the outermost on, and what is in each."""

    def __init__(self, page: Size, seen: Size) -> None:
        super().__init__(convert_charrefs=True)
        self.page, self.seen = page, seen
        self.open: list[tuple[Element, list[Element | str]]] = [(Element("page"), [])]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("html", "body"):
            return
        found = dict(attrs)
        element = Element(tag, self._box(found.get("data-bbox")), (), found.get("class") or "")
        if tag in WITHOUT_END:
            self.open[-1][1].append(element)
        else:
            self.open.append((element, []))

    def handle_endtag(self, tag: str) -> None:
        if tag in (element.tag for element, _ in self.open):
            while self._end() != tag:
                pass

    def handle_data(self, data: str) -> None:
        # What stands between the elements of a page is how its lines are broken.
        if len(self.open) > 1 or data.strip():
            self.open[-1][1].append(data)

    def _end(self) -> str:
        """Close the innermost element, and return its tag."""
        element, content = self.open.pop()
        self.open[-1][1].append(Element(element.tag, element.box, tuple(content), element.kind))
        return element.tag

    def finish(self) -> list[Element]:
        while len(self.open) > 1:
            self._end()
        return [
            part if isinstance(part, Element) else Element("p", None, (part,)) for part in self.open[0][1]
        ]

    def _box(self, text: str | None) -> Box | None:
        numbers = re.findall(r"-?\d+(?:\.\d+)?", text or "")
        if len(numbers) != 4:
            return None
        scaled = (float(n) * self.page[i % 2] / self.seen[i % 2] for i, n in enumerate(numbers))
        x1, y1, x2, y2 = (min(max(edge, 0.0), self.page[i % 2]) for i, edge in enumerate(scaled))
        return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _check_sizes(page: Size, seen: Size) -> None:
    if min(*page, *seen) < 1:
        raise InputError(f"the page is {page} and is seen as {seen}: expected width and height above 0")
