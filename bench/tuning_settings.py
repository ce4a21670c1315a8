"""What settings of `minivlm finetune` do to the shipped model, on two small sets of pictures.

Run: python bench/tuning_settings.py --runs runs/own --out bench/results/tuning_settings.txt

digits    300 pictures of one digit each, of ten kinds; 100 others to measure on.
shapes    60 pictures of one cross or ring each, which the drawn world does not have, asked for its name and
          for its box; 60 others to measure on.

First the model as it is, and a higher rate; then each setting adds to the one above it, from the defaults
on. The last is what `minivlm finetune --suggest` proposes, without its choice of the best state: that would
be made on the pictures that are measured on. Exact answers and the IoU of boxes are those of `minivlm eval
--data`; the world is the share of right answers to questions about 50 drawn scenes. A run is kept in --runs,
is resumed if it was stopped, and is not made again, so the table may be made in pieces (--set, --setting).
One seed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from minivlm.data.samples import read_samples
from minivlm.evaluation.own import answer_own, own_metrics
from minivlm.models.load import SHIPPED, load_answering
from minivlm.processing import box_to_tokens
from minivlm.training.finetuning import FinetuningConfig, finetune
from minivlm.training.loop import Loop
from minivlm.training.replay import world_scores
from minivlm.training.suggest import suggest
from minivlm.world.scenes import COLORS

SIDE, FINER = 64, 4  # pixels of a picture; it is drawn four times as large, and made smaller
Line = dict[str, str]
UNTUNED, SUGGESTED = "the model as shipped", "as --suggest says"
SETTINGS: dict[str, dict[str, Any]] = {
    "rate 0.003": {"lr": 3e-3},
    "defaults": {},
    "20 epochs": {"epochs": 20},
    "40 epochs": {"epochs": 40},
    "shift and zoom": {"epochs": 40, "augment": ("shift", "zoom")},
    "replay 0.2": {"epochs": 40, "augment": ("shift", "zoom"), "replay": 0.2},
}
ALL = (UNTUNED, *SETTINGS, SUGGESTED)
# Rows of the table of `minivlm eval --data`: words, of which the first kind that there is; and boxes.
WORDS = ("exact, what shape is it?", "exact, all lines")
BOXES = "box mean IoU"


def canvas(rng: np.random.Generator) -> Image.Image:
    """A light ground."""
    return Image.new("RGB", (FINER * SIDE, FINER * SIDE), (int(rng.integers(180, 250)),) * 3)


def draw_digit(rng: np.random.Generator, name: str) -> tuple[Image.Image, list[Line]]:
    """A dark digit, slightly turned, somewhere in the picture."""
    picture = canvas(rng)
    size = int(rng.integers(28, 48)) * FINER
    stamp = Image.new("L", (size, size))
    font = ImageFont.load_default(size=round(0.9 * size))
    ImageDraw.Draw(stamp).text((size / 2, size / 2), name, fill=255, font=font, anchor="mm")
    stamp = stamp.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC)
    x, y = rng.integers(0, FINER * SIDE - size, size=2).tolist()
    picture.paste(tuple(rng.integers(0, 110, size=3).tolist()), (x, y), stamp)
    return shrunk(picture), [{"prefix": "which digit is it?", "suffix": name}]


def draw_shape(rng: np.random.Generator, name: str) -> tuple[Image.Image, list[Line]]:
    """A cross or a ring in one of the world's colors, with its box."""
    picture = canvas(rng)
    radius = float(rng.uniform(8, 16))
    x, y = rng.uniform(radius + 1, SIDE - radius - 1, size=2).tolist()
    color = COLORS[list(COLORS)[rng.integers(len(COLORS))]]
    pen = ImageDraw.Draw(picture)
    box = (x - radius, y - radius, x + radius, y + radius)
    if name == "ring":
        pen.ellipse([FINER * edge for edge in box], outline=color, width=math.ceil(0.4 * radius * FINER))
    else:
        thick = 0.3 * radius
        pen.rectangle([FINER * v for v in (box[0], y - thick, box[2], y + thick)], fill=color)
        pen.rectangle([FINER * v for v in (x - thick, box[1], x + thick, box[3])], fill=color)
    return shrunk(picture), [
        {"prefix": "what shape is it?", "suffix": name},
        {"prefix": "detect thing", "suffix": f"{box_to_tokens(box, SIDE, SIDE)} {name}"},
    ]


