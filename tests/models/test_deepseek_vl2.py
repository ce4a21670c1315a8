"""DeepSeek-VL2 from a folder: both ways, every command, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepseek_vl2 import FORMS, config_json, write_folder
from helpers import assert_differs, assert_equal, difference
from PIL import Image
from safetensors.torch import load_file, save_file

import minivlm
from minivlm import DeepseekVL2, DeepseekVL2Config, DeepseekVL2Processor, InputError
from minivlm.attention import record_attention
from minivlm.checkpoints.weights import WEIGHTS
from minivlm.cli import main
from minivlm.cli.options import plain
from minivlm.looking.inspection import inspect_answer
from minivlm.looking.measures import attention_rollout
from minivlm.models.load import kind_of
from minivlm.models.protocols import HasTiles
from minivlm.speed.int8 import Int8Linear
from minivlm.text.mla import LatentAttention, MLAConfig
from minivlm.text.moe import MixtureOfExperts, MoEConfig

QUESTIONS = ["what is it?", "what color is the circle?", "what?"]


def noise(seed: int, width: int = 60, height: int = 30) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES: list[Any] = [noise(0), [noise(1), noise(2, 20, 45)], None]  # of three rows


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {form: write_folder(root / form, form) for form in FORMS}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "copied")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise(0).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def edit(path: Path, part: str | None = None, **values: Any) -> None:
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(values)
    path.write_text(json.dumps(config))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_there_and_back(form: str, folders: dict[str, Path], tmp_path: Path) -> None:
    assert kind_of(folders[form]) == "answers"
    model, processor = minivlm.load(folders[form])
    assert isinstance(model, DeepseekVL2)
    assert type(processor) is DeepseekVL2Processor
    tokenizer = processor.tokenizer
    assert (model.config.image_token_id, model.config.pad_token_id) == (tokenizer.image_id, tokenizer.pad_id)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    again, same = minivlm.load(tmp_path)
    assert again.config == model.config
    batch, expected = same(PICTURES, QUESTIONS), processor(PICTURES, QUESTIONS)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    logits = model(**batch).logits
    assert_equal(again(**batch).logits, logits)
    assert_equal(DeepseekVL2.from_pretrained(tmp_path)(**batch).logits, logits)
    different: list[Any] = [noise(7), [noise(1), noise(8, 20, 45)], None]
    others = processor(different, QUESTIONS)
    changed = model(**others).logits[:, -1]
    assert_differs(changed[:2], logits[:2, -1])
    assert_equal(changed[2], logits[2, -1])
    # Padded on the left, a row is what it is alone.
    for row, question in enumerate(QUESTIONS):
        alone = model(**processor([PICTURES[row]], [question])).logits[0]
        assert_equal(logits[row, -len(alone) :], alone)
    written = model.generate(**batch, max_new_tokens=4)
    assert torch.equal(written, DeepseekVL2.from_pretrained(tmp_path).generate(**batch, max_new_tokens=4))


def test_the_config_of_a_published_folder() -> None:
    """In the form of deepseek-vl2-tiny's, which leaves out what is as in the original program."""
    candidates = [[384 * width, 384 * height] for width, height in ((1, 1), (1, 2), (2, 1))]
    tiny = {
        "architectures": ["DeepseekVLV2ForCausalLM"],
        "candidate_resolutions": candidates,
        "global_view_pos": "head",
        "language_config": {
            "architectures": ["DeepseekV2ForCausalLM"],
            "bos_token_id": 0,
            "eos_token_id": 1,
            "first_k_dense_replace": 1,
            "hidden_size": 1280,
            "intermediate_size": 6848,
            "kv_lora_rank": None,
            "lm_head": True,
            "max_position_embeddings": 4096,
            "moe_intermediate_size": 896,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_attention_heads": 10,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 12,
            "num_key_value_heads": 10,
            "q_lora_rank": None,
            "qk_nope_head_dim": 0,
            "qk_rope_head_dim": 0,
            "rm_head": False,
            "topk_group": 1,
            "topk_method": "greedy",
            "torch_dtype": "bfloat16",
            "use_mla": False,
            "v_head_dim": 0,
            "vocab_size": 129280,
        },
        "model_type": "deepseek_vl_v2",
        "projector_config": {"model_type": "mlp_projector", "n_embed": 1280},
        "tile_tag": "2D",
        "vision_config": {
            "layers": 27,
            "mlp_ratio": 3.7362,
            "model_name": "siglip_so400m_patch14_384",
            "model_type": "vision",
            "patch_size": 14,
            "width": 1152,
        },
    }
    config = DeepseekVL2Config.from_dict(tiny)
    sizes = tuple(map(tuple, candidates))
    assert config == DeepseekVL2Config(candidate_resolutions=sizes)
    assert DeepseekVL2Config.from_dict(config.to_dict()) == config
    # The larger ones say nothing of latent attention but that queries have no latent.
    language = {
        **config.text.to_dict(),
        "q_lora_rank": None,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    del language["use_mla"]
    large = DeepseekVL2Config.from_dict({**tiny, "language_config": language}).text
    assert large.mla == MLAConfig(q_lora_rank=None)
    assert large.moe == MoEConfig(scoring_func="sigmoid", topk_method="noaux_tc")


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (None, {"model_type": "deepseek_vl"}, "this class is for 'deepseek_vl_v2'"),
        (None, {"tile_tag": "1D"}, "tile_tag = '1D'; only '2D'"),
        (None, {"tile_tag": None}, "tile_tag = None; only '2D'"),
        (None, {"global_view_pos": "tail"}, "global_view_pos = 'tail'; only 'head'"),
        (None, {"candidate_resolutions": [28, 28]}, r"candidate_resolutions are \[28, 28\]"),
        ("projector_config", {"projector_type": "linear"}, "projector_type = 'linear'"),  # DeepSeek-OCR's
        ("projector_config", {"depth": 3}, "depth = 3; only 2"),
        ("projector_config", {"token_pooling": True}, "token_pooling = True"),
        ("projector_config", {"n_embed": 48}, "n_embed = 48 between parts of widths 24 and 32"),
        ("projector_config", {"input_dim": 48}, "input_dim = 48 between parts"),
        ("vision_config", {"class_token": True}, "class_token = True"),
        ("vision_config", {"global_pool": "avg"}, "global_pool = 'avg'"),
        ("vision_config", {"mlp_ratio": "4"}, "mlp_ratio = '4', expected a number"),
        ("language_config", {"scoring_func": "tanh"}, "scoring_func is 'tanh': only softmax, sigmoid"),
        ("language_config", {"topk_method": "random"}, "topk_method is 'random': only greedy"),
        ("language_config", {"rope_scaling": {"type": "linear", "factor": 2}}, "only 'yarn'"),
    ],
)
def test_configs_that_are_refused(part: str | None, values: dict[str, Any], message: str) -> None:
    config = config_json("latent")
    (config if part is None else config[part]).update(values)
    with pytest.raises(InputError, match=message):
        DeepseekVL2Config.from_dict(config)


