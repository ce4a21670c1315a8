"""The checks of 05_gemma accept right answers and name the likely mistake in wrong ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from minivlm.cache import KVCache
from minivlm.checks import NotYet, gemma
from minivlm.rope import apply_rotary, rotary_angles
from minivlm.text.gemma import GemmaConfig, GemmaDecoder

good = gemma.solutions


def turned(
    x: Tensor, p: Tensor, theta: float, exponent: Callable[[Tensor, int], Tensor], factor: float = 1.0
) -> Tensor:
    """Rotation at speeds of another formula; `exponent` takes i and Dh."""
    a, b = x.chunk(2, dim=-1)
    speeds = theta ** exponent(torch.arange(a.shape[-1]), x.shape[-1]) * factor
    angles = p[:, None, :, None] * speeds
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def parts(x: Tensor, p: Tensor, theta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cos, sin = rotary_angles(p, x.shape[-1], theta)
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:], cos[..., :half], sin[..., :half]


def neighbors(x: Tensor, p: Tensor, theta: float) -> Tensor:
    _, _, cos, sin = parts(x, p, theta)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def torn(x: Tensor, p: Tensor, theta: float) -> Tensor:
    a, b, cos, sin = parts(x, p, theta)
    cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def without_minus(x: Tensor, p: Tensor, theta: float) -> Tensor:
    a, b, cos, sin = parts(x, p, theta)
    return torch.cat([a * cos + b * sin, b * cos + a * sin], dim=-1)


def first_half_only(x: Tensor, p: Tensor, theta: float) -> Tensor:
    a, b, cos, sin = parts(x, p, theta)
    return torch.cat([a * cos - b * sin, b], dim=-1)


def cosines_only(x: Tensor, p: Tensor, theta: float) -> Tensor:
    return x * rotary_angles(p, x.shape[-1], theta)[0]


def angles_in_half_precision(x: Tensor, p: Tensor, theta: float) -> Tensor:
    return apply_rotary(x, *rotary_angles(p.to(x.dtype), x.shape[-1], theta))


def cached(
    *,
    place: int = -1,
    choose: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(dim=-1),
    embed: Callable[[Any, Tensor], Tensor] = lambda decoder, token: decoder.embed(token),
    positions: Callable[[Tensor], Tensor] = lambda position_ids: position_ids,
    see: Callable[[Tensor], Tensor] = lambda mask: mask,
    extra: int = 0,
    feed: Callable[[Tensor, Tensor], Tensor] = lambda old, new: new,
    use: Callable[[Any], Any] = lambda cache: cache,
    all_rows: bool = False,
) -> Callable[..., Any]:
    """`speak_cached` with one of its parts replaced."""

    def speak(decoder: Any, embeds: Tensor, count: int, cache: Any) -> Iterator[int]:
        new, cache = embeds, use(cache)
        for _ in range(count + extra):
            position_ids = positions(cache.reserve(torch.ones(new.shape[:2])))
            keys = cache.key_positions.shape[1]
            hidden = decoder(new, position_ids, see(torch.ones(1, 1, new.shape[1], keys).bool()), cache)
            if all_rows:
                token = choose(decoder.logits(hidden)[:, place])
            else:
                token = choose(decoder.logits(hidden[:, place]))
            yield token.item()
            new = feed(new, embed(decoder, token[:, None]))

    return speak


def without_cache(decoder: Any, embeds: Tensor, count: int, cache: Any) -> Iterator[int]:
    for _ in range(count):
        length = embeds.shape[1]
        hidden = decoder(embeds, torch.arange(length)[None], torch.ones(1, 1, length, length).bool())
        token = decoder.logits(hidden[:, -1]).argmax(dim=-1)
        yield token.item()
        embeds = torch.cat([embeds, decoder.embed(token[:, None])], dim=1)


def token_by_token(decoder: Any, embeds: Tensor, count: int, cache: Any) -> Iterator[int]:
    for row in embeds.split(1, dim=1):
        position_ids = cache.reserve(torch.ones(1, 1))
        hidden = decoder(row, position_ids, torch.ones(1, 1, 1, cache.length).bool(), cache)
    for _ in range(count):
        token = decoder.logits(hidden[:, -1]).argmax(dim=-1)
        yield token.item()
        position_ids = cache.reserve(torch.ones(1, 1))
        mask = torch.ones(1, 1, 1, cache.length).bool()
        hidden = decoder(decoder.embed(token[:, None]), position_ids, mask, cache)


def reserve_once(decoder: Any, embeds: Tensor, count: int, cache: Any) -> Iterator[int]:
    cache.reserve(torch.ones(1, embeds.shape[1] + count))
    new, start = embeds, 0
    for _ in range(count):
        position_ids = start + torch.arange(new.shape[1])[None]
        hidden = decoder(new, position_ids, torch.ones(1, 1, new.shape[1], cache.length).bool(), None)
        yield decoder.logits(hidden[:, -1]).argmax(dim=-1).item()


def own_cache(cache: KVCache) -> KVCache:
    return KVCache(len(cache.keys), 1, cache.keys[0].shape[1], cache.keys[0].shape[3])


def lower(mask: Tensor) -> Tensor:
    return mask.tril(mask.shape[-1] - mask.shape[-2])


def nearest_only(mask: Tensor) -> Tensor:
    return mask if mask.shape[2] > 1 else mask & (torch.arange(mask.shape[3]) == mask.shape[3] - 1)


def diagnosed(**instead: str) -> Callable[..., str]:
    """The right diagnosis with some answers replaced."""

    def answer(patient: Any, intact: Any, tokens: Tensor) -> str:
        found = good.diagnose(patient, intact, tokens)
        return instead.get(found, found)

    return answer


def scattered(probabilities: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Marks by rank, put back in the order of the vocabulary."""
    ordered, order = probabilities.sort(descending=True)
    kept = torch.zeros_like(probabilities, dtype=torch.bool)
    kept[order[choose(ordered)]] = True
    return kept


