"""MAGiC's scores and texts are those of the authors' own program, and its usual mistakes give others.

`SCORES` were printed by `plug_and_play_fast_ranking` in image_captioning/language_model/utlis.py of
https://github.com/yxuansu/MAGIC, with CANDIDATES, CONTEXT, PROBABILITIES and MATCHES; `TEXTS` by
`PlugAndPlayContrastiveDecodingOneStepFast` there, step by step over transformers' GPT-2 (32 wide, 2 layers, 4
heads, 120 words) with the tensors of `made_up`, from PROMPT, with `cosine` times 3 in place of CLIP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpt2 import load_gpt2
from helpers import assert_differs, assert_equal, made_up, noise, randomize
from miniatures import TINY_TEXT
from PIL import Image
from small_towers import make_towers
from torch import Tensor
from transformers import GPT2Config as ReferenceConfig
from transformers import GPT2Model

from minivlm import masks
from minivlm.errors import InputError
from minivlm.models.load import load_matching
from minivlm.models.miniatures.magic import Match, magic_generate, magic_scores, match_with
from minivlm.processing import Tokenizer, build_tokenizer
from minivlm.text.gemma import GemmaConfig, GemmaDecoder
from minivlm.text.gpt2 import GPT2Config, GPT2Decoder
from minivlm.text.llama import LlamaConfig, LlamaDecoder

CANDIDATES, CONTEXT = noise(6, 16, start=0.5), noise(9, 16, start=0.75)
ALL_PROBABILITIES = noise(40, start=1.25).mul(3).softmax(dim=0)
PROBABILITIES = ALL_PROBABILITIES.topk(6).values
MATCHES = noise(6, start=2.0).mul(2).softmax(dim=0)
SCORES = {  # alpha, beta -> of each candidate
    (0.1, 2.0): [0.6716138, 0.1997634, 0.172922, 0.0958236, 1.0539665, 0.2174614],
    (0.6, 0.15): [-0.0334707, -0.0607735, -0.1043601, -0.0905643, -0.0512095, -0.2235407],
    (0.6, 0.0): [-0.0660946, -0.0709227, -0.1133556, -0.0945096, -0.1288588, -0.2401775],
    (0.0, 0.0): [0.2971728, 0.0915142, 0.0862485, 0.0707652, 0.0481433, 0.0428008],
}
PROMPT = [2, 5, 17, 3]
TEXTS = {  # k, alpha, beta -> 12 words
    (8, 0.1, 2.0): "46 96 91 91 91 23 89 23 26 26 98 91",
    (8, 0.6, 0.15): "46 90 98 12 53 91 23 0 39 96 23 14",
    (5, 0.6, 0.0): "7 23 54 53 81 91 23 14 91 54 82 54",
    (1, 0.6, 2.0): "91 91 23 23 53 53 53 53 53 53 54 23",
}


class Numbers:
    """A tokenizer whose words are their ids; none of them ends a text."""

    eos_id = -1

    def encode_prefix(self, prompt: str, image_seq_len: int) -> list[int]:
        return [int(word) for word in prompt.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def cosine(text: str) -> float:
    return float(noise(1, start=float(sum((i + 1) * int(w) for i, w in enumerate(text.split()))))[0])


def made_up_match(texts: Sequence[str]) -> Tensor:
    return torch.tensor([3 * cosine(text) for text in texts])


@pytest.fixture(scope="module")
def gpt2() -> GPT2Decoder:
    names = ReferenceConfig(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=120, bos_token_id=0, eos_token_id=1
    )
    tensors = {
        name: made_up(f"gpt.transformer.{name}", tensor.shape, r"(ln_|norm)\w*\.weight$")
        for name, tensor in GPT2Model(names).state_dict().items()
    }
    decoder = GPT2Decoder(TINY_TEXT)
    load_gpt2(decoder, tensors)
    return decoder.eval()


def text(
    decoder: Any,
    k: int = 8,
    alpha: float = 0.1,
    beta: float = 2.0,
    words: int = 12,
    match: Match = made_up_match,
    tokenizer: Any = None,
) -> str:
    prompt = " ".join(map(str, PROMPT))
    return magic_generate(decoder, tokenizer or Numbers(), match, prompt, k, alpha, beta, words)


# The score


def scores(alpha: float, beta: float, probabilities: Tensor = PROBABILITIES) -> Tensor:
    return magic_scores(probabilities, CANDIDATES, CONTEXT, MATCHES, alpha, beta)


@pytest.mark.parametrize("numbers", SCORES)
def test_scores_equal_the_original(numbers: tuple[float, float]) -> None:
    assert_equal(scores(*numbers), torch.tensor(SCORES[numbers]))


def test_mistakes_in_the_score_show() -> None:
    right = torch.tensor(SCORES[(0.6, 0.15)])
    cosines = F.normalize(CANDIDATES, dim=1) @ F.normalize(CONTEXT, dim=1).T
    mean = 0.4 * PROBABILITIES - 0.6 * cosines.mean(dim=1) + 0.15 * MATCHES
    over_the_candidates = PROBABILITIES / PROBABILITIES.sum()
    dots = 0.4 * PROBABILITIES - 0.6 * (CANDIDATES @ CONTEXT.T).amax(dim=1) + 0.15 * MATCHES
    for wrong in (mean, dots, scores(0.6, 0.15, over_the_candidates), scores(0.6, 0.0), scores(0.1, 0.15)):
        assert_differs(wrong, right, factor=1000)
        # As a ranking, too: not only by what is the same for all candidates.
        assert_differs(wrong - wrong.mean(), right - right.mean(), factor=1000)


# The loop


@pytest.mark.parametrize("numbers", TEXTS)
def test_texts_equal_the_original(numbers: tuple[int, float, float], gpt2: GPT2Decoder) -> None:
    assert text(gpt2, *numbers) == TEXTS[numbers]


@torch.no_grad()
def naive(decoder: Any, match: Match, k: int, alpha: float, beta: float, words: int, wrong: str = "") -> str:
    """The same without a cache: whole rows are read again for every word."""

    def read(rows: Tensor) -> Tensor:
        places = torch.arange(rows.shape[1]).expand_as(rows)
        return decoder(decoder.embed(rows), places, masks.causal(places, places)[:, None])

    row = list(PROMPT)
    for _ in range(words):
        context = read(torch.tensor([row]))[0]
        probabilities, ids = decoder.logits(context[-1]).softmax(dim=-1).topk(k)
        candidates = read(torch.tensor([[*row, int(i)] for i in ids]))[:, -1]
        fits = match([Numbers().decode([*row[len(PROMPT) :], int(i)]) for i in ids]).softmax(dim=0)
        cosines = F.normalize(candidates, dim=1) @ F.normalize(context, dim=1).T
        repeats = cosines.mean(dim=1) if wrong == "mean for max" else cosines.max(dim=1).values
        if wrong == "normalized over k":
            probabilities = probabilities / probabilities.sum()
        fits = fits * 0 if wrong == "beta 0" else fits
        row.append(int(ids[((1 - alpha) * probabilities - alpha * repeats + beta * fits).argmax()]))
    return Numbers().decode(row[len(PROMPT) :])


@pytest.mark.parametrize("kind", ["gpt2", "gemma", "llama"])
def test_any_causal_decoder_equals_a_loop_without_a_cache(kind: str, gpt2: GPT2Decoder) -> None:
    """Also those whose heads share their keys."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 120,
        "max_position_embeddings": 64,
    }
    decoder = {
        "gpt2": lambda: gpt2,
        "gemma": lambda: randomize(GemmaDecoder(GemmaConfig(**sizes, num_key_value_heads=2, head_dim=8))),
        "llama": lambda: randomize(LlamaDecoder(LlamaConfig(**sizes, num_key_value_heads=2))),
    }[kind]()
    for k, alpha, beta in ((6, 0.3, 0.4), (9, 0.6, 0.0)):
        expected = naive(decoder, made_up_match, k, alpha, beta, words=10)
        assert text(decoder, k, alpha, beta, words=10) == expected
        assert len(set(expected.split())) > 3


