"""Mask2Former's criterion: matching and mask losses on sampled points (Cheng et al., CVPR 2022, sec. 3.3.2).

What costs time and memory in a dense criterion are the mask logits of all queries in all layers. Here they never
exist: for matching, the per-pixel embedding is sampled once and multiplied with the queries of each layer; for the
loss, masks are made of the matched queries only. (The paper's loss points differ from mask to mask, and a sampled
embedding of 256 channels for each would be larger than the mask itself.)
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .criterion import Criterion, call
from .losses import pairwise_point_costs
from .mask_head import DotProductMaskHead
from .matcher import Match
from .point_sampling import (
    PointSource,
    most_uncertain,
    sample_all_targets,
    sample_maps,
    sample_targets,
    valid_cells,
)
from .targets import Targets, prepare_targets, within_unit


class Predicted(Protocol):
    """Of one decoder layer; its masks are made here."""

    @property
    def class_logits(self) -> Tensor: ...  # (B, Q, K + 1)

    @property
    def states(self) -> Tensor: ...  # (B, Q, C)


class PointCriterion(Criterion):
    """`predictions, per-pixel embedding, mask head, targets -> (loss, loss_dict, layer_losses)`.

    Terms as in `Criterion`; `loss_mask` is the binary cross-entropy, averaged over the points of a mask.
    """

    def __init__(self, *, points: int, oversample_ratio: float, importance_ratio: float, **further: Any) -> None:
        super().__init__(resolution="target", **further)
        self.points = points
        self.candidates = int(points * oversample_ratio)
        self.uncertain = int(points * importance_ratio)

    def forward(  # type: ignore[override]
        self,
        predictions: Sequence[Predicted],
        *,
        mask_features: Tensor,
        mask_head: DotProductMaskHead,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        pixel_mask: Tensor | None,
        pixel_logits: Tensor | None,
        normalizer: Tensor,
        point_seeds: Sequence[int] | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Loss of the L layers of B images; `Criterion.forward` says what the arguments in common are.

        Args:
            predictions: Of each layer, with mask logits or without.
            mask_features: (B, E, h, w).
            point_seeds: B integers, one for each image and step; None: torch's global generator.

        Raises:
            ValueError: Targets of wrong number, size or class.
            FloatingPointError: A non-finite logit or target; names the image's index in the batch.
        """
        with torch.autocast(device_type=mask_features.device.type, enabled=False):
            head_type = next(mask_head.parameters()).dtype
            dtype = torch.promote_types(mask_features.dtype, torch.float32)
            classes = torch.stack([layer.class_logits.to(dtype) for layer in predictions])  # (L, B, Q, K + 1)
            states = torch.stack([layer.states.to(head_type) for layer in predictions])  # (L, B, Q, C)
            targets = prepare_targets(mask_labels, class_labels, pixel_mask, num_images=classes.shape[1])
            size = (mask_features.shape[2], mask_features.shape[3])
            cells, extents = valid_cells(targets.valid, size)  # (B, h, w), (B, 2)
            # Beyond the image the embedding counts as zero, as it does beyond the canvas: padding is not looked at.
            features = mask_features.to(dtype) * cells[:, None]  # (B, E, h, w)
            source = PointSource(extents, point_seeds)
            matches, _ = self._match_points(
                classes.detach(), states.detach(), features.detach(), targets, source, mask_head
            )
            mask_count, class_count, image_count = normalizer.to(device=classes.device, dtype=dtype).unbind()
            bce, dice = self._point_terms(states, features, targets, matches, source, mask_head)
            by_layer = {
                "loss_class": self._class_term(classes, targets, matches) / class_count,
                "loss_mask": bce / mask_count,
                "loss_dice": dice / mask_count,
            }
            terms = {name: losses.sum() for name, losses in by_layer.items()}
            if pixel_logits is not None:
                terms["loss_pixel"] = self._pixel_term(pixel_logits.to(dtype), targets) / image_count
            loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return loss, terms, {name: losses.detach() for name, losses in by_layer.items()}

    @torch.no_grad()
    def _match_points(
        self,
        classes: Tensor,
        states: Tensor,
        features: Tensor,
        targets: Targets,
        source: PointSource,
        mask_head: DotProductMaskHead,
    ) -> tuple[list[list[Match]], bool]:
        """Assignments of every layer and image; one set of uniform points for each image."""
        layers, images = classes.shape[:2]
        points = torch.cat([source.draw(image, 1, self.points) for image in range(images)])  # (B, P, 2)
        points = points.to(features.dtype)
        at_points = sample_maps(features, points)  # (B, E, P)
        wanted = sample_all_targets(targets.masks, points)  # (B, N, P)
        finite = torch.stack(
            [
                classes.isfinite().all(-1).all(-1).all(0),
                at_points.isfinite().flatten(1).all(-1) & states.isfinite().all(-1).all(-1).all(0),
                wanted.isfinite().flatten(1).all(-1),
                within_unit(targets.masks),
            ]
        )  # (4, B)
        first = layers - 1 if self.matched_layers == "last" else 0  # of the layers that are matched
        labels = self._padded_labels(targets, classes.device).clamp(0, self.num_labels - 1)  # (B, N)
        costs = []
        for layer in range(first, layers):  # one layer at a time bounds the memory
            logits = mask_head.embedding(states[layer]).to(features.dtype) @ at_points  # (B, Q, P)
            bce, dice = pairwise_point_costs(logits, wanted)  # (B, Q, N) each
            index = labels[:, None, :].expand(-1, logits.shape[1], -1)
            likely = classes[layer].softmax(-1).gather(-1, index)  # (B, Q, N)
            costs.append(self.mask_cost * bce + self.dice_cost * dice - self.class_cost * likely)
        return self._assign(torch.stack(costs), targets, finite, layers=layers)

    def _point_terms(
        self,
        states: Tensor,
        features: Tensor,
        targets: Targets,
        matches: list[list[Match]],
        source: PointSource,
        mask_head: DotProductMaskHead,
    ) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy and dice loss, summed over the matched pairs of each layer: (L,) and (L,)."""
        bce, dice = [], []
        for layer, layer_matches in enumerate(matches):
            # Every parameter takes part in every step, also without a target: DDP waits for all of them.
            nothing = (mask_head.embedding(states[layer, :, :1]).sum() + features[:, :, :1, :1].sum()) * 0
            losses = []
            for image, (queries, segments) in enumerate(layer_matches):
                if not len(queries):
                    continue
                query = torch.as_tensor(queries, device=states.device)
                segment = torch.as_tensor(segments, device=states.device)
                embedding = mask_head.embedding(states[layer, image, query]).to(features.dtype)  # (M, E)
                points = self._loss_points(embedding, features[image], image, source)  # (M, P, 2)
                of_image = torch.full_like(segment, image)[:, None]
                wanted = sample_targets(targets.masks, points, of_image, segment[:, None])  # (M, P)
                again = self.gradient_checkpointing and self.training
                compute = self._gradient_checkpointing_func if again else call
                losses.append(compute(_point_losses, embedding, features[image], points, wanted))  # (2, M)
            both = torch.cat(losses, 1).sum(1) + nothing if losses else torch.stack([nothing, nothing])
            bce.append(both[0])
            dice.append(both[1])
        return torch.stack(bce), torch.stack(dice)

    @torch.no_grad()
    def _loss_points(self, embedding: Tensor, features: Tensor, image: int, source: PointSource) -> Tensor:
        """For each of M masks the points of its loss, (M, P, 2): most are where it is least certain."""
        candidates = source.draw(image, len(embedding), self.candidates).to(features.dtype)  # (M, C, 2)
        masks = torch.einsum("me,ehw->mhw", embedding, features)
        chosen = most_uncertain(sample_maps(masks[:, None], candidates)[:, 0], candidates, self.uncertain)
        fresh = source.draw(image, len(embedding), self.points - self.uncertain).to(features.dtype)
        return torch.cat([chosen, fresh], 1)


def _point_losses(embedding: Tensor, features: Tensor, points: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy and dice loss of M masks, (2, M): `embedding` (M, E), `features` (E, h, w), `wanted` (M, P)."""
    masks = torch.einsum("me,ehw->mhw", embedding, features)
    logits = sample_maps(masks[:, None], points)[:, 0]  # (M, P)
    bce = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
    probabilities = logits.sigmoid()
    overlap = (probabilities * wanted).sum(1)
    dice = 1 - (2 * overlap + 1) / (probabilities.sum(1) + wanted.sum(1) + 1)
    return torch.stack([bce, dice])
