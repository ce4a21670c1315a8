"""Checks for the exercises of 05_gemma."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minivlm
from minivlm.attention import Attention, attend
from minivlm.cache import KVCache
from minivlm.checks import NotYet, call, expect, expect_faults, expect_tensor, right, same
from minivlm.masks import causal
from minivlm.text.gemma import GemmaConfig, GemmaDecoder

FAULTS = ("scale", "mask", "keys", "values", "norm")


class solutions:
    """Reference solutions."""

    @staticmethod
    def rotate(x: Tensor, position_ids: Tensor, theta: float = 10000.0) -> Tensor:
        """Element i is paired with element i + Dh / 2; pair i turns by position * theta^(-2i / Dh)."""
        a, b = x.chunk(2, dim=-1)
        speeds = theta ** (-torch.arange(a.shape[-1]).float() / a.shape[-1])
        angles = position_ids[:, None, :, None].float() * speeds  # [B, 1, T, Dh / 2]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    @staticmethod
    def half_split_rows(weight: Tensor, head_dim: int) -> Tensor:
        """Rows 0 1 2 3 4 5 ... of every head in the order 0 2 4 ... 1 3 5 ..."""
        pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # [H, Dh / 2, 2, D]
        return pairs.transpose(1, 2).reshape(weight.shape)

    @staticmethod
    def cache_factors() -> dict[str, float]:
        """By what each change multiplies the bytes of a cache."""
        return {
            "layers": 2,
            "query heads": 1,
            "key/value heads": 2,
            "head_dim": 2,
            "hidden_size": 1,
            "vocabulary": 1,
            "context": 2,
            "fp32": 2,
        }

    @staticmethod
    def diagnose(patient: nn.Module, intact: nn.Module, tokens: Tensor) -> str:
        """One token alone, one token moved, the last token changed, all tokens moved: in this order."""

        def run(decoder: nn.Module, x: Tensor, start: int = 0) -> Tensor:
            positions = start + torch.arange(x.shape[1])[None]
            return decoder(x, positions, causal(positions, positions)[:, None])

        def close(a: Tensor, b: Tensor) -> bool:
            return torch.allclose(a, b, atol=1e-3)

        alone, changed = tokens[:, :1], tokens.clone()
        changed[:, -1] += 1
        if not close(run(patient, alone), run(intact, alone)):
            return "norm"
        if not close(run(patient, alone, 7), run(patient, alone)):
            return "values"
        if not close(run(patient, changed)[:, :-1], run(patient, tokens)[:, :-1]):
            return "mask"
        if not close(run(patient, tokens, 7), run(patient, tokens)):
            return "keys"
        return "scale"

    @staticmethod
    def speak_cached(decoder: Any, embeds: Tensor, count: int, cache: Any) -> Iterator[int]:
        """The prompt in one pass, then one token at a time."""
        new = embeds
        for _ in range(count):
            position_ids = cache.reserve(torch.ones(new.shape[:2]))
            keys = int(position_ids[0, -1]) + 1
            mask = torch.ones(1, 1, new.shape[1], keys, dtype=torch.bool)
            hidden = decoder(new, position_ids, mask, cache)
            token = decoder.logits(hidden[:, -1]).argmax(dim=-1)
            yield token.item()
            new = decoder.embed(token[:, None])

    @staticmethod
    def nucleus(probabilities: Tensor, p: float) -> Tensor:
        """Mark the most probable tokens that together reach p."""
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(dim=0) - ordered
        kept = torch.zeros_like(probabilities, dtype=torch.bool)
        kept[order[before < p]] = True
        return kept


def _compare(result: Any, reference: Tensor, advice: str, tolerance: float = 1e-5) -> None:
    """Type, shape and values, and what to do if the values differ in a way that no hint knows."""
    try:
        expect_tensor(result, reference, tolerance=tolerance)
    except NotYet as hint:
        raise NotYet(f"{hint}. {advice}" if "off by" in str(hint) else str(hint)) from None


def _none_of(result: Any, mistakes: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Raise NotYet with the hint of the known mistake that gives this result."""
    for hint, wrong in mistakes.items():
        expect(not same(result, wrong, tolerance), hint)


