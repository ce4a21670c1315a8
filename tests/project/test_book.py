"""The book: every notebook has its page, nothing is fetched, no link is dead, and cells lead to the package.

`make book` builds it with every warning as an error; `make test` does so first. These tests read build/book,
or build a book of their own where that one is missing or older than its sources. What the pages look like,
and that a browser draws the formulas, is for the browser tests.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections import defaultdict
from functools import cache
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from notebooks_and_sources import NOTEBOOKS, ROOT, read_cells

pytest.importorskip("sphinx", reason='the book needs the extra [book]: pip install -e ".[book]"')
sys.path.insert(0, str(ROOT / "docs"))
from book import build, docstrings, live_pages, navigation
from bs4 import BeautifulSoup

OUTSIDE = re.compile(r"(https?:)?//")
# What a page loads by itself; a link that a reader may click is none of these.
LOADED = re.compile(
    r'<(?:script|img|iframe|source|object|embed|video|audio|image)\b[^>]*?\s(?:src|data|href)="([^"]*)"'
)
SHEETS = re.compile(
    r'<link\b(?=[^>]*rel="(?:stylesheet|preload|icon|shortcut icon|modulepreload)")[^>]*href="([^"]*)"'
)
IN_STYLE = re.compile(r"""(?:@import\s+|url\(\s*)["']?([^"')\s]+)""")


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built book."""
    built = ROOT / "build" / "book"
    if not build.is_current(built):
        built = tmp_path_factory.mktemp("book")
        assert build.main([str(built)]) == 0, "the book has warnings, see above"
    return built


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@cache
def anchors_of(page: Path) -> frozenset[str]:
    return frozenset(re.findall(r'\sid="([^"]+)"', text_of(page)))


def test_every_notebook_has_a_page_with_neighbors(book: Path) -> None:
    pages = [book / "notebooks" / f"{path.stem}.html" for path in NOTEBOOKS]
    assert all(page.exists() for page in pages)
    for page, following in itertools.pairwise(pages):
        assert re.search(rf'class="next-page" href="{following.name}"', text_of(page)), f"after {page.name}"
        assert re.search(rf'class="prev-page" href="{page.name}"', text_of(following)), (
            f"before {following.name}"
        )


def test_every_module_has_a_page(book: Path) -> None:
    names = build.modules()
    assert len(names) > 50
    missing = [name for name in names if not (book / "api" / f"{name}.html").exists()]
    assert not missing


def test_pages_load_nothing_from_elsewhere(book: Path) -> None:
    found = []
    for page in book.rglob("*.html"):
        text = text_of(page)
        styles = " ".join(re.findall(r"<style[^>]*>(.*?)</style>", text, flags=re.DOTALL))
        addresses = LOADED.findall(text) + SHEETS.findall(text) + IN_STYLE.findall(styles)
        found += [f"{page.name}: {address}" for address in addresses if OUTSIDE.match(address)]
    for sheet in book.rglob("*.css"):
        addresses = IN_STYLE.findall(sheet.read_text(encoding="utf-8"))
        found += [f"{sheet.name}: {address}" for address in addresses if OUTSIDE.match(address)]
    assert not found


def test_every_internal_address_leads_somewhere(book: Path) -> None:
    dead, there = set(), {str(path) for path in (book, *book.rglob("*"))}  # asked half a million times
    for page in book.rglob("*.html"):
        text = text_of(page)
        for address in {
            *re.findall(r'<a\b[^>]*?\shref="([^"]*)"', text),
            *LOADED.findall(text),
            *SHEETS.findall(text),
        }:
            parts = urlsplit(unescape(address))
            if parts.scheme or parts.netloc:
                continue
            target = os.path.normpath(f"{page.parent}/{unquote(parts.path)}") if parts.path else str(page)
            if target not in there:
                dead.add(f"{page.relative_to(book)}: {address}")
            elif (
                parts.fragment
                and target.endswith(".html")
                and unquote(parts.fragment) not in anchors_of(Path(target))
            ):
                dead.add(f"{page.relative_to(book)}: {address} (no such place in the page)")
    assert not dead, "\n".join(sorted(dead)[:20])


@pytest.mark.parametrize(
    ("page", "opened", "own"),
    [
        ("notebooks/05_gemma.html", [], "05 Gemma: from tokens to the next word"),
        ("api/minivlm.speed.one_row.html", ["Reference"], "minivlm.speed.one_row"),
        ("_modules/minivlm/rope.html", [], None),
        ("search.html", [], None),
    ],
)
def test_the_tree_shows_where_a_page_is(book: Path, page: str, opened: list[str], own: str | None) -> None:
    tree = BeautifulSoup(text_of(book / page), "html.parser").select_one(".sidebar-tree")
    assert tree is not None
    links = tree.select("a")
    assert len(links) > 300
    assert [link.text for link in tree.select(".current-page > a")] == ([own] if own else [])
    assert [link.text for link in links if link["href"] == "#"] == ([own] if own else [])
    above = [link.text for link in tree.select(".current:not(.current-page) > a")]
    assert above == opened
    checked = [switch.parent for switch in tree.select("input[checked]") if switch.parent is not None]
    assert all("current" in entry["class"] for entry in checked)
    assert not re.findall("entry-|data-open", str(tree))


def test_links_of_the_tree_start_from_the_page() -> None:
    html = (
        '<ul><li class="a"><a href="top.html">T</a><input/><ul>'
        '<li class="b"><a href="in/x.html">X</a></li></ul></li>'
        '<li class="a"><a href="https://elsewhere">E</a></li></ul>'
    )
    tree = navigation.Tree(html)
    own = html.replace('class="a"><a href="top.html', 'class="current-page current a"><a href="#')
    assert tree.on("top.html") == own.replace("<input/>", '<input checked=""/>')
    inner = tree.on("in/x.html")
    assert inner.count("current") == 3
    assert '<li class="current a"><a href="../top.html">' in inner
    assert '<li class="current-page current b"><a href="#">' in inner
    assert 'href="https://elsewhere"' in inner
    assert tree.on("other/page.html").count('"../') == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_marked_cell_leads_to_its_file(book: Path, path: Path) -> None:
    lines = re.findall(
        r'<p class="package-link">(.*?)</p>', text_of(book / "notebooks" / f"{path.stem}.html"), re.DOTALL
    )
    leads_to = [re.findall(r'href="\.\./_modules/([\w/]+)\.html', line) for line in lines]
    marked = [cell.marked_file for cell in read_cells(path) if cell.marked_file]
    assert leads_to == [[file.removesuffix(".py")] for file in marked]


def test_a_definition_leads_to_its_reference(book: Path) -> None:
    assert 'href="../api/minivlm.masks.html#minivlm.masks.causal"' in text_of(
        book / "notebooks" / "05_gemma.html"
    )


def test_formulas_are_drawn_by_our_own_copy_of_mathjax(book: Path) -> None:
    page = text_of(book / "notebooks" / "02_clip_and_siglip.html")
    assert page.count('class="math notranslate nohighlight"') > 5
    assert r"\frac{e^{x_i}}{\sum_j e^{x_j}}" in page
    (script,) = re.findall(r'src="\.\./(_static/mathjax/tex-svg\.js)', page)
    assert (book / script).stat().st_size > 1_000_000


def test_solutions_are_folded(book: Path) -> None:
    for path in NOTEBOOKS:
        exercises = sum("exercise" in cell.tags for cell in read_cells(path))
        assert text_of(book / "notebooks" / f"{path.stem}.html").count("Show the solution") == exercises


def test_first_page_shows_answers_of_the_model(book: Path) -> None:
    import torch

    from minivlm.models.load import load_answering
    from minivlm.world.demo import read_samples

    page = unescape(text_of(book / "index.html"))
    samples = read_samples(ROOT / "figures" / "samples")
    for path, prompts in samples.items():
        assert (book / "_images" / path.name).exists()
        for prompt in prompts:
            assert f">{prompt.split()[0]}<" in page.replace('class="pre"', "") or prompt in page
    torch.set_num_threads(1)
    model, processor = load_answering()
    path, prompts = next(iter(samples.items()))
    for answer in processor.decode(model.generate(**processor([str(path)] * len(prompts), prompts))):
        assert answer in re.sub(r"<[^<>]*span[^<>]*>", "", page)


def test_figures_have_the_last_printed_line_as_alt_text(book: Path) -> None:
    for path in NOTEBOOKS:
        page = text_of(book / "notebooks" / f"{path.stem}.html")
        # Each alternative text by itself: a quotation mark in one must not end it.
        alts = [unescape(alt) for alt in re.findall(r'<img alt="([^"]*)"', page)]
        for cell in read_cells(path):
            if any("image/png" in output.get("data", {}) for output in cell.outputs):
                printed = "".join("".join(output.get("text", "")) for output in cell.outputs).strip()
                assert " ".join(printed.splitlines()[-1].split()) in alts, cell.id


def test_live_pages_stand_below_a_figure_of_the_same(book: Path) -> None:
    """Which is what there is in JupyterLab and on paper."""
    places = set(live_pages.PLACES)
    for path in NOTEBOOKS:
        cells = read_cells(path)
        page = text_of(book / "notebooks" / f"{path.stem}.html")
        for number, cell in enumerate(cells):
            if cell.id in places:
                places.remove(cell.id)
                name, title, _ = live_pages.PLACES[cell.id]
                assert f'src="../live/{name}.html?embed" title="{title}"' in page
                assert (book / "live" / f"{name}.html").exists()
                above = cells[number - 1].outputs
                assert any("image/png" in output.get("data", {}) for output in above), "no figure above it"
    assert not places, "no notebook has these cells"


def test_optional_sections_are_folded(book: Path) -> None:
    for path in NOTEBOOKS:
        cells = read_cells(path)
        headings = re.findall(r"^#+ .*\(optional\)$", "\n".join(cell.source for cell in cells), re.MULTILINE)
        page = text_of(book / "notebooks" / f"{path.stem}.html")
        assert page.count('<details class="optional">') == len(headings)


def test_search_finds_no_solutions(book: Path) -> None:
    """Every catch-up cell says `solutions`; only a chapter that speaks of them elsewhere is found by it."""
    index = json.loads(re.sub(r"^Search.setIndex\(|\)$", "", (book / "searchindex.js").read_text("utf-8")))
    found: dict[str, set[str]] = defaultdict(set)  # page -> its words
    for word, pages in index["terms"].items():
        for page in [pages] if isinstance(pages, int) else pages:
            found[index["docnames"][page]].add(word)
    telling = {"exercise", "check", "catch-up"}
    for path in NOTEBOOKS:
        seen = " ".join(cell.source for cell in read_cells(path) if not telling & set(cell.tags))
        assert ("solut" in found[f"notebooks/{path.stem}"]) == bool(
            re.search(r"\bsolutions?\b", seen.lower())
        ), path.name
    assert not [page for page in found if page.startswith("api/minivlm.checks.")]


def test_what_the_search_quotes(book: Path) -> None:
    """The text of each page, with its sections, and without solutions."""
    script = (book / "_static" / "pages.js").read_text(encoding="utf-8")
    pages = json.loads(script.removeprefix("window.pagesOfTheBook = ").removesuffix(";\n"))
    assert {f"notebooks/{path.stem}.html" for path in NOTEBOOKS} <= pages.keys()
    for name, text in pages.items():
        assert len(text) > 40, name
        assert "### BEGIN" not in text or not name.startswith("notebooks/"), name
    gemma = next(text for name, text in pages.items() if name.endswith("05_gemma.html"))
    sections = set(re.findall('<section id="([^"]+)">', gemma))
    assert sections & anchors_of(book / "notebooks" / "05_gemma.html")
    assert 'src="_static/excerpts.js' in text_of(book / "search.html")


def test_search_knows_the_chapters(book: Path) -> None:
    index = (book / "searchindex.js").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert json.dumps(f"notebooks/{path.stem}") in index


def test_a_page_is_made_for_phones_and_its_code_can_be_copied(book: Path) -> None:
    for page in (book / "index.html", book / "notebooks" / "00_tour.html"):
        assert 'name="viewport" content="width=device-width' in text_of(page)
        assert "copybutton.js" in text_of(page)


# What becomes of a docstring.


def test_a_drawing_is_kept_as_it_is_drawn() -> None:
    lines = ["Who sees whom.", "", "1 0", "1 1", "", "With *two* rows:", "", "    0 1", "    1 1"]
    result = docstrings.to_restructuredtext(lines)
    assert result[2:6] == ["::", "", "    1 0", "    1 1"]
    assert "With *two* rows:" in result
    assert result[-4:-1] == ["", "    0 1", "    1 1"]


def test_code_is_literal_and_stars_are_escaped() -> None:
    (line, _) = docstrings.to_restructuredtext(["The `step`s of n * n, `a_` and name_, for **all**."])
    assert line == r"The ``step``\ s of n \* n, ``a_`` and name\_, for **all**."


def test_names_of_the_package_become_links() -> None:
    (line, _) = docstrings.to_restructuredtext(["See `causal`."], {"causal": "minivlm.masks.causal"}.get)
    assert line == "See :py:obj:`causal <minivlm.masks.causal>`."


def test_what_is_returned_has_no_type_before_a_colon() -> None:
    returns = ["Returns:", "    ids [B, T] of `f`: padded", "    on the left."]
    result = docstrings.to_restructuredtext(["Reads.", "", *returns, "", "Raises:", "    E: no."])
    assert result[2:5] == [":returns: ids [B, T] of ``f``: padded", "    on the left.", ""]
    assert result[5:7] == ["Raises:", "    E: no."]


def test_raises_in_a_sentence_becomes_a_section() -> None:
    result = docstrings.to_restructuredtext(["Reads.", "", "Raises InputError: the file is", "damaged."])
    assert result == ["Reads.", "", "Raises:", "    InputError: the file is", "        damaged.", ""]
