"""Which mistakes the checks of 10_contrastive_training name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.checks import NotYet, towers
from minivlm.losses import l2_normalize

Answer = Callable[..., Any]
ranks, predictions, ring, equals, fault, match = (
    towers.solutions.find_ranks,
    towers.solutions.predict_losses,
    towers.solutions.ring_loss,
    towers.solutions.sigmoid_of_equals,
    towers.solutions.find_fault,
    towers.solutions.match_pictures,
)

RANKS: list[tuple[Answer, str]] = [
    (lambda s: ranks(s) - 1, "count from 0"),
    (lambda s: 1 + (s >= s.diagonal()[:, None]).sum(1), "one too large"),
    (lambda s: 1 + (s > s.diagonal()[:, None]).sum(1), "in the model's favor"),
    (lambda s: ranks(s.T), "ranks of the pictures"),
    (lambda s: (s >= s.diagonal()).sum(1), "makes a column of it"),
    (lambda s: s.argsort(dim=1, descending=True, stable=True).diagonal(), "which caption is at each place"),
    (lambda s: s.argsort(dim=1, descending=True, stable=True)[:, 0], "which caption is at each place"),
    (lambda s: ranks(-s), "least similar"),
    (lambda s: ranks(s).float(), "whole numbers"),
    (lambda s: s.argsort(dim=1, descending=True, stable=True).argsort(dim=1).diagonal() + 1, "left to luck"),
    (lambda s: s.argsort(dim=1, stable=True).flip(1).argsort(dim=1).diagonal() + 1, "left to luck"),
    (lambda s: ranks(s)[:, None], "squeeze"),
    (lambda s: (ranks(s) + 1 + (s > s.diagonal()[:, None]).sum(1)) / 2, "half a place"),
    (lambda s: ranks(s).tolist(), "a list. For the rows"),
    (lambda s: torch.full((4,), 4), "at least as similar as the one on the diagonal"),
]


@pytest.mark.parametrize(("answer", "hint"), RANKS)
def test_find_ranks_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        towers.find_ranks(answer)


def test_find_ranks_accepts_a_sort_that_knows_of_draws() -> None:
    """Sorting with the right caption pushed behind its equals is right, if slow."""

    def pushed(similarity: Tensor) -> Tensor:
        lower = similarity - 1e-6 * torch.eye(len(similarity))
        return lower.argsort(dim=1, descending=True, stable=True).argsort(dim=1).diagonal() + 1

    towers.find_ranks(pushed)


NAMES = tuple(predictions())
PREDICTIONS: list[tuple[Answer, str]] = [
    *(
        (lambda name=name, word=word: predictions() | {name: word}, f"{re.escape(name)}: you say it {word}")
        for name in NAMES
        for word in towers.DIRECTIONS
        if word != predictions()[name]
    ),
    (lambda: dict.fromkeys(NAMES, "stays"), "3 of 7 as predicted"),
    (lambda: list(predictions().values()), "expected a dictionary"),
    (lambda: {"CLIP": "falls"}, "no prediction for"),
    (lambda: predictions() | {NAMES[0]: "same"}, "one of falls, stays, rises"),
]


@pytest.mark.parametrize(("answer", "hint"), PREDICTIONS)
def test_predict_losses_explains_each_wrong_prediction(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        towers.predict_losses(answer)


def test_predictions_are_what_the_losses_do() -> None:
    def losses(
        right: float = 0.5, wrong: float = 0.1, n: int = 64, factor: float = 10, bias: float = -5
    ) -> Any:
        cosines = torch.full((n, n), float(wrong)).fill_diagonal_(right)
        signs = 2 * torch.eye(n) - 1
        clip = F.cross_entropy(factor * cosines, torch.arange(n)).item()
        siglip = -F.logsigmoid(signs * (factor * cosines + bias)).sum().item() / n
        return clip, siglip, (ranks(cosines) <= 10).double().mean().item()

    def direction(before: float, after: float) -> str:
        return "stays" if abs(after - before) < 1e-4 else "rises" if after > before else "falls"

    start, higher, flat = losses(), losses(right=0.7, wrong=0.3), losses(right=0.1)
    found = [
        (start[0], higher[0]),
        (start[1], higher[1]),
        (start[0], losses(factor=20)[0]),
        (flat[0], losses(right=0.1, factor=20)[0]),
        (start[0], losses(n=128)[0]),
        (losses(right=0, wrong=0, bias=-10)[1], losses(right=0, wrong=0, bias=-4.1)[1]),
        (start[2], higher[2]),
    ]
    assert [direction(*pair) for pair in found] == list(predictions().values())


def _turn(
    images: list[Tensor],
    texts: list[Tensor],
    block_loss: Answer,
    *,
    rounds: int = 3,
    step: int = -1,
    own: Callable[[int, int, int], bool] = lambda device, owner, turn: device == owner,
) -> tuple[Tensor, list[list[int]]]:
    """A ring with something wrong. Every device gets what the one `step` further had."""
    held = list(enumerate(texts))
    met: list[list[int]] = [[] for _ in images]
    total = torch.tensor(0.0)
    for turn in range(rounds):
        for device, (owner, passing) in enumerate(held):
            met[device].append(owner)
            total = total + block_loss(images[device], passing, own(device, owner, turn))
        held = [held[(device + step) % len(held)] for device in range(len(held))]
    return total / len(images), met


def _one_after_the_other(
    images: list[Tensor], texts: list[Tensor], block_loss: Answer
) -> tuple[Tensor, list[list[int]]]:
    """Every device overwrites its neighbor's texts before the neighbor has passed them on."""
    held = list(enumerate(texts))
    met: list[list[int]] = [[] for _ in images]
    total = torch.tensor(0.0)
    for _ in images:
        for device, (owner, passing) in enumerate(held):
            met[device].append(owner)
            total = total + block_loss(images[device], passing, owner == device)
        for device in range(len(held)):
            held[device] = held[device - 1]
    return total / len(images), met


