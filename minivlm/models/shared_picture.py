"""Many prompts about one picture, which is read once.

Where a decoder reads from left to right, a row's beginning does not know what comes after it. So what the
rows have in common, picture and all, is read in one row, and each row goes on from a copy of its cache:

    <image> <image> <image> what ┬─ color is the star?
                                 ├─ shape is the red object?
                                 └─ size is the red circle?

A picture beside the row (Flamingo, Llama 3.2 Vision) is in the same cache, and is not even copied. In
PaliGemma and SimVLM the picture sees the question, so nothing but the tower's output is the same for all
rows; the rest is a padded batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minivlm.models.cache_rows import repeated
from minivlm.models.paligemma import PaliGemma
from minivlm.models.protocols import Answers
from minivlm.models.views import HasDecoder
from minivlm.models.writing import last_hidden_states


class SharedPicture:
    """A model whose prompts are all about one picture, to `minivlm.generate.stream`: it is read once.

    It stands beside the model and changes nothing in it: another thread may use the same one.
    """

    def __init__(self, model: Answers, rows: int) -> None:
        self.model, self.rows = model, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def prefill(self, input_ids: Tensor, attention_mask: Tensor, **pixels: Tensor) -> tuple[Tensor, Any]:
        """As the model's, with rows [B, S] padded on the left, and the pixels of the one picture."""
        model = self.model
        if self.rows == 1:
            return model.prefill(input_ids, attention_mask, **pixels)
        common = self.common_tokens(input_ids, attention_mask)
        if common == 0:
            return self._prefill_rows(input_ids, attention_mask, **pixels)
        first = input_ids[:1][attention_mask[:1].bool()][None, :common]
        _, cache = model.prefill(first, torch.ones_like(first), **pixels)
        assert isinstance(model, HasDecoder)
        # What is left of each row stands at its end.
        left = int(attention_mask.sum(dim=1).max()) - common
        ids, mask = input_ids[:, -left:], attention_mask[:, -left:].clone()
        padded = attention_mask.shape[1] - attention_mask.sum(dim=1)
        places = torch.arange(input_ids.shape[1] - left, input_ids.shape[1], device=ids.device)
        mask[places < (padded + common)[:, None]] = 0
        cache = repeated(cache, self.rows)
        return last_hidden_states(model.read_on(ids, mask, cache), mask), cache

    def common_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> int:
        """How many tokens all rows begin with, the picture's among them; 0 where nothing is to be shared."""
        model = self.model
        if not isinstance(model, HasDecoder) or not model.reads_apart(attention_mask):
            return 0
        rows = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        least = min(map(len, rows)) - 1  # each row needs a token whose output is read
        same = torch.stack([row[:least] == rows[0][:least] for row in rows]).all(dim=0)
        common = int(same.cumprod(dim=0).sum())
        return common if not model.is_picture(rows[0][None])[0, common:].any() else 0

    def _prefill_rows(
        self, input_ids: Tensor, attention_mask: Tensor, **pixels: Tensor
    ) -> tuple[Tensor, Any]:
        """Whole rows, after one run of the tower where pictures need nothing else of the model."""
        kind: Any = type(self.model)
        model = self.model
        asks_tower = isinstance(model, HasDecoder) and kind.encode_images is HasDecoder.encode_images
        if asks_tower or isinstance(model, PaliGemma):
            # Called on the class: the model's own code, which asks `self` for the picture.
            found: tuple[Tensor, Any] = kind.prefill(self, input_ids, attention_mask, **pixels)
            return found
        every = {name: torch.cat([tensor] * len(input_ids)) for name, tensor in pixels.items()}
        return model.prefill(input_ids, attention_mask, **every)

    def encode_images(self, input_ids: Tensor, *pixels: Tensor | None, **more: Tensor) -> Any:
        """As the model's, by `encode_image` below."""
        return type(self.model).encode_images(self, input_ids, *pixels, **more)  # type: ignore[attr-defined]

    def encode_image(self, *pixels: Tensor, **more: Tensor) -> Tensor:
        """What the model makes of the one picture, for each row."""
        return torch.cat([self.model.encode_image(*pixels, **more)] * self.rows)
