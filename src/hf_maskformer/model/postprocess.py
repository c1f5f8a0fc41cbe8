"""Class and mask logits -> label maps, panoptic segments and instances, as pure functions of one image.

Semantic inference and the panoptic merge by argmax follow MaskFormer (Cheng et al., NeurIPS 2021), section 3.4 and its
code; the instance ranking over queries x classes and the `mask >= threshold` intersection follow Mask2Former (CVPR
2022). The other panoptic merge is in `mask_wise_merge`.

Common to all functions:
- `class_logits` (Q, K+1) and `mask_logits` (Q, h, w) are the model's outputs for one image; they are read as float32.
- `activation` is "softmax" (last class = no object) or "sigmoid" (the last column is ignored).
- `extent` (height, width) is the part of the padded height and width that is image; only that part is read.
- logits are resized straight to `target_size` (H, W) of the photo; None means the size of the logits that are image.
- a query is dropped before it is resized; only what the cells of the logits leave open is interpolated at all (see
  `cell_grid`), in chunks, so that the working memory does not grow with the target.
"""

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cell_grid import CellGrid, best_in_cells, chunk_bytes, may_be_highest
from .input_checks import all_finite
from .mask_codes import logit, mask_codes
from .masks import rle_runs
from .resampling import FULL_EXTENT, native_size, resized_chunks
from .winning_queries import winning_queries

SCORE_DECIMALS = 6
ROWS_AT_ONCE = 64  # of the photo, where a map is rewritten


def output_field(outputs: Any, name: str) -> Any:
    """A field that may be missing; the pipeline hands over a bare ModelOutput."""
    return outputs.get(name) if hasattr(outputs, "get") else getattr(outputs, name, None)


def logits_per_image(outputs: Any, target_sizes: Any) -> list[tuple[Tensor, Tensor, Any, tuple[float, float]]]:
    """Class logits, mask logits, target size or None, and extent of each image."""
    class_logits, mask_logits = outputs.class_queries_logits.detach(), outputs.masks_queries_logits.detach()
    count = len(class_logits)
    sizes: list[Any] = [None] * count if target_sizes is None else [tuple(map(int, size)) for size in target_sizes]
    if len(sizes) != count:
        raise ValueError(f"target_sizes has {len(sizes)} entries for {count} images")
    for size in sizes:
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"target_sizes must hold (height, width) pairs of at least 1, got {size}")
    finite = all_finite(class_logits.flatten(1)) & all_finite(mask_logits.flatten(1))
    if not finite.all():
        raise FloatingPointError(f"The logits of image {finite.tolist().index(False)} of the batch are not finite.")
    extents = output_field(outputs, "valid_extent")
    pairs = [FULL_EXTENT] * count if extents is None else [tuple(extent) for extent in extents.tolist()]
    return list(zip(class_logits, mask_logits, sizes, pairs, strict=True))


def class_probabilities(class_logits: Tensor, activation: str) -> Tensor:
    """(..., Q, K+1) logits -> (..., Q, K) probabilities of the K labels."""
    if activation == "softmax":
        return class_logits.float().softmax(dim=-1)[..., :-1]
    if activation == "sigmoid":
        return class_logits.float()[..., :-1].sigmoid()
    raise ValueError(f"class_activation must be 'softmax' or 'sigmoid', got {activation!r}")


