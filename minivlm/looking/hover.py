"""A picture to explore with the mouse: one self-contained piece of HTML.

Inline SVG with a few lines of script. Buttons choose which score colors the patches; the text below describes
the patch under the mouse. Without scripts, each patch still has its text as a tooltip (`title`).
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from minivlm.looking.plots import grid_of, to_image

DRAWING_SIDE = 360  # pixels; the picture inside is stored as small as the model sees it
STORED_SIDE = 224  # pixels of the stored picture, at most

_PAGE = """<div id="{id}" style="font:14px sans-serif;max-width:{width}px;background:#fff;color:#222">
<div>{buttons}</div>
<svg viewBox="0 0 {columns} {rows}" width="{across}" height="{down}" role="img" aria-label="{label}">
<image href="{picture}" width="{columns}" height="{rows}" preserveAspectRatio="none"
 style="image-rendering:pixelated"/>
{patches}
</svg>
<div class="about" style="min-height:3em">Move the mouse over the picture.</div>
<script>
(() => {{
  const root = document.getElementById("{id}"), about = root.querySelector(".about");
  const patches = [...root.querySelectorAll("rect")], maps = {maps};
  root.querySelectorAll("button").forEach((button, which) => button.onclick = () => patches.forEach(
    (patch, i) => patch.setAttribute("fill-opacity", maps[which][i] / 100 * 0.8)));
  patches.forEach(patch => {{
    patch.onmouseenter = () => {{
      patch.setAttribute("stroke", "#000");
      about.textContent = patch.querySelector("title").textContent;
    }};
    patch.onmouseleave = () => patch.setAttribute("stroke", "#fff");
  }});
}})();
</script>
</div>"""


def hover_page(
    pixel_values: Tensor, scores: Mapping[str, Tensor], words: Sequence[Sequence[str]], label: str
) -> str:
    """HTML of a picture [C, height, width] that describes its patches.

    Args:
        scores: by name, one number per patch [N]. Shown in whole percent of the largest, and as 0 if
            negative. Rounding makes the page the same on every machine.
        words: the nearest words of each patch.
        label: a description for people who cannot see the picture, such as the prompt and the answer.
    """
    rows, columns = grid_of(len(words), pixel_values)
    shares = {name: _percent(values) for name, values in scores.items()}
    patches = []
    for number, near in enumerate(words):
        row, column = divmod(number, columns)
        lines = [f"row {row + 1}, column {column + 1}", *(f"{n}: {v[number]} %" for n, v in shares.items())]
        if near:
            lines.append("nearest words: " + ", ".join(near))
        patches.append(
            f'<rect x="{column}" y="{row}" width="1" height="1" fill="#d62728" fill-opacity="0" '
            f'stroke="#fff" stroke-width="0.02"><title>{html.escape("; ".join(lines))}</title></rect>'
        )
    buttons = "".join(f'<button type="button">{html.escape(name)}</button> ' for name in shares)
    parts = {
        "buttons": buttons,
        "picture": _picture(pixel_values),
        "patches": "\n".join(patches),
        # A script ends at the first "</", even inside a string, so it contains only numbers.
        "maps": json.dumps(list(shares.values()), separators=(",", ":")),
        "label": html.escape(label),
    }
    # Two pages in one notebook must not share an id, and the same page must have the same id every time.
    digest = hashlib.sha256("".join(parts.values()).encode()).hexdigest()[:12]
    longest = max(rows, columns)
    sizes = {
        "rows": rows,
        "columns": columns,
        "across": round(DRAWING_SIDE * columns / longest),
        "down": round(DRAWING_SIDE * rows / longest),
        "width": DRAWING_SIDE + 40,
    }
    return _PAGE.format(id=f"look-{digest}", **sizes, **parts)


def _percent(values: Tensor) -> list[int]:
    """Percentages of the largest value, 0 to 100; all 0 if nothing is positive."""
    values = values.float().cpu().clamp(min=0)
    largest = float(values.max())
    return [round(100 * value / largest) if largest > 0 else 0 for value in values.tolist()]


def _picture(pixel_values: Tensor) -> str:
    """The picture as a data URL. A BMP, since compressed bytes differ between library versions."""
    pixels = (to_image(pixel_values).numpy() * 255).round().astype(np.uint8)
    picture = Image.fromarray(pixels)
    picture.thumbnail((STORED_SIDE, STORED_SIDE))
    content = io.BytesIO()
    picture.save(content, format="BMP")
    return "data:image/bmp;base64," + base64.b64encode(content.getvalue()).decode()
