"""The checks of 07_training accept the solutions and say what is wrong with likely mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from notebooks_and_sources import ROOT, read_cells
from torch import Tensor, nn

from minivlm import checks
from minivlm.checks import NotYet

NOTEBOOK = ROOT / "notebooks" / "07_training.ipynb"
EXERCISES = (
    "predictions",
    "packed_mask",
    "packed_loss",
    "backward_in_parts",
    "rate_groups",
    "find_the_bug",
)


def blank(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("your turn")


def predicted(**changed: Any) -> Callable[[], dict[str, Any]]:
    """The right predictions, with some changed; underscores stand for spaces."""
    changed = {name.replace("__", ", ").replace("_", " "): value for name, value in changed.items()}
    return lambda: checks.training.solutions.predictions() | changed


def packed(combine: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A mask from its four ingredients: key is image, own block, key in the past, key is prompt."""

    def mask(blocks: Tensor, positions: Tensor, types: Tensor) -> Tensor:
        own = blocks[:, :, None] == blocks[:, None, :]
        past = positions[:, None, :] <= positions[:, :, None]
        return combine((blocks == 0)[:, None, :], own, past, (types == 0)[:, None, :])

    return mask


def all_see_padding(blocks: Tensor, positions: Tensor, types: Tensor) -> Tensor:
    right = packed(lambda image, own, past, prompt: image | (own & (past | prompt)))
    return right(blocks, positions, types) | (blocks < 0)[:, None, :]


def image_sees_questions(blocks: Tensor, positions: Tensor, types: Tensor) -> Tensor:
    right = packed(lambda image, own, past, prompt: image | (own & (past | prompt)))
    seen = (blocks == 0)[:, :, None] & (types == 0)[:, None, :] & (blocks >= 0)[:, None, :]
    return right(blocks, positions, types) | seen


def masked_by(types_of_prompt: int, compare: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Another type for the prompt, or another comparison of positions (key, query)."""

    def mask(blocks: Tensor, positions: Tensor, types: Tensor) -> Tensor:
        own = blocks[:, :, None] == blocks[:, None, :]
        past = compare(positions[:, None, :], positions[:, :, None])
        is_prompt = (types == types_of_prompt)[:, None, :]
        return (blocks == 0)[:, None, :] | (own & (past | is_prompt))

    return mask


def loss_with(fault: str) -> Callable[..., Tensor]:
    return lambda model, features, questions: torch.cat(
        checks.training._losses(model, features, questions, fault)
    ).mean()


def loss_from(combine: Callable[[list[Tensor]], Any]) -> Callable[..., Any]:
    """The right losses of each question's tokens, combined in another way."""
    return lambda model, features, questions: combine(checks.training._losses(model, features, questions))


def one_by_one(model: Any, features: Tensor, questions: Any) -> Tensor:
    losses = [checks.training._losses(model, features, [question])[0] for question in questions]
    return torch.cat(losses).mean()


def groups(
    tower: float | None,
    others: float,
    *,
    frozen: bool = False,
    projector: bool = True,
    of_tower: Callable[[str], bool] = lambda name: name.startswith("vision_tower."),
    first: int = 0,
) -> Callable[..., Any]:
    """Groups with these factors; None puts the tower with the others."""

    def make(model: nn.Module, rate: float, factor: float) -> list[dict[str, Any]]:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad or frozen]
        named = [(n, p) for n, p in named if projector or "projector" not in n]
        both = [
            {"params": [p for n, p in named if of_tower(n)], "lr": rate * (1 if tower is None else tower)},
            {"params": [p for n, p in named if not of_tower(n)], "lr": rate * others},
        ]
        return [both[first], both[1 - first]]

    return make


def one_group(model: nn.Module, rate: float, factor: float) -> list[dict[str, Any]]:
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}]


def one_group_each(model: nn.Module, rate: float, factor: float) -> list[dict[str, Any]]:
    return [
        {"params": [p], "lr": rate * (factor if n.startswith("vision_tower.") else 1.0)}
        for n, p in model.named_parameters()
        if p.requires_grad
    ]


