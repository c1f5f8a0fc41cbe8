"""Mask2Former's criterion: matching and mask losses on sampled points (Cheng et al., CVPR 2022, sec. 3.3.2).

What costs time and memory in a dense criterion are the mask logits of all queries in all layers. Here they never
exist. For matching, the per-pixel embedding is read at a few hundred points at a time and multiplied with the queries
of all layers at once: costs are sums over points, so that no chunk outlives its sums. For the loss, masks are made of
the matched queries only, of all layers in one product. (Points of the loss differ from mask to mask, and a sampled
embedding of 256 channels for each would be larger than the mask itself.) Every mask chooses its least certain points
from candidates that the masks of its image share, in all layers; the official code draws new ones for each mask.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .criterion import Criterion
from .losses import PairSums, PointLosses
from .mask_head import DotProductMaskHead
from .matcher import Match
from .point_sampling import (
    PointSource,
    most_uncertain,
    sample_maps,
    sample_targets,
    valid_cells,
)
from .targets import Targets, prepare_targets, within_unit

# Logits of (queries x points) that exist at one time while matching: on a CPU most of them stay in its caches.
MATCHED_AT_ONCE = {"cpu": 2**19}
# Candidate points of the loss at one time, over all masks.
CANDIDATES_AT_ONCE = {"cpu": 2**18}
AT_ONCE_ELSEWHERE = 2**25  # 128 MiB of float32
EVALUATION_SEED = 0


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
            point_seeds: B integers, one for each image and step; None: torch's global generator in training, and
                the same points each time in evaluation.

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
            features = mask_head.pixel_factor(mask_features.to(dtype))  # (B, E, h, w)
            if point_seeds is None and not self.training:
                point_seeds = [EVALUATION_SEED] * len(extents)
            source = PointSource(extents, point_seeds)
            known_cells = None if pixel_mask is None else cells
            matches, padded = self._match_points(
                classes.detach(), states.detach(), features.detach(), known_cells, targets, source, mask_head
            )
            mask_count, class_count, image_count = normalizer.to(device=classes.device, dtype=dtype).unbind()
            # Beyond the image masks count as zero, as they do beyond the canvas: padding is not looked at.
            groups = self._groups(matches, cells if padded else None)
            bce, dice = self._point_terms(states, features, targets, groups, source, mask_head)
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
        cells: Tensor | None,
        targets: Targets,
        source: PointSource,
        mask_head: DotProductMaskHead,
    ) -> tuple[list[list[Match]], bool]:
        """Assignments of every layer and image, and whether any pixel is padding.

        One set of uniform points for each image. `cells` (B, h, w) are those that hold image, None: all.
        """
        layers, images, queries = classes.shape[:3]
        first = layers - 1 if self.matched_layers == "last" else 0  # of the layers that are matched
        embedding = mask_head.query_factor(states[first:]).to(features.dtype)  # (L, B, Q, E)
        by_image = embedding.transpose(0, 1).flatten(1, 2)  # (B, L * Q, E)
        at_once = max(MATCHED_AT_ONCE.get(features.device.type, AT_ONCE_ELSEWHERE) // by_image.shape[1], 1)
        mask_costs, sampled_finite = [], []
        for image in range(images):
            points = source.draw(image, 1, self.points).to(features.dtype)  # (1, P, 2)
            seen = features[image, None] if cells is None else features[image, None] * cells[image]
            seen = seen.contiguous(memory_format=torch.channels_last)  # all channels of a point lie together
            masks = targets.masks[image]
            wanted = sample_targets(masks, points.expand(len(masks), -1, -1), np.arange(len(masks)))  # (N, P)
            sums = PairSums(by_image[image], len(masks))
            finite = wanted.isfinite().all()
            for start in range(0, self.points, at_once):
                some = slice(start, start + at_once)
                at_points = sample_maps(seen, points[:, some])[0]  # (E, p)
                sums.add(at_points, wanted[:, some])
                finite &= at_points.isfinite().all()
            bce, dice = sums.costs(self.points)
            mask_costs.append(self.mask_cost * bce + self.dice_cost * dice)  # (L * Q, N)
            sampled_finite.append(finite)
        costs = torch.stack(mask_costs).unflatten(1, (-1, queries)).transpose(0, 1)  # (L, B, Q, N)
        labels = self._padded_labels(targets, classes.device).clamp(0, self.num_labels - 1)  # (B, N)
        index = labels[None, :, None].expand(len(costs), -1, queries, -1)
        costs = costs - self.class_cost * classes[first:].softmax(-1).gather(-1, index)
        all_finite = torch.stack(
            [
                classes.isfinite().all(-1).all(-1).all(0),
                torch.stack(sampled_finite) & states.isfinite().all(-1).all(-1).all(0),
                targets.masks.flatten(1).isfinite().all(-1),
                within_unit(targets.masks),
            ]
        )  # (4, B)
        return self._assign(costs, targets, all_finite, layers=layers)

    def _groups(self, matches: list[list[Match]], cells: Tensor | None) -> list["_Group"]:
        """The matched pairs of all layers together; with gradient checkpointing, of one layer at a time."""
        layers = list(range(len(matches)))
        parts = [[layer] for layer in layers] if self.gradient_checkpointing and self.training else [layers]
        groups = [_Group.of(matches, part, cells) for part in parts]
        return [group for group in groups if len(group.image)]

    def _point_terms(
        self,
        states: Tensor,
        features: Tensor,
        targets: Targets,
        groups: list["_Group"],
        source: PointSource,
        mask_head: DotProductMaskHead,
    ) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy and dice loss, summed over the matched pairs of each layer: (L,) and (L,)."""
        if not groups:  # every parameter takes part in every step: DDP waits for all of them
            nothing = (mask_head.query_factor(states[:, :, :1]).sum() + features[:, :, :1, :1].sum()) * 0
            return nothing.expand(len(states)), nothing.expand(len(states))
        totals = features.new_zeros((2, len(states)))
        images = range(len(features))
        candidates = self.candidates if self.uncertain else 0
        pool = torch.cat([source.draw(image, 1, candidates) for image in images]).to(features.dtype)  # (B, C, 2)
        for_all = self.points - self.uncertain
        further = torch.cat([source.draw(image, 1, for_all) for image in images]).to(features.dtype)  # (B, F, 2)
        for group in groups:
            layer, query, _, image, place = group.tensors(states.device)
            padded_states = states.new_zeros((*group.shape, states.shape[-1]))  # (B, M, C)
            padded_states = padded_states.index_put((image, place), states[layer, image, query])
            embedding = mask_head.query_factor(padded_states).to(features.dtype)  # (B, M, E)
            again = self.gradient_checkpointing and self.training
            with torch.set_grad_enabled(torch.is_grad_enabled() and not again):
                masks = group.masks(embedding, features)  # (R, h, w)
            points = self._loss_points(masks.detach(), group, pool, further)  # (R, P, 2)
            wanted = sample_targets(targets.masks.flatten(0, 1), points, group.target(targets.masks.shape[1]))
            if again:
                del masks
                losses = self._gradient_checkpointing_func(
                    _masks_and_losses, embedding, features, group, points, wanted
                )
            else:
                losses = _point_losses(masks, points, wanted)  # (2, R)
            totals = totals.index_add(1, layer, losses)
        bce, dice = totals.unbind()
        return bce, dice

    @torch.no_grad()
    def _loss_points(self, masks: Tensor, group: "_Group", candidates: Tensor, further: Tensor) -> Tensor:
        """For each of R masks (R, h, w) the points of its loss, (R, P, 2): most are where it is least certain.

        `candidates` (B, C, 2) to choose from, and `further` (B, F, 2), which all masks of an image have besides.
        """
        points = masks.new_empty((len(masks), self.points, 2))
        at_once = max(CANDIDATES_AT_ONCE.get(masks.device.type, AT_ONCE_ELSEWHERE) // max(self.candidates, 1), 1)
        pairs = torch.view_as_complex(candidates)  # (B, C), x and y as one number, which is faster to pick
        for image, rows in group.by_image():
            points[rows, self.uncertain :] = further[image]
            for start in range(rows.start, rows.stop if self.uncertain else rows.start, at_once):
                some = slice(start, min(start + at_once, rows.stop))
                logits = sample_maps(masks[None, some], candidates[image, None])[0]  # (r, C)
                chosen = pairs[image].take(most_uncertain(logits, self.uncertain))
                points[some, : self.uncertain] = torch.view_as_real(chosen)
        return points


@dataclass(frozen=True, eq=False)
class _Group:
    """R matched pairs, ordered by image, and their places in a padded (B, M) table.

    Attributes:
        layer, query, segment, image, place: (R,) int64; `place` is a pair's column in the table of its image.
        shape: B, M.
        cells: (B, h, w), True in image; None: everywhere.
    """

    layer: np.ndarray
    query: np.ndarray
    segment: np.ndarray
    image: np.ndarray
    place: np.ndarray
    shape: tuple[int, int]
    cells: Tensor | None

    @classmethod
    def of(cls, matches: list[list[Match]], layers: list[int], cells: Tensor | None) -> "_Group":
        images = len(matches[0])
        found = [(layer, image, *matches[layer][image]) for image in range(images) for layer in layers]
        sizes = [len(queries) for _, _, queries, _ in found]
        image = np.repeat([image for _, image, _, _ in found], sizes)
        counts = np.bincount(image, minlength=images)
        place = np.arange(len(image)) - np.repeat(np.cumsum(counts) - counts, counts)
        return cls(
            layer=np.repeat([layer for layer, _, _, _ in found], sizes),
            query=np.concatenate([queries for _, _, queries, _ in found]),
            segment=np.concatenate([segments for _, _, _, segments in found]),
            image=image,
            place=place,
            shape=(images, int(counts.max(initial=0))),
            cells=cells,
        )

    def tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """Layer, query, segment, image and place, in one copy to the device."""
        rows = np.stack([self.layer, self.query, self.segment, self.image, self.place])
        return torch.from_numpy(rows).to(device).unbind()

    def target(self, most: int) -> np.ndarray:
        """(R,) index of each pair's target in the masks of all images, `most` an image."""
        return self.image * most + self.segment

    def masks(self, embedding: Tensor, features: Tensor) -> Tensor:
        """(B, M, E) embeddings and (B, E, h, w) features to the (R, h, w) logits of the pairs.

        One product of the whole batch: its gradient is one tensor, where images taken one by one would each fill a
        gradient of the batch's size with zeros.
        """
        masks = torch.bmm(embedding, features.flatten(2)).unflatten(2, features.shape[2:])  # (B, M, h, w)
        if self.cells is not None:
            masks = masks * self.cells[:, None]
        masks = masks.flatten(0, 1)
        if len(self.image) == len(masks):
            return masks
        return masks[torch.from_numpy(self.image * self.shape[1] + self.place).to(masks.device)]

    def by_image(self) -> Iterator[tuple[int, slice]]:
        """Each image that has pairs, and where they are."""
        images, firsts, counts = np.unique(self.image, return_index=True, return_counts=True)
        for image, first, count in zip(images.tolist(), firsts.tolist(), counts.tolist(), strict=True):
            yield image, slice(first, first + count)


def _point_losses(masks: Tensor, points: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy and dice loss of (R, h, w) logits at (R, P, 2) points against `wanted` (R, P): (2, R)."""
    return PointLosses.apply(sample_maps(masks[:, None], points)[:, 0], wanted)


def _masks_and_losses(embedding: Tensor, features: Tensor, group: _Group, points: Tensor, wanted: Tensor) -> Tensor:
    return _point_losses(group.masks(embedding, features), points, wanted)
