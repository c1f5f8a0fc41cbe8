"""Semantic maps: SPLIT/images/* with SPLIT/labels/* of the same name, and a table of the labels beside the splits.

The pixel value of a label file is the label id, or what `label_table` or id2label.json say that it means; in a palette
PNG the index counts, unless the table holds colours. `ignore_index` marks pixels without a label.
"""

import json
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_maskformer.data.dataset_index import DatasetSource, cache_folder, files_fingerprint, path_image, readable_rows
from hf_maskformer.data.label_files import (
    LABEL_SUFFIXES,
    LOSSY_SUFFIXES,
    lossy_error,
    read_label_map,
    read_labels,
    unknown_values,
)
from hf_maskformer.data.label_table import (
    LabelTable,
    check_ignore_index,
    find_label_table,
    have_no_gap,
    read_label_table,
    value_table,
)
from hf_maskformer.data.problems import DatasetError, Problems, problem_kind
from hf_maskformer.data.run_segments import runs_to_segments
from hf_maskformer.data.sample import check_image_size
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import id_map_to_runs

READER_VERSION = 3
DEFAULT_VOID = 255
INFERRED = "the label maps"  # source of a table that no file and no option gave
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LISTED_VALUES = 20

__all__ = ["IMAGE_SUFFIXES", "read_id2label", "read_label_map", "semantic_maps_source", "semantic_row"]

logger = logging.getLogger(__name__)


def semantic_maps_source(
    folder: Path,
    root: Path,
    problems: Problems,
    ignore_index: int | None = None,
    label_table: str | Path | Mapping[Any, str | None] | None = None,
    images: Path | None = None,
    labels: Path | None = None,
    label_folders: Sequence[Path] | None = None,
    cache_dir: str | Path | None = None,
) -> DatasetSource:
    """Opens one split of label maps.

    Without `label_table` the table that lies in `root` is taken (see `label_table.find_label_table`), then
    id2label.json. Without any the labels are those found in all splits; they must then be 0..K-1 without a gap.

    Args:
        folder: holds images/ and labels/.
        root: where tables are looked for.
        problems: is told of missing partners, values and colours without a label, sizes that differ, unreadable files,
            two files of one name, files that are no images, and classes that may be something else: maps of 0 and 255
            only where 255 is void by default, and maps of more than 8 bits whose values have no names.
        ignore_index: pixel value without a label; a `label_table` may still give it a class. None = 255, but refused
            where that leaves one class of black and white masks.
        label_table: a file or dict that says which class each value or colour means.
        images: folder of the images; None = images/ in `folder`.
        labels: folder of the label files; None = labels/ in `folder`.
        label_folders: label files of all splits, to infer labels from; None = the labels/ of all folders in `root`.
        cache_dir: where inferred labels are stored; None = the cache of `datasets`.

    Raises:
        DatasetError: a folder without files, a table that cannot be read.
        ValueError: an option of another type.
    """
    void = DEFAULT_VOID if ignore_index is None else ignore_index
    check_ignore_index(void)
    images, labels = images or folder / "images", labels or folder / "labels"
    image_files, label_files = _Files(images, IMAGE_SUFFIXES), _Files(labels, LABEL_SUFFIXES)
    folders = [labels, *(label_folders or sorted(root.glob("*/labels")))]
    table = _find_table(root, void, label_table, folders, problems, cache_dir)
    doubtful = ignore_index is None and _may_lose_objects(table, root)
    pairs = [
        (path, label_files.by_stem[stem]) for stem, path in image_files.by_stem.items() if stem in label_files.by_stem
    ]
    # What is read with a stated ignore_index must not be served to a caller who stated none and is to be warned.
    options = {"labels": table.label_spec.to_dict(), "colour": table.is_colour, "doubtful": doubtful}
    files = [*image_files.all, *label_files.all]

    def rows() -> Iterator[dict[str, Any]]:
        image_files.report(label_files, "image", problems)
        label_files.report(image_files, "label", problems)
        if doubtful:
            _check_binary_maps(folders, problems)
        yield from readable_rows(
            pairs, lambda pair: semantic_row(*pair, table, problems, images.parent.parent), problems, where=folder
        )

    return DatasetSource(table.label_spec, rows, files_fingerprint("semantic_maps", READER_VERSION, options, files))


