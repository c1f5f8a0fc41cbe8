"""Annotations of one image -> binary masks and class labels, the training targets of mask classification.

Every function here takes the annotation of one image and a `Frame`, and returns masks (N, *frame.canvas) bool, False
in the padding, and class labels (N,) int64. Each mask is resized on its own, nearest pixel, right after it was
decoded, and written into the result, so that memory holds the result and one more mask. A mask without a pixel left
is dropped together with its label. `where` names the image in errors.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .label_spec import LabelSpec
from .masks import decode_rle, panoptic_png_to_ids, segmentation_to_mask

VOID = -1  # inside this file: pixels without a label, whatever the ignore_index


@dataclass(frozen=True)
class LabelRules:
    """How label values are read: `labels` (None: not known, any id >= 0 passes), ignored value, shift by one."""

    labels: LabelSpec | None
    ignore_index: int
    do_reduce_labels: bool

    def check(self, values: Iterable[int] | np.ndarray, where: str) -> None:
        """Raise ValueError if a value is no label id."""
        array = np.asarray(list(values) if not isinstance(values, np.ndarray) else values)
        if self.labels is not None:
            self.labels.check_class_labels(array, where)
        elif array.size and array.min() < 0:
            raise ValueError(f"{where}: label {array.min()} is negative, allowed: 0 and up")

    def reduce(self, raw: np.ndarray) -> np.ndarray:
        """Raw label values -> label ids, VOID where there is none; ignored pixels stay ignored, never become 254."""
        values = raw.astype(np.int64)
        void = values == self.ignore_index
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


Targets = tuple[torch.Tensor, torch.Tensor]


def semantic_map_targets(semantic_map: Any, rules: LabelRules, frame: Frame, where: str) -> Targets:
    """One mask per label that occurs in the map; ignored pixels belong to no mask."""
    raw = _label_map(semantic_map, frame.image_size, where)
    values = np.unique(raw)
    negative = values[(values < 0) & (values != rules.ignore_index)]
    if len(negative):  # before the shift, where -1 would pass for void
        raise ValueError(f"{where}: label {negative[0]} is negative; ignore_index is {rules.ignore_index}")
    reduced = rules.reduce(values)
    rules.check(reduced[reduced != VOID], f"{where} (after do_reduce_labels)" if rules.do_reduce_labels else where)
    labels = resize_nearest(rules.reduce(raw), frame.size)
    present = [label for label in np.unique(labels).tolist() if label != VOID]
    return _stack(((labels == label, label) for label in present), len(present), frame)


def instance_map_targets(
    instance_map: Any,
    instance_id_to_semantic_id: Mapping[int, int],
    rules: LabelRules,
    frame: Frame,
    where: str,
) -> Targets:
    """One mask per instance id of the map, labelled by the dict.

    The dict comes first: an id that it names is an instance, 255 too. An id that it does not name must be the
    ignore_index (or 0 with do_reduce_labels). Ids whose label is the ignore_index are dropped.
    """
    instances = _label_map(instance_map, frame.image_size, where)
    table = {int(key): int(value) for key, value in instance_id_to_semantic_id.items()}
    unnamed_void = {rules.ignore_index, 0} if rules.do_reduce_labels else {rules.ignore_index}
    labels: dict[int, int] = {}
    for instance in np.unique(instances).tolist():
        if instance in table:
            labels[instance] = int(rules.reduce(np.array(table[instance])))
        elif instance not in unnamed_void:
            raise ValueError(
                f"{where}: instance id {instance} is not in instance_id_to_semantic_id, known: {sorted(table)[:20]}; "
                f"map it to {rules.ignore_index} (ignore_index) if it is background"
            )
    named = {instance: label for instance, label in labels.items() if label != VOID}
    rules.check(list(named.values()), where)
    resized = resize_nearest(instances, frame.size)
    return _stack(((resized == instance, label) for instance, label in named.items()), len(named), frame)


def coco_instance_targets(record: Mapping[str, Any], rules: LabelRules, frame: Frame, where: str) -> Targets:
    """One mask per COCO instance annotation (polygons or RLE); crowds are skipped. Category ids are label ids."""
    kept = [annotation for annotation in record["annotations"] if not annotation.get("iscrowd", 0)]
    rules.check([annotation["category_id"] for annotation in kept], where)

    def decoded() -> Iterable[tuple[np.ndarray, int]]:
        for index, annotation in enumerate(kept):
            try:
                mask = segmentation_to_mask(annotation["segmentation"], *frame.image_size)
            except ValueError as error:
                raise ValueError(f"{where}: annotation {annotation.get('id', index)}: {error}") from error
            yield resize_nearest(mask, frame.size), int(annotation["category_id"])

    return _stack(decoded(), len(kept), frame)


def coco_panoptic_targets(
    record: Mapping[str, Any],
    panoptic_map: Any,
    rules: LabelRules,
    frame: Frame,
    where: str,
) -> Targets:
    """One mask per COCO panoptic segment; crowds and id 0 are void.

    `panoptic_map` is the RGB PNG of the record, or a (H, W) map of the segment ids.
    """
    array = to_array(panoptic_map)
    is_coloured = array.ndim == 3 and array.shape[-1] == 3
    ids = _label_map(panoptic_png_to_ids(array) if is_coloured else array, frame.image_size, where)
    segments = {int(segment["id"]): segment for segment in record["segments_info"]}
    unknown = [value for value in np.unique(ids).tolist() if value != 0 and value not in segments]
    if unknown:
        raise ValueError(f"{where}: segment id {unknown[0]} of the panoptic map is not in segments_info")
    kept = [segment for segment in segments.values() if not segment.get("iscrowd", 0)]
    rules.check([segment["category_id"] for segment in kept], where)
    resized = resize_nearest(ids, frame.size)
    masks = ((resized == int(segment["id"]), int(segment["category_id"])) for segment in kept)
    return _stack(masks, len(kept), frame)


def mask_targets(
    masks: Any,
    class_labels: Any,
    rules: LabelRules,
    frame: Frame,
    where: str,
) -> Targets:
    """Masks as given, which may overlap: (N, H, W) of 0 and 1 (or 255), or N RLE dicts or (H, W) arrays.

    The N masks are read one by one, so an object that has a length and makes each mask when it is asked for will do.
    """
    labels = to_array(class_labels) if len(class_labels) else np.zeros(0, dtype=np.int64)
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
            yield resize_nearest(array, frame.size), int(labels[index])

    return _stack(decoded(), len(masks), frame)


def resize_nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (..., H, W) to (..., h, w): the source pixel under the centre of each target pixel."""
    height, width = array.shape[-2:]
    if (height, width) == tuple(size):
        return array
    rows = (2 * np.arange(size[0]) + 1) * height // (2 * size[0])
    columns = (2 * np.arange(size[1]) + 1) * width // (2 * size[1])
    return array[..., rows[:, None], columns]


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


