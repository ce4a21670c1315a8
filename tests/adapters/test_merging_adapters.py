"""Merging: the same outputs without the adapter, the old weights back, and files that stay whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, assert_differs, assert_equal, make_batch, tiny_paligemma, without_labels
from qwen2_vl import pair, pictures
from torch import nn

import minivlm
from minivlm.adapters import (
    LoraConfig,
    merge,
    merge_for_good,
    new_adapter,
    switch_to,
    take_off,
    unmerge,
)
from minivlm.cli import main
from minivlm.errors import InputError
from minivlm.models.load import SHIPPED

WAYS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
ways = pytest.mark.parametrize("way", WAYS)
BATCH = without_labels(make_batch([3, 3], [4, 4], [True, True]))


def trained(model: nn.Module, name: str = "default", **options: Any) -> nn.Module:
    """An adapter with random weights."""
    adapter = new_adapter(model, LoraConfig(**options), name).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapter


@torch.no_grad()
@ways
@pytest.mark.parametrize("system", ["paligemma", "qwen2_vl"])
def test_merged_and_unmerged(system: str, way: str) -> None:
    model, batch = (tiny_paligemma(), BATCH) if system == "paligemma" else (pair()[0], pictures())
    targets = ("q_proj", "down_proj", "fc1") if system == "paligemma" else ("qkv", "o_proj", "mlp.fc1")
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    alone = model(**batch).logits
    trained(model, target_modules=targets, **WAYS[way])
    worn = model(**batch).logits
    assert_differs(worn, alone, factor=100)
    merge(model)
    assert (model(**batch).logits - worn).abs().max() <= TOLERANCE * worn.abs().max()
    unmerge(model)
    assert torch.equal(model(**batch).logits, worn)
    take_off(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
    assert after.keys() == weights.keys()


@torch.no_grad()
@ways
def test_unmerging_is_exact_in_bf16(way: str) -> None:
    """Subtracting what was added would not give the old weights back."""
    model = tiny_paligemma().to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trained(model, **WAYS[way])
    merge(model)
    assert model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    unmerge(model)
    take_off(model)
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())


@torch.no_grad()
@ways
def test_a_merged_model_is_a_checkpoint(way: str, tmp_path: Path) -> None:
    model = tiny_paligemma()
    trained(model, target_modules=("q_proj", "up_proj"), **WAYS[way])
    trained(model, "other", target_modules=("v_proj",))
    switch_to(model, "default")
    worn = model(**BATCH).logits
    with pytest.raises(InputError, match="the model wears adapters"):
        model.save_pretrained(tmp_path)
    merge_for_good(model)
    model.save_pretrained(tmp_path)
    assert_equal(minivlm.PaliGemma.from_pretrained(tmp_path)(**BATCH).logits, worn)


def test_merges_that_are_refused() -> None:
    model = tiny_paligemma()
    with pytest.raises(InputError, match="no adapter 'default': choose from none"):
        merge(model)
    trained(model)
    merge(model)
    for call in (
        lambda: merge(model),
        lambda: switch_to(model, None),
        lambda: take_off(model),
        lambda: trained(model, "b"),
    ):
        with pytest.raises(InputError, match="unmerge it first"):
            call()
    int8, _ = minivlm.load(quantize="int8")
    trained(int8)
    for merging in (merge, merge_for_good):
        with pytest.raises(InputError, match=r"are quantized or packed.*without quantizing"):
            merging(int8)


@torch.no_grad()
def test_an_int8_base_of_a_folder(tmp_path: Path) -> None:
    """Both ways to round: what the adapter adds is the same on either base."""
    ids = torch.randint(3, 120, (1, 12), generator=torch.Generator().manual_seed(0))
    model, _ = minivlm.load()
    alone = model(ids).logits
    adapter = trained(model, target_modules=("q_proj", "down_proj"))
    adapter.save(tmp_path)  # type: ignore[operator]
    worn = model(ids).logits
    int8, _ = minivlm.load(quantize="int8", adapter=tmp_path)
    rounded = int8(ids).logits
    assert_differs(worn, alone, factor=1000)
    assert (rounded - worn).abs().max() < 0.3 * (worn - alone).abs().max()


# Files


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model, _ = minivlm.load()
    trained(model, r=2).save(tmp_path / "adapter")  # type: ignore[operator]
    return tmp_path / "adapter"


def contents(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.iterdir()}


def test_merged_by_the_command_line(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(adapter, SHIPPED)
    out = tmp_path / "merged"
    assert main(["merge", "--adapter", str(adapter), "--out", str(out)]) == 0
    assert f"The model is in {out}" in capsys.readouterr().out
    worn, _ = minivlm.load(adapter=adapter)
    merged, _ = minivlm.load(out)
    ids = torch.randint(3, 120, (1, 12))
    assert_equal(merged(ids).logits, worn(ids).logits)
    assert main(["merge", "--adapter", str(adapter), "--out", str(out)]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert main(["merge", "--adapter", str(adapter), "--out", str(adapter)]) == 2
    assert contents(adapter, SHIPPED) == before


def test_killed_in_a_merge(adapter: Path, tmp_path: Path) -> None:
    """What is read stays as it is, and what is half written is no checkpoint."""
    before = contents(adapter, SHIPPED)
    out = tmp_path / "merged"
    code = f"""
import os, signal
import minivlm.checkpoints.weights as weights
def killed(tensors, path, metadata):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
weights.save_file = killed
from minivlm.cli import main
main(["merge", "--adapter", {str(adapter)!r}, "--out", {str(out)!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert contents(adapter, SHIPPED) == before
    assert not (out / "config.json").exists()
    assert not (out / "model.safetensors").exists()
    with pytest.raises(InputError, match=r"has no config.json"):
        minivlm.load(out)


def test_killed_while_an_adapter_is_saved(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one stays, whole."""
    from minivlm.adapters import folders

    before = contents(adapter)
    model, _ = minivlm.load()
    other = trained(model, r=4)

    def stops(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "save_file", stops)
    with pytest.raises(KeyboardInterrupt):
        other.save(adapter)  # type: ignore[operator]
    assert contents(adapter) == before
