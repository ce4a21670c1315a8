"""Measures of a model's internals: filters, positions, attention maps, image tokens, hidden patches.

Pure functions of tensors, for any model whose image tokens form a square grid. inspection.py collects their
inputs, and plots.py draws their results. `occlusion` is the exception: it needs pictures and a score instead
of weights, and only it measures what the answer *depends* on.

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
        filters: [D, C, P, P], one small picture for each entry of a patch's vector.

    Returns:
        The components as pictures [n, C, P, P] of length 1, most important first, and the share of the
        filters' variance that each explains [n]; n = min(D, C * P * P). The sign of a component has no
        meaning.
    """
    flat = filters.flatten(1).float()
    _, strengths, directions = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)
    variances = strengths.square()
    return directions.unflatten(1, filters.shape[1:]), variances / variances.sum()


def position_similarity(table: Tensor) -> Tensor:
    """Cosine similarity of every position's vector with every other's: [N, D] -> [N, N]."""
    unit = F.normalize(table.float(), dim=1)
    return unit @ unit.T


def patch_distances(num_patches: int, columns: int | None = None) -> Tensor:
    """The distances between the patches of a grid, in patches: [N, N]. Without `columns`, it is a square.

    Raises ValueError: the number of patches is not a square.
    """
    side = math.isqrt(num_patches)
    if columns is None and side * side != num_patches:
        raise ValueError(f"{num_patches} patches do not form a square grid")
    columns = columns or side
    rows = num_patches // columns
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()  # [N, 2], row and column
    return torch.cdist(grid, grid)


def attention_distance(weights: Tensor, columns: int | None = None) -> Tensor:
    """How far each head looks on average, in patches: [B, H, N, N] -> [H]; `columns` as in `patch_distances`.

    The distance from a patch to the patches that it sees, weighted by attention and averaged over all patches
    and pictures (ViT, figure 7, right; there in pixels).
    """
    distances = patch_distances(weights.shape[-1], columns).to(weights.device)
    return (weights.float() * distances).sum(dim=-1).mean(dim=(0, 2))


def attention_entropy(weights: Tensor) -> Tensor:
    """How widely each head spreads its attention, in nats: [B, H, T, S] -> [H].

    0 for a head that looks at a single position, log(S) for uniform attention. exp(entropy) is the number of
    positions over which uniform attention has this entropy.
    """
    return torch.special.entr(weights.float()).sum(dim=-1).mean(dim=(0, 2))


def attention_rollout(maps: Sequence[Tensor]) -> Tensor:
    """Attention through all layers: one map [B, H, S, S] per layer, first layer first -> [B, S, S].

    Each layer counts as half the mean of its heads and half the identity, for the residual path, and the
    layers are multiplied. Row i says how much each input token would contribute to output token i if
    attention and the residual path were all there is. Rows sum to 1.
    """
    identity = torch.eye(maps[0].shape[-1], device=maps[0].device)
    rolled = identity.expand(len(maps[0]), -1, -1)
    for weights in maps:
        rolled = (0.5 * weights.float().mean(dim=1) + 0.5 * identity) @ rolled
    return rolled


def nearest_words(tokens: Tensor, table: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k rows of the embedding table that point most nearly in the direction of each token.

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
    """A copy of a picture [C, height, width] with the given patches filled with its median color.

    Patches are numbered row by row. The median of each channel is the color of the background if that covers
    more than half of the picture.
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
        score: pictures [B, C, height, width] -> [B], for example how sure a model is of its answer.
        pixel_values: one picture [C, height, width].
        reach: how many neighbors on each side are hidden together with the patch: 0 hides the patch alone,
            1 hides 3 x 3 patches.
        batch: how many pictures to score at once.
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
    scores = torch.cat([score(part) for part in torch.stack(pictures).split(batch)])
    return scores[0] - scores[1:]


def log_odds(logits: Tensor, ids: Tensor) -> Tensor:
    """How sure logits [..., V] are of tokens [...]: the log-odds log(p / (1 - p)) of each, [...].

    Near 1, a probability hardly changes, but its log-odds still do. Both rise and fall together.
    """
    logits = logits.float()
    chosen = logits.gather(-1, ids[..., None])
    others = logits.scatter(-1, ids[..., None], -torch.inf).logsumexp(dim=-1)
    return chosen[..., 0] - others


def within_picture_share(tokens: Tensor) -> float:
    """The share of an image tower's output that tells patches of one picture apart, from 0 to 1.

    The energy of the tokens (the mean of their squares) has three parts: what all pictures share, what tells
    pictures apart, and what tells the patches of one picture apart. A decoder that must locate things depends
    on the last part. A collapsed tower gives a few hundredths: all patches look the same.

    Args:
        tokens: [P, N, D], the tower's output for P pictures.
    """
    tokens = tokens.double()
    within = (tokens - tokens.mean(dim=1, keepdim=True)).square().mean()
    return float(within / tokens.square().mean().clamp_min(torch.finfo(torch.float64).tiny))
