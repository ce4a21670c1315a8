"""A training run of twelve steps, of a model far too small to learn anything, and ways to stop it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minivlm.training.log import read_log
from minivlm.training.loop import Loop
from minivlm.training.muon import Muon
from minivlm.training.recipe import TrainingConfig

CONFIG = TrainingConfig(
    image_size=32,
    tower_width=24,
    tower_layers=1,
    tower_heads=2,
    text_width=32,
    text_layers=1,
    text_heads=2,
    tower_steps=4,
    packed_steps=4,
    review_steps=0,
    prefix_steps=4,
    alike_steps=0,
    last_steps=0,
    tower_pictures=2,
    pictures=2,
    questions=2,
    prefix_questions=2,
    warmup_steps=2,
    bf16=False,
)
EVERY = Loop(save_every=3, log_every=2, measure_every=0)


class Stop(Exception):
    """Ends a run at once, as a power cut would."""


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def log_of(folder: Path) -> list[dict[str, Any]]:
    return read_log(folder / "log.csv")


def assert_same_end(folder: Path, whole: Path) -> None:
    """Weights, the state of the optimizers, and the log."""
    for name in ("model.safetensors", "state.safetensors"):
        ours, wanted = load_file(folder / name), load_file(whole / name)
        assert ours.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(ours[key], wanted[key])] == []
    assert log_of(folder) == log_of(whole)


def stop_in_step(number: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """Raise in the middle of the update of a step (from 1), when some weights have changed."""
    step = Muon.step
    calls = 0

    def stopping(optimizer: Muon, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = step(optimizer, *args)
        if calls == number:
            raise error
        return result

    monkeypatch.setattr(Muon, "step", stopping)


def step_of(folder: Path) -> int:
    """The step that was saved last. One open file: the path may be replaced at any moment."""
    with (folder / "state.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(header["__metadata__"]["step"])
