"""Checks for 13_four_ways: predictions, moved spans, gated cross-attention, a media mask, MAGiC's score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.checks import NotYet, call, expect, right, same
from minivlm.losses import l2_normalize
from minivlm.models.miniatures.flamingo import GatedCrossAttentionBlock
from minivlm.training.ways import WAYS

Weights = Mapping[str, Tensor]
MaskOf = Callable[[Tensor, int], Tensor]


def winners(table: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[str]]:
    """For each guess the first, then those whose seeds reach as far as its seeds; by way, a dict a seed."""
    found = {}
    for guess, (score, sign) in SCORES.items():
        # MAGiC, which cannot be asked, was no guess.
        seeds = {name: [sign * score(one) for one in table[name]] for name in table if name in WAYS}
        order = sorted(seeds, key=lambda name: sum(seeds[name]) / len(seeds[name]), reverse=True)
        found[guess] = [name for name in order if max(seeds[name]) >= min(seeds[order[0]])]
    return found


SCORES: dict[str, tuple[Callable[[Mapping[str, Any]], float], int]] = {
    "most questions right": (lambda one: one["all questions"], 1),
    "most captions right": (lambda one: one["exact caption"], 1),
    "smallest box IoU": (lambda one: one["box mean IoU"], -1),
    "text loss rises most": (lambda one: one["text loss after"] - one["text loss before"], 1),
}
GUESSES = tuple(SCORES)


class solutions:
    """The solutions that the notebook continues with."""

    @staticmethod
    def predict() -> dict[str, Any]:
        """What can be worked out before anything is trained, and four guesses."""
        return {
            "places of a picture in cm3's row": 64,
            "places of a picture in clipcap's row": 10,
            "places of a picture in flamingo's row": 1,
            "text loss cannot change": {"clipcap", "flamingo"},
            "reads everything again for each word": "visualbert",
            "most questions right": "cm3",
            "most captions right": "flamingo",
            "smallest box IoU": "clipcap",
            "text loss rises most": "visualgpt",
        }

    @staticmethod
    def put_back(ids: list[int], sentinels: list[int], end: int) -> list[int]:
        """A document whose spans were moved to its end, in the order in which it is read."""
        ids = list(ids)
        for sentinel in sentinels:
            if ids.count(sentinel) < 2:
                break
            blank = ids.index(sentinel)
            start = ids.index(sentinel, blank + 1)
            stop = ids.index(end, start) if end in ids[start:] else len(ids)
            span = ids[start + 1 : stop]
            del ids[start : stop + 1]
            ids[blank : blank + 1] = span
        return ids

    @staticmethod
    def gated_block(x: Tensor, media: Tensor, mask: Tensor, weights: Weights, heads: int) -> Tensor:
        """Words [B, T, D], latents [B, S, D_image], mask [B, T, S], True = may look -> [B, T, D]."""
        y = F.layer_norm(x, x.shape[-1:], weights["attn.norm.weight"], weights["attn.norm.bias"])
        k, v = (media @ weights["attn.to_kv.weight"].T).chunk(2, dim=-1)
        q, k, v = (
            z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (y @ weights["attn.to_q.weight"].T, k, v)
        )
        scores = q @ k.mT * q.shape[-1] ** -0.5  # [B, H, T, S]
        shares = scores.masked_fill(~mask[:, None], -torch.inf).softmax(dim=-1).nan_to_num(0.0)
        seen = (shares @ v).transpose(1, 2).flatten(2) @ weights["attn.to_out.weight"].T
        x = x + weights["attn_gate"].tanh() * seen
        y = F.layer_norm(x, x.shape[-1:], weights["ff.0.weight"], weights["ff.0.bias"])
        y = F.gelu(y @ weights["ff.1.weight"].T) @ weights["ff.3.weight"].T
        return x + weights["ff_gate"].tanh() * y

    @staticmethod
    def find_fault(mask_of: MaskOf) -> str:
        """What is wrong with a function that makes media masks."""
        # Row 1: word <image> word <image> word. Row 2: <image> and four words.
        is_image = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]]).bool()
        first, second = mask_of(is_image, 1).unbind(dim=-1)  # who sees picture 1, picture 2: [2, 5] each
        if second[0, 0] or second[0, 2]:
            return "later"
        if first[0, 0]:
            return "before the first"
        if first[0, 4]:
            return "all so far"
        if not first[0, 1]:
            return "one place late"
        return "nothing" if first[1].all() else "across rows"

    @staticmethod
    def magic_step(
        logits: Tensor, states: Tensor, context: Tensor, fits: Tensor, k: int, a: float, b: float
    ) -> tuple[int, Tensor]:
        """The next word, and the scores [k] of the k most likely ones, the likeliest first."""
        p, ids = logits.softmax(dim=-1).topk(k)
        cosines = F.cosine_similarity(states[ids][:, None], context[None], dim=-1)  # [k, S]
        scores = (1 - a) * p - a * cosines.amax(dim=1) + b * fits[ids].softmax(dim=-1)
        return int(ids[scores.argmax()]), scores


# For each prediction: what a wrong answer reveals, and what to think of otherwise.
WORKED_OUT: dict[str, tuple[dict[Any, str], str]] = {
    "places of a picture in cm3's row": (
        {
            8: "8 is the number of patches in one line of the picture; it has as many lines",
            65: "CM3 has no class token: each patch has one place",
            1: "in CM3 every patch stands among the words, and not one `<image>` for all of them",
            4096: "4096 is the number of pixels: 8 x 8 of them make one patch",
        },
        "64 pixels make 8 patches of 8 pixels, in both directions",
    ),
    "places of a picture in clipcap's row": (
        {
            64: "the patches stay in front of the mapper: it reads their mean, and gives k vectors",
            1: "one vector goes into the mapper, and k come out",
            20: "the transformer mapper reads c + k vectors, and gives only the last k to the language model",
        },
        "the mapper gives k vectors, whatever the size of the picture",
    ),
    "places of a picture in flamingo's row": (
        {
            64: "the patches are looked at between the layers; in the row stands one `<image>`",
            16: "the latents are looked at between the layers; in the row stands one `<image>`",
            0: "one token has to say where the picture belongs: `<image>`",
        },
        "cross-attention takes no places for what it looks at; one token says where the picture belongs",
    ),
    "text loss cannot change": (
        {},
        "it is the loss of the language model on text without a picture: it stays where no weight that text "
        "meets is trained. Look for the ways whose language model is frozen",
    ),
    "reads everything again for each word": (
        {
            "cm3": "CM3 is a causal decoder: what was read stays as it is, and a cache keeps it",
            "simvlm": "in SimVLM only the prefix sees in both directions, and the prefix does not grow: a "
            "cache keeps it",
            "flamingo": "Flamingo's language model is causal and its latents stay: a cache keeps both",
            "llava": "LLaVA is a causal decoder: what was read stays as it is, and a cache keeps it",
        },
        "a cache needs words whose vectors stay the same when another word follows. Where does an earlier "
        "word see a later one, in the answer too?",
    ),
}


def predict(answer: Callable[[], dict[str, Any]]) -> None:
    """Exercise 1."""
    result = call(answer)
    expect(isinstance(result, dict), "return the dictionary, with all of its lines")
    for name in (*WORKED_OUT, *GUESSES):
        expect(
            result.get(name) not in (None, "", ..., set()), f"the line {name!r} is empty: predict something"
        )
    given = dict(result)
    frozen = "text loss cannot change"
    if isinstance(given[frozen], list | tuple | frozenset):
        given[frozen] = set(given[frozen])
    expect(isinstance(given[frozen], set), f'{frozen!r} is a set of names, such as {{"cm3", "llava"}}')
    for name in (frozen, "reads everything again for each word", *GUESSES):
        names = given[name] if name == frozen else {given[name]}
        unknown = sorted(str(one) for one in names if one not in WAYS)
        expect(not unknown, f"{name!r} says {', '.join(unknown)}: the names are {', '.join(WAYS)}")
    if "clipcap-mlp" in given[frozen]:
        raise NotYet(
            "clipcap-mlp is said to keep its text loss, but its language model learns with the mapper: only "
            "the variant with the transformer leaves it frozen"
        )
    for name in sorted(given[frozen] - {"clipcap", "flamingo"}):
        raise NotYet(
            f"{name} is said to keep its text loss, but its language model learns from pictures, too: the "
            "table above has a column for what learns"
        )
    truth = solutions.predict()
    wrong = [name for name in WORKED_OUT if given[name] != truth[name]]
    if wrong:
        told, otherwise = WORKED_OUT[wrong[0]]
        value = given[wrong[0]]
        hint = told.get(value, otherwise) if not isinstance(value, set) else otherwise
        count = len(WORKED_OUT) - len(wrong)
        raise NotYet(f"{count} of {len(WORKED_OUT)} are right. {wrong[0]!r}: {hint}")
    right("that much follows from the designs. Your four guesses wait for the table.")


# 100, 101, ... are sentinels, 99 is the end of a span.
DOCUMENTS: tuple[tuple[str, list[int], list[int]], ...] = (
    ("one span", [1, 2, 100, 6, 100, 3, 4, 5, 99], [1, 2, 3, 4, 5, 6]),
    ("two spans", [1, 100, 4, 101, 7, 100, 2, 3, 99, 101, 5, 6, 99], [1, 2, 3, 4, 5, 6, 7]),
    ("two spans side by side", [1, 100, 101, 4, 100, 2, 99, 101, 3, 99], [1, 2, 3, 4]),
    ("no span", [1, 2, 3], [1, 2, 3]),
    ("a span at the start", [100, 3, 100, 1, 2, 99], [1, 2, 3]),
    ("a span at the end", [1, 2, 100, 100, 3, 4, 99], [1, 2, 3, 4]),
    ("a span whose end was cut off", [1, 100, 4, 100, 2, 3], [1, 2, 3, 4]),
    (
        "three spans",
        [100, 2, 101, 4, 102, 6, 100, 1, 99, 101, 3, 99, 102, 5, 99],
        [1, 2, 3, 4, 5, 6],
    ),
)


def put_back(answer: Callable[[list[int], list[int], int], list[int]]) -> None:
    """Exercise 2."""
    for what, moved, whole in DOCUMENTS:
        given, sentinels = list(moved), [100, 101, 102]
        try:
            result = call(answer, given, sentinels, 99)
        except NotYet as error:
            cause = error.__cause__
            if isinstance(cause, ValueError) and "99" in str(cause):
                raise NotYet(
                    f"{what}: {error}. A document that was cut to the context has lost the end of its last "
                    "span, which then goes on to the end of the document"
                ) from error
            if isinstance(cause, ValueError | IndexError):
                raise NotYet(
                    f"{what}, {moved}: {error}. There may be fewer spans than sentinels: stop at the first "
                    "sentinel that does not occur twice"
                ) from error
            raise
        if isinstance(result, Tensor):
            raise NotYet("return a list of ids, as you got it, and not a tensor")
        expect(isinstance(result, list), f"return a list of ids, not a {type(result).__name__}")
        expect(given == moved, "your function changes the list that it was given: work on `list(ids)`")
        if result == whole:
            continue
        start = f"{what}: {moved} should become {whole}, and you return {result}. "
        if result == moved:
            raise NotYet(start + "Nothing has moved: each sentinel occurs twice, as a blank and at its span")
        if any(sentinel in result for sentinel in sentinels):
            raise NotYet(
                start + "A sentinel is left: the span takes the place of the first one, and the second one "
                "goes as well; and this for every sentinel that occurs twice"
            )
        if 99 in result:
            raise NotYet(start + "The end of a span is left: it belongs to no text, delete it with the span")
        if sorted(result) != sorted(whole):
            lost = sorted(set(whole) - set(result))
            raise NotYet(
                start + (f"{lost} are lost: " if lost else "Some words are there twice: ") + "a span is what "
                "stands between the second sentinel and the end token, and both limits are outside of it"
            )
        raise NotYet(
            start + "All words are there, in another order: a span goes to the place of its own sentinel, "
            "and keeps its order"
        )
    right("every word is back in its place, and the model has written it with both its sides in view.")


def faulty_block(
    x: Tensor, media: Tensor, mask: Tensor, weights: Weights, heads: int, fault: str = ""
) -> Tensor:
    """The block of exercise 3, with one of `BLOCK_FAULTS`."""
    w, width = weights, x.shape[-1:]

    def gate(name: str) -> Tensor:
        value = w["attn_gate" if fault == "one gate" else name]
        if fault == "no tanh":
            return value
        return value.sigmoid() if fault == "sigmoid" else value.tanh()

    y = x if fault == "no norm" else F.layer_norm(x, width, w["attn.norm.weight"], w["attn.norm.bias"])
    read = F.layer_norm(media, media.shape[-1:]) if fault == "media normed" else media
    k, v = (read @ w["attn.to_kv.weight"].T).chunk(2, dim=-1)
    if fault == "keys and values":
        k, v = v, k
    q = y @ w["attn.to_q.weight"].T
    if fault == "head order":
        q, k, v = (z.unflatten(-1, (-1, heads)).movedim(-1, 1) for z in (q, k, v))
    elif fault == "view":
        q, k, v = (z.reshape(len(z), heads, z.shape[1], -1) for z in (q, k, v))
    else:
        q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
    scale = {"no scale": 1.0, "scale of the width": x.shape[-1] ** -0.5}.get(fault, q.shape[-1] ** -0.5)
    scores, allowed = q @ k.mT * scale, mask[:, None]
    if fault == "mask inverted":
        allowed = ~allowed
    if fault == "mask ignored":
        allowed = torch.ones_like(allowed)
    lowest = 0.0 if fault == "masked with zero" else torch.finfo(scores.dtype).min
    if fault == "axis":
        shares = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-2).nan_to_num(0.0)
    else:
        shares = scores.masked_fill(~allowed, lowest).softmax(dim=-1)
    if fault not in ("no zeros", "masked with zero", "mask inverted", "mask ignored"):
        shares = shares.masked_fill(~mask.any(dim=-1)[:, None, :, None], 0.0)
    out = shares @ v
    merged = (
        out.flatten(1).view_as(q.flatten(1)).reshape(len(x), x.shape[1], -1) if fault == "merge" else None
    )
    seen = (out.transpose(1, 2).flatten(2) if merged is None else merged) @ w["attn.to_out.weight"].T
    before = x
    x = gate("attn_gate") * seen if fault == "no residual" else x + gate("attn_gate") * seen
    source = before if fault == "parallel" else x
    if fault != "no second norm":
        source = F.layer_norm(source, width, w["ff.0.weight"], w["ff.0.bias"])
    inside = source @ w["ff.1.weight"].T
    if fault == "relu":
        inside = F.relu(inside)
    elif fault != "no activation":
        inside = F.gelu(inside, approximate="tanh" if fault == "tanh form" else "none")
    added = gate("ff_gate") * (inside @ w["ff.3.weight"].T)
    if fault == "second part hidden":
        added = added * mask.any(dim=-1, keepdim=True)
    if fault == "no second part":
        return x
    return added if fault == "no second residual" else x + added


BLOCK_FAULTS = {
    "no tanh": "the gates enter as they are: they go through tanh first, so that none can grow past 1",
    "sigmoid": "the gates go through a sigmoid, which is one half at zero: a new block would be half open "
    "from the start. It is tanh, which is zero at zero",
    "one gate": "both branches go through attn_gate: the second has a gate of its own, ff_gate",
    "no norm": "the words are not normed before they ask: LayerNorm with attn.norm.weight and attn.norm.bias",
    "media normed": "the latents are normed here, too: they have their norm from the resampler, and are read "
    "as they are",
    "keys and values": "keys and values are swapped: the first half of to_kv's output are keys",
    "head order": "the heads are cut the wrong way: a head is Dh neighboring channels, so the last axis "
    "becomes [heads, Dh] and not [Dh, heads]",
    "view": "the axes of words and heads are mixed up: split the last axis first, then exchange the two axes",
    "merge": "after attention, heads and words are mixed up: exchange the axes back before you flatten",
    "no scale": "the scores are not scaled: multiply by Dh ** -0.5",
    "scale of the width": "the scores are scaled by the width of the words: it is the width of a head that "
    "counts",
    "mask inverted": "the mask is the wrong way around: True means that a word may look",
    "mask ignored": "every word sees all latents: the mask has no effect",
    "masked with zero": "hidden latents have the score 0, which is an ordinary score: a score that gets no "
    "share is -inf",
    "no zeros": "words that may see nothing get the mean of everything: a softmax over equal scores. Their "
    "attention has to be zero",
    "axis": "the softmax runs over the words: the shares of one word over all latents add up to 1",
    "no residual": "the words are gone: what was seen is added to x",
    "no second residual": "the second branch replaces x: add it",
    "parallel": "the second branch reads x from before the attention: it comes after it, and reads what the "
    "attention has left",
    "no second norm": "the second branch is not normed: LayerNorm with ff.0.weight and ff.0.bias comes first",
    "relu": "the activation is ReLU: here it is GELU",
    "no activation": "there is no activation between the two matrices of the second branch: GELU",
    "tanh form": "GELU is in its tanh form: here it is the exact one, F.gelu without arguments",
    "second part hidden": "the second branch is taken from words that see no picture: only the attention is",
    "no second part": "the second branch is missing: norm, matrix, GELU, matrix, and its gate",
}


def block_case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], int]:
    """Two rows of five words and two pictures of three latents; the first words see none."""
    generator = torch.Generator().manual_seed(seed)
    block = GatedCrossAttentionBlock(hidden_size=8, media_size=6, num_heads=2, head_dim=3)
    weights = {
        name: torch.randn(value.shape, generator=generator) * (0.6 if value.dim() == 2 else 1.0)
        for name, value in block.state_dict().items()
    }
    weights["attn_gate"].fill_(0.9)
    weights["ff_gate"].fill_(-0.6)
    picture = torch.tensor([[0, 1, 1, 2, 2], [0, 0, 1, 1, 1]])
    mask = picture[:, :, None] == torch.tensor([1, 1, 1, 2, 2, 2])
    x, media = (torch.randn(2, n, d, generator=generator) for n, d in ((5, 8), (6, 6)))
    return x, media, mask, weights, 2


def gated_block(answer: Callable[..., Tensor]) -> None:
    """Exercise 3."""
    x, media, mask, weights, heads = block_case()
    given = (x.clone(), media.clone(), mask.clone(), {n: w.clone() for n, w in weights.items()}, heads)
    try:
        result = call(answer, *given)
    except NotYet as error:
        text = str(error.__cause__)
        if isinstance(error.__cause__, KeyError):
            raise NotYet(f"{error}. The names are {', '.join(weights)}") from error
        if "must match the size" in text or "cannot be multiplied" in text or "size mismatch" in text:
            raise NotYet(
                f"{error}. A matrix of nn.Linear is stored as [out, in]: multiply by its transpose; and the "
                "mask [B, T, S] needs an axis for the heads, mask[:, None]"
            ) from error
        raise
    expect(isinstance(result, Tensor), f"return a tensor, not a {type(result).__name__}")
    expect(result.shape == x.shape, f"the result is {list(result.shape)}: expected {list(x.shape)}, as x")
    expect(torch.equal(given[0], x), "your function changes x itself: write x = x + ..., and not x += ...")
    expect(
        not bool(result.isnan().any()),
        "some words become NaN: those before the first picture, where every score is -inf. A softmax over "
        "nothing is no number, and what such words get from the attention is zero",
    )
    reference = faulty_block(x, media, mask, weights, heads)
    for fault, hint in BLOCK_FAULTS.items():
        expect(not same(result, faulty_block(x, media, mask, weights, heads, fault)), hint)
    if not same(result, reference):
        sees = mask.any(dim=-1)
        off = (result - reference).abs().amax(dim=-1) > 1e-4
        if not bool(off[sees].any()):
            raise NotYet(
                "only words before the first picture are wrong: they get zero from the attention, and the "
                "second branch as all others"
            )
        shut = {**weights, "attn_gate": torch.zeros(1), "ff_gate": torch.zeros(1)}
        if not same(call(answer, x.clone(), media, mask, shut, heads), x):
            raise NotYet("with both gates at zero, the block has to give x back: something is added twice")
        half = {**weights, "attn_gate": torch.zeros(1)}
        wrong = same(
            call(answer, x.clone(), media, mask, half, heads), faulty_block(x, media, mask, half, heads)
        )
        raise NotYet(
            "the second branch is right, and the attention is not. Compare: norm of x; q, k, v; heads; "
            "scores times Dh ** -0.5; mask; softmax; values; to_out"
            if wrong
            else "already the second branch is wrong. Compare: norm with ff.0, matrix ff.1, GELU, matrix "
            "ff.3, the gate, and x added"
        )
    shut = {**weights, "attn_gate": torch.zeros(1), "ff_gate": torch.zeros(1)}
    expect(torch.equal(call(answer, x, media, mask, shut, heads), x), "with gates at zero, x must come back")
    right("with both gates at zero the block gives back x, bit for bit; open, it looks.")


def _picture_of_word(is_image: Tensor) -> Tensor:
    return is_image.cumsum(dim=1)


def _numbers(is_image: Tensor, n: int) -> Tensor:
    """Of which picture, from 1, each column of a mask is."""
    return torch.arange(1, int(is_image.sum(dim=1).max()) + 1).repeat_interleave(n)


def sound_mask(is_image: Tensor, n: int) -> Tensor:
    """Which latent may each word see: is_image [B, T], n latents of a picture -> [B, T, P n]."""
    return _picture_of_word(is_image)[:, :, None] == _numbers(is_image, n)


MASKS: dict[str, MaskOf] = {
    "nothing": sound_mask,
    "later": lambda i, n: _picture_of_word(i)[:, :, None] <= _numbers(i, n),
    "all so far": lambda i, n: _picture_of_word(i)[:, :, None] >= _numbers(i, n),
    "one place late": lambda i, n: (_picture_of_word(i) - i.long())[:, :, None] == _numbers(i, n),
    "before the first": lambda i, n: _picture_of_word(i).clamp(min=1)[:, :, None] == _numbers(i, n),
    "across rows": lambda i, n: i.flatten().cumsum(0).view_as(i)[:, :, None] == _numbers(i, n),
}
SHOWS = {
    "later": "a word between two pictures sees the second one, which comes only later: look at the words "
    "before the last `<image>`, in a row with two pictures",
    "all so far": "after the second picture, a word still sees the first: two pictures in a row are needed "
    "to notice",
    "one place late": "the `<image>` token itself does not see its own picture: look at that place, and not "
    "only at the words after it",
    "before the first": "a word before the first picture sees it: begin a row with a word",
    "across rows": "the count goes on from one row to the next, so the second row sees the wrong pictures: a "
    "batch of two rows is needed to notice",
    "nothing": "every word sees the last picture before it, in its own row, and `<image>` sees its own",
}


def mystery_mask() -> MaskOf:
    """The mask that the notebook asks about."""
    return MASKS["one place late"]


def find_fault(answer: Callable[[MaskOf], str]) -> None:
    """Exercise 4."""
    for name, mask_of in MASKS.items():
        result = call(answer, _as_ints_too(mask_of))
        expect(
            isinstance(result, str) and result in MASKS,
            f"you return {result!r}: it is one of {', '.join(repr(one) for one in MASKS)}",
        )
        if result != name:
            raise NotYet(
                f"of a mask with the fault {name!r} you say {result!r}: {SHOWS[name]}"
                if name != "nothing"
                else f"of a sound mask you say {result!r}, but {SHOWS['nothing']}"
            )
    right(
        "a mask is found out by the places where the rules differ: two pictures, two rows, a word in front."
    )


def _as_ints_too(mask_of: MaskOf) -> MaskOf:
    """Zeros and ones serve as well as False and True."""

    def mask(is_image: Tensor, n: int = 1) -> Tensor:
        return mask_of(torch.as_tensor(is_image).bool(), n)

    return mask


SCORE_FAULTS = {
    "among k": "p is a probability among all words: take the softmax first and the k largest of it then; "
    "yours add up to 1 over the k",
    "logits": "p is a probability, and you took the logits: softmax",
    "mean": "repeating is judged by the most similar earlier token, and you took the mean of all",
    "dot": "the states are compared by their cosine, and you took the dot product: bring them to length 1",
    "last": "you compare with the last token only: the maximum goes over all earlier ones",
    "plus": "similar states are rewarded: the second term is subtracted",
    "no 1 - a": "the probability counts 1 - a",
    "fits as they are": "f is a softmax over the k candidates, and you took the fits as they are",
    "fits among all": "f is a softmax over the k candidates alone, and you took it over the whole vocabulary",
    "no picture": "the picture does not count: the third term is b times f",
    "no b": "f counts b, and not 1",
}


def faulty_scores(
    logits: Tensor, states: Tensor, context: Tensor, fits: Tensor, k: int, a: float, b: float, fault: str = ""
) -> tuple[Tensor, Tensor]:
    """The candidates and scores of exercise 5, with one of `SCORE_FAULTS`."""
    p, ids = logits.softmax(dim=-1).topk(k)
    if fault == "among k":
        p = p / p.sum()
    if fault == "logits":
        p = logits[ids]
    h, c = states[ids], context
    likeness = h @ c.mT if fault == "dot" else l2_normalize(h) @ l2_normalize(c).mT
    if fault == "last":
        likeness = likeness[:, -1:]
    repeats = likeness.mean(dim=1) if fault == "mean" else likeness.amax(dim=1)
    f = {"fits as they are": fits[ids], "fits among all": fits.softmax(dim=-1)[ids]}.get(
        fault, fits[ids].softmax(dim=-1)
    )
    share = 1.0 if fault == "no 1 - a" else 1 - a
    sign = 1 if fault == "plus" else -1
    weight = {"no picture": 0.0, "no b": 1.0}.get(fault, b)
    return ids, share * p + sign * a * repeats + weight * f


def magic_case(seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of ten words, their states, four earlier states, and how well each word fits."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((10,), (10, 6), (4, 6), (10,))
    logits, states, context, fits = (torch.randn(shape, generator=generator) for shape in shapes)
    return logits * 1.5, states * 2, context, fits * 2


def magic_step(answer: Callable[..., tuple[int, Tensor]]) -> None:
    """Exercise 5."""
    for seed in (1, 2, 3):
        case = magic_case(seed)
        for a, b in ((0.3, 2.0), (0.3, 0.0)):
            result = call(answer, *(tensor.clone() for tensor in case), 4, a, b)
            expect(
                isinstance(result, tuple) and len(result) == 2,
                "return two things: the word's id, and the scores",
            )
            word, scores = result
            expect(
                isinstance(scores, Tensor) and tuple(scores.shape) == (4,),
                "the scores should be a tensor [k], one for each candidate"
                + (f"; yours is {list(scores.shape)}" if isinstance(scores, Tensor) else ""),
            )
            ids, reference = faulty_scores(*case, 4, a, b)
            if not same(scores, reference):
                for fault, hint in SCORE_FAULTS.items():
                    expect(not same(scores, faulty_scores(*case, 4, a, b, fault)[1]), hint)
                expect(
                    not same(scores.sort().values, reference.sort().values),
                    "the scores are right, in another order: that of topk, the likeliest word first",
                )
                raise NotYet(
                    "the scores are wrong, in a way that this check does not know: (1 - a) p, minus a times "
                    "the largest cosine with an earlier state, plus b times f, for each of the k candidates"
                )
            best = int(reference.argmax())
            expect(
                not isinstance(word, bool) and isinstance(word, int | Tensor), "the word is a number, its id"
            )
            expect(
                int(word) != best or int(ids[best]) == best,
                f"you return {int(word)}, the place of the best among the k: return its id, ids[{int(word)}]",
            )
            expect(
                int(word) == int(ids[best]),
                f"the scores are right, but the word with the largest is {int(ids[best])}, not {int(word)}",
            )
    right("likely, not said before, and it fits: with b = 0 the picture has no say at all.")
