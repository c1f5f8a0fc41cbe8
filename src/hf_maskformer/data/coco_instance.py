"""COCO instance files: images and one JSON with polygons or run-length codes that may overlap, and crowds."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_maskformer.data.coco_files import (
    categories_to_spec,
    find_image,
    images_by_id,
    label_of,
    read_coco_json,
    warn_unlisted,
)
from hf_maskformer.data.dataset_index import files_fingerprint, indexed_dataset, path_image, readable_rows
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import encode_rle, rle_area, rle_bbox, segmentation_to_mask

READER_VERSION = 1

logger = logging.getLogger(__name__)


def load_coco_instance(
    images: Path, annotations: Path, cache_dir: str | Path | None = None, on_bad_sample: str = "raise"
) -> tuple[Dataset, LabelSpec]:
    """Rows and labels of a COCO instance JSON.

    An image without annotations is a row without segments. An annotation whose mask has no pixel is left out with a
    warning. The segment ids are those of the annotations, the areas too (COCO's own differ from the pixel count).

    Args:
        images: folder of the image files.
        annotations: the JSON.
        cache_dir: where the rows are stored; None = the cache of `datasets`.
        on_bad_sample: "raise" for an unreadable file, or "skip": log it and leave the row out.

    Raises:
        ValueError: unknown image or category ids, a missing file, a size that differs, a broken mask; the message
            names the file, the annotation and the value.
    """
    content = read_coco_json(annotations)
    spec = categories_to_spec(annotations, content["categories"], default_isthing=True)
    records = images_by_id(annotations, content["images"])
    by_image = _annotations_by_image(annotations, content["annotations"], records)
    files = [images / record["file_name"] for record in content["images"]]
    present = [annotations, *(file for file in files if file.is_file())]
    fingerprint = files_fingerprint("coco_instance", READER_VERSION, {"on_bad_sample": on_bad_sample}, present)

    def rows() -> Iterator[dict[str, Any]]:
        warn_unlisted(annotations, images, content["images"])
        yield from readable_rows(
            list(records.values()),
            lambda record: _row(images, annotations, record, by_image[record["id"]], spec),
            on_bad_sample,
            where=annotations,
        )

    return indexed_dataset(rows, fingerprint, cache_dir), spec


def _annotations_by_image(
    path: Path, annotations: Sequence[Mapping[str, Any]], records: Mapping[int, Any]
) -> defaultdict[int, list[Mapping[str, Any]]]:
    by_image: defaultdict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        if annotation.get("image_id") not in records:
            raise ValueError(
                f"{path}: annotation {annotation.get('id')} has image_id {annotation.get('image_id')}, "
                f"which is not in images"
            )
        by_image[annotation["image_id"]].append(annotation)
    return by_image


def _row(
    images: Path, path: Path, record: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], spec: LabelSpec
) -> dict[str, Any]:
    file, height, width = find_image(path, images, record)
    segments = [_segment(path, annotation, height, width, spec) for annotation in annotations]
    return {
        "image": path_image(file),
        "image_id": str(record["id"]),
        "height": height,
        "width": width,
        "file_name": str(record["file_name"]),
        "segments": [segment for segment in segments if segment is not None],
    }


def _segment(
    path: Path, annotation: Mapping[str, Any], height: int, width: int, spec: LabelSpec
) -> dict[str, Any] | None:
    """The stored segment, or None for an annotation without pixels."""
    where = f"annotation {annotation.get('id')} of image {annotation['image_id']}"
    label_id = label_of(path, annotation, spec, where)
    try:
        rle = _compressed(annotation.get("segmentation"), height, width)
        pixels = rle_area(rle)
    except ValueError as error:
        raise ValueError(f"{path}: {where}: {error}") from error
    if pixels == 0:
        logger.warning("%s: %s has a mask without a pixel and is left out", path, where)
        return None
    return {
        "id": int(annotation["id"]),
        "label_id": label_id,
        "iscrowd": bool(annotation.get("iscrowd", 0)),
        "area": float(annotation.get("area", pixels)),
        "bbox": [float(value) for value in annotation.get("bbox", rle_bbox(rle))],
        "rle": rle["counts"],
    }


def _compressed(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """The segmentation as a compressed code; one that already is stays as it stands."""
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), str):
        if list(segmentation.get("size", [])) != [height, width]:
            raise ValueError(f"its RLE has size {segmentation.get('size')}, the image has {[height, width]}")
        return segmentation
    return encode_rle(segmentation_to_mask(segmentation, height, width))
