"""The book in a browser: build/book, as `make book` leaves it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from conftest import SEEN
from hover import explore
from notebooks_and_sources import NOTEBOOKS, ROOT
from playwright.sync_api import Locator, Page, expect
from watching import Watcher, faint_texts, mathematics, width

BOOK = ROOT / "build" / "book"
PARTS = 4  # of the pages, for as many tests that can run at once
SAMPLE = 10  # one of so many pages of source code, which are alike, is opened also where there is little time
PHONE = {"width": 390, "height": 844}
LEAST_CONTRAST = 4.5  # WCAG 2, level AA


@pytest.fixture(scope="session", autouse=True)
def _book_is_there() -> None:
    if not (BOOK / "index.html").exists():
        pytest.fail(f"{BOOK} holds no book: make book", pytrace=False)


@pytest.fixture(scope="session")
def site() -> Iterator[str]:
    """The book as a web server shows it."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(BOOK))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def pages() -> list[Path]:
    return sorted(BOOK.rglob("*.html"))


def test_every_notebook_has_a_page() -> None:
    assert {path.stem for path in NOTEBOOKS} <= {page.stem for page in pages()}


def sources() -> list[Path]:
    """The pages that show a module's code: nearly half of all."""
    return [path for path in pages() if path.is_relative_to(BOOK / "_modules")]


@pytest.mark.parametrize("part", range(PARTS))
def test_every_page(part: int, page: Page) -> None:
    """But for pages of source code, of which there is a sample here."""
    left_out = set(sources()) - set(sources()[::SAMPLE])
    reads_well([path for path in pages() if path not in left_out][part::PARTS], page)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_page_of_source_code(part: int, page: Page) -> None:
    reads_well(sources()[part::PARTS], page)


def reads_well(paths: list[Path], page: Page) -> None:
    """Opened from the disk: nothing is missing or fetched, and it reads in the dark and on a phone."""
    watcher = Watcher(page, own=(BOOK.as_uri(),))
    faults = []
    for path in paths:
        page.emulate_media(color_scheme="light")
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(path.as_uri())
        if not page.title():
            watcher.complaints.append("no title")
        rendered, raw = mathematics(page)
        if raw:
            watcher.complaints.append(f"{raw} of {rendered + raw} formulas are not drawn")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            watcher.complaints += [f"{scheme}: {text}" for text in faint_texts(page, LEAST_CONTRAST)]
        page.set_viewport_size(PHONE)
        if width(page) > PHONE["width"]:
            watcher.complaints.append(f"{width(page)} pixels wide on a phone of {PHONE['width']}")
        faults += [f"{path.relative_to(BOOK)}: {complaint}" for complaint in watcher.take()]
    assert not faults, "\n".join(faults)


def test_rows_of_sentences_are_cards_on_a_phone(page: Page) -> None:
    page.goto((BOOK / "docs" / "common-mistakes.html").as_uri())
    cell = page.locator("table td:nth-child(2)").first
    label = cell.locator(".column")
    expect(label).to_be_hidden()
    assert width_of(cell) < 600
    page.set_viewport_size(PHONE)
    expect(label).to_have_text("what it is, and what to do")
    expect(label).to_be_visible()
    assert width_of(cell) > 300, "a column beside others, of one word a line"
    page.goto((BOOK / "README.html").as_uri())
    numbers = page.locator("table").filter(has_text="box mean IoU")
    assert numbers.locator("thead").is_visible(), "numbers are compared by column"


def width_of(part: Locator) -> float:
    box = part.bounding_box()
    assert box is not None
    return box["width"]


def test_formulas_are_drawn(page: Page) -> None:
    page.goto((BOOK / "notebooks" / "02_clip_and_siglip.html").as_uri())
    rendered, raw = mathematics(page)
    assert rendered > 10
    assert raw == 0
    formula = page.locator("div.math mjx-container svg").first
    formula.scroll_into_view_if_needed()
    box = formula.bounding_box()
    assert box is not None
    assert min(box["width"], box["height"]) > 20


@pytest.mark.parametrize("served", [False, True], ids=["from the disk", "from a server"])
def test_search_finds_a_word(served: bool, site: str, page: Page) -> None:
    home = site if served else BOOK.as_uri()
    watcher = Watcher(page, own=(home,))
    page.goto(f"{home}/index.html")
    page.get_by_placeholder("Search").fill("RoPE")
    page.keyboard.press("Enter")
    found = page.locator("#search-results li a")
    expect(found.filter(has_text="Gemma").first).to_be_visible()
    quoted = page.locator("#search-results li").filter(has_text="Gemma").locator("p.context").first
    expect(quoted).to_contain_text(re.compile("rope", re.IGNORECASE))
    assert watcher.take() == []
    found.filter(has_text="Gemma").first.click()
    expect(page.locator("article")).to_contain_text("rotary")


def test_the_button_changes_between_light_and_dark(page: Page) -> None:
    page.goto((BOOK / "index.html").as_uri())
    grounds = set()
    for _ in range(3):  # as the system has it, light, dark
        page.get_by_role("button", name="Toggle Light / Dark").first.click()
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


@pytest.mark.parametrize("name", ["index", "notebooks/02_clip_and_siglip", "notebooks/09_looking_inside"])
def test_pictures_for_eyes(name: str, page: Page) -> None:
    """Nothing is judged here but that there is something to see."""
    page.goto((BOOK / f"{name}.html").as_uri())
    mathematics(page)
    sizes = {"desk": {"width": 1280, "height": 900}, "phone": PHONE}
    for scheme in ("light", "dark"):
        for place, size in sizes.items():
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size(size)
            file = SEEN / f"book_{Path(name).stem}_{scheme}_{place}.png"
            assert len(page.screenshot(path=file, full_page=name == "index")) > 10_000


@pytest.mark.parametrize("chapter", ["05_gemma", "06_merging"])
def test_a_live_page_inside_of_a_chapter(chapter: str, page: Page) -> None:
    """From the disk: as high as what it shows, as light or dark as the chapter, and missing on paper."""
    page.goto((BOOK / "notebooks" / f"{chapter}.html").as_uri())
    place = page.locator("iframe.live")
    place.scroll_into_view_if_needed()
    expect(place.content_frame.locator("#said")).not_to_be_empty()
    inside = place.element_handle().content_frame()
    assert inside is not None
    for size in (PHONE, {"width": 1280, "height": 900}):
        page.set_viewport_size(size)
        # A message is on its way, so wait for it.
        inside.wait_for_function("Math.abs(document.body.getBoundingClientRect().height - innerHeight) < 2")
        assert inside.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for theme, color in (("dark", "rgb(20, 23, 28)"), ("light", "rgb(255, 255, 255)")):
        page.evaluate("(theme) => { document.body.dataset.theme = theme; }", theme)
        expect(place.content_frame.locator("body")).to_have_css("background-color", color)
    page.emulate_media(media="print")
    expect(place).to_be_hidden()


PICTURE = 'div[id^="look-"]'  # folded away: its section is optional


def test_the_hover_picture_reacts(page: Page) -> None:
    page.goto((BOOK / "notebooks" / "09_looking_inside.html").as_uri())
    page.locator("details.optional", has=page.locator(PICTURE)).locator("> summary").click()
    explore(page, page.locator(PICTURE))
