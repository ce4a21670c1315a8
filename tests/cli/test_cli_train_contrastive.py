"""`minivlm train-contrastive`: which options belong together, and what is printed."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import files
from small_towers import RUN, SIZES, make_pairs, make_towers

from minivlm.cli import main
from minivlm.training import contrastive
from minivlm.training.contrastive_recipe import ContrastiveConfig
from minivlm.training.log import read_log
from minivlm.training.loop import Loop

CPU = torch.device("cpu")


def options(**changes: Any) -> list[str]:
    values = SIZES | {name: RUN[name] for name in ("steps", "batch_size", "warmup_steps")} | changes
    given = [
        part
        for name, value in values.items()
        if value is not None
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    return [*given, "--no-bf16", "--workers", "0"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["train-contrastive", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("minivlm: error: ")
    assert err.count("\n") == 1
    return err


def test_train_resume_and_distill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minivlm.training import contrastive

    monkeypatch.setattr(contrastive, "MEASURED_SCENES", 5)
    out = tmp_path / "first"
    train = ["--objective", "siglip", "--out", str(out), *options()]
    assert main(["train-contrastive", *train]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    assert re.search(
        r"Recall@1 at step 6: \d.\d{3} from image to text, \d.\d{3} from text to image.", printed
    )
    assert f"minivlm eval --model {out}\n" in printed
    assert {"state.safetensors", "log.csv", "loss.png", "model.safetensors", "tokenizer.json"} < files(out)
    line = read_log(out / "log.csv")[-1]
    assert line.keys() >= {"step", "temperature", "bias", "loss", "adamw_lr", "image to text recall@1"}
    assert "add --resume" in refused(train, capsys)
    assert main(["train-contrastive", *train, "--resume"]) == 0
    capsys.readouterr()
    small = [*options(text_width=8), "--measure-every", "0"]
    distill = ["--objective", "distill", "--out", str(tmp_path / "second"), *small]
    assert "learns from a teacher" in refused(distill, capsys)
    assert main(["train-contrastive", *distill, "--teacher", str(out)]) == 0
    assert "Recall" not in capsys.readouterr().out


def test_pairs_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_pairs(tmp_path / "data")
    data.write_text(data.read_text() + "\n{}")
    train = ["--objective", "clip", "--data", str(data), "--out", str(tmp_path / "run"), *options()]
    assert main(["train-contrastive", *train]) == 2
    assert 'line 11: no "image" among its keys' in capsys.readouterr().err
    assert main(["train-contrastive", *train, "--on-bad-line", "skip", "--validation", str(data)]) == 0
    printed, err = capsys.readouterr()
    assert "line 11" in err
    assert f"minivlm eval --model {tmp_path / 'run'} --data {data}" in printed
    large = [*train[:4], "--out", str(tmp_path / "new"), "--on-bad-line", "skip", *options(batch_size=11)]
    assert main(["train-contrastive", *large]) == 2
    assert "batch_size is 11, but there are 10 pairs" in capsys.readouterr().err


def test_every_number_has_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def train_contrastive(*args: Any, **options: Any) -> None:
        calls.append((*args, options))
        raise KeyboardInterrupt

    monkeypatch.setattr(contrastive, "train_contrastive", train_contrastive)
    assert main(["train-contrastive"]) == 130
    defaults = {"loop": Loop(device=CPU), "warn": None}
    assert calls[-1] == (Path("runs/siglip"), ContrastiveConfig(), None, None, defaults)
    values: dict[str, Any] = {
        "seed": 7, "image_size": 96, "patch_size": 6, "tower_width": 48, "tower_layers": 2, "tower_heads": 4,
        "text_width": 64, "text_layers": 3, "text_heads": 2, "max_length": 40, "steps": 9, "batch_size": 5,
        "lr": 0.5, "weight_decay": 0.125, "warmup_steps": 11, "clip": 2.0, "teacher": "t",
    }  # fmt: skip
    config = ContrastiveConfig("distill", **values, bf16=True)
    assert values.keys() | {"objective", "model", "bf16"} == {field.name for field in fields(config)}
    arguments = [
        part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    assert (
        main(["train-contrastive", "--objective", "distill", "--bf16", "--measure-every", "3", *arguments])
        == 130
    )
    loop = Loop(device=CPU, measure_every=3)
    assert calls[-1] == (Path("runs/distill"), config, None, None, {"loop": loop, "warn": None})
    assert main(["train-contrastive", "--objective", "clip", "--model", "m"]) == 130
    assert calls[-1][1] == ContrastiveConfig("clip", model="m")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "clip", "--validation", "v"], "--validation is for pairs of your own: add --data"),
        (["--objective", "lit", "--tower-width", "8"], "--tower-width is decided by the locked tower"),
        (
            ["--objective", "clip", "--model", "m", "--text-width", "8"],
            "--text-width is decided by",
        ),
        (["--objective", "clip", "--batch-size", "1"], "batch_size is 1, and nothing is learned"),
        (["--objective", "clip", "--data", "d", "--measure-every", "5"], "has nothing to measure on"),
        (["--objective", "clip", "--teacher", "t"], "clip has no teacher"),
        (["--teacher", "t"], "siglip has no teacher"),
        (["--objective", "clip", "--data", "no.jsonl"], "no.jsonl cannot be read"),
    ],
)
def test_options_that_do_not_belong_together(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused([*arguments, "--out", str(tmp_path / "run")], capsys)


def test_a_folder_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_towers(tmp_path / "towers", "clip")
    arguments = ["--objective", "siglip", "--model", str(folder), "--out", str(tmp_path / "run")]
    assert "holds a CLIP, and siglip trains a SigLIP" in refused(arguments, capsys)
