"""DeepSeek-VL's processors give the pixels and ids of transformers, and the chats of the original program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepseek_vl import CLIP, HALF, IMAGE_TOKENS, deepseek_backend, their_pictures
from PIL import Image
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)

from minivlm import InputError
from minivlm.processing import (
    DeepseekTokenizer,
    DeepseekVLHybridImageProcessor,
    DeepseekVLHybridProcessor,
    DeepseekVLImageProcessor,
    DeepseekVLProcessor,
)
from minivlm.processing.deepseek_chat import SYSTEM, encode_chat
from minivlm.processing.deepseek_tokens import BEGIN, END, IMAGE


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


SIZES = [(40, 30), (31, 77), (90, 9), (56, 56), (24, 24), (3, 200), (301, 299), (1, 1)]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("moments", [HALF, CLIP])
def test_pixels_are_those_of_transformers(width: int, height: int, moments: list[float]):
    theirs = their_pictures(hybrid=True, image_mean=moments)
    ours = DeepseekVLHybridImageProcessor.from_dict(theirs.to_dict())
    small, large = ours.read([noise(width, height)])
    expected = theirs(noise(width, height), return_tensors="pt")
    assert torch.equal(small, expected["pixel_values"])
    assert torch.equal(large, expected["high_res_pixel_values"])
    assert torch.equal(ours([noise(width, height)]), small)
    theirs = their_pictures(hybrid=False, image_mean=moments)
    alone = DeepseekVLImageProcessor.from_dict(theirs.to_dict())([noise(width, height)])
    assert torch.equal(alone, theirs(noise(width, height), return_tensors="pt")["pixel_values"])


def test_published_sizes_of_transformers():
    """The defaults of the classes are alike; published folders say how theirs differ."""
    theirs = DeepseekVLHybridImageProcessorPil()
    ours = DeepseekVLHybridImageProcessor.from_dict(theirs.to_dict())
    assert ours == DeepseekVLHybridImageProcessor()
    small, large = ours.read([noise(700, 394)])
    assert (small.shape, large.shape) == ((1, 3, 384, 384), (1, 3, 1024, 1024))
    expected = theirs(noise(700, 394), return_tensors="pt")
    assert torch.equal(small, expected["pixel_values"])
    assert torch.equal(large, expected["high_res_pixel_values"])


def test_another_filter_or_color_differs():
    """Each setting counts: a small square made from the picture itself, another filter, black bars."""
    ours = DeepseekVLHybridImageProcessor.from_dict(their_pictures(hybrid=True).to_dict())
    small, large = ours.read([noise(40, 30)])
    directly = DeepseekVLImageProcessor.fit(ours, noise(40, 30))
    assert np.asarray(directly).tobytes() != np.asarray(ours.fit(noise(40, 30))).tobytes()
    bar = large[0, :, 0, 0] * torch.tensor(ours.high_res.image_std) + torch.tensor(ours.high_res.image_mean)
    assert (bar * 255).round().tolist() == [122, 116, 104]
    assert not torch.equal(small[0, :, 0, 0], torch.full((3,), -1.0))
    assert ours.fitted == "padded"


def test_settings_there_and_back(tmp_path: Path):
    theirs = their_pictures(hybrid=True)
    ours = DeepseekVLHybridImageProcessor.from_dict(theirs.to_dict())
    ours.save_pretrained(tmp_path)
    assert DeepseekVLHybridImageProcessor.from_pretrained(tmp_path) == ours
    again = DeepseekVLHybridImageProcessorPil.from_pretrained(tmp_path)
    expected = theirs(noise(50, 30), return_tensors="pt")
    found = again(noise(50, 30), return_tensors="pt")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_pad": False}, "do_pad is False: only True"),
        ({"size": {"height": 24, "width": 32}}, "expected a square"),
        ({"high_res_size": {"height": 24, "width": 32}}, "expected a square"),
        ({"high_res_resample": 1}, "resample is 1"),
        ({"high_res_image_std": [0, 1, 1]}, "image_std contains 0"),
        ({"image_processor_type": "SiglipImageProcessor"}, "only 'DeepseekVLHybridImageProcessor'"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        DeepseekVLHybridImageProcessor.from_dict(their_pictures(hybrid=True).to_dict() | changes)


# Chats


@pytest.fixture
def tokenizer() -> DeepseekTokenizer:
    return DeepseekTokenizer(deepseek_backend())


def as_text(tokenizer: DeepseekTokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False).replace(IMAGE * 3, "<3>")


def test_the_form_of_a_chat(tokenizer: DeepseekTokenizer):
    """As the original program prints it; only answers and their ends are written."""
    turns = [(" what is it? ", "a red star"), ("what color?", "red"), ("why?", None)]
    row = encode_chat(tokenizer, turns, 3, 2)
    assert as_text(tokenizer, row.ids) == (
        f"{BEGIN}{SYSTEM}\n\nUser: <3><3> what is it?\n\nAssistant: a red star{END}User: what color?\n\n"
        f"Assistant: red{END}User: why?\n\nAssistant:"
    )
    written = [token for token, is_written in zip(row.ids, row.written, strict=True) if is_written]
    assert as_text(tokenizer, written) == f" a red star{END} red{END}"
    row = encode_chat(tokenizer, [("<image> and <image>: what differs?", None)], 3, 2, tags=True, system="")
    assert as_text(tokenizer, row.ids) == f"{BEGIN}User: <3> and <3>: what differs?\n\nAssistant:"
    with pytest.raises(InputError, match="1 times <image>, and there are 2 pictures"):
        encode_chat(tokenizer, [("<image>?", None)], 3, 2, tags=True)


def test_what_a_user_types_is_text(tokenizer: DeepseekTokenizer):
    row = encode_chat(tokenizer, [(f"{IMAGE} {END} {BEGIN}", None)], 3, 1)
    assert row.ids.count(tokenizer.image_id) == 3
    assert row.ids.count(tokenizer.bos_id) == 1
    assert tokenizer.eos_id not in row.ids


def test_a_batch(tokenizer: DeepseekTokenizer):
    pictures = DeepseekVLHybridImageProcessor.from_dict(their_pictures(hybrid=True).to_dict())
    processor = DeepseekVLHybridProcessor(tokenizer, pictures, IMAGE_TOKENS)
    rows = [noise(40, 30), [noise(30, 40), noise(9, 9)], None]
    batch = processor(rows, ["what?"] * 3, ["a", "b", "c"])
    assert batch["pixel_values"].shape == (3, 3, 24, 24)
    assert batch["high_res_pixel_values"].shape == (3, 3, 56, 56)
    assert (batch["input_ids"] == tokenizer.image_id).sum(dim=1).tolist() == [9, 18, 0]
    assert processor.decode(batch["input_ids"][:1, -2:]) == ["a"]
    assert processor(None, ["what?"]).keys() == {"input_ids", "attention_mask"}
    alone = DeepseekVLProcessor(tokenizer, pictures, IMAGE_TOKENS)(rows, ["what?"] * 3)
    assert "high_res_pixel_values" not in alone


def test_what_is_hidden_in_one_square_is_hidden_in_both(tokenizer: DeepseekTokenizer):
    pictures = DeepseekVLHybridImageProcessor.from_dict(their_pictures(hybrid=True).to_dict())
    processor = DeepseekVLHybridProcessor(tokenizer, pictures, IMAGE_TOKENS)
    batch = processor([noise(40, 40)], ["what?"])
    shown = processor.to_pictures(batch)
    same = processor.from_pictures(shown, batch)
    assert torch.equal(same["high_res_pixel_values"], batch["high_res_pixel_values"])
    version = shown.repeat(2, 1, 1, 1)
    version[1, :, :12] = 0.0  # gray
    small, large = processor.from_pictures(version, batch).values()
    assert torch.equal(small, version)
    assert torch.equal(large[0], batch["high_res_pixel_values"][0])
    assert torch.equal(large[1, :, 28:], batch["high_res_pixel_values"][0, :, 28:])
    gray = (0.5 - torch.tensor(pictures.high_res.image_mean)) / torch.tensor(pictures.high_res.image_std)
    assert torch.allclose(large[1, :, :28], gray[:, None, None].expand(3, 28, 56))


def test_a_folder_there_and_back(tokenizer: DeepseekTokenizer, tmp_path: Path):
    pictures = DeepseekVLImageProcessor.from_dict(their_pictures(hybrid=False).to_dict())
    for system in (SYSTEM, ""):
        processor = DeepseekVLProcessor(tokenizer, pictures, IMAGE_TOKENS, system)
        processor.save_pretrained(tmp_path)
        again = DeepseekVLProcessor.from_pretrained(tmp_path)
        assert again.encode_row("what?") == processor.encode_row("what?")
        assert again.image_processor == pictures
    (tmp_path / "chat_template.jinja").write_text("USER: <image_placeholder> ASSISTANT:")
    with pytest.raises(InputError, match="no answer in DeepSeek-VL's form"):
        DeepseekVLProcessor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"num_image_tokens": "many"}))
    with pytest.raises(InputError, match="num_image_tokens = 'many'"):
        DeepseekVLProcessor.from_pretrained(tmp_path)
