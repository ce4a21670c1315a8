"""CM3 (https://arxiv.org/abs/2201.07520): pieces of a document are written last, between both their sides.

    a red star   ->   a <mask:0> star <mask:0> red <end>

The model is a causal decoder with the picture in front of the text, and its loss is that of the next token.
All that is new is the document that it reads: in some, spans are cut out, a sentinel is left in the place of
each, and they are written last, when everything around them is known. So one model continues a text (a prompt
and its answer, as always), and fills its blanks (`infill`), which is another way to ask.

What differs from PaliGemma: no token sees a later one. What differs here from the paper: there, a picture is
a sequence of words from a VQVAE-GAN, so that pictures are written as well, and may lie in a span. Here it is
what the tower makes of its patches, one linear layer later: patches stand in front, are never moved, and are
no targets. The authors' program (metaseq, cm3_dataset.py) keeps spans without a token if it draws several;
their sentinel then overwrites a token, which is lost. Such spans are dropped here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from minivlm.cache import KVCache
from minivlm.configs import check_types
from minivlm.errors import InputError
from minivlm.generate import generate
from minivlm.models.miniatures.base import Miniature, read_values, write_values
from minivlm.models.views import place
from minivlm.processing.images import load_picture
from minivlm.processing.inputs import IGNORE, Picture
from minivlm.processing.paligemma import Processor
from minivlm.text.gpt2 import GPT2Config
from minivlm.vision.siglip import SiglipVisionConfig

BLANK = "___"  # in a text for `infill`


@dataclass(frozen=True)
class CM3Config:
    """By default, a small GPT-2 whose table has five more rows, for the sentinels."""

    vision: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    text: GPT2Config = field(default_factory=lambda: GPT2Config(vocab_size=50262))
    mask_token_ids: tuple[int, ...] = (50257, 50258, 50259, 50260)  # in the order of their places
    end_of_mask_token_id: int = 50261
    image_token_id: int = 50256
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        check_types(self)
        sentinels = {*self.mask_token_ids, self.end_of_mask_token_id}
        if len(self.mask_token_ids) < 2 or len(sentinels) <= len(self.mask_token_ids):
            raise InputError(
                f"mask_token_ids are {self.mask_token_ids} and end_of_mask_token_id is "
                f"{self.end_of_mask_token_id}: expected two mask tokens at least, and all different"
            )
        if max(sentinels) >= self.text.vocab_size or self.image_token_id in sentinels:
            raise InputError(
                f"mask_token_ids and end_of_mask_token_id are {sorted(sentinels)}: expected ids below "
                f"vocab_size {self.text.vocab_size}, and none of them image_token_id {self.image_token_id}"
            )

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one picture in a row of input_ids."""
        return self.vision.num_patches

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CM3Config:
        """From a whole config.json. Raises InputError: it describes another system."""
        found = read_values(cls, values, "cm3")
        if isinstance(found.get("mask_token_ids"), list):
            found["mask_token_ids"] = tuple(found["mask_token_ids"])
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """A config.json."""
        return write_values(self, "cm3")


def choose_spans(length: int, draws: Tensor) -> list[tuple[int, int]]:
    """Up to k spans of a document that do not overlap, in order, as (first token, token after the last).

    A span is two uniform numbers, as places in the document. Of k * k candidates, the last ones that fit are
    taken. A single span starts at the smaller number; of several, the first number is rounded down and the
    second to the nearest, before they are put in order.

    Args:
        draws: [k * k, 2], from 0 to 1, fp64.
    """
    count = isqrt(len(draws))
    draws = draws.sort(dim=1).values if count == 1 else draws
    candidates = [sorted((int(a * length), int(b * length + 0.5))) for a, b in draws.tolist()]
    spans: list[tuple[int, int]] = []
    for start, end in reversed(candidates):
        apart = all(max(start, first) >= min(end, last) for first, last in spans)
        if len(spans) < count and apart:
            spans.append((start, end))
    return sorted((start, end) for start, end in spans if start < end)


def move_spans(
    document: Tensor, spans: Sequence[tuple[int, int]], mask_token_ids: Sequence[int], end_token_id: int
) -> Tensor:
    """Leave a sentinel in the place of each of n spans, and write them at the end: [S] -> [S + 3 n]."""
    kept, moved, done = [], [], 0
    for token_id, (start, end) in zip(mask_token_ids, spans, strict=False):
        sentinel, stop = document.new_tensor([token_id]), document.new_tensor([end_token_id])
        kept += [document[done:start], sentinel]
        moved += [sentinel, document[start:end], stop]
        done = end
    return torch.cat([*kept, document[done:], *moved])


