"""Qwen2-VL (https://arxiv.org/abs/2409.12191): pictures of any size, several of them, and videos.

    pictures, videos -> patches -> tower -> merger: 2 x 2 patches -> one token ┐
                                                                               ├-> Qwen2 -> answer
    chat             -> embedding table ---------------------------------------┘

What differs from LLaVA: no picture is squashed, cropped or cut into tiles. It is resized a little, so that
its sides are whole numbers of patches, and takes as many tokens as its area asks for. So pixels come as one
row of patches, with a grid for each picture, [steps, rows, columns]. A token's position has three axes, so
that the decoder knows where in a picture it is (multimodal_positions.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

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
from minivlm.checkpoints.layouts import QWEN2_VL_LAYOUTS
from minivlm.configs import check_types, known, part_of, require_system
from minivlm.errors import InputError
from minivlm.models.multimodal_positions import Media, MultimodalCache, multimodal_positions
from minivlm.models.views import HasDecoder, place
from minivlm.processing import Qwen2VLProcessor
from minivlm.text.qwen2 import Qwen2Config, Qwen2Decoder
from minivlm.vision.qwen2_vl import Qwen2VLVisionConfig, Qwen2VLVisionModel


@dataclass(frozen=True)
class Qwen2VLConfig:
    """A tower and a decoder of one width. The defaults are Qwen2-VL-7B."""

    vision: Qwen2VLVisionConfig = field(default_factory=Qwen2VLVisionConfig)
    text: Qwen2Config = field(
        default_factory=lambda: Qwen2Config(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            rms_norm_eps=1e-6,
        )
    )
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    pad_token_id: int = 151643
    bos_token_id: int = 151643
    eos_token_id: int | tuple[int, ...] = 151645

    def __post_init__(self) -> None:
        check_types(self)
        check_widths(self.vision.hidden_size, self.text.hidden_size)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Qwen2VLConfig:
        """From a whole config.json. Raises InputError: it describes another system."""
        require_system(values, "qwen2_vl")
        vision = Qwen2VLVisionConfig.from_dict(part_of(values, "vision_config"))
        return cls(vision=vision, **known_beside_the_tower(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """A config.json that this package and transformers both read."""
        return {
            **self.text.to_dict(),  # in published files, not in a part of its own
            **ids_to_dict(self),
            "model_type": "qwen2_vl",
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "vision_config": self.vision.to_dict(),
        }


IDS = (
    "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def known_beside_the_tower(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder and the ids of a config.json, whose decoder may have a part of its own."""
    text = dict(part_of(values, "text_config") or values)
    tied = "tie_word_embeddings"
    text[tied] = text.get(tied) or values.get(tied) or False
    ids = {**values, **special_ids(values, text)}
    return {"text": Qwen2Config.from_dict(text), **known(cls, {name: ids.get(name) for name in IDS})}


def ids_to_dict(config: object) -> dict[str, Any]:
    """The ids of a config, for its config.json."""
    return {name: getattr(config, name) for name in IDS}


def check_processor(folder: Path, config: Any, processor: Qwen2VLProcessor) -> None:
    """Raise InputError if a folder's processor, of either system, does not match the config."""
    tokenizer, pictures, vision = processor.tokenizer, processor.image_processor, config.vision
    require_equal(folder, "the id of <|image_pad|>", config.image_token_id, tokenizer.image_id, TOKENIZER)
    require_equal(folder, "the id of <|video_pad|>", config.video_token_id, tokenizer.video_id, TOKENIZER)
    for what, expected, found in (
        ("the patch size", vision.patch_size, pictures.patch_size),
        ("the number of frames of a patch", vision.temporal_patch_size, pictures.temporal_patch_size),
        ("the merge size", vision.spatial_merge_size, pictures.merge_size),
    ):
        require_equal(folder, what, expected, found, PICTURES)
    check_vocabulary(folder, config.text.vocab_size, tokenizer.backend.get_vocab().values())


def check_widths(tower: int, decoder: int) -> None:
    """Raise InputError if the tower's tokens do not fit among the decoder's."""
    if tower != decoder:
        raise InputError(
            f"the tower gives tokens of {tower} numbers, and the decoder reads {decoder}: check the model's "
            "config.json"
        )


