"""The best state is what a run leaves, and a run that was killed chooses the same one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import load_file
from small_run import CONFIG, Stop, assert_same_end, files

import minivlm
from minivlm.adapters import LoraConfig
from minivlm.data.samples import make_inputs, read_samples
from minivlm.errors import InputError
from minivlm.training.best import Choice
from minivlm.training.finetuning import Finetuning, FinetuningConfig, finetune
from minivlm.training.log import read_log
from minivlm.training.loop import Loop
from minivlm.training.lora import finetune_adapter
from minivlm.training.memory import estimate
from minivlm.training.recipe import build

EVERY = Loop(save_every=5, log_every=2, measure_every=2, progress=False, workers=0)
BOX = "<loc0000><loc0000><loc1023><loc1023> sea"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model far too small to know anything, and pictures of one color each."""
    folder = tmp_path_factory.mktemp("data")
    for part in build(CONFIG):
        part.save_pretrained(folder / "start")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(9):
        color = ("red", "blue", "lime")[number % 3]
        pixels = np.full((40, 60, 3), ImageColor.getrgb(color)) + rng.integers(-40, 40, (40, 60, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "prefix": "what color?", "suffix": color})
    write(folder / "train.jsonl", lines[:6])
    write(folder / "validation.jsonl", lines[6:])
    boxed = [line | {"suffix": BOX} for line in lines]
    write(folder / "train_boxes.jsonl", boxed[:6])
    write(folder / "boxes.jsonl", [lines[6], *boxed[7:]])
    return folder


