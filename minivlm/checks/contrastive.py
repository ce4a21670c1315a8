"""Checks for 02_clip_and_siglip: SigLIP's loss, zero-shot, the text tower, log-sum-exp by blocks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.checks import Functions, call, expect, expect_tensor, right, same
from minivlm.losses import l2_normalize, similarity
from minivlm.text.clip import CLIPTextConfig, CLIPTextModel

CHANGES = ("level", "row", "order", "captions", "transposed")


class solutions:
    """The exercises' functions as the rest of the notebook uses them."""

    @staticmethod
    def siglip_of_logits(logits: Tensor) -> Tensor:
        """logits [n, n], right pairs on the diagonal -> SigLIP's loss, a number."""
        labels = 2 * torch.eye(len(logits)) - 1
        return -F.logsigmoid(labels * logits).sum() / len(logits)

    @staticmethod
    def predict_changes() -> dict[str, str]:
        """For each change of the logits: whose loss changes."""
        return {
            "level": "SigLIP",
            "row": "both",
            "order": "neither",
            "captions": "both",
            "transposed": "neither",
        }

    @staticmethod
    def zero_shot(image_embeds: Tensor, prompt_embeds: Tensor) -> Tensor:
        """image_embeds [n, D], prompt_embeds [classes, prompts, D] -> the class of each picture, [n]."""
        class_embeds = l2_normalize(prompt_embeds).mean(dim=1)  # [classes, D]
        return similarity(image_embeds, class_embeds).argmax(dim=1)

    @staticmethod
    def encode_text(tower: Any, ids: Tensor, end: int) -> Tensor:
        """ids [B, T], padded after the end token -> one vector per text, [B, D]."""
        places = ids.shape[1]
        mask = torch.ones(places, places).tril().bool()
        x = tower.embeddings(ids)
        for layer in tower.layers:
            x = layer(x, mask)
        x = tower.final_layer_norm(x)
        return x[torch.arange(len(ids)), (ids == end).int().argmax(dim=1)]

    @staticmethod
    def find_fault() -> str:
        """The step that is broken in `broken_text_tower`."""
        return "end"

    @staticmethod
    def row_log_sum_exp(blocks: Iterable[Tensor]) -> Tensor:
        """Blocks [n, b] of columns, each seen once -> log(sum(exp(row))) of the whole rows, [n]."""
        largest, total = torch.tensor(-torch.inf), torch.tensor(0.0)
        for block in blocks:
            new = torch.maximum(largest, block.max(dim=1).values)  # [n]
            total = total * (largest - new).exp() + (block - new[:, None]).exp().sum(dim=1)
            largest = new
        return largest + total.log()


