"""The checks of 14_llava accept right answers and name the likely mistake in wrong ones."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minivlm.checks import NotYet, llava

good = llava.solutions


def blank(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("your turn")


def changed(name: str, *replacements: tuple[str, str]) -> Callable[..., Any]:
    """A solution with some of its code replaced, as somebody could have written it."""
    source = textwrap.dedent(inspect.getsource(getattr(good, name))).removeprefix("@staticmethod\n")
    for old, new in replacements:
        assert old in source, old
        source = source.replace(old, new)
    scope = dict(vars(llava))
    exec(source, scope)
    result: Callable[..., Any] = scope[name]
    return result


def taken(old: str, new: str) -> Callable[..., Tensor]:
    return changed("image_features", (old, new))


def row(*replacements: tuple[str, str]) -> Callable[..., Any]:
    return changed("chat_row", *replacements)


def labelled(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """The right row with other labels."""

    def answer(*args: Any) -> tuple[Tensor, Tensor]:
        vectors, labels = good.chat_row(*args)
        return vectors, change(labels)

    return answer


def moved(vectors_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """The right labels with other vectors, made from the right ones and the features."""

    def answer(turns: Any, features: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        vectors, labels = good.chat_row(turns, features, *args)
        return vectors_of(vectors, features), labels

    return answer


def diagnosed(**instead: str) -> Callable[..., str]:
    """The right diagnosis with some answers replaced; names with _ for a space."""

    def answer(*args: Any) -> str:
        found = good.diagnose(*args)
        return instead.get(found.replace(" ", "_"), found)

    return answer


def predicted(**other: int) -> Callable[[], dict[str, int]]:
    """The right predictions with some changed: `at_3=5` makes the fourth one 5."""

    def answer() -> dict[str, int]:
        result = good.tokens_of_tiles()
        for place, number in other.items():
            result[list(result)[int(place.removeprefix("at_"))]] = number
        return result

    return answer


FORM = '[tokenizer.bos_id, *tokenizer.encode("USER: ")]'
PICTURE = "vectors.append(features)"
ANSWER = '[*tokenizer.encode_after(":", f" {answer}"), tokenizer.eos_id]'

WRONG: dict[str, list[tuple[str, Callable[..., Any]]]] = {
    "image_features": [
        ("last layer, number -1", taken("states[layer]", "states[-1]")),
        ("layer -3", taken("states[layer]", "states[layer - 1]")),
        ("class token is still there", taken("[:, 1:]", "")),
        ("last patch is missing", taken("[:, 1:]", "[:, :-1]")),
        ("class token alone: LLaVA", taken("[:, 1:]", "[:, 0]")),
        ("as a row of one", taken("[:, 1:]", "[:, :1]")),
        ("last norm was applied", taken("states[layer]", "tower.post_layernorm(states[layer])")),
        ("first picture only", taken("[:, 1:]", "[0, 1:]")),
        ("first picture is left out", taken("[:, 1:]", "[1:]")),
        ("mean over the patches", taken("[:, 1:]", "[:, 1:].mean(dim=1)")),
        ("projector is missing", taken("projector(states[layer][:, 1:])", "states[layer][:, 1:]")),
        ("first layer of the projector", taken("projector(", "projector.linear_1(")),
        ("with layer=-1 your function", taken("states[layer]", "states[-2]")),
        (
            "with layer=2 your function",
            taken("states[layer]", "(states[1:] if layer > 0 else states)[layer]"),
        ),
        ("your code stops", taken("states[layer]", "states[-layer * 9]")),
        ("still blank", blank),
    ],
    "chat_row": [
        ("picture stands first", moved(lambda v, f: torch.cat([v[:1], f, v[1:7], v[10:]]))),
        ("no image feature", moved(lambda v, f: torch.cat([v[:7], v[:3], v[10:]]))),
        (
            "more than once",
            row(
                (
                    "        else:\n",
                    "        else:\n" + 12 * " " + PICTURE + "; labels.extend([-100] * len(features))\n",
                )
            ),
        ),
        ("not in their order", row((PICTURE, "vectors.append(features.flip(0))"))),
        ("begin with <s>", row((FORM, 'tokenizer.encode("USER: ")'))),
        (
            "<s> stands once",
            row(
                (
                    'add(tokenizer.encode_later(f"USER:',
                    'add([tokenizer.bos_id]); add(tokenizer.encode_later(f"USER:',
                )
            ),
        ),
        ("stands 0 times", row((ANSWER, ANSWER.replace(", tokenizer.eos_id", "")))),
        ("comes a newline", row(('f"\\n{question}', 'f"{question}'))),
        ("then yours goes on", row(("ASSISTANT:", "ASSISTANT: "))),
        ("then yours goes on", row(('f"USER: {question}', 'f"Human: {question}'))),
        ("nothing is scaled", moved(lambda v, f: v * 8**0.5)),
        ("take them as they are", moved(lambda v, f: v + v.mean())),
        ("return two tensors", lambda *args: good.chat_row(*args)[0]),
        ("without an axis for the batch", lambda *args: tuple(t[None] for t in good.chat_row(*args))),
        ("vectors and .* labels", row(("labels.extend([-100] * len(features))", "pass"))),
        (
            "every token has a loss",
            row(
                ("ids if is_answer else [-100] * len(ids)", "ids"),
                ("[-100] * len(features)", "[tokenizer.image_id] * len(features)"),
            ),
        ),
        ("every token but the image", row(("ids if is_answer else [-100] * len(ids)", "ids"))),
        ("shifted already", labelled(lambda x: torch.cat([x[1:], x.new_tensor([-100])]))),
        ("shifted to the right", labelled(lambda x: torch.cat([x.new_tensor([-100]), x[:-1]]))),
        ("</s> has no loss", labelled(lambda x: x.masked_fill(x == 1, -100))),
        ("only the last answer", row(("is_answer=True", "is_answer=number == len(turns) - 1"))),
        ("only the first answer", row(("is_answer=True", "is_answer=number == 0"))),
        (
            "the other way around",
            row(
                ("ids if is_answer else [-100] * len(ids)", "[-100] * len(ids) if is_answer else ids"),
                ("[-100] * len(features)", "[tokenizer.image_id] * len(features)"),
            ),
        ),
        ("0 is a token", labelled(lambda x: x.clamp(min=0))),
        ("labels are marks", labelled(lambda x: (x >= 0).long())),
        ("whole numbers", labelled(lambda x: x.float())),
        ("Llama's puts a space", row(("encode_later", "encode"))),
        ("Llama's puts a space", row(('encode("USER: ")', 'encode_later("USER: ")'))),
        ("Llama's puts a space", row(('encode_after(":", f" {answer}")', 'encode(f" {answer}")'))),
        ("Llama's puts a space", row(('encode_after(":", f" {answer}")', 'encode_later(f" {answer}")'))),
        ("has the label", labelled(lambda x: torch.where(torch.arange(len(x)) == 3, 5, x))),
    ],
    "diagnose": [
        ("for all five", lambda *args: "no shift"),
        ("for all five .* before </s>", lambda *args: "end left out"),
        ("one of the five names", lambda *args: "off by one"),
        ("With 'two shifts', the first row", diagnosed(no_shift="two shifts")),
        ("With 'no shift', .* has read already", diagnosed(two_shifts="no shift")),
        ("With 'no shift'", diagnosed(end_left_out="no shift")),
        ("With 'question too', rows far", diagnosed(padding_too="question too")),
        ("With 'question too'", diagnosed(two_shifts="question too")),
        ("With 'padding too', rows behind", diagnosed(question_too="padding too")),
        ("With 'padding too'", diagnosed(end_left_out="padding too")),
        ("With 'end left out', the row before", diagnosed(padding_too="end left out")),
        ("With 'end left out'", diagnosed(question_too="end left out", two_shifts="end left out")),
        ("still blank", blank),
    ],
    "tokens_of_tiles": [
        ("672 x 672: you say 2352. The base view is missing", predicted(at_0=2352)),
        ("672 x 672: you say 2880. Every row ends", predicted(at_0=2880)),
        ("672 x 672: you say 2304. The base view is missing, and each row", predicted(at_0=2304)),
        ("672 x 672: you say 2976. A row of the whole picture", predicted(at_0=2976)),
        ("1008 x 336: you say 2352. The base view has no newlines", predicted(at_1=2352)),
        ("1008 x 336: you say 2304. Every row ends", predicted(at_1=2304)),
        ("336 x 1008: you say 2328. The newline stands at the end of each row", predicted(at_2=2328)),
        ("640 x 480: you say 2928. The tokens that show only padding", predicted(at_3=2928)),
        ("640 x 480: you say 2880. The tokens that show only padding are cut off, and", predicted(at_3=2880)),
        ("640 x 480: you say 2304. Every row ends", predicted(at_3=2304)),
        ("100 x 100: you say 576. That is the base view", predicted(at_4=576)),
        ("100 x 100: you say 1752. The tokens that show", predicted(at_4=1752)),
        ("100 x 100: you say 77, on a grid of 1 x 2", predicted(at_4=77)),
        (
            "no prediction yet for: 1008 x 336",
            lambda: {"672 x 672": 2928, "336 x 1008": 2376, "640 x 480": 2340, "100 x 100": 1176},
        ),
        ("return the dict", lambda: [2928]),
    ],
}


@pytest.mark.parametrize(
    ("name", "hint", "answer"),
    [(name, hint, answer) for name, wrong in WRONG.items() for hint, answer in wrong],
)
def test_names_the_mistake(name: str, hint: str, answer: Callable[..., Any]) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(llava, name)(answer)


@pytest.mark.parametrize("name", WRONG)
def test_accepts_the_solution(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(llava, name)(getattr(good, name))
    assert capsys.readouterr().out.startswith("Right: ")


def test_every_exercise_meets_ten_wrong_answers() -> None:
    assert all(len(wrong) >= 10 for wrong in WRONG.values())


def by_islice(tower: Any, projector: Any, pixel_values: Tensor, layer: int = -2) -> Tensor:
    x = tower.pre_layrnorm(tower.embeddings(pixel_values))
    for block in tower.layers[: range(len(tower.layers) + 1)[layer]]:
        x = block(x)
    features: Tensor = projector(x)
    return features[:, 1:]


def by_rows(loss: Any, input_ids: Tensor, is_answer: Tensor, attention_mask: Tensor) -> str:
    """From the loss alone: raise the score of one token at one place, and see whether anything moves."""
    size = int(input_ids.max()) + 1

    def asks(place: int, token: int) -> bool:
        logits = torch.zeros(1, input_ids.shape[1], size)
        before = loss(logits, input_ids, is_answer, attention_mask)
        logits[0, place, token] = 1.0
        return bool(loss(logits, input_ids, is_answer, attention_mask) < before - 1e-6)

    ids = input_ids[0].tolist()
    first, last = (int(is_answer[0].nonzero()[n]) for n in (0, -1))
    if asks(first, ids[first]):
        return "no shift"
    if asks(first - 1, ids[first + 1]):
        return "two shifts"
    if asks(0, ids[1]):
        return "question too"
    return "padding too" if asks(last, ids[last + 1]) else "end left out"


@pytest.mark.parametrize(("name", "answer"), [("image_features", by_islice), ("diagnose", by_rows)])
def test_other_right_answers_pass(name: str, answer: Callable[..., Any]) -> None:
    getattr(llava, name)(answer)


def test_the_patients_have_the_five_faults() -> None:
    ids, is_answer = torch.tensor([[1, 5, 6, 7, 2, 0]]), torch.tensor([[False] * 3 + [True] * 2 + [False]])
    found = [good.diagnose(loss, ids, is_answer, (ids != 0).long()) for loss in llava.patients().values()]
    assert sorted(found) == sorted(llava.FAULTS)
