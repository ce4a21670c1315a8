"""Classification without training: the classes are sentences (https://arxiv.org/abs/2103.00020, section 3.1).

Each class name is put into several templates ("a photo of a {}.", "a drawing of a {}."), the vectors of
the sentences are averaged, and a picture is compared with these means. The mean of several sentences is
less bound to the words of one of them. The mean is taken of vectors of length 1, so that no sentence counts
for more, and is brought back to length 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minivlm.errors import InputError
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
        templates: sentences in which {} stands for the name.

    Raises:
        InputError: no names or no templates, a template without {}, or a sentence that is too long.
    """
    if not names or not templates:
        raise InputError(
            f"got {len(names)} class names and {len(templates)} templates: give one of each at least"
        )
    for template in templates:
        if "{}" not in template:
            raise InputError(f'the template "{template}" has no place for the class name: write {{}} there')
    means = []
    for name in names:
        # replace, not format: a name or a template may hold other braces.
        sentences = [template.replace("{}", name) for template in templates]
        embeds = model.encode_text(tokenizer(sentences).to(model.device))  # [templates, D]
        means.append(l2_normalize(l2_normalize(embeds).mean(dim=0)))
    return torch.stack(means)


@torch.no_grad()
def classify(model: Matches, pixel_values: Tensor, classes: Tensor) -> Tensor:
    """How likely each picture belongs to each class: [B, C, H, W], [classes, D] -> [B, classes].

    With CLIP a row sums to 1: one of the classes has to be it. With SigLIP every number stands alone, and
    all of a row may be small. The order is the same as that of the cosines in both.
    """
    logits = model.logits(model.encode_image(pixel_values.to(model.device)), classes.to(model.device))
    return model.probabilities(logits)
