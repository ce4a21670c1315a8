"""The model of docs/live in Chromium, against the package: pictures, ids, tensors and answers.

What is right is computed here, when the tests run, and stored nowhere. Tensors are compared, and not answers
alone: most mistakes in a model do not change its answers.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PATIENCE
from notebooks_and_sources import ROOT
from PIL import Image
from playwright.sync_api import Browser, Page
from torch import Tensor, nn

from minivlm import masks
from minivlm.attention import record_attention
from minivlm.layers import RMSNorm
from minivlm.looking.inspection import inspect_answer
from minivlm.looking.measures import occlusion
from minivlm.models.load import load_answering
from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Processor
from minivlm.processing.boxes import text_to_boxes
from minivlm.processing.codebook import load_codebook
from minivlm.world.questions import TASKS, ask
from minivlm.world.scenes import Scene, Thing, make_scene

sys.path.insert(0, str(ROOT / "docs"))
from live.build import as_plain, write_live

# Loaded once for a page; tensors go home as lists, those of several heads one after the other.
START = """() => {
  window.live = load_checkpoint(CHECKPOINT);
  window.home = (value) => Array.isArray(value) ? value.flatMap(home) : Array.from(value.data);
}"""
RUN = """({scene, prompt, breaks, steps}) => {
  const {model, tokenizer, image_processor} = live, seen = {};
  const pixel_values = to_pixel_values(draw_scene(scene), image_processor);
  const record = (name, value) => { if (!name.endsWith("qkv") && !(name in seen)) seen[name] = home(value); };
  record("pixel_values", pixel_values);
  const ids = tokenizer.encode_prefix(prompt, 64, breaks);
  const answer = [...model.stream(ids, pixel_values, {record, breaks, max_new_tokens: steps})];
  const logits = answer.map((word) => Array.from(word.logits));
  return {ids, seen, logits, answer: answer.map((word) => word.token_id)};
}"""


@pytest.fixture(scope="module")
def engine(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page's scripts with the shipped model."""
    folder = tmp_path_factory.mktemp("live")
    write_live(folder)
    page = chromium.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto((folder / "index.html").as_uri())
    page.evaluate(START)
    yield page
    page.close()


@pytest.fixture(scope="module")
def shipped() -> tuple[PaliGemma, Processor]:
    torch.set_num_threads(1)
    model, processor = load_answering()
    assert isinstance(model, PaliGemma)
    assert isinstance(processor, Processor)
    return model, processor


def scene_number(number: int) -> Scene:
    scene = make_scene(np.random.default_rng([2027, number]), "test")
    return replace(scene, noise=0.0)


def prompts_about(scene: Scene, number: int, tasks: tuple[str, ...] = TASKS) -> list[str]:
    rng = np.random.default_rng([2028, number])
    return [example.prefix for task in tasks if (example := ask(scene, task, rng)) is not None]


def assert_near(found: Any, wanted: Tensor, name: str, part: float = 1e-5) -> None:
    """To a part of the largest value."""
    numbers = torch.tensor(found).view(wanted.shape)
    off = float((numbers - wanted).abs().max() / wanted.abs().max())
    assert off <= part, f"{name} is off by {off:.1e} of its largest value"


# ---- pictures and words ------------------------------------------------------------------------------------


def odd_scene(seed: int) -> Scene:
    """As an editor allows: things beyond the edge, on each other, of any size."""
    rng = random.Random(seed)
    shapes = ("circle", "square", "triangle", "star")
    things = tuple(
        Thing(
            rng.choice(shapes),
            "red",
            "large",
            rng.choice([rng.uniform(-5, 69), float(rng.randrange(65))]),
            rng.choice([rng.uniform(-5, 69), rng.randrange(257) / 4]),
            rng.choice([rng.uniform(2, 30), float(rng.randrange(4, 20))]),
            (rng.randrange(256), rng.randrange(256), rng.randrange(256)),
        )
        for _ in range(rng.randrange(6))
    )
    return Scene(things, rng.randrange(256), 0.0, 0)


