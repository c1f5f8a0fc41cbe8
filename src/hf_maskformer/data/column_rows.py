"""Rows of `sample.FEATURES` from rows of a `datasets` data set, once it is known which column holds what.

Five kinds of truth: a semantic map, a panoptic map with segments_info, an instance map, COCO objects, mask images.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_maskformer.data.coco_files import record_flag, record_integer
from hf_maskformer.data.column_classes import ColumnClasses, found_values
from hf_maskformer.data.column_images import image_name, stored_image, stored_pixels, stored_size
from hf_maskformer.data.columns import CATEGORY_FIELDS, SEGMENTATION_FIELDS, Columns
from hf_maskformer.data.problems import DatasetError, Problems, problem_kind
from hf_maskformer.data.run_segments import runs_to_segments, stored_segment
from hf_maskformer.data.segments import kept_area, warn_box, warn_identical
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import id_map_to_runs, panoptic_png_to_ids, rle_area, rle_bbox, segmentation_to_rle

INSTANCES_PER_CLASS = 256  # the instance number of the R = class, G = instance coding is one byte

Size = tuple[int, int]
Segments = list[dict[str, Any]]


@dataclass(frozen=True)
class ColumnRows:
    """Callable (raw row, its number or name, problems) -> row of `FEATURES`.

    Attributes:
        columns: which column holds what.
        classes: what its class numbers mean.
        where: the data set and its split, for messages.
    """

    columns: Columns
    classes: ColumnClasses
    where: str

    def __call__(self, raw: Mapping[str, Any], number: int | str, problems: Problems) -> dict[str, Any]:
        name = f"{self.where} row {number}"
        cell, where = self.cell(raw, "image", name)
        image = stored_image(cell, where)
        size = stored_size(image, where)
        file_name, image_id = (raw.get(self.columns.roles.get(role, "")) for role in ("file_name", "image_id"))
        return {
            "image": image,
            "image_id": str(number if image_id is None else image_id),
            "height": size[0],
            "width": size[1],
            "file_name": str(file_name or image_name(cell, name)),
            "segments": SEGMENTS[self.columns.kind](self, raw, size, name, problems),
        }

    def cell(self, raw: Mapping[str, Any], role: str, name: str) -> tuple[Any, str]:
        """The value of a role's column, and its name for messages; DatasetError where the row lacks the column."""
        column = self.columns.roles[role]
        where = f"{name} ({column})"
        if column not in raw:
            raise DatasetError("broken_record", where, f"{name}: has no column {column!r}")
        return raw[column], where

    def pixels(self, raw: Mapping[str, Any], role: str, size: Size, name: str) -> tuple[np.ndarray, str]:
        """The pixels of a map of the image's size, and its name."""
        cell, where = self.cell(raw, role, name)
        return checked_size(stored_pixels(cell, where), size, where), where


def checked_size(values: np.ndarray, size: Size, where: str) -> np.ndarray:
    """The pixels if they are of the image's (H, W)."""
    if values.shape[:2] != size:
        message = (
            f"{where} is {values.shape[1]}x{values.shape[0]} (width x height), but its image is {size[1]}x{size[0]}"
        )
        raise DatasetError("size_mismatch", where, message)
    return values


