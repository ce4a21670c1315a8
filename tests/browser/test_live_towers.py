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
from playwright.sync_api import Browser, Page
from test_live_engine import assert_near, odd_texts, scene_number
from torch import Tensor

from minivlm import losses
from minivlm.models.load import MINIATURES, load
from minivlm.models.siglip import SigLIP
from minivlm.processing import PairProcessor
from minivlm.world.scenes import Scene

sys.path.insert(0, str(ROOT / "docs"))
from live.build import as_plain, write_live

START = "() => (window.towers = load_two_towers(TWO_TOWERS), undefined)"
LOSSES = """({images, texts, logit_scale, logit_bias}) => {
  const embeds = (rows) => rows.map((row) => new Tensor(Float32Array.from(row), 1, row.length));
  const cosines = similarity(embeds(images), embeds(texts));
  const [clip, siglip] = [clip_loss(cosines, logit_scale), siglip_loss(cosines, logit_scale, logit_bias)];
  return {cosines, clip, siglip};
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("live")
    write_live(where)
    return where


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
