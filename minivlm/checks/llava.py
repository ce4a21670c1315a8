"""Checks for 14_llava: the tower's features, the row of a chat with its labels, faulty losses, and tiles."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.checks import NotYet, call, expect, expect_faults, expect_tensor, right, same
from minivlm.models.llava import LlavaConfig, LlavaProjector
from minivlm.models.load import SHIPPED
from minivlm.processing.chat import encode_chat
from minivlm.processing.inputs import IGNORE
from minivlm.processing.llama_tokens import LlamaTokenizer
from minivlm.processing.tiles import choose_grid, num_tokens, without_padding
from minivlm.text.llama import LlamaConfig
from minivlm.vision.clip import CLIPVisionConfig, CLIPVisionModel

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

FAULTS = ("no shift", "two shifts", "question too", "padding too", "end left out")
SIDE, PATCHES = 336, 24  # of a tile: pixels, and tokens in a row


class solutions:
    """The solutions that the notebook continues with."""

    @staticmethod
    def image_features(tower: Any, projector: nn.Module, pixel_values: Tensor, layer: int = -2) -> Tensor:
        """pixel_values [B, C, H, W] -> what the decoder reads, [B, N, D]."""
        states = list(tower.hidden_states(pixel_values))
        return projector(states[layer][:, 1:])

    @staticmethod
    def chat_row(
        turns: list[tuple[str, str]], features: Tensor, tokenizer: Any, embed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Turns and the features [N, D] of one picture -> vectors [S, D] and labels [S]."""
        vectors: list[Tensor] = []
        labels: list[int] = []

        def add(ids: list[int], is_answer: bool = False) -> None:
            vectors.append(embed(torch.tensor(ids)))
            labels.extend(ids if is_answer else [-100] * len(ids))

        for number, (question, answer) in enumerate(turns):
            if number == 0:
                add([tokenizer.bos_id, *tokenizer.encode("USER: ")])
                vectors.append(features)
                labels.extend([-100] * len(features))
                add(tokenizer.encode_later(f"\n{question} ASSISTANT:"))
            else:
                add(tokenizer.encode_later(f"USER: {question} ASSISTANT:"))
            add([*tokenizer.encode_after(":", f" {answer}"), tokenizer.eos_id], is_answer=True)
        return torch.cat(vectors), torch.tensor(labels)

    @staticmethod
    def diagnose(loss: Loss, input_ids: Tensor, is_answer: Tensor, attention_mask: Tensor) -> str:
        """Which fault a loss has, by the gradient of logits [1, S, V]; ids and marks are [1, S]."""
        logits = torch.zeros(*input_ids.shape, int(input_ids.max()) + 1, requires_grad=True)
        with torch.enable_grad():
            loss(logits, input_ids, is_answer, attention_mask).backward()
        assert logits.grad is not None
        gradient, ids = logits.grad[0], input_ids[0]
        rows = gradient.abs().sum(dim=-1).nonzero().flatten()  # where something is asked for
        wanted = gradient.argmin(dim=-1)  # and what: only its score is to rise
        answer = is_answer[0].nonzero().flatten()
        if wanted[rows[0]] == ids[rows[0]]:
            return "no shift"
        if wanted[rows[0]] == ids[rows[0] + 2]:
            return "two shifts"
        if rows[0] < answer[0] - 1:
            return "question too"
        return "padding too" if rows[-1] > answer[-1] - 1 else "end left out"

    @staticmethod
    def tokens_of_tiles() -> dict[str, int]:
        """Image tokens of LLaVA-NeXT for pictures of some widths and heights."""
        return {
            "672 x 672": 2928,
            "1008 x 336": 2328,
            "336 x 1008": 2376,
            "640 x 480": 2340,
            "100 x 100": 1176,
        }


@cache
def _tower() -> tuple[CLIPVisionModel, LlavaProjector]:
    """A small CLIP with random weights, large enough that all of its layers differ."""
    vision = CLIPVisionConfig(24, 48, 4, 2, 3, 24, 8)
    config = LlavaConfig(vision=vision, text=LlamaConfig(32, 64, 1, 2, 2, 20))
    with torch.random.fork_rng([]):
        torch.manual_seed(14)
        tower, projector = CLIPVisionModel(vision), LlavaProjector(config)
        for weight in (*tower.parameters(), *projector.parameters()):
            weight.data.add_(torch.randn_like(weight) * 0.2)
    return tower, projector


