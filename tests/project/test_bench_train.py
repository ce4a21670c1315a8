"""bench/train.py compares like with like, and its parts run. How fast anything is, is not tested."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from small_run import CONFIG

from minivlm.models.paligemma import PaliGemma
from minivlm.training.objectives import SoftTargets, answer_loss
from minivlm.training.recipe import TrainingConfig, build
from minivlm.training.scratch import Run
from minivlm.world.batches import Batch

BENCH = Path(__file__).parents[2] / "bench"
SMALL = replace(CONFIG, text_layers=2)  # with one, what the picture sees would not reach the answers


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """bench/train.py, imported as it is run: with its folder on the path."""
    sys.path.insert(0, str(BENCH))
    try:
        import train

        yield train
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("train", None)
        sys.modules.pop("attention", None)


@pytest.fixture(scope="module")
def run(bench: ModuleType) -> Run:
    started: Run = bench.run_in(SMALL, "packed")
    return started


@pytest.fixture(scope="module")
def packed(bench: ModuleType, run: Run) -> Batch:
    batch: Batch = bench.batches_of(run, "packed", pictures=3, questions=4)[0]
    return batch


def plain_loss(run: Run, batch: Batch, image_sees_prompt: bool) -> float:
    """The mean cross-entropy of the answers' tokens: our loss without its weights and soft targets."""
    model = run.masters["model"]
    assert isinstance(model, PaliGemma)
    hard = SoftTargets(run.processor.tokenizer, sigma=0.0)
    batch = replace(batch, weights=torch.ones_like(batch.weights))
    with torch.no_grad():
        tokens = model.vision_tower(batch.pixel_values)
        return answer_loss(model, tokens, batch, image_sees_prompt, hard).item()


def real(inputs: dict[str, torch.Tensor], name: str) -> list[list[int]]:
    """What stands in each row, without the padding."""
    return [row[mask == 1].tolist() for row, mask in zip(inputs[name], inputs["attention_mask"], strict=True)]


def test_a_run_stays_in_its_stage(bench: ModuleType) -> None:
    for stage in ("packed", "prefix"):
        started = bench.run_in(SMALL, stage)
        data = bench.batches_of(started, stage)
        for step in range(2):
            assert started.config.stage(started.step) == stage
            assert set(started.advance(data[step])) == {"patch", "answer"}


def test_the_number_of_questions_is_what_was_asked_for(bench: ModuleType, run: Run, packed: Batch) -> None:
    assert packed.input_ids.shape[0] == 3
    assert bench.answers(packed) == 12
    prefix = bench.batches_of(run, "prefix", pictures=3, questions=2)[0]
    assert prefix.input_ids.shape[0] == bench.answers(prefix) == 6


def test_unpacked_rows_ask_the_same_questions(bench: ModuleType, run: Run, packed: Batch) -> None:
    singles = bench.unpacked(packed)
    assert singles.pictures.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(singles.input_ids) == bench.answers(singles) == bench.answers(packed)
    assert singles.labels[singles.labels != -100].tolist() == packed.labels[packed.labels != -100].tolist()
    # Under the mask of packed rows, where the picture does not see the question, nothing changes.
    assert plain_loss(run, singles, False) == pytest.approx(plain_loss(run, packed, False), rel=1e-5)
    assert plain_loss(run, singles, True) != pytest.approx(plain_loss(run, packed, False), rel=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_gets_the_same_rows_weights_and_mask(
    bench: ModuleType, run: Run, packed: Batch, attention: str, tmp_path: Path
) -> None:
    singles = bench.unpacked(packed)
    patches = run.model.config.vision.num_patches
    inputs = bench.reference_rows(singles, run.processor.tokenizer.image_id, patches)
    run.model.save_pretrained(tmp_path)
    reference = bench.Reference(tmp_path, attention, "float32")
    wanted = plain_loss(run, singles, True)
    assert reference.advance(inputs) == pytest.approx(wanted, rel=1e-5)
    assert run.model(**inputs).loss.item() == pytest.approx(wanted, rel=1e-5)


def test_pieces_hold_every_row_and_less_padding(bench: ModuleType, run: Run, packed: Batch) -> None:
    singles = bench.unpacked(packed)
    image_id, patches = run.processor.tokenizer.image_id, run.model.config.vision.num_patches
    whole = bench.reference_rows(singles, image_id, patches)
    pieces = [bench.reference_rows(singles, image_id, patches, slice(i, i + 5)) for i in (0, 5, 10)]
    assert [len(piece["input_ids"]) for piece in pieces] == [5, 5, 2]
    for name in ("input_ids", "labels"):
        together = [row for piece in pieces for row in real(piece, name)]
        assert together == real(whole, name)
    assert all(piece["attention_mask"].sum(dim=0).min() > 0 for piece in pieces)


def test_who_comes_first_changes(bench: ModuleType) -> None:
    order: list[str] = []

    def worker(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    times = bench.in_turns([lambda: worker("a", 1.0), lambda: worker("b", 2.0)], rounds=3)
    assert times == [[1.0] * 3, [2.0] * 3]
    assert order == ["a", "b", "b", "a", "a", "b"]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", ["packed", "prefix"])
def test_a_comparison_and_its_line(bench: ModuleType, stage: str, bf16: bool) -> None:
    found = bench.compare(SMALL, stage, bf16, steps=1, rounds=2, clock=time.perf_counter)
    assert found.answers == SMALL.pictures * 2
    for times in (found.ours, found.whole, found.pieces):
        assert len(times) == 2
        assert min(times) > 0
    heading, _ = bench.COMPARED.splitlines()
    assert found.row().count("|") == heading.count("|")


def test_growth_as_table_and_figure(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "PICTURES", (1, 2))
    monkeypatch.setattr(bench, "QUESTIONS", (1, 2))
    monkeypatch.setattr(bench, "WIDTHS", ((24, 32), (24, 48)))
    points = bench.grow(SMALL, rounds=1, clock=time.perf_counter)
    assert [(point.stage, point.axis, round(point.value, 2), point.answers) for point in points[:4]] == [
        ("packed", "pictures", 1, 2),
        ("packed", "pictures", 2, 4),
        ("packed", "questions a picture", 1, 2),
        ("packed", "questions a picture", 2, 4),
    ]
    assert len(points) == 12
    lines = list(bench.table_of(points))
    assert len({line.count("|") for line in lines}) == 1
    bench.draw_points(points, tmp_path / "train.png")
    assert (tmp_path / "train.png").stat().st_size > 5000


def test_drawing_and_learning_take_turns(bench: ModuleType) -> None:
    bench.start_drawing(bench.batches_of(bench.run_in(SMALL, "packed"), "packed"))
    drawn, learned = bench.drawing(SMALL, bench.draw, steps=1, rounds=2, clock=time.perf_counter)
    assert len(drawn) == len(learned) == 2
    assert min(drawn) > 0


def test_widths_are_those_the_text_names() -> None:
    config = TrainingConfig()
    for wanted, (tower, decoder) in zip((1.1, 2.6, 5.0), ((96, 128), (144, 208), (204, 296)), strict=True):
        model, _ = build(replace(config, tower_width=tower, text_width=decoder))
        assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(wanted, rel=0.05)
