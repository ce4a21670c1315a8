"""VisualBERT equals transformers' on the same weights, by way of folders, in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_differs, assert_equal, difference, noise, randomize
from miniatures import tiny
from torch import Tensor
from transformers import VisualBertConfig, VisualBertForPreTraining, VisualBertForQuestionAnswering

from minivlm.errors import InputError
from minivlm.models.load import load
from minivlm.models.miniatures.mask_filling import Rows
from minivlm.models.miniatures.visualbert import VisualBERT, VisualBERTConfig
from minivlm.text.bert import BertConfig
from minivlm.training.masked_words import mask_words

CONFIG: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "visual_embedding_dim": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
IMAGE = VisualBERTConfig().image_token_id  # outside of the vocabulary
# Two rows [CLS] A [SEP] B [SEP] of 6 and 4 words, with 3 and 2 regions.
IDS = torch.tensor([[5, 17, 3, 99, 42, 7], [8, 9, 11, 60, 0, 0]])
REAL = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
TYPES = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]])
FEATURES = noise(2, 3, 20, start=0.5)
REGIONS = torch.tensor([[1, 1, 1], [1, 1, 0]])
FIRST_PICTURE = torch.zeros(2, 3, dtype=torch.long)
TWO_PICTURES = torch.tensor([[0, 1, 1], [0, 1, 0]])
TOKENS = torch.cat([REAL, REGIONS], dim=1).bool()  # what padding computes is never read
WORDS = torch.tensor([[[1, 4], [2, -1], [-1, -1]], [[3, 1], [0, -1], [2, 3]]])  # that name a region
INPUTS = {
    "input_ids": IDS,
    "attention_mask": REAL,
    "token_type_ids": TYPES,
    "visual_embeds": FEATURES,
    "visual_attention_mask": REGIONS,
    "visual_token_type_ids": FIRST_PICTURE,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers writes it."""
    path = tmp_path_factory.mktemp("visual_bert")
    randomize(VisualBertForPreTraining(VisualBertConfig(**CONFIG))).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> VisualBertForPreTraining:
    return VisualBertForPreTraining.from_pretrained(folder).eval()


@pytest.fixture
def ours(folder: Path) -> VisualBERT:
    return VisualBERT.from_pretrained(folder)


def rows_of(
    model: VisualBERT,
    features: Tensor = FEATURES,
    regions: Tensor = REGIONS,
    types: Tensor | None = None,
    words: Tensor | None = None,
    regions_first: bool = False,
) -> Rows:
    """Text and regions in one row, in the order of transformers or the other way round."""
    placeholders = torch.full_like(regions, model.config.image_token_id)
    parts = [(IDS, placeholders), (REAL, regions), (TYPES, torch.zeros_like(regions))]
    ids, real, both = (torch.cat(pair[::-1] if regions_first else pair, dim=1) for pair in parts)
    return Rows(ids, real, both, model.embed_regions(features, types, words))


