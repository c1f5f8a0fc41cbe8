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
NUMBERS_AT_ONCE = 2**17  # pixels or points whose losses are computed together on a CPU
NUMBERS_ELSEWHERE = 2**26


def focal_loss(logits: Tensor, targets: Tensor, valid: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017), averaged over the valid pixels: (M, P), (M, P), (M, P) -> (M,)."""
    probabilities = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    agreement = probabilities * targets + (1 - probabilities) * (1 - targets)
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    per_pixel = balance * cross_entropy * (1 - agreement) ** gamma  # (M, P)
    return (per_pixel * valid).sum(-1) / valid.sum(-1).clamp(min=1)


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


class MaskLosses(torch.autograd.Function):
    """Focal and dice loss of logits (M, h, w), resized to their targets, each with its target and image: (2, M).

    The focal loss is averaged over the valid pixels, the dice loss is 1 - (2 o + 1) / (a + 1) with o the sum of p t
    and a those of p and of t together (p the probabilities, t the target). No tensor is as large as pairs x pixels: a
    few masks are resized and compared at a time, in the backward pass once more, and the losses share their sums. The
    gradients at a pixel are, with c the cross-entropy, q = p (1 - p), d = p + t - 2 p t and b = alpha t + (1 - alpha)
    (1 - t), b (d ** gamma (p - t) + gamma c d ** (gamma - 1) q (1 - 2 t)) / pixels and
    ((2 o + 1) / (a + 1) ** 2 - 2 t / (a + 1)) q.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        valid: Tensor | None,
        target: Tensor,
        image: Tensor,
        alpha: float,
        gamma: float,
    ) -> Tensor:
        """`targets` (T, H, W); `valid` (B, H, W) weights of the pixels, None: all are 1; `target` and `image` (M,)."""
        sums = logits.new_empty((5, len(logits)))  # focal, p t, p, t, weight
        for some in _few(targets[0].numel(), len(logits), logits.device):
            x, t, v = _compared(logits[some], targets, valid, target[some], image[some])
            p = x.sigmoid()
            entropy = (x.clamp(min=0) - x * t).sub_(torch.maximum(p, 1 - p).log_())
            weighted = p if v is None else p * v
            focal = entropy.mul_(_disagreement(p, t).pow_(gamma)).mul_(_balance(t, alpha))
            sums[0, some] = focal.sum(1) if v is None else torch.linalg.vecdot(focal, v)
            sums[1, some] = torch.linalg.vecdot(weighted, t)
            sums[2, some] = weighted.sum(1)
            sums[3, some] = t.sum(1) if v is None else torch.linalg.vecdot(t, v)
            sums[4, some] = t.shape[1] if v is None else v.sum(1)
        focal, overlap, area, target_area, weight = sums
        weight = weight.clamp(min=1)
        ctx.save_for_backward(logits, targets, valid, target, image, overlap, area + target_area, weight)
        ctx.alpha, ctx.gamma = alpha, gamma
        return torch.stack([focal / weight, 1 - (2 * overlap + 1) / (area + target_area + 1)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, valid, target, image, overlap, areas, weight = ctx.saved_tensors
        focal, dice = gradients[0]  # (M,) each
        focal = (focal / weight)[:, None]
        inside = (dice * 2 / (areas + 1))[:, None]
        everywhere = (dice * (2 * overlap + 1) / (areas + 1) ** 2)[:, None]
        found = torch.empty_like(logits)
        size = list(targets.shape[1:])
        for some in _few(targets[0].numel(), len(logits), logits.device):
            x, t, v = _compared(logits[some], targets, valid, target[some], image[some])
            p = x.sigmoid()
            slope = p * (1 - p)
            entropy = (x.clamp(min=0) - x * t).sub_(torch.maximum(p, 1 - p).log_())
            apart = _disagreement(p, t)
            power = apart.pow(ctx.gamma - 1)
            gradient = entropy.mul_(power).mul_(slope).mul_(1 - 2 * t).mul_(ctx.gamma)
            gradient.addcmul_(power.mul_(apart), p - t).mul_(_balance(t, ctx.alpha)).mul_(focal[some])
            gradient.addcmul_(slope, everywhere[some] - t * inside[some])
            if v is not None:
                gradient.mul_(v)
            gradient = gradient.unflatten(1, size)
            if size != list(logits.shape[1:]):
                shape = [len(gradient), 1, *logits.shape[1:]]
                gradient = torch.ops.aten.upsample_bilinear2d_backward(gradient[:, None], size, shape, False)[:, 0]
            found[some] = gradient
        return found, None, None, None, None, None, None


def _few(pixels: int, count: int, device: torch.device) -> Iterator[slice]:
    """Parts of `count` masks, a few at a time on a CPU, so that they stay in its cache."""
    at_once = max(NUMBERS_AT_ONCE // pixels, 1) if device.type == "cpu" else max(NUMBERS_ELSEWHERE // pixels, 1)
    for start in range(0, count, at_once):
        yield slice(start, start + at_once)


def _compared(
    logits: Tensor, targets: Tensor, valid: Tensor | None, target: Tensor, image: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Resized logits, targets and weights of a few masks: (m, H * W) each."""
    size = (targets.shape[1], targets.shape[2])
    if logits.shape[1:] != size:
        logits = F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    weights = None if valid is None else valid[image].to(logits.dtype).flatten(1)
    return logits.flatten(1), targets[target].to(logits.dtype).flatten(1), weights


def _disagreement(probabilities: Tensor, targets: Tensor) -> Tensor:
    """1 - (p t + (1 - p) (1 - t)), above 0 so that any power of it is finite."""
    apart = (probabilities + targets).addcmul_(probabilities, targets, value=-2)
    return apart.clamp_(min=torch.finfo(apart.dtype).tiny)


def _balance(targets: Tensor, alpha: float) -> Tensor:
    """alpha t + (1 - alpha) (1 - t)"""
    return (targets * (2 * alpha - 1)).add_(1 - alpha)


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
