"""The loop by itself, around a run of one weight: what it logs, measures, draws and saves; when it stops."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_run import files, step_of
from torch import nn

from minivlm.errors import InputError
from minivlm.training import state
from minivlm.training.contrastive import ContrastiveRun
from minivlm.training.finetuning import Finetuning
from minivlm.training.log import log_as_json, read_log
from minivlm.training.loop import Loop, run_to_end
from minivlm.training.scratch import Run
from minivlm.training.trainable import Diverged, Trainable


class Toy(Trainable):
    """Gradient descent on w^2 from w = 1; `breaks` says at which step its loss is no number."""

    losses = ("square",)

    def __init__(self, steps: int = 10, breaks: int | None = None) -> None:
        self.steps, self.breaks = steps, breaks
        self.step = 0
        self.masters = self.working = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.masters.weight)
        self.optimizers = {"sgd": torch.optim.SGD(self.masters.parameters(), lr=0.25)}
        self.measured: list[int] = []

    @property
    def total_steps(self) -> int:
        return self.steps

    def settings(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def place(self) -> dict[str, Any]:
        return {"stage": "first" if self.step < 6 else "second"}

    def batches(self) -> Iterator[int]:
        return iter(range(self.step, self.steps))

    def advance(self, batch: int) -> dict[str, float]:
        assert batch == self.step
        loss = self.masters.weight.square().sum()
        self.check_finite("the loss", float("nan") if self.breaks == self.step + 1 else loss.item())
        self.masters.zero_grad()
        loss.backward()
        self.optimizers["sgd"].step()
        self.step += 1
        return {"square": loss.item()}

    def advice(self) -> str:
        return "try less"

    def measure(self) -> dict[str, float]:
        self.measured.append(self.step)
        return {"half, or so": self.step / 2}

    def save(self, folder: Path) -> None:
        (folder / "model").write_text(str(self.masters.weight.item()))


def go(run: Toy, out: Path, **options: Any) -> Toy:
    run_to_end(run, out, replace(Loop(save_every=4, log_every=2, measure_every=0, progress=False), **options))
    return run


def test_the_log(tmp_path: Path) -> None:
    run = go(Toy(), tmp_path, measure_every=5, log_every=3)
    assert run.measured == [5, 10]
    assert (tmp_path / "log.csv").read_text().splitlines() == [
        'step,stage,square,sgd_lr,"half, or so"',
        "3,first,0.4375,0.25,",
        "5,first,0.00976562,0.25,2.5",  # the mean of steps 4 and 5
        "6,second,0.000976562,0.25,",
        "9,second,0.000106812,0.25,",
        "10,second,3.8147e-06,0.25,5",
    ]
    assert read_log(tmp_path / "log.csv")[1] == {
        "step": 5, "stage": "first", "square": 0.00976562, "sgd_lr": 0.25, "half, or so": 2.5,
    }  # fmt: skip
    assert json.loads(log_as_json(tmp_path / "log.csv")) == {
        "step": [3, 5, 6, 9, 10],
        "stage": ["first", "first", "second", "second", "second"],
        "square": [0.4375, 0.00976562, 0.000976562, 0.000106812, 3.8147e-06],
        "sgd_lr": [0.25] * 5,
        "half, or so": [None, 2.5, None, None, 5],
    }


def test_each_kind_of_run_is_logged_and_measured_at_its_own_pace(tmp_path: Path) -> None:
    """Where the loop does not say how often."""
    paces = [(kind.log_every, kind.measure_every) for kind in (Run, Finetuning, ContrastiveRun)]
    assert paces == [(50, 500), (10, 50), (25, 250)]
    run = Toy()
    run.log_every, run.measure_every = 4, 5
    run_to_end(run, tmp_path, Loop(progress=False))
    assert run.measured == [5, 10]
    assert [line["step"] for line in read_log(tmp_path / "log.csv")] == [4, 5, 8, 10]


def test_a_run_with_nothing_to_measure_on(tmp_path: Path) -> None:
    run = Toy()
    run.starts_trained, run.measures = True, False
    assert go(run, tmp_path, log_every=4, measure_every=3).measured == []
    assert [line["step"] for line in read_log(tmp_path / "log.csv")] == [4, 8, 10]


def test_the_log_of_a_stopped_run_has_no_line_twice(tmp_path: Path) -> None:
    with pytest.raises(Diverged):
        go(Toy(breaks=8), tmp_path / "a", log_every=1, measure_every=3)
    assert [line["step"] for line in read_log(tmp_path / "a" / "log.csv")] == [1, 2, 3, 4, 5, 6, 7]
    go(Toy(), tmp_path / "a", resume=True, log_every=1, measure_every=3)  # from step 4
    go(Toy(), tmp_path / "b", log_every=1, measure_every=3)
    assert (tmp_path / "a" / "log.csv").read_bytes() == (tmp_path / "b" / "log.csv").read_bytes()


@pytest.mark.parametrize("content", ["", "step\n"])
def test_an_empty_log(content: str, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(content)
    assert read_log(tmp_path / "log.csv") == []
    assert log_as_json(tmp_path / "log.csv") == "{}"


def test_no_log(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"log.csv cannot be read \(No such file or directory\): expected"):
        log_as_json(tmp_path / "log.csv")


def test_the_loss_is_drawn(tmp_path: Path) -> None:
    """Losses above, metrics below, and without metrics only losses."""
    go(Toy(), tmp_path / "a")
    go(Toy(), tmp_path / "b", measure_every=5)
    sizes = [Image.open(tmp_path / name / "loss.png").size for name in "ab"]
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] < sizes[1][1]
    assert len(Image.open(tmp_path / "a" / "loss.png").convert("RGB").getcolors(10**6) or []) > 10


@pytest.mark.parametrize("breaks", [2, 7])
def test_a_loss_that_is_not_a_number(breaks: int, tmp_path: Path) -> None:
    """What was saved before stays as it was, and is named."""
    with pytest.raises(Diverged, match=f"the loss is not a number at step {breaks}: try less") as caught:
        go(Toy(breaks=breaks), tmp_path)
    assert ("keeps the state of step 4" in str(caught.value)) == (breaks == 7)
    assert (tmp_path / "state.safetensors").exists() == (breaks == 7)
    assert not (tmp_path / "model").exists()
    if breaks == 7:
        assert step_of(tmp_path) == 4
        go(Toy(), tmp_path, resume=True)


def test_weights_that_are_not_numbers_are_never_saved(tmp_path: Path) -> None:
    """The last step before a save breaks them, and no loss has shown it yet."""

    class Breaks(Toy):
        def advance(self, batch: int) -> dict[str, float]:
            losses = super().advance(batch)
            if self.step == 8:
                self.masters.weight.data.fill_(torch.inf)
            return losses

    with pytest.raises(Diverged, match=r"the weights are not numbers after step 8: try less; .*of step 4"):
        go(Breaks(), tmp_path)
    assert step_of(tmp_path) == 4
    run = Breaks()
    with pytest.raises(Diverged, match="the weights are not numbers after step 8"):
        go(run, tmp_path / "measured", save_every=100, measure_every=4)
    assert run.measured == [4]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")],
)
def test_memory_that_runs_out(error: Exception, tmp_path: Path) -> None:
    class Full(Toy):
        def advance(self, batch: int) -> dict[str, float]:
            if self.step == 6:
                raise error
            return super().advance(batch)

    with pytest.raises(InputError, match=r"memory ran out \(.*smaller batches .*goes on from step 4, saved"):
        go(Full(), tmp_path)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    class Pressed(Toy):
        def advance(self, batch: int) -> dict[str, float]:
            signal.raise_signal(signal.SIGINT)
            return super().advance(batch)

    with pytest.raises(KeyboardInterrupt) as caught:
        go(Pressed(), tmp_path)
    assert str(caught.value) == (
        f"after step 1 of 10; the same command with --resume goes on from step 1, saved in {tmp_path}"
    )
    assert go(Toy(), tmp_path, resume=True).step == 10


@pytest.mark.parametrize(
    ("at", "wanted"), [(3, "nothing was saved yet"), (7, "goes on from step 4, saved in")]
)
def test_a_second_ctrl_c_keeps_the_last_save(at: int, wanted: str, tmp_path: Path) -> None:
    class Pressed(Toy):
        def advance(self, batch: int) -> dict[str, float]:
            if self.step + 1 == at:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return super().advance(batch)

    with pytest.raises(KeyboardInterrupt, match=f"^in step {at} of 10; .*{wanted}"):
        go(Pressed(), tmp_path)
    assert (tmp_path / "state.safetensors").exists() == (at == 7)


def test_a_second_ctrl_c_in_the_middle_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = state.save_file

    def pressed(tensors: Any, path: Path, metadata: dict[str, str]) -> None:
        save(tensors, path, metadata)
        if metadata["step"] == "8":
            path.write_bytes(b"half")
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(state, "save_file", pressed)
    with pytest.raises(KeyboardInterrupt, match="goes on from step 4"):
        go(Toy(), tmp_path)
    assert step_of(tmp_path) == 4
    assert files(tmp_path) == {"state.safetensors", "log.csv"}


def test_measuring_leaves_no_trace(tmp_path: Path) -> None:
    class Disturbs(Toy):
        def measure(self) -> dict[str, float]:
            assert not self.masters.training
            torch.rand(3)
            return super().measure()

    run = Disturbs()
    state = torch.get_rng_state()
    go(run, tmp_path, measure_every=1)
    assert run.masters.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_starts_trained_is_measured_first(tmp_path: Path) -> None:
    run = Toy()
    run.starts_trained = True
    assert go(run, tmp_path, measure_every=10).measured == [0, 10]
    assert read_log(tmp_path / "log.csv")[0] == {
        "step": 0, "stage": "first", "square": None, "sgd_lr": None, "half, or so": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "metadata", [{}, {"step": "1"}, {"step": "x", "config": "{}"}, {"step": "1", "config": "{"}]
)
def test_a_state_of_another_program_is_refused(metadata: dict[str, str], tmp_path: Path) -> None:
    state.save_file({"a": torch.ones(1)}, tmp_path / "state.safetensors", metadata)
    with pytest.raises(InputError, match=r"state.safetensors cannot be read .*: start a new run"):
        go(Toy(), tmp_path, resume=True)


def test_a_state_of_other_shapes_is_refused(tmp_path: Path) -> None:
    go(Toy(), tmp_path)
    run = Toy()
    run.masters = run.working = nn.Linear(2, 1, bias=False)
    with pytest.raises(InputError, match="holds weights of other shapes than this model: start from"):
        go(run, tmp_path, resume=True)
