"""How fast a training step is: beside transformers, as it grows, and beside the drawing of its batch.

Run: OMP_NUM_THREADS=1 python bench/train.py --threads 1 --out bench/results/train.txt

Answers per second. The same pairs of question and answer about the same pictures, from the same weights:

- ours: one step of `minivlm train` with everything in it: both losses (also the one on patches, which
  transformers does not have), backward, clipping, Muon and AdamW on fp32 weights, and the bf16 copy;
- transformers: PaliGemmaForConditionalGeneration in a plain loop: forward with labels and token_type_ids
  (which give the prefix-LM mask), backward, clipping, AdamW. One answer a row, a picture for each row,
  padded to the longest. Of eager and SDPA attention, and in bf16 of bf16 weights and autocast, the fastest
  is taken. It gets the rows of our step at once, and also in pieces of 48 rows, each a step of its own.

They take turns, so that whatever else the machine does meets all of them. A ratio is one of the same round.

Cost of a step: ours with more pictures, more questions and wider models, also drawn as a figure.

Drawing: the time in which another process draws a batch, as a share of the step that learns from it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from attention import processor as name_of_cpu
from attention import spread
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PaliGemmaForConditionalGeneration

from minivlm.training.precision import bf16_pays
from minivlm.training.recipe import TrainingConfig
from minivlm.training.scratch import Run
from minivlm.world.batches import Batch, SceneBatches
from minivlm.world.rows import PADDING

ENDLESS = 10**6  # steps of a stage; the learning rate warms up as long, so that the weights hardly move
PIECE = 48  # rows
CACHED = 10  # batches drawn before drawing is timed: the first ones fill caches
PICTURES, QUESTIONS = (12, 24, 48, 96), (1, 2, 4, 8)
WIDTHS = ((96, 128), (144, 208), (204, 296))  # of tower and decoder
FORMS = {"packed": "all questions of a picture in one row", "prefix": "one question a row"}  # by stage

Seconds = Callable[[], float]  # does the work once, and says how long it took
Clock = Callable[[], float]


def clock_for(threads: int) -> Clock:
    """Processor time where one thread does everything (other programs count little), else the wall's."""
    return time.process_time if threads == 1 else time.perf_counter


def in_turns(workers: Sequence[Seconds], rounds: int) -> list[list[float]]:
    """Seconds of each worker in each round. Who comes first changes from round to round."""
    times: list[list[float]] = [[] for _ in workers]
    for number in range(rounds):
        for place in range(len(workers)):
            chosen = (number + place) % len(workers)
            times[chosen].append(workers[chosen]())
    return times


# ---- batches -----------------------------------------------------------------------------------------------


def batches_of(
    run: Run, stage: str, pictures: int | None = None, questions: int | None = None
) -> SceneBatches:
    """The data of a stage. Where the number of questions is given, a packed row is as long as they need."""
    config = run.config
    packed = stage == "packed"
    row_tokens = (None if questions else config.row_tokens) if packed else config.prefix_row_tokens
    return SceneBatches(
        run.processor,
        config.patch_size,
        seed=config.seed,
        steps=ENDLESS,
        pictures=pictures or config.pictures,
        questions=questions or (config.questions if packed else config.prefix_questions),
        packed=packed,
        row_tokens=row_tokens,
    )


def answers(batch: Batch) -> int:
    """Pairs of question and answer in a batch."""
    return int(batch.blocks.amax(dim=1).clamp(min=0).sum())


def unpacked(batch: Batch) -> Batch:
    """The same questions, each in a row of its own."""
    pad = {"blocks": PADDING, "labels": -100}
    names = ("input_ids", "position_ids", "token_type_ids", "labels", "weights", "blocks")
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    pictures = []
    for row, picture in enumerate(batch.pictures):
        for block in range(1, int(batch.blocks[row].max()) + 1):
            inside = batch.blocks[row] == block
            for name in names:
                rows[name].append(getattr(batch, name)[row][inside])
            rows["blocks"][-1] = torch.ones_like(rows["blocks"][-1])
            pictures.append(picture)
    tables = {
        name: pad_sequence(tensors, batch_first=True, padding_value=pad.get(name, 0))
        for name, tensors in rows.items()
    }
    return replace(batch, pictures=torch.stack(pictures), **tables)


