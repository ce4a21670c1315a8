"""DeepSeek-VL2 (https://arxiv.org/abs/2412.10302): tiles, latent attention and experts.

    picture -> the whole, and tiles -> SigLIP -> 2 x 2 patches in one token -> rows with newlines ┐
                                                                                                  ├-> decoder
    chat    -> embedding table ───────────────────────────────────────────────────────────────────┘

What differs from DeepSeek-VL: in place of a second tower for large pictures, one tower reads a picture in
tiles, as many as its shape asks for; a picture has 421 tokens or more instead of 576, laid out with a learned
newline and separator (processing/deepseek_vl2_tiles.py); and the decoder is DeepSeek-V2's, in which a token
meets only a few of many experts.

Folders are those of https://github.com/deepseek-ai/DeepSeek-VL2; transformers (5.23) has no such class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.cache import KVCache
from minivlm.checkpoints import weights
from minivlm.checkpoints.hub import (
    check_vocabulary,
    find_folder,
    read_config,
    require_equal,
    special_ids,
)
from minivlm.checkpoints.layouts import DEEPSEEK_VL2_LAYOUTS
from minivlm.configs import check_types, expect, part_of, require_system
from minivlm.errors import InputError
from minivlm.models.views import HasDecoder, place
from minivlm.models.writing import WritingOutput
from minivlm.processing.deepseek_vl2 import DeepseekVL2Processor
from minivlm.processing.deepseek_vl2_tiles import arrange_views, candidates
from minivlm.processing.inputs import Inputs
from minivlm.processing.llava import SETTINGS
from minivlm.text.deepseek_v2 import DeepseekV2Config, DeepseekV2Decoder
from minivlm.text.moe import MoEConfig, balancing_loss, record_routing
from minivlm.vision.deepseek_vl2 import (
    SIGLIP_SO400M,
    DownsampleProjector,
    places_of_tokens,
    tower_from_dict,
    tower_to_dict,
)
from minivlm.vision.siglip import SiglipVisionConfig, SiglipVisionModel


@dataclass(frozen=True)
class DeepseekVL2Config:
    """A SigLIP tower, an MLP, DeepSeek-V2. The defaults are deepseek-vl2-tiny."""

    vision: SiglipVisionConfig = SIGLIP_SO400M
    text: DeepseekV2Config = field(
        default_factory=lambda: DeepseekV2Config(
            hidden_size=1280,
            intermediate_size=6848,
            num_hidden_layers=12,
            num_attention_heads=10,
            num_key_value_heads=10,
            vocab_size=129280,
            max_position_embeddings=4096,
            first_k_dense_replace=1,
            mla=None,
            moe=MoEConfig(),
        )
    )
    downsample_ratio: int = 2  # patches, on a side, that become one token
    candidate_resolutions: tuple[tuple[int, ...], ...] = candidates(384)
    image_token_id: int = 128815
    pad_token_id: int = 2
    bos_token_id: int = 0
    eos_token_id: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeepseekVL2Config:
        """From a whole config.json. The tokenizer knows better about ids.

        Raises InputError: it describes another system (DeepSeek-OCR's says the same `model_type`), another
        projector, or another layout of tokens.
        """
        require_system(values, "deepseek_vl_v2")
        language, projector = part_of(values, "language_config"), part_of(values, "projector_config")
        text = DeepseekV2Config.from_dict(language)
        for part, name, supported in (
            (values, "tile_tag", "2D"),
            (values, "global_view_pos", "head"),
            (projector, "projector_type", "downsample_mlp_gelu"),
            (projector, "depth", 2),
            (projector, "mlp_ratio", 1),
            (projector, "token_pooling", False),
        ):
            expect(part, "config.json" if part is values else "projector_config", name, supported)
        if "tile_tag" not in values:
            raise InputError('config.json has no tile_tag: expected "2D", as in DeepSeek-VL2\'s folders')
        vision = tower_from_dict(part_of(values, "vision_config"))
        for name, default, needed in (
            ("input_dim", 1152, vision.hidden_size),
            ("n_embed", 2048, text.hidden_size),
        ):
            if projector.get(name, default) != needed:
                raise InputError(
                    f"projector_config has {name} = {projector.get(name, default)!r} between parts of widths "
                    f"{vision.hidden_size} and {text.hidden_size}: download config.json again"
                )
        sizes = values.get("candidate_resolutions") or [[vision.image_size] * 2]
        if not isinstance(sizes, list) or not all(isinstance(size, list) for size in sizes):
            raise InputError(f"candidate_resolutions are {sizes!r}: expected pairs of numbers")
        return cls(
            vision=vision,
            text=text,
            downsample_ratio=projector.get("downsample_ratio", 2),
            candidate_resolutions=tuple(tuple(size) for size in sizes),
            **special_ids(language),
        )

    def to_dict(self) -> dict[str, Any]:
        """A config.json that the original program reads, too."""
        vision, eos = self.vision, self.eos_token_id
        return {
            "model_type": "deepseek_vl_v2",
            "architectures": ["DeepseekVLV2ForCausalLM"],
            "tile_tag": "2D",
            "global_view_pos": "head",
            "candidate_resolutions": [list(size) for size in self.candidate_resolutions],
            "vision_config": tower_to_dict(vision),
            "projector_config": {
                "model_type": "mlp_projector",
                "projector_type": "downsample_mlp_gelu",
                "input_dim": vision.hidden_size,
                "n_embed": self.text.hidden_size,
                "downsample_ratio": self.downsample_ratio,
            },
            "language_config": {
                **self.text.to_dict(),
                "bos_token_id": self.bos_token_id,
                "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
            },
        }


class DeepseekVL2(HasDecoder):
    """The whole system."""

    config: DeepseekVL2Config

    def __init__(self, config: DeepseekVL2Config) -> None:
        super().__init__()
        self.config = config
        width = config.text.hidden_size
        self.vision_tower = SiglipVisionModel(config.vision)
        self.projector = DownsampleProjector(config.vision.hidden_size, width, config.downsample_ratio)
        self.image_newline = nn.Parameter(torch.empty(width))
        self.view_separator = nn.Parameter(torch.empty(width))
        for mark in (self.image_newline, self.view_separator):
            nn.init.normal_(mark, std=width**-0.5)
        self.language_model = DeepseekV2Decoder(config.text)

    def encode_image(
        self, pixel_values: Tensor, images_spatial_crop: Tensor, image_sizes: Tensor | None = None
    ) -> Tensor:
        """Views of M pictures -> their tokens, one picture after the other, in the decoder's width.

        Args:
            pixel_values: [V, C, side, side], of each picture the whole, then its tiles row by row.
            images_spatial_crop: [M, 2], columns and rows of tiles.
            image_sizes: taken, as part of what the processor returns, and not used.

        Returns:
            [N, D], with `newline` and `separator` in it.
        Raises:
            InputError: another number of views than the grids ask for, or a grid without tiles.
        """
        grids = [(int(columns), int(rows)) for columns, rows in images_spatial_crop.tolist()]
        counts = [1 + columns * rows for columns, rows in grids]
        if len(pixel_values) != sum(counts) or min(map(min, grids), default=1) < 1:
            raise InputError(
                f"there are {len(pixel_values)} views, and grids of {grids} tiles (columns, rows) need "
                f"{sum(counts)}, one for the whole of each picture and one for each tile: let the processor "
                "build both"
            )
        pixel_values = pixel_values.to(self.image_newline.dtype)
        side = self.config.vision.image_size // self.config.vision.patch_size
        patches = self.vision_tower(pixel_values).unflatten(1, (side, side))  # [V, side, side, D_image]
        views = self.projector(patches).split(counts)
        marks = self.image_newline, self.view_separator
        pictures = zip(views, grids, strict=True)
        return torch.cat([arrange_views(of_picture, *marks, grid) for of_picture, grid in pictures])

    def merge(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Embed the tokens and replace the placeholders with the image features.

        Args:
            input_ids: [B, S], with image_token_id for each image token, in order.
            image_features: [N, D] of `encode_image`, or None without pictures.

        Returns:
            [B, S, D].
        Raises:
            InputError: the numbers of placeholders and image features differ.
        """
        is_image = input_ids == self.config.image_token_id  # [B, S]
        placeholders, features = int(is_image.sum()), 0 if image_features is None else len(image_features)
        if placeholders != features:
            raise InputError(
                f"input_ids hold {placeholders} image placeholders and the pictures give {features} image "
                "tokens: how many a picture needs depends on its tiles; let the processor build both"
            )
        inputs_embeds = self.language_model.embed(input_ids)
        if image_features is None:
            return inputs_embeds
        return inputs_embeds.masked_scatter(is_image[..., None], image_features.to(inputs_embeds.dtype))

    def encode_images(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        images_spatial_crop: Tensor | None = None,
        image_sizes: Tensor | None = None,
    ) -> Tensor | None:
        """As `encode_image`, or None without pictures. Raises InputError: views without grids; as there."""
        if (pixel_values is None) != (images_spatial_crop is None):
            raise InputError(
                "pictures need pixel_values and images_spatial_crop: let the processor build both"
            )
        if pixel_values is None or images_spatial_crop is None:
            return None
        return self.encode_image(pixel_values, images_spatial_crop)

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, image: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """The decoder reads pictures and words alike, from left to right."""
        return self.language_model(self.merge(input_ids, image), *place(attention_mask, cache), cache)

    def new_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """As in the decoder, which knows what its attention keeps."""
        return self.language_model.new_cache(batch_size, dtype, device)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **pixels: Tensor,
    ) -> WritingOutput:
        """As of every system with a decoder; in training, the loss also keeps the experts in balance.

        It has the gradient of the balance in it, not its value: what is reported stays comparable. Balance
        counts padding, too, as in the original program.
        """
        see = input_ids, pixel_values, attention_mask, token_type_ids, labels
        moe = self.config.text.moe
        if moe is None or labels is None or not self.training:
            return super().forward(*see, **pixels)
        with record_routing() as routings:
            output = super().forward(*see, **pixels)
        losses = (balancing_loss(routing, moe.seq_aux) for routing in routings)
        balance = moe.aux_loss_alpha * sum(losses, torch.zeros((), device=self.device))
        assert output.loss is not None
        return replace(output, loss=output.loss + balance - balance.detach())

    def places_of_tokens(self, pixels: Inputs) -> Tensor:
        """As in `minivlm.models.protocols.HasTiles`: the places are the patches of the view of the whole."""
        columns, rows = pixels["images_spatial_crop"][0].tolist()
        width, height = pixels["image_sizes"][0].tolist()
        vision, ratio = self.config.vision, self.config.downsample_ratio
        return places_of_tokens(vision, ratio, (columns, rows), (width, height)).to(self.device)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> DeepseekVL2:
        """Load a local folder or a repo of the Hub; dtype None keeps the file's dtype.

        Raises InputError: see `minivlm.checkpoints`; its processor's files are read, too, for the ids.
        """
        folder = find_folder(name)
        return open_folder(folder, read_config(folder), dtype, device)[0]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors as the published folders have them."""
        weights.save_model(self, self.config.to_dict(), Path(folder), DEEPSEEK_VL2_LAYOUTS["hub"])


def open_folder(
    folder: Path, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> tuple[DeepseekVL2, DeepseekVL2Processor]:
    """Load the model and processor of a folder whose config.json holds `values`.

    The processor comes first: errors in its small files show up before the large ones are read.

    Raises InputError: the files do not match each other, or are not supported.
    """
    config, processor = DeepseekVL2Config.from_dict(values), DeepseekVL2Processor.from_pretrained(folder)
    tokenizer, pictures = processor.tokenizer, processor.image_processor
    for what, expected, found in (
        ("the side of a tile", config.vision.image_size, pictures.image_size),
        ("the side of a patch", config.vision.patch_size, processor.patch_size),
        (
            "the number of patches beside each other in a token",
            config.downsample_ratio,
            processor.downsample_ratio,
        ),
    ):
        require_equal(folder, what, expected, found, SETTINGS)
    if config.candidate_resolutions != pictures.candidate_resolutions:
        raise InputError(
            f"in {folder}, candidate_resolutions in config.json are not those in {SETTINGS}: take all files "
            "from the same checkpoint"
        )
    check_vocabulary(folder, config.text.vocab_size, tokenizer.backend.get_vocab().values())
    config = replace(
        config,
        image_token_id=tokenizer.image_id,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    config = weights.with_other_files(folder, config)
    model = weights.load_model(DeepseekVL2, config, folder, DEEPSEEK_VL2_LAYOUTS, dtype=dtype, device=device)
    return model, processor