def _changed(change: Callable[[Tensor, list[list[int]]], Any]) -> Answer:
    return lambda *args: change(*ring(*args))


RINGS: list[tuple[Answer, str]] = [
    (_one_after_the_other, "at the same moment"),
    (lambda *args: _turn(*args, rounds=2), "own block counts as well"),
    (lambda *args: _turn(*args, rounds=4), "back home"),
    (lambda *args: _turn(*args, step=1), "to the left"),
    (lambda *args: _turn(*args, own=lambda device, owner, turn: True), "`own` is wrong"),
    (lambda images, texts, loss: ring([x[:1] for x in images], texts, loss), "whole block"),
    (_changed(lambda loss, met: (3 * loss, met)), "sum over the devices"),
    (_changed(lambda loss, met: (loss / 3, met)), "mean over all blocks"),
    (_changed(lambda loss, met: (loss, [[0, 1, 2]] * 3)), "order of their numbers"),
    (_changed(lambda loss, met: (loss, [[0], [1], [2]])), "expected"),
    (_changed(lambda loss, met: loss), "two things"),
]


@pytest.mark.parametrize(("answer", "hint"), RINGS)
def test_ring_loss_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        towers.ring_loss(answer)


def _equal(captions: list[str]) -> Tensor:
    return torch.tensor([[a == b for b in captions] for a in captions])


def _terms(logits: Tensor, captions: list[str]) -> Tensor:
    return -F.logsigmoid(torch.where(_equal(captions), logits, -logits))


EQUALS: list[tuple[Answer, str]] = [
    (lambda x, c: -F.logsigmoid((2 * torch.eye(len(x)) - 1) * x).sum() / len(x), "only the diagonal"),
    (lambda x, c: _terms(x, c)[torch.eye(len(x)).bool() | ~_equal(c)].sum() / len(x), "left out"),
    (lambda x, c: _terms(x, c)[_equal(c)].sum() / len(x), "only the right pairs"),
    (lambda x, c: -F.logsigmoid(_equal(c) * x).sum() / len(x), "sign 0"),
    (lambda x, c: equals(-x, c), "swapped"),
    (lambda x, c: _terms(x, c).mean(), "mean over all"),
    (lambda x, c: _terms(x, c).sum(), "divide it by n"),
    (lambda x, c: _terms(x, c).sum() / _equal(c).sum(), "number of right pairs"),
    (lambda x, c: -equals(x, c), "sign of the loss"),
    (
        lambda x, c: -(x.log_softmax(1) * _equal(c) / _equal(c).sum(1, keepdim=True)).sum() / len(x),
        "a softmax over each row",
    ),
    (lambda x, c: -F.logsigmoid(x).sum() / len(x), "every pair counts as right"),
    (lambda x, c: _terms(x, c).sum(1), "a term for each picture"),
    (lambda x, c: equals(x, c) + 1, "The term of a pair"),
]


