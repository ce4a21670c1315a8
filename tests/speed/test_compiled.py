"""torch.compile changes the time of an answer, but not the answer."""

from shutil import which

import pytest
import torch
from PIL import Image
from torch import nn

from minivlm import InputError
from minivlm.layers import RMSNorm
from minivlm.models.load import load_answering
from minivlm.speed import compiled
from minivlm.speed.compiled import PARTS, compile_parts
from minivlm.speed.int8 import Int8Linear
from minivlm.speed.last_token import LastTokenMLP
from minivlm.speed.pieces import GatedMLPInPieces, MLPInPieces

needs_compiler = pytest.mark.skipif(
    not any(which(name) for name in compiled.COMPILERS), reason="needs a C++ compiler"
)


def compiled_kinds(model: nn.Module) -> set[type[nn.Module]]:
    """The types of modules that are compiled, wholly or except for the loop over pieces."""
    return {type(m) for m in model.modules() if m._compiled_call_impl is not None or "at_once" in vars(m)}


@needs_compiler
@pytest.mark.parametrize(
    ("quantize", "dtype"),
    [(None, torch.float32), ("int8", torch.bfloat16), ("int4", torch.bfloat16)],
)
@torch.inference_mode()
def test_the_same_answers(quantize: str | None, dtype: torch.dtype):
    model, processor = load_answering(quantize=quantize, dtype=dtype)
    pictures = [Image.open(f"figures/samples/scene_{n}.png") for n in (1, 2)]
    batches = [
        processor(pictures, ["caption en", "how many circles are there?"]),
        processor(pictures[:1], ["caption en"]),
    ]
    expected = [model.generate(**batch, max_new_tokens=8) for batch in batches]
    logits = [model.logits(model.prefill(**batch)[0]) for batch in batches]
    compile_parts(model)
    assert compiled_kinds(model)
    torch._dynamo.reset()
    for batch, tokens, scores in zip(batches, expected, logits, strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(
            model.logits(model.prefill(**batch)[0]), scores, rtol=tolerance, atol=20 * tolerance
        )
        assert model.generate(**batch, max_new_tokens=8).tolist() == tokens.tolist()


def test_only_parts_without_state():
    model, _ = load_answering()
    compile_parts(model)
    assert all(issubclass(kind, PARTS) for kind in compiled_kinds(model))
    # The MLPs in pieces; that of the last block, which skips what is never read; the norms.
    assert compiled_kinds(model) == {MLPInPieces, GatedMLPInPieces, LastTokenMLP, RMSNorm}


def test_what_is_in_int4_is_left_alone():
    model, _ = load_answering(quantize="int4")
    compile_parts(model)
    # The MLP of the tower, the norms, and the head.
    assert compiled_kinds(model) == {MLPInPieces, RMSNorm, Int8Linear}


def test_no_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "which", lambda name: None)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler"):
        compile_parts(load_answering()[0])
