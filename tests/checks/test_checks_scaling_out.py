"""The checks of 21_scaling_out accept right answers and name the likely mistake in wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from minivlm.checks import NotYet, scaling_out
from minivlm.checks.scaling_out import Cluster

good = scaling_out.solutions


def predicted(**instead: Any) -> Callable[[], Any]:
    return lambda: good.who_holds_what() | {name.replace("_", " "): n for name, n in instead.items()}


def diagnosed(instead: dict[str, str]) -> Callable[..., str]:
    """The right diagnosis with some answers replaced."""

    def answer(make: Callable[[], Cluster], make_sound: Callable[[], Cluster]) -> str:
        found = good.diagnose(make, make_sound)
        return instead.get(found, found)

    return answer


def on_uneven_rows(make: Callable[[], Cluster], make_sound: Callable[[], Cluster]) -> str:
    """Measures all at once, on rows that cannot be shared evenly."""
    x, y = torch.eye(4).repeat(2, 1)[:7], torch.arange(14.0).view(7, 2)
    theirs, sound = make(), make_sound()
    start = theirs.weights[0]
    theirs.step(x, y)
    sound.step(x, y)
    moved, wanted = theirs.weights[0] - start, sound.weights[0] - start
    return "summed" if torch.allclose(moved, theirs.size * wanted, atol=1e-4) else "same rows"


def as_if_three(make: Callable[[], Cluster], make_sound: Callable[[], Cluster]) -> str:
    """Right as long as there are three processes."""
    found = good.diagnose(make, make_sound)
    return "same rows" if found == "summed" and make().size != 3 else found


def step(
    gradient: Callable[[list[Tensor], list[int], list[int]], Tensor] | None = None,
    new: Callable[[Tensor, Tensor], Tensor] = lambda m, g: 0.9 * m + g,
    move: Callable[[Tensor, Tensor, Tensor, float], Tensor] = lambda w, m, g, lr: w - lr * m,
) -> Callable[..., Any]:
    """From the gradients of the processes' sums, their numbers of rows, and the sizes of the pieces."""

    def answer(pieces: list[Tensor], momenta: list[Tensor], batches: Any, lr: float) -> Any:
        weight, sizes = torch.cat(pieces), [len(piece) for piece in pieces]
        sums = [2 * (x @ weight.T - y).T @ x for x, y in batches]
        counts = [len(x) for x, _ in batches]
        whole = sum(sums) / sum(counts) if gradient is None else gradient(sums, counts, sizes)
        own = torch.as_tensor(whole).split(sizes)
        fresh = [new(m, g) for m, g in zip(momenta, own, strict=True)]
        moved = [move(w, m, g, lr) for w, m, g in zip(pieces, fresh, own, strict=True)]
        return moved, fresh

    return answer


def old_momentum(pieces: list[Tensor], momenta: list[Tensor], batches: Any, lr: float) -> Any:
    """Moves before the gradient was added."""
    _, fresh = good.divided_step(pieces, momenta, batches, lr)
    return [w - lr * m for w, m in zip(pieces, momenta, strict=True)], fresh


def changed(change: Callable[[list[Tensor], list[Tensor]], Any]) -> Callable[..., Any]:
    """The right step, returned otherwise."""
    return lambda *inputs: change(*good.divided_step(*inputs))


def own_data(sums: list[Tensor], counts: list[int], sizes: list[int]) -> Tensor:
    starts = [sum(sizes[:r]) for r in range(len(sizes))]
    parts = zip(sums, counts, starts, sizes, strict=True)
    return torch.cat([g[start : start + size] / n for g, n, start, size in parts])


def own_rows(sums: list[Tensor], counts: list[int], sizes: list[int]) -> Tensor:
    parts = [g.split(sizes)[r] for r, g in enumerate(sums)]
    return torch.cat(parts) / sum(counts)


def means(sums: list[Tensor], counts: list[int]) -> Tensor:
    return torch.stack([g / n for g, n in zip(sums, counts, strict=True)])


def kept(pieces: list[Tensor], momenta: list[Tensor], batches: Any, lr: float) -> Any:
    return pieces, good.divided_step(pieces, momenta, batches, lr)[1]


def old_returned(pieces: list[Tensor], momenta: list[Tensor], batches: Any, lr: float) -> Any:
    return good.divided_step(pieces, momenta, batches, lr)[0], momenta


