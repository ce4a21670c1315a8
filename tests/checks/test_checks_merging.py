"""The checks of 06_merging accept the solutions and say what is wrong with likely mistakes."""

from __future__ import annotations

import inspect
import textwrap
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from notebooks_and_sources import ROOT, read_cells
from torch import Tensor

from minivlm import checks
from minivlm.checks import NotYet, _capstone
from minivlm.models.load import SHIPPED

NOTEBOOK = ROOT / "notebooks" / "06_merging.ipynb"
EXERCISES = (
    "three_masks",
    "merge_with_where",
    "positions_and_keys",
    "block_mask",
    "count_leaks",
    "find_fault",
    "read_and_answer",
)


def blank(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("your turn")


def changed(name: str, *replacements: tuple[str, str]) -> Callable[..., Any]:
    """A solution with some of its code replaced, as somebody could have written it."""
    source = textwrap.dedent(inspect.getsource(getattr(checks.merging.solutions, name)))
    source = source.removeprefix("@staticmethod\n")
    for old, new in replacements:
        assert old in source, old
        source = source.replace(old, new)
    scope = dict(vars(checks.merging))
    exec(source, scope)
    return scope[name]


def merge_counted(numbers_of: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Merges with another way to number the placeholders."""

    def merge(is_image: Tensor, words: Tensor, features: Tensor) -> Tensor:
        return torch.where(is_image[..., None], features.flatten(0, 1)[numbers_of(is_image)], words)

    return merge


def counted(is_image: Tensor) -> Tensor:
    return is_image.flatten().cumsum(0).view_as(is_image)


def swapped(is_image: Tensor, words: Tensor, features: Tensor) -> Tensor:
    return torch.where(is_image[..., None], words, features.flatten(0, 1)[(counted(is_image) - 1).clamp(0)])


def not_flattened(is_image: Tensor, words: Tensor, features: Tensor) -> Tensor:
    return torch.where(is_image[..., None], features[(counted(is_image) - 1).clamp(0)], words)


def mask_without_axis(is_image: Tensor, words: Tensor, features: Tensor) -> Tensor:
    return torch.where(is_image, features.flatten(0, 1)[(counted(is_image) - 1).clamp(0)], words)


def by_boolean_index(is_image: Tensor, words: Tensor, features: Tensor) -> Tensor:
    words[is_image] = features.flatten(0, 1)
    return words


def predict(**other: int) -> Callable[[], dict[str, int]]:
    """The right predictions with some changed: `at_3=5` makes the fourth one 5."""

    def answer() -> dict[str, int]:
        result = checks.merging.solutions.positions_and_keys()
        for place, number in other.items():
            result[list(result)[int(place.removeprefix("at_"))]] = number
        return result

    return answer


def block(
    compare: Callable[[Tensor, Tensor], Tensor], sums: bool = True, pads: bool = True
) -> Callable[..., Tensor]:
    """A block mask with another comparison of (key, query), without the running sum, or without padding."""

    def mask(token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        blocks = token_type_ids.cumsum(1) if sums else token_type_ids
        seen = compare(blocks[:, None, :], blocks[:, :, None])
        return seen & attention_mask[:, None, :].bool() if pads else seen

    return mask


def causal(types: Tensor, mask: Tensor) -> Tensor:
    return torch.ones(types.shape[1], types.shape[1]).tril().bool() & mask[:, None, :].bool()


def opened_again(types: Tensor, mask: Tensor) -> Tensor:
    return causal(types, mask) | (types == 0)[:, None, :]


def leaks(*, own: bool = False, prefix: bool = False, in_place: bool = False, tolerance: float = 1e-4) -> Any:
    """A leak counter with one mistake or two."""

    def count(logits_of: Callable[[Tensor], Tensor], ids: Tensor, types: Tensor, other_id: int) -> int:
        changed = ids if in_place else ids.clone()
        before = None if in_place else logits_of(ids)
        changed[0, -1] = other_id
        moved = ((logits_of(ids) if before is None else before) - logits_of(changed)).abs().amax(-1)[0]
        chosen = torch.ones_like(types[0]).bool() if prefix else types[0] == 1
        if not own:
            chosen[-1] = False
        return int((moved[chosen] > tolerance).sum())

    return count


def same_sequence(logits_of: Callable[[Tensor], Tensor], ids: Tensor, types: Tensor, other_id: int) -> int:
    return leaks()(lambda given: logits_of(ids), ids, types, other_id)


def one_row(sound: Any, patient: Any, inputs: dict[str, Tensor]) -> str:
    """Looks at the first row of a batch only."""
    hidden, _ = sound.prefill(*(inputs[n] for n in ("input_ids", "attention_mask", "pixel_values")))
    result = checks.merging.solutions.find_fault(sound, patient, inputs)
    return "nothing" if result == "prefill" and torch.isfinite(hidden[0]).all() else result


def find(*replacements: tuple[str, str]) -> Callable[..., Any]:
    return changed("find_fault", *replacements)


def program(*replacements: tuple[str, str]) -> Callable[..., Any]:
    return changed("read_and_answer", *replacements)


def from_the_package(folder: Any, features: Tensor, ids: Tensor, max_new_tokens: int = 32) -> Any:
    """Asks the package's decoder, one forward pass for each token."""
    model, _, _ = checks.merging._shipped()
    decoder = model.language_model
    x, logits = torch.cat([features, decoder.embed(ids)]), []
    while not logits or (logits[-1].argmax() != 1 and len(logits) < max_new_tokens):
        places = torch.arange(len(x))
        seen = (places[None] <= places[:, None]) | (places < len(features) + len(ids))
        logits.append(decoder.logits(decoder(x[None], places[None], seen[None, None])[0, -1]))
        x = torch.cat([x, decoder.embed(logits[-1].argmax()[None])])
    return torch.stack(logits).argmax(-1).tolist(), torch.stack(logits)


ROTATED = "[rotate(k, start), v]"
TANH = ', approximate="tanh")'
SCORES = "(rotate(q, start) @ keys.mT * Dh**-0.5)"
CAUSAL = """    def causal(scores, start):
        hidden = torch.ones_like(scores).triu(1).bool()
        return scores if start else scores.masked_fill(hidden, -torch.inf)

"""
FORGOTTEN = """keys, values = both = torch.cat([cache[number], new], dim=2)
            cache[number] = cache[number] if start else both"""
AGAIN = """words = torch.stack(logits).argmax(dim=-1)
        cache[:] = [torch.zeros(2, 1, 0, Dh)] * len(cache)
        read(torch.cat([image_features, table[prompt_ids] * factor]))
        logits.append([read(table[word][None] * factor) for word in words][-1])"""
ROTATION = "a * cos - b * sin, b * cos + a * sin"
CACHED = "keys, values = cache[number] = torch.cat([cache[number], new], dim=2)"
LATER = "logits.append(read(table[logits[-1].argmax()][None] * factor))"
FIRST = "torch.cat([image_features, table[prompt_ids] * factor])"
GIVEN = 'patient.merge(ids, features), sound.merge(ids, features)):\n        return "merge"'

WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("three_masks", lambda i, m, p: (i == m, i != m, i == p), "True at the padding"),
    ("three_masks", lambda i, m, p: (i == m, i != p, i == p), "True at the placeholders"),
    ("three_masks", lambda i, m, p: (i == m, (i != m) & (i != p), i != p), "other way around"),
    ("three_masks", lambda i, m, p: ((i == m).int(), (i != m) & (i != p), i == p), "boolean"),
    ("three_masks", lambda i, m, p: i == m, "return three masks"),
    ("three_masks", lambda i, m, p: (i == 7, (i != 7) & (i != 0), i == 0), "use image_id"),
    ("three_masks", lambda i, m, p: (i == m, i == p, (i != m) & (i != p)), "the order is image_mask, text"),
    ("three_masks", lambda i, m, p: ((i != m) & (i != p), i == m, i == p), "the order is image_mask, text"),
    ("three_masks", lambda i, m, p: (i != m, (i != m) & (i != p), i == p), "== , not with|with ==, not"),
    ("three_masks", lambda i, m, p: (i == m, (i != m) | (i != p), i == p), "neither image nor padding"),
    ("three_masks", lambda i, m, p: [i == m, (i != m) & (i != p), i == p][:2], "return three masks"),
    ("three_masks", lambda i, m, p: ("image", "text", "padding"), "should be a tensor"),
    ("merge_with_where", merge_counted(lambda m: (m.cumsum(1) - 1).clamp(0)), "whole batch"),
    ("merge_with_where", merge_counted(counted), "subtract 1"),
    ("merge_with_where", merge_counted(lambda m: counted(m).clamp(max=5)), "feature number 1"),
    ("merge_with_where", merge_counted(lambda m: counted(m) - 2), "subtract 1 once"),
    ("merge_with_where", merge_counted(lambda m: 6 - counted(m)), "in reading order"),
    ("merge_with_where", not_flattened, "flatten the features"),
    ("merge_with_where", swapped, "swapped"),
    ("merge_with_where", mask_without_axis, r"a mask \[B, S, 1\]"),
    ("merge_with_where", lambda m, w, f: torch.where(m[..., None], f, w), "number the placeholders first"),
    ("merge_with_where", lambda m, w, f: w.masked_scatter(m[..., None], f), "do without it"),
    ("merge_with_where", lambda m, w, f: w.masked_scatter_(m[..., None], f), "do without it"),
    ("merge_with_where", by_boolean_index, "not by torch.where"),
    ("merge_with_where", lambda m, w, f: f.flatten(0, 1)[(counted(m) - 1).clamp(0)], "the words are gone"),
    ("merge_with_where", lambda m, w, f: w, "the words alone"),
    ("merge_with_where", merge_counted(lambda m: counted(m).float()), "whole numbers of shape"),
    ("positions_and_keys", predict(at_0=64), "also has <bos>"),
    ("positions_and_keys", predict(at_0=0), "must be of one length"),
    ("positions_and_keys", predict(at_1=0), "the picture stands before it"),
    ("positions_and_keys", predict(at_1=65), "counted from 0"),
    ("positions_and_keys", predict(at_2=60), "60 is its column"),
    ("positions_and_keys", predict(at_3=1), "causal mask"),
    ("positions_and_keys", predict(at_3=64), "sees the words of the prompt"),
    ("positions_and_keys", predict(at_4=68), "padding is hidden"),
    ("positions_and_keys", predict(at_5=68), "68 is its column"),
    ("positions_and_keys", predict(at_6=8), "and itself"),
    ("positions_and_keys", predict(at_3=17), "a token of the prefix sees the whole prefix"),
    ("positions_and_keys", predict(at_0=64, at_6=69), "5 of 7 predictions are right"),
    ("positions_and_keys", lambda: [60, 64, 0, 68, 8, 8, 9], "return the dict"),
    ("positions_and_keys", lambda: {"pads before row B": 60}, "predict a whole number for: position of"),
    ("block_mask", block(torch.le, pads=False), "padded keys can be seen"),
    ("block_mask", block(torch.le, sums=False), "leaks the labels"),
    ("block_mask", block(torch.ge), "swapped"),
    ("block_mask", block(torch.lt), "<= instead of <"),
    ("block_mask", block(torch.eq), "<= instead of =="),
    ("block_mask", opened_again, "hide it last"),
    ("block_mask", causal, "this is the causal mask"),
    ("block_mask", lambda t, m: m[:, None, :].bool().expand(3, 8, 8), "hides only the padding"),
    ("block_mask", lambda t, m: ~block(torch.le)(t, m), "should be True: a query sees its own block"),
    ("block_mask", lambda t, m: block(torch.le)(t, m).int(), "dtype"),
    ("block_mask", lambda t, m: block(torch.le)(t, m)[0], "shape"),
    ("block_mask", lambda t, m: block(torch.le)(t, m)[:, None], "shape"),
    ("count_leaks", leaks(own=True), "last position"),
    ("count_leaks", leaks(prefix=True), "counted the prefix"),
    ("count_leaks", leaks(prefix=True, own=True), "counted all positions"),
    ("count_leaks", leaks(in_place=True), "clone before you write"),
    ("count_leaks", leaks(tolerance=0.0), "tolerance"),
    ("count_leaks", lambda f, i, t, other_id: torch.tensor(3), "whole number"),
    ("count_leaks", lambda f, i, t, other_id: True, "whole number"),
    ("count_leaks", lambda f, i, t, other_id: 3, "1 leak"),
    ("count_leaks", lambda f, i, t, other_id: 0, "no leak where every token sees"),
    ("count_leaks", same_sequence, "no leak where every token sees"),
    ("count_leaks", lambda *given, **other: 5 * leaks()(*given, **other), "counted numbers, not positions"),
    ("count_leaks", lambda *given, **other: 3 - 2 * (leaks()(*given, **other) == 1), "that change"),
    ("find_fault", lambda *_: "decode", "decode'.*differs for this reason only"),
    ("find_fault", lambda *_: "encode_image", "give the same input"),
    ("find_fault", lambda *_: "nothing", "on the same inputs, and compare"),
    ("find_fault", lambda *_: "the tower", "return one of encode_image"),
    ("find_fault", lambda *_: False, "return one of encode_image"),
    ("find_fault", find(("> 1e-3 * b.abs().max()", "> 0")), "with a tolerance"),
    ("find_fault", find(('return "prefill"', 'return "logits"')), "the broken one and differs"),
    ("find_fault", find((GIVEN, GIVEN.replace('"merge"', '"prefill"'))), "says .prefill.*for this reason"),
    ("find_fault", find(("patient.merge(ids", "sound.merge(ids")), "that part uses the broken one"),
    ("find_fault", find(("patient.logits(hidden)", "sound.logits(hidden)")), "on the same inputs"),
    ("find_fault", find(("patient.decode(", "sound.decode(")), "on the same inputs"),
    (
        "find_fault",
        find(("patient.logits(hidden)", "patient.logits(theirs + 1)")),
        "which is sound|tolerance",
    ),
    ("find_fault", find(("going_on, their_cache)", "going_on, cache)")), "writes into its cache"),
    ("find_fault", one_row, "one hidden state for each row"),
    ("read_and_answer", program(("table[prompt_ids] * factor", "table[prompt_ids]")), "words are not multi"),
    (
        "read_and_answer",
        program((FIRST, "torch.cat([image_features, table[prompt_ids]]) * factor")),
        "image features are multiplied",
    ),
    ("read_and_answer", program((FIRST, "torch.cat([table[prompt_ids] * factor, image_features])")), "first"),
    ("read_and_answer", program(("(1 + weights[", "(weights[")), r"the factor is 1 \+ w"),
    ("read_and_answer", program((ROTATION, "a * cos + b * sin, b * cos - a * sin")), "the other way"),
    (
        "read_and_answer",
        program(("x.chunk(2, dim=-1)", "(x[..., ::2], x[..., 1::2])")),
        "pairs neighbors",
    ),
    ("read_and_answer", program((ROTATED, "[k, v]"), ("(rotate(q, start) @", "(q @")), "are not rotated"),
    ("read_and_answer", program((ROTATED, "[rotate(k, start), rotate(v, start)]")), "values are rotated"),
    ("read_and_answer", program((" * Dh**-0.5", "")), r"not multiplied by Dh"),
    ("read_and_answer", program((" * Dh**-0.5", " / factor")), "that of a head"),
    ("read_and_answer", program((TANH, ")")), "the exact form"),
    ("read_and_answer", program(("F.gelu(", "F.silu("), (TANH, ")")), "SiLU"),
    (
        "read_and_answer",
        program((".mlp.gate", ".mlp.GATE"), (".mlp.up", ".mlp.gate"), (".mlp.GATE", ".mlp.up")),
        "swapped",
    ),
    ("read_and_answer", program(('norm(x[-1], "norm")', "x[-1]")), "after the last block"),
    (
        "read_and_answer",
        program(('norm(x[-1], "norm")', 'norm(x[len(image_features) - 1 if start == 0 else -1], "norm")')),
        "no mistake that this check knows",
    ),
    (
        "read_and_answer",
        program(('norm(x[-1], "norm")', 'norm(x[0], "norm")')),
        "those of the first position",
    ),
    ("read_and_answer", program(("x = x + linear(seen", "x = linear(seen")), "a residual path"),
    (
        "read_and_answer",
        program((".transpose(0, 1) for n in", ".reshape(-1, len(y), Dh) for n in")),
        "H runs of Dh",
    ),
    (
        "read_and_answer",
        program(("x = x * torch.rsqrt", "x = x - x.mean(dim=-1, keepdim=True)\n        x = x * torch.rsqrt")),
        "subtracts the mean",
    ),
    (
        "read_and_answer",
        program((SCORES, f"causal({SCORES}, start)"), ("    def read(", CAUSAL + "    def read(")),
        "causal mask",
    ),
    ("read_and_answer", program((TANH, ")"), ("(1 + weights[", "(weights[")), "1 \\+ w; and your GELU"),
    (
        "read_and_answer",
        program((FIRST, "torch.cat([image_features, table[prompt_ids]]) * factor"), (TANH, ")")),
        "; and your GELU",
    ),
    (
        "read_and_answer",
        program((LATER, LATER.replace(" * factor", ""))),
        "words of the answer are not multiplied",
    ),
    ("read_and_answer", program(("start = cache[0].shape[2]", "start = 0")), "begin at 0 again"),
    (
        "read_and_answer",
        program(
            (
                "start = cache[0].shape[2]",
                "start = min(cache[0].shape[2], len(image_features) + len(prompt_ids))",
            )
        ),
        "the same position",
    ),
    (
        "read_and_answer",
        program(("start = cache[0].shape[2]", "start = cache[0].shape[2] + (cache[0].shape[2] > 0)")),
        "leaves a position out",
    ),
    ("read_and_answer", program((CACHED, FORGOTTEN)), "does not grow"),
    ("read_and_answer", program((CACHED, "keys, values = new")), "the cache is never written"),
    (
        "read_and_answer",
        program(("seen = (", "keys = keys.view(4, -1, Dh)\n            seen = (")),
        "one head, repeated or broadcast",
    ),
    ("read_and_answer", program(('_proj.weight"].T', '_proj"].T')), "end in .weight"),
    (
        "read_and_answer",
        program(
            (
                "    return torch.stack(logits).argmax(dim=-1).tolist(), torch.stack(logits)",
                "    return torch.stack(logits).argmax(dim=-1), torch.stack(logits)",
            )
        ),
        "list of whole numbers",
    ),
    ("read_and_answer", program((".tolist(), torch", ".tolist()[:-1], torch")), "<eos> belongs"),
    (
        "read_and_answer",
        program((".tolist(), torch.stack(logits)", ".tolist(), logits[0]")),
        "one row for each",
    ),
    ("read_and_answer", program((".tolist(), torch.stack(logits)", ".tolist()")), "return two things"),
    ("read_and_answer", program(("logits[-1].argmax() != 1 and ", "")), "goes on behind"),
    ("read_and_answer", program((" and len(logits) < max_new_tokens", "")), "end the loop there"),
    ("read_and_answer", program(("len(logits) < max_new_tokens", "len(logits) < 4")), "ends before <eos>"),
    (
        "read_and_answer",
        program((".argmax(dim=-1).tolist()", ".topk(2).indices[:, 1].tolist()")),
        "greedy means argmax",
    ),
    ("read_and_answer", from_the_package, "use only torch"),
    ("read_and_answer", program((LATER, AGAIN)), "times the work of one"),
]


@pytest.mark.parametrize("name", EXERCISES)
def test_says_that_an_exercise_is_blank(name: str) -> None:
    with pytest.raises(NotYet, match=r"still blank: replace the line that raises with your own$"):
        getattr(checks.merging, name)(blank)


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_names_the_likely_mistake(name: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=f"(?s){hint}"):
        getattr(checks.merging, name)(answer)


def test_ten_wrong_answers_for_each() -> None:
    assert min(Counter(name for name, _, _ in WRONG)[name] for name in EXERCISES) >= 10


def test_other_ways_to_be_right() -> None:
    checks.merging.block_mask(
        lambda types, mask: (
            block(torch.le)(types, mask) & mask[:, :, None].bool()
        )  # big_vision hides these rows
    )
    checks.merging.merge_with_where(
        lambda m, w, f: w.where(~m[..., None], f.flatten(0, 1)[(counted(m) - m.long()).clamp(max=5)])
    )
    # Only differences of positions count, and a head may be repeated.
    checks.merging.read_and_answer(
        program(
            ("torch.arange(start, start + x.shape[1])", "torch.arange(start + 7, start + 7 + x.shape[1])")
        )
    )
    checks.merging.read_and_answer(
        program(
            (
                "seen = (",
                "keys, values = (part.repeat(4, 1, 1) for part in (keys, values))\n            seen = (",
            )
        )
    )


def test_the_patients_are_broken_where_they_should_be() -> None:
    model, processor, asked = checks.merging._shipped()
    inputs = processor([picture for picture, _ in asked], [prompt for _, prompt in asked])
    with torch.no_grad():
        for part in checks.merging.PARTS:
            patient = checks.merging.patient(model, part)
            assert checks.merging.solutions.find_fault(model, patient, inputs) == part
    assert model.prefill.__self__ is model, "the sound model is left as it was"


def test_the_program_without_a_fault_is_the_model_and_each_fault_shows() -> None:
    model, processor, asked = checks.merging._shipped()
    with torch.no_grad():
        inputs = processor([asked[0][0]], [asked[0][1]])
        features = model.encode_image(inputs["pixel_values"])[0]
        given = (SHIPPED, features, inputs["input_ids"][0, len(features) :])
        tokens, logits = checks.merging.solutions.read_and_answer(*given)
        sound = _capstone.program(*given, tokens)
        assert _capstone.matches(sound, logits)
        everything = [*_capstone.FAULTS, *_capstone.LATE_FAULTS]
        broken = {fault: _capstone.program(*given, tokens[:3], frozenset({fault})) for fault in everything}
    for fault in everything:
        assert not _capstone.matches(broken[fault], sound[:3]), fault
        assert not any(
            _capstone.matches(broken[fault], broken[other]) for other in everything if other != fault
        )


def test_every_exercise_is_in_the_notebook() -> None:
    exercises = [cell for cell in read_cells(NOTEBOOK) if "exercise" in cell.tags]
    assert len(exercises) == len(EXERCISES)
