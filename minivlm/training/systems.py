"""Training the ways to let a language model see, each from the same start and on the same budget.

1. text: the language model alone learns the world's sentences. It never sees a picture, so it learns how
   questions are asked and which answers are frequent.
2. pictures: a way is put between this language model and the shipped image tower, and learns to answer. Each
   row is a picture of its own with one question. The tower stays as it is; what else stays, the way decides.
   LLaVA's first quarter of these steps is a stage of its own: its projector learns alone, from captions.

For the same seed, all ways start from the same language model and see the same rows in the same order. What
the ways are is in `ways.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset

from minivlm.errors import InputError
from minivlm.evaluation import evaluate
from minivlm.evaluation.columns import ALL_COLUMNS
from minivlm.models.miniatures.base import Miniature
from minivlm.models.protocols import Answers
from minivlm.processing import LlavaProcessor
from minivlm.processing.inputs import Inputs, to_device
from minivlm.training.folder import run_folder
from minivlm.training.limits import check_numbers, check_warmup
from minivlm.training.loop import DEFAULT_LOOP, Loop, in_order, run_to_end
from minivlm.training.muon import Muon
from minivlm.training.schedule import warm_up_then_fall
from minivlm.training.trainable import Trainable
from minivlm.training.ways import WAYS, System, SystemProcessor, build
from minivlm.vision.siglip import SiglipVisionModel
from minivlm.world.augmentations import varied
from minivlm.world.questions import Example, examples
from minivlm.world.scenes import make_scene

MAX_GRADIENT_NORM = 1.0
MEASURED_SCENES = 100
TEXT_ROWS = 500  # on which the language model is measured
# Streams of random numbers: [seed, stream, step].
TEXT_STREAM, PICTURE_STREAM, MEASURE_STREAM = range(3)


@dataclass(frozen=True)
class SystemConfig:
    """Everything that decides the result."""

    system: str
    seed: int = 0
    text_steps: int = 500  # of the language model alone
    steps: int = 1500  # with pictures
    text_rows: int = 96  # of a step
    rows: int = 48
    muon_lr: float = 0.02  # peak rate of the matrices of linear layers
    adamw_lr: float = 3e-3  # peak rate of everything else
    weight_decay: float = 0.02  # of these matrices
    warmup_steps: int = 100

    def __post_init__(self) -> None:
        """Raises InputError: a number that nothing can be trained with, or an unknown system."""
        check_numbers(asdict(self))
        if self.system not in WAYS:
            raise InputError(f"there is no system {self.system!r}: choose from {', '.join(WAYS)}")
        check_warmup(self.warmup_steps, self.steps)

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return self.text_steps + self.steps

    @property
    def stages(self) -> dict[str, int]:
        """How many steps each has."""
        align = self.steps // 4 if WAYS[self.system].aligns else 0
        return {"text": self.text_steps, "align": align, "pictures": self.steps - align}


@dataclass(frozen=True)
class SystemRows(Dataset[Inputs]):
    """Batch number n of a stage: rows with one question each, drawn when it is asked for."""

    processor: SystemProcessor
    stage: str = field(kw_only=True)
    seed: int = field(kw_only=True)
    stream: int = field(kw_only=True)
    first: int = field(default=0, kw_only=True)  # number in the stream
    steps: int = field(kw_only=True)
    rows: int = field(kw_only=True)
    column: str = field(default="held_out", kw_only=True)  # whose scenes the pictures show

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Inputs:
        rng = np.random.default_rng([self.seed, self.stream, self.first + step])
        scenes = [varied(make_scene(rng, "train"), rng) for _ in range(self.rows)]
        change = ALL_COLUMNS[self.column].change
        if change is not None and self.stage != "text":
            scenes = [change(scene, rng) for scene in scenes]
        asked = [_one_question(examples(scene, rng)) for scene in scenes]
        pictures = None
        if self.stage != "text":
            size = self.processor.image_processor.image_size
            pictures = [scene.draw(size) for scene in scenes]
        if self.stage == "align" and pictures is not None and isinstance(self.processor, LlavaProcessor):
            return self.processor.captions(pictures, [scene.caption() for scene in scenes])
        prompts, answers = [one.prefix for one in asked], [one.suffix for one in asked]
        return self.processor(pictures, prompts, answers, padding_side="right")


def _one_question(endless: Iterator[Example]) -> Example:
    """The first that is not about masks: their 16 words a thing would take most of the budget."""
    return next(example for example in islice(endless, 20) if example.task != "segment")


class SystemRun(Trainable):
    """A training run of one way at some step."""

    losses = ("text", "answer")
    masters: System

    def __init__(self, config: SystemConfig, device: torch.device | str = "cpu", workers: int = 1) -> None:
        self.config, self.workers = config, workers
        self.way = WAYS[config.system]
        self.step = 0
        self.model, self.processor = build(config.system, config.seed)
        self.masters = self.working = self.model.to(device)
        learns = {"text": ("language_model.",), "align": self.way.aligns, "pictures": self.way.learns}
        self.parts = {stage: self._weights(learns[stage]) for stage, steps in config.stages.items() if steps}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for stage, weights in self.parts.items():
            matrices, others = self._divided(weights)
            self.optimizers[f"{stage}_muon"] = Muon(
                matrices, lr=config.muon_lr, weight_decay=config.weight_decay
            )
            self.optimizers[f"{stage}_adamw"] = torch.optim.AdamW(
                others, lr=config.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0
            )

    def _weights(self, beginnings: tuple[str, ...]) -> list[nn.Parameter]:
        return [weight for name, weight in self.model.named_parameters() if name.startswith(beginnings)]

    def _divided(self, weights: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The matrices of linear layers, and everything else, as in the recipe of the shipped model."""
        linear = {id(module.weight) for module in self.model.modules() if isinstance(module, nn.Linear)}
        return [w for w in weights if id(w) in linear], [w for w in weights if id(w) not in linear]

    @property
    def total_steps(self) -> int:
        return self.config.total_steps

    @property
    def stage(self) -> str:
        """Of the next step."""
        return self._stage_of(self.step)[0]

    def _stage_of(self, step: int) -> tuple[str, int]:
        """A step's stage, and its number there."""
        for stage, steps in self.config.stages.items():
            if step < steps:
                return stage, step
            step -= steps
        return stage, steps

    def settings(self) -> dict[str, Any]:
        return asdict(self.config)

    def place(self) -> dict[str, Any]:
        return {"stage": self._stage_of(max(self.step - 1, 0))[0]}

    def batches(self) -> Iterator[Inputs]:
        config, first = self.config, 0
        parts: list[Dataset[Inputs]] = []
        for stage, steps in config.stages.items():
            stream, rows = (
                (TEXT_STREAM, config.text_rows) if stage == "text" else (PICTURE_STREAM, config.rows)
            )
            parts.append(
                SystemRows(
                    self.processor,
                    stage=stage,
                    seed=config.seed,
                    stream=stream,
                    first=first,
                    steps=steps,
                    rows=rows,
                    column=self.way.column,
                )
            )
            first += steps if stage != "text" else 0
        return in_order(ConcatDataset(parts), range(self.step, config.total_steps), self.workers)

    def advance(self, batch: Inputs) -> dict[str, float]:
        """One step of optimization. Returns the loss of its stage."""
        stage, step = self._stage_of(self.step)
        config, steps = self.config, self.config.stages[stage]
        batch = to_device(batch, self.model.device)
        weights = self.parts[stage]
        self.model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        generator = torch.Generator().manual_seed(config.seed * 2**32 + self.step)
        if stage == "text":
            name, loss = "text", self.way.language_model.loss(self.model.language_model, batch, generator)
        else:
            name, loss = "answer", self.way.loss(self.model, batch, generator)
        self.check_finite(f"the {name} loss", loss.item())
        loss.backward()
        self.check_finite("the gradient", nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM).item())
        factor = warm_up_then_fall(step, steps, min(config.warmup_steps, max(steps // 4, 1)))
        for kind, optimizer in self.optimizers.items():
            peak = config.muon_lr if kind.endswith("_muon") else config.adamw_lr
            optimizer.param_groups[0]["lr"] = peak * factor if kind.startswith(f"{stage}_") else 0.0
        for kind in ("muon", "adamw"):
            self.optimizers[f"{stage}_{kind}"].step()
        self.step += 1
        return {name: loss.item()}

    def advice(self) -> str:
        lower = f"--muon-lr {self.config.muon_lr / 2:g} --adamw-lr {self.config.adamw_lr / 2:g}"
        return f"try lower learning rates in a new folder, such as {lower}"

    def measure(self) -> dict[str, float]:
        """How well the language model knows the text without a picture, and answers to held-out scenes."""
        self.model.eval()  # a stem's norms take the statistics of a batch while they learn
        found = {"text loss": self.text_loss()}
        if self.step > self.config.text_steps:
            table = evaluate(
                cast(Answers, self.model),
                self.processor,
                scenes=MEASURED_SCENES,
                columns=(self.way.column,),
                progress=False,
            )
            found |= {name: metric.value for name, metric in table[self.way.column].items()}
        self.model.train()
        return found

    @torch.no_grad()
    def text_loss(self) -> float:
        """Of rows that no training saw, without a picture."""
        rows = SystemRows(
            self.processor,
            stage="text",
            seed=self.config.seed,
            stream=MEASURE_STREAM,
            steps=1,
            rows=TEXT_ROWS,
        )
        generator = torch.Generator().manual_seed(0)
        batch = to_device(rows[0], self.model.device)
        return self.way.language_model.loss(self.model.language_model, batch, generator).item()

    def save(self, folder: Path) -> None:
        """The trained system so far as a checkpoint folder, in bf16, and without a tower that was frozen."""
        model = copy.deepcopy(self.model).to(torch.bfloat16)
        if isinstance(model, Miniature) and isinstance(model.vision_tower, SiglipVisionModel):
            model.save_pretrained(folder, tower=False)
        else:
            model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def train_system(out: Path, config: SystemConfig, *, loop: Loop = DEFAULT_LOOP) -> SystemRun:
    """Train one way, or go on with the run in `out`, and leave a checkpoint folder there.

    Raises InputError: as `minivlm.training.scratch.train`.
    """
    with run_folder(out, loop.resume):
        run = SystemRun(config, loop.device, loop.workers)
        run_to_end(run, out, loop)
        return run
