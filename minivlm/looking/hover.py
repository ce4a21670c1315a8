"""A picture to explore with the mouse: one self-contained piece of HTML.

Inline SVG with a few lines of script. Buttons choose which score colors the patches; the text below describes
the patch under the mouse, or the one that arrow keys have reached. Without scripts, each patch still has its
text as a tooltip (`title`). `hover_page` is a piece for a notebook, `hover_document` a whole file around it.
Colors and type are those of the live page (docs/live/style.css).

A map is drawn in percent of its own largest value, but not if that is next to nothing: otherwise a map of
0.1 % of the attention would look like one of all of it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from minivlm.looking.plots import grid_of, to_image

DRAWING_SIDE = 360  # pixels; the picture inside is stored as small as the model sees it
STORED_SIDE = 224  # pixels of the stored picture, at most


@dataclass(frozen=True)
class Scale:
    """What the numbers of a map are, and what is drawn in full red at least."""

    least: float
    unit: str  # {full} stands for the value in full red

    def full(self, values: Tensor) -> float:
        """The value in full red."""
        # Of many small patches, each gets a smaller share: in 64 patches, 0.05 is three times an even share.
        least = min(self.least, 3.2 / len(values)) if "%" in self.unit else self.least
        return max(float(values.float().max()), least)


_DROP = Scale(0.5, "log-odds of the answer that fall by {full:.1f} without this patch")
_SCALES = {
    "attention": Scale(0.05, "{full:.1%} of the attention"),
    "rollout": Scale(0.05, "{full:.1%} of what attention carries through all layers"),
    "occlusion": _DROP,
    "hidden": _DROP,
}
_OTHER = Scale(0.0, "{full:.2g}")

_PAGE = """<div id="{id}">
<style>
#{id} {{ max-width: {width}px; padding: 2px; background: var(--ground, #ffffff); color: var(--ink, #1d2129);
  font: 1rem/1.5 system-ui, sans-serif; }}