def put_back(document: Tensor, mask_token_ids: Sequence[int], end_token_id: int) -> Tensor:
    """The reverse of `move_spans`. A span without its end goes on to the end of the document."""
    ids = document.tolist()
    for sentinel in mask_token_ids:
        if ids.count(sentinel) < 2:
            break
        blank = ids.index(sentinel)
        start = ids.index(sentinel, blank + 1)
        end = ids.index(end_token_id, start) if end_token_id in ids[start:] else len(ids)
        span = ids[start + 1 : end]
        del ids[start : end + 1]
        ids[blank : blank + 1] = span
    return document.new_tensor(ids)


def causally_masked(
    input_ids: Tensor, config: CM3Config, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The pretraining objective: a row without padding, with spans of its text at the end.

    How many: a draw from the Poisson distribution of mean 1, but fewer than there are sentinels. So 37 % of
    the documents stay as they are.

    Args:
        input_ids: [S], placeholders in front.
        generator: makes the draws reproducible.

    Returns:
        input_ids [S'], at most the model's context, and labels [S'], -100 at placeholders.
    """
    is_image = input_ids == config.image_token_id
    text = input_ids[~is_image]
    count = int(torch.poisson(torch.ones(()), generator).clamp(max=len(config.mask_token_ids) - 1))
    spans = choose_spans(len(text), torch.rand(count**2, 2, generator=generator, dtype=torch.float64))
    moved = move_spans(text, spans, config.mask_token_ids, config.end_of_mask_token_id)
    row = torch.cat([input_ids[is_image], moved])[: config.text.max_position_embeddings]
    return row, row.masked_fill(row == config.image_token_id, IGNORE)


class CM3(Miniature):
    """The whole system."""

    config_class: ClassVar = CM3Config
    config: CM3Config

    def __init__(self, config: CM3Config) -> None:
        super().__init__(config)
        self.projection = nn.Linear(config.vision.hidden_size, config.text.hidden_size)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [M, C, height, width] -> patches in the decoder's width [M, N, D]."""
        return self.projection(self.patches(pixel_values))

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, image: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """Patches stand among the words, and GPT-2 reads from left to right."""
        position_ids, mask = place(attention_mask, cache)
        return self.language_model(self.merge(input_ids, image), position_ids, mask, cache)


def infill(model: CM3, processor: Processor, picture: Picture, text: str, max_new_tokens: int = 16) -> str:
    """Fill the blanks of a text about a picture, from left to right.

    >>> infill(model, processor, picture, "caption en\\na ___ star left of a blue circle")
    'caption en\\na red star left of a blue circle'

    Args:
        text: prompt, newline and answer, as in training, with `BLANK` where something is missing.
        max_new_tokens: the longest span that may be written, with its end.

    Raises InputError: no blank, or more than the model has sentinels; as `minivlm.generate.stream`.
    """
    config, tokenizer = model.config, processor.tokenizer
    first, *rest = text.split(BLANK)
    if not 0 < len(rest) <= len(config.mask_token_ids):
        raise InputError(
            f"the text has {len(rest)} blanks: expected 1 to {len(config.mask_token_ids)} times {BLANK!r}"
        )
    # A word carries the space before it, so the space before a blank is part of the blank.
    ids = [tokenizer.bos_id, *tokenizer.encode(first.rstrip(" "))]
    for sentinel, piece in zip(config.mask_token_ids, rest, strict=False):
        ids += [sentinel, *tokenizer.encode(piece.rstrip(" "))]
    ids += [tokenizer.eos_id]
    image = [config.image_token_id] * config.num_image_tokens
    opened = picture if isinstance(picture, Image.Image) else load_picture(picture)
    pixel_values = processor.image_processor([opened]).to(model.device)
    for sentinel in config.mask_token_ids[: len(rest)]:
        ids += [sentinel]
        written = generate(
            model,
            torch.tensor([image + ids], device=model.device),
            pixel_values=pixel_values,
            max_new_tokens=max_new_tokens,
            eos_token_id=config.end_of_mask_token_id,
            max_length=config.text.max_position_embeddings,
        )
        others = {config.end_of_mask_token_id, config.image_token_id}
        ids += [token_id for token_id in written[0].tolist() if token_id not in others]
        ids += [config.end_of_mask_token_id]
    filled = put_back(torch.tensor(ids), config.mask_token_ids, config.end_of_mask_token_id)
    return tokenizer.decode(filled.tolist())
