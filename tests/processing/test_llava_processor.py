"""LLaVA's processor: every tensor against transformers' LlavaProcessor, folders both ways, every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_backends import Kind, llama_backend, write_tokenizer
from PIL import Image
from transformers import AutoProcessor
from transformers import LlavaProcessor as Reference
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from minivlm.errors import InputError
from minivlm.processing import (
    AnswerProcessor,
    LlamaTokenizer,
    LlavaImageProcessor,
    LlavaProcessor,
    box_to_tokens,
    text_to_boxes,
)
from minivlm.processing.chat import SYSTEM, chat_template, encode_chat
from minivlm.processing.tokens import LOC_TOKENS

SIDE, PATCH, N = 28, 14, 4
SIZES = [(28, 28), (56, 56), (59, 28), (40, 30), (30, 41), (7, 90), (301, 97), (1, 1)]
PROMPTS = ["what is it?", "what color is the circle?", "<image> é </s>?"]
ANSWERS = ["a red star", "it is green", "3"]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(params=["published", "today"])
def processor(request: pytest.FixtureRequest) -> LlavaProcessor:
    tokenizer = LlamaTokenizer(llama_backend(request.param))
    return LlavaProcessor(tokenizer, LlavaImageProcessor(image_size=SIDE), PATCH)


# Pictures


@pytest.mark.parametrize("do_pad", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_the_reference_bit_for_bit(size: tuple[int, int], do_pad: bool) -> None:
    settings = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    image = noise(*size)
    pixels = LlavaImageProcessor(image_size=SIDE, do_pad=do_pad)([image])
    reference = LlavaImageProcessorPil(**settings, do_pad=do_pad)
    assert torch.equal(pixels, reference(image, return_tensors="pt")["pixel_values"])
    cropped = CLIPImageProcessorPil(**settings)(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, cropped) == (not do_pad or size[0] == size[1])


def test_the_square_is_that_of_the_original() -> None:
    """CLIP's mean color as whole numbers, the picture in the middle, above it if a pixel is left over."""
    image = Image.new("RGB", (7, 4), "red")
    square = np.asarray(LlavaImageProcessor(do_pad=True).pad(image))
    assert square.shape == (7, 7, 3)
    assert (square[[0, 5, 6]] == (122, 116, 104)).all()
    assert (square[1:5] == (255, 0, 0)).all()


def test_settings_of_pictures() -> None:
    old = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}, "crop_size": 336}
    assert LlavaImageProcessor.from_dict(old) == LlavaImageProcessor()
    new = old | {"image_processor_type": "LlavaImageProcessorFast", "do_pad": True}
    assert LlavaImageProcessor.from_dict(new) == LlavaImageProcessor(do_pad=True)
    for settings in (LlavaImageProcessor(), LlavaImageProcessor(28, do_pad=True, image_mean=(0.1, 0.2, 0.3))):
        assert LlavaImageProcessor.from_dict(settings.to_dict()) == settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor", "do_pad": True}, "do_pad is True: only False"),
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type is 'SiglipImageProcessor'"),
        ({"size": {"height": 336, "width": 336}}, "expected the same number for the short side and for the"),
        ({"size": {"shortest_edge": 224}}, "expected the same number for the short side and for the crop"),
        ({"do_center_crop": False}, "do_center_crop is False: only True is supported"),
        ({"do_normalize": False}, "do_normalize is False"),
    ],
)
def test_refused_settings_of_pictures(changes: dict[str, Any], message: str) -> None:
    values = LlavaImageProcessor().to_dict() | changes
    with pytest.raises(InputError, match=message):
        LlavaImageProcessor.from_dict(values)


def test_a_picture_too_long_for_a_square() -> None:
    with pytest.raises(InputError, match="has 20000 x 1 pixels, too many for a square: crop it to the part"):
        LlavaImageProcessor(do_pad=True)([Image.new("RGB", (20000, 1))])


# Whole batches


