"""The two towers of docs/live in Chromium, against the package: ids, embeddings, and both losses.

What is right is computed here, when the tests run, and stored nowhere.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PATIENCE
from notebooks_and_sources import ROOT
from playwright.sync_api import Browser, Page, expect
from test_live_engine import assert_near, odd_texts, scene_number
from test_live_page import PHONE, as_scene, nameless_controls, opened
from test_live_page import folder as folder
from torch import Tensor
from watching import faint_texts, width

from minivlm import losses
from minivlm.models.load import MINIATURES, load
from minivlm.models.siglip import SigLIP
from minivlm.processing import PairProcessor
from minivlm.world.scenes import Scene

sys.path.insert(0, str(ROOT / "docs"))
from live.build import as_plain

START = "() => (window.towers = load_two_towers(TWO_TOWERS), undefined)"
LOSSES = """({images, texts, logit_scale, logit_bias}) => {
  const embeds = (rows) => rows.map((row) => new Tensor(Float32Array.from(row), 1, row.length));
  const cosines = similarity(embeds(images), embeds(texts));
  const [clip, siglip] = [clip_loss(cosines, logit_scale), siglip_loss(cosines, logit_scale, logit_bias)];
  return {cosines, clip, siglip};
}"""


@pytest.fixture(scope="module")
def engine(chromium: Browser, folder: Path) -> Iterator[Page]:
    """The page's scripts with the shipped SigLIP."""
    page = chromium.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto((folder / "two_towers.html").as_uri())
    page.evaluate(START)
    yield page
    page.close()


@pytest.fixture(scope="module")
def shipped() -> tuple[SigLIP, PairProcessor]:
    torch.set_num_threads(1)
    model, processor = load(MINIATURES / "magic")
    assert isinstance(model, SigLIP)
    assert isinstance(processor, PairProcessor)
    return model, processor


def encode_pictures(engine: Page, scenes: list[Scene]) -> list[list[float]]:
    code = """(scenes) => scenes.map((scene) => Array.from(
      towers.model.encode_image(to_pixel_values(draw_scene(scene), towers.image_processor)).data))"""
    found: list[list[float]] = engine.evaluate(code, [as_plain(scene) for scene in scenes])
    return found


def encode_captions(engine: Page, captions: list[str]) -> list[list[float]]:
    code = """(captions) => captions.map((caption) => Array.from(
      towers.model.encode_text(towers.tokenizer.encode_caption(caption)).data))"""
    found: list[list[float]] = engine.evaluate(code, captions)
    return found


def test_ids_of_captions(engine: Page, shipped: tuple[SigLIP, PairProcessor]) -> None:
    _, processor = shipped
    texts = [*odd_texts(), "A RED Circle", "ΣΑΣ", "red circle, " * 20, "a medium red circle,a star"]
    found = engine.evaluate("(texts) => texts.map((text) => towers.tokenizer.encode_caption(text))", texts)
    for text, ids in zip(texts, found, strict=True):
        assert ids == processor.tokenizer([text], truncate=True)[0].tolist(), repr(text)


@torch.no_grad()
def test_embeddings(engine: Page, shipped: tuple[SigLIP, PairProcessor]) -> None:
    model, processor = shipped
    scenes = [scene_number(number) for number in range(6)]
    captions = [scene.caption() for scene in scenes] + ["", "a dog on the grass", "red circle, " * 20]
    wanted = model.encode_image(processor(images=[scene.draw() for scene in scenes])["pixel_values"])
    for number, embeds in enumerate(encode_pictures(engine, scenes)):
        assert_near(embeds, wanted[number], f"picture {number}")
    wanted = model.encode_text(processor(texts=captions, truncate=True)["input_ids"])
    for caption, embeds, right in zip(captions, encode_captions(engine, captions), wanted, strict=True):
        assert_near(embeds, right, repr(caption))