WRONG: dict[str, list[tuple[str, Callable[..., Any]]]] = {
    "who_holds_what": [
        ("^after an all-reduce: you say 48", lambda: good.who_holds_what() | {"after an all-reduce": 48}),
        (
            "^after an all-reduce: .* as many numbers",
            lambda: good.who_holds_what() | {"after an all-reduce": 3},
        ),
        (
            "^after an all-gather: .* nothing is added",
            lambda: good.who_holds_what() | {"after an all-gather": 12},
        ),
        ("^after an all-gather: you say 36", lambda: good.who_holds_what() | {"after an all-gather": 36}),
        ("one of four pieces", lambda: good.who_holds_what() | {"after a reduce-scatter": 12}),
        ("^rounds of the ring: you say 3", predicted(rounds_of_the_ring=3)),
        ("^rounds of the ring: you say 8", predicted(rounds_of_the_ring=8)),
        ("^sent by each: you say 72, .* 3 numbers in each of 6", predicted(sent_by_each=72)),
        ("^sent by each: you say 24", predicted(sent_by_each=24)),
        ("thousand: you say 999000, it is 1,998", predicted(sent_by_each_of_a_thousand=999_000)),
        ("thousand: you say 999, ", predicted(sent_by_each_of_a_thousand=999)),
        ("no prediction yet for: after an all-gather", lambda: {"after an all-reduce": 12}),
        ("return the dict", lambda: list(good.who_holds_what().values())),
    ],
    "own_factor": [
        ("share of the tokens. The average divides", lambda r, counts: counts[r] / sum(counts)),
        ("mean of the means", lambda r, counts: 1),
        ("this divides by W", lambda r, counts: 1 / len(counts)),
        ("for all alike", lambda r, counts: len(counts)),
        ("tokens alone", lambda r, counts: counts[r]),
        ("^W times the number", lambda r, counts: len(counts) * counts[r]),
        ("upside down", lambda r, counts: sum(counts) / len(counts) / counts[r]),
        ("share of the largest", lambda r, counts: counts[r] / max(counts)),
        ("divided by W: the average", lambda r, counts: counts[r] / sum(counts) / len(counts)),
        ("factors of other processes", lambda r, counts: good.own_factor(len(counts) - 1 - r, counts)),
        ("process 0 for all", lambda r, counts: good.own_factor(0, counts)),
        ("rounded down", lambda r, counts: len(counts) * counts[r] // sum(counts)),
        ("right for two processes alone", lambda r, counts: 2 * counts[r] / sum(counts)),
        ("no tokens adds nothing", lambda r, counts: len(counts) * max(counts[r], 1) / sum(counts)),
        ("Divide each by its process's number of tokens", lambda r, counts: r + 0.5),
        ("one number for each", lambda r, counts: counts),
    ],
    "diagnose": [
        ("answer 'summed' for all five", lambda *makes: "summed"),
        ("answer 'none': return one of the five", lambda *makes: "none"),
        ("With 'deaf', the replicas are equal before", diagnosed({"other start": "deaf"})),
        ("With 'other start', the replicas differ before", diagnosed({"deaf": "other start"})),
        ("With 'same rows', the replicas stay equal", diagnosed({"own means": "same rows"})),
        ("With 'own means', all is right", diagnosed({"same rows": "own means"})),
        ("With 'summed', all replicas move", diagnosed({"same rows": "summed"})),
        ("With 'same rows'", diagnosed({"summed": "same rows"})),
        ("With 'summed'", diagnosed({"own means": "summed"})),
        ("With 'own means'", diagnosed({"summed": "own means"})),
        ("With '(summed|same rows)'", on_uneven_rows),
        ("In this cluster of 4 processes", as_if_three),
        ("stops with TypeError", lambda make, make_sound: make(1, 2, 3)),
    ],
    "equal_traffic": [
        ("half of it", lambda weights, width: weights / width / 2),
        ("twice of it", lambda weights, width: 2 * weights / width),
        ("this is the number of weights", lambda weights, width: weights),
        ("bytes and numbers", lambda weights, width: 4 * weights / width),
        ("upside down", lambda weights, width: width / weights),
        ("weights times width", lambda weights, width: weights * width),
        ("the width alone", lambda weights, width: width),
        ("square of the width", lambda weights, width: weights / width**2),
        ("this is 8 times too small", lambda weights, width: weights / width / 8),
        ("this is 64 times too small", lambda weights, width: weights / width / 64),
        ("ring sends .* bytes from each", lambda weights, width: 1.3 * weights / width),
        ("return a number of pairs", lambda weights, width: "many"),
    ],
    "divided_step": [
        ("mean of the processes' means", step(lambda sums, counts, sizes: means(sums, counts).mean(dim=0))),
        (
            "means of the processes, added up",
            step(lambda sums, counts, sizes: means(sums, counts).sum(dim=0)),
        ),
        ("sum over all rows: divide", step(lambda sums, counts, sizes: torch.stack(sums).sum(dim=0))),
        ("number of processes, where", step(lambda sums, counts, sizes: torch.stack(sums).mean(dim=0))),
        (
            "by the processes as well",
            step(lambda sums, counts, sizes: torch.stack(sums).mean(dim=0) / sum(counts)),
        ),
        ("its own data alone: its rows", step(own_data)),
        ("its own data alone, divided by all rows", step(own_rows)),
        ("the 2 of the square", step(lambda sums, n, sizes: torch.stack(sums).sum(dim=0) / sum(n) / 2)),
        ("F.mse_loss", step(lambda sums, n, sizes: torch.stack(sums).sum(dim=0) / sum(n) / 7)),
        ("goes uphill", step(move=lambda w, m, g, lr: w + lr * m)),
        ("gradient alone", step(move=lambda w, m, g, lr: w - lr * g)),
        ("counts 0.9, and not 1", step(new=lambda m, g: m + g)),
        ("old momentum alone, not to the gradient", step(new=lambda m, g: 0.9 * (m + g))),
        ("uses the old momentum", old_momentum),
        ("have not changed", kept),
        ("momenta are not: return the new", old_returned),
        ("pieces are not: w - lr", step(move=lambda w, m, g, lr: w - m)),
        ("not the step of one process", step(lambda sums, n, sizes: torch.ones(7, 4))),
        ("lists are swapped", changed(lambda pieces, momenta: (momenta, pieces))),
        ("return two lists", changed(lambda pieces, momenta: pieces)),
        ("expected one for each of 3", changed(lambda p, m: ([torch.cat(p)], [torch.cat(m)]))),
        ("nobody keeps the whole", changed(lambda p, m: ([torch.cat(p)] * 3, m))),
        ("nobody keeps the whole", changed(lambda p, m: (list(torch.cat(p).tensor_split(3))[::-1], m))),
        ("should be tensors, not list", changed(lambda p, m: ([x.tolist() for x in p], m))),
    ],
}


@pytest.mark.parametrize(
    ("name", "hint", "answer"),
    [(name, hint, answer) for name, cases in WRONG.items() for hint, answer in cases],
)
def test_wrong_answers_get_the_hint(name: str, hint: str, answer: Callable[..., Any]) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(scaling_out, name)(answer)


@pytest.mark.parametrize("name", list(WRONG))
def test_right_answers_and_blanks(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(scaling_out, name)(getattr(good, name))
    assert capsys.readouterr().out.startswith("Right: ")

    def blank(*args: Any) -> Any:
        raise NotImplementedError("your turn")

    with pytest.raises(NotYet, match="still blank"):
        getattr(scaling_out, name)(blank)
    assert len(WRONG[name]) >= 10


def test_in_place_and_by_autograd() -> None:
    """Other right ways to take the step."""

    def by_autograd(pieces: list[Tensor], momenta: list[Tensor], batches: Any, lr: float) -> Any:
        rows = sum(len(x) for x, _ in batches)
        whole = torch.zeros_like(torch.cat(pieces))
        for x, y in batches:
            weight = torch.cat(pieces).requires_grad_()
            (((x @ weight.T - y) ** 2).sum() / rows).backward()
            assert weight.grad is not None
            whole += weight.grad
        for w, m, g in zip(pieces, momenta, whole.split([len(p) for p in pieces]), strict=True):
            m.mul_(0.9).add_(g)
            w.sub_(lr * m)
        return pieces, momenta

    scaling_out.divided_step(by_autograd)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_sound_cluster_takes_the_step_of_one_process(size: int) -> None:
    """On uneven rows; a cluster with a fault does not, or its replicas differ."""
    generator = torch.Generator().manual_seed(0)
    n = 2 * size + 1
    x, y = torch.randn(n, 4, generator=generator), torch.randn(n, 2, generator=generator)
    for fault in ("", *scaling_out.FAULTS):
        cluster = Cluster(fault, size)
        weight = Cluster().weights[0]
        wanted = weight - 0.1 * 2 * x.T @ (x @ weight - y) / n
        cluster.step(x, y)
        right = all(torch.allclose(one, wanted, atol=1e-5) for one in cluster.weights)
        assert right == (fault == ""), fault


def test_every_letter_is_another_fault() -> None:
    found = [good.diagnose(make, partial(Cluster)) for make in scaling_out.clusters().values()]
    assert sorted(found) == sorted(scaling_out.FAULTS)