def semantic_scores(class_logits: Tensor, mask_logits: Tensor, activation: str = "softmax") -> Tensor:
    """Sum over queries of class probability x mask probability: (K, h, w), at the size of the logits.

    The classes of a cell stand together in memory; the result is a view of (h, w, K).
    """
    probabilities = class_probabilities(class_logits, activation)  # (Q, K)
    masks = mask_logits.flatten(1)  # (Q, h w)
    bands = masks.split(max(1, chunk_bytes(masks.device) // (4 * len(masks))), dim=1)
    scores = torch.cat([band.float().sigmoid().t() @ probabilities for band in bands])  # (h w, K)
    return scores.view(*mask_logits.shape[1:], -1).permute(2, 0, 1)


@torch.no_grad()
def semantic_map(
    scores: Tensor, target_size: tuple[int, int] | None = None, extent: tuple[float, float] = FULL_EXTENT
) -> Tensor:
    """Label of the highest resized score (K, h, w) at each pixel, of equal ones the first: (H, W) int64.

    A class that is the highest at all four corners of a cell is so everywhere in it. In the other cells only those
    classes are interpolated whose highest corner reaches the highest of the classes' lowest corners.
    """
    size = target_size or native_size(scores, extent)
    grid = CellGrid((scores.shape[1], scores.shape[2]), size, extent, scores)
    if not grid.is_coarse:
        return _plain_semantic_map(scores, size, extent)
    maps = grid.crop(scores.permute(1, 2, 0))  # (cells high, cells wide, K)
    labels = maps.argmax(dim=2)
    lowest, highest = (grid.corner_extreme(labels, extreme) for extreme in (torch.minimum, torch.maximum))
    result = grid.spread(labels)
    contested = ((lowest < highest) & (grid.pixel_counts() > 0)).view(-1).nonzero()[:, 0]
    found = best_in_cells(grid, maps.reshape(-1, len(scores)), contested, may_be_highest, lambda patch, k: (patch, k))
    for patches, winner in found:
        patches.write(result, winner)
    return result


def _plain_semantic_map(scores: Tensor, size: tuple[int, int], extent: tuple[float, float]) -> Tensor:
    """`semantic_map` by resizing every class, for targets that have hardly more pixels than cells."""
    best_score = scores.new_full(size, -math.inf)
    best_label = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for start, chunk in resized_chunks(scores, size, extent):
        score, label = chunk.max(dim=0)
        better = score > best_score
        best_label = torch.where(better, label + start, best_label)
        best_score = torch.where(better, score, best_score)
    return best_label


@torch.no_grad()
def panoptic_segments(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    target_size: tuple[int, int] | None = None,
    extent: tuple[float, float] = FULL_EXTENT,
    activation: str = "softmax",
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] = (),
) -> dict[str, Any]:
    """One segment id per pixel by argmax of score x mask probability.

    A query stays if its best label is not "no object" and scores above `threshold`. A pixel goes to the query with
    the largest score x mask probability, and only where that query's mask probability is at least `mask_threshold`.
    A query whose pixels won are less than `overlap_mask_area_threshold` of its mask's area is dropped, its pixels
    become void. Queries with the same label in `label_ids_to_fuse` share one segment and its score is their highest.

    Returns:
        `segmentation` (H, W) int32, 0 = void; `segments_info`, a list of id (1, 2, ...), label_id, was_fused, score.
    """
    size = target_size or native_size(mask_logits, extent)
    scores, labels = best_labels(class_logits, activation)
    keep = (labels >= 0) & (scores > threshold)
    scores, labels = scores[keep], labels[keep]
    segmentation = torch.zeros(size, dtype=torch.int32, device=mask_logits.device)
    if len(scores) == 0:
        return {"segmentation": segmentation, "segments_info": []}

    grid = CellGrid((mask_logits.shape[1], mask_logits.shape[2]), size, extent, scores)
    winner, visible, areas = winning_queries(mask_logits[keep].float(), scores, grid, logit(mask_threshold))
    kept = (visible > 0) & (visible >= overlap_mask_area_threshold * areas)
    segment_of_query = torch.zeros(len(scores) + 1, dtype=torch.int32)  # entry 0 is void
    segments = SegmentList(label_ids_to_fuse)
    for query in torch.nonzero(kept).flatten().tolist():
        score = round(float(scores[query]), SCORE_DECIMALS)
        segment_of_query[query + 1] = segments.add(int(labels[query]), score)
    segment_of_query = segment_of_query.to(winner.device)
    for rows, queries in zip(segmentation.split(ROWS_AT_ONCE), winner.split(ROWS_AT_ONCE), strict=True):
        rows.copy_(segment_of_query.index_select(0, queries.reshape(-1)).view(rows.shape))
    return {"segmentation": segmentation, "segments_info": segments.entries}


class SegmentList:
    """`segments_info` in the making: numbers the segments and fuses those of one label where that is wanted."""

    def __init__(self, label_ids_to_fuse: Collection[int]) -> None:
        self.label_ids_to_fuse = label_ids_to_fuse
        self.entries: list[dict[str, Any]] = []
        self._fused: dict[int, dict[str, Any]] = {}

    def add(self, label: int, score: float) -> int:
        """Id of the segment that a query belongs to; a shared segment has the highest score of its queries."""
        segment = self._fused.get(label)
        if segment is None:
            fuse = label in self.label_ids_to_fuse
            segment = {"id": len(self.entries) + 1, "label_id": label, "was_fused": fuse, "score": score}
            self.entries.append(segment)
            if fuse:
                self._fused[label] = segment
        segment["score"] = max(segment["score"], score)
        return segment["id"]


@torch.no_grad()
def instance_candidates(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    target_size: tuple[int, int] | None = None,
    extent: tuple[float, float] = FULL_EXTENT,
    activation: str = "softmax",
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    allowed_labels: Collection[int] | None = None,
    max_candidates: int | None = None,
) -> list[dict[str, Any]]:
    """The instances of one image, best first, each with its whole mask; no overlap rule. Mask AP is measured on these.

    Of all pairs of a query and a label in `allowed_labels` (None: any) the `max_candidates` (default Q) most probable
    are ranked by class probability x mean mask probability inside the mask; those above `threshold` with at least one
    pixel are returned.

    Returns:
        list of label_id, score, rle (COCO RLE at target size), area (pixels), query (index).
    """
    size = target_size or native_size(mask_logits, extent)
    probabilities = class_probabilities(class_logits, activation)  # (Q, K)
    allowed = torch.arange(probabilities.shape[-1], device=probabilities.device)
    if allowed_labels is not None:
        check_label_ids("allowed_labels", allowed_labels, len(allowed))
        allowed = allowed[sorted(allowed_labels)]
    pair_probabilities = probabilities[:, allowed].flatten()
    limit = min(max_candidates or len(probabilities), len(pair_probabilities))
    pair_scores, pairs = pair_probabilities.topk(limit)
    pairs = pairs[pair_scores > threshold]  # the mean mask probability is at most 1, so the others cannot pass
    queries, labels = pairs // max(1, len(allowed)), allowed[pairs % max(1, len(allowed))]
    used, position = queries.unique(return_inverse=True)
    masks = mask_codes(mask_logits[used].float(), size, extent, logit(mask_threshold))
    candidates = []
    for query, label, index in zip(queries.tolist(), labels.tolist(), position.tolist(), strict=True):
        rle, area, quality = masks[index]
        score = float(probabilities[query, label]) * quality
        if area > 0 and score > threshold:
            candidates.append({"label_id": label, "score": score, "rle": rle, "area": area, "query": query})
    return sorted(candidates, key=lambda candidate: -candidate["score"])


def instance_segments(
    candidates: list[dict[str, Any]],
    size: tuple[int, int],
    overlap_mask_area_threshold: float = 0.8,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Paint candidates (best first) into one id map, the higher score on top.

    A candidate is dropped if the better ones leave it no pixel, or less than `overlap_mask_area_threshold` of its
    area. Those that stay keep their whole mask in `rle`, although the map shows only the visible part.

    Returns:
        `segmentation` (H, W) int32, 0 = void, and `segments_info`, a list of id (1, 2, ...), label_id, was_fused
        (always False), score, rle.
    """
    canvas = np.zeros(size[0] * size[1], dtype=np.int32)  # column by column, as the codes
    segments: list[dict[str, Any]] = []
    for candidate in candidates:
        starts, lengths = rle_runs(candidate["rle"])
        if len(starts) == 0:
            continue
        ends = starts + lengths
        part = canvas[starts[0] : ends[-1]]
        runs_and_gaps = np.diff(np.stack([starts, ends], axis=1).reshape(-1))
        visible = np.repeat(np.arange(len(runs_and_gaps)) % 2 == 0, runs_and_gaps)
        visible &= part == 0
        pixels = int(np.count_nonzero(visible))
        if pixels == 0 or pixels < overlap_mask_area_threshold * candidate["area"]:
            continue
        segments.append(
            {
                "id": len(segments) + 1,
                "label_id": candidate["label_id"],
                "was_fused": False,
                "score": round(candidate["score"], SCORE_DECIMALS),
                "rle": candidate["rle"],
            }
        )
        np.copyto(part, len(segments), where=visible)
    segmentation = torch.from_numpy(canvas).view(size[1], size[0]).t().contiguous()
    return {"segmentation": segmentation.to(device), "segments_info": segments}


def check_label_ids(name: str, label_ids: Collection[int], num_labels: int) -> None:
    """ValueError unless all are label ids of the outputs: a negative one would count from the last class."""
    wrong = [label for label in label_ids if not 0 <= label < num_labels]
    if wrong:
        raise ValueError(f"{name} contains {wrong[0]}, allowed are the outputs' labels 0..{num_labels - 1}")


def best_labels(class_logits: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Best score and label of each query, label -1 where "no object" is the most probable class."""
    scores, labels = class_probabilities(class_logits, activation).max(dim=-1)  # (Q,)
    if activation == "softmax":
        no_object = class_logits.argmax(dim=-1) == class_logits.shape[-1] - 1
        labels = labels.masked_fill(no_object, -1)
    return scores, labels
