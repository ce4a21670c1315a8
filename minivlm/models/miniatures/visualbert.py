"""VisualBERT (https://arxiv.org/abs/1908.03557): a picture's regions are words without an order.

    text    -> word + position + type                            ┐
                                                                 ├-> norm -> BERT, everything sees everything
    regions -> projection + position 0 + type of their own table ┘

Nothing tells BERT which word belongs to which region: it learns that by filling masked words, and by saying
whether a caption fits. Where a region lies in the picture is not said, either. All have position 0, or in
addition the mean position of the words that name them. So their order, and whether text or regions come
first, does not matter. What differs from LLaVA: regions go through every layer together with the words, in
both directions. For how such a model answers, see `mask_filling.py`.

The original cuts regions out with a detector. Here the patches of the image tower take their place; a model
without a tower gets the features of its regions from outside. Two differences from transformers: a region's
type is 0, as in the authors' code, where transformers takes 1 unless it is told; and there is no dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm import masks
from minivlm.checkpoints import weights
from minivlm.checkpoints.hub import (
    find_folder,
    read_config,
    special_ids,
)
from minivlm.checkpoints.layouts import VISUALBERT_LAYOUTS
from minivlm.configs import check_types, expect, known, part_of, require_system
from minivlm.errors import InputError
from minivlm.models.miniatures.base import open_processor
from minivlm.models.miniatures.mask_filling import FillsMasks, Rows
from minivlm.processing.inputs import IGNORE
from minivlm.processing.paligemma import Processor
from minivlm.text.bert import BertConfig, BertEncoder
from minivlm.vision.siglip import SiglipVisionConfig, SiglipVisionModel


@dataclass(frozen=True)
class VisualBERTConfig:
    """The defaults are those of the paper: BERT base, and the regions of a detector."""

    text: BertConfig = field(default_factory=BertConfig)
    vision: SiglipVisionConfig | None = None  # None: regions come from outside
    visual_embedding_dim: int = 2048  # the width of regions; with a tower, its width
    image_token_id: int = 30522
    mask_token_id: int = 103  # without a [MASK], another token that no text has, such as <unk>
    pad_token_id: int = 0
    bos_token_id: int = 101  # [CLS]
    eos_token_id: int | tuple[int, ...] = 102  # [SEP]

    def __post_init__(self) -> None:
        check_types(self)
        if self.vision is not None and self.vision.hidden_size != self.visual_embedding_dim:
            raise InputError(
                f"visual_embedding_dim is {self.visual_embedding_dim}, and the tower's patches are "
                f"{self.vision.hidden_size} wide: both have to be the same"
            )

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one picture in a row of input_ids; 0 without a tower."""
        return 0 if self.vision is None else self.vision.num_patches

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VisualBERTConfig:
        """From a whole config.json. Raises InputError: it describes another system."""
        require_system(values, "visual_bert")
        expect(values, "config.json", "bypass_transformer", False)
        vision = part_of(values, "vision_config")
        parts = {
            "text": BertConfig.from_dict(values),
            "vision": SiglipVisionConfig.from_dict(vision) if vision else None,
        }
        return cls(**known(cls, {**values, **special_ids(values), **parts}))

    def to_dict(self) -> dict[str, Any]:
        """A config.json that this package and transformers both read."""
        own = {name: value for name, value in vars(self).items() if name not in ("text", "vision")}
        return {
            "model_type": "visual_bert",
            "architectures": ["VisualBertForPreTraining"],
            **self.text.to_dict(),
            **own,
            **({} if self.vision is None else {"vision_config": self.vision.to_dict()}),
        }


