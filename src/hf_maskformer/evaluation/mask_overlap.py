"""Pairwise overlaps of binary masks, each kept as its bounding box only: many masks of a large image stay cheap."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class CroppedMask(NamedTuple):
    """A binary mask without its empty margin."""

    pixels: np.ndarray  # (h, w) bool; (0, 0) for an empty mask
    top: int
    left: int
    area: int  # pixels that are set
    image_size: tuple[int, int]  # (H, W) of the uncropped mask


def crop_mask(mask: np.ndarray) -> CroppedMask:
    """The box of a mask (H, W) bool, copied, so that the full mask can be freed."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not rows.size:
        return CroppedMask(np.zeros((0, 0), dtype=bool), 0, 0, 0, mask.shape)
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    left, right = int(columns[0]), int(columns[-1]) + 1
    pixels = mask[top:bottom, left:right].copy()
    return CroppedMask(pixels, top, left, int(np.count_nonzero(pixels)), mask.shape)


def pairwise_intersections(first: Sequence[CroppedMask], second: Sequence[CroppedMask]) -> np.ndarray:
    """Common pixels (N, M) float64 of N and M masks of one image. Only pairs whose boxes meet are looked at."""
    first_boxes, second_boxes = _boxes(first), _boxes(second)  # (N, 4), (M, 4)
    start = np.maximum(first_boxes[:, None, :2], second_boxes[None, :, :2])  # (N, M, 2)
    end = np.minimum(first_boxes[:, None, 2:], second_boxes[None, :, 2:])  # (N, M, 2)
    result = np.zeros((len(first), len(second)))
    for row, column in np.argwhere((start < end).all(axis=2)).tolist():
        top, left = start[row, column].tolist()
        bottom, right = end[row, column].tolist()
        one, other = first[row], second[column]
        one_part = one.pixels[top - one.top : bottom - one.top, left - one.left : right - one.left]
        other_part = other.pixels[top - other.top : bottom - other.top, left - other.left : right - other.left]
        result[row, column] = np.count_nonzero(one_part & other_part)
    return result


def pairwise_ious(
    detections: Sequence[CroppedMask], references: Sequence[CroppedMask], iscrowd: np.ndarray
) -> np.ndarray:
    """IoU (D, G) of masks; against a crowd reference the share of the detection that lies on it, as COCO does.

    Args:
        detections: D masks.
        references: G masks of the same image.
        iscrowd: (G,) bool.
    """
    overlap = pairwise_intersections(detections, references)  # (D, G)
    detection_area = mask_areas(detections)[:, None]
    union = np.where(iscrowd[None, :], detection_area, detection_area + mask_areas(references)[None, :] - overlap)
    return overlap / np.maximum(union, 1)


def mask_areas(masks: Sequence[CroppedMask]) -> np.ndarray:
    """Set pixels (N,) float64."""
    return np.array([mask.area for mask in masks], dtype=np.float64)


def _boxes(masks: Sequence[CroppedMask]) -> np.ndarray:
    """(N, 4) int64: top, left, bottom, right, ends exclusive."""
    boxes = [
        (mask.top, mask.left, mask.top + mask.pixels.shape[0], mask.left + mask.pixels.shape[1]) for mask in masks
    ]
    return np.array(boxes, dtype=np.int64).reshape(len(masks), 4)
