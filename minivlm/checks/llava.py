"""Checks for 14_llava: what has a loss, labels of a chat, two stages, a grid of tiles, a fault to find."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from minivlm.checks import NotYet, call, expect, right
from minivlm.models.llava import Llava, LlavaConfig
from minivlm.processing.inputs import IGNORE, Inputs
from minivlm.processing.tiles import Grid
from minivlm.processing.tiles import choose_grid as grid_of
from minivlm.text.llama import LlamaConfig
from minivlm.vision.clip import CLIPVisionConfig

PROJECTOR, DECODER, TOWER = "multi_modal_projector.", "language_model.", "vision_tower."


class solutions:
    """The solutions that the notebook continues with."""

    @staticmethod
    def predict_loss() -> dict[str, bool]:
        """Which tokens of the two stages have a loss."""
        return {
            "stage one: the picture": False,
            "stage one: the caption": True,
            "stage one: the newline after the caption": True,
            "chat: the system prompt": False,
            "chat: the picture": False,
            "chat: the first question": False,
            "chat: ASSISTANT:": False,
            "chat: the first answer": True,
            "chat: the </s> after the first answer": True,
            "chat: the second question": False,
            "chat: the second answer": True,
            "chat: padding": False,
        }

    @staticmethod
    def label_chat(
        opening: list[int], turns: Sequence[tuple[list[int], list[int]]], end: int
    ) -> tuple[list[int], list[int]]:
        """The ids of a chat of several turns, and its labels."""
        ids, labels = list(opening), [-100] * len(opening)
        for question, answer in turns:
            ids += [*question, *answer, end]
            labels += [*[-100] * len(question), *answer, end]
        return ids, labels

    @staticmethod
    def two_stages(
        model: Llava, stage_one: Sequence[Inputs], stage_two: Sequence[Inputs], rates: tuple[float, float]
    ) -> Llava:
        """The projector alone, then projector and language model: one step of AdamW a batch."""
        stages = (((PROJECTOR,), stage_one), ((PROJECTOR, DECODER), stage_two))
        for (parts, batches), rate in zip(stages, rates, strict=True):
            for name, weight in model.named_parameters():
                weight.requires_grad_(name.startswith(parts))
            learning = [weight for weight in model.parameters() if weight.requires_grad]
            optimizer = torch.optim.AdamW(learning, lr=rate)
            for batch in batches:
                optimizer.zero_grad()
                loss = model(**batch).loss
                assert loss is not None
                loss.backward()
                optimizer.step()
        return model

    @staticmethod
    def choose_grid(width: int, height: int, side: int, grids: Sequence[Grid]) -> Grid:
        """The grid that keeps the most pixels of the picture; of equals, the one that wastes the fewest."""

        def kept_and_wasted(grid: Grid) -> tuple[int, int]:
            rows, columns = grid
            scale = min(columns * side / width, rows * side / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - rows * columns * side * side

        return max(grids, key=kept_and_wasted)

    @staticmethod
    def find_fault(sound: Clinic, patient: Clinic, pixel_values: Tensor) -> str:
        """Where `patient` does something else than `sound`."""
        features = sound.features(pixel_values)
        theirs = patient.features(pixel_values)
        if not torch.allclose(theirs, features, atol=1e-4):
            moved_on = torch.allclose(theirs[:, 1:], features[:, :-1], atol=1e-4)
            return "class token" if moved_on else "layer"
        if not torch.allclose(patient.project(features), sound.project(features), atol=1e-4):
            return "projector"
        (ids, written), (their_ids, their_written) = (one.row(*QUESTION) for one in (sound, patient))
        if ids != their_ids:
            return "place"
        return "nothing" if written == their_written else "labels"


# Exercise 1

WHY: dict[str, str] = {
    "stage one: the picture": "its tokens are vectors and no words of a vocabulary: no id is right",
    "stage one: the caption": "the caption is what the projector learns from: the row has nothing else",
    "stage one: the newline after the caption": "it ends the caption as </s> ends an answer, and "
    "what is written has a loss to its end",
    "chat: the system prompt": "it is the same in every chat, and the program writes it, not the model",
    "chat: the picture": "its tokens are vectors, not words of a vocabulary",
    "chat: the first question": "the user writes it, and the model shall answer questions, not ask them",
    "chat: ASSISTANT:": "the program writes it to say whose turn it is; the model goes on after the colon",
    "chat: the first answer": "all answers of a chat have a loss, not only the last",
    "chat: the </s> after the first answer": "without a loss on </s> the model would never learn to stop",
    "chat: the second question": "a question has no loss, also where an answer stands before it",
    "chat: the second answer": "it is what the model is to write",
    "chat: padding": "nobody reads padding, and nobody is to write it",
}


def predict_loss(answer: Callable[[], dict[str, bool]]) -> None:
    """Exercise 1."""
    result = call(answer)
    expect(isinstance(result, dict), f"return the dict of predictions, not a {type(result).__name__}")
    truth = solutions.predict_loss()
    missing = [name for name in truth if not isinstance(result.get(name), bool)]
    expect(not missing, f"predict True or False for: {', '.join(missing)}")
    wrong = [f"{name}: {WHY[name]}" for name, has_loss in truth.items() if result[name] != has_loss]
    if wrong:
        count = f"{len(truth) - len(wrong)} of {len(truth)} predictions are right"
        raise NotYet("\n  ".join([count, *wrong]))
    right("what the model is to write has a loss, to its end, and nothing else has.")


# Exercise 2

OPENING, END = [1, 50, 50, 50], 2
TURNS: list[tuple[list[int], list[int]]] = [([10, 11, 12], [20, 21]), ([13], [22]), ([14, 15], [23, 24, 25])]


def label_chat(answer: Callable[..., Any]) -> None:
    """Exercise 2."""
    opening, turns = list(OPENING), [(list(a), list(b)) for a, b in TURNS]
    result = call(answer, opening, turns, END)
    expect(
        isinstance(result, tuple) and len(result) == 2,
        "return two lists, separated by a comma: ids, labels",
    )
    expect(
        opening == OPENING and turns == TURNS,
        "your function changes the lists that it was given: begin with a copy, list(opening)",
    )
    ids, labels = (x.tolist() if isinstance(x, Tensor) else list(x) for x in result)
    right_ids, right_labels = solutions.label_chat(OPENING, TURNS, END)
    _check_ids(ids, right_ids)
    expect(
        len(labels) == len(ids),
        f"there are {len(ids)} ids and {len(labels)} labels: every token has a label, {IGNORE} for no loss",
    )
    _check_labels(labels, right_ids, right_labels)
    other = call(answer, [1], [([5], [6])], 9)
    expect(
        tuple(map(list, other)) == ([1, 5, 6, 9], [-100, -100, 6, 9]),
        "right for this chat, but not for another with one turn and another end: use the arguments",
    )
    right("questions are given, answers are written: a loss on every answer and on its </s>.")


def _check_ids(ids: list[int], expected: list[int]) -> None:
    body = [number for turn in TURNS for number in (*turn[0], *turn[1])]
    expect(
        ids != [*OPENING, *body, END],
        "only the last answer ends with </s>: every answer does, or the model learns to go on as the user",
    )
    expect(
        ids != [*OPENING, *body],
        "no answer ends with </s>: put `end` after each of them, or the model never learns to stop",
    )
    expect(
        ids != expected[len(OPENING) :],
        "the opening is missing: it stands before the first turn, with the picture in it",
    )
    expect(
        ids.count(OPENING[0]) < 2,
        "the opening stands before every turn: the picture and the system prompt come once, at the start",
    )
    expect(
        sorted(ids) != sorted(expected) or ids == expected,
        "all tokens are there, in another order: opening, question, answer, end, question, answer, end",
    )
    expect(ids == expected, f"the ids are {ids}, expected {expected}")


def _check_labels(labels: list[int], ids: list[int], expected: list[int]) -> None:
    no_end = [IGNORE if number == END else label for number, label in zip(ids, expected, strict=True)]
    first_answer = len(OPENING) + len(TURNS[0][0])
    last_answer = len(ids) - len(TURNS[-1][1]) - 1
    questions = {number for turn in TURNS for number in turn[0]}
    expect(labels != ids, f"every token has a loss: what is given has the label {IGNORE}")
    expect(
        labels != no_end,
        "the end of an answer has no loss: the model would never learn to stop",
    )
    expect(
        labels != [*[IGNORE] * last_answer, *ids[last_answer:]],
        "only the last answer has a loss: three turns are three examples for the price of one picture",
    )
    expect(
        labels != [*[IGNORE] * first_answer, *ids[first_answer:]],
        "everything after the first question has a loss, later questions too: each question gets "
        f"{IGNORE}, wherever it stands",
    )
    expect(
        labels != [*[IGNORE] * len(OPENING), *ids[len(OPENING) :]],
        "questions have a loss: the model would learn to ask them",
    )
    shifted = [*expected[1:], IGNORE]
    expect(
        labels != shifted,
        "the labels are shifted already: a label stands beside its own token, and the loss shifts",
    )
    expect(
        labels != [IGNORE, *expected[:-1]],
        "the labels stand one place too late: a label stands beside its own token",
    )
    expect(
        not all(label in (0, *ids) for label in labels) or 0 not in labels,
        f"0 is the id of a token, so it would be learned: places without a loss have the label {IGNORE}",
    )
    for place, (label, reference) in enumerate(zip(labels, expected, strict=True)):
        what = (
            "a question"
            if ids[place] in questions
            else "the opening"
            if place < len(OPENING)
            else "an answer"
        )
        expect(
            label == reference,
            f"place {place} is part of {what}, its label is {label}, and should be {reference}",
        )


# Exercise 3


@cache
def _tiny() -> tuple[Llava, list[Inputs]]:
    """A model of three small parts, and batches of two rows."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Llava(TINY)
    batches = []
    for _ in range(5):
        words = torch.randint(3, 20, (2, 6), generator=generator)
        ids = torch.cat([torch.full((2, 4), TINY.image_token_id), words], dim=1)
        labels = ids.masked_fill(torch.arange(10) < 6, IGNORE)
        pixels = torch.randn(2, 3, 16, 16, generator=generator)
        batches.append({"input_ids": ids, "pixel_values": pixels, "labels": labels})
    return model, batches


