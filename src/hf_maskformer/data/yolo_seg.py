"""YOLO segmentation text files: images, and for each image a text file with one polygon on each line.

A line is `class x1 y1 x2 y2 ...` with x and y as fractions of the image's width and height (docs.ultralytics.com,
"Instance Segmentation Datasets Overview"). Polygons may overlap and are filled as in COCO.
data.yaml names the classes.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hf_maskformer.data.dataset_index import DatasetSource, files_fingerprint, path_image, readable_rows
from hf_maskformer.data.paired_files import (
    files_by_name,
    image_files,
    image_name,
    list_folder,
    report_missing,
    warn_folders,
)
from hf_maskformer.data.problems import DatasetError, Problems, problem_kind
from hf_maskformer.data.run_segments import runs_to_segments
from hf_maskformer.data.sample import image_size
from hf_maskformer.data.segments import warn_identical
from hf_maskformer.data.text_files import read_lines
from hf_maskformer.data.yolo_yaml import CLASS_NAMES_TEXT, read_data_yaml
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import points_to_runs

READER_VERSION = 1
BOX_VALUES = 4
CLASSES_SHOWN = 20
SMALLEST_POLYGON = 6  # values: three points
# How far outside 0..1 a coordinate may lie before it is an error: as in ultralytics' own check of labels.
COORDINATE_TOLERANCE = 0.01


def yolo_seg_source(
    images: Path,
    labels: Path,
    problems: Problems,
    data_yaml: Path | None = None,
    label_folders: Sequence[Path] = (),
) -> DatasetSource:
    """Opens one split. The segment ids are the line numbers; every class is a thing, no segment is a crowd.

    An image without a text file, or with an empty one, has no objects. A polygon that covers no pixel's centre is
    left out with a warning; equal masks of one class in an image are kept with a warning.

    Args:
        images: folder of the images.
        labels: folder of the text files.
        problems: is told of every line that is no polygon of a known class, of text files without an image, and of
            images that cannot be read.
        data_yaml: names the classes. Without it, and without a classes.txt beside the labels, they are the numbers
            found in `label_folders`, called label_0..label_{K-1}, with a warning.
        label_folders: the folders of text files of all splits, so that they agree on the classes.

    Raises:
        DatasetError: no images, no text file for any image, or classes that cannot be named.
    """
    files = image_files(images, problems)
    entries, folders = list_folder(labels)
    warn_folders(folders, problems)
    texts = _text_files(entries, problems)
    if not any(name in texts for name in files):
        message = f"{labels} holds no text file NAME.txt for any of the {len(files)} images of {images}"
        raise DatasetError("missing_file", labels, message)
    names_text = labels / CLASS_NAMES_TEXT
    spec = _label_spec(data_yaml, names_text, {labels, *label_folders}, problems)
    options = {"labels": spec.to_dict()}
    fingerprint = files_fingerprint("yolo_seg", READER_VERSION, options, [*files.values(), *texts.values()])
    pairs = [(path, texts.get(name)) for name, path in files.items()]

    def rows() -> Iterator[dict[str, Any]]:
        report_missing((path for name, path in texts.items() if name not in files), f"image in {images}", problems)
        yield from readable_rows(pairs, partial(_row, spec, problems), problems, where=images)

    return DatasetSource(spec, rows, fingerprint)


def _text_files(entries: list[Path], problems: Problems) -> dict[str, Path]:
    """The label files among the files of a folder, by the name of their image."""
    return files_by_name((path for path in entries if path.name.lower() != CLASS_NAMES_TEXT), (".txt",), problems)


# --- classes ---------------------------------------------------------------------------------------------------------


def _label_spec(data_yaml: Path | None, names_text: Path, label_folders: set[Path], problems: Problems) -> LabelSpec:
    names = None
    if data_yaml is not None:
        with problems.catch(data_yaml):
            names = _yaml_names(data_yaml, problems)
    if names is None and names_text.is_file():
        with problems.catch(names_text):
            names = _text_names(names_text)
    if names is None:
        names = _inferred_names(label_folders, problems)
    return LabelSpec(dict(enumerate(names)), thing_label_ids=tuple(range(len(names))))


def _yaml_names(path: Path, problems: Problems) -> list[str] | None:
    """Class names of data.yaml (a list, or an object of numbers), None if it has none."""
    content = read_data_yaml(path)
    names, count = content.get("names"), content.get("nc")
    if names is None:
        return None
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            message = f"{path}: names must have the keys 0..{len(names) - 1}, found {list(names)}"
            raise DatasetError("broken_record", path, message)
        names = [names[key] for key in sorted(names, key=int)]
    if not isinstance(names, list) or not names:
        message = f"{path}: names must be a list of class names or an object of numbers and names, found {names!r}"
        raise DatasetError("broken_record", path, message)
    with problems.catch(path):
        if count is not None and count != len(names):
            raise DatasetError("broken_record", path, f"{path}: nc is {count!r}, but names has {len(names)} names")
    return [str(name) for name in names]


def _text_names(path: Path) -> list[str]:
    """Class names of classes.txt: the line is the number of the class, so only the last lines may be empty."""
    names = [line.strip() for line in read_lines(path, "broken_record")]
    while names and not names[-1]:
        names.pop()
    if not names or "" in names:
        state = f"line {names.index('') + 1} is empty" if names else "is empty"
        raise DatasetError("broken_record", path, f"{path}: {state}, each line must name a class, the first class 0")
    return names


def _inferred_names(label_folders: set[Path], problems: Problems) -> list[str]:
    """label_0..label_{K-1} for the numbers that stand first on the lines.

    Where reading goes on after a gap, the classes are those below it. Lines without a number are reported later.
    """
    quiet = Problems("list")  # what is wrong in a folder is reported where its split is read
    files = [path for folder in sorted(label_folders) for path in _text_files(list_folder(folder)[0], quiet).values()]
    firsts = {
        line.split()[0]
        for path in files
        for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        if line.strip()
    }
    found = sorted({int(first) for first in firsts if first.isdecimal()})
    count = next((number for number, value in enumerate([*found, None]) if number != value), 0)
    where = sorted(label_folders)[0]
    with problems.catch(where):
        if count != len(found) or not found:
            message = (
                f"{where}: no data.yaml names the classes, and those found, {found[:CLASSES_SHOWN]}, are not 0..K-1 "
                "without a gap; write data.yaml (names: [first, second, ...]) beside the splits"
            )
            raise DatasetError("unknown_label", where, message)
    message = f"{where}: no data.yaml names the classes; 0..{count - 1} are taken from the labels"
    problems.warning("missing_file", where, message)
    return [f"label_{number}" for number in range(max(count, 1))]


# --- rows ------------------------------------------------------------------------------------------------------------


def _row(spec: LabelSpec, problems: Problems, pair: tuple[Path, Path | None]) -> dict[str, Any]:
    image, text = pair
    with problem_kind("unreadable_file", image):
        height, width = image_size(image)
    return {
        "image": path_image(image),
        "image_id": image.stem,
        "height": height,
        "width": width,
        "file_name": image_name(image),
        "segments": [] if text is None else _segments(text, height, width, spec, problems),
    }


def _segments(text: Path, height: int, width: int, spec: LabelSpec, problems: Problems) -> list[dict[str, Any]]:
    lines = read_lines(text)
    numbers: list[int] = []
    label_ids: list[int] = []
    polygons: list[np.ndarray] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            with problems.catch(text, "broken_mask"):
                label_id, points = _parse_line(line, text, f"{text}: line {number}", spec)
                numbers.append(number)
                label_ids.append(label_id)
                polygons.append(points * (width, height))
    runs = points_to_runs(polygons, [1] * len(polygons), height, width)
    return _checked(runs_to_segments(runs, numbers, label_ids), text, problems)


def _checked(segments: list[dict[str, Any]], text: Path, problems: Problems) -> list[dict[str, Any]]:
    """The segments that have a pixel; those without and equal ones are reported."""
    for segment in segments:
        if not segment["area"]:
            message = f"{text}: line {segment['id']}: the polygon covers no pixel and is not used"
            problems.warning("empty_mask", text, message)
    kept = [segment for segment in segments if segment["area"]]
    named = [{**segment, "id": f"of line {segment['id']}"} for segment in kept]
    warn_identical(text, f"image {text.stem}", named, problems)
    return kept


def _parse_line(line: str, text: Path, where: str, spec: LabelSpec) -> tuple[int, np.ndarray]:
    """(label id, points (P, 2) in 0..1) of a line."""
    first, *rest = line.split()
    label_id = _number(first, text, where)
    if not label_id.is_integer() or int(label_id) not in spec.id2label:
        message = f"{where}: class {first} is not known, allowed: 0..{spec.num_labels - 1}"
        raise DatasetError("unknown_label", text, message)
    if len(rest) == BOX_VALUES:
        message = f"{where}: is a detection box (class and {BOX_VALUES} numbers), not a polygon of 3 or more points"
        raise DatasetError("broken_mask", text, message)
    if len(rest) < SMALLEST_POLYGON or len(rest) % 2:
        message = f"{where}: has {len(rest)} coordinates; allowed: an even number, x and y of 3 or more points"
        raise DatasetError("broken_mask", text, message)
    values = np.array([_number(value, text, where) for value in rest])
    outside = values[(values < -COORDINATE_TOLERANCE) | (values > 1 + COORDINATE_TOLERANCE)]
    if len(outside):
        message = f"{where}: coordinate {outside[0]:g} is outside 0..1 (fractions of width and height)"
        raise DatasetError("broken_mask", text, message)
    return int(label_id), np.clip(values, 0.0, 1.0).reshape(-1, 2)  # (P, 2)


def _number(value: str, text: Path, where: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DatasetError("broken_mask", text, f"{where}: {value!r} is no finite number")
    return number
