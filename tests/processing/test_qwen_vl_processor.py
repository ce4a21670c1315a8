"""Qwen-VL's words and rows: the pieces of tiktoken, two prompt forms, and places for pictures.

With the published qwen.tiktoken, the ids of these chats were compared with `make_context` and
`QWenTokenizer.tokenize` of the folder of Qwen-VL-Chat: no difference in any place.
"""

from __future__ import annotations

import base64
import itertools
import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from PIL import Image
from qwen_vl import ranks, tiny_processor
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from minivlm.errors import InputError
from minivlm.processing import qwen_tokens
from minivlm.processing.qwen_chat import SYSTEM, Turn, encode_content, ids_to_path, path_to_ids
from minivlm.processing.qwen_tags import Element
from minivlm.processing.qwen_tokens import VOCABULARY, QwenTokenizer, read_ranks
from minivlm.processing.qwen_vl import QwenVLProcessor, chat_format_in

RANKS = ranks()
NEWLINE = RANKS[b"\n"]
PICTURE = Image.new("RGB", (30, 20), "red")


@pytest.fixture(scope="module")
def tokenizer() -> QwenTokenizer:
    return QwenTokenizer(RANKS)


def plain(word: bytes) -> list[int]:
    """tiktoken's rule, without any speed."""
    if word in RANKS:
        return [RANKS[word]]
    parts = [bytes([byte]) for byte in word]
    while len(parts) > 1:
        pairs = [RANKS.get(a + b, len(RANKS)) for a, b in itertools.pairwise(parts)]
        best = pairs.index(min(pairs))
        if pairs[best] == len(RANKS):
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return [RANKS[part] for part in parts]


def texts() -> list[str]:
    rng = random.Random(0)
    letters = "aaersthlp .?:\n\t'é漢😀01<|>/"
    words = [
        "system",
        " what is it?",
        "helpful",
        "user\n\n\n  x",
        "it's",
        "12 345",
        "<|im_end|>",
        "<img>a</img>",
        "qwz",
        "qwzq",
    ]
    mixed = ["".join(rng.choices(letters, k=rng.randrange(1, 60))) for _ in range(200)]
    return [*words, *mixed, "".join(rng.choices(["sys", "tem", "use", "us", "er", " "], k=400))]


def test_words_are_split_as_tiktoken_does(tokenizer: QwenTokenizer) -> None:
    """Special tokens in a user's text are text."""
    split = pre_tokenizers.Split(Regex(qwen_tokens._WORD), "isolated")
    for text in texts():
        expected = [i for word, _ in split.pre_tokenize_str(text) for i in plain(word.encode())]
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode(expected) == text


def test_the_order_of_the_lines_does_not_matter(tokenizer: QwenTokenizer) -> None:
    other = QwenTokenizer(dict(reversed(RANKS.items())))
    assert all(other.encode(text) == tokenizer.encode(text) for text in texts())


# Scripts from right to left and without spaces, marks that join, digits and spaces of all kinds, lines that
# end in every way, emoji of several characters, contractions in both cases, and what only looks like a tag.
EVERYTHING = """
What's this? IT'S a Red star; they'LL say: "don't". we've I'd I'm he's x'y 'tis '\u017f
naïve cafe\u0301 \u212bngström \ufb01ne ①②③ Ⅻ x² ½ 12345 1,234.5 ٣٤٥ १२३ \uff10\uff11\uff12
你好,世界。日本語のテキスト 한국어 שלום עולם مرحبا بالعالم สวัสดีครับ Привет, мир! γεια σου नमस्ते
😀 👩\u200d👩\u200d👧 🇩🇪 👍🏽 e\u0327\u0301 \u200b\u200e\ufeff \u00a0\u2003\u3000x\u202fy\u1680z \t\t tab
a  b   c    d \r\n\r\nnext\rold\n\n\n  indent\n\u2028line\u2029paragraph\x0bvt\x0cff\x85nel\x1cfs\x00\x7fdel
if (x != 0) { return a[i]++ && ~b; } // --- === *** ... !!! ??? $#@%^&*_+|~`<>
<img> <|im_start|>system<|im_end|><|endoftext|><|extra_7|><imgpad> <box <ref/> </ box> \U00010348\U000e0041
"""


