"""Masks from coarse logits straight to COCO's run-length code at the size of the photo: no mask is kept as pixels.

The rules of reading are those of `resampling`, the code is that of `masks`.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cell_grid import chunk_bytes
from .mask_runs import MaskRuns
from .resampling import Samples, Window, mask_windows, sample_positions


def logit(probability: float) -> float:
    """Comparing logits with this saves the sigmoid of every pixel."""
    if probability in (0, 1):
        return math.inf if probability == 1 else -math.inf
    return math.log(probability / (1 - probability))


def mask_codes(
    mask_logits: Tensor, size: tuple[int, int], extent: tuple[float, float], border: float
) -> list[tuple[dict[str, Any], int, float]]:
    """For each of (N, h, w) logits the RLE, at target size, of the mask from `border` on, its area and its mean
    probability inside (0 without pixels).

    Each is resized once, only in the window that can hold it, a band of photo columns at a time, and column by column
    as its code is written.
    """
    rows = sample_positions(mask_logits.shape[1], size[0], extent[0], mask_logits)
    columns = sample_positions(mask_logits.shape[2], size[1], extent[1], mask_logits)
    if len(mask_logits) == 0:
        return []
    starts, lengths, sums = [], [], []
    for logits, window in zip(mask_logits, mask_windows(mask_logits >= border, rows, columns), strict=True):
        edges, total = _column_edges(logits, window, rows, columns, border)
        places = edges.cpu().numpy()
        first, end = places[0::2], places[1::2]
        apart = first[1:] > end[:-1]  # a run may go on from the foot of a column to the head of the next
        first = np.concatenate([first[:1], first[1:][apart]])
        starts.append(first)
        lengths.append(np.concatenate([end[:-1][apart], end[-1:]]) - first)
        sums.append(total)
    offsets = np.cumsum([0, *map(len, starts)])
    runs = MaskRuns(np.concatenate(starts), np.concatenate(lengths), offsets, size)
    totals = torch.stack(sums).tolist()  # one transfer for all masks
    return [
        (rle, area, total / max(area, 1))
        for rle, area, total in zip(runs.rles(), runs.areas().tolist(), totals, strict=True)
    ]


def _column_edges(
    logits: Tensor, window: Window, rows: Samples, columns: Samples, border: float
) -> tuple[Tensor, Tensor]:
    """Of one (h, w) mask the first pixel of each run in a column and the one after its last, in turn, as places in the
    column-major photo (2 R,) int64; and the sum of its probabilities inside, a float64 scalar."""
    top, bottom, left, right = window
    above, below, row_weight = (part[top:bottom] for part in rows)
    before, after, column_weight = (part[left:right] for part in columns)
    maps = logits.t()
    tall = torch.lerp(maps.index_select(1, above), maps.index_select(1, below), row_weight)  # (w, bottom - top)
    height, photo_height = bottom - top, len(rows[0])
    count = max(1, chunk_bytes(logits.device) // (16 * max(height, 1)))
    edges, total = [rows[0].new_zeros(0)], torch.zeros((), dtype=torch.float64, device=logits.device)
    for start in range(0, right - left, count):
        band = slice(start, start + count)
        values = torch.lerp(
            tall.index_select(0, before[band]), tall.index_select(0, after[band]), column_weight[band, None]
        )  # (columns, bottom - top)
        framed = torch.zeros((len(values), height + 2), dtype=torch.bool, device=logits.device)
        inside = framed[:, 1:-1]
        torch.ge(values, border, out=inside)
        column, row = (framed[:, 1:] != framed[:, :-1]).nonzero().unbind(1)
        edges.append((column + (left + start)) * photo_height + (row + top))
        total += (values.sigmoid_() * inside).sum()
    return torch.cat(edges), total
