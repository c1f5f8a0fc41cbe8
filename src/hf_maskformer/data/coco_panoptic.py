"""COCO panoptic files: images, one JSON, and one PNG for each image whose colours are segment ids.

Format: Kirillov et al., "Panoptic Segmentation" (CVPR 2019); id = R + 256 G + 256^2 B.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from hf_maskformer.data.coco_files import (
    ImageRecord,
    annotated_image,
    categories_to_spec,
    file_name_of,
    find_image,
    image_records,
    label_of,
    listed_files,
    read_coco_json,
    record_flag,
    record_integer,
    warn_unlisted,
)
from hf_maskformer.data.dataset_index import DatasetSource, files_fingerprint, path_image, readable_rows
from hf_maskformer.data.problems import DatasetError, Problems
from hf_maskformer.data.run_segments import stored_segment
from hf_maskformer.data.segments import warn_box
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import MAX_PANOPTIC_ID, id_map_to_runs

READER_VERSION = 2
LISTED_IDS = 5  # unknown ids that a message writes out


def coco_panoptic_source(images: Path, annotations: Path, maps: Path, problems: Problems) -> DatasetSource:
    """Opens a COCO panoptic JSON with its PNG files.

    Id 0 is void. Reported and left out is what cannot be used: records that lack something, unknown images and
    categories, ids of segments_info that stand twice or have no pixel, PNGs that are missing, damaged or of another
    size or mode. Ids of a PNG that segments_info lacks are reported as errors and become void where reading goes on.
    Reported only: boxes that do not fit, files that the JSON does not list.

    Args:
        images: folder of the image files.
        annotations: the JSON.
        maps: folder of the PNG files.
        problems: where to report, and whether to go on.

    Raises:
        DatasetError: the JSON cannot be used at all; in mode "raise" the first error of any kind. The message names
            the file and the value.
    """
    content = read_coco_json(annotations)
    spec = categories_to_spec(annotations, content["categories"], default_isthing=None, problems=problems)
    files = [annotations, *listed_files(images, content["images"]), *listed_files(maps, content["annotations"])]

    def rows() -> Iterator[dict[str, Any]]:
        warn_unlisted(annotations, images, content["images"], problems)
        warn_unlisted(annotations, maps, content["annotations"], problems)
        records, broken = image_records(annotations, content["images"], problems)
        pairs = _annotated(annotations, records, broken, content["annotations"], problems)
        yield from readable_rows(
            pairs,
            lambda pair: _row(images, annotations, maps, *pair, spec, problems),
            problems,
            where=annotations,
        )

    return DatasetSource(spec, rows, files_fingerprint("coco_panoptic", READER_VERSION, {}, files))


def _annotated(
    path: Path,
    records: Mapping[int | str, ImageRecord],
    broken: set[int | str],
    annotations: Sequence[Any],
    problems: Problems,
) -> list[tuple[ImageRecord, Mapping[str, Any]]]:
    """Each image record with its one annotation, in the order of the annotations."""
    seen: set[int | str] = set()
    image_ids = {*records, *broken}
    pairs = []
    for position, annotation in enumerate(annotations):
        with problems.catch(path):
            image_id, record = annotated_image(path, annotation, position, image_ids)
            if image_id in seen:
                raise DatasetError("duplicate", path, f"{path}: image {image_id} has more than one annotation")
            seen.add(image_id)
            if image_id in records:
                pairs.append((records[image_id], _checked(path, record, records[image_id])))
    missing = [record.file_name for image_id, record in records.items() if image_id not in seen]
    for name in missing:
        with problems.catch(path):
            message = f"{path}: {len(missing)} image(s) have no annotation, such as {name}"
            raise DatasetError("broken_record", path, message)
    return pairs


def _checked(path: Path, annotation: Mapping[str, Any], record: ImageRecord) -> Mapping[str, Any]:
    where = f"the annotation of image {record.id} ({record.file_name})"
    file_name_of(path, annotation, where)
    if not isinstance(annotation.get("segments_info"), list):
        raise DatasetError("broken_record", path, f"{path}: {where} has no list segments_info")
    return annotation


def _row(
    images: Path,
    path: Path,
    maps: Path,
    record: ImageRecord,
    annotation: Mapping[str, Any],
    spec: LabelSpec,
    problems: Problems,
) -> dict[str, Any]:
    file = find_image(path, images, record)
    png = maps / annotation["file_name"]
    ids = _read_ids(png)
    if ids.shape != (record.height, record.width):
        size = f"{ids.shape[1]}x{ids.shape[0]} (width x height)"
        message = f"{png} is {size}, but its image {file} is {record.width}x{record.height}"
        raise DatasetError("size_mismatch", png, message)
    return {
        "image": path_image(file),
        "image_id": str(record.id),
        "height": record.height,
        "width": record.width,
        "file_name": record.file_name,
        "segments": _segments(path, png, ids, annotation["segments_info"], spec, problems),
    }


def _read_ids(png: Path) -> np.ndarray:
    """(H, W) int32 ids of a panoptic PNG."""
    try:
        with PILImage.open(png) as image:
            image.load()
            mode = image.mode
            colours = np.ascontiguousarray(image.convert("RGBX") if mode == "RGB" else image)
    except FileNotFoundError:
        raise DatasetError("missing_file", png, f"{png}: no such panoptic PNG") from None
    except (OSError, SyntaxError, PILImage.DecompressionBombError) as error:
        message = f"{png}: cannot be read as an image, it is damaged or cut off ({error})"
        raise DatasetError("unreadable_file", png, message) from error
    if mode not in ("RGB", "RGBA"):
        message = f"{png}: a panoptic PNG must be RGB (id = R + 256 G + 256^2 B), this one is of mode {mode}"
        raise DatasetError("unreadable_file", png, message)
    return (colours.view("<u4")[..., 0] & MAX_PANOPTIC_ID).astype(np.int32)


def _segments(
    path: Path, png: Path, ids: np.ndarray, infos: Sequence[Any], spec: LabelSpec, problems: Problems
) -> list[dict[str, Any]]:
    described: dict[int, Mapping[str, Any]] = {}
    labels: dict[int, int] = {}
    for position, info in enumerate(infos):
        with problems.catch(path):
            if not isinstance(info, Mapping):
                message = f"{path}: segment {position} of {png.name} is no object"
                raise DatasetError("broken_record", path, message)
            segment_id = record_integer(path, info, "id", f"segment {position} of {png.name}")
            where = f"segment {segment_id} of {png.name}"
            if segment_id in described:
                raise DatasetError("duplicate", path, f"{path}: {where} stands twice in segments_info")
            if segment_id == 0:
                raise DatasetError("broken_record", path, f"{path}: {where} is in segments_info, but id 0 is void")
            described[segment_id] = info
            record_flag(path, info, "iscrowd", where, default=False)
            labels[segment_id] = label_of(path, info, spec, where)
    return _measured(path, png, ids, described, labels, problems)


def _measured(
    path: Path,
    png: Path,
    ids: np.ndarray,
    described: Mapping[int, Mapping[str, Any]],
    labels: Mapping[int, int],
    problems: Problems,
) -> list[dict[str, Any]]:
    """The stored segments of an id map, after the pixels were compared with what is described."""
    runs = id_map_to_runs(ids, [*described, 0])  # the last one is void
    texts, areas, boxes = [code["counts"] for code in runs.rles()], runs.areas().tolist(), runs.boxes().tolist()
    segments = []
    for (segment_id, info), text, pixels, box in zip(described.items(), texts, areas, boxes, strict=False):
        if segment_id not in labels:
            continue
        where = f"segment {segment_id} of {png.name}"
        with problems.catch(path):
            if pixels == 0:
                message = f"{path}: {where} is in segments_info, but the PNG has no pixel of this id"
                raise DatasetError("empty_mask", path, message)
            if "bbox" in info:
                warn_box(path, where, info["bbox"], box, (ids.shape[0], ids.shape[1]), problems)
            iscrowd = bool(info.get("iscrowd", 0))
            segments.append(stored_segment(segment_id, labels[segment_id], iscrowd, pixels, box, text))
    if sum(areas) < ids.size:
        with problems.catch(png):
            _refuse_unlisted(path, png, ids, list(described))
    return segments


def _refuse_unlisted(path: Path, png: Path, ids: np.ndarray, described: list[int]) -> None:
    found, pixels = np.unique(ids[~np.isin(ids, [0, *described])], return_counts=True)
    shown = ", ".join(f"{value} ({count} pixels)" for value, count in zip(found[:LISTED_IDS], pixels, strict=False))
    more = f" and {len(found) - LISTED_IDS} more" if len(found) > LISTED_IDS else ""
    message = f"{png}: has pixels of the ids {shown}{more}, which segments_info of {path} does not describe"
    raise DatasetError("unlisted_segment", png, message)