def test_a_config_without_its_layout_of_tokens() -> None:
    config = config_json("latent")
    del config["tile_tag"]
    with pytest.raises(InputError, match="has no tile_tag: expected"):
        DeepseekVL2Config.from_dict(config)


@pytest.mark.parametrize(
    ("file", "part", "values", "message"),
    [
        ("processor_config.json", None, {"patch_size": 7}, "the side of a patch is 4 in config.json and 7"),
        (
            "processor_config.json",
            None,
            {"downsample_ratio": 3},
            "beside each other in a token is 2 in config",
        ),
        (
            "processor_config.json",
            None,
            {"candidate_resolutions": [[28, 28]]},
            "candidate_resolutions in config.json are not those in processor_config.json",
        ),
        (
            "config.json",
            "vision_config",
            {"image_size": 32},
            "the side of a tile is 32 in config.json and 28",
        ),
        ("config.json", "language_config", {"vocab_size": 200}, "the model knows only 200 tokens"),
        (
            "config.json",
            "language_config",
            {"use_mla": False},
            r"missing: language\.model\.layers\.0\.self_attn\.k",
        ),
        ("config.json", "language_config", {"n_routed_experts": 12}, r"missing: .*experts\.8\.gate_proj"),
        (
            "config.json",
            "language_config",
            {"topk_method": "greedy"},
            "unexpected: .*e_score_correction_bias",
        ),
    ],
)
def test_files_that_do_not_fit(
    file: str, part: str | None, values: dict[str, Any], message: str, copied: Path
) -> None:
    edit(copied / file, part, **values)
    with pytest.raises(InputError, match=message):
        minivlm.load(copied)


def test_weights_of_a_published_folder(copied: Path) -> None:
    """The pooling head of the tower came with it and is not read; what nobody knows is refused."""
    tensors = load_file(copied / WEIGHTS)
    save_file(tensors | {"vision.attn_pool.latent": torch.ones(1, 1, 24)}, copied / WEIGHTS)
    minivlm.load(copied)
    save_file(tensors | {"vision.mystery": torch.ones(1)}, copied / WEIGHTS)
    with pytest.raises(InputError, match=r"1 unexpected: vision\.mystery"):
        minivlm.load(copied)


def test_the_ids_of_controls_are_the_tokenizers(copied: Path) -> None:
    edit(copied / "config.json", "language_config", eos_token_id=7, bos_token_id=None)
    model, processor = minivlm.load(copied)
    assert model.config.eos_token_id == processor.tokenizer.eos_id
    assert model.config.bos_token_id == processor.tokenizer.bos_id


