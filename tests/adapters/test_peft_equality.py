"""Adapters of peft, opened here, and ours, opened by peft: the same outputs, for every system of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_with_peft import CASES, Case, peft_adapter
from helpers import assert_differs, assert_equal
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from minivlm.adapters import LoraConfig, new_adapter, put_on

WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}
systems = pytest.mark.parametrize("system", CASES)
ways = pytest.mark.parametrize("way", WAYS)


def assert_same(case: Case, ours: nn.Module, theirs: Any) -> None:
    given, expected = case.outputs(ours, theirs)
    assert_equal(given / expected.abs().max(), expected / expected.abs().max())


@torch.no_grad()
@ways
@systems
def test_an_adapter_of_peft_opens_here(system: str, way: str, tmp_path: Path) -> None:
    case = CASES[system]
    ours, reference = case.make(tmp_path / "base")
    before, _ = case.outputs(ours, reference)
    theirs = peft_adapter(reference, tmp_path / "adapter", case.targets, **WAYS[way])
    put_on(ours, tmp_path / "adapter")
    assert_same(case, ours, theirs)
    assert_differs(case.outputs(ours, theirs)[0], before, factor=1000)


@torch.no_grad()
@ways
@systems
def test_ours_opens_in_peft(system: str, way: str, tmp_path: Path) -> None:
    case = CASES[system]
    ours, reference = case.make(tmp_path / "base")
    targets = case.targets if isinstance(case.targets, str) else tuple(case.targets)
    config = LoraConfig(targets, r=3, lora_alpha=5, **WAYS[way])
    adapter = new_adapter(ours, config, generator=torch.Generator().manual_seed(2)).eval()
    assert_same(case, ours, reference)  # an untrained adapter changes nothing
    for parameter in adapter.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    adapter.save(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    assert_same(case, ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("system", ["llava", "paligemma"])
def test_names_of_older_versions(system: str, tmp_path: Path) -> None:
    """Adapters made before transformers 4.52, when the parts of these modules were nested otherwise."""
    case = CASES[system]
    ours, reference = case.make(tmp_path / "base")
    theirs = peft_adapter(reference, tmp_path / "adapter", ["q_proj", "down_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {
        name.replace("model.language_model.", "language_model.model.").replace(
            "model.vision_tower.", "vision_tower.vision_model."
        ): tensor
        for name, tensor in load_file(path).items()
    }
    assert any(name.startswith("base_model.model.language_model.model.layers.0.") for name in tensors)
    assert any(name.startswith("base_model.model.vision_tower.vision_model.encoder.") for name in tensors)
    save_file(tensors, path)
    put_on(ours, tmp_path / "adapter")
    assert_same(case, ours, theirs)
