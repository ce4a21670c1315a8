"""What training asks of the model: to say what lies on each patch, and to answer.

Both losses are sums of cross-entropies. Two classes are unusual: `PatchHead` keeps the tower from collapsing,
and `SoftTargets` tells the model that the words for coordinates are a ruler.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Tokenizer
from minivlm.processing.boxes import NUM_BINS
from minivlm.world.batches import Batch, question_mask
from minivlm.world.scenes import COLORS, SHAPES, SIZES, WORLD


class PatchHead(nn.Linear):
    """One linear layer that says for each image token what lies on its patch. Discarded after training."""

    sizes = (1 + len(COLORS), 1 + len(SHAPES), 1 + len(SIZES), 4)

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, sum(self.sizes))

    def loss(self, tokens: Tensor, batch: Batch, things: Tensor | None = None) -> Tensor:
        """Cross-entropy of color, shape and size, and the error of the box, from tokens [P, N, D].

        things: how many patches show one, if those of other pictures count as well.
        """
        color, shape, size, box = self(tokens).float().split(self.sizes, dim=-1)
        pairs = ((color, batch.patch_color), (shape, batch.patch_shape), (size, batch.patch_size))
        loss = torch.stack(
            [F.cross_entropy(logits.flatten(0, 1), labels.flatten()) for logits, labels in pairs]
        )
        on_thing = (batch.patch_color > 0)[..., None]
        scale = WORLD / 4  # units; brings the box error to the size of the other losses
        error = F.smooth_l1_loss(box, batch.patch_box / scale, reduction="none", beta=0.1)
        things = on_thing.sum() if things is None else things
        return loss.sum() + (error * on_thing).sum() / (4 * things)


def answer_loss(
    model: PaliGemma, image_tokens: Tensor, batch: Batch, image_sees_prompt: bool, soft: SoftTargets
) -> Tensor:
    """Weighted cross-entropy of the answers' tokens.

    Args:
        image_tokens: [P, N, D], the tower's output.
        image_sees_prompt: the true prefix-LM mask; needs one question per row.
        soft: targets for the words for coordinates.
    """
    features = model.multi_modal_projector(image_tokens)[batch.pictures]  # [R, N, D]
    embeds = torch.cat([features, model.language_model.embed(batch.input_ids)], dim=1)  # [R, S, D]
    mask, position_ids = question_mask(batch, features.shape[1], image_sees_prompt)
    hidden = model.language_model(embeds, position_ids, mask)
    # The token at text place t is predicted at the place before it. Only answers need logits.
    before = hidden[:, features.shape[1] - 1 : -1]
    wanted = batch.labels != -100
    logits = model.logits(before[wanted]).float()  # [answers' tokens, V]
    losses = soft.cross_entropy(logits, batch.labels[wanted])
    weights = batch.weights[wanted]
    return (losses * weights).sum() / weights.sum()


class SoftTargets:
    """Cross-entropy that forgives a coordinate that is nearly right.

    The 1024 `<loc>` words are a ruler, which one-hot targets do not say: if the label is 301, bin 300 is as
    wrong as bin 900. Here the target of a coordinate is a bell of width sigma around its bin.
    """

    def __init__(self, tokenizer: Tokenizer, sigma: float) -> None:
        self.first = tokenizer.loc_ids[0]
        self.columns = slice(self.first, self.first + NUM_BINS)
        bins = torch.arange(NUM_BINS, dtype=torch.float32)
        bells = (
            torch.exp(-0.5 * ((bins[:, None] - bins[None]) / sigma) ** 2) if sigma else torch.eye(NUM_BINS)
        )
        self.bells = bells / bells.sum(dim=1, keepdim=True)  # [1024, 1024]

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [n, V], labels [n] -> losses [n]."""
        log_probabilities = logits.log_softmax(dim=-1)
        losses = -log_probabilities.gather(1, labels[:, None])[:, 0]
        is_loc = (labels >= self.first) & (labels < self.first + NUM_BINS)
        bells = self.bells[labels[is_loc] - self.first]
        soft = -(bells * log_probabilities[is_loc, self.columns]).sum(dim=-1)
        return losses.masked_scatter(is_loc, soft)
