"""Metrics as a table for people: one row per class, the overall figures below."""

import math
from collections.abc import Mapping
from typing import Any

DECIMALS = 4
COUNT_COLUMNS = {"true_positives": "TP", "false_positives": "FP", "false_negatives": "FN"}


def format_table(metrics: Mapping[str, Any], id2label: Mapping[int, str]) -> str:
    """Text table of what a metric's `compute` (or `evaluate`) returned.

    Lists in `metrics` with one entry per class become columns; a list of dicts (`per_category` of PQ) one column per
    key, with what else its name says in front. Numbers stand below as `name value` lines. "-" stands for a class that
    was absent (nan in MeanIoU, BoundaryIoU and VolumeDice, -1 in AP, no segment in PQ).
    """
    columns: dict[str, list[Any]] = {}
    scalars: dict[str, Any] = {}
    for name, value in metrics.items():
        if not isinstance(value, (list, tuple)):
            scalars[name] = value
        elif len(value) != len(id2label):
            raise ValueError(f"{name} has {len(value)} entries but id2label {len(id2label)} classes")
        elif value and isinstance(value[0], Mapping):
            prefix = _title(name, default="")
            found = _segment_columns(value)
            columns.update({f"{prefix}_{key}" if prefix else key: column for key, column in found.items()})
        else:
            columns[_title(name)] = list(value)

    lines = []
    if columns:
        rows = [["class", *columns]]
        for label in sorted(id2label):
            rows.append([id2label[label], *(_cell(column[label]) for column in columns.values())])
        widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
        lines = [_line(row, widths) for row in rows]
        lines.insert(1, "-" * len(lines[0]))
        lines.append(lines[1])
    width = max((len(name) for name in scalars), default=0)
    lines.extend(f"{name.ljust(width)}  {_cell(value)}" for name, value in scalars.items())
    return "\n".join(lines)


def _segment_columns(entries: list[Mapping[str, Any]] | tuple[Mapping[str, Any], ...]) -> dict[str, list[Any]]:
    """Columns of PQ's per-class dicts; the qualities of a class without segments are None."""
    seen = [any(entry.get(count, 0) for count in COUNT_COLUMNS) for entry in entries]
    columns: dict[str, list[Any]] = {}
    for key in entries[0]:
        if key in COUNT_COLUMNS:
            columns[COUNT_COLUMNS[key]] = [entry[key] for entry in entries]
        else:
            columns[key] = [entry[key] if known else None for entry, known in zip(entries, seen, strict=True)]
    return columns


def _title(name: str, default: str = "map") -> str:
    """Column head of a list: `per_category_iou` -> `iou`, `boundary_map_per_category` -> `boundary_map`."""
    return name.replace("per_category", "").strip("_") or default


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and (math.isnan(value) or value == -1)):
        return "-"
    return f"{value:.{DECIMALS}f}" if isinstance(value, float) else str(value)


def _line(row: list[str], widths: list[int]) -> str:
    cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *cells[1:]])
