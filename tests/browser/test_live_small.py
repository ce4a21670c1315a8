"""The small pages of docs/live, each about one idea: what they compute is what the package computes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Page, expect
from test_live_page import PHONE, opened
from test_live_page import folder as folder
from torch import Tensor
from watching import faint_texts, width

from minivlm import masks
from minivlm.rope import apply_rotary, rotary_angles


@pytest.fixture
def rotary(folder: Path, page: Page) -> Iterator[Page]:
    yield from opened(page, folder, "rotary.html")


@pytest.fixture
def mask(folder: Path, page: Page) -> Iterator[Page]:
    yield from opened(page, folder, "mask.html")


def slide(page: Page, **values: float) -> None:
    for name, value in values.items():
        page.locator(f"#{name}").fill(str(value))


def turned(vector: Tensor, position: int, theta: float) -> Tensor:
    cos, sin = rotary_angles(torch.tensor([[position]]), len(vector), theta)
    return apply_rotary(vector.view(1, 1, 1, -1), cos, sin).flatten()


def assert_near(found: list[float], wanted: Tensor, name: str) -> None:
    off = float((torch.tensor(found) - wanted).abs().max() / wanted.abs().max())
    assert off <= 1e-5, f"{name} is off by {off:.1e} of its largest value"


@pytest.mark.parametrize("theta", [10.0, 10_000.0, 1_000_000.0])
@pytest.mark.parametrize(("m", "n", "shift"), [(5, 3, 0), (5, 3, 100), (0, 20, 7), (20, 0, 0)])
def test_arrows_turn_as_in_the_package(m: int, n: int, shift: int, theta: float, rotary: Page) -> None:
    found: dict[str, Any] = rotary.evaluate(
        """(settings) => {
          const found = computed(settings);
          return {...found, query: [...found.query], key: [...found.key], q: [...QUERY], k: [...KEY]};
        }""",
        {"m": m, "n": n, "shift": shift, "theta": theta},
    )
    q, k = torch.tensor(found["q"]), torch.tensor(found["k"])
    query, key = turned(q, m + shift, theta), turned(k, n + shift, theta)
    assert_near(found["query"], query, "query")
    assert_near(found["key"], key, "key")
    assert_near(found["pairs"], (query * key).view(2, -1).sum(dim=0), "pairs")
    assert_near([found["score"]], turned(q, m, theta) @ turned(k, n, theta), "score")
    assert_near([found["shifted"]], query @ key, "shifted")
    assert_near(found["curve"], torch.stack([turned(q, d, theta) @ k for d in found["distances"]]), "curve")


def test_what_is_printed_and_drawn_are_these_numbers(rotary: Page) -> None:
    slide(rotary, query_position=9, key_position=4, theta=2)
    q, k = (torch.tensor(rotary.evaluate(f"[...{name}]")) for name in ("QUERY", "KEY"))
    query, key = turned(q, 9, 100.0), turned(k, 4, 100.0)
    parts = rotary.locator(".part").all_inner_texts()
    assert [float(part.replace("−", "-")) for part in parts] == pytest.approx(
        (query * key).view(2, -1).sum(dim=0).tolist(), abs=6e-4
    )
    assert float(rotary.locator("#score").inner_text().replace("−", "-")) == pytest.approx(
        float(query @ key), abs=6e-4
    )
    tips = rotary.locator(".arrow.query:not(.faint) .tip")
    for i in range(4):
        x, y = (float(number) for number in re.findall(r"-?[\d.]+", tips.nth(i).get_attribute("d") or "")[:2])
        assert (x / 45, -y / 45) == pytest.approx((float(query[i]), float(query[i + 4])), abs=1e-4)


def test_a_shift_turns_the_arrows_and_leaves_the_score(rotary: Page) -> None:
    def of(name: str) -> str:
        return rotary.locator(f"#{name}").inner_text()

    score, arrows = of("score"), rotary.locator("#pairs").inner_html()
    dot = rotary.locator("#curve .here")
    there = dot.get_attribute("cx"), dot.get_attribute("cy")
    slide(rotary, shift=100)
    assert (of("query_shifted"), of("key_shifted")) == ("105", "103")
    assert of("score_shifted") == of("score") == score
    assert rotary.locator("#pairs").inner_html() != arrows
    assert (dot.get_attribute("cx"), dot.get_attribute("cy")) == there
    expect(rotary.locator("#said")).to_contain_text(f"the score is the same: {score}")
    rotary.locator("#query_position").focus()
    rotary.keyboard.press("ArrowRight")
    assert of("query_at") == "6"
    assert of("score") != score
    assert of("score_shifted") == of("score")
    assert (dot.get_attribute("cx"), dot.get_attribute("cy")) != there


# ---- the mask ----------------------------------------------------------------------------------------------

KINDS = ("prefix_lm", "causal", "everything")
PADS = {"none": (0, 0), "left": (2, 0), "right": (0, 2)}
PREFIX, LENGTH = 7, 11  # three image tokens and four of the prompt, then four of the answer


def packaged_mask(kind: str, side: str) -> Tensor:
    left, right = PADS[side]
    real = torch.tensor([[0] * left + [1] * LENGTH + [0] * right])
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    seen = {
        "prefix_lm": masks.prefix_lm(positions, positions, torch.tensor([PREFIX])),
        "causal": masks.causal(positions, positions),
        "everything": torch.ones(1, real.shape[1], real.shape[1], dtype=torch.bool),
    }[kind]
    return (seen & masks.padding(real))[0]


@pytest.mark.parametrize("side", PADS)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_the_package(kind: str, side: str, mask: Page) -> None:
    """In numbers, in the colors of the table, in its sentences, and in the chips."""
    wanted = packaged_mask(kind, side)
    found = mask.evaluate("([kind, side]) => mask_of(kind, side).map((row) => [...row])", [kind, side])
    assert torch.equal(torch.tensor(found).bool(), wanted)
    mask.locator(f"[data-value={kind}]").click()
    mask.locator(f"[data-value={side}]").click()
    fields = mask.locator("#matrix [role=gridcell]")
    classes = fields.evaluate_all("(all) => all.map((one) => one.classList.contains('seen'))")
    assert torch.equal(torch.tensor(classes).view(wanted.shape), wanted)
    sentences = fields.evaluate_all("(all) => all.map((one) => one.ariaLabel)")
    says = ["may look at" in sentence for sentence in sentences]
    assert [not yes for yes in says] == ["may not look at" in sentence for sentence in sentences]
    assert torch.equal(torch.tensor(says).view(wanted.shape), wanted)
    for row in range(len(wanted)):
        mask.locator("#tokens .chip").nth(row).click()
        struck = mask.locator("#tokens .chip").evaluate_all(
            "(all) => all.map((one) => one.classList.contains('unseen'))"
        )
        assert torch.equal(~torch.tensor(struck), wanted[row])
        count = f"{int(wanted[row].sum())} of {len(wanted)} tokens"
        expect(mask.locator("#said")).to_contain_text(count)


def test_it_says_why(mask: Page) -> None:
    said = mask.locator("#said")

    def field(query: int, key: int) -> None:
        mask.locator("#matrix tbody tr").nth(query).locator("td").nth(key).hover()

    field(7, 8)
    expect(said).to_have_text(
        "“a” may not look at “red”: it does not exist yet. It is what the model has to say after “a”."
    )
    mask.locator("[data-value=everything]").click()
    field(7, 8)
    expect(said).to_have_text(
        "“a” may look at “red”, which it has to predict: in training, this gives the answer away."
    )
    field(0, 5)
    expect(said).to_contain_text("“image 1” may look at “this”, although it comes later")
    mask.locator("[data-value=causal]").click()
    field(0, 5)
    expect(said).to_contain_text("“image 1” may not look at “this”: it comes later in the row")
    mask.locator("[data-value=left]").click()
    field(9, 0)
    expect(said).to_contain_text("“a” may not look at “<pad>”")
    mask.locator("#matrix tbody th").nth(2).hover()
    expect(said).to_have_text(
        "“image 1” sees itself and what comes before it: 1 of 13 tokens. Nobody sees padding."
    )


def test_the_table_is_walked_with_the_keyboard(mask: Page) -> None:
    said = mask.locator("#said")
    mask.locator("#tokens .chip").last.focus()
    mask.keyboard.press("Tab")
    expect(said).to_contain_text("“red” may look at “image 1”")
    mask.keyboard.press("End")
    expect(said).to_contain_text("“red” may not look at “<eos>”")
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowLeft"):
        mask.keyboard.press(key)
    expect(said).to_contain_text("“<eos>” may look at “star”")
    focused = mask.evaluate("[document.activeElement.role, document.activeElement.ariaLabel]")
    assert focused == ["gridcell", said.inner_text()]
    assert mask.locator("#matrix [tabindex='0']").count() == 1
    mask.keyboard.press("Tab")  # one step leads out of the table
    assert mask.evaluate("document.activeElement.tagName") == "A"


@pytest.mark.parametrize("name", ["rotary.html", "mask.html"])
def test_they_read_on_a_phone_in_the_dark_and_embedded(name: str, folder: Path, page: Page) -> None:
    for address in (name, f"{name}?embed"):
        for small in opened(page, folder, address):
            embedded = "embed" in address
            assert small.locator("footer").is_visible() != embedded
            assert small.locator("header p").first.is_visible() != embedded
            for scheme in ("light", "dark"):
                small.emulate_media(color_scheme=scheme)
                assert faint_texts(small, 4.5) == []
            small.set_viewport_size(PHONE)
            assert width(small) <= PHONE["width"]
            small.set_viewport_size({"width": 1280, "height": 900})
