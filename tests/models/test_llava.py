"""LLaVA from a folder: answers as transformers gives them, every command, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_equal, difference
from llama_backends import Kind
from llava import QUESTIONS, SIDE, SIGLIP, write_llava
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

import minivlm
from minivlm import InputError, Llava, LlavaProcessor
from minivlm.attention import record_attention
from minivlm.checkpoints.hub import GENERATION
from minivlm.checkpoints.weights import WEIGHTS
from minivlm.cli import main
from minivlm.looking.inspection import inspect_answer
from minivlm.looking.measures import attention_rollout
from minivlm.models.answering import AnswerStream
from minivlm.models.load import kind_of
from minivlm.speed import speed_up
from minivlm.speed.int8 import Int8Linear
from minivlm.speed.pieces import SwiGLUInPieces


def noise(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


STRATEGIES = [{"vision_feature_select_strategy": strategy} for strategy in ("default", "full")]
PICTURES = [noise(0), [noise(1), noise(2, 30, 41)], None]  # of three rows
ALL = [noise(0), noise(1), noise(2, 30, 41)]


@pytest.fixture(scope="module", params=["published", "today"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind: Kind = request.param
    return write_llava(tmp_path_factory.mktemp(kind), kind)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return write_llava(tmp_path)


def edit(path: Path, part: str | None = None, **values: Any) -> None:
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(values)
    path.write_text(json.dumps(config))


def theirs(folder: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()


def their_batch(folder: Path) -> Any:
    """The three rows, by transformers alone."""
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    texts = []
    for number, question in enumerate(QUESTIONS):
        content = [{"type": "image"}] * [1, 2, 0][number] + [{"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
    return processor(images=ALL, text=texts, padding=True, padding_side="left", return_tensors="pt")


def test_answers_are_those_of_transformers(folder: Path) -> None:
    """Folder, pictures, chats, padding, greedy answers: nothing of one side helps the other."""
    model, processor = minivlm.load(folder)
    assert (type(processor), isinstance(model, Llava)) == (LlavaProcessor, True)
    batch = processor(PICTURES, QUESTIONS)
    expected = their_batch(folder)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    written = theirs(folder).generate(**expected, max_new_tokens=12, do_sample=False)
    written = written[:, expected["input_ids"].shape[1] :]
    ours = model.generate(**batch, max_new_tokens=12)
    assert torch.equal(ours, written)
    assert len({tuple(row) for row in ours.tolist()}) == 3
    others = processor([noise(7), [noise(1), noise(8)], None], QUESTIONS)
    changed = model.generate(**others, max_new_tokens=12)
    assert [torch.equal(*rows) for rows in zip(ours, changed, strict=True)] == [False, False, True]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_full_cached_and_padded_agree(folder: Path, side: str) -> None:
    """Rows with one picture, with two and without: alone, in a batch, and token by token."""
    model, processor = minivlm.load(folder)
    answers = ["a red star", "it is green", "3 stars."]
    alone = [processor([PICTURES[row]], QUESTIONS[row], answers[row]) for row in range(3)]
    expected = [model(**batch).logits[0] for batch in alone]
    batch = processor(PICTURES, QUESTIONS, answers, padding_side=side)
    logits = model(**batch).logits
    for row in range(3):
        assert_equal(logits[row, batch["attention_mask"][row].bool()], expected[row])

    hidden, cache = model.prefill(**processor(PICTURES, QUESTIONS, padding_side=side))
    lengths = [int((batch["labels"] == -100).sum()) for batch in alone]
    ends = [batch["input_ids"].shape[1] - 1 for batch in alone]
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
def test_types_of_tokens_change_nothing(folder: Path) -> None:
    """Commands pass them to every model that answers; this one reads everything from left to right."""
    model, processor = minivlm.load(folder)
    batch = processor(PICTURES, QUESTIONS, ["a", "b", "c"])
    types = (batch["labels"] != -100).long()
    assert torch.equal(model(**batch, token_type_ids=types).logits, model(**batch).logits)


def test_a_tower_without_a_class_token(copied: Path, tmp_path: Path) -> None:
    """Nothing is taken off its tokens, and the file says so."""
    model, processor = minivlm.load(write_llava(tmp_path / "siglip", **SIGLIP))
    assert model.encode_image(processor.image_processor([noise(0)])).shape[1] == 4
    assert processor.image_seq_length == model.config.num_image_tokens == 4
    edit(tmp_path / "siglip" / "config.json", vision_feature_select_strategy="default")
    with pytest.raises(InputError, match="takes off the class token, and SigLIP's tower has none"):
        minivlm.load(tmp_path / "siglip")
    edit(copied / "processor_config.json", num_additional_image_tokens=2)
    with pytest.raises(InputError, match=r"num_additional_image_tokens is 2 in .*: expected 1"):
        minivlm.load(copied)


@torch.no_grad()
@pytest.mark.parametrize("changes", [*STRATEGIES, SIGLIP], ids=["default", "full", "siglip"])
def test_ours_and_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Saved by us, opened by transformers: the same tensors and the same answers."""
    model, processor = minivlm.load(write_llava(tmp_path / "theirs", "today", **changes))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "ours")
    expected = their_batch(tmp_path / "ours")
    batch = processor(PICTURES, QUESTIONS)
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    logits = theirs(tmp_path / "ours")(**expected).logits[batch["attention_mask"].bool()]
    assert_equal(model(**batch).logits[batch["attention_mask"].bool()], logits)
    again, same = minivlm.load(tmp_path / "ours")
    assert torch.equal(again.generate(**same(PICTURES, QUESTIONS)), model.generate(**batch))


