"""From logits to an answer: prefill once, then one token at a time.

The model has to do only two things (`Decodable`): read the whole prompt and return the last hidden state with
a filled cache, and read one more token per row. So the picture is encoded once per answer, and logits exist
for one position at a time: [B, V], never [B, S, V].

A row that has produced an end-of-sequence token is finished: it gets padding, which the cache does not store,
until the last row is done. Rows never influence each other, so a row of a padded batch gives the same answer
as the row alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from minivlm.cache import KVCache
from minivlm.errors import InputError


class Decodable(Protocol):
    """What a model must provide for generation."""

    def prefill(self, *args: Any, **kwargs: Any) -> tuple[Tensor, KVCache]:
        """Read the prompt: input_ids, attention_mask, and whatever else the model takes.

        Returns the hidden state [B, D] of each row's last real token, and the cache.
        """
        ...

    def decode(self, token_ids: Tensor, unfinished: Tensor, cache: KVCache) -> Tensor:
        """Read one token [B] per row where `unfinished` [B] is true. Returns hidden states [B, D]."""
        ...

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Hidden states [B, D] -> scores [B, V]."""
        ...


@torch.inference_mode()
def stream(
    model: Decodable,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    eos_token_id: int | Sequence[int],
    pad_token_id: int = 0,
    max_length: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    **inputs: Any,
) -> Iterator[Tensor]:
    """Yield the next token of every row, [B], as soon as it is known.

    Args:
        input_ids, attention_mask: [B, T], padded on either side.
        max_new_tokens: stop after this many tokens, whether or not every row has ended.
        eos_token_id: ends a row, as any of several does; afterwards the row yields `pad_token_id`.
        max_length: the model's context length; prompt and answer must fit in it.
        temperature: 0 takes the most probable token; above 0 samples from softmax(logits / temperature).
        top_k, top_p: restrict sampling to the k best tokens, and to the smallest set with probability p.
        seed: makes sampling reproducible. Each row has its own random numbers, seeded with seed + row.
            Without it, a seed is drawn from PyTorch's global generator (`torch.manual_seed`).
        **inputs: passed to the model's prefill (pixel_values, token_type_ids).

    Raises:
        InputError: an argument is out of range, or logits of a row that goes on are not finite.
        ValueError: tensors of another shape or type.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    _check(input_ids, attention_mask, max_new_tokens, max_length, temperature, top_k, top_p)
    generators = _generators(len(input_ids), seed) if temperature > 0 else None

    hidden, cache = model.prefill(input_ids, attention_mask, **inputs)
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    ends = torch.tensor(eos_token_id, device=input_ids.device)  # one or several
    for step in range(max_new_tokens):
        logits = model.logits(hidden).float()  # [B, V]
        if not torch.isfinite(logits[unfinished]).all():
            raise InputError(explain_nonfinite(model, inputs))
        if generators is None:
            token_ids = logits.argmax(dim=-1)
        else:
            token_ids = sample(logits / temperature, top_k, top_p, generators)
        token_ids = torch.where(unfinished, token_ids, pad_token_id)
        yield token_ids
        unfinished = unfinished & ~torch.isin(token_ids, ends)
        if not unfinished.any() or step == max_new_tokens - 1:
            return
        hidden = model.decode(token_ids, unfinished, cache)


def generate(model: Decodable, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """All new tokens at once, [B, n]: `stream`, collected. Same arguments."""
    return torch.stack(list(stream(model, input_ids, *args, **kwargs)), dim=1)


def sample(
    logits: Tensor, top_k: int | None, top_p: float | None, generators: list[torch.Generator]
) -> Tensor:
    """Draw one token per row from softmax(logits) [B, V], restricted to the best k or the nucleus p."""
    if top_k is not None:
        kth_best = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth_best, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token stays if the better ones together have not reached p, so the best one always stays.
        outside = ordered.cumsum(dim=-1) - ordered >= top_p
        probabilities = probabilities.masked_fill(outside.gather(-1, order.argsort(dim=-1)), 0.0)
    rows = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(probabilities.cpu(), generators, strict=True)
    ]
    return torch.cat(rows).to(logits.device)


def last_token_indices(attention_mask: Tensor) -> Tensor:
    """The index of each row's last token, whichever side is padded: [B, T] -> [B]."""
    return torch.where(attention_mask.bool(), attention_mask.cumsum(dim=1), 0).argmax(dim=1)


def _generators(rows: int, seed: int | None) -> list[torch.Generator]:
    first = int(torch.randint(2**62, ())) if seed is None else seed
    return [torch.Generator().manual_seed(first + row) for row in range(rows)]


def _check(
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    max_length: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    _check_tensors(input_ids, attention_mask)
    for name, number in {"max_new_tokens": max_new_tokens, "top_k": top_k}.items():
        if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
            raise ValueError(f"{name} is {number!r}: expected a whole number")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}: ask for at least 1 new token")
    prompt = int(attention_mask.sum(dim=1).max())
    if max_length is not None and prompt >= max_length:
        raise InputError(
            f"the prompt has {prompt} tokens including its picture; with 1 for the answer, that is more than "
            f"the model's context of {max_length}: shorten the prompt by {prompt - max_length + 1} or more"
        )
    if max_length is not None and prompt + max_new_tokens > max_length:
        raise InputError(
            f"the prompt has {prompt} tokens and max_new_tokens is {max_new_tokens}, together more than the "
            f"model's context of {max_length}: ask for at most {max_length - prompt} new tokens "
            "or shorten the prompt"
        )
    if temperature != 0 and not 0.001 <= temperature <= 1000:
        raise InputError(
            f"temperature is {temperature}: use 0 for the most probable token, or a number from 0.001 to 1000"
        )
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {top_k}: keep at least 1 token")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}: it is a probability, above 0 and at most 1")


def _check_tensors(input_ids: Tensor, attention_mask: Tensor) -> None:
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids has shape {list(input_ids.shape)}, expected [B, T], with a token at least"
        )
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids is of type {input_ids.dtype}, expected whole numbers, as torch.int64")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, expected that of input_ids, "
            f"{list(input_ids.shape)}"
        )
    if not attention_mask.bool().any(dim=1).all():
        raise ValueError("a row of attention_mask has padding alone: expected a token at least")


def explain_nonfinite(model: object, inputs: Mapping[str, object]) -> str:
    """Why an output is NaN or infinite: the inputs are, the weights are, or numbers overflow between them."""
    for name, value in inputs.items():
        if isinstance(value, Tensor) and not torch.isfinite(value).all():
            return f"{name} hold NaN or infinity: the numbers that go into a model have to be finite"
    parameters = getattr(model, "named_parameters", list)
    names = [name for name, p in parameters() if not torch.isfinite(p).all()]
    if names:
        listed = ", ".join(names[:5])
        return f"the weights hold NaN or infinity in {listed}: the checkpoint is damaged, download it again"
    return "the output is not finite although all weights are: the numbers overflow, try dtype=torch.float32"
