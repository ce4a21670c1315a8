"""Runs notebooks from a clean kernel and stores their outputs. `make notebooks` runs all of them.

    python notebooks/execute.py                 # all
    python notebooks/execute.py 01_patches.ipynb ...

A notebook that fails is left as it was, and the exit code is 1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent


def execute(path: Path) -> str | None:
    """Run one notebook and store its outputs. Returns the error, or None."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=1500,  # 07_training trains models
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,  # times would change the file at every run
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return str(error)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _merge_streams(cell.outputs)
    temporary = path.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    temporary.replace(path)
    return None


def _merge_streams(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Consecutive pieces of printed text as one: how they were cut depends on timing."""
    merged: list[nbformat.NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            merged.append(output)
    return merged


def main(names: list[str]) -> int:
    """Run the named notebooks, or all."""
    # One thread: the last digits of sums depend on how they are divided among threads.
    os.environ["OMP_NUM_THREADS"] = "1"
    paths = [FOLDER / Path(name).name for name in names] or sorted(FOLDER.glob("*.ipynb"))
    failed = 0
    for path in paths:
        error = execute(path)
        print(f"{path.name}: {'stored' if error is None else 'FAILED, left as it was'}")
        if error is not None:
            print(error)
            failed += 1
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
