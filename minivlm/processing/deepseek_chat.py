"""Questions, answers and pictures as one row of token ids: DeepSeek-VL's prompt form.

    <｜begin▁of▁sentence｜>You are a helpful language and vision assistant. ...

    User: <image_placeholder>what is it?

    Assistant: a star<｜end▁of▁sentence｜>User: what color?
              ~~~~~~~~~~~~~~~~~~~~~~~~~~~  the loss: answers and their ends
    Assistant: ...

Source: `conversation.py` and `processing_vlm.py` of https://github.com/deepseek-ai/DeepSeek-VL. As there,
questions lose spaces at both ends, and pictures stand before a question without a sign between them. The row
is built from ids, never by searching a finished text for tags, so what a user types cannot become
`<image_placeholder>`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from minivlm.processing.chat import Turn, check_turns
from minivlm.processing.deepseek_tokens import END, IMAGE, DeepseekTokenizer
from minivlm.processing.inputs import Row
from minivlm.processing.tokens import IMAGE as TAG

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
ASKED, ANSWERED = "User:", "Assistant:"


def encode_chat(
    tokenizer: DeepseekTokenizer,
    turns: Sequence[Turn],
    image_seq_length: int,
    pictures: int = 0,
    *,
    tags: bool = False,
    system: str = SYSTEM,
) -> Row:
    """The ids of a chat, and which of them are answers.

    Args:
        turns: only the last may lack its answer.
        image_seq_length: image tokens of one picture.
        pictures: how many belong to the chat. They stand before the first question.
        tags: instead, they stand where the questions say `<image>`.
        system: what the chat begins with; may be empty.

    Raises InputError: as `minivlm.processing.chat.check_turns`.
    """
    check_turns(turns, pictures, tags)
    ids, written = [tokenizer.bos_id], [False]

    def add(new: list[int], is_answer: bool = False) -> None:
        ids.extend(new)
        written.extend([is_answer] * len(new))

    for number, (question, answer) in enumerate(turns):
        before = pictures if number == 0 else 0
        pieces = question.split(TAG) if tags else [""] * before + [question]
        opening = f"{system}\n\n" if system and number == 0 else ""
        pieces[-1] = pieces[-1].rstrip()
        pieces[0] = f"{opening}{ASKED} {pieces[0].lstrip()}"
        pieces[-1] += f"\n\n{ANSWERED}"
        for place, piece in enumerate(pieces):
            if place > 0:
                add([tokenizer.image_id] * image_seq_length)
            add(tokenizer.encode(piece))
        if answer is not None:
            add([*tokenizer.encode(f" {answer.strip()}"), tokenizer.eos_id], is_answer=True)
    return Row(ids, written)


def chat_template(system: str = SYSTEM) -> str:
    """The same form as a Jinja template for `apply_chat_template` in transformers."""
    first = f"{{{{ {json.dumps(system)} }}}}{{{{ '\\n\\n' }}}}" if system else ""
    return (
        first
        + "{% for message in messages %}"
        + "{% set ns = namespace(text='') %}"
        + "{% if message.content is string %}{% set ns.text = message.content %}{% else %}"
        + "{% for part in message.content %}{% if part.type == 'image' %}"
        + f"{{% set ns.text = ns.text + '{IMAGE}' %}}"
        + "{% elif part.type == 'text' %}{% set ns.text = ns.text + part.text %}{% endif %}{% endfor %}"
        + "{% endif %}"
        + "{% if message.role == 'assistant' %}"
        + f"{{{{ '{ANSWERED}' }}}}{{% generation %}}{{{{ ' ' + ns.text | trim + '{END}' }}}}"
        + "{% endgeneration %}"
        + f"{{% else %}}{{{{ '{ASKED} ' + ns.text | trim + '\\n\\n' }}}}{{% endif %}}"
        + "{% endfor %}"
        + f"{{% if add_generation_prompt %}}{{{{ '{ANSWERED}' }}}}{{% endif %}}"
    )
