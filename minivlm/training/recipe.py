"""What `minivlm train` trains: every number that decides the result, and the model before its first step.

The start is random except for two tables. Neighboring patches, and words for neighboring coordinates, start
with similar vectors (sines and cosines of their position). Both are rulers, and a model needs a long time to
find out the order of 1024 words by itself.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from minivlm.errors import InputError
from minivlm.models.paligemma import PaliGemma, PaliGemmaConfig
from minivlm.processing import ImageProcessor, Processor, Tokenizer, build_tokenizer
from minivlm.processing.boxes import NUM_BINS
from minivlm.text.gemma import GemmaConfig
from minivlm.training.limits import check_numbers, check_warmup
from minivlm.training.schedule import warm_up_then_fall
from minivlm.vision.siglip import SiglipVisionConfig
from minivlm.world.questions import vocabulary

CONTEXT = 512  # tokens
STAGES = ("tower", "packed", "review", "prefix", "alike", "last")


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
    review_steps: int = 2200
    prefix_steps: int = 900
    alike_steps: int = 2200
    last_steps: int = 600
    tower_pictures: int = 128  # per step
    pictures: int = 48
    questions: int = 9  # per picture at most, packed
    row_tokens: int = 104  # of packed questions
    prefix_questions: int = 3
    prefix_row_tokens: int = 40  # of one question
    muon_lr: float = 0.02
    adamw_lr: float = 0.003
    tower_lr_factor: float = 0.3  # of the tower's rates after its own stage
    review_lr_factor: float = 0.5  # of all rates, where they start again
    alike_lr_factor: float = 0.6  # the same, where they start a third time
    relations: int = 2  # questions about relations in a round of all
    review_relations: int = 5
    alike_share: float = 0.4  # of scenes in one color, when their stage begins
    alike_pairs: int = 5  # questions about pairs in a round of all, the same
    last_share: float = 0.1  # what they have come down to when the last stage begins
    last_pairs: int = 1
    weight_decay: float = 0.02
    warmup_steps: int = 100
    clip: float = 1.0  # norm of the gradient
    dense_weight: float = 0.5  # of the tower's own loss after its stage
    point_weight: float = 2.0  # of pointing's loss
    loc_sigma: float = 6.0  # bins; soft targets for coordinates
    bf16: bool | None = None  # None: where the device has instructions for it

    def __post_init__(self) -> None:
        """Raises InputError: a number that no model can be built from or trained with."""
        check_numbers(asdict(self))
        if self.total_steps == 0:
            raise InputError("no stage has any steps: nothing would be trained")
        check_warmup(self.warmup_steps, self.total_steps)
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
        # The tower's start positions have four parts; rotary positions rotate pairs of numbers in each head.
        multiples = {"tower": math.lcm(4, self.tower_heads), "text": 2 * self.text_heads}
        for part, multiple in multiples.items():
            width = getattr(self, f"{part}_width")
            if width % multiple:
                raise InputError(
                    f"{part}_width is {width}: with this number of heads, choose a multiple of {multiple}"
                )

    @property
    def parameters(self) -> int:
        """About as many as the model has."""
        tower = 12 * self.tower_layers * self.tower_width**2 + 3 * self.patch_size**2 * self.tower_width
        return tower + 8 * self.text_layers * self.text_width**2

    @property
    def stages(self) -> dict[str, int]:
        """How many steps each has, in their order."""
        return {name: getattr(self, f"{name}_steps") for name in STAGES}

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(self.stages.values())

    def first_step(self, stage: str) -> int:
        """How many steps are before a stage."""
        return sum(self.stages[name] for name in STAGES[: STAGES.index(stage)])

    def stage(self, step: int) -> str:
        """The stage that a step belongs to."""
        for name, steps in self.stages.items():
            step -= steps
            if step < 0:
                return name
        return STAGES[-1]

    def rate_factor(self, step: int) -> float:
        """The share of the peak learning rates, which go up and down in each part of the training."""
        stage = self.stage(step)
        parts = [("tower", "tower"), ("packed", "prefix"), ("review", "prefix"), ("alike", "last")]
        if not self.review_steps:
            del parts[2]
        first, last = next(part for part in reversed(parts) if stage in part)
        peak = {"review": self.review_lr_factor, "alike": self.alike_lr_factor}.get(first, 1.0)
        length = sum(self.stages[name] for name in {first, last})
        return peak * warm_up_then_fall(step - self.first_step(first), length, self.warmup_steps)


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
    """Give neighbors in space similar vectors from the start: patches, and the words for coordinates."""
    with torch.no_grad():
        table = model.vision_tower.embeddings.position_embedding.weight
        table.copy_(patch_positions(int(len(table) ** 0.5), table.shape[1]))
        embeddings = model.language_model.embed_tokens.weight
        width = embeddings.shape[1]
        locs = _waves(torch.arange(NUM_BINS), width, shortest=16.0, longest=2.0 * NUM_BINS)
        embeddings[torch.tensor(tokenizer.loc_ids)] = locs * (2 / width) ** 0.5


def patch_positions(side: int, width: int) -> Tensor:
    """Vectors [side * side, width] of the cells of a grid, row by row, where neighbors are similar."""
    waves = _waves(torch.arange(side), width // 2, shortest=4.0, longest=2.0 * side)
    rows, columns = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
    return 0.5 * torch.cat([rows, columns], dim=1)


def _waves(positions: Tensor, width: int, shortest: float, longest: float) -> Tensor:
    """Sines and cosines of positions [N] with wavelengths in a geometric series -> [N, width]."""
    wavelengths = shortest * (longest / shortest) ** torch.linspace(0, 1, width // 2)
    angles = 2 * torch.pi * positions[:, None] / wavelengths
    return torch.cat([angles.sin(), angles.cos()], dim=1)
