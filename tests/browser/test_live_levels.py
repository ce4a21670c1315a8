"""The levels of detail of docs/live: the whole model, a layer and a head, against the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from playwright.sync_api import Page, expect
from test_live_engine import outputs_of
from test_live_engine import shipped as shipped
from test_live_page import PHONE, nameless_controls, scene_of, settled
from test_live_page import folder as folder
from test_live_page import live as live
from torch import Tensor
from watching import faint_texts, width

from minivlm import attention
from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Processor

Shipped = tuple[PaliGemma, Processor]
NUMBERS = 8  # of a vector, shown at a time


def table(page: Page, number: int = 0) -> list[list[str]]:
    """The cells of a table, row by row, without its head."""
    rows: list[list[str]] = page.evaluate(
        """(number) => [...document.querySelectorAll("#level_shown table")[number].tBodies[0].rows]
          .map((row) => [...row.cells].map((cell) => cell.textContent))""",
        number,
    )
    return rows


def number(text: str) -> float:
    return float(text.replace("−", "-").replace("%", "").replace("<", ""))


@contextmanager
def heads_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """q, k and v of each layer, as attention gets them."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    attend = attention.attend

    def watched(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Tensor:
        seen.append((q[0], k[0], v[0]))
        return attend(q, k, v, *rest, **named)

    monkeypatch.setattr(attention, "attend", watched)
    yield seen
    monkeypatch.undo()


def read_again(page: Page, shipped: Shipped) -> Tensor:
    """The package reads picture, prompt and answer of the page in one pass; returns the embeddings."""
    model, processor = shipped
    inputs = processor([scene_of(page).draw()], [page.evaluate("page.prompt")])
    words = torch.tensor([page.evaluate("page.result.words.map((word) => word.token_id)")])
    row = torch.cat([inputs["input_ids"], words], dim=1)
    types = torch.cat([inputs["token_type_ids"], torch.ones_like(words)], dim=1)
    with torch.no_grad():
        model(row, inputs["pixel_values"], None, types)
        return model.merge(row, model.encode_image(inputs["pixel_values"]))[0]


def test_the_whole_model(live: Page, shipped: Shipped) -> None:
    model, _ = shipped
    parts = live.locator(".part")
    expect(parts).to_have_count(3)

    def million(module: torch.nn.Module) -> str:
        return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} million weights"

    expect(live.locator("#level_said")).to_contain_text(million(model))
    expect(parts.nth(0)).to_contain_text(million(model.vision_tower))
    expect(parts.nth(2)).to_contain_text(million(model.language_model))
    expect(parts.nth(1)).to_contain_text("12,416 weights")
    assert sum(p.numel() for p in model.multi_modal_projector.parameters()) == 12416
    shapes = [part.locator(".shape").all_text_contents() for part in parts.all()]
    T = len(live.evaluate("page.result.prefix_ids"))
    assert shapes[0] == ["3 × 64 × 64", "64 × 192", *["64 × 96"] * 5]
    assert shapes[1] == ["64 × 128"]
    row = f"{T} × 128"
    assert shapes[2] == [f"{T - 64} × 128", *[row] * 5, "1 × 128", "1 × 1598", "1 × 1598"]
    assert parts.locator("button").count() == 3 + 4


@pytest.mark.parametrize(
    "stage", ["language_model.layers.0", "language_model.layers.2", "vision_tower.layers.1"]
)
def test_a_layer_is_opened(stage: str, live: Page, shipped: Shipped) -> None:
    """How large the vector of the looked-at token is after each step."""
    live.locator(f"[data-part='{stage}']").click()
    expect(live.locator("#level_1")).to_be_focused()
    with outputs_of(shipped[0]) as seen:
        embeddings = read_again(live, shipped)
    whole, _, number_of_layer = stage.split(".")
    norms = ("layer_norm1", "layer_norm2")
    before = seen["vision_tower.layers.0"]
    if whole == "language_model":
        norms = ("input_layernorm", "post_attention_layernorm")
        before = embeddings if number_of_layer == "0" else seen["language_model.layers.1"]
    looks = live.evaluate("looked_at().looks")
    assert (looks < 64) == (whole == "vision_tower")
    written = seen[f"{stage}.self_attn"]
    steps = [before, seen[f"{stage}.{norms[0]}"], written, before + written]
    steps += [seen[f"{stage}.{norms[1]}"], seen[f"{stage}.mlp"], seen[stage]]
    rows = [row for row in table(live) if len(row) == 4]
    assert [number(row[3]) for row in rows] == pytest.approx(
        [float(x[looks].norm()) for x in steps], abs=0.051
    )
    shape = "64 × 96" if whole == "vision_tower" else f"{len(live.evaluate('page.result.prefix_ids'))} × 128"
    assert {row[1] for row in rows} == {shape}
    assert live.locator("#level_shown canvas").count() == len(rows) == 7


