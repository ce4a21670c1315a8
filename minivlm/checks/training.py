"""Checks for 07_training: predictions, packed mask and loss, gradients in parts, groups, a bug to find."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.checks import call, expect, expect_tensor, right, same
from minivlm.models.paligemma import PaliGemma, PaliGemmaConfig
from minivlm.text.gemma import GemmaConfig
from minivlm.vision.siglip import SiglipVisionConfig

Questions = Sequence[tuple[list[int], list[int]]]  # ids of a prompt and of its answer

# Two image tokens and two questions, each of two prompt and two answer tokens; then one question and padding.
BLOCKS = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, -1, -1, -1, -1]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 0, 0, 0, 0]])
PACKED_TYPES = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]])


class solutions:
    """The solutions that the notebook continues with."""

    @staticmethod
    def predictions() -> dict[str, int | float | str]:
        """Six predictions about the row `what color is the square ?` with the answer `orange`."""
        return {
            "places": 36 + 8 + 2,  # the picture; <bos>, six words and the newline; orange and <eos>
            "with a loss": 2,
            "reads at the first": "\\n",
            "reads at the last": "orange",
            "with a loss, if padded to 48 places": 2,
            "loss of guessing": 7.4,  # log(1598)
        }

    @staticmethod
    def packed_mask(blocks: Tensor, positions: Tensor, token_type_ids: Tensor) -> Tensor:
        """[R, S], [R, S], [R, S] -> [R, S, S], True where the query (row) may look at the key (column)."""
        sees_image = (blocks == 0)[:, None, :]
        own_block = blocks[:, :, None] == blocks[:, None, :]
        in_the_past = positions[:, None, :] <= positions[:, :, None]
        is_prompt = (token_type_ids == 0)[:, None, :]
        return sees_image | (own_block & (in_the_past | is_prompt))

    @staticmethod
    def packed_loss(model: PaliGemma, features: Tensor, questions: Questions) -> Tensor:
        """Image features [1, N, D] and (prompt, answer) ids -> mean loss over the tokens of all answers."""
        front = features.shape[1]
        ids: list[int] = []
        labels: list[int] = []
        blocks, positions, types = [0] * front, list(range(front)), [0] * front
        for number, (prompt, answer) in enumerate(questions, start=1):
            length = len(prompt) + len(answer)
            ids += [*prompt, *answer]
            labels += [-100] * len(prompt) + answer
            blocks += [number] * length
            positions += range(front, front + length)
            types += [0] * len(prompt) + [1] * len(answer)
        places = torch.tensor([positions])
        mask = solutions.packed_mask(torch.tensor([blocks]), places, torch.tensor([types]))
        embeds = torch.cat([features, model.language_model.embed(torch.tensor([ids]))], dim=1)
        hidden = model.language_model(embeds, places, mask[:, None])
        return F.cross_entropy(model.logits(hidden[0, front - 1 : -1]), torch.tensor(labels))

    @staticmethod
    def backward_in_parts(
        loss_of: Callable[[dict[str, Tensor]], Tensor], parts: Sequence[dict[str, Tensor]]
    ) -> float:
        """Gradients of the mean loss over all answer tokens of the parts; returns that loss."""
        tokens = [int((part["labels"] != -100).sum()) for part in parts]
        total = 0.0
        for part, count in zip(parts, tokens, strict=True):
            loss = loss_of(part) * (count / sum(tokens))
            loss.backward()
            total += loss.item()
        return total

    @staticmethod
    def rate_groups(model: nn.Module, rate: float, tower_factor: float) -> list[dict[str, Any]]:
        """Groups for an optimizer: the tower's parameters at rate * tower_factor, all others at rate."""
        tower: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (tower if name.startswith("vision_tower.") else others).append(parameter)
        return [{"params": tower, "lr": rate * tower_factor}, {"params": others, "lr": rate}]

    @staticmethod
    def find_the_bug() -> str:
        """Alone, a question's loss is right. Behind another it is not, whatever words the other has."""
        return "positions"


