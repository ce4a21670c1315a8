"""Questions, answers and pictures as one row of token ids: LLaVA 1.5's prompt form, which is Vicuna's.

    <s>A chat between ... questions. USER: <image>
    what is it? ASSISTANT: a star</s>USER: what color? ASSISTANT: red</s>
                          ~~~~~~~~~~~                            ~~~~~~~~  the loss: answers and their ends

Sources: `conversation.py` and `train.py` of https://github.com/haotian-liu/LLaVA. The row is built from ids,
never by searching a finished text for tags, so what a user types cannot become `<image>`, `<s>` or `</s>`.
As in the original, the pieces between special tokens are split into tokens apart from each other.
transformers builds the same ids from text and a template (`chat_template`), with two differences: the
template of the published folders has no first sentence, and no `</s>` between turns.

In the first stage of training, when only the projector learns, a row has no questions: `encode_caption`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from minivlm.errors import InputError
from minivlm.processing.inputs import Row
from minivlm.processing.llama_tokens import LlamaTokenizer
from minivlm.processing.tokens import IMAGE

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ASKED, ANSWERED = "USER:", "ASSISTANT:"

Turn = tuple[str, str | None]  # a question and its answer; None where the model is to write it


def encode_chat(
    tokenizer: LlamaTokenizer,
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
        pictures: how many belong to the chat. They stand before the first question, a line each.
        tags: instead, they stand where the questions say `<image>`.
        system: the sentence before the first turn; may be empty.

    Raises InputError: no turns, an empty question, a missing answer, or another number of `<image>` than of
    pictures.
    """
    check_turns(turns, pictures, tags)
    ids, written = [tokenizer.bos_id], [False]

    def add(new: list[int], is_answer: bool = False) -> None:
        ids.extend(new)
        written.extend([is_answer] * len(new))

    for number, (question, answer) in enumerate(turns):
        if tags:
            pieces = question.split(IMAGE)
        else:
            pieces = ["", *["\n"] * (pictures if number == 0 else 0)]
            pieces[-1] += question
        opening = f"{system} " if system and number == 0 else ""
        pieces[0] = f"{opening}{ASKED} {pieces[0]}"
        pieces[-1] += f" {ANSWERED}"
        for place, piece in enumerate(pieces):
            if place > 0:
                add([tokenizer.image_id] * image_seq_length)
            is_first = number == place == 0
            add(tokenizer.encode(piece) if is_first else tokenizer.encode_later(piece))
        if answer is not None:
            add([*tokenizer.encode_after(":", f" {answer}"), tokenizer.eos_id], is_answer=True)
    return Row(ids, written)


def encode_caption(tokenizer: LlamaTokenizer, caption: str, image_seq_length: int) -> Row:
    """A row of the first stage: the picture, then its caption and a newline, which have the loss."""
    before = [tokenizer.bos_id, *[tokenizer.image_id] * image_seq_length]
    after = tokenizer.encode_later(f"{caption}\n")
    return Row([*before, *after], [False] * len(before) + [True] * len(after))


def check_turns(turns: Sequence[Turn], pictures: int, tags: bool) -> None:
    """Raises InputError: no turns, an empty question, a missing answer, or another number of `<image>`."""
    if not turns:
        raise InputError("the chat has no turns: give at least one question, as ('what is it?', None)")
    for number, (question, answer) in enumerate(turns, start=1):
        if not question.replace(IMAGE, "" if tags else IMAGE).strip():
            raise InputError(f"question {number} is empty: ask something, such as 'what is it?'")
        if answer is None and number < len(turns):
            raise InputError(f"question {number} of {len(turns)} has no answer: only the last may lack it")
    found = sum(question.count(IMAGE) for question, _ in turns)
    if tags and found != pictures:
        raise InputError(
            f"the questions hold {found} times {IMAGE}, and there are {pictures} pictures: write {IMAGE} "
            "once for each picture, where it belongs"
        )


def chat_template(system: str = SYSTEM, eos_token: str = "</s>") -> str:
    """The same form as a Jinja template for `apply_chat_template` in transformers."""
    first = f"{{% if messages[0].role != 'system' %}}{{{{ {json.dumps(system + ' ')} }}}}{{% endif %}}"
    end = json.dumps(eos_token)
    return (
        (first if system else "")
        + "{% for message in messages %}"
        + "{% if message.content is string %}{% set text = message.content %}{% else %}{% set text = "
        + "message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
        + "{% endif %}"
        + "{% if message.role == 'system' %}{{ text + ' ' }}"
        + f"{{% elif message.role == 'assistant' %}}{{{{ '{ANSWERED}' }}}}"
        + f"{{% generation %}}{{{{ ' ' + text + {end} }}}}{{% endgeneration %}}"
        + f"{{% else %}}{{{{ '{ASKED} ' }}}}"
        + "{% if message.content is not string %}"
        + "{% for part in message.content | selectattr('type', 'equalto', 'image') %}"
        + f"{{{{ '{IMAGE}\\n' }}}}{{% endfor %}}{{% endif %}}{{{{ text + ' ' }}}}{{% endif %}}"
        + "{% endfor %}"
        + f"{{% if add_generation_prompt %}}{{{{ '{ANSWERED}' }}}}{{% endif %}}"
    )


def system_of(template: str) -> str:
    """The first sentence of the chats that a folder's template writes: Vicuna's, or none.

    Raises InputError: the template has no place for a picture, or another form of turns.
    """
    for needed, what in ((IMAGE, "place for a picture"), (ANSWERED, "answer in Vicuna's form")):
        if needed not in template:
            raise InputError(
                f"the chat template has no {what} ({needed}): only LLaVA 1.5's form is supported here"
            )
    return SYSTEM if SYSTEM in template.replace("\\'", "'") else ""
