"""What matters when a tiny model is trained: short runs that differ in one thing each.

Every run has the same pictures in the same order (by seed), one thread, and about the same processor time;
a variant whose step costs more gets fewer steps. Results are appended to docs/training-log.jsonl, one line a
run, and `--table` prints them.

Run: python bench/recipe.py [--only NAME ...] [--seeds 0 1 2]
     python bench/recipe.py --table
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

from minivlm.evaluation import evaluate
from minivlm.looking.measures import within_picture_share
from minivlm.losses import clip_loss
from minivlm.training.recipe import TrainingConfig
from minivlm.training.scratch import Run
from minivlm.world.batches import Batch, SceneBatches
from minivlm.world.questions import Example, ask
from minivlm.world.scenes import Scene, make_scene

LOG = Path(__file__).parents[1] / "docs" / "training-log.jsonl"
SHORT = TrainingConfig(
    tower_steps=200,
    tower_pictures=48,
    packed_steps=320,
    pictures=24,
    review_steps=0,
    prefix_steps=40,
    alike_steps=0,
    last_steps=0,
    warmup_steps=30,
)
SHOWN = {
    "color": "color",
    "shape": "shape",
    "relation": "relation",
    "all questions": "questions",
    "exact caption": "caption",
    "box mean IoU": "box IoU",
}


# ---- what a variant may change besides numbers ----------------------------------------------------------


class AdamWOnly(Run):
    """One optimizer for everything."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(config)
        tower = [p for name, p in self.masters.named_parameters() if "vision_tower." in name]
        rest = [p for name, p in self.masters.named_parameters() if "vision_tower." not in name]
        groups = [{"params": tower, "tower": True}, {"params": rest, "tower": False}]
        self.optimizers = {
            "adamw": torch.optim.AdamW(
                groups, lr=config.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True
            )
        }


class LearnedPositions(Run):
    """Patch positions that start as noise instead of sines and cosines."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(config)
        model = self.masters["model"]
        nn.init.normal_(model.vision_tower.embeddings.position_embedding.weight, std=0.02)
        self.working.load_state_dict(self.masters.state_dict())


class TrueMaskThroughout(Run):
    """One question a row under the prefix-LM mask from the first step of the language stage."""

    def batches(self) -> Iterator[Batch]:
        config = self.config
        make = partial(SceneBatches, self.processor, config.patch_size, seed=config.seed)
        stages: list[SceneBatches] = [
            make(steps=config.tower_steps, pictures=config.tower_pictures, questions=0),
            make(
                steps=config.prefix_steps,
                pictures=config.pictures,
                questions=config.prefix_questions,
                packed=False,
                first_step=config.tower_steps,
                easy_from=round(0.03 * config.prefix_steps),
                easy_to=round(0.25 * config.prefix_steps),
            ),
        ]
        return iter(DataLoader(ConcatDataset(stages), batch_size=None, num_workers=1, prefetch_factor=4))


class _Captions(SceneBatches):
    """The caption of each picture, and nothing else."""

    def _choose(self, scene: Scene, rng: np.random.Generator) -> list[Example]:
        caption = ask(scene, "caption", rng)
        assert caption is not None
        return [caption]


class Contrastive(Run):
    """The tower's own stage is CLIP's: picture and caption of the batch are to find each other.

    Picture: mean of the tower's tokens. Text: mean of word vectors with their place, through two layers.
    """

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(config)
        vocabulary, width = self.processor.tokenizer.vocab_size, 128
        self.text = nn.ModuleDict(
            {
                "words": nn.Embedding(vocabulary, width),
                "places": nn.Embedding(64, width),
                "mlp": nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, width)),
                "picture": nn.Linear(config.tower_width, width),
            }
        )
        self.scale = nn.Parameter(torch.tensor(2.3))
        self.text_optimizer = torch.optim.AdamW(
            [*self.text.parameters(), self.scale], lr=config.adamw_lr, betas=(0.9, 0.98)
        )

    def batches(self) -> Iterator[Batch]:
        config = self.config
        captions = _Captions(
            self.processor,
            config.patch_size,
            seed=config.seed,
            steps=config.tower_steps,
            pictures=config.tower_pictures,
            questions=1,
        )
        rest = super().batches()
        pairs = DataLoader(captions, batch_size=None, num_workers=1, prefetch_factor=4)
        yield from pairs
        yield from islice(rest, config.tower_steps, None)

    def advance(self, batch: Batch) -> dict[str, float]:
        if self.config.stage(self.step) != "tower":
            return super().advance(batch)
        model = self.working["model"]
        tokens = model.vision_tower(batch.pixel_values.to(model.multi_modal_projector.weight.dtype))
        pictures = self.text["picture"](tokens.float().mean(dim=1))  # [P, D]
        places = torch.arange(batch.input_ids.shape[1])
        words = self.text["mlp"](self.text["words"](batch.input_ids) + self.text["places"](places))
        wanted = (batch.labels != -100).float()[..., None]
        texts = (words * wanted).sum(dim=1) / wanted.sum(dim=1)  # [P, D]
        loss = clip_loss(pictures, texts, self.scale)
        loss.backward()
        self.text_optimizer.step()
        self.text_optimizer.zero_grad()
        self._update()
        self.step += 1
        return {"patch": loss.item()}


# ---- the variants ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One change to the short recipe."""

    question: str
    change: str
    numbers: dict[str, Any] = field(default_factory=dict)
    run: Callable[[TrainingConfig], Run] = Run