def test_one_candidate_is_greedy(gpt2: GPT2Decoder) -> None:
    greedy = naive(gpt2, made_up_match, 120, alpha=0.0, beta=0.0, words=8)
    for alpha, beta in ((0.0, 0.0), (1.0, 5.0)):
        assert text(gpt2, 1, alpha, beta, words=8) == greedy
    assert text(gpt2, words=8) != greedy


@pytest.mark.parametrize("wrong", ["mean for max", "beta 0", "normalized over k"])
def test_mistakes_give_another_text_within_five_words(wrong: str, gpt2: GPT2Decoder) -> None:
    numbers: dict[str, Any] = {"k": 8, "alpha": 0.6, "beta": 0.4, "words": 5}
    right = text(gpt2, **numbers)
    assert naive(gpt2, made_up_match, **numbers) == right
    assert naive(gpt2, made_up_match, **numbers, wrong=wrong) != right


def test_the_picture_decides_and_the_prompt_is_no_part_of_the_text(gpt2: GPT2Decoder) -> None:
    seen: list[Sequence[str]] = []

    def likes_even(texts: Sequence[str]) -> Tensor:
        seen.append(list(texts))
        return torch.tensor([100.0 * (int(text.split()[-1]) % 2 == 0) for text in texts])

    written = text(gpt2, k=20, words=5, match=likes_even)
    assert all(int(word) % 2 == 0 for word in written.split())
    assert [len(texts) for texts in seen] == [20] * 5
    words = written.split()
    for number, texts in enumerate(seen):
        assert all(text.split()[:-1] == words[:number] for text in texts)


