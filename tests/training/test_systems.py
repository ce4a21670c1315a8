"""Training of the ways to let a language model see: one start for all, what learns, and stops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import assert_same_end
from torch import Tensor

from minivlm.cli import main
from minivlm.cli.train import RATES, RECIPE, SYSTEM_RECIPE, SYSTEMS
from minivlm.errors import InputError
from minivlm.models.load import load
from minivlm.training.loop import Loop
from minivlm.training.systems import SystemConfig, SystemRun, train_system
from minivlm.training.ways import WAYS, masked_word_loss, next_word_loss

SMALL = SystemConfig("clipcap", text_steps=2, steps=2, text_rows=2, rows=2, warmup_steps=1)
QUIET = Loop(save_every=1, log_every=1, measure_every=0, workers=0, progress=False)


@pytest.mark.parametrize("name", WAYS)
def test_all_ways_start_from_one_language_model_and_one_tower(name: str) -> None:
    """GPT-2, where a way does not have another one."""
    model = SystemRun(replace(SMALL, system=name)).model
    parts = {}
    if name not in ("visualbert", "llava", "llava-direct"):
        parts["language_model"] = SystemRun(SMALL).model.language_model
    if name != "simvlm":
        parts["vision_tower"] = load()[0].vision_tower
    assert parts
    for part, wanted in parts.items():
        state = model.get_submodule(part).state_dict()
        for key, tensor in wanted.state_dict().items():
            assert torch.equal(state[key], tensor)


@pytest.mark.parametrize("name", WAYS)
def test_all_ways_see_the_same_rows(name: str) -> None:
    """In its own words: placeholders, and the form of a chat."""
    runs = [SystemRun(config, workers=0) for config in (SMALL, replace(SMALL, system=name))]
    processors = [run.processor for run in runs]
    of_first, of_second = (list(run.batches()) for run in runs)
    assert len(of_first) == len(of_second) == 4
    for one, other in zip(of_first, of_second, strict=True):
        assert ("pixel_values" in one) == ("pixel_values" in other)
        if "pixel_values" in one:
            assert torch.equal(one["pixel_values"], other["pixel_values"])
        for row in range(2):
            answers = [
                processor.decode(batch["labels"][row][batch["labels"][row] != -100][None])
                for processor, batch in zip(processors, (one, other), strict=True)
            ]
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


@pytest.mark.parametrize("name", [name for name in WAYS if name not in ("visualbert", "cm3")])
def test_the_loss_is_that_of_all_scores(name: str) -> None:
    """Training leaves out the scores of words that it does not learn."""
    run = SystemRun(replace(SMALL, system=name, text_steps=0), workers=0)
    batch = next(run.batches())
    assert (batch["labels"] == -100).any()
    run.model.eval()  # a stem's norms take the statistics of a batch while they learn
    loss = WAYS[name].loss(run.model, batch, torch.Generator())
    torch.testing.assert_close(loss, run.model(**batch).loss, rtol=1e-6, atol=0)


def test_muon_has_the_matrices_of_linear_layers() -> None:
    run = SystemRun(replace(SMALL, system="flamingo"), workers=0)
    names = {id(weight): name for name, weight in run.model.named_parameters()}
    by_muon, by_adamw = (
        {names[id(weight)] for weight in run.optimizers[f"pictures_{kind}"].param_groups[0]["params"]}
        for kind in ("muon", "adamw")
    )
    assert by_muon | by_adamw == {name for name in names.values() if name.startswith(run.way.learns)}
    assert "gated_cross_attn_layers.0.attn.to_q.weight" in by_muon
    assert {"perceiver.latents", "gated_cross_attn_layers.0.attn_gate"} <= by_adamw


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

    def loss(batch: dict[str, Tensor], seed: int = 0) -> Tensor:
        return next_word_loss(decoder, batch, torch.Generator().manual_seed(seed))

    first, second = ({name: tensor[row : row + 1] for name, tensor in inputs.items()} for row in (0, 1))
    counts = inputs["attention_mask"].sum(dim=1) - 1  # every word but the first
    weighted = (loss(first) * counts[0] + loss(second) * counts[1]) / counts.sum()
    assert torch.allclose(loss(inputs), weighted, atol=1e-5)
    assert not torch.allclose(loss(inputs), loss(inputs, seed=1), atol=1e-5)  # another first position


def test_bert_guesses_hidden_words_and_sees_what_is_around_them() -> None:
    run = SystemRun(replace(SMALL, system="visualbert"), workers=0)
    encoder = run.model.language_model
    inputs = run.processor(None, ["caption en"] * 40, ["a red star"] * 40, padding_side="right")
    before = masked_word_loss(encoder, inputs, torch.Generator().manual_seed(0), 3)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
    for seed in range(40):
        optimizer.zero_grad()
        masked_word_loss(encoder, inputs, torch.Generator().manual_seed(seed), 3).backward()
        optimizer.step()
    after = masked_word_loss(encoder, inputs, torch.Generator().manual_seed(100), 3)
    assert after < before / 4  # one sentence can be known by heart


def test_llava_learns_in_two_stages() -> None:
    """The projector alone, from captions; then questions, those that the others see at the same time."""
    config = replace(SMALL, system="llava", text_steps=1, steps=8)
    assert config.stages == {"text": 1, "align": 2, "pictures": 6}
    run = SystemRun(config, workers=0)
    others = list(SystemRun(replace(config, system="clipcap"), workers=0).batches())
    for step, batch in enumerate(run.batches()):
        before = {key: tensor.clone() for key, tensor in run.model.named_parameters()}
        stage = run.stage
        run.advance(batch)
        moved = {
            key.split(".")[0]
            for key, tensor in run.model.named_parameters()
            if not torch.equal(tensor, before[key])
        }
        expected = {"text": {"language_model"}, "align": {"multi_modal_projector"}}
        assert moved == expected.get(stage, {"language_model", "multi_modal_projector"})
        assert run.place() == {"stage": stage}
        if step:
            assert torch.equal(batch["pixel_values"], others[step]["pixel_values"])
        if stage == "align":
            (text,) = set(run.processor.decode(batch["labels"][:1].clamp(min=0)))
            assert text.startswith(("a ", "an ", "one ", "two ", "three "))


def test_a_run_that_is_resumed_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_system(tmp_path / "whole", SMALL, loop=QUIET)
    advance = SystemRun.advance
    for stop in (1, 3):  # in either stage
        out = tmp_path / f"stopped {stop}"

        def until(run: SystemRun, batch: dict[str, Tensor], stop: int = stop) -> dict[str, float]:
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
    both = {name: default for numbers in RECIPE.values() for name, (default, _) in numbers.items()}
    assert all(getattr(SystemConfig("clipcap"), name) == both[name] for name in RATES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "3"], "--steps is of a system: add --system NAME, or leave it out"),
        (["--system", "clipcap", "--tower-width", "8"], "--tower-width is not of this system: leave it out"),
        (["--system", "clipcap", "--bf16"], "--bf16 is not of this system"),
        (["--system", "clipcap", "--muon-lr", "0"], "muon_lr is 0.0"),
    ],
)
def test_options_that_do_not_belong_together(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--out", str(tmp_path / "run"), *options]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_system_is_refused() -> None:
    with pytest.raises(InputError, match="there is no system 'blip': choose from visualbert, simvlm, "):
        SystemConfig("blip")
