"""Checks for 09_looking_inside: attention distance, entropy, rollout, nearest words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.checks import call, expect, expect_tensor, right, same
from minivlm.looking import measures


class solutions:
    """The solutions that the notebook continues with: the package's own."""

    attention_distance = staticmethod(measures.attention_distance)
    attention_entropy = staticmethod(measures.attention_entropy)
    attention_rollout = staticmethod(measures.attention_rollout)
    nearest_words = staticmethod(measures.nearest_words)


def _maps(*shape: int, seed: int = 0) -> Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).softmax(dim=-1)


def attention_distance(answer: Callable[[Tensor], Tensor]) -> None:
    """Exercise 1."""
    weights = _maps(2, 3, 9, 9)
    reference = measures.attention_distance(weights)
    result = call(answer, weights.clone())
    distances = measures.patch_distances(9)
    numbers = torch.arange(9.0)
    along_the_line = (numbers[:, None] - numbers).abs()
    expect(
        not same(result, (weights * along_the_line).sum(dim=-1).mean(dim=(0, 2))),
        "you took the difference of the patches' numbers: patch 2 and patch 3 of a 3 x 3 grid are not "
        "neighbors, since a new row begins between them",
    )
    expect(
        not same(result, (weights * distances).sum(dim=(0, 2, 3))),
        "you summed over the patches that look and over the pictures: average over them",
    )
    expect(
        not same(result, (weights * distances).mean(dim=(0, 2, 3))),
        "you averaged over the patches that are seen: the weights already sum to 1, so sum over them",
    )
    expect(
        not same(result, (weights * distances).sum(dim=-1).mean()),
        "you averaged over the heads as well: each head gets its own number",
    )
    expect(
        not same(result, (weights * distances.square()).sum(dim=-1).mean(dim=(0, 2))),
        "your distances are squared: take the root of the sum of the squares",
    )
    steps = _city_blocks(3)
    expect(
        not same(result, (weights * steps).sum(dim=-1).mean(dim=(0, 2))),
        "you added the steps down and the steps across: the straight line is shorter (Pythagoras)",
    )
    expect_tensor(result, reference, "the distance of the heads")
    larger = call(answer, _maps(1, 2, 16, 16))
    expect_tensor(larger, measures.attention_distance(_maps(1, 2, 16, 16)), "the distance on a grid of 4 x 4")
    right("one number a head, in patches, on any square grid.")


def _city_blocks(side: int) -> Tensor:
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    return torch.cdist(places, places, p=1)


def attention_entropy(answer: Callable[[Tensor], Tensor]) -> None:
    """Exercise 2."""
    weights = _maps(2, 3, 4, 7)
    reference = measures.attention_entropy(weights)
    result = call(answer, weights.clone())
    expect(
        not same(result, -reference),
        "your entropy is negative, as is the logarithm of a weight: change the sign",
    )
    expect(
        not same(result, reference / math.log(2)),
        "this is in bits, from the logarithm to base 2: use the natural logarithm, for nats",
    )
    pieces = torch.special.entr(weights)
    expect(
        not same(result, pieces.mean(dim=(0, 2, 3))),
        "you averaged over the places that are seen: sum over them, and average over the rest",
    )
    averaged = torch.special.entr(weights.mean(dim=(0, 2))).sum(dim=-1)
    expect(
        not same(result, averaged),
        "you averaged the maps before the logarithm: a head that looks at one place, but at a different "
        "one in each picture, would then seem to look everywhere. Take the entropy of each row first, then "
        "the mean",
    )
    expect_tensor(result, reference, "the entropy of the heads")
    one_place = call(answer, torch.eye(4)[None, None])
    expect(
        not bool(torch.as_tensor(one_place).isnan().any()),
        "a weight of 0 gives 0 * log(0), which is not a number: it should count as 0 "
        "(torch.special.entr does that, or clamp inside the logarithm)",
    )
    expect_tensor(one_place, torch.zeros(1), "the entropy of a head that looks at one place", tolerance=1e-4)
    right("0 for one place, log(S) for all S alike.")


def attention_rollout(answer: Callable[[Sequence[Tensor]], Tensor]) -> None:
    """Exercise 3."""
    maps = [_maps(2, 3, 4, 4, seed=layer) for layer in range(3)]
    reference = measures.attention_rollout(maps)
    result = call(answer, [layer.clone() for layer in maps])
    expect(
        not same(result, measures.attention_rollout(maps[::-1])),
        "the layers are multiplied in the wrong order: the later layer reads what the earlier one wrote, "
        "so it goes on the left, later @ earlier",
    )
    means = [layer.mean(dim=1) for layer in maps]
    expect(
        not same(result, means[2] @ means[1] @ means[0]),
        "the residual path is missing: half of each layer is the identity, 0.5 * attention + 0.5 * I",
    )
    identity = torch.eye(4)
    doubled = [mean + identity for mean in means]
    expect(
        not same(result, doubled[2] @ doubled[1] @ doubled[0]),
        "your rows sum to 8, not to 1: with the identity added, each layer has to be halved",
    )
    elementwise = [0.5 * mean + 0.5 * identity for mean in means]
    expect(
        not same(result, elementwise[2] * elementwise[1] * elementwise[0]),
        "you multiplied element by element: paths through the layers need the matrix product, @",
    )
    expect(
        getattr(result, "ndim", 3) != 4,
        "the result still has a head axis: average over the heads of each layer before you multiply",
    )
    expect_tensor(result, reference, "the rollout")
    right("every row sums to 1, and says which input tokens it is made of.")


def nearest_words(answer: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Exercise 4."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(12, 6, generator=generator) * torch.linspace(0.2, 3, 12)[:, None]
    tokens = torch.randn(5, 6, generator=generator) * torch.linspace(0.5, 4, 5)[:, None]
    cosines, ids = measures.nearest_words(tokens, table, k=3)
    result = call(answer, tokens.clone(), table.clone(), k=3)
    expect(
        isinstance(result, tuple) and len(result) == 2,
        "return two tensors, separated by a comma: the cosines and the ids",
    )
    values, words = result
    expect(isinstance(words, Tensor), f"the ids should be a tensor, but they are a {type(words).__name__}")
    expect(
        not same(values, ids) and not (isinstance(values, Tensor) and values.dtype == torch.int64),
        "ids and cosines are swapped: the cosines come first",
    )
    products = (tokens @ table.T).topk(3)
    expect(
        not same(words, products.indices),
        "you compared by the dot product: a long word vector then beats a close one, so divide by the "
        "lengths",
    )
    expect(
        not same(words, (F.normalize(tokens, dim=1) @ F.normalize(table, dim=1).T).topk(3, largest=False)[1]),
        "these are the words that point the other way: take the largest cosines",
    )
    away = torch.cdist(tokens, table).topk(3, largest=False).indices
    expect(
        not same(words, away),
        "you compared by distance: image tokens are longer than words, so compare directions, by the cosine",
    )
    expect_tensor(words, ids, "the ids")
    expect(
        not same(values, F.normalize(table, dim=1)[ids].mul(tokens[:, None]).sum(dim=-1)),
        "right words, but your cosines are larger than 1: divide by the token's length as well",
    )
    expect_tensor(values, cosines, "the cosines")
    right("directions are compared, lengths do not matter.")
