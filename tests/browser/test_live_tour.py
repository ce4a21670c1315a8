"""The guided tour of docs/live: it can be followed, and what it says is what happens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PATIENCE
from notebooks_and_sources import ROOT
from playwright.sync_api import Browser, Page, expect
from test_live_page import answer_of, drag, scene_of, settled
from test_live_page import folder as folder

from minivlm.attention import record_attention
from minivlm.looking.measures import attention_distance
from minivlm.models.load import load_answering
from minivlm.world.scenes import Thing

STEPS = 10


@pytest.fixture(scope="module")
def tour(chromium: Browser, folder: Path) -> Iterator[Page]:
    page = chromium.new_page(reduced_motion="reduce", viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.goto((folder / "index.html").as_uri())
    settled(page)
    page.locator("#tour_start").click()
    settled(page)
    yield page
    page.close()


def go(page: Page, step: int) -> None:
    """To a step, counted from 1."""
    page.evaluate("(step) => page.parts.find((part) => part instanceof Tour).go(step)", step - 1)
    settled(page)


def answers(page: Page, count: int) -> list[str]:
    """As many answers, each drawn anew."""
    said = []
    for _ in range(count):
        page.locator("#again").click()
        settled(page)
        said.append(answer_of(page))
    return said


def patches_of(thing: Thing) -> list[int]:
    covered = thing.mask().reshape(8, 8, 8, 8).mean(axis=(1, 3)).ravel()
    return [int(n) for n in np.flatnonzero(covered >= 0.1)]


def shares(page: Page) -> list[float]:
    found: list[float] = page.evaluate("Array.from(Looking.shares().slice(0, IMAGE_TOKENS))")
    return found


def test_every_step_can_be_followed(tour: Page) -> None:
    go(tour, 1)
    steps: list[dict[str, Any]] = tour.evaluate("TOUR")
    assert len(steps) == STEPS
    for number, step in enumerate(steps, start=1):
        expect(tour.locator("#tour_title")).to_have_text(f"{number} of {STEPS}. {step['title']}")
        expect(tour.locator("#tour_title")).to_be_focused()
        expect(tour.locator("#tour_todo")).to_have_text(step["todo"])
        expect(tour.locator("#tour_compare")).to_be_hidden()
        expect(tour.locator(".named, .task, #tour_next.main")).to_have_count(0)
        choices = tour.locator("#tour_choices button")
        compared = tour.locator("#tour_then")
        choices.nth((step["right"] + 1) % 3).click()
        expect(choices.nth((step["right"] + 1) % 3)).to_be_focused()
        assert_in_the_window(tour, step["part"])
        expect(compared).to_have_text(f"Nothing has changed yet: {step['todo']}")
        tour.evaluate("look_at(page.result.prefix_ids.length - 1)")
        expect(compared).to_contain_text(re.compile("^Rather: "))
        choices.nth(step["right"]).click()
        expect(compared).to_contain_text(re.compile("^As you predicted. "))
        tour.locator(".task button").click()
        expect(tour.locator("#tour_compare summary")).to_be_focused()
        expect(tour.locator("#tour_end")).to_be_visible(visible=number == STEPS)
        name, title = step["notebook"]
        assert (ROOT / "notebooks" / f"{name}.ipynb").exists()
        assert re.match(rf"{name[:2]}, \w", title)
        if number < STEPS:
            tour.locator("#tour_next").click()
            settled(tour)
    assert tour.evaluate("TOUR.map((step) => step.notebook[0])") == sorted(s["notebook"][0] for s in steps)


def assert_in_the_window(page: Page, name: str) -> None:
    """The part that a step names is outlined, and one can see it, or as much of it as the window holds."""
    part = page.locator(".named")
    expect(part).to_have_class(f"{name} named")
    top, bottom, height = page.evaluate("""() => {
      const frame = document.querySelector(".named").getBoundingClientRect();
      return [frame.top, frame.bottom, innerHeight];
    }""")
    assert top >= 0
    assert bottom <= height or top < 40
    expect(part.locator(".task")).to_be_in_viewport(ratio=1)


def test_1_things_are_named_from_left_to_right(tour: Page) -> None:
    go(tour, 1)
    assert answer_of(tour).endswith(", a medium purple star")
    drag(tour, 2, -34, -22)
    assert answer_of(tour).startswith("a medium purple star, ")


def test_2_numbers_of_a_patch(tour: Page) -> None:
    go(tour, 2)
    patches = tour.evaluate("model.vision_tower.patches(page.result.pixel_values).shape")
    filters = tour.evaluate("model.vision_tower.weight('embeddings.patch_embedding.weight').shape")
    assert (patches, filters) == ([64, 192], [96, 3, 8, 8])
    assert "a medium pink circle" in answer_of(tour)
    tour.locator("[data-thing='0']").click()
    for _ in range(11):
        tour.locator("#smaller").click()
    settled(tour)
    assert scene_of(tour).things[0].radius == 4  # as wide as a patch
    assert "a small pink" in answer_of(tour)
    assert "circle" not in answer_of(tour)


def test_3_near_and_far(tour: Page) -> None:
    go(tour, 3)
    expect(tour.locator("#attention_said")).to_contain_text("The patch in row 6, column 6 looks most at")
    model, processor = load_answering()
    with record_attention() as maps, torch.no_grad():
        model.vision_tower(processor.image_processor([scene_of(tour).draw()]))
    first, second, third = (float(attention_distance(layer).mean()) for layer in maps)
    assert first > 4
    assert max(second, third) < 2


def test_4_the_newline(tour: Page) -> None:
    go(tour, 4)
    assert len(tour.evaluate("page.result.prefix_ids")) == 68
    tour.locator("#no_newline").check()
    settled(tour)
    assert not re.search("circle|square|star", answer_of(tour))


def test_5_lots(tour: Page) -> None:
    go(tour, 5)
    assert tour.evaluate("tokenizer.names.length") == 1598
    best = answer_of(tour)
    assert answers(tour, 10).count(best) >= 9
    tour.locator("#temperature").fill("2")
    assert 0 < answers(tour, 10).count(best) < 10
    tour.locator("#temperature").fill("3")
    assert best not in answers(tour, 5)
    tour.locator("#top_p").fill("0.2")
    assert answers(tour, 3) == [best] * 3


def test_6_the_mask(tour: Page) -> None:
    go(tour, 6)
    assert answer_of(tour).endswith("pink circle")
    tour.locator("#causal_mask").check()
    settled(tour)
    assert answer_of(tour) == "none"
    tour.locator("#attention_map .patch").first.click()
    expect(tour.locator("#mask_said")).to_contain_text("in row 1 of 71, sees itself alone")


def test_7_top_left_bottom_right(tour: Page) -> None:
    go(tour, 7)

    def bins() -> np.ndarray:
        return np.array([int(digits) for digits in re.findall(r"\d{4}", answer_of(tour))])

    before = bins()
    drag(tour, 0, 0, -15)
    moved = bins() - before
    assert moved.shape == (4,)
    assert (moved[[0, 2]] < -150).all()
    assert (np.abs(moved[[1, 3]]) < 30).all()


def test_8_where_it_looked(tour: Page) -> None:
    go(tour, 8)
    scene = scene_of(tour)
    square = next(thing for thing in scene.things if thing.shape == "square")
    second = shares(tour)
    assert sum(second) > 0.95
    assert sum(second[n] for n in patches_of(square)) > 0.5
    tour.locator("#stage").select_option("language_model.layers.2")
    assert int(np.argmax(shares(tour))) not in {n for thing in scene.things for n in patches_of(thing)}
    tour.locator("#occlude").click()
    tour.wait_for_function("page.result.occlusion?.length === IMAGE_TOKENS")
    assert int(np.argmax(tour.evaluate("page.result.occlusion"))) in patches_of(square)


def test_9_when_it_knew(tour: Page) -> None:
    go(tour, 9)
    rows = [row.split("\t")[1] for row in tour.locator("#lens_rows").inner_text().strip().splitlines()]
    assert ["orange" in row for row in rows] == [False, False, True, True, True]


def test_10_the_edge_of_its_world(tour: Page) -> None:
    go(tour, 10)
    tour.locator("#prompt").fill("is there a dog?")
    settled(tour)
    assert answer_of(tour) == "yes"
