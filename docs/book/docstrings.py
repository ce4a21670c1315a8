"""Docstrings of the package, which are plain text, as the reStructuredText that Sphinx reads.

In the sources a docstring is read as it stands: `code` between backticks, shapes in brackets, drawings of
masks, Google's sections (Args, Returns, Raises). Nothing in it is written for a tool. What a tool needs is
added here: escapes, literal blocks around drawings, links where a name is one of the package.
"""

from __future__ import annotations

import re
from collections.abc import Callable

SECTION = re.compile(r"(Args|Returns|Raises|Yields|Example|Examples|Note):$")
RAISES = re.compile(r"Raises (\w+): (.*)")
ITEM = re.compile(r"(-|\d+\.) ")
CODE = re.compile(r"`([^`]+)`", re.DOTALL)
EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})(?=\S)([^*]+?)(?<=\S)\1(?![\w*])")
SPECIAL = re.compile(r"[\\*|]|_(?!\w)")


def to_restructuredtext(lines: list[str], link: Callable[[str], str | None] = lambda name: None) -> list[str]:
    """A docstring as reStructuredText with Google's sections.

    Args:
        lines: of the docstring, without the indentation of the source.
        link: the full name of what a piece of code names, or None.
    """
    result: list[str] = []
    in_section = False
    for paragraph in _paragraphs(lines):
        indented = paragraph[0].startswith(" ")
        if in_section and indented:
            result += _inline(paragraph, link)
        elif paragraph[0] == "Returns:":  # as a field, in which napoleon looks for no type before a colon
            in_section = True
            first, *others = _inline(paragraph[1:], link)
            result += [f":returns: {first.strip()}", *others]
        elif SECTION.match(paragraph[0]):
            in_section = True
            result += [paragraph[0], *_inline(paragraph[1:], link)]
        elif paragraph[0].startswith(">>>"):
            in_section = False
            result += paragraph
        elif indented or _is_drawing(paragraph):
            in_section = False
            result += ["::", "", *(line if indented else f"    {line}" for line in paragraph)]
        else:
            in_section = False
            result += _inline(paragraph, link)
        result.append("")
    return result


def _paragraphs(lines: list[str]) -> list[list[str]]:
    """Lines between empty ones. Lists, "Raises ..." and sections begin a paragraph of their own."""
    found: list[list[str]] = [[]]
    for line in lines:
        last = found[-1]
        begins = ITEM.match(line) and last and not (ITEM.match(last[0]) or last[0].startswith(">>>"))
        raises = RAISES.match(line)
        if not line.strip() or begins or raises or SECTION.match(line):
            found.append([])
        if raises:  # one line of prose becomes a section; lines that go on below are indented too
            found[-1] += ["Raises:", f"    {raises[1]}: {raises[2]}"]
        elif line.strip():
            goes_on = found[-1][:1] == ["Raises:"] and not line.startswith(" ")
            found[-1].append(f"        {line}" if goes_on else line)
    return [paragraph for paragraph in found if paragraph]


def _is_drawing(paragraph: list[str]) -> bool:
    """Several lines without a word, which are rows of a mask, or with lines and boxes drawn in characters."""
    drawn = any(re.search("[─-╿▲▶▼◀]", line) for line in paragraph)
    return len(paragraph) > 1 and (drawn or not any(re.search(r"[^\W\d_]{2}", line) for line in paragraph))


def _inline(paragraph: list[str], link: Callable[[str], str | None]) -> list[str]:
    """Code as literals or links, and everything else that has a meaning in reStructuredText escaped."""
    pieces = CODE.split("\n".join(paragraph))
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            pieces[number] = _escape(piece)
        else:
            before = pieces[number - 1][-1:]
            after = pieces[number + 1][:1]
            target = link(piece)
            code = f":py:obj:`{piece} <{target}>`" if target else f"``{piece}``"
            # Markup ends and begins at a space or a sign; a backslash and a space stand for nothing.
            pieces[number] = (r"\ " if before.isalnum() else "") + code + (r"\ " if after.isalnum() else "")
    return "".join(pieces).split("\n")


def _escape(text: str) -> str:
    kept: list[str] = []
    position = 0
    for match in EMPHASIS.finditer(text):
        kept += [SPECIAL.sub(r"\\\g<0>", text[position : match.start()]), match.group()]
        position = match.end()
    return "".join([*kept, SPECIAL.sub(r"\\\g<0>", text[position:])])
