"""axe-core finds nothing wrong with the live pages: light and dark, on a phone and a desk, in every state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect
from test_live_page import PHONE, settled
from test_live_page import folder as folder
from test_live_towers import settled as towers_settled

DESK = {"width": 1280, "height": 900}
AXE = Axe()


def violations(page: Page) -> list[str]:
    """What axe-core objects to, good practice included, each with the first elements it means."""
    found = []
    for rule in AXE.run(page).response["violations"]:
        elements = [node["html"][:150] for node in rule["nodes"][:3]]
        found.append(f"{rule['id']} ({rule['impact']}): {rule['help']}: {elements}")
    return found


def assert_accessible(page: Page) -> None:
    faults = []
    for size in (DESK, PHONE):
        for scheme in ("light", "dark"):
            page.set_viewport_size(size)
            page.emulate_media(color_scheme=scheme)
            faults += [f"{scheme}, {size['width']}: {fault}" for fault in violations(page)]
    assert not faults, "\n".join(faults)


def as_it_opens(page: Page) -> None:
    settled(page)


def opened_and_broken(page: Page) -> None:
    """Every part of the page unfolded, and every kind of result there."""
    settled(page)
    page.locator("#prompt").fill("segment pink circle")
    page.locator("#no_rope").check()
    page.locator("[data-thing='0']").focus()
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    page.locator("#occlude").click()
    settled(page)
    expect(page.locator("#occlusion_said")).not_to_contain_text("Not measured yet")


def on_tour(page: Page) -> None:
    settled(page)
    page.locator("#tour_start").click()
    page.locator("#tour_choices button").first.click()
    page.evaluate("document.getElementById('tour_compare').open = true")
    settled(page)


def a_head_opened(page: Page) -> None:
    settled(page)
    page.locator("#open_head").click()
    expect(page.locator("#level_shown table").first).to_be_visible()


def a_batch_chosen(page: Page) -> None:
    towers_settled(page)
    page.locator("#tries button").nth(1).click()
    towers_settled(page)


def turned(page: Page) -> None:
    page.locator("#shift").fill("50")


def padded(page: Page) -> None:
    page.locator("[data-value=right]").click()
    page.locator("#matrix [role=gridcell]").nth(20).click()


@pytest.mark.parametrize(
    ("address", "prepare"),
    [
        ("index.html", as_it_opens),
        ("index.html", opened_and_broken),
        ("index.html", on_tour),
        ("index.html", a_head_opened),
        ("two_towers.html", a_batch_chosen),
        ("rotary.html", turned),
        ("rotary.html?embed", turned),
        ("mask.html", padded),
        ("mask.html?embed", padded),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_live_pages(address: str, prepare: Callable[[Page], None], folder: Path, page: Page) -> None:
    page.goto(f"{folder.as_uri()}/{address}")
    prepare(page)
    assert_accessible(page)


def test_a_fault_is_found(folder: Path, page: Page) -> None:
    page.goto(f"{folder.as_uri()}/rotary.html")
    page.evaluate("document.querySelector('label[for=shift]').remove()")
    assert any("label" in fault for fault in violations(page))