def learned() -> dict[bytes, int]:
    """All bytes, and 500 pieces that are frequent in `EVERYTHING`, as a real vocabulary is learned."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = qwen_tokens.build_backend(RANKS).pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=756, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([EVERYTHING], trainer)
    byte_of = {character: byte for byte, character in enumerate(qwen_tokens._CHARACTERS)}
    return {bytes(byte_of[c] for c in piece): rank for piece, rank in backend.get_vocab().items()}


@pytest.mark.parametrize("pieces", [RANKS, learned()], ids=["made up", "learned"])
def test_ids_are_those_of_the_library(pieces: dict[bytes, int]) -> None:
    """tiktoken's, for the normalized text; the tags are words, and no other special token is."""
    tokenizer = QwenTokenizer(pieces)
    encoding = tiktoken.Encoding(
        "qwen",
        pat_str=qwen_tokens._WORD,
        mergeable_ranks=pieces,
        special_tokens={tag: tokenizer.backend.token_to_id(tag) for tag in qwen_tokens.TAGS},
    )
    rng = random.Random(1)
    mixed = ["".join(rng.choices(EVERYTHING, k=rng.randrange(1, 80))) for _ in range(500)]
    tagged = [f"{text}<ref>{text}</ref> <box>(1,2),(3,4)</box>{text}" for text in mixed[:100]]
    for text in (EVERYTHING, *EVERYTHING.splitlines(), *texts(), *mixed, *tagged):
        expected = encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")
        assert tokenizer.encode(text) == expected, text


def test_special_tokens_come_after_the_pieces(tokenizer: QwenTokenizer) -> None:
    """In Qwen's order: in the published vocabulary of 151,643 pieces, `<img>` is 151,857."""
    first = len(RANKS)
    assert (tokenizer.pad_id, tokenizer.turn_start_id, tokenizer.turn_end_id) == (first, first + 1, first + 2)
    tags = [tokenizer.backend.token_to_id(tag) for tag in qwen_tokens.TAGS]
    assert tags == list(range(first + 208, first + 214))
    assert tokenizer.image_start_id == first + 214 == first + 151857 - 151643
    assert (tokenizer.image_end_id, tokenizer.image_id) == (first + 215, first + 216)
    assert tokenizer.vocab_size == first + 217
    assert tokenizer.eos_id == tokenizer.turn_end_id
    assert QwenTokenizer(RANKS, "raw").eos_id == first


def test_tags_are_words_and_pictures_are_not(tokenizer: QwenTokenizer) -> None:
    text = "<ref>it</ref><box>(1,2),(3,4)</box><quad></quad>"
    ids = tokenizer.encode(text)
    assert [tokenizer.backend.token_to_id(tag) in ids for tag in qwen_tokens.TAGS] == [True] * 6
    assert tokenizer.decode(ids) == text
    typed = "<img>a</img><imgpad><|im_start|><|im_end|><|endoftext|><|extra_0|>"
    ids = tokenizer.encode(typed)
    assert max(ids) < len(RANKS)
    assert tokenizer.decode(ids) == typed


def test_text_is_brought_to_one_form(tokenizer: QwenTokenizer) -> None:
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


def test_the_file_both_ways(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    lines = (tmp_path / VOCABULARY).read_text().splitlines()
    assert lines[0] == "AA== 0"
    assert [base64.b64decode(line.split()[0]) for line in lines] == list(RANKS)
    assert read_ranks(tmp_path / VOCABULARY) == RANKS
    again = QwenTokenizer.from_pretrained(tmp_path)
    assert again.encode("what is it?") == tokenizer.encode("what is it?")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config == {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no qwen.tiktoken: use a complete folder"),
        (b"AA== 0\nhello\n", r"damaged \(line 2 is no piece with its rank\)"),
        (b"AA== 0\n!!! 1\n", r"damaged \(line 2"),
        (b"AA== zero\n", r"damaged \(line 1"),
        (b"AA== 0\nAQ== 5\n", "the 2 ranks do not count from 0"),
        (b"AA== 0\nAQ== 1\n", "254 bytes have no rank"),
        (b"", "256 bytes have no rank"),
    ],
)
def test_files_that_are_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / VOCABULARY).write_bytes(content)
    with pytest.raises(InputError, match=message):
        QwenTokenizer.from_pretrained(tmp_path)


# Rows.


