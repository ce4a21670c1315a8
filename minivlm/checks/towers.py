"""Checks for 10_contrastive_training: ranks, losses, the ring, equal captions, a blind tower, a matcher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minivlm.checks import NotYet, call, expect, expect_tensor, right, same
from minivlm.losses import l2_normalize, siglip_loss
from minivlm.models.siglip import SigLIP
from minivlm.processing import PairProcessor
from minivlm.training.contrastive_recipe import ContrastiveConfig, build

# Right answers are on the diagonal: first in a draw of three, place 1, place 4, and last in a draw of all.
COSINES = torch.tensor(
    [[0.5, 0.5, 0.1, 0.5], [0.1, 0.8, 0.3, 0.4], [0.6, 0.7, 0.0, 0.2], [0.3, 0.3, 0.3, 0.3]]
)
CAPTIONS = ["a red star", "a blue star", "a red star", "a red circle", "a red star"]
SEED = 369  # of the towers that look up, such that each mistake shows
TOWERS = ContrastiveConfig(
    objective="siglip", image_size=32, tower_width=16, tower_layers=1, tower_heads=2, text_width=16,
    text_layers=1, text_heads=2, max_length=8, bf16=False,
)  # fmt: skip
# Why each loss goes where it goes; the numbers are those of the notebook's cell.
REASONS = {
    "CLIP, all cosines 0.2 higher": "a softmax sees differences between cosines only, and they are as before",
    "SigLIP, all cosines 0.2 higher": "each pair is judged alone: one right pair gets better and "
    "63 wrong ones "
    "get worse",
    "CLIP, factor twice as large": "the right caption is ahead, and a larger factor makes its lead count for "
    "more",
    "CLIP, factor twice as large, all cosines equal": "twice nothing is nothing: every caption "
    "keeps 1/64, and "
    "the loss is log 64",
    "CLIP, 128 pairs instead of 64": "the right caption shares the softmax with 127 others instead of 63",
    "SigLIP, all cosines 0, bias -4.1 instead of -10": "-4.1 is -log 63, the logit of one right "
    "pair among 64; "
    "-10 says that right pairs are far rarer than they are",
    "recall@10, all cosines 0.2 higher": "ranks depend on the order alone",
}
DIRECTIONS = ("falls", "stays", "rises")
# What the vectors of a blind model do not depend on, and how a reader may miss it.
FAULTS = {
    "words": "swap two words near the front of `ids` (the last position must stay as it is, "
    "since SigLIP reads "
    "the text's vector there)",
    "patches": "let whole patches change places, for example pixels.roll(patch_size, dims=-1); a "
    "mirror, or a "
    "shift by one pixel, changes what is *inside* the patches as well",
    "colors": "let two color channels change places, for example pixels[:, [2, 1, 0]]; the "
    "channels are axis 1",
}


class solutions:
    """The solutions that the notebook continues with."""

    @staticmethod
    def find_ranks(similarity: Tensor) -> Tensor:
        """[n, n], pictures down, captions across -> the place of each picture's own caption, from 1: [n]."""
        right = similarity.diagonal()[:, None]  # [n, 1]
        wrong = ~torch.eye(len(similarity), dtype=torch.bool)
        return 1 + ((similarity >= right) & wrong).sum(dim=1)

    @staticmethod
    def predict_losses() -> dict[str, str]:
        """For each change: "falls", "stays" or "rises"."""
        return {
            "CLIP, all cosines 0.2 higher": "stays",
            "SigLIP, all cosines 0.2 higher": "rises",
            "CLIP, factor twice as large": "falls",
            "CLIP, factor twice as large, all cosines equal": "stays",
            "CLIP, 128 pairs instead of 64": "rises",
            "SigLIP, all cosines 0, bias -4.1 instead of -10": "falls",
            "recall@10, all cosines 0.2 higher": "stays",
        }

    @staticmethod
    def ring_loss(
        images: list[Tensor], texts: list[Tensor], block_loss: Callable[[Tensor, Tensor, bool], Tensor]
    ) -> tuple[Tensor, list[list[int]]]:
        """W lists of pictures and texts -> the loss of the whole batch, and who met whose texts."""
        size = len(images)
        held = list(enumerate(texts))  # (owner, texts) on each device
        met: list[list[int]] = [[] for _ in images]
        total = torch.tensor(0.0)
        for _ in range(size):
            for device, (owner, passing) in enumerate(held):
                met[device].append(owner)
                total = total + block_loss(images[device], passing, owner == device)
            held = [held[device - 1] for device in range(size)]  # held[-1] is the last one's
        return total / size, met

    @staticmethod
    def sigmoid_of_equals(logits: Tensor, captions: list[str]) -> Tensor:
        """logits [n, n], pictures down; caption i belongs to picture i -> the loss, a number."""
        right = torch.tensor([[a == b for b in captions] for a in captions])
        signs = torch.where(right, 1.0, -1.0)
        return -F.logsigmoid(signs * logits).sum() / len(logits)

    @staticmethod
    @torch.no_grad()
    def find_fault(model: SigLIP, pixels: Tensor, ids: Tensor) -> str:
        """What the model is blind to: "words" (their order), "patches", "colors", or "nothing"."""
        patch = model.config.vision.patch_size
        order = [0, 2, 1, *range(3, ids.shape[1])]
        images, texts = model.encode_image(pixels), model.encode_text(ids)
        changed = {
            "words": (texts, model.encode_text(ids[:, order])),
            "patches": (images, model.encode_image(pixels.roll(patch, dims=-1))),
            "colors": (images, model.encode_image(pixels[:, [2, 1, 0]])),
        }
        blind = [
            name for name, (before, after) in changed.items() if torch.allclose(before, after, atol=1e-4)
        ]
        return blind[0] if blind else "nothing"

    @staticmethod
    @torch.no_grad()
    def match_pictures(
        model: SigLIP,
        processor: PairProcessor,
        pictures: Sequence[Image.Image],
        captions: Sequence[str],
        names: Sequence[str],
        templates: Sequence[str],
        k: int,
    ) -> dict[str, Any]:
        """Classes, found pictures, recall@k both ways, and the probability of each pair."""

        def read(sentences: list[str]) -> Tensor:
            return l2_normalize(model.encode_text(processor(texts=sentences)["input_ids"]))

        images = l2_normalize(model.encode_image(processor(images=list(pictures))["pixel_values"]))
        texts = read(list(captions))
        means = [read([t.replace("{}", name) for t in templates]).mean(dim=0) for name in names]
        classes = l2_normalize(torch.stack(means))
        cosines = images @ texts.T  # pictures down, captions across
        recalls = [(solutions.find_ranks(c) <= k).double().mean().item() for c in (cosines, cosines.T)]
        logits = model.logit_scale.exp() * cosines.diagonal() + model.logit_bias
        return {
            "classes": [names[i] for i in (images @ classes.T).argmax(dim=1).tolist()],
            "found": cosines.argmax(dim=0).tolist(),
            "recall": tuple(recalls),
            "probability": logits.sigmoid().tolist(),
        }


