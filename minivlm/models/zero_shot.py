"""Classification without training: the classes are sentences (https://arxiv.org/abs/2103.00020, section 3.1).

Each class name is put into several templates ("a photo of a {}.", "a drawing of a {}."), the sentence
vectors are averaged, and a picture is compared with these means. A mean of several sentences depends less on
the wording of any one of them. The vectors are normalized to length 1 before averaging, so that every
sentence counts the same, and the mean is normalized again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minivlm.errors import InputError
from minivlm.generate import explain_nonfinite
from minivlm.losses import l2_normalize
from minivlm.models.protocols import Matches
from minivlm.processing.captions import CaptionTokenizer


@torch.no_grad()
def class_embeddings(
    model: Matches,
    tokenizer: CaptionTokenizer,
    names: Sequence[str],
    templates: Sequence[str] = ("a photo of a {}.",),
) -> Tensor:
    """One vector of length 1 for each class: [classes, D].

    Args:
        templates: sentences with {} in place of the name.

    Raises:
        InputError: see `check_classes`; a sentence that is too long.
    """
    check_classes(tokenizer, names, templates)
    means = []
    for name in names:
        # replace, not format: a name or a template may contain other braces.
        sentences = [template.replace("{}", name) for template in templates]
        embeds = model.encode_text(tokenizer(sentences).to(model.device))  # [templates, D]
        means.append(l2_normalize(l2_normalize(embeds).mean(dim=0)))
    return torch.stack(means)


def check_classes(tokenizer: CaptionTokenizer, names: Sequence[str], templates: Sequence[str]) -> None:
    """Raises InputError: no names or no templates, one text instead of a list, a template without {}, or two
    names that the model reads alike ("cat" and "Cat").
    """
    for what, texts in (("class names", names), ("templates", templates)):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"the {what} are {texts!r}: expected a list of texts, one for each")
    if not names or not templates:
        raise InputError(
            f"got {len(names)} class names and {len(templates)} templates: give one of each at least"
        )
    for template in templates:
        if "{}" not in template:
            raise InputError(f'the template "{template}" has no place for the class name: write {{}} there')
    seen: dict[tuple[int, ...], str] = {}
    for name in names:
        ids = tuple(tokenizer.encode(name))
        if ids in seen:
            raise InputError(
                f"the class names {seen[ids]!r} and {name!r} are the same to the model: leave one of them out"
            )
        seen[ids] = name


@torch.no_grad()
def classify(model: Matches, pixel_values: Tensor, classes: Tensor) -> Tensor:
    """The probability of each class for each picture: [B, C, H, W], [classes, D] -> [B, classes].

    With CLIP, a row sums to 1: the picture must belong to one of the classes. With SigLIP, each probability
    is independent, and a whole row may be small. Both rank the classes in the order of their cosines.

    Raises InputError: the pictures, the weights or the numbers between them are not finite.
    """
    logits = model.logits(model.encode_image(pixel_values.to(model.device)), classes.to(model.device))
    if not torch.isfinite(logits).all():
        raise InputError(explain_nonfinite(model, {"pixel_values": pixel_values, "classes": classes}))
    return model.probabilities(logits)
