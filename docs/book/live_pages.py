"""Small pages of docs/live inside of chapters, where the notebook draws the same as a figure.

The notebook itself has the figure only, which is what a reader in JupyterLab or on paper sees.
"""

from __future__ import annotations

from typing import Any

# The cell below which a page stands: its file, what it is called, and what the reader can do with it.
PLACES = {
    "05-047": (
        "rotary",
        "Rotary positions, to be turned",
        "Turn them yourself. Move query and key, then shift both by the same amount, and watch the score.",
    ),
    "06-063": (
        "mask",
        "The three masks, to be explored",
        "The same table, to walk through: choose a token or a field, and read why it may look there or not.",
    ),
}
SCRIPT = '<script src="../_static/live_pages.js"></script>'


def with_live_pages(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells of a notebook, and below some of them a cell with a page."""
    found = []
    for cell in cells:
        found.append(cell)
        if cell["id"] in PLACES:
            found.append(
                {"cell_type": "markdown", "id": f"{cell['id']}-live", "metadata": {}} | _page(cell["id"])
            )
    return found


def _page(place: str) -> dict[str, str]:
    name, title, invitation = PLACES[place]
    frame = f'<iframe class="live" src="../live/{name}.html?embed" title="{title}" loading="lazy"></iframe>'
    link = f'<p class="live-link"><a href="../live/{name}.html">Open it as a page of its own</a></p>'
    html = f'<div class="live">\n<p>{invitation}</p>\n{frame}\n{link}\n{SCRIPT}\n</div>'
    return {"source": f"```{{raw}} html\n{html}\n```"}
