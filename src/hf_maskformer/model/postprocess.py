"""Class and mask logits -> label maps, panoptic segments and instances, as pure functions of one image.

Semantic inference and the panoptic merge by argmax follow MaskFormer (Cheng et al., NeurIPS 2021), section 3.4 and its
code; the instance ranking over queries x classes and the `mask >= threshold` intersection follow Mask2Former (CVPR
2022). The other panoptic merge is in `mask_wise_merge`.

Common to all functions:
- `class_logits` (Q, K+1) and `mask_logits` (Q, h, w) are the model's outputs for one image; they are read as float32.
- `activation` is "softmax" (last class = no object) or "sigmoid" (the last column is ignored).
- `extent` (height, width) is the part of the padded height and width that is image; only that part is read.
- logits are resized straight to `target_size` (H, W) of the photo; None means the size of the logits that are image.
- a query is dropped before it is resized, and maps are resized in chunks of at most CHUNK_BYTES.
"""

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import decode_rle, encode_rle

CHUNK_BYTES = 64 * 2**20
FULL_EXTENT = (1.0, 1.0)
# valid_extent is float32: a border closer than this part of a cell counts as lying on the cell's edge.
EXTENT_TOLERANCE = 1e-3
SCORE_DECIMALS = 6

# Along one axis of T pixels: lower and upper source index (T,), and the weight of the upper one (T,).
Samples = tuple[Tensor, Tensor, Tensor]


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
    finite = class_logits.isfinite().flatten(1).all(1) & mask_logits.isfinite().flatten(1).all(1)
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


def native_size(maps: Tensor, extent: tuple[float, float]) -> tuple[int, int]:
    """Size (h, w) of the part of (N, h, w) maps that is image."""
    height, width = maps.shape[-2:]
    return max(1, round(extent[0] * height)), max(1, round(extent[1] * width))


