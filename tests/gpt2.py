"""GPT-2's tensors under the names of transformers, put into our decoder."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from minivlm.text.gpt2 import GPT2Decoder

PLAIN = {"wte.weight": "embed_tokens.weight", "wpe.weight": "embed_positions.weight"}
PARTS = {"attn.c_proj": "attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def load_gpt2(decoder: GPT2Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors named as in `GPT2Model`: linear layers are transposed, and q, k, v are in one."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = PLAIN.get(name, name).replace("h.", "layers.", 1 if name.startswith("h.") else 0)
        for theirs, ours in PARTS.items():
            name = name.replace(theirs, ours)
        transposed = tensor.T if tensor.dim() == 2 and not name.startswith("embed") else tensor
        if "c_attn" in name:
            for part, piece in zip("qkv", transposed.chunk(3), strict=True):
                state[name.replace("c_attn", f"{part}_proj")] = piece
        else:
            state[name] = transposed
    with torch.no_grad():
        decoder.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()})
