"""A confusion matrix as a picture: rows truth, columns prediction, each row in per cent of its class."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from hf_maskformer.evaluation.details import Confusion

RIGHT, WRONG = colormaps["Blues"], colormaps["Oranges"]  # told apart by the colour-blind too
ABSENT = to_rgb("#e4e4e7")  # a row without truth
GREY, INK = "#a1a1aa", "#18181b"
# Most classes for a size of cell in inches; a cell below NUMBERS_FROM has no number.
CELL_SIZES = ((6, 0.62), (14, 0.48), (40, 0.33), (80, 0.2), (10**6, 0.115))
NUMBERS_FROM = 0.3
POINTS = 72  # in an inch
TICK_FONT = (4.2, 9.5)  # points
CHARACTER_WIDTH = 0.6  # of the font size
MAX_NAME = 28  # characters
MOST_UNUSED_SHOWN = 40  # classes; with more, those that never occur are left out
SLANTED_UP_TO = 14  # more column names than this stand upright
SLANTED_HEIGHT = 0.75  # of their length: sin(45 degrees) and the height of the letters
DPI = 150
# A mistake of 5 % must be seen beside a class that is 95 % right.
SHADE_POWER = 0.6
DARK_SHADE = 0.6  # from here on numbers are white


def plot_confusion_matrix(confusion: Confusion, path: str | Path) -> None:
    """Writes the picture as a PNG.

    Right answers are blue and mistakes orange, the darker the larger their share of the row. Numbers are per cent,
    rounded; a cell below half a per cent has none. The rows of classes that are not in the truth are grey. On the
    right stands each class's share of the truth. Where there are too many classes for numbers there are only colours,
    and classes that are neither in truth nor prediction are left out; the title says how many.
    """
    confusion, left_out = _without_unused(confusion)
    matrix = confusion.matrix
    rows, columns = matrix.shape
    totals = matrix.sum(axis=1)  # (R,)
    shares = matrix / np.maximum(totals, 1)[:, None]  # (R, C)
    cell = next(size for most, size in CELL_SIZES if max(rows, columns) <= most)
    font = float(np.clip(cell * POINTS * 0.5, *TICK_FONT))
    row_names, column_names = ([_shortened(name) for name in names] for names in (confusion.rows, confusion.columns))
    has_numbers = cell >= NUMBERS_FROM

    figure, axes = _canvas(rows, columns, cell, font, row_names, column_names)
    axes.imshow(_colors(shares, totals, confusion.num_classes), interpolation="nearest", aspect="equal")
    _grid(axes, confusion, cell)
    _names(axes, row_names, column_names, font, absent=totals == 0)
    if has_numbers:
        _numbers(axes, shares, totals, font)
    _truth_shares(axes, totals[: confusion.num_classes], columns, font)
    title = _title(matrix, confusion.counted, left_out)
    axes.set_title(title, fontsize=max(font, 8) * 1.15, color=INK, loc="left", pad=8)
    axes.set_xlabel("prediction", fontsize=max(font, 7), color=INK)
    axes.set_ylabel("truth", fontsize=max(font, 7), color=INK)
    FigureCanvasAgg(figure).print_png(str(path))


def _canvas(
    rows: int, columns: int, cell: float, font: float, row_names: list[str], column_names: list[str]
) -> tuple[Figure, Any]:
    """A figure whose axes have exactly the size of the cells, with room for the names on the left and below."""
    name_width = font * CHARACTER_WIDTH / POINTS
    left = 0.45 + name_width * max(map(len, row_names))
    slant = SLANTED_HEIGHT if len(column_names) <= SLANTED_UP_TO else 1.0
    below = 0.45 + name_width * slant * max(map(len, column_names))
    above, right = 0.55, 0.25 + name_width * 7
    width, height = columns * cell, rows * cell
    full_width = max(left + width + right, left + 4.2)  # the title must fit
    full_height = below + height + above
    figure = Figure(figsize=(full_width, full_height), dpi=DPI)
    axes = figure.add_axes((left / full_width, below / full_height, width / full_width, height / full_height))
    return figure, axes


def _colors(shares: np.ndarray, totals: np.ndarray, num_classes: int) -> np.ndarray:
    """(R, C, 3) uint8 colours of the cells; what is neither there nor predicted is grey."""
    shade = shares**SHADE_POWER
    on_diagonal = np.equal.outer(np.arange(shares.shape[0]), np.arange(shares.shape[1]))  # (R, C)
    colors = np.where(on_diagonal[..., None], RIGHT(shade)[..., :3], WRONG(shade)[..., :3])
    colors[shares == 0] = 1.0
    colors[totals == 0] = ABSENT
    colors[num_classes:, num_classes:] = ABSENT
    return np.rint(255 * colors).astype(np.uint8)


def _grid(axes: Any, confusion: Confusion, cell: float) -> None:
    """Thin lines between the cells, a strong one before a row or column that is no class."""
    rows, columns = confusion.matrix.shape
    ends = (-0.5, columns - 0.5), (-0.5, rows - 0.5)
    axes.vlines(np.arange(columns + 1) - 0.5, *ends[1], color="#d4d4d8", linewidth=min(0.8, cell * 2))
    axes.hlines(np.arange(rows + 1) - 0.5, *ends[0], color="#d4d4d8", linewidth=min(0.8, cell * 2))
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if columns > confusion.num_classes:
        axes.axvline(confusion.num_classes - 0.5, color=INK, linewidth=1.2)
    if rows > confusion.num_classes:
        axes.axhline(confusion.num_classes - 0.5, color=INK, linewidth=1.2)


def _names(axes: Any, row_names: list[str], column_names: list[str], font: float, absent: np.ndarray) -> None:
    slanted = len(column_names) <= SLANTED_UP_TO
    axes.set_yticks(range(len(row_names)), row_names, fontsize=font)
    axes.set_xticks(
        range(len(column_names)),
        column_names,
        fontsize=font,
        rotation=45 if slanted else 90,
        ha="right" if slanted else "center",
        rotation_mode="anchor" if slanted else "default",
    )
    for labels in (axes.get_yticklabels(), axes.get_xticklabels()):
        for index, label in enumerate(labels):
            label.set_color(GREY if index < len(absent) and absent[index] else INK)


def _numbers(axes: Any, shares: np.ndarray, totals: np.ndarray, font: float) -> None:
    for row, column in np.argwhere(shares >= 0.005):
        dark = shares[row, column] ** SHADE_POWER > DARK_SHADE
        text = f"{100 * shares[row, column]:.0f}"
        color = "white" if dark else INK
        axes.text(column, row, text, ha="center", va="center", fontsize=font * 0.95, color=color)


def _truth_shares(axes: Any, totals: np.ndarray, columns: int, font: float) -> None:
    """Each class's share of the truth, to the right of its row."""
    left = columns - 0.5 + 0.15
    total = max(int(totals.sum()), 1)
    for row, count in enumerate(totals):
        text = f"{100 * count / total:.1f} %" if count else "absent"
        axes.text(left, row, text, ha="left", va="center", fontsize=font * 0.9, color=GREY)
    below = len(axes.get_yticks()) - 0.4
    axes.text(left, below, "share\nof truth", ha="left", va="top", fontsize=font * 0.9, color=GREY)


def _without_unused(confusion: Confusion) -> tuple[Confusion, int]:
    """Many classes without those that are neither there nor predicted, and the number of these."""
    count = confusion.num_classes
    matrix = confusion.matrix
    used = (matrix[:count].sum(axis=1) > 0) | (matrix[:, :count].sum(axis=0) > 0)  # (K,)
    if count <= MOST_UNUSED_SHOWN or used.all() or not used.any():
        return confusion, 0
    rows = [*np.flatnonzero(used), *range(count, matrix.shape[0])]
    columns = [*np.flatnonzero(used), *range(count, matrix.shape[1])]
    names = [confusion.rows[row] for row in rows], [confusion.columns[column] for column in columns]
    return Confusion(matrix[np.ix_(rows, columns)], *names, confusion.counted), count - int(used.sum())


def _title(matrix: np.ndarray, counted: str, left_out: int) -> str:
    title = f"Confusion of {counted}, % of each row ({_short_number(int(matrix.sum()))} {counted})"
    return f"{title}\n{left_out} classes are in neither truth nor prediction" if left_out else title


def _short_number(value: int) -> str:
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if value >= size:
            return f"{value / size:.1f} {word}"
    return f"{value:,}"


def _shortened(name: str) -> str:
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
