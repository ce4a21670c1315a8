"""Checks for the exercises of 20_llama_vision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import additive
from minivlm.checks import NotYet, call, expect, expect_faults, right, same
from minivlm.models.llama_vision import LlamaVision, LlamaVisionConfig
from minivlm.models.pictures_in_rows import pictures_in_view
from minivlm.processing.canvases import Canvas, choose_canvas, size_on_canvas
from minivlm.text.llama_vision import CrossAttentionBlock, LlamaVisionTextConfig
from minivlm.vision.llama_vision import MULTIPLE, GatedTileBlock, LlamaVisionTower, LlamaVisionTowerConfig

FAULTS = ("blocks", "one late", "positions", "padding", "gates")
STD, GATE = 0.2, 0.8

Size = tuple[int, int]
Placed = tuple[Canvas, Size]
Sizes = tuple[int, int, int, int]  # width, height, side of a tile, most tiles


class solutions:
    """Reference solutions."""

    @staticmethod
    def what_changes() -> dict[str, str]:
        """A text skips the new layers; a closed gate shuts out the picture; words look back, not ahead."""
        return {
            "no picture, open gates": "same",
            "a picture, closed gates": "same",
            "a picture, MLP gates open": "different",
            "another picture, MLP gates open": "same",
            "another picture, all gates open": "different",
            "words before the picture": "same",
        }

    @staticmethod
    def place(width: int, height: int, side: int, max_tiles: int) -> Placed:
        """Least enlarged, or else least reduced; then the smaller canvas; enlarged to one tile at most."""
        numbers = range(1, max_tiles + 1)
        canvases = [(r, c) for r in numbers for c in numbers if r * c <= max_tiles]
        scales = {(r, c): min(c * side / width, r * side / height) for r, c in canvases}
        enlarged = [scale for scale in scales.values() if scale >= 1]
        best = min(enlarged) if enlarged else max(scales.values())
        rows, columns = min((canvas for canvas in canvases if scales[canvas] == best), key=math.prod)
        scale = min(best, max(1.0, min(side / width, side / height)))
        return (rows, columns), (round(width * scale), round(height * scale))

    @staticmethod
    def states_of(features: Tensor, width: int) -> list[Tensor]:
        """The first D numbers, then every k-th of the others."""
        early = features[..., width:].unflatten(-1, (width, -1))  # channel by channel
        return [features[..., :width], *early.unbind(-1)]

    @staticmethod
    def diagnose(patient: Callable[..., Tensor], intact: Any) -> str:
        """Which state is the first that differs says where to look."""
        config = intact.config
        size = config.max_num_tiles, config.num_channels, config.image_size, config.image_size
        tiles = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
        theirs, good = (tower(tiles, torch.tensor([4])) for tower in (patient, intact))
        states, goods = (solutions.states_of(x, config.hidden_size) for x in (theirs, good))
        last, *early = (torch.allclose(a, b, atol=1e-3) for a, b in zip(states, goods, strict=True))
        if last:
            return (
                "blocks"
                if torch.allclose(theirs.sort().values, good.sort().values, atol=1e-3)
                else "one late"
            )
        if not early[0]:
            return "positions"
        return "gates" if all(early) else "padding"

    @staticmethod
    def who_sees(is_image: Tensor) -> Tensor:
        """A picture belongs to its run; a word sees the run that began last, as far as it has come."""
        follows = F.pad(is_image[:-1], (1, 0))
        run = (is_image & ~follows).cumsum(dim=0)  # [T]
        shown = is_image.cumsum(dim=0)
        numbers = torch.arange(int(is_image.sum()))
        return (run[:, None] == run[is_image]) & (numbers < shown[:, None])


# ---- small models ------------------------------------------------------------------------------------------


def strong_weights(module: nn.Module, seed: int = 0, gate: float = GATE) -> None:
    """Random weights that are large enough for every part to count; all gates get one value."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        weight.data = STD * torch.randn(weight.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weight.data += 1
        if "gate" in name and weight.numel() == 1:
            weight.data.fill_(gate)


def small_config() -> LlamaVisionConfig:
    """Everything that the published model has, in small: tiles of 4 x 4 patches, 2 of 10 layers that look."""
    return LlamaVisionConfig(
        vision=LlamaVisionTowerConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=8,
            num_global_layers=2,
            attention_heads=4,
            image_size=56,
            intermediate_layers_indices=(0, 2, 4, 5, 6),
        ),
        text=LlamaVisionTextConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=10,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=100,
            cross_attention_layers=(3, 8),
        ),
        image_token_id=100,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def small_model(seed: int = 0) -> LlamaVision:
    """Of `small_config`, with strong random weights."""
    with torch.random.fork_rng([]):
        model = LlamaVision(small_config()).eval()
    strong_weights(model, seed)
    return model.requires_grad_(False)


