"""COCO average precision of instance masks ("Microsoft COCO", Lin et al., ECCV 2014), figures as in pycocotools.

Boundary AP ("Boundary IoU", Cheng et al., CVPR 2021) is the same with another IoU; figures as in boundary-iou-api.
"""

from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from hf_maskformer.evaluation.boundary import DILATION_RATIO, boundary_width, mask_boundary
from hf_maskformer.evaluation.mask_overlap import CroppedMask, crop_mask, crop_rles, mask_areas, pairwise_ious
from hf_maskformer.evaluation.metric import (
    Metric,
    check_dilation_ratio,
    check_labels,
    check_num_labels,
    count_entries,
    field,
    read_array,
)

IouType = Literal["segm", "boundary"]

# The COCO evaluation's constants
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_POINTS = np.linspace(0.0, 1.0, 101)
AREA_RANGES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
MAX_DETECTIONS = 100  # per image and class, highest scores first

AREA_NAMES = list(AREA_RANGES)
AREA_LOW, AREA_HIGH = np.array(list(AREA_RANGES.values())).T  # (A,), (A,)


class ImageMatches(NamedTuple):
    """What one image leaves behind: A area ranges, T IoU thresholds; verdicts are A * T bits, packed in bytes.

    Detections stand by rising label and, of one label, falling score.
    """

    labels: np.ndarray  # (D,) int64
    scores: np.ndarray  # (D,) float64
    matched: np.ndarray  # (bytes, D) uint8 for (A, T, D) bool
    ignored: np.ndarray  # (bytes, D) uint8 for (A, T, D) bool: neither a true nor a false positive
    reference_labels: np.ndarray  # (G,) int64
    countable: np.ndarray  # (A, G) bool: a reference that must be found