def wanted_losses(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> dict[str, Any]:
    cosines = losses.similarity(images, texts)
    logits = scale.exp() * cosines
    return {
        "cosines": cosines,
        "rows": logits.softmax(dim=1),
        "columns": logits.softmax(dim=0),
        "shares": (logits + bias).sigmoid(),
        "clip": float(losses.clip_loss(images, texts, scale)),
        "siglip": float(losses.siglip_loss(images, texts, scale, bias)),
    }


@pytest.mark.parametrize(("scale", "bias"), [(None, None), (0.0, 0.0), (4.6, -10.0), (2.0, 5.0)])
@torch.no_grad()
def test_losses(
    scale: float | None, bias: float | None, engine: Page, shipped: tuple[SigLIP, PairProcessor]
) -> None:
    """Of the shipped towers, with their temperature and bias or others, and of vectors that fit badly."""
    model, processor = shipped
    scenes = [scene_number(number) for number in range(5)]
    images = model.encode_image(processor(images=[scene.draw() for scene in scenes])["pixel_values"])
    texts = model.encode_text(processor(texts=[scene.caption() for scene in scenes])["input_ids"])
    assert engine.evaluate("[towers.model.logit_scale, towers.model.logit_bias]") == [
        model.logit_scale.item(),
        model.logit_bias.item(),
    ]
    s = model.logit_scale if scale is None else torch.tensor([scale])
    b = model.logit_bias if bias is None else torch.tensor([bias])
    random = torch.randn(4, 96, generator=torch.manual_seed(0))
    for one, other in ((images, texts), (images, texts.roll(1, dims=0)), (random, random.flip(0))):
        given = {"images": one.tolist(), "texts": other.tolist()}
        found = engine.evaluate(LOSSES, {**given, "logit_scale": s.item(), "logit_bias": b.item()})
        wanted = wanted_losses(one, other, s, b)
        assert_near(found["cosines"], wanted["cosines"], "cosines")
        for name, matrix in (("rows", "clip"), ("columns", "clip"), ("shares", "siglip")):
            assert_near(found[matrix][name], wanted[name], name, part=1e-4)
        clip, siglip = found["clip"], found["siglip"]
        assert clip["loss"] == pytest.approx(wanted["clip"], abs=1e-4)
        assert siglip["loss"] == pytest.approx(wanted["siglip"], abs=1e-4, rel=1e-5)
        n = len(one)
        assert (sum(clip["row_costs"]) + sum(clip["column_costs"])) / (2 * n) == pytest.approx(clip["loss"])
        assert sum(map(sum, siglip["costs"])) / n == pytest.approx(siglip["loss"])


# ---- the page, as a reader uses it -------------------------------------------------------------------------


@pytest.fixture
def towers(folder: Path, page: Page) -> Iterator[Page]:
    yield from opened(page, folder, "two_towers.html", settled)


def settled(page: Page) -> None:
    page.wait_for_timeout(100)
    page.wait_for_function("page.result !== null && !waiting")


def shown(page: Page, matrix: str) -> Tensor:
    """What stands in the cells of a matrix."""
    rows: list[list[str]] = page.evaluate(
        """(id) => [...document.querySelectorAll(`#${id} tbody tr`)]
          .map((row) => [...row.querySelectorAll("td:not(.cost)")].map((cell) => cell.textContent))""",
        matrix,
    )
    return torch.tensor([[float(text.replace("−", "-")) for text in row] for row in rows if row])


def value(page: Page, name: str) -> float:
    return float(page.locator(f"#{name}").text_content() or "")


@torch.no_grad()
def of_package(page: Page, shipped: tuple[SigLIP, PairProcessor]) -> dict[str, Any]:
    """The batch of the page, as the package sees it."""
    model, processor = shipped
    pairs = page.evaluate("page.pairs")
    scenes = [as_scene(pair["scene"]) for pair in pairs]
    images = model.encode_image(processor(images=[scene.draw() for scene in scenes])["pixel_values"])
    captions = [pair["caption"] for pair in pairs]
    texts = model.encode_text(processor(texts=captions, truncate=True)["input_ids"])
    scale, bias = page.evaluate("[page.logit_scale, page.logit_bias]")
    return wanted_losses(images, texts, torch.tensor([scale]), torch.tensor([bias]))


def assert_as_in_package(page: Page, shipped: tuple[SigLIP, PairProcessor]) -> None:
    settled(page)
    wanted = of_package(page, shipped)
    places = {"cosines": "cosines", "clip_rows": "rows", "clip_columns": "columns", "siglip_shares": "shares"}
    for place, name in places.items():
        torch.testing.assert_close(shown(page, place), wanted[name], rtol=0, atol=0.0051)
    assert value(page, "clip_value") == pytest.approx(wanted["clip"], abs=6e-4)
    assert value(page, "siglip_value") == pytest.approx(wanted["siglip"], abs=6e-4)


def test_every_batch_to_try(towers: Page, shipped: tuple[SigLIP, PairProcessor]) -> None:
    """What the page says of each is what happens."""
    losses_of = []
    for number in range(5):
        towers.locator("#tries button").nth(number).click()
        assert_as_in_package(towers, shipped)
        losses_of.append((value(towers, "clip_value"), value(towers, "siglip_value")))
        rows, shares = shown(towers, "clip_rows"), shown(towers, "siglip_shares")
        costs = shown(towers, "siglip_costs")
        if number == 0:
            assert max(losses_of[0]) < 0.2
            plain = shown(towers, "siglip_costs")
        elif number == 1:
            assert torch.allclose(rows[:2, :2], torch.full((2, 2), 0.5), atol=0.06)
            assert (shares[:2, :2] > 0.5).all()
            assert costs[0, 1] > 1
            assert costs[1, 0] > 1
            kept = [0, 2, 3]  # the pairs that are as in the first batch
            assert torch.equal(costs[kept][:, kept], plain[[0, 1, 3]][:, [0, 1, 3]])
        elif number == 2:
            assert int(rows[2].argmax()) == 0
            assert float(rows[2, 0]) > 0.5
            assert float(shares[2].max()) < 0.01
        elif number == 3:
            assert min(losses_of[3]) > 5
        else:
            assert (rows.argmax(dim=1) == torch.arange(4)).sum() == 3
            assert (shares.diagonal() < 0.5).all()


def test_captions_and_pictures_are_edited(towers: Page, shipped: tuple[SigLIP, PairProcessor]) -> None:
    before = shown(towers, "cosines")
    edited = "(You have edited this batch since.)"
    expect(towers.locator("#try_said")).not_to_contain_text(edited)
    towers.locator("#pairs textarea").nth(2).fill("a LARGE red circle")
    assert_as_in_package(towers, shipped)
    expect(towers.locator("#try_said")).to_contain_text(edited)
    after = shown(towers, "cosines")
    assert torch.equal(after[:, [0, 1, 3]], before[:, [0, 1, 3]])
    assert torch.equal(after[:, 2], after[:, 0])
    towers.locator("#pairs button").nth(2).click()
    expect(towers.locator("#h_picture")).to_have_text("Picture 3")
    towers.locator("#picture_layer [data-thing='0']").focus()
    towers.locator("#shapes button").filter(has_text="square").click()
    towers.locator("#colors button").nth(0).click()
    for _ in range(6):
        towers.keyboard.press("ArrowLeft")
        towers.locator("#larger").click()
    assert_as_in_package(towers, shipped)
    expect(towers.locator("#picture_note")).to_have_text("Drawn: a large red square.")
    towers.locator("#as_drawn").click()
    assert_as_in_package(towers, shipped)
    assert towers.locator("#pairs textarea").nth(2).input_value() == "a large red square"
    assert float(shown(towers, "siglip_shares")[2, 2]) > 0.5
    while towers.locator("#undo").is_enabled():
        towers.locator("#undo").click()
        settled(towers)
    assert_as_in_package(towers, shipped)
    assert torch.equal(shown(towers, "cosines"), before)
    expect(towers.locator("#try_said")).not_to_contain_text(edited)


def test_temperature_and_bias(towers: Page, shipped: tuple[SigLIP, PairProcessor]) -> None:
    learned = value(towers, "clip_value"), value(towers, "siglip_value")
    towers.locator("#temperature").fill("-1")
    assert_as_in_package(towers, shipped)
    clip = value(towers, "clip_value")
    assert clip > learned[0]
    towers.locator("#bias").fill("0")
    assert_as_in_package(towers, shipped)
    assert value(towers, "clip_value") == clip, "a softmax does not notice the bias"
    towers.locator("#learned").click()
    settled(towers)
    assert (value(towers, "clip_value"), value(towers, "siglip_value")) == learned


def drag_bias(page: Page, *places: float) -> None:
    """Take the slider at the first place, shares of its width, and let it go at the last."""
    box = page.locator("#bias").bounding_box()
    assert box is not None
    for number, place in enumerate(places):
        page.mouse.move(box["x"] + place * box["width"], box["y"] + box["height"] / 2, steps=5)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


def test_undo_after_a_slider_that_came_back(towers: Page) -> None:
    drag_bias(towers, 0.3, 0.4)
    drag_bias(towers, 0.4, 0.9, 0.4)
    caption = towers.locator("#pairs textarea").first
    caption.fill("a small star")
    settled(towers)
    before = towers.evaluate("page.logit_bias")
    drag_bias(towers, 0.4, 0.7)
    settled(towers)
    assert towers.evaluate("page.logit_bias") > before
    towers.keyboard.press("Control+z")
    settled(towers)
    assert towers.evaluate("[page.pairs[0].caption, page.logit_bias]") == ["a small star", before]


def test_undo_takes_back_temperature_and_bias(towers: Page) -> None:
    """With pictures and captions, in their order. A slider that is dragged is one step."""

    def state() -> list[Any]:
        settled(towers)
        parts: list[Any] = towers.evaluate(
            "[page.logit_scale, page.logit_bias, page.pairs[0].caption, page.result.siglip.loss]"
        )
        return parts

    edits = [
        lambda: towers.locator("#temperature").fill("-1"),
        lambda: drag_bias(towers, 0.3, 0.9),
        lambda: towers.locator("#pairs textarea").first.fill("a small star"),
        lambda: towers.locator("#learned").click(),
        lambda: towers.locator("#temperature").press("ArrowLeft"),
        lambda: towers.locator("#tries button").nth(1).click(),
    ]
    states = [state()]
    for edit in edits:
        edit()
        states.append(state())
        assert states[-1] != states[-2]
    towers.locator("#temperature").focus()
    for before in reversed(states[:-1]):
        towers.keyboard.press("Control+z")
        assert state() == before
    expect(towers.locator("#undo")).to_be_disabled()
    assert float(towers.locator("#temperature").input_value()) == pytest.approx(-states[0][0], abs=0.006)


def test_two_to_six_pairs(towers: Page, shipped: tuple[SigLIP, PairProcessor]) -> None:
    for _ in range(2):
        towers.locator("#more").click()
        assert_as_in_package(towers, shipped)
    assert shown(towers, "cosines").shape == (6, 6)
    assert (shown(towers, "siglip_shares").diagonal() > 0.5).all()
    expect(towers.locator("#more")).to_be_disabled()
    towers.set_viewport_size(PHONE)
    assert width(towers) <= PHONE["width"]
    for _ in range(4):
        towers.locator("#fewer").click()
        assert_as_in_package(towers, shipped)
    expect(towers.locator("#fewer")).to_be_disabled()


def test_a_cell_is_followed_with_the_keyboard(towers: Page) -> None:
    towers.locator("#cosines button[aria-pressed='true']").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp", "ArrowRight"):
        towers.keyboard.press(key)
    steps = towers.locator("#cell_steps")
    expect(steps).to_contain_text("Picture 2, caption 3: no pair")
    label = towers.evaluate("document.activeElement.ariaLabel")
    number = towers.evaluate("number_of(page.result.cosines[1][2])")
    assert label == f"picture 2, caption 3: {number}"
    assert towers.locator(".followed").count() == 5
    assert towers.locator("#cosines button[tabindex='0']").count() == 1
    scaled, biased = towers.evaluate("""() => {
      const scaled = Math.exp(page.logit_scale) * page.result.cosines[1][2];
      return [scaled, scaled + page.logit_bias].map(number_of);
    }""")
    assert [scaled, biased] == [steps.locator("td").nth(place).text_content() for place in (1, 5)]


def test_captions_stay_text(towers: Page, shipped: tuple[SigLIP, PairProcessor]) -> None:
    odd = "<img src=x onerror='window.hurt=1'>\n\"<eos> &amp; " + "red " * 40
    towers.locator("#pairs textarea").first.fill(odd)
    assert_as_in_package(towers, shipped)
    expect(towers.locator("#cut_said")).to_contain_text("Caption 1 has more than 31 tokens")
    assert towers.evaluate("window.hurt === undefined && document.querySelectorAll('img').length === 0")


def test_it_reads_on_a_phone_and_in_the_dark(towers: Page) -> None:
    towers.locator("#tries button").nth(1).click()
    settled(towers)
    for scheme in ("light", "dark"):
        towers.emulate_media(color_scheme=scheme)
        assert faint_texts(towers, 4.5) == []
    towers.set_viewport_size(PHONE)
    assert width(towers) <= PHONE["width"]
    assert nameless_controls(towers) == []


def test_the_pages_lead_to_each_other(towers: Page) -> None:
    towers.locator("#other_pages a").click()
    expect(towers.locator("h1")).to_have_text("The model, live")
    towers.locator("#other_pages a", has_text="two towers").click()
    expect(towers.locator("h1")).to_have_text("Two towers, live")
    settled(towers)
