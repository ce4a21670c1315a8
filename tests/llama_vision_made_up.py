"""A tiny Llama 3.2 Vision with tensors of `made_up`, which can also be given to Meta's program.

There, a tile's vector depends only on its row and column, and on no canvas, so the tables here are put
together from the same few vectors: 4 x 4 of them.
"""

from __future__ import annotations

import torch
from made_up import made_up, noise
from torch import Tensor, nn

from minivlm.models.llama_vision import LlamaVisionConfig
from minivlm.text.llama3_rope import Llama3Scaling
from minivlm.text.llama_vision import LlamaVisionTextConfig
from minivlm.vision.llama_vision import LlamaVisionTowerConfig

CONFIG = LlamaVisionConfig(
    LlamaVisionTowerConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_global_layers=2,
        attention_heads=2,
        image_size=8,
        patch_size=4,
        intermediate_layers_indices=(0, 2),
    ),
    LlamaVisionTextConfig(
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=120,
        max_position_embeddings=64,
        rope_theta=500000.0,
        rope_scaling=Llama3Scaling(),
        cross_attention_layers=(1, 4),
    ),
    image_token_id=121,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# Words before the first picture, two pictures that are seen together, a row that changes its picture.
ROWS = torch.tensor([[1, 5, 121, 121, 6, 7, 8, 9], [121, 10, 11, 121, 12, 13, 14, 15]])
IDS = torch.tensor([2, 6, 1, 7])
PIXELS = noise(4, 4, 3, 8, 8, start=0.5)


def grid(name: str, tokens: int, width: int) -> Tensor:
    """What Meta has in place of a table: [row of tiles, column of tiles, tokens, D]."""
    return noise(4, 4, tokens, width, start=float(sum(map(ord, name)))) * 0.5


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model of `CONFIG`."""
    canvases, width = CONFIG.vision.canvases, CONFIG.vision.hidden_size
    state = {}
    for name, tensor in model.state_dict().items():
        if "tile" in name and name.endswith("weight"):
            of_tiles = grid(name, tensor.shape[1] // (4 * width), width)
            table = torch.zeros_like(tensor).view(len(tensor), 4, *of_tiles.shape[2:])
            for number, (rows, columns) in enumerate(canvases, start=1):
                table[number, : rows * columns] = of_tiles[:rows, :columns].flatten(0, 1)
            state[name] = table.view_as(tensor)
        elif "gate" in name and tensor.numel() == 1:
            state[name] = torch.tensor([0.8])
        else:
            state[name] = made_up(name, tensor.shape)
    return state
