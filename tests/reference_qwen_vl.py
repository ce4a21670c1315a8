"""Print the numbers that tests/qwen_vl.py stores, from the program that Qwen published.

Run: python tests/reference_qwen_vl.py FOLDER

FOLDER holds configuration_qwen.py, modeling_qwen.py, qwen_generation_utils.py and visual.py of a published
folder of Qwen-VL, and has a name without "-" and ".". They need torchvision and einops, and were written for
transformers 4: what is missing today is put back here. The weights depend on their names alone, so the tests
make the same ones without that program.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from made_up import made_up, noise

VISUAL = {
    "width": 24,
    "layers": 2,
    "heads": 2,
    "mlp_ratio": 1.7,
    "image_size": 40,
    "patch_size": 2,
    "n_queries": 4,
    "output_dim": 256,
    "image_start_id": 260,
}
TEXT = {
    "vocab_size": 270,
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 64,
    "max_position_embeddings": 64,
    "seq_length": 16,
    "fp32": True,
    "use_cache": False,
}
PIXELS = noise(2, 3, 40, 40, start=0.5)
WORDS = (torch.arange(40) * 37 + 11) % 250
PICTURE = torch.tensor([260, 97, 46, 262, 262, 261])  # the path "a." and padding between <img> and </img>
IDS = torch.cat([WORDS[:3], PICTURE, WORDS[3:34]])[None]
TWO = torch.cat([WORDS[:2], PICTURE, WORDS[2:4], PICTURE, WORDS[4:10]])[None]


def build(folder: Path, **changes: Any) -> Any:
    """Qwen's own model; instead of opening files it sees PIXELS."""
    sys.path.insert(0, str(folder.resolve().parent))
    modeling = importlib.import_module(f"{folder.name}.modeling_qwen")
    config = importlib.import_module(f"{folder.name}.configuration_qwen").QWenConfig
    base: Any = modeling.QWenPreTrainedModel
    base.get_head_mask = lambda self, mask, layers: [None] * layers
    base.all_tied_weights_keys = {}
    model = modeling.QWenLMHeadModel(config(**TEXT, visual=VISUAL, **changes))
    state = {
        name: tensor if name.endswith("pos_embed") else made_up(name, tensor.shape)
        for name, tensor in model.named_parameters()
    }
    model.load_state_dict(state)
    visual = model.transformer.visual
    visual.encode = lambda paths: visual(PIXELS[: len(paths)])
    return model.eval()


def written(model: Any, start: int, end: int) -> torch.Tensor:
    """Logits from the last token of a prompt on, one token at a time."""
    step = model(IDS[:, :start], use_cache=True)
    rows = [step.logits[:, -1]]
    for place in range(start, end):
        step = model(
            IDS[:, place : place + 1],
            attention_mask=torch.ones(1, place + 1),
            past_key_values=step.past_key_values,
            use_cache=True,
        )
        rows.append(step.logits[:, -1])
    return torch.stack(rows, dim=1)


@torch.no_grad()
def main() -> None:
    """One line for each tensor: its name, and at most twelve numbers from all over it."""
    folder = Path(sys.argv[1])
    model = build(folder)
    visual, found = model.transformer.visual, {}
    visual.transformer.register_forward_hook(
        lambda _module, _inputs, out: found.__setitem__("tower", out.transpose(0, 1))
    )
    found["image"] = visual(PIXELS)
    for length in (14, 20, 40):
        found[f"full {length}"] = model(IDS[:, :length]).logits
    found["two pictures"] = model(TWO).logits
    # What a model remembers of the last long prompt would go on in the next one: a new one each.
    found["written 12 to 20"] = written(build(folder), 12, 20)
    found["written 18 to 36"] = written(build(folder), 18, 36)
    found["training"] = build(folder).train()(IDS).logits
    found["no ntk"] = build(folder, use_dynamic_ntk=False)(IDS).logits
    found["no logn"] = build(folder, use_logn_attn=False)(IDS).logits
    for name, values in found.items():
        numbers = values.flatten()[:: values.numel() // 12 + 1]
        print(f'    "{name}": "{" ".join(f"{number:.7g}" for number in numbers.tolist())}",')


if __name__ == "__main__":
    main()