# Folders as other programs write them


@torch.no_grad()
@pytest.mark.parametrize("top", [True, False, None])
@pytest.mark.parametrize("text", [True, False, None])
@pytest.mark.parametrize("stored", ["table", "both", "different"])
def test_the_tied_head(copied: Path, top: bool | None, text: bool | None, stored: str) -> None:
    config = json.loads((copied / "config.json").read_text())
    for values, tied in ((config, top), (config["text_config"], text)):
        values.pop("tie_word_embeddings", None)
        values |= {} if tied is None else {"tie_word_embeddings": tied}
    (copied / "config.json").write_text(json.dumps(config))
    tensors = load_file(copied / WEIGHTS)
    head, table = (
        next(name for name in tensors if end in name) for end in ("lm_head.weight", "embed_tokens.weight")
    )
    if stored == "both":
        tensors[head] = tensors[table].clone()
    if stored == "table":
        del tensors[head]
    save_file(tensors, copied / WEIGHTS, metadata={"format": "pt"})
    if stored == "table" and not (top or text):  # transformers makes up a random head
        with pytest.raises(InputError, match=r"1 missing: language_model.lm_head.weight"):
            minivlm.load(copied)
        return
    model, processor = minivlm.load(copied)
    batch = processor(PICTURES, QUESTIONS)
    real = batch["attention_mask"].bool()
    assert_equal(model(**batch).logits[real], theirs(copied)(**batch).logits[real])


@pytest.mark.parametrize("place", ["text_config", "config.json", GENERATION])
def test_generation_stops_where_transformers_stops(tmp_path: Path, place: str) -> None:
    folder = write_llava(tmp_path, seed=3)
    processor = minivlm.load(folder)[1]
    one = processor([noise(0)], QUESTIONS[:1])
    free = theirs(folder).generate(**one, max_new_tokens=12, do_sample=False, eos_token_id=None)
    words = free[0, one["input_ids"].shape[1] :].tolist()
    ends = [119, words[5]]
    nothing = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    edit(folder / "config.json", **nothing)
    edit(folder / "config.json", "text_config", **nothing)
    if place == GENERATION:
        edit(folder / "config.json", eos_token_id=words[0])
        (folder / GENERATION).write_text(json.dumps({"eos_token_id": ends, "pad_token_id": 0}))
    else:
        (folder / GENERATION).unlink()
        part = "text_config" if place == "text_config" else None
        edit(folder / "config.json", part, eos_token_id=ends, pad_token_id=0)
    expected = theirs(folder).generate(**one, max_new_tokens=12, do_sample=False)
    expected = expected[:, one["input_ids"].shape[1] :]
    assert expected.shape[1] <= 6
    assert torch.equal(minivlm.load(folder)[0].generate(**one, max_new_tokens=12), expected)


def test_an_older_folder(copied: Path) -> None:
    """The settings of its processor say less, and some stand in other files."""
    settings = json.loads((copied / "processor_config.json").read_text())
    (copied / "processor_config.json").unlink()
    pictures = settings["image_processor"] | {"image_processor_type": "CLIPImageProcessor"}
    (copied / "preprocessor_config.json").write_text(json.dumps(pictures))
    model, processor = minivlm.load(copied)
    assert torch.equal(model.generate(**processor(PICTURES, QUESTIONS)), _generated(copied))


