"""Checks for 09_looking_inside: attention distance, rollout, predicted cuts, planted vectors, a lost part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.checks import call, expect, expect_tensor, right, same
from minivlm.evaluation import make_questions
from minivlm.looking import measures
from minivlm.models.load import load
from minivlm.models.paligemma import PaliGemma, PaliGemmaConfig
from minivlm.processing import Processor
from minivlm.text.gemma import GemmaConfig
from minivlm.vision.siglip import SiglipVisionConfig

PARTS = {"attention": "self_attn", "mlp": "mlp"}

# What the shipped model does when a wire is cut, and why.
CUTS = {
    "writer - picture, layer 2": (
        "most",
        "this is where most of the answers get their color from, as the pointing game of section 5 says",
    ),
    "writer - picture, layers 1, 3 and 4": (
        "few",
        "a row of attention has to sum to 1, and in layer 3 most of what the writer sees there is empty "
        "ground: much attention is no sign of much information",
    ),
    "SHAPE - picture, layer 1": (
        "few",
        "it points at the right thing in every picture, but the answer does not need what it saw there",
    ),
    "color - picture, all layers": (
        "few",
        "the word says what is asked for, and the color itself need not pass through it: it seldom points "
        "at the thing",
    ),
    "patches - words, all layers": (
        "few",
        "the image tokens have the colors from the tower: they may read the question, but no answer needs "
        "that",
    ),
}

LAYERS_OF_CUTS = {  # counted from 0
    "writer - picture, layer 2": [1],
    "writer - picture, layers 1, 3 and 4": [0, 2, 3],
    "SHAPE - picture, layer 1": [0],
    "color - picture, all layers": [0, 1, 2, 3],
    "patches - words, all layers": [0, 1, 2, 3],
}


class solutions:
    """The solutions that the notebook continues with, the package's own where it has them."""

    attention_distance = staticmethod(measures.attention_distance)
    attention_rollout = staticmethod(measures.attention_rollout)

    @staticmethod
    def expected_cuts() -> dict[str, str]:
        """For each cut, whether "few" answers change (fewer than half) or "most"."""
        return {name: expected for name, (expected, _) in CUTS.items()}

    @staticmethod
    def swapped(
        model: PaliGemma, inputs: dict[str, Tensor], states: Sequence[Tensor], layer: int, where: Tensor
    ) -> Tensor:
        """Logits of the last token [B, V], with other vectors after a block where `where` [B, S] is True."""

        def plant(block: nn.Module, arguments: Any, output: Tensor) -> Tensor:
            return torch.where(where[..., None], states[layer], output)

        hook = model.language_model.layers[layer].register_forward_hook(plant)
        try:
            return model(**inputs).logits[:, -1]
        finally:
            hook.remove()

    @staticmethod
    def find_fault(healthy: PaliGemma, patient: PaliGemma, inputs: dict[str, Tensor]) -> tuple[int, str]:
        """The block, counted from 0, and its part, "attention" or "mlp", at which two models first differ."""
        outputs = [_outputs_of_parts(model, inputs) for model in (healthy, patient)]
        for number, (ours, theirs) in enumerate(zip(*outputs, strict=True)):
            if not torch.equal(ours, theirs):
                return number // 2, list(PARTS)[number % 2]
        raise ValueError("the two models compute the same")


def patient(model: PaliGemma, layer: int = 1, part: str = "attention", in_weights: bool = False) -> PaliGemma:
    """A copy of a model in which one part of one block of the decoder adds nothing."""
    broken = copy.deepcopy(model)
    lost = getattr(broken.language_model.layers[layer], PARTS[part])
    if in_weights:
        last = lost.o_proj if part == "attention" else lost.down_proj
        last.weight.data.zero_()
    else:
        lost.register_forward_hook(lambda module, arguments, output: torch.zeros_like(output))
    return broken


