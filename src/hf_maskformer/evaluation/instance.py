"""COCO average precision of instance masks ("Microsoft COCO", Lin et al., ECCV 2014), figures as in pycocotools."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from hf_maskformer.evaluation.mask_overlap import CroppedMask, crop_mask, mask_areas, pairwise_ious
from hf_maskformer.evaluation.metric import Metric, check_labels, check_num_labels, to_numpy
from hf_maskformer.model.masks import decode_rle

# The COCO evaluation's constants
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_POINTS = np.linspace(0.0, 1.0, 101)
AREA_RANGES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
MAX_DETECTIONS = 100  # per image and class, highest scores first

AREA_NAMES = list(AREA_RANGES)
AREA_LOW, AREA_HIGH = np.array(list(AREA_RANGES.values())).T  # (A,), (A,)


class ImageMatches(NamedTuple):
    """What one class leaves behind in one image: A area ranges, T IoU thresholds, D detections by falling score."""

    scores: np.ndarray  # (D,) float64
    matched: np.ndarray  # (A, T, D) bool
    ignored: np.ndarray  # (A, T, D) bool: neither a true nor a false positive
    num_references: np.ndarray  # (A,) int64: references that must be found


class MaskAveragePrecision(Metric):
    """Mask AP with COCO's rules: 10 IoU thresholds, 101 recall points, 100 detections per image and class.

    An entry of `update` is, for predictions, `{"masks", "scores" (N,), "labels" (N,)}`, for references `{"masks",
    "labels" (N,)}` and optionally `"iscrowd"` (N,) and `"area"` (N,). Masks are (N, H, W) arrays or tensors, or a list
    of RLE; they may overlap. `area` decides the size range of a reference (COCO's files give the polygon's area);
    without it pixels are counted. Detections on a crowd reference are not counted; a crowd need not be found.
    Detections of equal score rank in the order of their images, so merged states give the figures of one pass over the
    images in the order of the merges.

    Args:
        num_labels: number of classes K.
        iou_type: "segm", overlap of whole masks.
    """

    description = "COCO average precision of instance masks."
    settings = ("num_labels", "iou_type")

    def __init__(self, num_labels: int, iou_type: Literal["segm"] = "segm") -> None:
        check_num_labels(num_labels)
        if iou_type != "segm":
            raise ValueError(f"iou_type must be 'segm', got {iou_type!r}")
        self.num_labels = num_labels
        self.iou_type = iou_type
        super().__init__()

    def compute(self) -> dict[str, Any]:
        """Fractions 0..1; -1 where no reference counts, as pycocotools has it.

        Returns:
            `map` (mean over classes and IoU thresholds), `map_50`, `map_75`, `map_small`, `map_medium`, `map_large`
            (by the references' areas, borders 32^2 and 96^2 pixels), `per_category` (list indexed by class id).
        """
        precision = np.stack([_class_precision(records) for records in self.records])  # (K, A, T)
        in_all = precision[:, AREA_NAMES.index("all")]  # (K, T)
        result: dict[str, Any] = {
            "map": _mean_known(in_all),
            "map_50": _mean_known(in_all[:, np.isclose(IOU_THRESHOLDS, 0.5)]),
            "map_75": _mean_known(in_all[:, np.isclose(IOU_THRESHOLDS, 0.75)]),
        }
        for name in ("small", "medium", "large"):
            result[f"map_{name}"] = _mean_known(precision[:, AREA_NAMES.index(name)])
        result["per_category"] = [_mean_known(per_threshold) for per_threshold in in_all]
        return result

    def _reset_state(self) -> None:
        self.records: list[list[ImageMatches]] = [[] for _ in range(self.num_labels)]

    def _merge_state(self, other: "MaskAveragePrecision") -> None:
        for own, given in zip(self.records, other.records, strict=True):
            own.extend(given)

    def _add_image(self, prediction: Any, reference: Any, where: str) -> None:
        labels = self._labels(prediction, f"{where}, prediction")
        scores = _column(prediction, "scores", len(labels), np.float64, f"{where}, prediction")
        if np.isnan(scores).any():
            raise ValueError(f"{where}, prediction: scores contain nan")
        actual_labels = self._labels(reference, f"{where}, reference")
        count = len(actual_labels)
        crowd = np.zeros(count, dtype=bool)
        if reference.get("iscrowd") is not None:
            crowd = _column(reference, "iscrowd", count, bool, f"{where}, reference")
        area = None
        if reference.get("area") is not None:
            area = _column(reference, "area", count, np.float64, f"{where}, reference")
        _check_mask_count(prediction, len(labels), f"{where}, prediction")
        _check_mask_count(reference, count, f"{where}, reference")

        for label in np.union1d(labels, actual_labels):
            chosen = np.nonzero(labels == label)[0]
            chosen = chosen[np.argsort(-scores[chosen], kind="stable")][:MAX_DETECTIONS]
            actual = np.nonzero(actual_labels == label)[0]
            detections = _cropped_masks(prediction["masks"], chosen, f"{where}, prediction")
            references = _cropped_masks(reference["masks"], actual, f"{where}, reference")
            reference_area = mask_areas(references) if area is None else area[actual]
            self.records[label].append(
                _match_image(scores[chosen], detections, references, crowd[actual], reference_area, where)
            )

    def _labels(self, entry: Any, where: str) -> np.ndarray:
        labels = to_numpy(entry["labels"]).reshape(-1)
        if labels.size and labels.dtype.kind not in "iu":
            raise ValueError(f"{where}: labels must be integers, got {labels.dtype}")
        labels = labels.astype(np.int64)
        check_labels(labels, self.num_labels, where)
        return labels


def _match_image(
    scores: np.ndarray,
    detections: Sequence[CroppedMask],
    references: Sequence[CroppedMask],
    crowd: np.ndarray,
    reference_area: np.ndarray,
    where: str,
) -> ImageMatches:
    """Matches the detections of one class, sorted by falling score, in one image."""
    sizes = {mask.image_size for mask in (*detections, *references)}
    if len(sizes) > 1:
        raise ValueError(f"{where}: masks must all have one (height, width), got {sorted(sizes)}")
    iou = pairwise_ious(detections, references, crowd)  # (D, G)
    ignorable = crowd[None, :] | _outside_ranges(reference_area)  # (A, G)
    matched, ignored = _match(iou, ignorable, crowd)
    outside = _outside_ranges(mask_areas(detections))  # (A, D)
    ignored |= ~matched & outside[:, None, :]
    return ImageMatches(scores, matched, ignored, (~ignorable).sum(axis=1))


def _match(iou: np.ndarray, ignorable: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """COCO's greedy matching, for all area ranges and thresholds in one pass over the detections.

    A detection takes the free reference of highest IoU at or above the threshold (the later one of equals), and one
    that may be ignored only when no other fits. A crowd reference stays free.

    Args:
        iou: (D, G), detections by falling score.
        ignorable: (A, G) bool.
        crowd: (G,) bool.

    Returns:
        (A, T, D) bool each: the detection is matched; it is matched to an ignorable reference.
    """
    num_ranges, num_detections, num_references = len(ignorable), *iou.shape
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)  # (T,)
    matched = np.zeros((num_ranges, len(thresholds), num_detections), dtype=bool)
    ignored = np.zeros_like(matched)
    free = np.ones((num_ranges, len(thresholds), num_references), dtype=bool)
    grid = np.ogrid[:num_ranges, : len(thresholds)]
    for index in range(num_detections):
        candidates = np.nonzero(iou[index] >= thresholds[0])[0]
        if not candidates.size:
            continue
        # by rising IoU, equals in their order: the best candidate is the last one allowed
        candidates = candidates[np.argsort(iou[index, candidates], kind="stable")]  # (C,)
        fits = iou[index, candidates] >= thresholds[:, None]  # (T, C)
        allowed = free[:, :, candidates] & fits[None]  # (A, T, C)
        may_ignore = ignorable[:, candidates]  # (A, C)
        rank = np.arange(1, candidates.size + 1) + np.where(may_ignore, 0, candidates.size)  # (A, C)
        ranked = np.where(allowed, rank[:, None, :], 0)  # (A, T, C)
        best = ranked.argmax(axis=2)  # (A, T)
        found = ranked.max(axis=2) > 0  # (A, T)
        chosen = candidates[best]  # (A, T)
        matched[:, :, index] = found
        ignored[:, :, index] = found & np.take_along_axis(may_ignore, best, axis=1)
        free[grid[0], grid[1], chosen] &= ~found | crowd[chosen]
    return matched, ignored


def _class_precision(records: Sequence[ImageMatches]) -> np.ndarray:
    """Average precision (A, T) of one class: precision at each recall point, averaged; -1 without references."""
    average = np.full((len(AREA_NAMES), len(IOU_THRESHOLDS)), -1.0)
    if not records:
        return average
    scores = np.concatenate([record.scores for record in records])
    order = np.argsort(-scores, kind="stable")
    matched = np.concatenate([record.matched for record in records], axis=2)[:, :, order]  # (A, T, D)
    ignored = np.concatenate([record.ignored for record in records], axis=2)[:, :, order]
    num_references = np.sum([record.num_references for record in records], axis=0)  # (A,)
    true_positives = np.cumsum(matched & ~ignored, axis=2, dtype=np.float64)
    false_positives = np.cumsum(~matched & ~ignored, axis=2, dtype=np.float64)
    precision = true_positives / (true_positives + false_positives + np.spacing(1))
    envelope = np.maximum.accumulate(precision[:, :, ::-1], axis=2)[:, :, ::-1]  # best at this recall or higher
    for area in np.nonzero(num_references)[0]:
        recall = true_positives[area] / num_references[area]  # (T, D)
        for threshold, curve in enumerate(envelope[area]):
            position = np.searchsorted(recall[threshold], RECALL_POINTS, side="left")
            reached = position[position < len(order)]  # a recall never reached has precision 0
            average[area, threshold] = curve[reached].sum() / len(RECALL_POINTS)
    return average


def _outside_ranges(area: np.ndarray) -> np.ndarray:
    """(A, N) bool: the area is not in the range, ends included."""
    return (area[None, :] < AREA_LOW[:, None]) | (area[None, :] > AREA_HIGH[:, None])


def _mean_known(values: np.ndarray) -> float:
    """Mean of the values that are not -1; -1 where there is none."""
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _column(entry: Any, key: str, count: int, dtype: type, where: str) -> np.ndarray:
    column: np.ndarray = to_numpy(entry[key]).reshape(-1).astype(dtype)
    if len(column) != count:
        raise ValueError(f"{where}: {key} must have one value per label ({count}), got {len(column)}")
    return column


def _check_mask_count(entry: Any, count: int, where: str) -> None:
    if len(entry["masks"]) != count:
        raise ValueError(f"{where}: masks must have one mask per label ({count}), got {len(entry['masks'])}")


def _cropped_masks(masks: Any, indices: np.ndarray, where: str) -> list[CroppedMask]:
    """The chosen masks of a stack or a list of RLE, one full mask in memory at a time."""
    chosen = []
    for index in indices.tolist():
        mask = masks[index]
        dense = decode_rle(mask) if isinstance(mask, dict) else to_numpy(mask).astype(bool)
        if dense.ndim != 2:
            raise ValueError(f"{where}: masks must be (N, H, W) or a list of RLE, got one of shape {dense.shape}")
        chosen.append(crop_mask(dense))
    return chosen
