"""How speed is put on a loaded model: a module gives way to another one that computes the same, faster.

The new module takes over everything that the old one holds, weights, names and settings, and brings only a
forward of its own. A model's own file therefore holds its formula and nothing else, and what is saved from a
fast model is what would be saved from a plain one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)


def replaced(module: nn.Module, kind: type[Kind]) -> Kind:
    """A module of another class with everything that `module` holds, which should no longer be used."""
    new = kind.__new__(kind)
    new.__dict__ = module.__dict__
    return new


def replace_modules(model: nn.Module, kinds: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Put a subclass in place of every module of exactly these classes, inside a model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in kinds:
                setattr(parent, name, replaced(child, kinds[type(child)]))
