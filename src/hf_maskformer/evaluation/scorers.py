"""From a model's outputs to the metrics of a task: post-processes one batch and compares it with its data rows.

A scorer keeps counts and match records, never masks; scorers of parts of a data set are merged.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from hf_maskformer.data.segment_masks import SegmentMasks
from hf_maskformer.data.segmentation_data import instance_reference, panoptic_reference, semantic_reference
from hf_maskformer.evaluation.boundary import BoundaryIoU
from hf_maskformer.evaluation.details import Confusion, ImageResult, class_segments
from hf_maskformer.evaluation.instance import MaskAveragePrecision
from hf_maskformer.evaluation.metric import Metric
from hf_maskformer.evaluation.panoptic import PanopticQuality
from hf_maskformer.evaluation.semantic import MeanIoU
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.postprocess import instance_candidates, instance_segments, logits_per_image
from hf_maskformer.visualize import fill_segments

# AP ranks all detections by score; a score threshold would only cut off the tail of its curve.
AP_SCORE_THRESHOLD = 0.0
NO_CLASS = -1  # class of the pixels that no segment holds
AP_SUMMARY = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
PQ_SUMMARY = ("pq", "sq", "rq", "pq_things", "pq_stuff")
OBJECT_IOU = 0.5  # from here on a detection counts as found, whatever its class
MAX_CROWD_FRACTION = 0.5  # a detection of which more lies on crowds is neither right nor wrong

Sizes = Sequence[tuple[int, int]]
Row = dict[str, Any]


class Scorer(Protocol):
    """Compares predictions of one task with the rows of their images.

    `add` returns a result for each image if the scorer was made with `details`, else nothing.
    """

    score_name: str

    def add(self, processor: Any, outputs: Any, sizes: Sizes, rows: Sequence[Row]) -> list[ImageResult]: ...

    def merge(self, other: Any) -> None: ...

    def compute(self) -> dict[str, Any]: ...

    def confusion(self) -> Confusion: ...


class SemanticScorer:
    """Confusion of pixels. An image alone scores the mean IoU of the classes in its truth or prediction."""

    score_name = "mean IoU"

    def __init__(self, label_spec: LabelSpec, boundary: bool = False, details: bool = False) -> None:
        self.label_spec = label_spec
        self.details = details
        self.mean_iou = MeanIoU(label_spec.num_labels, label_spec.ignore_index)
        self.boundary = BoundaryIoU(label_spec.num_labels, label_spec.ignore_index) if boundary else None

    def add(self, processor: Any, outputs: Any, sizes: Sizes, rows: Sequence[Row]) -> list[ImageResult]:
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes=list(sizes))
        maps = [label_map.cpu().numpy() for label_map in maps]
        references = [semantic_reference(row, self.label_spec) for row in rows]
        if self.boundary is not None:
            self.boundary.update(maps, references)
        if not self.details:
            self.mean_iou.update(maps, references)
            return []
        scores = add_one_by_one(self.mean_iou, maps, references, "mean_iou", self._fresh_metric())
        return [
            ImageResult(score, label_map, class_segments(label_map))
            for score, label_map in zip(scores, maps, strict=True)
        ]

    def merge(self, other: "SemanticScorer") -> None:
        _merge((self.mean_iou, self.boundary), (other.mean_iou, other.boundary))

    def compute(self) -> dict[str, Any]:
        return {**self.mean_iou.compute(), **(self.boundary.compute() if self.boundary is not None else {})}

    def confusion(self) -> Confusion:
        names = class_names(self.label_spec)
        return Confusion(self.mean_iou.confusion[:, : len(names)].copy(), names, names, "pixels")

    def _fresh_metric(self) -> MeanIoU:
        return MeanIoU(self.label_spec.num_labels, self.label_spec.ignore_index)


class InstanceScorer:
    """Mask AP of the things. Uses the ranked candidates, not the painted map: its overlap rule is no part of AP.

    The confusion and the score of an image are of the instances that the processor would return, with its thresholds:
    each, best first, takes the free object of highest IoU (at least 0.5) whatever its class. An image scores, as PQ
    does, the sum of the IoU of the objects found with the right class / (their number + half of the wrong and missed
    ones). Crowds need not be found, and an instance that lies mostly on them is not counted.
    """

    score_name = "PQ of objects"

    def __init__(self, label_spec: LabelSpec, boundary: bool = False, details: bool = False) -> None:
        self.label_spec = label_spec
        self.details = details
        self.average_precision = MaskAveragePrecision(label_spec.num_labels)
        self.boundary = MaskAveragePrecision(label_spec.num_labels, iou_type="boundary") if boundary else None
        # row: class of the object, the last one for none; column: class predicted, the last one for none
        self.objects = np.zeros((label_spec.num_labels + 1,) * 2, dtype=np.int64)

    def add(self, processor: Any, outputs: Any, sizes: Sizes, rows: Sequence[Row]) -> list[ImageResult]:
        results = []
        images = logits_per_image(outputs, sizes)
        for row, (class_logits, mask_logits, size, extent) in zip(rows, images, strict=True):
            candidates = instance_candidates(
                class_logits,
                mask_logits,
                target_size=size,
                extent=extent,
                activation=processor.class_activation,
                threshold=AP_SCORE_THRESHOLD,
                mask_threshold=processor.mask_threshold,
                allowed_labels=self.label_spec.thing_label_ids,
            )
            reference = instance_reference(row, self.label_spec)
            for metric in filter(None, (self.average_precision, self.boundary)):
                metric.update([_detections(candidates)], [reference])
            if self.details:
                kept = [candidate for candidate in candidates if candidate["score"] > processor.threshold]
                painted = instance_segments(kept, size, processor.overlap_mask_area_threshold)
                objects, score = match_objects(painted["segments_info"], reference, size, self.label_spec.num_labels)
                self.objects += objects
                results.append(ImageResult(score, painted["segmentation"].numpy(), painted["segments_info"]))
        return results

    def merge(self, other: "InstanceScorer") -> None:
        _merge((self.average_precision, self.boundary), (other.average_precision, other.boundary))
        self.objects += other.objects

    def compute(self) -> dict[str, Any]:
        result = self.average_precision.compute()
        if self.boundary is not None:
            result.update(_boundary_figures(self.boundary.compute(), AP_SUMMARY))
        return result

    def confusion(self) -> Confusion:
        things = list(self.label_spec.thing_label_ids)
        names = [self.label_spec.id2label[label] for label in things]
        chosen = [*things, self.label_spec.num_labels]
        matrix = self.objects[np.ix_(chosen, chosen)]
        return Confusion(matrix, [*names, "background"], [*names, "missed"], "objects")


class PanopticScorer:
    """PQ, and of the same prediction the mean IoU of its class map and the AP of its things.

    Confusion of the pixels of the class map; an image alone scores its PQ.
    """

    score_name = "PQ"

    def __init__(self, label_spec: LabelSpec, boundary: bool = False, details: bool = False) -> None:
        self.label_spec = label_spec
        self.details = details
        self.quality = self._fresh_metric()
        self.boundary = (
            PanopticQuality(label_spec.thing_label_ids, label_spec.num_labels, boundary=True) if boundary else None
        )
        self.mean_iou = MeanIoU(label_spec.num_labels, label_spec.ignore_index, void_index=NO_CLASS)
        self.things = InstanceScorer(label_spec) if label_spec.thing_label_ids else None

    def add(self, processor: Any, outputs: Any, sizes: Sizes, rows: Sequence[Row]) -> list[ImageResult]:
        results = processor.post_process_panoptic_segmentation(outputs, target_sizes=list(sizes))
        predictions = [{**result, "segmentation": result["segmentation"].cpu().numpy()} for result in results]
        references = [panoptic_reference(row) for row in rows]
        self.mean_iou.update(
            [class_map(one["segmentation"], one["segments_info"]) for one in predictions],
            [semantic_reference(row, self.label_spec) for row in rows],
        )
        if self.things is not None:
            self.things.add(processor, outputs, sizes, rows)
        if self.boundary is not None:
            self.boundary.update(predictions, references)
        if not self.details:
            self.quality.update(predictions, references)
            return []
        scores = add_one_by_one(self.quality, predictions, references, "pq", self._fresh_metric())
        return [
            ImageResult(score, prediction["segmentation"], prediction["segments_info"])
            for score, prediction in zip(scores, predictions, strict=True)
        ]

    def merge(self, other: "PanopticScorer") -> None:
        own, given = ((one.quality, one.mean_iou, one.things, one.boundary) for one in (self, other))
        _merge(own, given)

    def compute(self) -> dict[str, Any]:
        result = {**self.quality.compute(), "mean_iou": self.mean_iou.compute()["mean_iou"]}
        if self.things is not None:
            average_precision = self.things.compute()
            result.update({name: average_precision[name] for name in AP_SUMMARY})
            result["map_per_category"] = average_precision["per_category"]
        if self.boundary is not None:
            result.update(_boundary_figures(self.boundary.compute(), PQ_SUMMARY))
        return result

    def confusion(self) -> Confusion:
        names = class_names(self.label_spec)
        return Confusion(self.mean_iou.confusion.copy(), names, [*names, "no segment"], "pixels")

    def _fresh_metric(self) -> PanopticQuality:
        return PanopticQuality(self.label_spec.thing_label_ids, self.label_spec.num_labels)


SCORERS: dict[str, type[SemanticScorer] | type[InstanceScorer] | type[PanopticScorer]] = {
    "semantic": SemanticScorer,
    "instance": InstanceScorer,
    "panoptic": PanopticScorer,
}


def add_one_by_one(
    total: Metric, predictions: Sequence[Any], references: Sequence[Any], key: str, alone: Metric
) -> list[float]:
    """Adds images to `total` and returns what each of them scores alone; `alone` is a metric of the same settings."""
    scores = []
    for prediction, reference in zip(predictions, references, strict=True):
        alone.reset().update([prediction], [reference])
        scores.append(float(alone.compute()[key]))
        total.merge(alone)
    return scores


def match_objects(
    segments: Sequence[dict[str, Any]], reference: dict[str, Any], size: tuple[int, int], num_labels: int
) -> tuple[np.ndarray, float]:
    """Which objects of an image were found, and as what; the rules stand at `InstanceScorer`.

    Args:
        segments: predicted instances, best first: label_id and rle.
        reference: masks (RLE), labels and iscrowd of the objects.
        size: (H, W) of all masks.

    Returns:
        Counts (num_labels + 1, num_labels + 1), rows truth, the last row and column for "none"; and the image's score,
        nan without objects and predictions.
    """
    labels = [segment["label_id"] for segment in segments]
    actual_labels, crowd = reference["labels"], reference["iscrowd"]
    predicted = SegmentMasks.from_rles([segment["rle"] for segment in segments], size)
    actual = SegmentMasks.from_rles(reference["masks"], size)
    overlap = _overlaps(predicted, actual)  # (M, N)
    areas = predicted.areas()
    iou = overlap / np.maximum(areas[:, None] + actual.areas()[None, :] - overlap, 1)
    counts = np.zeros((num_labels + 1, num_labels + 1), dtype=np.int64)
    free = ~crowd
    quality = 0.0
    for index, label in enumerate(labels):
        fitting = np.where(free, iou[index], -1.0)
        best = int(fitting.argmax()) if fitting.size else 0
        if fitting.size and fitting[best] >= OBJECT_IOU:
            free[best] = False
            counts[actual_labels[best], label] += 1
            quality += float(iou[index, best]) if actual_labels[best] == label else 0.0
        elif overlap[index, crowd].sum() <= MAX_CROWD_FRACTION * areas[index]:
            counts[num_labels, label] += 1
    np.add.at(counts, (actual_labels[free], num_labels), 1)
    right = int(np.trace(counts[:num_labels, :num_labels]))
    # halves of all that is there and all that is said = right + half of the wrong and missed
    weight = (counts[:num_labels].sum() + counts[:, :num_labels].sum()) / 2
    assert weight >= right
    return counts, quality / weight if weight else float("nan")


def _overlaps(one: SegmentMasks, other: SegmentMasks) -> np.ndarray:
    """Common pixels (N, M) of the masks of two sets of one image."""
    columns = len(other) + 1
    cells = np.zeros((len(one) + 1) * columns, dtype=np.int64)
    for layer in one.layers:
        rows = layer.astype(np.int64) * columns
        for other_layer in other.layers:
            cells += np.bincount((rows + other_layer).reshape(-1), minlength=cells.size)
    return cells.reshape(-1, columns)[1:, 1:]


def _merge(own: Sequence[Any], given: Sequence[Any]) -> None:
    """Merges metrics or scorers pair by pair; both sides lack the same ones (None)."""
    for one, other in zip(own, given, strict=True):
        if one is not None:
            one.merge(other)


def class_names(label_spec: LabelSpec) -> list[str]:
    return [label_spec.id2label[label] for label in range(label_spec.num_labels)]


def _detections(candidates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Instance candidates as an entry of `MaskAveragePrecision`."""
    return {
        "masks": [candidate["rle"] for candidate in candidates],
        "scores": np.array([candidate["score"] for candidate in candidates], dtype=np.float64),
        "labels": np.array([candidate["label_id"] for candidate in candidates], dtype=np.int64),
    }


def class_map(ids: np.ndarray, segments: Sequence[dict[str, Any]]) -> np.ndarray:
    """(H, W) int64 label ids of a map (H, W) of segment ids; NO_CLASS where no segment is."""
    labels = np.array([segment["label_id"] for segment in segments], dtype=np.int64)
    return fill_segments(ids, [segment["id"] for segment in segments], labels, NO_CLASS)


def _boundary_figures(figures: dict[str, Any], summary: Sequence[str]) -> dict[str, Any]:
    """The same figures under names that begin with `boundary_`, the classes' as `per_category_boundary_...`."""
    result = {f"boundary_{name}": figures[name] for name in summary}
    per_category = figures["per_category"]
    if per_category and isinstance(per_category[0], dict):
        per_category = [
            entry[summary[0]]
            if any(entry[name] for name in ("true_positives", "false_positives", "false_negatives"))
            else float("nan")
            for entry in per_category
        ]
    result[f"per_category_boundary_{summary[0]}"] = per_category
    return result
