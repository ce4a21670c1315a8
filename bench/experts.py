"""What do the experts of a small mixture divide among themselves, and what does the balancing loss do?

Run: python bench/experts.py --out bench/results/experts.txt --json minivlm/assets/experts.json

A decoder as DeepSeek-VL2's (latent attention; in each of four layers four experts, two for a token, and a
shared one) learns to answer questions about drawn scenes, once with the balancing loss and once without it,
from the same start. The shipped image tower is frozen. Three seeds. Measured on held-out scenes:

    loss         of the answers
    load         the share of all choices, two for a token, that fall on an expert
    information  in bits, how much a token's first choice tells about its kind (KINDS)
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from minivlm import load, masks
from minivlm.processing import Processor
from minivlm.processing.inputs import IGNORE
from minivlm.text.deepseek_v2 import DeepseekV2Config, DeepseekV2Decoder
from minivlm.text.mla import MLAConfig
from minivlm.text.moe import MoEConfig, balancing_loss, record_routing
from minivlm.training.muon import Muon
from minivlm.vision.siglip import SiglipVisionModel
from minivlm.world.batches import Batch, SceneBatches
from minivlm.world.demo import sample_scene
from minivlm.world.questions import ask
from minivlm.world.rows import PADDING, pack_rows

SEEDS = (0, 1, 2)
STEPS, PICTURES, QUESTIONS, ROW = 120, 8, 5, 56
MEASURED = 12  # batches
ALPHA = 0.01  # how much balance counts
MOE = MoEConfig(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, n_shared_experts=1)
TEXT = DeepseekV2Config(
    hidden_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=1598,
    tie_word_embeddings=True,
    mla=MLAConfig(kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24),
    moe=MOE,
)
VARIANTS = {"with balancing": ALPHA, "without balancing": 0.0}
KINDS = ("ground", "circle", "square", "triangle", "star", "question", "answer", "place", "outline", "end")
SHOWN = 2  # number of the sample scene whose routes are stored

Views = list[tuple[Batch, Tensor]]  # with what the tower makes of the pictures


class Answerer(nn.Module):
    """What stands behind the frozen tower: a projector and a decoder."""

    def __init__(self, config: DeepseekV2Config, vision_width: int) -> None:
        super().__init__()
        self.projector = nn.Linear(vision_width, config.hidden_size)
        self.decoder = DeepseekV2Decoder(config)

    def forward(self, batch: Batch, patches: Tensor) -> Tensor:
        """Hidden states of image and text [R, N + T, D]. Questions of a row do not see each other."""
        image = self.projector(patches)[batch.pictures]
        x = torch.cat([image, self.decoder.embed(batch.input_ids)], dim=1)
        places = torch.arange(image.shape[1]).expand(len(image), -1)
        blocks = torch.cat([torch.zeros_like(places), batch.blocks], dim=1)
        position_ids = torch.cat([places, image.shape[1] + batch.position_ids], dim=1)
        mask = masks.block_diagonal(blocks, blocks) | (blocks == 0)[:, None]
        return self.decoder(x, position_ids, (mask & masks.causal(position_ids, position_ids))[:, None])

    def loss(self, batch: Batch, patches: Tensor) -> Tensor:
        """The weighted mean over the tokens of the answers."""
        told = self(batch, patches)[:, patches.shape[1] : -1]
        counts = batch.labels[:, 1:] != IGNORE
        logits, weights = self.decoder.logits(told[counts]), batch.weights[:, 1:][counts]
        return (F.cross_entropy(logits, batch.labels[:, 1:][counts], reduction="none") * weights).sum() / (
            weights.sum()
        )


@torch.no_grad()
def prepare(batches: Dataset[Batch], count: int, tower: SiglipVisionModel) -> Views:
    """Batches with what the frozen tower makes of their pictures."""
    drawn = [batches[number] for number in range(count)]
    return [(batch, tower(batch.pixel_values)) for batch in drawn]


def build(seed: int, vision_width: int) -> Answerer:
    """A decoder that has not learned anything."""
    torch.manual_seed(seed)
    return Answerer(TEXT, vision_width)


def train(model: Answerer, views: Views, alpha: float) -> None:
    """Muon for the matrices of linear layers, AdamW for all others, gates among them."""
    linear = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear)}
    matrices = [weight for weight in model.parameters() if id(weight) in linear]
    others = [weight for weight in model.parameters() if id(weight) not in linear]
    optimizers = [Muon(matrices, lr=0.02, weight_decay=0.02), torch.optim.AdamW(others, lr=3e-3)]
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    for step, view in enumerate(views):
        with record_routing() as routings:
            loss = model.loss(*view)
        for routing in routings:
            loss = loss + alpha * balancing_loss(routing)
        loss.backward()
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / 20, 3 * (1 - step / len(views)))
            optimizer.step()
            optimizer.zero_grad()


def kinds_of(batch: Batch, processor: Processor) -> Tensor:
    """The number in KINDS of each token of image and text, -1 for padding: [R, N + T]."""
    tokenizer, ids = processor.tokenizer, batch.input_ids
    vocabulary = tokenizer.backend.get_vocab()
    text = torch.where(batch.token_type_ids == 1, KINDS.index("answer"), KINDS.index("question"))
    for kind, first, count in (("place", "<loc0000>", 1024), ("outline", "<seg000>", 128)):
        text[(ids >= vocabulary[first]) & (ids < vocabulary[first] + count)] = KINDS.index(kind)
    text[ids == tokenizer.eos_id] = KINDS.index("end")
    text[batch.blocks == PADDING] = -1
    return torch.cat([batch.patch_shape[batch.pictures], text], dim=1)


def information(kinds: Tensor, experts: Tensor) -> float:
    """In bits, what the numbers of experts [n] tell about the kinds of tokens [n]."""
    table = torch.zeros(len(KINDS), MOE.n_routed_experts)
    table.index_put_((kinds, experts), torch.ones(len(kinds)), accumulate=True)
    joint = table / table.sum()
    apart = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
    return torch.xlogy(joint, joint / apart.clamp(min=1e-12)).sum().item() / math.log(2)


def table_of(kinds: Tensor, experts: Tensor) -> list[list[float]]:
    """For each kind, the shares of its tokens whose first choice each expert is."""
    rows = [experts[kinds == number].bincount(minlength=MOE.n_routed_experts) for number in range(len(KINDS))]
    return [(row / max(1, int(row.sum()))).tolist() for row in rows]


@torch.no_grad()
def measure(model: Answerer, views: Views, processor: Processor) -> dict[str, Any]:
    """Loss, and for each layer with experts what its choices are."""
    losses, kinds, chosen = [], [], []
    for batch, patches in views:
        with record_routing() as routings:
            losses.append(model.loss(batch, patches).item())
        kinds.append(kinds_of(batch, processor).flatten())
        chosen.append([routing.experts.flatten(0, 1) for routing in routings])
    real = torch.cat(kinds) >= 0
    of_layers = [torch.cat(layer)[real] for layer in zip(*chosen, strict=True)]
    of_tokens = torch.cat(kinds)[real]
    return {
        "loss": mean(losses),
        "load": [(layer.flatten().bincount(minlength=4) / layer.numel()).tolist() for layer in of_layers],
        "information": [information(of_tokens, layer[:, 0]) for layer in of_layers],
        "kinds": [table_of(of_tokens, layer[:, 0]) for layer in of_layers],
    }


@torch.no_grad()
def routes(model: Answerer, batch: Batch, patches: Tensor) -> list[list[int]]:
    """The first choice of each token of one row, for each layer with experts."""
    with record_routing() as routings:
        model(batch, patches)
    return [routing.experts[0, :, 0].tolist() for routing in routings]


def shown(processor: Processor) -> Batch:
    """One picture and three questions about it."""
    scene, _ = sample_scene(SHOWN)
    rng = np.random.default_rng(0)
    asked = [example for task in ("shape", "detect", "caption") if (example := ask(scene, task, rng))]
    labels = {
        f"patch_{name}": torch.from_numpy(values)[None] for name, values in scene.patch_labels(8).items()
    }
    return Batch(
        pixel_values=processor.image_processor([scene.draw(64)]),
        pictures=torch.tensor([0]),
        **labels,
        **pack_rows(processor.tokenizer, [asked]),
    )


def run(seed: int, steps: int = STEPS, measured: int = MEASURED) -> dict[str, Any]:
    """What is measured, for each variant and before training; and the routes through one picture."""
    paligemma, processor = load()
    tower = paligemma.vision_tower
    draw = partial(
        SceneBatches,
        processor,
        tower.config.patch_size,
        pictures=PICTURES,
        questions=QUESTIONS,
        row_tokens=ROW,
    )
    drawn, held_out = draw(seed=seed, steps=steps), draw(seed=1000 + seed, steps=measured)
    learned, asked = prepare(drawn, steps, tower), prepare(held_out, measured, tower)
    batch = shown(processor)
    with torch.no_grad():
        view = batch, tower(batch.pixel_values)
    found: dict[str, Any] = {"variants": {}, "routes": {}}
    for name, alpha in VARIANTS.items():
        model = build(seed, tower.config.hidden_size)
        if not found["variants"]:
            found["variants"]["untrained"] = measure(model, asked, processor)
            found["routes"]["untrained"] = routes(model, *view)
        train(model, learned, alpha)
        found["variants"][name] = measure(model, asked, processor)
        found["routes"][name] = routes(model, *view)
    words = [processor.tokenizer.backend.id_to_token(number) for number in batch.input_ids[0].tolist()]
    found["words"] = [word.replace("\u2581", " ") for word in words]
    return found


def as_text(results: Sequence[dict[str, Any]]) -> str:
    """A line for each variant: means over seeds, and in brackets the least and the most."""
    lines = ["| decoder | loss | information, bits, by layer | least and largest load |", "|---|---|---|---|"]
    for name in results[0]["variants"]:
        of_seeds = [found["variants"][name] for found in results]
        losses = [one["loss"] for one in of_seeds]
        cells = [f"{mean(losses):.2f} ({min(losses):.2f} to {max(losses):.2f})"]
        by_layer = zip(*(one["information"] for one in of_seeds), strict=True)
        cells.append(", ".join(f"{mean(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in by_layer))
        loads = [share for one in of_seeds for layer in one["load"] for share in layer]
        cells.append(f"{min(loads):.3f} to {max(loads):.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{STEPS} steps of {PICTURES} pictures, {len(results)} seeds"])


def rounded(value: Any) -> Any:
    """Numbers with three decimals, in whatever they lie."""
    if isinstance(value, dict):
        return {name: rounded(inside) for name, inside in value.items()}
    if isinstance(value, list):
        return [rounded(inside) for inside in value]
    return round(value, 3) if isinstance(value, float) else value


def main() -> None:
    """Train, measure, and write the table and all numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--out", type=Path, help="a file for the table")
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for seed in options.seeds:
        results.append(rounded(run(seed)))
        print(as_text(results), flush=True)
        if options.out:
            options.out.write_text(as_text(results) + "\n", encoding="utf-8")
        if options.json:
            stored = {"kinds": KINDS, "seeds": results}
            options.json.write_text(json.dumps(stored) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
