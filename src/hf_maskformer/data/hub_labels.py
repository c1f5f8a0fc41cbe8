"""The classes of a `datasets` data set: from an option, its features, an id2label.json, or what its rows hold."""

import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from hf_maskformer.data.column_classes import ColumnClasses, found_values
from hf_maskformer.data.column_images import stored_pixels
from hf_maskformer.data.column_rows import field_of, flag_of, records_of
from hf_maskformer.data.columns import CATEGORY_FIELDS, Columns, class_names, record_fields
from hf_maskformer.data.dataset_index import cache_folder
from hf_maskformer.data.label_table import LabelTable, read_label_table
from hf_maskformer.data.problems import Problems
from hf_maskformer.model.label_spec import LabelSpec

NAMES_FILE = "id2label.json"
VOID, WIDE_VOID = 255, 65535  # the second where there are more classes than the first
WITH_MAPS = ("semantic", "instance_map")  # kinds of truth with class numbers in the pixels
CLASS_ROLES = ("instance_map", "segments_info", "objects", "labels")  # what says the classes, beside a semantic_map
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

logger = logging.getLogger(__name__)

RawRows = Callable[[], Iterator[dict[str, Any]]]
ProblemMode = Literal["raise", "skip", "list"]


@dataclass(frozen=True)
class LabelOptions:
    """What the user said about classes; see `docs/datasets.md`."""

    path_or_id: str
    id2label: Mapping[Any, Any] | str | None = None
    thing_labels: tuple[Any, ...] | None = None
    ignore_index: int | None = None
    reduce_labels: bool = False
    label_table: Any = None
    revision: str | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any], path_or_id: str) -> "LabelOptions":
        both = [options.get(name) for name in ("thing_labels", "thing_label_ids")]
        if None not in both:
            raise ValueError("give thing_labels or thing_label_ids, not both")
        things = next((value for value in both if value is not None), None)
        if isinstance(things, str) or (things is not None and not isinstance(things, Iterable)):
            raise ValueError(f"thing_labels is {things!r}; it must be a list of class names or numbers")
        ignore_index = options.get("ignore_index")
        if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
            raise ValueError(f"ignore_index is {ignore_index!r}; it must be a whole number")
        names = ("id2label", "ignore_index", "label_table", "revision")
        return cls(
            path_or_id,
            thing_labels=None if things is None else tuple(things),
            reduce_labels=bool(options.get("reduce_labels", False)),
            **{name: options.get(name) for name in names},
        )


@dataclass(frozen=True)
class Found:
    """What the rows hold: class numbers or names, and for each number whether its segments say isthing."""

    classes: list[int | str]
    isthing: dict[int | str, bool]


def column_classes(
    options: LabelOptions,
    columns: Columns,
    features: Mapping[str, Any],
    *,
    where: str,
    wants_things: bool,
    raw_splits: Mapping[str, RawRows] | None,
    fingerprint: str,
    cache_dir: str | Path | None,
    mode: ProblemMode,
) -> ColumnClasses:
    """The classes of the columns.

    Args:
        options: what the user said.
        columns: where the truth stands.
        features: of the data set.
        where: the data set, for messages.
        wants_things: whether the task needs to know which classes are things.
        raw_splits: split -> its raw rows, which say the classes where nothing else does; None for streamed data.
        fingerprint: of all splits; what is found in them is stored under it.
        cache_dir: where it is stored.
        mode: of the `Problems` while the rows are searched.

    Raises:
        ValueError: classes or things are not known, or contradict each other.
    """
    if columns.kind not in WITH_MAPS and (options.reduce_labels or options.label_table is not None):
        raise ValueError(f"{where}: reduce_labels and label_table are for label maps, not for {columns.kind}")
    found: Found | None = None
    says_isthing = columns.kind == "panoptic" and "isthing" in record_fields(features[columns.roles["segments_info"]])
    table = None if options.label_table is None else _table(options)
    names = None if table else _names(options, columns, features)
    needs_isthing = says_isthing and options.thing_labels is None
    if raw_splits is not None and (needs_isthing or (names is None and table is None)):
        found = _stored_search(columns, options, raw_splits, where, fingerprint, cache_dir, mode)
    if table is not None:
        spec = table.label_spec
    elif names is not None:
        spec = _spec(names, options, where)
    elif found is not None:
        spec = _inferred_spec(found.classes, options, columns, where)
    else:
        raise ValueError(
            f"{where}: the classes of streamed data must be given, there is no ClassLabel and no {NAMES_FILE}: "
            "id2label={0: 'road', 1: 'car'} or the path of a JSON file"
        )
    things = _things(options, columns, spec, found, where, wants_things=wants_things)
    spec = LabelSpec(spec.id2label, things, spec.ignore_index, spec.raw_to_label)
    # The value in the maps, which is not the label spec's where that would be a label.
    void = next((raw for raw, label in (spec.raw_to_label or {}).items() if label == spec.ignore_index), None)
    void = spec.ignore_index if void is None else void
    colours = table if table is not None and table.is_colour else None
    return ColumnClasses(spec, void, options.reduce_labels, colours)