NEWLINE = ("\n", "\\n", "newline")
PREDICTED: dict[str, tuple[tuple[int | float | str, ...], str]] = {
    "places": (
        (46,),
        "count the 36 tokens of the picture, <bos>, six words, the newline, and then orange and <eos>",
    ),
    "with a loss": (
        (2,),
        "only the tokens of the answer have labels, and <eos> is one of them: without it, a model never "
        "learns to stop",
    ),
    "reads at the first": (
        NEWLINE,
        "a place is asked for the token after it, so orange has its loss where the last token of the prompt "
        "is read",
    ),
    "reads at the last": (
        ("orange",),
        "at <eos> nothing more is asked: the last loss is where <eos> has to be said, one place before it",
    ),
    "with a loss, if padded to 48 places": (
        (2,),
        "padding has the label -100, and changes nothing",
    ),
    "loss of guessing": (
        (math.log(1598),),
        "the loss is -log of the chance of the right word, here -log(1/1598), with the natural logarithm",
    ),
}


def predictions(answer: Callable[[], dict[str, Any]]) -> None:
    """Exercise 1."""
    found = call(answer)
    expect(isinstance(found, dict), f"return a dict of predictions: yours is a {type(found).__name__}")
    missing = [name for name in PREDICTED if name not in found]
    expect(not missing, f"these predictions are missing, spelled like this: {', '.join(missing)}")
    wrong = []
    for name, (rights, why) in PREDICTED.items():
        predicted = found[name]
        if isinstance(rights[0], str):
            agrees = isinstance(predicted, str) and (predicted.strip(" '\"<>") or predicted) in rights
        else:
            is_number = isinstance(predicted, int | float)
            agrees = is_number and abs(predicted - rights[0]) < (0.06 if name == "loss of guessing" else 0.5)
        if not agrees:
            wrong.append(f"{name}, not {predicted!r}: {why}")
    expect(not wrong, "; ".join(wrong))
    right("46 places pass through the model, and two of them are asked for something.")


