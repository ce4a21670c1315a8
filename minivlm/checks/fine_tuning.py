"""Checks for 12_fine_tuning: a low-rank change, first gradients, broken adapters, leaks, a whole tuning."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minivlm.adapters import LoraConfig, new_adapter, put_on, read_adapter
from minivlm.adapters.lora import AdaptedLinear, LowRank
from minivlm.checks import NotYet, call, expect, expect_tensor, right, same
from minivlm.data.fingerprints import ALIKE, perceptual_hash
from minivlm.errors import InputError
from minivlm.evaluation.answers import make_questions
from minivlm.models.load import SHIPPED, load
from minivlm.processing.inputs import IGNORE
from minivlm.training.schedule import warm_up_then_fall
from minivlm.world.questions import QUESTION_TASKS
from minivlm.world.scenes import Scene, Thing, make_scene

RANK, RATE, STEPS = 16, 5e-3, 40  # of an adapter that learns the new question
NEEDED, KEPT = 0.6, 0.3  # what a tuning has to get right, of the new question and of the old ones
OLD_SCENES = 8
CORNERS = {"circle": "0", "triangle": "3", "square": "4", "pentagon": "5"}


# ---- the new task: pictures with pentagons, and a question that nobody asked the model ---------------------


class Row(NamedTuple):
    """A picture, what is asked about it, and the answer."""

    picture: Image.Image
    prefix: str
    suffix: str


class Pentagon(Thing):
    """A shape that no training of the shipped model has shown."""

    @cached_property
    def outline(self) -> list[tuple[float, float]]:
        """Five corners on a circle, the first at the top."""
        angles = [2 * math.pi * corner / 5 - math.pi / 2 for corner in range(5)]
        return [(self.x + self.radius * math.cos(a), self.y + self.radius * math.sin(a)) for a in angles]


def corner_rows(count: int, seed: int) -> list[Row]:
    """Questions for the number of corners, each shape as often as the others."""
    rng, rows = np.random.default_rng([12, seed]), list[Row]()
    while len(rows) < count:
        shape = list(CORNERS)[len(rows) % len(CORNERS)]
        scene = make_scene(rng, "train" if seed == 0 else "test")
        colors = [thing.color for thing in scene.things]
        fitting = [
            thing
            for thing in scene.things
            if colors.count(thing.color) == 1 and shape in (thing.shape, "pentagon")
        ]
        if fitting and len(scene.things) <= 3:
            thing = fitting[rng.integers(len(fitting))]
            prefix = f"how many corners has the {thing.color} object?"
            picture = with_shape(scene, thing, shape).draw(64)
            rows.append(Row(picture, prefix, CORNERS[shape]))
    return rows


def with_shape(scene: Scene, thing: Thing, shape: str) -> Scene:
    """The scene with a pentagon in the place of a thing, if that is the shape."""
    if shape != "pentagon":
        return scene
    new = Pentagon(**(asdict(thing) | {"shape": shape}))
    return replace(scene, things=tuple(new if one is thing else one for one in scene.things))


def old_rows(scenes: int, seed: int) -> list[Row]:
    """Questions of the six kinds that the shipped model learned."""
    questions = make_questions(scenes, seed, "test", 64)
    return [
        Row(one.picture, one.example.prefix, one.example.suffix)
        for one in questions
        if one.example.task in QUESTION_TASKS
    ]


# ---- training and measuring --------------------------------------------------------------------------------


def inputs_of(processor: Any, rows: Sequence[Row]) -> Any:
    """A batch with labels."""
    pictures, prefixes, suffixes = (list(column) for column in zip(*rows, strict=True))
    return processor(pictures, prefixes, suffixes=suffixes, padding_side="right")


@torch.no_grad()
def exact(model: nn.Module, processor: Any, rows: Sequence[Row]) -> float:
    """The share of answers of which every token is the most probable one, after those before it."""
    right = 0
    for start in range(0, len(rows), 32):
        batch = inputs_of(processor, rows[start : start + 32])
        labels = batch["labels"][:, 1:]
        hits = (model(**batch).logits[:, :-1].argmax(dim=-1) == labels) | (labels == IGNORE)
        right += int(hits.all(dim=1).sum())
    return right / len(rows)


def tune(
    model: nn.Module,
    processor: Any,
    rows: Sequence[Row],
    lr: float,
    steps: int = 40,
    seed: int = 0,
    after: Callable[[int], object] = id,
) -> list[float]:
    """Train what has `requires_grad`, and return the loss of each step. `after` is called after each."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    order, losses = np.random.default_rng(seed), []
    for step in range(steps):
        chosen = [rows[i] for i in order.choice(len(rows), 8, replace=False)]
        loss = model(**inputs_of(processor, chosen)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_up_then_fall(step, steps, warmup=4)
        optimizer.step()
        losses.append(loss.item())
        after(step)
    return losses


# ---- the exercises -----------------------------------------------------------------------------------------

# What holds at the start of an adapter's training, and why.
STATEMENTS = {
    "the model answers as before": (True, "B is zero, and so is B A x, whatever A is"),
    "the gradient of A is zero": (True, "on its way to A, a gradient is multiplied by B"),
    "the gradient of B is zero": (
        False,
        "on its way to B, a gradient is multiplied by A x, which is not zero",
    ),
    "after one step, the gradient of A is zero": (False, "B has moved away from zero, and lets it pass"),
    "with A and B zero, the gradient of B is zero": (
        True,
        "on its way to B, a gradient is multiplied by A x",
    ),
    "with A and B zero, it learns in the end": (
        False,
        "each waits for the other one, and nothing ever moves",
    ),
}
FAULTS = ("none", "off", "untrained", "twice", "scale")
VERDICTS = ("good", "too slow", "too fast", "too few pictures")


class _LoraLinear(nn.Module):
    """A linear layer with a change of low rank beside it."""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / r
        self.lora_A = nn.Parameter(torch.randn(r, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y: Tensor = self.base(x)
        return y + self.scale * (x @ self.lora_A.T @ self.lora_B.T)

    def merged(self) -> Tensor:
        """The weight of a plain layer that gives the same."""
        return self.base.weight + self.scale * self.lora_B @ self.lora_A


class solutions:
    """The solutions that the notebook continues with."""

    @staticmethod
    def low_rank_layer(base: nn.Linear, r: int, alpha: float) -> nn.Module:
        """The base with a change of rank r beside it."""
        return _LoraLinear(base, r, alpha)

    @staticmethod
    def expected_start() -> dict[str, bool]:
        """Which statements about the start hold."""
        return {statement: holds for statement, (holds, _) in STATEMENTS.items()}

    @staticmethod
    def diagnose(layer: Any, weight: Tensor, alpha: float, x: Tensor) -> str:
        """What is wrong with an adapted layer."""
        change = layer.changes["default"]
        r = change.lora_A.shape[0]
        expected = alpha / r * (x @ change.lora_A.T @ change.lora_B.T)
        added = layer(x) - x @ weight.T
        if expected.norm() == 0:
            return "untrained"
        ratio = float((added * expected).sum() / expected.square().sum())
        if abs(ratio) < 0.01:
            return "off"
        if abs(ratio - 1) < 0.01:
            return "none"
        return "twice" if abs(ratio - 2) < 0.01 else "scale"

    @staticmethod
    def name_curves(curves: dict[str, Any]) -> dict[str, str]:
        """A verdict on each curve."""
        return {"A": "too few pictures", "B": "good", "C": "too fast", "D": "too slow"}

    @staticmethod
    def split_by_look(looks: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
        """Numbers of the pictures for training and for testing; those that look alike stay together."""
        group = list(range(len(looks)))
        for i in range(len(looks)):
            for j in range(i):
                if (looks[i] ^ looks[j]).bit_count() <= ALIKE and group[i] != group[j]:
                    old, new = group[i], group[j]
                    group = [new if one == old else one for one in group]
        test: list[int] = []
        for chosen in np.random.default_rng(seed).permutation(sorted(set(group))):
            if len(test) < share * len(looks):
                test += [i for i, one in enumerate(group) if one == chosen]
        return [i for i in range(len(looks)) if i not in test], test

    @staticmethod
    def fine_tune(rows: Sequence[Row], old: Sequence[Row], folder: Path) -> dict[str, Any]:
        """From rows to the folder of an adapter, with what it learned and forgot."""
        looks = [perceptual_hash(row.picture) for row in rows]
        train, test = solutions.split_by_look(looks, 0.25, 0)
        model, processor = load()
        before = exact(model, processor, old)
        model.requires_grad_(False)
        adapter = new_adapter(
            model, LoraConfig(r=RANK, lora_alpha=2 * RANK), generator=torch.Generator().manual_seed(0)
        )
        tune(model, processor, [rows[i] for i in train], RATE, STEPS)
        adapter.save(folder)
        return {
            "train": train,
            "test": test,
            "new": exact(model, processor, [rows[i] for i in test]),
            "old before": before,
            "old after": exact(model, processor, old),
        }


def _base() -> nn.Linear:
    """A layer [20, 12] with a bias, always the same."""
    generator = torch.Generator().manual_seed(12)
    base = nn.Linear(12, 20)
    with torch.no_grad():
        base.weight.copy_(torch.randn(20, 12, generator=generator) / 12**0.5)
        base.bias.copy_(torch.randn(20, generator=generator))
    return base


class _Matrices(TorchFunctionMode):
    """Notes whether a new matrix of the shape of a weight is made inside."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.made = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and sorted(result.shape) == sorted(self.weight.shape):
            self.made |= result.data_ptr() != self.weight.data_ptr()
        return result


def low_rank_layer(answer: Callable[..., Any]) -> None:
    """A layer of 12 and 20 numbers with r = 4 and alpha = 12."""
    base, generator = _base(), torch.Generator().manual_seed(1)
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    layer = call(answer, base, 4, 12.0)
    expect(
        isinstance(layer, nn.Module), f"low_rank_layer returns a {type(layer).__name__}: return an nn.Module"
    )
    named = dict(layer.named_parameters())
    for name, shape in (("lora_A", [4, 12]), ("lora_B", [20, 4])):
        expect(name in named, f"there is no parameter {name}: make self.{name} an nn.Parameter")
        found = list(named[name].shape)
        expect(found == shape, f"{name} is {found}: it should be {shape}, so that B A has the shape of W")
    learned = [name for name, one in named.items() if one.requires_grad]
    expect(
        "lora_A" in learned and "lora_B" in learned, "A and B do not learn: leave their requires_grad True"
    )
    expect(len(learned) == 2, f"{', '.join(learned)} can be trained: freeze the base, only A and B learn")
    A, B = named["lora_A"], named["lora_B"]
    x = torch.randn(2, 3, 12, generator=generator)
    expect(
        bool(A.abs().sum() > 0 or B.abs().sum() > 0),
        "A and B are both zero: then neither ever gets a gradient",
    )
    expect(
        bool(A.abs().sum() == 0 or B.abs().sum() == 0),
        "A and B are both random: the model answers otherwise before anything was learned. Start B at zero",
    )
    expect(
        bool(A.abs().sum() > 0), "A is zero and B is random: that would work, but it is the other way round"
    )
    with torch.no_grad():
        start = call(layer, x)
        expect_tensor(start, x @ weight.T + bias, "the output at the start")
        A.copy_(torch.randn(4, 12, generator=generator))
        B.copy_(torch.randn(20, 4, generator=generator))
        with _Matrices(base.weight) as matrices:
            result = call(layer, x)
        change = x @ A.T @ B.T
        expect(not same(result, start), "A and B change nothing in forward: add s B A x to the base's output")
        for hint, factor in _SCALES:
            expect(not same(result, start + factor * change), hint)
        expect(
            not same(result, 3 * change), "forward returns the change alone: add it to what the base gives"
        )
        expect(
            not same(result, start + 3 * change + bias),
            "the bias is added twice: the base adds it already",
        )
        expect_tensor(result, start + 3 * change, "the output")
        expect(
            not matrices.made,
            "forward builds a matrix of out by in: let x go through A first, and what comes out through B",
        )
        merge = getattr(layer, "merged", None)
        expect(callable(merge), "the method merged is missing: it returns the weight W + s B A")
        assert merge is not None
        merged, delta = call(merge), B @ A
        for hint, factor in _SCALES:
            expect(not same(merged, weight + factor * delta), f"in merged, {hint}")
        expect(
            not same(merged, 3 * delta), "merged returns the change alone: add it to the weight of the base"
        )
        expect(not same(merged, weight), "merged returns the old weight: add s B A")
        expect_tensor(merged, weight + 3 * delta, "the merged weight")
    expect(
        torch.equal(base.weight, weight),
        "merged changes the weight of the base: return a new tensor, or merging twice adds the change twice",
    )
    right("the base is frozen and unchanged, the start is neutral, and merged is one matrix.")


_SCALES = (
    ("the scale is missing: multiply the change by alpha / r", 1.0),
    ("you multiply by alpha: the scale is alpha / r", 12.0),
    ("the scale is upside down: it is alpha / r", 1 / 3),
    ("you divide alpha by the root of r, as rsLoRA does: the paper's scale is alpha / r", 6.0),
    ("the scale is applied twice", 9.0),
)


def expected_start(answer: Callable[[], Any]) -> None:
    """Every prediction against what holds."""
    result = call(answer)
    expect(isinstance(result, dict), f"return the dict of your predictions, not a {type(result).__name__}")
    missing = [statement for statement in STATEMENTS if statement not in result]
    expect(not missing, f"no prediction yet for: {', '.join(missing)}")
    wrong = []
    for statement, (holds, reason) in STATEMENTS.items():
        said = result[statement]
        expect(isinstance(said, bool), f"{statement}: you say {said!r}: expected True or False")
        if said is not holds:
            wrong.append(f"{statement}: you say {said}, and it is {holds}: {reason}")
    expect(not wrong, "\n".join(wrong))
    right("a gradient on its way to one factor is multiplied by the other one.")


class Patient(NamedTuple):
    """An adapted layer, the weight that its base should have, and the alpha of the adapter."""

    layer: AdaptedLinear
    weight: Tensor
    alpha: float


def a_patient(fault: str, seed: int = 0) -> Patient:
    """A layer [20, 12] without bias and an adapter of rank 16 with alpha 32, with a fault."""
    generator = torch.Generator().manual_seed(seed)
    base = nn.Linear(12, 20, bias=False).requires_grad_(False)
    base.weight.copy_(torch.randn(20, 12, generator=generator))
    weight = base.weight.clone()
    change = LowRank(12, 20, rank=16, alpha=32, rslora=fault == "scale").requires_grad_(False)
    change.reset(generator)
    if fault != "untrained":
        change.lora_B.copy_(torch.randn(20, 16, generator=generator) / 4)
    layer = AdaptedLinear(base, slice(0, 20))
    layer.changes["default"] = change
    layer.active = None if fault == "off" else "default"
    if fault == "twice":
        base.weight.copy_(change.merged(weight, slice(0, 20)))
    return Patient(layer, weight, 32.0)


def patients() -> dict[str, Patient]:
    """One with each fault, and a sound one. Which is which is not told."""
    order = ("twice", "none", "scale", "untrained", "off")
    return {letter: a_patient(fault) for letter, fault in zip("ABCDE", order, strict=True)}


_SIGNS = {
    "none": "it adds exactly s B A x: compare before you suspect",
    "off": "it adds nothing, although its B is not zero",
    "untrained": "it adds nothing because its B is zero: look at B, too",
    "twice": "it adds twice as much as s B A x: W holds the change already, and it is added once more",
    "scale": "it adds four times s B A x: with rank 16, alpha over the root of r is four times alpha over r",
}


def diagnose(answer: Callable[..., Any]) -> None:
    """Each fault once more, with other weights."""
    for seed, fault in enumerate(("none", "scale", "untrained", "off", "twice"), start=1):
        patient = a_patient(fault, seed)
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed))
        before = {name: one.clone() for name, one in patient.layer.state_dict().items()}
        with torch.no_grad():
            found = call(answer, patient.layer, patient.weight.clone(), patient.alpha, x)
        now = patient.layer.state_dict()
        expect(
            all(torch.equal(now[name], one) for name, one in before.items()),
            "your test changes the weights of what it was given: work on a `copy.deepcopy`",
        )
        expect(found in FAULTS, f"{found!r} is no fault of the list: return one of {', '.join(FAULTS)}")
        if found != fault:
            who = "A sound layer" if fault == "none" else f"A layer with the fault {fault!r}"
            raise NotYet(f"{who} is taken for {found!r}: {_SIGNS[fault]}. Allow for rounding, of about 1e-5")
    right("one number tells four of them apart: what is added, as a multiple of s B A x.")


def name_curves(answer: Callable[..., Any]) -> None:
    """The verdicts on the four stored curves."""
    result = call(answer, curves())
    expect(
        isinstance(result, dict), f"return a dict from the letters to verdicts, not a {type(result).__name__}"
    )
    good = solutions.name_curves(curves())
    for letter, verdict in good.items():
        said = result.get(letter)
        expect(said is not None, f"no verdict yet on curve {letter}")
        expect(said in VERDICTS, f"{said!r} is no verdict of the list: choose from {', '.join(VERDICTS)}")
        expect(said == verdict, f"curve {letter} is not {said!r}: {_CURVE_HINTS[verdict]}")
    right("the level says whether it learns, the shape how fast, and the gap what it learns by heart.")


_CURVE_HINTS = {
    "good": "both lines end below the loss of guessing, and the one of other pictures still falls",
    "too slow": "both lines fall together, and are still far up at the end: nothing is wrong but the pace",
    "too fast": "both lines stop together at the loss of guessing among four answers, 0.7 a token",
    "too few pictures": "one line goes to zero, the other one ends at the loss of guessing: look at the gap",
}


def curves() -> dict[str, Any]:
    """Four learning curves of `bench/fine_tuning.py`: losses in training, and on other pictures."""
    stored = json.loads((SHIPPED.parent / "fine_tuning.json").read_text(encoding="utf-8"))["curves"]
    return dict(zip("ABCD", (stored[name] for name in ("few", "good", "fast", "slow")), strict=True))


def split_by_look(answer: Callable[..., Any]) -> None:
    """Forty looks: pairs, a chain of three, and singles."""
    looks = _looks()
    result = call(answer, list(looks), 0.25, 0)
    expect(
        isinstance(result, tuple | list)
        and len(result) == 2
        and all(isinstance(part, list | set | tuple | np.ndarray) for part in result),
        "return two lists: the numbers of the pictures for training, and of those for testing",
    )
    train, test = ([int(one) for one in part] for part in result)
    expect(bool(train and test), "one of the parts is empty")
    expect(not set(train) & set(test), "some pictures are in both parts")
    lost = set(range(len(looks))) - set(train) - set(test)
    expect(
        not lost,
        f"{len(lost)} pictures are in neither part: keep copies, and keep them together",
    )
    expect(
        len(train) + len(test) == len(looks) and max(train + test) < len(looks),
        "a picture is listed twice, or does not exist: return the numbers of the pictures, each once",
    )
    for seed in range(8):
        train_now, test_now = call(answer, list(looks), 0.25, seed)
        across = [(i, j) for i in train_now for j in test_now if (looks[i] ^ looks[j]).bit_count() <= ALIKE]
        identical = [(i, j) for i, j in across if looks[i] == looks[j]]
        expect(not identical, f"pictures {identical[:1]} have equal looks, and are in different parts")
        expect(
            not across,
            f"pictures {across[:1]} look alike, at most {ALIKE} bits differ, and are in different parts: "
            f"{ALIKE} bits count as alike, and A may be like B, and B like C",
        )
    share = len(test) / len(looks)
    expect(share <= 0.4, f"{share:.0%} of the pictures are for testing, and a quarter was asked for")
    expect(share >= 0.15, f"only {share:.0%} of the pictures are for testing, and a quarter was asked for")
    other = call(answer, list(looks), 0.25, 1)
    expect(
        sorted(other[1]) != sorted(test),
        "another seed gives the same split: let `np.random.default_rng(seed)` choose the groups",
    )
    again = call(answer, list(looks), 0.25, 0)
    expect(
        sorted(again[1]) == sorted(test),
        "the same seed gives another split: use the seed, and no global state",
    )
    right("whatever looks alike is on one side, chains included, and a seed says which.")


def _looks() -> list[int]:
    """Of 64 bits each. Every third one has a copy with four other bits, every sixth another one of that."""
    rng, looks = np.random.default_rng(5), list[int]()
    for number in range(24):
        look = int(rng.integers(2**62)) << 2
        looks.append(look)
        if number % 3 == 0:
            looks.append(look ^ 0b1111 << 5)
        if number % 6 == 0:
            looks.append(look ^ 0b1111 << 5 ^ 0b1111 << 30)
        if number % 6 == 1:
            looks.append(look)
    return [looks[i] for i in rng.permutation(len(looks))]


def fine_tune(answer: Callable[..., Any], rows: Sequence[Row] | None = None) -> None:
    """A whole tuning, measured: the parts, the adapter in the folder, and the numbers that it claims."""
    rows, old = my_rows() if rows is None else rows, old_rows(OLD_SCENES, 31)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "adapter"
        result = call(answer, list(rows), list(old), folder)
        expect(isinstance(result, dict), f"return a dict, not a {type(result).__name__}")
        missing = [key for key in ("train", "test", "new", "old before", "old after") if key not in result]
        expect(not missing, f"the dict has no key {', '.join(map(repr, missing))}")
        _check_parts(result, rows)
        expect(
            (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file(),
            "there is no adapter in the folder: `adapter.save(folder)` writes its two files",
        )
        try:
            files = read_adapter(folder)
            model, processor = load()
            before = exact(model, processor, old)
            put_on(model, files)
        except InputError as error:
            raise NotYet(f"the shipped model cannot wear the adapter in the folder: {error}") from None
    moved = max(float(parts["lora_B"].abs().max()) for parts in files.tensors.values())
    expect(
        moved > 0, "B is zero in every layer of the folder: save the adapter after the training, not before"
    )
    on_test = exact(model, processor, [rows[i] for i in result["test"]])
    on_train = exact(model, processor, [rows[i] for i in result["train"]])
    after, others = exact(model, processor, old), exact(model, processor, corner_rows(48, 77))
    step = 1.5 / min(len(result["test"]), len(old))  # a row that is close to a tie may fall either way

    def claims(key: str, value: float) -> bool:
        return isinstance(result[key], int | float) and abs(float(result[key]) - value) <= step

    if not claims("new", on_test):
        told = f'"new" is {result["new"]}, and the adapter in the folder gets {on_test:.2f} of the test part'
        if claims("new", on_train):
            raise NotYet(f"{told}. Its share of the training part is {on_train:.2f}: did you measure there?")
        raise NotYet(
            f"{told}. Did something besides the adapter learn? Freeze the model before `new_adapter`"
        )
    if not claims("old before", before):
        hint = ". That is what it gets with the adapter" if claims("old before", after) else ""
        raise NotYet(f'"old before" is {result["old before"]}, and the model alone gets {before:.2f}{hint}')
    if not claims("old after", after):
        hint = ". That is the model without the adapter" if claims("old after", before) else ""
        raise NotYet(f'"old after" is {result["old after"]}, and the tuned model gets {after:.2f}{hint}')
    enough = f"the tuned model gets {others:.2f} of new pictures right"
    expect(others >= NEEDED, f"{enough}, less than {NEEDED}: more steps, or another rate? Look at the losses")
    expect(
        after >= KEPT,
        f"{enough}, and of the old questions only {after:.2f}, of {before:.2f}: a lower rate forgets less",
    )
    right("no leak, an adapter that anyone can put on, and two numbers that hold when measured again.")


def _check_parts(result: dict[str, Any], rows: Sequence[Row]) -> None:
    """Raises NotYet: the parts overlap, are too small, or share pictures that look alike."""
    train, test = (set(map(int, result[key])) for key in ("train", "test"))
    expect(not train & test, "some rows are in both parts")
    expect(len(test) >= 0.1 * len(rows), "the test part has less than a tenth of the rows")
    expect(len(train) >= 0.5 * len(rows), "the training part has less than half of the rows")
    looks = [perceptual_hash(row.picture) for row in rows]
    across = [
        (i, j) for i in sorted(train) for j in sorted(test) if (looks[i] ^ looks[j]).bit_count() <= ALIKE
    ]
    expect(
        not across,
        f"{len(across)} pairs of rows look alike across the parts, such as {across[:1]}: "
        "split the groups of exercise 5, not the rows",
    )


def near_copy(picture: Image.Image, seed: int) -> Image.Image:
    """The picture, a little brighter or darker, with other noise: what a second shot would be."""
    rng = np.random.default_rng(seed)
    pixels = (
        np.asarray(picture).astype(np.float64) + rng.integers(-12, 13) + rng.normal(0, 3, (*picture.size, 3))
    )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def my_rows() -> list[Row]:
    """Sixty rows of the new task, and a second shot of every third."""
    rows = corner_rows(60, 0)
    copies = [row._replace(picture=near_copy(row.picture, i)) for i, row in enumerate(rows) if i % 3 == 0]
    return rows + copies
