"""The checks of 13_four_ways accept the solutions and say what is wrong with likely mistakes."""

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
from minivlm.checks import NotYet
from minivlm.models.miniatures.flamingo import GatedCrossAttentionBlock
from minivlm.training.ways import WAYS, build

NOTEBOOK = ROOT / "notebooks" / "13_four_ways.ipynb"
EXERCISES = ("predict", "put_back", "gated_block", "find_fault", "magic_step")


def blank(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("your turn")


def changed(name: str, *replacements: tuple[str, str]) -> Callable[..., Any]:
    """A solution with some of its code replaced, as somebody could have written it."""
    source = textwrap.dedent(inspect.getsource(getattr(checks.ways.solutions, name)))
    source = source.removeprefix("@staticmethod\n")
    for old, new in replacements:
        assert old in source, old
        source = source.replace(old, new)
    scope = dict(vars(checks.ways))
    exec(source, scope)
    return scope[name]


def predicted(name: str, value: Any) -> Callable[[], dict[str, Any]]:
    return lambda: checks.ways.solutions.predict() | {name: value}


def moved(*replacements: tuple[str, str]) -> Callable[..., Any]:
    return changed("put_back", *replacements)


def block(*replacements: tuple[str, str]) -> Callable[..., Any]:
    return changed("gated_block", *replacements)


def fault(*replacements: tuple[str, str]) -> Callable[..., Any]:
    return changed("find_fault", *replacements)


def step(*replacements: tuple[str, str]) -> Callable[..., Any]:
    return changed("magic_step", *replacements)


def in_place(x: Tensor, *given: Any) -> Tensor:
    x += 1
    return x


CM3, CLIPCAP, FLAMINGO = (f"places of a picture in {name}'s row" for name in ("cm3", "clipcap", "flamingo"))
FROZEN, AGAIN = "text loss cannot change", "reads everything again for each word"
MASKED = "scores.masked_fill(~mask[:, None], -torch.inf).softmax(dim=-1).nan_to_num(0.0)"
LOWEST = "scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min).softmax(dim=-1)"
SPLIT = "z.unflatten(-1, (heads, -1)).transpose(1, 2)"
MERGED = "(shares @ v).transpose(1, 2).flatten(2)"
FIRST = 'x = x + weights["attn_gate"].tanh() * seen'
BATCH = "[[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]]"
GELU = 'F.gelu(y @ weights["ff.1.weight"].T'
COSINES = "F.cosine_similarity(states[ids][:, None], context[None], dim=-1)"

WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("predict", predicted(CM3, 8), "as many lines"),
    ("predict", predicted(CM3, 65), "no class token"),
    ("predict", predicted(CM3, 1), "every patch stands among the words"),
    ("predict", predicted(CM3, 32), "64 pixels make 8 patches"),
    ("predict", predicted(CLIPCAP, 64), "reads their mean"),
    ("predict", predicted(CLIPCAP, 1), "k come out"),
    ("predict", predicted(FLAMINGO, 16), "in the row stands one"),
    ("predict", predicted(FLAMINGO, 0), "one token has to say"),
    ("predict", predicted(FROZEN, {"clipcap"}), "whose language model is frozen"),
    ("predict", predicted(FROZEN, {"clipcap", "clipcap-mlp", "flamingo"}), "clipcap-mlp is said to keep"),
    ("predict", predicted(FROZEN, ["clipcap", "flamingo", "cm3"]), "cm3 is said to keep"),
    ("predict", predicted(FROZEN, "clipcap"), "a set of names"),
    ("predict", predicted(AGAIN, "simvlm"), "the prefix does not grow"),
    ("predict", predicted(AGAIN, "cm3"), "a cache keeps it"),
    ("predict", predicted(AGAIN, "MAGiC"), "the names are"),
    ("predict", predicted("most questions right", ""), "is empty"),
    ("predict", predicted("smallest box IoU", "clip"), "the names are"),
    ("predict", lambda: {CM3: 64}, "is empty"),
    ("predict", lambda: [64, 10, 1], "return the dictionary"),
    ("put_back", lambda ids, s, e: ids, "Nothing has moved"),
    ("put_back", moved(("del ids[start : stop + 1]", "del ids[start:stop]")), "The end of a span is left"),
    ("put_back", moved(("del ids[start : stop + 1]", "pass")), "A sentinel is left"),
    (
        "put_back",
        moved(("ids[blank : blank + 1] = span", "ids[blank : blank + 1] = span[::-1]")),
        "keeps its order",
    ),
    ("put_back", moved(("ids[blank : blank + 1] = span", "ids[blank:blank] = span")), "A sentinel is left"),
    ("put_back", moved(("        if ids.count(sentinel) < 2:\n            break\n", "")), "fewer spans"),
    (
        "put_back",
        moved(("for sentinel in sentinels:", "for sentinel in sentinels[:1]:")),
        "A sentinel is left",
    ),
    ("put_back", moved((" if end in ids[start:] else len(ids)", "")), "cut to the context"),
    ("put_back", moved(("ids = list(ids)\n", "pass\n")), "changes the list"),
    ("put_back", moved(("return ids", "return torch.tensor(ids)")), "return a list of ids"),
    ("put_back", moved(("return ids", "return tuple(ids)")), "return a list of ids"),
    ("put_back", moved(("ids[start + 1 : stop]", "ids[start + 1 : stop - 1]")), "are lost"),
    ("put_back", moved(("ids[start + 1 : stop]", "ids[start:stop]")), "A sentinel is left"),
    ("put_back", lambda ids, s, e: sorted(i for i in ids if i < 99)[::-1], "in another order"),
    ("put_back", lambda ids, s, e: [i for i in ids if i < 99], "in another order"),
    ("gated_block", block(('weights["attn_gate"].tanh()', 'weights["attn_gate"]')), "the attention is not"),
    ("gated_block", block((".tanh()", "")), "go through tanh first"),
    ("gated_block", block((".tanh()", ".sigmoid()")), "one half at zero"),
    ("gated_block", block(('weights["ff_gate"]', 'weights["attn_gate"]')), "a gate of its own"),
    ("gated_block", block((MASKED, LOWEST)), "mean of everything"),
    ("gated_block", block((".nan_to_num(0.0)", "")), "become NaN"),
    ("gated_block", block(("-torch.inf", "0.0")), "ordinary score"),
    ("gated_block", block(("~mask[:, None]", "mask[:, None]"), (".nan_to_num(0.0)", "")), "wrong way around"),
    ("gated_block", block(("scores.masked_fill(~mask[:, None], -torch.inf)", "scores")), "all latents"),
    ("gated_block", block((" * q.shape[-1] ** -0.5", "")), "not scaled"),
    ("gated_block", block(("q.shape[-1] ** -0.5", "x.shape[-1] ** -0.5")), "width of a head"),
    ("gated_block", block((SPLIT, "z.unflatten(-1, (-1, heads)).movedim(-1, 1)")), "cut the wrong way"),
    ("gated_block", block((SPLIT, "z.reshape(len(z), heads, z.shape[1], -1)")), "mixed up"),
    ("gated_block", block((MERGED, "(shares @ v).reshape(*x.shape[:2], -1)")), "exchange the axes back"),
    ("gated_block", block(("k, v = (media", "v, k = (media")), "keys and values are swapped"),
    ("gated_block", block((FIRST, FIRST.replace("x + ", ""))), "the words are gone"),
    (
        "gated_block",
        block(('return x + weights["ff_gate"]', 'return weights["ff_gate"]')),
        "second branch replaces",
    ),
    ("gated_block", block(("F.gelu(y", "F.relu(y")), "is ReLU"),
    ("gated_block", block((f"{GELU})", f"{GELU}, approximate='tanh')")), "tanh form"),
    ("gated_block", block(("softmax(dim=-1)", "softmax(dim=-2)")), "runs over the words"),
    (
        "gated_block",
        block(('weights["attn.to_q.weight"].T', 'weights["attn.to_q.weight"]')),
        "stored as|multiply by its transpose",
    ),
    ("gated_block", block(('"attn.norm.weight"', '"norm.weight"')), "The names are"),
    ("gated_block", lambda x, *given: x[0], "expected"),
    ("gated_block", in_place, "changes x itself"),
    ("gated_block", lambda x, *given: x + 1, "give x back"),
    ("find_fault", lambda mask_of: "nothing", "with the fault 'later' you say 'nothing'"),
    ("find_fault", lambda mask_of: "later", "of a sound mask you say"),
    ("find_fault", lambda mask_of: True, "it is one of"),
    ("find_fault", lambda mask_of: "leak", "it is one of"),
    ("find_fault", fault(('return "later"', 'return "all so far"')), "comes only later"),
    ("find_fault", fault(("second[0, 0] or second[0, 2]", "False")), "later"),
    ("find_fault", fault(("first[0, 4]", "False")), "after the second picture"),
    ("find_fault", fault(("not first[0, 1]", "False")), "does not see its own picture"),
    ("find_fault", fault(("if first[0, 0]", "if False")), "begin a row with a word"),
    ("find_fault", fault(("first[1].all()", "True")), "a batch of two rows"),
    ("find_fault", fault((BATCH, "[[0, 1, 0, 0, 1], [0, 1, 0, 0, 0]]")), "you say"),
    (
        "find_fault",
        fault(("mask_of(is_image, 1).unbind(dim=-1)", "mask_of(is_image[:1, :2], 1)")),
        "your code stops",
    ),
    ("magic_step", step(("logits.softmax(dim=-1).topk(k)", "logits.topk(k)")), "you took the logits"),
    ("magic_step", step(("scores = (1 - a) * p", "scores = (1 - a) * (p / p.sum())")), "among all words"),
    ("magic_step", step((".amax(dim=1)", ".mean(dim=1)")), "the mean of all"),
    ("magic_step", step((COSINES, "states[ids] @ context.T")), "dot product"),
    (
        "magic_step",
        step((COSINES, COSINES.replace("context[None]", "context[None, -1:]"))),
        "the last token only",
    ),
    ("magic_step", step(("- a * cosines", "+ a * cosines")), "subtracted"),
    ("magic_step", step(("(1 - a) * p", "p")), "counts 1 - a"),
    ("magic_step", step(("fits[ids].softmax(dim=-1)", "fits[ids]")), "fits as they are"),
    ("magic_step", step(("fits[ids].softmax(dim=-1)", "fits.softmax(dim=-1)[ids]")), "k candidates alone"),
    ("magic_step", step((" + b * fits[ids].softmax(dim=-1)", "")), "does not count"),
    ("magic_step", step(("b * fits", "fits")), "f counts b"),
    ("magic_step", step(("int(ids[scores.argmax()])", "int(scores.argmax())")), "return its id"),
    ("magic_step", step(("ids[scores.argmax()]", "ids[0]")), "the word with the largest is"),
    (
        "magic_step",
        step(("return int(ids[scores.argmax()]), scores", "return int(ids[scores.argmax()])")),
        "return two things",
    ),
    ("magic_step", step((", scores\n", ", scores.sort(descending=True).values\n")), "in another order"),
    ("magic_step", step(("(1 - a) * p", "(1 - a) * p.log()")), "does not know"),
    ("magic_step", step((".amax(dim=1)", "")), r"a tensor \[k\]|your code stops"),
]