TINY = LlavaConfig(
    vision=CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    ),
    text=LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=24,
        max_position_embeddings=64,
    ),
    image_token_id=24,
    pad_token_id=0,
)
RATES = (3e-3, 1e-3)


class _Watch:
    """What every step of an optimizer changes, and whether its gradient is that of one batch."""

    def __init__(self, model: Llava) -> None:
        self.model = model
        self.states: list[dict[str, Tensor]] = []  # before each step
        self.gradients: list[dict[str, Tensor]] = []
        self.rates: list[set[float]] = []

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.states.append({name: x.detach().clone() for name, x in self.model.named_parameters()})
        stepped = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        self.gradients.append(
            {
                name: x.grad.detach().clone()
                for name, x in self.model.named_parameters()
                if id(x) in stepped and x.grad is not None
            }
        )
        self.rates.append({group["lr"] for group in optimizer.param_groups})


def two_stages(answer: Callable[..., Any]) -> None:
    """Exercise 3."""
    start, batches = _tiny()
    _one_stage(answer, start, batches)
    model = copy.deepcopy(start)
    watch, result = _watched(answer, model, batches[:3], batches[3:])
    expect(
        isinstance(result, Llava),
        f"return the model, not a {type(result).__name__}",
    )
    final = {name: x.detach() for name, x in result.named_parameters()}
    states = [*watch.states, final]
    count = len(watch.states)
    expect(count != 0, "no step was taken: call optimizer.step() for every batch, after backward()")
    expect(
        count == 5,
        f"five batches came, and {count} steps were taken: one step for each batch of each stage",
    )
    moved_two = _moved(states[3], final)
    expect(
        TOWER not in moved_two,
        "the tower has learned in stage two: it stays frozen in both stages (match the beginnings of names)",
    )
    expect(
        DECODER in moved_two,
        "the language model has not learned in stage two: set requires_grad again, and give its weights to "
        "the optimizer of stage two",
    )
    expect(
        PROJECTOR in moved_two,
        "the projector has not learned in stage two: both of them learn there",
    )
    expect(
        watch.rates[0] == {RATES[0]} and watch.rates[-1] == {RATES[1]},
        f"the rates were {sorted(watch.rates[0])} in stage one and {sorted(watch.rates[-1])} in stage two: "
        f"take rates[0] = {RATES[0]} and rates[1] = {RATES[1]}",
    )
    for step, (state, gradients) in enumerate(zip(states, watch.gradients, strict=False)):
        expect(
            _is_fresh(start, state, batches[step], gradients),
            f"step {step + 1} used gradients that are not those of its batch: they piled up from earlier "
            "ones. Set them to zero before each backward(), also what stage one left in the language model",
        )
    right("first the translation alone, then the reader with it, and the eye stays as it was.")


