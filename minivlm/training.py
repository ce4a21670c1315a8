"""Training a tiny PaliGemma from nothing, on drawn scenes, in minutes on a laptop.

Three stages:

1. tower: one linear head per image token learns what lies on its patch. Without this the tower collapses:
   its tokens become alike, the answers are guesses, and the loss takes very long to tell.
2. packed: the whole model on six questions per picture, packed into one row. The picture does not see the
   questions yet, which is what makes packing possible.
3. prefix: one question per row under PaliGemma's true mask, where image and prompt see each other.

Matrices inside the blocks are trained with Muon (https://kellerjordan.github.io/posts/muon/), everything
else with AdamW. The forward and backward pass run in bf16 where the CPU multiplies it in hardware, the
weights that the optimizer holds stay in fp32.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm

from minivlm.batches import Batch, SceneBatches, question_mask
from minivlm.checkpoints import load_state, save_state
from minivlm.configs import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
from minivlm.errors import InputError
from minivlm.files import write_aside
from minivlm.models.paligemma import PaliGemma
from minivlm.processing import ImageProcessor, Processor, Tokenizer, build_tokenizer
from minivlm.scenes import COLORS, SHAPES, SIZES, WORLD, vocabulary

LOC_BINS = 1024
CONTEXT = 512  # tokens


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the result. The defaults made the shipped model."""

    seed: int = 0
    image_size: int = 64
    patch_size: int = 8
    tower_width: int = 96
    tower_layers: int = 3
    tower_heads: int = 3
    text_width: int = 128
    text_layers: int = 4
    text_heads: int = 4
    tower_steps: int = 1500
    packed_steps: int = 5000
    prefix_steps: int = 900
    tower_pictures: int = 128  # per step
    pictures: int = 48
    questions: int = 8  # per picture at most, packed
    row_tokens: int = 84  # of packed questions
    prefix_questions: int = 3
    muon_lr: float = 0.02
    adamw_lr: float = 0.003
    tower_lr_factor: float = 0.3  # of the tower's rates in stages 2 and 3
    weight_decay: float = 0.02
    warmup_steps: int = 100
    clip: float = 1.0
    dense_weight: float = 0.5  # of the tower's own loss in stages 2 and 3
    loc_sigma: float = 6.0  # bins; soft targets for coordinates
    bf16: bool | None = None  # None: where the CPU has instructions for it

    def __post_init__(self) -> None:
        """Raises InputError: a number that no model can be built from or trained with."""
        may_be_zero = ("seed", "tower_steps", "packed_steps", "prefix_steps")
        for name, value in asdict(self).items():
            least = 0 if isinstance(value, float) or name in may_be_zero else 1
            least = 16 if name == "row_tokens" else least  # a short question with its answer
            if name != "bf16" and not least <= value < 2**32:
                raise InputError(f"{name} is {value}: choose a number from {least} to below 2^32")
        if self.total_steps == 0:
            raise InputError("no stage has any steps: nothing would be trained")
        if self.image_size % self.patch_size:
            raise InputError(
                f"image_size {self.image_size} does not divide into patches of {self.patch_size}: "
                "choose a multiple"
            )
        if (self.image_size // self.patch_size) ** 2 > CONTEXT - 128:  # tokens for a question and an answer
            raise InputError(
                f"pictures of {self.image_size} pixels in patches of {self.patch_size} leave no room for "
                f"words in {CONTEXT} tokens: choose larger patches"
            )
        # The tower's start positions have four parts; rotary positions turn pairs of numbers in each head.
        multiples = {"tower": math.lcm(4, self.tower_heads), "text": 2 * self.text_heads}
        for part, multiple in multiples.items():
            width = getattr(self, f"{part}_width")
            if width % multiple:
                raise InputError(
                    f"{part}_width is {width}: with this number of heads, choose a multiple of {multiple}"
                )

    @property
    def total_steps(self) -> int:
        """Steps of all three stages."""
        return self.tower_steps + self.packed_steps + self.prefix_steps

    def stage(self, step: int) -> str:
        """The stage that a step belongs to."""
        if step < self.tower_steps:
            return "tower"
        return "packed" if step < self.tower_steps + self.packed_steps else "prefix"


def build(config: TrainingConfig) -> tuple[PaliGemma, Processor]:
    """An untrained model with its processor, the same for the same seed."""
    torch.manual_seed(config.seed)
    patches = (config.image_size // config.patch_size) ** 2
    processor = Processor(
        Tokenizer(build_tokenizer(vocabulary())),
        ImageProcessor(image_size=config.image_size, image_seq_length=patches),
    )
    tokenizer = processor.tokenizer
    model = PaliGemma(
        PaliGemmaConfig(
            vision=SiglipVisionConfig(
                hidden_size=config.tower_width,
                intermediate_size=4 * config.tower_width,
                num_hidden_layers=config.tower_layers,
                num_attention_heads=config.tower_heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
            ),
            text=GemmaConfig(
                hidden_size=config.text_width,
                intermediate_size=2 * config.text_width,
                num_hidden_layers=config.text_layers,
                num_attention_heads=config.text_heads,
                num_key_value_heads=1,
                head_dim=config.text_width // config.text_heads,
                vocab_size=tokenizer.vocab_size,
                max_position_embeddings=CONTEXT,
            ),
            image_token_id=tokenizer.image_id,
            pad_token_id=tokenizer.pad_id,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
        )
    )
    _start_positions(model, tokenizer)
    return model, processor


def _start_positions(model: PaliGemma, tokenizer: Tokenizer) -> None:
    """Give neighbors in space like vectors from the start: patches, and the words for coordinates."""
    with torch.no_grad():
        table = model.vision_tower.embeddings.position_embedding.weight
        side = int(len(table) ** 0.5)
        waves = _waves(torch.arange(side), table.shape[1] // 2, shortest=4.0, longest=2.0 * side)
        rows, columns = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
        table.copy_(0.5 * torch.cat([rows, columns], dim=1))
        embeddings = model.language_model.embed_tokens.weight
        width = embeddings.shape[1]
        locs = _waves(torch.arange(LOC_BINS), width, shortest=16.0, longest=2.0 * LOC_BINS)
        embeddings[torch.tensor(tokenizer.loc_ids)] = locs * (2 / width) ** 0.5


def _waves(positions: Tensor, width: int, shortest: float, longest: float) -> Tensor:
    """Sines and cosines of positions [N] with wavelengths in a geometric series -> [N, width]."""
    wavelengths = shortest * (longest / shortest) ** torch.linspace(0, 1, width // 2)
    angles = 2 * torch.pi * positions[:, None] / wavelengths
    return torch.cat([angles.sin(), angles.cos()], dim=1)


# ---- losses ------------------------------------------------------------------------------------------------


class PatchHead(nn.Linear):
    """One linear layer that says for each image token what lies on its patch. Thrown away after training."""

    sizes = (1 + len(COLORS), 1 + len(SHAPES), 1 + len(SIZES), 4)

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, sum(self.sizes))

    def loss(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of color, shape and size, and the error of the box, from tokens [P, N, D]."""
        color, shape, size, box = self(tokens).float().split(self.sizes, dim=-1)
        pairs = ((color, batch.patch_color), (shape, batch.patch_shape), (size, batch.patch_size))
        loss = torch.stack(
            [F.cross_entropy(logits.flatten(0, 1), labels.flatten()) for logits, labels in pairs]
        )
        on_thing = (batch.patch_color > 0)[..., None]
        scale = WORLD / 4  # units; brings the box error to the size of the other losses
        error = F.smooth_l1_loss(box, batch.patch_box / scale, reduction="none", beta=0.1)
        return loss.sum() + (error * on_thing).sum() / (4 * on_thing.sum())


def answer_loss(
    model: PaliGemma, image_tokens: Tensor, batch: Batch, image_sees_prompt: bool, soft: SoftTargets
) -> Tensor:
    """Weighted cross-entropy of the answers' tokens.

    Args:
        image_tokens: [P, N, D], the tower's output.
        image_sees_prompt: the true prefix-LM mask; needs one question per row.
        soft: targets for the words that are coordinates.
    """
    features = model.multi_modal_projector(image_tokens)[batch.pictures]  # [R, N, D]
    embeds = torch.cat([features, model.language_model.embed(batch.input_ids)], dim=1)  # [R, S, D]
    mask, position_ids = question_mask(batch, features.shape[1], image_sees_prompt)
    hidden = model.language_model(embeds, position_ids, mask)
    # The token at text place t is predicted at the place before it. Only answers need logits.
    before = hidden[:, features.shape[1] - 1 : -1]
    wanted = batch.labels != -100
    logits = model.logits(before[wanted]).float()  # [answers' tokens, V]
    losses = soft.cross_entropy(logits, batch.labels[wanted])
    weights = batch.weights[wanted]
    return (losses * weights).sum() / weights.sum()


class SoftTargets:
    """Cross-entropy that forgives a coordinate that is nearly right.

    The 1024 `<loc>` words are a ruler, and one-hot targets do not say so: bin 300 is as wrong as bin 900
    when the label is 301. Here the label of a coordinate is a bell of width sigma around its bin.
    """

    def __init__(self, tokenizer: Tokenizer, sigma: float) -> None:
        self.first = tokenizer.loc_ids[0]
        self.columns = slice(self.first, self.first + LOC_BINS)
        bins = torch.arange(LOC_BINS, dtype=torch.float32)
        bells = (
            torch.exp(-0.5 * ((bins[:, None] - bins[None]) / sigma) ** 2) if sigma else torch.eye(LOC_BINS)
        )
        self.bells = bells / bells.sum(dim=1, keepdim=True)  # [1024, 1024]

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [n, V], labels [n] -> losses [n]."""
        log_probabilities = logits.log_softmax(dim=-1)
        losses = -log_probabilities.gather(1, labels[:, None])[:, 0]
        is_loc = (labels >= self.first) & (labels < self.first + LOC_BINS)
        bells = self.bells[labels[is_loc] - self.first]
        soft = -(bells * log_probabilities[is_loc, self.columns]).sum(dim=-1)
        return losses.masked_scatter(is_loc, soft)


# ---- one run -----------------------------------------------------------------------------------------------


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
            worker_init_fn=_ignore_interrupts,
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
    with _note_interrupts() as interrupted:
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


@contextmanager
def _note_interrupts() -> Iterator[Callable[[], bool]]:
    """Ask the function given whether Ctrl-C was pressed; the second time it stops everything at once.

    An exception in the middle of a step would leave weights of which some are a step ahead.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where Python allows no signal handlers
        yield noted.is_set
        return

    def note(number: int, frame: object) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches worker processes too. They have to deliver until the main process lets go of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
