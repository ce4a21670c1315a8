"""An adapter of the shipped model learns from a few pictures, by the command line and in peft's form."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_run import Stop, files
from transformers import PaliGemmaForConditionalGeneration

import minivlm
from minivlm.adapters import LoraConfig
from minivlm.adapters.lora import AdaptedLinear
from minivlm.cli import main
from minivlm.data.samples import read_samples
from minivlm.errors import InputError
from minivlm.models.load import SHIPPED, load_answering
from minivlm.speed.int4 import Int4Linear
from minivlm.speed.int8 import Int8Linear
from minivlm.training import lora
from minivlm.training.finetuning import FinetuningConfig, finetune
from minivlm.training.log import read_log
from minivlm.training.loop import Loop
from minivlm.training.lora import AdapterFinetuning, finetune_adapter

SAMPLES = Path(__file__).parents[2] / "figures" / "samples"
LORA = LoraConfig(r=4, lora_alpha=8)
CONFIG = FinetuningConfig(steps=9, batch_size=2, bf16=False)
EVERY = Loop(save_every=3, log_every=3, measure_every=0, workers=0, progress=False)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, and answers that nobody would give."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for number, word in enumerate(("red", "green", "blue"), start=1):
        shutil.copy(SAMPLES / f"scene_{number}.png", folder)
        lines.append({"image": f"scene_{number}.png", "prefix": "caption en", "suffix": word})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "data.jsonl"


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    finetune_adapter(folder, CONFIG, LORA, data, loop=EVERY)
    return folder


def test_by_the_command_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It learns, answers with what it learned, and gives the same answers merged and in peft."""
    out, picture = tmp_path / "adapter", str(data.parent / "scene_1.png")
    before = {path: path.read_bytes() for path in SHIPPED.iterdir()}
    line = ["finetune", "--data", str(data), "--validation", str(data), "--out", str(out), "--lora", "8"]
    line += [
        "--steps",
        "40",
        "--batch-size",
        "3",
        "--no-bf16",
        "--threads",
        "1",
        "--workers",
        "0",
        "--lr",
        "0.02",
    ]
    assert main([*line, "--measure-every", "40"]) == 0
    printed = capsys.readouterr().out
    assert "0.000 at step 0, 1.000 at step 40" in printed
    assert printed.splitlines()[-1].endswith(f" --prompt 'caption en' --adapter {out}")
    wanted = {"adapter_config.json", "adapter_model.safetensors", "log.csv", "loss.png", "state.safetensors"}
    assert files(out) == wanted
    assert main(["ask", picture, "--prompt", "caption en", "--adapter", str(out)]) == 0
    assert "\nred\n" in capsys.readouterr().out
    assert main(["merge", "--adapter", str(out), "--out", str(tmp_path / "merged")]) == 0
    assert main(["ask", picture, "--prompt", "caption en", "--model", str(tmp_path / "merged")]) == 0
    assert "\nred\n" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in SHIPPED.iterdir()} == before

    on_int8 = [str(tmp_path / "int8") if part == str(out) else part for part in line]
    assert main([*on_int8, "--steps", "1", "--quantize", "int8"]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1].endswith(f" --adapter {tmp_path / 'int8'} --quantize int8")
    )

    theirs = PeftModel.from_pretrained(PaliGemmaForConditionalGeneration.from_pretrained(SHIPPED), out)
    model, processor = minivlm.load(adapter=out)
    inputs = processor([picture], ["caption en"], suffixes=["red"])
    with torch.no_grad():
        ours, expected = model(**inputs), theirs(**inputs)
    assert (ours.logits - expected.logits).abs().max() < 1e-5 * expected.logits.abs().max()
    assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)


