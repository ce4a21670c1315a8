"""The command line: what it prints, what it writes, and how it refuses.

Where exit codes and streams of a real process matter, one is started, which takes seconds; everything else
calls `main`. The model is untrained, so where the words of an answer matter they are put into its mouth.
"""

from __future__ import annotations

import gc
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from garbage import only_new_garbage
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import minivlm
from minivlm import cli, evaluation, processing
from minivlm.cli import main, pictures
from minivlm.cli.notes import unknown_words
from minivlm.cli.pictures import run_lengths
from minivlm.evaluation.columns import COLUMNS
from minivlm.models import load as loading
from minivlm.models import many_answers
from minivlm.models.answering import AnswerStream
from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Processor, images, text_to_masks
from minivlm.training import codebook, finetuning
from minivlm.training.contrastive_recipe import OBJECTIVES, SIZES_OF_TOWERS, ContrastiveConfig
from minivlm.training.reasoning_recipe import LOSSES, ReasoningConfig
from minivlm.training.recipe import TrainingConfig, build
from minivlm.world.composed_questions import COMPOSED_TASKS
from minivlm.world.demo import read_samples, write_samples

COMMANDS = (
    "demo", "ask", "look", "data", "train", "finetune", "merge", "convert", "train-contrastive",
    "train-codebook", "train-reasoning", "eval", "plan", "doctor", "workshop", "progress",
)  # fmt: skip
CAPTION = "a small red circle, a large blue star"
RED = "<loc0256><loc0128><loc0512><loc0640> red circle"  # y0 x0 y1 x1 of 1023
BLUE = "<loc0000><loc0512><loc0511><loc1023> blue star"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of an untrained model of the shipped shape."""
    folder = tmp_path_factory.mktemp("untrained")
    model, processor = build(TrainingConfig())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def processor(folder: Path) -> Processor:
    return Processor.from_pretrained(folder)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copied")


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (100, 300, 3), dtype=np.uint8)).save(path)
    return path


NOTE = "minivlm: note: "


class Ask:
    """`minivlm ask` with the untrained model, two tokens long unless told otherwise."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def __call__(self, *arguments: str | Path, length: int = 2, code: int = 0) -> tuple[str, str]:
        """What was printed on standard output, and on standard error except for notes."""
        fixed = ["ask", "--model", self.folder, "--max-new-tokens", length]
        assert main([str(argument) for argument in (*fixed, *arguments)]) == code
        out, err = self.capsys.readouterr()
        lines = err.splitlines(keepends=True)
        self.notes = [line.removeprefix(NOTE).rstrip() for line in lines if line.startswith(NOTE)]
        return out, "".join(line for line in lines if not line.startswith(NOTE))

    def refused(self, *arguments: str | Path, **options: int) -> str:
        out, err = self(*arguments, code=2, **options)
        assert out == ""
        return one_line(err)


def one_line(err: str, start: str = "minivlm: error: ") -> str:
    """The message of a refusal: one line, and no traceback."""
    assert err.startswith(start)
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert "Error(" not in err
    return err.removeprefix(start).rstrip()


