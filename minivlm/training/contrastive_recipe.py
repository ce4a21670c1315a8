"""What `minivlm train-contrastive` trains: two towers, every number that decides the result, and their start.

There are four ways to bring pictures and captions together. All compare n pictures with n captions in one
matrix. They differ in what they ask of it, and in what may change:

- clip: a softmax over every row and column (https://arxiv.org/abs/2103.00020).
- siglip: a sigmoid for every pair (https://arxiv.org/abs/2303.15343).
- lit: siglip with a locked image tower (https://arxiv.org/abs/2111.07991). The text tower learns to name what
  a tower trained earlier sees, by default PaliGemma's. That tower has no vector for a whole picture, so a
  pooling head is trained together with the text tower, and only the tower below it is locked.
- distill: clip, but with a teacher's rows and columns in place of "one caption is right, all others are
  wrong". So the student also learns which captions are nearly right.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import tokenizers
import torch
from tokenizers import normalizers, processors

from minivlm.errors import InputError
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.models.clip_resnet import ResNetCLIP
from minivlm.models.load import SHIPPED, load
from minivlm.models.paligemma import PaliGemma
from minivlm.models.siglip import SigLIP, SiglipConfig
from minivlm.processing import (
    CLIP_CAPTIONS,
    SIGLIP_CAPTIONS,
    CaptionForm,
    CaptionTokenizer,
    CLIPImageProcessor,
    ImageProcessor,
    PairProcessor,
    build_tokenizer,
)
from minivlm.processing.tokens import BOS, EOS, PAD, UNK
from minivlm.text.clip import CLIPTextConfig
from minivlm.text.siglip import SiglipTextConfig
from minivlm.training.limits import check_numbers, check_warmup
from minivlm.training.recipe import patch_positions
from minivlm.vision.clip import CLIPVisionConfig
from minivlm.vision.siglip import SiglipVisionConfig
from minivlm.world.scenes import COLORS, SHAPES, SIZES

Towers = CLIP | ResNetCLIP | SigLIP
Objective = Literal["clip", "siglip", "lit", "distill"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
SIZES_OF_TOWERS = (
    "image_size", "patch_size", "tower_width", "tower_layers", "tower_heads",
    "text_width", "text_layers", "text_heads", "max_length",
)  # fmt: skip


@dataclass(frozen=True)
class ContrastiveConfig:
    """Everything that decides the result, besides the data."""

    objective: Objective = "siglip"
    model: str | None = None  # folder or repo id to start from; lit: whose image tower is locked
    teacher: str | None = None  # of distill
    seed: int = 0
    image_size: int = 64
    patch_size: int = 8
    tower_width: int = 96
    tower_layers: int = 3
    tower_heads: int = 3
    text_width: int = 96
    text_layers: int = 2
    text_heads: int = 3
    max_length: int = 32  # tokens of a caption, including those for its start and end
    steps: int = 1000
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.02  # of matrices
    warmup_steps: int = 100
    clip: float = 1.0  # norm of the gradient
    bf16: bool | None = None  # None: where the device has instructions for it

    def __post_init__(self) -> None:
        """Raises InputError: a number that nothing can be trained with, or a teacher that does not belong."""
        if self.objective not in OBJECTIVES:
            raise InputError(f"there is no objective {self.objective!r}: choose from {', '.join(OBJECTIVES)}")
        check_numbers(asdict(self))
        check_warmup(self.warmup_steps, self.steps)
        if self.batch_size == 1:
            why = (
                "every pair would be right, and the answer always yes"
                if self.objective in ("siglip", "lit")
                else "a softmax over one caption is 1 whatever the towers do, so the loss is always 0"
            )
            raise InputError(f"batch_size is 1, and nothing is learned without wrong pairs: {why}")
        if (self.teacher is not None) != (self.objective == "distill"):
            needed = self.objective == "distill"
            raise InputError(
                "distill learns from a teacher: give the folder of a CLIP or SigLIP model"
                if needed
                else f"{self.objective} has no teacher: leave it out, or choose distill"
            )
        if self.image_size % self.patch_size:
            raise InputError(
                f"image_size {self.image_size} does not divide into patches of {self.patch_size}: "
                "choose a multiple"
            )
        if self.tower_width % 4:  # two coordinates, a sine and a cosine each
            raise InputError(f"tower_width is {self.tower_width}: choose a multiple of 4")

    @property
    def parameters(self) -> int:
        """About as many as new towers have."""
        tower = 12 * self.tower_layers * self.tower_width**2 + 3 * self.patch_size**2 * self.tower_width
        return tower + 12 * self.text_layers * self.text_width**2 + self.max_length * self.text_width


def build(config: ContrastiveConfig, texts: Iterable[str] | None = None) -> tuple[Towers, PairProcessor]:
    """The towers before their first step, the same for the same seed; locked parts need no gradient.

    Args:
        texts: whose words become tokens of new towers; None takes the captions of the drawn world.

    Raises InputError: the folder to start from cannot be loaded, or holds a model of another kind.
    """
    torch.manual_seed(config.seed)
    texts = drawn_captions() if texts is None else texts
    if config.objective == "lit":
        return _with_locked_tower(config, texts)
    if config.model is None:
        return (
            _new_clip(config, texts)
            if config.objective in ("clip", "distill")
            else _new_siglip(config, texts)
        )
    model, processor = load(config.model)
    wanted, kind = (SigLIP, "SigLIP") if config.objective == "siglip" else (CLIP | ResNetCLIP, "CLIP")
    if not isinstance(model, wanted):
        raise InputError(
            f"{config.model} holds a {type(model).__name__}, and {config.objective} trains a {kind}: "
            "choose another folder or another objective"
        )
    return model, processor


def drawn_captions() -> list[str]:
    """Captions with every word of the drawn world, also as their first."""
    names = [f"{size} {color} {shape}" for size in SIZES for color in COLORS for shape in SHAPES]
    words = [*SIZES, *COLORS, *SHAPES]
    return [f"a {name}, a {name}" for name in names] + words


def caption_tokenizer(texts: Iterable[str], form: CaptionForm) -> CaptionTokenizer:
    """A tokenizer in which every word of the texts, in lower case, is one token; others are split."""
    state = json.loads(build_tokenizer(text.lower() for text in texts).to_str())
    # Captions have no words for places and outlines, and no placeholder for a picture.
    state["added_tokens"] = [
        token for token in state["added_tokens"] if token["content"] in (PAD, BOS, EOS, UNK)
    ]
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), backend.normalizer])
    # For transformers. Our own tokenizer adds the start and the end itself.
    before = "" if form.bos_token is None else f"{form.bos_token} "
    added = [name for name in (form.bos_token, form.eos_token) if name is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{before}$A {form.eos_token}",
        special_tokens=[(name, backend.token_to_id(name)) for name in added],
    )
    return CaptionTokenizer(backend, form)


def _new_clip(config: ContrastiveConfig, texts: Iterable[str]) -> tuple[CLIP, PairProcessor]:
    form = replace(CLIP_CAPTIONS, bos_token=BOS, eos_token=EOS, pad_token=PAD, max_length=config.max_length)
    tokenizer = caption_tokenizer(texts, form)
    model = CLIP(
        CLIPConfig(
            vision=CLIPVisionConfig(
                hidden_size=config.tower_width,
                intermediate_size=4 * config.tower_width,
                num_hidden_layers=config.tower_layers,
                num_attention_heads=config.tower_heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
            ),
            text=CLIPTextConfig(
                hidden_size=config.text_width,
                intermediate_size=4 * config.text_width,
                num_hidden_layers=config.text_layers,
                num_attention_heads=config.text_heads,
                vocab_size=tokenizer.vocab_size,
                max_position_embeddings=config.max_length,
                pad_token_id=tokenizer.pad_id,
                bos_token_id=tokenizer.before[0],
                eos_token_id=tokenizer.eos_id,
            ),
            projection_dim=config.tower_width,
        )
    )
    with torch.no_grad():  # the first position belongs to the class token
        table = model.vision_model.embeddings.position_embedding.weight
        table[1:] = patch_positions(config.image_size // config.patch_size, config.tower_width)
    return model, PairProcessor(tokenizer, CLIPImageProcessor(image_size=config.image_size))


def _new_siglip(config: ContrastiveConfig, texts: Iterable[str]) -> tuple[SigLIP, PairProcessor]:
    vision = SiglipVisionConfig(
        hidden_size=config.tower_width,
        intermediate_size=4 * config.tower_width,
        num_hidden_layers=config.tower_layers,
        num_attention_heads=config.tower_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    model, tokenizer = _siglip(config, vision, texts)
    with torch.no_grad():
        table = model.vision_model.embeddings.position_embedding.weight
        table.copy_(patch_positions(config.image_size // config.patch_size, config.tower_width))
    return model, PairProcessor(tokenizer, ImageProcessor(image_size=config.image_size))


def _siglip(
    config: ContrastiveConfig, vision: SiglipVisionConfig, texts: Iterable[str]
) -> tuple[SigLIP, CaptionTokenizer]:
    form = replace(SIGLIP_CAPTIONS, eos_token=EOS, pad_token=PAD, max_length=config.max_length)
    tokenizer = caption_tokenizer(texts, form)
    text = SiglipTextConfig(
        hidden_size=config.text_width,
        intermediate_size=4 * config.text_width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=config.max_length,
        projection_size=vision.hidden_size,
    )
    return SigLIP(SiglipConfig(vision, text)), tokenizer


def _with_locked_tower(config: ContrastiveConfig, texts: Iterable[str]) -> tuple[SigLIP, PairProcessor]:
    """A new text tower and pooling head on a tower that stays as it is."""
    source, processor = load(config.model or SHIPPED)
    if not isinstance(source, PaliGemma | SigLIP):
        raise InputError(
            f"{config.model} holds a {type(source).__name__}, and lit locks the image tower of a PaliGemma "
            "or a SigLIP: choose another folder"
        )
    model, tokenizer = _siglip(config, source.config.vision, texts)
    tower = source.vision_tower if isinstance(source, PaliGemma) else source.vision_model
    model.vision_model.load_state_dict(tower.state_dict())
    model.vision_model.requires_grad_(False)
    if isinstance(source, SigLIP):  # its head has been trained as well
        model.head.load_state_dict(source.head.state_dict())
        model.head.requires_grad_(False)
    return model, PairProcessor(tokenizer, replace(processor.image_processor, image_seq_length=None))
