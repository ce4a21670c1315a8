"""LLaVA's prompt form: ids against transformers and against the original's rule, and every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_backends import Kind, llama_backend, write_tokenizer
from transformers import AutoTokenizer

from minivlm.errors import InputError
from minivlm.processing import LlamaTokenizer
from minivlm.processing.chat import (
    SYSTEM,
    Turn,
    chat_template,
    encode_caption,
    encode_chat,
    system_of,
)
from minivlm.processing.inputs import Row

N = 4  # image tokens
ONE: list[Turn] = [("what is it?", "a red star")]
THREE: list[Turn] = [*ONE, ("what color is the circle?", "it is green"), ("é and\nЖ?", "3 stars.")]
CHATS = [
    (ONE, 1),
    (THREE, 1),
    (THREE, 2),
    (THREE, 0),
    ([("what?", " two spaces\n")], 1),
    ([("q", "<image></s>")], 1),
]
# What llava-hf's folders say: no first sentence, and a space where the original has `</s>`.
PUBLISHED = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
    "{% endif %}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', "
    "'text') %}{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture(params=["published", "today"])
def kind(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    return kind


@pytest.fixture
def tokenizer(kind: Kind) -> LlamaTokenizer:
    return LlamaTokenizer(llama_backend(kind))


def messages(turns: list[Turn], pictures: int = 0) -> list[dict[str, Any]]:
    """A chat as transformers writes it."""
    found: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(turns):
        images = [{"type": "image"}] * (pictures if number == 0 else 0)
        found.append({"role": "user", "content": [*images, {"type": "text", "text": question}]})
        if answer is not None:
            found.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return found


def reference(folder: Path, kind: Kind, template: str) -> Any:
    write_tokenizer(folder, kind)
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.chat_template = template
    return loaded


def expand(ids: list[int], image_id: int) -> list[int]:
    """N image tokens for each."""
    return [index for i in ids for index in ([i] * N if i == image_id else [i])]


@pytest.mark.parametrize("system", [SYSTEM, ""])
@pytest.mark.parametrize(("turns", "pictures"), CHATS[:5])
def test_ids_and_answers_are_those_of_transformers(
    tokenizer: LlamaTokenizer, kind: Kind, turns: list[Turn], pictures: int, system: str, tmp_path: Path
) -> None:
    theirs = reference(tmp_path, kind, chat_template(system))
    # Without its last answer, a chat ends where that one begins.
    for asked in (turns, [*turns[:-1], (turns[-1][0], None)]):
        text = theirs.apply_chat_template(
            messages(asked, pictures), tokenize=False, add_generation_prompt=asked is not turns
        )
        row = encode_chat(tokenizer, asked, N, pictures, system=system)
        assert row.ids == expand(theirs(text).input_ids, tokenizer.image_id)
    # transformers marks what an assistant says, here in a text without `<s>`.
    seen = theirs.apply_chat_template(messages(turns), return_assistant_tokens_mask=True, return_dict=True)
    row = encode_chat(tokenizer, turns, N, system=system)
    assert [bool(mark) for mark in seen["assistant_masks"]] == row.written[1:]


@pytest.mark.parametrize(("turns", "pictures"), CHATS[:4])
def test_the_template_of_the_published_folders(
    tokenizer: LlamaTokenizer, kind: Kind, turns: list[Turn], pictures: int, tmp_path: Path
) -> None:
    """The same for one turn without the first sentence; between turns it has no end of an answer."""
    theirs = reference(tmp_path, kind, PUBLISHED)
    asked = [*turns[:-1], (turns[-1][0], None)]
    text = theirs.apply_chat_template(messages(asked, pictures), tokenize=False, add_generation_prompt=True)
    expected = expand(theirs(text).input_ids, tokenizer.image_id)
    row = encode_chat(tokenizer, asked, N, pictures, system=system_of(PUBLISHED))
    assert (row.ids == expected) == (len(turns) == 1)
    if len(turns) > 1:
        ends = [i for i in row.ids if i == tokenizer.eos_id]
        assert len(ends) == len(turns) - 1
        assert tokenizer.eos_id not in expected
    sentence = {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}
    text = theirs.apply_chat_template([sentence, *messages([(turns[0][0], None)])], tokenize=False)
    row = encode_chat(tokenizer, [(turns[0][0], None)], N)
    assert row.ids == theirs(text + "ASSISTANT:").input_ids


def originals(theirs: Any, text: str, image_id: int) -> list[int]:
    """The original's rule: pieces between `<image>` are read apart, and only the first keeps its `<s>`."""
    first, *others = [theirs(piece).input_ids for piece in text.split("<image>")]
    return [*first, *(index for piece in others for index in [*[image_id] * N, *piece[1:]])]