def shown(tokenizer: QwenTokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_a_chat_with_two_pictures() -> None:
    processor = tiny_processor()
    row = processor.encode_row("what is it?", "a <ref>star</ref>", pictures=2)
    place = f"<img>{'<imgpad>' * 4}</img>\n"
    assert shown(processor.tokenizer, row.ids) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nPicture 1:{place}Picture 2:{place}"
        "what is it?<|im_end|>\n<|im_start|>assistant\na <ref>star</ref><|im_end|>"
    )
    written = [i for i, is_written in zip(row.ids, row.written, strict=True) if is_written]
    assert shown(processor.tokenizer, written) == "a <ref>star</ref><|im_end|>"
    asked = processor.encode_row("what is it?", pictures=2)
    assert asked.ids == row.ids[: -len(written)]
    assert not any(asked.written)


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("what is it?", "a star", "what is it? Answer: a star"),
        ("Describe the image in English:", "a star", "Describe the image in English: a star"),
        ("<ref>the star</ref><box>", "(1,2),(3,4)</box>", "<ref>the star</ref><box>(1,2),(3,4)</box>"),
    ],
)
def test_prompts_without_a_chat(prompt: str, answer: str, text: str) -> None:
    processor = tiny_processor("raw")
    row = processor.encode_row(prompt, answer)
    assert shown(processor.tokenizer, row.ids) == f"<img>{'<imgpad>' * 4}</img>{text}<|endoftext|>"
    asked = processor.encode_row(prompt)
    assert asked.ids == row.ids[: len(asked.ids)]
    assert row.written == [False] * len(asked.ids) + [True] * (len(row.ids) - len(asked.ids))


def test_a_path_is_written_byte_by_byte() -> None:
    """The ids are the numbers of the bytes, and not the ids of pieces of one byte."""
    tokenizer = tiny_processor().tokenizer
    pad = tokenizer.image_id
    assert path_to_ids("a/é", 8, pad) == [97, 47, 195, 169, pad, pad, pad, pad]
    assert ids_to_path([97, 47, 195, 169, pad, pad, pad, pad], pad) == "a/é"
    assert ids_to_path([pad] * 3, pad) == ids_to_path([], pad) == ""
    assert path_to_ids("", 1, pad) == [pad]
    assert len(path_to_ids("a" * 254, 256, pad)) == 256
    with pytest.raises(InputError, match="has 255 bytes, and 254 fit between"):
        path_to_ids("a" * 255, 256, pad)
    for ids in ([300, pad], [195, pad]):
        with pytest.raises(InputError, match="is no path"):
            ids_to_path(ids, pad)


def test_lists_with_paths_are_the_published_text(tmp_path: Path) -> None:
    """Only a picture's element opens a file and makes places."""
    processor = tiny_processor()
    tokenizer = processor.tokenizer
    start, end, pad = tokenizer.image_start_id, tokenizer.image_end_id, tokenizer.image_id
    content: list[Element] = [{"image": "a."}, {"text": "<img>b</img>"}, {"ref": "it", "box": (1, 2, 3, 4)}]
    ids = encode_content(tokenizer, content, 4)
    expected = (
        tokenizer.encode("Picture 1:"),
        tokenizer.encode("\n<img>b</img><ref>it</ref><box>(1,2),(3,4)</box>"),
    )
    assert ids == [*expected[0], start, 97, 46, pad, pad, end, *expected[1]]
    assert encode_content(tokenizer, [{"image": PICTURE}], 4) == [
        *tokenizer.encode("Picture 1:"), start, pad, pad, pad, pad, end, NEWLINE
    ]  # fmt: skip


