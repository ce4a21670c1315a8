"""Lines of pictures with captions: all are checked, and bad ones are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_towers import config, make_pairs

from minivlm.data.lines import BadLines
from minivlm.data.pairs import Pair, read_captions, read_pairs
from minivlm.errors import InputError
from minivlm.training.contrastive_recipe import build

GOOD: dict[str, Any] = {"image": "0.png", "text": "a small red circle"}


def test_good_lines(tmp_path: Path) -> None:
    path = make_pairs(tmp_path, lines=2)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\n" + json.dumps(GOOD).encode())
    pairs = read_pairs(path, [build(config())[1].tokenizer])
    assert pairs == [Pair(line, "0.png", tmp_path / "0.png", "a small red circle") for line in (1, 3)]
    assert read_captions(path) == ["a small red circle"] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, 'line 2: "text" is null: expected text'),
        ({"text": " "}, 'line 2: "text" is empty'),
        ({"text": "a " * 40}, "line 2: its text has 41 tokens, but the model reads at most 27"),
        ({"image": "no.png"}, "line 2: .*no.png: no such file"),
        ({"text": "\ud800"}, "line 2: .*Unicode"),
        ({"text": "<bos>a cat<eos>"}, 'line 2: "text" contains <.os>, which is added'),
    ],
)
def test_bad_lines(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = make_pairs(tmp_path, lines=1)
    path.write_text("\n".join(json.dumps(line) for line in (GOOD, GOOD | changes)))
    tokenizer = build(config())[1].tokenizer
    with pytest.raises(BadLines, match=message):
        read_pairs(path, [tokenizer])
    told: list[BadLines] = []
    assert len(read_pairs(path, [tokenizer], told.append)) == 1
    assert len(told) == 1


def test_another_name_for_the_caption(tmp_path: Path) -> None:
    path = make_pairs(tmp_path, lines=1)
    path.write_text('{"image": "0.png", "caption": "a small red circle"}')
    with pytest.raises(BadLines, match="line 1: no \"text\" among its keys \\('image', 'caption'\\)"):
        read_pairs(path, [])
    with pytest.raises(
        InputError, match=r'every line is bad, .* Write {"image", "text"}, one object per line'
    ):
        read_captions(path)
