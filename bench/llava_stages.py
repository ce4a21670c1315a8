"""What does LLaVA's first stage do, what does it buy, and does an MLP align better than one linear layer?

Run: python bench/llava_stages.py --out bench/results/llava_stages.txt --json minivlm/assets/llava_stages.json
     python bench/llava_stages.py --runs runs/systems --json minivlm/assets/llava_runs.json

Each seed trains a small Llama on the world's sentences, without a picture. From there, all else begins:

    aligned        the projector alone, from captions; then projector and language model, from questions
    direct         projector and language model from the first step, for as many steps in all
    linear         the first stage with one linear layer for the projector

Measured on rows that no training saw: the loss of captions as the first stage has them, of answers as the
second has them, and of sentences without a picture, which is what the language model knew before. A few
minutes of one core. Budgets are far below those of `minivlm train --system llava`.

The second command copies the losses and results of such longer runs (see systems.py) into one file.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.models.llava import Llava, LlavaConfig
from minivlm.processing.inputs import Inputs
from minivlm.training.log import read_log
from minivlm.training.muon import Muon
from minivlm.training.schedule import warm_up_then_fall
from minivlm.training.systems import MEASURE_STREAM, PICTURE_STREAM, TEXT_STREAM, SystemRows
from minivlm.training.ways import answer_loss, build, next_word_loss

SEEDS = (0, 1, 2)
TEXT, ALIGN, TUNE = 200, 60, 90  # steps
TEXT_ROWS, ROWS, MEASURED = 48, 16, 60
EVERY = 15  # steps
PROJECTOR = ("multi_modal_projector.",)
BOTH = ("multi_modal_projector.", "language_model.")

Points = list[dict[str, float]]


class LinearProjector(nn.Module):
    """One linear layer in the place of two."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.vision.hidden_size, config.text.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D_image] -> [..., D]."""
        return self.linear_1(x)


def loss_of(stage: str, model: Llava, batch: Inputs) -> Tensor:
    """Of a batch as the stage has it."""
    generator = torch.Generator().manual_seed(0)
    if stage == "text":
        return next_word_loss(model.language_model, batch, generator)
    return answer_loss(model, batch, generator)


def learn(
    model: Llava, names: tuple[str, ...], batches: SystemRows, held_out: dict[str, Inputs], every: int = EVERY
) -> Points:
    """Train the weights whose names begin so, by the recipe of `minivlm train --system`, and measure."""
    model.requires_grad_(False)
    weights = [weight for name, weight in model.named_parameters() if name.startswith(names)]
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    optimizers: dict[float, torch.optim.Optimizer] = {
        0.02: Muon([w for w in weights if id(w) in linear], lr=0.02, weight_decay=0.02),
        3e-3: torch.optim.AdamW(
            [w for w in weights if id(w) not in linear], lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0
        ),
    }
    points: Points = []
    for step, batch in enumerate(batches[n] for n in range(len(batches))):
        if step % every == 0:
            points.append({"step": step, **measure(model, held_out)})
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        loss_of(batches.stage, model, batch).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for peak, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = peak * warm_up_then_fall(
                step, len(batches), max(len(batches) // 4, 1)
            )
            optimizer.step()
    return [*points, {"step": len(batches), **measure(model, held_out)}]


@torch.no_grad()
def measure(model: Llava, held_out: dict[str, Inputs]) -> dict[str, float]:
    """The loss of each kind of rows."""
    names = {"align": "captions", "pictures": "answers", "text": "text"}
    return {names[stage]: round(loss_of(stage, model, batch).item(), 4) for stage, batch in held_out.items()}


def run(seed: int, text: int = TEXT, align: int = ALIGN, tune: int = TUNE) -> dict[str, Points]:
    """All trainings of a seed: the losses along each."""
    model, processor = build("llava", seed)
    assert isinstance(model, Llava)

    def rows(stage: str, steps: int, first: int = 0, stream: int = PICTURE_STREAM, rows: int = ROWS) -> Any:
        return SystemRows(
            processor, stage=stage, seed=seed, stream=stream, first=first, steps=steps, rows=rows
        )

    held_out = {
        stage: rows(stage, 1, stream=MEASURE_STREAM, rows=MEASURED)[0]
        for stage in ("align", "pictures", "text")
    }
    found = {
        "text": learn(
            model,
            ("language_model.",),
            rows("text", text, stream=TEXT_STREAM, rows=TEXT_ROWS),
            held_out,
            text,
        )
    }
    aligned, direct, linear = (copy.deepcopy(model) for _ in range(3))
    torch.manual_seed(seed)
    linear.multi_modal_projector = LinearProjector(model.config)  # type: ignore[assignment]
    found["align"] = learn(aligned, PROJECTOR, rows("align", align), held_out)
    found["tune"] = learn(aligned, BOTH, rows("pictures", tune, first=align), held_out)
    found["direct"] = learn(direct, BOTH, rows("pictures", align + tune), held_out)
    found["linear"] = learn(linear, PROJECTOR, rows("align", align), held_out)
    return found


def as_text(results: Sequence[dict[str, Points]]) -> str:
    """A line for each training: the losses at its end, means over the seeds, the least and the most."""
    about = {
        "text": "the language model alone",
        "align": "then the projector alone (aligned)",
        "tune": "then both (aligned)",
        "direct": "both from the first step (direct)",
        "linear": "a linear projector alone",
    }
    lines = ["| after | steps | captions | answers | text without a picture |", "|---|---|---|---|---|"]
    for name, words in about.items():
        ends = [result[name][-1] for result in results]
        cells = []
        for kind in ("captions", "answers", "text"):
            values = [end[kind] for end in ends]
            cells.append(f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append(f"| {words} | {ends[0]['step']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{len(results)} seeds; mean loss of a token (least to most)"])


def collect(runs: Path) -> dict[str, Any]:
    """The losses along finished runs of systems.py, and what they measured at the end."""
    found = {}
    for result in sorted(runs.glob("llava*-*/result.json")):
        log = read_log(result.parent / "log.csv")
        kept = ("step", "stage", "text", "answer", "text loss")
        lines = [{name: line[name] for name in kept if line.get(name) is not None} for line in log]
        found[result.parent.name] = {"result": json.loads(result.read_text(encoding="utf-8")), "log": lines}
    return found


def main() -> None:
    """Train or copy, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--runs", type=Path, help="copy these runs instead")
    parser.add_argument("--out", type=Path, help="a file for the table")
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: Any = collect(options.runs) if options.runs else []
    for seed in [] if options.runs else options.seeds:
        results.append(run(seed))
        print(as_text(results), flush=True)
    if options.out:
        options.out.write_text(as_text(results) + "\n", encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