def _agree(result: Any, reference: Tensor, what: str, advice: str) -> None:
    """As `expect_tensor`, with what to look at."""
    try:
        expect_tensor(result, reference, what)
    except NotYet as error:
        raise NotYet(f"{error}. {advice}") from None


def _unless(matches: Callable[[Any], bool], mistakes: Sequence[tuple[str, Any]]) -> None:
    """Raise NotYet with the hint of the first mistake whose value the reader's result matches."""
    for hint, value in mistakes:
        expect(not matches(value), hint)


def find_ranks(answer: Callable[[Tensor], Tensor]) -> None:
    """Exercise 1."""
    result = call(answer, COSINES.clone())
    reference = solutions.find_ranks(COSINES)  # 3, 1, 4, 4
    own = COSINES.diagonal()[:, None]
    falling = COSINES.argsort(dim=1, descending=True, stable=True)
    rising = COSINES.argsort(dim=1, stable=True).flip(1)
    luck = (
        "you sort, and where cosines are equal the order is left to luck: in row 1 the right caption came "
        "first among equals. Count the captions that are at least as similar"
    )
    places = "argsort says which caption is at each place: we want the place of the picture's own caption"
    mistakes = [
        ("you count from 0: a picture whose own caption is the most similar has rank 1", reference - 1),
        (
            "each rank is one too large: the right caption is as similar as itself, so leave out "
            "the diagonal",
            reference + 1,
        ),
        (
            "a draw counts in the model's favor: in row 4 all captions are equally similar, and "
            "the right one "
            "should come last. Compare with >=",
            1 + (own < COSINES).sum(dim=1),
        ),
        (
            "these are the ranks of the pictures for each caption: a row holds all captions of one picture",
            solutions.find_ranks(COSINES.T),
        ),
        *[(luck, order.argsort(dim=1).diagonal() + 1) for order in (falling, rising)],
        *[(places, c + i) for c in (falling.diagonal(), falling[:, 0]) for i in (0, 1)],
        *[
            (
                "each cosine is compared with the right one of its column: diagonal() is a row, and "
                "[:, None] makes a column of it, so that each row is compared with its own",
                i + (COSINES >= own.T).sum(dim=1),
            )
            for i in (0, 1)
        ],
        (
            "the least similar caption comes first in your order: count those that are at least as similar",
            solutions.find_ranks(-COSINES),
        ),
        (
            "a caption that is as similar counts as half a place: the right one should come "
            "after all of them",
            1 + (own < COSINES).sum(dim=1) + ((own == COSINES).sum(dim=1) - 1) / 2,
        ),
    ]
    if isinstance(result, Tensor) and result.shape == (4, 1):
        raise NotYet("the ranks have shape [4, 1]: count along dim=1 without keepdim, or squeeze")
    _unless(lambda value: same(result, value), mistakes)
    _agree(
        result,
        reference,
        "the ranks",
        f"For the rows {[[round(x, 1) for x in row] for row in COSINES.tolist()]} they are "
        f"{reference.tolist()}: 1, and 1 more for each other caption "
        "that is at least as similar as the one on the diagonal",
    )
    expect(not result.is_floating_point(), f"ranks have dtype {result.dtype}: they are whole numbers")
    right("the place of each picture's own caption, and a draw does not help.")