def in_two_groups(model: nn.Module, rate: float, factor: float) -> list[dict[str, Any]]:
    learning = [p for p in model.parameters() if p.requires_grad]
    tower = [p for name, p in model.named_parameters() if name.startswith("vision_tower.")]
    return [{"params": tower, "lr": rate * factor}, {"params": learning, "lr": rate}]


def tower_at_the_factor(model: nn.Module, rate: float, factor: float) -> list[dict[str, Any]]:
    return groups(factor / rate, 1.0)(model, rate, factor)


def backward(
    share: Callable[[int, int, int], float],
    *,
    only_last: bool = False,
    returns: float | None = None,
    retain: bool = False,
) -> Callable[..., float]:
    """Parts scaled by share(tokens of the part, tokens of all, number of parts)."""

    def run(loss_of: Callable[..., Tensor], parts: list[dict[str, Tensor]]) -> float:
        tokens = [int((part["labels"] != -100).sum()) for part in parts]
        total, kept = 0.0, []
        for number, (part, count) in enumerate(zip(parts, tokens, strict=True)):
            loss = loss_of(part) * share(count, sum(tokens), len(parts))
            if not only_last or number == len(parts) - 1:
                loss.backward(retain_graph=retain)
            if retain:
                kept.append(loss)
            total += loss.item()
            del loss
        return total if returns is None else returns

    return run


def backward_by(count: Callable[[Tensor], int]) -> Callable[..., float]:
    """Shares by another count of the labels."""

    def run(loss_of: Callable[..., Tensor], parts: list[dict[str, Tensor]]) -> float:
        counts = [count(part["labels"]) for part in parts]
        for part, number in zip(parts, counts, strict=True):
            (loss_of(part) * (number / sum(counts))).backward()
        return 1.0

    return run


def one_big_backward(loss_of: Callable[..., Tensor], parts: list[dict[str, Tensor]]) -> float:
    tokens = [int((part["labels"] != -100).sum()) for part in parts]
    losses = [loss_of(part) * (count / sum(tokens)) for part, count in zip(parts, tokens, strict=True)]
    total = torch.stack(losses).sum()
    total.backward()
    return total.item()


