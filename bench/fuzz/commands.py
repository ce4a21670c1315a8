"""Random command lines: no traceback, an exit code that is meant, and nothing of the user's overwritten.

    python bench/fuzz/commands.py --commands 200 --seed 0

Each command runs in a process of its own, in a folder with pictures, texts,
    a folder of a model and things that
only look like them. Output options may name any of these. Afterwards every file that was there has to hold
what it held; only a file that an earlier run of the same kind could have written may be replaced.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from pathlib import Path

from children import start
from PIL import Image

from minivlm.models.load import SHIPPED

SECONDS = 60.0  # for one command
CODES = (0, 1, 2, 130)

PICTURES = ("good.png", "wide.png", "gray.jpg", "link.png", "sub/good.png")
WRONG = (
    "missing.png",
    "broken.png",
    "text.png",
    "empty.png",
    "sub",
    "huge.png",
    "",
    "a" * 300,
    "\x1b[31m.png",
    "pairs.jsonl",
)
OUTS = ("new.png", "good.png", "link.png", "sub", "sub/good.png", "model/config.json", "new/deep/out.png",
    "out.xyz",
        "pairs.jsonl", "prompts.txt", "new.webp", "new.jpg", "fifo.png", "dangling.png",
        "a" * 300 + ".png", "")  # fmt: skip
FOLDERS = ("new", "sub", "model", "good.png", "run", "sub/new", "link", "", ".")
MODELS = ("model", "sub", "missing", "good.png", "clip/none", "", "model/config.json")
PROMPTS = ("caption en", "detect red circle", "segment red circle", "what color is the star?", "", " ",
    "zzz qqq", "\x1b[2J",
           "é" * 50, "detect " * 400, "# not a prompt")  # fmt: skip
NUMBERS = ("0", "1", "2", "-1", "3.5", "nan", "inf", "1e9", "x", "", "99999999999999999999")


def make_place(folder: Path) -> None:
    """What a user may have lying around."""
    (folder / "sub").mkdir()
    Image.new("RGB", (64, 64), "gray").save(folder / "good.png")
    Image.new("RGB", (300, 40), "white").save(folder / "wide.png")
    Image.new("L", (80, 60), 90).save(folder / "gray.jpg")
    Image.new("RGB", (32, 32), "red").save(folder / "sub" / "good.png")
    (folder / "link.png").symlink_to("good.png")
    (folder / "link").symlink_to("sub")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "broken.png").write_bytes((folder / "good.png").read_bytes()[:50])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    header = bytearray((folder / "good.png").read_bytes())
    header[16:24] = (2**26).to_bytes(4, "big") * 2
    (folder / "huge.png").write_bytes(header)
    os.mkfifo(folder / "fifo.png")
    (folder / "prompts.txt").write_text("# what to ask\ncaption en\n\ndetect red circle\n")
    lines = [{"image": "good.png", "prefix": "caption en", "suffix": "none"}] * 4
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "pairs.jsonl").write_text(
        "\n".join(json.dumps({"image": "good.png", "text": f"a {n}"}) for n in range(4))
    )
    shutil.copytree(SHIPPED, folder / "model")


def make_command(rng: random.Random) -> list[str]:
    """A command line that somebody might type, by intent or by accident."""
    picture = lambda: rng.choice(PICTURES if rng.random() < 0.8 else WRONG)  # noqa: E731
    kind = rng.choice(["ask"] * 5 + ["look"] * 2 + ["demo", "eval", "train", "finetune",
    "train-contrastive",
                      "train-codebook", "workshop", "progress", "typo"])  # fmt: skip
    words = [kind]
    if kind in ("ask", "look"):
        words += [picture() for _ in range(rng.randint(1, 3) if kind == "ask" else 1)]
        words += ["--prompt", rng.choice(PROMPTS)] * (rng.random() < 0.8)
        if rng.random() < 0.3:
            words += [
                "--prompts-file",
                rng.choice(["prompts.txt", "good.png", "sub", "missing.txt", "fifo.png"][:4]),
            ]
        if kind == "ask" and rng.random() < 0.6:
            words += ["--draw", rng.choice(OUTS)]
        if kind == "look" and rng.random() < 0.8:
            words += ["--out", rng.choice(FOLDERS)]
        if kind == "ask":
            for name in ("--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed"):
                if rng.random() < 0.15:
                    words += [name, rng.choice(NUMBERS)]
            words += ["--json"] * (rng.random() < 0.3)
    elif kind == "demo":
        words += ["--out", rng.choice(FOLDERS)]
    elif kind == "eval":
        words += [
            "--scenes",
            rng.choice(["1", "2", "0", "-1", "x"]),
            "--columns",
            rng.choice(["held_out", "turned", "no"]),
        ]
    elif kind == "train":
        words += ["--out", rng.choice(FOLDERS), "--image-size", "32", "--tower-steps", "1",
                  "--packed-steps", "1",
                  "--review-steps", "0", "--prefix-steps", "1", "--alike-steps", "1", "--last-steps", "1",
                  "--pictures", "2", "--measure-every", "0",
                  "--tower-pictures", "2",
                  "--tower-width", rng.choice(["24", "0", "7", "10000000000"]), "--tower-heads",
                  "2"]  # fmt: skip
    elif kind == "finetune":
        words += ["--data", rng.choice(["lines.jsonl", "pairs.jsonl", "good.png", "missing"]), "--out",
                  rng.choice(FOLDERS),
                  "--steps", rng.choice(["1", "2", "0", "x"])]  # fmt: skip
    elif kind == "train-contrastive":
        words += ["--data", rng.choice(["pairs.jsonl", "lines.jsonl"]), "--out", rng.choice(FOLDERS),
                  "--steps", "1",
                  "--batch-size", rng.choice(["2", "1", "0", "9"]), "--image-size", "16", "--tower-width",
                  "16",
                  "--tower-layers", "1", "--tower-heads", "2"]  # fmt: skip
    elif kind == "train-codebook":
        words += ["--out", rng.choice([*OUTS, "new.npz"]), "--steps", "1"]
    elif kind == "workshop":
        words += [rng.choice(FOLDERS)]
    elif kind == "progress":
        words += [rng.choice(FOLDERS), "--yes"]
    else:
        words = [rng.choice(["askk", "trainn", "--hepl", "", "ask", "-h", "--version", "fine-tune"])]
    if rng.random() < 0.15 and kind in ("ask", "look", "eval", "finetune"):
        words += ["--model", rng.choice(MODELS)]
    if rng.random() < 0.05:
        words += [rng.choice(["--no-such-option", "--", "-", "--draw", "--out"])]
    return words


def contents(folder: Path) -> dict[str, str]:
    """What every file and link in a folder holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "fifo" if path.is_fifo() else "folder"
    return found


