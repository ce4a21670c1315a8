"""Visual contrastive decoding: what the picture says, minus what would have been said anyway.

From VCD (https://arxiv.org/abs/2311.16922). The model reads the same prompt twice, with the picture v and
with a distorted one v', in which little can be seen. What it says about v' is its prior, and is taken off:

    scores(y) = (1 + a) logit(y | v) - a logit(y | v')      for y with p(y | v) >= b max_y p(y | v)

Other words get no probability: a word that v makes unlikely must not win for being even more unlikely in v'.
With a = 0 this is ordinary decoding. It takes twice the time.

`Contrastive` is a model beside the model, for every way of generating:

    inputs = processor([picture], [prompt])
    Contrastive(model, distorted(inputs), alpha=1.0).generate(**inputs)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minivlm.models.protocols import Answers

NEVER = -1e9  # the score of a word outside of the plausible ones; finite, as `stream` wants scores to be


class Contrastive:
    """A model whose scores are contrasted with those for other inputs.

    Args:
        other: what is different when the prompt is read the second time, such as pixel_values of a distorted
            picture: v' of the formula.
        alpha, beta: a and b of the formula. The authors' defaults are 1 and 0.1.
    """

    def __init__(
        self, model: Answers, other: Mapping[str, Tensor], alpha: float = 1.0, beta: float = 0.1
    ) -> None:
        self.model, self.other, self.alpha, self.beta = model, other, alpha, beta

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def prefill(self, *args: Any, **inputs: Any) -> tuple[Tensor, Any]:
        """Both readings: hidden states [B, 2, D], and both caches."""
        hidden, cache = self.model.prefill(*args, **inputs)
        other_hidden, other_cache = self.model.prefill(*args, **{**inputs, **self.other})
        return torch.stack([hidden, other_hidden], dim=1), (cache, other_cache)

    def decode(self, token_ids: Tensor, unfinished: Tensor, cache: Any) -> Tensor:
        """The same token for both: [B, 2, D]."""
        hidden = [self.model.decode(token_ids, unfinished, one) for one in cache]
        return torch.stack(hidden, dim=1)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[B, 2, D] -> [B, V]."""
        seen, other = self.model.logits(hidden_states).float().unbind(dim=1)
        return contrasted(seen, other, self.alpha, self.beta)

    def generate(self, input_ids: Tensor, **choices: Any) -> Tensor:
        """As the model's: its own loop, which asks this object for scores."""
        return type(self.model).generate(self, input_ids, **choices)  # type: ignore[arg-type]

    def stream(self, input_ids: Tensor, **choices: Any) -> Iterator[Tensor]:
        """Likewise."""
        return type(self.model).stream(self, input_ids, **choices)  # type: ignore[arg-type]


def contrasted(seen: Tensor, other: Tensor, alpha: float, beta: float) -> Tensor:
    """Scores [B, V] of the formula from logits [B, V] with the picture, and with the distorted one."""
    scores = (1 + alpha) * seen - alpha * other
    log_probs = seen.log_softmax(dim=-1)
    plausible = log_probs.exp() >= beta * log_probs.amax(dim=-1, keepdim=True).exp()
    return scores.masked_fill(~plausible, NEVER)


def distorted(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The pixels among inputs, diffused: what `Contrastive` takes as `other`."""
    return {name: diffused(tensor) for name, tensor in inputs.items() if name.startswith("pixel_values")}


def diffused(pixel_values: Tensor, step: int = 500, seed: int = 0) -> Tensor:
    """Pixels after so many of 1000 steps of diffusion, as the authors distort pictures.

    x_t = sqrt(A_t) x + sqrt(1 - A_t) noise; A falls from 1 to .08, and is .75 at step 500.
    """
    betas = torch.linspace(-6, 6, 1000).sigmoid() * (5e-3 - 1e-5) + 1e-5
    kept = (1 - betas).cumprod(dim=0)[step]
    noise = torch.randn(pixel_values.shape, generator=torch.Generator().manual_seed(seed))
    return kept.sqrt() * pixel_values + (1 - kept).sqrt() * noise.to(pixel_values)