def _outputs_of_parts(model: PaliGemma, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What the attention and the MLP of each block add, in the order of computation."""
    kept: list[Tensor] = []
    hooks = [
        getattr(block, name).register_forward_hook(lambda module, arguments, output: kept.append(output))
        for block in model.language_model.layers
        for name in PARTS.values()
    ]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def _small_model() -> tuple[PaliGemma, dict[str, Tensor], dict[str, Tensor]]:
    """A random model with four blocks, and two inputs of two pictures with the same prompts."""
    vision = SiglipVisionConfig(16, 32, 1, 2, image_size=16, patch_size=8)
    text = GemmaConfig(16, 32, 4, 2, 1, 8, vocab_size=30)
    ids = torch.tensor([[29, 29, 29, 29, 2, 5, 6, 7], [29, 29, 29, 29, 2, 5, 8, 7]])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PaliGemma(PaliGemmaConfig(vision, text, image_token_id=29)).eval()
        for name, weight in model.language_model.layers.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.data *= 4 ** int(name.split(".")[0])  # differences grow on their way
        ours, theirs = ({"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(2))
    return model, ours, theirs


def _states(model: PaliGemma, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The vectors after each block."""
    kept: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, arguments, output: kept.append(output))
        for block in model.language_model.layers
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return kept


def _maps(*shape: int, seed: int = 0) -> Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).softmax(dim=-1)


def attention_distance(answer: Callable[[Tensor], Tensor]) -> None:
    """Exercise 1."""
    weights = _maps(2, 3, 9, 9)
    reference = measures.attention_distance(weights)
    result = call(answer, weights.clone())
    distances = measures.patch_distances(9)
    numbers = torch.arange(9.0)
    along_the_line = (numbers[:, None] - numbers).abs()
    expect(
        not same(result, (weights * along_the_line).sum(dim=-1).mean(dim=(0, 2))),
        "you took the difference of the patches' numbers: patch 2 and patch 3 of a 3 x 3 grid are not "
        "neighbors, since a new row begins between them",
    )
    expect(
        not same(result, (weights * distances).sum(dim=(0, 2, 3))),
        "you summed over the patches that look and over the pictures: average over them",
    )
    expect(
        not same(result, (weights * distances).mean(dim=(0, 2, 3))),
        "you averaged over the patches that are seen: the weights already sum to 1, so sum over them",
    )
    expect(
        not same(result, (weights * distances).sum(dim=(2, 3)).mean(dim=0)),
        "you summed over the patches that look: each has weights that sum to 1, so take the mean over them",
    )
    expect(
        not same(result, (weights * distances).sum(dim=-1).mean()),
        "you averaged over the heads as well: each head gets its own number",
    )
    expect(
        not same(result, (weights * distances.square()).sum(dim=-1).mean(dim=(0, 2))),
        "your distances are squared: take the root of the sum of the squares",
    )
    shape = tuple(getattr(result, "shape", (3,)))
    expect(
        shape not in ((2,), (9,)),
        f"you get {shape[0]} numbers, and there are three heads: average over the pictures (axis 0) and the "
        "patches that look (axis 2), and keep the heads (axis 1)",
    )
    expect(
        shape not in ((3, 9), (2, 3)),
        f"your result has shape {list(shape)}: one more average, so that each head has a single number",
    )
    expect(
        not same(result, distances.mean().expand(3)),
        "these are the distances of the grid alone: multiply them by the weights",
    )
    expect(
        not same(
            result, distances.gather(1, weights.argmax(dim=-1).flatten(0, 1).T).T.view(2, 3, 9).mean((0, 2))
        ),
        "you took the distance to the patch that is seen most: all patches count, each with its weight",
    )
    expect(
        not same(result, (weights * (distances**2)).sum(dim=-1).mean(dim=(0, 2)).sqrt()),
        "you averaged the squares and took the root at the end: take the root of each distance first",
    )
    steps = _city_blocks(3)
    expect(
        not same(result, (weights * steps).sum(dim=-1).mean(dim=(0, 2))),
        "you added the steps down and the steps across: the straight line is shorter (Pythagoras)",
    )
    expect_tensor(result, reference, "the distance of the heads")
    larger = call(answer, _maps(1, 2, 16, 16))
    expect_tensor(larger, measures.attention_distance(_maps(1, 2, 16, 16)), "the distance on a grid of 4 x 4")
    right("one number a head, in patches, on any square grid.")


def _city_blocks(side: int) -> Tensor:
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    return torch.cdist(places, places, p=1)