def siglip_of_logits(answer: Callable[..., Any]) -> None:
    """Logits of ordinary size, where mistakes show, then far ones, then the gradient."""
    logits = _noise(5, 5) * 3
    watch = Functions()
    with watch:
        result = call(answer, logits.clone())
    expect(
        not watch.saw("binary_cross_entropy", "soft_margin"),
        "this is the library's loss: write it yourself, from labels of +1 and -1 and F.logsigmoid",
    )
    of_pairs = -F.logsigmoid((2 * torch.eye(5) - 1) * logits)
    diagonal, all_yes, all_no = torch.eye(5).bool(), -F.logsigmoid(logits), -F.logsigmoid(-logits)
    cross = F.cross_entropy(logits, torch.arange(5)), F.cross_entropy(logits.T, torch.arange(5))
    if isinstance(result, Tensor):
        expect(
            not (same(result, of_pairs) or same(result, of_pairs.sum(0)) or same(result, of_pairs.sum(1))),
            "these are the losses of the single pairs: we want one number, their sum divided by n",
        )
    mistakes = {
        "you divided by n * n: the sum of all pairs is divided by n, the number of pictures. A mean over all "
        "pairs is n times too small (section 9)": of_pairs.mean(),
        "you summed all pairs and did not divide by n: the loss would grow with the batch": of_pairs.sum(),
        "the sign is wrong: log(probability) is negative, and the loss is -log": -of_pairs.sum() / 5,
        "every pair counts as right: wrong pairs need the label -1, so that 1 - sigmoid is taken": (
            all_yes.sum() / 5
        ),
        "every pair counts as wrong: the pairs on the diagonal need the label +1": all_no.sum() / 5,
        "the labels are turned around: +1 belongs on the diagonal, -1 everywhere else": (
            torch.where(diagonal, all_no, all_yes).sum() / 5
        ),
        "only the right pairs are there: the n² - n wrong pairs count as well": of_pairs.diagonal().mean(),
        "only the wrong pairs are there: the right pairs on the diagonal count as well": (
            of_pairs[~diagonal].sum() / 5
        ),
        "wrong pairs have the label 0, and log(sigmoid(0)) is log(0.5) whatever the logit: use -1": (
            -F.logsigmoid(torch.eye(5) * logits).sum() / 5
        ),
        "this is the sum of the probabilities, without logarithm": -(-of_pairs).exp().sum() / 5,
        "this is a softmax over each row, one half of CLIP's loss: each pair is a question of its own": cross[
            0
        ],
        "this is a softmax over each column, one half of CLIP's loss: each pair is a question of its own": (
            cross[1]
        ),
        "this is CLIP's loss: a sigmoid asks about each pair alone, without a sum over rows or columns": (
            cross[0] + cross[1]
        )
        / 2,
        "right and wrong pairs got one mean each: SigLIP sums them all and divides by n": (
            of_pairs.diagonal().mean() + of_pairs[~diagonal].mean()
        ),
    }
    _name(result, mistakes)
    expect_tensor(result, of_pairs.sum() / 5, "the loss")
    far = torch.full((3, 3), -110.0)
    far[0, 1] = 120.0  # very sure, and wrong
    result = call(answer, far.clone())
    expect(
        bool(torch.isfinite(result)),
        "right for small logits, but not finite for a right pair at -110 or a wrong one at 120: the sigmoid "
        "is rounded to 0 before its logarithm, or exp overflows. Use F.logsigmoid, or min(x, 0) - "
        "log1p(exp(-|x|))",
    )
    expect_tensor(result, solutions.siglip_of_logits(far), "the loss of far logits")
    x = logits.clone().requires_grad_()
    result = call(answer, x)
    expect(
        isinstance(result, Tensor) and result.requires_grad,
        "the number is right, but it carries no gradient: leave out .item(), .detach() and numpy",
    )
    right("the sum over all n² pairs, divided by n, and a wrong pair at a logit of 120 does no harm.")


def predict_changes(answer: Callable[..., Any]) -> None:
    """What each loss does not see."""
    result = call(answer)
    expect(isinstance(result, dict), f"return a dict with the keys {', '.join(CHANGES)}")
    unknown = [str(key) for key in result if key not in CHANGES]
    expect(not unknown, f"there is no change called {', '.join(unknown)}: the keys are {', '.join(CHANGES)}")
    missing = [key for key in CHANGES if key not in result]
    expect(not missing, f"no prediction yet for: {', '.join(missing)}")
    values = ("CLIP", "SigLIP", "both", "neither")
    for key in CHANGES:
        expect(
            result[key] in values,
            f"{key}: {result[key]!r} is no prediction: choose one of {', '.join(values)}",
        )
    why = {
        "level": "adding the same number to every logit multiplies numerator and denominator of each softmax "
        "alike, so CLIP does not notice. Each sigmoid moves, so SigLIP does: this is what its bias does",
        "row": "the softmax over row A does not notice a number added to all of it, but each column has one "
        "raised entry, so CLIP's other half changes; and four sigmoids move",
        "order": "pictures and captions moved together, so every pair still meets, and right pairs are "
        "still on the diagonal: a batch has no order",
        "captions": "the captions moved alone, so two right pairs have left the diagonal: both losses now "
        "pull at wrong pairs",
        "transposed": "rows become columns: CLIP takes the mean of both, and SigLIP adds up all pairs, so "
        "neither can tell",
    }
    for key, truth in solutions.predict_changes().items():
        expect(result[key] == truth, f"{key}: you say {result[key]}, it is {truth}, since {why[key]}")
    right(
        "all five. CLIP sees differences within a row or column, SigLIP sees levels, and neither sees order."
    )


