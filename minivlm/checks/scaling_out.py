"""Checks for the exercises of 21_scaling_out. None of them starts a process: lists stand for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minivlm.checks import NotYet, call, expect, expect_faults, right
from minivlm.distributed import costs, plan, shift

FAULTS = ("other start", "deaf", "summed", "own means", "same rows")
MOMENTUM = 0.9

Batches = Sequence[tuple[Tensor, Tensor]]


class Cluster:
    """Processes that train a linear layer together, on paper; one fault may be built in.

    weights: what each process holds [W], a replica [in, out] each.
    """

    def __init__(self, fault: str = "", size: int = 3) -> None:
        self.fault, self.size = fault, size
        generator = torch.Generator().manual_seed(7)
        start = torch.randn(4, 2, generator=generator)
        others = torch.randn(size, 4, 2, generator=generator) * 0.1
        self.weights = [
            start + others[r] if fault == "other start" and r else start.clone() for r in range(size)
        ]

    def step(self, x: Tensor, y: Tensor, lr: float = 0.1) -> None:
        """One step of SGD on the mean squared error of these rows [n, 4] and [n, 2], n at least W."""
        rows = torch.arange(len(x)).tensor_split(self.size)
        if self.fault == "same rows":
            rows = tuple(rows[0] for _ in rows)
        gradients = [_gradient(w, x[r], y[r]) / len(r) for w, r in zip(self.weights, rows, strict=True)]
        read = sum(map(len, rows))
        shares = [1 / self.size if self.fault == "own means" else len(r) / read for r in rows]
        whole = torch.stack([share * g for share, g in zip(shares, gradients, strict=True)]).sum(dim=0)
        if self.fault == "summed":
            whole = whole * self.size
        for rank, weight in enumerate(self.weights):
            own = gradients[rank] if self.fault == "deaf" and rank == self.size - 1 else whole
            self.weights[rank] = weight - lr * own


def _gradient(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Of the sum over rows of the squared error; of a weight [in, out]."""
    return 2 * x.T @ (x @ weight - y)


