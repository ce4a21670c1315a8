"""Checks for the exercises of 00_tour."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minivlm.checks import NotYet, call, expect, right
from minivlm.models.load import load_answering
from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Processor
from minivlm.world.scenes import Scene, Thing

STEPS = ("tower", "projector", "merge", "decoder")


class solutions:
    """Reference solutions."""

    @staticmethod
    def ask(model: PaliGemma, processor: Processor, picture: Image.Image, prompt: str) -> str:
        """The answer to one prompt about one picture."""
        inputs: dict[str, Any] = processor([picture], [prompt])
        return processor.decode(model.generate(**inputs))[0]

    @staticmethod
    def sequence_length(image_size: int, patch_size: int, prompt_tokens: int) -> int:
        """Image tokens, <bos>, prompt, newline."""
        return (image_size // patch_size) ** 2 + 1 + prompt_tokens + 1

    @staticmethod
    def broken_step(healthy: PaliGemma, broken: PaliGemma, inputs: Mapping[str, Tensor]) -> str:
        """The first step whose output differs, given the same input."""
        with torch.no_grad():
            tokens = [m.vision_tower(inputs["pixel_values"]) for m in (healthy, broken)]
            features = [m.multi_modal_projector(tokens[0]) for m in (healthy, broken)]
            merged = [m.merge(inputs["input_ids"], features[0]) for m in (healthy, broken)]
        for name, outputs in zip(STEPS, (tokens, features, merged), strict=False):
            if not torch.equal(*outputs):
                return name
        return "decoder"

    @staticmethod
    def to_pixels(bins: Sequence[int], width: float, height: float) -> list[float]:
        """y0, x0, y1, x1 of 1023 -> x0, y0, x1, y1 in pixels."""
        y0, x0, y1, x1 = (number / 1023 for number in bins)
        return [x0 * width, y0 * height, x1 * width, y1 * height]

    @staticmethod
    def predictions() -> dict[str, str]:
        """What happens without the right picture."""
        return {"another picture": "below", "gray picture": "below", "photograph": "its own words"}


def broken_model(model: PaliGemma, step: str = "projector") -> PaliGemma:
    """A copy of the model with a fault in one step."""
    broken: Any = copy.deepcopy(model)
    weight = {
        "tower": broken.vision_tower.embeddings.position_embedding.weight,
        "projector": broken.multi_modal_projector.weight,
        "decoder": broken.language_model.layers[0].mlp.down_proj.weight,
    }
    if step == "merge":
        merge = broken.merge
        broken.merge = lambda input_ids, image_features: merge(input_ids, image_features.flip(1))
    else:
        with torch.no_grad():
            weight[step].copy_(weight[step].roll(1, dims=0))
    return broken


def _loaded() -> tuple[Any, Any]:
    return load_answering()


def _red_circle() -> Image.Image:
    thing = Thing("circle", "red", "large", 32.0, 32.0, 14.0, (214, 40, 40))
    return Scene((thing,), background=210, noise=0.0, noise_seed=0).draw(128)


def ask(answer: Callable[..., Any]) -> None:
    """One large red circle, asked for its color and for a caption, and a gray picture."""
    model, processor = _loaded()
    picture, prompt = _red_circle(), "what color is the circle?"
    result = call(answer, model, processor, picture, prompt)
    expect(
        not isinstance(result, list),
        "your function returns a list: the processor decodes a batch, and you want its first row",
    )
    expect(
        isinstance(result, str),
        f"your function returns a {type(result).__name__}: decode the ids into words with processor.decode",
    )
    inputs: dict[str, Any] = processor([picture], [prompt])
    expect(
        "<eos>" not in result and "<pad>" not in result,
        f"your answer {result!r} still shows the end of the sequence: processor.decode leaves it out",
    )
    expect(
        not result.startswith(prompt),
        f"your answer repeats the prompt, {result!r}: `generate` gives only the new tokens, decode those",
    )
    expect(
        result == result.strip() or result.strip() != "red",
        f"{result!r} is right but for spaces or a newline around it: return what processor.decode gives",
    )
    logits = model(**inputs).logits[0]
    guesses = [processor.tokenizer.decode([int(i)]).strip() for i in logits[:64].argmax(dim=-1)]
    expect(
        result == "red" or result == "" or result.strip() not in guesses,
        f"your answer {result!r} is what the logits of an image token say: the answer starts after the "
        "last place of the prompt",
    )
    expect(
        result == "red",
        f"about a red circle, your function answers {result!r} instead of 'red': pass on "
        "`picture` and `prompt`, and use no others",
    )
    caption = call(answer, model, processor, picture, "caption en")
    expect(caption != result, "your function gives the same answer to every prompt: pass `prompt` on")
    expected = solutions.ask(model, processor, picture, "caption en")
    expect(
        caption == expected or not expected.startswith(caption),
        f"asked for a caption, you answer {caption!r}, and the model's answer is {expected!r}: an answer "
        "goes on until <eos>, so take all of its tokens",
    )
    expect(
        caption == expected,
        f"shown one red circle, your caption is {caption!r}: pass `picture` on, and use no other picture",
    )
    gray = Image.new("RGB", (64, 64), (208, 208, 208))
    expect(
        call(answer, model, processor, gray, "caption en") != caption,
        "your function gives the same answer to every picture: pass `picture` on",
    )
    right("picture and prompt in, answer out. This is all that a user of the model needs.")


def sequence_length(answer: Callable[..., Any]) -> None:
    """Several sizes, one of which the patches do not divide evenly."""
    for image_size, patch_size, prompt_tokens in ((64, 8, 5), (224, 14, 7), (230, 16, 3)):
        expected = solutions.sequence_length(image_size, patch_size, prompt_tokens)
        result = call(answer, image_size, patch_size, prompt_tokens)
        side = image_size // patch_size
        case = f"for {image_size} pixels, patches of {patch_size} and {prompt_tokens} prompt tokens"
        square = "the patches form a square grid, so square the number per side"
        mistakes = {
            expected - 2: "the processor adds two tokens, <bos> before the prompt and a newline after it",
            expected - 1: "one of the two tokens that the processor adds is missing: <bos> and the newline",
            expected
            + 1: "one token too many: <bos> and the newline are two, and <eos> belongs to the answer",
            side + prompt_tokens + 2: square,
            side + prompt_tokens: square + ", and add <bos> and the newline",
            side**2 + 2: "the prompt's own tokens are missing",
            side**2: "these are the image tokens alone: the prompt, <bos> and the newline come after them",
            3 * side**2 + prompt_tokens + 2: "the three colors of a patch go into one vector: count it once",
            image_size**2 + prompt_tokens + 2: "one image token stands for a patch, not for a pixel",
            (image_size**2 // patch_size**2) + prompt_tokens + 2: (
                "you divided the areas: pixels at the edge that do not fill a patch are dropped, "
                "so divide the side first, round down, then square"
            ),
        }
        expect(isinstance(result, int | float), f"{case}, you return a {type(result).__name__}, not a number")
        expect(
            result == int(result),
            f"{case}, you get {result}: patches at the edge that do not fit are dropped, so use //",
        )
        if result != expected:
            hint = f"{side} patches fit along a side; count all of them, the prompt and two more"
            raise NotYet(f"{case}, you get {result}: {mistakes.get(result, hint)}")
    right("image tokens, <bos>, prompt, newline.")


def broken_step(answer: Callable[..., Any]) -> None:
    """Four models, each with a fault in another step."""
    model, processor = _loaded()
    inputs: dict[str, Any] = processor([_red_circle()], ["what color is the circle?"])
    results = {step: call(answer, model, broken_model(model, step), inputs) for step in STEPS}
    for step, result in results.items():
        expect(
            result in STEPS,
            f"your function returns {result!r}: return the name of a step, one of {', '.join(STEPS)}",
        )
        expect(
            result == step or len(set(results.values())) > 1,
            f"your function says {result!r} of four models that are broken in four different steps: compare "
            "what the steps of the two models give, do not judge by the answer",
        )
        if step == "merge" and result == "decoder":
            raise NotYet(
                "for a fault in merge you say 'decoder': compare what the two merges give for the same ids "
                "and features. Comparing weights would not show it, since merge has none of its own"
            )
        expect(
            STEPS.index(result) <= STEPS.index(step),
            f"for a fault in the {step} you say {result!r}: its output differs because its input does. "
            "The first difference counts, so return as soon as you find one",
        )
        expect(
            result == step,
            f"for a fault in the {step} you say {result!r}, but that step gives the same numbers in both "
            "models if it gets the same input: compare values with torch.equal, of one step at a time",
        )
    right("the first step whose output differs is the broken one; the later ones only pass it on.")


def to_pixels(answer: Callable[..., Any]) -> None:
    """A box that is wider than tall, in a picture that is wider than tall."""
    bins, width, height = (100, 200, 300, 1023), 640, 480
    expected = solutions.to_pixels(bins, width, height)
    result = call(answer, bins, width, height)
    try:
        result = [float(value) for value in result]
    except (TypeError, ValueError):
        raise NotYet(
            f"your function returns {result!r}: return the four numbers [x0, y0, x1, y1], in pixels"
        ) from None
    expect(len(result) == 4, f"your function returns {len(result)} numbers, expected x0, y0, x1, y1")
    x0, y0, x1, y1 = expected
    swap = "the tokens come as y0, x0, y1, x1 and the box goes out as x0, y0, x1, y1: swap them"
    mistakes: dict[str, list[list[float]]] = {
        swap: [
            [y0 * width / height, x0 * height / width, y1 * width / height, x1 * height / width],
            [y0, x0, y1, x1],
        ],
        "you divide by 1024: the last of the 1024 words is number 1023, and it means the far edge": [
            [value * 1023 / 1024 for value in expected]
        ],
        "you divide by 1000: the words go from 0 to 1023, and 1023 is the far edge": [
            [value * 1.023 for value in expected]
        ],
        "y is a share of the height: multiply it by the height": [
            [x0, y0 * width / height, x1, y1 * width / height]
        ],
        "x is a share of the width: multiply it by the width": [
            [x0 * height / width, y0, x1 * height / width, y1]
        ],
        "x and y are mixed up with width and height: x goes with the width, y with the height": [
            [x0 * height / width, y0 * width / height, x1 * height / width, y1 * width / height]
        ],
        "these are shares from 0 to 1: multiply by the width and the height": [
            [x0 / width, y0 / height, x1 / width, y1 / height]
        ],
        "these are the numbers of the words: divide by 1023, then multiply by the width or the height": [
            [200.0, 100.0, 1023.0, 300.0],
            [float(number) for number in bins],
        ],
        "the last two are width and height of the box: the far corner is wanted, x1 and y1": [
            [x0, y0, x1 - x0, y1 - y0]
        ],
        "the order is x0, y0, x1, y1: a corner, then the opposite corner": [[x0, x1, y0, y1]],
        "you rounded down to whole pixels: a share is exact, so leave the fractions": [
            [float(int(value)) for value in expected]
        ],
        "you rounded to whole pixels: a share is exact, so leave the fractions": [
            [float(round(value)) for value in expected]
        ],
    }
    for hint, values in mistakes.items():
        expect(not any(_near(result, value) for value in values), hint)
    expect(
        _near(result, expected),
        f"for {bins} in {width} x {height} pixels, you get {[round(v, 1) for v in result]}: x0 is "
        f"200 / 1023 of the width, {x0:.1f}, and y0 is 100 / 1023 of the height, {y0:.1f}",
    )
    right("a coordinate word means a share of the picture, so it fits pictures of any size.")


def _near(a: Sequence[float], b: Sequence[float]) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) < 0.01


LEVELS = ("none", "below", "equal", "above")
PHOTOGRAPH = ("a person", "no idea", "its own words")
WHY_NOT = {
    ("another picture", "none"): "some answers are right by luck: many scenes have no pink circle either",
    ("another picture", "equal"): "to be as good as the line, the model would have to ignore the picture and "
    "say what is most frequent. It says what it sees, and that is another scene",
    ("another picture", "above"): "what it sees is another scene, and nothing there helps with this one",
    ("gray picture", "none"): "some answers are right by luck: to some questions the right answer is 0 or no",
    ("gray picture", "equal"): "the line is what one gets who knows which answers are frequent and always "
    "gives those. The model does not fall back on that: it says what it sees, an empty scene",
    ("gray picture", "above"): "the questions alone tell little, and an empty scene tells nothing more",
    ("photograph", "a person"): "it has seen nothing but colored shapes, and has no reason to say `person`",
    ("photograph", "no idea"): "no training example ended in `I do not know`, so it never says that",
}


def predictions(answer: Callable[..., Any]) -> None:
    """Three predictions, each explained if it is wrong."""
    result = call(answer)
    expected = solutions.predictions()
    expect(isinstance(result, dict), f"your function returns a {type(result).__name__}: return a dictionary")
    missing = [name for name in expected if name not in result]
    expect(
        not missing, f"there is no prediction for {missing and missing[0]!r}: the keys are {list(expected)}"
    )
    wrong = []
    for name, truth in expected.items():
        choices = PHOTOGRAPH if name == "photograph" else LEVELS
        guess = result[name]
        expect(
            guess in choices,
            f"{name}: {guess!r} is not one of the choices, which are {', '.join(map(repr, choices))}",
        )
        if guess != truth:
            wrong.append(f"{name}: not {guess!r}, since {WHY_NOT[name, guess]}")
    expect(not wrong, "; ".join(wrong))
    right("it says what it sees, whatever that is. Now look at the numbers.")