class VisualBERT(FillsMasks):
    """The whole system. `minivlm.load` returns one with its processor."""

    config: VisualBERTConfig

    def __init__(self, config: VisualBERTConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = None if config.vision is None else SiglipVisionModel(config.vision)
        self.language_model = BertEncoder(config.text)
        text, width = config.text, config.text.hidden_size
        self.visual_projection = nn.Linear(config.visual_embedding_dim, width)
        self.visual_position_embeddings = nn.Embedding(text.max_position_embeddings, width)
        self.visual_token_type_embeddings = nn.Embedding(text.type_vocab_size, width)
        with torch.no_grad():  # to BERT, a region is at first an unknown word
            self.visual_position_embeddings.weight.copy_(self.language_model.embed_positions.weight)
            self.visual_token_type_embeddings.weight.copy_(self.language_model.embed_types.weight)
        self.seq_relationship = nn.Linear(width, 2)

    @property
    def device(self) -> torch.device:
        """Where the weights are and the inputs must be."""
        return self.visual_projection.weight.device

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> a region for each patch [B, N, D].

        Raises InputError: there is no tower.
        """
        if self.vision_tower is None:
            raise InputError("this model has no image tower: let `embed_regions` embed those of a detector")
        return self.embed_regions(self.vision_tower(pixel_values.to(self.visual_projection.weight.dtype)))

    def embed_regions(
        self, features: Tensor, type_ids: Tensor | None = None, word_positions: Tensor | None = None
    ) -> Tensor:
        """Projection + position + type, not normed yet.

        Args:
            features: [B, N, visual_embedding_dim].
            type_ids: [B, N], where a row has two pictures: which of them a region is from. None means 0.
            word_positions: [B, N, A], of up to A words that name a region, -1 for none.

        Returns:
            [B, N, D].
        """
        if type_ids is None:
            type_ids = features.new_zeros(features.shape[:2], dtype=torch.long)
        x = self.visual_projection(features) + self.visual_token_type_embeddings(type_ids)
        x = x + self.visual_position_embeddings.weight[0]
        if word_positions is not None:
            is_word = (word_positions >= 0)[..., None].to(x.dtype)  # [B, N, A, 1]
            positions = self.language_model.embed_positions(word_positions.clamp(min=0)) * is_word
            x = x + positions.sum(dim=2) / is_word.sum(dim=2).clamp(min=1)
        return x

    def embed(self, rows: Rows) -> Tensor:
        """Words, and regions in the places of their placeholders, not normed yet: [B, S, D].

        Raises ValueError: the numbers of placeholders and regions differ.
        """
        is_image = rows.input_ids == self.config.image_token_id
        regions = 0 if rows.image is None else rows.image.shape[0] * rows.image.shape[1]
        if int(is_image.sum()) != regions:
            raise ValueError(
                f"input_ids hold {int(is_image.sum())} image placeholders and the pictures give {regions} "
                "regions: each region needs a placeholder; let the processor build both"
            )
        is_word = self._is_word(rows).long()
        position_ids = is_word.cumsum(dim=1) - is_word  # how many words come before
        position_ids = position_ids.clamp(max=self.config.text.max_position_embeddings - 1)  # padding
        x = self.language_model.embed(
            rows.input_ids.masked_fill(is_image, 0), position_ids, rows.token_type_ids
        )
        return x if rows.image is None else x.masked_scatter(is_image[..., None], rows.image.to(x.dtype))

    def encode(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Everything sees everything but padding: [B, S, D], [B, S] -> hidden states [B, S, D]."""
        return self.language_model(inputs_embeds, masks.padding(attention_mask)[:, None])

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D] -> a score for every word that may have been there [..., V]."""
        return self.language_model.logits(hidden_states)

    def fit(self, hidden_states: Tensor, rows: Rows) -> Tensor:
        """Does the caption fit? Read at each row's first word: [B, S, D] -> scores of no and yes [B, 2].

        This is the order of the authors' code; the documentation of transformers has it the other way round.
        """
        first = self._is_word(rows).int().argmax(dim=1)
        of_first = hidden_states[torch.arange(len(first), device=first.device), first]
        return self.seq_relationship(self.language_model.pool(of_first))

    def _is_word(self, rows: Rows) -> Tensor:
        return rows.attention_mask.bool() & (rows.input_ids != self.config.image_token_id)

    def pretraining_loss(self, rows: Rows, labels: Tensor, fits: Tensor) -> Tensor:
        """Cross-entropy of the masked words, plus that of "does the caption fit?".

        For what it takes, see `minivlm.training.masked_words`.

        Args:
            labels: [B, S], the word that stood in each masked place, -100 elsewhere.
            fits: [B], 1 where the caption is of this picture, 0 where it is of another.
        """
        hidden = self.read(rows)
        masked = labels != IGNORE
        words = F.cross_entropy(self.logits(hidden[masked]).float(), labels[masked])
        return words + F.cross_entropy(self.fit(hidden, rows).float(), fits)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> VisualBERT:
        """Load a folder, from transformers' VisualBertForPreTraining, too; dtype None keeps the file's.

        Raises InputError: see `minivlm.checkpoints`.
        """
        folder = find_folder(name)
        return cls._load(folder, VisualBERTConfig.from_dict(read_config(folder)), dtype, device)

    @classmethod
    def _load(
        cls, folder: Path, config: VisualBERTConfig, dtype: torch.dtype | None, device: torch.device | str
    ) -> VisualBERT:
        config = weights.with_generation_ids(folder, config)
        return weights.load_model(cls, config, folder, VISUALBERT_LAYOUTS, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; transformers reads all but the tower."""
        weights.save_model(self, self.config.to_dict(), Path(folder), VISUALBERT_LAYOUTS["hub"])

    @classmethod
    def open_folder(
        cls, folder: Path, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str
    ) -> tuple[VisualBERT, Processor]:
        """Load the model and processor of a folder whose config.json holds `values`.

        Raises InputError: there is no tower, or the files do not match each other; otherwise as in
        `from_pretrained`.
        """
        config = VisualBERTConfig.from_dict(values)
        if config.vision is None:
            raise InputError(
                f"{folder} has no vision_config: its regions come from a detector, so it cannot look at "
                "pictures. Load it with VisualBERT.from_pretrained and give it regions"
            )
        processor = open_processor(folder, config, config.vision.image_size, config.text.vocab_size)
        return cls._load(folder, config, dtype, device), processor