def _one_stage(answer: Callable[..., Any], start: Llava, batches: list[Inputs]) -> None:
    """Stage one by itself."""
    model = copy.deepcopy(start)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    _watched(answer, model, batches[:3], [])
    moved = _moved(before, dict(model.named_parameters()))
    expect(
        DECODER not in moved,
        "the language model has learned in stage one: only the projector learns there, so give the "
        "optimizer its weights alone (their names begin with multi_modal_projector)",
    )
    expect(
        TOWER not in moved,
        "the tower has learned in stage one: only the projector learns there",
    )
    expect(
        PROJECTOR in moved,
        "the projector has not learned in stage one: give its weights to the optimizer, and call "
        "backward() and step() for every batch",
    )


def _watched(
    answer: Callable[..., Any], model: Llava, one: list[Inputs], two: list[Inputs]
) -> tuple[_Watch, Any]:
    watch = _Watch(model)
    handle = register_optimizer_step_pre_hook(watch)
    try:
        with torch.enable_grad():
            return watch, call(answer, model, list(one), list(two), RATES)
    finally:
        handle.remove()


def _moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The parts of which some weight has changed."""
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    return {part for part in (PROJECTOR, DECODER, TOWER) if any(name.startswith(part) for name in changed)}


def _is_fresh(start: Llava, state: dict[str, Tensor], batch: Inputs, given: dict[str, Tensor]) -> bool:
    """Whether gradients point as those of one batch do; they may be clipped."""
    model = copy.deepcopy(start)
    model.load_state_dict(state, strict=False)
    with torch.enable_grad():
        loss = model.requires_grad_(True)(**batch).loss
        assert loss is not None
        loss.backward()
    found = torch.cat([gradient.flatten() for gradient in given.values()])
    weights = dict(model.named_parameters())
    fresh = torch.cat([_gradient(weights[name]).flatten() for name in given])
    return bool(F.cosine_similarity(found, fresh, dim=0) > 0.999)


def _gradient(weight: nn.Parameter) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


# Exercise 4

SIZES = tuple((width, height) for width in range(40, 1200, 97) for height in range(35, 1200, 89))
SIDE = 336
TRIED: tuple[Grid, ...] = ((3, 1), (2, 2), (1, 3), (1, 2), (2, 1))  # NeXT's, neither end first


def _area(grid: Grid) -> int:
    return grid[0] * grid[1] * SIDE * SIDE


def _kept(
    width: int, height: int, grid: Sequence[int], capped: bool = True, scale: Callable[..., float] = min
) -> int:
    """Pixels of a picture on a grid, at most its own."""
    factor = scale(grid[1] * SIDE / width, grid[0] * SIDE / height)
    kept = int(width * factor) * int(height * factor)
    return min(kept, width * height) if capped else kept


# What a wrong choice reveals: by which number it prefers one grid to another.
GRID_MISTAKES: dict[str, Callable[[int, int, Grid], Any]] = {
    "rows and columns are swapped: a grid is (rows, columns), so its width is columns * side": (
        lambda w, h, g: (_kept(w, h, g[::-1]), -_area(g))
    ),
    "small pictures get too many tiles: enlarging adds no pixels that were not there, so no grid keeps more "
    "than width * height": lambda w, h, g: (_kept(w, h, g, capped=False), -_area(g)),
    "where two grids keep equally many pixels, you take the first: take the one with the smaller area": _kept,
    "where two grids keep equally many pixels, you take the one with the larger area: it wastes more": (
        lambda w, h, g: (_kept(w, h, g), _area(g))
    ),
    "you choose by the shape alone: a long picture that is small needs no more tiles than it has pixels": (
        lambda w, h, g: -abs(g[1] / g[0] - w / h)
    ),
    "you choose the grid with the fewest pixels left empty: first count what is kept, and only among "
    "equals what is wasted": lambda w, h, g: _kept(w, h, g) - _area(g),
    "you choose the grid that keeps the least: the one that keeps the most is wanted": (
        lambda w, h, g: (-_kept(w, h, g), _area(g))
    ),
    "the larger of the two scales is used, and the picture does not fit into the grid: take the smaller": (
        lambda w, h, g: (_kept(w, h, g, scale=max), -_area(g))
    ),
    "always the largest grid: it depends on the picture": lambda w, h, g: _area(g),
    "a grid's pixels are counted, not the picture's: what is kept is the resized picture, without padding": (
        lambda w, h, g: (min(_area(g), w * h), -_area(g))
    ),
}


def choose_grid(answer: Callable[..., Any]) -> None:
    """Exercise 4."""
    found = {}
    for width, height in SIZES:
        result = call(answer, width, height, SIDE, TRIED)
        expect(
            isinstance(result, tuple) and len(result) == 2,
            f"return one of the grids, a pair (rows, columns), not {result!r}",
        )
        found[width, height] = result
    unknown = sorted(set(found.values()) - set(TRIED))
    expect(not unknown, f"{unknown[:1]} is none of the grids: a grid is (rows, columns)")
    right_ones = {size: grid_of(*size, SIDE, TRIED) for size in SIZES}
    if found != right_ones:
        for hint, prefers in GRID_MISTAKES.items():
            theirs = {size: max(TRIED, key=partial(prefers, *size)) for size in SIZES}
            expect(found != theirs, hint)
    for size, expected in right_ones.items():
        expect(
            found[size] == expected,
            f"a picture of {size[0]} x {size[1]} gets {found[size]}, expected {expected}: it keeps "
            f"{_kept(*size, found[size]):,} pixels there and {_kept(*size, expected):,} on the other, of "
            f"{size[0] * size[1]:,}",
        )
    others = ((1, 1), (2, 1), (4, 4))
    expect(
        call(answer, 15, 30, 16, others) == grid_of(15, 30, 16, others),
        "right for tiles of 336 pixels and NeXT's grids alone: use the arguments side and grids",
    )
    right("keep the most of the picture, and of equals waste the least.")


# Exercise 5

QUESTION = ([10, 11], [20, 21, 22])  # ids of a question and of its answer
FAULTS = ("layer", "class token", "projector", "place", "labels")


class Clinic:
    """Four steps of a LLaVA that can be called one by one; `fault` breaks one of them."""

    def __init__(self, model: Llava, fault: str = "nothing") -> None:
        self._model, self._fault = model, fault

    @torch.no_grad()
    def features(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> what the projector reads, [B, N, D_image]."""
        states = list(self._model.vision_tower.hidden_states(pixel_values))
        tokens = states[-1 if self._fault == "layer" else -2]
        return tokens[:, :-1] if self._fault == "class token" else tokens[:, 1:]

    @torch.no_grad()
    def project(self, features: Tensor) -> Tensor:
        """[B, N, D_image] -> [B, N, D]."""
        projector = self._model.multi_modal_projector
        if self._fault == "projector":
            return projector.linear_2(projector.linear_1(features))
        return projector(features) * (1 + 1e-6 if self._fault == "rounding" else 1)

    def row(self, question: list[int], answer: list[int]) -> tuple[list[int], list[bool]]:
        """A row's ids with its placeholders, and which of them have a loss."""
        picture = [self._model.config.image_token_id] * self._model.config.num_image_tokens
        end = [*answer, 2]
        given = [1, *question, *picture] if self._fault == "place" else [1, *picture, *question]
        learned = len(given) - (len(question) if self._fault == "labels" else 0)
        return [*given, *end], [False] * learned + [True] * (len(given) + len(end) - learned)