def set_gates(model: LlamaVision, attention: float, mlp: float) -> None:
    """The same two values in every layer that looks."""
    for layer in model.language_model.layers:
        if isinstance(layer, CrossAttentionBlock):
            layer.cross_attn_attn_gate.data.fill_(attention)
            layer.cross_attn_mlp_gate.data.fill_(mlp)


# ---- exercise: what changes --------------------------------------------------------------------------------

_REASONS = {
    "no picture, open gates": "a row without a picture skips the new layers, so their gates do not matter",
    "a picture, closed gates": "tanh(0) is 0, so each new layer adds 0 times what it has found",
    "a picture, MLP gates open": "the MLP of a new layer needs no picture to add something; it runs "
    "wherever a word sees one",
    "another picture, MLP gates open": "a picture enters through the attention alone, and its gate is "
    "closed: the MLP reads the words",
    "another picture, all gates open": "now what the words find is added",
    "words before the picture": "they see no picture, and of the row they see only earlier words",
}


@torch.no_grad()
def _measured() -> dict[str, str]:
    """The same six comparisons on a small model."""
    model = small_model(seed=2)
    row = torch.tensor([[5, 6, 7, 100, 8, 9, 10]])
    one, other = torch.randn(2, 1, 4, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    number = torch.tensor([8])

    def logits(pixels: Tensor | None, attention: float, mlp: float) -> Tensor:
        set_gates(model, attention, mlp)
        words = row if pixels is not None else row.masked_fill(row == 100, 11)
        ids = None if pixels is None else number
        scores: Tensor = model(words, pixels, aspect_ratio_ids=ids).logits
        return scores

    def llama(words: Tensor) -> Tensor:
        """The row's words without the new layers, though one of them is `<|image|>`."""
        decoder, places = model.language_model, torch.arange(words.shape[1])[None]
        mask = torch.ones(1, 1, words.shape[1], words.shape[1], dtype=torch.bool).tril()
        return decoder.logits(decoder(decoder.embed(words), places, mask))

    def verdict(a: Tensor, b: Tensor) -> str:
        return "same" if torch.equal(a, b) else "different"

    shown, other_shown = logits(one, GATE, GATE), logits(other, GATE, GATE)
    return {
        "no picture, open gates": verdict(logits(None, GATE, GATE), llama(row.masked_fill(row == 100, 11))),
        "a picture, closed gates": verdict(logits(one, 0, 0), llama(row)),
        "a picture, MLP gates open": verdict(logits(one, 0, GATE), llama(row)),
        "another picture, MLP gates open": verdict(logits(one, 0, GATE), logits(other, 0, GATE)),
        "another picture, all gates open": verdict(shown, other_shown),
        "words before the picture": verdict(shown[:, :3], other_shown[:, :3]),
    }


def what_changes(answer: Callable[..., Any]) -> None:
    """Every prediction against a small model."""
    result = call(answer)
    expect(isinstance(result, dict), f"return the dict of your predictions, not a {type(result).__name__}")
    missing = [name for name in _REASONS if name not in result]
    expect(not missing, f"no prediction yet for: {', '.join(missing)}")
    odd = [value for value in result.values() if value not in ("same", "different")]
    expect(not odd, f'you say {odd[0] if odd else ""!r}: predict "same" or "different"')
    measured = _measured()
    wrong = [
        f"{name}: you say {result[name]}, but it is {measured[name]}, since {reason}"
        for name, reason in _REASONS.items()
        if result[name] != measured[name]
    ]
    expect(not wrong, "\n".join(wrong))
    right("a text never meets the new layers, and a picture enters through one gate only.")


# ---- exercise: the canvas ----------------------------------------------------------------------------------

_SIZES = (  # width, height, side of a tile, most tiles
    (1000, 400, 448, 4),  # enlarged on two canvases, and least on 1 x 3
    (1600, 640, 560, 4),  # fits on none: 1 x 3 and 1 x 4 reduce it alike
    (640, 1600, 560, 4),
    (561, 561, 560, 4),  # one pixel too many for a tile
    (600, 300, 560, 4),  # 1 x 2 and 2 x 2 enlarge it alike
    (300, 600, 560, 4),
    (200, 100, 560, 4),  # small: enlarged to one tile
    (4000, 3000, 560, 4),
    (560, 560, 560, 4),
    (2800, 500, 560, 6),  # 1 x 5 fits exactly
    (3000, 3000, 448, 9),
    (900, 100, 448, 1),
)


def _canvases(max_tiles: int) -> list[Canvas]:
    numbers = range(1, max_tiles + 1)
    return [(r, c) for r in numbers for c in numbers if r * c <= max_tiles]


def _scale(canvas: Canvas, width: int, height: int, side: int) -> float:
    return min(canvas[1] * side / width, canvas[0] * side / height)


def _expect_canvas(found: Canvas, good: Canvas, case: str, sizes: Sizes) -> None:
    """Raise NotYet with the likely mistake unless this is the canvas."""
    width, height, side, most = sizes
    canvases = _canvases(most)

    def scale(canvas: Canvas) -> float:
        return _scale(canvas, width, height, side)

    expect(found == good or found[::-1] != good, f"{case} rows and columns are exchanged: rows come first")
    expect(
        math.prod(found) <= most,
        f"{case} you take {found[0]} x {found[1]}, more than {most} tiles: rows times columns counts",
    )
    if found == good:
        return
    fits, fit = scale(found), scale(good)
    if fit == fits:
        raise NotYet(
            f"{case} {found[0]} x {found[1]} and {good[0]} x {good[1]} give the picture the same scale: take "
            "the canvas with fewer tiles, since the rest of the other would be black"
        )
    if fit >= 1:
        expect(
            fits >= 1,
            f"{case} a canvas holds the picture without reducing it: {good[0]} x {good[1]}. On yours, "
            f"{found[0]} x {found[1]}, it would lose pixels",
        )
        raise NotYet(
            f"{case} several canvases hold the picture, and yours, {found[0]} x {found[1]}, is not the one "
            "on which it would be enlarged least"
        )
    cover = max(canvases, key=lambda canvas: max(canvas[1] * side / width, canvas[0] * side / height))
    expect(
        found != cover,
        f"{case} the picture has to fit in both directions: its scale is the smaller of two ratios",
    )
    raise NotYet(
        f"{case} no canvas holds the picture, so take the one that reduces it least: {good[0]} x {good[1]}, "
        f"not {found[0]} x {found[1]}"
    )


def _expect_size(found: Size, good: Size, canvas: Canvas, case: str, sizes: Sizes) -> None:
    width, height, side, _ = sizes
    rows, columns = canvas
    scale = _scale(canvas, width, height, side)

    def near(size: tuple[float, float]) -> bool:
        """Rounded in any way."""
        return all(abs(a - b) <= 1 for a, b in zip(found, size, strict=True))

    if near(good):
        return
    expect(
        scale >= 1 or not near((width, height)),
        f"the canvas is right, but not the size: {case} the picture is larger than its canvas and has to be "
        "reduced. The scale of the canvas is the most that it gets",
    )
    in_tile = min(side / width, side / height)
    mistakes: dict[str, tuple[float, float]] = {
        "the size comes as width and height, and yours is the other way around": good[::-1],
        "the picture keeps its shape: do not stretch it over the whole canvas": (columns * side, rows * side),
        "a picture that is larger than one tile is not enlarged, even if the canvas has room": (
            width * scale,
            height * scale,
        ),
        "a picture that is smaller than one tile is enlarged until it touches the tile's edge": (
            width,
            height,
        ),
        "one tile is a measure for small pictures only. A picture that is larger is reduced by its canvas, "
        "or not at all": (width * in_tile, height * in_tile),
    }
    for hint, wrong in mistakes.items():
        expect(not near(wrong), f"the canvas is right, but not the size: {case} {hint}")
    raise NotYet(
        f"the canvas is right, but not the size: {case} the picture lies at {good[0]} x {good[1]} pixels, "
        f"and yours at {found[0]} x {found[1]}"
    )


def place(answer: Callable[..., Any]) -> None:
    """Pictures that are small, large, long, and one pixel too large."""
    for sizes in _SIZES:
        width, height, side, most = sizes
        result = call(answer, width, height, side, most)
        expect(
            isinstance(result, tuple | list)
            and len(result) == 2
            and all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in result),
            "return two pairs: (rows, columns) of the canvas, and (width, height) of the picture on it",
        )
        case = f"for {width} x {height} pixels, tiles of {side} and at most {most} of them,"
        canvas, size = (tuple(pair) for pair in result)
        good = choose_canvas(width, height, side, most)
        _expect_canvas(canvas, good, case, sizes)
        _expect_size(size, size_on_canvas(width, height, side, good), good, case, sizes)
    right("enlarged least, or reduced least; fewest tiles; and never enlarged beyond the side of one tile.")