def predict_losses(answer: Callable[[], Mapping[str, str]]) -> None:
    """Exercise 2."""
    result = call(answer)
    reference = solutions.predict_losses()
    expect(isinstance(result, Mapping), f"expected a dictionary, got a {type(result).__name__}")
    missing = [name for name in reference if name not in result]
    expect(not missing, f"there is no prediction for {missing}: keep the names as they are given")
    given = {name: str(result[name]).strip().lower() for name in reference}
    unknown = {name: word for name, word in given.items() if word not in DIRECTIONS}
    expect(not unknown, f"a prediction is one of {', '.join(DIRECTIONS)}, and yours are {unknown}")
    wrong = [name for name in reference if given[name] != reference[name]]
    reasons = "\n".join(
        f"- {name}: you say it {given[name]}, and it {reference[name]}. {REASONS[name].capitalize()}."
        for name in wrong
    )
    expect(not wrong, f"{len(reference) - len(wrong)} of {len(reference)} as predicted.\n{reasons}")
    right("the softmax compares, the sigmoid judges each pair alone, and ranks see only the order.")


def ring_loss(answer: Callable[..., Any]) -> None:
    """Exercise 3, with three devices of two pairs each."""
    generator = torch.Generator().manual_seed(0)
    images = list(torch.randn(3, 2, 4, generator=generator))
    texts = list(torch.randn(3, 2, 4, generator=generator))
    scale, bias = torch.tensor([1.0]), torch.tensor([-1.0])
    calls: list[tuple[int, int, bool]] = []

    def number(x: Tensor, known: list[Tensor]) -> int:
        return next((i for i, one in enumerate(known) if torch.equal(one, x)), -1)

    def block_loss(of_images: Tensor, of_texts: Tensor, own: bool) -> Tensor:
        calls.append((number(of_images, images), number(of_texts, texts), bool(own)))
        if min(calls[-1][:2]) < 0:  # reported below, by a hint and not by an error of the loss
            return torch.zeros(())
        return siglip_loss(of_images, of_texts, scale, bias, negative_only=not own)

    result = call(answer, list(images), list(texts), block_loss)
    expect(
        isinstance(result, tuple) and len(result) == 2,
        "return two things: the loss, and the list of lists of owners",
    )
    loss, met = result
    pairs = [(a, b) for a, b, _ in calls]
    expect(
        not any(a < 0 or b < 0 for a, b in pairs),
        "block_loss got something that is not the whole block of one device: pass images[r] and the texts "
        "that device r holds now",
    )
    expect(
        len(set(pairs)) == 9 or len(pairs) != 9,
        "some pictures meet the same texts twice, and others never: all texts move at the same moment, so "
        "build the new list from the old one before you replace anything",
    )
    expect(
        len(pairs) >= 9,
        f"{len(pairs)} blocks were computed, and 3 devices have 9: a device's own block counts as well, so "
        "there are as many rounds as devices",
    )
    expect(
        len(pairs) == 9,
        f"{len(pairs)} blocks were computed, and 3 devices have 9: after as many rounds as devices, the "
        "texts are back home and would count twice",
    )
    expect(
        all(own == (a == b) for a, b, own in calls),
        "`own` is wrong for some blocks: it is True where the owner of the texts is the device itself",
    )
    whole = siglip_loss(torch.cat(images), torch.cat(texts), scale, bias)
    expect(
        not same(loss, 3 * whole) and not same(loss, 3 * whole[None]),
        "this is the sum over the devices: each has divided by its own pictures only, so take the mean",
    )
    expect(
        not same(loss, whole / 3),
        "this is the mean over all blocks: sum over the blocks of a device, and mean over the devices",
    )
    _agree(
        loss,
        whole,
        "the loss",
        "Add what block_loss returns for every block, once, then divide by the devices",
    )
    expected = [[0, 2, 1], [1, 0, 2], [2, 1, 0]]
    met = [list(one) for one in met]
    expect(
        met != [[0, 1, 2], [1, 2, 0], [2, 0, 1]],
        "your texts move to the left: device r should get what device r - 1 had, so after one round device "
        "1 has the texts of device 0",
    )
    expect(
        met != [[0, 1, 2]] * 3,
        "these are the owners in the order of their numbers: record whose texts each device met, round by "
        "round",
    )
    expect(met == expected, f"the owners are {met}, expected {expected}")
    right("every device met every text, and the loss is that of the whole batch.")


