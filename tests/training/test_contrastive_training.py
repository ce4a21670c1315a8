"""Two towers are trained: what moves and what does not, stops, other people's files, and refusals."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_equal
from safetensors.torch import load_file
from small_run import assert_same_end, log_of
from small_towers import EVERY, config, make_pairs, make_towers
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, SiglipModel

import minivlm
from minivlm.data.pairs import FilePairs, read_pairs
from minivlm.errors import InputError
from minivlm.losses import clip_loss, pair_logits
from minivlm.models.clip import CLIP
from minivlm.models.load import SHIPPED, load_answering
from minivlm.models.siglip import SigLIP
from minivlm.training import contrastive as contrastive_run
from minivlm.training.contrastive import ContrastiveRun, train_contrastive
from minivlm.training.contrastive_recipe import build, drawn_captions
from minivlm.world.captions import DrawnPairs
from minivlm.world.scenes import HELD_OUT_PAIRS, SEEN_PAIRS


def a_run(objective: str, teacher: Path | None = None, **changes: Any) -> ContrastiveRun:
    settings = config(objective, teacher=None if teacher is None else str(teacher), **changes)
    loaded = None if teacher is None else minivlm.load(teacher)
    return ContrastiveRun(settings, *build(settings), teacher=loaded, workers=0)


# What a step does


@pytest.mark.parametrize("objective", ["clip", "siglip", "lit", "distill"])
def test_the_loss_of_a_batch_falls(objective: str, tmp_path: Path) -> None:
    teacher = make_towers(tmp_path, seed=3) if objective == "distill" else None
    run = a_run(objective, teacher, steps=200, lr=0.003)
    batch = run.data[0]
    losses = [run.advance(batch)["loss"] for _ in range(60)]
    least = 0.0
    if run.teacher is not None:  # the entropy of the teacher's rows and columns
        least = float(_entropy(_logits(run.teacher, batch[1])))
    assert losses[-1] - least < 0.5 * (losses[0] - least)


def _logits(model: CLIP | SigLIP, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits_per_image


def _entropy(logits: Tensor) -> Tensor:
    rows = torch.distributions.Categorical(logits=logits).entropy().mean()
    return (rows + torch.distributions.Categorical(logits=logits.T).entropy().mean()) / 2


def test_the_loss_is_that_of_the_objective() -> None:
    """Of the towers before the step, with the temperature and the bias of where the papers start."""
    run = a_run("siglip")
    batch = run.data[0]
    logits = _logits(run.model, batch[0])
    assert run.model.logit_scale.item() == pytest.approx(2.302585)
    assert run.model.logit_bias.item() == -10
    signs = 2 * torch.eye(4) - 1
    wanted = -torch.nn.functional.logsigmoid(signs * logits).sum() / 4
    assert run.advance(batch)["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    run = a_run("clip")
    batch = run.data[0]
    logits = _logits(run.model, batch[0])
    right = torch.arange(4)
    wanted = torch.stack([torch.nn.functional.cross_entropy(x, right) for x in (logits, logits.T)]).mean()
    assert run.advance(batch)["loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_a_student_comes_nearer_to_its_teacher(tmp_path: Path) -> None:
    """In what it makes of a batch; the teacher itself stays as it is."""
    make_towers(tmp_path, "siglip", seed=3, tower_width=24, image_size=24)
    run = a_run("distill", tmp_path, steps=200, lr=0.01)
    assert isinstance(run.model, CLIP)
    assert isinstance(run.teacher, SigLIP)
    before = {name: tensor.clone() for name, tensor in run.teacher.state_dict().items()}
    with torch.no_grad():
        run.teacher.logit_scale.fill_(4.0)  # untrained towers see hardly a difference
    before["logit_scale"].fill_(4.0)
    student, teacher = batch = run.data[0]
    wanted = _logits(run.teacher, teacher).softmax(dim=1)
    far = (_logits(run.model, student).softmax(dim=1) - wanted).abs().max()
    for _ in range(60):
        run.advance(batch)
    near = (_logits(run.model, student).softmax(dim=1) - wanted).abs().max()
    assert near < 0.3 * far
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.teacher.state_dict().items())


def test_a_locked_tower_keeps_every_bit(tmp_path: Path) -> None:
    """It is the shipped model's. The head, the text tower, the temperature and the bias are trained."""
    train_contrastive(tmp_path, config("lit"), loop=EVERY)
    model, processor = minivlm.load(tmp_path)
    shipped, _ = load_answering(SHIPPED)
    start, _ = build(config("lit"))
    locked = shipped.vision_tower.state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith("vision_model."):
            assert torch.equal(tensor, locked[name.removeprefix("vision_model.")]), name
        elif "k_proj.bias" not in name:  # adds the same to all logits of a softmax
            assert not torch.equal(tensor, start.state_dict()[name]), name
    assert processor.image_processor.image_size == 64


