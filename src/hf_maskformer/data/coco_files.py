"""What COCO instance and COCO panoptic files have in common: the JSON, the categories and the image records.

Format: Lin et al., "Microsoft COCO: Common Objects in Context" (ECCV 2014), and cocodataset.org.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_maskformer.data.problems import DatasetError, Problems, problem_kind
from hf_maskformer.data.sample import check_image_size
from hf_maskformer.model.label_spec import LabelSpec

MAX_INTEGER = 2**63 - 1  # what a stored row can hold
LISTED_VALUES = 20  # allowed ids that a message writes out
CITYSCAPES_ENDING = "_gtFine_leftImg8bit.png"
UNUSABLE = re.compile(r"[\0\ud800-\udfff]")  # characters that no file's name and no stored text may hold


@dataclass(frozen=True)
class ImageRecord:
    """A checked entry of a JSON's list of images."""

    id: int | str
    file_name: str
    height: int
    width: int


def read_coco_json(path: Path) -> dict[str, Any]:
    """The parsed file; DatasetError names the file and what it lacks."""
    if not path.is_file():
        raise DatasetError("missing_file", path, f"{path}: no such file")
    if path.stat().st_size == 0:
        raise DatasetError("unreadable_file", path, f"{path}: is not valid JSON (the file is empty)")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DatasetError("unreadable_file", path, f"{path}: is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        message = f"{path}: must be an object with images, annotations and categories"
        raise DatasetError("broken_record", path, message)
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(content.get(key), list)]
    if missing:
        found = ", ".join(content) or "none"
        message = f"{path}: has no list {', '.join(missing)}; keys found: {found}"
        raise DatasetError("broken_record", path, message)
    if not content["images"]:
        raise DatasetError("broken_record", path, f"{path}: its list of images is empty")
    return content


def image_file(folder: Path, name: str) -> Path:
    """The file that a record names; it may not exist.

    Cityscapes' own panoptic JSON says CITY_000000_000019_gtFine_leftImg8bit.png for the file
    CITY/CITY_000000_000019_leftImg8bit.png.
    """
    if name.endswith(CITYSCAPES_ENDING):
        stem = name.removesuffix(CITYSCAPES_ENDING)
        return folder / stem.split("_")[0] / f"{stem}_leftImg8bit.png"
    return folder / name


def listed_files(folder: Path, records: Iterable[Any]) -> list[Path]:
    """The files that records name, for a fingerprint; records without a name are passed over."""
    names = [record.get("file_name") for record in records if isinstance(record, Mapping)]
    return [image_file(folder, name) for name in names if isinstance(name, str)]


def state_of(record: Mapping[str, Any], key: str) -> str:
    """What a record holds under a key, for messages."""
    return f"has {key} {record[key]!r:.80}" if key in record else f"has no {key}"


def record_integer(path: Path, record: Mapping[str, Any], key: str, where: str, minimum: int | None = None) -> int:
    """A whole number of a record; DatasetError if it is missing or something else."""
    value = record.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    outside = isinstance(value, int) and not (-MAX_INTEGER if minimum is None else minimum) <= value <= MAX_INTEGER
    if isinstance(value, bool) or not isinstance(value, int) or outside:
        wanted = "a whole number" if minimum is None else f"a whole number of at least {minimum}"
        raise DatasetError("broken_record", path, f"{path}: {where} {state_of(record, key)}, it must be {wanted}")
    return value


