"""Writes a loaded dataset as COCO: the instance form, which keeps overlap, or the panoptic form with its PNGs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import MAX_PANOPTIC_ID, MaskRuns, ids_to_panoptic_png, rles_to_runs


def to_coco_instance(data: SegmentationData) -> dict[str, Any]:
    """The content of a COCO instance JSON: every segment of every image with its own compressed run-length code.

    Reading a COCO instance JSON and writing it again gives the same images, annotations and categories; polygons have
    become codes of the same pixels, and what the schema does not hold (licences, super-categories) is gone. Stuff is
    written too, as in COCO's detection format of panoptic annotations; `isthing` tells them apart. Annotation ids are
    kept where no two segments of the dataset have the same, else all are numbered from 1. Category ids are the raw
    values of `label_spec.raw_to_label`, or the label ids where there is no such table.

    Args:
        data: a split as `load` returns it; its task does not matter, and no image is read.
    """
    category_ids = _category_ids(data.stored_label_spec)
    images, annotations = [], []
    for row in _rows(data):
        record = _image_record(row)
        images.append(record)
        size = [row["height"], row["width"]]
        annotations += [
            {
                "id": segment["id"],
                "image_id": record["id"],
                "category_id": category_ids[segment["label_id"]],
                "segmentation": {"size": size, "counts": segment["rle"]},
                "area": segment["area"],
                "bbox": _box(segment["bbox"]),
                "iscrowd": int(segment["iscrowd"]),
            }
            for segment in row["segments"]
        ]
    if len({annotation["id"] for annotation in annotations}) < len(annotations):
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
    return {
        "images": images,
        "annotations": annotations,
        "categories": _categories(data.stored_label_spec, category_ids),
    }


def to_coco_panoptic(data: SegmentationData, folder: str | Path) -> dict[str, Any]:
    """Writes one PNG of segment ids for each image to `folder` and returns the content of the COCO panoptic JSON.

    Segment ids are kept where those of an image differ and fit into a PNG, else numbered from 1; category ids are as
    in `to_coco_instance`. Pixels without a segment are void (0). Areas and boxes are those of the pixels.

    Args:
        data: a split as `load` returns it; its task does not matter, and no image is read.
        folder: is made if it does not exist; files of the same names are replaced.

    Raises:
        ValueError: two segments of an image share pixels, which this form cannot hold; the message names the image.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    category_ids = _category_ids(data.stored_label_spec)
    images, annotations = [], []
    names: set[str] = set()
    for row in _rows(data):
        record = _image_record(row)
        images.append(record)
        name = f"{Path(row['file_name']).stem}.png"
        if name in names:  # images of one name in two folders
            name = f"{len(images):06d}_{name}"
        names.add(name)
        segments = row["segments"]
        ids = _panoptic_ids([segment["id"] for segment in segments])
        size = (row["height"], row["width"])
        codes = [{"size": list(size), "counts": segment["rle"]} for segment in segments]
        runs = rles_to_runs(codes, size)
        PILImage.fromarray(ids_to_panoptic_png(_id_map(runs, ids, row["file_name"]))).save(folder / name)
        boxes, areas = runs.boxes().astype(int).tolist(), runs.areas().tolist()
        info = [
            {
                "id": segment_id,
                "category_id": category_ids[segment["label_id"]],
                "iscrowd": int(segment["iscrowd"]),
                "area": area,
                "bbox": box,
            }
            for segment_id, segment, area, box in zip(ids, segments, areas, boxes, strict=True)
        ]
        annotations.append({"image_id": record["id"], "file_name": name, "segments_info": info})
    return {
        "images": images,
        "annotations": annotations,
        "categories": _categories(data.stored_label_spec, category_ids),
    }


def _rows(data: SegmentationData) -> Iterator[dict[str, Any]]:
    return (data.row(index) for index in range(len(data)))


def _image_record(row: dict[str, Any]) -> dict[str, Any]:
    text = row["image_id"]
    number = int(text) if text.isdecimal() and str(int(text)) == text else text  # "0001" is a name, not a number
    return {"id": number, "file_name": row["file_name"], "height": row["height"], "width": row["width"]}


def _category_ids(label_spec: LabelSpec) -> dict[int, int]:
    """The category id of each label; where several raw values mean one label, the smallest."""
    if label_spec.raw_to_label is None:
        return {label: label for label in label_spec.id2label}
    ids = {label: raw for raw, label in sorted(label_spec.raw_to_label.items(), reverse=True)}
    missing = [name for label, name in label_spec.id2label.items() if label not in ids]
    if missing:
        raise ValueError(f"raw_to_label has no raw value for {', '.join(missing)}, so there is no category id")
    return ids


def _categories(label_spec: LabelSpec, category_ids: dict[int, int]) -> list[dict[str, Any]]:
    things = set(label_spec.thing_label_ids)
    return [
        {"id": category_ids[label], "name": name, "isthing": int(label in things)}
        for label, name in label_spec.id2label.items()
    ]


def _box(stored: list[float]) -> list[float]:
    """The shortest decimals that mean the stored float32 values: 100.52 and not 100.5199966."""
    return [float(str(np.float32(value))) for value in stored]


def _panoptic_ids(ids: list[int]) -> list[int]:
    fit = len(set(ids)) == len(ids) and all(0 < value <= MAX_PANOPTIC_ID for value in ids)
    return ids if fit else list(range(1, len(ids) + 1))


def _id_map(runs: MaskRuns, ids: list[int], where: str) -> np.ndarray:
    """(H, W) int64 ids; ValueError if two masks share a pixel."""
    height, width = runs.size
    order = np.argsort(runs.starts, kind="stable")
    starts, lengths = runs.starts[order], runs.lengths[order]
    owners = np.repeat(np.arange(len(ids)), np.diff(runs.offsets))[order]
    shared = np.flatnonzero(starts[1:] < starts[:-1] + lengths[:-1])
    if len(shared):
        first, second = ids[owners[shared[0]]], ids[owners[shared[0] + 1]]
        raise ValueError(
            f"{where}: segments {first} and {second} share pixels, which a panoptic PNG cannot hold; use "
            "to_coco_instance"
        )
    pixels = np.zeros(width * height, dtype=np.int64)
    inside = np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    pixels[inside] = np.repeat(np.array(ids, dtype=np.int64)[owners], lengths)
    return pixels.reshape(width, height).T
