"""Training the ways to let a language model see, each from the same start and on the same budget.

1. text: the language model alone learns the world's sentences. It never sees a picture, so it learns how
   questions are asked and which answers are frequent.
2. pictures: a way is put between this language model and the shipped image tower, and learns to answer. Each
   row is a picture of its own with one question. The tower stays as it is; what else stays, the way decides.

For the same seed, all ways start from the same language model and see the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, Dataset

from minivlm.errors import InputError
from minivlm.evaluation import evaluate
from minivlm.models.load import load
from minivlm.models.miniatures.base import Miniature, place
from minivlm.models.miniatures.clipcap import ClipCap, ClipCapConfig
from minivlm.models.miniatures.cm3 import CM3, CM3Config, causally_masked
from minivlm.models.miniatures.flamingo import Flamingo, FlamingoConfig
from minivlm.models.miniatures.simvlm import SimVLM, SimVLMConfig
from minivlm.models.miniatures.visualgpt import VisualGPT, VisualGPTConfig
from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Processor, Tokenizer
from minivlm.processing.inputs import IGNORE, Inputs, to_device
from minivlm.text.gpt2 import GPT2Config, GPT2Decoder
from minivlm.training.limits import check_numbers, check_warmup
from minivlm.training.loop import DEFAULT_LOOP, Loop, Trainable, in_order, run_folder, run_to_end
from minivlm.training.schedule import warm_up_then_fall
from minivlm.vision.conv_stem import ConvStemConfig
from minivlm.vision.siglip import SiglipVisionConfig, SiglipVisionModel
from minivlm.world.augmentations import varied
from minivlm.world.questions import Example, examples
from minivlm.world.scenes import make_scene

WIDTH, LAYERS, HEADS = 96, 4, 4  # of the language model
CONTEXT = 192  # positions: a picture of 64 patches, and the longest question with its answer
MAX_GRADIENT_NORM = 1.0
MEASURED_SCENES = 100
TEXT_ROWS = 500  # on which the language model is measured
# Streams of random numbers: [seed, stream, step].
TEXT_STREAM, PICTURE_STREAM, MEASURE_STREAM, SHIFT_STREAM = range(4)


def answer_loss(model: Miniature, inputs: Inputs, generator: torch.Generator) -> Tensor:
    """Mean cross-entropy of the answers' words: what most ways learn from."""
    loss = model(**inputs).loss
    assert loss is not None
    return loss


def moved_spans_loss(model: CM3, inputs: Inputs, generator: torch.Generator) -> Tensor:
    """Mean cross-entropy of every word of documents, some of whose spans are written last."""
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    moved = [causally_masked(ids[is_real], model.config, generator) for ids, is_real in rows]
    pad = partial(pad_sequence, batch_first=True)
    output = model(
        input_ids=pad([ids for ids, _ in moved], padding_value=model.config.pad_token_id),
        pixel_values=inputs["pixel_values"],
        attention_mask=pad([torch.ones_like(ids) for ids, _ in moved]),
        labels=pad([labels for _, labels in moved], padding_value=IGNORE),
    )
    assert output.loss is not None
    return output.loss


@dataclass(frozen=True)
class Way:
    """A system, and which of its parts learn from pictures."""

    build: Callable[..., Miniature]  # from a tower's config, a decoder's, the ids, and the tokenizer
    learns: tuple[str, ...]  # how the names of the weights begin that are trained
    about: str
    loss: Callable[[Any, Inputs, torch.Generator], Tensor] = answer_loss


def _clipcap(tokenizer: Tokenizer, **parts: Any) -> Miniature:
    return ClipCap(ClipCapConfig(num_mapping_layers=2, **parts))


def _clipcap_mlp(tokenizer: Tokenizer, **parts: Any) -> Miniature:
    return ClipCap(ClipCapConfig(mapping_type="mlp", **parts))


def _visualgpt(tokenizer: Tokenizer, **parts: Any) -> Miniature:
    return VisualGPT(VisualGPTConfig(encoder_intermediate_size=2 * WIDTH, **parts))


def _flamingo(tokenizer: Tokenizer, **parts: Any) -> Miniature:
    return Flamingo(
        FlamingoConfig(
            num_latents=16,
            resampler_depth=2,
            resampler_heads=HEADS,
            cross_attn_heads=HEADS,
            head_dim=WIDTH // HEADS,
            **parts,
        )
    )


def _cm3(tokenizer: Tokenizer, **parts: Any) -> Miniature:
    """Words for outlines serve as sentinels: no row here has any."""
    *sentinels, end = tokenizer.seg_ids[:5]
    return CM3(CM3Config(mask_token_ids=tuple(sentinels), end_of_mask_token_id=end, **parts))


