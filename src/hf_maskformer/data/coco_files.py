"""What COCO instance and COCO panoptic files have in common: the JSON, the categories and the image records.

Format: Lin et al., "Microsoft COCO: Common Objects in Context" (ECCV 2014), and cocodataset.org.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_maskformer.data.sample import check_image_size
from hf_maskformer.model.label_spec import LabelSpec

logger = logging.getLogger(__name__)


def read_coco_json(path: Path) -> dict[str, Any]:
    """The parsed file; ValueError names the file and what it lacks."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be an object with images, annotations and categories")
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(content.get(key), list)]
    if missing:
        raise ValueError(f"{path}: has no list {', '.join(missing)}; keys found: {', '.join(content) or 'none'}")
    if not content["images"]:
        raise ValueError(f"{path}: its list of images is empty")
    return content


def categories_to_spec(path: Path, categories: Iterable[Mapping[str, Any]], default_isthing: bool | None) -> LabelSpec:
    """Labels 0..K-1 in the order of the category ids, so that all splits agree; `raw_to_label` maps those ids.

    Args:
        path: named in messages.
        categories: COCO records with id, name and isthing.
        default_isthing: for categories without isthing; None makes that an error.
    """
    ordered = sorted(categories, key=lambda category: int(category["id"]))
    ids = [int(category["id"]) for category in ordered]
    repeated = sorted({value for value in ids if ids.count(value) > 1})
    if repeated:
        raise ValueError(f"{path}: category id {repeated[0]} stands twice in categories")
    things = []
    for label, category in enumerate(ordered):
        isthing = category.get("isthing", default_isthing)
        if isthing is None:
            raise ValueError(f"{path}: category {category['id']} ({category.get('name')}) has no isthing (0 or 1)")
        if isthing:
            things.append(label)
    names = {label: str(category.get("name", category["id"])) for label, category in enumerate(ordered)}
    # A void value that can be no label: 255 as everywhere, or beyond the labels where there are more than 255.
    ignore_index = 255 if len(names) <= 255 else 65535
    raw_to_label = {raw: label for label, raw in enumerate(ids)}
    try:
        return LabelSpec(names, tuple(things), ignore_index=ignore_index, raw_to_label=raw_to_label)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def label_of(path: Path, record: Mapping[str, Any], spec: LabelSpec, where: str) -> int:
    """Label id of an annotation or segment record."""
    assert spec.raw_to_label is not None
    raw = record.get("category_id")
    if raw not in spec.raw_to_label:
        allowed = sorted(spec.raw_to_label)
        shown = ", ".join(map(str, allowed[:20])) + (", ..." if len(allowed) > 20 else "")
        raise ValueError(f"{path}: {where} has category_id {raw}, which is not in categories, allowed: {shown}")
    return spec.raw_to_label[raw]


def images_by_id(path: Path, images: Iterable[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Image records by their id; ValueError names an id that stands twice."""
    records: dict[int, Mapping[str, Any]] = {}
    for record in images:
        if record["id"] in records:
            raise ValueError(f"{path}: image id {record['id']} stands twice in images")
        records[record["id"]] = record
    return records


def find_image(path: Path, folder: Path, record: Mapping[str, Any]) -> tuple[Path, int, int]:
    """(file, height, width) of an image record, checked against the file's header."""
    image = folder / record["file_name"]
    if not image.is_file():
        raise ValueError(f"{path}: image {record['id']} is {record['file_name']}, which is not in {folder}")
    size = (int(record["height"]), int(record["width"]))
    check_image_size(image, size, f"image {record['id']} of {path}")
    return image, *size


def warn_unlisted(path: Path, folder: Path, images: Iterable[Mapping[str, Any]]) -> None:
    """Logs how many files of the folder the JSON does not list: they are not used."""
    listed = {record["file_name"] for record in images}
    unlisted = [
        file.name
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name not in listed and not file.name.startswith(".")
    ]
    if unlisted:
        logger.warning("%s: %d file(s) are not listed in %s, such as %s", folder, len(unlisted), path, unlisted[0])