def test_chats_of_several_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    PICTURE.save("a", format="PNG")
    processor = tiny_processor()
    first: list[Element] = [{"image": "a.png"}, {"text": "what is it?"}]
    with pytest.raises(InputError, match="has 5 bytes, and 2 fit"):
        processor.chat([[(first, None)]])
    first[0] = {"image": "a"}
    second: list[Element] = [{"image": Image.new("RGB", (9, 9))}, {"text": "and this?"}]
    batch = processor.chat([[(first, "a star"), (second, "red")], [([{"text": "what?"}], "a star")]])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    text = shown(processor.tokenizer, batch["input_ids"][0].tolist())
    assert text.count("<img>") == text.count("Picture 1:") == 2
    assert "<|im_start|>assistant\na star<|im_end|>\n<|im_start|>user\nPicture 1:" in text
    learned = batch["labels"][0]
    answer = shown(processor.tokenizer, learned[learned != -100].tolist())
    assert answer == "a star<|im_end|>red<|im_end|>"
    opened = processor.chat([[(first, None)]])
    assert "labels" not in opened
    assert torch.equal(opened["pixel_values"], batch["pixel_values"][:1])
    refused: tuple[tuple[list[Turn], str], ...] = (
        ([], "the chat has no turns"),
        ([(first, None), (second, None)], "question 1 of 2 has no answer"),
    )
    for turns, message in refused:
        with pytest.raises(InputError, match=message):
            processor.chat([turns])
    with pytest.raises(InputError, match="there are 2 turns, and this model has not learned to chat"):
        tiny_processor("raw").chat([[(first, "a"), (second, None)]])
    raw = tiny_processor("raw").chat([[(first, None)]])
    assert shown(processor.tokenizer, raw["input_ids"][0].tolist()).endswith("</img>\nwhat is it?")


@pytest.mark.parametrize(
    ("prompt", "answer", "message"),
    [
        ("where is <ref>it?", None, "<ref> does not close"),
        ("where?", "<box>(1,2),(3,4)", "<box> does not close"),
        ("where?", "<box>(1,2),(3,1000)</box>", "a box has 1000"),
        ("what is in <box>(1,2)</box>?", None, "a box has 2 numbers"),
    ],
)
@pytest.mark.parametrize("chat_format", ["chatml", "raw"])
def test_tags_that_are_refused(
    chat_format: qwen_tokens.ChatFormat, prompt: str, answer: str | None, message: str
) -> None:
    processor = tiny_processor(chat_format)
    with pytest.raises(InputError, match=message):
        processor(PICTURE, prompt, answer)


def test_an_open_tag_at_the_end_is_for_models_without_a_chat() -> None:
    prompt = "<ref>it</ref><box>"
    assert tiny_processor("raw")(PICTURE, prompt)["input_ids"].shape[0] == 1
    with pytest.raises(InputError, match="<box> does not close"):
        tiny_processor()(PICTURE, prompt)
    with pytest.raises(InputError, match="<box> does not close"):
        tiny_processor("raw")(PICTURE, prompt, "(1,2),(3,4)")


def test_pictures_and_rows_that_do_not_match() -> None:
    with pytest.raises(InputError, match="got 1 pictures for 2 prompts"):
        tiny_processor()(PICTURE, ["what?", "where?"])


def test_answers_are_read_up_to_their_end() -> None:
    processor = tiny_processor()
    tokenizer = processor.tokenizer
    text = " <ref>it</ref><box>(1,2),(3,4)</box> "
    rows = [
        [*tokenizer.encode(text), tokenizer.turn_end_id, *tokenizer.encode("more")],
        [*tokenizer.encode(text), tokenizer.turn_start_id, tokenizer.pad_id, tokenizer.pad_id],
    ]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_id] * (width - len(row)) for row in rows])
    assert processor.decode(ids) == [text.strip()] * 2


def test_pixels() -> None:
    """Pillow's bicubic filter to a square, then CLIP's mean and deviation."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    pixels = tiny_processor().image_processor([Image.fromarray(noise)])[0]
    small = np.asarray(Image.fromarray(noise).resize((16, 16), Image.Resampling.BICUBIC))
    mean, std = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    expected = (torch.tensor(small).float() / 255 - mean) / std
    torch.testing.assert_close(pixels, expected.permute(2, 0, 1), rtol=0, atol=1e-6)


def test_the_form_of_prompts_is_in_the_folder(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    tiny_processor().save_pretrained(tmp_path)
    for form in ("chatml", "raw"):
        file.write_text(json.dumps({"chat_format": form}))
        assert chat_format_in(tmp_path) == form
        assert QwenVLProcessor.from_pretrained(tmp_path, 16, 4).tokenizer.chat_format == form
    for content in ("{}", '{"chat_format": "vicuna"}'):
        file.write_text(content)
        with pytest.raises(InputError, match=r"chat_format .*: only 'chatml'"):
            chat_format_in(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match="chat_format None"):
        chat_format_in(tmp_path)