@torch.no_grad()
def outputs(model: VisualBERT, **choices: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and scores of words at all tokens, and scores of "does the caption fit?"."""
    rows = rows_of(model, **choices)
    hidden = model.read(rows)
    at = rows.attention_mask.bool()
    return hidden[at], model.logits(hidden)[at], model.fit(hidden, rows)


@torch.no_grad()
def expected(reference: VisualBertForPreTraining, **inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inputs = INPUTS | inputs
    found = reference(**inputs)
    states = reference.visual_bert(**inputs).last_hidden_state
    return states[TOKENS], found.prediction_logits[TOKENS], found.seq_relationship_logits


def assert_all_equal(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        assert_equal(mine, theirs)


def test_every_output_equals_the_reference(ours: VisualBERT, reference: VisualBertForPreTraining) -> None:
    assert_all_equal(outputs(ours), expected(reference))


def test_the_type_of_regions_is_the_authors(ours: VisualBERT, reference: VisualBertForPreTraining) -> None:
    """0 unless there are two pictures. transformers takes 1, which is another model: 7e-3 of .5."""
    assert_all_equal(
        outputs(ours, types=TWO_PICTURES), expected(reference, visual_token_type_ids=TWO_PICTURES)
    )
    silent = {name: tensor for name, tensor in INPUTS.items() if name != "visual_token_type_ids"}
    with torch.no_grad():
        theirs = reference(**silent).prediction_logits[TOKENS]
    assert_equal(outputs(ours, types=torch.ones_like(FIRST_PICTURE))[1], theirs)
    assert_differs(outputs(ours)[1], theirs, factor=100)


def test_regions_at_the_positions_of_their_words(
    ours: VisualBERT, reference: VisualBertForPreTraining
) -> None:
    theirs = expected(reference, image_text_alignment=WORDS)
    assert_all_equal(outputs(ours, words=WORDS), theirs)
    assert_differs(outputs(ours)[1], theirs[1], factor=100)


@torch.no_grad()
def test_the_order_of_a_row_does_not_matter(ours: VisualBERT) -> None:
    rows, turned = rows_of(ours), rows_of(ours, regions_first=True)
    hidden = ours.read(rows)
    assert_equal(ours.read(turned).roll(-3, dims=1), hidden)
    assert_equal(ours.fit(ours.read(turned), turned), ours.fit(hidden, rows))
    order = torch.tensor([1, 2, 0])
    mixed = rows_of(ours, features=FEATURES[:, order], regions=REGIONS[:, order])
    assert_equal(ours.read(mixed)[:, :6], hidden[:, :6])


def test_the_picture_changes_every_output(ours: VisualBERT) -> None:
    for first, second in zip(outputs(ours), outputs(ours, features=-FEATURES), strict=True):
        assert_differs(second, first, factor=1000)


def pre_norm(model: VisualBERT) -> None:
    for block in model.language_model.layers:

        def forward(x: Tensor, mask: Tensor, block=block) -> Tensor:
            x = x + block.self_attn(block.layer_norm1(x), mask)
            return x + block.mlp(block.layer_norm2(x))

        block.forward = forward


def tanh_gelu(model: VisualBERT) -> None:
    for block in model.language_model.layers:
        block.mlp.hidden_act = "gelu_pytorch_tanh"


def regions_counted(model: VisualBERT) -> None:
    """Positions 0, 1, 2, ... in place of 0, 0, 0, ..."""
    table = model.visual_position_embeddings.weight
    embed = model.embed_regions

    def counted(features: Tensor, *choices: Tensor | None) -> Tensor:
        return embed(features, *choices) - table[0] + table[: features.shape[1]]

    model.embed_regions = counted


def no_type_of_regions(model: VisualBERT) -> None:
    model.visual_token_type_embeddings.weight.data.zero_()


def type_of_words(model: VisualBERT) -> None:
    model.visual_token_type_embeddings = model.language_model.embed_types


def no_mask_for_regions(model: VisualBERT) -> None:
    read = model.read
    model.read = lambda rows: read(
        replace(rows, attention_mask=rows.attention_mask | (rows.input_ids == IMAGE).long())
    )


def norms_apart(model: VisualBERT) -> None:
    """One norm for words, and none for regions."""
    norm = model.language_model.norm.forward
    model.language_model.norm.forward = lambda x: torch.cat([norm(x[:, :6]), x[:, 6:]], dim=1)


MISTAKES = [
    pre_norm,
    tanh_gelu,
    regions_counted,
    no_type_of_regions,
    type_of_words,
    no_mask_for_regions,
    norms_apart,
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_show(
    mistake: Callable[[VisualBERT], None], ours: VisualBERT, reference: VisualBertForPreTraining
) -> None:
    with torch.no_grad():
        mistake(ours)
    # The two forms of GELU are similar, and so is the result.
    factor = 3 if mistake is tanh_gelu else 100
    assert_differs(outputs(ours)[1], expected(reference)[1], factor=factor)


def test_the_loss_equals_the_reference(ours: VisualBERT, reference: VisualBertForPreTraining) -> None:
    vocabulary = torch.arange(4, 100)
    masked, labels = mask_words(IDS, REAL.bool(), 2, vocabulary, torch.Generator().manual_seed(0), 0.5)
    assert (labels != -100).sum() > 3
    fits = torch.tensor([1, 0])
    of_regions = torch.full((2, 3), -100)
    inputs = INPUTS | {"input_ids": masked, "labels": torch.cat([labels, of_regions], dim=1)}
    rows = rows_of(ours)
    rows = replace(rows, input_ids=torch.cat([masked, rows.input_ids[:, 6:]], dim=1))
    loss = ours.pretraining_loss(rows, torch.cat([labels, of_regions], dim=1), fits)
    theirs = reference(**inputs, sentence_image_labels=fits).loss
    assert_equal(loss, theirs)
    assert_differs(ours.pretraining_loss(rows, torch.cat([labels, of_regions], dim=1), 1 - fits), theirs)


@torch.no_grad()
def test_a_head_for_questions_reads_the_word_before_the_last(tmp_path: Path) -> None:
    """In transformers, the same encoder with a linear layer that chooses one of several answers."""
    asking = randomize(VisualBertForQuestionAnswering(VisualBertConfig(**CONFIG, num_labels=7)))
    rest = randomize(VisualBertForPreTraining(VisualBertConfig(**CONFIG)), seed=1)
    rest.visual_bert.load_state_dict(asking.visual_bert.state_dict())
    rest.save_pretrained(tmp_path)
    model = VisualBERT.from_pretrained(tmp_path)
    hidden = model.read(rows_of(model))
    before_last = hidden[torch.arange(2), REAL.sum(dim=1) - 2]
    assert_equal(asking.cls(before_last), asking(**INPUTS).logits)


def test_transformers_opens_our_folder(ours: VisualBERT, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path)
    reference, found = VisualBertForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert_all_equal(outputs(ours), expected(reference.eval()))
    again = VisualBERT.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert_all_equal(outputs(again), outputs(ours))


@torch.no_grad()
def test_transformers_opens_our_folder_with_a_tower(tmp_path: Path) -> None:
    """It passes over the tower; with its output as regions, it gives our scores."""
    model = randomize(tiny("visualbert"))
    assert isinstance(model, VisualBERT)
    assert model.vision_tower is not None
    model.save_pretrained(tmp_path)
    reference, found = VisualBertForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert all(name.startswith("vision_tower.") for name in found["unexpected_keys"])
    pixels = noise(1, 3, 28, 28)
    prompt = torch.tensor([[2, 17, 30, 99]])
    ids = torch.cat([torch.full((1, 4), model.config.image_token_id), prompt], dim=1)
    # What comes next is asked with a mask, which is of the second text.
    inputs = {
        "input_ids": torch.cat([prompt, torch.tensor([[model.config.mask_token_id]])], dim=1),
        "token_type_ids": torch.tensor([[0, 0, 0, 0, 1]]),
        "visual_embeds": model.vision_tower(pixels),
        "visual_token_type_ids": torch.zeros(1, 4, dtype=torch.long),
    }
    theirs = reference.eval()(**inputs).prediction_logits[:, 4]
    assert_equal(model(ids, pixels).logits[:, -1], theirs)


# As a model that writes


def answer_rows(model: VisualBERT) -> tuple[Tensor, Tensor, Tensor]:
    """Ids with a picture, a prompt of 3 words and an answer of 3, their types, and the labels."""
    image = torch.full((4,), model.config.image_token_id)
    ids = torch.cat([image, torch.tensor([2, 17, 30, 50, 60, 1])])[None]
    types = (torch.arange(10) >= 7).long()[None]
    return ids, types, ids.masked_fill(types == 0, -100)


@torch.no_grad()
def test_an_answer_is_asked_for_word_by_word() -> None:
    """Each word from its own row, in which nothing comes after the mask; other places have no scores."""
    model = randomize(tiny("visualbert"))
    assert isinstance(model, VisualBERT)
    ids, types, labels = answer_rows(model)
    pixels = noise(1, 3, 28, 28)
    output = model(ids, pixels, token_type_ids=types, labels=labels)
    image = model.encode_image(pixels)
    losses = []
    for place in (7, 8, 9):
        row = ids[:, : place + 1].clone()
        row[0, place] = model.config.mask_token_id
        rows = Rows(row, torch.ones_like(row), types[:, : place + 1], image)
        scores = model.logits(model.read(rows)[:, -1])
        assert_equal(output.logits[:, place - 1], scores)
        losses.append(F.cross_entropy(scores, ids[:, place]))
    assert_equal(output.loss, torch.stack(losses).mean())
    assert not output.logits[:, [0, 1, 2, 3, 4, 5, 9]].any()
    # All places masked at once is another question: here, no word knows the one before it.
    at_once = ids.masked_fill(types == 1, model.config.mask_token_id)
    scores = model.logits(model.read(Rows(at_once, torch.ones_like(ids), types, image)))
    assert_differs(scores[:, 7:], output.logits[:, 6:9], factor=1000)


@torch.no_grad()
def test_labels_say_what_is_asked() -> None:
    """A row for each label, so that training on one word of each answer costs one row."""
    model = randomize(tiny("visualbert"))
    ids, types, labels = answer_rows(model)
    encode, widths = model.encode, []
    model.encode = lambda x, mask: (widths.append(len(x)), encode(x, mask))[1]
    pixels = noise(1, 3, 28, 28)
    whole = model(ids, pixels, token_type_ids=types, labels=labels)
    one = labels.clone()
    one[:, 8:] = -100
    part = model(ids, pixels, token_type_ids=types, labels=one)
    assert widths == [3, 1]
    assert_equal(part.logits[:, 6], whole.logits[:, 6])


@torch.no_grad()
def test_a_written_word_changes_what_the_prompt_is() -> None:
    """Why there is no cache: in a decoder, this difference is 0."""
    model = randomize(tiny("visualbert"))
    ids, types, _ = answer_rows(model)
    image = model.encode_image(noise(1, 3, 28, 28))
    other = ids.clone()
    other[0, 7] = 90
    first, second = (model.read(Rows(row, torch.ones_like(row), types, image)) for row in (ids, other))
    assert difference(first[:, :7], second[:, :7]) > 1e-2


def test_the_map_shows_what_was_there() -> None:
    model = tiny("visualbert")
    torch.manual_seed(0)
    maps = [torch.rand(4, 2, 11, 11) + 1 for _ in range(2)]  # answer of 3 words, 7 tokens before it
    for layer in maps:
        for row in range(4):
            layer[row, :, :, 7 + row + 1 :] = 0  # nothing after the mask
    tower, decoder, attention = model.sort_maps([torch.ones(1)], maps)
    assert len(tower) == 1
    assert attention.shape == (2, 2, 10, 4)
    layer = decoder[1][0]
    assert torch.equal(layer[:, 2, :7], maps[1][0, :, 2, :7])  # the prompt, before the answer
    assert torch.equal(layer[:, 8, :9], maps[1][2, :, 9, :9])  # after two words: the mask in place 9
    seen = layer[0] > 0
    assert seen[:7, :7].all()
    assert not seen[:7, 7:].any()
    assert torch.equal(seen[7:, 7:], torch.ones(3, 3, dtype=torch.bool).tril())


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bypass_transformer": True}, "config.json has bypass_transformer = True; only False"),
        ({"hidden_act": "gelu_new"}, "config.json has hidden_act = 'gelu_new'; only 'gelu'"),
    ],
)
def test_what_is_not_computed_is_refused(change: dict[str, object], message: str) -> None:
    values = VisualBERTConfig(text=BertConfig(num_hidden_layers=2)).to_dict()
    with pytest.raises(InputError, match=message):
        VisualBERTConfig.from_dict(values | change)


def test_a_folder_without_a_tower_cannot_look(folder: Path, ours: VisualBERT) -> None:
    with pytest.raises(InputError, match="has no vision_config: its regions come from a detector"):
        load(folder)
    with pytest.raises(InputError, match="this model has no image tower"):
        ours.encode_image(noise(1, 3, 28, 28))


def test_a_tower_of_another_width_is_refused() -> None:
    config = tiny("visualbert").config
    with pytest.raises(InputError, match="visual_embedding_dim is 20, and the tower's patches are 24 wide"):
        replace(config, visual_embedding_dim=20)


def test_a_folder_without_heads_is_refused(reference: VisualBertForPreTraining, tmp_path: Path) -> None:
    reference.visual_bert.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["VisualBertModel"]
    with pytest.raises(InputError, match=r"missing: .*visual_bert.embeddings"):
        VisualBERT.from_pretrained(tmp_path)


def test_what_it_learns_it_writes() -> None:
    """Six pictures with a name of three words each, learned by heart."""
    torch.manual_seed(0)
    model = tiny("visualbert", eos_token_id=1)
    pixels = noise(6, 3, 28, 28)
    prompt = torch.tensor([model.config.image_token_id] * 4 + [2, 17, 30]).expand(6, -1)
    answers = torch.randint(10, 110, (6, 4))
    answers[:, -1] = 1
    ids = torch.cat([prompt, answers], dim=1)
    types = (torch.arange(11) >= 7).long().expand(6, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, pixels, token_type_ids=types, labels=ids.masked_fill(types == 0, -100)).loss.backward()
        optimizer.step()
    assert torch.equal(model.generate(prompt, pixel_values=pixels, max_new_tokens=6), answers)
