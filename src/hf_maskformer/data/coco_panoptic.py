"""COCO panoptic files: images, one JSON, and one PNG for each image whose colours are segment ids.

Format: Kirillov et al., "Panoptic Segmentation" (CVPR 2019); id = R + 256 G + 256^2 B.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image as PILImage

from hf_maskformer.data.coco_files import (
    categories_to_spec,
    find_image,
    images_by_id,
    label_of,
    read_coco_json,
    warn_unlisted,
)
from hf_maskformer.data.dataset_index import files_fingerprint, indexed_dataset, path_image, readable_rows
from hf_maskformer.data.sample import make_segment
from hf_maskformer.model.image_conversion import UnreadableImageError
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import panoptic_png_to_ids

READER_VERSION = 1


def load_coco_panoptic(
    images: Path, annotations: Path, maps: Path, cache_dir: str | Path | None = None, on_bad_sample: str = "raise"
) -> tuple[Dataset, LabelSpec]:
    """Rows and labels of a COCO panoptic JSON with its PNG files.

    Pixels whose id is not in segments_info are void: no segment holds them.

    Args:
        images: folder of the image files.
        annotations: the JSON.
        maps: folder of the PNG files.
        cache_dir: where the rows are stored; None = the cache of `datasets`.
        on_bad_sample: "raise" for an unreadable file, or "skip": log it and leave the row out.

    Raises:
        ValueError: an unknown category or image id, a missing file, sizes that differ, an id of segments_info that
            stands twice or has no pixel; the message names the file and the value.
    """
    content = read_coco_json(annotations)
    spec = categories_to_spec(annotations, content["categories"], default_isthing=None)
    records = images_by_id(annotations, content["images"])
    files = [images / record["file_name"] for record in content["images"]]
    files += [maps / annotation["file_name"] for annotation in content["annotations"]]
    present = [annotations, *(file for file in files if file.is_file())]
    fingerprint = files_fingerprint("coco_panoptic", READER_VERSION, {"on_bad_sample": on_bad_sample}, present)

    def rows() -> Iterator[dict[str, Any]]:
        warn_unlisted(annotations, images, content["images"])
        _check_one_each(annotations, records, content["annotations"])
        yield from readable_rows(
            content["annotations"],
            lambda annotation: _row(images, annotations, maps, records[annotation["image_id"]], annotation, spec),
            on_bad_sample,
            where=annotations,
        )

    return indexed_dataset(rows, fingerprint, cache_dir), spec


def _check_one_each(path: Path, records: Mapping[int, Any], annotations: list[Mapping[str, Any]]) -> None:
    """Every image has exactly one annotation."""
    annotated = [annotation["image_id"] for annotation in annotations]
    unknown = [value for value in annotated if value not in records]
    if unknown:
        raise ValueError(f"{path}: an annotation has image_id {unknown[0]}, which is not in images")
    if len(set(annotated)) != len(annotated):
        repeated = next(value for value in annotated if annotated.count(value) > 1)
        raise ValueError(f"{path}: image {repeated} has more than one annotation")
    missing = sorted(set(records) - set(annotated))
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} image(s) have no annotation, such as {records[missing[0]]['file_name']}"
        )


def _row(
    images: Path,
    path: Path,
    maps: Path,
    record: Mapping[str, Any],
    annotation: Mapping[str, Any],
    spec: LabelSpec,
) -> dict[str, Any]:
    file, height, width = find_image(path, images, record)
    png = maps / annotation["file_name"]
    ids = _read_ids(png)
    if ids.shape != (height, width):
        raise ValueError(
            f"{png} is {ids.shape[1]}x{ids.shape[0]} (width x height), but its image {file} is {width}x{height}"
        )
    return {
        "image": path_image(file),
        "image_id": str(record["id"]),
        "height": height,
        "width": width,
        "file_name": str(record["file_name"]),
        "segments": _segments(path, png, ids, annotation, spec),
    }


def _read_ids(png: Path) -> np.ndarray:
    """(H, W) int32 ids of a panoptic PNG, in column order in memory."""
    try:
        with PILImage.open(png) as image:
            image.load()
            mode, colours = image.mode, np.asarray(image)
    except FileNotFoundError:
        raise ValueError(f"{png}: no such panoptic PNG") from None
    except (OSError, SyntaxError, PILImage.DecompressionBombError) as error:
        raise UnreadableImageError(f"{png}: cannot be read as an image, it is damaged or cut off ({error})") from error
    if mode not in ("RGB", "RGBA"):
        raise ValueError(f"{png}: a panoptic PNG must be RGB (id = R + 256 G + 256^2 B), this one is of mode {mode}")
    return np.asfortranarray(panoptic_png_to_ids(colours[..., :3]))


def _segments(
    path: Path, png: Path, ids: np.ndarray, annotation: Mapping[str, Any], spec: LabelSpec
) -> list[dict[str, Any]]:
    found = set(np.unique(ids).tolist())
    segments: list[dict[str, Any]] = []
    seen: set[int] = set()
    for info in annotation["segments_info"]:
        segment_id = int(info["id"])
        where = f"segment {segment_id} of {png.name}"
        label_id = label_of(path, info, spec, where)
        if segment_id in seen:
            raise ValueError(f"{path}: {where} stands twice in segments_info")
        if segment_id == 0 or segment_id not in found:
            problem = "id 0 is void" if segment_id == 0 else "the PNG has no pixel of this id"
            raise ValueError(f"{path}: {where} is in segments_info, but {problem}")
        seen.add(segment_id)
        iscrowd = bool(info.get("iscrowd", 0))
        segments.append(make_segment(segment_id, label_id, ids == segment_id, iscrowd))
    return segments