class MaskAveragePrecision(Metric):
    """Mask AP with COCO's rules: 10 IoU thresholds, 101 recall points, 100 detections per image and class.

    An entry of `update` is, for predictions, `{"masks", "scores" (N,), "labels" (N,)}`, for references `{"masks",
    "labels" (N,)}` and optionally `"iscrowd"` (N,) and `"area"` (N,). Masks are (N, H, W) arrays or tensors, or a list
    of RLE; they may overlap, but all of an image have its size. Arrays are bool or integers, every non-zero pixel
    counting as set, or 0.0 and 1.0; probabilities and logits are refused. `area` decides the size range of a reference
    (COCO's files give the polygon's area); without it pixels are counted. Detections on a crowd reference are not
    counted; a crowd need not be found. Detections of equal score rank in the order of their images, so merged states
    give the figures of one pass over the images in the order of the merges.

    Args:
        num_labels: number of classes K.
        iou_type: "segm", overlap of whole masks; "boundary", the smaller of mask IoU and boundary IoU (against a
            crowd the mask's share alone, as in boundary-iou-api).
        dilation_ratio: with "boundary", the boundary's width as a share of the image's diagonal.
    """

    description = "COCO average precision of instance masks."
    settings = ("num_labels", "iou_type", "dilation_ratio")

    def __init__(self, num_labels: int, iou_type: IouType = "segm", dilation_ratio: float = DILATION_RATIO) -> None:
        check_num_labels(num_labels)
        check_dilation_ratio(dilation_ratio)
        if iou_type not in get_args(IouType):
            raise ValueError(f"iou_type must be one of {list(get_args(IouType))}, got {iou_type!r}")
        self.num_labels = num_labels
        self.iou_type = iou_type
        self.dilation_ratio = dilation_ratio
        super().__init__()

    def compute(self) -> dict[str, Any]:
        """Fractions 0..1; -1 where no reference counts, as pycocotools has it.

        Returns:
            `map` (mean over classes and IoU thresholds), `map_50`, `map_75`, `map_small`, `map_medium`, `map_large`
            (by the references' areas, borders 32^2 and 96^2 pixels), `per_category` (list indexed by class id).
        """
        precision = self._precision()  # (K, A, T)
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

    def _precision(self) -> np.ndarray:
        """Average precision (K, A, T) of each class; -1 without references."""
        average = np.full((self.num_labels, len(AREA_NAMES), len(IOU_THRESHOLDS)), -1.0)
        if not self.records:
            return average
        labels, scores, matched, ignored, reference_labels, countable = (
            np.concatenate(parts, axis=-1) for parts in zip(*self.records, strict=True)
        )
        order = np.lexsort((-scores, labels))  # stable: equal scores stay in the order of their images
        bounds = np.searchsorted(labels, np.arange(self.num_labels + 1), sorter=order)
        for label in np.unique(reference_labels):
            chosen = order[bounds[label] : bounds[label + 1]]  # (D,)
            num_references = countable[:, reference_labels == label].sum(axis=1)  # (A,)
            average[label] = _class_precision(_unpack(matched[:, chosen]), _unpack(ignored[:, chosen]), num_references)
        return average

    def _reset_state(self) -> None:
        self.records: list[ImageMatches] = []

    def _merge_state(self, other: "MaskAveragePrecision") -> None:
        self.records.extend(other.records)

    def _add_image(self, prediction: Any, reference: Any, where: str) -> None:
        labels = self._labels(prediction, f"{where}, prediction")
        scores = _column(prediction, "scores", len(labels), np.float64, f"{where}, prediction")
        if np.isnan(scores).any():
            raise ValueError(f"{where}, prediction: scores contain nan")
        given, chosen = len(labels), _ranked(labels, scores)
        labels, scores = labels[chosen], scores[chosen]
        detections = _cropped_masks(prediction, given, chosen, f"{where}, prediction")

        actual_labels = self._labels(reference, f"{where}, reference")
        count = len(actual_labels)
        references = _cropped_masks(reference, count, np.arange(count), f"{where}, reference")
        crowd, area = np.zeros(count, dtype=bool), mask_areas(references)
        if reference.get("iscrowd") is not None:
            crowd = _column(reference, "iscrowd", count, bool, f"{where}, reference")
        if reference.get("area") is not None:
            area = _column(reference, "area", count, np.float64, f"{where}, reference")
            wrong = area[~np.isfinite(area) | (area < 0)]
            if wrong.size:
                raise ValueError(f"{where}, reference: area must be finite and at least 0, got {wrong[0]}")

        sizes = {mask.image_size for mask in (*detections, *references)}
        if len(sizes) > 1:
            raise ValueError(f"{where}: masks must all have one (height, width), got {sorted(sizes)}")
        iou = self._ious(detections, references, crowd, labels[:, None] == actual_labels)  # (D, G)
        ignorable = crowd | _outside_ranges(area)  # (A, G)
        matched, ignored = _match(iou, ignorable, crowd)
        ignored |= ~matched & _outside_ranges(mask_areas(detections))[:, None, :]
        self.records.append(ImageMatches(labels, scores, _pack(matched), _pack(ignored), actual_labels, ~ignorable))

    def _ious(
        self, detections: list[CroppedMask], references: list[CroppedMask], crowd: np.ndarray, wanted: np.ndarray
    ) -> np.ndarray:
        """The IoU (D, G) that decides matches; 0 for pairs that are not wanted."""
        iou = pairwise_ious(detections, references, crowd, wanted)
        if self.iou_type == "boundary" and iou.any():
            width = boundary_width(detections[0].image_size, self.dilation_ratio)
            first, second = ([_boundary(mask, width) for mask in masks] for masks in (detections, references))
            # where the masks are apart their boundaries are too
            boundary_iou = pairwise_ious(first, second, crowd, wanted & (iou > 0) & ~crowd)
            iou = np.where(crowd, iou, np.minimum(iou, boundary_iou))
        return iou

    def _labels(self, entry: Any, where: str) -> np.ndarray:
        labels = read_array(field(entry, "labels", where), f"{where}: labels").reshape(-1)
        if labels.size and labels.dtype.kind not in "iu":
            raise ValueError(f"{where}: labels must be integers, got {labels.dtype}")
        labels = labels.astype(np.int64)
        check_labels(labels, self.num_labels, where)
        return labels


