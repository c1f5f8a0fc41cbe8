"""A `DatasetReport` as text for people: class tables, sizes, and the problems by kind."""

from collections.abc import Sequence
from itertools import groupby

from hf_maskformer.data.inspection_report import ClassCount, DatasetReport, FoundProblem, SplitReport, Spread
from hf_maskformer.data.problems import PROBLEM_KINDS

LISTED_PROBLEMS = 20  # of each kind
LISTED_NAMES = 12  # of classes that are never used
LISTED_SIZES = 4
NAME_WIDTH = 32  # of a class in the table
LINE_WIDTH = 240  # of a problem's message
SPREAD_DIGITS = 4  # significant


def format_report(report: DatasetReport, has_intensity_range: bool = False) -> str:
    """Everything but the pictures; long lists are cut and say how much more there is.

    Args:
        report: what was found.
        has_intensity_range: whether one was given, so that images of more than 8 bits can be trained on.
    """
    lines = [report.root]
    for format_name, group in groupby(
        sorted(report.splits, key=lambda split: split.format), lambda split: split.format
    ):
        splits = list(group)
        lines += ["", f"format {format_name}"]
        for same in _same_classes(splits):
            lines += ["", *_class_table(same)]
        lines += ["", *(line for split in splits for line in _split_lines(split, has_intensity_range))]
    return "\n".join([*lines, "", *_problem_lines(report)])


def _same_classes(splits: Sequence[SplitReport]) -> list[list[SplitReport]]:
    """Splits that can share one table."""
    groups: list[list[SplitReport]] = []
    for split in splits:
        names = [(entry.name, entry.isthing) for entry in split.classes]
        same = [group for group in groups if [(e.name, e.isthing) for e in group[0].classes] == names]
        if same:
            same[0].append(split)
        elif split.classes:
            groups.append([split])
    return groups


def _class_table(splits: Sequence[SplitReport]) -> list[str]:
    crowds = any(entry.crowds for split in splits for entry in split.classes)
    columns = ["images", "segments", "pixels", "share"] + ["crowds"] * crowds
    rows = [["id", "class", "kind", *columns * len(splits)]]
    used = [
        label for label, *_ in enumerate(splits[0].classes) if any(_is_used(split.classes[label]) for split in splits)
    ]
    for label in used:
        first = splits[0].classes[label]
        row = [str(label), _cut(first.name, NAME_WIDTH), "thing" if first.isthing else "stuff"]
        for split in splits:
            row += _class_cells(split.classes[label], crowds)
        rows.append(row)
    row = ["", "(void)", ""]
    for split in splits:
        row += ["", "", _short(split.void_pixels), _percent(split.void_share)] + [""] * crowds
    rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_row(row, widths) for row in rows]
    title = " " * (sum(widths[:3]) + 6)
    for number, split in enumerate(splits):
        start = 3 + number * len(columns)
        title += _name(split).ljust(sum(widths[start : start + len(columns)]) + 2 * len(columns))
    return [title.rstrip(), *lines, *_never_used(splits, used)]


def _class_cells(entry: ClassCount, crowds: bool) -> list[str]:
    cells = [str(entry.images), str(entry.segments), _short(entry.pixels), _percent(entry.share)]
    return [*cells, str(entry.crowds)] if crowds else cells


def _never_used(splits: Sequence[SplitReport], used: Sequence[int]) -> list[str]:
    """Classes that no split has, and those that one split lacks."""
    names = [entry.name for label, entry in enumerate(splits[0].classes) if label not in used]
    lines = [f"{len(names)} classes are never used: {_listed(names)}"] if names else []
    for split in splits:
        lacking = [name for name in split.unused_classes if name not in names]
        if lacking:
            lines.append(f"{_name(split)} lacks {_listed(lacking)}")
    return lines