def zero_shot(answer: Callable[..., Any]) -> None:
    """Prompts of very different lengths, so that each missing normalization changes some class."""
    image_embeds = _noise(64, 6)
    prompt_embeds = _noise(5, 4, 6) * torch.linspace(0.2, 6, 20)[_order(20)].view(5, 4, 1)
    prompt_embeds[0] = prompt_embeds[0, :1] + 0.1 * prompt_embeds[0]  # four prompts that mean the same
    result = call(answer, image_embeds.clone(), prompt_embeds.clone())
    unit = l2_normalize(prompt_embeds)
    means = similarity(image_embeds, unit.mean(dim=1))  # [64, 5]
    cosines = similarity(image_embeds, unit.flatten(0, 1)).view(64, 5, 4)
    mistakes = {
        "the prompts have different lengths, and the long ones outvote the short ones: normalize each prompt "
        "before you take the mean": similarity(image_embeds, prompt_embeds.mean(dim=1)).argmax(dim=1),
        "the mean of several directions is shorter the more they differ, which puts that class at a "
        "disadvantage: normalize again after the mean": (l2_normalize(image_embeds) @ unit.mean(1).T).argmax(
            1
        ),
        "you took the best single prompt: take the mean of the prompts' vectors": cosines.amax(2).argmax(1),
        "you took the first prompt of each class alone: take the mean of all": cosines[:, :, 0].argmax(1),
        "this is the number of the best prompt among all, not of its class: take the mean over each class's "
        "prompts first": cosines.flatten(1).argmax(1),
        "each prompt chose a class, and you counted votes: take the mean of the vectors instead": (
            cosines.argmax(1).mode(dim=1).values
        ),
        "nothing is normalized: long vectors win": (image_embeds @ prompt_embeds.mean(dim=1).T).argmax(dim=1),
        "this is the least similar class: take argmax": means.argmin(dim=1),
        "the classes count from 0: argmax gives the index already": means.argmax(dim=1) + 1,
    }
    _name(result, mistakes)
    if isinstance(result, Tensor):
        expect(
            tuple(result.shape) != (64, 5),
            "these are the similarities with each class: take the argmax over the classes",
        )
        expect(
            tuple(result.shape) != (5,),
            "this is the best picture of each class: we want the best class of each picture, argmax(dim=1)",
        )
        expect(
            tuple(result.shape) != (64, 4),
            "you took the mean over the classes: axis 1 of [classes, prompts, D] holds the prompts",
        )
        expect(
            not result.dtype.is_floating_point,
            "these are similarities or probabilities: argmax gives the index of the class",
        )
    expect_tensor(result, means.argmax(dim=1), "the classes")
    right("a classifier made of sentences, with no training picture of its own.")


def encode_text(answer: Callable[..., Any]) -> None:
    """A random tower of two blocks, and texts that tell apart what can go wrong."""
    tower, ids, end = _text_tower(), _TEXTS, _END
    parts: Any = SimpleNamespace(
        embeddings=tower.embeddings, layers=tower.layers, final_layer_norm=tower.final_layer_norm
    )  # not callable: the reader puts the parts together
    result = call(answer, parts, ids.clone(), end)
    with torch.no_grad():
        mistakes = {hint: _encode(tower, ids, **how) for hint, how in _WRONG_TOWERS.items()}
        _name(result, mistakes)
        if isinstance(result, Tensor):
            expect(
                tuple(result.shape) != (*ids.shape, 16),
                "these are the vectors of all tokens: pick the one at the end token of each text",
            )
            expect(
                tuple(result.shape) != (len(ids), len(ids), 16),
                "x[:, places] picks every place from every text: pair row i with its own place, "
                "x[torch.arange(B), places]",
            )
            expect(
                tuple(result.shape) != (int((ids == end).sum()), 16),
                "there is a vector for each end token, and a text may be filled up with end tokens: take the "
                "first one of each text",
            )
        expect_tensor(result, _encode(tower, ids), "the vector of each text")
    right("a causal tower, read at the end token: what comes after the end is never seen.")