def _table(options: LabelOptions) -> LabelTable:
    return read_label_table(options.label_table, VOID if options.ignore_index is None else options.ignore_index)


def _names(options: LabelOptions, columns: Columns, features: Mapping[str, Any]) -> dict[int, str] | None:
    """Class number -> name, from the first source that there is."""
    if options.id2label is not None:
        if isinstance(options.id2label, str):
            return read_names(Path(options.id2label))
        return checked_names(options.id2label, "id2label")
    names = class_names(features, columns)
    if names is not None:
        return names
    file = Path(options.path_or_id) / NAMES_FILE
    if not file.is_file() and HUB_ID.fullmatch(options.path_or_id) and not Path(options.path_or_id).exists():
        return _hub_names(options.path_or_id, options.revision)
    return read_names(file) if file.is_file() else None


def _hub_names(repo_id: str, revision: str | None) -> dict[int, str] | None:
    """Those of the id2label.json of a data set on the Hub, if it has one and can be reached."""
    try:
        file = hf_hub_download(repo_id, NAMES_FILE, repo_type="dataset", revision=revision)
    except EntryNotFoundError as error:
        logger.info("%s: no %s is used (%s)", repo_id, NAMES_FILE, type(error).__name__)
        return None
    except (HfHubHTTPError, OSError) as error:
        logger.warning("%s: its %s cannot be fetched: %s", repo_id, NAMES_FILE, error)
        return None
    return read_names(Path(file))


def read_names(path: Path) -> dict[int, str]:
    """Class number -> name of a JSON file."""
    if not path.is_file():
        raise ValueError(f"id2label: {path} is no file")
    try:
        return checked_names(json.loads(path.read_text(encoding="utf-8-sig")), str(path))
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: is not valid JSON ({error})") from error


def checked_names(names: Any, where: str) -> dict[int, str]:
    """Class number -> name of a dict with whole numbers (or their text) as keys, or of a list of names."""
    if isinstance(names, (list, tuple)):
        names = dict(enumerate(names))
    whole = isinstance(names, Mapping) and all(str(key).isdigit() for key in names)
    if not whole or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{where} is {names!r:.200}; it must name each class number, such as {{0: 'road', 1: 'car'}}")
    return {int(key): str(name) for key, name in names.items()}


def _spec(names: Mapping[int, str], options: LabelOptions, where: str) -> LabelSpec:
    """Labels 0..K-1 in the order of the class numbers."""
    numbers = sorted(names)
    count = len(numbers)
    void = options.ignore_index
    if void is None:
        void = VOID if VOID not in names else WIDE_VOID
    if void in names:
        raise ValueError(f"{where}: ignore_index {void} is also the class {names[void]!r}")
    label_void = void if void >= count else (VOID if count <= VOID else WIDE_VOID)
    raw_to_label = {number: label for label, number in enumerate(numbers)}
    if label_void != void:
        raw_to_label[void] = label_void
    same = all(number == label for number, label in raw_to_label.items())
    id2label = {label: names[number] for label, number in enumerate(numbers)}
    return LabelSpec(id2label, ignore_index=label_void, raw_to_label=None if same else raw_to_label)


def _inferred_spec(classes: Sequence[int | str], options: LabelOptions, columns: Columns, where: str) -> LabelSpec:
    texts = sorted(value for value in classes if isinstance(value, str))
    numbers = sorted(value for value in classes if not isinstance(value, str))
    if texts and not numbers:
        logger.warning("%s: no class names are given: the %d names found in all splits are taken", where, len(texts))
        return _spec(dict(enumerate(texts)), options, where)
    if texts or numbers != list(range(len(numbers))) or not numbers:
        hint = ""
        if numbers and numbers[0] == 1:
            hint = "; they look 1-based" + (": reduce_labels=True" if columns.kind in WITH_MAPS else "")
        raise ValueError(
            f"{where} has no class names and the classes found, {[*numbers, *texts][:20]}, are not 0..K-1 without a "
            f"gap{hint}. Give id2label={{NUMBER: 'name', ...}} or choose ignore_index"
        )
    logger.warning("%s: no class names are given: labels 0..%d are taken from the rows", where, len(numbers) - 1)
    return _spec({number: f"label_{number}" for number in numbers}, options, where)