def packed_mask(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 2."""
    result = call(answer, BLOCKS.clone(), POSITIONS.clone(), PACKED_TYPES.clone())
    expect(isinstance(result, Tensor), f"expected a tensor, got a {type(result).__name__}")
    expect(
        tuple(result.shape) == (2, 10, 10),
        f"the mask has shape {list(result.shape)}, expected [2, 10, 10]: row, query, key",
    )
    expect(result.dtype == torch.bool, f"the mask has dtype {result.dtype}, expected torch.bool")
    real = BLOCKS >= 0

    def alike(other: Tensor) -> bool:
        return torch.equal(result[real], other[real])  # what padding looks at does not matter

    image = (BLOCKS == 0)[:, None, :]
    own = BLOCKS[:, :, None] == BLOCKS[:, None, :]
    past = POSITIONS[:, None, :] <= POSITIONS[:, :, None]
    prompt = (PACKED_TYPES == 0)[:, None, :]
    reference = solutions.packed_mask(BLOCKS, POSITIONS, PACKED_TYPES)
    expect(
        not alike(own & (past | prompt)),
        "no question sees the picture: every query may look at keys of block 0",
    )
    expect(
        not alike(image | own),
        "the tokens of an answer see each other in both directions, and so their own labels: within an "
        "answer, only the past may be seen",
    )
    expect(
        not alike(image | (own & past)),
        "the tokens of a prompt see only their past: within a question, every token sees the prompt",
    )
    expect(
        not alike(image | (own & ((POSITIONS[:, None, :] < POSITIONS[:, :, None]) | prompt))),
        "a token of an answer does not see itself: its own position belongs to its past, use <=",
    )
    expect(
        not alike(image | (own & ((POSITIONS[:, None, :] >= POSITIONS[:, :, None]) | prompt))),
        "an answer sees its future and not its past: the key (axis 2) has to be at or before the query",
    )
    expect(
        not alike(image | (own & (past | ~prompt))),
        "the answer is visible to its whole question and the prompt is not: type 0 is the prompt",
    )
    expect(
        not alike(reference.mT),
        "rows and columns are swapped: queries are axis 1 (blocks[:, :, None]), keys are axis 2",
    )
    keys = real[:, None, :].expand_as(result)
    others = keys & ~own & ~image & (BLOCKS > 0)[:, :, None]
    expect(
        not bool((result & others).any()),
        "a question sees another question of its row: both have the same positions, so the blocks have to "
        "be compared as well",
    )
    expect(
        not bool((result & ~keys)[real].any()),
        "real tokens see padding: it has block -1, so comparing blocks hides it, unless something else "
        "lets it through",
    )
    from_image = (BLOCKS == 0)[:, :, None] & ~image
    expect(
        not bool((result & from_image).any()),
        "the picture sees a question: what it takes from one would be seen by all the others",
    )
    expect_tensor(result[real], reference[real], "the mask at the rows of real tokens")
    right("every question sees the picture and itself, as if it stood in the row alone.")


SUSPECTS = {
    "blocks": "a question sees the others of its row",
    "positions": "positions go on counting through the row",
    "shift": "the labels are not shifted by one",
    "leak": "an answer sees its own future",
    "prompt": "the prompt has a loss as well",
    "eos": "<eos> has no label",
    "picture": "the picture sees the questions",
}


def _losses(model: PaliGemma, features: Tensor, questions: Questions, fault: str = "") -> list[Tensor]:
    """For each question of a row the losses of its labels, with a mistake."""
    front = features.shape[1]
    columns: list[tuple[int, int, int, int, int]] = []  # token, label, block, position, type
    for number, (prompt, answer) in enumerate(questions, start=1):
        start = front + len(columns) if fault == "positions" else 0 if fault == "zero" else front
        for place, token in enumerate([*prompt, *answer]):
            of_prompt = place < len(prompt)
            last = place == len(prompt) + len(answer) - 1
            unlabeled = (of_prompt and fault != "prompt") or (last and fault == "eos")
            columns.append((token, -100 if unlabeled else token, number, start + place, 1 - of_prompt))
    text = torch.tensor(columns).T
    ids, labels = text[0], text[1]
    image = torch.arange(front)
    zeros = torch.zeros_like(image)
    blocks, positions = torch.cat([zeros, text[2]]), torch.cat([image, text[3]])
    is_prompt = torch.cat([zeros, text[4]]) == 0
    own = (blocks[:, None] == blocks[None]) | (fault == "blocks")
    past = positions[None] <= positions[:, None]
    if fault == "picture":
        own = own | (blocks == 0)[:, None]
    mask = own & (past | (is_prompt[None] & (fault != "causal")) | (fault == "leak"))
    mask = mask | ((blocks == 0)[None] & ((blocks > 0)[:, None] | past | (fault != "causal")))
    scale = features.shape[-1] ** 0.5 if fault == "scale" else 1.0
    embeds = torch.cat([features * scale, model.language_model.embed(ids[None])], dim=1)
    hidden = model.language_model(embeds, positions[None], mask[None, None])[0]
    back = {"shift": 0, "twice": 2}.get(fault, 1)
    each = F.cross_entropy(
        model.logits(hidden[front - back : len(hidden) - back]), labels, ignore_index=-100, reduction="none"
    )
    return [each[(text[2] == n) & (labels != -100)] for n in range(1, len(questions) + 1)]


def broken_losses(model: PaliGemma, features: Tensor, questions: Questions) -> list[float]:
    """The mean loss of each question in one packed row. Something is wrong with it: exercise 6."""
    with torch.no_grad():
        return [one.mean().item() for one in _losses(model, features, questions, _HIDDEN)]


_HIDDEN = "positions"

# What the loss is with a mistake, and what to do about it.
_FAULTS = {
    "blocks": "the questions see each other: give each a block number, and let tokens see their own block",
    "positions": "positions go on counting from question to question: each starts anew, behind the picture",
    "zero": "the text's positions start at 0, as the picture's do: the first is N, the number of features",
    "shift": "the labels are not shifted: the token at text place t is predicted one place before it",
    "twice": "the labels are shifted twice: the first word of an answer is predicted at the newline",
    "prompt": "the prompts have a loss as well: their labels are -100",
    "eos": "<eos> has no loss: it is the last token of each answer, and has a label like the others",
    "leak": "an answer sees its own future, and so the token that it has to say: only its past may be seen",
    "causal": "picture and prompts are causal: only the answers are, as in packed_mask",
    "picture": "the picture sees the questions: what it takes from one is seen by all the others",
    "scale": "the features are multiplied by the root of the width: in `embed`, words are, pictures not",
}


@cache
def _small_model() -> PaliGemma:
    """Random weights that are large enough for every mistake to show."""
    model = PaliGemma(
        PaliGemmaConfig(
            vision=SiglipVisionConfig(
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=4,
                patch_size=2,
            ),
            text=GemmaConfig(
                hidden_size=12,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=6,
                vocab_size=20,
                max_position_embeddings=64,
            ),
            image_token_id=20,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=1,
        )
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    return model


QUESTIONS = [([2, 5, 9, 6], [11, 1]), ([2, 7, 6], [12, 13, 14, 1]), ([2, 8, 4, 10, 6], [15, 3, 1])]


def packed_loss(answer: Callable[[PaliGemma, Tensor, Questions], Tensor]) -> None:
    """Exercise 3."""
    model = _small_model()
    features = torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    passes: list[int] = []
    counter = model.language_model.register_forward_hook(lambda *_: passes.append(1))
    try:
        result = call(answer, model, features, [(list(prompt), list(reply)) for prompt, reply in QUESTIONS])
    finally:
        counter.remove()
    kind = type(result).__name__
    expect(
        isinstance(result, Tensor), f"return the loss as a tensor, so that it has a gradient: got a {kind}"
    )
    expect(
        result.numel() == 1,
        f"the loss has shape {list(result.shape)}: it is one number, the mean over the answers' tokens",
    )
    expect(
        len(passes) == 1,
        f"the decoder ran {len(passes)} times: put all questions into one row, and run it once",
    )
    with torch.no_grad():
        for fault, hint in _FAULTS.items():
            each = _losses(model, features, QUESTIONS, fault)
            expect(not same(result.flatten()[0], torch.cat(each).mean()), hint)
        each = _losses(model, features, QUESTIONS)
    means = torch.stack([one.mean() for one in each])
    expect(
        not same(result.flatten()[0], means.mean()),
        "every question counts alike, however long its answer: take one mean over all tokens of the answers",
    )
    total = torch.cat(each).sum()
    expect(
        not same(result.flatten()[0], total)
        and not same(result.flatten()[0], means.sum())
        and not same(
            result.flatten()[0], total / sum(len(prompt) + len(reply) for prompt, reply in QUESTIONS)
        ),
        "the right losses, summed or divided by another number: divide by the number of answer tokens, as "
        "F.cross_entropy does when the other labels are -100",
    )
    expect(
        same(result.flatten()[0], torch.cat(each).mean(), 1e-4),
        f"the loss is {result.item():.3f}, expected {torch.cat(each).mean().item():.3f}, and it is none of "
        "the usual mistakes: compare a row of one question first, then a row of two",
    )
    expect(
        result.requires_grad,
        "the loss is right, but no gradient can flow back from it: no .item(), .detach() or torch.no_grad()",
    )
    right("three questions, one picture, one pass, and each has the loss that it would have alone.")


class _Parts(nn.Module):
    """The three parts of a PaliGemma by name, and one frozen table."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.ModuleDict({"patch": nn.Linear(3, 4), "block": nn.Linear(4, 4)})
        self.multi_modal_projector = nn.Linear(4, 5)
        self.language_model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(6, 5),
                "block": nn.Linear(5, 5),
                "vision_tower_norm": nn.LayerNorm(5),  # of the decoder, whatever its name holds
            }
        )
        self.language_model["embed_tokens"].requires_grad_(False)


