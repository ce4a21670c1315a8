"""What a user should know about a question or its answer: notes on standard error."""

from __future__ import annotations

import re
from collections.abc import Iterator

from minivlm.processing import AnswerProcessor, BaseTokenizer, ImageProcessor, Video
from minivlm.processing.inputs import ReadsVideos

SMALL_VOCABULARY = 10_000  # tokens; a larger one has pieces for any word
WIDEST = 2.0  # longer side by shorter side
LEAST_SURE = 0.5  # below, the model would have said something else nearly as gladly


SEEN = {
    "squeezed": "sees it squeezed into a square: boxes may be off, a part near a square is understood better",
    "cropped": "sees only the square in its middle: crop it to the part that matters",
    "padded": "sees it small, between two bars: a part near a square is understood better",
}


def of_video(video: Video, processor: AnswerProcessor) -> Iterator[str]:
    """Notes about a video."""
    if isinstance(processor, ReadsVideos) and (told := processor.video_budget.dropped(video)):
        yield told


def of_picture(width: int, height: int, image_processor: ImageProcessor) -> Iterator[str]:
    """Notes about a picture of this size."""
    ratio = max(width, height) / min(width, height)
    fitted = image_processor.fitted
    if ratio > WIDEST and fitted != "kept":
        yield f"the picture is {width} x {height}, and the model {SEEN[fitted]}"


def of_prompt(prompt: str, tokenizer: BaseTokenizer) -> Iterator[str]:
    """Notes about the words of a prompt."""
    unknown = unknown_words(prompt, tokenizer)
    if unknown:
        yield f"the model never saw {', '.join(unknown)} in training: what it answers may mean nothing"


def of_answer(confidence: float | None, repeats: bool) -> Iterator[str]:
    """Notes about an answer: how sure the model is of it, and whether it was stopped while repeating."""
    if repeats:
        yield "the answer repeats itself and was stopped: the model does not know what it sees"
    if confidence is not None and confidence < LEAST_SURE:
        yield f"the model is not sure: it gives a word of this answer a probability of {confidence:.0%}"


def unknown_words(prompt: str, tokenizer: BaseTokenizer) -> list[str]:
    """Words that the vocabulary spells in bytes, and those that a small one spells in pieces."""
    tokens = tokenizer.backend.id_to_token
    unknown = []
    for word in re.findall(r"<loc\d{4}>|<seg\d{3}>|[^\W\d_]+|[^\s]", prompt):
        # A word after a space and one at the start of a line are different tokens.
        spelled = min((tokenizer.encode(form) for form in (word, f" {word}")), key=len)
        in_bytes = any(re.fullmatch("<0x..>|<unk>", tokens(index) or "") for index in spelled)
        in_pieces = len(spelled) > 1 and tokenizer.vocab_size < SMALL_VOCABULARY
        if in_bytes or in_pieces:
            unknown.append(f'"{word}"')
    return list(dict.fromkeys(unknown))
