"""Pairwise overlaps of binary masks, each kept as its bounding box only: many masks of a large image stay cheap."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_maskformer.evaluation.metric import set_pixels
from hf_maskformer.model.masks import rles_to_runs

WORD = np.dtype(np.uint64)  # eight pixels of a byte mask are looked at in one step


class CroppedMask(NamedTuple):
    """A binary mask without its empty margin."""

    pixels: np.ndarray  # (h, w) bool; (0, 0) for an empty mask
    top: int
    left: int
    area: int  # pixels that are set
    image_size: tuple[int, int]  # (H, W) of the uncropped mask


def crop_mask(mask: np.ndarray) -> CroppedMask:
    """The box of a mask (H, W), copied, so that the full mask can be freed; every non-zero pixel counts as set.

    Raises:
        ValueError: as `set_pixels`: a floating-point mask holds anything but 0 and 1.
    """
    size = (mask.shape[0], mask.shape[1])
    words = _words(mask)
    rows = np.flatnonzero(np.bitwise_or.reduce(words, axis=1))
    if not rows.size:
        return CroppedMask(np.zeros((0, 0), dtype=bool), 0, 0, 0, size)
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(np.bitwise_or.reduce(words[top:bottom], axis=0).view(np.uint8))
    left, right = int(columns[0]), int(columns[-1]) + 1
    pixels = set_pixels(mask[top:bottom, left:right])  # a copy, row by row
    return CroppedMask(pixels, top, left, int(np.count_nonzero(pixels)), size)


def crop_rles(rles: Sequence[dict[str, Any]], indices: Sequence[int] | None = None) -> list[CroppedMask]:
    """The boxes of masks given as run-length codes of one size, drawn without the rest of the image.

    Args:
        rles: N codes.
        indices: which of them are drawn, in this order; all are read. None: all.

    Raises:
        ValueError: as `decode_rle`, or a code has another size than the first one.
    """
    if not rles:
        return []
    first = rles_to_runs(rles[:1])
    runs = rles_to_runs(rles, first.size)
    height = runs.size[0]
    areas, offsets = runs.areas().tolist(), runs.offsets.tolist()
    boxes = runs.boxes().astype(np.int64)  # (N, 4) left, top, width, height
    left, top, _, rows = np.repeat(boxes, np.diff(runs.offsets), axis=0).T  # (R,) each, of the run's mask
    # a run that goes on in the next column lies in a box as high as the image, so it stays one run in its box
    begins = (runs.starts // height - left) * rows + runs.starts % height - top  # (R,) column by column in the box
    ends = begins + runs.lengths
    cropped = []
    for index in range(len(rles)) if indices is None else indices:
        box_left, box_top, box_width, box_height = boxes[index].tolist()
        own = slice(offsets[index], offsets[index + 1])
        steps = np.zeros(box_width * box_height + 1, dtype=np.int8)
        steps[begins[own]] = 1
        steps[ends[own]] -= 1  # where a run fills a column of the box the next one may begin at its end
        filled = np.cumsum(steps[:-1], dtype=np.int8).view(bool).reshape(box_width, box_height)
        cropped.append(CroppedMask(np.ascontiguousarray(filled.T), box_top, box_left, areas[index], runs.size))
    return cropped


def pairwise_intersections(
    first: Sequence[CroppedMask], second: Sequence[CroppedMask], wanted: np.ndarray | None = None
) -> np.ndarray:
    """Common pixels (N, M) float64 of N and M masks of one image. Only pairs whose boxes meet are looked at.

    Args:
        first: N masks.
        second: M masks.
        wanted: (N, M) bool; the other pairs count as apart. None: all are wanted.
    """
    first_boxes, second_boxes = _boxes(first), _boxes(second)  # (N, 4), (M, 4)
    start = np.maximum(first_boxes[:, None, :2], second_boxes[None, :, :2])  # (N, M, 2)
    end = np.minimum(first_boxes[:, None, 2:], second_boxes[None, :, 2:])  # (N, M, 2)
    meet = (start < end).all(axis=2)  # (N, M)
    rows, columns = np.nonzero(meet if wanted is None else meet & wanted)
    limits = np.concatenate([start, end], axis=2)[rows, columns]  # (P, 4)
    result = np.zeros((len(first), len(second)))
    common = []
    for row, column, (top, left, bottom, right) in zip(rows.tolist(), columns.tolist(), limits.tolist(), strict=True):
        one, one_top, one_left, *_ = first[row]
        other, other_top, other_left, *_ = second[column]
        one = one[top - one_top : bottom - one_top, left - one_left : right - one_left]
        other = other[top - other_top : bottom - other_top, left - other_left : right - other_left]
        common.append(np.count_nonzero(one & other))
    result[rows, columns] = common
    return result


def pairwise_ious(
    detections: Sequence[CroppedMask],
    references: Sequence[CroppedMask],
    iscrowd: np.ndarray,
    wanted: np.ndarray | None = None,
) -> np.ndarray:
    """IoU (D, G) of masks; against a crowd reference the share of the detection that lies on it, as COCO does.

    Args:
        detections: D masks.
        references: G masks of the same image.
        iscrowd: (G,) bool.
        wanted: (D, G) bool; the IoU of the other pairs is 0. None: all are wanted.
    """
    overlap = pairwise_intersections(detections, references, wanted)  # (D, G)
    detection_area = mask_areas(detections)[:, None]
    union = np.where(iscrowd[None, :], detection_area, detection_area + mask_areas(references)[None, :] - overlap)
    return overlap / np.maximum(union, 1)


def mask_areas(masks: Sequence[CroppedMask]) -> np.ndarray:
    """Set pixels (N,) float64."""
    return np.array([mask.area for mask in masks], dtype=np.float64)


def _words(mask: np.ndarray) -> np.ndarray:
    """The bytes of a mask (H, W), eight at a time where that is possible; zero bytes are pixels that are not set."""
    if mask.dtype.itemsize != 1:
        mask = mask != 0
    pixels = mask.view(np.uint8)
    if pixels.flags.c_contiguous and pixels.shape[1] % WORD.itemsize == 0 and pixels.size:
        return pixels.view(WORD)  # (H, W / 8)
    return pixels


def _boxes(masks: Sequence[CroppedMask]) -> np.ndarray:
    """(N, 4) int64: top, left, bottom, right, ends exclusive."""
    boxes = [
        (mask.top, mask.left, mask.top + mask.pixels.shape[0], mask.left + mask.pixels.shape[1]) for mask in masks
    ]
    return np.array(boxes, dtype=np.int64).reshape(len(masks), 4)
