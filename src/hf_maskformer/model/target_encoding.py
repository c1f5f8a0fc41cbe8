"""Annotations -> binary masks and class labels, the training targets of mask classification.

`encode_targets` takes the annotations of a batch; every other function here those of one image and a `Frame`, and
plans its masks: which there are is known, and checked, before the memory for them is taken. All masks of a batch stand
in one block, each written once. An annotation that is one map of ids is narrowed to the smallest integers, resized
once, nearest pixel, and the rows that an id may stand in are compared with it straight into the block; other masks are
decoded and resized one by one, so that memory holds the block and one more mask. A mask without a pixel left is
dropped together with its label. `where` names the image in errors.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .image_conversion import new_zeros
from .label_spec import LabelSpec
from .masks import decode_rle, panoptic_png_to_ids, segmentation_to_mask
from .target_inputs import TargetInputs

ID_TYPES = (np.uint8, np.int16, np.int32)  # the narrower, the more ids are compared at one time
VOID = -1  # inside this file: pixels without a label, whatever the ignore_index


@dataclass(frozen=True)
class LabelRules:
    """How label values are read: `labels` (None: not known, any id >= 0 passes), ignored value, shift by one."""

    labels: LabelSpec | None
    ignore_index: int | None  # None: nothing is ignored
    do_reduce_labels: bool

    def check(self, values: Iterable[int] | np.ndarray, where: str) -> None:
        """Raise ValueError if a value is no label id."""
        array = np.asarray(list(values) if not isinstance(values, np.ndarray) else values)
        if self.labels is not None:
            self.labels.check_class_labels(array, where)
        elif array.size and array.min() < 0:
            raise ValueError(f"{where}: label {array.min()} is negative, allowed: 0 and up")

    def is_ignored(self, values: np.ndarray) -> np.ndarray:
        """Where `values` are the ignore_index, as bool of their shape."""
        if self.ignore_index is None:
            return np.zeros(values.shape, dtype=bool)
        return values == self.ignore_index

    def reduce(self, raw: np.ndarray) -> np.ndarray:
        """Raw label values -> label ids, VOID where there is none; what is ignored stays so, and never becomes 254.

        No two values become the same label, but for VOID.
        """
        values = raw.astype(np.int64)
        void = self.is_ignored(values)
        if self.do_reduce_labels:
            void |= values == 0
            values = values - 1
        return np.where(void, VOID, values)


@dataclass(frozen=True)
class Frame:
    """The sizes of one image, each (height, width).

    Attributes:
        image_size: of the image as given, and so of its annotation.
        size: that it was resized to.
        canvas: that it is padded to, at the bottom and on the right.
    """

    image_size: tuple[int, int]
    size: tuple[int, int]
    canvas: tuple[int, int]


@dataclass(frozen=True)
class PlannedMask:
    """A mask still to be written: where `array` (n, w), the rows of the resized image from `top` on, is `value`."""

    array: np.ndarray
    value: int
    label: int
    top: int = 0


@dataclass(frozen=True)
class PlannedMasks:
    """The masks of one image in order, none of them empty; `count` is how many there are at most."""

    count: int
    masks: Iterable[PlannedMask]


@dataclass(frozen=True)
class IdMap:
    """An (H, W) map of integers; its different `values`, ascending, and the first and the last row of each."""

    ids: np.ndarray
    values: np.ndarray
    first: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray) -> "IdMap":
        """Reads the map once, and where neighbours differ once more: fast where they mostly do not."""
        flat = ids.reshape(-1)
        ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]), len(flat) - 1)  # of the runs of equal pixels
        values = np.unique(flat[ends])
        rank = np.searchsorted(values, flat[ends])
        first, last = np.empty((2, len(values)), dtype=np.int64)
        last[rank] = ends  # what is assigned last stays
        first[rank[::-1]] = np.append(0, ends[:-1] + 1)[::-1]
        return cls(ids, values, first // ids.shape[1], last // ids.shape[1])


def encode_targets(
    inputs: TargetInputs, rules: LabelRules, frames: Sequence[Frame]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Masks (N_i, *canvas) bool, False in the padding, and class labels (N_i,) int64 of every image.

    The masks are views of one block: small blocks would not fill large pages (see `new_zeros`).
    """
    plans = [planned_masks(inputs, index, rules, frame) for index, frame in enumerate(frames)]
    counts = [plan.count for plan in plans]
    block = new_zeros((sum(counts), *frames[0].canvas), torch.bool)
    written = [_write(plan, part) for plan, part in zip(plans, block.split(counts), strict=True)]
    return [masks for masks, _ in written], [labels for _, labels in written]