@pytest.mark.parametrize(("answer", "hint"), EQUALS)
def test_sigmoid_of_equals_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        towers.sigmoid_of_equals(answer)


def test_sigmoid_of_equals_accepts_the_same_as_cross_entropy() -> None:
    def binary(logits: Tensor, captions: list[str]) -> Tensor:
        labels = _equal(captions).float()
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(logits)

    towers.sigmoid_of_equals(binary)


def _blind(
    order: list[int] | None = None,
    moved: Callable[[Tensor], Tensor] = lambda x: x.roll(8, dims=-1),
    recolored: Callable[[Tensor], Tensor] = lambda x: x[:, [2, 1, 0]],
    same: Callable[[Tensor, Tensor], bool] = lambda a, b: torch.allclose(a, b, atol=1e-4),
    names: tuple[str, ...] = ("words", "patches", "colors"),
) -> Answer:
    """Finds a fault, with something wrong."""

    @torch.no_grad()
    def find(model: Any, pixels: Tensor, ids: Tensor) -> str:
        swapped = ids[:, order or [0, 2, 1, *range(3, ids.shape[1])]]
        before, words = model.encode_image(pixels), (model.encode_text(ids), model.encode_text(swapped))
        patches, colors = ((before, model.encode_image(x)) for x in (moved(pixels), recolored(pixels)))
        tries = zip(names, (words, patches, colors), strict=True)
        return next((name for name, pair in tries if same(*pair)), "nothing")

    return find


FAULTS: list[tuple[Answer, str]] = [
    (lambda m, p, i: "words", "sound towers are called blind"),
    (lambda m, p, i: "nothing", "seem sound to you"),
    (lambda m, p, i: "the text tower", "return one of"),
    (lambda m, p, i: True, "return one of"),
    (_blind(same=torch.equal), "compare with a tolerance"),
    (_blind(moved=lambda x: x.roll(1, dims=-1)), "let whole patches change places"),
    (_blind(moved=lambda x: x.flip(-1)), "a mirror"),
    (_blind(order=[7, 6, 5, 4, 3, 2, 1, 0]), "the last position must stay"),
    (_blind(order=[0, 1, 2, 3, 4, 6, 5, 7]), "has to change the input"),
    (_blind(recolored=lambda x: x[:, [0, 1, 2]]), "has to change the input"),
    (_blind(recolored=lambda x: -x), "let two color channels change places"),
    (_blind(names=("patches", "words", "colors")), "are called blind to"),
    (_blind(same=lambda a, b: not torch.allclose(a, b, atol=1e-4)), "sound towers are called blind"),
    (_blind(same=lambda a, b: bool((a - b).abs().max() < 100)), "sound towers are called blind"),
]


@pytest.mark.parametrize(("answer", "hint"), FAULTS)
def test_find_fault_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        towers.find_fault(answer)


def test_find_fault_accepts_other_measures() -> None:
    towers.find_fault(_blind())

    def cosine(a: Tensor, b: Tensor) -> bool:
        return bool(F.cosine_similarity(a, b).min() > 1 - 1e-5)

    towers.find_fault(_blind(same=cosine, recolored=lambda x: x.mean(dim=1, keepdim=True).expand_as(x)))


def _given(key: str, change: Callable[..., Any]) -> Answer:
    """The right answer, with one of its parts made from the vectors of any length in another way."""

    @torch.no_grad()
    def answer(
        model: Any, processor: Any, pictures: Any, captions: Any, names: Any, templates: Any, k: int
    ) -> Any:
        result = match(model, processor, pictures, captions, names, templates, k)
        images = model.encode_image(processor(images=pictures)["pixel_values"])
        texts = model.encode_text(processor(texts=captions)["input_ids"])
        sentences = [t.replace("{}", name) for name in names for t in templates]
        of_classes = model.encode_text(processor(texts=sentences)["input_ids"])
        of_classes = of_classes.view(len(names), len(templates), -1)
        scale, bias = model.logit_scale.exp(), model.logit_bias
        cosines = l2_normalize(images) @ l2_normalize(texts).T
        scope = {
            "images": images, "texts": texts, "of_classes": of_classes, "cosines": cosines, "names": names,
            "logits": scale * cosines + bias, "scale": scale, "bias": bias, "k": k, "result": result,
        }  # fmt: skip
        return result | {key: change(scope)}

    return answer