def theirs(folder: Path) -> Any:
    loaded = AutoProcessor.from_pretrained(folder, local_files_only=True)
    assert isinstance(loaded, Reference)
    return loaded


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_answers", [True, False])
@pytest.mark.parametrize(("do_pad", "strategy"), [(False, "default"), (True, "full")])
def test_batches_equal_the_reference(
    processor: LlavaProcessor, side: str, with_answers: bool, do_pad: bool, strategy: str, tmp_path: Path
) -> None:
    images = LlavaImageProcessor(image_size=SIDE, do_pad=do_pad)
    processor = LlavaProcessor(processor.tokenizer, images, PATCH, strategy)
    processor.save_pretrained(tmp_path)
    reference = theirs(tmp_path)
    pictures = [noise(40, 30), [noise(30, 41, 1), noise(56, 56, 2)], None]
    prompts = ["what is it?", "what differs?", "what color is the circle?"]
    chats = []
    for number, prompt in enumerate(prompts):
        content = [{"type": "image"}] * [1, 2, 0][number] + [{"type": "text", "text": prompt}]
        chats.append([{"role": "user", "content": content}])
        if with_answers:
            answer = [{"type": "text", "text": ANSWERS[number]}]
            chats[-1].append({"role": "assistant", "content": answer})
    expected = reference(
        images=[noise(40, 30), noise(30, 41, 1), noise(56, 56, 2)],
        text=[reference.apply_chat_template(chat, add_generation_prompt=not with_answers) for chat in chats],
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )
    ours = processor(pictures, prompts, ANSWERS if with_answers else None, padding_side=side)
    assert ours.keys() - {"labels"} == expected.keys()
    for name in expected:
        assert ours[name].dtype == expected[name].dtype
        assert torch.equal(ours[name], expected[name]), name
    assert ("labels" in ours) == with_answers
    tokenizer = processor.tokenizer
    assert (ours["input_ids"] == tokenizer.image_id).sum(dim=1).tolist() == [
        pictures * processor.image_seq_length for pictures in (1, 2, 0)
    ]


def test_labels_are_the_answers(processor: LlavaProcessor) -> None:
    tokenizer = processor.tokenizer
    for side in ("left", "right"):
        batch = processor([noise(9, 9)] * 3, PROMPTS, ANSWERS, padding_side=side)
        for row, answer in enumerate(ANSWERS):
            labels = batch["labels"][row]
            written = labels[labels != -100].tolist()
            assert written[-1] == tokenizer.eos_id
            assert tokenizer.decode(written) == answer
            assert torch.equal(batch["attention_mask"][row] == 0, batch["input_ids"][row] == tokenizer.pad_id)
        assert processor.decode(batch["input_ids"][:, -4:])[0].endswith("star" if side == "left" else "")


def test_chats_of_several_turns(processor: LlavaProcessor) -> None:
    turns = list(zip(PROMPTS, ANSWERS, strict=True))
    batch = processor.chat([[noise(9, 9), noise(8, 8)], None], [turns, turns[:1]])
    expected = encode_chat(processor.tokenizer, turns, N, 2)
    assert batch["input_ids"][0].tolist() == expected.ids
    assert (batch["labels"][0] != -100).tolist() == expected.written
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE)
    batch = processor.chat([noise(9, 9)], [[*turns, ("and <image>?", None)]], tags=False)
    assert "labels" not in batch
    with pytest.raises(InputError, match="hold 1 times <image>, and there are 2 pictures"):
        processor.chat([[noise(9, 9)] * 2], [[("and <image>?", None)]], tags=True)
    with pytest.raises(InputError, match="over max_length 20: shorten the text"):
        processor.chat(None, [turns], max_length=20)


def test_captions_of_the_first_stage(processor: LlavaProcessor) -> None:
    batch = processor.captions([noise(9, 9), noise(8, 8)], ["a red star", "it"])
    for row, caption in enumerate(["a red star", "it"]):
        labels = batch["labels"][row]
        assert processor.tokenizer.decode(labels[labels != -100].tolist()) == caption + "\n"
    assert (batch["input_ids"] == processor.tokenizer.image_id).sum(dim=1).tolist() == [N, N]
    for pictures in ([None, noise(8, 8)], [[noise(8, 8)] * 2, noise(8, 8)]):
        with pytest.raises(InputError, match=r"caption 1 has [02] pictures: expected one"):
            processor.captions(pictures, ["a", "b"])


def test_decoding(processor: LlavaProcessor) -> None:
    tokenizer = processor.tokenizer
    star = tokenizer.encode_after(":", " a star")
    rows = [
        [*star, tokenizer.eos_id, *star],
        [tokenizer.eos_id, *star, *star],
        [*star, *star, tokenizer.pad_id],
    ]
    assert processor.decode(torch.tensor(rows)) == ["a star", "", "a star a star"]


