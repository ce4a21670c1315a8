"""Whole folders of Qwen2-VL and Qwen2.5-VL: what transformers wrote, opened, asked, saved and trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from qwen2_folders import write_folder
from qwen2_vl import PATCH
from rounded import put_rounded_weights

import minivlm
from minivlm.cli import main
from minivlm.errors import InputError
from minivlm.looking.inspection import inspect_answer
from minivlm.models.answering import answer
from minivlm.models.qwen2_5_vl import Qwen2_5_VL
from minivlm.models.qwen2_vl import Qwen2VL
from minivlm.processing import video_of
from minivlm.processing.documents import Element
from minivlm.processing.images import rescale_and_normalize


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"), request.param)


def test_it_opens_and_answers(folder: Path, tmp_path: Path):
    model, processor = minivlm.load(folder)
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    assert isinstance(model, Qwen2VL)
    assert isinstance(model, Qwen2_5_VL) == (kind == "qwen2_5_vl")
    shown, other = picture(60, 20), picture(20, 60, 1)
    said = answer(shown, "what is it?", (model, processor), max_new_tokens=8)
    batch = processor([shown, [other, shown]], ["what is it?", "what color?"])
    together = processor.decode(model.generate(**batch, max_new_tokens=8))
    assert together[0] == said
    assert said != answer(other, "what is it?", (model, processor), max_new_tokens=8)


def test_it_is_saved_and_opened_again(folder: Path, tmp_path: Path):
    model, processor = minivlm.load(folder)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor_again = minivlm.load(tmp_path)
    shown = [[picture(60, 20), video_of([picture(24, 24, i) for i in range(6)], 3.0)]]
    for p in (processor, processor_again):
        p.video_budget = replace(p.video_budget, min_pixels=64, max_pixels=64 * 16)
    batch, batch_again = (p(shown, ["what is it?"]) for p in (processor, processor_again))
    assert batch.keys() == batch_again.keys() >= {"pixel_values_videos", "second_per_grid_ts"}
    written = [model.generate(**batch, max_new_tokens=6), again.generate(**batch_again, max_new_tokens=6)]
    assert torch.equal(*written)


def test_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "long.png"
    picture(90, 16).save(path)
    asked = ["--prompt", "what is it?", "--model", str(folder), "--max-new-tokens", "4"]
    assert main(["ask", str(path), *asked]) == 0
    said = answer(path, "what is it?", minivlm.load(folder), max_new_tokens=4)
    out = capsys.readouterr()
    assert out.out.startswith(f"{path} | what is it?\n{said}")
    assert "squeezed" not in out.err  # it sees long pictures as they are
    assert main(["look", str(path), *asked, "--out", str(tmp_path / "look")]) == 0
    out = capsys.readouterr()
    assert "no positions.png" in out.out
    names = {"filters", "heads", "attention", "importance", "words", "mask"}
    assert {file.stem for file in (tmp_path / "look").iterdir()} == names | {"hover"}
    assert main(["eval", "--scenes", "1", "--columns", "held_out", "--model", str(folder)]) == 0


@torch.no_grad()
def test_the_inside_of_a_long_picture(folder: Path):
    """Maps are of image tokens, row by row, whatever the order of patches in the tower."""
    model, processor = minivlm.load(folder)
    seen = inspect_answer(model, processor, picture(110, 30), "what is it?", max_new_tokens=3)
    assert seen.pixel_values.shape == (3, 16, 56)  # 2 x 7 tokens of 8 x 8 pixels
    fitted = processor.image_processor.fit(picture(110, 30))
    settings = processor.image_processor.image_mean, processor.image_processor.image_std, 1 / 255
    assert torch.equal(seen.pixel_values, rescale_and_normalize(fitted, *settings))
    assert seen.tower is not None
    assert seen.attention is not None
    assert seen.tower.shape[2:] == (14, 14)
    torch.testing.assert_close(seen.tower.sum(dim=-1), torch.ones(seen.tower.shape[:3]))
    assert seen.attention.shape[-1] == 14
    if isinstance(model, Qwen2_5_VL):  # the first block has windows of 2 x 2 tokens, the second has none
        neighbors = (torch.arange(14) % 7) // 2
        same = neighbors[:, None] == neighbors
        assert torch.equal(seen.tower[0, 0] > 0, same)
        assert bool((seen.tower[1] > 0).all())
    odds = seen.sureness(torch.stack([seen.pixel_values, -seen.pixel_values]))
    alone = seen.sureness(seen.pixel_values[None])
    torch.testing.assert_close(odds[:1], alone)
    assert abs(float(odds[1] - odds[0])) > 0.01


def test_finetuning(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Pictures of other shapes in one batch; the limit of a row counts each one's tokens."""
    lines = []
    for number, size in enumerate([(60, 20), (16, 16), (20, 60)]):
        picture(*size, number).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "prefix": "what is it?", "suffix": "a red star"}))
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))
    arguments = ["--model", str(folder), "--data", str(data), "--no-bf16", "--workers", "0"]
    run = ["finetune", *arguments, "--steps", "8", "--batch-size", "3", "--lr", "0.003"]
    assert main([*run, "--out", str(tmp_path / "tuned")]) == 0
    losses = []
    for name in (folder, tmp_path / "tuned"):
        model, processor = minivlm.load(name)
        shown = [picture(60, 20), picture(16, 16, 1), picture(20, 60, 2)]
        losses.append(model(**processor(shown, ["what is it?"] * 3, ["a red star"] * 3)).loss.item())
    assert losses[1] < losses[0] / 2
    capsys.readouterr()
    assert main([*run, "--max-length", "20", "--out", str(tmp_path / "short")]) == 2
    assert "over the limit of 20" in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_rounded_weights(folder: Path, bits: str):
    """The model is the one with rounded weights, and biases as they were."""
    (rounded, processor), (model, _) = minivlm.load(folder, quantize=bits), minivlm.load(folder)
    put_rounded_weights(rounded, model)
    inputs = processor([picture(60, 20)], ["what is it?"])
    one, other = (each.logits(each.prefill(**inputs)[0]) for each in (rounded, model))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_files_that_do_not_match(tmp_path: Path):
    write_folder(tmp_path, "qwen2_vl", patch_size=PATCH + 1)
    with pytest.raises(InputError, match=r"the patch size is 4 in config\.json and 5 in preproc"):
        minivlm.load(tmp_path)


def test_a_page_there_and_back(tmp_path: Path):
    _, processor = minivlm.load(write_folder(tmp_path, "qwen2_5_vl"))
    page = [Element("p", (10.0, 20.0, 100.0, 60.0), ("words",))]
    found = processor.read_page(processor.write_page(page, (150, 100)), (150, 100))
    assert found[0].box == pytest.approx(page[0].box, abs=150 / 32)
    assert found[0].text == "words"