#{id} .maps {{ display: flex; flex-wrap: wrap; gap: 0.4rem; margin-bottom: 0.6rem; }}
#{id} button {{ min-height: 2.1rem; padding: 0.2rem 0.65rem; border: 1px solid var(--line, #c9ced6);
  border-radius: 6px; background: var(--card, #f6f7f9); color: inherit; font: inherit; cursor: pointer; }}
#{id} button[aria-pressed="true"] {{ outline: 2px solid var(--accent, #0b57b0); outline-offset: 1px; }}
#{id} :focus-visible {{ outline: 3px solid var(--accent, #0b57b0); outline-offset: 1px; }}
#{id} svg {{ display: block; max-width: 100%; height: auto; }}
#{id} .legend {{ display: flex; gap: 0.6rem; align-items: center; margin: 0.5rem 0; font-size: 0.87rem;
  color: var(--soft, #555d6b); min-height: 2.8em; }}
#{id} .bar {{ flex: none; width: 6rem; height: 0.9rem; border: 1px solid var(--line, #c9ced6);
  background: linear-gradient(to right, rgb(209 31 47 / 0), rgb(209 31 47 / 0.8)) #ffffff; }}
#{id} .about {{ min-height: 3em; }}
</style>
<div class="maps" role="group" aria-label="What colors the patches">{buttons}</div>
<svg viewBox="0 0 {columns} {rows}" width="{across}" height="{down}" role="group" aria-label="{label}">
<image href="{picture}" width="{columns}" height="{rows}" preserveAspectRatio="none"
 style="image-rendering:pixelated"/>
{patches}
</svg>
<div class="legend"><span class="bar"></span><span class="scale">Choose what colors the patches.</span></div>
<div class="about" role="status">Move the mouse over the picture.</div>
<script>
(() => {{
  const root = document.getElementById("{id}"), about = root.querySelector(".about");
  const patches = [...root.querySelectorAll("rect")], maps = {maps};
  const buttons = [...root.querySelectorAll("button")], scale = root.querySelector(".scale");
  buttons.forEach((button, which) => button.onclick = () => {{
    patches.forEach((patch, i) => patch.setAttribute("fill-opacity", maps[which][i] / 100 * 0.8));
    buttons.forEach(other => other.setAttribute("aria-pressed", String(other === button)));
    scale.textContent = button.dataset.scale;
  }});
  const moves = {{"ArrowLeft": -1, "ArrowRight": 1, "ArrowUp": -{columns}, "ArrowDown": {columns}}};
  patches.forEach((patch, i) => {{
    patch.onmouseenter = patch.onfocus = () => {{
      patch.setAttribute("stroke", "#000");
      about.textContent = patch.querySelector("title").textContent;
    }};
    patch.onmouseleave = patch.onblur = () => patch.setAttribute("stroke", "#fff");
    patch.onkeydown = event => {{
      const next = patches[i + moves[event.key]];
      if (!next) return;
      event.preventDefault();
      next.focus();
    }};
  }});
}})();
</script>
</div>"""

_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: {prompt}</title>
<style>
:root {{
  color-scheme: light dark;
  --ground: #ffffff; --card: #f6f7f9; --ink: #1d2129; --soft: #555d6b; --line: #c9ced6; --accent: #0b57b0;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --ground: #14171c; --card: #1e232a; --ink: #e8eaee; --soft: #a9b1bd; --line: #444c58; --accent: #7db4ff;
  }}
}}
body {{ margin: 0 auto; padding: 1rem 1.25rem 3rem; max-width: 46rem; overflow-wrap: anywhere;
  background: var(--ground); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }}
h1 {{ margin: 0; font-size: 1.6rem; }}
dl {{ display: grid; grid-template-columns: auto 1fr; gap: 0.2rem 1rem; margin: 0.8rem 0 1.2rem; }}
dt {{ color: var(--soft); }}
dd {{ margin: 0; white-space: pre-wrap; }}
.answer {{ font-size: 1.2rem; font-weight: 650; }}
</style>
</head>
<body>
<main>
<h1>Inside the model: {name}</h1>
<dl><dt>prompt</dt><dd>{prompt}</dd><dt>answer</dt><dd class="answer">{answer}</dd></dl>
{page}
</main>
</body>
</html>
"""


def hover_document(name: str, prompt: str, answer: str, page: str) -> str:
    """A whole file around what `hover_page` gives; `name` is that of the picture. Text stays text."""
    texts = {"name": name, "prompt": prompt, "answer": answer.strip() or "(nothing)"}
    return _DOCUMENT.format(page=page, **{key: html.escape(text) for key, text in texts.items()})


def hover_page(
    pixel_values: Tensor, scores: Mapping[str, Tensor], words: Sequence[Sequence[str]], label: str
) -> str:
    """HTML of a picture [C, height, width] that describes its patches.

    Args:
        scores: by name, one number per patch [N]. Shown in whole percent of the largest, or of what is full
            at least (see `Scale`), and as 0 if negative. Rounding makes the page the same on every machine.
        words: the nearest words of each patch.
        label: a description for people who cannot see the picture, such as the prompt and the answer.
    """
    rows, columns = grid_of(len(words), pixel_values)
    full = {name: _scale_of(name).full(values) for name, values in scores.items()}
    shares = {name: _percent(values, full[name]) for name, values in scores.items()}
    patches = []
    for number, near in enumerate(words):
        row, column = divmod(number, columns)
        lines = [f"row {row + 1}, column {column + 1}", *(f"{n}: {v[number]} %" for n, v in shares.items())]
        if near:
            lines.append("nearest words: " + ", ".join(near))
        patches.append(
            f'<rect x="{column}" y="{row}" width="1" height="1" fill="#d11f2f" fill-opacity="0" '
            f'stroke="#fff" stroke-width="0.02" tabindex="{-1 if number else 0}" role="img">'
            f"<title>{html.escape('; '.join(lines))}</title></rect>"
        )
    meant = {name: _scale_of(name).unit.format(full=full[name]) for name in shares}
    legends = {name: f"Full red, 100 %, stands for {unit}." for name, unit in meant.items()}
    buttons = "".join(
        f'<button type="button" aria-pressed="false" data-scale="{html.escape(legend)}">'
        f"{html.escape(name)}</button> "
        for name, legend in legends.items()
    )
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


def _scale_of(name: str) -> Scale:
    """By the first word of a map's name: "occlusion, 3 x 3" is an occlusion."""
    return _SCALES.get(name.replace(",", " ").split(" ")[0], _OTHER)


def _percent(values: Tensor, full: float) -> list[int]:
    """Percentages of what is full, 0 to 100; all 0 if nothing is positive."""
    return [round(100 * max(value, 0) / full) if full > 0 else 0 for value in values.float().tolist()]


def _picture(pixel_values: Tensor) -> str:
    """The picture as a data URL. A BMP, since compressed bytes differ between library versions."""
    pixels = (to_image(pixel_values).numpy() * 255).round().astype(np.uint8)
    picture = Image.fromarray(pixels)
    picture.thumbnail((STORED_SIDE, STORED_SIDE))
    content = io.BytesIO()
    picture.save(content, format="BMP")
    return "data:image/bmp;base64," + base64.b64encode(content.getvalue()).decode()
