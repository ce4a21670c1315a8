"""What do the parts of Qwen2-VL and Qwen2.5-VL buy, in the world that moves?

Run: python bench/moving.py --compare time --out bench/results/moving_time.txt
     python bench/moving.py --compare towers --out bench/results/moving_towers.txt
     python bench/moving.py --ship minivlm/assets/miniatures

time     One tower, trained once for each seed, and two decoders that differ in what a position in time means:
         seconds, as in Qwen2.5-VL, or the number of the step, as in Qwen2-VL. Both learn from the same
         pictures and clips. About clips they are asked two kinds of questions, held-out ones at each of the
         two frame rates of training, and at one that they never saw, in clips that have more frames.
towers   Towers alone, which learn from pictures of eight shapes what lies in the cell of each image token:
         with two-axis rotary positions (Qwen2-VL), with a learned table that is stretched to the picture's
         grid, on pictures squashed to a square; and Qwen2.5-VL's with windows and without them. Right is the
         token in whose cell a thing has its middle, on shapes of training and on others. Operations are
         those of a tower of these sizes on a picture of 96 x 96 pixels, and on one of 480 x 480.

Three seeds. Results and runs are kept in --runs: a table may be made in pieces (--seeds), and what was
stopped goes on. With --json minivlm/assets/moving_time.json, or moving_towers.json, the numbers are written
where notebooks find them.

The third command trains both systems with seed 0 on all kinds of questions, as `minivlm train --system` does,
and copies them into folders that notebooks open.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from systems import ship_folder
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minivlm.evaluation.clips import evaluate_clips
from minivlm.models.qwen2_5_vl import Qwen2_5_VL
from minivlm.models.qwen2_vl import Qwen2VL
from minivlm.processing import Qwen2VLImageProcessor, Qwen2VLProcessor
from minivlm.training.folder import run_folder
from minivlm.training.loop import Loop, run_to_end
from minivlm.training.moving import SYSTEMS, MovingConfig, MovingRun, build
from minivlm.vision.qwen2_vl import Qwen2VLVisionConfig, Qwen2VLVisionModel, grid_positions
from minivlm.world.clip_batches import PICTURE_SIDES, ClipBatches
from minivlm.world.scenes import COLORS, SHAPES, make_scene

Result = dict[str, float]
CLIPS = 300
SCENES = 100  # of each shape
OTHER_SIDES = ((128, 32), (32, 128), (112, 112), (96, 96), (112, 48), (48, 112))
CLOCK_TASKS = ("direction", "length")
CLOCK = MovingConfig("qwen2_5_vl", tower_steps=300, steps=300, rows=32)
# Clips of each: frames, and how many of them a second.
FILMED = {"at 1 a second": ((4, 6, 8), 1), "at 2 a second": ((4, 6, 8), 2), "at 3 a second": ((6, 12), 3)}
TOWER_STEPS = 300


# ---- time --------------------------------------------------------------------------------------------------


class Numbered(Qwen2_5_VL):
    """Qwen2.5-VL with Qwen2-VL's clock: the steps of a video are counted."""

    intervals = Qwen2VL.intervals


MOST_FREQUENT = "always the most frequent answer"
CLOCKS: dict[str, type[Qwen2_5_VL]] = {"seconds": Qwen2_5_VL, "numbers of steps": Numbered}


class ClockBatches(ClipBatches):
    """Two kinds of questions about clips."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, tasks=CLOCK_TASKS)


class ClockRun(MovingRun):
    """A decoder that learns about time."""

    batch_class = ClockBatches


class TowerRun(ClockRun):
    """The first stage alone."""

    @property
    def total_steps(self) -> int:
        return self.config.tower_steps


def compare_time(
    seed: int, runs: Path, config: MovingConfig = CLOCK, clips: int = CLIPS
) -> dict[str, Result]:
    """The tower once, then a decoder for each clock, which goes on with a copy of the tower's run."""
    config = replace(config, seed=seed)
    tower = runs / f"tower-{seed}"
    finish(TowerRun(config), tower)
    found: dict[str, Result] = {name: {} for name in (*CLOCKS, MOST_FREQUENT)}
    for name, clock in CLOCKS.items():
        folder = runs / f"{name.replace(' ', '-')}-{seed}"
        if not folder.exists():
            shutil.copytree(tower, folder)
        run = ClockRun(config)
        run.model.__class__ = clock
        finish(run, folder)
        see_all(run.processor)
        for how, (frames, rate) in FILMED.items():
            answered = evaluate_clips(
                run.model, run.processor, clips, tasks=CLOCK_TASKS, frames=frames, rates=(rate,)
            )
            for task, metric in answered.items():
                found[name][f"{task} {how}"] = metric.value
                found[MOST_FREQUENT][f"{task} {how}"] = metric.baseline
    return found


