"""The mask that is read from attention maps is the mask that the model was given."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_paligemma

from minivlm import masks
from minivlm.attention import record_attention
from minivlm.looking.inspection import inspect_answer
from minivlm.looking.visible import as_text, draw_mask, share_rows, visible
from minivlm.models.load import load_answering
from minivlm.processing import load_picture
from minivlm.world.demo import SAMPLES


@pytest.mark.parametrize("prefix", [1, 3, 7])
def test_it_is_the_mask_of_the_decoder(prefix: int):
    decoder = tiny_paligemma().language_model
    places = torch.arange(7)[None]
    mask = masks.prefix_lm(places, places, torch.tensor([prefix]))
    with record_attention() as maps:
        decoder(decoder.embed(torch.randint(3, 100, (1, 7))), places, mask[:, None])
    assert torch.equal(visible(maps), mask[0])


def test_one_head_that_looks_is_enough():
    weights = torch.zeros(2, 1, 3, 4, 4)  # two layers of three heads
    weights[1, 0, 2, 1, 3] = 1e-30
    assert visible(list(weights)).nonzero().tolist() == [[1, 3]]


def test_equal_neighbors_share_a_row():
    tokens = ["<image>", "<image>", "<image>", "a", "a", "b", "a"]
    mask = torch.ones(7, 7).tril().bool()
    mask[:3, :3] = True
    names, small = share_rows(tokens, mask)
    assert names == ["<image> x 3", "a", "a", "b", "a"]  # "a" and "a" do not see the same
    assert torch.equal(small, torch.ones(5, 5).tril().bool())
    whole = torch.ones(7, 7).bool()
    assert share_rows(tokens, whole)[0] == ["<image> x 3", "a x 2", "b", "a"]
    whole[6, 0] = False  # somebody does not see the first place of the picture
    assert share_rows(tokens, whole)[0] == ["<image>", "<image> x 2", "a x 2", "b", "a"]


def test_as_text():
    text = as_text(["<image> x 2", "a"], torch.tensor([[True, False], [True, True]]))
    assert text.splitlines() == ["         sees  1 2", "1 <image> x 2  ■ ·", "2 a            ■ ■"]
    wide = as_text([str(i) for i in range(12)], torch.eye(12).bool()).splitlines()
    assert len({len(line) for line in wide}) == 1
    assert wide[11][wide[0].index("11") + 1] == "■"


def test_many_tokens_get_no_names():
    few = draw_mask(["$a$"] * 80, torch.ones(80, 80).bool())
    many = draw_mask(["$a$"] * 81, torch.ones(81, 81).bool())
    assert [label.get_text() for label in few.axes[0].get_yticklabels()] == ["$a$"] * 80
    assert "$a$" not in [label.get_text() for label in many.axes[0].get_yticklabels()]


def test_of_an_answer():
    model, processor = load_answering()
    seen = inspect_answer(model, processor, load_picture(SAMPLES / "scene_1.png"), "caption en")
    names, mask = share_rows(seen.tokens, seen.visible)
    prompt = 64 + 1 + 2 + 1  # picture, <bos>, two words, newline
    assert names[:5] == ["<image> x 64", "<bos>", "caption", "en", "\\n"]
    assert seen.visible[:prompt, :prompt].all()
    assert not seen.visible[:prompt, prompt:].any()
    answer = seen.visible[prompt:, prompt:]
    assert torch.equal(answer, torch.ones_like(answer).tril())
    assert mask.shape == (len(names), len(names))