def image_id_of(record: Mapping[str, Any], key: str) -> int | str | None:
    """The image id of a record, 1.0 as 1; None if it is missing or neither a whole number nor a text."""
    value = record.get(key)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return None if UNUSABLE.search(value) else value
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def annotated_image(
    path: Path, annotation: Any, position: int, image_ids: Container[int | str]
) -> tuple[int | str, Mapping[str, Any]]:
    """(image id, annotation) of an entry of annotations; DatasetError if it is no object or of an unknown image."""
    if not isinstance(annotation, Mapping):
        raise DatasetError("broken_record", path, f"{path}: annotation {position} of the list is no object")
    image_id = image_id_of(annotation, "image_id")
    if image_id is None or image_id not in image_ids:
        name = f"annotation {annotation['id']}" if "id" in annotation else f"annotation {position} of the list"
        file = f" ({annotation['file_name']})" if "file_name" in annotation else ""
        message = f"{path}: {name}{file} {state_of(annotation, 'image_id')}, which is not in images"
        raise DatasetError("broken_record", path, message)
    return image_id, annotation


def file_name_of(path: Path, record: Mapping[str, Any], where: str) -> str:
    """The file_name of a record; DatasetError if it is missing or a name that no file can have."""
    name = record.get("file_name")
    if isinstance(name, str) and name and not UNUSABLE.search(name):
        return name
    state = state_of(record, "file_name")
    raise DatasetError("broken_record", path, f"{path}: {where} {state}, it must be the name of a file")


def record_flag(path: Path, record: Mapping[str, Any], key: str, where: str, default: bool | None) -> bool:
    """0 or 1 of a record; `default` if it is missing, None makes that an error."""
    value = record.get(key, default)
    if value is None and key not in record:
        raise DatasetError("broken_record", path, f"{path}: {where} has no {key} (0 or 1)")
    if value not in (0, 1):
        raise DatasetError("broken_record", path, f"{path}: {where} has {key} {value!r:.80}, it must be 0 or 1")
    return bool(value)


def categories_to_spec(
    path: Path, categories: Sequence[Any], default_isthing: bool | None, problems: Problems | None = None
) -> LabelSpec:
    """Labels 0..K-1 in the order of the category ids, so that all splits agree; `raw_to_label` maps those ids.

    Args:
        path: named in messages.
        categories: COCO records with id, name and isthing.
        default_isthing: for categories without isthing; None makes that an error.
        problems: where a bad category is reported; it is then left out, or a stuff if only isthing is missing.
    """
    problems = problems or Problems()
    found: dict[int, tuple[str, bool]] = {}
    for position, category in enumerate(categories):
        with problems.catch(path):
            if not isinstance(category, Mapping):
                message = f"{path}: category {position} of the list is no object"
                raise DatasetError("broken_record", path, message)
            raw = record_integer(path, category, "id", f"category {position} of the list ({category.get('name')})")
            if raw in found:
                raise DatasetError("duplicate", path, f"{path}: category id {raw} stands twice in categories")
            name = str(raw if category.get("name") is None else category["name"])
            found[raw] = (name, bool(default_isthing))
            where = f"category {raw} ({category.get('name')})"
            found[raw] = (name, record_flag(path, category, "isthing", where, default_isthing))
    ids = sorted(found)
    names = {label: found[raw][0] for label, raw in enumerate(ids)}
    things = tuple(label for label, raw in enumerate(ids) if found[raw][1])
    # A void value that can be no label: 255 as everywhere, or beyond the labels where there are more than 255.
    ignore_index = 255 if len(names) <= 255 else 65535
    raw_to_label = {raw: label for label, raw in enumerate(ids)}
    if not names:
        raise DatasetError("broken_record", path, f"{path}: has no category that can be used")
    return LabelSpec(names, things, ignore_index=ignore_index, raw_to_label=raw_to_label)


def label_of(path: Path, record: Mapping[str, Any], spec: LabelSpec, where: str) -> int:
    """Label id of an annotation or segment record."""
    assert spec.raw_to_label is not None
    raw = record.get("category_id")
    if isinstance(raw, (int, float)) and raw in spec.raw_to_label:
        return spec.raw_to_label[int(raw)]
    allowed = sorted(spec.raw_to_label)
    shown = ", ".join(map(str, allowed[:LISTED_VALUES])) + (", ..." if len(allowed) > LISTED_VALUES else "")
    message = f"{path}: {where} {state_of(record, 'category_id')}, which is not in categories, allowed: {shown}"
    raise DatasetError("unknown_label", path, message)


