"""Tables of sentences: a row of a narrow screen is a card, in which every cell says its column.

Tables of numbers are left alone. Their columns are compared, so they scroll sideways as they are.
"""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx

SENTENCE = 50  # characters from which a cell is too long for a column of a phone


def name_columns(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Put the head of its column into each cell, where book.css hides it on a wide screen.

    The event `doctree-resolved` of Sphinx.
    """
    for table in list(doctree.findall(nodes.table)):
        heads = [entry.astext() for head in table.findall(nodes.thead) for entry in head.findall(nodes.entry)]
        rows = [
            [entry for entry in row.children if isinstance(entry, nodes.entry)]
            for body in table.findall(nodes.tbody)
            for row in body.findall(nodes.row)
        ]
        # The first column names the row, also where the others are numbers.
        if any(len(entry.astext()) >= SENTENCE for row in rows for entry in row[1:]):
            table["classes"].append("sentences")
            for row in rows:
                for head, entry in zip(heads, row, strict=False):  # a cell may span columns
                    entry.insert(0, nodes.inline("", head, classes=["column"]))