# ---- exercise: the early states ----------------------------------------------------------------------------


def states_of(answer: Callable[..., Any]) -> None:
    """Numbers that say where they belong: state s, channel c is s + c / 100."""
    for width, early in ((8, 5), (12, 3)):
        channels = torch.arange(width) / 100
        good = [torch.full((2, 3, width), float(s)) + channels for s in range(1 + early)]
        features = torch.cat([good[0], torch.stack(good[1:], dim=-1).flatten(-2)], dim=-1)
        result = call(answer, features, width)
        expect(
            isinstance(result, list | tuple | Tensor),
            f"return a list of tensors, not a {type(result).__name__}",
        )
        case = f"of {1 + early} states with {width} channels,"
        expect(
            len(result) != early,
            f"{case} you return {early}: the last state is one of them, and comes first",
        )
        expect(
            len(result) == 1 + early,
            f"{case} you return {len(result)}: one for the end, and {early} early ones",
        )
        states = list(result)
        for number, (found, expected) in enumerate(zip(states, good, strict=True)):
            expect(
                isinstance(found, Tensor), f"state {number} should be a tensor, not a {type(found).__name__}"
            )
            expect(
                found.shape == expected.shape,
                f"{case} state {number} has shape {list(found.shape)}: expected {list(expected.shape)}, all "
                "axes but the last as they were",
            )
        rest = features[..., width:]
        mistakes: dict[str, Iterable[Tensor]] = {
            "you cut the row into pieces of D. That is right for the first piece only: the others are "
            "interleaved": features.split(width, dim=-1),
            "the first D numbers are the last state as it is, and only the others are interleaved": [
                features[..., s :: 1 + early] for s in range(1 + early)
            ],
            "the early states come in reverse: state 1 is the earliest": [good[0], *good[:0:-1]],
            "the last state comes first, and the early ones after it": [*good[1:], good[0]],
            "you begin one number too late: the first number after the last state belongs to the first early "
            "one": [good[0], *(torch.roll(rest, -1, dims=-1)[..., s::early] for s in range(early))],
        }
        for hint, wrong in mistakes.items():
            wrong = list(wrong)
            expect(not all(same(a, b) for a, b in zip(states, wrong, strict=True)), f"{case} {hint}")
        for number, (found, expected) in enumerate(zip(states, good, strict=True)):
            if not same(found, expected):
                s, c = divmod(found.flatten()[1].item() + 1e-6, 1)
                raise NotYet(
                    f"{case} the second number of your state {number} should be its channel 1, but it is "
                    f"channel {int(c * 100)} of state {int(s)}"
                )
    right("D numbers of the end, and then the early states, dealt out like cards: channel by channel.")


