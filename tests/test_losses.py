"""The losses equal those of transformers and the formulas of the papers, in value and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_differs, assert_equal, randomize
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from minivlm.losses import clip_loss, distillation_loss, l2_normalize, pair_logits, siglip_loss, similarity

SHARED = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = SHARED | {"image_size": 28, "patch_size": 14}
EOS = 119


def outputs(kind: str, n: int = 6) -> tuple[Any, Tensor, Tensor | None]:
    """What a tiny random reference model returns for n pairs, with its scale and bias."""
    generator = torch.Generator().manual_seed(1)
    text = SHARED | {"vocab_size": 120, "max_position_embeddings": 8}
    if kind == "clip":
        text |= {"eos_token_id": EOS, "bos_token_id": 0}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    randomize(model)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(7.0))
        if kind == "siglip":
            model.logit_bias.fill_(-3.0)
    input_ids = torch.randint(1, EOS, (n, 8), generator=generator)
    input_ids[:, -1] = EOS
    pixel_values = torch.randn(n, 3, 28, 28, generator=generator)
    out = model(input_ids=input_ids, pixel_values=pixel_values, return_loss=True)
    return out, model.logit_scale, getattr(model, "logit_bias", None)


@pytest.fixture(scope="module")
def clip() -> tuple[Any, Tensor]:
    out, scale, _ = outputs("clip")
    return out, scale


@pytest.fixture(scope="module")
def siglip() -> tuple[Any, Tensor, Tensor]:
    out, scale, bias = outputs("siglip")
    assert bias is not None
    assert scale.shape == bias.shape == (1,)
    return out, scale, bias


def embeddings(n: int = 5, dim: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Pictures and texts of different lengths that do not match yet and need gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, dim, generator=generator) * 3).to(dtype).requires_grad_() for _ in range(2)]


def scale(value: float = 10.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([math.log(value)], dtype=dtype, requires_grad=True)


def bias(value: float = -4.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([value], dtype=dtype, requires_grad=True)


# ---- parity with transformers ------------------------------------------------------------------------------


def test_clip_loss_equals_transformers(clip: tuple[Any, Tensor]) -> None:
    out, logit_scale = clip
    assert out.loss.item() > 0.1
    assert_equal(pair_logits(out.image_embeds, out.text_embeds, logit_scale), out.logits_per_image)
    assert_equal(clip_loss(out.image_embeds, out.text_embeds, logit_scale), out.loss)
    # Embeddings of any length: they are normalized here.
    assert_equal(clip_loss(out.image_embeds * 5, out.text_embeds / 3, logit_scale), out.loss)


def test_siglip_loss_equals_transformers(siglip: tuple[Any, Tensor, Tensor]) -> None:
    out, logit_scale, logit_bias = siglip
    assert out.loss.item() > 0.1
    assert_equal(
        pair_logits(out.image_embeds, out.text_embeds, logit_scale, logit_bias), out.logits_per_image
    )
    assert_equal(siglip_loss(out.image_embeds, out.text_embeds, logit_scale, logit_bias), out.loss)
    assert_equal(siglip_loss(out.image_embeds * 5, out.text_embeds / 3, logit_scale, logit_bias), out.loss)


def test_gradients_reach_the_reference_s_towers_alike(clip: tuple[Any, Tensor]) -> None:
    out, logit_scale = clip
    ours = clip_loss(out.image_embeds, out.text_embeds, logit_scale)
    inputs = [out.image_embeds, out.text_embeds, logit_scale]
    expected = torch.autograd.grad(out.loss, inputs, retain_graph=True)
    for gradient, reference in zip(
        torch.autograd.grad(ours, inputs, retain_graph=True), expected, strict=True
    ):
        # The reference's embeddings have length 1 already; our normalization removes the gradient along them.
        along = reference * 0
        if reference.dim() == 2:
            embeds = inputs[0] if reference is expected[0] else inputs[1]
            along = (reference * embeds).sum(dim=1, keepdim=True) * embeds
        assert_equal(gradient, reference - along)


CLIP_MISTAKES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rows only": lambda i, t, s: F.cross_entropy(pair_logits(i, t, s), torch.arange(len(i))),
    "columns only": lambda i, t, s: F.cross_entropy(pair_logits(i, t, s).T, torch.arange(len(i))),
    "sum of both directions": lambda i, t, s: 2 * clip_loss(i, t, s),
    "scale not exponentiated": lambda i, t, s: clip_loss(i, t, s.log()),
    "divided by the temperature": lambda i, t, s: clip_loss(i, t, -s),
    "another text": lambda i, t, s: clip_loss(i, t.roll(1, 0), s),
    "wrong sign": lambda i, t, s: -clip_loss(i, t, s),
}


@pytest.mark.parametrize("mistake", CLIP_MISTAKES)
def test_clip_mistakes_are_noticed(clip: tuple[Any, Tensor], mistake: str) -> None:
    out, logit_scale = clip
    assert_differs(CLIP_MISTAKES[mistake](out.image_embeds, out.text_embeds, logit_scale), out.loss)


def _sigmoid_terms(i: Tensor, t: Tensor, s: Tensor, b: Tensor, sign: float = 1.0) -> Tensor:
    labels = 2 * torch.eye(len(i)) - 1
    return -F.logsigmoid(sign * labels * pair_logits(i, t, s, b))


SIGLIP_MISTAKES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "divided by n * n": lambda i, t, s, b: _sigmoid_terms(i, t, s, b).mean(),
    "not divided": lambda i, t, s, b: _sigmoid_terms(i, t, s, b).sum(),
    "no bias": lambda i, t, s, b: siglip_loss(i, t, s, torch.zeros(1)),
    "bias subtracted": lambda i, t, s, b: siglip_loss(i, t, s, -b),
    "bias inside the scale": lambda i, t, s, b: siglip_loss(i, t, s, b * s.exp()),
    "labels the wrong way round": lambda i, t, s, b: _sigmoid_terms(i, t, s, b, sign=-1).sum() / len(i),
    "labels 0 and 1": lambda i, t, s, b: (
        -F.logsigmoid(torch.eye(len(i)) * pair_logits(i, t, s, b)).sum() / len(i)
    ),
    "right pairs only": lambda i, t, s, b: _sigmoid_terms(i, t, s, b).diagonal().mean(),
    "negative only": lambda i, t, s, b: siglip_loss(i, t, s, b, negative_only=True),
    "softmax": lambda i, t, s, b: clip_loss(i, t, s),
}


@pytest.mark.parametrize("mistake", SIGLIP_MISTAKES)
def test_siglip_mistakes_are_noticed(siglip: tuple[Any, Tensor, Tensor], mistake: str) -> None:
    out, logit_scale, logit_bias = siglip
    wrong = SIGLIP_MISTAKES[mistake](out.image_embeds, out.text_embeds, logit_scale, logit_bias)
    assert_differs(wrong, out.loss)


# ---- formulas ----------------------------------------------------------------------------------------------


def naive_clip(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """Loops, one picture and one text at a time."""
    n, total = len(image_embeds), torch.zeros((), dtype=image_embeds.dtype)
    images = [v / v.square().sum().sqrt() for v in image_embeds]
    texts = [v / v.square().sum().sqrt() for v in text_embeds]
    for k in range(n):
        row = torch.stack([(images[k] @ text * logit_scale.exp()).exp().squeeze() for text in texts])
        column = torch.stack([(image @ texts[k] * logit_scale.exp()).exp().squeeze() for image in images])
        total = total - ((row[k] / row.sum()).log() + (column[k] / column.sum()).log()) / (2 * n)
    return total


def naive_siglip(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """Loops, one pair at a time."""
    n, total = len(image_embeds), torch.zeros((), dtype=image_embeds.dtype)
    for k in range(n):
        for j in range(n):
            cosine = F.cosine_similarity(image_embeds[k], text_embeds[j], dim=0)
            yes = 1 / (1 + torch.exp(-(logit_scale.exp() * cosine + logit_bias))).squeeze()
            total = total - (yes if k == j else 1 - yes).log() / n
    return total


@pytest.mark.parametrize("n", [1, 2, 7])
def test_values_and_gradients_equal_the_loops(n: int) -> None:
    images, texts = embeddings(n, dtype=torch.float64)
    s, b = scale(dtype=torch.float64), bias(dtype=torch.float64)
    cases = [
        (clip_loss, naive_clip, (images, texts, s)),
        (siglip_loss, naive_siglip, (images, texts, s, b)),
    ]
    for ours, naive, inputs in cases:
        loss, expected = ours(*inputs), naive(*inputs)
        assert loss.shape == ()
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        for mine, reference in zip(
            torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-12)


def test_gradients_at_the_logits() -> None:
    """The formulas that the notebook draws: probability minus label, for rows, columns and pairs."""
    images, texts = embeddings()
    logits = pair_logits(images, texts, scale(), bias()).detach().requires_grad_()
    eye, labels = torch.eye(5), torch.arange(5)
    (gradient,) = torch.autograd.grad(
        (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2, logits
    )
    assert_equal(gradient, (logits.softmax(1) - eye + logits.softmax(0) - eye) / 10)
    (gradient,) = torch.autograd.grad(-F.logsigmoid((2 * eye - 1) * logits).sum() / 5, logits)
    assert_equal(gradient, (logits.sigmoid() - eye) / 5)


def test_gradcheck_in_double() -> None:
    images, texts = embeddings(4, dtype=torch.float64)
    teacher_images, teacher_texts = (x.detach() for x in embeddings(4, 3, seed=1, dtype=torch.float64))
    s, b = scale(5, torch.float64), bias(-1, torch.float64)
    teacher_scale = s.detach().clone()  # gradcheck changes s in place
    assert torch.autograd.gradcheck(clip_loss, (images, texts, s))
    assert torch.autograd.gradcheck(siglip_loss, (images, texts, s, b))
    assert torch.autograd.gradcheck(lambda *x: siglip_loss(*x, negative_only=True), (images, texts, s, b))
    assert torch.autograd.gradcheck(
        lambda *x: distillation_loss(*x, teacher_images, teacher_texts, teacher_scale), (images, texts, s)
    )


def test_clip_needs_no_bias_and_siglip_does() -> None:
    images, texts = embeddings()
    logits = pair_logits(images, texts, scale(), bias())
    labels = torch.arange(5)
    assert_equal(F.cross_entropy(logits, labels), F.cross_entropy(logits - bias(), labels))
    assert_differs(siglip_loss(images, texts, scale(), bias(0)), siglip_loss(images, texts, scale(), bias()))


def test_both_directions_count_alike() -> None:
    images, texts = embeddings()
    assert_equal(clip_loss(images, texts, scale()), clip_loss(texts, images, scale()))
    assert_equal(siglip_loss(images, texts, scale(), bias()), siglip_loss(texts, images, scale(), bias()))


@given(st.integers(1, 12), st.floats(0.1, 100), st.floats(-20, 5))
def test_order_of_the_pairs_does_not_matter(n: int, factor: float, offset: float) -> None:
    images, texts = (x.detach() for x in embeddings(n))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    s, b = scale(factor), bias(offset)
    assert_equal(clip_loss(images[order], texts[order], s), clip_loss(images, texts, s))
    assert_equal(siglip_loss(images[order], texts[order], s, b), siglip_loss(images, texts, s, b))


def test_scalars_serve_as_scale_and_bias() -> None:
    images, texts = embeddings()
    assert_equal(clip_loss(images, texts, scale().detach()[0]), clip_loss(images, texts, scale()))
    assert_equal(
        siglip_loss(images, texts, scale().detach()[0], bias().detach()[0]),
        siglip_loss(images, texts, scale(), bias()),
    )


def test_the_published_starts() -> None:
    """CLIP: log(1 / 0.07); SigLIP: log 10 and -10. Losses of n orthogonal pairs, known in closed form."""
    n = 16
    images, texts = torch.eye(2 * n)[:n], torch.eye(2 * n)[n:]
    assert_equal(similarity(images, texts), torch.zeros(n, n))
    assert clip_loss(images, texts, scale(1 / 0.07)).item() == pytest.approx(math.log(n), rel=1e-6)
    right, wrong = math.log1p(math.exp(10)), math.log1p(math.exp(-10))
    loss = siglip_loss(images, texts, scale(10), bias(-10)).item()
    assert loss == pytest.approx(right + (n - 1) * wrong, rel=1e-6)


# ---- extremes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-4, 100.0, 1e6])
@pytest.mark.parametrize("offset", [-1000.0, 0.0, 1000.0])
@pytest.mark.parametrize("matching", [True, False])
def test_extreme_logits_stay_finite(factor: float, offset: float, matching: bool) -> None:
    images, texts = embeddings()
    texts = (images if matching else -images).detach().clone().requires_grad_()
    s, b = scale(factor), bias(offset)
    losses = (
        clip_loss(images, texts, s),
        siglip_loss(images, texts, s, b),
        distillation_loss(images, texts, s, texts, images, s),
    )
    for loss in losses:
        assert torch.isfinite(loss)
        gradients = torch.autograd.grad(loss, [images, texts, s])
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    images, texts = embeddings()
    low = [x.detach().to(dtype) for x in (images, texts, scale(), bias())]
    for loss, expected in (
        (clip_loss(*low[:3]), clip_loss(images, texts, scale())),
        (siglip_loss(*low), siglip_loss(images, texts, scale(), bias())),
    ):
        assert loss.dtype == dtype
        torch.testing.assert_close(loss.float(), expected.detach(), rtol=0.03, atol=0.03)


def test_normalize_equals_the_library_also_at_zero() -> None:
    x = torch.cat([torch.randn(3, 4), torch.zeros(1, 4), torch.full((1, 4), 1e-20)]).requires_grad_()
    assert_equal(l2_normalize(x), F.normalize(x, dim=-1))
    images = torch.cat([torch.zeros(1, 4), torch.randn(2, 4)]).requires_grad_()
    loss = siglip_loss(images, torch.randn(3, 4), scale(), bias()) + clip_loss(images, images, scale())
    loss.backward()
    assert torch.isfinite(loss)
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()


@pytest.mark.parametrize(("pictures", "texts"), [(3, 4), (4, 3), (1, 4), (0, 0)])
def test_what_does_not_pair_is_refused(pictures: int, texts: int) -> None:
    i, t = torch.randn(pictures, 8), torch.randn(texts, 8)
    for refused in (
        lambda: clip_loss(i, t, scale()),
        lambda: siglip_loss(i, t, scale(), bias()),
        lambda: distillation_loss(i, t, scale(), i, t, scale()),
    ):
        with pytest.raises(ValueError, match=f"{pictures} pictures and {texts} texts"):
            refused()


# ---- blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 2, 3, 6])
def test_siglip_is_a_sum_over_blocks(devices: int) -> None:
    """Each device divides by its number of pictures: the mean over devices is the loss of the whole batch."""
    images, texts = embeddings(12)
    s, b = scale(), bias()
    whole = siglip_loss(images, texts, s, b)
    expected = torch.autograd.grad(whole, [images, texts, s, b])
    losses = []
    for own, pictures in enumerate(images.chunk(devices)):
        blocks = [
            siglip_loss(pictures, others, s, b, negative_only=other != own)
            for other, others in enumerate(texts.chunk(devices))
        ]
        losses.append(torch.stack(blocks).sum())
    mean = torch.stack(losses).mean()
    assert_equal(mean, whole)
    for gradient, reference in zip(torch.autograd.grad(mean, [images, texts, s, b]), expected, strict=True):
        assert_equal(gradient, reference)
    if devices > 1:
        assert_differs(torch.stack(losses).sum(), whole)


def test_a_block_may_have_another_number_of_texts() -> None:
    images, texts = embeddings(6)
    split = [siglip_loss(images, part, scale(), bias(), negative_only=True) for part in texts.split([1, 5])]
    whole = siglip_loss(images, texts, scale(), bias(), negative_only=True)
    assert_equal(split[0] + split[1], whole)


def test_clip_is_not_a_sum_over_blocks() -> None:
    images, texts = embeddings(12)
    blocks = [clip_loss(i, t, scale()) for i, t in zip(images.chunk(3), texts.chunk(3), strict=True)]
    assert_differs(torch.stack(blocks).mean(), clip_loss(images, texts, scale()))


# ---- distillation ------------------------------------------------------------------------------------------


def naive_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    rows = -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
    columns = -(teacher.softmax(0) * student.log_softmax(0)).sum(0).mean()
    return (rows + columns) / 2


def test_distillation_equals_the_formula() -> None:
    images, texts = embeddings()
    teacher_images, teacher_texts = embeddings(dim=3, seed=1)  # a teacher of another width
    loss = distillation_loss(images, texts, scale(4), teacher_images, teacher_texts, scale(9))
    student = pair_logits(images, texts, scale(4))
    teacher = pair_logits(teacher_images, teacher_texts, scale(9))
    assert_equal(loss, naive_distillation(student, teacher))
    assert_differs(loss, naive_distillation(teacher, student))
    assert_differs(loss, naive_distillation(student, teacher.T))
    assert_differs(loss, -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean())
    assert_differs(loss, distillation_loss(images, texts, scale(9), teacher_images, teacher_texts, scale(4)))


def test_the_teacher_gets_no_gradient() -> None:
    images, texts = embeddings()
    teacher_images, teacher_texts = embeddings(seed=1)
    teacher_scale = scale()
    distillation_loss(images, texts, scale(), teacher_images, teacher_texts, teacher_scale).backward()
    assert images.grad is not None
    assert teacher_images.grad is teacher_texts.grad is teacher_scale.grad is None


def test_the_student_that_equals_its_teacher_is_at_the_minimum() -> None:
    images, texts = embeddings()
    loss = distillation_loss(images, texts, scale(), images, texts, scale())
    logits = pair_logits(images, texts, scale())
    entropy = naive_distillation(logits, logits)
    assert entropy.item() > 0.1
    assert_equal(loss, entropy)
    gradients = torch.autograd.grad(loss, [images, texts])
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients)


def test_a_teacher_without_doubt_gives_the_clip_loss() -> None:
    images, texts = embeddings()
    certain = torch.eye(5)
    loss = distillation_loss(images, texts, scale(), certain, certain, scale(1000))
    assert_equal(loss, clip_loss(images, texts, scale()))


# ---- devices -----------------------------------------------------------------------------------------------


def test_nothing_is_left_on_the_cpu() -> None:
    """Labels live where the embeddings do. The meta device has only shapes, and rejects a mixture."""
    images, texts = (x.to("meta") for x in embeddings())
    s, b = scale().to("meta"), bias().to("meta")
    for loss in (
        clip_loss(images, texts, s),
        siglip_loss(images, texts, s, b),
        distillation_loss(images, texts, s, images, texts, s),
    ):
        assert loss.device.type == "meta"
