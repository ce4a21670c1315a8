"""Training Qwen2-VL and Qwen2.5-VL in small, from nothing, in the world that moves.

Two stages:

1. tower: a linear head on each image token learns what lies in its cell, and where that moves. Without it
   nothing is learned about motion: an answer is one word, and says little about 64 tokens. A tower of this
   kind sees two frames at once, so two frames of each clip are enough. What differs between them is faint
   beside what does not; the first layer begins where both are equally loud (`whiten`).
2. answers: the decoder learns from several questions about each clip or picture, packed into one row. The
   blocks of the tower stay as they are; its merger goes on learning, with the head. A second head asks each
   image token where it stands, in time, row and column. A rotary position turns queries and keys, never
   values, so nothing that a block passes on says where it comes from until some block has found out.

Every other step of the second stage shows pictures, which cost half as much: to find the thing that a
question names is the same in both, and takes longest to learn. Clips have 1 or 2 frames a second, and
pictures eight shapes. So both are learned: that time is no number of frames, and that a place is no number of
a patch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from minivlm.errors import InputError
from minivlm.evaluation.clips import evaluate_clips
from minivlm.models.qwen2_5_vl import Qwen2_5_VL, Qwen2_5_VLConfig
from minivlm.models.qwen2_vl import Qwen2VL, Qwen2VLConfig
from minivlm.processing import Qwen2_5_VLProcessor, Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLProcessor
from minivlm.processing.inputs import IGNORE, to_device
from minivlm.processing.qwen2_tokens import build_qwen2_tokenizer
from minivlm.processing.video_budget import VideoBudget
from minivlm.text.qwen2 import Qwen2Config
from minivlm.training.folder import run_folder
from minivlm.training.limits import check_numbers, check_warmup
from minivlm.training.loop import DEFAULT_LOOP, Loop, in_order, run_to_end
from minivlm.training.muon import Muon
from minivlm.training.schedule import warm_up_then_fall
from minivlm.training.trainable import Trainable
from minivlm.vision.qwen2_5_vl import Qwen2_5_VLVisionConfig
from minivlm.vision.qwen2_vl import PatchEmbeddings, Qwen2VLVisionConfig
from minivlm.world import clip_questions, questions
from minivlm.world.clip_batches import CLASSES, PICTURE_SIDES, ClipBatch, ClipBatches

PATCH, MERGED, FRAMES_AT_ONCE = 8, 2, 2
TOWER_WIDTH, TOWER_LAYERS, TOWER_HEADS = 64, 3, 4
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS = 96, 4, 3
WINDOW = 32  # pixels
# A published decoder's slow pairs turn with the columns of a picture: in 3 to 6 of them, by next to nothing.
THETA = 30.0
SECTIONS = (4, 6, 6)
MEASURED_CLIPS = 50
SYSTEMS = {
    "qwen2_vl": "Qwen2-VL in small: pictures of any shape, and clips, in a world that moves",
    "qwen2_5_vl": "the same as Qwen2.5-VL: windows in the tower, and time in seconds",
}


@dataclass(frozen=True)
class MovingConfig:
    """Everything that decides the result."""

    system: str
    seed: int = 0
    tower_steps: int = 500
    steps: int = 2500
    rows: int = 40  # clips or pictures of a step
    questions: int = 4  # about each: more of them are the same ones again
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    weight_decay: float = 0.02
    warmup_steps: int = 50
    dense_weight: float = 0.5  # of the losses on cells and on places, after the tower's stage
    clip: float = 1.0  # norm of the gradient

    def __post_init__(self) -> None:
        """Raises InputError: a number that nothing can be trained with, or an unknown system."""
        check_numbers(asdict(self))
        if self.system not in SYSTEMS:
            raise InputError(f"there is no system {self.system!r}: choose from {', '.join(SYSTEMS)}")
        check_warmup(self.warmup_steps, self.steps)


def build(system: str, seed: int) -> tuple[Qwen2VL, Qwen2VLProcessor]:
    """A system before its first step, and its processor."""
    tokenizer = Qwen2Tokenizer(build_qwen2_tokenizer(texts()))
    torch.manual_seed(seed)
    text = Qwen2Config(
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=TEXT_HEADS,
        num_key_value_heads=TEXT_HEADS,
        vocab_size=len(tokenizer.backend.get_vocab()),
        max_position_embeddings=512,
        rope_theta=THETA,
        mrope_section=SECTIONS,
        tie_word_embeddings=True,
    )
    sizes: dict[str, Any] = {"depth": TOWER_LAYERS, "num_heads": TOWER_HEADS, "patch_size": PATCH}
    ids: dict[str, Any] = {
        "image_token_id": tokenizer.image_id,
        "video_token_id": tokenizer.video_id,
        "vision_start_token_id": tokenizer.vision_id,
        "vision_end_token_id": tokenizer.vision_end_id,
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    # Half of the usual values: pictures are bright, and both classes share the numbers of SigLIP's processor.
    half = (0.5, 0.5, 0.5)
    pictures = Qwen2VLImageProcessor(
        image_mean=half, image_std=half, min_pixels=32 * 32, max_pixels=96 * 96, patch_size=PATCH
    )
    budget = VideoBudget(
        fps=2.0, min_frames=2, max_frames=8, min_pixels=32 * 32, max_pixels=80 * 64, total_pixels=8 * 80 * 64
    )
    model: Qwen2VL
    if system == "qwen2_vl":
        tower = Qwen2VLVisionConfig(embed_dim=TOWER_WIDTH, hidden_size=TEXT_WIDTH, **sizes)
        model = Qwen2VL(Qwen2VLConfig(vision=tower, text=text, **ids))
        processor = Qwen2VLProcessor(tokenizer, pictures, budget, system="")
    else:
        windows = Qwen2_5_VLVisionConfig(
            hidden_size=TOWER_WIDTH,
            out_hidden_size=TEXT_WIDTH,
            intermediate_size=8 * TOWER_WIDTH // 3,
            window_size=WINDOW,
            fullatt_block_indexes=(TOWER_LAYERS - 1,),
            tokens_per_second=2,  # as in the published folders
            **sizes,
        )
        model = Qwen2_5_VL(cast(Any, Qwen2_5_VLConfig(vision=windows, text=text, **ids)))
        processor = Qwen2_5_VLProcessor(tokenizer, pictures, budget, system="")
    return model, processor


def texts() -> Iterator[str]:
    """Every word that is asked or answered."""
    yield from questions.vocabulary()
    yield from clip_questions.vocabulary()
    yield "user\nassistant\nsystem\n"


QUIET = 0.1  # numbers of a pixel are -1 to 1, and noise is half as loud


@torch.no_grad()
def whiten(embeddings: PatchEmbeddings, patches: Tensor) -> None:
    """Let a tower's first layer begin with the principal components of patches [P, C * T * P * P].

    Each is divided by its spread (and QUIET, so that noise stays quiet). A patch is mostly its mean color;
    which of its two frames has the color where is a small part of it, and is all that tells of motion.
    """
    weight = embeddings.patch_embedding.weight
    spread, components = torch.linalg.eigh(patches.float().T.cov())  # ascending
    scale = spread[-len(weight) :].clamp(min=0.0).sqrt() + QUIET
    weight.copy_((components[:, -len(weight) :] / scale).T.view_as(weight))


# How far a token may stand behind the first of its clip: in time, rows and columns.
PLACES = {"time": 16, "row": 8, "column": 8}


class CellHead(nn.Linear):
    """One linear layer that says of each image token what lies in its cell. Discarded after training."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, sum(CLASSES.values()))

    def scores(self, tokens: Tensor) -> dict[str, Tensor]:
        """Image tokens [N, D] -> scores [N, classes] by name."""
        return dict(zip(CLASSES, self(tokens).float().split([*CLASSES.values()], dim=-1), strict=True))

    def loss(self, tokens: Tensor, batch: ClipBatch) -> Tensor:
        """Sum of the cross-entropies of all that CLASSES names."""
        parts = [
            F.cross_entropy(scores, batch.cells[name], ignore_index=IGNORE)
            for name, scores in self.scores(tokens).items()
            if bool((batch.cells[name] != IGNORE).any())
        ]
        return torch.stack(parts).sum()


