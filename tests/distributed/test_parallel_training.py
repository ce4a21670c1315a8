"""Training in two to four processes has the loss curve of training in one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import parallel_cases as cases
import pytest
import torch
from PIL import Image, ImageColor
from small_run import CONFIG, files
from small_towers import make_pairs, make_towers

import minivlm
from minivlm import distributed
from minivlm.training.recipe import build

WORDS = {"red": "ruby", "green": "a leaf in the wind", "blue": "<loc0000><loc0000><loc1023><loc1023> sea"}
NAMES = ("scratch", "accumulated", "siglip", "finetune", "adapter", "clip", "lit", "distill")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, a teacher, seven lines with answers of different lengths, and pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    for part in build(CONFIG):
        part.save_pretrained(folder / "start")
    lines, rng = [], np.random.default_rng(0)
    for number in range(12):
        color = list(WORDS)[number % 3]
        pixels = np.full((20, 30, 3), ImageColor.getrgb(color)) + rng.integers(-40, 40, (20, 30, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "prefix": "what color?", "suffix": WORDS[color]}))
    (folder / "train.jsonl").write_text("\n".join(lines[:7]))
    (folder / "validation.jsonl").write_text("\n".join(lines[7:]))
    return {
        "start": folder / "start",
        "data": folder / "train.jsonl",
        "pairs": make_pairs(folder / "pairs", 30),
        "teacher": make_towers(folder / "teacher", "clip", seed=3),
    }


@pytest.fixture(scope="module")
def alone(
    inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, cases.Losses]]:
    threads = torch.get_num_threads()
    yield cases.all_cases(**inputs, out=tmp_path_factory.mktemp("alone"), names=NAMES)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_loss_curve_is_that_of_one_process(
    size: int, inputs: dict[str, Path], alone: dict[str, cases.Losses], tmp_path: Path
) -> None:
    names = {2: NAMES, 3: NAMES[:3], 4: NAMES[1:3]}[size]
    everyone: list[Any] = distributed.run(size, cases.all_cases, *inputs.values(), tmp_path, names)
    for name in names:
        assert len(alone[name]) == cases.STEPS
        for found in everyone:
            assert found[name] == everyone[0][name], name  # all log the loss of the whole batch
            for step, (ours, wanted) in enumerate(zip(found[name], alone[name], strict=True)):
                assert ours == pytest.approx(wanted, rel=1e-5, abs=1e-5), (name, step)
    # Written once, by the first: another would have found the folder taken.
    assert files(tmp_path / "accumulated") >= {
        "state.safetensors",
        "log.csv",
        "loss.png",
        "model.safetensors",
    }
    minivlm.load(tmp_path / "siglip")


def test_what_several_processes_cannot_train(inputs: dict[str, Path], tmp_path: Path) -> None:
    """All of them end, and the first says why."""
    first, second = distributed.run(2, cases.refusals, inputs["start"], inputs["data"], tmp_path)
    assert first.keys() == second.keys()
    for name, told in first.items():
        assert told.startswith("InputError: ")
        assert second[name] == told.replace("InputError", "ToldElsewhere", 1)
    assert "processes 0 and 1 do not train the same (data 7 examples, " in first["data"]
    assert " and 5 examples, " in first["data"]
    assert "(seed 0 and 1): give all nodes the same command and the same files" in first["settings"]
    assert "batch_size is 7, for 2 processes" in first["batch"]
    assert "2 processes share 1 pictures: start fewer" in first["pictures"]
    assert "this run is trained by one process, and 2 were started" in first["one process"]
    assert "cannot be made" in first["folder"]