def run(words: list[str], folder: Path) -> tuple[int | str, str]:
    """Exit code and output of a command in a process of its own. A code of None: it did not end in time."""
    said = folder.parent / "said.txt"
    child = start(words, said, folder)
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        signal.signal(signal.SIGALRM, _late)
        status = os.waitpid(child, 0)[1]
        code: int | str = os.waitstatus_to_exitcode(status)
    except TimeoutError:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        code = "no end"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return code, said.read_text(errors="replace")


def _late(*_: object) -> None:
    raise TimeoutError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commands", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one command, with all that it says")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    counts: Counter[str] = Counter()
    codes: Counter[int | str] = Counter()
    for number in range(options.commands) if options.only is None else [options.only]:
        words = make_command(random.Random(f"{options.seed} {number}"))
        with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as name:
            folder = Path(name) / "here"
            folder.mkdir()
            make_place(folder)
            before = contents(folder)
            code, said = run(words, folder)
            after = contents(folder)
        lost = [path for path, held in before.items() if after.get(path) != held]
        faults = []
        if "Traceback" in said:
            faults.append("traceback")
        if code not in CODES:
            faults.append(f"exit code {code}")
        if code == 2 and not said.strip():
            faults.append("refused without a word")
        if "\x1b" in said:
            faults.append("escape sequences printed raw")
        if lost:
            faults.append(f"changed: {', '.join(lost[:5])}")
        left = [path for path in after if path.endswith(".tmp")]
        if left:
            faults.append(f"left: {', '.join(left)}")
        codes[code] += 1
        counts["faults" if faults else "as it should be"] += 1
        if faults or options.only is not None:
            shown = [word if len(word) < 40 else f"{word[:20]}...({len(word)})" for word in words]
            print(f"{number} minivlm {shown}\n   {'; '.join(faults)}\n   {said.strip()[-300:]!r}", flush=True)
            if options.only is not None:
                print(said)
    print(f"{options.commands} commands, seed {options.seed}: {dict(counts)}; exit codes {dict(codes)}")


if __name__ == "__main__":
    main()