@torch.no_grad()
def image_features(answer: Callable[..., Any]) -> None:
    """Two pictures, the second-last layer, and two others."""
    tower, projector = _tower()
    pictures = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    states = list(tower.hidden_states(pictures))
    result = call(answer, tower, projector, pictures.clone(), -2)
    chosen = states[-2]
    wanted = projector(chosen[:, 1:])
    known = {
        "this is the last layer, number -1: CLIP's loss reads the class token there, and -2 is asked for": (
            states[-1][:, 1:]
        ),
        "this is layer -3: the output of the last block is number -1": states[-3][:, 1:],
        "the class token is still there: it stands first, before the patches": chosen,
        "the last patch is missing, and the class token is there: leave out the first token": chosen[:, :-1],
        "this is the class token alone: LLaVA takes the patches, and leaves it out": chosen[:, 0],
        "this is the class token alone, as a row of one: LLaVA takes the others": chosen[:, :1],
        "the tower's last norm was applied: it belongs to the class token of the last layer": (
            tower.post_layernorm(chosen)[:, 1:]
        ),
        "the first picture only: the batch is the first axis, the tokens are the second": chosen[0, 1:],
        "the first picture is left out, not the class token: tokens are the second axis": chosen[1:],
        "this is a mean over the patches: keep them all": chosen[:, 1:].mean(dim=1),
    }
    for hint, features in known.items():
        expect(not same(result, projector(features)), hint)
    expect(
        not same(result, chosen[:, 1:]),
        "these are the right patches, in the width of the tower: the projector is missing",
    )
    expect(
        not same(result, projector.linear_1(chosen[:, 1:])),
        "only the first layer of the projector was used: call the projector, it has two and a GELU",
    )
    expect_tensor(result, wanted, "your features")
    for layer in (-1, 2):
        expect(
            same(call(answer, tower, projector, pictures.clone(), layer), projector(states[layer][:, 1:])),
            f"with layer={layer} your function does not give that layer: number 0 is what the first block "
            "reads, number 1 its output, and negative numbers count from the end",
        )
    right("the patches of the layer before the last, in the decoder's width.")


@cache
def _tokenizer() -> LlamaTokenizer:
    return LlamaTokenizer.from_pretrained(SHIPPED)


@cache
def _with_spaces() -> tuple[LlamaTokenizer, LlamaTokenizer]:
    """The shipped words with a space in front of every piece, or of the first, as in Llama's files."""
    shipped = _tokenizer()
    state = json.loads(shipped.backend.to_str())
    every = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, state["normalizer"]]}
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    one, other = (
        LlamaTokenizer(tokenizers.Tokenizer.from_str(json.dumps(state | change)), shipped.names)
        for change in ({"normalizer": every}, {"pre_tokenizer": first})
    )
    return one, other


TURNS = [("what color is the star?", "red"), ("how many circles are there?", "2")]


@torch.no_grad()
def chat_row(answer: Callable[..., Any]) -> None:
    """Two turns, a picture of three tokens, and vectors that say where they come from."""
    tokenizer = _tokenizer()
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(tokenizer.vocab_size, 8, generator=generator)
    features = torch.randn(3, 8, generator=generator)
    row = encode_chat(tokenizer, TURNS, len(features), 1, system="")
    image = tokenizer.image_id
    result = call(answer, list(TURNS), features.clone(), tokenizer, partial(F.embedding, weight=table))
    expect(
        isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, Tensor) for part in result),
        "return two tensors: the vectors [S, D] and the labels [S]",
    )
    vectors, labels = result
    expect(
        vectors.ndim == 2 and vectors.shape[1] == 8 and labels.ndim == 1,
        f"the vectors have shape {list(vectors.shape)} and the labels {list(labels.shape)}: expected [S, D] "
        "and [S], without an axis for the batch",
    )
    expect(
        len(vectors) == len(labels),
        f"{len(vectors)} vectors and {len(labels)} labels: each token has one, and each image token has -100",
    )
    ids, order = _read_back(vectors, table, features, image)
    _content(ids, order, row.ids, tokenizer)
    expect(
        not labels.dtype.is_floating_point,
        f"the labels are {labels.dtype}: cross-entropy wants whole numbers, the ids of tokens",
    )
    _labels(labels.tolist(), row.ids, row.written, tokenizer)
    for llama in _with_spaces():
        wanted = encode_chat(llama, TURNS, len(features), 1, system="").ids
        vectors, _ = call(answer, list(TURNS), features.clone(), llama, partial(F.embedding, weight=table))
        expect(
            _read_back(vectors, table, features, image)[0] == wanted,
            "the row is right with the tokenizer of this course. Llama's puts a space in front of a text, "
            "and with it your row has one too many or too few. A piece is one call: of `encode` for the "
            "first only, of `encode_later` behind the picture or </s>, of `encode_after` for the answer",
        )
    right("each answer and its </s> have a loss; the picture, the questions and the form have none.")


