"""The checks of 13_four_ways say what is wrong with likely mistakes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minivlm import checks
from minivlm.checks import NotYet
from minivlm.checks.ways import (
    DUELS,
    LEAKS,
    GatedBlock,
    may_look,
    over_seeds,
    patient,
    read_systems,
    run_block,
    solutions,
)

BEST = solutions.predictions()


def result(way: str, **values: float) -> dict[str, Any]:
    return {"config": {"system": way}, **values}


TABLE: list[dict[str, Any]] = [
    {
        "config": {"system": way},
        "all questions": questions,
        "exact caption": captions,
        "text loss after": loss,
    }
    for way, questions, captions, loss in (
        ("clipcap", 0.5, 0.1, 1.0),
        ("clipcap-mlp", 0.6, 0.3, 5.0),
        ("flamingo", 0.7, 0.7, 1.0),
        ("visualgpt", 0.8, 0.9, 5.0),
        ("simvlm", 0.6, 0.1, 5.0),
        ("cm3", 0.8, 0.5, 2.0),
    )
]


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        ([], "return a dictionary"),
        ({}, "a prediction is missing"),
        ({**BEST, "who sees": "cm3"}, "none of the five questions"),
        ({**BEST, "who learns": "cm3"}, "between 'clipcap' and 'clipcap-mlp'"),
        ({**BEST, "who learns": "clipcap"}, "meet the prefix halfway"),
        ({**BEST, "prefix or between the layers": "clipcap"}, "for every word"),
        ({**BEST, "whose eyes": "simvlm"}, "starts from nothing"),
        ({**BEST, "how many image tokens": "cm3"}, "places in the row are not what counts"),
        ({**BEST, "what it forgets": "flamingo"}, "bit for bit"),
        ({**BEST, "what it forgets": "none"}, "you say 'none'"),
        ({**BEST, "what it forgets": None}, "between 'flamingo' and 'visualgpt'"),
    ],
)
def test_predictions(answer: Any, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        checks.ways.predictions(lambda: answer, TABLE)


def test_predictions_are_held_against_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    checks.ways.predictions(solutions.predictions, TABLE)
    assert capsys.readouterr().out.startswith("Right: ")
    turned = [{**one, "all questions": -one["all questions"]} for one in TABLE]
    with pytest.raises(NotYet, match="'who learns'"):
        checks.ways.predictions(solutions.predictions, turned)


def test_a_table_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [
        {"config": {"system": "a"}, "right": 0.5, "weights": 1200},
        {"config": {"system": "b"}, "right": 0.25, "weights": 7},
        {"config": {"system": "a"}, "right": 0.2, "weights": 1200},
        {"config": {"system": "c"}, "right": 1.0, "weights": 1},
    ]
    monkeypatch.setattr("minivlm.checks.ways.read_systems", lambda table: results if table == "some" else [])
    table = over_seeds({"b": "one", "a": "two"}, {"questions": "right", "size": "weights"}, "some")
    assert [line.split("  ")[0] for line in table.splitlines()] == ["", "questions", "size"]
    assert [line.split() for line in table.splitlines()] == [
        ["one", "two"],
        ["questions", "0.25", "0.35", "(0.20", "to", "0.50)"],
        ["size", "7", "1,200"],
    ]
    places = [
        line.find(word) for line, word in zip(table.splitlines(), ("two", "0.35", "1,200"), strict=True)
    ]
    assert len(set(places)) == 1


def test_both_tables_are_there() -> None:
    tables = [
        {one["config"]["system"] for one in read_systems(name)} for name in ("systems", "systems_small")
    ]
    assert "clipcap" in tables[0]
    assert "small-one-view" in tables[1]
    assert not tables[0] & tables[1]


def test_predictions_are_right_about_the_table_that_ships() -> None:
    checks.ways.predictions(solutions.predictions)
    assert list(BEST) == list(DUELS)


def body_of(ids: list[int], sentinels: list[int], end: int = 99) -> list[int]:
    return ids[: ids.index(90, ids.index(90) + 1)] if 90 in ids else ids


def only_the_first(ids: list[int], sentinels: list[int], end: int) -> list[int]:
    if 90 not in ids:
        return ids
    body = body_of(ids, sentinels)
    at = len(body)
    span = ids[at + 1 : ids.index(end, at)]
    blank = body.index(90)
    return body[:blank] + span + body[blank + 1 :]


def changes_what_it_got(ids: list[int], sentinels: list[int], end: int) -> list[int]:
    found = solutions.read_back(ids, sentinels, end)
    ids[:] = found
    return found


def forgets_the_tail(ids: list[int], sentinels: list[int], end: int) -> list[int]:
    found = solutions.read_back(ids, sentinels, end)
    body = body_of(ids, sentinels)
    last = max((at for at, number in enumerate(body) if number in sentinels), default=len(ids))
    return found[: len(found) - (len(body) - last - 1)] if body != ids else found


def at_the_end(ids: list[int], sentinels: list[int], end: int) -> list[int]:
    return [number for number in ids if number not in [*sentinels, end]]


def in_the_other_order(ids: list[int], sentinels: list[int], end: int) -> list[int]:
    count = sum(number in sentinels for number in ids) // 2
    names = dict(zip(sentinels[:count], sentinels[:count][::-1], strict=True))
    body = len(body_of(ids, sentinels))
    return solutions.read_back(
        [names.get(n, n) if at < body else n for at, n in enumerate(ids)], sentinels, end
    )


def as_lists(ids: list[int], sentinels: list[int], end: int) -> list[Any]:
    if 90 not in ids:
        return ids
    body = body_of(ids, sentinels)
    pieces = {n: [word for word in ids[len(body) :] if word not in [*sentinels, end]] for n in sentinels}
    return [pieces.get(number, number) for number in body]


def nothing_without_a_sentinel(ids: list[int], sentinels: list[int], end: int) -> list[int]:
    return solutions.read_back(ids, sentinels, end) if 90 in ids else []


def once_each(ids: list[int], sentinels: list[int], end: int) -> list[int]:
    return list(dict.fromkeys(solutions.read_back(ids, sentinels, end)))


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda ids, sentinels, end: ids, "nothing has moved"),
        (lambda ids, sentinels, end: None, "returns nothing"),
        (lambda ids, sentinels, end: tuple(solutions.read_back(ids, sentinels, end)), "return a list"),
        (lambda ids, sentinels, end: [*solutions.read_back(ids, sentinels, end), end], "that ends a span"),
        (lambda ids, sentinels, end: body_of(ids, sentinels), "their blanks stay empty"),
        (
            lambda ids, sentinels, end: at_the_end(body_of(ids, sentinels), sentinels, end),
            "dropped the spans",
        ),
        (at_the_end, "still at the end"),
        (only_the_first, "only some blanks are filled"),
        (changes_what_it_got, "make a new one"),
        (forgets_the_tail, "words are lost"),
        (in_the_other_order, "in each other's blanks|stops with"),
        (once_each, "a word may stand in it twice"),
        (as_lists, "a list stands among the ids"),
        (nothing_without_a_sentinel, "without a sentinel"),
        (lambda ids, sentinels, end: sorted(solutions.read_back(ids, sentinels, end))[::-1], "another order"),
        (lambda ids, sentinels, end: ids[: ids.index(90)] + ids[ids.index(90) :], "nothing has moved"),
    ],
)
def test_read_back(answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        checks.ways.read_back(answer)


def test_reading_back_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    checks.ways.read_back(solutions.read_back)
    assert capsys.readouterr().out.startswith("Right: ")


class Wrong(GatedBlock):
    """The right parts, put together in another way."""

    def __init__(self, *sizes: int, **mistake: Any) -> None:
        super().__init__(*sizes)
        self.mistake = mistake

    def forward(self, x: Tensor, media: Tensor, is_image: Tensor) -> Tensor:
        mistake = dict(self.mistake)
        if "mask" in mistake:
            mistake["mask"] = mistake["mask"](is_image, *media.shape[1:3])
        return run_block(self, x, media, is_image, **mistake)


def wrong(**mistake: Any) -> Callable[..., nn.Module]:
    return partial(Wrong, **mistake)


def numbers(is_image: Tensor, pictures: int, latents: int) -> tuple[Tensor, Tensor]:
    return is_image.cumsum(dim=1)[..., None], torch.arange(pictures).repeat_interleave(latents) + 1


def earlier_too(*given: Any) -> Tensor:
    words, of_latent = numbers(*given)
    return words >= of_latent


def later_too(*given: Any) -> Tensor:
    words, of_latent = numbers(*given)
    return words <= of_latent


def after_the_token(is_image: Tensor, *sizes: int) -> Tensor:
    words, of_latent = numbers(is_image, *sizes)
    return words - is_image[..., None].long() == of_latent


def from_zero(*given: Any) -> Tensor:
    words, of_latent = numbers(*given)
    return words == of_latent - 1


def turned_around(*given: Any) -> Tensor:
    return ~may_look(*given)


def over_the_rows(is_image: Tensor, *sizes: int) -> Tensor:
    return is_image.cumsum(dim=0)[..., None] == numbers(is_image, *sizes)[1]


def in_turns(is_image: Tensor, pictures: int, latents: int) -> Tensor:
    return is_image.cumsum(dim=1)[..., None] == torch.arange(pictures).repeat(latents) + 1


def everything(*given: Any) -> Tensor:
    return torch.ones_like(may_look(*given))


def gates_at_one(*sizes: int) -> nn.Module:
    block = GatedBlock(*sizes)
    block.attn_gate.data.fill_(1.0)
    return block


def nothing_behind(*sizes: int) -> nn.Module:
    block = GatedBlock(*sizes)
    block.cross.to_out.weight.data.zero_()
    return block


def gates_of_numbers(*sizes: int) -> nn.Module:
    block = GatedBlock(*sizes)
    del block.attn_gate
    block.attn_gate = torch.zeros(1)  # type: ignore[assignment]
    return block


def without_norm(*sizes: int) -> nn.Module:
    block = GatedBlock(*sizes)
    del block.norm
    return block


class InPlace(GatedBlock):
    def forward(self, x: Tensor, media: Tensor, is_image: Tensor) -> Tensor:
        x += self.attn_gate.tanh() * self.cross.look(self.norm(x), media.flatten(1, 2))
        x += self.ff_gate.tanh() * self.ff(x)
        return x


class Zeros(GatedBlock):
    def forward(self, x: Tensor, media: Tensor, is_image: Tensor) -> Tensor:
        return run_block(self, x, media, is_image) - x


class Twice(GatedBlock):
    def forward(self, x: Tensor, media: Tensor, is_image: Tensor) -> Tensor:
        return run_block(self, run_block(self, x, media, is_image), media, is_image)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda *sizes: nn.LayerNorm, "return a module"),
        (without_norm, "a part `norm`"),
        (gates_of_numbers, "no optimizer finds it"),
        (Zeros, "is \\*added\\* to the words"),
        (gates_at_one, "bit for bit"),
        (wrong(gate=torch.sigmoid), "both gates start at 0"),
        (nothing_behind, "gets no gradient"),
        (wrong(gate=lambda gate: gate), "not bounded"),
        (wrong(gates=("attn_gate", "attn_gate")), "gets no gradient|one gate serves both|stops with"),
        (wrong(gates=("ff_gate", "attn_gate")), "exchanged"),
        (wrong(mask=everything), "every word sees every picture"),
        (wrong(mask=earlier_too), "compare the numbers with =="),
        (wrong(mask=later_too), "also later ones"),
        (wrong(mask=after_the_token), "its own picture already"),
        (wrong(mask=from_zero), "number pictures from 1"),
        (wrong(zeros=False), "mean of everything"),
        (InPlace, "x = x \\+ "),
        (wrong(mask=turned_around), "turned around"),
        (wrong(mask=over_the_rows), "along the words"),
        (wrong(mask=in_turns), "stand together"),
        (wrong(to_scores=Tensor.to), "leave it boolean"),
        (wrong(ff_normed=True), "its own norm"),
        (wrong(flat=lambda media: media.transpose(1, 2).flatten(1, 2)), "wrong order"),
        (wrong(normed=False), "norm is missing"),
        (wrong(residual=False), "is \\*added\\*|residual path"),
        (wrong(parallel=True), "The MLP comes second"),
        (wrong(ff_everywhere=False), "for all words"),
        (Twice, "Take the parts one by one"),
    ],
)
def test_build_gated_block(answer: Callable[..., nn.Module], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        checks.ways.build_gated_block(answer)


@pytest.mark.parametrize("gradients", [True, False])
def test_the_gated_block_is_right(gradients: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.set_grad_enabled(gradients):
        checks.ways.build_gated_block(solutions.build_gated_block)
    assert capsys.readouterr().out.startswith("Right: ")


def places_of(model: Any, ids: Tensor) -> list[int]:
    return list((ids[0] == model.config.image_token_id).nonzero()[:, 0].tolist())


def in_place(model: Any, ids: Tensor, pixel_values: Tensor) -> Any:
    pixel_values *= -1
    return set()


def by_words(model: Any, ids: Tensor, pixel_values: Tensor) -> Any:
    """Only leaks that change the best next word."""
    before = model(ids, pixel_values).logits.argmax(dim=-1)
    after = model(ids, pixel_values * (1 + 1e-6)).logits.argmax(dim=-1)
    return {(int(word), 0) for word in (before != after)[0].nonzero()[:, 0]}


def all_at_once(model: Any, ids: Tensor, pixel_values: Tensor) -> Any:
    moved = (model.hidden_states(ids, -pixel_values) != model.hidden_states(ids, pixel_values)).any(-1)[0]
    return {
        (word, picture)
        for picture, place in enumerate(places_of(model, ids))
        for word in moved[:place].nonzero()[:, 0].tolist()
    }


def with_later_words(model: Any, ids: Tensor, pixel_values: Tensor) -> Any:
    after = {(w, p) for p, place in enumerate(places_of(model, ids)) for w in range(place, ids.shape[1])}
    return solutions.leaks(model, ids, pixel_values) | after


def with_the_token(model: Any, ids: Tensor, pixel_values: Tensor) -> Any:
    own = {(place, picture) for picture, place in enumerate(places_of(model, ids))}
    return solutions.leaks(model, ids, pixel_values) | own


def changed(change: Callable[[set[tuple[int, int]]], Any]) -> Callable[..., Any]:
    return lambda *given: change(solutions.leaks(*given))


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda *given: None, "returns nothing"),
        (lambda *given: True, "set of pairs"),
        (changed(lambda pairs: {word for word, _ in pairs}), "set of pairs"),
        (in_place, "clone"),
        (by_words, "compare hidden states exactly"),
        (changed(lambda pairs: {(p, w) for w, p in pairs}), "turned around"),
        (changed(lambda pairs: {(w, p + 1) for w, p in pairs}), "pictures are counted from 0"),
        (changed(lambda pairs: {(w + 1, p) for w, p in pairs}), "words are counted from 0"),
        (with_the_token, "may see its own picture"),
        (with_later_words, "these may see it"),
        (all_at_once, "several pictures|one picture at a time"),
        (changed(lambda pairs: set(sorted(pairs)[:1])), "you miss .* exactly"),
        (changed(lambda pairs: {pair for pair in pairs if pair[1] == 0}), "try every picture"),
    ],
)
def test_leaks(answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        checks.ways.leaks(answer)


def test_leaks_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    checks.ways.leaks(solutions.leaks)
    assert capsys.readouterr().out.startswith("Right: ")


@torch.no_grad()
def test_three_of_four_patients_leak() -> None:
    model, ids, pixel_values = checks.ways._small_flamingo()
    found = {leak: solutions.leaks(patient(model, leak), ids, pixel_values) for leak in LEAKS}
    assert not found["nothing"]
    assert {(0, 2), (1, 0)} <= found["mean of all"]
    assert not solutions.leaks(patient(model), ids[:, 2:], pixel_values)  # no word before the first picture
    assert found["next picture"] < found["all pictures"]  # its first words see nothing
