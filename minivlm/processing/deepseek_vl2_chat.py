"""Questions, answers and pictures as one row of token ids: DeepSeek-VL2's prompt form.

    <｜begin▁of▁sentence｜><|User|>: <image>
    what is it?

    <|Assistant|>:a star<｜end▁of▁sentence｜><|User|>: what color?
                  ~~~~~~~~~~~~~~~~~~~~~~~~~~  the loss: answers and their ends
    <|Assistant|>:

Source: `processing_deepseek_vl_v2.py` of https://github.com/deepseek-ai/DeepSeek-VL2. As there, questions and
answers lose spaces at both ends, and nothing separates an answer from what is before it. The row is built
from ids, never by searching a finished text for tags, so what a user types cannot become a picture or a turn.
Here a picture has a single placeholder. The processor puts in as many as it takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from minivlm.processing.chat import Turn, check_turns
from minivlm.processing.deepseek_vl2_boxes import check_tags
from minivlm.processing.deepseek_vl2_tokens import DeepseekVL2Tokenizer
from minivlm.processing.inputs import Row
from minivlm.processing.tokens import IMAGE as TAG


def encode_chat(
    tokenizer: DeepseekVL2Tokenizer, turns: Sequence[Turn], pictures: int = 0, *, tags: bool = False
) -> Row:
    """The ids of a chat, and which of them are answers.

    Args:
        turns: only the last may lack its answer.
        pictures: how many belong to the chat. They stand before the first question, a line each.
        tags: instead, they stand where the questions say `<image>`.

    Raises InputError: as `minivlm.processing.chat.check_turns`; a `<|ref|>` or `<|det|>` does not close.
    """
    check_turns(turns, pictures, tags)
    ids, written = [tokenizer.bos_id], [False]

    def add(new: list[int], is_answer: bool = False) -> None:
        ids.extend(new)
        written.extend([is_answer] * len(new))

    for number, (question, answer) in enumerate(turns):
        check_tags(question)
        if tags:
            pieces = question.strip().split(TAG)
        else:
            pieces = ["", *["\n"] * (pictures if number == 0 else 0)]
            pieces[-1] += question.rstrip() if len(pieces) > 1 else question.strip()
        pieces[0] = f": {pieces[0]}"
        pieces[-1] += "\n\n"
        add([tokenizer.user_id])
        for place, piece in enumerate(pieces):
            add([tokenizer.image_id] if place > 0 else [])
            add(tokenizer.encode(piece))
        add([tokenizer.assistant_id, *tokenizer.encode(":")])
        if answer is not None:
            check_tags(answer)
            add([*tokenizer.encode(answer.strip()), tokenizer.eos_id], is_answer=True)
    return Row(ids, written)
