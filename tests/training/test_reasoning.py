"""Runs on rewards: what a step learns from, stops of every kind, and the command."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import Stop, assert_same_end, files, log_of

from minivlm.cli import main
from minivlm.errors import InputError
from minivlm.evaluation.composed import make_composed
from minivlm.evaluation.continued import answer_ids
from minivlm.models.load import SHIPPED, load
from minivlm.processing import box_to_tokens
from minivlm.training import reasoning
from minivlm.training.collapse import WINDOW, Watch
from minivlm.training.loop import Loop
from minivlm.training.reasoning import Collapsed, ReasoningRun, train_reasoning
from minivlm.training.reasoning_recipe import ReasoningConfig
from minivlm.training.rewards import REWARDS, Answer
from minivlm.training.supervised import Shown, answer_weights, supervised_loss

QUESTION = make_composed("vertical", 1, thinks=True)[0]
SMALL = ReasoningConfig(
    supervised_steps=2, rewarded_steps=4, rows=3, prompts=4, group=4, warmup_steps=1, temperature=2.0
)
EVERY = Loop(save_every=1, log_every=1, measure_every=0, workers=0, progress=False)


def steps_of(config: ReasoningConfig) -> tuple[ReasoningRun, list[dict[str, float]]]:
    run = ReasoningRun(config)
    return run, [run.advance(batch) for batch in run.batches()]


# What a step learns


def test_a_run_moves_all_but_the_tower() -> None:
    run, numbers = steps_of(SMALL)
    assert [set(one) for one in numbers[:2]] == [{"supervised"}] * 2
    assert all(
        one.keys() >= {"reward", "accuracy", "entropy", "mixed", "length", "endless"} for one in numbers[2:]
    )
    shipped, _ = load()
    old = dict(shipped.named_parameters())
    moved = {
        name for name, weight in run.masters["model"].named_parameters() if not torch.equal(weight, old[name])
    }
    assert any(name.startswith("multi_modal_projector") for name in moved)
    assert any(name.startswith("language_model") for name in moved)
    assert not any(name.startswith("vision_tower") for name in moved)


def test_rates_are_those_of_the_step_also_where_no_group_teaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        reasoning, "mixed_groups", lambda rewards: torch.zeros(len(rewards), dtype=torch.bool)
    )
    run = ReasoningRun(replace(SMALL, supervised_steps=0, rewarded_steps=3, warmup_steps=4))
    rates = []
    for batch in run.batches():
        run.advance(batch)
        rates.append([run.optimizers[name].param_groups[0]["lr"] for name in ("supervised", "rewarded")])
    assert rates == [[0, share * SMALL.lr] for share in (0.25, 0.5, 0.75)]


def test_better_answers_become_more_probable() -> None:
    """Twenty steps on rewards alone, after few true answers, are enough to see it."""
    config = replace(
        SMALL, supervised_steps=14, rows=24, rewarded_steps=20, prompts=12, group=6, temperature=1.0, lr=1e-3
    )
    _, numbers = steps_of(config)
    first, last = (sum(one["accuracy"] for one in part) / 5 for part in (numbers[14:19], numbers[-5:]))
    assert last > first + 0.05


def test_the_reference_is_where_rewards_begin() -> None:
    run, numbers = steps_of(replace(SMALL, kl=0.1, lr=2e-3))
    assert numbers[2]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert numbers[-1]["kl"] > 1e-3
    began, _ = steps_of(replace(SMALL, rewarded_steps=0))
    reference = run.masters["reference"]
    for name, weight in began.masters["model"].named_parameters():
        assert torch.equal(reference.get_parameter(name), weight)
    assert not any(weight.requires_grad for weight in reference.parameters())


def test_ratios_leave_the_clip_range_with_the_second_update() -> None:
    _, once = steps_of(replace(SMALL, lr=5e-3))
    _, again = steps_of(replace(SMALL, lr=5e-3, updates=3))
    assert all(one.get("clipped", 0.0) == 0 for one in once)
    assert max(one.get("clipped", 0.0) for one in again) > 0


def test_rehearsal_has_a_loss_of_its_own() -> None:
    _, numbers = steps_of(replace(SMALL, rehearsal=2))
    assert all("rehearsed" in one for one in numbers)


def test_supervised_weights() -> None:
    _, processor = load()
    box = box_to_tokens((1, 2, 30, 40), 64, 64)
    rows = [Shown("", "p", f"{box} red circle ; {box} blue star ; yes"), Shown("", "p", "blue star")]
    tokens, real = answer_ids(processor, ["p", "p"], [row.answer for row in rows])
    weights = answer_weights(processor, rows, tokens, real)
    # A box of four words and a name of two, then ";" and a space, which are pieces of their own.
    thought = [*(3, 1, 1, 1, 1, 1, 1, 1), *(3, 1, 1, 1, 1, 1, 1, 1), *(3, 3)]
    assert weights[0, 0].tolist() == thought
    assert weights[1, 0].tolist() == [3, 3, 3] + [0] * (len(thought) - 3)


@torch.no_grad()
def test_the_supervised_loss() -> None:
    """Without boxes, the mean of log-probabilities; near to a coordinate is better than far away."""
    model, processor = load()
    questions = make_composed("color", 3) + make_composed("count", 2)
    rows = [Shown(one.picture, one.example.prefix, one.example.suffix) for one in questions]
    whole = model(**processor([r.picture for r in rows], [r.prompt for r in rows], [r.answer for r in rows]))
    assert supervised_loss(model, processor, rows).item() == pytest.approx(whole.loss.item(), rel=1e-4)
    thing = QUESTION.scene.things[0]
    losses = [
        supervised_loss(
            model,
            processor,
            [
                Shown(
                    QUESTION.picture,
                    f"detect {thing.name}",
                    f"{box_to_tokens([edge + off for edge in thing.box], 64, 64)} {thing.name}",
                )
            ],
        )
        for off in (0.0, 0.5, 4.0)
    ]
    assert losses[0] < losses[1] < losses[2]


def test_any_model_that_answers() -> None:
    """Chats, and image tokens as many as a picture asks for."""
    for name in ("llava", "qwen2_5_vl", "flamingo"):
        config = replace(
            SMALL, model=str(SHIPPED.parent / "miniatures" / name), supervised_steps=1, rewarded_steps=1
        )
        _, numbers = steps_of(config)
        assert numbers[0]["supervised"] > 0
        assert 0 <= numbers[1]["accuracy"] <= 1


# Rewards


def thought(first: Any = None, second: Any = None, end: str | None = None) -> Answer:
    """The true answer, with other boxes or another end."""
    truth = QUESTION.example.suffix.rpartition(" ; ")[2]
    pointed = [
        f"{box_to_tokens(other or thing.box, 64, 64)} {thing.name}"
        for other, thing in zip((first, second), QUESTION.example.things, strict=True)
    ]
    text = " ; ".join([*pointed, end or truth])
    return Answer(text, 17, True)


def worth(answer: Answer) -> dict[str, float]:
    return {name: round(reward(QUESTION, answer), 2) for name, reward in REWARDS.items()}


def test_what_answers_are_worth() -> None:
    truth = QUESTION.example.suffix.rpartition(" ; ")[2]
    other = {"yes": "no", "no": "yes"}[truth]
    boxes = [thing.box for thing in QUESTION.example.things]
    true = worth(thought())
    assert true["true_boxes"] > 0.95
    wanted = {"right": 1, "form": 1, "true_boxes": true["true_boxes"], "follows": 1}
    assert true == wanted | {"length": -1.7, "boxes": 0.5}
    assert worth(thought(end=other)) == true | {"right": 0, "follows": 0}
    exchanged = worth(thought(*boxes[::-1]))
    assert (exchanged["right"], exchanged["follows"]) == (1, 0)
    assert exchanged["true_boxes"] < 0.1
    assert worth(thought(*boxes[::-1], end=other))["follows"] == 1
    cut = worth(thought()._replace(ended=False))
    assert (cut["right"], cut["form"], cut["follows"]) == (0, 0, 0)
    direct = worth(Answer(truth, 2, True))
    assert (direct["right"], direct["form"], direct["true_boxes"], direct["boxes"]) == (1, 0, 0, 0)
    more = thought()
    padded = worth(more._replace(text=" ; ".join([more.text.rpartition(" ; ")[0]] * 2 + [truth])))
    assert padded["boxes"] == 1
    assert padded["true_boxes"] == pytest.approx(true["true_boxes"] / 2, abs=0.02)
    assert padded["follows"] == 0  # two boxes of one name do not say


# Collapse


def watched(steps: int, **numbers: float) -> str | None:
    """What is said after steps in which nothing is wrong, and then as many with these numbers."""
    fine = {"reward": 0.8, "accuracy": 0.8, "mixed": 0.3, "endless": 0.0}
    watch = Watch()
    for step in range(2 * steps):
        watch.note(fine | (numbers if step >= steps else {}))
    return watch.verdict()


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({}, None),
        ({"mixed": 0.0}, "only 80% were right"),
        ({"mixed": 0.0, "accuracy": 0.97}, None),  # solved
        ({"accuracy": 0.6, "reward": 1.2}, "from 0.80 to 0.60 while their reward went from 0.80 to 1.20"),
        ({"endless": 0.7}, "70% of the answers no longer end"),
    ],
)
def test_verdicts(numbers: dict[str, float], said: str | None) -> None:
    found = watched(WINDOW, **numbers)
    assert found is None if said is None else said in str(found)
    assert watched(WINDOW // 2 - 1, **numbers) is None  # too early to say


def test_what_was_watched_is_part_of_the_state() -> None:
    watch, other = Watch(), Watch()
    for step in range(WINDOW + 3):
        watch.note({"reward": 1.0, "accuracy": 0.9 - 0.04 * step, "mixed": 0.5, "endless": 0.0})
    other.load_state_dict(watch.state_dict())
    assert watch.verdict() is None
    for _ in range(3):
        assert watch.verdict() == other.verdict()
        for one in (watch, other):
            one.note({"reward": 1.0, "accuracy": 0.1, "mixed": 0.5, "endless": 0.0})
    assert watch.verdict() == other.verdict()
    assert "fell from 0.72 to" in str(watch.verdict())


# Answers that are alike, and never right.
COLLAPSING = replace(SMALL, task="nearer", supervised_steps=0, rewarded_steps=30, temperature=0.01)


def test_a_collapse_is_told_and_its_curves_are_drawn(tmp_path: Path) -> None:
    told = f"stopped after step {WINDOW}: .* nothing is left to compare.*keeps the state"
    with pytest.raises(Collapsed, match=told):
        train_reasoning(tmp_path / "run", COLLAPSING, loop=EVERY)
    assert len(log_of(tmp_path / "run")) == WINDOW
    assert "curves.png" in files(tmp_path / "run")
    assert "model.safetensors" not in files(tmp_path / "run")
    with pytest.raises(Collapsed, match=f"stopped after step {WINDOW}"):  # it is part of the state
        train_reasoning(tmp_path / "run", COLLAPSING, loop=replace(EVERY, resume=True))


# Stops


ALL_OPTIONS = {"kl": 0.1, "updates": 2, "rehearsal": 1, "think": True, "form": 0.5, "loss": "dr_grpo"}


@pytest.mark.parametrize("changes", [{}, ALL_OPTIONS], ids=["plain", "all"])
def test_a_run_that_is_resumed_ends_alike(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    config = replace(SMALL, max_new_tokens=10, **changes)
    train_reasoning(tmp_path / "whole", config, loop=EVERY)
    for step in (2, 4):  # in each stage
        with monkeypatch.context() as context:
            advance = ReasoningRun.advance

            def stopping(run: ReasoningRun, batch: Any, step: int = step, advance: Any = advance) -> Any:
                if run.step == step:
                    raise Stop
                return advance(run, batch)

            context.setattr(ReasoningRun, "advance", stopping)
            with pytest.raises(Stop):
                train_reasoning(tmp_path / "part", config, loop=replace(EVERY, resume=step > 2))
    train_reasoning(tmp_path / "part", config, loop=replace(EVERY, resume=True))
    assert_same_end(tmp_path / "part", tmp_path / "whole")


def test_what_is_refused() -> None:
    for changes, said in (
        ({"task": "color", "think": True}, "asked to think about"),
        ({"task": "weight"}, "no task 'weight'"),
        ({"loss": "ppo"}, "choose from grpo, dr_grpo"),
        ({"group": 1}, "take 2 or more"),
        ({"right": 0.0}, "nothing is rewarded"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"supervised_steps": 0, "rewarded_steps": 0}, "nothing would be trained"),
        ({"lr": -1.0}, "lr is -1.0"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            ReasoningConfig(**changes)


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reasoning, "MEASURED", 4)
    out = tmp_path / "run"
    typed = ["train-reasoning", "--task", "vertical", "--out", str(out), "--supervised-steps", "1"]
    typed += ["--rewarded-steps", "2", "--rows", "2", "--prompts", "2", "--group", "2"]
    typed += ["--warmup-steps", "1", "--workers", "0"]
    assert main(typed) == 0
    printed, _ = capsys.readouterr()
    assert re.search(
        r"Right conclusions on held-out questions: \d\.\d{3} at step 0, \d\.\d{3} at step 3\.", printed
    )
    assert f"How it learned: {out / 'curves.png'}" in printed
    assert {"log.csv", "curves.png", "model.safetensors", "config.json", "tokenizer.json"} < files(out)
    assert log_of(out)[-1].keys() >= {"reward", "accuracy", "entropy", "mixed", "length", "endless"}
    assert main([*typed, "--bf16"]) == 2
    assert "--bf16 is for large models" in capsys.readouterr().err
    assert main([*typed, "--loss", "dr_grpo", "--resume"]) == 2
    assert "other settings (loss grpo -> dr_grpo)" in capsys.readouterr().err