def _things(
    options: LabelOptions, columns: Columns, spec: LabelSpec, found: Found | None, where: str, *, wants_things: bool
) -> tuple[int, ...]:
    """The label ids with countable instances."""
    if options.thing_labels is not None:
        return tuple(_label(spec, value, where) for value in options.thing_labels)
    if columns.kind == "semantic":
        return ()
    if columns.kind in ("objects", "masks") or (columns.kind == "instance_map" and len(columns.truth_roles) == 1):
        return tuple(spec.id2label)
    if found is not None and found.isthing:
        return tuple(_label(spec, value, where) for value, isthing in found.isthing.items() if isthing)
    if not wants_things:
        return ()
    raise ValueError(
        f"{where} does not say which classes are things (countable objects); give thing_labels=['car', ...] "
        f"(names or numbers, [] for none), classes: {', '.join(spec.id2label.values())}"
    )


def _label(spec: LabelSpec, value: Any, where: str) -> int:
    if isinstance(value, str) and value in spec.id2label.values():
        return next(label for label, name in spec.id2label.items() if name == value)
    table = spec.raw_to_label or {label: label for label in spec.id2label}
    if isinstance(value, int) and table.get(value) in spec.id2label:
        return table[value]
    raise ValueError(f"{where}: thing {value!r} is no class, allowed: {', '.join(spec.id2label.values())}")


def _stored_search(
    columns: Columns,
    options: LabelOptions,
    raw_splits: Mapping[str, RawRows],
    where: str,
    fingerprint: str,
    cache_dir: str | Path | None,
    mode: ProblemMode,
) -> Found:
    """What a search found earlier, or finds now and stores."""
    file = cache_folder(cache_dir) / f"{fingerprint}-{mode}-classes.json"
    if file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))
    else:
        problems = Problems(mode)
        found = set()
        for split, raw_rows in raw_splits.items():
            found |= _search(columns, options, raw_rows(), f"{options.path_or_id} {split}", problems)
        stored = sorted(found, key=str)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"building-{uuid.uuid4().hex}")
        unfinished.write_text(json.dumps(stored), encoding="utf-8")
        os.replace(unfinished, file)
    isthing = {value: flag == 1 for value, flag in stored if flag is not None}
    if len(isthing) < len({(value, flag) for value, flag in stored if flag is not None}):
        raise ValueError(f"{where}: segments of one class have different isthing")
    return Found(list(dict.fromkeys(value for value, _ in stored)), isthing)


def _search(
    columns: Columns, options: LabelOptions, rows: Iterable[Mapping[str, Any]], where: str, problems: Problems
) -> set[tuple[int | str, int | None]]:
    """Every different (class, isthing or None) of the rows; rows without truth, as in many test splits, are passed."""
    found: set[tuple[int | str, int | None]] = set()
    void = VOID if options.ignore_index is None else options.ignore_index
    role = next(role for role in ("semantic_map", *CLASS_ROLES) if role in columns.roles)
    column = columns.roles[role]
    for number, row in enumerate(rows):
        name = f"{where} row {number} ({column})"
        if row.get(column) is None:
            continue
        with problems.catch(name):
            if columns.kind in WITH_MAPS:
                values = _map_classes(stored_pixels(row[column], name), role, void, options.reduce_labels)
                found.update((value, None) for value in values)
            elif columns.kind == "masks":
                found.update((value, None) for value in row[column])
            else:
                for record in records_of(row[column], name):
                    value = field_of(record, CATEGORY_FIELDS)
                    says = columns.kind == "panoptic" and record.get("isthing") is not None
                    if value is not None:
                        flag = int(flag_of(record, ("isthing",), name, f"segment of class {value}")) if says else None
                        found.add((value, flag))
    return found


def _map_classes(values: np.ndarray, role: str, void: int, reduce_labels: bool) -> list[int]:
    if values.ndim == 3:
        if role == "semantic_map":
            return []  # colours: the error is raised when the row is read
        values = values[..., 0]
    found = [value for value in found_values(values).tolist() if value != void]
    return [value - 1 for value in found if value > 0] if reduce_labels else found
