"""A loaded dataset: its rows, the samples to train on and the references to be measured against."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_maskformer.data.background import with_background, with_background_segment
from hf_maskformer.data.problems import Problem
from hf_maskformer.data.row_stream import RowStream
from hf_maskformer.data.sample import Sample, image_to_rgb, read_image, segment_masks, task_segments
from hf_maskformer.model.image_conversion import open_image
from hf_maskformer.model.label_spec import LabelSpec


class SegmentationData:
    """One split of a dataset for one task: by number, or streamed from first to last.

    `row`, `image`, `sample`, `reference` and `len` need the number of an image; streamed data has none and raises
    TypeError there. `rows`, `samples` and `samples_with_references` go through both kinds.

    Attributes:
        dataset: rows of `FEATURES`; images are not decoded. Streamed: an iterable of such rows.
        label_spec: what the label ids mean.
        task: "semantic", "instance" or "panoptic".
        format: the reader's name, such as "coco_panoptic".
        split: the split's name, or None.
        intensity_range: black and white of images with more than 8 bits.
        left_out: one problem for each image that could not be read when the dataset was indexed and has no row.
        background_label: of the pixels that belong to no segment, in samples and references; None: they are void.
        stored_label_spec: what the label ids of the rows mean: `label_spec` without a background that was added.
    """

    def __init__(
        self,
        dataset: Any,
        label_spec: LabelSpec,
        task: str,
        format: str,
        split: str | None = None,
        intensity_range: tuple[float, float] | None = None,
        left_out: Sequence[Problem] = (),
        background: bool = False,
    ) -> None:
        """`label_spec` is that of the rows; with `background` a class is added for the pixels of no segment."""
        self.dataset = dataset
        self.stored_label_spec = label_spec
        self.background_label: int | None = None
        if background:
            label_spec, self.background_label = with_background(label_spec)
        self.label_spec = label_spec
        self.task = task
        self.format = format
        self.split = split
        self.intensity_range = intensity_range
        self.left_out = tuple(left_out)

    @property
    def streaming(self) -> bool:
        """Whether the rows are read from first to last, without a number."""
        return isinstance(self.dataset, RowStream)

    def __len__(self) -> int:
        self._check_numbered("len(data)")
        return len(self.dataset)

    def __bool__(self) -> bool:
        return self.streaming or len(self) > 0

    def __repr__(self) -> str:
        return (
            f"SegmentationData(format={self.format!r}, split={self.split!r}, task={self.task!r}, "
            f"images={'streamed' if self.streaming else len(self)}, labels={self.label_spec.num_labels})"
        )

    def row(self, index: int) -> dict[str, Any]:
        """The stored row; `segments` holds run-length codes."""
        self._check_numbered("a row by its number")
        return dict(self.dataset[index])

    def image(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return self.row_image(self.row(index))

    def sample(self, index: int) -> Sample:
        """The image with the masks of this task, at original size.

        Raises:
            ValueError: the image cannot be read or is not of the size it had when the dataset was indexed.
        """
        return self.row_sample(self.row(index))

    def reference(self, index: int) -> Any:
        """What the metric of this task is given for one image; see `row_reference`."""
        return self.row_reference(self.row(index))

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows in order; streamed data is read anew each time and nothing of it is kept."""
        if self.streaming:
            yield from self.dataset
        else:
            for index in range(len(self)):
                yield self.row(index)

    def samples(self) -> Iterator[Sample]:
        """All samples in order; ValueError as `sample`."""
        for row in self.rows():
            yield self.row_sample(row)

    def samples_with_references(self) -> Iterator[tuple[Sample, Any]]:
        """All samples in order, each with what `reference` gives for it."""
        for row in self.rows():
            yield self.row_sample(row), self.row_reference(row)

    def row_image(self, row: Mapping[str, Any]) -> np.ndarray:
        """(H, W, 3) uint8 image of a row; ValueError if it cannot be read or is of another size than its row says."""
        stored = row["image"]
        if stored["bytes"] is not None:
            file = open_image(io.BytesIO(stored["bytes"]), row["file_name"])
            image = image_to_rgb(file, row["file_name"], self.intensity_range)
        else:
            image = read_image(Path(stored["path"]), self.intensity_range)
        if image.shape[:2] != (row["height"], row["width"]):
            raise ValueError(
                f"{row['file_name']} is {image.shape[1]}x{image.shape[0]} (width x height), it was "
                f"{row['width']}x{row['height']} when the dataset was indexed"
            )
        return image

    def row_sample(self, row: Mapping[str, Any]) -> Sample:
        """The image of a row with the masks of this task."""
        image = self.row_image(row)
        masks, class_labels = task_segments(self._whole(row), self.task, self.label_spec)
        return Sample(image, masks, class_labels, image_id=row["image_id"], file_name=row["file_name"])

    def row_reference(self, row: Mapping[str, Any]) -> Any:
        """What the metric of this task is given, at original size.

        - semantic: (H, W) int64 labels, `ignore_index` where no segment is; where some overlap the smallest wins;
        - panoptic: {"segmentation": (H, W) int32 segment ids, 0 = void, "segments_info": [{id, label_id, iscrowd,
          area}]};
        - instance: {"masks": list of N RLE dicts, "labels": (N,), "iscrowd": (N,), "area": (N,)}, crowds included.
        """
        if self.task == "semantic":
            return semantic_reference(self._whole(row), self.label_spec)
        if self.task == "panoptic":
            return panoptic_reference(row)
        return instance_reference(row, self.label_spec)

    def _whole(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with the segment of the background, where there is such a class."""
        return row if self.background_label is None else with_background_segment(row, self.background_label)

    def _check_numbered(self, wanted: str) -> None:
        if self.streaming:
            raise TypeError(
                f"the data is streamed, so there is no {wanted}: go through it with data.rows() or data.samples(), "
                "or load it without streaming"
            )


def semantic_reference(row: Mapping[str, Any], label_spec: LabelSpec) -> np.ndarray:
    """(H, W) int64 label map of a row."""
    segments, on_top = layered_segments(row)
    labels = np.array([label_spec.ignore_index, *(segment["label_id"] for segment in segments)], dtype=np.int64)
    return labels[on_top]


def panoptic_reference(row: Mapping[str, Any]) -> dict[str, Any]:
    """Id map and segments of a row, with the dataset's own segment ids."""
    segments, on_top = layered_segments(row)
    ids = np.array([0, *(segment["id"] for segment in segments)], dtype=np.int32)
    info = [{key: segment[key] for key in ("id", "label_id", "iscrowd", "area")} for segment in row["segments"]]
    return {"segmentation": ids[on_top], "segments_info": info}


def layered_segments(row: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], np.ndarray]:
    """The segments of a row by their pixels, the largest first, and which of them is seen where.

    Their stored areas do not matter: those of a file may be 0 or wrong.

    Returns:
        The N segments, and (H, W) int64: 0 = none, k + 1 = segment k; where some overlap, the smallest.
    """
    segments = row["segments"]
    masks = segment_masks(row, segments)
    order = np.argsort(-masks.areas(), kind="stable")
    on_top = masks.group(np.argsort(order), len(segments)).top_map()
    return [segments[index] for index in order.tolist()], on_top


def instance_reference(row: Mapping[str, Any], label_spec: LabelSpec) -> dict[str, Any]:
    """Whole masks of the things of a row; overlap and crowds are kept."""
    things: Sequence[dict[str, Any]] = [s for s in row["segments"] if s["label_id"] in label_spec.thing_label_ids]
    return {
        "masks": [{"size": [row["height"], row["width"]], "counts": thing["rle"]} for thing in things],
        "labels": np.array([thing["label_id"] for thing in things], dtype=np.int64),
        "iscrowd": np.array([thing["iscrowd"] for thing in things], dtype=bool),
        "area": np.array([thing["area"] for thing in things], dtype=np.float64),
    }
