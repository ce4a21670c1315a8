"""bench/moving.py trains both comparisons and makes their tables. Its numbers are not tested."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from minivlm.models.load import MINIATURES, SHIPPED, load_answering
from minivlm.models.qwen2_vl import Qwen2VL
from minivlm.processing import video_of
from minivlm.world.clip_batches import training_clip
from minivlm.world.questions import ask
from minivlm.world.scenes import make_scene

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        import moving

        yield moving
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("moving", None)


def assert_same_weights(folder: Path, other: Path) -> None:
    one, two = (load_file(path / "model.safetensors") for path in (folder, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_two_clocks(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = bench.MovingConfig("qwen2_5_vl", tower_steps=1, steps=1, rows=2, questions=1, warmup_steps=1)
    bench.finish(bench.ClockRun(config), tmp_path / "whole")
    found = bench.compare_time(0, tmp_path, config, clips=3)
    assert found.keys() == {*bench.CLOCKS, bench.MOST_FREQUENT}
    columns = {f"{task} {how}" for task in bench.CLOCK_TASKS for how in bench.FILMED}
    assert all(set(of_trial) <= columns for of_trial in found.values())
    assert (
        {f"length {how}" for how in bench.FILMED}
        <= found["seconds"].keys()
        == found["numbers of steps"].keys()
    )
    monkeypatch.setattr(bench.ClockRun, "advance", lambda *_: pytest.fail("trained again"))
    assert bench.compare_time(0, tmp_path, config, clips=3) == found
    assert_same_weights(tmp_path / "seconds-0", tmp_path / "whole")
    assert bench.as_text([found, found]).endswith("2 seeds")


def test_the_clocks_are_asked_about_time_alone(bench: ModuleType) -> None:
    run = bench.ClockRun(bench.MovingConfig("qwen2_5_vl", tower_steps=4, steps=8, rows=2, warmup_steps=1))
    batches = list(run.batches())
    assert any("pixel_values" in batch.pixels for batch in batches[:4])
    clips = [batch for batch in batches[4:] if "pixel_values_videos" in batch.pixels]
    assert len(clips) == 4
    ids = torch.cat([batch.input_ids.flatten() for batch in clips])
    words = run.processor.tokenizer.backend.decode(ids.tolist())
    assert "how many seconds does the clip last" in words
    assert "how many objects" not in words


def test_a_longer_clip_is_read_whole(bench: ModuleType) -> None:
    """At a rate that training never had, no frame is left out."""
    _, processor = bench.build("qwen2_5_vl", 0)
    frames, rate = bench.FILMED["at 3 a second"]
    clip = training_clip(np.random.default_rng(0), frames[-1], 64, 64, (rate,))
    film = video_of([*clip.frames(64)], clip.fps)
    assert len(processor.video_budget.choose(film)) == 8
    bench.see_all(processor)
    assert processor.video_budget.choose(film) == [*range(12)]


def test_clocks_differ_where_rates_do(bench: ModuleType) -> None:
    grids, seconds = torch.tensor([[3, 4, 4], [3, 4, 4]]), torch.tensor([0.5, 2.0])
    model = bench.build("qwen2_5_vl", 0)[0]
    by_time = model.intervals(grids, seconds)
    model.__class__ = bench.Numbered
    assert by_time.tolist() == [1.0, 4.0]
    assert model.intervals(grids, seconds).tolist() == [1.0, 1.0]


def test_the_table_is_that_of_the_stored_numbers(bench: ModuleType) -> None:
    stored = json.loads((SHIPPED.parent / "moving_time.json").read_text(encoding="utf-8"))
    assert len(stored) == 3
    assert {clock: set(found) for clock, found in stored[0].items()} == {
        clock: {f"{task} {how}" for task in bench.CLOCK_TASKS for how in bench.FILMED}
        for clock in (*bench.CLOCKS, bench.MOST_FREQUENT)
    }
    table = (BENCH / "results" / "moving_time.txt").read_text(encoding="utf-8")
    assert bench.as_text(stored) + "\n" == table


def test_the_shipped_miniature_counts_seconds(bench: ModuleType) -> None:
    """Also at a rate that training never had. Without a picture, about half of the lengths would be right."""
    model, processor = load_answering(MINIATURES / "qwen2_5_vl")
    assert isinstance(model, Qwen2VL)
    bench.see_all(processor)
    frames, rate = bench.FILMED["at 3 a second"]
    found = bench.evaluate_clips(
        model, processor, 12, tasks=bench.CLOCK_TASKS, frames=frames, rates=(rate,), progress=False
    )
    assert found["length"].value == 1.0
    assert found["direction"].value > 0.7
    model.__class__ = bench.Numbered
    wrong = bench.evaluate_clips(
        model, processor, 12, tasks=("length",), frames=frames, rates=(rate,), progress=False
    )
    assert wrong["length"].value < 0.8


def test_the_table_of_towers_is_that_of_the_stored_numbers(bench: ModuleType) -> None:
    stored = json.loads((SHIPPED.parent / "moving_towers.json").read_text(encoding="utf-8"))
    assert len(stored) == 3
    assert all(found.keys() == bench.TOWERS.keys() for found in stored)
    table = (BENCH / "results" / "moving_towers.txt").read_text(encoding="utf-8")
    assert bench.as_text(stored) + "\n" == table


def test_the_shipped_miniature_reads_a_wide_picture_as_it_is() -> None:
    """Of a shape that training never had; squashed, its things are other things."""
    model, processor = load_answering(MINIATURES / "qwen2_vl")
    rng = np.random.default_rng(0)
    scenes = [make_scene(rng, "test", width=128, height=32) for _ in range(16)]
    asked = [(scene, example) for scene in scenes if (example := ask(scene, "shape", rng)) is not None]
    wide = [scene.draw(128) for scene, _ in asked]

    def right(pictures: list[Image.Image]) -> float:
        inputs = processor(pictures, [example.prefix for _, example in asked])
        said = processor.decode(model.generate(**inputs, max_new_tokens=4))
        return sum(one == example.suffix for one, (_, example) in zip(said, asked, strict=True)) / len(asked)

    assert right(wide) > 0.9
    assert right([picture.resize((64, 64)) for picture in wide]) < 0.8


def test_towers(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "OTHER_SIDES", ((32, 64),))
    found = bench.compare_towers(0, steps=1, scenes=1)
    assert found.keys() == set(bench.TOWERS)
    windows, full = found["windows, the last block full"], found["every block full"]
    assert windows["operations, large"] < 0.7 * full["operations, large"]
    assert all(0.0 <= value <= 1.0 for name, value in full.items() if "sides" in name)
    assert "million" in bench.as_text([found])


def test_what_ships_reads_clips(bench: ModuleType, tmp_path: Path) -> None:
    bench.ship(tmp_path, tmp_path / "out", tower_steps=1, steps=1, rows=2, questions=1, warmup_steps=1)
    for system in bench.SYSTEMS:
        _, trained = load_answering(tmp_path / system)
        model, processor = load_answering(tmp_path / "out" / system)
        assert isinstance(model, Qwen2VL)
        assert processor.video_budget == trained.video_budget  # the published one sees 4 times the pixels
        stored = load_file(tmp_path / "out" / system / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        assert sum(path.stat().st_size for path in (tmp_path / "out" / system).iterdir()) <= 1_500_000


def test_each_tower_is_what_its_name_says(bench: ModuleType) -> None:
    """Stretched to an 8 x 8 grid, the table is itself; squashed pictures have 16 tokens."""
    model, processor = bench._squashed(0)
    pixels, grids = processor.image_processor.read(
        [bench.make_scene(bench.np.random.default_rng(0), width=96.0, height=48.0).draw(96)]
    )
    assert grids.tolist() == [[1, 8, 8]]
    tower = bench._table(0)[0].vision_tower
    plain = tower(pixels, grids)
    tower.table.data += 1.0
    assert not torch.allclose(plain, tower(pixels, grids))
    assert model.encode_image(pixels, grids).shape == (16, 96)