def sigmoid_of_equals(answer: Callable[[Tensor, list[str]], Tensor]) -> None:
    """Exercise 4."""
    n = len(CAPTIONS)
    logits = torch.randn(n, n, generator=torch.Generator().manual_seed(0)) * 2
    result = call(answer, logits.clone(), list(CAPTIONS))
    if isinstance(result, Tensor) and result.numel() == 1:
        result = result.reshape(())
    reference = solutions.sigmoid_of_equals(logits, CAPTIONS)
    equal = torch.tensor([[a == b for b in CAPTIONS] for a in CAPTIONS])
    diagonal = torch.eye(n, dtype=torch.bool)
    terms = -F.logsigmoid(torch.where(equal, logits, -logits))
    softmax = -(logits.log_softmax(dim=1) * equal / equal.sum(dim=1, keepdim=True)).sum() / n
    mistakes = [
        (
            "only the diagonal counts as right: captions 1, 3 and 5 read the same",
            -F.logsigmoid(torch.where(diagonal, logits, -logits)).sum() / n,
        ),
        (
            "equal captions off the diagonal are left out: that is another way to avoid wrong "
            "labels, but here "
            "they should count as right",
            terms[diagonal | ~equal].sum() / n,
        ),
        (
            "only the right pairs are in the sum: the wrong ones add the term logsigmoid(-logit)",
            terms[equal].sum() / n,
        ),
        (
            "wrong pairs have the sign 0, which makes their term a constant: give them -1",
            -F.logsigmoid(equal * logits).sum() / n,
        ),
        (
            "the signs are swapped: right pairs have +1, and wrong ones -1",
            -F.logsigmoid(torch.where(equal, -logits, logits)).sum() / n,
        ),
        ("this is the mean over all n * n pairs: sum them, and divide by n", terms.mean()),
        ("this is the sum over all pairs: divide it by n", terms.sum()),
        (
            "you divided by the number of right pairs: divide by n, the number of pictures",
            terms.sum() / equal.sum(),
        ),
        ("the sign of the loss is wrong: it is minus the logarithm of a probability", -reference),
        (
            "this is a softmax over each row: the sigmoid asks about each pair alone, so that several may be "
            "right",
            softmax,
        ),
        (
            "every pair counts as right here: compare each caption with each other one",
            -F.logsigmoid(logits).sum() / n,
        ),
        (
            "a term for each picture: sum over all pairs, so that one number is left",
            terms.sum(dim=1),
        ),
    ]
    _unless(lambda value: same(result, value), mistakes)
    _agree(
        result,
        reference,
        "the loss",
        "The term of a pair is -logsigmoid(+logit) if the captions are equal, else -logsigmoid(-logit)",
    )
    right("what reads the same is right, wherever it stands in the batch.")


