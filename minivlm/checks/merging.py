"""Checks for 06_merging: three masks, merging, positions, the prefix-LM mask, and a test for leaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minivlm.checks import NotYet, call, expect, expect_tensor, right, same

IMAGE, PAD = 7, 0  # 7 is outside the small vocabulary of 0 to 6

# Three rows: a picture of three tokens; text only, padded on the left; a picture, padded on the right.
IDS = torch.tensor(
    [[7, 7, 7, 2, 3, 4, 5, 6], [0, 0, 0, 0, 2, 4, 5, 6], [7, 7, 7, 2, 5, 6, 0, 0]],
)


class solutions:
    """The solutions that the notebook continues with."""

    @staticmethod
    def three_masks(input_ids: Tensor, image_id: int, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image, text and padding mask of input_ids [B, S], each boolean [B, S]."""
        image_mask = input_ids == image_id
        padding_mask = input_ids == pad_id
        text_mask = ~image_mask & ~padding_mask
        return image_mask, text_mask, padding_mask

    @staticmethod
    def merge_with_where(is_image: Tensor, words: Tensor, features: Tensor) -> Tensor:
        """is_image [B, S], words [B, S, D], features [pictures, N, D] -> [B, S, D]."""
        numbers = is_image.flatten().cumsum(0).view_as(is_image) - 1
        spread = features.flatten(0, 1)[numbers.clamp(min=0)]
        return torch.where(is_image[..., None], spread, words)

    @staticmethod
    def number_positions(attention_mask: Tensor) -> Tensor:
        """attention_mask [B, S] -> position_ids [B, S]: the real tokens of each row are numbered from 0."""
        return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    @staticmethod
    def block_mask(token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The prefix-LM mask [B, S, S] from [B, S], [B, S]: one running count and one comparison."""
        blocks = token_type_ids.cumsum(dim=1)
        return (blocks[:, None, :] <= blocks[:, :, None]) & attention_mask[:, None, :].bool()

    @staticmethod
    def count_leaks(
        logits_of: Callable[[Tensor], Tensor], input_ids: Tensor, token_type_ids: Tensor, other_id: int
    ) -> int:
        """How many answer positions change when the last token is replaced by another."""
        changed = input_ids.clone()
        changed[0, -1] = other_id
        moved = (logits_of(input_ids) - logits_of(changed)).abs().amax(dim=-1)[0]
        earlier = token_type_ids[0] == 1
        earlier[-1] = False
        return int((moved[earlier] > 1e-4).sum())


def three_masks(answer: Callable[[Tensor, int, int], tuple[Tensor, Tensor, Tensor]]) -> None:
    """Exercise 1."""
    result = call(answer, IDS.clone(), IMAGE, PAD)
    expect(
        isinstance(result, tuple) and len(result) == 3,
        "return three masks, separated by commas: image_mask, text_mask, padding_mask",
    )
    image, text, pad = solutions.three_masks(IDS, IMAGE, PAD)
    names = ("image_mask", "text_mask", "padding_mask")
    for name, mask in zip(names, result, strict=True):
        expect(isinstance(mask, Tensor), f"{name} should be a tensor, but it is a {type(mask).__name__}")
        expect(
            mask.dtype == torch.bool,
            f"{name} has dtype {mask.dtype}: a mask is boolean, so keep the result of the comparison as it "
            "is",
        )
    given = dict(zip(names, result, strict=True))
    expect(
        not same(given["text_mask"], ~image),
        "your text_mask is True at the padding: text is what is neither image nor padding",
    )
    expect(
        not same(given["text_mask"], ~pad),
        "your text_mask is True at the placeholders: text is what is neither image nor padding",
    )
    expect(
        not same(given["padding_mask"], ~pad),
        "your padding_mask is True at the tokens and False at the padding: here it is the other way around "
        "(what you have is the attention_mask)",
    )
    for name, reference in zip(names, (image, text, pad), strict=True):
        expect_tensor(given[name], reference, name)
    other = call(answer, IDS + 10, IMAGE + 10, PAD + 10)
    expect(
        isinstance(other, tuple) and all(torch.equal(a, b) for a, b in zip(other, result, strict=True)),
        "with other ids for the image and the padding the masks are wrong: use image_id and pad_id",
    )
    right("every position is exactly one of the three, image, text or padding.")


def merge_with_where(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 2."""
    is_image = IDS == IMAGE
    words = torch.arange(3.0 * 8 * 4).view(3, 8, 4)
    features = -torch.arange(1.0, 2 * 3 * 4 + 1).view(2, 3, 4)
    reference = solutions.merge_with_where(is_image, words, features)
    try:
        result = call(answer, is_image.clone(), words.clone(), features.clone())
    except NotYet as error:
        if isinstance(error.__cause__, IndexError):
            raise NotYet(
                "an index goes past the last feature: the first placeholder takes feature number 0, so "
                "subtract 1 from the running count, and flatten the features to [pictures * N, D] first"
            ) from error
        blank = isinstance(error.__cause__, NotImplementedError)  # which is a RuntimeError as well
        if isinstance(error.__cause__, RuntimeError) and not blank:
            raise NotYet(
                f"{error}. torch.where needs features of the sequence's shape [B, S, D]: number the "
                "placeholders first, and pick a feature for every position"
            ) from error
        raise
    per_row = is_image.cumsum(dim=1).sub(1).clamp(min=0)
    flat = features.flatten(0, 1)
    expect(
        not same(result, torch.where(is_image[..., None], flat[per_row], words)),
        "the second picture's row got the features of the first picture again: count the placeholders "
        "across the whole batch, not separately in each row",
    )
    late = is_image.flatten().cumsum(0).view_as(is_image).clamp(max=len(flat) - 1)
    expect(
        not same(result, torch.where(is_image[..., None], flat[late], words)),
        "the first placeholder got feature number 1: subtract 1 from the running count",
    )
    numbers = is_image.flatten().cumsum(0).view_as(is_image).sub(1).clamp(min=0)
    expect(
        not same(result, torch.where(is_image[..., None], words, flat[numbers])),
        "words and features are swapped: torch.where(condition, value where True, value where False)",
    )
    expect_tensor(result, reference, "the merged sequence")
    right("torch.where merges as well, once a gather has given the features the shape of the sequence.")


def number_positions(answer: Callable[[Tensor], Tensor]) -> None:
    """Exercise 3."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    real = mask.bool()
    reference = solutions.number_positions(mask)
    result = call(answer, mask.clone())
    expect(isinstance(result, Tensor), f"expected a tensor, got a {type(result).__name__}")
    expect(
        tuple(result.shape) == (3, 5),
        f"position_ids has shape {list(result.shape)}, expected [3, 5] like the mask",
    )
    expect(
        not torch.equal(result[real], torch.arange(5).expand(3, 5)[real]),
        "the row that is padded on the left starts at 2: count tokens, not columns",
    )
    expect(
        not torch.equal(result[real], reference[real] + 1),
        "your positions start at 1: rotary attention would not notice, but masks and the cache compare "
        "positions with lengths, so the first token has position 0",
    )
    expect(
        torch.equal(result[real], reference[real]),
        f"the real tokens have positions {result[real].tolist()}, expected {reference[real].tolist()}",
    )
    expect(
        bool((result >= 0).all()),
        "padding on the left got a negative position: it is never read, but a position table would fail on "
        "it, so stop at 0",
    )
    right("a row has the same positions wherever its padding is.")


def block_mask(answer: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise 4."""
    # Prefix 3, answer 3: without padding, with two pads on the left, with two pads on the right.
    types = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]])
    real = mask.bool()
    blocks = types.cumsum(dim=1)
    result = call(answer, types.clone(), mask.clone())
    expect(isinstance(result, Tensor), f"expected a tensor, got a {type(result).__name__}")
    expect(
        tuple(result.shape) == (3, 8, 8),
        f"the mask has shape {list(result.shape)}, expected [3, 8, 8]: batch, query, key",
    )
    expect(result.dtype == torch.bool, f"the mask has dtype {result.dtype}, expected torch.bool")

    def alike(other: Tensor) -> bool:
        return torch.equal(result[real], other[real])  # what a padded query sees does not matter

    keys = real[:, None, :]
    expect(
        not alike(blocks[:, None, :] <= blocks[:, :, None]),
        "right without padding, but padded keys can be seen: their type is 0, so they look like prefix",
    )
    expect(
        not alike((types[:, None, :] <= types[:, :, None]) & keys),
        "the tokens of the answer see each other in both directions, which leaks the labels: compare the "
        "running sum of the types, so that each token of the answer is a block of its own",
    )
    expect(
        not alike((blocks[:, :, None] <= blocks[:, None, :]) & keys),
        "rows and columns are swapped: queries are axis 1 (blocks[:, :, None]), keys are axis 2",
    )
    expect(
        not alike((blocks[:, None, :] < blocks[:, :, None]) & keys),
        "no token sees its own block, so the prefix is blind: use <= instead of <",
    )
    reference = solutions.block_mask(types, mask)
    expect_tensor(result[real], reference[real], "the mask at the rows of real tokens")
    right("one running sum and one comparison are the prefix-LM mask.")


