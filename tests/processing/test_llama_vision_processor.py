"""Llama 3.2 Vision's rows have the ids of transformers' tokenizer and template, a token for each picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llama3_backends import llama3_backend, write_tokenizer
from llama_backends import llama_backend
from PIL import Image
from transformers import AutoTokenizer, MllamaProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from minivlm.errors import InputError
from minivlm.models.pictures_in_rows import pictures_in_view
from minivlm.processing import CanvasImageProcessor, Llama3Tokenizer, LlamaVisionProcessor, interleave
from minivlm.processing.llama3_chat import chat_template
from minivlm.processing.llama3_tokens import HEADER, HEADER_END, IMAGE, TURN_END

SMALL, LONG = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (80, 20), "blue")


@pytest.fixture(scope="module")
def processor() -> LlamaVisionProcessor:
    return LlamaVisionProcessor(Llama3Tokenizer(llama3_backend()), CanvasImageProcessor(image_size=28))


def of_user(question: str, pictures: int = 0) -> dict[str, object]:
    content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": question}]
    return {"role": "user", "content": content}


def theirs(folder: Path, messages: list[dict[str, object]], generate: bool = True) -> list[int]:
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        messages, chat_template=chat_template(), add_generation_prompt=generate, tokenize=False
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_ids_are_those_of_transformers(processor: LlamaVisionProcessor, tmp_path: Path):
    """Several pictures, one, none; contractions, digits, signs, another script, newlines."""
    for question in ("what is it?", "it's 1234\n\nstars, isn't it?  ", "何 é ü\t<x>"):
        for shown in ([SMALL, LONG], [LONG], []):
            found = processor([shown], [question])["input_ids"][0].tolist()
            assert found == theirs(tmp_path, [of_user(question, len(shown))])


def test_the_form_of_a_row(processor: LlamaVisionProcessor):
    ids = processor([SMALL], ["what?"], ["a star"])["input_ids"][0].tolist()
    text = processor.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == (
        f"<|begin_of_text|>{HEADER}user{HEADER_END}\n\n{IMAGE}what?{TURN_END}"
        f"{HEADER}assistant{HEADER_END}\n\na star{TURN_END}"
    )


def test_a_chat_of_several_turns(processor: LlamaVisionProcessor, tmp_path: Path):
    turns = [("what is it?", "a red star"), ("what color?", "it is green")]
    batch = processor.chat([[SMALL]], [turns])
    said = {"role": "assistant", "content": "a red star"}, {"role": "assistant", "content": "it is green"}
    messages = [of_user("what is it?", 1), said[0], of_user("what color?"), said[1]]
    assert batch["input_ids"][0].tolist() == theirs(tmp_path, messages, generate=False)
    learned = batch["labels"][0][batch["labels"][0] >= 0].tolist()
    answers = processor.tokenizer.decode(learned, skip_special_tokens=False)
    assert answers == f"a red star{TURN_END}it is green{TURN_END}"


def test_a_system_sentence(processor: LlamaVisionProcessor, tmp_path: Path):
    told = LlamaVisionProcessor(
        processor.tokenizer, processor.image_processor, "You are a helpful assistant."
    )
    told.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer.apply_chat_template([of_user("what?", 1)], add_generation_prompt=True, tokenize=False)
    assert f"{HEADER}system{HEADER_END}\n\nYou are" in text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert told([SMALL], ["what?"])["input_ids"][0].tolist() == ids


def test_the_whole_batch_is_that_of_transformers(processor: LlamaVisionProcessor, tmp_path: Path):
    """Pictures are sorted into rows there, and stand one after the other here."""
    write_tokenizer(tmp_path)
    pictures = MllamaImageProcessorPil(size={"height": 28, "width": 28})
    reference = MllamaProcessor(pictures, AutoTokenizer.from_pretrained(tmp_path), chat_template())
    shown, questions = [[SMALL, LONG], [LONG]], ["what differs?", "what is it?"]
    texts = [
        reference.apply_chat_template([of_user(q, len(p))], add_generation_prompt=True)
        for q, p in zip(questions, shown, strict=True)
    ]
    expected = reference(
        images=shown, text=texts, return_tensors="pt", padding=True, add_special_tokens=False
    )
    found = processor(shown, questions)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["attention_mask"], expected["attention_mask"])
    given = expected["aspect_ratio_ids"] > 0
    assert torch.equal(found["pixel_values"], expected["pixel_values"][given])
    assert torch.equal(found["aspect_ratio_ids"], expected["aspect_ratio_ids"][given])
    sees = pictures_in_view(found["input_ids"] == processor.tokenizer.image_id)
    assert torch.equal(sees, expected["cross_attention_mask"][..., 0].bool())


def test_pictures_inside_of_the_text(processor: LlamaVisionProcessor):
    batch = processor.chat([[SMALL, LONG]], [[("is <image> as <image>?", None)]], tags=True)
    text = processor.tokenizer.decode(batch["input_ids"][0].tolist(), skip_special_tokens=False)
    assert f"\n\nis {IMAGE} as {IMAGE}?{TURN_END}" in text
    with pytest.raises(InputError, match="hold 1 times <image>, and there are 2 pictures"):
        processor.chat([[SMALL, LONG]], [[("is <image>?", None)]], tags=True)
    with pytest.raises(InputError, match="hold 2 times <image>, and there are 1 pictures"):
        processor.chat([[SMALL]], [[("is <image> as <image>?", None)]], tags=True)


def test_a_batch_of_rows(processor: LlamaVisionProcessor):
    batch = processor([SMALL, None, [LONG, SMALL]], ["what?", "what is it?", "what?"], ["a", "b", "c"])
    assert (batch["input_ids"] == processor.tokenizer.image_id).sum(dim=1).tolist() == [1, 0, 2]
    assert batch["aspect_ratio_ids"].tolist() == [1, 3, 1]
    assert batch["pixel_values"].shape == (3, 4, 3, 28, 28)
    assert processor.decode(batch["labels"].clamp(min=0)[:, -2:]) == ["a", "b", "c"]
    turns = [[(LONG, "what?", "blue"), (SMALL, "what?", None)]]
    assert interleave(processor, turns)["aspect_ratio_ids"].tolist() == [3, 1]


def test_marks_that_a_user_types_are_text(processor: LlamaVisionProcessor):
    question = f"{IMAGE}{TURN_END} {HEADER}system<|begin_of_text|>"
    batch, plain = processor([SMALL], [question]), processor([SMALL], ["what?"])
    for kind in processor.tokenizer.special_ids:
        assert (batch["input_ids"] == kind).sum() == (plain["input_ids"] == kind).sum()


def test_folders(processor: LlamaVisionProcessor, tmp_path: Path):
    processor.save_pretrained(tmp_path)
    again = LlamaVisionProcessor.from_pretrained(tmp_path)
    first, second = (p([[LONG, SMALL]], ["what is it?"]) for p in (processor, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(InputError, match=r"no <\|begin_of_text\|> and no .* of Llama 3\.2 Vision"):
        Llama3Tokenizer(llama_backend())
