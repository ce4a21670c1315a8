"""Tiny Qwen-VLs: one with the tensors that made stored numbers, and whole folders in the published form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers import made_up, randomize
from torch import Tensor

from minivlm.checkpoints.layouts import as_in_file, names_in, qwen_vl_layouts, split, to_ours
from minivlm.models.qwen_vl import QwenVL, QwenVLConfig
from minivlm.processing import QwenVLProcessor
from minivlm.processing.qwen_tokens import ChatFormat, QwenTokenizer
from minivlm.text.qwen import QwenConfig
from minivlm.vision.qwen_vl import QwenVLVisionConfig

# 20 x 20 patches, to which the table of 16 x 16 positions is stretched, and 2 x 2 queries.
VISION = QwenVLVisionConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    mlp_ratio=1.7,
    image_size=40,
    patch_size=2,
    num_queries=4,
    output_dim=256,
)
TEXT: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 270,
    "max_position_embeddings": 64,
    "seq_length": 16,
}
IMAGE_START = 260


def filled(**text: Any) -> QwenVL:
    """The model whose tensors depend on their published names; arguments change the decoder's config."""
    config = QwenVLConfig(
        VISION, QwenConfig(**{**TEXT, **text}), image_start_id=IMAGE_START, pad_token_id=1, eos_token_id=1
    )
    model = QwenVL(config)
    layout = qwen_vl_layouts(VISION.num_attention_heads)["hub"]
    state: dict[str, Tensor] = {}
    for name, tensor in as_in_file(model.state_dict(), layout).items():
        ours = to_ours(name, layout)
        assert ours is not None
        values = tensor if name.endswith("pos_embed") else made_up(name, tensor.shape)
        state |= zip(names_in(ours), split(values, ours), strict=True)
    model.load_state_dict(state)
    return model.eval()


def some(values: Tensor) -> Tensor:
    """At most twelve numbers from all over a tensor, as they are stored."""
    return values.flatten()[:: values.numel() // 12 + 1]


def ranks() -> dict[bytes, int]:
    """A vocabulary in the format of qwen.tiktoken: all bytes, then words of a text and their beginnings."""
    text = "system user assistant You are a helpful assistant . Picture what is it ? Answer : red star green"
    words = [f"{space}{word}".encode() for word in text.split() for space in ("", " ")]
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [word[:end] for word in words for end in range(2, len(word) + 1)]
    pieces.append(b"qwz")  # which no merging leads to
    return {piece: rank for rank, piece in enumerate(dict.fromkeys(pieces))}


def tiny_processor(chat_format: ChatFormat = "chatml") -> QwenVLProcessor:
    """Pictures of 16 pixels, four image tokens each."""
    return QwenVLProcessor(QwenTokenizer(ranks(), chat_format), 16, 4)


def write_qwen_vl(folder: Path, chat_format: ChatFormat = "chatml", seed: int = 0, **text: Any) -> Path:
    """A folder with random weights, for the vocabulary of `ranks`; 4 x 4 patches, 2 x 2 queries."""
    processor = tiny_processor(chat_format)
    tokenizer = processor.tokenizer
    values = TEXT | {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "vocab_size": tokenizer.vocab_size + 3,
        "max_position_embeddings": 256,
        "seq_length": 64,
    }
    config = QwenVLConfig(
        QwenVLVisionConfig(16, 2, 2, 1.7, image_size=16, patch_size=4, num_queries=4, output_dim=128),
        QwenConfig(**values | text),
        tokenizer.image_start_id,
        chat_format,
        tokenizer.pad_id,
        tokenizer.pad_id,
    )
    model = QwenVL(config)
    randomize(model, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def edit(path: Path, part: str | None = None, **values: Any) -> None:
    """Change a JSON file, or one part of it; None takes a value away."""
    config = json.loads(path.read_text())
    place = config if part is None else config[part]
    place.update(values)
    for name in [name for name, value in values.items() if value is None]:
        del place[name]
    path.write_text(json.dumps(config))


# Printed by tests/reference_qwen_vl.py with the program of the published folders, `some` of each tensor.
_STORED = {
    "tower": (
        "1.194125 0.09096867 -1.83058 0.02767946 0.04812849 -0.1852445 "
        "-1.602332 -0.8663024 -1.258379 1.582082 0.942159 -0.4407545"
    ),
    "image": (
        "-0.3195033 1.949476 1.012884 -0.995212 -0.2217278 1.062955 "
        "0.6101459 -0.005449206 -0.4339022 -1.102743 1.195901 0.1420206"
    ),
    "full 14": (
        "-0.1638931 0.2662706 0.03033155 0.4576972 0.3965094 0.2930706 "
        "-0.5669151 0.04364708 0.28394 0.8143012 -0.5527081 -0.7758154"
    ),
    "full 20": (
        "-0.1638931 -0.1763892 -0.1944174 0.06371439 0.2846164 -0.6514466 "
        "-0.2407187 -0.8441427 -0.09766209 -0.3270255 -0.7868984 1.050559"
    ),
    "full 40": (
        "-0.1638931 1.255997 0.6667059 2.063258 -0.5062451 0.4495084 "
        "-0.3503015 -1.115372 -1.274436 -1.266495 0.3429542 0.1645773"
    ),
    "two pictures": (
        "-0.1638931 -0.8499633 0.6569796 1.269332 -0.8802021 -0.400493 "
        "-0.7775613 1.047764 -1.150184 0.5374394 0.2731867 -1.080131"
    ),
    "written 12 to 20": (
        "0.675254 -1.367903 -1.266744 -0.5920021 -0.801333 -1.601498 "
        "-0.5499219 -0.9163119 -1.505801 1.091412 0.3634095 0.3884173"
    ),
    "written 18 to 36": (
        "0.7710496 -0.00450334 -0.2302694 1.630237 -0.1364431 0.01694715 "
        "-0.5133727 0.8707458 -0.9322979 0.4994522 -0.6140679 0.2096153"
    ),
    "training": (
        "-0.1638931 1.241255 0.6233491 2.148599 -0.6628271 0.3696307 "
        "-0.5406955 -1.098392 -1.461313 -1.261814 0.3557004 0.1432216"
    ),
    "no ntk": (
        "-0.1638931 1.241255 0.6233491 2.148599 -0.6628271 0.3772724 "
        "-0.537675 -1.059697 -1.314608 -1.301638 0.3949086 0.2634963"
    ),
    "no logn": (
        "-0.1638931 1.255997 0.6667059 2.063258 -0.5062451 0.4381536 "
        "-0.3717108 -1.131441 -1.448626 -1.241597 0.3166546 0.1114769"
    ),
}
EXPECTED = {name: torch.tensor([float(number) for number in row.split()]) for name, row in _STORED.items()}
