"""Random lines of JSONL for fine-tuning: is everything that is accepted also what the model will learn?

    python bench/fuzz/lines.py --lines 300 --seed 0

A line starts as a good one. Up to three changes follow: to a key, to a word for a coordinate,
    to the letters
around it. A line that is accepted has to survive the way into tokens and back, and whatever looks like a
coordinate has to be one token. Any exception that is not an `InputError` is a fault.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
from collections import Counter
from pathlib import Path

import torch
from PIL import Image

from minivlm import InputError, load
from minivlm.data.samples import read_samples
from minivlm.processing import AnswerProcessor, text_to_boxes

SUFFIXES = (
    "a red circle", "<loc0256><loc0128><loc0767><loc0895> red circle", "none", "2", "yes",
    "<loc0256><loc0128><loc0767><loc0895> red circle ; <loc0000><loc0000><loc0100><loc0200> blue star",
    "<loc0256><loc0128><loc0767><loc0895>" + "".join(f"<seg{n:03}>" for n in range(16)) + " red circle",
)  # fmt: skip
PREFIXES = (
    "caption en",
    "detect red circle",
    "what color is the star?",
    "segment red circle",
    "detect red circle ; blue star",
)
WORDS = (
    "<loc-001>", "<locnan>", "<loc 0256>", "<LOC0256>", "<loc_0256>", "&lt;loc0256&gt;", "<seg-03>",
    "<loc1024>",
    "<loc256>", "<loc00256>", "<loc0256", "loc0256>", "<loc0256 >", "< loc0256>", "<loc0.25>", "<locinf>",
    "<seg128>",
    "<seg16>", "<Loc0256>", "<loc０２５６>", "<loc0256><loc0256><loc0256>",
    "<loc0256><loc0256><loc0256><loc0256>",
    "<image>", "<eos>", "<bos>", "<pad>", "<unk>", "\n", "\x00", "\u200b", "\ud800", ";", "<", ">", "é",
    "🙂", "",
)  # fmt: skip
LOOKS_LIKE_A_WORD = re.compile(r"(?:<|&lt;)\s*(?:loc|seg)", re.IGNORECASE)


def changed(text: str, rng: random.Random) -> str:
    """The text with one thing put in, cut out or replaced."""
    place = rng.randrange(len(text) + 1)
    words = list(re.finditer(r"<(?:loc|seg)\d+>", text))
    kind = rng.random()
    if kind < 0.5 and words:
        word = rng.choice(words)
        return text[: word.start()] + rng.choice(WORDS) + text[word.end() :]
    if kind < 0.8:
        return text[:place] + rng.choice(WORDS) + text[place:]
    return text[:place] + text[place + rng.randint(1, 4) :]


def make_line(rng: random.Random, pictures: list[str]) -> bytes:
    """A line, right or wrong."""
    values: dict[str, object] = {
        "image": rng.choice(pictures), "prefix": rng.choice(PREFIXES), "suffix": rng.choice(SUFFIXES)
    }  # fmt: skip
    for _ in range(rng.randint(0, 3)):
        key = rng.choice(["prefix", "suffix", "suffix", "suffix", "image"])
        if isinstance(values.get(key), str):
            values[key] = changed(str(values[key]), rng)
    kind = rng.random()
    if kind < 0.05:
        values.pop(rng.choice(list(values)))
    elif kind < 0.1:
        values[rng.choice(list(values))] = rng.choice([None, 3, [], {}, True, 1e400, ""])
    line = json.dumps(values, ensure_ascii=rng.random() < 0.5)
    if kind > 0.97:
        line = line.replace('"suffix"', '"suffix": "another", "suffix"', 1)
    if 0.93 < kind < 0.97:
        place = rng.randrange(len(line))
        line = line[:place] + rng.choice(['"', "}", "[[[[", "\\", "NaN"]) + line[place:]
    return line.encode("utf-8", "surrogatepass")


def fault(line: bytes, folder: Path, processor: AnswerProcessor) -> str | None:
    """What is wrong with how a line is read; None if nothing is."""
    (folder / "lines.jsonl").write_bytes(line + b"\n")
    try:
        (sample,) = read_samples(folder / "lines.jsonl", processor, 512)
    except InputError as error:
        return None if "line 1" in str(error) else f"refused without its line: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    tokenizer = processor.tokenizer
    ids = tokenizer.encode_suffix(sample.suffix)
    (back,) = processor.decode(torch.tensor([ids]))
    if back.strip() != sample.suffix.strip():
        return f"comes back as {back!r}"
    for text in (sample.prefix, sample.suffix):
        of_text = tokenizer.encode(text)
        tokens = [tokenizer.backend.id_to_token(one) for one in of_text]
        words = sum(re.fullmatch(r"<(loc|seg)\d+>", token) is not None for token in tokens)
        if words != len(LOOKS_LIKE_A_WORD.findall(text)):
            return f"spelled out: {tokens}"
    groups = re.findall(r"(?:<loc\d{4}>)+", sample.suffix)
    if len(text_to_boxes(sample.suffix, 640, 480)) != len(groups):
        return f"boxes that cannot be read back: {groups}"
    if len(set(re.findall(rb'"(image|prefix|suffix)"\s*:', line))) != len(
        re.findall(rb'"(image|prefix|suffix)"\s*:', line)
    ):
        return "a key twice"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    processor = load()[1]
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        Image.new("RGB", (40, 30), "gray").save(folder / "good.png")
        (folder / "broken.png").write_bytes((folder / "good.png").read_bytes()[:40])
        (folder / "text.png").write_text("no picture")
        pictures = ["good.png"] * 8 + ["broken.png", "text.png", "../good.png", "missing.png", "."]
        for number in range(options.lines):
            line = make_line(random.Random(f"{options.seed} {number}"), pictures)
            found = fault(line, folder, processor)
            counts["faults" if found else "as it should be"] += 1
            if found:
                print(f"{number} {line!r}\n   {found}")
    print(f"{options.lines} lines, seed {options.seed}: {dict(counts)}")


if __name__ == "__main__":
    main()
