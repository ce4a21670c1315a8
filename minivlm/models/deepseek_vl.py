"""DeepSeek-VL (https://arxiv.org/abs/2403.05525) with one image tower, as in the 1.3B models.

    picture -> SigLIP, all patches -> two linear layers -> N image tokens ┐
                                                                          ├-> Llama -> answer
    chat    -> embedding table -------------------------------------------┘

What differs from LLaVA: the tower is SigLIP's, with the exact GELU, and is read to its end, with the last
norm; and pictures are padded to a square. The decoder is DeepSeek's own language model, a Llama in form. The
7B models add a second tower, see deepseek_vl_hybrid.py. What both compute beside the picture is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.cache import KVCache
from minivlm.checkpoints import weights
from minivlm.checkpoints.hub import (
    PICTURES,
    TOKENIZER,
    check_vocabulary,
    find_folder,
    read_config,
    require_equal,
    special_ids,
)
from minivlm.checkpoints.layouts import DEEPSEEK_VL_LAYOUTS, Layout
from minivlm.configs import check_types, known, part_of, require_system
from minivlm.models.views import HasDecoder, merge_pictures, place
from minivlm.processing.deepseek_vl import DeepseekVLProcessor
from minivlm.processing.llava import SETTINGS
from minivlm.text.llama import LlamaConfig, LlamaDecoder
from minivlm.vision.siglip import SiglipVisionConfig, SiglipVisionModel

SIGLIP_LARGE = SiglipVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=384,
    hidden_act="gelu",
)


@dataclass(frozen=True)
class DeepseekVLConfig:
    """A SigLIP tower, an MLP, a Llama. The defaults are deepseek-vl-1.3b."""

    vision: SiglipVisionConfig = SIGLIP_LARGE
    text: LlamaConfig = field(
        default_factory=lambda: LlamaConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=16,
            vocab_size=102400,
            max_position_embeddings=16384,
        )
    )
    image_token_id: int = 100015
    pad_token_id: int = 100001
    bos_token_id: int = 100000
    eos_token_id: int | tuple[int, ...] = 100001

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of one picture."""
        return self.vision.num_patches

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From a whole config.json of transformers. Raises InputError: it describes another system."""
        require_system(values, "deepseek_vl")
        return cls(**known_beside_sam(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """A config.json that this package and transformers both read."""
        return {
            "model_type": "deepseek_vl",
            "architectures": ["DeepseekVLForConditionalGeneration"],
            **to_dict_beside_sam(self),
        }


def known_beside_sam(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The SigLIP tower, the decoder and the ids of a config.json of either system."""
    vision, text = (dict(part_of(values, name)) for name in ("vision_config", "text_config"))
    act = vision.pop("hidden_act", None) or SiglipVisionConfig.hidden_act
    # In transformers, the head is tied if either of two places says so, or if the first says nothing.
    tied = "tie_word_embeddings"
    text[tied] = bool(text.get(tied)) or values.get(tied) in (None, True)
    return {
        "vision": replace(SiglipVisionConfig.from_dict(vision), hidden_act=act),
        "text": LlamaConfig.from_dict(text),
        **known(cls, {"image_token_id": values.get("image_token_id"), **special_ids(values, text)}),
    }


def to_dict_beside_sam(config: Any) -> dict[str, Any]:
    """The other way around."""
    names = ("image_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
    return {
        "vision_config": config.vision.to_dict(),
        "text_config": config.text.to_dict(),
        **{name: getattr(config, name) for name in names},
        "tie_word_embeddings": config.text.tie_word_embeddings,
    }


class DeepseekVLAligner(nn.Module):
    """Two linear layers with the exact GELU between them, from the width of the tower to the decoder's."""

    def __init__(self, vision_width: int, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(vision_width, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D_image] -> [..., D]."""
        return self.linear2(F.gelu(self.linear1(x)))


class DeepseekVL(HasDecoder):
    """The whole system."""

    config_class: ClassVar[Any] = DeepseekVLConfig
    layouts: ClassVar[dict[str, Layout]] = DEEPSEEK_VL_LAYOUTS
    config: DeepseekVLConfig

    def __init__(self, config: DeepseekVLConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = SiglipVisionModel(config.vision)
        self.aligner: nn.Module = DeepseekVLAligner(config.vision.hidden_size, config.text.hidden_size)
        self.language_model = LlamaDecoder(config.text)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> image features [B, N, D] in the decoder's width."""
        dtype = self.vision_tower.post_layernorm.weight.dtype
        return self.aligner(self.vision_tower(pixel_values.to(dtype)))

    def merge(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """As in LLaVA: input_ids [B, S], image_features [pictures, N, D] -> [B, S, D]."""
        return merge_pictures(self, input_ids, image_features)

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, image: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """The decoder reads pictures and words alike, from left to right."""
        return self.language_model(self.merge(input_ids, image), *place(attention_mask, cache), cache)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> Self:
        """Load a local folder or a repo of the Hub; dtype None keeps the file's dtype.

        Raises InputError: see `minivlm.checkpoints`.
        """
        folder = find_folder(name)
        return cls.from_folder(folder, cls.config_class.from_dict(read_config(folder)), dtype, device)

    @classmethod
    def from_folder(
        cls, folder: Path, config: Any, dtype: torch.dtype | None, device: torch.device | str
    ) -> Self:
        """Load a folder whose config.json says `config`. Raises InputError: see `minivlm.checkpoints`."""
        config = weights.with_other_files(folder, config)
        return weights.load_model(cls, config, folder, cls.layouts, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors as transformers does, which loads them, too."""
        weights.save_model(self, self.config.to_dict(), Path(folder), self.layouts["hub"])


def check_processor(folder: Path, config: Any, processor: DeepseekVLProcessor) -> None:
    """Raise InputError if a folder's processor, of either system, does not match the config."""
    tokenizer, tokens = processor.tokenizer, processor.image_seq_length
    require_equal(
        folder, f"the id of {tokenizer.names.image}", config.image_token_id, tokenizer.image_id, TOKENIZER
    )
    side = processor.image_processor.image_size
    require_equal(folder, "the picture's side", config.vision.image_size, side, PICTURES)
    require_equal(folder, "the number of image tokens", config.num_image_tokens, tokens, SETTINGS)
    check_vocabulary(folder, config.text.vocab_size, tokenizer.backend.get_vocab().values())


def end_where_the_tokenizer_ends(model: DeepseekVL, processor: DeepseekVLProcessor) -> None:
    """Let answers end at the tokenizer's end token, whatever else ends them.

    A folder that transformers has written may name 2, which ends Llama's texts and is a sign here.
    """
    ends = model.config.eos_token_id
    ends = (ends,) if isinstance(ends, int) else ends
    if processor.tokenizer.eos_id not in ends:
        model.config = replace(model.config, eos_token_id=(*ends, processor.tokenizer.eos_id))


def open_folder(
    folder: Path, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> tuple[DeepseekVL, DeepseekVLProcessor]:
    """Load the model and processor of a folder whose config.json holds `values`.

    The processor comes first: errors in its small files show up before the large ones are read.

    Raises InputError: the files do not match each other; otherwise as in `DeepseekVL.from_pretrained`.
    """
    config = DeepseekVLConfig.from_dict(values)
    processor = DeepseekVLProcessor.from_pretrained(folder)
    check_processor(folder, config, processor)
    model = DeepseekVL.from_folder(folder, config, dtype, device)
    end_where_the_tokenizer_ends(model, processor)
    return model, processor
