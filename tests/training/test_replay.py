"""Rows of the drawn world between a user's own: how many, which, and what is said of forgetting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from small_run import CONFIG

import minivlm
from minivlm.data.samples import SampleBatches, read_samples
from minivlm.errors import InputError
from minivlm.training import replay
from minivlm.training.finetuning import FinetuningConfig, finetune
from minivlm.training.loop import Loop
from minivlm.training.recipe import build
from minivlm.training.replay import WorldRows, forgetting_as_text
from minivlm.world.questions import TASKS

QUIET = Loop(measure_every=0, progress=False, workers=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (64, 64), "brown").save(folder / "1.png")
    lines = [{"image": "1.png", "prefix": "what is it?", "suffix": f"word {number}"} for number in range(4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "train.jsonl"


@pytest.mark.parametrize(("share", "wanted"), [(0.2, 20), (0.5, 80), (1 / 3, 40), (0.0, 0)])
def test_the_share_of_all_rows(share: float, wanted: int) -> None:
    """In whatever batches the own rows come, each row of the world comes once."""
    rows = WorldRows(share, seed=3, pixels=16)
    for batch in (1, 8, 7):
        parts = [rows(first, min(first + batch, 80)) for first in range(0, 80, batch)]
        assert [one.suffix for part in parts for one in part] == [one.suffix for one in rows(0, 80)]
    assert len(rows(0, 80)) == wanted


def test_all_tasks_are_shown_and_seeds_differ() -> None:
    rows = WorldRows(0.5, seed=0, pixels=16)
    shown = rows(0, 90)
    firsts = {one.prefix.split()[0] for one in shown}
    assert firsts == {"caption", "detect", "segment", "what", "how", "is"}
    assert len(TASKS) == 9
    assert shown[0].pictures[0].size == (16, 16)
    assert rows.row(5).pictures[0].tobytes() == rows.row(5).pictures[0].tobytes()
    assert [one.suffix for one in WorldRows(0.5, seed=1, pixels=16)(0, 90)] != [one.suffix for one in shown]


def test_batches_hold_both(data: Path) -> None:
    processor = minivlm.load()[1]
    samples = read_samples(data, processor, 512)
    batches = SampleBatches(
        samples, processor, seed=0, rows=8, batch_size=2, accumulate=2, more=WorldRows(0.5, 0, 64)
    )
    assert [len(part["input_ids"]) for part in batches[0]] == [4, 4]  # type: ignore[union-attr]


def test_forgetting_is_told(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "SCENES", 3)
    config = FinetuningConfig(steps=1, batch_size=2, replay=0.5, lr=0.1)
    run = finetune(tmp_path, config, data, loop=QUIET)
    assert run.world is not None
    before, after = run.world
    assert before["all questions"].value > 0.9 > after["all questions"].value  # at such a rate
    lines = forgetting_as_text(before, after).splitlines()
    assert lines[0] == "| the drawn world | before | after | cases |"
    assert {"| color", "| relation", "| exact caption", "| box mean IoU"} <= {
        line.rsplit(" |", 4)[0] for line in lines
    }


def test_what_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "SCENES", 2)
    for part in build(CONFIG):
        part.save_pretrained(tmp_path / "start")
    config = FinetuningConfig(model=str(tmp_path / "start"), replay=0.2)
    with pytest.raises(InputError, match=r"drawn world, and .*start answers \d+% of them right"):
        finetune(tmp_path / "out", config, data, loop=QUIET)
    with pytest.raises(InputError, match=r"replay is 1\.0: choose a share from 0 to 0\.9"):
        FinetuningConfig(replay=1.0)
    with pytest.raises(InputError, match="replay is nan"):
        FinetuningConfig(replay=float("nan"))