def _simvlm(tokenizer: Tokenizer, vision: SiglipVisionConfig, **parts: Any) -> Miniature:
    size, patch = vision.image_size, vision.patch_size
    stem = ConvStemConfig(layers=(1, 1, 1), width=WIDTH // 16, image_size=size, patch_size=patch)
    return SimVLM(SimVLMConfig(vision=stem, **parts))


WAYS = {
    "simvlm": Way(
        _simvlm,
        ("vision_tower.", "projection.", "relative_attention.", "language_model."),
        "a stem of convolutions of its own, patches before the words; all learns",
    ),
    "cm3": Way(
        _cm3,
        ("projection.", "language_model."),
        "patches before the words, spans written last; the language model learns, too",
        moved_spans_loss,
    ),
    "clipcap": Way(
        _clipcap, ("clip_project.",), "one vector of the picture -> a prefix; the language model is frozen"
    ),
    "clipcap-mlp": Way(
        _clipcap_mlp,
        ("clip_project.", "language_model."),
        "the same by an MLP; the language model learns, too",
    ),
    "visualgpt": Way(
        _visualgpt,
        ("encoder.", "language_model."),
        "every block asks the patches, gates share out; the language model learns, too",
    ),
    "flamingo": Way(
        _flamingo,
        ("perceiver.", "gated_cross_attn_layers."),
        "gated blocks ask 16 latents, between frozen ones of the language model",
    ),
}


@dataclass(frozen=True)
class SystemConfig:
    """Everything that decides the result."""

    system: str
    seed: int = 0
    text_steps: int = 500  # of the language model alone
    steps: int = 600  # with pictures
    text_rows: int = 96  # of a step
    rows: int = 48
    lr: float = 3e-3
    warmup_steps: int = 100

    def __post_init__(self) -> None:
        """Raises InputError: a number that nothing can be trained with, or an unknown system."""
        check_numbers(asdict(self))
        if self.system not in WAYS:
            raise InputError(f"there is no system {self.system!r}: choose from {', '.join(WAYS)}")
        check_warmup(self.warmup_steps, self.steps)

    @property
    def total_steps(self) -> int:
        """Steps of both stages."""
        return self.text_steps + self.steps


@dataclass(frozen=True)
class SystemRows(Dataset[Inputs]):
    """Batch number `step` of a stage: rows with one question each, drawn when it is asked for."""

    processor: Processor
    seed: int
    stream: int
    steps: int
    rows: int
    with_pictures: bool = field(kw_only=True)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Inputs:
        rng = np.random.default_rng([self.seed, self.stream, step])
        scenes = [varied(make_scene(rng, "train"), rng) for _ in range(self.rows)]
        asked = [_one_question(examples(scene, rng)) for scene in scenes]
        pictures = None
        if self.with_pictures:
            size = self.processor.image_processor.image_size
            pictures = [scene.draw(size) for scene in scenes]
        prompts, answers = [one.prefix for one in asked], [one.suffix for one in asked]
        return self.processor(pictures, prompts, answers, padding_side="right")


def _one_question(endless: Iterator[Example]) -> Example:
    """The first that is not about masks: their 16 words a thing would take most of the budget."""
    return next(example for example in islice(endless, 20) if example.task != "segment")


def language_model_loss(decoder: GPT2Decoder, inputs: Inputs, shift: int = 0) -> Tensor:
    """Mean cross-entropy of every word of text rows, prompts too, as a language model reads them.

    Args:
        shift: the position of the first word. A way may put a picture before it.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    position_ids, seen = place(mask, None)
    hidden = decoder(decoder.embed(ids), position_ids + shift, seen)
    labels = ids.masked_fill(mask == 0, -100)[:, 1:]
    return F.cross_entropy(decoder.logits(hidden)[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)


def build(config: SystemConfig) -> tuple[Miniature, Processor]:
    """A system before its first step: the shipped tower, an untrained language model, the way between them.

    The language model is the same for the same seed, whatever the way.
    """
    shipped, processor = load()
    assert isinstance(shipped, PaliGemma)
    tokenizer = processor.tokenizer
    text = GPT2Config(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=CONTEXT,
    )
    torch.manual_seed(config.seed)
    decoder = GPT2Decoder(text)
    model = WAYS[config.system].build(
        vision=shipped.config.vision,
        text=text,
        tokenizer=tokenizer,
        image_token_id=tokenizer.image_id,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    # A block may have more than GPT-2's: what it asks the picture with is not in the language model.
    unknown = model.language_model.load_state_dict(decoder.state_dict(), strict=False).unexpected_keys
    assert not unknown
    if isinstance(model.vision_tower, SiglipVisionModel):  # and not a stem that learns with the rest
        model.vision_tower.load_state_dict(shipped.vision_tower.state_dict())
    pictures = replace(processor.image_processor, image_seq_length=model.config.num_image_tokens)
    return model, Processor(tokenizer, pictures)


class SystemRun(Trainable):
    """A training run of one way at some step."""

    losses = ("text", "answer")
    masters: Miniature

    def __init__(self, config: SystemConfig, device: torch.device | str = "cpu", workers: int = 1) -> None:
        self.config, self.workers = config, workers
        self.step = 0
        self.model, self.processor = build(config)
        self.masters = self.working = self.model.to(device)
        language_model = list(self.model.language_model.parameters())
        learns = WAYS[config.system].learns
        way = [weight for name, weight in self.model.named_parameters() if name.startswith(learns)]
        self.parts = {"text": language_model, "pictures": way}
        self.optimizers = {
            name: torch.optim.AdamW(weights, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)
            for name, weights in self.parts.items()
        }

    @property
    def total_steps(self) -> int:
        return self.config.total_steps

    @property
    def stage(self) -> str:
        """Of the next step."""
        return "text" if self.step < self.config.text_steps else "pictures"

    def settings(self) -> dict[str, Any]:
        return asdict(self.config)

    def place(self) -> dict[str, Any]:
        return {"stage": "text" if self.step <= self.config.text_steps else "pictures"}

    def batches(self) -> Iterator[Inputs]:
        config = self.config
        stages = [
            SystemRows(
                self.processor,
                config.seed,
                TEXT_STREAM,
                config.text_steps,
                config.text_rows,
                with_pictures=False,
            ),
            SystemRows(
                self.processor, config.seed, PICTURE_STREAM, config.steps, config.rows, with_pictures=True
            ),
        ]
        return in_order(ConcatDataset(stages), range(self.step, config.total_steps), self.workers)

    def advance(self, batch: Inputs) -> dict[str, float]:
        """One step of optimization. Returns the loss of its stage."""
        stage, config = self.stage, self.config
        batch = to_device(batch, self.model.device)
        weights = self.parts[stage]
        self.model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        if stage == "text":
            # From a place of its own in each step, so that what a picture takes up is nothing new.
            room = CONTEXT - batch["input_ids"].shape[1]
            shift = int(np.random.default_rng([config.seed, SHIFT_STREAM, self.step]).integers(room))
            name, loss = "text", language_model_loss(self.model.language_model, batch, shift)
            factor = warm_up_then_fall(self.step, config.text_steps, config.warmup_steps)
        else:
            generator = torch.Generator().manual_seed(config.seed * 2**32 + self.step)
            name, loss = "answer", WAYS[config.system].loss(self.model, batch, generator)
            factor = warm_up_then_fall(self.step - config.text_steps, config.steps, config.warmup_steps)
        self.check_finite(f"the {name} loss", loss.item())
        loss.backward()
        self.check_finite("the gradient", nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM).item())
        for of_stage, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = config.lr * factor if of_stage == stage else 0.0
        self.optimizers[stage].step()
        self.step += 1
        return {name: loss.item()}

    def advice(self) -> str:
        return f"try a lower learning rate in a new folder, such as --lr {self.config.lr / 2:g}"

    def measure(self) -> dict[str, float]:
        """How well the language model knows the text without a picture, and answers to held-out scenes."""
        self.model.eval()  # a stem's norms take the statistics of a batch while they learn
        found = {"text loss": self.text_loss()}
        if self.step > self.config.text_steps:
            table = evaluate(
                self.model, self.processor, scenes=MEASURED_SCENES, columns=("held_out",), progress=False
            )
            found |= {name: metric.value for name, metric in table["held_out"].items()}
        self.model.train()
        return found

    @torch.no_grad()
    def text_loss(self) -> float:
        """Of rows that no training saw, without a picture."""
        rows = SystemRows(self.processor, self.config.seed, MEASURE_STREAM, 1, TEXT_ROWS, with_pictures=False)
        return language_model_loss(self.model.language_model, to_device(rows[0], self.model.device)).item()

    def save(self, folder: Path) -> None:
        """The trained system so far, as a checkpoint folder."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def train_system(out: Path, config: SystemConfig, *, loop: Loop = DEFAULT_LOOP) -> SystemRun:
    """Train one way, or go on with the run in `out`, and leave a checkpoint folder there.

    Raises InputError: as `minivlm.training.scratch.train`.
    """
    with run_folder(out, loop.resume):
        run = SystemRun(config, loop.device, loop.workers)
        run_to_end(run, out, loop)
        return run
