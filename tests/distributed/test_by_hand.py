"""What notebook 21 builds by hand equals PyTorch's, and sends what the formulas say."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from minivlm.classroom import one_step, smallest_run
from minivlm.distributed import ProcessError, costs, plan, run, shift, shown
from minivlm.distributed.launch import launched
from minivlm.models.load import load
from minivlm.training.log import read_log

PATIENCE: dict[str, Any] = {"timeout": 400.0, "exchange_timeout": 200.0}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sums_and_texts(size: int) -> None:
    vectors = torch.randn(size, 6, generator=torch.Generator().manual_seed(0))
    theirs = run(size, shown.collectives, vectors, **PATIENCE)
    ring = run(size, shown.sum_in_ring, vectors, **PATIENCE)
    numbers = plan.Model(6, 6, 0, 0, 0, 0)
    for rank, mine in enumerate(theirs):
        assert torch.allclose(mine.all_reduce, vectors.sum(dim=0))
        assert torch.equal(mine.all_gather, vectors.flatten())
        assert torch.allclose(mine.reduce_scatter, vectors.sum(dim=0).chunk(size)[rank])
        assert torch.allclose(ring[rank].total, mine.all_reduce)
        assert ring[rank].sent == plan.replicated(numbers, plan.Step(size, size, 1, bf16=False)).sent
        assert len(ring[rank].film) == 2 * (size - 1)


def test_a_sum_by_way_of_one_and_texts_that_travel() -> None:
    vectors = torch.arange(12.0).view(3, 4)
    found = run(3, shown.sum_at_one, vectors, **PATIENCE)
    assert [mine.sent for mine in found] == [32, 16, 16]
    assert all(torch.equal(mine.total, vectors.sum(dim=0)) for mine in found)
    met = run(3, shown.texts_around, torch.randn(6, 5), **PATIENCE)
    assert [mine.owners for mine in met] == [[0, 2, 1], [1, 0, 2], [2, 1, 0]]
    assert {mine.sent for mine in met} == {costs.bytes_sent(shift, 2, 5, 3)}


def test_a_divided_layer_has_the_gradient_of_a_whole_one() -> None:
    weight, x, y = torch.randn(6, 4), torch.randn(9, 4), torch.randn(9, 6)
    found = run(3, shown.divided_linear, weight, x, y, **PATIENCE)
    weight.requires_grad_()
    F.mse_loss(F.linear(x, weight), y).backward()
    assert weight.grad is not None
    assert torch.allclose(torch.cat([mine.gradient for mine in found]), weight.grad, atol=1e-6)
    assert {mine.sent for mine in found} == {2 * 2 * weight.nbytes // 3}


def batch(processor: Any, answers: list[str]) -> dict[str, Any]:
    """A gray picture for each answer."""
    pictures = [[Image.new("RGB", (64, 64), (40 * n, 80, 90))] for n, _ in enumerate(answers)]
    return dict(processor(pictures, ["what?"] * len(answers), suffixes=answers, padding_side="right"))


def test_every_way_takes_the_step_of_one_process() -> None:
    """With fair shares; without them it is the mean of means, and far from it."""
    _, processor = load()
    answers = ["red", "a large red circle, a small blue star, a small blue star"]
    batches = [batch(processor, answers[:1]), batch(processor, answers[1:])]
    # The second picture has to be the second one of the whole batch.
    whole = batch(processor, answers)
    batches[1]["pixel_values"] = whole["pixel_values"][1:]
    counts = [int((one["labels"][:, 1:] != -100).sum()) for one in batches]
    shares = [count / sum(counts) for count in counts]
    alone = one_step.step([whole], "alone")
    for how in ("by hand", "DDP", "FSDP"):
        found = run(2, one_step.step, batches, how, shares, **PATIENCE)
        for mine in found:
            assert _apart(mine.gradient, alone.gradient) < 1e-5, how
            assert _apart(mine.weights, alone.weights) < 1e-6, how
        assert torch.equal(found[0].weights, found[1].weights)
        assert found[0].held == pytest.approx(alone.held / (2 if how == "FSDP" else 1), rel=0.01)
    unfair = run(2, one_step.step, batches, "by hand", **PATIENCE)
    assert _apart(unfair[0].gradient, alone.gradient) > 0.1


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ---- torchrun ----------------------------------------------------------------------------------------------

WORKER = """
import os, sys
from pathlib import Path
from minivlm.classroom.smallest_run import train_towers
if __name__ == "__main__":
    Path(sys.argv[1], f"process {os.environ['RANK']}").write_text(str(os.getpid()))
    train_towers(Path(sys.argv[1], "out"))
"""


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_process_that_is_killed_is_started_again(tmp_path: Path) -> None:
    run(2, smallest_run.train_quietly, tmp_path / "whole", **PATIENCE)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with launched(2, script, str(tmp_path), restarts=1, timeout=400) as torchrun:
        while torchrun.poll() is None and not (tmp_path / "out" / "state.safetensors").exists():
            time.sleep(0.02)
        victim = int((tmp_path / "process 1").read_text())
        os.kill(victim, signal.SIGKILL)
    assert int((tmp_path / "process 1").read_text()) != victim
    assert read_log(tmp_path / "out" / "log.csv") == read_log(tmp_path / "whole" / "log.csv")


def test_a_failure_is_told_in_the_words_of_the_process(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('this process is out of paper')")
    with pytest.raises(ProcessError, match="this process is out of paper"), launched(1, script, timeout=200):
        pass


def started(folder: Path, timeout: float, stop: bool) -> None:
    """A process that leaves its number and never ends; the block waits for the number."""
    script, told = folder / "sleeps.py", folder / "told"
    script.write_text(
        "import os, sys, time\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(1000)"
    )
    with launched(1, script, str(told), timeout=timeout) as torchrun:
        while torchrun.poll() is None and not (told.exists() and told.read_text()):
            time.sleep(0.05)
        if stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [False, True])
def test_nothing_is_left_running(tmp_path: Path, stop: bool) -> None:
    """When time is up, and when somebody interrupts."""
    if stop:
        with pytest.raises(KeyboardInterrupt):
            started(tmp_path, 200, stop)
    else:
        with pytest.raises(ProcessError, match="torchrun has not finished after 1 s, and was stopped"):
            started(tmp_path, 1, stop)
    assert not alive(int((tmp_path / "told").read_text()))
