"""Mask-wise merging: whole masks are painted one after the other, the most trusted first.

Panoptic SegFormer (Li et al., CVPR 2022), section 3.5 and its code, for the outputs of any member of the family. The
conventions at the head of `postprocess` hold, with one difference that the published code makes too: mask
probabilities are resized, not mask logits. Masks that come from attention are exactly 0 over most of an image; logits
of such values would move the border inwards.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .postprocess import SCORE_DECIMALS, SegmentList, best_labels
from .resampling import FULL_EXTENT, Window, mask_windows, native_size, resample, sample_positions

QUALITY_POWER = 2  # beta of the paper; alpha, the power of the class score, is 1
# The thresholds of the paper's ResNet-50 on COCO; its code says the complements of the last two (0.4 and 0.2).
THRESHOLD = 0.25
MASK_THRESHOLD = 0.5
THING_VISIBLE_PART = 0.6
STUFF_VISIBLE_PART = 0.8


def mask_wise_segments(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    target_size: tuple[int, int] | None = None,
    extent: tuple[float, float] = FULL_EXTENT,
    activation: str = "softmax",
    threshold: float = THRESHOLD,
    mask_threshold: float = MASK_THRESHOLD,
    overlap_mask_area_threshold: float = THING_VISIBLE_PART,
    stuff_overlap_mask_area_threshold: float | None = STUFF_VISIBLE_PART,
    label_ids_to_fuse: Collection[int] = (),
    thing_label_ids: Collection[int] | None = None,
) -> dict[str, Any]:
    """One segment id per pixel by painting masks in the order of their scores.

    A query has the label and the probability p of its best class; "no object" drops it. Its mask is where the mask
    probability m is above `mask_threshold`, and its score p * q ** 2 with q = sum of m in the mask / (area + 1).
    Queries that score below `threshold` are dropped. The others are painted, best first, where nothing is painted
    yet; one of which less than `overlap_mask_area_threshold` of the area is still free is left out. For labels that
    are not in `thing_label_ids` (None: there are none) `stuff_overlap_mask_area_threshold` takes its place, unless it
    is None. Queries with the same label in `label_ids_to_fuse` share one segment with the score of the first.

    Returns:
        the same as `postprocess.panoptic_segments`, segments by falling score.
    """
    size = target_size or native_size(mask_logits, extent)
    probabilities, labels = best_labels(class_logits, activation)
    keep = (labels >= 0) & (probabilities >= threshold)  # q is below 1: the others cannot reach the threshold
    masks, qualities = _whole_masks(mask_logits[keep].float().sigmoid(), size, extent, mask_threshold)
    scores = [p * q**QUALITY_POWER for p, q in zip(probabilities[keep].tolist(), qualities, strict=True)]
    kept_labels = labels[keep].tolist()

    segmentation = torch.zeros(size, dtype=torch.int32, device=mask_logits.device)
    segments = SegmentList(label_ids_to_fuse)
    for query in sorted(range(len(scores)), key=lambda query: -scores[query]):
        (top, bottom, left, right), mask, area = masks[query]
        if scores[query] < threshold or area == 0:
            continue
        label = kept_labels[query]
        is_thing = thing_label_ids is None or label in thing_label_ids
        stuff_part = stuff_overlap_mask_area_threshold
        visible_part = overlap_mask_area_threshold if is_thing or stuff_part is None else stuff_part
        canvas = segmentation[top:bottom, left:right]  # a view: painting it paints the result
        visible = mask & (canvas == 0)
        pixels = int(visible.sum(dtype=torch.int32))
        if pixels > 0 and pixels >= visible_part * area:
            canvas.masked_fill_(visible, segments.add(label, round(scores[query], SCORE_DECIMALS)))
    return {"segmentation": segmentation, "segments_info": segments.entries}


def _whole_masks(
    maps: Tensor, size: tuple[int, int], extent: tuple[float, float], mask_threshold: float
) -> tuple[list[tuple[Window, Tensor, int]], list[float]]:
    """Of (N, h, w) probabilities the masks at target size, each as its window, its bool pixels there and its area; and
    for each mask its quality, sum of probabilities inside / (area + 1).

    Each map is resized once, and only where it can be above the threshold.
    """
    rows = sample_positions(maps.shape[1], size[0], extent[0], maps)
    columns = sample_positions(maps.shape[2], size[1], extent[1], maps)
    windows = mask_windows(maps > mask_threshold, rows, columns)
    masks, sums = [], []
    for values, (top, bottom, left, right) in zip(maps, windows, strict=True):
        part = resample(
            values[None],
            (rows[0][top:bottom], rows[1][top:bottom], rows[2][top:bottom]),
            (columns[0][left:right], columns[1][left:right], columns[2][left:right]),
        )[0]  # (bottom - top, right - left)
        mask = part > mask_threshold
        masks.append(mask)
        area = mask.sum(dtype=torch.int32)  # several times faster than to int64
        sums.append(torch.stack([area.double(), F.threshold(part, mask_threshold, 0.0).sum().double()]))
    counted = torch.stack(sums).tolist() if sums else []  # one transfer for all masks
    whole = [(window, mask, int(area)) for window, mask, (area, _) in zip(windows, masks, counted, strict=True)]
    return whole, [total / (area + 1) for area, total in counted]
