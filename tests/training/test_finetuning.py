"""A loaded model learns from a user's pictures, and what decides the result is what is said to decide it."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import load_file
from small_run import CONFIG, Stop, files, step_of
from torch import Tensor
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

import minivlm
from minivlm.data.samples import Sample, SampleBatches, make_inputs, read_samples
from minivlm.errors import InputError
from minivlm.training import finetuning
from minivlm.training.finetuning import Finetuning, FinetuningConfig, finetune
from minivlm.training.log import log_as_json, read_log
from minivlm.training.loop import Loop, run_to_end
from minivlm.training.recipe import build
from minivlm.training.trainable import Diverged

WORDS = {"red": "ruby", "green": "a leaf in the wind", "blue": "<loc0000><loc0000><loc1023><loc1023> sea"}
EVERY = Loop(save_every=3, log_every=2, measure_every=4, progress=False)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model far too small to know anything."""
    folder = tmp_path_factory.mktemp("start")
    for part in build(CONFIG):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of one color each, and new words for the colors, of different lengths."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(12):
        color = list(WORDS)[number % 3]
        pixels = np.full((40, 60, 3), ImageColor.getrgb(color)) + rng.integers(-40, 40, (40, 60, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "prefix": "what color?", "suffix": WORDS[color]})
    write(folder / "train.jsonl", lines[:9])
    write(folder / "validation.jsonl", lines[9:])
    return folder


def write(path: Path, lines: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def config(start: Path) -> FinetuningConfig:
    return FinetuningConfig(model=str(start), epochs=2, batch_size=2, bf16=False)  # 9 steps


@pytest.fixture(scope="module")
def whole(start: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    config = FinetuningConfig(model=str(start), epochs=2, batch_size=2, bf16=False)
    finetune(folder, config, data / "train.jsonl", data / "validation.jsonl", loop=EVERY)
    return folder


def prepared(config: FinetuningConfig, data: Path, **options: Any) -> Finetuning:
    model, processor = minivlm.load(config.model)
    samples = read_samples(data / "train.jsonl", processor, 512)
    return Finetuning(config, model, processor, samples, **options)


def assert_same_end(folder: Path, whole: Path) -> None:
    for name in ("model.safetensors", "state.safetensors"):
        ours, wanted = load_file(folder / name), load_file(whole / name)
        assert ours.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(ours[key], wanted[key])] == []
    assert read_log(folder / "log.csv") == read_log(whole / "log.csv")


# What is learned


def test_new_words_are_learned(start: Path, data: Path, tmp_path: Path) -> None:
    """And the folder opens here and in transformers, with the same answers."""
    config = FinetuningConfig(model=str(start), steps=60, batch_size=9, lr=0.01)
    finetune(tmp_path, config, data / "train.jsonl", data / "validation.jsonl", loop=Loop(measure_every=30))
    first, *_, last = read_log(tmp_path / "log.csv")
    assert (first["step"], first["exact match"]) == (0, 0)
    assert first["validation loss"] > 5
    assert last["exact match"] == 1
    assert last["validation loss"] < 0.3
    model, processor = minivlm.load(tmp_path)
    reference = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    reference_processor = AutoProcessor.from_pretrained(tmp_path)
    for number, color in enumerate(WORDS, start=9):
        picture = Image.open(data / f"{number}.png")
        ids = model.generate(**processor([picture], ["what color?"]), max_new_tokens=16)
        assert processor.decode(ids) == [WORDS[color]]
        inputs = reference_processor(images=picture, text="<image>what color?", return_tensors="pt")
        theirs = reference.generate(**inputs, max_new_tokens=16, do_sample=False)
        new = theirs[0, inputs["input_ids"].shape[1] :]
        assert ids[0].tolist()[: len(new)] == new.tolist()


def test_the_loss_is_that_of_paligemma(config: FinetuningConfig, data: Path) -> None:
    """Over the answers' tokens and <eos> alone, read from left to right, after a prefix seen in full."""
    run = prepared(config, data, workers=0)
    (batch,) = next(iter(run.batches()))
    reference = PaliGemmaForConditionalGeneration.from_pretrained(config.model)
    theirs = reference(**batch).loss.item()
    assert run.advance([batch])["loss"] == pytest.approx(theirs, rel=1e-5)
    answers = [run.samples[number].suffix for number in order(config, 9)[:2]]
    tokenizer = run.processor.tokenizer
    taught = [[index for index in row if index != -100] for row in batch["labels"].tolist()]
    assert taught == [[*tokenizer.encode(answer), tokenizer.eos_id] for answer in answers]


def test_the_exact_match_is_that_of_generated_answers(config: FinetuningConfig, data: Path) -> None:
    """Half-trained, where some answers are right and some are wrong."""
    run = prepared(replace(config, steps=24, epochs=None, batch_size=9, lr=0.01), data, workers=0)
    run.validation = run.samples
    shares = set()
    for batch in run.batches():
        run.advance(batch)
        right = 0
        for sample in run.samples:
            inputs = run.processor(sample.paths, [sample.prefix])
            answer = run.processor.decode(run.model.generate(**inputs, max_new_tokens=24))[0]
            right += answer == sample.suffix
        assert run.measure()["exact match"] == pytest.approx(right / 9)
        shares.add(right)
    assert len(shares) > 1


def test_the_validation_loss_is_a_mean_over_tokens(config: FinetuningConfig, data: Path) -> None:
    run = prepared(config, data, workers=0)
    run.validation = run.samples
    inputs = make_inputs(run.processor, run.samples)
    wanted = run.model(**inputs).loss.item()
    assert run.measure()["validation loss"] == pytest.approx(wanted, rel=1e-5)  # in batches of 2, 2, 2, 2, 1


# The order of the examples


def order(config: FinetuningConfig, examples: int, epoch: int = 0) -> list[int]:
    return np.random.default_rng([config.seed, epoch]).permutation(examples).tolist()


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 1), (4, 1), (2, 2), (2, 4), (5, 1), (20, 1)])
def test_every_epoch_shows_every_example_once(batch_size: int, accumulate: int) -> None:
    samples = [Sample(n, (str(n),), (Path(str(n)),), "", "") for n in range(9)]
    batches = SampleBatches(samples, None, seed=3, rows=18, batch_size=batch_size, accumulate=accumulate)  # type: ignore[arg-type]
    seen: list[list[list[int]]] = []
    for step in range(len(batches)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "minivlm.data.samples.make_inputs", lambda processor, rows: [sample.line for sample in rows]
            )
            seen.append(batches[step])
    rows = [line for step in seen for batch in step for line in batch]
    assert sorted(rows[:9]) == sorted(rows[9:]) == list(range(9))
    assert rows[:9] != rows[9:]
    assert all(len(batch) == batch_size for step in seen for batch in step[:-1])
    assert all(len(step) == accumulate for step in seen[:-1])
    assert all(len(batch) > 0 for step in seen for batch in step)