@torch.no_grad()
def broken_towers(model: SigLIP, fault: str = "words") -> SigLIP:
    """A copy that is blind to the order of "words" or "patches", or to "colors"; "nothing": a sound one."""
    broken = copy.deepcopy(model)
    if fault == "words":
        broken.text_model.embeddings.position_embedding.weight.zero_()
    elif fault == "patches":
        broken.vision_model.embeddings.position_embedding.weight.zero_()
    elif fault == "colors":
        weight = broken.vision_model.embeddings.patch_embedding.weight
        weight.copy_(weight.mean(dim=1, keepdim=True).expand_as(weight))
    return broken


def find_fault(answer: Callable[[SigLIP, Tensor, Tensor], str]) -> None:
    """Exercise 5."""
    model, processor = build(TOWERS)
    assert isinstance(model, SigLIP)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Untrained towers hardly look at places; these do.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4, generator=generator)
        for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
            embeddings.position_embedding.weight.normal_(generator=generator)
        model.text_model.embeddings.token_embedding.weight.normal_(generator=generator)
    pixels = torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1
    colors = ("red", "blue", "green", "pink")
    ids = processor(texts=[f"a small {color} star" for color in colors])["input_ids"]
    for fault in ("nothing", *FAULTS):
        found = call(answer, broken_towers(model, fault), pixels.clone(), ids.clone())
        expect(
            found in (*FAULTS, "nothing"),
            f'your answer is {found!r}: return one of "words", "patches", "colors" and "nothing"',
        )
        if fault == "nothing":
            expect(
                found == "nothing",
                f"sound towers are called blind to {found!r}. Blind is a tower whose vectors stay *the same* "
                "after the change; and the change has to change the input (two pads that change places do "
                "not): print torch.equal(before, after) of the input",
            )
            continue
        expect(
            found != "nothing",
            f"towers that are blind to {fault} seem sound to you. First, {FAULTS[fault]}. Second, "
            "compare with "
            "a tolerance such as 1e-4: sums in another order differ in their last digits",
        )
        expect(
            found == fault,
            f"towers that are blind to {fault} are called blind to {found}: pictures go through "
            "encode_image, "
            "texts through encode_text, and each change needs a test of its own",
        )
    right("to find what a model is blind to, change that and nothing else, and see whether its vectors move.")


