"""Pictures side by side with what is said about them: a page that needs nothing from outside.

HTML instead of one large picture: it shows names in any script, and text can be read and searched.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

LONGEST_SIDE = 480  # pixels of a stored picture

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px sans-serif; background: #fff; color: #222 }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 16px }}
figure {{ margin: 0; overflow-wrap: anywhere }}
img {{ max-width: 100% }}
small {{ color: #666 }}
</style></head><body><h1>{title}</h1><main>
{figures}
</main></body></html>
"""


class Entry(NamedTuple):
    """One figure of the page."""

    pictures: Sequence[Image.Image]
    name: str
    prompt: str
    answer: str


def sheet_page(entries: Sequence[Entry], title: str) -> str:
    """HTML of all entries. Pictures are made smaller where they are large."""
    figures = []
    for entry in entries:
        answer = html.escape(entry.answer)
        pictures = "".join(f'<img src="{_data(picture)}" alt="{answer}">' for picture in entry.pictures)
        said = f"<b>{html.escape(entry.prompt)}</b><br>" if entry.prompt else ""
        figures.append(
            f"<figure>{pictures}<figcaption>{said}{answer}<br><small>{html.escape(entry.name)}</small>"
            "</figcaption></figure>"
        )
    return _PAGE.format(title=html.escape(title), figures="\n".join(figures))


def _data(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    content = io.BytesIO()
    small.save(content, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
