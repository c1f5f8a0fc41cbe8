"""COCO instance files: images and one JSON with polygons or run-length codes that may overlap, and crowds."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_maskformer.data.coco_files import (
    ImageRecord,
    annotated_image,
    categories_to_spec,
    find_image,
    image_records,
    label_of,
    listed_files,
    read_coco_json,
    record_flag,
    record_integer,
    warn_repeated_ids,
    warn_unlisted,
)
from hf_maskformer.data.dataset_index import DatasetSource, files_fingerprint, path_image, readable_rows
from hf_maskformer.data.problems import DatasetError, Problems, problem_kind
from hf_maskformer.data.run_segments import stored_segment
from hf_maskformer.data.segments import kept_area, warn_box, warn_identical
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import MaskRuns, check_polygon, list_polygons, points_to_runs, rles_to_runs

READER_VERSION = 2


def coco_instance_source(images: Path, annotations: Path, problems: Problems) -> DatasetSource:
    """Opens a COCO instance JSON.

    An image without annotations is a row without segments. The segment ids are those of the annotations, the areas
    and boxes too (COCO's own areas differ from the pixel count). Reported and left out is what cannot be used: records
    that lack something, unknown images and categories, broken masks. Reported only: annotations without a pixel (left
    out), boxes that do not fit, ids and masks that stand twice, files that the JSON does not list.

    Args:
        images: folder of the image files.
        annotations: the JSON.
        problems: where to report, and whether to go on.

    Raises:
        DatasetError: the JSON cannot be used at all; in mode "raise" the first error of any kind. The message names
            the file, the annotation and the value.
    """
    content = read_coco_json(annotations)
    spec = categories_to_spec(annotations, content["categories"], default_isthing=True, problems=problems)
    files = [annotations, *listed_files(images, content["images"])]

    def rows() -> Iterator[dict[str, Any]]:
        warn_unlisted(annotations, images, content["images"], problems)
        records, broken = image_records(annotations, content["images"], problems)
        by_image = _annotations_by_image(annotations, content["annotations"], {*records, *broken}, problems)
        warn_repeated_ids(annotations, content["annotations"], problems)
        yield from readable_rows(
            list(records.values()),
            lambda record: _row(images, annotations, record, by_image[record.id], spec, problems),
            problems,
            where=annotations,
        )

    return DatasetSource(spec, rows, files_fingerprint("coco_instance", READER_VERSION, {}, files))


@dataclass
class _Mask:
    """A checked annotation; its mask is drawn together with the others of the image."""

    annotation: Mapping[str, Any]
    where: str
    id: int
    label_id: int
    iscrowd: bool
    polygons: list[np.ndarray] = field(default_factory=list)
    rle: dict[str, Any] | None = None


def _annotations_by_image(
    path: Path, annotations: Sequence[Any], image_ids: set[int | str], problems: Problems
) -> defaultdict[int | str, list[Mapping[str, Any]]]:
    by_image: defaultdict[int | str, list[Mapping[str, Any]]] = defaultdict(list)
    for position, annotation in enumerate(annotations):
        with problems.catch(path):
            image_id, record = annotated_image(path, annotation, position, image_ids)
            by_image[image_id].append(record)
    return by_image


def _row(
    images: Path,
    path: Path,
    record: ImageRecord,
    annotations: Sequence[Mapping[str, Any]],
    spec: LabelSpec,
    problems: Problems,
) -> dict[str, Any]:
    file = find_image(path, images, record)
    masks: list[_Mask] = []
    for annotation in annotations:
        with problems.catch(path):
            masks.append(_checked(path, annotation, record, spec))
    segments = _segments(path, masks, (record.height, record.width), problems)
    warn_identical(path, f"image {record.id} ({record.file_name})", segments, problems)
    return {
        "image": path_image(file),
        "image_id": str(record.id),
        "height": record.height,
        "width": record.width,
        "file_name": record.file_name,
        "segments": segments,
    }


def _checked(path: Path, annotation: Mapping[str, Any], record: ImageRecord, spec: LabelSpec) -> _Mask:
    where = f"annotation {annotation.get('id')} of image {record.id} ({record.file_name})"
    mask = _Mask(
        annotation,
        where,
        record_integer(path, annotation, "id", where),
        label_of(path, annotation, spec, where),
        record_flag(path, annotation, "iscrowd", where, default=False),
    )
    segmentation = annotation.get("segmentation")
    size = [record.height, record.width]
    try:
        if not isinstance(segmentation, dict):
            polygons = list_polygons(segmentation)
            mask.polygons = [check_polygon(polygon, index) for index, polygon in enumerate(polygons)]
        elif list(segmentation.get("size") or []) != size:
            message = f"{path}: {where}: its RLE has size {segmentation.get('size')!r:.80}, the image has {size}"
            raise DatasetError("size_mismatch", path, message)
        else:
            mask.rle = segmentation
    except DatasetError:
        raise
    except (TypeError, ValueError) as error:
        raise DatasetError("broken_mask", path, f"{path}: {where}: {error}") from error
    return mask


def _segments(path: Path, masks: Sequence[_Mask], size: tuple[int, int], problems: Problems) -> list[dict[str, Any]]:
    """The stored segments of an image; those without pixels are reported and left out."""
    drawn = [mask for mask in masks if mask.rle is None]
    points = [polygon for mask in drawn for polygon in mask.polygons]
    segments: dict[int, dict[str, Any]] = {}
    for group, runs in (
        (drawn, points_to_runs(points, [len(mask.polygons) for mask in drawn], *size)),
        _decoded(path, [mask for mask in masks if mask.rle is not None], size, problems),
    ):
        texts = _texts(group, runs)
        for mask, text, pixels, box in zip(group, texts, runs.areas().tolist(), runs.boxes().tolist(), strict=True):
            if pixels == 0:
                message = f"{path}: {mask.where} has a mask without a pixel and is left out"
                problems.warning("empty_mask", path, message)
                continue
            segments[id(mask)] = _segment(path, mask, text, pixels, box, size, problems)
    return [segments[id(mask)] for mask in masks if id(mask) in segments]


def _decoded(
    path: Path, masks: Sequence[_Mask], size: tuple[int, int], problems: Problems
) -> tuple[Sequence[_Mask], MaskRuns]:
    """The masks that have a sound run-length code, and their runs."""
    try:
        return masks, rles_to_runs([mask.rle or {} for mask in masks], size)
    except (TypeError, ValueError):  # one of them is broken: find it
        sound = []
        for mask in masks:
            with problems.catch(path), problem_kind("broken_mask", path):
                try:
                    rles_to_runs([mask.rle or {}])
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{path}: {mask.where}: {error}") from error
                sound.append(mask)
        return sound, rles_to_runs([mask.rle or {} for mask in sound], size)


def _texts(masks: Sequence[_Mask], runs: MaskRuns) -> list[str]:
    """The stored codes; a compressed code of the file stays as it stands."""
    given = [mask.rle.get("counts") if mask.rle else None for mask in masks]
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) == len(masks):
        return texts
    made = [code["counts"] for code in runs.rles()]
    return [own if isinstance(own, str) else text for own, text in zip(given, made, strict=True)]


def _segment(
    path: Path,
    mask: _Mask,
    text: str,
    pixels: int,
    box: list[float],
    size: tuple[int, int],
    problems: Problems,
) -> dict[str, Any]:
    area = kept_area(mask.annotation.get("area", pixels), pixels, path, mask.where, problems)
    if "bbox" in mask.annotation:
        box = warn_box(path, mask.where, mask.annotation["bbox"], box, size, problems, mask.polygons)
    return stored_segment(mask.id, mask.label_id, mask.iscrowd, area, box, text)