def count_leaks(answer: Callable[..., Any]) -> None:
    """Exercise 5."""
    table = torch.linspace(-1.0, 1.0, 8 * 5).view(8, 5).sin()
    ids = torch.tensor([[7, 7, 2, 3, 4, 5, 1]])
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    prefix = int((types == 0).sum())

    def causal(given: Tensor) -> Tensor:
        return table[given].cumsum(dim=1)

    def prefix_lm(given: Tensor) -> Tensor:
        seen = causal(given)
        return torch.cat([seen[:, prefix - 1 : prefix].expand(-1, prefix, -1), seen[:, prefix:]], dim=1)

    def bidirectional(given: Tensor) -> Tensor:
        return table[given] + table[given].sum(dim=1, keepdim=True)

    def one_ahead(given: Tensor) -> Tensor:
        embedded = table[given]
        return embedded + torch.cat([embedded[:, 1:], torch.zeros(1, 1, 5)], dim=1)

    def noisy(given: Tensor) -> Tensor:
        noisy.calls += 1  # type: ignore[attr-defined]
        return causal(given) + 1e-7 * noisy.calls  # type: ignore[attr-defined]

    noisy.calls = 0  # type: ignore[attr-defined]

    def run(logits_of: Callable[[Tensor], Tensor]) -> int:
        kept = ids.clone()
        kept_types = types.clone()
        result = call(answer, logits_of, kept, kept_types, other_id=6)
        expect(
            torch.equal(kept, ids) and torch.equal(kept_types, types),
            "your function changes the tensor that it was given, and then compares it with itself: "
            "clone before you write into it",
        )
        expect(
            isinstance(result, int) and not isinstance(result, bool),
            f"expected a whole number, got a {type(result).__name__}: int(...) converts a tensor",
        )
        return result

    found = run(bidirectional)
    expect(
        found != 6,
        "you counted the prefix as well: only positions of the answer (token type 1) have a label to leak",
    )
    expect(
        found != 4,
        "you counted the last position: it reads the token that was replaced, so it may change",
    )
    expect(
        found == 3, f"where every token sees every other, 3 positions of the answer leak; you found {found}"
    )
    found = run(one_ahead)
    expect(found == 1, f"a model that sees one token ahead has 1 leak; you found {found}")
    for name, model in (("causal", causal), ("prefix-LM", prefix_lm)):
        found = run(model)
        expect(found == 0, f"a {name} model has no leak; you found {found}")
    expect(
        run(noisy) == 0,
        "logits that differ by 1e-7 are the same up to rounding: compare with a tolerance such as 1e-4",
    )
    right("it finds a leak in any model, without looking at its mask.")
