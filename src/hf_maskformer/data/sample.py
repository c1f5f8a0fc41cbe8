"""One image with its segments: the stored row, the sample to train on, and how an image file is read."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Features, Image, List, Value
from PIL import Image as PILImage

from hf_maskformer.data.lazy_masks import RleSegments
from hf_maskformer.data.run_segments import stored_segment
from hf_maskformer.data.segment_masks import SegmentMasks
from hf_maskformer.model.image_conversion import (
    UnreadableImageError,
    check_channel_depth,
    open_image,
    pil_to_array,
    scale_intensities,
)
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import encode_rle

TASKS = ("semantic", "instance", "panoptic")
EXIF_ORIENTATION = 0x0112
EXIF_SIDES_SWAPPED = (5, 6, 7, 8)
PNG_EXIF_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")

# Every segment keeps its own run-length code, so segments may overlap. `rle` is the COCO compressed counts string of a
# (height, width) mask. `List` and not `Sequence`: the latter turns a list of structs into a struct of lists.
FEATURES = Features(
    {
        "image": Image(decode=False),
        "image_id": Value("string"),
        "height": Value("int32"),
        "width": Value("int32"),
        "file_name": Value("string"),
        "segments": List(
            {
                "id": Value("int64"),
                "label_id": Value("int64"),
                "iscrowd": Value("bool"),
                "area": Value("float64"),
                "bbox": List(Value("float32"), length=4),
                "rle": Value("string"),
            }
        ),
    }
)


class Sample:
    """One image with the masks to learn.

    Attributes:
        image: (H, W, 3) uint8.
        segments: the N masks, perhaps not decoded yet; `masks` is their (N, H, W) bool form, made on each access.
        class_labels: (N,) int64.
        iscrowd: (N,) bool.
        image_id: name of the image in its dataset.
        file_name: what to name in a message.
    """

    def __init__(
        self,
        image: np.ndarray,
        masks: np.ndarray | SegmentMasks,
        class_labels: np.ndarray,
        iscrowd: np.ndarray | None = None,
        image_id: str = "",
        file_name: str = "",
    ) -> None:
        self.image = image
        self.segments = masks if isinstance(masks, SegmentMasks) else SegmentMasks.from_masks(masks)
        self.class_labels = np.asarray(class_labels, dtype=np.int64)
        count = len(self.segments)
        self.iscrowd = np.zeros(count, dtype=bool) if iscrowd is None else np.asarray(iscrowd, dtype=bool)
        self.image_id = image_id
        self.file_name = file_name
        if len(self.class_labels) != count or len(self.iscrowd) != count:
            raise ValueError(
                f"{file_name or image_id}: {count} masks, {len(self.class_labels)} class_labels and "
                f"{len(self.iscrowd)} iscrowd; the three must be equal"
            )
        if self.segments.size != tuple(image.shape[:2]):
            raise ValueError(
                f"{file_name or image_id}: masks have size {self.segments.size}, image has {image.shape[:2]}"
            )

    @property
    def masks(self) -> np.ndarray:
        return self.segments.dense()

    def with_masks(self, image: np.ndarray, masks: SegmentMasks) -> "Sample":
        """This sample after a change of its pixels; masks that are left without a pixel are removed."""
        keep = masks.areas() > 0
        return Sample(
            image=image,
            masks=masks if keep.all() else masks.select(keep),
            class_labels=self.class_labels[keep],
            iscrowd=self.iscrowd[keep],
            image_id=self.image_id,
            file_name=self.file_name,
        )


def read_image(path: str | Path, intensity_range: tuple[float, float] | None = None) -> np.ndarray:
    """Reads an image file as (H, W, 3) uint8 RGB, turned as its EXIF orientation says.

    Greyscale, palette and CMYK images are converted; alpha is dropped. One grey channel of 16 or 32 bits is scaled
    linearly from `intensity_range` (low, high) to 0..255 and clipped. The image processor's rules are the same.

    Raises:
        ValueError: the file is missing, is no image or is cut off, has more than 8 bits and no range is given, or has
            colours of 16 bits per channel.
    """
    return image_to_rgb(open_image(path), str(path), intensity_range)


def image_to_rgb(image: PILImage.Image, where: str, intensity_range: tuple[float, float] | None = None) -> np.ndarray:
    """Turns an opened image of any mode into (H, W, 3) uint8; `where` names it in messages."""
    values = pil_to_array(image, where)
    return values if values.ndim == 3 else _scale_intensities(values, image.mode, where, intensity_range)


def _scale_intensities(
    values: np.ndarray, mode: str, where: str, intensity_range: tuple[float, float] | None
) -> np.ndarray:
    finite = np.isfinite(values)
    if not finite.all():
        raise ValueError(f"{where}: image of mode {mode} holds {int((~finite).sum())} values that are nan or infinite")
    if intensity_range is None:
        raise ValueError(
            f"{where}: image of mode {mode} has values {values.min()}..{values.max()}, more than 8 bits. Say which "
            "range is black to white: intensity_range=(low, high), on the command line --intensity-range LOW HIGH"
        )
    low, high = intensity_range
    if not low < high:
        raise ValueError(f"intensity_range must be (low, high) with low < high, got {tuple(intensity_range)}")
    grey = scale_intensities(torch.from_numpy(values.astype(np.float64)), (low, high)).numpy()
    return np.repeat(grey[..., None], 3, axis=2)  # (H, W, 3)


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) as `read_image` will return it, from the file's header alone; ValueError names a bad file."""
    (width, height), turned = _stored_size(path)
    return (width, height) if turned else (height, width)


