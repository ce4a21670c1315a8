"""bench/look_alikes.py goes on from the weights of a model, in three ways, and keeps its results."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from small_run import CONFIG

from minivlm.errors import InputError
from minivlm.models.load import MINIATURES, load
from minivlm.training.folder import run_folder
from minivlm.training.loop import Loop
from minivlm.training.recipe import TrainingConfig, build

BENCH = Path(__file__).parents[2] / "bench"
SMALL = replace(CONFIG, alike_steps=2, last_steps=1)


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        import look_alikes

        yield look_alikes
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("look_alikes", None)
        sys.modules.pop("kept", None)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    model, processor = build(replace(SMALL, seed=5))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_pairs_of_one_color_and_the_same_every_time(bench: ModuleType) -> None:
    first, again = bench.pairs_of_one_color(20, 32), bench.pairs_of_one_color(20, 32)
    assert [one.example for one in first] == [one.example for one in again]
    for question in first:
        one, other = question.example.things
        assert one.color == other.color
        assert one.shape != other.shape
    assert {question.example.suffix for question in first} == {"yes", "no"}


def test_a_way_goes_on_from_the_weights_and_is_not_made_twice(
    bench: ModuleType, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SHORT", SMALL)
    measured = []
    monkeypatch.setattr(
        bench, "measure", lambda model, processor, scenes: measured.append(model) or {"a": 0.5}
    )
    out = tmp_path / "pointing-3"
    assert bench.one_way(start, out, "pointing", 3) == {"a": 0.5}
    before, after = load(start)[0].state_dict(), measured[0].state_dict()
    towers = {name for name in before if "vision_tower" in name}
    assert all(torch.equal(before[name], after[name]) for name in towers)
    assert not all(torch.equal(before[name], after[name]) for name in before.keys() - towers)
    lines = (out / "log.csv").read_text().splitlines()
    assert "point" in lines[0].split(",")
    assert bench.one_way(start, out, "pointing", 3) == {"a": 0.5}
    assert len(measured) == 1
    assert json.loads((out / "result.json").read_text())["measured"] == {"a": 0.5}
    for other in (MINIATURES / "clipcap", start):  # other weights, another seed
        with pytest.raises(SystemExit, match="a run with other numbers"):
            bench.one_way(other, out, "pointing", 4)


def test_two_runs_do_not_share_a_folder(bench: ModuleType, start: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    bench.begin(start, out, SMALL)
    with run_folder(out, resume=True), pytest.raises(InputError, match="another run works in"):
        bench.go_on(start, out, SMALL, Loop(resume=True))


def test_what_ships_is_made_by_the_whole_recipe(
    bench: ModuleType, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TrainingConfig() == bench.WHOLE
    monkeypatch.setattr(bench, "WHOLE", SMALL)
    monkeypatch.setattr(
        sys, "argv", ["look_alikes.py", "--start", str(start), "--finish", str(tmp_path / "x")]
    )
    bench.main()
    assert load(tmp_path / "x")[0].config == load(start)[0].config


def test_another_model_is_refused(bench: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds another model than"):
        bench.begin(MINIATURES / "clipcap", tmp_path, SMALL)


def test_the_table(bench: ModuleType) -> None:
    table = bench.as_text({"before": [{"a": 0.25}], "pointing": [{"a": 0.5}, {"a": 0.75}]})
    assert table.splitlines()[2:] == ["| before | 0.25 | - |", "| pointing | 0.62 (0.50-0.75) | 2 |"]


def test_ways_add_to_each_other(bench: ModuleType) -> None:
    ways = [set(changes) for changes in bench.WAYS.values()]
    assert ways[0] > ways[1] > ways[2] == set()
