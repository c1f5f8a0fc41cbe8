"""Tables that say which class a pixel value or a colour of a label map means.

Four forms are read:

- `label_table.json`: one object, {"value": "name"}, with null for void. A value is a whole number ("7"), or a colour:
  "#804080", "128,64,128" or "[128, 64, 128]"; numbers and colours do not mix. Numbers may leave gaps.
- `class_dict.csv`: a line of headings with name, r, g and b, then one line a class (CamVid as found on Kaggle).
- `labelmap.txt`: lines `name:r,g,b::`, lines with # are comments (CVAT's export).
- `id2label.json`: {"0": "name"}; its ids are the labels and leave no gap. It is read by `semantic_maps`.

Classes are numbered in the order of the table; values of one name are one class. The names "void" and "ignore" mean
void as null does.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hf_maskformer.data.problems import DatasetError
from hf_maskformer.model.label_spec import LabelSpec

TABLE_NAMES = ("label_table.json", "class_dict.csv", "labelmap.txt")  # the first that is found is taken
VOID_NAMES = ("void", "ignore")
LARGE_VOID = 65535  # void where the ignore_index is also a label


@dataclass(frozen=True)
class LabelTable:
    """Classes with the raw values or colours that mean them.

    Attributes:
        label_spec: the classes; `raw_to_label` holds the raw values, a colour as 65536 R + 256 G + B.
        is_colour: whether the raw values are colours.
        source: the file, or a word for a table that was given; named in messages.
    """

    label_spec: LabelSpec
    is_colour: bool = False
    source: str = "label_table"
    _codes: np.ndarray = field(init=False, repr=False, compare=False)
    _labels: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        table = self.label_spec.raw_to_label
        if table is None:
            table = {label: label for label in self.label_spec.id2label}
        if not self.is_colour:
            table = {self.label_spec.ignore_index: self.label_spec.ignore_index} | table
        codes = np.array(sorted(table), dtype=np.int64)
        object.__setattr__(self, "_codes", codes)
        object.__setattr__(self, "_labels", np.array([table[code] for code in codes.tolist()], dtype=np.int64))

    def labels_of(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(labels, known) of raw values of any shape; unknown ones get the ignore_index."""
        place = np.minimum(np.searchsorted(self._codes, values), len(self._codes) - 1)
        known = self._codes[place] == values
        return np.where(known, self._labels[place], self.label_spec.ignore_index), known

    def name_of(self, code: int) -> str:
        label = int(self._labels[np.searchsorted(self._codes, code)])
        return self.label_spec.id2label.get(label, "void")

    @cached_property
    def _colours(self) -> np.ndarray:
        return split_code(self._codes)

    def nearest_colour(self, code: int) -> int:
        """The code of the table's colour that is nearest to another in RGB."""
        return int(self._codes[np.square(self._colours - split_code(np.array([code]))).sum(axis=1).argmin()])


def split_code(codes: np.ndarray) -> np.ndarray:
    """(N, 3) red, green and blue of colour codes."""
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1)


def colour_text(code: int) -> str:
    red, green, blue = split_code(np.array([code]))[0].tolist()
    return f"#{code:06x} ({red}, {green}, {blue})"


def find_label_table(root: Path) -> Path | None:
    """The table that lies in a folder, if there is one."""
    return next((root / name for name in TABLE_NAMES if (root / name).is_file()), None)


def read_label_table(table: str | Path | Mapping[Any, str | None], ignore_index: int = 255) -> LabelTable:
    """Reads a table from a file of one of the forms, or from a dict as in label_table.json.

    The keys of a dict may also be integers and (r, g, b) tuples. The value `ignore_index` is void unless a table of
    numbers names it. Where it is also a label, because there are more classes, void is 65535 in the labels.

    Raises:
        DatasetError: no such file, an unknown form, or a line that cannot be read; the message names it.
        ValueError: an argument of another type.
    """
    check_ignore_index(ignore_index)
    if isinstance(table, Mapping):
        return _build("label_table", table.items(), ignore_index)
    if not isinstance(table, (str, Path)):
        raise ValueError(f"label_table must be the path of a file or a table {{value: name}}, got {table!r:.80}")
    path = Path(table)
    if not path.is_file():
        raise DatasetError("missing_file", path, f"{path}: no such label table")
    readers: dict[str, Callable[[Path, str], Iterable[tuple[Any, str | None]]]]
    readers = {".json": _json_entries, ".csv": _csv_entries, ".txt": _text_entries}
    if path.suffix.lower() not in readers:
        message = f"{path}: a label table must end with {', '.join(readers)}"
        raise DatasetError("broken_record", path, message)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError("unreadable_file", path, f"{path}: is no text file ({error})") from error
    return _build(str(path), readers[path.suffix.lower()](path, text), ignore_index)


