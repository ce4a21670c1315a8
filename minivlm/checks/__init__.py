"""Checks for the exercises: they say what is wrong, not only that something is.

There is one module per notebook: `checks.patches` for 01_patches, and so on. Each exercise has a check
function of the same name, which takes what the reader wrote and prints "Right: ..." or raises `NotYet` with
the likely mistake. It also has a reference solution in `solutions`, which the notebook's catch-up cell uses.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

STILL_BLANK = "the exercise is still blank: replace the line that raises with your own"


def __getattr__(name: str) -> Any:
    """Import the module of a notebook when it is first used: `checks.patches`."""
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        raise AttributeError(f"there are no checks called {name!r}") from error


class NotYet(AssertionError):
    """An exercise's answer is not right yet. The message names the likely mistake."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows instead of a traceback: only the hint, not the code of the check."""
        return [f"Not yet: {self}"]


class Functions(TorchFunctionMode):
    """Remembers the names of all functions of PyTorch that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))

    def saw(self, *parts: str) -> bool:
        """Whether any of these is part of a name."""
        return any(part in name for name in self.names for part in parts)


def right(message: str) -> None:
    """Tell the reader that the exercise is solved, and what that shows."""
    print(f"Right: {message}")


def expect(condition: bool, hint: str) -> None:
    """Raise NotYet with the hint unless the condition holds."""
    if not condition:
        raise NotYet(hint)


def call(answer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run the reader's function. Raises NotYet if it is blank, stops with an error, or returns nothing."""
    try:
        result = answer(*args, **kwargs)
    except Exception as error:
        # PyTorch raises NotImplementedError as well, with other words than a blank.
        if isinstance(error, NotImplementedError) and (not str(error) or "your turn" in str(error)):
            raise NotYet(STILL_BLANK) from None
        raise NotYet(f"your code stops with {type(error).__name__}: {error}") from error
    if result is None:
        raise NotYet("your function returns nothing: is a `return` missing?")
    return result


def expect_tensor(result: Any, reference: Tensor, what: str = "the result", tolerance: float = 1e-5) -> None:
    """Compare type, shape, and values with the reference, in this order."""
    expect(isinstance(result, Tensor), f"{what} should be a tensor, but it is a {type(result).__name__}")
    expect(
        tuple(result.shape) == tuple(reference.shape),
        f"{what} has shape {list(result.shape)}, expected {list(reference.shape)}",
    )
    difference = (result.double() - reference.double()).abs().max().item()
    limit = tolerance * max(1.0, reference.double().abs().max().item())
    expect(difference <= limit, f"{what} has the right shape, but is off by up to {difference:.4g}")


def same(result: Any, reference: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether a result equals a tensor; used to recognize known mistakes."""
    return (
        isinstance(result, Tensor)
        and result.shape == reference.shape
        and torch.allclose(result.double(), reference.double(), atol=tolerance, rtol=tolerance)
    )


def expect_faults(
    said: Mapping[str, Any],
    signs: Mapping[str, str],
    patient: str,
    patients: str,
    otherwise: str = "that is not so",
) -> None:
    """Compare what a reader says about patients with their faults.

    Args:
        said: for each fault, by its name, the name that the reader gives it.
        signs: how each fault shows, as "the weights would add up to 1".
        patient: what is broken, as "router"; and several of them.
        otherwise: what a wrong name means for the patient.
    """
    for guess in said.values():
        expect(guess in said, f"you answer {guess!r}: return one of the five names, {', '.join(said)}")
    only = next(iter(said.values()))
    expect(
        len(set(said.values())) > 1,
        f"you answer {only!r} for all five {patients}. With this fault, {signs[only]}: measure that",
    )
    for fault, guess in said.items():
        expect(
            guess == fault,
            f"for a {patient} with another fault you answer {guess!r}. With {guess!r}, {signs[guess]}. "
            f"In this {patient} {otherwise}",
        )