@pytest.mark.parametrize(("stage", "head"), [("language_model.layers.1", 2), ("vision_tower.layers.2", 1)])
def test_a_head_is_opened(
    stage: str, head: int, live: Page, shipped: Shipped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its q, k, scores, shares and v, and what it writes."""
    live.locator(f"[data-part='{stage}']").click()
    live.locator(f"[data-part='head {head}']").click()
    expect(live.locator("#level_2")).to_have_text(f"head {head + 1}")
    with heads_seen(monkeypatch) as heads:
        read_again(live, shipped)
    layer = int(stage[-1]) + (0 if stage.startswith("vision_tower") else 3)
    looks = live.evaluate("looked_at().looks")
    q, k, v = heads[layer]
    if stage.startswith(
        "language_model"
    ):  # all heads share keys and values; a writer sees what lies before it
        k, v = k[:, : looks + 1], v[:, : looks + 1]
    query, keys, values = q[head, looks], k[head % len(k)], v[head % len(v)]
    scores = keys @ query / len(query) ** 0.5
    weights = scores.softmax(dim=0)
    best = weights.argsort(descending=True)[:6].tolist()
    mixed = weights @ values
    for first in range(0, 32, NUMBERS):
        live.locator(f"[data-part='numbers {first}']").click()
        shown = slice(first, first + NUMBERS)
        compared, mixture = table(live, 0), table(live, 1)
        wanted = [query, *keys[best]]
        for row, vector in zip(compared[:7], wanted, strict=True):
            assert list(map(number, row[1:9])) == pytest.approx(vector[shown].tolist(), abs=0.0051)
        for row, vector in zip([*mixture[:6], mixture[7]], [*values[best], mixed], strict=True):
            assert list(map(number, row[2:10])) == pytest.approx(vector[shown].tolist(), abs=0.0051)
    assert [number(row[9]) for row in compared[1:7]] == pytest.approx(scores[best].tolist(), abs=0.051)
    shares = [100 * share for share in weights[best].tolist()]
    assert [number(row[10]) for row in compared[1:7]] == pytest.approx(shares, abs=0.51)
    assert [row[1] for row in mixture[:6]] == [row[10] for row in compared[1:7]]


def test_levels_follow_the_picture_and_the_token(live: Page) -> None:
    live.locator("#stage").select_option("language_model.layers.3")
    live.locator("#head").select_option("1")
    live.locator("#open_head").click()
    expect(live.locator("#level_1")).to_have_text("decoder, layer 4")
    expect(live.locator("#level_2")).to_have_text("head 2")
    before = table(live)
    live.locator("#prompt").fill("what color is the square?")
    settled(live)
    expect(live.locator("#level_said")).to_contain_text("For “↵”, which writes “orange”.")
    assert table(live) != before
    live.locator("#level_0").click()
    expect(live.locator("#level_shown")).to_contain_text("the first word is “orange”")


def test_levels_read_on_a_phone_and_in_the_dark(live: Page) -> None:
    for level in (0, 1, 2):
        live.set_viewport_size({"width": 1280, "height": 900})
        live.locator(f"#level_{level}").click()
        for scheme in ("light", "dark"):
            live.emulate_media(color_scheme=scheme)
            assert faint_texts(live, 4.5) == []
        live.set_viewport_size(PHONE)
        assert width(live) <= PHONE["width"]
        assert nameless_controls(live) == []