@pytest.mark.parametrize(("turns", "pictures"), CHATS[:4])
def test_ids_and_labels_are_those_of_the_original(turns: list[Turn], pictures: int, tmp_path: Path) -> None:
    """As `preprocess_v1` of its train.py gives them; that was run with this tokenizer on the chats above."""
    theirs = reference(tmp_path, "published", "")
    tokenizer = LlamaTokenizer(llama_backend("published"))
    text, ends = f"{SYSTEM} ", []
    for number, (question, answer) in enumerate(turns):
        text += "USER: " + "<image>\n" * (pictures if number == 0 else 0) + f"{question} ASSISTANT:"
        start = len(originals(theirs, text, tokenizer.image_id))
        text += f" {answer}</s>"
        ends.append((start, len(originals(theirs, text, tokenizer.image_id))))
    row = encode_chat(tokenizer, turns, N, pictures)
    assert row.ids == originals(theirs, text, tokenizer.image_id)
    assert row.written == [any(start <= i < end for start, end in ends) for i in range(len(row.ids))]


def test_what_transformers_5_makes_of_published_folders(tmp_path: Path) -> None:
    """They name a LlamaTokenizer, which it builds anew: the space after `<image>` is gone, unless told."""
    tokenizer = LlamaTokenizer(llama_backend("published"))
    row = encode_chat(tokenizer, [("what?", None)], N, pictures=1)
    text = f"{SYSTEM} USER: <image>\nwhat? ASSISTANT:"
    write_tokenizer(tmp_path, "published", "LlamaTokenizer")
    for legacy in (True, False):
        theirs = AutoTokenizer.from_pretrained(tmp_path, legacy=legacy)
        ids = expand(theirs(text).input_ids, tokenizer.image_id)
        assert (ids == row.ids) == legacy
        assert len(ids) == len(row.ids) - (not legacy)


def test_a_caption_of_the_first_stage(tokenizer: LlamaTokenizer, kind: Kind, tmp_path: Path) -> None:
    row = encode_caption(tokenizer, "a red star", N)
    theirs = reference(tmp_path, kind, "")
    assert row.ids == expand(theirs("<image>a red star\n").input_ids, tokenizer.image_id)
    assert row.written == [False] * (1 + N) + [True] * (len(row.ids) - 1 - N)
    assert tokenizer.decode(row.ids[1 + N :]) == "a red star\n"
    assert tokenizer.eos_id not in row.ids


def test_pictures_where_the_tags_are(tokenizer: LlamaTokenizer, kind: Kind, tmp_path: Path) -> None:
    theirs = reference(tmp_path, kind, "")
    turns: list[Turn] = [("<image> or <image><image>what?", "it"), ("and <image>", None)]
    row = encode_chat(tokenizer, turns, N, 4, tags=True, system="")
    text = "USER: <image> or <image><image>what? ASSISTANT: it</s>USER: and <image> ASSISTANT:"
    assert row.ids == expand(theirs(text).input_ids, tokenizer.image_id)
    first: list[Turn] = [("<image>\nwhat?", None)]
    assert encode_chat(tokenizer, first, N, 1, tags=True) == encode_chat(tokenizer, [("what?", None)], N, 1)


words = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
        st.sampled_from(
            ["<image>", "<s>", "</s>", "<pad>", "<unk>", "USER:", "ASSISTANT:", "what", "<", ">"]
        ),
    ),
    min_size=1,
).map("".join)
BUILT = {kind: LlamaTokenizer(llama_backend(kind)) for kind in ("published", "today")}  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(words.filter(str.strip), words), min_size=1, max_size=3), st.integers(0, 2))
@pytest.mark.parametrize("name", sorted(BUILT))
def test_what_is_typed_is_never_a_special_token(name: str, turns: list[Turn], pictures: int) -> None:
    tokenizer = BUILT[name]
    row = encode_chat(tokenizer, turns, N, pictures)
    found = [i for i in row.ids if i in tokenizer.special_ids]
    image, ends = [tokenizer.image_id] * N * pictures, [tokenizer.eos_id] * len(turns)
    assert found == [tokenizer.bos_id, *image, *ends]
    answers = [i for i, is_answer in zip(*row, strict=True) if is_answer]
    assert answers.count(tokenizer.eos_id) == len(turns)
    if len(turns) == 1:
        text = turns[0][1].replace("▁", " ")
        assert tokenizer.decode(answers[:-1]).strip() == text.strip()
    assert encode_chat(tokenizer, [*turns[:-1], (turns[-1][0], None)], N, pictures).ids == _asked(row)


def _asked(row: Row) -> list[int]:
    """A row without its last answer."""
    end = len(row.ids)
    while row.written[end - 1]:
        end -= 1
    return row.ids[:end]


@pytest.mark.parametrize(
    ("turns", "pictures", "tags", "message"),
    [
        ([], 0, False, "the chat has no turns: give at least one question"),
        ([("what?", None), (" \n", None)], 0, False, "question 1 of 2 has no answer: only the last may lack"),
        ([("what?", "it"), (" \n", None)], 0, False, "question 2 is empty"),
        ([("<image>", None)], 1, True, "question 1 is empty"),
        ([("what?", None)], 1, True, "hold 0 times <image>, and there are 1 pictures: write <image> once"),
        ([("<image> or what?", None)], 2, True, "hold 1 times <image>, and there are 2 pictures"),
        ([("<image> or <image>", None)], 1, True, "hold 2 times <image>, and there are 1 pictures"),
        ([("what\ud800", None)], 0, False, "is not Unicode"),
    ],
)
def test_refused_chats(turns: list[Turn], pictures: int, tags: bool, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode_chat(BUILT["published"], turns, N, pictures, tags=tags)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'USER: ' }} ASSISTANT:", r"has no place for a picture \(<image>\)"),
        ("###Human: <image>\n###Assistant:", r"has no answer in Vicuna's form \(ASSISTANT:\)"),
    ],
)
def test_refused_templates(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        system_of(template)


def test_the_first_sentence_is_the_templates() -> None:
    assert system_of(PUBLISHED) == ""
    assert system_of(chat_template()) == SYSTEM
    assert system_of(chat_template("")) == ""
    assert system_of("'" + SYSTEM.replace("'", "\\'") + " USER: <image> ASSISTANT:'") == SYSTEM


def test_the_tokenizers_names(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    write_tokenizer(tmp_path)
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.loc_ids == tokenizer.seg_ids == []
    assert tokenizer.image_id == tokenizer.pad_id - 1 == tokenizer.vocab_size - 2
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (tokenizer.pad_id, 1, 2)
    assert len(loaded) == tokenizer.vocab_size
    with pytest.raises(InputError, match=r"has no <start> and no <end>: use the tokenizer.json of LLaVA"):
        LlamaTokenizer(llama_backend(), type(tokenizer.names)(bos="<start>", eos="<end>"))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"tokenizer_config.json contains no settings"):
        LlamaTokenizer.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no tokenizer.json: use a LLaVA checkpoint folder"):
        LlamaTokenizer.from_pretrained(tmp_path / "nowhere")
