"""Training in two to four processes has the loss curve of training in one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import parallel_cases as cases
import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import load_file
from small_run import CONFIG, assert_same_end, files, log_of
from small_towers import make_pairs, make_towers

import minivlm
from minivlm import cli, distributed
from minivlm.distributed import ProcessError
from minivlm.errors import InputError
from minivlm.training.contrastive import train_contrastive
from minivlm.training.finetuning import finetune
from minivlm.training.recipe import build

PATIENCE = 500.0  # seconds, of a machine that has much else to do
MEGABYTES = 500  # beside what PyTorch takes; measured: 560 in one process, 445 and less in two
WORDS = {"red": "ruby", "green": "a leaf in the wind", "blue": "<loc0000><loc0000><loc1023><loc1023> sea"}
NAMES = ("sharded", "accumulated", "siglip", "scratch", "finetune", "adapter", "clip", "lit", "distill")


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


def assert_same_curve(ours: cases.Losses, wanted: cases.Losses, name: str) -> None:
    """Losses to 1e-5. Rounding shows more in the norm of a gradient; a wrong factor would show far more."""
    for step, (one, other) in enumerate(zip(ours, wanted, strict=True)):
        assert one.pop("gradient") == pytest.approx(other["gradient"], rel=1e-3), (name, step)
        expected = {kind: value for kind, value in other.items() if kind != "gradient"}
        assert one == pytest.approx(expected, rel=1e-5, abs=1e-5), (name, step)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_loss_curve_is_that_of_one_process(
    size: int, inputs: dict[str, Path], alone: dict[str, cases.Losses], tmp_path: Path
) -> None:
    names = {2: NAMES, 3: NAMES[:3], 4: NAMES[1:3]}[size]
    everyone: list[Any] = distributed.run(
        size, cases.all_cases, *inputs.values(), tmp_path, names, timeout=PATIENCE
    )
    for name in names:
        assert len(alone[name]) == cases.STEPS
        for one in everyone[1:]:
            assert one[name] == everyone[0][name], name  # all log the loss of the whole batch
        assert_same_curve(everyone[0][name], alone[name], name)
    # Written once, by the first: another would have found the folder taken.
    assert files(tmp_path / "accumulated") >= {
        "state.safetensors",
        "log.csv",
        "loss.png",
        "model.safetensors",
    }
    minivlm.load(tmp_path / "siglip")
    if "sharded" in names:
        found, wanted = (
            load_file(tmp_path / name / "model.safetensors") for name in ("sharded", "accumulated")
        )
        assert found.keys() == wanted.keys()  # gathered, as a folder like any other
        for key in wanted:
            assert torch.allclose(found[key], wanted[key], atol=1e-4), key


def test_what_several_processes_cannot_train(inputs: dict[str, Path], tmp_path: Path) -> None:
    """All of them end, and the first says why."""
    first, second = distributed.run(
        2, cases.refusals, inputs["start"], inputs["data"], tmp_path, timeout=PATIENCE
    )
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


# ---- divided weights ---------------------------------------------------------------------------------------


def test_shards_are_read_by_another_number_of_processes(
    inputs: dict[str, Path], alone: dict[str, cases.Losses], tmp_path: Path
) -> None:
    start, data = inputs["start"], inputs["data"]
    before = distributed.run(2, cases.interrupted, start, data, tmp_path, False, timeout=PATIENCE)[0]
    assert sorted(path.name for path in tmp_path.glob("state*")) == ["state-10", "state.json"]
    after = distributed.run(3, cases.interrupted, start, data, tmp_path, True, timeout=PATIENCE)[0]
    assert_same_curve([*before[:10], *after], alone["sharded"], "sharded")
    with pytest.raises(InputError, match="holds a run with --shard: resume it the same way"):
        finetune(tmp_path, cases.tuning(start), data, loop=replace(cases.LOOP, resume=True))


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are not counted this way elsewhere")
def test_a_model_too_large_for_one_process_trains_on_two(inputs: dict[str, Path], tmp_path: Path) -> None:
    """32 million weights: 130 MB, four times in training."""
    large = replace(CONFIG, text_width=512, text_heads=4, text_layers=14)
    for part in build(large):
        part.save_pretrained(tmp_path / "large")
    (told,) = distributed.run(
        1, cases.within_a_limit, tmp_path / "large", inputs["data"], tmp_path / "one", MEGABYTES, False
    )
    assert "million weights in training" in told or "memory ran out" in told
    both = distributed.run(
        2, cases.within_a_limit, tmp_path / "large", inputs["data"], tmp_path / "two", MEGABYTES, True
    )
    assert both == ["done", "done"]


# ---- what goes wrong on the way ----------------------------------------------------------------------------


def stopped(out: Path, how: str) -> dict[int, str]:
    """What each process reports."""
    with pytest.raises(ProcessError) as caught:
        distributed.run(2, cases.stops, out, how, False, exchange_timeout=3.0, timeout=PATIENCE)
    return caught.value.reports


def test_a_process_that_is_stopped_ends_the_others_with_a_sentence(tmp_path: Path) -> None:
    """It is not dead, and does not answer. How long the others wait is the timeout of the group."""
    told = stopped(tmp_path, "SIGSTOP")
    assert told.keys() == {0}
    assert "process 0 of 2 waited in vain for the sizes of the others: another process stopped" in told[0]
    assert "Timed out waiting 3000ms" in told[0]
    assert "with --resume goes on from step 5" in told[0]


def test_a_killed_process_and_another_number_of_them(tmp_path: Path) -> None:
    """Whoever resumes, the end is that of a run that was never interrupted."""
    whole, again, alone = (tmp_path / name for name in ("whole", "again", "alone"))
    distributed.run(2, cases.stops, whole, "never", False, timeout=PATIENCE)
    told = stopped(again, "SIGKILL")
    assert any("with --resume goes on from step 5" in report for report in told.values())
    shutil.copytree(again, alone)
    distributed.run(2, cases.stops, again, "never", True, timeout=PATIENCE)
    assert_same_end(again, whole)  # bit for bit
    train_contrastive(alone, cases.SOME_TOWERS, loop=replace(cases.OFTEN, resume=True))
    for ours, wanted in zip(log_of(alone), log_of(whole), strict=True):
        assert ours == pytest.approx(wanted, rel=1e-5)


def test_a_full_disk_ends_all(tmp_path: Path) -> None:
    first, second = distributed.run(2, cases.stops, tmp_path, "full disk", False, timeout=PATIENCE)
    assert first == (
        "InputError: cannot write state.safetensors: No space left on device; the same command with --resume "
        f"goes on from step 5, saved in {tmp_path}"
    )
    assert second == "ToldElsewhere: cannot write state.safetensors: No space left on device"


def test_torchrun_starts_a_killed_run_again(tmp_path: Path) -> None:
    """The real launcher, the real command, and a process that dies in step 7."""
    typed = (
        "train-contrastive --image-size 16 --tower-width 16 --tower-layers 1 --tower-heads 2 --text-width 16 "
    )
    typed += (
        "--text-layers 1 --text-heads 2 --max-length 28 --steps 12 --batch-size 4 --no-bf16 --save-every 5 "
    )
    typed += "--measure-every 0 --workers 0 --exchange-timeout 60 --out"
    alone, two = tmp_path / "alone", tmp_path / "two"
    threads = torch.get_num_threads()
    assert cli.main([*typed.split(), str(alone), "--threads", "1"]) == 0
    torch.set_num_threads(threads)
    script = Path(__file__).parents[1] / "killed_by_itself.py"
    started = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    ended = subprocess.run(
        [sys.executable, *started, str(script), *typed.split(), str(two)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("The model is in") == 1  # one of them talks
    (ours,), (wanted,) = log_of(two), log_of(alone)  # the losses of steps before the kill are in it, too
    assert ours == pytest.approx(wanted, rel=1e-5)
