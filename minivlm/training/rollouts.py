"""Groups of sampled answers: several to each prompt, which is read once.

    prompt 1 -> cache 1 -+- answer 1.1
                         +- answer 1.2
                         +- answer 1.3
    prompt 2 -> cache 2 -+- answer 2.1 ...

Reading a picture and a prompt costs more than a short answer, and all answers of a group begin with the same.
So each prompt is prefilled once, and every answer of its group goes on from a copy of its cache.

`Grouped` is a model whose prefill reads every G-th row and returns G times as many; the loop that samples is
the model's own. The random numbers of an answer depend on the seed and on its place, on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minivlm.models.cache_rows import repeated
from minivlm.models.protocols import Answers
from minivlm.processing import AnswerProcessor, to_device
from minivlm.processing.inputs import Picture

OF_ROWS = ("input_ids", "attention_mask", "token_type_ids")  # inputs with a line for each row


@dataclass(frozen=True)
class Rollout:
    """P prompts with G answers each, of L tokens at most."""

    tokens: Tensor  # [P, G, L], with the end, where there is one; padding afterwards
    real: Tensor  # [P, G, L], True for tokens of the answer, its end included
    ended: Tensor  # [P, G], False where the answer was cut off
    texts: list[list[str]]  # P lists of G answers
    entropy: float  # of the next token, in nats: the mean over all places where one was drawn

    @property
    def lengths(self) -> Tensor:
        """[P, G], tokens of each answer, its end included."""
        return self.real.sum(dim=-1)


def sample_groups(
    model: Answers,
    processor: AnswerProcessor,
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    group: int,
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
) -> Rollout:
    """`group` answers to each prompt, drawn from softmax(logits / temperature)."""
    inputs = to_device(processor(list(pictures), list(prompts)), model.device)
    rows = {name: inputs.pop(name).repeat_interleave(group, 0) for name in OF_ROWS if name in inputs}
    grouped = Grouped(model, group, temperature)
    # Called on the class: the model's own loop, with another prefill.
    tokens = type(model).generate(
        grouped,
        **rows,
        **inputs,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    ends = torch.isin(tokens, ends_of(model))
    real = ends.cumsum(dim=1) - ends.long() == 0  # up to the first end, and that one, too
    texts = processor.decode(tokens)
    entropy = torch.stack(grouped.entropies, dim=1)  # [P * G, L]
    return Rollout(
        tokens.unflatten(0, (-1, group)),
        real.unflatten(0, (-1, group)),
        ends.any(dim=1).unflatten(0, (-1, group)),
        [texts[start : start + group] for start in range(0, len(texts), group)],
        float(entropy[real].mean()),
    )


def ends_of(model: Answers) -> Tensor:
    """The ids that end an answer."""
    config: Any = getattr(model, "config")  # noqa: B009  # every system has one; the protocol says nothing
    return torch.tensor(config.eos_token_id, device=model.device)


class Grouped:
    """A model beside the model, which reads each prompt once for `group` rows."""

    def __init__(self, model: Answers, group: int, temperature: float = 1.0) -> None:
        self.model, self.group, self.temperature = model, group, temperature
        self.entropies: list[Tensor] = []  # of each token drawn, [P * G]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def prefill(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        """Rows [P * G, T], of which each G are alike, and P pictures."""
        if "token_type_ids" in inputs:
            inputs["token_type_ids"] = inputs["token_type_ids"][:: self.group]
        hidden, cache = self.model.prefill(input_ids[:: self.group], attention_mask[:: self.group], **inputs)
        return hidden.repeat_interleave(self.group, 0), repeated(cache, self.group)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """The model's, whose entropy is noted."""
        logits = self.model.logits(hidden_states)
        log_probs = (logits.float() / self.temperature).log_softmax(dim=-1)
        self.entropies.append(-(log_probs.exp() * log_probs).sum(dim=-1))
        return logits
