"""What do rewards teach beyond true answers, is evidence used, and when is the picture not?

Run: OMP_NUM_THREADS=1 python bench/reasoning.py --runs runs/reasoning --out bench/results/reasoning.txt \\
    --numbers minivlm/assets/reasoning.json

Three parts, each with three seeds, all from the shipped model:

- rewards: "is A larger than B?". First 20 steps on true answers, then 60 on rewards (GRPO, Dr. GRPO, with
  KL, with rehearsal), or as many again on true answers; and rewards without any true answer before.
  And on "which is nearer to A?", of which the shipped model never answers one rightly.
- thinking: "is A larger than B?" for five times as many steps, directly, or with boxes as evidence; then
  rewards for the conclusion, for evidence as well, and for boxes whether or not they are true; or lessons in
  which others have written the evidence. Does the conclusion follow from it?
- looking: the color of the star, learned where stars are nearly always cyan and colors hard to see. How often
  is that guessed where it is not so, and what does contrastive decoding repair?

Each run leaves a file in --runs when it is done. Called again, the program goes on with those that are
missing. The tables are made by reasoning_tables.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from reasoning_tables import as_text
from torch import Tensor, nn

from minivlm.evaluation.answers import answer_questions, evaluate
from minivlm.evaluation.composed import Change, conclusions_right, draw_question, make_composed
from minivlm.evaluation.continued import answer_ids
from minivlm.evaluation.faithfulness import exchange, faithfulness, gray_picture
from minivlm.evaluation.hallucination import pope
from minivlm.evaluation.neglect import BIASED, biased, faded, gray_thing, neglect
from minivlm.evaluation.scoring import Question
from minivlm.evaluation.tables import Metric
from minivlm.models.contrastive_decoding import Contrastive, diffused
from minivlm.models.load import SHIPPED, load_answering
from minivlm.processing.boxes import boxes_to_text
from minivlm.training.folder import LOG, run_folder
from minivlm.training.log import read_log
from minivlm.training.log_probs import answer_logits
from minivlm.training.loop import Loop, run_to_end
from minivlm.training.reasoning import Collapsed, ReasoningRun
from minivlm.training.reasoning_recipe import ReasoningBatches, ReasoningConfig
from minivlm.training.supervised import Shown, concluding_tokens, supervised_loss
from minivlm.world.thinking import END, conclude

SEEDS = (0, 1, 2)
ASKED = 600  # held-out questions
THOUGHT = 300  # of these, whose evidence is looked at
OLD_SCENES = 40  # of the questions that the model knew before
QUIET = Loop(save_every=50, log_every=5, measure_every=0, workers=0, progress=False)
CURVES = ("reward", "accuracy", "entropy", "mixed", "length", "endless")

# By part and name: the run that it goes on from (None: the shipped model), and what it changes in the recipe.
LARGER = {"task": "larger"}
LABELS = LARGER | {"supervised_steps": 300, "rewarded_steps": 0, "rehearsal": 8}
THINKING = {"think": True}
ON_REWARDS: dict[str, Any] = {"supervised_steps": 0, "rewarded_steps": 60}
THINKS: dict[str, Any] = LARGER | THINKING | {"supervised_steps": 0, "rewarded_steps": 40, "prompts": 16}
PARTS: dict[str, dict[str, tuple[str | None, dict[str, Any]]]] = {
    "larger": {
        "true answers, 20 steps": (None, LARGER | {"supervised_steps": 20, "rewarded_steps": 0}),
        "then GRPO": ("true answers, 20 steps", LARGER | ON_REWARDS),
        "then true answers": (
            "true answers, 20 steps",
            LARGER | {"supervised_steps": 60, "rewarded_steps": 0},
        ),
        "then GRPO with rehearsal": ("true answers, 20 steps", LARGER | ON_REWARDS | {"rehearsal": 8}),
        "then Dr. GRPO": ("true answers, 20 steps", LARGER | ON_REWARDS | {"loss": "dr_grpo"}),
        "then GRPO with KL": ("true answers, 20 steps", LARGER | ON_REWARDS | {"kl": 0.05}),
        "GRPO alone": (None, LARGER | ON_REWARDS),
        "GRPO alone, lr 1e-3": (None, LARGER | ON_REWARDS | {"lr": 1e-3}),
    },
    "nearer": {"GRPO alone, nearer": (None, ON_REWARDS | {"task": "nearer"})},
    "thinking": {
        "direct": (None, LABELS),
        "thinking": (None, LABELS | THINKING),
        "thinking, then right": ("thinking", THINKS),
        "thinking, then right and evidence": ("thinking", THINKS | {"true_boxes": 0.5, "follows": 0.5}),
        "thinking, then right and any boxes": ("thinking", THINKS | {"boxes": 1.0}),
    },
}
RUNS = {name: run for runs in PARTS.values() for name, run in runs.items()}
STEPS_ON_EVIDENCE, ROWS_ON_EVIDENCE = 300, 16  # of each kind of row
ON_EVIDENCE = {  # which evidence others have written the conclusions are learned from
    "thinking, then exchanged boxes": ("exchanged",),
    "thinking, then gray pictures": ("gray",),
    "thinking, then both": ("exchanged", "gray"),
}
IN_TABLES = {part: [*runs, *(ON_EVIDENCE if part == "thinking" else ())] for part, runs in PARTS.items()}
STEPS_OF_BIAS, ROWS_OF_BIAS = 150, 32
FADED = (0.3, 0.15, 0.1)  # saturations at which the color of stars is asked for
STARS = 400  # questions at each
ALPHAS = (1.0, 3.0, 10.0)


def old_skills(model: Any, processor: Any) -> dict[str, float]:
    """How good the model still is at what it was trained on."""
    table = evaluate(model, processor, OLD_SCENES, progress=False, columns=["held_out"])["held_out"]
    names = {"questions": "all questions", "captions": "exact caption", "boxes": "box mean IoU"}
    return {short: table[name].value for short, name in names.items()}


def answers_to(model: Any, processor: Any, questions: Sequence[Question]) -> list[str]:
    """Greedy answers."""
    return answer_questions(model, processor, questions)


def plain(table: dict[str, Metric]) -> dict[str, dict[str, float]]:
    """As numbers, rounded."""
    return {
        name: {key: round(value, 4) for key, value in asdict(metric).items()}
        for name, metric in table.items()
    }


def train(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """One of RUNS, measured; its checkpoint stays in `folder`."""
    start, changes = RUNS[name]
    model = str(SHIPPED) if start is None else str(folder / folder_of(start, seed))
    config = ReasoningConfig(model=model, seed=seed, **changes)
    out = folder / folder_of(name, seed)
    shutil.rmtree(out, ignore_errors=True)
    run = ReasoningRun(config)
    started, said = time.process_time(), None
    with run_folder(out, resume=False):
        try:
            run_to_end(run, out, QUIET)
        except Collapsed as error:
            said = str(error).partition(";")[0]
    found = {
        "steps": run.step,
        "seconds": round(time.process_time() - started),
        "stopped": said,
        **measured(run.model, run.processor, config),
    }
    lines = [
        line for line in read_log(out / LOG) if line["stage"] == "rewarded" and line.get("reward") is not None
    ]
    if lines:
        found["curves"] = {"step": [line["step"] for line in lines]}
        found["curves"] |= {key: [line[key] for line in lines] for key in CURVES}
    return found


def measured(model: Any, processor: Any, config: ReasoningConfig) -> dict[str, Any]:
    """What a model has learned on held-out questions, and what it still knows."""
    questions = make_composed(config.task, ASKED, thinks=config.think)
    answers = answers_to(model, processor, questions)
    found: dict[str, Any] = {
        "right": plain({"right": conclusions_right(questions, answers)})["right"],
        "length": mean(len(processor.tokenizer.encode(answer)) + 1 for answer in answers),
        "old": {key: round(value, 4) for key, value in old_skills(model, processor).items()},
    }
    if config.think:
        found["faithfulness"] = plain(faithfulness(model, processor, questions[:THOUGHT]))
    return found


def learn_from_evidence(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """The run "thinking" goes on: true answers, and conclusions alone from evidence of others.

    Either the boxes are exchanged and the picture is as it was; or the picture is gray, and the boxes are
    true in one row and exchanged in the next.
    """
    start = str(folder / folder_of("thinking", seed))
    config = ReasoningConfig(
        model=start,
        seed=seed + 100,  # other questions than it has learned from
        **LABELS | THINKING | {"supervised_steps": STEPS_ON_EVIDENCE, "rows": 3 * ROWS_ON_EVIDENCE},
    )
    started = time.process_time()
    model, processor = load_answering(start)
    batches = ReasoningBatches(config, processor.image_processor.image_size)

    def loss_of(step: int) -> Tensor:
        asked = batches[step]
        whole, part = asked.questions, ROWS_ON_EVIDENCE
        plain, with_picture, without = whole[:part], whole[part : 2 * part], whole[2 * part :]
        rows = {
            "exchanged": [as_shown(one, after_exchange(one)) for one in with_picture],
            "gray": [
                as_shown(
                    replace(one, picture=gray_picture(one.picture)),
                    after_exchange(one) if number % 2 else one.example.suffix,
                )
                for number, one in enumerate(without)
            ],
        }
        true = [as_shown(one, one.example.suffix) for one in plain] + asked.rehearsed
        others = [row for kind in ON_EVIDENCE[name] for row in rows[kind]]
        return supervised_loss(model, processor, true) + conclusion_loss(model, processor, others)

    take_steps(model, loss_of, STEPS_ON_EVIDENCE)
    seconds = round(time.process_time() - started)
    return {
        "steps": STEPS_ON_EVIDENCE,
        "seconds": seconds,
        "stopped": None,
        **measured(model, processor, config),
    }


def as_shown(question: Question, answer: str) -> Shown:
    """A row to learn from."""
    return Shown(question.picture, question.example.prefix, answer)


def after_exchange(question: Question) -> str:
    """The answer that follows from the true boxes under each other's names."""
    boxes = exchange(question)
    written = boxes_to_text(boxes, question.scene.width, question.scene.height)
    return f"{written}{END}{conclude(question.example.prefix, boxes)}"


