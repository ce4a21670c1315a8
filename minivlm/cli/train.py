"""`minivlm train`: a tiny model from nothing, on scenes of the drawn world."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from minivlm.cli import options as shared
from minivlm.cli.program import command

if TYPE_CHECKING:
    from minivlm.cli.options import Commands

HELP = "Ctrl-C finishes the step and saves; the same command with --resume goes on."

# The fields of `TrainingConfig`. They are written here once more, since its module takes seconds to import.
RECIPE: shared.Recipe = {
    "sizes of the model": {
        "image_size": (64, "pixels of a picture's side"),
        "patch_size": (8, "pixels of a patch's side"),
        "tower_width": (96, "of the image tower"),
        "tower_layers": (3, ""),
        "tower_heads": (3, ""),
        "text_width": (128, "of the decoder"),
        "text_layers": (4, ""),
        "text_heads": (4, ""),
    },
    "steps of each stage": {
        "tower_steps": (1500, "the image tower alone; of qwen2_vl and qwen2_5_vl 500"),
        "packed_steps": (5000, "many questions in a row"),
        "review_steps": (2200, "the same with more relations, at lower rates"),
        "prefix_steps": (900, "rows as in use, one question each"),
        "alike_steps": (2200, "many questions in a row, about things of one color"),
        "last_steps": (600, "the same in rows as in use"),
    },
    "what a step sees": {
        "tower_pictures": (128, "while the tower is alone"),
        "pictures": (48, "afterwards"),
        "questions": (9, "for each picture at most, packed; of qwen2_vl and qwen2_5_vl 4"),
        "row_tokens": (104, "of packed questions"),
        "prefix_questions": (3, "for each picture in rows as in use"),
        "prefix_row_tokens": (40, "of one question"),
        "relations": (2, "questions about relations in a round of all"),
        "review_relations": (5, "the same in the review"),
        "alike_share": (0.4, "of scenes in one color, when these two stages begin"),
        "alike_pairs": (5, "more questions about pairs in a round, the same"),
        "last_share": (0.1, "of scenes in one color, in the last stage"),
        "last_pairs": (1, "more questions about pairs in a round, in the last stage"),
    },
    "how it learns": {
        "muon_lr": (0.02, "peak rate of matrices"),
        "adamw_lr": (0.003, "peak rate of everything else"),
        "tower_lr_factor": (0.3, "of the tower's rates after its stage"),
        "review_lr_factor": (0.5, "of all rates in the review"),
        "alike_lr_factor": (0.6, "of all rates in the last two stages"),
        "weight_decay": (0.02, ""),
        "clip": (1.0, "norm of the gradient at most"),
        "dense_weight": (0.5, "of the tower's own loss after its stage"),
        "point_weight": (2.0, "of the loss of pointing in the last two stages"),
        "loc_sigma": (6.0, "bins; how soft the targets of coordinates are"),
    },
}

SYSTEMS = {  # the names of `WAYS` in minivlm/training/systems.py
    "visualbert": "patches among the words of an encoder that fills masks; it learns, too",
    "simvlm": "a stem of convolutions of its own, patches before the words; all learns",
    "cm3": "patches before the words, spans written last; the language model learns, too",
    "clipcap": "one vector of the picture -> a prefix; the language model is frozen",
    "clipcap-mlp": "the same by an MLP; the language model learns, too",
    "visualgpt": "every block asks the patches, gates share out; the language model learns, too",
    "flamingo": "gated blocks ask 16 latents, between frozen ones of the language model",
    "llava": "patches inside of a chat, in two stages: first the projector, then the language model, too",
    "llava-direct": "the same without the first stage: both learn from the first step on",
    "cross-attention": "gated blocks ask all patches, between frozen ones of llava's language model",
    "experts": "llava-direct with experts for MLPs, five of 17 for a word, together as wide",
    "small-one-view": "llava-direct for things half as large: its pictures of 128 pixels are shrunk to 64",
    "small-tiles": "the same pictures shrunk, and in four tiles",
    "small-two-towers": "the same pictures shrunk, and as they are in a second tower, which learns, too",
}
MOVING = {  # the names of `SYSTEMS` in minivlm/training/moving.py
    "qwen2_vl": "Qwen2-VL in small: pictures of any shape, and clips, in a world that moves",
    "qwen2_5_vl": "the same as Qwen2.5-VL: windows in the tower, and time in seconds",
}
RATES = ("muon_lr", "adamw_lr", "weight_decay")  # of both recipes, with the same defaults
SYSTEM_RECIPE: shared.Recipe = {  # the other fields of `SystemConfig`
    "with --system": {
        "text_steps": (500, "steps of the language model alone"),
        "steps": (1500, "steps with pictures; of qwen2_vl and qwen2_5_vl 2500"),
        "text_rows": (96, "rows of a step without pictures"),
        "rows": (48, "rows of a step with pictures; of qwen2_vl and qwen2_5_vl 40"),
    }
}


# The fields of `MovingConfig` beside those that every run has. Steps and rows have other defaults here.
MOVING_RECIPE = ("tower_steps", "steps", "rows", "questions", "dense_weight", "clip")


def add_to(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "train",
        help="train a tiny model from nothing on drawn scenes",
        description="Train a tiny model from nothing on drawn scenes; the defaults made the shipped one. "
        "With --system, train another way to let a language model see, between the shipped tower and a "
        "language model that first learns the world's sentences, or Qwen's systems on clips.",
        epilog=HELP,
    )
    systems = {**SYSTEMS, **MOVING}
    about = "; ".join(f"{name}: {about}" for name, about in systems.items())
    parser.add_argument("--system", choices=systems, metavar="NAME", help=about)
    shared.add_run(parser, out="runs/tiny", measure_every=500, measured="100 held-out scenes")
    shared.add_recipe(parser, SYSTEM_RECIPE)
    shared.add_recipe(parser, RECIPE)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, and say what to do with the model."""
    own, others = _names(RECIPE), _names(SYSTEM_RECIPE)
    if options.system is None:
        shared.refuse(options, others, "is of a system: add --system NAME, or leave it out")
    else:
        known = MOVING_RECIPE if options.system in MOVING else others
        shared.refuse(
            options,
            [*(name for name in {*own, *others} - {*RATES, *known}), "bf16"],
            "is not of this system: leave it out, or choose another one with --system",
        )
    loop = shared.prepare_loop(options)
    started = time.monotonic()
    if options.system is None:
        from minivlm.training.recipe import TrainingConfig
        from minivlm.training.scratch import train

        train(options.out, TrainingConfig(**shared.given(options, [*shared.SHARED, *own])), loop=loop)
    elif options.system in MOVING:
        from minivlm.training.moving import MovingConfig, train_moving

        names = ["system", "seed", "warmup_steps", *RATES, *MOVING_RECIPE]
        train_moving(options.out, MovingConfig(**shared.given(options, names)), loop=loop)
    else:
        from minivlm.training.systems import SystemConfig, train_system

        config = SystemConfig(**shared.given(options, ["system", "seed", "warmup_steps", *RATES, *others]))
        train_system(options.out, config, loop=loop)
    measure = command("eval", "--model", options.out)
    shared.print_end(started, options.out, f"Measure it:\n  {measure}")


def _names(recipe: shared.Recipe) -> list[str]:
    return [name for numbers in recipe.values() for name in numbers]