def test_what_is_locked_of_a_siglip(tmp_path: Path) -> None:
    make_towers(tmp_path, "siglip", seed=3)
    source, _ = minivlm.load(tmp_path)
    model, _ = build(config("lit", model=str(tmp_path)))
    assert {name.partition(".")[0] for name, x in model.named_parameters() if x.requires_grad} == {
        "text_model",
        "logit_scale",
        "logit_bias",
    }
    assert torch.equal(model.head.probe, source.head.probe)


def test_bf16_computes_and_fp32_learns() -> None:
    run = a_run("siglip", bf16=True)
    before = run.model.text_model.head.weight.clone()
    batch = run.data[0]
    exact = a_run("siglip").advance(batch)["loss"]
    assert run.advance(batch)["loss"] == pytest.approx(exact, rel=0.02)
    assert run.working.text_model.head.weight.dtype == torch.bfloat16
    assert run.model.text_model.head.weight.dtype == torch.float32
    assert not torch.equal(run.model.text_model.head.weight, before)
    assert torch.equal(run.working.text_model.head.weight, run.model.text_model.head.weight.bfloat16())


def test_the_temperature_has_a_limit() -> None:
    run = a_run("clip", lr=1.0)
    with torch.no_grad():
        run.model.logit_scale.fill_(9.0)
    run.advance(run.data[0])
    assert run.model.logit_scale.exp().item() == pytest.approx(100)
    assert run.place() == {"temperature": 0.01}


# What is seen


def test_a_drawn_batch_has_no_caption_twice() -> None:
    processor = build(config())[1]
    data = DrawnPairs([processor], seed=1, steps=3, batch_size=100)
    pictures, captions = data.draw(2)
    assert len(set(captions)) == len(pictures) == 100
    assert data.draw(2)[1] == captions
    assert data.draw(1)[1] != captions
    named = {tuple(thing.split()[2:]) for caption in captions for thing in caption.split(", ")}
    assert named == set(SEEN_PAIRS)
    assert not named & HELD_OUT_PAIRS
    words = processor.tokenizer
    assert all(len(words.encode(caption)) == 5 * caption.count(",") + 4 for caption in captions)


def test_a_batch_of_a_file_has_no_line_twice(tmp_path: Path) -> None:
    processor = build(config())[1]
    processor.tokenizer.form = replace(processor.tokenizer.form, max_length=99)
    pairs = read_pairs(make_pairs(tmp_path), [processor.tokenizer])
    data = FilePairs(pairs, [processor], seed=1, steps=9, batch_size=4)
    seen = [[pair.line for pair in data.choose(step)] for step in range(4)]
    assert all(len(set(lines)) == 4 for lines in seen)
    assert len({*seen[0], *seen[1]}) == 8  # a round has two batches, and two lines wait
    assert seen[:2] != seen[2:]
    with pytest.raises(InputError, match=r"batch_size is 11, but there are 10 pairs: .* a smaller batch"):
        FilePairs(pairs, [processor], seed=1, steps=9, batch_size=11)


# Runs


