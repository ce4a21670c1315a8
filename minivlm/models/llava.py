"""LLaVA (https://arxiv.org/abs/2304.08485), in the form of version 1.5 (https://arxiv.org/abs/2310.03744).

    picture -> CLIP, second-last layer, patches -> two linear layers -> N image tokens ┐
                                                                                       ├-> Llama -> answer
    chat    -> embedding table --------------------------------------------------------┘

What differs from PaliGemma: the tower is CLIP's, read one layer before its end and without the class token;
the adapter is an MLP; the picture stands wherever the chat puts it; and everything is causal, so the picture
does not see the question. The last layer of CLIP serves its class token, which alone is trained to match a
caption, and says less about single places.

Later ones of the family have SigLIP's tower, which has no class token: there the strategy is "full", all that
the tower gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

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
from minivlm.checkpoints.layouts import LLAVA_LAYOUTS
from minivlm.configs import check_types, expect, known, part_of, require_system
from minivlm.errors import InputError
from minivlm.models.views import HasDecoder, merge_pictures, place
from minivlm.processing import LlavaProcessor
from minivlm.processing.llava import SETTINGS
from minivlm.text.llama import LlamaConfig, LlamaDecoder
from minivlm.vision.clip import CLIPVisionConfig, CLIPVisionModel
from minivlm.vision.siglip import SiglipVisionConfig, SiglipVisionModel

TowerConfig = CLIPVisionConfig | SiglipVisionConfig


@dataclass(frozen=True)
class LlavaConfig:
    """LLaVA 1.5: a CLIP tower, an MLP, a Llama. The defaults are llava-1.5-7b."""

    vision: TowerConfig = field(
        default_factory=lambda: CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        )
    )
    text: LlamaConfig = field(
        default_factory=lambda: LlamaConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)
    )
    vision_feature_layer: int = -2  # of the tower's `hidden_states`: 0 is what the first block reads
    vision_feature_select_strategy: str = "default"  # without the class token; "full" keeps it
    image_token_id: int = 32000
    pad_token_id: int = 32001
    bos_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = 2

    def __post_init__(self) -> None:
        check_types(self)
        layers = self.vision.num_hidden_layers
        if not -layers - 1 <= self.vision_feature_layer <= layers:
            raise InputError(
                f"vision_feature_layer is {self.vision_feature_layer}, but a tower of {layers} layers has "
                f"{-layers - 1} to {layers}: check the model's config.json"
            )
        if self.vision_feature_select_strategy not in ("default", "full"):
            raise InputError(
                f"vision_feature_select_strategy is {self.vision_feature_select_strategy!r}; only 'default' "
                "(without the class token) and 'full' are supported here"
            )
        if not self.has_class_token and self.vision_feature_select_strategy == "default":
            raise InputError(
                "vision_feature_select_strategy is 'default', which takes off the class token, and SigLIP's "
                "tower has none: with it, the strategy is 'full'"
            )

    @property
    def has_class_token(self) -> bool:
        """Whether the tower gives one before its patches."""
        return isinstance(self.vision, CLIPVisionConfig)

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of one picture."""
        keeps_class_token = self.has_class_token and self.vision_feature_select_strategy == "full"
        return self.vision.num_patches + keeps_class_token

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlavaConfig:
        """From a whole config.json. Raises InputError: it describes another system."""
        require_system(values, "llava")
        expect(values, "config.json", "projector_hidden_act", "gelu")
        expect(values, "config.json", "multimodal_projector_bias", True)
        expect(values, "config.json", "mm_projector_type", "mlp2x_gelu")  # what the original program calls it
        text = dict(part_of(values, "text_config"))
        # In transformers, the head is tied if either of two places says so.
        tied = "tie_word_embeddings"
        text[tied] = text.get(tied) or values.get(tied) or False
        image_id = values.get("image_token_id", values.get("image_token_index"))
        vision = part_of(values, "vision_config")
        tower = SiglipVisionConfig if vision.get("model_type") == "siglip_vision_model" else CLIPVisionConfig
        return cls(
            vision=tower.from_dict(vision),
            text=LlamaConfig.from_dict(text),
            # As in transformers, the ids of pad, bos and eos may stand at the top or in the text_config.
            **known(cls, {**values, "image_token_id": image_id, **special_ids(values, text)}),
        )

    def to_dict(self) -> dict[str, Any]:
        """A config.json that this package and transformers both read."""
        return {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "vision_config": self.vision.to_dict(),
            "text_config": self.text.to_dict(),
            "vision_feature_layer": self.vision_feature_layer,
            "vision_feature_select_strategy": self.vision_feature_select_strategy,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "image_seq_length": self.num_image_tokens,
            "image_token_index": self.image_token_id,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "tie_word_embeddings": self.text.tie_word_embeddings,
        }


