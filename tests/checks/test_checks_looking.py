"""The checks of 09_looking_inside say what is wrong with likely mistakes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from minivlm import checks, load
from minivlm.checks import NotYet
from minivlm.checks.looking import solutions
from minivlm.looking import measures


def distance_with(distances: Callable[[int], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda weights: (weights * distances(weights.shape[-1])).sum(dim=-1).mean(dim=(0, 2))


def on_a_line(count: int) -> Tensor:
    numbers = torch.arange(float(count))
    return (numbers[:, None] - numbers).abs()


def city_blocks(count: int) -> Tensor:
    side = round(count**0.5)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    return torch.cdist(places, places, p=1)


def weighted(weights: Tensor) -> Tensor:
    return weights * measures.patch_distances(weights.shape[-1])


def to_the_largest(weights: Tensor) -> Tensor:
    distances = measures.patch_distances(weights.shape[-1]).expand_as(weights)
    return distances.gather(-1, weights.argmax(dim=-1, keepdim=True))[..., 0].mean(dim=(0, 2))


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (distance_with(on_a_line), "a new row begins between them"),
        (distance_with(city_blocks), "Pythagoras"),
        (distance_with(lambda n: measures.patch_distances(n).square()), "squared"),
        (lambda w: distance_with(lambda n: measures.patch_distances(n).square())(w).sqrt(), "at the end"),
        (lambda w: weighted(w).sum(dim=(0, 2, 3)), "average over them"),
        (lambda w: weighted(w).mean(dim=(0, 2, 3)), "already sum to 1"),
        (lambda w: weighted(w).sum(dim=-1).mean(), "each head"),
        (lambda w: weighted(w).sum(dim=-1).mean(dim=0), "one more average"),
        (lambda w: weighted(w).sum(dim=-1).mean(dim=-1), "one more average"),
        (lambda w: weighted(w).sum(dim=-1).mean(dim=(1, 2)), "keep the heads"),
        (lambda w: weighted(w).sum(dim=-1).mean(dim=(0, 1)), "keep the heads"),
        (lambda w: measures.patch_distances(w.shape[-1]).mean().expand(w.shape[1]), "the grid alone"),
        (to_the_largest, "seen most"),
        (distance_with(lambda n: measures.patch_distances(9)), "stops with RuntimeError"),
    ],
)
def test_attention_distance(answer: Callable[[Tensor], Tensor], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        checks.looking.attention_distance(answer)


@pytest.mark.parametrize(
    "right",
    [
        measures.attention_distance,
        lambda w: (
            torch.einsum("bhij,ij->h", w, measures.patch_distances(w.shape[-1])) / w[:, 0, :, 0].numel()
        ),
        lambda w: weighted(w).sum(dim=-2).mean(dim=(0, 2)),  # distances go both ways
    ],
)
def test_distances_in_other_forms(right: Any, capsys: pytest.CaptureFixture[str]) -> None:
    checks.looking.attention_distance(right)
    assert capsys.readouterr().out.startswith("Right: ")


def rolled(
    step: Callable[[Tensor], Tensor], join: Callable[[Tensor, Tensor], Tensor] = torch.matmul
) -> Callable[[Sequence[Tensor]], Tensor]:
    """A rollout with another step for each layer, or joined in another way (later, earlier)."""

    def rollout(maps: Sequence[Tensor]) -> Tensor:
        result = step(maps[0])
        for layer in maps[1:]:
            result = join(step(layer), result)
        return result

    return rollout


def half(weights: Tensor) -> Tensor:
    return 0.5 * weights.mean(dim=1) + 0.5 * torch.eye(4)


def residual_once(maps: Sequence[Tensor]) -> Tensor:
    return maps[2].mean(dim=1) @ maps[1].mean(dim=1) @ half(maps[0])


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (rolled(half, lambda later, earlier: earlier @ later), "wrong order"),
        (rolled(lambda w: w.mean(dim=1)), "residual path is missing"),
        (rolled(lambda w: w.mean(dim=1) + torch.eye(4)), "sum to 8"),
        (rolled(half, torch.mul), "element by element"),
        (rolled(lambda w: 0.5 * w + 0.5 * torch.eye(4)), "head axis"),
        (rolled(lambda w: 0.5 * w.amax(dim=1) + 0.5 * torch.eye(4)), "largest of the heads"),
        (rolled(lambda w: 0.5 * w.sum(dim=1) + 0.5 * torch.eye(4)), "summed the heads"),
        (lambda maps: rolled(half)(maps[1:]), "first layer is missing"),
        (lambda maps: rolled(half)(maps[:-1]), "last layer is missing"),
        (residual_once, "only the first layer"),
        (lambda maps: rolled(half)(maps).mT, "rows and columns"),
        (lambda maps: sum(half(layer) for layer in maps) / len(maps), "averaged the layers"),
        (lambda maps: rolled(lambda w: 0.5 * w + 0.5 * torch.eye(4))(maps).mean(dim=1), "by itself"),
        (lambda maps: rolled(half)(maps).mean(dim=0), "over the pictures"),
    ],
)
def test_attention_rollout(answer: Callable[[Sequence[Tensor]], Tensor], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        checks.looking.attention_rollout(answer)


MEASURED = {
    "writer - picture, layer 2": 0.7,
    "writer - picture, layers 1, 3 and 4": 0.0,
    "SHAPE - picture, layer 1": 0.02,
    "color - picture, all layers": 0.0,
    "patches - words, all layers": 0.0,
}
TRUE = solutions.expected_cuts()
WRITER = "writer - picture, layer 2"
NO_MODEL: Any = (None, None)


def measured(shares: dict[str, float]) -> Callable[..., float]:
    return lambda model, processor, name: shares[name]


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda: TRUE | {"writer - picture, layers 1, 3 and 4": "most"}, "has to sum to 1"),
        (lambda: TRUE | {"SHAPE - picture, layer 1": "most"}, "does not need what it saw"),
        (lambda: TRUE | {WRITER: "few"}, "0.70 of the answers change. The reason: this is where"),
        (lambda: TRUE | {"color - picture, all layers": "most"}, "need not pass through it"),
        (lambda: TRUE | {"patches - words, all layers": "most"}, "they may read the question"),
        (lambda: dict.fromkeys(TRUE, "most"), "layers 1, 3 and 4: you expect 'most'"),
        (lambda: dict.fromkeys(TRUE, "few"), "writer - picture, layer 2: you expect 'few'"),
        (lambda: TRUE | {WRITER: "many"}, "cannot be held against a number"),
        (lambda: TRUE | {WRITER: 0.8}, "cannot be held against a number"),
        (lambda: {name: TRUE[name] for name in list(TRUE)[:4]}, "prediction is missing: .'patches - words"),
        (lambda: TRUE | {"writer - star": "few"}, "none of the five cuts"),
        (lambda: list(TRUE.values()), "a dictionary"),
    ],
)
def test_expected_cuts(answer: Callable[[], Any], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        checks.looking.expected_cuts(answer, *NO_MODEL, measured(MEASURED))


def test_a_model_with_another_way_is_believed(capsys: pytest.CaptureFixture[str]) -> None:
    other = MEASURED | {"SHAPE - picture, layer 1": 0.8}
    with pytest.raises(NotYet, match="another way"):
        checks.looking.expected_cuts(lambda: TRUE, *NO_MODEL, measured(other))
    known = TRUE | {"SHAPE - picture, layer 1": "most"}
    checks.looking.expected_cuts(lambda: known, *NO_MODEL, measured(other))
    assert capsys.readouterr().out.startswith("Right: ")


def hooked(
    plant: Callable[[Tensor, Tensor, Tensor], Any],
    shift: int = 0,
    before: bool = False,
    everywhere: bool = False,
    keep: bool = False,
    read: Callable[[Tensor], Tensor] = lambda logits: logits[:, -1],
) -> Callable[..., Tensor]:
    """A way to swap vectors: plant(output, other, where) is what the block returns."""

    def swapped(model: Any, inputs: Any, states: Any, layer: int, where: Tensor) -> Tensor:
        blocks, hooks = model.language_model.layers, []
        for number in range(len(blocks)) if everywhere else [min(max(layer + shift, 0), 3)]:
            if before:
                hooks.append(
                    blocks[number].register_forward_pre_hook(
                        lambda block, given, number=number: (
                            plant(given[0], states[number], where),
                            *given[1:],
                        )
                    )
                )
            else:
                hooks.append(
                    blocks[number].register_forward_hook(
                        lambda block, given, output, number=number: plant(output, states[number], where)
                    )
                )
        try:
            return read(model(**inputs).logits)
        finally:
            for hook in [] if keep else hooks:
                hook.remove()

    return swapped


def chosen(output: Tensor, other: Tensor, where: Tensor) -> Tensor:
    return torch.where(where[..., None], other, output)


def in_place(output: Tensor, other: Tensor, where: Tensor) -> None:
    output[where] = other[where]


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (hooked(chosen, keep=True), "still answers differently"),
        (hooked(chosen, read=lambda logits: logits), "logits of all tokens"),
        (hooked(chosen, read=lambda logits: logits[:, -1].argmax(dim=-1)), "ids of words"),
        (hooked(lambda output, other, where: None), "nothing was swapped"),
        (hooked(lambda output, other, where: output), "nothing was swapped"),
        (hooked(lambda output, other, where: other), "everything was swapped"),
        (hooked(lambda output, other, where: chosen(other, output, where)), "second argument"),
        (hooked(lambda output, other, where: chosen(output, other, where & FIRST)), "only the first row"),
        (hooked(lambda output, other, where: chosen(output, other, where.any(dim=0))), "both rows"),
        (hooked(chosen, shift=1), "one block too late"),
        (hooked(chosen, shift=-1), "one block too early"),
        (hooked(chosen, before=True), "not a pre-hook"),
        (hooked(lambda output, other, where: output + where[..., None] * other), "you added"),
        (hooked(chosen, everywhere=True), "after every block"),
    ],
)
def test_swapped(answer: Callable[..., Tensor], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        checks.looking.swapped(answer)


FIRST = torch.tensor([[True], [False]])


def test_swapping_in_place_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    checks.looking.swapped(hooked(in_place))
    assert capsys.readouterr().out.startswith("Right: ")


def gaps(healthy: Any, patient: Any, inputs: Any) -> list[float]:
    ours, theirs = (checks.looking._outputs_of_parts(model, inputs) for model in (healthy, patient))
    return [float((a - b).norm()) for a, b in zip(ours, theirs, strict=True)]


def place(number: int) -> tuple[int, str]:
    return number // 2, ("attention", "mlp")[number % 2]


def at_the_largest(*given: Any) -> tuple[int, str]:
    found = gaps(*given)
    return place(found.index(max(found)))


def at_the_last(*given: Any) -> tuple[int, str]:
    return place(max(i for i, gap in enumerate(gaps(*given)) if gap))


def by_weights(healthy: Any, patient: Any, inputs: Any) -> tuple[int, str]:
    for name, weight in healthy.language_model.layers.state_dict().items():
        if not torch.equal(weight, patient.language_model.layers.state_dict()[name]):
            return int(name.split(".")[0]), "attention" if "self_attn" in name else "mlp"
    return 0, "attention"


def true_fault(*given: Any) -> tuple[int, str]:
    return solutions.find_fault(*given)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (at_the_largest, "differ \\*most\\*"),
        (at_the_last, "everything after a fault"),
        (by_weights, "Some faults are in the weights and some are not"),
        (lambda *given: (true_fault(*given)[0] + 1, true_fault(*given)[1]), "one too large"),
        (lambda *given: true_fault(*given)[::-1], "number of the block comes first"),
        (lambda *given: true_fault(*given)[0], "return two things"),
        (lambda *given: (true_fault(*given)[0], "self_attn"), "you return 'self_attn'"),
        (lambda *given: (true_fault(*given)[0], "attention"), "the parts are not"),
        (lambda *given: (true_fault(*given)[0], "mlp"), "the parts are not"),
        (lambda *given: (1, "attention"), "in every patient"),
        (lambda *given: solutions.find_fault(given[0], given[0], given[2]), "compute the same"),
    ],
)
def test_find_fault(answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        checks.looking.find_fault(answer)


@pytest.mark.parametrize("name", ["attention_distance", "attention_rollout", "swapped", "find_fault"])
def test_solutions_are_right(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(checks.looking, name)(getattr(solutions, name))
    assert capsys.readouterr().out.startswith("Right: ")


def test_a_cut_is_undone() -> None:
    model, processor = load()
    assert checks.looking.share_changed(model, processor, WRITER, count=8) >= 0.25
    assert not any(layer._forward_pre_hooks for layer in model.language_model.layers)
