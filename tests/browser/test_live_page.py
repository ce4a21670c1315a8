"""The page of docs/live as a reader uses it, opened as a file.

That its model is the package's is for test_live_engine.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from notebooks_and_sources import ROOT
from PIL import Image
from playwright.sync_api import Page, expect
from watching import Watcher, faint_texts, width

from minivlm.models.load import load_answering
from minivlm.world.demo import sample_scene
from minivlm.world.scenes import Scene, Thing

sys.path.insert(0, str(ROOT / "docs"))
from live.build import main, write_live

DONE = "page.result !== null && page.result.done && !waiting"
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("live")
    write_live(where)
    return where


@pytest.fixture(scope="module")
def ask() -> Callable[[Scene | Image.Image, str], str]:
    """What the package's model answers."""
    torch.set_num_threads(1)
    model, processor = load_answering()

    def answer(scene: Scene | Image.Image, prompt: str) -> str:
        picture = scene.draw() if isinstance(scene, Scene) else scene
        return processor.decode(model.generate(**processor([picture], [prompt])))[0]

    return answer


@pytest.fixture
def live(folder: Path, page: Page) -> Iterator[Page]:
    yield from opened(page, folder, "index.html", settled)


def opened(
    page: Page, folder: Path, name: str, wait: Callable[[Page], None] = lambda _: None
) -> Iterator[Page]:
    """A page, opened; it must not complain, or ask for anything outside of its folder."""
    watcher = Watcher(page, own=(folder.as_uri(),))
    page.goto(f"{folder.as_uri()}/{name}")
    wait(page)
    yield page
    assert watcher.take() == []


def settled(page: Page) -> None:
    """Wait until the answer to the last edit is there."""
    page.wait_for_timeout(100)
    page.wait_for_function(DONE)


def scene_of(page: Page) -> Scene:
    """What is drawn in the page, for the package."""
    return as_scene(page.evaluate("page.scene"))


def as_scene(plain: dict[str, Any]) -> Scene:
    """A scene of JavaScript."""
    things = [
        Thing(t["shape"], t["color"], "", t["x"], t["y"], t["radius"], tuple(t["rgb"]))
        for t in plain["things"]
    ]
    return Scene(tuple(things), plain["background"], 0.0, 0)


def answer_of(page: Page) -> str:
    return page.locator("#answer").text_content() or ""


def drag(page: Page, number: int, dx: float, dy: float, part: str = "[data-thing='{}']") -> None:
    """Move a thing by so many units of the world."""
    page.locator("#picture_layer").scroll_into_view_if_needed()
    unit = page.locator("#picture_layer").bounding_box()["width"] / 64
    box = page.locator(part.format(number)).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + dx * unit, y + dy * unit, steps=5)
    page.mouse.up()
    settled(page)


def test_it_answers_when_it_opens(live: Page, ask: Callable[..., str]) -> None:
    scene = scene_of(live)
    assert [thing.name for thing in scene.things] == [thing.name for thing in sample_scene(2)[0].things]
    assert answer_of(live) == ask(scene, "caption en")
    expect(live.locator("#spoken")).to_have_text(f"caption en: {answer_of(live)}")


def test_a_thing_is_dragged_and_resized(live: Page, ask: Callable[..., str]) -> None:
    before, said = scene_of(live), answer_of(live)
    drag(live, 2, -34, -22)
    scene = scene_of(live)
    assert scene.things[2].x == pytest.approx(before.things[2].x - 34, abs=1)
    assert scene.things[2].y == pytest.approx(before.things[2].y - 22, abs=1)
    assert answer_of(live) == ask(scene, "caption en") != said
    assert answer_of(live).startswith("a medium purple star")
    drag(live, 2, 2.5, 2.5, ".resize")
    assert scene_of(live).things[2].radius > scene.things[2].radius + 2
    assert answer_of(live) == ask(scene_of(live), "caption en")