@pytest.mark.parametrize("name", EXERCISES)
def test_accepts_the_solution(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(checks.ways, name)(getattr(checks.ways.solutions, name))
    assert capsys.readouterr().out.startswith("Right: ")


@pytest.mark.parametrize("name", EXERCISES)
def test_says_that_an_exercise_is_blank(name: str) -> None:
    with pytest.raises(NotYet, match=r"still blank: replace the line that raises with your own$"):
        getattr(checks.ways, name)(blank)


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_names_the_likely_mistake(name: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=f"(?s){hint}"):
        getattr(checks.ways, name)(answer)


def test_ten_wrong_answers_for_each() -> None:
    assert min(Counter(name for name, _, _ in WRONG)[name] for name in EXERCISES) >= 10


def test_other_ways_to_be_right() -> None:
    checks.ways.predict(predicted(FROZEN, ["flamingo", "clipcap"]))
    checks.ways.predict(predicted("most questions right", "simvlm"))  # a guess is a guess
    checks.ways.gated_block(block((MASKED, f"{LOWEST} * mask.any(dim=-1)[:, None, :, None]")))

    def package(x: Tensor, media: Tensor, mask: Tensor, weights: dict[str, Tensor], heads: int) -> Tensor:
        made = GatedCrossAttentionBlock(
            x.shape[-1], media.shape[-1], heads, len(weights["attn.to_q.weight"]) // heads
        )
        made.load_state_dict(weights)
        with torch.no_grad():
            return made(x, media, mask)

    checks.ways.gated_block(package)
    checks.ways.put_back(
        moved(
            (
                "        if ids.count(sentinel) < 2:\n            break\n",
                "        if ids.count(sentinel) != 2:\n            continue\n",
            )
        )
    )

    def with_tensor(*given: Any) -> tuple[Tensor, Tensor]:
        word, scores = checks.ways.solutions.magic_step(*given)
        return torch.tensor(word), scores

    checks.ways.magic_step(with_tensor)


def test_each_fault_of_a_block_shows_and_is_told_from_the_others() -> None:
    case = checks.ways.block_case()
    sound = checks.ways.faulty_block(*case)
    assert torch.allclose(sound, checks.ways.solutions.gated_block(*case), atol=1e-6)
    broken = {name: checks.ways.faulty_block(*case, name) for name in checks.ways.BLOCK_FAULTS}
    for name, result in broken.items():
        assert not checks.same(result, sound), name
        assert not any(checks.same(result, other) for n, other in broken.items() if n != name), name
        with pytest.raises(NotYet) as told:
            checks.ways.gated_block(lambda *given, name=name: checks.ways.faulty_block(*given, name))
        assert str(told.value) == checks.ways.BLOCK_FAULTS[name]


def test_each_fault_of_a_score_is_told() -> None:
    for name, hint in checks.ways.SCORE_FAULTS.items():
        with pytest.raises(NotYet) as told:
            checks.ways.magic_step(
                lambda *given, name=name: (
                    int((result := checks.ways.faulty_scores(*given, name))[0][result[1].argmax()]),
                    result[1],
                )
            )
        assert str(told.value) == hint


def test_each_mask_has_its_fault_and_the_package_has_none() -> None:
    for name, mask_of in checks.ways.MASKS.items():
        assert checks.ways.solutions.find_fault(mask_of) == name
    assert checks.ways.solutions.find_fault(checks.ways.mystery_mask()) != "nothing"


def test_what_can_be_worked_out_is_so() -> None:
    """The systems that are trained take as many places, and the frozen ones are those that are named."""
    told = checks.ways.solutions.predict()
    for name in ("cm3", "clipcap", "flamingo"):
        assert build(name, 0)[0].config.num_image_tokens == told[f"places of a picture in {name}'s row"]
    frozen = {
        name for name, way in WAYS.items() if not any(p.startswith("language_model") for p in way.learns)
    }
    assert frozen == told[FROZEN]


def test_winners() -> None:
    def of(value: float) -> dict[str, float]:
        return {
            "all questions": value,
            "exact caption": 1 - value,
            "box mean IoU": value,
            "text loss before": 1.0,
            "text loss after": 2 - value,
        }

    table = {"cm3": [of(0.9), of(0.7)], "llava": [of(0.75), of(0.65)], "simvlm": [of(0.3), of(0.4)]}
    found = checks.ways.winners(table)
    assert list(found) == list(checks.ways.GUESSES)
    assert found["most questions right"] == ["cm3", "llava"]
    assert found["most captions right"] == found["smallest box IoU"] == ["simvlm"]
    assert found["text loss rises most"] == ["simvlm"]


def test_every_exercise_is_in_the_notebook() -> None:
    exercises = [cell for cell in read_cells(NOTEBOOK) if "exercise" in cell.tags]
    assert len(exercises) == len(EXERCISES)