def _generated(folder: Path) -> Tensor:
    batch = LlavaProcessor.from_pretrained(folder, 14)(PICTURES, QUESTIONS)
    written: Tensor = theirs(folder).generate(**batch, max_new_tokens=64, do_sample=False)
    return written[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("config.json", {"image_token_index": 7}, "the id of <image> is 7 in config.json and"),
        ("config.json", {"vision_feature_layer": -5}, "a tower of 3 layers has -4 to 3"),
        ("config.json", {"vision_feature_layer": [-2, -1]}, "vision_feature_layer is"),
        ("config.json", {"projector_hidden_act": "relu"}, "projector_hidden_act = 'relu'; only 'gelu'"),
        ("config.json", {"multimodal_projector_bias": False}, "multimodal_projector_bias = False; only True"),
        ("config.json", {"mm_projector_type": "linear"}, "mm_projector_type = 'linear'; only 'mlp2x_gelu'"),
        ("config.json", {"vision_feature_select_strategy": "full"}, "image tokens is 5 in config.json and 4"),
        ("processor_config.json", {"patch_size": 7}, "the number of image tokens is 4 in config.json and 16"),
        ("text", {"vocab_size": 300}, "has the id .* but the model knows only 300 tokens"),
        ("vision", {"image_size": 56}, "the picture's side is 56 in config.json and 28 in preprocessor"),
    ],
)
def test_files_that_do_not_fit(copied: Path, name: str, values: dict[str, Any], message: str) -> None:
    part = f"{name}_config" if name in ("text", "vision") else None
    edit(copied / ("config.json" if part else name), part, **values)
    if "image_token_index" in values:
        edit(copied / "config.json", image_token_id=7)
    with pytest.raises(InputError, match=message):
        minivlm.load(copied)


def test_a_template_of_another_form(copied: Path) -> None:
    (copied / "chat_template.jinja").write_text("USER: ASSISTANT:")
    with pytest.raises(InputError, match="the chat template has no place for a picture"):
        minivlm.load(copied)


def test_a_prompt_longer_than_the_context(copied: Path) -> None:
    model, processor = minivlm.load(copied)
    with pytest.raises(InputError, match=r"model's context of 256: shorten the prompt"):
        model.generate(**processor([noise(0)], "red " * 300))


# Speed


@torch.no_grad()
def test_fast_and_plain_agree(copied: Path) -> None:
    """`load` has replaced the MLPs: the last one of a prompt sees one token a row."""
    fast, processor = minivlm.load(copied)
    plain = Llava.from_pretrained(copied)
    assert any(isinstance(module, SwiGLUInPieces) for module in fast.modules())
    again = speed_up(copy.deepcopy(plain))
    assert [type(m).__name__ for m in again.modules()] == [type(m).__name__ for m in fast.modules()]
    tokens: list[int] = []
    for layer in fast.language_model.layers:
        layer.mlp.gate_proj.register_forward_hook(
            lambda _m, inputs, _o: tokens.append(inputs[0].shape[:-1].numel())
        )
    for side in ("left", "right"):
        batch = processor(PICTURES, QUESTIONS, padding_side=side)
        (expected, cache), (found, own_cache) = plain.prefill(**batch), fast.prefill(**batch)
        assert tokens == [batch["input_ids"].numel(), 3]
        assert_equal(found, expected)
        step = torch.tensor([5, 6, 7]), torch.ones(3, dtype=torch.bool)
        assert_equal(fast.decode(*step, own_cache), plain.decode(*step, cache))
        tokens.clear()


@torch.no_grad()
def test_int8(copied: Path) -> None:
    model, processor = minivlm.load(copied, quantize="int8")
    plain, _ = minivlm.load(copied)
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == 7 * 2 + 1
    batch = processor(PICTURES, QUESTIONS)
    assert 1e-4 < difference(model(**batch).logits, plain(**batch).logits) < 0.1


