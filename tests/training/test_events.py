"""The log for TensorBoard, read back with TensorBoard."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing import event_accumulator

from minivlm.errors import InputError
from minivlm.training.events import Events
from minivlm.training.loop import Loop


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match=r"comes with the extra \[tensorboard\]: .* install 'minivlm"):
        Loop(log="tensorboard")
    with pytest.raises(InputError, match="log is 'wandb': choose csv or tensorboard"):
        Loop(log="wandb")


def test_tensorboard_reads_the_numbers_at_their_steps(tmp_path: Path) -> None:
    first = Events(tmp_path, 0)
    for step in (10, 20, 30, 40):
        first.write({"step": step, "epoch": step / 20, "stage": "x", "loss": step / 8, "exact match": None})
    first.close()
    assert of_folder(tmp_path) == {
        "epoch": {10: 0.5, 20: 1.0, 30: 1.5, 40: 2.0},
        "loss": {10: 1.25, 20: 2.5, 30: 3.75, 40: 5.0},
    }

    # The run was stopped after step 40, saved at step 20, and goes on from there.
    again = Events(tmp_path, 20)
    again.write({"step": 30, "epoch": 1.5, "loss": 7.0, "exact match": 0.25})
    again.close()
    found = of_folder(tmp_path)
    assert found["loss"] == {10: 1.25, 20: 2.5, 30: 7.0}
    assert found["exact_match"] == {30: 0.25}


def of_folder(out: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard itself finds there: values by step, by name."""
    read: Any = event_accumulator.EventAccumulator(str(out / "tensorboard"))
    read.Reload()
    return {name: {e.step: e.value for e in read.Scalars(name)} for name in read.Tags()["scalars"]}