def semantic_row(
    image: Path, label: Path, table: LabelTable, problems: Problems, root: Path | None = None
) -> dict[str, Any]:
    """The row of an image and its label file: one segment for each class, with the id label + 1.

    Values and colours that the table lacks are reported; where reading goes on they are void.

    Args:
        image: only its header is read.
        label: the label file.
        table: what its values mean; `LabelTable(label_spec)` if they are label ids.
        problems: where to report.
        root: what `file_name` is relative to; None = the folder that holds the image's folder.
    """
    with problem_kind("unreadable_file", label):
        labels, unknown = read_labels(label, table)
    height, width = labels.shape
    with problem_kind("size_mismatch", image):
        check_image_size(image, (height, width), str(label))
    if unknown:
        with problems.catch(label):
            if table.label_spec.raw_to_label is not None:
                raise unknown_values(label, table, unknown)
            with problem_kind("unknown_label", label):
                found = np.unique(labels[labels != table.label_spec.ignore_index])
                table.label_spec.check_semantic_map(np.array([*found, *unknown]), str(label))
    present = [int(value) for value in np.unique(labels) if value != table.label_spec.ignore_index]
    segment_ids = [value + 1 for value in present]  # 0 would be void
    return {
        "image": path_image(image),
        "image_id": image.stem,
        "height": height,
        "width": width,
        "file_name": image.relative_to(root or image.parent.parent).as_posix(),
        "segments": runs_to_segments(id_map_to_runs(labels, present), segment_ids, present),
    }


def read_id2label(path: Path, ignore_index: int) -> LabelSpec:
    """Labels of an id2label.json: {"0": "road", "1": "car"}."""
    with problem_kind("broken_record", path):
        return LabelSpec(_read_names(path), ignore_index=ignore_index)


def _read_names(path: Path) -> dict[int, str]:
    """Value -> name of an id2label.json."""
    with problem_kind("broken_record", path):
        try:
            names = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{path}: is not valid JSON ({error})") from error
        if not isinstance(names, dict) or not all(key.isdigit() for key in names):
            example = '{"0": "road", "1": "car"}'
            raise ValueError(f"{path}: must be an object that names each label id, such as {example}")
        for key, name in names.items():
            if not isinstance(name, str):
                raise ValueError(f"{path}: label {key} has the name {name!r:.80}, which is no text")
        return {int(key): name for key, name in names.items()}


class _Files:
    """The files of a folder by their name without suffix, and what is wrong with them.

    Raises:
        DatasetError: there is no file with one of the suffixes.
    """

    def __init__(self, folder: Path, suffixes: tuple[str, ...]) -> None:
        self.folder = folder
        self.by_stem: dict[str, Path] = {}
        self.repeated: list[Path] = []
        self.others: list[Path] = []
        self.lossy: list[Path] = []
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.name.startswith("."):
                continue
            suffix = path.suffix.lower()
            if suffix not in suffixes:
                (self.lossy if suffix in LOSSY_SUFFIXES else self.others).append(path)
            elif path.stem in self.by_stem:
                self.repeated.append(path)
            else:
                self.by_stem[path.stem] = path
        self.all = [*self.by_stem.values(), *self.repeated, *self.others, *self.lossy]
        if self.lossy and not self.by_stem:
            raise lossy_error(self.lossy[0])
        if not self.by_stem:
            found = (
                f"found {len(self.others)} other file(s) such as {self.others[0].name}"
                if self.others
                else "it is empty"
            )
            message = f"{folder} holds no file that ends with {', '.join(suffixes)}; {found}"
            raise DatasetError("missing_file", folder, message)

    def __contains__(self, stem: object) -> bool:
        """Whether there is a file of this name, readable or not."""
        return stem in self.by_stem or any(path.stem == stem for path in self.lossy)

    def report(self, others: "_Files", kind: str, problems: Problems) -> None:
        """Files without a partner among `others`, of one name, of a lossy form (errors), and of other kinds."""
        for path in self.repeated:
            with problems.catch(path):
                first = self.by_stem[path.stem].name
                message = f"{self.folder} holds {first} and {path.name}: one name, two files"
                raise DatasetError("duplicate", path, message)
        for path in self.lossy:
            with problems.catch(path):
                raise lossy_error(path)
        missing = [path for stem, path in self.by_stem.items() if stem not in others]
        for path in missing:
            with problems.catch(path):
                message = (
                    f"{path}: has no partner of the same name in {others.folder} "
                    f"({len(missing)} {kind} file(s) lack one)"
                )
                raise DatasetError("missing_file", path, message)
        for path in self.others:
            problems.warning("unlisted_file", path, f"{path}: is no {kind} file and is not used")