def test_a_pickled_copy_gives_the_same_batches(config: FinetuningConfig, data: Path) -> None:
    """Which is what a worker process gets where processes do not fork."""
    processor = minivlm.load(config.model)[1]
    samples = read_samples(data / "train.jsonl", processor, 512)
    batches = SampleBatches(samples, processor, seed=0, rows=9, batch_size=2, accumulate=1)
    (ours,), (wanted,) = pickle.loads(pickle.dumps(batches))[1], batches[1]
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_the_word_for_an_empty_answer_is_trained(
    config: FinetuningConfig, data: Path, tmp_path: Path
) -> None:
    lines = (data / "train.jsonl").read_text().splitlines()[:2]
    write(tmp_path / "train.jsonl", [json.loads(line) | {"suffix": ""} for line in lines])
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    config = replace(config, epochs=1, empty_answer="none")
    run = finetune(tmp_path / "out", config, tmp_path / "train.jsonl", tmp_path / "train.jsonl")
    assert [sample.suffix for sample in (*run.samples, *run.validation)] == ["none"] * 4


def test_epochs_and_steps(config: FinetuningConfig, data: Path) -> None:
    def steps(**changes: Any) -> int:
        return prepared(replace(config, **changes), data).total_steps

    assert steps() == 9
    assert steps(epochs=None) == 45
    assert steps(epochs=1) == 5
    assert steps(epochs=1, batch_size=3, accumulate=3) == 1
    assert steps(epochs=None, steps=7) == 7
    assert steps(epochs=None, steps=7, accumulate=5) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(
    workers: int, config: FinetuningConfig, data: Path, whole: Path, tmp_path: Path
) -> None:
    loop = replace(EVERY, workers=workers)
    finetune(tmp_path, config, data / "train.jsonl", data / "validation.jsonl", loop=loop)
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("large", [False, True])
def test_what_a_large_model_changes(
    large: bool, config: FinetuningConfig, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lower rate, and memory that goes back when it is freed."""
    called: list[bool] = []
    monkeypatch.setattr(finetuning, "return_freed_memory", lambda: called.append(True))
    monkeypatch.setattr(finetuning, "LARGE", 1e3 if large else 1e8)
    assert prepared(config, data).lr == Finetuning.rates[large]
    assert called == [True] * large


def test_another_seed_gives_another_order(
    config: FinetuningConfig, data: Path, whole: Path, tmp_path: Path
) -> None:
    finetune(tmp_path, replace(config, seed=1), data / "train.jsonl", loop=EVERY)
    ours, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path, whole))
    assert not all(torch.equal(ours[name], wanted[name]) for name in wanted)


# Steps


def gradients(run: Finetuning, monkeypatch: pytest.MonkeyPatch) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of the first step, which are left where they are."""
    with monkeypatch.context() as patch:
        patch.setattr("minivlm.training.finetuning.MAX_GRADIENT_NORM", 1e9)
        loss = run.advance(next(iter(run.batches())))["loss"]
    return loss, {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulating_equals_the_larger_batch(
    accumulate: int, config: FinetuningConfig, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are of different lengths, so that a mean of means would be another number."""
    large = prepared(replace(config, batch_size=8), data, workers=0)
    wanted_loss, wanted = gradients(large, monkeypatch)
    small = replace(config, batch_size=8 // accumulate, accumulate=accumulate)
    loss, ours = gradients(prepared(small, data, workers=0), monkeypatch)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (ours[name] - gradient).abs().max() <= 1e-6 * max(1.0, float(gradient.abs().max())), name


def test_accumulating_in_bf16_adds_in_fp32(
    config: FinetuningConfig, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(replace(config, accumulate=4, bf16=True), data, workers=0)
    before = {name: tensor.clone() for name, tensor in run.masters.state_dict().items()}
    _, ours = gradients(run, monkeypatch)
    assert {tensor.dtype for tensor in run.working.state_dict().values() if tensor.is_floating_point()} == {
        torch.bfloat16
    }
    assert {gradient.dtype for gradient in ours.values()} == {torch.float32}
    assert any(not torch.equal(gradient, gradient.bfloat16().float()) for gradient in ours.values())
    for name, tensor in run.masters.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(run.working.state_dict()[name], tensor.to(run.working.state_dict()[name].dtype))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("freeze", [("tower",), ("decoder",), ("tower", "decoder"), ()])
def test_what_is_frozen_stays_bit_for_bit(
    freeze: tuple[str, ...], bf16: bool, config: FinetuningConfig, data: Path, tmp_path: Path
) -> None:
    config = replace(config, freeze=freeze, bf16=bf16, epochs=1)
    finetune(tmp_path, config, data / "train.jsonl", loop=EVERY)
    before, after = (load_file(Path(f) / "model.safetensors") for f in (config.model, tmp_path))
    prefixes = {"tower": "vision_tower.", "decoder": "language_model."}
    frozen = tuple(prefixes[part] for part in freeze)
    parts = {name.split(".")[0] + "." for name in before}
    assert parts == {"vision_tower.", "language_model.", "multi_modal_projector."}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith(frozen) for name in changed if frozen)
    for part in parts - set(frozen):
        assert any(name.startswith(part) for name in changed)


def test_warm_up_and_decay(config: FinetuningConfig, data: Path) -> None:
    run = prepared(replace(config, lr=0.5, warmup_steps=3), data)
    rates = []
    for run.step in range(9):
        rates.append(run.learning_rate())
    assert rates == pytest.approx([0.5 * f for f in (1 / 3, 2 / 3 * 8 / 9, 7 / 9, 6 / 9, 5 / 9)] + [
        0.5 * f / 9 for f in (4, 3, 2, 1)
    ])  # fmt: skip
    assert prepared(config, data).lr == 1e-3
    run = prepared(replace(config, lr=1.0, steps=400, epochs=None), data)
    run.step = 9
    assert run.learning_rate() == pytest.approx(0.5 * (1 - 9 / 400))  # a twentieth of the steps


def test_the_picture_matters_to_the_gradient(config: FinetuningConfig, data: Path) -> None:
    """The whole model is trained, also the tower's first layer."""
    run = prepared(config, data, workers=0)
    run.advance(next(iter(run.batches())))
    assert all(parameter.grad is not None for parameter in run.model.parameters())
    assert float(run.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().max()) > 0


def test_a_frozen_tower_needs_no_gradient(
    config: FinetuningConfig, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = gradients(prepared(replace(config, freeze=("tower",)), data, workers=0), monkeypatch)
    assert not any(name.startswith("vision_tower.") for name in ours)


# Stopped and resumed


@pytest.mark.parametrize("number", [2, 5, 9])
def test_a_run_that_broke_off_ends_the_same(
    number: int,
    config: FinetuningConfig,
    data: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = torch.optim.AdamW.step
    calls = 0

    def stopping(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = step(optimizer, *args)
        if calls == number:
            raise Stop
        return result

    paths = (data / "train.jsonl", data / "validation.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stopping)
        with pytest.raises(Stop):
            finetune(tmp_path, config, *paths, loop=replace(EVERY, save_every=1 if number == 2 else 3))
    finetune(tmp_path, config, *paths, loop=replace(EVERY, resume=True))
    assert_same_end(tmp_path, whole)


def test_what_may_not_change_is_named(
    config: FinetuningConfig, data: Path, whole: Path, start: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole, tmp_path / "copied")
    others = shutil.copytree(data, tmp_path / "data")
    lines = (others / "train.jsonl").read_text().splitlines()
    (others / "train.jsonl").write_text("\n".join(lines[1:]))
    changed = replace(config, lr=0.5, freeze=("tower",))
    with pytest.raises(InputError) as caught:
        finetune(folder, changed, others / "train.jsonl", others / "train.jsonl", loop=Loop(resume=True))
    assert "(data 9 examples, " in str(caught.value)
    assert "-> 8 examples, " in str(caught.value)
    assert "freeze [] -> ['tower'], lr None -> 0.5, validation 3 examples, " in str(caught.value)
    # The same data, model and settings by other paths are the same.
    other = replace(config, model=str(start / ".." / start.name))
    moved = shutil.copytree(data, tmp_path / "moved")
    lines = (moved / "train.jsonl", moved / "validation.jsonl")
    finetune(folder, other, *lines, loop=Loop(resume=True))
    # Another picture under the same name is not, whichever file it belongs to.
    for changed_picture, name in (("3.png", "data 9"), ("10.png", "validation 3")):
        again = shutil.copytree(data, tmp_path / name)
        shutil.copy(again / "0.png", again / changed_picture)
        lines = (again / "train.jsonl", again / "validation.jsonl")
        with pytest.raises(
            InputError, match=rf"other settings \({name} examples, (\w+) -> \d examples, \w+\)"
        ):
            finetune(folder, config, *lines, loop=Loop(resume=True))


def test_the_result_may_not_overwrite_its_start(config: FinetuningConfig, data: Path, start: Path) -> None:
    before = {name: (start / name).read_bytes() for name in files(start)}
    for out in (start, start / ".." / start.name):
        with pytest.raises(InputError, match="is the model that training starts from: choose another folder"):
            finetune(out, config, data / "train.jsonl")
    assert {name: (start / name).read_bytes() for name in files(start)} == before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_breaks_during_training(
    workers: int, config: FinetuningConfig, data: Path, whole: Path, tmp_path: Path
) -> None:
    """It is named with its line, without a traceback of another process; mended, training goes on."""
    others = shutil.copytree(data, tmp_path / "data")
    row = order(config, 9)[7]
    broken = others / f"{row}.png"
    content = broken.read_bytes()
    model, processor = minivlm.load(config.model)
    samples = read_samples(others / "train.jsonl", processor, 512)
    run = Finetuning(config, model, processor, samples, workers=workers)
    broken.write_bytes(content[:100])
    with pytest.raises(InputError, match=rf"^line {row + 1}: .*{row}.png is truncated or damaged") as caught:
        run_to_end(run, tmp_path, Loop(log_every=1, measure_every=0, save_every=2, progress=False))
    assert "Traceback" not in str(caught.value)
    assert str(caught.value).endswith(f"--resume goes on from step 2, saved in {tmp_path}")
    assert run.step == 3
    broken.write_bytes(content)
    finetune(tmp_path, config, others / "train.jsonl", loop=replace(EVERY, resume=True))
    ours, wanted = load_file(tmp_path / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())


def test_a_learning_rate_that_diverges(config: FinetuningConfig, data: Path, tmp_path: Path) -> None:
    wanted = r"is not a number at step \d: try a lower learning rate in a new folder, such as --lr 2e\+09"
    with pytest.raises(Diverged, match=wanted):
        finetune(tmp_path, replace(config, lr=4e9), data / "train.jsonl", loop=replace(EVERY, save_every=100))
    assert not (tmp_path / "model.safetensors").exists()


# What is left behind, and what is refused


def test_the_folder(whole: Path) -> None:
    model = {"config.json", "generation_config.json", "model.safetensors"}
    model |= {"tokenizer.json", "tokenizer_config.json"}
    run = {"state.safetensors", "log.csv", "loss.png"}
    assert files(whole) == model | run | {"preprocessor_config.json"}
    assert step_of(whole) == 9
    columns = json.loads(log_as_json(whole / "log.csv"))
    assert list(columns) == ["step", "epoch", "loss", "adamw_lr", "validation loss", "exact match"]
    assert columns["step"] == [0, 2, 4, 6, 8, 9]
    assert columns["epoch"] == [0, 0.44, 0.89, 1.33, 1.78, 2]
    assert [value is not None for value in columns["exact match"]] == [True, False, True, False, True, True]


def test_without_validation_nothing_is_measured(config: FinetuningConfig, data: Path, tmp_path: Path) -> None:
    finetune(tmp_path, config, data / "train.jsonl", loop=EVERY)
    assert "exact match" not in read_log(tmp_path / "log.csv")[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0: choose a number from 1"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 3, "epochs": 3}, "epochs and steps are both given"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"accumulate": -1}, "accumulate is -1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": -1.0}, "lr is -1.0: choose a number from 1e-09"),
        ({"lr": 0.0}, "lr is 0.0: choose a number from 1e-09"),  # nothing would be learned, without a word
        ({"batch_size": 2**20}, "batch_size is 1048576: choose a number from 1 to 65536"),
        ({"warmup_steps": 0}, "warmup_steps is 0"),
        ({"max_length": 0}, "max_length is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"freeze": ("head",)}, "'head' cannot be frozen: choose from tower, decoder"),
    ],
)
def test_numbers_that_nothing_can_be_trained_with(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FinetuningConfig(**changes)


def test_bad_lines_are_refused_before_anything_is_written(
    config: FinetuningConfig, data: Path, tmp_path: Path
) -> None:
    others = shutil.copytree(data, tmp_path / "data")
    with (others / "train.jsonl").open("a") as file:
        file.write("{\n")
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"train.jsonl has 1 bad line: line 10: not JSON"):
        finetune(out, config, others / "train.jsonl")
    assert files(out) == set()
    warnings: list[object] = []
    run = finetune(out, config, others / "train.jsonl", warn=warnings.append, loop=EVERY)
    assert len(warnings) == 1
    assert len(run.samples) == 9


def test_a_limit_below_the_context(config: FinetuningConfig, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has 9 bad lines: .* over the limit of 20"):
        finetune(tmp_path, replace(config, max_length=20), data / "train.jsonl")
    write(tmp_path / "long.jsonl", [{"image": str(data / "1.png"), "prefix": "p", "suffix": "w " * 600}])
    with pytest.raises(InputError, match=r"over the limit of 512"):
        finetune(tmp_path / "out", replace(config, max_length=9000), tmp_path / "long.jsonl")


def test_settings_can_be_written_down(config: FinetuningConfig, data: Path) -> None:
    """The defaults too; they are in the state as JSON."""
    settings = prepared(config, data).settings()
    assert settings.keys() == asdict(config).keys() | {"data", "validation"}
    assert json.loads(json.dumps(settings))["data"].startswith("9 examples, ")
