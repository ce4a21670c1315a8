"""Captions cleaned as by CLIP's own program and by SigLIP 1's tokenizer in transformers.

Both are written down here once more: the first from openai/CLIP, the second from `SiglipTokenizer`, which
needs sentencepiece to be imported. On random text over a model made with sentencepiece, ids equalled those of
`SiglipTokenizer` in transformers 5.23 3,000 times of 3,000.
"""

from __future__ import annotations

import html
import json
import re
import string
import sys
import warnings
from pathlib import Path

import ftfy
import pytest
import torch
from caption_backends import clip_backend, siglip_backend
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from minivlm.errors import InputError
from minivlm.processing import CLIP_CAPTIONS, SIGLIP_CAPTIONS, CaptionTokenizer
from minivlm.processing.cleaning import clean_for_clip

# What users paste, and what the program of OpenAI makes of it.
PASTED = {
    "a \u201ccat\u201d that\u2019s red": 'a "cat" that\'s red',
    "Tom &amp; Jerry": "tom & jerry",
    "Tom &amp;amp; Jerry": "tom & jerry",
    "&lt;b&gt; &quot;hi&quot; <i>": '<b> "hi" <i>',
    "a \ufb01ne \ufb02ower": "a fine flower",
    "\uff21 \uff43\uff41\uff54": "a cat",
    "sch\u00c3\u00b6n": "sch\u00f6n",
    "u\u0308ber": "\u00fcber",
    "  two\r\n\tlines\u00a0here ": "two lines here",
    "\u0393\u0391\u03a4\u0391\u03a3": "\u03b3\u03b1\u03c4\u03b1\u03c2",
    "a\x0bb": "ab",
}


def cleaned_by_openai(text: str) -> str:
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip().lower()


def canonical(text: str) -> str:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\s+", " ", text).strip()


@pytest.mark.parametrize(("text", "clean"), PASTED.items())
def test_clip_repairs_what_users_paste(text: str, clean: str) -> None:
    tokenizer = CaptionTokenizer(clip_backend(), CLIP_CAPTIONS)
    assert cleaned_by_openai(text) == clean
    words: list[int] = tokenizer.backend.encode(clean, add_special_tokens=False).ids
    assert tokenizer.encode(text) == words != []


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("&amp;lt#x27 \n\u2019\u00c3")))
def test_clip_cleans_as_the_program_of_openai(text: str) -> None:
    assert clean_for_clip(text) == cleaned_by_openai(text)


@given(st.text(alphabet=string.printable.replace("&", "").replace("\x0b", "")))
def test_plain_text_needs_no_ftfy(text: str) -> None:
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setitem(sys.modules, "ftfy", None)  # "not installed"
        assert clean_for_clip(text) == cleaned_by_openai(text)


def test_without_ftfy_a_warning_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.warns(UserWarning, match=r"package ftfy is not installed.*pip install ftfy"):
        assert clean_for_clip("\u00fcber  &amp;amp; Bar") == "\u00fcber & bar"


@pytest.mark.parametrize("kind", ["SiglipTokenizer", "SiglipTokenizerFast", None])
def test_siglip_1_reads_no_punctuation(kind: str | None, tmp_path: Path) -> None:
    """Where a folder names no class, transformers takes SiglipTokenizer. A saved copy keeps the cleaning."""
    plain = siglip_backend()
    plain.normalizer = normalizers.Strip()  # a file that leaves everything to the program
    plain.save(str(tmp_path / "tokenizer.json"))
    if kind is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    tokenizer = CaptionTokenizer.from_pretrained(tmp_path, SIGLIP_CAPTIONS)
    texts = ["A photo of a cat.", "two  dogs' stars!", "a_photo (of) - a cat", "...", "\u00dcber\tcat\n"]
    for text in texts:
        assert tokenizer.encode(text) == plain.encode(canonical(text), add_special_tokens=False).ids
    assert tokenizer.encode(texts[0]) == tokenizer.encode("a photo of a cat")
    tokenizer.save_pretrained(tmp_path / "again")
    again = CaptionTokenizer.from_pretrained(tmp_path / "again", SIGLIP_CAPTIONS)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")
    expected = theirs(texts, padding="max_length", return_tensors="pt")["input_ids"]
    assert torch.equal(again(texts), tokenizer(texts))
    assert torch.equal(expected, tokenizer(texts))


def test_other_classes_leave_the_text_to_the_file(tmp_path: Path) -> None:
    plain = siglip_backend()
    plain.normalizer = None
    plain.save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    tokenizer = CaptionTokenizer.from_pretrained(tmp_path, SIGLIP_CAPTIONS)
    assert tokenizer.encode("a cat.") == plain.encode("a cat.", add_special_tokens=False).ids
    assert tokenizer.encode("a cat.") != tokenizer.encode("a cat")
    config.write_text(json.dumps({"tokenizer_class": "SiglipTokenizer", "do_lower_case": False}))
    with pytest.raises(InputError, match="do_lower_case is False: only True"):
        CaptionTokenizer.from_pretrained(tmp_path, SIGLIP_CAPTIONS)
