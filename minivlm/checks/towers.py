"""Checks for 10_contrastive_training: ranks, the modality gap, the ring, equal captions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.checks import call, expect, expect_tensor, right, same
from minivlm.losses import l2_normalize, siglip_loss

# Right answers are on the diagonal: place 2, place 1, place 4, and a draw for first place.
COSINES = torch.tensor(
    [[0.5, 0.9, 0.1, 0.2], [0.1, 0.8, 0.3, 0.4], [0.6, 0.7, 0.0, 0.2], [0.3, 0.3, 0.3, 0.3]]
)
CAPTIONS = ["a red star", "a blue star", "a red star", "a red circle", "a red star"]


class solutions:
    """The solutions that the notebook continues with."""

    @staticmethod
    def find_ranks(similarity: Tensor) -> Tensor:
        """[n, n], pictures down, captions across -> the place of each picture's own caption, from 1: [n]."""
        right = similarity.diagonal()[:, None]  # [n, 1]
        wrong = ~torch.eye(len(similarity), dtype=torch.bool)
        return 1 + ((similarity >= right) & wrong).sum(dim=1)

    @staticmethod
    def modality_gap(image_embeds: Tensor, text_embeds: Tensor) -> float:
        """[n, D], [m, D], of any length -> the distance between the two centers, a number."""
        difference = l2_normalize(image_embeds).mean(dim=0) - l2_normalize(text_embeds).mean(dim=0)
        return difference.norm().item()

    @staticmethod
    def ring_loss(
        images: list[Tensor], texts: list[Tensor], block_loss: Callable[[Tensor, Tensor, bool], Tensor]
    ) -> tuple[Tensor, list[list[int]]]:
        """W lists of pictures and texts -> the loss of the whole batch, and who met whose texts."""
        size = len(images)
        held = list(enumerate(texts))  # (owner, texts) on each device
        met: list[list[int]] = [[] for _ in images]
        total = torch.tensor(0.0)
        for _ in range(size):
            for device, (owner, passing) in enumerate(held):
                met[device].append(owner)
                total = total + block_loss(images[device], passing, owner == device)
            held = [held[device - 1] for device in range(size)]  # held[-1] is the last one's
        return total / size, met

    @staticmethod
    def sigmoid_of_equals(logits: Tensor, captions: list[str]) -> Tensor:
        """logits [n, n], pictures down; caption i belongs to picture i -> the loss, a number."""
        right = torch.tensor([[a == b for b in captions] for a in captions])
        signs = torch.where(right, 1.0, -1.0)
        return -F.logsigmoid(signs * logits).sum() / len(logits)


def find_ranks(answer: Callable[[Tensor], Tensor]) -> None:
    """Exercise 1."""
    result = call(answer, COSINES.clone())
    reference = solutions.find_ranks(COSINES)  # 2, 1, 4, 4
    own = COSINES.diagonal()[:, None]
    kind = 1 + (own < COSINES).sum(dim=1)
    expect(
        not same(result, reference - 1),
        "you count from 0: a picture whose own caption is the most similar has rank 1",
    )
    expect(
        not same(result, reference + 1),
        "each rank is one too large: the right caption is as similar as itself, so leave out the diagonal",
    )
    expect(
        not same(result, kind),
        "a draw counts in the model's favor: in row 4 all captions are equally similar, and the right one "
        "should come last. Compare with >=",
    )
    expect(
        not same(result, solutions.find_ranks(COSINES.T)),
        "these are the ranks of the pictures for each caption: a row holds all captions of one picture",
    )
    order = COSINES.argsort(dim=1, descending=True, stable=True)
    expect(
        not any(
            same(result, column) or same(result, column + 1) for column in (order.diagonal(), order[:, 0])
        ),
        "argsort says which caption is at each place: we want the place of the picture's own caption",
    )
    expect(
        not same(result, solutions.find_ranks(-COSINES)),
        "the least similar caption comes first in your order: count those that are at least as similar",
    )
    expect_tensor(result, reference, "the ranks")
    expect(not result.is_floating_point(), f"ranks have dtype {result.dtype}: they are whole numbers")
    right("the place of each picture's own caption, and a draw does not help.")