def clinic(fault: str = "class token") -> tuple[Clinic, Clinic, Tensor]:
    """A sound LLaVA with CLIP's tower, one with a fault, and two pictures of noise."""
    model, batches = _tiny()
    return Clinic(model), Clinic(model, fault), batches[0]["pixel_values"]


def find_fault(answer: Callable[..., Any]) -> None:
    """Exercise 5."""
    reasons = {
        "layer": "compare the features: these are the tower's last ones, not the second-last",
        "class token": "the features have the right number: the class token stands first, and the last "
        "patch is gone, so patient[:, 1:] equals sound[:, :-1]",
        "projector": "give both projectors the same features: they differ",
        "place": "compare the ids of the rows: the picture stands at another place",
        "labels": "ids and features are equal, and what has a loss is not",
        "nothing": "both are sound, up to rounding: compare with a tolerance, and return 'nothing'",
    }
    for fault in (*FAULTS, "nothing"):
        sound, patient, pixels = clinic("rounding" if fault == "nothing" else fault)
        result = call(answer, sound, patient, pixels.clone())
        expect(
            isinstance(result, str) and result in (*FAULTS, "nothing"),
            f"return one of {', '.join(FAULTS)} or nothing, not {result!r}",
        )
        expect(
            result == fault or not (fault == "projector" and result == "layer"),
            "a sound tower was called broken: compare projectors on equal features, and features before them",
        )
        expect(result == fault, f"the fault is {fault!r}, and you say {result!r}: {reasons[fault]}")
    right("equal inputs for each step, in their order: the first difference is the fault.")
