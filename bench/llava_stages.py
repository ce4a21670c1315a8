"""What does LLaVA's first stage buy, and what does the second layer of its projector?

Run: python bench/llava_stages.py --out bench/results/llava_stages

The shipped tower, frozen; a small Llama that has read captions and never seen a picture; pictures of one or
two things. Stage one trains the projector alone, stage two projector and language model, both on captions.
Measured are captions of pictures that no training saw, by their loss with their own picture and with another
one. The second minus the first is what the model takes from the picture, in nats a word.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minivlm.models.llava import Llava
from minivlm.models.miniatures.base import place
from minivlm.processing.chat import encode_caption
from minivlm.processing.inputs import Row
from minivlm.processing.llama_tokens import LlamaTokenizer
from minivlm.processing.rows import pad_rows
from minivlm.training.schedule import warm_up_then_fall
from minivlm.training.ways import build, next_word_loss
from minivlm.world.scenes import make_scene

PICTURES, HELD_OUT = 2000, 200
TEXT, ALIGN, TOGETHER = 150, 80, 60  # steps
TEXT_ROWS, ROWS = 64, 24
LR, WARMUP = 3e-3, 20
TRIALS = {
    "stage one, MLP": "after the projector has learned alone",
    "stage one, linear": "the same with one linear layer",
    "both stages": "then all learns",
    "stage two alone": "as many steps in which all learns, from the start",
    "stage two alone, longer": "as many steps as in both stages, and all learns in each of them",
}


class Captions:
    """Pictures as the tower gives them, and the rows that LLaVA reads."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        model, self.processor = build("llava", seed)
        assert isinstance(model, Llava)
        self.model = model
        assert isinstance(self.processor.tokenizer, LlamaTokenizer)
        self.tokenizer = self.processor.tokenizer
        rng = np.random.default_rng([seed, 14])
        scenes = [make_scene(rng, "train", easy=True) for _ in range(PICTURES + HELD_OUT)]
        self.features = self._features([scene.draw(64) for scene in scenes])
        self.rows = [self._row(scene.caption(), 64) for scene in scenes]
        self.texts = [self._row(make_scene(rng, "train", easy=True).caption(), 0) for _ in range(PICTURES)]

    def _row(self, caption: str, image_tokens: int) -> Row:
        return encode_caption(self.tokenizer, caption, image_tokens)

    @torch.no_grad()
    def _features(self, pictures: list[Image.Image]) -> Tensor:
        """What the projector reads: [pictures, N, D]."""
        pixels = self.processor.image_processor(pictures)
        layer = self.model.config.vision_feature_layer
        tower = self.model.vision_tower
        return torch.cat([list(tower.hidden_states(some))[layer] for some in pixels.split(200)])

    def loss(self, model: Llava, numbers: Iterable[int], features: Tensor) -> Tensor:
        """Of the captions with these numbers, each with one row of features [rows, N, D]."""
        rows = [self.rows[number] for number in numbers]
        batch, written = pad_rows(rows, self.tokenizer.pad_id, "right")
        x = model.merge(batch["input_ids"], model.multi_modal_projector(features))
        hidden = model.language_model(x, *place(batch["attention_mask"], None))
        told = written[:, 1:]
        return F.cross_entropy(model.logits(hidden[:, :-1][told]), batch["input_ids"][:, 1:][told])

    @torch.no_grad()
    def measure(self, model: Llava) -> dict[str, float]:
        """Losses of held-out captions, with their own picture and with another one."""
        numbers = range(PICTURES, PICTURES + HELD_OUT)
        features = self.features[PICTURES:]
        own, other = (self.loss(model, numbers, x).item() for x in (features, features.roll(1, dims=0)))
        return {"own": own, "other": other}

    def read(self) -> None:
        """Teach the language model captions without pictures."""
        decoder, rng = self.model.language_model, np.random.default_rng(0)
        generator = torch.Generator().manual_seed(0)

        def loss() -> Tensor:
            rows = [self.texts[number] for number in rng.integers(0, PICTURES, TEXT_ROWS)]
            batch, _ = pad_rows(rows, self.tokenizer.pad_id, "right")
            return next_word_loss(decoder, batch, generator)

        train(list(decoder.parameters()), loss, TEXT)

    def learn(self, model: Llava, parts: tuple[str, ...], steps: int) -> Llava:
        """A copy in which these parts have learned from pictures with captions."""
        model, rng = copy.deepcopy(model), np.random.default_rng(1)
        model.requires_grad_(False)
        weights = [weight for name, weight in model.named_parameters() if name.startswith(parts)]
        for weight in weights:
            weight.requires_grad_(True)

        def loss() -> Tensor:
            numbers = rng.integers(0, PICTURES, ROWS)
            return self.loss(model, numbers, self.features[numbers])

        train(weights, loss, steps)
        return model


def train(weights: list[nn.Parameter], loss: Callable[[], Tensor], steps: int) -> None:
    """AdamW with a warm-up and a fall."""
    optimizer = torch.optim.AdamW(weights, lr=LR, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LR * warm_up_then_fall(step, steps, WARMUP)
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()


def run(seed: int) -> dict[str, dict[str, float]]:
    """All trials from one start."""
    world = Captions(seed)
    world.read()
    projector, all_parts = ("multi_modal_projector.",), ("multi_modal_projector.", "language_model.")
    start = world.model
    aligned = world.learn(start, projector, ALIGN)
    found = {"stage one, MLP": world.measure(aligned)}
    found["both stages"] = world.measure(world.learn(aligned, all_parts, TOGETHER))
    found["stage two alone"] = world.measure(world.learn(start, all_parts, TOGETHER))
    found["stage two alone, longer"] = world.measure(world.learn(start, all_parts, ALIGN + TOGETHER))
    torch.manual_seed(seed)
    linear = copy.deepcopy(start)
    layer = nn.Linear(start.config.vision.hidden_size, start.config.text.hidden_size)
    linear.multi_modal_projector = layer  # type: ignore[assignment]
    found["stage one, linear"] = world.measure(world.learn(linear, projector, ALIGN))
    return found


def as_text(results: list[dict[str, dict[str, float]]]) -> str:
    """A line for each trial: means over the seeds, and the span of what is taken from the picture."""
    lines = [f"| {'trial':23} | own picture | another one | taken from the picture | seeds |"]
    lines.append("|---" * 5 + "|")
    for trial in TRIALS:
        own, other = ([one[trial][name] for one in results] for name in ("own", "other"))
        taken = [b - a for a, b in zip(own, other, strict=True)]
        span = f"{mean(taken):.2f} ({min(taken):.2f}-{max(taken):.2f})"
        lines.append(
            f"| {trial:23} | {mean(own):<11.2f} | {mean(other):<11.2f} | {span:22} | {len(taken):<5} |"
        )
    lines += ["", *(f"{trial}: {about}" for trial, about in TRIALS.items())]
    lines.append(f"Steps: {TEXT} of text, {ALIGN} of stage one, {TOGETHER} of stage two.")
    return "\n".join(lines)


def main() -> None:
    """Train, measure, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the table to OUT.txt")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for seed in options.seeds:
        results.append(run(seed))
        print(as_text(results), flush=True)
    if options.out:
        options.out.with_suffix(".txt").write_text(as_text(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