def see_all(processor: Qwen2VLProcessor) -> None:
    """Let a processor read every frame of what is filmed at 3 a second: more than in training."""
    processor.video_budget = replace(processor.video_budget, fps=4.0, max_frames=12)


def finish(run: MovingRun, folder: Path) -> None:
    """Carry a run to its end, from where it was saved if it was."""
    resume = (folder / "state.safetensors").is_file()
    with run_folder(folder, resume):
        run_to_end(run, folder, Loop(resume=resume, save_every=50, measure_every=0))


# ---- towers ------------------------------------------------------------------------------------------------


class TableTower(Qwen2VLVisionModel):
    """Qwen2-VL's tower with positions as ViT has them: a learned table, stretched to the picture's grid."""

    SIDE = 8

    def __init__(self, config: Qwen2VLVisionConfig) -> None:
        super().__init__(config)
        self.table = nn.Parameter(0.02 * torch.randn(config.embed_dim, self.SIDE, self.SIDE))

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """As the tower's, for pictures of one shape."""
        _, rows, columns = grid_thw[0].tolist()
        table = F.interpolate(self.table[None], (rows, columns), mode="bicubic", align_corners=False)[0]
        row, column = grid_positions(grid_thw, self.config.spatial_merge_size).unbind(1)
        x = (self.embeddings(pixel_values) + table[:, row, column].T)[None]
        segments = [rows * columns] * len(grid_thw)
        for layer in self.layers:
            x = layer(x, segments, lambda heads: heads)
        return self.merger(x[0])


class SquashingImageProcessor(Qwen2VLImageProcessor):
    """Every picture becomes a square, as for SigLIP and CLIP."""

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of 64 pixels."""
        return 64, 64


Parts = tuple[Qwen2VL, Qwen2VLProcessor]


def _rotary(seed: int) -> Parts:
    return build("qwen2_vl", seed)


def _table(seed: int) -> Parts:
    model, processor = build("qwen2_vl", seed)
    model.vision_tower = TableTower(model.config.vision)
    return model, processor


def _squashed(seed: int) -> Parts:
    model, processor = build("qwen2_vl", seed)
    settings = vars(processor.image_processor).items()
    processor.image_processor = SquashingImageProcessor(**{k: v for k, v in settings if k != "image_size"})
    return model, processor


def _windows(seed: int) -> Parts:
    return build("qwen2_5_vl", seed)


def _no_windows(seed: int) -> Parts:
    model, processor = build("qwen2_5_vl", seed)
    blocks = tuple(range(model.config.vision.depth))
    config: Any = model.config
    vision = replace(config.vision, fullatt_block_indexes=blocks)
    torch.manual_seed(seed)
    return Qwen2_5_VL(replace(config, vision=vision)), processor


TOWERS: dict[str, Callable[[int], Parts]] = {
    "rotary positions of two axes": _rotary,
    "a learned table, stretched": _table,
    "squashed to a square": _squashed,
    "windows, the last block full": _windows,
    "every block full": _no_windows,
}


def compare_towers(seed: int, steps: int = TOWER_STEPS, scenes: int = SCENES) -> dict[str, Result]:
    """Each tower, trained on the same pictures."""
    found = {}
    for name, parts in TOWERS.items():
        run = MovingRun(MovingConfig("qwen2_vl", seed=seed, tower_steps=steps, warmup_steps=min(50, steps)))
        run.model, run.processor = parts(seed)
        run.batch_class = PictureBatches
        run.prepare("cpu")
        for batch in islice(run.batches(), steps):
            run.advance(batch)
        found[name] = {
            **things_named(run, PICTURE_SIDES, "known", scenes),
            **things_named(run, OTHER_SIDES, "other", scenes),
            "operations": operations(run.model, 96),
            "operations, large": operations(run.model, 480),
        }
    return found


class PictureBatches(ClipBatches):
    """Without clips."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"pictures": 1})