def check_image_size(path: str | Path, expected: tuple[int, int], source: str) -> None:
    """Raises ValueError if the image is not of the (height, width) that `source` states.

    The message says so when the EXIF orientation explains the difference: then the annotation was drawn on the
    unturned picture.
    """
    size = image_size(path)
    if size == tuple(expected):
        return
    height, width = size
    hint = ""
    if _stored_size(path)[1] and size == tuple(expected)[::-1]:
        hint = "; the image has an EXIF orientation that swaps its sides, and the annotation was drawn without it"
    raise ValueError(f"{path} is {width}x{height} (width x height), but {source} is {expected[1]}x{expected[0]}{hint}")


def _stored_size(path: str | Path) -> tuple[tuple[int, int], bool]:
    """((width, height) as stored, whether EXIF swaps them)."""
    try:
        with PILImage.open(path) as image:
            check_channel_depth(image, str(path))
            return image.size, sides_are_swapped(image, Path(path).read_bytes)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image file") from None
    except (OSError, SyntaxError, PILImage.DecompressionBombError) as error:
        raise UnreadableImageError(
            f"{path}: cannot be read as an image, it is damaged or cut off ({error})"
        ) from error


def sides_are_swapped(image: PILImage.Image, content: Callable[[], bytes]) -> bool:
    """Whether the EXIF orientation turns an opened image by 90 degrees; `content` gives the bytes of its file."""
    # PIL decodes a whole PNG to look for its EXIF data, which hardly any has.
    if image.format == "PNG":
        text = content()
        if not any(mark in text for mark in PNG_EXIF_MARKS):
            return False
    return image.getexif().get(EXIF_ORIENTATION) in EXIF_SIDES_SWAPPED


def make_segment(segment_id: int, label_id: int, mask: np.ndarray, iscrowd: bool = False) -> dict[str, Any]:
    """The stored form of a (H, W) bool mask with at least one pixel; fastest where the mask is in column order."""
    columns = np.flatnonzero(mask.any(axis=0))
    left, right = int(columns[0]), int(columns[-1])
    rows = np.flatnonzero(mask[:, left : right + 1].any(axis=1))
    top, bottom = int(rows[0]), int(rows[-1])
    box = [float(left), float(top), float(right - left + 1), float(bottom - top + 1)]
    area = float(np.count_nonzero(mask))
    return stored_segment(segment_id, label_id, iscrowd, area, box, encode_rle(mask)["counts"])


def segment_masks(row: Mapping[str, Any], segments: Sequence[Mapping[str, Any]]) -> SegmentMasks:
    """Some of a row's segments at the row's size; their codes are read now, their pixels when they are needed."""
    return RleSegments.from_codes([segment["rle"] for segment in segments], (row["height"], row["width"]))


def targets_for_task(
    row: Mapping[str, Any], task: str, label_spec: LabelSpec
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is learned from a row: (masks (N, H, W) bool, class_labels (N,) int64, iscrowd (N,) bool).

    - semantic: one mask for each class that is present, crowds included;
    - instance: one mask for each thing, without crowds;
    - panoptic: the same things, then one merged mask for each stuff class that is present.
    """
    masks, class_labels = task_segments(row, task, label_spec)
    return masks.dense(), class_labels, np.zeros(len(class_labels), dtype=bool)


def task_segments(row: Mapping[str, Any], task: str, label_spec: LabelSpec) -> tuple[SegmentMasks, np.ndarray]:
    """As `targets_for_task` with the masks not decoded yet."""
    segments = row["segments"]
    labels = np.array([segment["label_id"] for segment in segments], dtype=np.int64)
    crowd = np.array([segment["iscrowd"] for segment in segments], dtype=bool)
    used, targets, class_labels = group_by_task(labels, crowd, task, label_spec)
    masks = segment_masks(row, [segment for segment, use in zip(segments, used, strict=True) if use])
    return masks.group(targets[used], len(class_labels)), class_labels


def group_by_task(
    labels: np.ndarray, crowd: np.ndarray, task: str, label_spec: LabelSpec
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How segments become targets: (used (S,) bool, target of each segment (S,) or -1, class of each target (N,))."""
    check_task(task, TASKS, "a dataset")
    is_thing = np.isin(labels, label_spec.thing_label_ids)
    alone = np.zeros(len(labels), dtype=bool) if task == "semantic" else is_thing & ~crowd
    merged = {"semantic": ~alone, "instance": np.zeros_like(alone), "panoptic": ~is_thing}[task]
    merged_labels = np.unique(labels[merged])
    targets = np.full(len(labels), -1, dtype=np.int64)
    targets[alone] = np.arange(alone.sum())
    targets[merged] = alone.sum() + np.searchsorted(merged_labels, labels[merged])
    return alone | merged, targets, np.concatenate([labels[alone], merged_labels]).astype(np.int64)


def check_task(task: str, allowed: Sequence[str], where: str, hint: str = "") -> None:
    """ValueError for a task that is not allowed; `hint` ends the message."""
    if task not in allowed:
        raise ValueError(f"task {task!r} is not possible with {where}, allowed: {', '.join(allowed)}{hint}")