def _find_table(
    root: Path,
    ignore_index: int,
    label_table: str | Path | Mapping[Any, str | None] | None,
    folders: Sequence[Path],
    problems: Problems,
    cache_dir: str | Path | None,
) -> LabelTable:
    chosen = label_table if label_table is not None else find_label_table(root)
    if chosen is not None:
        return read_label_table(chosen, ignore_index)
    names_file = root / "id2label.json"
    if names_file.is_file():
        with problem_kind("broken_record", names_file):
            return value_table(_read_names(names_file), ignore_index, str(names_file))
    found = [_values_of(folder, ignore_index, cache_dir) for folder in sorted(set(folders))]
    values = sorted({value for in_folder, _ in found for value in in_folder})
    for wide in [wide for _, wide in found if wide is not None][:1]:
        message = (
            f"{wide}: a map of more than 8 bits whose values have no names; if they are ids of objects, read them "
            "with format='instance_maps' (--format instance_maps); if they are classes, name them in "
            f"{root / 'label_table.json'}"
        )
        problems.warning("unknown_label", wide, message)
    if not have_no_gap(values, ignore_index) or not values:
        hint = "; they look 1-based: subtract 1, or pass ignore_index=0" if values and values[0] == 1 else ""
        with problems.catch(root):
            message = (
                f"{root} has no id2label.json and the labels found, {values[:LISTED_VALUES]}, are not 0..K-1 without "
                f'a gap{hint}. Write {root / "label_table.json"} ({{"value": "name", ...}}, null for void) or choose '
                f"ignore_index (now {ignore_index})"
            )
            raise DatasetError("unknown_label", root, message)
        names: dict[int | str, str | None] = {value: f"label_{value}" for value in values}
        return read_label_table(names or {0: "label_0"}, ignore_index)
    logger.warning("%s has no id2label.json: labels %d..%d are taken from the label maps", root, values[0], values[-1])
    return value_table({value: f"label_{value}" for value in values}, ignore_index, INFERRED)


def _may_lose_objects(table: LabelTable, root: Path) -> bool:
    """Whether maps of 0 and 255 would leave a class without a pixel, or stand for classes that nobody named."""
    if table.source == str(root / "id2label.json"):
        return table.label_spec.num_labels > 1
    return table.source == INFERRED and table.label_spec.num_labels == 1  # with more there are other values


def _check_binary_maps(folders: Sequence[Path], problems: Problems) -> None:
    """Reports black and white masks: with 255 void their objects would be no part of the truth.

    Reading stops at the first map with another value, so most data sets cost one file more while they are indexed.
    """
    white, has_black = None, False
    for path in (path for folder in dict.fromkeys(folders) for path in _maps_in(folder)):
        try:
            values = set(np.unique(read_label_map(path)).tolist())
        except ValueError:  # it is reported when its own split is read
            continue
        if not values <= {0, DEFAULT_VOID}:
            return
        has_black = has_black or 0 in values
        if white is None and DEFAULT_VOID in values:
            white = path
    if white is None or not has_black:
        return
    with problems.catch(white):
        message = (
            f"{white}: maps hold only 0 and 255, of which 255 is void by default. For masks of two classes put "
            'label_table.json {"0": "background", "255": "object"} beside the splits or pass label_table=...; if 255 '
            "is really void pass ignore_index=255"
        )
        raise DatasetError("unknown_label", white, message)


def _maps_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix.lower() in LABEL_SUFFIXES]


def _values_of(folder: Path, ignore_index: int, cache_dir: str | Path | None) -> tuple[list[int], str | None]:
    """(values in the label maps of a folder, the first map of more than 8 bits), kept on disk until a file changes.

    Files that cannot be read add none: they are reported when their own split is read.
    """
    files = _maps_in(folder)
    fingerprint = files_fingerprint("label_values", READER_VERSION, {"ignore_index": ignore_index}, files)
    stored = cache_folder(cache_dir) / f"{fingerprint}-values.json"
    if stored.is_file():
        content = json.loads(stored.read_text(encoding="utf-8"))
        return [int(value) for value in content["values"]], content["wide"]
    found: set[int] = set()
    wide = None
    errors = []
    for path in files:
        try:
            labels = read_label_map(path)
        except ValueError as error:
            errors.append(error)
            continue
        found.update(np.unique(labels).tolist())
        if wide is None and labels.dtype.itemsize > 1:
            wide = str(path)
    if errors and not found:
        raise errors[0]
    values = sorted(found - {ignore_index})
    stored.parent.mkdir(parents=True, exist_ok=True)
    building = stored.with_name(f"{stored.name}.{uuid.uuid4().hex}")
    building.write_text(json.dumps({"values": values, "wide": wide}), encoding="utf-8")
    building.replace(stored)
    return values, wide