def attention_rollout(answer: Callable[[Sequence[Tensor]], Tensor]) -> None:
    """Exercise 3."""
    maps = [_maps(2, 3, 4, 4, seed=layer) for layer in range(3)]
    reference = measures.attention_rollout(maps)
    result = call(answer, [layer.clone() for layer in maps])
    expect(
        not same(result, measures.attention_rollout(maps[::-1])),
        "the layers are multiplied in the wrong order: the later layer reads what the earlier one wrote, "
        "so it goes on the left, later @ earlier",
    )
    means = [layer.mean(dim=1) for layer in maps]
    expect(
        not same(result, means[2] @ means[1] @ means[0]),
        "the residual path is missing: half of each layer is the identity, 0.5 * attention + 0.5 * I",
    )
    identity = torch.eye(4)
    doubled = [mean + identity for mean in means]
    expect(
        not same(result, doubled[2] @ doubled[1] @ doubled[0]),
        "your rows sum to 8, not to 1: with the identity added, each layer has to be halved",
    )
    elementwise = [0.5 * mean + 0.5 * identity for mean in means]
    expect(
        not same(result, elementwise[2] * elementwise[1] * elementwise[0]),
        "you multiplied element by element: paths through the layers need the matrix product, @",
    )
    half = [0.5 * layer + 0.5 * identity for layer in maps]
    largest = [0.5 * layer.amax(dim=1) + 0.5 * identity for layer in maps]
    total = [0.5 * layer.sum(dim=1) + 0.5 * identity for layer in maps]
    for hint, steps in {
        "you took the largest of the heads, so your rows no longer sum to 1: take their mean": largest,
        "you summed the heads, so your rows sum to more than 1: take their mean": total,
        "the first layer is missing: start from the identity, and multiply by every layer": elementwise[1:],
        "the last layer is missing: multiply by every layer": elementwise[:-1],
        "only the first layer has its residual path: every layer has one": [elementwise[0], *means[1:]],
    }.items():
        expect(not same(result, _product(steps)), hint)
    expect(
        not same(result, reference.mT),
        "rows and columns are exchanged: row i says what token i is made of, and sums to 1",
    )
    expect(
        not same(result, sum(elementwise, torch.zeros(())) / 3),
        "you averaged the layers: information goes through one layer after the other, so multiply them",
    )
    expect(
        not same(result, _product(half).mean(dim=1)),
        "you followed each head through the layers by itself: the heads' outputs are added after each layer, "
        "so take their mean before you multiply",
    )
    expect(
        not same(result, reference.mean(dim=0)),
        "you averaged over the pictures: each has its own rollout",
    )
    expect(
        getattr(result, "ndim", 3) != 4,
        "the result still has a head axis: average over the heads of each layer before you multiply",
    )
    expect_tensor(result, reference, "the rollout")
    right("every row sums to 1, and says which input tokens it is made of.")


def _product(steps: Sequence[Tensor]) -> Tensor:
    result = steps[0]
    for step in steps[1:]:
        result = step @ result
    return result


def share_changed(model: PaliGemma, processor: Processor, name: str, count: int = 25) -> float:
    """The share of answers to "what color is the star?" that one of CUTS changes."""
    asked = [
        question
        for question in make_questions(60, 9, "test", model.config.vision.image_size)
        if question.example.task == "color" and len(question.example.prefix.split()) == 5
    ][:count]
    inputs = processor([q.picture for q in asked], [q.example.prefix for q in asked])
    image = model.config.vision.num_patches
    picture, words = slice(0, image), slice(image, image + 8)
    places: dict[str, slice | int] = {"picture": picture, "patches": picture, "words": words}
    places |= {"color": image + 2, "SHAPE": image + 5, "writer": image + 7}
    looks, seen = (places[word] for word in name.split(",")[0].split(" - "))

    def blinded(block: nn.Module, arguments: Any) -> Any:
        x, bias, *others = arguments
        bias = bias.expand(len(x), -1, -1, -1).clone()
        bias[:, :, looks, seen] = torch.finfo(bias.dtype).min
        return x, bias, *others

    with torch.no_grad():
        before = model(**inputs).logits[:, -1].argmax(dim=-1)
        hooks = [
            model.language_model.layers[layer].register_forward_pre_hook(blinded)
            for layer in LAYERS_OF_CUTS[name]
        ]
        after = model(**inputs).logits[:, -1].argmax(dim=-1)
    for hook in hooks:
        hook.remove()
    return float((before != after).float().mean())


