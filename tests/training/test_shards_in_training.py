"""A model learns from shards as from a file, and a run that is killed goes on in the middle of an epoch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_pictures import save_pictures
from safetensors.torch import load_file
from small_run import CONFIG, Stop

import minivlm
from minivlm.data import shards
from minivlm.data.samples import read_samples
from minivlm.data.sharding import write_shards
from minivlm.errors import InputError
from minivlm.training.finetuning import Finetuning, FinetuningConfig, finetune
from minivlm.training.log import read_log
from minivlm.training.loop import Loop
from minivlm.training.recipe import build

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY = Loop(save_every=3, log_every=1, measure_every=4, progress=False)


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BUFFER", 4)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model far too small to know anything."""
    folder = tmp_path_factory.mktemp("start")
    for part in build(CONFIG):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven lines in three tars, and three for validation."""
    folder = tmp_path_factory.mktemp("data")
    for part, count in (("train", 11), ("validation", 3)):
        names = [f"{part}-{number}.png" for number in range(count)]
        save_pictures(folder, *names, size=(40, 40))
        lines = [{"image": name, "prefix": "p", "suffix": f"{n}"} for n, name in enumerate(names)]
        path = folder / f"{part}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_shards(path, folder / part, 4)
    return folder


@pytest.fixture
def config(start: Path) -> FinetuningConfig:
    return FinetuningConfig(model=str(start), epochs=2, batch_size=2, bf16=False)  # 11 steps


def prepared(config: FinetuningConfig, data: Path, **options: Any) -> Finetuning:
    model, processor = minivlm.load(config.model)
    return Finetuning(config, model, processor, read_samples(data, processor, 512), **options)


@pytest.mark.parametrize("step", [0, 4, 7])  # 7 is in the second epoch
def test_the_next_batches_are_those_of_a_run_that_went_on(
    step: int, config: FinetuningConfig, data: Path
) -> None:
    whole = list(prepared(config, data / "train", workers=0).batches())
    run = prepared(config, data / "train", workers=2)
    run.step = step
    rest = list(run.batches())
    assert len(rest) == 11 - step
    for ours, wanted in zip(rest, whole[step:], strict=True):
        assert [one.keys() for one in ours] == [one.keys() for one in wanted]
        for one, other in zip(ours, wanted, strict=True):
            assert all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.parametrize("killed", [5, 8])
def test_a_run_that_is_killed_ends_with_the_same_weights(
    killed: int, config: FinetuningConfig, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = data / "train", data / "validation"
    finetune(tmp_path / "whole", config, *folders, loop=EVERY)
    advance = Finetuning.advance

    def stop(run: Finetuning, batch: Any) -> dict[str, float]:
        if run.step == killed:
            raise Stop
        return advance(run, batch)

    monkeypatch.setattr(Finetuning, "advance", stop)
    with pytest.raises(Stop):
        finetune(tmp_path / "killed", config, *folders, loop=EVERY)
    monkeypatch.setattr(Finetuning, "advance", advance)
    finetune(tmp_path / "killed", config, *folders, loop=replace(EVERY, resume=True))
    for name in ("model.safetensors", "state.safetensors"):
        ours, wanted = (load_file(tmp_path / folder / name) for folder in ("killed", "whole"))
        assert [key for key in wanted if not torch.equal(ours[key], wanted[key])] == []
    assert read_log(tmp_path / "killed" / "log.csv") == read_log(tmp_path / "whole" / "log.csv")


def test_other_tars_are_another_run(config: FinetuningConfig, data: Path, tmp_path: Path) -> None:
    finetune(tmp_path, config, data / "train", loop=EVERY)
    more = replace(config, epochs=3)
    for other in (data / "train.jsonl", data / "train" / "train-{000000..000001}.tar"):
        with pytest.raises(InputError, match="holds a run with other settings"):
            finetune(tmp_path, more, other, loop=replace(EVERY, resume=True))
    finetune(tmp_path, more, data / "train", loop=replace(EVERY, resume=True))


def test_validation_is_that_of_the_file(config: FinetuningConfig, data: Path) -> None:
    """In whatever order: sums are over the same lines."""
    scores = []
    for name in ("validation", "validation.jsonl"):
        run = prepared(config, data / "train")
        run.validation = read_samples(data / name, run.processor, 512)
        scores.append(run.measure())
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_a_tar_that_breaks_while_it_is_read(config: FinetuningConfig, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "train"
    broken.mkdir()
    for tar in (data / "train").iterdir():
        (broken / tar.name).write_bytes(tar.read_bytes())
    run = prepared(config, broken, workers=0)
    (broken / "train-000001.tar").write_bytes(b"x" * 700)
    with pytest.raises(InputError, match=r"train-000001\.tar is truncated, damaged or no tar"):
        list(run.batches())
