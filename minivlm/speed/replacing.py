"""How a loaded model is sped up: a module is replaced by another one that computes the same, faster.

The new module takes over everything that the old one holds (weights, names and settings) and only its forward
differs. So a model's own file contains its formula and nothing else, and a fast model is saved exactly like a
plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)


def replaced(module: nn.Module, kind: type[Kind]) -> Kind:
    """A module of class `kind` with everything that `module` holds. Do not use `module` afterwards."""
    new = kind.__new__(kind)
    new.__dict__ = module.__dict__
    return new


def replace_modules(model: nn.Module, kinds: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Replace every module of exactly these classes inside a model with its subclass."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in kinds:
                setattr(parent, name, replaced(child, kinds[type(child)]))


def replace_linear_layers(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every linear layer inside a model with what is made of it, one at a time."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, make(child))