def records_of(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of dicts, or a dict of lists (as `datasets` also stores them), as a list of dicts."""
    if value is None:
        return []
    if not isinstance(value, Mapping):
        for place, record in enumerate(value):
            if not isinstance(record, Mapping):
                raise DatasetError("broken_record", where, f"{where}: record {place} of the list is {record!r:.80}")
        return [dict(record) for record in value]
    columns = {name: column for name, column in value.items() if column is not None}
    for name, column in columns.items():
        if not isinstance(column, list):
            message = f"{where}: {name} is {column!r:.80}, it must be a list with a value for each segment"
            raise DatasetError("broken_record", where, message)
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DatasetError("broken_record", where, f"{where}: its lists have different lengths, {lengths}")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def field_of(record: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first of the named fields that the record has a value for, or None."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def whole_number(record: Mapping[str, Any], key: str, where: str, name: str) -> int:
    """A whole number of a record, which may be a text of digits; DatasetError if it is missing or something else."""
    value = record.get(key)
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    return record_integer(Path(where), {key: number}, key, name)


def flag_of(record: Mapping[str, Any], names: Iterable[str], where: str, name: str) -> bool:
    """0 or 1 of the first of the named fields that has a value, False where none has; DatasetError otherwise."""
    key = next((key for key in names if record.get(key) is not None), "")
    return record_flag(Path(where), record, key, name, default=False)


def segment_ids(values: np.ndarray) -> np.ndarray:
    """(H, W) ids of a map with one channel, or with the panoptic colour code."""
    return panoptic_png_to_ids(values) if values.ndim == 3 else values


def map_segments(ids: np.ndarray, chosen: Sequence[int], fields: Sequence[Mapping[str, Any]]) -> Segments:
    """The segments of an id map for the chosen ids, each with its fields id, label_id and iscrowd."""
    segment_ids, label_ids, crowds = ([field[key] for field in fields] for key in ("id", "label_id", "iscrowd"))
    return runs_to_segments(id_map_to_runs(ids, chosen), segment_ids, label_ids, crowds)


def _semantic_segments(
    rows: ColumnRows, raw: Mapping[str, Any], size: Size, name: str, problems: Problems
) -> Segments:
    values, where = rows.pixels(raw, "semantic_map", size, name)
    labels = rows.classes.labels_of_map(values, where, problems)
    found = [label for label in found_values(labels).tolist() if label != rows.classes.label_spec.ignore_index]
    # Segment id 0 would be void.
    return map_segments(labels, found, [{"id": label + 1, "label_id": label, "iscrowd": False} for label in found])


def _panoptic_segments(
    rows: ColumnRows, raw: Mapping[str, Any], size: Size, name: str, problems: Problems
) -> Segments:
    values, where = rows.pixels(raw, "panoptic_map", size, name)
    ids = segment_ids(values)
    cell, listed = rows.cell(raw, "segments_info", name)
    found = set(found_values(ids).tolist()) - {0}
    fields: dict[int, dict[str, Any]] = {}
    named: set[int] = set()
    for place, record in enumerate(records_of(cell, listed)):
        with problems.catch(listed):
            segment_id = whole_number(record, "id", listed, f"segment {place} of the list")
            if segment_id in named:
                raise DatasetError("duplicate", listed, f"{listed}: segment {segment_id} stands twice")
            named.add(segment_id)
            label = rows.classes.label(field_of(record, CATEGORY_FIELDS), f"{listed}: segment {segment_id}")
            if segment_id not in found:
                problem = "id 0 is void" if segment_id == 0 else f"{where} has no pixel of this id"
                raise DatasetError("empty_mask", listed, f"{listed}: segment {segment_id} is listed, but {problem}")
            iscrowd = flag_of(record, ("iscrowd",), listed, f"segment {segment_id}")
            fields[segment_id] = {"id": segment_id, "label_id": label, "iscrowd": iscrowd}
    with problems.catch(where):
        unlisted = sorted(found - named)
        if unlisted:
            message = f"{where}: {len(unlisted)} id(s) are not in segments_info, such as {unlisted[0]}"
            raise DatasetError("unlisted_segment", where, message)
    return map_segments(ids, list(fields), list(fields.values()))


def _instance_segments(
    rows: ColumnRows, raw: Mapping[str, Any], size: Size, name: str, problems: Problems
) -> Segments:
    """Objects of an instance map; what lies outside of them is one segment for each class, a crowd for things."""
    values, where = rows.pixels(raw, "instance_map", size, name)
    spec = rows.classes.label_spec
    if "semantic_map" in rows.columns.roles:
        classes, classes_where = rows.pixels(raw, "semantic_map", size, name)
        labels = rows.classes.labels_of_map(classes, classes_where, problems)
        objects = segment_ids(values).astype(np.int64)
    else:
        classes, numbers = class_and_instance(values, where)
        labels = rows.classes.labels_of_map(classes, where, problems)
        # An instance number counts within its class.
        inside = (numbers > 0) & (labels != spec.ignore_index)
        objects = np.where(inside, labels * INSTANCES_PER_CLASS + numbers, 0)
    label_under: dict[int, int] = {}
    for object_id, found in labels_of_objects(objects, labels, spec).items():
        with problems.catch(where):
            if len(found) != 1:
                names = ", ".join(repr(spec.id2label[label]) for label in found) or "no class"
                message = f"{where}: object {object_id} lies on {names}; it must lie on one class"
                raise DatasetError("broken_record", where, message)
            label_under[object_id] = found[0]
    rest = np.where(objects == 0, labels, spec.ignore_index)
    outside = [label for label in found_values(rest).tolist() if label != spec.ignore_index]
    fields = [
        {"id": number, "label_id": label, "iscrowd": number > len(label_under) and label in spec.thing_label_ids}
        for number, label in enumerate([*label_under.values(), *outside], start=1)
    ]
    inner, outer = fields[: len(label_under)], fields[len(label_under) :]
    return map_segments(objects, list(label_under), inner) + map_segments(rest, outside, outer)


def class_and_instance(values: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """(class numbers, instance numbers) of the coding R = class, G = instance of transformers' example scripts."""
    if values.ndim != 3 or values[..., 2].any():
        found = "one channel" if values.ndim != 3 else "values in the third channel"
        message = (
            f"{where}: an instance map without a semantic_map must be RGB with R = class, G = instance and B = 0, "
            f"but this one has {found}"
        )
        raise DatasetError("broken_mask", where, message)
    return values[..., 0], values[..., 1].astype(np.int64)


def labels_of_objects(objects: np.ndarray, labels: np.ndarray, spec: LabelSpec) -> dict[int, list[int]]:
    """Object id -> the labels that its pixels lie on; 0 is no object, and void pixels of an object do not count."""
    void = spec.num_labels
    pairs = objects * (void + 1) + np.where(labels == spec.ignore_index, void, labels)
    found: dict[int, list[int]] = {}
    for pair in found_values(pairs).tolist():
        object_id, label = divmod(pair, void + 1)
        if object_id:
            found.setdefault(object_id, []).extend([label] if label != void else [])
    return found


def _object_segments(rows: ColumnRows, raw: Mapping[str, Any], size: Size, name: str, problems: Problems) -> Segments:
    cell, where = rows.cell(raw, "objects", name)
    segments: Segments = []
    ids: set[int] = set()
    for place, record in enumerate(records_of(cell, where)):
        with problems.catch(where):
            segment = _object_segment(rows, record, place, size, where, problems)
            if segment is None:
                continue
            if segment["id"] in ids:
                problems.warning("duplicate", where, f"{where}: object id {segment['id']} stands twice")
            ids.add(segment["id"])
            segments.append(segment)
    warn_identical(Path(where), "its objects", segments, problems)
    return segments


def _object_segment(
    rows: ColumnRows, record: Mapping[str, Any], place: int, size: Size, where: str, problems: Problems
) -> dict[str, Any] | None:
    """The stored segment, or None for an object without pixels."""
    no_id = record.get("id") is None
    object_id = place + 1 if no_id else whole_number(record, "id", where, f"object {place} of the list")
    object_name = f"object {object_id}"
    label = rows.classes.label(field_of(record, CATEGORY_FIELDS), f"{where}: {object_name}")
    with problem_kind("broken_mask", where):
        rle = object_rle(field_of(record, SEGMENTATION_FIELDS), size, f"{where}: {object_name}")
    pixels = rle_area(rle)
    if pixels == 0:
        problems.warning("empty_mask", where, f"{where}: {object_name} has a mask without a pixel and is left out")
        return None
    box = rle_bbox(rle)
    if record.get("bbox") is not None:
        box = warn_box(Path(where), object_name, record["bbox"], box, size, problems)
    # Arrow fills fields that a record lacks with null: here it is no value, where a JSON file's null is a wrong one.
    stored_area = record.get("area")
    area = kept_area(pixels if stored_area is None else stored_area, pixels, where, object_name, problems)
    iscrowd = flag_of(record, ("iscrowd", "is_crowd"), where, object_name)
    return stored_segment(object_id, label, iscrowd, area, box, rle["counts"])


def object_rle(segmentation: Any, size: Size, where: str) -> dict[str, Any]:
    """Polygons (also one flat polygon), an RLE dict or RLE counts alone, as a compressed code of the image's size.

    Raises:
        ValueError: the message begins with `where`.
    """
    if isinstance(segmentation, (str, bytes)):
        segmentation = {"size": list(size), "counts": segmentation}
    if isinstance(segmentation, list) and segmentation and not isinstance(segmentation[0], list):
        segmentation = [segmentation]
    try:
        return segmentation_to_rle(segmentation, *size)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _mask_segments(rows: ColumnRows, raw: Mapping[str, Any], size: Size, name: str, problems: Problems) -> Segments:
    cells, where = rows.cell(raw, "masks", name)
    classes, classes_where = rows.cell(raw, "labels", name)
    cells, classes = cells or [], classes or []
    if len(cells) != len(classes):
        message = f"{where} has {len(cells)} masks, but {classes_where} {len(classes)} labels"
        raise DatasetError("broken_record", where, message)
    segments: Segments = []
    for number, (cell, value) in enumerate(zip(cells, classes, strict=True), start=1):
        mask_name = f"{where} mask {number}"
        # "skip" leaves the whole row out: without its mask an object would be learned as background.
        with problems.catch(where) if problems.mode == "list" else nullcontext():
            field = {"id": number, "label_id": rows.classes.label(value, mask_name), "iscrowd": False}
            pixels = checked_size(stored_pixels(cell, mask_name), size, mask_name)
            mask = (pixels if pixels.ndim == 2 else pixels.any(axis=-1)) != 0
            if mask.any():
                segments += map_segments(mask, [1], [field])
            else:
                problems.warning("empty_mask", where, f"{mask_name} has no pixel and is left out")
    warn_identical(Path(where), "its masks", segments, problems)
    return segments


SEGMENTS: dict[str, Callable[[ColumnRows, Mapping[str, Any], Size, str, Problems], Segments]] = {
    "semantic": _semantic_segments,
    "panoptic": _panoptic_segments,
    "instance_map": _instance_segments,
    "objects": _object_segments,
    "masks": _mask_segments,
}