@torch.no_grad()
def things_named(run: MovingRun, sides: Sequence[tuple[int, int]], what: str, scenes: int) -> Result:
    """The share of things whose color and shape the token in whose cell they have their middle knows."""
    pictures = run.processor.image_processor
    right: dict[str, list[bool]] = {"color": [], "shape": []}
    for width, height in sides:
        rng = np.random.default_rng([99, width, height])
        drawn = [make_scene(rng, "test", width=width, height=height) for _ in range(scenes)]
        pixels, grids = pictures.read([scene.draw(width) for scene in drawn])
        scores = run.head.scores(run.model.encode_image(pixels, grids))
        rows, columns = (int(side) // pictures.merge_size for side in grids[0, 1:])
        for number, scene in enumerate(drawn):
            for thing in scene.things:
                row, column = int(rows * thing.y / height), int(columns * thing.x / width)
                cell = (number * rows + row) * columns + column
                truth = {"color": 1 + list(COLORS).index(thing.color), "shape": 1 + SHAPES.index(thing.shape)}
                for name, of_thing in right.items():
                    of_thing.append(int(scores[name][cell].argmax()) == truth[name])
    return {f"{name}, {what} sides": round(mean(values), 4) for name, values in right.items()}


def operations(model: Qwen2VL, side: int) -> float:
    """Of the tower on a square picture."""
    vision = model.config.vision
    cells = side // vision.patch_size
    pixels = torch.zeros(cells * cells, 3 * vision.temporal_patch_size * vision.patch_size**2)
    # Only this form of attention is counted.
    plain = sdpa_kernel(SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode_image(pixels, torch.tensor([[1, cells, cells]]))
    return float(counter.get_total_flops())


# ---- what ships --------------------------------------------------------------------------------------------


def ship(runs: Path, out: Path, **changes: Any) -> None:
    """Train both systems where that is not done yet, and copy what notebooks open."""
    for system in SYSTEMS:
        finish(MovingRun(MovingConfig(system, **changes)), runs / system)
        ship_folder(runs / system, out / system)


# ---- the table ---------------------------------------------------------------------------------------------


def as_text(results: Sequence[dict[str, Result]]) -> str:
    """A line for each trial: the mean over seeds, the least and the most."""
    columns = list(next(iter(results[0].values())))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in results[0]:
        cells = []
        for column in columns:
            values = [found[name][column] for found in results if column in found[name]]
            cells.append(_cell(values, column) if values else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{len(results)} seeds"])


def _cell(values: Sequence[float], column: str) -> str:
    if column.startswith("operations"):
        return f"{mean(values) / 1e6:.0f} million"
    low, high = min(values), max(values)
    around = f" ({low:.2f}-{high:.2f})" if high - low >= 0.005 else ""
    return f"{mean(values):.2f}{around}"


def main() -> None:
    """Train, measure, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compare", choices=("time", "towers"))
    parser.add_argument("--runs", type=Path, default=Path("runs/moving"), help="where results are kept")
    parser.add_argument("--out", type=Path, help="write the table here, too")
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    parser.add_argument("--ship", type=Path, help="train both systems and copy them there, and stop")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    if options.ship:
        ship(options.runs, options.ship)
        return
    if not options.compare:
        parser.error("choose --compare time, --compare towers, or --ship")
    results = []
    for seed in options.seeds:
        kept = options.runs / f"{options.compare}-{seed}.json"
        if not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            if options.compare == "time":
                found = compare_time(seed, options.runs)
            else:
                found = compare_towers(seed)
            kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        results.append(json.loads(kept.read_text(encoding="utf-8")))
        print(as_text(results), flush=True)
    if options.out:
        options.out.write_text(as_text(results) + "\n", encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
