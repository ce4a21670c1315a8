"""bench/systems.py trains, goes on, measures and makes its table. What the numbers are, is not tested."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minivlm.generate import generate
from minivlm.models.load import SHIPPED, load
from minivlm.training.systems import SystemConfig
from minivlm.training.ways import WAYS
from minivlm.world.scenes import make_scene

BENCH = Path(__file__).parents[2] / "bench"
SMALL = SystemConfig("clipcap", text_steps=1, steps=1, text_rows=2, rows=2, warmup_steps=1)


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        import systems

        yield systems
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("systems", None)
        sys.modules.pop("kept", None)


@pytest.fixture(scope="module")
def runs(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, in which that of clipcap is done."""
    folder = tmp_path_factory.mktemp("runs")
    bench.run(SMALL, folder / "clipcap-0", scenes=2)
    return folder


@pytest.fixture
def result(runs: Path) -> dict[str, Any]:
    """What that run has measured."""
    found: dict[str, Any] = json.loads((runs / "clipcap-0" / "result.json").read_text(encoding="utf-8"))
    return found


def test_a_run_is_done_once(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.run(SMALL, tmp_path / "run", scenes=2)
    assert first["text loss before"] == first["text loss after"] > 1  # the language model is frozen
    assert 0 <= first["all questions"] <= 1
    monkeypatch.setattr(bench, "train_system", lambda *_, **__: pytest.fail("trained again"))
    assert bench.run(SMALL, tmp_path / "run", scenes=2) == first
    with pytest.raises(SystemExit, match="holds a run with other numbers"):
        bench.run(SMALL, tmp_path / "run", scenes=3)


def test_what_the_table_has_is_not_done_again(
    bench: ModuleType,
    result: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where the runs are gone; a result with other numbers is made again."""
    trained: list[tuple[int, str]] = []

    def run(config: SystemConfig, folder: Path) -> dict[str, object]:
        trained.append((config.seed, config.system))
        return {**result, "config": bench.numbers_of(config.system, config.seed)}

    def table(*options: str) -> list[tuple[int, str]]:
        trained.clear()
        runs = ["--runs", str(tmp_path / "none"), "--out", str(tmp_path / "table")]
        monkeypatch.setattr(sys, "argv", ["systems.py", *runs, "--systems", *options])
        bench.main()
        return list(trained)

    monkeypatch.setattr(bench, "run", run)
    assert table("llava", "clipcap", "--seeds", "0") == [(0, "llava"), (0, "clipcap")]
    assert table("clipcap", "flamingo", "--seeds", "0", "1") == [
        (0, "flamingo"),
        (1, "clipcap"),
        (1, "flamingo"),
    ]
    path = tmp_path / "table.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    names = [(one["config"]["seed"], one["config"]["system"]) for one in written]
    assert names == [(0, "clipcap"), (0, "flamingo"), (0, "llava"), (1, "clipcap"), (1, "flamingo")]
    assert (tmp_path / "table.txt").read_text(encoding="utf-8") == bench.as_text(written) + "\n"
    written[0]["config"]["steps"] += 1
    path.write_text(json.dumps(written), encoding="utf-8")
    assert table("clipcap", "--seeds", "0") == [(0, "clipcap")]
    with pytest.raises(SystemExit):
        table("small-tiles")
    assert "not of the world 'usual'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        table("small-tiles", "--world", "small")  # into the table of the other world
    assert "clipcap, flamingo, llava: not of the world 'small'" in capsys.readouterr().err


def test_costs_are_of_the_way(bench: ModuleType) -> None:
    small, large = bench.costs(SMALL), bench.costs(SystemConfig("clipcap-mlp", warmup_steps=1))
    assert small["trainable"] < large["trainable"]  # the language model learns, too
    assert 0 < small["answer"] < small["step"] < large["step"]


def test_an_answer_is_as_long_as_all_others(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model may end its answer at once, which would cost nothing."""
    written = []
    monkeypatch.setattr(bench, "generate", lambda *given, **more: written.append(generate(*given, **more)))
    config = replace(SMALL, system="simvlm")
    bench.costs(config)
    assert written[0].shape == (1, bench.ANSWER)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_has_costs(bench: ModuleType, way: str) -> None:
    costs = bench.costs(replace(SMALL, system=way))
    assert all(value > 0 for value in costs.values())


def test_the_table(bench: ModuleType, result: dict[str, Any]) -> None:
    other = json.loads(json.dumps(result))
    other["config"] |= {"seed": 1}
    other["color"] = result["color"] + 0.5
    lines = bench.as_text([result, other]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| clipcap", "| majority"]
    middle, low = result["color"] + 0.25, result["color"]
    assert f"{middle:.2f} ({low:.2f}-{low + 0.5:.2f})" in lines[2]
    assert lines[2].endswith("| 2 |")
    assert set(WAYS) >= {"clipcap"}


def test_magic_joins_the_table(
    bench: ModuleType, runs: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = replace(bench.PAIR, steps=1, batch_size=2, warmup_steps=1)
    found = bench.magic(0, runs, scenes=2, pair=pair)
    assert 0 <= found["exact caption"] <= 1
    assert found["answer"] > result["answer"]  # each word is read with 45 others
    monkeypatch.setattr(bench, "train_contrastive", lambda *_, **__: pytest.fail("trained again"))
    assert bench.magic(0, runs, scenes=2, pair=pair) == found
    lines = bench.as_text([result, found]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith("| magic | - | - ")


def test_what_is_shipped_answers_in_half_the_bytes(
    bench: ModuleType, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SHIPPED_SYSTEMS", ("clipcap",))
    bench.ship(runs, tmp_path / "out")
    assert not (tmp_path / "out" / "clipcap" / "state.safetensors").exists()
    ours, processor = load(tmp_path / "out" / "clipcap")
    trained, _ = load(runs / "clipcap-0")
    picture = make_scene(np.random.default_rng(0), "train").draw(64)
    inputs = processor([picture], ["caption en"])
    assert torch.equal(ours.generate(**inputs), trained.generate(**inputs))
    stored = load_file(tmp_path / "out" / "clipcap" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


TABLES = {"systems": "usual", "systems_small": "small"}


@pytest.mark.parametrize("name", TABLES)
def test_the_table_that_ships_is_the_one_that_was_made(bench: ModuleType, name: str) -> None:
    """The notebooks read the package's; the text beside the other is what people read."""
    made, shipped = (folder / f"{name}.json" for folder in (BENCH / "results", SHIPPED.parent))
    assert made.read_bytes() == shipped.read_bytes()
    results = json.loads(shipped.read_text(encoding="utf-8"))
    assert made.with_suffix(".txt").read_text(encoding="utf-8") == bench.as_text(results) + "\n"
    stored = Counter(one["config"]["system"] for one in results)
    assert stored == dict.fromkeys(bench.WORLDS[TABLES[name]], 3)


def test_every_way_is_in_one_table(bench: ModuleType) -> None:
    both = [name for names in bench.WORLDS.values() for name in names]
    assert sorted(both) == sorted([*WAYS, bench.MAGIC])


def test_small_things_are_measured_among_their_own(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = []
    evaluate = bench.evaluate
    monkeypatch.setattr(
        bench, "evaluate", lambda *given, **more: columns.append(more["columns"]) or evaluate(*given, **more)
    )
    bench.run(replace(SMALL, system="small-one-view"), tmp_path, scenes=2)
    assert columns == [("small_things",)]


@pytest.mark.parametrize("name", TABLES)
def test_the_page_of_results_has_this_table(bench: ModuleType, name: str) -> None:
    table = (BENCH / "results" / f"{name}.txt").read_text(encoding="utf-8")
    assert table in (BENCH.parent / "docs" / "results.md").read_text(encoding="utf-8")
