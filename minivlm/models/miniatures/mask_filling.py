"""How a model that fills masks writes an answer: a masked place at a time, from left to right.

BERT cannot write. But it can be asked for a word: picture, prompt and what is written so far, then a mask,
and nothing after it. Everything sees everything, so each new word changes all that was computed before:
nothing can be kept in a cache, and everything is read again for every word.

    <image> <image> <bos> caption en \\n [MASK]          -> a
    <image> <image> <bos> caption en \\n a [MASK]        -> red
    <image> <image> <bos> caption en \\n a red [MASK]    -> star

Training asks in the same way, so an answer of A words is A rows with one mask each, where a decoder learns
all A words from one row. One row with all A places masked would be as cheap, but there no word knows the one
before it, and the answer's length is given away: what learned from such rows could not write as above. To
train at the price of one row, keep the label of one word of each answer, another one each time:
`minivlm.training.masked_words.one_word_each`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm import masks
from minivlm.generate import last_token_indices
from minivlm.models.writing import ImageTokens, Writes, WritingOutput, next_token_loss
from minivlm.processing.inputs import IGNORE, Inputs, check_rows

TEXT_A, TEXT_B = 0, 1  # types of words, for BERT the first text and the second: here prompt and answer


class MaskConfig(ImageTokens, Protocol):
    """The ids that are no words, and how much the encoder reads."""

    @property
    def mask_token_id(self) -> int: ...


@dataclass
class Rows:
    """Rows of S tokens. While an answer is written, they stand where decoders have a cache."""

    input_ids: Tensor  # [B, S]
    attention_mask: Tensor  # [B, S], 1 for tokens and 0 for padding
    token_type_ids: Tensor  # [B, S]; that of a placeholder does not matter
    image: Tensor | None  # [M, n, D], for the placeholders

    def longer(self, token_ids: Tensor, is_token: Tensor) -> Rows:
        """With one more word of the answer [B] where `is_token` [B], and padding elsewhere."""
        new = (token_ids, is_token.long(), torch.full_like(token_ids, TEXT_B))
        old = (self.input_ids, self.attention_mask, self.token_type_ids)
        ids, mask, types = (torch.cat([o, n[:, None]], dim=1) for o, n in zip(old, new, strict=True))
        return Rows(ids, mask, types, self.image)


class FillsMasks(Writes):
    """A model that is asked for words with masks, and what follows from that."""

    config: MaskConfig

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> what stands for a picture in a row, [B, n, D]."""
        raise NotImplementedError

    def embed(self, rows: Rows) -> Tensor:
        """Words, and pictures in the places of their placeholders: [B, S, D].

        Raises ValueError: the numbers of placeholders and image features differ.
        """
        raise NotImplementedError

    def encode(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Everything sees everything but padding: [B, S, D], [B, S] -> hidden states [B, S, D]."""
        raise NotImplementedError

    def read(self, rows: Rows) -> Tensor:
        """Hidden states of whole rows [B, S, D], with masks anywhere. Raises ValueError: as `embed`."""
        return self.encode(self.embed(rows), rows.attention_mask)

    def next_words(self, rows: Rows, asked: Tensor) -> Tensor:
        """Read a mask in each asked place, with everything before it and nothing after it.

        Args:
            asked: [B, S + 1], boolean, which words are asked for; the last column comes after the row.

        Returns:
            Hidden states of the masks, row by row and from left to right: [asked places, D].
        """
        row, place = asked.nonzero(as_tuple=True)
        padding = torch.zeros_like(rows.input_ids[:, 0])
        wider = rows.longer(padding, padding)
        is_image = wider.input_ids == self.config.image_token_id
        all_masked = replace(
            wider,
            input_ids=wider.input_ids.where(is_image, self.config.mask_token_id),
            token_type_ids=torch.full_like(wider.token_type_ids, TEXT_B),
        )
        x, mask = self.embed(wider), self.embed(all_masked)  # [B, S + 1, D]
        columns = torch.arange(asked.shape[1], device=asked.device)
        here, before = columns == place[:, None], columns < place[:, None]  # [asked places, S + 1]
        x = torch.where(here[..., None], mask[row], x[row])
        return self.encode(x, here | (wider.attention_mask[row].bool() & before))[here]

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> WritingOutput:
        """Scores of the answers' words, each from a mask in its place, and the loss if labels are given.

        As in every model that writes, the scores of a word stand at the place before it. They are 0 where no
        word was asked for.

        Args:
            input_ids: [B, S].
            pixel_values: [pictures, C, height, width] or None for text only.
            attention_mask: [B, S], 1 for tokens and 0 for padding on either side; None means no padding.
            token_type_ids: [B, S], 0 for the prompt and 1 for the answer; None means that all is prompt.
            labels: [B, S], -100 where there is no loss: these words are not asked for, which saves their
                rows. Without labels, all words of the answers are asked for, and what comes after each row.

        Raises ValueError: rows that `check_rows` refuses.
        """
        rows = self._rows(input_ids, attention_mask, token_type_ids, pixel_values)
        if labels is None:
            asked = F.pad(rows.attention_mask.bool() & (rows.token_type_ids == TEXT_B), (0, 1))
            asked = asked | _after(rows.attention_mask)
        else:
            asked = F.pad(labels != IGNORE, (0, 1))
        asked[:, 0] = False  # no place is before it
        scores = self.logits(self.next_words(rows, asked))  # [asked places, V]
        row, place = asked.nonzero(as_tuple=True)
        logits = scores.new_zeros(*input_ids.shape, scores.shape[-1])
        logits[row, place - 1] = scores
        return WritingOutput(logits, None if labels is None else next_token_loss(logits, labels))

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Tensor, list[Rows]]:
        """Read picture and prompt, and a mask after them.

        Returns:
            The hidden state of each row's mask [B, D], and a list that holds the rows, for `decode`.

        Raises ValueError: rows that `check_rows` refuses.
        """
        rows = self._rows(input_ids, attention_mask, token_type_ids, pixel_values)
        return self.next_words(rows, _after(rows.attention_mask)), [rows]

    def decode(self, token_ids: Tensor, unfinished: Tensor, cache: list[Rows]) -> Tensor:
        """Read all again, with one more token [B] of each unfinished row. Returns hidden states [B, D]."""
        cache[0] = cache[0].longer(token_ids, unfinished)
        return self.next_words(cache[0], _after(cache[0].attention_mask))

    def _rows(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        pixel_values: Tensor | None,
    ) -> Rows:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.full_like(input_ids, TEXT_A)
        check_rows(input_ids, attention_mask, token_type_ids)
        image = None if pixel_values is None else self.encode_image(pixel_values)
        return Rows(input_ids, attention_mask, token_type_ids, image)

    def sort_maps(
        self, encoding: list[Tensor], reading: list[Tensor], pixels: Inputs | None = None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """As in `minivlm.models.protocols.SortsMaps`.

        An answer of A words is read in A + 1 rows, each longer by a word. The map shows where the mask after
        each row's last word looked, in the place of that word, and where the prompt looked before anything
        was written. Looks at a mask are left out, since they are at no word.
        """
        rows, _, _, columns = reading[0].shape
        tokens, prompt = columns - 1, columns - rows  # how many
        places = torch.arange(tokens, device=reading[0].device)[None]
        was_there = masks.prefix_lm(places, places, places.new_tensor([prompt]))  # [1, S, S]
        decoder = []
        for layer in reading:
            of_masks = torch.stack([layer[row, :, prompt + row] for row in range(rows)], dim=1)
            looks = torch.cat([layer[0, :, : prompt - 1], of_masks], dim=1)[..., :tokens]  # [H, S, S]
            decoder.append(looks.masked_fill(~was_there, 0)[None])
        at_image = [layer[0, ..., : self.config.num_image_tokens] for layer in decoder]
        return encoding, decoder, torch.stack(at_image)


def _after(attention_mask: Tensor) -> Tensor:
    """The place after each row's last token: [B, S] -> [B, S + 1], boolean."""
    places = torch.arange(attention_mask.shape[1] + 1, device=attention_mask.device)
    return places == last_token_indices(attention_mask)[:, None] + 1