VARIANTS = {
    "base": Variant("", "the recipe, short"),
    "no-dense": Variant(
        "dense tower loss",
        "no tower stage, no dense loss",
        {"tower_steps": 0, "packed_steps": 380, "dense_weight": 0.0},
    ),
    "dense-only-later": Variant(
        "dense tower loss", "no tower stage, dense loss at .5", {"tower_steps": 0, "packed_steps": 380}
    ),
    "dense-0": Variant("dense tower loss", "tower stage, then weight 0", {"dense_weight": 0.0}),
    "dense-1.5": Variant("dense tower loss", "tower stage, then weight 1.5", {"dense_weight": 1.5}),
    "tower-frozen": Variant("tower rate after its stage", "factor 0: frozen", {"tower_lr_factor": 0.0}),
    "tower-0.1": Variant("tower rate after its stage", "factor 0.1", {"tower_lr_factor": 0.1}),
    "tower-1": Variant("tower rate after its stage", "factor 1", {"tower_lr_factor": 1.0}),
    "muon-0.01": Variant("optimizer", "Muon at .01", {"muon_lr": 0.01}),
    "muon-0.04": Variant("optimizer", "Muon at .04", {"muon_lr": 0.04}),
    "adamw-0.001": Variant("optimizer", "AdamW alone at .001", {"adamw_lr": 0.001}, AdamWOnly),
    "adamw-0.003": Variant("optimizer", "AdamW alone at .003", {"adamw_lr": 0.003}, AdamWOnly),
    "adamw-0.006": Variant("optimizer", "AdamW alone at .006", {"adamw_lr": 0.006}, AdamWOnly),
    "unpacked": Variant(
        "packing and mask",
        "true mask from the start, one question a row",
        {"packed_steps": 0, "prefix_steps": 290},
        TrueMaskThroughout,
    ),
    "no-prefix": Variant(
        "packing and mask", "true mask never trained", {"packed_steps": 370, "prefix_steps": 0}
    ),
    "patch-4": Variant(
        "patches and pictures",
        "patches of 4 (256 tokens)",
        {"patch_size": 4, "tower_steps": 48, "packed_steps": 76, "prefix_steps": 10, "warmup_steps": 8},
    ),
    "patch-16": Variant(
        "patches and pictures",
        "patches of 16 (16 tokens)",
        {"patch_size": 16, "tower_steps": 400, "packed_steps": 430, "prefix_steps": 60},
    ),
    "pixels-96": Variant(
        "patches and pictures",
        "pictures of 96 (144 tokens)",
        {"image_size": 96, "tower_steps": 95, "packed_steps": 154, "prefix_steps": 20, "warmup_steps": 15},
    ),
    "wide": Variant(
        "width",
        "2.6 M parameters",
        {
            "tower_width": 144,
            "text_width": 208,
            "tower_steps": 120,
            "packed_steps": 190,
            "prefix_steps": 24,
            "warmup_steps": 18,
        },
    ),
    "contrastive": Variant(
        "contrastive pre-training",
        "CLIP stage instead of dense labels",
        {"dense_weight": 0.0},
        Contrastive,
    ),
    "relations-1": Variant("relation questions", "once a round", {"relations": 1}),
    "relations-4": Variant("relation questions", "four times a round", {"relations": 4}),
    "learned-positions": Variant("positions", "random start instead of sin-cos", run=LearnedPositions),
}