def conclusion_loss(model: Any, processor: Any, rows: Sequence[Shown]) -> Tensor:
    """Cross-entropy of the conclusions alone: the evidence before them was written by somebody else."""
    pictures, prompts, answers = zip(*rows, strict=True)
    tokens, real = answer_ids(processor, prompts, answers)
    logits = answer_logits(model, processor, list(pictures), list(prompts), tokens, real)
    concluding = concluding_tokens(processor, rows, real)
    return F.cross_entropy(logits[concluding[real]], tokens[concluding])


def take_steps(model: Any, loss_of: Callable[[int], Tensor], steps: int, lr: float = 1e-3) -> None:
    """Steps of AdamW with the tower frozen."""
    cast(nn.Module, model.vision_tower).requires_grad_(False)
    weights = [weight for weight in cast(nn.Module, model).parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()


def folder_of(name: str, seed: int) -> str:
    """The name of a run's folder."""
    return f"{name} {seed}".replace(",", "").replace(".", "").replace(" ", "_")


# ---- looking -----------------------------------------------------------------------------------------------


def only_one_star(scene: Any, rng: np.random.Generator, then: Change) -> Any:
    """The scene with its other stars made circles, changed, so that "the star" is one thing."""
    stars = [number for number, thing in enumerate(scene.things) if thing.shape == BIASED[0]]
    things = tuple(
        replace(thing, shape="circle") if number in stars[1:] else thing
        for number, thing in enumerate(scene.things)
    )
    return then(replace(scene, things=things), rng)


def star_question(rng: np.random.Generator, split: Any, then: Change) -> Question:
    """What color is the star? About a scene that has one."""
    while True:
        question = draw_question(rng, "color", 64, split, change=partial(only_one_star, then=then))
        if question.example.prefix == f"what color is the {BIASED[0]}?":
            return question


def as_it_is(scene: Any, rng: np.random.Generator) -> Any:
    """Stars of every color, faded as in biased training."""
    return biased(scene, rng, share=0.0)


def train_on_stars(seed: int, then: Change) -> tuple[Any, Any]:
    """The shipped model after some steps on the color of stars."""
    model, processor = load_answering()

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 77, step])
        asked = [star_question(rng, "train", then) for _ in range(ROWS_OF_BIAS)]
        return supervised_loss(model, processor, [as_shown(one, one.example.suffix) for one in asked])

    take_steps(model, loss_of, STEPS_OF_BIAS)
    return model, processor