@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_a_stopped_run_ends_like_one_that_was_not(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_contrastive(whole, config(objective), loop=EVERY)
    advance = ContrastiveRun.advance

    def stopping(run: ContrastiveRun, batch: Any) -> Any:
        if run.step == 3:
            raise RuntimeError("power cut")
        return advance(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveRun, "advance", stopping)
        with pytest.raises(RuntimeError, match="power cut"):
            train_contrastive(stopped, config(objective), loop=EVERY)
    train_contrastive(stopped, config(objective), loop=replace(EVERY, resume=True))
    assert_same_end(stopped, whole)
    with pytest.raises(InputError, match=r"other settings \(objective"):
        train_contrastive(stopped, config("lit"), loop=replace(EVERY, resume=True))


def test_transformers_reads_what_training_wrote(tmp_path: Path) -> None:
    """The same ids, pixels and logits, of a caption with other capitals and words that are not known."""
    captions = ["a small Red circle", "a large blue star, a medium pink square", "my new kite"]
    for objective, reference in (("clip", CLIPModel), ("siglip", SiglipModel)):
        folder = tmp_path / objective
        train_contrastive(folder, config(objective), loop=EVERY)
        model, processor = minivlm.load(folder)
        picture = DrawnPairs([processor], seed=9, steps=1, batch_size=1).draw(0)[0][0]
        inputs = processor([picture], captions)
        padding = "max_length" if objective == "siglip" else True
        theirs = AutoTokenizer.from_pretrained(folder)(captions, padding=padding, return_tensors="pt")
        assert torch.equal(inputs["input_ids"], theirs["input_ids"])
        pixels = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
        assert_equal(inputs["pixel_values"], pixels)
        with torch.no_grad():
            expected = reference.from_pretrained(folder)(theirs["input_ids"], pixels).logits_per_image
        assert_equal(_logits(model, inputs), expected)


def test_pairs_of_ones_own(tmp_path: Path) -> None:
    """Words of the file are tokens of new towers; equal captions count as one when it is measured."""
    data = make_pairs(tmp_path / "data")
    run = train_contrastive(tmp_path / "run", config(), data, data, loop=replace(EVERY, measure_every=3))
    assert len(run.processor.tokenizer.encode("gray NUMBER 7")) == 3
    assert len(build(config())[1].tokenizer.encode("gray NUMBER 7")) > 3
    lines = log_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    assert [line["epoch"] for line in lines] == [1, 1.5, 2, 3]
    assert all(0 <= line["text to image recall@1"] <= 1 for line in lines if line["step"] in (3, 6))
    assert lines[0]["bias"] != lines[-1]["bias"]
    with pytest.raises(InputError, match=r"other settings \(validation 10 pairs, \w+ -> no file\)"):
        train_contrastive(tmp_path / "run", config(), data, loop=replace(EVERY, resume=True))
    others = make_pairs(tmp_path / "others", lines=11)
    with pytest.raises(InputError, match=r"other settings \(data 10 pairs, \w+ -> 11 pairs"):
        train_contrastive(tmp_path / "run", config(), others, data, loop=replace(EVERY, resume=True))


def test_towers_of_a_folder_go_on(tmp_path: Path) -> None:
    make_towers(tmp_path / "start", "siglip", seed=7)
    start = load_file(tmp_path / "start" / "model.safetensors")
    settings = config(model=str(tmp_path / "start"), lr=1e-9)
    train_contrastive(tmp_path / "run", settings, loop=replace(EVERY, measure_every=6))
    assert log_of(tmp_path / "run")[0]["step"] == 0  # measured before the first step
    end = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.allclose(tensor, end[name], atol=1e-7, rtol=0) for name, tensor in start.items())


def test_another_teacher_under_the_same_name(tmp_path: Path) -> None:
    make_towers(tmp_path / "teacher", "clip")
    settings = config("distill", teacher=str(tmp_path / "teacher"))
    train_contrastive(tmp_path / "run", settings, loop=EVERY)
    train_contrastive(tmp_path / "run", settings, loop=replace(EVERY, resume=True))
    make_towers(tmp_path / "teacher", "clip", seed=9)
    with pytest.raises(InputError, match=r"other settings \(teacher's weights (\w+) -> (?!\1)\w+\)"):
        train_contrastive(tmp_path / "run", settings, loop=replace(EVERY, resume=True))


