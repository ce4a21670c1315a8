"""Training of the ways to let a language model see: one start for all, what learns, and stops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import assert_same_end

from minivlm.cli import main
from minivlm.cli.train import SYSTEM_RECIPE, SYSTEMS
from minivlm.errors import InputError
from minivlm.models.load import load
from minivlm.training import systems
from minivlm.training.loop import Loop
from minivlm.training.systems import WAYS, SystemConfig, SystemRun, language_model_loss, train_system

SMALL = SystemConfig("clipcap", text_steps=2, steps=2, text_rows=2, rows=2, warmup_steps=1)
QUIET = Loop(save_every=1, log_every=1, measure_every=0, workers=0, progress=False)


@pytest.mark.parametrize("name", WAYS)
def test_all_ways_start_from_one_language_model_and_one_tower(name: str) -> None:
    first, second = SystemRun(SMALL), SystemRun(replace(SMALL, system=name))
    shipped = load()[0]
    for part in ("language_model", *(("vision_tower",) if name != "simvlm" else ())):
        state = second.model.get_submodule(part).state_dict()
        wanted = first.model.get_submodule(part) if part == "language_model" else shipped.vision_tower
        for key, tensor in wanted.state_dict().items():
            assert torch.equal(state[key], tensor)


@pytest.mark.parametrize("name", WAYS)
def test_all_ways_see_the_same_rows(name: str) -> None:
    """Placeholders aside."""
    of_first, of_second = (
        list(SystemRun(config, workers=0).batches()) for config in (SMALL, replace(SMALL, system=name))
    )
    assert len(of_first) == len(of_second) == 4
    for one, other in zip(of_first, of_second, strict=True):
        assert ("pixel_values" in one) == ("pixel_values" in other)
        if "pixel_values" in one:
            assert torch.equal(one["pixel_values"], other["pixel_values"])
        for row in range(2):
            answers = [batch["labels"][row][batch["labels"][row] != -100].tolist() for batch in (one, other)]
            assert answers[0] == answers[1]
    assert ["pixel_values" in batch for batch in of_first] == [False, False, True, True]


@pytest.mark.parametrize("name", WAYS)
def test_only_what_should_learn_does(name: str) -> None:
    run = SystemRun(replace(SMALL, system=name), workers=0)
    before = {key: tensor.clone() for key, tensor in run.model.named_parameters()}
    for step, batch in enumerate(run.batches()):
        run.advance(batch)
        learns = ("language_model.",) if step < 2 else WAYS[name].learns
        moved = {key for key, tensor in run.model.named_parameters() if not torch.equal(tensor, before[key])}
        assert moved
        assert all(key.startswith(learns) for key in moved)
        assert name == "simvlm" or not any(key.startswith("vision_tower.") for key in moved)
        before = {key: tensor.clone() for key, tensor in run.model.named_parameters()}


def test_no_question_is_about_masks() -> None:
    run = SystemRun(replace(SMALL, text_rows=60, text_steps=1), workers=0)
    rows = next(iter(run.batches()))["input_ids"].tolist()
    texts = run.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)
    assert not [text for text in texts if text.startswith("segment")]
    assert [text for text in texts if text.startswith("detect")]


def test_a_language_model_reads_prompts_too() -> None:
    """Another prompt changes its loss beyond the words that follow."""
    run = SystemRun(SMALL, workers=0)
    inputs = run.processor(
        None, ["caption en", "is there a star?"], ["a red star", "no"], padding_side="right"
    )
    decoder = run.model.language_model
    whole = language_model_loss(decoder, inputs)
    cut = {name: tensor[:1] for name, tensor in inputs.items()}
    alone = language_model_loss(decoder, cut)
    other = language_model_loss(decoder, {name: tensor[1:] for name, tensor in inputs.items()})
    counts = inputs["attention_mask"].sum(dim=1) - 1  # every word but the first
    assert torch.allclose(whole, (alone * counts[0] + other * counts[1]) / counts.sum(), atol=1e-5)
    assert not torch.allclose(whole, language_model_loss(decoder, inputs, shift=5), atol=1e-5)


def test_a_run_that_is_resumed_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_system(tmp_path / "whole", SMALL, loop=QUIET)
    advance = SystemRun.advance
    for stop in (1, 3):  # in either stage
        out = tmp_path / f"stopped {stop}"

        def until(run: SystemRun, batch: systems.Inputs, stop: int = stop) -> dict[str, float]:
            if run.step == stop:
                raise RuntimeError
            return advance(run, batch)

        monkeypatch.setattr(SystemRun, "advance", until)
        with pytest.raises(RuntimeError):
            train_system(out, SMALL, loop=QUIET)
        monkeypatch.setattr(SystemRun, "advance", advance)
        train_system(out, SMALL, loop=replace(QUIET, resume=True))
        assert_same_end(out, tmp_path / "whole")


def test_the_command_trains_measures_and_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    small = "--text-steps 1 --steps 1 --text-rows 2 --rows 2 --warmup-steps 1 --workers 0 --measure-every 0"
    assert main(["train", "--system", "clipcap", "--out", str(out), *small.split()]) == 0
    assert f"minivlm eval --model {out}" in capsys.readouterr().out
    assert main(["ask", "figures/samples/scene_1.png", "--prompt", "caption en", "--model", str(out)]) == 0


def test_the_command_names_every_system_and_number() -> None:
    assert {name: way.about for name, way in WAYS.items()} == SYSTEMS
    for name, (default, _) in SYSTEM_RECIPE["with --system"].items():
        assert getattr(SystemConfig("clipcap"), name) == default


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "3"], "--steps is of a system: add --system NAME, or leave it out"),
        (["--system", "clipcap", "--tower-width", "8"], "--tower-width is not of a system: leave it out"),
        (["--system", "clipcap", "--bf16"], "--bf16 is not of a system"),
        (["--system", "clipcap", "--lr", "0"], "lr is 0.0"),
    ],
)
def test_options_that_do_not_belong_together(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--out", str(tmp_path / "run"), *options]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_system_is_refused() -> None:
    with pytest.raises(InputError, match="there is no system 'blip': choose from simvlm, cm3, "):
        SystemConfig("blip")
