"""What an evaluation keeps beside its metrics: confusions of classes, a score for every image, the worst images.

Nothing here grows with the number of images but one short line for each. A kept image is its data row (the image as
the compressed file or a path) and the predicted map as run-length codes.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hf_maskformer.evaluation.metric import to_numpy
from hf_maskformer.model.masks import decode_rle, id_map_to_rles

VOID_ID = 0  # of the pixels of a drawn map that no segment holds
CANNOT_BE_READ = "cannot be read"


@dataclass(frozen=True)
class Confusion:
    """How often things of one class were taken for another.

    Attributes:
        matrix: (R, C) int64, rows truth, columns prediction. The first K rows and K columns are the same classes; a
            last row or column beyond them stands for something that is no class.
        rows, columns: R and C names.
        counted: what a count is: "pixels" or "objects".
    """

    matrix: np.ndarray
    rows: list[str]
    columns: list[str]
    counted: str

    @property
    def num_classes(self) -> int:
        """K: classes that are a row and a column."""
        return sum(row == column for row, column in zip(self.rows, self.columns, strict=False))


class ImageResult(NamedTuple):
    """What an image scored alone, and what was predicted for it.

    `segmentation` (H, W) holds segment ids; a pixel whose id is not among `segments` (dicts with id and label_id) is
    void.
    """

    score: float  # 0..1; nan if there was nothing to judge
    segmentation: np.ndarray
    segments: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class ImageScore:
    """A line of the list of images.

    Attributes:
        index: place in the data; None for an image that was left out when the data was indexed.
        file_name: of the image; of one that was left out the file that cannot be read, which may be its label file.
        score: of this image alone; nan without one.
        note: why the image was not scored.
    """

    index: int | None
    file_name: str
    score: float
    note: str = ""


@dataclass(frozen=True)
class WorstImage:
    """An image that scored badly.

    Attributes:
        score: of this image alone.
        index: place in the data.
        row: the data row.
        segments: the predicted segments that are seen, each with label_id and rle; they do not overlap.
    """

    score: float
    index: int
    row: dict[str, Any]
    segments: list[dict[str, Any]]

    def predicted_map(self) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """(H, W) int32 ids 1, 2, ... with `VOID_ID` elsewhere, and the segments with these ids."""
        ids = np.full((self.row["height"], self.row["width"]), VOID_ID, dtype=np.int32)
        for number, segment in enumerate(self.segments, start=1):
            ids[decode_rle(segment["rle"])] = number
        return ids, [{**segment, "id": number} for number, segment in enumerate(self.segments, start=1)]


class EvaluationDetails:
    """Handed to `evaluate` to be filled.

    Args:
        worst: how many of the worst images are kept.

    Attributes:
        confusion: of the whole evaluation; None before it.
        images: one `ImageScore` per image, in the order of the data; those left out of the index come last.
        score_name: what the score of an image is.
    """

    def __init__(self, worst: int = 8) -> None:
        if worst < 0:
            raise ValueError(f"worst must be at least 0, got {worst}")
        self.limit = worst
        self.clear()

    def clear(self) -> None:
        """Forgets everything, as before the evaluation."""
        self.confusion: Confusion | None = None
        self.images: list[ImageScore] = []
        self.score_name = ""
        self._heap: list[tuple[float, int, WorstImage]] = []  # the best of the kept is at the top

    @property
    def worst(self) -> list[WorstImage]:
        """The kept images, the worst first; of equal scores the earlier one."""
        return sorted((entry[2] for entry in self._heap), key=lambda image: (image.score, image.index))

    def add(self, index: int, row: dict[str, Any], result: ImageResult) -> None:
        """One image. An image without a score is listed, but never among the worst."""
        self.images.append(ImageScore(index, row["file_name"], result.score))
        if not math.isnan(result.score) and self._enters(result.score, index):
            self._push(WorstImage(result.score, index, row, _segments_as_rle(result)))

    def add_unread(self, index: int | None, file_name: str) -> None:
        """An image that was skipped; without an index one that is not among the data's rows."""
        self.images.append(ImageScore(index, file_name, math.nan, CANNOT_BE_READ))

    def merge(self, other: "EvaluationDetails") -> None:
        """Adds the images of another part of the same evaluation."""
        self.images += other.images
        self.score_name = self.score_name or other.score_name
        for image in other.worst:
            if self._enters(image.score, image.index):
                self._push(image)

    def complete(self, confusion: Confusion) -> None:
        """Ends the evaluation: all images are there."""
        self.confusion = confusion
        self.images.sort(key=lambda image: math.inf if image.index is None else image.index)

    def _enters(self, score: float, index: int) -> bool:
        return len(self._heap) < self.limit or (self.limit > 0 and (-score, -index) > self._heap[0][:2])

    def _push(self, image: WorstImage) -> None:
        entry = (-image.score, -image.index, image)
        if len(self._heap) < self.limit:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heapreplace(self._heap, entry)


def class_segments(label_map: np.ndarray) -> list[dict[str, Any]]:
    """One segment for each class of a semantic map (an array of labels, none negative), whose id is its label."""
    present = np.flatnonzero(np.bincount(label_map.reshape(-1)))
    return [{"id": int(label), "label_id": int(label)} for label in present]


def _segments_as_rle(result: ImageResult) -> list[dict[str, Any]]:
    """The segments of which a pixel is seen."""
    ids = to_numpy(result.segmentation)
    present = set(np.unique(ids).tolist())
    seen = [segment for segment in result.segments if segment["id"] in present]
    rles = id_map_to_rles(ids, [segment["id"] for segment in seen])
    return [
        {"label_id": segment["label_id"], "score": segment.get("score"), "rle": rle}
        for segment, rle in zip(seen, rles, strict=True)
    ]
