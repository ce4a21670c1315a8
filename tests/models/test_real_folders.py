"""Folders as other programs write them: computed as in transformers, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gemma2 import reference_paligemma2
from helpers import assert_equal, make_batch, reference_paligemma, tiny_paligemma, without_labels
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor
from transformers import GenerationConfig, PaliGemmaForConditionalGeneration

from minivlm import InputError, PaliGemma
from minivlm.checkpoints.hub import GENERATION
from minivlm.checkpoints.weights import WEIGHTS

BATCH = without_labels(make_batch([5, 3], [0, 0], [True, False]))
REAL = BATCH["attention_mask"].bool()
IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    reference_paligemma().save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, part: str | None = None, **values: Any) -> None:
    """Change config.json, or a part of it."""
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part]).update(values)
    (folder / "config.json").write_text(json.dumps(config))


def theirs(folder: Path) -> PaliGemmaForConditionalGeneration:
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(**BATCH).logits[REAL]


# Where an answer ends

TOP = {"pad_token_id": 4, "bos_token_id": 11, "eos_token_id": 3}
TEXT = {"pad_token_id": 44, "bos_token_id": 22, "eos_token_id": 33}


@pytest.mark.parametrize("top", [{}, TOP, {"eos_token_id": None}, {"eos_token_id": [3, 5]}], ids=str)
@pytest.mark.parametrize("text", [{}, TEXT, {"eos_token_id": [33, 35]}], ids=str)
@pytest.mark.parametrize("file", [None, {"eos_token_id": 7}, {**TOP, "eos_token_id": [8, 9]}], ids=str)
def test_pad_bos_and_eos_are_those_of_transformers(
    folder: Path, top: dict[str, Any], text: dict[str, Any], file: dict[str, Any] | None
) -> None:
    nothing = dict.fromkeys(IDS)
    edit(folder, **nothing | top)
    edit(folder, "text_config", **nothing | text)
    (folder / GENERATION).unlink()
    if file is not None:
        (folder / GENERATION).write_text(json.dumps(file))
    config = PaliGemma.from_pretrained(folder).config
    expected = GenerationConfig.from_pretrained(folder, "config.json" if file is None else GENERATION)
    for name in IDS:
        value = getattr(expected, name)
        if value is not None:  # where transformers has none, ours are those of the next file, then of Gemma
            assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value), name
    if file is None and not top and not text:
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 2, 1)


@pytest.mark.parametrize("place", ["text_config", "config.json", GENERATION])
def test_generation_stops_where_transformers_stops(tmp_path: Path, place: str) -> None:
    folder = tmp_path
    reference_paligemma(seed=4, tie_word_embeddings=False).save_pretrained(folder)  # its words all differ
    one = {name: tensor[:1] for name, tensor in BATCH.items()}
    free = theirs(folder).generate(**one, max_new_tokens=12, do_sample=False, eos_token_id=None)
    words = free[0, one["input_ids"].shape[1] :].tolist()
    ends = [119, words[5]]
    edit(folder, **dict.fromkeys(IDS))
    edit(folder, "text_config", **dict.fromkeys(IDS))
    if place == GENERATION:
        edit(folder, eos_token_id=words[0])
        (folder / GENERATION).write_text(json.dumps({"eos_token_id": ends, "pad_token_id": 0}))
    else:
        (folder / GENERATION).unlink()
        edit(folder, "text_config" if place == "text_config" else None, eos_token_id=ends, pad_token_id=0)
    expected = theirs(folder).generate(**one, max_new_tokens=12, do_sample=False)
    expected = expected[:, one["input_ids"].shape[1] :]
    assert expected.shape[1] == 6
    ours = PaliGemma.from_pretrained(folder)
    assert torch.equal(ours.generate(**one, max_new_tokens=12), expected)

    # The same after saving, also over a folder whose generation_config.json says otherwise.
    (folder / GENERATION).write_text(json.dumps({"eos_token_id": 1}))
    ours.save_pretrained(folder)
    for model in (PaliGemma.from_pretrained(folder), theirs(folder)):
        again = model.generate(**one, max_new_tokens=12)
        assert torch.equal(again[:, -expected.shape[1] :], expected)


# Rotary positions, activations, caps


@pytest.mark.parametrize("reference", [reference_paligemma, reference_paligemma2])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling has type = 'linear'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_scaling has rope_type = 'linear'"),
        ({"rope_parameters": {"type": "linear", "factor": 4.0}}, "rope_parameters has type = 'linear'"),
        ({"rope_parameters": [1.0]}, r"rope_parameters in config.json is \[1.0\], expected an object"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters has its own full_attention"),
    ],
    ids=str,
)
def test_scaled_rotary_positions(
    reference: Any, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    reference().save_pretrained(tmp_path)
    edit(tmp_path, "text_config", **values)
    with pytest.raises(InputError, match=message):
        PaliGemma.from_pretrained(tmp_path)


def test_the_old_name_of_rotary_parameters_wins(folder: Path) -> None:
    edit(folder, "text_config", rope_theta=70.0, rope_parameters={"rope_theta": 30.0})
    assert_equal(logits(PaliGemma.from_pretrained(folder)), logits(theirs(folder)))
    edit(folder, "text_config", rope_scaling={"type": "default"})
    ours = PaliGemma.from_pretrained(folder)
    assert ours.config.text.rope_theta == 70.0
    assert_equal(logits(ours), logits(theirs(folder)))


@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "gelu", "gelu_fast", "gelu_new"])
def test_gemmas_names_of_one_activation(folder: Path, name: str) -> None:
    edit(folder, "text_config", hidden_act=name)
    assert_equal(logits(PaliGemma.from_pretrained(folder)), logits(theirs(folder)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "silu"),
        ("hidden_act", "relu"),
        ("hidden_act", "quick_gelu"),
        ("hidden_activation", "silu"),
        ("final_logit_softcapping", 30.0),
        ("sliding_window", 4096),
    ],
)
def test_what_gemma_does_not_compute_is_refused(folder: Path, name: str, value: Any) -> None:
    edit(folder, "text_config", **{name: value})
    with pytest.raises(InputError, match=rf"text_config has {name} = {value!r}; only"):
        PaliGemma.from_pretrained(folder)


# The head and the table


@pytest.mark.parametrize("top", [True, None])
@pytest.mark.parametrize("text", [True, False, None])
@pytest.mark.parametrize("stored", ["table", "head", "both", "different"])
def test_the_tied_head(tmp_path: Path, top: bool | None, text: bool | None, stored: str) -> None:
    reference_paligemma(tie_word_embeddings=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for values, tied in ((config, top), (config["text_config"], text)):
        values.pop("tie_word_embeddings", None)
        values |= {} if tied is None else {"tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / WEIGHTS)
    head, table = (
        next(name for name in tensors if end in name) for end in ("lm_head.weight", "embed_tokens.weight")
    )
    if stored == "both":
        tensors[head] = tensors[table].clone()
    if stored in ("table", "head"):
        del tensors[head if stored == "table" else table]
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert_equal(logits(PaliGemma.from_pretrained(tmp_path)), logits(theirs(tmp_path)))


def test_what_safetensors_writes_of_a_tied_model(tmp_path: Path) -> None:
    reference = reference_paligemma()
    reference.save_pretrained(tmp_path)
    save_model(reference, str(tmp_path / WEIGHTS), metadata={"format": "pt"})
    assert not any("embed_tokens" in name for name in load_file(tmp_path / WEIGHTS))
    ours = PaliGemma.from_pretrained(tmp_path)
    assert ours.config.text.tie_word_embeddings
    assert_equal(logits(ours), logits(reference))


@pytest.mark.parametrize("text", [True, False])
def test_an_untied_head_that_is_missing(folder: Path, text: bool) -> None:
    """transformers makes up a random one."""
    edit(folder, tie_word_embeddings=False)
    edit(folder, "text_config", tie_word_embeddings=text)
    with pytest.raises(InputError, match=r"1 missing: language_model.lm_head.weight"):
        PaliGemma.from_pretrained(folder)


# Rows that are no prefix with a suffix


@pytest.mark.parametrize("method", ["forward", "prefill"])
@pytest.mark.parametrize(
    ("mask", "types", "message"),
    [
        ([1, 1, 0, 1, 1], None, "attention_mask has a hole"),
        ([0, 1, 0, 1, 0], None, "attention_mask has a hole"),
        ([1, 1, 1, 1, 1], [0, 1, 0, 1, 1], r"prefix \(0\) after a suffix \(1\)"),
        ([0, 1, 1, 1, 0], [0, 1, 0, 0, 0], r"prefix \(0\) after a suffix \(1\)"),
        ([1, 1, 1, 1], None, r"attention_mask has shape \[1, 4\], expected that of input_ids, \[1, 5\]"),
        ([1, 1, 1, 1, 1], [0, 0, 1], r"token_type_ids has shape \[1, 3\]"),
    ],
)
def test_rows_that_mean_another_computation(
    method: str, mask: list[int], types: list[int] | None, message: str
) -> None:
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "attention_mask": torch.tensor([mask])}
    if types is not None:
        inputs["token_type_ids"] = torch.tensor([types])
    with pytest.raises(ValueError, match=message):
        getattr(tiny_paligemma(), method)(**inputs)


def test_padding_around_a_prefix_and_a_suffix() -> None:
    """What is refused depends on real tokens alone: padding may have either type."""
    model = tiny_paligemma()
    rows = {
        "input_ids": torch.tensor([[0, 5, 6, 7, 0]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 0]]),
        "token_type_ids": torch.tensor([[1, 0, 0, 1, 0]]),
    }
    alone = {name: tensor[:, 1:4] for name, tensor in rows.items()}
    with torch.no_grad():
        assert_equal(model(**rows).logits[:, 1:4], model(**alone).logits)
