"""Training a tiny PaliGemma from nothing, on drawn scenes, in minutes on a laptop.

Three stages:

1. tower: one linear head per image token learns what lies on its patch. Without this the tower collapses:
   its tokens become alike, the answers are guesses, and the loss takes very long to tell.
2. packed: the whole model on several questions per picture, packed into one row. The picture does not see the
   questions yet, which is what makes packing possible.
3. prefix: one question per row under PaliGemma's true mask, where image and prompt see each other.

Matrices inside the blocks are trained with Muon (https://kellerjordan.github.io/posts/muon/), everything
else with AdamW. The forward and backward pass run in bf16 where the CPU multiplies it in hardware, the
weights that the optimizer holds stay in fp32.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm

from minivlm.batches import Batch, SceneBatches
from minivlm.checkpoints import load_state, save_state
from minivlm.errors import InputError
from minivlm.files import write_aside
from minivlm.interrupts import ignore_interrupts, note_interrupts
from minivlm.models.paligemma import PaliGemma
from minivlm.objectives import PatchHead, SoftTargets, answer_loss
from minivlm.recipe import TrainingConfig, build


class Run:
    """A training run at some step: the weights, the optimizers, and how to go one step further."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.step = 0
        self.model, self.processor = build(config)
        self.masters = nn.ModuleDict({"model": self.model, "head": PatchHead(config.tower_width)})
        bf16 = config.bf16 if config.bf16 is not None else torch.cpu._is_avx512_bf16_supported()
        self.working = copy.deepcopy(self.masters).to(torch.bfloat16 if bf16 else torch.float32)
        self.soft = SoftTargets(self.processor.tokenizer, config.loc_sigma)
        groups: dict[tuple[bool, bool], list[Tensor]] = {}  # by (is a block's matrix, is in the tower)
        for name, parameter in self.masters.named_parameters():
            key = (".layers." in name and parameter.dim() == 2, "vision_tower." in name)
            groups.setdefault(key, []).append(parameter)
        matrices, others = (
            [
                {"params": params, "tower": tower}
                for (matrix, tower), params in groups.items()
                if matrix == wanted
            ]
            for wanted in (True, False)
        )
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay),
            "adamw": torch.optim.AdamW(
                others, lr=config.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True
            ),
        }

    def batches(self) -> Iterator[Batch]:
        """The batches from the present step to the last, drawn ahead in a worker process."""
        config = self.config

        def stage(steps: int, pictures: int, questions: int, **options: Any) -> SceneBatches:
            return SceneBatches(
                self.processor,
                config.patch_size,
                seed=config.seed,
                steps=steps,
                pictures=pictures,
                questions=questions,
                **options,
            )

        first = config.tower_steps
        easy_from = round(0.03 * config.packed_steps)
        easy_to = round(0.25 * config.packed_steps)
        data: ConcatDataset[Batch] = ConcatDataset(
            [
                stage(config.tower_steps, config.tower_pictures, 0),
                stage(
                    config.packed_steps,
                    config.pictures,
                    config.questions,
                    row_tokens=config.row_tokens,
                    first_step=first,
                    easy_from=easy_from,
                    easy_to=easy_to,
                ),
                stage(
                    config.prefix_steps,
                    config.pictures,
                    config.prefix_questions,
                    first_step=first + config.packed_steps,
                    packed=False,
                ),
            ]
        )
        loader = DataLoader(
            data,
            batch_size=None,
            sampler=range(self.step, config.total_steps),
            num_workers=1,
            prefetch_factor=4,
            worker_init_fn=ignore_interrupts,
        )
        return iter(loader)

    def advance(self, batch: Batch) -> dict[str, float]:
        """One step of optimization. Returns the losses."""
        stage = self.config.stage(self.step)
        model, head = self.working["model"], self.working["head"]
        assert isinstance(model, PaliGemma)
        assert isinstance(head, PatchHead)
        pixels = batch.pixel_values.to(model.multi_modal_projector.weight.dtype)
        tokens = model.vision_tower(pixels)
        losses = {"patch": head.loss(tokens, batch)}
        loss = losses["patch"]
        if stage != "tower":
            losses["answer"] = answer_loss(model, tokens, batch, stage == "prefix", self.soft)
            loss = losses["answer"] + self.config.dense_weight * losses["patch"]
        loss.backward()
        self._update()
        self.step += 1
        return {name: value.item() for name, value in losses.items()}

    def _update(self) -> None:
        """Gradients of the working copy to the masters, one optimizer step, and the result back."""
        masters: list[Tensor] = list(self.masters.parameters())
        working: list[Tensor] = list(self.working.parameters())
        for master, copied in zip(masters, working, strict=True):
            master.grad = None if copied.grad is None else copied.grad.float()
            copied.grad = None
        nn.utils.clip_grad_norm_(masters, self.config.clip)
        factor = self._schedule()
        alone = self.config.stage(self.step) == "tower"
        for name, optimizer in self.optimizers.items():
            peak = self.config.muon_lr if name == "muon" else self.config.adamw_lr
            for group in optimizer.param_groups:
                # What the tower has learned alone should not be erased by a decoder that knows nothing yet.
                slow = group["tower"] and not alone
                group["lr"] = peak * factor * (self.config.tower_lr_factor if slow else 1.0)
            optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(working, masters)

    def _schedule(self) -> float:
        """Factor of the learning rates: warm-up and linear decay, once for the tower alone, once for all."""
        config = self.config
        if config.stage(self.step) == "tower":
            done, total = self.step, config.tower_steps
        else:
            done, total = self.step - config.tower_steps, config.packed_steps + config.prefix_steps
        return min(1.0, (done + 1) / config.warmup_steps) * (1.0 - done / total)

    def save(self, folder: Path) -> None:
        """The trained model so far, as a checkpoint folder."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def train(
    out: Path,
    config: TrainingConfig,
    *,
    resume: bool = False,
    save_every: int = 250,
    log_every: int = 50,
    progress: bool | None = None,
) -> Run:
    """Train from nothing, or from where a run in `out` was stopped, and leave a checkpoint folder in `out`.

    The state of the run is saved every `save_every` steps and on Ctrl-C, written aside and renamed: a run
    that is killed at any moment resumes from the last save, and ends with the same weights as one that was
    never interrupted (on the same machine with the same number of threads).

    Raises InputError: `out` holds a run and `resume` is not set, or the other way round, or the run has
    another config.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error.strerror}): choose another folder") from error
    state_file, log_file = out / "state.safetensors", out / "log.jsonl"
    if state_file.exists() and not resume:
        raise InputError(
            f"{out} holds a training run already: add --resume to continue it, or choose another folder"
        )
    if resume and not state_file.exists():
        raise InputError(f"{out} holds no training run to resume: leave out --resume to start one")
    run = Run(config)
    log: list[dict[str, Any]] = []
    unlogged: list[dict[str, float]] = []  # losses of the steps since the last line of the log
    if resume:
        run.step, unlogged = load_state(state_file, run.masters, run.optimizers, asdict(config))
        run.working.load_state_dict(run.masters.state_dict())
        log = [line for line in _read_log(log_file) if line["step"] <= run.step]

    def save() -> None:
        # The log first: killed in between, it has lines too many, which are easily left out.
        with write_aside(log_file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
        save_state(state_file, run.step, run.masters, run.optimizers, asdict(config), unlogged)

    bar = tqdm(
        run.batches(),
        initial=run.step,
        total=config.total_steps,
        unit="step",
        disable=None if progress is None else not progress,
    )
    with note_interrupts() as interrupted:
        for batch in bar:
            losses = run.advance(batch)
            if not all(value < float("inf") for value in losses.values()):
                raise InputError(
                    f"the loss is not a number at step {run.step}: try a lower learning rate, "
                    f"such as --muon-lr {config.muon_lr / 2:g} --adamw-lr {config.adamw_lr / 2:g}"
                )
            unlogged.append(losses)
            if run.step % log_every == 0:
                means = _means(unlogged)
                unlogged = []
                log.append({"step": run.step, "stage": config.stage(run.step - 1), **means})
                bar.set_postfix(
                    {name: f"{value:.3f}" for name, value in means.items()}, stage=log[-1]["stage"]
                )
            if interrupted():
                save()
                raise KeyboardInterrupt
            if run.step % save_every == 0:
                save()
    save()
    run.save(out)
    return run


def _means(steps: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each loss over the steps that have it."""
    values = {name: [step[name] for step in steps if name in step] for name in ("patch", "answer")}
    return {name: sum(some) / len(some) for name, some in values.items() if some}


def _read_log(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): delete it to go on without it") from error
