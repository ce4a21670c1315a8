"""How likely a model finds given answers, with a gradient: what supervised and rewarded steps both need.

A PaliGemma reads all answers of a group behind one prompt, where no answer sees another:

    prompt   answer 1  answer 2          1 1 | 0 0 | 0 0
    ------   --------  --------          1 1 | 0 0 | 0 0
     p  p      a  b      c  d            1 1 | 1 0 | 0 0
                                         1 1 | 1 1 | 0 0
    positions 0 1 2 3 2 3                1 1 | 0 0 | 1 0
                                         1 1 | 0 0 | 1 1

Any other model reads a row for each answer, which gives the same numbers and takes longer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minivlm.evaluation.continued import extended
from minivlm.models.paligemma import PaliGemma
from minivlm.models.protocols import Answers
from minivlm.processing import AnswerProcessor, to_device
from minivlm.processing.inputs import Inputs, Picture


def answer_log_probs(
    model: Answers,
    processor: AnswerProcessor,
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    tokens: Tensor,
    real: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """The log-probability of each token of G answers to each of P prompts, [P, G, L]; 0 for padding.

    Args:
        tokens, real: [P, G, L], as in `Rollout`.
        temperature: by which logits are divided, as when the answers were drawn.
    """
    logits = answer_logits(model, processor, pictures, prompts, tokens, real)
    log_probs = (logits / temperature).log_softmax(dim=-1)
    chosen = log_probs.gather(-1, tokens[real][:, None])[:, 0]
    return chosen.new_zeros(tokens.shape).masked_scatter(real, chosen)


def answer_logits(
    model: Answers,
    processor: AnswerProcessor,
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    tokens: Tensor,
    real: Tensor,
) -> Tensor:
    """What predicts the n real tokens of the answers, in the order of `tokens[real]`: [n, V] in fp32."""
    if isinstance(model, PaliGemma):
        hidden = _behind_one_prompt(model, to_device(processor(pictures, prompts), model.device), tokens)
        return model.logits(hidden[real]).float()
    group = tokens.shape[1]
    all_pictures = [picture for picture in pictures for _ in range(group)]
    all_prompts = [prompt for prompt in prompts for _ in range(group)]
    inputs = to_device(processor(all_pictures, all_prompts), model.device)
    prompt = inputs["input_ids"].shape[1]
    rows = extended(inputs, tokens.flatten(0, 1), real.flatten(0, 1))
    return model(**rows).logits[:, prompt - 1 : -1].unflatten(0, (-1, group))[real].float()


def _behind_one_prompt(model: PaliGemma, inputs: Inputs, tokens: Tensor) -> Tensor:
    """Hidden states [P, G, L, D] that predict tokens [P, G, L]."""
    group, length = tokens.shape[1:]
    is_prompt = inputs["attention_mask"].bool()  # [P, T], padding on the left
    features = model.encode_image(inputs["pixel_values"])
    embeds = torch.cat(
        [model.merge(inputs["input_ids"], features), model.language_model.embed(tokens.flatten(1))], dim=1
    )  # [P, T + G L, D]
    prompt_positions = (is_prompt.cumsum(dim=1) - 1).clamp(min=0)
    steps = torch.arange(length, device=tokens.device).repeat(group)  # [G L]
    position_ids = torch.cat([prompt_positions, is_prompt.sum(dim=1, keepdim=True) + steps], dim=1)
    answer = torch.arange(group, device=tokens.device).repeat_interleave(length)
    own_past = (answer[:, None] == answer) & (steps[:, None] >= steps)  # [G L, G L]
    prompt, total = is_prompt.shape[1], embeds.shape[1]
    mask = own_past.new_zeros(len(tokens), total, total)
    mask[:, :, :prompt] = is_prompt[:, None]
    mask[:, prompt:, prompt:] = own_past
    hidden = model.language_model(embeds, position_ids, mask[:, None])
    of_answers = hidden[:, prompt:].unflatten(1, (group, length))
    first = hidden[:, None, prompt - 1 : prompt].expand(-1, group, -1, -1)
    return torch.cat([first, of_answers[:, :, :-1]], dim=2)
