"""The tree of all pages, which stands beside each of them, made once.

The theme asks Sphinx for the whole tree again for every page, and that was two thirds of the time of building
the book: hundreds of pages, with hundreds of entries each. What differs from page to page is little: where
its links start from, which entry is the page's own, and that those above it are open.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from bs4 import BeautifulSoup
from furo.navigation import get_navigation_tree
from sphinx.application import Sphinx

ENTRY, OPEN = re.compile(r"entry-(\d+) "), re.compile(r' data-open="(\d+)"')


class Tree:
    """The tree as it stands on the first page, where no entry is the page's own.

    Attributes:
        html: every entry has a number, in a class and an attribute that no page keeps.
        above: by address, the numbers of an entry's ancestors and its own.
    """

    def __init__(self, html: str) -> None:
        soup = BeautifulSoup(html, "html.parser")
        entries = soup.find_all("li")
        number_of = {id(entry): number for number, entry in enumerate(entries)}
        self.above: dict[str, list[int]] = {}
        for number, entry in enumerate(entries):
            entry["class"] = [f"entry-{number}", *entry["class"]]
            switch = entry.find("input", recursive=False)
            if switch is not None:
                switch["data-open"] = str(number)
            above = [number_of[id(parent)] for parent in entry.find_parents("li")]
            self.above[entry.find("a")["href"]] = [*reversed(above), number]
        self.html = str(soup)

    def on(self, address: str) -> str:
        """The tree beside the page of an address, such as api/minivlm.rope.html."""
        up, above = "../" * address.count("/"), self.above.get(address, [])
        html = ENTRY.sub(partial(_class, above), self.html)
        html = OPEN.sub(lambda mark: ' checked=""' if int(mark[1]) in above else "", html)
        html = re.sub(r'href="(?![a-z]+:|#)', f'href="{up}', html)
        return html.replace(f'href="{up}{address}"', 'href="#"')


def _class(above: list[int], mark: re.Match[str]) -> str:
    number = int(mark[1])
    if number not in above:
        return ""
    return "current-page current " if number == above[-1] else "current "


class Navigation:
    """What replaces the theme's computation, before and after it."""

    def __init__(self) -> None:
        self.tree: Tree | None = None

    def leave_out(
        self, app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
    ) -> None:
        """Give the theme no tree to arrange: the event `html-page-context`, before the theme."""
        context["toctree"] = lambda **options: ""

    def put(self, app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
        """Give the page its tree: the same event, after the theme."""
        builder: Any = app.builder
        if self.tree is None:
            options = {"collapse": False, "titles_only": True, "maxdepth": -1, "includehidden": True}
            self.tree = Tree(get_navigation_tree(builder._get_local_toctree(app.config.root_doc, **options)))
        context["furo_navigation_tree"] = self.tree.on(builder.get_target_uri(page))
