"""Checks of the exercises of 00_tour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from minivlm.checks import NotYet, call, expect, right
from minivlm.models.load import load_answering
from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Processor
from minivlm.world.scenes import Scene, Thing


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
    def to_pixels(bins: Sequence[int], width: float, height: float) -> list[float]:
        """y0, x0, y1, x1 of 1023 -> x0, y0, x1, y1 in pixels."""
        y0, x0, y1, x1 = (number / 1023 for number in bins)
        return [x0 * width, y0 * height, x1 * width, y1 * height]


def ask(answer: Callable[..., Any]) -> None:
    """One large red circle, asked for its color and for a caption."""
    model, processor = load_answering()
    thing = Thing("circle", "red", "large", 32.0, 32.0, 14.0, (214, 40, 40))
    picture = Scene((thing,), background=210, noise=0.0, noise_seed=0).draw(128)
    result = call(answer, model, processor, picture, "what color is the circle?")
    expect(
        not isinstance(result, list),
        "your function returns a list: the processor decodes a batch, and you want its first row",
    )
    expect(
        isinstance(result, str),
        f"your function returns a {type(result).__name__}: turn the ids into words with processor.decode",
    )
    expect(result == "red", f"about a red circle, your function answers {result!r} instead of 'red'")
    caption = call(answer, model, processor, picture, "caption en")
    expect(caption != result, "your function gives the same answer to every prompt: pass `prompt` on")
    right("picture and prompt in, answer out. This is all that a user of the model needs.")


def sequence_length(answer: Callable[..., Any]) -> None:
    """Several sizes, one of which the patches do not divide."""
    for image_size, patch_size, prompt_tokens in ((64, 8, 5), (224, 14, 7), (230, 16, 3)):
        expected = solutions.sequence_length(image_size, patch_size, prompt_tokens)
        result = call(answer, image_size, patch_size, prompt_tokens)
        side = image_size // patch_size
        case = f"for {image_size} pixels, patches of {patch_size} and {prompt_tokens} prompt tokens"
        mistakes = {
            expected - 2: "the processor adds two tokens, <bos> before the prompt and a newline after it",
            expected - 1: "one of the two tokens that the processor adds is missing: <bos> and the newline",
            side + prompt_tokens + 2: "there is a row of patches for each row: the number is squared",
            side**2 + 2: "the prompt's own tokens are missing",
        }
        expect(
            result == int(result),
            f"{case}, you get {result}: patches at the edge that do not fit are dropped",
        )
        if result != expected:
            raise NotYet(f"{case}, you get {result}: {mistakes.get(result, f'expected {expected}')}")
    right("image tokens, <bos>, prompt, newline.")


def to_pixels(answer: Callable[..., Any]) -> None:
    """A box that is wider than high, in a picture that is wider than high."""
    bins, width, height = (100, 200, 300, 1023), 640, 480
    expected = solutions.to_pixels(bins, width, height)
    result = [float(value) for value in call(answer, bins, width, height)]
    expect(len(result) == 4, f"your function returns {len(result)} numbers, expected x0, y0, x1, y1")

    def near(values: Sequence[float]) -> bool:
        return max(abs(a - b) for a, b in zip(result, values, strict=True)) < 0.01

    as_given = [
        bins[0] / 1023 * width,
        bins[1] / 1023 * height,
        width * bins[2] / 1023,
        height * bins[3] / 1023,
    ]
    unswapped = [expected[1], expected[0], expected[3], expected[2]]
    expect(
        not near(as_given) and not near(unswapped),
        "the tokens come as y0, x0, y1, x1 and the box goes out as x0, y0, x1, y1: swap them",
    )
    expect(
        not near([value * 1023 / 1024 for value in expected]),
        "you divide by 1024: the last of the 1024 words is number 1023, and it means the far edge",
    )
    expect(
        not near([expected[0], expected[1] * width / height, expected[2], expected[3] * width / height]),
        "y is a share of the height: multiply it by the height",
    )
    expect(
        near(expected), f"expected {[round(v, 1) for v in expected]}, you get {[round(v, 1) for v in result]}"
    )
    right("a coordinate word means a share of the picture, so it fits pictures of any size.")
