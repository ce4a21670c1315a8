"""The lines that the search quotes below each page that it finds.

Sphinx's script fetches a page to quote it, which a browser does not allow where the book is opened from the
disk, and quotes solutions as well. Here the text of all pages is written into one script, without what the
search leaves out; docs/static/excerpts.js hands it over. Only the page of the search loads it.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup
from bs4.element import NavigableString, Tag
from sphinx.application import Sphinx

PAGES = "pages.js"
LEFT_OUT = ".no-search, .headerlink, .package-link, script, style, svg, table.indextable"


class Texts:
    """The text of all pages."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {}

    def keep(self, app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
        """Of each page that the search finds; its own page loads the script: `html-page-context`."""
        if page == "search":
            app.add_js_file("excerpts.js")
        if page in app.env.found_docs:
            body = BeautifulSoup(context["body"], "html.parser")
            for element in body.select(LEFT_OUT):
                element.decompose()
            self.pages[f"{page}.html"] = f'<div role="main">{" ".join(_sections(body).split())}</div>'

    def write(self, app: Sphinx, exception: Exception | None) -> None:
        """The script: the event `build-finished`."""
        if exception is not None or app.builder.format != "html":
            return
        pages = json.dumps(dict(sorted(self.pages.items())), ensure_ascii=False)
        script = f"window.pagesOfTheBook = {pages};\n"
        (Path(app.outdir) / "_static" / PAGES).write_text(script, encoding="utf-8")


def _sections(element: Tag) -> str:
    """The text of an element; of its structure, only what a result may point to."""
    parts = []
    for child in element.children:
        if type(child) is NavigableString:
            parts.append(escape(str(child), quote=False))
        elif isinstance(child, Tag):
            inside = _sections(child)
            named = child.get("id")
            parts.append(f'<section id="{escape(str(named))}">{inside}</section>' if named else inside)
    return "".join(parts)