def expected_cuts(
    answer: Callable[[], dict[str, str]],
    model: PaliGemma | None = None,
    processor: Processor | None = None,
    share_of: Callable[..., float] = share_changed,
) -> None:
    """Exercise 3: `share_of` measures how many answers a cut changes, by default of the shipped model."""
    expected = call(answer)
    names = ", ".join(repr(name) for name in CUTS)
    expect(isinstance(expected, dict), f"return a dictionary: one of the five names for each entry, {names}")
    missing = [name for name in CUTS if name not in expected]
    expect(not missing, f"a prediction is missing: {missing[:1]}")
    unknown = [name for name in expected if name not in CUTS]
    expect(not unknown, f"{unknown[:1]} is none of the five cuts: {names}")
    vague = [value for value in expected.values() if value not in ("few", "most")]
    expect(
        not vague,
        f"{vague[:1]} cannot be held against a number: say 'few' (fewer than half of the answers change) or "
        "'most'",
    )
    if model is None or processor is None:
        model, processor = load()
    for name, (usual, why) in CUTS.items():
        share = share_of(model, processor, name)
        found = "most" if share > 0.5 else "few"
        expect(
            expected[name] == found,
            f"{name}: you expect {expected[name]!r}, but {share:.2f} of the answers change. "
            + (
                f"The reason: {why}"
                if found == usual
                else "This model found another way than the one we know"
            ),
        )
    right("one cut of five matters. What a map shows may carry nothing; only a cut could tell.")


def swapped(answer: Callable[..., Tensor]) -> None:
    """Exercise 4."""
    model, inputs, others = _small_model()
    with torch.no_grad():
        states, before = _states(model, others), model(**inputs).logits
        where = torch.zeros(2, 8, dtype=torch.bool)
        where[0, 1:3] = where[1, 5] = True

        def ours(layer: int, where: Tensor, states: Sequence[Tensor] = states) -> Tensor:
            return solutions.swapped(model, inputs, states, layer, where)

        reference = ours(1, where)
        result = call(answer, model, inputs, [state.clone() for state in states], 1, where.clone())
        after = model(**inputs).logits
        expect(
            torch.equal(before, after),
            "the model still answers differently after your function has returned: keep what "
            "`register_forward_hook` returns, and call its `remove()` in a `finally`",
        )
        expect(
            not (isinstance(result, Tensor) and result.dtype == torch.int64),
            "these are ids of words: return the logits, from which the notebook takes the largest itself",
        )
        expect(
            not (isinstance(result, Tensor) and result.shape == before.shape),
            "these are the logits of all tokens: take the last one's, [:, -1], which writes the answer",
        )
        everywhere = torch.ones_like(where)
        first_row = where & torch.tensor([[True], [False]])
        both = where.any(dim=0).expand_as(where)
        mistakes = {
            "nothing was swapped: a hook has to return the new output (or write into it), and it has to take "
            "the vectors from `states`": before[:, -1],
            "everything was swapped, so this is the other picture's own answer: keep the output of the block "
            "where `where` is False": ours(1, everywhere),
            "you swapped where `where` is False: torch.where takes its second argument where True": ours(
                1, ~where
            ),
            "only the first row of the batch was swapped: each row has its own `where`": ours(1, first_row),
            "both rows were swapped at the same places: each row has its own `where`": ours(1, both),
            "you planted one block too late: blocks are counted from 0, as are the `states`": ours(2, where),
            "you planted one block too early: blocks are counted from 0, as are the `states`": ours(0, where),
            "the vectors went into the block, which then changed them: states[layer] is what *leaves* it, so "
            "a forward hook and not a pre-hook": _planted_before(model, inputs, states, 1, where),
            "you added the other vector to the one that was there: replace it": ours(
                1, where, [state + own for state, own in zip(states, _states(model, inputs), strict=True)]
            ),
            "the vectors were planted after every block: only after block `layer`, so that the later ones "
            "can answer to it": _planted_everywhere(model, inputs, states, where),
        }
        for hint, wrong in mistakes.items():
            expect(not same(result, wrong), hint)
        expect_tensor(result, reference, "the logits")
        last = call(answer, model, inputs, states, 3, everywhere)
        expect_tensor(last, model(**others).logits[:, -1], "the logits after the last block")
    right("one vector from another picture, and everything after it is computed anew.")


