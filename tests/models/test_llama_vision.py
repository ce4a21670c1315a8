"""Llama 3.2 Vision: three views of one forward, whole folders, commands, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answering_folders import write_llama_vision
from helpers import assert_differs, assert_equal
from llama_vision import (
    FIRST,
    IDS,
    LATER,
    TEXT,
    VISION,
    our_config,
    pair,
    pixels,
    reference_llama_vision,
    their_inputs,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import MllamaForConditionalGeneration

import minivlm
from minivlm.attention import record_attention
from minivlm.checkpoints.layouts import LLAMA_VISION_LAYOUTS, to_file, to_ours
from minivlm.cli import main
from minivlm.errors import InputError
from minivlm.looking.inspection import inspect_answer
from minivlm.models.answering import answer
from minivlm.models.llama_vision import LlamaVision, LlamaVisionConfig
from minivlm.speed.int8 import Int8Linear
from minivlm.text.llama3_rope import Llama3Scaling
from minivlm.text.llama_vision import LlamaVisionTextConfig
from minivlm.vision.llama_vision import LlamaVisionTower, LlamaVisionTowerConfig

# Rows of different lengths: pictures after words, none, two that are seen together, one that ends the row.
LENGTHS = [8, 5, 7]
TOKENS = torch.tensor(
    [[3, 5, 120, 6, 7, 120, 8, 9], [3, 10, 11, 12, 13, 0, 0, 0], [120, 120, 6, 7, 8, 9, 120, 0]]
)
NUMBERS = torch.tensor([3, 6, 1, 7, 2])
TILES = pixels(NUMBERS)
PICTURES = [slice(0, 2), slice(2, 2), slice(2, 5)]  # of each row


def padded(side: str, lengths: list[int] = LENGTHS) -> tuple[Tensor, Tensor]:
    """ids and mask of the first so many tokens of each row, with a column of padding more than needed."""
    longest = max(lengths) + 1
    ids, mask = torch.zeros(2, 3, longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(longest - length, longest) if side == "left" else slice(length)
        ids[row, place], mask[row, place] = TOKENS[row, :length], 1
    return ids, mask


def alone(model: LlamaVision, row: int) -> Tensor:
    """The logits of a row by itself."""
    ids, of_row = TOKENS[row : row + 1, : LENGTHS[row]], PICTURES[row]
    inputs = {"pixel_values": TILES[of_row], "aspect_ratio_ids": NUMBERS[of_row]}
    logits: Tensor = model(ids, **(inputs if len(NUMBERS[of_row]) else {})).logits[0]
    return logits


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows(side: str):
    model, _ = pair()
    ids, mask = padded(side)
    logits = model(ids, TILES, mask, aspect_ratio_ids=NUMBERS).logits
    for row in range(3):
        assert_equal(logits[row, mask[row].bool()], alone(model, row))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_is_the_whole_row(side: str):
    """Prompts of different lengths with all their pictures, then token by token; rows end apart."""
    model, _ = pair()
    starts = [6, 2, 7]
    ids, mask = padded(side, starts)
    hidden, cache = model.prefill(ids, mask, TILES, aspect_ratio_ids=NUMBERS)
    expected = [alone(model, row) for row in range(3)]
    for step in range(4):
        for row, (start, length) in enumerate(zip(starts, LENGTHS, strict=True)):
            if start + step <= length:
                assert_equal(model.logits(hidden)[row], expected[row][start + step - 1])
        goes_on = torch.tensor([start + step < length for start, length in zip(starts, LENGTHS, strict=True)])
        if goes_on.any():
            tokens = [int(TOKENS[row, min(starts[row] + step, 7)]) for row in range(3)]
            hidden = model.decode(torch.tensor(tokens), goes_on, cache)
    assert cache.lengths.tolist() == LENGTHS
    cache.reset()
    assert cache.image is None


@torch.no_grad()
def test_pictures_are_read_once_per_answer(monkeypatch: pytest.MonkeyPatch):
    model, _ = pair()
    calls: list[int] = []
    model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    right = model.language_model.read_image
    monkeypatch.setattr(model.language_model, "read_image", lambda image: calls.append(2) or right(image))
    model.config = replace(model.config, eos_token_id=10**6)
    model.generate(LATER, 5, pixel_values=pixels(), aspect_ratio_ids=IDS)
    assert calls == [1, 2]


@torch.no_grad()
def test_bf16_keeps_its_dtype():
    model, _ = pair()
    expected = model(LATER, pixels(), aspect_ratio_ids=IDS).logits
    half, _ = pair()
    half.bfloat16()
    logits = half(LATER, pixels(), aspect_ratio_ids=IDS).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_every_weight_learns():
    """From gates that are open; of a table of canvases, only the rows of those that were there."""
    model, _ = pair()
    labels = FIRST.masked_fill(FIRST == 120, -100)
    model(FIRST, pixels(), labels=labels, aspect_ratio_ids=IDS).loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    table = gradients["vision_tower.post_tile_embedding.embedding.weight"]
    assert table is not None
    assert table.any(dim=1).nonzero()[:, 0].tolist() == sorted(IDS.tolist())


# Folders.


@torch.no_grad()
@pytest.mark.parametrize("layout", sorted(LLAMA_VISION_LAYOUTS))
def test_folders_of_every_layout(layout: str, tmp_path: Path):
    ours, reference = pair()
    ours.save_pretrained(tmp_path)
    runtime = LLAMA_VISION_LAYOUTS["runtime"]
    named = {
        to_file(str(to_ours(name, runtime)), LLAMA_VISION_LAYOUTS[layout]): tensor.contiguous()
        for name, tensor in reference.state_dict().items()
    }
    save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = LlamaVision.from_pretrained(tmp_path)
    expected = ours(LATER, pixels(), aspect_ratio_ids=IDS).logits
    assert torch.equal(again(LATER, pixels(), aspect_ratio_ids=IDS).logits, expected)


@torch.no_grad()
def test_what_transformers_saves_and_what_we_save(tmp_path: Path):
    """Told the same indices, both read other states; everything else is equal in both directions."""
    ours, reference = pair()
    rows = torch.tensor([[120, 5, 6, 7, 8]])
    inputs = {"pixel_values": pixels(IDS[:1]), "aspect_ratio_ids": IDS[:1]}
    reference.save_pretrained(tmp_path / "theirs")
    found = LlamaVision.from_pretrained(tmp_path / "theirs")
    assert found.config.vision.intermediate_layers_indices == (0, 2)
    found.vision_tower.config = ours.config.vision  # [1, 3]: as the reference computes
    expected = reference(**their_inputs(rows, inputs["pixel_values"], IDS[:1])).logits
    assert_equal(found(rows, **inputs).logits, expected)

    ours.save_pretrained(tmp_path / "ours")
    assert LlamaVision.from_pretrained(tmp_path / "ours").config == ours.config
    loaded, seen = MllamaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(seen[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.vision_config.intermediate_layers_indices == [1, 3]
    loaded.model.vision_model.intermediate_layers_indices = [0, 2]
    theirs = loaded.eval()(**their_inputs(rows, inputs["pixel_values"], IDS[:1])).logits
    assert_equal(theirs, ours(rows, **inputs).logits)


def test_configs_go_there_and_back():
    scaled = replace(our_config(reference_llama_vision()).text, rope_scaling=Llama3Scaling())
    for text in (scaled, LlamaVisionTextConfig()):
        config = LlamaVisionConfig(text=text, image_token_id=120)
        assert LlamaVisionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = {"rope_theta": 500000.0, "rope_scaling": rope | {"original_max_position_embeddings": 8192}}
    found = LlamaVisionTextConfig.from_dict(old)  # as published files have it
    assert found.rope_scaling == Llama3Scaling()
    assert found.cross_attention_layers == (3, 8, 13, 18, 23, 28, 33, 38)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_vision(tmp_path_factory.mktemp("folder"))


def test_it_opens_and_answers(folder: Path, tmp_path: Path):
    model, processor = minivlm.load(folder)
    assert isinstance(model, LlamaVision)
    shown, other = picture(60, 20), picture(20, 60, 1)
    said = answer(shown, "what is it?", (model, processor), max_new_tokens=8)
    batch = processor([shown, [other, shown], None], ["what is it?", "what color?", "what?"])
    together = processor.decode(model.generate(**batch, max_new_tokens=8))
    assert together[0] == said
    assert said != answer(other, "what is it?", (model, processor), max_new_tokens=8)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor_again = minivlm.load(tmp_path)
    assert processor_again.decode(again.generate(**batch, max_new_tokens=8)) == together


def test_in_int8(folder: Path):
    model, processor = minivlm.load(folder, quantize="int8")
    assert isinstance(model.language_model.layers[1].cross_attn.k_proj, Int8Linear)
    batch = processor([picture(60, 20)], ["what is it?"])
    whole, _ = minivlm.load(folder)
    with torch.no_grad():
        half, full = (m(**batch).logits for m in (model, whole))
    assert (half - full).abs().mean() < 0.1 * full.abs().mean()


def test_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "long.png"
    picture(90, 16).save(path)
    asked = ["--prompt", "what is it?", "--model", str(folder), "--max-new-tokens", "4"]
    assert main(["ask", str(path), *asked]) == 0
    said = answer(path, "what is it?", minivlm.load(folder), max_new_tokens=4)
    out = capsys.readouterr()
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in said)
    assert out.out.startswith(f"{path} | what is it?\n{shown}")
    assert "squeezed" not in out.err  # it sees long pictures as they are
    assert main(["look", str(path), *asked, "--out", str(tmp_path / "look")]) == 0
    assert "no words.png" in capsys.readouterr().out
    names = {"filters", "heads", "positions", "attention", "importance", "mask", "hover"}
    assert {file.stem for file in (tmp_path / "look").iterdir()} == names
    assert main(["eval", "--scenes", "1", "--columns", "held_out", "--model", str(folder)]) == 0


def test_finetuning(folder: Path, tmp_path: Path):
    """With the tower frozen, gates learn, too; what is saved opens again."""
    picture(60, 20).save(tmp_path / "a.png")
    line = {"image": "a.png", "prefix": "what is it?", "suffix": "a red star"}
    (tmp_path / "data.jsonl").write_text(json.dumps(line) + "\n")
    out = tmp_path / "tuned"
    arguments = ["--data", str(tmp_path / "data.jsonl"), "--model", str(folder), "--out", str(out)]
    arguments += ["--steps", "1", "--no-bf16", "--freeze", "tower", "--workers", "0", "--lr", "0.1"]
    assert main(["finetune", *arguments]) == 0
    before, after = (minivlm.load(place)[0].state_dict() for place in (folder, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {"multi_modal_projector", "language_model"}
    assert any("attn_gate" in name for name in changed)


@torch.no_grad()
def test_the_inside_of_a_picture_of_several_tiles(folder: Path):
    """Maps are of patches row by row on the canvas, whatever the order of tokens in the tower."""
    model, processor = minivlm.load(folder)
    shown = picture(56, 56)
    seen = inspect_answer(model, processor, shown, "what is it?", max_new_tokens=3)
    assert seen.pixel_values.shape == (3, 56, 56)  # 2 x 2 tiles of 2 x 2 patches
    assert seen.tower is not None
    assert seen.attention is not None
    assert seen.tower.shape == (6, 4, 16, 16)
    assert seen.attention.shape[1:] == (2, 4, 16)  # two cross-attentions
    assert seen.image_tokens is None
    # Of the upper half of the canvas, which is two tiles of five tokens.
    inputs = processor([shown], ["what is it?"])
    order = [1, 2, 6, 7, 3, 4, 8, 9]  # tokens 0 and 5 are class tokens
    with record_attention() as maps:
        model(**inputs)
    assert_equal(seen.attention[0, 0, :, :8], maps[7][0, :, -1, order])  # after six maps of the tower and one
    score = seen.sureness(torch.stack([seen.pixel_values, seen.pixel_values.flip(-1)]))
    assert_differs(score[:1], score[1:])


# What is refused.


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision_config", {"intermediate_layers_indices": [1, 4]}, r"\[1, 4\]: expected .* from 0 to 3"),
        ("vision_config", {"intermediate_layers_indices": [-1, 2]}, r"is \[-1, 2\]"),
        ("vision_config", {"intermediate_layers_indices": [2, 1]}, "in ascending order"),
        ("vision_config", {"intermediate_layers_indices": [1, 1]}, "in ascending order"),
        ("vision_config", {"vision_output_dim": 48}, "vision_output_dim = 48; only 72"),
        (
            "vision_config",
            {"supported_aspect_ratios": [[1, 1], [5, 5]]},
            r"supported_aspect_ratios = \[\[1, 1\]",
        ),
        ("vision_config", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("vision_config", {"model_type": "clip_vision_model"}, "'clip_vision_model'"),
        ("vision_config", {"attention_heads": 5}, "24 is not divisible by 5"),
        ("text_config", {"cross_attention_layers": [1, 6]}, r"\[1, 6\]: expected .* from 0 to 5"),
        ("text_config", {"cross_attention_layers": list(range(6))}, "all 6 layers"),
        ("text_config", {"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("text_config", {"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "'yarn'"),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "llama3", "high_freq_factor": 1.0}},
            "below the higher",
        ),
        (None, {"image_token_index": 128}, "image_token_id is 128, and the embedding table has 128 rows"),
        (None, {"model_type": "llava"}, "model_type 'llava'"),
    ],
)
def test_configs_that_are_refused(part: str | None, changes: dict[str, Any], message: str):
    values = LlamaVisionConfig(
        LlamaVisionTowerConfig.from_dict(VISION), LlamaVisionTextConfig.from_dict(TEXT), image_token_id=120
    ).to_dict()
    values = values | (changes if part is None else {part: values[part] | changes})
    with pytest.raises(InputError, match=message):
        LlamaVisionConfig.from_dict(values)


def test_pictures_that_are_refused():
    model, _ = pair()
    with pytest.raises(InputError, match=r"hold 4 times <\|image\|> and there are 3 pictures"):
        model(LATER, pixels()[:3], aspect_ratio_ids=IDS[:3])
    with pytest.raises(InputError, match=r"hold 4 times <\|image\|> and there are 0 pictures"):
        model.generate(LATER, 2)
    with pytest.raises(InputError, match=r"hold 0 times <\|image\|> and there are 4 pictures"):
        model(LATER.masked_fill(LATER == 120, 5), pixels(), aspect_ratio_ids=IDS)
    with pytest.raises(InputError, match="need pixel_values and aspect_ratio_ids"):
        model(LATER, pixels())
    with pytest.raises(InputError, match="as many tiles as the model has places for"):
        model(LATER, torch.zeros(4, 5, 3, 28, 28), aspect_ratio_ids=IDS)
    with pytest.raises(InputError, match=r"aspect_ratio_ids has shape \[3\], and there are 4 pictures"):
        model(LATER, pixels(), aspect_ratio_ids=IDS[:3])
    for number in (0, 9, -1):
        with pytest.raises(InputError, match="expected numbers from 1 to 8, for the canvases 1 x 1, 1 x 2"):
            model(LATER, pixels(), aspect_ratio_ids=IDS.clone().fill_(number))
    with pytest.raises(ValueError, match="has a hole"):
        model(LATER, pixels(), LATER.ne(6).long(), aspect_ratio_ids=IDS)


def test_files_that_do_not_match(folder: Path, tmp_path: Path):
    for name, key, value, message in (
        ("config.json", "image_token_index", 300, r"the id of <\|image\|> is 300 in config.json"),
        ("preprocessor_config.json", "size", {"height": 14, "width": 14}, "the side of a tile is 28"),
        ("preprocessor_config.json", "max_image_tiles", 2, "the number of tiles is 4 in config.json and 2"),
    ):
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        values = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(values | {key: value}))
        with pytest.raises(InputError, match=message):
            minivlm.load(tmp_path)


def test_a_tower_without_early_states():
    values = VISION | {"intermediate_layers_indices": [], "vision_output_dim": 24}
    tower = LlamaVisionTower(LlamaVisionTowerConfig.from_dict(values)).eval()
    assert tower(pixels(), IDS).shape == (4, 4, 5, 24)