# ---- exercise: who sees ------------------------------------------------------------------------------------


def who_sees(answer: Callable[..., Any]) -> None:
    """Rows with runs, single pictures, and words before the first."""
    rows = ("..I.II..I..", "..I..", "I.I.I", "II.I..", ".III", "IIII", "I....")
    for text in rows:
        is_image = torch.tensor([letter == "I" for letter in text])
        result = call(answer, is_image)
        expect(isinstance(result, Tensor), f"return a tensor, not a {type(result).__name__}")
        good = pictures_in_view(is_image[None])[0]
        words, pictures = good.shape
        case = f"for the row {text} (I is a picture's token)"
        expect(
            result.shape == good.shape or result.shape != good.T.shape,
            f"{case} your mask is [pictures, words]: a line for each word",
        )
        expect(
            result.shape == good.shape,
            f"{case} your mask has shape {list(result.shape)}: expected [{words}, {pictures}]",
        )
        expect(result.dtype == torch.bool, f"return True and False, not {result.dtype}")
        if torch.equal(result, good):
            continue
        _explain(result, good, is_image, case)
    right("the last run of pictures, as far as the row has come; and before the first one, nothing.")


def _explain(found: Tensor, good: Tensor, is_image: Tensor, case: str) -> None:
    """Raise NotYet with the likely mistake."""
    shown = is_image.cumsum(dim=0)[:, None]
    numbers = torch.arange(good.shape[1])
    follows = F.pad(is_image[:-1], (1, 0))
    run = (is_image & ~follows).cumsum(dim=0)
    mistakes = {
        "each word sees one picture, as in Flamingo. Here, pictures that follow each other directly are seen "
        "together": shown == numbers + 1,
        "words go on to see all earlier pictures: a new picture, or a new run of them, replaces the last": (
            numbers < shown
        ),
        "a picture's token sees pictures of its run that come after it": run[:, None] == run[is_image],
        "a picture's own token does not see it, but it should": F.pad(good[:-1], (0, 0, 1, 0)),
        "the tokens of pictures see nothing, but they should see their own": good & ~is_image[:, None],
        "everybody sees every picture": torch.ones_like(good),
        "True and False are exchanged": ~good,
        "words look ahead: they see the picture that comes next": _next(good, is_image),
        "words before the first picture see all pictures: they should see none": good | (shown == 0),
        "words before the first picture see the first: they should see none": good
        | ((shown == 0) & (numbers == 0)),
        "only the first picture of a run is seen: all of them are": good & ~follows[is_image],
    }
    for hint, wrong in mistakes.items():
        expect(not torch.equal(found, wrong), f"{case} {hint}")
    word, picture = (int(place[0]) for place in (found != good).nonzero(as_tuple=True))
    raise NotYet(
        f"{case} word {word} {'sees' if found[word, picture] else 'does not see'} picture {picture}, counted "
        f"from 0, and {'should not' if found[word, picture] else 'should'}"
    )