def write(path: Path, lines: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def config(data: Path, **changes: Any) -> FinetuningConfig:
    """Twelve steps."""
    values: dict[str, Any] = {"steps": 12, "batch_size": 3, "lr": 0.05, "best": "loss"}
    return FinetuningConfig(model=str(data / "start"), bf16=False, **values | changes)


def run(data: Path, out: Path, loop: Loop = EVERY, **changes: Any) -> Any:
    """With a validation loss that is lowest after six steps; the real one has a column of its own."""
    measure = Finetuning.measure

    def scripted(self: Finetuning) -> dict[str, float]:
        real = measure(self)
        return real | {"validation loss": 1 + abs(self.step - 6) / 3, "real": real["validation loss"]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finetuning, "measure", scripted)
        return _run(data, out, loop, **changes)


def _run(data: Path, out: Path, loop: Loop, make: Any = finetune, **changes: Any) -> Any:
    return make(out, config(data, **changes), data / "train.jsonl", data / "validation.jsonl", loop=loop)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(data, folder)
    return folder


def test_the_earliest_of_the_best_lines() -> None:
    lines: list[dict[str, Any]] = [{"step": 0, "validation loss": 2.0, "exact match": 0.0}]
    lines += [{"step": 1}, {"step": 2, "validation loss": 0.50000001, "exact match": 0.5}]
    lines += [{"step": 3, "validation loss": 0.5, "exact match": 0.75}]
    lines += [{"step": 4, "validation loss": 0.9, "exact match": 0.75}]
    assert Choice("loss").best_step(lines) == 2  # as the log rounds, it is no worse
    assert Choice("exact").best_step(lines) == 3
    assert Choice("loss").best_step([]) is None
    assert [Choice("loss", patience).ran_out(lines) for patience in (1, 2, 3, None)] == [
        True,
        True,
        False,
        False,
    ]
    assert [Choice("exact", patience).ran_out(lines) for patience in (1, 2)] == [True, False]


def test_the_folder_holds_the_best_state(data: Path, whole: Path) -> None:
    lines = read_log(whole / "log.csv")
    best = min(lines, key=lambda line: line["validation loss"])
    assert best["step"] == 6
    assert [line["best step"] for line in lines] == [
        min(lines[: n + 1], key=lambda line: line["validation loss"])["step"] for n in range(len(lines))
    ]
    model, processor = minivlm.load(whole)
    samples = read_samples(data / "validation.jsonl", processor, 512)
    loss = model(**make_inputs(processor, samples)).loss.item()
    assert loss == pytest.approx(best["real"], rel=1e-4)
    assert f"best-{best['step']}.safetensors" in files(whole)
    assert len(list(whole.glob("best-*"))) == 1
    state = load_file(whole / "state.safetensors")  # the last one, to go on from
    kept = load_file(whole / f"best-{best['step']}.safetensors")
    assert not all(torch.equal(kept[name], state[name]) for name in kept)


@pytest.mark.parametrize("number", [6, 8, 12])
def test_a_run_that_broke_off_chooses_the_same(
    number: int, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = torch.optim.AdamW.step, 0

    def stopping(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise Stop
        return step(optimizer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stopping)
        with pytest.raises(Stop):
            run(data, tmp_path)
    run(data, tmp_path, replace(EVERY, resume=True))
    assert_same_end(tmp_path, whole)
    assert files(tmp_path) == files(whole)


def test_patience_ends_a_run_and_resuming_does_not_go_on(data: Path, tmp_path: Path) -> None:
    done = run(data, tmp_path, best="exact", patience=2, lr=1e-9)
    assert (done.step, done.total_steps) == (4, 12)
    assert [line["step"] for line in read_log(tmp_path / "log.csv")] == [0, 2, 4]
    told: list[str] = []
    on = replace(EVERY, resume=True, tell=told.append)
    again = run(data, tmp_path, on, best="exact", patience=2, lr=1e-9)
    assert again.step == 4
    assert told[-1].startswith("The run ended at step 4 of 12 after 2 measurements that were no better")
    start, end = (load_file(folder / "model.safetensors") for folder in (data / "start", tmp_path))
    assert all(torch.equal(start[name], end[name]) for name in start)  # step 0 was as good
    assert run(data, tmp_path, on, best="exact", patience=3, lr=1e-9).step == 6


def test_boxes_are_measured_in_the_middle_of_training(data: Path, tmp_path: Path) -> None:
    done = finetune(
        tmp_path, config(data, best="iou", steps=60), data / "train_boxes.jsonl", data / "boxes.jsonl",
        loop=replace(EVERY, measure_every=20),
    )  # fmt: skip
    lines = read_log(tmp_path / "log.csv")
    measured = [line["box IoU"] for line in lines if line["box IoU"] is not None]
    assert measured[0] < 0.5
    assert max(measured) == 1  # of the two lines that have boxes
    assert done.choice.best_step(lines) > 0


def test_an_adapter_is_left_at_its_best_as_well(data: Path, tmp_path: Path) -> None:
    def make(*args: Any, **options: Any) -> Any:
        return finetune_adapter(args[0], args[1], LoraConfig(r=2, lora_alpha=4), *args[2:], **options)

    run(data, tmp_path, make=make)
    kept = load_file(tmp_path / "best-6.safetensors")
    ours = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(float(one.sum()) for one in ours.values()) == sorted(
        float(one.sum()) for one in kept.values()
    )


def test_one_line_to_learn_and_one_to_measure(data: Path, tmp_path: Path) -> None:
    for name in ("train", "validation"):
        line = (data / f"{name}.jsonl").read_text().splitlines()[0]
        (data / f"one_{name}.jsonl").write_text(line + "\n")
    paths = (data / "one_train.jsonl", data / "one_validation.jsonl")
    finetune(tmp_path / "one", config(data, steps=3), *paths, loop=EVERY)
    assert read_log(tmp_path / "one" / "log.csv")[-1]["best step"] in (0, 2, 3)
    paths[0].write_text("")
    with pytest.raises(InputError, match="contains nothing to train on: it is empty"):
        finetune(tmp_path / "none", config(data), *paths, loop=EVERY)


def test_what_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="best is 'bleu': choose from loss, exact, iou"):
        config(data, best="bleu")
    with pytest.raises(InputError, match="patience is 3, for a better state by no metric: choose `best`"):
        config(data, best=None, patience=3)
    with pytest.raises(InputError, match="iou needs boxes, and no validation answer has one"):
        run(data, tmp_path, best="iou")
    with pytest.raises(InputError, match="measure_every is 0"):
        run(data, tmp_path, replace(EVERY, measure_every=0))
    train = data / "train.jsonl"
    with pytest.raises(InputError, match="on validation lines: add a file of them"):
        finetune(tmp_path, config(data), train, loop=EVERY)
    mixed = data / "mixed.jsonl"
    mixed.write_text("".join((data / "validation.jsonl").read_text().splitlines(True)[:1]))
    with mixed.open("a") as file:
        file.write(train.read_text().splitlines(True)[4])
    with pytest.raises(InputError, match=r"pictures of 1 validation lines, line 2 \(4.png\), so the best"):
        finetune(tmp_path, config(data), train, mixed, loop=EVERY)


# More epochs


def test_a_finished_run_goes_on_with_more_epochs(data: Path, tmp_path: Path) -> None:
    told: list[str] = []
    loop = replace(EVERY, resume=True, tell=told.append)
    _run(data, tmp_path, EVERY, best=None, steps=None, epochs=2)
    assert _run(data, tmp_path, loop, best=None, steps=None, epochs=3).step == 6
    assert told[-1] == (
        "The run goes on after step 4 of 6: its learning rate was 0.013 and is now 0.017, and falls in a "
        "straight line to 0 at the end."
    )
    assert [line["step"] for line in read_log(tmp_path / "log.csv")] == [0, 2, 4, 6]
    with pytest.raises(InputError, match=r"other settings \(epochs 3 -> 2\)"):
        _run(data, tmp_path, loop, best=None, steps=None, epochs=2)
    with pytest.raises(InputError, match=r"other settings \(steps None -> 9\)"):
        _run(data, tmp_path, loop, best=None, steps=9)
    assert _run(data, tmp_path, loop, best=None, steps=None, epochs=None).step == 20  # ten epochs


# Memory


def test_memory_is_said_before_training_and_too_much_is_a_warning(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    done = _run(data, tmp_path / "one", replace(EVERY, tell=told.append), best=None, steps=1)
    weights = sum(one.numel() for one in done.model.parameters())
    kept = estimate(done)
    assert kept[:3] == (4 * weights, 4 * weights, 8 * weights)
    assert told[0].startswith("Training takes about ")
    assert "free" not in told[0]
    less = estimate(done, checkpointing=True)
    assert less[:3] == kept[:3]
    assert 0 < less.activations < kept.activations
    done.working.requires_grad_(False)
    assert estimate(done)[1:3] == (0, 0)
    monkeypatch.setattr("minivlm.training.memory.free_memory", lambda device: 1000)
    assert "That is more than the 0.0 GB that are free: use smaller batches" in kept.told(torch.device("cpu"))