def _read_back(
    vectors: Tensor, table: Tensor, features: Tensor, image_id: int
) -> tuple[list[int], list[int]]:
    """The id of each vector, and the numbers of the image features in the order in which they stand."""
    ids, order = [], []
    for vector in vectors:
        in_table = (table - vector).abs().amax(dim=-1)
        in_features = (features - vector).abs().amax(dim=-1)
        if in_features.min() < 1e-5:
            ids.append(image_id)
            order.append(int(in_features.argmin()))
            continue
        if in_table.min() > 1e-5:
            size = vector.norm() / torch.cat([table, features]).norm(dim=-1).mean()
            raise NotYet(
                "a vector of your row is neither a word of the table nor an image feature"
                + (": nothing is scaled in Llama" if size > 2 else ": take them as they are")
            )
        ids.append(int(in_table.argmin()))
    return ids, order


def _content(ids: list[int], order: list[int], expected: list[int], tokenizer: LlamaTokenizer) -> None:
    """What stands where."""
    image, bos, eos = tokenizer.image_id, tokenizer.bos_id, tokenizer.eos_id
    expect(
        order != [],
        "no image feature is in the row: a placeholder's own vector means nothing, put in the features",
    )
    expect(
        len(order) <= 3, "the picture stands in the row more than once: it belongs to the first question only"
    )
    expect(order == [0, 1, 2], "the image features are not in their order, or not all of them are there")
    expect(
        ids[0] == bos,
        "the row has to begin with <s>, tokenizer.bos_id: `encode` does not add it",
    )
    expect(
        ids[1] != image,
        "the picture stands first, as in PaliGemma: in LLaVA it stands in the question, after 'USER: '",
    )
    expect(ids.count(bos) == 1, "<s> stands once, at the start of the row, and not before each turn")
    expect(
        ids.count(eos) == expected.count(eos),
        f"</s> stands {ids.count(eos)} times in your row: once after each answer, so that the model learns "
        "to stop",
    )
    after = ids[ids.index(image) + 3] if len(ids) > ids.index(image) + 3 else None
    newline = expected[expected.index(image) + 3]
    expect(after == newline, "behind the picture comes a newline, then the question")
    if ids == expected:
        return
    place = next(
        (n for n, (mine, its) in enumerate(zip(ids, expected, strict=False)) if mine != its),
        min(len(ids), len(expected)),
    )
    mine, its = (
        tokenizer.decode(row[place : place + 4], skip_special_tokens=False) for row in (ids, expected)
    )
    raise NotYet(
        f"the row is right up to token {place - 1}; then yours goes on with {mine!r}, expected {its!r}: look "
        "at the spaces, and at which function encodes what"
    )


def _labels(labels: list[int], ids: list[int], written: list[bool], tokenizer: LlamaTokenizer) -> None:
    """Which tokens have a loss."""
    expected = [token if is_answer else IGNORE for token, is_answer in zip(ids, written, strict=True)]
    last = max(n for n, is_answer in enumerate(written[:-3]) if is_answer)
    known = {
        "the words are right, but every token has a loss: the model would learn to ask, too": ids,
        "every token but the image tokens has a loss: the model would learn to ask, too": [
            IGNORE if token == tokenizer.image_id else token for token in ids
        ],
        "the labels are shifted already: a label stands at the place of its own token, the loss shifts": [
            *expected[1:],
            IGNORE,
        ],
        "the labels are shifted to the right: a label stands at the place of its own token": [
            IGNORE,
            *expected[:-1],
        ],
        "</s> has no loss after an answer: without it, the model never learns to stop": [
            IGNORE if token == tokenizer.eos_id else token for token in expected
        ],
        "only the last answer has a loss: every answer of the chat is one to learn from": [
            IGNORE if n <= last else token for n, token in enumerate(expected)
        ],
        "only the first answer has a loss: every answer of the chat is one to learn from": [
            token if n <= last else IGNORE for n, token in enumerate(expected)
        ],
        "the questions have a loss, and the answers have none: it is the other way around": [
            IGNORE if is_answer else token for token, is_answer in zip(ids, written, strict=True)
        ],
        "0 is a token: where there is no loss, the label is -100, which cross-entropy leaves out": [
            token if is_answer else 0 for token, is_answer in zip(ids, written, strict=True)
        ],
        "the labels are marks: give the id of the token that is to be written": [
            int(mark) for mark in written
        ],
    }
    for hint, wrong in known.items():
        expect(labels != wrong, hint)
    for place, (mine, its) in enumerate(zip(labels, expected, strict=True)):
        expect(
            mine == its,
            f"token {place}, {tokenizer.decode([ids[place]], skip_special_tokens=False)!r}, has the label "
            f"{mine}, expected {its}: answers and their </s> have their own id, all else has -100",
        )