def broken_text_tower(tower: CLIPTextModel, end: int) -> Callable[[Tensor], Tensor]:
    """The same parts and weights as `tower`, put together with one step broken: ids [B, T] -> [B, D]."""

    def encode(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return _encode(tower, ids, end=end, read="highest")

    return encode


def find_fault(answer: Callable[..., Any]) -> None:
    """The broken tower reads at the token with the highest id, as OpenAI's code does."""
    result = call(answer)
    expect(isinstance(result, str), "return the name of a step, a string")
    name = result.strip().lower()
    seen = {
        "words": "with a wrong word vector, red and blue would differ, or not, wherever they stand. Here "
        "they differ in front of `star`, and not in front of `circle`",
        "positions": "without positions it would hardly matter in which order words come. Swap two words in "
        "front of `star`: the vector moves as it does in your own tower",
        "mask": "without the mask a token would see what comes after it, the padding too. Put `a` in place "
        "of the padding: no vector changes",
    }
    expect(name in {*seen, "end"}, f"{result!r} is no step: choose one of {', '.join([*seen, 'end'])}")
    expect(name == "end", f"not the {name}: {seen.get(name)}")
    right(
        "it reads at the highest id of each text, which is the end token only if no word has a higher one: "
        "what follows that word is never seen."
    )


def row_log_sum_exp(answer: Callable[..., Any]) -> None:
    """Blocks of unequal width that can be read only once; the largest number comes late."""
    whole = _noise(4, 12) * 4
    whole[:, 9] += 6
    widths = [3, 2, 4, 3]
    blocks = whole.split(widths, dim=1)
    result = call(answer, (block.clone() for block in blocks))
    truth = whole.logsumexp(dim=1)
    largest = whole.max(dim=1).values
    unscaled = torch.zeros(4)
    running = torch.full((4,), -torch.inf)
    for block in blocks:
        running = torch.maximum(running, block.max(dim=1).values)
        unscaled = unscaled + (block - running[:, None]).exp().sum(dim=1)
    mistakes = {
        "when the largest number grows, the sum so far is relative to the old one: multiply it by "
        "exp(old - new) before you add": running + unscaled.log(),
        "you added the log-sum-exp of the blocks: sums of exp add up, their logarithms do not": sum(
            block.logsumexp(dim=1) for block in blocks
        ),
        "this is the log-sum-exp of the last block alone": blocks[-1].logsumexp(dim=1),
        "this is the logarithm of the sum relative to the largest number: add the largest number back": (
            truth - largest
        ),
        "this is the largest number of each row, not the log-sum-exp": largest,
        "this is the sum: its logarithm is missing": truth.exp(),
    }
    for hint, mistake in mistakes.items():
        expect(not same(result, torch.as_tensor(mistake)), hint)
    if isinstance(result, Tensor):
        expect(
            tuple(result.shape) != (12,),
            "there is one number per column: blocks hold columns, so a row continues from block to block",
        )
        expect(
            tuple(result.shape) != (4, 1), "the shape is [n, 1]: drop the last axis, one number per row, [n]"
        )
    expect_tensor(result, truth, "the log-sum-exp")
    large = (whole * 30).split(widths, dim=1)
    result = call(answer, (block.clone() for block in large))
    expect(
        bool(torch.isfinite(result).all()),
        "right for small numbers, but not finite for large ones: keep the largest number of each row so "
        "far, and take exp only of the differences from it",
    )
    expect_tensor(result, (whole * 30).logsumexp(dim=1), "the log-sum-exp of large numbers")
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watched() -> Iterator[Tensor]:
        nonlocal most
        for part in _noise(4, 60).split(5, dim=1):
            block = part.clone()
            alive.append(weakref.ref(block))
            yield block
            del block
            most = max(most, sum(reference() is not None for reference in alive))

    call(answer, watched())
    expect(
        most <= 2,
        f"the result is right, but you kept {most} blocks at the same time: keep two numbers per row, the "
        "largest so far and the sum so far, and let go of each block",
    )
    right("one block at a time, and the result is that of the whole row.")


def _name(result: Any, mistakes: dict[str, Tensor]) -> None:
    for hint, mistake in mistakes.items():
        expect(not same(result, mistake), hint)


_END = 3  # words have higher ids, the padding is 0
_TEXTS = torch.tensor(
    [
        [1, 4, 9, 6, 3, 0, 0],
        [1, 9, 4, 6, 3, 0, 0],
        [1, 5, 3, 0, 0, 0, 0],
        [1, 4, 9, 6, 8, 7, 3],  # no padding
        [1, 7, 2, 3, 3, 3, 3],  # padded with the end token, as CLIP's own files do
    ]
)
_WRONG_TOWERS: dict[str, dict[str, Any]] = {
    "the vector is read at the last place, which is padding in most texts: find the end token of each": {
        "read": "last"
    },
    "the vector is read at the token with the highest id. That is the end token in OpenAI's vocabulary, but "
    "not in this one: compare ids with `end`": {"read": "highest"},
    "the vector is read at the last end token of a text that has several: argmax of a comparison gives the "
    "first": {"read": "last end"},
    "the vector is read one place before the end token": {"read": "before"},
    "the vector is read at the first token, which sees only itself: the end token has seen all": {
        "read": "first"
    },
    "this is the mean over all places, padding included: CLIP reads one place, the end token": {
        "read": "mean"
    },
    "every token sees every other, and the padding too: the mask is missing, or True everywhere": {
        "mask": "none"
    },
    "the mask is turned around: each token sees itself and what comes *after* it. Use tril, not triu": {
        "mask": "future"
    },
    "no token sees itself: keep the diagonal of the mask": {"mask": "strict"},
    "the last norm is missing: tower.final_layer_norm": {"norm": False},
    "the blocks are missing: the vector at the end token has seen no word": {"blocks": 0},
    "only the first block is used: go through all of tower.layers": {"blocks": 1},
    "every block got the embeddings: each one reads what the block before it has written": {"chain": False},
    "the mask is used in the first block only: each block needs it": {"mask": "first"},
}


def _text_tower() -> CLIPTextModel:
    """Random weights that do not depend on the global generator, large enough to show each mistake."""
    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=10,
        max_position_embeddings=7, eos_token_id=_END,
    )  # fmt: skip
    tower = CLIPTextModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return tower.requires_grad_(False)


