"""Training of the ways to let a language model see: one start for all, what learns, and stops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_run import assert_same_end
from torch import Tensor, nn

from minivlm.cli import main
from minivlm.cli.train import RATES, RECIPE, SYSTEM_RECIPE, SYSTEMS
from minivlm.errors import InputError
from minivlm.models.load import load
from minivlm.models.views import place
from minivlm.text.moe import record_routing
from minivlm.training.loop import Loop
from minivlm.training.systems import SystemConfig, SystemRun, train_system
from minivlm.training.ways import GPT2, LLAMA, WAYS, answer_loss, build, masked_word_loss, next_word_loss

SMALL = SystemConfig("clipcap", text_steps=2, steps=2, text_rows=2, rows=2, warmup_steps=1)
QUIET = Loop(save_every=1, log_every=1, measure_every=0, workers=0, progress=False)


@pytest.mark.parametrize("name", WAYS)
def test_all_ways_start_from_one_language_model_and_one_tower(name: str) -> None:
    """One of each kind: GPT-2 or Llama."""
    model = SystemRun(replace(SMALL, system=name)).model
    parts, first = {}, {id(GPT2): "clipcap", id(LLAMA): "llava"}.get(id(WAYS[name].language_model))
    if first is not None:
        parts["language_model"] = SystemRun(replace(SMALL, system=first)).model.language_model
    if name != "simvlm":
        parts["vision_tower"] = load()[0].vision_tower
    assert parts
    for part, wanted in parts.items():
        state = model.get_submodule(part).state_dict()
        for key, tensor in wanted.state_dict().items():
            assert torch.equal(state[key], tensor)


@pytest.mark.parametrize("name", WAYS)
def test_all_ways_see_the_same_rows(name: str) -> None:
    """In its own words: placeholders, and the form of a chat. Things are small in pictures of their own."""
    first = "clipcap" if WAYS[name].column == "held_out" else "small-one-view"
    runs = [SystemRun(replace(SMALL, system=system), workers=0) for system in (first, name)]
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


LLAMAS = [name for name, way in WAYS.items() if way.language_model is LLAMA]
LATER = ("cross-attention", "experts", "small-one-view", "small-tiles", "small-two-towers")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", LLAMAS)
def test_all_llamas_know_the_same_after_the_text(name: str) -> None:
    after = []
    for system in ("llava", name):
        run = SystemRun(replace(SMALL, system=system), workers=0)
        batches = run.batches()
        while run.stage == "text":
            run.advance(next(batches))
        after.append((weights_of(run.model.language_model), run.text_loss()))
    (llava, text_loss), (own, own_text_loss) = after
    assert own.keys() == llava.keys()
    assert all(torch.equal(own[key], llava[key]) for key in llava)
    assert own_text_loss == text_loss


@pytest.mark.parametrize("name", LATER)
def test_a_few_pictures_can_be_known_by_heart(name: str) -> None:
    config = replace(SMALL, system=name, text_steps=0, steps=30, rows=4)
    run = SystemRun(config, workers=0)
    tower, words = weights_of(run.model.vision_tower), weights_of(run.model.language_model)
    batch = next(run.batches())
    losses = [run.advance(batch)["answer"] for _ in range(30)]
    # Words are hard to get out of a language model that is frozen before it knows any.
    assert losses[-1] < losses[0] * (0.95 if name == "cross-attention" else 0.5)
    assert all(torch.equal(tensor, tower[key]) for key, tensor in run.model.vision_tower.state_dict().items())
    after = run.model.language_model.state_dict()
    is_frozen = all(torch.equal(tensor, words[key]) for key, tensor in after.items())
    assert is_frozen == (name == "cross-attention")


@pytest.mark.parametrize("name", LATER)
def test_another_picture_is_another_answer(name: str) -> None:
    run = SystemRun(replace(SMALL, system=name, text_steps=0, rows=1), workers=0)
    batch = next(run.batches())
    run.advance(batch)  # the first step opens the gates of cross-attention
    run.model.eval()
    with torch.no_grad():
        seen = run.model(**batch).logits
        other = run.model(**batch | {"pixel_values": -batch["pixel_values"]}).logits
    assert (seen[:, -3:] - other[:, -3:]).abs().max() > 1e-4


@torch.no_grad()
def test_closed_gates_leave_llama_as_it_is() -> None:
    """And without a picture, open ones do, too."""
    model, processor = build("cross-attention", 0)
    (llava, _), picture = build("llava", 0), Image.new("RGB", (64, 64), "red")
    inputs = processor([picture], ["caption en"])
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    position_ids, mask = place(words["attention_mask"], None)
    decoder = llava.language_model
    wanted = decoder(decoder.embed(words["input_ids"]), position_ids, mask)
    assert torch.equal(model.hidden_states(**inputs), wanted)
    for block in model.cross_attention_layers.values():
        block.cross_attn_attn_gate.fill_(0.5)
    assert not torch.allclose(model.hidden_states(**inputs), wanted, atol=1e-3)
    words = processor(None, ["caption en"])
    position_ids, mask = place(words["attention_mask"], None)
    wanted = decoder(decoder.embed(words["input_ids"]), position_ids, mask)
    assert torch.equal(model.hidden_states(**words), wanted)


def test_a_word_meets_as_many_weights_with_experts_as_without() -> None:
    """But for the gates, which choose."""
    (dense, _), (sparse, _) = build("llava-direct", 0), build("experts", 0)
    counts = [
        {name: weight.numel() for name, weight in model.language_model.named_parameters()}
        for model in (dense, sparse)
    ]
    idle, gates = 12 / 17, sum(count for name, count in counts[1].items() if name.endswith("gate.weight"))
    of_experts = sum(count for name, count in counts[1].items() if "experts." in name)
    assert gates == 4 * 16 * 64
    assert sum(counts[1].values()) - gates - idle * of_experts == sum(counts[0].values())
    with record_routing() as routings, torch.no_grad():
        sparse.language_model.layers[0].mlp(torch.randn(1, 5, 64))
    assert routings[0].experts.shape == (1, 5, 4)


def test_experts_are_kept_busy() -> None:
    """The balance moves gates and not the value of the loss, in both stages."""
    for stage in ("text", "pictures"):
        config = replace(SMALL, system="experts", text_steps=int(stage == "text"), steps=1)
        run = SystemRun(config, workers=0)
        batch, model = next(run.batches()), run.model
        learned, plain, part = (
            (run.way.language_model.loss, next_word_loss, model.language_model)
            if stage == "text"
            else (run.way.loss, answer_loss, model)
        )
        losses = [loss(part, batch, torch.Generator().manual_seed(0)) for loss in (learned, plain)]
        assert losses[0].item() == losses[1].item()
        gate = model.language_model.layers[0].mlp.gate.weight
        gradients = [torch.autograd.grad(loss, gate)[0] for loss in losses]
        assert not torch.allclose(*gradients)


def test_small_things_are_in_pictures_and_not_in_texts() -> None:
    usual, small = (
        list(SystemRun(replace(SMALL, system=system, rows=8), workers=0).batches())
        for system in ("llava-direct", "small-one-view")
    )
    for one, other in zip(usual[:2], small[:2], strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
    for one, other in zip(usual[2:], small[2:], strict=True):
        large, little = (F.interpolate(batch["pixel_values"], (64, 64)) for batch in (one, other))
        assert other["pixel_values"].shape[-1] == 128
        corners = large[..., :1, :1]  # most of them of the ground, whose noise is less than this
        assert ((little - corners).abs() > 0.4).sum() < ((large - corners).abs() > 0.4).sum() / 2


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


@pytest.mark.parametrize("name", ["clipcap", *LATER])
def test_a_run_that_is_resumed_ends_alike(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL, system=name)
    train_system(tmp_path / "whole", config, loop=QUIET)
    advance = SystemRun.advance
    for stop in (1, 3):  # in either stage
        out = tmp_path / f"stopped {stop}"

        def until(run: SystemRun, batch: dict[str, Tensor], stop: int = stop) -> dict[str, float]:
            if run.step == stop:
                raise RuntimeError
            return advance(run, batch)

        monkeypatch.setattr(SystemRun, "advance", until)
        with pytest.raises(RuntimeError):
            train_system(out, config, loop=QUIET)
        monkeypatch.setattr(SystemRun, "advance", advance)
        train_system(out, config, loop=replace(QUIET, resume=True))
        assert_same_end(out, tmp_path / "whole")


@pytest.mark.parametrize("name", LATER)
def test_what_was_trained_is_small_and_opens(name: str, tmp_path: Path) -> None:
    train_system(tmp_path, replace(SMALL, system=name), loop=QUIET)
    assert (tmp_path / "model.safetensors").stat().st_size <= 1_500_000
    model, processor = load(tmp_path)
    asked = {"images": [Image.new("RGB", (128, 128), "red")], "prompts": ["what color is the star?"]}
    assert processor.image_seq_length == model.config.num_image_tokens
    inputs = processor(**asked)
    assert processor.decode(model.generate(**inputs, max_new_tokens=3))
    run = SystemRun(replace(SMALL, system=name))
    assert run.processor(**asked).keys() == inputs.keys()
    assert all(torch.equal(tensor, inputs[key]) for key, tensor in run.processor(**asked).items())


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
