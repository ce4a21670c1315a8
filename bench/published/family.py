"""What a family of published folders is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minivlm.checkpoints.layouts import Layout


class Family(NamedTuple):
    """Folders of one system."""

    model: type[Any]
    layout: Layout
    ones: tuple[str, ...]  # how the names of tensors end whose numbers are around 1
    write_processor: Callable[[Any, Path], None]  # the processor's files for a config
    config_json: Callable[[Any], dict[str, Any]]  # what the published config.json says, and no more
    # Tensors that the published files hold and no program reads: names and shapes for a config.
    unread: Callable[[Any], dict[str, tuple[int, ...]]] = lambda config: {}
    generation: bool = True  # whether its folders have a generation_config.json


def without(values: Mapping[str, Any], known: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A config without those of the named values that a reader has to know."""
    return {key: value for key, value in values.items() if key not in names or value != known[key]}