# Commands


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise(0).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def test_the_commands(
    copied: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kind_of(copied) == "answers"
    model, processor = minivlm.load(copied)
    short = {"max_new_tokens": 4}
    answer = minivlm.answer(picture, "what is it?", (model, processor), **short)
    batch = processor([picture], ["what is it?"])
    assert answer == processor.decode(model.generate(**batch, **short))[0]
    stream = AnswerStream(model, processor, picture, "what is it?", **short)
    assert "".join(stream) == answer
    assert stream.confidence is not None
    ask = ["ask", str(picture), "--prompt", "what is it?", "--max-new-tokens", "4", "--model", str(copied)]
    assert main(ask) == 0
    assert capsys.readouterr().out == f"{picture} | what is it?\n{answer}\n"
    look = ["look", str(picture), "--prompt", "what is it?", "--max-new-tokens", "4", "--model", str(copied)]
    assert main([*look, "--out", str(tmp_path / "look")]) == 0
    assert len(list((tmp_path / "look").iterdir())) == 9
    evaluate = ["eval", "--scenes", "1", "--columns", "held_out", "--json", "--model", str(copied)]
    assert main(evaluate) == 0
    capsys.readouterr()


def test_a_long_picture_is_not_squeezed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise(0, 90, 30).save(tmp_path / "long.png")
    ask = ["ask", str(tmp_path / "long.png"), "--prompt", "what?", "--max-new-tokens", "1"]
    assert main([*ask, "--model", str(folder)]) == 0
    padded = minivlm.load(folder)[1].image_processor.do_pad
    note = "sees it small, between two bars" if padded else "sees only the square in its middle"
    assert f"the picture is 90 x 30, and the model {note}" in capsys.readouterr().err


def test_finetuning(copied: Path, picture: Path, tmp_path: Path) -> None:
    """The first stage trains the projector alone; what is saved opens again, here and in transformers."""
    lines = [
        {"image": picture.name, "prefix": "what is it?", "suffix": "a red star"},
        {"image": picture.name, "prefix": "what color is the circle?", "suffix": "green"},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "tuned"
    arguments = ["--data", str(data), "--model", str(copied), "--out", str(out), "--steps", "2", "--no-bf16"]
    frozen = ["--freeze", "tower", "--freeze", "decoder"]
    assert main(["finetune", *arguments, *frozen, "--workers", "0", "--lr", "0.1"]) == 0
    before, after = (load_file(place / WEIGHTS) for place in (copied, out))
    changed = {name for name in after if not torch.equal(after[name], before[_in(before, name)])}
    assert changed
    assert all("multi_modal_projector" in name for name in changed)
    model, processor = minivlm.load(out)
    batch = processor([picture], QUESTIONS[:1])
    written = theirs(out).generate(**batch, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(**batch, max_new_tokens=5), written[:, batch["input_ids"].shape[1] :])


def _in(names: dict[str, Tensor], name: str) -> str:
    """The same tensor in the file that transformers has written."""
    return name if name in names else name.replace("vision_tower.vision_model.", "vision_tower.")


# The inside


@pytest.mark.parametrize("changes", STRATEGIES, ids=["default", "full"])
def test_the_inside(tmp_path: Path, changes: dict[str, str]) -> None:
    """The class token is in the tower and, by default, not among the image tokens; its maps are not shown."""
    model, processor = minivlm.load(write_llava(tmp_path, **changes))
    image = noise(0)
    seen = inspect_answer(model, processor, image, "what is it?", max_new_tokens=5)
    words, layers, patches = len(seen.words), 2, (SIDE // 14) ** 2
    # The second-last of three layers is read, so the third has no map.
    assert seen.tower.shape == (layers, 4, patches, patches)
    assert seen.attention.shape == (words, 2, 4, patches)
    assert seen.rollout.shape == (words, patches)
    assert seen.image_tokens.shape == (patches, 32)
    assert (seen.tower.sum(dim=-1) < 1).all()

    pixels = processor.image_processor([image])
    with torch.no_grad(), record_attention() as maps:
        tokens = model.encode_image(pixels)
    assert torch.equal(seen.image_tokens, tokens[0, -patches:])
    kept = slice(None) if changes == STRATEGIES[1] else slice(1, None)
    row = processor.encode_row("what is it?").ids
    ids = torch.tensor(
        [row + model.generate(**processor(image, "what is it?"), max_new_tokens=5)[0].tolist()]
    )
    ids = ids[:, : len(row) + words]
    with torch.no_grad(), record_attention() as both:
        model(ids, pixels)
    is_image = ids[0] == processor.tokenizer.image_id
    decoder = attention_rollout(both[len(maps) :])[0, len(row) - 1 : -1][:, is_image]
    expected = decoder @ attention_rollout(maps)[0, kept, 1:]
    torch.testing.assert_close(seen.rollout, expected)
    with_last = attention_rollout([*maps, maps[-1]])[0, kept, 1:]
    assert difference(decoder @ with_last, expected) > 1e-4


def test_hiding_patches_changes_the_answer(folder: Path) -> None:
    model, processor = minivlm.load(folder)
    seen = inspect_answer(model, processor, noise(0), "what is it?", max_new_tokens=3)
    pictures = torch.stack([seen.pixel_values, torch.zeros_like(seen.pixel_values)])
    assert seen.sureness(pictures).diff().abs() > 1e-3
