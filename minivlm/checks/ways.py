"""Checks for 13_four_ways: a predicted table, a document put together again, a gated block, a leak."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minivlm import masks
from minivlm.attention import additive
from minivlm.checkpoints.hub import SHIPPED
from minivlm.checks import NotYet, call, expect, right, same
from minivlm.models.miniatures.cm3 import move_spans
from minivlm.models.miniatures.flamingo import Flamingo, FlamingoConfig, MaskedCrossAttention
from minivlm.text.gpt2 import GPT2Config
from minivlm.vision.resampler import CrossAttention, feed_forward
from minivlm.vision.siglip import SiglipVisionConfig

Result = dict[str, Any]
Pairs = set[tuple[int, int]]


def read_systems(table: str = "systems") -> list[Result]:
    """What bench/systems.py measured: a dictionary for each way and seed.

    Args:
        table: "systems", or "systems_small" for small things in larger pictures.
    """
    found: list[Result] = json.loads((SHIPPED.parent / f"{table}.json").read_text(encoding="utf-8"))
    return found


def over_seeds(ways: Mapping[str, str], shown: Mapping[str, str], table: str = "systems") -> str:
    """Stored results as a text: a column for each way, a line for each number, the mean over seeds in a cell.

    Where seeds differ, the least and the largest stand behind the mean.

    Args:
        ways: a way's name to the title of its column.
        shown: the title of a line to the name of its number, a share or a count.
        table: as in `read_systems`.
    """
    results = read_systems(table)
    lines = [["", *ways.values()]]
    for title, name in shown.items():
        values = [[one[name] for one in results if one["config"]["system"] == way] for way in ways]
        lines.append([title, *(_mean_of_seeds(of_way) for of_way in values)])
    widths = [max(len(cell) for cell in column) + 3 for column in zip(*lines, strict=True)]
    padded = (
        "".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return "\n".join(padded)


def _mean_of_seeds(values: Sequence[float]) -> str:
    if all(isinstance(value, int) for value in values):
        return f"{values[0]:,}"  # a count, the same for all seeds
    least, most = (f"{extreme:.2f}" for extreme in (min(values), max(values)))
    return f"{mean(values):.2f}" + (f" ({least} to {most})" if least != most else "")


class Duel(NamedTuple):
    """Two ways of which one has more of something."""

    one: str
    other: str
    column: str
    why: str


DUELS = {
    "who learns": Duel(
        "clipcap",
        "clipcap-mlp",
        "all questions",
        "a language model that may learn can meet the prefix halfway; a frozen one has to be talked to in "
        "vectors that it happens to understand, and this one is small",
    ),
    "prefix or between the layers": Duel(
        "clipcap",
        "flamingo",
        "exact caption",
        "the language model is frozen in both, but the new layers of Flamingo look at the picture for every "
        "word, while ClipCap has pressed it into one vector before the first word is written",
    ),
    "whose eyes": Duel(
        "simvlm",
        "cm3",
        "all questions",
        "SimVLM's stem starts from nothing, and the budget that teaches it is the one that the others spend "
        "on language: its paper had 1.8 billion pairs",
    ),
    "how many image tokens": Duel(
        "cm3",
        "visualgpt",
        "exact caption",
        "VisualGPT's row holds no patch at all, yet every block looks at all of them for every word: places "
        "in the row are not what counts",
    ),
    "what it forgets": Duel(
        "flamingo",
        "visualgpt",
        "text loss after",
        "Flamingo's language model is frozen, bit for bit; VisualGPT's learns along, from answers only",
    ),
}


class solutions:
    """The solutions that the notebook continues with."""

    @staticmethod
    def predictions() -> dict[str, str]:
        """For each of the five questions, the name of the way with more."""
        return {
            "who learns": "clipcap-mlp",
            "prefix or between the layers": "flamingo",
            "whose eyes": "cm3",
            "how many image tokens": "visualgpt",
            "what it forgets": "visualgpt",
        }

    @staticmethod
    def read_back(ids: list[int], sentinels: list[int], end: int) -> list[int]:
        """The document as it was, from the one with its spans at the end."""
        if not ids or sentinels[0] not in ids:
            return ids
        body = ids[: ids.index(sentinels[0], ids.index(sentinels[0]) + 1)]
        spans: dict[int, list[int]] = {}
        for number in ids[len(body) :]:
            if number in sentinels:
                current = spans.setdefault(number, [])
            elif number != end:
                current.append(number)
        return [word for number in body for word in spans.get(number, [number])]

    @staticmethod
    def build_gated_block(hidden_size: int, media_size: int, num_heads: int, head_dim: int) -> nn.Module:
        """Flamingo's block, with its mask inside: see `GatedBlock`."""
        return GatedBlock(hidden_size, media_size, num_heads, head_dim)

    @staticmethod
    def leaks(model: Flamingo, input_ids: Tensor, pixel_values: Tensor) -> Pairs:
        """All (word, picture) where the word answers to a picture that comes after it."""
        places = (input_ids[0] == model.config.image_token_id).nonzero()[:, 0].tolist()
        before = model.hidden_states(input_ids, pixel_values)
        found = set()
        for picture, place in enumerate(places):
            others = pixel_values.clone()
            others[picture] = -others[picture]
            moved = (model.hidden_states(input_ids, others) != before).any(dim=-1)[0]
            found |= {(word, picture) for word in moved[:place].nonzero()[:, 0].tolist()}
        return found


