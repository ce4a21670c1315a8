"""A mixture of experts (DeepSeekMoE, https://arxiv.org/abs/2401.06066), as in DeepSeek-V2 and V3.

In place of one wide MLP stand many narrow ones, the experts. A gate sends each token to a few of them, so a
model can know much more than it computes for a token:

    token ─┬─> gate ─> a score for each expert ─> the best k ─┐
           ├─> experts 1 ... E, of which k are computed ──────┴─> weighted sum ─┐
           └─> shared experts, for what every token needs ──────────────────────┴─> sum

How the best are chosen (`topk_method`):

    greedy                 by their scores
    group_limited_greedy   from the best few groups of experts, which then wait on few machines; a group is as
                           good as its best expert
    noaux_tc               the same by score + bias, and a group is as good as its best two. Biases do what
                           the balancing loss does: during training, those of idle experts rise. They decide
                           who is chosen, and not how much the chosen count

This follows DeepSeek's own program, with which transformers (5.23) is equal except in two points: its
DeepseekV2 never divides weights by their sum (`norm_topk_prob`), and its DeepseekV3 excludes the experts of
other groups, where here they score 0: with negative biases, such an expert may still be among the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.configs import check_types, known
from minivlm.errors import InputError
from minivlm.layers import SwiGLU

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
}
CHOICES = ("greedy", "group_limited_greedy", "noaux_tc")


@dataclass(frozen=True)
class MoEConfig:
    """The sizes are those of deepseek-vl2-tiny; what a file may leave out is as in DeepSeek's own program."""

    n_routed_experts: int = 64
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 896  # of one expert
    n_shared_experts: int | None = 2  # in one MLP as wide as so many experts
    scoring_func: str = "softmax"
    topk_method: str = "greedy"
    n_group: int = 1
    topk_group: int = 1  # groups from which experts are chosen
    norm_topk_prob: bool = False  # whether the weights of a token are divided by their sum
    routed_scaling_factor: float = 1.0
    aux_loss_alpha: float = 0.001  # how much balance counts in training
    seq_aux: bool = True  # balance in each row, not only in the batch

    def __post_init__(self) -> None:
        check_types(self)
        for name, known_ones in (("scoring_func", tuple(SCORES)), ("topk_method", CHOICES)):
            if getattr(self, name) not in known_ones:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}: only {', '.join(known_ones)} are supported here"
                )
        groups, least = self.n_group, 2 if self.topk_method == "noaux_tc" else 1
        if self.n_routed_experts % groups or self.n_routed_experts // groups < least:
            raise InputError(
                f"{self.n_routed_experts} experts cannot form {groups} groups: n_group must divide "
                f"n_routed_experts, with at least {least} in each"
            )
        eligible = self.n_routed_experts
        if self.topk_method != "greedy":
            eligible = min(self.topk_group, groups) * self.n_routed_experts // groups
        if self.num_experts_per_tok > eligible or self.topk_group > groups:
            raise InputError(
                f"a token goes to {self.num_experts_per_tok} experts out of {eligible} in {self.topk_group} "
                f"of {groups} groups: lower num_experts_per_tok or topk_group"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoEConfig:
        """From a decoder's part of a config.json.

        Raises InputError: a size of the experts is missing, or as the class does.
        """
        for name in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"):
            if values.get(name) is None:
                raise InputError(f"language_config has no {name}: use the config.json of DeepSeek-VL2")
        return cls(**{"n_shared_experts": None} | known(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The other way around."""
        return asdict(self)


class Routing(NamedTuple):
    """Where the gate of one layer sent each token."""

    experts: Tensor  # [..., k], their numbers
    weights: Tensor  # [..., k] fp32, how much each of them counts
    scores: Tensor  # [..., E] fp32, of all experts


_recorded: ContextVar[list[Routing] | None] = ContextVar("recorded", default=None)


@contextmanager
def record_routing() -> Iterator[list[Routing]]:
    """Collect where tokens go in everything that runs inside, layer by layer.

    >>> with record_routing() as routings:
    ...     model(input_ids)
    >>> routings[0].experts.shape  # first layer with experts: [B, T, k]
    """
    routings: list[Routing] = []
    token = _recorded.set(routings)
    try:
        yield routings
    finally:
        _recorded.reset(token)


class Gate(nn.Module):
    """Which experts a token goes to, in fp32 whatever the dtype of the model."""

    e_score_correction_bias: Tensor

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, hidden_size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if config.topk_method == "noaux_tc":  # a buffer: no gradient reaches it
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> Routing:
        """x [..., D] -> the best k of E experts for each token."""
        config = self.config
        scores = SCORES[config.scoring_func](F.linear(x.float(), self.weight.float()))
        experts = self.rank(scores).topk(config.num_experts_per_tok).indices
        weights = scores.gather(-1, experts)
        if config.norm_topk_prob and config.num_experts_per_tok > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(experts, weights * config.routed_scaling_factor, scores)

    def rank(self, scores: Tensor) -> Tensor:
        """What decides who is chosen: scores [..., E] -> [..., E]."""
        config = self.config
        if config.topk_method == "greedy":
            return scores
        if config.topk_method == "noaux_tc":
            scores = scores + self.e_score_correction_bias
        groups = scores.unflatten(-1, (config.n_group, -1))  # [..., groups, E / groups]
        best = groups.topk(2 if config.topk_method == "noaux_tc" else 1).values.sum(dim=-1)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept = kept.scatter(-1, best.topk(config.topk_group).indices, True)
        return groups.masked_fill(~kept[..., None], 0.0).flatten(-2)


class MixtureOfExperts(nn.Module):
    """Takes the place of an MLP."""

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        width, shared = config.moe_intermediate_size, config.n_shared_experts
        self.gate = Gate(config, hidden_size)
        self.experts = nn.ModuleList(SwiGLU(hidden_size, width) for _ in range(config.n_routed_experts))
        self.shared_experts = None if shared is None else SwiGLU(hidden_size, shared * width)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        routing = self.gate(x)
        if (recorded := _recorded.get()) is not None:
            recorded.append(routing)
        k = routing.experts.shape[-1]
        out = self.run(x.reshape(-1, x.shape[-1]), routing.experts.view(-1, k), routing.weights.view(-1, k))
        out = out.view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def run(self, tokens: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts: [N, D], [N, k], [N, k] -> [N, D].

        Tokens are sorted by expert, so that each expert runs once, on all of its tokens:

            token    0 0 1 1 2 2         0 2 1 0 1 2
            expert   5 2 3 7 2 9   -->   2 2 3 5 7 9
        """
        k, flat = experts.shape[1], experts.flatten()  # [N * k]
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=len(self.experts)).tolist()
        pieces = tokens[order // k].split(counts)
        outs = torch.cat(
            [expert(piece) for expert, piece in zip(self.experts, pieces, strict=True) if len(piece)]
        )
        outs = outs[order.argsort()].unflatten(0, (-1, k))  # [N, k, D]
        return (outs * weights[..., None]).sum(dim=1).to(tokens.dtype)  # in fp32, as the weights


def balancing_loss(routing: Routing, by_row: bool = True) -> Tensor:
    """How unevenly tokens [B, T] are spread over experts: 1 if evenly, up to E / k if not.

    The share of tokens that an expert gets, times its mean score, summed over experts (DeepSeek-V2, section
    2.2.3). Shares have no gradient, mean scores have: those of crowded experts are pushed down.

    Args:
        by_row: the mean of all rows' losses, not the loss of all tokens at once.
    """
    experts, scores = routing.experts.flatten(1), routing.scores  # [B, T * k], [B, T, E]
    if not by_row:
        experts, scores = experts.flatten()[None], scores.flatten(0, 1)[None]
    counts = torch.zeros_like(scores[:, 0]).scatter_add(
        1, experts, torch.ones_like(experts, dtype=scores.dtype)
    )
    shares = counts * scores.shape[-1] / experts.shape[1]  # [B, E], 1 for an expert with as many as others
    return (shares * scores.mean(dim=1)).sum(dim=1).mean()
