"""Bilinear reading of coarse maps: where each pixel of a photo lies between the cells of the model's output.

Only the part of the padded height and width that is image is read: `extent` (height, width), as parts of 1. With
extent 1 everything here is `F.interpolate(..., mode="bilinear", align_corners=False)`.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

FULL_EXTENT = (1.0, 1.0)
CHUNK_BYTES = 64 * 2**20  # of maps that are resized as a whole, because the target is hardly larger
# valid_extent is float32: a border closer than this part of a cell counts as lying on the cell's edge.
EXTENT_TOLERANCE = 1e-3

# Along one axis of T pixels: lower and upper source index (T,), and the weight of the upper one (T,).
Samples = tuple[Tensor, Tensor, Tensor]
Window = tuple[int, int, int, int]  # first row, end row, first column, end column of the photo


def native_size(maps: Tensor, extent: tuple[float, float]) -> tuple[int, int]:
    """Size (h, w) of the part of (N, h, w) maps that is image."""
    height, width = maps.shape[-2:]
    return max(1, round(extent[0] * height)), max(1, round(extent[1] * width))


def resize_maps(maps: Tensor, size: tuple[int, int], extent: tuple[float, float] = FULL_EXTENT) -> Tensor:
    """Resize the image part of (N, h, w) maps bilinearly to (N, H, W).

    The target pixel x is read at (x + 0.5) / W * extent * w - 0.5, without rounding the border to whole cells; cells
    that lie wholly in the padding are never read. With extent 1 this is `F.interpolate(..., align_corners=False)`.
    """
    height, width = maps.shape[-2:]
    if tuple(extent) == FULL_EXTENT:
        if (height, width) == tuple(size):
            return maps
        return F.interpolate(maps[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
    rows = sample_positions(height, size[0], extent[0], maps)
    return resample(maps, rows, sample_positions(width, size[1], extent[1], maps))


def sample_positions(length: int, target: int, extent: float, like: Tensor) -> Samples:
    """Where `resize_maps` reads along one axis of `length` cells for `target` pixels; the lower index never falls.

    At extent 1 positions of float32 maps are rounded as `F.interpolate` rounds them (the scale, then the fused product
    and sum): its positions are off by up to 1e-5 of a cell, which would show where two scores are that close.
    """
    last = min(length, max(1, math.ceil(extent * length - EXTENT_TOLERANCE))) - 1  # the last cell that holds image
    pixels = torch.arange(target, device=like.device, dtype=torch.float64) + 0.5
    if extent == 1.0 and like.dtype == torch.float32:
        scale = float(torch.tensor(length / target, dtype=torch.float32))
        position = (pixels * scale - 0.5).float().clamp(min=0, max=last)
    else:
        position = (pixels * (extent * length / target) - 0.5).clamp(min=0, max=last)
    lower = position.floor().long()
    return lower, (lower + 1).clamp(max=last), (position - lower).to(like.dtype)


def resample(maps: Tensor, rows: Samples, columns: Samples) -> Tensor:
    """Read (N, h, w) maps between the cells of `rows` and `columns`: (N, H, W)."""
    top, bottom, row_weight = rows
    # Columns first: they are slow to gather, and the maps are still small. Rows are copied whole.
    wide = resize_columns(maps, columns)
    return torch.lerp(wide.index_select(1, top), wide.index_select(1, bottom), row_weight[:, None])  # (N, H, W)


def resize_columns(maps: Tensor, columns: Samples) -> Tensor:
    """Read (N, h, w) maps between the cells of `columns` alone: (N, h, W)."""
    left, right, weight = columns
    return torch.lerp(maps.index_select(2, left), maps.index_select(2, right), weight)


def mask_windows(inside: Tensor, rows: Samples, columns: Samples) -> list[Window]:
    """For each of (N, h, w) bool maps the part of the photo that holds its mask: a pixel between cells is in it only
    if one of them is. Cells in the padding are not looked at; a mask without cells has an empty window."""
    cells = inside[:, : int(rows[1][-1]) + 1, : int(columns[1][-1]) + 1]
    bounds = []
    for any_cell, (lower, upper, _) in ((cells.any(dim=2), rows), (cells.any(dim=1), columns)):
        reached = (any_cell[:, lower] | any_cell[:, upper]).int()  # (N, H) or (N, W)
        length = reached.shape[1]
        first, last = reached.argmax(dim=1), length - reached.flip(1).argmax(dim=1)
        nothing = reached.amax(dim=1) == 0
        bounds += [first.masked_fill(nothing, 0), last.masked_fill(nothing, 0)]
    return [(top, bottom, left, right) for top, bottom, left, right in torch.stack(bounds, dim=1).tolist()]


def resized_chunks(maps: Tensor, size: tuple[int, int], extent: tuple[float, float]) -> Iterator[tuple[int, Tensor]]:
    """Resize (N, h, w) maps a few at a time; yields the index of the first map and the (n, H, W) chunk."""
    count = max(1, CHUNK_BYTES // (4 * size[0] * size[1]))
    for start in range(0, len(maps), count):
        yield start, resize_maps(maps[start : start + count], size, extent)
