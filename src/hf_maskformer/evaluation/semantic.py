"""Mean intersection over union of semantic maps, from one confusion matrix (same figures as `evaluate`'s mean_iou)."""

from typing import Any

import numpy as np

from hf_maskformer.evaluation.map_pairs import count_pairs, map_pairs
from hf_maskformer.evaluation.metric import (
    Metric,
    check_labels,
    check_num_labels,
    check_outside_classes,
    check_same_shape,
    mean_of_known,
    ratio_or_nan,
    semantic_map,
)


class MeanIoU(Metric):
    """Mean IoU and accuracies of semantic maps.

    `update` takes maps (H, W) of class ids 0..num_labels - 1, arrays or tensors. Pixels whose reference is
    `ignore_index` are not counted, whatever is predicted there. Every other predicted or reference value outside the
    classes is a ValueError: nothing is dropped silently.

    Args:
        num_labels: number of classes K.
        ignore_index: reference value of pixels that are not counted.
        void_index: prediction value that means "no class here" (a panoptic result has such pixels): a miss for the
            pixel's class, a false positive for none. None: no such value is allowed.
    """

    description = "Mean intersection over union of semantic segmentation maps."
    settings = ("num_labels", "ignore_index", "void_index")

    def __init__(self, num_labels: int, ignore_index: int = 255, void_index: int | None = None) -> None:
        check_num_labels(num_labels)
        check_outside_classes(ignore_index, num_labels, "ignore_index")
        if void_index is not None:
            check_outside_classes(void_index, num_labels, "void_index")
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.void_index = void_index
        super().__init__()

    def compute(self) -> dict[str, Any]:
        """Fractions 0..1; nan where nothing was counted.

        Returns:
            `mean_iou`, `overall_accuracy`, `mean_accuracy` (floats) and `per_category_iou`, `per_category_accuracy`
            (lists indexed by class id). A class that is neither in references nor in predictions has IoU nan, one
            that is not in references accuracy nan; the means leave nan out.
        """
        correct = np.diagonal(self.confusion).astype(np.float64)  # (K,)
        in_reference = self.confusion.sum(axis=1)  # (K,)
        in_prediction = self.confusion[:, : self.num_labels].sum(axis=0)  # (K,)
        iou = ratio_or_nan(correct, in_reference + in_prediction - correct)
        accuracy = ratio_or_nan(correct, in_reference)
        return {
            "mean_iou": mean_of_known(iou),
            "overall_accuracy": float(ratio_or_nan(correct.sum(keepdims=True), in_reference.sum(keepdims=True))[0]),
            "mean_accuracy": mean_of_known(accuracy),
            "per_category_iou": iou.tolist(),
            "per_category_accuracy": accuracy.tolist(),
        }

    def _reset_state(self) -> None:
        # row: class of the reference; column: predicted class, the last one for "no class here"
        self.confusion = np.zeros((self.num_labels, self.num_labels + 1), dtype=np.int64)

    def _merge_state(self, other: "MeanIoU") -> None:
        self.confusion += other.confusion

    def _add_image(self, prediction: Any, reference: Any, where: str) -> None:
        predicted = semantic_map(prediction, f"{where}, prediction")
        actual = semantic_map(reference, f"{where}, reference")
        check_same_shape(predicted, actual, where)
        labels, given, lengths = map_pairs(actual, predicted)  # (R,), (R,), (R,) or None
        counted = labels != self.ignore_index  # (R,)
        if not counted.all():
            labels, given = labels[counted], given[counted]
            lengths = None if lengths is None else lengths[counted]
        check_labels(labels, self.num_labels, f"{where}, reference (ignore_index {self.ignore_index} apart)")
        if self.void_index is not None:
            given = np.where(given == self.void_index, self.num_labels, given.astype(np.int64, copy=False))
        check_labels(given, self.num_labels + (self.void_index is not None), f"{where}, prediction")
        self.confusion += count_pairs(labels, given, lengths, self.confusion.shape)  # (K, K + 1)
