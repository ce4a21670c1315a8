"""Text to ids and back: what a user types stays text, and every text comes back."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Backend

from minivlm.errors import InputError
from minivlm.processing.tokens import (
    LOC_TOKENS,
    SEG_TOKENS,
    Tokenizer,
    add_image_tokens_to_prompt,
    build_tokenizer,
)

TEXTS = [
    "detect red circle ; blue square",
    "what color is the star?\nthe star is red.",
    "caption en",
    "<loc0001><loc0002><loc0003><loc0004> blue star ; <loc0001><loc0002><loc0003><loc0004> <seg001> circle",
    "there are 3 stars.",
]
SPECIALS = ["<pad>", "<eos>", "<bos>", "<image>"]

any_text = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.sampled_from([*SPECIALS, "<unk>", "<loc0000>", "<loc1023>", "<seg127>", "<loc", " ", "\n", "red"]),
    )
).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(build_tokenizer(TEXTS))


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.backend.id_to_token(index) for index in tokenizer.encode(text)]


def gemma_file(
    words: Sequence[str] = (), merges: Sequence[tuple[str, str]] = (), leave_out: str = ""
) -> Backend:
    """A bare Gemma tokenizer: no pre-tokenizer, no <loc>, a post-processor that puts <bos> first."""
    specials = [token for token in ("<pad>", "<eos>", "<bos>", "<unk>") if token != leave_out]
    vocab = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n", *words]
    backend = Backend(
        models.BPE(
            vocab={word: index for index, word in enumerate(vocab)},
            merges=list(merges),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(specials)
    if leave_out != "<bos>":
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A",
            pair="<bos> $A <bos>:1 $B:1",
            special_tokens=[("<bos>", specials.index("<bos>"))],
        )
    return backend


# --- the built tokenizer ------------------------------------------------------------------------------------


def test_ids_are_in_gemmas_order(tokenizer: Tokenizer) -> None:
    backend, size = tokenizer.backend, tokenizer.vocab_size
    assert [backend.id_to_token(i) for i in range(5)] == ["<pad>", "<eos>", "<bos>", "<unk>", "<0x00>"]
    assert backend.id_to_token(259) == "<0xFF>"
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.image_id) == (0, 1, 2, size - 1)
    assert tokenizer.seg_ids == list(range(size - 129, size - 1))
    assert tokenizer.loc_ids == list(range(size - 129 - 1024, size - 129))
    assert backend.id_to_token(tokenizer.loc_ids[7]) == "<loc0007>"
    assert backend.id_to_token(tokenizer.seg_ids[7]) == "<seg007>"
    assert len(backend.get_vocab()) == size
    assert tokenizer.special_ids == {0, 1, 2, 3, size - 1}


def test_a_word_is_a_token(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "detect red circle") == ["detect", "▁red", "▁circle"]
    assert pieces(tokenizer, "the star is red.\n") == ["the", "▁star", "▁is", "▁red", ".", "\n"]
    assert pieces(tokenizer, "star ; 3") == ["s", "tar", "▁;", "▁3"]  # "star" never began a line


def test_words_outside_the_texts_become_bytes(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "Ж") == ["<0xD0>", "<0x96>"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("abcdeàß", min_size=1, max_size=6), min_size=1, max_size=8), st.integers())
def test_every_word_of_any_texts_is_a_token(words: list[str], seed: int) -> None:
    texts = ["x " + " ".join(words), *words]
    built = build_tokenizer(texts)
    tokenizer = Tokenizer(Backend.from_str(built.to_str()))
    for word in words:
        assert len(tokenizer.encode(word)) == 1
        assert len(tokenizer.encode(f"x {word}")) == 2
    random.Random(seed).shuffle(texts)
    assert build_tokenizer(texts).to_str() == built.to_str()


def test_special_words_in_the_texts_teach_nothing() -> None:
    texts = ["<image><bos>red<eos>", "<loc0001><seg001> red"]
    words = build_tokenizer(texts).get_vocab()
    plain = build_tokenizer(["red", "\n red"]).get_vocab()
    assert words == plain


def test_no_texts() -> None:
    tokenizer = Tokenizer(build_tokenizer([]))
    assert tokenizer.decode(tokenizer.encode("any text\n")) == "any text\n"


# --- what a user types --------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [*SPECIALS, "<unk>"])
@pytest.mark.parametrize(
    "form", ["{}", "a{}b", " {} ", "{}{}", "<{}>", "<loc0000>{}<loc0000>", "<bo{}s>", "\n{}\n"]
)
def test_typed_specials_are_text(tokenizer: Tokenizer, special: str, form: str) -> None:
    text = form.format(special, special)
    ids = tokenizer.encode(text)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.special_ids.isdisjoint(tokenizer.backend.encode(text).ids)
    assert tokenizer.special_ids.isdisjoint(pickle.loads(pickle.dumps(tokenizer)).encode(text))
    # Without that protection the same tokenizer gives the special id.
    tokenizer.backend.encode_special_tokens = False
    try:
        assert not tokenizer.special_ids.isdisjoint(tokenizer.backend.encode(text).ids)
    finally:
        tokenizer.backend.encode_special_tokens = True


def test_typed_specials_are_text_even_if_merges_build_them() -> None:
    words = ["<", "b", "o", "s", ">", "<b", "os", "os>"]
    backend = gemma_file(words, [("<", "b"), ("o", "s"), ("os", ">"), ("<b", "os>")])
    tokenizer = Tokenizer(backend)
    assert tokenizer.backend.encode("<bos>", add_special_tokens=False).ids == [tokenizer.bos_id]  # the trap
    assert pieces(tokenizer, "<bos><loc0000><bos>") == ["<", "b", "os>", "<loc0000>", "<", "b", "os>"]
    assert tokenizer.decode(tokenizer.encode("a<bos>b")) == "a<bos>b"


def test_typed_positions_are_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<loc0000>") == [tokenizer.loc_ids[0]]
    assert tokenizer.encode("".join(LOC_TOKENS)) == tokenizer.loc_ids
    assert tokenizer.encode("".join(SEG_TOKENS)) == tokenizer.seg_ids
    assert pieces(tokenizer, "detect<loc0012> red") == ["detect", "<loc0012>", "▁red"]
    assert tokenizer.decode(tokenizer.encode("<loc0001><seg002> red")) == "<loc0001><seg002> red"
    for text in ("<loc1024>", "<loc001>", "<LOC0001>", "<seg128>"):
        assert len(tokenizer.encode(text)) > 4
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(any_text)
@example("▁")
@example("<image>")
@example("\x00\r\n\t﻿\u200d")
@example("\u00a0\u3000🙂🏽‍🚀 e\u0301")
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text.replace("▁", " ")  # the one ambiguity of Gemma's format


@settings(max_examples=300, deadline=None)
@given(any_text)
def test_the_pre_tokenizer_changes_nothing_after_learning(tokenizer: Tokenizer, text: str) -> None:
    """Gemma has none, and transformers' GemmaTokenizer drops it: the ids must be the same."""
    bare = Backend.from_str(tokenizer.backend.to_str())
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Split("no such text", "isolated")
    bare.encode_special_tokens = True
    assert bare.encode(text).ids == tokenizer.encode(text)


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="character 2 of the text is not Unicode"):
        tokenizer.encode("ab\ud800")