def check_ignore_index(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise ValueError(f"ignore_index must be a whole number of at least 0, got {value!r:.80}")


def have_no_gap(values: Iterable[int], ignore_index: int) -> bool:
    """Whether values are 0..K-1, or 0..K without `ignore_index`."""
    found = sorted(values)
    return found in (list(range(len(found))), [n for n in range(len(found) + 1) if n != ignore_index])


def value_table(names: Mapping[int, str], ignore_index: int, source: str) -> LabelTable:
    """The table of values that are label ids, or have one gap, `ignore_index`, and become label ids without it.

    Raises:
        ValueError: there is another gap, or `ignore_index` has a name.
    """
    values = sorted(names)
    if ignore_index >= len(values) or ignore_index in names or not have_no_gap(values, ignore_index):
        return LabelTable(LabelSpec(dict(names), ignore_index=ignore_index), source=source)
    id2label = {label: names[value] for label, value in enumerate(values)}
    raw_to_label = {value: label for label, value in enumerate(values)} | {ignore_index: LARGE_VOID}
    return LabelTable(LabelSpec(id2label, ignore_index=LARGE_VOID, raw_to_label=raw_to_label), source=source)


def _build(source: str, entries: Iterable[tuple[Any, str | None]], ignore_index: int) -> LabelTable:
    raw_names: dict[int, str | None] = {}
    colours = set()
    for key, name in entries:
        code, is_colour = _parse_key(source, key)
        if name is not None and not isinstance(name, str):
            message = f"{source}: {key!r} has the name {name!r:.80}, allowed: a text, or null for void"
            raise DatasetError("broken_record", source, message)
        if name is not None and not name.strip():
            message = f"{source}: {key!r} has an empty name, allowed: a text, or null for void"
            raise DatasetError("broken_record", source, message)
        if code in raw_names:
            raise DatasetError("duplicate", source, f"{source}: {key!r} stands twice")
        colours.add(is_colour)
        raw_names[code] = None if name is None or name.strip().lower() in VOID_NAMES else name.strip()
    names = list(dict.fromkeys(name for name in raw_names.values() if name is not None))
    if not names:
        raise DatasetError("broken_record", source, f"{source}: names no class")
    if len(colours) > 1:
        raise DatasetError("broken_record", source, f"{source}: has numbers and colours; it must have one kind")
    void = ignore_index if ignore_index >= len(names) else LARGE_VOID
    if void != ignore_index and not any(colours):
        raw_names.setdefault(ignore_index, None)
    labels = {name: label for label, name in enumerate(names)}
    raw_to_label = {code: void if name is None else labels[name] for code, name in raw_names.items()}
    try:
        spec = LabelSpec(dict(enumerate(names)), ignore_index=void, raw_to_label=raw_to_label)
    except ValueError as error:
        raise DatasetError("broken_record", source, f"{source}: {error}") from error
    return LabelTable(spec, colours.pop(), source)


def _parse_key(source: str, key: Any) -> tuple[int, bool]:
    """(number or colour code, whether it is a colour)."""
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool) and key >= 0:
        return int(key), False
    text = str(key).strip()
    if re.fullmatch(r"\d+", text):
        return int(text), False
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return int(text[1:], 16), True
    parts = re.fullmatch(r"[\[(]?\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*[\])]?", text)
    if parts and all(int(part) <= 255 for part in parts.groups()):
        red, green, blue = map(int, parts.groups())
        return red << 16 | green << 8 | blue, True
    message = f'{source}: {key!r} is neither a number nor a colour, allowed: "7", "#804080", "128,64,128"'
    raise DatasetError("broken_record", source, message)


def _json_entries(path: Path, text: str) -> list[tuple[Any, str | None]]:
    def as_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = sorted({key for key, _ in pairs if [other for other, _ in pairs].count(key) > 1})
        if repeated:
            raise DatasetError("duplicate", path, f"{path}: {repeated[0]!r} stands twice")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=as_pairs)
    except json.JSONDecodeError as error:
        raise DatasetError("broken_record", path, f"{path}: is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        message = f'{path}: must be an object such as {{"7": "road", "0": null}} or {{"#804080": "road"}}'
        raise DatasetError("broken_record", path, message)
    return list(content.items())


def _csv_entries(path: Path, text: str) -> list[tuple[str, str]]:
    lines = csv.reader(text.splitlines(), skipinitialspace=True)
    header = [column.strip().lower() for column in next(lines, [])]
    missing = [column for column in ("name", "r", "g", "b") if column not in header]
    if missing:
        message = f"{path}: its first line must name the columns name, r, g and b; missing: {', '.join(missing)}"
        raise DatasetError("broken_record", path, message)
    entries = []
    for number, line in enumerate(lines, start=2):
        if not any(line):
            continue
        if len(line) < len(header):
            raise DatasetError(
                "broken_record", path, f"{path}: line {number} has {len(line)} of {len(header)} columns"
            )
        record = dict(zip(header, (value.strip() for value in line), strict=False))
        entries.append((f"{record['r']},{record['g']},{record['b']}", record["name"]))
    return entries


def _text_entries(path: Path, text: str) -> list[tuple[str, str]]:
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = line.split(":")
        if len(parts) < 2:
            message = f"{path}: line {number} must be name:r,g,b:: and is {line!r:.80}"
            raise DatasetError("broken_record", path, message)
        entries.append((parts[1], parts[0]))
    return entries
