"""Polygons as runs of pixels, equal to those of the COCO API, in time that grows with the outline, not the image.

The COCO API (Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014) walks the outline on a grid that is
five times finer than the pixels and toggles between outside and inside where it crosses the centre line of a pixel
column. Only those crossings are computed here, for all edges of all polygons of an image at once.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

UPSAMPLING = 5  # fine grid points a pixel side
CENTRE = UPSAMPLING // 2  # the outline crosses column x between the fine columns 5 x + 2 and 5 x + 3
MAX_COORDINATE = 2**20  # pixels; up to here the crossings are exact, and no image is larger


def check_polygon(polygon: Any, index: int) -> np.ndarray:
    """(P, 2) points of a flat list x0, y0, x1, y1, ...

    Raises:
        ValueError: fewer than three points, an odd number of values, or a value that is no number, not finite or
            farther than `MAX_COORDINATE` from the image; the message names the polygon by `index`.
    """
    try:
        values = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"polygon {index} holds a value that is no number: {error}") from error
    if values.ndim != 1 or len(values) < 6 or len(values) % 2:
        raise ValueError(
            f"polygon {index} must be a flat list of at least 3 points (6 values, x and y in turn), "
            f"got shape {values.shape}"
        )
    if not np.abs(values).max() <= MAX_COORDINATE:  # false for nan too
        wrong = values[~(np.abs(values) <= MAX_COORDINATE)][0]
        raise ValueError(f"polygon {index} holds the value {wrong}, it must be finite and within {MAX_COORDINATE}")
    return values.reshape(-1, 2)


def polygon_runs(
    polygons: Sequence[np.ndarray], groups: Sequence[int] | np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of the pixels inside polygons, those of one group united.

    Args:
        polygons: (P, 2) points each, as `check_polygon` gives them.
        groups: the group of each polygon, ascending from 0.
        height: of the image.
        width: of the image.

    Returns:
        group, first pixel and end (one past the last pixel) of each run over the pixels read column by column;
        ascending, and runs of one group do not touch.
    """
    empty = np.zeros(0, dtype=np.int64)
    if not len(polygons):
        return empty, empty, empty
    owners = np.asarray(groups, dtype=np.int64)
    polygon, position = _crossings(polygons, height, width)
    stride = height * width + 1
    keys = np.sort(polygon * stride + position)
    # Two crossings at one place cancel each other. What is left alternates between entering and leaving.
    bounds = np.concatenate([[0], np.flatnonzero(keys[1:] != keys[:-1]) + 1, [len(keys)]])
    keys = keys[bounds[:-1][(bounds[1:] - bounds[:-1]) & 1 == 1]]
    starts, ends = keys[0::2], keys[1::2]
    owner = starts // stride
    if len(owners) == owners[-1] + 1:  # one polygon each
        return owner, starts - owner * stride, ends - owner * stride
    shift = (owners[owner] - owner) * stride
    starts, ends = _union(starts + shift, ends + shift)
    owner = starts // stride
    return owner, starts - owner * stride, ends - owner * stride


def _union(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unites runs that overlap or touch."""
    # A run that starts where another ends must come first, so that the depth does not fall to 0 between them.
    events = np.sort(np.concatenate([2 * starts, 2 * ends + 1]))
    leaving = events & 1
    depth = np.cumsum(1 - 2 * leaving)
    return events[(depth == 1) & (leaving == 0)] >> 1, events[depth == 0] >> 1


def _crossings(polygons: Sequence[np.ndarray], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Polygon and pixel position of each place where an outline crosses the centre line of a pixel column."""
    counts = np.array([len(points) for points in polygons])
    corners = np.trunc(UPSAMPLING * np.concatenate(polygons) + 0.5).astype(np.int64)  # (E, 2)
    following = np.arange(1, len(corners) + 1)
    lasts = np.cumsum(counts) - 1
    following[lasts] = lasts + 1 - counts
    starts, ends = corners, corners[following]
    low_x, high_x = np.minimum(starts[:, 0], ends[:, 0]), np.maximum(starts[:, 0], ends[:, 0])
    first = np.maximum((low_x + UPSAMPLING - 1 - CENTRE) // UPSAMPLING, 0)
    last = np.minimum((high_x - 1 - CENTRE) // UPSAMPLING, width - 1)
    crossed = np.maximum(last - first + 1, 0)  # columns that each edge crosses
    edge = np.repeat(np.arange(len(corners)), crossed)
    column = np.arange(len(edge)) + np.repeat(first - (np.cumsum(crossed) - crossed), crossed)
    steep = (high_x - low_x < np.abs(ends[:, 1] - starts[:, 1])).astype(np.int64)
    # Edges run towards the larger coordinate of their longer axis, so that an edge is the same in both directions.
    rows = np.arange(len(corners))
    swap = starts[rows, steep] > ends[rows, steep]
    low, high = np.where(swap[:, None], ends, starts), np.where(swap[:, None], starts, ends)
    fine_y = np.empty(len(edge), dtype=np.int64)
    is_steep = steep[edge] == 1
    for chosen, crossing in ((~is_steep, _flat_crossing), (is_steep, _steep_crossing)):
        edges = edge[chosen]
        fine_y[chosen] = crossing(low[edges], high[edges], UPSAMPLING * column[chosen] + CENTRE)
    row = np.clip((fine_y + UPSAMPLING - 1 - CENTRE) // UPSAMPLING, 0, height)
    polygon = np.repeat(np.arange(len(polygons)), counts)[edge]
    return polygon, column * height + row


def _flat_crossing(low: np.ndarray, high: np.ndarray, fine_x: np.ndarray) -> np.ndarray:
    """Smaller fine y of the outline at fine_x and fine_x + 1, for edges that are at least as wide as high."""
    slope = (high[:, 1] - low[:, 1]) / (high[:, 0] - low[:, 0])
    step = fine_x - low[:, 0]
    here, there = (np.trunc(low[:, 1] + slope * t + 0.5) for t in (step, step + 1))
    return np.minimum(here, there).astype(np.int64)


def _steep_crossing(low: np.ndarray, high: np.ndarray, fine_x: np.ndarray) -> np.ndarray:
    """Fine y before the first step that is on the other side of the line, for edges that are higher than wide."""
    slope = (high[:, 0] - low[:, 0]) / (high[:, 1] - low[:, 1])

    def passed(step: np.ndarray) -> np.ndarray:
        right = np.trunc(low[:, 0] + slope * step + 0.5) > fine_x
        return right == (slope > 0)

    step = np.ceil((fine_x + 0.5 - low[:, 0]) / slope)
    # The quotient's rounding may be off by one step from the sum that decides.
    step += ~passed(step)
    step -= passed(step - 1)
    return low[:, 1] + step.astype(np.int64) - 1