def _write(plan: PlannedMasks, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks and labels of one image, in a block (plan.count, *canvas) that is False."""
    labels: list[int] = []
    for canvas, mask in zip(block.numpy(), plan.masks, strict=False):
        height, width = mask.array.shape
        np.equal(mask.array, mask.value, out=canvas[mask.top : mask.top + height, :width])
        labels.append(mask.label)
    return block[: len(labels)], torch.tensor(labels, dtype=torch.int64)


def planned_masks(inputs: TargetInputs, index: int, rules: LabelRules, frame: Frame) -> PlannedMasks:
    """The masks of image `index`, by the kind of annotation that was given."""
    where = f"image {index}"
    if inputs.masks is not None and inputs.class_labels is not None:
        return mask_targets(inputs.masks[index], inputs.class_labels[index], rules, frame, where)
    label_map = None if inputs.segmentation_maps is None else inputs.segmentation_maps[index]
    if inputs.annotations is not None:
        record = inputs.annotations[index]
        names = [f"{key} {record[key]}" for key in ("image_id", "file_name") if key in record]
        where = f"{where} ({', '.join(names)})" if names else where
        if "annotations" in record and label_map is None:
            return coco_instance_targets(record, rules, frame, where)
        if "segments_info" in record and label_map is not None:
            return coco_panoptic_targets(record, label_map, rules, frame, where)
        raise ValueError(
            f"{where}: annotations must be COCO instance records (key annotations) alone, or COCO panoptic records "
            f"(key segments_info) together with their PNGs in segmentation_maps; got keys {sorted(record)}"
        )
    if inputs.instance_id_to_semantic_id is not None:
        table = inputs.instance_id_to_semantic_id[index]
        return instance_map_targets(label_map, table, rules, frame, where)
    return semantic_map_targets(label_map, rules, frame, where)


def semantic_map_targets(semantic_map: Any, rules: LabelRules, frame: Frame, where: str) -> PlannedMasks:
    """One mask per label that occurs in the map; ignored pixels belong to no mask."""
    raw = _label_map(semantic_map, frame.image_size, where)
    id_map = IdMap.of(raw)
    values = id_map.values
    negative = values[(values < 0) & ~rules.is_ignored(values)]
    if len(negative):  # before the shift, where -1 would pass for void
        raise ValueError(f"{where}: label {negative[0]} is negative; ignore_index is {rules.ignore_index}")
    labels = rules.reduce(values)
    rules.check(labels[labels != VOID], f"{where} (after do_reduce_labels)" if rules.do_reduce_labels else where)
    return _id_masks(id_map, values.tolist(), labels, frame)


def instance_map_targets(
    instance_map: Any,
    instance_id_to_semantic_id: Mapping[int, int],
    rules: LabelRules,
    frame: Frame,
    where: str,
) -> PlannedMasks:
    """One mask per instance id of the map, labelled by the dict.

    The dict comes first: an id that it names is an instance, 255 too. An id that it does not name must be the
    ignore_index (or 0 with do_reduce_labels). Ids whose label is the ignore_index are dropped.
    """
    instances = _label_map(instance_map, frame.image_size, where)
    table = {int(key): int(value) for key, value in instance_id_to_semantic_id.items()}
    unnamed_void = {rules.ignore_index, 0} if rules.do_reduce_labels else {rules.ignore_index}
    id_map = IdMap.of(instances)
    for instance in id_map.values.tolist():
        if instance not in table and instance not in unnamed_void:
            hint = f"map it to {rules.ignore_index} (ignore_index) if it is background"
            if rules.ignore_index is None:
                hint = "ignore_index is None, so every pixel needs a label"
            raise ValueError(
                f"{where}: instance id {instance} is not in instance_id_to_semantic_id, known: {sorted(table)[:20]}; "
                f"{hint}"
            )
    named = [instance for instance in id_map.values.tolist() if instance in table]
    labels = rules.reduce(np.array([table[instance] for instance in named], dtype=np.int64))
    rules.check(labels[labels != VOID], where)
    return _id_masks(id_map, named, labels, frame)


def coco_instance_targets(record: Mapping[str, Any], rules: LabelRules, frame: Frame, where: str) -> PlannedMasks:
    """One mask per COCO instance annotation (polygons or RLE); crowds are skipped. Category ids are label ids."""
    kept = [annotation for annotation in record["annotations"] if not annotation.get("iscrowd", 0)]
    rules.check([annotation["category_id"] for annotation in kept], where)

    def decoded() -> Iterable[tuple[np.ndarray, int]]:
        for index, annotation in enumerate(kept):
            try:
                mask = segmentation_to_mask(annotation["segmentation"], *frame.image_size)
            except ValueError as error:
                raise ValueError(f"{where}: annotation {annotation.get('id', index)}: {error}") from error
            yield mask, int(annotation["category_id"])

    return PlannedMasks(len(kept), _resized(decoded(), frame))


def coco_panoptic_targets(
    record: Mapping[str, Any],
    panoptic_map: Any,
    rules: LabelRules,
    frame: Frame,
    where: str,
) -> PlannedMasks:
    """One mask per COCO panoptic segment; crowds and id 0 are void.

    `panoptic_map` is the RGB PNG of the record, or a (H, W) map of the segment ids.
    """
    array = to_array(panoptic_map)
    is_coloured = array.ndim == 3 and array.shape[-1] == 3
    ids = _label_map(panoptic_png_to_ids(array) if is_coloured else array, frame.image_size, where)
    segments = {int(segment["id"]): segment for segment in record["segments_info"]}
    id_map = IdMap.of(ids)
    unknown = [value for value in id_map.values.tolist() if value != 0 and value not in segments]
    if unknown:
        raise ValueError(f"{where}: segment id {unknown[0]} of the panoptic map is not in segments_info")
    kept = [segment for segment in segments.values() if not segment.get("iscrowd", 0)]
    rules.check([segment["category_id"] for segment in kept], where)
    labels = np.array([int(segment["category_id"]) for segment in kept], dtype=np.int64)
    return _id_masks(id_map, [int(segment["id"]) for segment in kept], labels, frame)


def mask_targets(
    masks: Any,
    class_labels: Any,
    rules: LabelRules,
    frame: Frame,
    where: str,
) -> PlannedMasks:
    """Masks as given, which may overlap: (N, H, W) of 0 and 1 (or 255), or N RLE dicts or (H, W) arrays.

    The N masks are read one by one, so an object that has a length and makes each mask when it is asked for will do.
    """
    labels = to_array(class_labels)
    if labels.ndim == 0:
        raise ValueError(
            f"{where}: class_labels must be a list of {len(masks)} label ids, one for each mask of the image, got "
            f"{class_labels!r}"
        )
    labels = labels if len(labels) else np.zeros(0, dtype=np.int64)
    if labels.ndim != 1 or len(labels) != len(masks):
        raise ValueError(f"{where}: {len(masks)} masks, but class_labels has shape {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{where}: class_labels must be integers, got {labels.dtype}")
    rules.check(labels, where)

    def decoded() -> Iterable[tuple[np.ndarray, int]]:
        for index, mask in enumerate(masks):
            name = f"{where}: mask {index}"
            array = decode_rle(mask) if isinstance(mask, dict) else _binary(to_array(mask), name)
            _check_size(array.shape, frame.image_size, name)
            yield array, int(labels[index])

    return PlannedMasks(len(masks), _resized(decoded(), frame))


def resize_nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (..., H, W) to (..., h, w): the source pixel under the centre of each target pixel."""
    height, width = array.shape[-2:]
    if (height, width) == tuple(size):
        return array
    rows, columns = (_nearest(before, after) for before, after in zip((height, width), size, strict=True))
    return array.take(rows, axis=-2).take(columns, axis=-1)


def _nearest(before: int, after: int) -> np.ndarray:
    """(after,) the index below the centre of each, ascending."""
    return (2 * np.arange(after) + 1) * before // (2 * after)


def to_array(value: Any) -> np.ndarray:
    """A PIL image (palette indices, not colours), array, tensor or nested list as a numpy array."""
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _label_map(value: Any, image_size: tuple[int, int], where: str) -> np.ndarray:
    array = to_array(value)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim != 2:
        raise ValueError(
            f"{where}: segmentation map has shape {array.shape}, expected (H, W) with one number per pixel; a "
            "panoptic RGB PNG needs its record in annotations, overlapping masks go to masks and class_labels"
        )
    _check_size(array.shape, image_size, f"{where}: segmentation map")
    if array.dtype.kind not in "iub":
        raise ValueError(f"{where}: segmentation map must hold integers, got {array.dtype}")
    return array


def _check_size(got: Sequence[int], image_size: tuple[int, int], what: str) -> None:
    if tuple(got) == tuple(image_size):
        return
    turned = "; height and width are exchanged, is the image turned by its EXIF orientation?"
    hint = turned if tuple(got) == tuple(image_size)[::-1] else ""
    raise ValueError(f"{what} has size {list(got)} (height, width), the image has {list(image_size)}{hint}")


def _binary(mask: np.ndarray, what: str) -> np.ndarray:
    if mask.ndim != 2:
        raise ValueError(f"{what} has shape {mask.shape}, expected (H, W)")
    if mask.dtype == bool:
        return mask
    on = mask != 0
    values = np.unique(mask[on])
    if len(values) > 1 or (len(values) == 1 and values[0] not in (1, 255)):
        raise ValueError(f"{what} must hold 0 and 1 (or 0 and 255), got the values {values[:5].tolist()}")
    return on


def _id_masks(id_map: IdMap, ids: Sequence[int], labels: np.ndarray, frame: Frame) -> PlannedMasks:
    """The masks of some ids, in this order, each with its label; without those that are VOID or have no pixel left."""
    resized = resize_nearest(_narrowed(id_map), frame.size)
    shrinks = any(after < before for after, before in zip(frame.size, id_map.ids.shape, strict=True))
    left = set((np.unique(resized) if shrinks else id_map.values).tolist())
    rows = _nearest(id_map.ids.shape[0], frame.size[0])
    tops = np.searchsorted(rows, id_map.first).tolist()
    bottoms = np.searchsorted(rows, id_map.last, side="right").tolist()
    bands = dict(zip(id_map.values.tolist(), zip(tops, bottoms, strict=True), strict=True))
    masks = []
    for value, label in zip(ids, labels.tolist(), strict=True):
        if label != VOID and value in left:
            top, bottom = bands[value]
            masks.append(PlannedMask(resized[top:bottom], value, label, top))
    return PlannedMasks(len(masks), masks)


def _narrowed(id_map: IdMap) -> np.ndarray:
    """The map in the smallest integers that hold its values."""
    for dtype in ID_TYPES:
        limits = np.iinfo(dtype)
        if limits.min <= int(id_map.values[0]) and int(id_map.values[-1]) <= limits.max:
            return id_map.ids.astype(dtype, copy=False)
    return id_map.ids


def _resized(masks: Iterable[tuple[np.ndarray, int]], frame: Frame) -> Iterable[PlannedMask]:
    """The (H, W) bool masks that have a pixel left at the size of the frame, each read when it is asked for."""
    for mask, label in masks:
        resized = resize_nearest(mask, frame.size)
        if resized.any():
            yield PlannedMask(resized, True, label)