def _split_lines(split: SplitReport, has_intensity_range: bool) -> list[str]:
    kind = "volumes" if split.format == "volumes" else "images"
    if not split.images:
        return [f"{_name(split)}: no {kind} could be read"]
    sizes = ", ".join(f"{_size(size)} ({count})" for size, count in split.sizes[:LISTED_SIZES])
    more = f" and {len(split.sizes) - LISTED_SIZES} more" if len(split.sizes) > LISTED_SIZES else ""
    order = "depth x height x width" if kind == "volumes" else "width x height"
    lines = [f"{_name(split)}: {split.images} {kind}, sizes ({order}) {sizes}{more}"]
    if len(split.sizes) > 1:
        spreads = [f"{name} {_spread(split.dimensions[name])}" for name in split.dimensions if "spacing" not in name]
        lines.append(f"  {', '.join(spreads)} (min / median / max)")
    spacings = [_spread(spread) for name, spread in split.dimensions.items() if name.startswith("spacing")]
    if spacings:
        lines.append(f"  spacing in mm, depth, height, width: {'; '.join(spacings)}")
    if split.deep_modes:
        what = ", ".join(f"{count} of mode {mode}" for mode, count in split.deep_modes.items())
        need = "" if has_intensity_range else "; training needs --intensity-range LOW HIGH"
        lines.append(f"  more than 8 bits: {what}{need}")
    return lines + _segment_lines(split, kind)


def _segment_lines(split: SplitReport, kind: str) -> list[str]:
    things = any(entry.isthing for entry in split.classes)
    unit = "voxels" if kind == "volumes" else "pixels"
    lines = []
    if split.objects is not None:
        counted = "objects" if things else "classes"
        lines.append(f"  {counted} per {kind.removesuffix('s')}: {_spread(split.objects)} (min / median / max)")
    if split.areas and things:
        quantiles = ", ".join(f"{_ordinal(q)} {_short(area)}" for q, area in split.areas.items())
        groups = ", ".join(f"{count} {name}" for name, count in split.area_groups.items())
        lines.append(f"  object areas in {unit}: {quantiles}")
        lines.append(f"  object sizes as COCO counts them: {groups}")
    if split.overlapping:
        lines.append(f"  segments overlap in {len(split.overlapping)} {kind}: {_listed(split.overlapping)}")
    if split.empty:
        lines.append(f"  without a segment: {len(split.empty)} {kind}: {_listed(split.empty)}")
    return lines


def _problem_lines(report: DatasetReport) -> list[str]:
    if not report.problems:
        return ["problems: none"]
    errors, total = report.errors, len(report.problems)
    lines = [f"problems: {total} ({errors} that training would stop at, {total - errors} warnings)"]
    for kind, meaning in PROBLEM_KINDS.items():
        found = [problem for problem in report.problems if problem.problem.kind == kind]
        if found:
            lines += ["", f"{kind} ({len(found)}): {meaning}", *_listed_problems(found, report.root)]
    return lines


def _listed_problems(found: Sequence[FoundProblem], root: str) -> list[str]:
    """The first of one kind; files are named from the root on."""
    ordered = sorted(found, key=lambda problem: not problem.refused)  # errors first
    lines = []
    for entry in ordered[:LISTED_PROBLEMS]:
        message = " ".join(entry.problem.message.replace(root.rstrip("/") + "/", "").split())
        lines.append(f"  {'error  ' if entry.refused else 'warning'} {_cut(message, LINE_WIDTH)}")
    more = len(found) - LISTED_PROBLEMS
    return [*lines, f"  and {more} more"] if more > 0 else lines


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Class and kind to the left, numbers to the right."""
    aligned = [
        cell.ljust(width) if column in (1, 2) else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(aligned).rstrip()


def _is_used(entry: ClassCount) -> bool:
    return entry.segments + entry.crowds > 0


def _name(split: SplitReport) -> str:
    return split.split or "all"


def _size(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size if len(size) == 3 else size[::-1]))


def _spread(spread: Spread) -> str:
    return " / ".join(f"{value:.{SPREAD_DIGITS}g}" for value in (spread.min, spread.median, spread.max))


def _ordinal(quantile: float) -> str:
    return {0.0: "least", 0.5: "median", 1.0: "largest"}.get(quantile, f"{100 * quantile:.0f}%")


def _short(number: float) -> str:
    """Three digits and k, M, G."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= limit:
            scaled = number / (1e3 if letter == "k" else limit)
            return f"{scaled:.1f}{letter}" if scaled < 100 else f"{scaled:.0f}{letter}"
    return f"{number:.0f}"


def _percent(share: float) -> str:
    if 0 < share < 0.0001:
        return "<0.01%"
    return f"{100 * share:.2f}%"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + more


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
