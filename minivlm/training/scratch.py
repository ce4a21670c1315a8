"""Training a tiny PaliGemma from nothing, on drawn scenes, in minutes on a laptop.

Six stages:

1. tower: one linear head per image token learns what lies on its patch. Without this stage the tower
   collapses: its tokens become alike, answers are guesses, and the loss is very slow to show it.
2. packed: the whole model learns from several questions per picture, packed into one row. The picture does
   not see the questions yet, which is what makes packing possible.
3. review: the same with more questions about relations, which are the slowest to learn. The learning rates
   start again, from half of their peak.
4. prefix: one question per row under PaliGemma's true mask, where image and prompt see each other.
5. alike: packed again, with things of one color, which the model so far finds by color alone. Words learn to
   say where things lie (`PointHead`). The tower does not learn any more, the optimizers begin anew, and the
   learning rates start once more.
6. last: the same under the true mask.

Muon (https://kellerjordan.github.io/posts/muon/) trains the matrices inside blocks, AdamW everything else.
Forward and backward pass run in bf16 where the device multiplies it in hardware. The weights that the
optimizers hold stay in fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from minivlm.distributed.agreement import share_of, total
from minivlm.distributed.parallel import backward, data_parallel
from minivlm.distributed.places import Place
from minivlm.errors import InputError
from minivlm.evaluation import evaluate
from minivlm.models.paligemma import PaliGemma
from minivlm.training.folder import run_folder
from minivlm.training.limits import require_room
from minivlm.training.loop import DEFAULT_LOOP, Loop, in_order, run_to_end
from minivlm.training.muon import Muon
from minivlm.training.objectives import PatchHead, SoftTargets, answer_loss
from minivlm.training.pointing import PointHead, states_after
from minivlm.training.precision import bf16_pays, collect_gradients, follow_masters
from minivlm.training.recipe import TrainingConfig, build
from minivlm.training.trainable import Trainable
from minivlm.world.batches import Batch, SceneBatches
from minivlm.world.look_alikes import LookAlikes, PointedBatch

MEASURED_SCENES = 100
ALIKE = ("alike", "last")  # stages


def parameter_groups(masters: nn.Module) -> dict[str, list[dict[str, Any]]]:
    """What each optimizer trains: Muon the matrices inside blocks, AdamW everything else.

    The tower is a group of its own in both, because it may learn more slowly. Saved states rely on the order.
    """
    groups: dict[str, list[dict[str, Any]]] = {
        "muon": [{"params": [], "tower": True}, {"params": [], "tower": False}],
        "adamw": [{"params": [], "tower": True}, {"params": [], "tower": False}],
    }
    for name, parameter in masters.named_parameters():
        is_block_matrix = ".layers." in name and parameter.dim() == 2
        tower, others = groups["muon" if is_block_matrix else "adamw"]
        group = tower if "vision_tower." in name else others
        group["params"].append(parameter)
    return groups


class Run(Trainable):
    """A training run at some step: the weights, the optimizers, and how to go one step further."""

    losses: tuple[str, ...] = ("patch", "answer")
    masters: nn.ModuleDict
    working: nn.ModuleDict

    def __init__(self, config: TrainingConfig, device: torch.device | str = "cpu", workers: int = 1) -> None:
        self.config = config
        self.device = torch.device(device)
        self.workers = workers
        self.step = 0
        if config.alike_steps or config.last_steps:
            self.losses = (*self.losses, "point")
        pictures = max(config.pictures, config.tower_pictures)
        require_room(config.parameters, pictures, config.image_size, device)
        self.model, self.processor = build(config)
        self.masters = nn.ModuleDict(
            {
                "model": self.model,
                "head": PatchHead(config.tower_width),
                "points": PointHead(config.text_width, config.text_layers),
            }
        )
        self.masters.to(self.device)
        bf16 = config.bf16 if config.bf16 is not None else bf16_pays(self.device)
        self.working = copy.deepcopy(self.masters).to(torch.bfloat16 if bf16 else torch.float32)
        self.compute: Callable[..., dict[str, Tensor]] = self._losses  # of rows of this process
        self.soft = SoftTargets(self.processor.tokenizer, config.loc_sigma)
        self.soft.bells = self.soft.bells.to(self.device)
        groups = parameter_groups(self.masters)
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": Muon(groups["muon"], lr=config.muon_lr, weight_decay=config.weight_decay),
            "adamw": torch.optim.AdamW(
                groups["adamw"], lr=config.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True
            ),
        }

    @property
    def total_steps(self) -> int:
        return self.config.total_steps

    def settings(self) -> dict[str, Any]:
        return asdict(self.config)

    def place(self) -> dict[str, Any]:
        return {"stage": self.config.stage(self.step - 1)}

    def batches(self) -> Iterator[Batch]:
        """The batches from the present step to the last, drawn ahead by worker processes."""
        config = self.config
        packed: dict[str, Any] = {
            "pictures": config.pictures,
            "questions": config.questions,
            "row_tokens": config.row_tokens,
        }
        single: dict[str, Any] = {
            "pictures": config.pictures,
            "questions": config.prefix_questions,
            "row_tokens": config.prefix_row_tokens,
            "packed": False,
        }
        draw = partial(SceneBatches, self.processor, config.patch_size, seed=config.seed)
        draw_alike = partial(LookAlikes, self.processor, config.patch_size, seed=config.seed)
        shares, pairs = (config.alike_share, config.last_share), (config.alike_pairs, config.last_pairs)

        def place(stage: str) -> dict[str, Any]:
            return {"steps": config.stages[stage], "first_step": config.first_step(stage)}

        stages = [
            draw(pictures=config.tower_pictures, questions=0, **place("tower")),
            draw(
                **packed,
                **place("packed"),
                easy_from=round(0.03 * config.packed_steps),
                easy_to=round(0.25 * config.packed_steps),
                relations=config.relations,
            ),
            draw(**packed, **place("review"), relations=config.review_relations),
            draw(**single, **place("prefix"), relations=config.relations),
            draw_alike(**packed, **place("alike"), alike=shares, pairs=pairs),
            draw_alike(**single, **place("last"), alike=(shares[1],) * 2, pairs=(pairs[1],) * 2),
        ]
        return in_order(ConcatDataset(stages), range(self.step, config.total_steps), self.workers)

    def advance(self, batch: Batch) -> dict[str, float]:
        """One step of optimization. Returns the losses."""
        batch = batch.to(self.device)
        pictures = share_of(self.among, range(len(batch.pixel_values)))
        losses = self.compute(batch if self.among is None else batch.part(pictures), batch)
        weights = {
            "patch": self.config.dense_weight if "answer" in losses else 1.0,
            "answer": 1.0,
            "point": self.config.point_weight,
        }
        loss = torch.stack([weights[name] * one for name, one in losses.items()]).sum()
        values = dict(zip(losses, total(self.among, [one.item() for one in losses.values()]), strict=True))
        for name, value in values.items():
            self.check_finite(f"the {name} loss", value)
        if self.step == self.config.first_step("alike"):
            for optimizer in self.optimizers.values():
                optimizer.state.clear()
        backward(self.among, loss)
        self._update()
        self.step += 1
        return values

    def _losses(self, mine: Batch, batch: Batch) -> dict[str, Tensor]:
        """What these pictures and their rows add to the losses of the batch."""
        stage = self.config.stage(self.step)
        model, head, points = (self.working[name] for name in ("model", "head", "points"))
        assert isinstance(model, PaliGemma)
        assert isinstance(head, PatchHead)
        assert isinstance(points, PointHead)
        pixels = mine.pixel_values.to(model.multi_modal_projector.weight.dtype)
        with torch.set_grad_enabled(stage not in ALIKE):
            tokens = model.vision_tower(pixels)
        losses = {}
        if stage not in ALIKE:
            share = len(mine.pixel_values) / len(batch.pixel_values)  # of a mean over pictures; alone, all
            things = (batch.patch_color > 0).sum() * share
            losses["patch"] = share * head.loss(tokens, mine, things)
        if stage != "tower":
            share = (mine.weights.sum() / batch.weights.sum()).item()  # of a mean over words
            read = points.layers if isinstance(batch, PointedBatch) else ()
            with states_after(model.language_model.layers, read) as states:
                answer = answer_loss(model, tokens, mine, stage in ("prefix", "last"), self.soft)
            losses["answer"] = share * answer
        if isinstance(batch, PointedBatch):
            assert isinstance(mine, PointedBatch)
            count = (~batch.points[..., 0].isnan()).sum()
            of_words = [state[:, tokens.shape[1] :] for state in states]
            losses["point"] = points.loss(of_words, mine.points, count)
        return losses

    def spread(self, among: Place) -> None:
        """Every process draws the whole batch, in which one picture's random numbers follow another's."""
        fewest = min(self.config.tower_pictures, self.config.pictures)
        if among.size > fewest:
            raise InputError(f"{among.size} processes share {fewest} pictures: start fewer processes")
        self.among = among
        self.compute = data_parallel(self.working, self._losses, among)

    def _update(self) -> None:
        """Hand the gradients to the masters, take one step of each optimizer, and hand the weights back."""
        masters = list(self.masters.parameters())
        for master in masters:
            master.grad = None
        collect_gradients(self.masters, self.working)
        self.check_finite("the gradient", nn.utils.clip_grad_norm_(masters, self.config.clip).item())
        factor = self.config.rate_factor(self.step)
        alone = self.config.stage(self.step) == "tower"
        for name, optimizer in self.optimizers.items():
            peak = self.config.muon_lr if name == "muon" else self.config.adamw_lr
            for group in optimizer.param_groups:
                # A decoder that knows nothing yet should not erase what the tower has learned alone.
                slow = group["tower"] and not alone
                group["lr"] = peak * factor * (self.config.tower_lr_factor if slow else 1.0)
            optimizer.step()
        follow_masters(self.masters, self.working)

    def advice(self) -> str:
        lower = f"--muon-lr {self.config.muon_lr / 2:g} --adamw-lr {self.config.adamw_lr / 2:g}"
        return f"try a lower learning rate in a new folder, such as {lower}"

    def measure(self) -> dict[str, float]:
        """How good the answers to held-out scenes are; nothing while only the tower learns."""
        if self.config.stage(self.step - 1) == "tower":
            return {}
        table = evaluate(
            self.model, self.processor, scenes=MEASURED_SCENES, columns=("held_out",), progress=False
        )
        return {name: metric.value for name, metric in table["held_out"].items()}

    def save(self, folder: Path) -> None:
        """The trained model so far, as a checkpoint folder."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def train(out: Path, config: TrainingConfig, *, loop: Loop = DEFAULT_LOOP) -> Run:
    """Train from nothing, or from where a run in `out` was stopped, and leave a checkpoint folder in `out`.

    Raises InputError: `out` holds a run and `loop.resume` is not set, or the other way round, or the run has
    another config; training diverges. See `minivlm.training.loop` for what is left in `out`.
    """
    with run_folder(out, loop.resume):
        run = Run(config, loop.device, loop.workers)
        run_to_end(run, out, loop)
        return run