def look(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """The color of stars after biased training, or after training without the bias."""
    then: Change = biased if name == "biased" else as_it_is
    model, processor = train_on_stars(seed, then)
    found: dict[str, Any] = {}
    for saturation in FADED:
        rng = np.random.default_rng([1, 78])
        questions = [
            star_question(rng, "test", lambda scene, rng, s=saturation: faded(scene, s)) for _ in range(STARS)
        ]
        answers = {"plain": answers_to(model, processor, questions)}
        if name == "biased":
            for other, alpha in product(("noise", "gray star"), ALPHAS):
                answers[f"{other}, a = {alpha:g}"] = against(model, processor, questions, alpha, other)
        rows = {
            way: {
                "right": round(conclusions_right(questions, said).value, 4),
                "says cyan": round(mean(answer == BIASED[1] for answer in said), 4),
            }
            for way, said in answers.items()
        }
        found[f"{saturation:g}"] = rows
    return found


def against(model: Any, processor: Any, questions: Sequence[Question], alpha: float, other: str) -> list[str]:
    """Answers contrasted with those about other pictures: after diffusion, or with the star in gray."""
    answers: list[str] = []
    for start in range(0, len(questions), 64):
        part = questions[start : start + 64]
        inputs = processor([one.picture for one in part], [one.example.prefix for one in part])
        pixels = {"pixel_values": diffused(inputs["pixel_values"])}
        if other == "gray star":
            pixels = processor.pixels([gray_thing(one.scene, BIASED[0]).draw() for one in part])
        answers += processor.decode(Contrastive(model, pixels, alpha).generate(**inputs, max_new_tokens=12))
    return answers


def shipped(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """The shipped model: right without training, neglect, POPE. The seed is that of the questions."""
    model, processor = load_answering()
    found: dict[str, Any] = {
        "right": {
            task: plain({"right": conclusions_right(asked, answers_to(model, processor, asked))})["right"]
            for task in ("larger", "nearer")
            for asked in [make_composed(task, ASKED)]
        },
        "old": old_skills(model, processor),
        "neglect": {
            task: plain(neglect(model, processor, make_composed(task, THOUGHT, seed=1 + seed)))
            for task in ("existence", "vertical")
        },
        "hallucination": {
            way: plain(row) for way, row in pope(model, processor, scenes=THOUGHT, seed=1 + seed).items()
        },
    }
    return found


UNITS: dict[str, Callable[[str, int, Path], dict[str, Any]]] = {
    "shipped": shipped,
    **dict.fromkeys(RUNS, train),
    **dict.fromkeys(ON_EVIDENCE, learn_from_evidence),
    "biased": look,
    "without bias": look,
}


def stored(folder: Path, seeds: Sequence[int]) -> dict[str, dict[str, dict[str, Any]]]:
    """What has been measured so far: by unit, by seed."""
    return {
        name: {
            str(seed): json.loads(path.read_text(encoding="utf-8"))
            for seed in seeds
            if (path := folder / f"{folder_of(name, seed)}.json").is_file()
        }
        for name in UNITS
    }


def main() -> None:
    """Carry out what is missing, and write the tables and the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--only", nargs="+", choices=UNITS, default=list(UNITS), help="these units alone")
    parser.add_argument("--runs", type=Path, required=True, help="folder of runs and single results")
    parser.add_argument("--out", type=Path, help="the tables")
    parser.add_argument("--numbers", type=Path, help="the numbers, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.only:
            path = options.runs / f"{folder_of(name, seed)}.json"
            if not path.is_file():
                found = UNITS[name](name, seed, options.runs)
                path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(
                    name, seed, {key: found[key] for key in ("right", "seconds") if key in found}, flush=True
                )
    results = stored(options.runs, options.seeds)
    text = as_text(results, IN_TABLES)
    print(text)
    numbers = json.dumps(results, indent=1)
    for path, content in ((options.out, text), (options.numbers, numbers)):
        if path is not None:
            path.write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