def rotate(answer: Callable[..., Any]) -> None:
    """Two rows that begin at different positions, three heads, a base of its own; then bf16, far away."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 16, generator=generator)
    positions = torch.tensor([[3, 4, 5, 6, 7], [7, 8, 9, 20, 21]])
    theta = 1000.0
    result = call(answer, x.clone(), positions, theta)
    good, p = solutions.rotate, positions
    a, b = x.chunk(2, dim=-1)

    def turned(speeds: Tensor, at: Tensor = positions) -> tuple[Tensor, Tensor, Tensor]:
        angles = at[:, None, :, None] * speeds
        cos, sin = angles.cos(), angles.sin()
        return cos, sin, torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    i = torch.arange(8)
    speeds = theta ** (-i / 8)
    cos, sin, _ = turned(speeds)
    even, odd = x[..., 0::2], x[..., 1::2]
    neighbors = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    twice = (t.repeat_interleave(2, dim=-1) for t in (cos, sin))
    long_cos, long_sin = twice
    torn = x * long_cos + torch.cat([-b, a], dim=-1) * long_sin
    mistakes = {
        "this is x as it was: turn every pair by position times speed": x,
        "you pair neighbors, 0 with 1 and 2 with 3. Here element i is paired with element i + Dh / 2: "
        "cut the last axis into two halves": neighbors,
        "the pairs are right, but each angle stands twice in a row, as for neighbors. Write the angles "
        "of all pairs once, then once more behind them": torn,
        "you turn the other way. (a, b) becomes (a cos - b sin, b cos + a sin): look at the two signs": good(
            x, -p, theta
        ),
        "a minus is missing: (a, b) turned by a quarter is (-b, a), not (b, a)": torch.cat(
            [a * cos + b * sin, b * cos + a * sin], dim=-1
        ),
        "only the first half of every pair is turned: b becomes b cos + a sin": torch.cat(
            [a * cos - b * sin, b], dim=-1
        ),
        "only the terms with the cosine are there: every number also gets its partner times the sine": x
        * torch.cat([cos, cos], dim=-1),
        "all pairs turn at the same speed: pair i turns by theta ** (-2 i / Dh)": turned(torch.ones(8))[2],
        "the speeds fall too slowly. The exponent is -2 i / Dh: did you forget the 2, or divide by Dh where "
        "i counts Dh / 2 pairs?": turned(theta ** (-i / 16))[2],
        "the speeds fall too fast: the exponent is -2 i / Dh with the whole width Dh, not its half": turned(
            theta ** (-i / 4)
        )[2],
        "the speeds grow with i: the exponent is negative, so that late pairs turn slowly": turned(
            theta ** (i / 8)
        )[2],
        "theta is not used: you computed with 10000": good(x, p),
        "you number the tokens yourself, from 0: use position_ids, since a row may begin anywhere": good(
            x, torch.arange(5).expand(2, 5), theta
        ),
        "all rows of the batch got the positions of the first: position_ids is [B, T]": good(
            x, p[:1].expand(2, 5), theta
        ),
        "your positions are one too large: the token at position 0 is not turned": good(x, p + 1, theta),
        "the angles are taken as degrees: position times speed is in radians": turned(
            speeds * torch.pi / 180
        )[2],
    }
    _none_of(result, mistakes, 1e-4)
    _compare(
        result,
        good(x, p, theta),
        "Compare one vector with naive_rotary, at position 0 first, which must change nothing, then at 1",
        1e-4,
    )
    x, p = x.bfloat16(), p + 1000
    result = call(answer, x.clone(), p, theta)
    expect(
        result.dtype == torch.bfloat16,
        f"for x in bf16 your result is {result.dtype}: give it the dtype of x",
    )
    gap = (result.float() - good(x.float(), p, theta)).abs().max().item()
    expect(
        gap < 0.1,
        "right in fp32, but not for x in bf16: there, position 1001 becomes 1000. Compute the angles "
        "in fp32, and give cosine and sine the dtype of x only then",
    )
    right("pair i of a vector at position p turns by p * theta^(-2i / Dh), and position 0 stays as it is.")


def half_split_rows(answer: Callable[..., Any]) -> None:
    """Three heads, so that an order over all rows differs from one within every head."""
    heads, head_dim = 3, 16
    weight = torch.arange(float((heads * head_dim) ** 2)).view(heads * head_dim, -1)
    result = call(answer, weight.clone(), head_dim)
    good = solutions.half_split_rows(weight, head_dim)
    expect(
        not (isinstance(result, Tensor) and result.dim() == 1),
        "you return the order of the rows: return the weight with its rows in that order",
    )
    expect(
        not (isinstance(result, Tensor) and result.dim() > 2 and same(result.reshape(weight.shape), good)),
        "the rows are in the right order, but the result has too many axes: a weight is [heads * "
        "head_dim, D]",
    )
    by_head = weight.unflatten(0, (heads, head_dim))
    mistakes = {
        "the rows are still in their old order": weight,
        "this is the inverse, from half-split to interleaved: the new row i < Dh/2 of a head is its old "
        "row 2i": by_head.unflatten(1, (2, -1)).transpose(1, 2).reshape(weight.shape),
        "you reordered all rows at once: every head has its own pairs, so split the rows into heads "
        "first": torch.cat([weight[0::2], weight[1::2]]),
        "you reordered the columns: they belong to the input, and the rows are what a head puts "
        "out": weight.unflatten(1, (-1, head_dim // 2, 2)).transpose(2, 3).reshape(weight.shape),
        "the halves are exchanged: rows 0 2 4 ... come first, rows 1 3 5 ... behind them": torch.cat(
            [by_head[:, 1::2], by_head[:, 0::2]], dim=1
        ).reshape(weight.shape),
        "only the first head is sorted: do the same in all of them": torch.cat(
            [good[:head_dim], weight[head_dim:]]
        ),
        "the rows of different heads are mixed: rows h * head_dim to (h + 1) * head_dim are head h, so the "
        "heads are the first of the new axes": weight.unflatten(0, (head_dim // 2, 2, -1))
        .transpose(0, 2)
        .reshape(weight.shape),
        "the rows of different heads are mixed: the axis is heads first, then head_dim / 2, then "
        "2": weight.unflatten(0, (head_dim // 2, 2, -1)).transpose(0, 1).reshape(weight.shape),
        "the heads stand in the opposite order: only rows within a head change places": good.unflatten(
            0, (heads, head_dim)
        )
        .flip(0)
        .reshape(weight.shape),
        "you sorted twice: once is enough": solutions.half_split_rows(good, head_dim),
        "some rows have another sign: nothing is turned here, rows only change places": torch.cat(
            [by_head[:, 0::2], -by_head[:, 1::2]], dim=1
        ).reshape(weight.shape),
    }
    _none_of(result, mistakes)
    _compare(
        result,
        good,
        "Try a weight of one head whose rows are 0, 1, 2, ...: they must become 0, 2, 4, ..., 1, 3, ...",
    )
    right("the new rows 0, 1, 2, ... of every head are the old rows 0, 2, 4, ..., then 1, 3, 5, ...")


# Which field each change doubles, and why the cache grows with it or does not.
_CHANGES = {
    "layers": ("num_hidden_layers", "every layer keeps keys and values of its own"),
    "query heads": ("num_attention_heads", "queries are used once and forgotten: only keys and values stay"),
    "key/value heads": ("num_key_value_heads", "each of them keeps a key and a value"),
    "head_dim": ("head_dim", "a key and a value are each head_dim numbers long"),
    "hidden_size": (
        "hidden_size",
        "k_proj and v_proj bring any width down to key/value heads x head_dim numbers, and these are kept",
    ),
    "vocabulary": ("vocab_size", "the table belongs to the weights, and no token keeps logits"),
    "context": (None, "every token leaves its keys and values"),
    "fp32": (None, "a number takes 4 bytes instead of 2"),
}


def _bytes_held(change: str) -> int:
    """The bytes of a cache that is made for PaliGemma's decoder after the change."""
    config: GemmaConfig = GemmaConfig()
    field = _CHANGES[change][0] if change else None
    if field is not None:
        doubled: dict[str, Any] = {field: 2 * getattr(config, field)}
        config = replace(config, **doubled)
    dtype = torch.float32 if change == "fp32" else torch.bfloat16
    cache = KVCache(config.num_hidden_layers, 1, config.num_key_value_heads, config.head_dim, dtype=dtype)
    cache.reserve(torch.ones(1, 512 if change == "context" else 256))
    return sum(t.numel() * t.element_size() for t in [*cache.keys, *cache.values])


