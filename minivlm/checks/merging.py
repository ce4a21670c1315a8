"""Checks for 06_merging: masks, merging, positions, a test for leaks, a fault to find, and the capstone."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from minivlm.checks import Functions, NotYet, call, expect, right, same
from minivlm.checks._capstone import matches, say_the_fault
from minivlm.models.load import SHIPPED

IMAGE, PAD = 7, 0  # 7 is outside the small vocabulary of 0 to 6

# Three rows: a picture of three tokens; text only, padded on the left; a picture, padded on the right.
IDS = torch.tensor(
    [[7, 7, 7, 2, 3, 4, 5, 6], [0, 0, 0, 0, 2, 4, 5, 6], [7, 7, 7, 2, 5, 6, 0, 0]],
)


class solutions:
    """The solutions that the notebook continues with."""

    @staticmethod
    def three_masks(input_ids: Tensor, image_id: int, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image, text and padding mask of input_ids [B, S], each boolean [B, S]."""
        image_mask = input_ids == image_id
        padding_mask = input_ids == pad_id
        text_mask = ~image_mask & ~padding_mask
        return image_mask, text_mask, padding_mask

    @staticmethod
    def merge_with_where(is_image: Tensor, words: Tensor, features: Tensor) -> Tensor:
        """is_image [B, S], words [B, S, D], features [pictures, N, D] -> [B, S, D]."""
        numbers = is_image.flatten().cumsum(0).view_as(is_image) - 1
        spread = features.flatten(0, 1)[numbers.clamp(min=0)]
        return torch.where(is_image[..., None], spread, words)

    @staticmethod
    def positions_and_keys() -> dict[str, int]:
        """Places, positions and numbers of visible keys, in a batch that is padded on the left."""
        return {
            "pads before row B": 60,
            "position of <bos> in row A": 64,
            "position of <bos> in row B": 0,
            "keys that the first <image> of row A sees": 68,
            "keys that the newline of row B sees": 8,
            "position of the first word of B's answer": 8,
            "keys that this word sees": 9,
        }

    @staticmethod
    def block_mask(token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The prefix-LM mask [B, S, S] from [B, S], [B, S]: one running count and one comparison."""
        blocks = token_type_ids.cumsum(dim=1)
        return (blocks[:, None, :] <= blocks[:, :, None]) & attention_mask[:, None, :].bool()

    @staticmethod
    def count_leaks(
        logits_of: Callable[[Tensor], Tensor], input_ids: Tensor, token_type_ids: Tensor, other_id: int
    ) -> int:
        """How many answer positions change when the last token is replaced by another."""
        changed = input_ids.clone()
        changed[0, -1] = other_id
        moved = (logits_of(input_ids) - logits_of(changed)).abs().amax(dim=-1)[0]
        earlier = token_type_ids[0] == 1
        earlier[-1] = False
        return int((moved[earlier] > 1e-4).sum())

    @staticmethod
    def find_fault(sound: Any, patient: Any, inputs: dict[str, Tensor]) -> str:
        """The first part of `patient` that computes something else than `sound` does, or "nothing"."""
        ids, mask, pixels = (inputs[name] for name in ("input_ids", "attention_mask", "pixel_values"))

        def differs(a: Tensor, b: Tensor) -> bool:
            return bool((a - b).abs().max() > 1e-3 * b.abs().max())

        features = sound.encode_image(pixels)
        if differs(patient.encode_image(pixels), features):
            return "encode_image"
        if differs(patient.merge(ids, features), sound.merge(ids, features)):
            return "merge"
        (theirs, their_cache), (hidden, cache) = (m.prefill(ids, mask, pixels) for m in (patient, sound))
        if differs(theirs, hidden):
            return "prefill"
        if differs(patient.logits(hidden), sound.logits(hidden)):
            return "logits"
        token, going_on = sound.logits(hidden).argmax(dim=-1), torch.ones(len(ids), dtype=torch.bool)
        theirs = patient.decode(token, going_on, their_cache)
        return "decode" if differs(theirs, sound.decode(token, going_on, cache)) else "nothing"

    @staticmethod
    def read_and_answer(
        folder: Path, image_features: Tensor, prompt_ids: Tensor, max_new_tokens: int = 32
    ) -> tuple[list[int], Tensor]:
        """image_features [N, D], prompt_ids [T] -> ids of the answer with its <eos>, and logits [n, V]."""
        config = json.loads((folder / "config.json").read_text())["text_config"]
        weights = load_file(folder / "model.safetensors")
        table = weights["language_model.model.embed_tokens.weight"]
        Dh, factor = config["head_dim"], config["hidden_size"] ** 0.5
        cache = [torch.zeros(2, 1, 0, Dh)] * config["num_hidden_layers"]  # keys and values [2, K, S, Dh]

        def norm(x: Tensor, name: str) -> Tensor:
            x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + config["rms_norm_eps"])
            return x * (1 + weights[f"language_model.model.{name}.weight"])

        def linear(x: Tensor, name: str) -> Tensor:
            return x @ weights[f"language_model.model.{name}_proj.weight"].T

        def rotate(x: Tensor, start: int) -> Tensor:
            angles = torch.arange(start, start + x.shape[1])[:, None]
            angles = angles * config["rope_theta"] ** -(torch.arange(0, Dh, 2) / Dh)
            (a, b), cos, sin = x.chunk(2, dim=-1), angles.cos(), angles.sin()
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

        def read(x: Tensor) -> Tensor:
            start = cache[0].shape[2]
            for number in range(len(cache)):
                at = f"layers.{number}"
                y = norm(x, f"{at}.input_layernorm")
                q, k, v = (
                    linear(y, f"{at}.self_attn.{n}").unflatten(1, (-1, Dh)).transpose(0, 1) for n in "qkv"
                )
                new = torch.stack([rotate(k, start), v])
                keys, values = cache[number] = torch.cat([cache[number], new], dim=2)
                seen = (rotate(q, start) @ keys.mT * Dh**-0.5).softmax(dim=-1) @ values
                x = x + linear(seen.transpose(0, 1).flatten(1), f"{at}.self_attn.o")
                y = norm(x, f"{at}.post_attention_layernorm")
                gate = F.gelu(linear(y, f"{at}.mlp.gate"), approximate="tanh")
                x = x + linear(gate * linear(y, f"{at}.mlp.up"), f"{at}.mlp.down")
            return norm(x[-1], "norm") @ table.T

        logits = [read(torch.cat([image_features, table[prompt_ids] * factor]))]
        while logits[-1].argmax() != 1 and len(logits) < max_new_tokens:
            logits.append(read(table[logits[-1].argmax()][None] * factor))
        return torch.stack(logits).argmax(dim=-1).tolist(), torch.stack(logits)


def three_masks(answer: Callable[[Tensor, int, int], tuple[Tensor, Tensor, Tensor]]) -> None:
    """Exercise 1."""
    result = call(answer, IDS.clone(), IMAGE, PAD)
    expect(
        isinstance(result, tuple) and len(result) == 3,
        "return three masks, separated by commas: image_mask, text_mask, padding_mask",
    )
    image, text, pad = solutions.three_masks(IDS, IMAGE, PAD)
    names = ("image_mask", "text_mask", "padding_mask")
    for name, mask in zip(names, result, strict=True):
        expect(isinstance(mask, Tensor), f"{name} should be a tensor, but it is a {type(mask).__name__}")
        expect(
            mask.dtype == torch.bool,
            f"{name} has dtype {mask.dtype}: a mask is boolean, so keep the result of the comparison as it "
            "is",
        )
    given = dict(zip(names, result, strict=True))
    order = [
        next((name for name, mask in zip(names, (image, text, pad), strict=True) if same(m, mask)), "")
        for m in result
    ]
    expect(
        sorted(order) != sorted(names) or order == list(names),
        f"all three masks are right, but you return {', '.join(order)}: the order is {', '.join(names)}",
    )
    expect(
        not same(given["text_mask"], ~image),
        "your text_mask is True at the padding: text is what is neither image nor padding",
    )
    expect(
        not same(given["text_mask"], ~pad),
        "your text_mask is True at the placeholders: text is what is neither image nor padding",
    )
    expect(
        not same(given["padding_mask"], ~pad),
        "your padding_mask is True at the tokens and False at the padding: here it is the other way around "
        "(what you have is the attention_mask)",
    )
    expect(
        not same(given["image_mask"], ~image),
        "your image_mask is True everywhere but at the placeholders: compare with ==, not with !=",
    )
    for name, reference in zip(names, (image, text, pad), strict=True):
        expect(given[name].shape == IDS.shape, f"{name} should have the shape of input_ids")
        wrong = (given[name] != reference).nonzero().tolist()
        if wrong:
            row, place = wrong[0]
            told, number = bool(given[name][row, place]), int(IDS[row, place])
            raise NotYet(
                f"{name} is {told} at row {row}, place {place}, where the id is {number} (the placeholder's "
                f"is {IMAGE}, the padding's {PAD}): text is what is neither image nor padding"
            )
    other = call(answer, IDS + 10, IMAGE + 10, PAD + 10)
    expect(
        isinstance(other, tuple) and all(torch.equal(a, b) for a, b in zip(other, result, strict=True)),
        "with other ids for the image and the padding the masks are wrong: use image_id and pad_id",
    )
    right("every position is exactly one of the three, image, text or padding.")


def merge_with_where(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Exercise 2."""
    is_image = IDS == IMAGE
    words = torch.arange(3.0 * 8 * 4).view(3, 8, 4)
    features = -torch.arange(1.0, 2 * 3 * 4 + 1).view(2, 3, 4)
    reference = solutions.merge_with_where(is_image, words, features)
    used = Functions()
    try:
        with used:
            result = call(answer, is_image.clone(), words.clone(), features.clone())
    except NotYet as error:
        cause = error.__cause__
        if isinstance(cause, IndexError) and ("size 2" in str(cause) or "size 3" in str(cause)):
            raise NotYet(
                f"{error}. The numbers of the placeholders run over both pictures: flatten the features to "
                "[pictures * N, D] before you pick from them"
            ) from error
        if isinstance(cause, IndexError) and "size 6" in str(cause):
            raise NotYet(
                f"{error}. There are features number 0 to 5: the first placeholder takes number 0, so "
                "subtract 1 from the running count"
            ) from error
        if isinstance(cause, IndexError):
            raise NotYet(
                f"{error}. Numbers that pick features must be whole numbers of shape [B, S], as cumsum gives"
            ) from error
        if isinstance(cause, RuntimeError) and not isinstance(cause, NotImplementedError):
            raise NotYet(
                f"{error}. torch.where needs features of the sequence's shape [B, S, D], and a mask "
                "[B, S, 1]: number the placeholders first, and pick a feature for every position"
            ) from error
        raise
    numbers = is_image.flatten().cumsum(0).view_as(is_image)
    flat = features.flatten(0, 1)
    place = is_image[..., None]
    likely = {
        "the second picture's row got the features of the first picture again: count the placeholders "
        "across the whole batch, not separately in each row": flat[is_image.cumsum(1).sub(1).clamp(min=0)],
        "the first placeholder got feature number 1: subtract 1 from the running count": flat[
            numbers.clamp(max=5)
        ],
        "the first placeholder got the last feature: number it 0, so subtract 1 once": flat[numbers - 2],
    }
    for hint, spread in likely.items():
        expect(not same(result, torch.where(place, spread, words)), hint)
    spread = flat[numbers.sub(1).clamp(min=0)]
    expect(
        not same(result, torch.where(place, words, spread)),
        "words and features are swapped: torch.where(condition, value where True, value where False)",
    )
    expect(
        not same(result, spread),
        "every position got a feature, the words are gone: let torch.where choose between the two",
    )
    expect(not same(result, words), "these are the words alone: no placeholder got a feature")
    expect(
        isinstance(result, Tensor) and result.shape == reference.shape,
        f"the merged sequence should be a tensor of shape {list(reference.shape)}, like the words",
    )
    for row, column in is_image.nonzero().tolist():
        held = (result[row, column] == flat).all(dim=-1).nonzero().flatten().tolist()
        number = int(numbers[row, column]) - 1
        expect(
            held == [number],
            f"row {row}, place {column} should hold feature number {number}, and holds "
            f"{f'number {held[0]}' if held else 'no feature'}: features are taken in reading order",
        )
    expect(same(result, reference), "the features are right, but a word is not what it was")
    expect(
        not {"masked_scatter", "masked_scatter_"} & used.names,
        "the result is right, but masked_scatter made it: the exercise is to do without it",
    )
    expect(
        "where" in used.names,
        "the result is right, but not by torch.where: the exercise is to choose with it, place by place",
    )
    right("torch.where merges as well, once a gather has given the features the shape of the sequence.")


# For each prediction: what a wrong number reveals, and what to think of otherwise.
PREDICTIONS: dict[str, tuple[dict[int, str], str]] = {
    "pads before row B": (
        {
            64: "64 is the number of image tokens, but row A also has <bos>, two words and a newline",
            68: "68 is the length of row A; row B has 8 tokens of its own",
            0: "both rows must be of one length, and row B is the shorter",
        },
        "row A has 64 + 4 tokens, row B has 8",
    ),
    "position of <bos> in row A": (
        {
            0: "<bos> is not the first token here: the picture stands before it, and its tokens count",
            1: "the picture is not one token but 64",
            65: "positions are counted from 0, and 64 image tokens stand before <bos>",
        },
        "64 image tokens stand before <bos>, and the first of them has position 0",
    ),
    "position of <bos> in row B": (
        {
            60: "60 is its column: positions count real tokens only, and it is the first of its row",
            64: "row B has no picture, so nothing stands before its <bos> but padding",
            1: "positions are counted from 0",
        },
        "it is the first real token of its row",
    ),
    "keys that the first <image> of row A sees": (
        {
            1: "that is the causal mask: the picture belongs to the prefix, which sees all of itself",
            64: "it sees the words of the prompt as well, and the newline: they are prefix, too",
            65: "all four tokens of the prompt are prefix, not <bos> alone",
            67: "a token sees itself, too",
        },
        "a token of the prefix sees the whole prefix",
    ),
    "keys that the newline of row B sees": (
        {
            68: "the padding is hidden from it: only its own row's tokens are left",
            7: "a token sees itself, too",
            1: "it belongs to the prefix and sees all of that",
        },
        "it sees its row's prefix, without padding",
    ),
    "position of the first word of B's answer": (
        {
            68: "68 is its column: in its row it comes after 8 tokens",
            9: "it comes after 8 tokens, which have positions 0 to 7",
            7: "position 7 is the newline's",
            0: "an answer goes on with the positions of its prefix",
        },
        "8 tokens stand before it",
    ),
    "keys that this word sees": (
        {
            8: "it sees the 8 tokens before it and itself",
            69: "the padding is hidden from it",
            1: "the answer sees the prefix, or it would know neither question nor picture",
        },
        "it sees the tokens before it and itself",
    ),
}


def positions_and_keys(answer: Callable[[], dict[str, int]]) -> None:
    """Exercise 3."""
    result = call(answer)
    expect(isinstance(result, dict), f"return the dict of predictions, not a {type(result).__name__}")
    truth = solutions.positions_and_keys()
    missing = [name for name in truth if not isinstance(result.get(name), int)]
    expect(not missing, f"predict a whole number for: {', '.join(missing)}")
    wrong = []
    for name, number in truth.items():
        guess = int(result[name])
        if guess != number:
            known, otherwise = PREDICTIONS[name]
            wrong.append(f"{name}: you say {guess}, but {known.get(guess, otherwise)}")
    if wrong:
        count = f"{len(truth) - len(wrong)} of {len(truth)} predictions are right"
        raise NotYet("\n  ".join([count, *wrong]))
    right("columns move with the padding, positions and visible keys do not.")


def block_mask(answer: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exercise 4."""
    # Prefix 3, answer 3: without padding, with two pads on the left, with two pads on the right.
    types = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]])
    real = mask.bool()
    blocks = types.cumsum(dim=1)
    result = call(answer, types.clone(), mask.clone())
    expect(isinstance(result, Tensor), f"expected a tensor, got a {type(result).__name__}")
    expect(
        tuple(result.shape) == (3, 8, 8),
        f"the mask has shape {list(result.shape)}, expected [3, 8, 8]: batch, query, key",
    )
    expect(result.dtype == torch.bool, f"the mask has dtype {result.dtype}, expected torch.bool")

    def alike(other: Tensor) -> bool:
        return torch.equal(result[real], other[real])  # what a padded query sees does not matter

    keys = real[:, None, :]
    expect(
        not alike(blocks[:, None, :] <= blocks[:, :, None]),
        "right without padding, but padded keys can be seen: their type is 0, so they look like prefix",
    )
    expect(
        not alike((types[:, None, :] <= types[:, :, None]) & keys),
        "the tokens of the answer see each other in both directions, which leaks the labels: compare the "
        "running sum of the types, so that each token of the answer is a block of its own",
    )
    expect(
        not alike((blocks[:, :, None] <= blocks[:, None, :]) & keys),
        "rows and columns are swapped: queries are axis 1 (blocks[:, :, None]), keys are axis 2",
    )
    expect(
        not alike((blocks[:, None, :] < blocks[:, :, None]) & keys),
        "no token sees its own block, so the prefix is blind: use <= instead of <",
    )
    opened = ((blocks[:, None, :] <= blocks[:, :, None]) & keys) | (types[:, None, :] == 0)
    expect(
        not alike(opened),
        "the padding is hidden and then opened again, since its type is 0 like the prefix's: hide it last",
    )
    causal = torch.ones(8, 8).tril().bool().expand(3, 8, 8)
    expect(
        not alike(causal & keys),
        "this is the causal mask: tokens of the prefix must see the later ones of the prefix as well",
    )
    expect(not alike(keys.expand(3, 8, 8)), "this hides only the padding: the answer must be causal")
    expect(
        not alike((blocks[:, None, :] == blocks[:, :, None]) & keys),
        "each block sees only itself, so the answer never sees the picture: use <= instead of ==",
    )
    wrong = (result != solutions.block_mask(types, mask)) & real[:, :, None]
    for row, query, key in wrong.nonzero().tolist()[:1]:
        kinds = {0: "prefix", 1: "answer"}
        kind, seen = (
            kinds[int(types[row, query])],
            kinds[int(types[row, key])] if mask[row, key] else "padding",
        )
        raise NotYet(
            f"row {row}: query {query} ({kind}) and key {key} ({seen}) should be "
            f"{not result[row, query, key]}: a query sees its own block and all earlier ones, but no padding"
        )
    right("one running sum and one comparison are the prefix-LM mask.")


def count_leaks(answer: Callable[..., Any]) -> None:
    """Exercise 5."""
    table = torch.linspace(-1.0, 1.0, 8 * 5).view(8, 5).sin()
    ids = torch.tensor([[7, 7, 2, 3, 4, 5, 1]])
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    prefix = int((types == 0).sum())

    def causal(given: Tensor) -> Tensor:
        return table[given].cumsum(dim=1)

    def prefix_lm(given: Tensor) -> Tensor:
        seen = causal(given)
        return torch.cat([seen[:, prefix - 1 : prefix].expand(-1, prefix, -1), seen[:, prefix:]], dim=1)

    def bidirectional(given: Tensor) -> Tensor:
        return table[given] + table[given].sum(dim=1, keepdim=True)

    def one_ahead(given: Tensor) -> Tensor:
        embedded = table[given]
        return embedded + torch.cat([embedded[:, 1:], torch.zeros(1, 1, 5)], dim=1)

    def noisy(given: Tensor) -> Tensor:
        noisy.calls += 1  # type: ignore[attr-defined]
        return causal(given) + 1e-7 * noisy.calls  # type: ignore[attr-defined]

    noisy.calls = 0  # type: ignore[attr-defined]

    def run(logits_of: Callable[[Tensor], Tensor]) -> int:
        kept = ids.clone()
        kept_types = types.clone()
        result = call(answer, logits_of, kept, kept_types, other_id=6)
        expect(
            torch.equal(kept, ids) and torch.equal(kept_types, types),
            "your function changes the tensor that it was given, and then compares it with itself: "
            "clone before you write into it",
        )
        expect(
            isinstance(result, int) and not isinstance(result, bool),
            f"expected a whole number, got a {type(result).__name__}: int(...) converts a tensor",
        )
        return result

    found = run(bidirectional)
    vocabulary = table.shape[1]
    expect(
        found not in {n * vocabulary for n in (3, 4, 6, 7)},
        f"you counted numbers, not positions: one position has {vocabulary} logits, of which any may move "
        "(take the largest change over the last axis)",
    )
    expect(
        found != 7,
        "you counted all positions: leave out the prefix, which has no label, and the last position, which "
        "reads the replaced token",
    )
    expect(
        found != 6,
        "you counted the prefix as well: only positions of the answer (token type 1) have a label to leak",
    )
    expect(
        found != 4,
        "you counted the last position: it reads the token that was replaced, so it may change",
    )
    expect(
        found != 0,
        "you found no leak where every token sees every other: compare logits of the old sequence with "
        "those of the new one, after the last token is replaced",
    )
    expect(
        found == 3,
        f"where every token sees every other, 3 positions of the answer leak; you found {found}: count those "
        "of type 1 before the last",
    )
    found = run(one_ahead)
    expect(
        found == 1,
        f"a model that sees one token ahead has 1 leak; you found {found}: ask each position for itself "
        "whether it changes",
    )
    for name, model in (("causal", causal), ("prefix-LM", prefix_lm)):
        found = run(model)
        expect(
            found == 0,
            f"a {name} model has no leak; you found {found}. Count positions that change, not those that "
            "stay the same, and only positions before the last",
        )
    expect(
        run(noisy) == 0,
        "logits that differ by 1e-7 are the same up to rounding: compare with a tolerance such as 1e-4",
    )
    right("it finds a leak in any model, without looking at its mask.")


PARTS = ("encode_image", "merge", "prefill", "decode", "logits")  # of PaliGemma, where a fault may sit


def patient(model: Any, part: str = "decode") -> Any:
    """A copy of a PaliGemma that is broken in one part, or, with "nothing", sound up to rounding."""
    other = copy.deepcopy(model)
    sound = getattr(other, "encode_image" if part == "nothing" else part)
    decoder = other.language_model
    embed, factor = decoder.embed, model.config.text.hidden_size**0.5
    if part == "nothing":
        other.encode_image = lambda pixels: sound(pixels) * (1 + 1e-6)
    elif part == "encode_image":  # patches in the wrong order: columns before rows
        side = model.config.vision.image_size // model.config.vision.patch_size
        order = torch.arange(side * side).view(side, side).T.flatten()
        other.encode_image = lambda pixels: sound(pixels)[:, order]
    elif part == "merge":  # the picture's features one place too late
        other.merge = lambda ids, features=None: sound(ids, None if features is None else features.roll(1, 1))
    elif part == "prefill":  # each row reads the end of another row

        def prefill(*args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
            hidden, cache = sound(*args, **kwargs)
            return hidden.roll(1, 0), cache

        other.prefill = prefill
    elif part == "decode":  # the words of the answer, and only they, miss their factor

        def decode(*args: Any) -> Tensor:
            decoder.embed = lambda ids: embed(ids) / factor
            try:
                return sound(*args)
            finally:
                decoder.embed = embed

        other.decode = decode
    else:  # every score belongs to the token after it
        other.logits = lambda hidden: sound(hidden).roll(1, -1)
    return other


@cache
def _shipped() -> tuple[Any, Any, list[tuple[Any, str]]]:
    """The shipped model, its processor, and three pictures with prompts."""
    from minivlm.models.load import load
    from minivlm.world.demo import sample_scene

    model, processor = load()
    asked = []
    for number in range(3):
        scene, examples = sample_scene(number)
        asked.append((scene.draw(model.config.vision.image_size), examples[number].prefix))
    return model, processor, asked


@torch.no_grad()
def find_fault(answer: Callable[[Any, Any, dict[str, Tensor]], str]) -> None:
    """Exercise 6."""
    model, processor, asked = _shipped()
    inputs = processor([picture for picture, _ in asked], [prompt for _, prompt in asked])
    after = {"encode_image": 0, "merge": 1, "prefill": 2, "logits": 3, "decode": 3, "nothing": 4}
    for part in ("encode_image", "merge", "prefill", "logits", "decode", "nothing"):
        guess = call(answer, model, patient(model, part), dict(inputs))
        expect(
            isinstance(guess, str) and guess in after,
            f'return one of {", ".join(PARTS)}, or "nothing", as text: your function returned {guess!r}',
        )
        if guess == part:
            continue
        where = f"for a model whose {part} is broken, your function says {guess!r}"
        if guess == "decode" and part in ("nothing", "logits"):
            raise NotYet(
                f"{where}, which is sound. decode writes into its cache: give both models the same token, "
                "and to each the cache that it has filled itself, once. Compare with a tolerance"
            )
        if part == "nothing":
            raise NotYet(
                f"a model that is sound up to rounding (1e-6) is called broken in {guess}: compare with a "
                "tolerance, as a share of the largest value"
            )
        if guess == "nothing" and part == "prefill":
            raise NotYet(f"{where}: it returns one hidden state for each row of the batch, compare them all")
        if guess == "nothing":
            raise NotYet(f"{where}: call this part of both models on the same inputs, and compare")
        if after[guess] > after[part]:
            raise NotYet(
                f"{where}: that part uses the broken one and differs for this reason only. Compare first "
                "what uses nothing else, and return at the first difference"
            )
        raise NotYet(
            f"{where}, which is sound: give the same input to that part of both models, not what the two "
            "models computed before"
        )
    right("the first part that differs on equal inputs is the broken one; all later ones differ as well.")


PRODUCTS = {"matmul", "__matmul__", "mm", "bmm", "addmm", "linear", "einsum", "scaled_dot_product_attention"}


class _Watched(Functions):
    """Runs a program; counts the numbers that its matrix products give, and notes what it uses of ours."""

    def __init__(self, program: Callable[..., Any]) -> None:
        super().__init__()
        self.program = program
        self.work = 0
        self.used: set[str] = set()

    def __call__(self, *args: Any) -> Any:
        before = sys.getprofile()
        sys.setprofile(self.note)
        try:
            with self:
                return self.program(*args)
        finally:
            sys.setprofile(before)

    def note(self, frame: FrameType, event: str, _: Any) -> None:
        """Python calls it at each call of a function."""
        module = str(frame.f_globals.get("__name__", ""))
        if event == "call" and module.startswith("minivlm.") and not module.startswith("minivlm.checks"):
            self.used.add(f"{module}.{frame.f_code.co_name}")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in PRODUCTS:
            self.work += result.numel()
        return result


def _run(program: Callable[..., Any], *args: Any) -> tuple[list[int], Tensor]:
    """What a reader's program returns, if it has the right form."""
    try:
        result = call(program, *args)
    except NotYet as error:
        if isinstance(error.__cause__, KeyError):
            raise NotYet(f"{error}. The names in the file are listed above; they end in .weight") from error
        blank = isinstance(error.__cause__, NotImplementedError)
        if isinstance(error.__cause__, RuntimeError) and not blank:
            raise NotYet(
                f"{error}. Shapes of a right program: x [S, D], queries [4, S, Dh], keys and values [1, S, "
                "Dh] (one head, repeated or broadcast to the four), weights [out, in] as in nn.Linear"
            ) from error
        raise
    expect(
        isinstance(result, tuple) and len(result) == 2,
        "return two things: the list of token ids, and their logits [n, V]",
    )
    tokens, logits = result
    expect(
        isinstance(tokens, list) and all(type(token) is int for token in tokens),
        "the tokens should be a list of whole numbers: .item() or .tolist() makes them of a tensor",
    )
    expect(
        isinstance(logits, Tensor) and logits.dim() == 2 and len(tokens) in (len(logits), len(logits) - 1),
        f"{len(tokens)} tokens need logits [{len(tokens)}, V], one row for each: torch.stack makes them",
    )
    expect(
        len(tokens) == len(logits),
        "there is one token less than rows of logits: <eos> belongs to the answer here",
    )
    return tokens, logits


@torch.no_grad()
def read_and_answer(answer: Callable[..., Any]) -> None:
    """Exercise 7."""
    model, processor, asked = _shipped()
    for picture, prompt in asked:
        inputs = processor([picture], [prompt])
        features = model.encode_image(inputs["pixel_values"])[0]
        ids = inputs["input_ids"][0, len(features) :]
        tokens, logits = _run(answer, SHIPPED, features.clone(), ids.clone())
        expect(
            tokens == logits.argmax(dim=-1).tolist(),
            "the tokens are not the largest of your own logits, row by row: greedy means argmax",
        )
        reference = model(
            torch.cat([inputs["input_ids"], torch.tensor([tokens[:-1]], dtype=torch.long)], dim=1),
            inputs["pixel_values"],
            token_type_ids=torch.tensor([[0] * (len(features) + len(ids)) + [1] * (len(tokens) - 1)]),
        ).logits[0, -len(tokens) :]
        if not matches(logits, reference):
            raise NotYet(say_the_fault(SHIPPED, features, ids, tokens, logits))
        expect(1 not in tokens[:-1], "the answer goes on behind <eos>, id 1: stop there")
        expect(tokens[-1] == 1, "your logits are right, but the answer ends before <eos>, id 1")
    one, three = _Watched(answer), _Watched(answer)
    _run(one, SHIPPED, features, ids, 1)
    short, _ = _run(three, SHIPPED, features, ids, 3)
    expect(not three.used, f"your program calls {', '.join(sorted(three.used)[:2])}: use only torch")
    expect(len(short) == 3, f"with max_new_tokens 3 the answer has {len(short)} tokens: end the loop there")
    expect(
        three.work < 2 * one.work,
        f"right, but three tokens take {three.work / one.work:.1f} times the work of one: all that was read "
        "is read again for each new word. Keep keys and values, and read only the new word",
    )
    right("a file of tensors and your own lines are a vision-language model.")
