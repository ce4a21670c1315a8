"""Checks for 07_training: labels, the packed mask, learning rates and their groups, gradients in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.checks import call, expect, expect_tensor, right, same

# Two image tokens, a prompt that ends with 6 (the newline), an answer that ends with 1 (<eos>); 0 is padding.
IDS = torch.tensor([[7, 7, 2, 3, 4, 6, 5, 8, 1], [7, 7, 2, 4, 6, 5, 1, 0, 0]])
TYPES = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 0, 0]])

# Two image tokens and two questions, each of two prompt and two answer tokens; then one question and padding.
BLOCKS = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, -1, -1, -1, -1]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 0, 0, 0, 0]])
PACKED_TYPES = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]])


class solutions:
    """The solutions that the notebook continues with."""

    @staticmethod
    def make_labels(input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """[B, S], [B, S] -> labels [B, S]: the ids of the answer, -100 elsewhere."""
        return input_ids.masked_fill(token_type_ids == 0, -100)

    @staticmethod
    def packed_mask(blocks: Tensor, positions: Tensor, token_type_ids: Tensor) -> Tensor:
        """[R, S], [R, S], [R, S] -> [R, S, S], True where the query (row) may look at the key (column)."""
        sees_image = (blocks == 0)[:, None, :]
        own_block = blocks[:, :, None] == blocks[:, None, :]
        in_the_past = positions[:, None, :] <= positions[:, :, None]
        is_prompt = (token_type_ids == 0)[:, None, :]
        return sees_image | (own_block & (in_the_past | is_prompt))

    @staticmethod
    def rate_factor(step: int, steps: int, warmup: int) -> float:
        """The fraction of the peak learning rate at a step, counted from 0."""
        return min(1.0, (step + 1) / warmup) * (1.0 - step / steps)

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


def make_labels(answer: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise 1."""
    ids = IDS.clone()
    result = call(answer, ids, TYPES.clone())
    expect(
        torch.equal(ids, IDS),
        "your function writes into the input_ids, which the model still has to read: masked_fill without "
        "the underscore makes a new tensor",
    )
    reference = solutions.make_labels(IDS, TYPES)
    in_prompt = TYPES == 0
    expect(
        not same(result, IDS.masked_fill(~in_prompt, -100)),
        "the prompt has labels and the answer has none: it is the other way around, type 1 is the answer",
    )
    expect(
        not same(result, IDS * TYPES),
        "the prompt is labeled 0, which is a word of the vocabulary: use -100, which F.cross_entropy ignores",
    )
    expect(
        not same(result, IDS)
        and not same(result, IDS.masked_fill(IDS == 7, -100))
        and not same(result, IDS.masked_fill((IDS == 7) | (IDS == 0), -100)),
        "the prompt has labels: the model is not asked to predict it, so use -100 wherever the type is 0",
    )
    moved = F.pad(reference[:, 1:], (0, 1), value=-100)
    expect(
        not same(result, moved) and not same(result, reference.roll(-1, dims=1)),
        "your labels are shifted by one: a label sits at its own token, and the loss does the shift",
    )
    expect(
        not same(result, reference.masked_fill(IDS == 1, -100)),
        "<eos> has no label: it belongs to the answer, and without it the model never learns to stop",
    )
    expect_tensor(result, reference, "labels")
    expect(result.dtype == torch.long, f"labels have dtype {result.dtype}: ids are integers, torch.long")
    right("only the answer has labels, and <eos> is a part of it.")


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


def rate_factor(answer: Callable[[int, int, int], float]) -> None:
    """Exercise 3."""
    steps, warmup = 200, 20
    results = [call(answer, step, steps, warmup) for step in range(steps)]
    expect(
        all(isinstance(one, int | float) for one in results),
        f"expected a number, got a {type(results[0]).__name__}",
    )
    expect(
        results[0] != 0,
        "the first step has rate 0, so its batch is wasted: steps count from 0, use (step + 1) / warmup",
    )
    expect(
        max(results) <= 1.0,
        f"the factor grows to {max(results):.3g}: after the warm-up it stays at 1, use min(1.0, ...)",
    )
    expect(results[-1] != 0, "the last step has rate 0, so its batch is wasted: use step / steps")
    expect(
        results[-1] < 0.5,
        f"at the last step the factor is {results[-1]:.3g}: multiply by 1 - step / steps, which falls to 0",
    )
    expect(
        abs(results[0] - 1 / warmup) < 1e-9,
        f"the factor of the first step is {results[0]:.4g}, expected 1 / warmup = {1 / warmup:.4g}",
    )
    for step, found in enumerate(results):
        expected = solutions.rate_factor(step, steps, warmup)
        expect(
            abs(found - expected) < 1e-9,
            f"at step {step} of {steps} with a warm-up of {warmup} the factor is {found:.4g}, expected "
            f"{expected:.4g}: the product of both lines",
        )
    right("up in a straight line, and down in a straight line to nearly nothing.")


class _Parts(nn.Module):
    """The three parts of a PaliGemma by name, and one frozen table."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.ModuleDict({"patch": nn.Linear(3, 4), "block": nn.Linear(4, 4)})
        self.multi_modal_projector = nn.Linear(4, 5)
        self.language_model = nn.ModuleDict({"embed_tokens": nn.Embedding(6, 5), "block": nn.Linear(5, 5)})
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
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates: dict[str, float] = {}
    for group in groups:
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
    right("each parameter that learns is in one group, and only the tower is slow.")


def backward_in_parts(answer: Callable[..., float]) -> None:
    """Exercise 4."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([[-100, -100, 1, 3], [-100, -100, -100, 2], [-100, 0, 2, 1]])
    x = torch.randn(3, 4, 5, generator=generator)
    parts = [{"x": x[:1], "labels": labels[:1]}, {"x": x[1:2], "labels": labels[1:2]}]
    parts.append({"x": x[2:], "labels": labels[2:]})
    weight = torch.randn(5, 4, generator=generator).requires_grad_()

    def loss_of(part: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy((part["x"] @ weight).flatten(0, 1), part["labels"].flatten())

    def gradient(shares: Sequence[float]) -> Tensor:
        losses = [loss_of(part) * share for part, share in zip(parts, shares, strict=True)]
        return torch.autograd.grad(torch.stack(losses).sum(), weight)[0]

    counts = [2, 1, 3]
    reference = gradient([count / 6 for count in counts])
    result = call(answer, loss_of, parts)
    found = weight.grad
    if found is None:
        expect(False, "no gradient has arrived: call backward on the loss of each part")
        return
    expect(
        not same(found, gradient([1, 1, 1])),
        "the gradients of the parts are added up as they are, so more parts make a larger step: scale each "
        "loss by its share of the answer tokens",
    )
    expect(
        not same(found, gradient([1 / 3] * 3)),
        "every part counts for a third, so a token of a short answer counts for more than one of a long "
        "answer: scale by the number of labels that are not -100",
    )
    expect(
        not same(found, gradient(counts)),
        "each loss is multiplied by its number of tokens, but never divided by the total number",
    )
    expect(
        not same(found, gradient([0, 0, 0.5])) and not same(found, gradient([0, 0, 1])),
        "only the last part has left a gradient: call backward for each, and never zero_grad",
    )
    expect_tensor(found, reference, "the gradient")
    total = float(result)
    expected = sum(loss_of(part).item() * count / 6 for part, count in zip(parts, counts, strict=True))
    expect(
        abs(total - expected) < 1e-5,
        f"the gradient is right, but the loss that you return is {total:.4f}: the mean over all answer "
        f"tokens is {expected:.4f}",
    )
    right("in parts or at once, the gradient is the same.")