def _planted_before(
    model: PaliGemma, inputs: dict[str, Tensor], states: Sequence[Tensor], layer: int, where: Tensor
) -> Tensor:
    def plant(block: nn.Module, arguments: Any) -> Any:
        return torch.where(where[..., None], states[layer], arguments[0]), *arguments[1:]

    hook = model.language_model.layers[layer].register_forward_pre_hook(plant)
    logits: Tensor = model(**inputs).logits[:, -1]
    hook.remove()
    return logits


def _planted_everywhere(
    model: PaliGemma, inputs: dict[str, Tensor], states: Sequence[Tensor], where: Tensor
) -> Tensor:
    def planter(state: Tensor) -> Callable[..., Tensor]:
        return lambda block, arguments, output: torch.where(where[..., None], state, output)

    blocks = model.language_model.layers
    hooks = [block.register_forward_hook(planter(state)) for block, state in zip(blocks, states, strict=True)]
    logits: Tensor = model(**inputs).logits[:, -1]
    for hook in hooks:
        hook.remove()
    return logits


def find_fault(answer: Callable[..., tuple[int, str]]) -> None:
    """Exercise 5, tried on patients whose fault is in a hook or in the weights."""
    model, inputs, _ = _small_model()
    faults = [(1, "attention", False), (2, "mlp", True), (1, "mlp", False), (2, "attention", True)]
    found, largest = [], []
    with torch.no_grad():
        own = _outputs_of_parts(model, inputs)
        for fault in faults:
            broken = patient(model, *fault)
            result = call(answer, model, broken, inputs)
            expect(
                isinstance(result, tuple | list) and len(result) == 2,
                'return two things, the number of the block and the name of its part, such as (1, "mlp")',
            )
            found.append(tuple(result))
            there = _outputs_of_parts(broken, inputs)
            gaps = [float((a - b).norm()) for a, b in zip(own, there, strict=True)]
            most = max(range(len(gaps)), key=gaps.__getitem__)
            largest.append((most // 2, list(PARTS)[most % 2]))
    truth = [(layer, part) for layer, part, _ in faults]
    expect(
        not all(isinstance(first, str) for first, _ in found),
        "the number of the block comes first, then the part",
    )
    expect(
        all(part in PARTS for _, part in found),
        f"the part is 'attention' or 'mlp', and you return {found[0][1]!r}",
    )
    expect(
        found != [(layer + 1, part) for layer, part in truth],
        "blocks are counted from 0: yours are one too large",
    )
    expect(
        found != largest,
        "this is where the two models differ *most*. A fault is carried on and grows on its way: look for "
        "the first part whose output differs",
    )
    expect(
        set(found) != {(3, "mlp")},
        "you find the last part of the last block in every patient: it differs because everything after a "
        "fault does. Look for the first part that differs",
    )
    expect(
        found == truth or len(set(found)) > 1,
        f"you find {found[0]} in every patient, and the fault is not always there: measure, with hooks on "
        "`self_attn` and `mlp` of every block",
    )
    where = [layer for layer, _ in found]
    if where == [layer for layer, _ in truth]:
        expect(
            [part for _, part in found] == [part for _, part in truth],
            "the blocks are right, the parts are not: attention comes first in a block, and if its output is "
            "the same in both models, the fault is in the MLP",
        )
    wrong = next((i for i, (a, b) in enumerate(zip(found, truth, strict=True)) if a != b), None)
    expect(
        wrong is None,
        f"in one patient the first part that computes something else is {truth[wrong or 0]}, and you find "
        f"{found[wrong or 0]}. Some faults are in the weights and some are not: compare what the parts put "
        "out, from the first block on, and stop at the first difference",
    )
    right("the first difference is the fault; all later ones are its consequences.")
