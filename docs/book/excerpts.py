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


def add_script(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """To the page of the search: the event `html-page-context`."""
    if page == "search":
        app.add_js_file("excerpts.js")


def write(app: Sphinx, exception: Exception | None) -> None:
    """The script with the text of all pages: the event `build-finished`."""
    if exception is not None or app.builder.format != "html":
        return
    folder = Path(app.outdir)
    pages = {}
    for name in sorted(app.env.found_docs):
        page = BeautifulSoup((folder / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
        main = page.select_one('[role="main"]')
        if main is not None:
            for element in main.select(LEFT_OUT):
                element.decompose()
            pages[f"{name}.html"] = f'<div role="main">{" ".join(_sections(main).split())}</div>'
    script = f"window.pagesOfTheBook = {json.dumps(pages, ensure_ascii=False)};\n"
    (folder / "_static" / PAGES).write_text(script, encoding="utf-8")


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