# --- prompts ------------------------------------------------------------------------------------------------


def test_prompt_text() -> None:
    text = add_image_tokens_to_prompt("detect cat", "<bos>", 3, "<image>")
    assert text == "<image><image><image><bos>detect cat\n"


def test_prompt_ids(tokenizer: Tokenizer) -> None:
    newline = tokenizer.encode("\n")
    assert len(newline) == 1
    prefix = tokenizer.encode_prefix("detect red", 3)
    assert prefix == [tokenizer.image_id] * 3 + [tokenizer.bos_id] + tokenizer.encode("detect red") + newline
    assert tokenizer.encode_prefix("detect red", 0) == prefix[3:]
    assert tokenizer.encode_suffix("red") == [*tokenizer.encode("red"), tokenizer.eos_id]
    # The shown text and the built ids are the same prompt.
    tokenizer.backend.encode_special_tokens = False
    shown = tokenizer.backend.encode(add_image_tokens_to_prompt("detect red", "<bos>", 3, "<image>")).ids
    tokenizer.backend.encode_special_tokens = True
    assert shown == prefix


@settings(max_examples=200, deadline=None)
@given(any_text, st.integers(0, 5))
def test_a_prompt_has_n_image_tokens_and_one_bos(tokenizer: Tokenizer, text: str, count: int) -> None:
    ids = tokenizer.encode_prefix(text, count)
    assert ids.count(tokenizer.image_id) == count
    assert ids.count(tokenizer.bos_id) == 1
    assert ids[: count + 1] == [tokenizer.image_id] * count + [tokenizer.bos_id]
    assert tokenizer.decode(ids) == text.replace("▁", " ") + "\n"


