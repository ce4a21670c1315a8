"""DeepSeek-VL from a folder: answers as transformers gives them, every command, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepseek_vl import CLIP, HALF, HIGH, IMAGE_TOKENS, LOW, write_folder
from helpers import assert_differs, assert_equal, difference
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoProcessor,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridForConditionalGeneration,
)

import minivlm
from minivlm import DeepseekVL, DeepseekVLHybrid, DeepseekVLHybridProcessor, DeepseekVLProcessor, InputError
from minivlm.attention import record_attention
from minivlm.checkpoints.layouts import as_in_file
from minivlm.checkpoints.weights import WEIGHTS
from minivlm.cli import main
from minivlm.looking.inspection import inspect_answer
from minivlm.looking.measures import attention_rollout
from minivlm.models import deepseek_original
from minivlm.models.load import kind_of

QUESTIONS = ["what is it?", "what color is the circle?", "what?"]
REFERENCES = {True: DeepseekVLHybridForConditionalGeneration, False: DeepseekVLForConditionalGeneration}


def noise(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = [noise(0), [noise(1), noise(2, 30, 41)], None]  # of three rows
ALL = [noise(0), noise(1), noise(2, 30, 41)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """One for each system, by whether it has two towers."""
    root = tmp_path_factory.mktemp("folders")
    return {hybrid: write_folder(root / str(hybrid), hybrid) for hybrid in (True, False)}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "copied", hybrid=True)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise(0).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def edit(path: Path, part: str | None = None, **values: Any) -> None:
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(values)
    path.write_text(json.dumps(config))


def their_batch(folder: Path) -> Any:
    """The three rows, by transformers alone. Its slower processor has our pixels bit for bit."""
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    texts = []
    for number, question in enumerate(QUESTIONS):
        content = [{"type": "image"}] * [1, 2, 0][number] + [{"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
    return processor(images=ALL, text=texts, padding=True, padding_side="left", return_tensors="pt")


both = pytest.mark.parametrize("hybrid", [True, False], ids=["hybrid", "plain"])


@both
def test_answers_are_those_of_transformers(hybrid: bool, folders: dict[bool, Path], tmp_path: Path) -> None:
    """Folder, pictures, chats, padding, greedy answers; then the same from what we save."""
    model, processor = minivlm.load(folders[hybrid])
    assert isinstance(model, DeepseekVL)
    assert isinstance(model, DeepseekVLHybrid) == hybrid
    assert type(processor) is (DeepseekVLHybridProcessor if hybrid else DeepseekVLProcessor)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    for folder in (folders[hybrid], tmp_path):
        batch = minivlm.load(folder)[1](PICTURES, QUESTIONS)
        expected = their_batch(folder)
        names = {"input_ids", "attention_mask", "pixel_values", "high_res_pixel_values"}
        assert batch.keys() == names - (set() if hybrid else {"high_res_pixel_values"})
        assert all(torch.equal(tensor, expected[name]) for name, tensor in batch.items())
        reference = REFERENCES[hybrid].from_pretrained(folder).eval()
        written = reference.generate(**batch, max_new_tokens=8, do_sample=False)
        ours = minivlm.load(folder)[0].generate(**batch, max_new_tokens=8)
        assert torch.equal(ours, written[:, batch["input_ids"].shape[1] :])
    others = processor([noise(7), [noise(1), noise(8)], None], QUESTIONS)
    with torch.no_grad():
        logits, changed = (model(**rows).logits[:, -1] for rows in (batch, others))
    assert_differs(changed[:2], logits[:2])
    assert_equal(changed[2], logits[2])


def test_answers_end_at_the_tokenizers_end(folders: dict[bool, Path], tmp_path: Path) -> None:
    """Where a folder names the end of Llama's texts, too."""
    folder = write_folder(tmp_path, hybrid=False, eos_token_id=2)
    model, processor = minivlm.load(folder)
    assert model.config.eos_token_id == (2, processor.tokenizer.eos_id)
    assert minivlm.load(folders[False])[0].config.eos_token_id == processor.tokenizer.eos_id


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("config.json", {"image_token_id": 7}, "the id of <image_placeholder> is 7 in config.json and"),
        ("vision_config", {"image_size": 48}, "the picture's side is 48 in config.json and 24 in preproc"),
        (
            "high_res_vision_config",
            {"image_size": 64},
            "large picture's side is 64 in config.json and 56",
        ),
        ("processor_config.json", {"num_image_tokens": 4}, "image tokens is 9 in config.json and 4"),
        ("text_config", {"vocab_size": 200}, "the model knows only 200 tokens"),
        ("config.json", {"model_type": "deepseek_vl"}, r"unexpected: model\.aligner\.high_res_vision_proj"),
    ],
)
def test_files_that_do_not_fit(copied: Path, name: str, values: dict[str, Any], message: str) -> None:
    if values.get("model_type") == "deepseek_vl":
        settings = copied / "processor_config.json"
        edit(settings, "image_processor", image_processor_type="DeepseekVLImageProcessor")
    if name.endswith(".json"):
        edit(copied / name, **values)
    else:
        edit(copied / "config.json", name, **values)
    with pytest.raises(InputError, match=message):
        minivlm.load(copied)