class GatedBlock(nn.Module):
    """What the blank cell asks for."""

    def __init__(self, hidden_size: int, media_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.cross = CrossAttention(hidden_size, media_size, num_heads, head_dim)
        self.ff = feed_forward(hidden_size)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, media: Tensor, is_image: Tensor) -> Tensor:
        """Words [B, T, D], latents [B, P, n, D_image], which words are `<image>` [B, T] -> [B, T, D]."""
        return run_block(self, x, media, is_image)


PARTS = {"norm": "an nn.LayerNorm", "cross": "a CrossAttention", "ff": "what feed_forward returns"}


def may_look(is_image: Tensor, pictures: int, latents: int) -> Tensor:
    """Which of P * n latents each word may see: [B, T] -> [B, T, P n]."""
    picture_of_latent = torch.arange(pictures)[None] + 1
    return masks.block_diagonal(is_image.cumsum(dim=1), picture_of_latent.repeat_interleave(latents, dim=1))


def run_block(
    block: Any,
    x: Tensor,
    media: Tensor,
    is_image: Tensor,
    *,
    mask: Tensor | None = None,
    zeros: bool = True,
    gate: Callable[[Tensor], Tensor] = torch.tanh,
    gates: tuple[str, str] = ("attn_gate", "ff_gate"),
    normed: bool = True,
    residual: bool = True,
    parallel: bool = False,
    ff_everywhere: bool = True,
    ff_normed: bool = False,
    to_scores: Callable[[Tensor, torch.dtype], Tensor] = additive,
    flat: Callable[[Tensor], Tensor] = lambda media: media.flatten(1, 2),
) -> Tensor:
    """The block from its parts, or with one of the usual mistakes."""
    if mask is None:
        mask = may_look(is_image, *media.shape[1:3])
    has_picture = mask.any(dim=-1, keepdim=True)
    seen = block.cross.look(block.norm(x) if normed else x, flat(media), to_scores(mask[:, None], x.dtype))
    if zeros:
        seen = seen.masked_fill(~has_picture, 0.0)
    first, second = (getattr(block, name) for name in gates)
    y = gate(first) * seen + (x if residual else 0)
    read = x if parallel else y
    added = gate(second) * block.ff(block.norm(read) if ff_normed else read)
    return y + (added if ff_everywhere else added.masked_fill(~has_picture, 0.0))


