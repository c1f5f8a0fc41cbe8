"""Loss of Panoptic SegFormer (Li et al., CVPR 2022, sec. 3.4; official `panformer_head.py`).

Things are matched in every location layer by class and box. The best queries of each target in the last layer go on to
the mask decoder and are matched again, with their masks. Stuff needs no matching: a class has its query.

The paper weighs the means over the positives of things and of stuff by their shares of all positives: with n_t and n_s
of them, n_t / (n_t + n_s) * (sum_t / n_t) + n_s / (n_t + n_s) * (sum_s / n_s) is (sum_t + sum_s) / (n_t + n_s). So
every term is a sum over one global mean count of targets, as in `Criterion`, and the group sizes are never needed.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .attention_masks import LocationPrediction, raise_resolution
from .boxes import box_distance, boxes_of_masks, generalized_iou
from .input_checks import check_finite, check_labels, warn_if_more_targets
from .losses import focal_loss
from .matcher import Match, match_hungarian
from .targets import Targets, average_masks, prepare_targets, within_unit

MOST_PER_TARGET = 3  # queries that go on to the mask decoder; official panformer_head.py
STUFF_CLASS_FACTOR = 2.0  # of the weight of the stuff classes; official panformer_head.py
MASK_MATCH_CLASS_FACTOR = 2.0  # of the class cost when masks are matched; official tools.py
DICE_EPS = 1e-6  # official losses/dice_loss.py
DICE_COST_EPS = 1e-3  # official match_cost.py
LOG_EPS = 1e-12  # FocalLossCost of mmdet


class Located(Protocol):
    """A prediction that knows what the location decoder said; only the last needs to."""

    @property
    def location(self) -> LocationPrediction | None: ...


class _Wanted(NamedTuple):
    """The batch's targets on the device; N is the largest number of segments, things and stuff together."""

    labels: Tensor  # (B, N), 0 beyond an image's own
    boxes: Tensor  # (B, N, 4)
    masks: Tensor  # (B, N, H/4, W/4) shares of the cells' valid pixels
    weight: Tensor  # (B, H/4, W/4) valid shares of the cells


class _Assignment(NamedTuple):
    """What the host decides from the costs of the location layers."""

    labels: np.ndarray  # (B, N)
    things: list[np.ndarray]  # B arrays of the positions of things among the segments
    matches: list[list[Match]]  # per layer and image: queries and segments
    chosen: list[np.ndarray]  # B arrays of the queries that go on to the mask decoder


