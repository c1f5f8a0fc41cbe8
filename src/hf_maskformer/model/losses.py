"""Losses of mask classification, pure functions of logits and targets (MaskFormer, sec. 3.2; official `criterion.py`).

Targets may be fractional (an averaged mask); `valid` weighs pixels, 0 in padding. Every function returns one value per
mask: a sum over masks divided by a normaliser is the caller's.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGARITHM_OF = 6  # times two: 64 factors
NUMBERS_AT_ONCE = 2**17  # of the losses at points on a CPU


def focal_loss(logits: Tensor, targets: Tensor, valid: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017), averaged over the valid pixels: (M, P), (M, P), (M, P) -> (M,)."""
    probabilities = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    agreement = probabilities * targets + (1 - probabilities) * (1 - targets)
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    per_pixel = balance * cross_entropy * (1 - agreement) ** gamma  # (M, P)
    return (per_pixel * valid).sum(-1) / valid.sum(-1).clamp(min=1)


def dice_loss(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """1 - (2 |p g| + 1) / (|p| + |g| + 1) over the valid pixels: (M, P), (M, P), (M, P) -> (M,)."""
    probabilities = logits.sigmoid() * valid
    overlap = (probabilities * targets).sum(-1)
    return 1 - (2 * overlap + 1) / (probabilities.sum(-1) + (targets * valid).sum(-1) + 1)


def pairwise_mask_costs(
    logits: Tensor, targets: Tensor, valid: Tensor, *, alpha: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """Focal and dice cost of every (query, target) pair of an image, for a batch of images.

    Args:
        logits: (B, Q, P) mask logits.
        targets: (B, N, P) masks; 0 where padded.
        valid: (B, P), 0 in padding.

    Returns:
        Focal cost (mean over valid pixels) and dice cost, both (B, Q, N).
    """
    probabilities = logits.sigmoid() * valid[:, None]
    # -log p and -log(1 - p) of the logits, each weighted as the focal loss of a pixel inside, or outside, the target
    positive = alpha * (1 - logits.sigmoid()) ** gamma * F.softplus(-logits) * valid[:, None]
    negative = (1 - alpha) * probabilities**gamma * F.softplus(logits) * valid[:, None]
    targets_by_pixel = targets.transpose(1, 2)  # (B, P, N)
    count = valid.sum(-1).clamp(min=1)[:, None, None]
    focal = (torch.bmm(positive - negative, targets_by_pixel) + negative.sum(-1, keepdim=True)) / count  # (B, Q, N)
    overlap = torch.bmm(probabilities, targets_by_pixel)  # (B, Q, N)
    areas = probabilities.sum(-1)[:, :, None] + targets.sum(-1)[:, None, :]  # (B, Q, N)
    return focal, 1 - (2 * overlap + 1) / (areas + 1)


class PointLosses(torch.autograd.Function):
    """Binary cross-entropy, averaged over the points, and dice loss of logits (R, P) against values (R, P): (2, R).

    Both need the same sums, and their gradients have a closed form: with p the probabilities, t the values, o the sum
    of p t and a the sums of p and of t together, d bce / dx = (p - t) / P and
    d dice / dx = ((2 o + 1) / (a + 1) ** 2 - 2 t / (a + 1)) p (1 - p). Only p is kept for them. On a CPU a few rows
    are done at a time, so that they stay in its cache.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        probabilities = torch.empty_like(logits)
        sums = logits.new_empty((4, len(logits)))  # cross-entropy, p t, p, t
        for x, t, p, some in _in_parts(logits, wanted, probabilities, *sums):
            torch.sigmoid(x, out=p)
            outside = (x.abs().sum(1) + x.sum(1)) / 2 - _log_certainty(p)  # softplus(x), see `PairSums`
            some[0].copy_(outside - torch.linalg.vecdot(x, t))
            some[1].copy_(torch.linalg.vecdot(p, t))
            some[2].copy_(p.sum(1))
            some[3].copy_(t.sum(1))
        entropy, overlap, area, target_area = sums
        ctx.save_for_backward(probabilities, wanted, overlap, area + target_area)
        return torch.stack([entropy / max(logits.shape[1], 1), 1 - (2 * overlap + 1) / (area + target_area + 1)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        probabilities, wanted, overlap, areas = ctx.saved_tensors
        entropy, dice = gradients[0].unsqueeze(-1)  # (R, 1) each
        entropy = entropy / max(probabilities.shape[1], 1)
        inside = dice * 2 / (areas + 1)[:, None]
        everywhere = dice * ((2 * overlap + 1) / (areas + 1) ** 2)[:, None]
        found = torch.empty_like(probabilities)
        for p, t, gradient, some in _in_parts(probabilities, wanted, found, entropy, inside, everywhere):
            torch.sub(some[2], t * some[1], out=gradient)
            gradient.mul_(p).mul_(1 - p).addcmul_(p - t, some[0])
        return found, None


def _in_parts(
    first: Tensor, second: Tensor, third: Tensor, *further: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, list[Tensor]]]:
    """The same rows of all tensors, a few at a time on a CPU."""
    at_once = max(NUMBERS_AT_ONCE // max(first.shape[1], 1), 1) if first.device.type == "cpu" else len(first)
    for start in range(0, len(first), max(at_once, 1)):
        some = slice(start, start + at_once)
        yield first[some], second[some], third[some], [part[some] for part in further]


def _log_certainty(probabilities: Tensor) -> Tensor:
    """Sum over the points of log(max(p, 1 - p)): (R, P) -> (R,), by the logarithm of products of 64 factors."""
    certainty = torch.maximum(probabilities, 1 - probabilities)  # 0.5 to 1, so a product is at least 0.5 ** 64
    for _ in range(LOGARITHM_OF):
        if certainty.shape[1] % 2 == 0:
            one, other = certainty.chunk(2, dim=1)
            certainty = one * other
    return certainty.log().sum(1)


class PairSums:
    """Costs of every pair of R predicted and N target masks, from points that come in chunks.

    A predicted mask is a product of its query with the embedding of a point. Both costs are functions of sums over
    points, and the sums are all that is kept; those that are linear in the logits are taken of the embeddings.
    """

    def __init__(self, queries: Tensor, targets: int) -> None:
        """`queries` (R, E), and the number N of targets."""
        self.queries = queries
        count, width = queries.shape
        self.magnitude, self.certainty, self.area = queries.new_zeros((3, count)).unbind()
        self.overlap = queries.new_zeros((targets, count))
        self.embedding, self.target_embedding = queries.new_zeros(width), queries.new_zeros((targets, width))
        self.target_area = queries.new_zeros((targets, 1))

    def add(self, pixels: Tensor, targets: Tensor) -> None:
        """Embeddings (E, p) and targets (N, p) of p more points."""
        self.embedding += pixels.sum(1)
        self.target_embedding += targets @ pixels.T
        logits = self.queries @ pixels  # (R, p)
        self.magnitude += logits.abs().sum(1)
        probabilities = logits.sigmoid_()
        self.area += probabilities.sum(1)
        self.overlap += targets @ probabilities.T
        self.target_area += targets.sum(1, keepdim=True)
        self.certainty += _log_certainty(probabilities)

    def costs(self, points: int) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy (mean over the points) and dice cost: (R, N) each."""
        # -log(1 - p) is softplus(x) = max(x, 0) - log(sigmoid(|x|)), and -log p is softplus(x) - x.
        outside = (self.magnitude + self.queries @ self.embedding) / 2 - self.certainty  # max(x, 0) = (|x| + x) / 2
        inside = self.target_embedding @ self.queries.T  # (N, R)
        dice = 1 - (2 * self.overlap + 1) / (self.area + self.target_area + 1)
        return ((outside - inside) / points).T, dice.T


def class_loss(logits: Tensor, targets: Tensor, *, no_object_weight: float) -> Tensor:
    """Weighted cross-entropy of every query: (..., K + 1), (...) -> (...); class K is "no object"."""
    weights = logits.new_ones(logits.shape[-1])
    weights[-1] = no_object_weight
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), weight=weights, reduction="none")
    return flat.view(targets.shape)


def pixel_loss(logits: Tensor, label_map: Tensor) -> Tensor:
    """Per-pixel cross-entropy, averaged over each image's labelled pixels: (B, K, H, W), (B, H, W) -> (B,).

    `label_map` is -1 where no target lies; an image without a label contributes 0.
    """
    per_pixel = F.cross_entropy(logits, label_map, ignore_index=-1, reduction="none")  # (B, H, W)
    labelled = (label_map >= 0).flatten(1).sum(-1).clamp(min=1)
    return per_pixel.flatten(1).sum(-1) / labelled