def rate_groups(answer: Callable[[nn.Module, float, float], list[dict[str, Any]]]) -> None:
    """Exercise 5."""
    model, rate, factor = _Parts(), 0.01, 0.3
    groups = call(answer, model, rate, factor)
    expect(
        isinstance(groups, list | tuple)
        and all(isinstance(group, dict) and {"params", "lr"} <= group.keys() for group in groups),
        'return a list of dicts with the keys "params" and "lr", as torch.optim.AdamW takes them',
    )
    expect(
        len(groups) == 2,
        f"expected two groups, first the tower's, then that of all others: yours are {len(groups)}",
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates: dict[str, float] = {}
    for group in groups:
        group["params"] = list(group["params"])
        for parameter in group["params"]:
            expect(
                isinstance(parameter, nn.Parameter) and id(parameter) in names,
                'the "params" of a group are the parameters themselves, not their names or modules',
            )
            name = names[id(parameter)]
            expect(name not in rates, f"{name} is in two groups: an optimizer would refuse that")
            rates[name] = group["lr"]
    expect(
        not any(name.startswith("language_model.embed_tokens") for name in rates),
        "a frozen parameter is in a group: leave out those whose requires_grad is False",
    )
    wanted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    missing = [name for name in wanted if name not in rates]
    expect(
        not any("projector" in name for name in missing),
        "the projector is in no group, and would not be trained: everything outside the tower belongs "
        "together",
    )
    expect(not missing, f"these parameters are in no group, and would not be trained: {', '.join(missing)}")
    of_tower = {rates[name] for name in wanted if name.startswith("vision_tower.")}
    of_others = {rates[name] for name in wanted if not name.startswith("vision_tower.")}
    expect(
        not (of_tower == {rate} and of_others == {rate * factor}),
        "the rates are swapped: the tower is the slow one, and all others learn at the full rate",
    )
    stray = {rates[name] for name in wanted if name.startswith("language_model.vision_tower_norm")}
    rest = {rates[name] for name in wanted if not name.startswith(("vision_tower.", "language_model.vision"))}
    expect(
        not (stray == of_tower and rest == {rate} and of_tower != {rate}),
        "language_model.vision_tower_norm is in the tower's group, and belongs to the decoder: ask how a "
        'name begins, name.startswith("vision_tower."), and not what it holds',
    )
    expect(of_tower != {rate}, "the tower's rate is not lowered: it is rate * tower_factor")
    expect(
        of_tower != {factor},
        f"the tower's rate is the factor itself, {factor}: multiply the factor by the rate",
    )
    expect(
        all(abs(one - rate * factor) < 1e-12 for one in of_tower),
        f"the tower's rates are {sorted(of_tower)}, expected rate * tower_factor = {rate * factor:.4g}",
    )
    expect(
        of_others == {rate},
        f"outside the tower the rates are {sorted(of_others)}, expected {rate}: the projector learns as fast "
        "as the decoder",
    )
    expect(
        groups[0]["lr"] != rate,
        "the rates are right, but the tower's group comes second: the notebook gives the first one a warm-up "
        "of its own",
    )
    right("each parameter that learns is in one group, and only the tower is slow.")


class _Saved:
    """A tensor that waits for a backward pass. It lives as long as that may come."""

    def __init__(self, tensor: Tensor, part: int) -> None:
        self.tensor, self.part = tensor, part


def backward_in_parts(answer: Callable[..., float]) -> None:
    """Exercise 4."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([[-100, -100, 1, 3], [-100, -100, -100, 2], [-100, 0, 2, 1], [-100, 3, -100, -100]])
    x = torch.randn(4, 4, 5, generator=generator)
    parts = [{"x": x[rows], "labels": labels[rows]} for rows in (slice(0, 1), slice(1, 3), slice(3, 4))]
    weight = torch.randn(5, 4, generator=generator).requires_grad_()
    waiting: weakref.WeakSet[_Saved] = weakref.WeakSet()
    calls: list[int] = []  # how many other parts were in memory at each
    rows: list[int] = []

    def plain_loss_of(part: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy((part["x"] @ weight).flatten(0, 1), part["labels"].flatten())

    def loss_of(part: dict[str, Tensor]) -> Tensor:
        number = len(calls)
        calls.append(len({saved.part for saved in waiting}))
        rows.append(len(part["labels"]))

        def pack(tensor: Tensor) -> _Saved:
            saved = _Saved(tensor.detach(), number)  # without its graph, which would hold itself
            waiting.add(saved)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            return plain_loss_of(part)

    def gradient(shares: Sequence[float]) -> Tensor:
        losses = [plain_loss_of(part) * share for part, share in zip(parts, shares, strict=True)]
        return torch.autograd.grad(torch.stack(losses).sum(), weight)[0]

    counts = [2, 4, 1]
    all_ = sum(counts)
    expected = [count / all_ for count in counts]
    result = call(answer, loss_of, parts)
    found = weight.grad
    expect(
        max(rows, default=0) <= 2,
        "the parts are put together again, into the batch that does not fit: call loss_of on one at a time",
    )
    if found is None:
        expect(False, "no gradient has arrived: call backward on the loss of each part")
        return
    expect(
        max(calls) == 0,
        "when the next part began, all that the one before had saved for its backward pass was still in "
        "memory: call backward on each loss at once, not on their sum, and without retain_graph",
    )
    known: dict[str, Sequence[float]] = {
        "the gradients of the parts are added up as they are, so more parts make a larger step: scale each "
        "loss by its share of the answer tokens": [1, 1, 1],
        "every part counts for a third, so a token of a short answer counts for more than one of a long "
        "answer: scale by the number of labels that are not -100": [1 / 3] * 3,
        "each loss is multiplied by its number of tokens, but never divided by the total number": counts,
        "the shares count all labels, or rows, and so prompts and padding too: count the labels that are not "
        "-100": [1 / 4, 1 / 2, 1 / 4],
        "the shares count the labels that are -100: those are the others": [2 / 9, 4 / 9, 3 / 9],
        "each share is divided by the number of parts as well: the shares sum to 1 already": [
            share / 3 for share in expected
        ],
        "each loss is divided by its number of tokens: loss_of has done that, so multiply by it, and divide "
        "by the total": [1 / count for count in counts],
    }
    for hint, shares in known.items():
        expect(not same(found, gradient(shares)), hint)
    last = torch.autograd.grad(plain_loss_of(parts[-1]), weight)[0]
    expect(
        not any(same(found, last * share) for share in (1, 1 / 3, expected[-1])),
        "only the last part has left a gradient: call backward for each, and never zero_grad",
    )
    factors = (found / gradient(expected)).flatten()
    expect(
        not same(factors, factors[:1].expand_as(factors), 1e-3) or abs(factors[0].item() - 1) < 1e-3,
        f"the gradient is {factors[0].item():.2f} times the right one: the shares of the parts sum to 1",
    )
    expect_tensor(found, gradient(expected), "the gradient")
    wanted = sum(plain_loss_of(part).item() * share for part, share in zip(parts, expected, strict=True))
    expect(
        abs(float(result) - wanted) < 1e-5,
        f"the gradient is right, but the loss that you return is {float(result):.4f}: the mean over all "
        f"answer tokens is {wanted:.4f}",
    )
    right("in parts or at once the gradient is the same, and one part at a time is in memory.")


_SEEN_INSTEAD = {
    "blocks": "then another word in the first question would move the loss of the second, and it does not",
    "shift": "then the loss of a question alone in its row would differ from packed_loss, and it does not",
    "leak": "then a question alone in its row would have a smaller loss than by packed_loss: it has the same",
    "prompt": "then a question alone in its row would have another loss than by packed_loss: it has the same",
    "eos": "then a question alone in its row would have another loss than by packed_loss: it has the same",
    "picture": "then another word in the first question would reach the second by way of the picture, and "
    "its loss would move: it does not",
}


def find_the_bug(answer: Callable[[], str]) -> None:
    """Exercise 6."""
    found = call(answer)
    expect(
        isinstance(found, str),
        f"return the name of one suspect as text, such as 'shift': yours is a {type(found).__name__}",
    )
    name = found.strip().lower()
    expect(name in SUSPECTS, f"{found!r} is no suspect: choose one of {', '.join(SUSPECTS)}")
    expect(name == _HIDDEN, f"it is not {name!r}: {_SEEN_INSTEAD.get(name, '')}")
    right(
        "alone each question is right, and no other can be seen: its place in the row is what moves its loss."
    )