class LocationCriterion(nn.Module):
    """`predictions, targets -> (loss, loss_dict, layer_losses)`.

    `loss_dict` holds the unweighted terms, summed over layers: `loss_class`, `loss_box` (L1) and `loss_giou` of the
    location layers, `loss_dice` of the things' masks, `loss_stuff_class` and `loss_stuff_dice`. `layer_losses` holds
    the share of each layer, or stage of the mask decoder, in them, detached; its length differs between terms.
    """

    def __init__(
        self,
        *,
        num_labels: int,
        thing_label_ids: Sequence[int],
        class_weight: float,
        box_weight: float,
        giou_weight: float,
        dice_weight: float,
        focal_alpha: float,
        focal_gamma: float,
        class_cost: float,
        box_cost: float,
        giou_cost: float,
        dice_cost: float,
        most_per_target: int = MOST_PER_TARGET,
    ) -> None:
        super().__init__()
        if most_per_target < 1:
            raise ValueError(f"most_per_target is {most_per_target}; a target needs 1 query or more.")
        self.num_labels = num_labels
        self.weights = {
            "loss_class": class_weight,
            "loss_box": box_weight,
            "loss_giou": giou_weight,
            "loss_dice": dice_weight,
            "loss_stuff_class": class_weight * STUFF_CLASS_FACTOR,
            "loss_stuff_dice": dice_weight,
        }
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.class_cost, self.box_cost, self.giou_cost, self.dice_cost = class_cost, box_cost, giou_cost, dice_cost
        self.most_per_target = most_per_target
        things = sorted(set(thing_label_ids))
        stuff = [label for label in range(num_labels) if label not in things]
        self.thing_classes = np.array([things.index(label) if label in things else -1 for label in range(num_labels)])
        self.stuff_queries = np.array([stuff.index(label) if label in stuff else -1 for label in range(num_labels)])

    def forward(
        self,
        predictions: Sequence[Located],
        *,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        pixel_mask: Tensor | None,
        normalizer: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Loss of B images; only the last prediction is read.

        Two copies to the host: the costs of all location layers with the checks, then those of the masks.

        Args:
            predictions: Of `LocationQueryDecoder`; the last has its `location`.
            mask_labels: B tensors (N_i, H, W) on the padded canvas, 0 in padding. Several segments of one class of
                stuff are one mask.
            class_labels: B tensors (N_i,).
            pixel_mask: (B, H, W), 0 in padding; None: nothing is padded.
            normalizer: Its first number, the global mean count of target masks, divides every term.

        Raises:
            ValueError: Targets of wrong number, size or class.
            FloatingPointError: A non-finite prediction or target; names the image's index in the batch.
        """
        location = predictions[-1].location
        if location is None:
            raise ValueError("LocationCriterion needs the predictions of query_decoder 'location'.")
        device = location.boxes.device
        dtype = torch.promote_types(location.boxes.dtype, torch.float32)
        with torch.autocast(device_type=device.type, enabled=False):
            targets = prepare_targets(mask_labels, class_labels, pixel_mask, num_images=location.boxes.shape[1])
            wanted = self._wanted(targets, location, dtype)
            found, costs = self._assign(location, targets, wanted, dtype)
        queries = _padded(found.chosen, location.boxes.shape[2], device)  # (B, n)
        values = location.thing_masks(queries)  # (stages, B, n, h, w), in the precision of autocast
        with torch.autocast(device_type=device.type, enabled=False):
            layers = {
                **self._location_terms(location, wanted, found, dtype),
                **self._thing_mask_terms(location, wanted, found, queries, values, costs),
                **self._stuff_terms(location, wanted, found, targets.counts, dtype),
            }
            count = normalizer.to(device=device, dtype=dtype)[0]
            layers = {name: losses / count for name, losses in layers.items()}
            terms = {name: losses.sum() for name, losses in layers.items()}
            loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum() + location.nothing
        return loss, terms, {name: losses.detach() for name, losses in layers.items()}

    # --- matching ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _wanted(self, targets: Targets, location: LocationPrediction, dtype: torch.dtype) -> _Wanted:
        labels = torch.zeros(targets.masks.shape[:2], dtype=torch.int64, device=targets.masks.device)
        for index, image_labels in enumerate(targets.labels):
            labels[index, : len(image_labels)] = image_labels
        masks, weight = average_masks(targets.masks, targets.valid.to(dtype), location.mask_size)
        return _Wanted(labels, boxes_of_masks(targets.masks).to(dtype), masks, weight)

    @torch.no_grad()
    def _assign(
        self, location: LocationPrediction, targets: Targets, wanted: _Wanted, dtype: torch.dtype
    ) -> tuple[_Assignment, tuple[Tensor, Tensor]]:
        """Assignment of the location layers; the class and box costs of the last layer, (B, T, N) each."""
        class_costs, box_costs = self._location_costs(location, wanted, dtype)  # (A, B, T, N) each
        logits, stuff = location.thing_class_logits, location.stuff_class_logits
        finite = torch.stack(
            [
                _finite_images(logits) & _finite_images(stuff),
                _finite_images(location.boxes) & _finite_images(location.stuff_masks),
                _finite_images(wanted.masks[None]),
                within_unit(targets.masks),
            ]
        )  # (4, B)
        wrong = (wanted.labels < 0) | (wanted.labels >= self.num_labels)  # (B, N)
        costs, labels, wrong_labels, finite_images = _to_host(class_costs + box_costs, wanted.labels, wrong, finite)
        check_labels(labels, wrong_labels, self.num_labels)
        check_finite(finite_images)
        if not np.isfinite(costs).all():
            raise FloatingPointError("Finite predictions gave a non-finite matching cost: too large for the dtype.")
        classes = self.thing_classes[labels.astype(np.int64)]  # (B, N)
        things = [np.flatnonzero(row[:count] >= 0) for row, count in zip(classes, targets.counts, strict=True)]
        warn_if_more_targets([len(positions) for positions in things], costs.shape[2])
        matches = [
            [_match(image_costs, positions) for image_costs, positions in zip(layer, things, strict=True)]
            for layer in costs
        ]
        chosen = [self._choose(*image) for image in zip(costs[-1], things, matches[-1], strict=True)]
        return _Assignment(labels.astype(np.int64), things, matches, chosen), (class_costs[-1], box_costs[-1])

    def _location_costs(
        self, location: LocationPrediction, wanted: _Wanted, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Class (focal, inside less outside) and box costs of all pairs, (A, B, T, N) each; stuff's mean nothing."""
        probabilities = location.thing_class_logits.to(dtype).sigmoid()  # (A, B, T, K_t)
        alpha, gamma = self.focal_alpha, self.focal_gamma
        inside = -alpha * (1 - probabilities) ** gamma * (probabilities + LOG_EPS).log()
        outside = -(1 - alpha) * probabilities**gamma * (1 - probabilities + LOG_EPS).log()
        boxes = location.boxes.to(dtype)[:, :, :, None]  # (A, B, T, 1, 4)
        wanted_boxes = wanted.boxes[:, None]  # (B, 1, N, 4)
        box_costs = self.box_cost * box_distance(boxes, wanted_boxes)
        box_costs = box_costs - self.giou_cost * generalized_iou(boxes, wanted_boxes)
        if not location.thing_class_logits.shape[-1]:
            return torch.zeros_like(box_costs), box_costs
        known = wanted.labels.clamp(0, self.num_labels - 1)
        classes = torch.as_tensor(self.thing_classes, device=known.device)[known].clamp(min=0)  # (B, N)
        index = classes[None, :, None].expand(*probabilities.shape[:3], -1)  # (A, B, T, N)
        return self.class_cost * (inside - outside).gather(-1, index), box_costs

    def _choose(self, costs: np.ndarray, things: np.ndarray, first: Match) -> np.ndarray:
        """Queries that go on: those of the first assignment, then of further ones among the queries that are left."""
        chosen = first[0]
        rounds = min(self.most_per_target, len(costs) // len(things)) if len(things) else 0
        for _ in range(1, rounds):
            left = np.setdiff1d(np.arange(len(costs)), chosen)
            chosen = np.concatenate([chosen, left[_match(costs[left], things)[0]]])
        return np.sort(chosen)

    @torch.no_grad()
    def _match_masks(
        self, values: Tensor, queries: Tensor, wanted: _Wanted, found: _Assignment, costs: tuple[Tensor, Tensor]
    ) -> list[Match]:
        """Per image the rows of `values` (B, n, h, w) and their segments."""
        masks, weight = average_masks(wanted.masks, wanted.weight, values.shape[-2:])
        dice = pairwise_squared_dice(values.flatten(2), masks.flatten(2), weight.flatten(1))  # (B, n, N)
        rows = queries[..., None].expand_as(dice)
        class_costs, box_costs = (part.gather(1, rows) for part in costs)
        total = MASK_MATCH_CLASS_FACTOR * class_costs + box_costs + self.dice_cost * dice
        (host,) = _to_host(total)
        bad = [image for image, image_costs in enumerate(host) if not np.isfinite(image_costs).all()]
        if bad:
            raise FloatingPointError(f"Non-finite mask values for image {bad[0]} of the batch.")
        images = zip(host, found.chosen, found.things, strict=True)
        return [_match(image_costs[: len(chosen)], things) for image_costs, chosen, things in images]

    # --- terms, (layers,) sums over images ---------------------------------------------------------------------------

    def _location_terms(
        self, location: LocationPrediction, wanted: _Wanted, found: _Assignment, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        logits, boxes = location.thing_class_logits.to(dtype), location.boxes.to(dtype)
        rows = [
            (layer, image, query, segment, self.thing_classes[found.labels[image, segment]])
            for layer, matches in enumerate(found.matches)
            for image, match in enumerate(matches)
            for query, segment in zip(*match, strict=True)
        ]
        pairs = torch.tensor(np.array(rows, dtype=np.int64).reshape(-1, 5), device=logits.device)
        layer, image, query, segment, label = pairs.unbind(1)
        positive = torch.zeros_like(logits)
        positive[layer, image, query, label] = 1.0
        own, other = boxes[layer, image, query], wanted.boxes[image, segment]  # (M, 4)
        nothing = boxes.flatten(1).sum(1) * 0
        return {
            "loss_class": self._focal_sums(logits, positive),
            "loss_box": nothing.index_add(0, layer, box_distance(own, other)),
            "loss_giou": nothing.index_add(0, layer, 1 - generalized_iou(own, other)),
        }

    def _thing_mask_terms(
        self,
        location: LocationPrediction,
        wanted: _Wanted,
        found: _Assignment,
        queries: Tensor,
        values: Tensor,
        costs: tuple[Tensor, Tensor],
    ) -> dict[str, Tensor]:
        if not any(len(chosen) for chosen in found.chosen):
            return {"loss_dice": values.flatten(1).sum(1) * 0}
        matches = self._match_masks(values[-1].detach(), queries, wanted, found, costs)
        rows = [(image, *pair) for image, match in enumerate(matches) for pair in zip(*match, strict=True)]
        image, row, segment = torch.tensor(np.array(rows, dtype=np.int64), device=values.device).unbind(1)
        return {
            "loss_dice": self._dice_sums(location, values[:, image, row], wanted, image, wanted.masks[image, segment])
        }

    def _stuff_terms(
        self,
        location: LocationPrediction,
        wanted: _Wanted,
        found: _Assignment,
        counts: list[int],
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        logits = location.stuff_class_logits.to(dtype)  # (blocks, B, S)
        values = location.stuff_masks  # (stages, B, S, h, w)
        segments = [
            (image, query, segment)
            for image, count in enumerate(counts)
            for segment, query in enumerate(self.stuff_queries[found.labels[image, :count]])
            if query >= 0
        ]
        pairs, place = np.unique(
            np.array([row[:2] for row in segments], dtype=np.int64).reshape(-1, 2), axis=0, return_inverse=True
        )
        image, query = torch.as_tensor(pairs, device=logits.device).unbind(1)  # (M,)
        positive = torch.zeros_like(logits)
        positive[:, image, query] = 1.0
        dice = values.flatten(1).sum(1) * 0
        if len(pairs):
            source = torch.tensor(segments, device=logits.device)
            parts = wanted.masks[source[:, 0], source[:, 2]]  # (segments, H/4, W/4)
            united = parts.new_zeros((len(pairs), *parts.shape[1:]))
            united.index_add_(0, torch.as_tensor(place.reshape(-1), device=logits.device), parts)
            dice = self._dice_sums(location, values[:, image, query], wanted, image, united.clamp(max=1))
        return {"loss_stuff_class": self._focal_sums(logits[..., None], positive[..., None]), "loss_stuff_dice": dice}

    def _focal_sums(self, logits: Tensor, positive: Tensor) -> Tensor:
        """Focal loss of (layers, B, Q, K), summed over all but the layers."""
        flat, wanted = logits.flatten(0, 2), positive.flatten(0, 2)  # (layers*B*Q, K)
        means = focal_loss(flat, wanted, torch.ones_like(flat), alpha=self.focal_alpha, gamma=self.focal_gamma)
        return means.view(logits.shape[0], -1).sum(1) * logits.shape[-1]

    def _dice_sums(
        self, location: LocationPrediction, values: Tensor, wanted: _Wanted, image: Tensor, masks: Tensor
    ) -> Tensor:
        """Dice loss of (stages, M, h, w) values at the size of the (M, H/4, W/4) masks, summed over these."""
        valid = None if location.mask_valid is None else location.mask_valid[image]
        raised = raise_resolution(values.transpose(0, 1), valid, location.mask_size)  # (M, stages, H/4, W/4)
        losses = squared_dice(raised.flatten(2), masks.flatten(1)[:, None], wanted.weight[image].flatten(1)[:, None])
        return losses.sum(0)


def squared_dice(values: Tensor, masks: Tensor, weight: Tensor) -> Tensor:
    """1 - 2 sum(v m) / (sum v^2 + sum m^2), pixels weighed: (..., P) that broadcast -> (...); 1 for empty masks."""
    overlap = (values * masks * weight).sum(-1)
    return 1 - 2 * overlap / ((values**2 * weight).sum(-1) + (masks**2 * weight).sum(-1) + 2 * DICE_EPS)


def pairwise_squared_dice(values: Tensor, masks: Tensor, weight: Tensor) -> Tensor:
    """As `squared_dice` for every pair: (B, Q, P), (B, N, P), (B, P) -> (B, Q, N)."""
    masks = masks.to(values.dtype)
    weighed = values * weight.to(values.dtype)[:, None]
    overlap = torch.bmm(weighed, masks.transpose(1, 2))  # (B, Q, N)
    own = (weighed * values).sum(-1)[:, :, None]
    other = (masks**2 * weight.to(values.dtype)[:, None]).sum(-1)[:, None]
    return 1 - 2 * overlap / (own + other + 2 * DICE_COST_EPS)


def _match(costs: np.ndarray, things: np.ndarray) -> Match:
    """Queries and segments, of (Q, N) costs and the columns that take part."""
    ((queries, columns),) = match_hungarian(costs[None, None][..., things], [len(things)])[0]
    return queries, things[columns]


def _padded(chosen: list[np.ndarray], num_queries: int, device: torch.device) -> Tensor:
    """(B, n) queries, 0 beyond an image's own; n is 1 or more where there are queries at all."""
    most = max((len(row) for row in chosen), default=0)
    table = np.zeros((len(chosen), max(most, min(num_queries, 1))), dtype=np.int64)
    for row, queries in zip(table, chosen, strict=True):
        row[: len(queries)] = queries
    return torch.as_tensor(table, device=device)


def _finite_images(values: Tensor) -> Tensor:
    """(B,) of (layers, B, ...)."""
    return values.transpose(0, 1).flatten(1).isfinite().all(1)


def _to_host(*parts: Tensor) -> list[np.ndarray]:
    """Tensors as arrays of the first one's dtype, by one copy."""
    flat = torch.cat([part.to(parts[0].dtype).flatten() for part in parts]).cpu().numpy()
    pieces = np.split(flat, np.cumsum([part.numel() for part in parts])[:-1])
    return [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]
