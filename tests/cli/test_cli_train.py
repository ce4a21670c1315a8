"""The commands that train: which options belong together, what is printed, and how they refuse."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_run import CONFIG, files, step_of

import minivlm
from minivlm.cli import _parse, main
from minivlm.cli import finetune as cli_finetune
from minivlm.evaluation.tables import Metric
from minivlm.training import best as best_module
from minivlm.training import codebook, finetuning, scratch
from minivlm.training.finetuning import FinetuningConfig
from minivlm.training.log import read_log
from minivlm.training.loop import Loop
from minivlm.training.recipe import TrainingConfig, build

SMALL = {
    "image_size": 32, "tower_width": 24, "tower_layers": 1, "tower_heads": 2, "text_width": 32,
    "text_layers": 1, "text_heads": 2, "tower_steps": 2, "packed_steps": 2, "review_steps": 1,
    "prefix_steps": 1, "alike_steps": 1, "last_steps": 1, "tower_pictures": 2, "pictures": 2, "questions": 2,
    "prefix_questions": 2,
}  # fmt: skip
CPU = torch.device("cpu")
Calls = list[tuple[Any, ...]]


def recipe(**changes: Any) -> list[str]:
    return [
        part
        for name, value in (SMALL | changes).items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]


def one_line(err: str) -> str:
    """The message of a refusal: one line, and no traceback."""
    assert err.startswith("minivlm: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("minivlm: error: ").rstrip()


# The drawn world


def test_train_resume_and_evaluate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = {"held_out": {"count": Metric(0.5, 0.5, 1)}}
    monkeypatch.setattr(scratch, "evaluate", lambda *args, **options: metrics)
    out = tmp_path / "run"
    train = ["train", "--out", str(out), "--no-bf16", "--measure-every", "3", *recipe()]
    assert main(train) == 0
    printed, err = capsys.readouterr()
    assert f"minivlm eval --model {out}" in printed
    assert err == ""
    assert [line["count"] for line in read_log(out / "log.csv")] == [0.5, 0.5, 0.5]
    assert main(["eval", "--model", str(out), "--scenes", "1", "--columns", "held_out"]) == 0
    capsys.readouterr()
    assert main(train) == 2
    assert "add --resume" in one_line(capsys.readouterr().err)
    assert main([*train, "--resume"]) == 0
    capsys.readouterr()
    assert main([*train[:3], "--resume", "--no-bf16", *recipe(packed_steps=3)]) == 2
    assert "(packed_steps 2 -> 3)" in one_line(capsys.readouterr().err)
    assert main(["train", "--out", str(tmp_path / "new"), "--resume"]) == 2
    assert "leave out --resume" in one_line(capsys.readouterr().err)


def test_every_number_of_the_recipe_has_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Calls = []
    monkeypatch.setattr(scratch, "train", lambda *args, **options: calls.append((*args, options)))
    assert main(["train"]) == 0
    assert calls[-1] == (Path("runs/tiny"), TrainingConfig(), {"loop": Loop(device=CPU)})
    values: dict[str, Any] = {
        "seed": 7, "image_size": 96, "patch_size": 6, "tower_width": 48, "tower_layers": 2, "tower_heads": 4,
        "text_width": 64, "text_layers": 3, "text_heads": 2, "tower_steps": 1, "packed_steps": 2,
        "review_steps": 6, "prefix_steps": 3, "tower_pictures": 4, "pictures": 5, "questions": 8,
        "row_tokens": 90, "prefix_questions": 7, "prefix_row_tokens": 33, "muon_lr": 0.5, "adamw_lr": 0.25,
        "tower_lr_factor": 0.75, "review_lr_factor": 0.375, "relations": 4, "review_relations": 3,
        "weight_decay": 0.125, "warmup_steps": 11, "clip": 2.0, "dense_weight": 3.0, "loc_sigma": 4.0,
        "alike_steps": 5, "last_steps": 4, "alike_share": 0.5, "alike_pairs": 6, "last_share": 0.25,
        "last_pairs": 2, "alike_lr_factor": 0.75, "point_weight": 1.5,
    }  # fmt: skip
    config = TrainingConfig(**values, bf16=True)
    assert all(value != getattr(TrainingConfig(), name) for name, value in vars(config).items())
    arguments = [
        part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    others = ["--save-every", "9", "--measure-every", "0", "--workers", "0", "--resume", "--out", "x"]
    assert main(["train", "--bf16", *others, *arguments]) == 0
    loop = Loop(resume=True, save_every=9, workers=0, device=CPU, measure_every=0)
    assert calls[-1] == (Path("x"), config, {"loop": loop})


def test_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(scratch, "train", lambda *args, **options: None)
    assert main(["train", "--threads", "3", "--out", str(tmp_path)]) == 0
    assert asked == [3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (recipe(pictures=0), "pictures is 0"),
        ([*recipe(), "--threads", "100000"], "threads is 100000: choose a number from 1 to"),
        ([*recipe(), "--workers", "100000"], "workers is 100000: choose a number from 0 to"),
        (recipe(clip=0), "clip is 0.0: choose a number from 0.001"),
        (recipe(patch_size=5), "does not divide into patches of 5"),
        (recipe(muon_lr="nan"), "muon_lr is nan"),
        (recipe(muon_lr=4e9, adamw_lr=4e9, packed_steps=20), "not a number .*: try a lower learning rate"),
    ],
)
def test_recipes_that_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--out", str(tmp_path / "run"), "--no-bf16", *arguments]) == 2
    assert re.search(message, one_line(capsys.readouterr().err))


# Your own pictures


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model far too small to know anything."""
    folder = tmp_path_factory.mktemp("start")
    for part in build(CONFIG):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six lines about two pictures."""
    for name in ("red", "blue"):
        Image.new("RGB", (30, 20), name).save(tmp_path / f"{name}.png")
    lines = [
        {"image": f"{name}.png", "prefix": prefix, "suffix": name}
        for prefix in ("what color?", "which one is it?", "name it")
        for name in ("red", "blue")
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "train.jsonl"


@pytest.fixture
def tune(start: Path, data: Path) -> list[str]:
    """`minivlm finetune` on these lines, nine steps long."""
    return [
        "finetune", "--data", str(data), "--model", str(start), "--out", str(data.parent / "tuned"),
        "--batch-size", "2", "--epochs", "3", "--no-bf16",
    ]  # fmt: skip


def test_finetune(tune: list[str], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the end, and on with the command that is printed there."""
    out = data.parent / "tuned"
    assert main([*tune, "--validation", str(data), "--measure-every", "5"]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    assert re.search(rf"Exact answers to {data}: 0.000 at step 0, \d.\d\d\d at step 9.", printed)
    command = printed.splitlines()[-1].strip()
    assert command.endswith(f" ask {data.parent / 'red.png'} --prompt 'what color?' --model {out}")
    assert main(["ask", str(data.parent / "red.png"), "--prompt", "what color?", "--model", str(out)]) == 0
    assert [line["step"] for line in read_log(out / "log.csv")] == [0, 5, 9]
    assert {"state.safetensors", "model.safetensors", "log.csv", "loss.png"} < files(out)
    capsys.readouterr()
    assert main(tune) == 2
    assert "add --resume" in one_line(capsys.readouterr().err)
    assert main([*tune, "--validation", str(data), "--resume", "--lr", "0.1"]) == 2
    assert "other settings (lr None -> 0.1)" in one_line(capsys.readouterr().err)
    assert main([*tune, "--resume"]) == 2
    assert re.search(r"\(validation 6 examples, \w+ -> no file\)", one_line(capsys.readouterr().err))


def test_every_option_for_your_own_pictures(start: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Calls = []

    def finetune(*args: Any, **options: Any) -> Any:
        calls.append((*args, options))
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, "finetune", finetune)
    assert main(["finetune", "--data", str(data)]) == 130
    defaults = {"loop": Loop(device=CPU), "warn": None}
    assert calls[-1] == (Path("runs/tuned"), FinetuningConfig(), data, None, defaults)
    arguments = ["--validation", "v.jsonl", "--model", str(start), "--steps", "5", "--batch-size", "3"]
    arguments += ["--accumulate", "2", "--lr", "0.5", "--warmup-steps", "7", "--seed", "9", "--bf16"]
    arguments += ["--freeze", "decoder", "--freeze", "tower", "--max-length", "99", "--on-bad-line", "skip"]
    arguments += ["--empty-answer", "none"]
    assert main(["finetune", "--data", str(data), *arguments, "--measure-every", "4"]) == 130
    *args, options = calls[-1]
    config = FinetuningConfig(
        model=str(start), seed=9, steps=5, batch_size=3, accumulate=2, lr=0.5, warmup_steps=7,
        freeze=("tower", "decoder"), max_length=99, empty_answer="none", bf16=True,
    )  # fmt: skip
    assert args == [Path("runs/tuned"), config, data, Path("v.jsonl")]
    assert callable(options.pop("warn"))
    assert options == {"loop": Loop(device=CPU, measure_every=4)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "2", "--steps", "3"], "epochs and steps are both given"),
        (["--epochs", "0"], "epochs is 0: choose a number from 1"),
        (["--lr", "nan"], "lr is nan"),
        (["--measure-every", "5"], "--measure-every has nothing to measure on: add --validation"),
        (["--validation", "missing.jsonl"], "missing.jsonl cannot be read .No such file"),
        (["--model", "nowhere/nothing/x"], "is neither a folder nor a repo id"),
        (["--best", "loss"], "--best loss has nothing to measure on: add --validation"),
        (["--patience", "3"], "--patience waits for a better state: add --best"),
        (["--augment", "flip"], "flip is no choice: it exchanges left and right"),
        (["--replay", "1"], "replay is 1.0: choose a share from 0"),
        (["--device", "nonsense"], "device 'nonsense' cannot be used .*--device cpu"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--max-length", "5"], "has 6 bad lines"),
        (["--lr", "4e9", "--epochs", "300"], "not a number at step .* a lower learning rate in a new folder"),
    ],
)
def test_options_that_are_refused(
    arguments: list[str], message: str, data: Path, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = data.parent / "tuned"
    fixed = ["finetune", "--data", str(data), "--no-bf16", "--out", str(out), "--model", str(start)]
    assert main([*fixed, *arguments]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err if "bad lines" in message else one_line(err))
    assert not (out / "model.safetensors").exists()


OF_DATA = ("--data", "--validation", "--model", "--on-bad-line", "--steps", "--batch-size", "--lr")
OF_FINETUNING = ("--epochs", "--accumulate", "--freeze")
OF_THE_DRAWN_WORLD = ("--pictures", "--muon-lr", "--packed-steps", "--text-layers", "--clip")


@pytest.mark.parametrize(
    ("command", "foreign"),
    [
        # --data has moved; --steps and --lr are of its --system
        ("train", (*OF_DATA[1:4], "--batch-size", *OF_FINETUNING, "--teacher", "--max-length")),
        ("finetune", (*OF_THE_DRAWN_WORLD, "--objective", "--teacher")),
        ("train-contrastive", (*OF_FINETUNING, *OF_THE_DRAWN_WORLD[:3])),
        ("train-codebook", (*OF_DATA[:4], *OF_FINETUNING, *OF_THE_DRAWN_WORLD, "--resume")),
    ],
)
def test_options_of_other_commands(
    command: str, foreign: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    required = {"finetune": ["--data", "d"], "train-codebook": ["--out", "o"]}.get(command, [])
    for option in foreign:
        with pytest.raises(SystemExit) as exit:
            main([command, *required, option, "1"])
        assert exit.value.code == 2
        assert f"error: unrecognized arguments: {option} 1" in capsys.readouterr().err


def test_bad_lines_are_listed(tune: list[str], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with data.open("a") as file:
        file.write("{\n" + '{"image": "no\\nsuch.png", "prefix": "p", "suffix": "s"}\n' + "[\n" * 11)
    assert main(tune) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == f"minivlm: error: {data} has 13 bad lines:"
    assert lines[1].startswith("  line 7: not JSON (")
    assert lines[2] == f"  line 8: {data.parent}/no such.png: no such file: check the path of the picture"
    assert lines[-2] == "  and 3 more"
    assert lines[-1] == "Fix them, or skip them with --on-bad-line skip"
    assert len(lines) == 13
    assert main([*tune, "--on-bad-line", "skip"]) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[0] == f"minivlm: warning: {data} has 13 bad lines:"
    assert lines[-1] == "They are skipped"
    assert "The model is in" in out


def test_ctrl_c_and_kill_while_training(tune: list[str], data: Path) -> None:
    """In a real process: what is printed, and that --resume goes on from where it says."""
    out = data.parent / "tuned"
    command = [sys.executable, "-m", "minivlm", *tune, "--save-every", "2"]
    command[command.index("--epochs") + 1] = "100000"
    env = os.environ | {"PYTHONPATH": str(Path(minivlm.__file__).parents[1])}
    steps = [0]
    for number in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and not (
                (out / "log.csv").exists() and step_of(out) > steps[-1]
            ):
                time.sleep(0.01)
            process.send_signal(number)
            printed, err = process.communicate(timeout=60)
        finally:
            process.kill()
        steps.append(step_of(out))
        assert steps[-1] > steps[-2]
        assert "Trained for" not in printed
        if number == signal.SIGINT:
            assert process.returncode == 130
            assert err.endswith(  # before it, about how long the run would have taken
                f"minivlm: stopped after step {steps[-1]} of 300000; the same command with --resume goes on "
                f"from step {steps[-1]}, saved in {out}\n"
            )
        else:
            assert process.returncode == -signal.SIGKILL
            assert steps[-1] % 2 == 0  # when it was last saved
        command.append("--resume")
    lines = read_log(out / "log.csv")
    assert [line["step"] for line in lines] == [10 * n for n in range(1, len(lines) + 1)]
    assert len(lines) == steps[-1] // 10


def test_the_best_state_by_command(tune: list[str], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With every other option of its kind: other pictures to measure on, which have another name."""
    for name in ("red", "blue"):
        Image.new("RGB", (30, 21), name).save(data.parent / f"other {name}.png")
    other = data.with_name("other.jsonl")
    other.write_text(data.read_text().replace('"image": "', '"image": "other '))
    best = ["--validation", str(other), "--best", "exact", "--measure-every", "3", "--patience", "2"]
    assert main([*tune, *best, "--augment", "shift,color", "--checkpointing", "--lr", "1e-9"]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    assert printed.startswith("Training takes about ")
    assert "The folder holds the state of step 0, the best by exact match: 0.\n" in printed
    assert "The run ended at step 6 of 9: 2 measurements in a row were no better." in printed
    assert "too good" not in printed
    out = data.parent / "tuned"
    assert main(["eval", "--model", str(out), "--data", str(other)]) == 0
    assert "| exact, all lines | 0.000 | 0.500 | 6 |" in capsys.readouterr().out
    assert tuple(best_module.METRICS) == cli_finetune.BEST


def test_validation_that_training_shows_is_named(
    tune: list[str], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*tune, "--validation", str(data), "--measure-every", "9", "--epochs", "1"]) == 0
    assert (
        "These numbers are too good: training showed the pictures of 6 of 6 validation lines, line 1 "
        "(red.png), line 2 (blue.png), line 3 (red.png) and 3 more."
    ) in capsys.readouterr().out


def test_suggestions_are_a_command(
    tune: list[str], data: Path, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which names the model, and is understood."""
    asked = ["finetune", "--data", str(data), "--model", str(start), "--suggest"]
    assert main([*asked, "--validation", "v.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"For 6 lines and \d\.\d million weights, to begin with:\n  --batch-size 8 ", printed)
    typed = shlex.split(printed.splitlines()[-1])
    parsed = _parse(typed[typed.index("finetune") :])
    assert (parsed.data, parsed.model, parsed.best) == (data, str(start), "exact")
    assert parsed.replay is None  # this is not the shipped model
    assert not (data.parent / "runs").exists()


# The codebook of masks


def test_train_codebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: Calls = []
    monkeypatch.setattr(codebook, "train_masks", lambda *args, **options: calls.append((*args, options)))
    out = tmp_path / "masks.npz"
    assert main(["train-codebook", "--out", str(out), "--steps", "3", "--seed", "4"]) == 0
    assert calls == [(out, {"steps": 3, "seed": 4})]
    assert capsys.readouterr().out == f"The codebook is in {out}.\n"


def test_train_codebook_for_a_moment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "masks.npz"
    assert main(["train-codebook", "--out", str(out), "--steps", "2"]) == 0
    assert minivlm.processing.MaskCodebook.from_file(out)
    content = out.read_bytes()
    assert main(["train-codebook", "--out", str(out), "--steps", "1"]) == 2
    assert "masks.npz exists, and would be overwritten" in one_line(capsys.readouterr().err)
    assert out.read_bytes() == content
    (tmp_path / "file").touch()
    assert main(["train-codebook", "--out", str(tmp_path / "file" / "x.npz"), "--steps", "1"]) == 2
    assert "cannot write" in one_line(capsys.readouterr().err)
