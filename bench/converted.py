"""What a folder of rounded weights saves: loading, memory and disk (minivlm/models/quantized.py).

Run: python bench/make_checkpoint.py qwen2.5-vl-3b --out 3b
     OMP_NUM_THREADS=1 python bench/converted.py 3b --scratch 3b-converted --out bench/results/converted.txt

Each load is in a process of its own, in bf16, with its processor; the ways to load take turns. Seconds to the
first token of an answer come with it, since a mapped file is read only when it is used.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from attention import processor, spread
from inference_worker import memory

import minivlm
from minivlm.models.answering import AnswerStream
from minivlm.models.quantized import save_quantized

FORMS = ("int8", "int4")
PICTURE = Path(__file__).parents[1] / "figures" / "samples" / "scene_1.png"


def measure(folder: str, quantize: str | None) -> dict[str, float]:
    """One load, and the start of one answer, in this process."""
    before, start = memory("RssAnon"), time.perf_counter()
    loaded = minivlm.load(folder, torch.bfloat16, quantize=quantize)
    seconds = time.perf_counter() - start
    result = {"load": seconds, "copied": memory("RssAnon") - before, "peak": memory("VmHWM")}
    start = time.perf_counter()
    next(iter(AnswerStream(*loaded, PICTURE, "what is it?", max_new_tokens=1)))
    return result | {"first": time.perf_counter() - start}


def in_a_process(*asked: Any) -> dict[str, float]:
    """What `measure` gives elsewhere."""
    command = [sys.executable, __file__, "--measure", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def size(folder: Path) -> float:
    """GB of the weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a folder with a decoder, in bf16")
    parser.add_argument("--scratch", type=Path, help="where the converted folders go, or are already")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return print(json.dumps(measure(*json.loads(options.measure))))
    if options.folder is None or options.scratch is None:
        parser.error("give a folder, and --scratch")
    ways: dict[str, tuple[Path, str | None]] = {"as it is": (options.folder, None)}
    lines = [f"{processor()}; {torch.get_num_threads()} threads; PyTorch {torch.__version__}"]
    lines += [f"{options.folder.name} in bf16, {options.rounds} rounds: median (least to most)", ""]
    for form in FORMS:
        made = options.scratch / form
        if not made.exists():
            start = time.perf_counter()
            save_quantized(*minivlm.load(options.folder, None, quantize=form), made)
            lines.append(f"{form}: rounded and written once in {time.perf_counter() - start:.0f} s")
        ways |= {f"rounded to {form}": (options.folder, form), f"converted to {form}": (made, None)}
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(options.rounds):
        order = list(ways)
        for way in order[number:] + order[:number]:
            folder, quantize = ways[way]
            results[way].append(in_a_process(str(folder), quantize))
    lines += [
        "",
        "| | load s | first token s | GB that are not in the file | peak GB | GB on disk |",
        "|---|---|---|---|---|---|",
    ]
    for way, found in results.items():
        times = [spread([one[name] for one in found]) for name in ("load", "first")]
        held = [f"{max(one[name] for one in found) / 1e9:.2f}" for name in ("copied", "peak")]
        lines.append(f"| {' | '.join([way, *times, *held, f'{size(ways[way][0]):.2f}'])} |")
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