@pytest.mark.parametrize("make", [scene_number, odd_scene])
def test_scenes_are_drawn_bit_for_bit(make: Callable[[int], Scene], engine: Page) -> None:
    for number in range(150):
        scene = make(number)
        drawn = engine.evaluate("(scene) => Array.from(draw_scene(scene).data)", as_plain(scene))
        unequal = np.asarray(scene.draw()).ravel() != np.array(drawn, dtype=np.uint8)
        assert not unequal.any(), f"scene {number}: {unequal.sum()} of {unequal.size} numbers"


def test_boxes_of_things(engine: Page) -> None:
    for thing in scene_number(0).things + scene_number(1).things:
        plain = as_plain(Scene((thing,), 0, 0.0, 0))["things"][0]
        assert engine.evaluate("(thing) => box_of(thing)", plain) == pytest.approx(thing.box)


@pytest.mark.parametrize("size", [(64, 64), (200, 130), (31, 97), (64, 128), (1, 3)])
def test_uploads_are_resized_as_pillow_does(size: tuple[int, int], engine: Page) -> None:
    noise = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = {"width": size[0], "height": size[1], "data": noise.ravel().tolist()}
    found = engine.evaluate("(picture) => Array.from(resize(picture, 64).data)", picture)
    image = Image.fromarray(noise)
    # In two steps, since versions of Pillow begin in different directions, and round between them.
    wanted = image.resize((64, size[1]), Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(np.array(found), np.asarray(wanted).ravel())


def odd_texts() -> list[str]:
    rng = random.Random(0)
    pieces = [
        *(
            "red",
            "circle",
            " ",
            "  ",
            "\n",
            "<bos>",
            "<image>",
            "<eos>",
            "<pad>",
            "<unk>",
            "<loc0012>",
            "<loc12>",
        ),
        *(
            "<loc1024>",
            "<seg003>",
            "▁",
            "é",
            "e\u0301",
            "\u0301",
            "東京",
            "😀",
            "👩‍👩‍👧",
            "ß",
            "İ",
            "\t",
            "\u00a0",
        ),
        *(
            "x",
            "Q",
            "7",
            ".",
            "?",
            "'",
            '"',
            "<script>",
            "</script>",
            "&amp;",
            "\u200d",
            "ﬁ",
            "𝒳",
            "हिन्दी",
            "\0",
        ),
    ]
    return ["", *pieces, *("".join(rng.choices(pieces, k=rng.randrange(1, 9))) for _ in range(300))]


def test_ids_are_those_of_the_tokenizer(engine: Page, shipped: tuple[PaliGemma, Processor]) -> None:
    _, processor = shipped
    texts = odd_texts() + [p for i in range(20) for p in prompts_about(scene_number(i), i)]
    found = engine.evaluate("(texts) => texts.map((text) => live.tokenizer.encode(text))", texts)
    for text, ids in zip(texts, found, strict=True):
        assert ids == processor.tokenizer.encode(text), repr(text)
    rows = engine.evaluate("(texts) => texts.map((text) => live.tokenizer.encode_prefix(text, 64))", texts)
    assert rows == [processor.tokenizer.encode_prefix(text, 64) for text in texts]


def test_words_of_ids(engine: Page, shipped: tuple[PaliGemma, Processor]) -> None:
    _, processor = shipped
    rng = random.Random(1)
    rows = [[i] for i in range(1600)] + [[rng.randrange(1600) for _ in range(9)] for _ in range(300)]
    found = engine.evaluate("(rows) => rows.map((ids) => live.tokenizer.decode(ids))", rows)
    assert found == [processor.tokenizer.decode(ids) for ids in rows]


def test_boxes_in_answers(engine: Page) -> None:
    rng = random.Random(2)
    parts = [
        "<loc0100>",
        "<loc0900>",
        "<loc0500>",
        "<loc1023>",
        "<loc1024>",
        "<seg001>",
        " red star",
        " ; ",
        ";",
        "\n",
    ]
    whole = "<loc0100><loc0200><loc0300><loc0400>"
    texts = [
        "",
        "none",
        f"{whole} red star",
        f"{whole} a ; {whole}<seg001><seg002> b",
        *("".join(rng.choices([*parts, whole], k=rng.randrange(1, 9))) for _ in range(300)),
    ]
    code = (
        "(texts) => texts.map((t) => text_to_boxes(t, 64, 48).map((b) => [b.x0, b.y0, b.x1, b.y1, b.name]))"
    )
    for text, found in zip(texts, engine.evaluate(code, texts), strict=True):
        assert [tuple(box) for box in found] == [tuple(box) for box in text_to_boxes(text, 64, 48)], repr(
            text
        )


# ---- tensors -----------------------------------------------------------------------------------------------


@contextmanager
def outputs_of(model: PaliGemma) -> Iterator[dict[str, Tensor]]:
    """What leaves each block, by the name that the page gives it."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: kept.__setitem__(name, output[0])

    tower, decoder = model.vision_tower, model.language_model
    named = {"vision_tower": tower, "vision_tower.embeddings": tower.embeddings}
    named |= {"image_features": model.multi_modal_projector}
    named |= {f"vision_tower.layers.{i}": layer for i, layer in enumerate(tower.layers)}
    named |= {f"language_model.layers.{i}": layer for i, layer in enumerate(decoder.layers)}
    for whole, layers, norms in (
        ("vision_tower", tower.layers, ("layer_norm1", "layer_norm2")),
        ("language_model", decoder.layers, ("input_layernorm", "post_attention_layernorm")),
    ):
        parts = (*norms, "self_attn", "mlp")
        named |= {
            f"{whole}.layers.{i}.{part}": getattr(x, part) for i, x in enumerate(layers) for part in parts
        }
    hooks = [module.register_forward_hook(keep(name)) for name, module in named.items()]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def golden(model: PaliGemma, processor: Processor, scene: Scene, prompt: str, steps: int) -> dict[str, Any]:
    """The same as RUN gives: every word is read anew in one pass, with no cache."""
    inputs = processor([scene.draw()], [prompt])
    ids = inputs["input_ids"][0].tolist()
    with outputs_of(model) as seen, record_attention() as maps:
        logits = [model(**inputs).logits[0, -1]]
    seen["pixel_values"] = inputs["pixel_values"][0]
    layers = len(model.vision_tower.layers)
    for number, one in enumerate(maps):
        where = f"vision_tower.layers.{number}"
        if number >= layers:
            where = f"language_model.layers.{number - layers}"
        seen[f"{where}.self_attn.weights"] = one[0]
    answer = [int(logits[0].argmax())]
    types = inputs["token_type_ids"]
    while len(answer) < steps and answer[-1] != model.config.eos_token_id:
        words = torch.tensor([answer])
        row = torch.cat([inputs["input_ids"], words], dim=1)
        output = model(row, inputs["pixel_values"], None, torch.cat([types, torch.ones_like(words)], dim=1))
        logits.append(output.logits[0, -1])
        answer.append(int(logits[-1].argmax()))
    return {"ids": ids, "seen": seen, "logits": logits, "answer": answer}


@pytest.mark.parametrize("number", range(6))
def test_tensors(number: int, engine: Page, shipped: tuple[PaliGemma, Processor]) -> None:
    scene = scene_number(number)
    prompts = prompts_about(scene, number)
    prompt = prompts[number % len(prompts)]
    wanted = golden(*shipped, scene, prompt, steps=8)
    found = engine.evaluate(RUN, {"scene": as_plain(scene), "prompt": prompt, "breaks": {}, "steps": 8})
    assert found["ids"] == wanted["ids"]
    names = set(wanted["seen"])
    assert names == set(found["seen"]) - {"language_model.embeddings"}
    assert len(names) == 2 + 2 + 3 * 6 + 4 * 6
    for name in names:
        assert_near(found["seen"][name], wanted["seen"][name], f"{prompt!r}: {name}")
    assert found["answer"] == wanted["answer"]
    for step, logits in enumerate(wanted["logits"]):
        off = float((torch.tensor(found["logits"][step]) - logits).abs().max())
        assert off <= 1e-4, f"{prompt!r}: logits of word {step} are off by {off:.1e}"


def test_norms_of_small_vectors(engine: Page) -> None:
    """Where eps counts: a wrong one hardly shows in the tensors of the model."""
    x = 1e-3 * torch.randn(3, 128, generator=torch.manual_seed(0))
    weight, bias = torch.randn(128), torch.randn(128)
    code = """([x, weight, bias]) => {
      const tensor = (list, ...shape) => new Tensor(Float32Array.from(list), ...shape);
      const [a, w, b] = [tensor(x, 3, 128), tensor(weight, 128), tensor(bias, 128)];
      const {text_config, vision_config} = live.model.config;
      const rms = rms_norm(a, w, text_config.rms_norm_eps);
      return [rms, layer_norm(a, w, b, vision_config.layer_norm_eps)].map(home);
    }"""
    rms, layer = engine.evaluate(code, [x.flatten().tolist(), weight.tolist(), bias.tolist()])
    gemma = RMSNorm(128, 1e-6)
    gemma.weight.data = weight
    assert_near(rms, gemma(x).detach(), "rms_norm")
    assert_near(layer, F.layer_norm(x, (128,), weight, bias, 1e-6), "layer_norm")


def test_answers_to_a_hundred_prompts(engine: Page, shipped: tuple[PaliGemma, Processor]) -> None:
    model, processor = shipped
    asked = [
        (scene, prompt)
        for i in range(14)
        for scene in [scene_number(i)]
        for prompt in prompts_about(scene, i)
    ]
    assert len(asked) >= 100
    asked = asked[:100]
    code = """(asked) => asked.map(({scene, prompt}) => {
      const pixel_values = to_pixel_values(draw_scene(scene), live.image_processor);
      const words = [...live.model.stream(live.tokenizer.encode_prefix(prompt, 64), pixel_values)];
      return live.tokenizer.decode(words.map((word) => word.token_id));
    })"""
    found = engine.evaluate(code, [{"scene": as_plain(scene), "prompt": prompt} for scene, prompt in asked])
    inputs = processor([scene.draw() for scene, _ in asked], [prompt for _, prompt in asked])
    wanted = processor.decode(model.generate(**inputs))
    assert found == wanted


# ---- what is broken on purpose -----------------------------------------------------------------------------


def broken(model: PaliGemma, breaks: dict[str, Any]) -> PaliGemma:
    """A copy of the model in which a part is gone, where the part is a weight."""
    model = copy.deepcopy(model)
    if "no_tower_positions" in breaks:
        model.vision_tower.embeddings.position_embedding.weight.data.zero_()
    if "head_off" in breaks:
        layer, head = breaks["head_off"]["layer"], breaks["head_off"]["head"]
        model.language_model.layers[layer].self_attn.o_proj.weight.data[:, 32 * head : 32 * (head + 1)] = 0
    return model


@torch.no_grad()
def broken_logits(
    model: PaliGemma, processor: Processor, scene: Scene, prompt: str, breaks: dict[str, Any]
) -> Tensor:
    """Logits of the first word, put together from the package's parts."""
    inputs = processor([scene.draw()], [prompt])
    ids = inputs["input_ids"][:, :-1] if "no_newline" in breaks else inputs["input_ids"]
    model = broken(model, breaks)
    features = model.encode_image(inputs["pixel_values"])
    if "no_projector" in breaks:
        features = F.pad(model.vision_tower(inputs["pixel_values"]), (0, 128 - 96))
    embeds = model.merge(ids, features)
    if "words_not_scaled" in breaks:
        embeds[:, 64:] /= 128**0.5
    positions = torch.arange(ids.shape[1])[None]
    prefix = torch.tensor([0 if "causal_mask" in breaks else ids.shape[1]])
    mask = masks.prefix_lm(positions, positions, prefix)
    if "no_rope" in breaks:
        positions = positions * 0
    return model.logits(model.language_model(embeds, positions, mask[:, None]))[0, -1]


BREAKS: list[dict[str, Any]] = [
    *(
        {name: True}
        for name in (
            "no_newline",
            "causal_mask",
            "no_rope",
            "no_tower_positions",
            "no_projector",
            "words_not_scaled",
        )
    ),
    {"head_off": {"layer": 0, "head": 0}},
    {"head_off": {"layer": 3, "head": 2}},
    {"no_rope": True, "causal_mask": True, "head_off": {"layer": 1, "head": 3}},
]


@pytest.mark.parametrize("breaks", BREAKS, ids=lambda breaks: "+".join(breaks))
def test_breaks(breaks: dict[str, Any], engine: Page, shipped: tuple[PaliGemma, Processor]) -> None:
    scene = scene_number(7)
    prompt = prompts_about(scene, 7, ("color",))[0]
    asked = {"scene": as_plain(scene), "prompt": prompt, "breaks": breaks, "steps": 1}
    found = torch.tensor(engine.evaluate(RUN, asked)["logits"][0])
    wanted = broken_logits(*shipped, scene, prompt, breaks)
    assert float((found - wanted).abs().max()) <= 1e-4
    whole = broken_logits(*shipped, scene, prompt, {})
    assert float((wanted - whole).abs().max()) > 0.1, "nothing is broken"


def test_outlines(engine: Page) -> None:
    codes = torch.randint(0, 128, (5, 16), generator=torch.manual_seed(0))
    found = engine.evaluate("(all) => all.map((one) => Array.from(codebook.decode(one)))", codes.tolist())
    assert_near(found, load_codebook().decode(codes).detach(), "masks")


def test_lens(engine: Page, shipped: tuple[PaliGemma, Processor]) -> None:
    """What each layer would say, at the writers of all words of an answer."""
    model, processor = shipped
    scene = scene_number(1)
    prompt = prompts_about(scene, 1, ("detect",))[0]
    wanted = golden(model, processor, scene, prompt, steps=4)
    code = """({scene, prompt}) => {
      const {model, tokenizer, image_processor} = live, trace = new Trace();
      const pixel_values = to_pixel_values(draw_scene(scene), image_processor);
      const ids = tokenizer.encode_prefix(prompt, 64);
      for (const _ of model.stream(ids, pixel_values, {record: trace.record, max_new_tokens: 4}));
      const lens = (token) => trace.lens(model, token).map((shares) => Array.from(shares));
      return [0, 1, 2, 3].map((i) => lens(ids.length - 1 + i));
    }"""
    found = torch.tensor(engine.evaluate(code, {"scene": as_plain(scene), "prompt": prompt}))
    assert_near(found[:, -1].tolist(), torch.stack(wanted["logits"]).softmax(dim=-1), "the last layer", 1e-4)
    decoder = model.language_model
    for layer in range(3):
        state = wanted["seen"][f"language_model.layers.{layer}"][-1]
        shares = decoder.logits(decoder.norm(state)).softmax(dim=-1).detach()
        assert_near(found[0, layer + 1].tolist(), shares, f"layer {layer}", 1e-4)


def test_occlusion(engine: Page, shipped: tuple[PaliGemma, Processor]) -> None:
    model, processor = shipped
    scene = scene_number(3)
    prompt = prompts_about(scene, 3, ("detect",))[0]
    seen = inspect_answer(model, processor, scene.draw(), prompt)
    wanted = occlusion(seen.sureness, seen.pixel_values, patch_size=8)
    code = """({scene, prompt}) => {
      const {model, tokenizer, image_processor} = live;
      const pixel_values = to_pixel_values(draw_scene(scene), image_processor);
      const ids = tokenizer.encode_prefix(prompt, 64);
      const answer = [...model.stream(ids, pixel_values)].map((word) => word.token_id);
      return [...occlusion(model, ids, answer.slice(0, -1), pixel_values)];
    }"""
    found = engine.evaluate(code, {"scene": as_plain(scene), "prompt": prompt})
    assert_near(found, wanted, "occlusion", part=1e-4)
