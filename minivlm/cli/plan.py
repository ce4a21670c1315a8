"""`minivlm plan`: what a step of training would cost on many devices, as arithmetic."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from minivlm.cli import options as shared

if TYPE_CHECKING:
    from minivlm.cli.options import Commands
    from minivlm.distributed.plan import Cost

EPILOG = """\
Nothing is measured and nothing is trained here: the numbers follow from the model's sizes, by the formulas in
minivlm/distributed/plan.py. Attention's own products, buffers and PyTorch itself are not counted, and no
device reaches its peak. The defaults are an NVIDIA H100 SXM by its data sheet (80 GB, 989e12 operations in
bf16) with 50 GB/s to the network for each GPU; write your own numbers instead.
"""


def add_to(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "plan",
        help="compute what training would cost on many devices",
        description="Compute bytes and bounds on the time of a step, with whole weights on each device (DDP) "
        "and with divided ones (FSDP).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        type=shared.text,
        metavar="FOLDER_OR_REPO_ID",
        help="a model that answers (default: the shipped tiny one)",
    )
    parser.add_argument("--gpus", type=shared.at_least_1, default=8, metavar="N", help="(default: 8)")
    parser.add_argument(
        "--rows",
        type=shared.at_least_1,
        default=256,
        metavar="N",
        help="of a step, on all of them (default: 256)",
    )
    parser.add_argument(
        "--length", type=shared.at_least_1, default=512, metavar="N", help="tokens of a row (default: 512)"
    )
    parser.add_argument(
        "--freeze",
        choices=("tower", "decoder"),
        action="append",
        default=[],
        help="a part that does not learn",
    )
    parser.add_argument("--fp32", action="store_true", help="compute in fp32 (default: in bf16)")
    device = parser.add_argument_group("a device")
    device.add_argument("--memory", type=shared.above_0, default=80.0, metavar="GB", help="(default: 80)")
    device.add_argument(
        "--bandwidth", type=shared.above_0, default=50.0, metavar="GB", help="sent in a second (default: 50)"
    )
    device.add_argument(
        "--operations", type=shared.above_0, default=989e12, metavar="N", help="in a second (default: 989e12)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    from minivlm.distributed import plan
    from minivlm.models.load import SHIPPED
    from minivlm.training.sizing import size_of

    model = size_of(options.model or SHIPPED, options.freeze)
    step = plan.Step(options.gpus, options.rows, options.length, not options.fp32)
    ways = {"DDP": plan.replicated(model, step), "FSDP": plan.divided(model, step)}
    work = plan.operations(model, step)
    shared.say(
        f"{model.weights:,} weights, {model.learning:,} of them learn. {step.rows:,} rows of {step.length:,} "
        f"tokens on {step.devices:,} devices: {step.rows_each:,} rows each. This is arithmetic: nothing was "
        "run."
    )
    rows = [("a device holds", *ways)]
    for name in ("weights", "gradients", "moments", "gathered", "activations", "held"):
        label = {"moments": "AdamW's moments", "gathered": "gathered blocks", "held": "together"}.get(
            name, name
        )
        rows.append((label, *(bytes_told(getattr(cost, name)) for cost in ways.values())))
    rows.append(("sent in a step", *(bytes_told(cost.sent) for cost in ways.values())))
    times = [
        plan.seconds_at_least(cost, work, options.operations, 1e9 * options.bandwidth)
        for cost in ways.values()
    ]
    for number, label in enumerate(("computing, at least", "sending, at least")):
        rows.append((label, *(f"{1000 * time[number]:,.2f} ms" for time in times)))
    rows.append(("fits", *(_fits(cost, options.memory) for cost in ways.values())))
    for label, *values in rows:
        shared.say(f"  {label:<20}" + "".join(f"{value:>14}" for value in values))


def _fits(cost: Cost, gigabytes: float) -> str:
    return "yes" if cost.held <= 1e9 * gigabytes else "no"


def bytes_told(number: float) -> str:
    """In a unit of a thousand, a million or a billion bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e3:,.1f} kB"
