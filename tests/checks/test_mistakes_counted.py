"""Every check is tried against ten plausible wrong answers, and tells at least two mistakes apart by name.

The wrong answers and what the checks say about them are in test_checks_*.py. Here they are counted: each is
given to its check once more, and a hint counts if it names a mistake. "Your code stops with" and the message
about a blank do not count, since every check has them, and neither does what `expect_tensor` says about any
tensor. That a tensor is off by so much is what no wrong answer should get.
"""

from __future__ import annotations

import importlib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minivlm import checks
from minivlm.checks import NotYet
from minivlm.classroom.notebooks import exercises_of

MODULES = sorted(
    path.stem.removeprefix("test_checks_") for path in Path(__file__).parent.glob("test_checks_*.py")
)
OF_ALL = re.compile(
    r"your code stops with|your function returns nothing|the exercise is still blank|"
    r".* should be a tensor|.* has shape \[.*\], expected|.* has the right shape, but is off by up to"
)
OFF_BY = re.compile(r"has the right shape, but is off by up to [\d.e+-]+$")


def wrong_answers(module: Any) -> Iterator[tuple[Callable[..., None], dict[str, Any]]]:
    """The tests of a module that take an `answer`, with each set of their arguments."""
    for test in vars(module).values():
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        names = [
            m.args[0].replace(" ", "").split(",") if isinstance(m.args[0], str) else m.args[0] for m in marks
        ]
        if "answer" not in itertools.chain(*names):
            continue
        (mark,), (arguments,) = marks, names
        for values in mark.args[1]:
            yield test, dict(zip(arguments, getattr(values, "values", values), strict=True))


@pytest.mark.parametrize("name", MODULES)
def test_each_check_meets_ten_wrong_answers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hints: dict[str, set[str]] = defaultdict(set)
    tried: Counter[str] = Counter()
    unnamed: list[str] = []

    def recorded(exercise: str, check: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                check(*args, **kwargs)
            except NotYet as hint:
                tried[exercise] += 1
                unnamed.extend([f"{exercise}: {hint}"] if OFF_BY.search(str(hint)) else [])
                if not OF_ALL.match(str(hint)):
                    hints[exercise].add(str(hint))
                raise

        return run

    module = getattr(checks, name)
    for exercise in exercises_of(name):
        monkeypatch.setattr(module, exercise, recorded(exercise, getattr(module, exercise)))
    for test, arguments in wrong_answers(importlib.import_module(f"test_checks_{name}")):
        test(**arguments)
    assert not unnamed
    assert not {exercise: tried[exercise] for exercise in exercises_of(name) if tried[exercise] < 10}
    assert not {exercise: hints[exercise] for exercise in exercises_of(name) if len(hints[exercise]) < 2}


def test_every_notebooks_checks_are_tested() -> None:
    assert {path.stem for path in Path(checks.__file__).parent.glob("[a-z]*.py")} == set(MODULES)