def run_variant(name: str, seed: int, scenes: int) -> dict[str, Any]:
    """Train and measure one variant."""
    variant = VARIANTS[name]
    torch.set_num_threads(1)
    config = replace(SHORT, seed=seed, **variant.numbers)
    run = variant.run(config)
    questions = 0
    seconds = 0.0
    shares = {}
    for batch in run.batches():
        started = time.process_time()
        run.advance(batch)
        seconds += time.process_time() - started
        questions += int(batch.blocks.amax(dim=1).sum()) if batch.blocks.numel() else 0
        if run.step == config.tower_steps:
            shares["after the tower's stage"] = tower_share(run, seed)
    shares["at the end"] = tower_share(run, seed)
    table = evaluate(run.model, run.processor, scenes=scenes, columns=("held_out",), progress=False)
    return {
        "variant": name,
        "seed": seed,
        "cpu_seconds": round(seconds, 1),
        "steps": [config.tower_steps, config.packed_steps, config.prefix_steps],
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "questions_seen": questions,
        "within_picture_share": {when: round(share, 4) for when, share in shares.items()},
        "metrics": {row: round(metric.value, 4) for row, metric in table["held_out"].items()},
    }


def tower_share(run: Run, seed: int) -> float:
    """The share of within-picture variance on 64 pictures that training does not use."""
    rng = np.random.default_rng([seed, 7])
    pictures = [make_scene(rng, "test").draw(run.config.image_size) for _ in range(64)]
    with torch.no_grad():
        tokens: Tensor = run.model.vision_tower(run.processor.image_processor(pictures))
    return within_picture_share(tokens)


def main() -> None:
    """Run what is asked for and not yet in the log."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=150, help="held-out scenes to measure with")
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--table", action="store_true", help="print what the log holds")
    options = parser.parse_args()
    if options.table:
        print(as_table(options.log))
        return
    done = {(line["variant"], line["seed"]) for line in read(options.log)}
    for seed in options.seeds:
        for name in options.only:
            if (name, seed) in done:
                continue
            result = run_variant(name, seed, options.scenes)
            with options.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of the log."""
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def as_table(path: Path) -> str:
    """Markdown: mean over seeds, and in brackets the smallest and largest."""
    lines = [
        f"| question | run | seeds | CPU s | {' | '.join(SHOWN.values())} | share |",
        "|---|---|---|---|" + "---|" * (len(SHOWN) + 1),
    ]
    runs = read(path)
    for name, variant in VARIANTS.items():
        seeds = [run for run in runs if run["variant"] == name]
        if not seeds:
            continue
        cells = [spread([run["metrics"][row] for run in seeds]) for row in SHOWN]
        share = spread([run["within_picture_share"]["at the end"] for run in seeds])
        seconds = statistics.mean(run["cpu_seconds"] for run in seeds)
        columns = [variant.question, variant.change, str(len(seeds)), f"{seconds:.0f}", *cells, share]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean, with smallest and largest where there are several."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
