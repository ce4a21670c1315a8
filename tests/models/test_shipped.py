"""The model that ships with the package: a small but real PaliGemma folder, as good as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

import minivlm
from minivlm.cli import main
from minivlm.evaluation import answer_all, make_questions, score
from minivlm.models.load import SHIPPED
from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Processor, text_to_boxes
from minivlm.training.recipe import TrainingConfig, build
from minivlm.world.demo import SAMPLE_TASKS, read_samples, sample_scene
from minivlm.world.questions import TASKS

# transformers converts a tensor to an array in a way that NumPy 2 warns about
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SAMPLES = Path(__file__).parents[2] / "figures" / "samples"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")
# The published results, minus what 60 scenes may miss by chance.
MINIMUM = {"all questions": 0.90, "exact caption": 0.70, "box mean IoU": 0.70}


@pytest.fixture(scope="module")
def ours() -> tuple[PaliGemma, Processor]:
    return minivlm.load(SHIPPED)


@pytest.fixture(scope="module")
def model(ours: tuple[PaliGemma, Processor]) -> PaliGemma:
    return ours[0]


@pytest.fixture(scope="module")
def processor(ours: tuple[PaliGemma, Processor]) -> Processor:
    return ours[1]


@pytest.fixture(scope="module")
def reference() -> PaliGemmaForConditionalGeneration:
    model, report = PaliGemmaForConditionalGeneration.from_pretrained(
        SHIPPED, output_loading_info=True, local_files_only=True
    )
    assert {
        name: list(value) for name, value in report.items() if value
    } == {}  # missing, unexpected, misshapen
    return model.eval()


# The folder


def test_the_folder_is_small_and_complete() -> None:
    assert set(FILES) <= {path.name for path in SHIPPED.iterdir()}
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 8 * 2**20


def test_the_folder_holds_nothing_but_the_model() -> None:
    """No state of a training run, no temporary files, nothing that could run code."""
    allowed = {*FILES, "tokenizer_config.json", "generation_config.json", "README.md"}
    assert {path.name for path in SHIPPED.iterdir()} <= allowed


def test_it_is_what_the_defaults_of_training_build(model: PaliGemma, processor: Processor) -> None:
    built, tokens = build(TrainingConfig())
    assert model.config == built.config
    assert processor.tokenizer.backend.to_str() == tokens.tokenizer.backend.to_str()
    assert processor.image_processor == tokens.image_processor
    weights = load_file(SHIPPED / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_load_without_a_name_gives_it(model: PaliGemma) -> None:
    again, _ = minivlm.load()
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


# The same folder in transformers


def asked_about(scenes: int, first: int = 0) -> tuple[list[Image.Image], list[str]]:
    questions = make_questions(first + scenes, 4, "test", 96)  # not the size that the model sees
    known = list(dict.fromkeys(question.scene for question in questions))[first:]
    chosen = [question for question in questions if question.scene in known]
    return [question.picture for question in chosen], [question.example.prefix for question in chosen]


def generate(reference: PaliGemmaForConditionalGeneration, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.inference_mode():
        ids = reference.generate(**inputs, max_new_tokens=64, do_sample=False)
    return ids[:, inputs["input_ids"].shape[1] :]


def trim(row: torch.Tensor, eos: int) -> list[int]:
    """Up to the end of the answer: the padding after it may differ."""
    ids: list[int] = row.tolist()
    return ids[: ids.index(eos)] if eos in ids else ids


def test_it_answers_alike_in_batches(
    model: PaliGemma, processor: Processor, reference: PaliGemmaForConditionalGeneration
) -> None:
    """20 scenes, all tasks, rows of all lengths: greedy answers are equal token by token."""
    pictures, prompts = asked_about(20)
    assert {prompt.split()[0] for prompt in prompts} >= {"what", "how", "is", "caption", "detect"}
    eos = processor.tokenizer.eos_id
    inputs = processor(pictures, prompts)
    assert int(inputs["attention_mask"].min()) == 0  # there is padding
    wanted = generate(reference, inputs)
    found = model.generate(**inputs, max_new_tokens=64)
    assert [trim(row, eos) for row in found] == [trim(row, eos) for row in wanted]
    assert len({tuple(trim(row, eos)) for row in found}) > 50  # and they are not all the same answer


def test_it_answers_alike_one_by_one(
    model: PaliGemma, processor: Processor, reference: PaliGemmaForConditionalGeneration
) -> None:
    pictures, prompts = asked_about(1, first=20)
    assert len(prompts) >= len(TASKS) - 2
    for picture, prompt in zip(pictures, prompts, strict=True):
        inputs = processor([picture], [prompt])
        wanted, found = generate(reference, inputs), model.generate(**inputs, max_new_tokens=64)
        assert torch.equal(found, wanted), prompt


def test_its_logits_are_alike(
    model: PaliGemma, processor: Processor, reference: PaliGemmaForConditionalGeneration
) -> None:
    """On rows with answers, where token types matter."""
    questions = make_questions(4, 4, "test", 64)
    inputs = processor(
        [q.picture for q in questions],
        [q.example.prefix for q in questions],
        [q.example.suffix for q in questions],
    )
    with torch.inference_mode():
        ours, wanted = model(**inputs), reference(**inputs)
        as_prefix = reference(**inputs | {"token_type_ids": torch.zeros_like(inputs["token_type_ids"])})
    real = inputs["attention_mask"].bool()
    scale = float(wanted.logits[real].abs().max())
    assert float((ours.logits - wanted.logits)[real].abs().max()) <= 1e-5 * scale
    assert float(ours.loss) == pytest.approx(float(wanted.loss), rel=1e-5)
    assert float((ours.logits - as_prefix.logits)[real].abs().max()) > 1e-3 * scale


def test_the_processor_of_transformers_reads_the_folder(processor: Processor) -> None:
    loaded = AutoProcessor.from_pretrained(SHIPPED, local_files_only=True, use_fast=False)
    assert type(loaded.image_processor).__name__.endswith("Pil")
    pictures, prompts = asked_about(3)
    ours = processor(pictures, prompts)
    theirs = loaded(
        images=[[picture] for picture in pictures],
        text=["<image>" + prompt for prompt in prompts],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(ours[name], theirs[name]), name
    assert loaded.decode(ours["input_ids"][0], skip_special_tokens=True).strip() == prompts[0]


# What it can do


def test_it_is_as_good_as_it_was_published(model: PaliGemma, processor: Processor) -> None:
    questions = make_questions(60, 1, "test", processor.image_processor.image_size)
    pictures, prompts = [q.picture for q in questions], [q.example.prefix for q in questions]
    metrics = score(questions, answer_all(model, processor, pictures, prompts, progress=False))
    reached = {name: round(metrics[name].value, 3) for name in MINIMUM}
    assert {name: value for name, value in reached.items() if value < MINIMUM[name]} == {}
    # It looks at the picture: answers about the wrong pictures are mostly wrong.
    elsewhere = score(
        questions, answer_all(model, processor, pictures[9:] + pictures[:9], prompts, progress=False)
    )
    assert elsewhere["all questions"].value < 0.7
    assert elsewhere["exact caption"].value < 0.1
    assert elsewhere["box mean IoU"].value < 0.3


def test_the_samples_are_drawn_by_the_package() -> None:
    samples = read_samples(SAMPLES)
    assert len(samples) == len(SAMPLE_TASKS) == len(list(SAMPLES.glob("*.png")))
    for number, (path, prompts) in enumerate(samples.items()):
        scene, examples = sample_scene(number)
        picture = Image.open(path)
        assert (picture.size, picture.mode) == ((256, 256), "RGB")
        assert np.array_equal(np.asarray(picture), np.asarray(scene.draw(256)))
        assert prompts == [example.prefix for example in examples]


def test_the_samples_are_answered(model: PaliGemma, processor: Processor) -> None:
    right = []
    for number, path in enumerate(read_samples(SAMPLES)):
        _, examples = sample_scene(number)
        prompts = [example.prefix for example in examples]
        answers = answer_all(model, processor, [Image.open(path)] * len(prompts), prompts, progress=False)
        for example, answer in zip(examples, answers, strict=True):
            if example.task == "detect":
                assert len(text_to_boxes(answer, 256, 256)) == len(example.things), (path.name, answer)
            else:
                right.append(answer == example.suffix)
    assert len(right) == 12
    assert sum(right) >= 9


def test_the_demonstration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], processor: Processor
) -> None:
    """The table shows each prompt with the model's answer, and the pictures show the boxes."""
    monkeypatch.chdir(SAMPLES.parents[1])
    assert main(["demo", "--out", str(tmp_path / "shown")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = [line for line in out.splitlines() if line.startswith("scene_")]
    samples = read_samples(SAMPLES)
    assert len(rows) == sum(map(len, samples.values())) == 18
    model, _ = minivlm.load(SHIPPED)
    wanted = [
        (path.name, prompt, answer)
        for path, prompts in samples.items()
        for prompt, answer in zip(
            prompts,
            answer_all(model, processor, [Image.open(path)] * len(prompts), prompts, progress=False),
            strict=True,
        )
    ]
    for row, (name, prompt, answer) in zip(rows, wanted, strict=True):
        assert row.startswith(name)
        assert f" {prompt} " in row
        assert row.endswith(f" {answer}")
    for path in samples:
        plain, shown = Image.open(path), Image.open(tmp_path / "shown" / path.name)
        assert shown.size == (320, 320)
        enlarged = plain.resize(shown.size, Image.Resampling.BICUBIC)
        assert not np.array_equal(np.asarray(shown), np.asarray(enlarged))  # a box is drawn


def test_one_answer_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --model, the shipped model answers; boxes are in pixels of the picture."""
    _, examples = sample_scene(0)
    (detect,) = [example for example in examples if example.task == "detect"]
    path = SAMPLES / "scene_1.png"
    assert main(["ask", str(path), "--prompt", detect.prefix, "--json"]) == 0
    (box,) = json.loads(capsys.readouterr().out)["boxes"]
    (thing,) = detect.things
    assert box["name"] == thing.name
    assert np.abs(np.array(box["box"]) - 4 * np.array(thing.box)).max() < 16  # 4 pixels per unit
