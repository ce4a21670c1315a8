"""Contrastive decoding: the formula, its limits, and that both readings go on with the same words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minivlm.evaluation.answers import make_questions
from minivlm.models.contrastive_decoding import Contrastive, contrasted, diffused
from minivlm.models.load import SHIPPED, load_answering


@pytest.fixture(scope="module", params=["tiny", "miniatures/llava", "miniatures/qwen2_5_vl"])
def system(request: pytest.FixtureRequest) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model, a batch, and the same pictures with nearly nothing left to see."""
    model, processor = load_answering(SHIPPED.parent / request.param)
    questions = [q for q in make_questions(2, 3, "test", 64) if q.example.task in ("caption", "color")]
    inputs = processor([q.picture for q in questions], [q.example.prefix for q in questions])
    return model, inputs, {"pixel_values": diffused(inputs["pixel_values"], 999)}


def test_the_formula() -> None:
    seen = torch.tensor([[4.0, 3.0, 1.0]])
    other = torch.tensor([[4.0, 1.0, -9.0]])
    found = contrasted(seen, other, alpha=2.0, beta=0.1)
    assert found[0, :2].tolist() == [3 * 4 - 2 * 4, 3 * 3 - 2 * 1]
    assert found[0, 2] < -1e8  # e^-3 is less than a tenth of the best
    assert contrasted(seen, other, alpha=2.0, beta=0.01)[0, 2] == 3 * 1 + 2 * 9


def test_without_alpha_it_is_ordinary(system: Any) -> None:
    model, inputs, other = system
    wanted = model.generate(**inputs, max_new_tokens=8)
    assert torch.equal(Contrastive(model, other, alpha=0.0).generate(**inputs, max_new_tokens=8), wanted)


@torch.no_grad()
def test_the_other_picture_is_read(system: Any) -> None:
    """The first scores are those of both readings."""
    model, inputs, other = system
    contrast = Contrastive(model, other, alpha=2.0)
    found = contrast.logits(contrast.prefill(**inputs)[0])
    seen, dark = (model.logits(model.prefill(**{**inputs, **more})[0]).float() for more in ({}, other))
    assert (seen - dark).abs().max() > 1
    torch.testing.assert_close(found, contrasted(seen, dark, 2.0, 0.1))


def test_the_same_picture_has_no_contrast(system: Any) -> None:
    model, inputs, _ = system
    wanted = model.generate(**inputs, max_new_tokens=8)
    same = Contrastive(model, {}, alpha=3.0).generate(**inputs, max_new_tokens=8)
    assert torch.equal(same, wanted)


def test_each_token_is_that_of_the_formula(system: Any) -> None:
    """Answers again, by whole readings of all words so far, without a cache."""
    model, inputs, other = system
    row = {name: tensor[:1] for name, tensor in inputs.items() if not name.startswith(("pixel", "image"))}
    if "image_grid_thw" in inputs:
        patches = int(inputs["image_grid_thw"][0].prod())
        pixels = {"pixel_values": slice(patches), "image_grid_thw": slice(1)}
    else:
        pixels = {"pixel_values": slice(1)}
    row |= {name: inputs[name][part] for name, part in pixels.items()}
    dark = {"pixel_values": other["pixel_values"][pixels["pixel_values"]]}
    written = Contrastive(model, dark, alpha=1.5).generate(**row, max_new_tokens=6)[0]
    with torch.no_grad():
        for token in written:
            scores = contrasted(
                model(**row).logits[:, -1].float(), model(**{**row, **dark}).logits[:, -1].float(), 1.5, 0.1
            )
            assert int(token) == int(scores.argmax())
            row["input_ids"] = torch.cat([row["input_ids"], token[None, None]], dim=1)
            more = {"attention_mask": 1, "token_type_ids": 1}
            for name, value in more.items():
                if name in row:
                    row[name] = torch.cat([row[name], torch.full((1, 1), value)], dim=1)
            if int(token) == model.config.eos_token_id:
                break


def test_diffusion() -> None:
    pixels = torch.ones(1, 3, 200, 200)
    assert torch.allclose(diffused(pixels, 0), pixels, atol=0.2)
    half, last = diffused(pixels), diffused(pixels, 999)
    assert half.mean() == pytest.approx(0.75**0.5, abs=0.01)
    assert half.var() == pytest.approx(0.25, abs=0.01)
    assert last.mean() == pytest.approx(0.08**0.5, abs=0.02)
    assert torch.equal(half, diffused(pixels))