def _loss(fault: str, logits: Tensor, input_ids: Tensor, is_answer: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean loss of the answers, with one of the FAULTS."""
    real = attention_mask.bool()
    labelled = is_answer
    if fault == "question too":
        labelled = real
    elif fault == "padding too":
        labelled = is_answer | ~real
    elif fault == "end left out":
        labelled = is_answer & F.pad(is_answer[:, 1:], (0, 1))
    labels = input_ids.masked_fill(~labelled, IGNORE)
    shift = {"no shift": 0, "two shifts": 2}.get(fault, 1)
    kept = logits.shape[1] - shift
    return F.cross_entropy(logits[:, :kept].flatten(0, 1), labels[:, shift:].flatten(), ignore_index=IGNORE)


def patients() -> dict[str, Loss]:
    """Five losses, each with another fault."""
    order = ("question too", "two shifts", "end left out", "no shift", "padding too")
    return {letter: partial(_loss, fault) for letter, fault in zip("ABCDE", order, strict=True)}


_SIGNS = {
    "no shift": "the rows with a gradient are those of the answer itself, and each is asked for the token "
    "that it has read already",
    "two shifts": "the first row with a gradient is two before the answer, and asked for the token after the "
    "next",
    "question too": "rows far before the answer have a gradient, too",
    "padding too": "rows behind the last token of the answer have a gradient, too",
    "end left out": "the row before </s> has no gradient: nothing is asked for there",
}


def diagnose(answer: Callable[..., Any]) -> None:
    """The five faults, on a row in which every token occurs once, with padding behind it."""
    ids = torch.tensor([[1, 7, 9, 4, 12, 15, 3, 8, 2, 0, 0]])
    is_answer = torch.tensor([[False] * 5 + [True] * 4 + [False] * 2])
    attention_mask = (ids != 0).long()
    said = {}
    for fault in FAULTS:
        given = ids.clone(), is_answer.clone(), attention_mask.clone()
        said[fault] = call(answer, partial(_loss, fault), *given)
    expect_faults(said, _SIGNS, "loss", "losses")
    right("the gradient of the scores says which rows are asked, and for what. It works with any loss.")


def tokens_of_tiles(answer: Callable[..., Any]) -> None:
    """Every prediction against the package's count."""
    result = call(answer)
    expect(isinstance(result, dict), f"return the dict of your predictions, not a {type(result).__name__}")
    sizes = list(solutions.tokens_of_tiles())
    missing = [name for name in sizes if name not in result]
    expect(not missing, f"no prediction yet for: {', '.join(missing)}")
    wrong = []
    for name in sizes:
        width, height = map(int, name.split(" x "))
        grid = choose_grid(width, height, SIDE)
        count = num_tokens(width, height, grid, PATCHES)
        if result[name] != count:
            wrong.append(f"{name}: you say {result[name]}{_why(name, result[name], count, grid)}")
    expect(not wrong, "\n".join(wrong))
    right("the base view, then every row of the picture with its newline, without the padding.")


def _why(name: str, said: Any, count: int, grid: tuple[int, int]) -> str:
    """The mistake that gives a wrong number of tokens."""
    base = PATCHES**2
    rows, columns = grid[0] * PATCHES, grid[1] * PATCHES
    width, height = map(int, name.split(" x "))
    parts = without_padding(rows, columns, width, height)
    down, across = (len(range(size)[part]) for size, part in zip((rows, columns), parts, strict=True))
    known = (
        (base, "That is the base view alone, or one tile: there is no grid of a single tile"),
        (count - base, "The base view is missing"),
        (down * across, "The base view is missing, and each row ends with a newline"),
        (base + down * across, "Every row ends with a newline"),
        (base + rows * (columns + 1), "The tokens that show only padding are cut off"),
        (
            base + rows * columns,
            "The tokens that show only padding are cut off, and each row ends with a newline",
        ),
        (base + down * (across + grid[1]), "A row of the whole picture has one newline, not each tile"),
        (count + PATCHES, "The base view has no newlines"),
        (base + across * (down + 1), "The newline stands at the end of each row, not of each column"),
    )
    for number, hint in known:
        if said == number:
            return f". {hint}. The grid is {grid[0]} x {grid[1]}"
    return f", on a grid of {grid[0]} x {grid[1]}"
