"""PaliGemma (https://arxiv.org/abs/2407.07726): a picture as a prefix of text.

    picture -> SigLIP -> one linear layer -> N image tokens ┐
                                                            ├-> Gemma -> answer
    prompt  -> embedding table, times sqrt(D) --------------┘

The input ids contain N placeholders `<image>`, and `merge` replaces their embeddings with the image features.
Image and prompt together are the prefix: they see each other in both directions. The answer is the suffix:
it is causal, and only it has a loss. Image features are *not* multiplied by sqrt(D): the linear layer has
learned the right scale, and in bf16, dividing by the factor and multiplying again would change the values.

PaliGemma 2 (https://arxiv.org/abs/2412.03555) replaces Gemma with Gemma 2. Nothing else changes here: the
config tells `build_decoder` which one to build.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm import masks
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
from minivlm.checkpoints.layouts import PALIGEMMA_LAYOUTS
from minivlm.checkpoints.weights import with_other_files as _with_other_files
from minivlm.configs import check_types, known
from minivlm.errors import InputError
from minivlm.generate import generate, stream
from minivlm.processing import Processor
from minivlm.processing.inputs import check_rows
from minivlm.text.gemma import GemmaConfig, GemmaDecoder
from minivlm.text.gemma2 import Gemma2Config, Gemma2Decoder
from minivlm.vision.siglip import SiglipVisionConfig, SiglipVisionModel


@dataclass(frozen=True)
class PaliGemmaConfig:
    """PaliGemma (https://arxiv.org/abs/2407.07726): a SigLIP tower, one linear layer, a Gemma decoder.

    PaliGemma 2 (https://arxiv.org/abs/2412.03555) is the same system with a Gemma2Config as `text`; its
    published sizes are in `minivlm.models.sizes`.
    """

    vision: SiglipVisionConfig = field(
        default_factory=lambda: SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            patch_size=14,
        )
    )
    text: GemmaConfig | Gemma2Config = field(default_factory=GemmaConfig)
    image_token_id: int = 257152
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int | tuple[int, ...] = 1  # any of several may end an answer

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PaliGemmaConfig:
        """From a whole config.json. Raises InputError: it describes another system.

        As in transformers, the ids of pad, bos and eos may stand at the top or in the text_config, and only
        the top says whether the head is tied.
        """
        if values.get("model_type") != "paligemma":
            raise InputError(
                f"config.json says model_type {values.get('model_type')!r}, but this class is for "
                "'paligemma': use a PaliGemma folder"
            )
        for part in ("vision_config", "text_config"):
            if not isinstance(values.get(part), Mapping):
                raise InputError(f"config.json has no {part!r}: is it the config.json of a whole PaliGemma?")
        text = dict(values["text_config"])
        text["tie_word_embeddings"] = values.get("tie_word_embeddings")
        decoder = Gemma2Config if text.get("model_type") == "gemma2" else GemmaConfig
        # The published files call it image_token_index; transformers 5 writes image_token_id.
        image_id = values.get("image_token_id", values.get("image_token_index"))
        return cls(
            vision=SiglipVisionConfig.from_dict(values["vision_config"]),
            text=decoder.from_dict(text),
            **known(cls, {"image_token_id": image_id, **special_ids(values, text)}),
        )

    def to_dict(self) -> dict[str, Any]:
        """A config.json that this package and transformers both read."""
        return {
            "model_type": "paligemma",
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "vision_config": {
                **self.vision.to_dict(),
                "projection_dim": self.text.hidden_size,
                "num_image_tokens": self.vision.num_patches,
            },
            "text_config": {**self.text.to_dict(), "num_image_tokens": self.vision.num_patches},
            "projection_dim": self.text.hidden_size,
            "hidden_size": self.text.hidden_size,
            "image_token_index": self.image_token_id,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "tie_word_embeddings": self.text.tie_word_embeddings,
        }


@dataclass
class PaliGemmaOutput:
    """logits [B, S, V], and the loss if labels were given."""

    logits: Tensor
    loss: Tensor | None = None


class PaliGemma(nn.Module):
    """The whole system. `minivlm.load` returns one with its processor."""

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = SiglipVisionModel(config.vision)
        self.multi_modal_projector = nn.Linear(config.vision.hidden_size, config.text.hidden_size)
        self.language_model = build_decoder(config.text)  # Gemma, or Gemma 2 in PaliGemma 2

    @property
    def device(self) -> torch.device:
        """Where the weights are and the inputs must be."""
        return self.multi_modal_projector.weight.device

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> image features [B, N, D] in the decoder's width."""
        pixel_values = pixel_values.to(self.multi_modal_projector.weight.dtype)
        return self.multi_modal_projector(self.vision_tower(pixel_values))

    def merge(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Embed the tokens and replace the placeholders with the image features.

        Args:
            input_ids: [B, S], with N times image_token_id for each picture, in order.
            image_features: [pictures, N, D], or None without pictures. A row may have no picture.

        Returns:
            [B, S, D].
        Raises:
            ValueError: the numbers of placeholders and image features differ.
        """
        is_image = input_ids == self.config.image_token_id  # [B, S]
        features = 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
        placeholders = int(is_image.sum())
        if placeholders != features:
            raise ValueError(
                f"input_ids hold {placeholders} image placeholders and the pictures give {features} image "
                f"features: each picture needs {self.config.vision.num_patches} placeholders; let the "
                "processor build both"
            )
        # The placeholder's id may be outside the embedding table, so id 0 is looked up in its place.
        inputs_embeds = self.language_model.embed(input_ids.masked_fill(is_image, 0))
        if image_features is None:
            return inputs_embeds
        # masked_scatter fills the marked positions with the features in order; torch.where would
        # need features that already have the shape of the whole sequence.
        return inputs_embeds.masked_scatter(is_image[..., None], image_features.to(inputs_embeds.dtype))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> PaliGemmaOutput:
        """Logits at every position, and the loss if labels are given.

        Args:
            input_ids: [B, S].
            pixel_values: [pictures, C, height, width] or None for text only.
            attention_mask: [B, S], 1 for tokens and 0 for padding on either side; None means no padding.
            token_type_ids: [B, S], 0 for the prefix (image and prompt), 1 for the suffix (answer); None
                means that everything is prefix.
            labels: [B, S], -100 where there is no loss.

        Raises ValueError: labels without token_type_ids, or rows that `check_rows` refuses.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            if labels is not None:
                raise ValueError(
                    "labels without token_type_ids: the answer would be part of the prefix, and every token "
                    "could see the label that it must predict. Pass both, as the processor returns them"
                )
            token_type_ids = torch.zeros_like(input_ids)
        image_features = None if pixel_values is None else self.encode_image(pixel_values)
        inputs_embeds = self.merge(input_ids, image_features)

        check_rows(input_ids, attention_mask, token_type_ids)
        is_real = attention_mask.bool()
        position_ids = (is_real.cumsum(dim=1) - 1).clamp(min=0)
        prefix_lengths = (is_real & (token_type_ids == 0)).sum(dim=1)
        mask = masks.prefix_lm(position_ids, position_ids, prefix_lengths) & masks.padding(is_real)
        hidden_states = self.language_model(inputs_embeds, position_ids, mask[:, None])
        logits = self.logits(hidden_states)
        return PaliGemmaOutput(logits, None if labels is None else self.loss(logits, labels))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the next token, over the positions whose label is not -100.

        logits [B, S, V] at position t are compared with labels [B, S] at t + 1.
        """
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
        )

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D] -> scores [..., V]."""
        return self.language_model.logits(hidden_states)

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Tensor, KVCache]:
        """Read image and prompt, all of it prefix unless token_type_ids say otherwise.

        Returns:
            The hidden state of each row's last token [B, D], and the cache for `decode`.

        Raises ValueError: rows that `check_rows` refuses.
        """
        check_rows(input_ids, attention_mask, token_type_ids)
        text = self.config.text
        image_features = None if pixel_values is None else self.encode_image(pixel_values)
        inputs_embeds = self.merge(input_ids, image_features)
        cache = KVCache(
            text.num_hidden_layers,
            len(input_ids),
            text.num_key_value_heads,
            text.head_dim,
            dtype=inputs_embeds.dtype,
            device=inputs_embeds.device,
        )
        position_ids = cache.reserve(attention_mask)
        prefix_lengths = cache.lengths
        if token_type_ids is not None:
            prefix_lengths = (attention_mask.bool() & (token_type_ids == 0)).sum(dim=1)
        mask = masks.prefix_lm(position_ids, cache.key_positions, prefix_lengths)
        mask = mask & masks.padding(cache.key_is_real)
        # The last real token of a row is the one with the highest position, whichever side is padded.
        last = torch.where(attention_mask.bool(), position_ids, -1).argmax(dim=1)  # [B]
        hidden_states = self.language_model(inputs_embeds, position_ids, mask[:, None], cache)
        return hidden_states[torch.arange(len(last), device=last.device), last], cache

    def decode(self, token_ids: Tensor, unfinished: Tensor, cache: KVCache) -> Tensor:
        """Read one more token of each unfinished row: token_ids [B] -> hidden states [B, D]."""
        position_ids = cache.reserve(unfinished[:, None])
        mask = masks.causal(position_ids, cache.key_positions) & masks.padding(cache.key_is_real)
        inputs_embeds = self.language_model.embed(token_ids[:, None])
        return self.language_model(inputs_embeds, position_ids, mask[:, None], cache)[:, 0]

    def generate(self, input_ids: Tensor, max_new_tokens: int = 64, **kwargs: Any) -> Tensor:
        """New tokens only, [B, n], padded after each row's end. Arguments as in `minivlm.generate.stream`."""
        return generate(self, input_ids, max_new_tokens=max_new_tokens, **self._limits(), **kwargs)

    def stream(self, input_ids: Tensor, max_new_tokens: int = 64, **kwargs: Any) -> Iterator[Tensor]:
        """The same, token by token: yields [B] as soon as it is known."""
        return stream(self, input_ids, max_new_tokens=max_new_tokens, **self._limits(), **kwargs)

    def _limits(self) -> dict[str, Any]:
        return {
            "eos_token_id": self.config.eos_token_id,
            "pad_token_id": self.config.pad_token_id,
            "max_length": self.config.text.max_position_embeddings,
        }

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> PaliGemma:
        """Load a local folder or a repo of the Hub; dtype None keeps the file's dtype.

        Raises InputError: see `minivlm.checkpoints`.
        """
        folder = find_folder(name)
        config = _with_other_files(folder, PaliGemmaConfig.from_dict(read_config(folder)))
        return weights.load_model(cls, config, folder, PALIGEMMA_LAYOUTS, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in the Hub's layout, which transformers loads too."""
        weights.save_model(self, self.config.to_dict(), Path(folder), PALIGEMMA_LAYOUTS["hub"])


def build_decoder(config: GemmaConfig | Gemma2Config) -> GemmaDecoder | Gemma2Decoder:
    """The decoder that the config describes: Gemma for PaliGemma, Gemma 2 for PaliGemma 2."""
    return Gemma2Decoder(config) if isinstance(config, Gemma2Config) else GemmaDecoder(config)


def open_folder(
    folder: Path, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> tuple[PaliGemma, Processor]:
    """Load the model and processor of a folder whose config.json holds `values`.

    The processor comes first: errors in its small files show up before the large ones are read.

    Raises InputError: the files do not match each other; otherwise as in `PaliGemma.from_pretrained`.
    """
    config = PaliGemmaConfig.from_dict(values)
    processor = Processor.from_pretrained(folder, image_seq_length=config.vision.num_patches)
    image_id, side = processor.tokenizer.image_id, processor.image_processor.image_size
    require_equal(folder, "the id of <image>", config.image_token_id, image_id, TOKENIZER)
    require_equal(folder, "the picture's side", config.vision.image_size, side, PICTURES)
    ids = processor.tokenizer.backend.get_vocab().values()
    check_vocabulary(folder, config.text.vocab_size, (i for i in ids if i != image_id))  # it is a placeholder
    config = _with_other_files(folder, config)
    model = weights.load_model(PaliGemma, config, folder, PALIGEMMA_LAYOUTS, dtype=dtype, device=device)
    return model, processor