def test_the_end_of_a_long_text_is_compared(gpt2: GPT2Decoder) -> None:
    longest: list[int] = []

    def match(texts: Sequence[str]) -> Tensor:
        longest.append(max(len(text.split()) for text in texts))
        return torch.zeros(len(texts))

    magic_generate(gpt2, Numbers(), match, "2", 3, max_new_tokens=63)
    assert longest == [*range(1, 61), 60, 60, 60]


def test_a_text_ends_with_its_end(gpt2: GPT2Decoder) -> None:
    class Ends(Numbers):
        eos_id = 53

        def decode(self, ids: Sequence[int]) -> str:
            return super().decode([i for i in ids if i != self.eos_id])

    assert TEXTS[1, 0.6, 2.0].startswith("91 91 23 23 53 ")
    assert text(gpt2, 1, 0.6, tokenizer=Ends()) == "91 91 23 23"


# With a model that matches


@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_a_tiny_pair_of_models(objective: str, tmp_path: Path) -> None:
    """The shipped forms of folders, pictures and prompts; another picture gives another text."""
    towers, pairs = load_matching(make_towers(tmp_path, objective))
    randomize(towers)
    towers.logit_scale.data.fill_(math.log(100))  # as in CLIP
    tokenizer = Tokenizer(build_tokenizer(["caption en", "a large red star left of a blue circle"]))
    decoder = randomize(GPT2Decoder(GPT2Config(**vars(TINY_TEXT) | {"vocab_size": tokenizer.vocab_size})))
    red, gray = Image.new("RGB", (20, 20), "red"), Image.linear_gradient("L")

    def describe(picture: Image.Image, **choices: Any) -> str:
        match = match_with(towers, pairs, picture)
        return magic_generate(decoder, tokenizer, match, "caption en", 12, 0.1, max_new_tokens=5, **choices)

    texts = ["a red star", "a blue circle", ""]
    fits = match_with(towers, pairs, red)(texts)
    batch = pairs(images=[red], texts=texts)
    assert_equal(fits, towers(batch["input_ids"], batch["pixel_values"]).logits_per_image[0])
    assert describe(red) == describe(red)
    assert len({describe(red), describe(gray), describe(red, beta=0.0)}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0: choose from 1 to 120 candidates"),
        ({"k": 121}, "k is 121: choose from 1 to 120 candidates"),
        ({"alpha": -0.1}, "alpha is -0.1: choose from 0, repeat freely, to 1"),
        ({"alpha": 1.1}, "alpha is 1.1: choose from 0"),
        ({"alpha": math.nan}, "alpha is nan: choose from 0"),
        ({"beta": -1.0}, "beta is -1.0: choose 0, without the picture, or more"),
        ({"beta": math.inf}, "beta is inf: choose 0"),
        ({"prompt": " \n"}, "the prompt is empty: give the text something to start from"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: ask for at least 1"),
        ({"max_new_tokens": 61}, "the prompt has 4 tokens and max_new_tokens is 61, .* context of 64"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str, gpt2: GPT2Decoder) -> None:
    choices = {"prompt": "2 5 17 3", "max_new_tokens": 12} | change
    with pytest.raises(InputError, match=message):
        magic_generate(gpt2, Numbers(), made_up_match, **choices)


def test_scores_that_are_no_numbers_are_refused(gpt2: GPT2Decoder) -> None:
    with pytest.raises(InputError, match="the scores of the picture hold NaN or infinity"):
        text(gpt2, match=lambda texts: torch.full((len(texts),), math.nan))