def predictions(answer: Callable[[], dict[str, str]], results: Sequence[Result] | None = None) -> None:
    """Exercise 1, held against the table that ships."""
    expected = call(answer)
    expect(isinstance(expected, dict), "return a dictionary: the five questions, and for each a way")
    missing = [name for name in DUELS if name not in expected]
    expect(not missing, f"a prediction is missing: {missing[:1]}")
    unknown = [name for name in expected if name not in DUELS]
    expect(not unknown, f"{unknown[:1]} is none of the five questions: {', '.join(map(repr, DUELS))}")
    for name, duel in DUELS.items():
        expect(
            expected[name] in duel[:2],
            f"{name!r} is between {duel.one!r} and {duel.other!r}, and you say {expected[name]!r}",
        )
    table = read_systems() if results is None else results
    for name, duel in DUELS.items():
        values = [mean_of(table, way, duel.column) for way in duel[:2]]
        winner = duel[values.index(max(values))]
        loser = duel.other if winner == duel.one else duel.one
        expect(
            expected[name] == winner,
            f"{name!r}: {duel.column}, {winner} {max(values):.2f}, {loser} {min(values):.2f}. A reason: "
            f"{duel.why}. Change this prediction, and keep in mind that you expected it otherwise",
        )
    right("five out of five. Now see by how much.")


def mean_of(table: Sequence[Result], way: str, column: str) -> float:
    """Over all seeds of a way."""
    return mean(float(one[column]) for one in table if one["config"]["system"] == way)


SENTINELS, END = [90, 91, 92], 99
DOCUMENTS = [  # a document, and the spans to be cut out
    ([10, 11, 12, 13, 14, 15, 16], [(2, 4)]),
    ([10, 11, 12, 13, 14, 15, 16], [(1, 3), (4, 6)]),
    ([10, 11, 12, 13], [(0, 2), (2, 3)]),  # one after the other, from the first word on
    ([10, 10, 11, 13, 12, 11], [(0, 1), (3, 4), (5, 6)]),  # words that come again, up to the last one
    ([10, 11, 12], [(0, 3)]),  # nothing stays
    ([10, 11, 12], []),  # nothing is cut out
]


def read_back(answer: Callable[[list[int], list[int], int], list[int]]) -> None:
    """Exercise 2."""
    for words, spans in DOCUMENTS:
        moved = move_spans(torch.tensor(words), spans, SENTINELS, END).tolist()
        given = list(moved)
        result = call(answer, given, list(SENTINELS), END)
        case = f"{moved} should become {words}, and yours is {result}"
        expect(given == moved, "you changed the list that you were given: make a new one")
        expect(isinstance(result, list), f"return a list of ids, not a {type(result).__name__}")
        expect(
            not spans or result != moved,
            "nothing has moved: the words behind the second copy of a sentinel belong in the place of the "
            "first",
        )
        expect(
            bool(spans) or result == words,
            f"nothing is cut out of a document without a sentinel: give back all of its words. {case}",
        )
        expect(
            all(isinstance(number, int) for number in result),
            f"a list stands among the ids: put the words of a piece in one by one. {case}",
        )
        expect(END not in result, f"the id that ends a span is still there: {case}")
        left = [number for number in result if number in SENTINELS]
        body = moved[: moved.index(SENTINELS[0], moved.index(SENTINELS[0]) + 1)] if spans else words
        kept = [number for number in body if number not in SENTINELS]
        expect(
            not spans or result != body,
            f"the spans are cut off, and their blanks stay empty: put them in. {case}",
        )
        expect(
            not spans or result == words or result != kept,
            f"you dropped the spans with their sentinels: they are the words that are missing. {case}",
        )
        pieces = [words[start:end] for start, end in spans]
        expect(
            result == words or result != kept + [word for piece in pieces for word in piece],
            f"the spans are still at the end, without their sentinels: put each where its blank is. {case}",
        )
        expect(
            len(set(left)) == 0 or len(left) == len(spans),
            f"only some blanks are filled: there may be up to {len(SENTINELS)}, in the order of the "
            f"sentinels. {case}",
        )
        expect(not left, f"the sentinels are still there: they only marked the place. {case}")
        swapped = _filled(body, pieces[::-1])
        expect(
            result == words or result != swapped,
            f"the spans are in each other's blanks: the sentinel says which belongs where. {case}",
        )
        expect(
            result == words or len(result) < len(words) or sorted(result) != sorted(words),
            f"all words are there, in another order: {case}",
        )
        expect(
            len(result) >= len(words),
            f"words are lost: the document goes on behind the last blank, up to the second copy of the first "
            f"sentinel, and a word may stand in it twice. {case}",
        )
        expect(result == words, case)
    right("six documents are what they were, whatever was cut out of them.")


