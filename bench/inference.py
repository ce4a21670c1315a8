"""How fast a full-size model answers, and in how much memory, beside transformers.

Run: python bench/make_checkpoint.py paligemma-3b-pt-224 --out /tmp/paligemma-3b-pt-224
     python bench/make_checkpoint.py paligemma-3b-pt-896 --out /tmp/paligemma-3b-pt-896
     python bench/make_checkpoint.py paligemma2-3b-pt-224 --out /tmp/paligemma2-3b-pt-224
     python bench/inference.py /tmp/paligemma-3b-pt-224 --large /tmp/paligemma-3b-pt-896 \
         --second /tmp/paligemma2-3b-pt-224 --out bench/results/inference.txt
     python bench/make_checkpoint.py qwen2-vl-2b --out /tmp/qwen2-vl-2b
     python bench/inference.py --only qwen video --qwen /tmp/qwen2-vl-2b \
         --out bench/results/inference_qwen2_vl.txt
     python bench/make_checkpoint.py deepseek-vl2-tiny --out /tmp/deepseek-vl2-tiny
     python bench/inference.py --only deepseek --deepseek /tmp/deepseek-vl2-tiny --rounds 2 --repeats 2 \
         --out bench/results/inference_deepseek_vl2.txt
     python bench/inference.py --only llama --llama FOLDER_OF_LLAMA_3.2_VISION

Both sides open the same folder in one dtype, with the same number of threads, and read the same picture and
prompt. They take turns, each time in a process of its own (inference_worker.py), so that what else the
machine does meets both. A ratio is transformers' number divided by ours in the same round: above 1, ours is
the faster or the smaller one. Memory is the most that a process ever held, the mapped weights included.

Two ceilings are measured in the same run: how many bytes a second can be read from memory, and how many
operations a second a large bf16 product reaches. The time of a token is compared with the bytes that must be
read for it, the time of the prompt with the operations of its matrix products (minivlm/models/sizes.py).

With --device cuda the same runs on a GPU, and transformers' compiled static cache is one more peer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from attention import processor as name_of_cpu
from attention import spread
from matplotlib.figure import Figure

from minivlm.attention import onednn_has_bf16
from minivlm.checkpoints.hub import read_config
from minivlm.models.paligemma import PaliGemmaConfig
from minivlm.models.sizes import decode_bytes, image_operations, prefill_operations
from minivlm.speed.one_row import linear

WORKER = Path(__file__).with_name("inference_worker.py")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
PARTS = (
    "answers", "load", "eight", "second", "context", "towers", "large", "qwen", "video", "deepseek", "llama",
)  # fmt: skip
SIZES = {  # of pictures, in pixels
    "qwen": (1120, 700),  # 40 x 25 = 1,000 image tokens
    "deepseek": (384, 384),  # 576 image tokens; in DeepSeek-VL2, 421
    "llama": (560, 560),  # one tile
}
FRAME = (112, 112)  # pixels of a frame of a video, which is read at its size: 16 tokens for two of them
OURS, PACKED, PEER = "minivlm", "minivlm packed", "transformers"
Rounds = dict[str, list[dict[str, Any]]]  # by side, one result per round


def in_turns(sides: Sequence[str], rounds: int, job: dict[str, Any]) -> Rounds:
    """Every side once a round, each first in some rounds."""
    results: Rounds = {side: [] for side in sides}
    for number in range(rounds):
        for place in range(len(sides)):
            side = sides[(number + place) % len(sides)]
            asked = json.dumps({**job, "side": side, "logits": f"{job['logits']}-{side}.pt"})
            command = [sys.executable, str(WORKER), asked]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{side}, {job['task']}: {done.stderr[-2000:]}")
            results[side].append(json.loads(done.stdout.splitlines()[-1]))
    return results


def ratios(results: Rounds, side: str, number: Any, peer: str = PEER) -> str:
    """transformers divided by this side, round by round."""
    return spread([number(b) / number(a) for a, b in zip(results[side], results[peer], strict=True)])


def ceilings(threads: int, device: str) -> tuple[float, float]:
    """Bytes read and operations of a bf16 product per second: the best of some tries."""
    torch.set_num_threads(threads)
    numbers = torch.ones(2**28, dtype=torch.float32, device=device)  # 1 GiB
    a = torch.randn(4096, 4096, device=device).bfloat16()

    def seconds(work: Any) -> float:
        times = []
        for _ in range(8):
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    # A product of one row reads at least as fast as a sum does, on the machines tried.
    table = numbers.view(torch.bfloat16).view(-1, 2048)
    row = torch.ones(1, 2048, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        best = min(seconds(numbers.sum), seconds(lambda: linear(row, table)))
    return numbers.nbytes / best, 2 * 4096**3 / seconds(lambda: a @ a)


def logit_difference(job: dict[str, Any], side: str, peer: str = PEER) -> str:
    """Largest and mean difference of the first logits, as a share of their spread."""
    ours, theirs = (torch.load(f"{job['logits']}-{name}.pt") for name in (side, peer))
    difference = (ours - theirs) / theirs.std()
    return f"{difference.abs().max():.3f} at most, {difference.std():.3f} in the mean"


def first(result: dict[str, Any]) -> float:
    """Seconds to the first token: the best of the repeats of a process."""
    return min(result["prefill"])


def token(result: dict[str, Any]) -> float:
    """Seconds of a further token."""
    return statistics.median(result["decode"])


def peak(result: dict[str, Any]) -> float:
    """Bytes."""
    return result["peak"]


def answers(name: str, sides: Sequence[str], rounds: int, job: dict[str, Any]) -> tuple[list[str], Rounds]:
    """The table of one kind of answer."""
    results = in_turns(sides, rounds, job)
    some = results[OURS][0]
    lines = [
        f"## {name}: {job['batch']} x {some['width']} places, {some['prompt']} tokens in all\n",
        "| | load s | copied GB | prompt s | ratio | token s | ratio | peak GB | ratio "
        "| first logits beside transformers' |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for side in sides:
        found = results[side]
        cells = [
            side,
            spread([result["load"] for result in found]),
            f"{statistics.median(result['copied'] for result in found) / 1e9:.2f}",
            spread([first(result) for result in found]),
            ratios(results, side, first) if side != PEER else "1",
            spread([token(result) for result in found], 3),
            ratios(results, side, token) if side != PEER else "1",
            f"{statistics.median(peak(result) for result in found) / 1e9:.2f}",
            ratios(results, side, peak) if side != PEER else "1",
            logit_difference(job, side) if side != PEER else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines, results


def limits(folder: Path, results: Rounds, bandwidth: float, operations: float) -> Iterator[str]:
    """How near the two ceilings an answer of one row comes."""
    config = PaliGemmaConfig.from_dict(read_config(folder))
    prompt = results[OURS][0]["prompt"]
    needed = decode_bytes(config, prompt, torch.bfloat16)
    picture = image_operations(config)
    ours = picture + prefill_operations(config, prompt)
    # transformers leaves nothing out of the last layer
    peers = picture + prefill_operations(config, prompt, last_mlp_tokens=prompt)
    work = {OURS: ours, PACKED: ours, PEER: peers}
    yield (
        f"A token must read {needed / 1e9:.2f} GB; the prompt takes {ours / 1e12:.2f} * 10^12 operations "
        f"({PEER}: {work[PEER] / 1e12:.2f}).\n"
    )
    yield "| | GB/s for a token | of the bandwidth | 10^12 operations/s for the prompt | of the product |"
    yield "|---|---|---|---|---|"
    for side in (name for name in (OURS, PACKED, PEER) if name in results):
        rates = [needed / token(result) for result in results[side]]
        speeds = [work[side] / first(result) for result in results[side]]
        yield (
            f"| {side} | {spread([rate / 1e9 for rate in rates], 1)} | {max(rates) / bandwidth:.0%} at best "
            f"| {spread([speed / 1e12 for speed in speeds])} | {max(speeds) / operations:.0%} at best |"
        )


def loading(sides: Sequence[str], rounds: int, job: dict[str, Any]) -> Iterator[str]:
    """From a folder to a model, without its tokenizer."""
    results = in_turns(sides, rounds, {**job, "task": "load"})
    yield "\n## Loading the model\n"
    yield "| | s | ratio | GB that are not in the file | peak GB |"
    yield "|---|---|---|---|---|"
    for side in sides:
        seconds = [result["load"] for result in results[side]]
        ratio = ratios(results, side, lambda result: result["load"]) if side != PEER else "1"
        copied, most = (
            statistics.median(result[name] for result in results[side]) / 1e9 for name in ("copied", "peak")
        )
        yield f"| {side} | {spread(seconds)} | {ratio} | {copied:.2f} | {most:.2f} |"


def by_context(sides: Sequence[str], rounds: int, job: dict[str, Any], picture: Path | None) -> Iterator[str]:
    """The time of a token with more and more tokens before it."""
    results = in_turns(sides, rounds, {**job, "task": "context", "lengths": LENGTHS})
    medians = {
        side: [
            statistics.median(s for result in results[side] for s in result["seconds"][str(length)])
            for length in LENGTHS
        ]
        for side in sides
    }
    yield "\n## Seconds of a token, by the number of tokens before it\n"
    yield "| | " + " | ".join(f"{length:,}" for length in LENGTHS) + " |"
    yield "|---|" + "---|" * len(LENGTHS)
    for side in sides:
        yield f"| {side} | " + " | ".join(f"{value:.3f}" for value in medians[side]) + " |"
    if picture:
        figure = Figure(figsize=(7, 3.6), dpi=100, layout="constrained")
        axes = figure.subplots()
        for side in sides:
            axes.plot(LENGTHS, [1000 * value for value in medians[side]], marker="o", label=side)
        axes.set_xscale("log", base=2)
        axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
        axes.set(
            xlabel="tokens before it", ylabel="milliseconds for a token", title="Cost of a token (3B, bf16)"
        )
        axes.set_ylim(bottom=0)
        axes.legend()
        figure.savefig(picture)


def towers(sides: Sequence[str], rounds: int, job: dict[str, Any]) -> Iterator[str]:
    """The image tower alone."""
    yield "\n## The image tower alone\n"
    yield "| pictures | side | s | ratio to transformers | ratio to timm |"
    yield "|---|---|---|---|---|"
    for batch in (1, job["many"]):
        results = in_turns(
            sides, rounds, {**job, "task": "tower", "batch": batch, "repeats": 3 if batch == 1 else 1}
        )

        def best(result: dict[str, Any]) -> float:
            return min(result["seconds"])

        for side in sides:
            both = [ratios(results, side, best, peer) if peer in sides else "" for peer in (PEER, "timm")]
            yield f"| {batch} | {side} | {spread([best(r) for r in results[side]])} | {' | '.join(both)} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="a PaliGemma folder, for instance by make_checkpoint.py"
    )
    parser.add_argument("--large", type=Path, help="the same for pictures of 896 pixels")
    parser.add_argument("--second", type=Path, help="a PaliGemma 2 folder")
    parser.add_argument("--qwen", type=Path, help="a folder of Qwen2-VL or Qwen2.5-VL")
    parser.add_argument("--deepseek", type=Path, help="a folder of DeepSeek-VL or deepseek-vl2-tiny")
    parser.add_argument("--llama", type=Path, help="a folder of Llama 3.2 Vision")
    parser.add_argument(
        "--picture",
        nargs=2,
        type=int,
        metavar=("WIDTH", "HEIGHT"),
        help="pixels of the picture for Qwen, DeepSeek and Llama (default: see SIZES)",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32"),
        help="of both sides; a processor without bf16 instructions needs float32 (default: bfloat16)",
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, help="some of the tables (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="of all sides in turns (default: 3)")
    parser.add_argument("--repeats", type=int, default=3, help="of an answer in a process (default: 3)")
    parser.add_argument("--tokens", type=int, default=16, help="written after the first one (default: 16)")
    parser.add_argument("--out", type=Path, help="write the tables there as well, and the figure beside it")
    options = parser.parse_args()
    parts = options.only or PARTS
    others = {*SIZES, "video"}
    if options.folder is None and set(parts) - others:
        parser.error(f"give a PaliGemma folder, or --only with some of {', '.join(sorted(others))}")
    lines: list[str] = []

    def say(*more: str) -> None:
        for line in more:
            print(line, flush=True)
            lines.append(line)

    device = torch.cuda.get_device_name() if options.device == "cuda" else name_of_cpu()
    say(f"{device}; {os.cpu_count()} cores, {options.threads} threads used, {options.dtype}")
    say(
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, transformers "
        f"{transformers.__version__}, {platform.system()}"
    )
    say("Numbers: median (least to most) over rounds; ratio = transformers / this side in the same round\n")
    packed = [PACKED] if options.device == "cpu" and onednn_has_bf16() else []
    ours = [OURS, *packed, "minivlm compiled", "minivlm int8", "minivlm int8 compiled"]
    peers = [PEER] + (["transformers static"] if options.device == "cuda" else [])
    with tempfile.TemporaryDirectory() as scratch:
        job = {
            "task": "answer",
            "folder": str(options.folder),
            "threads": options.threads,
            "device": options.device,
            "dtype": options.dtype,
            "batch": 1,
            "repeats": options.repeats,
            "tokens": options.tokens,
            "logits": f"{scratch}/logits",
            "many": 32,
        }
        few = {**job, "repeats": 1}
        two = min(2, options.rounds)
        if "answers" in parts:
            before = ceilings(options.threads, options.device)
            table, results = answers("One picture, one prompt", [*ours, *peers], options.rounds, job)
            after = ceilings(options.threads, options.device)
            bandwidth, operations = (max(pair) for pair in zip(before, after, strict=True))
            say(
                f"Ceilings: {bandwidth / 1e9:.1f} GB/s read, "
                f"{operations / 1e12:.2f} * 10^12 operations/s of a bf16 product\n"
            )
            say(*table, "", *limits(options.folder, results, bandwidth, operations))
        if "load" in parts:
            say(*loading([OURS, *packed, "minivlm int8", "minivlm int4", PEER], options.rounds, job))
        if "eight" in parts:
            say("", *answers("Eight at once, padded", [OURS, *packed, *peers], two, {**few, "batch": 8})[0])
        if "second" in parts and options.second:
            second = {**job, "folder": str(options.second)}
            say("", *answers("PaliGemma 2", [OURS, *packed, PEER], two, second)[0])
        if "context" in parts:
            picture = options.out.with_suffix(".png") if options.out else None
            say(*by_context([OURS, PEER], 1, job, picture))
        if "towers" in parts:
            timm = ["timm"] if importlib.util.find_spec("timm") else []
            say(*towers([OURS, *packed, PEER, *timm], two, job))
        if "large" in parts and options.large:
            large = {**few, "folder": str(options.large), "tokens": 4}
            say("", *answers("896 pixels", [OURS, *packed, PEER], 1, large)[0])
        for name, size in SIZES.items():
            folder = getattr(options, name)
            if name in parts and folder:
                asked = {**job, "folder": str(folder), "size": options.picture or size}
                # Llama's 21 GB fit into memory once, as a file that is mapped: one answer, and no copies.
                asked |= {"repeats": 1} if name == "llama" else {}
                whole = [OURS, *packed, "minivlm int8", "minivlm int4"]
                sides = [OURS, PEER] if name == "llama" else [*whole, PEER]
                say("", *answers(folder.name, sides, options.rounds, asked)[0])
        if "video" in parts and options.qwen:
            asked = {**few, "folder": str(options.qwen), "size": FRAME, "frames": 64, "tokens": 4}
            say("", *answers(f"{options.qwen.name}, a video of 64 frames", [OURS, PEER], 1, asked)[0])
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