def test_eval_and_look_wear_it(
    whole: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--adapter", str(whole), "--scenes", "2", "--columns", "held_out", "--json"]) == 0
    worn = json.loads(capsys.readouterr().out)
    assert main(["eval", "--scenes", "2", "--columns", "held_out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) != worn
    picture = str(data.parent / "scene_1.png")
    look = ["look", picture, "--prompt", "caption en", "--no-occlusion", "--out", str(tmp_path / "look")]
    assert main([*look, "--adapter", str(whole)]) == 0
    assert "drawn" in capsys.readouterr().out


def test_only_the_adapter_is_trained(data: Path) -> None:
    """The optimizer, the gradients and the saved state are of the adapter alone."""
    model, processor = load_answering(SHIPPED)
    before = {name: weight.clone() for name, weight in model.named_parameters()}  # type: ignore[attr-defined]
    samples = read_samples(data, processor, 512)
    run = AdapterFinetuning(CONFIG, model, processor, samples, [], 0, lora=LORA)
    assert run.masters is run.working is run.adapter
    held = [p for group in run.optimizers["adamw"].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in run.adapter.parameters()}
    count = sum(p.numel() for p in held)
    assert count == sum(
        4 * sum(change.lora_A.shape[1:] + change.lora_B.shape[:1]) for change in run.adapter.changes
    )
    assert count < 0.05 * sum(weight.numel() for weight in before.values())
    assert run.lr == 5e-3
    run.advance(next(iter(run.batches())))
    gradients = {name for name, p in run.model.named_parameters() if p.grad is not None}  # type: ignore[attr-defined]
    assert gradients
    assert all(".changes.default." in name for name in gradients)
    after = {name.replace(".base.", "."): p for name, p in run.model.named_parameters()}  # type: ignore[attr-defined]
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_base_in_bf16(data: Path, tmp_path: Path) -> None:
    config = FinetuningConfig(steps=2, batch_size=2, bf16=True)
    run = finetune_adapter(tmp_path, config, LORA, data, loop=EVERY)
    assert {p.dtype for name, p in run.model.named_parameters() if ".lora_" not in name} == {torch.bfloat16}  # type: ignore[attr-defined]
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    minivlm.load(adapter=tmp_path)  # its base in fp32 is still its base


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantized_base(quantize: str, data: Path, tmp_path: Path) -> None:
    """It learns, answers on the same base and on the plain one, and goes on with no other."""
    config = replace(CONFIG, steps=30, batch_size=3, lr=0.02, quantize=quantize)
    every = replace(EVERY, measure_every=30, save_every=30)
    run = finetune_adapter(tmp_path, config, LoraConfig(r=8, lora_alpha=16), data, data, loop=every)
    assert [line["exact match"] for line in read_log(tmp_path / "log.csv")][-1] == 1
    kinds = {type(one.base) for one in run.model.modules() if isinstance(one, AdaptedLinear)}  # type: ignore[attr-defined]
    assert kinds == {Int8Linear if quantize == "int8" else Int4Linear}
    for base in (quantize, None):
        model, processor = load_answering(quantize=base, adapter=tmp_path)
        ids = model.generate(**processor([data.parent / "scene_1.png"], ["caption en"]), max_new_tokens=4)
        assert processor.decode(ids) == ["red"]
    other, resume = replace(config, quantize=None, steps=40), replace(every, resume=True)
    with pytest.raises(InputError, match=f"other settings .*quantize {quantize} -> None"):
        finetune_adapter(tmp_path, other, LoraConfig(r=8, lora_alpha=16), data, loop=resume)
    with pytest.raises(InputError, match=f"weights in {quantize} cannot be trained: train an adapter"):
        finetune(tmp_path / "whole", config, data, loop=EVERY)


@pytest.mark.parametrize("number", [2, 5, 9])
def test_a_run_that_broke_off_ends_the_same(
    number: int, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    every = Loop(save_every=1 if number == 2 else 3, log_every=3, measure_every=0, workers=0, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stopping)
        with pytest.raises(Stop):
            finetune_adapter(tmp_path, CONFIG, LORA, data, loop=every)
    resume = Loop(resume=True, save_every=3, log_every=3, measure_every=0, workers=0, progress=False)
    finetune_adapter(tmp_path, CONFIG, LORA, data, loop=resume)
    for name in ("adapter_model.safetensors", "state.safetensors"):
        ours, wanted = load_file(tmp_path / name), load_file(whole / name)
        assert ours.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(ours[key], wanted[key])] == []
    assert read_log(tmp_path / "log.csv") == read_log(whole / "log.csv")


def test_what_may_not_change(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank and the like, and the weights of the base, which the state does not hold."""
    folder = shutil.copytree(whole, tmp_path / "copied")
    resume = Loop(resume=True)
    with pytest.raises(InputError, match=r"other settings \(lora .*'r': 4.* -> .*'r': 5"):
        finetune_adapter(folder, CONFIG, LoraConfig(r=5, lora_alpha=8), data, loop=resume)
    base = shutil.copytree(SHIPPED, tmp_path / "base")
    config = FinetuningConfig(model=str(base), steps=9, batch_size=2, bf16=False)
    out = tmp_path / "out"
    finetune_adapter(out, config, LORA, data, loop=EVERY)
    model, _ = minivlm.load(base)
    with torch.no_grad():
        model.language_model.norm.weight += 1
    model.save_pretrained(base)
    with pytest.raises(InputError, match=r"other settings \(base with norms \w+ -> with norms"):
        finetune_adapter(out, config, LORA, data, loop=resume)
    assert (
        main(
            [
                "ask",
                str(SAMPLES / "scene_1.png"),
                "--prompt",
                "caption en",
                "--model",
                str(base),
                "--adapter",
                str(out),
            ]
        )
        == 2
    )
    assert f"an adapter for {base}, was trained on other weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora", "0"], "the rank of an adapter is 0: choose a whole number from 1"),
        (["--lora", "4", "--freeze", "tower"], "all parts are frozen but for its targets"),
        (["--lora", "4", "--lora-targets", "c_attn"], "is named c_attn: choose from"),
        (["--rslora"], "--rslora is of an adapter: add --lora RANK, or leave it out"),
        (["--lora-alpha", "3"], "--lora-alpha is of an adapter"),
        (["--quantize", "int4"], "--quantize is of an adapter"),
    ],
)
def test_options_of_adapters_that_are_refused(
    arguments: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", "--data", str(data), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(InputError, match=r"lora_dropout is 0\.5"):
        finetune_adapter(tmp_path / "out", CONFIG, LoraConfig(lora_dropout=0.5), data)


def test_every_option_of_adapters(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def stop(*args: Any, **options: Any) -> None:
        calls.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(lora, "finetune_adapter", stop)
    assert main(["finetune", "--data", str(data), "--lora", "4"]) == 130
    assert calls[-1][2] == LORA
    line = ["--lora", "4", "--lora-alpha", "3", "--lora-targets", "q_proj", "v_proj", "--rslora", "--dora"]
    assert main(["finetune", "--data", str(data), *line]) == 130
    assert calls[-1][2] == LoraConfig(("q_proj", "v_proj"), 4, 3, use_rslora=True, use_dora=True)
    assert calls[-1][1].quantize is None
    assert main(["finetune", "--data", str(data), "--lora", "4", "--quantize", "int4"]) == 130
    assert calls[-1][1].quantize == "int4"
