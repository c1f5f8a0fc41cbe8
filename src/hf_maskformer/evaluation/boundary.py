"""Boundaries of masks and their overlap: "Boundary IoU", Cheng et al., CVPR 2021; same definition as boundary-iou-api.

The boundary of a mask of width d are its pixels that lie within d pixels (chessboard distance) of a pixel outside the
mask or outside the image. d is a share of the image's diagonal, so that the measure does not depend on resolution.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from hf_maskformer.evaluation.metric import (
    Metric,
    check_counted_labels,
    check_dilation_ratio,
    check_num_labels,
    check_outside_classes,
    check_same_shape,
    mean_of_known,
    ratio_or_nan,
    read_array,
    semantic_map,
    set_pixels,
)

DILATION_RATIO = 0.02  # boundary width as a share of the diagonal: paper, section 5


def boundary_width(size: tuple[int, int], dilation_ratio: float = DILATION_RATIO) -> int:
    """Boundary width in pixels, at least 1, of an image of (height, width)."""
    height, width = size
    return max(1, round(dilation_ratio * math.sqrt(height**2 + width**2)))


def mask_boundary(mask: np.ndarray, width: int) -> np.ndarray:
    """Boundary (H, W) bool of a mask (H, W) bool. What lies outside the array is background.

    A mask cut out along its box therefore has the same boundary as in its image, given the image's width.
    """
    boundary = np.zeros(mask.shape, dtype=bool)
    rows = np.flatnonzero(mask.any(axis=1))
    if not rows.size:
        return boundary
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    left, right = int(columns[0]), int(columns[-1]) + 1
    pixels = mask[top:bottom, left:right]
    boundary[top:bottom, left:right] = pixels
    length = 2 * width + 1
    interior = _running(np.logical_and, _running(np.logical_and, pixels, length).T, length).T  # (h - 2d, w - 2d)
    if interior.size:
        boundary[top + width : bottom - width, left + width : right - width] &= ~interior
    return boundary


def id_map_boundary(ids: np.ndarray, width: int) -> np.ndarray:
    """Boundaries (H, W) bool of all segments of an id map (H, W): the union of `mask_boundary` of each id.

    Every id is a segment here, void too: the caller leaves its pixels out.
    """
    boundary = np.ones(ids.shape, dtype=bool)
    length = 2 * width + 1
    if min(ids.shape) < length:
        return boundary
    same_as_right = ids[:, 1:] == ids[:, :-1]  # (H, W - 1)
    same_as_below = ids[1:] == ids[:-1]  # (H - 1, W)
    # a window holds one id when each of its rows does and its middle column does
    rows = _running(np.logical_and, same_as_right.T, length - 1).T  # (H, W - 2d)
    columns = _running(np.logical_and, same_as_below[:, width:-width], length - 1)  # (H - 2d, W - 2d)
    boundary[width:-width, width:-width] = ~(_running(np.logical_and, rows, length) & columns)
    return boundary


def boundary_iou(mask: Any, other: Any, dilation_ratio: float = DILATION_RATIO) -> float:
    """Boundary IoU of two masks (H, W): the paper's measure. nan when both are empty.

    Boundary AP and Boundary PQ take the smaller of it and the mask IoU, as a thin boundary alone can mislead. Masks
    are bool or integers, every non-zero pixel counting as set, or 0.0 and 1.0; anything else is a ValueError.
    """
    first, second = _binary_mask(mask, "mask"), _binary_mask(other, "other")
    if first.shape != second.shape:
        raise ValueError(f"mask has shape {first.shape} but other {second.shape}")
    width = boundary_width((first.shape[0], first.shape[1]), dilation_ratio)
    one, two = mask_boundary(first, width), mask_boundary(second, width)
    union = np.count_nonzero(one | two)
    return np.count_nonzero(one & two) / union if union else float("nan")


def segment_boundary_iou(
    actual: np.ndarray, predicted: np.ndarray, num_actual: int, num_predicted: int, width: int
) -> np.ndarray:
    """Boundary IoU (N, M) float64 of all segments of two maps (H, W), as Boundary PQ has it.

    Args:
        actual: numbers 1..N of the reference's segments, 0 = void. Its void is in no union.
        predicted: numbers 1..M of the predicted segments, 0 = void.
        num_actual: N.
        num_predicted: M.
        width: boundary width in pixels.
    """
    actual_boundary = id_map_boundary(actual, width) & (actual > 0)
    predicted_boundary = id_map_boundary(predicted, width) & (predicted > 0)
    both = actual_boundary & predicted_boundary
    columns = num_predicted + 1
    cells = np.bincount(actual[both] * columns + predicted[both], minlength=(num_actual + 1) * columns)
    overlap = cells.reshape(num_actual + 1, columns)[1:, 1:]  # (N, M)
    actual_area = np.bincount(actual[actual_boundary], minlength=num_actual + 1)[1:, None]  # (N, 1)
    counted = predicted_boundary & (actual > 0)
    predicted_area = np.bincount(predicted[counted], minlength=columns)[None, 1:]  # (1, M)
    return overlap / np.maximum(actual_area + predicted_area - overlap, 1)


class BoundaryIoU(Metric):
    """Boundary IoU of semantic maps, per class and averaged over the classes.

    The paper defines the measure for a pair of masks (`boundary_iou`); for semantic maps boundary-iou-api has none. As
    mean IoU does, this metric adds up the intersections and the unions of each class's boundaries over all images and
    divides once: a class that is a few pixels in one image does not weigh as much as one that fills another.

    `update` takes maps (H, W) of class ids 0..num_labels - 1, arrays or tensors. Void, the pixels whose reference is
    `ignore_index`, is skipped in both maps: nothing is counted there, whatever is predicted there, and a class makes
    no boundary towards void, only towards pixels of another class (also across a strip of void) and the image's
    border. Every other value outside the classes is a ValueError.

    Args:
        num_labels: number of classes K.
        ignore_index: reference value of pixels that are not counted.
        dilation_ratio: boundary width as a share of the image's diagonal.
    """

    description = "Boundary intersection over union of semantic segmentation maps."
    settings = ("num_labels", "ignore_index", "dilation_ratio")

    def __init__(self, num_labels: int, ignore_index: int = 255, dilation_ratio: float = DILATION_RATIO) -> None:
        check_num_labels(num_labels)
        check_outside_classes(ignore_index, num_labels, "ignore_index")
        check_dilation_ratio(dilation_ratio)
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.dilation_ratio = dilation_ratio
        super().__init__()

    def compute(self) -> dict[str, Any]:
        """Fractions 0..1.

        Returns:
            `boundary_iou` (mean over the classes) and `per_category_boundary_iou` (list indexed by class id). A class
            that is neither in references nor in predictions is nan and in no mean.
        """
        iou = ratio_or_nan(self.intersection, self.union)  # (K,)
        return {
            "boundary_iou": mean_of_known(iou),
            "per_category_boundary_iou": iou.tolist(),
        }

    def _reset_state(self) -> None:
        self.intersection = np.zeros(self.num_labels, dtype=np.int64)
        self.union = np.zeros(self.num_labels, dtype=np.int64)

    def _merge_state(self, other: "BoundaryIoU") -> None:
        self.intersection += other.intersection
        self.union += other.union

    def _add_image(self, prediction: Any, reference: Any, where: str) -> None:
        predicted = semantic_map(prediction, f"{where}, prediction")
        actual = semantic_map(reference, f"{where}, reference")
        check_same_shape(predicted, actual, where)
        counted = actual != self.ignore_index  # (H, W)
        outside = f"{where}, reference (ignore_index {self.ignore_index} apart)"
        for labels, name in ((actual, outside), (predicted, f"{where}, prediction")):
            check_counted_labels(labels, counted, self.num_labels, name)
        width = boundary_width((actual.shape[0], actual.shape[1]), self.dilation_ratio)
        actual_boundary = _class_boundary(actual, counted, self.num_labels, width)
        predicted_boundary = _class_boundary(predicted, counted, self.num_labels, width)
        common = actual_boundary & predicted_boundary & (actual == predicted)
        intersection = self._pixels_per_class(actual, common)  # (K,)
        self.intersection += intersection
        self.union += self._pixels_per_class(actual, actual_boundary) - intersection
        self.union += self._pixels_per_class(predicted, predicted_boundary)

    def _pixels_per_class(self, labels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """(K,) int64."""
        return np.bincount(labels[chosen].astype(np.int64), minlength=self.num_labels)


def _class_boundary(labels: np.ndarray, counted: np.ndarray, num_labels: int, width: int) -> np.ndarray:
    """Boundaries (H, W) bool of all classes of a map; pixels that are not counted are skipped."""
    if counted.all():
        return id_map_boundary(labels, width)
    boundary = counted.copy()
    length = 2 * width + 1
    # Classes are 1..K here, so that a pixel that is skipped can be below or above all of them; small numbers are fast.
    small = np.min_scalar_type(num_labels + 1)
    highest = (labels.astype(small) + 1) * counted
    lowest = np.where(counted, highest, small.type(num_labels + 1))
    lowest = _running(np.minimum, _running(np.minimum, lowest, length).T, length).T  # (H - 2d, W - 2d)
    highest = _running(np.maximum, _running(np.maximum, highest, length).T, length).T
    if lowest.size:
        boundary[width:-width, width:-width] &= lowest != highest
    return boundary


def _running(combine: Callable[[np.ndarray, np.ndarray], np.ndarray], values: np.ndarray, length: int) -> np.ndarray:
    """Each `length` neighbouring rows of (H, W) combined into one: (H - length + 1, W), or (0, W) if there are none.

    The span combined so far is doubled in each step, so a wide window costs hardly more than a narrow one.
    """
    if len(values) < length:
        return values[:0]
    span = 1
    while span < length:
        step = min(span, length - span)
        values = combine(values[step:], values[:-step])
        span += step
    return values


def _binary_mask(value: Any, name: str) -> np.ndarray:
    array = read_array(value, name)
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape (H, W), got {array.shape}")
    try:
        return set_pixels(array)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
