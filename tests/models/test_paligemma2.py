"""PaliGemma 2 equals that of transformers: logits, answers and folders, within the window and beyond it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gemma2 import TEXT, TINY2, WINDOW, hidden_states, reference_paligemma2, tiny_paligemma2
from helpers import assert_differs, assert_equal, make_batch, randomize, reload
from PIL import Image
from torch import Tensor
from transformers import PaliGemmaForConditionalGeneration

import minivlm
from minivlm import Gemma2Config, InputError, PaliGemma, PaliGemmaConfig, Processor
from minivlm.checkpoints.layouts import PALIGEMMA_LAYOUTS, to_file
from minivlm.generate import generate
from minivlm.models.paligemma import PaliGemmaOutput
from minivlm.models.sizes import DECODERS, IMAGE_SIZES, paligemma2_config
from minivlm.processing import ImageProcessor, Tokenizer, build_tokenizer
from minivlm.text import gemma2

# Words of prefix and suffix: in the first row, both are beyond the window of 8; in the second, neither.
PREFIXES, SUFFIXES = [16, 2, 9], [20, 3, 12]
PICTURES = [True, False, True]
SIDES = pytest.mark.parametrize("side", ["left", "right"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    """Ours and the reference, with the same weights."""
    reference = reference_paligemma2()
    return reload(reference, tmp_path_factory.mktemp("paligemma2")), reference


@pytest.fixture(scope="module")
def model() -> PaliGemma:
    return tiny_paligemma2()


def outputs(models, batch: dict[str, Tensor]) -> Iterator[PaliGemmaOutput]:
    for model in models:
        with torch.no_grad():
            yield model(**batch)


def real(values: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Padding may hold anything: only real positions are compared."""
    return values[batch["attention_mask"].bool()]


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values for name, values in batch.items() if name != "labels"}