def _ranked(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Indices of the detections that count, by rising label and falling score; equal scores keep their order."""
    order = np.lexsort((-scores, labels))
    ordered = labels[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)  # within the label
    return order[rank < MAX_DETECTIONS]


def _match(iou: np.ndarray, ignorable: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """COCO's greedy matching, for all area ranges and thresholds at once.

    A detection takes the free reference of highest IoU at or above the threshold (the later one of equals), and one
    that may be ignored only when no other fits. A crowd reference stays free.

    Args:
        iou: (D, G); detections that compete for a reference stand by falling score.
        ignorable: (A, G) bool.
        crowd: (G,) bool.

    Returns:
        (A, T, D) bool each: the detection is matched; it is matched to an ignorable reference.
    """
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)  # (T,)
    matched = np.zeros((len(ignorable), len(thresholds), len(iou)), dtype=bool)
    ignored = np.zeros_like(matched)
    possible = iou >= thresholds[0]  # (D, G)
    if not possible.any():
        return matched, ignored
    contested = ~crowd & (possible.sum(axis=0) > 1)  # (G,)
    choices = possible.sum(axis=1)  # (D,)
    # Nobody competes for the only reference of these: no order to keep.
    alone = np.nonzero((choices == 1) & ~(possible & contested).any(axis=1))[0]
    only = possible[alone].argmax(axis=1)
    matched[:, :, alone] = iou[alone, only] >= thresholds[:, None]
    ignored[:, :, alone] = matched[:, :, alone] & ignorable[:, None, only]
    choices[alone] = 0
    _match_in_turn(np.nonzero(choices)[0], iou, ignorable, crowd, matched, ignored)
    return matched, ignored


def _match_in_turn(
    turns: np.ndarray,
    iou: np.ndarray,
    ignorable: np.ndarray,
    crowd: np.ndarray,
    matched: np.ndarray,
    ignored: np.ndarray,
) -> None:
    """Writes the verdicts of the detections `turns` into `matched` and `ignored` (A, T, D), one after the other."""
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)  # (T,)
    free = np.ones((*matched.shape[:2], iou.shape[1]), dtype=bool)  # (A, T, G)
    grid = np.ogrid[: matched.shape[0], : matched.shape[1]]
    for index in turns.tolist():
        candidates = np.nonzero(iou[index] >= thresholds[0])[0]
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


def _class_precision(matched: np.ndarray, ignored: np.ndarray, num_references: np.ndarray) -> np.ndarray:
    """Average precision (A, T) of one class: precision at each recall point, averaged; -1 without references.

    Args:
        matched: (A, T, D) bool, detections by falling score.
        ignored: (A, T, D) bool.
        num_references: (A,) references that must be found.
    """
    average = np.full(matched.shape[:2], -1.0)
    true_positives = np.cumsum(matched & ~ignored, axis=2, dtype=np.float64)
    false_positives = np.cumsum(~matched & ~ignored, axis=2, dtype=np.float64)
    precision = true_positives / (true_positives + false_positives + np.spacing(1))
    envelope = np.maximum.accumulate(precision[:, :, ::-1], axis=2)[:, :, ::-1]  # best at this recall or higher
    for area in np.nonzero(num_references)[0]:
        recall = true_positives[area] / num_references[area]  # (T, D)
        for threshold, curve in enumerate(envelope[area]):
            position = np.searchsorted(recall[threshold], RECALL_POINTS, side="left")
            reached = position[position < len(curve)]  # a recall never reached has precision 0
            average[area, threshold] = curve[reached].sum() / len(RECALL_POINTS)
    return average


def _pack(verdicts: np.ndarray) -> np.ndarray:
    """(A, T, D) bool as (bytes, D) uint8."""
    return np.packbits(verdicts.reshape(verdicts.shape[0] * verdicts.shape[1], verdicts.shape[2]), axis=0)


def _unpack(packed: np.ndarray) -> np.ndarray:
    """(A, T, D) bool of (bytes, D) uint8."""
    shape = (len(AREA_NAMES), len(IOU_THRESHOLDS))
    bits = np.unpackbits(packed, axis=0, count=shape[0] * shape[1])  # (A * T, D)
    return bits.view(bool).reshape(*shape, packed.shape[1])


def _outside_ranges(area: np.ndarray) -> np.ndarray:
    """(A, N) bool: the area is not in the range, ends included."""
    return (area[None, :] < AREA_LOW[:, None]) | (area[None, :] > AREA_HIGH[:, None])


def _mean_known(values: np.ndarray) -> float:
    """Mean of the values that are not -1; -1 where there is none."""
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _column(entry: Any, key: str, count: int, dtype: type, where: str) -> np.ndarray:
    column = read_array(field(entry, key, where), f"{where}: {key}").reshape(-1)
    if column.dtype.kind not in "buif":
        raise ValueError(f"{where}: {key} must be numbers, got {column.dtype}")
    if len(column) != count:
        raise ValueError(f"{where}: {key} must have one value per label ({count}), got {len(column)}")
    return column.astype(dtype)


def _cropped_masks(entry: Any, count: int, indices: np.ndarray, where: str) -> list[CroppedMask]:
    """The chosen of the `count` masks of a stack or a list of RLE, one full mask in memory at a time."""
    masks = field(entry, "masks", where)
    found = count_entries(masks, f"{where}: masks")
    if found != count:
        raise ValueError(f"{where}: masks must have one mask per label ({count}), got {found}")
    if count and all(isinstance(mask, dict) for mask in masks):
        try:
            return crop_rles(masks, indices.tolist())
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    chosen = []
    for index in indices.tolist():
        dense = read_array(masks[index], f"{where}: mask {index}")
        if dense.ndim != 2:
            raise ValueError(f"{where}: masks must be (N, H, W) or a list of RLE, got one of shape {dense.shape}")
        try:
            chosen.append(crop_mask(dense))
        except ValueError as error:
            raise ValueError(f"{where}, mask {index}: {error}") from error
    return chosen


def _boundary(mask: CroppedMask, width: int) -> CroppedMask:
    """The boundary of a mask, in the box of the mask."""
    pixels = mask_boundary(mask.pixels, width)
    return mask._replace(pixels=pixels, area=int(np.count_nonzero(pixels)))