def resize_maps(maps: Tensor, size: tuple[int, int], extent: tuple[float, float] = FULL_EXTENT) -> Tensor:
    """Resize the image part of (N, h, w) maps bilinearly to (N, H, W).

    The target pixel x is read at (x + 0.5) / W * extent * w - 0.5, without rounding the border to whole cells; cells
    that lie wholly in the padding are never read. With extent 1 this is `F.interpolate(..., align_corners=False)`.
    """
    height, width = maps.shape[-2:]
    if tuple(extent) == FULL_EXTENT:
        if (height, width) == tuple(size):
            return maps
        return F.interpolate(maps[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
    rows = sample_positions(height, size[0], extent[0], maps)
    return resample(maps, rows, sample_positions(width, size[1], extent[1], maps))


def sample_positions(length: int, target: int, extent: float, like: Tensor) -> Samples:
    """Where `resize_maps` reads along one axis of `length` cells for `target` pixels."""
    last = min(length, max(1, math.ceil(extent * length - EXTENT_TOLERANCE))) - 1  # the last cell that holds image
    position = (torch.arange(target, device=like.device, dtype=torch.float64) + 0.5) * (extent * length / target) - 0.5
    position = position.clamp(min=0, max=last)
    lower = position.floor().long()
    return lower, (lower + 1).clamp(max=last), (position - lower).to(like.dtype)


def resample(maps: Tensor, rows: Samples, columns: Samples) -> Tensor:
    """Read (N, h, w) maps between the cells of `rows` and `columns`: (N, H, W)."""
    (top, bottom, row_weight), (left, right, column_weight) = rows, columns
    # Columns first: they are slow to gather, and the maps are still small. Rows are copied whole.
    wide = torch.lerp(maps.index_select(2, left), maps.index_select(2, right), column_weight)  # (N, h, W)
    return torch.lerp(wide.index_select(1, top), wide.index_select(1, bottom), row_weight[:, None])  # (N, H, W)


def semantic_scores(class_logits: Tensor, mask_logits: Tensor, activation: str = "softmax") -> Tensor:
    """Sum over queries of class probability x mask probability: (K, h, w), at the size of the logits."""
    probabilities = class_probabilities(class_logits, activation)[None]
    return torch.einsum("bqk,bqhw->bkhw", probabilities, mask_logits.float().sigmoid()[None])[0]  # (K, h, w)


def semantic_map(
    scores: Tensor, target_size: tuple[int, int] | None = None, extent: tuple[float, float] = FULL_EXTENT
) -> Tensor:
    """Label of the highest resized score (K, h, w) at each pixel: (H, W) int64."""
    size = target_size or native_size(scores, extent)
    best_score = scores.new_full(size, -math.inf)
    best_label = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for start, chunk in _resized_chunks(scores, size, extent):
        score, label = chunk.max(dim=0)
        better = score > best_score
        best_label = torch.where(better, label + start, best_label)
        best_score = torch.where(better, score, best_score)
    return best_label


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

    winner, areas = _winning_queries(mask_logits[keep].float(), scores, size, extent, mask_threshold)
    visible = torch.bincount(winner.flatten() + 1, minlength=len(scores) + 1)[1:]
    kept = (visible > 0) & (visible >= overlap_mask_area_threshold * areas.double())
    segment_of_query = torch.zeros(len(scores) + 1, dtype=torch.int32)  # entry 0 is void
    segments = SegmentList(label_ids_to_fuse)
    for query in torch.nonzero(kept).flatten().tolist():
        score = round(float(scores[query]), SCORE_DECIMALS)
        segment_of_query[query + 1] = segments.add(int(labels[query]), score)
    return {"segmentation": segment_of_query.to(winner.device)[winner + 1], "segments_info": segments.entries}


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
        allowed = allowed[sorted(allowed_labels)]
    pair_probabilities = probabilities[:, allowed].flatten()
    limit = min(max_candidates or len(probabilities), len(pair_probabilities))
    pair_scores, pairs = pair_probabilities.topk(limit)
    pairs = pairs[pair_scores > threshold]  # the mean mask probability is at most 1, so the others cannot pass
    queries, labels = pairs // max(1, len(allowed)), allowed[pairs % max(1, len(allowed))]
    used, position = queries.unique(return_inverse=True)
    masks = list(_mask_codes(mask_logits[used].float(), size, extent, mask_threshold)) if len(used) else []
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
    segmentation = torch.zeros(size, dtype=torch.int32)
    segments: list[dict[str, Any]] = []
    for candidate in candidates:
        visible = torch.from_numpy(decode_rle(candidate["rle"])) & (segmentation == 0)
        pixels = int(visible.sum())
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
        segmentation[visible] = len(segments)
    return {"segmentation": segmentation.to(device), "segments_info": segments}


def best_labels(class_logits: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Best score and label of each query, label -1 where "no object" is the most probable class."""
    scores, labels = class_probabilities(class_logits, activation).max(dim=-1)  # (Q,)
    if activation == "softmax":
        no_object = class_logits.argmax(dim=-1) == class_logits.shape[-1] - 1
        labels = labels.masked_fill(no_object, -1)
    return scores, labels


def _winning_queries(
    mask_logits: Tensor, scores: Tensor, size: tuple[int, int], extent: tuple[float, float], mask_threshold: float
) -> tuple[Tensor, Tensor]:
    """Per pixel the query with the largest score x probability, -1 where its probability is below the threshold
    ((H, W) int64), and per query the area of its own mask ((Q,) int64)."""
    best_value = mask_logits.new_full(size, -1.0)
    winner = torch.full(size, -1, dtype=torch.int64, device=mask_logits.device)
    inside = torch.zeros(size, dtype=torch.bool, device=mask_logits.device)
    areas = []
    border = _logit(mask_threshold)
    for start, chunk in _resized_chunks(mask_logits, size, extent):  # (N, H, W)
        masks = chunk >= border
        areas.append(masks.flatten(1).sum(dim=1, dtype=torch.int32))  # several times faster than to int64
        value, index = (chunk.sigmoid() * scores[start : start + len(chunk), None, None]).max(dim=0)
        better = value > best_value
        best_value = torch.where(better, value, best_value)
        winner = torch.where(better, index + start, winner)
        inside = torch.where(better, masks.gather(0, index[None])[0], inside)
    return winner.masked_fill(~inside, -1), torch.cat(areas)


def _mask_codes(
    mask_logits: Tensor, size: tuple[int, int], extent: tuple[float, float], mask_threshold: float
) -> Iterator[tuple[dict[str, Any], int, float]]:
    """For each mask its RLE at target size, its area and its mean probability inside."""
    border = _logit(mask_threshold)
    for _, chunk in _resized_chunks(mask_logits, size, extent):
        for logits, mask in zip(chunk, chunk >= border, strict=True):
            inside = logits[mask]  # (pixels of the mask,)
            yield encode_rle(mask), len(inside), float(inside.sigmoid().mean()) if len(inside) else 0.0


def _resized_chunks(maps: Tensor, size: tuple[int, int], extent: tuple[float, float]) -> Iterator[tuple[int, Tensor]]:
    """Resize (N, h, w) maps a few at a time; yields the index of the first map and the (n, H, W) chunk."""
    count = max(1, CHUNK_BYTES // (4 * size[0] * size[1]))
    for start in range(0, len(maps), count):
        yield start, resize_maps(maps[start : start + count], size, extent)


def _logit(probability: float) -> float:
    """Comparing logits with this saves the sigmoid of every pixel."""
    if probability in (0, 1):
        return math.inf if probability == 1 else -math.inf
    return math.log(probability / (1 - probability))
