"""Draws figures/live.gif: a thing of the live page is dragged, and the answer changes.

Builds the page, opens it in Chromium, drags with the mouse and takes a picture at each step. Every answer is
the model's own. A browser shows no pointer in its pictures, so one is drawn. It takes a minute, and needs the
extra [browser]. Run: python figures/draw_live.py
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from minivlm.world.renderers import QUIET, find_browser

FIGURES = Path(__file__).parent
sys.path.insert(0, str(FIGURES.parent / "docs"))

from live.build import write_live  # noqa: E402

WIDTH = 760
STEPS = 20  # of one way with the mouse
COLORS = 255
STEP, PAUSE = 80, 1400  # milliseconds for which a picture is shown
SETTLED = "page.result !== null && page.result.done && !waiting"
# What changes with the machine, or is not part of the story, is hidden.
STYLE = """
  header, #timing, #suggestions, .answers .note, .picture > :not(h2, .frame) { display: none; }
  main section:not(.picture, .answers) { display: none; }
  main { margin-top: 0 !important; }
  #pointer { position: fixed; left: -99px; width: 26px; height: 26px; pointer-events: none; z-index: 9; }
"""
POINTER = """() => {
  const shape = "M2 2L2 20L7 15L11 23L14 21L10 14L17 14Z";
  const arrow = make_svg("path", { d: shape, fill: "#000", stroke: "#fff" });
  document.body.append(make_svg("svg", { id: "pointer", viewBox: "0 0 26 26" }, arrow));
  addEventListener("pointermove", ({ clientX, clientY }) =>
    Object.assign(element("pointer").style, { left: `${clientX - 2}px`, top: `${clientY - 2}px` }));
}"""


def main() -> None:
    """Two questions, each with one thing that is dragged."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        write_live(Path(folder))
        browser = playwright.chromium.launch(executable_path=find_browser(), args=list(QUIET))
        page = browser.new_page(viewport={"width": WIDTH, "height": 700})
        page.goto((Path(folder) / "index.html").as_uri())
        page.add_style_tag(content=STYLE)
        page.evaluate(POINTER)
        shown = list(story(page))
        browser.close()
    pictures = [picture for picture, _ in shown]
    # One palette for all, made from the first picture: colors do not flicker.
    palette = pictures[0].quantize(COLORS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    first, *others = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    path = FIGURES / "live.gif"
    times = [time for _, time in shown]
    first.save(path, save_all=True, append_images=others, duration=times, loop=0, optimize=True)
    print(
        f"{path.name}: {len(shown)} pictures, {path.stat().st_size / 1000:.0f} kB, {sum(times) / 1000:.0f} s"
    )


def story(page: Page) -> Iterator[tuple[Image.Image, int]]:
    """Pictures of the page, and for how many milliseconds each is shown."""
    yield from ask(page, "is the pink circle left of the orange square?")
    yield from drag(page, 0, 35, -33)
    yield from ask(page, "detect purple star")
    yield from drag(page, 2, -34, 4)


def ask(page: Page, prompt: str) -> Iterator[tuple[Image.Image, int]]:
    page.locator("#prompt").fill(prompt)
    page.locator("#prompt").blur()
    yield taken(page), PAUSE


def drag(page: Page, number: int, across: float, down: float) -> Iterator[tuple[Image.Image, int]]:
    """A thing by so many units of the world, from its middle."""
    box = page.locator("#picture_layer").bounding_box()
    assert box is not None
    thing = page.evaluate("(number) => page.scene.things[number]", number)
    unit = box["width"] / 64
    x, y = box["x"] + thing["x"] * unit, box["y"] + thing["y"] * unit
    page.mouse.move(x, y)
    yield taken(page), PAUSE // 2
    page.mouse.down()
    for step in range(1, STEPS + 1):
        part = (1 - (1 - 2 * step / STEPS) * abs(1 - 2 * step / STEPS)) / 2  # slow at both ends
        page.mouse.move(x + across * unit * part, y + down * unit * part)
        yield taken(page), STEP
    page.mouse.up()
    yield taken(page), PAUSE


def taken(page: Page) -> Image.Image:
    """Picture, prompt and answer, when the answer is complete."""
    page.wait_for_timeout(100)
    page.wait_for_function(SETTLED)
    height = page.evaluate("element('picture_layer').getBoundingClientRect().bottom + 12")
    clip = {"x": 0.0, "y": 0.0, "width": float(WIDTH), "height": float(height)}
    return Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")


if __name__ == "__main__":
    main()
