"""How a layout is read: the name of a tensor in a file, its name here, and back.

A layout is a list of rows: how a name begins in the file, and how it begins in our modules. The first row
that matches is used, in both directions, so more specific rows come first. Signs in a row:

    *           a layer number
    {q,k,v}     on our side: the file has these tensors in one, each below the one before it
    {q,k,v|16}  the same in sixteen rounds, as of heads: a sixteenth of each, then the next of each
    ^T          on our side, after a whole name: the file has the transpose
    [0]         the same: the file has it as the only one of a batch
    UNUSED      on our side: tensors that a published file holds and its own program never reads
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Layout = list[tuple[str, str]]
TRANSPOSED, BATCHED = "^T", "[0]"
UNUSED = "-"


def to_ours(name: str, layout: Layout) -> str | None:
    """Our name for a tensor in a file, or None if no row of the layout matches; signs are for `split`.

    >>> to_ours("language_model.model.norm.weight", PALIGEMMA_LAYOUTS["hub"])
    'language_model.norm.weight'
    >>> to_ours("transformer.resblocks.3.attn.in_proj_bias", CLIP_LAYOUTS["open_clip"])
    'text_model.layers.3.self_attn.{q,k,v}_proj.bias'
    """
    return _rename(name, layout)


def to_file(name: str, layout: Layout) -> str:
    """The other way around. Raises KeyError if no row of the layout matches."""
    renamed = _rename(name, [(ours, file) for file, ours in layout])
    if renamed is None:
        raise KeyError(f"no row of the layout matches {name!r}")
    return renamed


def _rename(name: str, rows: Layout) -> str | None:
    for old, new in rows:
        match = re.match(_pattern(old), name)
        if match:
            return new.replace("*", match[1] if match.groups() else "*") + name[match.end() :]
    return None


def _without_signs(row: str) -> str:
    return row.removesuffix(TRANSPOSED).removesuffix(BATCHED)


def _pattern(row: str) -> str:
    """What a name has to begin with."""
    whole = _without_signs(row)
    pattern = re.escape(whole).replace(r"\*", r"(\d+)")
    for choice in re.findall(r"\{.+?\}", whole):
        names, _ = _choices(choice[1:-1])
        pattern = pattern.replace(re.escape(choice), f"(?:{'|'.join(names)})")
    return pattern


def _choices(inside: str) -> tuple[list[str], int]:
    """What stands between braces: names, and in how many rounds their tensors are packed."""
    names, _, rounds = inside.partition("|")
    return names.split(","), int(rounds or 1)


def names_in(ours: str) -> list[str]:
    """What `to_ours` returned as the names of single tensors: "a.{q,k}.b" is a.q.b and a.k.b."""
    before, brace, rest = _without_signs(ours).partition("{")
    if not brace:
        return [before]
    choices, _, after = rest.partition("}")
    return [before + choice + after for choice in _choices(choices)[0]]


def _rounds(ours: str) -> int:
    """In how many rounds the tensors of a name are packed."""
    _, _, rest = ours.partition("{")
    return _choices(rest.partition("}")[0])[1]


def split(tensor: Tensor, ours: str) -> list[Tensor]:
    """A tensor of a file -> those of `names_in(ours)`.

    They share its memory unless they are transposed or packed in several rounds.
    """
    plain = tensor.mT.contiguous() if ours.endswith(TRANSPOSED) else tensor
    plain = plain[0] if ours.endswith(BATCHED) else plain
    parts, rounds = len(names_in(ours)), _rounds(ours)
    if parts == 1:
        return [plain]
    if rounds == 1:
        return list(plain.tensor_split(parts))
    return list(plain.unflatten(0, (rounds, parts, -1)).transpose(0, 1).flatten(1, 2))


def join(tensors: Sequence[Tensor], ours: str) -> Tensor:
    """The other way around."""
    rounds = _rounds(ours)
    if rounds > 1:
        return torch.stack([tensor.unflatten(0, (rounds, -1)) for tensor in tensors], dim=1).flatten(0, 2)
    joined = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
    joined = joined[None] if ours.endswith(BATCHED) else joined
    return joined.mT if ours.endswith(TRANSPOSED) else joined


def as_in_file(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """A state_dict with the names and shapes of a file. Raises KeyError: as `to_file`."""
    tensors: dict[str, Tensor] = {}
    for name in state:
        file = to_file(name, layout)
        if file not in tensors:
            ours = to_ours(file, layout)
            assert ours is not None
            tensors[file] = join([state[part] for part in names_in(ours)], ours)
    return tensors
