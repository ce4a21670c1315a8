"""Training Qwen2-VL and Qwen2.5-VL on clips: rows, stages, stops, and the command."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import assert_same_end

from minivlm.cli import main
from minivlm.cli.train import MOVING, MOVING_RECIPE, RATES, RECIPE, SYSTEM_RECIPE
from minivlm.errors import InputError
from minivlm.models.load import load
from minivlm.processing import video_of
from minivlm.processing.inputs import IGNORE
from minivlm.training.loop import Loop
from minivlm.training.moving import SYSTEMS, MovingConfig, MovingRun, build, read, train_moving, whiten
from minivlm.world.clip_batches import CLIP_SIDES, ClipBatches, clip_cells, of_tasks, pack, training_clip
from minivlm.world.clip_files import save_clip
from minivlm.world.clip_questions import examples
from minivlm.world.clips import MOTIONS
from minivlm.world.questions import Example

SMALL = MovingConfig("qwen2_5_vl", tower_steps=2, steps=2, rows=2, questions=2, warmup_steps=1)
QUIET = Loop(save_every=1, log_every=1, measure_every=0, workers=0, progress=False)


@pytest.mark.parametrize("name", SYSTEMS)
@torch.no_grad()
def test_a_packed_question_is_read_as_if_it_were_alone(name: str) -> None:
    """Same clip, same positions, same scores; and the questions beside it have no say."""
    model, processor = build(name, 0)
    rng = np.random.default_rng(3)
    clip = training_clip(rng, 6, 80, 48)
    asked = [Example("caption", "caption en", "a red star"), Example("count", "how many?", "2")]
    video = video_of([*clip.frames(80)], clip.fps)
    batch = pack(processor, [video], [asked], [clip_cells(clip, 3, 5)])
    losses = []
    for example in asked:
        alone = processor([video], [example.prefix], [example.suffix])
        logits = model(**{key: value for key, value in alone.items() if key != "labels"}).logits[0, :-1]
        wanted = alone["labels"][0, 1:] != IGNORE
        losses.append(
            torch.nn.functional.cross_entropy(
                logits[wanted], alone["labels"][0, 1:][wanted], reduction="none"
            )
        )
    weights = batch.weights[batch.labels != IGNORE]
    expected = (torch.cat(losses) * weights).sum() / weights.sum()
    torch.testing.assert_close(read(model, batch).loss, expected, rtol=1e-5, atol=0)
    assert weights.tolist() == [1.0, 1.0, 1.0, pytest.approx(0.3), 3.0, pytest.approx(0.3)]


def test_a_batch_depends_on_its_number_alone() -> None:
    _, processor = build("qwen2_vl", 0)
    whole = ClipBatches(processor, seed=5, steps=4, rows=2, questions=2)
    later = ClipBatches(processor, seed=5, steps=2, rows=2, questions=2, first_step=2)
    assert torch.equal(whole[2].input_ids, later[0].input_ids)
    assert "pixel_values_videos" in whole[2].pixels
    assert "pixel_values" in whole[3].pixels
    assert not torch.equal(whole[0].input_ids[0, -5:], whole[2].input_ids[0, -5:])
    for batch in (whole[2], whole[3]):
        grids = next(grid for name, grid in batch.pixels.items() if "grid" in name)
        tokens = int(grids.prod(dim=1).sum()) // 4
        assert {len(cells) for cells in batch.cells.values()} == {tokens}


def test_cells_say_what_lies_there_and_where_it_moves() -> None:
    rng = np.random.default_rng(0)
    clip = training_clip(rng, 8, 64, 64)
    cells = {name: found.reshape(4, 4, 4) for name, found in clip_cells(clip, 4, 4).items()}
    seen = 0
    for actor in clip.actors:
        for step, second in enumerate(clip.times[::2]):
            thing = actor.at(second)
            if thing is None:
                continue
            row, column = int(thing.y // 16), int(thing.x // 16)
            assert cells["color"][step, row, column] > 0
            assert cells["shape"][step, row, column] > 0
            assert MOTIONS[cells["motion"][step, row, column]] == actor.motion
            seen += 1
    assert seen > 4
    assert (cells["color"] == 0).any()


def test_cells_know_both_frames_of_a_token() -> None:
    """A thing that appears between them lies in a cell of the second alone."""
    rng = np.random.default_rng(1)
    appeared = 0
    for _ in range(30):
        clip = training_clip(rng, 4, 64, 64, rates=(1,))
        cells = {name: found.reshape(2, 4, 4) for name, found in clip_cells(clip, 4, 4).items()}
        for step, second in enumerate(clip.times):
            which = "next_" if step % 2 else ""
            for thing in clip.at(second).things:
                place = step // 2, int(thing.y // 16), int(thing.x // 16)
                assert cells[f"{which}color"][place] > 0
                assert cells[f"{which}shape"][place] > 0
        alone = (cells["color"][0] == 0) & (cells["next_color"][0] > 0)
        appeared += any(
            event.verb == "appears" and event.second == 1 and alone.any() for _, event in clip.events
        )
    assert appeared > 2


@pytest.mark.parametrize(("name", "between"), [("qwen2_vl", 1), ("qwen2_5_vl", 4)])
def test_places_are_those_of_positions(name: str, between: int) -> None:
    """At one frame a second, a step of two frames is 1 position long, or 2 seconds of 2 positions each."""
    model, processor = build(name, 0)
    rng = np.random.default_rng(0)
    clips = [training_clip(rng, 6, 80, 48, rates=(1,)) for _ in range(2)]
    shown = [video_of([*clip.frames(80)], clip.fps) for clip in clips]
    asked = [[Example("count", "how many?", "2")]] * 2
    reading = read(model, pack(processor, shown, asked, [clip_cells(clip, 3, 5) for clip in clips]))
    time, row, column = reading.places.view(3, 2, 3, 3, 5)
    steps = between * torch.arange(3)
    assert torch.equal(time, steps.view(1, 3, 1, 1).expand_as(time))
    assert torch.equal(row, torch.arange(3).view(1, 1, 3, 1).expand_as(row))
    assert torch.equal(column, torch.arange(5).expand_as(column))
    assert reading.early.shape == reading.tokens.shape == (90, model.config.text.hidden_size)


def test_a_tower_sees_two_frames_of_each_clip() -> None:
    """Each pair, with its labels, is one of the whole clip's."""
    _, processor = build("qwen2_vl", 0)
    batches = ClipBatches(processor, seed=5, steps=1, rows=3, questions=0, pictures=0, pairs=True)
    whole = ClipBatches(processor, seed=5, steps=1, rows=3, questions=0, pictures=0)
    pairs, clips = batches[0], whole[0]
    grids = clips.pixels["video_grid_thw"]
    assert torch.equal(pairs.pixels["video_grid_thw"], grids.clamp(max=torch.tensor([1, 99, 99])))
    steps = int(grids[0, 0])
    shown = pairs.pixels["pixel_values_videos"].unflatten(0, (3, 1, -1))
    same = (clips.pixels["pixel_values_videos"].unflatten(0, (3, steps, -1)) == shown).flatten(2).all(2)
    assert same.sum(1).tolist() == [1, 1, 1]
    for name, cells in pairs.cells.items():
        of_clips = clips.cells[name].view(3, steps, -1)
        assert torch.equal(cells.view(3, -1), of_clips[same]), name