# Commands


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:Glyph")  # random weights write control characters
def test_the_commands(
    form: str, folders: dict[str, Path], picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders[form]
    answer = minivlm.answer(picture, "what is it?", minivlm.load(folder), max_new_tokens=4)
    short = ["--prompt", "what is it?", "--max-new-tokens", "4", "--model", str(folder)]
    assert main(["ask", str(picture), *short]) == 0
    assert capsys.readouterr().out == plain(f"{picture} | what is it?\n{answer}\n")
    assert main(["look", str(picture), *short, "--out", str(tmp_path / "look")]) == 0
    assert "no words.png: 57 image tokens of no place" in capsys.readouterr().out
    assert len(list((tmp_path / "look").iterdir())) == 8
    if form == "latent":
        assert main(["eval", "--scenes", "1", "--columns", "held_out", "--json", "--model", str(folder)]) == 0


def test_finetuning(copied: Path, picture: Path, tmp_path: Path) -> None:
    """With tower and decoder frozen, what lies between them learns."""
    lines = [{"image": picture.name, "prefix": "what is it?", "suffix": "a red star"}] * 2
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "tuned"
    arguments = ["--data", str(tmp_path / "data.jsonl"), "--model", str(copied), "--out", str(out)]
    arguments += ["--steps", "1", "--no-bf16", "--freeze", "tower", "--freeze", "decoder", "--workers", "0"]
    assert main(["finetune", *arguments, "--lr", "0.1"]) == 0
    before, after = (load_file(place / WEIGHTS) for place in (copied, out))
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"projector", "image_newline", "view_seperator"}
    model, processor = minivlm.load(out)
    assert len(model.generate(**processor([picture], QUESTIONS[:1]), max_new_tokens=2)) == 1


@torch.no_grad()
def test_int8(folders: dict[str, Path]) -> None:
    """Experts are rounded; who is chosen, and what is absorbed, is not."""
    model, processor = minivlm.load(folders["latent"], quantize="int8")
    exact, _ = minivlm.load(folders["latent"])
    block = model.language_model.layers[1]
    assert isinstance(block.self_attn, LatentAttention)
    assert isinstance(block.mlp, MixtureOfExperts)
    assert block.mlp.gate.weight.dtype == block.self_attn.kv_b_proj.weight.dtype == torch.float32
    assert isinstance(block.mlp.experts[0].up_proj, Int8Linear)
    batch = processor(PICTURES, QUESTIONS)
    median = (model(**batch).logits - exact(**batch).logits).abs().median()
    assert 1e-4 < median < 0.2


# The inside


@torch.no_grad()
def test_where_tokens_are(folders: dict[str, Path]) -> None:
    """60 x 30 pixels fill two tiles, and the middle of the view of the whole: rows 7 to 20 of its 28."""
    model, processor = minivlm.load(folders["heads"])
    assert isinstance(model, HasTiles)
    places = model.places_of_tokens(processor.pixels([noise(0)]))
    assert places.shape == (57, 49)
    assert places[4].sum() == places[20].sum() == places[29].sum() == 0  # newlines and the separator
    assert int((places.sum(dim=1) == 1).sum()) == 16 + 32
    grid = places.view(57, 7, 7)
    assert grid[0, :2, :2].eq(0.25).all()  # four patches in one token,
    assert grid[3, :2, 6].eq(0.5).all()  # two,
    assert grid[18, 6, 6] == 1  # and one
    tiles = grid[21:].view(4, 9, 7, 7)  # of eight tokens and a newline
    found = [[divmod(int(token.flatten().argmax()), 7) for token in row[:8]] for row in tiles]
    assert found[0] == [(2, column) for column in (0, 1, 2, 3, 4, 5, 6, 6)]
    assert [row[0][0] for row in found] == [2, 3, 4, 5]


@torch.no_grad()
def test_the_inside(folders: dict[str, Path]) -> None:
    """Maps are those of the view of the whole, to which tiles add what is seen of the same places."""
    model, processor = minivlm.load(folders["latent"])
    seen = inspect_answer(model, processor, noise(0), "what is it?", max_new_tokens=3)
    words = len(seen.words)
    assert seen.tower is not None
    assert seen.attention is not None
    assert seen.rollout is not None
    assert seen.tower.shape == (2, 4, 49, 49)
    assert seen.attention.shape == (words, 3, 4, 49)
    pixels = processor.pixels([noise(0)])
    with record_attention() as maps:
        tokens = model.encode_image(**pixels)
    assert seen.image_tokens is not None
    assert torch.equal(seen.image_tokens, tokens)
    assert [layer.shape for layer in maps] == [(3, 4, 49, 49)] * 2
    assert torch.equal(seen.tower, torch.stack([layer[0] for layer in maps]))
    ids = processor.make_room(processor.encode_row("what is it?"), [noise(0)]).ids
    written = model.generate(**processor(noise(0), "what is it?"), max_new_tokens=3)[0].tolist()
    row = torch.tensor([[*ids, *written]])[:, : len(ids) + words]
    with record_attention() as reading:
        model(row, **pixels)
    is_image = row[0] == processor.tokenizer.image_id
    decoder = attention_rollout(reading[2:])[0, len(ids) - 1 : -1][:, is_image]
    expected = decoder @ model.places_of_tokens(pixels) @ attention_rollout([layer[:1] for layer in maps])[0]
    torch.testing.assert_close(seen.rollout, expected)
    # What is hidden is hidden from tiles as well.
    hidden = seen.pixel_values.clone()
    hidden[:, 7:14, :14] = 0
    odds = seen.sureness(torch.stack([seen.pixel_values, hidden]))
    assert odds.diff().abs() > 1e-4
    assert difference(odds[:1], seen.sureness(seen.pixel_values[None])) < 1e-5
