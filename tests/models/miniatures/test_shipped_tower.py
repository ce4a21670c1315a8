"""Folders without their image tower: small, whole again when opened, and never joined with another tower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minivlm.errors import InputError
from minivlm.models.load import load
from minivlm.models.miniatures import shipped_tower
from minivlm.models.miniatures.clipcap import ClipCap
from minivlm.training.ways import build


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, processor = build("clipcap", 0)
    assert isinstance(model, ClipCap)
    model.save_pretrained(tmp_path, tower=False)
    processor.save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_without_its_tower_is_the_same_model(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    assert stored
    assert not any(name.startswith("vision_tower.") for name in stored)
    before, _ = build("clipcap", 0)
    after, _ = load(folder)
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor)
    narrow, _ = load(folder, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in narrow.parameters()} == {torch.bfloat16}


def test_it_may_be_saved_again_whole(folder: Path, tmp_path: Path) -> None:
    model, processor = load(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert shipped_tower.TOWER not in json.loads((folder / "config.json").read_text())
    again, _ = load(folder)
    assert torch.equal(again.vision_tower.post_layernorm.weight, model.vision_tower.post_layernorm.weight)


def test_another_tower_is_not_left_out(folder: Path) -> None:
    model, _ = load(folder)
    with torch.no_grad():
        model.vision_tower.post_layernorm.weight[0] += 1
    with pytest.raises(InputError, match=r"the image tower is not the one in .*tiny: save it with the rest"):
        model.save_pretrained(folder, tower=False)
    model, _ = load(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder, tower=False)  # rounded, and the same


@pytest.mark.parametrize("named", ["minivlm/tiny@000000000000", "openai/clip-vit-large-patch14", None])
def test_a_tower_that_is_not_here(folder: Path, named: str | None) -> None:
    values = json.loads((folder / "config.json").read_text())
    values[shipped_tower.TOWER] = named
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="leaves its image tower out, and needs "):
        load(folder)


def test_a_tower_of_another_size(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["vision_config"]["num_attention_heads"] = 2  # the same weights, computed otherwise
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="leaves its image tower out"):
        load(folder)


def test_a_folder_with_a_tower_that_it_should_not_have(folder: Path) -> None:
    model, _ = load(folder)
    values = json.loads((folder / "config.json").read_text())
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="unexpected: vision_tower"):
        load(folder)
