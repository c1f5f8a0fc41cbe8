"""Metrics as a table for people: one row per class, the overall figures below."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

DECIMALS = 4
COUNT_COLUMNS = {"true_positives": "TP", "false_positives": "FP", "false_negatives": "FN"}


def format_table(metrics: Mapping[str, Any], id2label: Mapping[int, str]) -> str:
    """Text table of what a metric's `compute` (or `evaluate`) returned.

    The columns are those of `class_columns`, with short names for counts and "-" for a class that was absent. Numbers
    stand below as `name value` lines.
    """
    columns = class_columns(metrics, len(id2label))
    scalars = {name: value for name, value in metrics.items() if not isinstance(value, (list, tuple))}
    lines = []
    if columns:
        rows = [["class", *map(_short_title, columns)]]
        for label in sorted(id2label):
            rows.append([id2label[label], *(_cell(column[label]) for column in columns.values())])
        widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
        lines = [_line(row, widths) for row in rows]
        lines.insert(1, "-" * len(lines[0]))
        lines.append(lines[1])
    width = max((len(name) for name in scalars), default=0)
    lines.extend(f"{name.ljust(width)}  {_cell(value)}" for name, value in scalars.items())
    return "\n".join(lines)


def class_columns(metrics: Mapping[str, Any], num_classes: int) -> dict[str, list[Any]]:
    """Title -> one value per class, for every list in `metrics`.

    A list of dicts (`per_category` of PQ) gives one column per key, with what else its name says in front. None stands
    for a class that was absent (nan in MeanIoU, BoundaryIoU and VolumeDice, -1 in AP, no segment in PQ).

    Raises:
        ValueError: a list has not one entry per class.
    """
    columns: dict[str, list[Any]] = {}
    for name, values in metrics.items():
        if not isinstance(values, (list, tuple)):
            continue
        if len(values) != num_classes:
            raise ValueError(f"{name} has {len(values)} entries but id2label {num_classes} classes")
        if values and isinstance(values[0], Mapping):
            prefix = _title(name, default="")
            found = _segment_columns(values)
            columns.update({f"{prefix}_{key}" if prefix else key: column for key, column in found.items()})
        else:
            columns[_title(name)] = [None if _is_absent(value) else value for value in values]
    return columns


def _segment_columns(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Columns of PQ's per-class dicts; the qualities of a class without segments are None."""
    seen = [any(entry.get(count, 0) for count in COUNT_COLUMNS) for entry in entries]
    return {
        key: [
            entry[key] if known or key in COUNT_COLUMNS else None for entry, known in zip(entries, seen, strict=True)
        ]
        for key in entries[0]
    }


def _title(name: str, default: str = "map") -> str:
    """Column head of a list: `per_category_iou` -> `iou`, `boundary_map_per_category` -> `boundary_map`."""
    return name.replace("per_category", "").strip("_") or default


def _short_title(title: str) -> str:
    """`boundary_true_positives` -> `boundary_TP`."""
    for name, short in COUNT_COLUMNS.items():
        title = title.replace(name, short)
    return title


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and (math.isnan(value) or value == -1))


def _cell(value: Any) -> str:
    if _is_absent(value):
        return "-"
    return f"{value:.{DECIMALS}f}" if isinstance(value, float) else str(value)


def _line(row: list[str], widths: list[int]) -> str:
    cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *cells[1:]])