def test_decode_keeps_or_drops_specials(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode_prefix("red <loc0001>", 2), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "red <loc0001>\n"
    kept = tokenizer.decode(ids, skip_special_tokens=False)
    assert kept == "<image><image><bos>red <loc0001>\n<eos><pad>"
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""
    assert tokenizer.decode([tokenizer.backend.token_to_id("<0xFF>")]) == "�"
    assert tokenizer.decode([]) == ""


# --- files --------------------------------------------------------------------------------------------------


def test_a_gemma_file_gets_what_it_lacks() -> None:
    backend = gemma_file(["<loc0000>"])  # a word of the vocabulary alone would be split into characters
    size = backend.get_vocab_size()
    backend.enable_padding(length=50)
    backend.enable_truncation(3)
    tokenizer = Tokenizer(backend)
    # Image first, then the missing <loc> and <seg>, as transformers' processor does.
    assert tokenizer.image_id == size
    assert tokenizer.loc_ids == [size - 1, *range(size + 1, size + 1024)]
    assert tokenizer.seg_ids == list(range(size + 1024, size + 1152))
    # No <bos> from the post-processor, no padding, no truncation.
    assert tokenizer.encode("abcdef") == [4 + ord(letter) for letter in "abcdef"]
    assert tokenizer.encode("<loc0000>") == [size - 1]
    assert tokenizer.encode_prefix("a", 1).count(tokenizer.bos_id) == 1
    assert tokenizer.decode(tokenizer.encode("a<bos>b <image>")) == "a<bos>b <image>"


@pytest.mark.parametrize("which", ["<loc0000>", "<seg127>"])
def test_positions_that_a_file_marks_as_special_are_words(which: str) -> None:
    backend = build_tokenizer(TEXTS)
    index = backend.token_to_id(which)
    backend.add_special_tokens([AddedToken(which, special=True)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode(f"a{which}b")[1] == index
    assert tokenizer.decode([index]) == which


def test_specials_that_a_file_holds_as_words_only() -> None:
    state = json.loads(build_tokenizer(TEXTS).to_str())
    state["added_tokens"] = []
    tokenizer = Tokenizer(Backend.from_str(json.dumps(state)))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert tokenizer.decode([2, *tokenizer.encode("red<bos>"), 1, 0]) == "red<bos>"


@pytest.mark.parametrize("missing", ["<pad>", "<bos>", "<eos>"])
def test_a_file_without_bos_eos_or_pad_is_refused(missing: str, tmp_path: Path) -> None:
    gemma_file(leave_out=missing).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=f"has no {missing}: use the"):
        Tokenizer.from_pretrained(tmp_path)


def test_refused_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(InputError, match="is not a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


def test_files_round_trip(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "new")
    again = Tokenizer.from_pretrained(tmp_path / "new")
    assert again.vocab_size == tokenizer.vocab_size
    text = "detect red\n<loc0003> é <image>"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.backend.to_str() == tokenizer.backend.to_str()
