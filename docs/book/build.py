"""Builds the book, a static site: python docs/book/build.py [OUTPUT], by default into build/book.

With --unless-current it builds nothing where the book holds already what its sources say.

Notebooks and pages stay where they are in the repository. They are copied into a temporary folder in which
their relative links hold as before; the pages of the reference, one for each module, and the answers on the
first page, which the shipped model gives now, are added; then Sphinx makes HTML of it. Every warning is an
error, also a name that leads nowhere. Nothing is fetched, and no page asks for anything outside the book.
The live pages, docs/live, are no documents: they are put beside the others as they are, and the small ones
are shown inside of the chapters that speak of them.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

from book.live_pages import with_live_pages  # noqa: E402
from live.build import write_live  # noqa: E402

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "bench/README.md",
    *(f"docs/{path.name}" for path in sorted(DOCS.glob("*.md")) if path.name != "index.md"),
)
LINK = re.compile(r"\]\(([^)#\s]+)")
STAMP = ".sources"
DOCUMENTS = {".md", ".ipynb"}


def main(arguments: list[str]) -> int:
    """Build the book and return Sphinx's exit code."""
    named = [argument for argument in arguments if argument != "--unless-current"]
    output = Path(named[0]) if named else ROOT / "build" / "book"
    if named != arguments and is_current(output):
        return 0
    shutil.rmtree(output, ignore_errors=True)
    began_with = digest()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        gather(source)
        strict = ["--fail-on-warning", "--keep-going", "--nitpicky", "--quiet"]
        places = ["-c", str(DOCS), "-d", str(Path(folder) / "doctrees"), str(source), str(output)]
        code = subprocess.call([sys.executable, "-m", "sphinx", *strict, *places])
    if code == 0:
        write_live(output / "live", book="../")
        (output / STAMP).write_text(began_with, encoding="utf-8")
        print(f"The book is in {output}: open {output / 'index.html'} in a browser.")
    return code


def digest() -> str:
    """What all sources of the book hold, as one number."""
    sources = [ROOT / page for page in PAGES]
    for folder in ("docs", "notebooks", "minivlm", "figures", "bench"):
        sources += (ROOT / folder).rglob("*")
    found = hashlib.sha256()
    for path in sorted(path for path in sources if path.is_file() and "__pycache__" not in path.parts):
        found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


def is_current(output: Path) -> bool:
    """Whether the book in a folder was built, without a warning, from what the sources hold now."""
    stamp = output / STAMP
    return stamp.exists() and stamp.read_text(encoding="utf-8") == digest()


def gather(source: Path) -> None:
    """Everything that Sphinx reads, in one folder."""
    pages = [ROOT / page for page in PAGES if (ROOT / page).exists()]
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in [*pages, *notebooks]:
        write_page(path, source)
    shutil.copy(DOCS / "index.md", source / "index.md")
    write_reference(source / "api")
    write_answers(source)