def test_boxes_in_a_vocabulary_that_has_words_for_them() -> None:
    tokenizer = LlamaTokenizer(llama_backend("today", tuple(LOC_TOKENS)))
    assert len(tokenizer.loc_ids) == 1024
    processor = LlavaProcessor(tokenizer, LlavaImageProcessor(image_size=SIDE), PATCH)
    text = box_to_tokens((3, 4, 20, 21), 30, 30) + " red star"
    ids = processor.encode_row("what is it?", text).ids[-8:]
    assert set(ids) & set(tokenizer.loc_ids)
    assert processor.decode(torch.tensor([ids])) == [text]
    assert text_to_boxes(text, 30, 30)[0].name == "red star"


def test_it_is_a_processor_of_a_model_that_answers(processor: LlavaProcessor) -> None:
    any_of_the_kind: AnswerProcessor = processor
    row = any_of_the_kind.encode_row("what is it?")
    assert row.ids == any_of_the_kind(noise(9, 9), "what is it?")["input_ids"][0].tolist()


# Folders


@pytest.mark.parametrize("system", [SYSTEM, ""])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_a_folder_and_back(processor: LlavaProcessor, strategy: str, system: str, tmp_path: Path) -> None:
    images = LlavaImageProcessor(image_size=SIDE, do_pad=True)
    saved = LlavaProcessor(processor.tokenizer, images, PATCH, strategy, system)
    saved.save_pretrained(tmp_path)
    again = LlavaProcessor.from_pretrained(tmp_path)
    assert (again.image_processor, again.system) == (images, system)
    assert again.image_seq_length == saved.image_seq_length == N + (strategy == "full")
    assert again.encode_row("what is it?", "a star") == saved.encode_row("what is it?", "a star")
    theirs(tmp_path).save_pretrained(tmp_path / "theirs")
    once_more = LlavaProcessor.from_pretrained(tmp_path / "theirs")
    assert (once_more.image_processor, once_more.system) == (images, system)
    assert once_more.encode_row("what is it?", "a star") == saved.encode_row("what is it?", "a star")


def write_folder(folder: Path, kind: Kind = "published") -> None:
    """As the published ones, of which the older have no patch size and keep the template elsewhere."""
    write_tokenizer(folder, kind)
    settings = {"crop_size": {"height": SIDE, "width": SIDE}, "size": {"shortest_edge": SIDE}, "resample": 3}
    settings |= {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def test_older_folders(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(InputError, match=r"processor_config.json has no patch_size: take it from the model"):
        LlavaProcessor.from_pretrained(tmp_path)
    assert LlavaProcessor.from_pretrained(tmp_path, PATCH).system == SYSTEM
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": chat_template("")}))
    assert LlavaProcessor.from_pretrained(tmp_path, PATCH).system == ""
    (tmp_path / "chat_template.jinja").write_text(chat_template())
    assert LlavaProcessor.from_pretrained(tmp_path, PATCH).system == SYSTEM


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("processor_config.json", "{", "processor_config.json cannot be read as JSON"),
        ("processor_config.json", "[]", "processor_config.json contains no settings"),
        ("processor_config.json", '{"patch_size": "x"}', "has no patch_size"),
        ("processor_config.json", '{"vision_feature_select_strategy": "cls"}', "strategy is 'cls': expected"),
        ("chat_template.jinja", "USER: ASSISTANT:", "the chat template has no place for a picture"),
        ("chat_template.jinja", "<image>", "the chat template has no answer in Vicuna's form"),
        ("preprocessor_config.json", '{"do_pad": 3}', "do_pad is 3: expected true or false"),
    ],
)
def test_refused_folders(name: str, content: str, message: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        LlavaProcessor.from_pretrained(tmp_path, PATCH)


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        ([1, 1], ["a"], "got 2 pictures for 1 prompts"),
        ([1], [" "], "prompt 1 is empty"),
        ([[1, "gone.png"]], ["a"], "gone.png: no such file"),
        ([[1, 3]], ["a"], "picture 1 is of type int"),
    ],
)
def test_refused_batches(processor: LlavaProcessor, images: Any, prompts: Any, message: str) -> None:
    def picture(value: Any) -> Any:
        return (
            noise(9, 9) if value == 1 else [picture(v) for v in value] if isinstance(value, list) else value
        )

    with pytest.raises(InputError, match=message):
        processor([picture(image) for image in images], prompts)