def image_records(
    path: Path, images: Sequence[Any], problems: Problems
) -> tuple[dict[int | str, ImageRecord], set[int | str]]:
    """Checked image records by their id, and the ids of those that were reported and left out.

    Reported are records that lack a key or have a wrong value, and ids and files that stand twice (the first stays).
    """
    records: dict[int | str, ImageRecord] = {}
    broken: set[int | str] = set()
    files: dict[str, int | str] = {}
    for position, record in enumerate(images):
        with problems.catch(path):
            if not isinstance(record, Mapping):
                raise DatasetError("broken_record", path, f"{path}: image {position} of the list is no object")
            image_id = image_id_of(record, "id")
            if image_id is None:
                where = f"image {position} of the list ({record.get('file_name')}) {state_of(record, 'id')}"
                raise DatasetError("broken_record", path, f"{path}: {where}, it must be a number or a text")
            if image_id in records:
                raise DatasetError("duplicate", path, f"{path}: image id {image_id} stands twice in images")
            broken.add(image_id)
            checked = _image_record(path, image_id, record)
            name = os.path.normpath(checked.file_name)  # ./a.png is a.png
            if name in files:
                first = files[name]
                message = f"{path}: images {first} and {image_id} both have the file_name {checked.file_name}"
                raise DatasetError("duplicate", path, message)
            files[name] = image_id
            broken.discard(image_id)
            records[image_id] = checked
    return records, broken


def _image_record(path: Path, image_id: int | str, record: Mapping[str, Any]) -> ImageRecord:
    name = file_name_of(path, record, f"image {image_id}")
    where = f"image {image_id} ({name})"
    height, width = (record_integer(path, record, key, where, minimum=1) for key in ("height", "width"))
    return ImageRecord(image_id, name, height, width)


def find_image(path: Path, folder: Path, record: ImageRecord) -> Path:
    """The file of an image record, checked against the file's header."""
    image = image_file(folder, record.file_name)
    with problem_kind("size_mismatch", image):
        if not os.path.isfile(image):
            message = f"{path}: image {record.id} is {record.file_name}, which is not in {folder}"
            raise DatasetError("missing_file", image, message)
        check_image_size(image, (record.height, record.width), f"image {record.id} of {path}")
    return image


def warn_unlisted(path: Path, folder: Path, images: Iterable[Any], problems: Problems) -> None:
    """Reports each file that the JSON does not list, so that it is not used; folders of nothing else once."""
    listed = {os.path.normpath(file) for file in listed_files(folder, images)}
    used = {os.path.dirname(file) for file in listed} | {os.path.normpath(folder)}
    for inside, names in _files_below(folder):
        unlisted = [inside / name for name in names if os.path.normpath(inside / name) not in listed]
        if unlisted and os.path.normpath(inside) not in used:
            message = f"{inside}: none of its {len(unlisted)} file(s), such as {unlisted[0].name}, is listed in {path}"
            problems.warning("unlisted_file", inside, f"{message}; they are not used")
            continue
        for file in unlisted:
            problems.warning("unlisted_file", file, f"{file}: is not listed in {path}; it is not used")


def _files_below(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each folder in and below a folder, through links, with the names of its files; hidden ones are passed over."""
    seen = set()
    for inside, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(inside))
        below = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in below if os.path.realpath(os.path.join(inside, name)) not in seen]
        yield Path(inside), sorted(name for name in names if not name.startswith("."))


def warn_repeated_ids(path: Path, annotations: Iterable[Any], problems: Problems) -> None:
    """Reports annotation ids that stand more than once; all of them are used."""
    ids = (annotation.get("id") for annotation in annotations if isinstance(annotation, Mapping))
    for value, count in Counter(value for value in ids if isinstance(value, (int, str))).items():
        if count > 1:
            problems.warning("duplicate", path, f"{path}: annotation id {value} stands {count} times in annotations")
