"""Questions, answers and pictures as one row of token ids: the chat of Llama 3, as in Llama 3.2 Vision.

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>

    <|image|>what is it?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

    a star<|eot_id|>
    ~~~~~~~~~~~~~~~~  the loss: answers and their ends

The row is built from ids, never by searching a finished text for marks, so what a user types cannot become
one. As in the original program, the empty line after a header and the text that follows it are split into
tokens apart from each other; transformers splits them as one text, which differs only where a question begins
with a newline. A word sees pictures that come before it and none that come after: questions stand behind
their pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

from minivlm.processing.chat import Turn, check_turns
from minivlm.processing.inputs import Row
from minivlm.processing.llama3_tokens import BEGIN, HEADER, HEADER_END, IMAGE, TURN_END, Llama3Tokenizer
from minivlm.processing.tokens import IMAGE as TAG


def encode_chat(
    tokenizer: Llama3Tokenizer,
    turns: Sequence[Turn],
    pictures: int = 0,
    *,
    tags: bool = False,
    system: str = "",
) -> Row:
    """The ids of a chat, and which of them are answers.

    Args:
        turns: only the last may lack its answer.
        pictures: how many belong to the chat. They stand before the first question.
        tags: instead, they stand where the questions say `<image>`.
        system: what the chat begins with; may be empty.

    Raises InputError: as `minivlm.processing.chat.check_turns`.
    """
    check_turns(turns, pictures, tags)
    encode, end = tokenizer.encode, tokenizer.eos_id
    ids, written = [tokenizer.bos_id], [False]

    def add(new: list[int], is_answer: bool = False) -> None:
        ids.extend(new)
        written.extend([is_answer] * len(new))

    def header(role: str) -> list[int]:
        return [tokenizer.header_id, *encode(role), tokenizer.header_end_id, *encode("\n\n")]

    if system:
        add([*header("system"), *encode(system), end])
    for number, (question, answer) in enumerate(turns):
        before = pictures if number == 0 else 0
        first, *others = question.split(TAG) if tags else [""] * before + [question]
        add([*header("user"), *encode(first)])
        for piece in others:
            add([tokenizer.image_id, *encode(piece)])
        add([end, *header("assistant")])
        if answer is not None:
            add([*encode(answer), end], is_answer=True)
    return Row(ids, written)


def chat_template(system: str = "") -> str:
    """The same form as a Jinja template for `apply_chat_template` in transformers."""

    def header(role: str) -> str:
        return f"{HEADER}{role}{HEADER_END}\n\n"

    first = (
        f"{{% if messages[0].role != 'system' %}}{header('system')}{system}{TURN_END}{{% endif %}}"
        if system
        else ""
    )
    return (
        f"{BEGIN}{first}{{% for message in messages %}}{header('{{ message.role }}')}"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        f"{{% if part.type == 'image' %}}{IMAGE}{{% elif part.type == 'text' %}}{{{{ part.text }}}}"
        f"{{% endif %}}{{% endfor %}}{{% endif %}}{TURN_END}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{header('assistant')}{{% endif %}}"
    )
