"""Numbers about the inside of a model: filters, positions, attention maps, image tokens, hidden patches.

Pure functions of tensors, for any model whose image tokens form a square grid. What they are taken from
stands in inspection.py, how they are drawn in plots.py. `occlusion` is the odd one out: it needs
pictures and a score instead of weights, and is the only one that asks what the answer *depends* on.

Sources: filters, positions and attention distance, section 4.5 of ViT (https://arxiv.org/abs/2010.11929);
rollout, https://arxiv.org/abs/2005.00928; occlusion, https://arxiv.org/abs/1311.2901, section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def filter_components(filters: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer's filters have in common: their principal components.

    Args:
        filters: [D, C, P, P], one small picture for each number of a patch's vector.

    Returns:
        The components as pictures [n, C, P, P] of length 1, most important first, and the share of the
        filters' variance that each explains [n]; n is the smaller of D and C * P * P. The sign of a
        component means nothing.
    """
    flat = filters.flatten(1).float()
    _, strengths, directions = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)
    variances = strengths.square()
    return directions.unflatten(1, filters.shape[1:]), variances / variances.sum()


def position_similarity(table: Tensor) -> Tensor:
    """Cosine similarity of every position's vector with every other's: [N, D] -> [N, N]."""
    unit = F.normalize(table.float(), dim=1)
    return unit @ unit.T


def patch_distances(num_patches: int) -> Tensor:
    """How far the patches of a square grid lie from each other, in patches: [N, N].

    Raises ValueError: the number is not a square.
    """
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"{num_patches} patches do not form a square grid")
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()  # [N, 2], row and column
    return torch.cdist(places, places)


def attention_distance(weights: Tensor) -> Tensor:
    """How far each head looks on average, in patches: [B, H, N, N] -> [H].

    The mean over all pictures and all patches that look, of the distance to the patches that are seen,
    weighted by attention (ViT, figure 7, right; there in pixels).
    """
    distances = patch_distances(weights.shape[-1]).to(weights.device)
    return (weights.float() * distances).sum(dim=-1).mean(dim=(0, 2))


def attention_entropy(weights: Tensor) -> Tensor:
    """How widely each head spreads its attention, in nats: [B, H, T, S] -> [H].

    0 for a head that looks at one place only, log(S) for one that looks everywhere alike. exp(entropy) is
    the number of places among which an even attention of this entropy would be spread.
    """
    return torch.special.entr(weights.float()).sum(dim=-1).mean(dim=(0, 2))


def attention_rollout(maps: Sequence[Tensor]) -> Tensor:
    """Attention through all layers: maps of each layer [B, H, S, S], first layer first -> [B, S, S].

    Each layer is taken as half the mean of its heads, half the identity, which stands for the residual
    path, and the layers are multiplied. Row i says how much each input token would have gone into token i
    at the top, if attention and residual path were all there is. Rows sum to 1.
    """
    identity = torch.eye(maps[0].shape[-1], device=maps[0].device)
    rolled = identity.expand(len(maps[0]), -1, -1)
    for weights in maps:
        rolled = (0.5 * weights.float().mean(dim=1) + 0.5 * identity) @ rolled
    return rolled


def nearest_words(tokens: Tensor, table: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k rows of the embedding table that point most nearly where each token points.

    Args:
        tokens: [N, D].
        table: [V, D].

    Returns:
        Cosines [N, k], largest first, and the ids of the words [N, k].
    """
    cosines = F.normalize(tokens.float(), dim=1) @ table.float().T  # [N, V]
    cosines = cosines / table.float().norm(dim=1).clamp(min=1e-12)
    best = cosines.topk(k, dim=1)
    return best.values, best.indices


def hide_patches(pixel_values: Tensor, patches: Sequence[int] | Tensor, patch_size: int) -> Tensor:
    """A copy of a picture [C, height, width] with some patches filled with its median color.

    Patches are numbered row by row. The median of each channel is the color of the ground, where the ground
    covers more than half of the picture.
    """
    hidden = pixel_values.clone()
    ground = pixel_values.flatten(1).median(dim=1).values[:, None, None]  # [C, 1, 1]
    columns = pixel_values.shape[2] // patch_size
    for number in torch.as_tensor(patches).tolist():
        row, column = number // columns * patch_size, number % columns * patch_size
        hidden[:, row : row + patch_size, column : column + patch_size] = ground
    return hidden


@torch.inference_mode()
def occlusion(
    score: Callable[[Tensor], Tensor], pixel_values: Tensor, patch_size: int, reach: int = 0, batch: int = 64
) -> Tensor:
    """How much a score falls when a patch is hidden: [N], negative where it rises.

    Args:
        score: pictures [B, C, height, width] -> [B], for instance how sure a model is of its answer.
        pixel_values: one picture [C, height, width].
        reach: how many of the neighbors on each side are hidden together with the patch: 0 hides it alone,
            1 hides three by three patches.
        batch: pictures at once.
    """
    rows, columns = (side // patch_size for side in pixel_values.shape[1:])
    pictures = [pixel_values]
    for row in range(rows):
        for column in range(columns):
            together = [
                y * columns + x
                for y in range(max(row - reach, 0), min(row + reach + 1, rows))
                for x in range(max(column - reach, 0), min(column + reach + 1, columns))
            ]
            pictures.append(hide_patches(pixel_values, together, patch_size))
    scores = torch.cat([score(some) for some in torch.stack(pictures).split(batch)])
    return scores[0] - scores[1:]


def log_odds(logits: Tensor, ids: Tensor) -> Tensor:
    """How sure logits [..., V] are of words [...]: log(p / (1 - p)) of each, [...].

    A probability of nearly 1 has no room to fall; its log-odds have. The two kinds of number fall together.
    """
    logits = logits.float()
    chosen = logits.gather(-1, ids[..., None])
    others = logits.scatter(-1, ids[..., None], -torch.inf).logsumexp(dim=-1)
    return chosen[..., 0] - others


def within_picture_share(tokens: Tensor) -> float:
    """How much of an image tower's output tells patches of one picture apart, from 0 to 1.

    The energy of the tokens, the mean of their squares, is made of what all pictures share, of what tells
    pictures apart, and of what tells the patches of one picture apart. A decoder that has to point at
    things lives on the last part. A collapsed tower gives a few hundredths: every patch says the same.

    Args:
        tokens: [P, N, D], the tower's output for P pictures.
    """
    tokens = tokens.double()
    within = (tokens - tokens.mean(dim=1, keepdim=True)).square().mean()
    return float(within / tokens.square().mean().clamp_min(torch.finfo(torch.float64).tiny))