class Qwen2VL(HasDecoder):
    """The whole system."""

    config_class: ClassVar[Any] = Qwen2VLConfig
    tower_class: ClassVar[Any] = Qwen2VLVisionModel
    cache_class: ClassVar = MultimodalCache
    config: Qwen2VLConfig

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = self.tower_class(config.vision)
        self.language_model = Qwen2Decoder(config.text)

    def encode_image(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Patches [P, C * T * P * P] of pictures or videos with their grids [M, 3] -> image tokens [N, D]."""
        return self.vision_tower(pixel_values, image_grid_thw)

    def merge(self, input_ids: Tensor, media: Sequence[Media]) -> Tensor:
        """Embed the tokens [B, S] and replace placeholders with pictures and videos, in order: [B, S, D].

        Raises InputError: the numbers of placeholders and of the tokens of pictures or videos differ.
        """
        inputs_embeds = self.language_model.embed(input_ids)
        of_kind = {kind.placeholder: kind.features for kind in media}
        for name, placeholder in (
            ("image", self.config.image_token_id),
            ("video", self.config.video_token_id),
        ):
            is_here, features = input_ids == placeholder, of_kind.get(placeholder)
            places, given = int(is_here.sum()), 0 if features is None else len(features)
            if places != given:
                raise InputError(
                    f"input_ids hold {places} {name} placeholders and there are {given} {name} tokens: let "
                    "the processor build both"
                )
            if features is not None:
                inputs_embeds = inputs_embeds.masked_scatter(is_here[..., None], features.to(inputs_embeds))
        return inputs_embeds

    def intervals(self, grid_thw: Tensor, second_per_grid_ts: Tensor | None) -> Tensor:
        """Positions from one step of a video to the next, [M]. Here 1, however fast it was filmed."""
        return torch.ones(len(grid_thw))

    def encode_images(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
    ) -> list[Media]:
        """The pictures of a batch, and its videos.

        Args:
            input_ids: [B, S].
            pixel_values, image_grid_thw: patches of all pictures [P, C * T * P * P], and grids [M, 3].
            pixel_values_videos, video_grid_thw: the same for videos.
            second_per_grid_ts: [M], seconds from one step of each video to the next.

        Raises InputError: pixels without grids, or grids without pixels.
        """
        media = []
        for kind, placeholder, pixels, grids in (
            ("pictures", self.config.image_token_id, pixel_values, image_grid_thw),
            ("videos", self.config.video_token_id, pixel_values_videos, video_grid_thw),
        ):
            if (pixels is None) != (grids is None):
                raise InputError(f"{kind} need their pixels and their grids: let the processor build both")
            if pixels is not None and grids is not None:
                intervals = torch.zeros(len(grids))  # a picture is there at once
                if kind == "videos":
                    intervals = self.intervals(grids, second_per_grid_ts)
                media.append(Media(placeholder, grids, intervals, self.encode_image(pixels, grids)))
        return media

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image: Sequence[Media],
        cache: MultimodalCache | None = None,
    ) -> Tensor:
        """Qwen2 reads pictures and words from left to right, with positions in time, rows and columns."""
        inputs_embeds = self.merge(input_ids, image)
        position_ids, rope_deltas = self.positions(input_ids, attention_mask, image)
        _, mask = place(attention_mask, cache)
        if cache is not None:
            cache.rope_deltas = rope_deltas
        return self.language_model(inputs_embeds, position_ids, mask, cache)

    def positions(
        self, input_ids: Tensor, attention_mask: Tensor, media: Sequence[Media]
    ) -> tuple[Tensor, Tensor]:
        """As `multimodal_positions`: position_ids [3, B, S], rope_deltas [B]."""
        return multimodal_positions(input_ids, attention_mask, media, self.config.vision.spatial_merge_size)

    def read_on(self, input_ids: Tensor, attention_mask: Tensor, cache: MultimodalCache) -> Tensor:
        """As of every system with a decoder; a new word's position is its number and the row's delta."""
        inputs_embeds = self.language_model.embed(input_ids)
        numbers, mask = place(attention_mask, cache)
        position_ids = (numbers + cache.rope_deltas[:, None]).expand(3, -1, -1)
        return self.language_model(inputs_embeds, position_ids, mask, cache)

    def is_picture(self, input_ids: Tensor) -> Tensor:
        """As of every system with a decoder; videos have a token of their own."""
        return (input_ids == self.config.image_token_id) | (input_ids == self.config.video_token_id)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> Self:
        """Load a local folder or a repo of the Hub; dtype None keeps the file's dtype.

        Raises InputError: see `minivlm.checkpoints`.
        """
        folder = find_folder(name)
        config = weights.with_other_files(folder, cls.config_class.from_dict(read_config(folder)))
        return weights.load_model(cls, config, folder, QWEN2_VL_LAYOUTS, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in the Hub's layout, which transformers loads too."""
        weights.save_model(self, self.config.to_dict(), Path(folder), QWEN2_VL_LAYOUTS["hub"])


def open_folder(
    folder: Path, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> tuple[Qwen2VL, Qwen2VLProcessor]:
    """Load the model and processor of a folder whose config.json holds `values`.

    The processor comes first: errors in its small files show up before the large ones are read.

    Raises InputError: the files do not match each other; otherwise as in `Qwen2VL.from_pretrained`.
    """
    processor = Qwen2VLProcessor.from_pretrained(folder)
    check_processor(folder, Qwen2VLConfig.from_dict(values), processor)
    return Qwen2VL.from_pretrained(folder, dtype, device), processor