def reference_rows(batch: Batch, image_id: int, patches: int, rows: slice = slice(None)) -> dict[str, Tensor]:
    """What transformers' model takes for rows of one question each: every row brings its picture.

    Padded on the right to the longest of these rows, as a plain loop pads.
    """
    length = int((batch.blocks[rows] != PADDING).sum(dim=1).max())

    def after_image(value: int, table: Tensor) -> Tensor:
        text = table[rows, :length].long()
        return torch.cat([text.new_full((len(text), patches), value), text], dim=1)

    return {
        "input_ids": after_image(image_id, batch.input_ids),
        "attention_mask": after_image(1, batch.blocks != PADDING),
        "token_type_ids": after_image(0, batch.token_type_ids),
        "labels": after_image(-100, batch.labels),
        "pixel_values": batch.pixel_values[batch.pictures[rows]],
    }


# ---- steps -------------------------------------------------------------------------------------------------


def run_in(config: TrainingConfig, stage: str) -> Run:
    """A run that is in one stage from its first step, and stays there."""
    steps = {f"{name}_steps": ENDLESS if name == stage else 0 for name in config.stages}
    return Run(TrainingConfig(**{**asdict(config), "warmup_steps": ENDLESS, **steps}))


class Reference:
    """transformers' model with the weights of a folder, and the step of a plain loop."""

    def __init__(self, folder: Path, attention: str, precision: str) -> None:
        self.name = f"{attention}, {precision}"
        self.autocast = precision == "autocast"
        self.dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.model = PaliGemmaForConditionalGeneration.from_pretrained(
            folder, attn_implementation=attention, dtype=self.dtype
        ).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def advance(self, inputs: dict[str, Tensor]) -> float:
        """One step of optimization. Returns the loss."""
        pixels = inputs["pixel_values"].to(self.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.model(**(inputs | {"pixel_values": pixels}), use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.item())


def timed_run(run: Run, batches: Sequence[Batch], clock: Clock) -> Seconds:
    """Our steps on these batches."""

    def seconds() -> float:
        start = clock()
        for batch in batches:
            run.advance(batch)
        return clock() - start

    return seconds


def timed_reference(reference: Reference, steps: Sequence[dict[str, Tensor]], clock: Clock) -> Seconds:
    """The reference's steps on these inputs."""

    def seconds() -> float:
        start = clock()
        for inputs in steps:
            reference.advance(inputs)
        return clock() - start

    return seconds


def fastest(folder: Path, bf16: bool, inputs: dict[str, Tensor], clock: Clock) -> Reference:
    """The reference in the form that needs the least time for a step on these inputs."""
    forms = [
        Reference(folder, attention, precision)
        for attention in ("eager", "sdpa")
        for precision in (("bfloat16", "autocast") if bf16 else ("float32",))
    ]
    workers = [timed_reference(form, [inputs], clock) for form in forms]
    in_turns(workers, 1)  # the first step sets up the optimizer
    times = in_turns(workers, 2)
    return forms[min(range(len(forms)), key=lambda number: min(times[number]))]


# ---- the three measurements --------------------------------------------------------------------------------


@dataclass
class Comparison:
    """Seconds in each round for the same pairs of question and answer."""

    stage: str
    bf16: bool
    form: str  # of the reference
    answers: int
    ours: list[float]
    whole: list[float]  # transformers, all rows of a step at once
    pieces: list[float]  # transformers, in pieces

    def row(self) -> str:
        """Of the table in `COMPARED`."""
        speeds = (self.answers / statistics.median(times) for times in (self.ours, self.whole, self.pieces))
        ratios = [
            [theirs / ours for theirs, ours in zip(times, self.ours, strict=True)]
            for times in (self.whole, self.pieces)
        ]
        cells = [
            f"{self.stage}: {FORMS[self.stage]}",
            "bf16" if self.bf16 else "fp32",
            self.form,
            *(f"{speed:.0f}" for speed in speeds),
            *(spread(by_round) for by_round in ratios),
        ]
        return f"| {' | '.join(cells)} |"


COMPARED = (
    "| our rows | dtype | transformers' form | ours | transformers | in pieces | ratio | ratio to pieces |\n"
    "|---|---|---|---|---|---|---|---|"
)


def compare(
    config: TrainingConfig, stage: str, bf16: bool, *, steps: int, rounds: int, clock: Clock
) -> Comparison:
    """Our step in a stage, and transformers on the same questions, one a row."""
    run = run_in(replace(config, bf16=bf16), stage)
    data = batches_of(run, stage)
    batches = [data[step] for step in range(steps)]
    singles = [unpacked(batch) for batch in batches]
    rows_of = partial(
        reference_rows,
        image_id=run.processor.tokenizer.image_id,
        patches=run.model.config.vision.num_patches,
    )
    whole = [rows_of(batch) for batch in singles]
    pieces = [
        rows_of(batch, rows=slice(first, first + PIECE))
        for batch in singles
        for first in range(0, len(batch.input_ids), PIECE)
    ]
    with tempfile.TemporaryDirectory() as folder:
        run.model.save_pretrained(folder)
        at_once = fastest(Path(folder), bf16, whole[0], clock)
        in_pieces = fastest(Path(folder), bf16, pieces[0], clock)
    workers = [
        timed_run(run, batches, clock),
        timed_reference(at_once, whole, clock),
        timed_reference(in_pieces, pieces, clock),
    ]
    timed_run(run, batches[:1], clock)()
    ours, theirs, theirs_in_pieces = in_turns(workers, rounds)
    return Comparison(
        stage=stage,
        bf16=bf16,
        form=at_once.name if at_once.name == in_pieces.name else f"{at_once.name}; pieces: {in_pieces.name}",
        answers=sum(answers(batch) for batch in batches),
        ours=ours,
        whole=theirs,
        pieces=theirs_in_pieces,
    )


@dataclass
class Point:
    """The cost of a step at one value of what grows."""

    axis: str
    value: float
    stage: str
    answers: int
    times: list[float]


def grow(config: TrainingConfig, *, rounds: int, clock: Clock) -> list[Point]:
    """Seconds of a step for each number of pictures, of questions, and of parameters, in both forms."""
    points: list[Point] = []
    workers: list[Seconds] = []

    def add(axis: str, value: float, run: Run, stage: str, batch: Batch) -> None:
        points.append(Point(axis, value, stage, answers(batch), []))
        workers.append(timed_run(run, [batch], clock))

    for stage in FORMS:
        run = run_in(config, stage)
        for pictures in PICTURES:
            add("pictures", pictures, run, stage, batches_of(run, stage, pictures=pictures)[0])
        for questions in QUESTIONS:
            add("questions a picture", questions, run, stage, batches_of(run, stage, questions=questions)[0])
        for tower, decoder in WIDTHS:
            wide = run_in(replace(config, tower_width=tower, text_width=decoder), stage)
            millions = sum(weight.numel() for weight in wide.model.parameters()) / 1e6
            add("million parameters", millions, wide, stage, batches_of(wide, stage)[0])
    in_turns(workers, 1)
    for point, times in zip(points, in_turns(workers, rounds), strict=True):
        point.times = times
    return points


def table_of(points: Sequence[Point]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield "| what grows | value | our rows | answers | ms a step | ms an answer |"
    yield "|---|---|---|---|---|---|"
    for point in points:
        milliseconds = [1000 * value for value in point.times]
        each = statistics.median(milliseconds) / point.answers
        yield (
            f"| {point.axis} | {point.value:.3g} | {point.stage} | {point.answers} "
            f"| {spread(milliseconds, 0)} | {each:.2f} |"
        )


def draw_points(points: Sequence[Point], path: Path) -> None:
    """One panel for each thing that grows: seconds of a step, with bars from the least to the most."""
    axes = list(dict.fromkeys(point.axis for point in points))
    figure = Figure(figsize=(3.6 * len(axes), 3.2), layout="constrained")
    panels = figure.subplots(1, len(axes), squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        for stage, label in FORMS.items():
            curve = [point for point in points if (point.axis, point.stage) == (axis, stage)]
            middle = [statistics.median(point.times) for point in curve]
            below = [mid - min(point.times) for mid, point in zip(middle, curve, strict=True)]
            above = [max(point.times) - mid for mid, point in zip(middle, curve, strict=True)]
            panel.errorbar(
                [point.value for point in curve],
                middle,
                yerr=[below, above],
                marker="o",
                capsize=3,
                label=f"{stage}: {label}",
            )
        panel.set_xlabel(axis)
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds a step")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


_drawn_here: SceneBatches | None = None  # in the process that draws


def start_drawing(data: SceneBatches) -> None:
    """What the process that draws does first, with one thread as in training."""
    global _drawn_here
    torch.set_num_threads(1)
    _drawn_here = data
    for step in range(CACHED):
        data[step]


def draw(step: int) -> float:
    """Seconds for one batch, in the process that draws."""
    assert _drawn_here is not None
    start = time.process_time()
    _drawn_here[step]
    return time.process_time() - start


@contextmanager
def process_that_draws(data: SceneBatches) -> Iterator[Callable[[int], float]]:
    """`draw` as it is called from here."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=start_drawing, initargs=(data,)) as pool:
        yield lambda step: pool.submit(draw, step).result()


def drawing(
    config: TrainingConfig, elsewhere: Callable[[int], float], *, steps: int, rounds: int, clock: Clock
) -> tuple[list[float], list[float]]:
    """Seconds in each round of drawing a packed batch and of learning from it, one after the other."""
    run = run_in(config, "packed")
    data = batches_of(run, "packed")
    run.advance(data[0])
    drawn, learned = [], []
    for number in range(rounds):
        numbers = range(CACHED + number * steps, CACHED + (number + 1) * steps)
        batches = [data[step] for step in numbers]
        drawn.append(sum(elsewhere(step) for step in numbers) / steps)
        learned.append(timed_run(run, batches, clock)() / steps)
    return drawn, learned


# ---- the script --------------------------------------------------------------------------------------------


def main() -> None:
    """Print the tables, and keep them with the figure where --out says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=1, help="of each in a round (default: 1)")
    parser.add_argument("--rounds", type=int, default=7, help="in turns (default: 7)")
    parser.add_argument("--out", type=Path, help="the text; the figure goes beside it, as .png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    clock = clock_for(options.threads)
    config = TrainingConfig()
    lines: list[str] = []

    def say(line: str = "") -> None:
        print(line, flush=True)
        lines.append(line)

    kind = "of the processor" if options.threads == 1 else "on the wall"
    say(f"{name_of_cpu()}; {os.cpu_count()} cores, {options.threads} thread(s) used")
    say(
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"transformers {transformers.__version__}, {platform.system()}"
    )
    say(f"{options.rounds} rounds of {options.steps} step(s); seconds {kind}; median (least to most)\n")

    say(
        "Answers per second. transformers has one answer a row, all rows of our step at once or "
        f"{PIECE} at a time.\n"
    )
    say(COMPARED)
    for bf16 in (False, True):
        for stage in FORMS:
            found = compare(config, stage, bf16, steps=options.steps, rounds=options.rounds, clock=clock)
            say(found.row())

    dtype = "bf16" if bf16_pays(torch.device("cpu")) else "fp32"
    say(f"\nCost of our step, {dtype}.\n")
    points = grow(config, rounds=options.rounds, clock=clock)
    for line in table_of(points):
        say(line)

    with process_that_draws(batches_of(run_in(config, "packed"), "packed")) as elsewhere:
        drawn, learned = drawing(config, elsewhere, steps=options.steps, rounds=options.rounds, clock=clock)
    shares = [100 * a / b for a, b in zip(drawn, learned, strict=True)]
    say(
        f"\nDrawing a packed batch of {config.pictures} pictures: {spread([1000 * a for a in drawn], 0)} ms, "
        f"{spread(shares, 1)} % of its step ({dtype}, {spread([1000 * b for b in learned], 0)} ms)."
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n")
        draw_points(points, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