def test_the_first_layer_begins_where_motion_is_loud() -> None:
    """Of what it gives out, the part that is 0 where both frames are alike is as large as the rest."""
    run = MovingRun(replace(SMALL, rows=12), workers=0)
    batch = next(iter(run.batches()))
    patches, embeddings = batch.pixels["pixel_values_videos"], run.model.vision_tower.embeddings
    frames = patches.unflatten(1, (3, 2, -1))
    still = frames.mean(2, keepdim=True).expand_as(frames).flatten(1)

    def share() -> float:
        out, of_still = embeddings(patches), embeddings(still)
        return float(((out - of_still).var(0).sum() / out.var(0).sum()).detach())

    before = share()
    whiten(embeddings, patches)
    assert before < 0.25
    assert share() > 0.35
    out = embeddings(patches)
    assert out.var(0).max() < 1.0
    off = out.T.cov() - out.T.cov().diag().diag()
    assert off.abs().max() < 1e-3


def test_clips_have_every_rate_and_no_boxes() -> None:
    rng = np.random.default_rng(0)
    clips = [training_clip(rng, frames, *CLIP_SIDES[0]) for frames in (4, 6, 8) for _ in range(20)]
    assert {clip.fps for clip in clips} == {1, 2}
    assert all(len(clip.times) == clip.seconds * clip.fps and clip.seconds >= 2 for clip in clips)
    endless = of_tasks(examples(clips[0], rng), ("direction", "caption"))
    assert {next(endless).task for _ in range(10)} <= {"direction", "caption"}


