"""The capstone of 06_merging with mistakes on purpose, to tell a reader which one theirs is.

`program` is the whole decoder in plain functions. Each fault changes it in one place; if the logits of a
reader's program equal those of a fault, or of two together, that is what went wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

# What a program may get wrong before the first token of the answer, and what to say.
FAULTS = {
    "words": "the prompt's words are not multiplied by sqrt(hidden_size)",
    "features": "the image features are multiplied by sqrt(hidden_size) as well: only words are",
    "order": "the prompt stands before the picture: image features come first",
    "weight": "your norm multiplies by w: in Gemma's files the factor is 1 + w",
    "mean": "your norm subtracts the mean, as LayerNorm does: RMSNorm only divides by the root mean square",
    "last norm": "the norm after the last block (model.norm) is missing",
    "backward": "the rotation turns the other way: (a, b) becomes (a cos - b sin, b cos + a sin)",
    "pairs": "the rotation pairs neighbors: here the partner of element i is element i + Dh / 2",
    "unrotated": "queries and keys are not rotated",
    "values": "the values are rotated, too: only queries and keys are",
    "causal": "the prefix is read with a causal mask: picture and prompt see each other in both directions",
    "no scale": "the scores are not multiplied by Dh ** -0.5",
    "wide scale": "the scores are multiplied by D ** -0.5, but the length of a query is that of a head: Dh",
    "exact": "your GELU is the exact form: Gemma's is the tanh form, F.gelu(x, approximate='tanh')",
    "silu": "your gate goes through SiLU, as in Llama: Gemma's goes through GELU in the tanh form",
    "up": "gate_proj and up_proj are swapped: the activation goes on gate_proj",
    "heads": "the heads are cut out of the vector the wrong way: [T, H * Dh] is H runs of Dh numbers each",
    "residual": "a residual path is missing: x = x + attention(norm(x)), then x = x + mlp(norm(x))",
    "first": "the logits are those of the first position: the last one, the newline's, names the first word",
}
LATE_FAULTS = {
    "late words": "the words of the answer are not multiplied by sqrt(hidden_size), those of the prompt are",
    "restart": "the answer's positions begin at 0 again: they go on where the prefix ended",
    "stuck": "every word of the answer has the same position: it grows by one with each token",
    "skip": "the first word of the answer leaves a position out: after S tokens comes position S",
    "forgotten": "the cache does not grow: store the keys and values of the answer's words as well",
    "alone": "the words of the answer see only each other: the cache must hold the prefix, too",
    "empty": "the cache is never written: each word of the answer sees itself only, and has position 0",
}


def program(
    folder: Path, features: Tensor, prompt: Tensor, answer: list[int], faults: frozenset[str] = frozenset()
) -> Tensor:
    """Logits [n, V] for the tokens of a given answer, with faults by purpose; without any, the model's."""
    if "empty" in faults:
        faults |= {"alone", "forgotten", "restart", "stuck"}
    config = json.loads((folder / "config.json").read_text())["text_config"]
    weights = {
        name.removeprefix("language_model.model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    D, Dh = config["hidden_size"], config["head_dim"]
    scale = 1.0 if "no scale" in faults else D**-0.5 if "wide scale" in faults else Dh**-0.5
    table = weights["embed_tokens.weight"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if "mean" in faults else x
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["rms_norm_eps"])
        return x * (weights[name] + (0 if "weight" in faults else 1))

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        if "unrotated" in faults:
            return x
        angles = positions[:, None] * config["rope_theta"] ** -(torch.arange(0, Dh, 2) / Dh)
        cos, sin = angles.cos(), angles.sin() * (-1 if "backward" in faults else 1)
        if "pairs" in faults:
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def heads(x: Tensor) -> Tensor:
        return x.view(-1, len(x), Dh) if "heads" in faults else x.unflatten(1, (-1, Dh)).transpose(0, 1)

    def gated(y: Tensor, at: str) -> Tensor:
        gate, up = (y @ weights[f"{at}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        gate, up = (up, gate) if "up" in faults else (gate, up)
        gelu = F.gelu(gate, approximate="none" if "exact" in faults else "tanh")
        gate = F.silu(gate) if "silu" in faults else gelu
        return (gate * up) @ weights[f"{at}.mlp.down_proj.weight"].T

    cache: dict[str, tuple[Tensor, Tensor]] = {}

    def read(x: Tensor, positions: Tensor, late: bool) -> Tensor:
        for number in range(config["num_hidden_layers"]):
            at = f"layers.{number}"
            y = norm(x, f"{at}.input_layernorm.weight")
            q, k, v = (heads(y @ weights[f"{at}.self_attn.{name}_proj.weight"].T) for name in "qkv")
            k = rotate(k, positions)
            v = rotate(v, positions) if "values" in faults else v
            if late and not ("alone" in faults and at not in cache):
                k, v = (torch.cat([old, new], dim=1) for old, new in zip(cache[at], (k, v), strict=True))
            if not (late and "forgotten" in faults) and not (not late and "alone" in faults):
                cache[at] = k, v
            scores = rotate(q, positions) @ k.mT * scale
            if "causal" in faults and not late:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            seen = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
            kept = 0 if "residual" in faults else x
            x = kept + seen @ weights[f"{at}.self_attn.o_proj.weight"].T
            x = x + gated(norm(x, f"{at}.post_attention_layernorm.weight"), at)
        x = x[0] if "first" in faults and not late else x[-1]
        return (x if "last norm" in faults else norm(x, "norm.weight")) @ table.T

    words = table[prompt] * (1 if "words" in faults else D**0.5)
    parts = [features * (D**0.5 if "features" in faults else 1), words]
    x = torch.cat(parts[::-1] if "order" in faults else parts)
    logits = [read(x, torch.arange(len(x)), False)]
    for number, token in enumerate(answer[:-1]):
        place = 0 if "stuck" in faults else number
        place += 0 if "restart" in faults else len(x) + ("skip" in faults)
        word = table[token][None] * (1 if {"late words", "words"} & faults else D**0.5)
        logits.append(read(word, torch.tensor([place]), True))
    return torch.stack(logits)


def matches(logits: Tensor, reference: Tensor) -> bool:
    """Equal up to rounding (about 1e-6); the two forms of GELU are some 5e-5 apart."""
    return bool((logits - reference).abs().max() <= 1e-5 * reference.abs().max())


def _one_or_two(faults: dict[str, str]) -> Iterator[tuple[str, ...]]:
    return chain(combinations(faults, 1), combinations(faults, 2))


def say_the_fault(folder: Path, features: Tensor, prompt: Tensor, tokens: list[int], logits: Tensor) -> str:
    """Which known mistake, or which two, give these logits."""
    first = program(folder, features, prompt, tokens[:1])
    if matches(logits[:1], first):
        for faults in _one_or_two(LATE_FAULTS):
            if matches(logits[:3], program(folder, features, prompt, tokens[:3], frozenset(faults))):
                hints = "; and ".join(LATE_FAULTS[fault] for fault in faults)
                return f"the first word is right, and the next are not: {hints}"
        return (
            "the first word is right, and the next are not: print what the second step reads, its position "
            "and the number of keys in the cache (N + T + 1)"
        )
    for faults in _one_or_two(FAULTS):
        if matches(logits[:1], program(folder, features, prompt, tokens[:1], frozenset(faults))):
            return "; and ".join(FAULTS[fault] for fault in faults)
    return (
        "the logits of the first step differ, and by no mistake that this check knows: compare with the "
        "package part by part, model.language_model.embed, then the output of model.language_model.layers[0]"
    )