# Folders of the original program


def write_original(folder: Path, model: DeepseekVL, tokenizer: Path) -> Path:
    """The same model as the original program names it, with tensors that it never reads."""
    folder.mkdir()
    hybrid = isinstance(model, DeepseekVLHybrid)
    kind = deepseek_original.HYBRID if hybrid else deepseek_original.PLAIN
    moments = {"pixel_mean": HALF, "pixel_std": HALF}
    params: dict[str, Any] = {"model_name": "siglip", "image_size": LOW, "select_layer": -1, **moments}
    if hybrid:
        moments = {"pixel_mean": CLIP, "pixel_std": [0.26862954, 0.26130258, 0.27577711]}
        high = {"model_name": "sam", "image_size": HIGH, "select_layer": -1, **moments}
        params = {"high_res_cfg": high, "low_res_cfg": params, "concat_type": "tuple"}
    aligner = {"depth": 2, "projector_type": deepseek_original.ALIGNERS[kind]}
    config = {
        "model_type": "multi_modality",
        "vision_config": {"cls": kind, "params": params},
        "aligner_config": {"cls": "MlpProjector", "params": aligner},
        "language_config": model.config.text.to_dict(),
    }
    pictures = {
        "image_processor_type": "VLMImageProcessor",
        "image_size": HIGH if hybrid else LOW,
        "min_size": 2,
        "image_mean": CLIP if hybrid else HALF,
        "image_std": HALF,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    (folder / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    tensors = as_in_file(model.state_dict(), model.layouts["original"])
    low = "vision_model.vision_tower_low." if hybrid else "vision_model."
    tensors[f"{low}vision_tower.attn_pool.latent"] = torch.ones(1, 1, 24)
    for side in ("high", "low") if hybrid else ():
        tensors[f"vision_model.{side}_layer_norm.weight"] = torch.ones(24)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


@pytest.fixture
def small_towers(folders: dict[bool, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What `write_original` calls siglip and sam."""
    config = DeepseekVLHybrid.from_pretrained(folders[True]).config
    monkeypatch.setattr(deepseek_original, "SIGLIP", {"siglip": config.vision})
    monkeypatch.setattr(deepseek_original, "SAM", {"sam": config.high_res_vision})


@both
@torch.no_grad()
@pytest.mark.usefixtures("small_towers")
def test_a_folder_of_the_original_program(hybrid: bool, folders: dict[bool, Path], tmp_path: Path) -> None:
    """Other names of files, settings and tensors; the same answers."""
    kind = DeepseekVLHybrid if hybrid else DeepseekVL
    model, processor = kind.from_pretrained(folders[hybrid]), minivlm.load(folders[hybrid])[1]
    original = write_original(tmp_path / "original", model, folders[hybrid])
    assert kind_of(original) == "answers"
    again, same = minivlm.load(original)
    assert again.config == model.config
    batch = same(PICTURES, QUESTIONS)
    expected = processor(PICTURES, QUESTIONS)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert_equal(again(**batch).logits, model(**batch).logits)

    tensors = load_file(original / WEIGHTS)
    save_file(tensors | {"vision_model.mystery.weight": torch.ones(1)}, original / WEIGHTS)
    with pytest.raises(InputError, match=r"1 unexpected: vision_model\.mystery\.weight"):
        minivlm.load(original)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (None, {"gen_vision_config": {}}, "of the systems called multi_modality, only DeepSeek-VL"),
        ("vision_config", {"cls": "MobileVisionTower"}, "cls 'MobileVisionTower'"),
        ("vision_config", {"params": {"model_name": "siglip", "select_layer": -2}}, "select_layer = -2"),
        (
            "vision_config",
            {"params": {"model_name": "eva", "select_layer": -1}},
            "model_name = 'eva'; only siglip is",
        ),
        ("aligner_config", {"params": {"projector_type": "linear"}}, "projector_type = 'linear'"),
        ("vision_config", {"params": {"model_name": "siglip"}}, "select_layer = -2"),
        ("preprocessor", {"do_normalize": True}, "pixels are normalized twice"),
        ("preprocessor", {"image_mean": [0.4, 0.5, 0.5]}, "which colors the bars"),
        ("preprocessor", {"image_processor_type": "CLIPImageProcessor"}, "only 'VLMImageProcessor'"),
    ],
)
@pytest.mark.usefixtures("small_towers")
def test_what_is_refused_of_the_original(
    part: str | None, values: dict[str, Any], message: str, folders: dict[bool, Path], tmp_path: Path
) -> None:
    model = DeepseekVL.from_pretrained(folders[False])
    folder = write_original(tmp_path / "original", model, folders[False])
    if part == "preprocessor":
        edit(folder / "preprocessor_config.json", **values)
    else:
        edit(folder / "config.json", part, **values)
    with pytest.raises(InputError, match=message):
        minivlm.load(folder)


# Commands


@both
@pytest.mark.filterwarnings("ignore:Glyph")  # random weights write control characters
def test_the_commands(
    hybrid: bool,
    folders: dict[bool, Path],
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = folders[hybrid]
    answer = minivlm.answer(picture, "what is it?", minivlm.load(folder), max_new_tokens=4)
    short = ["--prompt", "what is it?", "--max-new-tokens", "4", "--model", str(folder)]
    assert main(["ask", str(picture), *short]) == 0
    assert capsys.readouterr().out == f"{picture} | what is it?\n{answer}\n"
    assert main(["look", str(picture), *short, "--out", str(tmp_path / "look")]) == 0
    assert len(list((tmp_path / "look").iterdir())) == 9
    assert main(["eval", "--scenes", "1", "--columns", "held_out", "--json", "--model", str(folder)]) == 0


def test_finetuning(copied: Path, picture: Path, tmp_path: Path) -> None:
    """With both towers and the decoder frozen, the aligner alone learns; transformers opens what is saved."""
    lines = [{"image": picture.name, "prefix": "what is it?", "suffix": "a red star"}] * 2
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "tuned"
    arguments = ["--data", str(tmp_path / "data.jsonl"), "--model", str(copied), "--out", str(out)]
    arguments += ["--steps", "1", "--no-bf16", "--freeze", "tower", "--freeze", "decoder", "--workers", "0"]
    assert main(["finetune", *arguments, "--lr", "0.1"]) == 0
    before, after = (load_file(place / WEIGHTS) for place in (copied, out))
    changed = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"aligner"}
    model, processor = minivlm.load(out)
    batch = processor([picture], QUESTIONS[:1])
    written = REFERENCES[True].from_pretrained(out).generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**batch, max_new_tokens=4), written[:, batch["input_ids"].shape[1] :])


@torch.no_grad()
def test_int8(folders: dict[bool, Path]) -> None:
    model, processor = minivlm.load(folders[True], quantize="int8")
    plain, _ = minivlm.load(folders[True])
    batch = processor(PICTURES, QUESTIONS)
    assert 1e-4 < difference(model(**batch).logits, plain(**batch).logits) < 0.2


# The inside


@torch.no_grad()
def test_the_inside(folders: dict[bool, Path]) -> None:
    """The maps are SigLIP's and the decoder's; SAM's are of other places."""
    model, processor = minivlm.load(folders[True])
    seen = inspect_answer(model, processor, noise(0), "what is it?", max_new_tokens=3)
    words = len(seen.words)
    assert seen.tower is not None
    assert seen.rollout is not None
    assert seen.tower.shape == (2, 4, IMAGE_TOKENS, IMAGE_TOKENS)
    assert seen.image_tokens is not None
    assert seen.image_tokens.shape == (IMAGE_TOKENS, 32)
    pixels = processor.pixels([noise(0)])
    with record_attention() as maps:
        tokens = model.encode_image(**pixels)
    assert torch.equal(seen.image_tokens, tokens[0])
    assert len(maps) == 2 + 4
    ids = processor.encode_row("what is it?").ids
    written = model.generate(**processor(noise(0), "what is it?"), max_new_tokens=3)[0].tolist()
    row = torch.tensor([[*ids, *written]])[:, : len(ids) + words]
    with record_attention() as reading:
        model(row, **pixels)
    is_image = row[0] == processor.tokenizer.image_id
    decoder: Tensor = attention_rollout(reading[6:])[0, len(ids) - 1 : -1][:, is_image]
    torch.testing.assert_close(seen.rollout, decoder @ attention_rollout(maps[:2])[0])
    # What is hidden is hidden from both towers.
    hidden = seen.pixel_values.clone()
    hidden[:, :8, :8] = 0
    odds = seen.sureness(torch.stack([seen.pixel_values, hidden]))
    assert odds.diff().abs() > 1e-4
