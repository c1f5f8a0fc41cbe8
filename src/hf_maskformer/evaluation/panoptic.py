"""Panoptic quality: "Panoptic Segmentation", Kirillov et al., CVPR 2019; matched as in COCO's evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_maskformer.evaluation.boundary import DILATION_RATIO, boundary_width, segment_boundary_iou
from hf_maskformer.evaluation.map_pairs import count_pairs, id_positions, map_pairs
from hf_maskformer.evaluation.metric import (
    Metric,
    check_dilation_ratio,
    check_labels,
    check_num_labels,
    check_same_shape,
    count_entries,
    field,
    read_array,
    whole_numbers,
)

MATCH_IOU = 0.5  # paper, section 4.1: above it a match is unique
MAX_VOID_FRACTION = 0.5  # an unmatched prediction that lies on more void and crowd than this is not counted


class PanopticMap(NamedTuple):
    """One checked entry of `update`."""

    segmentation: np.ndarray  # (H, W) ids
    ids: np.ndarray  # (N,) int64
    labels: np.ndarray  # (N,) int64
    crowd: np.ndarray  # (N,) bool


class PanopticQuality(Metric):
    """PQ, its parts SQ (how well matched segments fit) and RQ (how many match), over things and stuff.

    An entry of `update` is `{"segmentation": (H, W) ids, "segments_info": [{"id", "label_id" or "category_id",
    "iscrowd"}]}`. A pixel whose id is not in segments_info is void, in prediction and reference. The reference's
    "iscrowd" defaults to 0; a prediction's is not read. Areas are counted from the ids.

    As in the COCO evaluation: void in the reference does not count against the IoU of a prediction; crowd segments
    are never matched; an unmatched prediction is dropped when more than half of it lies on void or on the crowd
    segment of its class (where a class has several crowd segments in one image, on the last listed).

    With `boundary` it is Boundary PQ ("Boundary IoU", Cheng et al., CVPR 2021): segments match by the smaller of mask
    IoU and boundary IoU, and that is what is summed. What is dropped is still decided by whole segments.

    Args:
        thing_label_ids: the classes whose segments are instances; all others are stuff.
        num_labels: number of classes K; labels are 0..K - 1.
        boundary: measure Boundary PQ.
        dilation_ratio: with `boundary`, the boundary's width as a share of the image's diagonal.
    """

    description = "Panoptic quality: PQ, SQ and RQ, for things, stuff and each class."
    settings = ("thing_label_ids", "num_labels", "boundary", "dilation_ratio")

    def __init__(
        self,
        thing_label_ids: Sequence[int],
        num_labels: int,
        boundary: bool = False,
        dilation_ratio: float = DILATION_RATIO,
    ) -> None:
        check_num_labels(num_labels)
        check_dilation_ratio(dilation_ratio)
        count_entries(thing_label_ids, "thing_label_ids")
        things = whole_numbers(thing_label_ids, "thing_label_ids")
        check_labels(things, num_labels, "thing_label_ids")
        self.thing_label_ids = tuple(np.unique(things).tolist())
        self.num_labels = num_labels
        self.boundary = boundary
        self.dilation_ratio = dilation_ratio
        super().__init__()

    def compute(self) -> dict[str, Any]:
        """All qualities as fractions 0..1 (a published PQ of 52.7 is 0.527 here).

        Returns:
            `pq`, `sq`, `rq`: means over the classes seen; `pq_things`, `pq_stuff`: the same within things and stuff;
            nan where no such class was seen. `per_category`: list indexed by class id of `{"pq", "sq", "rq",
            "true_positives", "false_positives", "false_negatives"}`; a class never seen has 0 everywhere and is in no
            mean.
        """
        matched, wrong = self.true_positives, (self.false_positives + self.false_negatives) / 2
        seen = (matched + wrong) > 0  # (K,)
        sq = self.iou_sum / np.maximum(matched, 1)
        rq = matched / np.where(seen, matched + wrong, 1)
        pq = self.iou_sum / np.where(seen, matched + wrong, 1)
        things = np.isin(np.arange(self.num_labels), self.thing_label_ids)
        return {
            "pq": _mean(pq[seen]),
            "sq": _mean(sq[seen]),
            "rq": _mean(rq[seen]),
            "pq_things": _mean(pq[seen & things]),
            "pq_stuff": _mean(pq[seen & ~things]),
            "per_category": [
                {
                    "pq": float(pq[label]),
                    "sq": float(sq[label]),
                    "rq": float(rq[label]),
                    "true_positives": int(self.true_positives[label]),
                    "false_positives": int(self.false_positives[label]),
                    "false_negatives": int(self.false_negatives[label]),
                }
                for label in range(self.num_labels)
            ],
        }

    def _reset_state(self) -> None:
        self.iou_sum = np.zeros(self.num_labels)
        self.true_positives = np.zeros(self.num_labels, dtype=np.int64)
        self.false_positives = np.zeros(self.num_labels, dtype=np.int64)
        self.false_negatives = np.zeros(self.num_labels, dtype=np.int64)

    def _merge_state(self, other: "PanopticQuality") -> None:
        self.iou_sum += other.iou_sum
        self.true_positives += other.true_positives
        self.false_positives += other.false_positives
        self.false_negatives += other.false_negatives

    def _add_image(self, prediction: Any, reference: Any, where: str) -> None:
        predicted = self._read(prediction, f"{where}, prediction")
        actual = self._read(reference, f"{where}, reference")
        check_same_shape(predicted.segmentation, actual.segmentation, where)
        overlap, iou = self._overlap(actual, predicted)  # (N + 1, M + 1), (N, M); index 0 of overlap = void
        predicted_area = overlap.sum(axis=0)[1:]  # (M,)
        if not predicted_area.all():
            segment = predicted.ids[np.argmin(predicted_area)]
            raise ValueError(f"{where}, prediction: segment id {segment} of segments_info has no pixel")

        actual_labels, predicted_labels, crowd = actual.labels, predicted.labels, actual.crowd
        candidates = (actual_labels[:, None] == predicted_labels[None, :]) & ~crowd[:, None]
        matches = candidates & (iou > MATCH_IOU)  # at most one per row and column
        missed = ~crowd & ~matches.any(axis=1)  # (N,)
        spurious = ~matches.any(axis=0)  # (M,)
        excused = overlap[0, 1:] + self._overlap_with_crowd(overlap[1:, 1:], actual_labels, predicted_labels, crowd)
        spurious &= ~(excused / np.maximum(predicted_area, 1) > MAX_VOID_FRACTION)

        match_rows = np.nonzero(matches)[0]
        np.add.at(self.iou_sum, actual_labels[match_rows], iou[matches])
        np.add.at(self.true_positives, actual_labels[match_rows], 1)
        np.add.at(self.false_negatives, actual_labels[missed], 1)
        np.add.at(self.false_positives, predicted_labels[spurious], 1)

    def _overlap(self, actual: PanopticMap, predicted: PanopticMap) -> tuple[np.ndarray, np.ndarray]:
        """Common pixels (N + 1, M + 1) of the segments, index 0 = void, and the IoU (N, M) that decides the match."""
        pairs = map_pairs(actual.segmentation, predicted.segmentation)
        rows, columns = id_positions(pairs.first, actual.ids), id_positions(pairs.second, predicted.ids)  # (R,), (R,)
        num_actual, num_predicted = len(actual.ids), len(predicted.ids)
        overlap = count_pairs(rows, columns, pairs.lengths, (num_actual + 1, num_predicted + 1))
        iou = _segment_iou(overlap)
        if self.boundary:
            size = (actual.segmentation.shape[0], actual.segmentation.shape[1])
            repeats = 1 if pairs.lengths is None else pairs.lengths
            numbers = np.repeat(rows, repeats).reshape(size)  # (H, W) segment of each pixel, 0 = void
            predicted_numbers = np.repeat(columns, repeats).reshape(size)
            width = boundary_width(size, self.dilation_ratio)
            boundary_iou = segment_boundary_iou(numbers, predicted_numbers, num_actual, num_predicted, width)
            iou = np.minimum(iou, boundary_iou)
        return overlap, iou

    def _overlap_with_crowd(
        self, overlap: np.ndarray, actual_labels: np.ndarray, predicted_labels: np.ndarray, crowd: np.ndarray
    ) -> np.ndarray:
        """Pixels of each prediction (M,) on the last crowd segment of its class."""
        crowd_row = np.full(self.num_labels, -1)
        crowd_row[actual_labels[crowd]] = np.nonzero(crowd)[0]  # the last of equal labels stays
        row = crowd_row[predicted_labels]  # (M,)
        has_crowd = row >= 0
        pixels = np.zeros(len(predicted_labels), dtype=np.int64)
        pixels[has_crowd] = overlap[row[has_crowd], np.nonzero(has_crowd)[0]]
        return pixels

    def _read(self, entry: Any, where: str) -> PanopticMap:
        segmentation = read_array(field(entry, "segmentation", where), f"{where}: segmentation")
        if segmentation.ndim != 2 or segmentation.dtype.kind not in "iu":
            raise ValueError(
                f"{where}: segmentation must be (H, W) integer ids, got {segmentation.dtype} {segmentation.shape}"
            )
        infos = field(entry, "segments_info", where)
        count_entries(infos, f"{where}: segments_info")
        listed = f"{where}, segments_info"
        ids = whole_numbers([field(info, "id", listed) for info in infos], f"{listed}: id")
        labels = whole_numbers([_label_of(info, where) for info in infos], f"{listed}: label")
        crowd = np.array([bool(info.get("iscrowd", 0)) for info in infos], dtype=bool)
        check_labels(labels, self.num_labels, listed)
        ordered = np.sort(ids)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if repeated.size:
            raise ValueError(f"{where}: segment id {int(repeated[0])} appears more than once in segments_info")
        return PanopticMap(segmentation, ids, labels, crowd)


def _label_of(info: Mapping[str, Any], where: str) -> Any:
    for key in ("label_id", "category_id"):
        if key in info:
            return info[key]
    raise ValueError(f"{where}: segment {info.get('id')} has neither label_id nor category_id, only {list(info)}")


def _segment_iou(overlap: np.ndarray) -> np.ndarray:
    """IoU (N, M) of segments from their overlap table (N + 1, M + 1); void of the reference is in no union."""
    inner = overlap[1:, 1:]
    actual_area = overlap[1:].sum(axis=1)[:, None]
    predicted_area = (overlap[1:, 1:].sum(axis=0))[None, :]  # without what lies on void
    union = actual_area + predicted_area - inner
    return inner / np.maximum(union, 1)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
