"""What a reader need not see at once is folded, and what would give an answer away is not found by searching.

A section whose heading ends with "(optional)" opens on a click. Exercises, checks and catch-up cells hold
solutions or speak of them, so the search leaves them out.
"""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx

OPEN = '<details class="optional"><summary>Optional, can be skipped: open</summary>'
TELLING = {"tag_exercise", "tag_check", "tag_catch-up"}  # classes of MyST-NB for the tags of a cell


def fold_optional(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Put what follows the heading of an optional section into a <details>: the event `doctree-resolved`."""
    for section in list(doctree.findall(nodes.section)):
        title = section[0]
        if isinstance(title, nodes.title) and title.astext().endswith("(optional)"):
            section.insert(1, nodes.raw("", OPEN, format="html"))
            section.append(nodes.raw("", "</details>", format="html"))


def leave_out_of_search(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Mark cells that tell too much with the class that Sphinx's index skips: `doctree-resolved`."""
    for cell in doctree.findall(nodes.container):
        if TELLING & set(cell["classes"]):
            cell["classes"].append("no-search")