class solutions:
    """Reference solutions."""

    @staticmethod
    def who_holds_what() -> dict[str, int]:
        """Four processes with 12 numbers each, and a thousand with a thousand each."""
        return {
            "after an all-reduce": 12,
            "after an all-gather": 48,
            "after a reduce-scatter": 3,
            "rounds of the ring": 6,
            "sent by each": 18,
            "sent by each of a thousand": 1998,
        }

    @staticmethod
    def own_factor(rank: int, counts: Sequence[int]) -> float:
        """A process's share of all tokens, times W, since an average over W will follow."""
        return len(counts) * counts[rank] / sum(counts)

    @staticmethod
    def diagnose(make: Callable[[], Cluster], make_sound: Callable[[], Cluster]) -> str:
        """Before a step; after one on as many rows each; after one on uneven rows."""

        def same(a: Tensor, b: Tensor) -> bool:
            return torch.allclose(a, b, atol=1e-4)

        theirs, sound = make(), make_sound()
        n = 3 * theirs.size  # as many rows for each
        x, y = torch.eye(4).repeat(n, 1)[:n], torch.arange(2.0 * n).view(n, 2)
        start = theirs.weights[0]
        if not all(same(weight, start) for weight in theirs.weights):
            return "other start"
        theirs.step(x, y)
        sound.step(x, y)
        if not all(same(weight, theirs.weights[0]) for weight in theirs.weights):
            return "deaf"
        moved, wanted = theirs.weights[0] - start, sound.weights[0] - start
        if same(moved, wanted):
            return "own means"
        return "summed" if same(moved, theirs.size * wanted) else "same rows"

    @staticmethod
    def equal_traffic(weights: int, width: int) -> float:
        """2 (W-1)/W B D numbers of texts against 2 (W-1)/W P of gradients: W falls out."""
        return weights / width

    @staticmethod
    def divided_step(
        pieces: list[Tensor], momenta: list[Tensor], batches: Batches, lr: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gather; a gradient of the sum in each process; scatter its sum; update one's own rows."""
        sizes = [len(piece) for piece in pieces]
        weight = torch.cat(pieces)  # all-gather
        gradients = [2 * (x @ weight.T - y).T @ x for x, y in batches]
        rows = sum(len(x) for x, _ in batches)
        own = (torch.stack(gradients).sum(dim=0) / rows).split(sizes)  # reduce-scatter
        momenta = [MOMENTUM * m + g for m, g in zip(momenta, own, strict=True)]
        return [w - lr * m for w, m in zip(pieces, momenta, strict=True)], momenta


# ---- exercise: who holds what ------------------------------------------------------------------------------


def _counted(size: int, numbers: int) -> dict[str, int]:
    """In a ring: one piece is passed on in each round, all around to collect and once more to tell."""
    piece, rounds = numbers // size, 2 * (size - 1)
    return {"rounds": rounds, "sent": rounds * piece, "piece": piece}


def who_holds_what(answer: Callable[..., Any]) -> None:
    """Every prediction against a count."""
    result = call(answer)
    expect(isinstance(result, dict), f"return the dict of your predictions, not a {type(result).__name__}")
    small, large = _counted(4, 12), _counted(1000, 1000)
    truth = {
        "after an all-reduce": (12, "the sum has as many numbers as each vector had"),
        "after an all-gather": (48, "the vectors of all four, one after the other: nothing is added"),
        "after a reduce-scatter": (small["piece"], "one of four pieces of the sum"),
        "rounds of the ring": (
            small["rounds"],
            "a piece needs 3 rounds to collect what all have, and 3 more to be told to all",
        ),
        "sent by each": (small["sent"], "a piece of 3 numbers in each of 6 rounds"),
        "sent by each of a thousand": (
            large["sent"],
            "999 rounds to collect and 999 to tell, and a piece has a single number",
        ),
    }
    missing = [name for name in truth if name not in result]
    expect(not missing, f"no prediction yet for: {', '.join(missing)}")
    wrong = [
        f"{name}: you say {result[name]}, it is {value:,}: {reason}"
        for name, (value, reason) in truth.items()
        if result[name] != value
    ]
    expect(not wrong, "\n".join(wrong))
    right(
        "a ring of a thousand sends hardly more from each process than a ring of four: not twice its vector."
    )


# ---- exercise: the factor of a share -----------------------------------------------------------------------


def own_factor(answer: Callable[..., Any]) -> None:
    """Uneven counts, one of them zero."""
    cases = [[4, 30], [5, 1, 2], [3, 0, 9, 4]]
    for counts in cases:
        W, total = len(counts), sum(counts)
        found = [call(answer, rank, list(counts)) for rank in range(W)]
        good = [W * count / total for count in counts]
        mistakes: dict[str, Sequence[float | None]] = {
            "this is each process's share of the tokens. The average divides the sum of the gradients by W "
            "once more: undo that": [count / total for count in counts],
            "this makes the mean of the means: the same factor for all, whatever they have read": [1.0] * W,
            "this divides by W, and the average does so once more": [1 / W] * W,
            "this multiplies by W, for all alike: who has read more tokens should count for more": [float(W)]
            * W,
            "the number of its tokens alone: divide by those of all": [float(count) for count in counts],
            "W times the number of its tokens: divide by those of all": [
                float(W * count) for count in counts
            ],
            "upside down: who has read more tokens gets the smaller factor": [
                total / (W * count) if count else None for count in counts
            ],
            "the share of the largest part, where it should be that of all tokens": [
                count / max(counts) for count in counts
            ],
            "divided by W: the average does so once more": [count / total / W for count in counts],
            "these are the factors of other processes: use counts[rank]": good[::-1],
            "this is the factor of process 0 for all": [good[0]] * W,
            "rounded down: divide with /, not with //": [float(W * count // total) for count in counts],
            "right for two processes alone: W is the length of `counts`": [
                2 * count / total for count in counts
            ],
            "a process that has no tokens adds nothing: its factor is 0": [
                W * max(count, 1) / total for count in counts
            ],
        }
        _match(found, good, mistakes, f"for {counts} tokens")
    right("W times its share of all tokens: after the average over W, every token counts the same.")


def _match(
    found: list[Any], good: list[float], mistakes: Mapping[str, Sequence[float | None]], where: str
) -> None:
    try:
        numbers = [float(value) for value in found]
    except (TypeError, ValueError):
        raise NotYet(f"return one number for each process, not {found[0]!r}") from None
    if _near(numbers, good):
        return
    for hint, wrong in mistakes.items():
        known = [value for value in wrong if value is not None]
        expect(len(known) < len(wrong) or not _near(numbers, known), hint)
    raise NotYet(
        f"{where}, your factors are {_told(numbers)}. Divide each by its process's number of tokens, where "
        "there are any: that is how much one token counts, and it should be the same for all"
    )


def _near(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(abs(x - y) <= 1e-6 * max(1.0, abs(y)) for x, y in zip(a, b, strict=True))


def _told(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.3g}" for number in numbers)


# ---- exercise: five clusters -------------------------------------------------------------------------------

_SIGNS = {
    "other start": "the replicas differ before the first step",
    "deaf": "the replicas are equal before a step and differ after it",
    "summed": "all replicas move as many times too far as there are processes",
    "own means": "all is right where each process has as many rows, and wrong where they have not",
    "same rows": "the replicas stay equal and move elsewhere, since only the first rows are read",
}


def clusters() -> dict[str, Callable[[], Cluster]]:
    """Five patients by letter, each made anew when it is called."""
    order = ("summed", "same rows", "other start", "own means", "deaf")
    return {letter: partial(Cluster, fault) for letter, fault in zip("ABCDE", order, strict=True)}


def diagnose(answer: Callable[..., Any]) -> None:
    """All five faults, with three processes and with four."""
    for size in (3, 4):
        said = {
            fault: call(answer, partial(Cluster, fault, size), partial(Cluster, size=size))
            for fault in FAULTS
        }
        expect_faults(said, _SIGNS, f"cluster of {size} processes", "clusters")
    right("a start, a step on even rows and the distance that it goes tell all five faults apart.")


# ---- exercise: where the ring costs as much as the gradients -----------------------------------------------


def equal_traffic(answer: Callable[..., Any]) -> None:
    """The bytes of both, by the package's formulas, for batches of that size."""
    for weights, width in ((1_474_560, 96), (3_145_728, 512)):
        found = call(answer, weights, width)
        try:
            pairs = float(found)
        except (TypeError, ValueError):
            raise NotYet(f"return a number of pairs, not {found!r}") from None
        good = weights / width
        mistakes = {
            "half of it: gradients are sent twice as well, once to be added up and once to be told": good / 2,
            "twice of it: the texts go out forward, and their gradients come back": 2 * good,
            "this is the number of weights: a text is a vector of `width` numbers": float(weights),
            "bytes and numbers: both are sent in fp32, so the 4 falls out": 4 * good,
            "upside down: more weights make gradients dearer, and allow a larger batch": width / weights,
            "weights times width: a wider text makes the ring dearer, so the batch is smaller": float(
                weights * width
            ),
            "the width alone: what do the gradients send?": float(width),
            "the square of the width: the logits are not sent, only texts are": weights / width**2,
        }
        for W in (2, 4, 8, 16, 64):
            mistakes[
                f"this is {W} times too small, as if it were the pairs of each of {W} processes: we ask for "
                "those of all, and their number falls out"
            ] = good / W if good / W not in mistakes.values() else -1.0
        for hint, wrong in mistakes.items():
            expect(abs(pairs - wrong) > 1e-3 * abs(wrong), hint)
        W = 8
        ring = 2 * costs.bytes_sent(shift, max(1, round(pairs / W)), width, W)
        step = plan.Step(W, W, 1, bf16=False)
        gradients = plan.replicated(plan.Model(weights, weights, 0, 0, 0, 0), step).sent
        expect(
            abs(ring / gradients - 1) < 0.01,
            f"with {pairs:,.0f} pairs on {W} processes, the ring sends {ring:,.0f} bytes from each and the "
            f"average of {weights:,} gradients {gradients:,.0f}",
        )
    right("as many pairs as weights divided by the width, on any number of processes.")


# ---- exercise: a divided step ------------------------------------------------------------------------------


def _problem() -> tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Three processes with pieces of 3, 2 and 2 rows, and 5, 1 and 2 rows of data."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sizes = (3, 2, 2)
    pieces, momenta = [noise(n, 4) for n in sizes], [noise(n, 4) for n in sizes]
    return pieces, momenta, [(noise(n, 4), noise(n, 7)) for n in (5, 1, 2)]


def divided_step(answer: Callable[..., Any]) -> None:
    """One step against that of one process; likely mistakes are made on purpose."""
    lr = 0.05
    pieces, momenta, batches = _problem()
    sizes = [len(piece) for piece in pieces]

    def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [x.clone() for x in tensors]

    result = call(answer, copies(pieces), copies(momenta), [(x.clone(), y.clone()) for x, y in batches], lr)
    expect(
        isinstance(result, tuple | list) and len(result) == 2,
        "return two lists: the new pieces and the new momenta",
    )
    for name, part in zip(("pieces", "momenta"), result, strict=True):
        expect(isinstance(part, tuple | list), f"the new {name} should be a list of tensors, one for each")
        expect(len(part) == len(sizes), f"{len(part)} new {name}: expected one for each of 3 processes")
        for rank, (x, size) in enumerate(zip(part, sizes, strict=True)):
            expect(isinstance(x, Tensor), f"the new {name} should be tensors, not {type(x).__name__}")
            expect(
                tuple(x.shape) == (size, 4),
                f"process {rank} holds {size} rows of 4, but its new {name} have the shape {list(x.shape)}: "
                "pieces may have different sizes, and nobody keeps the whole",
            )
    found = [torch.cat([x.detach() for x in part]) for part in result]
    weight, momentum = torch.cat(pieces), torch.cat(momenta)
    sums = [2 * (x @ weight.T - y).T @ x for x, y in batches]
    counts = [len(x) for x, _ in batches]
    total, n, W = torch.stack(sums).sum(dim=0), sum(counts), len(sums)
    good = total / n
    starts = [sum(sizes[:r]) for r in range(W)]
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    alone = torch.cat([sums[r][starts[r] : ends[r]] / counts[r] for r in range(W)])
    own_rows = torch.cat([sums[r][starts[r] : ends[r]] / n for r in range(W)])
    of_means = torch.stack([g / c for g, c in zip(sums, counts, strict=True)])
    mistakes = {
        "this is the mean of the processes' means: the one row of process 1 counts as much as the five of "
        "process 0": of_means.mean(dim=0),
        "these are the means of the processes, added up: divide by all rows, once": of_means.sum(dim=0),
        "this is the sum over all rows: divide it by their number": total,
        "this is divided by the number of processes, where it should be the number of rows": total / W,
        "divided by the rows and by the processes as well": total / n / W,
        "each process used the gradient of its own data alone: its rows of the gradient have to be added up "
        "over all processes": alone,
        "each process used the gradient of its own data alone, divided by all rows: a reduce-scatter adds "
        "up, and then cuts": own_rows,
        "the 2 of the square is missing in the gradient": good / 2,
        "the loss adds up the outputs of a row: you took their mean (as F.mse_loss does)": good / 7,
    }
    _expect_step(found, weight, momentum, good, mistakes, lr)
    right("whole for a moment, divided at rest: the step is that of one process with all rows.")


def _expect_step(
    found: list[Tensor],
    weight: Tensor,
    momentum: Tensor,
    good: Tensor,
    mistakes: Mapping[str, Tensor],
    lr: float,
) -> None:
    def near(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, atol=1e-5, rtol=1e-4)

    new, moved = found
    wanted = MOMENTUM * momentum + good
    if near(new, weight - lr * wanted) and near(moved, wanted):
        return
    swapped = near(moved, weight - lr * wanted) and near(new, wanted)
    expect(not swapped, "the two lists are swapped: first the pieces, then the momenta")
    expect(not near(new, weight), "the pieces have not changed: w - lr * m with the new m")
    for hint, gradient in mistakes.items():
        m = MOMENTUM * momentum + gradient
        expect(not (near(moved, m) or near(new, weight - lr * m)), hint)
    expect(not near(new, weight + lr * wanted), "the step goes uphill: subtract the momentum times the rate")
    expect(
        not near(new, weight - lr * good),
        "this step uses the gradient alone: the momentum of earlier steps, 0.9 m, is part of it",
    )
    expect(
        not near(new, weight - lr * (momentum + good)),
        "the old momentum counts 0.9, and not 1: it fades",
    )
    expect(
        not near(new, weight - lr * MOMENTUM * (momentum + good)),
        "0.9 belongs to the old momentum alone, not to the gradient",
    )
    expect(
        not near(new, weight - lr * momentum),
        "this step uses the old momentum: add the gradient first, then move",
    )
    expect(
        not near(new, weight - lr * wanted),
        "the pieces are right, and the momenta are not: return the new ones, 0.9 m + g",
    )
    expect(not near(moved, wanted), "the momenta are right, and the pieces are not: w - lr * m")
    raise NotYet(
        "this is not the step of one process. Compare one thing at a time with an `nn.Linear` that has all "
        "rows: the gradient first, then the momentum, then the weights"
    )
