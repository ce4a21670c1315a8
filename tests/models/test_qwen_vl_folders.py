"""Qwen-VL from a folder: opened, saved, asked, looked into and tuned, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_equal, difference
from PIL import Image
from qwen_vl import edit, ranks, write_qwen_vl
from rounded import put_rounded_weights
from safetensors.torch import load_file, save_file

import minivlm
from minivlm import InputError, QwenVL, QwenVLProcessor
from minivlm.attention import record_attention
from minivlm.checkpoints.hub import GENERATION
from minivlm.checkpoints.weights import WEIGHTS
from minivlm.cli import main
from minivlm.cli.pictures import draw_answers
from minivlm.evaluation.answers import _places
from minivlm.looking import draw_masks
from minivlm.looking.inspection import inspect_answer
from minivlm.looking.measures import attention_rollout
from minivlm.models.load import kind_of
from minivlm.processing import Box, Mask, box_to_tokens
from minivlm.processing.qwen_tokens import VOCABULARY, ChatFormat, QwenTokenizer


def noise(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = [noise(0), [noise(1), noise(2, 30, 41)], None]  # of three rows
QUESTIONS = ["what is it?", "what is <ref>red</ref>?", "is it a star?"]


@pytest.fixture(scope="module", params=["chatml", "raw"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    chat_format: ChatFormat = request.param
    return write_qwen_vl(tmp_path_factory.mktemp(chat_format), chat_format)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return write_qwen_vl(tmp_path / "model")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise(0).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


# One forward, three views


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_full_cached_and_padded_agree(folder: Path, side: str) -> None:
    """Rows with one picture, with two and without, of which the second is beyond the length of training."""
    model, processor = minivlm.load(folder)
    assert (type(processor), isinstance(model, QwenVL)) == (QwenVLProcessor, True)
    questions = [QUESTIONS[0], "red star " * 30, QUESTIONS[2]]
    answers = ["a red star", "it is green", "red"]
    alone = [processor([PICTURES[row]], questions[row], answers[row]) for row in range(3)]
    expected = [model(**batch).logits[0] for batch in alone]
    batch = processor(PICTURES, questions, answers, padding_side=side)
    logits = model(**batch).logits
    for row in range(3):
        assert_equal(logits[row, batch["attention_mask"][row].bool()], expected[row])

    hidden, cache = model.prefill(**processor(PICTURES, questions, padding_side=side))
    lengths = [int((batch["labels"] == -100).sum()) for batch in alone]
    ends = [batch["input_ids"].shape[1] - 1 for batch in alone]
    S = model.config.text.seq_length
    assert [length > S for length in lengths] == [end >= S for end in ends]  # the same angles
    for step in range(max(end - start for start, end in zip(lengths, ends, strict=True)) + 1):
        scores = model.logits(hidden)
        for row in range(3):
            if lengths[row] + step <= ends[row]:
                assert_equal(scores[row], expected[row][lengths[row] - 1 + step])
        unfinished = torch.tensor([lengths[row] + step < ends[row] for row in range(3)])
        places = [min(lengths[row] + step, ends[row]) for row in range(3)]
        tokens = torch.stack([alone[row]["input_ids"][0, places[row]] for row in range(3)])
        if unfinished.any():
            hidden = model.decode(tokens, unfinished, cache)


@torch.no_grad()
def test_answers_of_a_batch_are_those_of_its_rows_and_the_picture_counts(folder: Path) -> None:
    model, processor = minivlm.load(folder)
    together = model.generate(**processor(PICTURES, QUESTIONS), max_new_tokens=8)
    for row in range(3):
        single = model.generate(**processor([PICTURES[row]], QUESTIONS[row]), max_new_tokens=8)
        assert torch.equal(together[row, : single.shape[1]], single[0])
    before, after = (
        model(**processor(pictures, QUESTIONS)).logits[:, -1]
        for pictures in (PICTURES, [noise(7), [noise(1), noise(8)], None])
    )
    assert [difference(a, b) > 1e-3 for a, b in zip(after, before, strict=True)] == [True, True, False]


@pytest.mark.parametrize("chat_format", ["chatml", "raw"])
def test_where_an_answer_ends(tmp_path: Path, chat_format: ChatFormat) -> None:
    """In a chat at the marks of a turn; `<|endoftext|>` ends every answer."""
    model, processor = minivlm.load(write_qwen_vl(tmp_path, chat_format))
    tokenizer, batch = processor.tokenizer, processor(noise(0), "what is it?")
    for token in (tokenizer.pad_id, tokenizer.turn_start_id, tokenizer.turn_end_id):
        scores = torch.eye(tokenizer.vocab_size)[token]  # it writes this token again and again
        model.logits = lambda hidden, scores=scores: scores.expand(len(hidden), -1)
        is_end = token == tokenizer.pad_id or chat_format == "chatml"
        assert model.generate(**batch, max_new_tokens=3).shape[1] == (1 if is_end else 3)


@torch.no_grad()
def test_types_of_tokens_change_nothing(folder: Path) -> None:
    model, processor = minivlm.load(folder)
    batch = processor(PICTURES, QUESTIONS, ["red", "star", "it"])
    types = (batch["labels"] != -100).long()
    assert torch.equal(model(**batch, token_type_ids=types).logits, model(**batch).logits)


# Folders


@torch.no_grad()
def test_saved_and_opened_again(folder: Path, tmp_path: Path) -> None:
    model, processor = minivlm.load(folder)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    names = {"config.json", GENERATION, WEIGHTS, VOCABULARY, "tokenizer_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    again, same = minivlm.load(tmp_path)
    assert again.config == model.config
    batch = same(PICTURES, QUESTIONS)
    expected = processor(PICTURES, QUESTIONS)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert torch.equal(again(**batch).logits, model(**expected).logits)
    generation = json.loads((tmp_path / GENERATION).read_text())
    assert generation["chat_format"] == model.config.chat_format
    assert generation["eos_token_id"] == generation["pad_token_id"] == processor.tokenizer.pad_id


def test_ids_that_only_the_published_file_has(copied: Path) -> None:
    """There, generation_config.json has those of pad and end, beside the form of prompts."""
    edit(copied / "config.json", pad_token_id=None, eos_token_id=None)
    (copied / GENERATION).write_text(
        json.dumps({"chat_format": "raw", "eos_token_id": 7, "pad_token_id": 8, "top_p": 0.5})
    )
    model, _ = minivlm.load(copied)
    assert (model.config.eos_token_id, model.config.pad_token_id, model.config.chat_format) == (7, 8, "raw")


def test_a_folder_of_qwen_without_pictures(copied: Path) -> None:
    edit(copied / "config.json", visual=None)
    with pytest.raises(InputError, match=r"of Qwen without pictures .* only Qwen-VL and Qwen-VL-Chat"):
        minivlm.load(copied)


def test_files_that_do_not_match(copied: Path) -> None:
    edit(copied / "config.json", "visual", image_start_id=300)
    with pytest.raises(InputError, match=r"the id of <img> is 300 in config.json and \d+ in qwen.tiktoken"):
        minivlm.load(copied)


def test_weights_are_read_strictly(copied: Path) -> None:
    tensors = load_file(copied / WEIGHTS)
    changed = {**tensors, "transformer.visual.extra": torch.zeros(1)}
    del changed["transformer.h.1.attn.c_attn.bias"]
    name = "transformer.visual.transformer.resblocks.0.attn.in_proj.weight"
    changed[name] = changed[name][:-1]
    save_file(changed, copied / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InputError) as error:
        minivlm.load(copied)
    for part in (
        "1 missing: transformer.h.1.attn.c_attn.bias",
        "1 unexpected: transformer.visual.extra",
        f"{name} is [47, 16], expected [48, 16]",
    ):
        assert part in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_rounded_weights(copied: Path, picture: Path, bits: str) -> None:
    """The model is the one with rounded weights, and biases as they were."""
    (rounded, processor), (model, _) = minivlm.load(copied, quantize=bits), minivlm.load(copied)
    put_rounded_weights(rounded, model)
    inputs = processor([picture], ["what is it?"])
    one, other = (each.logits(each.prefill(**inputs)[0]) for each in (rounded, model))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# Commands


def test_the_commands(
    copied: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kind_of(copied) == "answers"
    model, processor = minivlm.load(copied)
    batch = processor([picture], ["what is it?"])
    answer = processor.decode(model.generate(**batch, max_new_tokens=4))[0]
    given = ["--prompt", "what is it?", "--max-new-tokens", "4", "--model", str(copied)]
    assert main(["ask", str(picture), *given]) == 0
    assert capsys.readouterr().out == f"{picture} | what is it?\n{answer}\n"
    assert main(["look", str(picture), *given, "--out", str(tmp_path / "look")]) == 0
    assert "no words.png: 4 image tokens of no place" in capsys.readouterr().out
    assert len(list((tmp_path / "look").iterdir())) == 8
    evaluate = ["eval", "--scenes", "1", "--columns", "held_out", "--json", "--model", str(copied)]
    assert main(evaluate) == 0
    assert main(["ask", str(picture), *given[:1], "where is <ref>it?", *given[2:]]) == 2
    assert "<ref> does not close" in capsys.readouterr().err


def test_boxes_in_answers_are_drawn() -> None:
    image = Image.new("RGB", (40, 20))
    answer = "here <ref>it</ref><box>(0,0),(500,500)</box>"
    nothing = np.zeros((20, 40), dtype=np.bool_)
    expected = draw_masks(image, [Mask(Box(0, 0, 20, 10, "it"), nothing)])
    assert draw_answers(image, [answer]).tobytes() == expected.tobytes() != image.tobytes()


def test_the_place_of_a_box_that_is_no_word() -> None:
    """Digits are pieces of their own; a piece may begin with a space, or go over the end of a box."""
    pieces = [*ranks(), b" <", b"><"]
    tokenizer = QwenTokenizer({piece: rank for rank, piece in enumerate(pieces)})
    boxes = [box_to_tokens(box, 1, 1) for box in ((0, 0, 0.5, 0.5), (0.2, 0.2, 1, 1))]
    answer = f"{boxes[0]} star ; {boxes[1]} star"
    for text in (answer, f" {answer}"):
        ids = [-100, -100, *tokenizer.encode(text), tokenizer.eos_id]
        places = list(_places(tokenizer, ids, boxes))
        assert [tokenizer.decode(ids[place]).strip() for place in places] == boxes
    ids = [-100, *tokenizer.encode(f"{boxes[0]}<seg001>")]
    assert list(_places(tokenizer, ids, boxes[:1])) == [slice(1, len(ids))]


def test_finetuning(copied: Path, picture: Path, tmp_path: Path) -> None:
    lines = [
        {"image": picture.name, "prefix": "what is it?", "suffix": "a red star"},
        {"image": picture.name, "prefix": "where is <ref>it</ref>?", "suffix": "<box>(1,2),(3,4)</box>"},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "tuned"
    arguments = ["--data", str(data), "--model", str(copied), "--out", str(out), "--steps", "2", "--no-bf16"]
    frozen = ["--freeze", "tower", "--freeze", "decoder"]
    assert main(["finetune", *arguments, *frozen, "--workers", "0", "--lr", "0.1"]) == 0
    before, after = (load_file(place / WEIGHTS) for place in (copied, out))
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    resampler = {name for name in after if "attn_pool" in name or name.endswith((".proj", "ln_post.weight"))}
    assert "transformer.visual.attn_pool.query" in changed
    assert "transformer.visual.attn_pool.pos_embed" not in changed  # fixed
    assert changed <= resampler | {"transformer.visual.ln_post.bias"}
    assert isinstance(minivlm.load(out)[0], QwenVL)


# The inside


def test_the_inside(copied: Path) -> None:
    """A word looks at image tokens, and these, in the resampler, at patches: the product of both."""
    model, processor = minivlm.load(copied)
    seen = inspect_answer(model, processor, noise(0), "what is it?", max_new_tokens=5)
    words, layers, patches = len(seen.words), 2, 16
    assert seen.tower is not None
    assert seen.attention is not None
    assert seen.rollout is not None
    assert seen.image_tokens is not None
    assert seen.tower.shape == (layers, 2, patches, patches)
    assert seen.attention.shape == (words, layers, 4, patches)
    assert seen.rollout.shape == (words, patches)
    assert seen.image_tokens.shape == (4, 128)

    pixels = processor.image_processor([noise(0)])
    with torch.no_grad(), record_attention() as maps:
        model.encode_image(pixels)
    row = processor.encode_row("what is it?").ids
    answer = model.generate(**processor(noise(0), "what is it?"), max_new_tokens=5)[0].tolist()
    ids = torch.tensor([row + answer])[:, : len(row) + words]
    with torch.no_grad(), record_attention() as both:
        model(ids, pixels)
    reading, is_place = both[len(maps) :], model.is_place(ids)[0]
    asked = maps[-1][0].mean(dim=0)
    expected = torch.stack([layer[0, :, len(row) - 1 : -1][..., is_place] @ asked for layer in reading])
    torch.testing.assert_close(seen.attention, expected.permute(2, 0, 1, 3))
    rollout = attention_rollout(reading)[0, len(row) - 1 : -1][:, is_place] @ asked
    torch.testing.assert_close(seen.rollout, rollout @ attention_rollout(maps[:-1])[0])


def test_hiding_patches_changes_the_answer(copied: Path) -> None:
    model, processor = minivlm.load(copied)
    seen = inspect_answer(model, processor, noise(0), "what is it?", max_new_tokens=3)
    pictures = torch.stack([seen.pixel_values, torch.zeros_like(seen.pixel_values)])
    assert seen.sureness(pictures).diff().abs() > 1e-3


@torch.no_grad()
def test_bf16_keeps_its_dtype_and_stays_near(copied: Path) -> None:
    half, processor = minivlm.load(copied, dtype=torch.bfloat16)
    plain, _ = minivlm.load(copied)
    batch = processor(PICTURES, QUESTIONS)
    hidden, cache = half.prefill(**batch)
    assert hidden.dtype == cache.keys[0].dtype == torch.bfloat16
    real = batch["attention_mask"].bool()
    assert difference(half(**batch).logits[real].float(), plain(**batch).logits[real]) < 0.2