def cache_factors(answer: Callable[..., Any]) -> None:
    """Every prediction against a cache that is made with the change."""
    result = call(answer)
    expect(isinstance(result, dict), f"return the dict of your predictions, not a {type(result).__name__}")
    missing = [change for change in _CHANGES if change not in result]
    expect(not missing, f"no prediction yet for: {', '.join(missing)}")
    wrong = []
    for change, (_, reason) in _CHANGES.items():
        factor = _bytes_held(change) / _bytes_held("")
        if result[change] != factor:
            wrong.append(f"{change}: you say {result[change]}, but the factor is {factor:g}, since {reason}")
    expect(not wrong, "\n".join(wrong))
    right("2 x layers x key/value heads x head_dim numbers for every token, and nothing else counts.")


class _TurnedValues(Attention):
    """Attention that turns its values as well."""

    def forward(self, x: Tensor, mask: Any = None, rotary: Any = None, update_cache: Any = None) -> Tensor:
        q, k, v = (rotary(self._heads(proj(x))) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = attend(q, k, v, mask, self.scale)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class _StillKeys(Attention):
    """Attention that turns its queries and not its keys."""

    def forward(self, x: Tensor, mask: Any = None, rotary: Any = None, update_cache: Any = None) -> Tensor:
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = attend(rotary(q), k, v, mask, self.scale)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _one_too_far(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    embeds, positions, mask, *rest = args
    return embeds, positions, F.pad(mask[:, :, 1:], (0, 0, 0, 1), value=True), *rest


def _broken(decoder: nn.Module, fault: str) -> nn.Module:
    """A copy of the decoder with one of the FAULTS."""
    patient = copy.deepcopy(decoder)
    if fault == "mask":
        patient.register_forward_pre_hook(_one_too_far)
    for name, weight in patient.named_parameters():
        if fault == "norm" and "norm" in name:
            weight.data -= 1  # 1 + weight is now w
    for part in patient.modules():
        if isinstance(part, Attention) and fault == "scale":
            part.scale = 1.0
        elif isinstance(part, Attention) and fault in ("values", "keys"):
            part.__class__ = _TurnedValues if fault == "values" else _StillKeys
    return patient


def patients(decoder: nn.Module) -> dict[str, nn.Module]:
    """Five copies of a decoder, each broken in another place."""
    return {
        letter: _broken(decoder, fault)
        for letter, fault in zip("ABCDE", ("keys", "norm", "mask", "scale", "values"), strict=True)
    }


_SIGNS = {
    "norm": "a row of one token at position 0 would already differ from the intact decoder, since "
    "attention over a single key can do nothing wrong",
    "values": "a row of one token would change when it moves from position 0 to 7, since its value is turned "
    "and nothing turns it back",
    "mask": "outputs at earlier positions would change together with the last token",
    "keys": "a row of one token would be as in the intact decoder at every position, and a longer row would "
    "change when all its positions move by 7",
    "scale": "a row of one token would be as in the intact decoder, a longer row would not change when all "
    "positions move by 7, and no earlier output would change with the last token",
}


@torch.no_grad()
def diagnose(answer: Callable[..., Any]) -> None:
    """The five faults in the shipped decoder, and words from its vocabulary."""
    intact = minivlm.load()[0].language_model
    generator = torch.Generator().manual_seed(0)
    tokens = intact.embed(torch.randint(10, 400, (1, 6), generator=generator))
    said = {}
    for fault in FAULTS:
        said[fault] = call(answer, _broken(intact, fault), intact, tokens.clone())
    expect_faults(said, _SIGNS, "decoder", "decoders")
    right("each fault has a measurement that no other one passes, and the smallest row comes first.")


class _Counted(KVCache):
    """A cache that remembers what it was asked for."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__(config.num_hidden_layers, 1, config.num_key_value_heads, config.head_dim)
        self.reserved: list[int] = []

    @property
    def length(self) -> int:
        return int(self.lengths[0])

    def reserve(self, attention_mask: Tensor) -> Tensor:
        self.reserved.append(attention_mask.shape[1])
        return super().reserve(attention_mask)


class _Watched:
    """A decoder that remembers what it was given."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.config = decoder, decoder.config
        self.seen: list[tuple[Tensor, Tensor, Tensor, Any]] = []
        self.rows: list[int] = []

    def __call__(
        self, inputs_embeds: Tensor, position_ids: Tensor, mask: Tensor, cache: Any = None
    ) -> Tensor:
        self.seen.append((inputs_embeds, position_ids, mask, cache))
        return self.decoder(inputs_embeds, position_ids, mask, cache)

    forward = __call__

    def logits(self, hidden_states: Tensor) -> Tensor:
        self.rows.append(hidden_states[..., 0].numel())
        return self.decoder.logits(hidden_states)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)


@torch.no_grad()
def speak_cached(answer: Callable[..., Any]) -> None:
    """A small decoder with random weights, what it is given at each call, and what it says."""
    config = GemmaConfig(32, 64, 2, 2, 1, 16, 50, tie_word_embeddings=False)
    with torch.random.fork_rng([]):
        torch.manual_seed(6)
        decoder = GemmaDecoder(config)
        for parameter in decoder.parameters():  # so that every word depends on all before it
            parameter.mul_(2.0)
        embeds = torch.randn(1, 7, 32) * 3
    count, prompt = 6, embeds.shape[1]
    expected = list(solutions.speak_cached(decoder, embeds, count, _Counted(config)))
    watched, cache = _Watched(decoder), _Counted(config)
    made = call(answer, watched, embeds.clone(), count, cache)
    try:
        words = call(lambda: [int(word) for word in made])
    except NotYet:
        if watched.seen:  # what went in may say why the code stopped
            _shape_of_calls(watched, cache, prompt, count)
        raise
    expect(watched.seen != [], "the decoder was never called")
    _shape_of_calls(watched, cache, prompt, count)
    expect(
        len(words) == count,
        f"asked for {count} words, you give {len(words)}: the first one comes from the last row of the "
        "prompt",
    )
    _words(words, expected, watched, decoder)
    expect(
        all(rows == 1 for rows in watched.rows),
        f"the words are right, but the head computed logits for {max(watched.rows)} rows: give it "
        "hidden[:, -1] only",
    )
    expect(
        inspect.isgenerator(made),
        "the words are right, but they come all at once: `yield` each one as soon as it is known",
    )
    right(f"{prompt} tokens in one pass, then {count - 1} passes of a single token.")


def _shape_of_calls(watched: _Watched, cache: _Counted, prompt: int, count: int) -> None:
    """How many tokens went through the decoder, at which positions, with which mask."""
    first, *later = watched.seen
    expect(
        first[3] is not None,
        "the decoder was called without the cache: it is the fourth argument, and nothing is kept without it",
    )
    expect(
        all(call_[3] is cache for call_ in watched.seen),
        "the cache that the decoder writes to is not the one that was given, or not in every call: use the "
        "argument, from the first pass to the last",
    )
    expect(
        cache.reserved != [],
        "cache.reserve was never called: call it before each pass, it makes room and numbers the new tokens",
    )
    expect(
        first[0].shape[1] == prompt,
        f"the first pass reads {first[0].shape[1]} token(s): prefill reads the whole prompt at once, "
        "since its tokens may look at each other in both directions",
    )
    expect(
        all(call_[0].shape[1] == 1 for call_ in later),
        f"the second pass reads {later[0][0].shape[1] if later else 0} tokens: everything before the "
        "new one is in the cache already, so put in the new token alone",
    )
    expect(
        len(cache.reserved) == len(watched.seen),
        f"{len(watched.seen)} passes, but cache.reserve was called {len(cache.reserved)} time(s): once "
        "before each",
    )
    expect(
        bool(first[2].all()),
        "the mask of the prompt hides something: here everyone may read the whole prompt, so it is all True",
    )
    for step, (_, position_ids, mask, _) in enumerate(later):
        expect(
            int(position_ids[0, -1]) == prompt + step,
            f"new word {step + 1} got position {int(position_ids[0, -1])}, but it is token number "
            f"{prompt + step} of the row: take the positions that cache.reserve gives back",
        )
        expect(
            bool(mask.all()),
            "the mask of a new token hides a part of the cache: it may look at all that came before it",
        )


def _words(words: list[int], expected: list[int], watched: _Watched, decoder: Any) -> None:
    """Which known mistake made these words."""
    hidden = decoder(*watched.seen[0][:3])
    fed = [
        int(torch.cdist(seen[0][0, -1:], decoder.embed(torch.arange(50))).argmin())
        for seen in watched.seen[1:]
    ]
    expect(
        words[0] != int(decoder.logits(hidden[:, 0]).argmax()) or words[0] == expected[0],
        "the first word comes from the first row of the prompt: only the last row knows what comes next",
    )
    expect(
        words[0] != int(decoder.logits(hidden[:, -1]).argmin()),
        "this is the least probable word: greedy takes the largest logit, argmax",
    )
    expect(
        words[0] == expected[0],
        "the first word is not the one with the largest logit in the last row of the prompt: greedy is "
        "argmax, and nothing is drawn",
    )
    table = decoder.embed_tokens.weight
    for word, seen in zip(words, watched.seen[1:], strict=False):
        expect(
            not same(seen[0][0, -1], table[word]),
            "the new word went in without its factor: decoder.embed multiplies by sqrt(hidden_size), "
            "the table alone does not",
        )
    expect(
        fed == words[: len(fed)],
        "the token that you put in next is not the one that you chose: embed the chosen word, and go "
        "on with it",
    )
    expect(
        words == expected,
        f"the first word is right, then you say {words[1:]} instead of {expected[1:]}: take each word "
        "from the last hidden state of its own pass, by argmax",
    )


def nucleus(answer: Callable[..., Any]) -> None:
    """Binary fractions, so that sums are exact; not sorted; one p that is reached exactly; ties."""
    probabilities = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625])
    result = call(answer, probabilities.clone(), 0.8)
    expect(isinstance(result, Tensor), f"return a tensor of booleans, not a {type(result).__name__}")
    expect(
        result.dtype == torch.bool,
        f"return booleans, True for a kept token; yours are of type {result.dtype}",
    )
    expect(
        result.shape == probabilities.shape,
        f"expected one boolean per token, {list(probabilities.shape)}, got shape {list(result.shape)}",
    )
    found = result.tolist()
    known = {
        "your marks are in the order of the sorted tokens: put them back in the original order": "11100",
        "the kept tokens sum to 0.75, less than p = 0.8: keep the one that crosses p as well": "01010",
        "you compared single probabilities with p: it is their running sum, best first, that must reach "
        "p": "00000",
        "these are the tokens outside the nucleus: mark the ones that stay": "00101",
        "you added up in the order of the vocabulary: sort first, best token first": "11110",
        "you began with the least probable tokens: sort with descending=True": "11111",
        "only the best token is kept: it has 0.5, and p = 0.8 is not reached": "01000",
    }
    for hint, marks in known.items():
        expect(found != [mark == "1" for mark in marks], hint)
    expect(
        found == [True, True, False, True, False],
        f"for p = 0.8 of {probabilities.tolist()} you keep {found}: the best three, 0.5 + 0.25 + "
        "0.125, reach it",
    )
    exact = call(answer, probabilities.clone(), 0.75).tolist()
    expect(
        exact == [False, True, False, True, False],
        f"two tokens reach p = 0.75 exactly, so no third is needed; you keep {sum(exact)}",
    )
    spike = call(answer, probabilities.clone(), 0.1).tolist()
    expect(
        spike == [False, True, False, False, False],
        f"for p = 0.1 the best token alone is enough, and it always stays; you keep {sum(spike)} tokens",
    )
    even = sum(call(answer, torch.full((4,), 0.25), 0.3).tolist())
    expect(
        even == 2,
        f"of four tokens with 0.25 each, two reach p = 0.3; you keep {even}. A limit on the value "
        "cannot tell equal tokens apart: mark them by their rank",
    )
    right("the smallest set of best tokens that reaches p, and never an empty one.")
