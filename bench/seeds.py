"""Do the notebooks' claims about training hold with other random numbers?

Run: OMP_NUM_THREADS=1 python bench/seeds.py --out bench/results/seeds.txt

A notebook trains once, and its cells print what the text then claims. Here the same cells run again with
other weights, other pictures and another order: wherever a cell names the seed 0, or makes a recipe, it gets
another one. The result lists the lines that the claiming cells print, and where a seed prints another one.
Every notebook runs once for each seed, which takes about as long as the notebook does.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
# The cells that say how a training went.
CLAIMS = {
    "02_clip_and_siglip": ("02-089", "02-090b"),
    "07_training": (
        "07-062", "07-062a", "07-064", "07-072", "07-074", "07-078", "07-080", "07-090", "07-094",
    ),
    "08_boxes_and_masks": ("08-044",),
    "10_contrastive_training": (
        "10-027", "10-029", "10-030b", "10-036", "10-037b", "10-045", "10-051", "10-052b", "10-058", "10-086",
        "10-090", "10-098",
    ),
}  # fmt: skip
SKIPPED = {"optional", "check"}  # tags: cells that no claim needs
# What makes random numbers in the cells, and the same with another seed.
SEEDED = (
    (r"manual_seed\(0\)", "manual_seed({seed})"),
    (r"default_rng\(0\)", "default_rng({seed})"),
    (r'("train"[^)]*)seed=0\b', r"\g<1>seed={seed}00"),
    (r"(TrainingConfig|ContrastiveConfig)\((?!\))", r"\g<1>(seed={seed}, "),
)


def reseeded(source: str, seed: int) -> str:
    """A cell with another seed wherever it names 0, or makes a recipe."""
    for pattern, other in SEEDED:
        source = re.sub(pattern, other.format(seed=seed), source)
    return source


def printed(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """What each cell prints."""
    return {
        cell.id: "".join(output.text for output in cell.outputs if output.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


def run(path: Path, seed: int) -> dict[str, str]:
    """What the cells of a notebook print with another seed."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not SKIPPED & set(cell.metadata.get("tags", ()))]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = reseeded(cell.source, seed)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=1500, kernel_name="python3", resources=resources).execute()
    return printed(notebook)


def as_text(name: str, stored: Mapping[str, str], others: Mapping[int, Mapping[str, str]]) -> str:
    """The lines that the claiming cells print, and for each the seeds that print another one."""
    lines = [f"## {name}, seed 0 and {', '.join(map(str, others))}", ""]
    for cell in CLAIMS[name]:
        for number, line in enumerate(stored[cell].splitlines()):
            differing = {
                seed: found for seed, texts in others.items() if (found := _line(texts[cell], number)) != line
            }
            lines.append(f"{cell}  {'same   ' if not differing else 'differs'}  {line}")
            lines += [f"{'':16}seed {seed}: {found}" for seed, found in differing.items()]
    return "\n".join([*lines, ""])


def _line(text: str, number: int) -> str:
    lines = text.splitlines()
    return lines[number] if number < len(lines) else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the notebooks, and write what their claims are worth."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--notebooks", nargs="+", choices=CLAIMS, default=list(CLAIMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path, help="write the result there as well")
    options = parser.parse_args(arguments)
    results = []
    for name in options.notebooks:
        path = NOTEBOOKS / f"{name}.ipynb"
        stored = printed(nbformat.read(path, as_version=4))
        results.append(as_text(name, stored, {seed: run(path, seed) for seed in options.seeds}))
        print(results[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(results), encoding="utf-8")


if __name__ == "__main__":
    main()