@pytest.fixture
def ask(folder: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    return Ask(folder, capsys)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, processor: Processor) -> Callable[..., list[Tensor]]:
    """Make the model give these answers, in the order of the prompts. Returns the prompts' ids."""

    def answer_with(*answers: str) -> list[Tensor]:
        left = iter(answers)
        prompts: list[Tensor] = []

        def stream(model: Any, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Iterator[Tensor]:
            tokenizer = processor.tokenizer
            prompts.extend(
                ids[mask.bool()][None] for ids, mask in zip(input_ids, attention_mask, strict=True)
            )
            rows = [[*tokenizer.encode(next(left)), tokenizer.eos_id] for _ in input_ids]
            for step in range(max(map(len, rows))):
                model.unfinished = torch.tensor([step < len(row) for row in rows])  # as `Noting` does
                yield torch.tensor([row[step] if step < len(row) else tokenizer.pad_id for row in rows])

        monkeypatch.setattr(PaliGemma, "stream", stream)
        monkeypatch.setattr(many_answers, "batches", lambda lengths, *_: [list(range(len(lengths)))])
        return prompts

    return answer_with


def command(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A real process, in a folder where nothing is."""
    return subprocess.run(
        [sys.executable, "-m", "minivlm", *map(str, arguments)],
        env=environment() | options.pop("env", {}),
        **{"capture_output": True, "text": True, "timeout": 120, **options},
    )


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return inherited | {"PYTHONPATH": str(Path(minivlm.__file__).parents[1])}


# Asking


def test_every_prompt_about_every_picture(
    ask: Ask, say: Callable[..., list[Tensor]], picture: Path, tmp_path: Path
) -> None:
    other = shutil.copy(picture, tmp_path / "other.png")
    prompts = say("3", CAPTION, "none", RED)
    out, err = ask(picture, other, "--prompt", "how many circles are there?", "--prompt", "caption en")
    assert out.splitlines() == [
        f"{picture} | how many circles are there?",
        "3",
        f"{picture} | caption en",
        CAPTION,
        f"{other} | how many circles are there?",
        "none",
        f"{other} | caption en",
        RED,
        "  red circle: [37.5, 25.0, 187.7, 50.0]",
    ]
    assert err == ""
    assert [ids.shape[0] for ids in prompts] == [1, 1, 1, 1]


def test_the_untrained_model_answers(ask: Ask, picture: Path) -> None:
    """The same words as the library gives."""
    out, _ = ask(picture, "--prompt", "caption en", length=5)
    model, processor = minivlm.load(ask.folder)
    wanted = processor.decode(model.generate(**processor(picture, "caption en"), max_new_tokens=5))[0]
    assert out == f"{picture} | caption en\n{wanted}\n"


@pytest.mark.parametrize(
    "content",
    [
        "caption en\nwhat color is the star?\n",
        "# a\n#\ncaption en\n # b\nwhat color is the star?",
        "caption en\r\n\r\n  what color is the star?  \r\n\n\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_prompts_from_a_file(
    ask: Ask,
    say: Callable[..., list[Tensor]],
    picture: Path,
    tmp_path: Path,
    content: str,
    encoding: str,
) -> None:
    (tmp_path / "prompts.txt").write_bytes(content.encode(encoding))
    say("1", "2", "3")
    out, _ = ask(picture, "--prompts-file", tmp_path / "prompts.txt", "--prompt", "detect é", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["prompt"], line["answer"]) for line in lines] == [
        ("detect é", "1"),
        ("caption en", "2"),
        ("what color is the star?", "3"),
    ]


def test_json_has_boxes_in_pixels_of_the_picture(
    ask: Ask, say: Callable[..., list[Tensor]], picture: Path, tmp_path: Path
) -> None:
    tall = tmp_path / "tall.png"
    Image.new("RGB", (20, 2000)).save(tall)
    say(f"{RED} ; {BLUE}", RED, CAPTION, "none")
    out, err = ask(picture, tall, "--prompt", "detect it", "--prompt", "caption en", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert err == ""
    keys = {"picture", "prompt", "answer", "confidence", "boxes", "masks"}
    assert all(set(line) == keys for line in lines)
    assert [line["picture"] for line in lines] == [str(picture)] * 2 + [str(tall)] * 2
    # 300 x 100 pixels, though the model sees a square of 64
    wanted = [
        {"name": "red circle", "box": [37.5, 25.0, 187.7, 50.0]},
        {"name": "blue star", "box": [150.1, 0.0, 300.0, 50.0]},
    ]
    assert lines[0]["boxes"] == wanted
    assert lines[1]["boxes"] == wanted[:1]
    assert lines[2] == {
        "picture": str(tall),
        "prompt": "detect it",
        "answer": CAPTION,
        "confidence": None,  # the model is not asked
        "boxes": [],
        "masks": [],
    }


SEGMENTED = RED.replace(" red", "".join(f"<seg{number:03}>" for number in range(16)) + " red")


def test_json_has_masks_as_run_lengths(
    ask: Ask, say: Callable[..., list[Tensor]], picture: Path, processor: Processor
) -> None:
    """As COCO writes them: columns from the left, first a run outside the mask."""
    say(f"{SEGMENTED} ; {BLUE}")
    out, _ = ask(picture, "--prompt", "segment red circle", "--json")
    line = json.loads(out)
    assert [box["name"] for box in line["boxes"]] == ["red circle", "blue star"]
    (found,) = line["masks"]
    assert {name: found[name] for name in ("name", "box")} == line["boxes"][0]
    assert found["mask"]["size"] == [100, 300]
    wanted = text_to_masks(SEGMENTED, 300, 100)[0].mask
    assert wanted.any()
    assert np.array_equal(decode(found["mask"]), wanted)


def decode(mask: dict[str, Any]) -> np.ndarray:
    """COCO's uncompressed run lengths as an array of bools."""
    values = np.arange(len(mask["counts"])) % 2 == 1
    height, width = mask["size"]
    return np.repeat(values, mask["counts"]).reshape(width, height).T


@pytest.mark.parametrize("fill", [0.0, 0.5, 1.0])
def test_run_lengths(fill: float) -> None:
    mask = np.random.default_rng(0).random((5, 7)) < fill
    runs = run_lengths(mask)
    assert np.array_equal(decode(runs), mask)
    assert sum(runs["counts"]) == 35
    assert all(runs["counts"][1:])
    assert run_lengths(np.array([[0, 1, 1], [0, 0, 1]], dtype=bool)) == {
        "size": [2, 3],
        "counts": [2, 1, 1, 2],
    }


def test_boxes_of_a_turned_picture_are_those_of_the_upright_one(
    ask: Ask, say: Callable[..., list[Tensor]], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (300, 100)).save(tmp_path / "turned.jpg", exif=exif)
    say("<loc0000><loc0000><loc1023><loc1023> red circle")
    out, _ = ask(tmp_path / "turned.jpg", "--prompt", "detect red circle", "--json")
    assert json.loads(out)["boxes"][0]["box"] == [0, 0, 100, 300]


@pytest.mark.parametrize("name", ["boxes.png", "boxes.jpg", "BOXES.PNG", "new/folder/boxes.webp"])
def test_boxes_are_drawn(ask: Ask, say: Callable[..., list[Tensor]], tmp_path: Path, name: str) -> None:
    gray = tmp_path / "gray.png"
    Image.new("RGB", (400, 400), (128, 128, 128)).save(gray)
    say(RED)
    out, err = ask(gray, "--prompt", "detect red circle", "--draw", tmp_path / name)
    assert out.splitlines()[-1] == f"drawn: {tmp_path / name}"
    assert err == ""
    drawn = Image.open(tmp_path / name)
    assert drawn.size == (400, 400)
    assert drawn.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[name.lower().rpartition(".")[2]]
    changed = np.abs(np.asarray(drawn.convert("RGB")).astype(int) - 128).max(axis=2) > 30
    left, top, right, bottom = 50, 100, 250, 200
    assert changed[top : bottom + 1, [left, right]].all()  # the frame
    assert changed[[top, bottom], left : right + 1].all()
    assert not changed[top + 10 : bottom - 10, left + 10 : right - 10].any()  # and nothing inside


def test_masks_are_drawn_beside_boxes(ask: Ask, say: Callable[..., list[Tensor]], tmp_path: Path) -> None:
    """The answer to `segment` as a tinted shape in its box, the answer to `detect` as a frame."""
    Image.new("RGB", (400, 400), (128, 128, 128)).save(tmp_path / "gray.png")
    say(SEGMENTED, BLUE)
    prompts = ("--prompt", "segment red circle", "--prompt", "detect blue star")
    out, _ = ask(tmp_path / "gray.png", *prompts, "--draw", tmp_path / "out.png")
    assert out.splitlines()[2] == "  red circle: [50.0, 100.1, 250.2, 200.2]"
    pixels = np.asarray(Image.open(tmp_path / "out.png").convert("RGB")).astype(int)
    changed = np.abs(pixels - 128).max(axis=2) > 30
    mask = text_to_masks(SEGMENTED, 400, 400)[0].mask
    assert changed[mask].all()
    inside = np.zeros_like(mask)
    inside[110:190, 60:240] = True  # of the red circle's frame
    inside[:, 190:] = False  # the blue star's box begins there
    assert (~mask & inside).any()
    assert not changed[~mask & inside].any()
    assert changed[0:200, [200, 399]].all()  # the star's frame


@pytest.mark.parametrize("exists", [True, False])
def test_several_pictures_are_drawn_into_a_folder(
    ask: Ask, say: Callable[..., list[Tensor]], picture: Path, tmp_path: Path, exists: bool
) -> None:
    """One file each, also where two have the same name."""
    Image.new("RGB", (500, 400), "red").save(tmp_path / "b.png")
    shutil.copy(tmp_path / "b.png", tmp_path / "wide.jpg.png")
    (tmp_path / "other").mkdir()
    Image.new("RGB", (10, 20), "blue").save(tmp_path / "other" / "b.bmp")
    if exists:
        (tmp_path / "drawn").mkdir()
    say(CAPTION, RED, BLUE)
    out, _ = ask(
        picture, tmp_path / "b.png", tmp_path / "other" / "b.bmp", "--prompt", "detect x",
        "--draw", tmp_path / "drawn",
    )  # fmt: skip
    wanted = {"wide.png": (960, 320), "b.png": (500, 400), "b-2.png": (320, 640)}
    assert {path.name: Image.open(path).size for path in (tmp_path / "drawn").iterdir()} == wanted
    assert [line for line in out.splitlines() if "drawn: " in line] == [
        f"drawn: {tmp_path / 'drawn' / name}" for name in wanted
    ]


def test_one_picture_is_drawn_into_a_folder(
    ask: Ask, say: Callable[..., list[Tensor]], picture: Path, tmp_path: Path
) -> None:
    say(RED)
    ask(picture, "--prompt", "detect x", "--draw", tmp_path / "drawn", "--json")
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["wide.png"]


def test_drawings_that_would_replace_pictures(ask: Ask, picture: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        shutil.copy(picture, tmp_path / name)
    line = ask.refused(tmp_path / "a.png", tmp_path / "b.png", "--prompt", "x", "--draw", tmp_path)
    assert "a.png is read here, and would be overwritten" in line
    line = ask.refused(tmp_path / "a.png", tmp_path / "b.png", "--prompt", "x", "--draw", tmp_path / "c.png")
    assert line == f"{tmp_path}/c.png is one file, for 2 pictures: name a folder, such as {tmp_path}/c"


@pytest.mark.parametrize(
    ("name", "side"),
    [("a.webp", 16_384), ("a.jpg", 65_536), ("a.gif", 65_536), ("a.tga", 65_536), ("a.ico", 257)],
)
def test_drawings_that_no_format_can_hold(ask: Ask, tmp_path: Path, name: str, side: int) -> None:
    """They are refused before the model is asked, not after its answers."""
    Image.new("RGB", (side, 1)).save(tmp_path / "long.png")
    line = ask.refused(tmp_path / "long.png", "--prompt", "x", "--draw", tmp_path / name)
    assert re.search(r"a\.\w+ would have \d+ x \d+ pixels, which \w+ cannot hold: use a.png", line)


def test_a_drawing_that_fails(
    ask: Ask, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("Failed to encode image")

    monkeypatch.setattr(pictures, "_check_format", lambda path: None)
    monkeypatch.setattr(pictures, "_check_sides", lambda path, width, height: None)
    monkeypatch.setattr(Image.Image, "save", fail)
    _, err = ask(picture, "--prompt", "x", "--draw", tmp_path / "a.avif", code=2)
    assert one_line(err).endswith("a.avif cannot be written (Failed to encode image): use a.png")


def test_one_picture_is_held_at_a_time(
    ask: Ask, say: Callable[..., list[Tensor]], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref[Image.Image]] = []
    counts = []

    def spy(picture: Image.Image) -> Image.Image:
        gc.collect()
        counts.append(sum(one() is not None for one in opened))
        rgb = images.to_rgb(picture)
        opened.append(weakref.ref(rgb))
        return rgb

    monkeypatch.setattr(processing, "to_rgb", spy)
    say(*[CAPTION] * 5)
    with only_new_garbage():
        ask(*[picture] * 5, "--prompt", "caption en")
    assert len(counts) >= 5
    assert max(counts) <= 1


def test_a_typed_placeholder_is_text(
    ask: Ask, say: Callable[..., list[Tensor]], picture: Path, processor: Processor
) -> None:
    typed = "what is <image><image> and <bos> <eos> <pad>?"
    prompts = say("none", "none")
    ask(picture, "--prompt", "caption en", "--prompt", typed)
    plain, special = prompts
    tokenizer = processor.tokenizer
    for ids in (plain, special):
        assert int((ids == tokenizer.image_id).sum()) == processor.image_seq_length == 64
        assert int((ids == tokenizer.bos_id).sum()) == 1
        assert int((ids == tokenizer.eos_id).sum()) == 0
    assert typed in tokenizer.decode(special[0].tolist())


def test_a_prompt_of_placeholders_only(ask: Ask, picture: Path) -> None:
    out, _ = ask(picture, "--prompt", "<image>" * 5)
    assert out.startswith(f"{picture} | <image><image><image><image><image>\n")


def test_sampling_is_repeatable_with_a_seed(ask: Ask, picture: Path) -> None:
    arguments = [picture, "--prompt", "caption en", "--temperature", "5", "--top-k", "500", "--top-p", "0.99"]
    first, again, other = (ask(*arguments, "--seed", seed, length=12)[0] for seed in ("1", "1", "2"))
    assert first == again != other
    assert first != ask(picture, "--prompt", "caption en", length=12)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(ask: Ask, picture: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    load = loading.load

    def spy(*args: Any, **kwargs: Any) -> Any:
        loaded.append(kwargs["dtype"])
        return load(*args, **kwargs)

    monkeypatch.setattr(loading, "load", spy)
    out, _ = ask(picture, "--prompt", "caption en", "--dtype", dtype)
    assert len(out.splitlines()) >= 2
    assert loaded == [getattr(torch, dtype)]


# Notes, and how sure the model is


@torch.no_grad()
def test_the_least_sure_token_is_the_confidence(ask: Ask, picture: Path) -> None:
    """As a second pass over prompt and answer sees it."""
    out, _ = ask(picture, "--prompt", "caption en", "--json", length=4)
    model, processor = minivlm.load(ask.folder)
    inputs = processor(picture, "caption en")
    ids = model.generate(**inputs, max_new_tokens=4)
    start = inputs["input_ids"].shape[1] - 1
    everything = torch.cat([inputs["input_ids"], ids], dim=1)
    segments = torch.zeros_like(everything)
    segments[:, start + 1 :] = 1
    output = model(everything, pixel_values=inputs["pixel_values"], token_type_ids=segments)
    sure = output.logits[0, start:-1].softmax(-1)
    kinds = {i: kind for kind in (processor.tokenizer.loc_ids, processor.tokenizer.seg_ids) for i in kind}
    wanted = min(float(row[kinds.get(i, [i])].sum()) for row, i in zip(sure, ids[0].tolist(), strict=True))
    assert json.loads(out)["confidence"] == pytest.approx(wanted, abs=1e-4)


def test_temperature_does_not_change_how_sure_a_token_is(ask: Ask, picture: Path) -> None:
    arguments = [picture, "--prompt", "caption en", "--json", "--temperature", "50", "--top-k", "1"]
    hot, cold = (json.loads(ask(*some)[0]) for some in (arguments, arguments[:4]))
    assert hot == cold


def test_a_coordinate_counts_as_any_coordinate() -> None:
    model, processor = minivlm.load()
    stream = AnswerStream(model, processor, "figures/samples/scene_1.png", "detect cyan star")
    assert "".join(stream).endswith(" cyan star")
    assert stream.confidence is not None
    assert stream.confidence > 0.9  # a single one has about 0.1, since its neighbors are as good
    assert "logits" not in vars(model)  # the model is as it was


def test_notes_of_the_shipped_model(capsys: pytest.CaptureFixture[str]) -> None:
    scene = "figures/samples/scene_1.png"
    assert main(["ask", scene, "--prompt", "caption en", "--prompt", "what shape is the dog?"]) == 0
    out, err = capsys.readouterr()
    notes = err.splitlines()
    assert len(out.splitlines()) == 4
    assert notes[0].startswith('minivlm: note: the model never saw "dog" in training')
    assert re.search(r"the model is not sure: .* a probability of [1-4]?\d%$", notes[1])
    assert len(notes) == 2


@pytest.mark.parametrize(("size", "noted"), [((100, 201), True), ((300, 100), True), ((160, 90), False)])
def test_pictures_far_from_square(
    ask: Ask, say: Callable[..., list[Tensor]], tmp_path: Path, size: tuple[int, int], noted: bool
) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    say(CAPTION, CAPTION)
    ask(tmp_path / "a.png", "--prompt", "caption en", "--prompt", "caption en")
    assert len(ask.notes) == noted  # once, not for every prompt
    assert all(f"{size[0]} x {size[1]}" in note for note in ask.notes)


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("is the red circle left of the blue star?", []),
        ("detect red circle ; blue star", []),
        ("segment <loc0256> <seg003>", []),
        ("what is the dog doing to the dog?", ['"dog"', '"doing"', '"to"']),
        ("Caption en.", ['"Caption"', '"."']),
        ("détecte", ['"détecte"']),
    ],
)
def test_unknown_words(processor: Processor, prompt: str, unknown: list[str]) -> None:
    assert unknown_words(prompt, processor.tokenizer) == unknown


def test_every_prompt_of_the_samples_is_known(processor: Processor) -> None:
    prompts = {prompt for prompts in read_samples(Path("figures/samples")).values() for prompt in prompts}
    assert not any(unknown_words(prompt, processor.tokenizer) for prompt in prompts)


def test_a_large_vocabulary_knows_words_in_pieces(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(processor.tokenizer), "vocab_size", 256_000)
    assert unknown_words("what is the dog doing, é?", processor.tokenizer) == ['"é"']


# A conversation

# A signal that comes between the prompt and the wait for a key is only noted by Python, which then waits on.
# It takes a test that answers at once to meet that moment: where nothing happens, it presses again, as people
# do.
CTRL_C = b"\x03"


def converse(*lines: bytes, arguments: Sequence[str | Path]) -> tuple[str, int]:
    """What a terminal shows while these lines are typed into `minivlm ask`, and the exit code."""
    above, below = pty.openpty()

    def on_terminal() -> None:
        os.login_tty(below)  # so that Ctrl-C arrives as a signal,
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs ignore

    process = subprocess.Popen(
        [sys.executable, "-m", "minivlm", "ask", *map(str, arguments)],
        stdin=below,
        stdout=below,
        stderr=subprocess.STDOUT,
        env=environment() | {"TERM": "dumb"},
        preexec_fn=on_terminal,
    )
    os.close(below)
    shown, typed, waits = "", list(lines), 0
    try:
        while True:
            if not select.select([above], [], [], 20)[0]:
                waits += 1
                if lines[-1] == CTRL_C and not typed and waits == 1:
                    os.write(above, CTRL_C)
                if waits < 4:
                    continue
                process.kill()
                pytest.fail(f"nothing more came after {shown!r}")
            shown += os.read(above, 4096).decode()
            if shown.endswith("> ") and typed:
                os.write(above, typed.pop(0))
    except OSError:  # the process has left the terminal
        pass
    os.close(above)
    return shown.replace("\r", ""), process.wait(60)


def test_a_conversation_on_a_terminal(tmp_path: Path) -> None:
    """The picture stays, prompts come, a mistake does not end it, Ctrl-D does."""
    lines = (b"detect cyan star\n", b"\n", b"x " * 600 + b"\n", b"what color is the triangle?\n", b"\x04")
    shown, code = converse(*lines, arguments=["figures/samples/scene_1.png", "--draw", tmp_path / "a.png"])
    assert code == 0
    assert "Ask about the picture. Ctrl-D ends." in shown
    assert "<loc0481><loc0748><loc0677><loc0951> cyan star\n  cyan star: [" in shown
    assert "minivlm: error: " in shown
    assert "shorten the prompt" in shown
    assert "what color is the triangle?\nblue\n" in shown
    assert "scene_1.png |" not in shown
    assert (tmp_path / "a.png").exists()


def test_ctrl_c_ends_a_conversation() -> None:
    shown, code = converse(CTRL_C, arguments=["figures/samples/scene_1.png"])
    assert code == 130
    assert "Traceback" not in shown


# Streaming


class Recorder(io.StringIO):
    """Standard output that keeps a diary."""

    def __init__(self, diary: list[str]) -> None:
        super().__init__()
        self.diary = diary

    def write(self, text: str) -> int:
        self.diary.append(text)
        return len(text)

    def flush(self) -> None:
        self.diary.append("FLUSH")


def test_an_answer_appears_word_by_word(
    folder: Path, picture: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    diary: list[str] = []
    tokens = processor.tokenizer.encode("a small red circle")

    def stream(model: PaliGemma, **options: Any) -> Iterator[Tensor]:
        for number, token in enumerate(tokens):
            diary.append(f"TOKEN {number}")
            yield torch.tensor([token])

    monkeypatch.setattr(PaliGemma, "stream", stream)
    monkeypatch.setattr(sys, "stdout", Recorder(diary))
    assert main(["ask", str(picture), "--prompt", "caption en", "--model", str(folder)]) == 0
    diary = [entry for entry in diary if entry]
    assert diary[:12] == [
        "TOKEN 0", f"{picture} | caption en\na", "FLUSH",
        "TOKEN 1", " small", "FLUSH",
        "TOKEN 2", " red", "FLUSH",
        "TOKEN 3", " circle", "FLUSH",
    ]  # fmt: skip
    assert [entry for entry in diary[12:] if entry != "FLUSH"] == ["\n"]


def test_half_a_character_waits_for_its_other_half(
    ask: Ask, say: Callable[..., list[Tensor]], picture: Path, processor: Processor
) -> None:
    word = "zе€𝄞"  # two, three and four bytes, none of them in the vocabulary
    assert len(processor.tokenizer.encode(word)) > len(word)
    say(word)
    assert ask(picture, "--prompt", "caption en")[0].splitlines()[1] == word


def test_bytes_that_form_no_character_are_shown_at_the_end(
    ask: Ask, picture: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [*processor.tokenizer.encode("red"), processor.tokenizer.encode("€")[0]]

    def stream(model: PaliGemma, **options: Any) -> Iterator[Tensor]:
        yield from (torch.tensor([token]) for token in ids)

    monkeypatch.setattr(PaliGemma, "stream", stream)
    assert ask(picture, "--prompt", "caption en")[0].splitlines()[1] == "red\ufffd"


# Pictures of every kind


def kinds() -> dict[str, tuple[str, Image.Image]]:
    """File name and picture."""
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    with_alpha = color.copy()
    with_alpha.putalpha(100)
    return {
        "1x1": ("a.png", Image.new("RGB", (1, 1), "red")),
        "long": ("a.png", Image.new("RGB", (20_000, 10), "red")),
        "tall": ("a.png", Image.new("RGB", (3, 9_000), "red")),
        "CMYK": ("a.jpg", color.convert("CMYK")),
        "palette": ("a.png", color.convert("P")),
        "palette GIF": ("a.gif", color.convert("P")),
        "16-bit": ("a.png", Image.fromarray(rng.integers(0, 65536, (20, 30), dtype=np.uint16))),
        "RGBA": ("a.png", with_alpha),
        "gray": ("a.png", color.convert("L")),
        "gray with alpha": ("a.png", with_alpha.convert("LA")),
        "two colors": ("a.png", color.convert("1")),
        "WebP": ("a.webp", color),
        "TIFF of floats": ("a.tiff", Image.fromarray(rng.random((20, 30), dtype=np.float32))),
    }


@pytest.mark.parametrize("kind", kinds())
def test_pictures_of_every_kind(ask: Ask, tmp_path: Path, kind: str) -> None:
    name, picture = kinds()[kind]
    picture.save(tmp_path / name)
    out, err = ask(tmp_path / name, "--prompt", "caption en", "--draw", tmp_path / "out.png")
    assert out.startswith(f"{tmp_path / name} | caption en\n")
    assert err == ""
    size = Image.open(tmp_path / "out.png").size
    assert max(size) <= 20_000
    assert size[0] / size[1] == pytest.approx(picture.width / picture.height, rel=0.2)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_file_name_that_no_terminal_can_show(
    as_json: bool, folder: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a terminal that shows nothing but ASCII."""
    name = os.fsencode(tmp_path) + b"/\xff\xc3\xa9.png"
    try:
        shutil.copy(picture, name)
    except OSError:
        pytest.skip("the file system takes names in UTF-8 only")
    path = os.fsdecode(name)
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    arguments = ["ask", path, "--prompt", "caption en", "--model", str(folder), "--max-new-tokens", "2"]
    assert main([*arguments, *(["--json"] if as_json else [])]) == 0
    printed = out.getvalue().decode("ascii")
    if as_json:
        assert json.loads(printed)["picture"] == path
    else:
        assert printed.startswith(f"{tmp_path}/\\udcff\\xe9.png | caption en\n")


# Refusals: exit code 2, and one line that says what to do


def bomb(path: Path) -> None:
    """A PNG that announces 30000 x 30000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file: check the path"),
        ("folder", "is a folder, not a picture: name one"),
        ("text", "is not a picture in a known format: use PNG"),
        ("empty", "is empty: copy or download"),
        ("truncated", "is truncated or damaged .*: copy or download it again"),
        ("bomb", "the limit against decompression bombs: make the picture smaller"),
    ],
)
def test_pictures_that_are_refused(
    ask: Ask, picture: Path, tmp_path: Path, kind: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bad.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "bomb":
        bomb(path)
    elif kind != "missing":
        content = {"text": b"hello", "empty": b"", "truncated": picture.read_bytes()[:20_000]}[kind]
        path.write_bytes(content)

    def too_early(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded before the pictures were looked at")

    monkeypatch.setattr(loading, "load", too_early)
    line = ask.refused(picture, path, "--prompt", "caption en")
    assert re.search(message, line)
    assert str(path) in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to ask: add --prompt"),
        (["--prompt", ""], "--prompt is empty: ask something"),
        (["--prompt", "caption en", "--prompt", " \n"], "--prompt is empty: ask something"),
        (["--prompts-file", "missing.txt"], "missing.txt cannot be read: No such file"),
        (["--prompts-file", "."], "cannot be read: Is a directory"),
        (["--prompts-file", "blank.txt"], "holds no prompt: write one a line"),
        (["--prompts-file", "comments.txt"], "holds no prompt: write one a line"),
        (["--prompts-file", "latin.txt"], "cannot be read: it is not UTF-8 text"),
        (["--prompt", "a\ud800"], "character 1 of the text is not Unicode"),
        (["--prompt", "caption en", "--max-new-tokens", "0"], "max_new_tokens is 0: ask for at least 1"),
        (["--prompt", "caption en", "--max-new-tokens", "-3"], "max_new_tokens is -3"),
        (["--prompt", "caption en", "--max-new-tokens", "10000"], "context of 512: ask for at most 44[0-9]"),
        (["--prompt", "x " * 600], "more than the model's context of 512: .*shorten the prompt"),
        (["--prompt", "caption en", "--temperature", "-1"], "temperature is -1.0: use 0"),
        (["--prompt", "caption en", "--contrast", "-1"], "contrast is -1.0: choose 0 for none"),
        (
            ["--prompt", "caption en", "--temperature", "1", "--top-p", "0"],
            "top_p is 0.0: it is a probability",
        ),
        (["--prompt", "caption en", "--temperature", "1", "--top-p", "1.5"], "top_p is 1.5"),
        (["--prompt", "caption en", "--temperature", "1", "--top-k", "0"], "top_k is 0: keep at least 1"),
        (
            ["--prompt", "caption en", "--device", "nonsense"],
            "device 'nonsense' cannot be used .*--device cpu",
        ),
        (["--prompt", "caption en", "--device", "meta"], "device 'meta' cannot be used here"),
        (["--prompt", "caption en", "--draw", "boxes.xyz"], "use something like boxes.png"),
        (["--prompt", "caption en", "--draw", "boxes.psd"], "use something like boxes.png"),  # read only
        (["--prompt", "caption en", "--draw", "boxes.xbm"], "use something like boxes.png"),  # no colors
    ],
)
def test_arguments_that_are_refused(
    ask: Ask,
    picture: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("comments.txt").write_text("# caption en\n#\n")
    Path("blank.txt").write_text("\n  \n")
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    before = set(tmp_path.iterdir())
    assert re.search(message, ask.refused(picture, *arguments))
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["photo.png", "./photo.png", "link.png", "prompts.png"])
def test_a_drawing_replaces_no_input(
    ask: Ask, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(picture, "photo.png")
    Path("link.png").symlink_to("photo.png")
    Path("prompts.png").write_text("caption en")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    line = ask.refused("photo.png", "--prompts-file", "prompts.png", "--draw", name)
    assert line == f"{Path(name)} is read here, and would be overwritten: choose another name to write to"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert Path("link.png").is_symlink()


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "bmp"])
def test_a_drawing_replaces_drawings_alone(ask: Ask, picture: Path, tmp_path: Path, ending: str) -> None:
    """Of ours, which say so themselves; a photograph of the same name stays, also behind a link."""
    photograph, drawing = tmp_path / f"photo.{ending}", tmp_path / f"drawing.{ending}"
    Image.open(picture).convert("RGB").save(photograph)
    (tmp_path / f"link.{ending}").symlink_to(photograph.name)
    before = photograph.read_bytes()
    for name in (photograph.name, f"link.{ending}"):
        line = ask.refused(picture, "--prompt", "caption en", "--draw", tmp_path / name)
        assert line.endswith("exists, and would be overwritten: choose another name, or remove it first")
    assert photograph.read_bytes() == before
    ask(picture, "--prompt", "caption en", "--draw", drawing)
    if ending == "bmp":  # cannot say what it is
        ask.refused(picture, "--prompt", "caption en", "--draw", drawing)
    else:
        ask(picture, "--prompt", "caption en", "--draw", drawing)


def test_a_drawing_replaces_no_device(ask: Ask, picture: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    line = ask.refused(picture, "--prompt", "caption en", "--draw", tmp_path / "pipe.png")
    assert "pipe.png is a folder, a device or a pipe" in line
    assert (tmp_path / "pipe.png").is_fifo()


def break_folder(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    if kind == "missing config":
        (folder / "config.json").unlink()
    if kind == "config is no JSON":
        (folder / "config.json").write_text('{"model_type": "pali')
    if kind == "other system":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "llava_next"}))
    if kind == "no answers":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    if kind == "pickled only":
        weights.rename(folder / "pytorch_model.bin")
    if kind == "no weights":
        weights.unlink()
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5000])
    if kind == "missing shard":
        weights.rename(folder / "model-00001-of-00002.safetensors")
        names = load_file(folder / "model-00001-of-00002.safetensors")
        weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
        weight_map["language_model.model.norm.weight"] = "model-00002-of-00002.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if kind in ("NaN", "missing tensor", "other shape"):
        tensors = load_file(weights)
        name = "multi_modal_projector.linear.bias"
        if kind == "NaN":
            tensors[name][3] = torch.nan
        if kind == "missing tensor":
            del tensors[name]
        if kind == "other shape":
            tensors[name] = torch.zeros(7)
        save_file(tensors, weights, metadata={"format": "pt"})
    if kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    if kind == "damaged tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    if kind == "no preprocessor":
        (folder / "preprocessor_config.json").unlink()
    if kind == "picture of another size":
        config["vision_config"]["image_size"] = 128
        (folder / "config.json").write_text(json.dumps(config))
    if kind == "nothing":
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing config", "has no config.json: is it a checkpoint folder"),
        ("config is no JSON", r"config.json cannot be read .*: download the file again"),
        ("other system", "type 'llava_next', and only paligemma, .*can write answers: choose another"),
        ("no answers", "type 'clip', and only paligemma, .*can write answers: choose another"),
        ("pickled only", "pytorch_model.bin: a pickle can run code .* Download the safetensors version"),
        ("no weights", "has neither model.safetensors nor .*: download the weights"),
        ("truncated", "model.safetensors is damaged or incomplete .*: download it again"),
        ("missing shard", "lacks model-00002-of-00002.safetensors, named in .*: download the folder again"),
        ("NaN", r"NaN or infinity in multi_modal_projector\S*bias: it is damaged, download it again"),
        ("missing tensor", "1 missing: multi_modal_projector.linear.bias"),
        ("other shape", r"multi_modal_projector.linear.bias is \[7\], expected \[128\]"),
        ("no tokenizer", "has no tokenizer.json"),
        ("damaged tokenizer", "is not a tokenizer .*: download it again"),
        ("no preprocessor", "has no preprocessor_config.json"),
        ("picture of another size", "the picture's side is 128 in config.json and 64 in preprocessor_config"),
        ("nothing", "is neither a folder nor a repo id"),
    ],
)
def test_folders_that_are_refused(
    kind: str, message: str, copied: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_folder(copied, kind)
    ask = Ask(copied, capsys)
    assert re.search(message, ask.refused(picture, "--prompt", "caption en"))


def test_a_repo_id_without_a_network(picture: Path, tmp_path: Path) -> None:
    done = command(
        "ask", picture, "--prompt", "caption en", "--model", "nobody/nothing",
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no folder nobody/nothing" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenes", "0"], "--scenes is 0: ask for at least 1"),
        (["--seed", "-1"], "--seed is -1: it must not be negative"),
    ],
)
def test_evaluations_that_are_refused(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--model", str(folder), *arguments]) == 2
    assert message in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paint"], "invalid choice: 'paint'"),
        (["evl"], "; did you mean eval?"),
        (["asc", "a.png"], "; did you mean ask?"),
        (["ask", "a.png", "--promt", "x"], "; did you mean --prompt?"),
        (["ask", "a.png", "--promt=x"], "; did you mean --prompt?"),
        (["ask", "a.png", "--dtype", "bfloat"], "; did you mean bfloat16?"),
        (["train", "--muonlr", "1"], "; did you mean --muon-lr?"),
        (["ask", "a.png", "--model", ""], "argument --model: it is empty"),
        (["ask", "a.png", "--draw", " "], "argument --draw: it is empty"),
        (["eval", "--model", ""], "argument --model: it is empty"),
        (["eval", "--data", ""], "argument --data: it is empty"),
        (["train", "--out", ""], "argument --out: it is empty"),
        (["finetune", "--data", "a.jsonl", "--model", ""], "argument --model: it is empty"),
        (["train-contrastive", "--teacher", ""], "argument --teacher: it is empty"),
        (["workshop", ""], "argument OUT: it is empty"),
        (["ask"], "required: PICTURE"),
        (["ask", "a.png", "--promt", "x"], "unrecognized arguments: --promt"),
        (["ask", "a.png", "--prompt"], "argument --prompt: expected one argument"),
        (["ask", "a.png", "--temperature", "warm"], "invalid float value: 'warm'"),
        (["ask", "a.png", "--max-new-tokens", "2.5"], "invalid int value: '2.5'"),
        (["ask", "a.png", "--dtype", "float8"], "invalid choice: 'float8'"),
        (["eval", "--scenes", "many"], "invalid int value: 'many'"),
        (["eval", "--columns", "held-out"], "invalid choice: 'held-out' (choose from"),
        (["train", "--workers", "-1"], "'-1' is not a whole number from 0 on"),
        (["finetune", "--freeze", "head"], "invalid choice: 'head'"),
        (["finetune", "--on-bad-line", "guess"], "invalid choice: 'guess'"),
        (["train-codebook"], "required: --out"),
        (["train-codebook", "--out", "a.npz", "--steps", "0"], "'0' is not a whole number above 0"),
        (["train", "--threads", "0"], "'0' is not a whole number above 0"),
        (["train", "--save-every", "0"], "'0' is not a whole number above 0"),
        (["train", "--threads", "two"], "'two' is not a whole number above 0"),
        (["train", "--muon-lr", "fast"], "invalid float value: 'fast'"),
        (["train", "--epochs", "2"], "unrecognized arguments: --epochs 2"),
        (["finetune", "--data", "a.jsonl", "--muon-lr", "1"], "unrecognized arguments: --muon-lr 1"),
        (["finetune"], "required: --data"),
        (["train-contrastive", "--objective", "answers"], "invalid choice: 'answers'"),
        (["train-contrastive", "--epochs", "2"], "unrecognized arguments: --epochs 2"),
    ],
)
def test_command_lines_that_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.match(r"minivlm( [\w-]+)?: error: ", err)
    assert message in err
    assert re.search(r"\(see \S*(python\S* -m )?minivlm( [\w-]+)? --help\)$", err.rstrip())