def shrunk(picture: Image.Image) -> Image.Image:
    """The picture in its own size."""
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


SETS: dict[str, tuple[Callable[..., tuple[Image.Image, list[Line]]], list[str], int, int]] = {
    # what draws a picture, the names, and how many pictures to learn from and to measure on
    "digits": (draw_digit, [str(digit) for digit in range(10)], 300, 100),
    "shapes": (draw_shape, ["cross", "ring"], 60, 60),
}


def write_set(folder: Path, name: str) -> tuple[Path, Path]:
    """The pictures and the two files of lines, the same every time."""
    draw, names, learned, measured = SETS[name]
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[list[Line]] = []
    for number in range(learned + measured):
        rng = np.random.default_rng([list(SETS).index(name), number])
        picture, asked = draw(rng, names[number % len(names)])
        picture.save(folder / f"{number}.png")
        lines.append([{"image": f"{number}.png"} | line for line in asked])
    paths = (folder / "train.jsonl", folder / "validation.jsonl")
    for path, part in zip(paths, (lines[:learned], lines[learned:]), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for asked in part for line in asked))
    return paths


def result_of(runs: Path, name: str, setting: str) -> dict[str, float]:
    """What one run reaches, made now or read from its folder."""
    train, validation = write_set(runs / name, name)
    if setting == UNTUNED:
        return measured(SHIPPED, validation, world=True)
    settings = suggested(train) if setting == SUGGESTED else SETTINGS[setting]
    same = next((known for known, values in SETTINGS.items() if values == settings), setting)
    out = runs / f"{name}, {same}"
    kept = out / "result.json"
    if not kept.is_file():
        loop = Loop(measure_every=100, workers=0, resume=(out / "state.safetensors").is_file())
        finetune(out, FinetuningConfig(**settings), train, validation, loop=loop)
        kept.write_text(json.dumps(measured(str(out), validation, world=True)))
    return dict(json.loads(kept.read_text()))


def suggested(train: Path) -> dict[str, Any]:
    """The epochs, the augmentations and the replay that are suggested for a set."""
    model: Any
    model, processor = load_answering()
    samples = read_samples(train, processor, model.language_model.config.max_position_embeddings)
    weights = sum(weight.numel() for weight in model.parameters())
    typed = {one.option: one.value for one in suggest(samples, weights, None, knows_world=True)}
    return {
        "epochs": int(typed["--epochs"]),
        "augment": tuple(typed["--augment"].split(",")),
        "replay": float(typed["--replay"]),
    }


def measured(model: str | Path, validation: Path, world: bool) -> dict[str, float]:
    """Numbers of a model, by the names of the columns."""
    loaded = load_answering(model)
    samples = read_samples(validation, loaded[1], loaded[0].language_model.config.max_position_embeddings)
    metrics = own_metrics(answer_own(*loaded, samples))
    exact = next(metrics[row] for row in WORDS if row in metrics)
    found = {"exact": exact.value, "constant": exact.baseline}
    if BOXES in metrics:
        found["box IoU"] = metrics[BOXES].value
    if world:
        found["the world"] = world_scores(*loaded)["all questions"].value
    return found


def table(results: dict[tuple[str, str], dict[str, float]]) -> str:
    """Markdown."""
    columns = ("exact", "constant", "box IoU", "the world")
    lines = [f"| set | settings | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for (name, setting), numbers in results.items():
        cells = [f"{numbers[column]:.2f}" if column in numbers else "" for column in columns]
        lines.append(f"| {name} | {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/own"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="write the table here, too")
    parser.add_argument("--set", choices=tuple(SETS), action="append", help="(default: all)")
    parser.add_argument("--setting", choices=ALL, action="append", help="(default: all)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    for name in options.set or SETS:
        for setting in options.setting or ALL:
            results[name, setting] = result_of(options.runs, name, setting)
            print(table(results), flush=True)
    if options.out is not None:
        options.out.write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