def _named(vectors: Callable[[Tensor], Tensor], lowest: bool = False) -> Answer:
    def classes(s: dict[str, Any]) -> list[str]:
        cosines = l2_normalize(s["images"]) @ vectors(s["of_classes"]).T
        return [s["names"][i] for i in (cosines.argmin(1) if lowest else cosines.argmax(1)).tolist()]

    return _given("classes", classes)


def _share(s: dict[str, Any], rule: Callable[[Tensor], Tensor]) -> list[float]:
    return [rule(c).double().mean().item() for c in (s["cosines"], s["cosines"].T)]


def _kind(cosines: Tensor) -> Tensor:
    return 1 + (cosines > cosines.diagonal()[:, None]).sum(1)


MATCHES: list[tuple[Answer, str]] = [
    (lambda *given: {"classes": []}, "with the keys"),
    (lambda *given: list(match(*given).values()), "with the keys"),
    (
        _given("classes", lambda s: [s["names"].index(name) for name in s["result"]["classes"]]),
        "holds numbers",
    ),
    (_given("classes", lambda s: s["result"]["classes"][:3]), "3 names for 8 pictures"),
    (_named(lambda c: l2_normalize(c.mean(1))), "each sentence has to be brought to length 1"),
    (_named(lambda c: l2_normalize(c[:, 0])), "first template only"),
    (_named(lambda c: l2_normalize(c[:, 2])), "bare name"),
    (_named(lambda c: l2_normalize(c).mean(1)), "bring the mean to length 1 again"),
    (_named(lambda c: l2_normalize(l2_normalize(c).mean(1)), lowest=True), "argmax, not argmin"),
    (_given("classes", lambda s: [s["names"][0]] * 8), "has the largest cosine"),
    (_given("found", lambda s: s["cosines"].argmax(1).tolist()), "turn it around"),
    (_given("found", lambda s: (s["images"] @ s["texts"].T).argmax(0).tolist()), "bright pictures win"),
    (_given("found", lambda s: [0] * 8), "the picture with the largest cosine"),
    (_given("found", lambda s: s["result"]["found"][:2]), "one whole number for each caption"),
    (_given("recall", lambda s: s["result"]["recall"][::-1]), "two directions swapped"),
    (_given("recall", lambda s: _share(s, lambda c: _kind(c) <= s["k"])), "kind to draws"),
    (_given("recall", lambda s: _share(s, lambda c: ranks(c) <= 1)), "that of rank 1"),
    (_given("recall", lambda s: [8 * x for x in s["result"]["recall"]]), "divide by their number"),
    (_given("recall", lambda s: [0.9, 0.9]), "the share of ranks up to 2"),
    (_given("probability", lambda s: s["logits"].softmax(1).diagonal()), "softmax over the captions"),
    (_given("probability", lambda s: s["logits"].softmax(0).diagonal()), "softmax over the pictures"),
    (
        _given("probability", lambda s: (s["scale"].log() * s["cosines"].diagonal() + s["bias"]).sigmoid()),
        "logarithm of the factor",
    ),
    (
        _given("probability", lambda s: (s["scale"] * s["cosines"].diagonal()).sigmoid()),
        "the bias is missing",
    ),
    (_given("probability", lambda s: s["cosines"].diagonal()), "holds the cosines"),
    (_given("probability", lambda s: s["logits"].diagonal()), "holds the logits"),
    (_given("probability", lambda s: s["logits"].sigmoid()), "the diagonal"),
    (_given("probability", lambda s: [0.5] * 8), "the sigmoid of factor times cosine"),
]


@pytest.mark.parametrize(("answer", "hint"), MATCHES)
def test_match_pictures_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        towers.match_pictures(answer)


def test_match_pictures_accepts_tensors() -> None:
    def with_tensors(*given: Any) -> dict[str, Any]:
        result = match(*given)
        tensors = {key: torch.tensor(result[key]) for key in ("found", "recall", "probability")}
        return result | tensors

    towers.match_pictures(with_tensors)
