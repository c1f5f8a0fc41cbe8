"""How often two values meet in two maps of one size, read as runs instead of pixels.

Label maps are piecewise constant: a few percent of the pixels begin a run along which neither map changes. One pass of
comparisons finds them, and everything after it costs what the outlines are long. Maps that are mostly noise have no
runs worth the name; their pixels are then taken one by one.
"""

from typing import NamedTuple

import numpy as np

MAX_RUN_SHARE = 0.25  # with more runs than this share of the pixels, finding them costs more than it saves
SAMPLE = 1 << 12  # pixels in the middle of a large map that tell whether it is noise
MAX_TABLE_ID = 1 << 16  # ids up to here are looked up in a table, larger ones by bisection


class MapPairs(NamedTuple):
    """Pairs of values in reading order, as often as `lengths` says."""

    first: np.ndarray  # (R,) values of the first map, in its dtype
    second: np.ndarray  # (R,)
    lengths: np.ndarray | None  # (R,) int64 pixels of each pair; None: one each


def map_pairs(first: np.ndarray, second: np.ndarray) -> MapPairs:
    """The pairs of values of two integer maps of one shape."""
    one, other = first.reshape(-1), second.reshape(-1)
    middle = slice(one.size // 2, one.size // 2 + SAMPLE)
    large = one.size > 16 * SAMPLE
    if one.size > SAMPLE // 2 and not (large and _run_starts(one[middle], other[middle]) is None):
        starts = _run_starts(one, other)
        if starts is not None:
            lengths = np.empty_like(starts)
            np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
            lengths[-1] = one.size - starts[-1]
            return MapPairs(one[starts], other[starts], lengths)
    return MapPairs(one, other, None)


def _run_starts(one: np.ndarray, other: np.ndarray) -> np.ndarray | None:
    """(R,) int64 first pixel of each run of two flat maps; None where there are too many."""
    begins = np.empty(one.size, dtype=bool)
    begins[0] = True
    np.not_equal(one[1:], one[:-1], out=begins[1:])
    begins[1:] |= other[1:] != other[:-1]
    return np.flatnonzero(begins) if np.count_nonzero(begins) <= MAX_RUN_SHARE * one.size else None


def count_pairs(
    rows: np.ndarray, columns: np.ndarray, lengths: np.ndarray | None, shape: tuple[int, int]
) -> np.ndarray:
    """Table (shape) int64: how many pixels have a row number and a column number.

    Args:
        rows: (R,) integers 0..shape[0] - 1.
        columns: (R,) integers 0..shape[1] - 1.
        lengths: (R,) pixels of each entry; None: one each.
        shape: rows and columns of the table.
    """
    cells = np.multiply(rows, shape[1], dtype=np.int64)
    np.add(cells, columns, out=cells, dtype=np.int64)
    size = shape[0] * shape[1]
    # The weighted sums are float64, exact below 2^53 pixels.
    return np.bincount(cells, weights=lengths, minlength=size).astype(np.int64, copy=False).reshape(shape)


def id_positions(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Position in `ids` (N,) int64, all different, plus 1 of each integer of `values`; 0 where it is not in `ids`."""
    if not len(ids):
        return np.zeros(values.shape, dtype=np.int64)
    last = int(ids.max())
    if ids.min() >= 0 and last <= MAX_TABLE_ID:
        table = np.zeros(last + 2, dtype=np.int64)  # the last entry is for all other values
        table[ids] = np.arange(1, len(ids) + 1)
        return table[np.where((values >= 0) & (values <= last), values.astype(np.int64, copy=False), last + 1)]
    order = np.argsort(ids)
    ordered = ids[order]
    numbers = values.astype(np.int64, copy=False)  # numpy would compare uint64 with int64 as floats
    slots = np.minimum(np.searchsorted(ordered, numbers), len(ids) - 1)
    found = ordered[slots] == numbers
    if values.dtype == np.uint64:
        found &= values < 1 << 63  # beyond, int64 wraps around to negative numbers
    return np.where(found, order[slots] + 1, 0)