def modality_gap(answer: Callable[[Tensor, Tensor], float]) -> None:
    """Exercise 2."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[0.5], [3.0], [1.0], [2.0], [5.0], [0.1]])
    images = (torch.randn(6, 4, generator=generator) + 1) * lengths
    texts = torch.randn(5, 4, generator=generator) - torch.tensor([0.0, 2.0, 1.0, 0.0])
    result = call(answer, images.clone(), texts.clone())
    if isinstance(result, Tensor):
        expect(
            result.numel() == 1,
            f"the result has shape {list(result.shape)}: we want one number, the length of the difference",
        )
        result = result.item()
    expect(isinstance(result, int | float), f"expected a number, got a {type(result).__name__}")
    a, b = l2_normalize(images), l2_normalize(texts)
    mistakes = {
        "the vectors are not of length 1: normalize each before the mean, or long ones dominate": (
            images.mean(0) - texts.mean(0)
        ).norm(),
        "you normalized the means: then a wide cloud counts like a narrow one. Normalize the vectors, not "
        "their mean": (l2_normalize(images.mean(0)) - l2_normalize(texts.mean(0))).norm(),
        "you normalized the vectors and then their means as well: a mean is shorter where the cloud is wide, "
        "and should stay so": (l2_normalize(a.mean(0)) - l2_normalize(b.mean(0))).norm(),
        "this is the mean distance of all pairs: that is large for wide clouds with the same center": (
            torch.cdist(a, b).mean()
        ),
        "this is the square of the distance: take the root": (a.mean(0) - b.mean(0)).square().sum(),
        "this is the cosine of the two means: we want their distance": F.cosine_similarity(
            a.mean(0), b.mean(0), dim=0
        ),
    }
    for hint, mistake in mistakes.items():
        expect(abs(result - mistake.item()) > 1e-5, hint)
    reference = solutions.modality_gap(images, texts)
    expect(abs(result - reference) < 1e-5, f"the gap is {result:.4g}, expected {reference:.4g}")
    right("the distance between the two centers.")


def ring_loss(answer: Callable[..., Any]) -> None:
    """Exercise 3, with three devices of two pairs each."""
    generator = torch.Generator().manual_seed(0)
    images = list(torch.randn(3, 2, 4, generator=generator))
    texts = list(torch.randn(3, 2, 4, generator=generator))
    scale, bias = torch.tensor([1.0]), torch.tensor([-1.0])
    calls: list[tuple[int, int, bool]] = []

    def number(x: Tensor, known: list[Tensor]) -> int:
        return next((i for i, one in enumerate(known) if torch.equal(one, x)), -1)

    def block_loss(of_images: Tensor, of_texts: Tensor, own: bool) -> Tensor:
        calls.append((number(of_images, images), number(of_texts, texts), bool(own)))
        if min(calls[-1][:2]) < 0:  # reported below, by a hint and not by an error of the loss
            return torch.zeros(())
        return siglip_loss(of_images, of_texts, scale, bias, negative_only=not own)

    result = call(answer, list(images), list(texts), block_loss)
    expect(
        isinstance(result, tuple) and len(result) == 2,
        "return two things: the loss, and the list of lists of owners",
    )
    loss, met = result
    pairs = [(a, b) for a, b, _ in calls]
    expect(
        not any(a < 0 or b < 0 for a, b in pairs),
        "block_loss got something that is not the whole block of one device: pass images[r] and the texts "
        "that device r holds now",
    )
    expect(
        len(set(pairs)) == 9 or len(pairs) != 9,
        "some pictures meet the same texts twice, and others never: all texts move at the same moment, so "
        "build the new list from the old one before you replace anything",
    )
    expect(
        len(pairs) >= 9,
        f"{len(pairs)} blocks were computed, and 3 devices have 9: a device's own block counts as well, so "
        "there are as many rounds as devices",
    )
    expect(
        len(pairs) == 9,
        f"{len(pairs)} blocks were computed, and 3 devices have 9: after as many rounds as devices, the "
        "texts are back home and would count twice",
    )
    expect(
        all(own == (a == b) for a, b, own in calls),
        "`own` is wrong for some blocks: it is True where the owner of the texts is the device itself",
    )
    whole = siglip_loss(torch.cat(images), torch.cat(texts), scale, bias)
    expect(
        not same(loss, 3 * whole) and not same(loss, 3 * whole[None]),
        "this is the sum over the devices: each has divided by its own pictures only, so take the mean",
    )
    expect(
        not same(loss, whole / 3),
        "this is the mean over all blocks: sum over the blocks of a device, and mean over the devices",
    )
    expect_tensor(loss, whole, "the loss")
    expected = [[0, 2, 1], [1, 0, 2], [2, 1, 0]]
    met = [list(one) for one in met]
    expect(
        met != [[0, 1, 2], [1, 2, 0], [2, 0, 1]],
        "your texts move to the left: device r should get what device r - 1 had, so after one round device "
        "1 has the texts of device 0",
    )
    expect(
        met != [[0, 1, 2]] * 3,
        "these are the owners in the order of their numbers: record whose texts each device met, round by "
        "round",
    )
    expect(met == expected, f"the owners are {met}, expected {expected}")
    right("every device met every text, and the loss is that of the whole batch.")


def sigmoid_of_equals(answer: Callable[[Tensor, list[str]], Tensor]) -> None:
    """Exercise 4."""
    n = len(CAPTIONS)
    logits = torch.randn(n, n, generator=torch.Generator().manual_seed(0)) * 2
    result = call(answer, logits.clone(), list(CAPTIONS))
    reference = solutions.sigmoid_of_equals(logits, CAPTIONS)
    equal = torch.tensor([[a == b for b in CAPTIONS] for a in CAPTIONS])
    diagonal = torch.eye(n, dtype=torch.bool)
    terms = -F.logsigmoid(torch.where(equal, logits, -logits))
    mistakes = {
        "only the diagonal counts as right: captions 1, 3 and 5 read the same": (
            -F.logsigmoid(torch.where(diagonal, logits, -logits)).sum() / n
        ),
        "equal captions off the diagonal are left out: that is another way to avoid wrong labels, but here "
        "they should count as right": terms[diagonal | ~equal].sum() / n,
        "only the right pairs are in the sum: the wrong ones add the term logsigmoid(-logit)": (
            terms[equal].sum() / n
        ),
        "wrong pairs have the sign 0, which makes their term a constant: give them -1": (
            -F.logsigmoid(equal * logits).sum() / n
        ),
        "the signs are swapped: right pairs have +1, and wrong ones -1": (
            -F.logsigmoid(torch.where(equal, -logits, logits)).sum() / n
        ),
        "this is the mean over all n * n pairs: sum them, and divide by n": terms.mean(),
        "this is the sum over all pairs: divide it by n": terms.sum(),
        "you divided by the number of right pairs: divide by n, the number of pictures": (
            terms.sum() / equal.sum()
        ),
        "the sign of the loss is wrong: it is minus the logarithm of a probability": -reference,
    }
    for hint, mistake in mistakes.items():
        expect(not same(result, mistake), hint)
    expect_tensor(result, reference, "the loss")
    right("what reads the same is right, wherever it stands in the batch.")
