"""The log for TensorBoard, whose package is not needed here: a stand-in notes what it is told."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

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


def test_numbers_of_the_log_at_their_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            told.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

        def flush(self) -> None: ...
        def close(self) -> None: ...

    module: Any = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Events(tmp_path, 0)
    events = Events(tmp_path, 20)
    events.write({"step": 30, "epoch": 1.5, "stage": "x", "loss": 2.0, "exact match": None})
    folder = str(tmp_path / "tensorboard")
    assert told == [(folder, None), (folder, 21), ("epoch", 1.5, 30), ("loss", 2.0, 30)]