def _next(good: Tensor, is_image: Tensor) -> Tensor:
    """Each word sees the picture whose token is the next in the row, its own included."""
    before = F.pad(is_image.cumsum(dim=0)[:-1], (1, 0))
    return before[:, None] == torch.arange(good.shape[1])


# ---- exercise: find the fault ------------------------------------------------------------------------------


class Patient(nn.Module):
    """A tower that is broken in one place."""

    def __init__(self, tower: LlamaVisionTower, fault: str) -> None:
        super().__init__()
        self.tower, self.fault = tower, fault

    def forward(self, pixel_values: Tensor, aspect_ratio_ids: Tensor) -> Tensor:
        """As the tower's, except for the fault."""
        tower, config, fault = self.tower, self.tower.config, self.fault
        x = tower.embeddings(pixel_values, aspect_ratio_ids)
        if fault == "positions":
            gate = tower.embeddings.position_gate.tanh()
            x = x + gate * tower.embeddings.position_embedding.weight
        x = F.pad(tower.layernorm_pre(x), (0, 0, 0, -x.shape[2] % MULTIPLE))
        tiles, n = x.shape[1:3]
        real = tower.real_tiles(aspect_ratio_ids)[..., None] & (torch.arange(n) < config.num_tokens)
        seen = real.flatten(1)
        allowed = seen[:, :, None] | seen[:, None, :]
        if fault == "padding":
            allowed = (seen[:, :, None] & seen[:, None, :]) | torch.eye(tiles * n, dtype=torch.bool)
        mask = additive(allowed[:, None], x.dtype)
        states = [x.flatten(1, 2)]
        for layer in tower.layers:
            states.append(layer(states[-1], mask))
        shift = int(fault == "one late")
        kept = [states[number + shift] for number in config.intermediate_layers_indices]
        x = tower.layernorm_post(states[-1]).unflatten(1, (tiles, n))
        x = (x + tower.post_tile_embedding(aspect_ratio_ids)).flatten(1, 2)
        for layer in tower.global_layers:
            assert isinstance(layer, GatedTileBlock)
            gates = (layer.gate_attn, layer.gate_ffn)
            attention, mlp = (gate if fault == "gates" else gate.tanh() for gate in gates)
            x = x + attention * layer.self_attn(layer.input_layernorm(x), mask)
            x = x + mlp * layer.mlp(layer.post_attention_layernorm(x))
        early = torch.cat(kept, dim=-1) if fault == "blocks" else torch.stack(kept, dim=-1).flatten(-2)
        out = torch.cat([x, early], dim=-1)
        return out.unflatten(1, (tiles, n))[:, :, : config.num_tokens]


def patients(tower: LlamaVisionTower) -> dict[str, Patient]:
    """The tower in five states, each broken in another place."""
    faults = ("padding", "one late", "gates", "blocks", "positions")
    return {letter: Patient(tower, fault) for letter, fault in zip("ABCDE", faults, strict=True)}


_SIGNS = {
    "blocks": "the last state would be right, and all numbers of the early ones would be there, in another "
    "order",
    "one late": "the last state would be right, and the early ones would hold numbers that the intact tower "
    "does not give",
    "positions": "the first early state, from before any block, would be wrong already",
    "padding": "the first early state would be right and later ones wrong, since the mask works in the "
    "blocks",
    "gates": "all early states would be right, and only the last one wrong",
}


@torch.no_grad()
def diagnose(answer: Callable[..., Any]) -> None:
    """The five faults in a tower with weights of its own."""
    intact = small_model(seed=1).vision_tower
    said = {fault: call(answer, Patient(intact, fault), intact) for fault in FAULTS}
    expect_faults(said, _SIGNS, "tower", "towers")
    right("the early states are windows into the tower: the first one that is wrong says where to look.")
