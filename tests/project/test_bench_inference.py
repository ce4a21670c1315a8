"""bench/inference.py on the shipped model: both sides do the same work, and say what they measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qwen2_folders import write_folder
from small_checkpoints import SMALL, imported

from minivlm.attention import onednn_has_bf16
from minivlm.models.load import SHIPPED

BENCH = Path(__file__).parents[2] / "bench"


def work(tmp_path: Path, side: str, **changes: object) -> dict:
    job = {
        "side": side,
        "task": "answer",
        "folder": str(SHIPPED),
        "threads": 1,
        "device": "cpu",
        "batch": 2,
        "repeats": 2,
        "tokens": 3,
        "logits": str(tmp_path / f"{side}.pt"),
    }
    worker = [sys.executable, str(BENCH / "inference_worker.py"), json.dumps(job | changes)]
    done = subprocess.run(worker, capture_output=True, text=True, timeout=200, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("batch", [1, 3])
def test_both_sides_read_the_same_and_agree(tmp_path: Path, batch: int):
    sides = ["minivlm", "transformers", *(["minivlm int8"] if batch == 1 else [])]
    sides += ["minivlm packed"] if onednn_has_bf16() else []
    results = {side: work(tmp_path, side, batch=batch) for side in sides}
    for result in results.values():
        assert (len(result["prefill"]), len(result["decode"])) == (2, 6)
        assert result["prompt"] == results["minivlm"]["prompt"]
        assert result["peak"] > 50e6 or sys.platform != "linux"
    logits = {side: torch.load(tmp_path / f"{side}.pt") for side in sides}
    spread = logits["transformers"].std()
    assert logits["minivlm"].shape[0] == batch
    for side in ("minivlm", "transformers"):
        work(tmp_path, side, batch=batch, dtype="float32", logits=str(tmp_path / f"{side} exact.pt"))
    exact, theirs = (torch.load(tmp_path / f"{side} exact.pt") for side in ("minivlm", "transformers"))
    assert (exact - theirs).abs().max() < 1e-4 * spread
    assert (logits["minivlm"] - exact).abs().max() < 0.1 * spread
    if "minivlm packed" in sides:
        assert (logits["minivlm packed"] - logits["minivlm"]).abs().max() < 0.1 * spread
    if "minivlm int8" in sides:
        assert (logits["minivlm int8"] - logits["transformers"]).abs().max() < 0.3 * spread


@pytest.mark.parametrize("system", ["qwen2_vl", "qwen2_5_vl"])
def test_qwens_are_asked_alike(tmp_path: Path, system: str):
    folder = str(write_folder(tmp_path / "folder", system))
    results, logits = [], []
    for side in ("minivlm", "transformers"):
        changes = {"folder": folder, "size": [24, 16], "dtype": "float32", "batch": 1}
        results.append(work(tmp_path, side, **changes))
        logits.append(torch.load(tmp_path / f"{side}.pt"))
    assert results[0]["prompt"] == results[1]["prompt"]
    assert len(results[0]["decode"]) == len(results[1]["decode"]) == 6
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4 * float(logits[1].std()))


@pytest.mark.parametrize("system", SMALL)
def test_deepseek_and_llama_are_asked_alike(tmp_path: Path, system: str):
    """With folders of make_checkpoint.py, which transformers reads."""
    folder = tmp_path / "folder"
    imported("make_checkpoint").make_checkpoint(SMALL[system](), folder)
    results, logits = [], []
    for side in ("minivlm", "transformers"):
        changes = {"folder": str(folder), "size": [28, 28], "dtype": "float32", "batch": 1}
        results.append(work(tmp_path, side, **changes))
        logits.append(torch.load(tmp_path / f"{side}.pt"))
    assert results[0]["prompt"] == results[1]["prompt"]
    assert len(results[0]["decode"]) == len(results[1]["decode"]) == 6
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4 * float(logits[1].std()))


@pytest.mark.parametrize("side", ["minivlm", "transformers"])
def test_context_and_tower(tmp_path: Path, side: str):
    seconds = work(tmp_path, side, task="context", lengths=[8, 32], batch=1)["seconds"]
    assert {length: len(times) for length, times in seconds.items()} == {"8": 3, "32": 3}
    assert len(work(tmp_path, side, task="tower", batch=2)["seconds"]) == 2


def test_ratios_pair_the_rounds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import inference

    results = {"minivlm": [{"s": 1.0}, {"s": 2.0}], "transformers": [{"s": 2.0}, {"s": 8.0}]}
    assert inference.ratios(results, "minivlm", lambda result: result["s"]) == "3.00 (2.00 to 4.00)"