def cut(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch as a batch of its own, without padding."""
    keep = batch["attention_mask"][row].bool()
    alone = {
        name: batch[name][row : row + 1, keep] for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    if PICTURES[row]:
        alone["pixel_values"] = batch["pixel_values"][sum(PICTURES[:row])][None]
    return alone


# Parity


@SIDES
def test_logits_loss_and_every_layer_of_a_padded_batch(models, side: str):
    batch = make_batch(PREFIXES, SUFFIXES, PICTURES, side)
    assert batch["input_ids"].shape[1] == 40 == 5 * WINDOW
    ours, expected = outputs(models, batch)
    assert_equal(real(ours.logits, batch), real(expected.logits, batch))
    assert_equal(ours.loss, expected.loss)
    mine = hidden_states(models[0], models[0].language_model.layers, **batch)
    theirs = hidden_states(models[1], models[1].model.language_model.layers, **batch)
    assert len(mine) == len(theirs) == TEXT.num_hidden_layers
    for one, other in zip(mine, theirs, strict=True):
        assert_equal(real(one, batch), real(other, batch))


@pytest.mark.parametrize("prefix", [1, 2, 8, 30])
def test_prefix_alone(models, prefix: int):
    """Every token sees every other, however far away."""
    batch = make_batch([prefix], [0], [True])
    ours, expected = outputs(models, without_labels(batch))
    assert_equal(ours.logits, expected.logits)


def test_text_alone(models):
    batch = make_batch([1, 5], [30, 20], [False, False], "right")
    ours, expected = outputs(models, batch)
    assert_equal(real(ours.logits, batch), real(expected.logits, batch))


def test_gradients(models):
    """Gradients through caps and norms are the same."""
    batch = make_batch([3, 12], [14, 2], [True, True])
    ours, reference = models
    for model in models:
        model.zero_grad()
        model(**batch).loss.backward()
    text, expected = ours.language_model, reference.model.language_model
    pairs = [
        (text.embed_tokens.weight, expected.embed_tokens.weight),
        (text.layers[0].self_attn.q_proj.weight, expected.layers[0].self_attn.q_proj.weight),
        (
            text.layers[1].post_feedforward_layernorm.weight,
            expected.layers[1].post_feedforward_layernorm.weight,
        ),
        (ours.multi_modal_projector.weight, reference.model.multi_modal_projector.linear.weight),
    ]
    for mine, theirs in pairs:
        assert theirs.grad.abs().max() > 1e-4
        assert_equal(mine.grad / theirs.grad.abs().max(), theirs.grad / theirs.grad.abs().max())


PROMPTS = [16, 2, 9]  # words; the window of 8 is shorter than the first prompt and longer than the second


def greedy(model: PaliGemma, side: str, new_tokens: int) -> list[list[int]]:
    """Answers to `PROMPTS` that continue after the end-of-sequence token."""
    batch = make_batch(PROMPTS, [0, 0, 0], [True] * 3, side)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    return generate(model, **inputs, max_new_tokens=new_tokens, eos_token_id=-1).tolist()


def test_greedy_answers_beyond_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # With an untied head: a model with random tied weights repeats its last word.
    reference = reference_paligemma2(tie_word_embeddings=False)
    ours = reload(reference, tmp_path)
    batch = without_labels(make_batch(PROMPTS, [0, 0, 0], [True] * 3))
    new_tokens = 4 * WINDOW
    expected = reference.generate(**batch, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    expected = expected[:, batch["input_ids"].shape[1] :].tolist()
    assert all(len(row) == new_tokens and len(set(row)) > 10 for row in expected)
    assert greedy(ours, "left", new_tokens) == greedy(ours, "right", new_tokens) == expected
    monkeypatch.setattr(gemma2, "narrow", lambda mask, *_: mask)  # these answers do depend on the window
    without = greedy(ours, "left", new_tokens)
    assert all(mine != theirs for mine, theirs in zip(without, expected, strict=True))


# One forward, three views


@torch.no_grad()
@SIDES
def test_padded_batch_equals_single_rows(model: PaliGemma, side: str):
    batch = without_labels(make_batch(PREFIXES, SUFFIXES, PICTURES, side))
    logits = model(**batch).logits
    for row in range(3):
        assert_equal(logits[row, batch["attention_mask"][row].bool()], model(**cut(batch, row)).logits[0])


@torch.no_grad()
@SIDES
def test_cached_decoding_equals_the_whole_sequence(model: PaliGemma, side: str):
    """The prefixes in one go, then the suffixes token by token; rows end at different times."""
    whole = without_labels(make_batch(PREFIXES, SUFFIXES, PICTURES, "right"))
    expected = [model(**cut(whole, row)).logits[0] for row in range(3)]
    starts = [int((cut(whole, row)["token_type_ids"] == 0).sum()) for row in range(3)]
    prefix = make_batch(PREFIXES, [0, 0, 0], PICTURES, side)
    for row, start in enumerate(starts):
        prefix["input_ids"][row, prefix["attention_mask"][row].bool()] = whole["input_ids"][row, :start]
    hidden, cache = model.prefill(prefix["input_ids"], prefix["attention_mask"], whole["pixel_values"])
    for step in range(max(SUFFIXES) + 1):
        logits = model.logits(hidden)
        for row in range(3):
            if step <= SUFFIXES[row]:
                assert_equal(logits[row], expected[row][starts[row] - 1 + step])
        unfinished = torch.tensor([step < count for count in SUFFIXES])
        places = torch.tensor(starts) + step
        tokens = whole["input_ids"][torch.arange(3), places.clamp(max=whole["input_ids"].shape[1] - 1)]
        if unfinished.any():
            hidden = model.decode(tokens.where(unfinished, 0), unfinished, cache)


@torch.no_grad()
@SIDES
def test_prefill_may_hold_a_part_of_the_answer(model: PaliGemma, side: str):
    batch = without_labels(make_batch(PREFIXES, SUFFIXES, PICTURES, side))
    hidden, _ = model.prefill(**batch)
    expected = [model(**cut(batch, row)).logits[0, -1] for row in range(3)]
    assert_equal(model.logits(hidden), torch.stack(expected))


# Each of these is a mistake in combining prefix and window.


@pytest.mark.parametrize(
    "wrong",
    [
        lambda mask, *_: mask,
        lambda mask, queries, keys, window: mask & minivlm.masks.sliding(queries, keys, window)[:, None],
    ],
    ids=["no window", "a window in the prefix too"],
)
def test_another_window_is_noticed(models, monkeypatch: pytest.MonkeyPatch, wrong):
    monkeypatch.setattr(gemma2, "narrow", wrong)
    batch = make_batch([16, 12], [20, 10], [True, True])
    ours, expected = outputs(models, batch)
    assert_differs(real(ours.logits, batch), real(expected.logits, batch), factor=100)


# Folders


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformers_reads_our_folders(tmp_path: Path, tied: bool):
    config = replace(TINY2, text=replace(TEXT, tie_word_embeddings=tied))
    ours = randomize(PaliGemma(config))
    ours.save_pretrained(tmp_path)
    reference = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    batch = without_labels(make_batch(PREFIXES, SUFFIXES, PICTURES))
    mine, theirs = outputs((ours, reference), batch)
    assert_equal(real(mine.logits, batch), real(theirs.logits, batch))
    again = PaliGemma.from_pretrained(tmp_path)
    assert again.config == config
    assert torch.equal(again(**batch).logits, mine.logits)


def test_a_folder_of_transformers_holds_the_same_config(models, tmp_path: Path):
    models[1].save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["text_config"]["model_type"] == "gemma2"
    assert PaliGemmaConfig.from_dict(values) == models[0].config == TINY2


@pytest.mark.parametrize("layout", PALIGEMMA_LAYOUTS)
def test_all_layouts_name_the_four_norms(model: PaliGemma, layout: str):
    names = {to_file(name, PALIGEMMA_LAYOUTS[layout]) for name in model.state_dict()}
    assert len(names) == len(model.state_dict())
    assert sum("post_feedforward_layernorm" in name for name in names) == TEXT.num_hidden_layers


def test_load_gives_an_answer(tmp_path: Path):
    question = "what color is the circle"
    tokenizer = Tokenizer(build_tokenizer([question, "red", "green"]))
    Processor(tokenizer, ImageProcessor(image_size=28, image_seq_length=4)).save_pretrained(tmp_path)
    text = replace(TEXT, vocab_size=tokenizer.vocab_size)
    config = replace(TINY2, text=text, image_token_id=tokenizer.image_id)
    randomize(PaliGemma(config)).save_pretrained(tmp_path)
    model, processor = minivlm.load(tmp_path)
    assert isinstance(model.config.text, Gemma2Config)
    inputs = processor(Image.new("RGB", (50, 40), "red"), question)
    assert len(processor.decode(model.generate(**inputs, max_new_tokens=5))) == 1


# Published sizes

# From KerasHub, counted in the published weights (pali_gemma_presets.py). Its vocabulary is the original one
# of 257152; the Hub's folders have 64 more rows.
PARAMETERS = {
    ("3b", 224): 3_032_094_960,
    ("3b", 448): 3_032_979_696,
    ("3b", 896): 3_036_518_640,
    ("10b", 224): 9_662_409_456,
    ("10b", 448): 9_663_294_192,
    ("10b", 896): 9_666_833_136,
    ("28b", 224): 27_650_192_112,
}
PAPER = {"3b": "3.0", "10b": "9.7", "28b": "27.7"}  # billions, table 1 of the paper


@pytest.mark.parametrize(("size", "image_size"), PARAMETERS)
def test_number_of_parameters(size: str, image_size: int):
    config = paligemma2_config(size, image_size)
    with torch.device("meta"):
        model = PaliGemma(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PARAMETERS[size, image_size] + 64 * config.text.hidden_size
    assert f"{count / 1e9:.1f}" == PAPER[size]


def test_every_size_and_image_size():
    tokens = dict(zip(IMAGE_SIZES, (256, 1024, 4096), strict=True))
    for size in DECODERS:
        for image_size in IMAGE_SIZES:
            config = paligemma2_config(size, image_size)
            assert config.vision.num_patches == tokens[image_size]
            assert PaliGemmaConfig.from_dict(config.to_dict()) == config
            text = config.text
            assert isinstance(text, Gemma2Config)
            assert (text.sliding_window, text.attn_logit_softcapping, text.final_logit_softcapping) == (
                4096,
                50.0,
                30.0,
            )
    scales = {size: config.query_pre_attn_scalar for size, config in DECODERS.items()}
    assert scales == {"3b": 256, "10b": 256, "28b": 144}


@pytest.mark.parametrize(("size", "image_size"), [("2b", 224), ("3b", 256)])
def test_sizes_that_do_not_exist(size: str, image_size: int):
    with pytest.raises(InputError, match="choose from 3b, 10b, 28b and 224, 448, 896"):
        paligemma2_config(size, image_size)