def test_everything_can_be_done_with_the_keyboard(live: Page, ask: Callable[..., str]) -> None:
    before = scene_of(live)
    live.locator("[data-thing='0']").focus()
    for key in ("ArrowRight", "ArrowUp", "Shift+ArrowUp"):
        live.keyboard.press(key)
    settled(live)
    after = scene_of(live)
    assert (after.things[0].x, after.things[0].y) == pytest.approx(
        (before.things[0].x + 1, before.things[0].y - 5)
    )
    assert live.evaluate("document.activeElement.dataset.thing") == "0"
    live.keyboard.press("-")
    settled(live)
    assert scene_of(live).things[0].radius == pytest.approx(before.things[0].radius / 1.1)
    live.keyboard.press("Delete")
    settled(live)
    assert len(scene_of(live).things) == 2
    assert answer_of(live) == ask(scene_of(live), "caption en")
    for _ in range(5):
        live.keyboard.press("Control+z")
    settled(live)
    assert scene_of(live) == before


def test_things_are_added_and_painted(live: Page, ask: Callable[..., str]) -> None:
    live.locator("#add_things button").filter(has_text="triangle").click()
    settled(live)
    live.locator("#colors button").nth(3).click()
    settled(live)
    new = scene_of(live).things[3]
    assert (new.shape, new.color) == ("triangle", "green")
    assert "green triangle" in answer_of(live)
    for _ in range(9):
        live.evaluate("document.querySelector('#add_things button').click()")
    settled(live)
    assert len(scene_of(live).things) == 8
    assert answer_of(live) == ask(scene_of(live), "caption en")


def test_boxes_of_the_answer_are_drawn(live: Page, ask: Callable[..., str]) -> None:
    live.locator("#prompt").fill("detect pink circle")
    settled(live)
    assert answer_of(live) == ask(scene_of(live), "detect pink circle")
    box, thing = live.locator(".box"), scene_of(live).things[0]
    assert box.count() == 1
    assert float(box.get_attribute("x") or "") == pytest.approx(thing.box[0], abs=1)
    assert float(box.get_attribute("height") or "") == pytest.approx(thing.box[3] - thing.box[1], abs=1)


def test_outlines_are_drawn(live: Page) -> None:
    live.locator("#prompt").fill("segment pink circle")
    settled(live)
    thing = scene_of(live).things[0]
    inside = live.evaluate("""() => {
      const path = document.querySelector(".outlined"), found = [];
      for (let y = 0; y < 64; y++) for (let x = 0; x < 64; x++)
        found.push(path.isPointInFill(new DOMPoint(x + 0.5, y + 0.5)));
      return found;
    }""")
    mask, wanted = torch.tensor(inside), torch.from_numpy(thing.mask()).flatten()
    assert float((mask & wanted).sum() / (mask | wanted).sum()) > 0.85


def test_a_link_brings_everything_back(live: Page, folder: Path) -> None:
    drag(live, 1, 10, 20)
    live.locator("#prompt").fill("how many objects are there?")
    settled(live)
    scene, said, link = scene_of(live), answer_of(live), live.locator("#link").get_attribute("href")
    live.goto("about:blank")
    live.goto(f"{(folder / 'index.html').as_uri()}{link}")
    settled(live)
    again = scene_of(live)
    assert live.locator("#prompt").input_value() == "how many objects are there?"
    assert answer_of(live) == said
    for one, other in zip(again.things, scene.things, strict=True):
        assert (one.name, one.rgb) == (other.name, other.rgb)
        assert (one.x, one.y, one.radius) == pytest.approx((other.x, other.y, other.radius), abs=1e-3)


def test_text_stays_text(folder: Path, page: Page, ask: Callable[..., str]) -> None:
    """Also in a link that somebody else has written."""
    prompt = "\"><img src=x onerror='window.hurt=1'><script>window.hurt=1</script> <image><bos>"
    things = ["circle,red,1e9,-5,NaN,zz", "<b>,red,1,2,3", "circle,__proto__,1,2,3", "star,blue,30,900,500"]
    things += ["square,green,20,20,8,00ff00"] * 20
    link = urlencode([("prompt", prompt), ("ground", "Infinity"), *(("thing", thing) for thing in things)])
    watcher = Watcher(page, own=(folder.as_uri(),))
    page.goto(f"{(folder / 'index.html').as_uri()}#{link}")
    settled(page)
    assert page.locator("#prompt").input_value() == prompt
    assert answer_of(page) == ask(scene_of(page), prompt).strip()
    scene = scene_of(page)
    assert len(scene.things) <= 8
    assert (scene.things[0].name, scene.things[0].y, scene.things[0].radius) == ("blue star", 64, 20)
    assert page.evaluate("window.hurt === undefined && document.querySelectorAll('main img').length === 0")
    assert watcher.take() == []