class PlaceHead(nn.Linear):
    """One linear layer that says where an image token stands. Discarded after training."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, sum(PLACES.values()))

    def loss(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Sum of the cross-entropies of time, row and column: tokens [N, D], places [3, N]."""
        scores = self(tokens).float().split([*PLACES.values()], dim=-1)
        parts = [F.cross_entropy(of_axis, place) for of_axis, place in zip(scores, places, strict=True)]
        return torch.stack(parts).sum()


class Reading(NamedTuple):
    """What a batch's decoder has read."""

    loss: Tensor  # weighted cross-entropy of the answers' tokens
    tokens: Tensor  # [N, D], image tokens as the tower gives them
    early: Tensor  # [N, D], image tokens after the decoder's first block
    places: Tensor  # [3, N], how far each stands behind the first of its clip: in time, rows and columns


def read(model: Qwen2VL, batch: ClipBatch) -> Reading:
    """Read clips with all their questions."""
    start = batch.start
    before, of_questions = batch.input_ids[:, :start], batch.offsets[:, start:]
    media = model.encode_images(before, **batch.pixels)
    position_ids, deltas = model.positions(before, torch.ones_like(before), media)
    image = before == media[0].placeholder  # [B, S], the same in each row
    places = position_ids[:, image].unflatten(1, (len(before), -1))
    places = places - places.amin(dim=2, keepdim=True)
    later = start + deltas[:, None] + of_questions  # each question begins where the clip ends
    position_ids = torch.cat([position_ids, later.expand(3, -1, -1)], dim=2)
    embeds = model.merge(batch.input_ids, media)
    passed: list[Tensor] = []
    first = model.language_model.layers[0]
    hook = first.register_forward_hook(lambda module, arguments, output: passed.append(output))
    try:
        hidden = model.language_model(embeds, position_ids, batch.mask())
    finally:
        hook.remove()
    wanted = batch.labels[:, 1:] != IGNORE
    logits = model.logits(hidden[:, :-1][wanted]).float()
    losses = F.cross_entropy(logits, batch.labels[:, 1:][wanted], reduction="none")
    weights = batch.weights[:, 1:][wanted]
    loss = (losses * weights).sum() / weights.sum()
    return Reading(loss, media[0].features, passed[0][:, :start][image], places.flatten(1).round().long())


