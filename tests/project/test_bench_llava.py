"""bench/llava_stages.py and bench/llava_layers.py train, and make their tables."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(params=["llava_stages", "llava_layers"])
def bench(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module(request.param)
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop(request.param, None)


@pytest.mark.parametrize("bench", ["llava_stages"], indirect=True)
def test_stages(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TEXT_ROWS", "ROWS", "MEASURED"):
        monkeypatch.setattr(bench, name, 2)
    found = bench.run(0, text=1, align=1, tune=1)
    assert found["align"][0] == found["direct"][0], "both ways start from the same model"
    assert found["align"][0]["text"] == found["align"][-1]["text"], "the language model is frozen"
    assert found["align"][0]["captions"] != found["align"][-1]["captions"]
    assert found["tune"][0]["text"] != found["tune"][-1]["text"]
    assert found["direct"][-1]["step"] == found["align"][-1]["step"] + found["tune"][-1]["step"]
    assert bench.as_text([found]).count("\n| ") == len(found)


@pytest.mark.parametrize("bench", ["llava_stages"], indirect=True)
def test_runs_are_copied(bench: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "llava-0"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"exact caption": 0.5}))
    (folder / "log.csv").write_text("step,stage,text,answer,text loss,rate\n50,align,,1.5,,0.1\n")
    (tmp_path / "clipcap-0").mkdir()
    assert bench.collect(tmp_path) == {
        "llava-0": {
            "result": {"exact caption": 0.5},
            "log": [{"step": 50, "stage": "align", "answer": 1.5}],
        }
    }


@pytest.mark.parametrize("bench", ["llava_layers"], indirect=True)
def test_layers(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PICTURES", 4)
    tower = bench.train(0, 1)
    shares = bench.probe(tower, 0, pictures=12)
    assert len(shares) == bench.LAYERS + 1
    assert all(0.0 <= share <= 1.0 for share in shares)
    with torch.no_grad():
        for weight in tower.layers[-1].parameters():
            weight.fill_(float("nan"))  # the last layer says nothing, all others still do
    assert bench.probe(tower, 0, pictures=12)[:-1] == shares[:-1]
    assert bench.as_text([{"untrained": shares, "trained": shares}]).count("\n| -") == bench.LAYERS + 1