@pytest.mark.parametrize(
    ("arguments", "old", "new"),
    [
        (["train", "--data", "my.jsonl", "--epochs", "5"], "train --data", "finetune"),
        (["train", "--out", "runs/x", "--data=my.jsonl"], "train --data", "finetune"),
        (["train", "--objective", "siglip"], "train --objective", "train-contrastive"),
        (["train", "--data", "my.jsonl", "--objective=lit"], "train --objective", "train-contrastive"),
        (["train-masks", "--out", "a.npz"], "train-masks", "train-codebook"),
    ],
)
def test_old_spellings_name_the_new_command(
    arguments: list[str], old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert one_line(err) == f"minivlm {old} is now minivlm {new}: see minivlm {new} --help"


def test_a_refusal_of_a_real_process(picture: Path) -> None:
    done = command("ask", picture.with_name("missing.png"), "--prompt", "caption en")
    assert (done.returncode, done.stdout) == (2, "")
    assert "missing.png: no such file" in one_line(done.stderr)


def test_a_mistake_of_ours_is_not_taken_for_one_of_the_user(
    ask: Ask, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any, **kwargs: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(loading, "load", wrong)
    with pytest.raises(ValueError, match="a bug"):
        ask(picture, "--prompt", "caption en")


# Stopped, and readers that leave


def test_ctrl_c(ask: Ask, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load", stop)
    out, err = ask(picture, "--prompt", "caption en", code=130)
    assert (out, err) == ("", "minivlm: stopped\n")


@pytest.mark.parametrize("module", ["torch", "argparse"])
def test_ctrl_c_while_modules_are_imported(module: str, picture: Path, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    done = command("ask", picture, "--prompt", "caption en", env={"PYTHONPATH": path})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "minivlm: stopped\n")


@pytest.mark.parametrize("closed", [">&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(folder: Path, picture: Path, tmp_path: Path, closed: str) -> None:
    """Nobody reads the answer, and no file takes the stream's place."""
    words = [
        sys.executable, "-m", "minivlm", "ask", picture, "--prompt", "caption en", "--model", folder,
        "--max-new-tokens", "2", "--draw", tmp_path / "out.png",
    ]  # fmt: skip
    line = f"{shlex.join(map(str, words))} {closed}"
    done = subprocess.run(line, shell=True, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert all(said.startswith(NOTE) for said in done.stderr.splitlines())
    assert Image.open(tmp_path / "out.png").format == "PNG"


ESCAPE = "\x1b]0;title\x07\x9b2J\u202e"


def test_nothing_is_printed_that_a_terminal_obeys(
    ask: Ask, say: Callable[..., list[Tensor]], picture: Path, tmp_path: Path
) -> None:
    """Names, prompts, answers, and messages about them."""
    path = shutil.copy(picture, tmp_path / f"{ESCAPE}.png")
    say(f"{ESCAPE}\n{RED}{ESCAPE}", RED)
    drawn = tmp_path / f"{ESCAPE}.jpg"
    out, _ = ask(path, "--prompt", f"detect {ESCAPE}", "--prompt", "caption en", "--draw", drawn)
    refused = ask.refused(tmp_path / f"{ESCAPE}.gif", "--prompt", "caption en")
    shown = "\\x1b]0;title\\x07\\x9b2J\\u202e"
    for text in (out, refused, *ask.notes):
        assert all(letter == "\n" or letter.isprintable() for letter in text)
    assert f"{tmp_path}/{shown}.png | detect {shown}\n{shown}\n<loc0256>" in out
    assert f"drawn: {tmp_path}/{shown}.jpg" in out
    assert f"{shown}.gif: no such file" in refused


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "LONG", "--prompt", "x"],
        ["ask", "PICTURE", "--prompt", "x", "--model", "LONG"],
        ["ask", "PICTURE", "--prompt", "x", "--draw", "LONG.png"],
        ["ask", "PICTURE", "--prompt", "x", "--draw", "LONG"],
        ["ask", "PICTURE", "--prompts-file", "LONG"],
        ["look", "PICTURE", "--out", "LONG"],
        ["look", "LONG"],
        ["eval", "--model", "LONG"],
        ["train", "--out", "LONG"],
        ["train-codebook", "--out", "LONG"],
        ["finetune", "--data", "LONG"],
        ["workshop", "LONG"],
        ["progress", "LONG", "--yes"],
        ["demo", "--out", "LONG"],
    ],
    ids=" ".join,
)
def test_names_that_are_too_long(
    arguments: list[str], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    long = "n" * 300
    typed = [word.replace("LONG", long).replace("PICTURE", str(picture)) for word in arguments]
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    assert main(typed) == 2
    line = one_line(err.getvalue())
    assert long[:80] in line  # a long name may be cut
    assert "cannot write the answers" not in line


def read_first_line_and_leave(*arguments: str | Path) -> tuple[str, str]:
    """What `minivlm ... | head -1` shows, and what is complained about."""
    process = subprocess.Popen(
        [sys.executable, "-m", "minivlm", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 1
    process.stderr.close()
    return line, err


def test_a_reader_that_leaves_early(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(square := tmp_path / "square.png")  # of which there is nothing to note
    many = [item for _ in range(40) for item in ("--prompt", "caption en")]
    line, err = read_first_line_and_leave("ask", square, *many, "--model", folder, "--max-new-tokens", "2")
    assert line == f"{square} | caption en\n"
    assert err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_answers_that_find_no_room(folder: Path) -> None:
    with open("/dev/full", "w") as full:
        done = command(
            "eval", "--scenes", "1", "--columns", "held_out", "--model", folder,
            capture_output=False, stdout=full, stderr=subprocess.PIPE,
        )  # fmt: skip
    assert done.returncode == 1
    assert one_line(done.stderr) == "cannot write the answers: No space left on device"


# Evaluating


def test_evaluation_as_json(folder: Path) -> None:
    """One object, and nothing on standard error: no progress bar where nobody watches, no warnings."""
    columns = ("unseen_pairs", "held_out", "unseen_pairs")
    done = command("eval", "--model", folder, "--scenes", "5", "--json", "--columns", *columns)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    table = json.loads(done.stdout)
    assert list(table) == ["unseen_pairs", "held_out"]
    for metrics in table.values():
        assert {"color", "relation", "all questions", "exact caption", "box mean IoU"} < set(metrics)
        assert all(set(metric) == {"value", "majority", "cases"} for metric in metrics.values())
        assert metrics["exact caption"]["cases"] == 5
        assert all(0 <= metric["value"] <= 1 for metric in metrics.values())


def test_evaluation_as_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "eval",
        "--model",
        str(folder),
        "--scenes",
        "2",
        "--seed",
        "3",
        "--columns",
        "held_out",
        "jpeg",
    ]
    assert main(arguments) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("| | held-out scenes | JPEG | majority | cases |\n|---|")
    assert main(arguments) == 0
    assert capsys.readouterr().out == out


def test_the_whole_table_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        evaluation, "evaluate", lambda model, processor, **options: asked.append(options) or {}
    )
    assert main(["eval", "--model", str(folder), "--json"]) == 0
    assert asked == [{"scenes": 2000, "seed": 1, "columns": tuple(COLUMNS)}]


# The demonstration


@pytest.mark.parametrize("in_repository", [True, False])
def test_demo(
    in_repository: bool,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the repository with its samples, elsewhere with samples drawn on the spot."""
    model, processor = minivlm.load(folder)
    monkeypatch.setattr(model, "generate", lambda input_ids, **rest: answers(processor, input_ids))
    monkeypatch.setattr(loading, "load_answering", lambda: (model, processor))
    monkeypatch.chdir(tmp_path)
    if in_repository:
        Path("figures/samples").mkdir(parents=True)
        Image.new("RGB", (256, 256)).save("figures/samples/only.png")
        Path("figures/samples/prompts.json").write_text('{"only.png": ["caption en", "detect red circle"]}')
    assert main(["demo", "--out", "shown"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].split() == ["picture", "prompt", "answer"]
    rows = [line for line in lines if ".png  " in line and line.endswith((CAPTION, RED))]
    assert len(rows) == (2 if in_repository else 18)
    assert str(tmp_path / "shown") in out
    names = {path.name for path in Path("shown").glob("*.png")}
    assert names == ({"only.png"} if in_repository else {f"scene_{n}.png" for n in range(1, 7)})
    assert ("make lab" in out) == in_repository  # notebooks come with the repository alone
    sample = re.search(r"minivlm ask (\S+) ", out)
    assert sample
    assert Path(sample[1]).exists() != in_repository  # the real repository has a scene_1.png


def answers(processor: Processor, input_ids: Tensor) -> Tensor:
    """The caption to every prompt, and a box to the last one."""
    tokenizer = processor.tokenizer
    rows: list[Sequence[int]] = [tokenizer.encode_suffix(CAPTION)] * (len(input_ids) - 1)
    rows = [*rows, tokenizer.encode_suffix(RED)]
    width = max(map(len, rows))
    return torch.tensor([[*row, *[tokenizer.pad_id] * (width - len(row))] for row in rows])


def test_demo_in_a_folder_of_the_workshop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has the pictures that notebooks show, but no prompts. They stay as they are."""
    monkeypatch.chdir(tmp_path)
    Path("figures/samples").mkdir(parents=True)
    Path("figures/samples/scene_1.png").write_bytes(b"of the workshop")
    assert main(["demo"]) == 0
    assert "minivlm ask demo/samples/scene_1.png" in capsys.readouterr().out
    assert main(["demo"]) == 0  # once more, over its own pictures
    capsys.readouterr()
    assert main(["demo", "--out", "figures"]) == 2
    assert "figures/samples holds other files than samples: choose" in one_line(capsys.readouterr().err)
    assert Path("figures/samples/scene_1.png").read_bytes() == b"of the workshop"


def test_demo_replaces_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_samples(Path("figures/samples"))
    before = {path: path.read_bytes() for path in Path("figures/samples").iterdir()}
    assert main(["demo", "--out", "figures/samples"]) == 2
    assert "scene_1.png is read here, and would be overwritten" in one_line(capsys.readouterr().err)
    assert {path: path.read_bytes() for path in Path("figures/samples").iterdir()} == before


@pytest.mark.parametrize("content", ["[]", "{", '{"a.png": 3}'])
def test_damaged_samples(
    content: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loading, "load_answering", lambda: minivlm.load(folder))
    monkeypatch.chdir(tmp_path)
    Path("figures/samples").mkdir(parents=True)
    Path("figures/samples/prompts.json").write_text(content)
    assert main(["demo"]) == 2
    assert "prompts.json cannot be read" in one_line(capsys.readouterr().err)


# Help


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    examples = re.findall(r"^  (minivlm .*)$", out, re.MULTILINE)
    training = {"train", "finetune", "merge", "convert"}
    training |= {"train-contrastive", "train-codebook", "train-reasoning"}
    others = {"demo", "ask", "look", "data", "eval", "plan", "doctor", "workshop", "progress"}
    assert {line.split()[1] for line in examples} == training | others
    assert cli.EXAMPLES in out


def test_no_command_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    """For a script it is a mistake, so the code is that of argparse."""
    with pytest.raises(SystemExit) as exit:
        main([])
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert err == ""
    assert out == cli._parser().format_help()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"minivlm {minivlm.__version__}\n"


def test_no_torch_before_a_command_runs() -> None:
    """--help and mistakes in typing are answered in a moment, not after seconds."""
    asked = [["--help"], ["--version"], ["paint"], [], *([name, "--help"] for name in COMMANDS), ["ask"]]
    asked += [shlex.split(line)[1:] for line in cli.EXAMPLES.splitlines()[1:]]
    code = f"""
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from minivlm import cli
for arguments in {asked}:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()), suppress(SystemExit):
        cli._parse(arguments)
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert {"argparse", "minivlm.cli.train"} < set(done.stdout.split())
    assert {"torch", "numpy", "PIL", "tokenizers", "matplotlib"}.isdisjoint(done.stdout.split())


def test_numbers_that_commands_repeat() -> None:
    """Options are described without importing what they are about."""
    recipes = (
        (cli.train.RECIPE, TrainingConfig, ()),
        (cli.train_contrastive.RECIPE, ContrastiveConfig, cli.train_contrastive.OWN),
        (cli.train_reasoning.RECIPE, ReasoningConfig, cli.train_reasoning.OWN),
    )
    for recipe, config, own in recipes:
        written = {name: default for numbers in recipe.values() for name, (default, _) in numbers.items()}
        others = {*own, *cli.options.SHARED}
        assert written == {f.name: f.default for f in fields(config) if f.name not in others}
    assert tuple(COLUMNS) == cli.evaluate.COLUMNS
    assert tuple(finetuning.PARTS) == cli.finetune.PARTS
    assert cli.train_contrastive.OBJECTIVES == OBJECTIVES
    assert cli.train_reasoning.TASKS == COMPOSED_TASKS
    assert tuple(LOSSES) == cli.train_reasoning.LOSSES
    assert ReasoningConfig().warmup_steps == cli.train_reasoning.WARMUP_STEPS
    assert set(cli.train_contrastive.RECIPE["sizes of new towers"]) == set(SIZES_OF_TOWERS)
    assert signature(codebook.train_masks).parameters["steps"].default == cli.train_codebook.STEPS


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="comes with the extra [completion]")
    with pytest.raises(SystemExit) as exit:
        main(["--print-completion", shell])
    assert exit.value.code == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("train-contrastive", "--temperature", "bfloat16"))


def test_completion_without_its_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert "shtab is not installed" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("line", [line.strip() for line in cli.EXAMPLES.splitlines()[1:]])
def test_examples_of_the_help_are_understood(line: str) -> None:
    options = cli._parser().parse_args(shlex.split(line)[1:])
    assert callable(options.run)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("ask", ["--prompts-file", "--json", "--draw", "--temperature", "segment red circle"]),
        (
            "train",
            ["--resume", "--muon-lr", "--no-bf16", "(default: 0.02)", "--row-tokens", "steps of each stage:"],
        ),
        ("finetune", ["--resume", "--no-bf16", "--freeze", "suffix", "(default: runs/tuned)", "--lora RANK"]),
        ("merge", ["--model", "--adapter", "--out"]),
        ("convert", ["--model", "--quantize {int8,int4}", "--out"]),
        ("train-contrastive", ["--resume", "--teacher", "distill", "(default: 0.002)", "runs/OBJECTIVE"]),
        ("train-codebook", ["--steps", "(default: "]),
        (
            "train-reasoning",
            ["--think", "--task", "(default: 0.0002)", "--resume", "left_count", "curves.png"],
        ),
        ("eval", ["--scenes", "(default: 2000)", "--json", "unseen_pairs"]),
        ("data", ["convert", "check", "split"]),
        ("demo", ["--out"]),
        ("look", ["--prompt", "--out", "--no-occlusion", '(default: "caption en")']),
    ],
)
def test_help_of_commands(name: str, wanted: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    out, _ = capsys.readouterr()
    assert all(part in out for part in wanted)
    assert max(map(len, out.splitlines())) <= 110


def test_names_of_several_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "no\nsuch.png", "--prompt", "x"]) == 2
    assert "no such.png: no such file" in one_line(capsys.readouterr().err)
    with pytest.raises(SystemExit):
        main(["ask", "a.png", "--a\nb"])
    one_line(capsys.readouterr().err, "minivlm ask: error: ")
