"""How rows, pairs and drawn pictures are divided among processes, and what a plan computes; without any."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_pictures import save_pictures
from small_run import CONFIG
from small_towers import config as towers
from small_towers import make_pairs
from torch import Tensor

from minivlm import cli
from minivlm.data import shards
from minivlm.data.pairs import FilePairs, read_pairs
from minivlm.data.samples import SampleBatches, read_samples
from minivlm.data.sharding import write_shards
from minivlm.distributed import plan
from minivlm.distributed.agreement import part_of
from minivlm.models.load import SHIPPED
from minivlm.processing.inputs import IGNORE
from minivlm.training.contrastive_recipe import build as build_towers
from minivlm.training.recipe import build
from minivlm.training.scratch import Run
from minivlm.training.sizing import size_of
from minivlm.world.captions import DrawnPairs

SIZES = (1, 2, 3, 4)


@pytest.mark.parametrize("size", SIZES)
def test_parts_are_neighbors_and_of_about_one_size(size: int) -> None:
    for count in range(9):
        parts = [part_of(range(5, 5 + count), rank, size) for rank in range(size)]
        assert [row for part in parts for row in part] == list(range(5, 5 + count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def rows_of(batches: SampleBatches, steps: range) -> list[list[int]]:
    """The lines that a process reads in each step; one without an answer does not count."""
    read: list[int] = []
    make = batches._inputs

    def noting(first: int, last: int) -> Any:
        read.extend(batches.sample(row).line for row in range(first, last))
        return make(first, last)

    batches._inputs = noting  # type: ignore[method-assign]
    found = []
    for step in steps:
        read.clear()
        parts = batches[step]
        assert isinstance(parts, list)
        answers = sum(int((part["labels"] != IGNORE).any(dim=1).sum()) for part in parts)
        assert answers == len(read)
        found.append(list(read))
    return found


def test_shards_show_each_line_once_in_an_epoch_whatever_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one order, which the seed fixes; and a run that begins in the middle reads the same."""
    monkeypatch.setattr(shards, "BUFFER", 4)
    names = [f"{number}.png" for number in range(11)]
    save_pictures(tmp_path, *names, size=(40, 40))
    lines = [json.dumps({"image": name, "prefix": "p", "suffix": "s"}) for name in names]
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    write_shards(tmp_path / "my.jsonl", tmp_path / "shards", 4)
    _, processor = build(CONFIG)
    samples: Any = read_samples(tmp_path / "shards", processor, 512)
    orders = []
    for size in SIZES:
        everyone = [
            SampleBatches(
                samples,
                processor,
                seed=0,
                rows=22,
                batch_size=3,
                accumulate=2,
                order=samples.order,
                among=(rank, size),
            )
            for rank in range(size)
        ]
        shown = [rows_of(one, range(4)) for one in everyone]
        assert rows_of(everyone[-1], range(2, 4)) == shown[-1][2:]  # resumed in step 3
        # Batches of 3 rows, two of them in a step: a process reads its part of both.
        orders.append([Counter(line for one in shown for line in one[step]) for step in range(4)])
    assert all(order == orders[0] for order in orders)
    assert sum(orders[0], Counter()) == dict.fromkeys(range(1, 12), 2)


def test_pairs_of_a_file_and_drawn_ones(tmp_path: Path) -> None:
    """What the processes read, put together, is the batch of one."""
    _, processor = build_towers(towers())
    pairs = read_pairs(make_pairs(tmp_path), [processor.tokenizer])
    numbers = {"seed": 0, "steps": 2, "batch_size": 4}
    for data in (FilePairs(pairs, [processor], **numbers), DrawnPairs([processor], **numbers)):
        whole: Any = data[1]
        parts: list[Any] = []
        for rank in range(2):
            data.among = (rank, 2)
            parts += data[1]  # type: ignore[arg-type]  # no picture is damaged
        for name, tensor in whole[0].items():
            assert torch.equal(torch.cat([part[name] for part in parts]), tensor), name


def test_drawn_pictures_take_their_rows_along() -> None:
    run = Run(replace(CONFIG, pictures=5), workers=0)
    batch = list(run.batches())[-1]  # a row for each question
    parts = [batch.part(range(2)), batch.part(range(2, 5))]
    assert torch.equal(torch.cat([part.pixel_values for part in parts]), batch.pixel_values)
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    of_row: list[Tensor] = [part.pixel_values[part.pictures] for part in parts]
    assert torch.equal(torch.cat(of_row), batch.pixel_values[batch.pictures])


# ---- the plan ----------------------------------------------------------------------------------------------

MODEL = plan.Model(weights=1000, learning=800, block=100, blocks=5, width=8, vocabulary=20)


def test_bytes_of_a_step() -> None:
    step = plan.Step(devices=4, rows=10, length=6, bf16=False)
    assert step.rows_each == 3
    whole, part = plan.replicated(MODEL, step), plan.divided(MODEL, step)
    assert (whole.weights, whole.gradients, whole.moments, whole.sent) == (4000, 3200, 6400, 4800)
    assert (part.weights, part.gradients, part.moments, part.gathered) == (1000, 800, 1600, 800)
    assert part.sent == 0.75 * (4000 + 4000 + 3200)
    assert whole.activations == part.activations == 3 * 6 * (5 * 8 * 4 + 2 * 20 * 4)
    assert whole.held == 4000 + 3200 + 6400 + whole.activations
    alone = plan.Step(devices=1, rows=10, length=6, bf16=False)
    assert plan.replicated(MODEL, alone).sent == plan.divided(MODEL, alone).sent == 0
    assert plan.seconds_at_least(whole, plan.operations(MODEL, step), 1e6, 2400) == (0.144, 2.0)


def test_the_command_prints_the_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--gpus", "64", "--fp32", "--freeze", "tower"]) == 0
    said = capsys.readouterr().out
    model = size_of(SHIPPED, ["tower"])
    assert f"{model.weights:,} weights, {model.learning:,} of them learn" in said
    assert model.learning < model.weights == 1_135_552
    assert "This is arithmetic: nothing was run." in said
    cost = plan.divided(model, plan.Step(64, 256, 512, bf16=False))
    assert f"{cost.sent / 1e6:,.1f} MB" in said
    assert cli.main(["plan", "--gpus", "64", "--memory", "0.001"]) == 0
    assert capsys.readouterr().out.split()[-2:] == ["no", "no"]