def _stack(masks: Iterable[tuple[np.ndarray, int]], count: int, frame: Frame) -> Targets:
    """At most `count` masks (h, w) with their labels, written one by one into the padded result."""
    stacked = torch.zeros((count, *frame.canvas), dtype=torch.bool)
    resized = stacked[:, : frame.size[0], : frame.size[1]].numpy()  # (count, h, w), the same memory
    labels: list[int] = []
    for mask, label in masks:
        if mask.any():
            resized[len(labels)] = mask
            labels.append(label)
    return stacked[: len(labels)], torch.tensor(labels, dtype=torch.int64)


@dataclass(frozen=True)
class TargetInputs:
    """The annotations of a batch as the caller gave them, one entry per image in each list."""

    segmentation_maps: list[Any] | None
    annotations: list[Any] | None
    instance_id_to_semantic_id: list[Any] | None
    masks: list[Any] | None
    class_labels: list[Any] | None

    @classmethod
    def collect(
        cls,
        count: int,
        single: bool,
        segmentation_maps: Any = None,
        annotations: Any = None,
        instance_id_to_semantic_id: Any = None,
        masks: Any = None,
        class_labels: Any = None,
    ) -> "TargetInputs | None":
        """Bring the arguments of the processor to lists of `count` entries; None if there is no annotation.

        For a `single` image each argument may be given without a list around it.

        Raises:
            ValueError: the arguments contradict each other, or their number is not that of the images.
        """
        if (masks is None) != (class_labels is None):
            raise ValueError("masks and class_labels must be given together")
        if masks is not None and (segmentation_maps is not None or annotations is not None):
            raise ValueError("give either masks with class_labels, or segmentation_maps, or annotations")
        if instance_id_to_semantic_id is not None and (segmentation_maps is None or annotations is not None):
            raise ValueError("instance_id_to_semantic_id needs segmentation_maps of instance ids and no annotations")
        if segmentation_maps is None and annotations is None and masks is None:
            return None
        if isinstance(instance_id_to_semantic_id, Mapping):
            instance_id_to_semantic_id = [instance_id_to_semantic_id] * count
        if single:
            segmentation_maps = _wrap(segmentation_maps, not isinstance(segmentation_maps, (list, tuple)))
            annotations = _wrap(annotations, isinstance(annotations, Mapping))
            masks = _wrap(masks, _is_one_image(masks, mask_dimensions=2))
            class_labels = _wrap(class_labels, _is_one_image(class_labels, mask_dimensions=0))
        given = {
            "segmentation_maps": segmentation_maps,
            "annotations": annotations,
            "instance_id_to_semantic_id": instance_id_to_semantic_id,
            "masks": masks,
            "class_labels": class_labels,
        }
        for name, value in given.items():
            if value is not None and (isinstance(value, Mapping) or len(value) != count):
                raise ValueError(
                    f"{name} must be a list with one entry per image: {count} images, got {_length(value)}"
                )
        return cls(**{name: None if value is None else list(value) for name, value in given.items()})


def encode_targets(inputs: TargetInputs, index: int, rules: LabelRules, frame: Frame) -> Targets:
    """Masks and class labels of image `index`, by the kind of annotation that was given."""
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


def _wrap(value: Any, is_one_image: bool) -> Any:
    return [value] if value is not None and is_one_image else value


def _is_one_image(value: Any, mask_dimensions: int) -> bool:
    """True if the value describes one image (an array, or a list of RLE dicts or of items of so many dimensions)."""
    if not isinstance(value, (list, tuple)) or len(value) == 0:
        return True
    return isinstance(value[0], Mapping) or getattr(value[0], "ndim", np.ndim(value[0])) == mask_dimensions


def _length(value: Any) -> str:
    return "a dict" if isinstance(value, Mapping) else f"{len(value)} entries"
