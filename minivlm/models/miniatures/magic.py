"""MAGiC (https://arxiv.org/abs/2205.02655): a picture guides a language model that never saw one.

    text so far -> GPT-2 -> the k most likely next words ┐
                                                         ├-> the one that is likely, new, and fits
    picture, text so far + each of them -> CLIP ---------┘

Nothing is trained: both models stay what they are, and only the choice of the next word knows the picture.
What differs from all other ways here: nothing of the picture enters the language model, so it cannot be asked
about the picture, only made to describe it. Each candidate v of the k has the score

    (1 - alpha) p(v)  -  alpha max_j cos(h_v, h_j)  +  beta f(v)

p is the probability among all words. h are hidden states after the decoder's last norm: h_v of the candidate,
once it is read, and h_j of each token before it. A word whose state resembles an earlier one repeats what was
said. f compares the picture with the text so far and v, in a softmax over the k candidates.

With beta = 0, this is contrastive search (https://arxiv.org/abs/2202.06417), and with k = 1 greedy decoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from minivlm.cache import KVCache
from minivlm.errors import InputError
from minivlm.generate import explain_nonfinite
from minivlm.losses import l2_normalize
from minivlm.models.protocols import Matches
from minivlm.models.views import place
from minivlm.processing import PairProcessor, Tokenizer
from minivlm.processing.inputs import Picture

LONGEST_TEXT = 60  # tokens at the end of a text that are compared with the picture, as in the original

Match = Callable[[Sequence[str]], Tensor]  # k texts -> how well each fits one picture, [k], of any scale


class DecoderShape(Protocol):
    """What a cache has to know, and how much fits."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


class CausalDecoder(Protocol):
    """A decoder that reads from left to right, such as `minivlm.text.gpt2.GPT2Decoder`."""

    embed_tokens: nn.Embedding

    @property
    def config(self) -> DecoderShape: ...
    def embed(self, input_ids: Tensor) -> Tensor: ...
    def __call__(
        self, inputs_embeds: Tensor, position_ids: Tensor, mask: Tensor, cache: KVCache
    ) -> Tensor: ...
    def logits(self, hidden_states: Tensor) -> Tensor: ...


def magic_scores(
    probabilities: Tensor, candidates: Tensor, context: Tensor, matches: Tensor, alpha: float, beta: float
) -> Tensor:
    """The score of each of k candidates.

    Args:
        probabilities: [k], of the candidates among all words; not normalized once more over the k.
        candidates: [k, D], their hidden states.
        context: [S, D], the hidden states of all tokens before them.
        matches: [k], how well the text fits the picture with each of them; sums to 1.
        alpha: from 0 to 1, how much repeating costs; what is likely counts 1 - alpha.
        beta: how much the picture counts.

    Returns:
        [k].
    """
    repeats = (l2_normalize(candidates) @ l2_normalize(context).mT).amax(dim=1)
    return (1 - alpha) * probabilities - alpha * repeats + beta * matches


@torch.inference_mode()
def magic_generate(
    language_model: CausalDecoder,
    tokenizer: Tokenizer,
    match: Match,
    prompt: str,
    k: int = 45,
    alpha: float = 0.1,
    beta: float = 2.0,
    max_new_tokens: int = 16,
) -> str:
    """Let a language model go on after a prompt, guided by a picture. The defaults are the paper's.

    >>> magic_generate(gpt2, processor.tokenizer, match_with(clip, pairs, "photo.jpg"), "caption en")

    Args:
        match: texts about one picture; see `match_with`. The prompt is not part of them.
        k: candidates for each word; they are read as one batch.
        alpha, beta: as in `magic_scores`.

    Returns:
        The text, without the prompt and without its end.

    Raises InputError: a number out of range, a prompt without a word or too long a one, or scores that are
    not finite.
    """
    _check(language_model.config, prompt, k, alpha, beta, max_new_tokens)
    device = language_model.embed_tokens.weight.device
    prompt_ids = torch.tensor(tokenizer.encode_prefix(prompt, 0), device=device)
    _check_room(language_model.config, len(prompt_ids), max_new_tokens)
    cache = _new_cache(language_model, k)
    context = _read(language_model, prompt_ids.expand(k, -1), cache)[0]  # [S, D]
    written: list[int] = []
    while len(written) < max_new_tokens:
        probabilities, ids = language_model.logits(context[-1]).float().softmax(dim=-1).topk(k)
        candidates = _read(language_model, ids[:, None], cache)[:, 0]  # [k, D]
        texts = [tokenizer.decode([*written, number][-LONGEST_TEXT:]) for number in ids.tolist()]
        matches = match(texts).float().softmax(dim=0).to(device)
        scores = magic_scores(probabilities, candidates.float(), context.float(), matches, alpha, beta)
        if not torch.isfinite(scores).all():
            raise InputError(explain_nonfinite(language_model, {"the scores of the picture": matches}))
        best = int(scores.argmax())
        written.append(int(ids[best]))
        if written[-1] == tokenizer.eos_id:
            break
        context = torch.cat([context, candidates[best, None]])
        _follow(cache, best)
    return tokenizer.decode(written)


def match_with(model: Matches, processor: PairProcessor, picture: Picture) -> Match:
    """How well texts fit a picture, by a model that matches. The picture is encoded once.

    Raises InputError: a picture that cannot be read.
    """
    pixel_values = processor(images=[picture])["pixel_values"].to(model.device)
    with torch.inference_mode():
        image_embeds = model.encode_image(pixel_values)  # [1, D]

    def match(texts: Sequence[str]) -> Tensor:
        input_ids = processor(texts=texts, truncate=True)["input_ids"].to(model.device)
        return model.logits(image_embeds, model.encode_text(input_ids))[0]

    return match


def _read(language_model: CausalDecoder, input_ids: Tensor, cache: KVCache) -> Tensor:
    """Tokens [k, T] after those that the cache holds -> hidden states [k, T, D]."""
    position_ids, mask = place(torch.ones_like(input_ids), cache)
    return language_model(language_model.embed(input_ids), position_ids, mask, cache)


def _follow(cache: KVCache, best: int) -> None:
    """All rows go on as the best one. They differ in nothing but their last token."""
    last = int(cache.lengths[best]) - 1
    for store in (*cache.keys, *cache.values):
        store[:, :, last] = store[best, :, last].clone()


def _new_cache(language_model: CausalDecoder, rows: int) -> KVCache:
    shape, table = language_model.config, language_model.embed_tokens.weight
    heads = getattr(shape, "num_key_value_heads", shape.num_attention_heads)
    return KVCache(
        shape.num_hidden_layers, rows, heads, shape.head_dim, dtype=table.dtype, device=table.device
    )


def _check(shape: DecoderShape, prompt: str, k: int, alpha: float, beta: float, max_new_tokens: int) -> None:
    if not prompt.strip():
        raise InputError("the prompt is empty: give the text something to start from, such as 'caption en'")
    if not 1 <= k <= shape.vocab_size:
        raise InputError(f"k is {k}: choose from 1 to {shape.vocab_size} candidates, all words there are")
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha is {alpha}: choose from 0, repeat freely, to 1, count nothing as likely")
    if not 0 <= beta < math.inf:
        raise InputError(f"beta is {beta}: choose 0, without the picture, or more")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}: ask for at least 1 new token")


def _check_room(shape: DecoderShape, prompt_tokens: int, max_new_tokens: int) -> None:
    if prompt_tokens + max_new_tokens > shape.max_position_embeddings:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens and max_new_tokens is {max_new_tokens}, together more "
            f"than the decoder's context of {shape.max_position_embeddings}: shorten one of them"
        )