def _filled(body: list[int], pieces: list[list[int]]) -> list[int]:
    left = iter(pieces)
    return [word for number in body for word in (next(left) if number in SENTINELS else [number])]


def build_gated_block(answer: Callable[[int, int, int, int], Any]) -> None:
    """Exercise 3: the mistakes are built from the reader's own parts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = call(answer, 32, 24, 4, 8)
        expect(isinstance(block, nn.Module), f"return a module, not a {type(block).__name__}")
        for name, kind in PARTS.items():
            part = getattr(block, name, None)
            expect(isinstance(part, nn.Module), f"the block should have a part `{name}`, {kind}")
        # The notebook defines the class itself, so it is known by what it offers.
        expect(hasattr(block.cross, "look"), "`cross` should be a CrossAttention, which has a `look`")
        for name in ("attn_gate", "ff_gate"):
            expect(
                isinstance(getattr(block, name, None), nn.Parameter),
                f"`{name}` should be an `nn.Parameter`: otherwise no optimizer finds it",
            )
        x, media = torch.randn(2, 7, 32), torch.randn(2, 2, 3, 24)
    is_image = torch.tensor([[0, 0, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 0, 0]]).bool()

    with torch.enable_grad():  # the notebook has switched it off
        result = call(block, x.clone(), media.clone(), is_image.clone())
    expect(isinstance(result, Tensor), f"the block should return a tensor, not a {type(result).__name__}")
    expect(
        result.shape == x.shape, f"words go in as [2, 7, 32], and come out as {list(result.shape)}: keep both"
    )
    expect(
        bool(result.detach().any()),
        "with gates of zero your block returns zeros: what it finds is *added* to the words",
    )
    expect(
        torch.equal(result, x),
        "an untrained block should return the words bit for bit. Yours changes them, so it damages the "
        "language model before it has learned anything: both gates start at 0, and tanh(0) is 0",
    )
    try:
        with torch.enable_grad():
            result.square().sum().backward()
    except RuntimeError as error:
        raise NotYet(
            "the block has no gradient. Does something overwrite a tensor that the gradient needs, such as "
            f"`x += ...`? Make a new one, `x = x + ...`. PyTorch says: {error}"
        ) from None
    expect(
        bool(block.attn_gate.grad) and bool(block.ff_gate.grad),
        "a gate gets no gradient, so the block stays closed for ever: only the gates start at zero, not "
        "what is behind them",
    )
    _check_open_block(block, x, media, is_image)
    right("closed at the start, bit for bit; open, each word sees one picture, the last before it.")


def _check_open_block(block: Any, x: Tensor, media: Tensor, is_image: Tensor) -> None:
    """With trained gates, and every weight moved from its start."""
    generator = torch.Generator().manual_seed(1)
    block = copy.deepcopy(block)
    with torch.no_grad():
        for weight in block.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
        block.attn_gate.fill_(0.8)
        block.ff_gate.fill_(-1.5)
        result = call(block, x.clone(), media.clone(), is_image.clone())
        reference = run_block(block, x, media, is_image)
        P, n = media.shape[1:3]
        numbers, of_latent = is_image.cumsum(dim=1)[..., None], torch.arange(P).repeat_interleave(n) + 1
        before, after = is_image.cumsum(dim=1) - is_image.long(), numbers + 1
        across, in_turns = is_image.cumsum(dim=0)[..., None], torch.arange(P).repeat(n) + 1
        mistakes: dict[str, dict[str, Any]] = {
            "the gates are not bounded: what is added is tanh(gate) times what was found": {"gate": _as_is},
            "you squash the gates with a sigmoid: that is 0.5 at zero; take tanh": {"gate": torch.sigmoid},
            "one gate serves both parts: `attn_gate` belongs to the look, `ff_gate` to the MLP": {
                "gates": ("attn_gate", "attn_gate")
            },
            "the gates are exchanged: `attn_gate` belongs to the look, `ff_gate` to the MLP": {
                "gates": ("ff_gate", "attn_gate")
            },
            "every word sees every picture: a word may see only the last picture before it": {
                "mask": torch.ones(2, 7, P * n, dtype=torch.bool)
            },
            "a word sees all the pictures before it. In Flamingo it sees only the last one: compare the "
            "numbers with ==": {"mask": numbers >= of_latent},
            "words see the pictures from theirs on, also later ones": {"mask": numbers <= of_latent},
            "the token `<image>` should see its own picture already: count it in": {
                "mask": before[..., None] == of_latent
            },
            "each word sees the picture after its own: the first `<image>` makes the number 1, so number "
            "pictures from 1, too": {"mask": after == of_latent},
            "the words before the first picture are not zero. A softmax over nothing is the mean of "
            "everything, so they see all the pictures to come: set what they found to zero": {"zeros": False},
            "the mask is turned around: True means that a word may look": {"mask": numbers != of_latent},
            "the pictures are counted over the rows of the batch: `cumsum` along the words, dim=1": {
                "mask": across == of_latent
            },
            "the latents of a picture stand together, 1 1 1 2 2 2: `repeat_interleave`, not `repeat`": {
                "mask": numbers == in_turns
            },
            "`cross.look` got a mask of numbers, and adds them to the scores: leave it boolean": {
                "to_scores": Tensor.to
            },
            "the latents are in the wrong order: the n latents of a picture stand together, so flatten "
            "[B, P, n, D] at axes 1 and 2": {"flat": lambda media: media.transpose(1, 2).flatten(1, 2)},
            "the norm is missing: the queries are made of norm(x)": {"normed": False},
            "the residual path around the look is missing: add to x": {"residual": False},
            "both parts read x. The MLP comes second, and reads what the look has made": {"parallel": True},
            "`ff` has its own norm already: give it x": {"ff_normed": True},
            "the MLP leaves out the words before the first picture. Only the look knows pictures: the MLP is "
            "for all words": {"ff_everywhere": False},
        }
        for hint, wrong in mistakes.items():
            expect(not same(result, run_block(block, x, media, is_image, **wrong)), hint)
        expect(
            same(result, reference),
            "with open gates the block computes something else. Take the parts one by one: which latents may "
            "a word see; `cross.look(norm(x), ...)`; zeros for words without a picture; tanh of the gate; "
            "the same for `ff`",
        )


def _as_is(gate: Tensor) -> Tensor:
    return gate


LEAKS = ("mean of all", "all pictures", "next picture", "nothing")


class _Leaking(nn.Module):
    """A block's look with one mistake."""

    def __init__(self, look: MaskedCrossAttention, latents: int, leak: str) -> None:
        super().__init__()
        self.healthy, self.latents, self.leak = look, latents, leak

    def forward(self, x: Tensor, media: Tensor, mask: Tensor) -> Tensor:
        if self.leak == "all pictures":
            mask = torch.ones_like(mask)
        if self.leak == "next picture":  # the last one's words stay with theirs
            pictures = mask.unflatten(-1, (-1, self.latents))
            mask = torch.cat([0 * pictures[:, :, :1], pictures[:, :, :-1]], dim=2).bool()
            mask[:, :, -1] |= pictures[:, :, -1]
            mask = mask.flatten(2)
        out = self.healthy.look(self.healthy.norm(x), media, additive(mask[:, None], x.dtype))
        return out if self.leak == "mean of all" else out.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)


