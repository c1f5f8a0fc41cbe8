"""Matching, losses and deep supervision of mask classification (MaskFormer, sec. 3.2; DETR's set criterion).

All layers and images are matched in one pass: one cost tensor, one copy to the host. Every term is a local sum over a
*global mean count*, so that one process with 8 images, two with 4 and 4 accumulation steps of 2 give the same
gradients. Works in float32, or float64 when the logits are, whatever the model's dtype; autocast is switched off
inside.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .input_checks import all_finite, check_finite, check_labels, warn_if_more_targets
from .losses import MaskLosses, class_loss, pairwise_mask_costs, pixel_loss
from .matcher import Match, location_cost, match_fixed, match_hungarian
from .objectness import objectness_loss, objectness_target
from .targets import Targets, average_masks, paint_labels, prepare_targets, resize_masks, within_unit


class Criterion(nn.Module):
    """`predictions per layer, targets -> (loss, loss_dict, layer_losses)`.

    `loss_dict` holds the unweighted terms, summed over layers: `loss_class`, `loss_mask` (focal), `loss_dice` and,
    where the model has them, `loss_pixel`, `loss_objectness` and `loss_one_to_many`. `layer_losses` holds the share of
    each layer in the first three, (L,) detached.
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
        location_cost: float = 0.0,
        matched_layers: str = "each",
        objectness_weight: float = 0.0,
        one_to_many_weight: float = 0.0,
        thing_label_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.matcher = matcher
        self.weights = {
            "loss_class": class_weight,
            "loss_mask": mask_weight,
            "loss_dice": dice_weight,
            "loss_pixel": pixel_weight,
            "loss_objectness": objectness_weight,
            "loss_one_to_many": one_to_many_weight,
        }
        self.no_object_weight = no_object_weight
        self.class_cost, self.mask_cost, self.dice_cost = class_cost, mask_cost, dice_cost
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.resolution = resolution
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = checkpoint  # set by transformers, as in Backbone
        self.location_cost, self.matched_layers = location_cost, matched_layers
        stuff = [label for label in range(num_labels) if label not in thing_label_ids]
        stuff_queries = [stuff.index(label) if label in stuff else -1 for label in range(num_labels)]
        # Moved when used, not a buffer: transformers fills buffers that are in no checkpoint with nothing.
        self.stuff_queries = torch.tensor(stuff_queries, device="cpu")

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
        anchors: Tensor | None = None,
        objectness: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Loss of L layers of B images.

        Args:
            class_logits: L tensors (B, Q, K + 1).
            mask_logits: L tensors (B, Q, h, w).
            mask_labels: B tensors (N_i, H, W) on the padded canvas, 0 in padding.
            class_labels: B tensors (N_i,).
            pixel_mask: (B, H, W), 0 in padding; None: nothing is padded.
            pixel_logits: (B, K, h, w) of the auxiliary per-pixel classifier, or None.
            normalizer: (3,) counts of masks, class weight and images, see `loss_normalizer`.
            anchors: (B, Q, 2) cells of the queries in the mask logits, for the matcher "located".
            objectness: (B, h, w) logits that the anchors were picked from, or None.

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
            matches, padded = self._match(
                classes.detach(), masks.detach(), targets, coarse, coarse_valid, anchors, objectness
            )
            mask_count, class_count, image_count = normalizer.to(device=classes.device, dtype=dtype).unbind()
            compared = self._compared(targets, masks)
            focal, dice = self._mask_terms(masks, *compared, matches, padded=padded)
            by_layer = {
                "loss_class": self._class_term(classes, targets, matches) / class_count,
                "loss_mask": focal / mask_count,
                "loss_dice": dice / mask_count,
            }
            terms = {name: losses.sum() for name, losses in by_layer.items()}
            if pixel_logits is not None:
                terms["loss_pixel"] = self._pixel_term(pixel_logits.to(dtype), targets) / image_count
            if objectness is not None:
                things = [self._things(*image) for image in zip(coarse, targets.labels, strict=True)]
                bumps = torch.stack([objectness_target(masks) for masks in things])  # (B, h, w)
                losses = objectness_loss(objectness.to(dtype), bumps, coarse_valid)
                terms["loss_objectness"] = losses.sum() / mask_count
            if self.weights["loss_one_to_many"] and anchors is not None:
                belongs = self._things_of_queries(targets.labels, coarse, anchors)
                term = self._one_to_many_term(masks[-1], *compared, belongs, padded=padded)
                terms["loss_one_to_many"] = term / mask_count
            loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return loss, terms, {name: losses.detach() for name, losses in by_layer.items()}

    def _pixel_term(self, logits: Tensor, targets: Targets) -> Tensor:
        """Cross-entropy of the auxiliary per-pixel classifier (B, K, h, w), summed over images."""
        valid = resize_masks(targets.valid[:, None], logits.shape[-2:])  # (B, 1, h, w)
        masks = resize_masks(targets.masks, logits.shape[-2:]).to(logits.dtype) * valid  # (B, N, h, w)
        return pixel_loss(logits, paint_labels(masks, targets.labels)).sum()

    def _things(self, masks: Tensor, labels: Tensor) -> Tensor:
        """The (n, h, w) masks of an image's things, of its padded (N, h, w) ones."""
        return masks[: len(labels)][self.stuff_queries.to(labels.device)[labels] < 0]

    @torch.no_grad()
    def _match(
        self,
        classes: Tensor,
        masks: Tensor,
        targets: Targets,
        coarse: Tensor,
        coarse_valid: Tensor,
        anchors: Tensor | None,
        objectness: Tensor | None,
    ) -> tuple[list[list[Match]], bool]:
        """Per layer and image (queries, targets), and whether any pixel is padding.

        The single copy to the host also carries the checks of labels and finiteness.
        """
        layers, images, queries = classes.shape[:3]
        most = coarse.shape[1]
        finite = torch.stack(
            [
                classes.isfinite().all(-1).all(-1).all(0),
                all_finite(masks.flatten(2)).all(0),
                coarse.isfinite().flatten(1).all(-1),
                within_unit(targets.masks),
                (coarse_valid if objectness is None else objectness).isfinite().flatten(1).all(1),
            ]
        )  # (5, B)
        first = layers - 1 if self.matched_layers == "last" else 0  # of the layers that are matched
        costs = classes.new_zeros((layers - first, images, queries, most))
        if self.matcher != "fixed" and most:
            known = self._padded_labels(targets, classes.device).clamp(0, self.num_labels - 1)
            costs = self._costs(classes[first:], masks[first:], known, coarse, coarse_valid)
            if self.matcher == "located":
                if anchors is None:
                    raise ValueError("matcher 'located' needs the anchors of query_decoder 'anchored'")
                costs = costs + location_cost(
                    anchors, coarse, known, self.stuff_queries.to(known.device), cost=self.location_cost
                )
        return self._assign(costs, targets, finite, layers=layers)

    def _padded_labels(self, targets: Targets, device: torch.device) -> Tensor:
        """(B, N) classes, 0 beyond an image's own segments."""
        labels = torch.zeros(targets.masks.shape[:2], dtype=torch.int64, device=device)
        for index, image_labels in enumerate(targets.labels):
            labels[index, : len(image_labels)] = image_labels
        return labels

    def _assign(
        self, costs: Tensor, targets: Targets, finite: Tensor, *, layers: int
    ) -> tuple[list[list[Match]], bool]:
        """Assignments of `layers` layers from the costs (L or 1, B, Q, N) of those that are matched.

        `finite` (R, B) are the rows that `check_finite` names.
        """
        queries = costs.shape[2]
        labels = self._padded_labels(targets, costs.device)
        wrong_label = (labels < 0) | (labels >= self.num_labels)  # (B, N)
        padding = ~targets.valid.all()
        parts = [part.to(costs.dtype) for part in (costs, labels, wrong_label, finite, padding)]
        host = torch.cat([part.flatten() for part in parts]).cpu().numpy()
        cost_values, label_values, wrong_values, finite_values, padded = np.split(
            host, np.cumsum([part.numel() for part in parts])[:-1]
        )
        check_labels(label_values.reshape(labels.shape), wrong_values.reshape(labels.shape), self.num_labels)
        check_finite(finite_values.reshape(finite.shape))
        if self.matcher == "fixed":
            per_image = label_values.reshape(labels.shape)
            host_labels = [row[:count].astype(np.int64) for row, count in zip(per_image, targets.counts, strict=True)]
            return match_fixed(host_labels, num_layers=layers), bool(padded)
        warn_if_more_targets(targets.counts, queries)
        if not np.isfinite(cost_values).all():
            raise FloatingPointError(
                "Finite logits gave a non-finite matching cost: they are too large for the dtype."
            )
        matches = match_hungarian(cost_values.reshape(costs.shape), targets.counts)
        return matches * (layers // len(matches)), bool(padded)

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
        """(L,) cross-entropy summed over images and queries; unmatched queries are "no object"."""
        wanted = torch.full(classes.shape[:3], self.num_labels, dtype=torch.int64, device=classes.device)
        for layer, layer_matches in enumerate(matches):
            for image, (queries, segments) in enumerate(layer_matches):
                chosen = targets.labels[image][torch.as_tensor(segments, device=classes.device)]
                wanted[layer, image, torch.as_tensor(queries, device=classes.device)] = chosen
        return class_loss(classes, wanted, no_object_weight=self.no_object_weight).sum((1, 2))

    def _compared(self, targets: Targets, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Masks (B, N, H, W) and valid pixels (B, H, W) at the resolution at which they meet the predicted masks."""
        if self.resolution == "target":
            return targets.masks, targets.valid
        return average_masks(targets.masks, targets.valid.to(masks.dtype), masks.shape[-2:])

    def _mask_terms(
        self, masks: Tensor, wanted: Tensor, valid: Tensor, matches: list[list[Match]], *, padded: bool
    ) -> tuple[Tensor, Tensor]:
        """Focal and dice loss, summed over the matched pairs of each layer: (L,) and (L,)."""
        rows = [
            (layer, image, query, segment)
            for layer, layer_matches in enumerate(matches)
            for image, (queries, segments) in enumerate(layer_matches)
            for query, segment in zip(queries.tolist(), segments.tolist(), strict=True)
        ]
        if not rows:
            nothing = masks.flatten(1).sum(1) * 0  # keeps every parameter in the graph, which DDP needs
            return nothing, nothing
        pairs = torch.tensor(rows, device=masks.device)  # (M, 4)
        again = self.gradient_checkpointing and self.training
        # One layer at a time: only its masks are upsampled again in the backward pass.
        counts = torch.bincount(pairs[:, 0], minlength=masks.shape[0]).tolist() if again else [len(rows)]
        parts = []
        for group in pairs.split(counts):
            layer, image, query, segment = group.unbind(1)
            inputs = (masks[layer, image, query], wanted, valid, image, segment, padded)
            compute = self._gradient_checkpointing_func if again else call
            parts.append(compute(self._pair_losses, *inputs))
        focal, dice = torch.cat(parts, dim=1).unbind()  # (M,)
        nothing = focal.new_zeros(masks.shape[0])
        return nothing.index_add(0, pairs[:, 0], focal), nothing.index_add(0, pairs[:, 0], dice)

    def _things_of_queries(self, labels: list[Tensor], coarse: Tensor, anchors: Tensor) -> Tensor:
        """(B, Q, N), True where the thing is one that the query is anchored in."""
        padded = nn.utils.rnn.pad_sequence(labels, batch_first=True)  # (B, N)
        queries = self.stuff_queries.to(padded.device)
        outside = location_cost(anchors, coarse, padded, queries, cost=1.0)  # (B, Q, N)
        return (outside == 0) & (queries[padded] < 0)[:, None]

    def _one_to_many_term(
        self, masks: Tensor, wanted: Tensor, valid: Tensor, belongs: Tensor, *, padded: bool
    ) -> Tensor:
        """Weighted focal and dice loss of the last layer (B, Q, h, w), of every query in the thing it is anchored in.

        The mean over the queries of a thing, summed over things. H-DETR (Jia et al., CVPR 2023) trains further queries
        against repeated targets; here the place says which queries belong to one.
        """
        image, query, segment = belongs.nonzero().unbind(1)  # (P,)
        if not len(image):
            return masks.sum() * 0
        focal, dice = self._pair_losses(masks[image, query], wanted, valid, image, segment, padded).unbind()
        losses = self.weights["loss_mask"] * focal + self.weights["loss_dice"] * dice
        return (losses / belongs.sum(1)[image, segment]).sum()

    def _pair_losses(
        self, logits: Tensor, wanted: Tensor, valid: Tensor, image: Tensor, segment: Tensor, padded: bool
    ) -> Tensor:
        """Focal and dice loss of (M, h, w) logits, each with its image and segment: (2, M)."""
        if self.resolution == "target" and padded:
            logits = extend_into_padding(logits, valid[image])
        target = image * wanted.shape[1] + segment
        weight = None if self.resolution == "target" and not padded else valid
        flat = wanted.flatten(0, 1)
        return MaskLosses.apply(logits, flat, weight, target, image, self.focal_alpha, self.focal_gamma)


def call(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """As a checkpointing function is called, without checkpointing."""
    return function(*inputs)


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
    # Without targets and with no weight for "no object" there is nothing to average: the sum is 0, and so its mean.
    class_weight = torch.where(class_weight > 0, class_weight, 1.0)
    return torch.stack([masks.clamp(min=1), class_weight, images.clamp(min=1)]) / (world * divisor)


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
