"""Questions, answers and pictures as one row of token ids: Qwen-VL's two prompt forms.

Qwen-VL-Chat has ChatML, one block for each speaker (`chat_format` "chatml"):

    <|im_start|>system
    You are a helpful assistant.<|im_end|>
    <|im_start|>user
    Picture 1:<img>...</img>
    what is it?<|im_end|>
    <|im_start|>assistant
    a star<|im_end|>
    ~~~~~~~~~~~~~~~~  the loss: the answer and its end

Qwen-VL has not learned to chat ("raw"). It goes on where the prompt ends:

    <img>...</img>what is it? Answer: a star<|endoftext|>
    <img>...</img><ref>the star</ref><box>(120,340),(560,780)</box><|endoftext|>

Between `<img>` and `</img>` are as many places as a picture has image tokens. The published program writes
the path of the picture there, its bytes as ids, then `<imgpad>`: the model itself opens the file. Here the
pixels come beside the ids, what stands in the places is never read, and a path is optional.

Sources: `qwen_generation_utils.py` and `tokenization_qwen.py` in the published folders, and `eval_mm` and
`finetune.py` of https://github.com/QwenLM/Qwen-VL. As there, the pieces between special tokens are split into
tokens apart from each other. The original also learns the marks of the turns, which are always the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from minivlm.errors import InputError
from minivlm.processing.inputs import Row
from minivlm.processing.qwen_tags import Element, check_tags, element_text, is_picture, picture_label
from minivlm.processing.qwen_tokens import TAGS, QwenTokenizer

SYSTEM = "You are a helpful assistant."

Turn = tuple[Sequence[Element], str | None]  # what is asked, and the answer; None where it is to be written


def path_to_ids(path: str, places: int, pad_id: int) -> list[int]:
    """The places of a picture: its path's bytes, each as the id of that number, then padding.

    Raises InputError: a path too long for the original to read back, which needs two places after it.
    """
    found = list(path.encode("utf-8"))
    if found and len(found) > places - 2:
        raise InputError(
            f"the path {path[:60]!r}... has {len(found)} bytes, and {places - 2} fit between <img> and "
            "</img>: move the picture to a shorter one"
        )
    return found + [pad_id] * (places - len(found))


def ids_to_path(ids: Sequence[int], pad_id: int) -> str:
    """The path in a picture's places, empty if there is none.

    Raises InputError: ids that are no bytes, or bytes that are no text.
    """
    end = ids.index(pad_id) if pad_id in ids else len(ids)
    try:
        return bytes(ids[:end]).decode("utf-8")
    except ValueError as error:
        raise InputError("between <img> and </img> is no path: let the processor build the row") from error


def encode_content(
    tokenizer: QwenTokenizer, elements: Iterable[Element], places: int, *, labels: bool = True
) -> list[int]:
    """The ids of what a person says: texts with tags, and pictures.

    Args:
        elements: as in `from_list_format`, whose text has the same ids; here, nothing in a text becomes a
            picture, and a picture that has no path leaves its places empty.
        places: image tokens of one picture.
        labels: whether a picture is a line that says its number.

    Raises InputError: as `element_text`; a path that is too long.
    """
    ids: list[int] = []
    text, number = "", 1
    for element in elements:
        if not is_picture(element):
            text += element_text(element)
            continue
        text += picture_label(number) if labels else ""
        path = str(element["image"]) if isinstance(element["image"], str | Path) else ""
        inside = path_to_ids(path, places, tokenizer.image_id)
        ids += [*tokenizer.encode(text), tokenizer.image_start_id, *inside, tokenizer.image_end_id]
        text, number = "\n" if labels else "", number + 1
    return ids + tokenizer.encode(text)


def encode_chatml(
    tokenizer: QwenTokenizer, turns: Sequence[Turn], places: int, *, system: str = SYSTEM
) -> Row:
    """The ids of a chat, and which of them are answers.

    Args:
        turns: only the last may lack its answer. Pictures are numbered through each question, not through
            the chat, as the original does.
        places: image tokens of one picture.

    Raises InputError: no turns, a missing answer; as `encode_content`.
    """
    if not turns:
        raise InputError("the chat has no turns: give at least one question, as ([{'text': 'what?'}], None)")
    newline = tokenizer.encode("\n")

    def opened(speaker: str) -> list[int]:
        return [tokenizer.turn_start_id, *tokenizer.encode(speaker), *newline]

    ids = [*opened("system"), *tokenizer.encode(system), tokenizer.turn_end_id]
    written = [False] * len(ids)
    for number, (question, answer) in enumerate(turns, start=1):
        asked = encode_content(tokenizer, question, places)
        before = [*newline, *opened("user"), *asked, tokenizer.turn_end_id, *newline, *opened("assistant")]
        ids += before
        written += [False] * len(before)
        if answer is not None:
            new = [*tokenizer.encode(answer), tokenizer.turn_end_id]
            ids += new
            written += [True] * len(new)
        elif number < len(turns):
            raise InputError(f"question {number} of {len(turns)} has no answer: only the last may lack it")
    return Row(ids, written)


def encode_raw(tokenizer: QwenTokenizer, content: Sequence[int], answer: str | None = None) -> Row:
    """The ids of a prompt without turns, and of its answer and end."""
    after = [] if answer is None else [*tokenizer.encode(answer), tokenizer.eos_id]
    return Row([*content, *after], [False] * len(content) + [True] * len(after))


def raw_prompt(prompt: str) -> tuple[str, str]:
    """A question as Qwen-VL's own evaluation asks it, and what comes between it and the answer.

    A prompt that says how it goes on stays as it is: one that ends with ":" or with a tag that it opens.
    """
    if prompt.endswith(tuple(tag for tag in TAGS if "/" not in tag)):
        return prompt, ""
    return (prompt if prompt.endswith(":") else f"{prompt} Answer:"), " "


def check_turn(prompt: str, answer: str | None, is_chat: bool) -> None:
    """Raise InputError: as `check_tags`. Without a chat, an answer may close what its prompt opens."""
    if is_chat:
        check_tags(prompt)
        check_tags(answer or "")
    elif answer is not None:
        check_tags(prompt + answer)
    else:
        open_tag = next((tag for tag in TAGS if "/" not in tag and prompt.endswith(tag)), "")
        check_tags(prompt.removesuffix(open_tag))