class MovingRun(Trainable):
    """A training run at some step."""

    losses = ("cells", "place", "answer")
    measure_every = 500
    batch_class: type[ClipBatches] = ClipBatches
    masters: nn.ModuleDict

    def __init__(self, config: MovingConfig, device: torch.device | str = "cpu", workers: int = 1) -> None:
        self.config, self.workers = config, workers
        self.step = 0
        self.model, self.processor = build(config.system, config.seed)
        self.prepare(device)

    def prepare(self, device: torch.device | str) -> None:
        """A head for the cells, one for places, and the optimizers of both stages."""
        config = self.config
        self.head, self.places = CellHead(TEXT_WIDTH), PlaceHead(TEXT_WIDTH)
        parts = {"model": self.model, "head": self.head, "places": self.places}
        self.masters = self.working = nn.ModuleDict(parts).to(device)
        tower = [*self.model.vision_tower.parameters(), *self.head.parameters()]
        merger = [*self.model.vision_tower.merger.parameters(), *self.head.parameters()]
        decoder = [*self.model.language_model.parameters(), *self.places.parameters()]
        self.parts = {"tower": tower, "answers": [*merger, *decoder]}
        linear = {id(module.weight) for module in self.model.modules() if isinstance(module, nn.Linear)}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for stage, weights in self.parts.items():
            matrices = [weight for weight in weights if id(weight) in linear]
            others = [weight for weight in weights if id(weight) not in linear]
            self.optimizers[f"{stage}_muon"] = Muon(
                matrices, lr=config.muon_lr, weight_decay=config.weight_decay
            )
            self.optimizers[f"{stage}_adamw"] = torch.optim.AdamW(
                others, lr=config.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0
            )

    @property
    def total_steps(self) -> int:
        return self.config.tower_steps + self.config.steps

    def stage_of(self, step: int) -> str:
        """The stage that a step belongs to."""
        return "tower" if step < self.config.tower_steps else "answers"

    def settings(self) -> dict[str, Any]:
        return asdict(self.config)

    def place(self) -> dict[str, Any]:
        return {"stage": self.stage_of(max(self.step - 1, 0))}

    def batches(self) -> Iterator[ClipBatch]:
        config = self.config
        draw = partial(self.batch_class, self.processor, seed=config.seed, rows=config.rows)
        of_tower = draw(steps=config.tower_steps, questions=0, pairs=True, sides=PICTURE_SIDES)
        of_answers = draw(
            steps=config.steps,
            questions=config.questions,
            first_step=config.tower_steps,
            pictures=2,
            easy_to=config.steps // 4,
        )
        steps = range(self.step, self.total_steps)
        return in_order(ConcatDataset([of_tower, of_answers]), steps, self.workers)

    def advance(self, batch: ClipBatch) -> dict[str, float]:
        """One step of optimization. Returns the losses."""
        config, stage = self.config, self.stage_of(self.step)
        weights = self.parts[stage]
        self.masters.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        batch = _on(batch, self.model.device)
        losses = {}
        if stage == "tower":
            if self.step == 0:
                patches = next(tensor for name, tensor in batch.pixels.items() if name.startswith("pixel"))
                whiten(self.model.vision_tower.embeddings, patches)
            media = self.model.encode_images(batch.input_ids, **batch.pixels)
            losses["cells"] = loss = self.head.loss(media[0].features, batch)
        else:
            reading = read(self.model, batch)
            losses["answer"] = reading.loss
            losses["cells"] = self.head.loss(reading.tokens, batch)
            losses["place"] = self.places.loss(reading.early, reading.places)
            loss = losses["answer"] + config.dense_weight * (losses["cells"] + losses["place"])
        for name, value in losses.items():
            self.check_finite(f"the {name} loss", value.item())
        loss.backward()
        self.check_finite("the gradient", nn.utils.clip_grad_norm_(weights, config.clip).item())
        first, steps = (0, config.tower_steps) if stage == "tower" else (config.tower_steps, config.steps)
        factor = warm_up_then_fall(self.step - first, steps, min(config.warmup_steps, max(steps // 4, 1)))
        for kind, optimizer in self.optimizers.items():
            peak = config.muon_lr if kind.endswith("_muon") else config.adamw_lr
            optimizer.param_groups[0]["lr"] = peak * factor if kind.startswith(f"{stage}_") else 0.0
        for kind in ("muon", "adamw"):
            self.optimizers[f"{stage}_{kind}"].step()
        self.step += 1
        return {name: value.item() for name, value in losses.items()}

    def advice(self) -> str:
        lower = f"--muon-lr {self.config.muon_lr / 2:g} --adamw-lr {self.config.adamw_lr / 2:g}"
        return f"try lower learning rates in a new folder, such as {lower}"

    def measure(self) -> dict[str, float]:
        """How good the answers about held-out clips are; nothing while only the tower learns."""
        if self.stage_of(self.step - 1) == "tower":
            return {}
        table = evaluate_clips(self.model, self.processor, MEASURED_CLIPS, progress=False)
        return {name: metric.value for name, metric in table.items()}

    def save(self, folder: Path) -> None:
        """The trained model so far as a checkpoint folder, in bf16."""
        copy.deepcopy(self.model).to(torch.bfloat16).save_pretrained(folder)
        self.processor.save_pretrained(folder)


def _on(batch: ClipBatch, device: torch.device) -> ClipBatch:
    """The same batch where the model computes."""
    tensors = {n: t.to(device) for n, t in vars(batch).items() if isinstance(t, Tensor)}
    return ClipBatch(pixels=to_device(batch.pixels, device), cells=to_device(batch.cells, device), **tensors)


def train_moving(out: Path, config: MovingConfig, *, loop: Loop = DEFAULT_LOOP) -> MovingRun:
    """Train one system, or go on with the run in `out`, and leave a checkpoint folder there.

    Raises InputError: as `minivlm.training.scratch.train`.
    """
    with run_folder(out, loop.resume):
        run = MovingRun(config, loop.device, loop.workers)
        run_to_end(run, out, loop)
        return run