# Refusals


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ("clip", {"batch_size": 1}, "batch_size is 1, .* a softmax over one caption is 1 .* always 0"),
        ("siglip", {"batch_size": 1}, "batch_size is 1, .* the answer always yes"),
        ("clip", {"batch_size": 0}, "batch_size is 0: choose a number from 1"),
        ("siglip", {"lr": float("nan")}, "lr is nan"),
        ("siglip", {"steps": 0}, "steps is 0"),
        ("siglip", {"lr": 0.0}, "lr is 0.0: choose a number from 1e-09"),
        ("siglip", {"clip": 0.0}, "clip is 0.0: choose a number from 0.001"),
        ("siglip", {"text_width": 2**20}, "text_width is 1048576: choose a number from 1 to 8192"),
        ("siglip", {"image_size": 20}, "does not divide into patches of 8"),
        ("siglip", {"tower_width": 18}, "tower_width is 18: choose a multiple of 4"),
        ("distill", {}, "learns from a teacher: give the folder"),
        ("clip", {"teacher": "x"}, "clip has no teacher"),
        ("clap", {}, "there is no objective 'clap': choose from clip, siglip, lit, distill"),
    ],
)
def test_configs_that_are_refused(objective: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(objective, **changes)


def test_captions_longer_than_the_context() -> None:
    """Seen before the first step, since not every batch has a picture of five things."""
    with pytest.raises(InputError, match="has 24 tokens, but the model reads at most 19"):
        a_run("siglip", max_length=20)


def test_folders_of_another_kind(tmp_path: Path) -> None:
    clip = str(make_towers(tmp_path / "clip", "clip"))
    cases = [
        (config("siglip", model=clip), "holds a CLIP, and siglip trains a SigLIP"),
        (config("clip", model=str(SHIPPED)), "holds a PaliGemma, and clip trains a CLIP"),
        (config("lit", model=clip), "holds a CLIP, and lit locks the image tower of a PaliGemma or a SigLIP"),
        (config("distill", teacher=str(SHIPPED)), "holds a PaliGemma, and a teacher has two towers"),
    ]
    for settings, message in cases:
        with pytest.raises(InputError, match=message):
            train_contrastive(tmp_path / "run", settings, loop=EVERY)
    with pytest.raises(InputError, match="holds the model that training needs"):
        train_contrastive(tmp_path / "clip", config("clip", model=clip), loop=EVERY)


def test_unequal_numbers_of_pictures_and_texts() -> None:
    run = a_run("clip")
    batch = run.data[0]
    batch[0]["input_ids"] = batch[0]["input_ids"][:3]
    with pytest.raises(ValueError, match="4 pictures and 3 texts"):
        run.advance(batch)


def test_a_picture_that_has_gone_since_it_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_pairs(tmp_path / "data")
    monkeypatch.setattr(
        contrastive_run,
        "read_pairs",
        lambda *args: [read_pairs(*args), (tmp_path / "data" / "4.png").unlink()][0],
    )
    with pytest.raises(InputError, match=r"line 5: .*4.png: no such file"):
        train_contrastive(tmp_path / "run", config(), data, loop=replace(EVERY, save_every=1))


def test_a_run_that_diverges(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape("such as --lr 5e+08")):
        train_contrastive(tmp_path, config("siglip", lr=1e9), loop=EVERY)


def test_a_temperature_that_no_number_holds() -> None:
    run = a_run("siglip")
    with torch.no_grad():
        run.model.logit_scale.fill_(-1e6)
    assert run.place()["temperature"] == float("inf")


def test_every_word_of_the_drawn_world_is_a_token() -> None:
    tokenizer = build(config())[1].tokenizer
    for caption in drawn_captions():
        assert len(tokenizer.encode(caption)) == len(re.findall(r"\w+|,", caption))
    assert tokenizer.vocab_size < 400  # no words for places and outlines


def test_matching_embeddings_have_no_loss() -> None:
    """The reading of rows and columns: a batch that fits perfectly has the least loss."""
    embeds = torch.eye(5)
    assert clip_loss(embeds, embeds, torch.tensor(4.6)) < 1e-3
    assert pair_logits(embeds, embeds, torch.tensor(0.0)).trace() == 5