def by_value(q: Tensor, p: float) -> Tensor:
    ordered = q.sort(descending=True).values
    return q >= ordered[ordered.cumsum(0) - ordered < p][-1]


def heads_of(weight: Tensor, d: int) -> Tensor:
    return weight.unflatten(0, (-1, d))


WRONG: dict[str, list[tuple[str, Callable[..., Any]]]] = {
    "rotate": [
        ("x as it was", lambda x, p, t=1e4: x),
        ("you pair neighbors", neighbors),
        ("stands twice in a row", torn),
        ("the other way", lambda x, p, t=1e4: good.rotate(x, -p, t)),
        ("a minus is missing", without_minus),
        ("first half of every pair", first_half_only),
        ("only the terms with the cosine", cosines_only),
        ("at the same speed", lambda x, p, t=1e4: turned(x, p, t, lambda i, d: 0 * i)),
        ("fall too slowly", lambda x, p, t=1e4: turned(x, p, t, lambda i, d: -i / d)),
        ("fall too fast", lambda x, p, t=1e4: turned(x, p, t, lambda i, d: -4 * i / d)),
        ("grow with i", lambda x, p, t=1e4: turned(x, p, t, lambda i, d: 2 * i / d)),
        ("theta is not used", lambda x, p, t=1e4: good.rotate(x, p)),
        (
            "number the tokens yourself",
            lambda x, p, t=1e4: good.rotate(x, torch.arange(p.shape[1]).expand_as(p), t),
        ),
        ("positions of the first", lambda x, p, t=1e4: good.rotate(x, p[:1].expand_as(p), t)),
        ("one too large", lambda x, p, t=1e4: good.rotate(x, p + 1, t)),
        (
            "taken as degrees",
            lambda x, p, t=1e4: turned(x, p, t, lambda i, d: -2 * i / d, math.pi / 180),
        ),
        ("position 1001 becomes 1000", angles_in_half_precision),
        ("give it the dtype of x", lambda x, p, t=1e4: good.rotate(x.float(), p, t)),
        ("has shape", lambda x, p, t=1e4: good.rotate(x, p, t).transpose(1, 2)),
        ("Compare one vector with naive_rotary", lambda x, p, t=1e4: 2 * good.rotate(x, p, t)),
        ("your code stops", lambda x, p, t=1e4: x * p[..., None]),
    ],
    "half_split_rows": [
        ("old order", lambda w, d: w),
        ("the inverse", lambda w, d: w.unflatten(0, (-1, 2, d // 2)).transpose(1, 2).reshape(w.shape)),
        ("all rows at once", lambda w, d: torch.cat([w[0::2], w[1::2]])),
        ("the columns", lambda w, d: w.unflatten(1, (-1, d // 2, 2)).transpose(2, 3).reshape(w.shape)),
        ("too many axes", lambda w, d: w.unflatten(0, (-1, d // 2, 2)).transpose(1, 2)),
        ("order of the rows", lambda w, d: good.half_split_rows(torch.arange(len(w))[:, None], d)[:, 0]),
        (
            "halves are exchanged",
            lambda w, d: torch.cat([heads_of(w, d)[:, 1::2], heads_of(w, d)[:, 0::2]], 1).reshape(w.shape),
        ),
        ("only the first head", lambda w, d: torch.cat([good.half_split_rows(w[:d], d), w[d:]])),
        (
            "different heads are mixed",
            lambda w, d: w.unflatten(0, (d // 2, 2, -1)).transpose(0, 1).reshape(w.shape),
        ),
        (
            "different heads are mixed",
            lambda w, d: w.unflatten(0, (d // 2, 2, -1)).transpose(0, 2).reshape(w.shape),
        ),
        ("opposite order", lambda w, d: heads_of(good.half_split_rows(w, d), d).flip(0).reshape(w.shape)),
        ("sorted twice", lambda w, d: good.half_split_rows(good.half_split_rows(w, d), d)),
        (
            "another sign",
            lambda w, d: torch.cat([heads_of(w, d)[:, 0::2], -heads_of(w, d)[:, 1::2]], 1).reshape(w.shape),
        ),
        ("Try a weight of one head", lambda w, d: w.flip(0)),
    ],
    "cache_factors": [
        ("layers: .* keys and values of its own", lambda: good.cache_factors() | {"layers": 1}),
        ("query heads: .* forgotten", lambda: good.cache_factors() | {"query heads": 2}),
        ("key/value heads: .* a key and a value", lambda: good.cache_factors() | {"key/value heads": 1}),
        ("key/value heads: .* factor is 2", lambda: good.cache_factors() | {"key/value heads": 4}),
        ("head_dim: .* head_dim numbers long", lambda: good.cache_factors() | {"head_dim": 1}),
        ("head_dim: .* factor is 2", lambda: good.cache_factors() | {"head_dim": 4}),
        ("hidden_size: .* any width", lambda: good.cache_factors() | {"hidden_size": 2}),
        ("vocabulary: .* keeps logits", lambda: good.cache_factors() | {"vocabulary": 2}),
        ("context: .* leaves its keys", lambda: good.cache_factors() | {"context": 4}),
        ("fp32: .* 4 bytes", lambda: good.cache_factors() | {"fp32": 1}),
        ("no prediction yet for: layers", lambda: {"fp32": 2}),
        ("return the dict", lambda: list(good.cache_factors().values())),
    ],
    "diagnose": [
        ("for all five", lambda patient, intact, tokens: "mask"),
        ("one of the five names", lambda patient, intact, tokens: "rotation"),
        ("With 'scale', .* of one token would be as in", diagnosed(values="scale")),
        ("With 'keys', .* as in the intact decoder at every position", diagnosed(values="keys")),
        ("With 'keys', .* would change when all its positions", diagnosed(scale="keys")),
        ("With 'values', .* would change when it moves", diagnosed(keys="values")),
        ("With 'values', .* nothing turns it back", diagnosed(scale="values")),
        ("With 'mask', outputs at earlier", diagnosed(scale="mask")),
        ("With 'mask', outputs at earlier", diagnosed(keys="mask")),
        ("With 'scale', .* no earlier output", diagnosed(mask="scale")),
        ("With 'norm', .* already differ", diagnosed(scale="norm")),
        ("With 'norm', .* single key", diagnosed(values="norm", keys="norm", mask="norm")),
        ("With 'values'", diagnosed(norm="values")),
    ],
    "speak_cached": [
        ("without the cache", without_cache),
        ("reads the whole prompt at once", token_by_token),
        ("without the cache", reserve_once),
        ("not the one that was given", cached(use=own_cache)),
        ("everything before the new one", cached(feed=lambda old, new: torch.cat([old, new], dim=1))),
        ("got position 0", cached(positions=lambda p: torch.arange(p.shape[1])[None])),
        ("got position 8", cached(positions=lambda p: p + (p.shape[1] == 1))),
        ("hides something", cached(see=lower)),
        ("hides a part", cached(see=nearest_only)),
        ("asked for 6 words, you give 7", cached(extra=1)),
        ("asked for 6 words, you give 5", cached(extra=-1)),
        ("first row of the prompt", cached(place=0)),
        ("least probable", cached(choose=lambda logits: logits.argmin(dim=-1))),
        ("nothing is drawn", cached(choose=lambda logits: logits.topk(2).indices[:, 1])),
        ("without its factor", cached(embed=lambda decoder, token: decoder.embed_tokens(token))),
        ("not the one that you chose", cached(embed=lambda decoder, token: decoder.embed(token + 1))),
        ("for 7 rows", cached(all_rows=True)),
        ("all at once", lambda *args: list(good.speak_cached(*args))),
        ("never called", lambda *args: iter(range(6))),
        ("your code stops", lambda *args: 3),
        ("returns nothing", lambda *args: None),
    ],
    "nucleus": [
        ("crosses p", lambda q, p: scattered(q, lambda o: o.cumsum(0) <= p)),
        ("order of the sorted", lambda q, p: (o := q.sort(descending=True).values).cumsum(0) - o < p),
        ("single probabilities", lambda q, p: q >= p),
        ("reach p = 0.75 exactly", lambda q, p: scattered(q, lambda o: o.cumsum(0) - o <= p)),
        ("return booleans", lambda q, p: good.nucleus(q, p).float()),
        ("a tensor of booleans", lambda q, p: good.nucleus(q, p).tolist()),
        ("one boolean per token", lambda q, p: good.nucleus(q, p)[:2]),
        ("the best token alone", lambda q, p: good.nucleus(q, max(p, 0.6))),
        ("outside the nucleus", lambda q, p: ~good.nucleus(q, p)),
        ("order of the vocabulary", lambda q, p: q.cumsum(0) - q < p),
        ("least probable", lambda q, p: q.sort().values.cumsum(0) - q.sort().values < p),
        ("only the best token", lambda q, p: q == q.max()),
        ("by their rank", by_value),
        ("no third is needed", lambda q, p: scattered(q, lambda o: torch.arange(len(o)) < 3)),
        ("the best three", lambda q, p: q < 0.3),
    ],
}


@pytest.mark.parametrize(
    ("name", "hint", "answer"),
    [(name, hint, answer) for name, wrong in WRONG.items() for hint, answer in wrong],
    ids=[f"{name}-{number}" for name, wrong in WRONG.items() for number in range(len(wrong))],
)
def test_names_the_mistake(name: str, hint: str, answer: Callable[..., Any]) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(gemma, name)(answer)


def test_every_exercise_meets_ten_wrong_answers() -> None:
    assert all(len(wrong) >= 10 for wrong in WRONG.values())


def in_place(x: Tensor, position_ids: Tensor, theta: float = 10000.0) -> Tensor:
    a, b, cos, sin = parts(x.clone(), position_ids, theta)
    half = x.shape[-1] // 2
    x[..., :half] = a * cos - b * sin
    x[..., half:] = b * cos + a * sin
    return x


def by_complex_numbers(x: Tensor, position_ids: Tensor, theta: float = 10000.0) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    angles = position_ids[:, None, :, None] * theta ** (-torch.arange(a.shape[-1]) / a.shape[-1])
    out = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([out.real, out.imag], dim=-1).to(x.dtype)


def by_gather(q: Tensor, p: float) -> Tensor:
    order = q.argsort(descending=True)
    return (q[order].cumsum(0) - q[order] < p)[order.argsort()]


def by_loop(weight: Tensor, head_dim: int) -> Tensor:
    order = [*range(0, head_dim, 2), *range(1, head_dim, 2)]
    rows = [weight[start + row] for start in range(0, len(weight), head_dim) for row in order]
    return torch.stack(rows)


def reads_its_last_word(decoder: Any, embeds: Tensor, count: int, cache: Any) -> Iterator[Tensor]:
    """One pass more than needed; the mask of a new token is broadcast; words are tensors."""
    mask = torch.ones(1, 1, embeds.shape[1], embeds.shape[1]).bool()
    hidden = decoder(embeds, cache.reserve(torch.ones(embeds.shape[:2])), mask, cache)
    for _ in range(count):
        token = decoder.logits(hidden[:, -1]).argmax(dim=-1)
        yield token
        position_ids = cache.reserve(torch.ones(1, 1))
        hidden = decoder(decoder.embed(token)[None], position_ids, torch.ones(1, 1, 1, 1).bool(), cache)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("rotate", lambda x, p, t=1e4: apply_rotary(x, *rotary_angles(p, x.shape[-1], t))),
        ("rotate", in_place),
        ("rotate", by_complex_numbers),
        ("half_split_rows", by_loop),
        ("half_split_rows", lambda w, d: torch.cat([h[i::2] for h in w.split(d) for i in (0, 1)])),
        ("speak_cached", reads_its_last_word),
        ("nucleus", by_gather),
        ("cache_factors", lambda: {name: float(factor) for name, factor in good.cache_factors().items()}),
    ],
)
def test_other_right_answers_pass(name: str, answer: Callable[..., Any]) -> None:
    getattr(gemma, name)(answer)


def test_the_patients_have_the_five_faults() -> None:
    torch.manual_seed(0)
    decoder = GemmaDecoder(GemmaConfig(32, 64, 2, 2, 1, 16, 50))
    tokens = decoder.embed(torch.arange(5)[None]) * 3
    found = [good.diagnose(patient, decoder, tokens) for patient in gemma.patients(decoder).values()]
    assert sorted(found) == sorted(gemma.FAULTS)