def test_each_stage_trains_its_part() -> None:
    run = MovingRun(SMALL, workers=0)
    for step, batch in enumerate(run.batches()):
        before = {name: tensor.clone() for name, tensor in run.masters.named_parameters()}
        losses = run.advance(batch)
        moved = {
            name for name, tensor in run.masters.named_parameters() if not torch.equal(tensor, before[name])
        }
        blocks = {name for name in moved if name.startswith("model.vision_tower.layers.")}
        decoder = {name for name in moved if name.startswith("model.language_model.")}
        assert "head.weight" in moved
        assert ("places.weight" in moved) == (step >= 2)
        assert bool(blocks) == (step < 2)
        assert bool(decoder) == (step >= 2)
        assert ("answer" in losses) == (step >= 2)


def test_nobody_knows_how_a_picture_moves() -> None:
    run = MovingRun(SMALL, workers=0)
    _, pictures = (ClipBatches(run.processor, seed=0, steps=2, rows=2, questions=1)[step] for step in (0, 1))
    assert (pictures.cells["motion"] == IGNORE).all()
    tokens = run.model.encode_images(pictures.input_ids, **pictures.pixels)[0].features
    assert torch.isfinite(run.head.loss(tokens, pictures))


def test_a_run_that_is_resumed_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_moving(tmp_path / "whole", SMALL, loop=QUIET)
    advance = MovingRun.advance
    for stop in (1, 3):  # in either stage
        out = tmp_path / f"stopped {stop}"

        def until(run: MovingRun, batch: object, stop: int = stop) -> dict[str, float]:
            if run.step == stop:
                raise RuntimeError
            return advance(run, batch)  # type: ignore[arg-type]

        monkeypatch.setattr(MovingRun, "advance", until)
        with pytest.raises(RuntimeError):
            train_moving(out, SMALL, loop=QUIET)
        monkeypatch.setattr(MovingRun, "advance", advance)
        train_moving(out, SMALL, loop=replace(QUIET, resume=True))
        assert_same_end(out, tmp_path / "whole")


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_command_trains_what_answers_about_a_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, clip = tmp_path / "run", tmp_path / "clip.gif"
    small = "--tower-steps 1 --steps 1 --rows 2 --questions 1 --warmup-steps 1"
    small += " --workers 0 --measure-every 0"
    assert main(["train", "--system", name, "--out", str(out), *small.split()]) == 0
    assert (out / "model.safetensors").stat().st_size < 1.5e6
    save_clip(training_clip(np.random.default_rng(0), 8, 64, 64), clip, 64)
    asked = ["ask", str(clip), "--prompt", "what happens first?", "--model", str(out)]
    assert main([*asked, "--max-new-tokens", "4"]) == 0
    model, processor = load(out)
    assert model.config == build(name, 0)[0].config
    assert processor.system == ""
    assert capsys.readouterr().out


def test_the_command_names_every_system_and_number() -> None:
    assert MOVING == SYSTEMS
    told = {name: default for numbers in RECIPE.values() for name, (default, _) in numbers.items()}
    told |= {name: default for name, (default, _) in SYSTEM_RECIPE["with --system"].items()}
    about = {
        name: text
        for numbers in (*RECIPE.values(), *SYSTEM_RECIPE.values())
        for name, (_, text) in numbers.items()
    }
    config = asdict(MovingConfig("qwen2_vl"))
    assert config.keys() - {"system", "seed", "warmup_steps"} == {*MOVING_RECIPE, *RATES}
    for name in (*MOVING_RECIPE, *RATES):
        if name in ("tower_steps", "steps", "rows", "questions"):
            assert about[name].endswith(f"of qwen2_vl and qwen2_5_vl {config[name]}"), name
        else:
            assert config[name] == told[name], name


def test_what_is_not_of_these_systems_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["train", "--out", str(tmp_path / "run"), "--system", "qwen2_vl"]
    assert main([*out, "--text-steps", "3"]) == 2
    assert "--text-steps is not of this system: leave it out" in capsys.readouterr().err
    with pytest.raises(InputError, match="there is no system 'qwen3': choose from qwen2_vl, qwen2_5_vl"):
        MovingConfig("qwen3")
