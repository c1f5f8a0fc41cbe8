"""Losses of mask classification, pure functions of logits and targets (MaskFormer, sec. 3.2; official `criterion.py`).

Targets may be fractional (an averaged mask); `valid` weighs pixels, 0 in padding. Every function returns one value per
mask: a sum over masks divided by a normaliser is the caller's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def pairwise_point_costs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy (mean over points) and dice cost of every pair: (B, Q, P), (B, N, P) -> twice (B, Q, N)."""
    targets_by_point = targets.transpose(1, 2)  # (B, P, N)
    # -log(1 - p) is softplus(x), and -log p is softplus(x) - x.
    outside = F.softplus(logits).sum(-1, keepdim=True)  # (B, Q, 1)
    cross_entropy = (outside - torch.bmm(logits, targets_by_point)) / logits.shape[-1]
    probabilities = logits.sigmoid()
    overlap = torch.bmm(probabilities, targets_by_point)
    areas = probabilities.sum(-1)[:, :, None] + targets.sum(-1)[:, None, :]
    return cross_entropy, 1 - (2 * overlap + 1) / (areas + 1)


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
