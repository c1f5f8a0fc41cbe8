"""What readers check of a stored segment: whether its box fits its mask, and whether it stands in the image twice."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_maskformer.data.problems import Problems

BOX_TOLERANCE = 1.0  # pixels that a side of a stored box may lie away from its mask


def kept_area(stored: Any, pixels: int, path: Path | str, where: str, problems: Problems) -> float:
    """The area to keep of a segment: `stored`, or its pixels, with a warning, where that is no area."""
    if isinstance(stored, bool) or not isinstance(stored, (int, float)) or not 0 <= stored < math.inf:
        message = f"{path}: {where} has area {stored!r:.80}, which is no area; its {pixels} pixels are taken"
        problems.warning("broken_record", path, message)
        return pixels
    return stored


def warn_box(
    path: Path,
    where: str,
    stored: Any,
    mask_box: Sequence[float],
    size: tuple[int, int],
    problems: Problems,
    polygons: Sequence[np.ndarray] = (),
) -> list[float]:
    """The box to keep of a segment: `stored`, or that of the mask where `stored` is no box.

    Reported is a box with a side more than `BOX_TOLERANCE` from the mask's, after both are clipped to the image; where
    there are polygons it may as well be that of their points, which reach farther than the pixels they fill.

    Args:
        path: the annotation file.
        where: the annotation, for the message.
        stored: the box [x, y, width, height] as the file has it.
        mask_box: the box of the mask's pixels.
        size: (H, W) of the image.
        problems: where to report.
        polygons: (P, 2) points that the mask was drawn from.
    """
    if stored == mask_box:  # most are
        return list(mask_box)
    box = _box(stored)
    if box is None:
        message = f"{path}: {where} has bbox {stored!r:.80}, which is not [x, y, width, height]; the mask's is taken"
        problems.warning("box_mismatch", path, message)
        return list(mask_box)
    sides, mask_sides = _sides(box, size), _sides(mask_box, size)
    distances = [abs(a - b) for a, b in zip(sides, mask_sides, strict=True)]
    if max(distances) > BOX_TOLERANCE and polygons:
        points = np.concatenate(polygons)
        outline = [*points.min(axis=0).tolist(), *np.ptp(points, axis=0).tolist()]
        reached = [abs(a - b) for a, b in zip(sides, _sides(outline, size), strict=True)]
        distances = [min(pair) for pair in zip(distances, reached, strict=True)]
    if max(distances) > BOX_TOLERANCE:
        mask_text = [round(value, 2) for value in mask_box]
        message = f"{path}: {where} has bbox {list(box)}, but its mask has {mask_text}"
        problems.warning("box_mismatch", path, message)
    return list(box)


def warn_identical(path: Path, where: str, segments: Iterable[Mapping[str, Any]], problems: Problems) -> None:
    """Reports segments of one class with the same pixels; all of them are used.

    Args:
        path: the annotation file.
        where: the image, for the message.
        segments: stored segments with id, label_id and rle.
        problems: where to report.
    """
    first: dict[tuple[int, str], int] = {}
    for segment in segments:
        key = (segment["label_id"], segment["rle"])
        if key in first:
            message = f"{path}: {where}: annotations {first[key]} and {segment['id']} have one class and one mask"
            problems.warning("duplicate", path, message)
        else:
            first[key] = segment["id"]


def _box(value: Any) -> tuple[float, float, float, float] | None:
    """A COCO box as numbers; None if it is none."""
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return None
    if not {type(number) for number in value} <= {int, float} or not all(map(math.isfinite, value)):
        return None
    left, top, width, height = map(float, value)
    return left, top, width, height


def _sides(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of [x, y, width, height] inside an image of (H, W)."""
    left, top, width, height = box
    right, bottom = left + width, top + height
    return (
        min(max(left, 0.0), size[1]),
        min(max(top, 0.0), size[0]),
        min(max(right, 0.0), size[1]),
        min(max(bottom, 0.0), size[0]),
    )
