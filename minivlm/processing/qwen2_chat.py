"""Questions, answers, pictures and videos as one row of token ids: ChatML, as in Qwen2-VL and Qwen2.5-VL.

    <|im_start|>system
    You are a helpful assistant.<|im_end|>
    <|im_start|>user
    <|vision_start|><|image_pad|><|vision_end|>what is it?<|im_end|>
    <|im_start|>assistant
    a star<|im_end|>
    ~~~~~~~~~~~~~~~~  the loss: answers and their ends

The row is built from ids, never by searching a finished text for marks, so what a user types cannot become
one. Here a picture or a video has a single placeholder. The processor puts in as many as it takes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from minivlm.errors import InputError
from minivlm.processing.chat import Turn, check_turns
from minivlm.processing.inputs import Row
from minivlm.processing.qwen2_tokens import CONTROLS, TURN, TURN_END, Qwen2Tokenizer
from minivlm.processing.tokens import IMAGE as TAG

SYSTEM = "You are a helpful assistant."


def encode_chat(
    tokenizer: Qwen2Tokenizer,
    turns: Sequence[Turn],
    pictures: int = 0,
    *,
    tags: bool = False,
    system: str = SYSTEM,
) -> Row:
    """The ids of a chat, and which of them are answers.

    Args:
        turns: only the last may lack its answer.
        pictures: how many pictures and videos belong to the chat. They stand before the first question.
        tags: instead, they stand where the questions say `<image>`.
        system: what the chat begins with; may be empty.

    Raises InputError: as `minivlm.processing.chat.check_turns`.
    """
    check_turns(turns, pictures, tags)
    encode, start, end = tokenizer.encode, tokenizer.turn_id, [tokenizer.eos_id]
    newline = encode("\n")
    picture = [tokenizer.vision_id, tokenizer.image_id, tokenizer.vision_end_id]
    ids: list[int] = []
    written: list[bool] = []

    def add(new: list[int], is_answer: bool = False) -> None:
        ids.extend(new)
        written.extend([is_answer] * len(new))

    if system:
        add([start, *encode(f"system\n{system}"), *end, *newline])
    for number, (question, answer) in enumerate(turns):
        before = pictures if number == 0 else 0
        first, *others = question.split(TAG) if tags else [""] * before + [question]
        add([start, *encode(f"user\n{first}")])
        for piece in others:
            add([*picture, *encode(piece)])
        add([*end, *newline, start, *encode("assistant\n")])
        if answer is not None:
            add([*encode(answer), *end], is_answer=True)
            add(newline if number + 1 < len(turns) else [])
    return Row(ids, written)


def chat_template(system: str = SYSTEM) -> str:
    """The same form as a Jinja template for `apply_chat_template` in transformers."""
    _, turn, end, vision, vision_end, image, video = CONTROLS
    first = (
        f"{{% if messages[0].role != 'system' %}}{turn}system\n{system}{end}\n{{% endif %}}" if system else ""
    )
    part = "".join(
        f"{{% {'if' if kind == 'image' else 'elif'} part.type == '{kind}' %}}{vision}{pad}{vision_end}"
        for kind, pad in (("image", image), ("video", video))
    )
    return (
        f"{first}{{% for message in messages %}}{turn}{{{{ message.role }}}}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        f"{part}{{% elif part.type == 'text' %}}{{{{ part.text }}}}{{% endif %}}{{% endfor %}}{{% endif %}}"
        f"{end}\n{{% endfor %}}{{% if add_generation_prompt %}}{turn}assistant\n{{% endif %}}"
    )


def system_of(template: str) -> str:
    """What chats begin with where a folder's template says it: `chat_template` the other way around.

    Raises InputError: the template writes a system text in a form that is not known here.
    """
    begin, end = re.escape(f"{TURN}system"), re.escape(TURN_END)
    # Published templates hold the sentence itself, or a string of Jinja with an escaped newline.
    found = re.findall(rf"{begin}(?:\n|\\n)([^'\"{{}}]*?){end}", template)
    if not found and f"{TURN}system" in template:
        raise InputError(
            "the chat template writes a system text in a form that is not known here: use a template in "
            f"which the sentence stands between {TURN}system and {TURN_END}"
        )
    return found[0] if found else ""
