"""Settings of the book, for Sphinx. The pages are gathered by docs/book/build.py, which also calls Sphinx."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

from book import docstrings, excerpts, links, navigation, reading, tables

from minivlm import __version__

project = "minivlm"
copyright = "the authors of minivlm"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]

# Notebooks: their stored outputs are shown, nothing is run, and no script is fetched for widgets.
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, Any] = {}
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline"]
smartquotes = False  # a quotation mark in a docstring may be code
myst_heading_anchors = 3

# The reference of the package. Names of other packages are shown, but lead nowhere: looking up where they are
# documented needs a network.
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
highlight_language = "text"  # a block that names no language is a drawing or a command
python_maximum_signature_line_length = 88
OTHERS = (
    "abc|argparse|collections|contextlib|dataclasses|matplotlib|nn|numpy|np|pathlib|PIL|subprocess|tokenizers|"
    "torch|tqdm"
)
nitpick_ignore_regex = [
    # For type checkers only; then types of attributes, which Sphinx cuts at their comma.
    (r"py:.*", rf"({OTHERS})\..*|Tensor|Commands|NotebookNode|Path|Picture|Image\.Image|Kind|Grid|tqdm"),
    (r"py:.*", r"(int \| )?tuple\[(int|str)"),
]

html_theme = "furo"
html_title = f"minivlm {version}"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
mathjax_path = "mathjax/tex-svg.js"
templates_path: list[str] = []
copybutton_prompt_text = ">>> "
pygments_style = "a11y-high-contrast-light"  # comments as well have a contrast of 4.5 and more
pygments_dark_style = "monokai"


def _docstring(app: Sphinx, kind: str, name: str, thing: Any, options: object, lines: list[str]) -> None:
    if kind != "property":
        lines[:] = _converted(lines, name)


def _property(app: Sphinx, kind: str, name: str, thing: Any, options: object, lines: list[str]) -> None:
    """Without napoleon, which takes what stands before the first colon of a property for its type."""
    if kind == "property":
        lines[:] = _converted((inspect.getdoc(thing) or "").split("\n"), name)


def _converted(lines: list[str], name: str) -> list[str]:
    parts = name.split(".")
    module = next(m for end in range(len(parts), 0, -1) if (m := ".".join(parts[:end])) in sys.modules)
    return docstrings.to_restructuredtext(lines, lambda code: links.full_name(module, code))


def _dashes(app: Sphinx, doctree: nodes.document) -> None:
    """Sphinx writes two hyphens between a parameter and what it is, for smart quotes to change."""
    for text in [text for text in doctree.findall(nodes.Text) if text == " -- "]:
        text.parent.replace(text, nodes.Text(" – "))


def setup(app: Sphinx) -> None:
    """What Sphinx calls first: connect our own steps."""
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # napoleon, at 500, reads the result
    app.connect("autodoc-process-docstring", _property, priority=600)
    app.connect("doctree-read", _dashes)
    app.connect("missing-reference", links.resolve)
    app.connect("doctree-resolved", links.link_marked_cells)
    app.connect("doctree-resolved", tables.name_columns)
    app.connect("doctree-resolved", reading.fold_optional)
    app.connect("doctree-resolved", reading.leave_out_of_search)
    texts, tree = excerpts.Texts(), navigation.Navigation()
    app.connect("html-page-context", texts.keep)
    app.connect("build-finished", texts.write)
    app.connect("html-page-context", tree.leave_out, priority=400)  # before the theme, which is at 500
    app.connect("html-page-context", tree.put, priority=600)