def test_a_prompt_that_is_too_long(live: Page) -> None:
    live.locator("#prompt").fill("😀" * 100)  # four bytes each, and a token for each byte
    settled(live)
    assert answer_of(live) == (
        "This prompt and its picture take 466 tokens, and the model has room for 448: shorten it."
    )
    live.locator("#prompt").fill("how many objects are there?")
    settled(live)
    assert answer_of(live) == "3"


def test_help_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert list(tmp_path.iterdir()) == []


def test_it_says_where_the_weights_are(page: Page) -> None:
    page.goto((ROOT / "docs" / "live" / "index.html").as_uri())
    expect(page.locator("#missing")).to_be_visible()


def test_a_picture_is_uploaded(live: Page, ask: Callable[..., str], tmp_path: Path) -> None:
    path = ROOT / "figures" / "samples" / "scene_1.png"
    live.locator("#upload").set_input_files(path)
    expect(live.locator("#picture_note")).to_contain_text("Your picture")
    settled(live)
    assert answer_of(live) == ask(Image.open(path).convert("RGB"), "caption en")
    assert live.locator("[data-thing]").count() == 0
    wrong = tmp_path / "<i>no picture.png"
    wrong.write_text("no picture")
    live.locator("#upload").set_input_files(wrong)
    expect(live.locator("#picture_note")).to_contain_text("<i>no picture.png is not a picture")


def test_any_token_layer_and_head(live: Page) -> None:
    live.locator("#prompt").fill("what color is the square?")
    settled(live)
    said = live.locator("#attention_said")
    expect(said).to_contain_text("“↵”, the writer of “orange”, gives 100 % of its attention")
    expect(said).to_contain_text("row 2, column 4")
    seen = {said.text_content()}
    for stage in ("language_model.layers.2", "vision_tower.layers.0"):
        live.locator("#stage").select_option(stage)
        seen.add(said.text_content())
        live.locator("#head").select_option("1")
        seen.add(said.text_content())
    assert len(seen) == 5
    expect(said).to_contain_text("The patch in")
    live.locator("#attention_map .patch").nth(45).click()
    expect(said).to_contain_text("The patch in row 6, column 6")
    assert live.locator("#head option").count() == 4  # three heads, and their mean
    live.locator(".chip").filter(has_text="·square").click()
    expect(said).to_contain_text("“·square” gives")
    expect(live.locator("#next_said")).to_contain_text("Choose a word of the answer")
    expect(live.locator("#next_axis")).to_be_hidden()
    live.locator(".chip").filter(has_text="orange").click()
    expect(live.locator("#next_said")).to_contain_text("Written: “orange”")
    assert "orange" in live.locator("#lens_rows tr").nth(2).inner_text()


def test_a_map_of_next_to_nothing_is_pale(live: Page) -> None:
    live.locator("#prompt").fill("what color is the circle?")
    settled(live)
    opacity = """() => Math.max(...[...document.querySelectorAll("#attention_map .patch")]
      .map((patch) => Number(patch.getAttribute("fill-opacity"))))"""
    assert live.evaluate(opacity) == pytest.approx(0.85)
    live.locator("#prompt").fill("is the pink circle left of the orange square?")
    settled(live)
    live.locator("#stage").select_option("language_model.layers.3")  # all of it is on words
    assert live.evaluate(opacity) < 0.05


def test_each_map_has_a_scale(live: Page) -> None:
    """What full red stands for: the largest number of the map, or, in a pale map, the least for full red."""
    live.locator("#prompt").fill("what color is the square?")
    settled(live)
    attention, occlusion = live.locator(".scale").all()
    ends = []
    for stage in range(4):
        live.locator("#stage").select_option(f"language_model.layers.{stage}")
        full = live.evaluate("percent(Math.max(...Looking.shares().slice(0, IMAGE_TOKENS), FULL_SHARE))")
        expect(attention).to_have_text(f"0{full} (full red)")
        ends.append(full)
    assert len(set(ends)) > 1
    expect(occlusion).to_be_hidden()
    live.locator("#occlude").click()
    live.wait_for_function("page.result.occlusion?.length === IMAGE_TOKENS")
    largest = max(live.evaluate("page.result.occlusion"))
    assert largest > 0.5
    expect(occlusion).to_have_text(f"0{largest:.1f} (full red)")