def put_together(loss_of: Callable[..., Tensor], parts: list[dict[str, Tensor]]) -> float:
    loss = loss_of({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    loss.backward()
    return loss.item()


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("predictions", predicted(places=48), "places, not 48: count the 36 tokens"),
    ("predictions", predicted(places=10), "places, not 10: count the 36 tokens"),
    ("predictions", predicted(with_a_loss=1), "<eos> is one of them"),
    ("predictions", predicted(with_a_loss=10), "only the tokens of the answer"),
    ("predictions", predicted(reads_at_the_first="orange"), "asked for the token after it"),
    ("predictions", predicted(reads_at_the_first="?"), "the last token of the prompt"),
    ("predictions", predicted(reads_at_the_last="<eos>"), "nothing more is asked"),
    ("predictions", predicted(with_a_loss__if_padded_to_48_places=4), "padding has the label -100"),
    ("predictions", predicted(loss_of_guessing=3.2), "natural logarithm"),
    ("predictions", predicted(loss_of_guessing=0.0), "the chance of the right word"),
    ("predictions", predicted(loss_of_guessing=10.6), "natural logarithm"),
    ("predictions", predicted(places="46"), "places, not '46'"),
    ("predictions", lambda: {"places": 46}, "are missing, spelled like this: with a loss"),
    ("predictions", lambda: [46, 2, "orange"], "return a dict of predictions"),
    ("packed_mask", packed(lambda image, own, past, prompt: own & (past | prompt)), "sees the picture"),
    ("packed_mask", packed(lambda image, own, past, prompt: image | own), "both directions"),
    ("packed_mask", packed(lambda image, own, past, prompt: image | (own & past)), "only their past"),
    ("packed_mask", packed(lambda i, o, past, prompt: (i | (o & (past | prompt))).mT), "swapped"),
    ("packed_mask", packed(lambda image, own, past, prompt: image | past), "another question"),
    ("packed_mask", all_see_padding, "see padding"),
    ("packed_mask", image_sees_questions, "the picture sees a question"),
    ("packed_mask", packed(lambda i, o, past, prompt: (i | (o & (past | prompt))).int()), "dtype"),
    ("packed_mask", packed(lambda i, o, past, prompt: (i | (o & (past | prompt)))[0]), "shape"),
    ("packed_mask", masked_by(0, torch.lt), "does not see itself"),
    ("packed_mask", masked_by(0, torch.ge), "its future and not its past"),
    ("packed_mask", masked_by(1, torch.le), "type 0 is the prompt"),
    *(("packed_loss", loss_with(fault), hint) for fault, hint in checks.training._FAULTS.items()),
    ("packed_loss", loss_from(lambda each: torch.stack([one.mean() for one in each]).mean()), "counts alike"),
    ("packed_loss", loss_from(lambda each: torch.cat(each).sum()), "divide by the number of answer tokens"),
    ("packed_loss", loss_from(lambda each: torch.cat(each).sum() / 21), "divide by the number of answer"),
    ("packed_loss", loss_from(lambda each: torch.cat(each).mean().item()), "as a tensor"),
    ("packed_loss", loss_from(lambda each: torch.cat(each).mean().detach()), "no gradient can flow"),
    ("packed_loss", loss_from(torch.cat), "it is one number"),
    ("packed_loss", loss_from(lambda each: torch.cat(each).mean() + 0.5), "compare a row of one question"),
    ("packed_loss", one_by_one, "ran 3 times"),
    ("rate_groups", groups(1.0, 1.0), "not lowered"),
    ("rate_groups", groups(None, 1.0), "not lowered"),
    ("rate_groups", groups(0.3, 0.3), "learns as fast"),
    ("rate_groups", groups(1.0, 0.3), "the rates are swapped"),
    ("rate_groups", groups(0.3, 1.0, first=1), "comes second"),
    ("rate_groups", groups(0.3, 1.0, of_tower=lambda name: "vision" in name), "how a name begins"),
    ("rate_groups", groups(0.3, 1.0, of_tower=lambda name: "tower" in name), "how a name begins"),
    ("rate_groups", groups(0.3, 1.0, frozen=True), "requires_grad is False"),
    ("rate_groups", groups(0.3, 1.0, projector=False), "the projector is in no group"),
    ("rate_groups", one_group, "expected two groups"),
    ("rate_groups", one_group_each, "expected two groups"),
    ("rate_groups", in_two_groups, "in two groups"),
    ("rate_groups", tower_at_the_factor, "the factor itself"),
    (
        "rate_groups",
        lambda m, r, f: 2 * [{"params": ["vision_tower.block.weight"], "lr": r}],
        "not their names",
    ),
    ("rate_groups", lambda m, r, f: list(m.parameters()), "list of dicts"),
    ("backward_in_parts", backward(lambda count, all_, n: 1.0), "a larger step"),
    ("backward_in_parts", backward(lambda count, all_, n: 1 / n), "counts for a third"),
    ("backward_in_parts", backward(lambda count, all_, n: count), "never divided"),
    ("backward_in_parts", backward(lambda count, all_, n: count / all_ / n), "sum to 1 already"),
    ("backward_in_parts", backward(lambda count, all_, n: 1 / count), "multiply by it"),
    ("backward_in_parts", backward(lambda count, all_, n: 2 * count / all_), "2.00 times the right one"),
    ("backward_in_parts", backward(lambda count, all_, n: count / all_, only_last=True), "only the last"),
    ("backward_in_parts", backward(lambda count, all_, n: count / all_, retain=True), "still in memory"),
    ("backward_in_parts", backward(lambda count, all_, n: count / all_, returns=1.0), "gradient is right"),
    ("backward_in_parts", backward_by(torch.numel), "prompts and padding too"),
    ("backward_in_parts", backward_by(len), "or rows"),
    ("backward_in_parts", backward_by(lambda labels: int((labels == -100).sum())), "those are the others"),
    ("backward_in_parts", one_big_backward, "still in memory"),
    ("backward_in_parts", put_together, "put together again"),
    ("backward_in_parts", lambda loss_of, parts: 1.0, "no gradient has arrived"),
    ("find_the_bug", lambda: "blocks", "would move the loss of the second"),
    ("find_the_bug", lambda: "shift", "alone in its row would differ"),
    ("find_the_bug", lambda: "leak", "a smaller loss than by packed_loss"),
    ("find_the_bug", lambda: "prompt", "it is not 'prompt'"),
    ("find_the_bug", lambda: "eos", "it is not 'eos'"),
    ("find_the_bug", lambda: "picture", "by way of the picture"),
    ("find_the_bug", lambda: "mask", "'mask' is no suspect: choose one of blocks"),
    ("find_the_bug", lambda: "", "is no suspect"),
    ("find_the_bug", lambda: "positions and blocks", "is no suspect"),
    ("find_the_bug", lambda: 1, "yours is a int"),
    ("find_the_bug", lambda: ["positions", "blocks"], "return the name of one suspect"),
]


@pytest.mark.parametrize("name", EXERCISES)
def test_says_that_an_exercise_is_blank(name: str) -> None:
    with pytest.raises(NotYet, match=r"still blank: replace the line that raises with your own$"):
        getattr(checks.training, name)(blank)


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_names_the_likely_mistake(name: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(checks.training, name)(answer)


@pytest.mark.parametrize("name", EXERCISES)
def test_ten_wrong_answers_are_tried(name: str) -> None:
    assert sum(exercise == name for exercise, _, _ in WRONG) >= 10


@pytest.mark.parametrize("name", EXERCISES)
def test_solutions_are_right(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(checks.training, name)(getattr(checks.training.solutions, name))
    assert capsys.readouterr().out.startswith("Right: ")


def test_other_ways_to_be_right() -> None:
    checks.training.packed_mask(
        lambda blocks, positions, types: (
            packed(lambda image, own, past, prompt: image | (own & (past | prompt)))(blocks, positions, types)
            & (blocks >= 0)[:, None, :]
        )
    )
    checks.training.packed_mask(  # the order in the row is the order of the positions, within a question
        lambda blocks, positions, types: packed(
            lambda image, own, past, prompt: image | (own & (torch.ones(10, 10).tril().bool() | prompt))
        )(blocks, positions, types)
    )
    checks.training.predictions(predicted(reads_at_the_first="\n", loss_of_guessing=7.376))
    checks.training.packed_loss(loss_from(lambda each: torch.cat(each).mean()[None]))
    checks.training.find_the_bug(lambda: " Positions")


def test_parts_may_be_counted_in_other_ways() -> None:
    def twice(loss_of: Callable[..., Tensor], parts: list[dict[str, Tensor]]) -> float:
        """First the loss alone, then with its gradient; the losses are kept, which costs nothing."""
        tokens = [int((part["labels"] != -100).sum()) for part in parts]
        shares = [count / sum(tokens) for count in tokens]
        with torch.no_grad():
            total = sum(loss_of(part).item() * share for part, share in zip(parts, shares, strict=True))
        kept = [loss_of(part).mul(share) for part, share in zip(parts[:1], shares[:1], strict=True)]
        kept[0].backward()
        for part, share in zip(parts[1:], shares[1:], strict=True):
            kept.append(loss_of(part) * share)
            kept[-1].backward()
        return total

    checks.training.backward_in_parts(twice)


def test_the_hidden_mistake_is_seen_by_measuring() -> None:
    """As the exercise says: right alone, the same whatever the words before it, wrong behind them."""
    model = checks.training._small_model()
    features = torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(1))
    first, second, _ = checks.training.QUESTIONS
    other = ([2, 3, 9, 6], first[1])
    broken = checks.training.broken_losses
    alone = checks.training.solutions.packed_loss(model, features, [second]).item()
    assert broken(model, features, [second])[0] == pytest.approx(alone, abs=1e-5)
    behind = broken(model, features, [first, second])[1]
    assert abs(behind - alone) > 1e-3
    assert broken(model, features, [other, second])[1] == pytest.approx(behind, abs=1e-5)


def test_every_exercise_is_in_the_notebook() -> None:
    exercises = [cell for cell in read_cells(NOTEBOOK) if "exercise" in cell.tags]
    assert len(exercises) == len(EXERCISES)