class LlavaProjector(nn.Module):
    """Two linear layers with the exact GELU between them, from the width of the tower to the decoder's."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.vision.hidden_size, config.text.hidden_size)
        self.linear_2 = nn.Linear(config.text.hidden_size, config.text.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D_image] -> [..., D]."""
        return self.linear_2(F.gelu(self.linear_1(x)))


def _tower(config: TowerConfig) -> CLIPVisionModel | SiglipVisionModel:
    return CLIPVisionModel(config) if isinstance(config, CLIPVisionConfig) else SiglipVisionModel(config)


class Llava(HasDecoder):
    """The whole system."""

    config: LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = _tower(config.vision)
        self.multi_modal_projector = LlavaProjector(config)
        self.language_model = LlamaDecoder(config.text)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> image features [B, N, D] in the decoder's width."""
        pixel_values = pixel_values.to(self.multi_modal_projector.linear_1.weight.dtype)
        number = range(self.config.vision.num_hidden_layers + 1)[self.config.vision_feature_layer]
        tokens = next(islice(self.vision_tower.hidden_states(pixel_values), number, None))  # [B, (1 +) N, D]
        if self.config.vision_feature_select_strategy == "default":
            tokens = tokens[:, 1:]
        return self.multi_modal_projector(tokens)

    def merge(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Embed the tokens and replace the placeholders with the image features.

        Args:
            input_ids: [B, S], with N times image_token_id for each picture, in order.
            image_features: [pictures, N, D], or None without pictures. A row may have none or several.

        Returns:
            [B, S, D].
        Raises:
            ValueError: the numbers of placeholders and image features differ.
        """
        return merge_pictures(self, input_ids, image_features)

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, image: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """Llama reads pictures and words alike, from left to right."""
        return self.language_model(self.merge(input_ids, image), *place(attention_mask, cache), cache)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> Llava:
        """Load a local folder or a repo of the Hub; dtype None keeps the file's dtype.

        Raises InputError: see `minivlm.checkpoints`.
        """
        folder = find_folder(name)
        config = weights.with_other_files(folder, LlavaConfig.from_dict(read_config(folder)))
        return weights.load_model(cls, config, folder, LLAVA_LAYOUTS, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in the Hub's layout, which transformers loads too."""
        weights.save_model(self, self.config.to_dict(), Path(folder), LLAVA_LAYOUTS["hub"])


def open_folder(
    folder: Path, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> tuple[Llava, LlavaProcessor]:
    """Load the model and processor of a folder whose config.json holds `values`.

    The processor comes first: errors in its small files show up before the large ones are read.

    Raises InputError: the files do not match each other; otherwise as in `Llava.from_pretrained`.
    """
    config = LlavaConfig.from_dict(values)
    processor = LlavaProcessor.from_pretrained(
        folder,
        config.vision.patch_size,
        config.vision_feature_select_strategy,
        num_additional_image_tokens=int(config.has_class_token),
    )
    image_id, side = processor.tokenizer.image_id, processor.image_processor.image_size
    require_equal(folder, "the id of <image>", config.image_token_id, image_id, TOKENIZER)
    require_equal(folder, "the picture's side", config.vision.image_size, side, PICTURES)
    tokens = processor.image_seq_length
    require_equal(folder, "the number of image tokens", config.num_image_tokens, tokens, SETTINGS)
    ids = processor.tokenizer.backend.get_vocab().values()
    check_vocabulary(folder, config.text.vocab_size, (i for i in ids if i != image_id))  # it is a placeholder
    config = weights.with_other_files(folder, config)
    model = weights.load_model(Llava, config, folder, LLAVA_LAYOUTS, dtype=dtype, device=device)
    return model, processor