def test_an_empty_prompt(live: Page) -> None:
    live.locator("#prompt").fill(" ")
    settled(live)
    assert answer_of(live).startswith("The prompt is empty")
    live.locator("#suggestions button").first.click()
    settled(live)
    assert answer_of(live).startswith("a medium pink circle")


def test_hiding_each_patch(live: Page) -> None:
    live.locator("#prompt").fill("what color is the square?")
    settled(live)
    expect(live.locator("#open_head")).to_contain_text("Open head 1")
    live.locator("#occlude").click()
    expect(live.locator("#occlusion_said")).to_contain_text("Hiding the patch in row 2, column 4")
    drag(live, 1, 20, 20)  # another picture: what was measured is gone
    expect(live.locator("#occlusion_said")).to_contain_text("Not measured yet")


def test_temperature_and_top_p(live: Page) -> None:
    said = answer_of(live)
    live.locator("#temperature").fill("3")
    settled(live)
    wild = answer_of(live)
    assert wild != said
    live.locator("#again").click()
    settled(live)
    assert answer_of(live) not in (said, wild)
    live.locator("#top_p").fill("0.05")
    settled(live)
    assert answer_of(live) == said, "only the best word is left"


def test_breaking_and_mending(live: Page) -> None:
    live.locator("#prompt").fill("detect pink circle")
    settled(live)
    whole = answer_of(live)
    for name in (
        "no_newline",
        "causal_mask",
        "no_rope",
        "no_tower_positions",
        "no_projector",
        "words_not_scaled",
    ):
        live.locator(f"#{name}").check()
        settled(live)
        assert answer_of(live) != whole
        expect(live.locator("#whole_answer")).to_have_text(f"As it was trained, it says: {whole}")
        expect(live.locator("#broken_answer")).to_have_text(answer_of(live))
        live.locator("#mend").click()
        settled(live)
        assert answer_of(live) == whole
        expect(live.locator("#whole_answer")).to_be_hidden()
    live.locator("#head_off").select_option("1,2")
    settled(live)
    assert live.evaluate("page.breaks") == {"head_off": {"layer": 1, "head": 2}}


def test_it_reads_on_a_phone_and_in_the_dark(live: Page) -> None:
    live.locator("#tour_start").click()
    live.locator("#tour_choices button").first.click()
    settled(live)
    for scheme in ("light", "dark"):
        live.emulate_media(color_scheme=scheme)
        assert faint_texts(live, 4.5) == []
    live.set_viewport_size(PHONE)
    assert width(live) <= PHONE["width"]


def nameless_controls(page: Page) -> list[str]:
    """What can be used, and says nothing to those who cannot see it."""
    found: list[str] = page.evaluate("""() =>
      [...document.querySelectorAll("button, input, select, textarea, [role=button]")]
      .filter((one) => one.checkVisibility())
      .filter((one) => !(one.textContent.trim() || one.ariaLabel || one.title || one.labels?.length))
      .map((one) => one.outerHTML)""")
    return found


def test_every_control_has_a_name(live: Page) -> None:
    assert nameless_controls(live) == []
    ids = live.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))


def test_the_pages_lead_to_each_other(folder: Path) -> None:
    for page in folder.glob("*.html"):
        linked = set(re.findall(r'href="([\w.]+)"', page.read_text(encoding="utf-8")))
        assert all((folder / name).exists() for name in linked), page.name
        others = {"rotary.html", "mask.html", "two_towers.html"}
        assert (others if page.name == "index.html" else {"index.html"}) <= linked, page.name


def test_every_script_is_loaded_and_small(folder: Path) -> None:
    loaded = set()
    for page in folder.glob("*.html"):
        loaded |= set(re.findall(r'<script src="(\w+\.js)"', page.read_text(encoding="utf-8")))
    assert loaded == {path.name for path in folder.glob("*.js")}
    for path in (ROOT / "docs" / "live").glob("*.js"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 200, path.name