def patient(model: Flamingo, leak: str = "mean of all", layer: int = 2) -> Flamingo:
    """A copy of a Flamingo in which the look of one block makes one mistake, one of LEAKS."""
    broken = copy.deepcopy(model)
    block: Any = broken.gated_cross_attn_layers[str(layer)]
    block.attn = _Leaking(block.attn, model.config.num_latents, leak)
    return broken


def _small_flamingo() -> tuple[Flamingo, Tensor, Tensor]:
    """A random one with open gates, and a row of nine words, three of which are pictures."""
    vision = SiglipVisionConfig(16, 32, 1, 2, image_size=16, patch_size=8)
    text = GPT2Config(32, 64, 3, 4, vocab_size=30, max_position_embeddings=16)
    sizes = {"num_latents": 2, "resampler_depth": 1, "resampler_heads": 2, "cross_attn_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Flamingo(FlamingoConfig(vision, text, **sizes, head_dim=8, image_token_id=29)).eval()
        for name, weight in model.named_parameters():
            weight.data += 0.5 if name.endswith("gate") else 0.2 * torch.randn(weight.shape)
        pixel_values = torch.randn(3, 3, 16, 16)
    return model, torch.tensor([[5, 6, 29, 7, 8, 29, 9, 29, 10]]), pixel_values


def leaks(answer: Callable[[Flamingo, Tensor, Tensor], Collection[tuple[int, int]]]) -> None:
    """Exercise 4, tried on patients with different leaks, and on one that has none."""
    model, ids, pixel_values = _small_flamingo()
    places = (ids[0] == 29).nonzero()[:, 0].tolist()
    found: dict[str, Any] = {}
    with torch.no_grad():
        truth = {leak: solutions.leaks(patient(model, leak), ids, pixel_values) for leak in LEAKS}
        for leak in LEAKS:
            given = pixel_values.clone()
            result = call(answer, patient(model, leak), ids.clone(), given)
            expect(
                torch.equal(given, pixel_values),
                "you changed the pictures that you were given, so the next comparison starts from other "
                "ones: change a `clone()`",
            )
            expect(
                isinstance(result, set | list | tuple) and all(_is_pair(pair) for pair in result),
                "return a set of pairs (word, picture) of whole numbers, an empty one if nothing leaks",
            )
            found[leak] = {tuple(pair) for pair in result}
    leaky = [leak for leak in LEAKS if truth[leak]]
    expect(
        any(found[leak] for leak in leaky),
        "you find nothing in any patient, and three of four leak. A leak may be small: compare hidden states "
        "exactly, not the words that they would become",
    )
    mistakes: list[tuple[str, Callable[[Pairs], Pairs]]] = [
        ("the pairs are turned around: the word comes first, then the picture", _turned),
        (
            "pictures are counted from 0: yours are one too large",
            lambda pairs: {(w, p + 1) for w, p in pairs},
        ),
        ("words are counted from 0: yours are one too large", lambda pairs: {(w + 1, p) for w, p in pairs}),
        (
            "the token `<image>` may see its own picture: look at the words before it only",
            lambda pairs: pairs | {(place, picture) for picture, place in enumerate(places)},
        ),
        (
            "you list words that come after their picture, too: these may see it",
            lambda pairs: pairs | {(w, p) for p, place in enumerate(places) for w in range(place, 9)},
        ),
    ]
    for hint, change in mistakes:
        expect(any(found[leak] != change(truth[leak]) for leak in LEAKS), hint)
    expect(
        not found["nothing"],
        "you find leaks in a model that has none. Is a word counted that comes after its picture, or were "
        "several pictures changed at once?",
    )
    for leak in leaky:
        extra, missing = found[leak] - truth[leak], truth[leak] - found[leak]
        expect(
            not extra,
            f"{min(extra, default=None)} is no leak in this patient: change one picture at a time, and "
            "compare with the hidden states of the pictures as they were",
        )
        expect(
            not missing,
            f"you miss {len(missing)} of {len(truth[leak])} leaks, such as {min(missing, default=None)}: "
            "try every picture, and every word before it, and compare exactly, with !=",
        )
    right("no word may answer to a picture that comes after it, and you can prove it of any model.")


def _turned(pairs: Pairs) -> Pairs:
    return {(picture, word) for word, picture in pairs}


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(one, int) for one in pair)