def write_page(page: Path, source: Path) -> None:
    """A page or notebook, and the pictures and data that it links to, at the same place below `source`."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        notebook = json.loads(text)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = _with_links("".join(cell["source"]), page, source)
            else:
                _prepare_code(cell)
        notebook["cells"] = with_live_pages(notebook["cells"])
        text = json.dumps(notebook)
    else:
        text = _with_links(text, page, source)
    target = source / page.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


def _prepare_code(cell: dict[str, Any]) -> None:
    """Hide a solution, which a reader should try first, and the code of a mere figure behind a button.

    The last line that a cell prints says what its figure shows: it is what a reader who cannot see it gets.
    """
    metadata = cell["metadata"]
    tags = metadata.setdefault("tags", [])
    hidden = "the solution" if "exercise" in tags else "the code of the figure" if "figure" in tags else ""
    shown: dict[str, Any] = {}
    if hidden:
        tags.append("hide-input")
        shown |= {"code_prompt_show": f"Show {hidden}", "code_prompt_hide": f"Hide {hidden}"}
    draws = any("image/png" in output.get("data", {}) for output in cell["outputs"])
    printed = "".join("".join(output.get("text", "")) for output in cell["outputs"]).strip()
    if draws and printed:
        shown["image"] = {"alt": " ".join(printed.splitlines()[-1].split())}
    if shown:
        metadata["mystnb"] = shown


def _with_links(text: str, page: Path, source: Path) -> str:
    """The text of a page, whose links to files of the package lead to their reference.

    Other files that it links to are copied to their place, folders are those of their README.md.
    """

    def replace(match: re.Match[str]) -> str:
        path = (page.parent / match[1]).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[0]
        is_module = path.is_relative_to(ROOT / "minivlm") and (path.suffix == ".py" or path.is_dir())
        if is_module:
            link = f"/api/{_module_name(path)}.rst"
        elif path.is_dir():
            link = f"/{(path / 'README.md').relative_to(ROOT).as_posix()}"
        else:
            link = match[1]
            if path.suffix not in DOCUMENTS:
                copy = source / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        return f"]({link}"

    return LINK.sub(replace, text)


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules() -> dict[str, str]:
    """Name -> first sentence of the docstring, of every module of the package."""
    found = {}
    for path in sorted((ROOT / "minivlm").rglob("*.py")):
        if path.name == "__main__.py":
            continue
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[_module_name(path)] = " ".join(docstring.split("\n\n")[0].split())
    return found


def write_reference(folder: Path) -> None:
    """One page for each module, and one that lists them."""
    folder.mkdir(parents=True)
    found = modules()
    groups: dict[str, list[str]] = {}
    for name in found:
        package = name if any(other.startswith(f"{name}.") for other in found) else name.rpartition(".")[0]
        groups.setdefault(package, []).append(name)
        options = ["   :members:", "   :show-inheritance:", "   :ignore-module-all:"]
        title = f"{name}\n{'=' * len(name)}\n"
        # Checks speak of wrong and right answers.
        unfound = [":nosearch:", ""] if name.startswith("minivlm.checks.") else []
        page = "\n".join([*unfound, title, f".. automodule:: {name}", *options, ""])
        (folder / f"{name}.rst").write_text(page, encoding="utf-8")
    lines = ["# Reference", "", "Every module, as its docstrings describe it, with its source.", ""]
    for package, names in groups.items():
        lines += [f"## {package}", "", "```{toctree}", ":hidden:", "", *names, "```", ""]
        lines += [f"- [{name}]({name}.rst): {found[name]}" for name in names]
        lines.append("")
    (folder / "index.md").write_text("\n".join(lines), encoding="utf-8")


def write_answers(source: Path) -> None:
    """answers.txt: the sample pictures with questions, and what the shipped model says and points at."""
    import torch

    from minivlm.cli.pictures import draw_answers
    from minivlm.models.load import load_answering
    from minivlm.processing import load_picture, to_rgb
    from minivlm.world.demo import read_samples

    torch.set_num_threads(1)  # the same answers as in the notebooks, to the last bit
    model, processor = load_answering()
    folder = source / "answers"
    folder.mkdir()
    lines = ["::::{container} answers", ""]
    for path, prompts in read_samples(ROOT / "figures" / "samples").items():
        picture = to_rgb(load_picture(path))
        inputs: dict[str, Any] = processor([picture] * len(prompts), prompts)
        answers = processor.decode(model.generate(**inputs))
        draw_answers(picture, answers).save(folder / path.name)
        lines += [":::{container} answer", "", f"![{answers[0]}](answers/{path.name})", ""]
        for prompt, answer in zip(prompts, answers, strict=True):
            shown = f"`{answer}`" if "<" in answer else answer  # <loc0256> is a word, and no HTML
            lines += [f"`{prompt}`", f": {shown}", ""]
        lines += [":::", ""]
    lines.append("::::")
    (source / "answers.txt").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
