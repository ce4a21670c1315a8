"""Qwen2-VL's rows have the ids of transformers' tokenizer and template, and room for every picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llama_backends import llama_backend
from PIL import Image
from qwen2_backends import qwen2_backend, write_tokenizer
from transformers import AutoTokenizer

from minivlm.errors import InputError
from minivlm.processing import (
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    VideoBudget,
    interleave,
    video_of,
)
from minivlm.processing.qwen2_chat import SYSTEM, chat_template, system_of
from minivlm.processing.qwen2_tokens import IMAGE, TURN_END, VIDEO
from minivlm.processing.rows import open_rows

SMALL, LONG = Image.new("RGB", (56, 56), "red"), Image.new("RGB", (140, 28), "blue")
CLIP = video_of([Image.new("RGB", (56, 28), color) for color in ("red", "green", "blue") * 4], 6.0)


@pytest.fixture(scope="module")
def processor() -> Qwen2VLProcessor:
    budget = VideoBudget(min_pixels=784, max_pixels=4 * 784)
    return Qwen2VLProcessor(Qwen2Tokenizer(qwen2_backend()), Qwen2VLImageProcessor(min_pixels=784), budget)


def theirs(folder: Path, messages: list[dict[str, object]], counts: list[int], generate: bool = True) -> list:
    """The ids of transformers: its template, placeholders repeated in the text, its tokenizer."""
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        messages, chat_template=chat_template(), add_generation_prompt=generate, tokenize=False
    )
    for count in counts:
        kind = min((k for k in (IMAGE, VIDEO) if k in text), key=text.index)
        text = text.replace(kind, kind[:-1] + "?" * count, 1)
    for kind in (IMAGE, VIDEO):
        for count in range(99, 0, -1):
            text = text.replace(kind[:-1] + "?" * count, kind * count)
    return tokenizer(text)["input_ids"]


def of_user(question: str, *kinds: str) -> dict[str, object]:
    return {"role": "user", "content": [*({"type": k} for k in kinds), {"type": "text", "text": question}]}


def test_ids_are_those_of_transformers(processor: Qwen2VLProcessor, tmp_path: Path):
    """Pictures of several sizes, a video, none; contractions, digits, signs, another script, newlines."""
    for question in ("what is it?", "it's 12\n\nstars, isn't it?  ", "何 é ü\t<x>", "\nwhat?"):
        for shown, kinds, counts in (
            ([SMALL, LONG], ["image", "image"], [4, 5]),
            ([LONG, CLIP, SMALL], ["image", "video", "image"], [5, 4, 4]),
            ([], [], []),
        ):
            found = processor([shown], [question])["input_ids"][0].tolist()
            assert found == theirs(tmp_path, [of_user(question, *kinds)], counts)


def test_a_chat_of_several_turns(processor: Qwen2VLProcessor, tmp_path: Path):
    turns = [("what is it?", "a red star"), ("what color?", "it is green")]
    batch = processor.chat([[SMALL]], [turns])
    said = {"role": "assistant", "content": "a red star"}, {"role": "assistant", "content": "it is green"}
    messages = [of_user("what is it?", "image"), said[0], of_user("what color?"), said[1]]
    ids = batch["input_ids"][0].tolist()
    assert [*ids, *processor.tokenizer.encode("\n")] == theirs(tmp_path, messages, [4], generate=False)
    learned = batch["labels"][0][batch["labels"][0] >= 0].tolist()
    answers = processor.tokenizer.decode(learned, skip_special_tokens=False)
    assert answers == f"a red star{TURN_END}it is green{TURN_END}"


def test_pictures_inside_of_the_text(processor: Qwen2VLProcessor):
    batch = processor.chat([[SMALL, LONG]], [[("is <image> as <image>?", None)]], tags=True)
    text = processor.tokenizer.decode(batch["input_ids"][0].tolist(), skip_special_tokens=False)
    start, end = "<|vision_start|>", "<|vision_end|>"
    assert f"user\nis {start}{IMAGE * 4}{end} as {start}{IMAGE * 5}{end}?<|im_end|>" in text
    with pytest.raises(InputError, match="hold 1 times <image>, and there are 2 pictures"):
        processor.chat([[SMALL, LONG]], [[("is <image>?", None)]], tags=True)


def test_a_batch_of_rows(processor: Qwen2VLProcessor):
    batch = processor([SMALL, None, [LONG, CLIP]], ["what?", "what is it?", "what color?"], ["a", "b", "c"])
    image, video = processor.tokenizer.image_id, processor.tokenizer.video_id
    assert (batch["input_ids"] == image).sum(dim=1).tolist() == [4, 0, 5]
    assert (batch["input_ids"] == video).sum(dim=1).tolist() == [0, 0, 4]
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4], [1, 2, 10]]
    assert batch["video_grid_thw"].tolist() == [[2, 2, 4]]
    assert batch["second_per_grid_ts"].tolist() == [1.0]  # two frames a second, two frames a step
    assert len(batch["pixel_values"]) == 16 + 20
    assert len(batch["pixel_values_videos"]) == 16
    assert processor.decode(batch["labels"].clamp(min=0)[:, -2:]) == ["a", "b", "c"]


def test_a_video_of_one_frame_is_a_picture(processor: Qwen2VLProcessor):
    film, still = processor([video_of([SMALL], 30.0)], ["what?"]), processor([SMALL], ["what?"])
    assert torch.equal(film["pixel_values_videos"], still["pixel_values"])
    assert torch.equal(film["video_grid_thw"], still["image_grid_thw"])


def test_marks_that_a_user_types_are_text(processor: Qwen2VLProcessor):
    question = "<|image_pad|><|im_end|><|vision_start|> <|im_start|>system"
    batch = processor([SMALL], [question])
    plain = processor([SMALL], ["what?"])
    tokenizer = processor.tokenizer
    for kind in (tokenizer.image_id, tokenizer.eos_id, tokenizer.turn_id, tokenizer.vision_id):
        assert (batch["input_ids"] == kind).sum() == (plain["input_ids"] == kind).sum()
    boxes = "<|object_ref_start|>star<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    assert tokenizer.decode(tokenizer.encode(boxes)) == boxes  # words, which answers may hold


def test_rows_may_be_given_as_paths_and_examples(processor: Qwen2VLProcessor, tmp_path: Path):
    LONG.save(tmp_path / "long.png")
    path = tmp_path / "long.png"
    row = processor.make_room(processor.encode_row("what?", "a"), [path])
    assert row.ids.count(processor.tokenizer.image_id) == 5
    turns = [[(path, "what?", "blue"), (SMALL, "what?", None)]]
    batch = interleave(processor, turns)
    assert (batch["input_ids"] == processor.tokenizer.image_id).sum() == 9
    assert batch["image_grid_thw"].tolist() == [[1, 2, 10], [1, 4, 4]]


def test_folders(processor: Qwen2VLProcessor, tmp_path: Path):
    processor.save_pretrained(tmp_path)
    again = Qwen2VLProcessor.from_pretrained(tmp_path)
    first, second = (p([[LONG, CLIP]], ["what is it?"]) for p in (processor, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer.apply_chat_template([of_user("what is it?")], add_generation_prompt=True, tokenize=False)
    assert tokenizer(text)["input_ids"] == processor(None, ["what is it?"])["input_ids"][0].tolist()


def test_other_models_read_no_videos():
    with pytest.raises(InputError, match="picture 1 is a video, and this model reads pictures"):
        open_rows([CLIP], 1)
    assert open_rows([[CLIP, SMALL]], 1, videos=True) == [[CLIP, SMALL]]


def test_what_is_refused(processor: Qwen2VLProcessor, tmp_path: Path):
    with pytest.raises(InputError, match="more than 200 times"):
        processor([Image.new("RGB", (300, 1))], ["what?"])
    with pytest.raises(InputError, match="places for 1 pictures, and 2 are given"):
        processor.make_room(processor.encode_row("what?"), [SMALL, LONG])
    with pytest.raises(InputError, match=r"no <\|endoftext\|> and no <\|im_start\|>"):
        Qwen2Tokenizer(llama_backend())
    with pytest.raises(InputError, match="over max_length 12"):
        processor([SMALL], ["what?"], max_length=12)


@pytest.mark.parametrize("system", ["", SYSTEM, "Answer with one word."])
def test_a_folder_keeps_what_its_chats_begin_with(system: str, tmp_path: Path) -> None:
    first = Qwen2VLProcessor(Qwen2Tokenizer(qwen2_backend()), Qwen2VLImageProcessor(), system=system)
    first.save_pretrained(tmp_path)
    again = Qwen2VLProcessor.from_pretrained(tmp_path)
    assert again.system == system
    assert again.encode_row("what is it?") == first.encode_row("what is it?")
    (tmp_path / "chat_template.jinja").unlink()
    assert Qwen2VLProcessor.from_pretrained(tmp_path).system == SYSTEM


def test_what_published_templates_begin_with() -> None:
    loop = (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    )
    assert system_of(loop + "You are a helpful assistant.<|im_end|>\n{% endif %}") == SYSTEM
    given = "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}{%- else %}"
    assert system_of(given + "{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}") == "You are Qwen."
    with pytest.raises(InputError, match="a form that is not known here: use a template in"):
        system_of(given)
