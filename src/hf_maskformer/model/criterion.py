"""Matching, losses and deep supervision of mask classification (MaskFormer, sec. 3.2; DETR's set criterion).

All layers and images are matched in one pass: one cost tensor, one copy to the host. Every term is a local sum over a
*global mean count*, so that one process with 8 images, two with 4 and 4 accumulation steps of 2 give the same
gradients. Works in float32, or float64 when the logits are, whatever the model's dtype; autocast is switched off
inside.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from .losses import class_loss, dice_loss, focal_loss, pairwise_mask_costs, pixel_loss
from .matcher import Match, match_fixed, match_hungarian

logger = logging.get_logger(__name__)


class Targets(NamedTuple):
    """The batch's targets, padded to the largest number of segments N."""

    masks: Tensor  # (B, N, H, W) bool, uint8 or float; 0 beyond an image's own segments
    labels: list[Tensor]  # B tensors (N_i,)
    counts: list[int]
    valid: Tensor  # (B, H, W) bool, False in padding


class Criterion(nn.Module):
    """`predictions per layer, targets -> (loss, loss_dict)`.

    `loss_dict` holds the unweighted terms, summed over layers: `loss_class`, `loss_mask` (focal), `loss_dice` and,
    with a pixel weight, `loss_pixel`.
    """

    def __init__(
        self,
        *,
        num_labels: int,
        matcher: str,
        class_weight: float,
        mask_weight: float,
        dice_weight: float,
        pixel_weight: float,
        no_object_weight: float,
        class_cost: float,
        mask_cost: float,
        dice_cost: float,
        focal_alpha: float,
        focal_gamma: float,
        resolution: str,
    ) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.matcher = matcher
        self.weights = {
            "loss_class": class_weight,
            "loss_mask": mask_weight,
            "loss_dice": dice_weight,
            "loss_pixel": pixel_weight,
        }
        self.no_object_weight = no_object_weight
        self.class_cost, self.mask_cost, self.dice_cost = class_cost, mask_cost, dice_cost
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.resolution = resolution

    def forward(
        self,
        class_logits: Sequence[Tensor],
        mask_logits: Sequence[Tensor],
        *,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        pixel_mask: Tensor | None,
        pixel_logits: Tensor | None,
        normalizer: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of L layers of B images.

        Args:
            class_logits: L tensors (B, Q, K + 1).
            mask_logits: L tensors (B, Q, h, w).
            mask_labels: B tensors (N_i, H, W) on the padded canvas, 0 in padding.
            class_labels: B tensors (N_i,).
            pixel_mask: (B, H, W), 0 in padding; None: nothing is padded.
            pixel_logits: (B, K, h, w) of the auxiliary per-pixel classifier, or None.
            normalizer: (3,) counts of masks, class weight and images, see `loss_normalizer`.

        Raises:
            ValueError: Targets of wrong number, size or class.
            FloatingPointError: A non-finite logit or target; names the image's index in the batch.
        """
        with torch.autocast(device_type=class_logits[0].device.type, enabled=False):
            dtype = torch.promote_types(class_logits[0].dtype, torch.float32)
            classes = torch.stack([logits.to(dtype) for logits in class_logits])  # (L, B, Q, K + 1)
            masks = torch.stack([logits.to(dtype) for logits in mask_logits])  # (L, B, Q, h, w)
            targets = prepare_targets(mask_labels, class_labels, pixel_mask, num_images=classes.shape[1])
            coarse_valid = resize_masks(targets.valid[:, None], masks.shape[-2:])[:, 0].to(dtype)  # (B, h, w)
            coarse = resize_masks(targets.masks, masks.shape[-2:]).to(dtype) * coarse_valid[:, None]  # (B, N, h, w)
            matches, padded = self._match(classes.detach(), masks.detach(), targets, coarse, coarse_valid)
            mask_count, class_count, image_count = normalizer.to(device=classes.device, dtype=dtype).unbind()
            terms = {"loss_class": self._class_term(classes, targets, matches) / class_count}
            focal, dice = self._mask_terms(masks, targets, matches, padded=padded)
            terms["loss_mask"], terms["loss_dice"] = focal / mask_count, dice / mask_count
            if pixel_logits is not None:
                label_map = paint_labels(coarse, targets.labels)
                terms["loss_pixel"] = pixel_loss(pixel_logits.to(dtype), label_map).sum() / image_count
            loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return loss, terms

    @torch.no_grad()
    def _match(
        self, classes: Tensor, masks: Tensor, targets: Targets, coarse: Tensor, coarse_valid: Tensor
    ) -> tuple[list[list[Match]], bool]:
        """Per layer and image (queries, targets), and whether any pixel is padding.

        The single copy to the host also carries the checks of labels and finiteness.
        """
        layers, images, queries = classes.shape[:3]
        most = coarse.shape[1]
        labels = torch.zeros((images, most), dtype=torch.int64, device=classes.device)
        for index, image_labels in enumerate(targets.labels):
            labels[index, : len(image_labels)] = image_labels
        wrong_label = (labels < 0) | (labels >= self.num_labels)  # (B, N)
        finite = torch.stack(
            [
                classes.isfinite().all(-1).all(-1).all(0),
                masks.isfinite().flatten(2).all(-1).all(0),
                coarse.isfinite().flatten(1).all(-1),
                _within_unit(targets.masks),
            ]
        )  # (4, B)
        costs = classes.new_zeros((layers, images, queries, most))
        if self.matcher == "hungarian" and most:
            costs = self._costs(classes, masks, labels.clamp(0, self.num_labels - 1), coarse, coarse_valid)
        padding = ~targets.valid.all()
        parts = [part.to(costs.dtype) for part in (costs, labels, wrong_label, finite, padding)]
        host = torch.cat([part.flatten() for part in parts]).cpu().numpy()
        cost_values, label_values, wrong_values, finite_values, padded = np.split(
            host, np.cumsum([part.numel() for part in parts])[:-1]
        )
        _check_labels(label_values.reshape(labels.shape), wrong_values.reshape(labels.shape), self.num_labels)
        _check_finite(finite_values.reshape(finite.shape))
        if self.matcher == "fixed":
            per_image = label_values.reshape(labels.shape)
            host_labels = [row[:count].astype(np.int64) for row, count in zip(per_image, targets.counts, strict=True)]
            return match_fixed(host_labels, num_layers=layers), bool(padded)
        _warn_if_more_targets(targets.counts, queries)
        if not np.isfinite(cost_values).all():
            raise FloatingPointError(
                "Finite logits gave a non-finite matching cost: they are too large for the dtype."
            )
        return match_hungarian(cost_values.reshape(costs.shape), targets.counts), bool(padded)

    def _costs(self, classes: Tensor, masks: Tensor, labels: Tensor, coarse: Tensor, coarse_valid: Tensor) -> Tensor:
        """(L, B, Q, N) costs; the class cost is -p(class), as DETR and MaskFormer have it."""
        layers, images, queries = classes.shape[:3]
        by_image = masks.transpose(0, 1).reshape(images, layers * queries, -1)  # (B, L*Q, h*w)
        focal, dice = pairwise_mask_costs(
            by_image, coarse.flatten(2), coarse_valid.flatten(1), alpha=self.focal_alpha, gamma=self.focal_gamma
        )  # (B, L*Q, N)
        mask_costs = self.mask_cost * focal + self.dice_cost * dice
        mask_costs = mask_costs.unflatten(1, (layers, queries)).transpose(0, 1)  # (L, B, Q, N)
        index = labels[None, :, None, :].expand(layers, -1, queries, -1)
        return mask_costs - self.class_cost * classes.softmax(-1).gather(-1, index)

    def _class_term(self, classes: Tensor, targets: Targets, matches: list[list[Match]]) -> Tensor:
        """Cross-entropy summed over layers, images and queries; unmatched queries are "no object"."""
        wanted = torch.full(classes.shape[:3], self.num_labels, dtype=torch.int64, device=classes.device)
        for layer, layer_matches in enumerate(matches):
            for image, (queries, segments) in enumerate(layer_matches):
                chosen = targets.labels[image][torch.as_tensor(segments, device=classes.device)]
                wanted[layer, image, torch.as_tensor(queries, device=classes.device)] = chosen
        return class_loss(classes, wanted, no_object_weight=self.no_object_weight)

    def _mask_terms(
        self, masks: Tensor, targets: Targets, matches: list[list[Match]], *, padded: bool
    ) -> tuple[Tensor, Tensor]:
        """Focal and dice loss, summed over all matched pairs of all layers."""
        rows = [
            (layer, image, query, segment)
            for layer, layer_matches in enumerate(matches)
            for image, (queries, segments) in enumerate(layer_matches)
            for query, segment in zip(queries.tolist(), segments.tolist(), strict=True)
        ]
        if not rows:
            nothing = masks.sum() * 0  # keeps every parameter in the graph, which DDP needs
            return nothing, nothing
        layer, image, query, segment = torch.tensor(rows, device=masks.device).unbind(1)
        logits = masks[layer, image, query]  # (M, h, w)
        dense_valid = targets.valid.to(masks.dtype)
        if self.resolution == "target":
            size = (targets.masks.shape[-2], targets.masks.shape[-1])
            if padded:
                logits = extend_into_padding(logits, targets.valid[image])
            logits = F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
            wanted, valid = targets.masks[image, segment].to(masks.dtype), dense_valid
        else:
            shares, valid = average_masks(targets.masks, dense_valid, masks.shape[-2:])
            wanted = shares[image, segment]
        logits, wanted, valid = logits.flatten(1), wanted.flatten(1), valid.flatten(1)[image]  # (M, P)
        focal = focal_loss(logits, wanted, valid, alpha=self.focal_alpha, gamma=self.focal_gamma)
        return focal.sum(), dice_loss(logits, wanted, valid).sum()


def loss_normalizer(
    class_labels: Sequence[Tensor],
    *,
    num_queries: int,
    no_object_weight: float,
    divisor: float = 1.0,
    reduce: bool = True,
    device: torch.device | None = None,
) -> Tensor:
    """The three counts that the loss terms are divided by, for the images of one optimiser step.

    With W processes and G = `divisor` (what the loss is divided by again before the gradients are added up: the
    accumulation steps) they are, over all images of all processes: max(1, masks) / (W G), the total class weight
    (matched + no_object_weight * unmatched queries) / (W G), images / (W G).

    Args:
        class_labels: Labels (N_i,) of every image of the accumulation window on this process.
        reduce: Sum over processes when torch.distributed is running (a collective call: every process must make it).
        device: Where the collective runs; needed for NCCL.

    Returns:
        (3,) float64.
    """
    counts = [len(labels) for labels in class_labels]
    matched = sum(min(count, num_queries) for count in counts)
    total = torch.tensor([sum(counts), matched, len(counts)], dtype=torch.float64, device=device)
    world = 1
    if reduce and dist.is_available() and dist.is_initialized():
        world = dist.get_world_size()
        dist.all_reduce(total)
    masks, matched_total, images = total.unbind()
    class_weight = matched_total + no_object_weight * (num_queries * images - matched_total)
    return torch.stack([masks.clamp(min=1), class_weight, images.clamp(min=1)]) / (world * divisor)


def prepare_targets(
    mask_labels: Sequence[Tensor], class_labels: Sequence[Tensor], pixel_mask: Tensor | None, *, num_images: int
) -> Targets:
    """Check the batch's targets and pad them to one tensor; masks keep their dtype (bool stays bool)."""
    if len(mask_labels) != num_images or len(class_labels) != num_images:
        raise ValueError(
            f"{num_images} images need as many targets; got {len(mask_labels)} mask_labels, "
            f"{len(class_labels)} class_labels."
        )
    sizes = {tuple(masks.shape[-2:]) for masks in mask_labels}
    if len(sizes) > 1:
        raise ValueError(f"mask_labels must share one canvas (pad them with 0), got the sizes {sorted(sizes)}.")
    for index, (masks, labels) in enumerate(zip(mask_labels, class_labels, strict=True)):
        if masks.ndim != 3 or labels.ndim != 1 or len(masks) != len(labels):
            raise ValueError(
                f"Image {index}: mask_labels must be (N, H, W) and class_labels (N,), got {tuple(masks.shape)} and "
                f"{tuple(labels.shape)}."
            )
    counts = [len(masks) for masks in mask_labels]
    padded = nn.utils.rnn.pad_sequence(list(mask_labels), batch_first=True)  # (B, N, H, W)
    height, width = padded.shape[-2:]
    if pixel_mask is None:
        valid = torch.ones((num_images, height, width), dtype=torch.bool, device=padded.device)
    else:
        valid = resize_masks((pixel_mask > 0)[:, None], (height, width))[:, 0]
    return Targets(padded, [labels.to(torch.int64) for labels in class_labels], counts, valid)


def resize_masks(masks: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Nearest-neighbour resize of (B, N, H, W) masks; bool, uint8 and float keep their dtype, others get float32."""
    size = (size[0], size[1])
    if not masks.numel():
        return masks.new_zeros((masks.shape[0], masks.shape[1], *size))
    if masks.shape[-2:] == size:
        return masks
    if masks.dtype == torch.bool:
        return F.interpolate(masks.to(torch.uint8), size=size, mode="nearest").to(torch.bool)
    if masks.dtype != torch.uint8 and not masks.is_floating_point():
        masks = masks.to(torch.float32)
    return F.interpolate(masks, size=size, mode="nearest")


def extend_into_padding(logits: Tensor, valid: Tensor) -> Tensor:
    """Repeat the last valid row and column of (M, h, w) logits over the padding at the bottom and right.

    Upsampling mixes neighbouring cells; so the image's border is treated as an unpadded image's border is.
    `valid` is (M, H, W) at pixel resolution; a cell that holds any valid pixel is valid.
    """
    height, width = logits.shape[-2:]
    rows = (valid.any(2).sum(1) * height / valid.shape[1]).ceil().long().clamp(min=1) - 1  # (M,) last valid row
    columns = (valid.any(1).sum(1) * width / valid.shape[2]).ceil().long().clamp(min=1) - 1
    row_index = torch.arange(height, device=logits.device).minimum(rows[:, None])  # (M, h)
    column_index = torch.arange(width, device=logits.device).minimum(columns[:, None])  # (M, w)
    logits = logits.gather(1, row_index[:, :, None].expand_as(logits))
    return logits.gather(2, column_index[:, None, :].expand_as(logits))


def average_masks(masks: Tensor, valid: Tensor, size: tuple[int, int] | torch.Size) -> tuple[Tensor, Tensor]:
    """Average masks down to the share of each cell's *valid* pixels that they cover.

    Args:
        masks: (B, N, H, W).
        valid: (B, H, W) in the dtype of the result, 0 in padding.
        size: Height and width of the result.

    Returns:
        (B, N, h, w) shares, and (B, h, w) the share of each cell that is valid: its weight in the loss.
    """
    size = (size[0], size[1])
    weight = F.adaptive_avg_pool2d(valid[:, None], size)  # (B, 1, h, w)
    covered = F.adaptive_avg_pool2d(masks.to(valid.dtype) * valid[:, None], size)  # (B, N, h, w)
    return covered / weight.clamp(min=torch.finfo(valid.dtype).tiny), weight[:, 0]


def paint_labels(masks: Tensor, labels: Sequence[Tensor]) -> Tensor:
    """(B, N, h, w) masks and their classes -> (B, h, w) class map, -1 where no mask lies; smaller masks lie on top."""
    images, most, height, width = masks.shape
    if most == 0:
        return torch.full((images, height, width), -1, dtype=torch.int64, device=masks.device)
    classes = torch.full((images, most), -1, dtype=torch.int64, device=masks.device)
    for index, image_labels in enumerate(labels):
        classes[index, : len(image_labels)] = image_labels
    area = masks.flatten(2).sum(-1)  # (B, N)
    priority = (masks > 0.5) / area.clamp(min=1)[:, :, None, None]  # (B, N, h, w)
    best, owner = priority.max(dim=1)  # (B, h, w)
    painted = classes.gather(1, owner.flatten(1)).view(images, height, width)
    return painted.masked_fill(best <= 0, -1)


def _check_labels(labels: np.ndarray, wrong: np.ndarray, num_labels: int) -> None:
    if not wrong.any():
        return
    image, position = np.argwhere(wrong)[0]
    value = int(labels[image, position])
    hint = " The ids look 1-based: subtract 1." if value == num_labels else ""
    raise ValueError(
        f"class_labels[{image}] contains {value}, allowed are 0..{num_labels - 1} ({num_labels} labels).{hint}"
    )


def _within_unit(masks: Tensor) -> Tensor:
    """Per image, whether all of its (N, H, W) masks lie within 0..1: (B, N, H, W) -> (B,)."""
    if masks.dtype == torch.bool or not masks.numel():
        return torch.ones(masks.shape[0], dtype=torch.bool, device=masks.device)
    flat = masks.flatten(1)
    return ~((flat < 0) | (flat > 1)).any(-1)


def _check_finite(finite: np.ndarray) -> None:
    for row, what in enumerate(("class logits", "mask logits", "mask_labels")):
        if not finite[row].all():
            image = int(np.argmin(finite[row]))
            raise FloatingPointError(
                f"Non-finite {what} for image {image} of the batch. Look at this image and its targets; if they are "
                "sound, lower the learning rate or train in float32."
            )
    if not finite[3].all():
        raise ValueError(
            f"mask_labels[{int(np.argmin(finite[3]))}] has values outside 0..1; masks are 0 or 1, and 0 in padding (a "
            "void value such as 255 is none: leave those pixels 0)."
        )


def _warn_if_more_targets(counts: list[int], num_queries: int) -> None:
    if max(counts, default=0) > num_queries:
        image = int(np.argmax(counts))
        logger.warning_once(
            f"Image {image} of a batch has {counts[image]} targets for {num_queries} queries: the worst matching "
            f"{counts[image] - num_queries} are left out of the loss. Raise num_queries."
        )
