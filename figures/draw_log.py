"""Draws figures/tiny_log.png: loss and metrics of the run that made the shipped model.

The log of that run, its log.csv as one JSON object, is kept as minivlm/assets/tiny_log.json.

Run: python figures/draw_log.py
"""

import json
from pathlib import Path

from minivlm.training.log import plot_log

FOLDER = Path(__file__).parent
LOG = FOLDER.parent / "minivlm" / "assets" / "tiny_log.json"
LOSSES = ("patch", "answer", "point")
SHOWN = ("all questions", "relation", "exact caption", "box mean IoU", "mask mean IoU")

if __name__ == "__main__":
    columns = json.loads(LOG.read_text(encoding="utf-8"))
    names = ("step", "stage", *LOSSES, *SHOWN)
    rows = zip(*(columns[name] for name in names), strict=True)
    plot_log([dict(zip(names, row, strict=True)) for row in rows], FOLDER / "tiny_log.png", LOSSES)