def _encode(
    tower: CLIPTextModel,
    ids: Tensor,
    end: int = _END,
    read: str = "end",
    mask: str = "causal",
    norm: bool = True,
    blocks: int | None = None,
    chain: bool = True,
) -> Tensor:
    """CLIP's text tower, or one of the wrong ones."""
    size = ids.shape[1]
    causal = torch.ones(size, size).tril().bool()
    everything = torch.ones(size, size).bool()
    allowed = {
        "none": everything,
        "future": causal.T,
        "strict": torch.ones(size, size).tril(-1).bool(),
    }.get(mask, causal)
    start = x = tower.embeddings(ids)
    for number, layer in enumerate(tower.layers[:blocks]):
        x = layer(x if chain else start, everything if mask == "first" and number else allowed)
    x = tower.final_layer_norm(x) if norm else x
    is_end, rows = (ids == end).int(), torch.arange(len(ids))
    first = is_end.argmax(dim=1)
    places = {
        "last": torch.full_like(first, size - 1),
        "highest": ids.argmax(dim=1),
        "last end": size - 1 - is_end.flip(1).argmax(dim=1),
        "before": first - 1,
        "first": torch.zeros_like(first),
    }
    return x.mean(dim=1) if read == "mean" else x[rows, places.get(read, first)]


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(1))