def _known_towers(seed: int = SEED) -> tuple[SigLIP, PairProcessor]:
    """Towers that look up the mean color of a picture and the words of a text; vectors of all lengths."""
    model, processor = build(TOWERS)
    assert isinstance(model, SigLIP)
    generator = torch.Generator().manual_seed(seed)
    of_colors = torch.randn(4, 6, generator=generator)
    of_words = torch.randn(model.config.text.vocab_size, 6, generator=generator)

    def encode_image(pixel_values: Tensor) -> Tensor:
        means = pixel_values.mean(dim=(2, 3))  # [n, 3]
        return (means @ of_colors[:3] + of_colors[3]) * means.exp().prod(dim=1, keepdim=True)

    def encode_text(input_ids: Tensor) -> Tensor:
        words = of_words[input_ids]  # [m, T, 6]
        places = torch.linspace(1.0, 2.0, input_ids.shape[1])[:, None]
        return (words * places).sum(dim=1) * words[:, 2, :1].exp()

    for name, function in (("encode_image", encode_image), ("encode_text", encode_text)):
        setattr(model, name, function)
    with torch.no_grad():
        model.logit_scale.fill_(1.1)
        model.logit_bias.fill_(-0.7)
    return model, processor


def _recall(cosines: Tensor, k: int, kind: bool = False) -> float:
    """Recall@k of the rows; `kind`: a draw counts in the model's favor."""
    own = cosines.diagonal()[:, None]
    ranks = 1 + (cosines > own).sum(dim=1) if kind else solutions.find_ranks(cosines)
    return (ranks <= k).double().mean().item()


def _close(result: Any, value: Any) -> bool:
    """Whether two (nested) lists of numbers or names agree."""
    if isinstance(value, str) or isinstance(result, str):
        return bool(result == value)
    if isinstance(value, Sequence):
        return isinstance(result, Sequence) and len(result) == len(value) and all(map(_close, result, value))
    return isinstance(result, int | float) and abs(result - value) < 1e-4


def _plain(result: Any) -> Any:
    """Tensors as lists of numbers, also inside a list or tuple."""
    if isinstance(result, Tensor):
        return result.tolist()
    return [_plain(x) for x in result] if isinstance(result, list | tuple) else result


