"""torch.compile where it helps: the stateless parts of a model that repeat in every layer.

The norm, the MLP and the int8 product are each compiled once for all layers, which takes seconds. Compiling
the whole decoder would take minutes, and again for every length of the cache. Attention is not compiled: its
cache grows, and it already runs on fast kernels. Nor are MLPs in int4. The computation is the same, in fewer
passes over memory, so results agree up to rounding.
"""

from __future__ import annotations

from shutil import which

import torch
from torch import nn

from minivlm.errors import InputError
from minivlm.layers import MLP, GatedMLP, LlamaRMSNorm, RMSNorm, SwiGLU
from minivlm.speed.int4 import Int4Linear
from minivlm.speed.int8 import Int8Linear
from minivlm.speed.packing import PackedLinear
from minivlm.speed.pieces import InPieces

COMPILERS = ("c++", "g++", "clang++", "cl")  # PyTorch looks for one of these
PARTS = (RMSNorm, LlamaRMSNorm, MLP, GatedMLP, SwiGLU, Int8Linear)


def compile_parts(model: nn.Module) -> None:
    """Compile the `PARTS` of a model in place; each is compiled when it is first used.

    Raises:
        InputError: there is no C++ compiler, on a CPU; the model is packed, which the compiler cannot handle.
    """
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise InputError("a packed model cannot be compiled: choose one of the two")
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if on_cpu and not any(which(name) for name in COMPILERS):
        raise InputError("torch.compile needs a C++ compiler and found none: install one, or do not compile")
    for module in model.modules():
        if any(isinstance(part, Int4Linear) for part in module.modules()):
            continue  # its product is a kernel already, or many small steps that only take long to compile
        if isinstance(module, InPieces):
            # One piece, not the loop over pieces: their number varies from prompt to prompt.
            module.at_once = torch.compile(module.at_once, dynamic=True)  # type: ignore[method-assign]
        elif isinstance(module, PARTS):
            module.compile(dynamic=True)
