"""Experts equal those of DeepSeek-V2 and V3 in transformers where these are right, and DeepSeek's own always.

`ORIGINAL` was printed by deepseek_vl2/models/modeling_deepseek.py of
https://github.com/deepseek-ai/DeepSeek-VL2 (ef9f91e), class DeepseekV2MoE with SIZES, the tensors of
`made_up`, and biases that are `noise(8, start=0.3)`, lowered by 3 where it says so. Losses and gradients are
those of its gate in training, with an aux_loss_alpha of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from deepseek_v2 import TEXT, in_our_words, reference
from helpers import TOLERANCE, assert_equal, difference
from made_up import made_up, noise
from torch import Tensor

from minivlm.errors import InputError
from minivlm.layers import SwiGLU
from minivlm.text.moe import Gate, MixtureOfExperts, MoEConfig, Routing, balancing_loss, record_routing

SIZES: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
}
X = 4 * noise(2, 5, 32, start=0.5)
SETTINGS: dict[str, dict[str, Any]] = {
    "softmax greedy": {},
    "softmax greedy normed": {"norm_topk_prob": True, "routed_scaling_factor": 2.0},
    "softmax groups": {"topk_method": "group_limited_greedy"},
    "sigmoid groups": {
        "scoring_func": "sigmoid",
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": True,
    },
    "sigmoid noaux_tc": {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.0,
    },
    "softmax noaux_tc": {"topk_method": "noaux_tc"},
}
SETTINGS["sigmoid noaux_tc, low"] = SETTINGS["sigmoid noaux_tc"]
ORIGINAL = {
    "softmax greedy": "3.045424 1.451482 -0.2796407 3.250682 1.265706 -0.9568896 -1.887193 2.388167 -2.09124 "
    "4.386192 -0.4668438 -1.010638",
    "softmax greedy normed": "5.315822 1.656349 1.309509 3.412396 2.422229 -2.669016 -2.213238 2.245879 "
    "-3.061991 6.587699 -1.752589 -2.603201",
    "softmax groups": "2.98716 1.462253 -0.1649948 3.282357 1.055537 -0.9568896 -1.93838 2.356365 -2.077468 "
    "4.484573 -0.4668438 -0.9248699",
    "sigmoid groups": "2.448349 1.47458 -1.178029 2.954419 0.9185249 -1.152935 -1.931628 2.49442 -2.55719 "
    "5.37232 -0.8166338 -0.6459038",
    "sigmoid noaux_tc": "0.1206668 1.092529 0.4900036 4.473386 -1.579013 -0.1921424 0.8408812 7.179629 "
    "-3.720633 1.471916 0.2474926 -1.671447",
    "sigmoid noaux_tc, low": "0.1558427 0.5164225 -2.980032 -0.9761543 3.552731 -2.501386 -1.279111 2.801567 "
    "-1.973247 3.268608 -0.8948842 -2.056735",
    "softmax noaux_tc": "0.7592387 1.397692 0.07868755 3.101019 1.196412 -0.8326636 -1.455907 2.9898 "
    "-1.436464 3.247939 0.4704186 0.3395975",
    "softmax loss by row": "1.358998",
    "softmax gradient by row": "0.1923121 0.0351113 0.03940642 -0.02307668 0.007820531 -0.0006121792 "
    "0.04472505 -0.0007299921 -0.05823565 0.09670434 0.1227085 -0.004212668",
    "softmax loss at once": "1.324774",
    "softmax gradient at once": "0.2043284 -0.02948782 0.03901118 -0.02713438 0.00109938 -0.001704881 "
    "0.02742749 -0.01063101 -0.01956773 0.0304143 0.05811291 -0.002195226",
    "sigmoid loss by row": "4.104388",
    "sigmoid gradient by row": "0.3755784 0.06573356 0.005669746 -0.1055381 0.1481451 0 0.1450564 0.1380123 "
    "0.05342466 -0.03199865 -0.1419872 0.1177336",
    "sigmoid loss at once": "3.99271",
    "sigmoid gradient at once": "0.3778385 0.02930996 0.005669746 -0.1055381 0.1481451 0 0.1071384 0.1361618 "
    "0.1229857 -0.05802512 -0.07921258 0.1139864",
}


def original(name: str) -> Tensor:
    return torch.tensor([float(number) for number in ORIGINAL[name].split()])


def some_of(values: Tensor) -> Tensor:
    """As many numbers as are stored, from all over a tensor."""
    return values.detach().flatten()[:: values.numel() // 12 + 1]


def experts(name: str, **changes: Any) -> MixtureOfExperts:
    """Ours with the tensors that the original had."""
    model = MixtureOfExperts(MoEConfig(**SIZES | SETTINGS[name] | changes), 32)
    state = {key: made_up(key, tensor.shape) for key, tensor in model.state_dict().items()}
    if "gate.e_score_correction_bias" in state:
        state["gate.e_score_correction_bias"] = noise(8, start=0.3) - 3 * name.endswith("low")
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", SETTINGS)
def test_equal_to_the_original(name: str) -> None:
    assert_equal(some_of(experts(name)(X)), original(name))


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("by_row", [True, False], ids=["by row", "at once"])
def test_the_balancing_loss_is_the_original(scoring_func: str, by_row: bool) -> None:
    gate = experts("softmax greedy", scoring_func=scoring_func).gate
    loss = balancing_loss(gate(X), by_row)
    loss.backward()
    how = "by row" if by_row else "at once"
    assert_equal(loss[None], original(f"{scoring_func} loss {how}"))
    assert gate.weight.grad is not None
    assert_equal(some_of(gate.weight.grad), original(f"{scoring_func} gradient {how}"))


def test_the_loss_of_balance_and_of_its_opposite() -> None:
    """1 if all experts have as many tokens and scores; E / k if k experts have all of both."""
    even = torch.arange(8).view(1, 4, 2)
    scores = torch.full((1, 4, 8), 1 / 8)
    assert balancing_loss(Routing(even, scores[..., :2], scores)) == 1
    crowded = torch.tensor([0, 1]).expand(1, 4, 2)
    scores = torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0]).expand(1, 4, 8)
    assert balancing_loss(Routing(crowded, scores[..., :2], scores)) == 8 / 2
    # Each row is crowded in its own way, and the batch is not.
    rows = torch.stack([crowded[0], crowded[0] + 2, crowded[0] + 4, crowded[0] + 6])
    scores = torch.stack([scores[0].roll(2 * row, dims=-1) for row in range(4)])
    routing = Routing(rows, scores[..., :2], scores)
    assert balancing_loss(routing) == 4
    assert balancing_loss(routing, by_row=False) == 1


# Beside transformers


def pair(version: int, **changes: Any) -> tuple[MixtureOfExperts, Any]:
    """Ours and the first layer with experts of a reference, with the same weights."""
    theirs = reference(version, **changes).model.layers[1].mlp
    settings = {"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0}
    if version == 3:
        settings |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True}
    known = MoEConfig.__dataclass_fields__
    ours = MixtureOfExperts(
        MoEConfig(**SIZES | settings | {name: value for name, value in changes.items() if name in known}), 32
    )
    ours.load_state_dict(in_our_words(theirs))
    return ours.eval(), theirs


@torch.no_grad()
@pytest.mark.parametrize(
    ("version", "changes"),
    [
        (2, {}),
        (2, {"topk_method": "greedy", "routed_scaling_factor": 1.0}),
        (2, {"n_shared_experts": 1, "num_experts_per_tok": 1}),
        (3, {}),
        (3, {"n_group": 1, "topk_group": 1}),
        (3, {"norm_topk_prob": False}),
    ],
)
def test_equal_to_transformers(version: int, changes: dict[str, Any]) -> None:
    ours, theirs = pair(version, **changes)
    assert_equal(ours(X), theirs(X))


@torch.no_grad()
def test_weights_are_divided_by_their_sum_where_transformers_forgets() -> None:
    """Its DeepseekV2 computes the same whatever norm_topk_prob says."""
    plain, _ = pair(2)
    ours, theirs = pair(2, norm_topk_prob=True)
    assert_equal(plain(X), theirs(X))
    assert difference(ours(X), theirs(X)) > 0.05


@torch.no_grad()
def test_experts_of_other_groups_score_0_where_transformers_excludes_them() -> None:
    """It matters once biases have made all scores of the chosen groups negative. See also the original."""
    ours, theirs = pair(3)
    for gate in (ours.gate, theirs.gate):
        gate.e_score_correction_bias -= 3
    assert difference(ours(X), theirs(X)) > 0.1
    rank = ours.gate.rank

    def excluded(scores: Tensor) -> Tensor:
        ranked = rank(scores)
        return ranked.masked_fill(ranked == 0, -torch.inf)

    ours.gate.rank = excluded  # type: ignore[method-assign]
    assert_equal(ours(X), theirs(X))


# How they run


@torch.no_grad()
def test_sorted_experts_equal_a_loop_over_tokens() -> None:
    model = experts("softmax greedy")
    routing = model.gate(X)
    assert model.shared_experts is not None
    for row in range(2):
        for place in range(5):
            token = X[row, place]
            expected = model.shared_experts(token)
            for expert, weight in zip(routing.experts[row, place], routing.weights[row, place], strict=True):
                expected = expected + weight * model.experts[int(expert)](token)
            assert_equal(model(X)[row, place], expected)
            assert_equal(model(token), expected)


@torch.no_grad()
def test_each_expert_runs_once_and_idle_ones_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = experts("softmax greedy", n_shared_experts=None), []
    forward = SwiGLU.forward

    def counted(self: SwiGLU, x: Tensor) -> Tensor:
        runs.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(SwiGLU, "forward", counted)
    x = X[:, :1]
    model(x)
    assert sum(runs) == 2 * 3
    assert len(runs) == len(model.gate(x).experts.unique()) < 8


def test_what_learns() -> None:
    """Experts that were chosen, the gate through their weights, and no bias."""
    model = experts("sigmoid noaux_tc").train()
    model(X[:1, :1]).sum().backward()
    chosen = set(model.gate(X[:1, :1]).experts.flatten().tolist())
    for number, expert in enumerate(model.experts):
        assert (expert.get_parameter("up_proj.weight").grad is not None) == (number in chosen)
    assert model.gate.weight.grad is not None
    assert "gate.e_score_correction_bias" in model.state_dict()
    assert all(not name.endswith("bias") for name, _ in model.named_parameters())


@torch.no_grad()
def test_recording() -> None:
    model = experts("softmax greedy")
    with record_routing() as routings:
        model(X)
        model(X[:, :2])
    model(X)
    assert [routing.experts.shape for routing in routings] == [(2, 5, 3), (2, 2, 3)]
    assert routings[0].scores.shape == (2, 5, 8)
    assert torch.equal(routings[0].experts, model.gate(X).experts)


@torch.no_grad()
def test_bf16_routes_in_fp32() -> None:
    model, x = experts("softmax greedy").bfloat16(), X.bfloat16()
    with record_routing() as routings:
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert routings[0].scores.dtype == torch.float32
    exact = torch.nn.functional.linear(x.float(), model.gate.weight.float()).softmax(-1)
    assert difference(routings[0].scores, exact) < TOLERANCE


# Mistakes: each feature, and how large the error is at least without it


def softmax_for_sigmoid(gate: Gate) -> None:
    gate.config = replace(gate.config, scoring_func="softmax")


def no_bias(gate: Gate) -> None:
    gate.e_score_correction_bias.zero_()


def bias_in_the_weights(gate: Gate) -> None:
    forward = gate.forward

    def wrong(x: Tensor) -> Routing:
        experts, _, scores = forward(x)
        weights = (scores + gate.e_score_correction_bias).gather(-1, experts)
        weights = weights / weights.sum(dim=-1, keepdim=True) * gate.config.routed_scaling_factor
        return Routing(experts, weights, scores)

    gate.forward = wrong  # type: ignore[method-assign]


def not_normed(gate: Gate) -> None:
    gate.config = replace(gate.config, norm_topk_prob=False)


def not_scaled(gate: Gate) -> None:
    gate.config = replace(gate.config, routed_scaling_factor=1.0)


def no_groups(gate: Gate) -> None:
    gate.config = replace(gate.config, n_group=1, topk_group=1)


@torch.no_grad()
@pytest.mark.parametrize(
    "mistake", [softmax_for_sigmoid, no_bias, bias_in_the_weights, not_normed, not_scaled, no_groups]
)
def test_a_mistake_shows(mistake: Callable[[Gate], None]) -> None:
    model = experts("sigmoid noaux_tc")
    mistake(model.gate)
    assert difference(some_of(model(X)), original("sigmoid noaux_tc")) > 0.1


# Configs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "tanh"}, "scoring_func is 'tanh': only softmax, sigmoid are supported"),
        ({"topk_method": "gready"}, "topk_method is 'gready': only greedy, group_limited_greedy, noaux_tc"),
        ({"n_group": 3}, "8 experts cannot form 3 groups"),
        ({"n_group": 8, "topk_method": "noaux_tc"}, "with at least 2 in each"),
        ({"num_experts_per_tok": 9}, "a token goes to 9 experts out of 8"),
        ({"topk_group": 5}, "in 5 of 4 groups"),
        ({"num_experts_per_tok": 5, "topk_method": "group_limited_greedy"}, "5 experts out of 4 in 2 of 4"),
        ({"n_shared_experts": 0}, "n_shared_experts is 0, expected 1 to"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor is nan"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MoEConfig(**SIZES | changes)


def test_configs_there_and_back() -> None:
    for settings in SETTINGS.values():
        config = MoEConfig(**SIZES | settings)
        assert MoEConfig.from_dict(config.to_dict()) == config
    assert MoEConfig.from_dict({**SIZES, "n_shared_experts": None}).n_shared_experts is None
    with pytest.raises(InputError, match="language_config has no num_experts_per_tok"):
        MoEConfig.from_dict({**SIZES, "num_experts_per_tok": None})
    assert TEXT["n_routed_experts"] == SIZES["n_routed_experts"]