def match_pictures(answer: Callable[..., Mapping[str, Any]]) -> None:
    """Exercise 6, with towers that look up colors and words."""
    model, processor = _known_towers()
    levels = torch.randint(0, 256, (7, 3), generator=torch.Generator().manual_seed(SEED)).tolist()
    pictures = [
        Image.new("RGB", (32, 32), tuple(level)) for level in [*levels, levels[2]]
    ]  # 2 and 7 are equal
    words = ("red", "blue", "green", "pink", "cyan", "blue", "purple", "orange")  # 1 and 5 read the same
    captions = [f"a small {color} star" for color in words]
    names, templates, k = ["circle", "square", "star"], ["a small red {}", "a large {}", "{}"], 2
    given = (pictures, captions, names, templates)
    result = call(answer, model, processor, *(list(x) for x in given), k)
    keys = ("classes", "found", "recall", "probability")
    expect(
        isinstance(result, Mapping) and set(result) >= set(keys),
        f"return a dictionary with the keys {', '.join(keys)}",
    )
    classes, found, recall, probability = (_plain(result[key]) for key in keys)
    with torch.no_grad():
        reference = solutions.match_pictures(model, processor, *given, k)
        raw = model.encode_image(processor(images=pictures)["pixel_values"])
        texts = model.encode_text(processor(texts=captions)["input_ids"])
        sentences = [[t.replace("{}", name) for t in templates] for name in names]
        of_class = torch.stack([model.encode_text(processor(texts=one)["input_ids"]) for one in sentences])
        images, unit = l2_normalize(raw), l2_normalize(of_class)  # unit: [classes, templates, D]
        cosines = images @ l2_normalize(texts).T
        factor, bias = model.logit_scale.exp(), model.logit_bias
        logits = factor * cosines + bias
    means = {
        "each sentence has to be brought to length 1 before the mean, or long vectors decide": of_class.mean(
            1
        ),
        "you used the first template only: a class is the mean over all of its sentences": unit[:, 0],
        "you used the bare name: put it into every template": unit[:, 2],
    }
    best = {hint: (images @ l2_normalize(mean).T).argmax(dim=1) for hint, mean in means.items()}
    best["the mean of a class is shorter where its sentences differ: bring the mean to length 1 again"] = (
        images @ unit.mean(1).T
    ).argmax(dim=1)
    best["this is the class that fits least: argmax, not argmin"] = (
        images @ l2_normalize(unit.mean(1)).T
    ).argmin(dim=1)
    expect(
        all(isinstance(name, str) for name in classes),
        "`classes` holds numbers: return the name of each picture's class",
    )
    expect(len(classes) == len(pictures), f"`classes` has {len(classes)} names for {len(pictures)} pictures")
    _unless(
        lambda value: _close(classes, value),
        [(f"`classes`: {hint}", [names[i] for i in places.tolist()]) for hint, places in best.items()],
    )
    expect(
        classes == reference["classes"],
        f"`classes` is {classes}, expected {reference['classes']}: the class whose vector has the "
        "largest cosine "
        "with the picture's",
    )
    expect(
        len(found) == len(captions) and all(isinstance(place, int) for place in found),
        "`found` should have one whole number for each caption: the picture that fits it best",
    )
    _unless(
        lambda value: _close(found, value),
        [
            (
                "`found` has the best caption of each picture: turn it around, captions look for pictures",
                cosines.argmax(dim=1).tolist(),
            ),
            (
                "`found` uses vectors of any length, so that bright pictures win: normalize both sides",
                (raw @ texts.T).argmax(dim=0).tolist(),
            ),
        ],
    )
    columns = cosines[[place % len(pictures) for place in found], range(len(captions))]
    expect(
        bool((columns >= cosines.amax(dim=0) - 1e-6).all()),
        f"`found` is {found}, expected {reference['found']}: the picture with the largest cosine "
        "for each caption",
    )
    both = [_recall(c, k) for c in (cosines, cosines.T)]
    _unless(
        lambda value: _close(list(recall), value),
        [
            ("`recall` has its two directions swapped: first pictures that look for captions", both[::-1]),
            (
                "`recall` is kind to draws: a picture stands twice among these, and so does a caption. Count "
                "what is as similar as standing before the right one",
                [_recall(c, k, kind=True) for c in (cosines, cosines.T)],
            ),
            (
                "`recall` is that of rank 1: take the ranks up to k",
                [_recall(c, 1) for c in (cosines, cosines.T)],
            ),
            (
                "`recall` leaves out rank k itself: up to k, and not below it",
                [_recall(c, k - 1) for c in (cosines, cosines.T)],
            ),
            ("`recall` counts pictures: divide by their number", [len(pictures) * share for share in both]),
        ],
    )
    expect(
        isinstance(recall, Sequence) and _close(list(recall), both),
        f"`recall` is {recall}, expected {both}: the share of ranks up to {k}, for pictures that "
        "look for captions "
        "and for captions that look for pictures",
    )
    plain = cosines.diagonal()
    _unless(
        lambda value: _close(probability, value),
        [
            (
                "`probability` is a softmax over the captions: these towers were trained with a sigmoid",
                logits.softmax(dim=1).diagonal().tolist(),
            ),
            (
                "`probability` is a softmax over the pictures: these towers were trained with a sigmoid",
                logits.softmax(dim=0).diagonal().tolist(),
            ),
            (
                "`probability`: logit_scale is the logarithm of the factor, take .exp()",
                (model.logit_scale * plain + bias).sigmoid().tolist(),
            ),
            ("`probability`: the bias is missing", (factor * plain).sigmoid().tolist()),
            ("`probability` holds the cosines: they need factor, bias and sigmoid", plain.tolist()),
            (
                "`probability` holds the logits: a sigmoid makes probabilities of them",
                logits.diagonal().tolist(),
            ),
            (
                "`probability` has a row for each picture: only its own caption is asked for, the diagonal",
                logits.sigmoid().tolist(),
            ),
        ],
    )
    expect(
        _close(probability, reference["probability"]),
        f"`probability` is {probability}, expected {reference['probability']}: the sigmoid of "
        "factor times cosine "
        "plus bias, for each picture with its own caption",
    )
    right("from pixels and words to names, pictures and probabilities: all that two towers are used for.")
